"""Evaluation: how often a checkpoint succeeds, by reward token.

    python eval_bfcl.py --ckpt runs/rl_rcgrpo/model                              # the test part of the split
    python eval_bfcl.py --ckpt smollm2-135m-instruct runs/sft_rctp/model --reward_tokens high,low --samples 4

    1. for each checkpoint and reward token, roll out every task --samples times
    2. success = mean reward, with a 95 % interval bootstrapped over families (variants of an id are related)
    3. a table, the trajectories under --out, and as last line one JSON object with all figures
"""
import argparse
import json
import sys
import time
from pathlib import Path

import bfcl_env
from bfcl_env import BfclEnv, BfclError, number


def parse_args():
    parser = argparse.ArgumentParser(description="Success of checkpoints by reward token.")
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="model directories, hub ids, or smollm2-135m-instruct")
    add("--reward_tokens", default="high", help="comma list of high, low, none (default: %(default)s)")
    add("--samples", type=number(int, 1), default=1, help="rollouts a task and token (default: %(default)s)")
    add("--out", default="runs/eval", help="folder for the trajectories (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
        help="of the model (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of the sampling (default: %(default)s)")
    bfcl_env.add_sampling_flags(parser)
    bfcl_env.add_world_flags(parser, part="test")
    args = parser.parse_args()
    try:
        args.reward_tokens = args.reward_tokens.split(",")
        for token in args.reward_tokens:
            if token not in ("high", "low", "none"):
                raise BfclError(f"unknown reward token {token!r} in --reward_tokens: give a comma list of "
                                "high, low, none")
        for ckpt in args.ckpt:
            bfcl_env.check_model(ckpt)
        bfcl_env.select_tasks(args)
    except BfclError as error:
        sys.exit(f"error: {error}")
    return args


# Flags are parsed before torch is imported, so that a mistake is told within seconds.
ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np

from rollout import load_policy, rollout, sampling, score, split_fitting
from sft_rctp import compute_dtype, peak_memory_gb, start_world, write_json

STAGES = {None: "base model", "rctp": "after RCTP-FT", "rcgrpo": "after RC-GRPO"}


