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
import dataclasses
import datetime
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import bfcl_env
from bfcl_env import BfclEnv, BfclError, Call, Episode, judge, number



# Two transcriptions of the paper's hyper-parameters.
PRESETS = {"appendix": dict(lr=1e-5, batch=16, epochs=5), "notes": dict(lr=5e-5, batch=32, epochs=3)}

TOKENS = {"rctp": ["high", "low", None], "mixed": [None], "sft": [None]}  # what an arm's prompts carry


def parse_args():
    parser = argparse.ArgumentParser(description="Stage 1: reward-conditioned fine-tuning (RCTP-FT).")
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="a directory, a hub id or %(default)s (the default)")
    add("--preset", choices=PRESETS, default="notes",
        help="lr, batch and epochs of the paper's appendix or of notes on it (default: %(default)s)")
    add("--epochs", type=number(int, 1), help="passes over the data (default: %(default)s)")
    add("--steps", type=number(int, 1), help="updates, instead of --epochs")
    add("--batch", type=number(int, 1), help="trajectories an update (default: %(default)s)")
    add("--arm", default="rctp", choices=TOKENS, help="successes and failures with reward tokens, the same "
        "without, or successes alone without (default: %(default)s)")
    add("--no_token", type=number(float, 0, 1), default=0.1,
        help="share of the trajectories without a token in the rctp arm (default: %(default)s)")
    add("--rollouts", nargs="*", default=[], metavar="FILE",
        help="learn from a model's rollouts (runs/NAME/rollouts/*.jsonl), not from gold and corrupted calls")
    bfcl_env.add_training_flags(parser, "runs/sft_rctp")
    bfcl_env.add_sampling_flags(parser)  # of the evaluations
    bfcl_env.add_world_flags(parser)
    parser.set_defaults(**PRESETS["notes"])  # for --help
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset])
    args = parser.parse_args()
    try:
        bfcl_env.check_model(args.model)
        bfcl_env.validation_tasks(args, {task.id for task in bfcl_env.select_tasks(args)})
        for file in args.rollouts:
            if not Path(file).is_file():
                raise BfclError(f"no file {file}: give --rollouts files such as runs/NAME/rollouts/*.jsonl")
        if not args.plan:
            bfcl_env.check_out(args)
    except BfclError as error:
        sys.exit(f"error: {error}")
    return args


# Flags are parsed before torch is imported, so that a mistake is told within seconds.
if __name__ == "__main__":
    bfcl_env.settle_environment()
    ARGS = parse_args()

import matplotlib
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rollout import (CONTRACT, Policy, Trajectory, answer, attention, checksum, default_dtype, head_dim,
                     load_policy, masked_logits, piece, rollout, sampling, score,
                     split_fitting)


# --------------------------------------------------------------------------------------------------
# Packing: [prefix | branch 1 | ... | branch G], every branch sees the prefix and itself. Gradients are exact;
# the prefix gets its own from all branches.

@dataclass
class Packed:
    """Layout of one training forward."""
    prefix: int  # P
    spans: list[tuple[int, int]]  # first and last + 1 token of each branch

    def attend(self, layer, q, k, v, scale):  # q [1, H, N, D]; k, v [1, K, N, D]
        sizes = [self.prefix, *(j - i for i, j in self.spans)]
        (first, *q), (pk, *k), (pv, *v) = (x.split(sizes, 2) for x in (q, k, v))  # the prefix and each branch
        out = [attention(first, pk, pv, scale)]
        for own_q, own_k, own_v in zip(q, k, v):
            keys, values = torch.cat([pk, own_k], 2), torch.cat([pv, own_v], 2)  # [1, K, P + own, D]
            out.append(attention(own_q, keys, values, scale, past=self.prefix))
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


def token_logprobs(model, pack: Pack, banned, temperature: float = 1.0, entropy: bool = False,
                   chunk: int = 512):
    """Log-probs of the policy at every loss position, by one forward over the pack.

    model: causal LM with the `shared_prefix` attention; banned [V], temperature: as in the sampler.
    Returns logp [M] with gradient and, if asked for, the entropies [M] without. The head runs on loss
    positions only, `chunk` at a time and again in the backward pass: no [N, V] tensor exists."""
    hidden = model.model(input_ids=pack.ids[None], position_ids=pack.positions[None], use_cache=False,
                         layout=pack.layout).last_hidden_state[0]  # [N, hidden]
    head = model.lm_head.weight.float()  # [V, hidden], once for all chunks

    def of_chunk(h, target):  # [m, hidden], [m] -> [m], [m]
        logp = masked_logits(h, head, banned, temperature).log_softmax(-1)  # [m, V]
        with torch.no_grad():
            spread = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1) if entropy else torch.zeros(len(h))
        return logp.gather(1, target[:, None])[:, 0], spread
    pieces = [checkpoint(of_chunk, h, t, use_reentrant=False)
              for h, t in zip(hidden[pack.source].split(chunk), pack.target.split(chunk))]
    logp, spread = (torch.cat(x) for x in zip(*pieces))
    return (logp, spread) if entropy else logp


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

    def gather(self, values: list) -> list:
        """The lists of all ranks, one after the other."""
        parts = [None] * self.size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]


def start_world() -> World:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    options = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    # Ranks end their rollouts at different times: minutes, not the default 10, may lie between them.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                            timeout=datetime.timedelta(days=1), **options)
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), device)


