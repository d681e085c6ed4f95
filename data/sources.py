"""Where text comes from: Python's own library, local files and folders, named public corpora.

Every source is a `Corpus`: a stream of documents, each on one side of the train/validation split for good. Files of any
size stream through. Read next: data/prepare.py, which turns a corpus into tokens.
"""

import ast
import hashlib
import importlib.util
import json
import math
import os
import re
import sysconfig
import urllib.request
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from data.tokenizer import END_OF_TEXT, encoding_of, well_formed
from options import sha256

DATA = Path(__file__).resolve().parent
DOWNLOADS = DATA / "downloads"
PIECE = 1 << 20  # characters read at once


@dataclass
class Corpus:
    """A source of text.

    `documents()` yields (split, text, ends): a document may come in several texts, the last of which has `ends` set.
    Called again it yields the same. `size` is the number of bytes, roughly. `meta` goes into meta.json, `notes` say in
    words what a user should know. `skipped` counts the records without text that the last pass came upon.
    """

    documents: Callable[[], Iterator[tuple[str, str, bool]]]
    size: int
    meta: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)


def hash_fraction(text: str, seed: int) -> float:
    """A hash of `text`, uniform in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}:".encode() + text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(text: str, val_fraction: float, seed: int) -> str:
    """The side that a record, or all of a module by its name, is on: equal texts are on the same side."""
    return "val" if hash_fraction(text, seed) < val_fraction else "train"


# ---------------------------------------------------------------------------------------------------------------------
# The text that comes with Python

SKIPPED_FOLDERS = set(  # installed packages, tests, tables of character codes, copies of topics, Python 2
    "site-packages dist-packages __pycache__ test tests idle_test encodings pydoc_data lib2to3 ensurepip "
    "lib-dynload".split()
)
TABLE_LINES = 60  # a longer statement at module level that is no definition is a table
LICENCE = re.compile(r"copyright|licen[cs]e|all rights reserved", re.I)


def python_corpus(val_fraction: float, seed: int) -> Corpus:
    """The language topics of pydoc and the sources of the standard library, which are read and never imported.

    All text of one module lies in one split, by a hash of its name, so that it stays there in every version of Python.
    Topics repeat each other: a paragraph is kept once.
    """
    seen, texts = set(), {}
    try:
        from pydoc_data.topics import topics  # nothing but data
    except ImportError:  # some systems package it apart
        topics = {}
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):  # the long ones are made of short ones
        text = str(topics[topic]).replace('\u201c"', '"').replace('"\u201d', '"')  # quoted twice
        texts[f"topics/{topic}"] = unseen_paragraphs(text, seen)
    for name, source in library_modules():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes in old files
                text = importlib.util.decode_source(source)
                texts[name] = clean_code(text, ast.parse(text))
        except (SyntaxError, ValueError):
            continue
    texts = {name: text.strip() + "\n" for name, text in sorted(texts.items()) if len(text) >= 200}
    return Corpus(
        lambda: ((split_of(name, val_fraction, seed), text, True) for name, text in texts.items()),
        sum(len(text.encode()) for text in texts.values()),
    )


def library_modules() -> Iterator[tuple[str, bytes]]:
    """(path, content) of the standard library's modules, of equal files the first."""
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
                source = path.read_bytes()
                if source not in seen:
                    yield path.relative_to(root).as_posix(), source
                seen.add(source)


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

RECORDS = (".jsonl", ".parquet")  # a document in each record's "text"
SUFFIXES = (".txt", ".md", ".rst", ".py", *RECORDS)  # what is read in a folder
SPLIT_NAME = re.compile(r"(train|val|test)(id|idation)?([-_.]\d+([-_]of[-_]\d+)?)?\.\w+", re.I)


def local_corpus(source: Path, val_fraction: float, seed: int) -> Corpus:
    """A file of text or of records, or all SUFFIXES below a folder. Raises ValueError if there is no text."""
    skipped, files = Counter(), []
    for path in [source] if source.is_file() else files_below(source, skipped):
        if path != source and path.suffix.lower() not in SUFFIXES:
            skipped[path.suffix or "without suffix"] += 1
        elif not is_text(path):
            skipped["empty or not text"] += 1
        else:
            files.append(path)
    check_pyarrow(files)
    shares = validation_shares(source, files, val_fraction, seed)
    if len(shares) < len(files):
        skipped["beside train and val"] = len(files) - len(shares)
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted((+skipped).items()))
    if not files:
        raise ValueError(f"--source {source}: no text in {', '.join(SUFFIXES)} files there ({kinds or 'no files'})")
    return file_corpus(shares, seed, notes=[f"skipped files: {kinds}"] if kinds else [])


