"""What one group teaches, exactly: GRPO, RC-GRPO and other remedies for groups without variance.

    python results/exact.py        # exact.json and exact.png, in seconds

A policy with two modes, which share a skill: P(success | high) = sigmoid(skill + mode), P(success | low) =
sigmoid(skill - mode); without a token the mode does not act, sigmoid(skill). Nothing is sampled: the reward
is 0 or 1, so a group of G rollouts is one of a few patterns of tokens and rewards, each with its probability.
Advantages and loss are the project's own. All figures are per rollout, so that arms of one budget can be
compared:

    dead        share of the groups whose rewards are all equal
    variance    within-group, of the rewards; it is the sum of two: within tokens and between them
    gradient    expected, of the gain that `policy_loss` maximises, on a parameter or logit; std: of one group
    step        what one plain gradient step of lr 1 along it adds to P(success | high) and P(success | low)
    snr         of that change of high's logit, mean / std; N rollouts have sqrt(N) times as much
    cost        groups that are drawn for one that an update averages. With resampling dead groups cost theirs
                too; a budget of rollouts makes so many times fewer updates, each as much larger: the same
                sum, noise included. What a steadier update is worth, an adaptive optimizer decides

How much of a network both modes share is unknown, so skill and mode may weigh differently: high's logit is a
skill + b mode, and (a, b) = (1, 1), (3, 1), (1, 3) are shown. GRPO without a token learns the skill of a
policy between both modes: at p_l = 1 - p_h it succeeds half of the time, whatever p_h is.
"""
import contextlib
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from rl_rcgrpo import group_advantages, policy_loss, variance_parts

# An arm: the signs with which the mode acts under its tokens (high +1, low -1, none 0), equally likely; what
# `group_advantages` does; whether dead groups are drawn again.
ARMS = {"GRPO, no token": ([0], "group", False),
        "GRPO, always high": ([1], "group", False),
        "RC-GRPO": ([1, -1], "group", False),
        "RC-GRPO, within reward token": ([1, -1], "within_reward_token", False),
        "RC-GRPO, mean only": ([1, -1], "mean_only", False),
        "always high, mean only": ([1], "mean_only", False),
        "always high, sign": ([1], "sign", False),
        "always high, virtual success": ([1], "virtual_success", False),
        "always high, dynamic sampling": ([1], "group", True)}
RELATIONS = {"p_l = .05": lambda high: 0.05,
             "p_l = p_h": lambda high: high,
             "p_l = 1 - p_h": lambda high: 1 - high}
P_HIGH = [percent / 100 for percent in range(1, 100, 2)]
SCALES = ((1, 1), (3, 1), (1, 3))  # of skill and mode in high's logit


def logit(p):
    return math.log(p / (1 - p))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def patterns(signs, G):
    """All groups up to their order: signs [S, G], rewards [S, G], and how many orders each has [S]."""
    kinds = [(sign, reward) for sign in signs for reward in (0.0, 1.0)]
    groups = list(itertools.combinations_with_replacement(kinds, G))
    orders = [math.factorial(G) / math.prod(map(math.factorial, Counter(group).values())) for group in groups]
    both = torch.tensor(groups, dtype=torch.float64)  # [S, G, 2]
    return both[..., 0], both[..., 1], torch.tensor(orders, dtype=torch.float64)


