"""Run the ablation on BFCL: RC-GRPO and its alternatives, by the commands of this repository.

    python results/ablation.py            # tables and picture, from the blocks that are done
    python results/ablation.py run        # first the next block that is not done: hours

A block is one stage 1, its arms of stage 2 and their evaluations, on one machine. It needs committed files
alone and ends with its folder bfcl/SIZE-BLOCK/. An interrupted block resumes as long as runs/ is there. The
plan is in bfcl.md, where this script writes the results. One thing is decided on the way, after the first
stage 1: all arms learn from the reward `official`, unless fewer than 3 % of the rollouts of validation tasks
succeed.
"""
import contextlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import eval_bfcl
import rollout
from sft_rctp import atomic_write

HERE = ROOT / "results/bfcl"
# Marks around the results in bfcl.md and in the README.md beside it.
BEGIN = "<!-- ablation -->\n"
END = "<!-- /ablation -->\n"


@dataclass
class Size:
    """The extent of the ablation on one kind of machine."""
    machine: str
    hours: float  # per block, predicted
    blocks: str  # their numbers, in the order in which they run
    common: str  # flags of all commands
    stage1: str  # flags
    stage2: str  # flags
    train: str = ""  # flags that choose the tasks that are trained on
    test: str = ""  # flags that choose the held-out tasks
    samples: int = 4  # rollouts per task and reward token in an evaluation


@dataclass
class Block:
    seed: int
    stage1: str  # flags
    arms: dict[str, str]  # flags of stage 2


CPU = ("--tool_docs signature --categories multi_turn_base "
       "--max_len 2048 --max_new_tokens 128 --max_sampled_tokens 768")
STAGE1 = "--epochs 6 --batch_size 8 --lr 1e-4 --save_every 10"
STAGE2 = "--prompts_per_step 2 --group_size 8 --lr 3e-5 --beta 0.05 --save_every 5"
SIZES = {
    "cpu-bf16": Size(
        "two CPU cores with bf16",
        2.4,
        "1234",
        CPU,
        STAGE1,
        STAGE2 + " --steps 26",
        train="--max_tasks 40"),
    "cpu": Size(
        "two CPU cores without bf16",
        2.4,
        "1",
        CPU,
        STAGE1,
        STAGE2 + " --steps 6",
        train="--max_tasks 10",
        test="--max_tasks 10",
        samples=1),
    "gpu": Size(
        "one H100",
        3.0,
        "12534",
        "--tool_docs slim",
        "--epochs 3 --batch_size 32 --lr 5e-5",
        "--steps 100 --prompts_per_step 64 --group_size 4 --lr 1e-5 --beta 0.05"),
}
HIGH = {"always-high": "--reward_tokens high", "rc-grpo": ""}
SFT = {"grpo": "--reward_tokens none", "rc-grpo": ""}
ADVANTAGES = {
    "sign": "--reward_tokens high --advantage sign",
    "within": "--advantage within_reward_token",
}
BLOCKS = {
    "1": Block(0, "", HIGH),
    "2": Block(1, "", HIGH),
    "3": Block(0, "--arm sft", SFT),
    "4": Block(0, "", ADVANTAGES),
    "5": Block(2, "", HIGH),
}
# Arms as evaluations name them, after the name of stage 1.
NAMES = {
    "stage1": "",
    "always-high": " + GRPO (high token)",
    "rc-grpo": " + RC-GRPO",
    "grpo": " + GRPO (no token)",
    "sign": " + GRPO (high token), sign advantage",
    "within": " + RC-GRPO, within_reward_token advantage",
}
PARTS = {"test": "held-out", "train": "trained"}
TOKENS = ("high", "low", "none")  # reward tokens of an evaluation
LOGGED = (
    "step",
    "loss",
    "reward",
    "rc/reward_high",
    "rc/reward_low",
    "frac_reward_zero_std",
    "rc/var_within_tokens",
    "rc/var_between_tokens",
    "rc/mode_gap",
    "tool_call_counts/mean",
    "num_turns/mean",
    "kl",
    "grad_norm",
    "step_time",
)


# ---- One block ---------------------------------------------------------------------------------------------
def command(script, *flags):
    """Run a script under torchrun, one process per GPU; after Ctrl-C wait until its step is saved.

    Raises:
        SystemExit: if it fails.
    """
    words = [script, *" ".join(map(str, flags)).split()]
    print("\n$ torchrun", *words, flush=True)
    processes = torch.cuda.device_count() or 1
    torchrun = f"-m torch.distributed.run --standalone --shutdown_timeout 3600 --nproc_per_node {processes}"
    process = subprocess.Popen([sys.executable, *torchrun.split(), *words], cwd=ROOT)
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
    if process.returncode:
        raise SystemExit(process.returncode)


