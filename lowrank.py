"""Fewer cached heads for a layer: the mathematics of compress.py, and what it does to one attention.

One question, asked of every layer. Its n value heads, stacked, are y = W x: nD numbers a position. What shorter c = P x
should be cached instead, and what U brings y back?

    y  ~  U c,      least  E |S (y - U c)|^2.                                                                        (1)

S says what an error costs: for values, what W^O makes of it. If U may be anything, the answer is an SVD: the leading
eigenvectors of S E[y y^T] S^T are S U, and c are y's coordinates in them (`latent_maps`). U may then go into W^O.

MEA caches r component heads instead, c = (B_1 x .. B_r x), and mixes them: head h reads

    W_h x  ~  T_h sum_c w[c, h] B_c x,                                                                               (2)

which is (1) with blocks U_hc = w[c, h] T_h. w is its composition matrix; T_h is any D x D matrix, which goes into W^O.

      cached          a latent: any U             virtual heads: T_h w[c, h]
    c ######    y_1 = [ . . . . . . ]  c     y_1 = T_1 ( w_11 B_1 + w_21 B_2 )
                y_2 = [ . . . . . . ]  c     y_2 = T_2 ( w_12 B_1 + w_22 B_2 )
                y_3 = [ . . . . . . ]  c     y_3 = T_3 ( w_13 B_1 + w_23 B_2 )

Keys are the same with complex numbers: RoPE turns pair f of a head by an angle, and only a complex number per pair
commutes with that. So T_h, which goes into the queries, is D/2 complex numbers, and (2) is D/2 small problems that
share w. What a latent gains over virtual heads is what this condition costs; what it pays is that its keys have to be
rebuilt and rotated whenever they are read.

`approximate` solves (2), `latent_maps` (1), `compress_layer` puts them into a layer. Read `attention.py` before and
`compress.py` next.
"""

from options import autocast  # first: it sets how torch's threads wait

import contextlib
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attention import ATTENTION, MEA, HeadNorm, apply_rope, causal_attention, compose_heads, one_hot_composition

# ---------------------------------------------------------------------------------------------------------------------
# The approximation
#
# Heads are (n, g, b, M): n heads of g blocks of b features. A map T_h turns each block by itself, so that a value head
# is one block of D real features, while a key head, which RoPE turns frequency by frequency, is D/2 blocks of one
# complex number each.


def key_blocks(heads):
    """(n, D, M) real -> (n, D/2, 1, M) complex: the pairs that RoPE rotates; multiplying by a complex number commutes
    with it."""
    return torch.complex(*heads.chunk(2, dim=1)).unsqueeze(2)


def value_blocks(heads):
    """(n, D, M) -> (n, 1, D, M): a value head may be turned as a whole."""
    return heads.unsqueeze(1)


def from_blocks(blocks):
    """Undo `key_blocks` or `value_blocks`."""
    return torch.cat((blocks.real, blocks.imag), dim=1).squeeze(2) if blocks.is_complex() else blocks.squeeze(1)


def stack(heads):
    """(n, g, b, M) -> (g, n*b, M): all heads' features, block by block."""
    return heads.transpose(0, 1).flatten(1, 2)


def truncated_svd(heads, rank):
    """The paper's approximation (appendix F): w (rank, n) and the best sum_c w[c, h] B_c for heads (n, g, b, M).

    One column per head, M = U S V^T; w = V^T, and B = U S is what w^T makes of the heads, so only V is needed.
    """
    columns = torch.view_as_real(heads).flatten(1) if heads.is_complex() else heads.flatten(1)
    w = torch.linalg.eigh(columns @ columns.T).eigenvectors[:, -rank:].T  # (rank, n), orthonormal rows
    return w, torch.einsum("ch,ck,kgbm->hgbm", w.to(heads), w.to(heads), heads)


def components(w, maps, heads):
    """The B (r, g, b, M) that suit w (r, n) and T (n, g, b, b) best in (2), by least squares."""
    U = torch.einsum("ch,hgab->ghacb", w.to(maps), maps).flatten(3, 4).flatten(1, 2)  # (g, n*b, r*b)
    return (torch.linalg.pinv(U, rtol=1e-9) @ stack(heads)).unflatten(1, (-1, heads.size(2))).transpose(0, 1)


def rebuild(w, maps, parts):
    """T_h sum_c w[c, h] B_c: (n, g, b, M)."""
    return torch.einsum("hgab,ch,cgbm->hgam", maps, w.to(maps), parts)


