"""A model in lm-eval: log-likelihoods against a plain loop, truncation, windows, generation, whole tasks."""

import json
import math

import pytest
import torch

pytest.importorskip("lm_eval")

from helpers import make, raises, refused, save_byte_level_bpe, theirs
from lm_eval.api.instance import Instance

from checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import ByteTokenizer, train_bpe
from experiments import evaluate
from experiments.evaluate import Harness, average, generation_settings, markdown
from model import GPT, GPTConfig

BLOCK = 13
SMALL = dict(vocab_size=257, block_size=BLOCK, n_head=2, n_embd=16, std=0.5)


@pytest.fixture(scope="module")
def model():
    return make(**SMALL)


def ask(harness, kind, arguments):
    """What a harness answers to requests of a kind, each given as its arguments."""
    requests = [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]
    return getattr(harness, kind)(requests, disable_tqdm=True)


def score(model, context, ids):
    return Harness(model, ByteTokenizer())._loglikelihood_tokens([(None, context, ids)], disable_tqdm=True)[0]


def plain(model, ids, first):
    """(log p, is greedy) of ids[first:], one token at a time, each after the last block_size of the ids before it."""
    total, greedy = 0.0, True
    for i in range(first, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[max(0, i - BLOCK) : i]]))[0][0, -1].double()
        total += logits.log_softmax(-1)[ids[i]].item()
        greedy = greedy and logits.argmax().item() == ids[i]
    return total, greedy


PAIRS = [("ab", "cde"), ("", "xyz"), ("key ", "v"), ("hm", "q"), ("a b c", "d, é"), ("", "k")]


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_a_loglikelihood_is_the_sum_of_log_probabilities_of_a_plain_loop(model, batch_size):
    results = ask(Harness(model, ByteTokenizer(), batch_size=batch_size), "loglikelihood", PAIRS)
    for (context, continuation), (total, greedy) in zip(PAIRS, results):
        before = list(context.rstrip().encode()) or [256]  # trailing spaces belong to the continuation
        after = list((context + continuation).encode())[len(context.rstrip()) :]
        assert (pytest.approx(total, rel=1e-5), greedy) == plain(model, before + after, len(before))


def test_a_long_context_keeps_its_end_and_the_whole_continuation_is_scored(model):
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        logs = model(torch.tensor([ids[-BLOCK - 1 : -1]]))[0][0].log_softmax(-1)
    for n in (1, 5, BLOCK):  # targets of one window
        expected = sum(logs[BLOCK - n + i, token].item() for i, token in enumerate(ids[-n:]))
        assert score(model, ids[:-n], ids[-n:])[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [0, 1, 12, 13, 14, 26, 31])
def test_windows_score_every_token_once_each_after_at_least_one_and_the_last_after_all_that_fit(model, n):
    ids = list(range(n))
    windows = list(Harness(model, ByteTokenizer()).windows([256, 7], ids))
    assert [token for _, targets in windows for token in targets] == ids
    seen = [256, 7, *ids]
    for context, targets in windows:
        end = 2 + (ids.index(targets[-1]) + 1 if targets else 0)
        assert context == seen[end - len(targets) - len(context) : end - len(targets)] and len(targets) <= BLOCK
    if n > BLOCK:
        assert windows[0] == ([7], ids[:BLOCK]) and sum(map(len, windows[-1])) == BLOCK + 1


def test_the_loglikelihood_of_a_text_is_the_sum_over_its_windows(model):
    text = "a text that is longer than the block size"
    ids = [256, *text.encode()]
    expected = 0.0
    for first in range(1, len(ids), BLOCK):
        end = min(first + BLOCK, len(ids))
        before = max(0, end - BLOCK - 1)
        with torch.no_grad():
            logs = model(torch.tensor([ids[before : end - 1]]))[0][0].log_softmax(-1)
        expected += sum(logs[i - before - 1, ids[i]].item() for i in range(first, end))
    harness = Harness(model, ByteTokenizer(), batch_size=2)
    results = ask(harness, "loglikelihood_rolling", [(text,), ("",), ("q",)])
    assert results[0] == pytest.approx(expected, rel=1e-5) and results[1] == 0


