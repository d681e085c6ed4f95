"""Where text comes from: Python's own library, local files and folders, named public corpora.

Every source is a `Corpus`: a stream of documents, each on one side of the train/validation split for good. Files of any
size stream through. Read next: data/prepare.py, which turns a corpus into tokens.
"""

import ast
import codecs
import hashlib
import http.client
import importlib.util
import json
import os
import re
import sysconfig
import urllib.request
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from data.tokenizer import END_OF_TEXT, progress, well_formed
from options import sha256

DATA = Path(__file__).resolve().parent
DOWNLOADS = DATA / "downloads"
PIECE = 1 << 20  # characters read at once


@dataclass
class Corpus:
    """A source of text.

    `documents()` yields (split, text, ends): a document may come in several texts, the last of which has `ends` set.
    Called again it yields the same. `size` is the number of bytes, roughly. `meta` goes into meta.json. After the
    documents were read, `notes()` says in words what a user should know.
    """

    documents: Callable[[], Iterator[tuple[str, str, bool]]]
    size: int
    meta: dict = field(default_factory=dict)
    notes: Callable[[], list[str]] = list


def position(text: str, seed: int) -> float:
    """A hash of `text`, uniform in [0, 1). Below the validation share means: to validate on."""
    digest = hashlib.blake2b(f"{seed}:".encode() + text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(text: str, val_fraction: float, seed: int) -> str:
    """The side of a record. It follows from the text alone, so equal records are on the same side."""
    return "val" if position(text, seed) < val_fraction else "train"


# ---------------------------------------------------------------------------------------------------------------------
# The text that comes with Python

SKIPPED_FOLDERS = set(  # installed packages, tests, tables of character codes, copies of topics, Python 2
    "site-packages dist-packages __pycache__ test tests idle_test encodings pydoc_data lib2to3 ensurepip "
    "lib-dynload".split()
)
TABLE_LINES = 60  # a longer statement at module level that is no definition is a table
LICENCE = re.compile(r"copyright|licen[cs]e|all rights reserved", re.I)


def python_corpus(content: str, val_fraction: float, seed: int) -> Corpus:
    """Language topics of pydoc with the standard library's docstrings ("prose"), its sources ("code"), or topics and
    sources ("both": a docstring is then read where it stands). Modules are read as files, never imported.

    All text of one module lies in one split. Topics repeat each other, docstrings sometimes: a paragraph is kept once.
    Raises ValueError if this Python carries no sources.
    """
    topics, notes = {}, []
    if content != "code":
        try:
            from pydoc_data.topics import topics  # nothing but data
        except ImportError:
            notes.append("this Python comes without pydoc's language topics")
    modules = {}
    for name, source in python_files(Path(sysconfig.get_path("stdlib"))):
        modules.setdefault(source, name)  # of equal files the first
    if not modules:
        raise ValueError("this Python comes without its sources: use --source FILE_OR_FOLDER")

    seen, texts = set(), {}
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):  # the long ones are made of short ones
        text = str(topics[topic]).replace('\u201c"', '"').replace('"\u201d', '"')  # quoted twice
        texts[f"topics/{topic}"] = unseen_paragraphs(text, seen)
    for source, name in modules.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes in old files
                text = importlib.util.decode_source(source)
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        if content == "prose":
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            texts[name] = unseen_paragraphs("\n\n".join(docstrings(tree, module)), seen)
        else:
            texts[name] = clean_code(text, tree)
    texts = {name: text.strip() + "\n" for name, text in texts.items() if len(text) >= 200}
    # By a hash of each name alone, so that a module stays where it is in every version; at least one on either side.
    order = sorted(texts, key=lambda name: position(name, seed))
    count = sum(position(name, seed) < val_fraction for name in order)
    validation = set(order[: min(max(count, 1), len(order) - 1)])

    def documents():
        for name in sorted(texts):
            yield "val" if name in validation else "train", texts[name], True

    size = sum(len(text.encode()) for text in texts.values())
    return Corpus(documents, size, dict(content=content), lambda: notes)


def python_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """(path below `folder`, content) of the modules there."""
    entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.name.endswith(".py") and not entry.name.startswith("_sysconfigdata") and entry.is_file():
            yield prefix + entry.name, entry.read_bytes()
    for entry in entries:
        if entry.name not in SKIPPED_FOLDERS and entry.is_dir():
            yield from python_files(entry, f"{prefix}{entry.name}/")


