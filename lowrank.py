"""The mathematics of fewer heads: what n heads y_h = W_h x lose when fewer numbers are kept of them. Knows no model.

One question. The heads, stacked, are y = W x: nD numbers a position. What shorter c = P x should be kept instead, and
what U brings y back?

    y  ~  U c,      least  E |S (y - U c)|^2.                                                                        (1)

S says what an error costs. If U may be anything, the answer is an SVD: the leading eigenvectors of S E[y y^T] S^T are
S U, and c are the coordinates of S y in them (`keep_features`).

MEA keeps r component heads, c = (B_1 x .. B_r x), and mixes them: head h reads

    W_h x  ~  T_h sum_c w[c, h] B_c x,                                                                               (2)

which is (1) with blocks U_hc = w[c, h] T_h. w is its composition matrix, T_h a D x D matrix (`approximate`).

      a latent: any U                virtual heads: T_h w[c, h]
    y_1 = [ . . . . . . ]  c     y_1 = T_1 ( w_11 B_1 + w_21 B_2 )
    y_2 = [ . . . . . . ]  c     y_2 = T_2 ( w_12 B_1 + w_22 B_2 )
    y_3 = [ . . . . . . ]  c     y_3 = T_3 ( w_13 B_1 + w_23 B_2 )

Keys are the same with complex numbers: RoPE turns pair f of a head by an angle, and only a complex number per pair
commutes with that. So a key head's T_h is D/2 complex numbers, and (2) is D/2 small problems that share w.

Shapes: heads W (n, D, M) of M inputs, or in their place any L with L L^T = E[y y^T]. As blocks they are (n, g, b, M): n
heads of g blocks of b features, and T (n, g, b, b) maps each block by itself. A value head is one block of D real
features; a key head is D/2 blocks of one complex number. Read `surgery.py` next, which puts the results into layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def key_blocks(heads):
    """(n, D, M) real -> (n, D/2, 1, M) complex: the pairs that RoPE rotates."""
    return torch.complex(*heads.chunk(2, dim=1)).unsqueeze(2)


def value_blocks(heads):
    """(n, D, M) -> (n, 1, D, M): a value head may be mapped as a whole."""
    return heads.unsqueeze(1)


def from_blocks(blocks):
    """Undo `key_blocks` or `value_blocks`."""
    return torch.cat((blocks.real, blocks.imag), dim=1).squeeze(2) if blocks.is_complex() else blocks.squeeze(1)


def stack(heads):
    """(n, g, b, M) -> (g, n*b, M): all heads' features, block by block."""
    return heads.transpose(0, 1).flatten(1, 2)


def as_real(maps):
    """(n, D/2, any/2) complex -> (n, D, any) real: a + ib maps a pair by ((a, -b), (b, a))."""
    return torch.cat((torch.cat((maps.real, -maps.imag), dim=2), torch.cat((maps.imag, maps.real), dim=2)), dim=1)


def root(weight, moment):
    """L (n, D, nD) of L L^T = `moment`, E[y y^T] (nD, nD), in place of the weights (n, D, M); without one, these."""
    if moment is None:
        return weight
    values, vectors = torch.linalg.eigh(moment)  # any L does, and nothing longer than nD is needed
    return (vectors * values.clamp_min(0).sqrt()).unflatten(0, weight.shape[:2])


