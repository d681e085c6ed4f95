"""The decoder-only transformer around `attention.py`: config, presets, blocks, KV cache, generation, checkpoints.

Llama's architecture with Llama's names: pre-RMSNorm, rotary positions, SwiGLU. `python model.py --preset base` prints
what a model costs: parameters, FLOPs and cached bytes. Read `attention.py` first and `train.py` next.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pickletools
import re
import shutil
import struct
import sys
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import ATTENTION, MEA, RMSNorm, rope_table
from data.tokenizer import read_json

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

# Shapes; train.py has the training settings that go with each. vocab_size comes from the data set's tokenizer.
PRESETS = {
    "tiny": dict(n_layer=2, n_head=4, n_embd=32, block_size=64),  # tests, seconds
    "small": dict(n_layer=4, n_head=8, n_embd=128, block_size=512),  # a laptop's CPU, minutes
    "base": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, tie_embeddings=True),  # 124M with GPT-2's vocabulary, one GPU
    "1b": dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, intermediate_size=8192, block_size=2048, rope_theta=500000.0),
}  # fmt: skip


LARGEST_JSON = 64 << 20  # bytes; the index of the largest models has a few
LARGEST = 1 << 20  # of any one size in a config: beyond what exists, and a table of so many positions still fits in memory


def check_types(settings):
    """Raise ValueError for a field of a dataclass whose value is not of the type the class declares: settings may come from a file.

    A whole number does for a float; NaN and infinity do not, nor does an integer beyond 64 bits.
    """
    for f in fields(settings):
        value, kinds = getattr(settings, f.name), get_args(f.type) or (f.type,)
        right = type(value) in kinds or type(value) is int and float in kinds
        if not right or type(value) is float and not math.isfinite(value) or type(value) is int and abs(value) >= 2**63:
            wanted = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
            shown = f"{value!r:.60}" if isinstance(value, (float, str)) else f"an integer of {value.bit_length()} bits" if right else type(value).__name__
            raise ValueError(f"{f.name} must be {wanted}, not {shown}")


@dataclass
class GPTConfig:
    """A model's shape. Raises ValueError, naming the field and what would do, for a shape that cannot be built."""

    vocab_size: int
    block_size: int = 256  # positions the model is trained on
    n_layer: int = 4
    n_head: int = 8
    n_kv_head: int | list | None = None  # cached heads; None: n_head; a list: one [keys, values] pair per layer
    n_embd: int = 128
    head_dim: int | None = None  # None: n_embd / n_head
    intermediate_size: int | None = None  # None: 8/3 n_embd rounded up to a multiple of 32
    attention: str = "mea"
    head_norm: bool | None = None  # None: the variant's own, on for dfa and mea
    qk_norm: bool = False  # RMSNorm on query and key heads before RoPE, as in Qwen3; mha and mea
    mea_form: str = "auto"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # slower frequencies for long contexts, e.g. Llama 3.2's: see attention.scale_frequency
    norm_eps: float = 1e-6
    dropout: float = 0.0
    attention_bias: bool = False  # on q, k and v, as in Qwen2
    tie_embeddings: bool = False
    embedding_multiplier: float | None = None  # scales embeddings as they enter; None: 1 as in Llama, or, if tied, sqrt(n_embd)

    def __post_init__(self):
        check_types(self)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "head_dim", "intermediate_size"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} must be a positive whole number of at most {LARGEST}, not {getattr(self, name)}")
        for name in ("rope_theta", "norm_eps", "embedding_multiplier"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, not {self.attention!r}")
        if self.mea_form not in ("auto", "compose", "fold", "absorb"):
            raise ValueError(f"mea_form must be auto, compose, fold or absorb, not {self.mea_form!r}")
        if self.qk_norm and self.attention not in ("mha", "mea"):
            raise ValueError(f"qk_norm is implemented for mha and mea, not for {self.attention}: leave it out")
        if self.qk_norm and self.mea_form == "fold":
            raise ValueError("qk_norm stands between MEA's projections and compositions, so mea_form cannot be fold: use auto")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.head_norm is None:
            self.head_norm = self.attention in ("dfa", "mea")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one of them")
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f"a head is {self.head_dim} wide, and RoPE needs an even width: change n_embd or n_head")
        rope_table(1, self.head_dim, self.rope_theta, self.rope_scaling)  # refuses a scaling that it does not know
        if self.intermediate_size is None:
            self.intermediate_size = 32 * math.ceil(8 * self.n_embd / 3 / 32)
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.embedding_multiplier is None:
            self.embedding_multiplier = math.sqrt(self.n_embd) if self.tie_embeddings else 1.0
        if isinstance(self.n_kv_head, list):
            if len(self.n_kv_head) != self.n_layer:
                raise ValueError(f"n_kv_head lists {len(self.n_kv_head)} layers and the model has {self.n_layer}")
            for pair in self.n_kv_head:
                counts = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (pair, pair)
                if not all(type(count) is int for count in counts):
                    raise ValueError("n_kv_head must list a [keys, values] pair of whole numbers for every layer")
        for layer in range(self.n_layer if isinstance(self.n_kv_head, list) else 1):
            n_k, n_v = self.kv_heads(layer)
            if not (1 <= n_k <= self.n_head and 1 <= n_v <= self.n_head):
                raise ValueError(f"n_kv_head must be between 1 and n_head {self.n_head}, not {n_k if n_k == n_v else (n_k, n_v)}")
            if self.attention != "mea" and (n_k != n_v or self.n_head % n_k):
                raise ValueError(f"n_kv_head {n_k if n_k == n_v else (n_k, n_v)} must divide n_head {self.n_head} for {self.attention} (mea takes any)")
            if self.attention == "dfa" and (self.n_head % 2 or n_k % 2):
                raise ValueError(f"dfa pairs its heads: n_head {self.n_head} and n_kv_head {n_k} must be even")

    def kv_heads(self, layer):
        """(key heads, value heads) that a layer projects and caches."""
        n = self.n_kv_head[layer] if isinstance(self.n_kv_head, list) else self.n_kv_head
        return tuple(n) if isinstance(n, (list, tuple)) else (n, n)

    def kv_bytes_per_token(self, dtype=torch.float32):
        """Bytes that one position of one sequence takes in a `KVCache`."""
        return sum(sum(self.kv_heads(layer)) for layer in range(self.n_layer)) * self.head_dim * dtype.itemsize

    def flops_per_token(self, T=None):
        """Forward and backward FLOPs of one training token at sequence length T: 6 per matrix weight, and attention.

        A query sees T/2 keys on average and pays 2D for a score and 2D for its value: 6 T H D with the backward.
        """
        heads = self.n_head * self.head_dim
        weights = self.vocab_size * self.n_embd  # the output head; looking an embedding up costs nothing
        for layer in range(self.n_layer):
            weights += self.n_embd * (2 * heads + sum(self.kv_heads(layer)) * self.head_dim + 3 * self.intermediate_size)
        return 6 * weights + 6 * (T or self.block_size) * heads * self.n_layer