def test_the_likeliest_continuation_is_greedy_and_one_changed_token_is_not(model):
    tokens = model.generate([[97, 98]], 5, temperature=0)[0]
    assert score(model, [97, 98], tokens)[1] is True
    for i in range(5):
        assert score(model, [97, 98], [*tokens[:i], (tokens[i] + 1) % 257, *tokens[i + 1 :]])[1] is False
    ids = list(range(BLOCK))
    ids += model.generate([ids], 1, temperature=0)[0]
    assert score(model, ids[:-1], ids[-1:])[1] is True  # the second window alone
    assert score(model, [256], ids)[1] is False  # and both


def test_weights_that_are_not_finite_are_refused():
    model = make(**SMALL)
    model.lm_head.weight.data[3, 3] = math.nan
    raises("not finite", ask, Harness(model, ByteTokenizer()), "loglikelihood", [("a", "b")])


def test_a_context_begins_as_the_model_learned_and_a_continuation_always_has_a_token(model, monkeypatch):
    tokenizer = train_bpe(["abab abab cd"], 270)
    first_window = lambda harness, requests, **_: [next(harness.windows(*requests[0][1:]))]
    monkeypatch.setattr(Harness, "_loglikelihood_tokens", first_window)

    def encoded(context, continuation, start=()):
        return ask(Harness(model, tokenizer, start), "loglikelihood", [(context, continuation)])[0]

    assert encoded("", "a") == ([tokenizer.end_of_text], [97])
    assert encoded("", "a", start=(7, 8)) == ([7, 8], [97])
    context, continuation = encoded("q ", "cd", start=(7, 8))
    assert context == [7, 8, 113] and tokenizer.decode(continuation) == " cd"
    assert len(tokenizer.encode("ab")) == 1  # so the cut falls inside a token, which has to be scored all the same
    assert encoded("a", "b") == ([tokenizer.end_of_text], tokenizer.encode("ab"))
    assert encoded("a", "b", start=(7, 8)) == ([7, 8], tokenizer.encode("ab"))


def test_generation_ends_before_the_first_stop_string_whatever_shares_the_batch(model):
    harness = Harness(model, ByteTokenizer(), batch_size=2)
    contexts = ["ab", "x", "", "longer than the model's block size"]
    whole = ask(harness, "generate_until", [(context, dict(max_gen_toks=6)) for context in contexts])
    for context, text in zip(contexts, whole):
        ids = (list(context.encode()) or [256])[-(BLOCK - 6) :]
        assert text == ByteTokenizer().decode(model.generate([ids], 6, temperature=0, stop_tokens={256})[0])
    text = next(text for text in whole if len(set(text)) > 2)
    context = contexts[whole.index(text)]
    untils = (text[2], ["\0\0", text[3:5], text[2]], [""])
    results = ask(harness, "generate_until", [(context, dict(until=until, max_gen_toks=6)) for until in untils])
    assert results == [text[: text.index(text[2])]] * 2 + [text]


def test_any_of_several_end_tokens_ends_a_text_and_a_long_context_keeps_its_start(model):
    ids = model.generate([[7, *b"ab"]], 6, temperature=0)[0]
    for end in {ids[2], ids[4]}:
        harness = Harness(model, ByteTokenizer(), start=[7], end_tokens={256, end})
        [text] = ask(harness, "generate_until", [("ab", dict(max_gen_toks=6))])
        assert text == ByteTokenizer().decode(ids[: ids.index(end)])
    [text] = ask(Harness(model, ByteTokenizer(), start=[7]), "generate_until", [("0123456789", dict(max_gen_toks=6))])
    assert text == ByteTokenizer().decode(model.generate([[7, *b"456789"]], 6, temperature=0, stop_tokens={256})[0])


