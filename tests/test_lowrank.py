"""Fewer heads, as mathematics: what is exact, what alignment is for, and that nothing beats the bounds."""

import pytest
import torch

from attention import apply_rope, rope_table
from lowrank import align_by_rotation, approximate, fit_any_maps, fit_in_closed_form, keep_features, keep_pairs
from lowrank import key_blocks, spectrum, value_blocks

D, C = 6, 24


def random_heads(n, seed=0, columns=C):
    return torch.randn(n, D, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rebuilt(w, maps, weights):
    """T_h sum_c w[c, h] B_c."""
    return torch.einsum("hab,ch,cbm->ham", maps, w, weights)


def random_metric(n, kind, scalar=False):
    """S of each head: the same for both halves of a key's pairs, any matrix for values, or a number."""
    if scalar:
        return random_heads(n, 3)[:, 0, 0].exp()[:, None, None] * torch.eye(D, dtype=torch.float64)
    if kind == "k":
        return torch.diag_embed(random_heads(n, 3)[:, : D // 2, 0].exp().repeat(1, 2))
    return random_heads(n, 3, D)


def rotation(seed):
    return torch.linalg.qr(random_heads(1, seed, D)[0]).Q


def phases(seed):
    """A head's key turned by its own angle at every rotary frequency, as a real (D, D) matrix."""
    angle = torch.rand(D // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 6.28
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)), 0)


# --- the approximation


@pytest.mark.parametrize("form", ["none", "rotations", "any"])
@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("metric", [False, True])
def test_full_rank_is_exact(form, kind, metric):
    weight = random_heads(5)
    moment = S = None
    if metric:
        moment = random_heads(5, 7, 30).flatten(0, 1)
        moment, S = moment @ moment.T, random_metric(5, kind, scalar=form == "rotations")
    w, maps, weights, errors = approximate(weight, 5, kind, form, moment, S)
    torch.testing.assert_close(rebuilt(w, maps, weights), weight, rtol=1e-8, atol=1e-8)
    assert errors[-1] < 1e-12


def free_map(kind, seed):
    """Of a value head any matrix, of a key head a size and an angle at every frequency."""
    if kind == "v":
        return random_heads(1, seed, D)[0]
    return phases(seed) @ torch.diag(random_heads(1, seed, 1)[0, : D // 2, 0].exp().repeat(2))


COPIES = {  # maps of one head, the forms of T that undo them, and how exactly
    "sized": (lambda kind, seed: (seed - 1.5) * torch.eye(D).double(), ("none", "rotations", "any"), 1e-12),
    "turned": (lambda kind, seed: dict(k=phases, v=rotation)[kind](seed), ("rotations", "any"), 1e-10),
    "mapped": (free_map, ("any",), 1e-6),
}


@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("copies", COPIES)
def test_maps_of_one_head_need_one_component_once_they_are_undone(kind, copies):
    """Why alignment exists: the truncated SVD can only add heads that agree on their coordinates."""
    made, undone, exact = COPIES[copies]
    weight = torch.stack([made(kind, seed) @ random_heads(1, 9)[0] for seed in range(4)])
    for form in ("none", "rotations", "any"):
        w, maps, weights, errors = approximate(weight, 1, kind, form)
        missed = ((rebuilt(w, maps, weights) - weight).square().sum() / weight.square().sum()).item()
        assert max(errors[-1], missed / 10) < exact if form in undone else errors[-1] > 1e-3


@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("n,rank", [(3, 2), (8, 4), (5, 1)])
def test_no_round_makes_it_worse_and_each_freedom_helps(kind, n, rank):
    heads = (key_blocks if kind == "k" else value_blocks)(random_heads(n, seed=n))
    w, maps, rotated = align_by_rotation(heads, rank)
    errors = rotated + fit_any_maps(heads, w, maps)[2]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(errors, errors[1:]))
    assert errors[-1] < 0.99 * rotated[-1] < 0.99 * errors[0] == 0.99 * align_by_rotation(heads, rank, rounds=0)[2][0]


def test_one_component_less_than_heads_reaches_the_best_there_is_at_every_frequency():
    """For n -> n-1, complex numbers per head and frequency lose nothing to an SVD of each frequency by itself."""
    heads = key_blocks(random_heads(3, seed=4, columns=40))
    best = torch.linalg.svdvals(heads[:, :, 0].transpose(0, 1))[:, 2].square().sum() / heads.abs().square().sum()
    w, maps, _ = align_by_rotation(heads, 2)
    assert fit_any_maps(heads, w, maps, rounds=3000, tolerance=1e-9)[2][-1] == pytest.approx(best.item(), rel=1e-2)


@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("n,rank", [(3, 2), (4, 3), (3, 1), (5, 1), (2, 1)])
def test_the_closed_form_reaches_the_bound_and_the_iteration_does_no_better(kind, n, rank):
    heads = (key_blocks if kind == "k" else value_blocks)(random_heads(n, seed=n, columns=40))
    w, maps, error, least = fit_in_closed_form(heads, rank)
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
    down, up, error = keep_features(spectrum(weight, "v", moment, S), 2 * D)
    assert down.shape == (2 * D, C) and up.shape == (4, D, 2 * D)
    up = up.flatten(0, 1)
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
    least = (singular[3:].square().sum() / singular.square().sum()).item()
    assert align_by_rotation(heads, 3, rounds=0)[2][-1] == pytest.approx(least)


@pytest.mark.parametrize("form", ["none", "rotations", "any"])
@pytest.mark.parametrize("kind", "kv")
def test_the_reported_error_is_what_is_missing_at_the_end(kind, form):
    weight = random_heads(5, seed=3)
    w, maps, weights, errors = approximate(weight, 3, kind, form)
    missed = ((weight - rebuilt(w, maps, weights)).square().sum() / weight.square().sum()).item()
    assert missed <= errors[-1] * (1 + 1e-9) and errors[-1] == pytest.approx(missed, rel=1e-3)
    assert (len(errors) == 1) == (form == "none")


def test_a_keys_map_commutes_with_rope():
    turn, rope = phases(3), tuple(table.double() for table in rope_table(9, D))
    x = random_heads(1, 5, 9)[0].T.view(1, 9, 1, D)
    torch.testing.assert_close(apply_rope(x @ turn.T, rope), apply_rope(x, rope) @ turn.T)


@pytest.mark.parametrize("metric", [False, True])
def test_pairs_commute_with_rope_and_keep_the_most_they_can(metric):
    """As many pairs for every frequency are the closed form of virtual heads; freely spread they lose less."""
    weight, S = random_heads(3), random_metric(3, "k") if metric else None
    found = spectrum(weight, "k", None, S)
    best = found.energies.flatten().topk(D).indices // 3
    x = torch.randn(7, C, dtype=torch.float64)
    tables = [table.double() for table in rope_table(7, D)]
    for pairs in (best, torch.tensor([2, 0, 2]), torch.tensor([1] * 4)):  # a frequency has no more than three
        down, up, error = keep_pairs(found, pairs)
        columns = torch.cat((pairs, pairs + D // 2))
        cached = apply_rope((x @ down.T)[None, :, None], tuple(table[..., columns] for table in tables))[0, :, 0]
        rotated_after = apply_rope((x @ down.T @ up.flatten(0, 1).T).view(1, 7, 3, D), tables).flatten(2)[0]
        torch.testing.assert_close(cached @ up.flatten(0, 1).T, rotated_after)
        missed = weight - (up.flatten(0, 1) @ down).view(3, D, C)
        missed, whole = (y if S is None else S @ y for y in (missed, weight))
        assert error == pytest.approx((missed.square().sum() / whole.square().sum()).item())
    error = keep_pairs(found, best)[2]
    assert error <= approximate(weight, 2, "k", "any", None, S)[3][-1] + 1e-12
    assert keep_features(spectrum(weight, "v", None, S), 2 * D)[2] < error
    assert keep_pairs(found, torch.arange(D // 2).repeat(3))[2] < 1e-12
