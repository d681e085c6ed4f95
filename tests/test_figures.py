"""The figures in README.md and in the report are those of committed results: none can drift from its source.

Above a table or a paragraph stands `<!-- from FILE .. -->`, with files of experiments/. The numbers of a cell have to
be those of one cell of one row there, rounded: a row of the variant that the cell's row or column names, at the rate or
length that the column's head names. Of words, every decimal number has to be in some row. Tables (.md) are rows as
they stand; of .json files every object is one, and so are the differences of any two whose runs share seeds.
"""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from experiments import bench, sweep
from experiments.report import mean_and_std

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"
DOCUMENTS = [ROOT / "README.md", ROOT / "experiments/README.md"]
NAMES = {
    "mha + norm": ["mha+norm", "mha, head norm"],
    "hlc alone": ["mea-norm"],
    "talking-heads": ["tha"],
    "talking-heads + norm": ["tha+norm"],
    "dfa without norm": ["dfa-norm"],
    "gqa": ["mha"],
    "nanogpt (november 2025)": ["nanogpt"],
}
NUMBER = re.compile(r"(?<![\w.,-])[-+]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\w)")


def numbers(text):
    """[(value, half a unit of its last digit)] of the numbers in a text."""
    found = []
    for word in NUMBER.findall(text.replace("−", "-")):
        word = word.replace(",", "")
        mantissa, _, exponent = word.partition("e")
        digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
        found.append((float(word), 0.5 * 10.0**-digits))
    return found


def cells(line):
    return [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]


