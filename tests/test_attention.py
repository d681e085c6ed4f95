"""The equalities between the four attentions (README, "One formula, four attentions"), causality, caching, memory."""

import pytest
import torch
from helpers import raises

import attention as attention_file
import functional
from attention import ATTENTION, MEA, MHA, apply_rope, compose_heads, rms_norm, rope_table
from experiments.family import FAMILY
from huggingface import folded_to_mha
from model import GPTConfig, KVCache

# odd sizes on purpose: batch 3, 17 positions, heads 6 wide
B, T, C, H, D = 3, 17, 24, 4, 6
ROPE = rope_table(64, D)


def make(attention, *, seed=0, n_kv_head=None, scramble=True, **fields):
    """A layer in float64 whose parameters are all random, norms and mixes too: nothing cancels by being 0 or 1."""
    torch.manual_seed(seed)
    fields = {"vocab_size": 11, "block_size": 64, "n_layer": 1, "n_head": H, "n_embd": C, **fields}
    layer = ATTENTION[attention](GPTConfig(attention=attention, n_kv_head=n_kv_head, **fields), 0).double()
    if scramble:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return layer


def inputs(seed=1, batch=B, length=T):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, C, dtype=torch.float64, generator=generator, requires_grad=True)


def rope(start, stop):
    return tuple(table[start:stop] for table in ROPE)


def assert_same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def output_and_gradients(layer, names, x):
    """The output, and the gradients of the input and of the named parameters."""
    x = x.detach().requires_grad_()
    y = layer(x, rope(0, x.size(1)))
    direction = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return y, *torch.autograd.grad(y, [x, *map(layer.get_parameter, names)], direction)


def assert_same_function(first, second, shared, x):
    for a, b in zip(output_and_gradients(first, shared, x), output_and_gradients(second, shared, x)):
        assert_same(a, b)


@torch.no_grad()
def copy_shared(source, target):
    own = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if name in own and own[name].shape == parameter.shape:
            own[name].copy_(parameter)


PROJECTIONS = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
VARIANTS = [(name, norm) for name in ATTENTION for norm in (False, True)]

