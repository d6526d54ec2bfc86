"""Measure on a GPU, in ten minutes, what a CPU cannot show about this repository.

    python results/gpu_probe.py [--budget 540] [--only attention,decode] [--list]

Every section is a process of its own, so that one that crashes or hangs costs no other. Its line of JSON also
goes to probe.jsonl in the folder of the environment variable OUT, or in probe_out/. A section whose estimate
exceeds the rest of the budget is left out. Without a GPU the same code runs with tiny shapes, as a test.
"""
import argparse
import functools
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("OUT", "probe_out"))
# Section -> seconds that it takes at most on an H100, with the start of its process.
PLAN = dict(machine=20, load=20, attention=20, sampler=40, graphs=40, engine=40, decode=60, train=70,
            stage2=70, pipeline=90, weights=40, repeat=20)


# ---- The parent process ------------------------------------------------------------------------------------
def write_line(section, **figures):
    line = json.dumps({"section": section, **figures})
    line = re.sub(r"(\.\d{6})\d+", r"\1", line)  # six decimals are enough
    print(line, flush=True)
    with open(OUT / "probe.jsonl", "a") as f:
        f.write(line + "\n")


def run_child(section, seconds):
    """Run a section in a process; kill it, with all that it has started, if it takes longer than this."""
    child = subprocess.Popen([sys.executable, __file__, "--child", section], start_new_session=True)
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        status = f"killed after {seconds:.0f} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if status:
        write_line(section, error=f"the process ended: {status}")


def run_all(sections, budget):
    deadline = time.time() + budget
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "probe.jsonl").write_text("")
    for section in sections:
        left = deadline - time.time()
        if left < PLAN[section]:
            write_line(section, left_out=f"{left:.0f} s are left, it may take {PLAN[section]}")
        else:
            run_child(section, min(left, 60 + 2 * PLAN[section]))


parser = argparse.ArgumentParser(description="Measure what a CPU cannot show.")
parser.add_argument("--budget", type=float, default=540, help="seconds in all (default: %(default)s)")
parser.add_argument("--only", default=",".join(PLAN), help="sections, comma-separated (default: all)")
parser.add_argument("--list", action="store_true", help="print the sections and their seconds, and exit")
parser.add_argument("--child", help=argparse.SUPPRESS)
ARGS = parser.parse_args()
if ARGS.list:
    print(PLAN)
    sys.exit()
if not ARGS.child:
    run_all(ARGS.only.split(","), ARGS.budget)
    sys.exit()

# ---- The child process: functions that sections share ------------------------------------------------------
sys.path.insert(0, str(ROOT))
import torch
import torch.nn.functional as F
from torch.autograd.functional import vjp
from torch.profiler import profile
from transformers import AutoModelForCausalLM, Qwen2Config

import bench
import bfcl_env
import rollout
import sft_rctp as sft

CUDA = torch.cuda.is_available()
DEVICE = sft.local_device()
FP32 = torch.float32
BF16 = torch.bfloat16
GRAPHS = (False, True) if CUDA else (False,)
# Changes of `tiny_config`. The ids of `bench.random_group` are below 40000.
SMALL = dict(vocab_size=40000, hidden_size=256, num_hidden_layers=4, num_attention_heads=6, head_dim=128)
BIG = dict(vocab_size=40000, head_dim=128)
TRAINED = BIG
ROWS = 6
PREFIX = 20  # letters of a prompt
TAIL = 12  # tokens of a row after its prefix
if CUDA:
    # Qwen2.5-7B. Gradients and moments of all its layers need 141 GB.
    BIG = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4, head_dim=128)
    TRAINED = BIG if torch.cuda.mem_get_info()[1] > 120 * bench.GIB else BIG | dict(num_hidden_layers=8)
    ROWS = 64
    PREFIX = 3000
    TAIL = 1203
FLAGS = argparse.Namespace(lr=1e-4, gradient_checkpointing="on")
torch.backends.cuda.enable_cudnn_sdp(False)  # as in `load_policy`


def timed(function):
    """Return the function with lists of the `seconds` of its calls: in all, and until all was `launched`."""
    def wrapper(*args, **options):
        start = sft.synced_time(DEVICE)
        result = function(*args, **options)
        wrapper.launched.append(time.monotonic() - start)
        wrapper.seconds.append(sft.synced_time(DEVICE) - start)
        return result

    wrapper.launched = []
    wrapper.seconds = []
    return wrapper


def run_often(work, reset=lambda: None):
    """Call `work` five times, and `reset` before each; return it with its times, see `timed`."""
    run = timed(work)
    for _ in range(5):
        reset()
        run()
    return run


