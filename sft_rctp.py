"""Stage 1: Reward-Conditioned Trajectory Policy fine-tuning (RCTP-FT, arXiv 2602.03025); and the training
engine that both stages share.

    torchrun sft_rctp.py                                  # the default model, training part of the split
    torchrun --nproc_per_node 8 sft_rctp.py --model Qwen/Qwen2.5-7B-Instruct --tool_docs full

Stage 1 trains one policy on successes and on failures. A reward token in the prompt tells the policy which of
the two to produce:

    1. for each task, play the gold calls in the environment, and a corrupted copy that the judge rejects;
       with --failures sampled, as in the paper, the failure is a rollout of the starting model instead
    2. render both with the same code, `<|high_reward|>` in the prompt of the success and `<|low_reward|>` in
       the prompt of the failure (1:1)
    3. pack trajectories that share a prefix: [prefix | branch | branch ...], the prefix computed once
    4. minimise the cross-entropy of the assistant tokens, as a mean over all N of them in an update:
       L = -1/N * sum over the N assistant tokens of the update of log pi(a_t | h_t, r)
    5. write the model as a plain Hugging Face directory: the starting point and KL reference of stage 2

Read Stage 1, Sharding and The update; the rest serves them and stage 2. Sections, in order:
Gold calls and mistakes, Trajectories, Stage 1; Distributed set-up, Sharding, The update, Checkpoints,
The training loop, Rollouts on disk and validation, The run directory, Flags.
"""
import argparse
import contextlib
import ctypes
import datetime
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path

import bfcl_env

if __name__ == "__main__":
    bfcl_env.start_process()

import matplotlib
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor
from safetensors import SafetensorError
from tqdm import tqdm

from bfcl_env import BfclError, Call, Episode, judge, warn, write_calls
from rollout import (DEFAULT_MODEL, STAGE_INFO, Pack, Sampler, StageInfo, Trajectory, add_sampling_flags,
                     answer_messages, check_model, checksum, compute_dtype, dummy_pack, filter_overlong,
                     load_policy, mean_reward, nonempty, number, pack, read_stage_info, rollout, run_main,
                     sampling, tie_head, token_logprobs, transcript)


# ---- Gold calls and mistakes -------------------------------------------------------------------------------
def gold_calls(task) -> list[list[Call]]:
    """Return the ground truth by turn, with every argument by keyword.

    The official python decoder drops positional arguments."""
    episode = Episode(task)
    turns = []
    for turn in task.gold:
        turns.append([Call(name, (), kwargs) for name, kwargs in map(episode.bound, turn)])
    return turns


def script_messages(task, turns: list[list[Call]], call_format, protocol="official") -> list[str]:
    """Script the assistant messages of an agent that makes these calls.

    Calls are grouped into messages: a call that needs a result of the current message starts a new one. A
    closing message ends each turn. In the paper's protocol, where plain text ends the conversation, a last
    call of `done()` is the only closing message."""
    episode = Episode(task)
    messages = []
    known = ""  # text that the agent has read before the current message
    for user_text, calls in zip(task.turns, turns):
        known += user_text or ""
        current = []  # calls of the current message
        results = ""  # of those calls
        for call in calls:
            if current and _needs_result(call, results, known):
                messages.append(write_calls(current, call_format))
                known += results
                current = []
                results = ""
            current.append(call)
            last_result = episode.run([str(call)])[0]
            results += last_result
        if current:
            messages.append(write_calls(current, call_format))
            known += results
        if protocol == "paper":
            continue
        # Both texts are phrased so that neither decoder parses them as a call.
        if calls:
            messages.append(f"Done. {calls[-1].name} returned: {last_result[:80]}")
        else:
            messages.append(
                "I can't do this yet: a function or a detail is missing. Could you give it to me?")
    if protocol == "paper":
        messages.append(write_calls([Call("done")], call_format))
    return messages


def _needs_result(call, results, known):
    """Return whether an argument of the call can be read in `results` alone, not in `known`."""
    texts = []
    for value in call.kwargs.values():
        texts += map(str, value if isinstance(value, list) else [value])
    # Shorter texts appear everywhere by chance.
    return any(len(text) > 2 and text in results and text not in known for text in texts)


# NOTE: The length of a conversation must not tell its label. "missing" shortens a conversation, "guess"
# lengthens it, the other two kinds do neither.
MISTAKES = ("argument", "function", "missing", "guess")


def corrupt(task, turns: list[list[Call]], kind, rng):
    """Make one kind of mistake, which models really make, in up to half of the turns on average.

    Several turns are corrupted where that is possible, since a failing agent rarely makes a single mistake.
    The result is not guaranteed to fail: check it with `judge`."""
    corrupted = [_corrupt_turn(task, turns, t, kind, rng) for t in range(len(turns))]
    able = [t for t, calls in enumerate(turns) if corrupted[t] != calls]  # turns that can be corrupted
    chosen = [t for t in able if rng.random() < len(turns) / len(able) / 2]
    if not chosen:
        chosen = able[:1]
    return [corrupted[t] if t in chosen else calls for t, calls in enumerate(turns)]


def _corrupt_turn(task, turns, t, kind, rng):
    """Return the calls of turn t with a mistake, or unchanged where this kind of mistake cannot be made."""
    calls = turns[t]
    if not calls:
        if kind != "guess" or t + 1 == len(turns):
            return calls
        # The agent should ask back. Instead it makes the calls of the next turn with other functions.
        return [_other_function(task, call, rng) for call in turns[t + 1]]
    corrupted = list(calls)
    i = rng.randrange(len(calls))  # index of the call to corrupt
    call = calls[i]
    match kind:
        case "argument" if call.kwargs:
            key = rng.choice(list(call.kwargs))
            calls_so_far = chain.from_iterable(turns[:t + 1])
            value = _other_value(call.kwargs[key], calls_so_far, rng)
            corrupted[i] = Call(call.name, (), {**call.kwargs, key: value})
        case "function":
            corrupted[i] = _other_function(task, call, rng)
        case "missing" if len(calls) > 1:  # an emptied turn would reveal the label
            del corrupted[i]
    return corrupted


def _other_function(task, call, rng):
    """Return a call, with the same values, of another available function that takes as many arguments."""
    excluded = [call.name, *chain.from_iterable(task.withheld.values())]
    candidates = []
    for doc in task.docs:
        names = doc["parameters"]["properties"]
        required = doc["parameters"]["required"]
        fits = len(required) <= len(call.kwargs) <= len(names)
        if fits and doc["name"] not in excluded:
            kwargs = dict(zip(names, call.kwargs.values()))
            candidates.append(Call(doc["name"], (), kwargs))
    return rng.choice(candidates or [call])  # without a candidate the call stays as it is


def _other_value(value, calls_so_far, rng):
    """Return another value of the same type, if possible one from earlier in the conversation."""
    others = []
    for call in calls_so_far:
        others += [v for v in call.kwargs.values() if type(v) is type(value) and v != value]
    if others:
        return rng.choice(others)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + rng.choice([1, 10, 100])
    if isinstance(value, str):
        return value + "_new"
    return [value]


# ---- Trajectories ------------------------------------------------------------------------------------------
def play_script(policy, env, messages, reward_token, reward="official") -> Trajectory:
    """Play scripted messages in the environment and render the conversation exactly as sampling would.

    Args:
        messages: Texts of the assistant.
        reward_token: "high", "low" or None.
        reward: The kind of reward that the verdict is turned into (--reward).

    Returns:
        The judged trajectory. Its loss mask is 1 on the scripted messages; all its log-probs are 0.0."""
    chat = policy.chat
    ids = list(chat.render_prompt(env.messages(), reward_token))
    loss_mask = [0] * len(ids)
    calls = 0
    for n, text in enumerate(messages, start=1):
        message_ids = chat.render_assistant(text)
        ids += message_ids
        loss_mask += [1] * len(message_ids)
        step = env.step(text)
        calls += len(step.results)
        if step.done:
            break
        if n < len(messages):
            reply_ids = chat.render_env_reply(answer_messages(step))
            ids += reply_ids
            loss_mask += [0] * len(reply_ids)
    verdict = env.verdict()
    return Trajectory(
        env.id,
        reward_token,
        ids,
        loss_mask,
        [0.0] * len(ids),
        verdict.reward(reward),
        step.reason or "done",
        vars(verdict),
        steps=n,
        calls=calls)


