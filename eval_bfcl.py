"""Evaluation: how often a checkpoint succeeds, by reward token, with official result files.

    python eval_bfcl.py --ckpt runs/rl_rcgrpo/model                       # test part of the split, high token
    python eval_bfcl.py --ckpt DIR --split all --tool_docs full --temperature 0 --official_out runs/official
    python eval_bfcl.py --score results/Qwen_Qwen3-0.6B-FC                # official result files, no model
    python eval_bfcl.py --compare runs/eval_a runs/eval_b                 # --out folders of evaluations
    python eval_bfcl.py --show best --out runs/eval                       # a transcript, then the gold calls

Every task is rolled out --samples times under each reward token. Accuracy is the mean reward, with a 95 %
interval that is bootstrapped over families, since the variants of an id are related.

Under torchrun the ranks share the tasks. The folder --out holds:

    config.json             the settings and the checkpoints that are evaluated
    N_TOKEN.rankR.jsonl     rollouts of checkpoint N under a reward token; rank R adds each as soon as it ends
    N.tokenizer.json        the tokenizer of checkpoint N, for --show
    eval.json               the metrics; the last line on stdout is the same JSON object, without `correct`

Sections; 1 to 3 are the evaluation, each of 4 to 6 is another mode:

    1. Roll out
    2. Evaluate
    3. Metrics and tables
    4. Official result files
    5. Comparison of runs
    6. One transcript
    7. Flags and modes
"""
import ast
import functools
import itertools
import json
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import bfcl_env

if __name__ == "__main__":
    bfcl_env.start_process()  # It restarts the process, so it comes before the slow imports.

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from bfcl_env import (CALL_FORMATS, BfclError, CallSyntaxError, judge, parse_calls, warn,
                      without_thoughts)
from rollout import (DEFAULT_MODEL, Trajectory, add_sampling_flags, check_model, checksum, compute_dtype,
                     filter_overlong, load_policy, mean_reward, nonempty, number, run_main, sampling,
                     transcript)
from sft_rctp import (ROUNDING, atomic_write, check_and_record_settings, finished_rollouts, init_distributed,
                      note_changes, open_run_dir, peak_memory_gb, read_metrics, rollout_to_disk,
                      work_has_begun)


# ---- Roll out ----------------------------------------------------------------------------------------------
def roll_out_tasks(policy, tasks, make_env, reward_token, index, args, distributed) -> list[Trajectory]:
    """Sample every task --samples times, skipping the rollouts that are already on disk.

    The random numbers of a rollout follow from (seed, 0, task id, 0, sample).

    Args:
        reward_token: "high", "low" or "none".
        index: number of the checkpoint in --ckpt; part of the file names.

    Returns:
        The trajectories of all ranks, sorted by task id and sample.
    """
    found = rollout_to_disk(
        args.out,
        f"{index}_{reward_token}",
        policy,
        list(itertools.product(tasks, range(args.samples))),
        make_env,
        None if reward_token == "none" else reward_token,
        lambda task, sample: (args.seed, 0, task.id, 0, sample),
        f"checkpoint {index}, {reward_token} token",
        distributed,
        **sampling(args))
    return list(found.values())


# ---- Evaluate ----------------------------------------------------------------------------------------------
# Flags that may differ when an evaluation resumes; checkpoints are compared by their weights.
IGNORED_ON_RESUME = ("ckpt", "out", "score", "compare", "show", "official_out")


def evaluate(args):
    """Evaluate the checkpoints, print the table, write eval.json."""
    began = time.monotonic()
    tasks = bfcl_env.select_tasks(args)
    distributed = init_distributed()
    open_run_dir(args, distributed)
    facts = {name: value for name, value in vars(args).items()
             if name not in IGNORED_ON_RESUME + ROUNDING}
    facts["dtype"] = str(compute_dtype(args.dtype, distributed.device))  # the dtype that `auto` selects here
    check_and_record_settings(args.out, distributed, {**facts, "checkpoints": len(args.ckpt)})
    note_changes(args.out, args, distributed)
    table = []  # one row per checkpoint
    for index, ckpt in enumerate(args.ckpt):
        row = evaluate_checkpoint(index, tasks, args, distributed)
        if row["sha256"] in [other["sha256"] for other in table]:
            warn(f"{ckpt} and another checkpoint hold the same weights")
        table.append(row)
    dist.destroy_process_group()
    if not distributed.is_main:
        return
    minutes = (time.monotonic() - began) / 60
    print_table(table, len(tasks), minutes, args)
    result = {**facts,
              **table[-1][args.reward_tokens[0]],
              "table": table,
              "minutes": minutes,
              "peak_memory_gb": peak_memory_gb(distributed.device)}
    atomic_write(args.out / "eval.json", result)
    print(json.dumps({**result, "table": [{**row, "correct": None} for row in table]}))


