"""Training: schedules, steps, resuming bit for bit, signals, faults, and every wrong option in one line."""

import contextlib
import importlib.util
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import arguments, mistakes, refused

import kernels
import model as gpt
import options
import runs
import sample
import train
from data.dataset import open_dataset
from data.prepare import prepare
from data.sampler import Turns, validation_windows
from checkpoint import load_checkpoint, save_checkpoint
from experiments import torture
from experiments.family import FAMILY
from options import parse_options

ROOT = Path(__file__).resolve().parent.parent


TINY = "--preset tiny --threads 1 --device cpu"

# what runs are made of: one of the family, the one that does most, stands for those that share its code
TRAINED = [name for name in gpt.ATTENTION if name not in FAMILY or name == "dcmha"]


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
    assert {*"step tokens train_loss learning_rate grad_norm tokens_per_second".split()} <= set(lines[0])
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


@contextlib.contextmanager
def killed_after_saving(step, monkeypatch):
    """The run inside ends as soon as its checkpoint of that step is written."""

    def save_then_die(folder, state):
        save_checkpoint(folder, state)
        if state["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_checkpoint", save_then_die)
        yield


@pytest.mark.parametrize("attention", TRAINED)
def test_resuming_is_bit_exact(tmp_path, data, attention, monkeypatch):
    options = f"--attention {attention} --dropout 0.1 --grad_accum 2 --batch_size 4"
    options = [options, "--max_steps 12 --save_every 4 --eval_every 5"]
    run(*options, "--out_dir", tmp_path / "whole", data=data)

    with killed_after_saving(8, monkeypatch):
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
    longer = refused(capsys, train.main, *again, "--block_size 128 --out_dir", tmp_path / "longer")
    assert "has block_size 64, not 128" in longer
    content = json.loads((tmp_path / "again" / "config.json").read_text())  # what is recorded is the model's own shape
    assert {name: content["options"][name] for name in content["model"]} == content["model"]
    train.main(arguments("--resume --n_layer 2 --max_steps 3 --out_dir", tmp_path / "again"))
    other = refused(capsys, train.main, "--resume --n_layer 4 --max_steps 4 --out_dir", tmp_path / "again")
    assert "this run has n_layer 2, not 4" in other


def test_tied_embeddings_stay_tied(tmp_path, data):
    """In a run from weights and in one that goes on: one matrix is trained, and saved as both."""
    run("--tie_embeddings --max_steps 2 --out_dir", tmp_path / "a", data=data)
    model, state = load_checkpoint(tmp_path / "a")
    save_checkpoint(tmp_path / "a", state | dict(model=model.state_dict()))  # as compress.py saves it
    run("--init_from", tmp_path / "a", "--max_steps 2 --out_dir", tmp_path / "b", data=data)
    train.main(["--resume", "--max_steps", "4", "--out_dir", str(tmp_path / "b")])
    for folder in (tmp_path / "a", tmp_path / "b"):
        weights = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
        assert torch.equal(weights["lm_head.weight"], weights["embed_tokens.weight"])
    model, state = load_checkpoint(tmp_path / "b")
    assert len(state["optimizer"]["state"]) == len(list(model.parameters()))


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
    run("--out_dir", tmp_path / "r", "--max_steps 6 --warmup_steps 1", data=data)
    train.main(["--resume", "--max_steps", "9", "--out_dir", str(tmp_path / "r")])
    assert len(metrics(tmp_path / "r")) == 9 and "this run's cosine schedule had ended" in capsys.readouterr().out
    run("--out_dir", tmp_path / "r", "--max_steps", 2, "--seed", 1, "--overwrite", data=data)
    assert len(metrics(tmp_path / "r")) == 2 and load_checkpoint(tmp_path / "r")[1]["options"]["seed"] == 1


# --- Faults


def launch(*options, data, cwd, env=None):
    command = [sys.executable, ROOT / "train.py", *arguments(TINY, "--data_dir", data, *options)]
    heard = lambda: [signal.signal(number, signal.SIG_DFL) for number in train.SIGNALS]  # whatever pytest was told
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    return subprocess.Popen(command, cwd=cwd, **how, preexec_fn=None if os.name == "nt" else heard)


UNDISTURBED = "--max_steps 80 --save_every 5 --eval_every 40"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(UNDISTURBED, "--out_dir", folder, data=data)
    return folder