def make_pair(policy, task, make_env, args, used, reward_token_of, failure=None):
    """Play the gold calls of one task, and pair them with a failure.

    Args:
        used: How often each kind of mistake was made so far. The least used kind is tried first.
        reward_token_of: Function from a label, "high" or "low", to the reward token of the prompt.
        failure: A failed rollout, or None to write a failure, which agrees with the success up to its first
            mistake.

    Raises:
        BfclError: If the ground truth fails, or no corrupted copy of it does."""
    rng = random.Random(f"{args.seed} {task.id}")
    gold = gold_calls(task)

    def play(turns, label):
        env = make_env(task)
        messages = script_messages(task, turns, env.call_format, args.protocol)
        return play_script(policy, env, messages, reward_token_of(label), args.reward)

    success = play(gold, "high")
    if success.reward != 1:
        raise BfclError(f"the ground truth of {task.id} does not pass: {success.verdict}")
    if failure:
        return [success, failure]
    for kind in sorted(MISTAKES, key=lambda kind: used[kind]):
        for _ in range(8):
            turns = corrupt(task, gold, kind, rng)
            steps = [[list(map(str, calls))] for calls in turns]  # all calls of a turn in one step
            # Rendering is slow: judge the calls first. The rendered messages are judged again.
            if judge(task, steps).reward(args.reward) == 1:
                continue
            failure = play(turns, "low")
            if failure.reward < 1:
                used[kind] += 1
                failure.verdict["mistake"] = kind
                return [success, failure]
    raise BfclError(f"found no failing variant of {task.id}")


SUFFIX = 32  # most ids that the text of a reward token adds to a prompt


def sample_failures_once(path, policy, model, tasks, make_env, args, distributed):
    """Call `sample_failures`, unless a resumed run has the file.

    Args:
        policy: A full copy, which has the weights of the sharded `model` only while it samples."""
    if not distributed.broadcast(distributed.is_main and path.exists()):
        load_full_weights(policy.model, model)
        sample_failures(path, policy, tasks, make_env, args, distributed)
        free_weights(policy.model)


def sample_failures(path, policy, tasks, make_env, args, distributed):
    """Write one failed rollout per task to a file: the first of at most --failure_tries that fails.

    The rollouts are made without a reward token. Their random numbers depend on the seed, the task and the
    try alone, so that a resumed run adds the missing ones, in bf16 up to rounding.

    Raises:
        BfclError: On every rank, if no rollout fails."""
    # The text of the reward token comes into the prompt later. The conversation must still fit.
    limits = {**sampling(args), "max_len": min(args.max_len, policy.max_len) - SUFFIX}
    successful = tasks  # in all tries so far
    for n in range(args.failure_tries):
        found = rollout_to_disk(
            path.parent,
            path.stem,
            policy,
            [(task, n) for task in successful],
            make_env,
            None,
            lambda task, n: (args.seed, "failures", task.id, 0, n),
            f"failures, try {n + 1}",
            distributed,
            **limits)
        successful = [task for task in successful if found[task.id, n].reward == 1]
    failures = {}  # task id -> its first failure
    for (task_id, _), t in found.items():
        if t.reward < 1 and 1 in t.loss_mask:
            failures.setdefault(task_id, t)
    distributed.print0(f"{len(failures)} of {len(tasks)} tasks have a failed rollout; in the others all "
                       f"{args.failure_tries} tries succeed, or the prompt is too long")
    if not failures:
        raise BfclError("no rollout of --model failed: with a new --out, raise --failure_tries or take other "
                        "tasks")
    text = "".join(t.to_json() + "\n" for t in failures.values())
    distributed.on_main(atomic_write, path, text)  # the other ranks wait for the file
    if distributed.is_main:
        for file in rollout_files(path.parent, path.stem):
            file.unlink()


def read_rollouts(policy, tasks, make_env, args, files, reward_token_of):
    """Read the rollouts of these tasks from files of rollouts, and relabel them by their verdict.

    Only the prompt is rendered again, since it contains the reward token.

    Raises:
        BfclError: With file and line, for a line that is not a rollout with this run's prompt."""
    tasks_by_id = {task.id: task for task in tasks}
    found = []
    for file in files:
        for n, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
            try:
                t = Trajectory.from_json(line)
                if t.task not in tasks_by_id or 1 not in t.loss_mask:
                    continue
                if not all(type(i) is int and 0 <= i < len(policy.banned) for i in t.ids):
                    raise ValueError("ids outside of the vocabulary")
                messages = make_env(tasks_by_id[t.task]).messages()
                found.append(_relabel(t, policy.chat, messages, args.reward, reward_token_of))
            except (BfclError, KeyError, TypeError, ValueError) as error:
                raise BfclError(f"{file}, line {n}: not a rollout with this run's prompt ({error}); give a "
                                "run's rollouts/*.jsonl and its --model, --tool_docs, --call_format and "
                                "--protocol") from None
    return found


def _relabel(t, chat, messages, reward_kind, reward_token_of):
    """Return the rollout with the reward of its verdict, and the reward token of that reward in its prompt.

    Raises:
        BfclError, KeyError, TypeError, ValueError: If it is not a rollout with this prompt."""
    reward = bfcl_env.Verdict(**t.verdict).reward(reward_kind)
    old_prompt = t.segments()[0][1]
    if old_prompt != chat.render_prompt(messages, t.reward_token) or len(t.loss_mask) != len(t.ids):
        raise ValueError("another prompt")
    reward_token = reward_token_of("high" if reward == 1 else "low")
    prompt = chat.render_prompt(messages, reward_token)
    end = len(old_prompt)
    ids = prompt + t.ids[end:]
    return replace(
        t,
        reward_token=reward_token,
        reward=reward,
        ids=ids,
        loss_mask=[0] * len(prompt) + t.loss_mask[end:],
        logprobs=[0.0] * len(ids))


def pair_rollouts(trajectories: list[Trajectory], limit):
    """Pair successes with failures, of any tasks; the surplus of one side is not used.

    Returns:
        The [success, failure] pairs, and how many of the rollouts are longer than `limit` tokens.

    Raises:
        BfclError: If there is no pair."""
    short = [t for t in trajectories if len(t.ids) <= limit]
    left_out = len(trajectories) - len(short)
    successes = [t for t in short if t.reward == 1]
    failures = [t for t in short if t.reward < 1]
    pairs = [list(pair) for pair in zip(successes, failures)]
    counts = f"{len(successes)} successes and {len(failures)} failures in the chosen tasks"
    if not pairs:
        raise BfclError(f"--rollouts has {counts}, {left_out} too long: it needs both; give more files, or "
                        "tasks")
    if len(short) > 2 * len(pairs):
        warn(f"--rollouts has {counts}: {len(short) - 2 * len(pairs)} have no partner and are not used")
    return pairs, left_out


def stage1_data(policy, tasks, make_env, args, files=()):
    """Return the training data of --arm.

    All arms use the same pairs, updates and pairs per update. The sft arm keeps only the success of each
    pair, and so has half as many trajectories.

    Args:
        files: Rollouts, whose failures are paired with the gold calls (--failures sampled) or with the
            successes among them. Without files failures are written.

    Returns:
        [success, failure] pairs with the reward tokens of --arm; and how many pairs, or single rollouts of
        both labels, are left out because they are too long."""
    limit = min(args.max_len, policy.max_len)  # tokens per trajectory
    rng = random.Random(f"{args.seed} tokens")

    def reward_token_of(label):
        return label if args.arm == "rctp" and rng.random() >= args.reward_token_dropout else None

    found = read_rollouts(policy, tasks, make_env, args, files, reward_token_of)
    if files and args.failures == "written":
        rng.shuffle(found)
        pairs, left_out = pair_rollouts(found, limit)
    else:
        failures = {t.task: t for t in reversed(found) if t.reward < 1}  # the first of each task
        if files:
            tasks = [task for task in tasks if task.id in failures]
        # The kind "guess" is possible only in tasks with an empty turn. They come last: "guess" is then the
        # least used kind, which is tried first.
        order = sorted(tasks, key=lambda task: [] in task.gold)
        used = Counter()
        made = [make_pair(policy, task, make_env, args, used, reward_token_of, failures.get(task.id))
                for task in tqdm(order, desc="data", disable=None)]
        pairs = [pair for pair in made if max(len(t.ids) for t in pair) <= limit]
        left_out = len(made) - len(pairs)
    if args.arm == "sft":
        pairs = [pair[:1] for pair in pairs]
    return pairs, left_out


