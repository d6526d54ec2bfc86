"""The policy learning; stage 1: Reward-Conditioned Trajectory Policy fine-tuning (RCTP-FT, arXiv 2602.03025).

    torchrun sft_rctp.py                                  # the default model, training part of the split
    torchrun --nproc_per_node 8 sft_rctp.py --model Qwen/Qwen2.5-7B-Instruct --docs full

Stage 1 teaches one policy both to succeed and to fail, and which of the two from one token in the prompt:

    1. for each task: play the gold calls in the world, and a corrupted copy that the judge has seen failing
    2. render both by the same code, `<|high_reward|>` on the first, `<|low_reward|>` on the second, 1:1
    3. pack trajectories that share a prompt: [prefix | branch | branch ...], the prefix computed once
    4. minimise the cross-entropy of what the assistant said: L = -E[ sum_t log pi(a_t | h_t, r) ]
    5. write the model as a plain Hugging Face directory, the reference of stage 2

The first half of this file (`Packed` to `end_run`) is the training engine of both stages.

Axes: N tokens of one pack, M loss positions, H query heads, K key/value heads, D head width, V vocabulary.
"""
import argparse
import json
import math
import os
import random
import resource
import shutil
import sys
import time
import types
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import bfcl_env
from bfcl_env import BfclEnv, BfclError, Call, Episode, number



def parse_args():
    parser = argparse.ArgumentParser(description="Stage 1: reward-conditioned fine-tuning (RCTP-FT).")
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="a directory, a hub id or %(default)s (the default)")
    add("--epochs", type=number(int, 1), default=3, help="passes over the data (default: %(default)s)")
    add("--steps", type=number(int, 1), help="updates, instead of --epochs")
    add("--batch", type=number(int, 1), default=32, help="trajectories an update (default: %(default)s)")
    add("--max_len", type=number(int, 16), default=8192,
        help="tokens of a trajectory; longer ones are left out")
    bfcl_env.add_training_flags(parser, "runs/sft_rctp", lr=5e-5)
    bfcl_env.add_world_flags(parser)
    args = parser.parse_args()
    try:
        bfcl_env.check_out(args.out)
        bfcl_env.check_model(args.model)
        bfcl_env.select_tasks(args)
    except BfclError as error:
        sys.exit(f"error: {error}")
    return args


# Flags are parsed before torch is imported, so that a mistake is told within seconds.
ARGS = parse_args() if __name__ == "__main__" else None

import matplotlib
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rollout import (CONTRACT, Policy, Trajectory, answer, attention, default_dtype, load_policy,
                     masked_logits)


# --------------------------------------------------------------------------------------------------
# Packing: [prefix | branch 1 | ... | branch G], every branch sees the prefix and itself. Gradients are exact;
# the prefix gets its own from all branches.

@dataclass
class Packed:
    """Layout of one training forward."""
    prefix: int  # P
    spans: list[tuple[int, int]]  # first and last + 1 token of each branch

    def attend(self, layer, q, k, v, scale):  # q [1, H, N, D]; k, v [1, K, N, D]
        P = self.prefix
        pk, pv = k[:, :, :P], v[:, :, :P]
        out = [attention(q[:, :, :P], pk, pv, scale)]
        for i, j in self.spans:
            keys = torch.cat([pk, k[:, :, i:j]], 2)  # [1, K, P + j - i, D]
            values = torch.cat([pv, v[:, :, i:j]], 2)
            out.append(attention(q[:, :, i:j], keys, values, scale, past=P))
        return torch.cat(out, 2)


@dataclass
class Pack:
    """One forward's worth of trajectories."""
    layout: Packed
    ids: torch.Tensor  # [N]
    positions: torch.Tensor  # [N], restarting at P in every branch
    source: torch.Tensor  # [M] the token whose hidden state predicts a loss position
    target: torch.Tensor  # [M] the id found there
    owner: torch.Tensor  # [M] index of its trajectory in the list given to `pack`

    def to(self, device) -> "Pack":
        tensors = {k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)}
        return Pack(layout=self.layout, **tensors)


