"""The ablation on BFCL: RC-GRPO beside its alternatives, by this repository's own commands.

    python results/ablation.py            # tables and picture, from the blocks that are done
    python results/ablation.py run        # first the next block that is not done: hours

A block is one stage 1, its arms of stage 2 and their evaluations, on one machine. It needs committed files
alone and ends with its folder bfcl/SIZE-BLOCK/; one that was interrupted goes on where it was, as long as runs/
is there. The plan stands in bfcl.md, whose end this script writes. One thing is decided on the way, after the
first stage 1: all arms learn from the reward `official`, unless fewer than 3 % of the rollouts of validation
tasks succeed.
"""
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import rollout
from sft_rctp import write

HERE = ROOT / "results/bfcl"


@dataclass
class Size:
    """What a machine can do in two and a half hours a block."""
    where: str
    blocks: str  # in their order
    world: str  # flags of all commands
    stage1: str
    stage2: str
    train: str = ""  # the tasks that are trained on
    samples: int = 4  # rollouts a task and token of an evaluation


@dataclass
class Block:
    seed: int
    stage1: str  # flags
    arms: dict[str, str]  # flags of stage 2


CPU = ("--docs signature --categories multi_turn_base "
       "--max_len 2048 --max_turn_tokens 128 --max_total_tokens 768")
STAGE1 = "--epochs 6 --batch 8 --lr 1e-4 --save_every 10"
STAGE2 = "--prompts 2 --group 8 --lr 3e-5 --save_every 5"
SIZES = {"gpu": Size("one H100", "12534", "--docs slim", "--epochs 3", "--steps 100"),
         "cpu-bf16": Size("two CPU cores with bf16", "1234", CPU, STAGE1, STAGE2 + " --steps 26",
                         "--limit 40"),
         "cpu": Size("two CPU cores without bf16", "1", CPU, STAGE1, STAGE2 + " --steps 6", "--limit 10", 1)}
HIGH = {"always-high": "--reward_tokens high", "rc-grpo": ""}
BLOCKS = {"1": Block(0, "", HIGH),
          "2": Block(1, "", HIGH),
          "3": Block(0, "--arm sft", {"grpo": "--reward_tokens none", "rc-grpo": ""}),
          "4": Block(0, "", {"signed": "--reward_tokens high --advantage signed",
                           "within": "--advantage token"}),
          "5": Block(2, "", HIGH)}
PARTS = ("test", "train")
LOGGED = ("step", "loss", "reward", "rc/reward_high", "rc/reward_low", "frac_reward_zero_std",
          "rc/var_within_tokens", "rc/var_between_tokens", "rc/mode_gap", "tool_call_counts/mean",
          "num_turns/mean", "kl", "grad_norm", "step_time")


# ---- One block ---------------------------------------------------------------------------------------------
def command(script, *flags):
    """Run it under torchrun, a process a GPU. Errors: SystemExit with its code."""
    words = [script, *" ".join(map(str, flags)).split()]
    print("\n$ torchrun", *words, flush=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown_timeout", "3600",
                "--nproc_per_node", str(torch.cuda.device_count() or 1)]
    if code := subprocess.run([*torchrun, *words], cwd=ROOT).returncode:
        raise SystemExit(code)


def machine():
    """What figures depend on besides the flags."""
    if torch.cuda.is_available():
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")]
        name = f"{len(os.sched_getaffinity(0))} cores of {models[0]}"
    compute = rollout.compute_dtype("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {"machine": name, "compute": str(compute), "torch": torch.__version__}


def size_here():
    if torch.cuda.is_available():
        return "gpu"
    return "cpu-bf16" if machine()["compute"] == "torch.bfloat16" else "cpu"


def read(path):
    return json.loads(Path(path).read_text())


def run(kind, number):
    """One block, from its commands to its folder, which is there when all of it is done."""
    size, block = SIZES[kind], BLOCKS[number]
    work = Path(f"runs/ablation/{kind}-{number}")
    begun = ROOT / work / "begun.json"
    if not begun.exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True)
        write(begun, json.dumps({**machine(), "commit": head.stdout.strip()}))
    found = read(begun)
    if not machine().items() <= found.items():
        raise SystemExit(f"{work} was begun elsewhere, by {found}, and a block stays on one machine: "
                         "delete that folder")

    # stage 1, and what its successes on validation tasks decide for all blocks
    common = f"{size.world} --seed {block.seed}"
    training = f"{common} {size.train} --eval_every 0"
    models = {"stage1": work / "stage1/model"}
    command("sft_rctp.py", training, size.stage1, block.stage1, "--out", work / "stage1")
    if number == "1":
        command("eval_bfcl.py", common, "--part val --samples 8 --ckpt", models["stage1"],
                "--out", work / "val")
        found["validation"] = read(ROOT / work / "val/eval.json")["overall"]
        found["reward"] = "official" if found["validation"]["accuracy"] >= 0.03 else "progress"
    else:
        found["reward"] = read(HERE / f"{kind}-1/block.json")["reward"]

    # stage 2
    for arm, flags in block.arms.items():
        if "signed" in flags and found["reward"] == "progress":
            continue  # it is for rewards of 0 and 1
        command("rl_rcgrpo.py", training, size.stage2, flags, "--reward", found["reward"],
                "--init", models["stage1"], "--out", work / arm)
        models[arm] = work / arm / "model"

    # evaluations: always the official reward
    tokens = "--reward_tokens high,low,none --samples"
    for part in PARTS:
        chosen = size.train if part == "train" else ""
        command("eval_bfcl.py", common, f"--part {part}", chosen, tokens, size.samples,
                "--ckpt", *models.values(), "--out", work / part)

    partial = HERE / f"{kind}-{number}.partial"
    for part in PARTS:
        for name in ("config.json", "eval.json"):
            write(partial / part / name, (ROOT / work / part / name).read_text())
    logs = {}
    for arm in models:
        lines = (ROOT / work / arm / "metrics.jsonl").read_text().splitlines()
        logs[arm] = [{name: line[name] for name in LOGGED if name in line} for line in map(json.loads, lines)]
    write(partial / "block.json", json.dumps({**found, "logs": logs}, indent=1))
    partial.rename(HERE / f"{kind}-{number}")


def main():
    if sys.argv[1:] == ["run"]:
        kind = size_here()
        left = [number for number in SIZES[kind].blocks if not (HERE / f"{kind}-{number}").exists()]
        if left:
            run(kind, left[0])


if __name__ == "__main__":
    main()
