"""Data: which windows a step sees, prepared folders and what they refuse, and the programs that make them."""

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
import tiktoken

import data.dataset as dataset_module
import data.prepare as prepare_module
import data.sources as sources
import data.tokenizer as tokenizer_module
from data.dataset import Shards, WindowSampler, open_dataset, validation_windows
from data.prepare import main, prepare
from data.sources import download, python_corpus
from data.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

PROGRAM = Path(prepare_module.__file__)
PROSE = "".join(f"Line {i}: the quick brown fox, {i * i} times over.\n" for i in range(4000))


def refused(capsys, *arguments):
    """The one line that a command ends with, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and not out
    return lines[0]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


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
        whole, parts = sampler.batch(step, world_size * grad_accum * batch), []
        for micro_step, rank in np.ndindex(grad_accum, world_size):
            place = dict(rank=rank, world_size=world_size, micro_step=micro_step, grad_accum=grad_accum)
            parts.append(sampler.batch(step, batch, **place))
        for side in (0, 1):
            assert (np.concatenate([part[side] for part in parts]) == whole[side]).all()


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
    for use in (WindowSampler, lambda tokens, block: validation_windows(tokens, block, 4)):
        with pytest.raises(ValueError, match=rf"^{length} tokens .* block_size {block}\b"):
            use(np.zeros(length, np.uint16), block)


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
        open_dataset(prepared, verify=True).tokenizer
    assert "SHA-256" in refused(capsys, "--info", prepared)


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


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.clear(),
        lambda meta: meta.update(format=2),
        lambda meta: meta.update(dtype="uint8"),
        lambda meta: meta.update(vocab_size=1 << 17),
        lambda meta: meta.update(end_of_text=400),
        lambda meta: meta.update(source=None),
        lambda meta: meta["splits"].pop("val"),
        lambda meta: meta["splits"]["train"].update(tokens="many"),
        lambda meta: meta["splits"]["train"].update(shards=[1, 2]),
        lambda meta: meta["tokenizer"].pop("sha256"),
    ],
)
def test_a_meta_that_prepare_did_not_write_is_refused(prepared, change):
    meta = json.loads((prepared / "meta.json").read_text())
    change(meta)
    (prepared / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="meta.json is not what data/prepare.py writes; prepare the data again"):
        open_dataset(prepared)


# --- Sources ---


def documents(dataset, split):
    tokens = np.asarray(getattr(dataset, split))
    ends = np.flatnonzero(tokens == dataset.end_of_text)
    return [dataset.tokenizer.decode(part) for part in (tokens[start:end] for start, end in zip([0, *ends + 1], ends))]


def notes(dataset):
    return "\n".join(dataset.meta.get("notes", []))


def share(dataset):
    sizes = [dataset.meta["splits"][split]["bytes"] for split in ("train", "val")]
    return sizes[1] / sum(sizes)


def test_a_folder_is_split_by_file_and_files_stay_where_they_are(tmp_path):
    source = tmp_path / "source"
    for i in range(400):
        write(source / f"{'sub/' if i % 2 else ''}{i}.{'txt' if i % 3 else 'md'}", f"document {i:03}")
    first = prepare(source=source, tokenizer="byte", out_dir=tmp_path / "a", val_fraction=0.2)
    train, val = documents(first, "train"), documents(first, "val")
    assert len(train) == 320 and len(val) == 80 and len({*train, *val}) == 400
    for i in range(400, 800):
        write(source / f"{i}.txt", f"document {i:03}")
    second = prepare(source=source, tokenizer="byte", out_dir=tmp_path / "b", val_fraction=0.2)
    moved = set(val) & set(documents(second, "train")) | set(train) & set(documents(second, "val"))
    assert len(moved) < 20  # those next to the border


BOOK = "".join(f"Line {i}: the river runs under the old bridge.\n" for i in range(2000))


@pytest.mark.parametrize("big, small", [("a.txt", "b.txt"), ("b.txt", "a.txt"), ("a.txt", "b.jsonl")])
def test_the_split_is_by_bytes_when_one_file_is_big(tmp_path, big, small, capsys):
    note = "".join(f"Note {i} on where the text came from.\n" for i in range(60))
    write(tmp_path / "source" / small, json.dumps({"text": note}) if small.endswith("jsonl") else note)
    write(tmp_path / "source" / big, BOOK)
    dataset = prepare(source=tmp_path / "source", tokenizer="byte", out_dir=tmp_path / "out")
    assert 0.049 < share(dataset) < 0.051 and f"({share(dataset):.1%})" in capsys.readouterr().out
    begins = next(text for text in documents(dataset, "train") if text != note)
    assert BOOK.startswith(begins) and begins.endswith("bridge.\n")  # the big file is cut after a line
    assert BOOK[len(begins) :] in documents(dataset, "val")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 90])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_equal_files_reach_the_share_that_was_asked_for(tmp_path, count, fraction):
    for i in range(count):
        write(tmp_path / "source" / f"{i}.md", f"{i:02} " + BOOK[:3000])
    dataset = prepare(source=tmp_path / "source", tokenizer="byte", out_dir=tmp_path / "out", val_fraction=fraction)
    assert abs(share(dataset) - fraction) < 0.02 * fraction + 50 / (3003 * count)  # to the line
    texts = documents(dataset, "train") + documents(dataset, "val")
    assert sum(map(len, texts)) == 3003 * count and count <= len(texts) <= count + 1


@pytest.mark.parametrize("records", [2, 3, 5, 400])
def test_records_are_split_by_bytes_and_a_few_long_ones_are_cut(tmp_path, records):
    texts = [f"Record {i}. " + BOOK[: 200_000 // records] for i in range(records)]
    write(tmp_path / "d.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    for seed in range(5):
        how = dict(tokenizer="byte", seed=seed, overwrite=True)
        dataset = prepare(source=tmp_path / "d.jsonl", out_dir=tmp_path / "out", **how)
        assert 0.037 < share(dataset) < 0.063
        assert len("".join(documents(dataset, "train") + documents(dataset, "val"))) == len("".join(texts))


SPLITS = """
train.txt | val.md |
train.jsonl | validation.jsonl | test.jsonl
train.txt | test.txt | readme.md
corpus.txt more.txt | valid.txt |
train-0-of-2.txt train-1-of-2.txt | val_0.txt |
"""


@pytest.mark.parametrize("names", SPLITS.strip().splitlines())
def test_files_named_train_and_val_are_the_splits(tmp_path, names):
    train, val, left = map(str.split, names.split("|"))
    for name in train + val + left:
        write(tmp_path / "source" / name, json.dumps({"text": name}) + "\n" if name.endswith("jsonl") else name)
    dataset = prepare(source=tmp_path / "source", tokenizer="byte", out_dir=tmp_path / "out")
    assert (documents(dataset, "train"), documents(dataset, "val")) == (train, val)
    assert all(name in notes(dataset) for name in left) and ("beside train and val" in notes(dataset)) == bool(left)


def test_a_test_file_among_notes_is_text_like_any_other(tmp_path):
    for name in ("test.py", "validators.py", "value.txt", "training.md", *(f"{i}.txt" for i in range(30))):
        write(tmp_path / "source" / name, f"{name} " * 100)
    dataset = prepare(source=tmp_path / "source", tokenizer="byte", out_dir=tmp_path / "out", val_fraction=0.2)
    assert 0.15 < share(dataset) < 0.25 and len(documents(dataset, "train") + documents(dataset, "val")) >= 34


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_byte_order_marks_say_the_encoding(tmp_path, encoding, suffix):
    lines = [f"Line {i}: caf\u00e9 \u4f60\u597d \U0001f642 once more.\n" for i in range(1200)]
    records = [json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines]
    text = "".join(records if suffix == "jsonl" else lines)
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    source = write(tmp_path / f"d.{suffix}", mark + text.encode(encoding))
    dataset = prepare(source=source, tokenizer="byte", out_dir=tmp_path / "out")
    assert 0.037 < share(dataset) < 0.063  # of the text, whatever its bytes in the file
    if suffix == "jsonl":
        assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(lines)
    else:
        assert text_of(dataset, "train") + text_of(dataset, "val") == text
    assert ("decoded from UTF-16: 1 file" in notes(dataset)) == encoding.startswith("utf-16")


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("d.txt", "a text without a mark\n".encode("utf-16-le") * 50, "UTF-16 without a byte order mark (iconv"),
        ("d.txt", b"\x7fELF" + bytes(3000), "binary"),
        ("d.txt.gz", b"anything", "compressed: unpack it first"),
        ("d.md", b"", "empty"),
        ("weights.bin", np.arange(9000, dtype=np.uint16).tobytes(), ".bin"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, capsys, name, content, why):
    source = write(tmp_path / "source" / name, content)
    for given in (source, source.parent):
        error = refused(capsys, "--source", given, "--tokenizer", "byte", "--out_dir", tmp_path / "out")
        assert name in error and why in error
    assert os.listdir(tmp_path) == ["source"]


def test_nothing_is_skipped_silently(tmp_path, capsys):
    source = tmp_path / "source"
    for i in range(8):
        write(source / f"{i}.rst", "text that is read\n" * 20)
        write(source / f"picture{i}.png", b"x")
    write(source / "code.py", "print('read')\n")
    for name, content in (("empty.txt", b""), ("noise.md", bytes(50)), ("notes.txt.gz", b"x"), ("LICENCE", b"x")):
        write(source / name, content)
    write(source / ".git" / "config.txt", "hidden")
    (source / "gone.txt").symlink_to("nowhere")
    dataset = prepare(source=source, tokenizer="byte", out_dir=tmp_path / "out")
    (line,) = dataset.meta["notes"]
    assert line.startswith("skipped: ") and line in capsys.readouterr().out
    assert ".png: 8 files (picture0.png, picture1.png, picture2.png, ...)" in line
    reasons = {"empty": "empty.txt", "converts it)": "noise.md", "unpack it first": "notes.txt.gz"}
    reasons |= {"without a suffix": "LICENCE", "hidden": ".git", "unreadable": "gone.txt"}
    assert all(f"{reason}: 1 file ({name})" in line for reason, name in reasons.items())
    text = "".join(documents(dataset, "train") + documents(dataset, "val"))
    assert text.count("text that is read") == 160 and text.count("print") == 1


def test_linked_folders_are_followed_once_each_without_loops(tmp_path):
    for i in range(3):
        write(tmp_path / "big" / f"book{i}.txt", f"Book {i}. " + BOOK[:5000])
        write(tmp_path / "source" / f"note{i}.txt", f"a small note {i}")
    for name, target in (("books", "../big"), ("copy", "../big"), ("loop", "."), ("up", "..")):
        (tmp_path / "source" / name).symlink_to(target)
    (tmp_path / "source" / "twin.txt").symlink_to("note1.txt")
    (tmp_path / "big" / "back").symlink_to("../source")
    dataset = prepare(source=tmp_path / "source", tokenizer="byte", out_dir=tmp_path / "out")
    text = "".join(documents(dataset, "train") + documents(dataset, "val"))
    assert all(text.count(f"Book {i}. ") == 1 and text.count(f"a small note {i}") == 1 for i in range(3))
    assert "linked again" in notes(dataset) and "copy" in notes(dataset)


def test_a_file_s_name_cannot_make_a_data_set_unreadable(tmp_path, capsys):
    name = "Notes 2024-04-24 at 12.22.20\u202fPM\x1b[2J" + "x" * 150 + ".txt"
    source = write(tmp_path / name, "one two three four five.\n" * 2000)
    dataset = prepare(source=source, tokenizer="byte", out_dir=tmp_path / "out")
    assert dataset.meta["source"].startswith("Notes 2024-04-24 at 12.22.20 PM [2Jx")
    main(["--info", str(tmp_path / "out")])
    assert capsys.readouterr().out.replace("\n", "").isprintable()


def test_end_of_text_in_a_txt_file_divides_documents(tmp_path):
    stories = [f"Once there was a fox, number {i}.\n\nIt ran." for i in range(500)]
    source = write(tmp_path / "stories.txt", "".join(f"{story}\n<|endoftext|>\n" for story in stories))
    dataset = prepare(source=source, tokenizer="byte", out_dir=tmp_path / "out")
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert [*train[:-1], train[-1] + val[0], *val[1:]] == stories and 0.048 < share(dataset) < 0.052
    assert "divided into documents at 500 <|endoftext|>: 1 file (stories.txt)" in notes(dataset)
    code = write(tmp_path / "code.py", source.read_text())  # elsewhere it is text
    dataset = prepare(source=code, tokenizer="byte", out_dir=tmp_path / "code")
    assert text_of(dataset, "train") + text_of(dataset, "val") == source.read_text() and not notes(dataset)


@pytest.mark.parametrize("seed", range(10))
def test_division_does_not_depend_on_where_pieces_are_cut(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    parts = ["".join(rng.choices(["ab", " ", "\n", "<|", "<|endof", "\u4f60"], k=rng.randrange(30))) for _ in range(8)]
    source = write(tmp_path / "d.txt", END_OF_TEXT.join(parts))
    (file,), _ = sources.find_texts(source)
    found = {}
    for size in (1 << 20, 50, 17):
        monkeypatch.setattr(sources, "PIECE", size)
        whole, current = [], ""
        for text, ends in file.texts():
            current += text
            if ends:
                whole, current = [*whole, current], ""
        assert not current and file.divisions == 7
        found[size] = [text.strip() for text in whole if text.strip()]
    assert found[17] == found[50] == found[1 << 20] == [part.strip() for part in parts if part.strip()]


def test_jsonl_is_split_by_record_and_equal_records_stay_together(tmp_path):
    texts = [f"record {i % 200}" for i in range(400)] + ["caf\u00e9 \ud800 \U0001f642"]
    (tmp_path / "d.jsonl").write_text(
        "\n\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)) + "\n"
    )
    dataset = prepare(source=str(tmp_path / "d.jsonl"), tokenizer="byte", out_dir=tmp_path / "out", val_fraction=0.2)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == sorted(text.replace("\ud800", "\ufffd") for text in texts)
    assert not set(train) & set(val) and len(val) > 20


@pytest.mark.parametrize("line", ["{", "3", '{"text": 3}', "[" * 10**5, '{"tex": "a"}'])
def test_a_bad_jsonl_line_names_file_and_line(tmp_path, capsys, line):
    write(tmp_path / "d.jsonl", '{"text": "good"}\n\n' + line + "\n")
    error = refused(capsys, "--source", tmp_path / "d.jsonl", "--out_dir", tmp_path / "out")
    assert re.match(r'error: .*d\.jsonl, line 3: not a JSON object with a string in "text"', error)
    assert os.listdir(tmp_path) == ["d.jsonl"]


@pytest.mark.parametrize("piece", [1 << 20, 20])
def test_invalid_utf8_is_replaced_and_counted(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(sources, "PIECE", piece)
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf" + b"good \xff\xfe bad \xc3\xa9 \xef\xbf\xbd end\r\n" * 10)
    dataset = prepare(source=str(tmp_path / "d.txt"), tokenizer="byte", out_dir=tmp_path / "out")
    assert text_of(dataset, "train") + text_of(dataset, "val") == "good \ufffd\ufffd bad \u00e9 \ufffd end\r\n" * 10
    assert notes(dataset) == "30 U+FFFD, which replace what is no UTF-8: 1 file (d.txt)"


@pytest.mark.parametrize(
    "text", ["a\n" * 50_000, "word " * 30_000, "x" * 150_000, "\u4f60\U0001f642" * 30_000, "\n" * 100_000, "ab"]
)
def test_pieces_and_the_cut_lose_nothing(tmp_path, monkeypatch, text):
    monkeypatch.setattr(sources, "PIECE", 1 << 12)
    (tmp_path / "d.txt").write_text(text)
    dataset = prepare(source=str(tmp_path / "d.txt"), tokenizer="byte", out_dir=tmp_path / "out", val_fraction=0.1)
    assert text_of(dataset, "train") + text_of(dataset, "val") == text


UNITS = {"lines.txt": "some words and a number 12345\n", "one.txt": "letters", "d.jsonl": '{"text": "%d %s"}\n'}


@pytest.mark.parametrize("name, unit", UNITS.items())
def test_a_file_larger_than_memory_streams(tmp_path, monkeypatch, name, unit):
    """With pieces of 32 KiB, a text of 6 MB passes through less than 2 MB of memory."""
    monkeypatch.setattr(sources, "PIECE", 1 << 15)
    monkeypatch.setattr(prepare_module, "PIECE", 1 << 15)
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", 1 << 16)
    with open(tmp_path / name, "w") as file:
        for i in range(60):
            file.write(unit % (i, "words " * 16_000) if "%" in unit else unit * (100_000 // len(unit)))
    tracemalloc.start()
    try:
        corpus = sources.local_corpus(tmp_path / name, 0.05, 0)
        prepare_module.write_tokens(corpus, train_bpe(prepare_module.sample(corpus), 300), tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_the_tokenizer_learns_from_a_sample_of_the_training_side_spread_over_all_of_it(monkeypatch):
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", 1000)
    documents = lambda: (("val" if i % 10 == 0 else "train", f"{i:010}", True) for i in range(10_000))
    corpus = sources.Corpus(documents, 100_000)
    sample = [int(text) for text in prepare_module.sample(corpus)]
    assert 80 <= len(sample) <= 100 and all(i % 10 for i in sample)
    assert sample[0] < 200 and sample[-1] > 9800 and max(np.diff(sample)) < 200


def test_a_vocabulary_is_learned_from_a_few_long_records(tmp_path, monkeypatch):
    """Three books, each longer than what the tokenizer is learned from."""
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", 1 << 17)
    rng, words = random.Random(1), "the cat walked slowly under blue stone and river water while birds sang".split()
    books = [" ".join(rng.choices(words, k=count)) for count in (80_000, 48_000, 32_000)]
    write(tmp_path / "books.jsonl", "".join(json.dumps({"text": book}) + "\n" for book in books))
    for seed in range(4):
        settings = dict(vocab_size=300, val_fraction=0.3, seed=seed, overwrite=True)
        dataset = prepare(source=tmp_path / "books.jsonl", out_dir=tmp_path / "out", **settings)
        assert dataset.vocab_size == train_bpe(books, 300).vocab_size == 300 and 0.22 < share(dataset) < 0.38


def test_vocabularies_above_65536_are_written_as_uint32(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "get_tokenizer", lambda name: Wide())
    monkeypatch.setattr(dataset_module, "load_tokenizer", lambda path: Wide())
    (tmp_path / "d.txt").write_text("hello " * 100)
    dataset = prepare(source=str(tmp_path / "d.txt"), tokenizer="wide", out_dir=tmp_path / "out")
    assert dataset.meta["dtype"] == "uint32" and dataset.train.dtype == np.dtype("<u4")
    assert dataset.train.max() == 100_000
    assert text_of(open_dataset(tmp_path / "out", verify=True), "val") == text_of(dataset, "val")


class Wide(Tokenizer):
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
    return root


def test_library_sources_are_cleaned_and_skipped_as_promised(library):
    texts = [text for _, text, _ in python_corpus("code", 0.05, 0).documents()]
    everything = "\n".join(texts)
    assert len(texts) == 41 and len(set(texts)) == 41  # forty modules and the table's; one twin
    assert not any(gone in everything for gone in ("SKIPPED", "Copyright", "#!", "'row'"))
    assert "kept" in everything and '"""Module number 7.' in everything and everything.count(REPEATED) == 40


