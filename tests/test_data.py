"""Data: which windows a step sees, prepared folders and what they refuse, and the programs that make them."""

import functools
import hashlib
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
import time
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import helpers
import tiktoken
from helpers import mistakes, raises

import data.prepare as prepare_module
import data.sampler as sampler_module
import data.sources as sources
import data.tokenizer as tokenizer_module
import options
from data.dataset import Shards, open_dataset
from data.prepare import main, prepare
from data.sampler import Turns, WindowSampler, permute, validation_windows
from data.sources import python_corpus
from data.tokenizer import END_OF_TEXT, train_bpe

PROGRAM = Path(prepare_module.__file__)
PROSE = "".join(f"Line {i}: the quick brown fox, {i * i} times over.\n" for i in range(4000))


@pytest.fixture
def refused(capsys):
    return functools.partial(helpers.refused, capsys, main)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


@pytest.fixture
def prepare_files(tmp_path):
    """The data set of files in tmp_path/source, given as {name: content}; of bytes, unless a tokenizer is given."""

    def of(files, **options):
        for name, content in files.items():
            write(tmp_path / "source" / name, content)
        source = tmp_path / "source" / name if len(files) == 1 else tmp_path / "source"
        return prepare(**dict(source=source, tokenizer="byte", out_dir=tmp_path / "out", overwrite=True) | options)

    return of


def documents(dataset, split):
    tokens = np.asarray(getattr(dataset, split))
    ends = np.flatnonzero(tokens == dataset.end_of_text)
    return [dataset.tokenizer.decode(part) for part in (tokens[start:end] for start, end in zip([0, *ends + 1], ends))]


def all_documents(dataset):
    return documents(dataset, "train") + documents(dataset, "val")


def text_of(dataset):
    return "".join(all_documents(dataset))


def validation_share(dataset):
    sizes = [dataset.meta["splits"][split]["bytes"] for split in ("train", "val")]
    return sizes[1] / sum(sizes)


