"""Does the token help? The arms of RC-GRPO in a world that is small enough for statistics.

    python results/world.py            # table and picture (world.md, world.png) from what is there: seconds
    python results/world.py tune       # the base policy, and stage 2's learning rates on validation tasks
    python results/world.py run        # what is not in world/test/ yet, two processes; then table and picture
    python results/world.py grid       # afterwards: the primary arms at every rate, on validation tasks

The world is a ledger: five functions, sixteen accounts, digits. A user asks for two to four things in turn;
some take one call, whose arguments stand in the request, others two, of which the second needs what the first
returned. The reward is 1 only if every turn is right. The policy is the `tiny` model (0.1M weights, a byte
tokenizer), pretrained once on requests of one call: it knows the format and the functions, and has never used
a result. All else is the project's own: `rollout`, `record`, `pack`, `update` of stage 1; `sample_groups`,
`fill`, `learn` of stage 2.

Change REQUESTS, TURNS or the numbers below them, remove world/, then tune and run: you see another world.

What was tried, on validation tasks and seeds of no arm. Pretraining: on 4,000 tasks again and again, or all
lengths from the start, the model did not learn to copy within 2,200 updates; growing from one turn to four it
did. Failures with a mistake in every other turn: 47 % under high, 16 % under low after 300 updates; in every
turn 72 % and 4 %, on a base that was made anew afterwards. On this one 300 updates gave 28 to 31 %, with
which a first series was run (world/first_*; test tasks 27 %: RC-GRPO minus always high -0.4 points, -2.3 to
+1.4); 450 gave 61 to 63 % and 34 to 53 % dead groups; 600 gave 64 to 71 % and 55 to 77 %, and were taken,
with new test tasks. The first grid, 3e-4, 1e-3 and 3e-3, was too high at its upper end.
"""
import copy
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rl_rcgrpo as rl
import rollout as sampler
import sft_rctp as sft
from bfcl_env import StepResult

HERE = Path(__file__).parent / "world"

# ---- The world ---------------------------------------------------------------------------------------------
ACCOUNTS = "abcdefghijklmnop"
# What a user can ask for: the text, and the calls that do it; $ is what the call before returned.
EASY = {"show {x}": ["get({x})"],
        "set {x} to {n}": ["set({x},{n})"],
        "add {n} to {x}": ["add({x},{n})"],
        "move {n} from {x} to {y}": ["move({x},{y},{n})"],
        "close {x}": ["close({x})"]}
HARD = {"copy {x} to {y}": ["get({x})", "set({y},$)"],
        "double {x}": ["get({x})", "add({x},$)"],
        "empty {x} into {y}": ["get({x})", "move({x},{y},$)"],
        "close {x} into {y}": ["close({x})", "add({y},$)"]}
REQUESTS = EASY | HARD
TURNS = (2, 4)
CALLS = 4  # in a turn; more end the conversation
LIMITS = dict(max_new_tokens=24, max_sampled_tokens=300, max_len=600)  # of a rollout

PRETRAINING = 1800  # updates of the base policy
TRAIN, HELD_OUT = 256, 200  # tasks of training; of validation and of test
STAGE1, STAGE1_LR = 600, 3e-3  # updates of 8 pairs
ROLLOUTS = 2560  # of an arm of stage 2
SEEDS, TUNING_SEEDS = range(10), (100, 101)
GRID = (3e-4, 6e-4, 1.2e-3)  # learning rates of stage 2
LOGGED = ("reward", "rc/reward_high", "rc/reward_low", "frac_reward_zero_std", "rc/var_within_tokens",
          "rc/var_between_tokens", "rc/mode_gap", "kl", "grad_norm")


def execute(balances: dict[str, int], call: str) -> str:
    """Do one call, `name(argument,...)`, to the balances; returns what it returns. One that cannot be done
    changes nothing."""
    name, _, rest = call.removesuffix(")").partition("(")
    match name, rest.split(","):
        case "get", [x] if x in balances:
            return str(balances[x])
        case "close", [x] if x in balances:
            return str(balances.pop(x))
        case "set", [x, n] if x in balances and is_number(n):
            balances[x] = int(n)
        case "add", [x, n] if x in balances and is_number(n):
            balances[x] += int(n)
        case "move", [x, y, n] if x in balances and y in balances and is_number(n):
            balances[x] -= int(n)
            balances[y] += int(n)
        case _:
            return "error"
    return "ok"


