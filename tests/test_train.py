"""Training: schedules, steps, resuming bit for bit, signals, faults, and every wrong option in one line."""

import contextlib
import importlib.util
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kernels
import model as gpt
import sample
import train
from data.dataset import open_dataset
from data.prepare import prepare
from data.sampler import validation_windows
from checkpoint import load_checkpoint, save_checkpoint
from experiments import torture
from options import parse_options

ROOT = Path(__file__).resolve().parent.parent


def arguments(*options):
    """The words of a command line; an option may be given as text with its value, a path or a number."""
    return " ".join(map(str, options)).split()


TINY = "--preset tiny --threads 1 --device cpu"


def run(*options, data):
    """train.main in this process."""
    train.main(arguments(TINY, "--data_dir", data, *options))


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Equal weights, optimiser state, RNG and logged numbers, bit for bit."""
    assert not torture.differences(load_checkpoint(a)[1], load_checkpoint(b)[1])
    assert torture.metrics(Path(a)) == torture.metrics(Path(b))


def test_a_run_folder_holds_what_it_should_and_the_loss_falls(trained, data):
    names = {path.name for path in trained.iterdir()}
    assert {"checkpoint.pt", "checkpoint.prev.pt", "config.json", "metrics.jsonl", "tokenizer.json"} <= names
    assert not any(name.endswith("tmp") for name in names)
    assert "loss.png" in names or not importlib.util.find_spec("matplotlib")
    lines = metrics(trained)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert {*"step tokens train_loss learning_rate grad_norm tokens_per_second loss_spikes".split()} <= set(lines[0])
    assert lines[-1]["tokens"] == 60 * 8 * 64
    assert lines[0]["train_loss"] > 5 and lines[-1]["val_loss"] < 3
    # the logged validation loss is that of the saved weights, and bits per byte follow from it (one byte is one token
    # here, apart from the end-of-text tokens)
    model, _ = load_checkpoint(trained)
    windows = validation_windows(open_dataset(data).val, 64, 16)
    loss = train.evaluate(model, windows, 3, torch.device("cpu"), torch.float32)
    assert loss == pytest.approx(lines[-1]["val_loss"], rel=1e-5)
    assert lines[-1]["val_bpb"] == pytest.approx(lines[-1]["val_loss"] / math.log(2), rel=1e-2)
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["attention"] == "mea" and config["options"]["max_steps"] == 60


@pytest.mark.parametrize("attention", gpt.ATTENTION)
def test_resuming_is_bit_exact(tmp_path, data, attention, monkeypatch):
    options = f"--attention {attention} --dropout 0.1 --grad_accum 2 --batch_size 4"
    options = [options, "--max_steps 12 --save_every 4 --eval_every 5"]
    run(*options, "--out_dir", tmp_path / "whole", data=data)

    def save_then_die(folder, state):
        save_checkpoint(folder, state)
        if state["step"] == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_checkpoint", save_then_die)
        run(*options, "--out_dir", tmp_path / "halves", data=data)
    with open(tmp_path / "halves" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train_loss": 0}\n{"step": 10, "trai')  # steps that were lost, one of them half-written
    torch.manual_seed(99)  # resuming must not depend on what the process did before
    train.main(["--resume", "--out_dir", str(tmp_path / "halves")])
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_micro_batches_add_up_to_the_batch(tmp_path, data):
    shared = ["--max_steps", 3, "--eval_every", 3]
    run(*shared, "--batch_size", 8, "--out_dir", tmp_path / "one", data=data)
    run(*shared, "--batch_size", 2, "--grad_accum", 4, "--out_dir", tmp_path / "four", data=data)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four")):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5) and a["tokens"] == b["tokens"]


def test_init_from_takes_weights_and_starts_a_new_run(tmp_path, data, trained, capsys):
    """Shape and attention are the checkpoint's, not the preset's; dropout and a shorter window are what is asked."""
    again = ["--init_from", trained, "--data_dir", data, "--max_steps", 2, "--eval_windows", 16]
    train.main(arguments(*again, "--learning_rate 1e-6 --out_dir", tmp_path / "again"))
    ends = [metrics(folder)[-1] for folder in (trained, tmp_path / "again")]
    assert ends[1]["val_loss"] == pytest.approx(ends[0]["val_loss"], abs=1e-2) and ends[1]["step"] == 2
    train.main(arguments(*again, "--dropout 0.1 --block_size 32 --out_dir", tmp_path / "shorter"))
    config = load_checkpoint(tmp_path / "shorter")[0].config
    assert (config.dropout, config.block_size, config.n_layer) == (0.1, 32, 2)
    capsys.readouterr()
    longer = refused(capsys, train.main, *again, "--block_size 128 --out_dir", tmp_path / "longer")
    assert "has block_size 64, not 128" in longer


def test_a_multi_head_model_starts_an_mea_that_is_the_same_function(tmp_path, data):
    run("--out_dir", tmp_path / "mha", "--max_steps", 5, "--attention", "mha", "--n_kv_head", 2, data=data)
    options = ["--init_from", tmp_path / "mha", "--attention", "mea", "--max_steps", 1, "--learning_rate", 1e-9]
    run("--out_dir", tmp_path / "mea", *options, "--head_norm", "no", data=data)
    run("--out_dir", tmp_path / "normed", *options, data=data)
    mha, mea, normed = (load_checkpoint(tmp_path / name)[0] for name in ("mha", "mea", "normed"))
    x = torch.randint(257, (2, 60))
    torch.testing.assert_close(mea(x)[0], mha(x)[0], rtol=1e-4, atol=1e-4)
    assert mea.config.attention == normed.config.attention == "mea" and normed.config.head_norm


def test_a_diagonal_composition_trains(tmp_path, data):
    run("--out_dir", tmp_path / "r", "--max_steps", 3, "--compose", "diagonal", data=data)
    model, _ = load_checkpoint(tmp_path / "r")
    assert model.layers[0].self_attn.compose_k.shape == (4,) and not (model.layers[0].self_attn.compose_k == 1).all()


def test_a_finished_run_goes_on_or_is_replaced(tmp_path, data, capsys):
    run("--out_dir", tmp_path / "r", "--max_steps", 2, data=data)
    train.main(["--resume", "--max_steps", "4", "--out_dir", str(tmp_path / "r")])
    assert len(metrics(tmp_path / "r")) == 4 and "this run's cosine had ended" in capsys.readouterr().out
    run("--out_dir", tmp_path / "r", "--max_steps", 2, "--seed", 1, "--overwrite", data=data)
    assert len(metrics(tmp_path / "r")) == 2 and load_checkpoint(tmp_path / "r")[1]["options"]["seed"] == 1


# --- Faults


def launch(*options, data, cwd):
    command = [sys.executable, ROOT / "train.py", *arguments(TINY, "--data_dir", data, *options)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


UNDISTURBED = "--max_steps 80 --save_every 5 --eval_every 40"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(UNDISTURBED, "--out_dir", folder, data=data)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=str)
def test_a_stopped_or_killed_run_goes_on_where_it_was(tmp_path, data, undisturbed, number):
    process = launch(UNDISTURBED, "--out_dir", tmp_path / "cut", data=data, cwd=tmp_path)
    while not (tmp_path / "cut" / "checkpoint.prev.pt").exists():
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number
        assert "saved; go on with: python train.py --resume" in errors and "Traceback" not in errors
    assert load_checkpoint(tmp_path / "cut")[1]["step"] < 80
    train.main(["--resume", "--out_dir", str(tmp_path / "cut")])
    assert_same_run(undisturbed, tmp_path / "cut")


def test_a_reader_that_goes_away_or_cannot_show_a_character_costs_nothing(tmp_path, data, trained):
    """`train.py | head -1` goes on to its end in silence, `sample.py | head -c 5` ends, ASCII shows a `?` instead."""
    process = launch(UNDISTURBED, "--out_dir", tmp_path / "r", data=data, cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 0
    assert load_checkpoint(tmp_path / "r")[1]["step"] == 80
    command = [sys.executable, ROOT / "sample.py", *arguments("--checkpoint", trained, "--prompt é --num_samples 9")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 141
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, "--max_new_tokens", "3"], capture_output=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(b"?")


@contextlib.contextmanager
def files_of_at_most(size):
    """A real failing write: every file ends after so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_ends_the_run_with_the_checkpoint_before(tmp_path, data, capsys, monkeypatch):
    def save_on_a_full_disk(folder, state):
        with files_of_at_most(50_000 if state["step"] > 2 else 10**9):
            save_checkpoint(folder, state)

    monkeypatch.setattr(train, "save_checkpoint", save_on_a_full_disk)
    with pytest.raises(SystemExit) as stopped:
        run("--out_dir", tmp_path / "r", "--max_steps", 4, "--save_every", 2, data=data)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and "still the one from before" in message
    assert load_checkpoint(tmp_path / "r")[1]["step"] == 2


