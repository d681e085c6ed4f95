"""Where text comes from: Python's own library, local files and folders, named public corpora.

Every source is a `Corpus`: a stream of documents, each on one side of the train/validation split for good. Files of any
size stream through. Read next: data/prepare.py, which turns a corpus into tokens.
"""

import ast
import hashlib
import http.client
import importlib.util
import json
import os
import re
import sys
import sysconfig
import urllib.request
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.tokenizer import END_OF_TEXT, progress, well_formed
from options import sha256

DATA = Path(__file__).resolve().parent
DOWNLOADS = DATA / "downloads"
PIECE = 1 << 20  # characters read at once
RECORD = 64 << 20  # characters of the longest line of a .jsonl file


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
    Raises ValueError if this Python carries none of it.
    """
    topics, missing = {}, []
    if content != "code":
        try:
            from pydoc_data.topics import topics  # nothing but data
        except ImportError:
            missing.append("pydoc_data.topics (the language topics)")
    archives = [zipfile.Path(p) for p in sys.path if re.search(r"python\d+\.zip$", p) and zipfile.is_zipfile(p)]
    modules, sources = {}, set()
    for root in (Path(sysconfig.get_path("stdlib")), *archives):
        for name, source in python_files(root) if root.is_dir() else ():
            if source not in sources:
                sources.add(source)
                modules[name] = source
    if not modules:
        missing.append("the sources of the standard library")
    if not modules and not topics:
        raise ValueError("this Python carries neither its sources nor pydoc's topics: use --source FILE_OR_FOLDER")

    seen, texts = set(), {}  # texts: name -> (kind, text)
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):  # the long ones are made of short ones
        text = (
            str(topics[topic]).replace('\u201c"', '"').replace('"\u201d', '"')
        )  # quotation marks around quotation marks
        texts[f"topics/{topic}"] = ("topics", unseen_paragraphs(text, seen))
    for name, source in modules.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes in old files
                text = importlib.util.decode_source(source)
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        if content == "prose":
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            texts[name] = ("docstrings", unseen_paragraphs("\n\n".join(docstrings(tree, module)), seen))
        else:
            texts[name] = ("code", clean_code(text, tree))
    texts = {name: (kind, text.strip() + "\n") for name, (kind, text) in texts.items() if len(text) >= 200}
    bytes_of = dict.fromkeys(("topics", "docstrings", "code"), 0)
    for kind, text in texts.values():
        bytes_of[kind] += len(text.encode())
    # By a hash of each name alone, so that a module stays where it is in every version; at least one on either side.
    order = sorted(texts, key=lambda name: position(name, seed))
    count = sum(position(name, seed) < val_fraction for name in order)
    validation = set(order[: min(max(count, 1), len(order) - 1)])

    def documents():
        for name in sorted(texts):
            yield "val" if name in validation else "train", texts[name][1], True

    return Corpus(documents, sum(bytes_of.values()), dict(content=content, bytes_of=bytes_of, missing=missing))


def python_files(folder, prefix="") -> Iterator[tuple[str, bytes]]:
    """(path below `folder`, content) of the modules there; `folder` is a Path or a zipfile.Path."""
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
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
COMPRESSED, UNPACK = (".gz", ".zst", ".zip", ".bz2", ".xz", ".7z"), "compressed: unpack it first"


@dataclass
class TextFile:
    """One file of text. The counts are those of the last reading."""

    path: Path
    name: str  # below the source
    encoding: str
    bytes: int = 0  # of its text, in UTF-8, as far as is known
    val_share: float = 0.0  # to validate on: 0 nothing, 1 all of it, between: it is cut
    by_record: bool = False  # cut by a hash of each record, not at the end
    replaced: int = 0  # bytes that were not in the encoding
    divisions: int = 0  # <|endoftext|> in the text

    @property
    def records(self) -> bool:
        return self.path.suffix.lower() == ".jsonl"

    def texts(self) -> Iterator[tuple[str, bool]]:
        """(text, ends): the documents in order, the last text of each with `ends` set. ValueError for a bad record."""
        self.replaced = self.divisions = 0
        errors = "surrogateescape" if self.encoding == "utf-8-sig" else "replace"
        with open(self.path, encoding=self.encoding, errors=errors, newline="\n") as stream:
            if self.records:
                for text in self._records(stream):
                    yield text, True
            elif self.path.suffix.lower() == ".txt":
                yield from self._divided(self._pieces(stream))
            else:
                for text in self._pieces(stream):
                    yield text, False
                yield "", True

    def _repair(self, text: str) -> str:
        """`text` with U+FFFD for each byte that was not in the encoding."""
        if not text.isascii():
            wrong = "[\udc80-\udcff]" if self.encoding == "utf-8-sig" else "\ufffd"  # as the decoder left them
            text, count = re.subn(wrong, "\ufffd", text)
            self.replaced += count
        return text

    def _pieces(self, stream) -> Iterator[str]:
        """The text in pieces of about PIECE characters, cut before a newline or else a space, never in END_OF_TEXT."""
        rest = ""
        while block := stream.read(PIECE):
            text = rest + self._repair(block)
            cut = text.rfind("\n") if text.rfind("\n") > 0 else text.rfind(" ")
            if cut <= 0:
                begun = (n for n in range(len(END_OF_TEXT) - 1, 0, -1) if text.endswith(END_OF_TEXT[:n]))
                cut = len(text) - next(begun, 0)
            if cut:
                yield text[:cut]
            rest = text[cut:]
        if rest:
            yield rest

    def _divided(self, pieces) -> Iterator[tuple[str, bool]]:
        """Documents between the spellings of END_OF_TEXT, without the white space around those. A text that has none is
        one document, as it stands."""
        waiting, begun = "", False  # text not yet yielded; whether some of its document was
        for piece in pieces:
            for i, part in enumerate(piece.split(END_OF_TEXT)):
                if i:
                    self.divisions += 1
                    if begun or waiting.strip():
                        yield waiting.rstrip(), True
                    waiting, begun = "", False
                elif waiting and part.strip():
                    yield waiting, False
                    waiting, begun = "", True
                waiting += part.lstrip() if self.divisions and not begun and not waiting else part
        if self.divisions:
            waiting = waiting.rstrip()
        if begun or waiting:
            yield waiting, True

    def _records(self, stream) -> Iterator[str]:
        number = 0
        while line := stream.readline(RECORD):
            number += 1
            if len(line) == RECORD:
                raise ValueError(f"{self.path}, line {number}: longer than {RECORD} characters")
            if not line.strip():
                continue
            try:
                record = json.loads(self._repair(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f'{self.path}, line {number}: no object with a string in "text"')
            yield record["text"]


def local_corpus(source: Path, val_fraction: float, seed: int) -> Corpus:
    """A text file, a .jsonl file (with a "text" field in each line), or all SUFFIXES below a folder.

    Validation is whole files, of about `val_fraction` of the bytes; where whole files cannot give that, the end of the
    largest, or some of its records. Raises ValueError, naming the file and the reason, if there is no text.
    """
    files, skipped = find_texts(source)
    for file, _, size in measure([file for file in files if not file.bytes], "measuring the text"):
        file.bytes += size
    if not sum(file.bytes for file in files):
        why = "; ".join(skipped_notes(skipped)) or "nothing there, or records that are empty"
        raise ValueError(f"--source {source}: no text in {', '.join(SUFFIXES)} files there ({why})")
    divide_files(files, val_fraction, seed, skipped)
    return Corpus(
        lambda: (document for file in files for document in split_documents(file, seed)),
        sum(file.bytes for file in files),
        notes=lambda: [*text_notes(files), *skipped_notes(skipped)],
    )


def measure(files: list[TextFile], what: str) -> Iterator[tuple[TextFile, str, int]]:
    """(file, text, its bytes in UTF-8) of all texts of the files."""
    bar = progress(what, sum(file.path.stat().st_size for file in files))
    for file in files:
        for text, _ in file.texts():
            size = len(well_formed(text).encode())
            bar.update(size)
            yield file, text, size
    bar.close()


def find_texts(source: Path) -> tuple[list[TextFile], dict[str, list[str]]]:
    """The files to read, sorted, and {reason: names} of the others. Links are followed, each file is read once."""
    files, skipped, seen = [], defaultdict(list), {os.path.realpath(source)}
    bar = progress("looking at files", unit=" files")

    def look(folder, prefix):
        try:
            paths = sorted(folder.iterdir())
        except OSError:
            return skipped["unreadable"].append(prefix)
        for path in paths:
            name, real, suffix = prefix + path.name, os.path.realpath(path), path.suffix.lower()
            if path.name.startswith("."):
                skipped["hidden"].append(name)
            elif real in seen:
                skipped["linked again"].append(name)
            elif path.is_dir():
                seen.add(real)
                look(path, name + "/")
            elif suffix not in SUFFIXES:
                skipped[UNPACK if suffix in COMPRESSED else suffix or "without a suffix"].append(name)
            else:
                seen.add(real)
                file, why = recognise(path, name)
                skipped[why].append(name) if why else files.append(file)
            bar.update(1)

    if source.is_dir():
        look(source, "")
    else:
        file, why = recognise(source, source.name)
        if why:
            hint = "; for token files give their folder" if source.suffix == ".bin" else ""
            raise ValueError(f"--source {source}: the file is {why}{hint}")
        files.append(file)
    bar.close()
    return files, skipped


def recognise(path: Path, name: str) -> tuple[TextFile | None, str]:
    """The file with its encoding, or None and the reason why it is not read: "empty", "binary" and the like."""
    try:
        if not path.is_file():
            return None, "unreadable"
        with open(path, "rb") as stream:
            head = stream.read(1 << 16)
    except OSError:
        return None, "unreadable"
    if not head:
        return None, "empty"
    if path.suffix.lower() in COMPRESSED:
        return None, UNPACK
    marks = {"utf-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "utf-16": (b"\xff\xfe", b"\xfe\xff")}
    encoding = next((name for name, mark in marks.items() if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig":
        even, odd = head[0::2].count(0), head[1::2].count(0)
        if max(even, odd) > 0.15 * len(head) and min(even, odd) < 0.05 * len(head):
            return None, "UTF-16 without a byte order mark: iconv -f UTF-16 -t UTF-8 converts it"
        if sum(head.count(code) for code in (*range(8), *range(14, 27), *range(28, 32))) > 0.02 * len(head):
            return None, "binary"
    file = TextFile(path, name, encoding)
    if encoding == "utf-8-sig" and not file.records:
        file.bytes = path.stat().st_size  # else only reading it tells
    return file, ""


def about(share, wanted) -> bool:
    """Whether validation has about the size that was asked for: within a quarter."""
    return 0.75 * wanted <= share <= 1.25 * wanted


def divide_files(files: list[TextFile], val_fraction: float, seed: int, skipped: dict) -> None:
    """Sets the share of each file to validate on.

    Files named train.* and val.*, valid*.* or test.* are the splits. Otherwise a hash of each name chooses, so that a
    file stays where it is as others come and go; if that gives another share of the bytes, files are taken in the
    order of the hashes while they fit, and if that gives too little, the largest file is cut.
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
        used = {file.name for file in training + validation}
        skipped["beside train and val"] = [file.name for file in files if file.name not in used]
        files[:] = [file for file in files if file.name in used]
        return

    total = sum(file.bytes for file in files)
    wanted = val_fraction * total
    order = sorted(files, key=lambda file: position(file.name, seed))
    chosen = [file for file in order if position(file.name, seed) < val_fraction]
    size = sum(file.bytes for file in chosen)
    if not about(size, wanted):
        chosen, size = [], 0
        for file in order:
            if size + file.bytes <= wanted:
                chosen.append(file)
                size += file.bytes
    for file in chosen:
        file.val_share = 1.0
    if not about(size, wanted):
        largest = max((file for file in files if not file.val_share), key=lambda file: file.bytes)
        largest.val_share = (wanted - size) / largest.bytes
        largest.bytes = drawn = 0  # to cut it, its size must be exact
        for _, text, n in measure([largest], f"measuring {printable(largest.name)}"):
            largest.bytes += n
            drawn += n if largest.records and split_of(text, largest.val_share, seed) == "val" else 0
        # Many records are split as a hash of each one says; a few long ones are cut.
        largest.by_record = largest.records and about(drawn, largest.val_share * largest.bytes)


