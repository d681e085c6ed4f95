"""The variants against each other: one `train.py` run for each of them and each seed, and a table of where they end.

    python experiments/sweep.py                                     # every variant, 3 seeds, the default preset
    python experiments/sweep.py --variants mha,mea,mea-norm,mea:diagonal,mea@2 --seeds 5 --jobs 2

A variant is a name of attention.ATTENTION; `+norm` or `-norm` behind it is the opposite of its own default,
`:diagonal` lets MEA learn one number per head, and `@2` caches 2 heads. Each variant at a learning rate of its own,
chosen as the paper does (section 5.1.2, appendix D) from short runs whose rate is constant after the warm-up; then full
runs at those rates:

    python experiments/sweep.py --choose_rates --learning_rates 1e-3,3e-3,6e-3,1e-2,3e-2
    python experiments/sweep.py --rates_from experiments/results/rates.json

The same for a laptop, with a model so small that 300 steps take 20 s of one core. What came of it is committed in
experiments/results/laptop/, where each table begins with its command; experiments/LOG.md says what to make of it.

    SHAPE="--preset tiny --n_embd 64 --block_size 128 --batch_size 16 --warmup_steps 50 --eval_windows 64 --jobs 2"
    LAPTOP="$SHAPE --eval_every 50 --save_every 50"
    RESULTS=experiments/results/laptop
    RATES=1e-3,3e-3,6e-3,1.2e-2,2.5e-2,5e-2,1e-1
    python experiments/sweep.py --choose_rates --learning_rates $RATES --max_steps 300 --extrapolate_to 614400 \\
        --results $RESULTS/rates $LAPTOP                 # a run sees 614,400 tokens: nothing is extrapolated
    python experiments/sweep.py --rates_from $RESULTS/rates.json --max_steps 600 --snapshots \\
        --results $RESULTS/own_rates $LAPTOP

The data of the tables bytes and cpp-docs there (the second is 16 million tokens long, so no run meets one twice):

    python data/prepare.py --source python --tokenizer byte --out_dir data/python-byte
    git clone --depth 1 https://github.com/MicrosoftDocs/cpp-docs ../cpp-docs
    python data/prepare.py --source ../cpp-docs/docs --tokenizer bpe --vocab_size 2048 --out_dir data/cpp-docs

Every run has its own folder under --out_dir. Finished runs are kept, interrupted ones go on, so the command can be
repeated until it is done; stopped (Ctrl-C, SIGTERM), it has its runs save and stop. The table is of the finished runs.
Options it does not know go to train.py. Results are tables (.json, .md) and, with matplotlib, pictures (.png), each
with its numbers in a .json beside it.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from options import OneLineParser, fail, parse_options, run_program, save_picture  # before torch

import numpy as np
import torch

import train
from attention import ATTENTION
from checkpoint import load_checkpoint
from experiments.report import command, machine, mean_and_std, number, table
from model import GPT, GPTConfig, build_config

DEFAULT = "mha,mha+norm,mea-norm,mea,dfa,tha"  # what the paper compares

# ---------------------------------------------------------------------------------------------------------------------
# Runs


def variants():
    """{name: options of train.py}: each attention with its own default head norm, and with the opposite."""
    known = {}
    for name in ATTENTION:
        norm = GPTConfig(vocab_size=256, attention=name).head_norm
        known[name] = ["--attention", name]
        known[name + ("-norm" if norm else "+norm")] = ["--attention", name, "--head_norm", "no" if norm else "yes"]
    return known


def variant_options(variant):
    """What train.py is told about a variant, e.g. mea-norm:diagonal@2. Raises ValueError for one that there is not."""
    name, at, cached = variant.partition("@")
    name, colon, compose = name.partition(":")
    known = variants()
    if name not in known or bool(at) != cached.isdecimal() or bool(colon) != (compose == "diagonal"):
        how = "with :diagonal for one number per head, with @n for n cached heads"
        raise ValueError(f"no variant {variant}: choose from {', '.join(known)}, {how}")
    return [*known[name], *(["--compose", compose] if colon else []), *(["--n_kv_head", cached] if at else [])]


def size_options(size):
    """What train.py is told about a size: a preset or a width, in heads of 16 channels. Raises ValueError."""
    if not size or size in train.PRESETS:
        return ["--preset", size] if size else []
    if not size.isdecimal() or int(size) % 16 or not int(size):
        presets = ", ".join(train.PRESETS)
        raise ValueError(f"size {size!r} is neither a preset ({presets}) nor a width, a multiple of 16")
    return ["--n_embd", size, "--n_head", str(int(size) // 16)]


@dataclass(frozen=True)
class Setting:
    """What the runs of one row share, all but the seed. None leaves it to train.py."""

    variant: str
    learning_rate: float | None = None
    size: str | None = None

    @property
    def name(self):
        rate = f"lr{self.learning_rate:g}" if self.learning_rate else None
        return "-".join(filter(None, [self.variant, self.size, rate]))

    def options(self, seed):
        rate = ["--learning_rate", f"{self.learning_rate:g}"] if self.learning_rate else []
        return [*variant_options(self.variant), *size_options(self.size), *rate, "--seed", str(seed)]

    def folders(self, root, seeds):
        return [root / f"{self.name}-seed{seed}" for seed in range(seeds)]


def start(folder, options):
    """The process of a run, new or resumed; its text goes to a file beside the folder."""
    command = [sys.executable, str(ROOT / "train.py"), "--out_dir", str(folder)]
    if (folder / "checkpoint.pt").exists():
        command += ["--resume"]
    else:
        command += ["--overwrite", *options]
        for stale in folder.glob("compose-*.npz"):
            stale.unlink()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        # A session of its own: Ctrl-C reaches the sweep alone, which tells each run once. Told twice, none saves.
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def read_lines(folder):
    """The lines of a run's metrics; none if it has not begun. The last one may be half-written: it is left out."""
    lines = []
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            lines.append(json.loads(line))
    return lines


