"""Text -> a prepared data set (the folder that data/dataset.py reads).

    python data/prepare.py                                       the default: text that comes with Python, no download
    python data/prepare.py --source shakespeare --tokenizer byte
    python data/prepare.py --source notes/ --vocab_size 2048     any .txt, .md or .jsonl file, or a folder of them
    python data/prepare.py --info data/python                    what a folder holds; verifies its hashes

Every source becomes a stream of documents, each on one side of the train/validation split for good: by file where there
are files, by content where there are only records, at the end where there is one long text. A first pass
trains the tokenizer on the training side, a second one writes the tokens; files of any size stream through both. The
folder is written beside its place and renamed when complete.

Read before: data/dataset.py; beside: data/download.py. Read next: train.py.
"""

import argparse
import ast
import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a program: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset import DTYPES, META_FILE, SPLITS, Dataset, open_dataset
from data.download import download, progress
from data.tokenizer import END_OF_TEXT
from data.tokenizer import FILE_NAME as TOKENIZER_FILE
from data.tokenizer import Tokenizer, get_tokenizer, train_bpe, well_formed

try:
    import fcntl  # locks that end with their process
except ImportError:
    fcntl = None

DATA = Path(__file__).resolve().parent
DOWNLOADS = DATA / "downloads"
SUFFIXES = {".txt", ".md", ".jsonl"}
VOCAB_SIZE = 2048  # of a bpe vocabulary: a model of a million parameters should not spend most of them on its embedding
TOKENIZER_BYTES = 16 << 20  # text that a bpe vocabulary is learned from, spread evenly over the corpus
PIECE = 1 << 20  # characters read at once
LINE_BYTES = 64 << 20  # longest line of a .jsonl file

