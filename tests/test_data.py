"""Data: which windows a step sees, prepared folders and what they refuse, and the programs that make them."""

import hashlib
import http.server
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data import dataset as dataset_module
from data import download as download_module
from data import prepare as prepare_module
from data.dataset import WindowSampler, open_dataset, validation_windows
from data.download import download
from data.prepare import main, prepare, python_corpus

PROGRAM = Path(prepare_module.__file__)
PROSE = "".join(f"Line {i}: the quick brown fox, {i * i} times over.\n" for i in range(4000))


# --- Which windows a step sees ---


def epoch_of(sampler, epoch):
    n = sampler.windows_per_epoch
    return sampler.starts(np.arange(epoch * n, (epoch + 1) * n))


@pytest.mark.parametrize("length, block", [(2, 1), (8, 7), (64, 8), (65, 8), (1000, 7), (4099, 16), (100_003, 37)])
def test_an_epoch_covers_the_data_without_repeats(length, block):
    sampler = WindowSampler(np.arange(length), block, seed=3)
    for epoch in (0, 1, 2, 1000):
        positions = (epoch_of(sampler, epoch)[:, None] + np.arange(block)).ravel() % length
        assert len(np.unique(positions)) == len(positions) > length - block


def test_epochs_differ_in_order_and_in_where_windows_begin():
    sampler = WindowSampler(np.arange(10_000), 8)
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    assert (first != second).mean() > 0.9
    assert len({int(epoch_of(sampler, epoch)[0]) % 8 for epoch in range(40)}) == 8
    assert (np.sort(first) != first).mean() > 0.9


def test_the_order_is_as_random_as_a_shuffle():
    """Ranks of neighbours: uncorrelated, and their distances on average a third of the whole, as in a random order."""
    sampler, n = WindowSampler(np.arange(32_000), 8, seed=5), 4000
    order = np.argsort(np.argsort((epoch_of(sampler, 0) - epoch_of(sampler, 0).min())))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 0.02


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_permutation_is_a_bijection_for_every_key(n):
    for key in (0, 1, 2**64 - 1):
        assert sorted(dataset_module._permute(np.arange(n), n, np.uint64(key)).tolist()) == list(range(n))


def test_targets_are_the_next_tokens():
    sampler = WindowSampler(np.arange(1000, dtype=np.uint16), 9, seed=1)
    for step in range(100):
        inputs, targets = sampler.batch(step, 5)
        assert inputs.shape == targets.shape == (5, 9) and inputs.dtype == targets.dtype == np.int64
        assert (targets == (inputs + 1) % 1000).all()
        assert (inputs[:, 1:] == targets[:, :-1]).all()


def test_a_step_does_not_depend_on_what_was_asked_before():
    tokens = np.arange(5000)
    run = WindowSampler(tokens, 16, seed=7)
    undisturbed = [run.batch(step, 6) for step in range(120)]  # more than two epochs
    for step in random.Random(0).sample(range(120), 40):
        resumed = WindowSampler(tokens, 16, seed=7).batch(step, 6)
        assert (resumed[0] == undisturbed[step][0]).all() and (resumed[1] == undisturbed[step][1]).all()
    other = WindowSampler(tokens, 16, seed=8)
    assert any((other.batch(step, 6)[0] != undisturbed[step][0]).any() for step in range(3))


@pytest.mark.parametrize("world_size, grad_accum", [(2, 1), (1, 3), (2, 3), (4, 2)])
def test_ranks_and_micro_steps_see_what_one_large_batch_sees(world_size, grad_accum):
    sampler, batch = WindowSampler(np.arange(3000), 11, seed=2), 3
    for step in range(60):
        whole = sampler.batch(step, world_size * grad_accum * batch)
        one_process = [sampler.batch(step, world_size * batch, micro_step=a, grad_accum=grad_accum) for a in range(grad_accum)]
        parts = [sampler.batch(step, batch, rank=r, world_size=world_size, micro_step=a, grad_accum=grad_accum)
                 for a in range(grad_accum) for r in range(world_size)]
        for side in (0, 1):
            assert (np.concatenate([part[side] for part in parts]) == whole[side]).all()
            assert (np.concatenate([part[side] for part in one_process]) == whole[side]).all()


