"""The ablation on BFCL: RC-GRPO beside its alternatives, by this repository's own commands.

    python results/ablation.py            # tables and picture, from the blocks that are done
    python results/ablation.py run        # first the next block that is not done: hours

A block is one stage 1, its arms of stage 2 and their evaluations, on one machine. It needs committed files
alone and ends with its folder bfcl/SIZE-BLOCK/; one that was interrupted goes on where it was, as long as
runs/ is there. The plan stands in bfcl.md, where this script writes the results. One thing is decided on the
way, after the first stage 1: all arms learn from the reward `official`, unless fewer than 3 % of the rollouts
of validation tasks succeed.
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
BEGIN, END = "<!-- ablation -->\n", "<!-- /ablation -->\n"  # in bfcl.md and README.md


@dataclass
class Size:
    """What a machine can do."""
    where: str
    hours: float  # of a block, predicted
    blocks: str  # in their order
    world: str  # flags of all commands
    stage1: str
    stage2: str
    train: str = ""  # the tasks that are trained on
    test: str = ""  # the held-out tasks
    samples: int = 4  # rollouts a task and token of an evaluation


@dataclass
class Block:
    seed: int
    stage1: str  # flags
    arms: dict[str, str]  # flags of stage 2


CPU = ("--tool_docs signature --categories multi_turn_base "
       "--max_len 2048 --max_new_tokens 128 --max_sampled_tokens 768")
STAGE1 = "--epochs 6 --batch_size 8 --lr 1e-4 --save_every 10"
STAGE2 = "--prompts_per_step 2 --group_size 8 --lr 3e-5 --save_every 5"
SIZES = {"cpu-bf16": Size("two CPU cores with bf16", 2.4, "1234", CPU, STAGE1,
                         STAGE2 + " --steps 26", "--max_tasks 40"),
         "cpu": Size("two CPU cores without bf16", 2.4, "1", CPU, STAGE1,
                    STAGE2 + " --steps 6", "--max_tasks 10", "--max_tasks 10", 1),
         "gpu": Size("one H100", 3.0, "12534", "--tool_docs slim", "--epochs 3", "--steps 100")}
HIGH = {"always-high": "--reward_tokens high", "rc-grpo": ""}
BLOCKS = {"1": Block(0, "", HIGH),
          "2": Block(1, "", HIGH),
          "3": Block(0, "--arm sft", {"grpo": "--reward_tokens none", "rc-grpo": ""}),
          "4": Block(0, "", {"sign": "--reward_tokens high --advantage sign",
                           "within": "--advantage within_reward_token"}),
          "5": Block(2, "", HIGH)}
NAMES = {"stage1": "", "always-high": " + GRPO (high token)", "rc-grpo": " + RC-GRPO",  # as in evaluations
         "grpo": " + GRPO (no token)", "sign": " + GRPO (high token), sign advantage",
         "within": " + RC-GRPO, within_reward_token advantage"}
PARTS = {"test": "held-out", "train": "trained"}
TOKENS = ("high", "low", "none")
LOGGED = ("step", "loss", "reward", "rc/reward_high", "rc/reward_low", "frac_reward_zero_std",
          "rc/var_within_tokens", "rc/var_between_tokens", "rc/mode_gap", "tool_call_counts/mean",
          "num_turns/mean", "kl", "grad_norm", "step_time")


# ---- One block ---------------------------------------------------------------------------------------------
def command(script, *flags):
    """Run it under torchrun, a process a GPU; after Ctrl-C until its step is saved. Errors: SystemExit."""
    words = [script, *" ".join(map(str, flags)).split()]
    print("\n$ torchrun", *words, flush=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown_timeout", "3600",
                "--nproc_per_node", str(torch.cuda.device_count() or 1)]
    process = subprocess.Popen([*torchrun, *words], cwd=ROOT)
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
    if process.returncode:
        raise SystemExit(process.returncode)


def machine():
    """What figures depend on besides the flags."""
    info, name = Path("/proc/cpuinfo"), platform.machine()
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    name = f"{os.cpu_count()} cores of {name}"
    if torch.cuda.is_available():
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, text=True,
                         capture_output=True)
    compute = rollout.compute_dtype("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {"machine": name, "compute": str(compute), "torch": torch.__version__,
            "commit": git.stdout.strip()}


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
        atomic_write(begun, machine())
    found = read(begun)
    if found != machine():
        raise SystemExit(f"{work} was begun by {found}, and this is {machine()}: a block stays on one "
                         "machine and commit; go on there, or delete that folder")

    # stage 1, and what its successes on validation tasks decide for all blocks
    common = f"{size.world} --seed {block.seed}"
    training = f"{common} {size.train} --eval_every 0"
    models = {"stage1": work / "stage1/model"}
    command("sft_rctp.py", training, size.stage1, block.stage1, "--out", work / "stage1")
    if number == "1":
        command("eval_bfcl.py", common, "--split val --samples 8 --ckpt", models["stage1"],
                "--out", work / "val")
        found["validation"] = read(ROOT / work / "val/eval.json")["overall"]
        found["reward"] = "official" if found["validation"]["accuracy"] >= 0.03 else "progress"
    else:
        found["reward"] = read(HERE / f"{kind}-1/block.json")["reward"]

    # stage 2
    for arm, flags in block.arms.items():
        if "sign" in flags and found["reward"] == "progress":
            continue  # it is for rewards of 0 and 1
        command("rl_rcgrpo.py", training, size.stage2, flags, "--reward", found["reward"],
                "--model", models["stage1"], "--out", work / arm)
        models[arm] = work / arm / "model"

    # evaluations: always the official reward
    tokens = "--reward_tokens high,low,none --samples"
    for part in PARTS:
        chosen = size.train if part == "train" else size.test
        command("eval_bfcl.py", common, f"--split {part}", chosen, tokens, size.samples,
                "--ckpt", *models.values(), "--out", work / part)

    partial = HERE / f"{kind}-{number}.partial"
    for part in PARTS:
        for name in ("config.json", "eval.json"):
            atomic_write(partial / part / name, (ROOT / work / part / name).read_text())
    logs = {}
    for arm in models:
        lines = (ROOT / work / arm / "metrics.jsonl").read_text().splitlines()
        logs[arm] = [{name: line[name] for name in LOGGED if name in line} for line in map(json.loads, lines)]
    atomic_write(partial / "block.json", {**found, "logs": logs})
    partial.rename(HERE / f"{kind}-{number}")


# ---- Tables and picture ------------------------------------------------------------------------------------
def label(number, arm):
    return ("SFT" if "sft" in BLOCKS[number].stage1 else "RCTP-FT") + NAMES[arm]


def finished(kind):
    """(block, arm, {part: its row of eval.json}, log, block.json) of every arm that was run."""
    for number in SIZES[kind].blocks:
        folder = HERE / f"{kind}-{number}"
        if folder.exists():
            block = read(folder / "block.json")
            tables = {part: read(folder / part / "eval.json")["table"] for part in PARTS}
            for n, (arm, log) in enumerate(block["logs"].items()):
                yield number, arm, {part: table[n] for part, table in tables.items()}, log, block


def markdown(head, lines) -> str:
    width = len(head)
    rows = [head, ["---"] * width, *[[*line, *[""] * (width - len(line))] for line in lines]]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def success_table() -> str:
    """Every arm of every size: its successes, or that it was not run."""
    lines = []
    for kind, size in SIZES.items():
        done = {(number, arm): (parts, block) for number, arm, parts, _, block in finished(kind)}
        late = f"not run: predicted {size.hours} hours on {size.where}"
        if not done:
            lines.append([f"{kind} {', '.join(size.blocks)}", "all arms", f"{late}, a block"])
            continue
        progress = done["1", "stage1"][1]["reward"] == "progress"
        for number in size.blocks:
            title, arms = f"{kind} {number}", ["stage1", *BLOCKS[number].arms]
            if "sign" in arms and progress:
                arms.remove("sign")
                lines.append([title, label(number, "sign"),
                              "not run: it is for rewards of 0 and 1, and these arms learn from `progress`"])
            if (number, "stage1") not in done:
                lines.append([title, "; ".join(label(number, arm) for arm in arms), late])
                continue
            for arm in arms:
                parts, _ = done[number, arm]
                overall = [parts[part][token]["overall"] for part in PARTS for token in TOKENS]
                stage_info = parts["test"]["stage_info"]
                lines.append([title, label(number, arm), *[eval_bfcl.percent(f).strip() for f in overall],
                              " + ".join(str(parts[part]["high"]["overall"]["n"]) for part in PARTS),
                              stage_info["rollouts"], f"{stage_info['minutes']:.0f}"])
    head = [f"{title}, {token}" for title in PARTS.values() for token in TOKENS]
    return markdown(["block", "arm", *head, "n a token", "rollouts", "minutes"], lines)


def ends(log, name, form="{:.2f}") -> str:
    """Of a logged figure, the means over the first and the last quarter of the steps."""
    values = [line[name] for line in log if name in line]
    quarter = max(1, len(log) // 4)
    if not values:
        return ""
    return " → ".join(form.format(mean(some)) for some in (values[:quarter], values[-quarter:]))


def training_table(kind) -> str:
    lines = []
    for number, arm, _, log, _ in finished(kind):
        if arm == "stage1":
            continue
        within = mean(line["rc/var_within_tokens"] for line in log)
        between = mean(line["rc/var_between_tokens"] for line in log)
        lines.append([number, label(number, arm), ends(log, "reward"), ends(log, "rc/reward_high"),
                      ends(log, "rc/reward_low"), ends(log, "frac_reward_zero_std"),
                      f"{within:.3f} + {between:.3f}", ends(log, "rc/mode_gap"),
                      ends(log, "tool_call_counts/mean"), ends(log, "num_turns/mean"),
                      ends(log, "kl", "{:.4f}"), ends(log, "grad_norm")])
    return markdown(["block", "arm", "reward", "under high", "under low", "dead groups",
                     "variance within + between tokens", "mode gap", "calls", "messages", "KL",
                     "gradient norm"], lines)


def error_table(kind) -> str:
    """Of the evaluations: how rollouts fail, and whether the model still calls functions."""
    lines = []
    for number, arm, parts, _, _ in finished(kind):
        for part, token in ((part, token) for part in PARTS for token in TOKENS):
            f = parts[part][token]["overall"]
            errors = ", ".join(f"{name} {count}" for name, count in f["errors"].items())
            lines.append([number, label(number, arm), f"{PARTS[part]}, {token}", f"{f['calls']:.1f}",
                          f"{f['messages']:.1f}", f"{f['tokens']:.0f}", errors])
    return markdown(["block", "arm", "tasks, token", "calls", "messages", "tokens", "errors"], lines)


def compared(kind, blocks, part):
    """What `eval_bfcl.py --compare` says of these blocks: {"table": arms, "pairs": their differences}."""
    return eval_bfcl.compared([HERE / f"{kind}-{number}/{part}" for number in blocks])[0]


def seeds_of(kind) -> list[str]:
    """Block 1 and its repetitions with other seeds, those that are done."""
    return sorted({number for number, *_ in finished(kind) if BLOCKS[number].arms == HIGH})


def difference_table(kind) -> str:
    """Of each block, whose arms have one stage 1; of the seeds of block 1 together; of blocks 3 and 4 against
    block 1. Under high, and high against low in an arm; SFT's, which never saw a token, without one too."""
    arms, seeds = {}, seeds_of(kind)  # block -> its arms
    for number, arm, *_ in finished(kind):
        arms.setdefault(number, []).append(label(number, arm))
    groups = [[number] for number in arms] + [seeds] * (len(seeds) > 1)
    groups += [["1", number] for number in arms if number in "34"]
    lines = []
    for part, title in PARTS.items():
        for blocks in groups:
            for pair in compared(kind, blocks, part)["pairs"]:
                (a, token), (b, other) = pair["a"], pair["b"]
                across = len(blocks) == 1 or blocks == seeds or (a in arms["1"]) != (b in arms["1"])
                wanted = (token == other == "high" or (a == b and {token, other} == {"high", "low"})
                          or (token == other == "none" and (a + b).startswith("SFT")))
                if across and wanted:
                    primary = (pair["kind"], part) == ("primary", "test")
                    lines.append([title, ", ".join(blocks), "**primary**" if primary else "exploratory",
                                  f"{a}, {token}", f"{b}, {other}",
                                  eval_bfcl.percent(pair, "difference").strip(),
                                  f"{100 * pair['detectable']:.1f}"])
    return markdown(["tasks", "blocks", "kind", "of", "minus", "points, 95 %", "smallest detectable"], lines)


