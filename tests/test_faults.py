"""Kills, locks, damaged and hostile files: a run ends as if nothing had been, or one line says why not."""

import contextlib
import math
import os
import random
import shutil

import pytest
import torch
from filelock import FileLock
from helpers import arguments, raises, refused
from test_train import assert_same_run, metrics, run

import sample
import train
from experiments import torture
from checkpoint import load_checkpoint, save_checkpoint
from model import GPT, GPTConfig
from options import new_folder

# --- Folders and checkpoints are replaced whole, or stay


@pytest.mark.parametrize("failing", [{2}, {2, 3}], ids=["once", "put back, too"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch, failing, error):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old.txt").write_text("old")
    rename, calls = os.rename, []

    def fails(*paths):
        calls.append(paths)
        if len(calls) in failing:
            raise error
        rename(*paths)

    monkeypatch.setattr(os, "rename", fails)
    said = "No space left on device.*what was there before stays" if failing == {2} and error.args else None
    with pytest.raises(type(error), match=said), new_folder(tmp_path / "made", overwrite=True) as new:
        (new / "new.txt").write_text("new")
    (kept,) = tmp_path.iterdir()
    assert (kept / "old.txt").read_text() == "old" and [*kept.iterdir()] == [kept / "old.txt"]
    assert kept.name == "made" or len(failing) > 1


@pytest.fixture
def folder(tmp_path, trained):
    """A copy of a finished run: checkpoints of step 30 and 60."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def same_state(a, b):
    return a["step"] == b["step"] and all(torch.equal(a["model"][name], w) for name, w in b["model"].items())


def test_flipped_bits_and_truncations_are_found_and_the_checkpoint_before_named(folder):
    """Where a flip is not found (a date in the archive's directory), what is read is what was written."""
    path, rng = folder / "checkpoint.pt", random.Random(0)
    whole, state, found = path.read_bytes(), load_checkpoint(folder)[1], 0
    for bit in [rng.randrange(8 * len(whole)) for _ in range(60)]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert same_state(load_checkpoint(folder)[1], state)
        except ValueError as error:
            assert "damaged" in str(error) and "checkpoint.prev.pt" in str(error)
            found += 1
    assert found > 50
    for length in [rng.randrange(len(whole)) for _ in range(30)] + [len(whole) - 1, 0]:
        path.write_bytes(whole[:length])
        raises("damaged.*checkpoint.prev.pt", load_checkpoint, folder)


def test_a_run_with_settings_that_went_goes_on_bit_for_bit(folder, tmp_path, capsys):
    """Unset they said nothing; one that was set is named."""
    shutil.copytree(folder, tmp_path / "new")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for settings in (state["config"], state["options"]):
        settings |= dict(latent_dim=None, latent_rotated=False)
    for name in ("window", "final_rate", "teacher", "train_only", "freeze", "eval_data"):
        del state["options"][name]
    save_checkpoint(folder, state | dict(spikes=dict(count=0)))
    for resumed in (folder, tmp_path / "new"):
        train.main(["--resume", "--max_steps", "64", "--out_dir", str(resumed)])
    a, b = (load_checkpoint(run)[1] for run in (folder, tmp_path / "new"))
    assert same_state(a, b) and metrics(folder)[-1]["val_loss"] == metrics(tmp_path / "new")[-1]["val_loss"]
    state["config"]["latent_rotated"] = True
    save_checkpoint(folder, state)
    assert "unexpected keyword argument 'latent_rotated'" in refused(capsys, sample.main, "--checkpoint", folder)


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("module,name", [(torch, "save"), (os, "fsync"), (os, "replace")], ids=str)
def test_a_kill_at_any_call_of_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, module, name):
    model = GPT(GPTConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    state, original = dict(model=model.state_dict(), config=vars(model.config)), getattr(module, name)
    for count in range(1, 8):
        folder, calls, done = tmp_path / str(count), [], 0
        folder.mkdir()

        def killed_at_count(*args):
            calls.append(0)
            if len(calls) == count:
                if name == "save":
                    args[1].write(b"PK half a checkpoint")
                raise Killed
            return original(*args)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(module, name, killed_at_count)
            for step in range(1, 5):
                save_checkpoint(folder, {**state, "step": step})
                done = step
        if done:
            assert load_checkpoint(folder)[1]["step"] in (done, done + 1)  # done + 1: killed after the last rename
        save_checkpoint(folder, {**state, "step": 9})
        assert load_checkpoint(folder)[1]["step"] == 9 and not (folder / "checkpoint.tmp").exists()


# --- Kills, a second process, NaN, clocks


@pytest.mark.slow
def test_every_fault_is_survived(tmp_path, data):
    options = ["--steps", "40", "--kills", "4", "--data_dir", data, "--results", str(tmp_path / "table.md")]
    assert torture.main(options) == 0, (tmp_path / "table.md").read_text()


def test_a_second_process_is_refused_and_a_lock_that_was_left_is_no_lock(folder, data, capsys):
    contents = lambda: {path.name: path.read_bytes() for path in folder.iterdir()}
    with FileLock(folder / "run.lock"):
        before = contents()
        for how in ("", "--resume", "--overwrite"):
            message = refused(capsys, train.main, "--preset tiny --data_dir", data, "--out_dir", folder, how)
            assert "another process is at work in" in message
        assert contents() == before
    (folder / "run.lock").touch()
    for steps in (61, 62):  # the lock goes with the run, not with the process
        train.main(arguments("--resume --max_steps", steps, "--out_dir", folder))
        assert load_checkpoint(folder)[1]["step"] == steps


SHORT = ["--max_steps", 8, "--save_every", 2, "--eval_every", 4]


@pytest.fixture(scope="module")
def short(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("short") / "run"
    run(*SHORT, "--out_dir", folder, data=data)
    return folder


def test_a_gradient_that_is_nan_stops_the_run_before_the_update(tmp_path, data, short, capsys, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def spoiled(parameters, *args):
        parameters = list(parameters)
        calls.append(0)
        if len(calls) == 6:
            parameters[3].grad.view(-1)[-1] = math.nan
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    with pytest.raises(SystemExit) as stopped:
        run(*SHORT, "--out_dir", tmp_path / "cut", data=data)
    message = capsys.readouterr().err
    assert stopped.value.code == 1 and "gradient norm nan at step 6: stopped before the update" in message
    assert f"the last good checkpoint is {tmp_path / 'cut' / 'checkpoint.pt'}" in message
    train.main(["--resume", "--out_dir", str(tmp_path / "cut")])  # the fault was the machine's: it does not come back
    assert_same_run(short, tmp_path / "cut")


@pytest.mark.parametrize("tick", [0.0, -0.5])
def test_a_clock_that_stands_still_or_runs_backwards_changes_nothing(tmp_path, data, short, monkeypatch, tick):
    now = [1e9]

    def clock():
        now[0] += tick
        return now[0]

    monkeypatch.setattr(train.time, "monotonic", clock)
    run(*SHORT, "--out_dir", tmp_path / "r", data=data)
    assert all(0 < line["tokens_per_second"] < math.inf for line in metrics(tmp_path / "r"))
    assert_same_run(tmp_path / "r", short)


# --- Hostile files


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CALLS = [Call(os.system, "touch executed"), Call(eval, "open('executed', 'w')"), Call(shutil.rmtree, "run")]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.call[0].__name__)
def test_calls_in_a_checkpoint_are_not_made(folder, tmp_path, monkeypatch, capsys, call):
    monkeypatch.chdir(tmp_path)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for hostile in ({**state, "extra": call}, {**state, "model": {**state["model"], "norm.weight": call}}):
        save_checkpoint(folder, hostile)
        for main in ([train.main, "--resume", "--out_dir"], [sample.main, "--checkpoint"]):
            assert "damaged or not a checkpoint (pickled code is never run)" in refused(capsys, *main, folder)
    assert not (tmp_path / "executed").exists() and folder.exists()


@pytest.mark.parametrize("field,value", [("n_layer", 3), ("vocab_size", 2**20), ("attention", ["mea"]), ("dropout", 2)])
def test_a_config_that_does_not_go_with_the_weights_is_refused_in_one_line(folder, capsys, field, value):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["config"][field] = value
    save_checkpoint(folder, state)
    message = refused(capsys, sample.main, "--checkpoint", folder)
    assert "does not hold a whole model" in message
    assert refused(capsys, train.main, "--resume", "--out_dir", folder) == message
