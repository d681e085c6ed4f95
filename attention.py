"""Four attentions side by side: MHA, Talking-Heads, Differential and Multi-head Explicit Attention.

Start with `MHA`, then read `MEA`: they differ by two small matrices. `TalkingHeads` and `DFA` are the neighbours
that MEA is compared with. Run `python attention.py` for a table of what each costs; read `model.py` next, and
`kernels.py`, which MEA takes on a GPU, when you want to know how it is made fast.

Letters in shapes: B batch, T new positions, S positions so far (cached ones included), C model width, H heads,
Hc component heads (the ones that are projected and cached), D head width.

Every class has the same form,  forward(x, rope, cache=None): (B, T, C) -> (B, T, C),  and reads these fields of its
config (`model.GPTConfig` or anything that has them): n_embd, n_head, head_dim, kv_heads (one (keys, values) pair per
layer), head_norm, qk_norm, norm_eps, dropout, attention_bias, mea_form. `cache` is one layer of a `model.KVCache`.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import compose_heads, mea_attention, mea_decode

# ---------------------------------------------------------------------------------------------------------------------
# What the four share


def rope_table(length, dim, theta=10000.0, scaling=None):
    """cos and sin of the rotary embedding (RoFormer, 2104.09864), each (length, 1, dim): the same for every head.

    Pair i of a head is (x[i], x[i + dim/2]), the half-rotation convention of Llama checkpoints, and turns by
    position * theta^(-2i/dim), or slower: see `scale_frequency`. The sign of the rotation is folded into the first half of
    sin: see `apply_rope`.
    """
    frequency = scale_frequency(theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), scaling)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)[:, None]  # (length, 1, D/2)
    cos = torch.cat((angle.cos(), angle.cos()), dim=-1)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)
    return cos.float(), sin.float()


def scale_frequency(frequency, scaling):
    """The frequencies (D/2) as a model's long-context training slowed them; `scaling` is a dict as in Hugging Face's config.json, or None.

    "linear" (2306.15595): frequency / factor. "llama3" (Llama 3.1): pairs that turn fewer than low_freq_factor times within
    original_max_position_embeddings are divided by factor, those that turn more than high_freq_factor times stay, and
    between the two the share that stays grows linearly in the number of turns. Raises ValueError for any other rope_type.
    """
    if scaling is None:
        return frequency
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if kind not in [*needed]:
        raise ValueError(f"rope_type {kind!r} is not implemented: default, {' and '.join(needed)} are")
    for name in needed[kind]:
        if not isinstance(scaling.get(name), (int, float)) or not 0 < scaling[name] < math.inf:
            raise ValueError(f"rope_type {kind} needs a positive {name}, not {scaling.get(name)!r}")
    if kind == "linear":
        return frequency / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if low >= high:
        raise ValueError(f"rope_type llama3 needs a low_freq_factor below its high_freq_factor, not {low} and {high}")
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    stays = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (stays + (1 - stays) / scaling["factor"])


def apply_rope(x, rope):
    """Rotate heads x (B, T, H, D) by the (cos, sin) of their positions, each (T, 1, D) or (B, T, 1, D).

    With x = (a, b) in halves: (a cos - b sin, b cos + a sin). Linear and the same for every head, so it commutes with
    a composition of heads (MEA, eq. 13).
    """
    cos, sin = rope
    return x * cos.to(x.dtype) + x.roll(x.size(-1) // 2, dims=-1) * sin.to(x.dtype)


def causal_mask(T, S, positions=None, device=None):
    """(1 or B, 1, T, S) booleans, True where query t may see key s: s <= its position.

    Without `positions` (B, T) the queries are the last T of the S positions.
    """
    if positions is None:
        positions = torch.arange(S - T, S, device=device)[None]
    return torch.arange(S, device=positions.device) <= positions[:, None, :, None]


def causal_attention(q, k, v, positions=None, dropout=0.0, scale=None):
    """softmax(Q K^T / sqrt(D)) V, causal, in PyTorch's fused kernels: (B, H, T, D) from q (B, H, T, D), k, v (B, n, S, D).

    n < H is grouped-query attention: H/n neighbouring query heads read one key/value head. `positions` (B, T) are the
    places of the queries when the rows of a batch have different lengths; without them the queries are the last T.
    """
    T, S = q.size(2), k.size(2)
    mask = None
    if positions is not None or 1 < T < S:  # one query that is the last position may see everything: no mask
        mask = causal_mask(T, S, positions, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, dropout_p=dropout, scale=scale,
        enable_gqa=k.size(1) != q.size(1),
    )  # fmt: skip


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (RMSNorm, 1910.07467), reduced in float32.

    `weight` may have more dimensions than the last, e.g. (H, D) gives each head its own gain.
    """
    if torch.is_grad_enabled():
        return RMSNormFunction.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight.to(x.dtype)


