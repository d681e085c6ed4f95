"""Faults against a real training run: kill -9 at random moments and inside the saving of a checkpoint, a full disk, damaged
files, a second process, signals, NaN, a clock that runs backwards. After each the run must end as an undisturbed one does.

    python experiments/torture.py                            # some minutes; writes experiments/results/torture.md
    python experiments/torture.py --kills 100 --seed 1

"As an undisturbed one" means: weights, optimiser state, random state and every logged number but the speeds, bit for bit.
Exit code 1 if anything did not survive.
"""

import argparse
import io
import json
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import model as gpt
from checkpoint import load_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# A training process, with a fault built in where it must strike at an exact place: train.py itself knows nothing of this


def child(fault, options):
    """train.py's main with `fault`, "name:count", built in: it strikes at the count-th call of what it sits in."""
    import train

    name, count = fault.split(":")

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def before_call(module, function, act, counts=lambda *_: True):
        original, calls = getattr(module, function), []

        def patched(*args, **kwargs):
            calls.append(counts(*args))
            if calls[-1] and sum(calls) == int(count):
                args = act(*args) or args
            return original(*args, **kwargs)

        setattr(module, function, patched)

    def write_half_and_die(state, file):
        whole = io.BytesIO()
        original_save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        kill()

    def spoil(parameters, *rest):
        parameters = list(parameters)
        parameters[0].grad.view(-1)[0] = math.nan
        return parameters, *rest

    original_save = torch.save
    if name == "writing":
        before_call(torch, "save", write_half_and_die)
    elif name == "unsynced":  # written, not flushed to the disk
        before_call(os, "fsync", kill)
    elif name == "unnamed":  # the new checkpoint is still checkpoint.tmp
        before_call(os, "replace", kill, lambda _, new: Path(new).name == "checkpoint.prev.pt")
    elif name == "between":  # checkpoint.pt is checkpoint.prev.pt already, and the new one not yet checkpoint.pt
        before_call(os, "replace", kill, lambda _, new: Path(new).name == "checkpoint.pt")
    elif name == "nan":
        before_call(torch.nn.utils, "clip_grad_norm_", spoil)
    elif name == "clock":
        now, ticks = time.time(), []
        time.time = time.monotonic = lambda: now - 0.25 * (ticks.append(0) or len(ticks))
    else:
        raise ValueError(f"no fault {name!r}")
    train.main(options)


def start(*options, fault=None, **popen):
    program = [str(ROOT / "train.py")] if fault is None else [__file__, "--child", fault]
    return subprocess.Popen([sys.executable, *program, *map(str, options)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def finish(process):
    """(exit code, what it said on standard error)."""
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors


def refused(result, *words):
    """Whether a process ended with exit code 2 and one line that has these words."""
    code, errors = result
    return code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and all(word in errors for word in words)


def steps_logged(folder):
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for_step(process, folder, step):
    while steps_logged(folder) < step and process.poll() is None:
        time.sleep(0.004)


def saved_step(folder):
    try:
        return load_checkpoint(folder)[1]["step"]
    except FileNotFoundError:
        return 0


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("tokens_per_second", "peak_memory", "mfu")} for line in lines]


def differences(a, b):
    """What of two run folders is not bit for bit the same: a list of names, empty where nothing differs."""
    (_, first), (_, second) = load_checkpoint(a), load_checkpoint(b)
    found = [name for name in first["model"] if not torch.equal(first["model"][name], second["model"][name])]
    moments, others = first["optimizer"]["state"], second["optimizer"]["state"]
    found += [f"moment {name} of {i}" for i in moments for name in moments[i] if not torch.equal(moments[i][name], others[i][name])]
    found += [name for name in ("step", "spikes") if first[name] != second[name]]
    found += [] if torch.equal(first["rng"]["cpu"], second["rng"]["cpu"]) else ["random state"]
    return found + ([] if metrics(a) == metrics(b) else ["logged losses"])


# ---------------------------------------------------------------------------------------------------------------------
# The faults. Each takes the folder to work in, the options of a run, the folder of the undisturbed run, and a random.Random;
# and yields rows: (fault, what happened, survived)


def ends_as_undisturbed(folder, undisturbed, *options):
    """Resume a run to its end: (survived, in words)."""
    code, errors = finish(start("--resume", "--out_dir", folder, *options))
    if code:
        return False, f"resuming ended with {code}: {errors.strip()[-200:]}"
    found = differences(folder, undisturbed)
    return not found, f"resumed, but not identical: {', '.join(found[:3])}" if found else "resumed, bit-identical"


