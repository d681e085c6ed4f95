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
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from options import progress, read_json, sha256

META_FILE = "meta.json"
SPLITS = {"train": "train.bin", "val": "val.bin"}
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
HEADER_BYTES = 1024  # of a shard
CHECKED_BYTES = 256 << 20  # what open_dataset hashes unasked: a fraction of a second
MAPPED_SHARDS = 64  # of a split at once: every map is an open file, and a process may have 256 on macOS, 1024 on Linux
AGAIN = "prepare the data again"


class Dataset:
    """A prepared folder. `train` and `val` are its token ids, read-only: memory maps of shape (tokens,) or `Shards`.
    `fingerprint` is a hash of both and of the tokenizer: equal for equal contents, wherever they lie."""

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.vocab_size: int = meta["vocab_size"]
        self.end_of_text: int = meta["end_of_text"]
        self.train, self.val = (open_split(folder, meta["dtype"], split, meta["splits"][split]) for split in SPLITS)
        hashes = [entry["sha256"] for entry in (*(meta["splits"][split] for split in SPLITS), meta["tokenizer"])]
        self.fingerprint = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """ValueError if tokenizer.json is not the one the data was made with."""
        path = self.folder / TOKENIZER_FILE
        if sha256(path) != self.meta["tokenizer"]["sha256"]:
            raise ValueError(f"{path} is not what was prepared (SHA-256 differs); {AGAIN}")
        return load_tokenizer(path)

    def bits_per_byte(self, loss: float, split: str = "val") -> float:
        """Turns nats per token into bits per byte of text, which compares models with different tokenizers."""
        entry = self.meta["splits"][split]
        return loss / math.log(2) * entry["tokens"] / entry["bytes"]


class Shards:
    """Several arrays of tokens as one: `len`, and slices of step 1, copies that read no more than what they span.

    `counts` are the tokens of each, `load(i)` gives the i-th array; the last MAPPED_SHARDS that were needed are kept.
    """

    def __init__(self, counts: list[int], dtype: np.dtype, load: Callable[[int], np.ndarray]):
        self.ends, self.dtype = np.cumsum(counts), dtype
        self.load = lru_cache(MAPPED_SHARDS)(load)

    def __len__(self):
        return int(self.ends[-1])

    @property
    def nbytes(self):
        return len(self) * self.dtype.itemsize

    def __getitem__(self, index: slice):
        start, stop, _ = index.indices(len(self))
        tokens, i = np.empty(max(0, stop - start), self.dtype), int(np.searchsorted(self.ends, start, side="right"))
        filled = 0
        while filled < len(tokens):
            begin = start + filled - (int(self.ends[i - 1]) if i else 0)
            piece = self.load(i)[begin : begin + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled, i = filled + len(piece), i + 1
        return tokens


def open_dataset(folder, verify: bool | None = None) -> Dataset:
    """Opens a prepared folder; raises FileNotFoundError or ValueError, in one line, for anything that is not one.

    The sizes of files are always checked. `verify=True` also reads the tokens: SHA-256, and that every id lies in the
    vocabulary; `None` does so if they are small, `False` never.
    """
    folder = Path(folder)
    if not (folder / META_FILE).is_file():
        raise FileNotFoundError(f"no data set at {folder}: make one with python data/prepare.py --out_dir {folder}")
    meta = read_json(folder / META_FILE)
    if not is_sound(meta):
        raise ValueError(f"{folder / META_FILE} is not what data/prepare.py writes; {AGAIN}")
    dataset = Dataset(folder, meta)
    if verify or (verify is None and dataset.train.nbytes + dataset.val.nbytes <= CHECKED_BYTES):
        for split, name in SPLITS.items():
            path = folder / (f"{split}-*.bin" if "shards" in meta["splits"][split] else name)
            digest, _ = scan_tokens(getattr(dataset, split), dataset.vocab_size, path)
            if digest != meta["splits"][split]["sha256"]:
                raise ValueError(f"{path} is not what was prepared (SHA-256 differs); {AGAIN}")
    return dataset


def is_sound(meta: dict) -> bool:
    """Whether a meta.json has all that is read of it, each of its type."""
    try:
        entries = [meta["splits"][split] for split in SPLITS]
        texts = [meta["source"], *meta["notes"], meta["tokenizer"]["name"], meta["tokenizer"]["sha256"]]
        texts += [entry["sha256"] for entry in entries]
        counts = [meta["vocab_size"], *(entry[name] for entry in entries for name in ("tokens", "bytes", "documents"))]
        counts += [count for entry in entries for count in entry.get("shards", [])]
        return (
            (meta["format"], meta["dtype"]) in [(1, dtype) for dtype in DTYPES]
            and isinstance(meta["notes"], list)
            and all(isinstance(text, str) for text in texts)
            and all(type(count) is int and 0 < count < 2**63 for count in counts)
            and all(sum(entry.get("shards", [entry["tokens"]])) == entry["tokens"] for entry in entries)
            and type(meta["end_of_text"]) is int
            and 0 <= meta["end_of_text"] < meta["vocab_size"] <= 256 ** DTYPES[meta["dtype"]].itemsize
        )
    except (KeyError, TypeError, AttributeError):
        return False


def open_split(folder: Path, dtype: str, split: str, entry: dict):
    """The tokens of a split: its one file, mapped, or its shards. The sizes of all files are checked."""
    if "shards" not in entry:
        return map_tokens(folder / SPLITS[split], dtype, entry["tokens"])
    counts, paths = entry["shards"], [folder / shard_file(split, i) for i in range(len(entry["shards"]))]
    for path, count in zip(paths, counts):
        check_size(path, dtype, count, HEADER_BYTES)
    if len(paths) == 1:
        return map_tokens(paths[0], dtype, counts[0], HEADER_BYTES)
    return Shards(counts, DTYPES[dtype], lambda i: map_tokens(paths[i], dtype, counts[i], HEADER_BYTES))


def shard_file(split: str, number: int) -> str:
    return f"{split}-{number:05}.bin"


def map_tokens(path: Path, dtype: str, tokens: int, offset: int = 0) -> np.ndarray:
    """A file of `tokens` ids after `offset` bytes as a memory map; raises what `check_size` does."""
    check_size(path, dtype, tokens, offset)
    return np.memmap(path, DTYPES[dtype], "r", offset)


def check_size(path: Path, dtype: str, tokens: int, offset: int) -> None:
    """FileNotFoundError or ValueError if a file of tokens is gone or has another size."""
    if not path.is_file():
        gone = f"leads to {path.readlink()}, which is gone" if path.is_symlink() else "is missing"
        raise FileNotFoundError(f"{path} {gone}; {AGAIN}")
    size, expected = path.stat().st_size, tokens * DTYPES[dtype].itemsize + offset
    if size != expected or not tokens:
        raise ValueError(f"{path.resolve()} has {size} bytes where {expected} are expected: truncated or changed")


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
