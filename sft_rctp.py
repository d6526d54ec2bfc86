"""The policy learning; stage 1: Reward-Conditioned Trajectory Policy fine-tuning (RCTP-FT, arXiv 2602.03025).

    torchrun sft_rctp.py                                  # the default model, training part of the split
    torchrun --nproc_per_node 8 sft_rctp.py --model Qwen/Qwen2.5-7B-Instruct --tool_docs full

Stage 1 teaches one policy both to succeed and to fail, and which of the two from one token in the prompt:

    1. for each task: play the gold calls in the world, and a corrupted copy that the judge has seen failing
    2. render both by the same code, `<|high_reward|>` on the first, `<|low_reward|>` on the second, 1:1
    3. pack trajectories that share a prompt: [prefix | branch | branch ...], the prefix computed once
    4. minimise the cross-entropy of what the assistant said: L = -E[ sum_t log pi(a_t | h_t, r) ]
    5. write the model as a plain Hugging Face directory, the reference of stage 2

The first half of this file is the training engine of both stages: ranks, the update, the run's folder.
"""
import argparse
import atexit
import contextlib
import datetime
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import bfcl_env

if __name__ == "__main__":
    bfcl_env.fix_hash_seed()

import matplotlib
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor
from tqdm import tqdm

import rollout as sampler
from bfcl_env import BfclError, Call, Episode, judge, write_calls
from rollout import (STAGE_INFO, StageInfo, Pack, Trajectory, check_model, checksum, compute_dtype, load_policy,
                     mean_reward, number, pack, rollout, run_main, token_logprobs, transcript)

# Two transcriptions of the paper's hyper-parameters.
PRESETS = {"appendix": dict(lr=1e-5, batch_size=16, epochs=5), "notes": dict(lr=5e-5, batch_size=32, epochs=3)}
ARM_REWARD_TOKENS = {"rctp": ["high", "low", None], "mixed": [None], "sft": [None]}  # what an arm's prompts carry
MICROBATCH = {"cpu": 8192, "cuda": 16384}  # tokens a forward, by default
WARMUP = 0.05  # share of the steps in which the learning rate rises
MAX_GRAD_NORM = 1.0  # larger gradients are scaled down to it
# Flags that change no weight, and names of what is compared by its content.
IGNORED_ON_RESUME = ("out", "model", "rollouts", "save_every", "save_total_limit", "tracker")
CONSOLE_METRICS = ("loss", "reward", "rc/reward_high", "rc/reward_low", "frac_reward_zero_std", "rc/var_within_tokens",
         "rc/var_between_tokens", "kl", "entropy", "grad_norm", "eval/reward_high", "eval/reward_low",
         "eval/reward_none", "step_time")  # on the console and in curves.png


