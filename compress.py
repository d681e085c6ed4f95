"""Half the KV cache: turns the heads of a trained model into fewer cached ones, measures what that costs, and heals it.

    python compress.py --checkpoint out/small --kv_ratio 0.5 --out_dir out/small-half
    python compress.py --checkpoint out/small --method latent --out_dir out/small-latent
    python compress.py --checkpoint FOLDER --data_dir data/d --calibration_data data/a,data/b --heal_steps 100 --distill

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
rebuilt and rotated whenever they are read. Between the two, `--method absorbed` lets U be anything that commutes with
RoPE: an SVD for each frequency, which keeps as many pairs as it needs; keys are cached rotated, and queries absorb U.

Virtual heads are the paper's format: MEA mixes them back as it reads them. `approximate` solves (2), `latent_maps` (1),
`compress_layer` puts them into a layer; `calibrate` shows a model text, `compress` replaces its layers one by one,
`probe` finds out which layers can spare how many heads, `heal` trains what is left. Read `attention.py` first.
"""

from options import autocast, choose_device, choose_dtype, fail, option, parse_options, read_json, run_program
from options import new_folder, progress, save_picture, say, write_atomically

import contextlib
import copy
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from attention import ATTENTION, MEA, HeadNorm, apply_rope, causal_attention, compose_heads, one_hot_composition
from checkpoint import FORMAT, find_checkpoint, load_checkpoint, save_checkpoint, starts_bare
from data.dataset import open_dataset
from data.sampler import WindowSampler, validation_windows
from data.tokenizer import load_tokenizer
from functional import PATHS, linear_cross_entropy, set_kernel
from huggingface import to_pretrained
from model import KVCache
from train import describe_data, evaluate, learning_rate, make_optimizer, same_tokenizer

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


