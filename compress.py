"""Half the KV cache: turns the heads of a trained model into fewer cached heads that are mixed back when they are read.

    python compress.py --checkpoint out/small --kv_ratio 0.5 --out_dir out/small-half

n heads W_h x (keys or values of one layer) become r < n component heads B_c x, which are cached, and

    W_h  ~  T_h  sum_c w[c, h] B_c.                                                                                  (*)

w is MEA's compose_k or compose_v. T_h costs nothing: it goes into the matrices that read the head, W^Q for keys and W^O
for values. `approximate` solves (*), `compress_layer` does it to a layer, `compress` to a model, `probe` finds out
which layers can spare how many heads, `heal` trains what is left. Read `attention.py` first.
"""

from options import autocast, choose_device, choose_dtype, fail, option, parse_options, run_program, save_picture, say

import copy
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from attention import ATTENTION, MEA, HeadNorm, apply_rope, causal_attention, compose_heads, one_hot_composition
from checkpoint import FORMAT, find_checkpoint, load_checkpoint, new_folder, save_checkpoint, to_pretrained
from data.dataset import WindowSampler, open_dataset, validation_windows
from data.tokenizer import load_tokenizer
from kernels import PATHS, linear_cross_entropy, set_kernel
from model import KVCache
from sample import starts_bare
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


def truncated_svd(heads, rank):
    """The paper's approximation (appendix F): w (rank, n) and the best sum_c w[c, h] B_c for heads (n, g, b, M).

    One column per head, M = U S V^T; w = V^T, and B = U S is what w^T makes of the heads, so only V is needed.
    """
    columns = torch.view_as_real(heads).flatten(1) if heads.is_complex() else heads.flatten(1)
    w = torch.linalg.eigh(columns @ columns.T).eigenvectors[:, -rank:].T  # (rank, n), orthonormal rows
    return w, torch.einsum("ch,ck,kgbm->hgbm", w.to(heads), w.to(heads), heads)


def mixing(w, maps):
    """The matrix of (*), heads from components, for every block: (g, n*b, r*b) from w (r, n) and T (n, g, b, b)."""
    return torch.einsum("ch,hgab->ghacb", w.to(maps), maps).flatten(3, 4).flatten(1, 2)


def components(w, maps, heads):
    """The B (r, g, b, M) that suit w and T best, by least squares."""
    b = heads.size(2)
    stacked = heads.transpose(0, 1).flatten(1, 2)  # (g, n*b, M)
    return (torch.linalg.pinv(mixing(w, maps), rtol=1e-9) @ stacked).unflatten(1, (-1, b)).transpose(0, 1)


def relative_error(heads, approximation):
    """The share of the heads' energy that an approximation misses."""
    return ((heads - approximation).abs().square().sum() / heads.abs().square().sum().clamp_min(1e-300)).item()


def converged(errors, tolerance):
    return errors[-1] < 1e-14 or (len(errors) > 1 and errors[-2] - errors[-1] < tolerance * errors[-2])