def test_generation_settings_mean_what_the_harness_means_by_them():
    greedy = dict(max_new_tokens=256, temperature=0.0, top_k=None, top_p=None)
    assert generation_settings({}) == generation_settings(dict(do_sample=False, temperature=0.7)) == ([], greedy)
    settings = dict(until="\n", temperature=0.5, max_tokens=9)
    assert generation_settings(settings) == (["\n"], greedy | dict(temperature=0.5, max_new_tokens=9))
    assert generation_settings(dict(do_sample=True))[1]["temperature"] == 1.0
    raises("num_beams", generation_settings, dict(num_beams=4))


def test_the_table_has_the_papers_layout():
    results = {
        "a": dict(piqa=dict(acc=(0.5, 0.03)), mine=dict(acc=(0.25, 0.04))),
        "b": dict(piqa=dict(acc=(0.6, None)), mine=dict(acc=(0.3, 0.04))),
    }
    assert average(results["a"]) == (pytest.approx(0.375), pytest.approx(0.025))
    assert markdown(results).splitlines() == [
        "|  | PIQA | mine | average |",
        "|---|---|---|---|",
        "| a | 50.00 ± 3.00 | 25.00 ± 4.00 | 37.50 ± 2.50 |",
        "| b | 60.00 | 30.00 ± 4.00 | 45.00 |",
    ]
    assert "| mine (bits) | average |" in markdown({"a": dict(mine=dict(bits=(1.5, None)))})


# --- The command line


def test_what_is_wrong_is_said_in_one_line_before_any_work(capsys, tmp_path, monkeypatch):
    out = f"--out={tmp_path / 'new' / 'tasks.json'}"
    refuse = lambda *options: refused(capsys, evaluate.main, *options)
    assert "batch_size must be at least 1" in refuse("--batch_size 0", out)
    assert "limit must be at least 1" in refuse("--limit 0", out)
    assert "not a folder" in refuse("--include_path", tmp_path / "none", out)
    assert "name a file" in refuse(f"--out={tmp_path}")
    assert "no checkpoint at" in refuse("--checkpoints", tmp_path / "none", out)
    monkeypatch.setattr(evaluate, "TemplateLM", object)  # as without lm-eval
    assert "pip install lm-eval" in refuse(out)
    assert not list(tmp_path.iterdir())


# --- Whole tasks: a language in which a's are answered by b's and c's by d's


def question(i):
    letter, n = "ac"[i % 2], 2 + i % 5
    return letter * n, "bd"[i % 2] * n


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/mine.jsonl}}, cache_dir: {folder}/cache}}
validation_split: validation
"""
TASKS = {
    "mine": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[answer]}}"
metric_list: [{metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}} "
doc_to_target: "{{choices[answer][:2]}}"
generation_kwargs: {until: [" "], max_gen_toks: 2}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a trained run folder, an untrained one, a folder of tasks)"""
    root = tmp_path_factory.mktemp("evaluate")
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0)).tolist()
    text = torch.tensor(list(" ".join(" ".join(question(i)) for i in order).encode()))
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=2, n_head=4, n_embd=32))
    for name, steps in (("untrained", 0), ("trained", 150)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            rows = text[torch.randint(len(text) - 49, (16, 1)) + torch.arange(49)]
            model(rows[:, :-1], rows[:, 1:])[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        (root / name).mkdir()
        ByteTokenizer().save(root / name)
        save_checkpoint(root / name, dict(config=vars(model.config), model=model.state_dict(), data={}))
    tasks = root / "tasks"
    tasks.mkdir()
    with open(tasks / "mine.jsonl", "w") as file:
        for i in range(60):
            (asked, right), last = question(i), i // 2 % 2  # where the right choice stands
            wrong = right.translate(str.maketrans("bd", "db"))
            choices = [wrong, right] if last else [right, wrong]
            file.write(json.dumps(dict(question=asked, choices=choices, answer=last)) + "\n")
    for name, rest in TASKS.items():
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, folder=tasks) + rest)
    return root / "trained", root / "untrained", tasks


