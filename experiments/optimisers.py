"""Another optimiser beside AdamW: the one that README.md shows, at the default preset, over a few rates and seeds.

    python experiments/optimisers.py --threads 1

The code under "Your own optimiser" in README.md takes the place of `train.make_optimizer`, as if it stood there. Every
run has a folder under --out_dir; finished ones are kept and interrupted ones go on, so the command can be repeated
until it is done. The table in experiments/results/optimisers.md is of the finished runs. Options that are not its own
go to train.py.
"""

import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import RESULTS, ROOT, command, mean_and_std, number, table, write_results
from options import option, parse_options, run_program, split_list

import torch

import train
from experiments.sweep import finished, passed_on
from model import GPT, PRESETS, GPTConfig


@dataclass
class Options(train.Options):
    runs: str = option("adamw@1.2e-2,muon@6e-3,muon@1.2e-2,muon@2.5e-2", "optimisers and their rates")
    seeds: int = option(3, "seeds 0 to 2 of each", least=1, most=3)
    out_dir: str = option("out/optimisers", "where the run folders go")


def code_blocks(section, language="python"):
    """The fenced code blocks in a section of README.md, e.g. "Your own optimiser"."""
    body = re.split(r"^## ", (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1], flags=re.M)[0]
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)^```", body, flags=re.M | re.S) if name == language]


def shown_optimizer():
    """The `make_optimizer` of README.md."""
    names = dict(vars(train))
    exec(code_blocks("Your own optimiser")[0], names)
    return names["make_optimizer"]


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
    preset = json.loads((RESULTS / "losses.json").read_text())["table"]["mea"]["losses"]
    rows, cells = [], []
    for (optimiser, rate), ends in {("adamw", 6e-3): preset, **losses}.items():
        mean, std = mean_and_std(ends.values())
        minus, minus_std = mean_and_std([] if ends is preset else [loss - preset[seed] for seed, loss in ends.items()])
        row = dict(optimiser=optimiser, learning_rate=rate, losses=ends, update_ms=times[optimiser], mean=mean, std=std)
        rows.append(row | dict(minus_adamw=minus, minus_adamw_std=minus_std))
        figures = number(mean, ".4f", std), number(minus, "+.4f", minus_std), f"{times[optimiser]:.1f}"
        cells.append([optimiser, f"{rate:g}", *figures, str(len(ends))])
    heads = ["optimiser", "rate", "validation loss", "minus AdamW at 0.006, same seed", "ms an update", "seeds"]
    note = "Mean ± standard deviation over seeds. AdamW at 0.006 is `losses.json`."
    write_results(RESULTS / "optimisers", how, [*table(heads, cells), "", note], rows=rows)


def main(argv=None):
    o, given = parse_options(Options, argv, train.PRESETS)
    optimisers = dict(adamw=train.make_optimizer, muon=shown_optimizer())
    times = {name: update_ms(make) for name, make in optimisers.items()}
    named = [(name, float(rate)) for name, rate in (run.split("@") for run in split_list(o.runs))]
    runs = {
        (*each, seed): ROOT / o.out_dir / f"{each[0]}-lr{each[1]:g}-seed{seed}"
        for seed in range(o.seeds)
        for each in named
    }

    def tabulate():
        losses = {}
        for (name, rate, seed), folder in runs.items():
            if end := finished(folder):
                losses.setdefault((name, rate), {})[str(seed)] = end["val_loss"]
        write(losses, times, command("optimisers.py", argv))

    for (name, rate, seed), folder in runs.items():
        if not finished(folder):
            train.make_optimizer = optimisers[name]
            how = ["--learning_rate", f"{rate:g}", "--seed", str(seed), "--out_dir", str(folder), *passed_on(o, given)]
            train.main([*how, "--resume" if (folder / "checkpoint.pt").exists() else "--overwrite"])
            tabulate()
    tabulate()
    print((RESULTS / "optimisers.md").read_text())


if __name__ == "__main__":
    run_program(main)