def compute_dtype(flag: str, device) -> torch.dtype:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(flag) or default_dtype(device.type)
    if dtype == torch.bfloat16:  # for the fp32 head: its factors are bf16 numbers, such products lose nothing
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return dtype


def shard(model, dtype: torch.dtype, world: World):
    """FSDP2 over all ranks: fp32 masters, `dtype` compute, fp32 reduction. Adds `model.token_logprobs`."""
    mesh = torch.distributed.init_device_mesh(world.device.type, (world.size,))
    options = dict(mesh=mesh, reshard_after_forward=True,
                   mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for part in [*model.model.layers, model]:
        fully_shard(part, **options)
    model.token_logprobs = types.MethodType(token_logprobs, model)
    register_fsdp_forward_method(model, "token_logprobs")  # calls inner modules: gather the root's weights
    return model.train()


@torch.no_grad()
def copy_weights(target, source) -> None:
    """Fill the whole model `target`, one parameter at a time, from a sharded model or a dict of tensors."""
    source = source if isinstance(source, dict) else dict(source.named_parameters())
    for name, p in target.named_parameters():
        whole = source[name].full_tensor() if isinstance(source[name], DTensor) else source[name]
        if p.shape != whole.shape:  # it was released
            p.data = torch.empty(whole.shape, dtype=p.dtype, device=p.device)
        p.copy_(whole)


def release_weights(model) -> None:
    """Give the memory of a whole model back until the next `copy_weights`."""
    for p in model.parameters():
        p.data = p.data.new_empty(0)


def with_idle(packs: list[Pack], world: World) -> list[Pack]:
    """The packs, and as many idle ones (no loss position) as another rank has more: sharded forwards are
    collective, so every rank makes the same number."""
    count = int(world.all_reduce(max(1, len(packs)), dist.ReduceOp.MAX))
    empty = torch.tensor([], dtype=torch.long)
    idle = Pack(Packed(1, []), torch.tensor([0]), torch.tensor([0]), empty, empty, empty)
    return [p.to(world.device) for p in packs + [idle] * (count - len(packs))]


def update(model, optimizer, packs: list[Pack], loss_of, world: World,
           max_grad_norm: float) -> tuple[float, float]:
    """One optimizer step over this rank's packs; returns the gradient's norm and the loss, over all ranks. If
    one is not finite the step is skipped, and the norm is not finite.

    loss_of(pack) -> scalar whose sum over the packs of all ranks is the loss: the gradient depends neither on
    how the packs are cut nor on how many ranks there are."""
    total = 0.0
    for p in with_idle(packs, world):
        loss = loss_of(p)
        total += loss.item()
        (loss * world.size).backward()  # FSDP averages over ranks, this is a sum
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).full_tensor().item()
    total = world.all_reduce(total)
    norm = norm if math.isfinite(total) else math.nan
    if math.isfinite(norm):  # the same number on every rank
        optimizer.step()
    optimizer.zero_grad()
    return norm, total


def skipped_in_a_row(before: int, norm: float, step: int) -> int:
    """How many updates in a row were skipped. Errors: BfclError at the third."""
    skipped = 0 if math.isfinite(norm) else before + 1
    if skipped == 3:
        raise BfclError(f"the gradients of steps {step - 2} to {step} were not finite; those updates were "
                        "skipped: lower --lr, or look at what those steps logged")
    return skipped


