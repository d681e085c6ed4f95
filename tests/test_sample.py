"""Sampling: prompts as people have them, and text that streams."""

import io
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SPELLED, mistakes, refused, save_sentencepiece

import options  # noqa: F401 (before torch)

import sample
from data.tokenizer import ByteTokenizer, get_tokenizer, train_bpe
from sample import TextStream

PROGRAM = Path(sample.__file__)
TEXT = "Caf\u00e9 \u4f60\u597d \U0001f642 \ufffd na\u00efve\n" * 20


def streamed(tokenizer, tokens, prompt=()):
    """What is shown after each token, and at the end."""
    stream = TextStream(tokenizer, prompt)
    return [*map(stream.add, tokens), stream.rest()]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A tokenizer that spells what it does not know byte by byte, and a space by what stands before."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_sentencepiece(folder, SPELLED)
    return get_tokenizer(f"hf:{folder}")


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe([TEXT], 300)], ids=["byte", "bpe"])
def test_streamed_text_is_the_text_and_lags_by_at_most_a_character(make):
    tokenizer = make()
    tokens = tokenizer.encode(TEXT)
    shown = streamed(tokenizer, tokens)
    assert "".join(shown) == TEXT
    for count in range(1, len(tokens)):
        complete = tokenizer.decode_bytes(tokens[:count]).decode("utf-8", "ignore")
        assert "".join(shown[:count]) == complete


@pytest.mark.parametrize("prompt", ["", "un noir", "\u4f60\u597d" * 30])
def test_what_sentencepiece_spells_by_what_stands_before_streams_alike(sentencepiece, prompt):
    text = f"{prompt} un noir \u4f60\u597d un ".removeprefix(" ") + "\u4f60\U0001f642" * 60 + " noir"
    tokens, begun = sentencepiece.encode(text), sentencepiece.encode(prompt)
    shown = streamed(sentencepiece, tokens[len(begun) :], begun)
    assert sentencepiece.decode(begun) + "".join(shown) == text and tokens[: len(begun)] == begun


STRAY = {
    "continuations": [0x80] * 1000,
    "begun and never finished": [0xE4, 0xBD] * 500,
    "U+FFFD itself": list("\ufffd".encode()) * 300,
    "anything": random.Random(0).choices(range(256), k=1000),
    "among others": [0x80, 0x80, *"\u4f60\u597d".encode(), 0xFF, *"\U0001f642x".encode()] * 60,
}


@pytest.mark.parametrize("tokens", STRAY.values(), ids=STRAY)
@pytest.mark.parametrize("prompt", [[], [65] * 10, [0x80] * 10])
def test_bytes_that_are_no_utf_8_are_shown_soon_at_constant_cost(tokens, prompt):
    stream, shown = TextStream(ByteTokenizer(), prompt), ""
    for count, token in enumerate(tokens, 1):
        shown += stream.add(token)
        decoded = bytes(tokens[:count]).decode("utf-8", "replace")
        assert decoded.startswith(shown) and len(shown) >= len(decoded) - 1 and len(stream.tokens) < 100
    assert shown + stream.rest() == bytes(tokens).decode("utf-8", "replace")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("file", ["a file", "-"])
def test_a_prompt_in_a_file_may_begin_with_a_byte_order_mark(tmp_path, monkeypatch, encoding, file):
    raw = "def caf\u00e9".encode(encoding)
    (tmp_path / "a file").write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert sample.read_prompt(sample.Options(prompt_file=file)) == "def caf\u00e9"


@mistakes("""
--prompt a --prompt_file b => prompt and prompt_file are both given: leave one out
--checkpoint nowhere => no checkpoint at nowhere
--checkpoint out/nowhere => no checkpoint at out/nowhere
--threads 4294967296 => threads must be at least 0 and at most 1024
--temperature 1e30 => temperature must be below 2**63 in size, not 1e+30
--temperature inf => temperature must be a finite number
--temperature -1 => temperature must be at least 0, not -1.0
--seed 99999999999999999999 => seed must be below 2**63 in size
--prompt_file nowhere => No such file or directory: 'nowhere'
""")
def test_bad_input_is_one_line(given, why, trained, capsys):
    assert why in refused(capsys, sample.main, "--checkpoint", trained, given)


CLOSED = [("<&-", "--prompt_file -", 2, "error: prompt_file is - and standard input is closed\n")]
CLOSED += [("<&-", "", 0, "tokens/s"), (">&-", "", 0, "tokens/s"), ("<&- >&- 2>&-", "", 0, "")]
if Path("/dev/full").exists():  # Linux
    CLOSED += [(">/dev/full", "", 2, "error: standard output: [Errno 28] No space left on device\n")]


@pytest.mark.parametrize("closed, more, code, why", CLOSED)
def test_closed_streams_are_no_error(trained, closed, more, code, why):
    how = f"--device cpu --threads 1 --max_new_tokens 3 {more or '--prompt key'}"
    command = f'"{sys.executable}" "{PROGRAM}" --checkpoint "{trained}" {how} {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and why in done.stderr and "Traceback" not in done.stderr
