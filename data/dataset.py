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
from data.tokenizer import MAX_VOCAB_SIZE, Tokenizer, load_tokenizer, progress
from options import read_json, sha256

META_FILE = "meta.json"
SPLITS = {"train": "train.bin", "val": "val.bin"}
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SHARD_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # llm.c's magic and version, for GPT-2 and Llama 3
HEADER_BYTES = 1024
CHECKED_BYTES = 256 << 20  # what open_dataset hashes unasked: a fraction of a second
AGAIN = "prepare the data again"


class Dataset:
    """A prepared folder. `train` and `val` are its token ids, read-only: memory maps of shape (tokens,) or `Shards`."""

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.vocab_size: int = meta["vocab_size"]
        self.end_of_text: int = meta["end_of_text"]
        self.fingerprint: str = fingerprint(meta)
        self.train, self.val = (open_split(folder, meta, split) for split in SPLITS)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """ValueError if tokenizer.json is not the one the data was made with."""
        path = self.folder / TOKENIZER_FILE
        if sha256(path) != self.meta["tokenizer"]["sha256"]:
            raise ValueError(f"{path} is not the file that was prepared (SHA-256 differs); {AGAIN}")
        tokenizer = load_tokenizer(path)
        if (tokenizer.vocab_size, tokenizer.end_of_text) != (self.vocab_size, self.end_of_text):
            raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, the data set {self.vocab_size}; {AGAIN}")
        return tokenizer

    def bits_per_byte(self, loss: float, split: str = "val") -> float:
        """Turns nats per token into bits per byte of text, which compares models with different tokenizers."""
        entry = self.meta["splits"][split]
        return loss / math.log(2) * entry["tokens"] / entry["bytes"]


class Shards:
    """Several arrays of tokens as one: `len`, and slices of step 1, which read no more than what they span."""

    def __init__(self, arrays):
        self.arrays, self.dtype = list(arrays), arrays[0].dtype
        self.ends = np.cumsum([len(array) for array in self.arrays])
        self.nbytes = sum(array.nbytes for array in self.arrays)

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

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


def open_dataset(folder, verify: bool | None = None) -> Dataset:
    """Opens a prepared folder; raises FileNotFoundError or ValueError, in one line, for anything that is not one.

    What is read of meta.json and the sizes of files are always checked. `verify=True` also reads the tokens: SHA-256,
    and that every id lies in the vocabulary; `None` does so if they are small, `False` never.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set at {folder}: make one with python data/prepare.py --out_dir {folder}")
    if not (folder / META_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} is not a prepared data set (no {META_FILE}); python data/prepare.py makes one"
        )
    meta = read_json(folder / META_FILE)
    check_meta(meta, folder / META_FILE)
    if not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(f"{folder / TOKENIZER_FILE} is missing; {AGAIN}")
    dataset = Dataset(folder, meta)
    if verify or (verify is None and dataset.train.nbytes + dataset.val.nbytes <= CHECKED_BYTES):
        check_contents(dataset)
    return dataset


def open_split(folder: Path, meta: dict, split: str):
    """The tokens of a split, mapped from its one file or its shards."""
    entry = meta["splits"][split]
    if "shards" not in entry:
        return map_tokens(folder / SPLITS[split], meta["dtype"], entry["tokens"])
    arrays = [map_tokens(folder / shard_file(split, i), meta["dtype"], n, True) for i, n in enumerate(entry["shards"])]
    return arrays[0] if len(arrays) == 1 else Shards(arrays)


def shard_file(split: str, number: int) -> str:
    return f"{split}-{number:05}.bin"


def map_tokens(path: Path, dtype: str, tokens: int, header: bool = False) -> np.ndarray:
    """A file of `tokens` ids as a memory map. FileNotFoundError or ValueError if it is gone or has another size."""
    if not path.is_file():
        gone = f"leads to {path.readlink()}, which is gone" if path.is_symlink() else "is missing"
        raise FileNotFoundError(f"{path} {gone}; {AGAIN}")
    expected = tokens * DTYPES[dtype].itemsize + HEADER_BYTES * header
    if path.stat().st_size != expected or header and read_header(path) != (dtype, tokens):
        size = path.stat().st_size
        raise ValueError(f"{path} has {size} bytes where {META_FILE} says {expected}: truncated or changed; {AGAIN}")
    return np.memmap(path, DTYPES[dtype], "r", HEADER_BYTES * header)


def read_header(path: Path) -> tuple[str, int] | None:
    """(dtype, tokens) by the header of a shard of llm.c or modded-nanogpt; None if the file has no such header."""
    header = np.fromfile(path, "<i4", 3)
    dtype = SHARD_HEADERS.get(tuple(header[:2].tolist()))
    return (dtype, int(header[2])) if dtype and len(header) == 3 else None


def blocks(tokens, size: int = 1 << 22):
    """Consecutive slices of `tokens`."""
    return (tokens[start : start + size] for start in range(0, len(tokens), size))


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

    def __init__(self, tokens: np.ndarray | Shards, block_size: int, seed: int = 0):
        _check_length(tokens, block_size)
        self.tokens = tokens if isinstance(tokens, Shards) else np.asarray(tokens)
        self.block_size, self.seed = block_size, seed
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
        return _windows(self.tokens, self.starts(np.arange(first, first + batch_size)), self.block_size)


def validation_windows(tokens: np.ndarray, block_size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), int64 (count, block_size): a fixed set, evenly spread and without overlap.

    Fewer than `count` if not so many fit; ValueError if there are not block_size + 1 tokens.
    """
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
        raise ValueError(
            f"{len(tokens)} tokens are too few for block_size {block_size}, which needs {block_size + 1}: "
            "use more text or a smaller block_size"
        )


def check_meta(meta: dict, path: Path) -> None:
    """ValueError unless `meta`, the content of `path`, has what this file reads, in its type and range."""
    try:
        wrong = meta["format"] != 1
        sizes = [(meta["vocab_size"], 2, min(MAX_VOCAB_SIZE, 2 ** (8 * DTYPES[meta["dtype"]].itemsize)))]
        sizes += [(meta["end_of_text"], 0, meta["vocab_size"] - 1)]
        for split in SPLITS:
            entry = meta["splits"][split]
            sizes += [(entry[key], 1, 2**48) for key in ("tokens", "bytes", "documents")]
            sizes += [(sum(entry.get("shards", [entry["tokens"]])), entry["tokens"], entry["tokens"])]
        wrong |= not all(type(size) is int and low <= size <= high for size, low, high in sizes)
        fingerprint(meta), meta["source"] + meta["tokenizer"]["name"]
    except (KeyError, TypeError, ValueError):
        wrong = True
    if wrong:
        raise ValueError(f"{path} is not what data/prepare.py writes; {AGAIN}")


def check_contents(dataset: Dataset) -> None:
    """ValueError unless the tokens have the SHA-256 of meta.json and every id is in the vocabulary."""
    for split, name in SPLITS.items():
        tokens, digest, top = getattr(dataset, split), hashlib.sha256(), 0
        bar = progress(f"verifying {split}", tokens.nbytes)
        for block in blocks(tokens):
            digest.update(block.tobytes())
            top = max(top, int(block.max()))
            bar.update(block.nbytes)
        bar.close()
        path = dataset.folder / name
        if digest.hexdigest() != dataset.meta["splits"][split]["sha256"]:
            raise ValueError(f"{path} is not the file that was prepared (SHA-256 differs); {AGAIN}")
        if top >= dataset.vocab_size:
            raise ValueError(f"{path} holds token id {top}, outside its vocabulary of {dataset.vocab_size}; {AGAIN}")


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
