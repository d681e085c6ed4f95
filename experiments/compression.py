"""Half the cache, by every method and budget: the tables of the report.

    python experiments/compression.py --checkpoints out/sweep/mha-seed0,out/sweep/mea-seed0
    python experiments/compression.py --pretrained FOLDER --calibration_data data/a,data/b,data/c --data_dir data/d

The first runs compress.py on checkpoints of ours, heals, and trains the originals for the same steps. The second
measures a Hugging Face model before any healing, on text like the calibration texts and on text that calibration never
saw, and how fast it decodes. Finished rows are kept in experiments/results/, so that the command can be repeated until
it is done; experiments/LOG.md names the weights and the data of the committed tables. Read compress.py first;
engines.py measures what huggingface.py exported.
"""

import copy
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import RESULTS, ROOT, Rows, finish_axes, in_turns, mean_and_std, number, program, read_metrics
from experiments.report import table
from options import choose_dtype, fail, option, parse_options, run_program, save_picture, split_list

import torch

from attention import one_hot_composition
from compress import METHODS, calibrate, choose_ranks, compress, probe
from data.dataset import open_dataset
from data.sampler import Turns, validation_windows
from experiments.bench import decode_job
from huggingface import from_pretrained
from model import KVCache
from surgery import Calibration
from train import evaluate


def spread(values, form="+.4f"):
    mean, std = mean_and_std(values)
    return number(mean, form, std)


# ---------------------------------------------------------------------------------------------------------------------
# Our checkpoints

OURS = {  # row: (options of compress.py, whether it is healed)
    "svd": ("--method svd", True),
    "calibrated": ("--method calibrated", False),
    "rotated": ("--method rotated", False),
    "aligned, no calibration": ("--method aligned --calibration_windows 0", False),
    "aligned": ("--method aligned", True),
    "aligned, probe": ("--method aligned --budget probe", True),
    "whitened": ("--method whitened", False),
    "gqa": ("--method gqa", True),  # of models without a head norm
    "gqa, one group": ("--method gqa --kv_groups 1", False),
    "aligned, a quarter": ("--method aligned --kv_ratio 0.25", True),
    "gqa, a quarter": ("--method gqa --kv_ratio 0.25", True),
    "latent": ("--method latent", False),
}