def test_prose_is_docstrings_under_titles_each_paragraph_once(library):
    everything = "\n".join(text for _, text, _ in python_corpus("prose", 0.05, 0).documents())
    module = "module_5\n========\n\nModule number 5.\n\n"
    assert f"{module}module_5.function_5(argument, other=None)\n\nWhat function 5" in everything
    assert everything.count(REPEATED) == 1 and "return argument" not in everything


def test_all_text_of_a_module_is_on_the_same_side_whatever_else_there_is(library):
    def side(content):
        return {
            int(match[1]): split
            for split, text, _ in python_corpus(content, 0.3, 0).documents()
            if (match := re.search(r"function_(\d+)\(", text)) and "function" in text
        }

    prose, both = side("prose"), side("both")
    assert prose == {i: both[i] for i in prose} and set(both.values()) == {"train", "val"}
    for i in range(0, 40, 2):
        if i != 3:
            (library / f"module_{i}.py").unlink()
    fewer = side("both")
    assert fewer == {i: both[i] for i in fewer}


def test_a_python_without_topics_or_sources_says_so(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert python_corpus("both", 0.05, 0).notes() == ["this Python comes without pydoc's language topics"]
    shutil.rmtree(library)
    library.mkdir()
    with pytest.raises(ValueError, match="without its sources: use --source FILE_OR_FOLDER"):
        python_corpus("both", 0.05, 0)


def test_the_real_library_makes_a_data_set(tmp_path):
    dataset = prepare(content="prose", vocab_size=512, out_dir=tmp_path / "python")
    assert dataset.meta["content"] == "prose" and dataset.meta["source"] == "python"
    assert sum(entry["bytes"] for entry in dataset.meta["splits"].values()) > 1_000_000 and 0.01 < share(dataset) < 0.15
    main(["--info", str(tmp_path / "python")])


# --- Nothing lost, nothing half there ---


@pytest.mark.parametrize("what, why", [("full disk", "No space left"), ("nonsense", "is not what data/prepare.py")])
def test_a_failure_on_the_way_leaves_the_old_data_set_and_nothing_else(
    prepared, monkeypatch, tmp_path, capsys, what, why
):
    """A nonsense is what the reader refuses: it is not published."""
    write(tmp_path / "d.txt", PROSE)
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}

    def fail(path, text):
        if what == "full disk":
            raise OSError(28, "No space left on device")
        path.write_text("{}")

    monkeypatch.setattr(prepare_module, "write_atomically", fail)
    arguments = ["--source", tmp_path / "d.txt", "--out_dir", prepared, "--overwrite", "--tokenizer", "byte"]
    assert why in refused(capsys, *arguments)
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["d.txt", "prepared"]


