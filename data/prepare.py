"""Text -> a prepared data set (the folder that data/dataset.py reads).

    python data/prepare.py                                     the default: text that comes with Python, no download
    python data/prepare.py --source shakespeare --tokenizer byte
    python data/prepare.py --source notes/ --vocab_size 2048   a folder of .txt, .md, .rst, .py and .jsonl
    python data/prepare.py --source fineweb10B/                token files of nanoGPT, llm.c or modded-nanogpt, in place
    python data/prepare.py --info data/python                  what a folder holds; verifies its hashes

A file given by name may have any suffix if it is text; a .jsonl file has a "text" in each line. In a .txt file the
spelling <|endoftext|> divides documents. In a folder, files named train.* and val.*, valid*.* or test.* are the splits.
UTF-16 with a byte order mark is decoded. The summary says what was skipped, replaced or divided.

--tokenizer is bpe (trained on the text, --vocab_size tokens with end-of-text), byte, gpt2 or another name of tiktoken,
hf:FOLDER (a Hugging Face tokenizer.json), or the folder of a run or of a data set, whose tokenizer is used again.
--content of Python's text: prose (language topics and docstrings), code, or both.

A first pass over the text trains the tokenizer on the training side, a second one writes the tokens; files of any size
stream through both. The folder is written beside its place and renamed when complete. Read before: data/dataset.py,
data/sources.py. Read next: train.py.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a program: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset import (
    DTYPES,
    HEADER_BYTES,
    META_FILE,
    SPLITS,
    Dataset,
    blocks,
    map_tokens,
    open_dataset,
    read_header,
    shard_file,
)
from data.sources import CORPORA, DATA, PIECE, Corpus, listing, local_corpus, named_corpus, printable, python_corpus
from data.tokenizer import FILE_NAME as TOKENIZER_FILE
from data.tokenizer import Tokenizer, get_tokenizer, progress, train_bpe, well_formed
from options import check_options, fail, option, parse_options, run_program, say, write_atomically

VOCAB_SIZE = 2048  # of a bpe vocabulary: a model of a million parameters should not spend most of them on its embedding
TOKENIZER_BYTES = 16 << 20  # text that a bpe vocabulary is learned from, spread evenly over the corpus


@dataclass
class Options:
    source: str = option("python", f"python, {', '.join(CORPORA)}, or a file or folder of text or of tokens")
    tokenizer: str | None = option(None, "bpe (default), byte, gpt2 (default for token files), ..., hf:FOLDER, a run")
    vocab_size: int | None = option(None, f"tokens of a bpe vocabulary (default {VOCAB_SIZE})", least=257, most=1 << 20)
    content: str | None = option(None, "of --source python (default both)", choices=("prose", "code", "both"))
    shards: int | None = option(None, "of --source fineweb-edu, 2 GB each (default 1)", least=1, most=14)
    val_fraction: float = option(0.05, "share of the bytes of text to validate on", above=0, most=0.5)
    out_dir: str | None = option(None, "where the data set lands (default data/<name of the source>)")
    overwrite: bool = option(False, "replace a data set that is there")
    seed: int = option(0, "of the train/validation split")
    info: str | None = option(None, "print what a prepared folder holds, verify its hashes, and end")


def prepare(**options) -> Dataset:
    """Prepares a data set and opens it; prints a summary. The options are the fields of `Options`.

    Raises ValueError for a bad option or text, OSError for files or a network that cannot be used. Whatever happens, a
    data set at `out_dir` is either the old one or the complete new one; killed between two renames, the old one stands
    beside it until the next run puts it back.
    """
    began = time.monotonic()
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    o = check_options(Options(**given))
    named, path = o.source in ("python", *CORPORA), Path(o.source)
    if not named and not (o.source and path.exists()):
        raise ValueError(f"--source {o.source}: neither python, {', '.join(CORPORA)} nor a file or folder that exists")
    token_files = {} if named else find_token_files(path)
    spec = o.tokenizer or ("gpt2" if token_files else "bpe")
    if token_files and spec == "bpe":
        raise ValueError(f"{path} holds tokens, which have a vocabulary already: name it, --tokenizer gpt2 for example")
    if token_files and not o.tokenizer and (path / "meta.pkl").exists():
        raise ValueError(f"{path / 'meta.pkl'}, a pickle, is not opened: name the tokens' vocabulary, --tokenizer")
    for option_name, belongs, what in (
        ("content", o.source == "python", "--source python"),
        ("shards", o.source == "fineweb-edu", "--source fineweb-edu"),
        ("vocab_size", spec == "bpe", "--tokenizer bpe"),
    ):
        if getattr(o, option_name) and not belongs:
            raise ValueError(f"--{option_name} is for {what}")
    name = o.source if named else printable(path.resolve().stem)
    out_dir = Path(o.out_dir or DATA / name).resolve()
    folder, old = (out_dir.with_name(f".{out_dir.name}.{what}") for what in ("new", "old"))

    def put_back():
        """A set caught between the two renames below goes back to its place."""
        if old.exists() and not out_dir.exists():
            old.rename(out_dir)

    put_back()
    check_free(out_dir, o.overwrite)
    tokenizer = None if spec == "bpe" else get_tokenizer(spec)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    for left in (folder, old):  # by a killed run
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir()
    try:
        if token_files:
            meta = link_tokens(token_files, tokenizer, folder)
            notes = [f"the token files stay where they are: keep {printable(str(path.resolve()), 300)}"]
            used = [file for files in token_files.values() for file in files]
            if others := sorted(file.name for file in path.iterdir() if file not in used):
                notes += [f"skipped, for token files are there: {listing(others)}"]
        else:
            if o.source == "python":
                corpus = python_corpus(o.content or "both", o.val_fraction, o.seed)
            elif named:
                corpus = named_corpus(o.source, o.shards or 1, o.val_fraction, o.seed)
            else:
                corpus = local_corpus(path, o.val_fraction, o.seed)
            tokenizer = tokenizer or train_bpe(sample(corpus), o.vocab_size or VOCAB_SIZE)
            meta = write_tokens(corpus, tokenizer, folder) | corpus.meta
            notes = corpus.notes()
        origin = dict(source=name, python=sys.version.split()[0], val_fraction=o.val_fraction, seed=o.seed)
        meta = dict(format=1, **origin, **meta, tokenizer=tokenizer.save(folder), notes=notes)
        write_atomically(folder / META_FILE, json.dumps(meta, indent=1) + "\n")
        open_dataset(folder, verify=False).tokenizer  # nothing is published that cannot be read
        if out_dir.exists():  # no system swaps two folders in one step
            out_dir.rename(old)
        folder.rename(out_dir)
    finally:
        put_back()
        for left in (folder, old):
            shutil.rmtree(left, ignore_errors=True)
    dataset = open_dataset(out_dir, verify=False)
    say(describe(dataset))
    say(f"prepared in {time.monotonic() - began:.1f} s: {out_dir}")
    return dataset


def describe(dataset: Dataset) -> str:
    """What a folder holds, a line for each split and note."""
    meta, splits = dataset.meta, dataset.meta["splits"]
    lines = [
        f"{meta['source']}: {meta['tokenizer']['name']}, vocabulary {meta['vocab_size']}, {meta['dtype']}, "
        f"fingerprint {dataset.fingerprint}"
    ]
    total = sum(entry["bytes"] for entry in splits.values())
    for split, entry in splits.items():
        lines.append(
            f"  {split:5} {entry['tokens']:>13,} tokens  {entry['bytes']:>14,} bytes ({entry['bytes'] / total:.1%})  "
            f"{entry['documents']:>9,} documents  {entry['bytes'] / entry['tokens']:.3f} bytes per token"
        )
    known = ("format", "dtype", "vocab_size", "end_of_text", "splits", "tokenizer", "source", "notes")
    lines += [f"  {key}: {json.dumps(value)}" for key, value in meta.items() if key not in known]
    return "\n".join(lines + [f"  {note}" for note in meta.get("notes", [])])


# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens


def sample(corpus: Corpus):
    """Training text for the tokenizer: about TOKENIZER_BYTES of it, in pieces from all over the corpus."""
    keep, due = min(1.0, TOKENIZER_BYTES / max(1, corpus.size)), 0.0
    bar = progress("reading for the tokenizer", corpus.size)
    for split, text, _ in corpus.documents():
        size = PIECE // 16 if keep < 1 else len(text)  # a long record counts in pieces
        for start in range(0, len(text) if split == "train" else 0, size or 1):
            piece = text[start : start + size]
            due += keep * len(piece)
            if due >= len(piece):
                due -= len(piece)
                yield piece
        bar.update(len(text))
    bar.close()


def write_tokens(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict:
    """Writes train.bin and val.bin; returns their part of meta.json. ValueError if a split has no text."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    splits = {split: dict(file=name, tokens=0, bytes=0, documents=0) for split, name in SPLITS.items()}
    files = {split: open(folder / name, "wb") for split, name in SPLITS.items()}
    digests = {split: hashlib.sha256() for split in SPLITS}
    bar = progress("encoding", corpus.size)

    def write(batch):
        for (split, text, ends), tokens in zip(batch, tokenizer.encode_batch([text for _, text, _ in batch])):
            if ends:
                tokens.append(tokenizer.end_of_text)
            data = np.array(tokens, DTYPES[dtype]).tobytes()
            files[split].write(data)
            digests[split].update(data)
            size = len(text.encode())
            splits[split]["tokens"] += len(tokens)
            splits[split]["bytes"] += size
            splits[split]["documents"] += ends
            bar.update(size)

    batch, size = [], 0
    for split, text, ends in corpus.documents():
        batch.append((split, well_formed(text), ends))
        size += len(text)
        if size >= 4 * PIECE:  # several pieces, so that tiktoken can use several threads
            write(batch)
            batch, size = [], 0
    write(batch)
    bar.close()
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
        file.close()
    for split, entry in splits.items():
        entry["sha256"] = digests[split].hexdigest()
        if not entry["bytes"]:
            raise ValueError(f"no text for {SPLITS[split]}: use more text or another --val_fraction")
    return dict(dtype=dtype, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text, splits=splits)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens that exist


