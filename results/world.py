"""Test whether the reward token helps: the arms of RC-GRPO in a world that is small enough for statistics.

    python results/world.py            # table and picture (world.md, world.png) of finished runs: seconds
    python results/world.py tune       # the base policy, and stage 2's learning rates on validation tasks
    python results/world.py run        # runs missing in world/test.jsonl, two processes; then the report
    python results/world.py grid       # afterwards: the primary arms at every rate, on validation tasks

The environment is a ledger: five functions, sixteen accounts, digits. A user asks for two to four things in
turn. Some take one call, whose arguments are in the request. Others take two calls, and the second needs the
result of the first. The reward is 1 only if every turn is right. The policy is the `tiny` model (0.1M
weights, a byte tokenizer), pretrained once on requests of one call: it knows the format and the functions,
and has never used a result. Everything else is the project's own code: `rollout`, `play_script`, `pack`,
`optimizer_step` of stage 1; `sample_groups`, `assign_advantages`, `update_policy` of stage 2.

To try another environment, change REQUESTS, TURNS or the numbers below them, remove world/, then tune and
run.

How the settings were chosen, on validation tasks and on seeds of no arm:

    Pretraining: the model did not learn to copy within 2,200 updates on 4,000 tasks again and again, nor with
    all lengths from the start. It did when conversations grew from one turn to four.

    Failures: with a mistake in every other turn, 47 % succeeded under high and 16 % under low after 300
    updates; with one in every turn 72 % and 4 %, on a base that was trained again afterwards.

    Length of stage 1, on this base: 300 updates gave 28 to 31 %, with which a first series was run
    (world/first_*; test tasks 27 %). 450 gave 61 to 63 %
    and 34 to 53 % zero-std groups. 600 gave 64 to 71 % and 55 to 77 %, and were chosen, with new test tasks.

    Learning rates: the first grid, 3e-4, 1e-3 and 3e-3, was too high at its upper end.
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
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))
import exact
import rl_rcgrpo as rl
import rollout as sampler
import sft_rctp as sft
from bfcl_env import StepResult

HERE = Path(__file__).parent / "world"

# ---- The environment ---------------------------------------------------------------------------------------
ACCOUNTS = "abcdefghijklmnop"
# The text of a user's request -> the calls that fulfil it; $ is the result of the call before.
EASY = {
    "show {x}": ["get({x})"],
    "set {x} to {n}": ["set({x},{n})"],
    "add {n} to {x}": ["add({x},{n})"],
    "move {n} from {x} to {y}": ["move({x},{y},{n})"],
    "close {x}": ["close({x})"],
}
HARD = {
    "copy {x} to {y}": ["get({x})", "set({y},$)"],
    "double {x}": ["get({x})", "add({x},$)"],
    "empty {x} into {y}": ["get({x})", "move({x},{y},$)"],
    "close {x} into {y}": ["close({x})", "add({y},$)"],
}
REQUESTS = EASY | HARD
TURNS = (2, 4)
CALLS = 4  # the conversation ends with this many in one turn
LIMITS = dict(max_new_tokens=24, max_sampled_tokens=300, max_len=600)  # limits of a rollout

PRETRAINING = 1800  # updates of the base policy
TRAIN = 256  # training tasks
HELD_OUT = 200  # validation tasks, and as many test tasks
STAGE1 = 600  # updates of 8 pairs
STAGE1_LR = 3e-3
ROLLOUTS = 2560  # rollouts per arm of stage 2
SEEDS = range(10)
TUNING_SEEDS = (100, 101)
GRID = (3e-4, 6e-4, 1.2e-3)  # learning rates of stage 2
LOGGED = (
    "reward",
    "rc/reward_high",
    "rc/reward_low",
    "frac_reward_zero_std",
    "rc/var_within_tokens",
    "rc/var_between_tokens",
    "rc/mode_gap",
    "kl",
    "grad_norm",
)


def execute(balances: dict[str, int], call: str) -> str:
    """Apply one call, `name(argument,...)`, to the balances and return its result.

    A call that cannot be executed changes nothing.
    """
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
    balances: dict[str, int]  # balances at the start
    texts: list[str]  # the user's request in each turn
    gold: list[list[str]]  # the calls that fulfil it


def make_task(id, requests, turns) -> Task:
    """Return the task that the id determines; any number of tasks can be made."""
    rng = random.Random(id)
    balances = {x: rng.randint(1, 9) for x in ACCOUNTS}
    task = Task(id, dict(balances), [], [])
    for _ in range(rng.randint(*turns)):
        text = rng.choice(list(requests))
        x, y = rng.sample(sorted(balances), 2)
        names = dict(x=x, y=y, n=rng.randint(1, 9))
        calls = []
        result = ""
        for call in requests[text]:
            calls.append(call.format(**names).replace("$", result))
            result = execute(balances, calls[-1])
        task.texts.append(text.format(**names))
        task.gold.append(calls)
    return task


class Ledger:
    """The environment of one task: a message is one call, or it ends the turn."""

    def __init__(self, task):
        self.id = task.id
        self.task = task
        self.balances = dict(task.balances)
        self.gold = dict(task.balances)  # balances after the gold calls
        self.turn = 0
        self.results = []  # results of this turn
        self.right = True

    def messages(self):
        return [{"role": "user", "content": self.task.texts[0]}]

    def step(self, text) -> StepResult:
        if "(" in text:
            self.results.append(execute(self.balances, text))
            done = len(self.results) == CALLS
            return StepResult(self.results[-1:], None, done, "force_quit" if done else None)
        # As on BFCL, a turn is right if the state is that of the gold calls, and their results were returned.
        expected = [execute(self.gold, call) for call in self.task.gold[self.turn]]
        self.right &= self.balances == self.gold and all(result in self.results for result in expected)
        self.turn += 1
        self.results = []
        if self.turn == len(self.task.texts):
            return StepResult([], None, True, "done")
        return StepResult([], self.task.texts[self.turn], False, None)

    def verdict(self):
        return Verdict(right=self.right and self.turn == len(self.task.texts))


class Verdict(SimpleNamespace):
    def reward(self, kind):
        return float(self.right)


def corrupt(task, rng) -> list[list[str]]:
    """Return the gold calls with one mistake in most turns.

    A mistake is another argument, another function (which may be drawn as it was), or a missing call.
    """
    turns = [list(calls) for calls in task.gold]
    for calls in turns:
        i = rng.randrange(len(calls))
        name, rest = calls[i].split("(")
        arguments = rest[:-1].split(",")
        match rng.choice(["argument", "function", "missing"]):
            case "argument":
                k = rng.randrange(len(arguments))
                others = [str(n) for n in range(1, 10)]
                if arguments[k] in ACCOUNTS:
                    others = list(ACCOUNTS)
                arguments[k] = rng.choice([other for other in others if other != arguments[k]])
            case "function":
                name = rng.choice(["get", "close"] if len(arguments) == 1 else ["set", "add"])
            case "missing":
                del calls[i]
                continue
        calls[i] = f"{name}({','.join(arguments)})"
    return turns


def play_script(policy, task, turns, reward_token):
    """Return the trajectory of a policy that makes these calls."""
    messages = []
    for calls in turns:
        messages += [*calls, "."]
    return sft.play_script(policy, Ledger(task), messages, reward_token)


def make_pair(policy, task, seed, success, failure):
    """Return [success, failure] with these reward tokens; the failure was judged as one."""
    rng = random.Random(f"{seed} {task.id}")
    while True:
        bad = play_script(policy, task, corrupt(task, rng), failure)
        if bad.reward < 1:
            return [play_script(policy, task, task.gold, success), bad]


# ---- Both stages, by the project's own functions -----------------------------------------------------------
def sharded(policy, lr, distributed):
    """Return (model, optimizer) to train a copy of the policy."""
    args = SimpleNamespace(lr=lr, gradient_checkpointing="off")
    trained = SimpleNamespace(model=copy.deepcopy(policy.model))
    return sft.shard_model(trained, args, torch.float32, distributed)


def fit(policy, pairs, steps, lr, seed, distributed, size=8):
    """Run stage 1: `steps` updates of `size` pairs, shuffled by the seed, or in their order if it is None."""
    model, optimizer = sharded(policy, lr, distributed)
    for step in range(1, steps + 1):
        start = (step - 1) * size
        chosen = range(start, start + size)
        if seed is not None:
            chosen = sft.epoch_shuffle(len(pairs), start, size, seed)
        batch = []
        for i in chosen:
            batch += pairs[i]
        packs = sampler.pack(batch)
        count = sum(len(p.targets) for p in packs)

        def loss_of(p):
            return -model.token_logprobs(p, policy.banned).sum() / count

        optimizer.param_groups[0]["lr"] = sft.get_lr(step, lr, steps, decay=steps // 5)
        sft.optimizer_step(model, optimizer, packs, loss_of, distributed)
    sft.load_full_weights(policy.model, model)


def pretrain(distributed):
    """Train the base policy, once, on gold conversations of one-call requests.

    They grow from one turn to four. Their reward tokens are random and mean nothing.
    """
    torch.manual_seed(0)
    policy = sampler.load_policy("tiny", torch.float32, "cpu")
    data = []
    for n in range(32 * PRETRAINING):
        longest = 1 + min(3, 5 * n // PRETRAINING // 32)  # turns
        task = make_task(f"pretraining {n}", EASY, (1, longest))
        reward_token = random.Random(task.id).choice(["high", "low", None])
        data.append([play_script(policy, task, task.gold, reward_token)])
    fit(policy, data, PRETRAINING, 3e-3, None, distributed, size=32)
    policy.model.save_pretrained(HERE / "base")
    policy.tokenizer.save_pretrained(HERE / "base")


def stage1_pairs(policy, row, tasks, seed):
    """Return the row's data for stage 1: per task [success, failure], or [success] for sft."""
    rng = random.Random(f"{seed} tokens")
    pairs = []
    for task in tasks:
        placebo = [rng.choice(["high", "low"]) for _ in range(2)]  # independent of the outcome
        reward_tokens = {"rctp": ["high", "low"], "placebo": placebo}.get(row, [None, None])
        pair = make_pair(policy, task, seed, *reward_tokens)
        pairs.append(pair[:1] if row == "sft" else pair)
    return pairs


