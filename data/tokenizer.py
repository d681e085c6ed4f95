"""Tokenizers: text <-> token ids.

Four kinds behind one small interface (`Tokenizer`), each saved as one self-contained JSON file, never a pickle:

    byte        the 256 bytes of UTF-8, nothing to learn
    bpe         byte-level byte-pair encoding, trained here (`train_bpe`), run by tiktoken
    gpt2, ...   tiktoken's own vocabularies, from its cache folder (TIKTOKEN_CACHE_DIR) or the network
    hf:FOLDER   the tokenizer.json of a Hugging Face folder, run by the `tokenizers` package

A run's folder, or any other that holds a tokenizer.json of these kinds, names that tokenizer as well.

All of them treat text as text: "<|endoftext|>" inside a document is thirteen ordinary characters. The one special
token, `end_of_text`, is put between documents by data/prepare.py and by nothing else. Half of a surrogate pair is
not text and has no UTF-8: it is replaced by U+FFFD before encoding, everything else comes back as it went in.

Read next: data/dataset.py. `python data/tokenizer.py` trains a small vocabulary on this file and shows it.
"""

import hashlib
import heapq
import json
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import regex  # comes with tiktoken; `re` lacks \p{L}
import tiktoken

if __package__ in (None, ""):  # run as a program: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from options import read_json, write_atomically

FILE_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 1 << 20
# Pre-tokens in the manner of GPT-2 (Radford et al. 2019, section 2.2): contractions, words, numbers, punctuation,
# space. A newline keeps its indentation, which suits code. Every run is bounded, so a line of a million equal letters
# costs no more to train on or to encode than prose; 32 encodes twice as fast as 64.
SPLIT = r"'(?:[sdmt]|ll|re|ve)\b| ?\p{L}{1,32}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,32}|\s{1,32}(?!\S)|\s{1,32}"


class Tokenizer:
    """What every kind offers. Subclasses give `name`, `vocab_size`, `end_of_text`, `_encode`, `_decode`, `_state`.

    `vocab_size` counts `end_of_text`; all ids are in [0, vocab_size).
    """

    name: str
    vocab_size: int
    end_of_text: int
    start_of_text: tuple[int, ...] = ()  # what a pretrained model saw before every text (Llama's <|begin_of_text|>)
    more_ends: tuple[int, ...] = ()  # other ids that end the texts of a pretrained model

    @property
    def end_tokens(self) -> set[int]:
        """Every id that ends a text when a model writes it."""
        return {self.end_of_text, *self.more_ends}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, in order; no end-of-text tokens are added."""
        return self._encode([well_formed(text) for text in texts])

    def decode_bytes(self, tokens) -> bytes:
        """The exact bytes the ids spell, which may end inside a character. ValueError for an id out of range."""
        tokens = [int(token) for token in tokens]
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size} ({self.name})")
        return self._decode(tokens)

    def decode(self, tokens) -> str:
        """As `decode_bytes`, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def save(self, folder) -> dict:
        """Writes FILE_NAME into `folder`; returns what meta.json says of it, such as name and sha256.

        A tokenizer that `load_tokenizer` made from such a file is written as it was, byte for byte.
        """
        content = json.dumps({"format": 1, **self._state()})
        write_atomically(Path(folder) / FILE_NAME, content)
        return dict(
            name=self.name,
            file=FILE_NAME,
            sha256=hashlib.sha256(content.encode()).hexdigest(),
            vocab_size=self.vocab_size,
            end_of_text=self.end_of_text,
        )

    def to_hugging_face(self) -> dict:
        """The content of a Hugging Face tokenizer.json that encodes every text to the same ids.

        There, "<|endoftext|>" in a text is the special token, unless `encode_special_tokens` is set. ValueError if this
        kind has no such form.
        """
        raise ValueError(
            f"tokenizer {self.name} cannot be written as a tokenizer.json: use the one published with its model"
        )


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8; 256 is end-of-text."""

    name, vocab_size, end_of_text = "byte", 257, 256

    def _encode(self, texts):
        return [list(text.encode()) for text in texts]

    def _decode(self, tokens):
        return b"".join(END_OF_TEXT.encode() if token == 256 else bytes([token]) for token in tokens)

    def _state(self):
        return {"kind": "byte"}

    def to_hugging_face(self):
        return _byte_level_content([])


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's own vocabularies ("gpt2", "cl100k_base", ...)."""

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name, self.encoding = name, encoding
        self.vocab_size, self.end_of_text = encoding.n_vocab, encoding.eot_token

    def _encode(self, texts):
        if len(texts) == 1 or sum(map(len, texts)) < 500 * len(texts):  # handing a short text to a thread costs more
            return [self.encoding.encode_ordinary(text) for text in texts]
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def _decode(self, tokens):
        return b"".join(map(self._spelling, tokens))

    def _spelling(self, token):
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # some vocabularies have unused ids below n_vocab; they spell nothing
            return b""

    def _state(self):
        return {"kind": "tiktoken", "name": self.name}