# Where the named corpora are: (file, URL, bytes, SHA-256). The revision is part of each URL, so a file never changes;
# where no SHA-256 is given, the one that Hugging Face sends with the file is used.
_HUB = "https://huggingface.co/datasets/"
_STORIES = _HUB + "roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
_FINEWEB = _HUB + "HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT/"
CORPORA = {
    "shakespeare": [
        ("shakespeare.txt", "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
         "/data/tinyshakespeare/input.txt", 1115394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")],
    "tinystories": [
        ("TinyStoriesV2-GPT4-train.txt", _STORIES + "TinyStoriesV2-GPT4-train.txt", 2227753162,
         "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
        ("TinyStoriesV2-GPT4-valid.txt", _STORIES + "TinyStoriesV2-GPT4-valid.txt", 22502601,
         "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")],
    "fineweb-edu": [(f"fineweb-edu-{i:03}.parquet", f"{_FINEWEB}{i:03}_00000.parquet", None, None) for i in range(14)],
}


@dataclass
class Corpus:
    """A source of text. `documents()` yields (split, text, ends): a document may come in several texts, the last of
    which has `ends` set; called again it yields the same. `size` is in bytes, roughly; `notes` go into meta.json."""

    documents: Callable[[], Iterator[tuple[str, str, bool]]]
    size: int
    notes: dict = field(default_factory=dict)


def prepare(source: str = "python", tokenizer: str = "bpe", vocab_size: int | None = None, content: str | None = None,
            out_dir=None, val_fraction: float = 0.05, shards: int | None = None, overwrite: bool = False,
            seed: int = 0) -> Dataset:
    """Prepares a data set and opens it; prints a summary. The options are those of the command line (`--help`).

    Raises ValueError for a bad option or text, OSError for files or a network that cannot be used. Whatever happens, a
    data set at `out_dir` is either the old one, or none, or the complete new one.
    """
    began = time.monotonic()
    if source not in ("python", *CORPORA) and not (source and Path(source).exists()):
        raise ValueError(f"--source {source}: neither python, {', '.join(CORPORA)} nor a file or folder that exists")
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"--val_fraction {val_fraction} is not above 0 and at most 0.5")
    if vocab_size is not None and tokenizer != "bpe":
        raise ValueError(f"--vocab_size is for --tokenizer bpe; {tokenizer} has a vocabulary of its own")
    if vocab_size is not None and not 257 <= vocab_size <= 1 << 20:
        raise ValueError(f"--vocab_size {vocab_size} is not between 257 (the bytes and end-of-text) and {1 << 20}")
    if content not in (None, "prose", "code", "both"):
        raise ValueError(f"--content {content}: choose prose, code or both")
    if content is not None and source != "python":
        raise ValueError("--content is for --source python")
    if shards is not None and (source != "fineweb-edu" or not 1 <= shards <= len(CORPORA[source])):
        raise ValueError(f"--shards is for --source fineweb-edu, from 1 to {len(CORPORA['fineweb-edu'])}")
    name = source if source in ("python", *CORPORA) else Path(source).resolve().stem
    out_dir = Path(out_dir).resolve() if out_dir else DATA / name
    with _alone_in(out_dir.parent):
        _clean_up(out_dir)
        _check_free(out_dir, overwrite)
    chosen = None if tokenizer == "bpe" else get_tokenizer(tokenizer)

    if source == "python":
        corpus = python_corpus(content or "both", val_fraction, seed)
    elif source in CORPORA:
        corpus = named_corpus(source, shards or 1, val_fraction, seed)
    else:
        corpus = local_corpus(Path(source), val_fraction, seed)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(out_dir.parent):  # the lock tells other runs that this one lives
        folder = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.new-", dir=out_dir.parent))
        folder.chmod(0o755)
        lock = _lock(folder)
    try:
        if chosen is None:
            chosen = train_bpe(_sample(corpus), vocab_size or VOCAB_SIZE)
        meta = {"format": 1, "source": name, "python": sys.version.split()[0], "val_fraction": val_fraction, "seed": seed,
                **_write_tokens(corpus, chosen, folder), "tokenizer": chosen.save(folder), **corpus.notes}
        with open(folder / META_FILE, "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.write("\n")
            _sync(file)
        with _alone_in(out_dir.parent):
            _publish(folder, out_dir, overwrite)
            dataset = open_dataset(out_dir, verify=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already if it was published
        os.close(lock)
    print(describe(dataset))
    print(f"prepared in {time.monotonic() - began:.1f} s: {out_dir}")
    return dataset


def describe(dataset: Dataset) -> str:
    """What a folder holds, a line for each split and note."""
    meta, splits = dataset.meta, dataset.meta["splits"]
    lines = [f"{meta['source']}: {meta['tokenizer']['name']}, vocabulary {meta['vocab_size']}, {meta['dtype']}, "
             f"fingerprint {dataset.fingerprint}"]
    for split, entry in splits.items():
        lines.append(f"  {split:5} {entry['tokens']:>13,} tokens  {entry['bytes']:>14,} bytes  {entry['documents']:>9,} documents"
                     f"  {entry['bytes'] / entry['tokens']:.3f} bytes per token")
    known = ("format", "dtype", "vocab_size", "end_of_text", "splits", "tokenizer", "source")
    lines += [f"  {key}: {json.dumps(value)}" for key, value in meta.items()
              if key not in known and value not in ([], {})]
    return "\n".join(lines)


# --- The text that comes with Python --------------------------------------------------------------------------------

SKIPPED_FOLDERS = {  # installed packages, tests, tables of character codes, copies of topics, Python 2
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3",
    "ensurepip", "lib-dynload"}
TABLE_LINES = 60  # a longer statement at module level that is no definition is a table
LICENCE = re.compile(r"copyright|licen[cs]e|all rights reserved", re.I)


def python_corpus(content: str, val_fraction: float, seed: int) -> Corpus:
    """Language topics of pydoc with the standard library's docstrings (prose), its sources (code), or topics and
    sources (both: a docstring is then read where it stands). Modules are read as files, never imported.

    All text of one module lies in one split. Topics repeat each other, docstrings sometimes: a paragraph is kept once.
    """
    topics, missing = {}, []
    if content != "code":
        try:
            from pydoc_data.topics import topics  # nothing but data
        except ImportError:
            missing.append("pydoc_data.topics (the language topics)")
    files = dict(_standard_library())
    if not files:
        missing.append("the sources of the standard library")
    if not files and not topics:
        raise ValueError("this Python carries neither its sources nor pydoc's topics: use --source FILE_OR_FOLDER")

    seen, texts, kinds = set(), {}, dict.fromkeys(("topics", "docstrings", "code"), 0)  # texts: name -> (kind, text)
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):  # the long ones are made of short ones
        text = str(topics[topic]).replace('\u201c"', '"').replace('"\u201d', '"')  # quotation marks around quotation marks
        texts[f"topics/{topic}"] = ("topics", _unseen(text, seen))
    for file, source in files.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes in old files
                text = importlib.util.decode_source(source)
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        if content == "prose":
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            texts[file] = ("docstrings", _unseen("\n\n".join(_docstrings(tree, module)), seen))
        else:
            texts[file] = ("code", _clean_code(text, tree))
    texts = {name: (kind, text.strip() + "\n") for name, (kind, text) in texts.items() if len(text) >= 200}
    validation = _choose_validation(texts, val_fraction, seed)
    for kind, text in texts.values():
        kinds[kind] += len(text.encode())

    def documents():
        for name in sorted(texts):
            yield "val" if name in validation else "train", texts[name][1], True

    notes = {"content": content, "bytes_of": kinds, "missing": missing}
    return Corpus(documents, sum(kinds.values()), notes)


def _standard_library() -> Iterator[tuple[str, bytes]]:
    """(path below the library, source) of each module, without duplicates; from a zip file where the library is one."""
    root, hashes = Path(sysconfig.get_path("stdlib")), set()

    def wanted(parts):
        return parts[-1].endswith(".py") and not SKIPPED_FOLDERS.intersection(parts) and not parts[-1].startswith("_sysconfigdata")

    def candidates():
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
            for path in (Path(folder, name) for name in sorted(names)):
                if wanted(path.relative_to(root).parts):
                    yield path.relative_to(root).as_posix(), path.read_bytes()
        for archive in (entry for entry in sys.path if re.search(r"python\d+\.zip$", entry) and zipfile.is_zipfile(entry)):
            with zipfile.ZipFile(archive) as file:
                for name in sorted(file.namelist()):
                    if wanted(name.split("/")):
                        yield name, file.read(name)

    for name, source in candidates():
        digest = hashlib.sha256(source).digest()
        if digest not in hashes:
            hashes.add(digest)
            yield name, source


def _docstrings(tree: ast.AST, name: str) -> Iterator[str]:
    """The docstrings of a module, each under a title: the dotted name, with the arguments of a function."""
    if isinstance(tree, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        doc = ast.get_docstring(tree)
        if isinstance(tree, ast.ClassDef):
            title = f"class {name}"
        elif isinstance(tree, ast.Module):
            title = f"{name}\n{'=' * len(name)}"
        else:
            title = f"{name}({ast.unparse(tree.args)})"
        if doc:
            yield f"{title}\n\n{doc}"
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _docstrings(child, name)


def _unseen(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs in `seen`, to which its own are added; short ones are kept, they are headings."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\t", "    ")):
        bare = " ".join(paragraph.split())
        if len(bare) < 60 or bare not in seen:
            kept.append("\n".join(line.rstrip() for line in paragraph.split("\n")))
        seen.add(bare)
    return "\n\n".join(kept)


def _clean_code(text: str, tree: ast.Module) -> str:
    """Source text without licence comments, interpreter lines and long tables."""
    lines = text.replace("\f", "").expandtabs().split("\n")
    drop = set()
    for node in tree.body:
        table = isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) or (
            isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant))
        if table and node.end_lineno - node.lineno >= TABLE_LINES:
            drop.update(range(node.lineno - 1, node.end_lineno))
    run = []
    for i, line in enumerate([*lines, ""]):
        if line.startswith("#"):
            run.append(i)
            if line.startswith("#!") or re.match(r"#.*coding[:=]", line):
                drop.add(i)
        else:
            if LICENCE.search("\n".join(lines[j] for j in run)):
                drop.update(run)
            run = []
    kept = "\n".join(line.rstrip() for i, line in enumerate(lines) if i not in drop)
    return re.sub(r"\n{4,}", "\n\n\n", kept)


# --- Local files ----------------------------------------------------------------------------------------------------


def local_corpus(path: Path, val_fraction: float, seed: int) -> Corpus:
    """A .txt, .md or .jsonl file (with a "text" field in each line), or all of them below a folder.

    A folder is split by file, a .jsonl file by record, a single text at its end.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
                       and not any(part.startswith(".") for part in file.relative_to(path).parts))
    else:
        files = [path] if path.suffix.lower() in SUFFIXES else []
    size = sum(file.stat().st_size for file in files)
    if not size:
        raise ValueError(f"--source {path}: no text in {', '.join(sorted(SUFFIXES))} files there")
    names = {file: file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files}
    validation = _choose_validation(names.values(), val_fraction, seed) if len(files) > 1 else None
    invalid: dict[str, int] = {}  # file -> bytes that were not UTF-8

    def documents():
        for file, name in names.items():
            if validation is not None:
                split = "val" if name in validation else "train"
            elif file.suffix.lower() == ".jsonl":
                split = None
            else:
                yield from _split_at(_pieces(file, name, invalid), (1 - val_fraction) * size)
                return
            if file.suffix.lower() == ".jsonl":
                for text in _records(file, name, invalid):
                    yield split or _split_of(text, val_fraction, seed), text, True
            else:
                for text in _pieces(file, name, invalid):
                    yield split, text, False
                yield split, "", True

    return Corpus(documents, size, {"invalid_utf8_bytes_replaced": invalid})


def _pieces(file: Path, name: str, invalid: dict[str, int]) -> Iterator[str]:
    """The text of a file in pieces of about PIECE characters, cut before a newline or else a space."""
    rest, count = "", 0
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        while block := stream.read(PIECE):
            block, replaced = re.subn("[\udc80-\udcff]", "\ufffd", block)
            count += replaced
            text = rest + block
            cut = text.rfind("\n") if text.rfind("\n") > 0 else text.rfind(" ")
            cut = cut if cut > 0 else len(text)
            yield text[:cut]
            rest = text[cut:]
    if rest:
        yield rest
    if count:
        invalid[name] = count


def _records(file: Path, name: str, invalid: dict[str, int]) -> Iterator[str]:
    number = count = 0
    with open(file, "rb") as stream:
        while line := stream.readline(LINE_BYTES):
            number += 1
            if len(line) == LINE_BYTES:
                raise ValueError(f"{file}, line {number}: longer than {LINE_BYTES} bytes")
            text, replaced = re.subn("[\udc80-\udcff]", "\ufffd", line.decode("utf-8-sig", "surrogateescape"))
            count += replaced
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f'{file}, line {number}: no object with a string in "text"')
            yield record["text"]
    if count:
        invalid[name] = count


def _split_at(pieces: Iterator[str], train_bytes: float) -> Iterator[tuple[str, str, bool]]:
    """Two documents from one text: `train_bytes` to train on, up to the end of a line or word, the rest to validate on."""
    position, split = 0, "train"
    for text in pieces:
        encoded = well_formed(text).encode()
        if split == "train" and position + len(encoded) > train_bytes:
            cut = max(0, int(train_bytes) - position)
            ends = [encoded.find(mark, cut) + 1 for mark in (b"\n", b" ")]
            cut = next((end for end in ends if 0 < end < len(encoded)), cut)
            while cut < len(encoded) and encoded[cut] & 0xC0 == 0x80:  # inside a character
                cut += 1
            yield "train", encoded[:cut].decode(), True
            text, split = encoded[cut:].decode(), "val"
        yield split, text, False
        position += len(encoded)
    yield split, "", True


def _choose_validation(names, fraction: float, seed: int) -> set[str]:
    """Names to validate on: by a hash of each name alone, so that a name stays where it is when others come or go;
    at least one on either side."""
    order = sorted(names, key=lambda name: _position(name, seed))
    count = sum(_position(name, seed) < fraction for name in order)
    return set(order[: min(max(count, 1), len(order) - 1)])


def _split_of(text: str, fraction: float, seed: int) -> str:
    return "val" if _position(text, seed) < fraction else "train"


def _position(text: str, seed: int) -> float:
    """A hash of `text`, uniform in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}:".encode() + text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