def records(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


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
        assert sorted(permute(np.arange(n), n, np.uint64(key)).tolist()) == list(range(n))


def test_targets_are_the_next_tokens():
    sampler = Turns([np.arange(1000, dtype=np.uint16)], 9, seed=1)
    for step in range(100):
        inputs, targets = sampler.batch(step, 5)
        assert inputs.shape == targets.shape == (5, 9) and inputs.dtype == targets.dtype == np.int64
        assert (targets == (inputs + 1) % 1000).all()
        assert (inputs[:, 1:] == targets[:, :-1]).all()


def test_a_step_does_not_depend_on_what_was_asked_before():
    tokens = np.arange(5000)
    run = Turns([tokens], 16, seed=7)
    undisturbed = [run.batch(step, 6) for step in range(120)]  # more than two epochs
    for step in random.Random(0).sample(range(120), 40):
        resumed = Turns([tokens], 16, seed=7).batch(step, 6)
        assert (resumed[0] == undisturbed[step][0]).all() and (resumed[1] == undisturbed[step][1]).all()
    other = Turns([tokens], 16, seed=8)
    assert any((other.batch(step, 6)[0] != undisturbed[step][0]).any() for step in range(3))


@pytest.mark.parametrize("world_size, grad_accum", [(2, 1), (1, 3), (2, 3), (4, 2)])
def test_ranks_and_micro_steps_see_what_one_large_batch_sees(world_size, grad_accum):
    sampler, batch = Turns([np.arange(3000)], 11, seed=2), 3
    for step in range(60):
        whole, parts = sampler.batch(step, world_size * grad_accum * batch), []
        for micro_step, rank in np.ndindex(grad_accum, world_size):
            place = dict(rank=rank, world_size=world_size, micro_step=micro_step, grad_accum=grad_accum)
            parts.append(sampler.batch(step, batch, **place))
        for side in (0, 1):
            assert (np.concatenate([part[side] for part in parts]) == whole[side]).all()


def test_sampling_needs_no_memory_that_grows_with_the_data():
    tokens = np.broadcast_to(np.uint16(7), (10**13,))  # twenty terabytes, by a stride of zero
    tracemalloc.start()
    sampler = Turns([tokens], 1024)
    inputs, _ = sampler.batch(10**6, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (inputs == 7).all() and peak < 2 << 20


@pytest.mark.parametrize("length, block", [(0, 1), (8, 8), (5, 100)])
def test_data_shorter_than_a_block_is_refused_with_both_numbers(length, block):
    for use in (WindowSampler, lambda tokens, block: validation_windows(tokens, block, 4)):
        raises(rf"^{length} tokens .* block_size {block}\b", use, np.zeros(length, np.uint16), block)


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
    write(folder / "prose.txt", PROSE)
    prepare(source=folder / "prose.txt", vocab_size=400, out_dir=folder / "prepared")
    return folder / "prepared"


@pytest.fixture
def prepared(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "prepared")


def test_a_prepared_text_comes_back_whole(pristine):
    dataset = open_dataset(pristine, verify=True)
    assert text_of(dataset) == PROSE and dataset.vocab_size == 400 == dataset.tokenizer.vocab_size
    for split in ("train", "val"):
        entry, tokens, (text,) = dataset.meta["splits"][split], getattr(dataset, split), documents(dataset, split)
        assert tokens.dtype == np.dtype("<u2") and tokens[-1] == dataset.end_of_text
        assert (entry["tokens"], entry["documents"], entry["bytes"]) == (len(tokens), 1, len(text.encode()))
        assert entry["sha256"] == hashlib.sha256((pristine / entry["file"]).read_bytes()).hexdigest()
        nats_per_token = 2.5
        bits = nats_per_token * len(tokens) / math.log(2)
        assert dataset.bits_per_byte(nats_per_token, split) == pytest.approx(bits / len(text.encode()))
    assert 0.049 < validation_share(dataset) < 0.051 and text.startswith("Line")  # the end, from the start of a line


def test_the_same_text_gives_the_same_bytes(pristine, tmp_path):
    source = write(tmp_path / "prose.txt", PROSE)
    again = prepare(source=source, vocab_size=400, out_dir=tmp_path / "again")
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        assert (tmp_path / "again" / name).read_bytes() == (pristine / name).read_bytes()
    write(source, PROSE + "more")
    other = prepare(source=source, vocab_size=400, out_dir=tmp_path / "other")
    assert again.fingerprint == open_dataset(pristine).fingerprint != other.fingerprint
    assert re.fullmatch("[0-9a-f]{16}", again.fingerprint)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(prepared, name, refused):
    path = prepared / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if name != "meta.json":
        assert re.search(f"{name} .*SHA-256", refused("--info", prepared))
    path.write_bytes(content[:-2])
    raises(name, lambda: open_dataset(prepared, verify=False).tokenizer)
    path.unlink()
    assert (str(prepared) if name == "meta.json" else name) in refused("--info", prepared)


def damaged_metas():
    """(what is wrong, how to make it so), for everything in meta.json that is read."""
    places = [["format"], ["dtype"], ["vocab_size"], ["end_of_text"], ["splits"], ["tokenizer"], ["source"], ["notes"]]
    places += [["tokenizer", name] for name in ("name", "sha256")]
    places += [["splits", split] for split in ("train", "val")]
    places += [["splits", "val", name] for name in ("tokens", "bytes", "documents", "sha256")]
    right = {"notes": [[]], "format": [True], "source": ["\u4f60"], "name": ["\u4f60"], "sha256": ["\u4f60"]}
    for place in places:
        for value in (..., None, [], {}, -1, 1.5, True, "\u4f60", 10**30, [{}]):
            if value not in right.get(place[-1], []):
                yield place, value


def test_a_damaged_meta_json_is_one_line(prepared, refused):
    meta = json.loads((prepared / "meta.json").read_text())
    for (*above, name), value in damaged_metas():
        damaged = json.loads(json.dumps(meta))
        part = damaged
        for key in above:
            part = part[key]
        part.pop(name) if value is ... else part.update({name: value})
        (prepared / "meta.json").write_text(json.dumps(damaged))
        error = refused("--info", prepared)
        assert "meta.json is not what data/prepare.py writes; prepare the data again" in error, (above, name, value)


def test_ids_beyond_the_vocabulary_are_refused(prepared):
    tokens = np.fromfile(prepared / "val.bin", "<u2")
    tokens[3] = 400
    tokens.tofile(prepared / "val.bin")
    raises("token id 400, outside the vocabulary of 400", open_dataset, prepared)


# --- Local files ---


BOOK = "".join(f"Line {i}: the river runs under the old bridge.\n" for i in range(2000))


def test_a_folder_is_split_by_file_and_files_stay_where_they_are(prepare_files):
    names = [f"{'sub/' if i % 2 else ''}{i}.{'txt' if i % 3 else 'md'}" for i in range(800)]
    files = {name: f"document {i:03}" for i, name in enumerate(names)}
    first = prepare_files({name: files[name] for name in names[:400]}, val_fraction=0.2)
    train, val = documents(first, "train"), documents(first, "val")
    assert len(train) == 320 and len(val) == 80 and len({*train, *val}) == 400
    second = prepare_files(files, val_fraction=0.2)
    moved = set(val) & set(documents(second, "train")) | set(train) & set(documents(second, "val"))
    assert len(moved) < 20  # those next to the border


@pytest.mark.parametrize("big, small", [("a.txt", "b.txt"), ("b.txt", "a.txt")])
def test_the_split_is_by_bytes_when_one_file_is_big(prepare_files, big, small, capsys):
    note = "".join(f"Note {i} on where the text came from.\n" for i in range(60))
    dataset = prepare_files({small: note, big: BOOK})
    assert 0.049 < validation_share(dataset) < 0.051 and f"({validation_share(dataset):.1%})" in capsys.readouterr().out
    begins = next(text for text in documents(dataset, "train") if text != note)
    assert BOOK.startswith(begins) and begins.endswith("bridge.\n")  # the big file is cut after a line
    assert BOOK[len(begins) :] in documents(dataset, "val")


@pytest.mark.parametrize("count, fraction", [(1, 0.05), (2, 0.2), (3, 0.05), (7, 0.5), (20, 0.2), (90, 0.05)])
def test_equal_files_reach_the_share_that_was_asked_for(prepare_files, count, fraction):
    dataset = prepare_files({f"{i}.md": f"{i:02} " + BOOK[:3000] for i in range(count)}, val_fraction=fraction)
    assert abs(validation_share(dataset) - fraction) < 0.02 * fraction + 50 / (3003 * count)  # to the line
    assert len(text_of(dataset)) == 3003 * count and count <= len(all_documents(dataset)) <= count + 1


SPLITS = """
train.txt | val.md |
train.jsonl | validation.jsonl | test.jsonl
train.txt | test.txt | readme.md
train-0-of-2.txt train-1-of-2.txt | val_0.txt |
"""


@pytest.mark.parametrize("names", SPLITS.strip().splitlines())
def test_files_named_train_and_val_are_the_splits(prepare_files, names):
    train, val, left = map(str.split, names.split("|"))
    dataset = prepare_files({name: records([name]) if "jsonl" in name else name for name in train + val + left})
    assert (documents(dataset, "train"), documents(dataset, "val")) == (train, val)
    assert dataset.meta["notes"] == ["skipped files: 1 beside train and val"] * len(left)


def test_nothing_is_skipped_silently(prepare_files, tmp_path, capsys):
    files = {"code.py": "print('read')\n", "LICENCE": "x", "empty.txt": "", "noise.md": bytes(50), "notes.txt.gz": "x"}
    files |= {f"{i}.rst": "text that is read\n" * 20 for i in range(8)} | {f"{i}.png": "x" for i in range(8)}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "loop").symlink_to(".")
    dataset = prepare_files(files | {".git/config.txt": "hidden"})
    (line,) = dataset.meta["notes"]
    assert line == "skipped files: 1 .gz, 8 .png, 2 empty or not text, 1 without suffix"
    assert line in capsys.readouterr().out
    assert text_of(dataset).count("text that is read") == 160 and text_of(dataset).count("print") == 1


def test_folders_that_are_linked_into_the_source_are_read_once(prepare_files, tmp_path):
    """A corpus often lies on another disk. Links lead in circles, nowhere, and twice to one folder."""
    for i in range(3):
        write(tmp_path / "disk" / "books" / f"book{i}.txt", f"book {i} " * 500)
    write(tmp_path / "disk" / ".hidden" / "secret.txt", "secret")
    write(tmp_path / "source" / "z" / "own.txt", "own text " * 100)
    for link in "books ../disk, again ../disk/books, a z, z/up .., z/self self, gone.txt nowhere.txt".split(", "):
        name, target = link.split()
        (tmp_path / "source" / name).symlink_to(target)
    (tmp_path / "disk" / "back").symlink_to("../source")
    dataset = prepare_files({"one.txt": "one", "two.txt": "two"})
    texts = all_documents(dataset)
    assert sorted({text.split(" ")[0] for text in texts}) == ["book", "one", "own", "two"]
    assert text_of(dataset).count("book 1 ") == 500 and text_of(dataset).count("own") == 100
    assert dataset.meta["notes"] == ["skipped files: 2 behind a broken link"]
    files = sources.files_below(tmp_path / "source", sources.Counter())
    assert tmp_path / "source" / "z" / "own.txt" in files  # not by the link a, which sorts first


ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["d.txt", "d.md", "d.jsonl", "d.csv"])
def test_text_with_a_byte_order_mark_is_decoded(prepare_files, encoding, name):
    texts = [f"Caf\u00e9 {i} \u4f60\U0001f642." for i in range(100)]
    text = records(texts) if name == "d.jsonl" else f"\r\n{END_OF_TEXT}\r\n".join(texts)
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    dataset = prepare_files({name: (mark + text).encode(encoding)})
    if name in ("d.txt", "d.jsonl"):
        assert set(texts) - {"Caf\u00e9 95 \u4f60\U0001f642."} <= {*all_documents(dataset)}
    else:
        assert text_of(dataset) == text
    assert dataset.meta["notes"] == []


