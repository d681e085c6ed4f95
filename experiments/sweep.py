"""The variants against each other: one `train.py` run for each of them and each seed, and a table of where they end.

    python experiments/sweep.py                                     # every variant, 3 seeds, the default preset
    python experiments/sweep.py --variants mha,mea --seeds 5 --jobs 2

Each variant at a learning rate of its own, chosen as the paper does (section 5.1.2, appendix D) from short runs whose rate is
constant after the warm-up; then full runs at those rates:

    python experiments/sweep.py --choose_rates --learning_rates 1e-3,3e-3,6e-3,1e-2,3e-2
    python experiments/sweep.py --rates_from experiments/results/rates.json

The same for a laptop, with a model so small that 300 steps take 20 s of one core (Talking-Heads: 30 s). What came of it is committed in
experiments/results/laptop/, where each table begins with its command, and experiments/LOG.md says what to make of it.

    LAPTOP="--preset tiny --n_embd 64 --block_size 128 --batch_size 16 --warmup_steps 50 --eval_every 50 --save_every 50 --eval_windows 64 --jobs 2"
    RESULTS=experiments/results/laptop
    python experiments/sweep.py --choose_rates --learning_rates 1e-3,3e-3,6e-3,1.2e-2,2.5e-2,5e-2,1e-1 --max_steps 300 --extrapolate_to 614400 \\
        --results $RESULTS/rates $LAPTOP                                                   # a run sees 614,400 tokens: nothing is extrapolated
    python experiments/sweep.py --rates_from $RESULTS/rates.json --max_steps 600 --snapshots --results $RESULTS/own_rates $LAPTOP

The data of the tables bytes and cpp-docs there (the second is about 16 million tokens, so that long runs meet none twice):

    python data/prepare.py --source python --tokenizer byte --out_dir data/python-byte
    git clone --depth 1 https://github.com/MicrosoftDocs/cpp-docs ../cpp-docs
    python data/prepare.py --source ../cpp-docs/docs --tokenizer bpe --vocab_size 2048 --out_dir data/cpp-docs

Every run has its own folder under --out_dir. Finished runs are kept, interrupted ones go on, so the command can be
repeated until it is done; stopped (Ctrl-C, SIGTERM), it has its runs save and stop. The table is of the runs that are finished.
Options it does not know go to train.py. The further a curve is extrapolated, the more the noise in it counts: look at the
spread over seeds in rates.md. Results are tables (.json, .md) and, with matplotlib, pictures (.png), each with its numbers in
a .json beside it.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import model as gpt
import train
from model import GPT, GPTConfig, load_checkpoint, parse_options

VARIANTS = {
    "mha": ["--attention", "mha"],
    "mha+norm": ["--attention", "mha", "--head_norm", "yes"],
    "mea-norm": ["--attention", "mea", "--head_norm", "no"],
    "mea": ["--attention", "mea"],
    "dfa": ["--attention", "dfa"],
    "dfa-norm": ["--attention", "dfa", "--head_norm", "no"],
    "tha": ["--attention", "tha"],
    "tha+norm": ["--attention", "tha", "--head_norm", "yes"],
}
DEFAULT = "mha,mha+norm,mea-norm,mea,dfa,tha"  # what the paper compares

# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Setting:
    """What the runs of one row share, all but the seed. None leaves it to train.py.

    variant: one of VARIANTS, or one with `@n`: with n key/value heads cached. size: a preset, or a width: that many channels, in heads of 16.
    """

    variant: str
    rate: float | None = None
    size: str | None = None

    @property
    def name(self):
        return "-".join([self.variant, *([self.size] if self.size else []), *([f"lr{self.rate:g}"] if self.rate else [])])

    def options(self, seed):
        variant, _, cached = self.variant.partition("@")
        cached = ["--n_kv_head", cached] if cached else []
        rate = ["--learning_rate", f"{self.rate:g}"] if self.rate else []
        return [*VARIANTS[variant], *cached, *size_options(self.size), *rate, "--seed", str(seed)]


def size_options(size):
    """What train.py is told about a size. Raises ValueError for what is neither a preset nor a width."""
    if not size or size in train.PRESETS:
        return ["--preset", size] if size else []
    if not size.isdecimal() or int(size) % 16 or not int(size):
        raise ValueError(f"size {size!r} is neither a preset ({', '.join(train.PRESETS)}) nor a width, a multiple of 16")
    return ["--n_embd", size, "--n_head", str(int(size) // 16)]


@dataclass(frozen=True)
class Run:
    folder: Path
    options: list  # for train.py
    steps: int
    warmup_steps: int
    save_every: int
    step_flops: float

    def start(self):
        """The process of the run, new or resumed; its text goes to a file beside the folder."""
        command = [sys.executable, str(ROOT / "train.py"), "--out_dir", str(self.folder)]
        if (self.folder / "checkpoint.pt").exists():
            command += ["--resume"]
        else:
            command += ["--overwrite", *self.options]
            (self.folder / "compose.npz").unlink(missing_ok=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.folder}.log", "a") as log:
            # In a session of its own: Ctrl-C reaches the sweep alone, which tells its runs once; told twice, they would not save.
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def steps_left(self):
        """As the run stands now, or will when it is resumed from its last regular checkpoint."""
        if finished(self.folder) or diverged(self.folder):
            return 0
        lines = read_lines(self.folder) if (self.folder / "checkpoint.pt").exists() else []
        return self.steps - (lines[-1]["step"] // self.save_every * self.save_every if lines else 0)


def read_lines(folder):
    """The lines of a run's metrics; none if it has not begun. The last one may be half-written: it is left out."""
    lines = []
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            lines.append(json.loads(line))
    return lines