def tables(text):
    """[(the comment's files or None, head, rows)] of the tables in a Markdown text."""
    found, lines = [], text.splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|(-+\|)+", line):
            rows = []
            for row in lines[i + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(cells(row))
            source = re.fullmatch(r"<!-- from (.*) -->", lines[i - 2]) if i > 1 else None
            found.append((source and source[1].split(), cells(lines[i - 1]), rows))
    return found


def paragraphs(text):
    """[(files, paragraph)] of those that a comment stands above."""
    return [(m[1].split(), m[2]) for m in re.finditer(r"<!-- from (.*) -->\n((?:[^|\n].*\n)+)", text)]


def objects(value):
    """(strings, {key: numbers}) of every object in a JSON value; a mean takes its standard deviation along."""
    if isinstance(value, dict):
        figures = {key: item if isinstance(item, list) else [item] for key, item in value.items()}
        strings = [str(item).lower() for figure in figures.values() for item in figure]
        for mean, std in (("mean", "std"), ("minus_mha", "minus_mha_std"), ("minus_adamw", "minus_adamw_std")):
            figures |= {mean: [value[mean], value[std]]} if mean in value else {}
        is_number = lambda item: type(item) in (int, float)
        yield strings, {key: figure for key, figure in figures.items() if all(map(is_number, figure))}
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from objects(item)


def read(files):
    """[(strings, {column: numbers})]: the rows of result files."""
    rows, settings = [], []
    for file in files:
        path = ROOT / "experiments" / file
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            rows += objects(content)
            settings += [row for row in content.get("table", {}).values() if "losses" in row]
        else:
            for _, head, lines in tables(path.read_text()):
                for line in lines:
                    found = {
                        f"{head[i].lower()} {i}": [value for value, _ in numbers(cell)] for i, cell in enumerate(line)
                    }
                    rows.append(([cell.lower() for cell in line], found))
    for one, other in combinations(settings, 2):
        differences = [loss - other["losses"][seed] for seed, loss in one["losses"].items() if seed in other["losses"]]
        if len(differences) > 1:
            mean, std = mean_and_std(differences)
            rows += [([], {"minus": [mean, std]}), ([], {"minus": [-mean, std]})]
    return rows


def near(x, number):
    """Whether x is a number as written, or it in %. 1e-4 is the rounding of the tables."""
    value, unit = number
    return abs(x - value) <= unit * 1.001 + 5e-5 or abs(100 * x - value) <= unit * 1.001 + 5e-5


def holds(row, wanted, title=""):
    """Whether a column of a row, the one of this title where there is one, begins with the wanted numbers."""
    columns = {name: figure for name, figure in row[1].items() if title and name.startswith(title.lower())}
    figures = [figure for figure in (columns or row[1]).values() if len(figure) >= len(wanted)]
    return any(all(map(near, figure, wanted)) for figure in figures)


def named(rows, label):
    """The rows of the variant, or of the part of a step, that a label names; all of them where it names none."""
    labels = NAMES.get(label.lower(), [label.lower()])
    ends = tuple(f", {label}" for label in labels)
    starts = tuple(f"{label}{mark}" for label in labels for mark in ("-lr", "@"))
    fits = lambda strings: any(s in labels or s.endswith(ends) or s.startswith(starts) for s in strings)
    return [row for row in rows if fits(row[0])] or rows


def wrong_decimals(sources, text):
    """The decimal numbers of a text, with their deviations and of either sign, that are in no row."""
    figures = [numbers(words) for words in re.findall(rf"{NUMBER.pattern}(?: ± [\d.]+)?", text)]
    figures = [figure for figure in figures if figure[0][1] < 0.1]
    either = lambda figure: (figure, [(-figure[0][0], figure[0][1]), *figure[1:]])
    found = lambda figure: any(holds(row, signed) for signed in either(figure) for row in sources)
    return [f"{figure[0][0]} in: {text[:60]}" for figure in figures if not found(figure)]


def wrong_figures(files, head, rows):
    """The cells of a table whose numbers no row of the files has."""
    sources, wrong = read(files), []
    for label, *line in rows:
        for title, cell in zip(head[1:], line):
            if len(re.findall(r"[a-z]{2,}", cell)) > 2:
                wrong += wrong_decimals(sources, cell)
            elif wanted := numbers(cell):
                at = numbers(title)[:1] if title[:1].isdigit() else []  # a rate, a length
                fitting = [row for row in named(named(sources, label), title) if holds(row, at)]
                if not any(holds(row, wanted, title) for row in fitting):
                    wrong.append(f"{label} | {title}: {cell}")
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_figures_are_those_of_committed_results(document):
    text = document.read_text()
    wrong = [cell for files, head, rows in tables(text) if files for cell in wrong_figures(files, head, rows)]
    wrong += [number for files, paragraph in paragraphs(text) for number in wrong_decimals(read(files), paragraph)]
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_table_of_figures_names_its_source(document):
    measured = lambda rows: any(unit < 0.1 for row in rows for cell in row for _, unit in numbers(cell))
    assert not [head for files, head, rows in tables(document.read_text()) if not files and measured(rows)]


def test_a_figure_that_drifts_is_found():
    head, row = ["`--attention`", "validation loss", "minus MHA"], ["mea", "3.911 ± 0.004", "+0.039 ± 0.008"]
    files = ["results/losses.md"]
    assert not wrong_figures(files, head, [row])
    drifted = ["mea", "3.912 ± 0.004", "+0.039 ± 0.008"]
    assert wrong_figures(files, head, [drifted]) == ["mea | validation loss: 3.912 ± 0.004"]
    assert wrong_figures(files, head, [["mha", *row[1:]]])  # another variant's
    assert wrong_figures(["results/laptop/cosine.md"], ["rate", "6e-3"], [["MHA", "3.982 ± 0.014"]])  # another rate's


def sweeps():
    return sorted(path for path in RESULTS.rglob("*.json") if "table" in json.loads(path.read_text()))


@pytest.mark.parametrize("path", sweeps(), ids=lambda path: str(path.relative_to(RESULTS)))
def test_tables_of_sweeps_are_those_of_their_json(path):
    rows = json.loads(path.read_text())["table"]
    for row in rows.values():
        if row["variant"] == "mha" and not row["minus_mha"]:  # the reference itself
            row["minus_mha"] = row["minus_mha_std"] = None
    texts = path.with_suffix(".md").read_text(), "\n".join(sweep.markdown(rows))
    (_, head, written), (_, titles, computed) = (tables(text)[0] for text in texts)
    shared = [titles.index(title) for title in head]  # older tables have no column for the rate
    assert written == [[row[i] for i in shared] for row in computed]


def test_the_table_of_speeds_is_that_of_its_json():
    rows = json.loads((RESULTS / "bench.json").read_text())["rows"]
    written = (RESULTS / "bench.md").read_text()
    assert not [row for row in rows if f"| {' | '.join(bench.table_line(row))} |" not in written]
