"""Half the KV cache: a trained model's attention layers are replaced by smaller ones, and what that costs is measured.

    python compress.py --checkpoint out/small --kv_ratio 0.5 --out_dir out/small-half
    python compress.py --checkpoint out/mha --method gqa --out_dir out/mha-half
    python compress.py --checkpoint FOLDER --method gqa --data_dir data/d --calibration_data data/a,data/b

Three formats hold the same bytes. **Virtual heads** are the paper's: fewer component heads are cached, and MEA mixes
them back as it reads them; what is mixed may be mapped as well, where the map costs nothing: a value head by any
matrix, which goes into W^O, a key head by a complex number for each pair that RoPE turns, which goes into the queries.
**Grouped heads** (`gqa`) are a plain MHA, which every engine runs: key/value heads are joined into groups, and each
group keeps the pairs of keys, and the directions of values, that lose least. Queries and W^O absorb how they are read.
**Latents** are one short vector for the keys of all heads and one for the values: any mix of features, so they lose
least; what they pay is that keys have to be rebuilt and rotated whenever they are read.

surgery.py replaces one layer. Here `calibrate` shows a model text, `compress` replaces its layers one by one, `probe`
finds out which layers can spare how many heads. At the end stands the command that heals: `train.py` trains what is
left towards the original. Read `surgery.py` first.
"""

from options import autocast, choose_device, choose_dtype, fail, new_folder, option, parse_options, progress
from options import run_program, say, shown_command, split_list, write_atomically

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from attention import ATTENTION
from checkpoint import FORMAT, load_checkpoint, save_checkpoint, starts_bare
from data.texts import Texts
from functional import PATHS, linear_cross_entropy, set_kernel
from lowrank import shared_pairs
from runs import check_tokenizer, describe_data
from surgery import METHODS, Calibration, composition, compress_layer, is_grouped, is_latent, join_heads, layer_groups
from surgery import rope_of_pairs, second_moments, unfold
from train import evaluate

# ---------------------------------------------------------------------------------------------------------------------
# A model


BUDGETS = {  # which of n layers give up heads; all three are the paper's (section 5.2)
    "all": lambda n: range(n),
    "deep": lambda n: range(3, n),
    "middle": lambda n: range(round(n / 4), round(3 * n / 4)),
}


def keys_stay(config, method):
    """Whether keys stay as they are: QK-norm does not commute with composition; a latent's are rebuilt before it."""
    return config.qk_norm and METHODS[method].form != "latent"


def cached_now(config):
    """One (n_k, n_v) per layer of what the model caches."""
    return [tuple(config.kv_heads(layer)) for layer in range(config.n_layer)]


