"""The measured claims of the README, one sub-command each; the last line is one JSON object.

    python bench.py env        # milliseconds a verdict, against the official checker
    python bench.py sampler    # seconds for the same rollouts, against generate of transformers
    python bench.py train      # seconds and memory of a training step, against plain Hugging Face code
    python bench.py step       # one step of stage 2, by phases
    python bench.py demo       # the minutes that `make demo` will take here
    python bench.py plan --model DIR --ranks 8 --tool_docs full     # what a run of stage 1 takes;
    python bench.py plan --stage 2 --model DIR --ranks 8            # of stage 2; other flags as for the stage
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

import bfcl_env

if __name__ == "__main__":
    bfcl_env.fix_hash_seed()

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import rl_rcgrpo
import rollout as R
import sft_rctp as S


def mutated(task, seed: int) -> list[list[list[str]]]:
    """The gold calls, one a step, one or two of them dropped, repeated, swapped or moved to another turn."""
    rng, turns = random.Random(f"{task.id} {seed}"), [list(calls) for calls in task.gold]
    for _ in range(rng.randint(1, 2)):
        calls = rng.choice([calls for calls in turns if calls])
        call = calls.pop(rng.randrange(len(calls)))
        other = rng.choice(turns)
        other[:0] = rng.choice([[], [call], [call, call]])
        if not any(turns):
            turns[0].append(call)
    return [[[call] for call in calls] for calls in turns]


def official_check(task, turns) -> tuple[dict, float]:
    """What the official checker returns, from fresh instances, and its seconds. `turns` as for `judge`, as
    many as gold's."""
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker as checker
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils as executor
    for name in [name for name in vars(executor) if name.endswith("_instance")]:
        delattr(executor, name)
    entry = {"id": task.id, "initial_config": task.config, "involved_classes": task.classes}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        out = checker.multi_turn_checker(turns, task.gold, entry, task.category, "model")
        return out, time.perf_counter() - start


def bench_env() -> dict:
    """Milliseconds a verdict, ours and the official checker's, alternately in one process: 800 tasks x 8.

    The official checker starts from fresh instances each time, as each evaluation does; our gold sides
    are executed beforehand. `live_ms_per_verdict` is what judging adds to a live rollout: ends of turns
    and the verdict."""
    tasks, ours, official, live, agree = bfcl_env.load_tasks(), [], [], [], []
    for task in tasks:
        task.gold_replay
    for seed in range(8):
        for task in tasks:
            turns = mutated(task, seed)
            start = time.perf_counter()
            verdict = bfcl_env.judge(task, turns)
            ours.append(time.perf_counter() - start)
            out, seconds = official_check(task, turns)
            official.append(seconds)
            agree.append((out["valid"], out.get("error_type")) == (verdict.valid, verdict.error_type))
            episode, spent = bfcl_env.Episode(task), 0.0
            for turn in turns:
                for step in turn:
                    episode.execute(step)
                start = time.perf_counter()
                episode.end_turn()
                spent += time.perf_counter() - start
            start = time.perf_counter()
            episode.verdict()
            live.append(spent + time.perf_counter() - start)
    ms = {name: 1000 * statistics.mean(times) for name, times in
          [("ms_per_verdict", ours), ("official_ms_per_verdict", official), ("live_ms_per_verdict", live)]}
    return {**{name: round(value, 4) for name, value in ms.items()}, "verdicts": len(ours),
            "agree": sum(agree), "speedup": round(ms["official_ms_per_verdict"] / ms["ms_per_verdict"], 2)}


MESSAGES, TOKENS = 6, 64  # of each rollout of `sampler`, and tokens of a message
RESULT = '{"result": "48 of the items were found"}'  # 22 tokens, the header of the answer included


class FixedWorld:
    """A real task's opening, then always the same result, whatever is said."""

    def __init__(self, task):
        self.id, self.task, self.said = task.id, task, 0

    def messages(self):
        return bfcl_env.BfclEnv(self.task, tool_docs="slim").messages()

    def step(self, text):
        self.said += 1
        done = self.said == MESSAGES
        return bfcl_env.StepResult([RESULT], None, done, "done" if done else None)

    def verdict(self):
        return bfcl_env.judge(self.task, [])


def fixed_length(draw, chat):
    """`draw` with the stop token as the 64th of a message and no sooner."""
    drawn = itertools.count(1)

    def fixed(logits, uniform, greedy=False):
        logits[:, [chat.stop_id, *chat.forbidden_ids]] = float("-inf")
        ids, logprobs = draw(logits, uniform, greedy)
        return (ids.fill_(chat.stop_id) if next(drawn) % TOKENS == 0 else ids), logprobs
    return fixed


