"""What README.md, the report and the other files for readers say can be done: it is done here, in a cut-down form."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from helpers import refused

import attention
import model as gpt
import options
import sample
import train
from checkpoint import load_checkpoint
from data import prepare
from experiments.optimisers import code_blocks, shown_optimizer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "experiments/README.md", "CONTRIBUTING.md"]
PROGRAMS = {"train.py": train.main, "sample.py": sample.main, "data/prepare.py": prepare.main}
SHORT = "--preset tiny --max_steps 2 --warmup_steps 1 --eval_windows 4 --threads 1 --device cpu --dtype float32".split()


@pytest.fixture
def reader(tmp_path, trained, monkeypatch):
    """A folder as a reader has it: notes of their own, and a run in out/small."""
    (tmp_path / "my_notes").mkdir()
    for name in DOCUMENTS:
        (tmp_path / "my_notes" / name.replace("/", "-")).write_text((ROOT / name).read_text())
    shutil.copytree(trained, tmp_path / "out/small")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_commands(section, data=None):
    """Run the commands of a section of README.md; training is short, on `data` where they name no data set."""
    for line in "".join(code_blocks(section, language="")).splitlines():
        _, program, *argv = shlex.split(line, comments=True)
        if program == "train.py":
            argv += SHORT + ([] if "--data_dir" in argv else ["--data_dir", data])
        if program == "data/prepare.py" and "--out_dir" not in argv:
            argv += ["--out_dir", "data/my_notes"]  # by default beside the program
        if program == "sample.py":
            argv += ["--max_new_tokens", "3", "--device", "cpu"]
        if "gpt2" not in argv:  # a download
            PROGRAMS[program](argv)


def test_your_own_attention(reader, data, monkeypatch, capsys):
    monkeypatch.delitem(attention.ATTENTION, "gated")
    exec(code_blocks("Your own attention")[0], vars(attention).copy())
    run_commands("Your own attention", data)
    assert load_checkpoint("out/gated")[0].config.attention == "gated"
    assert capsys.readouterr().out.splitlines()[-1].startswith("def")


def test_your_own_data(reader, capsys):
    run_commands("Your own data")
    assert load_checkpoint("out/notes")[1]["step"] == 2
    assert (reader / "out/tuned/tokenizer.json").read_text() == (reader / "out/small/tokenizer.json").read_text()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("tied", [False, True])
def test_your_own_optimiser_has_every_parameter_once(tied):
    model = GPT(GPTConfig(vocab_size=300, n_layer=2, n_embd=32, n_head=4, tie_embeddings=tied))
    optimizer = shown_optimizer()(model.parameter_groups(0.1), 1e-2)
    names = {id(p): name for name, p in model.named_parameters()}
    first, *others = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(first + sum(others, [])) == sorted(names.values())
    assert sorted(first) == sorted(name for name in names.values() if name.endswith("_proj.weight"))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_your_own_optimiser_trains_and_resumes_bit_for_bit(reader, data, monkeypatch):
    monkeypatch.setattr(train, "make_optimizer", shown_optimizer())
    how = [*SHORT, "--data_dir", data, "--schedule", "constant"]
    train.main([*how, "--max_steps", "6", "--out_dir", "out/whole"])
    train.main([*how, "--max_steps", "3", "--out_dir", "out/parts"])
    train.main(["--resume", "--max_steps", "6", "--out_dir", "out/parts"])
    whole, parts = (load_checkpoint(f"out/{name}")[1]["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_watch_it(reader, data, package, capsys, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main([*SHORT, "--data_dir", data, "--log", package, "--out_dir", "out/watched"])
    lines = [json.loads(line) for line in Path("out/watched/metrics.jsonl").read_text().splitlines()]
    if package == "wandb":
        assert [*Path("out/watched/wandb").glob("offline-run-*/*.wandb")]
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("out/watched/tensorboard").Reload()
    shown = [event.value for event in events.Scalars("train_loss")]
    assert shown == pytest.approx([line["train_loss"] for line in lines], rel=1e-6)


def test_a_log_whose_package_is_missing_is_refused_before_any_work(reader, data, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(capsys, train.main, *SHORT, "--data_dir", data, "--log wandb --out_dir out/watched")
    assert said == "error: log wandb needs a package: pip install wandb" and not Path("out/watched").exists()


def test_programs_name_their_picture_or_how_to_get_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert options.save_picture(tmp_path / "loss.png", None) == "no loss.png: pip install matplotlib"
    pytest.importorskip("matplotlib")
    line = options.save_picture(tmp_path / "loss.png", lambda plt: plt.figure())
    assert line == f"picture: {tmp_path / 'loss.png'}" and (tmp_path / "loss.png").exists()


def test_model_py_says_what_each_attention_costs(capsys):
    gpt.main(["--preset", "tiny", "--vocab_size", "300"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    costs = {row[0]: row[1:] for row in rows if len(row) == 6 and row[0] in attention.ATTENTION}
    config = GPTConfig(vocab_size=300, attention="mea", **gpt.PRESETS["tiny"])
    assert set(costs) == set(attention.ATTENTION)
    assert costs["mea"][:2] == [f"{GPT(config).n_params():,}", f"{config.flops_per_token():,}"]
    assert costs["mea"][2] == f"{config.kv_bytes_per_token(torch.bfloat16):,}"


def commands():
    """[(document, program, its options)] of every command line in the documents."""
    found = set()
    for document in DOCUMENTS:
        text = re.sub(r"\\\n", " ", (ROOT / document).read_text())
        for program, rest in re.findall(r"\b(?:python|torchrun .*?) ([\w/]+\.py)((?: [^\n`#&|]*)?)", text):
            found.add((document, program, tuple(re.findall(r"--(\w+)", rest))))
    return sorted(found)


@pytest.mark.parametrize("document,program,given", commands(), ids=lambda value: str(value).replace("/", "."))
def test_every_command_names_options_that_there_are(document, program, given, monkeypatch, capsys):
    assert (ROOT / program).exists()
    if not given:
        return
    with pytest.raises(SystemExit):
        importlib.import_module(program.removesuffix(".py").replace("/", ".")).main(["--help"])
    known = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    if "train.py" in (ROOT / program).read_text():  # what a program does not know goes there
        known |= set(vars(train.Options()))
    assert set(given) <= known


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        path = ((ROOT / document).parent / file).resolve() if file else ROOT / document
        assert path.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/pictures").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_drawings_for_light_and_dark(path):
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg") and root.find("{*}title").text
    assert "prefers-color-scheme: dark" in path.read_text()
    assert path.name in (ROOT / "README.md").read_text() + (ROOT / "experiments/README.md").read_text()


def test_the_walkthrough_is_committed_as_it_ran():
    notebook = json.loads((ROOT / "experiments/walkthrough.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    assert str(ROOT) not in json.dumps(notebook)


@pytest.mark.slow
def test_the_walkthrough_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "experiments/walkthrough.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("out/walkthrough", str(tmp_path / "out"))
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT / "experiments")}})
    client.execute()
    checks = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]
    assert sum(text.startswith("right:") for text in checks) == 3


@pytest.mark.parametrize("program", ["functional.py", "model.py"])
def test_a_reader_that_goes_away_is_no_error(program):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-u", ROOT / program], **pipes) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