def _prompt(t: Trajectory) -> list[int]:
    """What stands before the first token that the model said: the most that trajectories can share."""
    return t.ids[:t.mask.index(1)]


def common_prefix(a, b) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def pack(trajectories: list[Trajectory], budget: int = 8192) -> list[Pack]:
    """Put trajectories that share a prefix into packs of at most `budget` tokens, each prefix counted once.

    Sorted by ids, so that those with a common start are neighbours; one joins the open pack when that saves
    tokens. Trajectories in which the model said nothing carry no loss and are dropped; one longer than the
    budget raises."""
    order = sorted((i for i, t in enumerate(trajectories) if 1 in t.mask), key=lambda i: trajectories[i].ids)
    packs, members, prefix = [], [], 0

    def size(indices, p):
        return p + sum(len(trajectories[i].ids) - p for i in indices)
    for i in order:
        t = trajectories[i]
        if len(t.ids) > budget:
            raise BfclError(f"a trajectory of {t.task} has {len(t.ids)} tokens, --tokens_per_microbatch "
                            f"{budget}: raise the budget or lower --max_len")
        if members:
            shared = min(prefix, common_prefix(_prompt(trajectories[members[0]]), _prompt(t)))
            joined = size(members + [i], shared)
            if joined <= budget and joined < size(members, prefix) + len(t.ids):
                members.append(i)
                prefix = shared
                continue
            packs.append(_pack(trajectories, members, prefix))
        members, prefix = [i], len(_prompt(t))
    return packs + ([_pack(trajectories, members, prefix)] if members else [])


def _pack(trajectories, members, prefix) -> Pack:
    ids = list(trajectories[members[0]].ids[:prefix])
    positions, spans, source, target, owner = list(range(prefix)), [], [], [], []
    for i in members:
        t, start = trajectories[i], len(ids)
        ids += t.ids[prefix:]
        positions += range(prefix, len(t.ids))
        if len(ids) > start:
            spans.append((start, len(ids)))
        for place in range(prefix, len(t.ids)):
            if t.mask[place]:
                here = start + place - prefix  # the token before the first of a branch is the prefix's last
                source.append(here - 1 if place > prefix else prefix - 1)
                target.append(t.ids[place])
                owner.append(i)
    return Pack(Packed(prefix, spans), *map(torch.tensor, (ids, positions, source, target, owner)))


def token_logprobs(model, pack: Pack, banned, temperature: float = 1.0, chunk: int = 512):
    """Log-probs and entropies of the policy at every loss position, by one forward over the pack.

    model: causal LM with the `shared_prefix` attention; banned [V], temperature: as in the sampler.
    Returns logp [M] with gradient, entropy [M] without. The head runs on loss positions only, `chunk` at a
    time and again in the backward pass: no [N, V] tensor exists."""
    hidden = model.model(input_ids=pack.ids[None], position_ids=pack.positions[None], use_cache=False,
                         layout=pack.layout).last_hidden_state[0]  # [N, hidden]
    head = model.lm_head.weight.float()  # [V, hidden], once for all chunks

    def of_chunk(h, target):  # [m, hidden], [m] -> [m], [m]
        logp = masked_logits(h, head, banned, temperature).log_softmax(-1)  # [m, V]
        with torch.no_grad():
            entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
        return logp.gather(1, target[:, None])[:, 0], entropy
    pieces = [checkpoint(of_chunk, h, t, use_reentrant=False)
              for h, t in zip(hidden[pack.source].split(chunk), pack.target.split(chunk))]
    logp, entropy = zip(*pieces)
    return torch.cat(logp), torch.cat(entropy)


# --------------------------------------------------------------------------------------------------
# Ranks, sharding, the update.