# ---------------------------------------------------------------------------------------------------------------------
# The model


class MLP(nn.Module):
    """SwiGLU (2002.05202): W_down(silu(W_gate x) * W_up x)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = ATTENTION[config.attention](config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, rope, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class LayerCache:
    """One layer's share of a `KVCache`: what `attention.py` sees of it."""

    def __init__(self, cache, k, v):
        self.cache, self.k, self.v = cache, k, v
        self.folded = None  # MEA keeps its folded projections here: they are valid as long as the entries made with them

    def append(self, k, v):
        """Write k (B, T, n_k, D), v (B, T, n_v, D) behind each row's entries; return all so far and `positions`.

        Returns (B, S, n_k, D), (B, S, n_v, D), positions: (B, T) where rows differ in length, otherwise None.
        """
        lengths, T = self.cache.lengths, k.size(1)
        S = max(lengths) + T
        if min(lengths) == max(lengths):
            positions = None
            self.k[:, S - T : S], self.v[:, S - T : S] = k, v
        else:
            positions = self.cache.positions(T)
            rows = torch.arange(len(lengths), device=k.device)[:, None]
            self.k[rows, positions], self.v[rows, positions] = k.to(self.k.dtype), v.to(self.v.dtype)
        return self.k[:, :S].to(k.dtype), self.v[:, :S].to(v.dtype), positions