def make_optimizer(model, lr: float):
    """AdamW without weight decay. beta2 0.95: at 0.999 a short run never forgets its large first gradients,
    and its steps stay small."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def learning_rate(step: int, peak: float, warmup: float, total: int, decay: int = 0) -> float:
    """Of step 1, 2, ..., total: it rises over `warmup` steps, stays, falls towards 0 in the last `decay`."""
    return peak * min(1.0, step / max(1, int(warmup)), (total - step + 1) / max(1, decay))


def shuffled(n: int, start: int, count: int, seed: int) -> list[int]:
    """Items start to start + count - 1 of the endless sequence of shuffled passes over range(n): a run that
    resumes finds its place without having stored it.

    >>> shuffled(3, 0, 4, seed=0) + shuffled(3, 4, 2, seed=0) == shuffled(3, 0, 6, seed=0)
    True
    >>> sorted(shuffled(3, 3, 3, seed=0))
    [0, 1, 2]
    """
    passes = {e: random.Random(f"{seed} {e}").sample(range(n), n)
              for e in range(start // n, (start + count - 1) // n + 1)}
    return [passes[i // n][i % n] for i in range(start, start + count)]


# --------------------------------------------------------------------------------------------------
# What a run takes.

def flops(model, layouts: list[Packed], loss_tokens: int) -> float:
    """Floating-point operations of forward and backward: 6 a layer parameter and token, the head on loss
    positions, causal attention once; nothing for what is computed again."""
    config, pairs, tokens = model.config, 0.0, 0
    for layout in layouts:
        P, branches = layout.prefix, [j - i for i, j in layout.spans]
        tokens += P + sum(branches)
        pairs += P * P / 2 + sum(b * P + b * b / 2 for b in branches)
    return (6 * sum(p.numel() for p in model.model.layers.parameters()) * tokens
            + 6 * config.vocab_size * config.hidden_size * loss_tokens
            + 12 * config.num_hidden_layers * config.num_attention_heads * head_dim(config) * pairs)


def matmul_rate(dtype: torch.dtype, device, times: int = 1) -> float:
    """Operations a second of large matrix products on this machine: what MFU is a share of."""
    n, seconds = 2048 * times if device.type == "cpu" else 8192, []
    a = torch.randn(n, n, device=device).to(dtype)
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def peak_memory_gb(world: World) -> float:
    """GiB: peak of the device on CUDA, of the process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def plan(model, args, packs: list[tuple[Packed, int]], acts: bool, reference: bool = False) -> dict:
    """Bytes a rank by part, their peak, and operations a step, printed for a run on args.plan ranks.

    model: on the meta device; packs: (layout, loss tokens) of one step; acts: whether a whole copy makes
    rollouts, for which --kv_gb is the most; reference: whether another waits in host memory. More than one
    rank means GPUs. Activations are counted as autograd keeps them for a Llama
    layer: 16 bytes a hidden unit (the two norms, in fp32), `width` bytes for the rest."""
    config = model.config
    device = torch.device("cuda" if torch.cuda.is_available() or args.plan > 1 else "cpu")
    width = compute_dtype(args.dtype, device).itemsize
    N, L, V = sum(p.numel() for p in model.parameters()), config.num_hidden_layers, config.vocab_size
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    HD, KD = (n * head_dim(config) for n in (config.num_attention_heads, config.num_key_value_heads))
    # of a token and layer
    kept = 16 * config.hidden_size + width * (4 * config.intermediate_size + 2 * (HD + KD))
    if hasattr(model.model.layers[0].self_attn, "q_norm"):
        kept += 3 * width * (HD + KD)

    def activations(layout):
        tokens = layout.spans[-1][1] if layout.spans else layout.prefix
        # [prefix | branch] of each branch
        copies = 2 * width * KD * (len(layout.spans) * layout.prefix + tokens - layout.prefix)
        if args.gradient_checkpointing:
            return L * width * config.hidden_size * tokens + kept * tokens + copies
        return L * (kept * tokens + copies)
    rows = min(512, max(n for _, n in packs))
    parts = {"masters (fp32)": 4 * N / args.plan, "AdamW moments": 8 * N / args.plan,
             "gradients": 4 * N / args.plan,
             "gathered weights": width * (2 * layer + N - L * layer) + 4 * (N - L * layer),
             "head on loss positions": 4 * V * (2 * config.hidden_size + 5 * rows),
             "activations": max(activations(layout) for layout, _ in packs)}
    held = sum(list(parts.values())[:2])
    update = sum(parts.values())
    if acts:
        parts |= {"rollout / reference copy": width * N, "KV cache, at most": args.kv_gb * 2**30}
    rollouts = held + sum(list(parts.values())[6:])
    host = 0.6 * 2**30 * (device.type == "cpu")  # Python and its libraries
    host += width * N * (device.type == "cpu" and reference)
    work = flops(model, [layout for layout, _ in packs], sum(n for _, n in packs))
    out = {"parameters": N, "bytes": parts, "peak_bytes": max(update, rollouts) + host, "flops": work,
           "flops_a_rank": work / args.plan, "ranks": args.plan}
    print(f"{N / 1e6:.1f} M parameters on {args.plan} x {device.type}; GiB a rank:")
    for name, size in parts.items():
        print(f"  {name:28} {size / 2**30:9.2f}")
    print(f"  {'peak':28} {out['peak_bytes'] / 2**30:9.2f}  (update {update / 2**30:.2f}, rollouts "
          f"{rollouts / 2**30:.2f}, beside {host / 2**30:.2f} of the process)")
    print(f"{work / 1e12:.2f} TFLOP a step and {out['flops_a_rank'] / 1e12:.2f} a rank, rollouts not counted")
    print(json.dumps(out))
    return out


# --------------------------------------------------------------------------------------------------
# The run's folder.

def start_run(args, world: World) -> Path:
    """Create the folder and write config.json: arguments, versions, data hash."""
    out = Path(args.out)
    if world.main and not (out / "config.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        commit = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], text=True,
                                capture_output=True).stdout.strip()
        config = {"command": Path(sys.argv[0]).name, "args": vars(args), "commit": commit,
                  "data_sha256": bfcl_env.data_sha256(), "world_size": world.size,
                  "device": str(world.device),
                  "versions": {name: version(name) for name in ("torch", "transformers", "bfcl-eval")}}
        write_json(out / "config.json", config)
    dist.barrier()
    return out


def pinned(out: Path, name: str, value: str, world: World) -> None:
    """Note a hash at the run's start. Errors: BfclError, on every rank, if a resumed run has another one."""
    path = out / f"{name}.json"
    if world.main and not path.exists():
        write_json(path, value)
    dist.barrier()
    if set(world.gather([value])) != {json.loads(path.read_text())}:
        raise BfclError(f"the {name} is not what the run in {out} began with: give a new folder with --out")


def write_json(path: Path, value) -> None:
    bfcl_env.write(path, json.dumps(value, indent=1) + "\n")


