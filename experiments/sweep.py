"""The variants against each other: one `train.py` run for each of them and each seed, and a table of where they end.

    python experiments/sweep.py                                     # every variant, 3 seeds, the default preset
    python experiments/sweep.py --variants mha,mea,mea-norm,mea:diagonal,mea@2 --seeds 5 --jobs 2

A variant is a name of attention.ATTENTION or of family.py; `+norm` or `-norm` behind it is the opposite of its own
default, `:diagonal` lets MEA learn one number per head, and `@2` caches 2 heads. Each variant at a learning rate of its
own, chosen as the paper does (section 5.1.2, appendix D) from short runs whose rate is constant after the warm-up; then
full runs at those rates:

    python experiments/sweep.py --choose_rates --learning_rates 1e-3,3e-3,6e-3,1e-2,3e-2
    python experiments/sweep.py --rates_from experiments/results/rates.json

The same with a model so small that 300 steps take 20 s of one core stands in experiments/results/laptop/, where each
table begins with its command; experiments/LOG.md says what to make of it.

Every run has its own folder under --out_dir. Finished runs are kept, interrupted ones go on, so the command can be
repeated until it is done; stopped (Ctrl-C, SIGTERM), it has its runs save and stop. The table is of the finished runs.
Options of train.py go to every run. Results are tables (.json, .md) and, with matplotlib, pictures (.png), each
with its numbers in a .json beside it.
"""

import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import RESULTS, ROOT, command, finish_axes, program, read_metrics, write_results
from experiments.report import mean_and_std, number, sign_flip_p, table
from options import fail, option, parse_options, run_program, save_picture, shown_command, split_list

import numpy as np

import train
from attention import ATTENTION
from checkpoint import load_checkpoint
from experiments.family import FAMILY
from model import GPTConfig, build_config
from runs import CHANGEABLE


@dataclass
class Options(train.Options):  # those go to every run
    variants: str = option("mha,mha+norm,mea-norm,mea,dfa,tha", "with commas between them; default: the paper's")
    learning_rates: str = option("", "e.g. 1e-3,3e-3: every variant at each of them")
    choose_rates: bool = option(False, "runs with --schedule constant; from them a rate for each variant")
    extrapolate_to: float = option(0.0, "tokens at which rates are ranked; 0 for 10 times a run's", least=0)
    tolerance: float = option(0.02, "how close to the lowest extrapolated loss a larger rate may be", least=0)
    rates_from: str = option("", "a rates.json of --choose_rates: every variant at its own rate")
    seeds: int = option(3, "seeds 0, 1, .. of each", least=1, most=24)
    jobs: int = option(1, "runs at a time, which share the cores", least=1)
    snapshots: bool = option(False, "keep MEA's compositions of every checkpoint, and draw them")
    out_dir: str = option("", "where the run folders go (default: out/sweep, or out/rates for --choose_rates)")
    results: str = option("", "name of the .json and .md (default: by the kind of sweep, in experiments/results)")


def passed_on(o, given):
    """What a command says for train.py."""
    names = given & train.Options.__dataclass_fields__.keys() - {"out_dir"}
    return [f"--{name}={getattr(o, name)}" for name in sorted(names)]


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
    known, found = variants(), re.fullmatch(r"([^:@]+)(:diagonal)?(?:@(\d+))?", variant)
    if not found or found[1] not in known:
        how = "with :diagonal for one number per head, with @n for n cached heads"
        raise ValueError(f"no variant {variant}: choose from {', '.join(known)}, {how}")
    compose = ["--compose", "diagonal"] if found[2] else []
    return [*known[found[1]], *compose, *(["--n_kv_head", found[3]] if found[3] else [])]


@dataclass(frozen=True)
class Setting:
    """What the runs of one row share, all but the seed. None leaves it to train.py."""

    variant: str
    learning_rate: float | None = None

    @property
    def name(self):
        rate = f"lr{self.learning_rate:g}" if self.learning_rate else None
        return "-".join(filter(None, [self.variant, rate]))

    def options(self, seed):
        rate = ["--learning_rate", f"{self.learning_rate:g}"] if self.learning_rate else []
        return [*variant_options(self.variant), *rate, "--seed", str(seed)]

    def folders(self, root, seeds):
        return [root / f"{self.name}-seed{seed}" for seed in range(seeds)]


