"""Evaluation: how often a checkpoint succeeds, by reward token, in figures that others can check.

    python eval_bfcl.py --ckpt runs/rl_rcgrpo/model                       # test part of the split, high token
    python eval_bfcl.py --ckpt DIR --split all --tool_docs full --temperature 0 --official_out results
    python eval_bfcl.py --score results/Qwen_Qwen3-0.6B-FC                # official result files, no model
    python eval_bfcl.py --compare runs/eval_a runs/eval_b                 # --out folders of evaluations
    python eval_bfcl.py --show multi_turn_base_3 --out runs/eval          # a transcript, then the gold calls

    1. roll out   every task --samples times under each reward token; what has ended is on disk at once
    2. figures    accuracy = mean reward, 95 % interval bootstrapped over families (the variants of an id are
                  related), error types; tables, eval.json, and as last line one JSON object
    3. official   result files of the leaderboard, written, or read and judged
    4. compare    arms side by side, paired differences, a picture

Under torchrun the ranks share the tasks. --out holds config.json (what is evaluated, and how), eval.json, and
of checkpoint n: n.tokenizer.json and n_TOKEN.rankR.jsonl, the trajectories of each rank as they end.
"""
import contextlib
import itertools
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import bfcl_env

if __name__ == "__main__":
    bfcl_env.fix_hash_seed()

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

import rollout as sampler
from bfcl_env import CALL_FORMATS, BfclError, CallSyntaxError, judge, parse_calls, without_thoughts
from rollout import (Trajectory, check_model, checksum, compute_dtype, load_policy, mean_reward, number,
                     rollout, run_main, transcript)
from sft_rctp import lock_run_dir, check_same_run, peak_memory_gb, init_distributed, atomic_write

IGNORED_ON_RESUME = ("ckpt", "out", "score", "compare", "show", "official_out")  # flags that change no result
# What evaluations that are compared have in common.
COMPARABLE = ("split_by", "split", "categories", "tasks", "max_tasks", "tool_docs", "protocol", "reward",
         "dtype", "temperature", "max_new_tokens", "max_sampled_tokens", "max_len")
# The one comparison that was named beforehand, evaluated with the high token; all others are exploratory.
PRIMARY = ("RCTP-FT + RC-GRPO", "RCTP-FT + GRPO (high token)")


def parse_args():
    """(mode, flags), checked."""
    parser = bfcl_env.Parser("Accuracy by reward token, scores of official result files, "
                                     "comparison of evaluations, transcripts.")
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], help=f"model directories, hub ids, or {sampler.DEFAULT_MODEL}")
    add("--score", metavar="DIR",
        help="judge the official result files in this model's folder; its name says how calls are read")
    add("--compare", nargs="+", metavar="RUN",
        help="--out folders of evaluations, one or several per arm: other weights of an arm are its seeds")
    add("--show", metavar="ID", help="print this task's first transcript from --out, of its last checkpoint")
    add("--reward_tokens", default="high", help="comma list of high, low, none (default: %(default)s)")
    add("--samples", type=number(int, 1), default=1, help="rollouts a task and token (default: %(default)s)")
    add("--out", help="folder of the evaluation; an interrupted one is continued (default: runs/eval; with "
        "--compare runs/compare)")
    add("--official_out", metavar="DIR", help="write result files for the official evaluator below DIR")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
        help="of the model (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of the sampling (default: %(default)s)")
    sampler.add_sampling_flags(parser)
    bfcl_env.add_env_flags(parser, split=None)
    args = parser.parse_args()
    # A model's official files hold all tasks, whatever our split is.
    args.split = args.split or ("all" if args.score else "test")
    args.out = Path(args.out or ("runs/compare" if args.compare else "runs/eval"))
    args.reward_tokens = args.reward_tokens.split(",")
    modes = [name for name in MODES if getattr(args, name)]
    if len(modes) != 1:  # there is no default one
        raise BfclError("give one of --ckpt DIR, --score DIR, --compare RUN RUN, --show ID; given: "
                        f"{', '.join(modes) or 'none of them'}")
    if not set(args.reward_tokens) <= {"high", "low", "none"}:
        raise BfclError(f"unknown reward token in {args.reward_tokens}: give --reward_tokens high,low,none")
    if (args.official_out or args.score) and (args.protocol, args.reward) != ("official", "official"):
        raise BfclError("official result files have only --protocol official and --reward official")
    # A sample a task, of one checkpoint: that is what a result file can hold.
    if args.official_out and not len(args.ckpt) == len(args.reward_tokens) == args.samples == 1:
        raise BfclError("official result files hold one answer a task: give --official_out with one --ckpt, "
                        "one of --reward_tokens, and --samples 1")
    for ckpt in args.ckpt:
        check_model(ckpt)
    return modes[0], args


