"""Tokenizers: every text comes back, the trainer equals the textbook's, and a bad file is refused in one line."""

import json
import random
import time
from collections import Counter

import pytest
import regex
import tiktoken

from data import tokenizer as module
from data.tokenizer import SPLIT, BPETokenizer, ByteTokenizer, get_tokenizer, load_tokenizer, train_bpe

CORPUS = open(module.__file__, encoding="utf-8").read()
AWKWARD = ["", " ", "\0\x01\x1b\x7f", "\r\n\t\f\v", "caf\u00e9 \u4f60\u597d \u0645\u0631\u062d\u0628\u0627", "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
           "<|endoftext|>", "a<|endoftext|>b<|end", "don't 'self' we'll", "x" * 300, "\n" * 200 + " " * 200, "1234567890"]


def random_text(rng: random.Random) -> str:
    """Characters from all of Unicode, some planes more often, without surrogates."""
    ranges = [(0, 0x80), (0, 0x800), (0x2000, 0x3000), (0x4E00, 0xA000), (0xE000, 0x10000), (0x1F300, 0x1FB00), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([CORPUS], 600)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "<|endoftext|>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([CORPUS], trainer)
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=["byte", "bpe", "hf"])
def tokenizer(request, bpe):
    if request.param == "hf":
        return get_tokenizer(f"hf:{request.getfixturevalue('hf_folder')}")
    return bpe if request.param == "bpe" else ByteTokenizer()


def test_every_text_comes_back(tokenizer):
    rng = random.Random(0)
    texts = AWKWARD + [random_text(rng) for _ in range(500)] + [CORPUS]
    batch = tokenizer.encode_batch(texts)
    for text, tokens in zip(texts, batch):
        assert tokenizer.encode(text) == tokens
        assert tokenizer.decode_bytes(tokens) == text.encode()
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end_of_text not in tokens
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_bytes_of_single_tokens_join_to_the_text(tokenizer):
    for text in AWKWARD:
        assert b"".join(tokenizer.decode_bytes([token]) for token in tokenizer.encode(text)) == text.encode()


