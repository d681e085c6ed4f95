"""What the experiments share: how a result was made, Markdown tables."""

import platform
import statistics
import sys

import torch


def command(program, argv=None):
    """The command line of `program`, in the repository's root."""
    return " ".join([f"python experiments/{program}", *(sys.argv[1:] if argv is None else argv)])


def machine():
    return f"{platform.machine()} CPU, Python {platform.python_version()}, torch {torch.__version__}"


def mean_and_std(values):
    """Mean (None of nothing) and standard deviation (None of fewer than two)."""
    values = [*values]
    return statistics.mean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def number(value, form, std=None):
    """A cell of a table, e.g. 3.1000 ± 0.0200; empty for None."""
    return ("" if value is None else f"{value:{form}}") + ("" if std is None else f" ± {std:{form.strip('+')}}")


def table(heads, rows):
    """The lines of a Markdown table, each when its row comes."""
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield f"| {' | '.join(row)} |"