# ---- 1. Roll out -------------------------------------------------------------------------------------------
def finished(out, stem) -> dict[tuple, Trajectory]:
    """The rollouts of a checkpoint and token by (task, sample), from the files of all ranks."""
    found = {}  # a later line replaces an earlier one
    for path in out.glob(f"{stem}.rank*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut
                t = Trajectory.from_json(line)
                found[t.task, t.sample] = t
    return dict(sorted(found.items()))


def roll_out_tasks(policy, tasks, make_env, token, n, args, distributed) -> list[Trajectory]:
    """Every task --samples times; those that an earlier process finished are not made again. The random
    numbers of a rollout follow from (seed, 0, task id, 0, sample)."""
    old = finished(args.out, f"{n}_{token}")
    todo = [(task, j) for task in tasks for j in range(args.samples) if (task.id, j) not in old]
    mine = todo[distributed.rank::distributed.size]  # this rank's (task, sample)
    dist.barrier()  # every rank has read the same before any goes on
    with (args.out / f"{n}_{token}.rank{distributed.rank}.jsonl").open("a") as file:
        if file.tell():
            print(file=file)  # ends a line that was cut

        def on_end(index, t):
            t.sample = mine[index][1]
            print(t.to_json(), file=file, flush=True)
        tokens = [None if token == "none" else token] * len(mine)
        keys = [(args.seed, 0, task.id, 0, j) for task, j in mine]
        title = f"checkpoint {n}, {token} token" if distributed.is_main else None
        rollout(policy, [make_env(task) for task, _ in mine], tokens, keys, on_end=on_end, progress=title,
                **sampler.sampling(args))
    dist.barrier()  # every rank has written its own
    return list(finished(args.out, f"{n}_{token}").values())


def arm_name(stage_info) -> str | None:
    """Stage 1 by its data, stage 2 by the tokens of its rollouts; None for a model that is not from here."""
    if not stage_info.stage:
        return None
    arm = {"sft": "SFT", "mixed": "mixed-data SFT", "rctp": "RCTP-FT"}[stage_info.arm]  # as in the paper
    if stage_info.data_source == "rollouts":
        arm += " on own rollouts"
    if stage_info.stage == "rcgrpo":
        token = stage_info.reward_tokens
        arm += " + RC-GRPO" if token == "mixed" else f" + GRPO ({'no' if token == 'none' else token} token)"
        if stage_info.advantage != "group":
            arm += f", {stage_info.advantage} advantage"
        if stage_info.dynamic_sampling:
            arm += ", dynamic sampling"
    return arm


def evaluate_checkpoint(n, tasks, args, distributed):
    """The table's row of --ckpt number n: what it is, and by reward token its figures and `correct`."""
    torch.manual_seed(0)  # `tiny` is drawn, on all ranks alike
    dtype = compute_dtype(args.dtype, distributed.device)
    policy = load_policy(args.ckpt[n], dtype, distributed.device, thinking=args.thinking)
    stage_info, call_format, sha256 = policy.stage_info, policy.call_format(args.call_format), checksum(policy.model)
    check_same_run(args.out, distributed, {f"checkpoint {n}": {"sha256": sha256, "call_format": call_format}})
    make_env = bfcl_env.make_env_fn(args, call_format)
    fit = sampler.filter_overlong(policy, tasks, make_env, args.max_len)
    row = {"arm": arm_name(stage_info) or policy.name,
           "ckpt": policy.name,
           "model": stage_info.base_model or policy.name,
           "sha256": sha256,  # of the weights that were really loaded
           "call_format": call_format,
           "thinking": policy.chat.thinking,
           "stage_info": {**asdict(stage_info), "tasks": len(stage_info.tasks)},
           "tasks_left_out": len(tasks) - len(fit),  # since they do not fit: they could only fail
           "trained_on": sum(task.id in stage_info.tasks for task in tasks),
           "correct": {}}  # token -> task id -> mean reward
    distributed.print0(f"{row['arm']}: {policy.name} | weights sha256 {sha256[:12]} | call format {call_format} "
              f"({policy.chat.why}) | all that fit: {len(fit)} of {len(tasks)} tasks")
    for name in ("tool_docs", "protocol"):
        if stage_info.stage and getattr(stage_info, name) != getattr(args, name):
            distributed.print0(f"warning: it was trained with --{name} {getattr(stage_info, name)}")
    if distributed.is_main:  # for --show
        atomic_write(args.out / f"{n}.tokenizer.json", policy.tokenizer.backend_tokenizer.to_str())
    for token in args.reward_tokens:
        if stage_info.stage and token not in stage_info.stage1_reward_tokens:
            distributed.print0(f"warning: its stage 1 never saw the {token} token (only {', '.join(stage_info.stage1_reward_tokens)})"
                      ": it has not learned what that means")
        trajectories = roll_out_tasks(policy, fit, make_env, token, n, args, distributed)
        if distributed.is_main:
            row[token] = summarize(trajectories, f"{row['arm']}, {token} token")
            row["correct"][token] = mean_reward(trajectories, lambda t: t.task)
            if args.official_out:
                rows = official_rows(tasks, trajectories, policy.tokenizer, call_format)
                write_official(Path(args.official_out), call_format, rows)
    return row


def evaluate(args):
    """Evaluate the checkpoints, print the table, write eval.json."""
    began, tasks = time.monotonic(), bfcl_env.select_tasks(args)
    distributed = init_distributed()
    lock_run_dir(args, distributed)
    facts = {name: value for name, value in vars(args).items() if name not in IGNORED_ON_RESUME}
    facts["dtype"] = str(compute_dtype(args.dtype, distributed.device))  # what auto means here
    check_same_run(args.out, distributed, {**facts, "checkpoints": len(args.ckpt)})
    table = []  # one row a checkpoint
    for n in range(len(args.ckpt)):
        table.append(evaluate_checkpoint(n, tasks, args, distributed))
        if table[-1]["sha256"] in [row["sha256"] for row in table[:-1]]:
            distributed.print0(f"warning: {args.ckpt[n]} and another checkpoint hold the same weights")
    dist.destroy_process_group()
    if not distributed.is_main:
        return
    tokens, last, lines = args.reward_tokens, table[-1], []
    minutes = (time.monotonic() - began) / 60
    for row in table:
        accuracies = [percent(row[token]["overall"]) for token in tokens]
        lines.append([row["arm"], *accuracies, row[tokens[0]]["overall"]["n"], row["tasks_left_out"]])
    heads = [f"accuracy, {token} token" for token in tokens]
    print_columns(["checkpoint", *heads, "n", "tasks left out"], lines)
    print(f"\nModel: {last['model']}. {len(tasks)} tasks x {args.samples} rollouts "
          f"a token at temperature {args.temperature}; docs {args.tool_docs}, protocol {args.protocol}, reward "
          f"{args.reward}; percent with the 95 % interval over families; {minutes:.1f} minutes.")
    if seen := max(row["trained_on"] for row in table):
        print(f"{seen} of the {len(tasks)} tasks were trained on: there the figures show what was memorised.")
    result = {**facts, **last[tokens[0]], "table": table, "minutes": minutes,
              "peak_memory_gb": peak_memory_gb(distributed.device)}
    atomic_write(args.out / "eval.json", result)
    print(json.dumps({**result, "table": [{**row, "correct": None} for row in table]}))


# ---- 2. Figures --------------------------------------------------------------------------------------------
def families_of(tasks) -> list[int]:
    """The family of each task id."""
    family = {}  # index -> the least of its family
    for group in bfcl_env.families(bfcl_env.load_tasks()):
        family.update(dict.fromkeys(group, group[0]))
    return [family[int(task.rpartition("_")[2])] for task in tasks]


def bootstrap(arms: list[list[dict]], draws=2000, seed=0):
    """The arms' means in each draw, [arms, draws]. arms[a][s] is the {task: mean reward} of seed s; the tasks
    are the same everywhere.

    A draw takes families once for all arms, which pairs them, then seeds for each arm on its own."""
    rng, tasks = np.random.default_rng(seed), list(arms[0][0])
    out = []  # [draws] of each arm
    _, member = np.unique(families_of(tasks), return_inverse=True)  # [tasks] number of its family
    count = np.bincount(member)  # [families] tasks
    drawn = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), draws)  # [draws, families]
    for runs in arms:
        sums = [np.bincount(member, [run[task] for task in tasks]) for run in runs]  # [seeds, families]
        means = drawn @ np.transpose(sums) / (drawn @ count)[:, None]  # [draws, seeds]
        seeds = rng.integers(len(runs), size=means.shape)  # [draws, seeds] which ones a draw takes
        out.append(np.take_along_axis(means, seeds, 1).mean(1))
    return np.stack(out)


