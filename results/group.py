"""What reward tokens do to a group: draws group.png beside this file, with the project's own advantages.

    python results/group.py

Left, a group after SFT: all rollouts get the same reward, nothing is learned. Right, a policy with two modes:
each rollout drew its own token, so the group differs by construction."""
import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from rl_rcgrpo import group_advantages

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GROUPS = {"GRPO after SFT: eight rollouts, one reward": (["none"] * 8, [0., 0., 0., 0., 0., 0., 0., 0.]),
          "RC-GRPO: each rollout draws its own token": (
              ["high", "low", "high", "high", "low", "low", "high", "low"], [1., 0., 1., 0., 0., 0., 1., 0.])}
COLOURS = {"none": "grey", "high": "tab:blue", "low": "tab:orange"}

figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True, layout="constrained")
for axis, (title, (tokens, rewards)) in zip(axes, GROUPS.items()):
    advantages = group_advantages(torch.tensor([rewards]))[0].tolist()  # [G]
    axis.bar(range(8), advantages, color=[COLOURS[token] for token in tokens])
    axis.axhline(0, color="black", linewidth=0.8)
    labels = [f"{token}\nR = {reward:.0f}" for token, reward in zip(tokens, rewards)]
    axis.set_xticks(range(8), labels, fontsize=8)
    axis.set_title(title, fontsize=10)
axes[0].set_ylabel("advantage")
axes[0].set_ylim(-1.6, 1.6)
axes[0].text(3.5, 0.4, "all advantages are 0: no gradient", ha="center", fontsize=9)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