def test_any_file_name_will_do_and_default_names_of_folders_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "DATA", tmp_path / "sets")
    notes = "Notes 2024-04-24 at 12.22.20\u202fPM \u4f60"  # macOS writes a narrow no-break space
    for name in ("corpus.v1/d.md", "corpus.v2/d.md", "corpus.v3.txt", f"{notes}.txt"):
        path = write(tmp_path / name, BOOK)
        prepare(source=path.parent if "/" in name else path, tokenizer="byte")
    assert sorted(os.listdir(tmp_path / "sets")) == [notes, "corpus.v1", "corpus.v2", "corpus.v3"]
    main(["--info", str(tmp_path / "sets" / notes)])


def test_end_of_text_in_a_txt_file_divides_documents(prepare_files):
    stories = [f"Once there was a fox, number {i}.\n\nIt ran." for i in range(500)]
    text = "".join(f"{story}\n<|endoftext|>\n" for story in stories)
    dataset = prepare_files({"stories.txt": text})
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert [*train[:-1], train[-1] + val[0], *val[1:]] == stories and 0.048 < validation_share(dataset) < 0.052
    assert text_of(prepare_files({"code.py": text})) == text  # elsewhere it is text


def test_dividers_are_found_wherever_a_read_ends(tmp_path, monkeypatch):
    """By random texts against the whole text cut with a pattern; documents of nothing but white space are none."""
    rng = random.Random(4)
    for size in (*range(1, 60), 300, *[1 << 20] * 10):
        monkeypatch.setattr(sources, "PIECE", size)
        words = [END_OF_TEXT, END_OF_TEXT, "<|endof", "<", " ", "\n", "\r\n", "\t\u2003", "a", "\u4f60", "b" * 20]
        text = "".join(rng.choices(words, k=40))
        source = write(tmp_path / "d.txt", text.encode())
        found = "".join(text + "\0" * ends for text, ends in sources.read_text(source)).split("\0")
        *ended, rest = re.split(rf"\s*{re.escape(END_OF_TEXT)}\s*", text)
        assert found == [part for part in (*ended, rest) if part] + [""]


@pytest.mark.parametrize("space", [" ", "\n", "\r\n\t"])
def test_megabytes_of_white_space_take_no_time(tmp_path, space):
    text = f"one{END_OF_TEXT}" + space * 1_000_000 + f"two{END_OF_TEXT}three" + space * 1_000_000
    source, began = write(tmp_path / "d.txt", text.encode()), time.monotonic()
    found = "".join(text + "|" * ends for text, ends in sources.read_text(source)).split("|")
    assert [text.strip() for text in found] == ["one", "two", "three", ""] and time.monotonic() - began < 5


def test_records_without_text_are_no_documents_and_counted(prepare_files):
    lines = records(["one", "", "two", " "]) + '{"text": null}\n{"text": null, "id": 3}\n'
    dataset = prepare_files({"d.jsonl": lines + records(f"story {i}" for i in range(100))})
    assert len(all_documents(dataset)) == 103 and {"one", "two", " "} < {*all_documents(dataset)}
    assert dataset.meta["notes"] == ["skipped records: 1 empty, 2 null"]
    assert sum(dataset.meta["splits"][split]["documents"] for split in ("train", "val")) == 103