def interval(values, families, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values`, resampling whole families (one label per value) 2,000 times."""
    labels = sorted(set(families))
    sums, counts = np.zeros(len(labels)), np.zeros(len(labels))  # [families]
    for value, family in zip(values, families):
        sums[labels.index(family)] += value
        counts[labels.index(family)] += 1
    draws = np.random.default_rng(seed).integers(len(labels), size=(2000, len(labels)))  # [2000, families]
    low, high = np.quantile(sums[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return float(low), float(high)


def summarise(trajectories, tasks, family_of) -> dict:
    """Figures of one checkpoint and token: {"success", "n", "interval", "reasons",
    "categories": {name: {"success", "n"}}}."""
    by_id = {task.id: task for task in tasks}
    categories = {}
    for t in trajectories:
        categories.setdefault(by_id[t.task].category, []).append(t)
    whole, parts = score(trajectories), {c: score(some) for c, some in categories.items()}
    return {"success": whole["reward"], "n": whole["n"],
            "interval": interval([t.reward for t in trajectories],
                                 [family_of[by_id[t.task].index] for t in trajectories]),
            "reasons": whole["reasons"],
            "categories": {c: {"success": part["reward"], "n": part["n"]} for c, part in parts.items()}}


def main(args):
    began = time.monotonic()
    world = start_world()
    if world.size > 1:
        raise BfclError("evaluation runs in one process so far: type python eval_bfcl.py, without torchrun")
    tasks = bfcl_env.select_tasks(args)
    family_of = {i: n for n, group in enumerate(bfcl_env.families(bfcl_env.load_tasks())) for i in group}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    table, trained_on = [], set()
    for ckpt in args.ckpt:
        start = time.monotonic()
        policy = load_policy(ckpt, dtype=compute_dtype(args.dtype, world.device), device=str(world.device))
        for name in ("docs", "protocol"):
            if policy.contract.get(name, getattr(args, name)) != getattr(args, name):
                print(f"warning: {ckpt} was trained with --{name} {policy.contract[name]}, evaluated with "
                      f"{getattr(args, name)}", file=sys.stderr)
        trained_on |= set(policy.contract.get("tasks", ()))
        label = STAGES.get(policy.contract.get("stage"), ckpt)
        if label in [row["label"] for row in table]:
            label = ckpt
        style = policy.style(args.style)
        fitting, left_out = split_fitting(
            policy, tasks, lambda task: BfclEnv(task, args.docs, style, args.protocol), args.max_len)
        print(f"{label}: {ckpt} | style {style} | all that fit: {len(fitting)} of {len(tasks)} tasks")
        row = {"ckpt": ckpt, "stage": policy.contract.get("stage"), "label": label,
               "model": policy.contract.get("base_model", ckpt), "tasks_left_out": left_out}

        # step 1: rollouts
        for token in args.reward_tokens:
            envs = [BfclEnv(task, args.docs, style, args.protocol)
                    for task in fitting for _ in range(args.samples)]
            trajectories = rollout(policy, envs, [None if token == "none" else token] * len(envs),
                                   [(args.seed, 0, i, j)
                                    for i in range(len(fitting)) for j in range(args.samples)],
                                   progress=f"{label}, {token}", **sampling(args))
            # step 2: success
            row[token] = summarise(trajectories, tasks, family_of)
            name = f"{len(table)}_{token}.jsonl"
            (out / name).write_text("".join(t.to_json() + "\n" for t in trajectories))
        row["eval_seconds"] = time.monotonic() - start
        summary = Path(ckpt).parent / "summary.json"  # what the run that wrote this checkpoint took
        row["run"] = json.loads(summary.read_text()) if summary.is_file() else {}
        table.append(row)
        del policy  # before the next one is loaded

    # step 3: the table
    def cell(figures):
        low, high = figures["interval"]
        return f"{100 * figures['success']:5.1f} [{100 * low:.0f}, {100 * high:.0f}]"
    head = (["checkpoint"] + [f"success, {token} token" for token in args.reward_tokens]
            + ["n", "train min", "eval min"])
    lines = [[row["label"]] + [cell(row[token]) for token in args.reward_tokens]
             + [str(row[args.reward_tokens[0]]["n"]),
                f"{row['run']['seconds'] / 60:.1f}" if row["run"] else "-",
                f"{row['eval_seconds'] / 60:.1f}"] for row in table]
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    print()
    for line in [head, ["-" * width for width in widths], *lines]:
        print(" | ".join(text.ljust(width) for text, width in zip(line, widths)))
    seen = sum(task.id in trained_on for task in tasks)
    names = {"smollm2-135m-instruct": "SmolLM2-135M-Instruct (135M, from Q4_1)"}
    print("\nModel: " + ", ".join(sorted({names.get(row["model"], row["model"]) for row in table})) + ".")
    print(f"{len(tasks)} tasks x {args.samples} rollouts a token at temperature {args.temperature}; "
          f"docs {args.docs}, protocol {args.protocol}, reward {args.reward}; percent with the 95 % interval "
          "over families.")
    if seen == len(tasks):
        print("These are the training tasks, memorised on purpose to see the machinery work: the figures say "
              "nothing about new tasks.")
    elif seen:
        print(f"Warning: {seen} of the {len(tasks)} tasks were trained on.")
    figures = {"table": table, "tasks": len(tasks), "samples": args.samples, "docs": args.docs,
               "protocol": args.protocol, "reward": args.reward, "temperature": args.temperature,
               "seconds": {**{row["stage"]: row["run"]["seconds"] for row in table if row["run"]},
                           "evaluation": time.monotonic() - began},
               "peak_memory_gb": max([peak_memory_gb(world),
                                      *(r["run"].get("peak_memory_gb", 0) for r in table)])}
    write_json(out / "eval.json", figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        main(ARGS)
    except BfclError as error:
        sys.exit(f"error: {error}")