def interval(draws, tasks, least=0.0) -> list[float]:
    """95 %, of one arm over these tasks; of a difference with `least` -1."""
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    if low == high:  # nothing varies: the exact binomial interval over families
        bound = 1 - 0.025 ** (1 / len(set(families_of(tasks))))
        low, high = max(least, low - bound), min(1.0, high + bound)
    return [low, high]


def figures(trajectories: list[Trajectory]):
    """What a table says of some rollouts; means are over rollouts."""
    failed = [t.verdict["error_type"] or "reward below 1" for t in trajectories if t.reward < 1]
    errors = Counter(error.split(":")[-1] for error in failed)  # without "multi_turn:"
    reasons = Counter(t.reason for t in trajectories)
    rewards = mean_reward(trajectories, lambda t: t.task)
    return {"accuracy": mean(t.reward for t in trajectories),
            "n": len(trajectories),
            "interval": interval(bootstrap([[rewards]]), rewards),
            "errors": dict(errors.most_common()),
            "reasons": dict(reasons.most_common()),  # how they ended
            "calls": mean(t.calls for t in trajectories),
            "messages": mean(t.steps for t in trajectories),  # of the model
            "tokens": mean(sum(t.loss_mask) for t in trajectories)}  # sampled


def summarize(trajectories: list[Trajectory], title):
    """{"overall": figures, "categories": {name: figures}}, printed as a table too."""
    categories, lines = {}, []  # lines of the table
    for category in bfcl_env.CATEGORIES:
        if some := [t for t in trajectories if t.task.startswith(category + "_")]:
            categories[category] = figures(some)
    overall = figures(trajectories)  # of all together, not a mean of the categories
    for name, f in {**categories, "overall": overall}.items():
        lines.append([name, percent(f), f["n"], f"{f['calls']:.1f}",
                      f"{f['tokens']:.1f}" if f["tokens"] else "-", f["errors"]])
    print(f"\n{title}")
    print_columns(["category", "accuracy %", "n", "calls", "tokens", "errors"], lines)
    print(f"ended by: {overall['reasons']}")
    return {"overall": overall, "categories": categories}