def data_statistics(trajectories: list[Trajectory], max_new_tokens):
    """Summarise the data by label, and count the messages that the sampler would cut off."""
    reward_tokens = Counter(t.reward_token or "none" for t in trajectories)
    kinds = Counter(map(_kind, trajectories))
    message_lengths = []  # token ids per assistant message
    numbers = {"messages": [], "calls": [], "sampled tokens": []}  # per trajectory
    for t in trajectories:
        lengths = [len(ids) for is_sampled, ids in t.segments() if is_sampled]
        message_lengths += lengths
        numbers["messages"].append(len(lengths))
        numbers["calls"].append(t.calls)
        numbers["sampled tokens"].append(sum(lengths))
    cut_off = sum(length > max_new_tokens for length in message_lengths)
    lines = [f"trajectories {dict(kinds)}, reward tokens {dict(reward_tokens)}; messages of at most "
             f"{max(message_lengths)} tokens, {cut_off} of {len(message_lengths)} longer than "
             f"--max_new_tokens {max_new_tokens}: the sampler would cut those off"]
    success = torch.tensor([t.reward == 1 for t in trajectories])  # [trajectories]
    if not success.all():  # the sft arm has successes alone
        lines += [threshold_line(name, values, success) for name, values in numbers.items()]
    return "\n".join(lines)


def _kind(t):
    """Return "success", or the kind of a failure: its written mistake, the official error type, or how it
    ended."""
    if t.reward == 1:
        return "success"
    return t.verdict.get("mistake") or t.verdict["error_type"] or t.reason


def threshold_line(name, values, success):
    """Compare a number between the labels, and say how often the best threshold on it tells the label.

    Such a threshold needs no skill: a policy that can tell the labels by it may learn length, not success.

    Args:
        values: One number per trajectory.
        success: [trajectories] bool."""
    values = torch.tensor(values).double()  # [trajectories]
    above = values[:, None] > values.unique()  # [trajectories, thresholds]
    right = (above == success[:, None]).double().mean(0)  # [thresholds]
    accuracy = max(right.max(), 1 - right.min()).item()
    line = (f"{name}: {values[success].mean():.1f} in successes, {values[~success].mean():.1f} in failures; "
            f"the best threshold tells {accuracy:.0%} of the labels")
    if accuracy > 0.75:
        return f"WARNING: {line}: the policy may learn length instead of success"
    return line


# ---- Stage 1 -----------------------------------------------------------------------------------------------
FAILURES = "failures.jsonl"  # in the run directory, with --failures sampled
# Reward tokens in the prompts of each arm. None is a prompt without a reward token.
ARM_REWARD_TOKENS = {"rctp": ["high", "low", None], "mixed": [None], "sft": [None]}