def split_documents(file: TextFile, seed: int) -> Iterator[tuple[str, str, bool]]:
    """(split, text, ends) of one file."""
    if file.val_share in (0, 1):
        split = "val" if file.val_share else "train"
        return ((split, text, ends) for text, ends in file.texts())
    if file.by_record:
        return ((split_of(text, file.val_share, seed), text, ends) for text, ends in file.texts())
    return cut_documents(file.texts(), (1 - file.val_share) * file.bytes, 0.1 * file.val_share * file.bytes)


def cut_documents(texts, train_bytes: float, short: float) -> Iterator[tuple[str, str, bool]]:
    """`train_bytes` to train on, the rest to validate on. A document of less than `short` bytes stays whole, another
    one is cut at the end of a line or a word."""
    done, split, begins = 0, "train", True
    for text, ends in texts:
        encoded = well_formed(text).encode()
        if split == "train" and done + len(encoded) > train_bytes:
            split = "val"
            if not (done and begins and ends and len(encoded) <= short):
                cut = max(0, int(train_bytes) - done)
                line_or_word = [encoded.find(mark, cut) + 1 for mark in (b"\n", b" ")]
                cut = next((end for end in line_or_word if 0 < end < len(encoded)), cut)
                while cut < len(encoded) and encoded[cut] & 0xC0 == 0x80:  # inside a character
                    cut += 1
                if cut or not begins:
                    yield "train", encoded[:cut].decode(), True
                text = encoded[cut:].decode()
        yield split, text, ends
        done, begins = done + len(encoded), ends


