"""Tokenizers: every text comes back, the trainer equals the textbook's, and a bad file is refused in one line."""

import json
import random
import shutil
import sys
import time
import types
from collections import Counter

import pytest
import regex
import tiktoken
from helpers import SPELLED, raises, save_byte_level_bpe, save_sentencepiece

from data import tokenizer as module
from data.tokenizer import SPLIT, ByteTokenizer, get_tokenizer, load_tokenizer, train_bpe

CORPUS = open(module.__file__, encoding="utf-8").read()
AWKWARD = ["", " ", "\0\x01\x1b\x7f", "\r\n\t\f\v", "x" * 300, "\n" * 200 + " " * 200, "don't 'self' 1234567890"]
AWKWARD += ["caf\u00e9 \u4f60\u597d \u0645\u0631\u062d\u0628\u0627", "a<|endoftext|>b<|end"]
AWKWARD += ["\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7"]


def random_text(rng: random.Random) -> str:
    """Characters from all of Unicode, some planes more often, without surrogates."""
    ranges = [(0, 0x80), (0, 0x800), (0x2000, 0x3000), (0x4E00, 0xA000), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([CORPUS], 600)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    save_byte_level_bpe(folder, [CORPUS], 500, ["<s>", "<|endoftext|>"])
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
        assert b"".join(tokenizer.decode_bytes([token]) for token in tokens) == text.encode()
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end_of_text not in tokens
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_is_joined(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "\U0001f642"


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    description = tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.save(tmp_path) == description
    for what in ("name", "vocab_size", "end_of_text", "end_tokens", "start_of_text"):
        assert getattr(again, what) == getattr(tokenizer, what)
    assert tokenizer.end_tokens == {tokenizer.end_of_text} and tokenizer.start_of_text == ()
    assert again.encode(CORPUS) == tokenizer.encode(CORPUS)
    assert set(description) == {"name", "file", "sha256", "vocab_size", "end_of_text"}


def test_vocabulary_is_the_bytes_then_the_merges_then_end_of_text(bpe):
    assert bpe.vocab_size == 600 and bpe.end_of_text == 599 and len(bpe.merged) == 600 - 257
    assert [bpe.decode_bytes([i]) for i in range(256)] == [bytes([i]) for i in range(256)]


def naive_bpe(texts, vocab_size):
    """The textbook: count all pairs of all pre-tokens for every merge. Returns the merged tokens and {word: ids}."""
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
        words = {word: module.merge(ids, pair, len(tokens) - 1) for word, ids in words.items()}
    return tokens[256:], words


def corpora():
    """Prose and code, then texts of three letters, full of overlapping pairs."""
    rng = random.Random(1)
    yield [CORPUS[:6000]], 330
    for _ in range(60):
        texts = ["".join(rng.choices("ab\u00e9 ", (4, 2, 1, 1), k=rng.randrange(150))) for _ in range(3)]
        yield texts, rng.randrange(257, 320)


@pytest.mark.parametrize("texts, vocab_size", list(corpora()))
def test_trainer_equals_the_naive_one_and_tiktoken_and_tokenizers_merge_as_training_did(texts, vocab_size):
    merged, words = naive_bpe(texts, vocab_size)
    tokenizer = train_bpe(texts, vocab_size)
    assert tokenizer.merged == merged
    assert len(set(merged)) == len(merged)
    for word, ids in words.items():
        assert tokenizer.encode(word) == ids
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_hugging_face()))
    theirs.encode_special_tokens = True
    for text in [*texts, "".join(random.Random(vocab_size).choices("aab\u00e9 ", k=500))]:
        assert theirs.encode(text).ids == tokenizer.encode(text)


def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_so(capsys):
    tokenizer = train_bpe(["abab abab"], 5000)
    assert tokenizer.vocab_size < 270 and tokenizer.decode(tokenizer.encode("zebra \u2603")) == "zebra \u2603"
    assert f"{tokenizer.vocab_size} tokens instead of 5000" in capsys.readouterr().err
    assert train_bpe([], 300).vocab_size == 257


def test_a_million_equal_letters_cost_no_more_than_prose():
    began = time.monotonic()
    for text in ("x" * 1_000_000, " " * 1_000_000, "\n" * 1_000_000, "=" * 1_000_000):
        tokenizer = train_bpe([text], 300)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - began < 20