def evaluate_checkpoint(index, tasks, args, distributed):
    """Load checkpoint number `index` of --ckpt and roll it out under each reward token.

    Returns:
        The table row of the checkpoint: its description, the metrics per reward token, and under "correct"
        the mean reward per reward token and task. On ranks other than the first, only the description.
    """
    torch.manual_seed(0)  # the random weights of `tiny` are the same on all ranks
    dtype = compute_dtype(args.dtype, distributed.device)
    policy = load_policy(args.ckpt[index], dtype, distributed.device, thinking=args.thinking)
    call_format = policy.call_format(args.call_format)
    identity = {"sha256": checksum(policy.model),  # checksum of the weights that were really loaded
                "call_format": call_format}
    check_and_record_settings(args.out, distributed, {f"checkpoint {index}": identity})
    if args.official_out:
        distributed.on_main(refuse_foreign_results, args, call_format, tasks)
    make_env = bfcl_env.make_env_fn(args, call_format)
    fitting = filter_overlong(policy, tasks, make_env, args.max_len)
    row = describe_checkpoint(policy, identity, tasks, fitting)
    distributed.print0(f"{row['arm']}: {policy.name} | weights sha256 {row['sha256'][:12]} | "
                       f"call format {call_format} ({policy.chat.call_format_reason}) | "
                       f"tasks that fit: {len(fitting)} of {len(tasks)}")
    print_warnings(policy.stage_info, args)
    if distributed.is_main:  # --show reads this file
        atomic_write(args.out / f"{index}.tokenizer.json", policy.tokenizer.backend_tokenizer.to_str())
    for reward_token in args.reward_tokens:
        trajectories = roll_out_tasks(policy, fitting, make_env, reward_token, index, args, distributed)
        if not distributed.is_main:
            continue
        row[reward_token] = summarize(trajectories, f"{row['arm']}, {reward_token} token")
        row["correct"][reward_token] = mean_reward(trajectories, lambda t: t.task)
        if args.official_out:
            lines = official_rows(tasks, trajectories, policy.tokenizer, call_format)
            write_official(args, call_format, lines)
    return row


def describe_checkpoint(policy, identity, tasks, fitting):
    """Return the part of a checkpoint's table row that is known before its rollouts.

    Args:
        identity: the checksum of the weights and the call format.
        fitting: those of the tasks whose prompt fits.
    """
    stage_info = policy.stage_info
    return {"arm": arm_name(stage_info) or policy.name,
            "ckpt": policy.name,
            "model": stage_info.base_model or policy.name,
            **identity,
            "thinking": policy.chat.thinking,
            "stage_info": {**asdict(stage_info), "tasks": len(stage_info.tasks)},
            # Excluded because their prompt does not fit: they could only fail.
            "tasks_left_out": len(tasks) - len(fitting),
            "trained_on": sum(task.id in stage_info.tasks for task in tasks),
            "correct": {}}  # reward token -> task id -> mean reward


def arm_name(stage_info) -> str | None:
    """Return the name of the arm: stage 1 by its data, stage 2 by the reward tokens of its rollouts.

    None for models that were not trained by this repository.
    """
    if not stage_info.stage:
        return None
    arm = {"sft": "SFT", "mixed": "mixed-data SFT", "rctp": "RCTP-FT"}[stage_info.arm]  # the paper's names
    arm += {"rollouts": " on own rollouts",
            "sampled": " with sampled failures"}.get(stage_info.data_source, "")
    if stage_info.stage == "rcgrpo":
        arm += {"mixed": " + RC-GRPO",
                "high": " + GRPO (high token)",
                "low": " + GRPO (low token)",
                "none": " + GRPO (no token)"}[stage_info.reward_tokens]
        if stage_info.advantage != "group":
            arm += f", {stage_info.advantage} advantage"
        if stage_info.ratio == "trajectory":
            arm += ", trajectory ratio"
        if stage_info.dynamic_sampling:
            arm += ", dynamic sampling"
    return arm


def print_warnings(stage_info, args):
    """Print a warning per difference between the training of a checkpoint and this evaluation."""
    if not stage_info.stage:
        return
    for name in ("tool_docs", "protocol"):
        trained_with = getattr(stage_info, name)
        if trained_with != getattr(args, name):
            warn(f"this checkpoint was trained with --{name} {trained_with}")
    known = stage_info.stage1_reward_tokens
    for reward_token in args.reward_tokens:
        if reward_token not in known:
            warn(f"stage 1 of this checkpoint never saw the {reward_token} token (only {', '.join(known)}), "
                 "so that token has no learned meaning")


def print_table(table, task_count, minutes, args):
    """Print the accuracies of the checkpoints by reward token, and the conditions of the evaluation."""
    lines = []
    for row in table:
        overall = [row[reward_token]["overall"] for reward_token in args.reward_tokens]
        lines.append([row["arm"],
                      *map(percent, overall),
                      overall[0]["n"],
                      row["tasks_left_out"]])
    heads = [f"accuracy, {reward_token} token" for reward_token in args.reward_tokens]
    print_columns(["checkpoint", *heads, "n", "tasks left out"], lines)
    print(f"\nModel: {table[-1]['model']}. {task_count} tasks x {args.samples} rollouts per reward token at "
          f"temperature {args.temperature}; docs {args.tool_docs}, protocol {args.protocol}, reward "
          f"{args.reward}; percent with the 95 % interval over families; {minutes:.1f} minutes.")
    trained_on = max(row["trained_on"] for row in table)
    if trained_on:
        print(f"{trained_on} of the {task_count} tasks were trained on: accuracy on those measures "
              "memorisation.")