def refused(capsys, main, *options):
    """The one line that a program ends with."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments(*options))
    out = capsys.readouterr()
    assert stopped.value.code == 2
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and out.out == ""
    return out.err


MISTAKES = """
--n_heads 4 => unrecognized arguments: --n_heads
--attention linear => choose from
--max_steps many => invalid int value: 'many'
--compile perhaps => neither yes nor no
--n_embd 30 => n_embd 30 is not divisible by n_head 4
--attention dfa --n_head 3 --n_embd 24 => dfa pairs its heads: n_head 3
--attention mha --n_kv_head 3 => must divide n_head 4
--learning_rate nan => learning_rate must be above 0
--max_steps 0 => max_steps must be at least 1, not 0
--seed 9223372036854775808 => seed must be at least 0
--beta2 1 => beta2 must be at least 0 and below 1
--data_dir nowhere => no data set at nowhere
--block_size 1000000 => too few for block_size 1000000
--kernel fast => choose from
--device quantum => device 'quantum' is not available
--resume => no checkpoint at
--resume --overwrite => give one of them
--init_from nowhere => no checkpoint at nowhere
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_bad_options_are_refused_in_one_line_before_any_work(tmp_path, data, capsys, mistake):
    options, message = mistake.split(" => ")
    assert message in refused(capsys, train.main, TINY, "--data_dir", data, "--out_dir", tmp_path / "r", options)
    assert not (tmp_path / "r").exists()


