"""Several processes train what one trains, their checkpoints are interchangeable, and none is left hanging."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import arguments, mistakes, raises, refused
from test_train import ROOT, metrics

import options
import runs
import sample
import train
from attention import ATTENTION
from checkpoint import load_checkpoint
from data.prepare import prepare
from experiments.family import FAMILY

OPTIONS = "--preset tiny --threads 1 --device cpu --dtype float32 --batch_size 2 --schedule constant"
OPTIONS += " --eval_every 10 --eval_windows 5 --save_every 10"


def alone(*options):
    train.main(arguments(OPTIONS, *options))


def launch(*options):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, ROOT / "train.py", *arguments(OPTIONS, *options)]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def together(*options):
    """A finished run in two processes: what they printed."""
    process = launch(*options)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def assert_same_losses(a, b, rel=1e-5):
    """Every step's mean loss and gradient norm, the tokens seen and the validation losses."""
    a, b = metrics(a), metrics(b)
    assert [(line["step"], line["tokens"]) for line in a] == [(line["step"], line["tokens"]) for line in b]
    for first, second in zip(a, b):
        loss = "train_kl" if "train_kl" in first else "train_loss"
        for name in (loss, "grad_norm", *(["val_loss"] if "val_loss" in first else [])):
            assert first[name] == pytest.approx(second[name], rel=rel), (first["step"], name)


