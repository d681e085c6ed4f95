"""Validation loss against minutes: `python train.py` beside nanoGPT's, whole commands on the same tokens of a CPU.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python experiments/minutes.py --nanogpt ../nanoGPT --threads 1      # about half an hour on a quiet machine

Both as they come: ours in bfloat16 where the CPU has it, nanoGPT in float32, the only precision that its train.py has
on a CPU; both with batch, steps, warm-up and evaluations of the default preset, nanoGPT at three rates. It takes the
whole machine. A run that the results hold already is not repeated. It runs the checkout's code. Read first: train.py.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import ROOT, command, finish_axes, program, table, write_results
from options import fail, option, parse_options, run_program, save_picture

import train

SETTINGS, _ = parse_options(train.Options, [], train.PRESETS)  # of the default preset
RATES = 1e-3, 3e-3, 6e-3, 1.2e-2
PROGRAMS = "train.py", "model.py", "configurator.py"  # of nanoGPT
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
OURS = re.compile(r"^step +(\d+)/\d+ .*val ([\d.]+)")
NANOGPT = re.compile(r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)")


@contextlib.contextmanager
def nanogpt_with_our_tokens(checkout):
    """A copy of the checkout's programs, for which the default data set is one of its own: its folder."""
    data = ROOT / train.DEFAULT_DATA
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "data" / "nanomea"
        tokens.mkdir(parents=True)
        for name in PROGRAMS:
            shutil.copy(Path(checkout) / name, folder)
        for name in ("train.bin", "val.bin"):
            (tokens / name).symlink_to(data / name)
        size = json.loads((data / "meta.json").read_text())["vocab_size"]
        # It looks for the vocabulary's size in a pickle: {"vocab_size": size}, spelled out. Nothing here reads pickles.
        (tokens / "meta.pkl").write_text(f"(dVvocab_size\nI{size}\ns.")
        yield folder


def nanogpt_command(rate, **changes):
    fields = {name: getattr(SETTINGS, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")}
    fields |= dict(dataset="nanomea", device="cpu", compile=False, gradient_accumulation_steps=1, dropout=0.0)
    fields |= dict(learning_rate=rate, min_lr=rate / 10, warmup_iters=SETTINGS.warmup_steps, log_interval=1000)
    fields |= dict(max_iters=SETTINGS.max_steps, lr_decay_iters=SETTINGS.max_steps)
    fields |= dict(eval_interval=SETTINGS.eval_every, eval_iters=SETTINGS.eval_windows // SETTINGS.batch_size)
    return [sys.executable, "train.py", *(f"--{name}={value}" for name, value in {**fields, **changes}.items())]


def cpu_minutes(pid):
    """User and system time of a running process: the minutes that one thread takes on a machine with nothing else."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") / 60


def follow(command, folder, threads, pattern):
    """Run `command`: a dict(step, loss, minutes, cpu_minutes) for each line that `pattern` matches."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    began, points, line = time.perf_counter(), [], ""
    with subprocess.Popen(command, cwd=folder, env=environment, **PIPES) as process:
        for line in process.stdout:
            if found := pattern.match(line):
                minutes = dict(minutes=(time.perf_counter() - began) / 60, cpu_minutes=cpu_minutes(process.pid))
                points.append(dict(step=int(found[1]), loss=float(found[2]), **minutes))
    if process.returncode:
        fail(f"{' '.join(command)} ended with exit code {process.returncode}: {line.strip()}")
    return points


def measure(checkout, threads, results, how):
    """Run what `results`.json does not hold yet; write table and picture."""
    path = results.with_suffix(".json")
    runs = json.loads(path.read_text())["runs"] if path.is_file() else []
    done = {(run["name"], run["threads"]) for run in runs}
    with tempfile.TemporaryDirectory() as out, nanogpt_with_our_tokens(checkout) as theirs:
        ours = lambda name: program("train.py", "--attention", name, "--threads", threads, "--out_dir", f"{out}/{name}")
        jobs = {name: (ours(name), ROOT, OURS) for name in ("mha", "mea")}
        jobs |= {f"nanoGPT, rate {rate:g}": (nanogpt_command(rate), theirs, NANOGPT) for rate in RATES}
        for name, (command, folder, pattern) in jobs.items():
            if (name, threads) not in done:
                print(f"{name}, {threads} threads", flush=True)
                runs.append(dict(name=name, threads=threads, points=follow(command, folder, threads, pattern)))
                note = ". One thread: minutes of CPU time; more: of the clock."
                write_results(results, how, report(runs), note, runs=runs)
    print("\n".join(report(runs)))
    print(save_picture(results.with_suffix(".png"), lambda plt: draw(plt, runs)))


def curve(run):
    """[(minutes, loss)]: of CPU time on one thread, which other work does not lengthen; of the clock on several."""
    clock = "cpu_minutes" if run["threads"] == 1 else "minutes"
    return [(point[clock], point["loss"]) for point in run["points"]]


def report(runs):
    """The lines of the table."""
    rows = []
    for run in runs:
        beside = [curve(other)[-1][1] for other in runs if other["threads"] == run["threads"] and is_nanogpt(other)]
        minutes, loss = curve(run)[-1]
        reached = next((f"{minutes:.1f}" for minutes, loss in curve(run) if loss <= min(beside, default=0)), "")
        rows.append([run["name"], str(run["threads"]), f"{loss:.2f}", f"{minutes:.1f}", reached])
    return [*table(["run", "threads", "validation loss", "minutes", "minutes to nanoGPT's best loss"], rows)]


def is_nanogpt(run):
    return run["name"].startswith("nanoGPT")


def draw(plt, runs):
    counts = sorted({run["threads"] for run in runs})
    figure, axes = plt.subplots(1, len(counts), figsize=(6 * len(counts), 4), layout="constrained", squeeze=False)
    for ax, threads in zip(axes[0], counts):
        for run in (run for run in runs if run["threads"] == threads):
            points = [pair for pair, point in zip(curve(run), run["points"]) if point["step"] > 1]
            style = dict(ls="--", alpha=0.7) if is_nanogpt(run) else {}
            ax.plot(*zip(*points), marker="o", ms=3, label=run["name"], **style)
        title = f"{SETTINGS.max_steps} steps of the same tokens, threads: {threads}"
        finish_axes(ax, xlabel="minutes", ylabel="validation loss, nats per token", title=title)
    return figure


@dataclass
class Options:
    nanogpt: str = option("../nanoGPT", "a checkout of nanoGPT")
    threads: int = option(1, "CPU threads of every run", least=1)
    results: str = option("experiments/results/minutes", "name of the .json, .md and .png")


def main(argv=None):
    o, _ = parse_options(Options, argv)
    if missing := [name for name in PROGRAMS if not (Path(o.nanogpt) / name).is_file()]:
        fail(f"{o.nanogpt} is no checkout of nanoGPT: it has no {missing[0]}")
    if not Path("/proc/self/stat").exists():
        fail("minutes of CPU time are read from Linux's /proc, which is not here")
    if not (ROOT / train.DEFAULT_DATA / "meta.json").is_file():
        fail(f"both train on {train.DEFAULT_DATA}, which is not there yet: python data/prepare.py makes it")
    measure(o.nanogpt, o.threads, ROOT / o.results, command("minutes.py", argv))


if __name__ == "__main__":
    run_program(main)
