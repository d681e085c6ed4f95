"""Faults that no test does to a real run in seconds. After each the run must end as an undisturbed one does.

    python experiments/torture.py                            # some minutes; writes experiments/results/torture.md
    python experiments/torture.py --kills 100 --seed 1

Kill -9 at random moments and inside the saving of a checkpoint, a second process, a full disk, data that are cut off
under a run. Signals, readers that go away, damaged files, NaN and clocks are in tests/test_train.py and
tests/test_faults.py. "As an undisturbed one" means: weights, optimiser state, random state and every logged number but
the speeds, bit for bit. Exit code 1 if anything did not survive. Linux.
"""

import contextlib
import io
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import ROOT, command, machine, read_metrics, table
from options import fail, option, parse_options, run_program, split_list

import torch

import train
from checkpoint import load_checkpoint
from model import PRESETS

# ---------------------------------------------------------------------------------------------------------------------
# A training process, with a fault built in where it must strike at an exact place; train.py itself knows nothing of it


def child(fault, options):
    """train.py's main with `fault`, "name:count", built in: it strikes at the count-th call of what it sits in."""
    name, count = fault.split(":")
    calls, original_save = [], torch.save

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def before_call(module, function, act, counts=lambda *_: True):
        original = getattr(module, function)

        def patched(*args):
            if counts(*args):
                calls.append(function)
                if len(calls) == int(count):
                    act(*args)
            return original(*args)

        setattr(module, function, patched)

    def write_half_and_die(state, file):
        whole = io.BytesIO()
        original_save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        kill()

    renamed_to = lambda name: lambda _, new: Path(new).name == name
    {
        "writing": lambda: before_call(torch, "save", write_half_and_die),
        "unsynced": lambda: before_call(os, "fsync", kill),  # written, not flushed to the disk
        "unnamed": lambda: before_call(os, "replace", kill, renamed_to("checkpoint.prev.pt")),  # still checkpoint.tmp
        "between": lambda: before_call(os, "replace", kill, renamed_to("checkpoint.pt")),  # the old one renamed already
    }[name]()
    train.main(options)


INSIDE = ("writing", "unsynced", "unnamed", "between")  # of saving


def finish(process):
    """(exit code, what it said on standard error)."""
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors


def refused(result, *words):
    """Whether a process ended with exit code 2 and one line that has these words."""
    code, errors = result
    return code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and all(w in errors for w in words)


def metrics(folder):
    """The lines of a run's metrics, without what depends on the machine's speed."""
    measured = ("tokens_per_second", "peak_memory", "mfu")
    return [{name: value for name, value in line.items() if name not in measured} for line in read_metrics(folder)]


def steps_logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_step(process, folder, step, seconds=math.inf):
    began = time.monotonic()
    while steps_logged(folder) < step and process.poll() is None and time.monotonic() < began + seconds:
        time.sleep(0.004)


def saved_step(folder):
    with contextlib.suppress(FileNotFoundError):
        return load_checkpoint(folder)[1]["step"]
    return 0


