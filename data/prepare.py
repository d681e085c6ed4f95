"""Text -> a prepared data set (the folder that data/dataset.py reads).

    python data/prepare.py                                     the default: text that comes with Python, no download
    python data/prepare.py --source shakespeare --tokenizer byte
    python data/prepare.py --source notes/ --vocab_size 2048   a folder of .txt, .md, .rst, .py, .jsonl, .parquet
    python data/prepare.py --source fineweb10B/                token files of nanoGPT, llm.c or modded-nanogpt, in place
    python data/prepare.py --info data/python                  what a folder holds; verifies its hashes

A file given by name may have any suffix if it is text, in UTF-8 or with a byte order mark. A .jsonl file has a "text"
in each line, a .parquet file in each row. In a .txt file the spelling <|endoftext|> divides documents. In a folder,
files named train.* and val.*, valid*.* or test.* are the splits. The summary says what was skipped or replaced.

--tokenizer is bpe (trained on the text, --vocab_size tokens with end-of-text), byte, gpt2 or another name of tiktoken,
hf:FOLDER or hf:OWNER/NAME (a Hugging Face tokenizer.json, here or on the hub), or the folder of a run or of a data set,
whose tokenizer is used again.

A first pass over the text trains the tokenizer on the training side, a second one writes the tokens; files of any size
stream through both. The folder is written beside its place and renamed when complete. Read before: data/sources.py,
data/tokenizer.py. Read next: data/dataset.py.
"""

import contextlib
import glob
import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a program: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset import DTYPES, META_FILE, SPLITS, Dataset, open_dataset, open_split, scan_tokens
from data.dataset import TOKENIZER_FILE, shard_file
from data.sources import CORPORA, DATA, PIECE, Corpus, local_corpus, named_corpus, python_corpus
from data.tokenizer import Tokenizer, get_tokenizer, train_bpe
from options import check_options, fail, option, parse_options, progress, run_program, say, sha256, write_atomically

TOKENIZER_BYTES = 16 << 20  # text that a bpe vocabulary is learned from, spread evenly over the corpus
SHARD_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # llm.c's magic and version, for GPT-2 and Llama 3


@dataclass
class Options:
    source: str = option("python", f"python, {', '.join(CORPORA)}, or a file or folder of text or of tokens")
    tokenizer: str | None = option(None, "bpe (default), byte, gpt2 (default for token files), hf:NAME, a folder, ...")
    # a model of a million parameters should not spend most of them on its embedding
    vocab_size: int | None = option(None, "tokens of a bpe vocabulary (default 2048)", least=257, most=1 << 20)
    shards: int | None = option(None, "of --source fineweb-edu, 2 GB each (default 1)", least=1, most=14)
    val_fraction: float = option(0.05, "share of the bytes of text to validate on", above=0, most=0.5)
    out_dir: str | None = option(None, "where the data set lands (default data/<name of the source>)")
    overwrite: bool = option(False, "replace a data set that is there")
    seed: int = option(0, "of the train/validation split")
    info: str | None = option(None, "print what a prepared folder holds, verify its hashes, and end")


