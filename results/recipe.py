"""What the paper's 7B run takes, before it is started: commands, memory, hours, disk.

    python results/recipe.py

Memory is that of `bench.py plan`, for a model of Qwen2.5-7B's shape and conversations of full length. Hours
are for conversations as the gold calls make them, with the default model's tokenizer and template. No rate
was measured on a GPU: two ratios of a CPU are carried over to the datasheets' figures.
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

MODEL, MAX_LEN = "Qwen/Qwen2.5-7B-Instruct", 16384
SHARED = f"--tool_docs full --max_len {MAX_LEN} --tokens_per_microbatch {MAX_LEN}"
# On two cores of an AMD EPYC (avx512_bf16), see README: what training reaches of the rate of large matrix
# products, `bench.py train`; a decode step over its bare matrix products, `bench.py sampler`.
MFU, DECODE = 0.26, 1.5
RECOMPUTED = 4 / 3  # gradient checkpointing runs the forward pass twice


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


@dataclass
class Typical:
    """Mean tokens of conversations whose calls are the gold ones; operations of an update on a group."""
    prefix: float  # what a group shares
    own: float  # sampled tokens and results
    sampled: float
    flops: float

    @classmethod
    def of(cls, folder, group):
        args = sft_rctp.parse_args(["--model", folder, *SHARED.split()])
        policy = rollout.load_policy(folder, torch.float32, "meta", weights=False)
        tasks = select_tasks(args)[::18]
        pairs, _ = sft_rctp.stage1_data(policy, tasks, make_env_fn(args, policy.call_format(args.call_format)), args)
        gold = [t for pair in pairs for t in pair if t.reward == 1]
        flops = []
        for t in gold:
            packs = sft_rctp.pack([t] * group, args.tokens_per_microbatch)
            flops.append(bench.flops(policy.model, [p.layout for p in packs], group * sum(t.loss_mask)))
        return cls(mean(t.loss_mask.index(1) for t in gold), mean(len(t.loss_mask) - t.loss_mask.index(1) for t in gold),
                   mean(sum(t.loss_mask) for t in gold), mean(flops))


def sampling(cards, planned, typical, groups, size, held):
    """Seconds of `groups` of `size` rollouts, beside `held` bytes a card: decode steps by the bytes that they
    read (weights, each group's prefix, half of a row's own), results and prefixes by their operations."""
    weights = planned["bytes"]["rollout / reference copy"]
    token = planned["bytes"]["KV cache"] / MAX_LEN  # a plan's cache is that of one full conversation
    mine = groups * size / cards.count
    row = token * (typical.own + typical.prefix / size)  # bytes
    rows = min(mine, 0.6 * (cards.gib * 2**30 - held - weights) / row)  # live at once
    read = weights + rows * (row - token * typical.own / 2)
    steps = typical.sampled * mine / rows
    computed = groups * (typical.prefix + size * (typical.own - typical.sampled))  # tokens
    return (DECODE * steps * read / cards.bandwidth
            + 2 * planned["parameters"] * computed / (MFU * cards.flops * cards.count))


def main():
    stage1, stage2 = sft_rctp.parse_args([]), rl_rcgrpo.parse_args([])  # presets and defaults
    train, test = (split(load_tasks())[part] for part in ("train", "test"))
    updates = stage1.epochs * math.ceil(len(train) / (stage1.batch_size // 2))  # a pair a task
    with tempfile.TemporaryDirectory() as folder:
        stand_in(folder)
        plans = [[plan(cards.count, "--stage", stage, "--model", folder) for stage in "12"] for cards in CARDS]
        typical = Typical.of(folder, stage2.group_size)
    print(f"Stage 1: {updates} updates; stage 2: {stage2.steps} steps of {stage2.prompts_per_step} x {stage2.group_size} "
          f"rollouts; evaluation: {len(test)} tasks x 4 rollouts x 3 tokens x 2 checkpoints.\n"
          f"A conversation: {typical.prefix:.0f} tokens of prompt, {typical.own:.0f} of messages and "
          f"results, {typical.sampled:.0f} of them sampled.")
    for cards, (one, two) in zip(CARDS, plans):
        rate = MFU * cards.flops * cards.count
        held = two["bytes"]["masters (fp32)"] + two["bytes"]["AdamW moments"]
        rolled = sampling(cards, two, typical, stage2.prompts_per_step, stage2.group_size, held)
        reference = stage2.prompts_per_step * typical.flops / 3 / rate  # the forward pass is a third
        update = RECOMPUTED * stage2.prompts_per_step * typical.flops / rate
        hours = {"stage 1": updates * RECOMPUTED * one["flops"] / rate / 3600,
                 "stage 2": stage2.steps * (rolled + reference + update) / 3600,
                 "evaluation": 3 * 2 * sampling(cards, two, typical, len(test), 4, 0) / 3600}
        # Bytes a parameter: each stage's model/ in fp32 and checkpoint with AdamW's moments; stage 2's next
        # checkpoint, while it is written; the download in bf16.
        disk = one["parameters"] * (2 * (4 + 12) + 12 + 2) / 1e9
        torchrun = f"torchrun --standalone --nproc_per_node {cards.count}"
        print(f"\n## {cards.name}\n\n"
              f"{torchrun} sft_rctp.py --model {MODEL} {SHARED} --out runs/7b/sft\n"
              f"{torchrun} rl_rcgrpo.py --model runs/7b/sft/model {SHARED} --out runs/7b/rl\n"
              f"{torchrun} eval_bfcl.py --ckpt runs/7b/sft/model runs/7b/rl/model --tool_docs full "
              f"--max_len {MAX_LEN} --reward_tokens high,low,none --samples 4 --out runs/7b/eval\n")
        for stage, planned in (("stage 1", one), ("stage 2", two)):
            print(f"{stage}: planned peak {planned['peak_bytes'] / 2**30:.0f} of {cards.gib} GiB a card")
        print(f"predicted hours: {', '.join(f'{stage} {of:.2g}' for stage, of in hours.items())}; a step of "
              f"stage 2: rollouts {rolled:.0f} s, reference {reference:.0f}, update {update:.0f}\n"
              f"disk: {disk:.0f} GB")
    print("\nThese are RCTP-FT + RC-GRPO; other arms: --arm sft, --reward_tokens high or none. Hours assume "
          f"{MFU:.0%} of {CARDS[0].flops / 1e12:.0f} TFLOP/s,\nand decode steps of {DECODE} times what their "
          "bytes take at the card's bandwidth: on the README's CPU both ratios are\nto matrix products; "
          "nothing was measured on a GPU.\n\n"
          "| Qwen2.5-7B-Instruct | the paper: its own protocol, a split that leaks, n = 80 | ours: official "
          f"protocol, family split, n = {len(test)} |\n|---|---|---|")
    for arm, success in PAPER.items():
        print(f"| {arm} | {success:.2f} | not run |")


if __name__ == "__main__":
    main()