# --- Named corpora --------------------------------------------------------------------------------------------------


def named_corpus(name: str, shards: int, val_fraction: float, seed: int) -> Corpus:
    """Downloads a corpus of CORPORA, or takes it from DOWNLOADS. TinyStories brings a validation file of its own."""
    if name == "fineweb-edu":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError("fineweb-edu comes as parquet files: pip install pyarrow") from None
    entries = CORPORA[name][:shards] if name == "fineweb-edu" else CORPORA[name]
    checked = {file: download(url, DOWNLOADS / file, size, sha256) for file, url, size, sha256 in entries}
    paths = [DOWNLOADS / file for file, *_ in entries]
    notes = {"urls": [url for _, url, *_ in entries], "checked": checked}
    if name == "shakespeare":
        corpus = local_corpus(paths[0], val_fraction, seed)
        return Corpus(corpus.documents, corpus.size, {**notes, **corpus.notes})

    def documents():
        if name == "tinystories":
            for split, path in zip(SPLITS, paths):
                for story in _stories(path):
                    yield split, story, True
        else:
            for path in paths:
                for batch in parquet.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
                    for text in batch.column(0).to_pylist():
                        yield _split_of(text, val_fraction, seed), text, True

    return Corpus(documents, sum(path.stat().st_size for path in paths), notes)