def percent(f, key="accuracy"):
    """Figure and interval, in percent."""
    return f"{100 * f[key]:5.1f} [{100 * f['interval'][0]:.0f}, {100 * f['interval'][1]:.0f}]"


def print_columns(head, lines):
    """A table, its columns as wide as their widest cell."""
    rows = [head, ["---"] * len(head), *lines]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for row in rows:
        print(" | ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


# ---- 3. Official result files ------------------------------------------------------------------------------
# A `result` there is [turn][step]: what the model said.

def calls_in(step, call_format) -> list[str]:
    """The calls of a step; none where the official decoders find none or raise. A list is the answer of a
    vendor's function-calling API, [{name: arguments}]."""
    calls = []
    try:
        if not isinstance(step, list):  # the usual case
            return [str(call) for call in parse_calls(step, call_format)]
        for call in step:
            for name, arguments in call.items():
                calls.append(str(bfcl_env.json_call(name, arguments)))
    except (CallSyntaxError, AttributeError, TypeError, ValueError, RecursionError):
        return []
    return calls


def turns_of(result, call_format) -> list[list[list[str]]]:
    """[turn][step][call], for `judge`."""
    return [[calls_in(step, call_format) for step in turn] for turn in result]


def result_of(t: Trajectory, task, tokenizer, call_format) -> list[list[str]]:
    """The messages of a trajectory by turn. One that hit a cap was never executed and is not among them."""
    turns = [[]]
    messages = [ids for said, ids in t.segments() if said]
    for ids in messages[:t.steps]:
        text = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
        turns[-1].append(without_thoughts(text, call_format))
        if not calls_in(turns[-1][-1], call_format) and len(turns) < len(task.turns):
            turns.append([])
    return turns


def write_official(folder, call_format, rows: dict[str, list[dict]]):
    """{category: result lines} into files, in the folder of an official model with this decoder."""
    model = CALL_FORMATS[call_format].official
    for category, lines in rows.items():
        path = folder / model.replace("/", "_") / f"multi_turn/BFCL_v4_{category}_result.json"
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))
    partial = ""
    if any(len(lines) < 200 for lines in rows.values()):  # else the evaluator wants all
        partial = " --partial-eval"
    print(f"official result files: {folder}\n  bfcl evaluate --model {model} --test-category "
          f"{','.join(rows)} --result-dir {folder.resolve()}{partial}")