class Arm:
    """What does not depend on the policy: the groups that can occur, and what each does to its rollouts."""

    def __init__(self, name, G):
        signs, kind, self.resample = ARMS[name]
        self.choices = len(signs)  # of a rollout's token
        self.signs, self.rewards, self.orders = patterns(signs, G)
        tokens = (self.signs == 1).long()  # [S, G]
        advantages = group_advantages(self.rewards, tokens, kind)  # [S, G]
        logp = torch.zeros_like(advantages, requires_grad=True)  # any: an update's first ratio is 1
        loss, _ = policy_loss(logp, logp.detach(), None, advantages, 1 / G, beta=0)
        self.push = -torch.autograd.grad(loss, logp)[0]  # [S, G] on the log-prob of what each rollout did
        self.dead = (self.rewards == self.rewards[:, :1]).all(1)  # [S]
        parts = [variance_parts(r[None], t[None]) for r, t in zip(self.rewards, tokens)]
        self.within, self.between = torch.tensor(parts, dtype=torch.float64).T  # [S] each
        self.G = G

    def figures(self, p_high, p_low, scale=(1, 1)):
        """All of them at one policy."""
        skill, mode = (logit(p_high) + logit(p_low)) / 2, (logit(p_high) - logit(p_low)) / 2
        success = torch.sigmoid(skill + self.signs * mode)  # [S, G] of each rollout
        chances = torch.where(self.rewards == 1, success, 1 - success) / self.choices
        chance = self.orders * chances.prod(1)  # [S], their sum is 1
        # d log P(reward) / d logit = reward - P(success)
        pull = self.push * (self.rewards - success)  # [S, G]
        on_skill = scale[0] * pull.sum(1)  # [S]
        on_mode = scale[1] * (self.signs * pull).sum(1)  # [S]
        on_high = (pull * (self.signs == 1)).sum(1)  # [S] high's logit alone
        moved = scale[0] * on_skill + scale[1] * on_mode  # [S] what a step of lr 1 adds to high's logit
        moved_low = scale[0] * on_skill - scale[1] * on_mode

        def mean(x):
            return (chance * x).sum().item()

        def std(x):
            return math.sqrt(max(0.0, mean(x**2) - mean(x)**2))
        return {"dead": mean(self.dead), "cost": 1 / (1 - mean(self.dead)) if self.resample else 1.0,
                "within": mean(self.within), "between": mean(self.between),
                "variance": mean(self.within + self.between),
                "gradient_skill": mean(on_skill), "std_skill": std(on_skill),
                "gradient_mode": mean(on_mode), "std_mode": std(on_mode),
                "gradient_high": mean(on_high), "std_high": std(on_high),
                "step_high": sigmoid(logit(p_high) + mean(moved)) - p_high,
                "step_low": sigmoid(logit(p_low) + mean(moved_low)) - p_low,
                "snr": mean(moved) / max(std(moved), 1e-9) / math.sqrt(self.G)}  # `signed` at 1/2: no noise


def draw(found):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = [("dead", 0, "dead groups"), ("variance", 0, "within-group variance\ndotted: within tokens")]
    for n, (a, b) in enumerate(SCALES):
        shown.append(("step_high", n, f"step of P(success | high)\nskill : mode = {a} : {b}"))
    shown += [("step_low", 0, "step of P(success | low)"), ("snr", 0, "snr of high's step, per rollout")]
    figure, axes = plt.subplots(len(shown), 3, figsize=(11, 15), sharex=True, sharey="row",
                                layout="constrained")
    for line, (what, scale, title) in zip(axes, shown):
        for axis, relation in zip(line, RELATIONS):
            for n, arm in enumerate(ARMS):
                curve = found[key(arm, 5, relation, SCALES[scale])]
                style = "--" if "high," in arm else "-"
                axis.plot(P_HIGH, curve[what], label=arm, color=f"C{n}", linestyle=style)
                if what == "variance":
                    axis.plot(P_HIGH, curve["within"], color=f"C{n}", linestyle=":")
        line[0].set_ylabel(title)
    axes[-1, 0].set_yscale("log")
    for top, bottom, relation in zip(axes[0], axes[-1], RELATIONS):
        top.set_title(f"{relation}, G = 5")
        bottom.set_xlabel("p_h = P(success | high)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90)


def key(arm, G, relation, scale):
    return f"{arm} | G = {G} | {relation} | skill : mode = {scale[0]} : {scale[1]}"


def main():
    found = {}  # key -> name of a figure -> its values along P_HIGH
    for name, G in itertools.product(ARMS, (4, 5, 8)):
        arm = Arm(name, G)
        for (relation, low), scale in itertools.product(RELATIONS.items(), SCALES):
            points = [arm.figures(p, low(p), scale) for p in P_HIGH]
            found[key(name, G, relation, scale)] = {
                what: [float(f"{point[what]:.4g}") for point in points] for what in points[0]}
    git = ["git", "log", "-1", "--format=%h", "--", "exact.py", "../rl_rcgrpo.py"]
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(git, cwd=Path(__file__).parent, text=True, capture_output=True).stdout.strip()
    made = f"python results/exact.py, as it is since commit {commit}"
    found = {"made by": made, "p_high": P_HIGH, **found}
    lines = [f"{json.dumps(name)}: {json.dumps(curves)}" for name, curves in found.items()]
    Path(__file__).with_suffix(".json").write_text("{" + ",\n".join(lines) + "}\n")
    draw(found)
    print(f"{'G = 5, p_h = .99, p_l = .01':32} dead groups  variance  gradient  step high  step low    snr")
    for name in ARMS:
        at = {what: curve[-1] for what, curve in found[key(name, 5, "p_l = 1 - p_h", (1, 1))].items()}
        print(f"{name:32}{at['dead']:12.4f}{at['variance']:10.4f}{at['gradient_high']:10.4f}"
              f"{at['step_high']:11.5f}{at['step_low']:10.5f}{at['snr']:7.3f}")


if __name__ == "__main__":
    main()