# ---- Metrics and tables ------------------------------------------------------------------------------------
def summarize(trajectories: list[Trajectory], title):
    """Print a table of the rollouts by category.

    Returns:
        {"overall": metrics, "categories": {name: metrics}}, with the metrics of `figures`.
    """
    categories = {}
    for category in bfcl_env.CATEGORIES:
        members = [t for t in trajectories if t.task.startswith(category + "_")]
        if members:
            categories[category] = figures(members)
    overall = figures(trajectories)  # micro-average: over rollouts, not a mean of the categories
    lines = []
    for name, metrics in {**categories, "overall": overall}.items():
        lines.append([name,
                      percent(metrics),
                      "-" if metrics["progress"] is None else f"{100 * metrics['progress']:.1f}",
                      metrics["n"],
                      f"{metrics['calls']:.1f}",
                      f"{metrics['tokens']:.1f}" if metrics["tokens"] else "-",
                      metrics["errors"]])
    print(f"\n{title}")
    print_columns(["category", "accuracy %", "progress %", "n", "calls", "tokens", "errors"], lines)
    print(f"ended by: {overall['reasons']}")
    return {"overall": overall, "categories": categories}


def figures(trajectories: list[Trajectory]):
    """Return the summary metrics of a list of rollouts; means are over rollouts."""
    errors = Counter()
    for t in trajectories:
        if t.reward < 1:
            error = t.verdict["error_type"] or "reward below 1"
            errors[error.split(":")[-1]] += 1  # the prefix "multi_turn:" is dropped
    reasons = Counter(t.reason for t in trajectories)
    rewards = mean_reward(trajectories, lambda t: t.task)
    progress = [t.verdict["progress"] for t in trajectories]
    return {"accuracy": mean(t.reward for t in trajectories),
            "progress": None if None in progress else mean(progress),  # None: the paper's protocol has none
            "n": len(trajectories),
            "interval": interval(bootstrap([[rewards]]), rewards),
            "errors": dict(errors.most_common()),
            "reasons": dict(reasons.most_common()),  # why the rollouts ended
            "calls": mean(t.calls for t in trajectories),  # executed calls
            "messages": mean(t.steps for t in trajectories),  # messages of the model
            "tokens": mean(sum(t.loss_mask) for t in trajectories)}  # sampled tokens


