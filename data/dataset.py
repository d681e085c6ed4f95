"""Prepared data sets: the folder format, its only reader, and the batches a training run sees.

    train.bin, val.bin   token ids, raw little-endian uint16 (uint32 for a vocabulary above 65,536), documents one after
                         another, an end-of-text token after each
    tokenizer.json       written by data/tokenizer.py
    meta.json            format, dtype, vocab_size, end_of_text; of each split its tokens, bytes of text, documents and
                         SHA-256; the tokenizer; where the text came from

File names are fixed, so a meta.json from somewhere else cannot point outside its folder. Read before: data/tokenizer.py;
read next: data/prepare.py, which writes such folders. `python data/dataset.py` shows the sampler on a small example.
"""

import hashlib
import math
import re
import sys
from functools import cached_property
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a program: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.tokenizer import FILE_NAME as TOKENIZER_FILE
from data.tokenizer import MAX_VOCAB_SIZE, Tokenizer, load_tokenizer, read_json

META_FILE = "meta.json"
SPLITS = {"train": "train.bin", "val": "val.bin"}
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
CHECKED_BYTES = 256 << 20  # what open_dataset hashes unasked: a fraction of a second


class Dataset:
    """A prepared folder. `train` and `val` are read-only memory maps of token ids, shape (tokens,)."""

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.vocab_size: int = meta["vocab_size"]
        self.end_of_text: int = meta["end_of_text"]
        self.fingerprint: str = fingerprint(meta)
        self.train, self.val = (np.memmap(folder / name, DTYPES[meta["dtype"]], "r") for name in SPLITS.values())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """ValueError if tokenizer.json is not the one the data was made with."""
        path = self.folder / TOKENIZER_FILE
        if _sha256(path) != self.meta["tokenizer"]["sha256"]:
            raise ValueError(f"{path} is not the file meta.json describes (SHA-256 differs); prepare the data again")
        tokenizer = load_tokenizer(path)
        if (tokenizer.vocab_size, tokenizer.end_of_text) != (self.vocab_size, self.end_of_text):
            raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, the data set {self.vocab_size}; prepare the data again")
        return tokenizer

    def bits_per_byte(self, loss: float, split: str = "val") -> float:
        """Turns nats per token into bits per byte of text, which compares models with different tokenizers."""
        entry = self.meta["splits"][split]
        return loss / math.log(2) * entry["tokens"] / entry["bytes"]


def open_dataset(folder, verify: bool | None = None) -> Dataset:
    """Opens a prepared folder; raises FileNotFoundError or ValueError, in one line, for anything that is not one.

    Types in meta.json and file sizes are always checked. `verify=True` also reads the files: SHA-256, and that every id
    lies in the vocabulary; `None` does so if they are small, `False` never.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set at {folder}: make one with python data/prepare.py --out_dir {folder}")
    if not (folder / META_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not a prepared data set (no {META_FILE}); make one with python data/prepare.py")
    meta = read_json(folder / META_FILE, 1 << 20)
    _check_meta(meta, folder / META_FILE)
    itemsize = DTYPES[meta["dtype"]].itemsize
    for split, name in SPLITS.items():
        path, tokens = folder / name, meta["splits"][split]["tokens"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; prepare the data again")
        if path.stat().st_size != tokens * itemsize:
            raise ValueError(f"{path} has {path.stat().st_size} bytes where {META_FILE} says {tokens * itemsize}: truncated "
                             "or changed; prepare the data again")
    if not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(f"{folder / TOKENIZER_FILE} is missing; prepare the data again")
    dataset = Dataset(folder, meta)
    if verify or (verify is None and dataset.train.nbytes + dataset.val.nbytes <= CHECKED_BYTES):
        _verify(dataset)
    return dataset


def fingerprint(meta: dict) -> str:
    """Sixteen hexadecimal digits that follow from the contents of both splits and the tokenizer, and nothing else."""
    hashes = [meta["splits"]["train"]["sha256"], meta["splits"]["val"]["sha256"], meta["tokenizer"]["sha256"]]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


class WindowSampler:
    """Which windows of `block_size` tokens a training step sees: a pure function of (seed, step, rank).

    Epoch e cuts the tokens, taken as a circle, into n = len(tokens) // block_size windows side by side, from a random
    start, and visits each once in a random order. The joint of the circle is the end of a document like any other. The
    order is a keyed permutation computed index by index: no memory, nothing to save in a checkpoint, and, unlike
    numpy's own shuffles, the same in every version.

    ValueError if block_size < 1 or there are not block_size + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int = 0):
        _check_length(tokens, block_size)
        self.tokens, self.block_size, self.seed = np.asarray(tokens), block_size, seed
        self.windows_per_epoch = len(tokens) // block_size

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Where the windows number `samples`, counted from the start of the run, begin: int64, same shape."""
        n, starts = self.windows_per_epoch, np.empty(len(samples), np.int64)
        epochs, positions = np.divmod(np.asarray(samples, np.int64), n)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = _mix(_mix(np.uint64(self.seed % 2**64)) ^ np.uint64(epoch))
            offset = int(_mix(key) % np.uint64(len(self.tokens)))
            starts[chosen] = (offset + _permute(positions[chosen], n, key) * self.block_size) % len(self.tokens)
        return starts

    def batch(self, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1, micro_step: int = 0,
              grad_accum: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), each int64 of shape (batch_size, block_size), targets one position ahead.

        A step takes grad_accum * world_size * batch_size consecutive samples: the ranks' rows of one micro-step, one
        after another, are the rows of one process with batch world_size * batch_size, and the micro-steps, one
        after another, the rows of one batch grad_accum times as large.
        """
        first = ((step * grad_accum + micro_step) * world_size + rank) * batch_size
        return _windows(self.tokens, self.starts(np.arange(first, first + batch_size)), self.block_size)