def read_config(folder, part):
    """The `options` a run was started with, or its `model`; {} if it has not begun."""
    try:
        return json.loads((folder / "config.json").read_text())[part]
    except (OSError, ValueError, KeyError):
        return {}


def finished(folder):
    """The last line of a run's metrics if the run is done, otherwise None."""
    line = (read_lines(folder) or [{}])[-1]
    return line if "val_loss" in line and line["step"] == read_config(folder, "options").get("max_steps") else None


def diverged(folder):
    """Whether a run was stopped by a loss that is not finite; resumed, it would be again."""
    log = Path(f"{folder}.log")
    return folder.exists() and log.exists() and "stopped before the update" in log.read_text(errors="replace")[-1000:]


def check_run(folder, options):
    """ValueError for options that train.py would refuse, or a folder with another run; else the options read."""
    o, _ = parse_options(train.Options, options, train.PRESETS)
    build_config(o)
    saved = read_config(folder, "options")
    for name in sorted(saved.keys() & vars(o).keys() - (train.CHANGEABLE - {"max_steps"})):
        if saved[name] != getattr(o, name):
            other = f"a run with {name} {saved[name]}, not {getattr(o, name)}"
            raise ValueError(f"{folder} holds {other}: give another --out_dir, or remove it")
    return o


def run_all(runs, jobs, at_end, snapshots=False):
    """Do the runs, {folder: options of train.py}, that are not done, `jobs` at a time; call `at_end` after each.

    A run that fails, other than by diverging, ends the sweep: SystemExit. However it ends, the runs save and stop.
    """
    queue, going, taken = [folder for folder in runs if not finished(folder) and not diverged(folder)], {}, {}
    try:
        while queue or going:
            while queue and len(going) < jobs:
                folder = queue.pop(0)
                going[folder] = start(folder, runs[folder])
            time.sleep(0.2)
            ended = [folder for folder, process in going.items() if process.poll() is not None]
            for folder in going if snapshots else []:  # those that ended, too: their last checkpoint is there now
                snapshot(folder, taken)
            for folder in ended:
                process = going.pop(folder)
                if process.returncode and not diverged(folder):
                    command = " ".join(process.args)
                    raise SystemExit(f"error: {command} ended with {process.returncode}: see {folder}.log")
                at_end()
                print(f"{len(runs) - len(queue) - len(going)}/{len(runs)} runs", flush=True)
    finally:
        for process in going.values():
            process.terminate()
        for process in going.values():
            process.wait()


def snapshot(folder, taken):
    """Keep the compositions of a run's checkpoint in compose-STEP.npz; `taken` has the times of those that were."""
    checkpoint = folder / "checkpoint.pt"
    with contextlib.suppress(FileNotFoundError):  # before the first, and between two renames of each
        written = checkpoint.stat().st_mtime_ns
        if taken.get(folder) == written:
            return
        model, state = load_checkpoint(checkpoint)
        taken[folder] = written
        attentions = [layer.self_attn for layer in model.layers]
        if hasattr(attentions[0], "compose_k"):
            weights = lambda name: [getattr(attention, name).detach().numpy() for attention in attentions]
            matrix = lambda w: np.diag(w) if w.ndim == 1 else w  # of --compose diagonal the diagonal alone is learned
            matrices = {name: np.stack([*map(matrix, weights(name))]) for name in ("compose_k", "compose_v")}
            np.savez(folder / f"compose-{state['step']:06}.npz", **matrices)