class RMSNormFunction(torch.autograd.Function):
    """Written out because autograd through `F.rms_norm` takes twice the time on a CPU, where norms are not cheap."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(length.square() / x.size(-1) + eps).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return x * inverse * weight.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        grad_weight = (grad * unit).to(weight.dtype).sum_to_size(weight.shape)
        grad = grad * weight.to(x.dtype)
        along = (grad * unit).mean(-1, keepdim=True)  # the part along x would only change its length: it drops out
        return torch.addcmul(grad, unit, along, value=-1) * inverse, grad_weight, None


class RMSNorm(nn.Module):
    """`rms_norm` with a learned gain. A layer's QK-norm (Qwen3) is two of them, over the width of a head: see `MHA`."""

    def __init__(self, shape, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm of each head's output by itself, with a gain per head and feature: the paper's GroupNorm (section 4.1).

    (B, T, H, D) -> (B, T, H, D).
    """

    def __init__(self, n_head, head_dim, eps):
        super().__init__((n_head, head_dim), eps)


# ---------------------------------------------------------------------------------------------------------------------
# The four


class MHA(nn.Module):
    """Multi-head attention (1706.03762); grouped-query for fewer key/value heads (2305.13245), multi-query for one.

    C_h = softmax(Q_h K_g(h)^T / sqrt(D)) V_g(h),   output = Concat(C_1 .. C_H) W^O,   g(h) = h * n_kv // H.

    With config.qk_norm every query and key head goes through an RMSNorm before RoPE; one gain (D) serves all heads (Qwen3).
    """

    def __init__(self, config, layer=0):
        super().__init__()
        self.n_head, self.head_dim, self.dropout = config.n_head, config.head_dim, config.dropout
        self.n_kv, n_v = config.kv_heads(layer)
        if self.n_kv != n_v or self.n_head % self.n_kv:
            raise ValueError(f"mha needs equally many key and value heads that divide n_head {self.n_head}, not {self.n_kv} and {n_v}")
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.n_embd, self.n_kv * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.n_embd, self.n_kv * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.head_norm = HeadNorm(self.n_head, self.head_dim, config.norm_eps) if config.head_norm else nn.Identity()

    def forward(self, x, rope, cache=None):
        B, T, _ = x.shape
        q = apply_rope(self.q_norm(self.q_proj(x).view(B, T, self.n_head, self.head_dim)), rope)
        k = apply_rope(self.k_norm(self.k_proj(x).view(B, T, self.n_kv, self.head_dim)), rope)
        v = self.v_proj(x).view(B, T, self.n_kv, self.head_dim)
        positions = None
        if cache is not None:
            k, v, positions = cache.append(k, v)  # (B, S, n_kv, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, positions, D)
        y = causal_attention(q, k, v, positions, self.dropout if self.training else 0.0)
        y = self.head_norm(y.transpose(1, 2))  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))


class TalkingHeads(nn.Module):
    """Talking-Heads attention (2003.02436): heads exchange logits before the softmax and weights after it.

    L_h = Q_h K_h^T / sqrt(D),   A_g = softmax(mask(sum_h P[h, g] L_h)),   C_f = (sum_g R[g, f] A_g) V_f,
    with P = `mix_logits` and R = `mix_weights`, both (H, H) and the identity at the start: plain attention.

    No fused kernel computes this, so queries go in blocks of `block`, whose maps are recomputed in the backward: memory
    is linear in the sequence.
    """

    block = 128

    def __init__(self, config, layer=0):
        super().__init__()
        self.n_head, self.head_dim, self.dropout = config.n_head, config.head_dim, config.dropout
        self.n_kv, n_v = config.kv_heads(layer)
        if self.n_kv != n_v or self.n_head % self.n_kv:
            raise ValueError(f"tha needs equally many key and value heads that divide n_head {self.n_head}, not {self.n_kv} and {n_v}")
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.n_embd, self.n_kv * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.n_embd, self.n_kv * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.mix_logits = nn.Parameter(torch.eye(self.n_head))
        self.mix_weights = nn.Parameter(torch.eye(self.n_head))
        self.head_norm = HeadNorm(self.n_head, self.head_dim, config.norm_eps) if config.head_norm else nn.Identity()

    def attend(self, q, k, v, positions):
        """q (B, H, T, D), k and v (B, H, S, D), positions of the queries (1 or B, T) -> (B, H, T, D): the formula as it stands."""
        mask = causal_mask(q.size(2), k.size(2), positions)  # (1 or B, 1, T, S); made here so that it is recomputed, too
        logits = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # (B, H, T, S)
        logits = compose_heads(logits, self.mix_logits)  # the same map between heads, of scores instead of keys
        logits = logits.masked_fill(~mask, -math.inf)  # after the mix: mixing -inf would give NaN
        weights = compose_heads(logits.softmax(-1), self.mix_weights)
        return F.dropout(weights, self.dropout, self.training) @ v

    def forward(self, x, rope, cache=None):
        B, T, _ = x.shape
        q = apply_rope(self.q_proj(x).view(B, T, self.n_head, self.head_dim), rope)
        k = apply_rope(self.k_proj(x).view(B, T, self.n_kv, self.head_dim), rope)
        v = self.v_proj(x).view(B, T, self.n_kv, self.head_dim)
        positions = None
        if cache is not None:
            k, v, positions = cache.append(k, v)  # (B, S, n_kv, D)
        k, v = (heads.repeat_interleave(self.n_head // self.n_kv, dim=2) for heads in (k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, positions, D)
        S, blocks = k.size(2), []
        for start in range(0, T, self.block):
            stop = min(start + self.block, T)
            seen = S if positions is not None else S - T + stop  # later keys are masked for the whole block
            where = torch.arange(seen - (stop - start), seen, device=x.device)[None] if positions is None else positions[:, start:stop]
            operands = q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], where
            if T > self.block and torch.is_grad_enabled():
                blocks.append(checkpoint(self.attend, *operands, use_reentrant=False))
            else:
                blocks.append(self.attend(*operands))
        y = self.head_norm(torch.cat(blocks, dim=2).transpose(1, 2))  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))


class DFA(nn.Module):
    """Differential attention (2410.05258): the difference of two attention maps cancels what both attend to.

    H/2 heads, each with two query/key groups of width D and one value of width 2D:
    C_h = (softmax(Q1 K1^T / sqrt(D)) - lambda softmax(Q2 K2^T / sqrt(D))) V,
    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init,   lambda_init = 0.8 - 0.6 exp(-0.3 layer),
    output = Concat((1 - lambda_init) HeadNorm(C_h)) W^O; the factor belongs to the norm and goes with it.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        self.n_head, self.head_dim, self.dropout = config.n_head, config.head_dim, config.dropout
        self.n_kv, n_v = config.kv_heads(layer)
        if self.n_head % 2 or self.n_kv % 2:
            raise ValueError(f"dfa pairs its heads: n_head {self.n_head} and n_kv_head {self.n_kv} must be even")
        if self.n_kv != n_v or self.n_head % self.n_kv:
            raise ValueError(f"dfa needs equally many key and value heads that divide n_head {self.n_head}, not {self.n_kv} and {n_v}")
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.n_embd, self.n_kv * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.n_embd, self.n_kv * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(self.head_dim) * 0.1) for _ in range(4)
        )
        self.head_norm = HeadNorm(self.n_head // 2, 2 * self.head_dim, config.norm_eps) if config.head_norm else None

    def forward(self, x, rope, cache=None):
        B, T, _ = x.shape
        D, dropout = self.head_dim, self.dropout if self.training else 0.0
        q = apply_rope(self.q_proj(x).view(B, T, self.n_head, D), rope)
        k = apply_rope(self.k_proj(x).view(B, T, self.n_kv, D), rope)
        v = self.v_proj(x).view(B, T, self.n_kv, D)
        positions = None
        if cache is not None:
            k, v, positions = cache.append(k, v)  # (B, S, n_kv, D)
        v = v.unflatten(2, (-1, 2)).flatten(3).transpose(1, 2)  # neighbours side by side: (B, n_kv/2, S, 2D)
        # Fused kernels want q, k and v equally wide: zeros behind q and k change no score (the scale stays that of D).
        q, k = (F.pad(heads, (0, D)).transpose(1, 2) for heads in (q, k))
        first, second = (causal_attention(q[:, i::2], k[:, i::2], v, positions, dropout, scale=D**-0.5) for i in (0, 1))
        lam = torch.exp(self.lambda_q1 @ self.lambda_k1) - torch.exp(self.lambda_q2 @ self.lambda_k2) + self.lambda_init
        y = (first - lam.to(first.dtype) * second).transpose(1, 2)  # (B, T, H/2, 2D)
        if self.head_norm is not None:
            y = self.head_norm(y) * (1 - self.lambda_init)
        return self.o_proj(y.reshape(B, T, -1))


class MEA(nn.Module):
    """Multi-head Explicit Attention (2601.19611, eq. 11-12): attention with keys and values composed across heads.

    K = HLC(`compose_k`, K_comp),   V = HLC(`compose_v`, V_comp),   C_h = softmax(Q_h K_h^T / sqrt(D)) V_h,
    output = Concat(HeadNorm(C_1) .. HeadNorm(C_H)) W^O.

    compose_k (n_k, H) and compose_v (n_v, H) start as the identity, or, with fewer components than heads, with one-hot
    columns: plain attention or grouped-query attention, plus the norm.

    HLC is linear, so it can be applied in three equal places (`form`, by default config.mea_form):
      compose  the activations: small projections, then one small matmul. Pays for Hc < H, training and prefill.
      fold     the projections, W_K' = W_K (x) compose_k (eq. 18): Hc == H trains at the cost of MHA. A cache then
               holds composed heads, which are as many.
      absorb   the query: scores_h = sum_c compose_k[c, h] Q_h K_c^T against all components at once, and
               C_h = sum_c compose_v[c, h] (A_h V_c). Pays for Hc < H, decoding: no virtual head is ever written.
      auto     the cheap one of these.
    QK-norm (config.qk_norm) is of the component keys. It does not commute with their composition: there is nothing to fold.
    On a GPU the kernels of kernels.py do everything between the projections: on composed or folded heads in training, on
    the components, absorbed, in decoding.
    """

    fused_on = ("cuda",)

    def __init__(self, config, layer=0):
        super().__init__()
        self.config, self.layer, self.form = config, layer, config.mea_form
        self.n_head, self.head_dim, self.dropout = config.n_head, config.head_dim, config.dropout
        self.n_k, self.n_v = config.kv_heads(layer)
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.n_embd, self.n_k * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.n_embd, self.n_v * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.compose_k = nn.Parameter(one_hot_composition(self.n_k, self.n_head))
        self.compose_v = nn.Parameter(one_hot_composition(self.n_v, self.n_head))
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.head_norm = HeadNorm(self.n_head, self.head_dim, config.norm_eps) if config.head_norm else nn.Identity()

    def cheap_form(self, T, cache):
        if self.n_k == self.n_v == self.n_head and not self.config.qk_norm:
            return "fold"
        return "absorb" if cache is not None and T == 1 else "compose"

    def folded(self, projection, weight):
        """The projection with the composition folded in (eq. 18): weight (H*D, C) and bias (H*D) or None.

        Raises ValueError with QK-norm, which stands between the two.
        """
        if self.config.qk_norm:
            raise ValueError("QK-norm stands between the projection and the composition of keys: they do not fold into one")

        def fold(rows):  # (Hc*D, any) -> (H*D, any)
            return torch.einsum("cdm,ch->hdm", rows.view(len(weight), self.head_dim, -1), weight).flatten(0, 1)

        return fold(projection.weight), None if projection.bias is None else fold(projection.bias).view(-1)

    def forward(self, x, rope, cache=None):
        B, T, _ = x.shape
        D, dropout = self.head_dim, self.dropout if self.training else 0.0
        form = self.cheap_form(T, cache) if self.form == "auto" else self.form
        q = apply_rope(self.q_norm(self.q_proj(x).view(B, T, self.n_head, D)), rope)
        if form == "fold":
            k, v = self.project_folded(x, cache)
        else:
            k, v = self.k_proj(x), self.v_proj(x)
        k = apply_rope(self.k_norm(k.view(B, T, -1, D)), rope)  # composed or not: RoPE commutes with HLC (eq. 13)
        v = v.view(B, T, -1, D)
        positions = None
        if cache is not None:
            k, v, positions = cache.append(k, v)  # (B, S, heads, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, positions, D)
        weights = (None, None) if form == "fold" else (self.compose_k, self.compose_v)
        fits = form != "absorb" if cache is None else form != "compose" and T == 1
        if x.device.type in self.fused_on and not dropout and fits:  # all that follows in one kernel
            y = self.attend_fused(q, k, v, weights, cache, positions)
            return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        if form == "absorb":
            y = self.attend_absorbed(q, k, v, positions, dropout)
        else:
            if form == "compose":
                k, v = compose_heads(k, self.compose_k), compose_heads(v, self.compose_v)
            y = causal_attention(q, k, v, positions, dropout)
        y = self.head_norm(y.transpose(1, 2))  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))

    def attend_fused(self, q, k, v, weights, cache, positions):
        """Composition, attention and head norm by kernels.py: q (B, H, T, D), k (B, n_k, S, D), v (B, n_v, S, D) -> (B, H, T, D)."""
        gain, eps = (self.head_norm.weight, self.head_norm.eps) if isinstance(self.head_norm, HeadNorm) else (None, 1e-6)
        if cache is None:
            return mea_attention(q, k, v, *weights, gain, eps=eps)
        lengths = None if positions is None else positions[:, 0] + 1
        return mea_decode(q, k, v, *weights, gain, lengths=lengths, eps=eps)

    def project_folded(self, x, cache):
        """Composed keys and values in one projection each, (B, T, H*D). While decoding, folded once per cache."""
        if cache is None:
            weights = self.folded(self.k_proj, self.compose_k), self.folded(self.v_proj, self.compose_v)
        else:
            if min(self.n_k, self.n_v) < self.n_head:
                raise ValueError(f"form 'fold' caches {self.n_head} composed heads, and this cache has {self.n_k} and {self.n_v}: use 'absorb'")
            if cache.folded is None:
                cache.folded = self.folded(self.k_proj, self.compose_k), self.folded(self.v_proj, self.compose_v)
            weights = cache.folded
        return tuple(F.linear(x, weight, bias) for weight, bias in weights)

    def attend_absorbed(self, q, k, v, positions, dropout):
        """q (B, H, T, D), component k (B, n_k, S, D) and v (B, n_v, S, D) -> (B, H, T, D): every component is read once.

        To all H queries the components are one wide head, of n_k D and n_v D features, that attention reads as it lies in
        the cache.
        """
        B, H, T, D = q.shape
        S, mask = k.size(2), None
        q = q.unsqueeze(3) * self.compose_k.T[:, None, :, None]  # (B, H, T, n_k, D)
        k, v = (heads.transpose(1, 2).flatten(2) for heads in (k, v))  # (B, S, n*D), without a copy
        if T > 1 or positions is not None:
            mask = causal_mask(T, S, positions, q.device).repeat(1, 1, H, 1)
        y = F.scaled_dot_product_attention(
            q.reshape(B, 1, H * T, -1), k[:, None], v[:, None], attn_mask=mask, dropout_p=dropout, scale=D**-0.5
        )  # (B, 1, H*T, n_v*D)
        return (y.reshape(B, H, T, self.n_v, D) * self.compose_v.T[:, None, :, None]).sum(3)

    @torch.no_grad()
    def fold(self):
        """The equal `MHA` (with the same head norm): inference at exactly its cost. Needs n_k == n_v == H."""
        if not self.n_k == self.n_v == self.n_head:
            raise ValueError(f"only a full set of components folds into MHA: {self.n_k} and {self.n_v} for {self.n_head} heads")
        equal = MHA(self.config, self.layer).to(self.q_proj.weight)
        equal.load_state_dict({name: w for name, w in self.state_dict().items() if not name.startswith("compose_")})
        for mine, theirs, weight in ((self.k_proj, equal.k_proj, self.compose_k), (self.v_proj, equal.v_proj, self.compose_v)):
            folded_weight, folded_bias = self.folded(mine, weight)
            theirs.weight.copy_(folded_weight)
            if folded_bias is not None:
                theirs.bias.copy_(folded_bias)
        return equal


