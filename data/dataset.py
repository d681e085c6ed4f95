"""Prepared data sets: the folder format, its only reader, and the batches a training run sees.

    train.bin, val.bin   token ids, raw little-endian uint16 (uint32 for a vocabulary above 65,536), documents one after
                         another, an end-of-text token after each
    train-00000.bin ...  or shards of llm.c and modded-nanogpt: a header of 256 int32 (magic, version, count), then ids
    tokenizer.json       written by data/tokenizer.py
    meta.json            format, dtype, vocab_size, end_of_text; of each split its tokens, bytes of text, documents and
                         SHA-256; the tokenizer; where the text came from

Read before: data/tokenizer.py; read next: data/prepare.py, which writes such folders. `python data/dataset.py` shows
the sampler.
"""

import hashlib
import math
import sys
from functools import cached_property
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a program: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.tokenizer import FILE_NAME as TOKENIZER_FILE
from data.tokenizer import Tokenizer, load_tokenizer, progress
from options import read_json, sha256

META_FILE = "meta.json"
SPLITS = {"train": "train.bin", "val": "val.bin"}
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
HEADER_BYTES = 1024  # of a shard
CHECKED_BYTES = 256 << 20  # what open_dataset hashes unasked: a fraction of a second
AGAIN = "prepare the data again"


class Dataset:
    """A prepared folder. `train` and `val` are its token ids, read-only: memory maps of shape (tokens,) or `Shards`.
    `fingerprint` follows from the contents of both and of the tokenizer, and nothing else."""

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.vocab_size: int = meta["vocab_size"]
        self.end_of_text: int = meta["end_of_text"]
        self.train, self.val = (open_split(folder, meta["dtype"], split, meta["splits"][split]) for split in SPLITS)
        parts = [meta["splits"]["train"], meta["splits"]["val"], meta["tokenizer"]]
        self.fingerprint = hashlib.sha256("".join(part["sha256"] for part in parts).encode()).hexdigest()[:16]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """ValueError if tokenizer.json is not the one the data was made with."""
        path = self.folder / TOKENIZER_FILE
        if sha256(path) != self.meta["tokenizer"]["sha256"]:
            raise ValueError(f"{path} is not the file that was prepared (SHA-256 differs); {AGAIN}")
        return load_tokenizer(path)

    def bits_per_byte(self, loss: float, split: str = "val") -> float:
        """Turns nats per token into bits per byte of text, which compares models with different tokenizers."""
        entry = self.meta["splits"][split]
        return loss / math.log(2) * entry["tokens"] / entry["bytes"]


