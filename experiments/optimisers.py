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
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from options import OneLineParser, run_program  # before torch

import torch

import train
from experiments.report import command, machine, mean_and_std, number, table
from experiments.sweep import finished
from model import GPT, PRESETS, GPTConfig

RESULTS = ROOT / "experiments/results/optimisers"


def code_blocks(section, language="python", text=None):
    """The fenced code blocks in a section of README.md, e.g. "Your own optimiser"."""
    text = (ROOT / "README.md").read_text() if text is None else text
    body = re.split(r"^## ", text.split(f"\n## {section}\n")[1], flags=re.M)[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", body, flags=re.M | re.S)
    return [code for name, code in blocks if name == language]


def shown_optimizer():
    """The `make_optimizer` of README.md."""
    names = dict(vars(train))
    exec(code_blocks("Your own optimiser")[0], names)
    return names["make_optimizer"]


def run(folder, make_optimizer, rate, seed, rest):
    """Train, or go on training, with another optimiser."""
    train.make_optimizer = make_optimizer
    how = ["--learning_rate", f"{rate:g}", "--seed", str(seed), "--out_dir", str(folder), *rest]
    train.main([*how, "--resume" if (folder / "checkpoint.pt").exists() else "--overwrite"])


def update_ms(make_optimizer):
    """Milliseconds of CPU that an update of the default preset's weights takes: the median of eight, one thread."""
    torch.set_num_threads(1)
    model = GPT(GPTConfig(vocab_size=2048, **PRESETS["small"]))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer, times = make_optimizer(model.parameter_groups(0.1), 1e-3), []
    for _ in range(9):
        began = time.process_time()
        optimizer.step()
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times[1:])  # the first one allocates


def write(losses, times, how):
    """Write the table. `losses`: {(optimiser, rate): {seed: loss}}; differences are to the preset's, by seed."""
    preset = json.loads((RESULTS.parent / "losses.json").read_text())["table"]["mea"]["losses"]
    rows, cells = [], []
    for (optimiser, rate), ends in {("adamw", 6e-3): preset, **losses}.items():
        row = dict(optimiser=optimiser, learning_rate=rate, losses=ends, update_ms=times[optimiser])
        row["mean"], row["std"] = mean_and_std(ends.values())
        paired = [loss - preset[seed] for seed, loss in ends.items()] if ends is not preset else []
        row["minus_adamw"], row["minus_adamw_std"] = mean_and_std(paired)
        rows.append(row)
        loss, minus = (row["mean"], ".4f", row["std"]), (row["minus_adamw"], "+.4f", row["minus_adamw_std"])
        cells.append([optimiser, f"{rate:g}", number(*loss), number(*minus), f"{times[optimiser]:.1f}", str(len(ends))])
    content = dict(command=how, machine=machine(), rows=rows)
    RESULTS.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    heads = ["optimiser", "rate", "validation loss", "minus AdamW at 0.006, same seed", "ms an update", "seeds"]
    note = "Mean ± standard deviation over seeds. AdamW at 0.006 is `losses.json`."
    text = "\n".join(table(heads, cells)) + f"\n\n{note}"
    RESULTS.with_suffix(".md").write_text(f"`{how}` ({machine()})\n\n{text}\n")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    every = "adamw@1.2e-2,muon@6e-3,muon@1.2e-2,muon@2.5e-2"
    parser.add_argument("--runs", default=every, help="optimisers and their rates (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to 2 of each (default 3)")
    parser.add_argument("--out_dir", default="out/optimisers", help="where the run folders go (default %(default)s)")
    o, rest = parser.parse_known_args(argv)
    optimisers = dict(adamw=train.make_optimizer, muon=shown_optimizer())
    runs = [(name, float(rate)) for name, rate in (run.split("@") for run in o.runs.split(","))]
    folder = lambda name, rate, seed: ROOT / o.out_dir / f"{name}-lr{rate:g}-seed{seed}"
    times = {name: update_ms(make) for name, make in optimisers.items()}

    def tabulate():
        ends = {each: {str(seed): finished(folder(*each, seed)) for seed in range(o.seeds)} for each in runs}
        losses = {each: {seed: end["val_loss"] for seed, end in by.items() if end} for each, by in ends.items()}
        write({each: by for each, by in losses.items() if by}, times, command("optimisers.py", argv))

    tabulate()
    for seed in range(o.seeds):
        for name, rate in runs:
            if not finished(folder(name, rate, seed)):
                run(folder(name, rate, seed), optimisers[name], rate, seed, rest)
                tabulate()
    print(RESULTS.with_suffix(".md").read_text())


if __name__ == "__main__":
    run_program(main)