def prepare(**options) -> Dataset:
    """Prepares a data set and opens it; prints a summary. The options are the fields of `Options`.

    Raises ValueError for a bad option or text, OSError for files or a network that cannot be used; a data set at
    `out_dir` is then what it was. Of several programs that prepare one data set at once the first to finish publishes
    it, and the others take it.
    """
    began = time.monotonic()
    o = check_options(Options(**{name: str(v) if isinstance(v, Path) else v for name, v in options.items()}))
    path, named = Path(o.source), o.source in ("python", *CORPORA)
    if not named and not (o.source and path.exists()):
        raise ValueError(f"--source {o.source}: neither python, {', '.join(CORPORA)} nor a file or folder that exists")
    token_files = {} if named else find_token_files(path)
    if token_files and (o.tokenizer == "bpe" or not o.tokenizer and (path / "meta.pkl").exists()):
        raise ValueError(
            f"{path} holds tokens: name their vocabulary, --tokenizer gpt2 for example (no pickle is opened)"
        )
    spec = o.tokenizer or ("gpt2" if token_files else "bpe")
    for option_name, applies, where in (
        ("shards", o.source == "fineweb-edu", "--source fineweb-edu"),
        ("vocab_size", spec == "bpe", "--tokenizer bpe"),
    ):
        if getattr(o, option_name) is not None and not applies:
            raise ValueError(f"--{option_name} is for {where}")
    tokenizer = None if spec == "bpe" else get_tokenizer(spec)
    if named:
        name = o.source
    else:  # the suffix of a file is none of its name, corpus.v1 is that of a folder
        name = path.resolve().stem if path.is_file() else path.resolve().name
    out_dir = Path(o.out_dir or DATA / name).resolve()
    check_free(out_dir, o.overwrite)

    new = folder_beside(out_dir)
    try:
        meta = dict(format=1, source=name, python=sys.version.split()[0], val_fraction=o.val_fraction, seed=o.seed)
        if token_files:
            split_meta, notes = link_tokens(token_files, tokenizer, new)
            meta |= split_meta
        else:
            if o.source == "python":
                corpus = python_corpus(o.val_fraction, o.seed)
            elif named:
                corpus = named_corpus(o.source, o.shards or 1, o.val_fraction, o.seed)
            else:
                corpus = local_corpus(path, o.val_fraction, o.seed)
            tokenizer = tokenizer or train_bpe(tokenizer_text(corpus), o.vocab_size or 2048)
            meta |= write_tokens(corpus, tokenizer, new) | corpus.meta
            notes = corpus.notes
        meta |= dict(tokenizer=tokenizer.save(new), notes=notes)
        write_atomically(new / META_FILE, json.dumps(meta, indent=1) + "\n")
        prepared = open_dataset(new, verify=False)
        prepared.tokenizer  # nothing is published that cannot be read
        fingerprint = prepared.fingerprint
        del prepared  # Windows renames no folder with open files
        publish(new, out_dir, o.overwrite)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    dataset = open_dataset(out_dir, verify=False)
    if dataset.fingerprint != fingerprint:
        raise ValueError(f"--out_dir {out_dir}: another program has put another data set there; choose another folder")
    say(describe(dataset))
    say(f"prepared in {time.monotonic() - began:.1f} s: {out_dir}")
    return dataset


def folder_beside(out_dir: Path) -> Path:
    """An empty folder beside `out_dir` for this program alone; removes those of programs here that were killed."""
    begin = f".{out_dir.name}.{platform.node()}-"
    for left in out_dir.parent.glob(f"{glob.escape(begin)}*"):
        process = left.name.removeprefix(begin).split("-")[0]
        if process.isdecimal() and not is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    folder = out_dir.with_name(f"{begin}{os.getpid()}-{secrets.token_hex(4)}")
    folder.mkdir(parents=True)
    return folder


def is_running(process: int) -> bool:
    """Whether a process of this machine runs; True where that cannot be asked."""
    if os.name == "nt":  # there os.kill ends a process, whatever the signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


def publish(new: Path, out_dir: Path, overwrite: bool) -> None:
    """Renames `new` to `out_dir`, in place of the old data set if `overwrite` is set. One that another program has put
    there meanwhile stays. Raises OSError if that is not possible; the old one then is where it was."""
    old = new.with_name(f"{new.name}.old")
    with contextlib.suppress(OSError):
        out_dir.rmdir()  # only an empty folder: not every system renames over one
    try:
        if overwrite and out_dir.exists():
            out_dir.rename(old)
    except OSError as error:  # Windows, while a run has it open
        raise OSError(f"--out_dir {out_dir} is in use and stays as it is: end what uses it ({error})") from None
    try:
        new.rename(out_dir)
    except OSError:
        if not (out_dir / META_FILE).is_file():
            if old.exists():
                old.rename(out_dir)
            raise
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():  # Windows again
        say(f"the old data set is in use; remove it when it is not: {old}")


def check_free(out_dir: Path, overwrite: bool) -> None:
    """ValueError unless a data set may be put at `out_dir`: nothing of anyone else's is ever removed."""
    if not out_dir.exists() or out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    if not (out_dir / META_FILE).is_file():
        raise ValueError(f"--out_dir {out_dir} exists and is not a prepared data set; choose another folder")
    if not overwrite:
        raise ValueError(f"--out_dir {out_dir} holds a data set; add --overwrite to replace it")
    ours = rf"{META_FILE}|{TOKENIZER_FILE}|(train|val)(-\d{{5,}})?\.bin"
    if others := sorted(path.name for path in out_dir.iterdir() if not re.fullmatch(ours, path.name)):
        raise ValueError(f"--out_dir {out_dir} holds {others[0]!r} beside the data set; move it before --overwrite")


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


def tokenizer_text(corpus: Corpus):
    """Training text for the tokenizer: all of it, or about TOKENIZER_BYTES, spread evenly over the corpus."""
    keep, due = min(1.0, TOKENIZER_BYTES / max(1, corpus.size)), 0.0
    bar = progress("reading for the tokenizer", corpus.size)
    for split, text, _ in corpus.documents():
        if split == "train":
            due += keep * len(text)
            if due > 0:
                due -= len(text)
                yield text
        bar.update(len(text))
    bar.close()


