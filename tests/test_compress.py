"""Compression: what is exact, what alignment is for, that the cache shrinks as reported; bad input is refused."""

import copy
import itertools
from functools import partial
import json
import math
import shlex

import helpers
import pytest
import torch
from helpers import SHAPE as BASE
from helpers import raises, save_sentencepiece, theirs, tokens

import compress as program
import huggingface
import train
from attention import ATTENTION, apply_rope, one_hot_composition, rope_table
from compress import allocate, calibrate, choose_ranks, compress, probe, uniform_ranks, with_ranks
from data.dataset import open_dataset
from data.sampler import validation_windows
from data.prepare import prepare
from checkpoint import load_checkpoint
from lowrank import approximate, shared_pairs
from model import GPTConfig, KVCache
from options import choose_dtype
from sample import open_model
from surgery import METHODS, Calibration, choose_groups, compress_layer, effective_heads, join_heads, refit_output
from surgery import second_moments
from test_lowrank import phases, rotation

D, C = 6, 24
make = partial(helpers.make, std=0.25)


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


BY_HEADS = [method for method in METHODS if method != "gqa"]  # whose ranks are numbers of heads


def change(model, ranks, method, x, kv_groups=None):
    before = model(x)[0]
    errors = compress(model, ranks, method, calibrate(model, tokens(6, 24, seed=3)), kv_groups)
    return ((model(x)[0] - before).norm() / before.norm()).item(), errors


def change_heads(model, change):
    """The key and value heads (n, D, ..) of every layer, weights and biases, become change(kind, heads)."""
    for block in model.layers:
        for kind in "kv":
            for parameter in getattr(block.self_attn, f"{kind}_proj").parameters():
                heads = parameter.data.double().view(-1, D, *parameter.shape[1:])
                parameter.data.copy_(change(kind, heads).view_as(parameter))


@pytest.mark.parametrize("method", BY_HEADS)
@pytest.mark.parametrize("source", SOURCES)
def test_heads_that_fit_in_fewer_components_are_compressed_without_a_change(source, method):
    """Heads that are mixtures of two need two components, whatever the metric."""

    def mix(kind, heads):
        mixture = torch.randn(len(heads), 2, generator=torch.Generator().manual_seed(ord(kind)), dtype=torch.float64)
        return torch.einsum("hc,c...->h...", mixture, heads[:2])

    model = make(**SOURCES[source])
    change_heads(model, mix)
    assert change(model, [(2, 2)] * 2, method, tokens(2, 24))[0] < 2e-5
    assert model.config.kv_heads(1) == (2, 2)


@pytest.mark.parametrize("source", ["mha", "gqa", "biases", "mea, no norm", "mha + norm", "mea"])
def test_heads_that_are_turned_copies_of_one_are_compressed_to_one_without_a_change(source):
    """Maps are undone: of keys in the queries, of values in W^O, behind a norm and its gain, with biases and groups."""

    def copies(kind, heads):
        turns = [dict(k=phases, v=rotation)[kind](seed) for seed in range(len(heads))]
        return torch.einsum("hab,b...->ha...", torch.stack(turns), heads[0])

    for method in ("rotated", "aligned", "calibrated"):
        model = make(**SOURCES[source])
        change_heads(model, copies)
        for name, w in model.named_parameters():
            w.data = torch.eye(4) if "compose_" in name else w.data
        lost = change(model, [(1, 1)] * 2, method, tokens(2, 24))[0]
        assert lost > 0.05 if method == "calibrated" else lost < 1e-4