def test_sampling_needs_no_memory_that_grows_with_the_data():
    tokens = np.broadcast_to(np.uint16(7), (10**13,))  # twenty terabytes, by a stride of zero
    tracemalloc.start()
    sampler = WindowSampler(tokens, 1024)
    inputs, _ = sampler.batch(10**6, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (inputs == 7).all() and peak < 2 << 20


@pytest.mark.parametrize("length, block", [(0, 1), (8, 8), (5, 100)])
def test_data_shorter_than_a_block_is_refused_with_both_numbers(length, block):
    for use in (lambda: WindowSampler(np.zeros(length, np.uint16), block), lambda: validation_windows(np.zeros(length, np.uint16), block, 4)):
        with pytest.raises(ValueError, match=rf"^{length} tokens .* block_size {block}\b"):
            use()


def test_validation_windows_are_fixed_spread_and_disjoint():
    tokens = np.arange(1003)
    inputs, targets = validation_windows(tokens, 10, 25)
    assert inputs.shape == (25, 10) and (targets == inputs + 1).all()
    assert inputs[0, 0] == 0 and targets[-1, -1] == 1002
    gaps = np.diff(inputs[:, 0])
    assert gaps.min() >= 10 and gaps.max() - gaps.min() <= 1
    assert (validation_windows(tokens, 10, 25)[0] == inputs).all()
    everything = validation_windows(tokens, 10, 10**6)[0]
    assert everything.shape == (100, 10) and np.diff(everything[:, 0]).min() >= 10
    assert validation_windows(tokens, 10, 1)[0].shape == (1, 10)


# --- Prepared folders ---


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "prose.txt").write_text(PROSE)
    prepare(source=str(folder / "prose.txt"), vocab_size=400, out_dir=folder / "prepared")
    return folder / "prepared"


@pytest.fixture
def prepared(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "prepared")
    return tmp_path / "prepared"


def text_of(dataset, split):
    tokens = [int(token) for token in getattr(dataset, split) if token != dataset.end_of_text]
    return dataset.tokenizer.decode(tokens)


def test_a_prepared_text_comes_back_whole(pristine):
    dataset = open_dataset(pristine, verify=True)
    assert text_of(dataset, "train") + text_of(dataset, "val") == PROSE
    assert dataset.train.dtype == np.dtype("<u2") and dataset.vocab_size == 400 == dataset.tokenizer.vocab_size
    assert dataset.train[-1] == dataset.val[-1] == dataset.end_of_text
    for split in ("train", "val"):
        entry = dataset.meta["splits"][split]
        assert entry["tokens"] == len(getattr(dataset, split)) and entry["documents"] == 1
        assert entry["bytes"] == len(text_of(dataset, split).encode())
        assert entry["sha256"] == hashlib.sha256((pristine / entry["file"]).read_bytes()).hexdigest()
    share = dataset.meta["splits"]["val"]["bytes"] / len(PROSE)
    assert 0.049 < share < 0.051 and text_of(dataset, "val").startswith("Line")  # the end, from the start of a line


def test_bits_per_byte_is_the_text_s_nats_over_its_bytes(pristine):
    dataset = open_dataset(pristine)
    nats_per_token = 2.5
    total = nats_per_token * len(dataset.val) / math.log(2)
    assert dataset.bits_per_byte(nats_per_token) == pytest.approx(total / len(text_of(dataset, "val").encode()))