def start(folder, options):
    """The process of a run, new or resumed; its text goes to a file beside the folder."""
    resumed = (folder / "checkpoint.pt").exists()
    for stale in [] if resumed else folder.glob("compose-*.npz"):
        stale.unlink()
    trainer = "train.py" if FAMILY.keys().isdisjoint(options) else "experiments/family.py"
    command = program(trainer, "--out_dir", folder, *(["--resume"] if resumed else ["--overwrite", *options]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        # A session of its own: Ctrl-C reaches the sweep alone, which tells each run once. Told twice, none saves.
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def read_config(folder, part):
    """The `options` a run was started with, or its `model`; {} if it has not begun."""
    path = folder / "config.json"
    return json.loads(path.read_text())[part] if path.exists() else {}


def finished(folder):
    """The last line of a run's metrics if the run is done, otherwise None."""
    line = (read_metrics(folder) or [{}])[-1]
    return line if "val_loss" in line and line["step"] == read_config(folder, "options").get("max_steps") else None


def diverged(folder):
    """Whether a run was stopped by a loss that is not finite; resumed, it would be again."""
    log = Path(f"{folder}.log")
    return folder.exists() and log.exists() and "stopped before the update" in log.read_text(errors="replace")[-1000:]


def check_run(folder, options):
    """ValueError for options that train.py would refuse, or a folder with another run; else the options read."""
    o, _ = parse_options(train.Options, options, train.PRESETS)
    wanted, saved = vars(o) | asdict(build_config(o)), read_config(folder, "options")
    wanted["window"] = o.window or wanted["block_size"]
    free = CHANGEABLE - {"max_steps", "data_dir", "eval_data", "teacher"} | {"vocab_size"}
    for name in sorted(saved.keys() & wanted.keys() - free):
        if saved[name] != wanted[name]:
            other = f"a run with {name} {saved[name]}, not {wanted[name]}"
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
                    raise SystemExit(
                        f"error: {shown_command(*process.args)} ended with {process.returncode}: see {folder}.log"
                    )
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
        matrices = {"compose_k": [], "compose_v": []}
        for layer in model.layers:
            for name in matrices:
                if (w := getattr(layer.self_attn, name, None)) is not None:
                    w = w.detach().numpy()
                    matrices[name].append(np.diag(w) if w.ndim == 1 else w)  # --compose diagonal learns no more
        if matrices["compose_k"]:
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


def loss_spikes(losses):
    """How many losses stand 6 standard deviations above their running mean (both exponential, over 50 steps)."""
    count, mean, variance = 0, 0.0, 0.0
    for seen, loss in enumerate(losses):
        limit = mean + 6 * math.sqrt(variance)
        if seen >= 20:
            count += loss > limit
            loss = min(loss, limit)  # a spike must not widen the band that the next one is measured by
        weight = max(1 / (seen + 1), 0.02)
        delta = loss - mean
        mean += weight * delta
        variance = (1 - weight) * (variance + weight * delta * delta)
    return count


def outcome(root, setting, seeds):
    """(a row of counts and losses, {seed: last line of its metrics}) of a setting's finished runs."""
    folders = setting.folders(root, seeds)
    ends = {seed: line for seed, folder in enumerate(folders) if (line := finished(folder))}
    lost = sum(seed not in ends and diverged(folder) for seed, folder in enumerate(folders))
    losses = {seed: line["val_loss"] for seed, line in ends.items()}
    spikes = sum(loss_spikes(line["train_loss"] for line in read_metrics(folders[seed])) for seed in ends)
    return dict(asdict(setting), n=len(ends), diverged=lost, spikes=spikes, losses=losses), ends


def summary(root, settings, seeds, own_rates=False):
    """{name: {mean, std, n, minus_mha, p, ...}} of the finished runs; differences are paired by seed.

    MHA is the one of the same rate, unless each variant has its own.
    """
    rows, outcomes = {}, {setting: outcome(root, setting, seeds) for setting in settings}
    for setting, (row, ends) in outcomes.items():
        plain = replace(setting, variant="mha")
        if own_rates:
            plain = next((s for s in settings if s.variant == "mha"), plain)
        mha = outcomes[plain][0]["losses"] if plain in outcomes and plain != setting else {}
        paired = [loss - mha[seed] for seed, loss in row["losses"].items() if seed in mha]
        row["mean"], row["std"] = mean_and_std(row["losses"].values())
        row["bpb"], _ = mean_and_std(line["val_bpb"] for line in ends.values())
        row["minus_mha"], row["minus_mha_std"] = mean_and_std(paired)
        row["p"] = sign_flip_p(paired) if len(paired) > 1 else None
        if row["n"] or row["diverged"]:
            rows[setting.variant if own_rates else setting.name] = row
    return rows


def markdown(outcomes):
    """The lines of the table."""
    heads = ["variant", "rate", "validation loss", "bits per byte", "minus MHA, same seed", "p", "spikes", "seeds"]
    cells = []
    for name, row in outcomes.items():
        losses = number(row["mean"], ".4f", row["std"]), number(row["bpb"], ".4f")
        versus = number(row["minus_mha"], "+.4f", row["minus_mha_std"]), number(row["p"], ".3g")
        seeds = f"{row['n']} and {row['diverged']} diverged" if row["diverged"] else str(row["n"])
        cells.append([name, number(row["learning_rate"], "g"), *losses, *versus, str(row["spikes"]), seeds])
    yield from table(heads, cells)
    if counts := sorted({row["n"] for row in outcomes.values() if row["p"] is not None}):
        smallest = ", ".join(f"{2 / 2**n:.2g} with {n} seeds" for n in counts)
        yield from ["", "Mean ± standard deviation over seeds. p: exact sign-flip test of the paired differences,"]
        yield f"which cannot be below {smallest}."


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


def fit_power_law(tokens, losses):
    """dict(alpha, D_c, L_0) of L(D) = (D_c / D)^alpha + L_0, the paper's law of a loss curve (section 5.1.2).

    Variable projection: at a given alpha the law is linear in the amplitude (D_c / D_last)^alpha and in L_0, both at
    least 0, so only alpha is searched, on a grid from 0.02 to 2. Points far off the curve, as of a spike, count less
    (Huber's weights).
    """
    x, y = np.log(np.asarray(tokens, float) / tokens[-1]), np.asarray(losses, float)
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
        warmup = {seed: read_config(folders[seed], "options")["warmup_steps"] for seed in ends}
        row["fits"] = [fit_power_law(*smoothed_curve(read_metrics(folders[seed]), warmup[seed])) for seed in ends]
        row["tokens"] = tokens or max((10 * line["tokens"] for line in ends.values()), default=None)
        ahead = [power_law(fit, row["tokens"]) for fit in row["fits"]]
        row["extrapolated"], row["extrapolated_std"] = mean_and_std(ahead)
        row["stable"] = not row["diverged"] and not row["spikes"]
        rows.append(row)
    return rows


def choose_rate(rows, tolerance):
    """The largest stable rate whose extrapolated loss is within `tolerance` of the lowest stable one, or None.

    The paper found the best rate of every variant to be its largest stable one: a large tolerance takes that for a
    rule.
    """
    stable = [row for row in rows if row["stable"]]
    lowest = min((row["extrapolated"] for row in stable), default=None)
    return max((row["learning_rate"] for row in stable if row["extrapolated"] <= lowest + tolerance), default=None)


def choose_rates(root, settings, seeds, tokens, tolerance):
    """(rows, choices): the rate of each variant."""
    rows = rate_rows(root, settings, seeds, tokens)
    of = lambda variant: [row for row in rows if row["variant"] == variant]
    variants = dict.fromkeys(row["variant"] for row in rows)
    return rows, [dict(variant=name, learning_rate=choose_rate(of(name), tolerance)) for name in variants]


def rates_markdown(rows, choices):
    """The lines of two tables: every rate, and the rate chosen for each variant."""
    chosen, cells = [(choice["variant"], choice["learning_rate"]) for choice in choices], []
    for row in rows:
        mark = "**chosen**" if (row["variant"], row["learning_rate"]) in chosen else ""
        loss, _ = mean_and_std(row["losses"].values())
        losses = number(loss, ".4f"), number(row["extrapolated"], ".4f", row["extrapolated_std"])
        lost = f"{row['diverged']} of {row['n'] + row['diverged']}"
        named = row["variant"], f"{row['learning_rate']:g}"
        cells.append([*named, *losses, str(row["spikes"]), lost, mark if row["stable"] else "unstable"])
    yield from table(["variant", "rate", "validation loss", "extrapolated", "spikes", "diverged", ""], cells)
    rates = [number(choice["learning_rate"], "g") or "none is stable: try smaller ones" for choice in choices]
    heads = ["variant", "chosen: largest stable rate near the lowest loss"]
    yield from ["", *table(heads, [[choice["variant"], rate] for choice, rate in zip(choices, rates)])]


def read_rates(path):
    """{variant: rate} from a rates.json. Raises ValueError for a file that is none."""
    try:
        choices = json.loads(path.read_text())["choices"]
        return {choice["variant"]: choice["learning_rate"] for choice in choices}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a file that --choose_rates wrote ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: what is drawn is what the .json beside the picture holds


def write_picture(path, data, draw):
    """Write path.json and, where matplotlib is installed, path.png: draw(pyplot, data) returns a figure."""
    Path(f"{path}.json").write_text(json.dumps(data) + "\n")
    print(save_picture(f"{path}.png", lambda plt: draw(plt, data)))


def line_style(variant):
    """A colour for each variant; broken lines for fewer cached heads, and for one number per head."""
    name, *marks = re.split("[:@]", variant)
    style = ":" if "1" in marks else "--" if marks else "-"
    return dict(color=f"C{[*variants()].index(name)}", ls=style, lw=1.5)


def curves(root, outcomes, seeds):
    """{variant: {tokens, losses}}: validation losses by seed; of several rates, the one that ended lowest."""
    data = {}
    for row in sorted((row for row in outcomes.values() if row["n"]), key=lambda row: row["mean"], reverse=True):
        folders = Setting(row["variant"], row["learning_rate"]).folders(root, seeds)
        runs = {seed: [line for line in read_metrics(folders[seed]) if "val_loss" in line] for seed in row["losses"]}
        tokens = [line["tokens"] for line in next(iter(runs.values()))]
        losses = {seed: [line["val_loss"] for line in lines] for seed, lines in runs.items()}
        data[row["variant"]] = dict(learning_rate=row["learning_rate"], tokens=tokens, losses=losses)
    return data


def draw_curves(plt, data):
    """Left the losses; right, where MHA is there, the differences to it, paired by seed, with their range."""
    both = "mha" in data and len(data) > 1
    figure, axes = plt.subplots(1, 1 + both, figsize=(6 + 5 * both, 4), layout="constrained", squeeze=False)
    left, *right = axes[0]
    mha = data["mha"]["losses"] if "mha" in data else {}
    for i, (name, runs) in enumerate(data.items()):
        x, style = np.array(runs["tokens"]) / 1e6, line_style(name)
        rate = f", rate {runs['learning_rate']:g}" if runs["learning_rate"] else ""
        left.plot(
            x, np.mean([*runs["losses"].values()], axis=0), label=f"{name}{rate} (n = {len(runs['losses'])})", **style
        )
        paired = [np.subtract(losses, mha[seed]) for seed, losses in runs["losses"].items() if seed in mha]
        if right and paired:
            mean = np.mean(paired, axis=0)
            reach = mean - np.min(paired, axis=0), np.max(paired, axis=0) - mean
            beside = x + 0.05 * (x[-1] / len(x)) * i  # bars side by side
            right[0].errorbar(beside, mean, reach, elinewidth=0.8, capsize=2, **style)
    x = "training tokens (millions)"
    finish_axes(left, xlabel=x, ylabel="validation loss (nats per token)", title="mean over seeds")
    for ax in right:
        ax.set(xlabel=x, ylabel="minus MHA, same seed", title="difference to MHA: mean and range over seeds")
        ax.grid(alpha=0.3)
    return figure


def sensitivity(outcomes):
    """{variant: [{learning_rate, losses, unstable}, ..]}, by rate; `unstable` counts spikes and lost runs."""
    data = {}
    for row in sorted(outcomes.values(), key=lambda row: row["learning_rate"]):
        point = dict(learning_rate=row["learning_rate"], losses=[*row["losses"].values()])
        point["unstable"] = row["spikes"] + row["diverged"]
        data.setdefault(row["variant"], []).append(point)
    return data


def draw_sensitivity(plt, data):
    """Final loss against rate: mean line, range over seeds, each seed a dot. Up to 1 nat above the lowest."""
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    data = {name: [point for point in points if point["losses"]] for name, points in data.items()}
    for name, points in data.items():
        style = line_style(name)
        x, losses = [point["learning_rate"] for point in points], [point["losses"] for point in points]
        ax.plot(x, [*map(statistics.mean, losses)], label=name, **style)
        ax.fill_between(x, [*map(min, losses)], [*map(max, losses)], color=style["color"], alpha=0.15, lw=0)
        for point in points:
            face = "white" if point["unstable"] else style["color"]
            rates = [point["learning_rate"]] * len(point["losses"])
            ax.plot(rates, point["losses"], "o", ms=4, color=style["color"], mfc=face)
    lowest = min((min(point["losses"]) for points in data.values() for point in points), default=0)
    ax.set_ylim(top=min(ax.get_ylim()[1], lowest + 1))
    ax.set_xscale("log")
    rates = sorted({point["learning_rate"] for points in data.values() for point in points})
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    y = "validation loss at the end (nats per token)"
    finish_axes(ax, xlabel="learning rate", ylabel=y, title="open dots: loss spikes or a lost run")
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
    for (row, column), ax in np.ndenumerate(axes):
        kind, name = [("keys", "compose_k"), ("values", "compose_v")][row % 2]
        image = ax.imshow(shown[name][column, row // 2], cmap="RdBu", vmin=-limit, vmax=limit)
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
    if len({row["variant"] for row in outcomes.values()}) < len(outcomes):  # several rates of one
        write_picture(f"{results}-sensitivity", sensitivity(outcomes), draw_sensitivity)
    for row in rows:
        folder = Setting(row["variant"], row["learning_rate"]).folders(root, 1)[0]
        if data := compositions(folder):
            write_picture(f"{results}-{folder.name}-compositions", data, draw_compositions)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def plan(o, given):
    """([settings], {folder: options of train.py}, folder of the runs) of a command. Raises ValueError."""
    try:
        rates = sorted({float(text) for text in split_list(o.learning_rates)}) or [None]
    except ValueError:
        raise ValueError(f"learning_rates {o.learning_rates!r} are not numbers with commas between them") from None
    if o.choose_rates and (o.rates_from or len(rates) < 2):
        raise ValueError("choose_rates needs several --learning_rates to choose from, and no --rates_from")
    if o.rates_from and o.learning_rates:
        raise ValueError("the rates are those of --rates_from or those of --learning_rates: give one of them")
    settings = [Setting(name, rate) for name in split_list(o.variants) for rate in rates]
    if o.rates_from:
        own = read_rates(ROOT / o.rates_from)
        settings = [replace(s, learning_rate=own.get(s.variant)) for s in settings]
        if missing := [s.name for s in settings if not s.learning_rate]:
            how = "leave it out, or choose again from smaller rates"
            raise ValueError(f"{o.rates_from} has no stable rate for {', '.join(missing)}: {how}")
    rest, ours = passed_on(o, given), {"head_norm", "resume", "overwrite", "teacher"}  # a KL is no loss to compare
    ours |= {word[2:] for s in settings for word in s.options(0) if word.startswith("--")}
    if o.choose_rates:
        rest, ours = [*rest, "--schedule=constant"], ours | {"schedule"}
    if clash := sorted(given & ours):
        raise ValueError(f"{', '.join(clash)} is what this sweep sets itself: leave it out")
    if o.jobs > 1 and "threads" not in given:
        rest.append(f"--threads={max(1, os.cpu_count() // o.jobs)}")
    root = ROOT / (o.out_dir or ("out/rates" if o.choose_rates else "out/sweep"))
    runs = {s.folders(root, o.seeds)[seed]: s.options(seed) + rest for seed in range(o.seeds) for s in settings}
    for folder, options in runs.items():
        run = check_run(folder, options)
        if o.choose_rates and run.max_steps - run.warmup_steps < 10:
            few = f"{run.max_steps} steps with {run.warmup_steps} of warm-up are too few"
            raise ValueError(f"choose_rates fits what comes after the warm-up: {few}")
    return settings, runs, root


def main(argv=None):
    o, given = parse_options(Options, argv, train.PRESETS)
    try:
        settings, runs, root = plan(o, given)
    except ValueError as error:
        fail(error)
    kinds = dict(rates=o.choose_rates, own_rates=o.rates_from, learning_rates=o.learning_rates, losses=True)
    results = ROOT / o.results if o.results else RESULTS / next(kind for kind, chosen in kinds.items() if chosen)
    how = command("sweep.py", argv)

    def tabulate():
        rows = summary(root, settings, o.seeds, own_rates=bool(o.rates_from))
        if o.choose_rates:
            tried, choices = choose_rates(root, settings, o.seeds, o.extrapolate_to, o.tolerance)
            content = dict(tolerance=o.tolerance, choices=choices, rows=tried)
            write_results(results, how, rates_markdown(tried, choices), **content)
        else:
            write_results(results, how, markdown(rows), table=rows)
        return rows

    run_all(runs, o.jobs, tabulate, o.snapshots)
    rows = tabulate()
    print(results.with_suffix(".md").read_text())
    draw_runs(root, results, rows, o.seeds)


def stop(signal_number, _):
    print("\nstopped: the same command goes on", file=sys.stderr)
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        which = getattr(signal, name, None)  # Windows has no SIGHUP
        if which and signal.getsignal(which) is not signal.SIG_IGN:  # nohup ignores one
            signal.signal(which, stop)
    run_program(main)
