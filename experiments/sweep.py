"""The variants against each other: one `train.py` run for each of them and each seed, and a table of where they end.

    python experiments/sweep.py                                     # every variant, 3 seeds, the default preset
    python experiments/sweep.py --variants mha,mea --seeds 5 --jobs 2

Every run has its own folder under --out_dir. Finished runs are kept, interrupted ones go on, so the command can be
repeated until it is done; the table is of the runs that are finished. Options it does not know go to train.py.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

VARIANTS = {
    "mha": ["--attention", "mha"],
    "mha+norm": ["--attention", "mha", "--head_norm", "yes"],
    "mea-norm": ["--attention", "mea", "--head_norm", "no"],
    "mea": ["--attention", "mea"],
    "dfa": ["--attention", "dfa"],
    "tha": ["--attention", "tha"],
}


def finished(folder):
    """The last line of a run's metrics if the run is done, otherwise None."""
    try:
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        steps = json.loads((folder / "config.json").read_text())["options"]["max_steps"]
    except (OSError, ValueError, IndexError, KeyError):
        return None
    return line if line.get("step") == steps and "val_loss" in line else None


def train(folder, options):
    """Run or go on with one training run; its text goes to a file beside its folder."""
    command = [sys.executable, str(ROOT / "train.py"), "--out_dir", str(folder)]
    command += ["--resume"] if (folder / "checkpoint.pt").exists() else ["--overwrite", *options]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".log"), "a") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"error: {' '.join(command)} ended with {code}: see {folder}.log")


def summary(root, variants, seeds):
    """{variant: {mean, std, n, minus_mha, ...}} of the finished runs; differences are paired by seed."""
    losses = {}
    for name in variants:
        lines = {seed: finished(root / f"{name}-seed{seed}") for seed in range(seeds)}
        losses[name] = {seed: (line["val_loss"], line["val_bpb"], line["loss_spikes"]) for seed, line in lines.items() if line}
    table = {}
    for name, runs in losses.items():
        if not runs:
            continue
        values = [loss for loss, _, _ in runs.values()]
        paired = [loss - losses["mha"][seed][0] for seed, (loss, _, _) in runs.items() if seed in losses.get("mha", {})]
        table[name] = dict(
            n=len(values), mean=statistics.mean(values), std=statistics.stdev(values) if len(values) > 1 else None,
            bpb=statistics.mean(bpb for _, bpb, _ in runs.values()), spikes=sum(spikes for _, _, spikes in runs.values()),
            minus_mha=statistics.mean(paired) if paired else None, losses={seed: loss for seed, (loss, _, _) in runs.items()},
        )  # fmt: skip
    return table


def markdown(table):
    rows = ["| variant | validation loss | bits per byte | minus MHA, same seed | spikes | seeds |", "|---|---|---|---|---|---|"]
    for name, row in table.items():
        spread = f" ± {row['std']:.4f}" if row["std"] is not None else ""
        difference = f"{row['minus_mha']:+.4f}" if row["minus_mha"] is not None and name != "mha" else ""
        rows.append(f"| {name} | {row['mean']:.4f}{spread} | {row['bpb']:.4f} | {difference} | {row['spikes']} | {row['n']} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, .. of each (default 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--out_dir", default="out/sweep", help="where the run folders go (default out/sweep)")
    parser.add_argument("--results", default="experiments/results/losses", help="name of the .json and .md to write")
    arguments, rest = parser.parse_known_args()
    variants = arguments.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"no variant {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    if arguments.seeds < 1 or arguments.jobs < 1:
        parser.error("seeds and jobs must be at least 1")
    root, results = (ROOT / path for path in (arguments.out_dir, arguments.results))
    runs = [(root / f"{name}-seed{seed}", [*VARIANTS[name], "--seed", str(seed), *rest]) for seed in range(arguments.seeds) for name in variants]
    waiting = [run for run in runs if not finished(run[0])]
    began, done = time.monotonic(), 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in pool.map(lambda run: train(*run), waiting):
            done += 1
            left = (time.monotonic() - began) / done * (len(waiting) - done) / 60
            print(f"{len(runs) - len(waiting) + done}/{len(runs)} runs, ETA {left:.0f} min", flush=True)
            write(root, results, variants, arguments.seeds)
    write(root, results, variants, arguments.seeds)
    print(results.with_suffix(".md").read_text())


def write(root, results, variants, seeds):
    table = summary(root, variants, seeds)
    command = "python experiments/sweep.py " + " ".join(sys.argv[1:])
    results.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()} CPU, Python {platform.python_version()}"
    results.with_suffix(".json").write_text(json.dumps(dict(command=command, machine=machine, table=table), indent=2) + "\n")
    results.with_suffix(".md").write_text(f"`{command.strip()}` ({machine})\n\n{markdown(table)}\n")


if __name__ == "__main__":
    main()
