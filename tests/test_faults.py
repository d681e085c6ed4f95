"""Kills, locks, damaged and hostile files: a run ends as if nothing had been, or one line says why not. Nothing in a
file is executed.
"""

import contextlib
import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import assert_same_run, metrics, refused, run

import sample
import train
from data.dataset import WindowSampler, open_dataset
from data.tokenizer import load_tokenizer, train_bpe
from experiments import torture
from checkpoint import OLD_FORMATS, load_checkpoint, save_checkpoint
from model import GPT, GPTConfig

# --- Checkpoints and their checksums


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
        with pytest.raises(ValueError, match="damaged.*checkpoint.prev.pt"):
            load_checkpoint(folder)


@pytest.mark.parametrize("format", OLD_FORMATS)
def test_a_run_saved_in_an_older_format_goes_on_bit_for_bit(folder, tmp_path, format):
    """Its optimizer numbers the parameters, and its config has a rope_scaling."""
    shutil.copytree(folder, tmp_path / "new")
    model, state = load_checkpoint(folder)
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in model.parameter_groups(0) for p in group["params"]]
    state["optimizer"]["state"] = {i: state["optimizer"]["state"][name] for i, name in enumerate(order)}
    for group in state["optimizer"]["param_groups"]:
        group["params"] = [order.index(name) for name in group["params"]]
    state["config"] = {
        name: value for name, value in state["config"].items() if name not in ("rope_frequencies", "compose")
    }
    state["config"]["rope_scaling"] = None
    torch.save({**state, "format": format}, folder / "checkpoint.pt")
    for resumed in (folder, tmp_path / "new"):
        train.main(["--resume", "--max_steps", "64", "--out_dir", str(resumed)])
    assert_same_run(folder, tmp_path / "new")


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize(
    "module,name", [(torch, "save"), (os, "fsync"), (os, "replace")], ids=["save", "fsync", "replace"]
)
def test_a_kill_at_any_call_of_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, module, name):
    model = GPT(GPTConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    original = getattr(module, name)
    for count in range(1, 8):
        folder, calls = tmp_path / str(count), []
        folder.mkdir()

        def killed_at_count(*args):
            calls.append(0)
            if len(calls) == count:
                if name == "save":
                    args[1].write(b"PK half a checkpoint")
                raise Killed
            return original(*args)

        monkeypatch.setattr(module, name, killed_at_count)
        done = 0
        with contextlib.suppress(Killed):
            for step in range(1, 5):
                save_checkpoint(folder, dict(model=model.state_dict(), config=vars(model.config), step=step))
                done = step
        monkeypatch.setattr(module, name, original)
        if done:
            assert load_checkpoint(folder)[1]["step"] in (done, done + 1)  # done + 1: killed after the last rename
            save_checkpoint(folder, dict(model=model.state_dict(), config=vars(model.config), step=9))
            assert load_checkpoint(folder)[1]["step"] == 9 and not (folder / "checkpoint.tmp").exists()


# --- Kills, a second process, NaN, clocks


def disturbed(tmp_path, data, steps, count):
    options = ["--preset", "tiny", "--max_steps", str(steps), "--save_every", "5", "--threads", "1", "--data_dir", data]
    train.main([*options, "--out_dir", str(tmp_path / "undisturbed")])
    return list(torture.kills(torture.Lab(tmp_path, options, random.Random(1), count)))


def test_a_run_killed_inside_its_saves_and_elsewhere_ends_as_undisturbed(tmp_path, data):
    rows = disturbed(tmp_path, data, 24, 3)
    assert rows and all(survived for *_, survived in rows), rows


@pytest.mark.slow
def test_a_run_killed_25_times_ends_as_undisturbed(tmp_path, data):
    rows = disturbed(tmp_path, data, 120, 25)
    assert rows and all(survived for *_, survived in rows), rows


@pytest.mark.slow
def test_every_fault_is_survived(tmp_path, data):
    options = ["--steps", "40", "--kills", "4", "--data_dir", data, "--results", str(tmp_path / "table.md")]
    assert torture.main(options) == 0, (tmp_path / "table.md").read_text()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_process_is_refused_while_the_first_lives_and_a_killed_one_leaves_no_lock(folder, data, capsys):
    pytest.importorskip("fcntl")
    script = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX)"
    script += "; print('held', flush=True); time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", script, str(folder / "run.lock")], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    before = contents(folder)
    for how in ([], ["--resume"], ["--overwrite"], ["--resume", "--max_steps", 61]):
        message = refused(capsys, train.main, "--preset", "tiny", "--data_dir", data, "--out_dir", folder, *how)
        assert "another process is at work in" in message
    assert contents(folder) == before
    first.kill()
    first.wait()
    train.main(["--resume", "--max_steps", "61", "--out_dir", str(folder)])
    assert load_checkpoint(folder)[1]["step"] == 61
    train.main(
        ["--resume", "--max_steps", "62", "--out_dir", str(folder)]
    )  # the lock went with the run, not with the process
    assert load_checkpoint(folder)[1]["step"] == 62