def seed_table(kind) -> str:
    """The arms of block 1 over its seeds, if there are several; the interval draws families and seeds."""
    seeds = seeds_of(kind)
    if len(seeds) < 2:
        return ""
    lines = []
    for part, title in PARTS.items():
        lines += [[title, arm["arm"], arm["token"], arm["seeds"], eval_bfcl.percent(arm).strip()]
                  for arm in compared(kind, seeds, part)["table"]]
    return markdown(["tasks", "arm", "token", "seeds", "success %, 95 %"], lines)


def picture(kind, path):
    """Curves of stage 2, and bars of success."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    arms = list(finished(kind))
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    dark_and_light = plt.get_cmap("tab20").colors
    colors = dark_and_light[::2] + dark_and_light[1::2]
    names = {"rc/reward_high": f"{arms[0][4]['reward']} under the high token", "rc/mode_gap": "mode gap"}
    for ax, (name, title) in zip(axes, names.items()):
        for n, (number, arm, _, log, _) in enumerate(arms):
            points = [(line["step"], line[name]) for line in log if arm != "stage1" and name in line]
            if points:
                steps, values = zip(*points)
                smooth = [mean(values[max(0, i - 4):i + 1]) for i in range(len(values))]
                ax.plot(steps, values, color=colors[n], alpha=0.25)
                ax.plot(steps, smooth, color=colors[n])
        ax.set(xlabel="step (bold: mean of five)", title=title)
    for ax, (part, title) in zip(axes[2:], PARTS.items()):
        for n, (number, arm, parts, _, _) in enumerate(arms):
            for y, token in enumerate(TOKENS):
                f = parts[part][token]["overall"]
                place = n + 0.27 * (y - 1)
                ax.barh(place, f["accuracy"], 0.25, color=colors[n], alpha=1 - 0.3 * y,
                        label=f"{number}: {label(number, arm)}" if y == 0 else None)
                ax.plot(f["interval"], [place, place], color="black", linewidth=1)
        ax.set(title=f"success on {title} tasks", xlabel="from below: high, low, no token",
               xlim=(0, None), yticks=[])
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def put(page, text):
    """In place of what stood between the marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    atomic_write(page, before + BEGIN + text + END + rest.partition(END)[2])