class Checkpointer:
    """checkpoints/step_000010/: masters, moments of AdamW and, as the mark that all is there, done.json.

    The distributed format, so that any number of ranks can read it. Written beside and renamed. It holds no
    random state, since every draw of a run is a function of (seed, step, ...). Kept: the newest `keep` and
    the one with the best score."""

    def __init__(self, out: Path, model, optimizer, keep: int, world: World):
        self.folder, self.model, self.optimizer = out / "checkpoints", model, optimizer
        self.keep, self.world = keep, world

    def _state(self) -> dict:
        state = {}
        for name, p in self.model.named_parameters():
            moments = self.optimizer.state[p]
            if not moments:  # before the first step
                moments |= {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                            "exp_avg_sq": torch.zeros_like(p)}
            state |= {name: p.detach()} | {f"{name}:{key}": value for key, value in moments.items()}
        return state

    def finished(self) -> list[dict]:
        """What the done.json of each whole checkpoint says, oldest first."""
        return [json.loads(path.read_text())
                for path in sorted(self.folder.glob("step_" + "[0-9]" * 6 + "/done.json"))]

    def save(self, step: int, score: list | None = None) -> None:
        final = self.folder / f"step_{step:06d}"
        partial, failed = final.with_suffix(".partial"), None
        try:
            dcp.save(self._state(), checkpoint_id=partial)
            if self.world.main:
                write_json(partial / "done.json", {"step": step, "score": score})
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
        except (OSError, dcp.api.CheckpointException) as error:
            failed = str(error).strip().splitlines()[-1]
        if failures := [text for text in self.world.gather([failed]) if text]:  # on any rank
            if self.world.main:
                shutil.rmtree(partial, ignore_errors=True)
            raise BfclError(f"the checkpoint of step {step} cannot be written to {self.folder}: "
                            f"{failures[0]}; older ones are untouched, make room and type the same command "
                            "again")
        if not self.world.main:
            return
        done = self.finished()
        kept = {c["step"] for c in done[-self.keep:]} | {c["step"] for c in self.best(done)}
        for old in (c["step"] for c in done if c["step"] not in kept):
            (self.folder / f"step_{old:06d}/done.json").unlink()  # first the mark, then the rest
            shutil.rmtree(self.folder / f"step_{old:06d}")

    def best(self, done: list[dict]) -> list[dict]:
        """The one with the best score, the later of equals; empty without scores."""
        return sorted((c for c in done if c["score"]), key=lambda c: (c["score"], c["step"]))[-1:]

    def load(self, best: bool = False) -> int:
        """Fill model and optimizer from the newest or the best; returns its step, 0 if there is none."""
        found = [0]
        if self.world.main:  # one rank looks
            for path in self.folder.glob("step_*"):  # what a kill left, while saving or removing
                if not (path / "done.json").exists() or path.suffix == ".partial":
                    shutil.rmtree(path)
            done = self.finished()
            found = [c["step"] for c in (self.best(done) if best else done[-1:])] or [0]
        dist.broadcast_object_list(found)
        if found[0]:
            dcp.load(self._state(), checkpoint_id=self.folder / f"step_{found[0]:06d}")
        return found[0]


class Interrupt:
    """Ctrl-C and SIGTERM ask for a checkpoint and a stop after the running step."""

    def __init__(self, world: World):
        self.world, self.asked = world, False
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, self)

    def __call__(self, *_):
        if self.world.main and not self.asked:
            print("\nstopping after this step, with a checkpoint", file=sys.stderr, flush=True)
        self.asked = True

    def everywhere(self) -> bool:
        """Whether any rank was asked."""
        return self.world.all_reduce(self.asked, dist.ReduceOp.MAX) > 0


class MetricsLogger:
    """One line a step in metrics.jsonl, the same numbers on one line of the console, and on request in
    Weights & Biases or TensorBoard. A resumed run drops the lines of steps that will be made again."""

    def __init__(self, out: Path, world: World, done: int, args):
        self.world, self.track, path, self.began = world, None, out / "metrics.jsonl", time.monotonic()
        if not world.main:
            return
        lines = path.read_text().splitlines()[:done] if path.exists() else []
        self.began -= json.loads(lines[-1])["time"] if lines else 0.0  # of the processes before
        bfcl_env.write(path, "".join(line + "\n" for line in lines))
        self.file = open(path, "a")
        if args.tracker == "wandb":
            import wandb
            wandb.init(project="rc-grpo", name=out.name, id=str(out).replace("/", "-"), resume="allow",
                       dir=out, config=vars(args))
            self.track = lambda step, metrics: wandb.log(metrics, step=step)
        elif args.tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out, purge_step=done + 1)
            self.track = lambda step, metrics: [writer.add_scalar(name, value, step)
                                                for name, value in metrics.items() if name != "eval/weights"]

    def log(self, step: int, total: int, metrics: dict, shown: list[str]) -> None:
        if self.world.main:
            line = {"step": step, **metrics, "time": time.monotonic() - self.began}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            values = " | ".join(f"{name.split('/')[-1]} {metrics[name]:.4g}"
                                for name in shown if name in metrics)
            tqdm.write(f"step {step}/{total} | {values}")
            if self.track:
                self.track(step, metrics)


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