def test_jsonl_is_split_by_record_and_equal_records_stay_together(prepare_files):
    texts = [f"record {i % 200}" for i in range(400)] + ["caf\u00e9 \ud800 \U0001f642"]
    dataset = prepare_files({"d.jsonl": records(texts).replace("\n", "\n\n")}, val_fraction=0.2)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == sorted(text.replace("\ud800", "\ufffd") for text in texts)
    assert not set(train) & set(val) and len(val) > 20


@pytest.mark.parametrize("piece", [1 << 20, 20])
def test_invalid_utf8_is_replaced_and_counted(prepare_files, monkeypatch, piece):
    monkeypatch.setattr(sources, "PIECE", piece)
    dataset = prepare_files({"d.txt": b"\xef\xbb\xbf" + b"good \xff\xfe bad \xc3\xa9 \xef\xbf\xbd end\r\n" * 10})
    assert text_of(dataset) == "good \ufffd\ufffd bad \u00e9 \ufffd end\r\n" * 10
    assert dataset.meta["notes"] == ["30 U+FFFD, which replace what is no UTF-8"]
    cut = prepare_files({"d.txt": ("word " * 100).encode("utf-16") + b"x"})  # within a character
    assert text_of(cut) == "word " * 100 + "\ufffd"


@pytest.mark.parametrize("text", ["word " * 30_000, "x" * 150_000, "\u4f60\U0001f642" * 30_000, "\n" * 100_000, "ab"])
def test_pieces_and_the_cut_lose_nothing(prepare_files, monkeypatch, text):
    monkeypatch.setattr(sources, "PIECE", 1 << 12)
    assert text_of(prepare_files({"d.txt": text}, val_fraction=0.1)) == text


UNITS = {"lines.txt": "some words and a number 12345\n", "one.txt": "letters", "d.jsonl": '{"text": "%d %s"}\n'}


