"""Test RC-GRPO where it should help: a prediction first, then the test.

    python results/regimes.py              # table and picture of finished runs: seconds
    python results/regimes.py base         # the base policy
    python results/regimes.py gate         # gate.json: both worlds before any RL, and the prediction
    python results/regimes.py tune         # learning rates of stage 2, on tuning seeds and validation tasks
    python results/regimes.py run          # the test runs

The environment, the policy and both stages are world.py's, with three differences. The failures of stage 1
are rollouts of the base policy, as in the paper. The base knows all requests, but makes a mistake in half of
those that take two calls, so that low succeeds now and then. Limits of tokens are too wide to matter. Two
worlds:

    A, saturated: after stage 1 high nearly always succeeds on tasks of 2 to 4 turns, where RL trains. The
    test has longer tasks.

    B, unseen: two requests are absent from the successes of stage 1, and where the base makes no other
    mistakes, it has a wrong habit in these. Each task of RL and of the test has one of them.

Finished runs are kept, one per line of regimes/runs.jsonl: a command that was killed goes on.

How the base was chosen, on validation tasks and seed 100:

    A base trained so briefly that it does a third of the requests of two calls: p_high is .65 after 600
    updates of stage 1 and after 2,400. What it cannot do, it fails under both tokens.

    A base that can do them but makes mistakes at random: p_high is .50 after 800 updates, .80 after 2,400.
    Two layers need that long to find the reward token in the prompt.

    So pretraining has two tags, as text has signs of its quality: after " !" there are no mistakes, after
    " ?" more. They appear nowhere else. Stage 1 then has to learn that a token means one of them: p_high is
    .98 after 600 updates. But 600 were too few in world B (.21 under both tokens), and in A for seed 101 (.55
    under high, .53 under low), so that it became 1,000.

    World B on A's base: high learns to do all requests without mistakes, those too that it never saw done
    (.87 of tasks). There is nothing to explore. So B's base has a wrong habit in them. Tried on seed 101:

        share of mistakes in unseen requests      success after stage 1, on B's tasks
        without a tag   after " !"   after " ?"   under high   under low
        .9              .99          .8           .02          .01         failures hardly ever do them right
        .6              .99          .4           .18          .09
        .45             .99          .3           .08          .15         chosen

    With the habit after " !" alone, and random mistakes elsewhere, high does .49 and .84 of single unseen
    requests. On the gate's seeds this base has .16 and .15, .21 and .17: low is not ahead of high there.
    With `double` in the place of `close ... into`, tried afterwards, it is .09 and .15, and with the shares
    .6, .99, .2 .12 and .11: no better.

    Lengths of the test of A: on 6 to 8 turns high succeeds in 15 %, which is too rare; on 4 to 6 in 75 %.
"""
import copy
import json
import math
import multiprocessing
import random
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from queue import Empty

import matplotlib
import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))
import exact
import rl_rcgrpo as rl
import rollout as sampler
import sft_rctp as sft
import world

HERE = Path(__file__).parent / "regimes"
LIMITS = dict(max_new_tokens=64, max_sampled_tokens=2400, max_len=6000)  # of a rollout: they cut nothing off
UNSEEN = ("empty {x} into {y}", "close {x} into {y}")  # requests that world B's successes lack
GROUP = 8  # rollouts
TRAIN = 1024  # pairs of stage 1, and tasks of RL
PARTS = {"val": 500, "test": 1000, "low": 200, "gate": 200}  # tasks
GRID = (3e-4, 6e-4, 1.2e-3)  # learning rates of stage 2
HOT = (1.25, 1.5, 2.0)  # temperatures, of which the gate takes the one with the most rescued groups
TUNING_SEEDS = range(100, 108)
SEEDS = {"A": 20, "B": 12}  # of the test
GATE_SEEDS = (("A", 101), ("A", 102), ("B", 102), ("B", 103))
PRIMARY = ("A", "RC-GRPO", "always high")
SECONDARY = (
    ("B", "explore low, learn high", "explore hot, learn high"),
    ("B", "explore low, learn high", "always high"),
)
EXPLORATORY = (  # found in the results
    ("A", "always high, sign", "always high"),
    ("A", "always high, sign", "RC-GRPO"),
)
STAGE1 = 1000  # updates of 8 pairs


# ---- The base policy ---------------------------------------------------------------------------------------
# At the end of the first request -> the share of hard requests that are done wrong.
TAGS = {"": 0.5, " !": 0.0, " ?": 0.8}
# The same for world B's unseen requests: done by habit, with `set` for the second call, which is wrong.
HABIT = {"": 0.45, " !": 0.99, " ?": 0.3}
# World -> phase -> (updates, tags, habit).
PHASES = {
    "A": {"0": (1500, {"": 0.0}, None), "1": (3500, TAGS, None), "2": (1200, TAGS, None)},
    "B": {"habit": (1200, TAGS, HABIT)},
}


