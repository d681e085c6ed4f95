"""Prepared data sets: the folder format and its only reader.

    train.bin, val.bin   token ids, raw little-endian uint16 (uint32 for a vocabulary above 65,536), documents one after
                         another, an end-of-text token after each
    train-00000.bin ...  or shards of llm.c and modded-nanogpt: a header of 256 int32 (magic, version, count), then ids
    tokenizer.json       written by data/tokenizer.py
    meta.json            format, dtype, vocab_size, end_of_text; of each split its tokens, bytes of text, documents and
                         SHA-256; the tokenizer; where the text came from

Read before: data/tokenizer.py; read next: data/sampler.py, which draws batches from the tokens.
"""

import hashlib
import math
from functools import cached_property
from pathlib import Path

import numpy as np

from data.tokenizer import FILE_NAME as TOKENIZER_FILE
from data.tokenizer import Tokenizer, load_tokenizer
from options import progress, read_json, sha256

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