def main():
    args = parse_args()
    if args.export is not None:
        return export_checkpoint(args.export)
    distributed = init_distributed()
    out = begin_run(args, distributed)
    tasks = bfcl_env.select_tasks(args)
    val_tasks = validation_tasks(args)
    torch.manual_seed(args.seed)  # only the weights of the `tiny` model are drawn from this generator
    policy = distributed.together(load_policy, args.model, torch.float32, "cpu",
                                  weights=distributed.is_main, thinking=args.thinking)
    call_format = policy.call_format(args.call_format)
    make_env = bfcl_env.make_env_fn(args, call_format)
    banned = policy.banned.to(distributed.device)
    dtype = compute_dtype(args.dtype, distributed.device)
    sha256 = distributed.broadcast(checksum(policy.model) if distributed.is_main else None)
    check_and_record_settings(out, distributed, {"weights": sha256, "compute": str(dtype)})
    check_same_run(out, distributed, {"rollouts": bool(args.rollouts)})  # before it samples for hours
    val_tasks = filter_overlong(policy, val_tasks, make_env, args.max_len)
    to_sample = args.failures == "sampled" and not args.rollouts
    if val_tasks or to_sample:
        # A full copy of the policy. Its weights are there only while it samples.
        sampler_policy = load_policy(
            args.model, dtype, distributed.device, weights=False, thinking=args.thinking)
        free_weights(sampler_policy.model)
        check_kv_cache(sampler_policy, val_tasks, make_env, args)
    model, optimizer = shard_model(policy, args, dtype, distributed)  # from here on policy.model is sharded

    # steps 1 and 2: successes and failures, played or sampled, and rendered
    files = [out / FAILURES] if to_sample else args.rollouts
    if to_sample:
        sample_failures_once(files[0], sampler_policy, model, tasks, make_env, args, distributed)
    pairs, left_out = stage1_data(policy, tasks, make_env, args, files)
    data = list(chain.from_iterable(pairs))
    check_data(data, tasks, args, out, distributed)
    pairs_per_step = max(1, args.batch_size // 2)
    steps = args.steps or args.epochs * math.ceil(len(pairs) / pairs_per_step)
    loop = TrainLoop(out, args, model, optimizer, steps, distributed)
    loop.resume()
    loop.state["stage_info"] = asdict(stage1_info(policy, data, call_format, args))
    distributed.print0(
        f"{transcript(data[-1], policy.tokenizer)}\n\n{data_statistics(data, args.max_new_tokens)}\n"
        f"stage 1: {describe(policy, call_format, args)} | {len(pairs)} pairs of {len(tasks)} tasks, "
        f"{left_out} too long | {steps} steps of {pairs_per_step} pairs, from {loop.done + 1} | {dtype} on "
        f"{distributed.size} x {distributed.device.type} | {out}")

    for step in loop.steps():
        start = synced_time(distributed.device)

        # step 3: every rank makes the same packs of the update, and takes every size-th of them
        batch = []
        for i in epoch_shuffle(len(pairs), (step - 1) * pairs_per_step, pairs_per_step, args.seed):
            batch += pairs[i]
        packs = pack(batch, args.tokens_per_microbatch, distributed.device)
        my_packs = pad_packs(packs[distributed.rank::distributed.size], distributed)

        # step 4: L = -1/N * sum of log pi(a_t | h_t, r)
        N = sum(len(p.targets) for p in packs)  # the one normaliser of the update, known before any forward

        def loss_of(p):
            return -model.token_logprobs(p, banned).sum() / N

        lr = get_lr(step, args.lr, steps, decay=steps // 5)
        optimizer.param_groups[0]["lr"] = lr
        norm, loss = optimizer_step(model, optimizer, my_packs, loss_of, distributed)

        seconds = synced_time(distributed.device) - start
        num_tokens = sum(len(p.ids) for p in packs)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": lr, "num_tokens": num_tokens,
                   "step_time": seconds, "perf/throughput": num_tokens / seconds}
        # The rewards under each reward token show whether the policy has learned to follow it.
        if val_tasks and (step % args.eval_every == 0 or step == steps):
            load_full_weights(sampler_policy.model, model)
            reward_tokens = ARM_REWARD_TOKENS[args.arm]
            metrics |= validate(sampler_policy, val_tasks, reward_tokens, make_env, args, distributed)
            free_weights(sampler_policy.model)
        loop.log(step, metrics)

    # step 5: the model, for stage 2
    loop.end(policy)


def check_data(data, tasks, args, out, distributed):
    """Check that there is training data, and that it is this run's.

    Raises:
        BfclError: If it is not."""
    if not data:
        raise BfclError(f"none of the {len(tasks)} tasks gives a pair that fits --max_len {args.max_len}: "
                        "raise it, or take smaller --tool_docs, with a new --out; with --failures sampled "
                        "and --rollouts the files must have failures of these tasks")
    digest = hashlib.sha256(str([t.ids for t in data]).encode()).hexdigest()
    check_and_record_settings(out, distributed, {"data": digest, "rollouts": bool(args.rollouts)})


def describe(policy, call_format, args):
    """Return the flags of a run for its first line."""
    return (f"{args.model} | arm {args.arm}, failures {args.failures} | docs {args.tool_docs}, call format "
            f"{call_format} ({policy.chat.call_format_reason})")


def stage1_info(policy, data, call_format, args):
    """Return the facts about this run that stage 2 and the evaluation need."""
    return StageInfo(
        stage="rctp",
        base_model=policy.stage_info.base_model or args.model,
        tool_docs=args.tool_docs,
        call_format=call_format,
        protocol=args.protocol,
        arm=args.arm,
        data_source="rollouts" if args.rollouts and args.failures == "written" else args.failures,
        stage1_reward_tokens=sorted({t.reward_token or "none" for t in data}),
        tasks=sorted({t.task for t in data} | {*policy.stage_info.tasks}),
        rollouts=policy.stage_info.rollouts,
        flags=training_flags(1, args, policy.stage_info),
        reward_ids=policy.reward_ids,
        prompt_sha256=policy.chat.fingerprint,
        thinking=policy.chat.thinking,
        date=policy.chat.date)


# ---- Distributed set-up ------------------------------------------------------------------------------------
@dataclass
class Distributed:
    """Rank, number of ranks and device of this process. Plain `python` is one rank on the same code path."""
    rank: int
    size: int
    device: torch.device
    lock: object = None  # open file, see `lock_run_dir`

    @property
    def is_main(self):
        return self.rank == 0

    def print0(self, text):
        if self.is_main:
            print(text, flush=True)

    def all_reduce(self, value, op=dist.ReduceOp.SUM):
        t = torch.tensor(float(value), dtype=torch.float64, device=self.device)  # []
        dist.all_reduce(t, op)
        return t.item()

    def gather(self, values):
        """Concatenate the lists of all ranks, on every rank."""
        parts = [None] * self.size
        dist.all_gather_object(parts, values)
        return list(chain.from_iterable(parts))

    def broadcast(self, value):
        """Return rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def raise_together(self, complaint: str | None):
        """Raise on every rank if any rank complains. A rank that failed alone would leave the others hanging.

        Raises:
            BfclError: With the complaint of the lowest rank that has one."""
        complaints = [text for text in self.gather([complaint]) if text]
        if complaints:
            raise BfclError(complaints[0])

    def together(self, function, *args, **kwargs):
        """Return the result of a function that every rank calls. If it fails on one, it fails on all.

        Raises:
            BfclError: On every rank, if any rank's call does."""
        result = complaint = None
        try:
            result = function(*args, **kwargs)
        except BfclError as error:
            complaint = str(error)
        self.raise_together(complaint)
        return result

    def on_main(self, function, *args):
        """Call a function on rank 0 alone, and raise its BfclError on every rank."""
        self.together(lambda: function(*args) if self.is_main else None)


def init_distributed() -> Distributed:
    """Join the process group that torchrun describes, or make one of a single rank.

    Raises:
        BfclError: If a launcher other than torchrun did not set LOCAL_RANK, or if ranks share a GPU."""
    if ("RANK" in os.environ) != ("LOCAL_RANK" in os.environ):
        raise BfclError("only one of RANK and LOCAL_RANK is set: start the ranks with torchrun, or set both")
    if "RANK" in os.environ:
        options = {}  # torchrun gives them by environment variables
    else:  # plain `python`
        options = dict(store=dist.HashStore(), rank=0, world_size=1)
    device = local_device()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Without device_id NCCL starts at its first collective. That is after the check below, whose message
        # tells the user what to type.
        backend = "cpu:gloo,cuda:nccl"
    # Ranks may finish their rollouts hours apart. The default timeout is 10 minutes.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=7), **options)
    distributed = Distributed(dist.get_rank(), dist.get_world_size(), device)
    if device.type == "cuda":
        gpus = distributed.gather([str(torch.cuda.get_device_properties(device).uuid)])
        if len(set(gpus)) < len(gpus):
            raise BfclError(f"{len(gpus)} ranks share {len(set(gpus))} GPUs: start one rank per GPU, with "
                            "--nproc_per_node of torchrun")
    return distributed


def local_device():
    """Return this rank's GPU, or the CPU of a machine without GPUs.

    Raises:
        BfclError: If no visible GPU has the number of LOCAL_RANK."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if count == 1 and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        index = 0  # the launcher shows each rank one GPU only
    if index >= count:
        raise BfclError(f"LOCAL_RANK is {index}, but {count} GPUs are visible: give --nproc_per_node "
                        f"{count}; if the launcher shows each rank one GPU only, set LOCAL_WORLD_SIZE")
    return torch.device("cuda", index)


def synced_time(device):
    """Return the time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


# ---- Sharding ----------------------------------------------------------------------------------------------
def use_gradient_checkpointing(model, flag):
    """Resolve --gradient_checkpointing. Without it a 7B model and its moments do not fit on a 141 GB GPU."""
    return flag == "on" or (flag == "auto" and model.num_parameters() > 1e9)


def shard_model(policy, args, dtype, distributed):
    """Shard a policy over all ranks with FSDP2, and make its optimizer.

    Master weights are fp32, compute is `dtype`, gradients are reduced in fp32. The optimizer is AdamW without
    weight decay. Its beta2 is 0.95: with 0.999 the first, large gradients dominate the second moment
    during all of a short run, and its steps stay small.

    Args:
        policy: In fp32 on the host. Only rank 0 needs weights; every rank moves its shard to its device.

    Returns:
        (model, optimizer). `token_logprobs` is a method of the model."""
    model = policy.model
    tie_head(model, distributed.broadcast(model.config.tie_word_embeddings))  # as rank 0 has found it
    if use_gradient_checkpointing(model, args.gradient_checkpointing):
        # Older versions of transformers know only the second name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    full_weights = {name: p.detach() for name, p in model.named_parameters()}
    mesh = torch.distributed.init_device_mesh(distributed.device.type, (distributed.size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in [*model.model.layers, model]:  # a layer's weights are gathered when it runs
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    for name, p in model.named_parameters():
        full = full_weights.pop(name).to(distributed.device)  # only rank 0's values are used
        shard = distribute_tensor(full, mesh, p.placements).to_local()
        p.detach().to_local().copy_(shard)
    model.token_logprobs = types.MethodType(token_logprobs, model)
    # The method calls inner modules. Registering it makes FSDP gather the root's weights, as for a forward.
    register_fsdp_forward_method(model, "token_logprobs")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    return model, optimizer


@torch.no_grad()
def load_full_weights(target, model, shards=None):
    """Fill the full copy `target`, one parameter at a time, from the sharded `model`.

    Args:
        shards: Return value of `offload_shards`. If given, these weights are loaded instead."""
    tie_head(target, model.config.tie_word_embeddings)
    torch.cuda.empty_cache()  # the cached blocks of an update have other sizes than full parameters
    for p, (name, shard) in zip(target.parameters(), model.named_parameters(), strict=True):
        if shards:
            shard = torch.empty_like(shard, dtype=p.dtype)
            shard.to_local().copy_(shards[name])
        full = shard.full_tensor()
        if p.shape != full.shape:  # freed by `free_weights`
            p.data = torch.empty(full.shape, dtype=p.dtype, device=p.device)
        p.copy_(full)  # in the target's dtype


def offload_shards(model, dtype):
    """Copy this rank's shards to host memory.

    With a GPU the memory is pinned, so that the GPU fetches it quickly. It stays pinned as long as the
    process lives. One flat buffer is pinned by hand, since torch rounds the size of each pinned block up to a
    power of two.

    Returns:
        The shards by parameter name, as views of the buffer."""
    shards = {name: p.detach().to_local() for name, p in model.named_parameters()}
    size = sum(shard.numel() for shard in shards.values())
    flat = torch.empty(size, dtype=dtype)  # [weights of a rank]
    if any(shard.is_cuda for shard in shards.values()):
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
    views = {}
    start = 0
    for name, shard in shards.items():
        end = start + shard.numel()
        views[name] = flat[start:end].view(shard.shape).copy_(shard)
        start = end
    return views


def free_weights(model):
    """Free the memory of a full copy until the next `load_full_weights`, and CUDA's cached blocks of the
    rollouts, whose sizes an update cannot use."""
    for p in model.parameters():
        p.data = p.data.new_empty(0)
    torch.cuda.empty_cache()  # does nothing without a GPU


# ---- The update --------------------------------------------------------------------------------------------
WARMUP = 0.05  # share of the steps in which the learning rate rises
MAX_GRAD_NORM = 1.0  # larger gradients are scaled down to this norm


def pad_packs(packs: list[Pack], distributed) -> list[Pack]:
    """Pad with dummy packs so that every rank makes the same number of forwards, at least one.

    Sharded forwards are collective: with unequal numbers the ranks would wait for each other forever."""
    count = int(distributed.all_reduce(max(1, len(packs)), dist.ReduceOp.MAX))
    return packs + [dummy_pack(distributed.device)] * (count - len(packs))


def optimizer_step(model, optimizer, packs: list[Pack], loss_of, distributed):
    """Make one optimizer step over this rank's packs.

    Args:
        packs: The same number on every rank, see `pad_packs`.
        loss_of: Function from a pack to a scalar. The loss is the sum of these scalars over the packs of all
            ranks. So the gradient depends neither on how the packs are cut nor on the number of ranks.

    Returns:
        (gradient norm, loss), over all ranks. If one of them is not finite, the step is skipped and the norm
        is NaN."""
    total = 0.0
    for p in packs:
        loss = loss_of(p)
        total += loss.item()
        (loss * distributed.size).backward()  # undoes FSDP's mean over ranks: the loss is a sum
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).full_tensor().item()
    total = distributed.all_reduce(total)
    if math.isfinite(total + norm):  # the same numbers on every rank
        optimizer.step()
    else:
        norm = math.nan
    optimizer.zero_grad()  # also after a skipped step
    if distributed.device.type == "cpu":
        return_free_memory()
    return norm, total


def return_free_memory():
    """Return the free parts of the heap to the system, where the C library can (glibc).

    The heap would grow from update to update, since tensors of other sizes do not fill its gaps: in twelve
    updates of SmolLM2-135M from 5.4 to 17.5 GiB. Returned memory must be mapped again, which cost 1.4 +- 3.3
    s per update of 44 s (23 updates, every other one after a return)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def get_lr(step, peak, total, decay=0):
    """Return the learning rate of a step from 1 to `total`: a linear rise over the share WARMUP of the steps,
    then constant, then a linear fall towards 0 over the last `decay` steps."""
    rising = step / max(1, int(WARMUP * total))
    falling = (total - step + 1) / max(1, decay)
    return peak * min(1.0, rising, falling)


def epoch_shuffle(n, start, count, seed) -> list[int]:
    """Return items start to start + count - 1 of an endless stream of epochs, each a shuffled range(n).

    The function is stateless: a run that resumes needs no stored sampler state.

    >>> epoch_shuffle(3, 0, 4, seed=0) + epoch_shuffle(3, 4, 2, seed=0) == epoch_shuffle(3, 0, 6, seed=0)
    True
    >>> sorted(epoch_shuffle(3, 3, 3, seed=0))
    [0, 1, 2]
    """
    first_epoch = start // n
    last_epoch = (start + count - 1) // n
    order = []
    for epoch in range(first_epoch, last_epoch + 1):
        order += random.Random(f"{seed} {epoch}").sample(range(n), n)
    offset = start - first_epoch * n
    return order[offset:offset + count]


# ---- Checkpoints -------------------------------------------------------------------------------------------
# Errors of a damaged file. NOTE: torch wraps whatever ends the reading of a checkpoint.
DAMAGE = (OSError, ValueError, KeyError, TypeError, dcp.api.CheckpointException)


def complete_checkpoints(folder) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    found = [path.parent for path in folder.glob("step_*/done.json")
             if re.fullmatch(r"step_\d{6,}", path.parent.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name))


@dataclass
class Checkpointer:
    """Save and load checkpoints/step_000010/: fp32 weights and AdamW state; done.json marks it as complete.

    The format is torch's distributed one, so that any number of ranks can read it. A checkpoint is written
    under another name and renamed. It holds no random state, since every draw of a run is a function of
    (seed, step, ...). The newest `save_total_limit` checkpoints are kept."""

    folder: Path
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    save_total_limit: int
    distributed: Distributed

    def complete(self) -> list[Path]:
        return complete_checkpoints(self.folder)

    def save(self, step, state):
        """Write the checkpoint of a step and remove the oldest ones.

        Args:
            state: Further values that a resumed run needs, as JSON.

        Raises:
            BfclError: If it cannot be written. Older checkpoints are untouched."""
        final = self.folder / f"step_{step:06d}"
        partial = final.with_suffix(".partial")
        try:
            dcp.save(self._tensors(), checkpoint_id=partial)
            if self.distributed.is_main:
                atomic_write(partial / "done.json", {"step": step, **state})
                if final.exists():  # a damaged one
                    self._remove(final)
                partial.rename(final)
        except (OSError, dcp.api.CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise BfclError(f"the checkpoint of step {step} cannot be written to {self.folder}: {reason}; "
                            "older ones are untouched, make room and type the same command again")
        if self.distributed.is_main:
            complete = self.complete()
            # A damaged checkpoint of a later step may be there; it is not counted.
            until_now = complete[:complete.index(final) + 1]
            for old in until_now[:-self.save_total_limit]:
                self._remove(old)

    def _remove(self, path):
        # NOTE: Renamed first. Else a kill leaves a partial checkpoint that looks complete.
        removed = path.with_suffix(".removed")
        path.rename(removed)
        shutil.rmtree(removed)

    def load(self):
        """Clear what a kill has left; load the newest readable checkpoint into the model and the optimizer.

        Returns:
            {"step": 10, **state}, or {"step": 0} without a checkpoint.

        Raises:
            BfclError: If there are checkpoints, but all are damaged; see also `_clear`."""
        self.distributed.on_main(self._clear)
        complete = self.complete() if self.distributed.is_main else None
        complete = self.distributed.broadcast(complete)
        for path in reversed(complete):
            try:
                state = json.loads((path / "done.json").read_text())
                dcp.load(self._tensors(), checkpoint_id=path)
                return {**state, "step": int(state["step"])}
            except DAMAGE as error:
                reason = str(error).strip().splitlines()[-1:]
                warn(f"{path} cannot be read {reason}: delete that folder")
        if complete:
            raise BfclError(f"no checkpoint in {self.folder} can be read: delete that folder, and the same "
                            "command begins again")
        return {"step": 0}

    def _clear(self):
        """Remove what a killed process was saving or removing. Other names are the user's.

        Raises:
            BfclError: If another program's folder has the name of a checkpoint."""
        complete = self.complete()
        for path in filter(Path.is_dir, self.folder.glob("step_*")):
            if re.fullmatch(r"step_\d{6,}\.(partial|removed)", path.name):
                shutil.rmtree(path)
            elif re.fullmatch(r"step_\d{6,}", path.name) and path not in complete:
                raise BfclError(f"{path} has no done.json, so it is no checkpoint of this run: move it away")

    def _tensors(self):
        """Return this rank's shards of weights and AdamW state by name. DCP assembles those of all ranks.

        A state that does not exist yet is made of zeros."""
        tensors = {}
        for name, p in self.model.named_parameters():
            tensors[name] = p.detach()
            moments = self.optimizer.state[p]
            if not moments:  # no step was made yet
                moments["step"] = torch.zeros((), device=p.device)
                moments["exp_avg"] = torch.zeros_like(p)
                moments["exp_avg_sq"] = torch.zeros_like(p)
            for key, value in moments.items():
                tensors[f"{name}:{key}"] = value
        return tensors


# ---- The training loop -------------------------------------------------------------------------------------
class TrainLoop:
    """Count the steps of a training run; resume, log and save it.

    Ctrl-C, SIGTERM and a closed terminal stop it after the running step, with a checkpoint. Call `resume`
    before `steps`."""

    def __init__(self, out, args, model, optimizer, total, distributed):
        self.out = out
        self.args = args
        self.model = model
        self.total = total  # steps of the run, those of earlier processes included
        self.distributed = distributed
        self.checkpoints = Checkpointer(out / "checkpoints", model, optimizer, args.save_total_limit,
                                        distributed)
        self.state = {}  # saved with each checkpoint: "stage_info", and stage 2's "cursor"
        self.done = 0  # steps made by earlier processes
        self.logger = None  # on rank 0 only
        self.skipped = 0  # consecutive skipped updates
        self.stop_requested = False

    def resume(self):
        """Load the newest checkpoint, drop the log lines after it, and handle Ctrl-C and SIGTERM.

        NOTE: This overwrites the model's weights. Copies of the initial weights, such as the KL reference of
        stage 2, must be made before.

        Raises:
            SystemExit: If the run is finished."""
        if self.distributed.broadcast(self.distributed.is_main and is_finished(self.out)):
            self.distributed.print0(f"the run in {self.out} is finished: its model is {self.out}/model; "
                                    "to train on, give it as --model, with a new --out")
            sys.exit()
        note_changes(self.out, self.args, self.distributed)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(signum, self._request_stop)
        # NOTE: after the signals, since torch reports an interrupted load as a damaged checkpoint.
        self.state = self.checkpoints.load()
        self.done = self.state.pop("step")
        if self.distributed.is_main:
            self.logger = MetricsLogger(self.out, start_tracker(self.out, self.args))
            self.logger.keep_first(self.done)

    def _request_stop(self, *_):
        self.stop_requested = True
        if self.distributed.is_main:
            message = b"stopping after this step, with a checkpoint"
            if "RANK" in os.environ:
                message += b", unless torchrun kills the run before, after its --shutdown_timeout (30 s)"
            with contextlib.suppress(OSError):  # NOTE: not `print`, which may be running when a signal comes
                os.write(2, message + b"\n")

    def steps(self):
        """Yield the remaining steps; the caller runs each, and a checkpoint follows when one is due.

        Raises:
            BfclError: If a stop was requested, or if a checkpoint cannot be written."""
        bar = tqdm(total=self.total, initial=self.done, desc=Path(sys.argv[0]).stem,
                   disable=not self.distributed.is_main)
        every = self.args.save_every
        for step in range(self.done + 1, self.total + 1):
            yield step
            bar.update()
            stop = self.distributed.all_reduce(self.stop_requested, dist.ReduceOp.MAX) > 0  # on any rank
            due = every and (step % every == 0 or step == self.total)
            if stop or due:
                self.checkpoints.save(step, self.state)
                if self.distributed.is_main:
                    plot_curves(self.out)
            if stop:
                raise BfclError(f"stopped after step {step}, as asked: the same command continues from there")
        bar.close()

    def log(self, step, metrics):
        """Log the metrics of a step.

        Raises:
            BfclError: After three consecutive updates that were not finite and therefore skipped."""
        if math.isfinite(metrics["grad_norm"]):
            self.skipped = 0
        else:
            self.skipped += 1
        metrics |= {"skipped_updates": self.skipped,
                    "perf/max_memory_allocated_gb": peak_memory_gb(self.distributed.device)}
        if self.distributed.is_main:
            self.logger.log(step, self.total, metrics)
        if self.skipped == 3:
            raise BfclError(f"the gradients of steps {step - 2} to {step} were not finite; those updates "
                            "were skipped: lower --lr, or look at what those steps logged")

    def end(self, policy):
        """Write model/ and the curves; leave the process group.

        Args:
            policy: The policy whose model was sharded."""
        weights = {}
        for name, p in self.model.named_parameters():
            full = p.full_tensor().detach()  # collective: all ranks must call it
            if self.distributed.is_main:
                weights[name] = full.cpu()
        if self.distributed.is_main:
            plot_curves(self.out)
            # NOTE: before model/, since `is_finished` needs both: a kill in between leaves an unfinished run.
            update_config(self.out, finished=True)
            write_model(self.out, "model", policy, weights, self.total, self.state["stage_info"])
        dist.destroy_process_group()


def write_model(out, name, policy, weights, step, stage_info):
    """Write the weights of a step as a plain Hugging Face directory (fp32), and print the next command.

    Args:
        name: Of the new folder in the run directory `out`.
        policy: Gives the architecture, and the tokenizer with the reward tokens.
        weights: {parameter name: full tensor}
        stage_info: The values of the StageInfo that the next stage reads."""
    final = out / name
    partial = out / f"{name}.partial"
    lines = read_metrics(out)
    minutes = sum(line.get("step_time", 0) for line in lines if line["step"] <= step) / 60
    shutil.rmtree(partial, ignore_errors=True)
    # `generate` of other programs stops where the messages of this policy end.
    policy.model.generation_config.eos_token_id = sorted(policy.chat.stop_ids)
    policy.tokenizer.save_pretrained(partial)
    try:
        policy.model.save_pretrained(partial, state_dict=weights)
    except SafetensorError as error:  # a full disk
        raise BfclError(f"{final} cannot be written ({error}): make room and type the same command "
                        "again") from None
    atomic_write(partial / STAGE_INFO, {**stage_info, "minutes": minutes})
    partial.rename(final)
    next_command = "torchrun rl_rcgrpo.py --model"
    if stage_info["stage"] == "rcgrpo":
        next_command = "python eval_bfcl.py --ckpt"
    print(f"wrote {final} after {minutes:.1f} minutes; next: {next_command} {shlex.quote(str(final))}")


def export_checkpoint(path):
    """Write a checkpoint as a plain Hugging Face directory, RUN/model_step_000010. One process does it.

    Args:
        path: A run directory, whose newest checkpoint is taken, or one of its checkpoints/step_000010.

    Raises:
        BfclError: If there is no checkpoint, it is damaged, or was exported before."""
    if int(os.environ.get("RANK", 0)):
        return
    path = Path(path).resolve()
    if not (path / "done.json").is_file():
        complete = complete_checkpoints(path / "checkpoints")
        if not complete:
            raise BfclError(f"{path} holds no checkpoint: give --export a run's folder, or one of its "
                            "checkpoints/step_000010")
        path = complete[-1]
    out = path.parent.parent
    name = f"model_{path.name}"
    if (out / name).exists():
        raise BfclError(f"{out / name} exists already: delete it to export that step again")
    try:
        args = json.loads((out / "config.json").read_text())["args"]
        policy = load_policy(args["model"], torch.float32, "cpu", weights=False, thinking=args["thinking"])
        state = json.loads((path / "done.json").read_text())
        stage_info = state["stage_info"]
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata  # by parameter name
        tie_head(policy.model, "lm_head.weight" not in saved)
        weights = {name: p.detach() for name, p in policy.model.named_parameters()}
        with warnings.catch_warnings(action="ignore"):  # that there is only one process
            dcp.load(weights, checkpoint_id=path)
        step = int(state["step"])
    except DAMAGE:
        raise BfclError(f"{path} is damaged, of another version, or not in its run's folder: give a run's "
                        "folder, or another checkpoint") from None
    write_model(out, name, policy, weights, step, stage_info)


def peak_memory_gb(device):
    """Return the peak memory in GiB: of the device on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---- Rollouts on disk, validation --------------------------------------------------------------------------
def rollout_to_disk(out, stem, policy, jobs, make_env, reward_token, key_of, title, distributed, **limits):
    """Sample jobs, divided among the ranks, and append each rollout to a file as soon as it has ended.

    A job whose rollout is on disk is skipped, so that a killed command loses only the unfinished ones.

    Args:
        out, stem: Rank r appends to OUT/STEM.rank{r}.jsonl.
        jobs: (task, sample) each, where `sample` tells the rollouts of a task apart.
        reward_token: "high", "low" or None.
        key_of: Function from a job's task and sample to the key of its random numbers.
        title: Of the progress bar.
        limits: Arguments of `rollout`.

    Returns:
        The rollouts of all ranks, {(task id, sample): trajectory}, sorted."""
    old = finished_rollouts(out, stem)
    todo = [(task, sample) for task, sample in jobs if (task.id, sample) not in old]
    mine = todo[distributed.rank::distributed.size]  # this rank's share
    distributed.gather([])  # every rank has read the same files before any rank writes
    with (out / f"{stem}.rank{distributed.rank}.jsonl").open("a") as file:
        if file.tell():
            print(file=file)  # end the truncated last line of an interrupted run

        def on_end(i, t):
            t.sample = mine[i][1]
            print(t.to_json(), file=file, flush=True)

        rollout(
            policy,
            [make_env(task) for task, _ in mine],
            [reward_token] * len(mine),
            [key_of(*job) for job in mine],
            on_end=on_end,
            progress=title if distributed.is_main else None,
            **limits)
    distributed.gather([])  # every rank has written its own file
    return finished_rollouts(out, stem)


def rollout_files(out, stem) -> list[Path]:
    return [path for path in out.glob(f"{stem}.rank*.jsonl")
            if re.fullmatch(rf"{stem}\.rank\d+\.jsonl", path.name)]  # others are the user's


def finished_rollouts(out, stem):
    """Read the rollouts that all ranks have written.

    Returns:
        {(task id, sample): trajectory}, sorted.

    Raises:
        BfclError: For a line that is not a rollout, unless it is truncated."""
    found = {}  # a later line replaces an earlier one
    for path in rollout_files(out, stem):
        for n, line in enumerate(path.read_text().splitlines(), 1):
            try:
                t = Trajectory.from_json(line)
            except BfclError as error:
                raise BfclError(f"{path}, line {n}, is {error}; or delete that line") from None
            except ValueError:  # truncated by an interrupted run
                continue
            found[t.task, t.sample] = t
    return dict(sorted(found.items()))


def validation_tasks(args, trained: set[str] = frozenset()):
    """Return --eval_limit tasks of the split's validation part, or none with --eval_every 0.

    Raises:
        BfclError: If the split has no such part, or if the id of one of the tasks is in `trained`."""
    if not args.eval_every:
        return []
    if args.split_by == "paper":
        raise BfclError("the paper's split has no validation part: add --eval_every 0")
    flags = {**vars(args), "split": "val", "tasks": "", "max_tasks": args.eval_limit}
    tasks = bfcl_env.select_tasks(argparse.Namespace(**flags))
    if trained & {task.id for task in tasks}:
        raise BfclError("validation tasks are among those trained on (--model, --split or --tasks): add "
                        "--eval_every 0")
    return tasks


def check_kv_cache(policy, tasks, make_env, args):
    """Check that --kv_gb holds a conversation about any of these tasks: else a later step ends the run.

    Raises:
        BfclError: If it does not."""
    limits = sampling(args)
    del limits["reward"]
    envs = [make_env(task) for task in tasks]
    envs.sort(key=lambda env: len(policy.chat.render_prompt(env.messages(), "high")))
    ends = envs[:1] + envs[-1:]  # the shortest prompt needs the longest slot
    Sampler(policy, **limits).add_requests(ends, ["high"] * len(ends), [(0,)] * len(ends))


def validate(policy, tasks, reward_tokens, make_env, args, distributed):
    """Return the mean reward and progress per reward token, over one rollout per task and reward token.

    Progress rises before the first success; the paper's protocol, which judges no turns, has none. The
    rollouts are divided among the ranks. `policy` is a full copy."""
    jobs = list(product(tasks, reward_tokens))[distributed.rank::distributed.size]  # those of this rank
    sampled = rollout(
        policy,
        [make_env(task) for task, _ in jobs],
        [reward_token for _, reward_token in jobs],
        [(args.seed, 0, task.id, 0, 0) for task, _ in jobs],
        progress="validation" if distributed.is_main else None,
        **sampling(args))
    trajectories = distributed.gather(sampled)
    metrics = mean_reward(trajectories, lambda t: f"eval/reward_{t.reward_token or 'none'}")
    if args.protocol == "official":
        for reward_token in reward_tokens:
            progress = [t.verdict["progress"] for t in trajectories if t.reward_token == reward_token]
            metrics[f"eval/progress_{reward_token or 'none'}"] = sum(progress) / len(progress)
    return metrics


# ---- The run directory -------------------------------------------------------------------------------------
# Flags that a resumed run may change: --model and --rollouts are compared by content, the others do not
# affect the training.
IGNORED_ON_RESUME = ("out", "model", "rollouts", "save_every", "save_total_limit", "tracker", "export")
# These may change too: they decide about memory, and change results by rounding only. Each change is noted.
ROUNDING = ("tokens_per_microbatch", "gradient_checkpointing", "kv_gb", "cuda_graphs")
# The metrics on the console and in curves.png. Metric names follow TRL and verl; rc/ is this project's own.
CONSOLE_METRICS = (
    "loss", "reward", "rc/reward_high", "rc/reward_low",
    "frac_reward_zero_std", "rc/var_within_tokens", "rc/var_between_tokens",
    "kl", "entropy", "grad_norm",
    "eval/reward_high", "eval/reward_low", "eval/reward_none",
    "eval/progress_high", "eval/progress_low", "eval/progress_none",
    "step_time")


def begin_run(args, distributed, folders=("checkpoints",)):
    """Open the run directory --out, for a new run or to resume the same one.

    Args:
        folders: Those that the run writes into."""
    if args.tracker != "none" and not importlib.util.find_spec(args.tracker):
        raise BfclError(f"--tracker {args.tracker}: pip install {args.tracker}")
    distributed.on_main(refuse_foreign_folders, Path(args.out), folders)
    out = open_run_dir(args, distributed)
    distributed.on_main(refuse_foreign_model, out)
    settings = {name: value for name, value in vars(args).items()
                if name not in IGNORED_ON_RESUME + ROUNDING}
    check_and_record_settings(out, distributed, settings)
    return out


def training_flags(stage, args, before):
    """Return the flags in which the seeds of one arm agree, by stage; of a stage that was trained twice the
    last ones.

    Args:
        stage: 1 or 2.
        before: The StageInfo of the model that the training starts from."""
    # The call format and thinking are in the StageInfo as they were resolved.
    others = IGNORED_ON_RESUME + ROUNDING + (
        "seed", "dtype", "call_format", "thinking", "eval_every", "eval_limit")
    if stage == 1 and args.failures == "written":  # then only the validation samples
        others += ("temperature", "max_new_tokens", "max_sampled_tokens", "failure_tries")
    flags = {f"stage {stage} --{name}": value for name, value in vars(args).items() if name not in others}
    return {**before.flags, **flags, "trainings": before.flags.get("trainings", 0) + 1}


def is_finished(out):
    return (out / "model").exists() and read_config(out).get("finished", False)


def refuse_foreign_folders(out, folders):
    is_ours = (out / "config.json").exists() or work_has_begun(out)
    for name in folders:
        if (out / name).exists() and not is_ours:
            raise BfclError(f"{out / name} is not of this run, which would write there: give another --out")


def refuse_foreign_model(out):
    if (out / "model").exists() and not is_finished(out):
        raise BfclError(f"{out / 'model'} is not of this run, which would write there: give another --out")


def open_run_dir(args, distributed):
    """Lock the run directory --out and write its config.json, unless work in it has begun.

    Raises:
        BfclError: On every rank, if another process, program or version of this code uses the directory."""
    out = Path(args.out)
    distributed.on_main(lock_run_dir, out, distributed)
    distributed.on_main(open_config, out, args, distributed)
    return out


def lock_run_dir(out, distributed):
    """Make the run directory and lock it as long as this process lives.

    The lock keeps out a command typed twice, and the workers that a killed torchrun leaves running.

    Raises:
        BfclError: If another process has the lock."""
    out.mkdir(parents=True, exist_ok=True)
    # The lock is held while this file is open. However the process ends, the kernel closes the file.
    distributed.lock = open(out / ".lock", "w")
    try:
        fcntl.flock(distributed.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BfclError(f"another process is at work in {out}: wait for it, stop it, or give another "
                        "--out") from None
    except OSError as error:  # some cluster file systems have no locks
        warn(f"{out} cannot be locked ({error.strerror}): a second process in it goes unnoticed")


def open_config(out, args, distributed):
    """Write config.json for a new run; check that an old one is of this script and version.

    Raises:
        BfclError: If it is not."""
    begun = work_has_begun(out)
    if begun or (out / "config.json").exists():
        known_flags = read_config(out)["args"].keys()
        if begun and known_flags != vars(args).keys():
            raise BfclError(f"{out} holds a run of another script, or of another version: give a new --out")
    if not begun:
        write_config(out, args, distributed)


def work_has_begun(out):
    """Return whether there is a checkpoint, a logged step, a sampled failure, or a rollout of an
    evaluation."""
    logs = [*out.glob("metrics.jsonl"), *out.glob(FAILURES), *out.glob("*.rank*.jsonl")]
    return bool(complete_checkpoints(out / "checkpoints")) or any(path.stat().st_size for path in logs)


def read_config(out):
    """Return the content of config.json.

    Raises:
        BfclError: If it is missing, damaged or of another program."""
    try:
        config = json.loads((out / "config.json").read_text())
        return {**config, "args": {**config["args"]}, "same": {**config.get("same", {})}}
    except DAMAGE:
        raise BfclError(f"{out / 'config.json'} is missing, damaged or of another program: give another "
                        f"--out, or delete {out} if it holds nothing but a run of this program") from None


def update_config(out, **values):
    atomic_write(out / "config.json", {**read_config(out), **values})


def write_config(out, args, distributed):
    """Write config.json: arguments, commit, versions and devices."""
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        commit = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], text=True,
                                capture_output=True).stdout.strip()
    atomic_write(out / "config.json", {
        "args": vars(args),
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "bfcl-eval")},
        "device": f"{distributed.size} x {distributed.device}"})


def check_and_record_settings(out, distributed, settings):
    """Refuse the settings of another run; record those that are new in config.json."""
    settings = json.loads(json.dumps(settings))  # as they are read back
    check_same_run(out, distributed, settings)
    if distributed.is_main:
        record_settings(out, settings)


def check_same_run(out, distributed, settings):
    """Check that each setting equals the recorded one in config.json, or rank 0's if none is recorded.

    Raises:
        BfclError: On every rank, with the differences."""
    recorded = read_config(out)["same"] if distributed.is_main else None
    settings_of_main, recorded = distributed.broadcast((settings, recorded))
    expected = {**settings_of_main, **recorded}
    differences = [f"{name}: {expected[name]!r} there, {value!r} here"
                   for name, value in settings.items() if value != expected[name]]
    complaint = None
    if differences:
        complaint = (f"{out} holds another run ({'; '.join(differences)}): give a new folder with --out, or "
                     "the original flags to resume that run")
    distributed.raise_together(complaint)


def record_settings(out, settings):
    """Add settings to config.json; those already recorded stay."""
    update_config(out, same={**settings, **read_config(out)["same"]})


def note_changes(out, args, distributed):
    """Print, and note in config.json, which flags of ROUNDING this resumed run changes."""
    if not distributed.is_main:
        return
    config = read_config(out)
    known_args = config["args"]
    changes = config.get("changes", [])
    for name in ROUNDING:
        before = known_args.get(name)
        now = vars(args).get(name)
        if now != before:
            known_args[name] = now
            changes.append(f"{time.strftime('%Y-%m-%d %H:%M')}: --{name} {now}, before {before}")
            distributed.print0(f"changed: --{name} {now}, before {before}: results differ by rounding only")
    update_config(out, args=known_args, changes=changes)


def atomic_write(path, content):
    """Write a temporary file and rename it: a reader never sees half a file. Content other than text is
    written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # a killed process may leave it
    partial.write_text(content if isinstance(content, str) else json.dumps(content, indent=1, default=str))
    partial.replace(path)


class MetricsLogger:
    """Log each step as one line of metrics.jsonl, one line on the console and, on request, in Weights &
    Biases."""

    def __init__(self, out, track):
        self.path = out / "metrics.jsonl"
        self.track = track  # function of (step, metrics)

    def keep_first(self, done):
        """Keep the lines of the first `done` steps: a resumed run makes the later steps again."""
        lines = [line for line in read_metrics(self.path.parent) if line["step"] <= done]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def log(self, step, total, metrics):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        shown = [name for name in CONSOLE_METRICS if name in metrics]
        values = [f"{name.removeprefix('rc/')} {metrics[name]:.4g}" for name in shown]
        tqdm.write(f"step {step}/{total} | {' | '.join(values)}")
        self.track(step, metrics)


def start_tracker(out, args):
    """Return a function of (step, metrics) that logs to --tracker."""
    if args.tracker == "wandb":
        import wandb
        name = str(out).replace("/", "-")
        wandb.init(project="rc-grpo", id=name, dir=out, config=vars(args), resume="allow")
        return lambda step, metrics: wandb.log(metrics, step=step)
    return lambda step, metrics: None


def read_metrics(out):
    """Return the lines of metrics.jsonl, one per step, without what is damaged."""
    path = out / "metrics.jsonl"
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, AttributeError):
            line = json.loads(text)
            numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
            if "step" in numbers:
                found.append(numbers)
    return found


def plot_curves(out):
    """Draw curves.png from metrics.jsonl, one panel per metric of CONSOLE_METRICS that was logged."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = read_metrics(out)
    steps = [line["step"] for line in lines]
    names = [name for name in CONSOLE_METRICS if any(name in line for line in lines)]
    rows = max(1, len(names))  # 0: a user has emptied the log
    figure, axes = plt.subplots(rows, 1, sharex=True, squeeze=False, layout="constrained",
                                figsize=(6, 1.5 * rows))
    for axis, name in zip(axes[:, 0], names):
        axis.plot(steps, [line.get(name) for line in lines], ".-")
        axis.set_title(name)
    figure.savefig(out / "curves.png")
    plt.close(figure)


# ---- Flags -------------------------------------------------------------------------------------------------
MICROBATCH = {"cpu": 8192, "cuda": 16384}  # default of --tokens_per_microbatch


def add_training_flags(parser: argparse.ArgumentParser, out, lr):
    """Add the flags of both training stages.

    Args:
        out, lr: The script's defaults of --out and --lr."""
    add = parser.add_argument_group("training").add_argument
    add("--out", default=out, type=nonempty,
        help="run directory; a run that it already holds is resumed (default: %(default)s)")
    add("--export", metavar="RUN",
        help="write the newest checkpoint of a run, or RUN/checkpoints/step_000010, as a Hugging Face "
        "directory RUN/model_step_000010, and exit")
    add("--lr", default=lr, type=number(float, 0, 1),
        help="peak learning rate (default: %(default)s, as in the paper, tables 10 to 12)")
    add("--tokens_per_microbatch", type=number(int, 64),
        default=MICROBATCH["cuda" if torch.cuda.is_available() else "cpu"],
        help="maximum number of tokens per forward; a longer trajectory gets a forward of its own (default: "
        "8192; on CUDA 16384)")
    add("--gradient_checkpointing", default="auto", choices=("auto", "on", "off"),
        help="on: recompute the layers in the backward pass instead of keeping their activations; off: keep "
        "them; auto: on above a billion parameters (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
        help="compute dtype; auto: bf16 where the hardware has it, else fp32 (default: %(default)s)")
    add("--seed", default=0, type=number(int, 0, 2**63 - 1),
        help="random seed of data, order and sampling (default: %(default)s)")
    add("--save_every", default=50, type=number(int, 0),
        help="steps between checkpoints; one more follows the last step; 0: none (default: %(default)s)")
    add("--save_total_limit", default=1, type=number(int, 1),
        help="number of checkpoints to keep, the newest (default: %(default)s)")
    add("--eval_every", default=50, type=number(int, 0),
        help="steps between validations; one more follows the last step; 0: none (default: %(default)s)")
    add("--eval_limit", default=16, type=number(int, 1),
        help="number of validation tasks (default: %(default)s)")
    add("--tracker", default="none", choices=("none", "wandb"),
        help="also log to Weights & Biases, if installed (default: %(default)s)")


def parse_args(argv: list[str] | None = None):
    parser = bfcl_env.Parser("Stage 1: reward-conditioned fine-tuning (RCTP-FT).")
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL,
        help="model to start from: a directory, a hub id or %(default)s (the default)")
    add("--epochs", default=5, type=number(int, 1),
        help="passes over the pairs (default: %(default)s, as in the paper, tables 10 to 12)")
    add("--steps", type=number(int, 1), help="number of updates, instead of --epochs")
    add("--batch_size", default=16, type=number(int, 1),
        help="trajectories per update, in pairs of a success and a failure; the sft arm takes only the "
        "successes of as many pairs (default: %(default)s, as in the paper, tables 10 to 12)")
    add("--arm", default="rctp", choices=ARM_REWARD_TOKENS,
        help="rctp: successes and failures, with reward tokens; mixed: the same without reward tokens; sft: "
        "successes alone, without reward tokens, in as many updates as the others; the paper's SFT makes 90 "
        "updates, its RCTP-FT 450 (here: --batch_size 32 --epochs 2, since a pair has one success; default: "
        "%(default)s)")
    add("--reward_token_dropout", type=number(float, 0, 1), default=0.1,
        help="probability that a trajectory of the rctp arm gets no reward token (default: %(default)s)")
    add("--failures", default="written", choices=("written", "sampled"),
        help="written: gold calls with mistakes; sampled, as in the paper: one failed rollout of --model "
        "itself per task, made before the first update (OUT/failures.jsonl; default: %(default)s)")
    add("--failure_tries", default=4, type=number(int, 1),
        help="rollouts of --failures sampled per task; the first that fails is taken (default: %(default)s)")
    add("--rollouts", nargs="+", default=[], metavar="FILE",
        help="learn from a model's rollouts (runs/NAME/rollouts/*.jsonl), not from gold and corrupted calls; "
        "with --failures sampled only the failures come from there (another run's failures.jsonl)")
    add_training_flags(parser, "runs/sft_rctp", lr=1e-5)
    add_sampling_flags(parser)  # for the validation and --failures sampled
    bfcl_env.add_env_flags(parser)
    args = parser.parse_args(argv)
    if args.export is not None:
        return args
    # Refuse wrong files, a wrong model or wrong tasks here, before anything is loaded.
    for file in args.rollouts:
        if not Path(file).is_file():
            raise BfclError(f"--rollouts {file}: there is no such file")
    check_model(args.model)
    trained = {task.id for task in bfcl_env.select_tasks(args)} | {*read_stage_info(args.model).tasks}
    validation_tasks(args, trained)
    return args


if __name__ == "__main__":
    run_main(main)