def uniform_ranks(config, kv_ratio, budget="all", method="aligned", kv_groups=None):
    """One (n_k, n_v) per layer: `kv_ratio` of the heads that each layer of the budget caches now.

    Keys and values keep as many; an odd one is a key head, of a latent a value head, whichever costs less. Keys behind
    a QK-norm stay: values give up all. Of grouped heads the pairs are numbers, not heads: every layer's n_kv_head times
    its width. Raises ValueError, naming what is possible, for a ratio that cannot be.
    """
    if is_grouped(method):
        return grouped_ranks(config, kv_ratio, budget, kv_groups)
    ranks = cached_now(config)
    layers, stay = BUDGETS[budget](config.n_layer), keys_stay(config, method)
    if not layers:
        raise ValueError(f"budget {budget} leaves none of {config.n_layer} layers to compress: use all or probe")
    for layer in layers:
        n_k, n_v = ranks[layer]
        what = f"{n_k} key and {n_v} value heads" + " (keys behind a QK-norm stay)" * stay
        heads = check_ratio(kv_ratio, n_k + n_v, n_k + 1 if stay else 2, what, hint=parts_hint(config))
        keys = n_k if stay else max(heads - n_v, min(n_k, heads // 2 if is_latent(method) else heads - heads // 2))
        ranks[layer] = keys, heads - keys
    return ranks


def grouped_ranks(config, kv_ratio, budget, kv_groups):
    """`uniform_ranks` of grouped heads."""
    if why := ungroupable(config):
        raise ValueError(why)
    if budget != "all":
        raise ValueError(f"budget {budget} leaves layers as they are, and those of --method gqa are alike: use all")
    if kv_groups and joinable_heads(config) % kv_groups:
        raise ValueError(f"kv_groups {kv_groups} must divide the {joinable_heads(config)} heads that can be joined")
    numbers = sum(map(sum, cached_now(config))) * config.head_dim / (2 * config.n_layer)
    step = 2 * (kv_groups or 1)  # RoPE turns pairs: the width of a group is even
    what = f"{numbers:g} numbers for keys and as many for values" + f" in {kv_groups} groups" * bool(kv_groups)
    kept = step * check_ratio(kv_ratio, numbers / step, 1, what, "even width")
    return [(kept, kept)] * config.n_layer


def joinable_heads(config):
    """How many key/value heads --method gqa can join: of an MEA each query head has its own, made of components."""
    if config.attention == "mea":
        return config.n_head
    return math.gcd(*(n for pair in cached_now(config) for n in pair))


def ungroupable(config):
    """Why --method gqa cannot make a plain MHA of it, or "": one line."""
    why = "its head norm divides by a head's size" if config.head_norm else ""
    why = "a QK-norm stands between its keys and RoPE" if config.qk_norm else why
    return why and f"--method gqa cannot join the heads of this {config.attention} model: {why}; latent can"


def parts_hint(config):
    """What to try where no number of heads fits."""
    return "" if ungroupable(config) else "; --method gqa keeps parts of heads, too"


def check_ratio(kv_ratio, whole, fewest, what, unit="number of heads", hint=""):
    """kv_ratio * whole, a whole number of at least `fewest` but for rounding of the ratio. Raises ValueError, naming
    what is possible."""
    kept = round(kv_ratio * whole) if math.isfinite(kv_ratio) else 0
    if abs(kept / whole - kv_ratio) > 0.005 or not fewest <= kept <= whole:
        possible = [f"{n / whole:.4g}" for n in range(fewest, math.floor(whole) + 1)]
        listed = ", ".join(possible if len(possible) < 20 else [*possible[:3], "..", *possible[-3:]])
        listed += " is possible" if len(possible) == 1 else " are possible"
        raise ValueError(f"kv_ratio {kv_ratio:g} of {what} is no {unit} that works: {listed}{hint}")
    return kept


def choose_ranks(config, kv_ratio, budget, costs=None, method="aligned", kv_groups=None):
    """The ranks for a budget: `uniform_ranks`, or for "probe" those that `allocate` chooses by its `costs` (None only
    checks)."""
    if budget != "probe" or is_grouped(method):
        return uniform_ranks(config, kv_ratio, budget, method, kv_groups)
    ranks = cached_now(config)
    fewest = sum(n_k + 1 if keys_stay(config, method) else 2 for n_k, _ in ranks)
    total = sum(map(sum, ranks))
    what = f"{total} cached heads in {config.n_layer} layers"
    heads = check_ratio(kv_ratio, total, fewest, what, hint=parts_hint(config))
    return allocate(costs, heads) if costs else ranks


def with_ranks(config, ranks, method="aligned", kv_groups=None):
    """The config of the model that caches `ranks`, one (n_k, n_v) per layer.

    Grouped heads: in `kv_groups`, by default the most whose width is not below that of a head, so that nothing grows.
    """
    shape = dict(n_kv_head=[list(pair) for pair in ranks], mea_form="auto", compose="full")
    if is_grouped(method):
        heads, numbers, D = joinable_heads(config), ranks[0][0], config.head_dim
        fit = [n for n in range(1, heads + 1) if not heads % n and not numbers % (2 * n) and numbers >= n * D]
        groups = kv_groups or max(fit, default=1)
        shape |= dict(n_kv_head=groups, head_dim=numbers // groups, rope_frequencies=None)
        return replace(config, attention="mha", **shape)
    if not is_latent(method):
        return replace(config, attention="mea", **shape)
    grouped = config.attention == "mha" and len(set(cached_now(config))) == 1
    return replace(config, attention="latent", latent_heads=config.kv_heads(0)[0] if grouped else None, **shape)


def check_method(model, method):
    """Raise ValueError, in one line, for a model that `method` would turn into one that computes something else."""
    if why := ATTENTION[model.config.attention].incompressible:
        raise ValueError(f"this is a {model.config.attention} model, which cannot be compressed: {why}")
    if is_grouped(method) and (why := ungroupable(model.config)):
        raise ValueError(why)
    if is_latent(method) and model.config.qk_norm:
        for layer, block in enumerate(model.layers):
            w = composition(block.self_attn, "k")
            if not torch.equal(w, (w == w.amax(0)).to(w)):  # one 1 in each column
                mixed = f"QK-norm stands before the composition of keys of layer {layer}, which is not one-hot"
                raise ValueError(
                    f"{mixed}: {method} rebuilds keys before a QK-norm; aligned leaves such keys as they are"
                )


def rope_of(model, length):
    return model.rope_cos[:length], model.rope_sin[:length]


@dataclass
class calibrate:
    """A text, tokens (N, T) or nothing, shown to `model` in `dtype`: iterating yields a `Calibration` for each layer in
    turn, or None, as often as one wants.

    Each layer may be replaced when it has been yielded, and the next ones still see what the original ones put out.
    With `in_sequence(pairs)` they see what the replaced ones put out, whose heads have those pairs. Memory: what one
    layer sees, unless it is kept.
    """

    model: torch.nn.Module
    tokens: torch.Tensor | None
    chunk: int = 4
    dtype: torch.dtype = torch.float32

    def __iter__(self):
        return self.in_sequence(None)

    def in_sequence(self, pairs):
        model, tokens = self.model, self.tokens
        if tokens is None:
            yield from [None] * len(model.layers)
            return
        parts, rope = [model.embed(part).detach() for part in tokens.split(self.chunk)], rope_of(model, tokens.size(1))
        for block in model.layers:  # nothing is held open while the caller works
            with torch.no_grad(), autocast(tokens.device, self.dtype):
                inputs = [block.input_layernorm(x) for x in parts]
                outputs = [block.self_attn(x, rope) for x in inputs]
                moments = [second_moments(block.self_attn, x, rope, view) for view, x in enumerate(inputs)]
            mean = {kind: sum(each[kind] for each in moments) / len(moments) for kind in moments[0]}
            yield Calibration(mean, inputs, outputs, rope, self.dtype)
            with torch.no_grad(), autocast(tokens.device, self.dtype):
                if pairs is not None:
                    outputs = [block.self_attn(x, rope_of_pairs(rope, pairs)) for x in inputs]
                parts = [x + output for x, output in zip(parts, outputs)]
                parts = [x + block.mlp(block.post_attention_layernorm(x)) for x in parts]


@torch.no_grad()
def compress(model, ranks, method="aligned", calibration=None, kv_groups=None):
    """Replace every attention of `model` by one that caches `ranks`, in place: memory is the model and one layer's
    work.

    `calibration` has what each layer sees (see `calibrate`), of the original model; without it weights stand in for the
    data. Returns one {"k": error, "v": error} per layer.
    """
    check_method(model, method)
    config, errors = with_ranks(model.config, ranks, method, kv_groups), []
    calibration, replace_layer = calibration or [None] * len(model.layers), compress_layer
    if is_grouped(method):
        config, calibration, replace_layer = plan_groups(model, config, calibration)
    bar = progress(f"compressing, {method}", len(model.layers), " layers")
    for layer, (block, seen) in enumerate(zip(model.layers, calibration)):
        block.self_attn, lost = replace_layer(block.self_attn, config, layer, method, seen)
        errors.append(lost)
        bar.update(1)
    bar.close()
    model.config = config
    model.make_rope()  # grouped heads have pairs of their own
    model.to(model.lm_head.weight.device)
    return errors


def plan_groups(model, config, calibration):
    """(config, calibration, what replaces a layer) of grouped heads: all layers keep the same pairs.

    A first look at what the original layers see chooses groups and pairs; the second, at what the replaced layers put
    out, fits each layer.
    """
    if not isinstance(calibration, calibrate) and any(seen is not None for seen in calibration):
        raise ValueError("gqa looks at a text twice, at layers of its own: give what calibrate returns")
    for block in model.layers:  # all of them before the first look, which is at heads as they are joined
        block.self_attn = unfold(block.self_attn)
    groups, energies, bar = [], [], progress("choosing pairs", len(model.layers), " layers")
    for block, seen in zip(model.layers, calibration):
        mine, each = layer_groups(block.self_attn, config, seen)
        groups.append(mine)
        energies += each
        bar.update(1)
    bar.close()
    pairs, c = shared_pairs(energies, config.head_dim // 2), model.config
    every_pair_once = pairs.tolist() == list(range(c.head_dim // 2))  # heads as wide as before
    chosen = c.rope_frequencies if every_pair_once else [c.frequencies[pair] for pair in pairs]
    if isinstance(calibration, calibrate):
        calibration = calibration.in_sequence(pairs)

    def replace_layer(attn, config, layer, _, seen):
        return join_heads(attn, config, layer, groups[layer], pairs, seen)

    return replace(config, rope_frequencies=chosen), calibration, replace_layer


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
        original, full = block.self_attn, cached_now(config)[layer]
        for kind, n in zip("kv", full):
            fixed = kind == "k" and keys_stay(config, method)
            costs[layer, kind] = [math.inf if fixed else 0.0] * (n - 1) + [0.0]
            for rank in range(1, 1 if fixed else n):
                ranks = cached_now(config)
                ranks[layer] = (rank, full[1]) if kind == "k" else (full[0], rank)
                smaller = with_ranks(config, ranks, method)
                block.self_attn, _ = compress_layer(original, smaller, layer, method, seen)
                more = loss(layer) - base
                costs[layer, kind][rank - 1] = more if math.isfinite(more) else math.inf
            listed = " ".join(f"{cost:+.4f}" for cost in costs[layer, kind])
            say(f"probe: layer {layer:>2}, 1 .. {n} {'keys' if kind == 'k' else 'values'}: {listed}")
        block.self_attn = original
        x = forward(block, x)
        bar.update(1)
    bar.close()
    return costs


def allocate(costs, heads):
    """The ranks, one [n_k, n_v] per layer, with `heads` cached heads in all and the smallest sum of `costs` (see
    `probe`; one below 0 counts as 0).

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
# The program


@dataclass
class Options:
    checkpoint: str = option("out/small", "run folder or file, a Hugging Face folder or hub name, or a .gguf file")
    out_dir: str = option("", "folder of the compressed model (default: the checkpoint's with -kv<ratio> behind it)")
    overwrite: bool = option(False, "replace what out_dir holds")
    kv_ratio: float = option(0.5, "cached heads to keep: of every layer of the budget; with probe, of the whole model")
    method: str = option(
        "aligned",
        "virtual heads: svd, the paper's; calibrated, svd in the metric of the data; rotated, and heads turned so that "
        "they agree; aligned, by any map that costs nothing, W^O refitted. gqa: a plain MHA, whose heads are joined. "
        "Latents, whose keys are rebuilt when read: whitened, an SVD of the outputs; latent, weighted by queries and "
        "W^O",
        list(METHODS),
    )
    kv_groups: int | None = option(
        None,
        "key/value heads that gqa makes; fewer lose less and are wider (default: none wider than before)",
        least=1,
    )
    budget: str = option("all", "layers that give up heads; probe: measure where they cost least", [*BUDGETS, "probe"])
    data_dir: str = option("", "data set that is reported on (default: the one that the checkpoint was trained on)")
    calibration_data: str = option("", "data sets to calibrate and probe on, between commas (default: data_dir)")
    calibration_windows: int = option(32, "training windows that the method sees; 0: only weights", least=0)
    probe_windows: int = option(8, "training windows that a probe measures on", least=1)
    eval_windows: int = option(64, "validation windows of each data set that the report measures on", least=1)
    batch_size: int = option(8, "windows that are measured at once", least=1)
    block_size: int | None = option(None, "positions in a window (default: the model's, at most 512)", least=2)
    seed: int = option(0, "of the calibration windows", least=0)
    kernel: str = option("auto", "path of the attention (see functional.py)", PATHS)
    device: str = option("auto", "cpu, cuda or cuda:1; auto takes the best there is")
    threads: int = option(0, "CPU threads (0: as many as cores)", least=0, most=1024)


def open_job(o, given):
    """Check everything before any work: (model, state, data sets by path, the reported one first). Raises ValueError or
    OSError."""
    if o.kv_groups and not is_grouped(o.method):
        raise ValueError("kv_groups are for --method gqa: give both or neither")
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
    check_method(model, o.method)
    ranks = choose_ranks(config, o.kv_ratio, o.budget, method=o.method, kv_groups=o.kv_groups)
    with_ranks(config, ranks, o.method, o.kv_groups)
    saved = state.get("options")
    data_dir = o.data_dir or (saved.get("data_dir") if isinstance(saved, dict) else None)
    if not isinstance(data_dir, str) or not data_dir:
        how = "give --data_dir (data/prepare.py --tokenizer hf:FOLDER makes one)"
        raise ValueError(f"{o.checkpoint} does not say what data it was trained on: {how}")
    o.data_dir, o.calibration_data = data_dir, o.calibration_data or data_dir
    try:
        texts = Texts(o.calibration_data, o.data_dir)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; if it lies elsewhere, say where with --data_dir") from None
    o.block_size = o.block_size or min(config.block_size, 512)
    if o.block_size > config.block_size:
        raise ValueError(f"block_size must be between 2 and the model's {config.block_size}, not {o.block_size}")
    check_tokenizer(o.checkpoint, state, texts)
    texts.check_length(o.block_size)
    return model, state, texts


def measure(o, model, windows, dtype):
    """{name: loss} of the validation windows of each data set. Raises ValueError if one is not finite."""
    device, losses = model.lm_head.weight.device, {}
    for name, part in windows.items():
        losses[name] = loss = evaluate(model, part, o.batch_size, device, dtype)
        if not math.isfinite(loss):
            raise ValueError(f"the {model.config.attention} model's loss on {name} is {loss}: nothing was written")
    return losses


def compress_and_measure(o, model, texts, start):
    """Compress the model as the options say, in place; returns the report."""
    config, device = model.config, model.lm_head.weight.device
    dtype = choose_dtype("auto", device)
    windows = texts.validation_windows(o.block_size, o.eval_windows, start)
    seen = texts.sampler(o.block_size, o.seed, start).batch(0, o.calibration_windows + o.probe_windows)
    tokens = None
    if o.calibration_windows and METHODS[o.method].sees_data:
        tokens = torch.from_numpy(seen[0][: o.calibration_windows]).to(device)
    report = dict(method=o.method, budget=o.budget, seed=o.seed, options=asdict(o))
    heads = "{} key and {} value heads".format(*config.kv_heads(0))
    say(f"{config.attention}, {model.n_params():,} parameters, {config.n_layer} layers of {heads}")
    before, bytes_before, costs = measure(o, model, windows, dtype), config.kv_bytes_per_token(), None
    if o.budget == "probe":
        few = tuple(part[o.calibration_windows :] for part in seen)  # neither calibrated nor reported on
        costs = probe(model, o.method, tokens, few, dtype=dtype)
        finite = {item: [None if math.isinf(cost) else cost for cost in each] for item, each in costs.items()}
        report["probe"] = {kind: [finite[layer, kind] for layer in range(config.n_layer)] for kind in "kv"}
    ranks = choose_ranks(config, o.kv_ratio, o.budget, costs, o.method, o.kv_groups)
    errors = compress(model, ranks, o.method, calibrate(model, tokens, dtype=dtype), o.kv_groups)
    after, bytes_after = measure(o, model, windows, dtype), model.config.kv_bytes_per_token()
    name, dataset = reported(o, texts)
    own = dict(before=before[name], after=after[name])
    return report | dict(
        ranks=[list(pair) for pair in ranks],
        errors=errors,
        kv_bytes_per_token=dict(before=bytes_before, after=bytes_after),
        kv_ratio=bytes_after / bytes_before,
        loss=own,
        bpb={stage: dataset.bits_per_byte(loss) for stage, loss in own.items()},
        texts={name: dict(before=before[name], after=after[name]) for name in before},
    )


def reported(o, texts):
    """(name, data set) of --data_dir."""
    return next((name, dataset) for name, dataset in texts.measured.items() if dataset.folder == Path(o.data_dir))


def publish(o, model, state, texts, start, report):
    """Write the model, its tokenizer and the report as out_dir, a run folder."""
    _, dataset = reported(o, texts)
    with new_folder(o.out_dir, o.overwrite) as folder:
        saved = dict(model=model.state_dict(), config=asdict(model.config), data=describe_data(dataset))
        saved |= dict(options=dict(data_dir=str(dataset.folder)), start_of_text=bool(start))
        saved |= {name: state[name] for name in ("pretrained",) if name in state}
        save_checkpoint(folder, saved)
        dataset.tokenizer.save(folder)
        config = dict(format=FORMAT, model=asdict(model.config))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_atomically(folder / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")


def print_report(report):
    say(f"\n{'':<28}{'before':>14}{'after':>14}")
    for name, loss in report["texts"].items():
        more = loss["after"] - loss["before"]
        say(f"{'loss, ' + Path(name).name:<28}{loss['before']:14.4f}{loss['after']:14.4f}   ({more:+.4f})")
    for name, key, form in (("bits per byte", "bpb", "14.4f"), ("cached bytes per token", "kv_bytes_per_token", "14,")):
        say(f"{name:<28}" + "".join(f"{value:{form}}" for value in report[key].values()))
    say("\nlayer   keys  values   % of energy lost: keys  values")
    for layer, ((n_k, n_v), error) in enumerate(zip(report["ranks"], report["errors"])):
        say(f"{layer:>5}{n_k:>7}{n_v:>8}{100 * error['k']:>23.3f}{100 * error['v']:>8.3f}")


def healing_command(o):
    """What trains the compressed model towards the original, as one would paste it."""
    how = dict(preset="heal", init_from=o.out_dir, teacher=o.checkpoint, data_dir=o.calibration_data)
    how |= {} if o.data_dir in split_list(o.calibration_data) else dict(eval_data=o.data_dir)
    how |= dict(window=o.block_size, out_dir=f"{o.out_dir}-healed")
    return shown_command("python", "train.py", *(word for name, value in how.items() for word in (f"--{name}", value)))


def main(argv=None):
    o, given = parse_options(Options, argv)
    try:
        o.out_dir = o.out_dir or f"{Path(o.checkpoint)}-kv{o.kv_ratio:g}"
        model, state, texts = open_job(o, given)
        start = () if starts_bare(state) else texts.tokenizer.start_of_text
        set_kernel(o.kernel)
        if o.threads:
            torch.set_num_threads(o.threads)
        torch.manual_seed(o.seed)
        report = compress_and_measure(o, model, texts, start)
        publish(o, model, state, texts, start, report)
    except (ValueError, OSError) as error:
        fail(error)
    print_report(report)
    say(f"\nwrote {o.out_dir}; try: {shown_command('python', 'sample.py', '--checkpoint', o.out_dir)}")
    say(f"heal it: {healing_command(o)}")
    if is_grouped(o.method):
        shape = f"{model.config.n_kv_head} key/value heads of {model.config.head_dim}"
        export = shown_command("python", "huggingface.py", "--checkpoint", o.out_dir, "--out_dir", f"{o.out_dir}-hf")
        say(f"{shape}, a plain MHA; for any engine: {export}")


if __name__ == "__main__":
    run_program(main)