# ---- Ranks and sharding ------------------------------------------------------------------------------------
@dataclass
class Distributed:
    """Who this process is among those of a run. Plain `python` is one of one; every path is the same."""
    rank: int
    size: int
    device: torch.device
    lock: object = None  # an open file, see `lock_run_dir`

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
        """The lists of all ranks, one after the other."""
        parts = [None] * self.size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def broadcast(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def raise_together(self, complaint: str | None):
        """Errors: BfclError on every rank if any complains. One that failed alone would hang the rest."""
        complaints = [text for text in self.gather([complaint]) if text]
        if complaints:
            raise BfclError(complaints[0])


def init_distributed() -> Distributed:
    """Errors: BfclError if a launcher other than torchrun left out which GPU is this rank's, or if ranks share
    a GPU."""
    if ("RANK" in os.environ) != ("LOCAL_RANK" in os.environ):
        raise BfclError("only one of RANK and LOCAL_RANK is set: start the ranks with torchrun, or set both")
    options = {}  # from torchrun, by environment variables
    if "RANK" not in os.environ:  # plain `python`
        options = dict(store=dist.HashStore(), rank=0, world_size=1)
    device, backend = local_device(), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Without device_id NCCL starts at its first collective, after the check below, which says what to type.
        backend = "cpu:gloo,cuda:nccl"
    # Ranks end their rollouts at different times: hours, not the default 10 minutes, may lie between them.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=7), **options)
    distributed = Distributed(dist.get_rank(), dist.get_world_size(), device)
    if device.type == "cuda":
        gpus = distributed.gather([str(torch.cuda.get_device_properties(device).uuid)])
        if len(set(gpus)) < len(gpus):
            raise BfclError(f"{len(gpus)} ranks share {len(set(gpus))} GPUs: start one rank per GPU, with "
                            "--nproc_per_node of torchrun")
    return distributed


def local_device():
    """This rank's GPU, or the CPU. Errors: BfclError if there is none with the number of LOCAL_RANK."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if count == 1 and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        index = 0  # the launcher shows every rank one GPU, its own
    if index >= count:
        raise BfclError(f"LOCAL_RANK is {index}, but {count} GPUs are visible: give --nproc_per_node {count}, or "
                        "where each rank sees its own GPU alone, set LOCAL_WORLD_SIZE")
    return torch.device("cuda", index)


def synced_time(device):
    """Seconds, after what the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def use_gradient_checkpointing(model, flag):
    """What --gradient_checkpointing means; without it 7B do not fit on a 141 GB card beside their moments."""
    return flag == "on" or flag == "auto" and model.num_parameters() > 1e9


def shard_model(policy, args, dtype, distributed):
    """(model, optimizer) to train a policy that lies in fp32 on the host: FSDP2 over all ranks, each moves
    its part; fp32 masters, `dtype` compute, fp32 reduction. The weights are those of rank 0, others need
    none. `token_logprobs` becomes a method.

    AdamW without weight decay; beta2 0.95, since at 0.999 a short run never forgets its large first
    gradients, and its steps stay small."""
    model = policy.model
    if use_gradient_checkpointing(model, args.gradient_checkpointing):
        # The second is its name in older versions of transformers.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    whole = {name: p.detach() for name, p in model.named_parameters()}
    mesh = torch.distributed.init_device_mesh(distributed.device.type, (distributed.size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in [*model.model.layers, model]:  # a layer's weights are gathered when it runs
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    for name, p in model.named_parameters():
        source = whole.pop(name).to(distributed.device)  # counts on rank 0 only
        p.detach().to_local().copy_(distribute_tensor(source, mesh, p.placements).to_local())
    model.token_logprobs = types.MethodType(token_logprobs, model)
    register_fsdp_forward_method(model, "token_logprobs")  # calls inner modules: gather the root's weights
    return model.train(), torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95),
                                            weight_decay=0.0, fused=True)


@torch.no_grad()
def load_full_weights(target, model, kept=None):
    """Fill the whole model `target`, one parameter at a time, from the sharded `model`, or from the shards of
    it that `offload_shards` has put aside."""
    torch.cuda.empty_cache()  # blocks of an update, into which no whole parameter fits
    for p, (name, shard) in zip(target.parameters(), model.named_parameters(), strict=True):
        if kept:
            shard = torch.empty_like(shard, dtype=p.dtype)
            shard.to_local().copy_(kept[name])
        whole = shard.full_tensor()
        if p.shape != whole.shape:  # it was released
            p.data = torch.empty(whole.shape, dtype=p.dtype, device=p.device)
        p.copy_(whole)  # in the target's dtype


def offload_shards(model, dtype):
    """This rank's shards in host memory: views of one flat buffer. Where a GPU is, its pages are pinned, so
    that the GPU fetches them quickly; torch's own pinned blocks would be rounded up to powers of two. They
    stay pinned as long as the process lives."""
    shards = {name: p.detach().to_local() for name, p in model.named_parameters()}
    flat = torch.empty(sum(shard.numel() for shard in shards.values()), dtype=dtype)  # [weights of a rank]
    if any(shard.is_cuda for shard in shards.values()):
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
    kept, end = {}, 0
    for name, shard in shards.items():
        start, end = end, end + shard.numel()
        kept[name] = flat[start:end].view(shard.shape).copy_(shard)
    return kept


def free_weights(model):
    """Give the memory of a whole model back until the next `load_full_weights`, and what rollouts left: their
    blocks fit no update."""
    for p in model.parameters():
        p.data = p.data.new_empty(0)
    torch.cuda.empty_cache()  # does nothing without a GPU


# ---- The update --------------------------------------------------------------------------------------------
def pad_packs(packs: list[Pack], distributed) -> list[Pack]:
    """The packs, and as many idle ones as another rank has more: sharded forwards are collective, so every
    rank makes the same number."""
    count = int(distributed.all_reduce(max(1, len(packs)), dist.ReduceOp.MAX))
    return packs + [sampler.dummy_pack(distributed.device)] * (count - len(packs))


def optimizer_step(model, optimizer, packs: list[Pack], loss_of, distributed) -> tuple[float, float]:
    """One optimizer step over this rank's packs, made as many on every rank by `pad_packs`. Returns the
    gradient's norm and the loss, over all ranks; if one is not finite the step is skipped, the norm is NaN.

    loss_of(pack) -> scalar whose sum over the packs of all ranks is the loss: the gradient depends neither on
    how the packs are cut nor on how many ranks there are."""
    total = 0.0
    for p in packs:
        loss = loss_of(p)
        total += loss.item()  # of this rank
        (loss * distributed.size).backward()  # FSDP averages over ranks, this is a sum
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).full_tensor().item()
    total = distributed.all_reduce(total)
    if math.isfinite(total + norm):  # the same numbers on every rank
        optimizer.step()
    else:
        norm = math.nan
    optimizer.zero_grad()  # also of a step that was skipped
    return norm, total


def get_lr(step, peak, total, decay=0):
    """Of step 1, 2, ..., total: it rises over WARMUP, stays, falls towards 0 in the last `decay` steps."""
    return peak * min(1.0, step / max(1, int(WARMUP * total)), (total - step + 1) / max(1, decay))