class KVCache:
    """Keys (after RoPE) and values of the heads that a model caches, allocated once: exactly `nbytes`.

    Layer l holds (B, max_length, n_k, D) keys and (B, max_length, n_v, D) values, with `config.kv_heads(l)` = n_k, n_v: for
    MEA the component heads. `lengths` has the number of valid positions of each row.
    """

    def __init__(self, config, batch_size, max_length, dtype=torch.float32, device="cpu"):
        self.max_length, self.device = max_length, device
        self.layers = []
        for layer in range(config.n_layer):
            n_k, n_v = config.kv_heads(layer)
            k, v = (torch.zeros(batch_size, max_length, n, config.head_dim, dtype=dtype, device=device) for n in (n_k, n_v))
            self.layers.append(LayerCache(self, k, v))
        self.reset(batch_size)

    def reset(self, batch_size=None):
        self.lengths = [0] * (batch_size or len(self.lengths))

    def positions(self, T):
        """(B, T): where the next T positions of each row stand."""
        return torch.tensor(self.lengths, device=self.device)[:, None] + torch.arange(T, device=self.device)

    @property
    def nbytes(self):
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each block in the backward instead of keeping what it computed
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.make_rope()
        self.init_weights()

    def make_rope(self, device=None):
        """The rotary tables of all positions, (block_size, 1, D) each: they follow from the config, so no checkpoint holds them."""
        c = self.config
        for name, table in zip(("rope_cos", "rope_sin"), rope_table(c.block_size, c.head_dim, c.rope_theta, c.rope_scaling)):
            self.register_buffer(name, table.to(device), persistent=False)

    def init_weights(self):
        """One rule for every variant: matrices N(0, 1 / fan-in), and embeddings that enter the residual stream unit-sized.

        A head norm makes attention's output unit-sized from the first step. Beside the usual embeddings of size 0.02 that
        output is most of what the residual stream holds, AdamW makes it larger faster than the embeddings can grow, and
        the token is drowned: with such embeddings the normed small models ended 0.4 nats behind the plain one after
        1M tokens, with unit-sized ones 0.01, and the plain one loses little. (Zeroing o_proj does not help: its first
        steps undo it.) An embedding that is also the output head has to be small, so that the logits are: it is scaled.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if name.endswith(("o_proj", "down_proj")):  # 2 n_layer such terms add up in the residual stream (GPT-2)
                with torch.no_grad():
                    module.weight.div_(math.sqrt(2 * self.config.n_layer))
        nn.init.normal_(self.lm_head.weight, std=0.02)  # the first prediction is near uniform
        nn.init.normal_(self.embed_tokens.weight, std=1 / self.config.embedding_multiplier)

    def embed(self, tokens):
        """(B, T) token ids -> (B, T, C), as the first block sees them."""
        x = self.embed_tokens(tokens)
        return x if self.config.embedding_multiplier == 1 else x * self.config.embedding_multiplier

    def hidden(self, tokens, cache=None, lengths=None):
        """(B, T) token ids -> (B, T, C), normed and ready for the output head.

        With a `cache` the tokens follow what it holds. `lengths` (list of B) says how many of a right-padded row's tokens
        are real: the rest is never attended to and will be overwritten.
        """
        B, T = tokens.shape
        past = max(cache.lengths) if cache is not None else 0
        limit = self.config.block_size if cache is None else min(self.config.block_size, cache.max_length)
        if past + T > limit:
            raise ValueError(f"{past + T} positions do not fit: the {'model' if cache is None else 'cache'} holds {limit}")
        if past == 0 or min(cache.lengths) == past:
            rope = self.rope_cos[past : past + T], self.rope_sin[past : past + T]  # (T, 1, D)
        else:
            positions = cache.positions(T)
            rope = self.rope_cos[positions], self.rope_sin[positions]  # (B, T, 1, D)
        x = self.embed(tokens)
        for i, block in enumerate(self.layers):
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.lengths = [old + new for old, new in zip(cache.lengths, lengths or [T] * B)]
        return self.norm(x)

    def forward(self, tokens, targets=None, cache=None):
        """tokens (B, T) -> (logits (B, T, V), None), or with targets (B, T) -> (None, mean cross-entropy in nats per token).

        With targets there are no logits to return: where PyTorch can, it never holds them whole (see `token_loss`).
        """
        x = self.hidden(tokens, cache)
        if targets is None:
            return self.lm_head(x), None
        return None, token_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, seed=None, stop_tokens=(),
                 use_cache=True, on_token=None):  # fmt: skip
        """Continue prompts (lists of ids, of any lengths from 1) by up to max_new_tokens: a list of the new ids for each.

        temperature 0 takes the likeliest token; otherwise one is drawn, after keeping the `top_k` likeliest and then the
        fewest whose probabilities reach `top_p`. A row ends with a stop token, which is not returned. `on_token(row, id)`
        is called as each id is chosen. When a row outgrows the block size the older half of its context is dropped, with
        or without the cache, so both give the same tokens. The model should be in eval mode. Raises ValueError.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt needs at least one token: start an empty one with the end-of-text token")
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        device, limit = self.embed_tokens.weight.device, self.config.block_size
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        contexts = [list(prompt)[-limit:] for prompt in prompts]
        new, running = [[] for _ in prompts], [max_new_tokens > 0] * len(prompts)
        cache, fresh = None, True
        if use_cache:
            length = min(limit, max(map(len, contexts)) + max_new_tokens)
            cache = KVCache(self.config, len(prompts), length, self.embed_tokens.weight.dtype, device)
        while any(running):
            if cache is None or fresh:  # read the whole contexts, right-padded: causality hides the padding from what is real
                lengths = [len(context) for context in contexts]
                rows = [context + [0] * (max(lengths) - len(context)) for context in contexts]
            else:
                lengths, rows = [1] * len(prompts), [context[-1:] for context in contexts]
            if cache is not None and fresh:
                cache.reset()
            x = self.hidden(torch.tensor(rows, device=device), cache, lengths)
            if min(lengths) == max(lengths):
                x = x[:, -1]
            else:
                x = x[torch.arange(len(rows), device=device), torch.tensor(lengths, device=device) - 1]
            logits = self.lm_head(x).float()  # (B, V)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its weights are damaged, or training had diverged")
            tokens = sample_token(logits, temperature, top_k, top_p, generator).tolist()
            fresh = False
            for row, token in enumerate(tokens):
                if len(contexts[row]) == limit:  # the cached positions of what stays would change: read it anew
                    contexts[row], fresh = contexts[row][-(limit // 2) :], True
                contexts[row].append(token)
                if running[row] and token not in stop_tokens:
                    new[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
                running[row] = running[row] and token not in stop_tokens and len(new[row]) < max_new_tokens
        return new

    def parameter_groups(self, weight_decay):
        """AdamW's two groups. Matrices of linear layers and embeddings decay; vectors, norms, lambdas and compositions do
        not: decay would pull `compose_*` away from the identity it starts at."""
        decayed = {id(m.weight) for m in self.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        parameters = list(self.parameters())
        return [
            dict(params=[p for p in parameters if id(p) in decayed], weight_decay=weight_decay),
            dict(params=[p for p in parameters if id(p) not in decayed], weight_decay=0.0),
        ]

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", block_size=None):
        """The model, in eval mode, of a Hugging Face folder: config.json and safetensors of Llama, Mistral, Qwen2 or Qwen3.

        It is an MHA with the folder's key/value heads. `block_size` caps its positions, and so does a sliding window: up to
        the window's length every position sees all those before it, as here. Weights are converted to `dtype` one tensor at a
        time, so memory is the model and one tensor. Raises FileNotFoundError or ValueError; nothing is unpickled.
        """
        config = pretrained_config(folder, block_size)
        with torch.device("meta"):  # names and shapes, without memory
            model = cls(config)
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        model.load_state_dict(pretrained_weights(folder, shapes, config.tie_embeddings, dtype, device), assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        model.make_rope(device)
        return model.eval()

    @torch.no_grad()
    def to_pretrained(self, folder, tokenizer=None):
        """Write the model as a Hugging Face folder (config.json, model.safetensors) that `transformers` loads to equal logits.

        It becomes a Llama, with biases on q, k and v a Qwen2, with QK-norm a Qwen3. Those have no head norm, Talking-Heads or
        differential attention and no compositions, so only MHA and an MEA that folds into it can be written. `tokenizer`, one
        made by data.tokenizer from a Hugging Face folder, goes along. The folder appears when it is complete. Raises
        ValueError, FileExistsError for a folder that exists, or OSError.
        """
        content = exported_config(self, tokenizer)
        weights = self.state_dict()
        for i, block in enumerate(self.layers):
            if isinstance(block.self_attn, MEA):
                prefix = f"layers.{i}.self_attn."
                weights = {name: w for name, w in weights.items() if not name.startswith(prefix)}
                weights.update({prefix + name: w for name, w in block.self_attn.fold().state_dict().items()})
        if self.config.embedding_multiplier != 1:
            weights["embed_tokens.weight"] = weights["embed_tokens.weight"] * self.config.embedding_multiplier
        if content["tie_word_embeddings"]:
            del weights["lm_head.weight"]
        write_pretrained(folder, content, {pretrained_name(name): w.contiguous() for name, w in weights.items()}, tokenizer)


def token_loss(x, weight, targets):
    """Mean cross-entropy, in nats, of logits x @ weight^T: x (N, C), weight (V, C), targets (N)."""
    # torch 2.13 can compute the N x V logits in pieces; in bfloat16 it would round the loss, compiled it would break the graph
    pieces = hasattr(F, "linear_cross_entropy") and not torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling()
    if pieces:
        return F.linear_cross_entropy(x, weight, targets, options=nn.LinearCrossEntropyOptions())
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def check_sampling(max_new_tokens, temperature, top_k, top_p):
    """Raise ValueError for sampling settings that make no sense."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """(B, V) logits -> (B) ids: see `GPT.generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = torch.sort(logits / temperature, dim=-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    probabilities = logits.softmax(-1)
    if top_p is not None:  # the token that crosses top_p stays, so at least one does
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a dict of tensors, numbers, strings, lists and dicts, so that it can be read without unpickling code

FORMAT = "nanomea-2"  # "nanomea-1" is the same without a checksum, and still read
# torch.save writes a zip archive, and torch.load checks none of its CRCs. So the archive's comment, which readers skip, is the
# SHA-256 of everything before it: one file, which cannot be torn from its checksum by a kill, and can be copied by itself.
CHECKSUM = b"sha256:"
# What a checkpoint's pickle may name. torch.load(weights_only=True) would also call bytearray(10**12).
PLAIN = re.compile(r"torch (\w+Storage|Size|bool|b?float\d+|u?int\d+)|collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)")


def save_checkpoint(folder, state):
    """Write `state` as folder/checkpoint.pt and keep the one before as checkpoint.prev.pt. Raises OSError.

    Written beside, flushed to the disk, then renamed: a kill or a full disk at any moment leaves a whole checkpoint, between
    the two renames as checkpoint.prev.pt.
    """
    folder = Path(folder)
    new, current = folder / "checkpoint.tmp", folder / "checkpoint.pt"
    try:
        with open(new, "w+b") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.seek(-2, os.SEEK_END)  # an archive ends in the length of its comment: torch writes 0
            file.write(struct.pack("<H", len(CHECKSUM) + 64))
            file.write(CHECKSUM + sha256(file, file.tell()).encode())
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its own
        new.unlink(missing_ok=True)
        kept = f"{current} is still the one from before" if current.exists() else "there is no earlier one"
        reason = error.strerror if isinstance(error, OSError) else "the disk is full or the file could not be written"
        raise OSError(f"could not save a checkpoint in {folder} ({reason}); {kept}") from error
    if current.exists():
        os.replace(current, folder / "checkpoint.prev.pt")
    os.replace(new, current)
    if os.name == "posix":  # the renames themselves must survive a power cut
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def sha256(file, length):
    """Hexadecimal SHA-256 of the first `length` bytes of an open file, which is left there."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()


def find_checkpoint(path):
    """The file that `path` means: itself, the newest in a run folder, a Hugging Face folder's config.json. Raises FileNotFoundError."""
    path = Path(path)
    candidates = [path] if path.is_file() else [path / "checkpoint.pt", path / "checkpoint.prev.pt"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    config = path / "config.json"  # a run folder has one too, but without a model_type
    if config.is_file() and "model_type" in read_json(config, LARGEST_JSON):
        return config
    raise FileNotFoundError(f"no checkpoint at {path}: give a run folder that train.py made, a checkpoint.pt in it, or a Hugging Face folder")


def checksum_matches(file):
    """Whether an open checkpoint file has the SHA-256 that it carries; None if it carries none."""
    start = max(0, file.seek(0, os.SEEK_END) - len(CHECKSUM) - 64)
    file.seek(start)
    comment = file.read()
    return comment == CHECKSUM + sha256(file, start).encode() if comment.startswith(CHECKSUM) else None


def archive_problem(file):
    """Why torch.load should not see an open file, or None: it must be an archive that is no larger unpacked, of tensors alone."""
    if not zipfile.is_zipfile(file):
        return "is damaged or not a checkpoint: it is no archive of tensors (pickled code is never run)"
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
            return "is damaged or not a checkpoint: unpacked it would be larger than it is"
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                names = [name for code, name, _ in pickletools.genops(archive.read(entry)) if "GLOBAL" in code.name or code.name == "INST"]
                if not all(name and PLAIN.fullmatch(name) for name in names):
                    return "holds more than weights (pickled code is never run)"
    return None


def check_weights(config, weights, size):
    """Raise ValueError unless `weights` are a model of this config, and no larger than a file of `size` bytes can hold.

    Nothing is allocated to find out, so a config from anywhere may be tried.
    """
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) and w.is_floating_point() for w in weights.values()):
        raise ValueError("its weights are not tensors of floating-point numbers by name")
    layers = len({str(name).split(".")[1] for name in weights if str(name).startswith("layers.")})
    if layers != config.n_layer:
        raise ValueError(f"n_layer is {config.n_layer} and there are weights of {layers}")
    with torch.device("meta"):
        model = GPT(config)
    expected = model.state_dict()
    if different := sorted(str(name) for name in expected.keys() ^ weights.keys()):
        raise ValueError(f"{different[0][:80]!r} is {'missing' if different[0] in expected else 'not a weight of its config'}")
    for name, w in weights.items():
        if w.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(w.shape)} where its config says {tuple(expected[name].shape)}")
    if model.n_params() > size:  # shapes alone cost nothing: a few bytes can be expanded to any shape
        raise ValueError(f"{model.n_params()} parameters do not fit in {size} bytes")


def load_checkpoint(path, device="cpu"):
    """(model in eval mode, state) from a run folder, a checkpoint file or a Hugging Face folder.

    Nothing in the file is executed: it is read with weights_only=True, and its checksum, config and weights are checked
    before a model is made. The state of a Hugging Face folder (see `GPT.from_pretrained`) has `model` and `config` only. Raises
    FileNotFoundError, OSError or ValueError.
    """
    path = find_checkpoint(path)
    if path.name == "config.json":
        model = GPT.from_pretrained(path.parent, device=device)
        return model, dict(model=model.state_dict(), config=asdict(model.config))
    previous = path.with_name("checkpoint.prev.pt")
    hint = f"; the one before it is {previous}: to go on from there, move {path.name} away" if previous.is_file() and previous != path else ""
    with open(path, "rb") as file:
        sound = checksum_matches(file)
        if sound is False:
            raise ValueError(f"{path} is damaged: its bytes do not match its checksum{hint}")
        try:
            problem = archive_problem(file)
            file.seek(0)
            state = None if problem else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zipfile, pickletools and torch raise anything for a file that is none of theirs
            raise ValueError(f"{path} is damaged or not a checkpoint{hint}") from error
    if problem:
        raise ValueError(f"{path} {problem}{hint}")
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, "nanomea-1"):
        raise ValueError(f"{path} is not a checkpoint of this project (format {FORMAT!r} is missing)")
    if state["format"] == FORMAT and not sound:
        raise ValueError(f"{path} is damaged: the checksum at its end is missing{hint}")
    try:
        config = GPTConfig(**state["config"])
        check_weights(config, state.get("model"), path.stat().st_size)
    except (KeyError, TypeError, ValueError) as error:  # no config, or one with fields that there are not
        raise ValueError(f"{path} does not hold a whole model: {' '.join(str(error).split())[:300]}") from error
    model = GPT(config)
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders: the names of the parameters are Llama's already, so these are about config.json and its many ways

FAMILY = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
WHOLE_NUMBERS = dict(
    vocab_size="vocab_size", max_position_embeddings="block_size", num_hidden_layers="n_layer", num_attention_heads="n_head",
    num_key_value_heads="n_kv_head", hidden_size="n_embd", head_dim="head_dim", intermediate_size="intermediate_size",
)  # fmt: skip


def pretrained_name(name):
    return name if name.startswith("lm_head.") else f"model.{name}"


def pretrained_config(folder, block_size=None):
    """The `GPTConfig` of a Hugging Face folder. Raises FileNotFoundError, or ValueError for what this model does not compute."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a Hugging Face folder with config.json and model.safetensors")
    theirs = read_json(path, LARGEST_JSON)
    kind = theirs.get("model_type")
    if kind not in [*FAMILY]:
        raise ValueError(f"{path}: model_type {kind!r} is not supported; {', '.join(FAMILY)} are")
    for name, only in (("hidden_act", "silu"), ("mlp_bias", False), ("quantization_config", None), ("partial_rotary_factor", 1)):
        if theirs.get(name) not in (None, only):
            raise ValueError(f"{path}: {name} {theirs[name]!r} is not supported, only {only!r}")
    if theirs.get("attention_bias"):
        raise ValueError(f"{path}: attention_bias puts a bias on o_proj, which is not supported")
    shape = {}
    for name, ours in WHOLE_NUMBERS.items():
        value = shape[ours] = theirs.get(name)
        may_lack = value is None and name in ("num_key_value_heads", "head_dim")
        if not may_lack and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{path}: {name} must be a positive whole number, not {value!r}")
    # transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling must be an object, not {rope!r}")
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": theirs.get("rope_theta") or 10000.0, **rope}
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{path}: partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported, only 1")
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", shape["block_size"])
    theta, eps = rope.pop("rope_theta"), theirs.get("rms_norm_eps", 1e-6)
    for name, value in (("rope_theta", theta), ("rms_norm_eps", eps)):
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{path}: {name} must be a positive number, not {value!r}")
    window = theirs.get("sliding_window", 4096) if kind == "mistral" or theirs.get("use_sliding_window") else None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{path}: sliding_window must be a positive whole number, not {window!r}")
    shape["block_size"] = min(limit for limit in (shape["block_size"], window, block_size) if limit is not None)
    try:
        return GPTConfig(
            **shape, attention="mha", qk_norm=kind == "qwen3", attention_bias=kind == "qwen2", rope_theta=float(theta), norm_eps=float(eps),
            rope_scaling=None if rope["rope_type"] == "default" else rope, tie_embeddings=bool(theirs.get("tie_word_embeddings")), embedding_multiplier=1.0,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def safetensors_files(folder):
    """The files with a folder's weights. Raises FileNotFoundError or ValueError."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        if list(folder.glob("*.bin")) + list(folder.glob("*.pth")) + list(folder.glob("*.pt")):
            raise FileNotFoundError(f"{folder} has pickled weights only, and nothing is unpickled here: convert them to model.safetensors")
        raise FileNotFoundError(f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json")
    names = read_json(index, LARGEST_JSON).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files")
    names = sorted(set(names.values()))
    for name in names:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is not a safetensors file in the folder itself")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its index names: the download is not complete")
    return [folder / name for name in names]


def pretrained_weights(folder, shapes, tied, dtype, device):
    """{our name: weight} for every name in `shapes`, copied from a folder's safetensors. Raises ValueError for anything missing or odd."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("weights from a Hugging Face folder need safetensors: pip install safetensors") from None
    def read(name):
        with safe_open(found[name][0], framework="pt") as opened:  # opened anew for each: a mapped file counts as memory until it is closed
            return opened.get_tensor(name)

    found = {}  # their name -> file, shape, dtype
    for file in safetensors_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    slices = opened.get_slice(name)
                    found[name] = file, tuple(slices.get_shape()), slices.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None
    names = {pretrained_name(name): name for name in shapes}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    both = sorted(names.keys() & found.keys())
    wrong = {
        "missing": [name for name in names if name not in found and not (tied and name == head)],
        "unknown": [name for name in found if name not in names and not name.endswith("rotary_emb.inv_freq")],  # a table in old files
        "of another shape": [f"{name} {found[name][1]} instead of {shapes[names[name]]}" for name in both if found[name][1] != shapes[names[name]]],
        "not floating-point": [f"{name} {found[name][2]}" for name in both if found[name][2] not in ("F64", "F32", "F16", "BF16")],
    }
    if any(wrong.values()):
        lists = [f"{len(group)} {what}: {', '.join(group[:3])}{', ...' if len(group) > 3 else ''}" for what, group in wrong.items() if group]
        raise ValueError(f"the tensors in {folder} do not fit its config.json; {'; '.join(lists)}")
    if tied and head in found and not torch.equal(read(head), read(embedding)):
        raise ValueError(f"{folder} ties its output head to the embedding and stores another one: set tie_word_embeddings to false in config.json")
    weights = {}
    for theirs, ours in names.items():
        if tied and theirs == head:
            weights[ours] = weights[names[embedding]]
        else:  # copied: the file may change or go once this returns
            weights[ours] = read(theirs).to(device=device, dtype=dtype, copy=True)
    return weights


def exported_config(model, tokenizer=None):
    """The config.json that `GPT.to_pretrained` writes. Raises ValueError for a model that the Llama family has no way to say."""
    c = model.config
    heads = {c.kv_heads(layer) for layer in range(c.n_layer)}
    n_k, n_v = min(heads)
    if c.attention not in ("mha", "mea"):
        raise ValueError(f"{c.attention} cannot be exported: transformers has no Llama with that attention, only with mha")
    if c.head_norm:
        raise ValueError("a model with a head norm cannot be exported: transformers has no Llama with one (it does not fold into o_proj)")
    if c.attention == "mea" and (heads != {(c.n_head, c.n_head)} or c.qk_norm):
        why = "QK-norm stands between projections and compositions" if c.qk_norm else "it has fewer component heads than heads"
        raise ValueError(f"this mea model does not fold into mha, so it cannot be exported: {why}")
    if len(heads) > 1:
        raise ValueError("layers with different numbers of key/value heads cannot be exported: transformers has one number for all")
    if c.qk_norm and c.attention_bias:
        raise ValueError("qk_norm together with attention_bias cannot be exported: Qwen3 has the first, Qwen2 the second")
    if c.n_embd % c.n_head:
        raise ValueError(f"n_embd {c.n_embd} is not divisible by n_head {c.n_head}: transformers refuses such a config")
    if tokenizer is not None and not hasattr(tokenizer, "content"):
        raise ValueError(f"tokenizer {tokenizer.name} has no Hugging Face form: leave it out")
    kind = "qwen3" if c.qk_norm else "qwen2" if c.attention_bias else "llama"
    eos = None if tokenizer is None else tokenizer.end_of_text
    return dict(
        model_type=kind, architectures=[FAMILY[kind]], **{name: getattr(c, ours) for name, ours in WHOLE_NUMBERS.items()} | {"num_key_value_heads": n_k},
        hidden_act="silu", rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, rope_scaling=c.rope_scaling,
        tie_word_embeddings=c.tie_embeddings and c.embedding_multiplier == 1, torch_dtype=str(model.lm_head.weight.dtype)[6:],
        bos_token_id=None, eos_token_id=eos, pad_token_id=None,
    )  # fmt: skip


def write_pretrained(folder, config, weights, tokenizer=None):
    """Write a folder beside its place and rename it when complete. Raises ValueError, FileExistsError or OSError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("exporting needs safetensors: pip install safetensors") from None
    objects = {"config.json": config}
    if tokenizer is not None:
        end = tokenizer.decode([tokenizer.end_of_text])
        objects |= {"tokenizer.json": tokenizer.content, "tokenizer_config.json": dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=end)}
    with new_folder(folder) as new:
        try:
            save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        for name, content in objects.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(new / "config.json", new / "model.safetensors")  # safetensors lets nobody else read its files


@contextlib.contextmanager
def new_folder(folder, overwrite=False):
    """A folder to write into, which becomes `folder` when all has been written, flushed to the disk, and nothing went wrong.

    Raises FileExistsError if there is something at its place and `overwrite` is False, or OSError.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]) and not overwrite:
        raise FileExistsError(f"{folder} exists already: give a new folder, or remove it first")
    new, old = (folder.with_name(f".{folder.name}.{which}-{os.getpid()}") for which in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError as error:
        raise OSError(f"could not write {folder} ({error.strerror or error}); nothing of it is left") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command line, for every program here: the options are the fields of one dataclass


def option(default, help, choices=None):
    """A dataclass field that `parse_options` turns into --name."""
    return field(default=default, metadata=dict(help=help, choices=choices))


def parse_options(cls, argv=None, presets=None):
    """An instance of dataclass `cls` from the command line, and the set of names that were given there.

    A preset (--preset, looked up in `presets`) changes defaults; what is given beside it wins. Anything wrong ends the program
    with one line and exit code 2.
    """
    program = sys.modules[cls.__module__]
    parser = OneLineParser(description=program.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(cls):
        kind = next(k for k in (bool, int, float, str) if k.__name__ in str(f.type))
        default = "" if f.default in (None, "") else f" (default {f.default})"
        extra = dict(nargs="?", const=True, type=yes_or_no, metavar="yes|no") if kind is bool else dict(type=kind, choices=f.metadata["choices"])
        if kind is not bool and not f.metadata["choices"]:
            extra["metavar"] = kind.__name__
        parser.add_argument("--" + f.name, default=argparse.SUPPRESS, help=f.metadata["help"].replace("%", "%%") + default, **extra)
    given = vars(parser.parse_args(argv))
    chosen = {}
    if presets:
        chosen = presets[given.get("preset") or next(f.default for f in fields(cls) if f.name == "preset")]
    return cls(**{**chosen, **given}), set(given)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the options)")


def yes_or_no(text):
    if text.lower() in ("yes", "true", "1", "on"):
        return True
    if text.lower() in ("no", "false", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")


def fail(message):
    """End the program: one line on standard error, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Options:
    preset: str = option("small", "shape of the model", list(PRESETS))
    attention: str = option("mea", "attention of every layer", list(ATTENTION))
    head_norm: bool | None = option(None, "RMS norm on each head's output (default: on for dfa and mea)")
    n_layer: int | None = option(None, "layers")
    n_head: int | None = option(None, "attention heads")
    n_kv_head: int | None = option(None, "cached key/value heads")
    n_embd: int | None = option(None, "width of the model")
    block_size: int | None = option(None, "positions in a training window")
    vocab_size: int = option(50257, "tokens in the vocabulary")


def main(argv=None):
    options, _ = parse_options(Options, argv)
    shape = {name: value for name, value in vars(options).items() if name != "preset" and value is not None}
    try:
        config = GPTConfig(**{**PRESETS[options.preset], **shape})
    except ValueError as error:
        fail(error)
    with torch.device("meta"):  # shapes without memory: the largest preset is 1.5 billion parameters
        model = GPT(config)
    embeddings = model.embed_tokens.weight.numel() * (1 if config.tie_embeddings else 2)
    print(f"preset {options.preset}, {config.attention}, {config.n_layer} layers, {config.n_head} heads of {config.head_dim}, width {config.n_embd}")
    print(f"  parameters                 {model.n_params():>16,}   of which embeddings and head {embeddings:,}")
    print(f"  FLOPs per training token   {config.flops_per_token():>16,}   forward and backward, at {config.block_size} positions")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        per_token = config.kv_bytes_per_token(dtype)
        print(f"  cached bytes per token     {per_token:>16,}   {name}; {per_token * config.block_size / 2**20:,.1f} MiB for {config.block_size} positions")


if __name__ == "__main__":
    main()
