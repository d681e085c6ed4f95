"""One attention layer becomes a smaller one: virtual heads, grouped heads, or a latent, fitted by `lowrank.py`.

`compress_layer` makes virtual heads and latents, `join_heads` grouped heads; both look at what `second_moments` says of
a text that the layer saw. Read `attention.py` and `lowrank.py` first, and `compress.py` next, which does it to a model.
"""

import contextlib
import copy
import functools
import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from attention import ATTENTION, MEA, MHA, HeadNorm, apply_rope, one_hot_composition
from functional import causal_attention, compose_heads
from lowrank import approximate, keep_features, keep_pairs, spectrum
from options import autocast

# ---------------------------------------------------------------------------------------------------------------------
# One layer


@dataclass
class Method:
    """How a layer is compressed: `form` is that of the maps T of lowrank.py's (2), or "latent" or "grouped" heads."""

    form: str
    sees_data: bool = True  # outputs instead of weights
    weighs: bool = False  # errors by what queries and W^O make of them
    refits: bool = False  # W^O


TINY = 1e-30  # a layer may have been pruned away: what is divided by is not 0

METHODS = {
    "svd": Method("none", sees_data=False),
    "calibrated": Method("none"),
    "rotated": Method("rotations"),
    "aligned": Method("any", weighs=True, refits=True),
    "whitened": Method("latent"),
    "latent": Method("latent", weighs=True, refits=True),
    "gqa": Method("grouped", weighs=True, refits=True),
}


def is_latent(method):
    return METHODS[method].form == "latent"


def is_grouped(method):
    return METHODS[method].form == "grouped"


def effective_heads(attn, kind):
    """What attention really reads as keys ("k") or values ("v"): W (n, D, C [+ 1 with a bias]), and `reads` (H), which
    of them each query head reads.

    Heads that are composed already (MEA) are folded first, and equal ones, as grouped queries share them, are one head;
    they come in the order of the query heads.
    """
    projection = attn.k_proj if kind == "k" else attn.v_proj
    weight = projection.weight
    if projection.bias is not None:
        weight = torch.cat((weight, projection.bias[:, None]), dim=1)
    weight = weight.double().unflatten(0, (-1, attn.head_dim))  # (components, D, C)
    columns, reads = torch.unique(composition(attn, kind).to(weight), dim=1, return_inverse=True)  # sorted
    order = torch.stack([(reads == i).nonzero()[0, 0] for i in range(columns.size(1))]).argsort()
    return torch.einsum("cdm,cn->ndm", weight, columns[:, order]), order.argsort()[reads]


def composition(attn, kind):
    """(components, H): an MEA's compose_k or compose_v; of MHA the one-hot columns that say which head a query head
    reads."""
    if isinstance(attn, MEA):
        return attn.compositions()["kv".index(kind)]
    return one_hot_composition(attn.n_k, attn.n_head).to(attn.q_proj.weight)


