"""Half the cache, by every method and budget: the tables of the report.

    python experiments/compression.py --checkpoints out/sweep/mha-seed0,out/sweep/mea-seed0
    python experiments/compression.py --pretrained FOLDER --data_dir data/prose --other_data_dir data/code

The first runs compress.py on checkpoints of ours, heals, and trains the originals for the same steps. The second
measures a Hugging Face model before any healing, on text like the calibration text and on other text. Finished rows are
kept in experiments/results/, so that the command can be repeated until it is done; experiments/LOG.md names the weights
and the data of the committed tables. Read compress.py first.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT))
from options import fail, option, parse_options, run_program, write_atomically  # before torch

import torch

from checkpoint import from_pretrained
from compress import choose_ranks, compress, probe
from data.dataset import WindowSampler, open_dataset, validation_windows
from experiments.report import command, mean_and_std, number, table
from train import evaluate


class Rows(dict):
    """Named rows in a JSON file, written as they come."""

    def __init__(self, path):
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def fill(self, name, make):
        """The row `name`, made if it is missing."""
        if name not in self:
            self[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(self, indent=1) + "\n")
            print(name, self[name], flush=True)
        return self[name]

    def write_table(self, lines):
        text = "\n".join([f"`{command('compression.py')}`", "", *lines, ""])
        self.path.with_suffix(".md").write_text(text)
        print(text)


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
}


def our_checkpoints(o):
    rows = Rows(RESULTS / "compression.json")
    folders = [Path(folder) for folder in o.checkpoints.split(",")]

    def compressed(folder, name):
        options, heals = OURS[name]
        out = ROOT / o.out_dir / f"{folder.name}-{name.replace(', ', '-').replace(' ', '-')}"
        command = [sys.executable, str(ROOT / "compress.py"), "--checkpoint", str(folder), "--out_dir", str(out)]
        command += [*options.split(), "--overwrite", "--threads", str(o.threads)]
        command += ["--heal_steps", str(o.heal_steps), "--continue_original"] if heals else []
        command += ["--data_dir", o.data_dir] if o.data_dir else []
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((out / "report.json").read_text())
        return {name: report[name] for name in ("loss", "kv_bytes_per_token", "ranks")}

    for folder in folders:
        for name in OURS:
            rows.fill(f"{folder.name} | {name}", lambda: compressed(folder, name))
    cells = []
    for kind in sorted({folder.name.split("-seed")[0] for folder in folders}):
        losses = {
            name: [rows[f"{f.name} | {name}"]["loss"] for f in folders if f.name.split("-seed")[0] == kind]
            for name in OURS
        }
        gains = {name: [loss["after"] - loss["before"] for loss in mine] for name, mine in losses.items()}
        for name, mine in losses.items():
            ratio = statistics.mean(gain / svd for gain, svd in zip(gains[name], gains["svd"]))
            healed = spread([loss["healed"] - loss["continued"] for loss in mine]) if OURS[name][1] else ""
            before = spread([loss["before"] for loss in mine], form=".4f")
            cells.append([kind, name, before, spread(gains[name]), f"{ratio:.3f}", healed, str(len(mine))])
    heads = ["model", "method", "loss, original", "increase before healing", "to svd's"]
    rows.write_table(table([*heads, "after healing, minus the original trained on", "n"], cells))


# ---------------------------------------------------------------------------------------------------------------------
# A pretrained model


def pretrained(o):
    torch.set_num_threads(o.threads)
    rows, T = Rows(RESULTS / f"compression-{Path(o.pretrained).name}.json"), o.block_size
    alike, other = open_dataset(o.data_dir), open_dataset(o.other_data_dir)
    tokens = torch.from_numpy(WindowSampler(alike.train, T, 0).batch(0, o.calibration_windows)[0])
    texts = [validation_windows(data.val, T, o.eval_windows) for data in (alike, other)]
    losses = lambda model: [evaluate(model, windows, 2, torch.device("cpu"), torch.float32) for windows in texts]
    load = lambda: from_pretrained(o.pretrained, block_size=T)

    def compressed(ratio, budget, method, costs=None):
        model, (plain, *without) = load(), method.split(", ")
        data = None if without or plain == "svd" else tokens
        errors = compress(model, choose_ranks(model.config, ratio, budget, costs), plain, data, chunk=2)
        return dict(loss=losses(model), ranks=model.config.n_kv_head, errors=errors)

    def measure_costs():
        few = tuple(part[: o.probe_windows] for part in validation_windows(alike.train, T, 64))  # not the measured text
        costs = probe(load(), "aligned", tokens, few, chunk=2, report=lambda *line: print(*line, flush=True))
        return {f"{layer} {kind}": cost for (layer, kind), cost in costs.items()}

    before = rows.fill("original", lambda: losses(load()))
    for budget in ("all", "middle"):
        for method in ("aligned", "rotated", "calibrated", "svd", "aligned, no calibration"):
            rows.fill(f"{budget} | {method}", lambda: compressed(0.5, budget, method))
    if o.probe_windows:
        costs = rows.fill("probe", measure_costs)
        costs = {(int(layer), kind): cost for key, cost in costs.items() for layer, kind in [key.split()]}
        for ratio in (0.75, 0.5):
            rows.fill(f"probe {ratio} | aligned", lambda: compressed(ratio, "probe", "aligned", costs))
    cells = []
    whole = load().config.n_kv_head
    for name, row in rows.items():
        if "|" in name:
            share = statistics.mean(n for pair in row["ranks"] for n in pair) / whole
            a, b = (after - start for after, start in zip(row["loss"], before))
            cells.append([*name.split(" | "), f"{share:.3f}", f"{a:+.3f} / {b:+.3f}"])
    heads = ["layers", "method", "cache", "increase of the loss, like text / other text"]
    original = (
        f"Original: {before[0]:.4f} / {before[1]:.4f} nats per token on text like the calibration text / other text."
    )
    rows.write_table([original, "", *table(heads, cells)])


@dataclass
class Options:
    checkpoints: str = option("", "run folders with commas between them, named <variant>-seed<n>")
    heal_steps: int = option(35, "steps of healing, a tenth of the small preset's", least=1)
    out_dir: str = option("out/compression", "where compressed models go")
    pretrained: str = option("", "a Hugging Face model")
    data_dir: str = option("", "data set for calibration; for a pretrained model one prepared with its tokenizer")
    other_data_dir: str = option("", "data set of other text, prepared with the pretrained model's tokenizer")
    block_size: int = option(512, "positions of a window", least=2)
    calibration_windows: int = option(16, "windows to calibrate a pretrained model on", least=1)
    eval_windows: int = option(6, "windows to measure it on", least=1)
    probe_windows: int = option(0, "windows that the probe measures on; 0: no probe", least=0)
    threads: int = option(1, "CPU threads", least=1)


def main(argv=None):
    o, _ = parse_options(Options, argv)
    if bool(o.checkpoints) == bool(o.pretrained):
        fail("give --checkpoints or --pretrained")
    if o.pretrained and not (o.data_dir and o.other_data_dir):
        fail("--pretrained needs --data_dir and --other_data_dir")
    try:
        pretrained(o) if o.pretrained else our_checkpoints(o)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        fail(error)


if __name__ == "__main__":
    run_program(main)
