"""What every program here shares: a dataclass as its command line, errors in one line, the machine it runs on.

The options of a program are the fields of one dataclass: `option` declares one, `parse_options` reads the command line,
and `check_options` holds values to their declared types and bounds. Nothing here depends on another file of this
repository. Import this file before torch: it sets how torch's threads wait.
"""

import os

# A waiting thread soon goes to sleep, unless the environment says otherwise. Spinning, the default, can be 30 times
# slower on a busy machine; never spinning loses a tenth on an idle one. OpenMP reads this once, when torch is loaded.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"} | os.environ

import argparse
import contextlib
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import field, fields
from operator import ge, gt, le, lt
from pathlib import Path
from textwrap import shorten
from typing import get_args

WINDOWS = os.name == "nt"

# ---------------------------------------------------------------------------------------------------------------------
# The command line


BOUNDS = {"least": ("at least", ge), "above": ("above", gt), "most": ("at most", le), "below": ("below", lt)}


def option(default, help, choices=None, group="", expand=True, **bounds):
    """A dataclass field that `parse_options` turns into --name. `bounds` of a number are some of BOUNDS.

    --help lists the options of a `group` together. In a string a ~ that begins a path becomes the home folder, unless
    `expand` is False.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, group=group, expand=expand, bounds=bounds))


def parse_options(cls, argv=None, presets=None):
    """An instance of dataclass `cls` from the command line, and the set of names that were given there.

    Every field with a help text and a scalar type is an option. A preset (--preset, looked up in `presets`) changes
    defaults; what is given beside it wins. Anything wrong ends the program with one line and exit code 2.
    """
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, usage="%(prog)s [options]")
    parser = OneLineParser(description=sys.modules[cls.__module__].__doc__, **how)
    groups = {name: parser.add_argument_group(name) for name in getattr(cls, "groups", ())}
    for f in fields(cls):
        kind = next((k for k in (bool, int, float, str) if k in (get_args(f.type) or (f.type,))), None)
        if kind is None or "help" not in f.metadata:
            continue
        help = f.metadata["help"].replace("%", "%%") + ("" if f.default in (None, "") else f" (default {f.default})")
        if kind is bool:
            how = dict(nargs="?", const=True, type=yes_or_no, metavar="yes|no")
        elif f.metadata["choices"]:
            how = dict(type=kind, choices=f.metadata["choices"])
        else:
            how = dict(type=kind, metavar=kind.__name__)
        if kind is str and f.metadata["expand"] and not f.metadata["choices"]:
            how["type"] = expand_home
        group = groups.get(f.metadata["group"] or "model", parser)
        group.add_argument("--" + f.name, default=argparse.SUPPRESS, help=help, **how)
    given = vars(parser.parse_args(argv))
    preset = presets[given.get("preset", cls.preset)] if presets else {}
    try:
        return check_options(cls(**{**preset, **given})), set(given)
    except ValueError as error:
        fail(error)


def check_options(options):
    """`options`, a dataclass. Raises ValueError, naming field, value and what would do, for a value of another type
    than declared, a number that is not finite or beyond 64 bits, or one outside the declared choices or bounds.
    """
    for f in fields(options):
        value, kinds, choices = getattr(options, f.name), get_args(f.type) or (f.type,), f.metadata.get("choices")
        wanted, right = " or ".join(kind.__name__ for kind in kinds), type(value) in kinds
        if type(value) in (int, float) and (right or float in kinds):
            bounds = [(*BOUNDS[name], limit) for name, limit in f.metadata.get("bounds", {}).items()]
            wanted = " and ".join(f"{words} {limit}" for words, _, limit in bounds) or "a finite number"
            right = all(holds(value, limit) for _, holds, limit in bounds)
            if right and not -(2**63) <= value < 2**63:  # what torch takes for a number
                wanted, right = "below 2**63 in size" if abs(value) < float("inf") else "a finite number", False
        elif choices and value is not None:
            wanted, right = f"one of {', '.join(choices)}", value in choices
        if not right:
            raise ValueError(f"{f.name} must be {wanted}, not {value!r}")
    return options


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the options)")


def expand_home(text):
    """`text` with the home folder for every ~ that begins a path: alone, in a list with commas, or behind hf:"""
    return re.sub(r"(?:^|(?<=,)|(?<=^hf:))~(?=[/\\]|$)", lambda _: str(Path.home()), text)


def shown_command(*words):
    """A command as a line to paste into a shell: words with a space or a ~ are quoted."""
    words = list(map(str, words))
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


def yes_or_no(text):
    if text.lower() in ("yes", "true", "1", "on"):
        return True
    if text.lower() in ("no", "false", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")


def fail(message):
    """End the program: one line on standard error, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def run_program(main):
    """Run `main()` as a well-behaved command: Ctrl-C and a reader that goes away end it without a traceback, and a
    terminal that cannot show a character shows another one."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `program | head`
        silence_output()
        sys.exit(141)


def say(text):
    """Print now. Where nobody reads any more, a program with work to finish goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        silence_output()


