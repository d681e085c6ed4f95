"""Validation loss against minutes: `python train.py` beside nanoGPT's, whole commands on the same tokens of a CPU.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python experiments/bench.py --minutes --nanogpt ../nanoGPT --threads 1      # about half an hour on a quiet machine

Both as they come: ours in bfloat16 where the CPU has it, nanoGPT in float32, the only precision that its train.py has
on a CPU; both with batch, steps, warm-up and evaluations of the default preset, nanoGPT at three rates. A run that the
results hold already is not repeated. It runs the checkout's code.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

import train
from experiments.report import machine, table
from options import parse_options, save_picture

SETTINGS, _ = parse_options(train.Options, [], train.PRESETS)  # of the default preset
RATES = 1e-3, 3e-3, 6e-3
OURS = re.compile(r"^step +(\d+)/\d+ .*val ([\d.]+)")
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
NANOGPT = re.compile(r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)")


@contextlib.contextmanager
def nanogpt_with_our_tokens(checkout):
    """A copy of the checkout's programs, for which the default data set is one of its own: its folder."""
    data = ROOT / train.DEFAULT_DATA
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "data" / "nanomea"
        tokens.mkdir(parents=True)
        for name in ("train.py", "model.py", "configurator.py"):
            shutil.copy(Path(checkout) / name, folder)
        for name in ("train.bin", "val.bin"):
            (tokens / name).symlink_to(data / name)
        size = json.loads((data / "meta.json").read_text())["vocab_size"]
        # It looks for the vocabulary's size in a pickle: {"vocab_size": size}, spelled out. Nothing here reads pickles.
        (tokens / "meta.pkl").write_text(f"(dVvocab_size\nI{size}\ns.")
        yield folder


def nanogpt_command(rate):
    fields = {name: getattr(SETTINGS, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")}
    fields |= dict(dataset="nanomea", device="cpu", compile=False, gradient_accumulation_steps=1, dropout=0.0)
    fields |= dict(learning_rate=rate, min_lr=rate / 10, warmup_iters=SETTINGS.warmup_steps)
    fields |= dict(max_iters=SETTINGS.max_steps, lr_decay_iters=SETTINGS.max_steps)
    fields |= dict(eval_interval=SETTINGS.eval_every, eval_iters=SETTINGS.eval_windows // SETTINGS.batch_size)
    return [sys.executable, "train.py", *(f"--{name}={value}" for name, value in fields.items()), "--log_interval=1000"]


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
        raise ValueError(f"{' '.join(command)} ended with exit code {process.returncode}: {line.strip()}")
    return points


def measure(checkout, threads, results, how):
    """Run what `results`.json does not hold yet; write table and picture. Raises ValueError where a run fails."""
    path = results.with_suffix(".json")
    content = json.loads(path.read_text()) if path.is_file() else dict(command=how, machine=machine(), runs=[])
    done = {(run["name"], run["threads"]) for run in content["runs"]}
    with tempfile.TemporaryDirectory() as out, nanogpt_with_our_tokens(checkout) as theirs:
        jobs = {}
        for name in ("mha", "mea"):
            options = ["--attention", name, "--threads", str(threads), "--out_dir", f"{out}/{name}"]
            jobs[name] = [sys.executable, "train.py", *options], ROOT, OURS
        for rate in RATES:
            jobs[f"nanoGPT, rate {rate:g}"] = nanogpt_command(rate), theirs, NANOGPT
        for name, (command, folder, pattern) in jobs.items():
            if (name, threads) not in done:
                print(f"{name}, {threads} threads", flush=True)
                content["runs"].append(
                    dict(name=name, threads=threads, points=follow(command, folder, threads, pattern))
                )
                path.write_text(json.dumps(content, indent=1) + "\n")
    lines = list(report(content))
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(save_picture(results.with_suffix(".png"), lambda plt: draw(content["runs"], plt)))


def minutes_of(point, threads):
    """CPU minutes of one thread, which other work on the machine does not lengthen; the clock's of several."""
    return point["cpu_minutes"] if threads == 1 else point["minutes"]


def report(content):
    yield f"`{content['command']}` ({content['machine']}). One thread: minutes of CPU time; more: of the clock."
    yield ""
    ends = {(run["name"], run["threads"]): run["points"][-1]["loss"] for run in content["runs"]}
    rows = []
    for run in content["runs"]:
        theirs = [loss for (name, threads), loss in ends.items() if "nanoGPT" in name and threads == run["threads"]]
        target = min(theirs, default=0)
        reached = next((p for p in run["points"] if p["loss"] <= target), None)
        last = run["points"][-1]
        reach = f"{minutes_of(reached, run['threads']):.1f}" if reached else ""
        rows.append(
            [run["name"], str(run["threads"]), f"{last['loss']:.2f}", f"{minutes_of(last, run['threads']):.1f}", reach]
        )
    yield from table(["run", "threads", "validation loss", "minutes", "minutes to nanoGPT's best loss"], rows)


def draw(runs, plt):
    counts = [run["threads"] for run in runs if run["name"].endswith(f"{RATES[-1]:g}")]  # those that are complete
    figure, axes = plt.subplots(1, len(counts), figsize=(6 * len(counts), 4), layout="constrained", squeeze=False)
    for ax, threads in zip(axes[0], counts):
        for run in (run for run in runs if run["threads"] == threads):
            theirs = run["name"].startswith("nanoGPT")
            points = [(minutes_of(point, threads), point["loss"]) for point in run["points"] if point["step"] > 1]
            ax.plot(*zip(*points), "o--" if theirs else "o-", ms=3, label=run["name"], alpha=0.7 if theirs else 1)
        title = "one thread" if threads == 1 else f"{threads} threads"
        ax.set(
            xlabel="minutes",
            ylabel="validation loss, nats per token",
            title=f"{SETTINGS.max_steps} steps of the same tokens, {title}",
        )
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure
