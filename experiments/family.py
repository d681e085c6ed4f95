"""The family: published attentions in which heads meet, each a screen on the base class of `attention.py`.

    python experiments/family.py --attention knocking --out_dir out/knocking   # train.py, which then knows them
    python experiments/family.py --resume --max_steps 700 --out_dir out/knocking
    python experiments/family.py sample --checkpoint out/knocking              # so do sample.py, model.py, evaluate.py
    python experiments/sweep.py --variants mha,knocking,gated                  # sweep.py knows them by itself

Importing this file enters them in `ATTENTION`. Each takes `--head_norm` and `--n_kv_head` as the four of attention.py
do, and is cached. Read `attention.py` first: its letters (B, T, S, C, H, D) are those of the shapes here, where H is
`--n_head`, the number of outputs. To add one of your own, begin with the one here that is nearest to it.
"""

import importlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from options import run_program  # before torch

import torch
import torch.nn as nn
import torch.nn.functional as F

import runs
from attention import ATTENTION, MEA, MHA, Attention, TalkingHeads, apply_rope, one_hot_composition, rope_table
from functional import causal_attention, causal_mask, compose_heads


def gated(variant):
    """`variant` with head gates (2505.06708): C_h * sigmoid(W_g x)_h, an attention whose heads can be closed.

    Extra: W_g (C, H). The gate follows the query's token and stands behind the head norm, which would undo it.
    """

    class Gated(variant):
        def __init__(self, config, layer=0):
            super().__init__(config, layer)
            self.gate_proj = nn.Linear(config.n_embd, self.n_head // self.heads_per_output, bias=False)

        def normed_heads(self, x, *heads):
            return super().normed_heads(x, *heads) * torch.sigmoid(self.gate_proj(x)).unsqueeze(-1)  # (B, T, H, D)

    return Gated


HeadGated = gated(MHA)


class DifferentialV2(Attention):
    """Differential attention, second version (microsoft/unilm, Diff-Transformer-V2; the first is 2410.05258).

    A_h = softmax(Q_h K_g^T / sqrt(D)) V_g for 2H query heads; two neighbours read one key/value head g, and

        C_h = A_2h - sigmoid(W_l x)_h A_2h+1

    Extra: H more query heads (C, HD) and W_l (C, H). Unlike the first version (`DFA`) it has as many values as outputs,
    lambda follows the token, and there is no head norm.
    """

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.q_proj = nn.Linear(config.n_embd, 2 * self.n_head * self.head_dim, bias=config.attention_bias)
        self.lambda_proj = nn.Linear(config.n_embd, self.n_head, bias=False)

    @classmethod
    def flops_per_token(cls, config, layer, T):
        return 2 * super().flops_per_token(config, layer, T)

    def attend(self, x, q, k, v, positions):
        weight = torch.sigmoid(self.lambda_proj(x)).transpose(1, 2).unsqueeze(-1)  # (B, H, T, 1)
        y = causal_attention(q, k, v, positions, self.drop)  # (B, 2H, T, D)
        return y[:, ::2] - weight * y[:, 1::2]


class KnockingHeads(MHA):
    """Knocking-Heads attention (2510.23052, eq. 9): one small gated MLP for all value heads, then plain attention.

        V'_h = 2 (V_h W_up * sigmoid(V_h W_gate)) W_down,   C_h = softmax(Q_h K_h^T / sqrt(D)) V'_h

    Extra: three matrices (D, D), shared by all heads. W_up and W_down start as the identity and W_gate as 0, so V' = V.
    The paper's other form, one shared matrix each for Q, K and V, did worse, and maps of Q and K beside this one gained
    nothing (table 2). V' is what is cached.
    """

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.knock_up, self.knock_down = (nn.Parameter(torch.eye(self.head_dim)) for _ in range(2))
        self.knock_gate = nn.Parameter(torch.zeros(self.head_dim, self.head_dim))

    @classmethod
    def flops_per_token(cls, config, layer, T):
        return super().flops_per_token(config, layer, T) + 18 * config.kv_heads(layer)[1] * config.head_dim**2

    def project(self, x, cache):
        k, v = super().project(x, cache)
        v = v.unflatten(2, (-1, self.head_dim))  # (B, T, n, D)
        v = 2 * (v @ self.knock_up * torch.sigmoid(v @ self.knock_gate)) @ self.knock_down
        return k, v.flatten(2)


class MultiTokenHeads(Attention):
    """The head mixing of Multi-Token Attention (2504.00927): groups of heads mix their weights after the softmax.

    A_g = softmax(Q_g K_g^T / sqrt(D)),   C_f = (sum_g R[g, f] A_g) V_f   over the heads g of the group of f.

    Extra: R, `mix_weights` (H/2, 2, 2), the identity at the start. Its norm is the head norm, on by default; the
    authors' has one gain for all heads. Left out: their convolution over queries and keys, mixing before the softmax
    (`TalkingHeads`) and gate. So no map has to be written: C_f = sum_g R[g, f] (A_g V_f), where each A_g reads its
    group's values side by side, as in `DFA`. Dropout acts on A, theirs on the mix.
    """

    head_norm_by_default = True
    group = 2  # heads that are mixed

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.mix_weights = nn.Parameter(torch.eye(self.group).repeat(self.n_head // self.group, 1, 1))

    @classmethod
    def check_heads(cls, n_head, n_k, n_v):
        super().check_heads(n_head, n_k, n_v)
        if n_head % cls.group:
            raise ValueError(f"mta mixes groups of {cls.group} heads: n_head {n_head} must be divisible by it")

    @classmethod
    def flops_per_token(cls, config, layer, T):
        width = config.n_head * config.head_dim
        return 3 * T * width * (1 + cls.group) + 6 * cls.group * width

    def attend(self, x, q, k, v, positions):
        k, v = (heads.repeat_interleave(self.n_head // heads.size(1), dim=1) for heads in (k, v))  # (B, H, S, D)
        c = self.group
        v = v.unflatten(1, (-1, c)).transpose(2, 3).flatten(3)  # a group's values side by side: (B, H/c, S, c*D)
        y = [causal_attention(q[:, g::c], k[:, g::c], v, positions, self.drop) for g in range(c)]
        y = torch.stack(y, dim=2).unflatten(-1, (c, -1))  # (B, H/c, c, T, c, D): map g, value f
        return torch.einsum("bngtfd,ngf->bnftd", y, self.mix_weights.to(y.dtype)).flatten(1, 2)


class Collaborative(Attention):
    """Collaborative attention (2006.16362): heads share their queries and keys, and each weighs their features anew.

    With Q and K the n projected heads side by side, n*D wide, and m_h one weight for each of their features:

        C_h = softmax((Q * m_h) K^T / sqrt(D)) V_h

    Extra: m, `mixing` (H, n, D); the queries are n heads, too. With n = H it starts as plain attention, m_h picking
    head h, otherwise random. MEA's key composition is the case of one weight a head instead of one a feature. The
    weights act before RoPE: after it, unequal weights in a pair would make scores depend on more than distance. A score
    costs n times as much.
    """

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        n, D = self.n_k, self.head_dim
        self.q_proj = nn.Linear(config.n_embd, n * D, bias=config.attention_bias)
        own_head = torch.eye(n)[..., None].expand(-1, -1, D)
        self.mixing = nn.Parameter(own_head.clone() if n == self.n_head else torch.randn(self.n_head, n, D) / n**0.5)

    @classmethod
    def flops_per_token(cls, config, layer, T):
        return 3 * T * config.n_head * config.head_dim * (config.kv_heads(layer)[0] + 1)

    def queries(self, x):
        return (super().queries(x).unsqueeze(2) * self.mixing).flatten(2, 3)  # (B, T, H*n, D)

    def attend(self, x, q, k, v, positions):
        q = q.unflatten(1, (self.n_head, -1)).transpose(2, 3).flatten(3)  # (B, H, T, n*D)
        k = k.transpose(1, 2).flatten(2)[:, None].expand(-1, v.size(1), -1, -1)  # (B, n, S, n*D), n times the same
        return causal_attention(q * self.n_k**0.5, k, v, positions, self.drop)  # it divides by sqrt(n*D)


class Interleaved(Attention):
    """Interleaved Head Attention (2602.21371): each head attends as P pseudo-heads, which see each other.

    Q~_hp = sum_m a[m, h, p] Q_m, likewise K~ and V~, are P tokens in the place of one: position t becomes t + p/P of a
    sequence P times as long. O_hp is head h's causal attention on it, and C_h = sum_{i, p} R[i, p, h] O_ip.

    Extra: `mix_q` (H, HP), `mix_k`, `mix_v` (n, HP) and `collapse` (HP, H). Here all P start as the head, C as their
    mean, and P = 2 (the paper's is up to H), at P^2 times the scores. The paper places them at tP + p, which is the
    same with frequencies P times as slow. The n heads are cached before they are mixed: pseudo-keys are made when read.
    """

    caches_rotated_keys = False
    P = 2

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        starts = (one_hot_composition(n, self.n_head) for n in (self.n_head, self.n_k, self.n_v))
        self.mix_q, self.mix_k, self.mix_v = (nn.Parameter(w.repeat_interleave(self.P, dim=1)) for w in starts)
        self.collapse = nn.Parameter(torch.eye(self.n_head).repeat_interleave(self.P, dim=0) / self.P)

    @classmethod
    def flops_per_token(cls, config, layer, T):
        mixed, width = 2 * config.n_head + sum(config.kv_heads(layer)), cls.P * config.n_head * config.head_dim
        return cls.P**2 * super().flops_per_token(config, layer, T) + 6 * mixed * width

    def pseudo_heads(self, heads, mix):
        """(B, T, n, D), (n, HP) -> (B, T, HP, D): mixed, and turned by p/P; RoPE turns them by t."""
        slower = [frequency / self.P for frequency in self.config.frequencies]
        tables = rope_table(self.P, self.head_dim, frequencies=slower)  # (P, 1, D)
        heads = (mix.T @ heads).unflatten(2, (-1, self.P))
        return apply_rope(heads, [table[:, 0].to(heads.device) for table in tables]).flatten(2, 3)

    def queries(self, x):
        return self.q_norm(self.pseudo_heads(self.q_proj(x).unflatten(2, (-1, self.head_dim)), self.mix_q))

    def rebuild_keys(self, k):
        return self.pseudo_heads(k, self.mix_k)

    def attend(self, x, q, k, v, positions):
        interleave = lambda heads: heads.unflatten(1, (-1, self.P)).transpose(2, 3).flatten(2, 3)  # (B, H, TP, D)
        q, k, v = map(interleave, (q, k, compose_heads(v, self.mix_v)))
        if positions is not None:
            positions = (positions[:, :, None] * self.P + torch.arange(self.P, device=q.device)).flatten(1)  # (B, TP)
        y = causal_attention(q, k, v, positions, self.drop).unflatten(2, (-1, self.P))  # (B, H, T, P, D)
        return compose_heads(y.transpose(2, 3).flatten(1, 2), self.collapse)


class DynamicMaps(nn.Module):
    """Two (H, H) maps from each token for DCMHA, before the softmax and after it, in 5 numbers a head.

    W = sum_i w1_i w2_i^T + diag(tanh(x W_d)) with two pairs (w1, w2) = gelu(x W_1) W_2; w1 has rms 1 over the heads.
    """

    def __init__(self, config):
        super().__init__()
        H, C, K = config.n_head, config.n_embd, 4 * config.n_head
        self.eps, self.hidden_proj = config.norm_eps, nn.Linear(C, 2 * K, bias=False)
        # as small as the authors start them: almost no map of the token's own, yet not 0
        self.factors = nn.Parameter(torch.randn(2, K, 4 * H) * 0.02 / (math.sqrt(4 * H) * (H + 2)))
        self.gates = nn.Parameter(torch.randn(C, 2 * H) * 0.05 * math.sqrt(2 / (H + C)))

    def forward(self, x):
        """(B, T, C) -> (B, T, H, 10)."""
        hidden = F.gelu(self.hidden_proj(x)).unflatten(2, (2, -1))  # (B, T, 2, K)
        pairs = torch.einsum("btck,ckn->btcn", hidden, self.factors).unflatten(3, (4, -1))  # (B, T, 2, 4, H)
        w1 = F.rms_norm(pairs[:, :, :, :2], pairs.shape[-1:], eps=self.eps)
        gate = torch.tanh(x @ self.gates).unflatten(2, (2, 1, -1))  # (B, T, 2, 1, H)
        return torch.cat((w1, pairs[:, :, :, 2:], gate), dim=3).flatten(2, 3).transpose(2, 3)

    @staticmethod
    def matrices(numbers):
        """(B, H, T, 10) -> the two maps, (2, B, H, T, H): from head, token, to head."""
        w1, w2, gate = numbers.unflatten(3, (2, 5)).movedim(3, 0).split([2, 2, 1], dim=-1)  # (2, B, H, T, ..)
        diagonal = gate * torch.eye(numbers.size(1), device=gate.device)[:, None]
        return torch.einsum("cbhti,cbgti->cbhtg", w1, w2) + diagonal


class DCMHA(TalkingHeads):
    """Dynamically Composable Multi-Head Attention (2405.08553): Talking-Heads whose mixes follow query and key tokens.

    L_h = Q_h K_h^T / sqrt(D),   A = softmax(mask(L'))',   C_h = A_h V_h, where ' composes the heads' maps X:

        X'_g(t, s) = sum_h (W + W_q(t) + W_k(s))[h, g] X_h(t, s)

    with W the static mix of TalkingHeads (identity at the start), W_q of the query's token and W_k of the key's, of low
    rank plus a diagonal (`DynamicMaps`), and a set of its own before the softmax and after it.

    Extra: the static mixes 2 (H, H) and two DynamicMaps: W_1 (C, 8H), W_2 (2, 4H, 4H), W_d (C, 2H). A cached value head
    holds beside its value the 10 numbers that W_k takes of each head that reads it.
    """

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.query_maps, self.key_maps = DynamicMaps(config), DynamicMaps(config)

    @classmethod
    def value_width(cls, config, layer):
        return config.head_dim + 10 * config.n_head // config.kv_heads(layer)[1]

    @classmethod
    def flops_per_token(cls, config, layer, T):
        H, maps = config.n_head, 2 * (12 * config.n_embd + 216 * config.n_head) * config.n_head  # W_d; W_2, w1 w2^T
        return super().flops_per_token(config, layer, T) + 6 * T * H**2 + maps  # W_k composes as W does

    def project(self, x, cache):
        k, v = super().project(x, cache)
        v, numbers = v.unflatten(2, (self.n_v, -1)), self.key_maps(x)
        return k, torch.cat((v, numbers.reshape(*v.shape[:3], -1)), dim=-1).flatten(2)

    def attend(self, x, q, k, v, positions):
        """The numbers of query maps travel behind q and those of key maps behind v, so that blocks cut them, too."""
        v, numbers = v[..., : self.head_dim], v[..., self.head_dim :]
        numbers = numbers.unflatten(3, (-1, 10)).transpose(2, 3).flatten(1, 2)  # (B, H, S, 10)
        before, after = DynamicMaps.matrices(self.query_maps(x).transpose(1, 2))  # (B, H, T, H) each
        q = torch.cat((q, before + self.mix_logits[:, None], after + self.mix_weights[:, None]), dim=-1)
        v = v.repeat_interleave(self.n_head // self.n_v, dim=1)
        return super().attend(x, q, k, torch.cat((v, *DynamicMaps.matrices(numbers)), dim=-1), positions)

    def attend_block(self, q, k, v, positions):
        """q (B, H, T, D + 2H), k (B, H, S, D), v (B, H, S, D + 2H)."""
        widths = [self.head_dim, self.n_head, self.n_head]
        (q, *by_query), (v, *by_key) = q.split(widths, dim=-1), v.split(widths, dim=-1)

        def compose(maps, i):
            rows = torch.einsum("bhts,bhtg->bgts", maps, by_query[i])
            return rows + torch.einsum("bhts,bhsg->bgts", maps, by_key[i])

        logits = compose(q @ k.transpose(-1, -2) * self.head_dim**-0.5, 0)  # (B, H, T, S)
        logits = logits.masked_fill(~causal_mask(q.size(2), k.size(2), positions), -math.inf)
        return F.dropout(compose(logits.softmax(-1), 1), self.drop) @ v


# What combines


def composed(variant):
    """`variant` of keys and values that are composed across heads first, as MEA's are."""

    class Composed(variant):
        def __init__(self, config, layer=0):
            super().__init__(config, layer)
            self.compose_k, self.compose_v = (nn.Parameter(one_hot_composition(n, n)) for n in (self.n_k, self.n_v))

        @classmethod
        def flops_per_token(cls, config, layer, T):
            mixes = 6 * config.head_dim * sum(n * n for n in config.kv_heads(layer))
            return super().flops_per_token(config, layer, T) + mixes

        def attend(self, x, q, k, v, positions):
            k, v = compose_heads(k, self.compose_k), compose_heads(v, self.compose_v)
            return super().attend(x, q, k, v, positions)

    return Composed


FAMILY = {"gated": HeadGated, "diff2": DifferentialV2, "knocking": KnockingHeads, "mta": MultiTokenHeads}
FAMILY |= {"collaborative": Collaborative, "iha": Interleaved, "dcmha": DCMHA}
FAMILY |= {"mea_gated": gated(MEA), "diff2_gated": gated(DifferentialV2), "diff2_composed": composed(DifferentialV2)}
ATTENTION |= FAMILY

# ---------------------------------------------------------------------------------------------------------------------

PROGRAMS = {"sample": "sample", "model": "model", "evaluate": "experiments.evaluate"}


def main(argv=None):
    """train.py, or the one of PROGRAMS that the first word names, with these attentions."""
    argv = sys.argv[1:] if argv is None else argv
    program = PROGRAMS.get(argv[0]) if argv else None
    runs.PROGRAMS |= {"train": ["experiments/family.py"], "sample": ["experiments/family.py", "sample"]}
    return importlib.import_module(program or "train").main(argv[1:] if program else argv)


if __name__ == "__main__":
    run_program(main)
