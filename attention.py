"""Four attentions side by side: MHA, Talking-Heads, Differential and Multi-head Explicit Attention.

Everything they share is in `Attention`; below it, each variant is its formula. Start with `MHA`, then read `MEA`: they
differ by two small matrices. A fifth, `Latent`, is what MEA's compressed cache is measured against. Read `model.py`
next, and `functional.py` when you want to know what they compute with.

The idea
    Head-level linear composition (HLC): every head becomes a learned mix of all component heads, the same mix at every
    position and of every feature, so it commutes with RoPE (2601.19611, eq. 10 and 13). `compose_heads` computes

        out_h = sum_c weight[c, h] components_c          einsum("b c t d, c h -> b h t d", components, weight)

Five terms
    component head      a head that is projected from the input; its keys and values are what a cache holds
    composite head      a head that attends: a learned mix of components. Virtual: computed from them when it is used,
                        never stored
    cached head         a component whose keys (after RoPE) and values stay in memory while text is written
    composition matrix  (Hc, H) numbers: how much of component c goes into head h; one for keys, one for values
    head norm           RMSNorm of each head's output by itself, before the output projection

Letters in shapes: B batch, T new positions, S positions so far (cached ones included), C model width, H heads, Hc
component heads, D head width.

To add a variant, write a class of about ten lines and give it a name in `ATTENTION`; every program and every generic
test then takes it. `experiments/family.py` has seven more that were published.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from functional import (
    absorbed_attention,
    causal_attention,
    causal_mask,
    compose_heads,
    kernel_is_chosen,
    mea_attention,
    mea_decode,
    rms_norm,
)

# ---------------------------------------------------------------------------------------------------------------------
# What the variants share


def rope_table(length, dim, theta=10000.0, frequencies=None):
    """cos and sin of the rotary embedding (RoFormer, 2104.09864), each (length, 1, dim): the same for every head.

    Pair i of a head is (x[i], x[i + dim/2]), the half-rotation convention of Llama checkpoints. It turns by
    position * frequencies[i], by default theta^(-2i/dim). The first half of sin carries the sign of the
    rotation: see `apply_rope`.
    """
    if frequencies is None:
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    positions = torch.arange(length, dtype=torch.float64)
    angle = torch.outer(positions, torch.as_tensor(frequencies, dtype=torch.float64))[:, None]  # (length, 1, D/2)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x, rope):
    """Rotate heads x (B, T, H, D) by the (cos, sin) of their positions, each (T, 1, D) or (B, T, 1, D).

    With x = (a, b) in halves: (a cos - b sin, b cos + a sin). Linear and the same for every head.
    """
    cos, sin = rope
    return x * cos.to(x.dtype) + x.roll(x.size(-1) // 2, dims=-1) * sin.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned gain."""

    def __init__(self, shape, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm of each head (B, T, H, D) by itself, with a gain (H, D): the paper's GroupNorm (section 4.1)."""

    def __init__(self, n_head, head_dim, eps):
        super().__init__((n_head, head_dim), eps)


class Attention(nn.Module):
    """Projections, QK-norm, RoPE, cache, head norm and output projection around a variant's `attend`.

    forward(x, rope, cache=None): (B, T, C) -> (B, T, C). `config` is a `model.GPTConfig`, `rope` the (cos, sin) of the
    new positions, `cache` one layer of a `model.KVCache`. With config.qk_norm every query and key head goes through an
    RMSNorm before RoPE; one gain (D) serves all heads (Qwen3). Raises ValueError for head counts it cannot have.

    A variant overrides `attend`. Class attributes describe it to the rest of the program:
    """

    head_norm_by_default = False  # what config.head_norm None means
    heads_per_output = 1  # DFA joins 2 heads into one of twice the width
    any_kv_heads = False  # True: n_kv_head may be any number that GPTConfig allows; False: a divisor of n_head
    caches_rotated_keys = True  # False: what is cached becomes keys when it is read (`rebuild_keys`), then rotated
    incompressible = "compress.py does not know how it reads keys and values"  # why its cache cannot be halved, or None

    def __init_subclass__(cls):  # not inherited: what holds for a variant may not hold for what is added to it
        cls.incompressible = vars(cls).get("incompressible", Attention.incompressible)

    def __init__(self, config, layer=0):
        super().__init__()
        self.config, self.layer = config, layer
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.n_k, self.n_v = config.kv_heads(layer)
        self.check_heads(self.n_head, self.n_k, self.n_v)
        heads = self.n_head * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, heads, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.n_embd, self.n_k * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.n_embd, self.n_v * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads, config.n_embd, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )
        joined = self.n_head // self.heads_per_output, self.head_dim * self.heads_per_output
        self.head_norm = HeadNorm(*joined, config.norm_eps) if config.head_norm else nn.Identity()

    @classmethod
    def check_heads(cls, n_head, n_k, n_v):
        """Raise ValueError for numbers of query, key and value heads that the variant cannot have."""
        if not cls.any_kv_heads and (n_k != n_v or n_head % n_k):
            shown = n_k if n_k == n_v else (n_k, n_v)
            raise ValueError(f"n_kv_head {shown} must divide n_head {n_head} for {cls.__name__} (mea takes any)")

    @classmethod
    def flops_per_token(cls, config, layer, T):
        """Forward and backward FLOPs of one token's attention beside its projections.

        A query sees T/2 keys on average and pays 2D for a score and 2D for its value: 6 T H D with the backward.
        """
        return 6 * T * config.n_head * config.head_dim

    @classmethod
    def value_width(cls, config, layer):
        """Numbers that a value head takes in a cache: D, and what a variant has to remember beside its value."""
        return config.head_dim

    @property
    def drop(self):
        return self.config.dropout if self.training else 0.0

    def forward(self, x, rope, cache=None):
        B, T, _ = x.shape
        q = apply_rope(self.queries(x), rope)  # (B, T, H, D)
        k, v = self.project(x, cache)
        k = k.unflatten(2, (-1, self.head_dim))  # (B, T, n, D)
        v = v.unflatten(2, (-1, self.value_width(self.config, self.layer)))
        if self.caches_rotated_keys:
            k = apply_rope(self.k_norm(k), rope)
        positions = None
        if cache is not None:
            k, v, positions = cache.append(k, v)  # (B, S, n, D)
        if not self.caches_rotated_keys:
            k = apply_rope(self.k_norm(self.rebuild_keys(k)), rope if cache is None else cache.rope(k.size(1)))
        y = self.normed_heads(x, *(heads.transpose(1, 2) for heads in (q, k, v)), positions)  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))

    def queries(self, x):
        """Query heads before RoPE, (B, T, H, D); a variant may have another number of them."""
        return self.q_norm(self.q_proj(x).unflatten(2, (-1, self.head_dim)))

    def project(self, x, cache):
        """Keys (B, T, n_k*D) and values (B, T, n_v*D), as they are cached."""
        return self.k_proj(x), self.v_proj(x)

    def normed_heads(self, x, q, k, v, positions):
        """The heads' outputs side by side, normed: (B, T, H, D)."""
        return self.head_norm(self.attend(x, q, k, v, positions).transpose(1, 2))

    def attend(self, x, q, k, v, positions):
        """Rotated queries (B, H, T, D), all keys (B, n_k, S, D) and values (B, n_v, S, D) -> outputs (B, H, T, D).

        `positions` (B, T) where rows differ in length, otherwise None; `x` (B, T, C) for a gate computed from it.
        """
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# The four, and the latent one