def text_notes(files: list[TextFile]) -> list[str]:
    divisions, replaced = (sum(getattr(file, count) for file in files) for count in ("divisions", "replaced"))
    kinds = {
        f"divided into documents at {divisions:,} {END_OF_TEXT}": lambda file: file.divisions,
        "decoded from UTF-16 or UTF-32": lambda file: file.encoding != "utf-8-sig",
        f"replaced {replaced:,} bytes that are no UTF-8": lambda file: file.replaced,
        "more than one byte in a thousand is no UTF-8 (iconv converts)": lambda file: 1000 * file.replaced > file.bytes,
    }
    chosen = {what: [file.name for file in files if belongs(file)] for what, belongs in kinds.items()}
    return [f"{what}: {listing(names)}" for what, names in chosen.items() if names]


def skipped_notes(skipped: dict[str, list[str]]) -> list[str]:
    kinds = [f"{reason}: {listing(names)}" for reason, names in skipped.items() if names]
    more = f"; and {len(kinds) - 12} other kinds" if kinds[12:] else ""
    return [f"skipped: {'; '.join(kinds[:12])}{more}"] if kinds else []


def listing(names: list[str]) -> str:
    """How many, and the first three of them."""
    first = ", ".join(map(printable, names[:3])) + (", ..." if names[3:] else "")
    return f"{len(names):,} file{'s' if names[1:] else ''} ({first})"