@pytest.mark.parametrize("source", ["mha", "gqa", "mea", "mha + norm"])
def test_every_method_sees_more_than_the_one_before(source):
    x = tokens(4, 24, seed=3)
    changes, n = {}, make(**SOURCES[source]).config.kv_heads(0)[0]
    for method in BY_HEADS:
        changes[method] = change(make(**SOURCES[source]), [(n // 2, n // 2)] * 2, method, x)[0]
    assert changes["aligned"] < 0.9 * changes["svd"] and changes["rotated"] < changes["svd"]


@pytest.mark.parametrize("method", ["whitened", "latent"])
@pytest.mark.parametrize("source", [*SOURCES, "qk norm"])
def test_a_latent_of_full_width_is_the_original(source, method):
    model = make(**SOURCES.get(source, QK_NORM))
    whole = model.config.kv_heads(0)
    assert change(model, [whole] * 2, method, tokens(2, 24))[0] < 1e-5
    assert model.config.attention == "latent" and model.config.kv_heads(0) == whole


CACHED = [*itertools.product(SOURCES, ("aligned", "latent")), ("qk norm", "latent")]  # else keys stay


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


@pytest.mark.parametrize("source", ["mha", "mha + norm", "biases"])
def test_latents_lose_less_than_virtual_heads_of_the_same_bytes(source):
    """The more maps are allowed, the less of a layer is lost; what the model makes of it follows for latents only."""
    x, n = tokens(4, 24, seed=3), make(**SOURCES[source]).config.kv_heads(0)[0]
    changes, errors = {}, {}
    for method in ("aligned", "latent"):
        changes[method], lost = change(make(**SOURCES[source]), [(n // 2, n // 2)] * 2, method, x)
        errors[method] = lost[0]
    assert changes["latent"] < changes["aligned"]
    assert all(errors["latent"][kind] <= errors["aligned"][kind] + 1e-9 for kind in "kv")


@pytest.mark.parametrize("source", SOURCES)
def test_layers_that_keep_their_heads_do_not_change(source):
    model, x = make(**SOURCES[source]), tokens(2, 24)
    full = model.config.kv_heads(0)
    assert change(model, [full] * 2, "aligned", x)[0] < 1e-6 and model.config.attention == "mea"
    model = make(**SOURCES[source])
    assert change(model, [full, (1, full[1])], "aligned", x)[1][0] == {"k": 0.0, "v": 0.0}


@pytest.mark.parametrize("dead", ["q_proj", "k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("source", ["mha", "gqa", "mea"])
@pytest.mark.parametrize("method", BY_HEADS)
def test_a_layer_that_was_pruned_away_loses_nothing(method, source, dead):
    """Without scores any keys do; without values, or with nothing that reads them, any values as well."""
    model = make(**SOURCES[source])
    full = n_k, n_v = model.config.kv_heads(1)
    with torch.no_grad():
        getattr(model.layers[1].self_attn, dead).weight.zero_()
    before, x = model(tokens(2, 24))[0], tokens(2, 24)
    ranks = [full, (n_k // 2, n_v if dead in ("q_proj", "k_proj") else n_v // 2)]
    errors = compress(model, ranks, method, calibrate(model, tokens(6, 24, seed=3)))
    torch.testing.assert_close(model(x)[0], before, rtol=1e-4, atol=1e-4)
    kind = dead[0]
    assert all(0 <= error[k] < 1 for error in errors for k in "kv") and (kind not in "kv" or errors[1][kind] == 0)


def test_a_diagonal_composition_of_a_layer_that_keeps_its_heads_stays():
    model, x = make(attention="mea", compose="diagonal"), tokens(2, 24)
    assert change(model, [(4, 4)] * 2, "aligned", x)[0] < 1e-6
    model = make(attention="mea", compose="diagonal")
    numbers = model.layers[0].self_attn.compose_k.detach().clone()
    compress(model, [(4, 2), (2, 2)], "svd")
    torch.testing.assert_close(model.layers[0].self_attn.compose_k.data, torch.diag(numbers))


@pytest.mark.parametrize("method", ["whitened", "latent"])
def test_keys_composed_behind_a_qk_norm_are_no_latents(method):
    fields = dict(attention="mea", qk_norm=True)
    raises("layer 0, which is not one-hot", change, make(**fields), [(4, 4)] * 2, method, tokens(2, 24))
    model = make(**fields)
    for block in model.layers:  # as it starts, every component is one head's
        block.self_attn.compose_k.data = torch.eye(4)
    assert change(model, [(4, 4)] * 2, method, tokens(2, 24))[0] < 1e-5


def test_keys_behind_a_qk_norm_stay_and_values_are_compressed():
    config = GPTConfig(**BASE, **QK_NORM)
    assert uniform_ranks(config, 0.75) == [(4, 2)] * 2
    raises("QK-norm stay.*0.625, 0.75, 0.875, 1 are possible", uniform_ranks, config, 0.5)
    lost = lambda method: change(make(**QK_NORM), [(4, 2)] * 2, method, tokens(4, 24, seed=3))[0]
    assert lost("aligned") < lost("svd")
    costs = probe(make(**QK_NORM), "aligned", tokens(2, 24), (tokens(2, 24).numpy(), tokens(2, 24).numpy()))
    assert all(keys == 4 for keys, _ in choose_ranks(config, 0.75, "probe", costs))


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
    config = GPTConfig(**{**BASE, "attention": "mea", "head_norm": False, "n_kv_head": [[2, 2]] * 2})
    smaller, errors = compress_layer(attn, config, 0, "rotated")
    for kind in "kv":
        assert errors[kind] == approximate(effective_heads(attn, kind)[0], 2, kind, "rotations")[3][-1]
    before = [(attn(y, rope) - smaller(y, rope)).square().mean().item() for y in (x, torch.randn(50, 4, C))]
    refit_output(smaller, Calibration({}, [x], [attn(x, rope)], rope, torch.float32), rope)
    after = [(attn(y, rope) - smaller(y, rope)).square().mean().item() for y in (x, torch.randn(50, 4, C))]
    assert after[0] < 0.2 * before[0] and after[1] < 2 * before[1]  # what four positions do not show hardly moves


# --- grouped heads

PLAIN = [source for source in SOURCES if not make(**SOURCES[source]).config.head_norm] + ["mqa", "diagonal"]
SOURCES |= {"mqa": dict(attention="mha", n_kv_head=1, attention_bias=True)}
SOURCES |= {"diagonal": dict(attention="mea", head_norm=False, compose="diagonal")}


def grouped(model, kv_ratio, kv_groups=None, data=True):
    """(relative change of the logits, errors) of --method gqa."""
    x = tokens(2, 24)
    before = model(x)[0]
    ranks = uniform_ranks(model.config, kv_ratio, "all", "gqa", kv_groups)
    errors = compress(model, ranks, "gqa", calibrate(model, tokens(6, 24, seed=3) if data else None), kv_groups)
    return ((model(x)[0] - before).norm() / before.norm()).item(), errors


@pytest.mark.parametrize("kv_groups", [None, 1])
@pytest.mark.parametrize("source", PLAIN)
def test_groups_of_full_width_are_the_original(source, kv_groups):
    model = make(**SOURCES[source])
    assert grouped(model, 1, kv_groups)[0] < 1e-5
    assert model.config.attention == "mha" and isinstance(model.config.n_kv_head, int)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("source", PLAIN)
def test_grouped_heads_decode_from_a_cache_of_exactly_their_bytes(source, data):
    model = make(**SOURCES[source])
    before = KVCache(model.config, 3, 20).nbytes
    change, errors = grouped(model, 2 / 3 if source in ("mqa", "mea, 3 components") else 0.5, data=data)
    assert 0 < change < 1.5 and all(0 < error[kind] < 1 for error in errors for kind in "kv")
    cache = KVCache(model.config, 3, 20)
    assert cache.nbytes == 3 * 20 * model.config.kv_bytes_per_token()
    assert cache.nbytes == before * (2 / 3 if source in ("mqa", "mea, 3 components") else 0.5)
    x = tokens(3, 20)
    pieces = [model(part, cache=cache)[0] for part in (x[:, :7], *x[:, 7:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(x)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_kv_head", [2, 3])
def test_one_hot_compositions_are_grouped_heads_already(n_kv_head):
    """As an MEA starts, and as neighbours that are averaged end: some query heads read the same component."""
    model = make(attention="mea", head_norm=False, n_kv_head=n_kv_head)
    for block in model.layers:
        for w in (block.self_attn.compose_k, block.self_attn.compose_v):
            w.data = one_hot_composition(n_kv_head, 4)
    assert grouped(model, 1)[0] < 1e-5
    assert (model.config.n_kv_head, model.config.head_dim) == {2: (2, D), 3: (1, 3 * D)}[n_kv_head]


def test_what_was_seen_once_cannot_group_heads():
    model = make(attention="mha")
    with pytest.raises(ValueError, match="give what calibrate returns"):
        compress(model, [(2 * D, 2 * D)] * 2, "gqa", list(calibrate(model, tokens(2, 24))))


def test_the_most_groups_that_are_not_narrower_than_a_head():
    shape = lambda **f: GPTConfig(**{**BASE, "n_head": 8, "n_embd": 64, "attention": "mha", **f})
    made = lambda config, ratio, groups=None: with_ranks(
        config, uniform_ranks(config, ratio, "all", "gqa", groups), "gqa", groups
    )
    widths = lambda config: (config.n_kv_head, config.head_dim)
    assert widths(made(shape(), 0.5)) == (4, 8) and widths(made(shape(), 0.25)) == (2, 8)
    assert widths(made(shape(), 0.5, 1)) == (1, 32) and widths(made(shape(), 0.75)) == (4, 12)
    assert widths(made(shape(n_kv_head=2), 0.75)) == (1, 12) and widths(made(shape(n_kv_head=1), 0.5)) == (1, 4)
    assert widths(made(shape(attention="mea", head_norm=False, n_kv_head=4), 1)) == (4, 8)
    three = shape(n_head=9, n_kv_head=3, n_embd=72)
    assert widths(made(three, 0.5)) == (1, 12) and widths(made(three, 1 / 3)) == (1, 8)
    raises("kv_groups 2 must divide the 3 heads", made, three, 0.5, 2)


@pytest.mark.parametrize("source", ["mha", "gqa", "biases", "mea, no norm"])
def test_joined_heads_keep_the_size_of_their_projections(source):
    """What is learned afterwards by steps of one size: no tiny W^O behind huge values."""
    model = make(**SOURCES[source])
    for block in model.layers:
        block.self_attn.o_proj.weight.data *= 7
    sizes = lambda: [
        [getattr(b.self_attn, f"{k}_proj").weight.square().mean().sqrt().item() for k in "kv"] for b in model.layers
    ]
    wanted = sizes() if source != "mea, no norm" else None
    compress(model, uniform_ranks(model.config, 0.5, "all", "gqa"), "gqa", calibrate(model, tokens(6, 24, seed=3)))
    assert wanted is None or sizes() == [pytest.approx(each, rel=1e-5) for each in wanted]
    for block in model.layers:
        assert 0.1 < block.self_attn.o_proj.weight.std() / (7 * 0.25) < 10


def test_heads_that_are_maps_of_one_are_joined_without_a_change():
    model = make(attention="mha", n_kv_head=4)
    generator, attn = torch.Generator().manual_seed(2), model.layers[0].self_attn
    for name, maps in (("k_proj", phases), ("v_proj", rotation)):  # heads 0 and 1 are maps of one, and so are 2 and 3
        heads = getattr(attn, name).weight.data.view(4, D, C)
        for twin in (1, 3):
            heads[twin] = (maps(twin).float() @ heads[twin - 1]) * 1.5
    whole = copy.deepcopy(attn)
    x, rope = torch.randn(2, 24, C, generator=generator), rope_table(24, D, model.config.rope_theta)
    config = with_ranks(model.config, [(2 * D, 2 * D)] * 2, "gqa")
    joined, errors = join_heads(attn, config, 0, [[0, 1], [2, 3]], torch.arange(D // 2))
    torch.testing.assert_close(joined(x, rope), whole(x, rope), rtol=1e-4, atol=1e-4)
    assert max(errors.values()) < 1e-6


def test_heads_that_share_most_are_joined_and_the_weights_absorb_the_order():
    """Heads 0 and 2 are copies, and 1 and 3: neighbours joined lose much, these lose nothing."""
    model = make(attention="mha")
    change_heads(model, lambda _, heads: heads[[0, 1, 0, 1]])
    assert grouped(model, 0.5)[0] < 1e-5 and (model.config.n_kv_head, model.config.head_dim) == (2, D)


def test_heads_change_groups_only_if_that_costs_less():
    cost = lambda group: float(sum(abs(a - b) for a in group for b in group))
    places = [0, 9, 1, 8, 2, 7]
    far = lambda group: cost([places[head] for head in group])
    groups = choose_groups(far, 6, 2)
    assert sorted(sorted(places[head] for head in group) for group in groups) == [[0, 1, 2], [7, 8, 9]]
    assert choose_groups(lambda _: 1.0, 6, 3) == [[0, 1], [2, 3], [4, 5]] and choose_groups(far, 6, 1) == [[*range(6)]]


def test_all_layers_keep_the_same_pairs_the_most_valuable_ones_of_all():
    energies = [torch.tensor([[5.0, 1.0], [4.0, 3.0], [1.0, 0.5]]), torch.tensor([[1.0], [1.0], [1.0]])]
    assert shared_pairs(energies, 4).tolist() == [0, 1, 1, 2]  # 6, 5, 3, 2, then 1 and 0.5
    model = make(attention="mha")
    grouped(model, 0.5, 1)
    plain = [10000.0 ** (-2 * i / D) for i in range(D // 2)]
    assert len(model.config.rope_frequencies) == D and set(model.config.rope_frequencies) <= set(plain)
    model = make(attention="mha")
    grouped(model, 1)
    assert model.config.rope_frequencies is None  # every pair once: a Llama as it was


@pytest.mark.parametrize("dead", ["q_proj", "k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("source", ["mha", "gqa", "mea, no norm"])
def test_a_layer_that_was_pruned_away_is_grouped(source, dead):
    model = make(**SOURCES[source])
    with torch.no_grad():
        getattr(model.layers[1].self_attn, dead).weight.zero_()
    change, errors = grouped(model, 0.5)
    assert change < 1 and all(0 <= error[kind] < 1 for error in errors for kind in "kv")
    assert dead[0] not in "kv" or errors[1][dead[0]] == 0


@pytest.mark.parametrize("fields", [QK_NORM, dict(attention="mha", head_norm=True), dict(attention="mea")])
def test_what_cannot_be_grouped_is_refused_in_one_line(fields):
    model = make(**fields)
    raises("cannot join the heads of this", uniform_ranks, model.config, 0.5, "all", "gqa")
    raises("cannot join the heads of this", compress, model, [(2 * D, 2 * D)] * 2, "gqa")
    for budget in ("deep", "middle", "probe"):
        raises("are alike: use all", choose_ranks, GPTConfig(**BASE, attention="mha"), 0.5, budget, method="gqa")


@pytest.mark.parametrize("method", ["aligned", "latent"])
def test_what_keeps_whole_heads_says_what_could_keep_parts(method):
    one = GPTConfig(**{**BASE, "attention": "mha", "n_kv_head": 1, "n_embd": 32})
    raises("1 is possible; --method gqa keeps parts of heads", uniform_ranks, one, 0.5, "all", method)
    with pytest.raises(ValueError, match="1 is possible$"):
        uniform_ranks(GPTConfig(**{**BASE, "attention": "mha", "n_kv_head": 1, "head_norm": True}), 0.5, "all", method)
    assert with_ranks(one, uniform_ranks(one, 0.5, "all", "gqa"), "gqa").head_dim == 4


@pytest.mark.parametrize("n_kv_head", [3, [[2, 3], [1, 4]]])
def test_mea_without_norm_is_one_wide_head(n_kv_head):
    model = make(attention="mea", head_norm=False, n_kv_head=n_kv_head, attention_bias=True)
    wide, x = huggingface.as_mha(model), tokens(2, 24)
    assert (wide.config.attention, wide.config.n_kv_head) == ("mha", 1)
    assert wide.config.kv_bytes_per_token() >= model.config.kv_bytes_per_token()
    torch.testing.assert_close(wide(x)[0], model(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["dfa", "tha", "latent", "gated"])
def test_what_cannot_be_compressed_says_why(attention):
    raises(ATTENTION[attention].incompressible, compress, make(attention=attention), [(2, 2)] * 2)


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
        raises("0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1 are possible", uniform_ranks, config, wrong)
    uneven = GPTConfig(**{**BASE, "n_layer": 1, "n_kv_head": [[4, 1]]})
    assert uniform_ranks(uneven, 0.6) == [(2, 1)] and uniform_ranks(uneven, 0.8) == [(3, 1)]


def test_allocation_is_the_cheapest_of_all():
    generator = torch.Generator().manual_seed(0)
    falling = lambda: sorted(torch.rand(3, generator=generator).tolist(), reverse=True)
    costs = {item: falling() for item in itertools.product((0, 1), "kv")}
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
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert model.config.attention == "mha"
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
def mha(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trained") / "mha"
    how = "--preset tiny --max_steps 40 --dtype float32 --threads 1 --attention mha --data_dir"
    train.main(helpers.arguments(how, data, "--out_dir", folder))
    return folder


def run(options):
    program.main((options + " --eval_windows 4 --calibration_windows 4 --threads 1").split())


def test_the_program_reports_what_it_made(mha, data, tmp_path, capsys):
    out = tmp_path / "half"
    run(f"--checkpoint {mha} --out_dir {out} --budget probe --probe_windows 2 --seed 3")
    printed, report = capsys.readouterr().out, json.loads((out / "report.json").read_text())
    model, state = load_checkpoint(out)
    assert report["kv_bytes_per_token"] == dict(before=2 * 2 * 32 * 4, after=2 * 32 * 4) and report["kv_ratio"] == 0.5
    assert KVCache(model.config, 2, 10).nbytes == 2 * 10 * report["kv_bytes_per_token"]["after"]
    assert report["ranks"] == model.config.n_kv_head and sum(map(sum, report["ranks"])) == 8
    assert report["loss"].keys() == {"before", "after"} == report["bpb"].keys()
    text, windows = open_dataset(data), {}
    for stage, what in (("before", load_checkpoint(mha)[0]), ("after", model)):
        windows = validation_windows(text.val, 64, 4)
        loss = train.evaluate(what, windows, 8, torch.device("cpu"), choose_dtype("auto", torch.device("cpu")))
        assert report["loss"][stage] == pytest.approx(loss, abs=1e-6)
        assert report["bpb"][stage] == pytest.approx(text.bits_per_byte(loss))
    assert (report["method"], report["seed"]) == ("aligned", 3) and len(report["errors"]) == 2
    assert "cached bytes per token" in printed and f"{report['loss']['after']:.4f}" in printed
    with pytest.raises(SystemExit):  # a compressed checkpoint is weights, not a run to go on with
        train.main(["--resume", "--out_dir", str(out)])
    run(f"--checkpoint {out} --out_dir {tmp_path / 'again'} --budget probe --probe_windows 2")
    again, _ = load_checkpoint(tmp_path / "again")
    assert again.config.kv_bytes_per_token() * 2 == model.config.kv_bytes_per_token()


def test_the_command_that_heals_can_be_pasted(mha, data, tmp_path, capsys):
    """Every option is one of train.py's, and paths survive a shell."""
    out = tmp_path / "a half"
    program.main(["--checkpoint", str(mha), "--out_dir", str(out), "--eval_windows", "1", "--block_size", "32"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("heal it: "))
    python, script, *words = shlex.split(line.removeprefix("heal it: "))
    given = dict(zip(words[::2], words[1::2]))
    assert (python, script) == ("python", "train.py") and given["--init_from"] == str(out)
    assert given["--teacher"] == str(mha) and given["--data_dir"] == data and given["--window"] == "32"
    assert given["--out_dir"] == f"{out}-healed" and "--eval_data" not in given
    o = program.Options(checkpoint="~/m", out_dir="o", data_dir="d", calibration_data="a,b", block_size=8)
    assert "--teacher '~/m' --data_dir a,b --eval_data d " in program.healing_command(o)


def test_the_program_halves_a_cache_as_a_plain_mha(mha, tmp_path, capsys):
    out = tmp_path / "half"
    run(f"--checkpoint {mha} --method gqa --kv_groups 1 --out_dir {out}")
    printed, report = capsys.readouterr().out, json.loads((out / "report.json").read_text())
    model, _ = load_checkpoint(out)
    assert (model.config.attention, model.config.n_kv_head, model.config.head_dim) == ("mha", 1, 16)
    assert report["ranks"] == [[16, 16]] * 2 and report["kv_ratio"] == 0.5 and report["method"] == "gqa"
    assert "1 key/value heads of 16, a plain MHA" in printed and f"huggingface.py --checkpoint {out}" in printed
    pytest.importorskip("transformers")
    huggingface.main(["--checkpoint", str(out)])
    assert "llama.cpp: its converter leaves the rotary factors out" in capsys.readouterr().out
    assert "kv_groups are for --method gqa" in refused(capsys, f"--checkpoint {mha} --kv_groups 1")
    assert "kv_groups 3 must divide" in refused(capsys, f"--checkpoint {mha} --method gqa --kv_groups 3")


def test_a_probe_looks_at_windows_that_calibrated_nothing(mha, tmp_path, monkeypatch):
    def look(model, method, tokens, few, dtype):
        x, y = few
        assert len(tokens) == 4 and x.shape == y.shape == (3, tokens.shape[1]) and (x[:, 1:] == y[:, :-1]).all()
        assert not any((row == tokens.numpy()).all(1).any() for row in x)
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "probe", look)
    with pytest.raises(KeyboardInterrupt):
        run(f"--checkpoint {mha} --out_dir {tmp_path / 'o'} --budget probe --probe_windows 3")


def test_a_report_is_json_even_where_keys_cannot_be_probed(data, tmp_path):
    how = "--preset tiny --max_steps 2 --dtype float32 --threads 1 --attention mha --qk_norm true"
    train.main([*how.split(), f"--data_dir={data}", f"--out_dir={tmp_path / 'qk'}"])
    how = "--kv_ratio 0.75 --budget probe --probe_windows 1"
    run(f"--checkpoint {tmp_path / 'qk'} --out_dir {tmp_path / 'half'} {how}")
    probed = json.loads((tmp_path / "half" / "report.json").read_text(), parse_constant=pytest.fail)["probe"]
    assert probed["k"] == [[None, None, None, 0.0]] * 2 and all(len(costs) == 4 for costs in probed["v"])


def test_a_model_whose_loss_is_not_finite_is_not_published(mha, tmp_path, monkeypatch, capsys):
    def ruin(model, *_):
        model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
        return [{"k": 0.0, "v": 0.0}] * 2

    monkeypatch.setattr(program, "compress", ruin)
    with pytest.raises(SystemExit) as stopped:
        run(f"--checkpoint {mha} --out_dir {tmp_path / 'half'}")
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(words in said for words in ("loss", "nan", "nothing was written"))
    assert stopped.value.code == 2 and not (tmp_path / "half").exists()


def test_on_mps_everything_is_done_by_the_cpu(mha, tmp_path, monkeypatch):
    """mps has no float64; here it is not even there, so that nothing can have used it."""
    monkeypatch.setattr(program, "choose_device", lambda name: torch.device("mps"))
    run(f"--checkpoint {mha} --out_dir {tmp_path / 'half'}")
    assert load_checkpoint(tmp_path / "half")[0].config.kv_heads(0) == (2, 2)


def test_calibration_on_several_texts_is_reported_on_each(mha, data, tmp_path, capsys):
    text = open_dataset(data).tokenizer.decode(open_dataset(data).train[:20_000].tolist())
    (tmp_path / "other.txt").write_text(text.upper())
    prepare(source=str(tmp_path / "other.txt"), tokenizer=str(data), out_dir=tmp_path / "other")
    both = f"{data},{tmp_path / 'other'}"
    run(f"--checkpoint {mha} --out_dir {tmp_path / 'half'} --calibration_data {both} --method latent")
    report = json.loads((tmp_path / "half" / "report.json").read_text())
    assert list(report["texts"]) == ["set", "other"]
    assert report["texts"]["set"] == report["loss"] and report["options"]["calibration_data"] == both
    assert all(losses.keys() == {"before", "after"} for losses in report["texts"].values())
    assert load_checkpoint(tmp_path / "half")[0].config.attention == "latent"
    wrong = f"--checkpoint {mha} --calibration_data {data},{tmp_path / 'none'} --out_dir {tmp_path / 'no'}"
    assert "no data set at" in refused(capsys, wrong)


def refused(capsys, options):
    return helpers.refused(capsys, program.main, options)


def test_bad_input_is_refused_in_one_line_and_nothing_is_lost(mha, tmp_path, capsys, data):
    out = tmp_path / "out"
    for wrong, said in (
        (f"--checkpoint {mha} --kv_ratio 0.3", "0.25, 0.375, 0.5, 0.625"),
        (f"--checkpoint {tmp_path / 'none'}", "no checkpoint at"),
        (f"--checkpoint {mha} --budget deep", "leaves none of 2 layers"),
        (f"--checkpoint {mha} --probe_windows 3", "are for --budget probe"),
        (f"--checkpoint {mha} --block_size 100000", "block_size must be between"),
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


def test_a_pretrained_folder_is_compressed_directly(tmp_path, capsys, data):
    pytest.importorskip("safetensors")
    shape = dict(vocab_size=300, hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    theirs(**shape).save_pretrained(tmp_path / "hf")
    assert "give --data_dir" in refused(capsys, f"--checkpoint {tmp_path / 'hf'}")
    run(f"--checkpoint {tmp_path / 'hf'} --data_dir {data}")
    model, _ = load_checkpoint(tmp_path / "hf-kv0.5")
    assert model.config.n_kv_head == [[2, 1], [2, 1]]
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert "has no weights" in refused(capsys, f"--checkpoint {tmp_path / 'hf'} --data_dir {data} --overwrite")


def test_a_start_of_text_survives_compression(tmp_path):
    """Four equal key/value heads lose nothing at half the cache, so the text that follows a prompt stays, too."""
    words = ["The", "old", "red", "dog", "fox", "ran", "to", "hill", "town", "."]
    (tmp_path / "hf").mkdir()
    save_sentencepiece(tmp_path / "hf", ["<s>", "</s>", "<unk>", *(f"\u2581{word}" for word in words)], start="<s>")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    model = theirs(vocab_size=13, num_key_value_heads=4)
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data = projection.weight.data.view(4, 8, 32)[:1].expand(4, 8, 32).reshape(32, 32).clone()
    model.save_pretrained(tmp_path / "hf")
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