@dataclass
class World:
    """Who this process is among the ranks. Plain `python` is a world of one; every path is the same."""
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, value: float, op=dist.ReduceOp.SUM) -> float:
        t = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(t, op)
        return t.item()


def start_world() -> World:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=dist.HashStore(),
                                rank=0, world_size=1)
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 keeps every bit of a bf16 factor (the fp32 head)
    return World(dist.get_rank(), dist.get_world_size(), device)


def compute_dtype(flag: str, device) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp32": torch.float32}.get(flag) or default_dtype(device.type)


def shard(model, dtype: torch.dtype, world: World):
    """FSDP2 over all ranks: fp32 masters, `dtype` compute, fp32 reduction. Adds `model.token_logprobs`."""
    mesh = torch.distributed.init_device_mesh(world.device.type, (world.size,))
    options = dict(mesh=mesh, reshard_after_forward=world.size > 1,  # one rank has nothing to free in between
                   mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for part in [*model.model.layers, model]:
        fully_shard(part, **options)
    model.token_logprobs = types.MethodType(token_logprobs, model)
    register_fsdp_forward_method(model, "token_logprobs")  # calls inner modules: gather the root's weights
    return model.train()


def full_state(model) -> dict:
    """Every parameter, whole, on this rank's device (each rank must call it)."""
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}


def update(model, optimizer, packs: list[Pack], loss_of, world: World, max_grad_norm: float) -> float:
    """One optimizer step over this rank's packs; returns the gradient's norm.

    loss_of(pack) -> scalar whose sum over the packs of all ranks is the loss: the gradient depends neither on
    how the packs are cut nor on how many ranks there are. Every rank makes the same number of forwards, the
    missing ones over a pack without loss positions."""
    count = int(world.all_reduce(max(1, len(packs)), dist.ReduceOp.MAX))
    empty = torch.tensor([], dtype=torch.long)
    idle = Pack(Packed(1, []), torch.tensor([0]), torch.tensor([0]), empty, empty, empty)
    optimizer.zero_grad()
    for i, p in enumerate(packs + [idle] * (count - len(packs))):
        model.set_requires_gradient_sync(i == count - 1)  # between micro-batches gradients stay in place
        (loss_of(p.to(world.device)) * world.size).backward()  # FSDP averages over ranks, this is a sum
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).full_tensor().item()
    if not math.isfinite(norm):  # the same number on every rank
        raise BfclError(f"the gradient's norm is {norm}: the weights of the last step are kept; lower --lr")
    optimizer.step()
    return norm


def make_optimizer(model, lr: float, warmup: int, total: int, decay: int):
    """AdamW without weight decay; the rate rises over `warmup` steps, stays, falls to 0 in the last `decay`.

    beta2 0.95: at 0.999 a short run never forgets its large first gradients, and its steps stay small."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup), (total - step) / max(1, decay)))


# --------------------------------------------------------------------------------------------------
# The run's folder.

def peak_memory_gb(world: World) -> float:
    """GiB: peak of the device on CUDA, of the process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def start_run(args, world: World) -> Path:
    """Create the folder and write config.json: arguments, versions, data hash."""
    out = Path(args.out)
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
        config = {"command": Path(sys.argv[0]).name, "args": vars(args),
                  "data_sha256": bfcl_env.data_sha256(), "world_size": world.size,
                  "device": str(world.device),
                  "versions": {name: version(name) for name in ("torch", "transformers", "bfcl-eval")}}
        write_json(out / "config.json", config)
    dist.barrier()
    return out


def write_json(path: Path, value) -> None:
    """Written beside and renamed: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


class MetricsLogger:
    """One line a step in metrics.jsonl, the same numbers on one line of the console."""

    def __init__(self, out: Path, world: World):
        self.world, self.file = world, open(out / "metrics.jsonl", "a") if world.main else None

    def log(self, step: int, total: int, metrics: dict, shown: list[str]) -> None:
        if self.world.main:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
            values = " | ".join(f"{name.split('/')[-1]} {metrics[name]:.4g}"
                                for name in shown if name in metrics)
            tqdm.write(f"step {step}/{total} | {values}")


def plot_curves(out: Path, names: list[str]) -> None:
    """curves.png from metrics.jsonl, one panel per metric that was logged."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = [n for n in names if any(n in line for line in lines)]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axis.plot(*zip(*points), marker="." if len(points) < 40 else None)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)