def docstrings(tree: ast.AST, name: str) -> Iterator[str]:
    """The docstrings of a module, each under a title: the dotted name, with the arguments of a function."""
    if isinstance(tree, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if isinstance(tree, ast.ClassDef):
            title = f"class {name}"
        elif isinstance(tree, ast.Module):
            title = f"{name}\n{'=' * len(name)}"
        else:
            title = f"{name}({ast.unparse(tree.args)})"
        if doc := ast.get_docstring(tree):
            yield f"{title}\n\n{doc}"
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from docstrings(child, name)


def unseen_paragraphs(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs in `seen`, to which its own are added; short ones are kept, they are headings."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\t", "    ")):
        bare = " ".join(paragraph.split())
        if len(bare) < 60 or bare not in seen:
            kept.append("\n".join(line.rstrip() for line in paragraph.split("\n")))
        seen.add(bare)
    return "\n\n".join(kept)


def clean_code(text: str, tree: ast.Module) -> str:
    """Source text without licence comments, interpreter lines and long tables."""
    lines = text.replace("\f", "").expandtabs().split("\n")
    drop = set()
    for node in tree.body:
        table = isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) or (
            isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        )
        if table and node.end_lineno - node.lineno >= TABLE_LINES:
            drop.update(range(node.lineno - 1, node.end_lineno))
    comment = []  # the lines of the block comment that goes on at line i
    for i, line in enumerate([*lines, ""]):
        if line.startswith("#"):
            comment.append(i)
            if re.match(r"#!|#.*coding[:=]", line):
                drop.add(i)
        else:
            if LICENCE.search("\n".join(lines[j] for j in comment)):
                drop.update(comment)
            comment = []
    kept = "\n".join(line.rstrip() for i, line in enumerate(lines) if i not in drop)
    return re.sub(r"\n{4,}", "\n\n\n", kept)


# ---------------------------------------------------------------------------------------------------------------------
# Local files

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")  # what is read in a folder
COMPRESSED = (".gz", ".zst", ".zip", ".bz2", ".xz", ".7z")
DIVIDED = tuple(END_OF_TEXT[:n] for n in range(1, len(END_OF_TEXT)))  # how a piece ends that was cut inside of it


@dataclass
class TextFile:
    """One file of text. The counts are those of the last reading."""

    path: Path
    name: str  # below the source
    encoding: str
    bytes: int = 0  # of its text, in UTF-8
    records: int = 0  # of a .jsonl file
    val_share: float = 0.0  # to validate on: 0 nothing, 1 all of it, between: it is cut
    replaced: int = 0  # U+FFFD in it, which stands for what was not in the encoding
    divisions: int = 0  # <|endoftext|> in the text

    def texts(self) -> Iterator[tuple[str, bool]]:
        """(text, ends): the documents in order, the last text of each with `ends` set. ValueError for a bad record."""
        self.replaced = self.divisions = self.records = 0
        with open(self.path, encoding=self.encoding, errors="replace", newline="\n") as stream:
            if self.path.suffix.lower() == ".jsonl":
                parts = self._records(stream)
            elif self.path.suffix.lower() == ".txt":
                parts = self._divided(self._pieces(stream))
            else:
                parts = chain(((piece, False) for piece in self._pieces(stream)), [("", True)])
            for text, ends in parts:
                self.replaced += text.count("\ufffd")
                yield text, ends

    def _pieces(self, stream) -> Iterator[str]:
        """The text in pieces of PIECE characters and what is left of a line (of a long line, as much again)."""
        while piece := stream.read(PIECE):
            piece += stream.readline(PIECE)
            while piece.endswith(DIVIDED) and (more := stream.read(1)):
                piece += more
            yield piece

    def _divided(self, pieces) -> Iterator[tuple[str, bool]]:
        """Documents between the spellings of END_OF_TEXT, without the white space around those."""
        begun = False  # whether some of the document was yielded
        for piece in pieces:
            *ended, rest = piece.split(END_OF_TEXT)
            for text in ended:
                text = text.rstrip() if begun or not self.divisions else text.strip()
                self.divisions += 1
                if begun or text:
                    yield text, True
                begun = False
            rest = rest.lstrip() if self.divisions and not begun else rest
            if rest:
                yield rest, False
                begun = True
        if begun:
            yield "", True

    def _records(self, stream) -> Iterator[tuple[str, bool]]:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{self.path}, line {number}: not a JSON object with a string in "text"')
            self.records += 1
            yield text, True