def relative_error(heads, approximation):
    """The share of the heads' energy that an approximation misses."""
    return ((heads - approximation).abs().square().sum() / heads.abs().square().sum().clamp_min(1e-300)).item()


def fit_in_closed_form(heads, rank):
    """(w, T, error, least): (2) for one component, or for one less than heads; `least` is the bound of (1).

    The best is to keep the leading rank*b directions of the stacked heads and to lose the others. One component: its
    coordinates are the leading directions, T_h their rows of head h. One less: lost are b directions N, kept is what
    has none of them, sum_h N_h^H y_h = 0. With T_h = N_h^-H this reads sum_h sum_c w[c, h] B_c = 0, which holds for any
    B if the rows of w sum to 0. A head that has next to no part in N would need a huge T: the error tells.
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
    the truncated SVD of the heads turned back. `errors` is what is missing after each round; it never grows.
    """
    n, g, b, _ = heads.shape
    turn = torch.eye(b, dtype=heads.dtype).expand(n, g, b, b)
    w, target = truncated_svd(heads, rank)
    errors = [relative_error(heads, target)]
    for _ in range(rounds):
        left, _, right = torch.linalg.svd(heads @ target.mH)
        turn = left @ right
        w, target = truncated_svd(turn.mH @ heads, rank)
        errors.append(relative_error(heads, turn @ target))
        if converged(errors, tolerance):
            break
    return w, turn, errors


def fit_any_maps(heads, w, turn, rounds=300, tolerance=1e-5):
    """(w, T, errors): (2) with any T_h, improved from w (r, n), T (n, g, b, b): B, T and w in turns by least squares
    given the others."""
    errors = []
    for _ in range(rounds):
        parts = components(w, turn, heads)  # (r, g, b, M)
        target = torch.einsum("ch,cgbm->hgbm", w.to(heads), parts)
        turn = heads @ target.mH @ torch.linalg.pinv(target @ target.mH, rtol=1e-10, hermitian=True)
        turned = torch.einsum("hgab,cgbm->hcgam", turn, parts)  # T_h B_c: head h is a real combination of these
        columns, wanted = (torch.view_as_real(x) if x.is_complex() else x for x in (turned, heads))
        columns, wanted = columns.flatten(2).mT, wanted.flatten(1).unsqueeze(2)
        w = torch.linalg.lstsq(columns, wanted, driver="gelsd").solution[:, :, 0].T
        errors.append(relative_error(heads, torch.einsum("ch,hcgam->hgam", w.to(heads), turned)))
        if converged(errors, tolerance):
            break
    return w, turn, errors


def root(weight, moment):
    """(n, D, any) with the products of the heads' outputs: L of L L^T = E[y y^T] (nD, nD); without it the weights."""
    if moment is None:
        return weight
    values, vectors = torch.linalg.eigh(moment)  # any L does, and nothing longer than nD is needed
    return (vectors * values.clamp_min(0).sqrt()).unflatten(0, weight.shape[:2])


