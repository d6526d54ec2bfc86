"""What the paper's 7B run takes, before it is started: commands, memory, hours, disk.

    python results/recipe.py

Memory and operations are `bench.py plan`'s, for a model of Qwen2.5-7B's shape; lengths by the default model's
tokenizer and template. No rate was measured on a GPU. The hours carry over what was measured on a CPU: the
share of the peak that training reaches, and how much longer a decode step takes than its matrix products.
"""
import contextlib
import io
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench
import rl_rcgrpo
import rollout
import sft_rctp
from bfcl_env import load_tasks, split

MODEL, SHARED = "Qwen/Qwen2.5-7B-Instruct", "--docs full --max_len 16384 --tokens_per_microbatch 16384"
MFU, DECODE = 0.26, 1.5  # `bench.py train`, `bench.py sampler` on two cores of an AMD EPYC (avx512_bf16)
RECOMPUTED = 4 / 3  # gradient checkpointing runs the forward pass twice
SAMPLED = 600  # tokens a rollout: ten messages of 60


@dataclass
class Cards:
    name: str
    count: int
    gib: float
    flops: float  # of bf16 products, dense, a second
    bandwidth: float  # bytes a second


CARDS = [Cards("one card of 141 GB (H200)", 1, 140, 989e12, 4.8e12),
         Cards("eight cards of 80 GB (H100)", 8, 79, 989e12, 3.35e12)]
PAPER = {"base model": 11.25, "SFT + GRPO": 48.75, "SFT + RC-GRPO": 46.25, "RCTP-FT + GRPO": 73.75,
         "RCTP-FT + RC-GRPO": 85.00}


def stand_in(folder):
    """A folder with the shape of Qwen2.5-7B and the default model's tokenizer."""
    policy = rollout.load_policy(rollout.DEFAULT_MODEL, torch.float32, "meta", weights=False)
    policy.tokenizer.save_pretrained(folder)
    Qwen2Config(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                intermediate_size=18944, vocab_size=152064, max_position_embeddings=32768,
                tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)


def plan(ranks, *flags):
    with contextlib.redirect_stdout(io.StringIO()):
        return bench.bench_plan(["--ranks", str(ranks), *flags, *SHARED.split()])


def decoding(cards, held, rollouts):
    """Seconds of a batch, by the bytes that each step reads: the weights, and a row's half-full cache. `held`
    is a plan's "bytes", whose KV cache is that of one full conversation."""
    weights, cache = held["rollout / reference copy"], held["KV cache"]
    free = cards.gib * 2**30 - held["masters (fp32)"] - held["AdamW moments"] - weights
    mine = math.ceil(rollouts / cards.count)
    rows = min(mine, int(0.6 * free / cache))  # live at once
    steps = SAMPLED * math.ceil(mine / rows)
    return DECODE * steps * (weights + rows * cache / 2) / cards.bandwidth


def main():
    stage1, stage2 = sft_rctp.parse_args([]), rl_rcgrpo.parse_args([])  # presets and defaults
    train, test = (split(load_tasks())[part] for part in ("train", "test"))
    updates = stage1.epochs * math.ceil(len(train) / (stage1.batch // 2))  # a pair a task
    rollouts = stage2.prompts * stage2.group  # a step
    evaluated = len(test) * 4 * 3 * 2  # samples, tokens, checkpoints
    print(f"Stage 1: {updates} updates; stage 2: {stage2.steps} steps of {rollouts} rollouts; evaluation: "
          f"{evaluated:,} rollouts.")
    with tempfile.TemporaryDirectory() as folder:
        stand_in(folder)
        plans = [[plan(cards.count, flag, folder) for flag in ("--model", "--init")] for cards in CARDS]
    for cards, (one, two) in zip(CARDS, plans):
        rate = MFU * cards.flops * cards.count
        sampling = decoding(cards, two["bytes"], rollouts)
        reference = two["flops"] / 3 / rate  # a forward pass of three
        update = RECOMPUTED * two["flops"] / rate
        hours = {"stage 1": updates * RECOMPUTED * one["flops"] / rate / 3600,
                 "stage 2": stage2.steps * (sampling + reference + update) / 3600,
                 "evaluation": decoding(cards, two["bytes"], evaluated) / 3600}
        # A folder's model/ in fp32, a checkpoint with its moments, and the next one while it is written.
        disk = 2 * (4 + 2 * 12) * one["parameters"] / 1e9
        torchrun = f"torchrun --standalone --nproc_per_node {cards.count}"
        print(f"\n## {cards.name}\n\n"
              f"{torchrun} sft_rctp.py --model {MODEL} {SHARED} --out runs/7b/sft\n"
              f"{torchrun} rl_rcgrpo.py --init runs/7b/sft/model {SHARED} --out runs/7b/rl\n"
              f"{torchrun} eval_bfcl.py --ckpt runs/7b/sft/model runs/7b/rl/model --docs full "
              "--max_len 16384 --reward_tokens high,low,none --samples 4 --out runs/7b/eval\n")
        for stage, planned in (("stage 1", one), ("stage 2", two)):
            print(f"{stage}: planned peak {planned['peak_bytes'] / 2**30:.0f} of {cards.gib} GiB a card")
        print(f"predicted hours: {', '.join(f'{stage} {of:.1f}' for stage, of in hours.items())}; a step of "
              f"stage 2: rollouts {sampling:.0f} s, reference {reference:.0f}, update {update:.0f}\n"
              f"disk: {disk:.0f} GB")
    print(f"\nAssumed: {MFU:.0%} of {CARDS[0].flops / 1e12:.0f} TFLOP/s, and decode steps of {DECODE} times what "
          "reading weights and cache takes (both ratios measured on two cores of an AMD EPYC with avx512_bf16,\n"
          f"nothing on a GPU); {SAMPLED} sampled tokens a rollout; in stage 2 conversations of full length, "
          "which makes its updates an upper bound.\n\n"
          "| Qwen2.5-7B-Instruct | the paper: its own protocol, a split that leaks, n = 80 | ours: official "
          f"protocol, family split, n = {len(test)} |\n|---|---|---|")
    for arm, success in PAPER.items():
        print(f"| {arm} | {success:.2f} | not run |")


if __name__ == "__main__":
    main()