def official_rows(tasks, trajectories: list[Trajectory], tokenizer, call_format) -> dict[str, list[dict]]:
    """{category: result lines}, each of which is judged again from its text."""
    by_id = {task.id: task for task in tasks}
    rows = {}
    for t in trajectories:
        task = by_id[t.task]
        result = result_of(t, task, tokenizer, call_format)
        rows.setdefault(task.category, []).append({"id": task.id, "result": result})
        if judge(task, turns_of(result, call_format)).valid != t.verdict["valid"]:
            print(f"warning: {task.id} is judged otherwise from its text than live", file=sys.stderr)
    return rows


def read_official(folder) -> tuple[dict, int]:
    """{task id: result} and the number of lines that cannot be read; each of those is named."""
    # Some tools write them beside each other, some into multi_turn/.
    files = sorted(Path(folder).rglob("BFCL_v4_multi_turn_*_result.json"))
    if not files or len({path.name for path in files}) < len(files):
        raise BfclError(f"{folder} holds no multi-turn result files, or those of several models: give one "
                        "model's folder, with files like multi_turn/BFCL_v4_multi_turn_base_result.json")
    rows, bad = {}, 0
    known = {task.id for task in bfcl_env.load_tasks()}
    for path in files:
        for n, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                name = row["id"]
                result = row["result"]
                if name in rows or name not in known or name.rpartition("_")[0] not in path.name:
                    raise ValueError(f"{name!r} does not belong here, or not again")
                if isinstance(result, list) and not all(isinstance(turn, list) for turn in result):
                    raise ValueError("a turn is not a list of steps")
                rows[name] = result
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                bad += 1
                print(f"{path}:{n}: left out: {type(error).__name__}: {error}", file=sys.stderr)
    return rows, bad