def test_a_run_goes_through_ddp_fsdp_and_one_process_as_if_it_had_been_one(tmp_path, data, capsys):
    shared = ["--data_dir", data, "--tie_embeddings"]
    alone(*shared, "--grad_accum", 4, "--max_steps", 20, "--out_dir", tmp_path / "one")
    moved = tmp_path / "moved"
    out = together(*shared, "--grad_accum", 2, "--max_steps", 5, "--out_dir", moved)
    assert out.count("step     1/5") == out.count("A sample:") == 1 and "2 processes (ddp)" in out  # of rank 0 alone
    assert load_checkpoint(moved)[1]["world_size"] == 2
    alone("--resume", "--max_steps", 10, "--out_dir", moved)  # grad_accum follows: 4 in one process
    assert load_checkpoint(moved)[1]["options"]["grad_accum"] == 4
    out = together("--resume", "--parallel", "fsdp", "--max_steps", 15, "--out_dir", moved)
    assert "2 processes (fsdp)" in out and "resumed at step 10" in out
    alone("--resume", "--max_steps", 20, "--out_dir", moved)
    assert_same_losses(tmp_path / "one", moved)
    (_, one), (_, other) = load_checkpoint(tmp_path / "one"), load_checkpoint(moved)
    torch.testing.assert_close(other["model"], one["model"], rtol=1e-3, atol=1e-4)
    assert list(one["model"]) == list(other["model"])
    assert list(one["optimizer"]["state"]) == list(other["optimizer"]["state"])
    capsys.readouterr()
    sample.main(["--checkpoint", str(moved), "--prompt", "key", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.startswith("key")


@pytest.mark.slow
def test_healing_in_two_processes_is_healing_in_one(tmp_path, data):
    """A teacher, frozen weights, two texts and a window: through ddp, fsdp and one process as if it had been one."""
    (tmp_path / "other.txt").write_text("KEY VALUE HEAD " * 1500)
    prepare(source=str(tmp_path / "other.txt"), tokenizer=data, out_dir=tmp_path / "other")
    alone("--data_dir", data, "--attention mha --max_steps 10 --out_dir", tmp_path / "teacher")
    how = ["--data_dir", f"{data},{tmp_path / 'other'}", "--init_from", tmp_path / "teacher", "--teacher"]
    how += [tmp_path / "teacher", "--attention mea --head_norm no --freeze k_proj,v_proj --window 24"]
    alone(*how, "--grad_accum 2 --max_steps 12 --out_dir", tmp_path / "one")
    for parallel in ("ddp", "fsdp"):
        out = together(*how, "--max_steps 6 --parallel", parallel, "--out_dir", tmp_path / parallel)
        assert "towards the predictions of" in out
        together("--resume --max_steps 9 --out_dir", tmp_path / parallel)
        alone("--resume --max_steps 12 --out_dir", tmp_path / parallel)
        assert_same_losses(tmp_path / "one", tmp_path / parallel)
        (one, _), (other, _) = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / parallel)
        torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_signal_that_comes_twice_saves_and_stops_once(tmp_path, data):
    """torchrun passes on to its processes what the terminal has sent them already."""
    process = launch("--data_dir", data, "--max_steps 400 --out_dir", tmp_path / "r")
    while not (tmp_path / "r" / "checkpoint.pt").exists():
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    for pause in (0.002, 0.02, 0.03):
        for child in children.split():
            os.kill(int(child), signal.SIGTERM)
        time.sleep(pause)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert errors.count("stopped by SIGTERM") == 1 and "saved; go on with" in errors
    assert load_checkpoint(tmp_path / "r")[1]["step"] < 400


TRAINED = [(f"--attention {name} --max_steps 20", "", 1e-5) for name in ATTENTION if name not in FAMILY]
TRAINED += [("--max_steps 5", extra, 1e-4) for extra in ("--activation_checkpointing", "--compile")]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("how, extra, rel", TRAINED)  # train.py knows none of the family
def test_two_processes_train_as_one_with_twice_the_micro_batches(tmp_path, data, how, extra, rel, parallel):
    alone("--data_dir", data, how, "--grad_accum 4 --out_dir", tmp_path / "one")
    together("--data_dir", data, how, extra, "--grad_accum 2 --parallel", parallel, "--out_dir", tmp_path / "two")
    assert_same_losses(tmp_path / "one", tmp_path / "two", rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_losing_one_process_ends_the_run_soon_and_it_resumes_bit_for_bit(tmp_path, data, parallel, number):
    shared = ["--data_dir", data, "--parallel", parallel, "--dropout", 0.1, "--max_steps", 150]
    together(*shared, "--out_dir", tmp_path / "whole")
    process = launch(*shared, "--out_dir", tmp_path / "cut")
    while not (tmp_path / "cut" / "checkpoint.prev.pt").exists():
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    began = time.monotonic()
    os.kill(int(children.split()[-1]), number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 40
    # one line of ours; torchrun adds its own account
    assert "--resume --out_dir" in errors and 'train.py", line' not in errors
    if number == signal.SIGTERM:
        assert errors.count("stopped by SIGTERM") == 1
        assert "saved; go on with: torchrun --nproc_per_node 2 train.py" in errors
    assert load_checkpoint(tmp_path / "cut")[1]["step"] < 150
    together("--resume", "--out_dir", tmp_path / "cut")
    (_, whole), (_, cut) = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "cut")
    assert whole["step"] == cut["step"] == 150
    torch.testing.assert_close(cut["model"], whole["model"], rtol=0, atol=0)


@pytest.mark.slow
@mistakes("""
--learning_rate 1e18 --warmup_steps 0 => stopped before the update
--n_embd 30 => error: n_embd 30 is not divisible
""")
def test_two_processes_stop_with_one_message(tmp_path, data, given, why):
    process = launch("--data_dir", data, given, "--out_dir", tmp_path / "r")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.count(why) == 1


def test_micro_batches_that_cannot_be_shared_are_refused(tmp_path, data, capsys, monkeypatch):
    alone("--data_dir", data, "--grad_accum", 4, "--max_steps", 1, "--out_dir", tmp_path / "r")
    as_one_of = lambda n: [monkeypatch.setattr(module, "ranks", lambda: (0, n)) for module in (train, runs)]
    monkeypatch.setattr(train, "join_processes", lambda: as_one_of(3))
    monkeypatch.setattr(train, "barrier", lambda: None)
    message = refused(capsys, train.main, "--resume --out_dir", tmp_path / "r")
    assert "4 micro-batches, which 3 processes cannot share equally" in message
    monkeypatch.setattr(train, "join_processes", lambda: as_one_of(2))
    message = refused(capsys, train.main, "--resume --grad_accum 4 --out_dir", tmp_path / "r")
    assert "this run has grad_accum 2, not 4" in message


def test_each_process_takes_the_gpu_of_its_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert options.choose_device("cpu").type == "cpu"
    if torch.cuda.device_count() < 2:
        for name in ("cuda", "cuda:0"):
            raises("'cuda:1' is not available", options.choose_device, name)
