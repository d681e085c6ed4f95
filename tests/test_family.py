"""Each attention of experiments/family.py is its formula, written once more as loops; generic tests run on it, too."""

import pytest
import test_attention as generic
import torch
from helpers import arguments
from test_attention import B, D, H, T, apply_rope, inputs, make, mha_formula, plain_weights, rope, rope_table
from test_train import TINY

import runs
from checkpoint import load_checkpoint
from experiments import family, sweep

future = torch.ones(T, T, dtype=torch.bool).triu(1)
group = lambda layer, h: h * layer.n_k // H  # the key/value head that head h reads

# Each is a loop over heads: layer, q, k, v (B, heads, T, D) -> the outputs of the heads before the norm.


def diff2_formula(layer, q, k, v):
    weight, outputs = torch.sigmoid(layer.lambda_proj(inputs())), []  # (B, T, H)
    for h in range(H):
        first, second = (plain_weights(q[:, i], k[:, group(layer, h)]) for i in (2 * h, 2 * h + 1))
        outputs.append((first - weight[:, :, h, None] * second) @ v[:, group(layer, h)])
    return outputs


def knocking_formula(layer, q, k, v):
    values = 2 * (v @ layer.knock_up * torch.sigmoid(v @ layer.knock_gate)) @ layer.knock_down
    return mha_formula(layer, q, k, values)


def mta_formula(layer, q, k, v):
    maps = [plain_weights(q[:, h], k[:, group(layer, h)]) for h in range(H)]
    mixed = lambda f: sum(layer.mix_weights[f // 2, g, f % 2] * maps[f - f % 2 + g] for g in range(2))
    return [mixed(f) @ v[:, group(layer, f)] for f in range(H)]


def collaborative_formula(layer, q, k, v):
    q, outputs = layer.q_proj(inputs()).view(B, T, layer.n_k, D), []
    for h in range(H):
        mine = apply_rope(q * layer.mixing[h], rope(0, T)).transpose(1, 2)
        scores = sum(mine[:, c] @ k[:, c].mT for c in range(layer.n_k)) / D**0.5
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, group(layer, h)])
    return outputs