def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_is_joined(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "\U0001f642"


def test_an_id_outside_the_vocabulary_is_refused(tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {token} is outside"):
            tokenizer.decode([token])
    assert isinstance(tokenizer.decode(range(tokenizer.vocab_size)), str)


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    description = tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.save(tmp_path) == description
    assert (again.name, again.vocab_size, again.end_of_text) == (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text)
    assert again.encode(CORPUS) == tokenizer.encode(CORPUS)
    assert set(description) == {"name", "file", "sha256", "vocab_size", "end_of_text"}


def test_vocabulary_is_the_bytes_then_the_merges_then_end_of_text(bpe):
    assert bpe.vocab_size == 600 and bpe.end_of_text == 599 and len(bpe.merged) == 600 - 257
    assert [bpe.decode_bytes([i]) for i in range(256)] == [bytes([i]) for i in range(256)]


def naive_bpe(texts, vocab_size):
    """The textbook: count all pairs of all pre-tokens anew for every merge. Returns the merged tokens and {word: ids}."""
    frequency = Counter(word for text in texts for word in regex.findall(SPLIT, text))
    words, tokens = {word: list(word.encode()) for word in frequency}, [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size - 1:
        count = Counter()
        for word, ids in words.items():
            for pair in zip(ids, ids[1:]):
                count[pair] += frequency[word]
        if not count or max(count.values()) < 2:
            break
        pair = min(count, key=lambda pair: (-count[pair], pair))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for word, ids in words.items():
            i, merged = 0, []
            while i < len(ids):
                if tuple(ids[i : i + 2]) == pair:
                    merged.append(len(tokens) - 1)
                    i += 2
                else:
                    merged.append(ids[i])
                    i += 1
            words[word] = merged
    return tokens[256:], words


def corpora():
    """Prose and code, then texts of three letters, full of overlapping pairs."""
    rng = random.Random(1)
    yield [CORPUS[:6000]], 330
    for _ in range(60):
        yield ["".join(rng.choices("ab\u00e9 ", (4, 2, 1, 1), k=rng.randrange(150))) for _ in range(3)], rng.randrange(257, 320)


@pytest.mark.parametrize("texts, vocab_size", list(corpora()))
def test_trainer_equals_the_naive_one_and_tiktoken_cuts_words_as_training_did(texts, vocab_size):
    merged, words = naive_bpe(texts, vocab_size)
    tokenizer = train_bpe(texts, vocab_size)
    assert tokenizer.merged == merged
    assert len(set(merged)) == len(merged)
    for word, ids in words.items():
        assert tokenizer.encode(word) == ids


def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_so(capsys):
    tokenizer = train_bpe(["abab abab"], 5000)
    assert tokenizer.vocab_size < 270 and tokenizer.decode(tokenizer.encode("zebra \u2603")) == "zebra \u2603"
    assert f"{tokenizer.vocab_size} tokens instead of 5000" in capsys.readouterr().err
    assert train_bpe([], 300).vocab_size == 257


@pytest.mark.parametrize("size", [-1, 0, 256, 1 << 21])
def test_an_impossible_vocabulary_size_is_refused(size):
    with pytest.raises(ValueError, match=str(size)):
        train_bpe(["text"], size)


def test_a_million_equal_letters_cost_no_more_than_prose():
    began = time.monotonic()
    for text in ("x" * 1_000_000, " " * 1_000_000, "\n" * 1_000_000, "=" * 1_000_000):
        tokenizer = train_bpe([text], 300)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - began < 20


def test_bpe_compresses(bpe):
    assert len(bpe.encode(CORPUS)) < len(CORPUS.encode()) / 2


def test_tiktoken_names_use_tiktokens_files(monkeypatch, tmp_path):
    """A stand-in of three thousand tokens with an unused id, since the real files need a network or a cache."""
    encoding = tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 3000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = get_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("gpt2", 3001, 3000)
    assert tokenizer.decode([104, 1000, 105, 3000]) == "hi<|endoftext|>"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("<|endoftext|>") == list(b"<|endoftext|>")


def test_tiktoken_without_a_network_is_one_clear_line(monkeypatch):
    def unreachable(name):
        raise ConnectionError("Max retries\nexceeded")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(OSError, match="gpt2.*Max retries exceeded.*TIKTOKEN_CACHE_DIR.*bpe") as caught:
        get_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


def test_tiktoken_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))
    with pytest.raises(OSError, match="no answer in 0.1 seconds"):
        module._load_encoding("gpt2", seconds=0.1)


def test_unknown_names_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'gpt9'.*byte, bpe, hf:FOLDER"):
        get_tokenizer("gpt9")
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        get_tokenizer(f"hf:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing.json")


def test_hugging_face_end_of_text_is_the_one_of_its_config(hf_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    assert get_tokenizer(f"hf:{tmp_path}").end_of_text == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert get_tokenizer(f"hf:{tmp_path}").end_of_text == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "nowhere"}')
    with pytest.raises(ValueError, match="no end-of-text token; looked for nowhere"):
        get_tokenizer(f"hf:{tmp_path}")


def test_missing_tokenizers_package_is_named(monkeypatch, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        get_tokenizer(f"hf:{tmp_path}")


HOSTILE = [None, True, -1, 0, 2**31, 2**63, 10**400, 1.5, "", "x", "\u4f60\u597d", "../../etc/passwd", [], [[]], {}, {"a": {}}, [1], ["ab", "ab"],
           ["a"], ["a\u0100"], [None], "a" * 5000]


def mutate(value, rng: random.Random):
    """`value`, a JSON value, with one random thing in it replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = mutate(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return rng.choice([value[:i] + [mutate(value[i], rng)] + value[i + 1 :], value + [value[i]], value[:i]])
    return rng.choice(HOSTILE)


def test_mutated_files_load_or_are_refused_in_one_line(tokenizer, tmp_path, capfd):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    original, content, rng, refused = path.read_bytes(), json.loads(path.read_bytes()), random.Random(2), 0
    for i in range(150):
        if i % 3:
            path.write_text(json.dumps(mutate(content, rng)))
        else:  # cut it off, or change a byte
            at = rng.randrange(len(original))
            path.write_bytes(original[:at] + (b"" if i % 2 else bytes([rng.randrange(256)]) + original[at + 1 :]))
        try:
            loaded = load_tokenizer(tmp_path)
            assert loaded.vocab_size <= 1 << 20
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"", b"null", b"[" * 200_000, b'{"a":' * 100_000, b"9" * 100_000, b"\xff\xfe", b'{"format": NaN}', b"{}",
                                     b'{"format": true, "kind": "byte"}'])
def test_what_is_no_tokenizer_file_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_of_unreasonable_size_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(ValueError, match="at most"):
        load_tokenizer(tmp_path)


def test_no_file_can_leave_out_or_repeat_a_byte(tmp_path):
    tokenizer = BPETokenizer([b"ab", b"abc"])
    tokenizer.save(tmp_path)
    for merged, why in ((["a"], "two bytes"), (["ab", "ab"], "twice"), (["a\u0100"], "latin-1"), ("ab", "not a list")):
        state = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "other.json").write_text(json.dumps({**state, "merged": merged}))
        with pytest.raises(ValueError, match=why):
            load_tokenizer(tmp_path / "other.json")