def one_hot_composition(n_component, n_head):
    """(Hc, H) whose column h picks component h * Hc // H: the identity for Hc == H, otherwise grouped-query attention."""
    return F.one_hot(torch.arange(n_head) * n_component // n_head, n_component).float().T.contiguous()


ATTENTION = {"mha": MHA, "tha": TalkingHeads, "dfa": DFA, "mea": MEA}


def main():
    """What each variant costs on a small example, in one table."""
    import time
    from types import SimpleNamespace

    torch.manual_seed(0)
    B, T, H, D = 4, 256, 8, 32
    formulas = {
        "mha": "C_h = softmax(Q_h K_h^T / sqrt(D)) V_h",
        "tha": "C_f = (sum_g R[g,f] softmax(sum_h P[h,g] Q_h K_h^T / sqrt(D))_g) V_f",
        "dfa": "C_h = (softmax(Q1 K1^T / sqrt(D)) - lambda softmax(Q2 K2^T / sqrt(D))) V,  then the head norm",
        "mea": "C_h = softmax(Q_h (sum_c Wk[c,h] K_c)^T / sqrt(D)) (sum_c Wv[c,h] V_c),  then the head norm",
    }
    rope = tuple(table[:T] for table in rope_table(T, D))
    print(f"batch {B}, {T} positions, {H} heads of {D}, width {H * D}, float32, {torch.get_num_threads()} CPU threads, median of 9\n")
    print(f"{'variant':<16}{'parameters':>12}{'cached bytes/token':>20}{'forward ms':>12}{'+ backward ms':>15}   formula")
    for name, n_kv, norm in (("mha", 8, False), ("mha", 4, False), ("tha", 8, False), ("dfa", 8, True), ("mea", 8, True), ("mea", 4, True)):
        config = SimpleNamespace(
            n_embd=H * D, n_head=H, head_dim=D, kv_heads=lambda layer: (n_kv, n_kv), head_norm=norm, norm_eps=1e-6,
            dropout=0.0, attention_bias=False, qk_norm=False, mea_form="auto",
        )  # fmt: skip
        layer = ATTENTION[name](config)
        x = torch.randn(B, T, H * D, requires_grad=True)
        forward, backward = [], []
        for _ in range(10):
            started = time.perf_counter()
            y = layer(x, rope)
            forward.append(time.perf_counter() - started)
            y.sum().backward()
            backward.append(time.perf_counter() - started)
        title = f"{name}, {n_kv} of {H} kv" if n_kv < H else name
        parameters = sum(p.numel() for p in layer.parameters())
        times = (1e3 * sorted(seconds[1:])[4] for seconds in (forward, backward))  # the first call warms up
        print(f"{title:<16}{parameters:>12,}{2 * n_kv * D * 4:>20,}" + "{:>12.1f}{:>15.1f}".format(*times) + f"   {formulas[name]}")


if __name__ == "__main__":
    main()