def evaluate(policy: Policy, tasks, tokens: list[str | None], args, world: World) -> dict:
    """Success of sampled rollouts on `tasks` by reward token; the ranks share them. `policy` is whole."""
    jobs = [(i, token) for token in tokens for i in range(len(tasks))][world.rank::world.size]
    envs = [BfclEnv(tasks[i], args.docs, policy.style(args.style), args.protocol) for i, _ in jobs]
    sampled = rollout(policy, envs, [token for _, token in jobs], [(args.seed, 0, i, 0) for i, _ in jobs],
                      progress="validation" if world.main else None, **sampling(args))
    figures = score(world.gather(sampled))
    rewards = {f"eval/reward_{name}": figures[name]["reward"] for name in ("high", "low", "none")
               if name in figures}
    if {"high", "low"} <= set(figures):
        rewards["eval/mode_gap"] = figures["high"]["reward"] - figures["low"]["reward"]
    return {**rewards, "eval/n": len(tasks), "eval/weights": checksum(policy.model)[:12]}


def fitting_validation(policy: Policy, tasks, args) -> list:
    """The validation tasks that fit the context, since the others could only fail."""
    style = policy.style(args.style)
    tasks, left_out = split_fitting(
        policy, tasks, lambda task: BfclEnv(task, args.docs, style, args.protocol), args.max_len)
    if left_out:
        print(f"validation: all that fit: {len(tasks)} of {len(tasks) + left_out} tasks", flush=True)
    return tasks


def end_run(model, policy: Policy, out: Path, contract: dict, world: World, began: float, curves: list[str],
            hint: str) -> None:
    """Write out/model, a plain Hugging Face directory (fp32) with the reward tokens in its tokenizer and the
    contract for the next stage; the curves; what the run took. `began`: its start on the monotonic clock,
    `MetricsLogger.began`."""
    state = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor().detach()
        if world.main:
            state[name] = whole.cpu()
    if world.main:
        partial, final = out / "model.partial", out / "model"
        shutil.rmtree(partial, ignore_errors=True)
        if policy.model is not model:  # an acting copy: the export is fp32 and must say so
            for p in policy.model.parameters():
                p.data = torch.empty(0)
        policy.model.save_pretrained(partial, state_dict=state)
        policy.tokenizer.save_pretrained(partial)
        write_json(partial / CONTRACT, contract)
        plot_curves(out, curves)
        seconds = time.monotonic() - began
        write_json(out / "summary.json", {"seconds": seconds, "peak_memory_gb": peak_memory_gb(world)})
        partial.rename(final)  # last: a folder with model/ is a finished run
        print(f"wrote {final} (step {contract['step']}) after {seconds / 60:.1f} minutes; next: {hint} "
              f"{final}")
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


def reward_of(task, turns: list[list[Call]], kind: str) -> float:
    """The reward of these calls, without writing or rendering them."""
    return judge(task, [[[*map(str, calls)]] if calls else [] for calls in turns]).reward(kind)


def _known_docs(task) -> dict[str, dict]:
    """Function name -> its parameters; without those that a turn withholds."""
    withheld = sum(task.missed.values(), [])
    return {doc["name"]: doc["parameters"] for doc in task.docs if doc["name"] not in withheld}


def with_reads(task, turns: list[list[Call]], reward: str, rng: random.Random) -> list[list[Call]]:
    """The calls with up to two looks around that do no harm: else one call too many would mean a failure. Not
    by functions that are called anyway, since a result that is needed may come from any call."""
    named = {call.name for calls in turns for call in calls}
    reads = [name for name, parameters in _known_docs(task).items()
             if not parameters["required"] and name not in named]
    for _ in range(rng.randrange(3)):
        t = rng.choice([t for t, calls in enumerate(turns) if calls])
        i = rng.randrange(len(turns[t]))  # never last: the closing message states what was asked for
        more = [*turns[:t], [*turns[t][:i], Call(rng.choice(reads)), *turns[t][i:]], *turns[t + 1:]]
        turns = more if reward_of(task, more, reward) == 1 else turns
    return turns


# Some mistakes shorten a conversation and some lengthen it, by about as many calls: length tells nothing.
MISTAKES = ("argument", "function", "invented", "missing", "stop", "order", "repeat", "guess")


def corrupt(task, turns: list[list[Call]], kind: str, rng: random.Random) -> list[list[Call]]:
    """One kind of mistake that models really make, in every other turn on average, as far as it can be made
    there: who fails, seldom fails only once. Nothing here says that the result fails: judge it."""
    wrong = [_mistake(task, turns, t, kind, rng) for t in range(len(turns))]
    able = [t for t, calls in enumerate(turns) if wrong[t] != calls]
    chosen = {t for t in able if rng.random() < len(turns) / len(able) / 2} or {*able[:1]}
    return [wrong[t] if t in chosen else calls for t, calls in enumerate(turns)]


