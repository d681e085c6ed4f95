"""The transformer: its loss, its cache, generation, checkpoints, and that it is Llama where it says so."""

import math

import pytest
import torch
from helpers import SHAPE as BASE
from helpers import make, raises, tokens
import torch.nn.functional as F

import model as gpt
from attention import ATTENTION
from checkpoint import load_checkpoint, save_checkpoint
from model import GPT, GPTConfig, KVCache, sample_token


@pytest.mark.parametrize("attention", ATTENTION)
def test_the_loss_and_its_gradients_are_cross_entropy_of_the_logits(attention):
    model, x, y = make(attention=attention), tokens(3, 17), tokens(3, 17, seed=2)
    logits, none = model(x)
    assert logits.shape == (3, 17, 37) and none is None
    plain = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    _, loss = model(x, y)
    torch.testing.assert_close(loss, plain)
    weights = list(model.parameters())
    for mine, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(plain, weights)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_loss_is_float32_under_autocast():
    model, x, y = make(), tokens(3, 17), tokens(3, 17, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, y)[1]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(model(x, y)[1].item(), rel=1e-2)
    assert loss.item() != loss.bfloat16().item()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("tied,distance", [(False, 0.2), (True, 3.0)])
def test_a_model_starts_near_the_uniform_distribution(attention, tied, distance):
    """Tied, it first expects each token to repeat. The residual stream starts unit-sized either way: `init_weights`."""
    torch.manual_seed(0)
    shape = dict(vocab_size=512, block_size=32, n_layer=4, n_head=4, n_embd=64)
    model = GPT(GPTConfig(**shape, attention=attention, tie_embeddings=tied))
    x = torch.randint(512, (4, 33))
    assert abs(model(x[:, :-1], x[:, 1:])[1].item() - math.log(512)) < distance
    size = (model.embed_tokens(x) * model.config.embedding_multiplier).square().mean().sqrt().item()
    assert size == pytest.approx(1, rel=0.05)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
