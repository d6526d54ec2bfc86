"""Enumerate exactly how one group trains a policy: GRPO, RC-GRPO and other remedies for zero-std groups.

    python results/exact.py        # exact.json, exact.png and map.png, in half a minute

The policy has two modes, which share a skill: P(success | high) = sigmoid(skill + mode), P(success | low) =
sigmoid(skill - mode). Without a reward token the mode has no effect: sigmoid(skill). Nothing is sampled. The
reward is 0 or 1, so a group of G rollouts is one of a few patterns of reward tokens and rewards, and each
pattern has its probability. Advantages and loss are the project's own. All figures are per rollout, so that
arms of one budget can be compared:

    zero_std    share of the zero-std groups, whose rewards are all equal
    variance    within-group, of the rewards: the sum of the parts within and between reward tokens
    gradient    expected, of the gain that `policy_loss` maximises, on a parameter or logit; std: of one group
    step        increase of P(success | high) and P(success | low) by one plain gradient step of lr 1
    snr         mean / std of that change of high's logit; N rollouts have sqrt(N) times as much
    cost        groups that are sampled per group that an update averages. With dynamic sampling zero-std
                groups cost as much as others: a budget of rollouts makes fewer updates, each larger by the
                same factor, so that the sum is the same, noise included. The value of a steadier update
                depends on the adaptive optimizer

How much of a network both modes share is unknown, so skill and mode may weigh differently: high's logit is a
skill + b mode, and (a, b) = (1, 1), (3, 1), (1, 3) are shown. GRPO without a reward token learns the skill of
a policy between both modes: at p_low = 1 - p_high it succeeds half of the time, whatever p_high is.

The map has RC-GRPO relative to always high: the ratio of the moves of high's logit, for a vanishing learning
rate (a step of lr 1 saturates), and of the signal-to-noise of these moves. In this model a group is noise in
one direction only. A network has many others. If all noise came from those, it would be proportional to
the root of the share of groups that have a gradient: the third ratio.
"""
import contextlib
import functools
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from rl_rcgrpo import group_advantages, policy_loss, variance_parts

HERE = Path(__file__).parent / "exact"

# Name -> (signs, kind, dynamic sampling). Signs: how the mode acts under each of the arm's reward tokens
# (high +1, low -1, none 0), which are equally likely. Kind: of `group_advantages`. Dynamic sampling: whether
# zero-std groups are sampled again.
ARMS = {
    "GRPO, no token": ([0], "group", False),
    "GRPO, always high": ([1], "group", False),
    "RC-GRPO": ([1, -1], "group", False),
    "RC-GRPO, within reward token": ([1, -1], "within_reward_token", False),
    "RC-GRPO, mean only": ([1, -1], "mean_only", False),
    "always high, mean only": ([1], "mean_only", False),
    "always high, sign": ([1], "sign", False),
    "always high, virtual success": ([1], "virtual_success", False),
    "always high, dynamic sampling": ([1], "group", True),
}
# Title -> p_low as a function of p_high.
RELATIONS = {
    "p_low = .05": lambda high: 0.05,
    "p_low = p_high": lambda high: high,
    "p_low = 1 - p_high": lambda high: 1 - high,
}
P_HIGH = [percent / 100 for percent in range(1, 100, 2)]
P_LOW = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5)  # of the map
SCALES = ((1, 1), (3, 1), (1, 3))  # weights of skill and mode in high's logit


def logit(p):
    return math.log(p / (1 - p))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


@functools.cache
def arm_of(name, G):
    return Arm(name, G)


def patterns(signs, G):
    """Enumerate all groups up to their order.

    Returns:
        The signs [S, G], the rewards [S, G], and the number of orders of each group [S].
    """
    kinds = list(itertools.product(signs, (0.0, 1.0)))
    groups = list(itertools.combinations_with_replacement(kinds, G))
    orders = []
    for group in groups:
        repeats = Counter(group).values()
        orders.append(math.factorial(G) / math.prod(map(math.factorial, repeats)))
    both = torch.tensor(groups, dtype=torch.float64)  # [S, G, 2]
    return both[..., 0], both[..., 1], torch.tensor(orders, dtype=torch.float64)