def compositions(folder):
    """dict(run, step (n), compose_k (n, layers, Hc, H), compose_v) of a run's snapshots, as lists; None without any."""
    files = sorted(folder.glob("compose-*.npz"))
    if not files:
        return None
    loaded = [dict(np.load(file)) for file in files]
    matrices = {name: [snapshot[name].tolist() for snapshot in loaded] for name in ("compose_k", "compose_v")}
    return dict(run=folder.name, step=[int(file.stem.removeprefix("compose-")) for file in files], **matrices)


# ---------------------------------------------------------------------------------------------------------------------
# The table of losses


def sign_flip_p(differences):
    """Two-sided p-value of the mean of paired differences: the exact sign-flip test.

    If the two sides were the same, each difference could as well have had the other sign: p is the share of the 2^n
    choices of signs whose mean is at least as far from 0. No distribution is assumed. p cannot be below 2 / 2^n: three
    seeds cannot show anything at the 5 % level, six can. Raises ValueError for none, or more than 24, differences.
    """
    if not 1 <= len(differences) <= 24:
        raise ValueError(f"the sign-flip test takes 1 to 24 differences, not {len(differences)}")
    sums = np.array([abs(differences[0])])  # flipping all signs changes nothing, so the first may be fixed
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) * (1 - 1e-9)))


def outcome(root, setting, seeds):
    """(a row of counts and losses, {seed: last line of its metrics}) of a setting's finished runs."""
    folders = setting.folders(root, seeds)
    ends = {seed: line for seed, folder in enumerate(folders) if (line := finished(folder))}
    lost = sum(seed not in ends and diverged(folder) for seed, folder in enumerate(folders))
    losses = {seed: line["val_loss"] for seed, line in ends.items()}
    spikes = sum(line["loss_spikes"] for line in ends.values())
    return dict(asdict(setting), n=len(ends), diverged=lost, spikes=spikes, losses=losses), ends


def summary(root, settings, seeds, own_rates=False):
    """{name: {mean, std, n, minus_mha, p, ...}} of the finished runs; differences are paired by seed.

    MHA is the one of the same size and, unless each variant has its own, the same rate.
    """
    rows, outcomes = {}, {setting: outcome(root, setting, seeds) for setting in settings}
    for setting, (row, ends) in outcomes.items():
        plain = Setting("mha", setting.learning_rate, setting.size)
        if own_rates:
            plain = next((s for s in settings if (s.variant, s.size) == ("mha", setting.size)), plain)
        mha = outcomes[plain][0]["losses"] if plain in outcomes and plain != setting else {}
        paired = [loss - mha[seed] for seed, loss in row["losses"].items() if seed in mha]
        row["mean"], row["std"] = mean_and_std(row["losses"].values())
        row["bpb"], _ = mean_and_std(line["val_bpb"] for line in ends.values())
        row["minus_mha"], row["minus_mha_std"] = mean_and_std(paired)
        row["p"] = sign_flip_p(paired) if len(paired) > 1 else None
        if row["n"] or row["diverged"]:
            rows[setting.variant if own_rates and not setting.size else setting.name] = row
    return rows


def markdown(outcomes):
    heads = ["variant", "rate", "validation loss", "bits per byte", "minus MHA, same seed", "p", "spikes", "seeds"]
    rows = []
    for name, row in outcomes.items():
        losses = number(row["mean"], ".4f", row["std"]), number(row["bpb"], ".4f")
        versus = number(row["minus_mha"], "+.4f", row["minus_mha_std"]), number(row["p"], ".3g")
        seeds = f"{row['n']} and {row['diverged']} diverged" if row["diverged"] else str(row["n"])
        rows.append([name, number(row["learning_rate"], "g"), *losses, *versus, str(row["spikes"]), seeds])
    lines = [*table(heads, rows)]
    if counts := sorted({row["n"] for row in outcomes.values() if row["p"] is not None}):
        smallest = ", ".join(f"{2 / 2**n:.2g} with {n} seeds" for n in counts)
        lines += ["", "Mean ± standard deviation over seeds. p: exact sign-flip test of the paired differences,"]
        lines += [f"which cannot be below {smallest}."]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