def read_options(folder):
    """The options a run was started with, or {}."""
    try:
        return json.loads((folder / "config.json").read_text())["options"]
    except (OSError, ValueError, KeyError):
        return {}


def finished(folder):
    """The last line of a run's metrics if the run is done, otherwise None."""
    lines = read_lines(folder)
    return lines[-1] if lines and lines[-1]["step"] == read_options(folder).get("max_steps") and "val_loss" in lines[-1] else None


def diverged(folder):
    """Whether a run was stopped by a loss that is not finite; resumed, it would be again."""
    try:
        return folder.exists() and "stopped before the update" in Path(f"{folder}.log").read_text(errors="replace")[-1000:]
    except OSError:
        return False


def planned(setting, seed, root, rest):
    """The Run of a setting and seed. Raises ValueError for options that train.py would refuse, or a folder with another run."""
    options, folder = [*setting.options(seed), *rest], root / f"{setting.name}-seed{seed}"
    o, _ = parse_options(train.Options, options, train.PRESETS)
    train.check_options(o)
    shape = {name: getattr(o, name) for name in GPTConfig.__dataclass_fields__ if getattr(o, name, None) is not None}
    config = GPTConfig(vocab_size=256, **shape)
    saved = read_options(folder)
    for name in sorted(saved.keys() & vars(o).keys() - (train.CHANGEABLE - {"max_steps"})):
        if saved[name] != getattr(o, name):
            raise ValueError(f"{folder} holds a run with {name} {saved[name]}, not {getattr(o, name)}: give another --out_dir, or remove it")
    flops = config.flops_per_token() * o.batch_size * o.grad_accum * config.block_size
    return Run(folder, options, o.max_steps, o.warmup_steps, o.save_every, flops)


def run_all(runs, jobs, at_end, snapshots=False):
    """Run what is not finished, `jobs` at a time, and call `at_end` after each. Time is foretold from FLOPs done since the start.

    A run that fails, other than by diverging, ends the sweep: SystemExit. However it ends, no run is left going: they save and stop.
    """
    waiting = [run for run in runs if run.steps_left()]
    flops_left = lambda: sum(run.step_flops * run.steps_left() for run in waiting)
    queue, going, first, began, shown = [*waiting], [], flops_left(), time.monotonic(), 0
    try:
        while queue or going:
            while queue and len(going) < jobs:
                run = queue.pop(0)
                going.append((run, run.start()))
            time.sleep(0.2)
            ended = [pair for pair in going if pair[1].poll() is not None]
            for run, _ in going if snapshots else []:  # those that ended, too: their last checkpoint is there now
                snapshot(run.folder)
            for run, process in ended:
                going.remove((run, process))
                if process.returncode and not diverged(run.folder):
                    raise SystemExit(f"error: {' '.join(process.args)} ended with {process.returncode}: see {run.folder}.log")
                at_end()
            if ended or time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(progress(len(runs), sum(run.steps_left() > 0 for run in waiting), shown - began, first, flops_left()), flush=True)
    finally:
        for _, process in going:
            process.terminate()
        for _, process in going:
            process.wait()


def progress(runs, runs_left, seconds, work, work_left):
    """The line that says how far a sweep is, `work` and `work_left` being what there was to do at its start and is now."""
    eta = f"ETA {seconds / (work - work_left) * work_left / 60:.0f} min" if work_left < work else "ETA unknown yet"
    return f"{runs - runs_left}/{runs} runs, {eta}"


