"""Predict memory, hours and disk of the paper's two runs before they are started, and print their commands.

    python results/recipe.py

Memory is that of `bench.py plan`, for models of their shapes and conversations of full length. Hours are for
conversations made of the gold calls, with the default model's tokenizer and template. No rate was measured on
a GPU: two ratios measured on a CPU are applied to the figures of the datasheets. One step of stage 2 with
slim docs comes first; its times per launch are assumptions.
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
from transformers import LlamaConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench
import rl_rcgrpo
import rollout
import sft_rctp
from bfcl_env import make_env_fn, load_tasks, select_tasks, split

MAX_LEN = 16384
# The paper's run. Its hyper-parameters (tables 10 to 12) are the defaults. It says nothing about the docs.
TASKS = f"--protocol paper --split_by paper --reward paper --tool_docs full --max_len {MAX_LEN}"
TRAINING = f"{TASKS} --tokens_per_microbatch {MAX_LEN} --eval_every 0"
STAGE1 = f"{TRAINING} --failures sampled --reward_token_dropout 0"
STAGE2 = f"{TRAINING} --ratio trajectory"
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
QWEN = "Qwen/Qwen2.5-7B-Instruct"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
CONFIGS = {
    QWEN: Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        max_position_embeddings=32768,
        tie_word_embeddings=False),
    LLAMA: LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=False),
}
# Success on BFCL in percent, as the paper reports it for the models of CONFIGS.
PAPER = {
    "base model": (11.25, 0.00),
    "SFT + GRPO": (48.75, 35.00),
    "SFT + RC-GRPO": (46.25, 35.00),
    "RCTP-FT + GRPO": (73.75, 46.25),
    "RCTP-FT + RC-GRPO": (85.00, 48.75),
}


def write_stand_in(folder, config):
    """Write a folder with a model's shape and the default model's tokenizer."""
    policy = rollout.load_policy(rollout.DEFAULT_MODEL, torch.float32, "meta", weights=False)
    policy.tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


@contextlib.contextmanager
def silence():
    """Hide what is printed: tables, and the same warning for every plan."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def plan(ranks, *flags):
    """Return the result of `bench.py plan` without its printed lines."""
    words = " ".join(flags).split()
    with silence():
        return bench.bench_plan(["--ranks", str(ranks), *words])


@dataclass
class Typical:
    """Mean tokens of conversations made of the gold calls, and operations of an update on a group of them."""
    prefix: float  # shared by a group
    tail: float  # sampled tokens and results, after the prefix
    sampled: float
    flops: float


def typical_conversation(folder, group_size, flags) -> Typical:
    args = sft_rctp.parse_args(["--model", folder, *flags.split()])
    policy = rollout.load_policy(folder, torch.float32, "meta", weights=False)
    make_env = make_env_fn(args, policy.call_format(args.call_format))
    with silence():
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


def print_commands(model):
    out = f"runs/{model.split('/')[1]}"
    print(f"\n## {model}\n\n"
          f"torchrun --nproc_per_node N sft_rctp.py --model {model} {STAGE1} --out {out}/sft\n"
          f"torchrun --nproc_per_node N rl_rcgrpo.py --model {out}/sft/model {STAGE2} --out {out}/rl\n"
          f"torchrun --nproc_per_node N eval_bfcl.py --ckpt {out}/sft/model {out}/rl/model {TASKS} "
          f"--reward_tokens high,low --samples 4 --out {out}/eval")