class BPETokenizer(TiktokenTokenizer):
    """A vocabulary trained here: ids 0..255 are the single bytes, then one id per merge, then end-of-text.

    `merged` holds the bytes of ids 256, 257, ... The single bytes are implied, so no file can lack one.
    """

    def __init__(self, merged: list[bytes]):
        tokens = [bytes([byte]) for byte in range(256)] + merged
        self.merged = merged
        super().__init__(
            f"bpe-{len(tokens) + 1}",
            tiktoken.Encoding(
                "bpe",
                pat_str=SPLIT,
                mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
                special_tokens={END_OF_TEXT: len(tokens)},
            ),
        )

    def _state(self):
        return {"kind": "bpe", "split": SPLIT, "merged": [token.decode("latin-1") for token in self.merged]}

    def to_hugging_face(self):
        return _byte_level_content(self.merged)


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json (its content, a dict), run by the `tokenizers` package.

    Byte-level ones (GPT-2, Llama 3, Qwen) are exact. One with a normaliser gives back its normalised text, which
    is said on stderr; its `decode_bytes` is exact for whole texts, not token by token.

    ValueError, in one line, for content that the package does not take or ids outside the vocabulary.
    """

    def __init__(self, name: str, content: dict, end_of_text: int, more_ends=()):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("hf: tokenizers need the `tokenizers` package: pip install tokenizers") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
            self.tokenizer.encode_special_tokens = True  # special tokens spelled out in a text are text
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
            self.added = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}
            self.byte_of = _byte_level_alphabet() if '"ByteLevel"' in json.dumps(content.get("decoder")) else None
            self.name, self.content, self.end_of_text = name, content, end_of_text
            probe = " Round  trip:\tcafé \U0001f642\n"
            exact = self.decode(self.encode(probe)) == probe
            whole = self.tokenizer.encode("a")  # as its own model reads a text
            self.start_of_text = tuple(whole.ids[: (whole.special_tokens_mask + [0]).index(0)])
        except Exception as error:  # the package has no error class of its own
            raise ValueError(f"{name} is not a usable tokenizer.json: {_one_line(error)}") from None
        self.more_ends = tuple(sorted(set(more_ends) - {end_of_text}))
        for end in self.end_tokens:
            if not 0 <= end < self.vocab_size <= MAX_VOCAB_SIZE:
                raise ValueError(f"{name}: end-of-text id {end} or vocabulary size {self.vocab_size} is out of range")
        if not exact:
            print(f"note: {name} does not give back every text exactly (it normalises)", file=sys.stderr)

    @classmethod
    def from_folder(cls, folder):
        """Reads FOLDER/tokenizer.json, or the file itself, and the settings beside it.

        End-of-text is tokenizer_config.json's eos_token, or a usual spelling of it. Each eos_token_id of config.json
        and generation_config.json, a number or a list, ends a text as well.
        """
        path = Path(folder) / FILE_NAME if Path(folder).is_dir() else Path(folder)
        content = read_json(path)
        settings, *configs = (
            read_json(path.with_name(name)) if path.with_name(name).exists() else {}
            for name in ("tokenizer_config.json", "config.json", "generation_config.json")
        )
        tokenizer = cls(f"hf:{path.resolve().parent.name}", content, 0)
        eos = settings.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        names = [eos] if isinstance(eos, str) else [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"]
        spelled = [tokenizer.tokenizer.token_to_id(name) for name in names]
        listed = [config.get("eos_token_id") for config in configs]
        listed = [end for some in listed for end in (some if isinstance(some, list) else [some])]
        listed = [end for end in listed if type(end) is int and 0 <= end < tokenizer.vocab_size]
        ends = [end for end in spelled if end is not None][:1] + listed
        if not ends:
            raise ValueError(f"{path}: no end-of-text token; looked for {', '.join(names)}")
        tokenizer.end_of_text, tokenizer.more_ends = ends[0], tuple(sorted({*ends} - {ends[0]}))
        return tokenizer

    def _encode(self, texts):
        return [result.ids for result in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _decode(self, tokens):
        if self.byte_of is None:
            return self.tokenizer.decode(tokens, skip_special_tokens=False).encode()
        return b"".join(map(self._spelling, tokens))

    def _spelling(self, token):
        """The bytes of one token. (The package's own decoder takes the letters of added tokens for bytes, too: an added
        "café" becomes "caf" and a broken byte.)"""
        piece = self.added.get(token) or self.tokenizer.id_to_token(token) or ""
        if token in self.added or not all(c in self.byte_of for c in piece):
            return piece.encode()
        return bytes(self.byte_of[c] for c in piece)

    def _state(self):
        state = {"kind": "hf", "name": self.name, "end_of_text": self.end_of_text, "tokenizer": self.content}
        return {**state, "more_ends": list(self.more_ends)} if self.more_ends else state

    def to_hugging_face(self):
        return self.content


def train_bpe(texts, vocab_size: int) -> BPETokenizer:
    """Learns a byte-level BPE (Sennrich et al. 2016) of `vocab_size` tokens, end-of-text included, from texts.

    The most frequent adjacent pair becomes a token, again and again; ties go to the smaller pair of ids. Counting runs
    over unique pre-tokens, and a merge touches only those that hold the pair. Where no pair occurs twice any more
    the vocabulary stays smaller, which is said on stderr. ValueError unless 257 <= vocab_size <= MAX_VOCAB_SIZE.
    """
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"a bpe vocabulary has 257 (the bytes and end-of-text) to {MAX_VOCAB_SIZE} tokens, not {vocab_size}"
        )
    split, words = regex.compile(SPLIT), Counter()
    for text in texts:
        words.update(split.findall(well_formed(text)))
    sequences, frequency = [list(word.encode()) for word in words], list(words.values())

    tokens = [bytes([byte]) for byte in range(256)]
    count, holders = Counter(), defaultdict(list)  # pair -> occurrences; pair -> indices of sequences (may repeat)
    for i, sequence in enumerate(sequences):
        for pair in zip(sequence, sequence[1:]):
            count[pair] += frequency[i]
            holders[pair].append(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)

    bar = progress("learning merges", vocab_size - 257, unit=" tokens")
    while len(tokens) < vocab_size - 1 and heap:
        n, pair = heapq.heappop(heap)
        if -n != count[pair]:  # counts fall without touching the heap: put a stale entry back in its place
            if count[pair] > 1:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        if -n < 2:
            break
        # These bytes are new: merging from the left cuts a stretch between two token borders as if it stood alone, so
        # had another pair spelled them before, they would be one token everywhere by now.
        new, change = len(tokens), Counter()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        bar.update(1)
        for i in set(holders.pop(pair)):
            old, sequences[i] = sequences[i], _merge(sequences[i], pair, new)
            for before in zip(old, old[1:]):
                change[before] -= frequency[i]
            for after in zip(sequences[i], sequences[i][1:]):
                change[after] += frequency[i]
                if new in after:
                    holders[after].append(i)
        for changed, by in change.items():
            count[changed] += by
            if by > 0:
                heapq.heappush(heap, (-count[changed], changed))
    bar.close()
    if len(tokens) < vocab_size - 1:
        print(f"note: no pair occurs twice any more: {len(tokens) + 1} tokens instead of {vocab_size}", file=sys.stderr)
    return BPETokenizer(tokens[256:])


def get_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer "byte", one of tiktoken's names, "hf:FOLDER", or what `load_tokenizer` finds in a folder or file, a
    run's folder for example. ("bpe" has to be trained.)

    Raises ValueError (no such name), FileNotFoundError (no such folder) or OSError (tiktoken's files out of reach).
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec.startswith("hf:"):
        return HuggingFaceTokenizer.from_folder(spec[3:])
    names = tiktoken.list_encoding_names()
    if spec in names:
        return TiktokenTokenizer(spec, _load_encoding(spec))
    if Path(spec).exists():
        return load_tokenizer(spec)
    raise ValueError(
        f"no tokenizer {spec!r}: choose byte, bpe, hf:FOLDER, a folder with a {FILE_NAME}, or one of {', '.join(names)}"
    )


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to `path` (the folder or the file), or that of a Hugging Face folder.

    FileNotFoundError if there is none, ValueError if the file is not sound.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    state = read_json(path)
    if "format" not in state and isinstance(state.get("model"), dict):
        return HuggingFaceTokenizer.from_folder(path)
    try:
        if state["format"] == 1 and state["kind"] == "byte":
            return ByteTokenizer()
        if state["format"] == 1 and state["kind"] == "bpe" and state["split"] == SPLIT:
            return BPETokenizer([token.encode("latin-1") for token in state["merged"]])
        if state["format"] == 1 and state["kind"] == "tiktoken":
            return TiktokenTokenizer(state["name"], _load_encoding(state["name"]))
        if state["format"] == 1 and state["kind"] == "hf":
            more_ends = state.get("more_ends", [])
            return HuggingFaceTokenizer(state["name"], state["tokenizer"], state["end_of_text"], more_ends)
        why = "format 1, and kind byte, bpe, tiktoken or hf"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {_one_line(error)}"
    raise ValueError(f"{path} is not a tokenizer file of this program ({why})")


def _byte_level_content(merged: list[bytes]) -> dict:
    """A tokenizer.json of the bytes, `merged` and END_OF_TEXT, for the `tokenizers` package."""
    spelling = {byte: c for c, byte in _byte_level_alphabet().items()}
    spell = lambda token: "".join(spelling[byte] for byte in token)
    rank = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(merged)}
    merges = []
    for token in merged:
        # tiktoken joins any two neighbours that spell a token. Which two they are follows from the token alone: what it
        # falls into with the earlier tokens.
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            ranks = [rank.get(left + right, rank[token]) for left, right in zip(parts, parts[1:])]
            i = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[i] >= rank[token]:
                raise ValueError(f"token {token!r} is not two earlier ones in a row, as a tokenizer.json needs it")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append([spell(part) for part in parts])
    end = dict(content=END_OF_TEXT, id=len(rank), special=True, normalized=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern={"Regex": SPLIT}, behavior="Isolated", invert=False)
    return dict(
        version="1.0",
        added_tokens=[end | dict(single_word=False, lstrip=False, rstrip=False)],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
        decoder=byte_level,
        model=dict(
            type="BPE",
            ignore_merges=True,  # tiktoken looks a whole word up first
            vocab={spell(token): i for token, i in rank.items()} | {END_OF_TEXT: len(rank)},
            merges=merges,
        ),
    )


def _load_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # its errors and those of its HTTP library have no common class
        raise OSError(
            f"tokenizer {name}: tiktoken could not load its files ({_one_line(error)}); connect to the network once, "
            "set TIKTOKEN_CACHE_DIR to a folder that has them, or use --tokenizer bpe"
        ) from None


def _merge(sequence: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`sequence` with every occurrence of `pair`, from the left, replaced by `new`."""
    merged, i = [], 0
    while i < len(sequence):
        if i + 1 < len(sequence) and (sequence[i], sequence[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(sequence[i])
            i += 1
    return merged


def well_formed(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair that stands alone."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def progress(what: str, total: int | None = None, unit: str = "B"):
    """tqdm's bar, with a rate and the time to go, for work that takes more than a second; without tqdm, nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return SimpleNamespace(update=lambda amount: None, close=lambda: None)
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, delay=1, mininterval=1, leave=False)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's stand-ins for bytes: the byte itself where it is printable in latin-1, else a character from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


if __name__ == "__main__":
    text = Path(__file__).read_text(encoding="utf-8")
    bpe = train_bpe([text], 512)
    line = "def encode(self, text: str):  # café \U0001f642"
    for tokenizer in (ByteTokenizer(), bpe):
        tokens = tokenizer.encode(line)
        print(
            f"{tokenizer.name}: {tokenizer.vocab_size} tokens, end of text is {tokenizer.end_of_text}; "
            f"{len(text.encode()) / len(tokenizer.encode(text)):.2f} bytes per token of this file; "
            f"round trip {tokenizer.decode(tokens) == line}"
        )
        print("   ", " ".join(repr(tokenizer.decode([token])) for token in tokens))
    print("first merges:", " ".join(repr(token.decode("latin-1")) for token in bpe.merged[:24]))