def approximate(weight, rank, kind, maps, moment=None, metric=None):
    """(2) for heads W (n, D, M): w (rank, n), T (n, D, D) real and the components' weights (rank, D, M), errors.

    `moment` (nD, nD) is E[y y^T] of what the heads put out: errors are then those of outputs, otherwise of weights.
    `metric` (n, D, D) is S of (1), head by head: of keys diagonal, and the same for both halves of a pair; with maps
    "rotations" a multiple of 1, which goes into w.
    """
    n, D, _ = weight.shape
    blocks = key_blocks if kind == "k" else value_blocks
    plain = blocks(root(weight, moment))
    S = torch.eye(D, dtype=weight.dtype).expand(n, D, D) if metric is None else metric
    S = (S.diagonal(dim1=1, dim2=2)[:, : D // 2, None, None] if kind == "k" else S[:, None]).to(plain)  # (n, g, b, b)
    heads = S @ plain
    if maps == "any":
        error = math.inf
        if rank in (1, n - 1):
            w, turn, error, least = fit_in_closed_form(heads, rank)
            errors = [error]
        if error == math.inf or error > 1.05 * least + 1e-12:
            w, turn, _ = align_by_rotation(plain, rank)  # in the plain metric: where that is exact, it stays exact
            w, turn, errors = fit_any_maps(heads, w, S @ turn)
    else:
        w, turn, errors = align_by_rotation(heads, rank, rounds=300 if maps == "rotations" else 0)
        if maps == "pool":  # neighbours share a head, their average
            w = one_hot_composition(rank, n).to(w)
            errors = [relative_error(heads, rebuild(w, turn, components(w, turn, heads)))]
    parts = from_blocks(components(w, turn, S @ blocks(weight)))  # (rank, D, M)
    if maps == "rotations":
        w = w / S[:, 0, 0, 0].real
    else:
        turn = torch.linalg.solve(S, turn)
    if kind == "v":
        return w, turn[:, 0], parts, errors
    real, imaginary = (torch.diag_embed(part) for part in (turn.real[:, :, 0, 0], turn.imag[:, :, 0, 0]))
    top, bottom = torch.cat((real, -imaginary), dim=2), torch.cat((imaginary, real), dim=2)
    return w, torch.cat((top, bottom), dim=1), parts, errors  # a + ib turns a pair by ((a, -b), (b, a))


def latent_maps(weight, rank, moment=None, metric=None):
    """(1) for heads W (n, D, M): P (rank*D, M), U (n*D, rank*D), error; moment and metric as in `approximate`."""
    n, D, _ = weight.shape
    if rank >= n:
        return weight.flatten(0, 1), torch.eye(n * D, dtype=weight.dtype), 0.0
    S = torch.eye(n * D, dtype=weight.dtype) if metric is None else torch.block_diag(*metric)
    stacked = S @ root(weight, moment).flatten(0, 1)
    energies, directions = torch.linalg.eigh(stacked @ stacked.T)
    kept = directions[:, -rank * D :]
    lost = energies[: -rank * D].sum() / energies.sum().clamp_min(1e-300)
    return kept.T @ S @ weight.flatten(0, 1), torch.linalg.solve(S, kept), lost.item()


# ---------------------------------------------------------------------------------------------------------------------
# One layer


@dataclass
class Method:
    """How a layer is compressed: the maps T of (2), or "latent" for (1), and what it looks at."""

    maps: str
    sees_data: bool = True  # outputs instead of weights
    weighs: bool = False  # errors by what queries and W^O make of them
    refits: bool = False  # W^O


METHODS = {
    "svd": Method("none", sees_data=False),
    "pooled": Method("pool", sees_data=False),
    "calibrated": Method("none"),
    "rotated": Method("rotations"),
    "aligned": Method("any", weighs=True, refits=True),
    "whitened": Method("latent"),
    "latent": Method("latent", weighs=True, refits=True),
}


def is_latent(method):
    return METHODS[method].maps == "latent"


def effective_heads(attn, kind):
    """What attention really reads as keys ("k") or values ("v"): W (n, D, C [+ 1 with a bias]), and of each query head
    which one.

    Heads that are composed already (MEA) are folded first, and equal ones, as grouped queries share them, are one head;
    they come in the order of the query heads.
    """
    projection = attn.k_proj if kind == "k" else attn.v_proj
    weight = projection.weight
    if projection.bias is not None:
        weight = torch.cat((weight, projection.bias[:, None]), dim=1)
    weight = weight.double().unflatten(0, (-1, attn.head_dim))  # (components, D, C)
    columns, reader = torch.unique(composition(attn, kind).to(weight), dim=1, return_inverse=True)  # sorted
    order = torch.stack([(reader == i).nonzero()[0, 0] for i in range(columns.size(1))]).argsort()
    return torch.einsum("cdm,cn->ndm", weight, columns[:, order]), order.argsort()[reader]


def composition(attn, kind):
    """(components, H): an MEA's compose_k or compose_v; of MHA the one-hot columns that say which head a query head
    reads."""
    if isinstance(attn, MEA):
        return attn.compositions()["kv".index(kind)]
    return one_hot_composition(attn.n_k, attn.n_head).to(attn.q_proj.weight)


def second_moments(attn, x, rope, view=0):
    """{"k": E[k k^T], "v": E[z z^T], "q": E|q|^2} of a layer's keys, values and queries over x (B, T, C).

    The keys of all heads side by side, before RoPE, and the values as the layer really sees them, averaged by attention
    maps: (nD, nD). For each key head and rotary frequency, the energy of the queries that read it: (n, D/2). Of each
    group of query heads that share a key head the maps are those of one, number `view`.
    """
    (keys, reader), (values, _) = effective_heads(attn, "k"), effective_heads(attn, "v")
    (B, T, _), D, group = x.shape, attn.head_dim, attn.n_head // len(keys)
    q = attn.q_norm(attn.q_proj(x).view(B, T, -1, D))
    energy = q.float().square().mean((0, 1)).unflatten(1, (2, -1)).sum(1).double()  # (H, D/2)
    q = apply_rope(q, rope).transpose(1, 2)  # (B, H, T, D)
    k, v = (project(heads, x) for heads in (keys, values))  # (B, T, n*D)
    read = apply_rope(attn.k_norm(attn.k_proj(x).view(B, T, -1, D)), rope).transpose(1, 2)
    q, read = (heads[:, view % group :: group] for heads in (q, compose_heads(read, composition(attn, "k"))))
    z = causal_attention(q, read, v[:, None].expand(-1, q.size(1), -1, -1))  # (B, H/group, T, n*D)
    moments = dict(q=torch.zeros(len(keys), D // 2).to(energy).index_add(0, reader, energy))
    for kind, rows in (("k", k), ("v", z)):
        rows = rows.reshape(-1, rows.size(-1)).float()
        with torch.autocast(rows.device.type, enabled=False):
            moments[kind] = (rows.T @ rows).double() / len(rows)
    return moments


def project(heads, x):
    """x (B, T, C) -> (B, T, n*D) with heads (n, D, C), or (n, D, C + 1) whose last column is a bias."""
    weight, bias = heads.flatten(0, 1).to(x).split((x.size(-1), heads.size(2) - x.size(-1)), dim=1)
    return F.linear(x, weight, bias[:, 0] if bias.numel() else None)


def error_metric(attn, kind, weight, reader, moment, queries, turns_only):
    """S of (1), head by head (n, D, D), or None: what an error in a key or value head costs.

    A key's error counts as much as its queries are large, frequency by frequency; a value's as W^O makes it, summed
    over the query heads that read it. A head norm divides by a head's size, and so does S; `turns_only`: nothing else.
    """
    n, D, _ = weight.shape
    normed = kind == "v" and isinstance(attn.head_norm, HeadNorm)
    size = torch.ones(n, dtype=weight.dtype)
    if normed:
        size = weight.square().sum((1, 2)) if moment is None else moment.diagonal().view(n, D).sum(1)
    if turns_only:
        eye = torch.eye(D, dtype=weight.dtype)
        return size.clamp_min(1e-30).rsqrt()[:, None, None] * eye if normed else None
    if kind == "k":
        if queries is None:
            return None
        return torch.diag_embed((queries / queries.mean()).clamp_min(1e-6).sqrt().repeat(1, 2))
    o = attn.o_proj.weight.double().unflatten(1, (attn.n_head, D))  # (C, H, D)
    if normed:
        o = o * attn.head_norm.weight
    gram = torch.zeros(n, D, D, dtype=o.dtype).index_add(0, reader, torch.einsum("cha,chb->hab", o, o))
    values, vectors = torch.linalg.eigh(gram / size.clamp_min(1e-30)[:, None, None])
    values = values.clamp_min(1e-6 * values.mean())  # what W^O ignores now it may read after it is refitted
    return (vectors * values.sqrt().unsqueeze(1)) @ vectors.mT


@dataclass
class Seen:
    """What calibration saw of one layer: the mean `second_moments`, and attention's inputs and outputs, both (B, T, C)
    in lists."""

    moments: dict
    inputs: list
    outputs: list
    rope: tuple
    dtype: torch.dtype


@torch.no_grad()
def refit_output(new, seen, ridge=0.03):
    """Fit W^O of a compressed layer anew, so that it repairs what it can: min_W sum |W y_new - W^O y|^2 + ridge |W -
    W_now|^2.

    y and y_new are the heads' outputs, side by side, of the layer before and after, over what was `seen`. The ridge is
    in units of y_new's mean square, so that directions that calibration hardly shows stay as they are.
    """
    heads = []
    hook = new.o_proj.register_forward_pre_hook(lambda _, y: heads.append(y[0].flatten(0, 1).float()))
    gram, product = 0.0, 0.0
    for x, output in zip(seen.inputs, seen.outputs):
        heads.clear()
        with autocast(x.device, seen.dtype):
            lost = (output - new(x, seen.rope)).flatten(0, 1).float()  # (B*T, C)
        gram, product = gram + (heads[0].T @ heads[0]).double(), product + (lost.T @ heads[0]).double()
    hook.remove()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    new.o_proj.weight.add_(torch.linalg.solve(gram, product, left=False))


@contextlib.contextmanager
def one_thread():
    """Problems this small only lose by being shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def compress_layer(attn, config, layer, method, seen=None):
    """(the MEA or Latent that replaces `attn`, {"k": error, "v": error}) with what config.kv_heads(layer) says cached.

    (2): B becomes k_proj and v_proj, w becomes compose_k and compose_v, T_h goes into q_proj as q_h <- T_h^T q_h and
    into the columns of W^O that read head h. A head norm is blind to rotations only, and its gain, which is not, goes
    into W^O first. (1): P becomes k_proj and v_proj, U k_up_proj and v_up_proj. Keys or values that keep all their
    heads stay as they are. `seen` as from `calibrate`; without it weights stand in for the data.
    """
    device, attn = attn.q_proj.weight.device, copy.deepcopy(attn).cpu()  # small problems, in float64
    new, how = ATTENTION[config.attention](config, layer).to(attn.q_proj.weight), METHODS[method]
    moments = seen.moments if seen is not None and how.sees_data else None
    ours, theirs = new.state_dict(), attn.state_dict()
    kept = {name: w for name, w in theirs.items() if name in ours and w.shape == ours[name].shape}
    new.load_state_dict(kept, strict=False)
    errors = {"k": 0.0, "v": 0.0}
    with one_thread():
        for kind, rank in zip("kv", config.kv_heads(layer)):
            if f"{kind}_proj.weight" in kept and not is_latent(method):
                continue
            weight, reader = effective_heads(attn, kind)
            moment = None
            if moments is not None:
                moment, rows = moments[kind].cpu(), weight.flatten(0, 1)
                plain = rows @ rows.T  # where the windows show nothing, the weights stand in for them
                moment = moment + 1e-4 * moment.trace() / plain.trace() * plain
            normed, maps = kind == "v" and isinstance(attn.head_norm, HeadNorm), how.maps
            if maps == "any" and (normed or moments is None):  # without data, wider maps only fit the weights better
                maps = "rotations"
            metric = None
            if how.weighs or maps == "rotations":
                queries = moments["q"].cpu() if moments is not None else None
                metric = error_metric(attn, kind, weight, reader, moment, queries, maps == "rotations")
            if maps == "latent":
                parts, up, errors[kind] = latent_maps(weight, rank, moment, metric)
                up = up.unflatten(0, weight.shape[:2])[reader[:: new.n_head // new.n_rebuilt]].flatten(0, 1)
                getattr(new, f"{kind}_up_proj").weight.copy_(
                    F.pad(up, (0, getattr(new, f"{kind}_up_proj").in_features - up.size(1)))
                )
            else:
                w, turn, parts, history = approximate(weight, min(rank, len(weight)), kind, maps, moment, metric)
                errors[kind], parts = history[-1], parts.flatten(0, 1)
                getattr(new, f"compose_{kind}").copy_(F.pad(w, (0, 0, 0, rank - len(w)))[:, reader])
                absorb_maps(new, attn, kind, turn[reader], normed and maps == "rotations")
            projection = getattr(new, f"{kind}_proj")
            parts = F.pad(parts, (0, 0, 0, projection.out_features - len(parts)))  # fewer distinct heads than room
            projection.weight.copy_(parts[:, : projection.in_features])
            if projection.bias is not None:
                projection.bias.copy_(parts[:, -1])
    new = new.to(device)
    if moments is not None and how.refits:
        refit_output(new, seen)
    return new, errors


def absorb_maps(new, attn, kind, turn, takes_gain):
    """Put T_h, one (D, D) per query head, into q_proj, for keys, or into o_proj, for values."""
    n_head, D = attn.n_head, attn.head_dim
    if kind == "k":
        for q in new.q_proj.parameters():  # (H*D, C) and, if there is one, the bias (H*D)
            q.copy_((turn.mT @ q.double().view(n_head, D, -1)).view_as(q))
        return
    o = new.o_proj.weight.double().view(-1, n_head, D)
    if takes_gain:
        o = o * new.head_norm.weight
        new.head_norm.weight.fill_(1.0)
    new.o_proj.weight.copy_(torch.einsum("mha,hab->mhb", o, turn).flatten(1))