def longest_like(chat, tokens: int):
    """The base task whose opening with slim docs is nearest to so many tokens."""
    return min(bfcl_env.load_tasks(["multi_turn_base"])[::10],
               key=lambda task: abs(len(chat.render_prompt(FixedWorld(task).messages(), "high")) - tokens))


def bare_products(policy, rows: int, prefix: int, own: int) -> float:
    """Seconds of the matrix products of one decode step, and of nothing else, in a loop."""
    config, dtype, device = policy.model.config, policy.model.dtype, policy.device
    K, D = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    H, L = config.num_attention_heads, config.num_hidden_layers

    def new(*shape):
        return torch.randn(*shape, device=device).to(dtype)
    head, last = R.lm_head_weight(policy.model), new(rows, config.hidden_size)
    q, weights = new(K, rows * H // K, D), new(K, rows * H // K, prefix)
    q_own, weights_own = new(rows, K, H // K, D), new(rows, K, H // K, own)
    shared, mine = new(L, 2, K, prefix, D), new(L, 2, rows, K, own, D)
    linears = [[m.weight for m in layer.modules() if isinstance(m, torch.nn.Linear)]
               for layer in policy.model.model.layers]
    inputs = {w.shape[1]: new(rows, w.shape[1]) for w in linears[0]}
    times = []
    with torch.inference_mode():
        for _ in range(12):
            start = S.synced_time(device)
            for layer in range(L):
                for w in linears[layer]:
                    inputs[w.shape[1]] @ w.T
                q @ shared[layer, 0].transpose(1, 2), weights @ shared[layer, 1]
                mine[layer, 0] @ q_own.transpose(2, 3), weights_own @ mine[layer, 1]
            R.masked_logits(last, head, policy.banned)
            times.append(S.synced_time(device) - start)
    return statistics.median(times)


def bench_sampler(G: int = 8) -> dict:
    """The sampler against batched `generate`: the same weights, dtype, prompt and numbers of tokens.

    One task with slim docs, G rollouts, six messages of 64 tokens, a tool result after each but the last.
    generate: prefills the whole conversation for each message, as trainers on top do; generate_kept: keeps
    its dynamic cache over the messages. decode_overhead: a decode step over its bare matrix products."""
    policy = R.load_policy(R.DEFAULT_MODEL)
    chat = policy.chat
    task = longest_like(chat, 2400)
    prompt, result = chat.render_prompt(FixedWorld(task).messages(), "high"), chat.render_env_reply(
        [{"role": "tool", "content": RESULT}])

    draw, forward, kv, steps = R.sample_token, R.Sampler.decode, [], []

    def watched(sampler):
        kv.append(sampler.row_kv.nbytes + sum(prefix.kv.nbytes for prefix in sampler.cached_prefixes))
        start = time.perf_counter()
        said = forward(sampler)  # ends with a copy to the host
        steps.append((time.perf_counter() - start) / len(said))
        return said
    R.Sampler.decode = watched

    def ours(G):
        kv.clear(), steps.clear()
        start = time.perf_counter()
        out = R.rollout(policy, [FixedWorld(task) for _ in range(G)], ["high"] * G,
                        max_new_tokens=TOKENS + 1, max_len=4096)
        assert all(sum(t.loss_mask) == MESSAGES * TOKENS for t in out)
        return time.perf_counter() - start
    R.sample_token = fixed_length(draw, chat)
    seconds = {g: ours(g) for g in (1, 4, 16)}
    own = ours(G)
    decode = statistics.median(steps)
    R.sample_token = draw

    model = AutoModelForCausalLM.from_pretrained(R.smollm2_dir(), dtype=policy.model.dtype,
                                                 attn_implementation="sdpa").to(policy.device)

    def generate(keep: bool):
        # without the reward token, which this model has no row for
        ids = torch.tensor([[min(i, model.config.vocab_size - 1) for i in prompt]] * G, device=policy.device)
        cache = DynamicCache(config=model.config)
        start = S.synced_time(policy.device)
        with torch.inference_mode():
            for message in range(MESSAGES):
                ids = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, pad_token_id=0,
                                     max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                                     **({"past_key_values": cache} if keep else {}))  # [G, tokens so far]
                ids = torch.cat([ids, torch.tensor([result] * G, device=policy.device)], 1)
        return S.synced_time(policy.device) - start
    kept, again = generate(True), generate(False)
    tail = MESSAGES // 2 * (TOKENS + len(result))  # own tokens half-way
    return {"prompt_tokens": len(prompt), "result_tokens": len(result), "G": G, "seconds": own,
            "generate_seconds": again, "generate_kept_seconds": kept, "speedup_vs_generate": again / own,
            "speedup_vs_generate_kept": kept / own, "decode_ms": 1000 * decode,
            "decode_overhead": decode / bare_products(policy, G, len(prompt), tail),
            "peak_kv_bytes": max(kv), "seconds_a_rollout": {g: s / g for g, s in seconds.items()}}


def flops(model, layouts: list, loss_tokens: int) -> float:
    """Floating-point operations of forward and backward: 6 a layer parameter and token, the head on loss
    positions, causal attention once; nothing for what is computed again."""
    config, pairs, tokens = model.config, 0.0, 0
    for layout in layouts:
        P, branches = layout.prefix, [j - i for i, j in layout.spans]
        tokens += P + sum(branches)
        pairs += P * P / 2 + sum(b * P + b * b / 2 for b in branches)
    return (6 * sum(p.numel() for p in model.model.layers.parameters()) * tokens
            + 6 * config.vocab_size * config.hidden_size * loss_tokens
            + 12 * config.num_hidden_layers * config.num_attention_heads * R.head_dim(config) * pairs)


def matmul_rate(dtype: torch.dtype, device, times: int = 1) -> float:
    """Operations a second of large matrix products on this machine: what MFU is a share of."""
    n, seconds = 2048 * times if device.type == "cpu" else 8192, []
    a = torch.randn(n, n, device=device).to(dtype)
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def group_of(P: int, branches: int, length: int, loss: int, seed: int = 0) -> list:
    """Trajectories of random ids that share P tokens and have `length` own ones, the last with loss."""
    rng = random.Random(seed)
    shared = [rng.randrange(1000, 40000) for _ in range(P)]
    mask = [0] * (P + length - loss) + [1] * loss
    return [R.Trajectory("bench", None, shared + [rng.randrange(1000, 40000) for _ in range(length)], mask,
                       [0.0] * len(mask), 0.0, "done", {}) for _ in range(branches)]


def peak_above(work, device) -> int:
    """Bytes held at most while `work()` ran, above those before: of the GPU, or (Linux) of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before

    def status(field):
        line = next(line for line in open("/proc/self/status") if line.startswith(field))
        return 1024 * int(line.split()[1])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or it would hide what `work` takes
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # starts the peak anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def bench_train() -> dict:
    """The trainer's forward and backward against plain Hugging Face code on the same weights, rows and dtype.

    speedup: one row at a time, full logits; memory_ratio: one padded batch, full logits, peaks above the
    weights; mfu: `flops` over the rate of a matrix product; grad_rel_err: the largest over all
    parameters, fp32."""
    torch.manual_seed(0)

    def models(dtype):
        policy = R.load_policy(R.DEFAULT_MODEL, dtype=dtype)
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(policy.model.config), dtype=dtype,
                                                 attn_implementation="sdpa")
        plain.load_state_dict(policy.model.state_dict())
        return policy, plain.to(policy.device)

    def ours(policy, rows):
        [p] = S.pack(rows, 10**6, policy.device)
        (-S.token_logprobs(policy.model, p, policy.banned).sum()).backward()

    def theirs(plain, rows):
        ids, mask = torch.tensor([[t.ids, t.loss_mask] for t in rows], device=plain.device).unbind(1)  # [B, T]
        labels = ids.masked_fill(mask == 0, -100)  # [B, T]
        logits = plain(input_ids=ids, use_cache=False).logits.float()  # [B, T, V]
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                                          reduction="sum").backward()

    policy, plain = models(torch.float32)
    device = policy.device

    def seconds(work):
        start = S.synced_time(device)
        work()
        return S.synced_time(device) - start

    policy.banned[:] = False  # the plain path knows no banned ids
    rows = group_of(512, 4, 64, 64)
    ours(policy, rows)
    theirs(plain, rows)
    error = max(((p.grad - q.grad).norm() / q.grad.norm()).item()
                for p, q in zip(policy.model.parameters(), plain.parameters(), strict=True))

    dtype = R.compute_dtype("auto", device)
    policy, plain = models(dtype)
    small = group_of(8, 2, 8, 8)
    ours(policy, small), theirs(plain, small)  # touches weights and gradients
    rows = group_of(1000, 4, 150, 150)
    memory = [peak_above(lambda: ours(policy, rows), device), peak_above(lambda: theirs(plain, rows), device)]
    rows = group_of(2400, 8, 400, 250)
    mine = min(seconds(lambda: ours(policy, rows)) for _ in range(2))
    rate = matmul_rate(dtype, device, times=2)
    layouts, loss_tokens = [p.layout for p in S.pack(rows, 10**6)], sum(sum(t.loss_mask) for t in rows)
    operations = flops(policy.model, layouts, loss_tokens)
    one_by_one = seconds(lambda: [theirs(plain, [t]) for t in rows])
    return {"seconds": mine, "plain_seconds": one_by_one, "speedup": one_by_one / mine,
            "peak_bytes": memory[0], "plain_peak_bytes": memory[1], "memory_ratio": memory[1] / memory[0],
            "matmul_gflops": rate / 1e9, "mfu": operations / mine / rate, "grad_rel_err": error}


def bench_step() -> dict:
    """One step of rl_rcgrpo.py itself, by phases: one task, G rollouts of six messages of 64 tokens."""
    policy, draw, lines = R.load_policy(R.DEFAULT_MODEL), R.sample_token, {}
    task = longest_like(policy.chat, 2400)
    bfcl_env.make_env_fn = lambda args, call_format: lambda task: FixedWorld(task)
    with tempfile.TemporaryDirectory() as folder:
        policy.model.save_pretrained(f"{folder}/model")
        policy.tokenizer.save_pretrained(f"{folder}/model")
        with open(f"{folder}/model/{R.STAGE_INFO}", "w") as f:
            json.dump({"stage": "rctp", "tool_docs": "slim", "call_format": "python", "protocol": "official",
                       "stage1_reward_tokens": ["high", "low"], "reward_ids": policy.reward_ids,
                       "template_sha256": policy.chat.fingerprint}, f)
        for G in (4, 8, 16):
            R.sample_token = fixed_length(draw, policy.chat)
            sys.argv = ["rl_rcgrpo.py", *f"--model {folder}/model --out {folder}/{G} --tasks {task.id} "
                        f"--tool_docs slim --steps 1 --prompts_per_step 1 --group_size {G} --max_new_tokens {TOKENS + 1} "
                        f"--max_len 4096 --tokens_per_microbatch 16384 --save_every 0 --eval_every 0".split()]
            rl_rcgrpo.main()
            with open(f"{folder}/{G}/metrics.jsonl") as f:
                lines[G] = json.loads(f.read())
            assert lines[G]["num_tokens"] == G * MESSAGES * TOKENS
    phases = {name: lines[8][f"timing_s/{name}"] for name in ("rollout", "reference", "update")}
    return {**phases, "step": lines[8]["step_time"], "G": 8,
            "peak_memory_gb": lines[8]["perf/max_memory_allocated_gb"],
            "seconds_a_rollout": {G: line["step_time"] / G for G, line in lines.items()}}


def planned_packs(policy, args, stage2: bool) -> list:
    """(layout, loss tokens) of one step's packs: of a batch of stage 1; of groups at their longest."""
    make_env = bfcl_env.make_env_fn(args, policy.call_format(args.call_format))
    tasks = bfcl_env.select_tasks(args)
    if not stage2:
        some = tasks[::math.ceil(len(tasks) / max(32, args.batch_size // 2))]  # whose lengths stand for all
        pairs, _ = S.stage1_data(policy, some, make_env, args)
        batch = [t for pair in pairs for t in pair][:args.batch_size]
        return [(p.layout, len(p.targets)) for p in S.pack(batch, args.tokens_per_microbatch)]
    some = R.filter_overlong(policy, tasks[::math.ceil(len(tasks) / 32)], make_env, args.max_len)
    P = max(len(policy.chat.render_prompt(make_env(task).messages(), "high")) for task in some)
    own = min(args.max_len, policy.max_len) - P  # sampled tokens and results
    size = max(1, min(args.group_size, (args.tokens_per_microbatch - P) // own))  # branches of a pack
    counts = [size] * (args.group_size // size) + [args.group_size % size] * (args.group_size % size > 0)
    return [(R.Packed(P, [(P + i * own, P + (i + 1) * own) for i in range(n)]),
             n * min(own, args.max_sampled_tokens)) for n in counts] * args.prompts_per_step


def bench_plan(flags: list[str]) -> dict:
    """Bytes a rank by part, their peak, and operations a step, of a run on this machine or on --ranks GPUs.
    Activations are counted as autograd keeps them for a Llama layer: 16 bytes a hidden unit (the two norms,
    in fp32), `width` bytes for the rest."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    own, rest = parser.parse_known_args(flags)
    if own.ranks:  # GPUs
        rest = ["--tokens_per_microbatch", str(S.MICROBATCH["cuda"]), *rest]
    stage2, ranks = own.stage == 2, own.ranks or 1
    args = (rl_rcgrpo if stage2 else S).parse_args(rest)
    policy = R.load_policy(args.model, torch.float32, "meta", weights=False,
                           thinking=args.thinking)
    packs = planned_packs(policy, args, stage2)
    config, layers = policy.model.config, policy.model.model.layers
    device = torch.device("cuda" if torch.cuda.is_available() or own.ranks else "cpu")
    width = R.compute_dtype(args.dtype, device).itemsize
    N, L, V = sum(p.numel() for p in policy.model.parameters()), config.num_hidden_layers, config.vocab_size
    layer = sum(p.numel() for p in layers[0].parameters())
    root = N - L * layer  # embedding, last norm and head
    HD, KD = (n * R.head_dim(config) for n in (config.num_attention_heads, config.num_key_value_heads))
    # of a token and layer
    kept = 16 * config.hidden_size + width * (4 * config.intermediate_size + 2 * (HD + KD))
    if hasattr(layers[0].self_attn, "q_norm"):
        kept += 3 * width * (HD + KD)

    def activations(layout):
        tokens = layout.spans[-1][1] if layout.spans else layout.prefix
        # [prefix | branch] of each branch
        copies = 2 * width * KD * (len(layout.spans) * layout.prefix + tokens - layout.prefix)
        if S.use_gradient_checkpointing(policy.model, args.gradient_checkpointing):
            return L * width * config.hidden_size * tokens + kept * tokens + copies
        return L * (kept * tokens + copies)
    rows, cuda, hidden = min(512, max(n for _, n in packs)), device.type == "cuda", config.hidden_size
    wide = 4 * V * hidden * (width == 2 and not cuda)  # the head in fp32, see `lm_head_weight`
    held = {"masters (fp32)": 4 * N / ranks, "AdamW moments": 8 * N / ranks}
    update = {"gradients": 4 * N / ranks,
              # and the root's gradients in fp32, before and after they are reduced
              "gathered weights": width * (2 * layer + root) + 4 * root * (1 + 1 / ranks),
              "head on loss positions": 2 * wide + width * V * hidden * cuda + 20 * V * rows,
              "activations": max(activations(layout) for layout, _ in packs)}
    acting, one = {}, 2 * width * L * KD * min(args.max_len, policy.max_len) / 2**30  # GiB of a conversation
    if stage2 or args.eval_every:  # on CUDA the cache takes what is left by default, but that at least
        kv = args.kv_gb or (one if cuda else 4)
        acting = {"rollout / reference copy": width * N, "its head": wide, "KV cache": kv * 2**30}
    host = 0 if cuda else 0.6 * 2**30 + width * N * stage2  # Python and its libraries, and the reference
    peak = host + sum(held.values()) + max(sum(update.values()), sum(acting.values()))
    for name, size in {**held, **update, **acting, "peak": peak}.items():
        print(f"  {name:28} {size / 2**30:9.2f} GiB a rank")
    fits = None
    if cuda == torch.cuda.is_available():  # the kind of machine that this plan is for
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        has = torch.cuda.mem_get_info()[1] if cuda else host
        fits = peak < 0.95 * has
        print(f"  this machine has {has / 2**30:.0f} GiB: it {'fits' if fits else 'does NOT fit'}")
    work = flops(policy.model, [layout for layout, _ in packs], sum(n for _, n in packs))
    return {"parameters": N, "ranks": ranks, "device": device.type, "bytes": {**held, **update, **acting},
            "peak_bytes": peak, "fits": fits, "flops": work, "flops_a_rank": work / ranks}


def bench_demo() -> dict:
    """Minutes of `make demo` on this machine, from half a second of its matrix products: 45 TFLOP, whose
    products are small and reach less than half of that rate in bf16; and what does not depend on it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = R.compute_dtype("auto", device)
    rate = matmul_rate(dtype, device)
    minutes = 0.6 + 45e12 / (rate if dtype == torch.float32 else 0.42 * rate) / 60
    print(f"make demo: about {minutes:.0f} minutes here ({rate / 1e9:.0f} GFLOP/s in {str(dtype)[6:]})")
    return {"minutes": minutes, "gflops": rate / 1e9}


if __name__ == "__main__":
    benches = {"env": bench_env, "sampler": bench_sampler, "train": bench_train, "step": bench_step,
               "demo": bench_demo}
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Measure a claim of the README, or plan a run.")
    parser.add_argument("what", choices=[*benches, "plan"])
    chosen, flags = parser.parse_known_args()
    print(json.dumps(bench_plan(flags) if chosen.what == "plan" else benches[chosen.what]()))
