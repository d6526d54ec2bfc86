"""Evaluation: how often a checkpoint succeeds, by reward token, in figures that others can check.

    python eval_bfcl.py --ckpt runs/rl_rcgrpo/model                       # test part of the split, high token
    python eval_bfcl.py --ckpt DIR --part all --docs full --temperature 0 --official_out results
    python eval_bfcl.py --score results/Qwen_Qwen3-0.6B-FC                # official result files, no model
    python eval_bfcl.py --compare runs/eval_a runs/eval_b                 # --out folders of evaluations
    python eval_bfcl.py --show multi_turn_base_3 --out runs/eval          # a transcript beside the gold calls

    1. load a checkpoint and hash its weights; --out must be new or hold this very evaluation, interrupted
    2. for each reward token roll out every task --samples times; what has ended is on disk at once
    3. accuracy = mean reward; 95 % interval bootstrapped over families (the variants of an id are related)
    4. official result files, judged again from their text
    5. tables, eval.json, and as last line one JSON object

Under torchrun the ranks share the tasks. Only `evaluate` imports torch: the other modes start in a second.
--out holds identity.json (what is evaluated, and how), eval.json, and of checkpoint n: n.tokenizer.json and
n_TOKEN.rankR.jsonl, the trajectories of each rank, appended as they end.
"""
import argparse
import contextlib
import functools
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import bfcl_env
from bfcl_env import BfclEnv, BfclError, CallSyntaxError, Episode, judge, number, parse_calls, write

FREE = ("out", "score", "compare", "show", "official_out", "kv_gb")  # flags that change no result
ALIKE = ("data_sha256", "split", "part", "categories", "tasks", "limit", "docs", "protocol", "reward",
         "temperature", "max_turn_tokens", "max_total_tokens", "max_len")  # of evaluations to be compared
PRIMARY = (("RCTP-FT + RC-GRPO", "high"), ("RCTP-FT + GRPO (high token)", "high"))  # arm, evaluated with
OFFICIAL = {"json": "Qwen/Qwen3-0.6B-FC", "python": "Qwen/Qwen3-0.6B"}  # models with these decoders


def parse_args():
    """(mode, flags, tasks), checked."""
    parser = argparse.ArgumentParser(description="Accuracy by reward token, scores of official result files, "
                                     "comparison of evaluations, transcripts.")
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], help="model directories, hub ids, or smollm2-135m-instruct")
    add("--score", metavar="DIR",
        help="judge the official result files in this model's folder; -FC in its name: calls are JSON")
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
    bfcl_env.add_sampling_flags(parser)
    scoring = any(flag.startswith("--score") for flag in sys.argv)
    bfcl_env.add_world_flags(parser, part="all" if scoring else "test")
    args = parser.parse_args()
    args.out = args.out or ("runs/compare" if args.compare else "runs/eval")
    args.reward_tokens = args.reward_tokens.split(",")
    modes = [name for name in ("ckpt", "score", "compare", "show") if getattr(args, name)]
    try:
        if len(modes) != 1:
            raise BfclError("give one of --ckpt DIR, --score DIR, --compare RUN RUN, --show ID; given: "
                            f"{', '.join(modes) or 'none of them'}")
        if unknown := set(args.reward_tokens) - {"high", "low", "none"}:
            raise BfclError(f"unknown reward token {min(unknown)!r}: give --reward_tokens high,low,none")
        if (args.official_out or args.score) and (args.protocol, args.reward) != ("official", "official"):
            raise BfclError("official result files have only --protocol official and --reward official")
        if args.official_out and not len(args.ckpt) == len(args.reward_tokens) == args.samples == 1:
            raise BfclError("official result files hold one answer a task: give --official_out with one "
                            "--ckpt, one of --reward_tokens, and --samples 1")
        args.tasks = args.show or args.tasks
        tasks = bfcl_env.select_tasks(args)
        for ckpt in args.ckpt:
            bfcl_env.check_model(ckpt)
        if args.ckpt:
            check_identity(args)
    except BfclError as error:
        sys.exit(f"error: {error}")
    return modes[0], args, tasks


# --------------------------------------------------------------------------------------------------
# The evaluation's folder.

def load(folder, name: str) -> dict:
    try:
        return json.loads((Path(folder) / name).read_text())
    except (OSError, ValueError):
        raise BfclError(f"{folder} holds no {name}: give the --out folder of an evaluation") from None