def fit_power_law(tokens, losses):
    """dict(alpha, D_c, L_0) of L(D) = (D_c / D)^alpha + L_0, the paper's law of a loss curve (section 5.1.2).

    Variable projection: at a given alpha the law is linear in the amplitude (D_c / D_last)^alpha and in L_0, both at
    least 0, so only alpha is searched, on a grid from 0.02 to 2. Points far off the curve, as of a spike, count less
    (Huber's weights). Raises ValueError for fewer than 4 points.
    """
    x, y = np.log(np.asarray(tokens, float) / tokens[-1]), np.asarray(losses, float)
    if len(y) < 4:
        raise ValueError(f"a loss curve of {len(y)} points is too short to fit: 4 are needed")

    alphas, weights = np.geomspace(0.02, 2, 2001), np.ones(len(y))
    basis = np.exp(-np.outer(alphas, x))  # (alphas, points)
    for _ in range(10):
        w = weights / weights.sum()
        centred = basis - (basis @ w)[:, None]
        amplitude = np.maximum(centred @ (w * y) / (centred**2 @ w), 0)
        floor = y @ w - amplitude * (basis @ w)
        amplitude = np.where(floor < 0, basis @ (w * y) / (basis**2 @ w), amplitude)
        floor = np.maximum(floor, 0)
        off = np.abs(amplitude[:, None] * basis + floor[:, None] - y)
        best = int((off**2 @ w).argmin())
        weights = 1 / np.maximum(1, off[best] / (1.345 * 1.4826 * np.median(off[best]) + 1e-12))
    alpha = float(alphas[best])
    return dict(alpha=alpha, D_c=float(tokens[-1] * amplitude[best] ** (1 / alpha)), L_0=float(floor[best]))


def power_law(fit, tokens):
    """The loss that a fit predicts at a number of tokens."""
    return (fit["D_c"] / tokens) ** fit["alpha"] + fit["L_0"]


def smoothed_curve(lines, warmup_steps, points=50):
    """(tokens, training loss) of a run after its warm-up, each the mean over one of up to `points` equal stretches.

    The training loss: there is one at every step, no batch was seen before, and runs of one seed see the same batches.
    """
    after = np.array([(line["tokens"], line["train_loss"]) for line in lines if line["step"] > warmup_steps])
    return np.array([part.mean(0) for part in np.array_split(after, min(points, len(after)))]).T


def rate_rows(root, settings, seeds, tokens=None):
    """A dict for each setting whose runs are all done: spikes, losses, fits, the mean loss extrapolated to `tokens`.

    Stable: every seed finished, and none had a loss spike. `tokens` is by default ten times what a run saw, as in the
    paper.
    """
    rows = []
    for setting in settings:
        row, ends = outcome(root, setting, seeds)
        if row["n"] + row["diverged"] < seeds:
            continue
        folders = setting.folders(root, seeds)
        curves = [(read_lines(folders[seed]), read_config(folders[seed], "options")["warmup_steps"]) for seed in ends]
        row["fits"] = [fit_power_law(*smoothed_curve(*curve)) for curve in curves]
        row["tokens"] = tokens or max((10 * line["tokens"] for line in ends.values()), default=None)
        ahead = mean_and_std(power_law(fit, row["tokens"]) for fit in row["fits"])
        row["extrapolated"], row["extrapolated_std"] = ahead
        row["stable"] = not row["diverged"] and not row["spikes"]
        with torch.device("meta"):
            row["parameters"] = GPT(GPTConfig(**read_config(folders[0], "model"))).n_params()
        rows.append(row)
    return rows


def choose_rate(rows, tolerance):
    """The largest stable rate whose extrapolated loss is within `tolerance` of the lowest stable one, or None.

    The paper found the best rate of every variant to be its largest stable one: an infinite tolerance takes that for a
    rule.
    """
    stable = [row for row in rows if row["stable"]]
    lowest = min((row["extrapolated"] for row in stable), default=None)
    return max((row["learning_rate"] for row in stable if row["extrapolated"] <= lowest + tolerance), default=None)


def best_rate(rows):
    """Where a parabola through the lowest extrapolated loss and its two neighbours, over log rate, is lowest.

    Rates are tried in steps; this is what lies between them. At an end of the stable rates the rate there: the best one
    may lie beyond. None if none is stable.
    """
    rows = sorted((row for row in rows if row["stable"]), key=lambda row: row["learning_rate"])
    if not rows:
        return None
    lowest = min(range(len(rows)), key=lambda i: rows[i]["extrapolated"])
    rate = rows[lowest]["learning_rate"]
    if not 0 < lowest < len(rows) - 1:
        return rate
    near = rows[lowest - 1 : lowest + 2]
    x, y = np.log([row["learning_rate"] / rate for row in near]), [row["extrapolated"] for row in near]
    curvature, slope, _ = np.polyfit(x, y, 2)
    return rate * math.exp(-slope / (2 * curvature))