def kernels(work):
    """Return [(milliseconds, name)] of the kernels that a call launches; on a CPU of its operators."""
    with profile() as profiler:
        work()
        sft.synced_time(DEVICE)
    found = []
    for event in profiler.events():
        if event.device_type.name.lower() == DEVICE.type and event.cpu_parent is None:
            found.append((event.time_range.elapsed_us() / 1000, event.name[:60]))
    return found


def bandwidth():
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    run = run_often(lambda: target.copy_(source))
    return 2 * source.nbytes / min(run.seconds)


def largest_error(first, second):
    """Return the largest relative error of the tensors of two lists."""
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(first, second))


def random_policy(sizes, dtype, bias=0.0, check=False):
    """Return a random Qwen2 with a byte tokenizer, which may sample some thirty ids.

    With a `bias` of 1 keys and queries are as large as Qwen2.5-7B's, in two dimensions that turn slowly.
    """
    torch.manual_seed(0)
    config = rollout.tiny_config(Qwen2Config, tie_word_embeddings=False, initializer_range=0.06, **sizes)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.detach().view(-1, 128)[:, 62:64] = 166 * bias
        layer.self_attn.q_proj.bias.detach().view(-1, 128)[:, 62:64] = 66 * bias
    policy = rollout.make_policy("tiny", model, rollout.tiny_tokenizer(), check=check)
    policy.banned[30:256] = True
    policy.banned[list(policy.chat.forbidden_ids)] = True
    return policy


class ToyEnv(bench.FixedEnv):
    """A prompt of random letters, then six messages."""

    def __init__(self, name, letters):
        self.id = name
        self.num_messages = 0
        self.text = "".join(random.Random(name).choices("abcdefgh ", k=letters))

    def messages(self):
        return [{"role": "user", "content": self.text}]

    def verdict(self):
        return bfcl_env.Verdict(True, None, None, True, True, 1.0)


def play(policy, indices=range(12), prompts=4, letters=200, **limits):
    """Roll out; return the trajectories, and the seconds in all, of prefills, of captures of CUDA graphs."""
    envs = [ToyEnv(f"task {i % prompts}", letters) for i in indices]
    reward_tokens = [("high", "low", None)[i % 3] for i in indices]
    run = timed(rollout.rollout)
    extend = timed(rollout.extend)
    capture = timed(rollout.capture_graph)
    with mock.patch.multiple(rollout, extend=extend, capture_graph=capture):
        trajectories = run(policy, envs, reward_tokens, [(0, i) for i in indices], **limits)
    return trajectories, {
        "seconds": run.seconds[0],
        "prefill_s": sum(extend.seconds),
        "capture_s": capture.seconds}


def compare(first, second):
    """Count the rollouts with equal ids, and return the largest log-prob gap among them."""
    gaps = []
    for t, u in zip(first, second):
        if t.ids == u.ids:
            gaps.append(max(abs(p - q) for p, q in zip(t.logprobs, u.logprobs)))
    return {"same": f"{len(gaps)} of {len(first)}", "largest_gap": max(gaps, default=0.0)}


@torch.no_grad()
def trainer_gap(policy, trajectories):
    """Return mean and maximum of the differences between the trainer's and the sampler's log-probs."""
    gaps = []
    for p in rollout.pack(trajectories, 16384, DEVICE):
        logp = rollout.token_logprobs(policy.model, p, policy.banned)
        gaps += (logp - p.sampled_logp).abs().tolist()
    return {"mean": sum(gaps) / len(gaps), "largest": max(gaps), "tokens": len(gaps)}


# ---- Sections: generators of (name, figure) ----------------------------------------------------------------
def machine():
    """Measure the rates that bound all others."""
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda}"
    yield "gpu", str(torch.cuda.get_device_properties(0)) if CUDA else "none"
    yield "copy_tb_s", bandwidth() / 1e12
    yield "matmul_tflops", bench.matmul_rate(BF16, DEVICE) / 1e12
    few = torch.zeros(8, device=DEVICE)
    run = run_often(lambda: [few.add_(1) for _ in range(1000)])
    yield "launch_us", 1000 * min(run.seconds)


def load():
    """Compare the attention layouts with the plain forward, also for keys nearly as large as Qwen2.5's."""
    for dtype, bias in itertools.product((FP32, BF16), (0.0, 0.3)):
        try:
            gaps = random_policy(SMALL, dtype, bias, check=True).gaps
        except bfcl_env.BfclError as error:
            gaps = f"refused: {error}"
        yield f"{dtype} bias {bias}", gaps