def snapshot(folder):
    """Add the HLC matrices of an MEA run's newest checkpoint to its compose.npz, unless they are there."""
    file, checkpoint = folder / "compose.npz", folder / "checkpoint.pt"
    if not checkpoint.exists() or read_options(folder).get("attention") != "mea":
        return
    written = checkpoint.stat().st_mtime_ns  # the snapshot takes over its checkpoint's time
    if file.exists() and file.stat().st_mtime_ns == written:
        return
    now = compositions([checkpoint])
    if file.exists():
        with np.load(file) as past:
            kept = past["step"] < now["step"][0]
            now = {name: np.concatenate([past[name][kept], now[name]]) for name in now}
    with open(folder / "compose.tmp", "wb") as new:
        np.savez(new, **now)
    os.utime(folder / "compose.tmp", ns=(written, written))
    os.replace(folder / "compose.tmp", file)


def compositions(checkpoints):
    """dict(step (n), compose_k (n, layers, Hc, H), compose_v (n, layers, Hc, H)) of n checkpoints."""
    collected = dict(step=[], compose_k=[], compose_v=[])
    for model, state in map(load_checkpoint, checkpoints):
        collected["step"].append(state["step"])
        for name in ("compose_k", "compose_v"):
            collected[name].append(torch.stack([getattr(layer.self_attn, name).detach() for layer in model.layers]).numpy())
    return {name: np.array(values) for name, values in collected.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def sign_flip_p(differences):
    """Two-sided p-value of the mean of paired differences: the exact sign-flip test.

    If the two sides were the same, each difference could as well have had the other sign: p is the share of the 2^n choices of
    signs whose mean is at least as far from 0. No distribution is assumed. p cannot be below 2 / 2^n, so 3 seeds cannot show
    anything at the 5 % level, and 6 can. Raises ValueError for none, or more than 24, differences.
    """
    if not 1 <= len(differences) <= 24:
        raise ValueError(f"the sign-flip test takes 1 to 24 differences, not {len(differences)}")
    sums = np.array([abs(differences[0])])  # flipping all signs changes nothing, so the first may be fixed
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) * (1 - 1e-9)))


def summary(root, settings, seeds, own_rates=False):
    """{name: {mean, std, n, minus_mha, p, ...}} of the finished runs; differences are paired by seed.

    MHA is the one of the same size and, unless each variant has its own, the same rate.
    """
    folders = {setting: [root / f"{setting.name}-seed{seed}" for seed in range(seeds)] for setting in settings}
    lines = {setting: {seed: line for seed, folder in enumerate(folders[setting]) if (line := finished(folder))} for setting in settings}
    table = {}
    for setting, runs in lines.items():
        lost = sum(seed not in runs and diverged(folder) for seed, folder in enumerate(folders[setting]))
        if not runs and not lost:
            continue
        same = [other for other in settings if (other.variant, other.size) == ("mha", setting.size) and (own_rates or other.rate == setting.rate)]
        mha = lines[same[0]] if same else {}
        values = [line["val_loss"] for line in runs.values()]
        paired = [line["val_loss"] - mha[seed]["val_loss"] for seed, line in runs.items() if seed in mha]
        name = setting.variant if own_rates and not setting.size else setting.name
        table[name] = dict(
            variant=setting.variant, size=setting.size, learning_rate=setting.rate, n=len(values), diverged=lost,
            mean=statistics.mean(values) if values else None, std=statistics.stdev(values) if len(values) > 1 else None,
            bpb=statistics.mean(line["val_bpb"] for line in runs.values()) if runs else None,
            spikes=sum(line["loss_spikes"] for line in runs.values()), minus_mha=statistics.mean(paired) if paired else None,
            minus_mha_std=statistics.stdev(paired) if len(paired) > 1 else None,
            p=sign_flip_p(paired) if len(paired) > 1 and setting.variant != "mha" else None,
            losses={seed: line["val_loss"] for seed, line in runs.items()},
        )  # fmt: skip
    return table


def markdown(table):
    rates = any(row["learning_rate"] for row in table.values())
    rows = [f"| variant |{' rate |' if rates else ''} validation loss | bits per byte | minus MHA, same seed | p | spikes | seeds |", "|---|---|---|---|---|---|---|" + "---|" * rates]
    for name, row in table.items():
        cells = [name, *([number(row["learning_rate"], "g")] if rates else []), number(row["mean"], ".4f", row["std"]), number(row["bpb"], ".4f")]
        cells += [number(row["minus_mha"], "+.4f", row["minus_mha_std"]) if row["variant"] != "mha" else "", number(row["p"], ".3g"), str(row["spikes"])]
        seeds = f"{row['n']} and {row['diverged']} diverged" if row["diverged"] else str(row["n"])
        rows.append(f"| {' | '.join([*cells, seeds])} |")
    counts = sorted({row["n"] for row in table.values() if row["p"] is not None})
    if counts:
        smallest = ", ".join(f"{2 / 2**n:.2g} with {n} seeds" for n in counts)
        rows += ["", f"Mean ± standard deviation over seeds. p: exact sign-flip test of the paired differences, which cannot be below {smallest}."]
    return "\n".join(rows)