def fit_rate_against_size(parameters, rates):
    """(c, e) of rate = c * parameters^e, a line through the logarithms. Raises ValueError for fewer than two sizes."""
    if len(set(parameters)) < 2:
        raise ValueError("the rate's dependence on size needs models of at least two sizes")
    exponent, constant = np.polyfit(np.log(parameters), np.log(rates), 1)
    return float(np.exp(constant)), float(exponent)


def choose_rates(root, settings, seeds, tokens, tolerance):
    """(rows, choices, laws): a choice for each size and variant; a law of the best rate for each variant in two sizes.

    From three sizes on a law is tested: fitted without the largest model, it predicts that one's best rate.
    """
    rows, choices, laws = rate_rows(root, settings, seeds, tokens), [], []
    for size, variant in dict.fromkeys((row["size"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["variant"]) == (size, variant)]
        rates = dict(learning_rate=choose_rate(mine, tolerance), best=best_rate(mine))
        choices.append(dict(variant=variant, size=size, **rates, parameters=mine[0]["parameters"]))
    for variant in dict.fromkeys(choice["variant"] for choice in choices):
        known = [choice for choice in choices if choice["variant"] == variant and choice["best"]]
        known.sort(key=lambda choice: choice["parameters"])
        parameters, rates = ([choice[name] for choice in known] for name in ("parameters", "best"))
        if len(set(parameters)) < 2:
            continue
        constant, exponent = fit_rate_against_size(parameters, rates)
        law = dict(variant=variant, constant=constant, exponent=exponent, sizes=[choice["size"] for choice in known])
        if len(set(parameters[:-1])) > 1:
            c, e = fit_rate_against_size(parameters[:-1], rates[:-1])
            law["test"] = dict(constant=c, exponent=e, predicted=c * parameters[-1] ** e, found=rates[-1])
        laws.append(law)
    return rows, choices, laws


def rates_markdown(rows, choices, laws):
    chosen, cells = [(choice["size"], choice["variant"], choice["learning_rate"]) for choice in choices], []
    for row in rows:
        mark = "**chosen**" if (row["size"], row["variant"], row["learning_rate"]) in chosen else ""
        mark = mark if row["stable"] else "unstable"
        loss, ahead = mean_and_std(row["losses"].values())[0], (row["extrapolated"], ".4f", row["extrapolated_std"])
        lost = f"{row['diverged']} of {row['n'] + row['diverged']}"
        cells.append([row["variant"], row["size"] or "", f"{row['learning_rate']:g}"])
        cells[-1] += [number(loss, ".4f"), number(*ahead), str(row["spikes"]), lost, mark]
    heads = ["variant", "size", "rate", "validation loss", "extrapolated", "spikes", "diverged", ""]
    lines, cells = [*table(heads, cells)], []
    for choice in choices:
        rate = number(choice["learning_rate"], "g") or "none is stable: try smaller ones"
        size, parameters = choice["size"] or "", f"{choice['parameters']:,}"
        cells.append([choice["variant"], size, parameters, rate, number(choice["best"], ".2g")])
    heads = ["chosen: largest stable rate near the lowest loss", "lowest extrapolated loss, between rates"]
    lines += ["", *table(["variant", "size", "parameters", *heads], cells)]
    power = lambda law: f"{law['constant']:.3g} * parameters^{law['exponent']:.2f}"
    cells = []
    for law in laws:
        test = law.get("test")
        tested = [power(test), f"{test['predicted']:.2g}", f"{test['found']:.2g}"] if test else ["", "", ""]
        cells.append([law["variant"], power(law), *tested])
    if laws:
        heads = ["variant", "best rate", "without the largest size", "prediction for it", "found"]
        lines += ["", *table(heads, cells)]
    return "\n".join(lines)


def read_rates(path):
    """{(size, variant): rate} from a rates.json. Raises ValueError for a file that is none."""
    try:
        choices = json.loads(path.read_text())["choices"]
        return {(choice["size"], choice["variant"]): choice["learning_rate"] for choice in choices}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file that --choose_rates wrote ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: what is drawn is what the .json beside the picture holds


def write_picture(path, data, draw):
    """Write path.json and, where matplotlib is installed, path.png: draw(pyplot, data) returns a figure."""
    Path(f"{path}.json").write_text(json.dumps(data) + "\n")
    print(save_picture(f"{path}.png", lambda plt: draw(plt, data)))


def line_style(variant):
    """A colour for each variant; broken lines for fewer cached heads, and for one number per head."""
    name, _, cached = variant.partition("@")
    name, _, compose = name.partition(":")
    return dict(color=f"C{[*variants()].index(name)}", ls={"": "-", "1": ":"}.get(cached or compose, "--"), lw=1.5)


def title(size):
    return f"{'width ' * size.isdecimal()}{size}: " if size else ""


def curves(root, outcomes, seeds):
    """{size: {variant: {tokens, losses}}}: validation losses by seed; of several rates, the one that ended lowest."""
    data = {}
    for row in sorted((row for row in outcomes.values() if row["n"]), key=lambda row: row["mean"], reverse=True):
        folders = Setting(row["variant"], row["learning_rate"], row["size"]).folders(root, seeds)
        runs = {seed: [line for line in read_lines(folders[seed]) if "val_loss" in line] for seed in row["losses"]}
        tokens = [line["tokens"] for line in next(iter(runs.values()))]
        losses = {seed: [line["val_loss"] for line in lines] for seed, lines in runs.items()}
        lines = data.setdefault(row["size"] or "", {})
        lines[row["variant"]] = dict(learning_rate=row["learning_rate"], tokens=tokens, losses=losses)
    return data


def draw_curves(plt, data):
    """Left the losses; right, where MHA is there, the differences to it, paired by seed, with their range."""
    both = any("mha" in lines and len(lines) > 1 for lines in data.values())
    size = (6 + 5 * both, 4 * len(data))
    figure, axes = plt.subplots(len(data), 1 + both, figsize=size, layout="constrained", squeeze=False)
    for (left, *right), (size, lines) in zip(axes, data.items()):
        mha = lines.get("mha", dict(tokens=[], losses={}))
        for i, (name, runs) in enumerate(lines.items()):
            x = np.array(runs["tokens"]) / 1e6
            rate = f", rate {runs['learning_rate']:g}" if runs["learning_rate"] else ""
            label = f"{name}{rate} (n = {len(runs['losses'])})"
            left.plot(x, np.mean([*runs["losses"].values()], axis=0), label=label, **line_style(name))
            same = mha["losses"] if runs["tokens"] == mha["tokens"] else {}
            paired = [np.subtract(losses, same[seed]) for seed, losses in runs["losses"].items() if seed in same]
            if right and paired:
                mean = np.mean(paired, axis=0)
                reach = mean - np.min(paired, axis=0), np.max(paired, axis=0) - mean
                beside = x + 0.05 * (x[-1] / len(x)) * i  # bars side by side
                right[0].errorbar(beside, mean, reach, elinewidth=0.8, capsize=2, **line_style(name))
        left.set(ylabel="validation loss (nats per token)", title=f"{title(size)}mean over seeds")
        left.legend(fontsize=9)
        if right:
            right[0].set(ylabel="minus MHA, same seed", title="difference to MHA: mean and range over seeds")
        for ax in (left, *right):
            ax.set(xlabel="training tokens (millions)")
            ax.grid(alpha=0.3)
    return figure


def sensitivity(outcomes):
    """{size: {variant: [{learning_rate, losses, unstable}, ..]}}, by rate; `unstable` counts spikes and lost runs."""
    data = {}
    for row in sorted(outcomes.values(), key=lambda row: row["learning_rate"]):
        point = dict(learning_rate=row["learning_rate"], losses=[*row["losses"].values()])
        point["unstable"] = row["spikes"] + row["diverged"]
        data.setdefault(row["size"] or "", {}).setdefault(row["variant"], []).append(point)
    return data


def draw_sensitivity(plt, data):
    """Final loss against rate: mean line, range over seeds, each seed a dot. Up to 1 nat above the lowest."""
    figure, axes = plt.subplots(1, len(data), figsize=(7 * len(data), 4.5), layout="constrained", squeeze=False)
    for ax, (size, lines) in zip(axes[0], data.items()):
        every = [point for points in lines.values() for point in points if point["losses"]]
        for name, points in lines.items():
            style = line_style(name)
            points = [point for point in points if point["losses"]]
            x, losses = [point["learning_rate"] for point in points], [point["losses"] for point in points]
            ax.plot(x, [*map(statistics.mean, losses)], label=name, **style)
            ax.fill_between(x, [*map(min, losses)], [*map(max, losses)], color=style["color"], alpha=0.15, lw=0)
            for point in points:
                face = "white" if point["unstable"] else style["color"]
                rates = [point["learning_rate"]] * len(point["losses"])
                ax.plot(rates, point["losses"], "o", ms=4, color=style["color"], mfc=face)
        lowest = min((min(point["losses"]) for point in every), default=0)
        ax.set_ylim(top=min(ax.get_ylim()[1], lowest + 1))
        ax.set_xscale("log")
        rates = sorted({point["learning_rate"] for point in every})
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        ax.minorticks_off()
        ax.set(xlabel="learning rate", ylabel="validation loss at the end (nats per token)")
        ax.set_title(f"{title(size)}open dots: loss spikes or a lost run")
        ax.legend(fontsize=9)
        ax.grid(alpha=0.3)
    return figure


def draw_compositions(plt, data, columns=6):
    """W - I (where h' = h) of every layer, keys above values, at up to `columns` steps."""
    which = sorted({round(i) for i in np.linspace(0, len(data["step"]) - 1, columns)})
    shown = {name: np.array(data[name])[which] for name in ("compose_k", "compose_v")}  # (columns, layers, Hc, H)
    square = all(w.shape[-1] == w.shape[-2] for w in shown.values())
    shown = {name: w - np.eye(w.shape[-1]) if square else w for name, w in shown.items()}
    layers, limit = shown["compose_k"].shape[1], max(float(np.abs(w).max()) for w in shown.values()) or 1
    size = (1.5 * len(which) + 1.6, 3 * layers + 0.6)
    figure, axes = plt.subplots(2 * layers, len(which), figsize=size, layout="constrained", squeeze=False)
    for row, column in np.ndindex(axes.shape):
        ax, (kind, name) = axes[row, column], [("keys", "compose_k"), ("values", "compose_v")][row % 2]
        image = ax.imshow(shown[name][column, row // 2], cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set(xticks=[], yticks=[])
        if row == 0:
            ax.set_title(f"step {data['step'][which[column]]}", fontsize=10)
        if column == 0:
            ax.set_ylabel(f"layer {row // 2}, {kind}", fontsize=9)
    label = "learned composition" + (" minus identity" if square else "")
    figure.colorbar(image, ax=axes, shrink=min(1, 1.5 / layers), label=label)
    figure.suptitle(f"{data['run']}: component heads (rows) to composite heads (columns)", fontsize=11)
    return figure


def draw_runs(root, results, outcomes, seeds):
    """All pictures that the finished runs allow: <results>-curves, -sensitivity and -<run>-compositions."""
    rows = [row for row in outcomes.values() if row["n"]]
    if rows:
        write_picture(f"{results}-curves", curves(root, outcomes, seeds), draw_curves)
    if len({(row["variant"], row["size"]) for row in outcomes.values()}) < len(outcomes):  # several rates of one
        write_picture(f"{results}-sensitivity", sensitivity(outcomes), draw_sensitivity)
    for row in rows:
        folder = Setting(row["variant"], row["learning_rate"], row["size"]).folders(root, 1)[0]
        if data := compositions(folder):
            write_picture(f"{results}-{folder.name}-compositions", data, draw_compositions)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--variants", default=DEFAULT, help="variants with commas between them (default: %(default)s)")
    add("--sizes", default="", help="presets (tiny,small) or widths in heads of 16 channels (32,64,128): all of them")
    add("--learning_rates", default="", help="e.g. 1e-3,3e-3: every variant at each of them")
    add("--choose_rates", action="store_true", help="runs with --schedule constant; from them a rate for each variant")
    add("--extrapolate_to", type=float, default=0, help="tokens at which rates are ranked (default: 10 times a run's)")
    add("--tolerance", type=float, default=0.02, help="how close to the lowest extrapolated loss a larger rate may be")
    add("--rates_from", default="", help="a rates.json of --choose_rates: every variant at its own rate")
    add("--seeds", type=int, default=3, help="seeds 0, 1, .. of each (default 3)")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    add("--snapshots", action="store_true", help="keep MEA's compositions of every checkpoint, and draw them")
    add("--out_dir", default="", help="where the run folders go (default out/sweep, or out/rates for --choose_rates)")
    add(
        "--results",
        default="",
        help="name of the .json and .md (default: by the kind of sweep, in experiments/results)",
    )
    return parser.parse_known_args(argv)


def plan(a, rest):
    """(settings, runs, folder of the runs, results) of a command, checked before anything is written, or ValueError."""
    names, sizes = a.variants.split(","), a.sizes.split(",") if a.sizes else [None]
    if not 1 <= a.seeds <= 24 or a.jobs < 1:
        raise ValueError(f"seeds must be from 1 to 24 and jobs at least 1, not {a.seeds} and {a.jobs}")
    if not a.tolerance >= 0 or not 0 <= a.extrapolate_to < math.inf:
        raise ValueError(f"tolerance and extrapolate_to must be at least 0, not {a.tolerance} and {a.extrapolate_to}")
    try:
        rates = sorted({float(text) for text in a.learning_rates.split(",")}) if a.learning_rates else [None]
    except ValueError:
        raise ValueError(f"learning_rates {a.learning_rates!r} are not numbers with commas between them") from None
    if a.choose_rates and (a.rates_from or len(rates) < 2):
        raise ValueError("choose_rates needs several --learning_rates to choose from, and no --rates_from")
    if a.rates_from and a.learning_rates:
        raise ValueError("the rates are those of --rates_from or those of --learning_rates: give one of them")
    settings = [Setting(name, rate, size) for size in sizes for name in names for rate in rates]
    if a.rates_from:
        own = read_rates(ROOT / a.rates_from)
        settings = [Setting(s.variant, own.get((s.size, s.variant)), s.size) for s in settings]
        if missing := [s.name for s in settings if not s.learning_rate]:
            how = "leave it out, or choose again from smaller rates"
            raise ValueError(f"{a.rates_from} has no stable rate for {', '.join(missing)}: {how}")
    ours = {word.removeprefix("--") for s in settings for word in s.options(0) if word.startswith("--")}
    ours |= {"head_norm", "resume", "overwrite"} | ({"schedule"} if a.choose_rates else set())
    _, given = parse_options(train.Options, rest, train.PRESETS)
    if clash := sorted(given & ours):
        raise ValueError(f"{', '.join(clash)} is what this sweep sets itself: leave it out")
    rest = [*rest, *(["--schedule", "constant"] if a.choose_rates else [])]
    if a.jobs > 1 and "threads" not in given:
        rest += ["--threads", str(max(1, os.cpu_count() // a.jobs))]
    root = ROOT / (a.out_dir or ("out/rates" if a.choose_rates else "out/sweep"))
    runs = {s.folders(root, a.seeds)[seed]: s.options(seed) + rest for seed in range(a.seeds) for s in settings}
    for folder, options in runs.items():
        o = check_run(folder, options)
        if a.choose_rates and o.max_steps - o.warmup_steps < 10:
            few = f"{o.max_steps} steps with {o.warmup_steps} of warm-up are too few"
            raise ValueError(f"choose_rates fits what comes after the warm-up: {few}")
    kinds = dict(rates=a.choose_rates, own_rates=a.rates_from, learning_rates=a.learning_rates, losses=True)
    name = next(kind for kind, given in kinds.items() if given)
    return settings, runs, root, ROOT / (a.results or f"experiments/results/{name}")


def write(results, how, text, **content):
    results.parent.mkdir(parents=True, exist_ok=True)
    content = dict(command=how, machine=machine(), **content)
    results.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    results.with_suffix(".md").write_text(f"`{how}` ({machine()})\n\n{text}\n")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    a, rest = parse(argv)
    try:
        settings, runs, root, results = plan(a, rest)
    except ValueError as error:
        fail(error)
    how = command("sweep.py", argv)

    def tabulate():
        rows = summary(root, settings, a.seeds, own_rates=bool(a.rates_from))
        if a.choose_rates:
            tried, choices, laws = choose_rates(root, settings, a.seeds, a.extrapolate_to, a.tolerance)
            content = dict(tolerance=a.tolerance, choices=choices, laws=laws, rows=tried)
            write(results, how, rates_markdown(tried, choices, laws), **content)
        else:
            write(results, how, markdown(rows), table=rows)
        return rows

    def stop(number, _):
        print("\nstopped: the same command goes on", file=sys.stderr)
        raise SystemExit(128 + number)

    stopping = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    stopping = {number for number in stopping if signal.getsignal(number) is not signal.SIG_IGN}  # nohup ignores one
    handlers = {number: signal.signal(number, stop) for number in stopping}
    try:
        run_all(runs, a.jobs, tabulate, a.snapshots)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    rows = tabulate()
    print(results.with_suffix(".md").read_text())
    draw_runs(root, results, rows, a.seeds)


if __name__ == "__main__":
    run_program(main)