def is_number(text):
    return text.removeprefix("-").isdecimal()


@dataclass
class Task:
    id: str
    balances: dict[str, int]  # at the start
    texts: list[str]  # what the user asks for, turn by turn
    gold: list[list[str]]  # the calls that do it


def make_task(id, requests, turns) -> Task:
    """Any number of tasks: the id decides."""
    rng = random.Random(id)
    balances = {x: rng.randint(1, 9) for x in ACCOUNTS}
    task, now = Task(id, dict(balances), [], []), balances
    for _ in range(rng.randint(*turns)):
        text = rng.choice(list(requests))
        x, y = rng.sample(sorted(now), 2)
        names = dict(x=x, y=y, n=rng.randint(1, 9))
        calls, result = [], ""
        for call in requests[text]:
            calls.append(call.format(**names).replace("$", result))
            result = execute(now, calls[-1])
        task.texts.append(text.format(**names))
        task.gold.append(calls)
    return task


class Ledger:
    """The conversation about one task: a message is one call, or ends the turn."""

    def __init__(self, task):
        self.id, self.task = task.id, task
        self.balances, self.gold = dict(task.balances), dict(task.balances)
        self.turn, self.results, self.right = 0, [], True

    def messages(self):
        return [{"role": "user", "content": self.task.texts[0]}]

    def step(self, text) -> StepResult:
        if "(" in text:
            self.results.append(execute(self.balances, text))
            over = len(self.results) == CALLS
            return StepResult(self.results[-1:], None, over, "force_quit" if over else None)
        # As on BFCL: the gold calls' state, and what they return has been returned.
        expected = [execute(self.gold, call) for call in self.task.gold[self.turn]]
        self.right &= self.balances == self.gold and all(result in self.results for result in expected)
        self.turn, self.results = self.turn + 1, []
        done = self.turn == len(self.task.texts)
        return StepResult([], None if done else self.task.texts[self.turn], done, "done" if done else None)

    def verdict(self):
        return Verdict(right=self.right and self.turn == len(self.task.texts))


class Verdict(SimpleNamespace):
    def reward(self, kind):
        return float(self.right)


def corrupt(task, rng) -> list[list[str]]:
    """The gold calls with a mistake in most turns: an argument, the function (which may be drawn as it was),
    or a call left out."""
    turns = [list(calls) for calls in task.gold]
    for calls in turns:
        i = rng.randrange(len(calls))
        name, rest = calls[i].split("(")
        arguments = rest[:-1].split(",")
        match rng.choice(["argument", "function", "missing"]):
            case "argument":
                k = rng.randrange(len(arguments))
                others = list(ACCOUNTS) if arguments[k] in ACCOUNTS else [str(n) for n in range(1, 10)]
                arguments[k] = rng.choice([other for other in others if other != arguments[k]])
            case "function":
                name = rng.choice(["get", "close"] if len(arguments) == 1 else ["set", "add"])
            case "missing":
                del calls[i]
                continue
        calls[i] = f"{name}({','.join(arguments)})"
    return turns


def play_script(policy, task, turns, token):
    """The trajectory of one who makes these calls."""
    said = [message for calls in turns for message in (*calls, ".")]
    return sft.play_script(policy, Ledger(task), said, token)


def make_pair(policy, task, seed, success, failure):
    """[success, failure] with these tokens, the failure judged."""
    rng, bad = random.Random(f"{seed} {task.id}"), None
    while bad is None or bad.reward == 1:
        bad = play_script(policy, task, corrupt(task, rng), failure)
    return [play_script(policy, task, task.gold, success), bad]


# ---- Both stages, by the project's own functions -----------------------------------------------------------
def sharded(policy, lr, distributed):
    """(model, optimizer) that learn from where the policy stands; the policy itself stays."""
    args = SimpleNamespace(lr=lr, gradient_checkpointing="off")
    return sft.shard_model(SimpleNamespace(model=copy.deepcopy(policy.model)), args, torch.float32, distributed)