def epoch_shuffle(n, start, count, seed) -> list[int]:
    """Items start to start + count - 1 of the endless sequence of shuffled passes over range(n): a run that
    resumes finds its place without having stored it.

    >>> epoch_shuffle(3, 0, 4, seed=0) + epoch_shuffle(3, 4, 2, seed=0) == epoch_shuffle(3, 0, 6, seed=0)
    True
    >>> sorted(epoch_shuffle(3, 3, 3, seed=0))
    [0, 1, 2]
    """
    order, first = [], start // n
    for one in range(first, (start + count - 1) // n + 1):  # the passes that they are in
        order += random.Random(f"{seed} {one}").sample(range(n), n)
    return order[start - first * n:][:count]


def peak_memory_gb(device):
    """GiB: peak of the device on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---- The run's folder --------------------------------------------------------------------------------------
def atomic_write(path, text):
    """Written beside and renamed: a reader never sees half a file. What is no text becomes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # what a kill may leave
    partial.write_text(text if isinstance(text, str) else json.dumps(text, indent=1, default=str))
    partial.replace(path)


def lock_run_dir(args, distributed):
    """Make the folder --out, note in its config.json with what the run is made, and keep others out as long
    as this process lives: a command typed twice, or the workers that a killed torchrun leaves behind.
    Errors: BfclError, on every rank."""
    out, complaint = Path(args.out), None
    if distributed.is_main:
        out.mkdir(parents=True, exist_ok=True)
        distributed.lock = open(out / ".lock", "w")  # as long as it is open; the kernel closes it in any case
        try:
            fcntl.flock(distributed.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            complaint = f"another process is at work in {out}: wait for it, stop it, or give another --out"
    distributed.raise_together(complaint)
    work = [*out.glob("metrics.jsonl"), *out.glob("*.rank*.jsonl")]
    begun = any(path.stat().st_size for path in work)
    if distributed.is_main and begun:
        flags = json.loads((out / "config.json").read_text())["args"]
        if flags.keys() != vars(args).keys():
            complaint = f"{out} holds a run of another version of this code: give a new folder with --out"
    distributed.raise_together(complaint)
    if distributed.is_main and not begun:  # nothing was done yet: begin anew
        commit = ""
        with contextlib.suppress(OSError):  # no git on this machine
            commit = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], text=True,
                                    capture_output=True).stdout.strip()
        versions = {name: version(name) for name in ("torch", "transformers", "bfcl-eval")}
        atomic_write(out / "config.json", {"args": vars(args), "commit": commit, "versions": versions,
                                    "device": f"{distributed.size} x {distributed.device}"})
    return out


def check_same_run(out, distributed, facts):
    """Decide whether the folder holds this same run: facts that are new are noted in its config.json, those
    that stand there must be the same. Errors: BfclError on every rank, with what differs."""
    path, facts = out / "config.json", json.loads(json.dumps(facts))  # as they will be read back
    config = json.loads(path.read_text()) if distributed.is_main else None
    first, config = distributed.broadcast((facts, config))  # all ranks must agree with it
    expected, complaint = {**first, **config.get("same", {})}, None
    differ = [f"{k}: {expected[k]!r} there, {v!r} here" for k, v in facts.items() if v != expected[k]]
    if differ:
        complaint = (f"{out} holds another run ({'; '.join(differ)}): give a new folder with --out, or what "
                     "that run began with to go on with it")
    distributed.raise_together(complaint)
    if distributed.is_main:
        atomic_write(path, {**config, "same": expected})


def begin_run(args, distributed):
    """Claim the run's folder, for a new run or the same one again."""
    if args.tracker != "none" and not importlib.util.find_spec(args.tracker):
        raise BfclError(f"--tracker {args.tracker}: pip install {args.tracker}")
    out = lock_run_dir(args, distributed)
    settings = {name: value for name, value in vars(args).items() if name not in IGNORED_ON_RESUME}
    check_same_run(out, distributed, settings)
    return out


@dataclass
class Checkpointer:
    """checkpoints/step_000010/: masters, moments of AdamW and, as the mark that all is there, done.json.

    The distributed format, so that any number of ranks can read it. Written beside and renamed. It holds no
    random state, since every draw of a run is a function of (seed, step, ...). The newest `save_total_limit` stay."""

    folder: Path
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    save_total_limit: int
    distributed: Distributed

    def _tensors(self):
        tensors = {}
        for name, p in self.model.named_parameters():
            moments = self.optimizer.state[p]
            if not moments:  # before the first step
                moments["step"] = torch.zeros((), device=p.device)
                moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            tensors[name] = p.detach()  # of each rank its part; dcp puts them together
            for key, value in moments.items():
                tensors[f"{name}:{key}"] = value
        return tensors

    def complete(self) -> list[Path]:
        """Folders of the checkpoints that are complete, oldest first."""
        return sorted(path.parent for path in self.folder.glob("step_??????/done.json"))

    def save(self, step, state):
        """state: what a resumed run needs to know beside the tensors. Errors: BfclError."""
        final = self.folder / f"step_{step:06d}"
        partial = final.with_suffix(".partial")
        try:
            dcp.save(self._tensors(), checkpoint_id=partial)
            if self.distributed.is_main:
                atomic_write(partial / "done.json", {"step": step, **state})
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
        except (OSError, dcp.api.CheckpointException) as error:
            raise BfclError(f"the checkpoint of step {step} cannot be written to {self.folder}: "
                            f"{str(error).strip().splitlines()[-1]}; older ones are untouched, make room and "
                            "type the same command again")
        for old in self.complete()[:-self.save_total_limit] if self.distributed.is_main else []:
            (old / "done.json").unlink()  # first the mark, then the rest
            shutil.rmtree(old)

    def load(self):
        """Fill model and optimizer from the newest; returns {"step": 10, **state}, or step 0 without one."""
        newest = []
        if self.distributed.is_main:  # one rank looks
            for path in self.folder.glob("step_*"):  # what a kill left, while saving or removing
                if path not in self.complete():
                    shutil.rmtree(path)
            newest = self.complete()[-1:]
        newest = self.distributed.broadcast(newest)
        if not newest:
            return {"step": 0}
        dcp.load(self._tensors(), checkpoint_id=newest[0])
        return json.loads((newest[0] / "done.json").read_text())


