"""A model on disk: save, find and load the checkpoints of run folders.

They are `torch.save` of a plain dict of tensors, numbers, strings, lists and dicts, read with weights_only=True:
nothing in a file is ever executed. `load_checkpoint` takes Hugging Face models as well (huggingface.py). Read
`model.py` first and `train.py` next.
"""

import os
import zipfile
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten

import torch

from huggingface import find_pretrained, load_pretrained
from model import GPT, GPTConfig
from options import replace_file

FORMAT = "nanomea-3"


def save_checkpoint(folder, state):
    """Write `state` as folder/checkpoint.pt and keep the one before as checkpoint.prev.pt. Raises OSError.

    Written beside, flushed to the disk, then renamed: a kill or a full disk at any moment leaves a whole checkpoint,
    between the two renames as checkpoint.prev.pt.
    """
    folder = Path(folder)
    new, current = folder / "checkpoint.tmp", folder / "checkpoint.pt"
    try:
        with open(new, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if current.exists():
            replace_file(current, folder / "checkpoint.prev.pt")
        replace_file(new, current)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its own
        new.unlink(missing_ok=True)
        earlier = [path for path in (current, folder / "checkpoint.prev.pt") if path.exists()]
        kept = f"{earlier[0]} is still the one from before" if earlier else "there is no earlier one"
        reason = error.strerror if isinstance(error, OSError) else "the disk is full or the file could not be written"
        raise OSError(f"could not save a checkpoint in {folder} ({reason}); {kept}") from error
    if os.name == "posix":  # the renames themselves must survive a power cut
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def find_checkpoint(path):
    """The file that `path` means: itself, the newest in a run folder, or a Hugging Face folder's config.json or .gguf.

    What is not on this disk and looks like OWNER/NAME is fetched from the hub. Raises FileNotFoundError or ValueError.
    """
    if theirs := find_pretrained(path):
        return theirs
    path = Path(path)
    for candidate in [path] if path.is_file() else [path / "checkpoint.pt", path / "checkpoint.prev.pt"]:
        if candidate.is_file() and candidate.name != "config.json":
            return candidate
    what = "run folder that train.py made, a checkpoint.pt in it, a Hugging Face folder, or a model's name on the hub"
    raise FileNotFoundError(f"no checkpoint at {path}: give a {what}")


def load_checkpoint(path, device="cpu"):
    """(model in eval mode, state) from a run folder, a checkpoint file, a Hugging Face folder, name or .gguf file.

    The archive's own CRCs find damage before anything is read. The state of a Hugging Face model has `model`, `config`
    and `pretrained` only (see `load_pretrained`). Raises FileNotFoundError, OSError or ValueError, in one line.
    """
    path = find_checkpoint(path)
    if path.name == "config.json" or path.suffix == ".gguf":
        return load_pretrained(path, device)
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise anything, OSError too, for a file that is none of theirs
        why = "pickled code is never run" if "Weights only" in str(error) else shorten(str(error), 100)
        previous = path.with_name("checkpoint.prev.pt")
        advice = f"; the one before it is {previous}: to go on from there, move {path.name} away"
        advice = advice if previous.is_file() and previous != path else ""
        raise ValueError(f"{path} is damaged or not a checkpoint ({why or type(error).__name__}){advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project (format {FORMAT!r} is missing)")
    try:
        config = GPTConfig(**known_settings(GPTConfig, state["config"]))
        with torch.device("meta"):  # shapes without memory: the weights of the file become the model's
            model = GPT(config)
        # Into a copy: torch notes `assign` in the dict itself, and whoever loads it next would break the model's ties.
        model.load_state_dict(dict(state["model"]), assign=True)
        model = model.on_device(device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold a whole model: {shorten(str(error), 300)}") from error
    return model, state | dict(config=asdict(config))


def known_settings(cls, settings):
    """`settings` without fields that `cls` no longer has, as long as they were unset (None, 0, False or empty)."""
    return {name: value for name, value in settings.items() if name in cls.__dataclass_fields__ or value}


def starts_bare(state):
    """Whether a checkpoint's model saw no start of text: one trained here from scratch, not one from elsewhere."""
    return "data" in state and not state.get("start_of_text", False)