def test_a_folder_that_holds_a_run_is_left_alone(trained, data, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    base = [TINY, "--data_dir", data, "--out_dir", trained]
    assert "already holds a run: give --resume" in refused(capsys, train.main, *base)
    changed = refused(capsys, train.main, *base, "--resume --learning_rate 0.1")
    assert "this run has learning_rate 0.003, not 0.1" in changed
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_data_that_does_not_go_with_the_checkpoint_is_refused(tmp_path, data, trained, capsys):
    (tmp_path / "other.txt").write_text("quite another text, long enough for a block " * 200)
    for tokenizer in ("byte", "bpe"):
        prepare(source=str(tmp_path / "other.txt"), tokenizer=tokenizer, out_dir=tmp_path / tokenizer)
    capsys.readouterr()
    message = refused(capsys, train.main, "--resume", "--out_dir", trained, "--data_dir", tmp_path / "byte")
    assert "is not the data set this run was trained on" in message
    new = ["--out_dir", tmp_path / "new", "--init_from", trained, "--data_dir"]
    assert "made with another tokenizer" in refused(capsys, train.main, *new, tmp_path / "bpe")
    assert "has n_layer 2, not 3: leave it out" in refused(capsys, train.main, *new, tmp_path / "byte", "--n_layer", 3)
    with open(tmp_path / "byte" / "train.bin", "r+b") as file:
        file.truncate(100)
    assert "truncated" in refused(capsys, train.main, *new, tmp_path / "byte")


# --- Pieces


def test_schedules():
    options = train.Options(max_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = {}
    for options.schedule in ("cosine", "constant", "wsd"):
        rates[options.schedule] = [train.learning_rate(options, step) for step in range(100)]
        assert rates[options.schedule][:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates["cosine"][55] == pytest.approx(0.55) and rates["cosine"][99] == pytest.approx(0.1, abs=1e-3)
    assert set(rates["constant"][10:]) == {1.0}
    assert set(rates["wsd"][10:81]) == {1.0} and rates["wsd"][90] == pytest.approx(0.5) and 0 < rates["wsd"][99] < 0.06


def test_spikes_are_counted_and_noise_and_progress_are_not():
    noise = np.random.default_rng(0).normal(0, 0.05, 2000)
    counter = train.SpikeCounter()
    losses = 3 + 4 * np.exp(-np.arange(2000) / 200) + noise
    for loss in losses:
        counter.update(loss)
    assert counter.count == 0
    for loss in (3.1, 4.5, 3.0, 5.0, 3.05):
        counter.update(loss)
    assert counter.count == 2


@pytest.mark.parametrize("attention", gpt.ATTENTION)
def test_activation_checkpointing_changes_the_memory_and_no_number(tmp_path, data, attention):
    options = ["--attention", attention, "--dropout", 0.1, "--n_layer", 3, "--max_steps", 3]
    for name, extra in (("kept", []), ("recomputed", ["--activation_checkpointing"])):
        run(*options, *extra, "--out_dir", tmp_path / name, data=data)
    assert torture.metrics(tmp_path / "kept") == torture.metrics(tmp_path / "recomputed")

    model, _ = load_checkpoint(tmp_path / "kept")
    x, y = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 2, 63)))
    weights, saved = {p.data_ptr() for p in model.parameters()}, {}
    for model.activation_checkpointing in (False, True):
        kept = {}  # storages that the graph holds on to until the backward
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage()}) or t, lambda t: t
        ):
            model.train()(x, y)
        saved[model.activation_checkpointing] = sum(
            storage.nbytes() for pointer, storage in kept.items() if pointer not in weights
        )
    inputs = 3 * x.numel() * model.config.n_embd * 4  # of the three blocks: the checkpoints keep them past the hooks
    assert saved[True] + inputs < 0.5 * saved[False]