def number(value, form, std=None):
    return ("" if value is None else f"{value:{form}}") + ("" if std is None else f" ± {std:.4f}")


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


def fit_power_law(tokens, losses):
    """dict(alpha, D_c, L_0) of L(D) = (D_c / D)^alpha + L_0, the paper's law of a loss curve (section 5.1.2). Robust least squares.

    At a given alpha the law is linear in the amplitude (D_c / D_last)^alpha and in L_0, both at least 0, so only alpha is searched,
    between 0.02 and 2: a grid, then finer ones around its best. Points far off the curve, as of a spike, count less (Huber's
    weights). Raises ValueError for fewer than 4 points.
    """
    x, y = np.log(np.asarray(tokens, float) / tokens[-1]), np.asarray(losses, float)
    if len(y) < 4:
        raise ValueError(f"a loss curve of {len(y)} points is too short to fit: 4 are needed")

    def project(alphas, w):
        """Amplitude, L_0 and weighted squared error for each alpha."""
        basis = np.exp(-np.outer(alphas, x))  # (alphas, points)
        w = w / w.sum()
        centred, mean = basis - (basis @ w)[:, None], y @ w
        amplitude = np.maximum(centred @ (w * (y - mean)) / (centred**2 @ w), 0)
        floor = mean - amplitude * (basis @ w)
        amplitude = np.where(floor < 0, basis @ (w * y) / (basis**2 @ w), amplitude)
        floor = np.maximum(floor, 0)
        return amplitude, floor, (amplitude[:, None] * basis + floor[:, None] - y) ** 2 @ w

    weights = np.ones(len(y))
    for _ in range(10):
        alphas = np.geomspace(0.02, 2, 41)
        for _ in range(5):
            amplitude, floor, error = project(alphas, weights)
            best = int(error.argmin())
            found = alphas[best], amplitude[best], floor[best]
            alphas = np.linspace(alphas[max(best - 1, 0)], alphas[min(best + 1, len(alphas) - 1)], 21)
        off = np.abs(found[1] * np.exp(-found[0] * x) + found[2] - y)
        weights = 1 / np.maximum(1, off / (1.345 * 1.4826 * np.median(off) + 1e-12))
    alpha, amplitude, floor = map(float, found)
    return dict(alpha=alpha, D_c=float(tokens[-1]) * amplitude ** (1 / alpha), L_0=floor)


def power_law(fit, tokens):
    """The loss that a fit foretells at a number of tokens."""
    return (fit["D_c"] / tokens) ** fit["alpha"] + fit["L_0"]


def smoothed_curve(lines, warmup_steps, points=50):
    """(tokens, training loss) of a run after its warm-up, each the mean over one of up to `points` equal stretches.

    The training loss: there is one at every step, no batch was seen before, and runs with one seed see the same batches.
    """
    after = np.array([(line["tokens"], line["train_loss"]) for line in lines if line["step"] > warmup_steps])
    return np.array([part.mean(0) for part in np.array_split(after, min(points, len(after)))]).T


def rate_rows(root, settings, seeds, tokens=None):
    """A dict for each setting whose runs are all done: spikes, losses, fits and the mean loss extrapolated to `tokens`.

    Stable: every seed finished, and none had a loss spike. `tokens` is by default ten times what a run saw, as in the paper.
    """
    rows = []
    for setting in settings:
        folders = [root / f"{setting.name}-seed{seed}" for seed in range(seeds)]
        lost = sum(map(diverged, folders))
        ends = [end for folder in folders if (end := finished(folder))]
        if len(ends) + lost < seeds:
            continue
        fits = [fit_power_law(*smoothed_curve(read_lines(f), read_options(f)["warmup_steps"])) for f in folders if finished(f)]
        at = tokens or (10 * ends[0]["tokens"] if ends else None)
        ahead = [power_law(fit, at) for fit in fits]
        config = json.loads((folders[0] / "config.json").read_text())["model"]
        rows.append(dict(
            variant=setting.variant, size=setting.size, learning_rate=setting.rate, n=len(ends), diverged=lost, parameters=count_parameters(config),
            spikes=sum(end["loss_spikes"] for end in ends), stable=not lost and not any(end["loss_spikes"] for end in ends),
            losses=[end["val_loss"] for end in ends], fits=fits, tokens=at,
            extrapolated=statistics.mean(ahead) if ahead else None, extrapolated_std=statistics.stdev(ahead) if len(ahead) > 1 else None,
        ))  # fmt: skip
    return rows


def choose_rate(rows, tolerance):
    """The row with the largest stable rate whose extrapolated loss is within `tolerance` of the lowest stable one; None if none is stable.

    The paper found the best rate of every variant to be its largest stable one: an infinite tolerance takes that for a rule.
    """
    stable = [row for row in rows if row["stable"]]
    lowest = min((row["extrapolated"] for row in stable), default=None)
    return max((row for row in stable if row["extrapolated"] <= lowest + tolerance), key=lambda row: row["learning_rate"], default=None)


