"""Tokenizers: text <-> token ids.

Four kinds behind one small interface (`Tokenizer`), each saved as one self-contained JSON file, never a pickle:

    byte        the 256 bytes of UTF-8, nothing to learn
    bpe         byte-pair encoding of bytes, trained here (`train_bpe`), run by tiktoken
    gpt2, ...   tiktoken's own vocabularies, from its cache folder (TIKTOKEN_CACHE_DIR) or the network
    hf:FOLDER   the tokenizer.json of a Hugging Face folder, or of OWNER/NAME on the hub, run by `tokenizers`

A run's folder, or any other that holds a tokenizer.json of these kinds, names that tokenizer as well.

All of them treat text as text: "<|endoftext|>" inside a document is thirteen ordinary characters. The one special
token, `end_of_text`, is put after each document by data/prepare.py and by nothing else. Half of a surrogate pair is
not text and has no UTF-8: it is replaced by U+FFFD before encoding, everything else comes back as it went in.

Read next: data/dataset.py. `python data/tokenizer.py` trains a small vocabulary on this file and shows it.
"""

import codecs
import heapq
import json
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from textwrap import shorten

import regex  # comes with tiktoken; `re` lacks \p{L}
import tiktoken

if __package__ in (None, ""):  # run as a program: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from options import progress, read_json, sha256, write_atomically

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
# Pre-tokens in the manner of GPT-2 (Radford et al. 2019, section 2.2): contractions, words, numbers, punctuation,
# space. A newline keeps its indentation, which suits code. Every run is bounded, so a line of a million equal letters
# costs no more to train on or to encode than prose; 32 encodes twice as fast as 64.
SPLIT = r"'(?:[sdmt]|ll|re|ve)\b| ?\p{L}{1,32}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,32}|\s{1,32}(?!\S)|\s{1,32}"


# GPT-2's letters for bytes: the byte itself where it is printable in latin-1, else a character from 256 on
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
ALPHABET = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - PRINTABLE))
}


class Tokenizer:
    """What every kind offers. Subclasses give the first four fields, `_encode`, `_spelling` and `_state`."""

    name: str
    vocab_size: int  # end_of_text included
    end_of_text: int
    end_tokens: set[int]  # all that end a text when a model writes it: a pretrained model may have several
    start_of_text: tuple[int, ...] = ()  # what a pretrained model saw before every text (Llama's <|begin_of_text|>)
    byte_level = True  # a token spells the same bytes wherever it stands

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, in order; no end-of-text tokens are added."""
        return self._encode([well_formed(text) for text in texts])

    def decode_bytes(self, tokens) -> bytes:
        """The exact bytes the ids spell, which may end inside a character."""
        return b"".join(self._spelling(int(token)) for token in tokens)

    def decode(self, tokens) -> str:
        """As `decode_bytes`, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def save(self, folder) -> dict:
        """Writes TOKENIZER_FILE into `folder` and returns its entry in meta.json. What `load_tokenizer` reads from it
        saves the same bytes again."""
        path = Path(folder) / TOKENIZER_FILE
        write_atomically(path, json.dumps({"format": 1, **self._state()}))
        size = dict(vocab_size=self.vocab_size, end_of_text=self.end_of_text)
        return dict(name=self.name, file=TOKENIZER_FILE, sha256=sha256(path), **size)

    def to_hugging_face(self) -> dict:
        """The content of a Hugging Face tokenizer.json that encodes every text to the same ids; ValueError if there is
        none. (There, "<|endoftext|>" in a text is the special token, unless `encode_special_tokens` is set.)"""
        raise ValueError(f"tokenizer {self.name} has no tokenizer.json: use the one published with its model")


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's own vocabularies ("gpt2", "cl100k_base", ...)."""

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name, self.encoding = name, encoding
        self.vocab_size, self.end_of_text = encoding.n_vocab, encoding.eot_token
        self.end_tokens = {self.end_of_text}

    def _encode(self, texts):
        if len(texts) == 1:  # starting threads takes longer than most texts
            return [self.encoding.encode_ordinary(texts[0])]
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def _spelling(self, token):
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # some vocabularies have unused ids below n_vocab; they spell nothing
            return b""

    def _state(self):
        return {"kind": "tiktoken", "name": self.name}