def leaves(value, name=""):
    """(name, leaf) of nested dicts and lists."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}.{key}")
    else:
        yield name, value


def differences(a, b):
    """What of two checkpoint states is not bit for bit the same, but for the options: names, none where all is."""
    a, b = ({name: leaf for name, leaf in leaves(state) if not name.startswith(".options.")} for state in (a, b))
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name])]


# ---------------------------------------------------------------------------------------------------------------------
# The faults. Each takes a `Lab` and yields (fault, folder of the run, what happened, whether that was right); where
# "{}" stands in what happened, the run is resumed if it is not at its end, and compared with the undisturbed one


@dataclass
class Lab:
    work: Path  # a folder to work in
    options: list  # of a run
    rng: random.Random
    kills: int

    def __post_init__(self):
        self.undisturbed = self.work / "undisturbed"

    def start(self, folder, *options, fault=None):
        """The process of a new run; `fault` is that of `child`."""
        return self.process(fault, *self.options, *options, "--out_dir", folder)

    def resume(self, folder, *options, fault=None):
        return self.process(fault, "--resume", *options, "--out_dir", folder)

    def process(self, fault, *options):
        program = [ROOT / "train.py"] if fault is None else [__file__, "--child", fault]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([*map(str, [sys.executable, *program, *options])], cwd=ROOT, **pipes)

    def end(self, folder):
        """(whether a run, resumed if it is not at its end, is the undisturbed one, in words)"""
        code, errors, resumed = 0, "", saved_step(folder) < saved_step(self.undisturbed)
        if resumed:
            code, errors = finish(self.resume(folder))
        if code:
            return False, f"resuming ended with {code}: {errors.strip()[-200:]}"
        found = differences(*(load_checkpoint(path)[1] for path in (folder, self.undisturbed)))
        found += [] if metrics(folder) == metrics(self.undisturbed) else ["logged losses"]
        same = f"not identical: {', '.join(found[:3])}" if found else "bit-identical"
        return not found, f"resumed, {same}" if resumed else same


def kills(lab):
    """SIGKILL, half of the times at a chosen place of saving, the others at any moment of the process's life."""
    folder, total, step, problems = lab.work / "killed", steps_logged(lab.undisturbed), 0, []
    seen = dict.fromkeys(("anywhere", *INSIDE), 0)
    for kill in range(lab.kills):
        left = total - step - 8  # near the run's end only kills that leave no progress: none comes after it
        kind = "writing" if left < 1 else "anywhere" if kill % 2 else INSIDE[kill // 2 % len(INSIDE)]
        steps = lab.rng.randint(1, max(1, 2 * left // (lab.kills - kill + 1)))
        fault = None if kind == "anywhere" else f"{kind}:{steps}"
        process = lab.resume(folder, fault=fault) if step else lab.start(folder, "--overwrite", fault=fault)
        if kind == "anywhere":
            while_it_starts = lab.rng.random() < 0.2
            wait_for_step(process, folder, step + steps, lab.rng.uniform(0, 4) if while_it_starts else math.inf)
            time.sleep(lab.rng.uniform(0, 0.05))
            process.kill()
        code, errors = finish(process)
        if code != -signal.SIGKILL:
            problems.append(f"kill {kill + 1} ({kind}): exit code {code}, {errors.strip()[-200:]}")
            break
        seen[kind] += 1
        before, step = step, saved_step(folder)
        if step < before - 1:  # a kill between the renames costs one checkpoint, never two
            problems.append(f"kill {kill + 1} ({kind}): from step {before} back to {step}")
    what = "; ".join([", ".join(f"{number} {kind}" for kind, number in seen.items()), *problems])
    yield f"SIGKILL, {lab.kills} times in one run", folder, what + "; {}", not problems


def two_runs(lab):
    folder, refusals = lab.work / "two", []
    process = lab.start(folder)
    wait_for_step(process, folder, 2)
    for second in (lambda: lab.start(folder), lambda: lab.resume(folder), lambda: lab.start(folder, "--overwrite")):
        process.send_signal(signal.SIGSTOP)  # the first must live while the second starts, which takes seconds
        refusals.append(refused(finish(second()), "another process is at work"))
        process.send_signal(signal.SIGCONT)
    code, _ = finish(process)
    what = f"{sum(refusals)} of 3 refused, nothing touched: the first ended {{}}"
    yield "a second run on a folder: plain, --resume, --overwrite", folder, what, all(refusals) and code == 0
    folder = lab.work / "pair"
    codes = sorted(finish(process)[0] for process in [lab.start(folder), lab.start(folder)])
    yield "two runs started at once on a new folder", folder, f"exit codes {codes}, the run {{}}", codes == [0, 2]


def full_disk(lab):
    disk, size = lab.work / "disk", (lab.undisturbed / "checkpoint.pt").stat().st_size
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(disk)]  # saving needs room for three
    if subprocess.run(mount, capture_output=True).returncode:
        yield "a full disk", disk, "not tried: only root may mount a small one", True
        return
    folder = disk / "run"
    try:
        result = finish(lab.start(folder))
        survived = refused(result, "No space left") or refused(result, "disk is full")
        step = saved_step(folder)
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(disk)], check=True)
        what = f"exit code {result[0]}, one line, checkpoint of step {step} kept; with room again {{}}"
        yield "a full disk", folder, what, survived and step > 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def truncated_data(lab):
    folder, data = lab.work / "cut", lab.work / "data"
    shutil.copytree(lab.options[lab.options.index("--data_dir") + 1], data)
    process = lab.start(folder, "--data_dir", data)
    wait_for_step(process, folder, 10)
    whole = (data / "train.bin").read_bytes()
    os.truncate(data / "train.bin", 100)
    code, _ = finish(process)
    step = saved_step(folder)
    result = finish(lab.resume(folder))
    (data / "train.bin").write_bytes(whole)
    died = f"dies of {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    what = f"the run {died} at its next look (a memory map has no other way), the checkpoint of step {step} is whole; "
    what += f"--resume exit code {result[0]}, names the file; with the file restored {{}}"
    caught = code != 0 and step > 0 and refused(result, "train.bin", "truncated")
    yield "train.bin truncated under a run", folder, what, caught