def differences(old: dict, new: dict, names) -> str:
    return "; ".join(f"{k}: {old.get(k)!r} and {new.get(k)!r}" for k in names if old.get(k) != new.get(k))


def check_identity(args) -> dict:
    """What the flags ask for, or the same from --out. Errors: BfclError if --out holds another evaluation."""
    asked = {k: v for k, v in vars(args).items() if k not in FREE}
    asked |= {"data_sha256": bfcl_env.data_sha256(), "models": []}  # filled when their weights are known
    if not (Path(args.out) / "identity.json").exists():
        if any(Path(args.out).glob("*.rank*.jsonl")):
            raise BfclError(f"{args.out} holds rollouts without identity.json: give a new --out, or remove "
                            "that folder")
        return asked
    found = load(args.out, "identity.json")
    if apart := differences(found, asked, sorted({*found, *asked} - {"models"})):
        raise BfclError(f"{args.out} holds another evaluation ({apart}): give a new --out, or remove that "
                        "folder")
    return found


def finished(out: Path, stem: str) -> dict:
    """The records of a checkpoint and token by (task, sample). A line that was cut is dropped."""
    found = {}
    for path in out.glob(f"{stem}.rank*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                t = SimpleNamespace(**json.loads(line))
                t.tokens = sum(t.mask)
                found[t.task, t.sample] = t
    return dict(sorted(found.items()))


# --------------------------------------------------------------------------------------------------
# What the model said and the calls in it. A `result` is [turn][step], as in official result files.

def calls_in(step, style: str) -> list[str]:
    """The calls of a step; none where the official decoders find none or raise. A list is the answer of a
    vendor's function-calling API, [{name: arguments}]."""
    try:
        if isinstance(step, list):
            return [str(bfcl_env._json_call(*item)) for call in step for item in call.items()]
        return [str(call) for call in parse_calls(step, style)]
    except (CallSyntaxError, AttributeError, TypeError, ValueError, RecursionError):
        return []


def turns_of(result: list, style: str) -> list[list[list[str]]]:
    """[turn][step][call], for `judge`. Steps without calls do not count."""
    return [[calls for step in turn if (calls := calls_in(step, style))] for turn in result]


def result_of(t, task, tokenizer, style: str) -> list[list[str]]:
    """The messages of a trajectory by turn. One that hit a cap was never executed and is not among them."""
    edges = [i for i in range(1, len(t.ids)) if t.mask[i] != t.mask[i - 1]] + [len(t.ids)]
    turns = [[]]
    for start, end in list(zip(edges[::2], edges[1::2]))[:t.steps]:
        text = tokenizer.decode(t.ids[start:end - 1], clean_up_tokenization_spaces=False)
        turns[-1].append(text.split("</think>")[-1].lstrip("\n"))
        if not calls_in(turns[-1][-1], style) and len(turns) < len(task.turns):
            turns.append([])
    return turns


# --------------------------------------------------------------------------------------------------
# Figures. A record is one judged rollout: task (id), verdict, reward, calls, tokens, reason.

def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def by_task(records) -> dict:
    """{task id: mean over its samples}"""
    values = {}
    for r in records:
        values.setdefault(r.task, []).append(r.reward)
    return {task: mean(some) for task, some in values.items()}


def families_of(tasks) -> list[int]:
    """The family of each task id."""
    family = {i: group[0] for group in bfcl_env.families(bfcl_env.load_tasks()) for i in group}
    return [family[int(task.rpartition("_")[2])] for task in tasks]


def bootstrap(arms: list[list[dict]], draws: int = 2000, seed: int = 0):
    """The arms' means in each draw, [arms, draws]. arms[a][s] is `by_task` of seed s, of the same tasks.

    A draw takes families once for all arms, which pairs them, then seeds for each arm on its own."""
    rng, tasks, out = np.random.default_rng(seed), list(arms[0][0]), []
    _, member = np.unique(families_of(tasks), return_inverse=True)
    count = np.bincount(member)  # [families] tasks
    drawn = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), draws)  # [draws, families]
    for runs in arms:
        sums = [np.bincount(member, [run[task] for task in tasks]) for run in runs]  # [seeds, families]
        means = drawn @ np.transpose(sums) / (drawn @ count)[:, None]  # [draws, seeds]
        seeds = rng.integers(len(runs), size=means.shape)
        out.append(np.take_along_axis(means, seeds, 1).mean(1))
    return np.stack(out)