# --- The unified view (paper, section 4.3)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("n_kv_head, form", [(4, "compose"), (4, "fold"), (4, "absorb"), (2, "auto"), (1, "auto")])
def test_identity_composition_is_mha_and_one_hot_columns_are_grouped_query_attention(n_kv_head, form, norm):
    mha = make("mha", n_kv_head=n_kv_head, head_norm=norm)
    mea, start = (make("mea", n_kv_head=n_kv_head, head_norm=norm, mea_form=form, scramble=s) for s in (True, False))
    one_hot = torch.zeros(n_kv_head, H, dtype=torch.float64)  # the identity for 4
    for h in range(H):
        one_hot[h * n_kv_head // H, h] = 1
    copy_shared(mha, mea)
    mea.compose_k.data, mea.compose_v.data = one_hot, one_hot.clone()
    assert_same_function(mha, mea, PROJECTIONS, inputs())
    assert torch.equal(start.compose_k, one_hot) and torch.equal(start.compose_v, one_hot)  # where training starts


def test_rope_commutes_with_composition():
    k, weight = torch.randn(B, 3, T, D, dtype=torch.float64), torch.randn(3, H, dtype=torch.float64)
    rotate = lambda heads: apply_rope(heads.transpose(1, 2), rope(0, T)).transpose(1, 2)
    assert_same(rotate(compose_heads(k, weight)), compose_heads(rotate(k), weight))


def test_frequencies_in_a_list_turn_as_exactly_as_those_of_theta():
    listed = rope_table(4096, 64, frequencies=[5e5 ** (-2 * i / 64) for i in range(32)])
    torch.testing.assert_close(listed, rope_table(4096, 64, theta=5e5), rtol=0, atol=1e-7)


def test_rope_is_the_half_rotation_of_llama():
    x = torch.randn(1, 5, 1, D, dtype=torch.float64)
    y = apply_rope(x, rope(0, 5))
    as_complex = lambda heads: torch.complex(*heads[0, :, 0].chunk(2, dim=-1))  # (T, D/2): channels i and i + D/2
    angles = torch.arange(5.0)[:, None] * 10000.0 ** (-2 * torch.arange(D // 2) / D)
    assert_same(as_complex(y), as_complex(x) * torch.exp(1j * angles.double()), 1e-6)


def test_composition_is_equation_10():
    components, weight = torch.randn(B, 3, T, D), torch.randn(3, H)
    assert_same(compose_heads(components, weight), torch.einsum("bctd,ch->bhtd", components, weight), 1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, [[3, 2]]], ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_three_forms_of_mea_agree(heads, norm, bias):
    composed, *others = (
        make("mea", n_kv_head=heads, head_norm=norm, attention_bias=bias, mea_form=form)
        for form in ("compose", "fold", "absorb", "auto")
    )
    names, x = [name for name, _ in composed.named_parameters()], inputs()
    for other in others:
        assert_same_function(composed, other, names, x)
    for layer in (composed, *others):
        if heads == H or layer.form != "fold":  # folded heads are cached composed
            assert_same(in_chunks(layer, x, [9, 1, 7]), composed(x, rope(0, T)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fold_gives_the_equal_mha(norm, bias):
    mea = make("mea", head_norm=norm, attention_bias=bias)
    mha = folded_to_mha(mea)
    assert type(mha) is MHA
    shared = ["q_proj.weight", "o_proj.weight"] + ["head_norm.weight"] * norm
    assert_same_function(mea, mha, shared, inputs())


def test_what_does_not_fold_is_refused():
    class Shifted(MEA):
        pass

    raises("2 and 2 for 4", folded_to_mha, make("mea", n_kv_head=2))
    raises("Shifted does not fold", folded_to_mha, Shifted(GPTConfig(vocab_size=11, n_layer=1, n_head=H, n_embd=C)))
    edited = make("mea")  # by whoever adds a parameter to MEA itself
    edited.compose_z = torch.nn.Parameter(torch.ones(H))
    raises("MEA does not fold into MHA, .*compose_z", folded_to_mha, edited)
    assert (
        "does not know how it reads" in Shifted.incompressible and MEA.incompressible is None
    )  # nor does compress.py guess what the child does
    raises("use 'absorb'", in_chunks, make("mea", n_kv_head=2, mea_form="fold"), inputs(), [T])


def test_differential_attention_without_norm_is_talking_heads_with_the_matrix_of_eq_27():
    dfa, tha = make("dfa", head_norm=False), make("tha")
    copy_shared(dfa, tha)
    lam = torch.exp(dfa.lambda_q1 @ dfa.lambda_k1) - torch.exp(dfa.lambda_q2 @ dfa.lambda_k2) + dfa.lambda_init
    mixes = torch.zeros(H, H, dtype=torch.float64)
    for even in range(0, H, 2):  # both halves of a value are read by A_even - lambda A_odd
        mixes[even, even : even + 2] = 1
        mixes[even + 1, even : even + 2] = -lam.detach()
    tha.mix_logits.data, tha.mix_weights.data = torch.eye(H, dtype=torch.float64), mixes
    assert_same_function(dfa, tha, PROJECTIONS, inputs())


# --- Each formula, written out once more with loops


def plain_weights(q, k):
    scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def heads_of(projection, x, rotate=True):
    heads = projection(x).view(B, T, -1, D)
    return (apply_rope(heads, rope(0, T)) if rotate else heads).transpose(1, 2)


# Each is a loop over heads: layer, q, k, v (B, heads, T, D) -> the outputs of the heads before the norm.


def mha_formula(layer, q, k, v):
    group = lambda h: h * layer.n_k // H
    return [plain_weights(q[:, h], k[:, group(h)]) @ v[:, group(h)] for h in range(H)]


def mea_formula(layer, q, k, v):
    mix = lambda w, heads, h: sum(w[c, h] * heads[:, c] for c in range(len(w)))
    return [plain_weights(q[:, h], mix(layer.compose_k, k, h)) @ mix(layer.compose_v, v, h) for h in range(H)]


def tha_formula(layer, q, k, v):
    k, v = (heads.repeat_interleave(H // layer.n_k, dim=1) for heads in (k, v))
    logits = [q[:, h] @ k[:, h].transpose(1, 2) / D**0.5 for h in range(H)]
    future, maps = torch.ones(T, T, dtype=torch.bool).triu(1), []
    for g in range(H):
        mixed = sum(layer.mix_logits[h, g] * logits[h] for h in range(H))
        maps.append(mixed.masked_fill(future, -torch.inf).softmax(-1))
    return [sum(layer.mix_weights[g, f] * maps[g] for g in range(H)) @ v[:, f] for f in range(H)]


def dfa_formula(layer, q, k, v):
    lam = torch.exp(layer.lambda_q1 @ layer.lambda_k1) - torch.exp(layer.lambda_q2 @ layer.lambda_k2) + 0.2
    outputs = []
    for pair in range(H // 2):
        group = pair * layer.n_k // H
        value = torch.cat((v[:, 2 * group], v[:, 2 * group + 1]), dim=-1)
        first, second = (plain_weights(q[:, 2 * pair + i], k[:, 2 * group + i]) for i in (0, 1))
        outputs.append((first - lam * second) @ value)
    return outputs


def latent_formula(layer, q, k, v):
    x, n = inputs(), layer.n_rebuilt
    k = heads_of(lambda x: layer.k_up_proj(layer.k_proj(x)), x)
    v = heads_of(lambda x: layer.v_up_proj(layer.v_proj(x)), x, rotate=False)
    return [plain_weights(q[:, h], k[:, h * n // H]) @ v[:, h * n // H] for h in range(H)]


FORMULAS = {"mha": mha_formula, "mea": mea_formula, "tha": tha_formula, "dfa": dfa_formula, "latent": latent_formula}


def assert_is_its_formula(layer, formula, tolerance=1e-10):
    x = inputs()
    q, k, v = heads_of(layer.q_proj, x), heads_of(layer.k_proj, x), heads_of(layer.v_proj, x, rotate=False)
    outputs = list(formula(layer, q, k, v))
    if layer.config.head_norm:
        for h, y in enumerate(outputs):
            outputs[h] = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-6) * layer.head_norm.weight[h]
            if layer.config.attention == "dfa":
                outputs[h] = outputs[h] * (1 - 0.2)  # lambda_init of layer 0
    assert_same(layer(x, rope(0, T)), layer.o_proj(torch.cat(outputs, dim=-1)), tolerance)


@pytest.mark.parametrize("attention,norm", [(name, norm) for name, norm in VARIANTS if name not in FAMILY])
@pytest.mark.parametrize("n_kv_head", [2, 4])
def test_every_variant_is_its_formula(attention, norm, n_kv_head):
    """tests/test_family.py has those of experiments/family.py."""
    assert_is_its_formula(make(attention, n_kv_head=n_kv_head, head_norm=norm), FORMULAS[attention])


def test_a_latent_that_rebuilds_fewer_heads_from_two_widths_is_its_formula():
    assert_is_its_formula(make("latent", n_kv_head=[[1, 3]], latent_heads=2), latent_formula)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("form", ["compose", "absorb", "auto"])
def test_a_diagonal_composition_is_the_full_one_that_scales_each_head(n_kv_head, form):
    diagonal = make("mea", n_kv_head=n_kv_head, compose="diagonal", mea_form=form)
    full = make("mea", n_kv_head=n_kv_head)
    copy_shared(diagonal, full)
    own = torch.arange(H) * n_kv_head // H == torch.arange(n_kv_head)[:, None]  # (Hc, H): a component and its heads
    for mine, theirs in zip((diagonal.compose_k, diagonal.compose_v), (full.compose_k, full.compose_v)):
        assert mine.shape == (H,)
        theirs.data = mine.data * own
    assert_same_function(diagonal, full, PROJECTIONS, inputs())
    if n_kv_head == H and form == "auto":
        assert_same(folded_to_mha(diagonal)(inputs(), rope(0, T)), full(inputs(), rope(0, T)))


def test_lambda_is_computed_in_float32_under_autocast():
    layer = make("dfa").float()
    exact = layer.lambda_now()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.lambda_now(), exact)


@pytest.mark.parametrize("shape", [(D,), (H, D)])
def test_rms_norm_and_its_gradients(shape):
    x = torch.randn(3, 5, H, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight.data.view(-1)[0] = 0.0  # a gain of 0 is not divided by
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    assert_same(rms_norm(x, weight, 1e-6), plain, 1e-12)
    with torch.no_grad():
        assert_same(rms_norm(x, weight, 1e-6), plain, 1e-12)
    grad = torch.randn_like(x)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (rms_norm(x, weight, 1e-6), plain))):
        assert_same(mine, theirs, 1e-12)
    assert torch.autograd.gradgradcheck(lambda *inputs: rms_norm(*inputs, 1e-6), (x, weight))


# --- Talking-Heads in blocks


@pytest.mark.parametrize("block", [1, 4, 5, 16])
def test_talking_heads_in_blocks_is_the_plain_formula(block):
    plain, blocked = make("tha"), make("tha")
    blocked.block = block
    assert plain.block >= T
    assert_same_function(plain, blocked, [name for name, _ in plain.named_parameters()], inputs())
    assert_same(*(next_positions(layer, inputs(), [3, 9, 6], 7) for layer in (plain, blocked)))


def test_talking_heads_memory_is_linear_in_the_sequence():
    """No tensor kept for the backward, or made on the way, is as large as a whole attention map."""
    layer, length, sizes = make("tha"), 64, []
    layer.block = 8

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    with Watch():
        layer(inputs(length=length), rope(0, length)).sum().backward()
    assert max(sizes) <= B * H * layer.block * length  # a block of queries against all keys, an eighth of a whole map


# --- Causality, caching, dropout, precision


@pytest.mark.parametrize("attention,norm", VARIANTS)
def test_a_future_token_changes_nothing(attention, norm):
    layer, x = make(attention, head_norm=norm), inputs()
    for t in (0, 7, T - 2):
        changed = x.detach().clone()
        changed[:, t + 1 :] += torch.randn_like(changed[:, t + 1 :])
        a, b = layer(x, rope(0, T)), layer(changed, rope(0, T))
        assert_same(a[:, : t + 1], b[:, : t + 1])
        assert not torch.allclose(a[:, t + 1 :], b[:, t + 1 :])


@pytest.mark.parametrize("attention", ATTENTION)
def test_only_distances_between_positions_matter(attention):
    layer, x = make(attention), inputs()
    whole = layer(x, rope(0, T))
    torch.testing.assert_close(layer(x, rope(20, 20 + T)), whole, rtol=1e-4, atol=1e-5)  # the tables are float32
    stretched = tuple(table[0 : 2 * T : 2] for table in ROPE)
    assert not torch.allclose(layer(x, stretched), whole, atol=1e-3)


CACHED = [(name, dict(head_norm=norm, n_kv_head=n)) for name, norm in VARIANTS for n in (2, 4)]
CACHED += [("mea", dict(head_norm=norm, n_kv_head=n)) for norm in (False, True) for n in (1, 3)]
CACHED += [("latent", dict(n_kv_head=[[1, 3]], latent_heads=2))]


@pytest.mark.parametrize("attention,fields", CACHED, ids=str)
@pytest.mark.parametrize("chunks", [[T], [9, 8], [1, 5, 11], [1] * T], ids=["one", "two", "three", "one by one"])
@pytest.mark.parametrize("batch", [1, 3])
def test_cached_equals_uncached(attention, fields, chunks, batch):
    layer, x = make(attention, **fields), inputs(batch=batch)
    assert_same(in_chunks(layer, x, chunks), layer(x, rope(0, T)))


def in_chunks(layer, x, chunks):
    """What a layer makes of x, given in chunks of these lengths, with a cache."""
    cache, parts, start = KVCache(layer.config, x.size(0), T, torch.float64), [], 0
    for part in x.split(chunks, dim=1):
        parts.append(layer(part, rope(start, start + part.size(1)), cache.layers[0]))
        start += part.size(1)
        cache.lengths = [start] * x.size(0)
    return torch.cat(parts, dim=1)


def next_positions(layer, x, lengths, new):
    """What the next `new` positions of rows that hold `lengths` of x, padded with garbage in a cache, come to."""
    cache = KVCache(layer.config, B, T, torch.float64)
    layer(x[:, : max(lengths)], rope(0, max(lengths)), cache.layers[0])
    cache.lengths = list(lengths)
    positions = cache.positions(new)
    x = torch.stack([x[row, n : n + new] for row, n in enumerate(lengths)])
    return layer(x, tuple(table[positions] for table in ROPE), cache.layers[0])


@pytest.mark.parametrize("attention,fields", CACHED, ids=str)
def test_rows_of_different_lengths_share_a_cache(attention, fields):
    layer, x, lengths = make(attention, **fields), inputs(), [3, 9, 6]
    whole = layer(x, rope(0, T))
    for new in (1, 2):
        expected = torch.stack([whole[row, n : n + new] for row, n in enumerate(lengths)])
        assert_same(next_positions(layer, x, lengths, new), expected)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("n_kv_head", [4, 2, [[3, 1]]], ids=str)
def test_the_kernels_entry_points_give_the_same_layer(norm, n_kv_head, monkeypatch):
    """What a GPU runs, on the path functional.py takes here: without a cache, prefilling, and decoding ragged rows."""
    layer, x, calls = make("mea", head_norm=norm, n_kv_head=n_kv_head), inputs(), []
    names = [name for name, _ in layer.named_parameters()]

    def results():
        cached = in_chunks(layer, x, [9, 1, 1, 6]), next_positions(layer, x, [3, 9, 6], 1)
        return *output_and_gradients(layer, names, x), *cached

    plain = results()
    for name in ("mea_attention", "mea_decode"):
        original = getattr(attention_file, name)
        count = lambda *arguments, original=original, **named: calls.append(1) or original(*arguments, **named)
        monkeypatch.setattr(attention_file, name, count)
    monkeypatch.setattr(functional, "_kernel", "sdpa")
    for a, b in zip(results(), plain):
        assert_same(a, b)
    assert len(calls) == 6  # the sequence, two prefills, three single positions; a later chunk needs a mask


@pytest.mark.parametrize("attention", ATTENTION)
def test_dropout_acts_in_training_only(attention):
    layer, x = make(attention, dropout=0.5), inputs()
    assert not torch.equal(layer(x, rope(0, T)), layer(x, rope(0, T)))
    layer.eval()
    assert torch.equal(layer(x, rope(0, T)), layer(x, rope(0, T)))


@pytest.mark.parametrize("attention", ATTENTION)
def test_dropout_keeps_the_expectation(attention):
    layer, x = make(attention, dropout=0.2, head_norm=False), inputs(batch=1).detach()
    with torch.no_grad():
        mean = sum(layer(x, rope(0, T)) for _ in range(2000)) / 2000
        exact = layer.eval()(x, rope(0, T))
    assert (mean - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("attention,norm", VARIANTS)
def test_bfloat16_autocast_stays_close(attention, norm):
    layer = make(attention, head_norm=norm).float()
    x = inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x, rope(0, T))
    low.float().sum().backward()
    exact = layer(x, rope(0, T))
    assert low.dtype == torch.bfloat16
    limit = 0.04 if attention == "dcmha" else 0.03  # its weights are rounded twice as often on their way
    assert (low - exact).norm() / exact.norm() < limit
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("attention, calls", [("mha", 1), ("dfa", 2), ("mea", 1)])
def test_no_attention_map_is_ever_written(attention, calls):
    """Fused attention is all there is, DFA's wide values included: nothing as large as B x H x T x T is allocated."""
    layer = make(attention, block_size=256, n_embd=64, scramble=False).float()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(2, 256, 64), rope_table(256, 16))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert not any("softmax" in name or "attention_math" in name for name in counts)
    assert counts["aten::scaled_dot_product_attention"] == calls


def test_only_the_norm_and_the_composition_add_parameters():
    count = lambda layer: sum(p.numel() for p in layer.parameters())
    mha = count(make("mha"))
    assert count(make("mha", head_norm=True)) == mha + H * D
    assert count(make("mea", head_norm=False)) == mha + 2 * H * H
    assert count(make("mea")) == mha + 2 * H * H + H * D
    assert count(make("tha")) == mha + 2 * H * H
    assert count(make("dfa")) == mha + 4 * D + H * D
