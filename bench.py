"""Measure the claims of the README, one sub-command each. The last line printed is one JSON object.

    python bench.py env        # milliseconds per verdict, compared with the official checker
    python bench.py sampler    # seconds for the same rollouts, compared with `generate` of transformers
    python bench.py train      # seconds and memory of a training step, compared with plain Hugging Face code
    python bench.py step       # one step of stage 2, by phase
    python bench.py demo       # minutes that `make demo` will take on this machine
    python bench.py plan --model DIR --ranks 8 --tool_docs full    # memory and FLOPs of a run of stage 1
    python bench.py plan --stage 2 --model DIR --ranks 8    # of stage 2; other flags as for the stage
"""
import argparse
import contextlib
import copy
import ctypes
import gc
import io
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from unittest import mock

import bfcl_env

if __name__ == "__main__":
    bfcl_env.start_process()

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import rl_rcgrpo as rl
import rollout as sampler
import sft_rctp as sft

GIB = 2**30


# ---- env ---------------------------------------------------------------------------------------------------
def mutated(task, seed: int) -> list[list[list[str]]]:
    """Drop, repeat, swap or move to another turn one or two of the gold calls.

    Returns:
        [turn][step][call string], as for `judge`, with one call per step.
    """
    rng = random.Random(f"{task.id} {seed}")
    turns = [list(calls) for calls in task.gold]
    for _ in range(rng.randint(1, 2)):
        calls = rng.choice([calls for calls in turns if calls])
        call = calls.pop(rng.randrange(len(calls)))
        other = rng.choice(turns)
        other[:0] = rng.choice([[], [call], [call, call]])
        if not any(turns):
            turns[0].append(call)
    return [[[call] for call in calls] for calls in turns]


def official_check(task, turns) -> tuple[dict, float]:
    """Run the official checker on fresh instances.

    Args:
        turns: as for `judge`, as many as the gold turns.

    Returns:
        The checker's result and its seconds.
    """
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker as checker
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils as executor

    for name in [name for name in vars(executor) if name.endswith("_instance")]:
        delattr(executor, name)
    entry = {"id": task.id, "initial_config": task.config, "involved_classes": task.classes}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        result = checker.multi_turn_checker(turns, task.gold, entry, task.category, "model")
        return result, time.perf_counter() - start


def live_judging_seconds(task, turns):
    """Return the seconds that judging adds to a live rollout: the ends of its turns and the verdict."""
    episode = bfcl_env.Episode(task)
    seconds = 0.0
    for turn in turns:
        for step in turn:
            episode.execute(step)
        start = time.perf_counter()
        episode.end_turn()
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    episode.verdict()
    return seconds + time.perf_counter() - start


def bench_env() -> dict:
    """Time a verdict, ours and the official checker's, alternately in one process: 800 tasks x 8.

    The official checker starts from fresh instances each time, as in every evaluation; our gold sides are
    executed beforehand. `live_ms_per_verdict` is the time that judging adds to a live rollout.

    Returns:
        Mean milliseconds per verdict, and in how many verdicts both agree.
    """
    tasks = bfcl_env.load_tasks()
    for task in tasks:
        task.gold_replay  # a cached property: executed here, so that it is not timed below
    ours = []
    official = []
    live = []
    agree = 0
    for seed in range(8):
        for task in tasks:
            turns = mutated(task, seed)
            start = time.perf_counter()
            verdict = bfcl_env.judge(task, turns)
            ours.append(time.perf_counter() - start)
            result, seconds = official_check(task, turns)
            official.append(seconds)
            agree += (verdict.valid, verdict.error_type) == (result["valid"], result.get("error_type"))
            live.append(live_judging_seconds(task, turns))
    our_ms = 1000 * statistics.mean(ours)
    official_ms = 1000 * statistics.mean(official)
    live_ms = 1000 * statistics.mean(live)
    return {
        "ms_per_verdict": round(our_ms, 4),
        "official_ms_per_verdict": round(official_ms, 4),
        "live_ms_per_verdict": round(live_ms, 4),
        "verdicts": len(ours),
        "agree": agree,
        "speedup": round(official_ms / our_ms, 2),
    }