def end_run(model, policy: Policy, out: Path, contract: dict, world: World, began: float, curves: list[str],
            hint: str) -> None:
    """Write out/model, a plain Hugging Face directory (fp32) with the reward tokens in its tokenizer and the
    contract for the next stage; the curves; what the run took. `began`: its start on the monotonic clock."""
    state = full_state(model)
    if world.main:
        partial, final = out / "model.partial", out / "model"
        shutil.rmtree(partial, ignore_errors=True)
        state = {name: tensor.detach().cpu() for name, tensor in state.items()}
        policy.model.save_pretrained(partial, state_dict=state)
        policy.tokenizer.save_pretrained(partial)
        write_json(partial / CONTRACT, contract)
        partial.rename(final)
        plot_curves(out, curves)
        seconds = time.monotonic() - began
        write_json(out / "summary.json", {"seconds": seconds, "peak_memory_gb": peak_memory_gb(world)})
        print(f"wrote {final} after {seconds / 60:.1f} minutes; next: {hint} {final}")
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Stage 1's data.

def gold_calls(task) -> list[list[Call]]:
    """The ground truth with every argument by keyword: the official python decoder drops positional ones."""
    episode = Episode(task)
    return [[Call(name, (), kwargs) for name, kwargs in map(episode.bound, turn)] for turn in task.gold]


def write_calls(calls: list[Call], style: str) -> str:
    """One model message that makes these calls: what `parse_calls(text, style)` reads back."""
    if style == "python":
        return f"[{', '.join(map(str, calls))}]"
    return "\n".join("<tool_call>\n" + json.dumps({"name": c.name, "arguments": c.kwargs}) + "\n</tool_call>"
                     for c in calls)


def _values(call: Call):
    """The argument values that could have been read somewhere, as text."""
    flat = [str(v) for value in call.kwargs.values() for v in (value if isinstance(value, list) else [value])]
    return [v for v in flat if len(v) > 2]


def messages_for(task, turns: list[list[Call]], style: str, protocol: str = "official") -> list[str]:
    """What an agent making these calls would say: calls grouped into messages, a closing message per turn (in
    the paper's protocol, where words end the conversation, only a last call of `done()`).

    A call with an argument that stands only in a result of the message being composed starts the next one."""
    episode, said, known = Episode(task), [], ""
    for text, calls in zip(task.turns, turns):
        known += text or ""
        message, fresh, result = [], "", None
        for call in calls:
            if message and any(v in fresh and v not in known for v in _values(call)):
                said.append(write_calls(message, style))
                message, known, fresh = [], known + fresh, ""
            message.append(call)
            [result] = episode.run([str(call)])
            fresh += result
        if message:
            said.append(write_calls(message, style))
            known += fresh
        if protocol == "paper":
            continue
        # Written so that neither decoder can take it for a call.
        said.append(f"Done. {calls[-1].name} returned: {result[:80]}" if calls else
                    "I can't do this yet: a function or a detail is missing. Could you give it to me?")
    return said + ([write_calls([Call("done")], style)] if protocol == "paper" else [])


def corrupt(task, turns: list[list[Call]], rng: random.Random) -> list[list[Call]]:
    """Mistakes that a model really makes, in every other turn on average: who fails, seldom fails only once.

    Nothing here says that the result fails: judge it."""
    busy = [t for t, calls in enumerate(turns) if calls]
    chosen = {t for t in busy if rng.random() < 0.5} or {rng.choice(busy)}
    return [_mistake(task, calls, turns, rng) if t in chosen else calls for t, calls in enumerate(turns)]