def attention():
    """Compare attention and its gradients with float64, and name the kernel that torch takes."""
    # Heads as in Qwen2.5-7B: 28 for queries, 4 for keys, each of width 128.
    lengths = ((333, 0), (333, 700), (1, 700))  # S, past
    for (S, past), dtype in itertools.product(lengths, (FP32, BF16)):
        *inputs, gradient = [
            torch.randn(1, heads, tokens, 128, device=DEVICE).to(dtype)
            for heads, tokens in ((28, S), (4, past + S), (4, past + S), (28, S))]
        mask = torch.ones(S, past + S, dtype=torch.bool, device=DEVICE).tril(past)
        ours = functools.partial(rollout.attention, scale=128**-0.5)
        exact = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
        out, gradients = vjp(ours, tuple(inputs), gradient)
        expected = vjp(exact, tuple(x.double() for x in inputs), gradient.double())
        error = largest_error([out, *gradients], [expected[0], *expected[1]])
        _, kernel = max(kernels(lambda: ours(*inputs)), default=(0, "?"))
        yield f"{S} after {past}, {dtype}", {"error": error, "kernel": kernel}


def sampler():
    """Compare the log-probs of rollouts with those of the trainer, in the same dtype and in fp32."""
    for dtype, bias in ((FP32, 0.0), (BF16, 0.0), (BF16, 0.3)):
        policy = random_policy(SMALL, dtype, bias)
        trajectories, _ = play(policy)
        yield f"{dtype} bias {bias}", trainer_gap(policy, trajectories)
        policy.model.float()
        yield f"{dtype} bias {bias}, trainer in fp32", trainer_gap(policy, trajectories)


def graphs():
    """Compare rollouts with CUDA graphs and without, of the small model."""
    for dtype in (FP32, BF16):
        policy = random_policy(SMALL, dtype)
        first, _ = play(policy)
        for cuda_graphs in GRAPHS:
            again, figures = play(policy, cuda_graphs=cuda_graphs)
            yield f"{dtype}, CUDA graphs {cuda_graphs}", figures | compare(first, again)


