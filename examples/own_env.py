"""Train on your own environment: an SQLite table that the model queries. Both stages, one update each.

    python examples/own_env.py            # seconds on a CPU

`"tiny"` is a randomly initialised model for tests; a model directory or hub id takes its place. An
environment needs `messages()`, `step(text)` and `verdict()`; its verdict needs `reward(kind)` and attributes
that JSON can hold; a task needs an `id`.
"""
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rl_rcgrpo as rl
import rollout
import sft_rctp as sft
from bfcl_env import StepResult


class Verdict(SimpleNamespace):
    def reward(self, kind):  # kind: the value of --reward
        return float(self.right)


class Stock:
    """The model queries a table in SQL, one query per message; a message without one ends the conversation."""

    def __init__(self, task):
        self.id = task.id
        self.task = task
        self.result = ""
        self.db = sqlite3.connect(":memory:")
        self.db.executescript("create table stock(item, n); insert into stock values ('tea', 7), ('jam', 2)")

    def messages(self):
        return [{"role": "user", "content": f"Answer by SQL on stock(item, n). {self.task.text}"}]

    def step(self, text):
        done = "select" not in text
        if not done:
            try:
                self.result = str(self.db.execute(text).fetchall())
            except sqlite3.Error as error:
                self.result = f"error: {error}"
        return StepResult(results=[] if done else [self.result], next_user=None, done=done, reason="done")

    def verdict(self):
        return Verdict(right=self.task.answer in self.result)


TASKS = [SimpleNamespace(id="tea", text="How many tea?", answer="7"),
         SimpleNamespace(id="jam", text="How many jam?", answer="2")]


def stage1_pair(policy, task):
    """Return a success and a failure: scripted, played in the environment, marked by their reward tokens."""
    right = [f"select n from stock where item = '{task.id}'", "Done."]
    wrong = ["select count(*) from stock where n > 100", "Done."]
    return [sft.play_script(policy, Stock(task), right, "high"),
            sft.play_script(policy, Stock(task), wrong, "low")]


def main():
    flags = "--prompts_per_step 2 --group_size 4 --lr 1e-5 --beta 0 --max_new_tokens 40 --max_len 800"
    args = rl.parse_args(flags.split())
    distributed = sft.init_distributed()
    policy = rollout.load_policy("tiny", torch.float32)  # samples: a full copy of the trained weights
    trained = rollout.load_policy("tiny", torch.float32)
    model, optimizer = sft.shard_model(trained, args, torch.float32, distributed)  # FSDP2, fp32 weights

    # Stage 1: the cross-entropy of the assistant's tokens, successes and failures 1:1.
    trajectories = [t for task in TASKS for t in stage1_pair(policy, task)]
    assert [t.reward for t in trajectories] == [1.0, 0.0, 1.0, 0.0]
    packs = sft.pad_packs(sft.pack(trajectories, device=distributed.device), distributed)
    count = sum(len(p.targets) for p in packs)

    def loss_of(p):
        return -model.token_logprobs(p, policy.banned).sum() / count

    norm, loss = sft.optimizer_step(model, optimizer, packs, loss_of, distributed)
    print(f"stage 1: loss {loss:.3f}, gradient norm {norm:.3f}")
    sft.load_full_weights(policy.model, model)

    # Stage 2: groups of rollouts, each with its own reward token.
    groups, sampled_groups, cursor = rl.sample_groups(policy, TASKS, 0, 1, Stock, args, distributed)
    batch = [t for group in groups for t in group.trajectories]
    packs = sft.pad_packs(sft.pack(batch, device=distributed.device), distributed)
    rl.assign_advantages(packs, groups, args)
    metrics = rl.update_policy(model, optimizer, packs, policy.banned, args, distributed)
    print(f"stage 2: reward {rl.group_metrics(sampled_groups, args.p_high)['reward']}, {metrics}")


if __name__ == "__main__":
    main()