def second_moments(attn, x, rope, view=0):
    """{"k": E[k k^T], "v": E[z z^T], "q": E|q|^2} of a layer's keys, values and queries over x (B, T, C).

    k: the keys of all heads side by side, before RoPE. z: all values side by side, averaged by an attention map; of the
    query heads that share a key head only one, number `view`, lends its map. Both moments are (nD, nD). "q" (n, D/2):
    the energy of the queries that read a key head, at each rotary frequency.
    """
    (keys, reads), (values, _) = effective_heads(attn, "k"), effective_heads(attn, "v")
    (B, T, _), D, group = x.shape, attn.head_dim, attn.n_head // len(keys)
    q = attn.q_norm(attn.q_proj(x).view(B, T, -1, D))
    energy = q.float().square().mean((0, 1)).unflatten(1, (2, -1)).sum(1).double()  # (H, D/2)
    q = apply_rope(q, rope).transpose(1, 2)  # (B, H, T, D)
    k, v = (project(heads, x) for heads in (keys, values))  # (B, T, n*D)
    read = apply_rope(attn.k_norm(attn.k_proj(x).view(B, T, -1, D)), rope).transpose(1, 2)
    q, read = (heads[:, view % group :: group] for heads in (q, compose_heads(read, composition(attn, "k"))))
    z = causal_attention(q, read, v[:, None].expand(-1, q.size(1), -1, -1))  # (B, H/group, T, n*D)
    moments = dict(q=torch.zeros(len(keys), D // 2).to(energy).index_add(0, reads, energy))
    for kind, rows in (("k", k), ("v", z)):
        rows = rows.reshape(-1, rows.size(-1)).float()
        with torch.autocast(rows.device.type, enabled=False):
            moments[kind] = (rows.T @ rows).double() / len(rows)
    return moments


def project(heads, x):
    """x (B, T, C) -> (B, T, n*D) with heads (n, D, C), or (n, D, C + 1) whose last column is a bias."""
    weight, bias = heads.flatten(0, 1).to(x).split((x.size(-1), heads.size(2) - x.size(-1)), dim=1)
    return F.linear(x, weight, bias[:, 0] if bias.numel() else None)


def error_metric(attn, kind, weight, reads, moment, queries, rotates):
    """S of (1), head by head (n, D, D), or None: what an error in a key or value head costs.

    A key's error counts as much as its queries are large, frequency by frequency; a value's as W^O makes it, summed
    over the query heads that read it. A head norm divides by a head's size, and so does S; for maps that only rotate
    (`rotates`) S is nothing else.
    """
    n, D, _ = weight.shape
    normed = kind == "v" and isinstance(attn.head_norm, HeadNorm)
    size = torch.ones(n, dtype=weight.dtype)
    if normed:
        size = weight.square().sum((1, 2)) if moment is None else moment.diagonal().view(n, D).sum(1)
    if rotates:
        eye = torch.eye(D, dtype=weight.dtype)
        return size.clamp_min(TINY).rsqrt()[:, None, None] * eye if normed else None
    if kind == "k":
        if queries is None:
            return None
        return torch.diag_embed((queries / queries.mean().clamp_min(TINY)).clamp_min(1e-6).sqrt().repeat(1, 2))
    o = attn.o_proj.weight.double().unflatten(1, (attn.n_head, D))  # (C, H, D)
    if normed:
        o = o * attn.head_norm.weight
    gram = torch.zeros(n, D, D, dtype=o.dtype).index_add(0, reads, torch.einsum("cha,chb->hab", o, o))
    values, vectors = torch.linalg.eigh(gram / size.clamp_min(TINY)[:, None, None])
    values = values.clamp_min((1e-6 * values.mean()).clamp_min(TINY))  # what W^O ignores now it may read when refitted
    return (vectors * values.sqrt().unsqueeze(1)) @ vectors.mT


@dataclass
class Calibration:
    """What one layer does with calibration's text: the mean `second_moments`, and attention's inputs and outputs, both
    (B, T, C) in lists."""

    moments: dict
    inputs: list
    outputs: list
    rope: tuple
    dtype: torch.dtype


@torch.no_grad()
def refit_output(new, calibration, rope, ridge=0.03):
    """Fit W^O of a compressed layer anew, so that it repairs what it can: min_W sum |W y_new - W^O y|^2 + ridge |W -
    W_now|^2.

    y and y_new are the heads' outputs, side by side, of the layer before and after, on the calibration text. The ridge
    is in units of y_new's mean square, so that directions that calibration hardly shows stay as they are.
    """
    heads = []
    hook = new.o_proj.register_forward_pre_hook(lambda _, y: heads.append(y[0].flatten(0, 1).float()))
    gram, product = 0.0, 0.0
    for x, output in zip(calibration.inputs, calibration.outputs):
        heads.clear()
        with autocast(x.device, calibration.dtype):
            lost = (output - new(x, rope)).flatten(0, 1).float()  # (B*T, C)
        gram, product = gram + (heads[0].T @ heads[0]).double(), product + (lost.T @ heads[0]).double()
    hook.remove()
    gram.diagonal().add_((ridge * gram.diagonal().mean()).clamp_min(TINY))
    new.o_proj.weight.add_(torch.linalg.solve(gram, product, left=False))


@contextlib.contextmanager
def one_thread():
    """Problems this small run slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def observed(attn, kind, moments, how):
    """What `approximate` and `spectrum` want to know of a layer's keys or values: (W (n, D, C [+ 1]), the one that each
    query head reads, moment, metric, form of the maps)."""
    weight, reads = effective_heads(attn, kind)
    moment = None
    if moments is not None:
        moment, rows = moments[kind].cpu(), weight.flatten(0, 1)
        plain = rows @ rows.T  # where the windows show nothing, the weights stand in for them
        moment = moment + 1e-4 * moment.trace() / plain.trace().clamp_min(TINY) * plain
    form = how.form
    if form == "any" and (moments is None or kind == "v" and isinstance(attn.head_norm, HeadNorm)):
        form = "rotations"  # without data, wider maps only fit the weights better
    metric = None
    if how.weighs or form == "rotations":
        queries = moments["q"].cpu() if moments is not None else None
        metric = error_metric(attn, kind, weight, reads, moment, queries, form == "rotations")
    return weight, reads, moment, metric, form


@torch.no_grad()
def compress_layer(attn, config, layer, method, calibration=None):
    """(the MEA or Latent that replaces `attn`, {"k": error, "v": error}), which caches config.kv_heads(layer).

    Virtual heads, (2) of lowrank.py: B becomes k_proj and v_proj, w becomes compose_k and compose_v, T_h goes into
    q_proj as q_h <- T_h^T q_h and into the columns of W^O that read head h. A head norm is blind to rotations only, and
    its gain, which is not, goes into W^O first. Latents, (1): P becomes k_proj and v_proj, U k_up_proj and v_up_proj.
    Keys or values that keep all their heads stay as they are. `calibration` is the layer's `Calibration`; without
    it weights stand in for the data.
    """
    device, attn = attn.q_proj.weight.device, copy.deepcopy(attn).cpu()  # small problems, in float64
    new, how = ATTENTION[config.attention](config, layer).to(attn.q_proj.weight), METHODS[method]
    moments = calibration.moments if calibration is not None and how.sees_data else None
    ours, theirs = new.state_dict(), attn.state_dict()
    kept = {name: w for name, w in theirs.items() if name in ours and w.shape == ours[name].shape}
    new.load_state_dict(kept, strict=False)
    errors = {"k": 0.0, "v": 0.0}
    with one_thread():
        for kind, rank in zip("kv", config.kv_heads(layer)):
            if f"{kind}_proj.weight" in kept and not is_latent(method):
                getattr(new, f"compose_{kind}").copy_(composition(attn, kind))
                continue
            weight, reads, moment, metric, form = observed(attn, kind, moments, how)
            if is_latent(method):
                found = spectrum(weight, "v", moment, metric)  # keys, too: they are cached before RoPE
                down, up, errors[kind] = keep_features(found, rank * config.head_dim)
                up = up[reads[:: new.n_head // new.n_rebuilt]].flatten(0, 1)
                getattr(new, f"{kind}_up_proj").weight.copy_(up)
            else:
                w, maps, down, history = approximate(weight, min(rank, len(weight)), kind, form, moment, metric)
                errors[kind], down = history[-1], down.flatten(0, 1)
                getattr(new, f"compose_{kind}").copy_(F.pad(w, (0, 0, 0, rank - len(w)))[:, reads])
                takes_gain = kind == "v" and form == "rotations" and isinstance(attn.head_norm, HeadNorm)
                absorb_maps(new, attn, kind, maps[reads], takes_gain)
            set_rows(getattr(new, f"{kind}_proj"), down)
    new = new.to(device)
    if moments is not None and how.refits:
        refit_output(new, calibration, calibration.rope)
    return new, errors


def set_rows(projection, rows):
    """Give a linear layer the rows (any, C), or with their bias as a last column; its other rows become 0."""
    rows = F.pad(rows, (0, 0, 0, projection.out_features - len(rows)))  # fewer distinct heads than room
    projection.weight.copy_(rows[:, : projection.in_features])
    if projection.bias is not None:
        projection.bias.copy_(rows[:, -1])


def absorb_maps(new, attn, kind, maps, takes_gain):
    """Put T_h, one (D, D) per query head, into q_proj, for keys, or into o_proj, for values."""
    n_head, D = attn.n_head, attn.head_dim
    if kind == "k":
        for q in new.q_proj.parameters():  # (H*D, C) and, if there is one, the bias (H*D)
            q.copy_((maps.mT @ q.double().view(n_head, D, -1)).view_as(q))
        return
    o = new.o_proj.weight.double().view(-1, n_head, D)
    if takes_gain:
        o = o * new.head_norm.weight
        new.head_norm.weight.fill_(1.0)
    new.o_proj.weight.copy_(torch.einsum("mha,hab->mhb", o, maps).flatten(1))


# ---------------------------------------------------------------------------------------------------------------------
# Grouped heads


def unfold(attn):
    """The equal MHA, with a key/value head for each query head, of an MEA without norms; an MHA is one already."""
    if not isinstance(attn, MEA):
        return attn
    config = replace(attn.config, attention="mha", n_kv_head=attn.n_head, compose="full", mea_form="auto")
    new = MHA(config, attn.layer).to(attn.q_proj.weight)
    new.load_state_dict({n: w for n, w in attn.state_dict().items() if n.startswith(("q_", "o_"))}, strict=False)
    for kind in "kv":
        heads, reads = effective_heads(attn, kind)
        set_rows(getattr(new, f"{kind}_proj"), heads[reads].flatten(0, 1))
    return new


def joined(heads, kind, group):
    """The `Spectrum` of the heads in `group`, a list of indices; `heads` is what `observed` returns for all."""
    weight, _, moment, metric, _ = heads
    if moment is not None:
        n, D, _ = weight.shape
        moment = moment.view(n, D, n, D)[group][:, :, group].flatten(2).flatten(0, 1)
    return spectrum(weight[group], kind, moment, None if metric is None else metric[group])


def choose_groups(cost, n, n_groups):
    """Divide heads 0 .. n-1 into n_groups lists of one length: neighbours first, then two heads change places while
    the sum of cost(group) falls."""
    size = n // n_groups
    known = functools.cache(lambda group: cost(sorted(group)))
    price = lambda *groups: sum(known(frozenset(group)) for group in groups)
    groups = [list(range(first, first + size)) for first in range(0, n, size)]
    changed = size > 1
    while changed:
        changed = False
        for a, b in itertools.combinations(groups, 2):
            for i, j in itertools.product(range(size), repeat=2):
                before = price(a, b)
                a[i], b[j] = b[j], a[i]
                if price(a, b) < before * (1 - 1e-6):
                    changed = True
                else:
                    a[i], b[j] = b[j], a[i]
    return [sorted(group) for group in groups]


def rope_of_pairs(rope, pairs):
    """The (cos, sin) of heads that consist of some `pairs` of the heads that `rope` turns."""
    columns = torch.cat((pairs, pairs + rope[0].size(-1) // 2))
    return tuple(table[..., columns] for table in rope)


def layer_groups(attn, config, calibration):
    """(the groups of a layer's heads, [energies (D/2, any) of each group's keys, as shares of the layer's])."""
    how, W = METHODS["gqa"], config.head_dim
    attn, moments = copy.deepcopy(attn).cpu(), None if calibration is None else calibration.moments
    with one_thread():
        heads = {kind: observed(attn, kind, moments, how) for kind in "kv"}
        energies = lambda kind, group: joined(heads[kind], kind, group).energies
        all_heads = list(range(attn.n_k))
        total = {kind: energies(kind, all_heads).sum().clamp_min(TINY) for kind in "kv"}

        def lost(group):
            each = ((kind, energies(kind, group).flatten().sort(descending=True).values / total[kind]) for kind in "kv")
            return sum(values[W // 2 if kind == "k" else W :].sum().item() for kind, values in each)

        groups = choose_groups(lost, attn.n_k, config.n_kv_head)
        return groups, [energies("k", group) / total["k"] for group in groups]


def root_mean_square(weight):
    return weight.double().square().mean().sqrt().clamp_min(TINY)


@torch.no_grad()
def join_heads(attn, config, layer, groups, pairs, calibration=None):
    """(the MHA that replaces the MHA `attn`, {"k": error, "v": error}): each of `groups` becomes one key/value head.

    With (1) of lowrank.py for a group: P becomes its rows of k_proj and v_proj. U_h goes into q_proj, as q_h <- U_h^T
    q_h sqrt(W / D), for scores are divided by the root of the width W, and into the columns of W^O that read head h.
    Query heads are put in the order of the groups. `pairs` (W/2) are pairs of the old heads. P is scaled to the size of
    the old projection: AdamW changes all weights by steps of one size, and a tiny W^O behind huge values does not heal.
    """
    device, attn = attn.q_proj.weight.device, copy.deepcopy(attn).cpu()
    moments = None if calibration is None else calibration.moments
    new, W = MHA(config, layer).to(attn.q_proj.weight), config.head_dim
    n, H, D = attn.n_k, attn.n_head, attn.head_dim
    order = torch.tensor(sum(groups, []))  # of key/value heads
    readers = (order[:, None] * (H // n) + torch.arange(H // n)).flatten()  # of query heads
    errors, up = {}, {}
    with one_thread():
        for kind in "kv":
            heads = observed(attn, kind, moments, METHODS["gqa"])
            found = [joined(heads, kind, group) for group in groups]
            kept = [keep_pairs(each, pairs) if kind == "k" else keep_features(each, W) for each in found]
            down, old = torch.cat([down for down, _, _ in kept]), getattr(attn, f"{kind}_proj").weight
            scale = root_mean_square(old) / root_mean_square(down[:, : old.size(1)])
            set_rows(getattr(new, f"{kind}_proj"), down * scale)
            up[kind] = torch.cat([maps for _, maps, _ in kept]).repeat_interleave(H // n, dim=0) / scale  # (H, D, W)
            energies = [each.energies.sum().item() for each in found]
            lost = sum(share * energy for (_, _, share), energy in zip(kept, energies))
            errors[kind] = lost / max(sum(energies), TINY)
        for q, old in zip(new.q_proj.parameters(), attn.q_proj.parameters()):  # (H*D, C) and a bias (H*D)
            old = old.double().view(H, D, -1)[readers]
            q.copy_((up["k"].mT @ old * (W / D) ** 0.5).reshape(q.shape))
        o = attn.o_proj.weight.double().view(-1, H, D)[:, readers]
        new.o_proj.weight.copy_(torch.einsum("mhd,hdw->mhw", o, up["v"]).flatten(1))
    new = new.to(device)
    if moments is not None:
        refit_output(new, calibration, rope_of_pairs(calibration.rope, pairs))
    return new, errors