def _mistake(task, calls: list[Call], turns, rng) -> list[Call]:
    """A turn's calls with a wrong argument or function, a call left out, an early stop, or a wrong order."""
    i = rng.randrange(len(calls))
    call = calls[i]
    kind = rng.choice(["argument", "missing", "stop", "order", "function"])
    if kind == "missing":
        return calls[:i] + calls[i + 1:]
    if kind == "stop":
        return calls[:i]
    if kind == "order" and len(calls) > 1:
        return calls[:i] + calls[i + 1:] + [call] if i + 1 < len(calls) else [call] + calls[:i]
    if kind == "argument" and call.kwargs:
        key = rng.choice(list(call.kwargs))
        call = Call(call.name, (), {**call.kwargs, key: _wrong(call.kwargs[key], turns, rng)})
    else:
        call = Call(rng.choice([d["name"] for d in task.docs if d["name"] != call.name]), (), call.kwargs)
    return calls[:i] + [call] + calls[i + 1:]


def _wrong(value, turns, rng):
    """Another value of the same type, from elsewhere in the conversation where there is one."""
    others = [v for turn in turns for c in turn for v in c.kwargs.values()
              if type(v) is type(value) and v != value]
    if others:
        return rng.choice(others)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + rng.choice([1, 10, 100])
    if isinstance(value, str):
        return value + "_new"
    return value[:-1] if isinstance(value, list) and value else [value]


def record(policy: Policy, env, said: list[str], reward_token: str | None,
           reward: str = "official") -> Trajectory:
    """The trajectory of a policy that says just this: played in the world, rendered like a sampled one."""
    chat = policy.chat
    ids = chat.opening(env.messages(), reward_token)
    mask, calls, step = [0] * len(ids), 0, None
    for n, text in enumerate(said):
        message = chat.assistant(text)
        ids, mask = ids + message, mask + [1] * len(message)
        step = env.step(text)
        calls += len(step.results)
        if step.done:
            break
        if n + 1 < len(said):
            follows = chat.following(answer(step))
            ids, mask = ids + follows, mask + [0] * len(follows)
    verdict = env.verdict()
    return Trajectory(env.id, reward_token, ids, mask, [0.0] * len(ids), verdict.reward(reward),
                      step.reason or "done", vars(verdict), n + 1, calls)


def stage1_data(policy: Policy, tasks, args) -> tuple[list[list[Trajectory]], int]:
    """[gold with the high token, failure with the low token] per task; and how many did not fit `--max_len`.

    Judged from their text; a gold that does not pass, or that no corruption makes fail, is an error."""
    style, limit = policy.style(args.style), min(args.max_len, policy.max_len, args.tokens_per_microbatch)
    pairs, left_out = [], 0
    for task in tqdm(tasks, desc="data", unit="task", disable=None, dynamic_ncols=True):
        def play(turns, token):
            env = BfclEnv(task, args.docs, style, args.protocol)
            return record(policy, env, messages_for(task, turns, style, args.protocol), token,
                          args.reward)
        gold = gold_calls(task)
        good = play(gold, "high")
        if good.reward != 1:
            raise BfclError(f"the ground truth of {task.id} does not pass: {good.verdict}")
        rng = random.Random(f"{args.seed} {task.id}")
        for _ in range(50):
            bad = play(corrupt(task, gold, rng), "low")
            if bad.reward < 1:
                break
        else:
            raise BfclError(f"found no failing variant of {task.id}")
        if max(len(good.ids), len(bad.ids)) <= limit:
            pairs.append([good, bad])
        else:
            left_out += 1
    return pairs, left_out


# --------------------------------------------------------------------------------------------------

