"""Compression: what is exact, what alignment is for, that the cache shrinks by what is reported, and that bad input is
refused.
"""

import itertools
import json

import numpy as np
import pytest
import torch

import compress as program
import train
from attention import ATTENTION, apply_rope, rope_table
from compress import (
    METHODS,
    Mixture,
    Seen,
    align_by_rotation,
    allocate,
    approximate,
    calibrate,
    choose_ranks,
    compress,
    compress_layer,
    effective_heads,
    fit_any_maps,
    fit_in_closed_form,
    key_blocks,
    latent_maps,
    probe,
    refit_output,
    second_moments,
    uniform_ranks,
    value_blocks,
    with_ranks,
)
from data.dataset import open_dataset
from data.prepare import prepare
from data.sampler import WindowSampler
from checkpoint import load_checkpoint
from huggingface import to_pretrained
from model import GPT, GPTConfig, KVCache
from sample import open_model

BASE = dict(vocab_size=37, block_size=24, n_layer=2, n_head=4, n_embd=24)
D, C = 6, 24


def make(seed=0, **fields):
    """A model with every parameter random, so that compositions, gains and biases all matter."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**BASE, **fields})).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.25)
    return model


def tokens(*shape, seed=1):
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(seed))


def random_heads(n, seed=0, columns=C):
    return torch.randn(n, D, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rebuilt(w, turn, parts):
    """T_h sum_c w[c, h] B_c."""
    return torch.einsum("hab,ch,cbm->ham", turn, w, parts)


def random_metric(n, kind, scalar=False):
    """S of each head: the same for both halves of a key's pairs, any matrix for values, or a number."""
    if scalar:
        return random_heads(n, 3)[:, 0, 0].exp()[:, None, None] * torch.eye(D, dtype=torch.float64)
    return (
        torch.diag_embed(random_heads(n, 3)[:, : D // 2, 0].exp().repeat(1, 2))
        if kind == "k"
        else random_heads(n, 3, D)
    )


def rotation(seed):
    return torch.linalg.qr(random_heads(1, seed, D)[0]).Q


def phases(seed):
    """A head's key turned by its own angle at every rotary frequency, as a real (D, D) matrix."""
    angle = torch.rand(D // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 6.28
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)), 0)


# --- the approximation


@pytest.mark.parametrize("maps", ["none", "rotations", "any"])
@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("metric", [False, True])
def test_full_rank_is_exact(maps, kind, metric):
    weight = random_heads(5)
    moment = S = None
    if metric:
        moment = random_heads(5, 7, 30).flatten(0, 1)
        moment, S = moment @ moment.T, random_metric(5, kind, scalar=maps == "rotations")
    w, turn, parts, errors = approximate(weight, 5, kind, maps, moment, S)
    torch.testing.assert_close(rebuilt(w, turn, parts), weight, rtol=1e-8, atol=1e-8)
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("maps", ["none", "rotations", "any"])
def test_identical_heads_need_one_component(kind, maps):
    weight = random_heads(1).expand(4, D, C) * torch.tensor([1.0, -2.0, 0.5, 3.0])[:, None, None]
    w, turn, parts, errors = approximate(weight, 1, kind, maps)
    assert errors[-1] < 1e-12
    torch.testing.assert_close(rebuilt(w, turn, parts), weight)


@pytest.mark.parametrize("kind,turned", [("v", rotation), ("k", phases)])
def test_heads_that_differ_by_a_rotation_need_one_component_once_they_are_aligned(kind, turned):
    """Why alignment exists: the truncated SVD can only add heads that agree on their coordinates."""
    weight = torch.stack([turned(seed) @ random_heads(1)[0] for seed in range(4)])
    for maps, exact in (("none", False), ("rotations", True), ("any", True)):
        w, turn, parts, errors = approximate(weight, 1, kind, maps)
        assert (errors[-1] < 1e-10) == exact
        assert (rebuilt(w, turn, parts) - weight).abs().max() < 1e-4 or not exact