def base_data(policy, phase, count, tags, habit):
    """Return conversations of one to four turns, in which some requests of two calls are done wrong.

    Args:
        tags: {tag: share of these requests with a random mistake}.
        habit: the same for the mistake by habit in UNSEEN requests, or None: no habit.
    """
    data = []
    for n in range(count):
        task = world.make_task(f"base {phase} {n}", world.REQUESTS, (1, 4))
        rng = random.Random(task.id)
        wrong = world.corrupt(task, rng)
        tag = rng.choice(list(tags))
        turns = []
        for text, gold, bad in zip(task.texts, task.gold, wrong):
            share = tags[tag] if is_one_of(text, world.HARD) else 0.0
            if habit and is_one_of(text, UNSEEN):
                share, bad = habit[tag], by_habit(gold)
            turns.append(bad if rng.random() < share else gold)
        tagged = replace(task, texts=[task.texts[0] + tag, *task.texts[1:]])
        data.append([world.play_script(policy, tagged, turns, None)])
    return data


def by_habit(calls):
    """Return these two calls with `set` for the second, on the same account with the same number."""
    first, second = calls
    account, number = second.partition("(")[2].removesuffix(")").split(",")[-2:]
    return [first, f"set({account},{number})"]


def train_base(name, distributed):
    """Train the base policy of a world and save it.

    World A's goes on from world.py's: first all requests without mistakes, then with tags and mistakes. World
    B's goes on from world A's, with the habit. The committed base of A was made in three commands, with other
    draws in the third: another run of this function makes a similar one, not the same.
    """
    start = world.HERE / "base" if name == "A" else WORLDS["A"].base
    policy = sampler.load_policy(str(start), torch.float32, "cpu")
    for phase, (updates, tags, habit) in PHASES[name].items():
        data = base_data(policy, phase, 32 * updates, tags, habit)
        world.fit(policy, data, updates, 2e-3, None, distributed, size=32)
    policy.model.save_pretrained(WORLDS[name].base)
    policy.tokenizer.save_pretrained(WORLDS[name].base)


# ---- Tasks, rollouts and stage 1 ---------------------------------------------------------------------------
@dataclass
class World:
    base: Path
    experts: dict  # requests of the successes of stage 1
    test_turns: tuple
    needed: tuple = ()  # each task of RL and of the test has one of these requests


WORLDS = {
    "A": World(HERE / "base", world.REQUESTS, (4, 6)),
    "B": World(
        HERE / "base_habit",
        {text: calls for text, calls in world.REQUESTS.items() if text not in UNSEEN},
        (2, 4),
        UNSEEN),
}


def make_tasks(part, count, turns, requests=world.REQUESTS, needed=()):
    """Return tasks of this part; each has one of the needed requests, if there are any."""
    tasks = []
    n = 0
    while len(tasks) < count:
        task = world.make_task(f"regimes {part} {n}", requests, turns)
        if not needed or any(is_one_of(text, needed) for text in task.texts):
            tasks.append(task)
        n += 1
    return tasks


def is_one_of(text, requests):
    """Return whether a user's text is one of these requests: the same words but for its gaps, such as {x}."""
    words = text.split()
    for request in requests:
        given = request.split()
        if len(words) == len(given) and all(a == b or "{" in b for a, b in zip(words, given)):
            return True
    return False


def roll(policy, tasks, reward_token, count, key, temperature=1.0):
    """Return `count` rollouts of each task, task by task."""
    envs = []
    keys = []
    for task in tasks:
        for n in range(count):
            envs.append(world.Ledger(task))
            keys.append((*key, task.id, n))
    return sampler.rollout(
        policy, envs, [reward_token] * len(envs), keys, temperature=temperature, **LIMITS)


def with_reward_token(policy, t, reward_token, messages):
    """Return a rollout whose prompt has this reward token."""
    end = len(policy.chat.render_prompt(messages, t.reward_token))
    prompt = policy.chat.render_prompt(messages, reward_token)
    return replace(
        t,
        reward_token=reward_token,
        ids=prompt + t.ids[end:],
        loss_mask=[0] * len(prompt) + t.loss_mask[end:],
        logprobs=[0.0] * len(prompt) + t.logprobs[end:])