def test_a_preset_is_overridden_by_what_is_given():
    argv = arguments("--preset tiny --n_layer 3 --head_norm no --compile")
    o, given = parse_options(train.Options, argv, train.PRESETS)
    assert (o.n_layer, o.n_embd, o.batch_size, o.head_norm, o.compile) == (3, 32, 8, False, True)
    assert given == {"preset", "n_layer", "head_norm", "compile"}
    assert parse_options(train.Options, [], train.PRESETS)[0].max_steps == train.PRESETS["small"]["max_steps"]


def test_a_run_in_bfloat16_ends_near_one_in_float32(tmp_path, data):
    run("--out_dir", tmp_path / "low", "--max_steps", 30, "--dtype", "bfloat16", data=data)
    run("--out_dir", tmp_path / "full", "--max_steps", 30, "--dtype", "float32", data=data)
    low, full = (metrics(tmp_path / name)[-1]["val_loss"] for name in ("low", "full"))
    assert low != full and low == pytest.approx(full, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("attention", gpt.ATTENTION)
def test_a_compiled_model_computes_the_same(tmp_path, data, attention):
    for name, extra in (("plain", ""), ("compiled", "--compile")):
        run("--out_dir", tmp_path / name, "--attention", attention, "--max_steps 5", extra, data=data)
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


# --- sample.py, and the README's commands


def test_sample_writes_text_with_and_without_the_cache(tmp_path, trained, capsys, monkeypatch):
    options = arguments("--checkpoint", trained, "--prompt key --temperature 0 --max_new_tokens 90 --num_samples 2")
    texts = []
    for extra in ([], ["--no_cache"]):
        sample.main([*options, *extra])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("key")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("value é".encode())))
    sample.main(arguments("--checkpoint", trained / "checkpoint.pt", "--prompt_file - --max_new_tokens 5"))
    out = capsys.readouterr()
    assert out.out.startswith("value é") and "5 tokens, " in out.err and "tokens/s" in out.err
    model, _ = load_checkpoint(trained)
    assert f"cache {13 * model.config.kv_bytes_per_token():,} bytes" in out.err  # 8 bytes of prompt and 5 new tokens


def test_programs_refuse_what_they_cannot_use(tmp_path, data, trained, capsys, monkeypatch):
    base = ["--checkpoint", trained]
    assert "no checkpoint at" in refused(capsys, sample.main, "--checkpoint", tmp_path / "nowhere")
    assert "temperature" in refused(capsys, sample.main, *base, "--temperature", -1)
    monkeypatch.setattr(kernels, "triton", None)
    for main, where in ((sample.main, base), (train.main, ["--data_dir", data, "--out_dir", tmp_path / "new"])):
        assert "kernel 'triton' cannot run here" in refused(capsys, main, *where, "--kernel", "triton")
    assert not (tmp_path / "new").exists()
    assert "leave one out" in refused(capsys, sample.main, *base, "--prompt", "a", "--prompt_file", "b")
    assert "No such file" in refused(capsys, sample.main, *base, "--prompt_file", tmp_path / "b")
    shutil.copy(trained / "checkpoint.pt", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refused(capsys, sample.main, "--checkpoint", tmp_path)


def test_the_readmes_main_command_runs_end_to_end(tmp_path):
    """Nothing but the repository: prepares the default data set, trains, samples, and says what to try next."""
    command = [sys.executable, ROOT / "train.py", *arguments("--preset tiny --max_steps 10 --threads 1")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = "preparing the default data set|(1 threads)|ETA|bits per byte|A sample:|python sample.py --checkpoint".split(
        "|"
    )
    assert all(words in done.stdout for words in said)
    assert (tmp_path / "data/python/train.bin").exists()
    readme = (ROOT / "README.md").read_text()
    assert all(f"pip install -r requirements.txt && {command}" in readme for command in ("python train.py", "pytest"))