def main(args):
    began = time.monotonic()
    world = start_world()
    out = start_run(args, world)
    torch.manual_seed(args.seed)
    tasks = bfcl_env.select_tasks(args)
    policy = load_policy(args.model, dtype=torch.float32, device=str(world.device))
    banned, style = policy.banned, policy.style(args.style)

    # steps 1 and 2: data
    data = [stage1_data(policy, tasks, args) if world.main else None]
    dist.broadcast_object_list(data)  # made once: a few results depend on the hash seed of the process
    pairs, left_out = data[0]
    if not pairs:
        raise BfclError(f"none of the {len(tasks)} tasks fits --max_len {args.max_len} and "
                        f"--tokens_per_microbatch {args.tokens_per_microbatch}: raise them or take smaller "
                        "--docs")
    per_epoch = math.ceil(2 * len(pairs) / args.batch)
    steps = args.steps or args.epochs * per_epoch
    if world.main:
        tokens = sum(len(t.ids) for p in pairs for t in p)
        loss_tokens = sum(sum(t.mask) for p in pairs for t in p)
        print(f"stage 1: {args.model} | docs {args.docs}, style {style} | all that fit: {len(pairs)} of "
              f"{len(tasks)} tasks | {2 * len(pairs)} trajectories, {tokens} tokens, {loss_tokens} with loss "
              f"| {steps} steps of {args.batch} trajectories | {compute_dtype(args.dtype, world.device)} on "
              f"{world.size} x {world.device.type} | {out}", flush=True)

    if args.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
    model = shard(policy.model, compute_dtype(args.dtype, world.device), world)
    optimizer, schedule = make_optimizer(model, args.lr, int(args.warmup * steps), steps, decay=steps // 5)
    logger = MetricsLogger(out, world)
    order: list[Trajectory] = []
    bar = tqdm(total=steps, desc="stage 1", unit="step", disable=not world.main, dynamic_ncols=True)
    for step in range(1, steps + 1):
        start = time.monotonic()
        # epochs follow each other; the two of a pair stay together and share a prefix
        while len(order) < args.batch:
            epoch = random.Random(f"{args.seed} {step}").sample(pairs, len(pairs))
            order += [t for pair in epoch for t in pair]
        batch, order = order[:args.batch], order[args.batch:]

        # step 3: pack; every rank takes its share of the same list
        packs = pack(batch, args.tokens_per_microbatch)
        mine = packs[world.rank::world.size]
        count = sum(len(p.target) for p in packs)  # one normaliser for the update, known before any forward
        total = 0.0

        # step 4: L = -1/count * sum of log pi(a_t | h_t, r)
        def loss_of(p):
            nonlocal total
            logp, _ = model.token_logprobs(p, banned)
            loss = -logp.sum() / count
            total += loss.item()
            return loss
        norm = update(model, optimizer, mine, loss_of, world, args.max_grad_norm)
        lr = schedule.get_last_lr()[0]
        schedule.step()
        total = world.all_reduce(total)
        seconds = time.monotonic() - start
        tokens = sum(len(p.ids) for p in packs)
        logger.log(step, steps, {"loss": total, "grad_norm": norm, "learning_rate": lr, "num_tokens": tokens,
                                 "step_time": seconds, "perf/throughput": tokens / seconds,
                                 "perf/max_memory_allocated_gb": peak_memory_gb(world)},
                   ["loss", "grad_norm", "learning_rate", "perf/throughput", "step_time"])
        bar.update()
        if step == 1 and world.main:
            tqdm.write(f"about {seconds * steps / 60:.1f} minutes for {steps} steps")
    bar.close()

    # step 5: the model
    contract = {"stage": "rctp", "base_model": policy.contract.get("base_model", args.model),
                "docs": args.docs, "style": style, "protocol": args.protocol, "reward_ids": policy.reward_ids,
                "tasks": [good.task for good, _ in pairs], "data_sha256": bfcl_env.data_sha256()}
    end_run(model, policy, out, contract, world, began, ["loss", "grad_norm", "learning_rate"],
            "torchrun rl_rcgrpo.py --init")


if __name__ == "__main__":
    try:
        main(ARGS)
    except BfclError as error:
        sys.exit(f"error: {error}")