@pytest.mark.parametrize("number", [*train.SIGNALS, signal.Signals(9)], ids=str)
def test_a_stopped_or_killed_run_goes_on_where_it_was(tmp_path, data, undisturbed, number):
    process = launch(UNDISTURBED, "--out_dir", tmp_path / "cut", data=data, cwd=tmp_path)
    while not (tmp_path / "cut" / "checkpoint.prev.pt").exists():
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == 9:
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
    resource = pytest.importorskip("resource")
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
    how = [TINY, "--data_dir", data, "--max_steps 4 --save_every 2 --out_dir", tmp_path / "r"]
    assert "still the one from before" in refused(capsys, train.main, *how, silent=False)
    assert load_checkpoint(tmp_path / "r")[1]["step"] == 2


@mistakes("""
--n_heads 4 => unrecognized arguments: --n_heads
--attention linear => choose from
--max_steps many => invalid int value: 'many'
--compile perhaps => neither yes nor no
--n_embd 30 => n_embd 30 is not divisible by n_head 4
--attention dfa --n_head 3 --n_embd 24 => dfa pairs its heads: n_head 3
--attention mha --n_kv_head 3 => must divide n_head 4
--learning_rate nan => learning_rate must be above 0
--max_steps 0 => max_steps must be at least 1, not 0
--seed 9223372036854775808 => seed must be below 2**63 in size
--beta2 1 => beta2 must be at least 0 and below 1
--data_dir nowhere => no data set at nowhere
--block_size 1000000 => too few for block_size 1000000
--kernel fast => choose from
--device quantum => device 'quantum' is not available
--resume => no checkpoint at
--preset heal => preset heal goes on from a model: say which with --init_from
--train_only q_projection => no parameter has 'q_projection' in its name
--freeze e => leave nothing to train
--window 65 => window must be at most the model's block_size 64, not 65
--teacher nowhere => no checkpoint at nowhere
--data_dir , => must name a prepared data set
--final_rate 2 => final_rate must be at least 0 and at most 1
--resume --overwrite => give one of them
--init_from nowhere => no checkpoint at nowhere
""")
def test_bad_options_are_refused_in_one_line_before_any_work(tmp_path, data, capsys, given, why):
    assert why in refused(capsys, train.main, TINY, "--data_dir", data, "--out_dir", tmp_path / "r", given)
    assert not (tmp_path / "r").exists()