def in_metric(heads, kind, metric):
    """(S (n, g, b, b), S y in blocks) of heads y (n, D, M); `metric` (n, D, D) is S of (1), head by head, or None."""
    n, D, _ = heads.shape
    S = torch.eye(D, dtype=heads.dtype).expand(n, D, D) if metric is None else metric
    blocks = key_blocks(heads) if kind == "k" else value_blocks(heads)
    S = (S.diagonal(dim1=1, dim2=2)[:, : D // 2, None, None] if kind == "k" else S[:, None]).to(blocks)
    return S, S @ blocks


# ---------------------------------------------------------------------------------------------------------------------
# Virtual heads (2)


def truncated_svd(heads, rank):
    """The paper's approximation (appendix F): w (rank, n) and the best sum_c w[c, h] B_c for heads (n, g, b, M).

    With one column per head, A = U S V^T: w = V^T and B = U S = A w^T, so only V is needed.
    """
    rows = torch.view_as_real(heads).flatten(1) if heads.is_complex() else heads.flatten(1)  # A^T
    w = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -rank:].T  # (rank, n), orthonormal rows
    return w, torch.einsum("ch,ck,kgbm->hgbm", w.to(heads), w.to(heads), heads)


def components(w, maps, heads):
    """The B (r, g, b, M) that suit w (r, n) and T (n, g, b, b) best in (2), by least squares."""
    U = torch.einsum("ch,hgab->ghacb", w.to(maps), maps).flatten(3, 4).flatten(1, 2)  # (g, n*b, r*b)
    return (torch.linalg.pinv(U, rtol=1e-9) @ stack(heads)).unflatten(1, (-1, heads.size(2))).transpose(0, 1)


def rebuild(w, maps, B):
    """T_h sum_c w[c, h] B_c: (n, g, b, M)."""
    return torch.einsum("hgab,ch,cgbm->hgam", maps, w.to(maps), B)


def relative_error(heads, approximation):
    """The share of the heads' energy that an approximation misses."""
    return ((heads - approximation).abs().square().sum() / heads.abs().square().sum().clamp_min(1e-300)).item()


def fit_in_closed_form(heads, rank):
    """(w, T, error, least): (2) for one component, or for one less than heads; `least` is the bound of (1).

    The bound keeps the leading rank*b directions of the stacked heads. One component: its coordinates are these
    directions, T_h their rows of head h. One component less than heads: what has to go are b directions, of which N_h
    (b, b) are the rows of head h, so heads of which nothing is lost satisfy sum_h N_h^H y_h = 0. With T_h = N_h^-H
    this says sum_h sum_c w[c, h] B_c = 0, true for any B if the rows of w sum to 0. A head that has next to no part in
    these directions would need a huge T: the error tells.
    """
    n, g, b, _ = heads.shape
    stacked = stack(heads)
    energies, directions = torch.linalg.eigh(stacked @ stacked.mH)  # ascending: (g, n*b), (g, n*b, n*b)
    if rank == 1:
        w = torch.ones(1, n, dtype=energies.dtype)
        maps = directions[:, :, -b:].unflatten(1, (n, b)).transpose(0, 1)
    else:
        left, sizes, right = torch.linalg.svd(directions[:, :, :b].unflatten(1, (n, b)).transpose(0, 1))
        maps = left @ torch.diag_embed(1 / sizes.clamp_min(1e-3)).to(left) @ right
        w = torch.linalg.eigh(torch.ones(n, n, dtype=energies.dtype)).eigenvectors[:, :-1].T
    error = relative_error(heads, rebuild(w, maps, components(w, maps, heads)))
    return w, maps, error, (energies[:, : (n - rank) * b].sum() / energies.sum().clamp_min(1e-300)).item()


def converged(errors, tolerance):
    return errors[-1] < 1e-14 or (len(errors) > 1 and errors[-2] - errors[-1] < tolerance * errors[-2])


def align_by_rotation(heads, rank, rounds=300, tolerance=1e-5):
    """(w, T, errors): (2) with unitary T_h, for heads (n, g, b, M); without a round T = 1, the truncated SVD.

    In turns T_h from the orthogonal Procrustes problem, which brings the current approximation closest to head h, and
    the truncated SVD of the heads rotated back. `errors` is what is missing after each round; it never grows.
    """
    n, g, b, _ = heads.shape
    maps = torch.eye(b, dtype=heads.dtype).expand(n, g, b, b)
    w, target = truncated_svd(heads, rank)
    errors = [relative_error(heads, target)]
    for _ in range(rounds):
        left, _, right = torch.linalg.svd(heads @ target.mH)
        maps = left @ right
        w, target = truncated_svd(maps.mH @ heads, rank)
        errors.append(relative_error(heads, maps @ target))
        if converged(errors, tolerance):
            break
    return w, maps, errors


def fit_any_maps(heads, w, maps, rounds=300, tolerance=1e-5):
    """(w, T, errors): (2) with any T_h, improved from w (r, n), T (n, g, b, b): B, T and w in turns by least squares
    given the others."""
    errors = []
    for _ in range(rounds):
        B = components(w, maps, heads)  # (r, g, b, M)
        target = torch.einsum("ch,cgbm->hgbm", w.to(heads), B)
        maps = heads @ target.mH @ torch.linalg.pinv(target @ target.mH, rtol=1e-10, hermitian=True)
        mapped = torch.einsum("hgab,cgbm->hcgam", maps, B)  # T_h B_c: head h is a real combination of these
        columns, wanted = (torch.view_as_real(x) if x.is_complex() else x for x in (mapped, heads))
        columns, wanted = columns.flatten(2).mT, wanted.flatten(1).unsqueeze(2)
        w = torch.linalg.lstsq(columns, wanted, driver="gelsd").solution[:, :, 0].T
        errors.append(relative_error(heads, torch.einsum("ch,hcgam->hgam", w.to(heads), mapped)))
        if converged(errors, tolerance):
            break
    return w, maps, errors


def approximate(weight, rank, kind, form, moment=None, metric=None):
    """(2) for heads W (n, D, M): w (rank, n), T (n, D, D) real, B (rank, D, M) and the errors.

    `form` of T: "none" (T = 1), "rotations", or "any". `moment` (nD, nD) is E[y y^T] of what the heads put out: errors
    are then those of outputs, otherwise of weights. `metric` of keys is diagonal, and the same for both halves of a
    pair; with rotations it is a multiple of 1, which goes into w.
    """
    n = len(weight)
    S, heads = in_metric(root(weight, moment), kind, metric)
    if form == "any":
        error = math.inf
        if rank in (1, n - 1):
            w, maps, error, least = fit_in_closed_form(heads, rank)
            errors = [error]
        if error == math.inf or error > 1.05 * least + 1e-12:
            w, maps, _ = align_by_rotation(torch.linalg.solve(S, heads), rank)  # where that is exact, it stays exact
            w, maps, errors = fit_any_maps(heads, w, S @ maps)
    else:
        w, maps, errors = align_by_rotation(heads, rank, rounds=300 if form == "rotations" else 0)
    B = from_blocks(components(w, maps, in_metric(weight, kind, metric)[1]))  # (rank, D, M)
    if form == "rotations":
        w = w / S[:, 0, 0, 0].real
    else:
        maps = torch.linalg.solve(S, maps)
    maps = maps[:, 0] if kind == "v" else as_real(torch.diag_embed(maps[:, :, 0, 0]))
    return w, maps, B, errors


# ---------------------------------------------------------------------------------------------------------------------
# Latents (1)


@dataclass
class Spectrum:
    """What (1) knows of n heads: `energies` (g, n*b) of the stacked heads S y, largest first, `directions` (g, n*b,
    n*b) that have them, in columns, `rows` (g, n*b, M) = S W, and S (n, g, b, b)."""

    energies: torch.Tensor
    directions: torch.Tensor
    rows: torch.Tensor
    S: torch.Tensor


def spectrum(weight, kind, moment=None, metric=None):
    """The `Spectrum` of heads W (n, D, M); moment and metric as in `approximate`."""
    S, heads = in_metric(root(weight, moment), kind, metric)
    heads = stack(heads)
    energies, directions = torch.linalg.eigh(heads @ heads.mH)
    rows = stack(in_metric(weight, kind, metric)[1])
    return Spectrum(energies.flip(1).clamp_min(0), directions.flip(2), rows, S)


def keep(found, block, place):
    """(P (numbers, M), U (n, g, b, numbers), share of the energy that is lost) that keep the directions number `place`
    of `block`, two lists of indices. A place beyond the last direction holds 0."""
    n, g, b, _ = found.S.shape
    there = place < n * b
    block, place = block[there], place[there]
    spare = len(there) - len(block)
    down = F.pad((found.directions.mH @ found.rows)[block, place], (0, 0, 0, spare))
    up = torch.zeros(n, g, b, len(there), dtype=down.dtype)
    columns = torch.linalg.solve(found.S, found.directions.unflatten(1, (n, b)).transpose(0, 1))  # (n, g, b, n*b)
    up[:, block, :, torch.arange(len(block))] = columns[:, block, :, place]
    lost = (1 - found.energies[block, place].sum() / found.energies.sum()).clamp_min(0)
    return down, up, lost.nan_to_num(0.0).item()  # heads of 0 lose nothing


def keep_features(found, width):
    """P (width, M), U (n, D, width) and what is lost, of a `Spectrum` of kind "v": any mix of features is allowed.

    This suits values, and keys that are cached before RoPE.
    """
    down, up, lost = keep(found, torch.zeros(width, dtype=torch.long), torch.arange(width))
    return down, up[:, 0], lost


def keep_pairs(found, pairs):
    """P (2p, M), U (n, D, 2p) and what is lost, of a `Spectrum` of kind "k": U commutes with RoPE.

    Number i of `pairs` (p) is the frequency by which features i and p + i of c turn. Each frequency keeps its largest
    energies, as many as it has pairs.
    """
    place = torch.tensor([(pairs[:i] == pair).sum() for i, pair in enumerate(pairs)])
    down, up, lost = keep(found, pairs, place)
    return torch.cat((down.real, down.imag)), as_real(up[:, :, 0]), lost


def shared_pairs(energies, count):
    """The frequencies (count) of the pairs that lose least when several spectra keep the same ones.

    `energies` is a list of (g, n), largest first: of each frequency the most valuable pair comes first.
    """
    longest = max(each.size(1) for each in energies)
    total = sum(F.pad(each, (0, longest - each.size(1))) for each in energies)
    return (total.flatten().topk(count).indices // longest).sort().values
