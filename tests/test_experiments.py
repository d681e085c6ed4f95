"""The sweep: what it concludes from made-up runs, what it resumes, real runs of seconds; and the benchmarks' tables."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import mistakes, refused

import options
import train
from experiments import bench, compression, engines, minutes, ranking, report, roofline, sweep
from huggingface import to_pretrained
from model import GPT, GPTConfig


@pytest.mark.parametrize("alpha", [0.1, 0.35, 0.9])
@pytest.mark.parametrize("L_0", [0.0, 1.7])
def test_the_fit_recovers_the_constants_of_a_noisy_curve_with_spikes(alpha, L_0):
    tokens = np.arange(1, 301) * 2048.0
    D_c = tokens[-1] * 0.4 ** (1 / alpha)
    true = lambda D: (D_c / D) ** alpha + L_0
    exact = sweep.fit_power_law(tokens, true(tokens))
    assert exact["alpha"] == pytest.approx(alpha, rel=0.02) and exact["L_0"] == pytest.approx(L_0, abs=0.02)
    assert exact["D_c"] == pytest.approx(D_c, rel=0.1)
    losses = true(tokens) + 0.005 * np.random.default_rng(0).standard_normal(len(tokens))
    losses[[60, 200, 201]] += 4
    noisy = sweep.fit_power_law(tokens, losses)
    assert noisy["alpha"] == pytest.approx(alpha, rel=0.25, abs=0.02) and noisy["L_0"] == pytest.approx(L_0, abs=0.15)
    assert sweep.power_law(noisy, 10 * tokens[-1]) == pytest.approx(true(10 * tokens[-1]), abs=0.03)


def test_the_smoothed_curve_leaves_the_warm_up_out():
    lines = [dict(step=step, tokens=10 * step, train_loss=100.0 if step <= 7 else step) for step in range(1, 48)]
    tokens, losses = sweep.smoothed_curve(lines, 7, points=10)
    assert len(tokens) == 10 and tokens[0] == 95 and losses[0] == 9.5 and np.allclose(tokens, 10 * losses)


def test_the_p_value_counts_signs_by_hand():
    counted = {(0.3,): 1, (1, 2, 3): 2 / 8, (-1, -2, -3): 2 / 8, (1, -1): 1, (3, -1): 1, (0, 0, 0): 1}
    counted |= {(1, 1, 1, 1, -1): 12 / 32, (0.1,) * 6: 2 / 64}
    assert {differences: report.sign_flip_p(differences) for differences in counted} == counted


def test_spikes_are_counted_and_noise_and_progress_are_not():
    noise = np.random.default_rng(0).normal(0, 0.05, 2000)
    losses = [*(3 + 4 * np.exp(-np.arange(2000) / 200) + noise)]
    assert sweep.loss_spikes(losses) == 0
    assert sweep.loss_spikes([*losses, 3.1, 4.5, 3.0, 5.0, 3.05]) == 2
    late, early = [3.0] * 20 + [9.0], [3.0] * 19 + [9.0]  # among the first 20 losses there is no band yet
    assert (sweep.loss_spikes(late), sweep.loss_spikes(early)) == (1, 0)


def fake_run(folder, losses, steps=None, **options):
    """A run folder as train.py would have left it after len(losses) of `steps` steps, evaluated at the last one."""
    folder.mkdir(parents=True)
    model = dict(vocab_size=64, n_layer=1, n_head=2, n_embd=8, attention="mha")
    options = dict(max_steps=steps or len(losses), warmup_steps=5, save_every=10, **options)
    (folder / "config.json").write_text(json.dumps(dict(options=options, model=model)))
    steps_of = dict(enumerate(map(float, losses), 1))
    lines = [dict(step=n, tokens=100 * n, train_loss=loss) for n, loss in steps_of.items()]
    if not steps:
        lines[-1] |= dict(val_loss=float(losses[-1]), val_bpb=float(losses[-1]) / 2)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curve(floor):
    return floor + (np.arange(1, 101) / 100) ** -0.5


def test_the_largest_stable_rate_near_the_lowest_loss_is_chosen(tmp_path):
    settings = [sweep.Setting("mea", rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)]
    for seed in range(2):
        for setting, floor, spikes in zip(settings, (2.5, 2.0, 2.01, 1.5, 1.0), (0, 0, 0, seed, 0)):
            losses = curve(floor)
            losses[60 : 60 + spikes] += 20
            fake_run(tmp_path / f"{setting.name}-seed{seed}", losses)
    (tmp_path / "mea-lr0.1-seed1" / "metrics.jsonl").unlink()  # the largest rate lost one run
    (tmp_path / "mea-lr0.1-seed1.log").write_text("loss nan at step 30: stopped before the update; no checkpoint")
    choose = lambda tolerance: sweep.choose_rates(tmp_path, settings, 2, None, tolerance)
    rows, choices = choose(0.02)
    assert [row["spikes"] for row in rows] == [0, 0, 0, 1, 0]
    assert [row["stable"] for row in rows] == [True, True, True, False, False] and rows[4]["diverged"] == 1
    assert rows[1]["extrapolated"] == pytest.approx(2 + 10**-0.5, abs=0.02)  # at ten times the tokens
    assert [choice["learning_rate"] for choice in choices] == [1e-2]
    assert choose(0)[1][0]["learning_rate"] == 3e-3 and choose(np.inf)[1][0]["learning_rate"] == 1e-2
    text = "\n".join(sweep.rates_markdown(rows, choices))
    assert text.count("unstable") == 2 and text.count("**chosen**") == 1
    assert "| mea | 0.01 |" in text
    (tmp_path / "mea-lr0.001-seed0" / "metrics.jsonl").unlink()
    assert [row["learning_rate"] for row in choose(0.02)[0]] == [3e-3, 1e-2, 3e-2, 1e-1]  # a rate waits for its seeds
    assert sweep.choose_rate([row for row in rows if not row["stable"]], 0.02) is None


def test_every_attention_can_be_swept_with_and_without_head_norm(monkeypatch):
    monkeypatch.setitem(sweep.ATTENTION, "new", sweep.ATTENTION["mha"])
    known = sweep.variants()
    assert {name.removesuffix("+norm").removesuffix("-norm") for name in known} == {*sweep.ATTENTION}
    assert known["new"] == ["--attention", "new"] and known["new+norm"] == ["--attention", "new", "--head_norm", "yes"]
    assert known["mea-norm"] == ["--attention", "mea", "--head_norm", "no"] and "mea+norm" not in known
    assert sweep.variant_options("mea:diagonal") == ["--attention", "mea", "--compose", "diagonal"]
    options = "--attention mea --head_norm no --compose diagonal --n_kv_head 2"
    assert " ".join(sweep.variant_options("mea-norm:diagonal@2")) == options
    assert sweep.check_run(Path("out/none"), sweep.Setting("mea:diagonal").options(seed=0)).compose == "diagonal"
    options = sweep.Setting("mea@2", 1e-3).options(seed=3)
    assert " ".join(options) == "--attention mea --n_kv_head 2 --learning_rate 0.001 --seed 3"


def test_options_of_train_py_go_to_every_run_as_they_were_given():
    words = "--seeds 1 --qk_norm --weight_decay 0.03 --n_layer 3 --preset tiny --out_dir out/runs"
    o, given = options.parse_options(sweep.Options, words.split(), train.PRESETS)
    run = sweep.check_run(Path("out/none"), sweep.passed_on(o, given))
    assert (run.qk_norm, run.weight_decay, run.n_layer, run.preset, run.max_steps) == (True, 0.03, 3, "tiny", 60)


def test_a_command_in_a_table_can_be_pasted():
    assert report.command("sweep.py", ["--variants", "mha,mea@2:diagonal+norm"]).endswith("mea@2:diagonal+norm")
    assert report.command("bench.py", ["--nanogpt", "a b"]) == "python experiments/bench.py --nanogpt 'a b'"


def test_a_line_of_metrics_that_is_half_written_is_left_out(tmp_path):
    assert report.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert report.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_the_table_pairs_seeds_and_says_what_p_could_be(tmp_path):
    settings = [sweep.Setting("mha"), sweep.Setting("mea")]
    for seed, (mha, mea) in enumerate([(3.0, 2.9), (3.2, 3.0), (3.1, 2.8)]):
        fake_run(tmp_path / f"mha-seed{seed}", [9, mha])
        fake_run(tmp_path / f"mea-seed{seed}", [9, mea])
    table = sweep.summary(tmp_path, settings, 4)
    row = table["mea"]
    assert row["n"] == 3 and row["mean"] == pytest.approx(2.9) and row["std"] == pytest.approx(0.1)
    assert row["minus_mha"] == pytest.approx(-0.2) and row["minus_mha_std"] == pytest.approx(0.1) and row["p"] == 0.25
    text = "\n".join(sweep.markdown(table))
    assert "-0.2000 ± 0.1000 | 0.25 |" in text and "below 0.25 with 3 seeds" in text


def test_finished_runs_are_kept_and_killed_ones_go_on(tmp_path, monkeypatch, capsys):
    fake_run(tmp_path / "done", range(20, 0, -1))
    fake_run(tmp_path / "killed", range(25, 0, -1), steps=40)
    (tmp_path / "killed" / "checkpoint.pt").touch()
    fake_run(tmp_path / "early", range(9, 0, -1), steps=40)  # killed before its first checkpoint
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost.log").write_text("loss inf: stopped before the update; x")
    commands = []

    def pretend(command, **_):
        commands.append((Path(command[command.index("--out_dir") + 1]).name, "--resume" in command))
        return types.SimpleNamespace(returncode=0, poll=lambda: 0)

    monkeypatch.setattr(sweep.subprocess, "Popen", pretend)
    sweep.run_all({tmp_path / name: [] for name in ("done", "killed", "early", "lost", "new")}, 1, lambda: None)
    assert sorted(commands) == [("early", False), ("killed", True), ("new", False)]
    assert capsys.readouterr().out.splitlines()[-1] == "5/5 runs"


def test_a_run_that_fails_ends_the_sweep_and_stops_the_others(tmp_path, monkeypatch):
    scripts, started = {"fails": "raise SystemExit(2)", "lives": "import time; time.sleep(60)", "waits": ""}, []

    def start(folder, options):
        started.append(subprocess.Popen([sys.executable, "-c", scripts[folder.name]]))
        return started[-1]

    monkeypatch.setattr(sweep, "start", start)
    with pytest.raises(SystemExit, match="ended with 2: see .*fails.log"):
        sweep.run_all({tmp_path / name: [] for name in scripts}, 2, lambda: None)
    assert [process.returncode for process in started] == [2, -signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_leaves_no_run_behind_and_each_has_saved(number, tmp_path, data):
    options = f"--variants mha,mea --seeds 1 --jobs 2 --preset tiny --max_steps 100000 --threads 1 --data_dir {data}"
    options += f" --device cpu --out_dir {tmp_path / 'runs'} --results {tmp_path / 'losses'}"
    command = [sys.executable, sweep.__file__, *options.split()]
    logs = [tmp_path / "runs" / f"{variant}-seed0.log" for variant in ("mha", "mea")]
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # under `nohup pytest &` a child would inherit it as ignored
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, preexec_fn=heard, **pipes) as process:
        try:
            while process.poll() is None and not all(log.exists() and "step     1/" in log.read_text() for log in logs):
                time.sleep(0.1)
            process.send_signal(number)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert "the same command goes on" in said and process.returncode == 128 + number
    assert all("stopped by SIGTERM" in log.read_text() and "saved" in log.read_text() for log in logs)


@mistakes("""
--variants mha,moa => no variant moa
--variants mea@x => no variant mea@x
--variants mea:half => no variant mea:half
--learning_rates 1e-3,x => '1e-3,x' are not numbers
--learning_rates 1e-3,-1 => learning_rate must be above 0, not -1.0
--choose_rates => several --learning_rates
--choose_rates --learning_rates 1e-3,3e-3 --schedule wsd => schedule is what this sweep sets itself
--choose_rates --learning_rates 1e-3,3e-3 --max_steps 55 => 55 steps with 50 of warm-up are too few
--rates_from no/such.json => no/such.json is not a file that --choose_rates wrote
--n_head 5 => n_embd 128 is not divisible by n_head 5
--seeds 25 => seeds must be at least 1 and at most 24
--max_step 5 => --max_step
""")
def test_a_mistake_is_one_line_before_any_run(given, why, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "run_all", lambda *_: pytest.fail("started"))
    assert why in refused(capsys, sweep.main, "--out_dir", tmp_path / "o", "--results", tmp_path / "r", given)
    assert not [*tmp_path.iterdir()]


def test_a_sweep_of_two_variants_runs_draws_and_is_not_run_again(tmp_path, data, capsys):
    options = "--variants mha,mea --seeds 1 --snapshots --preset tiny --max_steps 4 --warmup_steps 1 --save_every 2"
    options += f" --eval_every 2 --threads 1 --device cpu --data_dir {data} --out_dir {tmp_path / 'runs'}"
    options = [*options.split(), "--results", str(tmp_path / "results" / "losses")]
    sweep.main(options)
    result = json.loads((tmp_path / "results" / "losses.json").read_text())
    assert [*result["table"]] == ["mha", "mea"] and result["table"]["mea"]["n"] == 1
    assert "2/2 runs" in capsys.readouterr().out
    metrics = [tmp_path / "runs" / folder / "metrics.jsonl" for folder in ("mha-seed0", "mea-seed0")]
    written = [file.stat().st_mtime_ns for file in metrics]
    sweep.main(options)
    assert written == [file.stat().st_mtime_ns for file in metrics]
    learned = sweep.compositions(tmp_path / "runs" / "mea-seed0")
    assert learned["step"][-1] == 4 and np.shape(learned["compose_k"][-1]) == (2, 4, 4)  # layers, Hc, H
    assert 0 < np.abs(learned["compose_v"][-1] - np.eye(4)).max() < 0.1  # from the identity on
    drawn = {f"losses-{name}" for name in ("curves", "mea-seed0-compositions")}
    names = {path.name for path in (tmp_path / "results").iterdir()}
    pictures = {name for name in names if name.endswith(".png")}
    assert {f"{name}.json" for name in drawn} <= names
    assert not pictures or pictures == {f"{name}.png" for name in drawn}  # where matplotlib is installed
    said = refused(capsys, sweep.main, *options, "--batch_size 3")  # another run under the same name is not this one
    assert "holds a run with batch_size 8, not 3" in said
    assert "holds a run with data_dir" in refused(capsys, sweep.main, *options, "--data_dir", tmp_path)
    assert "teacher is what this sweep sets" in refused(capsys, sweep.main, *options, "--teacher out/mha")


def test_a_snapshot_is_taken_once_for_each_checkpoint_of_a_model_that_composes_heads(tmp_path, monkeypatch):
    loaded, checkpoint = [], tmp_path / "checkpoint.pt"

    def load(path):
        loaded.append(int(path.read_text()))
        attention = types.SimpleNamespace(compose_k=torch.eye(2), compose_v=torch.tensor([3.0, 4.0]))
        layer = types.SimpleNamespace(self_attn=attention if loaded[-1] else types.SimpleNamespace())
        return types.SimpleNamespace(layers=[layer]), dict(step=loaded[-1])

    monkeypatch.setattr(sweep, "load_checkpoint", load)
    taken = {}
    sweep.snapshot(tmp_path, taken)  # before the first checkpoint
    for i, step in enumerate([0, 10, 20, 20]):
        checkpoint.write_text(str(step))
        os.utime(checkpoint, ns=(i, i))
        sweep.snapshot(tmp_path, taken)
        sweep.snapshot(tmp_path, taken)
    assert loaded == [0, 10, 20, 20] and sweep.compositions(tmp_path)["step"] == [10, 20]
    assert np.shape(sweep.compositions(tmp_path)["compose_k"]) == (2, 1, 2, 2)
    assert sweep.compositions(tmp_path)["compose_v"][0] == [[[3, 0], [0, 4]]]  # of a diagonal its numbers alone


def test_compressions_of_a_pretrained_model_are_measured_once_and_tabulated(tmp_path, data, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(compression, "RESULTS", tmp_path)
    shape = dict(vocab_size=257, block_size=32, n_layer=2, n_head=6, n_kv_head=3, n_embd=24)
    to_pretrained(GPT(GPTConfig(**shape, attention="mha", norm_eps=1e-5)), tmp_path / "tiny")
    options = f"--pretrained {tmp_path / 'tiny'} --calibration_data {data} --data_dir {data} --block_size 32 --seeds 2"
    options += " --calibration_windows 2 --probe_windows 1 --eval_windows 2 --decode original,gqa"
    options += f" --out_dir {tmp_path / 'out'}"
    compression.main(options.split())
    rows = json.loads((tmp_path / "compression-tiny.json").read_text())
    wanted = {"original", "0.333 | svd | 0", "0.500 | rotated | 0", "0.500 | latent | 1", "decoding | gqa"}
    wanted |= {"0.500 | gqa | 1", "0.500 | aligned, probe | 0"}
    assert wanted <= {*rows} and rows["0.500 | latent | 0"]["heads"] == [[1, 2], [1, 2]]
    cost = rows["0.667 | svd | 0"]["loss"]["set"] - rows["original"]["set"]
    lines = (tmp_path / "compression-tiny.md").read_text().splitlines()
    assert f"| 0.67 | 2 + 2 | svd | {cost:+.3f} | {math.exp(cost):.2f} | 1 |" in lines
    monkeypatch.setattr(compression, "compress", lambda *_, **__: pytest.fail("measured again"))
    compression.main(options.split())
    assert json.loads((tmp_path / "compression-tiny.json").read_text()) == rows


def test_exported_models_are_compared_in_turns(tmp_path, monkeypatch, capsys):
    """The second model is the first with half its cache: its keys and values are multi-query."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(engines, "RESULTS", tmp_path)
    shape = dict(vocab_size=257, block_size=64, n_layer=2, n_head=4, n_embd=24, attention="mha", norm_eps=1e-5)
    for name, heads in (("whole", 2), ("half", 1)):
        to_pretrained(GPT(GPTConfig(**shape, n_kv_head=heads)), tmp_path / name)
    options = f"--folders {tmp_path / 'whole'},{tmp_path / 'half'} --engines transformers --contexts 16,32 --rounds 2"
    engines.main(options.split())
    rows = json.loads((tmp_path / "engines-whole.json").read_text())
    whole, half = (rows[f"transformers | {name}"] for name in ("whole", "half"))
    assert whole["apart"] == half["apart"] == 0 and whole["same_text"] and half["same_text"]
    assert whole["bytes_per_token"] == 2 * half["bytes_per_token"] == 2 * (2 + 2) * 6 * 4
    assert whole["behind"]["32"]["time_ratio"] == 1 and half["behind"]["16"]["tokens_per_second"] > 0
    assert (tmp_path / "engines-whole.md").read_text().count("| the same |") == 2
    other = options.replace("transformers", "llama.cpp")
    assert "convert_hf_to_gguf.py does not exist" in refused(capsys, engines.main, other, "--out_dir", tmp_path)


def test_a_gguf_file_gets_the_rotary_factors_and_keeps_the_rest(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    writer.add_block_count(3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "d"])
    writer.add_tensor("output.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    factors = dict(rope_type="longrope", long_factor=[1.0, 2.5], short_factor=[1.0, 2.5])
    (tmp_path / "config.json").write_text(json.dumps(dict(rope_parameters=factors)))
    engines.add_rope_factors(tmp_path / "plain.gguf", tmp_path, tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    assert reader.get_field("llama.block_count").contents() == 3
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "bc", "d"]
    tensors = {tensor.name: tensor.data.tolist() for tensor in reader.tensors}
    assert tensors.pop("output.weight") == np.arange(12).reshape(3, 4).tolist()
    assert tensors == {f"rope_factors_{length}.weight": [1.0, 2.5] for length in ("long", "short")}


# --- Benchmarks


def test_the_benchmark_takes_turns_and_compares_round_by_round():
    calls = []
    jobs = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert report.in_turns(jobs, rounds=2, warm_up=1) == {"a": [3, 5], "b": [4, 6]} and calls == ["a", "b"] * 3
    row = bench.row("what", "a", "b", [2.0, 4.0, 9.0], [1.0, 1.0, 3.0], tokens_per_second=7)
    assert row["ms"] == 4000 and row["ratio"] == [2, 3, 4]
    assert bench.row("what", "b", "b", [1.0], [1.0])["ratio"] is None
    assert bench.table_line(row) == ["what", "a", "4000.00 ms", "b", "3.00 (2.00 to 4.00)", "7", ""]


def test_the_benchmark_measures_what_it_names(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(bench.PRESETS, "small", dict(n_layer=1, n_head=8, n_embd=32, block_size=16))
    trained = [*bench.bench_training(cpu, torch.float32, rounds=2)]
    assert {row["section"] for row in trained} == {"training, forward", "training, backward", "training, step"}
    assert {row["name"] for row in trained} == {*bench.VARIANTS}
    decoded = [*bench.bench_decoding(cpu, contexts=(8, 16), rounds=2, tokens=2)]
    cached = {row["name"]: row["bytes_per_token"] for row in decoded}
    assert cached["mha"] == 2 * 32 * 4 and cached["mea, no cache"] == 0
    assert cached["mha, compressed to half"] == cached["mea, half, absorbed"] == 32 * 4
    options.save_picture(tmp_path / "bench.png", lambda plt: bench.draw(plt, [*trained, *decoded]))
    committed = json.loads((Path(bench.__file__).parent / "results" / "bench.json").read_text())["rows"]
    assert {row["name"] for row in committed if row["section"].startswith("decoding")} == {*bench.DECODED}


def test_kernel_timings_compare_every_path_with_plain_attention(capsys):
    roofline.print_timings(B=1, T=16, S=16, H=4, D=16, n=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]
    kinds = {kind: [row for row in rows if row[0] == kind] for kind in ("forward", "forward + backward", "decode")}
    assert rows == sum(kinds.values(), []) and all(len(kind) >= 3 for kind in kinds.values())
    for (_, plain, _, no_ratio, *_), *others in kinds.values():
        assert "SDPA alone" in plain and no_ratio == ""
        for _, name, ms, ratio, *_ in others:
            middle, low, high = map(float, ratio.translate(str.maketrans("()to", "    ")).split())
            assert "SDPA alone" not in name and float(ms) >= 0 and 0 < low <= middle <= high


def test_a_path_that_cannot_run_here_is_left_out_and_said(capsys):
    def refuse():
        raise ValueError("no such backend\nand more")

    jobs = {"refused": (refuse, None), "first": (lambda: sum(range(9)), "cost"), "second": (lambda: None, None)}
    (first, cost, seconds, ratio), second = roofline.time_jobs(jobs, "cpu", rounds=2)
    assert (first, cost, ratio, second[0]) == ("first", "cost", [1, 1, 1], "second") and seconds > 0
    assert capsys.readouterr().out == "  refused: no such backend\n"


@mistakes("""
roofline --targets sm_80,h100 => unknown target h100: known are sm_80,
bench --decoding --nanogpt . => --nanogpt is measured by --training
bench --training --nanogpt . => needs a checkout with a model.py
minutes --nanogpt nowhere => nowhere is no checkout of nanoGPT: it has no train.py
torture --faults kills,rain => no fault rain: choose from kills,
torture --steps 40 --kills 30 => steps must be at least twice as many as kills
ranking --stages speed => stages must be some of
ranking --variants mhaa => no variant
""")
def test_a_mistake_is_one_line_before_anything_is_measured(given, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program, options = given.split(maxsplit=1)
    assert why in refused(capsys, importlib.import_module(f"experiments.{program}").main, options)


def test_a_run_of_nanogpt_is_followed_on_our_tokens(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(minutes.train, "DEFAULT_DATA", str(data))
    (tmp_path / "train.py").write_text(
        "import pickle, sys\n"
        "size = pickle.load(open('data/nanomea/meta.pkl', 'rb'))['vocab_size']\n"
        "length = len(open('data/nanomea/val.bin', 'rb').read())\n"
        "print(f'step 0: train loss {size}.5, val loss {length}.25')\n"
        "assert {'--learning_rate=0.003', '--warmup_iters=50', '--max_iters=350', '--n_embd=128'} < set(sys.argv)\n"
    )
    for name in ("model.py", "configurator.py"):
        (tmp_path / name).touch()
    with minutes.nanogpt_with_our_tokens(tmp_path) as folder:
        (point,) = minutes.follow(minutes.nanogpt_command(3e-3), folder, 1, minutes.NANOGPT)
        with pytest.raises(SystemExit):
            minutes.follow(minutes.nanogpt_command(1e-3), folder, 1, minutes.NANOGPT)
    assert "ended with exit code 1: AssertionError" in capsys.readouterr().err
    assert point["step"] == 0 and point["loss"] == (Path(data) / "val.bin").stat().st_size + 0.25
    assert 0 <= point["cpu_minutes"] < 1 and 0 < point["minutes"] < 1
    line = "step  50/350  loss 5.01  val 5.2606 (2.4 bits per byte)  peak 1 MiB  2 tokens/s  ETA 1:00"
    assert minutes.OURS.match(line).groups() == ("50", "5.2606")


def test_the_ranking_goes_on_from_its_rows_and_compares_by_seed(tmp_path, monkeypatch, capsys):
    """Losses that follow from the run: mea-norm is 0.1 below MHA at its own best rate, and takes twice the time."""
    made = []

    def run_all(runs, jobs, at_end):
        for folder, how in runs.items():
            said = dict(zip(how[::2], how[1::2]))
            normless, rate, seed, steps = (
                said[f"--{name}"] for name in ("attention", "learning_rate", "seed", "max_steps")
            )
            variant, text = "mea-norm" if normless == "mea" else "mha", said.get("--data_dir", "")
            made.append(ranking.key(variant, float(rate), seed, int(steps), text))
            folder.mkdir(parents=True)
            if made[-1] == "mha | 0.025 | 0 | 600":
                Path(f"{folder}.log").write_text("loss nan: stopped before the update")
                continue
            off = 0.0 if (variant, float(rate)) in (("mha", 1.2e-2), ("mea-norm", 2.5e-2)) else 1.0
            loss = 4 + off + int(seed) / 10 - 0.1 * (variant == "mea-norm") + 0.5 * (int(steps) < 600) - bool(text)
            (folder / "config.json").write_text(json.dumps(dict(options=dict(max_steps=int(steps)))))
            (folder / "metrics.jsonl").write_text(json.dumps(dict(step=int(steps), val_loss=loss)) + "\n")
        at_end()

    monkeypatch.setattr(ranking, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "run_all", run_all)
    times = {name: dict(ratio=[r, r, r], parameters=5, cached_bytes=7) for name, r in (("mha", 1), ("mea-norm", 2))}
    monkeypatch.setattr(ranking, "time_steps", lambda names: times)
    how = ["--variants", "mha,mea-norm", "--long_data", "more", "--out_dir", str(tmp_path / "runs")]
    ranking.main([*how, "--stages", "rates", "--jobs", "2"])
    assert len(made) == 2 * 3 * 3
    ranking.main(how)
    later = made[18:]
    assert {run for run in later if "| 600" in run} == {
        f"{name} | {seed} | 600" for name in ("mha | 0.012", "mea-norm | 0.025") for seed in range(3, 9)
    }
    assert {run for run in later if "| 300" in run} == {f"mea-norm | 0.025 | {seed} | 300" for seed in range(3)}
    assert len([run for run in later if run.endswith("| 6400 | more")]) == 2 * 3
    lines = (tmp_path / "ranking.md").read_text().splitlines()
    first = next(line for line in lines if line.startswith("| mea-norm"))
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells[:2] == ["mea-norm", "0.025"] and cells[2].startswith("4.3000") and cells[3].startswith("-0.1000")
    assert cells[4:8] == [f"{2 / 2**9:.3g}", "9", "5", "7"] and cells[8].startswith("2.00")
    assert cells[9].startswith("4.5000") and cells[10].startswith("3.0000") and cells[11].startswith("-0.1000")
    capsys.readouterr()
    count = len(made)
    ranking.main(how)
    assert len(made) == count  # nothing is run again
    assert "| mha | 5.1000 ± 0.1000 | 4.1000 ± 0.1000 | inf |" in capsys.readouterr().out  # a run there diverged
