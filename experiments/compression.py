"""Half the cache, by every method and budget: the tables of the README.

    python experiments/compression.py --checkpoints out/sweep/mha-seed0,out/sweep/mea-seed0
    python experiments/compression.py --pretrained FOLDER --data_dir data/prose --other_data_dir data/code

The first runs compress.py on checkpoints of ours, heals, and trains the originals for the same steps. The second measures a
Hugging Face model before any healing, on text like the calibration text and on other text. Every finished row is kept in
experiments/results/, so that the command can be repeated until it is done. Read compress.py first.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT))


class Rows:
    """A JSON file of named rows, written as they come."""

    def __init__(self, path):
        self.path = path
        self.rows = json.loads(path.read_text()) if path.exists() else {}

    def missing(self, name):
        return name not in self.rows

    def add(self, name, row):
        self.rows[name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps(self.rows, indent=1) + "\n")
        new.replace(self.path)
        print(name, row, flush=True)


# ---- our checkpoints --------------------------------------------------------------------------------------------------------

OURS = {  # row -> options of compress.py
    "svd": ["--method", "svd"],
    "calibrated": ["--method", "calibrated"],
    "rotated": ["--method", "rotated"],
    "aligned, no calibration": ["--method", "aligned", "--calibration_windows", "0"],
    "aligned": ["--method", "aligned"],
    "aligned, probe": ["--method", "aligned", "--budget", "probe"],
}


def our_checkpoints(arguments, rest):
    rows = Rows(RESULTS / "compression.json")
    folders = [Path(folder) for folder in arguments.checkpoints.split(",")]
    for folder in folders:
        for name, options in OURS.items():
            key = f"{folder.name} | {name}"
            if rows.missing(key):
                out = Path(arguments.out_dir) / f"{folder.name}-{name.replace(', ', '-').replace(' ', '-')}"
                heal = ["--heal_steps", str(arguments.heal_steps), "--continue_original"] if name in ("svd", "aligned", "aligned, probe") else []
                command = [sys.executable, str(ROOT / "compress.py"), "--checkpoint", str(folder), "--out_dir", str(out), "--overwrite"]
                subprocess.run([*command, *options, *heal, *rest], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                report = json.loads((out / "report.json").read_text())
                rows.add(key, dict(loss=report["loss"], kv_bytes_per_token=report["kv_bytes_per_token"], ranks=report["ranks"]))
    lines = [f"`python experiments/compression.py {' '.join(sys.argv[1:])}`", "",
             "| model | method | loss, original | increase before healing | to svd's | after healing, minus the original trained on | n |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for kind in sorted({folder.name.split("-seed")[0] for folder in folders}):
        mine = [folder.name for folder in folders if folder.name.split("-seed")[0] == kind]
        gain = lambda folder, name: rows.rows[f"{folder} | {name}"]["loss"]["after"] - rows.rows[f"{folder} | {name}"]["loss"]["before"]
        for name in OURS:
            losses = [rows.rows[f"{folder} | {name}"]["loss"] for folder in mine]
            ratio = statistics.mean(gain(folder, name) / gain(folder, "svd") for folder in mine)
            healed = spread([loss["healed"] - loss["continued"] for loss in losses]) if "healed" in losses[0] else ""
            lines.append(f"| {kind} | {name} | {spread([loss['before'] for loss in losses], sign='')} | {spread([gain(folder, name) for folder in mine])} | {ratio:.3f} | {healed} | {len(mine)} |")
    (RESULTS / "compression.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def spread(values, sign="+"):
    return f"{statistics.mean(values):{sign}.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


# ---- a pretrained model -----------------------------------------------------------------------------------------------------


def pretrained(arguments):
    import torch

    from compress import choose_ranks, compress, probe
    from data.dataset import WindowSampler, open_dataset, validation_windows
    from checkpoint import from_pretrained
    from train import evaluate

    torch.set_num_threads(arguments.threads)
    rows = Rows(RESULTS / f"compression-{Path(arguments.pretrained).name}.json")
    T, cpu = arguments.block_size, torch.device("cpu")
    alike, other = open_dataset(arguments.data_dir), open_dataset(arguments.other_data_dir)
    tokens = torch.from_numpy(WindowSampler(alike.train, T, 0).batch(0, arguments.calibration_windows)[0])
    texts = [validation_windows(data.val, T, arguments.eval_windows) for data in (alike, other)]
    losses = lambda model: [evaluate(model, windows, 2, cpu, torch.float32) for windows in texts]
    load = lambda: from_pretrained(arguments.pretrained, block_size=T)
    if rows.missing("original"):
        rows.add("original", losses(load()))
    for budget in ("all", "middle"):
        for method in ("aligned", "rotated", "calibrated", "svd", "aligned, no calibration"):
            name = f"{budget} | {method}"
            if rows.missing(name):
                model = load()
                plain = method.split(",")[0]
                errors = compress(model, choose_ranks(model.config, 0.5, budget), plain, None if method != plain or plain == "svd" else tokens, chunk=2)
                rows.add(name, dict(loss=losses(model), ranks=model.config.n_kv_head, errors=errors))
    if arguments.probe_windows:
        if rows.missing("probe"):
            few = tuple(part[: arguments.probe_windows] for part in validation_windows(alike.train, T, 64))  # not the measured text
            costs = probe(load(), "aligned", tokens, few, chunk=2, report=lambda *line: print(*line, flush=True))
            rows.add("probe", {f"{layer} {kind}": cost for (layer, kind), cost in costs.items()})
        costs = {(int(key.split()[0]), key.split()[1]): cost for key, cost in rows.rows["probe"].items()}
        for ratio in (0.75, 0.5):
            if rows.missing(f"probe {ratio} | aligned"):
                model = load()
                errors = compress(model, choose_ranks(model.config, ratio, "probe", costs), "aligned", tokens, chunk=2)
                rows.add(f"probe {ratio} | aligned", dict(loss=losses(model), ranks=model.config.n_kv_head, errors=errors))
    before, before_heads = rows.rows["original"], load().config.n_kv_head
    lines = [f"`python experiments/compression.py {' '.join(sys.argv[1:])}`", "",
             f"Original: {before[0]:.4f} / {before[1]:.4f} nats per token on text like the calibration text / on other text.", "",
             "| layers | method | cache | increase of the loss, like text / other text |", "|---|---|---|---|"]  # fmt: skip
    for name, row in rows.rows.items():
        if "|" in name:
            heads = [n for pair in row["ranks"] for n in pair]
            a, b = (after - start for after, start in zip(row["loss"], before))
            lines.append(f"| {name} | {sum(heads) / len(heads) / before_heads:.3f} | {a:+.3f} / {b:+.3f} |")
    rows.path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoints", default="", help="run folders with commas between them, named <variant>-seed<n>; other options go to compress.py")
    parser.add_argument("--heal_steps", type=int, default=35, help="steps of healing (default 35, a tenth of the small preset's)")
    parser.add_argument("--out_dir", default="out/compression", help="where compressed models go (default out/compression)")
    parser.add_argument("--pretrained", default="", help="a Hugging Face folder")
    parser.add_argument("--data_dir", help="data set prepared with its tokenizer, for calibration")
    parser.add_argument("--other_data_dir", help="data set of other text, prepared with its tokenizer")
    parser.add_argument("--block_size", type=int, default=512, help="positions of a window (default 512)")
    parser.add_argument("--calibration_windows", type=int, default=16, help="default 16")
    parser.add_argument("--eval_windows", type=int, default=6, help="default 6")
    parser.add_argument("--probe_windows", type=int, default=0, help="windows that the probe measures on; 0: no probe")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments, rest = parser.parse_known_args()
    if bool(arguments.checkpoints) == bool(arguments.pretrained):
        parser.error("give --checkpoints or --pretrained")
    if arguments.pretrained:
        if rest or not (arguments.data_dir and arguments.other_data_dir):
            parser.error(f"unknown options {' '.join(rest)}" if rest else "--pretrained needs --data_dir and --other_data_dir")
        pretrained(arguments)
    else:
        our_checkpoints(arguments, rest + ([f"--data_dir={arguments.data_dir}"] if arguments.data_dir else []))


if __name__ == "__main__":
    main()