def relabelled(policy, t):
    """Return a trajectory with the reward token that its reward has earned."""
    reward_token = "high" if t.reward == 1 else "low"
    prompt = t.segments()[0][1]
    ids = list(t.ids)
    for position, i in enumerate(prompt):
        if i in policy.reward_ids.values():
            ids[position] = policy.reward_ids[reward_token]
    return replace(t, reward_token=reward_token, ids=ids)


def own_pairs(policy, tasks, seed):
    """Pair rollouts under both reward tokens, relabelled by their outcome: Quark (arXiv 2205.13636)."""
    envs = []
    reward_tokens = []
    keys = []
    for task in tasks:
        for reward_token in ("high", "low"):
            for n in range(ROLLOUTS // len(tasks) // 2):
                envs.append(Ledger(task))
                reward_tokens.append(reward_token)
                keys.append((seed, task.id, reward_token, n))
    found = sampler.rollout(policy, envs, reward_tokens, keys, **LIMITS)
    random.Random(seed).shuffle(found)
    found = [relabelled(policy, t) for t in found]
    high = [t for t in found if t.reward_token == "high"]
    low = [t for t in found if t.reward_token == "low"]
    return [list(pair) for pair in zip(high, low)]


def sample_batch(policy, tasks, cursor, step, args, distributed):
    """Sample the groups of one update.

    Returns:
        The packs with their advantages and weights, all groups that were sampled, the next cursor.
    """
    groups, sampled, cursor = rl.sample_groups(policy, tasks, cursor, step, Ledger, args, distributed)
    packs = sft.pad_packs(sampler.pack(rl.trajectories_of(groups)), distributed)
    rl.assign_advantages(packs, groups, args)
    return packs, sampled, cursor


def reinforce(policy, tasks, flags, lr, seed, distributed, validate=None, sample_batch=sample_batch):
    """Run stage 2: updates until ROLLOUTS are used up.

    Args:
        validate: called four times, without arguments.
        sample_batch: a function as the one above.

    Returns:
        One dict per step.
    """
    args = rl.parse_args(
        f"--prompts_per_step 8 --group_size 8 --beta 0.05 --seed {seed} {flags}".split())
    vars(args).update(LIMITS)
    model, optimizer = sharded(policy, lr, distributed)
    reference = copy.deepcopy(policy.model)
    most = args.dynamic_sampling
    total = ROLLOUTS // args.group_size  # groups
    cursor = 0  # groups so far
    log = []
    while cursor + args.prompts_per_step <= total:
        # Sampling again must not exceed the budget.
        args.dynamic_sampling = min(most, (total - cursor) // args.prompts_per_step - 1)
        step = len(log) + 1
        before = cursor
        packs, sampled, cursor = sample_batch(policy, tasks, cursor, step, args, distributed)
        for p in packs:
            with torch.no_grad():
                p.ref_logp = sampler.token_logprobs(reference, p, policy.banned)  # [M]
        optimizer.param_groups[0]["lr"] = sft.get_lr(step, lr, total // args.prompts_per_step)
        metrics = rl.update_policy(model, optimizer, packs, policy.banned, args, distributed)
        metrics |= rl.group_metrics(sampled, args.p_high)
        sft.load_full_weights(policy.model, model)
        trained = sum(len(p.owners.unique()) for p in packs)
        line = {"rollouts": cursor * args.group_size, "trained": trained}
        for name in LOGGED:
            if name in metrics:
                line[name] = float(f"{metrics[name]:.5g}")
        is_last = cursor + args.prompts_per_step > total
        if validate and (is_last or 4 * cursor // total > 4 * before // total):
            line["validation"] = validate()
        log.append(line)
    return log


def success(policy, tasks, reward_token, samples):
    """Return the share of rollouts that succeed. The random numbers are the same for every policy."""
    envs = []
    keys = []
    for task in tasks:
        for n in range(samples):
            envs.append(Ledger(task))
            keys.append((task.id, n))
    found = sampler.rollout(policy, envs, [reward_token] * len(envs), keys, **LIMITS)
    return sum(t.reward for t in found) / len(found)


# ---- The experiment ----------------------------------------------------------------------------------------
@dataclass
class Arm:
    row: str  # its stage 1: sft, rctp, mixed (no reward token) or placebo
    # Flags of stage 2; "own": stage 1 again, on the rollouts of the arm; None: no stage 2.
    flags: str | None = None
    reward_token: str | None = "high"  # reward token of the evaluation: high if stage 1 used it


PRIMARY = ("RCTP-FT + RC-GRPO", "RCTP-FT + GRPO, always high")
ARMS = {
    "SFT": Arm("sft", None, None),
    "SFT + GRPO": Arm("sft", "--reward_tokens none", None),
    "SFT + RC-GRPO": Arm("sft", "", None),
    "mixed, no token": Arm("mixed", None, None),
    "mixed, no token + GRPO": Arm("mixed", "--reward_tokens none", None),
    "placebo": Arm("placebo"),
    "placebo + RC-GRPO": Arm("placebo", ""),
    "RCTP-FT": Arm("rctp"),
    "RCTP-FT + GRPO, always high": Arm("rctp", "--reward_tokens high"),
    "RCTP-FT + RC-GRPO": Arm("rctp", ""),
    "RCTP-FT + RC-GRPO, within reward token": Arm(
        "rctp", "--advantage within_reward_token"),
    "RCTP-FT + always high, sign": Arm(
        "rctp", "--reward_tokens high --advantage sign"),
    "RCTP-FT + always high, virtual success": Arm(
        "rctp", "--reward_tokens high --advantage virtual_success"),
    "RCTP-FT + always high, dynamic sampling": Arm(
        "rctp", "--reward_tokens high --dynamic_sampling 3"),
    "RCTP-FT, again on own rollouts": Arm("rctp", "own"),
}
STAGE2_ARMS = [arm for arm in ARMS if ARMS[arm].flags is not None]


def make_tasks(part, count):
    return [make_task(f"{part} {n}", REQUESTS, TURNS) for n in range(count)]


def read(series):
    """Return {arm: [its runs, by learning rate and seed]} of world/SERIES.jsonl, one run per line."""
    path = HERE / f"{series}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):  # cut off by a kill
        lines.pop()
    found = {}
    for one in sorted(map(json.loads, lines), key=lambda one: (one["lr"], one["seed"])):
        found.setdefault(one["arm"], []).append(one)
    return found


def write(series, runs):
    """Write all runs of a series."""
    lines = [json.dumps(one) + "\n" for some in runs.values() for one in some]
    sft.atomic_write(HERE / f"{series}.jsonl", "".join(lines))


def missing_jobs(series, seeds, rates):
    """Return the jobs of `play` for the runs that a series does not have.

    Args:
        rates: {arm: learning rates of stage 2}.
    """
    done = [(one["arm"], one["seed"], one["lr"]) for some in read(series).values() for one in some]
    jobs = []
    for seed in seeds:
        for row in ("rctp", "sft", "mixed", "placebo"):
            arms = []
            for arm in ARMS:
                if ARMS[arm].row == row:
                    arms += [(arm, lr) for lr in rates[arm] if (arm, seed, lr) not in done]
            if arms:
                jobs.append((row, seed, arms, series == "test"))
    return jobs


def commit():
    git = ["git", "rev-parse", "HEAD"]
    return subprocess.run(git, cwd=HERE.parent, text=True, capture_output=True).stdout.strip()


def play(job) -> list[dict]:
    """Run one row of one seed: stage 1, then its arms.

    Args:
        job: (row, seed, [(arm, lr)], whether the arms are measured on test tasks, or else on validation
            tasks).
    """
    row, seed, arms, is_test = job
    tasks = make_tasks("train", TRAIN)
    val = make_tasks("val", HELD_OUT)
    first = sampler.load_policy(str(HERE / "base"), torch.float32, "cpu")
    pairs = stage1_pairs(first, row, tasks, seed)
    fit(first, pairs, STAGE1, STAGE1_LR, seed, play.distributed)
    runs = []
    for arm, lr in arms:
        began = time.monotonic()
        policy = replace(first, model=copy.deepcopy(first.model))
        flags = ARMS[arm].flags
        reward_token = ARMS[arm].reward_token

        def validate():
            return success(policy, val, reward_token, 1)

        log = []
        validation = [[0, validate()]]
        if flags == "own":
            fit(policy, own_pairs(policy, tasks, seed), STAGE1, lr, seed, play.distributed)
        elif flags is not None:
            log = reinforce(policy, tasks, flags, lr, seed, play.distributed, validate)
        for line in log:
            if "validation" in line:
                validation.append([line["rollouts"], line.pop("validation")])
        found = {
            "arm": arm,
            "seed": seed,
            "lr": lr,
            "updates": len(log),
            "commit": commit(),
            "validation": validation,
        }
        if is_test:
            test = make_tasks("held-out", HELD_OUT)
            by_reward_token = {str(t or "none"): success(policy, test, t, 2) for t in ("high", "low", None)}
            found["success"] = by_reward_token[reward_token or "none"]
            found["by_reward_token"] = by_reward_token
            found["log"] = log
        else:
            found["success"] = success(policy, val, reward_token, 2)
        found["minutes"] = round((time.monotonic() - began) / 60, 2)
        runs.append(found)
    return runs


def start_worker():
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # hides progress bars
    play.distributed = sft.init_distributed()


def run(series, seeds, rates):
    """Run everything that a series lacks, in two processes.

    A row of arms is written when it is done: a kill loses the minutes of two rows.
    """
    jobs = missing_jobs(series, seeds, rates)
    runs = read(series)
    with multiprocessing.get_context("spawn").Pool(2, start_worker) as pool:
        for n, row in enumerate(pool.imap_unordered(play, jobs), 1):
            for one in row:
                runs.setdefault(one["arm"], []).append(one)
            write(series, runs)
            print(f"{n} of {len(jobs)} rows", flush=True)


def tuned():
    """Return {arm: the learning rate with the best mean on validation tasks}, 0.0 without stage 2."""
    rates = dict.fromkeys(ARMS, 0.0)
    found = read("tuning")
    for arm in STAGE2_ARMS:
        runs = found.get(arm, [])
        if len(runs) < len(GRID) * len(TUNING_SEEDS):
            raise SystemExit(f"{arm} is not tuned yet: python results/world.py tune")
        means = {lr: np.mean([one["success"] for one in runs if one["lr"] == lr]) for lr in GRID}
        rates[arm] = max(means, key=means.get)
    return rates


# ---- Tables and picture ------------------------------------------------------------------------------------
# 97.5 % quantile of Student's t for 2 to 10 seeds, and for two series of 10: the unit is the seed, not the
# rollout.
SIX = (
    "SFT + GRPO",
    "SFT + RC-GRPO",
    "mixed, no token + GRPO",
    "placebo + RC-GRPO",
    "RCTP-FT + GRPO, always high",
    "RCTP-FT + RC-GRPO",
)
STARTS = {"sft": "SFT", "mixed": "mixed, no token", "placebo": "placebo", "rctp": "RCTP-FT"}
# A difference of success -> (arms that are added, arms that are subtracted).
CONTRASTS = {
    "SFT: gain of GRPO": (["SFT + GRPO"], ["SFT"]),
    "RCTP-FT: gain of GRPO, always high": ([PRIMARY[1]], ["RCTP-FT"]),
    "the second gain minus the first": ([PRIMARY[1], "SFT"], ["RCTP-FT", "SFT + GRPO"]),
    "mixed data, no token: gain of GRPO": (["mixed, no token + GRPO"], ["mixed, no token"]),
    "placebo tokens: gain of RC-GRPO": (["placebo + RC-GRPO"], ["placebo"]),
    "end: RCTP-FT + RC-GRPO minus SFT + GRPO": ([PRIMARY[0]], ["SFT + GRPO"]),
    "end: RCTP-FT + GRPO minus SFT + GRPO": ([PRIMARY[1]], ["SFT + GRPO"]),
    "end: mixed + GRPO minus SFT + GRPO": (["mixed, no token + GRPO"], ["SFT + GRPO"]),
    "end: placebo + RC-GRPO minus SFT + GRPO": (["placebo + RC-GRPO"], ["SFT + GRPO"]),
    "end: RCTP-FT + RC-GRPO minus placebo + RC-GRPO": ([PRIMARY[0]], ["placebo + RC-GRPO"]),
    "end: RCTP-FT + GRPO minus placebo + RC-GRPO": ([PRIMARY[1]], ["placebo + RC-GRPO"]),
    "the paper's 1st step: SFT + RC-GRPO minus SFT + GRPO": (["SFT + RC-GRPO"], ["SFT + GRPO"]),
    "its 2nd step: RCTP-FT + GRPO minus SFT + RC-GRPO": ([PRIMARY[1]], ["SFT + RC-GRPO"]),
    "its 3rd step: RCTP-FT + RC-GRPO minus RCTP-FT + GRPO": ([PRIMARY[0]], [PRIMARY[1]]),
}


def student(df, share=0.95) -> float:
    """Return the bound that Student's t with `df` degrees of freedom keeps within, on both sides."""
    return float(stats.t.ppf((1 + share) / 2, df))


def interval(values) -> tuple[float, float]:
    """Return the mean over seeds [n] and half the width of its 95 % interval."""
    n = len(values)
    return float(np.mean(values)), student(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)


def contrast(runs, plus, minus) -> list[float]:
    """Return a difference of success in points, one per seed that all of these arms have."""
    success_of = {arm: {one["seed"]: one["success"] for one in runs[arm]} for arm in (*plus, *minus)}
    seeds = set.intersection(*map(set, success_of.values()))
    values = []
    for seed in sorted(seeds):
        added = sum(success_of[arm][seed] for arm in plus)
        values.append(100 * (added - sum(success_of[arm][seed] for arm in minus)))
    return values


def gain(runs, arm, other) -> tuple[float, float]:
    """Return by how many points an arm exceeds another, and half the width of the 95 % interval."""
    return interval(contrast(runs, [arm], [other]))


def span(values) -> str:
    """Return mean, 95 % interval and number of positive seeds as text."""
    mean, half = interval(values)
    above = sum(value > 0 for value in values)
    return f"{mean:+.1f} ({mean - half:.1f} to {mean + half:.1f}), {above} of {len(values)}"


def contrast_table(series) -> str:
    """Return CONTRASTS as a table in Markdown, with a column per series."""
    lines = [f"| difference in points | {' | '.join(series)} |", "|" + "---|" * (1 + len(series))]
    for name, (plus, minus) in CONTRASTS.items():
        cells = []
        for runs in series.values():
            has_all = runs.keys() >= {*plus, *minus}
            cells.append(span(contrast(runs, plus, minus)) if has_all else "")
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_series(columns) -> tuple[float, float]:
    """Return the mean of the means of several series, and half the width of its 95 % interval.

    The series differ in more than their seeds, so each has its own variance.
    """
    squares = [(half / student(len(column) - 1))**2 for column in columns for _, half in [interval(column)]]
    mean = np.mean([np.mean(column) for column in columns])
    df = sum(len(column) - 1 for column in columns)
    return float(mean), student(df) * math.sqrt(sum(squares)) / len(columns)


def power(values, difference=2.0):
    """Return the probability that a t-test over as many seeds finds a difference of so many points.

    The seeds vary as these values do. It is the share of 100,000 simulated experiments.
    """
    n = len(values)
    seeds = np.random.default_rng(0).normal(difference, np.std(values, ddof=1), (100_000, n))
    bound = student(n - 1) * seeds.std(1, ddof=1) / math.sqrt(n)  # [experiments]
    return float(np.mean(seeds.mean(1) > bound))


def mean_of(lines, name):
    return np.mean([line[name] for line in lines])


def table(runs, arms) -> str:
    """Return arms of stage 2 as a table in Markdown."""
    lines = [
        "| arm | lr | start | end | gain | end minus always high's end | zero-std groups | under low |",
        "|" + "---|" * 8,
    ]
    for arm in arms:
        start = STARTS[ARMS[arm].row]
        if not runs.keys() >= {arm, start}:
            continue
        logs = [one["log"] for one in runs[arm]]
        zero_std = ""
        if any(logs):
            first = [line for log in logs for line in log[:5]]
            last = [line for log in logs for line in log[-5:]]
            name = "frac_reward_zero_std"
            zero_std = f"{100 * mean_of(first, name):.0f} → {100 * mean_of(last, name):.0f} %"
        difference = ""
        if arm != PRIMARY[1]:
            mark = "**primary** " if arm == PRIMARY[0] else ""
            difference = mark + "{:+.1f} ± {:.1f}".format(*gain(runs, arm, PRIMARY[1]))
        low = []
        for some in (runs[start], runs[arm]):
            low.append(100 * mean_of([one["by_reward_token"] for one in some], "low"))
        cells = [
            arm,
            f"{runs[arm][0]['lr']:g}",
            f"{100 * mean_of(runs[start], 'success'):.1f}",
            f"{100 * mean_of(runs[arm], 'success'):.1f}",
            "{:+.1f} ± {:.1f}".format(*gain(runs, arm, start)),
            difference,
            zero_std,
            f"{low[0]:.0f} → {low[1]:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def task_rates(runs) -> list[tuple[float, float]]:
    """Return (p_high, p_low) of 40 tasks that are like those of the first updates.

    Tasks differ: p_high is spread as the beta distribution with their mean reward and their share of zero-std
    groups under always high. p_low is the same for all.
    """
    first = [one["log"][0] for one in runs[PRIMARY[1]]]
    mean = mean_of(first, "reward")
    zero_std = mean_of(first, "frac_reward_zero_std")
    p_low = mean_of([one["log"][0] for one in runs[PRIMARY[0]]], "rc/reward_low")
    x = (np.arange(2000) + 0.5) / 2000
    spreads = []
    for concentration in np.geomspace(0.05, 50, 200):
        density = x**(mean * concentration - 1) * (1 - x)**((1 - mean) * concentration - 1)
        density /= density.sum()
        error = abs((density * (x**8 + (1 - x)**8)).sum() - zero_std)  # groups of 8
        spreads.append((error, concentration, density))
    _, _, density = min(spreads, key=lambda spread: spread[0])
    places = np.searchsorted(density.cumsum(), (np.arange(40) + 0.5) / 40)
    return [(float(x[place]), max(0.001, float(p_low))) for place in places]


def predicted(runs) -> str:
    """Return what the exact model says of the first updates."""
    rates = task_rates(runs)
    text = []
    for a, b in ((3, 1), (1, 1), (1, 3)):
        ratios = exact.compare(8, rates, (a, b))
        figures = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
        text.append(f"{figures} for {a} : {b}")
    p_high, p_low = np.mean(rates, axis=0)
    return (f"The exact model for 40 tasks like those of the first update (p_high {p_high:.2f} on average, "
            f"p_low {p_low:.2f}, G = 8), RC-GRPO over always high: {'; '.join(text)}.\n")


def observed(grid, lr, rollouts) -> str:
    """Return RC-GRPO's gain over always high's after some rollouts, both at one rate, on validation tasks."""
    gains = []  # per arm: per seed
    for arm in PRIMARY:
        some = [dict(one["validation"]) for one in grid[arm] if one["lr"] == lr]
        gains.append([validation[rollouts] - validation[0] for validation in some])
    gains = np.array(gains)  # [2, seeds]
    seeds = np.random.default_rng(0).integers(gains.shape[1], size=(10_000, gains.shape[1]))
    mine, other = gains[:, seeds].mean(2)  # [10000] each
    low, high = np.percentile(mine / other, [2.5, 97.5])
    mean = gains[0].mean() / gains[1].mean()
    return (f"After {rollouts} rollouts at lr {lr:g} RC-GRPO's gain is {mean:.2f} ({low:.2f} to {high:.2f}) "
            "of always high's, on validation tasks.\n")


# Colours of the rows.
COLOURS = {"sft": "tab:grey", "mixed": "tab:olive", "placebo": "tab:pink", "rctp": "tab:blue"}


def draw(runs):
    """Draw world.png.

    Left: success on validation tasks over the rollouts of stage 2, for the arms that begin with RCTP-FT.
    Right: success on test tasks, the mean of every arm with its interval, and its seeds as dots.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for arm in ARMS:
        if ARMS[arm].row != "rctp" or arm not in runs or not runs[arm][0]["log"]:
            continue
        x = np.arange(5) * ROLLOUTS / 4
        curves = []  # [seeds][5]
        for one in runs[arm]:
            rollouts, values = zip(*one["validation"])
            # With dynamic sampling a step may pass such a point: its value is interpolated.
            curves.append(np.interp(x, rollouts, values))
        mean, half = np.transpose([interval(values) for values in np.transpose(curves)])  # [5] each
        [line] = left.plot(x, mean, label=arm)
        left.fill_between(x, mean - half, mean + half, alpha=0.12, color=line.get_color())
    left.set_xlabel("rollouts")
    left.set_ylabel("success on validation tasks, high token")
    left.legend(fontsize=8)

    bars = [arm for arm in reversed(ARMS) if arm in runs]
    for n, arm in enumerate(bars):
        seeds = [one["success"] for one in runs[arm]]
        mean, half = interval(seeds)
        right.barh(
            n,
            mean,
            xerr=half,
            color=COLOURS[ARMS[arm].row],
            alpha=0.8 if arm in PRIMARY else 0.5,
            ecolor="black",
            capsize=2)
        right.plot(seeds, [n] * len(seeds), "k.", markersize=3)
    right.set_yticks(range(len(bars)), bars, fontsize=8)
    right.set_xlabel(f"success on test tasks, {len(runs[PRIMARY[0]])} seeds, 95 % intervals over seeds")
    figure.savefig(HERE.with_suffix(".png"), dpi=100)


def report():
    """Write world.md and world.png."""
    runs = read("test")
    grid = read("grid")
    first = read("first_test")
    others = [arm for arm in STAGE2_ARMS if arm not in SIX]
    series = {"`test`": runs, "`first_test`": first}
    text = "\n\n".join([table(runs, SIX), table(runs, others), contrast_table(series)])
    differences = contrast(runs, PRIMARY[:1], PRIMARY[1:])
    text += (f"\n\nPrimary comparison, {PRIMARY[0]} minus {PRIMARY[1]}: {span(differences)} seeds above 0. "
             f"All other comparisons are exploratory. The power for 2 points was {power(differences):.0%}.\n")
    if first:
        points, half = over_series([differences, contrast(first, PRIMARY[:1], PRIMARY[1:])])
        text += f"The same over both series: {points:+.1f} ± {half:.1f}.\n"
    rates = {one["lr"] for some in grid.values() for one in some}
    for lr in sorted(rates):
        some = {arm: [one for one in grid[arm] if one["lr"] == lr] for arm in PRIMARY}
        points, half = gain(some, *PRIMARY)
        text += f"On validation tasks, both at learning rate {lr:g}: {points:+.1f} ± {half:.1f}.\n"
    edges = [arm for arm in STAGE2_ARMS if arm in runs and runs[arm][0]["lr"] in (GRID[0], GRID[-1])]
    text += f"{len(edges)} of {len(STAGE2_ARMS)} arms have a learning rate at the edge of the grid.\n"
    text += predicted(runs)
    if grid:
        text += observed(grid, 6e-4, 640) + observed(grid, 6e-4, ROLLOUTS)
    for name, some in {"test": runs, "grid": grid, "first_test": first}.items():
        commits = {one["commit"][:10] for arm in some.values() for one in arm}
        text += f"`{name}` was made at {', '.join(sorted(commits))}.\n"
    HERE.with_suffix(".md").write_text(text)
    print(text)
    draw(runs)


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else "report"
    rates = {arm: () for arm in ARMS}
    if command == "tune":
        if not (HERE / "base").exists():
            pretrain(sft.init_distributed())
        rates |= dict.fromkeys(STAGE2_ARMS, GRID)
        run("tuning", TUNING_SEEDS, rates)
        return
    if command == "grid":
        rates |= dict.fromkeys(PRIMARY, (*GRID, 2 * GRID[-1]))
        run("grid", SEEDS, rates)
    if command == "run":
        run("test", SEEDS, {arm: [lr] for arm, lr in tuned().items()})
    report()


if __name__ == "__main__":
    main()
