"""Another optimiser beside AdamW: the one that README.md shows, at the default preset, over a few rates and seeds.

    python experiments/optimisers.py --threads 1

The code under "Your own optimiser" in README.md takes the place of `train.make_optimizer`, as if it stood there. Every
run has a folder under --out_dir; finished ones are kept and interrupted ones go on, so the command can be repeated
until it is done. The table in experiments/results/optimisers.md is of the finished runs. Options that are not below go
to train.py.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from options import OneLineParser, run_program  # before torch

import train
from experiments.report import command, machine, mean_and_std, number, table
from experiments.sweep import finished

RESULTS = ROOT / "experiments/results/optimisers"


def code_blocks(section, language="python", text=None):
    """The fenced code blocks in a section of README.md, e.g. "Your own optimiser"."""
    text = (ROOT / "README.md").read_text() if text is None else text
    body = re.split(r"^## ", text.split(f"\n## {section}\n")[1], flags=re.M)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", body, flags=re.M | re.S)


def shown_optimizer():
    """The `make_optimizer` of README.md."""
    names = dict(vars(train))
    exec(code_blocks("Your own optimiser")[0], names)
    return names["make_optimizer"]


def run(folder, make_optimizer, rate, seed, rest):
    """The last line of a run's metrics, after training if it is not there yet."""
    if not finished(folder):
        train.make_optimizer = make_optimizer
        how = ["--learning_rate", f"{rate:g}", "--seed", str(seed), "--out_dir", str(folder), *rest]
        train.main([*how, "--resume" if (folder / "checkpoint.pt").exists() else "--overwrite"])
    return finished(folder)


def write(ends, how):
    """`ends`: {(optimiser, rate): {seed: last line}}. Differences are paired by seed, to AdamW at its own rate."""
    rows, cells = [], []
    reference = min(
        (key for key in ends if key[0] == "adamw"),
        key=lambda key: mean_and_std(line["val_loss"] for line in ends[key].values())[0],
    )
    for (optimiser, rate), lines in ends.items():
        losses = {seed: line["val_loss"] for seed, line in lines.items()}
        row = dict(optimiser=optimiser, learning_rate=rate, losses=losses)
        row["mean"], row["std"] = mean_and_std(losses.values())
        paired = [loss - ends[reference][seed]["val_loss"] for seed, loss in losses.items() if seed in ends[reference]]
        row["minus_adamw"], row["minus_adamw_std"] = mean_and_std(paired)
        if (optimiser, rate) == reference:
            row["minus_adamw"] = row["minus_adamw_std"] = None
        rows.append(row)
        loss, minus = (row["mean"], ".4f", row["std"]), (row["minus_adamw"], "+.4f", row["minus_adamw_std"])
        cells.append([optimiser, f"{rate:g}", number(*loss), number(*minus), str(len(losses))])
    heads = ["optimiser", "rate", "validation loss", f"minus AdamW at {reference[1]:g}, same seed", "seeds"]
    RESULTS.with_suffix(".json").write_text(
        json.dumps(dict(command=how, machine=machine(), rows=rows), indent=2) + "\n"
    )
    text = "\n".join(table(heads, cells))
    RESULTS.with_suffix(".md").write_text(f"`{how}` ({machine()})\n\n{text}\n\nMean ± standard deviation over seeds.\n")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--learning_rates", default="6e-3,3e-3,1.2e-2", help="of both optimisers (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, .. of each (default 3)")
    parser.add_argument("--out_dir", default="out/optimisers", help="where the run folders go (default %(default)s)")
    o, rest = parser.parse_known_args(argv)
    rates = [float(rate) for rate in o.learning_rates.split(",")]
    optimisers = dict(adamw=train.make_optimizer, muon=shown_optimizer())
    ends = {(name, rate): {} for name in optimisers for rate in rates}
    for seed in range(o.seeds):
        for (name, rate), lines in ends.items():
            lines[seed] = run(ROOT / o.out_dir / f"{name}-lr{rate:g}-seed{seed}", optimisers[name], rate, seed, rest)
            write({key: value for key, value in ends.items() if value}, command("optimisers.py", argv))
    print(RESULTS.with_suffix(".md").read_text())


if __name__ == "__main__":
    run_program(main)