# ---- sampler -----------------------------------------------------------------------------------------------
MESSAGES = 6  # messages per rollout, also of `step`
TOKENS = 64  # tokens per message
RESULT = '{"result": "48 of the items were found"}'  # 22 tokens, including the header of the next message


class FixedEnv:
    """A real task's prompt, then always the same result, whatever the model writes."""

    def __init__(self, task):
        self.id = task.id
        self.task = task
        self.num_messages = 0

    def messages(self):
        return bfcl_env.BfclEnv(self.task, tool_docs="slim").messages()

    def step(self, text):
        self.num_messages += 1
        done = self.num_messages == MESSAGES
        return bfcl_env.StepResult([RESULT], None, done, "done" if done else None)

    def verdict(self):
        return bfcl_env.judge(self.task, [])


def fixed_length(sample_token, chat):
    """Return `sample_token` with messages of 64 tokens: only the 64th is the stop token."""
    calls = itertools.count(1)
    never_sampled = [chat.stop_id, *chat.forbidden_ids]

    def sample_fixed_length(logits, uniform, greedy=False):
        logits[:, never_sampled] = float("-inf")
        ids, logprobs = sample_token(logits, uniform, greedy)
        if next(calls) % TOKENS == 0:
            ids.fill_(chat.stop_id)
        return ids, logprobs
    return sample_fixed_length


def task_of_length(chat, tokens):
    """Return the base task whose prompt with slim docs is closest in length to this number of tokens."""
    def distance(task):
        prompt = chat.render_prompt(FixedEnv(task).messages(), "high")
        return abs(len(prompt) - tokens)
    return min(bfcl_env.load_tasks(["multi_turn_base"])[::10], key=distance)