def best_rate(rows):
    """Where a parabola through the lowest extrapolated loss and its two neighbours, over the logarithm of the rate, is lowest.

    Rates are tried in steps; this is what lies between them. At an end of the stable rates the rate there: the best one may lie
    beyond. None if none is stable.
    """
    rows = sorted((row for row in rows if row["stable"]), key=lambda row: row["learning_rate"])
    if not rows:
        return None
    lowest = min(range(len(rows)), key=lambda i: rows[i]["extrapolated"])
    if not 0 < lowest < len(rows) - 1:
        return rows[lowest]["learning_rate"]
    near = rows[lowest - 1 : lowest + 2]
    curvature, slope, _ = np.polyfit(np.log([row["learning_rate"] / rows[lowest]["learning_rate"] for row in near]), [row["extrapolated"] for row in near], 2)
    return rows[lowest]["learning_rate"] * math.exp(-slope / (2 * curvature))


def fit_rate_against_size(parameters, rates):
    """(c, e) of rate = c * parameters^e: a line through the logarithms. Raises ValueError unless there are two sizes."""
    if len(set(parameters)) < 2:
        raise ValueError("the rate's dependence on size needs models of at least two sizes")
    exponent, constant = np.polyfit(np.log(parameters), np.log(rates), 1)
    return float(np.exp(constant)), float(exponent)


def count_parameters(config):
    """Parameters of the model in a run's config.json."""
    with torch.device("meta"):
        return GPT(GPTConfig(**config)).n_params()