def report():
    """Write the results into bfcl.md, the arms' successes into README.md beside it, a picture of every size."""
    put(HERE.parent / "README.md", success_table())
    text = [success_table()]
    for kind in SIZES:
        blocks = {number: block for number, _, _, _, block in finished(kind)}
        if not blocks:
            continue
        picture(kind, HERE / f"{kind}.png")
        text.append(f"### {kind}\n\n![Curves and bars](bfcl/{kind}.png)\n")
        for number, block in blocks.items():
            line = (f"- Block {number}: {block['machine']}, {block['compute']}, torch {block['torch']}, "
                    f"commit {block['commit'][:7]}; reward `{block['reward']}`")
            if val := block.get("validation"):
                line += (f", since {eval_bfcl.percent(val).strip()} % of {val['n']} rollouts on validation "
                         "tasks succeeded after stage 1")
            text.append(line + ".")
        tables = {"Stage 2, its first and its last quarter": training_table,
                  "How rollouts fail": error_table,
                  "Arms over seeds": seed_table,
                  "Paired differences over the same tasks. The intervals hold the tasks' variance; of that "
                  "between training runs nothing (one seed) or little": difference_table}
        for title, table in tables.items():
            if filled := table(kind):
                text += [f"\n**{title}**\n", filled]
    put(HERE.with_suffix(".md"), "\n".join(text))


def main():
    if sys.argv[1:] == ["run"]:
        kind = size_here()
        left = [number for number in SIZES[kind].blocks if not (HERE / f"{kind}-{number}").exists()]
        if left:
            run(kind, left[0])
    report()


if __name__ == "__main__":
    main()