def silence_output():
    """Standard output goes nowhere from here on, what Python flushes at its end included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def progress(what, total=None, unit="B"):
    """tqdm's bar, with a rate and the time to go, for work that takes more than a second; without tqdm, plain lines."""
    try:
        from tqdm import tqdm
    except ImportError:
        return PlainProgress(what, total)
    closed = sys.stderr is None
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, delay=1, mininterval=1, leave=False, disable=closed)


class PlainProgress:
    """A line on standard error every three seconds: how much of the work is done."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.said = what, total, 0, time.monotonic()

    def update(self, amount):
        self.done += amount
        if sys.stderr and time.monotonic() > self.said + 3:
            self.said = time.monotonic()
            share = f": {self.done / self.total:.0%}" if self.total else ""
            print(f"{self.what}{share}", file=sys.stderr, flush=True)

    def close(self):
        pass


def split_list(text):
    """The parts of an option's text with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def choose_device(name="auto"):
    """torch.device for an option's text. Raises ValueError if this machine has no such device."""
    import torch

    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if name == "auto":
        mps = torch.backends.mps.is_available() and not several
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if several and name.startswith("cuda"):  # under torchrun each process takes the GPU of its rank
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not available here; leave --device out or use cpu") from error
    return device


def choose_dtype(name, device):
    """The autocast dtype: "auto" is bfloat16 where the hardware multiplies it faster than float32."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:  # without bfloat16 instructions a CPU would convert back and forth
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    import torch

    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or ValueError, in one line, for anything that is not one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    refuse_pointer(path)
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def refuse_pointer(path):
    """Raise ValueError if a clone without git-lfs left three lines in place of the file."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a git-lfs pointer, not the file itself: run git lfs pull in its folder")


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path, text):
    """Write a text file beside its place, flush it to the disk and rename it: at any moment the old file or the new."""
    new = Path(path).with_name(Path(path).name + ".tmp")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    replace_file(new, path)


def replace_file(source, target, tries=20):
    """os.replace; Windows refuses it while another program, a virus scanner perhaps, has a file open: try for 2 s."""
    for attempt in range(1, tries + 1):
        try:
            return os.replace(source, target)
        except PermissionError:
            if not WINDOWS or attempt == tries:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def new_folder(folder, overwrite=False):
    """A folder to write into, which becomes `folder` once all is written and flushed and nothing went wrong.

    Raises FileExistsError if there is something at its place and `overwrite` is False, or OSError.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]) and not overwrite:
        raise FileExistsError(f"{folder} exists already: give a new folder, or remove it first")
    new, old = (folder.with_name(f".{folder.name}.{which}-{os.getpid()}") for which in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError as error:
        raise OSError(f"could not write {folder} ({error.strerror or error}); what was there before stays") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():  # stopped between the renames
            os.rename(old, folder)
        shutil.rmtree(old, ignore_errors=True)


def save_picture(path, draw):
    """Write the figure that draw(pyplot) returns. Returns a line that says where it is, or, without matplotlib, how to
    get one."""
    try:
        if "matplotlib.pyplot" not in sys.modules:  # a notebook shows its own figures
            os.environ["MPLBACKEND"] = "agg"
        from matplotlib import pyplot

        figure = draw(pyplot)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
    except ImportError:
        return f"no {Path(path).name}: pip install matplotlib"
    except Exception as error:  # a backend that is not there, a full disk: the work it shows is done and stays
        return f"no {Path(path).name} ({shorten(str(error), 100)})"
    return f"picture: {path}"