def choose_rates(root, settings, seeds, tokens, tolerance):
    """(rows, choices, laws): a choice for each size and variant; a law of the best rate for each variant that ran in two sizes or more.

    From three sizes on a law is put to a test: fitted without the largest model, it foretells that one's best rate.
    """
    rows, choices, laws = rate_rows(root, settings, seeds, tokens), [], []
    for size, variant in dict.fromkeys((row["size"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["variant"]) == (size, variant)]
        chosen = choose_rate(mine, tolerance)
        choices.append(dict(
            variant=variant, size=size, learning_rate=chosen and chosen["learning_rate"], best=best_rate(mine), parameters=mine[0]["parameters"],
        ))  # fmt: skip
    for variant in dict.fromkeys(choice["variant"] for choice in choices):
        known = sorted((choice for choice in choices if choice["variant"] == variant and choice["best"]), key=lambda choice: choice["parameters"])
        if len({choice["parameters"] for choice in known}) < 2:
            continue
        parameters, rates = ([choice[name] for choice in known] for name in ("parameters", "best"))
        constant, exponent = fit_rate_against_size(parameters, rates)
        law = dict(variant=variant, constant=constant, exponent=exponent, sizes=[choice["size"] for choice in known])
        if len(set(parameters[:-1])) > 1:
            c, e = fit_rate_against_size(parameters[:-1], rates[:-1])
            law["test"] = dict(constant=c, exponent=e, foretold=c * parameters[-1] ** e, found=rates[-1])
        laws.append(law)
    return rows, choices, laws


def rates_markdown(rows, choices, laws):
    chosen = {(choice["size"], choice["variant"], choice["learning_rate"]) for choice in choices}
    lines = ["| variant | size | rate | validation loss | extrapolated | spikes | diverged | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        word = "**chosen**" if (row["size"], row["variant"], row["learning_rate"]) in chosen else "" if row["stable"] else "unstable"
        loss = number(statistics.mean(row["losses"]) if row["losses"] else None, ".4f")
        lines.append(f"| {row['variant']} | {row['size'] or ''} | {row['learning_rate']:g} | {loss} | {number(row['extrapolated'], '.4f', row['extrapolated_std'])} | {row['spikes']} | {row['diverged']} of {row['n'] + row['diverged']} | {word} |")
    lines += ["", "| variant | size | parameters | chosen: largest stable rate near the lowest loss | lowest extrapolated loss, between rates |", "|---|---|---|---|---|"]
    for choice in choices:
        rate = number(choice["learning_rate"], "g") or "none is stable: try smaller ones"
        lines.append(f"| {choice['variant']} | {choice['size'] or ''} | {choice['parameters']:,} | {rate} | {number(choice['best'], '.2g')} |")
    if laws:
        lines += ["", "| variant | best rate | without the largest size: | foretells for it | found |", "|---|---|---|---|---|"]
    power = lambda law: f"{law['constant']:.3g} * parameters^{law['exponent']:.2f}"
    for law in laws:
        test = law.get("test")
        cells = [power(test), f"{test['foretold']:.2g}", f"{test['found']:.2g}"] if test else ["", "", ""]
        lines.append(f"| {' | '.join([law['variant'], power(law), *cells])} |")
    return "\n".join(lines)


def read_rates(path):
    """{(size, variant): rate} from a rates.json. Raises ValueError for a file that is none."""
    try:
        return {(choice["size"], choice["variant"]): choice["learning_rate"] for choice in json.loads(path.read_text())["choices"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file that --choose_rates wrote ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: what is drawn is what the .json beside the picture holds


def save_picture(path, data, draw):
    """Write path.json and, where matplotlib is installed, path.png: draw(pyplot, data) returns a figure."""
    path.with_name(path.name + ".json").write_text(json.dumps(data) + "\n")
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}.png: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = draw(plt, data)
    figure.savefig(path.with_name(path.name + ".png"), dpi=120)
    plt.close(figure)


def order(variant):
    """Where a variant stands among the others, and the number of heads it caches, -1 for all of them."""
    name, _, cached = variant.partition("@")
    return [*VARIANTS].index(name), -int(cached or 1e9)


def line(variant, **more):
    """How a variant is drawn: a colour for each, broken lines for fewer cached heads."""
    index, cached = order(variant)
    return dict(color=f"C{index}", ls={-1: ":", -2: "--"}.get(cached, "-" if cached < -1e6 else "-."), **more)


def title(size):
    return f"{'width ' * size.isdecimal()}{size}: " if size else ""


def curves(root, table, seeds):
    """{size: {variant: {tokens, losses}}}: validation losses (seeds, evaluations); of several rates, the one that ended lowest."""
    data = {}
    for row in sorted((row for row in table.values() if row["n"]), key=lambda row: row["mean"], reverse=True):
        setting = Setting(row["variant"], row["learning_rate"], row["size"])
        runs = {seed: read_lines(root / f"{setting.name}-seed{seed}") for seed in range(seeds) if seed in row["losses"]}
        runs = {seed: [line for line in lines if "val_loss" in line] for seed, lines in runs.items()}
        data.setdefault(row["size"] or "", {})[row["variant"]] = dict(
            learning_rate=row["learning_rate"], tokens=[line["tokens"] for line in next(iter(runs.values()))],
            losses={seed: [line["val_loss"] for line in lines] for seed, lines in runs.items()},
        )  # fmt: skip
    return {size: dict(sorted(lines.items(), key=lambda line: order(line[0]))) for size, lines in data.items()}


def draw_curves(plt, data):
    """Left the losses; right, where MHA is there, the differences to it, paired by seed, with their range."""
    both = any("mha" in lines and len(lines) > 1 for lines in data.values())
    figure, axes = plt.subplots(len(data), 1 + both, figsize=(6 + 5 * both, 4 * len(data)), layout="constrained", squeeze=False)
    for (left, *right), (size, lines) in zip(axes, data.items()):
        for name, runs in lines.items():
            x = np.array(runs["tokens"]) / 1e6
            label = name + (f", rate {runs['learning_rate']:g}" if runs["learning_rate"] else "") + f" (n = {len(runs['losses'])})"
            left.plot(x, np.mean([*runs["losses"].values()], axis=0), **line(name, lw=1.5, label=label))
            mha = lines.get("mha", dict(tokens=[], losses={}))
            paired = [np.subtract(losses, mha["losses"][seed]) for seed, losses in runs["losses"].items() if seed in mha["losses"] and runs["tokens"] == mha["tokens"]]
            if right and paired:
                mean = np.mean(paired, axis=0)
                beside = x + 0.05 * (x[-1] / len(x)) * order(name)[0]  # bars side by side
                reach = (mean - np.min(paired, axis=0), np.max(paired, axis=0) - mean) if len(paired) > 1 and name != "mha" else None
                right[0].errorbar(beside, mean, reach, **line(name, lw=1.5, elinewidth=0.8, capsize=2))
        left.set(xlabel="training tokens (millions)", ylabel="validation loss (nats per token)", title=f"{title(size)}mean over seeds")
        left.legend(fontsize=9)
        left.grid(alpha=0.3)
        if right:
            right[0].set(xlabel="training tokens (millions)", ylabel="minus MHA, same seed", title="difference to MHA: mean and range over seeds")
            right[0].grid(alpha=0.3)
    return figure


def sensitivity(table):
    """{size: {variant: [{learning_rate, losses, unstable}, ..]}} of rows with a rate: `unstable` counts spikes and lost runs."""
    data = {}
    for row in table:
        losses = [*row["losses"].values()] if isinstance(row["losses"], dict) else row["losses"]
        point = dict(learning_rate=row["learning_rate"], losses=losses, unstable=row["spikes"] + row["diverged"])
        data.setdefault(row["size"] or "", {}).setdefault(row["variant"], []).append(point)
    for lines in data.values():
        for points in lines.values():
            points.sort(key=lambda point: point["learning_rate"])
    return data


def draw_sensitivity(plt, data):
    """Final loss against rate: mean line, range over seeds, each seed a dot. Up to 1 nat above the lowest: beyond is only bad."""
    figure, axes = plt.subplots(1, len(data), figsize=(7 * len(data), 4.5), layout="constrained", squeeze=False)
    for ax, (size, lines) in zip(axes[0], data.items()):
        for name, points in lines.items():
            points = [point for point in points if point["losses"]]
            x = [point["learning_rate"] for point in points]
            ax.plot(x, [statistics.mean(point["losses"]) for point in points], **line(name, lw=1.5, label=name))
            color = line(name)["color"]
            ax.fill_between(x, [min(point["losses"]) for point in points], [max(point["losses"]) for point in points], color=color, alpha=0.15, lw=0)
            for point in points:
                face = "white" if point["unstable"] else color
                ax.plot([point["learning_rate"]] * len(point["losses"]), point["losses"], "o", ms=4, color=color, mfc=face)
        lowest = min((loss for points in lines.values() for point in points for loss in point["losses"]), default=0)
        ax.set_ylim(top=min(ax.get_ylim()[1], lowest + 1))
        rates = sorted({point["learning_rate"] for points in lines.values() for point in points})
        ax.set_xscale("log")
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        ax.minorticks_off()
        ax.set(xlabel="learning rate", ylabel="validation loss at the end (nats per token)", title=f"{title(size)}open dots: loss spikes or a lost run")
        ax.legend(fontsize=9)
        ax.grid(alpha=0.3)
    return figure


def draw_compositions(plt, data, columns=6):
    """W - I (where h' = h) of every layer, keys above values, at up to `columns` steps."""
    which = sorted({round(i) for i in np.linspace(0, len(data["step"]) - 1, columns)})
    matrices = {name: np.array(data[name])[which] for name in ("compose_k", "compose_v")}  # (columns, layers, Hc, H)
    square = matrices["compose_k"].shape[-1] == matrices["compose_k"].shape[-2] == matrices["compose_v"].shape[-2]
    shown = {name: w - np.eye(w.shape[-1]) if square else w for name, w in matrices.items()}
    layers, limit = shown["compose_k"].shape[1], max(float(np.abs(w).max()) for w in shown.values()) or 1
    figure, axes = plt.subplots(2 * layers, len(which), figsize=(1.5 * len(which) + 1.6, 3 * layers + 0.6), layout="constrained", squeeze=False)
    for row, column in np.ndindex(axes.shape):
        ax, name = axes[row, column], "compose_k" if row % 2 == 0 else "compose_v"
        image = ax.imshow(shown[name][column, row // 2], cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_xticks([])
        ax.set_yticks([])
        if row == 0:
            ax.set_title(f"step {data['step'][which[column]]}", fontsize=10)
        if column == 0:
            ax.set_ylabel(f"layer {row // 2}, {'keys' if row % 2 == 0 else 'values'}", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=min(1, 1.5 / layers), label="learned composition" + (" minus identity" if square else ""))
    figure.suptitle(f"{data['run']}: component heads (rows) to composite heads (columns)", fontsize=11)
    return figure


def draw_runs(root, results, table, seeds):
    """All pictures that the finished runs allow: <results>-curves, -rates and -<run>-compositions."""
    rows = [row for row in table.values() if row["n"]]
    if rows:
        save_picture(results.with_name(results.name + "-curves"), curves(root, table, seeds), draw_curves)
    if len({(row["variant"], row["size"]) for row in table.values()}) < len(table):  # several rates of one
        save_picture(results.with_name(results.name + "-sensitivity"), sensitivity([*table.values()]), draw_sensitivity)
    for row in rows:
        folder = root / f"{Setting(row['variant'], row['learning_rate'], row['size']).name}-seed0"
        if row["variant"].startswith("mea") and (folder / "compose.npz").exists():
            with np.load(folder / "compose.npz") as file:
                data = dict(run=folder.name, **{name: file[name].tolist() for name in file.files})
            save_picture(results.with_name(f"{results.name}-{folder.name}-compositions"), data, draw_compositions)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = gpt.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--variants", default=DEFAULT, help=f"of {', '.join(VARIANTS)}; mea@2 caches 2 heads (default: {DEFAULT})")
    parser.add_argument("--sizes", default="", help="every variant in each of these: presets (tiny,small) or widths in heads of 16 channels (32,64,128)")
    parser.add_argument("--learning_rates", default="", help="e.g. 1e-3,3e-3: every variant at each of them")
    parser.add_argument("--choose_rates", action="store_true", help="runs with --schedule constant, and from them a rate for each variant")
    parser.add_argument("--extrapolate_to", type=float, default=0, help="tokens at which --choose_rates ranks (default: 10 times a run's)")
    parser.add_argument("--tolerance", type=float, default=0.02, help="--choose_rates takes the largest stable rate whose extrapolated loss is so close to the lowest (default 0.02)")
    parser.add_argument("--rates_from", default="", help="a rates.json of --choose_rates: every variant at its own rate")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, .. of each (default 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    parser.add_argument("--snapshots", action="store_true", help="keep the HLC matrices of every checkpoint, in compose.npz of its run, and draw them")
    parser.add_argument("--out_dir", default="", help="where the run folders go (default out/sweep, or out/rates for --choose_rates)")
    parser.add_argument("--results", default="", help="name of the .json and .md to write in experiments/results (default losses, or rates, learning_rates, own_rates)")
    return parser.parse_known_args(argv)


def plan(a, rest):
    """(settings, runs, folder of the runs, results) of a command, all checked before anything is written. Raises ValueError for what cannot be."""
    variants, sizes = a.variants.split(","), a.sizes.split(",") if a.sizes else [None]
    for variant in variants:
        name, at, cached = variant.partition("@")
        if name not in VARIANTS or bool(at) != cached.isdecimal():
            raise ValueError(f"no variant {variant}: choose from {', '.join(VARIANTS)}, with @n behind it for n cached heads")
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
    _, given = parse_options(train.Options, rest, train.PRESETS)
    ours = {"attention", "head_norm", "seed", "resume", "overwrite"} | {"n_kv_head" for variant in variants if "@" in variant}
    ours |= {option.removeprefix("--") for size in sizes for option in size_options(size)[::2]}
    ours |= {"learning_rate"} if a.learning_rates or a.rates_from else set()
    if clash := sorted(given & (ours | ({"schedule"} if a.choose_rates else set()))):
        raise ValueError(f"{', '.join(clash)} is what this sweep sets itself: leave it out")
    if a.rates_from:
        own = read_rates(ROOT / a.rates_from)
        missing = [Setting(variant, None, size).name for size in sizes for variant in variants if not own.get((size, variant))]
        if missing:
            raise ValueError(f"{a.rates_from} has no stable rate for {', '.join(missing)}: leave it out, or choose again from smaller rates")
        settings = [Setting(variant, own[size, variant], size) for size in sizes for variant in variants]
    else:
        settings = [Setting(variant, rate, size) for size in sizes for variant in variants for rate in rates]
    rest = [*rest, *(["--schedule", "constant"] if a.choose_rates else [])]
    if a.jobs > 1 and "threads" not in given:
        rest += ["--threads", str(max(1, os.cpu_count() // a.jobs))]
    root = ROOT / (a.out_dir or ("out/rates" if a.choose_rates else "out/sweep"))
    runs = [planned(setting, seed, root, rest) for seed in range(a.seeds) for setting in settings]
    short = [run for run in runs if a.choose_rates and run.steps - run.warmup_steps < 10]
    if short:
        raise ValueError(f"choose_rates fits what comes after the warm-up: {short[0].steps} steps with {short[0].warmup_steps} of warm-up are too few")
    name = "rates" if a.choose_rates else "own_rates" if a.rates_from else "learning_rates" if a.learning_rates else "losses"
    return settings, runs, root, ROOT / (a.results or f"experiments/results/{name}")


def write(results, command, text, **content):
    results.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()} CPU, Python {platform.python_version()}"
    results.with_suffix(".json").write_text(json.dumps(dict(command=command, machine=machine, **content), indent=2) + "\n")
    results.with_suffix(".md").write_text(f"`{command}` ({machine})\n\n{text}\n")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    a, rest = parse(argv)
    try:
        settings, runs, root, results = plan(a, rest)
    except ValueError as error:
        gpt.fail(error)
    command = " ".join(["python experiments/sweep.py", *argv])

    def tabulate():
        table = summary(root, settings, a.seeds, own_rates=bool(a.rates_from))
        if a.choose_rates:
            rows, choices, laws = choose_rates(root, settings, a.seeds, a.extrapolate_to, a.tolerance)
            write(results, command, rates_markdown(rows, choices, laws), tolerance=a.tolerance, choices=choices, laws=laws, rows=rows)
        else:
            write(results, command, markdown(table), table=table)
        return table

    def stop(number, _):
        print("\nstopped: the same command goes on", file=sys.stderr)
        raise SystemExit(128 + number)

    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, stop) for number in stopping if signal.getsignal(number) is not signal.SIG_IGN}  # nohup ignores one
    try:
        run_all(runs, a.jobs, tabulate, a.snapshots)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    draw_runs(root, results, tabulate(), a.seeds)
    print(results.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