def test_a_run_killed_before_its_first_file_does_not_block_its_folder(tmp_path, data):
    (tmp_path / "r").mkdir()
    for name in ("run.lock", "config.json.tmp"):
        (tmp_path / "r" / name).write_text("{")
    run("--out_dir", tmp_path / "r", "--max_steps", 2, data=data)
    assert load_checkpoint(tmp_path / "r")[1]["step"] == 2


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
    monkeypatch.setattr(train.time, "time", clock)
    run(*SHORT, "--out_dir", tmp_path / "r", data=data)
    assert all(0 < line["tokens_per_second"] < math.inf for line in metrics(tmp_path / "r"))
    assert_same_run(tmp_path / "r", short)


# --- Hostile files. To cover another kind of file, add an entry to FILES: how one is made, and what opens it

DEEP = []
for _ in range(50):
    DEEP = [DEEP]
HOSTILE = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    7,
    2**31,
    2**62,
    -(2**63),
    10**12,
    10**300,
    0.5,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    1e-320,
    "",
    "mea",
    "cuda:99",
    "meta",
    "../../../x",
    "/etc/passwd",
    "\0",
    "x" * 10_000,
    "\x1b[2J",
    "\ud800",
    [],
    [1],
    [[1, 1], [2, 2]],
    {},
    {"file": 1},
    DEEP,
]


def places(value, path=()):
    """Paths of everything inside nested dicts and lists."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutate_document(document, rng, hostile=HOSTILE):
    """A copy with one to three places replaced, removed, nested, doubled or added to."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        depth = rng.randrange(1, 5)  # so that the few fields at the top are met as often as many tensors below
        candidates = [place for place in places(document) if len(place) <= depth]
        if not candidates:
            break
        *parents, last = rng.choice(candidates)
        target = document
        for key in parents:
            target = target[key]
        kind = rng.randrange(10)
        if kind < 6:
            target[last] = copy.deepcopy(rng.choice(hostile))  # a second change must not meet the first in it
        elif kind == 6:
            del target[last]
        elif kind == 7:
            target[last] = [target[last]] if rng.random() < 0.5 else {"x": target[last]}
        elif kind == 8 and isinstance(target, dict):
            target[rng.choice(["surprise", "../x", "__class__", "", "0"])] = copy.deepcopy(rng.choice(hostile))
        elif kind == 9 and type(target[last]) in (int, float):
            target[last] = target[last] * rng.choice([-1, 0, 2, 1000, 10**9])
    return document