def interval(draws, tasks, least: float = 0.0) -> list[float]:
    """95 %, of one arm over these tasks; of a difference with `least` -1."""
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    if low == high:  # nothing varies: the exact binomial interval over families
        bound = 1 - 0.025 ** (1 / len(set(families_of(tasks))))
        low, high = max(least, low - bound), min(1.0, high + bound)
    return [low, high]


def figures(records) -> dict:
    wrong = [r.verdict["error_type"] or "reward below 1" for r in records if r.reward < 1]
    errors, reasons = Counter(name.split(":")[-1] for name in wrong), Counter(r.reason for r in records)
    values = by_task(records)
    return {"accuracy": mean([r.reward for r in records]), "n": len(records),
            "interval": interval(bootstrap([[values]]), values),
            "errors": dict(errors.most_common()), "reasons": dict(reasons.most_common()),
            "calls": mean([r.calls for r in records]), "tokens": mean([r.tokens for r in records]),
            "timed_out": sum(r.verdict.get("timed_out", False) for r in records)}


def summarise(records, title: str) -> dict:
    """{"overall": figures, "categories": {name: figures}}, printed as a table too."""
    parts = {c: [r for r in records if r.task.startswith(c + "_")] for c in bfcl_env.CATEGORIES}
    categories, overall = {c: figures(some) for c, some in parts.items() if some}, figures(records)
    print(f"\n{title}")
    print_columns(["category", "accuracy %", "n", "calls", "tokens", "errors"],
                  [[name, percent(f), f["n"],
                    *("-" if f[k] is None else f"{f[k]:.1f}" for k in ("calls", "tokens")),
                    listed(f["errors"])] for name, f in {**categories, "overall": overall}.items()])
    print("ended by: " + listed(overall["reasons"]))
    return {"overall": overall, "categories": categories}


def listed(counts: dict) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def percent(f: dict, key: str = "accuracy") -> str:
    return f"{100 * f[key]:5.1f} [{100 * f['interval'][0]:.0f}, {100 * f['interval'][1]:.0f}]"