def local_corpus(source: Path, val_fraction: float, seed: int) -> Corpus:
    """A text file, a .jsonl file (with a "text" field in each line), or all SUFFIXES below a folder.

    Validation is `val_fraction` of the bytes, in whole files but one. Raises ValueError, naming the file and the
    reason, if there is no text.
    """
    files, skipped = find_texts(source)
    bar = progress("measuring the text", sum(file.path.stat().st_size for file in files))
    for file in files:
        for text, _ in file.texts():
            file.bytes += (size := len(well_formed(text).encode()))
            bar.update(size)
    bar.close()
    if not sum(file.bytes for file in files):
        why = "; ".join(skipped_notes(skipped)) or "nothing there, or records that are empty"
        raise ValueError(f"--source {source}: no text in {', '.join(SUFFIXES)} files there ({why})")
    files = divide_files(files, val_fraction, seed, skipped)
    return Corpus(
        lambda: (document for file in files for document in split_documents(file, seed)),
        sum(file.bytes for file in files),
        notes=lambda: [*text_notes(files), *skipped_notes(skipped)],
    )


def find_texts(source: Path) -> tuple[list[TextFile], dict[str, list[str]]]:
    """The files to read, sorted, and {reason: names} of the others. Links are followed, each file is read once."""
    if not source.is_dir():
        encoding, why = recognise(source)
        if why:
            hint = "; for token files give their folder" if source.suffix == ".bin" else ""
            raise ValueError(f"--source {source}: the file is {why}{hint}")
        return [TextFile(source, source.name, encoding)], {}
    files, skipped, seen = [], defaultdict(list), {source.resolve()}

    def look(folder):
        for path in sorted(folder.iterdir()):
            name, real, suffix = path.relative_to(source).as_posix(), path.resolve(), path.suffix.lower()
            if path.name.startswith("."):
                skipped["hidden"].append(name)
            elif real in seen:
                skipped["linked again"].append(name)
            elif path.is_dir():
                seen.add(real)
                look(path)
            elif suffix not in SUFFIXES + COMPRESSED:
                skipped[suffix or "without a suffix"].append(name)
            else:
                seen.add(real)
                encoding, why = recognise(path)
                skipped[why].append(name) if why else files.append(TextFile(path, name, encoding))

    look(source)
    return files, skipped


def recognise(path: Path) -> tuple[str, str]:
    """(encoding, why the file is not read: "empty", "binary" and the like, or nothing)."""
    if path.suffix.lower() in COMPRESSED:
        return "", "compressed: unpack it first"
    try:
        with open(path, "rb") as stream:
            head = stream.read(1 << 16)
    except OSError:
        return "", "unreadable"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16", ""
    if b"\0" in head:
        return "", "binary, or UTF-16 without a byte order mark (iconv -f UTF-16 -t UTF-8 converts it)"
    return "utf-8-sig", "" if head else "empty"


def divide_files(files: list[TextFile], val_fraction: float, seed: int, skipped: dict) -> list[TextFile]:
    """Sets the share of each file to validate on; returns the files that are used.

    Files named train.* and val.*, valid*.* or test.* are the splits. Otherwise the first files by a hash of each name
    are for validation, up to `val_fraction` of the bytes, and the file on the border is cut: adding files moves few.
    """
    named = defaultdict(list)
    for file in files if len(files) > 1 else ():
        match = re.fullmatch(r"(train|val|test)(id|idation)?([-_.]\d+([-_]of[-_]\d+)?)?\.\w+", file.name.lower())
        named[match[1] if match else ""].append(file)
    if validation := named["val"] or (named["train"] and named["test"]):
        training = named["train"] or named[""]
        if not training:
            raise ValueError("there is text to validate on and none to train on: name a file train.*")
        for file in validation:
            file.val_share = 1.0
        used = [file for file in files if file in training or file in validation]
        skipped["beside train and val"] = [file.name for file in files if file not in used]
        return used
    left = val_fraction * sum(file.bytes for file in files)
    for file in sorted(files, key=lambda file: position(file.name, seed)):
        file.val_share = min(1.0, left / max(1, file.bytes))
        left = max(0, left - file.bytes)
    return files


def split_documents(file: TextFile, seed: int) -> Iterator[tuple[str, str, bool]]:
    """(split, text, ends) of one file. A file for both splits is cut near its end; of many records a hash of each
    decides, which keeps equal ones together."""
    if file.val_share in (0, 1):
        split = "val" if file.val_share else "train"
        return ((split, text, ends) for text, ends in file.texts())
    if file.val_share * file.records >= 50:
        return ((split_of(text, file.val_share, seed), text, ends) for text, ends in file.texts())
    return cut_documents(file.texts(), (1 - file.val_share) * file.bytes)


def cut_documents(texts, train_bytes: float) -> Iterator[tuple[str, str, bool]]:
    """`train_bytes` to train on, the rest to validate on, cut at the end of a line or a word."""
    done, split = 0, "train"
    for text, ends in texts:
        size = len(well_formed(text).encode())
        if split == "train" and done + size > train_bytes:
            at = max(1, int(len(text) * (train_bytes - done) / size))
            at = text.find("\n", at, -1) + 1 or text.find(" ", at, -1) + 1 or at
            yield "train", text[:at], True
            split, text = "val", text[at:]
        yield split, text, ends
        done += size