FAULTS = {fault.__name__: fault for fault in (kills, two_runs, full_disk, truncated_data)}

# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    preset: str = option("tiny", "shape of the model", list(PRESETS))
    steps: int = option(300, "steps of every run, at least twice as many as kills", least=40)
    kills: int = option(30, "kills of the killed run", least=1)
    seed: int = option(0, "of the moments and places", least=0)
    data_dir: str = option("data/python", "prepared data set, made if missing")
    results: str = option("experiments/results/torture.md", "file to write")
    faults: str = option(",".join(FAULTS), "which, with commas between them")


def main(argv=None):
    o, _ = parse_options(Options, argv)
    chosen = split_list(o.faults)
    if unknown := sorted(set(chosen) - set(FAULTS)):
        fail(f"no fault {', '.join(unknown)}: choose from {', '.join(FAULTS)}")
    if o.steps < 2 * o.kills:
        fail(f"steps must be at least twice as many as kills, not {o.steps} for {o.kills}")
    options = f"--preset {o.preset} --max_steps {o.steps} --dropout 0.1 --device cpu --threads 1".split()
    options += ["--save_every", "1", "--eval_every", str(o.steps // 4), "--data_dir", o.data_dir]
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as work:
        lab = Lab(Path(work), options, random.Random(o.seed), o.kills)
        code, errors = finish(lab.start(lab.undisturbed))
        if code:
            raise SystemExit(f"error: the undisturbed run ended with {code}: {errors}")
        for name in chosen:
            for fault, folder, what, survived in FAULTS[name](lab):
                if "{}" in what:
                    ended, words = lab.end(folder)
                    what, survived = what.replace("{}", words), survived and ended
                rows.append([fault, what.replace(work, "").replace("|", "/"), "yes" if survived else "**NO**"])
                print(*rows[-1], sep=" | ", flush=True)
                minutes = (time.monotonic() - began) / 60
                how = f"`{command('torture.py', argv)}` ({machine()}, {platform.system()}, {minutes:.0f} minutes)"
                (ROOT / o.results).write_text(report(o, how, rows))
    return int(any(survived != "yes" for *_, survived in rows))


def report(o, how, rows):
    survived = sum(row[-1] == "yes" for row in rows)
    lines = "\n".join(table(["fault", "what happened", "survived"], rows))
    return f"""# What a run survives

{how}

Every run: preset {o.preset}, {o.steps} steps, a checkpoint at every step. "Bit-identical": weights, optimiser state,
random state and every logged number but the speeds equal those of an undisturbed run.

{lines}

{survived} of {len(rows)} survived.
"""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        run_program(main)