def find_token_files(source: Path) -> dict[str, list[Path]]:
    """The train and val files of nanoGPT, llm.c or modded-nanogpt in a folder; empty if it has none.

    ValueError for a folder that has only one of the two, or is a prepared data set already.
    """
    if not source.is_dir():
        return {}
    found = {
        split: sorted(p for p in source.glob("*.bin") if re.search(rf"(^|[_-]){split}([_-]\d+)?$", p.stem))
        for split in SPLITS
    }
    if not any(found.values()):
        return {}
    if (source / META_FILE).exists():
        raise ValueError(f"{source} is a prepared data set already: give it to train.py as --data_dir")
    for split, paths in found.items():
        if not paths:
            raise ValueError(f"{source} has token files, but none for {split} ({split}.bin or *_{split}_*.bin)")
    return found


def link_tokens(found: dict[str, list[Path]], tokenizer: Tokenizer, folder: Path) -> dict:
    """Links token files into `folder`, and reads them once; returns their part of meta.json.

    Without a header the ids are uint16, as nanoGPT writes them. ValueError for a file that is truncated, a header that
    contradicts its file, ids outside the vocabulary.
    """
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    lengths[tokenizer.end_of_text] = 0
    splits, dtypes = {}, set()
    bar = progress("checking the tokens", sum(path.stat().st_size for paths in found.values() for path in paths))
    for split, paths in found.items():
        headers = [read_header(path) for path in paths]
        if len(paths) > 1 and None in headers:
            raise ValueError(f"{paths[headers.index(None)]} is one of several files and has no header of llm.c's")
        arrays = []
        for path, header in zip(paths, headers):
            dtype, count = header or ("uint16", path.stat().st_size // 2)
            size = count * DTYPES[dtype].itemsize + HEADER_BYTES * bool(header)
            if path.stat().st_size != size or count < 1:
                says = f"its header says {size}" if header else "ids of two bytes make an even number"
                raise ValueError(f"{path} has {path.stat().st_size} bytes, and {says}: truncated, or no token file")
            arrays.append(map_tokens(path, dtype, count, bool(header)))
            dtypes.add(dtype)
            name = shard_file(split, len(arrays) - 1) if header else SPLITS[split]
            (folder / name).symlink_to(path.resolve())
        digest, counts = hashlib.sha256(), np.zeros(tokenizer.vocab_size, np.int64)
        for path, array in zip(paths, arrays):
            for block in blocks(array):
                if block.max() >= tokenizer.vocab_size:
                    raise ValueError(
                        f"{path} holds token id {block.max()}, outside the vocabulary of {tokenizer.vocab_size} of "
                        f"{tokenizer.name}: name the tokenizer it was made with, --tokenizer"
                    )
                digest.update(block.tobytes())
                counts += np.bincount(block, minlength=len(counts))
                bar.update(block.nbytes)
        splits[split] = dict(
            **(dict(shards=[len(array) for array in arrays]) if headers[0] else dict(file=SPLITS[split])),
            tokens=sum(len(array) for array in arrays),
            bytes=int(counts @ lengths),
            documents=max(1, int(counts[tokenizer.end_of_text])),
            sha256=digest.hexdigest(),
        )
    bar.close()
    if len(dtypes) > 1:
        raise ValueError("the files for train and val have ids of different width")
    dtype = dtypes.pop()
    if dtype == "uint16" and tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"{tokenizer.name} has {tokenizer.vocab_size} tokens, too many for ids of two bytes")
    return dict(dtype=dtype, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text, splits=splits)


def check_free(out_dir: Path, overwrite: bool) -> None:
    """ValueError unless a data set may be put at `out_dir`: nothing of anyone else's is ever removed."""
    if not out_dir.exists() or out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    if not (out_dir / META_FILE).is_file():
        raise ValueError(f"--out_dir {out_dir} exists and is not a prepared data set; choose another folder")
    if not overwrite:
        raise ValueError(f"--out_dir {out_dir} holds a data set; add --overwrite to replace it")
    ours = rf"{META_FILE}|{TOKENIZER_FILE}|(train|val)(-\d{{5}})?\.bin"
    if others := sorted(path.name for path in out_dir.iterdir() if not re.fullmatch(ours, path.name)):
        raise ValueError(f"--out_dir {out_dir} holds {others[0]!r} beside the data set; move it before --overwrite")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    o, _ = parse_options(Options, argv)
    try:
        if o.info:
            dataset = open_dataset(o.info, verify=True)
            dataset.tokenizer
            say(describe(dataset))
            say("sizes, hashes, token ids and tokenizer verified")
        else:
            prepare(**vars(o))
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    run_program(main)
