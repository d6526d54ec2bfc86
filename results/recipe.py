"""Predict memory, hours and disk of the paper's 7B run before it is started, and print its commands.

    python results/recipe.py

Memory is that of `bench.py plan`, for a model of Qwen2.5-7B's shape and conversations of full length. Hours
are for conversations made of the gold calls, with the default model's tokenizer and template. No rate was
measured on a GPU: two ratios measured on a CPU are applied to the figures of the datasheets. One step of
stage 2 with slim docs comes first; its times per launch are assumptions.
"""
import contextlib
import io
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench
import rl_rcgrpo
import rollout
import sft_rctp
from bfcl_env import make_env_fn, load_tasks, select_tasks, split

MODEL = "Qwen/Qwen2.5-7B-Instruct"
MAX_LEN = 16384
SHARED = f"--tool_docs full --max_len {MAX_LEN} --tokens_per_microbatch {MAX_LEN}"
# Two ratios measured on two cores of an AMD EPYC (avx512_bf16), see README.
MFU = 0.26  # the rate of training relative to that of large matrix products: `bench.py train`
DECODE = 1.5  # time of a decode step relative to its matrix products alone: `bench.py sampler`
RECOMPUTED = 4 / 3  # gradient checkpointing runs the forward pass twice
SLIM_LEN = 8192
SLIM = f"--tool_docs slim --max_len {SLIM_LEN} --tokens_per_microbatch 16384"
# Per rollout, in the estimate of one step.
MESSAGES = 8
SAMPLED = 75  # tokens per message
RESULT = 80  # tokens of results per message
LAUNCHES = 1617  # kernels of a decode step at Qwen2.5-7B's shape, counted in a trace; any number of prompts
LAUNCH_SECONDS = 18e-6  # of the host per launch, with Python around it: an assumption
KERNEL_SECONDS = 2.5e-6  # that a small kernel takes at least inside a CUDA graph: an assumption


@dataclass
class Cards:
    name: str
    count: int
    gib: float
    flops: float  # per second, of dense bf16 products
    bandwidth: float  # bytes per second


CARDS = [
    Cards("one card of 141 GB (H200)", 1, 140, 989e12, 4.8e12),
    Cards("eight cards of 80 GB (H100)", 8, 79, 989e12, 3.35e12),
]
# Success on BFCL in percent, as the paper reports it.
PAPER = {
    "base model": 11.25,
    "SFT + GRPO": 48.75,
    "SFT + RC-GRPO": 46.25,
    "RCTP-FT + GRPO": 73.75,
    "RCTP-FT + RC-GRPO": 85.00,
}


def write_stand_in(folder):
    """Write a folder with the shape of Qwen2.5-7B and the default model's tokenizer."""
    policy = rollout.load_policy(rollout.DEFAULT_MODEL, torch.float32, "meta", weights=False)
    policy.tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        max_position_embeddings=32768,
        tie_word_embeddings=False)
    config.save_pretrained(folder)