def iha_formula(layer, q, k, v):
    """Tokens (n, p) in the order of their places n + p/2: the last that head h sees of (t, p) is itself."""
    q, k = (proj(inputs()).view(B, T, -1, D) for proj in (layer.q_proj, layer.k_proj))
    places = [[2 * n + p for n in range(T)] for p in range(2)]
    half_turns = rope_table(2 * T, D, frequencies=[10000 ** (-2 * i / D) / 2 for i in range(D // 2)])
    turned = lambda heads, p: apply_rope(heads[:, :, None], [table[places[p]] for table in half_turns])[:, :, 0]
    mix = lambda heads, w, i: sum(w[m, i] * heads[:, :, m] for m in range(len(w)))
    outputs = [0] * H
    for h in range(H):
        virtual = lambda heads, w: torch.stack([turned(mix(heads, w, 2 * h + p), p) for p in range(2)], 2).flatten(1, 2)
        values = torch.stack([mix(v.transpose(1, 2), layer.mix_v, 2 * h + p) for p in range(2)], 2).flatten(1, 2)
        scores = virtual(q, layer.mix_q) @ virtual(k, layer.mix_k).mT / D**0.5  # (B, 2T, 2T)
        later = torch.ones(2 * T, 2 * T, dtype=torch.bool).triu(1)
        y = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
        for g in range(H):
            outputs[g] = outputs[g] + sum(layer.collapse[2 * h + p, g] * y[:, p::2] for p in range(2))
    return outputs


def dynamic_map(maps, x, stage):
    """W_q or W_k of one token x (C), before the softmax (stage 0) or after it (1): (H, H)."""
    hidden = torch.nn.functional.gelu(maps.hidden_proj.weight[stage * 4 * H : (stage + 1) * 4 * H] @ x)
    w1a, w1b, w2a, w2b = (hidden @ maps.factors[stage]).view(4, H)
    w1a, w1b = (w / torch.sqrt(w.square().mean() + 1e-6) for w in (w1a, w1b))
    gate = torch.tanh(maps.gates[:, stage * H : (stage + 1) * H].T @ x)
    return torch.outer(w1a, w2a) + torch.outer(w1b, w2b) + torch.diag(gate)


def dcmha_formula(layer, q, k, v):
    outputs = torch.zeros(B, H, T, D, dtype=torch.float64)
    for row, x in enumerate(inputs()):
        maps_of = lambda side: [[dynamic_map(side, token, stage) for token in x] for stage in (0, 1)]
        w_q, w_k = maps_of(layer.query_maps), maps_of(layer.key_maps)
        for t in range(T):
            logits = torch.stack([k[row, group(layer, h), : t + 1] @ q[row, h, t] / D**0.5 for h in range(H)], dim=1)
            logits = [logits[s] @ (layer.mix_logits + w_q[0][t] + w_k[0][s]) for s in range(t + 1)]
            weights = torch.stack(logits).softmax(0)  # (t + 1, H)
            weights = [weights[s] @ (layer.mix_weights + w_q[1][t] + w_k[1][s]) for s in range(t + 1)]
            for h in range(H):
                outputs[row, h, t] = sum(weights[s][h] * v[row, group(layer, h), s] for s in range(t + 1))
    return outputs.unbind(1)


FORMULAS = {name.removesuffix("_formula"): formula for name, formula in vars().items() if name.endswith("_formula")}
del FORMULAS["mha"]


@pytest.mark.parametrize("attention", FORMULAS)
@pytest.mark.parametrize("n_kv_head,norm", [(2, False), (4, True)])
def test_every_variant_is_its_formula(attention, norm, n_kv_head):
    layer = make(attention, n_kv_head=n_kv_head, head_norm=norm)
    tolerance = 1e-7 if attention == "iha" else 1e-10  # it turns twice where the formula turns once, by float32 tables
    generic.assert_is_its_formula(layer, FORMULAS[attention], tolerance)


def test_gates_stand_behind_an_attention_and_its_norm():
    """One head at a time: those of a row's gate scale its columns of W^O, behind the norm, which would undo them."""
    for name, plain in (("gated", "mha"), ("mea_gated", "mea"), ("diff2_gated", "diff2")):
        layer, other, x = make(name, head_norm=True), make(plain, head_norm=True), inputs()
        generic.copy_shared(layer, other)
        heads = []
        other.o_proj.register_forward_pre_hook(lambda _, y: heads.append(y[0]))
        other(x, rope(0, T))
        gate = torch.sigmoid(layer.gate_proj(x)).repeat_interleave(D, dim=-1)  # (B, T, H*D)
        generic.assert_same(layer(x, rope(0, T)), layer.o_proj(heads[0] * gate))


@pytest.mark.parametrize("n_kv_head", [2, 4])
def test_keys_and_values_are_composed_in_front_of_an_attention(n_kv_head):
    """As its formula with composed heads, which is plain at the start."""
    layer, plain = make("diff2_composed", n_kv_head=n_kv_head), make("diff2", n_kv_head=n_kv_head)
    mix = lambda heads, w: torch.einsum("bctd,ch->bhtd", heads, w)
    formula = lambda layer, q, k, v: diff2_formula(layer, q, mix(k, layer.compose_k), mix(v, layer.compose_v))
    generic.assert_is_its_formula(layer, formula, 1e-10)
    for w in (layer.compose_k, layer.compose_v):
        w.data = torch.eye(n_kv_head, dtype=w.dtype)
    generic.copy_shared(layer, plain)
    generic.assert_same(layer(inputs(), rope(0, T)), plain(inputs(), rope(0, T)))


@pytest.mark.parametrize("attention", ["knocking", "mta", "collaborative", "iha"])
def test_what_starts_as_multi_head_attention(attention, monkeypatch):
    """Without head norms; interleaved heads if they are alone."""
    monkeypatch.setattr(family.Interleaved, "P", 1)
    layer, mha = make(attention, scramble=False, head_norm=False), make("mha")
    generic.copy_shared(layer, mha)
    generic.assert_same(layer(inputs(), rope(0, T)), mha(inputs(), rope(0, T)))


def test_dcmha_starts_near_multi_head_attention_and_without_maps_of_its_tokens_is_talking_heads():
    layer, mha, tha = make("dcmha", scramble=False), make("mha"), make("tha")
    for other in (mha, tha):
        generic.copy_shared(layer, other)
    x = inputs()
    near, plain = layer(x, rope(0, T)), mha(x, rope(0, T))
    assert 0 < (near - plain).norm() / plain.norm() < 0.2
    for maps in (layer.query_maps, layer.key_maps):
        torch.nn.init.zeros_(maps.factors), torch.nn.init.zeros_(maps.gates)
    for mix in (layer.mix_logits, layer.mix_weights):
        torch.nn.init.normal_(mix)
    generic.copy_shared(layer, tha)
    generic.assert_same(layer(x, rope(0, T)), tha(x, rope(0, T)))


def test_the_program_trains_resumes_and_samples(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr(runs, "PROGRAMS", dict(runs.PROGRAMS))
    out = tmp_path / "run"
    how = [TINY, "--data_dir", data, "--attention knocking --max_steps 2 --eval_windows 4"]
    family.main(arguments(*how, "--out_dir", out))
    said = capsys.readouterr().out
    assert f"python experiments/family.py sample --checkpoint {out}" in said
    assert f"python experiments/family.py --resume --max_steps 4 --out_dir {out}" in said
    family.main(arguments("--resume --max_steps 4 --out_dir", out))
    assert load_checkpoint(out)[1]["step"] == 4
    capsys.readouterr()
    family.main(arguments("sample --prompt key --max_new_tokens 5 --device cpu --checkpoint", out))
    assert capsys.readouterr().out.startswith("key")


def test_a_sweep_starts_the_program_that_knows_the_variant(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command, **_: command[1])
    programs = [sweep.start(tmp_path / name, sweep.variant_options(name)) for name in ("mea", "dcmha+norm", "mta@2")]
    started = [program.removeprefix(f"{sweep.ROOT}/") for program in programs]
    assert started == ["train.py", *["experiments/family.py"] * 2]