def write_tokens(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict:
    """Writes train.bin and val.bin; returns their part of meta.json. ValueError if a split has no text."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    splits = {split: dict(file=name, tokens=0, bytes=0, documents=0) for split, name in SPLITS.items()}
    bar, replaced = progress("encoding", corpus.size), 0
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / name, "wb")) for split, name in SPLITS.items()}
        for batch in batches(corpus):
            encoded = tokenizer.encode_batch([text for _, text, _ in batch])
            for (split, text, ends), tokens in zip(batch, encoded):
                tokens += [tokenizer.end_of_text] * ends
                files[split].write(np.array(tokens, DTYPES[dtype]).tobytes())
                size, entry = len(text.encode()), splits[split]
                entry["tokens"] += len(tokens)
                entry["bytes"] += size
                entry["documents"] += ends
                replaced += text.count("\ufffd")
                bar.update(size)
    bar.close()
    for entry in splits.values():
        entry["sha256"] = sha256(folder / entry["file"])
        if not entry["bytes"]:
            raise ValueError(f"no text for {entry['file']}: use more text, another --val_fraction or another --seed")
    if replaced:
        corpus.notes.append(f"{replaced:,} U+FFFD, which replace what is no UTF-8")
    if corpus.skipped:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(corpus.skipped.items()))
        corpus.notes.append(f"skipped records: {kinds}")
    return dict(dtype=dtype, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text, splits=splits)


def batches(corpus: Corpus):
    """The documents of a corpus in lists, each long enough for tiktoken to use several threads."""
    batch, size = [], 0
    for document in corpus.documents():
        batch.append(document)
        size += len(document[1])
        if size >= 4 * PIECE:
            yield batch
            batch, size = [], 0
    yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Tokens that exist


def find_token_files(source: Path) -> dict[str, list[Path]]:
    """The train and val files of nanoGPT, llm.c or modded-nanogpt in a folder; empty if it has none.

    ValueError for a folder that has only one of the two, or is a prepared data set already.
    """
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


def link_tokens(found: dict[str, list[Path]], tokenizer: Tokenizer, folder: Path) -> tuple[dict, list[str]]:
    """Links token files into `folder`, and reads them once; returns their part of meta.json, and notes.

    Without a header the ids are uint16, as nanoGPT writes them. ValueError for a file that is truncated, a header that
    contradicts its file, ids outside the vocabulary.
    """
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    lengths[tokenizer.end_of_text] = 0
    splits, notes = {}, {}
    for split, paths in found.items():
        headers = [read_header(path) for path in paths]
        if headers == [None]:
            dtype, entry = "uint16", dict(file=SPLITS[split], tokens=paths[0].stat().st_size // 2)
            names = [SPLITS[split]]
        elif None in headers:
            raise ValueError(f"{paths[headers.index(None)]} is one of several files and has no header of llm.c's")
        else:
            dtype, counts = headers[0][0], [count for _, count in headers]
            entry = dict(shards=counts, tokens=sum(counts))
            names = [shard_file(split, i) for i in range(len(paths))]
        for name, path in zip(names, paths):
            notes[link_file(path.resolve(), folder / name)] = None
        what = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"
        entry["sha256"], counts = scan_tokens(open_split(folder, dtype, split, entry), tokenizer.vocab_size, what)
        size = int(counts @ lengths)
        if not size:
            raise ValueError(f"{what}: nothing but end-of-text tokens")
        splits[split] = entry | dict(bytes=size, documents=max(1, int(counts[tokenizer.end_of_text])))
    meta = dict(dtype=dtype, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text, splits=splits)
    return meta, [*notes]


def link_file(path: Path, link: Path) -> str:
    """Makes `link` lead to the file, or be the file, or a copy of it, as the system allows; says which in a note."""
    try:
        link.symlink_to(path)
        return f"the token files stay where they are: keep {path.parent}"
    except (OSError, NotImplementedError):  # Windows, for most users
        pass
    try:
        link.hardlink_to(path)
        return f"the token files are shared with {path.parent}: do not change them there"
    except (OSError, NotImplementedError):  # another disk, or one that cannot
        shutil.copyfile(path, link)
        return f"the token files were copied: {path.parent} is not needed"


def read_header(path: Path) -> tuple[str, int] | None:
    """(dtype, tokens) by the header of a shard of llm.c or modded-nanogpt; None if the file has no such header."""
    header = np.fromfile(path, "<i4", 3)
    dtype = SHARD_HEADERS.get(tuple(header[:2].tolist()))
    return (dtype, int(header[2])) if dtype and len(header) == 3 else None


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