def plan(ranks, *flags, shared=SHARED):
    """Return the result of `bench.py plan` without its printed lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        return bench.bench_plan(["--ranks", str(ranks), *flags, *shared.split()])


@dataclass
class Typical:
    """Mean tokens of conversations made of the gold calls, and operations of an update on a group of them."""
    prefix: float  # shared by a group
    tail: float  # sampled tokens and results, after the prefix
    sampled: float
    flops: float


def typical_conversation(folder, group_size, shared=SHARED) -> Typical:
    args = sft_rctp.parse_args(["--model", folder, *shared.split()])
    policy = rollout.load_policy(folder, torch.float32, "meta", weights=False)
    make_env = make_env_fn(args, policy.call_format(args.call_format))
    tasks = select_tasks(args)[::18]
    pairs, _ = sft_rctp.stage1_data(policy, tasks, make_env, args)
    prefixes = []
    tails = []
    sampled = []
    flops = []
    for success, _ in pairs:
        prefix = success.loss_mask.index(1)
        prefixes.append(prefix)
        tails.append(len(success.loss_mask) - prefix)
        sampled.append(sum(success.loss_mask))
        packs = sft_rctp.pack([success] * group_size, args.tokens_per_microbatch)
        layouts = [p.layout for p in packs]
        flops.append(bench.flops(policy.model, layouts, group_size * sampled[-1]))
    return Typical(mean(prefixes), mean(tails), mean(sampled), mean(flops))


def sampling_seconds(cards, planned, typical, groups, group_size, occupied):
    """Predict the seconds that sampling takes.

    Decode steps take the time to read their bytes: the weights, each group's prefix, and half of each row's
    tokens after the prefix. Results and prefixes take the time of their operations.

    Args:
        planned: result of `plan`.
        occupied: bytes per card that the sampler cannot use.
    """
    weights = planned["bytes"]["rollout / reference copy"]
    token = planned["bytes"]["KV cache"] / MAX_LEN  # the cache of a plan is that of one full conversation
    rollouts = groups * group_size / cards.count  # per card
    row = token * (typical.tail + typical.prefix / group_size)  # bytes
    free = cards.gib * 2**30 - occupied - weights
    rows = min(rollouts, 0.6 * free / row)  # live at once
    read = weights + rows * (row - token * typical.tail / 2)
    steps = typical.sampled * rollouts / rows
    computed = groups * (typical.prefix + group_size * (typical.tail - typical.sampled))  # tokens
    decoding = DECODE * steps * read / cards.bandwidth
    prefilling = 2 * planned["parameters"] * computed / (MFU * cards.flops * cards.count)
    return decoding + prefilling


def print_prediction(cards, plan1, plan2, typical, updates, stage2, num_test):
    """Print the commands of a run, its memory, hours and disk.

    Args:
        plan1, plan2: results of `plan` for the two stages.
        updates: of stage 1.
        stage2: arguments of stage 2.
        num_test: tasks of the evaluation.
    """
    torchrun = f"torchrun --standalone --nproc_per_node {cards.count}"
    print(f"\n## {cards.name}\n\n"
          f"{torchrun} sft_rctp.py --model {MODEL} {SHARED} --out runs/7b/sft\n"
          f"{torchrun} rl_rcgrpo.py --model runs/7b/sft/model {SHARED} --out runs/7b/rl\n"
          f"{torchrun} eval_bfcl.py --ckpt runs/7b/sft/model runs/7b/rl/model --tool_docs full "
          f"--max_len {MAX_LEN} --reward_tokens high,low,none --samples 4 --out runs/7b/eval\n")

    prompts = stage2.prompts_per_step
    rate = MFU * cards.flops * cards.count
    occupied = plan2["bytes"]["masters (fp32)"] + plan2["bytes"]["AdamW moments"]
    # Seconds of the phases of a step of stage 2.
    rollouts = sampling_seconds(cards, plan2, typical, prompts, stage2.group_size, occupied)
    reference = prompts * typical.flops / 3 / rate  # the forward pass is a third
    update = RECOMPUTED * prompts * typical.flops / rate
    hours1 = updates * RECOMPUTED * plan1["flops"] / rate / 3600
    hours2 = stage2.steps * (rollouts + reference + update) / 3600
    hours3 = 3 * 2 * sampling_seconds(cards, plan2, typical, num_test, 4, 0) / 3600
    # Bytes per parameter: model/ of each stage in fp32 and its checkpoint with AdamW's moments; the next
    # checkpoint of stage 2 while it is written; the download in bf16.
    disk = plan1["parameters"] * (2 * (4 + 12) + 12 + 2) / 1e9
    for stage, planned in (("stage 1", plan1), ("stage 2", plan2)):
        print(f"{stage}: planned peak {planned['peak_bytes'] / 2**30:.0f} of {cards.gib} GiB a card")
    print(f"predicted hours: stage 1 {hours1:.2g}, stage 2 {hours2:.2g}, evaluation {hours3:.2g}; a step of "
          f"stage 2: rollouts {rollouts:.0f} s, reference {reference:.0f}, update {update:.0f}\n"
          f"disk: {disk:.0f} GB")


def print_slim_step(folder):
    """Print an estimate of one step of stage 2 on one card with slim docs."""
    cards = CARDS[0]
    prompts = 52
    group_size = 5
    step = f"--prompts_per_step {prompts} --group_size {group_size}"
    planned = plan(1, "--stage", "2", "--model", folder, *step.split(), shared=SLIM)
    typical = typical_conversation(folder, group_size, shared=SLIM)
    tail = MESSAGES * (SAMPLED + RESULT)
    rollouts = prompts * group_size

    parts = planned["bytes"]
    token = parts["KV cache"] / SLIM_LEN  # bytes
    weights = parts["rollout / reference copy"]
    free = cards.gib * 2**30 - parts["masters (fp32)"] - parts["AdamW moments"] - weights
    live = int(0.6 * free / token / (SLIM_LEN - typical.prefix + typical.prefix / group_size))
    steps = math.ceil(rollouts / live) * MESSAGES * SAMPLED
    read = weights + live * token * (typical.prefix / group_size + tail / 2)
    floor = read / cards.bandwidth
    host = LAUNCHES * LAUNCH_SECONDS
    graph = DECODE * floor + LAUNCHES * KERNEL_SECONDS

    rate = MFU * cards.flops
    N = planned["parameters"]
    prefilled = prompts * typical.prefix + rollouts * MESSAGES * RESULT
    trained = prompts * (typical.prefix + group_size * tail)
    prefill = 2 * N * prefilled / rate
    reference = 2 * N * trained / rate
    print(f"\n## One step of stage 2 on one H200, ESTIMATED: {prompts} tasks x {group_size}, slim docs\n\n"
          f"a decode step of {live} rows: {LAUNCHES} launches, {1000 * host:.0f} ms of the host; as a CUDA "
          f"graph {1000 * graph:.0f} ms; its bytes take {1000 * floor:.1f} ms\n"
          f"rollouts, {steps} decode steps: {steps * host + prefill:.0f} s, with CUDA graphs "
          f"{steps * graph + prefill:.0f} s; {prefill:.0f} s of it are prompts and results\n"
          f"reference {reference:.0f} s; update {4 * reference:.0f} s\n"
          f"memory: {planned['peak_bytes'] / 2**30:.0f} of {cards.gib} GiB")


def main():
    stage1 = sft_rctp.parse_args([])  # presets and defaults
    stage2 = rl_rcgrpo.parse_args([])
    parts = split(load_tasks())
    num_test = len(parts["test"])
    pairs_per_batch = stage1.batch_size // 2  # one pair per task
    updates = stage1.epochs * math.ceil(len(parts["train"]) / pairs_per_batch)
    with tempfile.TemporaryDirectory() as folder:
        write_stand_in(folder)
        plans = []
        for cards in CARDS:
            plans.append([plan(cards.count, "--stage", stage, "--model", folder) for stage in "12"])
        typical = typical_conversation(folder, stage2.group_size)
        print_slim_step(folder)
    print(f"Stage 1: {updates} updates; stage 2: {stage2.steps} steps of {stage2.prompts_per_step} x "
          f"{stage2.group_size} rollouts; evaluation: {num_test} tasks x 4 rollouts x 3 tokens x 2 "
          "checkpoints.\n"
          f"A conversation: {typical.prefix:.0f} tokens of prompt, {typical.tail:.0f} of messages and "
          f"results, {typical.sampled:.0f} of them sampled.")
    for cards, (plan1, plan2) in zip(CARDS, plans):
        print_prediction(cards, plan1, plan2, typical, updates, stage2, num_test)
    print("\nThese are RCTP-FT + RC-GRPO; other arms: --arm sft, --reward_tokens high or none. Hours assume "
          f"{MFU:.0%} of {CARDS[0].flops / 1e12:.0f} TFLOP/s,\nand decode steps of {DECODE} times what their "
          "bytes take at the card's bandwidth: on the README's CPU both ratios are\nto matrix products; "
          "nothing was measured on a GPU.\n\n"
          "| Qwen2.5-7B-Instruct | the paper: its own protocol, a split that leaks, n = 80 | ours: official "
          f"protocol, family split, n = {num_test} |\n|---|---|---|")
    for arm, success in PAPER.items():
        print(f"| {arm} | {success:.2f} | not run |")


if __name__ == "__main__":
    main()