@pytest.mark.slow
def test_a_trained_model_beats_chance_in_the_harness_and_the_results_are_kept(folders, tmp_path, capsys):
    trained, untrained, tasks = map(str, folders)
    out = tmp_path / "results" / "tasks.json"
    options = ["--tasks", ",".join(TASKS), "--include_path", tasks, "--out", str(out), "--batch_size", "7"]
    evaluate.main(["--checkpoints", f"{trained},{untrained}", *options])
    report = json.loads(out.read_text())
    (accuracy, error), (other, _) = (report["results"][folder]["mine"]["acc"] for folder in (trained, untrained))
    assert accuracy > 0.9 and 0 <= error < 0.07 and other < 0.75
    bits = [report["results"][folder]["whole"]["bits_per_byte"][0] for folder in (trained, untrained)]
    assert bits[0] < 2.5 and 7 < bits[1] < 9
    exact = [report["results"][folder]["written"]["exact_match"][0] for folder in (trained, untrained)]
    assert exact[0] > 0.5 > exact[1]
    table = capsys.readouterr().out
    assert f"| {trained} | {100 * accuracy:.2f} ± {100 * error:.2f} |" in table and "whole (bits_per_byte)" in table
    assert report["average"][trained] == [accuracy, error] and report["versions"]["lm_eval"]
    # the same tasks again, after another model, of one question, and with solved questions that do not all fit
    models = [Harness(load_checkpoint(folder)[0], ByteTokenizer()) for folder in (trained, untrained)]
    again = evaluate.load_tasks(["mine"], tasks)
    assert [evaluate.run_tasks(model, again)["mine"]["acc"][0] for model in models] == [accuracy, other]
    assert evaluate.run_tasks(models[0], again, limit=1)["mine"]["acc"] == (1.0, None)
    assert evaluate.run_tasks(models[0], again, num_fewshot=9)["mine"]["acc"][0] > 0.9


@pytest.mark.slow
def test_a_task_that_cannot_be_loaded_is_named_in_one_line(folders, tmp_path, capsys, monkeypatch):
    import datasets

    trained, _, tasks = map(str, folders)
    out = tmp_path / "tasks.json"
    common = ["--checkpoints", trained, "--include_path", tasks, "--out", str(out)]
    assert "no task 'nonsense'" in refused(capsys, evaluate.main, *common, "--tasks mine,nonsense")

    def unreachable(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    line = refused(capsys, evaluate.main, *common, "--tasks piqa")
    assert "task piqa cannot be loaded" in line and "dataset_path: json" in line and not out.exists()


@pytest.mark.slow
def test_log_likelihoods_of_a_hugging_face_folder_are_those_of_the_harness_own_model(tmp_path):
    pytest.importorskip("accelerate")  # pip install "lm-eval[hf]"
    from lm_eval.models.huggingface import HFLM

    ends = dict(bos_token_id=0, eos_token_id=0)
    theirs(vocab_size=300, max_position_embeddings=BLOCK, **ends).save_pretrained(tmp_path)
    save_byte_level_bpe(tmp_path, ["the key of a door, the keys of the doors"] * 9, 300, ["<end>"])
    names = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<end>", bos_token="<end>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))

    hf = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=2)
    ours = Harness(*evaluate.open_model(str(tmp_path), "cpu"), batch_size=2)
    long = "a context that is longer than what the model takes, by far: "
    pairs = [*PAIRS, ("the key", " of the door"), ("the keys ", "of"), (long, "the doors"), ("", "the key of a door")]
    results = [ask(harness, "loglikelihood", pairs) for harness in (ours, hf)]
    for (total, greedy), (expected, likeliest) in zip(*results, strict=True):
        assert (total, greedy) == (pytest.approx(expected, rel=1e-5), likeliest)
    texts = [("the key of a door",), ("q",), (long * 3,)]
    expected = ask(hf, "loglikelihood_rolling", texts)
    assert ask(ours, "loglikelihood_rolling", texts) == pytest.approx(expected, rel=1e-5)