class Shards:
    """Several arrays of tokens as one: `len`, and slices of step 1, which read no more than what they span."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])
        self.nbytes = sum(array.nbytes for array in arrays)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index: slice):
        start, stop, _ = index.indices(len(self))
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        offset = int(self.ends[first - 1]) if first else 0
        parts = []
        for array in self.arrays[first : last + 1]:
            parts.append(array[max(0, start - offset) : max(0, stop - offset)])
            offset += len(array)
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self.arrays[0][:0]])


def open_dataset(folder, verify: bool | None = None) -> Dataset:
    """Opens a prepared folder; raises FileNotFoundError or ValueError, in one line, for anything that is not one.

    The sizes of files are always checked. `verify=True` also reads the tokens: SHA-256, and that every id lies in the
    vocabulary; `None` does so if they are small, `False` never.
    """
    folder = Path(folder)
    if not (folder / META_FILE).is_file():
        raise FileNotFoundError(f"no data set at {folder}: make one with python data/prepare.py --out_dir {folder}")
    meta = read_json(folder / META_FILE)
    if meta.get("format") != 1:
        raise ValueError(f"{folder / META_FILE} is not what data/prepare.py writes; {AGAIN}")
    dataset = Dataset(folder, meta)
    if verify or (verify is None and dataset.train.nbytes + dataset.val.nbytes <= CHECKED_BYTES):
        for split, name in SPLITS.items():
            digest, _ = scan_tokens(getattr(dataset, split), dataset.vocab_size, folder / name)
            if digest != meta["splits"][split]["sha256"]:
                raise ValueError(f"{folder / name} is not the file that was prepared (SHA-256 differs); {AGAIN}")
    return dataset


def open_split(folder: Path, dtype: str, split: str, entry: dict):
    """The tokens of a split, mapped from its one file or its shards."""
    if "shards" not in entry:
        return map_tokens(folder / SPLITS[split], dtype, entry["tokens"])
    arrays = [map_tokens(folder / shard_file(split, i), dtype, n, HEADER_BYTES) for i, n in enumerate(entry["shards"])]
    return arrays[0] if len(arrays) == 1 else Shards(arrays)


def shard_file(split: str, number: int) -> str:
    return f"{split}-{number:05}.bin"


def map_tokens(path: Path, dtype: str, tokens: int, offset: int = 0) -> np.ndarray:
    """A file of `tokens` ids as a memory map. FileNotFoundError or ValueError if it is gone or has another size."""
    if not path.is_file():
        gone = f"leads to {path.readlink()}, which is gone" if path.is_symlink() else "is missing"
        raise FileNotFoundError(f"{path} {gone}; {AGAIN}")
    size, expected = path.stat().st_size, tokens * DTYPES[dtype].itemsize + offset
    if size != expected or not tokens:
        raise ValueError(f"{path.resolve()} has {size} bytes where {expected} are expected: truncated or changed")
    return np.memmap(path, DTYPES[dtype], "r", offset)


def scan_tokens(tokens, vocab_size: int, name) -> tuple[str, np.ndarray]:
    """(SHA-256 of the ids, how often each occurs: (vocab_size,)). ValueError for an id outside the vocabulary."""
    digest, counts = hashlib.sha256(), np.zeros(vocab_size, np.int64)
    bar = progress(f"checking {name}", tokens.nbytes)
    for start in range(0, len(tokens), 1 << 22):
        block = tokens[start : start + (1 << 22)]
        if block.max() >= vocab_size:
            raise ValueError(f"{name} holds token id {block.max()}, outside the vocabulary of {vocab_size}")
        digest.update(block.tobytes())
        counts += np.bincount(block, minlength=vocab_size)
        bar.update(block.nbytes)
    bar.close()
    return digest.hexdigest(), counts


class WindowSampler:
    """Which windows of `block_size` tokens a training step sees: a pure function of (seed, step, rank).

    Epoch e cuts the tokens, taken as a circle, into n = len(tokens) // block_size windows side by side, from a random
    start, and visits each once in a random order. The joint of the circle is the end of a document like any other. The
    order is a keyed permutation computed index by index: no memory, nothing to save in a checkpoint, and, unlike
    numpy's own shuffles, the same in every version. ValueError if there are not block_size + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray | Shards, block_size: int, seed: int = 0):
        check_length(tokens, block_size)
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.windows_per_epoch = len(tokens) // block_size

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Where the windows number `samples`, counted from the start of the run, begin: int64, same shape."""
        n, starts = self.windows_per_epoch, np.empty(len(samples), np.int64)
        epochs, positions = np.divmod(samples, n)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = mix(mix(np.uint64(self.seed % 2**64)) ^ np.uint64(epoch))
            offset = int(mix(key) % np.uint64(len(self.tokens)))
            starts[chosen] = (offset + permute(positions[chosen], n, key) * self.block_size) % len(self.tokens)
        return starts

    def batch(
        self,
        step: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_step: int = 0,
        grad_accum: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), each int64 of shape (batch_size, block_size), targets one position ahead.

        A step takes grad_accum * world_size * batch_size consecutive samples: the ranks' rows of one micro-step, one
        after another, are the rows of one process with batch world_size * batch_size, and the micro-steps, one
        after another, the rows of one batch grad_accum times as large.
        """
        first = ((step * grad_accum + micro_step) * world_size + rank) * batch_size
        return self.windows(np.arange(first, first + batch_size))

    def windows(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of the windows number `samples`, each int64 (samples, block_size)."""
        return cut_windows(self.tokens, self.starts(samples), self.block_size)


def validation_windows(tokens: np.ndarray | Shards, block_size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), int64 (count, block_size): a fixed set, evenly spread and without overlap.

    Fewer than `count` if not so many fit; ValueError if there are not block_size + 1 tokens.
    """
    check_length(tokens, block_size)
    count = max(1, min(count, (len(tokens) - 1) // block_size))
    last = len(tokens) - 1 - block_size
    return cut_windows(tokens, np.arange(count) * last // max(1, count - 1), block_size)


def check_length(tokens, block_size):
    if len(tokens) <= block_size:
        raise ValueError(
            f"{len(tokens)} tokens are too few for block_size {block_size}: use more text or a smaller one"
        )


def cut_windows(tokens, starts, block_size):
    inputs = np.empty((len(starts), block_size), np.int64)
    targets = np.empty_like(inputs)
    for row, start in enumerate(starts):
        window = tokens[start : start + block_size + 1]
        if len(window) <= block_size:  # over the joint of the circle
            window = np.concatenate([window, tokens[: block_size + 1 - len(window)]])
        inputs[row], targets[row] = window[:-1], window[1:]
    return inputs, targets


def permute(positions: np.ndarray, n: int, key: np.uint64) -> np.ndarray:
    """A keyed bijection of range(n): a Feistel network on the next even number of bits, applied again until the value
    is back inside ("cycle walking", Black and Rogaway 2002), which takes at most four tries on average."""
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(6):
            left, right = right, left ^ (mix(right ^ mix(key ^ np.uint64(round_number))) & mask)
        values[outside] = left << half | right
        outside = values >= n
    return values.astype(np.int64)


def mix(value):
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): 64 bits to 64 bits, elementwise."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return value ^ value >> np.uint64(31)


if __name__ == "__main__":
    sampler = WindowSampler(np.arange(26), block_size=5, seed=1)
    print(f"26 tokens in windows of 5: {sampler.windows_per_epoch} windows an epoch, by their first token")
    for epoch in range(3):
        print(f"  epoch {epoch}: {sampler.starts(np.arange(5) + 5 * epoch).tolist()}")
    print("step 1, batch 4:", sampler.batch(1, 4)[0][:, 0].tolist())
    print("the same, by 2 ranks:", [sampler.batch(1, 2, rank=rank, world_size=2)[0][:, 0].tolist() for rank in (0, 1)])
    print("validation windows:", validation_windows(np.arange(26), 5, 3)[0][:, 0].tolist())