def in_metric(heads, kind, metric):
    """(S (n, g, b, b), S y in blocks) of heads y (n, D, M); `metric` (n, D, D) is S of (1), head by head, or None."""
    n, D, _ = heads.shape
    S = torch.eye(D, dtype=heads.dtype).expand(n, D, D) if metric is None else metric
    blocks = key_blocks(heads) if kind == "k" else value_blocks(heads)
    S = (S.diagonal(dim1=1, dim2=2)[:, : D // 2, None, None] if kind == "k" else S[:, None]).to(blocks)
    return S, S @ blocks


def approximate(weight, rank, kind, maps, moment=None, metric=None):
    """(2) for heads W (n, D, M): w (rank, n), T (n, D, D) real and the components' weights (rank, D, M), errors.

    `moment` (nD, nD) is E[y y^T] of what the heads put out: errors are then those of outputs, otherwise of weights.
    `metric` of keys is diagonal, and the same for both halves of a pair; with maps "rotations" it is a multiple of 1,
    which goes into w.
    """
    n = len(weight)
    S, heads = in_metric(root(weight, moment), kind, metric)
    if maps == "any":
        error = math.inf
        if rank in (1, n - 1):
            w, turn, error, least = fit_in_closed_form(heads, rank)
            errors = [error]
        if error == math.inf or error > 1.05 * least + 1e-12:
            w, turn, _ = align_by_rotation(torch.linalg.solve(S, heads), rank)  # where that is exact, it stays exact
            w, turn, errors = fit_any_maps(heads, w, S @ turn)
    else:
        w, turn, errors = align_by_rotation(heads, rank, rounds=300 if maps == "rotations" else 0)
        if maps == "pool":  # neighbours share a head, their average
            w = one_hot_composition(rank, n).to(w)
            errors = [relative_error(heads, rebuild(w, turn, components(w, turn, heads)))]
    parts = from_blocks(components(w, turn, in_metric(weight, kind, metric)[1]))  # (rank, D, M)
    if maps == "rotations":
        w = w / S[:, 0, 0, 0].real
    else:
        turn = torch.linalg.solve(S, turn)
    if kind == "v":
        return w, turn[:, 0], parts, errors
    return w, as_real(torch.diag_embed(turn[:, :, 0, 0])), parts, errors


def latent_maps(weight, width, kind="v", moment=None, metric=None):
    """(1) for heads W (n, D, M): P (width, M), U (n*D, width), error and, of keys, the frequency of each pair of c.

    One block, as values are, may be mixed as a whole: kind "v" also suits keys that are cached before RoPE. The U of
    kind "k" commutes with RoPE: an SVD for each frequency, and kept are the largest energies of all. Moment and metric
    as in `approximate`.
    """
    n, D, _ = weight.shape
    S, heads = in_metric(root(weight, moment), kind, metric)
    (_, g, b, _), heads, rows = heads.shape, stack(heads), stack(in_metric(weight, kind, metric)[1])  # (g, n*b, M)
    energies, directions = torch.linalg.eigh(heads @ heads.mH)  # (g, n*b), (g, n*b, n*b)
    numbers = width // 2 if kind == "k" else width
    kept = energies.flatten().topk(min(numbers, energies.numel()))
    block, place = kept.indices // (n * b), kept.indices % (n * b)
    spare = numbers - len(block)  # more room than there are numbers
    down = F.pad((directions.mH @ rows)[block, place], (0, 0, 0, spare))  # (numbers, M)
    up = torch.zeros(n, g, b, numbers, dtype=down.dtype)
    columns = torch.linalg.solve(S, directions.unflatten(1, (n, b)).transpose(0, 1))  # (n, g, b, n*b)
    up[:, block, :, torch.arange(len(block))] = columns[:, block, :, place]
    error = (1 - kept.values.sum() / energies.sum().clamp_min(1e-300)).clamp_min(0).item()
    if kind == "v":
        return down, up.flatten(0, 2), error, None
    return torch.cat((down.real, down.imag)), as_real(up[:, :, 0]).flatten(0, 1), error, F.pad(block, (0, spare))


def as_real(maps):
    """(n, D/2, any/2) complex -> (n, D, any) real: a + ib turns a pair by ((a, -b), (b, a))."""
    return torch.cat((torch.cat((maps.real, -maps.imag), dim=2), torch.cat((maps.imag, maps.real), dim=2)), dim=1)


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
    "absorbed": Method("rotary", weighs=True, refits=True),
}


def is_latent(method):
    return METHODS[method].maps in ("latent", "rotary")


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
            if is_latent(method):
                width = rank * config.cached_dim
                mixed = kind if maps == "rotary" else "v"
                parts, up, errors[kind], pairs = latent_maps(weight, width, mixed, moment, metric)
                if pairs is not None:
                    new.pairs.copy_(pairs)
                up = up.unflatten(0, weight.shape[:2])[reader[:: new.n_head // new.n_rebuilt]].flatten(0, 1)
                getattr(new, f"{kind}_up_proj").weight.copy_(up)
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


# ---------------------------------------------------------------------------------------------------------------------
# A model


BUDGETS = {  # which of n layers give up heads; all three are the paper's (section 5.2)
    "all": lambda n: range(n),
    "deep": lambda n: range(3, n),
    "middle": lambda n: range(round(n / 4), round(3 * n / 4)),
}


def keys_stay(config, method):
    """QK-norm does not commute with composition; a latent's keys are rebuilt before it."""
    return config.qk_norm and METHODS[method].maps != "latent"


def units(config, method):
    """In how many parts `method` may cut a head: widths by frequency need not be those of heads."""
    return 4 if METHODS[method].maps == "rotary" and config.head_dim % 8 == 0 else 1


def cached_now(config, method):
    """One (n_k, n_v) per layer of what the model caches, in `units`."""
    return [tuple(n * units(config, method) for n in config.kv_heads(layer)) for layer in range(config.n_layer)]


def uniform_ranks(config, kv_ratio, budget="all", method="aligned"):
    """One (n_k, n_v) per layer: `kv_ratio` of the heads that each layer of the budget caches now.

    Keys and values keep as many; an odd one is a key head, of a latent a value head, whichever costs less, and of keys
    by frequency it is 7 in 12. Keys behind a QK-norm stay: values give up all. Raises ValueError, naming what is
    possible, for a ratio that is no number of heads.
    """
    ranks = cached_now(config, method)
    layers, stay = BUDGETS[budget](config.n_layer), keys_stay(config, method)
    if not layers:
        raise ValueError(f"budget {budget} leaves none of {config.n_layer} layers to compress: use all or probe")
    for layer in layers:
        n_k, n_v = ranks[layer]
        what = f"{n_k} key and {n_v} value heads" + " (keys behind a QK-norm stay)" * stay
        heads = check_ratio(kv_ratio, n_k + n_v, n_k + 1 if stay else 2, what)
        wanted = {"latent": heads // 2, "rotary": round(7 * heads / 12)}.get(METHODS[method].maps, heads - heads // 2)
        keys = n_k if stay else max(heads - n_v, min(n_k, wanted))
        ranks[layer] = keys, heads - keys
    return ranks


def check_ratio(kv_ratio, heads, fewest, what):
    """kv_ratio * heads, a whole number of at least `fewest` but for rounding of the ratio. Raises ValueError, naming
    what is possible."""
    kept = round(kv_ratio * heads) if math.isfinite(kv_ratio) else 0
    if abs(kept / heads - kv_ratio) > 0.005 or not fewest <= kept <= heads:
        possible = [f"{n / heads:.4g}" for n in range(fewest, heads + 1)]
        listed = ", ".join(possible if len(possible) < 20 else [*possible[:3], "..", *possible[-3:]])
        raise ValueError(f"kv_ratio {kv_ratio:g} of {what} is no number of heads that works: {listed} are possible")
    return kept


def choose_ranks(config, kv_ratio, budget, costs=None, method="aligned"):
    """The ranks for a budget: `uniform_ranks`, or for "probe" those that `allocate` chooses by its `costs` (None only
    checks)."""
    if budget != "probe":
        return uniform_ranks(config, kv_ratio, budget, method)
    pairs = cached_now(config, method)
    fewest = sum(n_k + 1 if keys_stay(config, method) else 2 for n_k, _ in pairs)
    total = sum(map(sum, pairs))
    heads = check_ratio(kv_ratio, total, fewest, f"{total} cached heads in {config.n_layer} layers")
    return allocate(costs, heads) if costs else pairs


def with_ranks(config, ranks, method="aligned"):
    """The config of the model that caches `ranks`, one (n_k, n_v) per layer."""
    shape = dict(n_kv_head=[list(pair) for pair in ranks], mea_form="auto", compose="full")
    if not is_latent(method):
        return replace(config, attention="mea", **shape)
    grouped = config.attention == "mha" and len({config.kv_heads(layer) for layer in range(config.n_layer)}) == 1
    shape["latent_heads"] = config.kv_heads(0)[0] if grouped else config.n_head
    if METHODS[method].maps == "rotary":
        shape.update(latent_rotated=True, latent_dim=config.head_dim // units(config, method))
    return replace(config, attention="latent", **shape)


def rope_of(model, length):
    return model.rope_cos[:length], model.rope_sin[:length]


def calibrate(model, tokens, chunk=4, dtype=torch.float32):
    """Yield a `Seen` for each layer in turn of the original `model`, which sees tokens (N, T), or nothing, in `dtype`.

    Each layer may be replaced when it has been yielded. Memory: what one layer sees, unless it is kept.
    """
    if tokens is None:
        yield from [None] * len(model.layers)
        return
    parts, rope = [model.embed(part).detach() for part in tokens.split(chunk)], rope_of(model, tokens.size(1))
    for block in model.layers:  # nothing is held open while the caller works
        with torch.no_grad(), autocast(tokens.device, dtype):
            inputs = [block.input_layernorm(x) for x in parts]
            outputs = [block.self_attn(x, rope) for x in inputs]
            moments = [second_moments(block.self_attn, x, rope, view) for view, x in enumerate(inputs)]
            parts = [x + output for x, output in zip(parts, outputs)]
            parts = [x + block.mlp(block.post_attention_layernorm(x)) for x in parts]
        mean = {kind: sum(each[kind] for each in moments) / len(moments) for kind in moments[0]}
        yield Seen(mean, inputs, outputs, rope, dtype)


@torch.no_grad()
def compress(model, ranks, method="aligned", calibration=None):
    """Replace every attention of `model` by one that caches `ranks`, in place: memory is the model and one layer's
    work.

    `calibration` has what each layer sees (see `calibrate`), of the original model; without it weights stand in for the
    data. Returns one {"k": error, "v": error} per layer.
    """
    config, errors = with_ranks(model.config, ranks, method), []
    bar = progress(f"compressing, {method}", len(model.layers), " layers")
    for layer, (block, seen) in enumerate(zip(model.layers, calibration or [None] * len(model.layers))):
        block.self_attn, lost = compress_layer(block.self_attn, config, layer, method, seen)
        errors.append(lost)
        bar.update(1)
    bar.close()
    model.config = config
    return errors


@torch.no_grad()
def probe(model, method, tokens, windows, chunk=4, dtype=torch.float32):
    """{(layer, "k" or "v"): [increase of the loss with 1, 2, .. n heads]}, each measured with the rest of the model as
    it is.

    The paper's figure 8, for keys and values apart. `tokens` (N, T), or None, calibrate as in `compress`; `windows`
    (inputs, targets), two arrays (N, T), measure. Only the layers from the changed one on are computed anew.
    """
    device, config, costs = model.embed_tokens.weight.device, model.config, {}
    x, y = ([part.to(device) for part in torch.from_numpy(side).split(chunk)] for side in windows)
    x = [model.embed(part) for part in x]

    def forward(block, inputs):
        with autocast(device, dtype):
            return [block(part, rope_of(model, part.size(1))) for part in inputs]

    def loss(layer):
        outputs = x
        for block in model.layers[layer:]:
            outputs = forward(block, outputs)
        losses = [
            linear_cross_entropy(model.norm(out).flatten(0, 1), model.lm_head.weight, part.flatten()).item() * len(part)
            for out, part in zip(outputs, y)
        ]
        return sum(losses) / len(windows[0])

    base, bar = loss(0), progress("probing", len(model.layers), " layers")
    for layer, (block, seen) in enumerate(zip(model.layers, calibrate(model, tokens, chunk, dtype))):
        original, full = block.self_attn, cached_now(config, method)[layer]
        for kind, n in zip("kv", full):
            fixed = kind == "k" and keys_stay(config, method)
            costs[layer, kind] = [math.inf if fixed else 0.0] * (n - 1) + [0.0]
            for rank in range(1, 1 if fixed else n):
                ranks = cached_now(config, method)
                ranks[layer] = (rank, full[1]) if kind == "k" else (full[0], rank)
                smaller = with_ranks(config, ranks, method)
                block.self_attn, _ = compress_layer(original, smaller, layer, method, seen)
                costs[layer, kind][rank - 1] = loss(layer) - base
            listed = " ".join(f"{cost:+.4f}" for cost in costs[layer, kind])
            say(f"probe: layer {layer:>2}, 1 .. {n} {'keys' if kind == 'k' else 'values'}: {listed}")
        block.self_attn = original
        x = forward(block, x)
        bar.update(1)
    bar.close()
    return costs


def allocate(costs, heads):
    """The ranks, one [n_k, n_v] per layer, with `heads` cached heads in all and the smallest sum of `costs` (see
    `probe`).

    Exact for that sum, by dynamic programming over what is left to give away. That the increases add up is an
    assumption.
    """
    best = {0: (0.0, ())}  # heads spent so far -> (cost, rank of every item so far)
    for item in costs.values():
        extended = {}
        for spent, (cost, ranks) in best.items():
            for rank, more in enumerate(item, 1):
                candidate = cost + max(more, 0.0), (*ranks, rank)
                if spent + rank <= heads and (spent + rank not in extended or candidate[0] < extended[spent + rank][0]):
                    extended[spent + rank] = candidate
        best = extended
    ranks = best[heads][1]
    return [tuple(ranks[i : i + 2]) for i in range(0, len(ranks), 2)]


# ---------------------------------------------------------------------------------------------------------------------
# Healing

HEALED = {  # --heal_params: what may move
    "all": lambda name: True,
    "attention": lambda name: ".self_attn." in name,
    "compose": lambda name: ".compose_" in name,
    "keep_kv": lambda name: not name.endswith(("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")),
}


class Mixture:
    """Windows taken from several texts in turn, each begun by the model's start of text, if it has one.

    `batch(step, batch_size)` as of `WindowSampler`: (inputs, targets), a pure function of its arguments.
    """

    def __init__(self, texts, block_size, seed, start=()):
        self.samplers, self.start = [WindowSampler(text, block_size, seed) for text in texts], start

    def batch(self, step, batch_size):
        places = [divmod(row, len(self.samplers)) for row in range(step * batch_size, (step + 1) * batch_size)]
        rows = [self.samplers[text].batch(number, 1) for number, text in places]
        return begin([np.concatenate(side) for side in zip(*rows)], self.start)


def begin(windows, start):
    """Windows (inputs, targets) whose first inputs are the tokens of `start`, if there are any."""
    windows[0][:, : len(start)] = list(start)
    return windows


def heal(model, sampler, o, steps, teacher=None, report=lambda *_: None, done=0, optimizer_state=None):
    """Train `model` for some steps of continued pretraining, or, with a `teacher`, of distillation: sum_t KL(teacher_t
    || model_t) / T.

    AdamW without weight decay, linear warm-up over a tenth of the steps, then a cosine to 0 (the paper's, section 5.2).
    `sampler` has `batch`, and `o` has batch_size, heal_learning_rate, heal_params. After every step `report(steps done,
    loss, optimizer)`, of which `done` and the optimizer's state go on. Raises ValueError if the loss is no longer
    finite.
    """
    device = model.embed_tokens.weight.device
    dtype = choose_dtype("auto", device)
    chosen = [p for name, p in model.named_parameters() if HEALED[o.heal_params](name)]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    optimizer = make_optimizer([dict(params=chosen, weight_decay=0.0)], o.heal_learning_rate)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    schedule = SimpleNamespace(learning_rate=o.heal_learning_rate, warmup_steps=max(1, steps // 10), max_steps=steps)
    schedule.schedule = "cosine"
    bar = progress("healing", steps, " steps")
    bar.update(done)
    model.train()
    for step in range(done, steps):
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, step, floor=0.0)
        x, y = (torch.from_numpy(part).to(device) for part in sampler.batch(step, o.batch_size))
        with autocast(device, dtype):
            if teacher is None:
                loss = model(x, y)[1]
            else:
                with torch.no_grad():
                    wanted = teacher(x)[0].float().flatten(0, 1).log_softmax(-1)
                loss = F.kl_div(
                    model(x)[0].float().flatten(0, 1).log_softmax(-1), wanted, reduction="batchmean", log_target=True
                )
        if not math.isfinite(loss.item()):
            raise ValueError(f"loss {loss.item()} at step {step + 1} of healing: try a lower --heal_learning_rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(step + 1, loss.item(), optimizer)
        bar.update(1)
    bar.close()
    for p in model.parameters():
        p.requires_grad_(True)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The program


@dataclass
class Options:
    checkpoint: str = option("out/small", "run folder or file, a Hugging Face folder or hub name, or a .gguf file")
    out_dir: str = option("", "folder of the compressed model (default: the checkpoint's with -kv<ratio> behind it)")
    overwrite: bool = option(False, "replace what out_dir holds")
    resume: bool = option(False, "go on healing what out_dir holds; only --device, --threads and --kernel are read")
    kv_ratio: float = option(0.5, "cached heads to keep: of every layer of the budget; with probe, of the whole model")
    method: str = option(
        "aligned",
        "virtual heads: svd, the paper's; pooled, neighbours averaged; calibrated, svd in the metric of the data; "
        "rotated, and heads turned so that they agree; aligned, by any map that costs nothing, W^O refitted. Latents, "
        "whose keys are rebuilt when read: whitened, an SVD of the outputs; latent, weighted by queries and W^O; "
        "absorbed, the same with keys cached after RoPE, frequency by frequency, which nothing rebuilds",
        list(METHODS),
    )
    budget: str = option("all", "layers that give up heads; probe: measure where they cost least", [*BUDGETS, "probe"])
    data_dir: str = option("", "data set that is reported on (default: the one that the checkpoint was trained on)")
    calibration_data: str = option("", "data sets to calibrate, probe and heal on, between commas (default: data_dir)")
    calibration_windows: int = option(32, "training windows that the method sees; 0: only weights", least=0)
    probe_windows: int = option(8, "training windows that a probe measures on", least=1)
    eval_windows: int = option(64, "validation windows of each data set that the report measures on", least=1)
    heal_steps: int = option(0, "training steps afterwards", least=0)
    heal_learning_rate: float = option(3e-4, "peak of their schedule", above=0)
    heal_params: str = option("all", "what they may move; keep_kv: all but k_proj and v_proj", list(HEALED))
    heal_checks: int = option(10, "times that healing saves its state and measures", least=1)
    distill: bool = option(False, "heal towards the original model's predictions instead of the tokens")
    continue_original: bool = option(False, "also train the original as long, to compare healing with")
    batch_size: int = option(8, "windows in a healing step", least=1)
    block_size: int | None = option(None, "positions in a window (default: the model's, at most 512)", least=2)
    context: int | None = option(None, "positions to decode behind (default: the model's, at most 4,096)", least=2)
    rows: int = option(1, "rows to decode at once", least=1)
    curve: str = option("", "also compress to each of these ratios and measure, e.g. 1.0,0.75,0.5,0.25")
    export: str = option("", "hf: only write the checkpoint, uncompressed, as a Hugging Face folder", ["", "hf"])
    seed: int = option(0, "of the calibration windows and of healing", least=0)
    kernel: str = option("auto", "path of the attention (see functional.py)", PATHS)
    device: str = option("auto", "cpu, cuda or cuda:1; auto takes the best there is")
    threads: int = option(0, "CPU threads (0: as many as cores)", least=0)


def open_job(o, given):
    """Check everything before any work: (model, state, data sets by path, the reported one first). Raises ValueError or
    OSError."""
    how = given & {"distill", "continue_original", "heal_params", "heal_learning_rate", "heal_checks"}
    if how and not o.heal_steps:
        raise ValueError(f"{', '.join(sorted(how))} says how to heal: give --heal_steps too")
    if "probe_windows" in given and o.budget != "probe":
        raise ValueError("probe_windows are for --budget probe: give both or neither")
    out = Path(o.out_dir)
    ours = (out / "report.json").is_file()
    if not o.resume and out.exists() and (not out.is_dir() or any(out.iterdir())) and not (o.overwrite and ours):
        what = "holds another model" if ours else "exists and compress.py did not make it"
        raise ValueError(f"{out} {what}: give another --out_dir" + (" or --overwrite" if ours else ""))
    device = choose_device(o.device)
    model, state = load_checkpoint(o.checkpoint, "cpu" if device.type == "mps" else device)  # mps has no float64
    config = model.config
    if why := ATTENTION[config.attention].incompressible:
        raise ValueError(f"{o.checkpoint} is a {config.attention} model, which cannot be compressed: {why}")
    for ratio in (o.kv_ratio, *curve_of(o)):
        with_ranks(config, choose_ranks(config, ratio, o.budget, method=o.method), o.method)
    saved = state.get("options")
    data_dir = o.data_dir or (saved.get("data_dir") if isinstance(saved, dict) else None)
    if not isinstance(data_dir, str) or not data_dir:
        how = "give --data_dir (data/prepare.py --tokenizer hf:FOLDER makes one)"
        raise ValueError(f"{o.checkpoint} does not say what data it was trained on: {how}")
    folders = [part.strip() for part in (o.calibration_data or data_dir).split(",") if part.strip()]
    try:
        texts = {folder: open_dataset(folder) for folder in (data_dir, *folders)}
    except FileNotFoundError as error:
        raise ValueError(f"{error}; if it lies elsewhere, say where with --data_dir") from None
    for name, default in (("block_size", 512), ("context", 4096)):
        value = getattr(o, name) or min(config.block_size, default)
        if value > config.block_size:
            raise ValueError(f"{name} must be between 2 and the model's {config.block_size}, not {value}")
        setattr(o, name, value)
    for folder, dataset in texts.items():
        if not same_tokenizer(o.checkpoint, state, dataset):
            raise ValueError(f"{folder} was made with another tokenizer than {o.checkpoint}: prepare it with that one")
        for split, tokens in (("training", dataset.train), ("validation", dataset.val)):
            if len(tokens) <= o.block_size:
                raise ValueError(f"the {split} split of {folder} has {len(tokens)} tokens, fewer than a window needs")
    o.data_dir, o.calibration_data = data_dir, ",".join(folders)
    return model, state, texts


def curve_of(o):
    """The ratios of --curve. Raises ValueError."""
    try:
        return [float(part) for part in o.curve.split(",") if part.strip()]
    except ValueError:
        wanted = "ratios with commas between them, such as 1.0,0.75,0.5"
        raise ValueError(f"curve must be {wanted}, not {o.curve!r}") from None


@torch.inference_mode()
def decoding(model, rows, context, tokens=8):
    """(tokens per second, cache bytes) of decoding against about `context` positions: the median over two seconds."""
    cache = KVCache(model.config, rows, context, model.lm_head.weight.dtype, model.lm_head.weight.device)
    times, tokens = [], min(tokens, context)
    while len(times) < 8 or sum(times) < 2:
        cache.lengths = [context - tokens] * rows
        token = torch.zeros(rows, 1, dtype=torch.long, device=cache.device)
        began = time.perf_counter()
        for _ in range(tokens):
            token = model(token, cache=cache)[0].argmax(-1)
        token.tolist()  # waits for a GPU
        times.append(time.perf_counter() - began)
    return rows * tokens / statistics.median(times[1:]), cache.nbytes  # the first one warmed up


class Job:
    """One run: the options, the texts, and the report as it grows. `folder` is complete and usable after `compress`."""

    def __init__(self, o, texts, start, device, report=None):
        self.o, self.texts, self.start, self.device = o, texts, start, device
        self.dtype = choose_dtype("auto", device)
        self.windows = {
            folder: begin(validation_windows(text.val, o.block_size, o.eval_windows), start)
            for folder, text in texts.items()
        }
        self.report = report or dict(method=o.method, budget=o.budget, seed=o.seed, options=asdict(o), texts={})

    def sampler(self, seed):
        train = [self.texts[folder].train for folder in self.o.calibration_data.split(",")]
        return Mixture(train, self.o.block_size, seed, self.start)

    def measure(self, model, stage):
        """{folder: loss}, kept in the report under `stage`, and said."""
        losses, said = {}, []
        for folder, windows in self.windows.items():
            losses[folder] = loss = evaluate(model, windows, self.o.batch_size, self.device, self.dtype)
            stages = self.report["texts"].setdefault(folder, {})
            stages[stage] = loss
            said.append(f"{loss:.4f} ({loss - stages['before']:+.4f}) on {folder}")
        own = losses[self.o.data_dir]
        self.report.setdefault("loss", {})[stage] = own
        self.report.setdefault("bpb", {})[stage] = self.texts[self.o.data_dir].bits_per_byte(own)
        say(f"loss {stage}: " + ", ".join(said))
        return losses

    def compress(self, model):
        """Compress as the options say, and measure."""
        o, report, config = self.o, self.report, model.config
        sees_data = o.calibration_windows and METHODS[o.method].sees_data
        seen = self.sampler(o.seed).batch(0, o.calibration_windows + o.probe_windows)
        tokens = torch.from_numpy(seen[0][: o.calibration_windows]).to(self.device) if sees_data else None
        heads = "{} key and {} value heads".format(*config.kv_heads(0))
        say(f"{config.attention}, {model.n_params():,} parameters, {config.n_layer} layers of {heads}")
        self.measure(model, "before")
        costs = None
        if o.budget == "probe":
            few = tuple(part[o.calibration_windows :] for part in seen)  # neither calibrated nor reported on
            costs = probe(model, o.method, tokens, few, dtype=self.dtype)
            report["probe"] = {kind: [costs[layer, kind] for layer in range(config.n_layer)] for kind in "kv"}
        for ratio in curve_of(o):
            smaller = copy.deepcopy(model)
            chosen = choose_ranks(config, ratio, o.budget, costs, o.method)
            compress(smaller, chosen, o.method, calibrate(smaller, tokens, dtype=self.dtype))
            loss = evaluate(smaller, self.windows[o.data_dir], o.batch_size, self.device, self.dtype)
            point = dict(kv_ratio=ratio, kv_bytes_per_token=smaller.config.kv_bytes_per_token(), loss=loss)
            report.setdefault("curve", []).append(point)
            say(f"kv_ratio {ratio:g}: {point['kv_bytes_per_token']:,} bytes per token, loss {loss:.4f}")
        ranks = choose_ranks(config, o.kv_ratio, o.budget, costs, o.method)
        speed, size = decoding(model, o.rows, o.context)  # now, so that no second model has to be kept for it
        began = time.monotonic()
        report["errors"] = compress(model, ranks, o.method, calibrate(model, tokens, dtype=self.dtype))
        report["seconds"] = round(time.monotonic() - began, 1)
        self.measure(model, "after")
        speeds, sizes = zip((speed, size), decoding(model, o.rows, o.context))
        per_token = [size // (o.rows * o.context) for size in sizes]
        report["ranks"] = [list(pair) for pair in ranks]
        report["kv_bytes_per_token"] = dict(before=per_token[0], after=per_token[1])
        report["kv_ratio"] = per_token[1] / per_token[0]
        report["cache"] = dict(rows=o.rows, context=o.context, bytes=dict(before=sizes[0], after=sizes[1]))
        report["decode_tokens_per_second"] = dict(before=round(speeds[0], 2), after=round(speeds[1], 2))

    def state(self, model):
        dataset = self.texts[self.o.data_dir]
        return dict(
            model=model.state_dict(),
            config=asdict(model.config),
            data=describe_data(dataset),
            options=dict(data_dir=str(dataset.folder)),
            start_of_text=bool(self.start),
        )

    def write_report(self, folder):
        write_atomically(folder / "report.json", json.dumps(self.report, indent=2) + "\n")

    def publish(self, model):
        with new_folder(self.o.out_dir, self.o.overwrite) as folder:
            save_checkpoint(folder, self.state(model))
            self.texts[self.o.data_dir].tokenizer.save(folder)
            config = dict(format=FORMAT, model=asdict(model.config))
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            self.write_report(folder)

    def heal(self, model, original, healing=None):
        """Heal the published model, saved and measured heal_checks times on the way; `healing` is the state to go on
        from."""
        o, folder, report = self.o, Path(self.o.out_dir), self.report
        healing = healing or dict(step=0, seconds=0.0, optimizer=None)
        report["healing"] = [point for point in report.get("healing", []) if point["step"] <= healing["step"]]
        every, began = math.ceil(o.heal_steps / o.heal_checks), time.monotonic() - healing["seconds"]
        data = self.sampler(o.seed + 1)

        def check(step, loss, optimizer):
            if step % every and step < o.heal_steps:
                return
            seconds = time.monotonic() - began
            say(f"healing: step {step}/{o.heal_steps}, {seconds:.0f} s, {'KL' if o.distill else 'loss'} {loss:.4f}")
            model.eval()
            tokens = step * o.batch_size * o.block_size
            losses = self.measure(model, "healed")
            model.train()
            report["healing"].append(dict(step=step, tokens=tokens, seconds=round(seconds, 1), loss=losses))
            self.write_report(folder)
            state = dict(step=step, seconds=seconds, optimizer=optimizer.state_dict())
            save_checkpoint(folder, self.state(model) | dict(healing=None if step == o.heal_steps else state))
            (folder / "checkpoint.prev.pt").unlink()  # thrice the model's size, and older

        teacher = original if o.distill else None
        heal(model, data, o, o.heal_steps, teacher, check, healing["step"], healing["optimizer"])
        if o.continue_original:
            self.measure(heal(original, data, replace(o, heal_params="all"), o.heal_steps), "continued")
            self.write_report(folder)


def print_report(report):
    stages = list(report["loss"])
    say(f"\n{'':<28}" + "".join(f"{stage:>14}" for stage in stages))
    for folder, losses in report["texts"].items():
        say(f"{'loss, ' + Path(folder).name:<28}" + "".join(f"{losses[stage]:14.4f}" for stage in stages))
    for name, key, form in (
        ("bits per byte", "bpb", "14.4f"),
        ("cached bytes per token", "kv_bytes_per_token", "14,"),
        ("decoding, tokens/s", "decode_tokens_per_second", "14,.1f"),
    ):
        say(f"{name:<28}" + "".join(f"{value:{form}}" for value in report[key].values()))
    cache = report["cache"]
    sizes = "".join(f"{size / 2**20:>10,.2f} MiB" for size in cache["bytes"].values())
    say(f"{'cache of {rows} x {context:,}'.format(**cache):<28}{sizes}")
    say("\nlayer   keys  values   % of energy lost: keys  values")
    for layer, ((n_k, n_v), error) in enumerate(zip(report["ranks"], report["errors"])):
        say(f"{layer:>5}{n_k:>7}{n_v:>8}{100 * error['k']:>23.3f}{100 * error['v']:>8.3f}")


def draw_report(plt, report):
    """Errors by layer, and where they were measured the loss against the cache and the loss while healing."""
    panels = ["errors", *(name for name in ("curve", "healing") if report.get(name))]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False)
    before = report["loss"]["before"]
    for panel, ax in zip(panels, axes[0]):
        if panel == "errors":
            for kind, name, shift in (("k", "keys", -0.2), ("v", "values", 0.2)):
                lost = [100 * error[kind] for error in report["errors"]]
                ax.bar([layer + shift for layer in range(len(lost))], lost, 0.4, label=name)
            ax.set(xlabel="layer", ylabel="% of energy lost", title=f"error by layer, {report['method']}")
        elif panel == "curve":
            points = sorted((point["kv_bytes_per_token"], point["loss"]) for point in report["curve"])
            ax.plot(*zip(*points), "o-", label="before healing")
            ax.set(xlabel="cached bytes per token", ylabel="loss, nats per token", xlim=(0, None))
            ax.axhline(before, color="grey", ls="--", label="original")
        else:
            for folder, losses in report["texts"].items():
                points = [(0, losses["after"]), *((p["step"], p["loss"][folder]) for p in report["healing"])]
                ax.plot(*zip(*((x, y - losses["before"]) for x, y in points)), "o-", label=Path(folder).name)
            ax.set(xlabel="step of healing", ylabel="loss over the original's", ylim=(0, None))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    return figure


def export(o, given):
    """Write the checkpoint as it is as a Hugging Face folder."""
    if ignored := given - {"export", "checkpoint", "out_dir"}:
        raise ValueError(
            f"export only writes the checkpoint, into a new folder: leave out {', '.join(sorted(ignored))}"
        )
    model, _ = load_checkpoint(o.checkpoint)
    note = to_pretrained(model, o.out_dir, load_tokenizer(find_checkpoint(o.checkpoint).parent))
    say(f"wrote {o.out_dir}, which transformers reads" + (f"; {note}" if note else ""))


def interrupted(o, given):
    """(options, report, compressed model, state) of a healing that was stopped. Raises ValueError or OSError."""
    if ignored := given - {"resume", "out_dir", "device", "threads", "kernel"}:
        raise ValueError(f"resume goes on as out_dir says: leave out {', '.join(sorted(ignored))}")
    report = read_json(Path(o.out_dir) / "report.json")
    model, state = load_checkpoint(o.out_dir, choose_device(o.device))
    here = dict(resume=True, out_dir=o.out_dir, device=o.device, threads=o.threads, kernel=o.kernel)
    saved = Options(**report["options"] | here)
    if not saved.heal_steps or "healing" in state and state["healing"] is None:
        raise ValueError(f"{o.out_dir} is not waiting to be healed")
    return saved, report, model, state.get("healing")


def main(argv=None):
    o, given = parse_options(Options, argv)
    try:
        o.out_dir = o.out_dir or f"{str(o.checkpoint).rstrip('/')}-{'hf' if o.export else f'kv{o.kv_ratio:g}'}"
        if o.export:
            return export(o, given)
        report = healing = None
        if o.resume:
            o, report, model, healing = interrupted(o, given)
        original, state, texts = open_job(o, given - {"resume"})
        start = () if starts_bare(state) else texts[o.data_dir].tokenizer.start_of_text
        set_kernel(o.kernel)
        if o.threads:
            torch.set_num_threads(o.threads)
        torch.manual_seed(o.seed)
        job = Job(o, texts, start, original.lm_head.weight.device, report)
        if not o.resume:
            model = copy.deepcopy(original) if o.heal_steps else original
            job.compress(model)
            job.publish(model)
        if o.heal_steps:
            job.heal(model, original, healing)
    except (ValueError, OSError) as error:
        fail(error)
    print_report(job.report)
    picture = save_picture(Path(o.out_dir) / "report.png", lambda plt: draw_report(plt, job.report))
    say(f"\nwrote {o.out_dir}; {picture}; try: python sample.py --checkpoint {o.out_dir}")


if __name__ == "__main__":
    run_program(main)