def test_the_same_text_gives_the_same_bytes(pristine, tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE)
    again = prepare(source=str(tmp_path / "prose.txt"), vocab_size=400, out_dir=tmp_path / "again")
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        assert (tmp_path / "again" / name).read_bytes() == (pristine / name).read_bytes()
    (tmp_path / "prose.txt").write_text(PROSE + "more")
    other = prepare(source=str(tmp_path / "prose.txt"), vocab_size=400, out_dir=tmp_path / "other")
    assert again.fingerprint == open_dataset(pristine).fingerprint != other.fingerprint
    assert re.fullmatch("[0-9a-f]{16}", again.fingerprint)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_truncated_file_is_refused_even_unverified(prepared, name):
    with open(prepared / name, "r+b") as file:
        file.truncate((prepared / name).stat().st_size - 2)
    with pytest.raises(ValueError, match=f"{name} has .* bytes where"):
        open_dataset(prepared, verify=False)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_a_flipped_bit_is_found(prepared, name, capsys):
    content = bytearray((prepared / name).read_bytes())
    content[len(content) // 2] ^= 1
    (prepared / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} .*SHA-256"):
        open_dataset(prepared, verify=True)
    assert main(["--info", str(prepared)]) == 2
    assert "SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
def test_a_missing_file_is_named(prepared, name):
    (prepared / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        open_dataset(prepared)


def test_ids_beyond_the_vocabulary_are_refused(prepared):
    tokens = np.fromfile(prepared / "val.bin", "<u2")
    tokens[3] = 400
    tokens.tofile(prepared / "val.bin")
    meta = json.loads((prepared / "meta.json").read_text())
    meta["splits"]["val"]["sha256"] = hashlib.sha256((prepared / "val.bin").read_bytes()).hexdigest()
    (prepared / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="token id 400, outside its vocabulary of 400"):
        open_dataset(prepared)


def test_no_folder_is_a_clear_message(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set at .*prepare.py --out_dir"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="not a prepared data set"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["../val.bin", "/etc/passwd", "val.bin\0", "val.bin/../../val.bin"])
def test_file_names_in_meta_cannot_point_elsewhere(prepared, name):
    for change in (lambda meta: meta["splits"]["val"], lambda meta: meta["tokenizer"]):
        meta = json.loads((prepared / "meta.json").read_text())
        change(meta)["file"] = name
        (prepared.parent / "other").mkdir(exist_ok=True)
        shutil.copytree(prepared, prepared.parent / "other", dirs_exist_ok=True)
        (prepared.parent / "other" / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match="file' is not"):
            open_dataset(prepared.parent / "other")


def leaves(value, path=()):
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from leaves(value[key], (*path, key))


def test_mutated_meta_is_refused_in_one_line_or_harmless(prepared):
    """Everything the reader relies on is checked: a changed value either is one of the notes, or is refused."""
    original = json.loads((prepared / "meta.json").read_text())
    paths = list(leaves(original))
    hostile = [None, True, False, -1, 0, 1, 2**16, 2**62, 10**300, 0.5, "", "uint8", "\0", "../x", "f" * 64, "\x1b[2J", [], [1], {}, {"file": 1}, "x" * 10**4]
    rng, refused = random.Random(4), 0
    for i in range(300):
        meta = json.loads(json.dumps(original))
        *parents, last = rng.choice(paths)
        target = meta
        for key in parents:
            target = target[key]
        if i % 5:
            target[last] = rng.choice(hostile)
        else:
            del target[last]
        (prepared / "meta.json").write_text(json.dumps(meta))
        try:
            dataset = open_dataset(prepared, verify=True)
            assert len(dataset.train) == original["splits"]["train"]["tokens"]
            assert prepare_module.describe(dataset).replace("\n", "").isprintable()
            if i % 4 == 0:
                dataset.tokenizer.decode(dataset.train[:10])
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert refused > 150


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"format": 1}', b'{"format": 1, "format": 2}'])
def test_a_meta_that_is_none_is_refused(prepared, content):
    (prepared / "meta.json").write_bytes(content)
    with pytest.raises(ValueError, match="meta.json"):
        open_dataset(prepared)


# --- Sources ---


def documents(dataset, split):
    tokens = np.asarray(getattr(dataset, split))
    ends = np.flatnonzero(tokens == dataset.end_of_text)
    return [dataset.tokenizer.decode(part) for part in (tokens[start:end] for start, end in zip([0, *ends + 1], ends))]


def test_a_folder_is_split_by_file_and_a_file_stays_where_it_is(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / ".hidden").mkdir()
    (source / ".hidden" / "no.txt").write_text("hidden")
    (source / "no.bin").write_text("not text")
    texts = {f"{'sub/' if i % 2 else ''}{i}.{'txt' if i % 3 else 'md'}": f"document {i} <|endoftext|> says {i}" for i in range(60)}
    for name, text in texts.items():
        (source / name).write_text(text)
    first = prepare(source=str(source), tokenizer="byte", out_dir=tmp_path / "a", val_fraction=0.2)
    train, val = documents(first, "train"), documents(first, "val")
    assert sorted(train + val) == sorted(texts.values()) and 3 <= len(val) <= 25
    for i in range(60, 120):
        (source / f"{i}.txt").write_text(f"document {i}")
    second = prepare(source=str(source), tokenizer="byte", out_dir=tmp_path / "b", val_fraction=0.2)
    assert set(val) <= set(documents(second, "val")) and set(train) <= set(documents(second, "train"))


def test_two_files_give_one_for_each_split(tmp_path):
    (tmp_path / "source").mkdir()
    for name in "ab":
        (tmp_path / "source" / f"{name}.txt").write_text(f"only {name}")
    dataset = prepare(source=str(tmp_path / "source"), tokenizer="byte", out_dir=tmp_path / "out")
    assert len(documents(dataset, "train")) == len(documents(dataset, "val")) == 1


def test_jsonl_is_split_by_record_and_equal_records_stay_together(tmp_path):
    texts = [f"record {i % 200}" for i in range(400)] + ["caf\u00e9 \ud800 \U0001f642"]
    (tmp_path / "d.jsonl").write_text("\n\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)) + "\n")
    dataset = prepare(source=str(tmp_path / "d.jsonl"), tokenizer="byte", out_dir=tmp_path / "out", val_fraction=0.2)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == sorted(text.replace("\ud800", "\ufffd") for text in texts)
    assert not set(train) & set(val) and len(val) > 20


@pytest.mark.parametrize("line, why", [("{", "not JSON"), ("3", 'string in "text"'), ('{"text": 3}', 'string in "text"'), ("[" * 10**5, "not JSON"),
                                       ('{"tex": "a"}', 'string in "text"')])
def test_a_bad_jsonl_line_names_file_and_line(tmp_path, capsys, line, why):
    (tmp_path / "d.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    assert main(["--source", str(tmp_path / "d.jsonl"), "--out_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.match(rf"error: .*d\.jsonl, line 3: .*{why}", error) and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["d.jsonl"]


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf" + b"good \xff\xfe bad \xc3\xa9 \xef\xbf\xbd end\r\n" * 10)
    dataset = prepare(source=str(tmp_path / "d.txt"), tokenizer="byte", out_dir=tmp_path / "out")
    assert text_of(dataset, "train") + text_of(dataset, "val") == "good \ufffd\ufffd bad \u00e9 \ufffd end\r\n" * 10
    assert dataset.meta["invalid_utf8_bytes_replaced"] == {"d.txt": 20}


@pytest.mark.parametrize("text", ["a\n" * 50_000, "word " * 30_000, "x" * 150_000, "\u4f60\U0001f642" * 30_000, "\n" * 100_000, "ab"])
def test_pieces_and_the_cut_lose_nothing(tmp_path, monkeypatch, text):
    monkeypatch.setattr(prepare_module, "PIECE", 1 << 12)
    (tmp_path / "d.txt").write_text(text)
    dataset = prepare(source=str(tmp_path / "d.txt"), tokenizer="byte", out_dir=tmp_path / "out", val_fraction=0.1)
    assert text_of(dataset, "train") + text_of(dataset, "val") == text


@pytest.mark.parametrize("name, unit", [("lines.txt", "some words and a number 12345\n"), ("one_line.txt", "letters"),
                                        ("records.jsonl", '{"text": "%d %s"}\n')])
def test_a_file_larger_than_memory_streams(tmp_path, monkeypatch, name, unit):
    """With pieces of 32 KiB, a text of 6 MB passes through less than 2 MB of memory."""
    monkeypatch.setattr(prepare_module, "PIECE", 1 << 15)
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", 1 << 16)
    with open(tmp_path / name, "w") as file:
        for i in range(60):
            file.write(unit % (i, "words " * 16_000) if "%" in unit else unit * (100_000 // len(unit)))
    tracemalloc.start()
    try:
        prepare(source=str(tmp_path / name), vocab_size=300, out_dir=tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_the_tokenizer_learns_from_a_sample_of_the_training_side_spread_over_all_of_it(monkeypatch):
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", 1000)
    corpus = prepare_module.Corpus(lambda: (("val" if i % 10 == 0 else "train", f"{i:010}", True) for i in range(10_000)), 100_000)
    sample = [int(text) for text in prepare_module._sample(corpus)]
    assert 80 <= len(sample) <= 100 and all(i % 10 for i in sample)
    assert sample[0] < 200 and sample[-1] > 9800 and max(np.diff(sample)) < 200


def test_vocabularies_above_65536_are_written_as_uint32(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "get_tokenizer", lambda name: Wide())
    monkeypatch.setattr(dataset_module, "load_tokenizer", lambda path: Wide())
    (tmp_path / "d.txt").write_text("hello " * 100)
    dataset = prepare(source=str(tmp_path / "d.txt"), tokenizer="wide", out_dir=tmp_path / "out")
    assert dataset.meta["dtype"] == "uint32" and dataset.train.dtype == np.dtype("<u4") and dataset.train.max() == 100_000
    assert text_of(open_dataset(tmp_path / "out", verify=True), "val") == text_of(dataset, "val")


class Wide(prepare_module.Tokenizer):
    name, vocab_size, end_of_text = "wide", 100_001, 100_000

    def _encode(self, texts):
        return [[99_000 + byte for byte in text.encode()] for text in texts]

    def _decode(self, tokens):
        return bytes(token - 99_000 for token in tokens)

    def _state(self):
        return {}


# --- The text that comes with Python ---


REPEATED = "This paragraph is longer than sixty characters and stands in every module."


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library of our own."""
    root = tmp_path / "lib"
    licence = "# Copyright 1999 by Somebody.\n# Licensed under terms.\n\n"
    for i in range(40):
        body = f'def function_{i}(argument, other=None):\n    """What function {i} does with words {i * 7}."""\n    return argument * {i}\n\n' * 3
        write(root / f"module_{i}.py", f'#!/usr/bin/env python\n{licence}"""Module number {i}.\n\n{REPEATED}\n"""\n\n{body}')
    write(root / "twin.py", (root / "module_3.py").read_text())
    write(root / "table.py", "TABLE = {\n" + "".join(f"    {i}: 'row',\n" for i in range(200)) + "}\n\n" + "def keep():\n    return 'kept'\n\n" * 20)
    write(root / "broken.py", "def (:\n" * 60)
    for skipped in ("test/test_a.py", "json/tests/t.py", "site-packages/p.py", "lib2to3/f.py", "encodings/cp1.py", "_sysconfigdata_x.py"):
        write(root / skipped, f"SKIPPED = '{skipped}'\n" * 30)
    get_path = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *rest: str(root) if name == "stdlib" else get_path(name, *rest))
    return root


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_library_sources_are_cleaned_and_skipped_as_promised(library):
    texts = [text for _, text, _ in python_corpus("code", 0.05, 0).documents()]
    everything = "\n".join(texts)
    assert len(texts) == 41 and len(set(texts)) == 41  # forty modules and the table's; one twin
    assert "SKIPPED" not in everything and "Copyright" not in everything and "#!" not in everything and "'row'" not in everything
    assert "kept" in everything and '"""Module number 7.' in everything and everything.count(REPEATED) == 40


def test_prose_is_docstrings_under_titles_each_paragraph_once(library):
    texts = [text for _, text, _ in python_corpus("prose", 0.05, 0).documents()]
    assert any("module_5\n========\n\nModule number 5.\n\nmodule_5.function_5(argument, other=None)\n\nWhat function 5" in text for text in texts)
    assert "\n".join(texts).count(REPEATED) == 1
    assert not any("return argument" in text for text in texts)


def test_all_text_of_a_module_is_on_the_same_side_whatever_else_there_is(library):
    def side(content):
        return {int(match[1]): split for split, text, _ in python_corpus(content, 0.3, 0).documents()
                if (match := re.search(r"function_(\d+)\(", text)) and "function" in text}

    prose, both = side("prose"), side("both")
    assert prose == {i: both[i] for i in prose} and set(both.values()) == {"train", "val"}
    for i in range(0, 40, 2):
        if i != 3:
            (library / f"module_{i}.py").unlink()
    fewer = side("both")
    assert fewer == {i: both[i] for i in fewer}


def test_stripped_distributions_use_what_is_there_and_say_what_is_missing(library, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    corpus = python_corpus("both", 0.05, 0)
    assert "topics" in corpus.notes["missing"][0] and corpus.notes["bytes_of"]["code"] > 0
    archive = tmp_path / "python399.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in library.rglob("*.py"):
            file.write(path, path.relative_to(library).as_posix())
    zipped_alike = python_corpus("code", 0.05, 0).notes["bytes_of"]
    shutil.rmtree(library)
    monkeypatch.setattr(sys, "path", [*sys.path, str(archive)])
    assert python_corpus("code", 0.05, 0).notes["bytes_of"] == zipped_alike
    archive.unlink()
    with pytest.raises(ValueError, match="neither its sources nor .*--source FILE_OR_FOLDER"):
        python_corpus("both", 0.05, 0)


def test_the_real_library_makes_a_data_set(tmp_path):
    dataset = prepare(content="prose", vocab_size=512, out_dir=tmp_path / "python")
    assert dataset.meta["content"] == "prose" and dataset.meta["source"] == "python"
    if not dataset.meta["missing"]:
        assert sum(entry["bytes"] for entry in dataset.meta["splits"].values()) > 1_000_000
        assert 0.01 < dataset.meta["splits"]["val"]["bytes"] / dataset.meta["splits"]["train"]["bytes"] < 0.15
    assert main(["--info", str(tmp_path / "python")]) == 0


# --- Nothing lost, nothing half there ---


def test_a_failure_on_the_way_leaves_the_old_data_set_and_nothing_else(prepared, monkeypatch, tmp_path):
    (tmp_path / "d.txt").write_text(PROSE)
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "_sync", full)
    assert main(["--source", str(tmp_path / "d.txt"), "--out_dir", str(prepared), "--overwrite", "--tokenizer", "byte"]) == 2
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["d.txt", "prepared"]


def start(*arguments):
    return subprocess.Popen([sys.executable, PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(prepare_module.fcntl is None, reason="needs locks that end with their process")
def test_a_killed_run_leaves_no_data_set_and_the_next_run_cleans_up(tmp_path):
    (tmp_path / "d.txt").write_text(PROSE * 30)
    process = start("--source", tmp_path / "d.txt", "--out_dir", tmp_path / "out")
    while not list(tmp_path.glob(".out.new-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    (left,) = tmp_path.glob(".out.new-*")
    (tmp_path / "small.txt").write_text(PROSE[:2000])
    living = ["--source", str(tmp_path / "small.txt"), "--out_dir", str(tmp_path / "out"), "--tokenizer", "byte"]
    prepare_module._clean_up(tmp_path / "out")
    assert left.exists()  # a living run is left alone
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.exists() and not (tmp_path / "out").exists()
    assert main(living) == 0 and not left.exists()
    open_dataset(tmp_path / "out", verify=True)


def test_a_data_set_caught_between_two_renames_is_put_back(prepared, tmp_path):
    (tmp_path / ".prepared.old-x").mkdir()
    prepared.rename(tmp_path / ".prepared.old-x" / "replaced")
    (tmp_path / "d.txt").write_text(PROSE[:2000])
    assert main(["--source", str(tmp_path / "d.txt"), "--out_dir", str(prepared)]) == 2  # it holds a data set again
    open_dataset(prepared, verify=True)


@pytest.mark.skipif(prepare_module.fcntl is None, reason="needs locks")
def test_renaming_is_done_by_one_program_at_a_time(tmp_path):
    entered = threading.Event()

    def second():
        with prepare_module._alone_in(tmp_path):
            entered.set()

    with prepare_module._alone_in(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    thread.join()


def test_two_runs_on_one_folder_both_end_with_a_whole_data_set(tmp_path):
    sources = []
    for i in (1, 2):
        (tmp_path / f"{i}.txt").write_text(PROSE * i)
        sources.append(["--source", tmp_path / f"{i}.txt", "--out_dir", tmp_path / "out", "--tokenizer", "byte"])
    processes = [start(*source, "--overwrite") for source in sources * 2]
    for process in processes:
        output, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert text_of(dataset, "train") + text_of(dataset, "val") in (PROSE, PROSE * 2)
    assert sorted(os.listdir(tmp_path)) == ["1.txt", "2.txt", "out"]


# --- Bad input ---


@pytest.mark.parametrize("arguments, why", [
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--vocab_size", "many"], "--vocab_size"),
    (["--vocab_size", "256"], "--vocab_size 256 is not between 257"),
    (["--vocab_size", "512", "--tokenizer", "byte"], "--vocab_size is for --tokenizer bpe"),
    (["--source", "no/such/file.txt"], "no/such/file.txt: neither python, shakespeare"),
    (["--source", ""], "neither python"),
    (["--tokenizer", "gpt9"], "no tokenizer 'gpt9'"),
    (["--tokenizer", "hf:nowhere"], "nowhere"),
    (["--content", "poems"], "--content"),
    (["--source", "shakespeare", "--content", "prose"], "--content is for --source python"),
    (["--shards", "3"], "--shards is for"),
    (["--source", "fineweb-edu", "--shards", "15"], "from 1 to 14"),
    (["--val_fraction", "0"], "--val_fraction 0.0"),
    (["--val_fraction", "nan"], "--val_fraction nan"),
    (["--info", "nowhere"], "no data set at nowhere"),
    (["--over"], "unrecognized arguments: --over"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments, why, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*arguments, "--out_dir", "out"])
    except SystemExit as stop:
        code = stop.code
    out, error = capsys.readouterr()
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and why in error and not out
    assert os.listdir(tmp_path) == []


def test_folders_that_are_in_the_way_are_refused_and_untouched(prepared, tmp_path, capsys):
    (tmp_path / "d.txt").write_text(PROSE[:2000])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.doc").write_text("years of work")
    for out, why in ((tmp_path / "thesis", "not a prepared data set"), (tmp_path / "d.txt", "not a prepared data set"), (prepared, "--overwrite")):
        for extra in ([], ["--overwrite"]) if out != prepared else ([],):
            assert main(["--source", str(tmp_path / "d.txt"), "--out_dir", str(out), *extra]) == 2
            assert why in capsys.readouterr().err
    (prepared / "notes.md").write_text("mine")
    assert main(["--source", str(tmp_path / "d.txt"), "--out_dir", str(prepared), "--overwrite"]) == 2
    assert "holds 'notes.md' beside the data set" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.doc").read_text() == "years of work"
    open_dataset(prepared, verify=True)


def test_empty_sources_are_refused(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "picture.png").write_bytes(b"x")
    for source in ("empty.txt", "folder", "picture.png"):
        assert main(["--source", str(tmp_path / source), "--out_dir", str(tmp_path / "out")]) == 2
        assert "no text in .jsonl, .md, .txt files" in capsys.readouterr().err


def test_programs_run_alone_from_anywhere(pristine, tmp_path):
    for arguments in ([PROGRAM, "--info", pristine], [PROGRAM, "--help"], [dataset_module.__file__], [prepare_module.DATA / "tokenizer.py"]):
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr


def test_data_does_not_import_torch():
    code = "import sys; import data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent.parent).returncode == 0


# --- Downloads ---

FILE = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(FILE).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves FILE; `breaks` connections break half-way, `ranges` says whether Range is honoured."""

    breaks, ranges, delay, linked, status, requests = 0, True, 0.0, None, None, []
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        cls = type(self)
        cls.requests.append(self.headers.get("Range"))
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.send_header("X-Linked-Etag", f'"{cls.linked}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        time.sleep(cls.delay)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted and cls.ranges else 0
        if cls.status or start >= len(FILE):
            self.send_response(cls.status or 416)
            self.send_header("Content-Range", f"bytes */{len(FILE)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = FILE[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(FILE) - 1}/{len(FILE)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cls.breaks:
            cls.breaks -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download_module, "time", types.SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))
    handler = type("Handler", (Server,), {"requests": []})
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    instance.handle_error = lambda *_: None  # of a client that gave up, as some tests do: printed, it would fall into a later test
    handler.url = f"http://127.0.0.1:{instance.server_address[1]}"
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield handler
    instance.shutdown()
    instance.server_close()


def test_download_is_checked_and_done_once(server, tmp_path):
    path = tmp_path / "cache" / "file"
    assert SHA256 in download(server.url + "/file", path, len(FILE), SHA256)
    assert path.read_bytes() == FILE and os.listdir(path.parent) == ["file"]
    download(server.url + "/file", path, len(FILE), SHA256)
    assert len(server.requests) == 1
    path.write_bytes(FILE[:-1] + b"x")
    with pytest.raises(ValueError, match="SHA-256.*remove it"):
        download(server.url + "/file", path, len(FILE), SHA256)


def test_download_goes_on_where_connections_broke(server, tmp_path):
    server.breaks = 3
    download(server.url + "/file", tmp_path / "file", len(FILE), SHA256)
    assert (tmp_path / "file").read_bytes() == FILE
    assert [int(request[6:-1]) if request else 0 for request in server.requests] == [0, 150_000, 225_000, 262_500]


def test_download_goes_on_from_the_part_of_an_earlier_run(server, tmp_path):
    (tmp_path / "file.part").write_bytes(FILE[:1000])
    download(server.url + "/file", tmp_path / "file", len(FILE), SHA256)
    assert server.requests == ["bytes=1000-"] and (tmp_path / "file").read_bytes() == FILE
    (tmp_path / "file").rename(tmp_path / "file.part")  # complete, only not renamed yet
    download(server.url + "/file", tmp_path / "file", len(FILE), SHA256)
    assert (tmp_path / "file").read_bytes() == FILE and os.listdir(tmp_path) == ["file"]
    (tmp_path / "file").unlink()
    (tmp_path / "file.part").write_bytes(FILE + b"more")
    download(server.url + "/file", tmp_path / "file", len(FILE), SHA256)
    assert (tmp_path / "file").read_bytes() == FILE


def test_download_from_a_server_that_ignores_ranges_starts_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.part").write_bytes(b"wrong" * 100)
    download(server.url + "/file", tmp_path / "file", len(FILE), SHA256)
    assert (tmp_path / "file").read_bytes() == FILE


def test_download_of_another_file_is_refused_and_removed(server, tmp_path):
    with pytest.raises(ValueError, match="SHA-256"):
        download(server.url + "/file", tmp_path / "file", len(FILE), "0" * 64)
    with pytest.raises(ValueError, match="300,000 bytes where 300,001 are expected"):
        download(server.url + "/file", tmp_path / "file", len(FILE) + 1, SHA256)
    (tmp_path / "file.part").write_bytes(b"x" * 1000)  # a part of something else
    with pytest.raises(ValueError, match="SHA-256"):
        download(server.url + "/file", tmp_path / "file", len(FILE), SHA256)
    assert os.listdir(tmp_path) == []


def test_the_hash_a_hub_names_on_the_way_is_compared(server, tmp_path):
    server.linked = SHA256
    assert download(server.url + "/redirect", tmp_path / "file") == f"sha256 {SHA256} named by the server"
    server.linked = "0" * 64
    with pytest.raises(ValueError, match="SHA-256"):
        download(server.url + "/redirect", tmp_path / "other")
    assert download(server.url + "/file", tmp_path / "third") == "length only"


def test_download_gives_up_in_one_line(server, tmp_path):
    server.delay = 1.0
    with pytest.raises(OSError, match="timed out.*--source FILE.*--source python") as caught:
        download(server.url + "/file", tmp_path / "file", timeout=0.1)
    assert "\n" not in str(caught.value) and len(server.requests) == 3
    server.delay, server.status = 0.0, 404
    with pytest.raises(OSError, match="HTTP 404"):
        download(server.url + "/file", tmp_path / "file")
    assert len(server.requests) == 4 and os.listdir(tmp_path) == []  # no second try, nothing left
    server.status, server.breaks = None, 10**6
    (tmp_path / "file.part").write_bytes(FILE[:-1])
    with pytest.raises(OSError, match="299,999 bytes are kept, run it again"):
        download(server.url + "/file", tmp_path / "file")
    assert (tmp_path / "file.part").read_bytes() == FILE[:-1]


@pytest.mark.skipif(download_module.fcntl is None, reason="needs locks that end with their process")
def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
    with open(tmp_path / "file.part", "wb") as file:
        download_module.fcntl.flock(file, download_module.fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process"):
            download(server.url + "/file", tmp_path / "file")


def test_named_corpora_are_prepared_from_what_was_downloaded(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "DOWNLOADS", tmp_path / "downloads")
    story = "Once upon a time.<|endoftext|>\nThe end.\n<|endoftext|>\n<|endoftext|> last"
    (tmp_path / "downloads").mkdir()
    monkeypatch.setattr(prepare_module, "CORPORA", {**prepare_module.CORPORA, "tinystories": [
        (name, server.url, len(story), hashlib.sha256(story.encode()).hexdigest()) for name in ("a", "b")],
        "shakespeare": [("s.txt", server.url + "/file", len(FILE), SHA256)]})
    for name in "ab":
        (tmp_path / "downloads" / name).write_text(story)
    dataset = prepare(source="tinystories", tokenizer="byte", out_dir=tmp_path / "stories")
    assert documents(dataset, "val") == documents(dataset, "train") == ["Once upon a time.", "The end.", "last"]
    assert "pinned here" in dataset.meta["checked"]["a"]
    shakespeare = prepare(source="shakespeare", tokenizer="byte", out_dir=tmp_path / "shakespeare")
    assert text_of(shakespeare, "train") + text_of(shakespeare, "val") == FILE.decode("utf-8", "replace") or \
        shakespeare.meta["invalid_utf8_bytes_replaced"]["s.txt"] > 0
    (tmp_path / "downloads" / "s.txt").unlink()
    server.status = 503
    capsys.readouterr()
    assert main(["--source", "shakespeare", "--out_dir", str(tmp_path / "offline")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: could not download http://127.0.0.1") and error.count("\n") == 1 and "--source python" in error
    assert not (tmp_path / "offline").exists() and not list(tmp_path.glob(".*"))


def test_fineweb_reads_parquet(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["--source", "fineweb-edu", "--out_dir", str(tmp_path / "out")]) == 2
    assert "pip install pyarrow" in capsys.readouterr().err
    monkeypatch.undo()
    parquet = pytest.importorskip("pyarrow.parquet")
    texts, buffer = [f"page {i}" for i in range(300)], io.BytesIO()
    parquet.write_table(__import__("pyarrow").table({"text": texts, "id": texts}), buffer)
    monkeypatch.setattr(prepare_module, "DOWNLOADS", tmp_path)
    (tmp_path / "fineweb-edu-000.parquet").write_bytes(buffer.getvalue())
    dataset = prepare(source="fineweb-edu", tokenizer="byte", out_dir=tmp_path / "out")
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(texts)