def _stories(path: Path) -> Iterator[str]:
    rest = ""
    with open(path, encoding="utf-8", errors="replace") as stream:
        while block := stream.read(PIECE):
            *stories, rest = (rest + block).split(END_OF_TEXT)
            yield from filter(None, map(str.strip, stories))
    if rest.strip():
        yield rest.strip()


# --- Writing --------------------------------------------------------------------------------------------------------


def _sample(corpus: Corpus) -> Iterator[str]:
    """Training text for the tokenizer: every n-th piece, so that no more than about TOKENIZER_BYTES come."""
    keep, credit = min(1.0, TOKENIZER_BYTES / max(1, corpus.size)), 0.0
    for split, text, _ in corpus.documents():
        if split == "train":
            credit += keep
            if credit >= 1:
                credit -= 1
                yield text


def _write_tokens(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict:
    """Writes train.bin and val.bin; returns their part of meta.json."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    files = {split: open(folder / name, "wb") for split, name in SPLITS.items()}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    splits = {split: {"file": name, "tokens": 0, "bytes": 0, "documents": 0} for split, name in SPLITS.items()}
    batch, size, shown, done = [], 0, time.monotonic(), 0

    def flush():
        for (split, text, ends), tokens in zip(batch, tokenizer.encode_batch([text for _, text, _ in batch])):
            if ends:
                tokens.append(tokenizer.end_of_text)
            data = np.array(tokens, DTYPES[dtype]).tobytes()
            files[split].write(data)
            hashes[split].update(data)
            splits[split]["tokens"] += len(tokens)
            splits[split]["bytes"] += len(text.encode())
            splits[split]["documents"] += ends

    try:
        for split, text, ends in corpus.documents():
            batch.append((split, well_formed(text), ends))
            size += len(text)
            if size >= PIECE:
                flush()
                done += size
                batch, size = [], 0
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    progress(f"encoded {done / 1e6:,.0f} MB")
        flush()
        progress("")
        for file in files.values():
            _sync(file)
    finally:
        for file in files.values():
            file.close()
    for split, entry in splits.items():
        entry["sha256"] = hashes[split].hexdigest()
        if not entry["bytes"]:
            raise ValueError(f"no text for {SPLITS[split]}: use more text or another --val_fraction")
    return {"dtype": dtype, "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text, "splits": splits}


def _check_free(out_dir: Path, overwrite: bool) -> None:
    if not out_dir.exists() or out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    if not (out_dir / META_FILE).is_file():
        raise ValueError(f"--out_dir {out_dir} exists and is not a prepared data set; choose another folder")
    if not overwrite:
        raise ValueError(f"--out_dir {out_dir} holds a data set; add --overwrite to replace it")
    if others := {path.name for path in out_dir.iterdir()} - {META_FILE, TOKENIZER_FILE, *SPLITS.values()}:
        raise ValueError(f"--out_dir {out_dir} holds {min(others)!r} beside the data set; move it away before --overwrite")


def _lock(folder: Path) -> int | None:
    """A descriptor holding the lock of `folder`, which ends with the process; None while another one holds it."""
    descriptor = os.open(folder if fcntl else os.devnull, os.O_RDONLY)
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


@contextmanager
def _alone_in(folder: Path):
    """Among these programs, one at a time renames things in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY) if fcntl and folder.is_dir() else None
    try:
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _clean_up(out_dir: Path) -> None:
    """Removes what killed runs left beside `out_dir`; puts an old data set back that was caught between two renames."""
    for old in out_dir.parent.glob(f".{glob.escape(out_dir.name)}.old-*"):
        if not out_dir.exists() and (old / "replaced").exists():
            os.rename(old / "replaced", out_dir)
        shutil.rmtree(old, ignore_errors=True)
    for folder in out_dir.parent.glob(f".{glob.escape(out_dir.name)}.new-*") if fcntl else ():
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _publish(folder: Path, out_dir: Path, overwrite: bool) -> None:
    """Renames `folder` to `out_dir`. No system swaps two folders in one portable step, so the old one steps aside first."""
    _sync_folder(folder)
    _check_free(out_dir, overwrite)  # somebody else may have been faster
    old = None
    if out_dir.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old-", dir=out_dir.parent))
        os.rename(out_dir, old / "replaced")
    os.rename(folder, out_dir)
    _sync_folder(out_dir.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if fcntl:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# --- The command line -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="prepare.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                     description=__doc__)
    add = parser.add_argument
    add("--source", default="python", metavar="NAME|PATH", help=f"python (default), {', '.join(CORPORA)}, or a .txt, .md or .jsonl file "
        "or a folder of them")
    add("--tokenizer", default="bpe", metavar="NAME", help="bpe (default), byte, gpt2 or another name of tiktoken's, hf:FOLDER")
    add("--vocab_size", type=int, help=f"tokens of a bpe vocabulary, end-of-text included (default {VOCAB_SIZE})")
    add("--content", choices=("prose", "code", "both"), help="of --source python: language topics and docstrings, sources, or "
        "topics and sources (default both)")
    add("--shards", type=int, help="of --source fineweb-edu: how many of its 14 files, 2 GB each (default 1)")
    add("--val_fraction", type=float, default=0.05, help="share of the text to validate on (default 0.05)")
    add("--out_dir", metavar="FOLDER", help="where the data set lands (default data/<name of the source>)")
    add("--overwrite", action="store_true", help="replace a data set that is there")
    add("--seed", type=int, default=0, help="of the train/validation split (default 0)")
    add("--info", metavar="FOLDER", help="print what a prepared folder holds, verify its hashes, and end")
    options = vars(parser.parse_args(arguments))
    try:
        if info := options.pop("info"):
            dataset = open_dataset(info, verify=True)
            dataset.tokenizer
            print(describe(dataset))
            print("sizes, hashes, token ids and tokenizer verified")
        else:
            prepare(**options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