def run(script, *how):
    subprocess.run(program(script, *how), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def our_checkpoints(o):
    rows = Rows(RESULTS / "compression.json")
    folders = [Path(folder) for folder in split_list(o.checkpoints)]

    def compressed(folder, name):
        options, heals = OURS[name]
        out = ROOT / o.out_dir / f"{folder.name}-{name.replace(', ', '-').replace(' ', '-')}"
        data = ["--data_dir", o.data_dir] if o.data_dir else []
        how = ["--checkpoint", folder, "--out_dir", out, *options.split(), "--overwrite", "--threads", o.threads, *data]
        run("compress.py", *how)
        report = json.loads((out / "report.json").read_text())
        if heals:
            report["loss"]["healed"] = trained(out, report["options"]["data_dir"])
            original = rows.fill(f"{folder.name} | continued", lambda: trained(folder, report["options"]["data_dir"]))
            report["loss"]["continued"] = original
        return {name: report[name] for name in ("loss", "kv_bytes_per_token", "ranks")}

    def trained(folder, data_dir):
        """The loss of a checkpoint that goes on for heal_steps, as compress.py says."""
        out = ROOT / o.out_dir / f"{Path(folder).name}-trained"
        how = ["--preset", "heal", "--max_steps", o.heal_steps, "--warmup_steps", max(1, o.heal_steps // 10)]
        how += ["--seed", 1, "--init_from", folder, "--data_dir", data_dir, "--out_dir", out, "--threads", o.threads]
        run("train.py", *how, "--overwrite")
        return read_metrics(out)[-1]["val_loss"]

    for folder in folders:
        normed = json.loads((folder / "config.json").read_text())["model"]["head_norm"]
        for name in OURS:
            if not (normed and "gqa" in name):
                rows.fill(f"{folder.name} | {name}", lambda: compressed(folder, name))
    cells = []
    known = dict.fromkeys(name.split(" | ")[0] for name in rows)  # of earlier commands, too
    for kind in sorted({checkpoint.split("-seed")[0] for checkpoint in known}):
        mine = [checkpoint for checkpoint in known if checkpoint.split("-seed")[0] == kind]
        made = [name for name in OURS if all(f"{checkpoint} | {name}" in rows for checkpoint in mine)]
        losses = {name: [rows[f"{checkpoint} | {name}"]["loss"] for checkpoint in mine] for name in made}
        gains = {name: [loss["after"] - loss["before"] for loss in mine] for name, mine in losses.items()}
        for name, mine in losses.items():
            ratio = statistics.mean(gain / svd for gain, svd in zip(gains[name], gains["svd"]))
            healed = spread([loss["healed"] - loss["continued"] for loss in mine]) if OURS[name][1] else ""
            before = spread([loss["before"] for loss in mine], form=".4f")
            cells.append([kind, name, before, spread(gains[name]), f"{ratio:.3f}", healed, str(len(mine))])
    heads = ["model", "method", "loss, original", "increase before healing", "to svd's"]
    rows.write_table("compression.py", table([*heads, "after healing, minus the original trained on", "n"], cells))


# ---------------------------------------------------------------------------------------------------------------------
# A pretrained model

PEERS = ("latent", "whitened", "gqa", "aligned, probe", "aligned", "rotated", "pooled", "svd")
MAIN = ("latent", "whitened", "gqa", "aligned")  # with every seed, at half the cache
RATIOS = (1 / 2, 1 / 3, 2 / 3)
GONE = ("absorbed",)  # gqa took its place; its rows are kept
PICTURE = {
    "svd": "the paper's SVD",
    "aligned": "virtual heads",
    "gqa": "joined heads, a plain Llama",
    "latent": "latents",
}


def planned(seeds):
    """(ratio, method, seed) of the rows, in the order in which they are made."""
    half = [(0.5, method, 0) for method in PEERS if method != "aligned, probe"]
    repeated = [(0.5, method, seed) for seed in range(1, seeds) for method in MAIN]
    others = [(ratio, method, 0) for ratio in RATIOS[1:] for _, method, _ in half]
    return [*half, *repeated, *others, (0.5, "aligned, probe", 0)]


@torch.no_grad()
def pool(model, ranks):
    """Neighbouring key/value heads become their average, as grouped-query attention is made (2305.13245): `svd` then
    finds as many distinct heads as `ranks` has."""
    for block, numbers in zip(model.layers, ranks):
        for projection, rank in zip((block.self_attn.k_proj, block.self_attn.v_proj), numbers):
            for w in projection.parameters():
                heads = w.view(-1, model.config.head_dim, *w.shape[1:])
                groups = one_hot_composition(rank, len(heads)).to(w)  # (rank, n)
                mean = torch.einsum("gh,h...->g...", groups / groups.sum(1, keepdim=True), heads)
                heads.copy_(torch.einsum("gh,g...->h...", groups, mean))


def pretrained(o):
    """The rows of `planned`, and how fast the model decodes."""
    torch.set_num_threads(o.threads)
    rows, T = Rows(RESULTS / f"compression-{Path(o.pretrained).name}.json"), o.block_size
    device, dtype = torch.device("cpu"), choose_dtype("auto", torch.device("cpu"))
    folders = split_list(o.calibration_data)
    texts = {folder: open_dataset(folder) for folder in (*folders, o.data_dir)}
    windows = {folder: validation_windows(text.val, T, o.eval_windows) for folder, text in texts.items()}
    load = functools.cache(lambda: from_pretrained(o.pretrained))

    def losses(model):
        return {Path(folder).name: evaluate(model, part, 2, device, dtype) for folder, part in windows.items()}

    def windows_seen(seed):
        """(tokens that calibrate, the windows behind them that a probe measures on)."""
        sampler = Turns([texts[folder].train for folder in folders], T, seed)
        inputs, targets = sampler.batch(0, o.calibration_windows + o.probe_windows)
        n = o.calibration_windows
        return torch.from_numpy(inputs[:n]), (inputs[n:], targets[n:])

    @functools.lru_cache(1)
    def calibration(seed):
        """(what every layer saw, seconds that took), for all methods; on disk, too."""
        path, began = ROOT / o.out_dir / f"calibration-seed{seed}.pt", time.monotonic()
        if not path.exists():
            layers = [vars(seen) for seen in calibrate(load(), windows_seen(seed)[0], dtype=dtype)]
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save((layers, time.monotonic() - began), path)
        layers, seconds = torch.load(path, weights_only=True, mmap=True)
        return [Calibration(**layer) for layer in layers], seconds

    def compressed(ratio, name, seed):
        model, (method, *probed) = copy.deepcopy(load()), name.split(", ")
        pooled, method = method == "pooled", "svd" if method == "pooled" else method
        seen, seconds = calibration(seed) if METHODS[method].sees_data and method != "gqa" else (None, 0.0)
        if method == "gqa":  # each layer sees what the replaced ones put out
            seen = calibrate(model, windows_seen(seed)[0], dtype=dtype)
        began, costs = time.monotonic(), None
        if probed:
            tokens, few = windows_seen(seed)
            costs = probe(copy.deepcopy(model), method, tokens, few, dtype=dtype)
        ranks = choose_ranks(model.config, ratio, "probe" if probed else "all", costs, method)
        if pooled:
            pool(model, ranks)
        compress(model, ranks, method, seen)
        seconds = dict(calibrating=round(seconds, 1), fitting=round(time.monotonic() - began, 1))
        heads = [[n / load().config.head_dim for n in pair] for pair in ranks] if method == "gqa" else ranks
        return dict(loss=losses(model), heads=heads, seconds=seconds)

    def decoded(methods):
        """{method: {context: (tokens per second, cache bytes)}}, in turns."""
        models, found = {method: copy.deepcopy(load()) for method in methods}, {method: {} for method in methods}
        for method in [name for name in methods if name != "original"]:  # uncalibrated: speed is the format's
            compress(models[method], choose_ranks(models[method].config, 0.5, "all", method=method), method)
        longest = load().config.block_size
        for context in sorted({min(context, longest) for context in (1024, 4096, 8192)}):
            caches = {name: KVCache(model.config, 1, context, torch.float32, device) for name, model in models.items()}
            jobs = {name: decode_job(model, caches[name], context, 8) for name, model in models.items()}
            for name, seconds in in_turns(jobs, 7).items():
                found[name][str(context)] = 1 / statistics.median(seconds), caches[name].nbytes
        return found

    rows.fill("original", lambda: losses(load()))
    for ratio, method, seed in planned(o.seeds):
        rows.fill(f"{ratio:.3f} | {method} | {seed}", lambda: compressed(ratio, method, seed))
    missing = [method for method in split_list(o.decode) if f"decoding | {method}" not in rows]
    for method, speeds in (decoded(missing) if missing else {}).items():
        rows.fill(f"decoding | {method}", lambda: speeds)
    rows.write_table("compression.py", peers_table(rows, o))
    seen = [Path(folder).name for folder in folders]
    print(save_picture(rows.path.with_suffix(".png"), lambda plt: draw(plt, rows, seen)))


def peers_table(rows, o):
    """The lines of the table, of the rows that are there."""
    before, cells = rows["original"], []
    for ratio in sorted(RATIOS, reverse=True):
        for method in (*PEERS, *GONE):
            mine = [rows.get(f"{ratio:.3f} | {method} | {seed}") for seed in range(o.seeds)]
            if not (mine := [row for row in mine if row]):
                continue
            more = [[row["loss"][name] - loss for row in mine] for name, loss in before.items()]
            perplexity = f"{math.exp(statistics.mean(map(statistics.mean, more))):.2f}"
            pair = " + ".join(f"{statistics.mean(n):.3g}" for n in zip(*mine[0]["heads"]))
            shown = [spread(values, "+.3f") for values in more]
            cells.append([f"{ratio:.2f}", pair, method, *shown, perplexity, str(len(mine))])
    listed = ", ".join(f"{name} {loss:.4f}" for name, loss in before.items())
    heads = ["cache", "key + value heads", "method", *before, "perplexity, times", "seeds"]
    yield from [f"The original's losses: {listed} nats per token. Increase before any healing:", ""]
    yield from table(heads, cells)
    speeds = {name.split(" | ")[1]: row for name, row in rows.items() if name.startswith("decoding")}
    if speeds:
        contexts = list(next(iter(speeds.values())))
        heads = ["", *(f"tokens/s behind {c}" for c in contexts), *(f"MiB of {c}" for c in contexts)]
        cells = [
            [method, *(f"{row[c][0]:.2f}" for c in contexts), *(f"{row[c][1] / 2**20:.1f}" for c in contexts)]
            for method, row in speeds.items()
        ]
        yield from ["", f"Decoding, one row, float32, threads: {o.threads}.", "", *table(heads, cells)]


def draw(plt, rows, seen):
    """The mean increase on the texts that are `seen` in calibration against the share of the cache that is left."""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, label in PICTURE.items():
        points = {}
        for name, row in rows.items():
            if f" | {method} | " in name:
                more = statistics.mean(row["loss"][text] - rows["original"][text] for text in seen)
                points.setdefault(float(name.split(" | ")[0]), []).append(more)
        ratios = sorted(points)
        ax.plot(ratios, [statistics.mean(points[ratio]) for ratio in ratios], marker="o", label=label)
    ax.set(yscale="log", xticks=sorted(RATIOS), xticklabels=[f"{ratio:.0%}" for ratio in sorted(RATIOS)])
    finish_axes(ax, xlabel="share of the cache", ylabel="increase of the loss, nats, before healing")
    return figure


@dataclass
class Options:
    checkpoints: str = option("", "run folders with commas between them, named <variant>-seed<n>")
    heal_steps: int = option(35, "steps of healing, a tenth of the small preset's", least=1)
    out_dir: str = option("out/compression", "where compressed models go")
    pretrained: str = option("", "a Hugging Face model")
    data_dir: str = option("", "data set for calibration; for a pretrained model one that calibration does not see")
    calibration_data: str = option("", "for a pretrained model: data sets with commas between them, as in compress.py")
    block_size: int = option(512, "positions of a window", least=2)
    calibration_windows: int = option(36, "windows to calibrate a pretrained model on", least=1)
    probe_windows: int = option(6, "windows that a probe measures it on", least=1)
    eval_windows: int = option(8, "windows of each data set to measure it on", least=1)
    seeds: int = option(3, "calibrations at half the cache", least=1)
    decode: str = option("original,aligned,gqa,latent", "methods whose decoding is timed")
    threads: int = option(1, "CPU threads", least=1)


def main(argv=None):
    o, _ = parse_options(Options, argv)
    if bool(o.checkpoints) == bool(o.pretrained):
        fail("give --checkpoints or --pretrained")
    if o.pretrained and not (o.data_dir and o.calibration_data):
        fail("--pretrained needs --data_dir and --calibration_data")
    try:
        (pretrained if o.pretrained else our_checkpoints)(o)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        fail(error)


if __name__ == "__main__":
    run_program(main)