class MHA(Attention):
    """Multi-head attention (1706.03762); grouped-query for fewer key/value heads (2305.13245), multi-query for one.

    C_h = softmax(Q_h K_g(h)^T / sqrt(D)) V_g(h),   output = Concat(C_1 .. C_H) W^O,   g(h) = h * n_kv // H.
    """

    incompressible = None

    def attend(self, x, q, k, v, positions):
        return causal_attention(q, k, v, positions, self.drop)


class DFA(Attention):
    """Differential attention (2410.05258): the difference of two attention maps cancels what both attend to.

    H/2 heads, each with two query/key groups of width D and one value of width 2D:
    C_h = (softmax(Q1 K1^T / sqrt(D)) - lambda softmax(Q2 K2^T / sqrt(D))) V,
    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init,   lambda_init = 0.8 - 0.6 exp(-0.3 layer),
    output = Concat((1 - lambda_init) HeadNorm(C_h)) W^O; the factor belongs to the norm and goes with it.

    The authors' code shares one norm gain (2D) among all heads, with eps 1e-5; here each head has its own. With grouped
    keys it pairs heads as the authors' flash classes do (neighbours); their plain class pairs them otherwise.
    """

    head_norm_by_default = True
    heads_per_output = 2
    incompressible = "its two attention maps share one value, and their difference reads keys in pairs"

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(self.head_dim) * 0.1) for _ in range(4)
        )

    @classmethod
    def check_heads(cls, n_head, n_k, n_v):
        if n_head % 2 or n_k % 2:
            raise ValueError(f"dfa pairs its heads: n_head {n_head} and n_kv_head {n_k} must be even")
        super().check_heads(n_head, n_k, n_v)

    @classmethod
    def flops_per_token(cls, config, layer, T):
        return 9 * T * config.n_head * config.head_dim  # H maps, as in MHA, but each reads a value of width 2D

    def lambda_now(self):
        # An elementwise product and a sum: autocast would round a dot product to bfloat16, 4.5 % off in layer 0.
        first, second = (self.lambda_q1 * self.lambda_k1).sum(), (self.lambda_q2 * self.lambda_k2).sum()
        return torch.exp(first) - torch.exp(second) + self.lambda_init

    def attend(self, x, q, k, v, positions):
        v = v.transpose(1, 2).unflatten(2, (-1, 2)).flatten(3).transpose(1, 2)  # neighbours joined: (B, n/2, S, 2D)
        first, second = (causal_attention(q[:, i::2], k[:, i::2], v, positions, self.drop) for i in (0, 1))
        return first - self.lambda_now().to(first.dtype) * second  # (B, H/2, T, 2D)

    def normed_heads(self, *operands):
        """(B, T, H/2, 2D), times the paper's (1 - lambda_init) where there is a norm."""
        y = super().normed_heads(*operands)
        return y * (1 - self.lambda_init) if self.config.head_norm else y