def test_four_lines_are_learned_by_heart(attention, head_norm):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**BASE, attention=attention, head_norm=head_norm))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=1e-2)
    data = tokens(4, 25)
    for _ in range(120):
        loss = model(data[:, :-1], data[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # the first tokens of the four lines differ, so everything can be known
    assert loss.item() < 0.05


# --- The cache

SHAPES = [(name, n) for name in ATTENTION for n in (2, 4)] + [("mea", 3), ("mea", [[3, 1], [2, 4]])]


@pytest.mark.parametrize("attention,n_kv_head", SHAPES)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_logits_equal_uncached(attention, n_kv_head, qk_norm):
    """In chunks of 9, 7 and 1; tests/test_attention.py has the layers' in any chunks."""
    model, x = make(attention=attention, n_kv_head=n_kv_head, qk_norm=qk_norm), tokens(3, 17)
    cache = KVCache(model.config, 3, 17)
    parts = [model(part, cache=cache)[0] for part in x.split([9, 7, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention,n_kv_head", SHAPES)
def test_cache_bytes_are_what_the_config_says(attention, n_kv_head):
    config = GPTConfig(**BASE, attention=attention, n_kv_head=n_kv_head)
    cache = KVCache(config, batch_size=3, max_length=20)
    stored = [tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.k, layer.v)]
    heads = sum(sum(config.kv_heads(layer)) for layer in range(2))
    beside = 2 * 4 * 10 if attention == "dcmha" else 0  # what it remembers of each head's maps in each layer
    assert cache.nbytes == sum(stored) == 3 * 20 * (heads * 6 + beside) * 4 == 3 * 20 * config.kv_bytes_per_token()
    assert KVCache(config, 3, 20, torch.bfloat16).nbytes * 2 == cache.nbytes


def test_more_positions_than_fit_are_refused():
    model = make()
    raises("25 positions do not fit: the model holds 24", model, tokens(1, 25))
    cache = KVCache(model.config, 1, 10)
    model(tokens(1, 8), cache=cache)
    raises("11 positions do not fit: the cache holds 10", model, tokens(1, 3), cache=cache)


# --- Generation


@pytest.mark.parametrize("attention,n_kv_head", SHAPES)
def test_greedy_text_is_the_same_without_the_cache_beyond_the_block_size_too(attention, n_kv_head):
    model = make(attention=attention, n_kv_head=n_kv_head)
    prompts = [tokens(5).tolist(), tokens(11, seed=2).tolist(), [3]]
    cached = model.generate(prompts, 40, temperature=0)
    assert cached == model.generate(prompts, 40, temperature=0, use_cache=False)
    assert [len(new) for new in cached] == [40, 40, 40]


@pytest.mark.parametrize("keep", [1, 12, 100])  # at most half of a block of 24
def test_the_start_of_a_text_stays_when_its_context_outgrows_the_block(monkeypatch, keep):
    model, seen = make(), []
    original = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, *more: seen.append(x) or original(x, *more))
    prompt = [7, *range(20)]
    kept = model.generate([prompt], 30, temperature=0, keep=keep)
    start, read = min(keep, 12), len(prompt)
    assert seen[0].tolist() == [prompt] and sum(x.size(1) > 1 for x in seen) > 2
    for x in seen[1:]:
        read += 1  # the newest token is always read, alone or at the end of what is left
        row, text = x[0].tolist(), (prompt + kept[0])[:read]
        assert row == text[-1:] or row == text[:start] + text[start - len(row) :]
    assert kept == model.generate([prompt], 30, temperature=0, keep=keep, use_cache=False)


def test_within_the_block_size_generation_is_the_argmax_of_the_logits():
    model, context = make(), tokens(6).tolist()
    expected = []
    for _ in range(15):
        expected.append(model(torch.tensor([context + expected]))[0][0, -1].argmax().item())
    assert model.generate([context], 15, temperature=0) == [expected]


def test_prompts_of_different_lengths_do_not_see_each_other():
    model = make(attention="mea", n_kv_head=2)
    prompts = [tokens(n, seed=n).tolist() for n in (1, 9, 24, 30)]
    assert model.generate(prompts, 30, temperature=0) == [model.generate([p], 30, temperature=0)[0] for p in prompts]


def test_a_seed_repeats_the_text_and_streaming_shows_every_token():
    model, shown = make(), []
    first = model.generate([[1, 2], [3]], 12, seed=5, on_token=lambda row, token: shown.append((row, token)))
    assert first == model.generate([[1, 2], [3]], 12, seed=5) != model.generate([[1, 2], [3]], 12, seed=6)
    assert [[token for row, token in shown if row == r] for r in (0, 1)] == first


def test_a_stop_token_ends_its_row_only():
    model = make()
    free = model.generate([[1], [2]], 20, temperature=0)
    stop = free[0][3]
    stopped = model.generate([[1], [2]], 20, temperature=0, stop_tokens=(stop,))
    assert stopped[0] == free[0][: free[0].index(stop)]
    assert stopped[1] == (free[1][: free[1].index(stop)] if stop in free[1] else free[1])


def test_sampling_keeps_what_top_k_and_top_p_say():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    generator = lambda: torch.Generator().manual_seed(0)
    draw = lambda **how: {*sample_token(probabilities.log().repeat(2000, 1), generator=generator(), **how).tolist()}
    assert draw() == {0, 1, 2, 3}
    assert draw(top_k=2) == {0, 1}
    assert draw(top_p=0.5) == {0}
    assert draw(top_p=0.51) == {0, 1}
    assert draw(top_p=0.9) == {0, 1, 2}
    assert draw(temperature=0) == {0}
    for temperature in (1e-20, 1e-37, 1e-45, 5e-324):  # logits divided by it overflow float32, or it is 0 there
        assert draw(temperature=temperature) == {0}
        assert make().generate([[1, 2]], 9, temperature=temperature) == make().generate([[1, 2]], 9, temperature=0)
    drawn = sample_token(probabilities.log().repeat(20000, 1), 2.0, generator=generator())
    expected = probabilities[0].sqrt() / probabilities[0].sqrt().sum()
    assert (torch.bincount(drawn) / 20000 - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(temperature=-1.0), "temperature must be at least 0 and finite, not -1.0"),
        (dict(temperature=math.inf), "temperature must be at least 0 and finite, not inf"),
        (dict(temperature=math.nan), "temperature must be at least 0 and finite, not nan"),
        (dict(top_k=0), "top_k must be at least 1, not 0"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, not 0.0"),
        (dict(top_p=1.5), "top_p must be above 0 and at most 1, not 1.5"),
        (dict(max_new_tokens=-1), "max_new_tokens must be at least 0, not -1"),
    ],
    ids=str,
)
def test_senseless_sampling_is_refused(how, message):
    raises(message, make().generate, [[1]], **{"max_new_tokens": 2, **how})
    raises("at least one token", make().generate, [[]], 3)


# --- Shapes and names


def test_presets_have_the_sizes_they_are_known_by():
    with torch.device("meta"):
        shape = lambda name: {"attention": "mha", **gpt.PRESETS[name]}
        count = lambda name, vocab: GPT(GPTConfig(vocab_size=vocab, **shape(name))).n_params()
        assert 123e6 < count("base", 50257) < 125e6
        assert count("1b", 128256) == 1235814400 + 128256 * 2048  # LLaMA-3.2-1B, untied


@pytest.mark.parametrize("attention", ATTENTION)
def test_flops_are_those_that_pytorch_counts(attention):
    """The counter sees whole attention maps where causality needs half, and zeros that q and k are padded with."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shape = dict(vocab_size=64, block_size=32, n_layer=2, n_head=4, n_embd=64, attention=attention)
    config = GPTConfig(**shape, mea_form="compose")
    model, x = GPT(config), torch.randint(64, (2, 33))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten()).backward()
    per_token = counter.get_total_flops() / 64
    maps = 6 * 32 * 64  # what causality halves: scores and values of one layer
    kind = attention.partition("_")[0]  # of a pair, the one that has the maps
    mixes = {"tha": 6 * 32 * 4**2, "dcmha": 12 * 32 * 4**2}.get(kind, 0)
    times = {"dfa": 1.5, "mta": 1.5, "diff2": 2, "collaborative": 2.5, "iha": 4}.get(kind, 1)
    mapped, seen = times * maps + mixes, 2 * times * maps + 2 * mixes
    if kind in ("dfa", "mta"):
        seen += maps  # zeros: q and k are made as wide as values
    if kind == "mea":
        seen += 6 * 8 * 64  # composing keys and values, which the folded form does once a step
    assert per_token == config.flops_per_token() + 2 * (seen - mapped)


def test_weight_decay_leaves_vectors_norms_lambdas_and_compositions_alone():
    for attention in ATTENTION:
        model = make(attention=attention, head_norm=True, attention_bias=True)
        names = {id(p): name for name, p in model.named_parameters()}
        decayed, spared = ({names[id(p)] for p in group["params"]} for group in model.parameter_groups(0.1))
        assert decayed | spared == set(names.values()) and not decayed & spared
        assert all(name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight")) for name in decayed)
        assert not any("proj.weight" in name for name in spared)


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(n_embd=26), "n_embd 26 is not divisible by n_head 4"),
        (dict(n_embd=20), "even width"),
        (dict(n_layer=0), "n_layer must be at least 1"),
        (dict(attention="linear"), "mha, tha, dfa, mea"),
        (dict(mea_form="fast"), "compose, fold, absorb"),
        (dict(dropout=1.0), "dropout"),
        (dict(attention="mha", compose="diagonal"), "mha composes no heads"),
        (dict(n_kv_head=5), "between 1 and n_head 4"),
        (dict(latent_heads=2), "latent_heads is for --attention latent"),
        (dict(n_kv_head=[[1, 1]]), "lists 1 layers and the model has 2"),
        (dict(attention="mea", qk_norm=True, mea_form="fold"), "mea_form cannot be fold"),
        (dict(rope_frequencies=[1.0]), "rope_frequencies must be 3 numbers"),
        (dict(attention="mha", n_kv_head=3), "divide"),
        (dict(attention="tha", n_kv_head=3), "divide"),
        (dict(attention="dfa", n_head=3), "even"),
        (dict(attention="dfa", n_kv_head=1), "even"),
        (dict(attention="mta", n_head=3), "n_head 3 must be divisible"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(fields, words):
    raises(words, GPTConfig, **{**BASE, **fields})


# --- QK-norm


@pytest.mark.parametrize("n_kv_head", [2, 3, 4])
def test_with_qk_norm_the_forms_that_do_not_fold_agree(n_kv_head):
    fields = dict(attention="mea", n_kv_head=n_kv_head, qk_norm=True)
    x, logits = tokens(2, 17), make(**fields)(tokens(2, 17))[0]
    for form in ("compose", "absorb"):
        torch.testing.assert_close(make(**fields, mea_form=form)(x)[0], logits, rtol=1e-4, atol=1e-5)


def test_qk_norm_makes_queries_and_keys_forget_their_length():
    for attention in ("mha", "mea"):
        model, x = make(attention=attention, qk_norm=True, norm_eps=1e-12), tokens(2, 17)
        logits = model(x)[0]
        for block in model.layers:
            block.self_attn.q_proj.weight.data *= 3
            block.self_attn.k_proj.weight.data *= 5
        torch.testing.assert_close(model(x)[0], logits, rtol=1e-4, atol=1e-5)
        model.layers[0].self_attn.k_norm.weight.data *= 2
        assert not torch.allclose(model(x)[0], logits, atol=1e-2)


# --- Checkpoints


def save(folder, model, **state):
    save_checkpoint(folder, dict(model=model.state_dict(), config=vars(model.config), **state))


@pytest.mark.parametrize("attention,n_kv_head", SHAPES)
def test_a_checkpoint_gives_the_same_model_back(tmp_path, attention, n_kv_head):
    model = make(attention=attention, n_kv_head=n_kv_head)
    save(tmp_path, model, step=3)
    loaded, state = load_checkpoint(tmp_path)
    assert loaded.config == model.config and state["step"] == 3 and not loaded.training
    assert torch.equal(loaded(tokens(2, 9))[0], model(tokens(2, 9))[0])


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, make(seed=step), step=step)
    assert [load_checkpoint(tmp_path / name)[1]["step"] for name in ("checkpoint.prev.pt", "checkpoint.pt")] == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]
    (tmp_path / "checkpoint.pt").unlink()  # as after a kill between the two renames
    assert load_checkpoint(tmp_path)[1]["step"] == 2


def test_what_is_no_checkpoint_is_refused(tmp_path):
    """tests/test_faults.py has damaged and hostile ones."""
    torch.save({"weights": 1}, tmp_path / "other.pt")
    raises("not a checkpoint of this project", load_checkpoint, tmp_path / "other.pt")