def score(args):
    """Judge the result files of a model's folder."""
    tasks = bfcl_env.select_tasks(args)
    name = Path(args.score).resolve().name  # of the model's folder
    call_format = args.call_format
    if call_format == "auto":  # the leaderboard's names say it
        call_format = "python"
        if "-FC" in name:
            call_format = "llama" if "Llama-3.1" in name else "python" if "Llama" in name else "json"
    rows, bad = read_official(args.score)
    trajectories = []  # as far as result files know them
    for task in tasks:
        if task.id not in rows:
            continue
        turns, verdict = [], {"valid": False, "error_type": "multi_turn:inference_error"}
        if isinstance(rows[task.id], list):  # else it is the handler's report of an exception
            turns = turns_of(rows[task.id], call_format)
            verdict = vars(judge(task, turns))
        t = Trajectory(task.id, None, [], [], [], float(verdict["valid"]), "not known", verdict)
        t.calls = sum(len(step) for turn in turns for step in turn)
        t.steps = sum(len(turn) for turn in turns)
        trajectories.append(t)
    if not trajectories:
        raise BfclError(f"{args.score} holds no line of the {len(tasks)} tasks asked for: try --split all")
    summary = summarize(trajectories, f"{name}: official verdicts, calls read as {call_format}")
    missing = len(tasks) - len(trajectories)  # these do not count as failures
    print(f"{missing} of {len(tasks)} tasks have no result and do not count; {bad} lines cannot be read")
    if not summary["overall"]["calls"]:
        print(f"warning: nothing could be read as {call_format} calls: try the other --call_format", file=sys.stderr)
    print(json.dumps({**summary, "reward": "official", "model": name, "call_format": call_format, "missing": missing,
                      "malformed": bad}))


# ---- 4. Comparison -----------------------------------------------------------------------------------------
def load(folder, name):
    """A JSON file of an evaluation's folder. Errors: BfclError if there is none."""
    try:
        return json.loads((Path(folder) / name).read_text())
    except (OSError, ValueError):
        raise BfclError(f"{folder} holds no {name}: give the --out folder of an evaluation") from None


def read_arms(folders):
    """(rows {arm, token, correct, ...} of all evaluations, what these have in common). The same weights are
    no new seed. Errors: BfclError for evaluations that differ in more than their checkpoints."""
    rows, common = {}, None
    for folder in folders:
        for row in load(folder, "eval.json")["table"]:
            config = load(folder, "config.json")
            same = config["same"]
            if not set(COMPARABLE) <= set(same):
                raise BfclError(f"{folder} was written by another version of this code: evaluate again")
            facts = {name: same[name] for name in COMPARABLE}
            facts["bfcl-eval"] = config["versions"]["bfcl-eval"]
            facts |= {"call_format": row["call_format"], "model": row["model"],  # other ones are other arms
                      "thinking": row.get("thinking", "off")}
            for token, correct in row["correct"].items():
                rows[row["sha256"], token] = {**row, "token": token, "correct": correct}
                facts["tasks that fit"] = sorted(correct)
                common = common or dict(facts)
                apart = [f"{name}: {common[name]!r} and {facts[name]!r}"[:200] for name in facts
                         if facts[name] != common[name]]
                if apart:
                    raise BfclError(f"{folders[0]} and {folder} cannot be compared ({'; '.join(apart)}): "
                                    "evaluate both with the same flags")
    return list(rows.values()), common


