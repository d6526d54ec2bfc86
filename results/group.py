"""Draw group.png, an illustration for the README: made-up rewards, with the project's own advantages.

    python results/group.py

Left: a group after SFT. All rollouts get the same reward, so nothing is learned. Right: a policy with two
modes. Each rollout drew its own reward token, so the rewards of the group differ by construction.
"""
import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from rl_rcgrpo import group_advantages

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Title -> (reward token, reward) of each rollout.
GROUPS = {
    "GRPO after SFT: eight rollouts, one reward": [("none", 0.0)] * 8,
    "RC-GRPO: each rollout draws its own token": [
        ("high", 1.0),
        ("low", 0.0),
        ("high", 1.0),
        ("high", 0.0),
        ("low", 0.0),
        ("low", 0.0),
        ("high", 1.0),
        ("low", 0.0),
    ],
}
COLOURS = {"none": "grey", "high": "tab:blue", "low": "tab:orange"}

figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True, layout="constrained")
for axis, (title, group) in zip(axes, GROUPS.items()):
    rewards = torch.tensor([[reward for _, reward in group]])  # [1, G]
    advantages = group_advantages(rewards)[0].tolist()  # [G]
    axis.bar(range(8), advantages, color=[COLOURS[reward_token] for reward_token, _ in group])
    axis.axhline(0, color="black", linewidth=0.8)
    labels = [f"{reward_token}\nR = {reward:.0f}" for reward_token, reward in group]
    axis.set_xticks(range(8), labels, fontsize=8)
    axis.set_title(title, fontsize=10)
axes[0].set_ylabel("advantage")
axes[0].set_ylim(-1.6, 1.6)
figure.suptitle("Illustration, not data", fontsize=9)
axes[0].text(3.5, 0.4, "all advantages are 0: no gradient", ha="center", fontsize=9)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
