"""The decoder-only transformer around `attention.py`: config, presets, blocks, KV cache, generation.

Llama's architecture with Llama's names: pre-RMSNorm, rotary positions, SwiGLU. `python model.py --preset base` prints
what a model costs: parameters, FLOPs and cached bytes. Read `attention.py` first, `checkpoint.py` or `train.py` next.
"""

from options import check_options, fail, option, parse_options, run_program  # first: it sets how torch's threads wait

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import ATTENTION, RMSNorm, rope_table
from functional import linear_cross_entropy

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

# Shapes; train.py has the training settings that go with each. vocab_size comes from the data set's tokenizer.
PRESETS = {
    "tiny": dict(n_layer=2, n_head=4, n_embd=32, block_size=64),  # tests, seconds
    "small": dict(n_layer=4, n_head=8, n_embd=128, block_size=512),  # a laptop's CPU, minutes
    "base": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, tie_embeddings=True),  # 124M, one GPU
    "1b": dict(  # LLaMA-3.2-1B
        n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, intermediate_size=8192, block_size=2048, rope_theta=500000.0
    ),
}


@dataclass
class GPTConfig:
    """A model's shape; each field is an option of train.py and model.py.

    Raises ValueError, naming the field and what would do, for a shape that cannot be built.
    """

    vocab_size: int
    block_size: int = option(256, "positions in a training window", least=1)
    n_layer: int = option(4, "layers", least=1)
    n_head: int = option(8, "attention heads", least=1)
    # A list: one [keys, values] pair per layer, as compress.py makes them.
    n_kv_head: int | list | None = option(None, "key/value heads, projected and cached (default: n_head)", least=1)
    n_embd: int = option(128, "width of the model", least=1)
    head_dim: int | None = option(None, "width of a head (default: n_embd / n_head)", least=1)
    intermediate_size: int | None = option(None, "width of the MLP (default: 8/3 of n_embd, rounded up to 32)", least=1)
    attention: str = option("mea", "attention of every layer", ATTENTION)
    head_norm: bool | None = option(None, "RMS norm on each head's output (default: on for dfa and mea)")
    latent_heads: int | None = option(None, "heads that --attention latent rebuilds (default: n_head)", least=1)
    qk_norm: bool = option(False, "RMS norm on query and key heads before RoPE, as in Qwen3")
    compose: str = option("full", "MEA's compositions: full, or one number per head", ["full", "diagonal"])
    mea_form: str = option("auto", "where MEA applies its composition", ["auto", "compose", "fold", "absorb"])
    rope_theta: float = option(10000.0, "base of the rotary frequencies", above=0)
    rope_frequencies: list | None = None  # D/2 radians per position instead, as a loaded model turns by
    norm_eps: float = option(1e-6, "added to the mean square in every norm", above=0)
    dropout: float = option(0.0, "on attention weights and on what each sublayer adds", least=0, below=1)
    attention_bias: bool = option(False, "a bias on queries, keys and values, as in Qwen2")
    tie_embeddings: bool = option(False, "one matrix for the embedding and the output head")
    embedding_multiplier: float | None = option(None, "of embeddings (default: 1, tied sqrt(n_embd))", above=0)

    def __post_init__(self):
        check_options(self)
        variant = ATTENTION[self.attention]
        if self.qk_norm and self.mea_form == "fold":
            raise ValueError("qk_norm stands between MEA's projections and compositions: mea_form cannot be fold")
        if self.compose != "full" and not hasattr(variant, "compositions"):
            raise ValueError(f"compose {self.compose} is for mea: {self.attention} composes no heads")
        if self.latent_heads and self.attention != "latent":
            raise ValueError(f"latent_heads is for --attention latent, not for {self.attention}")
        if self.latent_heads and self.n_head % self.latent_heads:
            raise ValueError(f"latent_heads {self.latent_heads} must divide n_head {self.n_head}")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one of them")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f"a head is {self.head_dim} wide, and RoPE needs an even width: change head_dim or n_embd")
        if self.rope_frequencies is not None and len(self.rope_frequencies) != self.head_dim // 2:
            raise ValueError(f"rope_frequencies must be {self.head_dim // 2} numbers, one for every pair of a head")
        self.head_norm = variant.head_norm_by_default if self.head_norm is None else self.head_norm
        self.intermediate_size = self.intermediate_size or 32 * math.ceil(8 * self.n_embd / 3 / 32)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.embedding_multiplier = self.embedding_multiplier or (self.n_embd**0.5 if self.tie_embeddings else 1.0)
        if isinstance(self.n_kv_head, list) and len(self.n_kv_head) != self.n_layer:
            raise ValueError(f"n_kv_head lists {len(self.n_kv_head)} layers and the model has {self.n_layer}")
        for layer in range(self.n_layer):
            n_k, n_v = self.kv_heads(layer)
            if not (1 <= n_k <= self.n_head and 1 <= n_v <= self.n_head):
                raise ValueError(f"n_kv_head must be between 1 and n_head {self.n_head}, not {self.n_kv_head}")
            variant.check_heads(self.n_head, n_k, n_v)

    def kv_heads(self, layer):
        """(key heads, value heads) that a layer projects and caches."""
        return tuple(self.n_kv_head[layer]) if isinstance(self.n_kv_head, list) else (self.n_kv_head, self.n_kv_head)

    @property
    def frequencies(self):
        """Radians by which each of the D/2 pairs of a head turns from one position to the next."""
        return self.rope_frequencies or [self.rope_theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)]

    def kv_bytes_per_token(self, dtype=torch.float32):
        """Bytes that one position of one sequence takes in a `KVCache`."""
        variant, numbers = ATTENTION[self.attention], 0
        for layer in range(self.n_layer):
            n_k, n_v = self.kv_heads(layer)
            numbers += n_k * self.head_dim + n_v * variant.value_width(self, layer)
        return numbers * dtype.itemsize

    def flops_per_token(self, T=None):
        """Forward and backward FLOPs of one training token at sequence length T: 6 per matrix weight, and attention."""
        variant, T = ATTENTION[self.attention], T or self.block_size
        flops = 6 * self.vocab_size * self.n_embd  # the output head; looking an embedding up costs nothing
        for layer in range(self.n_layer):
            with torch.device("meta"):  # without memory: whatever projections a variant has, its own included
                attention = variant(self, layer)
            projections = sum(m.weight.numel() for m in attention.modules() if isinstance(m, nn.Linear))
            flops += 6 * (projections + 3 * self.n_embd * self.intermediate_size)
            flops += variant.flops_per_token(self, layer, T)
        return flops


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
    """x + attention(norm(x)), then x + MLP(norm(x)), with dropout on what each adds."""

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
        self.projections = None  # MEA's, with their compositions folded in: valid as long as the entries made with them

    def rope(self, length):
        """(cos, sin) of the cached positions, each (length, 1, D): a row's entry stands where it is stored."""
        return tuple(table[:length] for table in self.cache.rope)

    def append(self, k, v):
        """Write k (B, T, n_k, D), v (B, T, n_v, D) behind each row's entries; return all so far and `positions`.

        Returns (B, S, n_k, D), (B, S, n_v, D), positions: (B, T) where rows differ in length, otherwise None.
        """
        lengths, T, positions = self.cache.lengths, k.size(1), None
        S = max(lengths) + T
        if min(lengths) == max(lengths):
            self.k[:, S - T : S], self.v[:, S - T : S] = k, v
        else:
            positions = self.cache.positions(T)
            rows = torch.arange(len(lengths), device=k.device)[:, None]
            self.k[rows, positions], self.v[rows, positions] = k.to(self.k.dtype), v.to(self.v.dtype)
        return self.k[:, :S].to(k.dtype), self.v[:, :S].to(v.dtype), positions