def test_a_folder_that_holds_a_run_is_left_alone(trained, data, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    base = [TINY, "--data_dir", data, "--out_dir", trained]
    assert "already holds a run: give --resume" in refused(capsys, train.main, *base)
    changed = refused(capsys, train.main, *base, "--resume --learning_rate 0.1")
    assert "this run has learning_rate 0.003, not 0.1" in changed
    fewer = refused(capsys, train.main, "--resume --max_steps 5 --out_dir", trained)
    assert "this run has done 60 steps: max_steps must be at least as many, not 5" in fewer
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_data_that_does_not_go_with_the_checkpoint_is_refused(tmp_path, data, trained, capsys):
    (tmp_path / "other.txt").write_text("quite another text, long enough for a block " * 200)
    for tokenizer in ("byte", "bpe"):
        prepare(source=str(tmp_path / "other.txt"), tokenizer=tokenizer, out_dir=tmp_path / tokenizer)
    message = refused(capsys, train.main, "--resume", "--out_dir", trained, "--data_dir", tmp_path / "byte")
    assert "is not the data set this run was trained on" in message
    new = ["--out_dir", tmp_path / "new", "--init_from", trained, "--data_dir"]
    assert "made with another tokenizer" in refused(capsys, train.main, *new, tmp_path / "bpe")
    assert "has n_layer 2, not 3: leave it out" in refused(capsys, train.main, *new, tmp_path / "byte", "--n_layer", 3)
    for how in (["--data_dir", f"{data},{tmp_path / 'bpe'}"], ["--data_dir", data, "--eval_data", tmp_path / "bpe"]):
        said = refused(capsys, train.main, TINY, *how, "--out_dir", tmp_path / "r")
        assert "another tokenizer than" in said and "prepare it again" in said
    with open(tmp_path / "byte" / "train.bin", "r+b") as file:
        file.truncate(100)
    assert "truncated" in refused(capsys, train.main, *new, tmp_path / "byte")


# --- Healing and fine-tuning: the same loop


@pytest.fixture(scope="module")
def several(tmp_path_factory, data):
    """(two data sets and a third of the same tokenizer, folders with commas between them; a model that teaches)."""
    folder = tmp_path_factory.mktemp("several")
    for name, text in (("upper", "HEAD KEY VALUE "), ("digits", "0123 4567 89 "), ("seen", "norm rope ")):
        (folder / f"{name}.txt").write_text(text * 1200)
        prepare(source=str(folder / f"{name}.txt"), tokenizer=data, out_dir=folder / name)
    run("--attention mha --max_steps 20 --out_dir", folder / "teacher", data=data)
    return f"{data},{folder / 'upper'},{folder / 'digits'}", folder / "seen", folder / "teacher"


def heal(several, out, *options):
    texts, seen, teacher = several
    how = ["--init_from", teacher, "--attention mea --head_norm no --teacher", teacher, "--eval_data", seen]
    how += ["--freeze k_proj,v_proj --window 24 --out_dir", out]
    train.main(arguments(TINY, "--data_dir", texts, *how, *options))


HEALING = "--max_steps 8 --save_every 2 --eval_every 4 --final_rate 0 --warmup_steps 1 --dropout 0.1"


def test_a_healing_run_that_is_cut_goes_on_bit_for_bit(tmp_path, several, monkeypatch, capsys):
    """With a teacher, frozen weights, several texts, another window, and dropout."""
    heal(several, tmp_path / "whole", HEALING)
    said = capsys.readouterr().out
    assert "towards the predictions of" in said and "of which" in said and "KL" in said and "  loss " not in said

    with killed_after_saving(4, monkeypatch):
        heal(several, tmp_path / "cut", HEALING)
    torch.manual_seed(99)
    train.main(["--resume", "--out_dir", str(tmp_path / "cut")])
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    before, after = (load_checkpoint(folder)[0].state_dict() for folder in (several[2], tmp_path / "whole"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("k_proj" in name or "v_proj" in name for name in moved)
    lines = metrics(tmp_path / "whole")
    assert lines[0]["tokens"] == 8 * 24 and "train_loss" not in lines[0] and lines[-1]["train_kl"] >= 0
    names = ["set", "upper", "digits", "seen"]
    each = [lines[-1][f"val_loss/{name}"] for name in names]
    assert lines[-1]["val_loss"] == pytest.approx(sum(each[:3]) / 3)  # of what is trained on, not of eval_data
    assert lines[-1]["learning_rate"] < 0.1 * lines[1]["learning_rate"]
    assert load_checkpoint(tmp_path / "whole")[0].config.block_size == 64  # the model's, whatever the window


def test_a_run_that_is_given_more_to_measure_still_draws_its_losses(tmp_path, several, data, capsys):
    run("--max_steps 2 --eval_every 2 --out_dir", tmp_path / "run", data=data)
    train.main(arguments("--resume --max_steps 4 --eval_data", several[1], "--out_dir", tmp_path / "run"))
    assert "val_loss/seen" in metrics(tmp_path / "run")[-1]
    assert not importlib.util.find_spec("matplotlib") or "no loss.png" not in capsys.readouterr().out


def test_a_resumed_run_wants_its_own_teacher_and_data_sets(tmp_path, several, data, capsys):
    heal(several, tmp_path / "r", "--max_steps 2")
    shutil.copytree(several[2], tmp_path / "moved")
    train.main(arguments("--resume --max_steps 3 --teacher", tmp_path / "moved", "--out_dir", tmp_path / "r"))
    run("--attention mha --max_steps 2 --seed 3 --out_dir", tmp_path / "another", data=data)
    wrong = ["--resume --max_steps 4 --teacher", tmp_path / "another", "--out_dir", tmp_path / "r"]
    assert "is not the teacher that this run began with" in refused(capsys, train.main, *wrong)
    one, *rest = several[0].split(",")
    reordered = ["--resume --max_steps 7 --data_dir", ",".join([*rest, one]), "--out_dir", tmp_path / "r"]
    assert "is not the data set this run was trained on" in refused(capsys, train.main, *reordered)


def test_distillation_moves_the_model_towards_its_teacher(tmp_path, several, data):
    run("--attention mha --max_steps 1 --seed 5 --out_dir", tmp_path / "pupil", data=data)
    how = ["--init_from", tmp_path / "pupil", "--teacher", several[2], "--max_steps 30 --eval_every 30"]
    before = (several[2] / "checkpoint.pt").read_bytes()
    run(*how, "--out_dir", tmp_path / "taught", data=data)
    lines = metrics(tmp_path / "taught")
    assert lines[-1]["train_kl"] < 0.3 * lines[0]["train_kl"] and (several[2] / "checkpoint.pt").read_bytes() == before


def test_a_kl_divergence_is_the_formula(trained):
    model, _ = load_checkpoint(trained)
    teacher, _ = load_checkpoint(trained)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.3)
    x = torch.randint(257, (2, 10))
    p, q = (m(x)[0].double().softmax(-1) for m in (teacher, model))
    kl = (p * (p / q).log()).sum(-1).mean()
    assert train.training_loss(model, x, None, teacher).item() == pytest.approx(kl.item(), rel=1e-4)
    assert train.training_loss(model, x, None, model).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("chosen", ["--train_only self_attn", "--train_only compose_", "--freeze self_attn,norm", ""])
def test_only_what_is_named_moves(tmp_path, trained, data, chosen):
    run("--init_from", trained, "--max_steps 3", chosen, "--out_dir", tmp_path / "r", data=data)
    before, after = load_checkpoint(trained)[0].state_dict(), load_checkpoint(tmp_path / "r")[0].state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    how, names = (chosen or "--train_only e").split()
    named = {name for name in before if any(part in name for part in names.split(","))}
    assert moved == (named if how == "--train_only" else before.keys() - named)


def test_windows_are_spread_evenly_over_several_texts():
    texts = [np.arange(start, start + 200, dtype=np.uint16) for start in (0, 1000, 2000)]
    alone = [Turns([text], 16, 5).batch(0, 4) for text in texts]
    x, y = Turns(texts, 16, 5, start=(7,)).batch(0, 9)
    assert (x[:, 1:] // 1000 == np.arange(9)[:, None] % 3).all() and (x[:, 0] == 7).all()
    for text, (inputs, targets) in enumerate(alone):
        assert (x[text::3, 1:] == inputs[:3, 1:]).all() and (y[text::3] == targets[:3]).all()
    later = Turns(texts, 16, 5).batch(1, 3)  # the next rows, not the same again
    assert (later[1] == y[3:6]).all()
    ranks = [Turns(texts, 16, 5).batch(0, 2, rank=rank, world_size=2, micro_step=1, grad_accum=2) for rank in (0, 1)]
    assert (np.concatenate([y for _, y in ranks]) == y[4:8]).all()


# --- What a run records, and says when it goes on


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("step", [3, 12, 19, 20])
def test_a_rate_that_goes_up_again_is_said(capsys, schedule, step):
    saved = train.Options(max_steps=20, warmup_steps=5, schedule=schedule)
    state = dict(optimizer=0, options=asdict(saved), step=step, rng=0, data=0)
    o = runs.resumed_options(train.Options(max_steps=40), {"max_steps", "resume"}, state, "r")
    rises = runs.learning_rate(o, step) > 1.001 * max(runs.learning_rate(saved, s) for s in (step - 1, step))
    assert ("the learning rate goes up again" in capsys.readouterr().out) == rises
    assert rises == (schedule == "cosine" and step > 5 or schedule == "wsd" and step > 16)


def test_printed_commands_can_be_pasted(monkeypatch, capsys):
    monkeypatch.setattr(runs, "save_picture", lambda *_: "picture")
    model = SimpleNamespace(config=SimpleNamespace(block_size=64, attention="mea"))
    model.eval = lambda: SimpleNamespace(generate=lambda *_, **__: [[1]])
    tokenizer = SimpleNamespace(encode=lambda _: [0], decode=lambda _: "")
    texts = SimpleNamespace(meta=dict(source="notes"), tokenizer=tokenizer)
    for out, folder in (("out/my run", "data/my notes"), ("~/runs/x", "data/python"), ("out/$x;y", "a,b c")):
        runs.show_end(train.Options(out_dir=out, data_dir=folder), texts, model, time.monotonic())
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python")]
        sample, other, longer = (shlex.split(line, comments=True) for line in lines)
        assert out in sample and out in longer and (folder in other or folder == runs.DEFAULT_DATA)
        assert not any(" ~" in line for line in lines)


def test_a_path_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    words = ["--out_dir=~/runs/x", "--data_dir=~/a,b~,~/c", "--teacher", "a/~"]
    o, _ = parse_options(train.Options, words, train.PRESETS)
    assert (o.out_dir, o.data_dir) == (f"{tmp_path}/runs/x", f"{tmp_path}/a,b~,{tmp_path}/c") and o.teacher == "a/~"
    assert parse_options(sample.Options, ["--prompt", "~/x"])[0].prompt == "~/x"
    assert options.expand_home("hf:~/model") == f"hf:{tmp_path}/model"


# --- Signals


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.caught_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            assert caught == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_same_signal_again_within_a_second_is_the_same_signal(monkeypatch):
    """torchrun passes on what its processes have got already; only a later one ends the process in the middle."""
    ended = []
    monkeypatch.setattr(train.os, "_exit", ended.append)
    with train.caught_signals(repeats=0.2) as caught:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert caught == [signal.SIGTERM] and ended == []
        time.sleep(0.25)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]


# --- Machines


def test_schedulers_that_say_how_many_there_are_do_not_make_a_run_wait(tmp_path, data, monkeypatch):
    """Kubernetes and Slurm set WORLD_SIZE where nothing has to be joined."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    run("--max_steps 1 --out_dir", tmp_path / "r", data=data)
    sample.main(arguments("--checkpoint", tmp_path / "r", "--max_new_tokens 2 --device auto"))


def test_a_model_too_large_for_memory_ends_in_one_line_and_leaves_no_folder(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr(train, "training_loss", lambda *_: torch.empty(2**60))
    said = refused(capsys, train.main, TINY, "--data_dir", data, "--out_dir", tmp_path / "r", silent=False)
    assert "out of memory: a smaller --batch_size" in said and not (tmp_path / "r").exists()


def test_compiling_without_a_compiler_ends_in_one_line_and_leaves_no_folder(tmp_path, data):
    process = launch(
        "--compile --out_dir", tmp_path / "r", data=data, cwd=tmp_path, env=dict(os.environ, CXX="no-such")
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and errors.count("\n") == 1 and "leave --compile out" in errors
    assert not (tmp_path / "r").exists()


def test_a_backend_of_pictures_that_is_not_there_does_not_matter(tmp_path, data):
    environment = dict(os.environ, MPLBACKEND="module://x")
    process = launch("--max_steps 1 --out_dir", tmp_path / "r", data=data, cwd=tmp_path, env=environment)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in errors and "Done in" in out


def test_a_run_needs_nothing_that_windows_lacks(tmp_path, data):
    """No `resource`, no SIGHUP, no symlinks, no Triton, a console that shows cp1252."""
    code = f"""
import os, signal, sys
sys.modules["resource"] = sys.modules["triton"] = None
sys.stdout.reconfigure(errors="replace")  # as run_program does
del signal.SIGHUP, os.symlink
sys.path.insert(0, {str(ROOT)!r})
import train
train.main({arguments(TINY, "--data_dir", data, "--max_steps 2 --out_dir", tmp_path / "r")!r})
train.main(["--resume", "--max_steps", "3", "--out_dir", {str(tmp_path / "r")!r}])
import sample
sample.main(["--checkpoint", {str(tmp_path / "r")!r}, "--max_new_tokens", "3"])
"""
    environment = dict(os.environ, PYTHONIOENCODING="cp1252")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "r")[1]["step"] == 3


def test_a_file_that_another_program_holds_open_is_replaced_a_little_later(tmp_path, monkeypatch):
    """As on Windows, where a virus scanner's open file refuses the rename."""
    tries, replace = [], os.replace

    def refuse_twice(*names):
        tries.append(names)
        if len(tries) < 3:
            raise PermissionError(13, "in use")
        replace(*names)

    (tmp_path / "a").write_text("new")
    monkeypatch.setattr(options.os, "replace", refuse_twice)
    with pytest.raises(PermissionError):
        options.replace_file(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(options, "WINDOWS", True)
    options.replace_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


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


@pytest.mark.parametrize("attention", TRAINED)
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
        keep = lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage()}) or t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.train()(x, y)
        sizes = [storage.nbytes() for pointer, storage in kept.items() if pointer not in weights]
        saved[model.activation_checkpointing] = sum(sizes)
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
@pytest.mark.parametrize("attention", TRAINED)
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
    monkeypatch.setattr(kernels, "triton", None)
    for main, where in ((sample.main, base), (train.main, ["--data_dir", data, "--out_dir", tmp_path / "new"])):
        assert "kernel 'triton' cannot run here" in refused(capsys, main, *where, "--kernel", "triton")
    assert not (tmp_path / "new").exists()
    shutil.copy(trained / "checkpoint.pt", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refused(capsys, sample.main, "--checkpoint", tmp_path)


def test_the_readmes_main_command_runs_end_to_end(tmp_path):
    """Nothing but the repository: prepares the default data set, trains, samples, and says what to try next."""
    command = [sys.executable, ROOT / "train.py", *arguments("--preset tiny --max_steps 10 --threads 1")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = "preparing the default data set|(1 threads)|ETA|bits per byte|A sample:|python sample.py --checkpoint"
    assert all(words in done.stdout for words in said.split("|"))
    assert (tmp_path / "data/python/train.bin").exists()
    readme = (ROOT / "README.md").read_text()
    assert all(f"pip install -r requirements.txt && {command}" in readme for command in ("python train.py", "pytest"))