def files_below(source: Path, skipped: Counter) -> list[Path]:
    """The files below a folder and in folders that are linked there, sorted; what cannot be followed is counted.

    A folder that several paths lead to is read once, by a path without links if there is one. Hidden names are left
    out.
    """
    files, seen, folders = [], set(), deque([source])
    while folders:
        folder = folders.popleft()
        if (real := folder.resolve()) in seen:
            continue
        seen.add(real)
        try:
            paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
        except PermissionError:
            skipped["without permission"] += 1
            continue
        files += [path for path in paths if path.is_file()]
        skipped["behind a broken link"] += sum(not path.exists() for path in paths)
        inside = [path for path in paths if path.is_dir()]
        folders.extendleft(path for path in inside if not path.is_symlink())
        folders.extend(sorted(path for path in inside if path.is_symlink()))  # last, so that real paths come first
    return sorted(files)


def is_text(path: Path) -> bool:
    with open(path, "rb") as stream:
        head = stream.read(1 << 16)
    return bool(head) and (b"\0" not in head or encoding_of(head) != "utf-8-sig" or path.suffix.lower() == ".parquet")


def validation_shares(source: Path, files: list[Path], val_fraction: float, seed: int) -> dict[Path, float]:
    """The share of each file to validate on: 0 nothing, 1 all of it, between: `split_file` divides it. Files without a
    share are not used.

    Files named train.* and val.*, valid*.* or test.* are the splits. Otherwise text files are ordered by a hash of each
    name, and the first of them are for validation, up to `val_fraction` of the bytes: adding files moves few. Each file
    of records is divided.
    """
    named = defaultdict(list)
    for path in files:
        if path.parent == source and (match := SPLIT_NAME.fullmatch(path.name)):
            named[match[1].lower()].append(path)
    if named["train"] and (validation := named["val"] or named["test"]):
        return dict.fromkeys(named["train"], 0.0) | dict.fromkeys(validation, 1.0)
    shares = dict.fromkeys(files, val_fraction)
    texts = [path for path in files if path.suffix.lower() not in RECORDS]
    left = val_fraction * sum(path.stat().st_size for path in texts)
    for path in sorted(texts, key=lambda path: hash_fraction(path.relative_to(source).as_posix(), seed)):
        size = path.stat().st_size
        shares[path] = min(1.0, left / size)
        left = max(0.0, left - size)
    return shares


def check_pyarrow(files) -> None:
    """ValueError, before any work, if `files` cannot be read for want of the package."""
    if any(Path(file).suffix.lower() == ".parquet" for file in files) and not importlib.util.find_spec("pyarrow"):
        raise ValueError("text in parquet files needs a package: pip install pyarrow")


def file_corpus(shares: dict[Path, float], seed: int, **more) -> Corpus:
    """The documents of files, each with its share to validate on; ValueError for a .parquet file without texts."""
    skipped = Counter()
    for path in shares:
        if path.suffix.lower() == ".parquet":
            check_parquet(path)

    def documents():
        skipped.clear()
        for path, share in shares.items():
            yield from split_file(path, share, seed, skipped)

    return Corpus(documents, sum(path.stat().st_size for path in shares), skipped=skipped, **more)


def split_file(path: Path, val_share: float, seed: int, skipped: Counter) -> Iterator[tuple[str, str, bool]]:
    """(split, text, ends) as of `Corpus`. Records are split by a hash of each; text is cut near its end, after a line
    or a word."""
    if path.suffix.lower() in RECORDS:
        for text in read_parquet(path) if path.suffix.lower() == ".parquet" else read_jsonl(path):
            if text:
                yield split_of(text, val_share, seed), text, True
            else:
                skipped["null" if text is None else "empty"] += 1
        return
    left = math.inf  # bytes of UTF-8 to train on
    if val_share:
        left = (1 - val_share) * sum(len(text.encode()) for text, _ in read_text(path))
    for text, ends in read_text(path):
        size = len(text.encode())
        if 0 < left < size:
            at = max(1, int(len(text) * left / size))
            at = text.find("\n", at, -1) + 1 or text.find(" ", at, -1) + 1 or at
            yield "train", text[:at], True
            text, left = text[at:], 0
        yield "train" if left > 0 else "val", text, ends
        left -= size


def open_text(path: Path, **how):
    with open(path, "rb") as stream:
        encoding = encoding_of(stream.read(4))
    return open(path, encoding=encoding, errors="replace", **how)