def align_by_rotation(heads, rank, rounds=300, tolerance=1e-5):
    """(w, T, errors): (*) with unitary T_h, for heads (n, g, b, M); without a round T = 1, the truncated SVD.

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
    """(w, T, errors): (*) with any T_h, improved from w (r, n), T (n, g, b, b): B, T and w in turns by least squares
    given the others."""
    errors = []
    for _ in range(rounds):
        parts = components(w, turn, heads)  # (r, g, b, M)
        target = torch.einsum("ch,cgbm->hgbm", w.to(heads), parts)
        turn = heads @ target.mH @ torch.linalg.pinv(target @ target.mH, rtol=1e-10, hermitian=True)
        turned = torch.einsum("hgab,cgbm->hcgam", turn, parts)  # T_h B_c: head h is a real combination of these
        columns, wanted = (torch.view_as_real(x) if x.is_complex() else x for x in (turned, heads))
        w = (
            torch.linalg.lstsq(columns.flatten(2).mT, wanted.flatten(1).unsqueeze(2), driver="gelsd")
            .solution[:, :, 0]
            .T
        )
        errors.append(relative_error(heads, torch.einsum("ch,hcgam->hgam", w.to(heads), turned)))
        if converged(errors, tolerance):
            break
    return w, turn, errors


# ---------------------------------------------------------------------------------------------------------------------
# One layer

METHODS = {
    "svd": "none",
    "calibrated": "none",
    "rotated": "rotations",
    "aligned": "any",
}  # the maps T of each; all but svd see the data


def effective_heads(attn, kind):
    """What attention really reads as keys ("k") or values ("v"): W (n, D, C [+ 1 with a bias]), and of each query head
    which one.

    Heads that are composed already (MEA) are folded first, and equal ones, as grouped queries share them, are one head.
    """
    projection = attn.k_proj if kind == "k" else attn.v_proj
    weight = (
        projection.weight
        if projection.bias is None
        else torch.cat((projection.weight, projection.bias[:, None]), dim=1)
    )
    weight = weight.double().unflatten(0, (-1, attn.head_dim))  # (components, D, C)
    columns, reader = torch.unique(composition(attn, kind).to(weight), dim=1, return_inverse=True)
    return torch.einsum("cdm,cn->ndm", weight, columns), reader


def composition(attn, kind):
    """(components, H): an MEA's compose_k or compose_v; of MHA the one-hot columns that say which head a query head
    reads."""
    if isinstance(attn, MEA):
        return attn.compositions()["kv".index(kind)]
    return one_hot_composition(attn.n_k, attn.n_head).to(attn.q_proj.weight)


@torch.no_grad()
def second_moments(attn, inputs, rope):
    """{"k": E[k k^T], "v": E[z z^T], "q": E|q|^2} of a layer's keys, values and queries over inputs, a list of (B, T,
    C).

    The keys of all heads side by side, before RoPE, and the values as the layer really sees them, averaged by the
    attention maps of all its query heads: (nD, nD). For each key head and rotary frequency, the energy of the queries
    that read it: (n, D/2).
    """
    moments = {"k": 0.0, "v": 0.0, "q": 0.0}
    (keys, k_reader), (values, _) = effective_heads(attn, "k"), effective_heads(attn, "v")
    D = attn.head_dim
    for x in inputs:
        B, T, _ = x.shape
        q = attn.q_norm(attn.q_proj(x).view(B, T, -1, D))
        energy = q.double().square().mean((0, 1)).unflatten(1, (2, -1)).sum(1)  # (H, D/2)
        moments["q"] += torch.zeros(len(keys), D // 2, dtype=energy.dtype, device=x.device).index_add(
            0, k_reader, energy
        )
        q = apply_rope(q, rope).transpose(1, 2)  # (B, H, T, D)
        k, v = (project(heads, x) for heads in (keys, values))  # (B, T, n*D)
        read = apply_rope(attn.k_norm(attn.k_proj(x).view(B, T, -1, D)), rope).transpose(1, 2)
        read = compose_heads(read, composition(attn, "k"))  # (B, H, T, D)
        seen = [causal_attention(q, read, head[:, None].expand(-1, q.size(1), -1, -1)) for head in v.split(D, dim=2)]
        for kind, rows in (("k", k), ("v", torch.cat(seen, dim=3))):
            rows = rows.reshape(-1, rows.size(-1)).double()
            moments[kind] += rows.T @ rows / len(rows)
    return moments


def project(heads, x):
    """x (B, T, C) -> (B, T, n*D) with heads (n, D, C), or (n, D, C + 1) whose last column is a bias."""
    flat = heads.flatten(0, 1).to(x)
    return F.linear(x, flat[:, : x.size(-1)], flat[:, -1] if flat.size(1) > x.size(-1) else None)


def approximate(weight, rank, kind, maps, moment=None, importance=None):
    """(*) for heads W (n, D, M): w (rank, n), T (n, D, D) real and the components' weights (rank, D, M), errors.

    `moment` (nD, nD) is E[y y^T] of what the heads put out: errors are then those of outputs, otherwise of weights.
    `importance` (n, blocks) multiplies them, block by block.
    """
    n, D, _ = weight.shape
    blocks = key_blocks if kind == "k" else value_blocks
    if moment is None:
        root = weight
    else:  # any L with L L^T = E[y y^T] has the products of the outputs: nothing longer than nD is needed
        values, vectors = torch.linalg.eigh(moment)
        root = (vectors * values.clamp_min(0).sqrt()).view(n, D, n * D)
    heads, scale = blocks(root), 1.0 if importance is None else importance.sqrt()[:, :, None, None]
    if maps == "any":  # starts in the plain metric: where that is exact already, it stays exact
        w, turn, _ = align_by_rotation(heads, rank)
        w, turn, errors = fit_any_maps(heads * scale, w, turn * scale)
    else:
        w, turn, errors = align_by_rotation(heads * scale, rank, rounds=0 if maps == "none" else 300)
    parts = from_blocks(components(w, turn, blocks(weight) * scale))  # (rank, D, M)
    if kind == "v":
        turn, w = turn[:, 0], w if importance is None else w / scale[:, 0, 0, 0]
    else:  # a complex number a + ib turns a pair by ((a, -b), (b, a))
        turn = turn / scale
        real, imaginary = (torch.diag_embed(part) for part in (turn.real[:, :, 0, 0], turn.imag[:, :, 0, 0]))
        turn = torch.cat((torch.cat((real, -imaginary), dim=2), torch.cat((imaginary, real), dim=2)), dim=1)
    return w, turn, parts, errors


@torch.no_grad()
def refit_output(new, attn, inputs, rope, ridge=0.03):
    """Fit W^O of a compressed layer anew, so that it repairs what it can: min_W sum |W y_new - W^O y|^2 + ridge |W -
    W_now|^2.

    y and y_new are the heads' outputs, side by side, of the layer before and after; the ridge is in units of y_new's
    mean square, so that directions that calibration hardly shows stay as they are.
    """
    seen = []
    hook = new.o_proj.register_forward_pre_hook(lambda _, y: seen.append(y[0].flatten(0, 1).double()))
    gram, product = 0.0, 0.0
    for x in inputs:
        seen.clear()
        lost = (attn(x, rope) - new(x, rope)).flatten(0, 1).double()  # (B*T, C)
        gram, product = gram + seen[0].T @ seen[0], product + lost.T @ seen[0]
    hook.remove()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    new.o_proj.weight.add_(torch.linalg.solve(gram, product, left=False))


@torch.no_grad()
def compress_layer(attn, config, layer, method, moments=None, inputs=(), rope=None):
    """(the MEA that replaces `attn`, {"k": error, "v": error}) with the component heads that config.kv_heads(layer)
    says.

    W_h ~ T_h sum_c w[c, h] B_c: B becomes k_proj and v_proj, w becomes compose_k and compose_v, T_h goes into q_proj as
    q_h <- T_h^T q_h and into the columns of W^O that read head h. A head norm is blind to rotations only, and its gain,
    which is not, goes into W^O first. Keys or values that keep their number of heads stay as they are. `moments` as
    from `second_moments` of `inputs` (B, T, C) in a list; without them weights stand in for the data.
    """
    original, device, attn = attn, attn.q_proj.weight.device, copy.deepcopy(attn).cpu()  # small problems, in float64
    new, n_head, D = MEA(config, layer).to(attn.q_proj.weight), attn.n_head, attn.head_dim
    ours, theirs = new.state_dict(), attn.state_dict()
    new.load_state_dict(
        {name: w for name, w in theirs.items() if name in ours and w.shape == ours[name].shape}, strict=False
    )
    errors = {"k": 0.0, "v": 0.0}
    for kind, rank, projection, composition in (
        ("k", new.n_k, new.k_proj, new.compose_k),
        ("v", new.n_v, new.v_proj, new.compose_v),
    ):
        if projection.weight.shape == theirs[f"{kind}_proj.weight"].shape:
            continue
        weight, reader = effective_heads(attn, kind)
        normed = kind == "v" and isinstance(attn.head_norm, HeadNorm)
        maps = METHODS[method]
        if maps == "any" and (normed or moments is None):  # without data, wider maps only fit the weights better
            maps = "rotations"
        moment = importance = None
        if moments is not None and method != "svd":
            moment, rows = moments[kind].cpu(), weight.flatten(0, 1)
            plain = rows @ rows.T  # where the windows show nothing, the weights stand in for them
            moment = moment + 1e-4 * moment.trace() / plain.trace() * plain
        if (
            method == "aligned" and kind == "k" and moments is not None
        ):  # an error in a key counts as much as its queries are large
            importance = (moments["q"] / moments["q"].mean()).clamp_min(1e-6).cpu()
        if (
            METHODS[method] != "none" and normed
        ):  # errors relative to the head's own size, by which the norm is going to divide
            energy = weight.square().sum((1, 2)) if moment is None else moment.diagonal().view(len(weight), D).sum(1)
            importance = 1 / energy.clamp_min(1e-30)[:, None]
        w, turn, parts, history = approximate(weight, min(rank, len(weight)), kind, maps, moment, importance)
        errors[kind] = history[-1]
        spare = rank - len(parts)  # fewer distinct heads than there is room for: the rest stays zero
        w, parts = F.pad(w, (0, 0, 0, spare)), F.pad(parts, (0, 0, 0, 0, 0, spare))
        projection.weight.copy_(parts[:, :, : new.q_proj.in_features].flatten(0, 1))
        if projection.bias is not None:
            projection.bias.copy_(parts[:, :, -1].flatten())
        composition.copy_(w[:, reader])
        if kind == "k":
            for q in new.q_proj.parameters():  # (H*D, C) and, if there is one, the bias (H*D)
                q.copy_((turn[reader].mT @ q.double().view(n_head, D, -1)).view_as(q))
        else:
            o = new.o_proj.weight.double().view(-1, n_head, D)
            if normed and maps == "rotations":
                o = o * new.head_norm.weight
                new.head_norm.weight.fill_(1.0)
            new.o_proj.weight.copy_(torch.einsum("mha,hab->mhb", o, turn[reader]).flatten(1))
    new = new.to(device)
    if inputs and method == "aligned":
        refit_output(new, original, inputs, rope)
    return new, errors


# ---------------------------------------------------------------------------------------------------------------------
# A model


BUDGETS = {  # which of n layers give up heads; all three are the paper's (section 5.2)
    "all": lambda n: range(n),
    "deep": lambda n: range(3, n),
    "middle": lambda n: range(round(n / 4), round(3 * n / 4)),
}


def uniform_ranks(config, kv_ratio, budget="all"):
    """One (n_k, n_v) per layer: `kv_ratio` of the heads that each layer of the budget caches now, an odd one being a
    key head.

    Keys behind a QK-norm, which does not commute with composition, stay: values give up all. Raises ValueError, naming
    what is possible, for a ratio that is no number of heads.
    """
    ranks = [config.kv_heads(layer) for layer in range(config.n_layer)]
    layers = BUDGETS[budget](config.n_layer)
    if not layers:
        raise ValueError(f"budget {budget} leaves none of {config.n_layer} layers to compress: use all or probe")
    for layer in layers:
        n_k, n_v = ranks[layer]
        fewest = n_k + 1 if config.qk_norm else 2
        heads = check_ratio(
            kv_ratio,
            n_k + n_v,
            fewest,
            f"{n_k} key and {n_v} value heads" + " (keys behind a QK-norm stay)" * config.qk_norm,
        )
        keys = n_k if config.qk_norm else max(heads - n_v, min(n_k, heads - heads // 2))
        ranks[layer] = keys, heads - keys
    return ranks


def check_ratio(kv_ratio, heads, fewest, what):
    """kv_ratio * heads, a whole number of at least `fewest`. Raises ValueError, naming what is possible."""
    kept = round(kv_ratio * heads) if math.isfinite(kv_ratio) else 0
    if abs(kept - kv_ratio * heads) > 1e-6 * heads or not fewest <= kept <= heads:
        possible = [f"{n / heads:.4g}" for n in range(fewest, heads + 1)]
        listed = ", ".join(possible if len(possible) < 20 else [*possible[:3], "..", *possible[-3:]])
        raise ValueError(f"kv_ratio {kv_ratio:g} of {what} is no number of heads that works: {listed} are possible")
    return kept


def choose_ranks(config, kv_ratio, budget, costs=None):
    """The ranks for a budget: `uniform_ranks`, or for "probe" those that `allocate` chooses by its `costs` (None only
    checks)."""
    if budget != "probe":
        return uniform_ranks(config, kv_ratio, budget)
    pairs = [config.kv_heads(layer) for layer in range(config.n_layer)]
    fewest = sum(n_k + 1 if config.qk_norm else 2 for n_k, _ in pairs)
    heads = check_ratio(
        kv_ratio, sum(map(sum, pairs)), fewest, f"{sum(map(sum, pairs))} cached heads in {config.n_layer} layers"
    )
    return allocate(costs, heads) if costs else pairs


def with_ranks(config, ranks):
    """The config of an MEA model that caches `ranks`, one (n_k, n_v) per layer."""
    return replace(config, attention="mea", n_kv_head=[list(pair) for pair in ranks], mea_form="auto", compose="full")


def rope_of(model, length):
    return model.rope_cos[:length], model.rope_sin[:length]


@torch.no_grad()
def compress(model, ranks, method="aligned", tokens=None, chunk=4):
    """Replace every attention of `model` by an MEA that caches `ranks`, in place: memory is the model and one layer's
    work.

    `tokens` (N, T) are the calibration windows; without them weights stand in for the data. Every layer is fitted to
    what the original model sees. Returns one {"k": error, "v": error} per layer.
    """
    config, errors = with_ranks(model.config, ranks), []
    inputs = [] if tokens is None else [model.embed(part) for part in tokens.split(chunk)]
    rope = None if tokens is None else rope_of(model, tokens.size(1))
    for layer, block in enumerate(model.layers):
        normed = [block.input_layernorm(x) for x in inputs]
        moments = second_moments(block.self_attn, normed, rope) if inputs else None
        new, lost = compress_layer(block.self_attn, config, layer, method, moments, normed, rope)
        inputs = [block(x, rope) for x in inputs]
        block.self_attn = new
        errors.append(lost)
    model.config = config
    return errors


@torch.no_grad()
def probe(model, method, tokens, windows, chunk=4, report=lambda *_: None):
    """{(layer, "k" or "v"): [increase of the loss with 1, 2, .. n heads]}, each measured with the rest of the model as
    it is.

    The paper's figure 8, for keys and values apart. `tokens` (N, T), or None, calibrate as in `compress`; `windows`
    (inputs, targets), two arrays (N, T), measure. Only the layers from the changed one on are computed anew.
    """
    device, config, costs = model.embed_tokens.weight.device, model.config, {}
    calibration = [] if tokens is None else [model.embed(part) for part in tokens.split(chunk)]
    x, y = ([part.to(device) for part in torch.from_numpy(side).split(chunk)] for side in windows)
    x = [model.embed(part) for part in x]

    def forward(block, inputs):
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

    base, rope = loss(0), None if tokens is None else rope_of(model, tokens.size(1))
    for layer, block in enumerate(model.layers):
        original, full = block.self_attn, config.kv_heads(layer)
        normed = [block.input_layernorm(part) for part in calibration]
        moments = second_moments(original, normed, rope) if normed else None
        for kind, n in zip("kv", full):
            costs[layer, kind] = [math.inf if kind == "k" and config.qk_norm else 0.0] * (n - 1) + [0.0]
            for rank in range(1, n if costs[layer, kind][0] == 0.0 else 1):
                ranks = [config.kv_heads(other) for other in range(config.n_layer)]
                ranks[layer] = (rank, full[1]) if kind == "k" else (full[0], rank)
                block.self_attn, _ = compress_layer(
                    original, with_ranks(config, ranks), layer, method, moments, normed, rope
                )
                costs[layer, kind][rank - 1] = loss(layer) - base
            report(layer, kind, costs[layer, kind])
        block.self_attn = original
        calibration, x = forward(block, calibration), forward(block, x)
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
}


def heal(model, sampler, o, steps, teacher=None, report=lambda *_: None):
    """Train `model` for some steps of continued pretraining, or, with a `teacher`, of distillation: sum_t KL(teacher_t
    || model_t) / T.

    AdamW without weight decay, linear warm-up over a tenth of the steps, then a cosine to 0 (the paper's, section 5.2).
    `sampler` is a WindowSampler and `o` has batch_size, heal_learning_rate, heal_params. Raises ValueError if the loss
    is no longer finite.
    """
    device = model.embed_tokens.weight.device
    dtype = choose_dtype("auto", device)
    chosen = [p for name, p in model.named_parameters() if HEALED[o.heal_params](name)]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    optimizer = make_optimizer([dict(params=chosen, weight_decay=0.0)], o.heal_learning_rate)
    schedule = SimpleNamespace(learning_rate=o.heal_learning_rate, warmup_steps=max(1, steps // 10), max_steps=steps)
    schedule.schedule = "cosine"
    model.train()
    for step in range(steps):
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
        report(step + 1, loss.item())
    for p in model.parameters():
        p.requires_grad_(True)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The program


@dataclass
class Options:
    checkpoint: str = option("out/small", "run folder, a checkpoint file in one, a Hugging Face folder or hub name")
    out_dir: str = option("", "folder of the compressed model (default: the checkpoint's with -kv<ratio> behind it)")
    overwrite: bool = option(False, "replace what out_dir holds")
    kv_ratio: float = option(0.5, "cached heads to keep: of every layer of the budget; with probe, of the whole model")
    method: str = option(
        "aligned",
        "svd: the paper's; calibrated: in the metric of the data; rotated: and heads turned so that they agree; "
        "aligned: by any map that costs nothing, W^O refitted",
        list(METHODS),
    )
    budget: str = option(
        "all",
        "layers that give up heads: all, deep (not the first three), middle (the middle half); "
        "probe measures who can spare most",
        [*BUDGETS, "probe"],
    )
    data_dir: str = option("", "prepared data set to calibrate, heal and measure on (default: the checkpoint's own)")
    calibration_windows: int = option(
        32, "training windows that the method sees; 0: weights stand in for them", least=0
    )
    probe_windows: int = option(8, "training windows that a probe measures on", least=1)
    eval_windows: int = option(64, "validation windows that the report measures on", least=1)
    heal_steps: int = option(0, "training steps afterwards", least=0)
    heal_learning_rate: float = option(3e-4, "peak of their schedule", above=0)
    heal_params: str = option("all", "what they may move", list(HEALED))
    distill: bool = option(False, "heal towards the original model's predictions instead of the tokens")
    continue_original: bool = option(
        False, "also train the original as long on the same tokens, to compare healing with"
    )
    batch_size: int = option(8, "windows in a healing step", least=1)
    block_size: int | None = option(None, "positions in a window (default: the model's, at most 1,024)", least=2)
    context: int | None = option(
        None,
        "positions of a row for the report's bytes and decoding speed (default: the model's, at most 4,096)",
        least=2,
    )
    rows: int = option(1, "rows of that cache", least=1)
    curve: str = option("", "also compress to each of these ratios and measure, e.g. 1.0,0.75,0.5,0.25")
    export: str = option("", "hf: only write the checkpoint, uncompressed, as a Hugging Face folder", ["", "hf"])
    seed: int = option(0, "of the calibration windows and of healing", least=0)
    kernel: str = option("auto", "path of the attention (see kernels.py)", PATHS)
    device: str = option("auto", "cpu, cuda or cuda:1; auto takes the best there is")
    threads: int = option(0, "CPU threads (0: as many as cores)", least=0)


def open_job(o, given):
    """Check everything before any work: (model, state, dataset). Raises ValueError or OSError."""
    how = given & {"distill", "continue_original", "heal_params", "heal_learning_rate"}
    if how and not o.heal_steps:
        raise ValueError(f"{', '.join(sorted(how))} says how to heal: give --heal_steps too")
    if "probe_windows" in given and o.budget != "probe":
        raise ValueError("probe_windows are for --budget probe: give both or neither")
    out = Path(o.out_dir)
    ours = (out / "report.json").is_file()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (o.overwrite and ours):
        what = "holds another model" if ours else "exists and compress.py did not make it"
        raise ValueError(f"{out} {what}: give another --out_dir" + (" or --overwrite" if ours else ""))
    device = choose_device(o.device)
    model, state = load_checkpoint(o.checkpoint, "cpu" if device.type == "mps" else device)  # mps has no float64
    config = model.config
    if why := ATTENTION[config.attention].incompressible:
        raise ValueError(f"{o.checkpoint} is a {config.attention} model, which cannot be compressed: {why}")
    for ratio in (o.kv_ratio, *curve_of(o)):
        choose_ranks(config, ratio, o.budget)
    saved = state.get("options")
    data_dir = o.data_dir or (saved.get("data_dir") if isinstance(saved, dict) else None)
    if not data_dir or not isinstance(data_dir, str):
        how = "give --data_dir (data/prepare.py --tokenizer hf:FOLDER makes one)"
        raise ValueError(f"{o.checkpoint} does not say what data it was trained on: {how}")
    try:
        dataset = open_dataset(data_dir)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; if it lies elsewhere, say where with --data_dir") from None
    if not same_tokenizer(o.checkpoint, state, dataset):
        raise ValueError(f"{data_dir} was made with another tokenizer than {o.checkpoint}: prepare it with that one")
    for name, default in (("block_size", 1024), ("context", 4096)):
        value = getattr(o, name) or min(config.block_size, default)
        if value > config.block_size:
            raise ValueError(f"{name} must be between 2 and the model's {config.block_size}, not {value}")
        setattr(o, name, value)
    for split, tokens in (("training", dataset.train), ("validation", dataset.val)):
        if len(tokens) <= o.block_size:
            raise ValueError(f"the {split} split of {data_dir} has {len(tokens)} tokens, fewer than a window needs")
    return model, state, dataset


def curve_of(o):
    """The ratios of --curve. Raises ValueError."""
    try:
        return [float(part) for part in o.curve.split(",") if part.strip()]
    except ValueError:
        wanted = "ratios with commas between them, such as 1.0,0.75,0.5"
        raise ValueError(f"curve must be {wanted}, not {o.curve!r}") from None


class StartedWindows:
    """A sampler whose windows begin with a model's start of text, as the model saw every text."""

    def __init__(self, sampler, start):
        self.sampler, self.start = sampler, start

    def batch(self, *place):
        return begin(self.sampler.batch(*place), self.start)


def begin(windows, start):
    """Windows (inputs, targets) whose first inputs are the tokens of `start`, if there are any."""
    windows[0][:, : len(start)] = list(start)
    return windows


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


def run(o, model, dataset, start=()):
    """Compress, heal and measure as the options say. Returns (compressed model, report)."""
    device, config = model.lm_head.weight.device, model.config
    dtype = choose_dtype("auto", device)
    windows = begin(validation_windows(dataset.val, o.block_size, o.eval_windows), start)
    sampler = StartedWindows(WindowSampler(dataset.train, o.block_size, o.seed), start)
    seen = sampler.batch(0, o.calibration_windows + o.probe_windows)  # the first ones calibrate, the rest are a probe's
    calibrates = o.calibration_windows and o.method != "svd"
    tokens = torch.from_numpy(seen[0][: o.calibration_windows]).to(device) if calibrates else None

    def measure(model):
        return evaluate(model, windows, o.batch_size, device, dtype)

    loss = dict(before=measure(model))
    heads = "{} key and {} value heads".format(*config.kv_heads(0))
    say(f"{config.attention}, {model.n_params():,} parameters, {config.n_layer} layers of {heads}")
    say(f"loss {loss['before']:.4f} before")
    report = dict(method=o.method, budget=o.budget, seed=o.seed, options=asdict(o))
    costs = None
    if o.budget == "probe":
        few = tuple(part[o.calibration_windows :] for part in seen)  # neither calibrated nor reported on

        def show_costs(layer, kind, costs):
            listed = " ".join(f"{cost:+.4f}" for cost in costs)
            say(f"probe: layer {layer:>2}, 1 .. {len(costs)} {'keys' if kind == 'k' else 'values'}: {listed}")

        costs = probe(model, o.method, tokens, few, report=show_costs)
        report["probe"] = {kind: [costs[layer, kind] for layer in range(config.n_layer)] for kind in "kv"}
    if o.curve:
        report["curve"] = []
        for ratio in curve_of(o):
            smaller = copy.deepcopy(model)
            compress(smaller, choose_ranks(config, ratio, o.budget, costs), o.method, tokens)
            size = smaller.config.kv_bytes_per_token()
            report["curve"].append(dict(kv_ratio=ratio, kv_bytes_per_token=size, loss=measure(smaller)))
            say(f"kv_ratio {ratio:g}: {size:,} bytes per token, loss {report['curve'][-1]['loss']:.4f}")
            del smaller
    ranks = choose_ranks(config, o.kv_ratio, o.budget, costs)
    speed, size = decoding(model, o.rows, o.context)  # now, so that no second model has to be kept for it
    original = copy.deepcopy(model) if o.distill or o.continue_original else None
    report["errors"] = compress(model, ranks, o.method, tokens)
    loss["after"] = measure(model)
    say(f"loss {loss['after']:.4f} after compressing ({loss['after'] - loss['before']:+.4f})")
    if o.heal_steps:
        data = StartedWindows(WindowSampler(dataset.train, o.block_size, o.seed + 1), start)

        def show_step(step, value):
            if step % max(1, o.heal_steps // 10) == 0:
                say(f"healing: step {step}/{o.heal_steps}, {'KL' if o.distill else 'loss'} {value:.4f}")

        heal(model, data, o, o.heal_steps, original if o.distill else None, show_step)
        loss["healed"] = measure(model)
        say(f"loss {loss['healed']:.4f} after healing ({loss['healed'] - loss['before']:+.4f})")
        if o.continue_original:
            loss["continued"] = measure(heal(original, data, replace(o, heal_params="all"), o.heal_steps))
            behind = f"healed - continued {loss['healed'] - loss['continued']:+.4f}"
            say(f"loss {loss['continued']:.4f} of the original after the same steps; {behind}")
    speeds, sizes = zip((speed, size), decoding(model, o.rows, o.context))
    per_token = [size // (o.rows * o.context) for size in sizes]
    report |= dict(ranks=[list(pair) for pair in ranks], loss=loss)
    report["bpb"] = {name: dataset.bits_per_byte(value) for name, value in loss.items()}
    report["kv_bytes_per_token"] = dict(before=per_token[0], after=per_token[1])
    report["kv_ratio"] = per_token[1] / per_token[0]
    report["cache"] = dict(rows=o.rows, context=o.context, bytes=dict(before=sizes[0], after=sizes[1]))
    report["decode_tokens_per_second"] = dict(before=round(speeds[0], 2), after=round(speeds[1], 2))
    return model, report


def print_report(report):
    titles = ("before", "after", "healed", "original on")
    say(f"\n{'':<28}" + "".join(f"{title:>14}" for title in titles[: len(report["loss"])]))
    for name, key, form in (
        ("loss, nats per token", "loss", "14.4f"),
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
    """Errors per layer, the probe and the loss against the cache."""
    panels = ["errors", *(name for name in ("probe", "curve") if name in report)]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False)
    layers = range(len(report["ranks"]))
    for panel, ax in zip(panels, axes[0]):
        for kind, name, colour, shift in (("k", "keys", "#4c72b0", -0.2), ("v", "values", "#dd8452", 0.2)):
            if panel == "errors":
                lost = [100 * error[kind] for error in report["errors"]]
                ax.bar([layer + shift for layer in layers], lost, 0.4, color=colour, label=name)
                ax.set(xlabel="layer", ylabel="% of energy lost", title=f"error per layer, {report['method']}")
            elif panel == "probe":
                costs = report["probe"][kind]  # [layer][heads kept - 1]
                n = len(costs[0])
                half = [cost[(n - 1) // 2] for cost in costs]
                ax.plot(layers, half, "o-", ms=3, color=colour, label=f"{name}, {(n + 1) // 2} of {n}")
                ax.set(xlabel="the one layer compressed", ylabel="increase of the loss (nats per token)", title="probe")
        if panel == "curve":
            points = sorted((point["kv_bytes_per_token"], point["loss"]) for point in report["curve"])
            ax.plot(*zip(*points), "o-", ms=4, color="#55a868", label="before healing")
            ax.axhline(report["loss"]["before"], color="grey", lw=0.8, ls="--", label="original")
            ax.set(xlabel="cached bytes per token", ylabel="loss (nats per token)", xlim=(0, None))
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


def main(argv=None):
    o, given = parse_options(Options, argv)
    try:
        o.out_dir = o.out_dir or f"{str(o.checkpoint).rstrip('/')}-{'hf' if o.export else f'kv{o.kv_ratio:g}'}"
        if o.export:
            return export(o, given)
        model, state, dataset = open_job(o, given)
        start = () if starts_bare(state) else dataset.tokenizer.start_of_text
        set_kernel(o.kernel)
        if o.threads:
            torch.set_num_threads(o.threads)
        torch.manual_seed(o.seed)
        model, report = run(o, model, dataset, start)
        with new_folder(o.out_dir, o.overwrite) as folder:
            saved = dict(model=model.state_dict(), config=asdict(model.config), data=describe_data(dataset))
            saved |= dict(options=dict(data_dir=str(dataset.folder)), start_of_text=bool(start))
            save_checkpoint(folder, saved)
            dataset.tokenizer.save(folder)
            config = dict(format=FORMAT, model=asdict(model.config))
            for name, content in (("config.json", config), ("report.json", report)):
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        picture = save_picture(Path(o.out_dir) / "report.png", lambda plt: draw_report(plt, report))
    except (ValueError, OSError) as error:
        fail(error)
    print_report(report)
    say(f"\nwrote {o.out_dir}; {picture}; try: python sample.py --checkpoint {o.out_dir}")


if __name__ == "__main__":
    run_program(main)