class BPETokenizer(TiktokenTokenizer):
    """A vocabulary trained here: ids 0..255 are the single bytes, `merged` the bytes of the ids that follow, and
    end-of-text comes last."""

    def __init__(self, merged: list[bytes]):
        self.merged = merged
        tokens = [bytes([byte]) for byte in range(256)] + merged
        ranks, special = {token: rank for rank, token in enumerate(tokens)}, {END_OF_TEXT: len(tokens)}
        encoding = tiktoken.Encoding("bpe", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
        super().__init__(f"bpe-{len(tokens) + 1}", encoding)

    def _state(self):
        return {"kind": "bpe", "split": SPLIT, "merged": [token.decode("latin-1") for token in self.merged]}

    def to_hugging_face(self):
        import tokenizers

        letter = {byte: c for c, byte in ALPHABET.items()}
        spell = lambda token: "".join(letter[byte] for byte in token)
        vocabulary = {spell([byte]): byte for byte in range(256)}
        vocabulary |= {spell(token): 256 + i for i, token in enumerate(self.merged)}
        # tiktoken joins any two neighbours that spell a token: all ways to cut it in two are merges
        cuts = ((spell(token[:i]), spell(token[i:])) for token in self.merged for i in range(1, len(token)))
        merges = [cut for cut in cuts if vocabulary.keys() >= {*cut}]
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
        theirs.decoder = tokenizers.decoders.ByteLevel()
        theirs.add_special_tokens([END_OF_TEXT])
        return json.loads(theirs.to_str())


class ByteTokenizer(BPETokenizer):
    """One token per byte of UTF-8; 256 is end-of-text."""

    def __init__(self):
        super().__init__([])
        self.name = "byte"

    def _encode(self, texts):
        return [list(text.encode()) for text in texts]

    def _state(self):
        return {"kind": "byte"}


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json (its content, a dict), run by the `tokenizers` package.

    Byte-level ones (GPT-2, Llama 3, Qwen) are exact. Others give back their normalised text, and spell a token by what
    stands before it: their `decode_bytes` is for whole texts. ValueError if the package does not take the content.
    """

    def __init__(self, name: str, content: dict, end_of_text: int, more_ends=()):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("hf: tokenizers need the `tokenizers` package: pip install tokenizers") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the package has no error class of its own
            raise ValueError(f"{name} is not a usable tokenizer.json: {error}") from None
        self.tokenizer.encode_special_tokens = True  # special tokens spelled out in a text are text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.name, self.content = name, content
        self.end_of_text, self.end_tokens = end_of_text, {end_of_text, *more_ends}
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.added = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))
        whole = self.tokenizer.encode("a")  # as its own model reads a text
        self.start_of_text = tuple(whole.ids[: (whole.special_tokens_mask + [0]).index(0)])

    @classmethod
    def from_file(cls, path: Path, name: str):
        """Reads a tokenizer.json and the settings beside it; ValueError where no token ends a text.

        End-of-text is tokenizer_config.json's eos_token, or a usual spelling of it. Each eos_token_id of config.json
        and generation_config.json, a number or a list, ends a text as well.
        """
        tokenizer = cls(name, read_json(path), 0)
        beside = map(path.with_name, ("tokenizer_config.json", "config.json", "generation_config.json"))
        settings, *configs = (read_json(file) if file.exists() else {} for file in beside)
        eos = settings.get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        names = [eos] if eos else [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"]
        ends = [end for end in map(tokenizer.tokenizer.token_to_id, names) if end is not None][:1]
        for config in configs:
            listed = config.get("eos_token_id")
            ends += [end for end in (listed if isinstance(listed, list) else [listed]) if end is not None]
        if not ends:
            raise ValueError(f"{path}: no end-of-text token; looked for {', '.join(names)}")
        tokenizer.end_of_text, tokenizer.end_tokens = ends[0], {*ends}
        return tokenizer

    def _encode(self, texts):
        return [result.ids for result in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode_bytes(self, tokens):
        if self.byte_level:
            return super().decode_bytes(tokens)
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False).encode()

    def _spelling(self, token):
        """The bytes of one byte-level token. (The package's own decoder takes the letters of added tokens for bytes,
        too: an added "café" becomes "caf" and a broken byte.)"""
        if token in self.added:
            return self.added[token].encode()
        letters = self.tokenizer.id_to_token(token) or ""
        return b"".join(bytes([ALPHABET[c]]) if c in ALPHABET else c.encode() for c in letters)

    def _state(self):
        state = {"kind": "hf", "name": self.name, "end_of_text": self.end_of_text, "tokenizer": self.content}
        more_ends = sorted(self.end_tokens - {self.end_of_text})
        return {**state, "more_ends": more_ends} if more_ends else state

    def to_hugging_face(self):
        return self.content


def get_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer "byte", one of tiktoken's names, "hf:FOLDER", "hf:OWNER/NAME" (of the hub, if there is no such
    folder), or what `load_tokenizer` finds in a folder or file, a run's for example. ("bpe" has to be trained.)

    Raises ValueError (no such name), FileNotFoundError (no such folder) or OSError (files out of reach).
    """
    if spec == "byte":
        return ByteTokenizer()
    names = tiktoken.list_encoding_names()
    if spec in names:
        try:
            return TiktokenTokenizer(spec, tiktoken.get_encoding(spec))
        except Exception as error:  # its errors and those of its HTTP library have no common class
            how = "connect once, set TIKTOKEN_CACHE_DIR to a folder that has them, or use --tokenizer bpe"
            raise OSError(f"tokenizer {spec}: tiktoken could not load its files ({error}); {how}") from None
    path = Path(spec.removeprefix("hf:"))
    if path.exists() or spec.startswith("hf:") and not is_hub_name(spec.removeprefix("hf:")):
        return load_tokenizer(path)
    if spec.startswith("hf:"):
        files = [TOKENIZER_FILE, "tokenizer_config.json", "config.json", "generation_config.json"]
        return load_tokenizer(fetch_from_hub(spec.removeprefix("hf:"), files), spec)
    choices = f"byte, bpe, hf:FOLDER, hf:OWNER/NAME, a folder with a {TOKENIZER_FILE}, or one of {', '.join(names)}"
    raise ValueError(f"no tokenizer {spec!r}: choose {choices}")


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be OWNER/NAME. A path on this disk was meant if it begins with a folder that there is, or
    with out/, where runs go, or data/."""
    return bool(re.fullmatch(r"(?!out/|data/)[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).parent.exists()


def fetch_from_hub(name: str, patterns: list[str]) -> Path:
    """The local folder with those files of OWNER/NAME on the hub. Raises FileNotFoundError, in one line."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=patterns))
    except ImportError:
        why = "to look for it on the hub: pip install huggingface_hub"
    except Exception as error:  # its errors have no common class
        advice = "without a network, download it elsewhere and give its folder"
        why = f"the hub did not give it ({shorten(str(error), 160)}); {advice}"
    raise FileNotFoundError(f"{name} is not on this disk; {why}")


def load_tokenizer(path, name: str | None = None) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to `path` (the folder or the file), or that of a Hugging Face folder,
    whose name it has unless another is given.

    FileNotFoundError if there is none, ValueError if the file is not sound.
    """
    path = Path(path)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    state = read_json(path)
    try:
        match state.get("kind"):
            case None:
                return HuggingFaceTokenizer.from_file(path, name or f"hf:{path.resolve().parent.name}")
            case "byte":
                return ByteTokenizer()
            case "bpe" if state.get("split") == SPLIT:
                return BPETokenizer([token.encode("latin-1") for token in state["merged"]])
            case "tiktoken":
                return get_tokenizer(state["name"])
            case "hf":
                ends = state["end_of_text"], state.get("more_ends", ())
                return HuggingFaceTokenizer(state["name"], state["tokenizer"], *ends)
    except (KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    raise ValueError(f"{path} is not a tokenizer file of this program")


def train_bpe(texts, vocab_size: int) -> BPETokenizer:
    """Learns a byte-level BPE (Sennrich et al. 2016) of `vocab_size` tokens, end-of-text included, from texts.

    The most frequent adjacent pair becomes a token, again and again; ties go to the smaller pair of ids. Counting runs
    over unique pre-tokens, and a merge touches only those that hold the pair. Where no pair occurs twice any more
    the vocabulary stays smaller, which is said on stderr.
    """
    split, words = regex.compile(SPLIT), Counter()
    for text in texts:
        words.update(split.findall(text))
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
            old, sequences[i] = sequences[i], merge(sequences[i], pair, new)
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


def merge(sequence: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`sequence` with every occurrence of `pair`, from the left, replaced by `new`."""
    merged, i = [], 0
    while i < len(sequence):
        if tuple(sequence[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(sequence[i])
            i += 1
    return merged


def encoding_of(head: bytes) -> str:
    """The encoding of a text by its first bytes: UTF-16 or UTF-32 with a byte order mark, as editors on Windows write
    them, else UTF-8. Decoding removes the mark."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16, whose mark is the beginning of it
        return "utf-32"
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def well_formed(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair that stands alone."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


if __name__ == "__main__":
    text = Path(__file__).read_text(encoding="utf-8")
    bpe = train_bpe([text], 512)
    tokens = bpe.encode("def encode(self, text: str):  # café \U0001f642")
    print(f"{bpe.name}: {len(text.encode()) / len(bpe.encode(text)):.2f} bytes per token of this file")
    print("first merges:", " ".join(repr(token.decode("latin-1")) for token in bpe.merged[:24]))
    print("a line:", " ".join(repr(bpe.decode([token])) for token in tokens))