INSIDE = ("writing", "unsynced", "unnamed", "between")


def kills(work, options, undisturbed, rng, count):
    """SIGKILL `count` times, about half of them at a chosen place of saving and the others at any moment of the process's life."""
    folder, total, step, seen, problems = work / "killed", steps_logged(undisturbed), 0, dict.fromkeys(("anywhere", *INSIDE), 0), []
    left_behind = dict.fromkeys(("a checkpoint.tmp", "no checkpoint.pt"), 0)

    def traces():
        new, current = folder / "checkpoint.tmp", folder / "checkpoint.pt"
        return {"a checkpoint.tmp": new.exists() and new.stat().st_mtime_ns, "no checkpoint.pt": bool(step) and not current.exists()}

    for kill in range(count):
        # steps until the next kill: as many kills as asked for fit into the run, and none comes after its end
        budget = max(2, min(2 * (total - step) // (count - kill + 1), total - step - 3))
        kind = "anywhere" if kill % 2 else INSIDE[kill // 2 % len(INSIDE)]
        if total - step < 5:  # nearly done: a kill that leaves no progress
            kind, budget = "writing", 2
        before = traces()
        arguments = ["--out_dir", folder, *(["--resume"] if step else [*options, "--overwrite"])]
        if kind == "anywhere":
            process = start(*arguments)
            if rng.random() < 0.2:
                moment = time.monotonic() + rng.uniform(0, 4)  # also while it starts
                while time.monotonic() < moment and steps_logged(folder) < step + budget - 1:
                    time.sleep(0.01)
            else:
                wait_for_step(process, folder, step + rng.randrange(1, budget))
                time.sleep(rng.uniform(0, 0.05))
            process.kill()
        else:
            process = start(*arguments, fault=f"{kind}:{rng.randrange(1, budget)}")
        code, errors = finish(process)
        if code != -signal.SIGKILL:
            problems.append(f"kill {kill + 1} ({kind}): exit code {code}, {errors.strip()[-200:]}")
            break
        seen[kind] += 1
        for thing, trace in traces().items():  # not those that an earlier kill left
            left_behind[thing] += bool(trace) and trace != before[thing]
        after = saved_step(folder)
        if after < step - 1:  # a kill between the renames costs one checkpoint, never two
            problems.append(f"kill {kill + 1} ({kind}): from step {step} back to {after}")
        step = after
    else:
        survived, words = ends_as_undisturbed(folder, undisturbed)
        what = ", ".join(f"{number} {kind}" for kind, number in seen.items()) + "; left behind: "
        what += ", ".join(f"{number} times {thing}" for thing, number in left_behind.items())
        yield f"SIGKILL, {count} times in one run", f"{what}; {words}", survived and not problems
    for problem in problems:
        yield "SIGKILL", problem, False


def stale_lock(work, options, undisturbed, rng):
    folder = work / "stale"
    process = start(*options, "--out_dir", folder)
    wait_for_step(process, folder, 5)
    process.kill()
    finish(process)
    there = (folder / "run.lock").exists()
    survived, words = ends_as_undisturbed(folder, undisturbed)
    yield "lock of a killed process", f"run.lock {'was' if there else 'was not'} left behind; {words}", there and survived


def signals(work, options, undisturbed, rng):
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = work / number.name
        process = start(*options, "--out_dir", folder)
        wait_for_step(process, folder, rng.randrange(2, 20))
        process.send_signal(number)
        code, errors = finish(process)
        saved = saved_step(folder) == steps_logged(folder)
        survived, words = ends_as_undisturbed(folder, undisturbed)
        yield number.name, f"exit code {code}, {'its last step saved' if saved else 'its last step lost'}; {words}", \
            code == 128 + number and saved and survived and "Traceback" not in errors


def two_runs(work, options, undisturbed, rng):
    folder, said = work / "two", []
    process = start(*options, "--out_dir", folder)
    wait_for_step(process, folder, 2)
    for how in ([], ["--resume"], ["--overwrite"]):
        process.send_signal(signal.SIGSTOP)  # the first must live while the second starts, which takes seconds
        second = refused(finish(start("--out_dir", folder, *([] if how == ["--resume"] else options), *how)), "another process is at work")
        said.append(second)
        process.send_signal(signal.SIGCONT)
    code, _ = finish(process)
    found = differences(folder, undisturbed) if code == 0 else ["nothing"]
    yield "a second run on a folder: plain, --resume, --overwrite", \
        f"{sum(said)} of 3 refused, nothing touched: the first ended {'bit-identical' if not found else 'otherwise'}", all(said) and not found
    pair = [start(*options, "--out_dir", work / "pair") for _ in range(2)]
    codes = sorted(finish(process)[0] for process in pair)
    found = differences(work / "pair", undisturbed)
    yield "two runs started at once on a new folder", f"exit codes {codes}, the run {'bit-identical' if not found else 'differs'}", codes == [0, 2] and not found


def full_disk(work, options, undisturbed, rng):
    disk, size = work / "disk", (undisturbed / "checkpoint.pt").stat().st_size
    disk.mkdir()
    limit = int(2.5 * size)  # room for two checkpoints; saving needs three
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", str(disk)], capture_output=True).returncode == 0
    try:
        if mounted:
            code, errors = finish(start(*options, "--out_dir", disk / "run"))
            survived = refused((code, errors), "No space left" if "No space left" in errors else "disk is full")
            step = saved_step(disk / "run")
            subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(disk)], check=True)
        else:  # every file ends early: the write fails just so
            import resource

            def limited():
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

            code, errors = finish(start(*options, "--max_steps", 4, "--out_dir", disk / "run"))
            code, errors = finish(start("--resume", "--max_steps", steps_logged(undisturbed), "--out_dir", disk / "run", preexec_fn=limited))
            survived, step = refused((code, errors), "still the one from before"), saved_step(disk / "run")
        again, words = ends_as_undisturbed(disk / "run", undisturbed)
        yield f"a full disk ({'tmpfs' if mounted else 'RLIMIT_FSIZE'})", f"exit code {code}, one line, checkpoint of step {step} kept; with room again {words}", \
            survived and again and step > 0
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def damaged_checkpoint(work, options, undisturbed, rng):
    folder = work / "damaged"
    shutil.copytree(undisturbed, folder)
    path, previous = folder / "checkpoint.pt", str(folder / "checkpoint.prev.pt")
    whole = path.read_bytes()

    def caught(content):
        path.write_bytes(content)
        try:
            load_checkpoint(folder)
        except ValueError as error:
            return "damaged" in str(error) and previous in str(error)
        return False

    lengths = [rng.randrange(len(whole)) for _ in range(100)] + [len(whole) - 1, len(whole) - 71, 0]
    number = sum(caught(whole[:length]) for length in lengths)
    result = finish(start("--resume", "--out_dir", folder))
    yield "a truncated checkpoint", f"{number} of {len(lengths)} lengths refused, the checkpoint before named; --resume exit code {result[0]}", \
        number == len(lengths) and refused(result, previous)
    number = 0
    for bit in (bits := [rng.randrange(8 * len(whole)) for _ in range(300)] + [8 * (len(whole) - i) - 1 for i in range(1, 72)]):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        number += caught(flipped)
    result = finish(start("--resume", "--out_dir", folder))
    path.unlink()  # as the message says
    survived, words = ends_as_undisturbed(folder, undisturbed)
    yield "a flipped bit in a checkpoint", f"{number} of {len(bits)} bits refused; --resume exit code {result[0]}; from the checkpoint before {words}", \
        number == len(bits) and refused(result, previous) and survived


def truncated_data(work, options, undisturbed, rng):
    at = options.index("--data_dir") + 1
    folder, data = work / "cut", work / "data"
    shutil.copytree(options[at], data)
    process = start(*options[:at], data, *options[at + 1 :], "--out_dir", folder)
    wait_for_step(process, folder, 10)
    whole = (data / "train.bin").read_bytes()
    os.truncate(data / "train.bin", 100)
    code, _ = finish(process)
    step = saved_step(folder)
    result = finish(start("--resume", "--out_dir", folder))
    (data / "train.bin").write_bytes(whole)
    survived, words = ends_as_undisturbed(folder, undisturbed)
    name = f"dies of {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    yield "train.bin truncated under a run", f"the run {name} at its next look (a memory map has no other way), the checkpoint of step {step} is whole; " \
        f"--resume exit code {result[0]}, names the file; with the file restored {words}", code != 0 and step > 0 and refused(result, "train.bin", "truncated") and survived


def nan_gradient(work, options, undisturbed, rng):
    folder, step = work / "nan", rng.randrange(5, 15)
    code, errors = finish(start(*options, "--out_dir", folder, fault=f"nan:{step}"))
    named = f"at step {step}: stopped before the update; the last good checkpoint is {folder / 'checkpoint.pt'}" in errors
    kept = saved_step(folder)
    survived, words = ends_as_undisturbed(folder, undisturbed)
    yield "NaN in a gradient", f"exit code {code} at step {step}, checkpoint of step {kept} {'named' if named else 'not named'}; {words}", \
        code == 1 and named and kept == step - 1 and survived


def clock(work, options, undisturbed, rng):
    folder = work / "clock"
    code, errors = finish(start(*options, "--out_dir", folder, fault="clock:1"))
    speeds = [json.loads(line)["tokens_per_second"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sound, found = all(0 < speed < math.inf for speed in speeds), differences(folder, undisturbed)
    yield "clocks (wall and monotonic) that run backwards", f"exit code {code}, the run {'differs' if found else 'bit-identical'}", code == 0 and sound and not found


FAULTS = (kills, stale_lock, signals, two_runs, full_disk, damaged_checkpoint, truncated_data, nan_gradient, clock)

# ---------------------------------------------------------------------------------------------------------------------


def run_options(arguments):
    """A save at every step, so that saving is where a kill mostly strikes."""
    return ["--preset", arguments.preset, "--max_steps", str(arguments.steps), "--save_every", "1", "--eval_every", str(max(1, arguments.steps // 4)),
            "--dropout", "0.1", "--device", "cpu", "--threads", "1", "--data_dir", str(arguments.data_dir)]  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", default="tiny", choices=list(gpt.PRESETS), help="shape of the model (default tiny)")
    parser.add_argument("--steps", type=int, default=300, help="steps of every run (default 300)")
    parser.add_argument("--kills", type=int, default=30, help="kills of the killed run (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places (default 0)")
    parser.add_argument("--data_dir", default="data/python", help="prepared data set (default data/python, made if missing)")
    parser.add_argument("--results", default=str(ROOT / "experiments/results/torture.md"), help="file to write")
    parser.add_argument("--faults", default=",".join(fault.__name__ for fault in FAULTS), help="comma-separated (default: all, %(default)s)")
    arguments = parser.parse_args(argv)
    chosen = {fault.__name__: fault for fault in FAULTS if fault.__name__ in arguments.faults.split(",")}
    if unknown := set(arguments.faults.split(",")) - set(chosen):
        parser.error(f"no fault {', '.join(sorted(unknown))}: choose from {', '.join(fault.__name__ for fault in FAULTS)}")
    if arguments.kills < 1 or arguments.steps < 2 * arguments.kills or arguments.steps < 40:
        parser.error("kills must be at least 1, and steps at least 40 and twice as many as kills")
    began, rng, rows = time.monotonic(), random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as work:
        work, options = Path(work), run_options(arguments)
        code, errors = finish(start(*options, "--out_dir", work / "undisturbed"))
        if code:
            raise SystemExit(f"error: the undisturbed run ended with {code}: {errors}")
        for fault in chosen.values():
            extra = (arguments.kills,) if fault is kills else ()
            for name, what, survived in fault(work, options, work / "undisturbed", rng, *extra):
                rows.append(f"| {name} | {what.replace(str(work), '').replace('|', '/')} | {'yes' if survived else '**NO**'} |")
                print(rows[-1], flush=True)
                write(arguments, argv, rows, time.monotonic() - began)
    raise SystemExit(1 if any("**NO**" in row for row in rows) else 0)


def write(arguments, argv, rows, seconds):
    command = "python experiments/torture.py " + " ".join(sys.argv[1:] if argv is None else argv)
    machine = f"{platform.machine()} CPU, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, {seconds / 60:.0f} minutes"
    Path(arguments.results).write_text("\n".join([
        "# What a run survives", "", f"`{command.strip()}` ({machine})", "",
        f"Every run: preset {arguments.preset}, {arguments.steps} steps, a checkpoint at every step. \"Bit-identical\": weights, optimiser state, random",
        "state and every logged number but the speeds equal those of an undisturbed run.", "",
        "| fault | what happened | survived |", "|---|---|---|", *rows, "",
        f"{sum('**NO**' not in row for row in rows)} of {len(rows)} survived.", ""]))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