def stage1_pairs(policy, name, row, seed):
    """Return TRAIN [success, failure] pairs of trajectories, with the reward tokens of the row.

    Successes are gold calls; failures are the first failed rollouts of the base on other tasks, up to four
    tries each. They are paired by count. The row `sft` has two successes per pair.
    """
    experts = make_tasks(f"experts {seed}", 2 * TRAIN, (2, 4), WORLDS[name].experts)
    failures = []
    part = 0
    while len(failures) < TRAIN:
        tasks = make_tasks(f"failures {seed} {part}", TRAIN // 4, (2, 4))
        for n in range(4):
            found = roll(policy, tasks, None, 1, (seed, "failures", n))
            failures += [(t, task) for t, task in zip(found, tasks) if t.reward < 1]
            tasks = [task for t, task in zip(found, tasks) if t.reward == 1]
        part += 1
    rng = random.Random(f"{seed} tokens")
    pairs = []
    for n in range(TRAIN):
        tokens = {
            "rctp": ["high", "low"],
            "placebo": [rng.choice(["high", "low"]) for _ in range(2)],
        }.get(row, [None, None])
        success = world.play_script(policy, experts[n], experts[n].gold, tokens[0])
        if row == "sft":
            other = experts[TRAIN + n]
            pairs.append([success, world.play_script(policy, other, other.gold, None)])
        else:
            t, task = failures[n]
            pairs.append([success, with_reward_token(policy, t, tokens[1], world.Ledger(task).messages())])
    return pairs


def stage1(name, row, seed, distributed):
    """Return the policy after stage 1."""
    policy = sampler.load_policy(str(WORLDS[name].base), torch.float32, "cpu")
    pairs = stage1_pairs(policy, name, row, seed)
    world.fit(policy, pairs, STAGE1, world.STAGE1_LR, seed, distributed)
    return policy


# ---- The gate ----------------------------------------------------------------------------------------------
def group_gradient(policy, rollouts):
    """Return the gradient [weights] of `mean_only` advantages of one prompt's rollouts, without a KL."""
    parameters = list(policy.model.parameters())
    rewards = torch.tensor([t.reward for t in rollouts])
    advantages = rl.group_advantages(rewards[None], kind="mean_only")[0]  # [B]
    lengths = torch.tensor([sum(t.loss_mask) for t in rollouts])  # [B]
    weights = advantages / lengths / len(rollouts)  # [B]
    total = torch.zeros(sum(p.numel() for p in parameters))  # [weights]
    for p in sampler.pack(rollouts) if advantages.any() else []:
        logp = sampler.token_logprobs(policy.model, p, policy.banned)  # [M]
        gradients = torch.autograd.grad((weights[p.owners] * logp).sum(), parameters)
        total += torch.cat([g.flatten() for g in gradients])
    return total


def cosine(gradients, draws=2000):
    """Estimate the cosine between the mean gradients under two reward tokens, and their norms.

    The norm of a mean of samples is too large: it contains the noise of each sample. Products of two
    different tasks have the right mean, since they share neither rollouts nor what is special to a task. So
    products of a task with itself are left out, in the bootstrap, too.

    Args:
        gradients: [2 tokens, T tasks, weights].
        draws: of the bootstrap over tasks.

    Returns:
        The cosine, its 95 % interval (low, high), and the two norms.
    """
    high, low = gradients
    T = len(high)
    products = torch.stack([high @ low.T, high @ high.T, low @ low.T]).double()  # [3, T, T]
    products.diagonal(dim1=1, dim2=2).zero_()

    def figures(counts):  # [draws, T]
        pairs = counts.sum(1)**2 - (counts**2).sum(1)  # [draws] of different tasks
        return [((counts @ product) * counts).sum(1) / pairs for product in products]  # [draws] each

    def ratio(between, high, low):
        return between / (high.clamp(min=1e-30) * low.clamp(min=1e-30)).sqrt()

    whole = figures(torch.ones(1, T, dtype=torch.float64))
    drawn = np.random.default_rng(0).multinomial(T, np.full(T, 1 / T), draws)
    values = ratio(*figures(torch.tensor(drawn, dtype=torch.float64))).clamp(-9, 9)  # [draws]
    interval = np.percentile(values.numpy(), [2.5, 97.5]).tolist()
    norms = [math.sqrt(max(0.0, square.item())) for square in whole[1:]]
    return ratio(*whole).item(), interval, norms


def signal_to_noise(name, rates, share):
    """Return the signal-to-noise of an arm's move of high's logit, averaged over tasks (see exact.py).

    Args:
        name: of exact.ARMS.
        rates: (p_high, p_low) of each task.
        share: how far low's push moves high's logit, relative to high's own: the cosine of both gradients
            times the ratio of their lengths per unit of variance.
    """
    arm = exact.arm_of(name, GROUP)
    sums = torch.zeros(3, dtype=torch.float64)  # move, its square, share of groups with a gradient
    for p_high, p_low in rates:
        success = p_low + (p_high - p_low) * (arm.signs == 1).double()  # [S, G]
        probability = torch.where(arm.rewards == 1, success, 1 - success) / arm.choices
        probability = arm.orders * probability.prod(1)  # [S]
        pull = arm.push * (arm.rewards - success)  # [S, G]
        move = (pull * torch.where(arm.signs == 1, 1.0, share)).sum(1)  # [S]
        alive = (~arm.zero_std).double()
        sums += torch.stack([(probability * x).sum() for x in (move, move**2, alive)])
    move, square, alive = (sums / len(rates)).tolist()
    return move / math.sqrt(max(square - move**2, 1e-12)), move / math.sqrt(max(alive, 1e-12))


def measure_gate(name, seed, rounds=24):
    """Measure a world after stage 1 of RCTP-FT, on validation tasks like those of RL.

    Each round takes new tasks, until the cosine is known to +-.1.

    Returns:
        One line of gate.json.
    """
    setup = WORLDS[name]
    policy = stage1(name, "rctp", seed, play.distributed)
    count = PARTS["gate"]
    all_tasks = make_tasks("val", rounds * count, (2, 4), needed=setup.needed)
    rates = []  # per round: [2 tokens, T]
    gradients = []  # per round: [2 tokens, T, weights]
    for part in range(rounds):
        tasks = all_tasks[count * part:count * part + count]
        groups = []  # [2 tokens][T]
        for reward_token in ("high", "low"):
            rollouts = roll(policy, tasks, reward_token, 16, (seed, "gate", reward_token))
            groups.append([rollouts[16 * n:16 * n + 16] for n in range(count)])
        rates.append([[np.mean([t.reward for t in group]) for group in line] for line in groups])
        gradients.append(torch.stack(
            [torch.stack([group_gradient(policy, group) for group in line]) for line in groups]))
        value, interval, norms = cosine(torch.cat(gradients, 1))
        print(f"{name} {seed}: {count * (part + 1)} tasks, cosine {value:.2f} {interval}", flush=True)
        if interval[1] - interval[0] < 0.2:
            break
    p_high, p_low = np.concatenate(rates, 1)  # [T] each
    v_high, v_low = (16 / 15 * np.mean(p * (1 - p)) for p in (p_high, p_low))
    lengths = [norms[0] / max(v_high, 1e-12), norms[1] / max(v_low, 1e-12)]  # per unit of variance
    share = value * lengths[1] / max(lengths[0], 1e-12)
    mine, other = (signal_to_noise(arm, list(zip(p_high, p_low)), share)
                   for arm in ("RC-GRPO", "GRPO, always high"))
    return {
        "world": name,
        "seed": seed,
        "base": sampler.checksum(sampler.load_policy(str(setup.base), torch.float32, "cpu").model)[:12],
        "tasks": len(p_high),
        "p_high": float(p_high.mean()),
        "p_low": float(p_low.mean()),
        "v_high": float(v_high),
        "v_low": float(v_low),
        "cosine": value,
        "interval": interval,
        "norms": norms,
        "share": share,
        "predicted": {"snr": mine[0] / max(other[0], 1e-12), "elsewhere": mine[1] / max(other[1], 1e-12)},
        "test": test_success(policy, name),
        **other_half(policy, all_tasks[:count], p_high[:count], seed),
    }


def complaints(name) -> list[str]:
    """Return why a world cannot answer its question, as far as the mean of its gates shows."""
    lines = [line for line in gate() if line["world"] == name]

    def mean(figure):
        return np.mean([line[figure] for line in lines])

    found = []
    if mean("v_low") < 0.1:
        found.append("low has nothing to teach")
    if name == "A" and mean("p_high") < 0.95:
        found.append("high is not saturated")
    if name == "A" and not 0.5 <= mean("test") <= 0.9:
        found.append("the test is too easy or too hard")
    if name == "B" and max(rescued("B").values()) < 0.02:
        found.append("there is hardly a group to rescue")
    return found


def test_success(policy, name):
    """Return success under high on validation tasks like those of the test."""
    setup = WORLDS[name]
    tasks = make_tasks("val", PARTS["gate"], setup.test_turns, needed=setup.needed)
    return float(np.mean([t.reward for t in roll(policy, tasks, "high", 2, ("gate",))]))


def other_half(policy, tasks, p_high, seed):
    """Return how often the other half of a group would succeed, per kind: under high as always, under low,
    or under high with heat.

    Args:
        p_high: of each task, from other rollouts.

    Returns:
        `success` of a rollout, and `rescued`: the share of groups of which all of high's half fails and some
        of the other half succeeds.
    """
    kinds = {"high": ("high", 1.0), "low": ("low", 1.0), **{str(value): ("high", value) for value in HOT}}
    chances = {}  # per kind: of each task
    for name, (reward_token, temperature) in kinds.items():
        rollouts = roll(policy, tasks, reward_token, 16, (seed, "other", temperature), temperature)
        chances[name] = np.array([t.reward for t in rollouts]).reshape(len(tasks), 16).mean(1)
    found = {"success": {}, "rescued": {}}
    for name, p_other in chances.items():
        found["success"][name] = float(p_other.mean())
        found["rescued"][name] = float(np.mean((1 - p_high)**4 * (1 - (1 - p_other)**4)))
    return found


# ---- Stage 2 -----------------------------------------------------------------------------------------------
def sample_explored(policy, tasks, cursor, step, args, distributed, other_token, temperature):
    """Sample the groups of one update of "explore, learn high": half of each group is under high.

    High's half is trained with advantages of its own. Where all of it failed, each success of the other half
    is trained, too, as if high had made it: with high's prompt and advantage 1. The rest only explored.

    Args:
        other_token, temperature: of the other half.

    Returns:
        As `world.sample_batch`; the groups are high's halves.
    """
    half = args.group_size // 2
    order = sft.epoch_shuffle(len(tasks), cursor, args.prompts_per_step, args.seed)
    chosen = [tasks[i] for i in order]
    first = roll(policy, chosen, "high", half, (args.seed, step, "first"))
    other = roll(policy, chosen, other_token, half, (args.seed, step, "other"), temperature)
    rewards = torch.tensor([t.reward for t in first]).view(-1, half)  # [S, G / 2]
    advantages = rl.group_advantages(rewards).flatten().tolist()  # [B], of what is trained
    trained = list(first)
    groups = []
    for n, task in enumerate(chosen):
        members = slice(half * n, half * n + half)
        groups.append(rl.Group(n, first[members]))
        if rewards[n].any():
            continue
        for t in other[members]:
            if t.reward == 1:
                trained.append(with_reward_token(policy, t, "high", world.Ledger(task).messages()))
                advantages.append(1.0)
    packs = sft.pad_packs(sampler.pack(trained), distributed)
    lengths = torch.tensor([sum(t.loss_mask) for t in trained])  # [B]
    weights = 1 / len(trained) / lengths.clamp(min=1)  # [B]
    for p in packs:
        p.advantage = torch.tensor(advantages)[p.owners]  # [M]
        p.weight = weights[p.owners]  # [M]
    return packs, groups, cursor + args.prompts_per_step


@dataclass
class Arm:
    name: str
    world: str
    row: str = "rctp"  # stage 1, see `stage1_pairs`
    flags: str | None = ""  # of stage 2; None: no stage 2
    reward_token: str | None = "high"  # of the evaluation
    sample: object = world.sample_batch
    seeds: int | None = None  # of the test; None: those of the world


def arms_of(temperature):
    """Return all arms.

    Args:
        temperature: of "explore hot, learn high".
    """
    always = "--reward_tokens high"
    none = "--reward_tokens none"
    explore_low = partial(sample_explored, other_token="low", temperature=1.0)
    explore_hot = partial(sample_explored, other_token="high", temperature=temperature)
    arms = [
        Arm("RCTP-FT", "A", flags=None),
        Arm("always high", "A", flags=always),
        Arm("always high, sign", "A", flags=f"{always} --advantage sign"),
        Arm("RC-GRPO", "A"),
        Arm("RC-GRPO, within reward token", "A", flags="--advantage within_reward_token"),
        Arm("RCTP-FT", "B", flags=None),
        Arm("always high", "B", flags=always),
        Arm("RC-GRPO", "B"),
        Arm("explore low, learn high", "B", flags=always, sample=explore_low),
        Arm("explore hot, learn high", "B", flags=always, sample=explore_hot),
    ]
    for row, start, stage2, flags, token in (
            ("sft", "SFT", "GRPO", none, None),
            ("mixed", "mixed", "GRPO", none, None),
            ("placebo", "placebo", "RC-GRPO", "", "high")):
        arms.append(Arm(start, "A", row, None, token, seeds=4))
        arms.append(Arm(f"{start} + {stage2}", "A", row, flags, token, seeds=4))
    return arms


def measure(policy, tasks, reward_token, seed):
    """Return one outcome per task, as a text of 0 and 1. All arms of a seed have the same random numbers."""
    rollouts = roll(policy, tasks, reward_token, 1, ("measure", seed))
    return "".join(str(int(t.reward)) for t in rollouts)


def finished_runs(job):
    """Run stage 1 of one world, row and seed, then some arms. Yield a line of runs.jsonl per arm.

    Args:
        job: (world, row, seed, [(name of the arm, learning rate)], temperature, whether the arms are measured
            on test tasks, or else on validation tasks).
    """
    name, row, seed, wanted, temperature, is_test = job
    setup = WORLDS[name]
    start = stage1(name, row, seed, play.distributed)
    tasks = make_tasks(f"rl {seed}", TRAIN, (2, 4), needed=setup.needed)
    val = make_tasks("val", PARTS["val"], setup.test_turns, needed=setup.needed)
    test = make_tasks("test", PARTS["test"], setup.test_turns, needed=setup.needed)
    by_name = {arm.name: arm for arm in arms_of(temperature) if arm.world == name and arm.row == row}
    for arm_name, lr in wanted:
        began = time.monotonic()
        arm = by_name[arm_name]
        policy = replace(start, model=copy.deepcopy(start.model))
        log = []
        if arm.flags is not None:
            log = world.reinforce(
                policy, tasks, arm.flags, lr, seed, play.distributed, sample_batch=arm.sample)
        found = {"world": name, "arm": arm_name, "seed": seed, "lr": lr, "temperature": temperature,
                 "test": is_test, "commit": play.commit, "log": log}
        if is_test:
            found["high"] = measure(policy, test, arm.reward_token, seed)
            found["low"] = measure(policy, test[:PARTS["low"]], "low", seed)
        else:
            found["high"] = measure(policy, val, arm.reward_token, seed)
        found["minutes"] = round((time.monotonic() - began) / 60, 2)
        yield found


def play(job):
    for one in finished_runs(job):
        play.queue.put(one)


# ---- Running what is missing -------------------------------------------------------------------------------
def read():
    """Return the finished runs. A last line that a kill has cut off is left out."""
    path = HERE / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def missing_jobs(runs, wanted, temperature, is_test):
    """Return the jobs of `play` for wanted runs that are not finished.

    Args:
        wanted: (arm, seed, learning rate) of each.
    """
    done = {(one["world"], one["arm"], one["seed"], one["lr"]) for one in runs if one["test"] == is_test}
    jobs = {}
    for arm, seed, lr in wanted:
        if (arm.world, arm.name, seed, lr) not in done:
            jobs.setdefault((arm.world, arm.row, seed), []).append((arm.name, lr))
    return [(*start, arms, temperature, is_test) for start, arms in jobs.items()]


def start_worker(commit="", queue=None):
    world.LIMITS.update(LIMITS)
    world.start_worker()
    play.distributed = world.play.distributed
    play.commit = commit
    play.queue = queue


def run(wanted, temperature, is_test):
    """Run what is missing, in two processes. The parent alone writes, each run when it is finished."""
    path = HERE / "runs.jsonl"
    runs = read()
    sft.atomic_write(path, "".join(json.dumps(one) + "\n" for one in runs))  # without a torn line
    jobs = missing_jobs(runs, wanted, temperature, is_test)
    total = sum(len(arms) for _, _, _, arms, _, _ in jobs)
    finished = 0
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with context.Pool(2, start_worker, [world.commit(), queue]) as pool:
        played = pool.map_async(play, jobs, chunksize=1)
        while finished < total:
            try:
                one = queue.get(timeout=1)
            except Empty:
                if played.ready():
                    played.get()  # raises the error of a worker
                continue
            with open(path, "a") as file:
                file.write(json.dumps(one) + "\n")
            finished += 1
            print(f"{finished} of {total} missing runs", flush=True)


def gate():
    """Return the lines of gate.json."""
    path = HERE / "gate.json"
    return json.loads(path.read_text()) if path.exists() else []


def rescued(name) -> dict[str, float]:
    """Return the share of rescued groups per kind of the other half: the mean over the seeds of the gate."""
    columns = [line["rescued"] for line in gate() if line["world"] == name]
    if not columns:
        raise SystemExit(f"world {name} has not passed its gate yet: python results/regimes.py gate")
    return {kind: float(np.mean([column[kind] for column in columns])) for kind in columns[0]}


def hot_temperature():
    """Return the temperature that rescues the most groups of world B."""
    shares = rescued("B")
    return max(HOT, key=lambda temperature: shares[str(temperature)])


def validation(arm):
    """Return {learning rate: mean success on validation tasks}, of the rates that all tuning seeds have."""
    found = {}
    for one in read():
        if (one["world"], one["arm"]) == (arm.world, arm.name) and not one["test"]:
            found.setdefault(one["lr"], []).append(one["high"].count("1") / len(one["high"]))
    return {lr: float(np.mean(values)) for lr, values in found.items() if len(values) == len(TUNING_SEEDS)}


def edge_rate(values):
    """Return the rate beyond the edge of the grid, if the best one of the grid lies there, or None.

    Args:
        values: of `validation`, with the grid.
    """
    beyond = {GRID[0]: GRID[0] / 2, GRID[-1]: 2 * GRID[-1]}
    return beyond.get(max(GRID, key=values.get))


def best_rate(arm):
    """Return the learning rate of the test runs: the best on validation tasks.

    The arms after other starts than RCTP-FT are not tuned: they have the middle of the grid.
    """
    if arm.flags is None:
        return 0.0
    if arm.row != "rctp":
        return GRID[1]
    values = validation(arm)
    if not values.keys() >= {*GRID} or edge_rate(values) not in (None, *values):
        raise SystemExit(f"{arm.world}, {arm.name} is not tuned yet: python results/regimes.py tune")
    return max(values, key=values.get)


def tune(arms, temperature):
    """Run the grid for each arm of RCTP-FT, then one more rate where the best one is at its edge."""
    tuned = [arm for arm in arms if arm.row == "rctp" and arm.flags is not None]
    run(list(product(tuned, TUNING_SEEDS, GRID)), temperature, False)
    wanted = []
    for arm in tuned:
        lr = edge_rate(validation(arm))
        if lr is not None:
            wanted += [(arm, seed, lr) for seed in TUNING_SEEDS]
    run(wanted, temperature, False)


# ---- The report --------------------------------------------------------------------------------------------
def outcomes(runs, name, arm, token="high"):
    """Return {seed: outcomes per test task [T]} of an arm, as numbers."""
    found = {}
    for one in runs:
        if (one["world"], one["arm"]) == (name, arm) and one["test"]:
            found[one["seed"]] = np.array(list(one[token]), float)
    return found


def difference(runs, name, arm, other):
    """Return the outcomes of an arm minus those of another [seeds, T] in points, for the seeds of both.

    None if these are fewer than two.
    """
    mine, theirs = outcomes(runs, name, arm), outcomes(runs, name, other)
    seeds = sorted(mine.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    return 100 * np.stack([mine[seed] - theirs[seed] for seed in seeds])


def crossed(values):
    """Return the mean of values [seeds, T], its 95 % interval and standard error, over seeds AND tasks.

    Both would be others in another experiment. The variance is that of two crossed random effects. (A
    bootstrap of seeds and tasks counts the noise of the single values three times.)
    """
    seeds, T = values.shape
    mean = values.mean()
    of_seeds = values.mean(1, keepdims=True) - mean
    of_tasks = values.mean(0, keepdims=True) - mean
    rest = values - mean - of_seeds - of_tasks
    ms_seeds = T * (of_seeds**2).sum() / (seeds - 1)
    ms_tasks = seeds * (of_tasks**2).sum() / (T - 1)
    ms_rest = (rest**2).sum() / (seeds - 1) / (T - 1)
    error = math.sqrt((max(ms_seeds, ms_rest) + max(ms_tasks - ms_rest, 0)) / seeds / T)
    half = world.student(seeds - 1) * error
    return float(mean), (float(mean - half), float(mean + half)), float(error)


def holm(p_values):
    """Return the p-values corrected for their number (Holm)."""
    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.array(p_values)[order] * factors).clip(max=1)
    return corrected


def tested(runs, comparisons):
    """Return a line per comparison, corrected for their number; none if a comparison has no runs yet."""
    found = []
    for comparison in comparisons:
        values = difference(runs, *comparison)
        if values is None:
            return []
        mean, interval, error = crossed(values)
        df = len(values) - 1
        p = 2 * stats.t.sf(abs(mean) / max(error, 1e-12), df)
        # The first step of Holm's procedure tests at 5 % divided by the number of comparisons.
        bound = world.student(df, 1 - 0.05 / len(comparisons))
        power = (bound + stats.t.ppf(0.8, df)) * error
        found.append((comparison, mean, interval, len(values), p, power))
    lines = []
    for n, p in enumerate(holm([p for *_, p, _ in found])):
        (name, arm, other), mean, (low, high), seeds, _, power = found[n]
        p_text = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
        p_text += " (Holm)" if len(comparisons) > 1 else ""
        lines.append(f"{name}: {arm} minus {other}: {mean:+.2f} points ({low:.2f} to {high:.2f}), {p_text}, "
                     f"{seeds} of {SEEDS[name]} seeds; at this spread {power:.2f} points have 80 % power")
    return lines


def gate_table():
    """Return gate.json as a table in Markdown."""
    lines = [
        "| world | seed | p_high | p_low | v_low | p_high, test | cosine (95 %) | share | predicted snr | "
        "elsewhere | rescued, % |",
        "|" + "---|" * 11,
    ]
    for one in gate():
        low, high = one["interval"]
        rescued_groups = ", ".join(f"{name} {100 * value:.1f}" for name, value in one["rescued"].items())
        cells = [
            one["world"],
            str(one["seed"]),
            *(f"{one[name]:.3f}" for name in ("p_high", "p_low", "v_low", "test")),
            f"{one['cosine']:.2f} ({low:.2f} to {high:.2f})",
            f"{one['share']:.2f}",
            f"{one['predicted']['snr']:.2f}",
            f"{one['predicted']['elsewhere']:.2f}",
            rescued_groups,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_cell(runs, name, arm, other):
    """Return an arm minus another as the cell of a table, with the median over seeds: empty where there is
    nothing to compare."""
    values = difference(runs, name, arm, other)
    if arm == other or values is None:
        return ""
    mean, (low, high), _ = crossed(values)
    return f"{mean:+.1f} ({low:.1f} to {high:.1f}), {np.median(values.mean(1)):+.1f}"


def updates_cell(arm, found):
    """Return how the share of groups without a gradient changes, and what else is trained."""
    first = [line for one in found for line in one["log"][:5]]
    last = [line for one in found for line in one["log"][-5:]]
    ends = [100 * world.mean_of(lines, "frac_reward_zero_std") for lines in (first, last)]
    cell = f"{ends[0]:.0f} → {ends[1]:.0f} %"
    if arm.sample is not world.sample_batch:
        trained = np.mean([line["trained"] for one in found for line in one["log"]])
        cell += f" of halves; {trained - 4 * GROUP:.1f} imitated per update"
    return cell


def table(runs, arms):
    """Return the finished arms as a table in Markdown."""
    starts = {(arm.world, arm.row): arm.name for arm in arms if arm.flags is None}
    lines = [
        "| world | arm | seeds | lr | success | gain, median | minus always high, median | zero-std groups | "
        "low | gap |",
        "|" + "---|" * 10,
    ]
    for arm in arms:
        found = [one for one in runs if (one["world"], one["arm"]) == (arm.world, arm.name) and one["test"]]
        if not found:
            continue
        high, low = (np.stack(list(outcomes(runs, arm.world, arm.name, token).values()))
                     for token in ("high", "low"))  # [seeds, T] each
        gap = high[:, :low.shape[1]].mean() - low.mean()  # on the same tasks
        cells = [
            arm.world,
            arm.name,
            str(len(found)),
            f"{found[0]['lr']:g}" if arm.flags is not None else "",
            f"{100 * high.mean():.1f}",
            difference_cell(runs, arm.world, arm.name, starts[arm.world, arm.row]),
            difference_cell(runs, arm.world, arm.name, "always high"),
            updates_cell(arm, found) if arm.flags is not None else "",
            *([f"{100 * low.mean():.1f}", f"{100 * gap:.1f}"] if arm.reward_token else ["", ""]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs, arms):
    """Draw regimes.png: the prediction beside the results after RCTP-FT, relative to always high."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    lines = gate()
    for n, line in enumerate(lines):
        for name, color in (("snr", "tab:blue"), ("elsewhere", "tab:orange")):
            left.plot(line["predicted"][name], n, "o", color=color, label=name if n == 0 else None)
    left.legend()
    left.axvline(1, color="black")
    left.set_yticks(range(len(lines)), [f"{line['world']}, seed {line['seed']}" for line in lines])
    left.set_xlabel("predicted signal-to-noise of RC-GRPO / always high\n"
                    "(elsewhere: if all noise comes from other directions)")
    shown = []
    for arm in arms:
        values = difference(runs, arm.world, arm.name, "always high")
        if values is None or arm.name == "always high" or arm.row != "rctp" or arm.flags is None:
            continue
        mean, (low, high), _ = crossed(values)
        right.errorbar(mean, len(shown), xerr=[[mean - low], [high - mean]], fmt="o", color="black")
        shown.append(f"{arm.world}: {arm.name}")
    right.axvline(0, color="black")
    right.set_yticks(range(len(shown)), shown)
    right.set_xlabel("test success minus always high's, points\n(95 %, over seeds and tasks)")
    left.invert_yaxis()
    right.invert_yaxis()
    figure.savefig(HERE.with_suffix(".png"), dpi=90)
    plt.close(figure)


def report(arms):
    """Print the gate and the results; write regimes.md and regimes.png."""
    runs = read()
    lines = [*tested(runs, [PRIMARY]), *tested(runs, SECONDARY)]
    lines += [f"exploratory: {line}" for line in tested(runs, EXPLORATORY)]
    parts = [gate_table(), table(runs, arms), "\n".join(lines)]
    text = "\n\n".join(parts) + "\n"
    HERE.with_suffix(".md").write_text(text)
    print(text)
    draw(runs, arms)


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else "report"
    if command not in ("base", "gate", "tune", "run", "report"):
        raise SystemExit(f"{command}: there is base, gate, tune, run and report")
    if command == "base":
        torch.set_num_threads(1)
        distributed = sft.init_distributed()
        for name, setup in WORLDS.items():
            if not setup.base.exists():
                train_base(name, distributed)
        return
    if command == "gate":
        lines = gate()
        there = [(line["world"], line["seed"]) for line in lines]
        missing = [key for key in GATE_SEEDS if key not in there]
        with multiprocessing.get_context("spawn").Pool(2, start_worker) as pool:
            lines += pool.starmap(measure_gate, missing, chunksize=1)
        sft.atomic_write(HERE / "gate.json", lines)
    temperature = hot_temperature()
    arms = arms_of(temperature)
    passing = []
    for name in WORLDS:
        print(f"world {name}: {', '.join(complaints(name)) or 'passes its gate'}")
        passing += [arm for arm in arms if arm.world == name and not complaints(name)]
    if command == "tune":
        return tune(passing, temperature)
    if command == "run":
        # World A first; seed by seed, so that a part of the runs is a smaller experiment.
        for name in WORLDS:
            rated = [(arm, best_rate(arm)) for arm in passing if arm.world == name]
            wanted = [(arm, seed, lr) for seed, (arm, lr) in product(range(SEEDS[name]), rated)
                      if arm.seeds is None or seed < arm.seeds]
            run(wanted, temperature, True)
    report(arms)


if __name__ == "__main__":
    main()