def compared(folders):
    """({"table": the arms, "pairs": their differences, what all have in common}, rows of each arm)."""
    rows, common = read_arms(folders)
    tasks = common["tasks that fit"]
    arms = {}  # (arm, token) -> one row a seed
    for row in sorted(rows, key=lambda row: row["arm"] != PRIMARY[0]):
        arms.setdefault((row["arm"], row["token"]), []).append(row)
    draws = bootstrap([[row["correct"] for row in seeds] for seeds in arms.values()])  # [arms, draws]
    table, pairs = [], []  # an arm each, two arms each
    for ((arm, token), seeds), drawn in zip(arms.items(), draws):
        table.append({"arm": arm,
                      "token": token,
                      "seeds": len(seeds),
                      "interval": interval(drawn, tasks),
                      "accuracy": mean(mean(row["correct"].values()) for row in seeds),
                      "rollouts": sorted({row["stage_info"]["rollouts"] for row in seeds})})
    floor = 1 - 0.2 ** (1 / len(set(families_of(tasks))))  # so many families could all miss a smaller one
    for (i, a), (j, b) in itertools.combinations(enumerate(table), 2):
        if a["arm"] != b["arm"] and a["token"] != b["token"]:
            continue  # a difference is that of one thing
        primary = (a["arm"], b["arm"], a["token"], b["token"]) == (*PRIMARY, "high", "high")
        gap = draws[i] - draws[j]  # [draws], paired
        primary = primary and len({*a["rollouts"], *b["rollouts"]}) == 1  # after as many rollouts
        pairs.append({"kind": "primary" if primary else "exploratory",
                      "a": [a["arm"], a["token"]],
                      "b": [b["arm"], b["token"]],
                      "difference": a["accuracy"] - b["accuracy"],
                      "interval": interval(gap, tasks, least=-1.0),
                      # 1.96 + 0.84 standard deviations: found by 80 % of such tests
                      "detectable": max(2.8 * float(gap.std()), floor)})
    pairs.sort(key=lambda pair: pair["kind"] != "primary")
    return {"table": table, "pairs": pairs, **common}, list(arms.values())


def compare(args):
    """Print and write the arms and their differences; the picture."""
    result, arms = compared(args.compare)
    shown = [f"{name} {result[name]}" for name in COMPARABLE if result[name] != ""]
    print(f"{len(result['tasks that fit'])} tasks; " + ", ".join(shown))
    print_columns(["arm", "evaluated with", "accuracy %", "seeds", "rollouts"],
                  [[r["arm"], r["token"], percent(r), r["seeds"], r["rollouts"]] for r in result["table"]])
    print("\npaired differences over the same tasks, in points; the intervals hold the tasks' variance, and "
          "little (with one seed nothing) of that between training runs")
    print_columns(["kind", "difference", "smallest detectable", "of", "minus"],
                  [[p["kind"], percent(p, "difference"), f"{100 * p['detectable']:.1f}", p["a"], p["b"]]
                   for p in result["pairs"]])
    atomic_write(args.out / "compare.json", result)
    plot(args.out / "compare.png", result["table"], arms)
    print(json.dumps(result))


def plot(path, table, arms):
    """The accuracies with their intervals, and the rewards of the runs that trained these checkpoints."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 2 + 0.4 * len(table)), layout="constrained")
    for y, (r, seeds) in enumerate(zip(table, arms)):
        bars.barh(f"{r['arm']}, {r['token']}", r["accuracy"], color=f"C{y}", alpha=0.6)
        bars.plot(r["interval"], [y, y], color="black")  # 95 %
        for row in seeds:
            log = Path(row["ckpt"]).parent / "metrics.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
            rewards = [line.get("reward") for line in lines]  # stage 1 has none
            curves.plot([line["step"] for line in lines], rewards, color=f"C{y}")
    bars.set(xlim=(0, 1), title="accuracy (95 % interval)")
    curves.set(xlabel="step", title="reward in training")
    figure.savefig(path)


# ---- One transcript ----------------------------------------------------------------------------------------
def show(args):
    """Print one transcript, then the gold calls."""
    same = load(args.out, "config.json")["same"]
    load(args.out, "0.tokenizer.json")  # a training run's folder has none
    n, token = same["checkpoints"] - 1, same["reward_tokens"][0]  # the last and the first
    t = finished(args.out, f"{n}_{token}").get((args.show, 0))
    if not t:
        raise BfclError(f"{args.out} has no rollout of {args.show} with the {token} token: not among its "
                        "tasks, too long, or not done yet")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(args.out / f"{n}.tokenizer.json"))
    print(transcript(t, tokenizer))
    [task] = [task for task in bfcl_env.load_tasks() if task.id == t.task]
    for turn, calls in enumerate(task.gold):
        print(f"gold, turn {turn}: {'; '.join(calls) or 'no call'}")


MODES = {"ckpt": evaluate, "score": score, "compare": compare, "show": show}


def main():
    mode, args = parse_args()
    MODES[mode](args)


if __name__ == "__main__":
    run_main(main)