def print_columns(head: list, lines: list) -> None:
    rows = [[str(cell) for cell in line] for line in [head, *lines]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for line in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        print(" | ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


# --------------------------------------------------------------------------------------------------
# --score: official result files of any model.

def read_results(folder: str) -> tuple[dict, int]:
    """{task id: row} and the number of lines that cannot be read; each of those is named."""
    files = sorted(Path(folder).rglob("BFCL_v4_multi_turn_*_result.json"))
    if not files or len({path.name for path in files}) < len(files):
        raise BfclError(f"{folder} holds {'several models' if files else 'no multi-turn result files'}: give "
                        "one model's folder, with files like multi_turn/BFCL_v4_multi_turn_base_result.json")
    rows, bad, known = {}, 0, {task.id for task in bfcl_env.load_tasks()}
    for path in files:
        for n, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                name, result = row["id"], row["result"]
                if name not in known or path.name != f"BFCL_v4_{name.rpartition('_')[0]}_result.json":
                    raise ValueError(f"{name!r} does not belong here")
                if name in rows:
                    raise ValueError(f"a second line of {name}")
                if isinstance(result, list) and not all(isinstance(turn, list) for turn in result):
                    raise ValueError("a turn is not a list of steps")
                rows[name] = {"result": result, "tokens": None}
                with contextlib.suppress(KeyError, TypeError):  # not every tool counts them
                    rows[name]["tokens"] = sum(map(sum, row["output_token_count"])) or None
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                bad += 1
                print(f"{path}:{n}: left out: {type(error).__name__}: {error}", file=sys.stderr)
    return rows, bad


def score(args, tasks) -> None:
    name = Path(args.score).resolve().name
    style = args.style if args.style != "auto" else "json" if "-FC" in name else "python"
    (rows, bad), records = read_results(args.score), []
    for task in tasks:
        if row := rows.get(task.id):
            turns, verdict = [], {"valid": False, "error_type": "multi_turn:inference_error"}
            if isinstance(row["result"], list):  # else it is the handler's report of an exception
                turns = turns_of(row["result"], style)
                verdict = vars(judge(task, turns))
            records.append(SimpleNamespace(
                task=task.id, verdict=verdict, reward=float(verdict["valid"]), reason="not known",
                tokens=row["tokens"], calls=sum(map(len, sum(turns, [])))))
    if not records:
        raise BfclError(f"{args.score} holds no line of the {len(tasks)} tasks asked for: try --part all")
    summary = summarise(records, f"{name}: official verdicts, calls read as {style}")
    missing = len(tasks) - len(records)
    print(f"{missing} of {len(tasks)} tasks have no result and do not count; {bad} lines cannot be read")
    if not summary["overall"]["calls"]:
        print(f"warning: nothing could be read as {style} calls: try the other --style", file=sys.stderr)
    print(json.dumps({**summary, "reward": "official", "model": name, "style": style, "missing": missing,
                      "malformed": bad}))


def write_official(folder: Path, style: str, rows: dict) -> None:
    """rows: {category: [result lines]}, in the folder of an official model with this decoder."""
    for category, lines in rows.items():
        path = folder / OFFICIAL[style].replace("/", "_") / f"multi_turn/BFCL_v4_{category}_result.json"
        write(path, "".join(json.dumps(line) + "\n" for line in lines))
    partial = " --partial-eval" * any(len(lines) < 200 for lines in rows.values())
    print(f"official result files: {folder}\n  bfcl evaluate --model {OFFICIAL[style]} --test-category "
          f"{','.join(rows)} --result-dir {folder.resolve()}{partial}")


# --------------------------------------------------------------------------------------------------
# --show: one transcript.

def show(args, tasks) -> None:
    from tokenizers import Tokenizer
    if len(tasks) != 1:
        raise BfclError("--show prints one transcript: give one task id")
    [task], out, identity = tasks, Path(args.out), load(args.out, "identity.json")
    n, token = len(identity["models"]) - 1, identity["reward_tokens"][0]
    t = finished(out, f"{n}_{token}").get((task.id, 0))
    if not t:
        raise BfclError(f"{out} has no rollout of {task.id} with the {token} token: not among its tasks, too "
                        "long, or not done yet")
    backend, model = Tokenizer.from_file(str(out / f"{n}.tokenizer.json")), identity["models"][n]
    tokenizer = SimpleNamespace(decode=lambda ids, **_: backend.decode(ids, skip_special_tokens=False))
    print(f"{model['ckpt']}\n{bfcl_env.show(t, tokenizer)}\n")
    made = [sum(turn, []) for turn in turns_of(result_of(t, task, tokenizer, model["style"]), model["style"])]
    gold, episode, lines, first = task.gold, Episode(task), [], ">>>"
    if identity["protocol"] == "paper":  # one turn
        made = [list(itertools.takewhile(lambda call: call != "done()", sum(made, [])))]
        gold = [sum(gold, [])]
    for turn, (wanted, calls) in enumerate(itertools.zip_longest(gold, made, fillvalue=[])):
        for want, call in itertools.zip_longest(wanted, calls, fillvalue=""):
            same = want == call or None is not episode.bound(want) == episode.bound(call)
            lines.append(["" if same else first, turn, want, call])
            first = first if same else ""
    print_columns(["", "turn", "gold calls", "the model's calls (>>> the first difference)"], lines)


# --------------------------------------------------------------------------------------------------
# --compare: arms side by side.

def arm_of(contract: dict) -> str | None:
    """Stage 1 by its data, stage 2 by the tokens of its rollouts; None for a model that is not from here."""
    if "stage" not in contract:
        return None
    first = {"sft": "SFT", "mixed": "mixed-data SFT"}.get(contract.get("arm"), "RCTP-FT")
    first += " on own rollouts" * contract.get("data", "").endswith("trajectories)")
    token = contract.get("reward_tokens", "mixed")
    second = "RC-GRPO" if token == "mixed" else f"GRPO ({token.replace('none', 'no')} token)"
    second += ", baseline within tokens" * (contract.get("baseline") == "token")
    return first if contract["stage"] == "rctp" else f"{first} + {second}"


def compare(args, _) -> None:
    runs = [load(folder, "eval.json") for folder in args.compare]
    for folder, run in zip(args.compare, runs):
        if not {"identity", "table", "correct"} <= run.keys():
            raise BfclError(f"{folder}/eval.json is not of this version: evaluate again")
    several = len({row["model"] for run in runs for row in run["table"] if row["stage"]}) > 1
    same, arms, tasks = runs[0]["identity"], {}, set(next(iter(runs[0]["correct"][0].values())))
    for folder, run in zip(args.compare, runs):
        apart = differences(same, run["identity"], ALIKE)
        for row, by_token in zip(run["table"], run["correct"]):
            for token, correct in by_token.items():
                name = row["arm"] + f" of {row['model']}" * (several and row["stage"] is not None)
                seeds = arms.setdefault((name, token), {})  # by their weights: the same ones are no new seed
                seeds[row["sha256"]] = {**row, "arm": name, "correct": correct}
                if set(correct) != tasks:
                    apart = apart or f"tasks that fit: {len(tasks)} and {len(correct)}, not the same"
        if apart:
            raise BfclError(f"{args.compare[0]} and {folder} cannot be compared ({apart}): evaluate both "
                            "with the same flags")
    arms = {key: list(arms[key].values()) for key in sorted(arms, key=lambda key: key != PRIMARY[0])}
    draws = bootstrap([[row["correct"] for row in seeds] for seeds in arms.values()])  # [arms, draws]
    table = [{"arm": arm, "token": token, "seeds": len(seeds), "interval": interval(draws[i], tasks),
              "accuracy": mean([mean(row["correct"].values()) for row in seeds]),
              "rollouts": sorted({row["contract"].get("rollouts", 0) for row in seeds})}
             for i, ((arm, token), seeds) in enumerate(arms.items())]
    pairs, keys = [], list(arms)
    floor = 1 - 0.2 ** (1 / len(set(families_of(tasks))))  # so many families could all miss a smaller one
    for a, b in itertools.combinations(range(len(keys)), 2):
        budgets = {*table[a]["rollouts"], *table[b]["rollouts"]}
        primary = (keys[a], keys[b]) == PRIMARY and len(budgets) == 1
        if a == 0 or set(keys[a]) & set(keys[b]):  # others differ in one thing, the arm or the token
            gap = draws[a] - draws[b]  # 1.96 + 0.84 of its standard deviations: found by 80 % of such tests
            pairs.append({"kind": "primary" if primary else "exploratory", "a": keys[a], "b": keys[b],
                          "difference": table[a]["accuracy"] - table[b]["accuracy"],
                          "interval": interval(gap, tasks, least=-1.0),
                          "detectable": max(2.8 * float(gap.std()), floor)})
    pairs.sort(key=lambda pair: pair["kind"] != "primary")
    part = "chosen by --tasks" if same["tasks"] else f"of part {same['part']} ({same['split']} split)"
    title = (f"{len(tasks)} tasks {part}, docs {same['docs']}, protocol {same['protocol']}, reward "
             f"{same['reward']}")
    print(title)
    print_columns(["arm", "evaluated with", "accuracy %", "seeds", "rollouts"],
                  [[r["arm"], r["token"], percent(r), r["seeds"], r["rollouts"]] for r in table])
    print("\npaired differences over the same tasks, in points")
    print_columns(["kind", "difference", "smallest detectable", "of", "minus"],
                  [[p["kind"], percent(p, "difference"), f"{100 * p['detectable']:.1f}",
                    ", ".join(p["a"]), ", ".join(p["b"])] for p in pairs])
    if min(row["seeds"] for row in table) < 5:
        print("Few seeds: the intervals hold the tasks' variance, and little (one seed: none) of that "
              "between training runs.")
    if not any(pair["kind"] == "primary" for pair in pairs):
        print(f"The primary comparison is not among them: {', '.join(PRIMARY[0])} minus "
              f"{', '.join(PRIMARY[1])}, after the same number of rollouts.")
    result = {"table": table, "pairs": pairs, **{name: same[name] for name in ALIKE}}
    write(Path(args.out) / "compare.json", json.dumps(result, indent=1) + "\n")
    draw(Path(args.out) / "compare.png", table, sum(arms.values(), []), title)
    print(f"wrote {args.out}/compare.png and compare.json\n{json.dumps(result)}")


def draw(path: Path, table: list[dict], rows: list[dict], title: str) -> None:
    """The accuracies with their intervals, and the curves of the runs that trained these checkpoints."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (bars, *curves) = plt.subplots(1, 3, layout="constrained",
                                           figsize=(13, 1.5 + 0.4 * max(5, len(table))))
    colour = {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys(r["arm"] for r in table))}
    for y, r in enumerate(table):
        bars.barh(y, 100 * r["accuracy"], color=colour[r["arm"]], alpha=0.6)
        bars.plot([100 * end for end in r["interval"]], [y, y], color="black")
    bars.set(yticks=range(len(table)), yticklabels=[f"{r['arm']}, {r['token']}" for r in table],
             xlim=(0, 100), xlabel="accuracy, % (95 % interval)")
    bars.invert_yaxis()
    for axis, name in zip(curves, ("reward", "rc/reward_high")):
        for ckpt, arm in {row["ckpt"]: row["arm"] for row in rows}.items():
            if (log := Path(ckpt).parent / "metrics.jsonl").is_file():
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                axis.plot([x for x, _ in points], [y for _, y in points], color=colour[arm])
        axis.set(title=name, xlabel="step")
    figure.suptitle(f"{title}; curves in the colours of the arms", fontsize=8)
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------

def evaluate(args, tasks) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from rollout import checksum, load_policy, rollout, sampling, split_fitting
    from sft_rctp import compute_dtype, peak_memory_gb, start_world

    began, world, out = time.monotonic(), start_world(), Path(args.out)
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # ranks end at different times
    identity, table, correct, trained_on = check_identity(args), [], [], set()

    def tell(text, file=sys.stdout):
        print(text, file=file) if world.main else None

    for n, ckpt in enumerate(args.ckpt):
        # step 1: the weights
        start = time.monotonic()
        torch.manual_seed(0)  # `tiny` is drawn, on all ranks alike
        policy = load_policy(ckpt, dtype=compute_dtype(args.dtype, world.device), device=str(world.device))
        contract, style = policy.contract, policy.style(args.style)
        model = {"ckpt": ckpt, "sha256": checksum(policy.model), "style": style}
        if identity["models"][n:] and identity["models"][n] != model:
            raise BfclError(f"{out} holds an evaluation of other weights than {ckpt} has now "
                            f"({identity['models'][n]} and {model}): give a new --out, or remove it")
        identity["models"][n:n + 1] = [model]
        dist.barrier(group=patient)  # every rank has read what --out held
        if world.main:
            write(out / "identity.json", json.dumps(identity, indent=1) + "\n")
            write(out / f"{n}.tokenizer.json", policy.tokenizer.backend_tokenizer.to_str())
        world_of = functools.partial(BfclEnv, docs=args.docs, style=style, protocol=args.protocol)
        fitting, left_out = split_fitting(policy, tasks, world_of, args.max_len)
        arm = arm_of(contract)
        label = f"after {arm.removeprefix('RCTP-FT + ')}" if arm else "base model"
        label = ckpt if label in [row["label"] for row in table] else label
        tell(f"{label}: {ckpt} | weights sha256 {model['sha256'][:12]} | style {style} | all that fit: "
             f"{len(fitting)} of {len(tasks)} tasks")
        for name in ("docs", "protocol"):
            if contract.get(name, getattr(args, name)) != getattr(args, name):
                tell(f"warning: it was trained with --{name} {contract[name]}", sys.stderr)
        for row in table:
            if row["sha256"] == model["sha256"]:
                tell(f"warning: {ckpt} and {row['ckpt']} hold the same weights", sys.stderr)
        row = {"label": label, "arm": arm or ckpt, **model, "stage": contract.get("stage"),
               "model": contract.get("base_model", ckpt), "tasks_left_out": left_out,
               "contract": {k: v for k, v in contract.items() if k != "tasks"}}
        trained_on |= set(contract.get("tasks", ()))
        table.append(row), correct.append({})

        for token in args.reward_tokens:
            # step 2: rollouts; (seed, 0, task, sample) fixes the random numbers of each
            if token not in contract.get("tokens", [token]):
                tell(f"warning: stage 1 of {ckpt} never saw the {token} token (only "
                     f"{', '.join(contract['tokens'])}): it has not learned what that means", sys.stderr)
            stem = f"{n}_{token}"
            old = finished(out, stem)
            todo = [(i, task, j) for i, task in enumerate(tasks) for j in range(args.samples)
                    if task in fitting and (task.id, j) not in old]
            mine, scores = todo[world.rank::world.size], [t.reward for t in old.values()]
            dist.barrier(group=patient)  # every rank has read the same before any goes on
            with (out / f"{stem}.rank{world.rank}.jsonl").open("a") as file, tqdm(
                    total=len(old) + len(mine), initial=len(old), desc=f"{label}, {token}", unit="rollout",
                    disable=not world.main, dynamic_ncols=True) as bar:
                print(file=file)  # ends a line that was cut

                def done(index, t):
                    t.sample = mine[index][2]
                    print(t.to_json(), file=file, flush=True)
                    scores.append(t.reward)
                    bar.set_postfix_str(f"accuracy {100 * mean(scores):.1f} %", refresh=False)
                    bar.update()
                rollout(policy, [world_of(task) for _, task, _ in mine],
                        [None if token == "none" else token] * len(mine),
                        [(args.seed, 0, i, j) for i, _, j in mine], done=done, **sampling(args))
            dist.barrier(group=patient)
            if not world.main:
                continue

            # step 3: accuracy
            records = list(finished(out, stem).values())
            row[token], correct[n][token] = summarise(records, f"{label}, {token} token"), by_task(records)

            # step 4: official files
            if args.official_out:
                by_id, official = {task.id: task for task in tasks}, {}
                for t in records:
                    task, result = by_id[t.task], result_of(t, by_id[t.task], policy.tokenizer, style)
                    official.setdefault(task.category, []).append({"id": task.id, "result": result})
                    if judge(task, turns_of(result, style)).valid != t.verdict["valid"]:
                        tell(f"warning: {task.id} is judged otherwise from its text than live", sys.stderr)
                write_official(Path(args.official_out), style, official)
        row["eval_seconds"] = time.monotonic() - start
        summary = Path(ckpt).parent / "summary.json"  # what the run that wrote this checkpoint took
        row["run"] = json.loads(summary.read_text()) if row["stage"] and summary.is_file() else {}
        del policy  # before the next one is loaded
    dist.destroy_process_group()
    if not world.main:
        return

    # step 5: the table
    first = args.reward_tokens[0]
    print()
    print_columns(["checkpoint", *(f"accuracy, {token} token" for token in args.reward_tokens), "n",
                   "tasks left out", "train min", "eval min"],
                  [[row["label"], *(percent(row[token]["overall"]) for token in args.reward_tokens),
                    row[first]["overall"]["n"], row["tasks_left_out"],
                    f"{row['run']['seconds'] / 60:.1f}" if row["run"] else "-",
                    f"{row['eval_seconds'] / 60:.1f}"] for row in table])
    names = {"smollm2-135m-instruct": "SmolLM2-135M-Instruct (135M, from Q4_1)"}
    print("\nModel: " + ", ".join(sorted({names.get(row["model"], row["model"]) for row in table})) + ".")
    print(f"{len(tasks)} tasks x {args.samples} rollouts a token at temperature {args.temperature}; docs "
          f"{args.docs}, protocol {args.protocol}, reward {args.reward}; percent with the 95 % interval over "
          "families.")
    if seen := sum(task.id in trained_on for task in tasks):
        print("These are the training tasks, memorised on purpose to see the machinery work: the figures say "
              "nothing about new tasks." if seen == len(tasks) else
              f"Warning: {seen} of the {len(tasks)} tasks were trained on.")
    result = {**table[-1][first], "reward": args.reward, "table": table, "tasks": len(tasks),
              **{name: getattr(args, name) for name in ("samples", "docs", "protocol", "temperature")},
              "seconds": {**{row["stage"]: row["run"]["seconds"] for row in table if row["run"]},
                          "evaluation": time.monotonic() - began},
              "peak_memory_gb": max([peak_memory_gb(world),
                                     *(row["run"].get("peak_memory_gb", 0) for row in table)])}
    write(out / "eval.json", json.dumps({"identity": identity, "correct": correct, **result}) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    bfcl_env.settle_environment()
    try:
        mode, args, tasks = parse_args()
        {"ckpt": evaluate, "score": score, "compare": compare, "show": show}[mode](args, tasks)
    except BfclError as error:
        sys.exit(f"error: {error}")
