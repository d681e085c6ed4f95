"""What the experiments share: runs and their metrics, times in turns, statistics, tables, files of results."""

from options import shown_command, write_atomically  # before torch

import contextlib
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"


def command(program, argv=None):
    """The command line of `program`, in the repository's root, to paste into a shell."""
    return shown_command("python", f"experiments/{program}", *(sys.argv[1:] if argv is None else argv))


def machine():
    return f"{platform.machine()} CPU, Python {platform.python_version()}, torch {torch.__version__}"


def program(name, *arguments):
    """The command of a program of this repository, for `subprocess` in its root."""
    return [sys.executable, str(ROOT / name), *map(str, arguments)]


def read_metrics(folder):
    """The lines of a run's metrics; none if it has not begun. The last one may be half-written: it is left out."""
    lines = []
    with contextlib.suppress(OSError, ValueError):
        for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
            lines.append(json.loads(line))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Times. A machine's speed drifts: what is compared is measured in turns, and its ratios are taken turn by turn


def in_turns(jobs, rounds, warm_up=2):
    """{name: values of `rounds` calls}, all jobs called once before any is called again."""
    values = {name: [] for name in jobs}
    for _ in range(warm_up + rounds):
        for name, job in jobs.items():
            values[name].append(job())
    return {name: taken[warm_up:] for name, taken in values.items()}


def ratio_quartiles(seconds, baseline):
    """[low, median, high] of the ratios of times, round by round."""
    return statistics.quantiles([a / b for a, b in zip(seconds, baseline)], n=4)


def timed(function, device="cpu"):
    """A job for `in_turns`: the seconds of one call, with a GPU's L2 cache flushed before it."""

    def on_cpu():
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    if device == "cpu":
        return on_cpu
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def on_gpu():
        flush.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_gpu


# ---------------------------------------------------------------------------------------------------------------------
# Tables and files


def mean_and_std(values):
    """Mean (None of nothing) and standard deviation (None of fewer than two, or of a run that diverged)."""
    values = [*values]
    known = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.mean(values) if values else None, statistics.stdev(values) if known else None


def sign_flip_p(differences):
    """Two-sided p-value of the mean of paired differences: the exact sign-flip test.

    If the two sides were the same, each difference could as well have had the other sign: p is the share of the 2^n
    choices of signs whose mean is at least as far from 0. No distribution is assumed. p cannot be below 2 / 2^n: three
    seeds cannot show anything at the 5 % level, six can.
    """
    sums = np.array([abs(differences[0])])  # flipping all signs changes nothing, so the first may be fixed
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) * (1 - 1e-9)))


def number(value, form, std=None):
    """A cell of a table, e.g. 3.1000 ± 0.0200; empty for None."""
    return ("" if value is None else f"{value:{form}}") + ("" if std is None else f" ± {std:{form.strip('+')}}")


def ratio_cell(quartiles):
    """A cell of a table: the median of `ratio_quartiles`, with the others where they differ."""
    low, median, high = quartiles
    return f"{median:.2f}" + f" ({low:.2f} to {high:.2f})" * (low < high)


def table(heads, rows):
    """The lines of a Markdown table, each when its row comes."""
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def print_table(heads, rows):
    """Print a table, each line when its row comes. Returns the lines."""
    lines = []
    for line in table(heads, rows):
        lines.append(line)
        print(line, flush=True)
    return lines


def finish_axes(ax, **labels):
    """Labels, a grid and a legend for a plot."""
    ax.set(**labels)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def write_results(path, how, lines, note="", **content):
    """path.md, which begins with the command that made it, and path.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(command=how, machine=machine(), **content)
    write_atomically(path.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), "\n".join([f"`{how}` ({machine()}){note}", "", *lines, ""]))


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

    def write_table(self, program, lines):
        """The lines behind the command of a program, beside the rows, and on the screen."""
        text = "\n".join([f"`{command(program)}` ({machine()})", "", *lines, ""])
        write_atomically(self.path.with_suffix(".md"), text)
        print(text)