def print_prediction(cards, plan1, plan2, typical, num_train, num_test):
    """Print the memory, hours and disk of a run.

    Args:
        plan1, plan2: results of `plan` for the two stages.
        num_train, num_test: tasks.
    """
    stage1 = sft_rctp.parse_args(STAGE1.split())
    stage2 = rl_rcgrpo.parse_args(STAGE2.split())
    updates = stage1.epochs * math.ceil(num_train / (stage1.batch_size // 2))  # one pair per task
    prompts = stage2.prompts_per_step
    rate = MFU * cards.flops * cards.count
    occupied = plan2["bytes"]["masters (fp32)"] + plan2["bytes"]["AdamW moments"]
    # Seconds of the phases of a step of stage 2.
    rollouts = sampling_seconds(cards, plan2, typical, prompts, stage2.group_size, occupied)
    reference = prompts * typical.flops / 3 / rate  # the forward pass is a third
    update = RECOMPUTED * prompts * typical.flops / rate
    failures = sampling_seconds(cards, plan2, typical, num_train, 1, plan1["bytes"]["masters (fp32)"])
    hours1 = (failures + updates * RECOMPUTED * plan1["flops"] / rate) / 3600
    hours2 = stage2.steps * (rollouts + reference + update) / 3600
    hours3 = 2 * 2 * sampling_seconds(cards, plan2, typical, num_test, 4, 0) / 3600
    # Bytes per parameter: model/ of each stage in fp32 and its checkpoint with AdamW's moments; the next
    # checkpoint of stage 2 while it is written; the download in bf16.
    disk = plan1["parameters"] * (2 * (4 + 12) + 12 + 2) / 1e9
    print(f"\n{cards.name}")
    for stage, planned in (("stage 1", plan1), ("stage 2", plan2)):
        peak = planned["peak_bytes"] / 2**30
        fits = "" if peak < cards.gib else ": does NOT fit"
        print(f"{stage}: planned peak {peak:.1f} of {cards.gib} GiB per card{fits}")
    print(f"predicted hours: stage 1 {hours1:.2g} ({updates} updates), stage 2 {hours2:.2g} ({stage2.steps} "
          f"steps of {prompts} x {stage2.group_size} rollouts), evaluation {hours3:.2g}; a step of stage 2: "
          f"rollouts {rollouts:.0f} s, reference {reference:.0f}, update {update:.0f}\n"
          f"disk: {disk:.0f} GB")


def print_slim_step(folder):
    """Print an estimate of one step of stage 2 on one card with slim docs."""
    cards = CARDS[0]
    prompts = 52
    group_size = 5
    step = f"--prompts_per_step {prompts} --group_size {group_size}"
    planned = plan(1, f"--stage 2 --model {folder}", step, SLIM)
    typical = typical_conversation(folder, group_size, SLIM)
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
    parts = split(load_tasks(), "paper")
    counts = len(parts["train"]), len(parts["test"])
    group_size = rl_rcgrpo.parse_args([]).group_size
    with tempfile.TemporaryDirectory() as folder:
        for model, config in CONFIGS.items():
            write_stand_in(folder, config)
            if model == QWEN:
                print_slim_step(folder)
            print_commands(model)
            typical = typical_conversation(folder, group_size, STAGE1)
            for cards in CARDS:
                plans = [
                    plan(cards.count, f"--stage 1 --model {folder}", STAGE1),
                    plan(cards.count, f"--stage 2 --model {folder}", STAGE2),
                ]
                print_prediction(cards, *plans, typical, *counts)
    print(f"\nA conversation: {typical.prefix:.0f} tokens of prompt, {typical.tail:.0f} of messages and "
          f"results, {typical.sampled:.0f} of them sampled.\nFailures: one rollout per task. These are "
          "RCTP-FT + RC-GRPO; other arms: --arm sft, --reward_tokens high or none.\nHours assume "
          f"{MFU:.0%} of {CARDS[0].flops / 1e12:.0f} TFLOP/s, and decode steps of {DECODE} times what their "
          "bytes take at the card's\nbandwidth: on the README's CPU both ratios are to matrix products; "
          "nothing was measured on a GPU.\n\n"
          f"| success in percent, n = {counts[1]} | {' | '.join(CONFIGS)} | ours |\n|---|---|---|---|")
    for arm, (qwen, llama) in PAPER.items():
        print(f"| {arm} | {qwen:.2f} | {llama:.2f} | not run |")


if __name__ == "__main__":
    main()