class KVCache:
    """What a model caches, keys (after RoPE, but for latents) and values, allocated once: exactly `nbytes`.

    Layer l holds (B, max_length, n_k, D) keys and (B, max_length, n_v, D) values, with `config.kv_heads(l)` = n_k, n_v:
    for MEA the component heads; values are as wide as the variant says (`Attention.value_width`). `lengths` has the
    number of valid positions of each row.
    """

    def __init__(self, config, batch_size, max_length, dtype=torch.float32, device="cpu"):
        self.max_length, self.device, variant = max_length, device, ATTENTION[config.attention]
        if not variant.caches_rotated_keys:
            tables = rope_table(max_length, config.head_dim, config.rope_theta, config.rope_frequencies)
            self.rope = tuple(table.to(device) for table in tables)
        zeros = lambda n, width: torch.zeros(batch_size, max_length, n, width, dtype=dtype, device=device)
        self.layers = []
        for layer in range(config.n_layer):
            n_k, n_v = config.kv_heads(layer)
            values = zeros(n_v, variant.value_width(config, layer))
            self.layers.append(LayerCache(self, zeros(n_k, config.head_dim), values))
        self.lengths = [0] * batch_size

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
        self.activation_checkpointing = False  # True: recompute each block in the backward, and keep less
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.make_rope()
        self.init_weights()

    def make_rope(self):
        """The rotary tables of all positions, (block_size, 1, D) each: they follow from the config, so no checkpoint
        holds them."""
        c = self.config
        cos, sin = rope_table(c.block_size, c.head_dim, c.rope_theta, c.rope_frequencies)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def on_device(self, device):
        """This model, once its weights are loaded, ready on a device in eval mode: ties and rotary tables made anew."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.make_rope()
        return self.to(device).eval()

    def init_weights(self):
        """One rule for every variant: matrices N(0, 1 / fan-in), and embeddings that enter the residual stream
        unit-sized.

        A head norm makes attention's output unit-sized from the first step. Beside the usual embeddings of size 0.02
        that output is most of what the residual stream holds, AdamW makes it larger faster than the embeddings can
        grow, and the token is drowned: with such embeddings the normed small models ended 0.4 nats behind the plain one
        after 1M tokens, with unit-sized ones 0.01, and the plain one loses little. (Zeroing o_proj does not help: its
        first steps undo it.) An embedding that is also the output head has to be small, so that the logits are: it is
        scaled.
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

        With a `cache` the tokens follow what it holds. `lengths` (list of B) says how many of a right-padded row's
        tokens are real: the rest is never attended to and will be overwritten.
        """
        B, T = tokens.shape
        past = max(cache.lengths) if cache is not None else 0
        limit = self.config.block_size if cache is None else min(self.config.block_size, cache.max_length)
        if past + T > limit:
            holder = "model" if cache is None else "cache"
            raise ValueError(f"{past + T} positions do not fit: the {holder} holds {limit}")
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
        """tokens (B, T) -> (logits (B, T, V), None), or with targets (B, T) -> (None, mean cross-entropy in nats per
        token).

        With targets there are no logits to return: on a CPU they are never held whole (see `linear_cross_entropy`).
        """
        x = self.hidden(tokens, cache)
        if targets is None:
            return self.lm_head(x), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.inference_mode()
    def generate(
        self,
        prompts,
        max_new_tokens,
        *,
        temperature=1.0,
        top_k=None,
        top_p=None,
        seed=None,
        stop_tokens=(),
        keep=0,
        use_cache=True,
        on_token=None,
    ):
        """Continue prompts (lists of ids, of any lengths from 1) by up to max_new_tokens: a list of the new ids for
        each.

        temperature 0, or one too small for float32, takes the likeliest token; otherwise one is drawn, after keeping
        the `top_k` likeliest and then the fewest whose probabilities reach `top_p`. A row ends with a stop token, which
        is not returned. `on_token(row, id)` is called as each id is chosen. When a row outgrows the block size the
        older half of its context is dropped, all but the first `keep` tokens (a start of text), with or without the
        cache: both give the same tokens. The model should be in eval mode. Raises ValueError for an empty prompt, a
        setting out of range or logits that are not finite.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt needs at least one token: start an empty one with the end-of-text token")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, not {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        device, limit = self.embed_tokens.weight.device, self.config.block_size
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        keep = min(keep, limit // 2)
        contexts = [[*prompt[:keep], *prompt[keep:][keep - limit :]] for prompt in map(list, prompts)]
        new, running = [[] for _ in prompts], [max_new_tokens > 0] * len(prompts)
        length, dtype = min(limit, max(map(len, contexts)) + max_new_tokens), self.embed_tokens.weight.dtype
        cache = KVCache(self.config, len(prompts), length, dtype, device) if use_cache else None
        fresh = True  # read whole contexts, right-padded: causality hides the padding from what is real
        while any(running):
            if cache is not None and fresh:
                cache.lengths = [0] * len(prompts)
            unread = contexts if cache is None or fresh else [context[-1:] for context in contexts]
            lengths = [len(row) for row in unread]
            rows = [row + [0] * (max(lengths) - len(row)) for row in unread]
            x = self.hidden(torch.tensor(rows, device=device), cache, lengths)  # (B, T, C)
            x = x[torch.arange(len(rows), device=device), torch.tensor(lengths, device=device) - 1]
            logits = self.lm_head(x).float()  # (B, V)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its weights are damaged, or training had diverged")
            tokens = sample_token(logits, temperature, top_k, top_p, generator).tolist()
            fresh = False
            for row, token in enumerate(tokens):
                if len(contexts[row]) == limit:  # the cached positions of what stays would change: read it anew
                    del contexts[row][keep : max(keep + 1, limit - limit // 2)]
                    fresh = True
                contexts[row].append(token)
                if running[row] and token not in stop_tokens:
                    new[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
                running[row] = running[row] and token not in stop_tokens and len(new[row]) < max_new_tokens
        return new

    def parameter_groups(self, weight_decay):
        """AdamW's groups of what is trained. Matrices of linear layers and embeddings decay; vectors, norms, lambdas
        and compositions do not: decay would pull `compose_*` away from the identity it starts at."""
        decayed = {id(m.weight) for m in self.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            dict(params=[p for p in parameters if id(p) in decayed], weight_decay=weight_decay),
            dict(params=[p for p in parameters if id(p) not in decayed], weight_decay=0.0),
        ]
        return [group for group in groups if group["params"]]

    def n_params(self):
        return sum(p.numel() for p in self.parameters())


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """(B, V) logits -> (B) ids: see `GPT.generate`."""
    if temperature == 0 or not (logits.amax(-1) / temperature).isfinite().all():  # so small that float32 overflows
        return logits.argmax(-1)
    logits, ids = torch.sort(logits / temperature, dim=-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    probabilities = logits.softmax(-1)
    if top_p is not None:  # the token that crosses top_p stays, so at least one does
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Options(GPTConfig):
    vocab_size: int = option(50257, "tokens in the vocabulary", least=1)
    preset: str = option("small", "shape of the model", PRESETS)

    def __post_init__(self):  # a shape is checked where it is built
        pass


def build_config(options, **changes):
    """The `GPTConfig` in a program's options, whose dataclass inherits from it. Raises ValueError."""
    shape = {name: getattr(options, name) for name in GPTConfig.__dataclass_fields__}
    return GPTConfig(**{**shape, **changes})


def main(argv=None):
    """What a model of this shape costs with each attention, or with the one that --attention names, in one table."""
    options, given = parse_options(Options, argv, PRESETS)
    try:
        config = build_config(options)
    except ValueError as error:
        fail(error)
    heads = f"{config.n_layer} layers, {config.n_head} heads of {config.head_dim}, width {config.n_embd}"
    print(f"preset {options.preset}: {heads}, {config.vocab_size:,} tokens, {config.block_size:,} positions\n")
    window = f"cache of {config.block_size:,}"
    print(f"{'variant':<18}{'parameters':>14}{'FLOPs/training token':>22}{'cached bytes/token':>20}{window:>18}")
    variants = [(name, config.n_kv_head) for name in ([options.attention] if "attention" in given else ATTENTION)]
    if not given & {"attention", "n_kv_head"} and config.n_kv_head > 1:
        variants.append(("mea", config.n_kv_head // 2))
    for name, n_kv_head in variants:
        try:
            config = build_config(options, attention=name, n_kv_head=n_kv_head)
        except ValueError:  # what was given is not for this variant
            continue
        with torch.device("meta"):  # shapes without memory
            parameters = GPT(config).n_params()
        title = name if n_kv_head == config.n_head else f"{name}, {n_kv_head} of {config.n_head} kv"
        cached = config.kv_bytes_per_token(torch.bfloat16)
        size = f"{cached * config.block_size / 2**20:,.1f} MiB"
        print(f"{title:<18}{parameters:>14,}{config.flops_per_token():>22,}{cached:>20,}{size:>18}")
    print("\nFLOPs: forward and backward at that many positions. Bytes: in bfloat16; float32 takes twice as many.")


if __name__ == "__main__":
    run_program(main)