def _mistake(task, turns, t: int, kind: str, rng) -> list[Call]:
    """The calls of turn t with a mistake; as they are where this kind cannot be made."""
    calls, so_far = turns[t], [call for turn in turns[:t + 1] for call in turn]
    if kind == "guess" and not calls:  # it should ask, but makes the next turn's calls with what it has
        told = "".join(text or "" for text in task.turns[:t + 1])
        return [_other_function(task, c, rng) if c.name in task.missed.get(t + 1, []) else
                Call(c.name, (), {k: v if str(v) in told else _other_value(v, so_far, rng)
                                  for k, v in c.kwargs.items()})
                for turn in turns[t + 1:t + 2] for c in turn]
    if kind == "guess" or not calls:
        return calls
    i = rng.randrange(len(calls))
    call, rest = calls[i], calls[i + 1:]
    match kind:
        case "argument" if call.kwargs:
            key = rng.choice(list(call.kwargs))
            call = Call(call.name, (), {**call.kwargs, key: _other_value(call.kwargs[key], so_far, rng)})
        case "function":
            call = _other_function(task, call, rng)
        case "invented":
            words = re.sub("(?<=[a-z])(?=[A-Z])", "_", call.name).lower().split("_")
            verb = rng.choice(["get", "set", "find", "make", "check", "update"])
            name = "_".join([verb, *(words[1:] or words)])
            call = call if name in task.functions else Call(name, (), call.kwargs)
        case "missing" if rest:
            return calls[:i] + rest
        case "stop":  # after the first calls; a turn without any would give failures away
            return calls[:-1] or calls
        case "order":
            return calls[:i] + rest[:1] + [call] + rest[1:]
        case "repeat":
            return calls + [rng.choice(so_far)]
    return calls[:i] + [call] + rest


def _other_function(task, call: Call, rng) -> Call:
    """Another function that takes as many arguments, with the values of the call."""
    fits = [Call(name, (), dict(zip(parameters["properties"], call.kwargs.values())))
            for name, parameters in _known_docs(task).items() if name != call.name
            and len(parameters["required"]) <= len(call.kwargs) <= len(parameters["properties"])]
    return rng.choice(fits or [call])


def _other_value(value, so_far: list[Call], rng):
    """Another value of the same type, from earlier in the conversation where there is one."""
    others = [v for call in so_far for v in call.kwargs.values() if type(v) is type(value) and v != value]
    if others:
        return rng.choice(others)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + rng.choice([1, 10, 100])
    return value + "_new" if isinstance(value, str) else [value]


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


def written_pair(policy: Policy, task, args, used: Counter, token_of) -> list[Trajectory]:
    """[success, failure], the same up to the first mistake, judged from their text. Of the kinds of mistake
    the least `used` is tried first."""
    rng, style = random.Random(f"{args.seed} {task.id}"), policy.style(args.style)

    def play(turns, label):
        env = BfclEnv(task, args.docs, style, args.protocol)
        said = messages_for(task, turns, style, args.protocol)
        return record(policy, env, said, token_of(label), args.reward)
    gold = with_reads(task, gold_calls(task), args.reward, rng)
    good = play(gold, "high")
    if good.reward != 1:
        raise BfclError(f"the ground truth of {task.id} does not pass: {good.verdict}")
    for kind in sorted(MISTAKES, key=lambda kind: used[kind]):
        for _ in range(8):
            turns = corrupt(task, gold, kind, rng)
            if reward_of(task, turns, args.reward) < 1 and (bad := play(turns, "low")).reward < 1:
                used[kind] += 1
                bad.verdict["mistake"] = kind
                return [good, bad]
    raise BfclError(f"found no failing variant of {task.id}")


def sampled_pairs(policy: Policy, tasks, args, limit: int, token_of) -> tuple[list, int, str]:
    """[success, failure] pairs of a model's own rollouts, by their verdicts: of one task while it has both,
    the rest drawn. Only the prompt is rendered anew, since it holds the token."""
    by_id, style = {task.id: task for task in tasks}, policy.style(args.style)
    slots, seen, read, left_out = {}, Counter(), Counter(), 0

    @functools.cache
    def opening(task, token):
        return policy.chat.opening(BfclEnv(by_id[task], args.docs, style, args.protocol).messages(), token)
    for file, (n, line) in ((file, row) for file in args.rollouts for row in enumerate(open(file), 1)):
        try:
            t = Trajectory.from_json(line)
            if t.task not in by_id or 1 not in t.mask:
                continue
            old, verdict = opening(t.task, t.reward_token), bfcl_env.Verdict(**t.verdict)
            if t.ids[:len(old)] != old or 1 in t.mask[:len(old)] or len(t.mask) != len(t.ids):
                raise ValueError("another prompt")
        except (KeyError, TypeError, ValueError):
            raise BfclError(f"{file}, line {n}: not a rollout with this run's prompt; give a run's "
                            "rollouts/*.jsonl and its --model, --docs, --style and --protocol") from None
        reward = verdict.reward(args.reward)
        token = token_of("high" if reward == 1 else "low")
        new, said = opening(t.task, token), len(old)
        t = dataclasses.replace(t, reward_token=token, reward=reward, ids=new + t.ids[said:],
                                mask=[0] * len(new) + t.mask[said:], logps=[0.0] * (len(new + t.ids) - said))
        if len(t.ids) > limit:
            left_out += 1
            continue
        read[file] += 1
        seen[t.task, reward == 1] += 1
        slots.setdefault((t.task, seen[t.task, reward == 1]), [None, None])[reward < 1] = t
    draw, pairs = random.Random(args.seed), [slot for slot in slots.values() if None not in slot]
    rest = [[slot[i] for slot in slots.values() if None in slot and slot[i]] for i in (0, 1)]
    pairs += map(list, zip(*(draw.sample(side, len(side)) for side in rest)))
    if not pairs:
        raise BfclError(f"--rollouts has {len(rest[0])} successes and {len(rest[1])} failures in the chosen "
                        f"tasks, {left_out} too long: it needs both; give more files, or other tasks")
    return pairs, left_out, ", ".join(f"{file} ({read[file]} trajectories)" for file in args.rollouts)