@pytest.mark.parametrize("name, unit", UNITS.items())
def test_a_file_larger_than_memory_streams(tmp_path, monkeypatch, name, unit):
    """With pieces of 32 KiB, a text of 6 MB passes through less than 3 MB of memory."""
    monkeypatch.setattr(sources, "PIECE", 1 << 15)
    monkeypatch.setattr(prepare_module, "PIECE", 1 << 15)
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", 1 << 16)
    with open(tmp_path / name, "w") as file:
        for i in range(60):
            file.write(unit % (i, "words " * 16_000) if "%" in unit else unit * (100_000 // len(unit)))
    tracemalloc.start()
    try:
        corpus = sources.local_corpus(tmp_path / name, 0.05, 0)
        prepare_module.write_tokens(corpus, train_bpe(prepare_module.tokenizer_text(corpus), 300), tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [10, 2000])  # of a text: short, or longer than the sample
def test_the_tokenizer_learns_from_a_sample_of_the_training_side_spread_over_all_of_it(monkeypatch, length):
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", 1000)
    count = 100_000 // length
    texts = lambda: (("val" if i % 10 == 9 else "train", f"{i:0{length}}", True) for i in range(count))
    sample = [int(text) for text in prepare_module.tokenizer_text(sources.Corpus(texts, 100_000))]
    assert 800 <= len(sample) * length <= 1000 + length and all(i % 10 < 9 for i in sample)
    assert length > 10 or sample[0] < 200 and sample[-1] > 9800 and max(np.diff(sample)) < 200


def use_as_gpt2(monkeypatch, first, end):
    """tiktoken's gpt2 without its files: the bytes have the ids from `first` on."""
    ranks = {bytes([i]): first + i for i in range(256)}
    encoding = tiktoken.Encoding("gpt2", pat_str=".", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


def test_vocabularies_above_65536_are_written_as_uint32(prepare_files, monkeypatch):
    use_as_gpt2(monkeypatch, 99_000, 100_000)
    dataset = prepare_files({"d.txt": "hello " * 100}, tokenizer="gpt2")
    assert dataset.meta["dtype"] == "uint32" and dataset.train.dtype == np.dtype("<u4")
    assert dataset.train.max() == 100_000 and text_of(dataset) == "hello " * 100


# --- The text that comes with Python ---


REPEATED = "This paragraph is longer than sixty characters and stands in every module."


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library of our own."""
    root, licence = tmp_path / "lib", "# Copyright 1999 by Somebody.\n# Licensed under terms.\n\n"
    for i in range(40):
        function = f'def function_{i}(argument, other=None):\n    """What function {i} does with words {i * 7}."""\n'
        text = f'#!/usr/bin/env python\n{licence}"""Module number {i}.\n\n{REPEATED}\n"""\n\n'
        write(root / f"module_{i}.py", text + f"{function}    return argument * {i}\n\n" * 3)
    write(root / "twin.py", (root / "module_3.py").read_text())
    table = "TABLE = {\n" + "".join(f"    {i}: 'row',\n" for i in range(200)) + "}\n\n"
    write(root / "table.py", table + "def keep():\n    return 'kept'\n\n" * 20)
    write(root / "broken.py", "def (:\n" * 60)
    for name in ("test/a", "json/tests/t", "site-packages/p", "lib2to3/f", "encodings/cp1", "_sysconfigdata_x"):
        write(root / f"{name}.py", "SKIPPED = 'a module'\n" * 30)
    paths = dict(sysconfig.get_paths(), stdlib=str(root))
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *_: paths[name])
    short = "What a statement is" + ", and what it is not" * 10
    topics = {"statements": f"{short}\n\n" + "There are many of them. " * 10, "statement": short}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", types.SimpleNamespace(topics=topics))
    return root


def test_library_sources_are_cleaned_and_skipped_as_promised(library):
    texts = [text for _, text, _ in python_corpus(0.05, 0).documents()]
    everything = "\n".join(texts)
    assert len(texts) == 43 and len(set(texts)) == 43  # forty modules, the table's, two topics; one twin
    assert everything.count("What a statement is") == 1  # the long topic repeats the short one
    assert not any(gone in everything for gone in ("SKIPPED", "Copyright", "#!", "'row'"))
    assert "kept" in everything and '"""Module number 7.' in everything and everything.count(REPEATED) == 40


def test_a_module_is_on_the_same_side_whatever_else_there_is(library):
    def sides():
        texts = [(split, text) for split, text, _ in python_corpus(0.3, 0).documents()]
        return {int(match[1]): split for split, text in texts if (match := re.search(r"function_(\d+)\(arg", text))}

    before = sides()
    assert set(before.values()) == {"train", "val"}
    for i in range(4, 40, 2):
        (library / f"module_{i}.py").unlink()
    assert sides() == {i: side for i, side in before.items() if i < 4 or i % 2}


def test_the_real_library_makes_a_data_set(tmp_path):
    dataset = prepare(tokenizer="byte", out_dir=tmp_path / "python")
    assert dataset.meta["source"] == "python" and "class PurePath" in text_of(dataset)
    assert len(text_of(dataset)) > 5_000_000 and 0.01 < validation_share(dataset) < 0.15
    main(["--info", str(tmp_path / "python")])


# --- Nothing lost, nothing half there ---


def during(monkeypatch, happens):
    """Let `happens()` take place once while a data set is prepared, just before it is complete."""
    write_atomically, waiting = prepare_module.write_atomically, [happens]

    def writing(path, text):
        write_atomically(path, text)
        if waiting:
            waiting.pop()()

    monkeypatch.setattr(prepare_module, "write_atomically", writing)


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_programs_that_prepare_one_data_set_the_second_takes_what_is_there(tmp_path, monkeypatch, overwrite):
    source, inodes = write(tmp_path / "d.txt", PROSE), []
    how = dict(source=source, tokenizer="byte", out_dir=tmp_path / "out", overwrite=overwrite)

    def other():
        prepare(**how)
        inodes.append((tmp_path / "out").stat().st_ino)

    during(monkeypatch, other)
    assert text_of(prepare(**how)) == PROSE
    assert (inodes[0] == (tmp_path / "out").stat().st_ino) == (not overwrite)
    assert sorted(os.listdir(tmp_path)) == ["d.txt", "out"]


def test_two_programs_with_different_data_do_not_mix(tmp_path, monkeypatch, refused):
    source, other = write(tmp_path / "d.txt", PROSE), write(tmp_path / "e.txt", BOOK)
    out = ["--tokenizer", "byte", "--out_dir", tmp_path / "out", "--source"]
    during(monkeypatch, lambda: prepare(source=other, tokenizer="byte", out_dir=tmp_path / "out", info=None))
    monkeypatch.setattr(prepare_module, "say", lambda text: None)
    assert "another program has put another data set there" in refused(*out, source)
    assert text_of(open_dataset(tmp_path / "out", verify=True)) == BOOK
    assert sorted(os.listdir(tmp_path)) == ["d.txt", "e.txt", "out"]


def test_two_terminals_at_once(tmp_path):
    source = write(tmp_path / "d.txt", PROSE)
    command = [sys.executable, PROGRAM, "--source", source, "--vocab_size", "300", "--out_dir", tmp_path / "out"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.wait(), process.communicate()[1]) for process in both]
    late = "holds a data set; add --overwrite"  # one of them may have begun when the other was through
    assert all(code == 0 or late in error for code, error in ends) and (0, "") in ends
    assert text_of(open_dataset(tmp_path / "out", verify=True)) == PROSE
    assert sorted(os.listdir(tmp_path)) == ["d.txt", "out"]


@pytest.mark.parametrize("why", ["is in use and stays as it is", "No space left", "is not what data/prepare.py"])
def test_a_failure_on_the_way_leaves_the_old_data_set_and_nothing_else(prepared, monkeypatch, tmp_path, refused, why):
    """A folder in use, as on Windows; a full disk; a nonsense that the reader refuses: it is not published."""
    write(tmp_path / "d.txt", PROSE)
    before, rename = {path.name: path.read_bytes() for path in prepared.iterdir()}, Path.rename
    write_atomically = prepare_module.write_atomically

    def renamed(path, target):
        if path == prepared and "in use" in why:
            raise PermissionError(13, "Access is denied", str(path))
        return rename(path, target)

    def written(path, text):
        if "space" in why:
            raise OSError(28, "No space left on device")
        write_atomically(path, "{}" if "is not" in why else text)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(prepare_module, "write_atomically", written)
    assert why in refused("--source", tmp_path / "d.txt", "--out_dir", prepared, "--overwrite --tokenizer byte")
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["d.txt", "prepared"]


def test_files_in_use_on_windows_stay_behind_and_that_is_said(prepared, tmp_path, monkeypatch, capsys):
    unlink = os.unlink

    def keeping(path, **how):
        if Path(path).name == "train.bin":
            raise PermissionError(32, "The process cannot access the file", str(path))
        return unlink(path, **how)

    monkeypatch.setattr(os, "unlink", keeping)
    source = write(tmp_path / "d.txt", BOOK)
    main([*map(str, ["--source", source, "--tokenizer", "byte", "--out_dir", prepared, "--overwrite"])])
    assert text_of(open_dataset(prepared, verify=True)) == BOOK
    assert "the old data set is in use; remove it when it is not" in capsys.readouterr().out


def test_a_killed_run_leaves_no_data_set_and_the_next_run_cleans_up(tmp_path):
    """What a program that runs, or one of another machine, prepares is left alone."""
    write(tmp_path / "d.txt", PROSE * 30)
    command = [sys.executable, PROGRAM, "--source", tmp_path / "d.txt", "--out_dir", tmp_path / "out"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not [*tmp_path.glob(".out.*")]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    begin = f".out.{prepare_module.platform.node()}"
    running = [f"{begin}-{os.getppid()}-00", ".out.elsewhere-1-0"]
    for name in (*running, f"{begin}-99999999-00", f"{begin}-99999998-00.old"):
        write(tmp_path / name / "train.bin", "tokens")
    prepare(source=write(tmp_path / "small.txt", PROSE[:2000]), out_dir=tmp_path / "out", tokenizer="byte")
    assert sorted(os.listdir(tmp_path)) == sorted(["d.txt", "out", "small.txt", *running])
    open_dataset(tmp_path / "out", verify=True)


# --- Bad input ---


@mistakes("""
--nonsense => unrecognized arguments: --nonsense
--vocab_size 256 => vocab_size must be at least 257 and at most 1048576, not 256
--source no/such/file.txt => no/such/file.txt: neither python, shakespeare
--tokenizer gpt9 => no tokenizer 'gpt9'
--tokenizer hf:nowhere => nowhere
--vocab_size 512 --tokenizer byte => --vocab_size is for --tokenizer bpe
--shards 3 => --shards is for --source fineweb-edu
--source fineweb-edu --shards 15 => shards must be at least 1 and at most 14
--val_fraction nan => val_fraction must be above 0 and at most 0.5, not nan
--info nowhere => no data set at nowhere: make one with python data/prepare.py --out_dir nowhere
""")
def test_bad_input_is_one_line_and_exit_code_2(given, why, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert why in refused(given, "--out_dir", "out")
    assert os.listdir(tmp_path) == []


def test_folders_that_are_in_the_way_are_refused_and_untouched(prepared, tmp_path, refused):
    thesis = write(tmp_path / "thesis" / "chapter.doc", "years of work")
    source = ["--source", write(tmp_path / "d.txt", PROSE[:2000]), "--out_dir"]
    for out in (tmp_path / "thesis", tmp_path / "d.txt"):
        assert "not a prepared data set" in refused(*source, out, "--overwrite")
    assert "--overwrite" in refused(*source, prepared)
    write(prepared / "notes.md", "mine")
    assert "holds 'notes.md' beside the data set; move it" in refused(*source, prepared, "--overwrite")
    assert thesis.read_text() == "years of work"
    open_dataset(prepared, verify=True)


@pytest.mark.parametrize("module", [prepare_module, sampler_module, tokenizer_module])
def test_programs_run_alone_from_anywhere(module, tmp_path):
    command = [sys.executable, module.__file__, *(["--help"] if module is prepare_module else [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr


def test_data_does_not_import_torch():
    code = "import sys; import data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent.parent).returncode == 0


# --- Token files that exist ---


def shard(tokens, magic=20240520, version=1, count=None, dtype="<u2"):
    """A file as llm.c and modded-nanogpt write it."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, dtype).tobytes()


IDS = np.random.default_rng(0).integers(0, 256, 5000)
IDS[::50] = 256  # the byte tokenizer's end of text
LLAMA3 = dict(magic=20240801, version=7, dtype="<u4")
PLAIN = {"train.bin": IDS[:4000].astype("<u2").tobytes(), "val.bin": IDS[4000:].astype("<u2").tobytes()}


def test_nanogpt_s_files_are_read_in_place_to_the_same_tokens(prepare_files, tmp_path, refused):
    dataset, source = prepare_files(PLAIN), tmp_path / "source"
    theirs = np.memmap(source / "train.bin", dtype=np.uint16, mode="r")  # as nanoGPT's train.py reads
    assert (dataset.train == theirs).all() and (dataset.val == IDS[4000:]).all()
    assert os.path.samefile(tmp_path / "out" / "train.bin", source / "train.bin")
    entry = dataset.meta["splits"]["train"]
    assert entry["documents"] == 80 and entry["bytes"] == 4000 - 80 and entry["tokens"] == 4000
    assert dataset.bits_per_byte(1.0) == pytest.approx(1000 / 980 / math.log(2))
    main(["--info", str(tmp_path / "out")])
    shutil.move(source, tmp_path / "elsewhere")
    assert "which is gone" in refused("--info", tmp_path / "out")


@pytest.mark.parametrize("cuts, kind", [([4000], {}), ([1, 2, 3, 1000, 2500, 4000], {}), ([1999, 4000], LLAMA3)])
def test_several_shards_are_one_stream(prepare_files, tmp_path, cuts, kind):
    files = {f"fineweb_train_{i:06}.bin": shard(IDS[a:b], **kind) for i, (a, b) in enumerate(zip([0, *cuts], cuts))}
    prepare_files(files | {"fineweb_val_000000.bin": shard(IDS[4000:], **kind)})
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert len(dataset.train) == 4000 and (dataset.train[:] == IDS[:4000]).all()
    for block in (1, 7, 64, 3999):
        ours, theirs = (Turns([tokens], block, seed=3) for tokens in (dataset.train, IDS[:4000]))
        for step in range(20):
            for one, other in zip(ours.batch(step, 4), theirs.batch(step, 4)):
                assert one.dtype == other.dtype and (one == other).all()
        for one, other in zip(validation_windows(dataset.train, block, 9), validation_windows(IDS[:4000], block, 9)):
            assert (one == other).all()
    for name, content in PLAIN.items():
        write(tmp_path / "plain" / name, content)
    plain = prepare(source=tmp_path / "plain", tokenizer="byte", out_dir=tmp_path / "of_plain")
    assert (plain.fingerprint == dataset.fingerprint) == (dataset.meta["dtype"] == "uint16")


def test_shards_slice_as_one_array():
    whole, rng = np.arange(100, dtype=np.uint16), random.Random(0)
    arrays = [whole[:1], whole[1:40], whole[40:41], whole[41:]]
    shards = Shards([*map(len, arrays)], whole.dtype, arrays.__getitem__)
    assert len(shards) == 100 and shards.nbytes == 200 and (shards[:] == whole).all()
    for _ in range(500):
        piece = slice(*(rng.choice([None, *range(-110, 110)]) for _ in range(2)))
        assert (shards[piece] == whole[piece]).all() and len(shards[piece]) == len(whole[piece])


def test_token_files_are_gpt_2_s_unless_said_otherwise(prepare_files, monkeypatch):
    use_as_gpt2(monkeypatch, 0, 50256)
    names = ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin")
    dataset = prepare_files(dict.fromkeys(names, shard(np.where(IDS == 256, 50256, IDS))), tokenizer=None)
    assert dataset.meta["tokenizer"]["name"] == "gpt2" and dataset.vocab_size == 50257
    assert dataset.meta["splits"]["train"]["documents"] == 200


def test_more_shards_than_files_may_be_open(prepare_files, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = {f"a_train_{i:05}.bin": shard(IDS[i * 8 : i * 8 + 8]) for i in range(600)} | {"a_val_0.bin": shard(IDS)}
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        dataset = prepare_files(files)
        tokens = open_dataset(tmp_path / "out", verify=True).train
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tokens[:] == IDS[:4800]).all() and (tokens[1000:1030] == IDS[1000:1030]).all()
    assert dataset.fingerprint == open_dataset(tmp_path / "out").fingerprint


@pytest.mark.parametrize("refusing", [["symlink"], ["symlink", "link"]])
def test_token_files_are_linked_or_copied_as_the_system_allows(prepare_files, tmp_path, monkeypatch, refusing):
    def refuse(*_, **__):
        raise OSError(1314, "A required privilege is not held by the client")

    for name in refusing:
        monkeypatch.setattr(os, name, refuse)
    dataset = prepare_files(PLAIN)
    assert (dataset.train == IDS[:4000]).all() and not (tmp_path / "out" / "train.bin").is_symlink()
    linked = os.path.samefile(tmp_path / "out" / "train.bin", tmp_path / "source" / "train.bin")
    assert linked == (refusing == ["symlink"])
    (note,) = dataset.meta["notes"]
    assert ("shared with" if linked else "copied") in note
    shutil.rmtree(tmp_path / "source")
    assert text_of(open_dataset(tmp_path / "out", verify=True))


def test_a_changed_shard_is_refused(prepare_files, tmp_path):
    prepare_files(dict.fromkeys(("a_train_0.bin", "a_train_1.bin", "a_val_0.bin"), shard(IDS)))
    for content, why in ((shard(IDS[::-1]), "SHA-256"), (shard(IDS[1:]), "truncated or changed")):
        write(tmp_path / "source" / "a_train_1.bin", content)
        raises(why, open_dataset, tmp_path / "out")


def test_a_pickle_beside_token_files_is_not_opened(prepare_files, tmp_path, refused):
    files = PLAIN | {"meta.pkl": b"cos\nsystem\n(S'touch opened'\ntR."}
    assert prepare_files(files).tokenizer.name == "byte" and not Path("opened").exists()
    for more in ([], ["--tokenizer", "bpe"]):
        out = ["--source", tmp_path / "source", "--out_dir", tmp_path / "new", *more]
        assert "name their vocabulary, --tokenizer gpt2 for example (no pickle is opened)" in refused(*out)


# --- Downloads ---


def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch, refused):
    there, kept = write(tmp_path / "there.txt", PROSE), tmp_path / "downloads" / "shakespeare.txt"
    monkeypatch.setattr(sources, "DOWNLOADS", kept.parent)
    monkeypatch.setattr(sources, "SHAKESPEARE", ((tmp_path / "gone").as_uri(), ""))
    arguments = ["--source", "shakespeare", "--tokenizer", "byte", "--out_dir", tmp_path / "out", "--overwrite"]
    error = refused(*arguments)
    assert error.startswith("error: could not download file://") and "--source python" in error
    assert os.listdir(tmp_path) == ["there.txt"]
    monkeypatch.setattr(sources, "SHAKESPEARE", (there.as_uri(), hashlib.sha256(PROSE.encode()).hexdigest()))
    for _ in range(2):
        main([*map(str, arguments)])
        assert text_of(open_dataset(tmp_path / "out")) == PROSE
        there.unlink(missing_ok=True)
    write(kept, PROSE[1:])
    assert "is not the expected file: remove it" in refused(*arguments)


def hub(monkeypatch, tmp_path, content):
    """A stand-in for huggingface_hub, without a network; returns the list of what it is asked for."""
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "downloads")
    asked = []

    def hf_hub_download(repository, file, *, repo_type, revision, local_dir):
        asked.append((repository, file))
        assert repo_type == "dataset" and re.fullmatch("[0-9a-f]{40}", revision)
        if content is None:
            raise RuntimeError("no route\nto host")
        return write(local_dir / file, content)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    return asked


def test_corpora_of_the_hub_come_through_its_library(tmp_path, monkeypatch, refused):
    asked = hub(monkeypatch, tmp_path, "Once upon a time.<|endoftext|>\nThe end.\n<|endoftext|>\n<|endoftext|> last")
    dataset = prepare(source="tinystories", tokenizer="byte", out_dir=tmp_path / "out")
    assert documents(dataset, "val") == documents(dataset, "train") == ["Once upon a time.", "The end.", "last"]
    files = ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"]
    assert asked == [("roneneldan/TinyStories", file) for file in files]
    hub(monkeypatch, tmp_path, None)
    error = refused("--source", "tinystories", "--out_dir", tmp_path / "new")
    assert "could not download TinyStoriesV2-GPT4-train.txt" in error and "(no route to host)" in error
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused("--source", "tinystories", "--out_dir", tmp_path / "new")


def test_fineweb_reads_parquet(tmp_path, monkeypatch, refused):
    texts = [f"page {i}" for i in range(300)]
    asked = hub(monkeypatch, tmp_path, parquet_bytes(text=texts, id=texts))
    dataset = prepare(source="fineweb-edu", tokenizer="byte", out_dir=tmp_path / "out")
    assert sorted(all_documents(dataset)) == sorted(texts)
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample/10BT/000_00000.parquet")]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source in ("fineweb-edu", tmp_path / "downloads"):
        assert "pip install pyarrow" in refused("--source", source, "--out_dir", tmp_path / "new")
    assert len(asked) == 1  # refused before the download


TEXTS = [f"Report {i} is about the number {i * i}." for i in range(300)]


def parquet_bytes(**columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet_rows_without_text_are_skipped_and_counted(prepare_files, kind):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [*TEXTS, None, "", None]
    column = pyarrow.array(rows)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    dataset = prepare_files({"d.parquet": parquet_bytes(id=list(range(303)), text=column)})
    assert sorted(all_documents(dataset)) == sorted(TEXTS)
    assert dataset.meta["notes"] == ["skipped records: 1 empty, 2 null"]


# --- Sources that cannot be used ---


VAL, GOOD = {"val_0.bin": shard(IDS)}, {"good.parquet": lambda: parquet_bytes(text=TEXTS)}
NO_OBJECT = 'd.jsonl, line 3: not a JSON object with a string in "text"'
damaged = lambda raw: raw[:4] + bytes(900) + raw[904:]
DEEP = "[" * 200_000 + "]" * 200_000
BAD = ["{", "3", '{"text": 3}', '{"tex": "a"}', DEEP, f'{{"text": {DEEP}}}', '{"text": ["a"]}', '["text"]', "1" * 9999]
REFUSED = [  # why, and the files of the source
    ("no text in .txt, .md, .rst, .py, .jsonl, .parquet files there (1 empty or not text)", {"picture.png": bytes(9)}),
    ("1 empty or not text", {"d.txt": "a text without a mark\n".encode("utf-16-le") * 50}),
    ("1 empty or not text", {"d.md": ""}),
    ("no text for train.bin: use more text", {"d.jsonl": '{"text": ""}\n'}),
    ("no text for val.bin: use more text, another --val_fraction", {"d.jsonl": '{"text": "one record"}\n'}),
    *((NO_OBJECT, {"d.jsonl": f'{{"text": "good"}}\n\n{line}\n'}) for line in BAD),
    ("none for val", {"train_0.bin": shard(IDS)}),
    ("train_0.bin has 11022 bytes where 11024 are expected", {"train_0.bin": shard(IDS)[:-2]} | VAL),
    ("train_0.bin", {"train_0.bin": shard(IDS, count=-1)} | VAL),
    ("holds token id 300, outside the vocabulary of 257", {"train_0.bin": shard([1, 300])} | VAL),
    ("train_0.bin has 1028 bytes", {"train_0.bin": shard([1], **LLAMA3)} | VAL),
    ("train_0.bin has 3 bytes", {"train_0.bin": b"abc", "val_0.bin": b"abcd"}),
    ("train_0.bin has 0 bytes", {"train_0.bin": b"", "val_0.bin": b"abcd"}),
    ("nothing but end-of-text tokens", {"train_0.bin": shard([256] * 9)} | VAL),
    ('d.parquet: column "text" holds int64, not strings', {"d.parquet": lambda: parquet_bytes(text=[1, 2])} | GOOD),
    ('d.parquet: column "text" holds struct<', {"d.parquet": lambda: parquet_bytes(text=[{"body": "a"}])} | GOOD),
    ('d.parquet: column "text" holds list<', {"d.parquet": lambda: parquet_bytes(text=[["a"]])} | GOOD),
    ('d.parquet has no column "text", only id', {"d.parquet": lambda: parquet_bytes(id=TEXTS)} | GOOD),
    ("d.parquet cannot be read as parquet", {"d.parquet": lambda: parquet_bytes(text=TEXTS)[:-20]} | GOOD),
    ("d.parquet cannot be read as parquet", {"d.parquet": b"PAR1, but no parquet"} | GOOD),
    ("d.parquet is damaged", {"d.parquet": lambda: damaged(parquet_bytes(text=TEXTS))} | GOOD),
    ("no text for train.bin", {"d.parquet": lambda: parquet_bytes(text=[None] * 300)}),
]


@pytest.mark.parametrize("why, files", REFUSED)
def test_a_source_that_cannot_be_used_is_refused(tmp_path, refused, why, files):
    for name, content in files.items():
        path = write(tmp_path / "source" / name, content() if callable(content) else content)
    source = path if len(files) == 1 and path.suffix != ".bin" else path.parent
    assert why in refused("--source", source, "--tokenizer", "byte", "--out_dir", tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


# --- Progress ---


def test_a_closed_standard_error_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    for module in ("tqdm as it is", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
        bar = options.progress("encoding", 1000)
        bar.said = -10
        bar.update(100)
        bar.close()
    assert capsys.readouterr().out == ""


def test_work_without_tqdm_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    now = iter(range(0, 100))
    monkeypatch.setattr(options.time, "monotonic", lambda: next(now))
    bar = options.progress("encoding", 1000)
    for _ in range(10):
        bar.update(100)
    bar.close()
    said = capsys.readouterr().err.splitlines()
    assert 2 <= len(said) < 10 and all(re.fullmatch(r"encoding: \d+%", line) for line in said)