@pytest.mark.parametrize("kind", "kv")
def test_heads_that_differ_by_any_free_map_need_one_component(kind):
    """A value head by an invertible matrix, a key head by a size and an angle at every frequency: more than rotations
    undo.
    """
    free = (
        [random_heads(1, seed, D)[0] for seed in range(4)]
        if kind == "v"
        else [phases(seed) @ torch.diag(torch.rand(D // 2).repeat(2).double() + 0.2) for seed in range(4)]
    )
    weight = torch.stack([matrix @ random_heads(1, 9)[0] for matrix in free])
    assert approximate(weight, 1, kind, "rotations")[3][-1] > 1e-3
    assert approximate(weight, 1, kind, "any")[3][-1] < 1e-6


@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("n,rank", [(3, 2), (8, 4), (5, 1)])
def test_no_round_makes_it_worse_and_each_freedom_helps(kind, n, rank):
    heads = (key_blocks if kind == "k" else value_blocks)(random_heads(n, seed=n))
    w, turn, rotated = align_by_rotation(heads, rank)
    errors = rotated + fit_any_maps(heads, w, turn)[2]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(errors, errors[1:]))
    assert errors[-1] < 0.99 * rotated[-1] < 0.99 * errors[0] == 0.99 * align_by_rotation(heads, rank, rounds=0)[2][0]


def test_one_component_less_than_heads_reaches_the_best_there_is_at_every_frequency():
    """For n -> n-1, complex numbers per head and frequency lose nothing to an SVD of each frequency by itself."""
    heads = key_blocks(random_heads(3, seed=4, columns=40))
    best = torch.linalg.svdvals(heads[:, :, 0].transpose(0, 1))[:, 2].square().sum() / heads.abs().square().sum()
    w, turn, _ = align_by_rotation(heads, 2)
    assert fit_any_maps(heads, w, turn, rounds=3000, tolerance=1e-9)[2][-1] == pytest.approx(best.item(), rel=1e-2)


@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("n,rank", [(3, 2), (4, 3), (3, 1), (5, 1), (2, 1)])
def test_the_closed_form_reaches_the_bound_and_the_iteration_does_no_better(kind, n, rank):
    heads = (key_blocks if kind == "k" else value_blocks)(random_heads(n, seed=n, columns=40))
    w, turn, error, least = fit_in_closed_form(heads, rank)
    lost = torch.linalg.svdvals(heads.transpose(0, 1).flatten(1, 2))[:, rank * heads.size(2) :].square().sum()
    assert error == pytest.approx(least, rel=1e-6)
    assert least == pytest.approx((lost / heads.abs().square().sum()).item(), rel=1e-6)
    start = align_by_rotation(heads, rank)
    assert fit_any_maps(heads, *start[:2])[2][-1] > 0.999 * error


@pytest.mark.parametrize("kind", "kv")
def test_one_component_is_the_least_error_in_the_metric(kind):
    """Against (1) solved with the metric applied by hand, and better in it than without it."""
    weight, S = random_heads(4), random_metric(4, kind)
    cost = lambda maps: (S @ (weight - rebuilt(*maps))).square().sum()
    weighted, plain = (approximate(weight, 1, kind, "any", metric=metric) for metric in (S, None))
    assert cost(weighted[:3]) < 0.99 * cost(plain[:3])
    assert weighted[3][-1] == pytest.approx((cost(weighted[:3]) / (S @ weight).square().sum()).item(), rel=1e-6)


@pytest.mark.parametrize("metric", [False, True])
def test_a_latent_is_the_best_of_its_width_and_no_virtual_heads_beat_it(metric):
    weight, moment = random_heads(4), random_heads(4, 7, 60).flatten(0, 1)
    moment, S = moment @ moment.T, random_metric(4, "k") if metric else None
    down, up, error = latent_maps(weight, 2 * D, "v", moment, S)[:3]
    assert down.shape == (2 * D, C) and up.shape == (4 * D, 2 * D)
    torch.testing.assert_close(up @ down @ torch.linalg.pinv(down), up)  # a projection
    for kind in "kv":
        assert error < approximate(weight, 2, kind, "any", moment, S)[3][-1]
    lost = torch.eye(4 * D, dtype=torch.float64) - up @ torch.linalg.pinv(up.T @ (M := S_squared(S)) @ up) @ up.T @ M
    root = torch.linalg.cholesky(M).T
    assert error == pytest.approx(((root @ lost @ moment @ lost.T @ root.T).trace() / (M @ moment).trace()).item())


def S_squared(S):
    return torch.eye(4 * D, dtype=torch.float64) if S is None else torch.block_diag(*S).T @ torch.block_diag(*S)


def test_the_truncated_svd_is_the_best_of_its_kind():
    heads = value_blocks(random_heads(5))
    singular = torch.linalg.svdvals(heads.flatten(1))
    assert align_by_rotation(heads, 3, rounds=0)[2][-1] == pytest.approx(
        (singular[3:].square().sum() / singular.square().sum()).item()
    )


@pytest.mark.parametrize("maps", ["none", "rotations", "any"])
@pytest.mark.parametrize("kind", "kv")
def test_the_reported_error_is_what_is_missing_at_the_end(kind, maps):
    weight = random_heads(5, seed=3)
    w, turn, parts, errors = approximate(weight, 3, kind, maps)
    missed = (weight - rebuilt(w, turn, parts)).square().sum() / weight.square().sum()
    assert (
        missed.item() <= errors[-1] * (1 + 1e-9)
        and errors[-1] == pytest.approx(missed.item(), rel=1e-3)
        and (len(errors) == 1) == (maps == "none")
    )


def test_a_keys_map_commutes_with_rope():
    turn, rope = phases(3), tuple(table.double() for table in rope_table(9, D))
    x = random_heads(1, 5, 9)[0].T.view(1, 9, 1, D)
    torch.testing.assert_close(apply_rope(x @ turn.T, rope), apply_rope(x, rope) @ turn.T)


# --- models

SOURCES = {
    "mha": dict(attention="mha"),
    "mha + norm": dict(attention="mha", head_norm=True),
    "gqa": dict(attention="mha", n_kv_head=2),
    "biases": dict(attention="mha", attention_bias=True, n_kv_head=2),
    "mea": dict(attention="mea"),
    "mea, no norm": dict(attention="mea", head_norm=False),
    "mea, 3 components": dict(attention="mea", n_kv_head=3),
}
QK_NORM = dict(attention="mha", qk_norm=True, n_kv_head=4)


def change(model, ranks, method, x):
    before = model(x)[0]
    errors = compress(model, ranks, method, calibrate(model, tokens(6, 24, seed=3)))
    return ((model(x)[0] - before).norm() / before.norm()).item(), errors


@pytest.mark.parametrize("method", [method for method in METHODS if method != "pooled"])
@pytest.mark.parametrize("source", SOURCES)
def test_heads_that_fit_in_fewer_components_are_compressed_without_a_change(source, method):
    """Heads that are mixtures of two need two components, whatever the metric."""
    model = make(**SOURCES[source])
    generator = torch.Generator().manual_seed(8)
    for block in model.layers:
        a = block.self_attn
        mixture = None
        for name in ("k_proj", "v_proj"):
            for parameter in getattr(a, name).parameters():
                heads = parameter.data.double().view(-1, D, *parameter.shape[1:])
                mixture = (
                    torch.randn(len(heads), 2, generator=generator, dtype=torch.float64)
                    if parameter.dim() == 2
                    else mixture
                )
                heads[:] = torch.einsum("hc,c...->h...", mixture, heads[:2])
                parameter.data.copy_(heads.view_as(parameter))
    assert change(model, [(2, 2)] * 2, method, tokens(2, 24))[0] < 2e-5
    assert model.config.kv_heads(1) == (2, 2)


@pytest.mark.parametrize("source", ["mha", "gqa", "biases", "mea, no norm", "mha + norm", "mea"])
def test_heads_that_are_turned_copies_of_one_are_compressed_to_one_without_a_change(source):
    """The maps really are undone: for keys in the queries, for values in W^O, behind a norm and its gain, with biases
    and groups.
    """

    def turned():
        model = make(**SOURCES[source])
        for block in model.layers:
            a = block.self_attn
            if hasattr(a, "compose_k"):
                a.compose_k.data, a.compose_v.data = torch.eye(4), torch.eye(4)
            for name, turn in (("k_proj", phases), ("v_proj", rotation)):
                for parameter in getattr(a, name).parameters():
                    heads = parameter.data.double().view(-1, D, *parameter.shape[1:])
                    copies = torch.stack(
                        [torch.einsum("ab,b...->a...", turn(seed), heads[0]) for seed in range(len(heads))]
                    )
                    parameter.data.copy_(copies.view_as(parameter))
        return model

    x = tokens(2, 24)
    for method, tolerance in (("rotated", 1e-4), ("aligned", 1e-4)):
        assert change(turned(), [(1, 1)] * 2, method, x)[0] < tolerance
    assert change(turned(), [(1, 1)] * 2, "calibrated", x)[0] > 0.05


@pytest.mark.parametrize("source", ["mha", "gqa", "mea", "mha + norm"])
def test_every_method_sees_more_than_the_one_before(source):
    x = tokens(4, 24, seed=3)
    changes, n = {}, make(**SOURCES[source]).config.kv_heads(0)[0]
    for method in METHODS:
        changes[method] = change(make(**SOURCES[source]), [(n // 2, n // 2)] * 2, method, x)[0]
    assert changes["aligned"] < 0.9 * changes["svd"] and changes["rotated"] < changes["svd"]


@pytest.mark.parametrize("method", ["whitened", "latent", "absorbed"])
@pytest.mark.parametrize("source", [*SOURCES, "qk norm"])
def test_a_latent_of_full_width_is_the_original(source, method):
    if source == "qk norm" and method == "absorbed":
        with pytest.raises(ValueError, match="qk_norm stands between"):
            with_ranks(GPTConfig(**BASE, **QK_NORM), [(4, 4)] * 2, method)
        return
    model = make(**SOURCES.get(source, QK_NORM))
    whole = model.config.kv_heads(0)
    assert change(model, [whole] * 2, method, tokens(2, 24))[0] < 1e-5
    assert model.config.attention == "latent" and model.config.kv_heads(0) == whole


CACHED = [*itertools.product(SOURCES, ("aligned", "latent", "absorbed")), ("qk norm", "latent")]  # else keys stay


@pytest.mark.parametrize("source,method", CACHED)
def test_a_compressed_model_decodes_from_a_cache_of_exactly_its_bytes(source, method):
    model = make(**SOURCES.get(source, QK_NORM))
    n = model.config.kv_heads(0)[0]
    before = KVCache(model.config, 3, 20).nbytes
    compress(model, [(1, n), (n - 1, 1)], method, calibrate(model, tokens(4, 24, seed=3)))
    cache = KVCache(model.config, 3, 20)
    assert cache.nbytes == 3 * 20 * model.config.kv_bytes_per_token() == before * (2 * n + 1) // (4 * n)
    x = tokens(3, 20)
    pieces = [model(part, cache=cache)[0] for part in (x[:, :7], *x[:, 7:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(x)[0], rtol=1e-3, atol=1e-4)
    if method != "aligned":
        assert "compressed already" in ATTENTION["latent"].incompressible
        with pytest.raises(ValueError, match="cannot be exported"):
            to_pretrained(model, "nowhere")


@pytest.mark.parametrize("metric", [False, True])
def test_keys_by_frequency_commute_with_rope_and_keep_the_most_they_can(metric):
    """As many numbers for every frequency are the closed form of virtual heads; freely spread they lose less."""
    weight, moment, S = random_heads(3), None, random_metric(3, "k") if metric else None
    down, up, error, pairs = latent_maps(weight, 2 * D, "k", moment, S)
    x = torch.randn(7, C, dtype=torch.float64)
    tables = [table.double() for table in rope_table(7, D)]
    columns = torch.cat((pairs, pairs + D // 2))
    cached = apply_rope((x @ down.T)[None, :, None], tuple(table[..., columns] for table in tables))[0, :, 0]
    rotated_after = apply_rope((x @ down.T @ up.T).view(1, 7, 3, D), tables).flatten(2)[0]
    torch.testing.assert_close(cached @ up.T, rotated_after)
    assert error <= approximate(weight, 2, "k", "any", moment, S)[3][-1] + 1e-12
    assert latent_maps(weight, 2 * D, "v", moment, S)[2] < error
    assert latent_maps(weight, 3 * D, "k", moment, S)[2] < 1e-12


def test_a_part_of_a_head_can_be_kept():
    fields = dict(attention="mha", n_embd=64, n_head=4)  # heads of 16, quarters of 4
    config = with_ranks(GPTConfig(**{**BASE, **fields}), [(9, 7)] * 2, "absorbed")
    assert config.cached_dim == 4 and config.kv_bytes_per_token() == 2 * 16 * 4 * 4
    assert uniform_ranks(GPTConfig(**{**BASE, **fields}), 0.5, method="absorbed") == [(9, 7)] * 2
    model = make(**fields)
    assert change(model, [(9, 7)] * 2, "absorbed", tokens(4, 24, seed=3))[0] < 1
    assert len(set(torch.bincount(model.layers[0].self_attn.pairs, minlength=8).tolist())) > 1


@pytest.mark.parametrize("source", ["mha", "mha + norm", "biases"])
def test_latents_lose_less_than_virtual_heads_of_the_same_bytes(source):
    """The more maps are allowed, the less of a layer is lost; what the model makes of it follows for latents only."""
    x, n = tokens(4, 24, seed=3), make(**SOURCES[source]).config.kv_heads(0)[0]
    changes, errors = {}, {}
    for method in ("aligned", "absorbed", "latent"):
        changes[method], lost = change(make(**SOURCES[source]), [(n // 2, n // 2)] * 2, method, x)
        errors[method] = lost[0]
    assert changes["latent"] < changes["aligned"]
    for kind in "kv":
        assert errors["latent"][kind] <= errors["absorbed"][kind] + 1e-9 <= errors["aligned"][kind] + 2e-9


@pytest.mark.parametrize("source", SOURCES)
def test_layers_that_keep_their_heads_do_not_change(source):
    model, x = make(**SOURCES[source]), tokens(2, 24)
    full = model.config.kv_heads(0)
    assert change(model, [full] * 2, "aligned", x)[0] < 1e-6 and model.config.attention == "mea"
    model = make(**SOURCES[source])
    assert change(model, [full, (1, full[1])], "aligned", x)[1][0] == {"k": 0.0, "v": 0.0}


def test_keys_behind_a_qk_norm_stay_and_values_are_compressed():
    fields = QK_NORM
    assert uniform_ranks(GPTConfig(**BASE, **fields), 0.75) == [(4, 2)] * 2
    with pytest.raises(ValueError, match="QK-norm stay.*0.625, 0.75, 0.875, 1 are possible"):
        uniform_ranks(GPTConfig(**BASE, **fields), 0.5)
    assert (
        change(make(**fields), [(4, 2)] * 2, "aligned", tokens(4, 24, seed=3))[0]
        < change(make(**fields), [(4, 2)] * 2, "svd", tokens(4, 24, seed=3))[0]
    )
    costs = probe(make(**fields), "aligned", tokens(2, 24), (tokens(2, 24).numpy(), tokens(2, 24).numpy()))
    assert all(keys == 4 for keys, _ in choose_ranks(GPTConfig(**BASE, **fields), 0.75, "probe", costs))


def test_the_moments_are_of_keys_of_queries_and_of_values_as_attention_averages_them():
    model = make(attention="mha", n_kv_head=2, attention_bias=True)
    attn, rope, x = model.layers[0].self_attn, rope_table(24, D, model.config.rope_theta), torch.randn(3, 24, C)
    views = [second_moments(attn, x, rope, view) for view in (0, 1)]  # two query heads share a key head
    moments = {name: sum(view[name] for view in views) / 2 for name in views[0]}
    heads = lambda projection: projection(x).view(3, 24, -1, D).double()
    q, k, v = heads(attn.q_proj), heads(attn.k_proj), heads(attn.v_proj)
    distinct = k.flatten(2)
    torch.testing.assert_close(moments["k"], torch.einsum("btm,btn->mn", distinct, distinct) / 72, rtol=1e-5, atol=1e-5)
    energy = (q[..., : D // 2].square() + q[..., D // 2 :].square()).mean((0, 1))  # (H, D/2)
    torch.testing.assert_close(moments["q"], torch.stack((energy[:2].sum(0), energy[2:].sum(0))), rtol=1e-5, atol=1e-5)
    turned = lambda y: apply_rope(y.float(), rope).double()
    scores = torch.einsum("bthd,bshd->bhts", turned(q), turned(k).repeat_interleave(2, 2)) / D**0.5
    maps = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf).softmax(-1)  # (B, H, T, S)
    seen = torch.einsum("bhts,bsn->bhtn", maps, v.flatten(2)).flatten(0, 2)
    torch.testing.assert_close(moments["v"], seen.T @ seen / len(seen), rtol=1e-4, atol=1e-5)


def test_the_output_is_refitted_from_fewer_positions_than_it_has_columns():
    model = make(attention="mha")
    rope, x = rope_table(4, D, model.config.rope_theta), torch.randn(1, 4, C)
    attn = model.layers[0].self_attn
    smaller, errors = compress_layer(
        attn,
        GPTConfig(**{**BASE, "attention": "mea", "head_norm": False, "n_kv_head": [[2, 2]] * 2}),
        0,
        "rotated",
    )
    for kind in "kv":
        assert errors[kind] == approximate(effective_heads(attn, kind)[0], 2, kind, "rotations")[3][-1]
    before = [(attn(y, rope) - smaller(y, rope)).square().mean().item() for y in (x, torch.randn(50, 4, C))]
    refit_output(smaller, Seen({}, [x], [attn(x, rope)], rope, torch.float32))
    after = [(attn(y, rope) - smaller(y, rope)).square().mean().item() for y in (x, torch.randn(50, 4, C))]
    assert (
        after[0] < 0.2 * before[0] and after[1] < 2 * before[1]
    )  # and what the four positions do not show hardly moves


def test_equal_heads_are_found_once():
    attn = make(attention="mha", n_kv_head=2).layers[0].self_attn
    heads, reader = effective_heads(attn, "k")
    weight = attn.k_proj.weight.double().view(2, D, C)
    torch.testing.assert_close(heads[reader], weight[[0, 0, 1, 1]])
    assert len(heads) == 2 and reader.tolist() == [0, 0, 1, 1]


# --- budgets


def test_budgets_are_the_papers_and_a_ratio_must_be_a_number_of_heads():
    config = GPTConfig(**{**BASE, "n_layer": 8, "attention": "mha"})
    assert uniform_ranks(config, 0.5) == [(2, 2)] * 8
    assert uniform_ranks(config, 0.375) == [(2, 1)] * 8  # the odd one is a key head: keys are dearer
    assert uniform_ranks(config, 0.5, "deep") == [(4, 4)] * 3 + [(2, 2)] * 5
    assert uniform_ranks(config, 0.5, "middle") == [(4, 4)] * 2 + [(2, 2)] * 4 + [(4, 4)] * 2
    assert uniform_ranks(config, 0.375, method="latent") == [(1, 2)] * 8  # of a latent the other way round
    assert uniform_ranks(config, 0.372) == uniform_ranks(config, 0.375) != uniform_ranks(config, 0.25)
    three = GPTConfig(**{**BASE, "n_head": 6, "n_kv_head": 3, "attention": "mha"})
    assert uniform_ranks(three, 0.6667) == uniform_ranks(three, 0.67) == uniform_ranks(three, 2 / 3) == [(2, 2)] * 2
    for wrong in (0.3, 0.125, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match="0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1 are possible"):
            uniform_ranks(config, wrong)
    uneven = GPTConfig(**{**BASE, "n_layer": 1, "n_kv_head": [[4, 1]]})
    assert uniform_ranks(uneven, 0.6) == [(2, 1)] and uniform_ranks(uneven, 0.8) == [(3, 1)]


def test_allocation_is_the_cheapest_of_all():
    generator = torch.Generator().manual_seed(0)
    costs = {
        (layer, kind): sorted(torch.rand(3, generator=generator).tolist(), reverse=True)
        for layer in range(2)
        for kind in "kv"
    }
    for heads in range(4, 13):
        every = [ranks for ranks in itertools.product((1, 2, 3), repeat=4) if sum(ranks) == heads]
        price = lambda ranks: sum(cost[rank - 1] for cost, rank in zip(costs.values(), ranks))
        chosen = [rank for pair in allocate(costs, heads) for rank in pair]
        assert sum(chosen) == heads and price(chosen) == pytest.approx(min(map(price, every)))


def test_a_probe_measures_what_compressing_one_layer_costs():
    model, windows = make(attention="mha"), (tokens(3, 20, seed=5).numpy(), tokens(3, 20, seed=6).numpy())
    x, y = map(torch.from_numpy, windows)
    calibration, before = tokens(4, 24, seed=3), {name: w.clone() for name, w in model.state_dict().items()}
    assert probe(model, "svd", None, windows)[1, "v"][0] != 0.0  # without data, too
    costs = probe(model, "aligned", calibration, windows)
    assert (
        all(torch.equal(w, before[name]) for name, w in model.state_dict().items()) and model.config.attention == "mha"
    )
    base = model(x, y)[1].item()
    for layer, kind, rank in ((0, "k", 1), (1, "v", 2)):
        one = make(attention="mha")
        ranks = [(4, 4), (4, 4)]
        ranks[layer] = (rank, 4) if kind == "k" else (4, rank)
        compress(one, ranks, "aligned", calibrate(one, calibration))
        assert costs[layer, kind][rank - 1] == pytest.approx(one(x, y)[1].item() - base, abs=1e-5)
        assert costs[layer, kind][3] == 0.0


# --- the program


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trained")
    for attention in ("mha", "dfa"):
        how = f"--preset tiny --max_steps 40 --dtype float32 --threads 1 --attention {attention}"
        train.main([*how.split(), f"--data_dir={data}", f"--out_dir={folder / attention}"])
    return folder


def run(options):
    small = "" if "--export" in options else " --eval_windows 4 --calibration_windows 4 --threads 1"
    program.main((options + small).split())


def test_the_program_reports_what_it_made(trained, tmp_path, capsys):
    out = tmp_path / "half"
    how = "--budget probe --probe_windows 2 --curve 1.0,0.5,0.25 --heal_steps 3 --continue_original --rows 2"
    run(f"--checkpoint {trained / 'mha'} --out_dir {out} {how}")
    printed, report = capsys.readouterr().out, json.loads((out / "report.json").read_text())
    model, state = load_checkpoint(out)
    assert report["kv_bytes_per_token"]["after"] * 2 == report["kv_bytes_per_token"]["before"] == 2 * 2 * 32 * 4
    cache = KVCache(model.config, 2, report["cache"]["context"])
    assert cache.nbytes == report["cache"]["bytes"]["after"] and report["kv_ratio"] == 0.5
    assert report["ranks"] == model.config.n_kv_head and sum(map(sum, report["ranks"])) == 8
    assert report["loss"].keys() == {"before", "after", "healed", "continued"} == report["bpb"].keys()
    assert "cached bytes per token" in printed and len(report["errors"]) == 2
    assert [point["kv_ratio"] for point in report["curve"]] == [1.0, 0.5, 0.25]
    assert report["curve"][0]["loss"] == pytest.approx(report["loss"]["before"], abs=1e-4)
    assert report["curve"][1]["loss"] == pytest.approx(report["loss"]["after"], abs=1e-5)
    assert (out / "report.png").stat().st_size > 10_000 and "report.png" in printed
    with pytest.raises(SystemExit):  # a compressed checkpoint is weights, not a run to go on with
        train.main(["--resume", "--out_dir", str(out)])
    capsys.readouterr()
    import sample

    for extra in ([], ["--no_cache"]):
        how = "--prompt head --temperature 0 --max_new_tokens 40"
        sample.main(["--checkpoint", str(out), *how.split(), *extra])
    cached, uncached = capsys.readouterr().out.splitlines()
    assert cached == uncached and cached.startswith("head")
    how = "--context 3 --budget probe --probe_windows 2 --heal_steps 2 --distill --heal_params compose"
    run(f"--checkpoint {out} --out_dir {tmp_path / 'again'} {how}")
    again, _ = load_checkpoint(tmp_path / "again")
    assert again.config.kv_bytes_per_token() * 2 == model.config.kv_bytes_per_token()


def test_a_probe_looks_at_windows_that_calibrated_nothing(trained, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def look(model, method, tokens, few, dtype):
        x, y = few
        assert len(tokens) == 4 and x.shape == y.shape == (3, tokens.shape[1]) and (x[:, 1:] == y[:, :-1]).all()
        assert not any((row == tokens.numpy()).all(1).any() for row in x)
        raise Seen

    monkeypatch.setattr(program, "probe", look)
    with pytest.raises(Seen):
        run(f"--checkpoint {trained / 'mha'} --out_dir {tmp_path / 'o'} --budget probe --probe_windows 3")


def test_windows_are_spread_evenly_over_several_texts():
    texts = [np.arange(start, start + 200, dtype=np.uint16) for start in (0, 1000, 2000)]
    alone = [WindowSampler(text, 16, 5).batch(0, 4) for text in texts]
    x, y = Mixture(texts, 16, 5, start=(7,)).batch(0, 9)
    assert (x[:, 1:] // 1000 == np.arange(9)[:, None] % 3).all() and (x[:, 0] == 7).all()
    for text, (inputs, targets) in enumerate(alone):
        assert (x[text::3, 1:] == inputs[:3, 1:]).all() and (y[text::3] == targets[:3]).all()
    later = Mixture(texts, 16, 5).batch(1, 3)  # the next rows, not the same again
    assert (later[1] == y[3:6]).all()


def test_calibration_on_several_texts_is_reported_on_each(trained, data, tmp_path, capsys):
    from data.dataset import open_dataset as opened

    text = opened(data).tokenizer.decode(opened(data).train[:20_000].tolist())
    (tmp_path / "other.txt").write_text(text.upper())
    prepare(source=str(tmp_path / "other.txt"), tokenizer=str(data), out_dir=tmp_path / "other")
    both = f"{data},{tmp_path / 'other'}"
    run(f"--checkpoint {trained / 'mha'} --out_dir {tmp_path / 'half'} --calibration_data {both} --method latent")
    report = json.loads((tmp_path / "half" / "report.json").read_text())
    assert list(report["texts"]) == [str(data), str(tmp_path / "other")]
    assert report["texts"][str(data)] == report["loss"] and report["options"]["calibration_data"] == both
    assert all(losses.keys() == {"before", "after"} for losses in report["texts"].values())
    assert load_checkpoint(tmp_path / "half")[0].config.attention == "latent"
    wrong = f"--checkpoint {trained / 'mha'} --calibration_data {data},{tmp_path / 'none'} --out_dir {tmp_path / 'no'}"
    assert "no data set at" in refused(capsys, wrong)


def test_healing_that_is_stopped_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch, capsys):
    how = f"--checkpoint {trained / 'mha'} --method absorbed --heal_steps 8 --heal_checks 4 --distill"
    run(f"{how} --out_dir {tmp_path / 'whole'}")
    saved = program.save_checkpoint

    def stop(folder, state):
        saved(folder, state)
        if state.get("healing") and state["healing"]["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(program, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        run(f"{how} --out_dir {tmp_path / 'stopped'}")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "stopped")[0].config.attention == "latent"  # usable as it is
    program.main(["--resume", "--out_dir", str(tmp_path / "stopped"), "--threads", "1"])
    whole, stopped = (load_checkpoint(tmp_path / name)[0].state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(w, stopped[name]) for name, w in whole.items())
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "stopped")]
    assert [point["step"] for point in reports[0]["healing"]] == [2, 4, 6, 8]
    assert [p["loss"] for p in reports[0]["healing"]] == [p["loss"] for p in reports[1]["healing"]]
    assert "is not waiting to be healed" in refused(capsys, f"--resume --out_dir {tmp_path / 'stopped'}")
    assert "leave out method" in refused(capsys, f"--resume --method svd --out_dir {tmp_path / 'whole'}")


@pytest.mark.parametrize("chosen,moves", [("compose", "compose_"), ("attention", "self_attn"), ("all", "")])
def test_healing_moves_only_what_it_may_and_lowers_the_loss(trained, data, chosen, moves):
    model, _ = load_checkpoint(trained / "mha")
    compress(model, [(1, 1)] * 2, "svd")
    before = {name: w.clone() for name, w in model.named_parameters()}
    losses, o = [], program.Options(heal_params=chosen, heal_learning_rate=3e-3, batch_size=4)
    program.heal(
        model, WindowSampler(open_dataset(data).train, 32, 0), o, 20, report=lambda _, loss, __: losses.append(loss)
    )
    moved = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
    assert moved and moved == {name for name in before if moves in name}
    assert (
        sum(losses[-5:]) < sum(losses[:5]) and all(p.requires_grad for p in model.parameters()) and not model.training
    )


def test_distillation_moves_the_model_towards_its_teacher_and_leaves_that_alone(trained, data):
    teacher, _ = load_checkpoint(trained / "mha")
    model, _ = load_checkpoint(trained / "mha")
    compress(model, [(1, 1)] * 2, "svd")
    before = {name: w.clone() for name, w in teacher.state_dict().items()}
    losses, o = [], program.Options(heal_learning_rate=3e-3, batch_size=4)
    program.heal(
        model, WindowSampler(open_dataset(data).train, 32, 0), o, 20, teacher, lambda _, loss, __: losses.append(loss)
    )
    assert losses[-1] < 0.7 * losses[0] and all(
        torch.equal(w, before[name]) for name, w in teacher.state_dict().items()
    )


def refused(capsys, options):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        program.main(options.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_bad_input_is_refused_in_one_line_and_nothing_is_lost(trained, tmp_path, capsys, data):
    out, mha = tmp_path / "out", trained / "mha"
    for wrong, said in (
        (f"--checkpoint {mha} --kv_ratio 0.3", "0.25, 0.375, 0.5, 0.625"),
        (f"--checkpoint {trained / 'dfa'}", "share one value"),
        (f"--checkpoint {tmp_path / 'none'}", "no checkpoint at"),
        (f"--checkpoint {mha} --budget deep", "leaves none of 2 layers"),
        (f"--checkpoint {mha} --distill", "give --heal_steps"),
        (f"--checkpoint {mha} --heal_params compose", "give --heal_steps"),
        (f"--checkpoint {mha} --probe_windows 3", "are for --budget probe"),
        (f"--checkpoint {mha} --export hf --overwrite", "leave out overwrite"),
        (f"--checkpoint {mha} --context 100000", "context must be between"),
        (f"--checkpoint {mha} --curve 1,x", "curve must be"),
    ):
        assert said in refused(capsys, f"{wrong} --out_dir {out}")
    assert not out.exists()
    out.mkdir()
    (out / "notes").write_text("mine")
    assert "compress.py did not make it" in refused(capsys, f"--checkpoint {mha} --overwrite --out_dir {out}")
    assert "did not make it" in refused(capsys, f"--checkpoint {mha} --overwrite --out_dir {mha}")
    assert (out / "notes").read_text() == "mine" and (mha / "checkpoint.pt").exists()
    run(f"--checkpoint {mha} --out_dir {tmp_path / 'made'}")
    made = (tmp_path / "made" / "checkpoint.pt").read_bytes()
    assert "--overwrite" in refused(capsys, f"--checkpoint {mha} --out_dir {tmp_path / 'made'}")
    assert (tmp_path / "made" / "checkpoint.pt").read_bytes() == made


def test_a_pretrained_folder_is_compressed_directly_and_exported(trained, tmp_path, capsys, data):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    shape = dict(vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_key_value_heads=3, max_position_embeddings=64)
    )
    theirs.save_pretrained(tmp_path / "hf")
    assert "give --data_dir" in refused(capsys, f"--checkpoint {tmp_path / 'hf'}")
    run(f"--checkpoint {tmp_path / 'hf'} --data_dir {data}")
    model, _ = load_checkpoint(tmp_path / "hf-kv0.5")
    assert model.config.n_kv_head == [[2, 1], [2, 1]]
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert "has no weights" in refused(capsys, f"--checkpoint {tmp_path / 'hf'} --data_dir {data} --overwrite")
    run(f"--checkpoint {trained / 'mha'} --export hf --out_dir {tmp_path / 'exported'}")
    x = torch.randint(257, (2, 30))
    ours, _ = load_checkpoint(trained / "mha")
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
        torch.testing.assert_close(theirs(x).logits, ours(x)[0], rtol=1e-4, atol=1e-4)
    composed = f"--checkpoint {tmp_path / 'hf-kv0.5'} --export hf --out_dir {tmp_path / 'no'}"
    assert "only a full set of components" in refused(capsys, composed)


def test_a_start_of_text_survives_compression(tmp_path):
    """Four equal key/value heads lose nothing at half the cache, so the text that follows a prompt stays, too."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = ["The", "old", "red", "dog", "fox", "ran", "to", "hill", "town", "."]
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    (tmp_path / "hf").mkdir()
    inner.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    torch.manual_seed(0)
    shape = dict(vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.3)
    )
    for layer in theirs.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data = projection.weight.data.view(4, 8, 32)[:1].expand(4, 8, 32).reshape(32, 32).clone()
    theirs.save_pretrained(tmp_path / "hf")
    text = " ".join(words[i * i % 10] for i in range(4000))
    (tmp_path / "text.txt").write_text(text)
    prepare(source=str(tmp_path / "text.txt"), tokenizer=f"hf:{tmp_path / 'hf'}", out_dir=tmp_path / "set")
    run(f"--checkpoint {tmp_path / 'hf'} --data_dir {tmp_path / 'set'} --out_dir {tmp_path / 'half'} --block_size 16")
    texts = []
    for name in ("hf", "half"):
        model, tokenizer, start, stop = open_model(tmp_path / name, "cpu")
        assert start == (0,) and 1 in stop
        prompt = [*start, *tokenizer.encode("The")]
        texts.append(model.generate([prompt], 90, temperature=0, stop_tokens=stop, keep=1))  # beyond the 64 of a block
    assert texts[0] == texts[1]