class Arm:
    """The part of an arm that does not depend on the policy: its possible groups and their gradients."""

    def __init__(self, name, G):
        signs, kind, self.dynamic_sampling = ARMS[name]
        self.G = G
        self.choices = len(signs)  # equally likely reward tokens of a rollout
        self.signs, self.rewards, self.orders = patterns(signs, G)
        high = (self.signs == 1).long()  # [S, G]
        advantages = group_advantages(self.rewards, high, kind)  # [S, G]
        logp = torch.zeros_like(advantages, requires_grad=True)  # any value: an update's first ratio is 1
        loss, _ = policy_loss(logp, logp.detach(), None, advantages, 1 / G, beta=0)
        self.push = -torch.autograd.grad(loss, logp)[0]  # [S, G] on the log-prob of each rollout's outcome
        self.zero_std = (self.rewards == self.rewards[:, :1]).all(1)  # [S]
        parts = [variance_parts(r[None], h[None]) for r, h in zip(self.rewards, high)]
        self.within, self.between = torch.tensor(parts, dtype=torch.float64).T  # [S] each

    def figures(self, p_high, p_low, scale=(1, 1)):
        """Return all figures at one policy."""
        skill = (logit(p_high) + logit(p_low)) / 2
        mode = (logit(p_high) - logit(p_low)) / 2
        success = torch.sigmoid(skill + self.signs * mode)  # [S, G] probability of each rollout
        probability = torch.where(self.rewards == 1, success, 1 - success) / self.choices
        group_probability = self.orders * probability.prod(1)  # [S], with sum 1
        # d log P(reward) / d logit = reward - P(success)
        pull = self.push * (self.rewards - success)  # [S, G]
        on_skill = scale[0] * pull.sum(1)  # [S]
        on_mode = scale[1] * (self.signs * pull).sum(1)  # [S]
        on_high = (pull * (self.signs == 1)).sum(1)  # [S] on high's logit alone
        # Changes of the logits of high and low by a step of lr 1, [S] each.
        moved_high = scale[0] * on_skill + scale[1] * on_mode
        moved_low = scale[0] * on_skill - scale[1] * on_mode

        def mean(x):
            return (group_probability * x).sum().item()

        def std(x):
            return math.sqrt(max(0.0, mean(x**2) - mean(x)**2))

        zero_std = mean(self.zero_std)
        noise = max(std(moved_high), 1e-9)  # `sign` at 1/2 has none
        return {
            "zero_std": zero_std,
            "cost": 1 / (1 - zero_std) if self.dynamic_sampling else 1.0,
            "within": mean(self.within),
            "between": mean(self.between),
            "variance": mean(self.within + self.between),
            "gradient_skill": mean(on_skill),
            "std_skill": std(on_skill),
            "gradient_mode": mean(on_mode),
            "std_mode": std(on_mode),
            "gradient_high": mean(on_high),
            "std_high": std(on_high),
            "step_high": sigmoid(logit(p_high) + mean(moved_high)) - p_high,
            "step_low": sigmoid(logit(p_low) + mean(moved_low)) - p_low,
            "snr": mean(moved_high) / noise / math.sqrt(self.G),
        }


def compare(G, rates, scale) -> dict[str, float]:
    """Return RC-GRPO relative to always high, averaged over tasks.

    Args:
        rates: (p_high, p_low) of each task.

    Returns:
        The ratios of the `move` of high's logit, of its signal-to-noise (`snr`), and of the signal-to-noise
        if all noise came from other directions (`elsewhere`).
    """
    both = []
    for name in ("RC-GRPO", "GRPO, always high"):
        moves = []  # mean, mean of the square, and share of groups with a gradient, per task
        for p_high, p_low in rates:
            at = arm_of(name, G).figures(p_high, p_low, scale)
            move = scale[0] * at["gradient_skill"] + scale[1] * at["gradient_mode"]
            noise = move / at["snr"] / math.sqrt(G)
            moves.append((move, noise**2 + move**2, 1 - at["zero_std"]))
        move, square, alive = (sum(column) / len(rates) for column in zip(*moves))
        both.append((move, move / math.sqrt(square - move**2), move / math.sqrt(alive)))
    ratios = [mine / other for mine, other in zip(*both)]
    return dict(zip(("move", "snr", "elsewhere"), ratios))


def enumerate_map(G, scale) -> dict[str, list]:
    """Return `compare` as [P_LOW][P_HIGH] per figure."""
    found = {"move": [], "snr": [], "elsewhere": []}
    for p_low in P_LOW:
        points = [compare(G, [(p_high, p_low)], scale) for p_high in P_HIGH]
        for figure, rows in found.items():
            rows.append([float(f"{point[figure]:.4g}") for point in points])
    return found


def map_key(G, scale):
    return f"RC-GRPO / always high | G = {G} | skill : mode = {scale[0]} : {scale[1]}"