def engine():
    """Check gradients, a checkpoint and full copies of a sharded model."""
    distributed = sft.init_distributed()
    rows = bench.random_group(300, 4, 90, 60)
    [p] = rollout.pack(rows, 10**6, DEVICE)
    plain = random_policy(SMALL, FP32).model
    plain.set_attn_implementation("sdpa")
    bench.plain_backward(plain, rows)
    for dtype in (FP32, BF16):
        policy = random_policy(SMALL, FP32)
        policy.model.cpu()
        policy.banned[:] = False
        model, optimizer = sft.shard_model(policy, FLAGS, dtype, distributed)
        (-model.token_logprobs(p, policy.banned).sum()).backward()
        gradients = [w.grad.full_tensor() for w in model.parameters()]
        yield f"gradient_error {dtype}", largest_error(gradients, [w.grad for w in plain.parameters()])
    before = [w.detach().full_tensor().clone() for w in model.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = sft.Checkpointer(Path(folder), model, optimizer, 1, distributed)
        checkpoints.save(1, {"cursor": 7})
        optimizer.step()
        yield "checkpoint", checkpoints.load()
    for shards in (None, sft.offload_shards(model, FP32)):
        sft.free_weights(plain)
        sft.load_full_weights(plain, model, shards)
        yield f"copy_error{' offloaded' if shards else ''}", largest_error(plain.parameters(), before)


@torch.inference_mode()
def decode():
    """Time one decode step of many rows at the shape of Qwen2.5-7B, eager and as a CUDA graph."""
    policy = random_policy(BIG, BF16)
    for prefixes, cuda_graphs in itertools.product((1, 13), GRAPHS):
        batch = rollout.Sampler(policy, max_len=PREFIX + TAIL + 512, cuda_graphs=cuda_graphs)
        envs = [ToyEnv(f"task {i % prefixes}", PREFIX) for i in range(ROWS)]
        batch.add_requests(envs, ["high"] * ROWS, [(0, i) for i in range(ROWS)])
        batch.admit()
        batch.prefill()
        for row in batch.live:
            row.cached = TAIL - 1  # the slots hold zeros up to there
        state, sizes = batch._decode_state(1)
        start = {name: x.clone() for name, x in state.items()}
        step = functools.partial(batch._decode_step, **sizes, **state)
        reset = functools.partial(rollout.copy_tensors, start, state)  # undoes what a step changes
        figures = {}
        if cuda_graphs:
            capture = timed(rollout.capture_graph)
            expected, graph, out = capture(step, batch.graphs.pool)
            step = graph.replay
            reset()
            step()
            figures = {
                "capture_s": capture.seconds[0],
                "same_ids": torch.equal(out[0], expected[0]),
                "largest_gap": (out[1] - expected[1]).abs().max().item()}
        run = run_often(step, reset)
        reset()
        found = kernels(step)
        # What a step must read: weights, slots, and each prefix once.
        read = [*policy.model.model.layers.parameters(), batch.head, batch.row_kv[:, :, :, :, :TAIL]]
        read += [prefix.kv for prefix in batch.cached_prefixes]
        figures |= {
            "floor_ms": 1000 * sum(x.nbytes for x in read) / bandwidth(),
            "ms": 1000 * min(run.seconds),
            "host_ms": 1000 * min(run.launched),
            "busy_ms": sum(ms for ms, _ in found),
            "kernels": len(found)}
        yield f"{prefixes} prefixes, CUDA graphs {cuda_graphs}", figures


def train():
    """Time updates at the shape of Qwen2.5-7B, with eight layers where the memory is small."""
    distributed = sft.init_distributed()
    policy = random_policy(TRAINED, FP32)
    model, optimizer = sft.shard_model(policy, FLAGS, BF16, distributed)
    policy.banned[:] = False
    [p] = rollout.pack(bench.random_group(PREFIX, 5, TAIL, TAIL // 2), 16384, DEVICE)
    tokens = len(p.targets)

    def loss_of(p):
        return -model.token_logprobs(p, policy.banned, entropy=True)[0].sum() / tokens

    step = timed(sft.optimizer_step)
    for packs in ([p, rollout.dummy_pack(DEVICE)], [p], [p]):
        norm_and_loss = step(model, optimizer, packs, loss_of, distributed)
    yield "norm_and_loss", norm_and_loss
    yield "seconds", step.seconds
    operations = bench.flops(model, [p.layout], tokens)
    yield "mfu", operations / min(step.seconds) / bench.matmul_rate(BF16, DEVICE)
    yield "layers", len(model.model.layers)
    yield "peak_gib", torch.cuda.max_memory_allocated() / bench.GIB


def stage2():
    """Time rollouts at the shape of Qwen2.5-7B, and the log-probs of what was sampled."""
    policy = random_policy(BIG, BF16)
    for cuda_graphs in GRAPHS:
        trajectories, figures = play(policy, range(ROWS), 13, PREFIX, cuda_graphs=cuda_graphs)
        reference = timed(trainer_gap)
        figures |= reference(policy, trajectories)
        yield f"CUDA graphs {cuda_graphs}", figures | {"reference_s": reference.seconds[0]}


def pipeline():
    """Run the commands of both stages and of the evaluation."""
    flags = ("--tasks multi_turn_base_139,multi_turn_base_50,multi_turn_base_11 --max_new_tokens 32 "
             f"--max_sampled_tokens 128 --cuda_graphs {'on' if CUDA else 'off'}")
    with tempfile.TemporaryDirectory() as out:
        for command in (
                f"-m torch.distributed.run --standalone sft_rctp.py --model tiny --steps 3 --batch_size 4 "
                f"--lr 5e-5 --save_every 1 --eval_every 0 --out {out}/sft {flags}",
                f"rl_rcgrpo.py --model {out}/sft/model --steps 2 --prompts_per_step 2 --group_size 4 "
                f"--lr 1e-5 --beta 0.05 --save_every 1 --eval_every 0 --out {out}/rl {flags}",
                f"eval_bfcl.py --ckpt {out}/rl/model --out {out}/eval {flags}"):
            run = timed(subprocess.run)
            done = run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{command}: {done.stderr[-400:]}")
            yield command.partition(".py")[0], run.seconds[0]


def weights():
    """Time how weights of the shape of Qwen2.5-7B move between trainer and sampler."""
    copy = random_policy(TRAINED, BF16).model
    trained = random_policy(TRAINED, FP32)
    model, _ = sft.shard_model(trained, FLAGS, BF16, sft.init_distributed())
    offload = timed(sft.offload_shards)
    shards = offload(model, BF16)
    yield "offload_s", offload.seconds[0]
    yield "load_s", run_often(lambda: sft.load_full_weights(copy, model)).seconds
    yield "load_offloaded_s", run_often(lambda: sft.load_full_weights(copy, model, shards)).seconds


def repeat():
    """Check whether the same work twice gives the same numbers."""
    policy = random_policy(SMALL, FP32)
    together, _ = play(policy)
    alone = [play(policy, [i])[0][0] for i in range(4)]
    yield "alone", compare(together[:4], alone)
    policy.banned[:] = False
    gradients = []
    for _ in range(2):
        policy.model.zero_grad()
        bench.packed_backward(policy, bench.random_group(300, 4, 90, 60))
        gradients.append([p.grad for p in policy.model.parameters()])
    yield "gradients", largest_error(*gradients)


# ---- The child process: its section ------------------------------------------------------------------------
figures = {}
start = time.monotonic()
try:
    for name, figure in globals()[ARGS.child]():
        figures[name] = figure
except Exception:
    figures["error"] = traceback.format_exc()[-600:]
write_line(ARGS.child, **figures, section_s=time.monotonic() - start)
os._exit(0)  # NCCL could hang at the interpreter's own exit