def machine():
    """Return the properties of this machine and checkout that the figures depend on."""
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
    name = f"{os.cpu_count()} cores of {processor}"
    device = torch.device("cpu")
    if torch.cuda.is_available():
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        device = torch.device("cuda")
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, cwd=ROOT, text=True, capture_output=True).stdout.strip()
    return {
        "machine": name,
        "compute": str(rollout.compute_dtype("auto", device)),
        "torch": torch.__version__,
        "commit": commit,
    }


def size_here():
    """Return the key in SIZES for this machine."""
    if torch.cuda.is_available():
        return "gpu"
    return "cpu-bf16" if machine()["compute"] == "torch.bfloat16" else "cpu"


def read(path):
    return json.loads(Path(path).read_text())


def run(kind, number):
    """Run one block, from its commands to its folder, which appears when all of it is done.

    Raises:
        SystemExit: if another machine or commit began this block.
    """
    size = SIZES[kind]
    block = BLOCKS[number]
    work = Path(f"runs/ablation/{kind}-{number}")
    begun = ROOT / work / "begun.json"
    if not begun.exists():
        atomic_write(begun, machine())
    found = read(begun)
    if found != machine():
        raise SystemExit(f"{work} was begun by {found}, and this is {machine()}: a block stays on one "
                         "machine and commit; continue there, or delete that folder")

    # Stage 1. The successes of the first one on validation tasks decide the reward of all blocks.
    common = f"{size.common} --seed {block.seed}"
    training = f"{common} {size.train} --eval_every 0"
    models = {"stage1": work / "stage1/model"}
    command("sft_rctp.py", training, size.stage1, block.stage1, f"--out {work}/stage1")
    if number == "1":
        command("eval_bfcl.py", common, f"--split val --samples 8 --ckpt {models['stage1']} --out {work}/val")
        found["validation"] = read(ROOT / work / "val/eval.json")["overall"]
        found["reward"] = "official" if found["validation"]["accuracy"] >= 0.03 else "progress"
    else:
        found["reward"] = read(HERE / f"{kind}-1/block.json")["reward"]

    # Stage 2.
    for arm, flags in block.arms.items():
        if "sign" in flags and found["reward"] == "progress":
            continue  # the sign advantage is for rewards of 0 and 1
        command(
            "rl_rcgrpo.py", training, size.stage2, flags,
            f"--reward {found['reward']} --model {models['stage1']} --out {work}/{arm}")
        models[arm] = work / arm / "model"

    # Evaluations, always with the official reward.
    for part in PARTS:
        tasks = size.train if part == "train" else size.test
        sampling = f"--split {part} {tasks} --reward_tokens high,low,none --samples {size.samples}"
        command("eval_bfcl.py", common, sampling, "--ckpt", *models.values(), f"--out {work}/{part}")

    # The folder of the block.
    partial = HERE / f"{kind}-{number}.partial"
    for part in PARTS:
        for name in ("config.json", "eval.json"):
            atomic_write(partial / part / name, (ROOT / work / part / name).read_text())
    logs = {}
    for arm in models:
        logs[arm] = []
        for text in (ROOT / work / arm / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            logs[arm].append({name: line[name] for name in LOGGED if name in line})
    atomic_write(partial / "block.json", {**found, "logs": logs})
    partial.rename(HERE / f"{kind}-{number}")


# ---- Tables and picture ------------------------------------------------------------------------------------
@dataclass
class Result:
    """An arm that was run."""
    number: str  # the number of its block
    arm: str
    label: str
    parts: dict[str, dict]  # part -> the arm's row of eval.json
    log: list[dict]
    block: dict  # block.json


def label(number, arm):
    return ("SFT" if "sft" in BLOCKS[number].stage1 else "RCTP-FT") + NAMES[arm]


def finished(kind):
    """Yield the results of all arms that were run."""
    for number in SIZES[kind].blocks:
        folder = HERE / f"{kind}-{number}"
        if folder.exists():
            block = read(folder / "block.json")
            tables = {part: read(folder / part / "eval.json")["table"] for part in PARTS}
            for n, (arm, log) in enumerate(block["logs"].items()):
                rows = {part: table[n] for part, table in tables.items()}
                yield Result(number, arm, label(number, arm), rows, log, block)


def markdown(head, lines) -> str:
    """Return a table; short lines are filled with empty cells."""
    width = len(head)
    rows = [head, ["---"] * width]
    for line in lines:
        rows.append([*line, *[""] * (width - len(line))])
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def success_table() -> str:
    """Return the successes of every arm of every size, or that the arm was not run."""
    lines = []
    for kind, size in SIZES.items():
        done = {(result.number, result.arm): result for result in finished(kind)}
        not_run = f"not run: predicted {size.hours} hours on {size.machine}"
        if not done:
            lines.append([f"{kind} {', '.join(size.blocks)}", "all arms", f"{not_run}, a block"])
            continue
        progress = done["1", "stage1"].block["reward"] == "progress"
        for number in size.blocks:
            title = f"{kind} {number}"
            arms = ["stage1", *BLOCKS[number].arms]
            if "sign" in arms and progress:
                arms.remove("sign")
                reason = "not run: it is for rewards of 0 and 1, and these arms learn from `progress`"
                lines.append([title, label(number, "sign"), reason])
            if (number, "stage1") not in done:
                lines.append([title, "; ".join(label(number, arm) for arm in arms), not_run])
                continue
            for arm in arms:
                parts = done[number, arm].parts
                cells = [title, done[number, arm].label]
                for part in PARTS:
                    for reward_token in TOKENS:
                        cells.append(eval_bfcl.percent(parts[part][reward_token]["overall"]).strip())
                cells.append(" + ".join(str(parts[part]["high"]["overall"]["n"]) for part in PARTS))
                stage_info = parts["test"]["stage_info"]
                lines.append([*cells, stage_info["rollouts"], f"{stage_info['minutes']:.0f}"])
    head = ["block", "arm"]
    for title in PARTS.values():
        head += [f"{title}, {reward_token}" for reward_token in TOKENS]
    return markdown([*head, "n a token", "rollouts", "minutes"], lines)


def first_and_last(log, name, form="{:.2f}") -> str:
    """Return the means of a logged figure over the first and the last quarter of the steps."""
    values = [line[name] for line in log if name in line]
    if not values:
        return ""
    quarter = max(1, len(log) // 4)
    first = form.format(mean(values[:quarter]))
    last = form.format(mean(values[-quarter:]))
    return f"{first} → {last}"


def training_table(kind) -> str:
    lines = []
    for result in finished(kind):
        if result.arm == "stage1":
            continue
        log = result.log
        within = mean(line["rc/var_within_tokens"] for line in log)
        between = mean(line["rc/var_between_tokens"] for line in log)
        lines.append([
            result.number,
            result.label,
            first_and_last(log, "reward"),
            first_and_last(log, "rc/reward_high"),
            first_and_last(log, "rc/reward_low"),
            first_and_last(log, "frac_reward_zero_std"),
            f"{within:.3f} + {between:.3f}",
            first_and_last(log, "rc/mode_gap"),
            first_and_last(log, "tool_call_counts/mean"),
            first_and_last(log, "num_turns/mean"),
            first_and_last(log, "kl", "{:.4f}"),
            first_and_last(log, "grad_norm"),
        ])
    head = ["block", "arm", "reward", "under high", "under low", "zero-std groups",
            "variance within + between tokens", "mode gap", "calls", "messages", "KL", "gradient norm"]
    return markdown(head, lines)


def error_table(kind) -> str:
    """Return how the rollouts of the evaluations fail, and whether the model still calls functions."""
    lines = []
    for result in finished(kind):
        for part, title in PARTS.items():
            for reward_token in TOKENS:
                f = result.parts[part][reward_token]["overall"]
                lines.append([
                    result.number,
                    result.label,
                    f"{title}, {reward_token}",
                    f"{f['calls']:.1f}",
                    f"{f['messages']:.1f}",
                    f"{f['tokens']:.0f}",
                    ", ".join(f"{name} {count}" for name, count in f["errors"].items()),
                ])
    return markdown(["block", "arm", "tasks, token", "calls", "messages", "tokens", "errors"], lines)


def compared(kind, blocks, part):
    """Return the comparison of `eval_bfcl.py --compare`: {"table": arms, "pairs": their differences}."""
    return eval_bfcl.compared([HERE / f"{kind}-{number}/{part}" for number in blocks])[0]


def seeds_of(kind) -> list[str]:
    """Return block 1 and its repetitions with other seeds, if they are done."""
    numbers = {result.number for result in finished(kind)}
    return sorted(number for number in numbers if BLOCKS[number].arms == HIGH)


def is_shown(a, token_a, b, token_b) -> bool:
    """Return whether the table of differences shows a pair of arms, each under its reward token.

    It shows pairs under high; high and low of one arm; and arms that began with SFT, which never saw a
    reward token, also without one.
    """
    if token_a == token_b:
        return token_a == "high" or token_a == "none" and a.startswith("SFT")
    return a == b and {token_a, token_b} == {"high", "low"}


def difference_table(kind) -> str:
    """Return paired differences.

    They are those within each block, whose arms share one stage 1; those over all seeds of block 1; and those
    between block 1 and blocks 3 and 4.
    """
    arms = {}  # block -> labels
    for result in finished(kind):
        arms.setdefault(result.number, []).append(result.label)
    seeds = seeds_of(kind)
    groups = [[number] for number in arms]
    if len(seeds) > 1:
        groups.append(seeds)
    groups += [["1", number] for number in arms if number in "34"]
    lines = []
    for part, title in PARTS.items():
        for blocks in groups:
            for pair in compared(kind, blocks, part)["pairs"]:
                (a, token_a), (b, token_b) = pair["a"], pair["b"]
                if len(blocks) > 1 and blocks != seeds and (a in arms["1"]) == (b in arms["1"]):
                    continue  # not a difference to block 1
                if not is_shown(a, token_a, b, token_b):
                    continue
                primary = pair["kind"] == "primary" and part == "test"
                lines.append([
                    title,
                    ", ".join(blocks),
                    "**primary**" if primary else "exploratory",
                    f"{a}, {token_a}",
                    f"{b}, {token_b}",
                    eval_bfcl.percent(pair, "difference").strip(),
                    f"{100 * pair['detectable']:.1f}",
                ])
    return markdown(["tasks", "blocks", "kind", "of", "minus", "points, 95 %", "smallest detectable"], lines)


def seed_table(kind) -> str:
    """Return the arms of block 1 over its seeds, or "" for one seed.

    The interval draws families and seeds.
    """
    seeds = seeds_of(kind)
    if len(seeds) < 2:
        return ""
    lines = []
    for part, title in PARTS.items():
        for arm in compared(kind, seeds, part)["table"]:
            lines.append([title, arm["arm"], arm["token"], arm["seeds"], eval_bfcl.percent(arm).strip()])
    return markdown(["tasks", "arm", "token", "seeds", "success %, 95 %"], lines)


def picture(kind, path):
    """Draw the curves of stage 2, and bars of success."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = list(finished(kind))
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    dark_and_light = plt.get_cmap("tab20").colors
    colors = dark_and_light[::2] + dark_and_light[1::2]
    reward = results[0].block["reward"]
    names = {"rc/reward_high": f"{reward} under the high token", "rc/mode_gap": "mode gap"}
    for ax, (name, title) in zip(axes, names.items()):
        for result, color in zip(results, colors):
            logged = [line for line in result.log if name in line]
            if result.arm == "stage1" or not logged:
                continue
            steps = [line["step"] for line in logged]
            values = [line[name] for line in logged]
            smooth = [mean(values[max(0, i - 4):i + 1]) for i in range(len(values))]
            ax.plot(steps, values, color=color, alpha=0.25)
            ax.plot(steps, smooth, color=color)
        ax.set(xlabel="step (bold: mean of five)", title=title)
    for ax, (part, title) in zip(axes[2:], PARTS.items()):
        for n, result in enumerate(results):
            for i, reward_token in enumerate(TOKENS):
                f = result.parts[part][reward_token]["overall"]
                y = n + 0.27 * (i - 1)
                name = f"{result.number}: {result.label}" if i == 0 else None
                ax.barh(y, f["accuracy"], 0.25, color=colors[n], alpha=1 - 0.3 * i, label=name)
                ax.plot(f["interval"], [y, y], color="black", linewidth=1)
        ax.set(
            title=f"success on {title} tasks",
            xlabel="from below: high, low, no token",
            xlim=(0, None),
            yticks=[])
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def replace_results(page, text):
    """Replace the text between the marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    atomic_write(page, before + BEGIN + text + END + rest.partition(END)[2])


def report():
    """Write the results into bfcl.md and the successes into README.md; draw a picture of every size."""
    replace_results(HERE.parent / "README.md", success_table())
    tables = {
        "Stage 2, its first and its last quarter": training_table,
        "How rollouts fail": error_table,
        "Arms over seeds": seed_table,
        "Paired differences over the same tasks. The intervals hold the tasks' variance; of that between "
        "training runs nothing (one seed) or little": difference_table,
    }
    text = [success_table()]
    for kind in SIZES:
        blocks = {result.number: result.block for result in finished(kind)}
        if not blocks:
            continue
        picture(kind, HERE / f"{kind}.png")
        text.append(f"### {kind}\n\n![Curves and bars](bfcl/{kind}.png)\n")
        for number, block in blocks.items():
            line = (f"- Block {number}: {block['machine']}, {block['compute']}, torch {block['torch']}, "
                    f"commit {block['commit'][:7]}; reward `{block['reward']}`")
            validation = block.get("validation")
            if validation:
                line += (f", since {eval_bfcl.percent(validation).strip()} % of {validation['n']} rollouts "
                         "on validation tasks succeeded after stage 1")
            text.append(line + ".")
        for title, table in tables.items():
            filled = table(kind)
            if filled:
                text += [f"\n**{title}**\n", filled]
    replace_results(HERE.with_suffix(".md"), "\n".join(text))


def main():
    if sys.argv[1:] == ["run"]:
        kind = size_here()
        left = [number for number in SIZES[kind].blocks if not (HERE / f"{kind}-{number}").exists()]
        if left:
            run(kind, left[0])
    report()


if __name__ == "__main__":
    main()