def stage1_data(policy: Policy, tasks, args) -> tuple[list[list[Trajectory]], int, str]:
    """[success, failure] pairs with the tokens of --arm, written or sampled; how many (pairs or rollouts) did
    not fit in `--max_len`; what data it is. The sft arm has only the successes of the same pairs."""
    limit = min(args.max_len, policy.max_len, args.tokens_per_microbatch)
    draw, used = random.Random(f"{args.seed} tokens"), Counter()

    def token_of(label):
        return label if args.arm == "rctp" and draw.random() >= args.no_token else None
    if args.rollouts:
        pairs, left_out, source = sampled_pairs(policy, tasks, args, limit, token_of)
    else:
        # Guesses, which only tasks with an empty turn allow, catch up at the end.
        order = sorted(tasks, key=lambda task: [] in task.gold)
        bar = tqdm(order, desc="data", unit="task", disable=None, dynamic_ncols=True)
        written = [written_pair(policy, task, args, used, token_of) for task in bar]
        pairs = [pair for pair in written if max(len(t.ids) for t in pair) <= limit]
        left_out, source = len(written) - len(pairs), "gold and corrupted calls"
    return [pair[:1] if args.arm == "sft" else pair for pair in pairs], left_out, source


def data_statistics(trajectories: list[Trajectory]) -> str:
    """Sizes by label, reward tokens and kinds of mistakes, as lines of text."""
    lines, failures = [], [t for t in trajectories if t.reward < 1]
    for label, ts in (("successes", [t for t in trajectories if t.reward == 1]), ("failures", failures)):
        sizes = {"tokens": [len(t.ids) for t in ts], "with loss": [sum(t.mask) for t in ts],
                 "messages": [t.steps for t in ts], "calls": [t.calls for t in ts]}
        spread = [f"{name} {sum(n) / len(n):.1f} (at most {max(n)})" for name, n in sizes.items() if n]
        lines.append(", ".join([f"{len(ts)} {label}", *spread]))
    tokens = Counter(t.reward_token or "none" for t in trajectories)
    mistakes = Counter(t.verdict.get("mistake") or t.verdict["error_type"] or t.reason for t in failures)
    return "\n".join(lines + [f"{name}: " + ", ".join(f"{value} {n}" for value, n in sorted(counts.items()))
                              for name, counts in (("reward tokens", tokens), ("mistakes", mistakes))])


def marked(t: Trajectory, tokenizer) -> str:
    """The trajectory as text, what carries loss in [[double brackets]], a long prompt folded."""
    runs = itertools.groupby(zip(t.mask, t.ids), key=lambda place: place[0])
    texts = [(said, piece([i for _, i in run], bool(said), tokenizer, colour=False)) for said, run in runs]
    return "".join(f"[[{text}]]" if said else text for said, text in texts)


# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def mean_loss(model, packs: list[Pack], banned, world: World) -> float:
    """Cross-entropy a loss token; each rank takes its share of the packs."""
    mine = with_idle(packs[world.rank::world.size], world)
    total = sum(-model.token_logprobs(p, banned).sum().item() for p in mine)
    return world.all_reduce(total) / sum(len(p.target) for p in packs)