def matmul_seconds_per_decode_step(policy, rows, prefix, tail):
    """Time the matrix products of one decode step, and nothing else, in a loop.

    Args:
        prefix: tokens that all rows share.
        tail: tokens of each row after the prefix.
    """
    config = policy.model.config
    device = policy.device
    H = config.num_attention_heads
    K = config.num_key_value_heads
    D = config.hidden_size // H
    L = config.num_hidden_layers

    def new(*shape):
        return torch.randn(*shape, device=device).to(policy.model.dtype)

    head = sampler.lm_head_weight(policy.model)
    hidden = new(rows, config.hidden_size)
    prefix_q = new(K, rows * H // K, D)
    prefix_weights = new(K, rows * H // K, prefix)
    row_q = new(rows, K, H // K, D)
    row_weights = new(rows, K, H // K, tail)
    prefix_kv = new(L, 2, K, prefix, D)
    row_kv = new(L, 2, rows, K, tail, D)
    linears = []  # per layer
    for layer in policy.model.model.layers:
        linears.append([m.weight for m in layer.modules() if isinstance(m, torch.nn.Linear)])
    inputs = {w.shape[1]: new(rows, w.shape[1]) for w in linears[0]}
    times = []
    with torch.inference_mode():
        for _ in range(12):
            start = sft.synced_time(device)
            for layer in range(L):
                for w in linears[layer]:
                    inputs[w.shape[1]] @ w.T
                prefix_q @ prefix_kv[layer, 0].transpose(1, 2)
                prefix_weights @ prefix_kv[layer, 1]
                row_kv[layer, 0] @ row_q.transpose(2, 3)
                row_weights @ row_kv[layer, 1]
            sampler.masked_logits(hidden, head, policy.banned)
            times.append(sft.synced_time(device) - start)
    return statistics.median(times)


def rollout_seconds(policy, task, G):
    """Time G rollouts of one task by the sampler."""
    start = time.perf_counter()
    envs = [FixedEnv(task) for _ in range(G)]
    trajectories = sampler.rollout(
        policy, envs, ["high"] * G, max_new_tokens=TOKENS + 1, max_len=4096)
    for t in trajectories:
        assert sum(t.loss_mask) == MESSAGES * TOKENS
    return time.perf_counter() - start


def generate_seconds(model, prompt, result, G, keep_cache):
    """Time the same G rollouts by `generate`.

    Args:
        prompt, result: ids.
        keep_cache: reuse the KV cache from message to message instead of prefilling the conversation again.
    """
    # Another id replaces the reward token, for which this model has no row.
    known = [min(i, model.config.vocab_size - 1) for i in prompt]
    ids = torch.tensor([known] * G, device=model.device)
    results = torch.tensor([result] * G, device=model.device)
    options = {}
    if keep_cache:
        options["past_key_values"] = DynamicCache(config=model.config)
    start = sft.synced_time(model.device)
    with torch.inference_mode():
        for _ in range(MESSAGES):
            ids = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                pad_token_id=0,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                **options)  # [G, tokens so far]
            ids = torch.cat([ids, results], 1)
    return sft.synced_time(model.device) - start


class PerPrefix(sampler.Decode):
    """The peer of `Decode`: one product per prefix, for all rows that share it. Prefixes are contiguous."""
    groups: list  # ([b] indices of rows, [L, 2, K, P, D] keys and values of their prefix)

    def __post_init__(self):
        T = self.row_kv.shape[4]
        self.padding = torch.arange(T, device=self.pos.device) > self.pos[:, None, None, None]  # [B, 1, 1, T]

    def attend(self, layer, q, k, v, scale):  # q [1, H, B, D]; k, v [1, K, B, D]
        row_keys, row_values = self.row_kv[layer]  # [slots, K, T, D] each
        _, H, B, D = q.shape
        K, T = row_keys.shape[1:3]
        slot = torch.arange(B, device=q.device)
        row_keys[slot, :, self.pos] = k[0].transpose(0, 1)
        row_values[slot, :, self.pos] = v[0].transpose(0, 1)
        q = q[0].transpose(0, 1).reshape(B, K, H // K, D)
        row_scores = sampler.scores(row_keys[:B], q.transpose(2, 3)).transpose(2, 3)  # [B, K, H/K, T]
        row_scores = row_scores.masked_fill(self.padding, float("-inf"))
        row_weights = q.new_empty(row_scores.shape)
        out = torch.empty_like(q)  # [B, K, H/K, D]
        for rows, prefix_kv in self.groups:  # b rows each
            prefix_keys, prefix_values = prefix_kv[layer][:, None]  # [1, K, P, D] each
            P = prefix_keys.shape[2]
            queries = q[rows].transpose(0, 1).reshape(1, K, -1, D)  # [1, K, b*H/K, D]
            tail = row_scores[rows].transpose(0, 1).reshape(1, K, -1, T)
            both = torch.cat([sampler.scores(queries, prefix_keys.transpose(2, 3)), tail], -1)
            weights = both.mul_(scale).softmax(-1).to(q.dtype)
            shared = weights[..., :P] @ prefix_values  # [1, K, b*H/K, D]
            out[rows] = shared.view(K, -1, H // K, D).transpose(0, 1)
            row_weights[rows] = weights[..., P:].view(K, -1, H // K, T).transpose(0, 1)
        out = out + row_weights @ row_values[:B]
        return out.view(B, H, D).transpose(0, 1)[None]


@torch.inference_mode()
def compare_decode_steps(policy, tasks, G, steps=20) -> dict:
    """Time decode steps of G rows per task, alternately with `Decode` and with `PerPrefix`.

    Returns:
        Among others:
            time_ratio: of a step, ours relative to the peer's
            memory_ratio: of the cache, relative to prefixes without padding
    """
    batch = sampler.Sampler(policy, max_new_tokens=4608, max_sampled_tokens=4608, max_len=4608, kv_gb=8.0)
    envs = [FixedEnv(task) for task in tasks for _ in range(G)]
    batch.add_requests(envs, ["high"] * len(envs), [(0, i) for i in range(len(envs))])
    batch.admit()
    batch.prefill()
    PerPrefix.groups = []
    for prefix in batch.cached_prefixes:
        rows = [b for b, row in enumerate(batch.live) if row.prefix is prefix]
        kv = prefix.kv.transpose(2, 3).flatten(3, 4)[:, :, :, :len(prefix.ids)].contiguous()
        PerPrefix.groups.append((torch.tensor(rows, device=policy.device), kv))
    seconds = {sampler.Decode: [], PerPrefix: []}
    for _ in range(steps):
        for layout in seconds:
            with mock.patch.object(sampler, "Decode", layout):
                start = time.perf_counter()
                outputs = batch.decode()  # ends with a copy to the host
                seconds[layout].append((time.perf_counter() - start) / len(outputs))
        for row in batch.live:
            for _ in outputs:
                row.append_sampled(row.pending[0], 0.0)
    ours = statistics.median(seconds[sampler.Decode][2:])
    peer = statistics.median(seconds[PerPrefix][2:])
    lengths = [len(prefix.ids) for prefix in batch.cached_prefixes]
    row_bytes = batch.row_kv.nbytes
    unpadded_bytes = row_bytes + sum(kv.nbytes for _, kv in PerPrefix.groups)
    return {
        "rows": len(batch.live),
        "prefix_tokens": [min(lengths), max(lengths)],
        "ms": 1000 * ours,
        "time_ratio": ours / peer,
        "memory_ratio": (row_bytes + batch.prefix_kv.nbytes) / unpadded_bytes,
    }


def bench_sampler(G: int = 8) -> dict:
    """Compare the sampler with batched `generate`: the same weights, dtype, prompt and numbers of tokens.

    One task with slim docs, G rollouts, six messages of 64 tokens, a tool result after each except the last.

    Returns:
        Among others:
            generate_seconds: `generate` that prefills the conversation again for each message, as trainers
                built on it do
            generate_kept_seconds: `generate` that reuses its dynamic cache from message to message
            decode_overhead: the time of a decode step relative to its matrix products alone
            prefixes: results of `compare_decode_steps` with 1, 4 and 13 prefixes
    """
    policy = sampler.load_policy(sampler.DEFAULT_MODEL)
    chat = policy.chat
    task = task_of_length(chat, 2400)
    prompt = chat.render_prompt(FixedEnv(task).messages(), "high")
    result = chat.render_env_reply([{"role": "tool", "content": RESULT}])

    kv_bytes = []  # one entry per call of `Sampler.decode`
    step_seconds = []  # one entry per call, the mean of its decode steps
    sample_token = sampler.sample_token
    decode = sampler.Sampler.decode

    def timed_decode(batch):
        kv_bytes.append(batch.row_kv.nbytes + batch.prefix_kv.nbytes)
        start = time.perf_counter()
        steps = decode(batch)  # ends with a copy to the host
        step_seconds.append((time.perf_counter() - start) / len(steps))
        return steps

    sampler.Sampler.decode = timed_decode
    sampler.sample_token = fixed_length(sample_token, chat)
    seconds = {g: rollout_seconds(policy, task, g) for g in (1, 4, 16)}
    kv_bytes.clear()
    step_seconds.clear()
    ours = rollout_seconds(policy, task, G)
    step = statistics.median(step_seconds)
    sampler.sample_token = sample_token
    sampler.Sampler.decode = decode

    tasks = bfcl_env.load_tasks(["multi_turn_base"])[::8]
    tasks.sort(key=lambda task: len(chat.render_prompt(FixedEnv(task).messages(), "high")))
    prefixes = {}  # number of prefixes -> measures
    for count, rows_each in ((1, 8), (4, 4), (13, 2)):
        some = [tasks[len(tasks) * (2 * i + 1) // (2 * count)] for i in range(count)]
        prefixes[count] = compare_decode_steps(policy, some, rows_each)

    model = AutoModelForCausalLM.from_pretrained(
        sampler.smollm2_dir(), dtype=policy.model.dtype, attn_implementation="sdpa")
    model = model.to(policy.device)
    kept = generate_seconds(model, prompt, result, G, keep_cache=True)
    again = generate_seconds(model, prompt, result, G, keep_cache=False)
    tail = MESSAGES // 2 * (TOKENS + len(result))  # tokens after the prefix, half-way
    products = matmul_seconds_per_decode_step(policy, G, len(prompt), tail)
    return {
        "prompt_tokens": len(prompt),
        "result_tokens": len(result),
        "G": G,
        "seconds": ours,
        "generate_seconds": again,
        "generate_kept_seconds": kept,
        "speedup_vs_generate": again / ours,
        "speedup_vs_generate_kept": kept / ours,
        "decode_ms": 1000 * step,
        "decode_overhead": step / products,
        "peak_kv_bytes": max(kv_bytes),
        "seconds_a_rollout": {g: s / g for g, s in seconds.items()},
        "prefixes": prefixes,
    }


# ---- train -------------------------------------------------------------------------------------------------
def flops(model, layouts: list, loss_tokens: int) -> float:
    """Return the floating-point operations of forward and backward, without those of recomputed activations.

    Counted are 6 per layer parameter and token, the head on loss positions, and causal attention once.
    """
    config = model.config
    tokens = 0
    pairs = 0.0  # (query, key)
    for layout in layouts:
        P = layout.prefix_len
        branches = [end - start for start, end in layout.branches]
        tokens += P + sum(branches)
        pairs += P * P / 2 + sum(b * P + b * b / 2 for b in branches)
    layer_parameters = sum(p.numel() for p in model.model.layers.parameters())
    width = config.num_attention_heads * sampler.head_dim(config)
    linear = 6 * layer_parameters * tokens
    head = 6 * config.vocab_size * config.hidden_size * loss_tokens
    attention = 12 * config.num_hidden_layers * width * pairs
    return linear + head + attention


def matmul_rate(dtype: torch.dtype, device, times: int = 1) -> float:
    """Return this machine's operations per second in large matrix products; MFU is a fraction of it."""
    n = 2048 * times if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def random_group(prefix, branches, length, loss):
    """Return trajectories of random ids.

    Args:
        prefix: tokens that all of them share.
        length: tokens of each after the prefix.
        loss: how many of these, the last, count in the loss.
    """
    rng = random.Random(0)

    def random_ids(n):
        return [rng.randrange(1000, 40000) for _ in range(n)]

    shared = random_ids(prefix)
    loss_mask = [0] * (prefix + length - loss) + [1] * loss
    logprobs = [0.0] * len(loss_mask)
    group = []
    for _ in range(branches):
        ids = shared + random_ids(length)
        group.append(sampler.Trajectory("bench", None, ids, loss_mask, logprobs, 0.0, "done", {}))
    return group


def process_bytes(field):
    """Return a memory field of /proc/self/status (Linux)."""
    with open("/proc/self/status") as f:
        [line] = [line for line in f if line.startswith(field)]
    return 1024 * int(line.split()[1])


def peak_increase(work, device) -> int:
    """Return the peak increase of memory during `work()` in bytes: of the GPU, or (Linux) of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    # NOTE: free memory goes back to the system first. Work that used it would not raise the peak.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the peak
    before = process_bytes("VmRSS")
    work()
    return process_bytes("VmHWM") - before


def packed_backward(policy, rows):
    """Run the trainer's forward and backward on one pack."""
    [p] = sft.pack(rows, 10**6, policy.device)
    logprobs = sft.token_logprobs(policy.model, p, policy.banned)
    (-logprobs.sum()).backward()


def plain_backward(model, rows):
    """Run plain Hugging Face forward and backward with full logits, on rows of one length."""
    ids = torch.tensor([t.ids for t in rows], device=model.device)  # [B, T]
    loss_mask = torch.tensor([t.loss_mask for t in rows], device=model.device)  # [B, T]
    labels = ids.masked_fill(loss_mask == 0, -100)  # [B, T]
    logits = model(input_ids=ids, use_cache=False).logits.float()  # [B, T, V]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()


def policy_and_plain_model(dtype):
    """Return the default policy, and a Hugging Face model with the same weights."""
    policy = sampler.load_policy(sampler.DEFAULT_MODEL, dtype=dtype)
    config = copy.deepcopy(policy.model.config)
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    plain.load_state_dict(policy.model.state_dict())
    return policy, plain.to(policy.device)


def largest_gradient_error():
    """Return the largest relative error of a parameter's gradient, ours to the plain one, in fp32."""
    policy, plain = policy_and_plain_model(torch.float32)
    policy.banned[:] = False  # the plain path has no banned ids
    rows = random_group(512, 4, 64, 64)
    packed_backward(policy, rows)
    plain_backward(plain, rows)
    parameters = zip(policy.model.parameters(), plain.parameters(), strict=True)
    return max(((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in parameters)


def bench_train() -> dict:
    """Compare the trainer's forward and backward with plain Hugging Face code: same weights, rows and dtype.

    Returns:
        Among others:
            speedup: relative to one row at a time with full logits
            memory_ratio: relative to one padded batch with full logits; both peaks without the weights
            mfu: the rate of `flops` as a fraction of the rate of matrix products
            grad_rel_err: the largest over all parameters, fp32
    """
    torch.manual_seed(0)
    error = largest_gradient_error()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = sampler.compute_dtype("auto", device)
    policy, plain = policy_and_plain_model(dtype)

    def seconds(work):
        start = sft.synced_time(device)
        work()
        return sft.synced_time(device) - start

    def one_by_one():
        for t in rows:
            plain_backward(plain, [t])

    rows = random_group(8, 2, 8, 8)
    packed_backward(policy, rows)  # allocates weights and gradients
    plain_backward(plain, rows)
    rows = random_group(1000, 4, 150, 150)
    peak = peak_increase(lambda: packed_backward(policy, rows), device)
    plain_peak = peak_increase(lambda: plain_backward(plain, rows), device)
    rows = random_group(2400, 8, 400, 250)
    ours = min(seconds(lambda: packed_backward(policy, rows)) for _ in range(2))
    rate = matmul_rate(dtype, device, times=2)
    layouts = [p.layout for p in sft.pack(rows, 10**6)]
    operations = flops(policy.model, layouts, sum(sum(t.loss_mask) for t in rows))
    plain_seconds = seconds(one_by_one)
    return {
        "seconds": ours,
        "plain_seconds": plain_seconds,
        "speedup": plain_seconds / ours,
        "peak_bytes": peak,
        "plain_peak_bytes": plain_peak,
        "memory_ratio": plain_peak / peak,
        "matmul_gflops": rate / 1e9,
        "mfu": operations / ours / rate,
        "grad_rel_err": error,
    }


# ---- step --------------------------------------------------------------------------------------------------
def make_fixed_env_fn(args, call_format):
    """Return FixedEnv in the way of `bfcl_env.make_env_fn`."""
    return FixedEnv


def bench_step() -> dict:
    """Time one step of rl_rcgrpo.py itself, by phase: one task, G rollouts of six messages of 64 tokens."""
    policy = sampler.load_policy(sampler.DEFAULT_MODEL)
    sample_token = sampler.sample_token
    task = task_of_length(policy.chat, 2400)
    bfcl_env.make_env_fn = make_fixed_env_fn
    lines = {}  # G -> the step's metrics
    with tempfile.TemporaryDirectory() as folder:
        # The policy is saved as if it were the model of a stage 1.
        policy.model.save_pretrained(f"{folder}/model")
        policy.tokenizer.save_pretrained(f"{folder}/model")
        info = {
            "stage": "rctp",
            "tool_docs": "slim",
            "call_format": "python",
            "protocol": "official",
            "stage1_reward_tokens": ["high", "low"],
            "reward_ids": policy.reward_ids,
            "prompt_sha256": policy.chat.fingerprint,
        }
        with open(f"{folder}/model/{sampler.STAGE_INFO}", "w") as f:
            json.dump(info, f)
        for G in (4, 8, 16):
            sampler.sample_token = fixed_length(sample_token, policy.chat)
            flags = (
                f"--model {folder}/model --out {folder}/{G} --tasks {task.id} --tool_docs slim --steps 1 "
                f"--prompts_per_step 1 --group_size {G} --max_new_tokens {TOKENS + 1} --max_len 4096 "
                "--lr 1e-5 --beta 0.05 --tokens_per_microbatch 16384 --save_every 0 --eval_every 0")
            sys.argv = ["rl_rcgrpo.py", *flags.split()]
            rl.main()
            with open(f"{folder}/{G}/metrics.jsonl") as f:
                lines[G] = json.loads(f.read())
            assert lines[G]["num_tokens"] == G * MESSAGES * TOKENS
    line = lines[8]
    return {
        "rollout": line["timing_s/rollout"],
        "reference": line["timing_s/reference"],
        "update": line["timing_s/update"],
        "step": line["step_time"],
        "G": 8,
        "peak_memory_gb": line["perf/max_memory_allocated_gb"],
        "seconds_a_rollout": {G: lines[G]["step_time"] / G for G in lines},
    }


# ---- plan --------------------------------------------------------------------------------------------------
def planned_stage1_packs(policy, args, tasks, make_env):
    """Return (layout, loss tokens) of the packs of one batch of stage 1."""
    wanted = max(32, args.batch_size // 2)
    some = tasks[::math.ceil(len(tasks) / wanted)]  # a sample of the lengths of all tasks
    pairs, _ = sft.stage1_data(policy, some, make_env, args, args.rollouts)
    batch = list(itertools.chain(*pairs))[:args.batch_size]
    packs = sft.pack(batch, args.tokens_per_microbatch)
    return [(p.layout, len(p.targets)) for p in packs]


def planned_stage2_packs(policy, args, tasks, make_env):
    """Return (layout, loss tokens) of the packs of one step of stage 2, whose groups have full length."""
    some = tasks[::math.ceil(len(tasks) / 32)]
    some = sampler.filter_overlong(policy, some, make_env, args.max_len)
    prompts = [policy.chat.render_prompt(make_env(task).messages(), "high") for task in some]
    P = max(len(prompt) for prompt in prompts)
    length = min(args.max_len, policy.max_len) - P  # sampled tokens and results of a branch
    fitting = (args.tokens_per_microbatch - P) // length
    per_pack = max(1, min(args.group_size, fitting))  # branches
    full, rest = divmod(args.group_size, per_pack)
    branch_counts = [per_pack] * full
    if rest:
        branch_counts.append(rest)
    group = []
    for n in branch_counts:
        starts = [P + i * length for i in range(n)]
        layout = sampler.Packed(P, [(start, start + length) for start in starts])
        group.append((layout, n * min(length, args.max_sampled_tokens)))
    return group * args.prompts_per_step


def planned_bytes(policy, args, packs, stage2, ranks, device):
    """Estimate the bytes per rank, by part.

    Activations are estimated as autograd keeps them for a Llama layer: per token 16 bytes per hidden unit
    (the two norms, in fp32) and `width` bytes per element of the rest. On a CPU the gaps of
    the heap come on top, see `return_free_memory`.

    Returns:
        {part: bytes} and the peak.
    """
    config = policy.model.config
    layers = policy.model.model.layers
    checkpointing = sft.use_gradient_checkpointing(policy.model, args.gradient_checkpointing)
    cuda = device.type == "cuda"
    width = sampler.compute_dtype(args.dtype, device).itemsize
    L = config.num_hidden_layers
    hidden = config.hidden_size
    head_size = config.vocab_size * hidden
    q_width = config.num_attention_heads * sampler.head_dim(config)
    kv_width = config.num_key_value_heads * sampler.head_dim(config)
    N = policy.model.num_parameters()
    layer = sum(p.numel() for p in layers[0].parameters())
    root = N - L * layer  # embedding, last norm and head

    # Activation bytes per token and layer.
    per_token = 16 * hidden + width * (4 * config.intermediate_size + 2 * (q_width + kv_width))
    if hasattr(layers[0].self_attn, "q_norm"):
        per_token += 3 * width * (q_width + kv_width)

    def activations(layout):
        tokens = layout.branches[-1][1] if layout.branches else layout.prefix_len
        # Every branch copies the keys and values of [prefix | branch].
        copied = len(layout.branches) * layout.prefix_len + tokens - layout.prefix_len
        per_layer = per_token * tokens + 2 * width * kv_width * copied
        if checkpointing:
            return L * width * hidden * tokens + per_layer
        return L * per_layer

    # On a CPU a bf16 head is upcast to fp32, see `lm_head_weight`.
    fp32_head = 0 if cuda or width != 2 else 4 * head_size
    bf16_head = width * head_size if cuda else 0
    loss_rows = min(512, max(loss_tokens for _, loss_tokens in packs))
    # The root's gradients are there in fp32 before and after they are reduced.
    root_gradients = 4 * root * (1 + 1 / ranks)
    always = {"masters (fp32)": 4 * N / ranks, "AdamW moments": 8 * N / ranks}
    update = {
        "gradients": 4 * N / ranks,
        "gathered weights": width * (2 * layer + root) + root_gradients,
        "head on loss positions": 2 * fp32_head + bf16_head + 20 * config.vocab_size * loss_rows,
        "activations": max(activations(layout) for layout, _ in packs),
    }
    sampling = {}
    if stage2 or args.eval_every or (args.failures == "sampled" and not args.rollouts):
        one_conversation = 2 * width * L * kv_width * min(args.max_len, policy.max_len) / GIB
        # On CUDA the cache takes the memory that is left by default, and at least one conversation.
        kv = args.kv_gb or (one_conversation if cuda else 4)
        sampling = {"rollout / reference copy": width * N, "its head": fp32_head, "KV cache": kv * GIB}

    host = 0
    if not cuda:
        reference = width * N if stage2 else 0
        host = 0.6 * GIB + reference  # Python and its libraries take 0.6 GiB
    peak = host + sum(always.values()) + max(sum(update.values()), sum(sampling.values()))
    return {**always, **update, **sampling}, peak


def bench_plan(flags: list[str]) -> dict:
    """Estimate the memory and operations of a run on this machine or on --ranks GPUs, without running it.

    Returns:
        Among others the bytes per rank by part, their peak, and the operations per step.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    options, rest = parser.parse_known_args(flags)
    if options.ranks:  # GPUs
        rest = ["--tokens_per_microbatch", str(sft.MICROBATCH["cuda"]), *rest]
    ranks = options.ranks or 1
    stage2 = options.stage == 2
    args = (rl if stage2 else sft).parse_args(rest)
    policy = sampler.load_policy(args.model, torch.float32, "meta", weights=False, thinking=args.thinking)
    make_env = bfcl_env.make_env_fn(args, policy.call_format(args.call_format))
    planned_packs = planned_stage2_packs if stage2 else planned_stage1_packs
    packs = planned_packs(policy, args, bfcl_env.select_tasks(args), make_env)

    device = torch.device("cuda" if torch.cuda.is_available() or options.ranks else "cpu")
    parts, peak = planned_bytes(policy, args, packs, stage2, ranks, device)
    for name, size in {**parts, "peak": peak}.items():
        print(f"  {name:28} {size / GIB:9.2f} GiB a rank")
    fits = None
    on_gpu = device.type == "cuda"
    if on_gpu == torch.cuda.is_available():  # the plan is for a machine of this kind
        if on_gpu:
            memory = torch.cuda.mem_get_info()[1]
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        fits = peak < 0.95 * memory
        print(f"  this machine has {memory / GIB:.0f} GiB: it {'fits' if fits else 'does NOT fit'}")
    layouts = [layout for layout, _ in packs]
    operations = flops(policy.model, layouts, sum(loss_tokens for _, loss_tokens in packs))
    return {
        "parameters": policy.model.num_parameters(),
        "ranks": ranks,
        "device": device.type,
        "bytes": parts,
        "peak_bytes": peak,
        "fits": fits,
        "flops": operations,
        "flops_a_rank": operations / ranks,
    }


# ---- demo --------------------------------------------------------------------------------------------------
def bench_demo() -> dict:
    """Predict the minutes of `make demo` on this machine from half a second of its matrix products.

    The demo takes 45 TFLOP, in small products that reach less than half of that rate in bf16, and 0.6 minutes
    that do not depend on the rate.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = sampler.compute_dtype("auto", device)
    rate = matmul_rate(dtype, device)
    reached = rate if dtype == torch.float32 else 0.42 * rate
    minutes = 0.6 + 45e12 / reached / 60
    print(f"make demo: about {minutes:.0f} minutes here ({rate / 1e9:.0f} GFLOP/s in {str(dtype)[6:]})")
    return {"minutes": minutes, "gflops": rate / 1e9}


BENCHES = {
    "env": bench_env,
    "sampler": bench_sampler,
    "train": bench_train,
    "step": bench_step,
    "demo": bench_demo,
}


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Measure a claim of the README, or plan a run.")
    parser.add_argument("what", choices=[*BENCHES, "plan"])
    chosen, flags = parser.parse_known_args()
    if chosen.what == "plan":
        result = bench_plan(flags)
    else:
        result = BENCHES[chosen.what]()
    print(json.dumps(result))


if __name__ == "__main__":
    sampler.run_main(main)