def fit(policy, pairs, steps, lr, seed, distributed, size=8):
    """Stage 1: `steps` updates of `size` pairs, in the order of the seed; without one, as they come."""
    model, optimizer = sharded(policy, lr, distributed)
    for step in range(1, steps + 1):
        chosen = range((step - 1) * size, step * size)
        if seed is not None:
            chosen = sft.epoch_shuffle(len(pairs), (step - 1) * size, size, seed)
        batch = [t for i in chosen for t in pairs[i]]
        packs = sampler.pack(batch)
        count = sum(len(p.targets) for p in packs)

        def loss_of(p):
            return -model.token_logprobs(p, policy.banned).sum() / count
        optimizer.param_groups[0]["lr"] = sft.get_lr(step, lr, steps, decay=steps // 5)
        sft.optimizer_step(model, optimizer, packs, loss_of, distributed)
    sft.load_full_weights(policy.model, model)


def pretrain(distributed):
    """The base policy, once: gold conversations of one-call requests, growing from one turn to four, under
    any token, which means nothing."""
    torch.manual_seed(0)
    policy = sampler.load_policy("tiny", torch.float32, "cpu")
    tasks = [make_task(f"pretraining {n}", EASY, (1, 1 + min(3, 5 * n // PRETRAINING // 32)))
             for n in range(32 * PRETRAINING)]
    data = [[play_script(policy, task, task.gold, random.Random(task.id).choice(["high", "low", None]))]
            for task in tasks]
    fit(policy, data, PRETRAINING, 3e-3, None, distributed, size=32)
    policy.model.save_pretrained(HERE / "base")
    policy.tokenizer.save_pretrained(HERE / "base")


def stage1_pairs(policy, row, tasks, seed):
    """What the row's first stage learns from. The placebo's tokens are drawn, whatever the outcome."""
    rng, pairs = random.Random(f"{seed} tokens"), []
    for task in tasks:
        tokens = {"rctp": ["high", "low"], "placebo": [rng.choice(["high", "low"]) for _ in range(2)]}
        pair = make_pair(policy, task, seed, *tokens.get(row, [None, None]))
        pairs.append(pair[:1] if row == "sft" else pair)
    return pairs


def own_pairs(policy, tasks, seed):
    """Quark's step (arXiv 2205.13636): rollouts under both tokens, labelled anew by what they achieved."""
    jobs = [(task, token, n) for task in tasks for token in ("high", "low")
            for n in range(ROLLOUTS // len(tasks) // 2)]
    found = sampler.rollout(policy, [Ledger(task) for task, _, _ in jobs], [token for _, token, _ in jobs],
                            [(seed, task.id, token, n) for task, token, n in jobs], **LIMITS)
    random.Random(seed).shuffle(found)
    sides = {"high": [], "low": []}
    for t in found:
        token = "high" if t.reward == 1 else "low"
        prompt = t.segments()[0][1]
        new = [policy.reward_ids[token] if i in policy.reward_ids.values() else i for i in prompt]
        sides[token].append(replace(t, reward_token=token, ids=new + t.ids[len(prompt):]))
    return [list(pair) for pair in zip(sides["high"], sides["low"])]


def reinforce(policy, tasks, flags, lr, seed, distributed, watch):
    """Stage 2: updates until ROLLOUTS are used up. watch(): called four times. Returns a dict a step."""
    args = rl.parse_args(["--prompts_per_step", "8", "--group_size", "8", "--seed", str(seed), *flags.split()])
    vars(args).update(LIMITS)
    model, optimizer = sharded(policy, lr, distributed)
    reference, cursor, log = copy.deepcopy(policy.model), 0, []
    total, resample = ROLLOUTS // args.group_size, args.dynamic_sampling  # total: groups
    while cursor + args.prompts_per_step <= total:
        args.dynamic_sampling = min(resample, (total - cursor) // args.prompts_per_step - 1)  # never more than the budget
        step, before = len(log) + 1, cursor
        groups, drawn, cursor = rl.sample_groups(policy, tasks, cursor, step, Ledger, args, distributed)
        packs = sft.pad_packs(sampler.pack([t for group in groups for t in group.trajectories]), distributed)
        rl.assign_advantages(packs, groups, args)
        for p in packs:
            with torch.no_grad():
                p.ref_logp = sampler.token_logprobs(reference, p, policy.banned)  # [M]
        optimizer.param_groups[0]["lr"] = sft.get_lr(step, lr, total // args.prompts_per_step)
        metrics = rl.update_policy(model, optimizer, packs, policy.banned, args, distributed)
        metrics |= rl.group_metrics(drawn, args.p_high)
        sft.load_full_weights(policy.model, model)
        log.append({"rollouts": cursor * args.group_size,
                    **{name: float(f"{metrics[name]:.5g}") for name in LOGGED if name in metrics}})
        if 4 * cursor // total > 4 * before // total or cursor + args.prompts_per_step > total:
            log[-1]["validation"] = watch()
    return log


def success(policy, tasks, token, samples):
    """Share of rollouts that succeed. The random numbers are the same for every policy."""
    jobs = [(task, n) for task in tasks for n in range(samples)]
    found = sampler.rollout(policy, [Ledger(task) for task, _ in jobs], [token] * len(jobs),
                            [(task.id, n) for task, n in jobs], **LIMITS)
    return sum(t.reward for t in found) / len(found)


# ---- The experiment ----------------------------------------------------------------------------------------
@dataclass
class Arm:
    row: str  # of stage 1: sft, rctp, mixed (no token) or placebo
    flags: str | None = None  # of stage 2; "own": stage 1 again, on own rollouts
    token: str | None = "high"  # of the evaluation: high where stage 1 knew it


PRIMARY = ("RCTP-FT + RC-GRPO", "RCTP-FT + GRPO, always high")
ARMS = {"SFT": Arm("sft", token=None),
        "SFT + GRPO": Arm("sft", "--reward_tokens none", None),
        "SFT + RC-GRPO": Arm("sft", "", None),
        "mixed, no token": Arm("mixed", token=None),
        "mixed, no token + GRPO": Arm("mixed", "--reward_tokens none", None),
        "placebo": Arm("placebo"),
        "placebo + RC-GRPO": Arm("placebo", ""),
        "RCTP-FT": Arm("rctp"),
        "RCTP-FT + GRPO, always high": Arm("rctp", "--reward_tokens high"),
        "RCTP-FT + RC-GRPO": Arm("rctp", ""),
        "RCTP-FT + RC-GRPO, within reward token": Arm("rctp", "--advantage within_reward_token"),
        "RCTP-FT + always high, sign": Arm("rctp", "--reward_tokens high --advantage sign"),
        "RCTP-FT + always high, virtual success": Arm("rctp", "--reward_tokens high --advantage virtual_success"),
        "RCTP-FT + always high, dynamic sampling": Arm("rctp", "--reward_tokens high --dynamic_sampling 3"),
        "RCTP-FT, again on own rollouts": Arm("rctp", "own")}


def make_tasks(part, count):
    return [make_task(f"{part} {n}", REQUESTS, TURNS) for n in range(count)]


def file_of(folder, arm, seed, lr):
    name = "".join(c if c.isalnum() else "_" for c in arm)
    return HERE / folder / f"{name}-{lr:g}-{seed}.json"


def play(job):
    """One row of one seed: stage 1, then those of its arms whose JSON is not there yet.
    job: (row, seed, [(arm, lr)], the folder of the JSON: `test`, or another, for validation tasks alone)."""
    row, seed, arms, folder = job
    todo = [(arm, lr) for arm, lr in arms if not file_of(folder, arm, seed, lr).exists()]
    if not todo:
        return
    distributed, commit = play.distributed, subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE.parent, text=True,
                                               capture_output=True).stdout.strip()
    tasks, val = make_tasks("train", TRAIN), make_tasks("val", HELD_OUT)
    test = make_tasks("held-out", HELD_OUT)
    first = sampler.load_policy(str(HERE / "base"), torch.float32, "cpu")
    fit(first, stage1_pairs(first, row, tasks, seed), STAGE1, STAGE1_LR, seed, distributed)
    for arm, lr in todo:
        began, policy, log = time.monotonic(), replace(first, model=copy.deepcopy(first.model)), []
        flags, token = ARMS[arm].flags, ARMS[arm].token
        if flags == "own":
            fit(policy, own_pairs(policy, tasks, seed), STAGE1, lr, seed, distributed)
        elif flags is not None:
            log = reinforce(policy, tasks, flags, lr, seed, distributed, lambda: success(policy, val, token, 1))
        found = {"arm": arm, "seed": seed, "lr": lr, "updates": len(log), "commit": commit,
                 "validation": [[0, success(first, val, token, 1)]] + [
                     [line["rollouts"], line.pop("validation")] for line in log if "validation" in line]}
        if folder != "test":
            found["success"] = success(policy, val, token, 2)
        else:
            by_reward_token = {str(t or "none"): success(policy, test, t, 2) for t in ("high", "low", None)}
            found |= {"success": by_reward_token[token or "none"], "by_reward_token": by_reward_token, "log": log}
        found["minutes"] = round((time.monotonic() - began) / 60, 2)
        sft.atomic_write(file_of(folder, arm, seed, lr), json.dumps(found))


def start_worker():
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # progress bars
    play.distributed = sft.init_distributed()


def run(seeds, rates, folder):
    """All that is missing, two processes at a time. rates: {arm: learning rates of stage 2}."""
    jobs = []
    for seed in seeds:
        for row in ("rctp", "sft", "mixed", "placebo"):
            arms = [(arm, lr) for arm in ARMS if ARMS[arm].row == row for lr in rates[arm]]
            jobs.append((row, seed, arms, folder))
    with multiprocessing.get_context("spawn").Pool(2, start_worker) as pool:
        for n, _ in enumerate(pool.imap(play, jobs), 1):
            print(f"{n} of {len(jobs)} rows", flush=True)


def read(folder):
    """{arm: [what its runs wrote, by seed]}"""
    found = {}
    for path in sorted((HERE / folder).glob("*.json")):
        one = json.loads(path.read_text())
        found.setdefault(one["arm"], []).append(one)
    return found


def tuned():
    """{arm: the learning rate with the best mean on validation tasks}; an arm without stage 2 has none."""
    rates, found = dict.fromkeys(ARMS, 0.0), read("tuning")
    for arm in [arm for arm in ARMS if ARMS[arm].flags is not None]:
        runs = found.get(arm, [])
        if len(runs) < len(GRID) * len(TUNING_SEEDS):
            raise SystemExit(f"{arm} is not tuned yet: python results/world.py tune")
        means = {lr: np.mean([one["success"] for one in runs if one["lr"] == lr]) for lr in GRID}
        rates[arm] = max(means, key=means.get)
    return rates


# ---- Table and picture -------------------------------------------------------------------------------------
# 97.5 % quantile of Student's t for 2 to 10 seeds: the seed is the unit, not the rollout.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def interval(values) -> tuple[float, float]:
    """Mean over seeds [n] and half the width of its 95 % interval."""
    n = len(values)
    return float(np.mean(values)), STUDENT[n] * float(np.std(values, ddof=1)) / math.sqrt(n)


def paired(runs, arm, other, what="success"):
    """What the arm has more than the other, in the seeds that both have."""
    theirs = {one["seed"]: one[what] for one in runs[other]}
    return [one[what] - theirs[one["seed"]] for one in runs[arm] if one["seed"] in theirs]


def table(runs) -> str:
    """Markdown. Of logged figures: the mean of the first and of the last five updates, or of all."""
    lines = ["| arm | lr | success | against always high | under high, low | mode gap | dead groups "
             "| variance within + between | grad norm | updates |", "|" + "---|" * 10]
    for arm in [arm for arm in ARMS if arm in runs]:
        some = runs[arm]
        mean, half = interval([one["success"] for one in some])
        cells = [arm, f"{some[0]['lr']:g}", f"{100 * mean:.1f} ± {100 * half:.1f}"]
        gain, half = interval(paired(runs, arm, PRIMARY[1]))
        mark = "**primary** " if arm == PRIMARY[0] else ""
        cells.append("" if arm == PRIMARY[1] else f"{mark}{100 * gain:+.1f} ± {100 * half:.1f}")
        cells.append(", ".join(f"{100 * np.mean([one['by_reward_token'][token] for one in some]):.1f}"
                               for token in ("high", "low")))
        logs = [one["log"] for one in some]

        def logged(name, part):
            return np.mean([line[name] for log in logs for line in log[part]])
        if any(logs):
            first, last, whole = slice(5), slice(-5, None), slice(None)
            dead = "frac_reward_zero_std"
            gap = ""  # of the training rollouts; some groups have only one token
            if ARMS[arm].flags in ("", "--advantage within_reward_token"):
                gap = " → ".join(f"{logged('rc/mode_gap', part):.2f}" for part in (first, last))
            within, between = (logged(f"rc/var_{part}_tokens", whole) for part in ("within", "between"))
            cells += [gap, f"{logged(dead, first):.2f} → {logged(dead, last):.2f}",
                      f"{within:.3f} + {between:.3f}",
                      f"{logged('grad_norm', whole):.2f}", f"{np.mean([one['updates'] for one in some]):.1f}"]
        else:
            cells += [""] * 5
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


COLOURS = {"sft": "tab:grey", "mixed": "tab:olive", "placebo": "tab:pink", "rctp": "tab:blue"}  # of rows


def draw(runs):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for arm in [arm for arm in ARMS if ARMS[arm].row == "rctp" and arm in runs and runs[arm][0]["log"]]:
        x = np.arange(5) * ROLLOUTS / 4
        # With resampling a step may pass such a point: what lies there is read between its neighbours.
        curves = [np.interp(x, *zip(*one["validation"])) for one in runs[arm]]  # [seeds][5]
        mean, half = np.transpose([interval(values) for values in np.transpose(curves)])  # [5] each
        [line] = left.plot(x, mean, label=arm)
        left.fill_between(x, mean - half, mean + half, alpha=0.12, color=line.get_color())
    left.set_xlabel("rollouts")
    left.set_ylabel("success on validation tasks, high token")
    left.legend(fontsize=8)
    bars = [arm for arm in reversed(ARMS) if arm in runs]
    for n, arm in enumerate(bars):
        mean, half = interval([one["success"] for one in runs[arm]])
        right.barh(n, mean, xerr=half, color=COLOURS[ARMS[arm].row], alpha=0.8 if arm in PRIMARY else 0.5,
                   ecolor="black", capsize=2)
        seeds = [one["success"] for one in runs[arm]]
        right.plot(seeds, [n] * len(seeds), "k.", markersize=3)
    right.set_yticks(range(len(bars)), bars, fontsize=8)
    right.set_xlabel(f"success on test tasks, {len(runs[PRIMARY[0]])} seeds, 95 % intervals over seeds")
    figure.savefig(HERE.with_suffix(".png"), dpi=100)


def report():
    runs = read("test")
    text = table(runs)
    gain, half = interval(paired(runs, *PRIMARY))
    text += (f"\n\nPrimary comparison, {PRIMARY[0]} minus {PRIMARY[1]}: {100 * gain:+.1f} points of test "
             f"success, 95 % interval {100 * (gain - half):+.1f} to {100 * (gain + half):+.1f}, "
             f"{len(runs[PRIMARY[0]])} seeds. All other comparisons are exploratory.\n")
    grid = read("grid")
    for lr in sorted({one["lr"] for some in grid.values() for one in some}):
        some = {arm: [one for one in grid[arm] if one["lr"] == lr] for arm in PRIMARY}
        gain, half = interval(paired(some, *PRIMARY))
        text += f"On validation tasks, both at learning rate {lr:g}: {100 * gain:+.1f} ± {100 * half:.1f}.\n"
    for arm, other in (("placebo + RC-GRPO", "mixed, no token + GRPO"), ("SFT + RC-GRPO", "SFT + GRPO")):
        if not {arm, other} <= runs.keys():
            continue
        gain, half = interval(paired(runs, arm, other))
        text += f"{arm} minus {other}: {100 * gain:+.1f} ± {100 * half:.1f}.\n"
    commits = sorted({one["commit"][:12] for some in runs.values() for one in some})
    text += f"Made by `python results/world.py run` at {', '.join(commits)}.\n"
    HERE.with_suffix(".md").write_text(text)
    print(text)
    draw(runs)


def main():
    what = sys.argv[1] if len(sys.argv) > 1 else "report"
    if what == "tune":
        if not (HERE / "base").exists():
            pretrain(sft.init_distributed())
        rates = {arm: GRID if ARMS[arm].flags is not None else [] for arm in ARMS}
        run(TUNING_SEEDS, rates, "tuning")
        return
    if what == "grid":
        run(SEEDS, {arm: (*GRID, 2 * GRID[-1]) if arm in PRIMARY else [] for arm in ARMS}, "grid")
    if what == "run":
        run(SEEDS, {arm: [lr] for arm, lr in tuned().items()}, "test")
    report()


if __name__ == "__main__":
    main()