def read_text(path: Path) -> Iterator[tuple[str, bool]]:
    """(text, ends): documents in pieces, the last of each with `ends` set. In a .txt END_OF_TEXT divides documents, and
    the white space around it belongs to none."""
    divides = path.suffix.lower() == ".txt"
    begun = divided = False  # whether some of a document was yielded; whether only white space followed a divider
    for piece in read_pieces(path, divides):
        *ended, rest = piece.split(END_OF_TEXT) if divides else [piece]
        for text in ended:
            text = (text.lstrip() if divided else text).rstrip()
            if begun or text:
                yield text, True
            begun, divided = False, True
        rest = rest.lstrip() if divided else rest
        if rest:
            yield rest, False
            begun, divided = True, False
    if begun:
        yield "", True


def read_pieces(path: Path, divides: bool) -> Iterator[str]:
    """The text of a file in pieces of about PIECE characters, to the end of a line, if that is near. If END_OF_TEXT
    `divides` it, none is torn, or parted from the white space before it."""
    held = ""
    with open_text(path, newline="\n") as stream:
        while more := stream.read(PIECE) + stream.readline(PIECE):
            piece = held + more
            held = piece[len(before_divider(piece)) :] if divides else ""
            yield piece[: len(piece) - len(held)]
    yield held


def before_divider(text: str) -> str:
    """`text` without what may begin a divider at its end: white space, and some of END_OF_TEXT."""
    for length in range(len(END_OF_TEXT) - 1, 0, -1):
        if text.endswith(END_OF_TEXT[:length]):
            text = text[:-length]
            break
    return text.rstrip()


def read_jsonl(path: Path) -> Iterator[str | None]:
    """The "text" of each line, None where it is null. ValueError for a line that is no JSON object with a text."""
    with open_text(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    text = json.loads(line)["text"]
                    text = text if text is None else well_formed(text)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    message = f'{path}, line {number}: not a JSON object with a string in "text"'
                    raise ValueError(message) from None
                yield text


def check_parquet(path: Path) -> None:
    """ValueError unless a .parquet file can be read and has strings, or their bytes, in a column "text"."""
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None
    if "text" not in schema.names:
        raise ValueError(f'{path} has no column "text", only {", ".join(schema.names) or "none"}')
    kind = schema.field(schema.names.index("text")).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(kind).removeprefix("large_").removesuffix("_view") not in ("string", "binary", "null"):
        raise ValueError(f'{path}: column "text" holds {kind}, not strings')


def read_parquet(path: Path) -> Iterator[str | None]:
    """The "text" of each row, None where it is null. ValueError for a damaged file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for cell in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    yield None if cell is None else cell.decode("utf-8", "replace")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


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
OTHERWISE = "connect to the network, give a local file with --source FILE, or use --source python, which needs none"


def named_corpus(name: str, shards: int, val_fraction: float, seed: int) -> Corpus:
    """Downloads a corpus of CORPORA, or takes it from DOWNLOADS. TinyStories brings a validation file of its own.

    Raises ValueError for a missing package or a file that is not the expected one, OSError if it cannot be had.
    """
    if name == "shakespeare":
        return file_corpus({download_shakespeare(): val_fraction}, seed, meta=dict(urls=[SHAKESPEARE[0]]))
    repository, revision, files = HUB[name]
    if name == "tinystories":
        shares = dict(zip(files, (0.0, 1.0)))
    else:
        shares = dict.fromkeys(files[:shards], val_fraction)
    check_pyarrow(shares)
    meta = dict(urls=[f"https://huggingface.co/datasets/{repository}"], revision=revision)
    return file_corpus({hub_file(repository, revision, file): share for file, share in shares.items()}, seed, meta=meta)


def hub_file(repository: str, revision: str, file: str) -> Path:
    """A file of a data set on huggingface.co, in DOWNLOADS; huggingface_hub resumes, checks and keeps downloads."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"{repository} comes from huggingface.co: pip install huggingface_hub") from None
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision, local_dir=DOWNLOADS))
    except Exception as error:  # its errors and those of its HTTP library have no common class
        raise OSError(f"could not download {file} of {repository} ({str(error)[:160]}): {OTHERWISE}") from None


def download_shakespeare() -> Path:
    url, checksum = SHAKESPEARE
    path = DOWNLOADS / "shakespeare.txt"
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, HTTPException) as error:
            raise OSError(f"could not download {url} ({error}): {OTHERWISE}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")  # another program may be here, too
        new.write_bytes(content)
        os.replace(new, path)
    if sha256(path) != checksum:
        raise ValueError(f"{path} is not the expected file: remove it and run again")
    return path