class TalkingHeads(Attention):
    """Talking-Heads attention (2003.02436): heads exchange logits before the softmax and weights after it.

    L_h = Q_h K_h^T / sqrt(D),   A_g = softmax(mask(sum_h P[h, g] L_h)),   C_f = (sum_g R[g, f] A_g) V_f,
    with P = `mix_logits` and R = `mix_weights`, both (H, H) and the identity at the start: plain attention.

    No fused kernel computes this, so queries go in blocks of `block`, whose maps are recomputed in the backward: memory
    is linear in the sequence.
    """

    incompressible = "it mixes attention maps, so a head's keys cannot be turned alone"
    block = 128

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.mix_logits = nn.Parameter(torch.eye(self.n_head))
        self.mix_weights = nn.Parameter(torch.eye(self.n_head))

    @classmethod
    def flops_per_token(cls, config, layer, T):  # two mixes, 2H for each of H scores of T/2 keys
        return super().flops_per_token(config, layer, T) + 6 * T * config.n_head**2

    def attend_block(self, q, k, v, positions):
        """q (B, H, T, D), k and v (B, H, S, D), positions of the queries (1 or B, T): the formula as it stands."""
        # The mask is made here, so that the backward makes it again instead of keeping it: (1 or B, 1, T, S).
        mask = causal_mask(q.size(2), k.size(2), positions)
        logits = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # (B, H, T, S)
        logits = compose_heads(logits, self.mix_logits)  # the same mix of heads, of scores instead of keys
        logits = logits.masked_fill(~mask, -math.inf)  # after the mix: mixing -inf would give NaN
        weights = compose_heads(logits.softmax(-1), self.mix_weights)
        return F.dropout(weights, self.drop) @ v

    def attend(self, x, q, k, v, positions):
        k, v = (heads.repeat_interleave(self.n_head // heads.size(1), dim=1) for heads in (k, v))  # (B, H, S, D)
        T, S, outputs = q.size(2), k.size(2), []
        if positions is None:
            positions = torch.arange(S - T, S, device=q.device)[None]
        attend = self.attend_block
        if T > self.block and torch.is_grad_enabled():
            attend = partial(checkpoint, self.attend_block, use_reentrant=False)
        for start in range(0, T, self.block):
            stop = start + self.block
            seen = S - T + stop  # no row is longer than S: later keys are masked for the whole block
            outputs.append(attend(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], positions[:, start:stop]))
        return torch.cat(outputs, dim=2)


class MEA(Attention):
    """Multi-head Explicit Attention (2601.19611, eq. 11-12): attention with keys and values composed across heads.

    K = HLC(compose_k, K_comp),   V = HLC(compose_v, V_comp),   C_h = softmax(Q_h K_h^T / sqrt(D)) V_h,
    output = Concat(HeadNorm(C_1) .. HeadNorm(C_H)) W^O.

    compose_k (n_k, H) and compose_v (n_v, H) start as the identity, or, with fewer components than heads, with one-hot
    columns: plain attention or grouped-query attention, plus the norm. With config.compose "diagonal" only the size of
    what they start with is learned: one number per head.

    HLC is linear, so it can be applied in three equal places (config.mea_form):
      compose  the activations: small projections, then one small product. Pays for Hc < H, training and prefill.
      fold     the projections, W_K' = W_K (x) compose_k (eq. 18): Hc == H trains at the cost of MHA. A cache then
               holds composed heads, which are as many.
      absorb   the query: scores_h = sum_c compose_k[c, h] Q_h K_c^T against all components at once, and
               C_h = sum_c compose_v[c, h] (A_h V_c). Pays for Hc < H, decoding: no virtual head is ever written.
      auto     the cheap one of these.
    QK-norm is of the component keys. It does not commute with their composition: there is nothing to fold.
    """

    head_norm_by_default = True
    any_kv_heads = True
    incompressible = None

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.form = config.mea_form
        diagonal = config.compose == "diagonal"
        self.compose_k, self.compose_v = (
            nn.Parameter(torch.ones(self.n_head) if diagonal else one_hot_composition(n, self.n_head))
            for n in (self.n_k, self.n_v)
        )

    @classmethod
    def flops_per_token(cls, config, layer, T):
        n_k, n_v = config.kv_heads(layer)
        folds = n_k == n_v == config.n_head and not config.qk_norm  # once per step, whatever the tokens
        composing = 0 if folds else 6 * (n_k + n_v) * config.n_head * config.head_dim
        return super().flops_per_token(config, layer, T) + composing

    def attend(self, x, q, k, v, positions):
        w_k, w_v = self.compositions()
        form = self.choose_form(q.size(2))
        if form == "absorb":
            return absorbed_attention(q, k, v, w_k, w_v, positions, self.drop)
        if form == "compose":
            k, v = compose_heads(k, w_k), compose_heads(v, w_v)
        return causal_attention(q, k, v, positions, self.drop)

    # --- From here on: the same function, faster

    def compositions(self):
        """The composition matrices of keys (n_k, H) and of values (n_v, H)."""
        if self.config.compose != "diagonal":
            return self.compose_k, self.compose_v
        start_k, start_v = (one_hot_composition(n, self.n_head).to(self.compose_k) for n in (self.n_k, self.n_v))
        return start_k * self.compose_k, start_v * self.compose_v

    def choose_form(self, T):
        """The form in which T new positions are computed."""
        if self.form != "auto":
            return self.form
        if self.n_k == self.n_v == self.n_head and not self.config.qk_norm:
            return "fold"
        return "absorb" if T == 1 else "compose"

    def normed_heads(self, x, q, k, v, positions):
        """Where a kernel was chosen, through the entry points that hold composition, attention and norm in one."""
        T, form = q.size(2), self.choose_form(q.size(2))
        whole_sequence = T == k.size(2) and positions is None and form != "absorb"
        one_query = T == 1 and form != "compose"
        if not kernel_is_chosen() or self.drop or not (whole_sequence or one_query):
            return super().normed_heads(x, q, k, v, positions)
        gain, eps = self.head_norm.weight if self.config.head_norm else None, self.config.norm_eps
        weights = (None, None) if form == "fold" else self.compositions()
        if whole_sequence:
            y = mea_attention(q, k, v, *weights, gain, eps=eps)
        else:
            lengths = None if positions is None else positions[:, 0] + 1
            y = mea_decode(q, k, v, *weights, gain, lengths=lengths, eps=eps)
        return y.transpose(1, 2)

    def project(self, x, cache):
        """As every variant, or folded: composed keys and values (B, T, H*D). While decoding, folded once per cache."""
        if self.choose_form(x.size(1)) != "fold":
            return super().project(x, cache)
        if cache is not None and min(self.n_k, self.n_v) < self.n_head:
            here = f"{self.n_head} composed heads, and this cache has {self.n_k} and {self.n_v}"
            raise ValueError(f"mea_form 'fold' caches {here}: use 'absorb'")
        if cache is None:
            projections = self.composed_projections()
        else:
            projections = cache.projections = cache.projections or self.composed_projections()
        return tuple(F.linear(x, weight, bias) for weight, bias in projections)

    def composed_projections(self):
        """(weight (H*D, C), bias (H*D) or None) of k_proj and of v_proj with their compositions folded in (eq. 18).

        Raises ValueError with QK-norm.
        """
        if self.config.qk_norm:
            raise ValueError("QK-norm stands between the projection and the composition of keys: they do not fold")

        def compose_rows(rows, w):  # (Hc*D, C) or (Hc*D), (Hc, H) -> (H*D, C) or (H*D)
            return None if rows is None else (w.t() @ rows.view(len(w), -1)).view(-1, *rows.shape[1:])

        pairs = zip((self.k_proj, self.v_proj), self.compositions())
        return [(compose_rows(linear.weight, w), compose_rows(linear.bias, w)) for linear, w in pairs]


class Latent(Attention):
    """Attention from a low-rank cache: keys and values of all heads are linear in two short vectors per position.

    c_k = W_k x and c_v = W_v x are cached, n_k*D and n_v*D numbers. Keys and values of `config.latent_heads` heads
    (default: all) are

        K = RoPE(U_k c_k),   V = U_v c_v,

    which is what MLA caches (2405.04434), without its extra rotary head. U_k and U_v may be any matrices; keys are
    rebuilt whenever they are read: 2 n D n_k D FLOPs a cached position for every new token.
    """

    caches_rotated_keys = False
    any_kv_heads = True
    incompressible = "what it caches is compressed already"

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.n_rebuilt = config.latent_heads or config.n_head
        self.k_up_proj, self.v_up_proj = (
            nn.Linear(n * self.head_dim, self.n_rebuilt * self.head_dim, bias=False) for n in (self.n_k, self.n_v)
        )

    def rebuild_keys(self, c):
        """(B, S, n_k, D) -> (B, S, n, D)."""
        return self.k_up_proj(c.flatten(2)).unflatten(2, (-1, self.head_dim))

    def attend(self, x, q, k, v, positions):
        c_v = v.transpose(1, 2).flatten(2)  # (B, S, n_v*D); the keys (B, n, S, D) are rebuilt already
        if q.size(2) > 1 or self.drop:
            v = self.v_up_proj(c_v).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, n, S, D)
            return causal_attention(q, k, v, positions, self.drop)
        up_v = self.v_up_proj.weight.view(self.n_rebuilt, self.head_dim, -1)  # (n, D, n_v*D)
        q = q.squeeze(2).unflatten(1, (self.n_rebuilt, -1))  # (B, n, H/n, D)
        scores = (q @ k.mT).flatten(1, 2) * self.head_dim**-0.5  # (B, H, S)
        if positions is not None:
            scores = scores.masked_fill(~causal_mask(1, k.size(2), positions)[:, 0], -math.inf)
        average = scores.softmax(-1).to(c_v.dtype) @ c_v  # (B, H, n_v*D): U_v goes behind it
        return (average.unflatten(1, (self.n_rebuilt, -1)) @ up_v.mT).flatten(1, 2).unsqueeze(2)  # (B, H, 1, D)


def one_hot_composition(n_component, n_head):
    """(Hc, H) whose column h picks component h * Hc // H: the identity for Hc == H, else grouped-query attention."""
    return F.one_hot(torch.arange(n_head) * n_component // n_head, n_component).float().T.contiguous()


ATTENTION = {"mha": MHA, "tha": TalkingHeads, "dfa": DFA, "mea": MEA, "latent": Latent}