def mutate_bytes(content, rng):
    """A copy with one to three stretches flipped, removed, repeated, zeroed or overwritten, or with its end cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not content:
            break
        at, length = rng.randrange(len(content)), rng.choice([1, 1, 4, 16, 200])
        part = content[at : at + length]
        kind = rng.randrange(6)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        else:
            content[at : at + length] = [b"", part * 2, bytes(len(part)), rng.randbytes(len(part))][kind - 2]
    return bytes(content)


def write_json(path, document):
    path.write_text(json.dumps(document))


def read_run(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def write_run(path, state):
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (path.parent / name).unlink(missing_ok=True)
    state = state if isinstance(state, dict) else {"state": state}
    save_checkpoint(path.parent, {name: value for name, value in state.items() if name != "format"})


def open_data(folder):
    dataset = open_dataset(folder)
    WindowSampler(dataset.train, 64).batch(3, 2)
    dataset.tokenizer.decode(dataset.train[:20])
    assert math.isfinite(dataset.bits_per_byte(1.0))


def open_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("query é \U0001f642")
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    tokenizer.decode([*ids, tokenizer.end_of_text, tokenizer.vocab_size - 1])


def make_data(folder, data, trained):
    shutil.copytree(data, folder, dirs_exist_ok=True)


def make_byte_tokenizer(folder, data, trained):
    shutil.copy(Path(data) / "tokenizer.json", folder)


def make_bpe_tokenizer(folder, data, trained):
    train_bpe([Path(__file__).read_text()], 300).save(folder)


def make_hf_tokenizer(folder, data, trained):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    state = dict(format=1, kind="hf", name="hf:small", end_of_text=3, tokenizer=json.loads(inner.to_str()))
    write_json(folder / "tokenizer.json", state)


# kind: (file, how a folder with one is made, how its document is read, how one is written, what opens the folder,
# hostile values)
FILES = {
    "data set": ("meta.json", make_data, None, write_json, open_data, HOSTILE),
    "byte tokenizer": ("tokenizer.json", make_byte_tokenizer, None, write_json, open_tokenizer, HOSTILE),
    "bpe tokenizer": ("tokenizer.json", make_bpe_tokenizer, None, write_json, open_tokenizer, HOSTILE),
    "Hugging Face tokenizer": ("tokenizer.json", make_hf_tokenizer, None, write_json, open_tokenizer, HOSTILE),
}


@contextlib.contextmanager
def bounded_memory(more=3 << 30):
    """An allocation beyond what the process has now and `more` fails, and is seen as the wrong exception."""
    resource = pytest.importorskip("resource")
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if Path("/proc/self/statm").exists()
        else 0
    )
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def opens_or_is_refused(opener, folder):
    """True if `opener` took what is in the folder, False for a documented exception; any other comes through."""
    try:
        opener(folder)
        return True
    except (ValueError, FileNotFoundError, OSError) as error:
        assert type(error) in (ValueError, FileNotFoundError) or isinstance(error, OSError), repr(error)
        return False


def tree(folder):
    return {path for path in folder.rglob("*")}


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FILES)
def test_mutated_documents_are_refused_or_harmless(tmp_path, data, trained, monkeypatch, capsys, kind, count):
    name, make, read, write, opener, hostile = FILES[kind]
    folder, rng, took = tmp_path / "hostile", random.Random(f"{kind} {count}"), 0
    folder.mkdir()
    make(folder, data, trained)
    document = read(folder) if read else json.loads((folder / name).read_text())
    kept = contents(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "save_picture", lambda path, draw: "")  # most of the time of a run of one step
    around = tree(tmp_path) | {Path(data)}
    with bounded_memory():
        for number in range(count):
            for other, content in kept.items():
                (folder / other).write_bytes(content)
            mutated = mutate_document(document, rng, hostile)
            write(folder / name, mutated)
            try:
                took += opens_or_is_refused(opener, folder)
            except BaseException as error:
                raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error
    assert took < 0.9 * count  # a mutation that nothing minds is the exception
    assert {path for path in tree(tmp_path) - around if path.parent != folder} == set()


@pytest.mark.parametrize("kind", FILES)
def test_mutated_bytes_are_refused_or_harmless(tmp_path, data, trained, monkeypatch, kind):
    name, make, _, _, opener, _ = FILES[kind]
    folder, rng = tmp_path / "hostile", random.Random(kind)
    folder.mkdir()
    make(folder, data, trained)
    whole = (folder / name).read_bytes()
    with bounded_memory():
        for number in range(150):
            mutated = mutate_bytes(whole, rng)
            (folder / name).write_bytes(mutated)
            try:
                opens_or_is_refused(opener, folder)
            except BaseException as error:
                raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        Call(os.system, "touch executed"),
        Call(eval, "open('executed', 'w')"),
        Call(os.mkdir, "executed"),
        Call(shutil.rmtree, "run"),
        Call(torch.load, "executed"),
        Call(bytearray, 10**12),
        Call(torch.zeros, 10**12),
        Call(torch.Tensor, 10**9),
        Call(getattr, "x", "y"),
    ],
    ids=lambda call: call.call[0].__name__,
)
def test_calls_in_a_checkpoint_are_not_made(folder, tmp_path, monkeypatch, capsys, call):
    monkeypatch.chdir(tmp_path)
    state = read_run(folder)
    for hostile in ({**state, "extra": call}, {**state, "model": {**state["model"], "norm.weight": call}}):
        write_run(folder / "checkpoint.pt", hostile)
        with bounded_memory():
            for main in ([train.main, "--resume", "--out_dir"], [sample.main, "--checkpoint"]):
                assert "damaged or not a checkpoint" in refused(capsys, *main, folder)
    assert not (tmp_path / "executed").exists() and folder.exists()


@pytest.mark.parametrize(
    "field,value",
    [
        ("n_layer", 10**9),
        ("vocab_size", 10**12),
        ("block_size", 10**12),
        ("n_embd", 2**20),
        ("intermediate_size", 2**20),
        ("head_dim", 2**20),
        ("n_head", 2**20),
        ("n_layer", 2**20),
        ("vocab_size", 2**20),
        ("n_layer", True),
        ("n_layer", 2.0),
        ("attention", ["mea"]),
        ("rope_theta", "ten"),
        ("rope_theta", math.nan),
        ("norm_eps", -1.0),
        ("dropout", math.inf),
        ("head_norm", 1),
        ("n_kv_head", [[1, 1], [1]]),
        ("n_kv_head", [["a", 1], [1, 1]]),
        ("embedding_multiplier", 0),
    ],
)
def test_a_config_that_no_tensor_bears_out_is_refused_before_anything_is_allocated(folder, capsys, field, value):
    state = read_run(folder)
    state["config"][field] = value
    write_run(folder / "checkpoint.pt", state)
    with bounded_memory(more=200 << 20):
        message = refused(capsys, sample.main, "--checkpoint", folder)
        assert "does not hold a whole model" in message
        assert refused(capsys, train.main, "--resume", "--out_dir", folder) == message