def percent(f, key="accuracy"):
    """Return the value under `key` and its interval as text, in percent."""
    low, high = f["interval"]
    return f"{100 * f[key]:5.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def print_columns(head, lines):
    """Print a table whose columns are as wide as their widest cell."""
    rows = [list(map(str, row)) for row in (head, ["---"] * len(head), *lines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print(" | ".join(cells).rstrip())


# ---- Official result files ---------------------------------------------------------------------------------
# In these files `result` is [turn][step], and a step is one message of the model: text, or the list that a
# vendor's API returned, as the model's handler stores it. How a step is read, by handler:
HANDLERS = {
    "python": "Bielik, Claude, DeepSeekAPI, DeepseekReasoning, Gemma, GoGoAgent, Grok, Kimi, LingAPI, Llama, "
              "Llama FC, MiniCPM, Mistral, Novita, Nvidia, OpenAIResponses, QwenAPI, Qwen",
    "json": "QwenFC FC, PelicanVLFC FC, NanbeigeFC FC, Granite4FC FC",
    "llama": "LlamaHandler_3_1 FC",
    "gemini": "Gemini",
    "phi": "Phi",
    "vendor": "Arch FC, Claude FC, DeepSeekAPI FC, Fireworks FC, Functionary FC, GLMAPI FC, "
              "Granite3FC FC, Grok FC, Kimi FC, Mistral FC, MistralFC, NanbeigeAPI FC, Nova FC, Novita FC, "
              "OpenAICompletions FC, OpenAIResponses FC, PhiFC FC, QwenAPI FC, QwenAgentThink FC, "
              "QwenAgentNoThink FC, Writer FC",
    "google": "Gemini FC",
    "cohere": "Cohere FC",
    "mining": "DMCito, Mining FC",
    "hammer": "Hammer FC",
    "bitagent": "BitAgent FC",
    "xlam": "SalesforceLlama FC, SalesforceQwen FC",
}


def score(args):
    """Judge the official result files in a model's folder and print the metrics."""
    tasks = bfcl_env.select_tasks(args)
    files = result_files(Path(args.score))
    model, step_format = leaderboard_model(files)
    if args.call_format != "auto":
        step_format = f"{args.call_format} or vendor"
    elif step_format is None:
        raise BfclError(f"{model} is not a model of the leaderboard: give --call_format")
    elif step_format not in HANDLERS:
        raise BfclError(f"{model} cannot be scored: {step_format}")
    results, malformed = read_official(files)
    trajectories = [judge_result(task, results[task.id], step_format)
                    for task in tasks if task.id in results]
    if not trajectories:
        raise BfclError(f"{args.score} holds no line of the {len(tasks)} tasks asked for: try --split all")
    summary = summarize(trajectories, f"{model}: official verdicts, calls read as {step_format}")
    missing = len(tasks) - len(trajectories)  # missing results do not count as failures
    print(f"{missing} of {len(tasks)} tasks have no result and do not count; {malformed} lines cannot be "
          "read")
    if args.call_format != "auto" and not summary["overall"]["calls"]:
        warn(f"nothing could be read as {step_format} calls: try another --call_format")
    print(json.dumps({**summary,
                      "reward": "official",
                      "model": model,
                      "call_format": step_format,
                      "missing": missing,
                      "malformed": malformed}))


def home_of(path):
    """Return the model's folder of a result file, which some tools write to multi_turn/ inside of it."""
    return path.parent.parent if path.parent.name == "multi_turn" else path.parent


def leaderboard_model(files):
    """Return the name of the model whose result files these are, and how they are read.

    Returns:
        (name, key of HANDLERS); (name, the reason) for a model that is not served; (name, None) for a name
        that is not on the leaderboard.
    """
    formats = leaderboard_formats()
    names = [home_of(files[0].absolute()).name, home_of(files[0].resolve()).name]  # the folder may be a link
    name = next((name for name in names if name in formats), names[0])
    return name, formats.get(name)


def leaderboard_formats():
    """Return {name of a model's folder: key of HANDLERS, or why it is not served}, of the installed package.

    The package's table is read as text: its import would need every vendor's SDK.
    """
    by_handler = {}
    for step_format, handlers in HANDLERS.items():
        by_handler |= dict.fromkeys(handlers.split(", "), step_format)
    source = (bfcl_env.package() / "constants/model_config.py").read_text()
    found = {}
    for table in ast.walk(ast.parse(source)):
        if not isinstance(table, ast.Dict):
            continue
        for key, value in zip(table.keys, table.values):
            if not isinstance(value, ast.Call):
                continue
            fields = {field.arg: field.value for field in value.keywords}
            handler = fields["model_handler"].id.removesuffix("Handler")
            mode = " FC" if fields["is_fc_model"].value else ""
            reason = f"its handler {handler} stores calls in a format of its own"
            if handler in ("Gorilla", "ThinkAgent"):
                reason = f"the official decoder of its handler {handler} raises on every text"
            found[key.value.replace("/", "_")] = by_handler.get(handler + mode, reason)
    return found


def result_files(folder):
    """Return the multi-turn result files of one model.

    Raises:
        BfclError: if there are no such files, those of several models, or those of version 3.
    """
    files = sorted(folder.rglob("BFCL_v4_multi_turn_*_result.json"))
    homes = {home_of(path) for path in files}
    if not files and [*folder.rglob("BFCL_v3_multi_turn_*_result.json")]:
        raise BfclError(f"{folder} holds results of BFCL v3, whose gold answers differ from those of v4 in "
                        "about 68 of 200 tasks per category: give results of v4")
    if len(homes) != 1 or len({path.name for path in files}) < len(files):
        raise BfclError(f"{folder} holds no multi-turn result files, or those of several models: give one "
                        "model's folder, with files like multi_turn/BFCL_v4_multi_turn_base_result.json")
    return files


def read_official(files):
    """Read result files.

    Returns:
        ({task id: result}, number of unreadable lines). Unreadable lines are reported on stderr.

    Raises:
        BfclError: for a file without any readable line, such as one JSON array over many lines.
    """
    results = {}
    malformed = 0
    known = {task.id for task in bfcl_env.load_tasks()}
    for path in files:
        lines = path.read_bytes().splitlines()
        complaints = []
        for line_number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                name = row["id"]
                result = row["result"]
                if name in results or name not in known or name.rpartition("_")[0] not in path.name:
                    raise ValueError(f"{name!r} is not a task of this file, or has a result already")
                if isinstance(result, list) and not all(isinstance(turn, (list, str)) for turn in result):
                    raise ValueError("a turn is not a list of steps")
                results[name] = result
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                complaints.append(f"{path}:{line_number}: left out: {type(error).__name__}: {error}")
        if lines and len(complaints) == len(lines):
            raise BfclError(f"{path} does not have one result per line, as bfcl generate writes them: "
                            f"{complaints[0]}")
        malformed += len(complaints)
        print(*complaints, sep="\n", end="\n" if complaints else "", file=sys.stderr)
    return results, malformed


def judge_result(task, result, step_format) -> Trajectory:
    """Return the judged trajectory of one result, without its ids, which no result file holds."""
    if isinstance(result, list):
        turns = turns_of(result, step_format)
        verdict = vars(judge(task, turns))
    else:  # a string: the handler's report of an exception
        turns = []
        verdict = {"valid": False, "error_type": "multi_turn:inference_error", "progress": 0.0}
    steps = sum(turns, [])
    return Trajectory(task=task.id,
                      reward_token=None,
                      ids=[],
                      loss_mask=[],
                      logprobs=[],
                      reward=float(verdict["valid"]),
                      reason="not known",
                      verdict=verdict,
                      steps=len(steps),
                      calls=sum(len(calls) for calls in steps))


def turns_of(result, step_format) -> list[list[list[str]]]:
    """Return the calls of a result as [turn][step][call], for `judge`.

    A turn may be a string, the report of an exception: as officially, its characters are steps.
    """
    turns = []
    for steps in result:
        turns.append([calls_in(step, step_format) for step in steps])
    return turns


def calls_in(step, step_format) -> list[str]:
    """Return the calls of a step: none where the official decoders find none or raise.

    Args:
        step: text, or the list of a vendor's function-calling API.
        step_format: a key of HANDLERS; or, for example, "json or vendor".
    """
    try:
        if step_format in CALL_FORMATS:
            calls = parse_calls(step, step_format)
        else:
            calls = READERS[step_format](step)
        return [str(call) for call in calls]
    except (CallSyntaxError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return []


def read_vendor(step, as_text=True):
    """Read [{name: arguments}], where arguments may be JSON text. A step of text has no items: no call."""
    calls = []
    for call in step:
        for name, arguments in call.items():
            calls.append(bfcl_env.json_call(name, arguments if as_text else {**arguments}))
    return calls


def read_objects(step, name="name", arguments="arguments"):
    """Read [{"name": ..., "arguments": ...}]."""
    return [bfcl_env.json_call(call[name], {**call[arguments]}) for call in step]


def read_lenient_objects(step):
    """Read the same, where a key may be missing, and other items (the characters of a text) are no calls."""
    return [bfcl_env.json_call(call.get("name", ""), {**call.get("arguments", {})})
            for call in step if isinstance(call, dict)]


def read_json_list(step):
    """Read the JSON text of such a list, or of one such object."""
    calls = json.loads(step)
    return read_objects(calls if isinstance(calls, list) else [calls])


def read_hammer(step):
    """Read the JSON text of a lenient list, or of {"tool_calls": list}, between fences."""
    calls = json.loads(step.replace("```", ""))
    if isinstance(calls, dict):
        calls = calls.get("tool_calls", [])
    return read_lenient_objects(calls)


def read_xlam(step):
    """Read such a text, or several objects with semicolons between them."""
    try:
        return read_json_list(step)
    except json.JSONDecodeError:
        return read_objects(map(json.loads, step.split(";")))


def read_either(call_format, step):
    """Read a vendor's list, or text in this call format."""
    return read_vendor(step) if isinstance(step, list) else parse_calls(step, call_format)


READERS = {
    **{f"{name} or vendor": functools.partial(read_either, name) for name in CALL_FORMATS},
    "vendor": read_vendor,
    "google": lambda step: read_vendor(step, as_text=False),
    "cohere": lambda step: read_objects(step, "tool_name", "parameters"),
    "mining": read_lenient_objects,
    "hammer": read_hammer,
    "bitagent": read_json_list,
    "xlam": read_xlam,
    "gemini": lambda step: parse_calls(step.replace("```tool_code\n", "").replace("\n```", ""), "python"),
    "phi": lambda step: parse_calls(step.removeprefix("```json").removeprefix("```python"), "python"),
}


def official_rows(tasks, trajectories, tokenizer, call_format):
    """Return {category: result lines} of the trajectories.

    Each line is judged again from its text, as a consistency check.
    """
    by_id = {task.id: task for task in tasks}
    rows = {}
    for t in trajectories:
        task = by_id[t.task]
        result = result_of(t, task, tokenizer, call_format)
        rows.setdefault(task.category, []).append({"id": task.id, "result": result})
        verdict = judge(task, turns_of(result, call_format))
        if verdict.valid != t.verdict["valid"]:
            warn(f"{task.id}: the verdict from its text differs from the live verdict")
    return rows


def result_of(t: Trajectory, task, tokenizer, call_format) -> list[list[str]]:
    """Return the messages of a trajectory by turn.

    A message that hit a token limit was never executed and is omitted.
    """
    turns = [[]]
    messages = [ids for sampled, ids in t.segments() if sampled]
    for ids in messages[:t.steps]:
        text = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
        text = without_thoughts(text, call_format)
        turns[-1].append(text)
        if not calls_in(text, call_format) and len(turns) < len(task.turns):
            turns.append([])
    return turns


def official_path(args, call_format, category):
    """Return the path of a result file, in the folder of an official model with this decoder."""
    folder = CALL_FORMATS[call_format].official.replace("/", "_")
    return Path(args.official_out).resolve() / folder / f"multi_turn/BFCL_v4_{category}_result.json"


FOREIGN = "is not of this evaluation, which would replace it: give another --official_out"


def refuse_foreign_results(args, call_format, tasks):
    """Refuse to replace a result file that was there before this evaluation.

    Raises:
        BfclError: if there is one.
    """
    if work_has_begun(args.out):
        return
    for category in sorted({task.category for task in tasks}):
        path = official_path(args, call_format, category)
        if path.exists():
            raise BfclError(f"{path} {FOREIGN}")
    if [*path.parent.glob("BFCL_v4_*_result.json")]:
        warn(f"{path.parent} has results already, which count as those of this checkpoint")


def write_official(args, call_format, rows):
    """Write {category: result lines} into files.

    Raises:
        BfclError: if a file has other results. A continued evaluation writes the same ones again.
    """
    for category, lines in rows.items():
        path = official_path(args, call_format, category)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if path.exists() and path.read_text() != text:
            raise BfclError(f"{path} {FOREIGN}")
        atomic_write(path, text)
    model = CALL_FORMATS[call_format].official
    folder = Path(args.official_out).resolve()
    partial = ""
    if any(len(lines) < 200 for lines in rows.values()):
        partial = " --partial-eval"  # otherwise the evaluator expects all 200 tasks of a category
    print(f"official result files: {args.official_out}\n  bfcl evaluate --model {model} --test-category "
          f"{','.join(rows)} --result-dir {shlex.quote(str(folder))}{partial}")


# ---- Comparison of runs ------------------------------------------------------------------------------------
# Settings that must match for runs to be comparable.
COMPARABLE = ("split_by", "split", "categories", "tasks", "max_tasks", "tool_docs", "protocol", "reward",
              "dtype", "temperature", "max_new_tokens", "max_sampled_tokens", "max_len")
# What --compare needs of a row of eval.json.
ROW = {"arm", "sha256", "call_format", "model", "stage_info", "correct"}
# The preregistered comparison, evaluated with the high token, with equal rollout budgets. All others are
# exploratory.
PRIMARY = ("RCTP-FT + RC-GRPO", "RCTP-FT + GRPO (high token)")


def compare(args):
    """Print the arms and their differences, write compare.json and the plot."""
    result, arms = compared(args.compare)
    settings = [f"{name} {result[name]}" for name in COMPARABLE if result[name] != ""]
    print(f"{len(result['tasks that fit'])} tasks; " + ", ".join(settings))
    print_columns(["arm", "evaluated with", "accuracy %", "seeds", "rollouts"],
                  [[row["arm"], row["token"], percent(row), row["seeds"], row["rollouts"]]
                   for row in result["table"]])
    print("\npaired differences over the same tasks, in points; the intervals cover the variance between "
          "tasks, but little of that between training runs, and none of it with one seed per arm")
    lines = []
    for pair in result["pairs"]:
        detectable = f"{100 * pair['detectable']:.1f}"
        sides = [", ".join(pair[side]) for side in ("a", "b")]  # the arm and the reward token of each
        lines.append([pair["kind"], percent(pair, "difference"), detectable, *sides])
    print_columns(["kind", "difference", "smallest detectable", "of", "minus"], lines)
    atomic_write(args.out / "compare.json", result)
    plot(args.out / "compare.png", result["table"], arms)
    print(json.dumps(result))


def compared(folders):
    """Compare the evaluations in these folders.

    Returns:
        ({"table": the arms, "pairs": their differences, and the settings that all have in common},
        the rows of each arm).
    """
    rows, common = read_arms(folders)
    name_differing_flags(rows)
    tasks = common["tasks that fit"]
    # The arm of PRIMARY that is the minuend comes first; the stable sort keeps the others in order.
    rows.sort(key=lambda row: row["arm"] != PRIMARY[0])
    by_arm = {}  # (arm, reward token) -> one row per seed
    for row in rows:
        by_arm.setdefault((row["arm"], row["token"]), []).append(row)
    arms = list(by_arm.values())
    rewards = []  # [arms][seeds] {task: mean reward}
    for seeds in arms:
        rewards.append([row["correct"] for row in seeds])
    draws = bootstrap(rewards)  # [arms, draws]
    table = []
    for seeds, arm_draws in zip(arms, draws):
        table.append({"arm": seeds[0]["arm"],
                      "token": seeds[0]["token"],
                      "seeds": len(seeds),
                      "interval": interval(arm_draws, tasks),
                      "accuracy": mean(mean(row["correct"].values()) for row in seeds),
                      "rollouts": sorted({row["stage_info"]["rollouts"] for row in seeds})})
    pairs = paired_differences(table, draws, tasks)
    return {"table": table, "pairs": pairs, **common}, arms


def read_arms(folders):
    """Read the rows of all evaluations and check that these can be compared.

    Returns:
        (rows {arm, token, correct, ...}, one per checkpoint and reward token; the settings that all have in
        common). Identical weights are not counted as a new seed.

    Raises:
        BfclError: for evaluations that differ in more than their checkpoints.
    """
    rows = {}  # (checksum of the weights, reward token) -> row
    common = None
    for folder in folders:
        [table] = read_json(folder, "eval.json", "table")
        same, versions = read_json(folder, "config.json", "same", "versions")
        known = bool(table) and all(ROW <= row.keys() for row in table)
        if not known or not set(COMPARABLE) <= set(same):
            raise BfclError(f"{folder} was written by another version of this code: evaluate again")
        for row in table:
            facts = {name: same[name] for name in COMPARABLE}
            facts |= {"bfcl-eval": versions["bfcl-eval"],
                      # These three can differ under equal flags: then the models are not seeds of one arm.
                      "call_format": row["call_format"],
                      "model": row["model"],
                      "thinking": row.get("thinking", "off")}
            for reward_token, correct in row["correct"].items():
                if (row["sha256"], reward_token) in rows:
                    warn(f"{folder}: the same weights ({row['arm']}) were evaluated before under "
                         f"{reward_token}; this evaluation replaces the earlier one")
                rows[row["sha256"], reward_token] = {**row, "token": reward_token, "correct": correct}
                facts["tasks that fit"] = sorted(correct)
                common = common or dict(facts)
                differ = [f"{name}: {common[name]!r} and {value!r}"[:200]
                          for name, value in facts.items() if value != common[name]]
                if differ:
                    raise BfclError(f"{folders[0]} and {folder} cannot be compared ({'; '.join(differ)}): "
                                    "evaluate both with the same flags")
    return list(rows.values()), common


def name_differing_flags(rows):
    """Add to the name of an arm the flags in which its trainings differ: they are not its seeds."""
    by_arm = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    for arm, members in by_arm.items():
        flags = [row["stage_info"].get("flags", {}) for row in members]
        differing = [name for name, value in flags[0].items()
                     if any(other.get(name) != value for other in flags)]
        if differing:
            warn(f"{arm}: trained with different flags ({', '.join(differing)}), so these are several arms")
        for row, own in zip(members, flags):
            row["arm"] += "".join(f", {name} {own.get(name)}" for name in differing)


def read_json(folder, name, *keys):
    """Return the values of these keys in a JSON file of an evaluation's folder.

    Raises:
        BfclError: if there is no such file, or it lacks one of them.
    """
    try:
        content = json.loads((Path(folder) / name).read_text())
        return [content[key] for key in keys]
    except (OSError, ValueError, KeyError, TypeError):
        raise BfclError(f"{folder} holds no {name}, or a damaged one: give the --out folder of an "
                        "evaluation") from None


def paired_differences(table, draws, tasks):
    """Return the difference of every two arms that differ in one factor, the primary comparison first.

    Args:
        table: the rows of the arms, as `compared` makes them.
        draws: [arms, draws] their bootstrapped means.
    """
    # NOTE: an effect in less than this share of the families is absent from more than 20 % of samples of this
    # size.
    floor = 1 - 0.2 ** (1 / len(set(families_of(tasks))))
    pairs = []
    for (i, a), (j, b) in itertools.combinations(enumerate(table), 2):
        if a["arm"] != b["arm"] and a["token"] != b["token"]:
            continue  # only pairs that differ in one factor are compared
        budgets = {*a["rollouts"], *b["rollouts"]}
        primary = (a["arm"], b["arm"]) == PRIMARY and a["token"] == "high" and len(budgets) == 1
        gap = draws[i] - draws[j]  # [draws], paired
        pairs.append({"kind": "primary" if primary else "exploratory",
                      "a": [a["arm"], a["token"]],
                      "b": [b["arm"], b["token"]],
                      "difference": a["accuracy"] - b["accuracy"],
                      "interval": interval(gap, tasks, least=-1.0),
                      # The minimum detectable effect at 80 % power: 1.96 + 0.84 standard deviations.
                      "detectable": max(2.8 * float(gap.std()), floor)})
    pairs.sort(key=lambda pair: pair["kind"] != "primary")
    return pairs


def bootstrap(arms: list[list[dict]], draws=2000, seed=0):
    """Bootstrap the mean rewards of the arms over families and seeds.

    Each draw resamples families jointly for all arms, which pairs these, then seeds independently per arm.

    Args:
        arms: arms[a][s] is the {task: mean reward} of seed s; the tasks are the same everywhere.

    Returns:
        [arms, draws] the mean of each arm in each draw.
    """
    rng = np.random.default_rng(seed)
    tasks = list(arms[0][0])
    _, family = np.unique(families_of(tasks), return_inverse=True)  # [tasks] number of its family
    family_sizes = np.bincount(family)  # [families] tasks
    family_count = len(family_sizes)
    uniform = np.full(family_count, 1 / family_count)
    drawn = rng.multinomial(family_count, uniform, draws)  # [draws, families] how often each is drawn
    drawn_tasks = drawn @ family_sizes  # [draws]
    arm_means = []
    for runs in arms:
        sums = []  # [seeds, families]
        for run in runs:
            sums.append(np.bincount(family, [run[task] for task in tasks]))
        means = drawn @ np.transpose(sums) / drawn_tasks[:, None]  # [draws, seeds]
        seeds = rng.integers(len(runs), size=means.shape)  # [draws, seeds] the seeds of each draw
        arm_means.append(np.take_along_axis(means, seeds, 1).mean(1))
    return np.stack(arm_means)


def interval(draws, tasks, least=0.0) -> list[float]:
    """Return the 95 % interval of one arm over these tasks, or of a difference with `least` -1."""
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    if low == high:  # no variance: the exact binomial interval over families
        bound = 1 - 0.025 ** (1 / len(set(families_of(tasks))))
        low = max(least, low - bound)
        high = min(1.0, high + bound)
    return [low, high]


def families_of(tasks) -> list[int]:
    """Return the family of each task id, by the smallest index in that family."""
    family = {}  # index -> smallest index in its family
    for group in bfcl_env.families(bfcl_env.load_tasks()):
        family.update(dict.fromkeys(group, group[0]))
    return [family[int(task.rpartition("_")[2])] for task in tasks]


def plot(path, table, arms):
    """Plot the accuracies with their intervals, and the training reward curves of these checkpoints."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 2 + 0.4 * len(table)), layout="constrained")
    for y, (row, seeds) in enumerate(zip(table, arms)):
        bars.barh(f"{row['arm']}, {row['token']}", row["accuracy"], color=f"C{y}", alpha=0.6)
        bars.plot(row["interval"], [y, y], color="black")  # 95 %
        for seed in seeds:
            lines = read_metrics(Path(seed["ckpt"]).parent)
            steps = [line["step"] for line in lines]
            rewards = [line.get("reward") for line in lines]  # the log of stage 1 has none
            curves.plot(steps, rewards, color=f"C{y}")
    bars.set(xlim=(0, 1), title="accuracy (95 % interval)")
    curves.set(xlabel="step", title="reward in training")
    figure.savefig(path)


# ---- One transcript ----------------------------------------------------------------------------------------
def show(args):
    """Print one transcript of an evaluation's last checkpoint, then the gold calls of its task."""
    [same] = read_json(args.out, "config.json", "same")
    read_json(args.out, "0.tokenizer.json")  # refuse a training run's folder, which has no such file
    index = same["checkpoints"] - 1  # the last checkpoint
    rollouts = []
    for reward_token in same["reward_tokens"]:
        rollouts += finished_rollouts(args.out, f"{index}_{reward_token}").values()
    if args.show not in ("best", "worst"):
        rollouts = [t for t in rollouts if t.task == args.show]
    if not rollouts:
        raise BfclError(f"{args.out} has no rollout to show as {args.show}: give best, worst or the id of "
                        "one of its tasks; some may be too long, or not done yet")

    def quality(t):
        return t.reward, t.verdict["progress"] or 0

    t = min(rollouts, key=quality) if args.show == "worst" else max(rollouts, key=quality)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(args.out / f"{index}.tokenizer.json"))
    print(transcript(t, tokenizer))
    [task] = [task for task in bfcl_env.load_tasks() if task.id == t.task]
    for turn, calls in enumerate(task.gold):
        print(f"gold, turn {turn}: {'; '.join(calls) or 'no call'}")


# ---- Flags and modes ---------------------------------------------------------------------------------------
MODES = {"ckpt": evaluate, "score": score, "compare": compare, "show": show}  # by the flag that selects each


def parse_args():
    """Return the mode and the flags, checked."""
    parser = bfcl_env.Parser("Accuracy by reward token, scores of official result files, "
                             "comparison of evaluations, transcripts.")
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], help=f"model directories, hub ids, or {DEFAULT_MODEL}")
    add("--score", metavar="DIR",
        help="score the official result files in a model's folder; its name decides how calls are read, as "
        "on the leaderboard, and other names need --call_format")
    add("--compare", nargs="+", metavar="RUN",
        help="--out folders of evaluations; different weights of the same arm count as its seeds")
    add("--show", metavar="TASK",
        help="print a transcript of the last checkpoint in --out: best or worst of all rollouts, or the best "
        "of a task, by reward, then progress")
    add("--reward_tokens", default="high",
        help="comma-separated list of high, low, none: the reward tokens to evaluate with; none: without one "
        "(default: %(default)s)")
    add("--samples", type=number(int, 1), default=1,
        help="rollouts per task and reward token (default: %(default)s)")
    add("--out", type=nonempty,
        help="folder of the evaluation; an interrupted one is continued (default: runs/eval; with --compare "
        "runs/compare)")
    add("--official_out", metavar="DIR", help="write result files for the official evaluator below DIR")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
        help="dtype of the model; auto: bf16 where the processor multiplies it natively, else fp32 "
        "(default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="seed of the sampling (default: %(default)s)")
    add_sampling_flags(parser)
    bfcl_env.add_env_flags(parser, split=None)
    args = parser.parse_args()
    # The official files of a model hold all tasks, whatever our split is.
    args.split = args.split or ("all" if args.score else "test")
    args.out = Path(args.out or ("runs/compare" if args.compare else "runs/eval"))
    args.reward_tokens = list(dict.fromkeys(args.reward_tokens.split(",")))  # each once
    modes = [name for name in MODES if getattr(args, name)]
    check_args(args, modes)
    return modes[0], args