def test_tiktoken_names_use_tiktokens_files(monkeypatch, tmp_path):
    """A stand-in of three thousand tokens with unused ids, since the real files need a network or a cache."""
    ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 3000}
    encoding = tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = get_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("gpt2", 3001, 3000)
    assert tokenizer.decode([104, 1000, 105, 3000]) == "hi<|endoftext|>"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("<|endoftext|>") == list(b"<|endoftext|>")
    raises("gpt2 has no tokenizer.json", tokenizer.to_hugging_face)


def test_tiktoken_without_a_network_is_one_clear_line(monkeypatch):
    def unreachable(name):
        raise ConnectionError("Max retries\nexceeded")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    raises("(?s)gpt2.*Max retries.*TIKTOKEN_CACHE_DIR.*bpe", get_tokenizer, "gpt2")


def test_unknown_names_and_folders_are_refused(tmp_path):
    raises("'gpt9'.*byte, bpe, hf:FOLDER, hf:OWNER/NAME", get_tokenizer, "gpt9")
    raises("tokenizer.json does not exist", get_tokenizer, f"hf:{tmp_path}")
    raises("does not exist", load_tokenizer, tmp_path / "nothing.json")


def hub(monkeypatch, folder):
    """A stand-in for huggingface_hub, without a network; returns the list of what it is asked for."""
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append(name)
        assert "tokenizer.json" in allow_patterns and not any("*" in pattern for pattern in allow_patterns)
        if folder is None:
            raise RuntimeError("LocalEntryNotFoundError: no route\nto host")
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return asked