def draw_map(found):
    """Draw map.png: one line of panels per figure, one column per sharing."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "snr": "signal-to-noise",
        "elsewhere": "the same, if all noise\ncomes from other directions",
        "move": "move of high's logit",
    }
    norm = matplotlib.colors.TwoSlopeNorm(1, -1, 4)
    places = range(len(P_LOW))
    size, axes = plt.subplots(3, 3, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for line, (figure, title) in zip(axes, titles.items()):
        for axis, scale in zip(line, ((3, 1), (1, 1), (1, 3))):
            ratios = np.array(found[map_key(5, scale)][figure])  # [P_LOW, P_HIGH]
            better = np.array(P_HIGH) > np.array(P_LOW)[:, None]
            ratios = np.where(better, ratios, np.nan)
            mesh = axis.pcolormesh(P_HIGH, places, ratios, norm=norm, cmap="RdBu", shading="nearest")
            axis.contour(P_HIGH, places, ratios, [1], colors="black")
            axis.set_title(f"{title}\nskill : mode = {scale[0]} : {scale[1]}", fontsize=10)
            axis.set_yticks(places, P_LOW)
    for axis in axes[-1]:
        axis.set_xlabel("p_high")
    for axis in axes[:, 0]:
        axis.set_ylabel("p_low")
    size.colorbar(mesh, ax=axes, extend="both", label="RC-GRPO / always high, G = 5; the line is at 1")
    size.savefig(HERE.with_name("map.png"), dpi=90)
    plt.close(size)


def key(arm, G, relation, scale):
    return f"{arm} | G = {G} | {relation} | skill : mode = {scale[0]} : {scale[1]}"


def draw(found):
    """Draw exact.png: one line of plots per figure, one column per relation of p_low to p_high."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [  # figure, scale, title
        ("zero_std", (1, 1), "zero-std groups"),
        ("variance", (1, 1), "within-group variance\ndotted: within tokens"),
    ]
    for a, b in SCALES:
        shown.append(("step_high", (a, b), f"step of P(success | high)\nskill : mode = {a} : {b}"))
    shown.append(("step_low", (1, 1), "step of P(success | low)"))
    shown.append(("snr", (1, 1), "signal-to-noise of high's\nstep, per rollout"))
    figure, axes = plt.subplots(
        len(shown),
        3,
        figsize=(11, 15),
        sharex=True,
        sharey="row",
        layout="constrained")
    for line, (name, scale, title) in zip(axes, shown):
        for axis, relation in zip(line, RELATIONS):
            for n, arm in enumerate(ARMS):
                curves = found[key(arm, 5, relation, scale)]
                style = "--" if "high," in arm else "-"
                axis.plot(P_HIGH, curves[name], label=arm, color=f"C{n}", linestyle=style)
                if name == "variance":
                    axis.plot(P_HIGH, curves["within"], color=f"C{n}", linestyle=":")
        line[0].set_ylabel(title)
    axes[-1, 0].set_yscale("log")
    for top, bottom, relation in zip(axes[0], axes[-1], RELATIONS):
        top.set_title(f"{relation}, G = 5")
        bottom.set_xlabel("p_high = P(success | high)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(HERE.with_suffix(".png"), dpi=90)


def main():
    git = ["git", "log", "-1", "--format=%h", "--", "exact.py", "../rl_rcgrpo.py"]
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(git, cwd=HERE.parent, text=True, capture_output=True).stdout.strip()
    made = f"python results/exact.py, as it is since commit {commit}"
    found = {"made by": made, "p_high": P_HIGH}  # then: key -> name of a figure -> its values along P_HIGH
    for name, G in itertools.product(ARMS, (4, 5, 8)):
        arm = arm_of(name, G)
        for (relation, low), scale in itertools.product(RELATIONS.items(), SCALES):
            points = [arm.figures(p, low(p), scale) for p in P_HIGH]
            curves = {}
            for figure in points[0]:
                curves[figure] = [float(f"{point[figure]:.4g}") for point in points]
            found[key(name, G, relation, scale)] = curves
    for G, scale in itertools.product((5, 8), SCALES):
        found[map_key(G, scale)] = enumerate_map(G, scale)
    lines = [f"{json.dumps(name)}: {json.dumps(curves)}" for name, curves in found.items()]
    HERE.with_suffix(".json").write_text("{" + ",\n".join(lines) + "}\n")
    draw(found)
    draw_map(found)
    title = "G = 5, p_high = .99, p_low = .01"
    print(f"{title:32} zero-std      variance  gradient  step high  step low    snr")
    for arm in ARMS:
        curves = found[key(arm, 5, "p_low = 1 - p_high", (1, 1))]
        at = {name: curve[-1] for name, curve in curves.items()}
        print(f"{arm:32}{at['zero_std']:12.4f}{at['variance']:10.4f}{at['gradient_high']:10.4f}"
              f"{at['step_high']:11.5f}{at['step_low']:10.5f}{at['snr']:7.3f}")


if __name__ == "__main__":
    main()