def check_args(args, modes):
    """Check the flags, and that they select exactly one mode.

    Raises:
        BfclError: with the flag to give instead.
    """
    if len(modes) != 1:
        raise BfclError("give one of --ckpt DIR, --score DIR, --compare RUN RUN, --show TASK; given: "
                        f"{', '.join(modes) or 'none of them'}")
    if not set(args.reward_tokens) <= {"high", "low", "none"}:
        raise BfclError(f"unknown reward token in {args.reward_tokens}: give --reward_tokens high,low,none")
    if args.official_out or args.score:
        if args.protocol != "official" or args.reward != "official":
            raise BfclError("official result files have only --protocol official and --reward official")
    if args.official_out:
        # A result file holds one sample per task for one model.
        if len(args.ckpt) != 1 or len(args.reward_tokens) != 1 or args.samples != 1:
            raise BfclError("official result files hold one answer per task: give --official_out with one "
                            "--ckpt, one of --reward_tokens, and --samples 1")
    if args.temperature == 0 and args.samples > 1:
        raise BfclError("--temperature 0 is greedy: all samples of a task would be alike; give --samples 1")
    for ckpt in args.ckpt:
        check_model(ckpt)


def main():
    mode, args = parse_args()
    MODES[mode](args)


if __name__ == "__main__":
    run_main(main)