class MetricsLogger:
    """One line a step in metrics.jsonl, the same numbers on one line of the console, and on request in
    Weights & Biases or TensorBoard. A resumed run drops the lines of steps that will be made again."""

    def __init__(self, out, done, args):
        self.path, self.track = out / "metrics.jsonl", lambda step, metrics: None
        lines = self.path.read_text().splitlines(keepends=True)[:done] if done else []  # one a step
        atomic_write(self.path, "".join(lines))
        if args.tracker == "wandb":
            import wandb
            name = str(out).replace("/", "-")
            wandb.init(project="rc-grpo", id=name, dir=out, config=vars(args), resume="allow")
            self.track = lambda step, metrics: wandb.log(metrics, step=step)
        elif args.tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out, purge_step=done + 1)
            atexit.register(writer.close)  # else what it has not written yet is lost
            self.track = lambda step, metrics: [writer.add_scalar(name, x, step)
                                                for name, x in metrics.items()]

    def log(self, step, total, metrics):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        values = " | ".join(f"{name.split('/')[-1]} {metrics[name]:.4g}" for name in CONSOLE_METRICS if name in metrics)
        tqdm.write(f"step {step}/{total} | {values}")
        self.track(step, metrics)


def plot_curves(out):
    """curves.png from metrics.jsonl, one panel per metric of CONSOLE_METRICS that was logged."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]  # one a step
    names = [name for name in CONSOLE_METRICS if any(name in line for line in lines)]
    figure, axes = plt.subplots(len(names), 1, sharex=True, squeeze=False, layout="constrained",
                                figsize=(6, 1.5 * len(names)))
    for axis, name in zip(axes[:, 0], names):
        axis.plot([line["step"] for line in lines], [line.get(name) for line in lines], ".-")
        axis.set_title(name)
    figure.savefig(out / "curves.png")
    plt.close(figure)


class TrainLoop:
    """The loop around the steps of a training run: goes on from the newest checkpoint, logs, saves, and stops
    with a checkpoint after the running step when Ctrl-C or SIGTERM asks for it. The same run, if it is
    finished, ends the process."""

    def __init__(self, out, args, model, optimizer, total, distributed):
        if (out / "model").exists():  # written last, see `end`
            distributed.print0(f"the run in {out} is finished: its model is {out}/model")
            sys.exit()
        self.out, self.args, self.model, self.total, self.distributed = out, args, model, total, distributed
        self.checkpoints = Checkpointer(out / "checkpoints", model, optimizer, args.save_total_limit, distributed)
        self.state = self.checkpoints.load()  # beside the tensors; stage 2 adds its cursor
        self.done = self.state.pop("step")  # steps that earlier processes made
        self.logger = MetricsLogger(out, self.done, args) if distributed.is_main else None
        self.skipped = 0  # updates in a row
        self.asked = False  # to stop
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, self._ask)

    def _ask(self, *_):
        self.asked = True
        self.distributed.print0("stopping after this step, with a checkpoint")

    def steps(self):
        """The steps that are left, each followed by its checkpoint where one is due.
        Errors: BfclError when asked to stop, and if a checkpoint cannot be written."""
        bar = tqdm(total=self.total, initial=self.done, desc=Path(sys.argv[0]).stem,
                   disable=not self.distributed.is_main)
        every = self.args.save_every
        for step in range(self.done + 1, self.total + 1):
            yield step  # the caller makes it
            bar.update()
            stop = self.distributed.all_reduce(self.asked, dist.ReduceOp.MAX) > 0  # any rank was asked
            if stop or every and (step % every == 0 or step == self.total):
                self.checkpoints.save(step, self.state)
                if self.distributed.is_main:
                    plot_curves(self.out)
            if stop:
                raise BfclError(f"stopped after step {step}, as asked: the same command goes on from there")
        bar.close()

    def log(self, step, metrics):
        """Errors: BfclError at the third update in a row that was not finite and therefore skipped."""
        self.skipped = 0 if math.isfinite(metrics["grad_norm"]) else self.skipped + 1
        metrics |= {"skipped_updates": self.skipped,
                    "perf/max_memory_allocated_gb": peak_memory_gb(self.distributed.device)}
        if self.distributed.is_main:
            self.logger.log(step, self.total, metrics)
        if self.skipped == 3:
            raise BfclError(f"the gradients of steps {step - 2} to {step} were not finite; those updates "
                            "were skipped: lower --lr, or look at what those steps logged")

    def end(self, policy, stage_info, hint):
        """Write model/, a plain Hugging Face directory (fp32) with the reward tokens in its tokenizer and the
        contract for the next stage; and the curves. policy: the one whose model was sharded."""
        weights = {}
        for name, p in self.model.named_parameters():
            whole = p.full_tensor().detach()  # all ranks take part
            if self.distributed.is_main:
                weights[name] = whole.cpu()
        if self.distributed.is_main:
            partial, final = self.out / "model.partial", self.out / "model"
            shutil.rmtree(partial, ignore_errors=True)
            policy.model.save_pretrained(partial, state_dict=weights)
            policy.tokenizer.save_pretrained(partial)
            steps = (self.out / "metrics.jsonl").read_text().splitlines()
            stage_info.minutes = sum(json.loads(line)["step_time"] for line in steps) / 60
            atomic_write(partial / STAGE_INFO, asdict(stage_info))
            plot_curves(self.out)
            partial.rename(final)  # last: a folder with model/ is a finished run
            print(f"wrote {final} after {stage_info.minutes:.1f} minutes; next: {hint} {final}")
        dist.destroy_process_group()


# ---- Validation --------------------------------------------------------------------------------------------
def validation_tasks(args, trained: set[str] = frozenset()):
    """--eval_limit tasks of the split's validation part. Errors: BfclError if `trained` holds one's id."""
    if not args.eval_every:
        return []
    if args.split_by == "paper":
        raise BfclError("the paper's split has no validation part: add --eval_every 0")
    chosen = {**vars(args), "split": "val", "tasks": "", "max_tasks": args.eval_limit}
    tasks = bfcl_env.select_tasks(argparse.Namespace(**chosen))
    if {task.id for task in tasks} & trained:
        raise BfclError("validation tasks are among those trained on (--split or --tasks): add --eval_every 0")
    return tasks


def validate(policy, tasks, tokens: list[str | None], make_env, args, distributed):
    """Success of one sampled rollout a task and token; the ranks share them. `policy` is whole."""
    jobs = [(task, token) for task in tasks for token in tokens][distributed.rank::distributed.size]  # this rank's
    sampled = rollout(policy, [make_env(task) for task, _ in jobs], [token for _, token in jobs],
                      [(args.seed, 0, task.id, 0, 0) for task, _ in jobs],
                      progress="validation" if distributed.is_main else None, **sampler.sampling(args))
    return mean_reward(distributed.gather(sampled), lambda t: f"eval/reward_{t.reward_token or 'none'}")


# ---- Stage 1's data: gold calls and mistakes ---------------------------------------------------------------
def gold_calls(task) -> list[list[Call]]:
    """The ground truth with every argument by keyword: the official python decoder drops positional ones."""
    episode = Episode(task)
    return [[Call(name, (), kwargs) for name, kwargs in map(episode.bound, turn)] for turn in task.gold]


def _values(call):
    """The argument values that could have been read somewhere, as text."""
    values = []
    for value in call.kwargs.values():
        values += value if isinstance(value, list) else [value]
    return [str(value) for value in values if len(str(value)) > 2]


def script_messages(task, turns: list[list[Call]], call_format, protocol="official") -> list[str]:
    """What an agent making these calls would say: calls grouped into messages, a closing message per turn (in
    the paper's protocol, where words end the conversation, only a last call of `done()`).

    A call with an argument that stands only in a result of the message being composed starts the next one."""
    episode, said, known = Episode(task), [], ""
    for text, calls in zip(task.turns, turns):
        known += text or ""
        message, fresh, result = [], "", None  # its calls, and what they return
        for call in calls:
            if message and any(value in fresh and value not in known for value in _values(call)):
                said.append(write_calls(message, call_format))
                message, known, fresh = [], known + fresh, ""
            message.append(call)
            [result] = episode.run([str(call)])
            fresh += result
        if message:
            said.append(write_calls(message, call_format))
            known += fresh
        if protocol == "paper":
            continue
        # Written so that neither decoder can take it for a call.
        said.append(f"Done. {calls[-1].name} returned: {result[:80]}" if calls else
                    "I can't do this yet: a function or a detail is missing. Could you give it to me?")
    if protocol == "paper":
        said.append(write_calls([Call("done")], call_format))
    return said


# One shortens a conversation, one lengthens it, two do neither: length does not tell the label.
MISTAKES = ("argument", "function", "missing", "guess")


def corrupt(task, turns: list[list[Call]], kind, rng) -> list[list[Call]]:
    """One kind of mistake that models really make, in every other turn on average, as far as it can be made
    there: who fails, seldom fails only once. Nothing here says that the result fails: judge it."""
    wrong = [_mistake(task, turns, t, kind, rng) for t in range(len(turns))]  # each turn, corrupted
    able = [t for t, calls in enumerate(turns) if wrong[t] != calls]
    chosen = [t for t in able if rng.random() < len(turns) / len(able) / 2] or able[:1]
    return [wrong[t] if t in chosen else calls for t, calls in enumerate(turns)]


def _mistake(task, turns, t, kind, rng):
    """The calls of turn t with a mistake; as they are where this kind cannot be made."""
    calls = turns[t]
    if not calls:
        if kind == "guess":  # it should ask, but makes do with other functions
            return [_other_function(task, call, rng) for turn in turns[t + 1:t + 2] for call in turn]
        return calls
    i = rng.randrange(len(calls))  # of the call that is wrong
    before, call, after = calls[:i], calls[i], calls[i + 1:]
    match kind:
        case "argument" if call.kwargs:
            key = rng.choice(list(call.kwargs))
            so_far = [call for turn in turns[:t + 1] for call in turn]
            other = _other_value(call.kwargs[key], so_far, rng)
            return [*before, Call(call.name, (), {**call.kwargs, key: other}), *after]
        case "function":
            return [*before, _other_function(task, call, rng), *after]
        case "missing" if before or after:  # a turn without any would give failures away
            return before + after
    return calls


def _other_function(task, call, rng):
    """Another function that takes as many arguments and is not withheld, with the values of the call."""
    withheld, fits = sum(task.withheld.values(), []), []
    for doc in task.docs:
        names, required = doc["parameters"]["properties"], doc["parameters"]["required"]
        if doc["name"] not in [call.name, *withheld] and len(required) <= len(call.kwargs) <= len(names):
            fits.append(Call(doc["name"], (), dict(zip(names, call.kwargs.values()))))
    return rng.choice(fits or [call])  # then no mistake is made here


def _other_value(value, so_far, rng):
    """Another value of the same type, from earlier in the conversation where there is one."""
    others = [v for call in so_far for v in call.kwargs.values() if type(v) is type(value) and v != value]
    if others:
        return rng.choice(others)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + rng.choice([1, 10, 100])
    return value + "_new" if isinstance(value, str) else [value]


# ---- Stage 1's data: trajectories --------------------------------------------------------------------------
def play_script(policy, env, said: list[str], reward_token: str | None,
           reward="official") -> Trajectory:
    """The trajectory of a policy that says just this: played in the world, rendered like a sampled one."""
    chat = policy.chat
    ids = chat.render_prompt(env.messages(), reward_token)
    mask, calls, step = [0] * len(ids), 0, None
    for n, text in enumerate(said):
        message = chat.render_assistant(text)
        ids, mask = ids + message, mask + [1] * len(message)
        step = env.step(text)
        calls += len(step.results)
        if step.done:
            break
        if n + 1 < len(said):
            follows = chat.render_env_reply(sampler.answer_messages(step))
            ids, mask = ids + follows, mask + [0] * len(follows)
    verdict = env.verdict()
    return Trajectory(env.id, reward_token, ids, mask, [0.0] * len(ids), verdict.reward(reward),
                      step.reason or "done", vars(verdict), n + 1, calls)


def make_pair(policy, task, make_env, args, used: Counter, token_of) -> list[Trajectory]:
    """[success, failure], the same up to the first mistake, judged from their text. Of the kinds of mistake
    the least `used` is tried first."""
    rng, gold = random.Random(f"{args.seed} {task.id}"), gold_calls(task)

    def play(turns, label):
        env = make_env(task)
        said = script_messages(task, turns, env.call_format, args.protocol)
        return play_script(policy, env, said, token_of(label), args.reward)
    good = play(gold, "high")
    if good.reward != 1:
        raise BfclError(f"the ground truth of {task.id} does not pass: {good.verdict}")
    for kind in sorted(MISTAKES, key=lambda kind: used[kind]):
        for _ in range(8):
            turns = corrupt(task, gold, kind, rng)
            steps = [[[str(call) for call in calls]] for calls in turns]
            # Judged before it is rendered, which is slow, and again from its text.
            if judge(task, steps).reward(args.reward) < 1 and (bad := play(turns, "low")).reward < 1:
                used[kind] += 1
                bad.verdict["mistake"] = kind
                return [good, bad]
    raise BfclError(f"found no failing variant of {task.id}")


def read_rollouts(policy, tasks, make_env, args, token_of) -> list[Trajectory]:
    """The rollouts in --rollouts that are about these tasks, with the token that their verdict deserves. Only
    the prompt is rendered anew, since it holds the token.
    Errors: BfclError, with file and line, for what is no rollout or has another prompt than this run's."""
    by_id, found = {task.id: task for task in tasks}, []
    for file in args.rollouts:
        for n, line in enumerate(Path(file).read_bytes().splitlines(), 1):
            try:
                t = Trajectory.from_json(line)
                if t.task not in by_id or 1 not in t.loss_mask:
                    continue
                reward = bfcl_env.Verdict(**t.verdict).reward(args.reward)
                messages, old = make_env(by_id[t.task]).messages(), t.segments()[0][1]  # old: its prompt
                if old != policy.chat.render_prompt(messages, t.reward_token) or len(t.loss_mask) != len(t.ids):
                    raise ValueError("another prompt")
            except (BfclError, KeyError, TypeError, ValueError):
                raise BfclError(f"{file}, line {n}: not a rollout with this run's prompt; give a run's "
                                "rollouts/*.jsonl and its --model, --tool_docs, --call_format and --protocol") from None
            token = token_of("high" if reward == 1 else "low")
            new = policy.chat.render_prompt(messages, token)
            ids, loss_mask = new + t.ids[len(old):], [0] * len(new) + t.loss_mask[len(old):]
            found.append(replace(t, reward_token=token, reward=reward, ids=ids, loss_mask=loss_mask,
                                 logprobs=[0.0] * len(ids)))
    return found


def stage1_data(policy, tasks, make_env, args) -> tuple[list[list[Trajectory]], int]:
    """[success, failure] pairs with the tokens of --arm, written or a model's rollouts; and how many (pairs
    or rollouts) are too long. The sft arm has only the successes of the same pairs."""
    limit = min(args.max_len, policy.max_len, args.tokens_per_microbatch)  # of one trajectory
    rng = random.Random(f"{args.seed} tokens")

    def token_of(label):
        return label if args.arm == "rctp" and rng.random() >= args.reward_token_dropout else None
    if args.rollouts:
        found = read_rollouts(policy, tasks, make_env, args, token_of)
        rng.shuffle(found)
        short = [t for t in found if len(t.ids) <= limit]
        left_out = len(found) - len(short)
        successes, failures = [t for t in short if t.reward == 1], [t for t in short if t.reward < 1]
        pairs = [list(pair) for pair in zip(successes, failures)]  # what one side has more is not used
        if not pairs:
            raise BfclError(f"--rollouts has {len(successes)} successes and {len(failures)} failures in the "
                            f"chosen tasks, {left_out} too long: it needs both; give more files, or tasks")
    else:
        # Guesses, which only tasks with an empty turn allow, catch up at the end.
        order, used = sorted(tasks, key=lambda task: [] in task.gold), Counter()
        written = [make_pair(policy, task, make_env, args, used, token_of)
                   for task in tqdm(order, desc="data", disable=None)]
        pairs = [pair for pair in written if max(len(t.ids) for t in pair) <= limit]
        left_out = len(written) - len(pairs)
    if args.arm == "sft":
        pairs = [pair[:1] for pair in pairs]
    return pairs, left_out


def data_statistics(trajectories: list[Trajectory], max_new_tokens):
    """What the data is, by label, reward token and kind of mistake; and what of it the sampler would cut."""
    tokens = Counter(t.reward_token or "none" for t in trajectories)
    kinds = Counter("success" if t.reward == 1 else t.verdict.get("mistake") or t.verdict["error_type"]
                    for t in trajectories)
    said = [len(ids) for t in trajectories for said, ids in t.segments() if said]
    long = sum(n > max_new_tokens for n in said)
    return (f"trajectories {dict(kinds)}, reward tokens {dict(tokens)}; messages of at most {max(said)} "
            f"tokens, {long} of {len(said)} longer than --max_new_tokens {max_new_tokens}: the sampler "
            "would cut those")


# ---- Stage 1 -----------------------------------------------------------------------------------------------
def add_training_flags(parser: argparse.ArgumentParser, out):
    """The flags of both training stages."""
    add = parser.add_argument_group("training").add_argument
    add("--out", default=out, help="folder of the run; the one that it holds goes on (default: %(default)s)")
    add("--lr", type=number(float, 0, 1), help="peak learning rate (default: %(default)s)")
    add("--tokens_per_microbatch", type=number(int, 64),
        default=MICROBATCH["cuda" if torch.cuda.is_available() else "cpu"],
        help="tokens a forward (default: 8192; on CUDA 16384)")
    add("--gradient_checkpointing", default="auto", choices=("auto", "on", "off"),
        help="keep no activations, compute layers twice; auto: above a billion parameters "
        "(default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
        help="of the compute; auto: bf16 where the hardware has it (default: %(default)s)")
    add("--seed", default=0, type=number(int, 0), help="of data, order and sampling (default: %(default)s)")
    add("--save_every", default=50, type=number(int, 0),
        help="steps between checkpoints, and one after the last; 0: none (default: %(default)s)")
    add("--save_total_limit", default=1, type=number(int, 1), help="newest checkpoints to keep (default: %(default)s)")
    add("--eval_every", default=50, type=number(int, 0),
        help="steps between looks at validation tasks, and after the last; 0: none (default: %(default)s)")
    add("--eval_limit", default=16, type=number(int, 1), help="validation tasks (default: %(default)s)")
    add("--tracker", default="none", choices=("none", "wandb", "tensorboard"),
        help="log there too, if installed")


def parse_args(argv: list[str] | None = None):
    parser = bfcl_env.Parser("Stage 1: reward-conditioned fine-tuning (RCTP-FT).")
    add = parser.add_argument
    add("--model", default=sampler.DEFAULT_MODEL, help="a directory, a hub id or %(default)s (the default)")
    add("--preset", choices=PRESETS, default="notes",
        help="lr, batch and epochs of the paper's appendix or of notes on it (default: %(default)s)")
    add("--epochs", type=number(int, 1), help="passes over the pairs (default: %(default)s)")
    add("--steps", type=number(int, 1), help="updates, instead of --epochs")
    add("--batch_size", type=number(int, 1), help="trajectories an update, in pairs of a success and a failure. "
        "Every arm makes as many updates of as many pairs; sft has only their successes, half as many "
        "trajectories (default: %(default)s)")
    add("--arm", default="rctp", choices=ARM_REWARD_TOKENS, help="successes and failures with reward tokens, the same "
        "without, or successes alone without (default: %(default)s)")
    add("--reward_token_dropout", type=number(float, 0, 1), default=0.1,
        help="share of the trajectories without a token in the rctp arm (default: %(default)s)")
    add("--rollouts", nargs="*", default=[], metavar="FILE",
        help="learn from a model's rollouts (runs/NAME/rollouts/*.jsonl), not from gold and corrupted calls")
    add_training_flags(parser, "runs/sft_rctp")
    sampler.add_sampling_flags(parser)  # of the validation
    bfcl_env.add_env_flags(parser)
    parser.set_defaults(**PRESETS["notes"])  # for --help
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    check_model(args.model)
    validation_tasks(args, {task.id for task in bfcl_env.select_tasks(args)})
    return args


def main():
    args = parse_args()
    distributed = init_distributed()
    out, tasks = begin_run(args, distributed), bfcl_env.select_tasks(args)
    val_tasks = validation_tasks(args, {task.id for task in tasks})
    torch.manual_seed(args.seed)  # of the tiny model's weights, nothing else draws from it
    policy = load_policy(args.model, torch.float32, "cpu", weights=distributed.is_main, thinking=args.thinking)
    banned, dtype = policy.banned.to(distributed.device), compute_dtype(args.dtype, distributed.device)
    call_format = policy.call_format(args.call_format)
    make_env = bfcl_env.make_env_fn(args, call_format)

    # steps 1 and 2: data
    pairs, left_out = stage1_data(policy, tasks, make_env, args)
    if not pairs:
        raise BfclError(f"none of the {len(tasks)} tasks fits --max_len {args.max_len} and "
                        f"--tokens_per_microbatch {args.tokens_per_microbatch}: raise them, or take smaller "
                        "--tool_docs")
    data = [t for pair in pairs for t in pair]
    digest = hashlib.sha256(str([t.ids for t in data]).encode()).hexdigest()
    weights = distributed.broadcast(distributed.is_main and checksum(policy.model))
    check_same_run(out, distributed, {"weights": weights, "data": digest, "compute": str(dtype)})
    if val_tasks:
        val_tasks = sampler.filter_overlong(policy, val_tasks, make_env, args.max_len)
        # a whole copy for rollouts, without memory between them
        acting = load_policy(args.model, dtype, distributed.device, weights=False, thinking=args.thinking)
        free_weights(acting.model)
    model, optimizer = shard_model(policy, args, dtype, distributed)  # from here on policy.model is sharded
    size = max(1, args.batch_size // 2)  # pairs an update
    steps = args.steps or args.epochs * math.ceil(len(pairs) / size)
    run = TrainLoop(out, args, model, optimizer, steps, distributed)
    distributed.print0(f"{transcript(data[-1], policy.tokenizer)}\n\n{data_statistics(data, args.max_new_tokens)}\n"
              f"stage 1: {args.model} | docs {args.tool_docs}, call format {call_format} ({policy.chat.why}) | "
              f"{len(pairs)} pairs of {len(tasks)} tasks, {left_out} too long | arm {args.arm} | "
              f"{steps} steps of {size} pairs, from {run.done + 1} | {dtype} on {distributed.size} x "
              f"{distributed.device.type} | {out}")
    for step in run.steps():
        start = synced_time(distributed.device)
        # step 3: packs; every rank takes its share
        batch = [t for i in epoch_shuffle(len(pairs), (step - 1) * size, size, args.seed) for t in pairs[i]]
        packs = pack(batch, args.tokens_per_microbatch, distributed.device)
        count = sum(len(p.targets) for p in packs)  # one normaliser for the update, known before any forward

        # step 4: L = -1/count * sum of log pi(a_t | h_t, r)
        def loss_of(p):
            return -model.token_logprobs(p, banned).sum() / count
        lr = get_lr(step, args.lr, steps, decay=steps // 5)
        optimizer.param_groups[0]["lr"] = lr
        norm, loss = optimizer_step(model, optimizer, pad_packs(packs[distributed.rank::distributed.size], distributed), loss_of, distributed)
        seconds, tokens = synced_time(distributed.device) - start, sum(len(p.ids) for p in packs)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": lr, "num_tokens": tokens,
                   "step_time": seconds, "perf/throughput": tokens / seconds}

        # the proof that the token works: what rollouts under each token achieve
        if val_tasks and (step % args.eval_every == 0 or step == steps):
            load_full_weights(acting.model, model)
            metrics |= validate(acting, val_tasks, ARM_REWARD_TOKENS[args.arm], make_env, args, distributed)
            free_weights(acting.model)
        run.log(step, metrics)

    # step 5: the model
    stage_info = StageInfo(
        stage="rctp", base_model=policy.stage_info.base_model or args.model, tool_docs=args.tool_docs, call_format=call_format,
        protocol=args.protocol, arm=args.arm, data_source="rollouts" if args.rollouts else "written",
        stage1_reward_tokens=sorted({t.reward_token or "none" for t in data}), tasks=sorted({t.task for t in data}),
        reward_ids=policy.reward_ids, template_sha256=policy.chat.fingerprint,
        thinking=policy.chat.thinking, date=policy.chat.date)
    run.end(policy, stage_info, hint="torchrun rl_rcgrpo.py --model")


if __name__ == "__main__":
    run_main(main)