def test_a_name_on_the_hub_is_fetched_unless_there_is_a_folder(hf_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = hub(monkeypatch, hf_folder)
    tokenizer = get_tokenizer("hf:org/some-model_1.5")
    assert tokenizer.name == "hf:org/some-model_1.5" and tokenizer.encode(CORPUS) and asked == ["org/some-model_1.5"]
    for typo in ("hf:nowhere", "hf:no/such/folder", "hf:./a/b", "hf:../b", "hf:/a/b", f"hf:{tmp_path / 'x'}"):
        raises("does not exist", get_tokenizer, typo)
    (tmp_path / "org").mkdir()  # a path on this disk, mistyped
    raises("org/some-modle does not exist", get_tokenizer, "hf:org/some-modle")
    shutil.copytree(hf_folder, tmp_path / "org" / "some-model_1.5")
    assert get_tokenizer("hf:org/some-model_1.5").name == "hf:some-model_1.5" and len(asked) == 1


def test_a_name_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    hub(monkeypatch, None)
    raises("^org/model is not on this disk; the hub did not give it .*network", get_tokenizer, "hf:org/model")
    hub(monkeypatch, tmp_path)  # a model without a tokenizer.json
    raises("tokenizer.json does not exist", get_tokenizer, "hf:org/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    raises("^org/model is not on this disk;.*pip install huggingface_hub$", get_tokenizer, "hf:org/model")


def test_hugging_face_end_of_text_is_the_one_of_its_config(hf_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    assert get_tokenizer(f"hf:{tmp_path}").end_of_text == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert get_tokenizer(f"hf:{tmp_path}").end_of_text == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "nowhere"}')
    raises("no end-of-text token; looked for nowhere", get_tokenizer, f"hf:{tmp_path}")


@pytest.fixture
def llama_folder(hf_folder, tmp_path):
    """A folder whose tokenizer begins every text with <s>, as Llama's does, and knows added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_tokens(["café", "\u4f60\u597d", "Ġx"])
    tokenizer.add_special_tokens(["<|eot_id|>", "<é>"])
    (tmp_path / "llama").mkdir()
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    return tmp_path / "llama"


def test_added_tokens_are_spelled_as_they_were_added(llama_folder):
    tokenizer = get_tokenizer(f"hf:{llama_folder}")
    for text in ("un café noir", "\u4f60\u597d é", "Ġx Ġ <é>", "café" * 3):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert b"".join(tokenizer.decode_bytes([token]) for token in tokens) == text.encode()
    assert len(tokenizer.encode("café")) == 1


@pytest.mark.parametrize("added", [["café"], []])
def test_sentencepiece_style_tokens_are_decoded_by_the_package(tmp_path, added):
    save_sentencepiece(tmp_path, SPELLED, added)
    tokenizer = get_tokenizer(f"hf:{tmp_path}")
    assert tokenizer.decode(tokenizer.encode("un café noir")) == "un café noir"
    assert tokenizer.decode(tokenizer.encode("noir")[-1:]) == "noir"


EOS = [(..., ..., {1}), (5, ..., {1, 5}), ([1, 7], [8, 7], {1, 7, 8}), (None, 9, {1, 9})]  # ...: no such file


@pytest.mark.parametrize("config, generation, ends", EOS)
def test_every_eos_token_id_ends_a_text_after_saving_too(llama_folder, tmp_path, config, generation, ends):
    for name, eos in (("config.json", config), ("generation_config.json", generation)):
        if eos is not ...:
            (llama_folder / name).write_text(json.dumps({"eos_token_id": eos}))
    tokenizer = get_tokenizer(str(llama_folder))
    tokenizer.save(tmp_path)
    for again in (tokenizer, load_tokenizer(tmp_path)):
        assert again.end_tokens == ends and again.end_of_text == 1 and again.start_of_text == (0,)
    assert (tmp_path / "tokenizer.json").read_bytes() == json.dumps({"format": 1, **again._state()}).encode()


def test_a_tokenizer_without_an_end_of_text_takes_the_model_s(llama_folder):
    content = json.loads((llama_folder / "tokenizer.json").read_text())
    (llama_folder / "tokenizer.json").write_text(json.dumps(content).replace("<|endoftext|>", "<|other|>"))
    raises("no end-of-text token", load_tokenizer, llama_folder)
    (llama_folder / "generation_config.json").write_text('{"eos_token_id": [4, 1]}')
    tokenizer = load_tokenizer(llama_folder)
    assert tokenizer.end_of_text == 4 and tokenizer.end_tokens == {1, 4}


def test_a_name_of_a_folder_or_file_is_a_tokenizer(bpe, llama_folder, tmp_path):
    saved = bpe.save(tmp_path)
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        again = get_tokenizer(str(spec))
        assert again.merged == bpe.merged and again.save(tmp_path) == saved
    for spec in (f"hf:{llama_folder}", str(llama_folder), str(llama_folder / "tokenizer.json")):
        assert get_tokenizer(spec).name == "hf:llama"


def test_a_folder_cloned_without_git_lfs_is_recognised(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 17209920\n"
    (tmp_path / "tokenizer.json").write_text(pointer)
    for load in (load_tokenizer, lambda folder: get_tokenizer(f"hf:{folder}")):
        raises("git-lfs pointer.*git lfs pull", load, tmp_path)


def mixed_texts():
    rng = random.Random(3)
    yield from AWKWARD
    yield from (random_text(rng) for _ in range(300))
    yield CORPUS
    for start in range(0, 0x20000, 0x400):  # every character of two planes, as the patterns' classes may differ
        block = (chr(i) for i in range(start, start + 0x400) if not 0xD800 <= i < 0xE000)
        yield "".join(f"a{c} 1{c}{c}\n" for c in block) if start < 0x4000 else "".join(block)


def test_a_hugging_face_file_of_ours_encodes_alike(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_hugging_face()))
    end = tokenizer.end_of_text
    assert theirs.token_to_id("<|endoftext|>") == end and theirs.get_vocab_size() == tokenizer.vocab_size
    assert theirs.encode("a<|endoftext|>b").ids == [*tokenizer.encode("a"), end, *tokenizer.encode("b")]
    theirs.encode_special_tokens = True
    for text in mixed_texts():
        tokens = theirs.encode(text).ids
        assert tokens == tokenizer.encode(text) and theirs.decode(tokens, skip_special_tokens=False) == text


def test_missing_tokenizers_package_is_named(monkeypatch, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    raises("pip install tokenizers", get_tokenizer, f"hf:{tmp_path}")


OURS = [{"kind": kind} for kind in ("bpe", "new", "tiktoken", "hf", [])] + [{"kind": "tiktoken", "name": 3}]
OURS += [{"kind": "bpe", "split": SPLIT}]
OURS += [{"kind": "bpe", "split": SPLIT, "merged": merged} for merged in (3, [3], ["\u4f60"])]


@pytest.mark.parametrize("content", ["", "null", "{}", *(json.dumps({"format": 1, **state}) for state in OURS)])
def test_what_is_no_tokenizer_file_is_refused_by_name(content, tmp_path):
    if content == "{}":  # anything may be a Hugging Face tokenizer
        pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(content)
    raises("tokenizer.json", load_tokenizer, tmp_path)