def text_notes(files: list[TextFile]) -> list[str]:
    divisions, replaced = (sum(getattr(file, count) for file in files) for count in ("divisions", "replaced"))
    kinds = {
        f"divided into documents at {divisions:,} {END_OF_TEXT}": [file.name for file in files if file.divisions],
        "decoded from UTF-16": [file.name for file in files if file.encoding == "utf-16"],
        f"{replaced:,} U+FFFD, which replace what is no UTF-8": [file.name for file in files if file.replaced],
    }
    return [f"{what}: {listing(names)}" for what, names in kinds.items() if names]


def skipped_notes(skipped: dict[str, list[str]]) -> list[str]:
    kinds = [f"{reason}: {listing(names)}" for reason, names in skipped.items() if names]
    return [f"skipped: {'; '.join(kinds)}"] if kinds else []


def listing(names: list[str]) -> str:
    """How many, and the first three of them."""
    first = ", ".join(map(printable, names[:3])) + (", ..." if names[3:] else "")
    return f"{len(names):,} file{'s' if names[1:] else ''} ({first})"


def printable(text: str, length: int = 100) -> str:
    """At most `length` characters of a text, a file's name say, in one line that a terminal can show."""
    return "".join(c if c.isprintable() else " " for c in text)[:length]


# ---------------------------------------------------------------------------------------------------------------------
# Named corpora, each of a pinned revision, so that a file never changes

SHAKESPEARE = (  # URL, SHA-256
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/"
    "tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
HUB = {  # name: (repository on huggingface.co/datasets, revision, files)
    "tinystories": (
        "roneneldan/TinyStories",
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"],
    ),
    "fineweb-edu": (
        "HuggingFaceFW/fineweb-edu",
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        [f"sample/10BT/{i:03}_00000.parquet" for i in range(14)],
    ),
}
CORPORA = ("shakespeare", *HUB)
OTHERWISE = "give a local file with --source FILE, or use --source python, which needs no download"


def named_corpus(name: str, shards: int, val_fraction: float, seed: int) -> Corpus:
    """Downloads a corpus of CORPORA, or takes it from DOWNLOADS. TinyStories brings a validation file of its own.

    Raises ValueError for a missing package or a file that is not the expected one, OSError if it cannot be had.
    """
    if name == "shakespeare":
        download(DOWNLOADS / "shakespeare.txt", *SHAKESPEARE)
        corpus = local_corpus(DOWNLOADS / "shakespeare.txt", val_fraction, seed)
        corpus.meta = dict(urls=[SHAKESPEARE[0]])
        return corpus
    repository, revision, files = HUB[name]
    meta = dict(urls=[f"https://huggingface.co/datasets/{repository}"], revision=revision)
    if name == "tinystories":
        texts = [find_texts(hub_file(repository, revision, file))[0][0] for file in files]
        texts[1].val_share = 1.0
        return Corpus(
            lambda: (document for file in texts for document in split_documents(file, seed)),
            sum(file.path.stat().st_size for file in texts),
            meta,
            lambda: text_notes(texts),
        )
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("fineweb-edu comes as parquet files: pip install pyarrow") from None
    paths = [hub_file(repository, revision, file) for file in files[:shards]]

    def documents():
        for path in paths:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield split_of(text, val_fraction, seed), text, True

    return Corpus(documents, sum(path.stat().st_size for path in paths), meta)


def hub_file(repository: str, revision: str, file: str) -> Path:
    """A file of a data set on huggingface.co, in DOWNLOADS; huggingface_hub resumes and checks downloads."""
    if (DOWNLOADS / file).is_file():
        return DOWNLOADS / file
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"{repository} comes from huggingface.co: pip install huggingface_hub") from None
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision, local_dir=DOWNLOADS))
    except Exception as error:  # its errors and those of its HTTP library have no common class
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise OSError(f"could not download {file} of {repository} ({reason}): connect, or {OTHERWISE}") from None


def download(path: Path, url: str, checksum: str) -> None:
    """Downloads the small file at `url` to `path` unless it is there. OSError if it cannot be had; ValueError, and
    nothing kept, if its SHA-256 is another."""
    if not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"could not download {url} ({error}): connect to the network, or {OTHERWISE}") from None
        if hashlib.sha256(content).hexdigest() != checksum:
            raise ValueError(f"{url} is not the expected file: it has changed, or arrived damaged; {OTHERWISE}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_bytes(content)
        os.replace(path.with_suffix(".part"), path)
    elif sha256(path) != checksum:
        raise ValueError(f"{path} is not the expected file: remove it and run again")