def test_a_killed_run_leaves_no_data_set_and_the_next_run_cleans_up(tmp_path):
    write(tmp_path / "d.txt", PROSE * 30)
    command = [sys.executable, PROGRAM, "--source", tmp_path / "d.txt", "--out_dir", tmp_path / "out"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.new")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    write(tmp_path / "small.txt", PROSE[:2000])
    prepare(source=tmp_path / "small.txt", out_dir=tmp_path / "out", tokenizer="byte")
    assert sorted(os.listdir(tmp_path)) == ["d.txt", "out", "small.txt"]
    open_dataset(tmp_path / "out", verify=True)


def test_a_data_set_caught_between_two_renames_is_put_back(prepared, tmp_path, capsys, monkeypatch):
    write(tmp_path / "d.txt", PROSE[:2000])
    arguments = ["--source", str(tmp_path / "d.txt"), "--tokenizer", "byte", "--out_dir", str(prepared)]
    rename, published = Path.rename, f".{prepared.name}.new"

    def failing(source, target):
        if source.name == published:
            raise OSError("no room")
        return rename(source, target)

    with monkeypatch.context() as patch:  # a rename that fails
        patch.setattr(Path, "rename", failing)
        assert "no room" in refused(capsys, *arguments, "--overwrite")
    assert open_dataset(prepared, verify=True).vocab_size == 400
    prepared.rename(tmp_path / f".{prepared.name}.old")  # as a kill between the two leaves it
    assert "holds a data set; add --overwrite" in refused(capsys, *arguments)
    assert open_dataset(prepared, verify=True).vocab_size == 400
    main([*arguments, "--overwrite"])
    assert open_dataset(prepared, verify=True).vocab_size == 257
    assert sorted(os.listdir(tmp_path)) == ["d.txt", "prepared"]


# --- Bad input ---


MISTAKES = """
--nonsense => unrecognized arguments: --nonsense
--over => unrecognized arguments: --over
--vocab_size 256 => vocab_size must be at least 257 and at most 1048576, not 256
--vocab_size 512 --tokenizer byte => --vocab_size is for --tokenizer bpe
--source no/such/file.txt => no/such/file.txt: neither python, shakespeare
--tokenizer gpt9 => no tokenizer 'gpt9'
--tokenizer hf:nowhere => nowhere
--content poems => --content
--source shakespeare --content prose => --content is for --source python
--shards 3 => --shards is for
--source fineweb-edu --shards 15 => shards must be at least 1 and at most 14
--val_fraction nan => val_fraction must be above 0 and at most 0.5, not nan
--info nowhere => no data set at nowhere
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_bad_input_is_one_line_and_exit_code_2(mistake, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, why = mistake.split(" => ")
    assert why in refused(capsys, *options.split(), "--out_dir", "out")
    assert os.listdir(tmp_path) == []


def test_folders_that_are_in_the_way_are_refused_and_untouched(prepared, tmp_path, capsys):
    (tmp_path / "d.txt").write_text(PROSE[:2000])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.doc").write_text("years of work")
    source = ["--source", tmp_path / "d.txt", "--out_dir"]
    for out in (tmp_path / "thesis", tmp_path / "d.txt"):
        for extra in ([], ["--overwrite"]):
            assert "not a prepared data set" in refused(capsys, *source, out, *extra)
    assert "--overwrite" in refused(capsys, *source, prepared)
    (prepared / "notes.md").write_text("mine")
    assert "holds 'notes.md' beside the data set; move it" in refused(capsys, *source, prepared, "--overwrite")
    assert (tmp_path / "thesis" / "chapter.doc").read_text() == "years of work"
    open_dataset(prepared, verify=True)


def test_empty_sources_are_refused(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "pictures" / "picture.png", b"x")
    write(tmp_path / "records.jsonl", '{"text": ""}\n')
    for source in ("folder", "pictures", "records.jsonl"):
        error = refused(capsys, "--source", tmp_path / source, "--out_dir", tmp_path / "out")
        assert "no text in .txt, .md, .rst, .py, .jsonl files there" in error


@pytest.mark.parametrize("module", [prepare_module, dataset_module, tokenizer_module])
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


def test_nanogpt_s_files_are_read_in_place_to_the_same_tokens(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    array = np.memmap(source / "train.bin", dtype=np.uint16, mode="w+", shape=(4000,))  # as nanoGPT's prepare.py writes
    array[:] = IDS[:4000]
    array.flush()
    IDS[4000:].astype(np.uint16).tofile(source / "val.bin")
    dataset = prepare(source=source, tokenizer="byte", out_dir=tmp_path / "out")
    theirs = np.memmap(source / "train.bin", dtype=np.uint16, mode="r")  # as nanoGPT's train.py reads
    assert (dataset.train == theirs).all() and (dataset.val == IDS[4000:]).all()
    assert os.path.samefile(tmp_path / "out" / "train.bin", source / "train.bin")
    entry = dataset.meta["splits"]["train"]
    assert entry["documents"] == 80 and entry["bytes"] == 4000 - 80 and entry["tokens"] == 4000
    assert dataset.bits_per_byte(1.0) == pytest.approx(1000 / 980 / math.log(2))
    main(["--info", str(tmp_path / "out")])
    shutil.move(source, tmp_path / "elsewhere")
    assert "which is gone" in refused(capsys, "--info", tmp_path / "out")


@pytest.mark.parametrize("cuts", [[4000], [1, 2, 3, 1000, 2500, 4000], [1999, 4000]])
def test_several_shards_are_one_stream(tmp_path, cuts):
    for i, (start, end) in enumerate(zip([0, *cuts], cuts)):
        write(tmp_path / "source" / f"fineweb_train_{i:06}.bin", shard(IDS[start:end]))
    write(tmp_path / "source" / "fineweb_val_000000.bin", shard(IDS[4000:]))
    dataset = prepare(source=tmp_path / "source", tokenizer="byte", out_dir=tmp_path / "out")
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert len(dataset.train) == 4000 and (np.asarray(dataset.train) == IDS[:4000]).all()
    for block in (1, 7, 64, 3999):
        ours, theirs = (WindowSampler(tokens, block, seed=3) for tokens in (dataset.train, IDS[:4000]))
        for step in range(20):
            for one, other in zip(ours.batch(step, 4), theirs.batch(step, 4)):
                assert one.dtype == other.dtype and (one == other).all()
        for one, other in zip(validation_windows(dataset.train, block, 9), validation_windows(IDS[:4000], block, 9)):
            assert (one == other).all()
    one_file = tmp_path / "one_file"
    write(one_file / "train.bin", IDS[:4000].astype("<u2").tobytes())
    write(one_file / "val.bin", IDS[4000:].astype("<u2").tobytes())
    assert prepare(source=one_file, tokenizer="byte", out_dir=tmp_path / "o").fingerprint == dataset.fingerprint


def test_shards_slice_as_one_array():
    whole, rng = np.arange(100, dtype=np.uint16), random.Random(0)
    shards = Shards([whole[:1], whole[1:40], whole[40:41], whole[41:]])
    assert len(shards) == 100 and shards.nbytes == 200 and (np.asarray(shards) == whole).all()
    for _ in range(500):
        piece = slice(*(rng.choice([None, *range(-110, 110)]) for _ in range(2)))
        assert (shards[piece] == whole[piece]).all() and len(shards[piece]) == len(whole[piece])


def test_llama_3_shards_have_four_bytes_an_id(tmp_path):
    for split, ids in (("train", IDS[:4000]), ("val", IDS[4000:])):
        write(tmp_path / "source" / f"tiny_{split}.bin", shard(ids, **LLAMA3))
    dataset = prepare(source=tmp_path / "source", tokenizer="byte", out_dir=tmp_path / "out")
    assert dataset.meta["dtype"] == "uint32" and (dataset.train == IDS[:4000]).all()


@pytest.mark.parametrize(
    "train, val, why",
    [
        (shard(IDS), None, "none for val"),
        (shard(IDS)[:-2], shard(IDS), "train_0.bin has 11022 bytes, and its header"),
        (shard(IDS, count=-1), shard(IDS), "train_0.bin"),
        (shard([1, 300]), shard(IDS), "holds token id 300, outside the vocabulary of 257"),
        (shard([1], **LLAMA3), shard(IDS), "ids of different width"),
        (b"abc", b"abcd", "train_0.bin has 3 bytes, and ids of two bytes make an even number"),
        (b"", b"abcd", "train_0.bin has 0 bytes"),
    ],
)
def test_token_files_that_cannot_be_right_are_refused(tmp_path, capsys, train, val, why):
    for split, content in (("train", train), ("val", val)):
        if content is not None:
            write(tmp_path / "source" / f"{split}_0.bin", content)
    arguments = ["--source", tmp_path / "source", "--tokenizer", "byte", "--out_dir", tmp_path / "out"]
    assert why in refused(capsys, *arguments) and os.listdir(tmp_path) == ["source"]


def test_token_files_are_gpt_2_s_unless_said_otherwise(tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("gpt2", pat_str=".", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    ids = np.where(IDS == 256, 50256, IDS)
    for name in ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"):
        write(tmp_path / "source" / name, shard(ids))
    write(tmp_path / "source" / "readme.md", "about the shards")
    dataset = prepare(source=tmp_path / "source", out_dir=tmp_path / "out")
    assert dataset.meta["tokenizer"]["name"] == "gpt2" and dataset.vocab_size == 50257
    assert dataset.meta["splits"]["train"]["documents"] == 200 and "readme.md" in notes(dataset)


def test_ids_of_two_bytes_have_no_large_vocabulary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "get_tokenizer", lambda name: Wide())
    monkeypatch.setattr(Wide, "_decode", lambda self, tokens: b"x")
    for name in ("train.bin", "val.bin"):
        write(tmp_path / "source" / name, IDS.astype("<u2").tobytes())
    error = refused(capsys, "--source", tmp_path / "source", "--tokenizer", "wide", "--out_dir", tmp_path / "out")
    assert "wide has 100001 tokens, too many for ids of two bytes" in error


def test_a_changed_shard_is_refused(tmp_path):
    for name in ("a_train_0.bin", "a_train_1.bin", "a_val_0.bin"):
        write(tmp_path / "source" / name, shard(IDS))
    prepare(source=tmp_path / "source", tokenizer="byte", out_dir=tmp_path / "out")
    for content, why in (
        (shard(IDS[::-1]), "SHA-256"),
        (shard(IDS[1:]), "truncated or changed"),
        (shard(IDS, 7), "changed"),
    ):
        write(tmp_path / "source" / "a_train_1.bin", content)
        with pytest.raises(ValueError, match=why):
            open_dataset(tmp_path / "out")


def test_a_pickle_beside_token_files_is_not_opened(tmp_path, capsys):
    source = tmp_path / "source"
    for name in ("train.bin", "val.bin"):
        write(source / name, IDS.astype("<u2").tobytes())
    write(source / "meta.pkl", b"cos\nsystem\n(S'touch opened'\ntR.")
    out = ["--source", source, "--out_dir", tmp_path / "out"]
    assert "meta.pkl, a pickle, is not opened: name the tokens' vocabulary" in refused(capsys, *out)
    assert "a vocabulary already: name it" in refused(capsys, *out, "--tokenizer", "bpe")
    main([*map(str, out), "--tokenizer", "byte"])
    assert open_dataset(tmp_path / "out").tokenizer.name == "byte" and not Path("opened").exists()


# --- Tokenizers that exist ---


def test_a_data_set_for_a_trained_model_has_its_tokenizer(pristine, tmp_path):
    """`--tokenizer RUN`: train.py saves the tokenizer of its data, and compares SHA-256s when it goes on from a run."""
    first = open_dataset(pristine)
    (tmp_path / "run").mkdir()
    saved = first.tokenizer.save(tmp_path / "run")
    write(tmp_path / "notes.txt", "Quite other text, which would have another vocabulary.\n" * 50)
    for spec in (pristine, tmp_path / "run", tmp_path / "run" / "tokenizer.json"):
        dataset = prepare(source=tmp_path / "notes.txt", tokenizer=spec, out_dir=tmp_path / "out", overwrite=True)
        assert dataset.meta["tokenizer"] == first.meta["tokenizer"] == saved
        assert hashlib.sha256((tmp_path / "run" / "tokenizer.json").read_bytes()).hexdigest() == saved["sha256"]


# --- Downloads ---


def test_a_download_is_checked_and_done_once(tmp_path):
    content = PROSE.encode()
    there = write(tmp_path / "there" / "file.txt", content)
    path, checksum = tmp_path / "cache" / "file.txt", hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match="is not the expected file.*--source FILE"):
        download(path, there.as_uri(), "0" * 64)
    assert not path.exists()
    download(path, there.as_uri(), checksum)
    there.unlink()
    download(path, there.as_uri(), checksum)
    assert path.read_bytes() == content and os.listdir(path.parent) == ["file.txt"]
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="is not the expected file: remove it"):
        download(path, there.as_uri(), checksum)


def test_shakespeare_is_prepared_from_what_was_downloaded(tmp_path, monkeypatch, capsys):
    there = write(tmp_path / "there.txt", PROSE)
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(sources, "SHAKESPEARE", ((tmp_path / "gone").as_uri(), ""))
    error = refused(capsys, "--source", "shakespeare", "--out_dir", tmp_path / "out")
    assert error.startswith("error: could not download file://") and "--source python" in error
    assert os.listdir(tmp_path) == ["there.txt"]
    monkeypatch.setattr(sources, "SHAKESPEARE", (there.as_uri(), hashlib.sha256(PROSE.encode()).hexdigest()))
    dataset = prepare(source="shakespeare", tokenizer="byte", out_dir=tmp_path / "out")
    assert text_of(dataset, "train") + text_of(dataset, "val") == PROSE


def test_corpora_of_the_hub_come_through_its_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "downloads")
    story, asked = "Once upon a time.<|endoftext|>\nThe end.\n<|endoftext|>\n<|endoftext|> last", []

    def hf_hub_download(repository, file, *, repo_type, revision, local_dir):
        asked.append((repository, file))
        assert repo_type == "dataset" and re.fullmatch("[0-9a-f]{40}", revision)
        return write(local_dir / file, story)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    for out in ("stories", "again"):
        dataset = prepare(source="tinystories", tokenizer="byte", out_dir=tmp_path / out)
        assert documents(dataset, "val") == documents(dataset, "train") == ["Once upon a time.", "The end.", "last"]
    files = ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"]
    assert asked == [("roneneldan/TinyStories", file) for file in files]  # once each
    assert sources.named_corpus("tinystories", 1, 0.05, 0).size == 2 * len(story)
    shutil.rmtree(tmp_path / "downloads")

    def unreachable(*_, **__):
        raise RuntimeError("no route\nto host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=unreachable))
    error = refused(capsys, "--source", "tinystories", "--out_dir", tmp_path / "out")
    assert "could not download TinyStoriesV2-GPT4-train.txt" in error and "(no route to host)" in error
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = refused(capsys, "--source", "tinystories", "--out_dir", tmp_path / "out")
    assert "pip install huggingface_hub" in error


def test_fineweb_reads_parquet(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(capsys, "--source", "fineweb-edu", "--out_dir", tmp_path / "out")
    monkeypatch.undo()
    parquet = pytest.importorskip("pyarrow.parquet")
    texts, buffer = [f"page {i}" for i in range(300)], io.BytesIO()
    parquet.write_table(__import__("pyarrow").table({"text": texts, "id": texts}), buffer)
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path)
    write(tmp_path / "sample" / "10BT" / "000_00000.parquet", buffer.getvalue())
    dataset = prepare(source="fineweb-edu", tokenizer="byte", out_dir=tmp_path / "out")
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(texts)