def validation_windows(tokens: np.ndarray, block_size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), int64 (count, block_size): a fixed set, evenly spread and without overlap; fewer if not so many fit."""
    _check_length(tokens, block_size)
    count = max(1, min(count, (len(tokens) - 1) // block_size))
    last = len(tokens) - 1 - block_size
    return _windows(tokens, np.arange(count) * last // max(1, count - 1), block_size)


def _windows(tokens, starts, block_size):
    inputs = np.empty((len(starts), block_size), np.int64)
    targets = np.empty_like(inputs)
    for row, start in enumerate(starts):
        window = tokens[start : start + block_size + 1]
        if len(window) <= block_size:  # over the joint of the circle
            window = np.concatenate([window, tokens[: block_size + 1 - len(window)]])
        inputs[row], targets[row] = window[:-1], window[1:]
    return inputs, targets


def _permute(positions: np.ndarray, n: int, key: np.uint64) -> np.ndarray:
    """A keyed bijection of range(n): a Feistel network on the next even number of bits, applied again until the value
    is back inside ("cycle walking", Black and Rogaway 2002), which takes at most four tries on average."""
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(6):
            left, right = right, left ^ (_mix(right ^ _mix(key ^ np.uint64(round_number))) & mask)
        values[outside] = left << half | right
        outside = values >= n
    return values.astype(np.int64)


def _mix(value):
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): 64 bits to 64 bits, elementwise."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return value ^ value >> np.uint64(31)


def _check_length(tokens, block_size):
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    if len(tokens) < block_size + 1:
        raise ValueError(f"{len(tokens)} tokens are too few for block_size {block_size}, which needs {block_size + 1}: "
                         "use more text or a smaller block_size")


def _check_meta(meta: dict, path: Path) -> None:
    def need(condition, what):
        if not condition:
            raise ValueError(f"{path} is malformed: {what}; prepare the data again")

    def integer(value, low, high):
        return type(value) is int and low <= value <= high

    need(integer(meta.get("format"), 1, 1), "'format' is not 1")
    need(isinstance(meta.get("dtype"), str) and meta["dtype"] in DTYPES, "'dtype' is neither uint16 nor uint32")
    limit = min(MAX_VOCAB_SIZE, 2 ** (8 * DTYPES[meta["dtype"]].itemsize))
    need(integer(meta.get("vocab_size"), 2, limit), f"'vocab_size' is not between 2 and {limit}")
    need(integer(meta.get("end_of_text"), 0, meta["vocab_size"] - 1), "'end_of_text' is not in the vocabulary")
    entries = meta.get("splits")
    need(isinstance(entries, dict), "'splits' is not an object")
    for name, entry, file in [(f"splits.{split}", entries.get(split), file) for split, file in SPLITS.items()] + \
                             [("tokenizer", meta.get("tokenizer"), TOKENIZER_FILE)]:
        need(isinstance(entry, dict), f"'{name}' is not an object")
        need(entry.get("file") == file, f"'{name}.file' is not {file}")
        need(isinstance(entry.get("sha256"), str) and re.fullmatch("[0-9a-f]{64}", entry["sha256"]), f"'{name}.sha256' is no SHA-256")
        for key in ("tokens", "bytes", "documents") if name != "tokenizer" else ():
            need(integer(entry.get(key), 1, 2**48), f"'{name}.{key}' is not a positive number")
    for name, text in (("source", meta.get("source")), ("tokenizer.name", meta["tokenizer"].get("name"))):
        need(isinstance(text, str) and len(text) <= 300 and text.isprintable(), f"'{name}' is not a name")


def _verify(dataset: Dataset) -> None:
    for split, name in SPLITS.items():
        tokens = getattr(dataset, split)
        if _sha256(dataset.folder / name) != dataset.meta["splits"][split]["sha256"]:
            raise ValueError(f"{dataset.folder / name} is not the file that was prepared (SHA-256 differs); prepare the data again")
        for start in range(0, len(tokens), 1 << 24):
            top = int(tokens[start : start + (1 << 24)].max())
            if top >= dataset.vocab_size:
                raise ValueError(f"{dataset.folder / name} holds token id {top}, outside its vocabulary of {dataset.vocab_size}; "
                                 "prepare the data again")
    if _sha256(dataset.folder / TOKENIZER_FILE) != dataset.meta["tokenizer"]["sha256"]:
        raise ValueError(f"{dataset.folder / TOKENIZER_FILE} is not the file that was prepared (SHA-256 differs); prepare the data again")


def _sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sampler = WindowSampler(np.arange(26), block_size=5, seed=1)
    print(f"26 tokens in windows of 5: {sampler.windows_per_epoch} windows an epoch, by their first token")
    for epoch in range(3):
        samples = np.arange(sampler.windows_per_epoch) + epoch * sampler.windows_per_epoch
        print(f"  epoch {epoch}: {sampler.starts(samples).tolist()}")
    print("step 1, batch 4:", sampler.batch(1, 4)[0][:, 0].tolist())
    print("the same, by 2 ranks:", [sampler.batch(1, 2, rank=rank, world_size=2)[0][:, 0].tolist() for rank in (0, 1)])
    print("validation windows:", validation_windows(np.arange(26), 5, 3)[0][:, 0].tolist())
    default = Path(__file__).parent / "python"
    if default.exists():
        data = open_dataset(default)
        print(f"{default.name}: {len(data.train)} + {len(data.val)} tokens, fingerprint {data.fingerprint}")
        print("  begins:", repr(data.tokenizer.decode(data.train[:24])))