def printable(text: str, length: int = 100) -> str:
    """At most `length` characters of a text, a file's name say, in one line that a terminal can show."""
    return "".join(c if c.isprintable() else " " for c in text)[:length]


# ---------------------------------------------------------------------------------------------------------------------
# Named corpora, each of a pinned revision, so that a file never changes

SHAKESPEARE = (  # URL, bytes, SHA-256
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/"
    "tinyshakespeare/input.txt",
    1115394,
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
            sum(file.bytes for file in texts),
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


def download(path: Path, url: str, size: int, checksum: str) -> None:
    """Downloads `url` to `path` unless it is there. What has arrived is kept beside it as .part and gone on with.

    OSError if the file cannot be had; ValueError, and nothing kept, if it is not the one of `size` and `checksum`.
    """
    if path.is_file():
        if path.stat().st_size != size or sha256(path) != checksum:
            raise ValueError(f"{path} is not the expected file of {size:,} bytes: remove it and run again")
        return
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        request = urllib.request.Request(url, headers={"User-Agent": "nanoMEA", "Range": f"bytes={have}-"})
        bar = progress(f"downloading {path.name}", size)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                resumed = response.status == 206
                with open(part, "ab" if resumed else "wb") as file:  # a server may ignore ranges and send everything
                    bar.update(have if resumed else 0)
                    while block := response.read(1 << 16):
                        file.write(block)
                        bar.update(len(block))
            reason = "the connection broke"
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())
        finally:
            bar.close()
        have = part.stat().st_size if part.exists() else 0
        if have < size:
            kept = f"{have:,} of {size:,} bytes are kept, run it again to go on" if have else "connect to the network"
            raise OSError(f"could not download {url} ({reason}): {kept}, or {OTHERWISE}")
    if part.stat().st_size != size or sha256(part) != checksum:
        part.unlink()
        raise ValueError(f"{url} is not the expected file of {size:,} bytes: it has changed, or arrived damaged")
    os.replace(part, path)