def main(args):
    if args.plan:
        policy, tasks = load_policy(args.model, device="meta"), bfcl_env.select_tasks(args)
        some = tasks[::math.ceil(len(tasks) / max(32, args.batch // 2))]  # whose lengths stand for all
        batch = [t for pair in stage1_data(policy, some, args)[0] for t in pair][:args.batch]
        packs = [(p.layout, len(p.target)) for p in pack(batch, args.tokens_per_microbatch)]
        plan(policy.model, args, packs, acts=bool(args.eval_every))
        return
    world = start_world()
    out = start_run(args, world)
    tasks = bfcl_env.select_tasks(args)
    val_tasks = bfcl_env.validation_tasks(args, {task.id for task in tasks})
    torch.manual_seed(args.seed)  # of the tiny model's weights, nothing else draws from it
    policy = load_policy(args.model, dtype=torch.float32, device="cpu")  # sharding moves each rank's part
    banned, style = policy.banned.to(world.device), policy.style(args.style)
    dtype = compute_dtype(args.dtype, world.device)

    # steps 1 and 2: data
    pairs, left_out, source = stage1_data(policy, tasks, args)
    if not pairs:
        raise BfclError(f"none of the {len(tasks)} tasks fits --max_len {args.max_len} and "
                        f"--tokens_per_microbatch {args.tokens_per_microbatch}: raise them or take smaller "
                        "--docs")
    written = argparse.Namespace(**{**vars(args), "rollouts": []})
    val_packs = pack([t for pair in stage1_data(policy, val_tasks, written)[0] for t in pair],
                     args.tokens_per_microbatch)
    val_tasks = fitting_validation(policy, val_tasks, args) if val_tasks else []
    if val_tasks and not val_packs:
        raise BfclError(f"no validation trajectory fits --max_len {args.max_len}: raise it or add "
                        "--eval_every 0")
    data = [t for pair in pairs for t in pair]
    pinned(out, "data", hashlib.sha256(str([dtype, *(t.ids for t in data)]).encode()).hexdigest(), world)
    steps = args.steps or args.epochs * math.ceil(2 * len(pairs) / args.batch)
    if args.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
    model = shard(policy.model, dtype, world)
    acting = load_policy(args.model, dtype=dtype, device=str(world.device)) if val_tasks else None
    if acting:  # a whole copy for rollouts, without memory between them
        release_weights(acting.model)
    optimizer = make_optimizer(model, args.lr)
    checkpoints = Checkpointer(out, model, optimizer, args.keep, world)
    done = checkpoints.load()
    logger, interrupt = MetricsLogger(out, world, done, args), Interrupt(world)
    rate, skipped, in_a_row = matmul_rate(dtype, world.device), 0, 0
    if world.main:
        print(f"{marked(data[-1], policy.tokenizer)}\n\ndata: {source}; {left_out} too long\n"
              f"{data_statistics(data)}")
        print(f"stage 1: {args.model} | docs {args.docs}, style {style} | all that fit: {len(pairs)} of "
              f"{len(tasks)} tasks | arm {args.arm}, {len(data)} trajectories | {steps} steps of "
              f"{args.batch} trajectories | {dtype} on {world.size} x {world.device.type} | {out}"
              + f" | from step {done + 1}" * (done > 0), flush=True)
    bar = tqdm(total=steps, initial=done, desc="stage 1", unit="step", disable=not world.main,
               dynamic_ncols=True)
    for step in range(done + 1, steps + 1):
        start = time.monotonic()
        # step 3: epochs follow each other, pairs stay together and share a prefix; every rank takes its share
        per_pair, position = len(pairs[0]), (step - 1) * args.batch
        end = position + args.batch
        order = shuffled(len(pairs), position // per_pair, (end - 1) // per_pair - position // per_pair + 1,
                         args.seed)
        batch = [t for i in order for t in pairs[i]][position % per_pair:][:args.batch]
        packs = pack(batch, args.tokens_per_microbatch)
        count = sum(len(p.target) for p in packs)  # one normaliser for the update, known before any forward

        # step 4: L = -1/count * sum of log pi(a_t | h_t, r)
        def loss_of(p):
            return -model.token_logprobs(p, banned).sum() / count
        lr = learning_rate(step, args.lr, args.warmup * steps, steps, decay=steps // 5)
        optimizer.param_groups[0]["lr"] = lr
        norm, loss = update(model, optimizer, packs[world.rank::world.size], loss_of, world,
                            args.max_grad_norm)
        skipped += not math.isfinite(norm)
        seconds, tokens = time.monotonic() - start, sum(len(p.ids) for p in packs)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": lr,
                   "num_tokens": tokens, "skipped_updates": skipped, "step_time": seconds,
                   "perf/throughput": tokens / seconds,
                   "perf/mfu": flops(model, [p.layout for p in packs], count) / seconds / rate / world.size,
                   "perf/max_memory_allocated_gb": peak_memory_gb(world)}
        if step == 1 and world.main:
            tqdm.write(f"about {seconds * steps / 60:.1f} minutes for {steps} steps")

        # the proof that the token works: validation loss, and what rollouts under each token achieve
        best = None
        if val_tasks and (step % args.eval_every == 0 or step == steps):
            copy_weights(acting.model, model)
            metrics |= {"eval/loss": mean_loss(model, val_packs, banned, world)}
            metrics |= evaluate(acting, val_tasks, TOKENS[args.arm], args, world)
            release_weights(acting.model)
            best = [metrics[f"eval/reward_{TOKENS[args.arm][0] or 'none'}"], -metrics["eval/loss"]]
        logger.log(step, steps, metrics,
                   ["loss", "grad_norm", "perf/throughput", "perf/mfu", "step_time", "eval/loss",
                    "eval/reward_high", "eval/reward_low", "eval/reward_none"])
        bar.update()
        in_a_row = skipped_in_a_row(in_a_row, norm, step)
        stop = interrupt.everywhere()
        if stop or best or args.save_every and step % args.save_every == 0:
            checkpoints.save(step, best)
        if stop:
            raise BfclError(f"stopped after step {step}, as asked: the same command goes on from there")
    bar.close()

    # step 5: the model, the best by validation where there was one
    step = checkpoints.load(best=True) or steps
    contract = {"stage": "rctp", "step": step, "base_model": policy.contract.get("base_model", args.model),
                "docs": args.docs, "style": style, "protocol": args.protocol, "reward_ids": policy.reward_ids,
                "template_sha256": policy.chat.fingerprint(),
                "arm": args.arm, "tokens": sorted({t.reward_token or "none" for t in data}), "data": source,
                "data_sha256": bfcl_env.data_sha256(), "tasks": sorted({t.task for t in data})}
    end_run(model, policy, out, contract, world, logger.began, ["loss", "grad_norm", "eval/loss",
            "eval/reward_high", "eval/reward_low", "eval/reward_none"], "torchrun rl_rcgrpo.py --init")


def run_main(main, args):
    """Expected errors as one sentence; so a full disk, wherever it shows."""
    try:
        main(args)
    except BfclError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        sys.exit(f"error: cannot write to {args.out} ({error.strerror}): make room and type the same command "
                 "again")


if __name__ == "__main__":
    run_main(main, ARGS)
