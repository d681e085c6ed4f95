"""Hugging Face folders: what is read has the logits of `transformers`, what is written is read by it."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch
from helpers import THEIRS, arguments, make, raises, refused, save_sentencepiece, theirs, tokens
from test_train import files_of_at_most

import huggingface
import sample
import train
from data.dataset import open_dataset
from data.prepare import prepare
from attention import one_hot_composition
from checkpoint import load_checkpoint
from compress import calibrate, compress, uniform_ranks
from huggingface import from_pretrained, to_pretrained
from model import GPT

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

V, T = 41, 64
ours = partial(make, vocab_size=V, block_size=T, n_embd=32, attention="mha", rope_theta=500.0)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", rope_theta=99.0, factor=3.0)
KINDS = {
    "llama, tied": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "llama, untied, GQA, llama3 rope": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama, linear rope, head_dim": ("Llama", dict(rope_parameters=LINEAR, head_dim=10)),
    "llama, yarn rope": ("Llama", dict(rope_parameters=YARN)),
    "mistral": ("Mistral", dict(sliding_window=None, num_key_value_heads=1)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3, head_dim": ("Qwen3", dict(head_dim=12, rope_parameters=dict(rope_type="default", rope_theta=1e4))),
}


def of_kind(kind, **fields):
    name, own = KINDS[kind]
    return theirs(name, **{**own, **fields})


def assert_same_logits(ours, model, x=None):
    x = tokens(2, 37) if x is None else x
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Hugging Face folder that tests copy from but do not change."""
    folder = tmp_path_factory.mktemp("llama") / "whole"
    of_kind("llama, untied, GQA, llama3 rope").save_pretrained(folder)
    return folder


def changed(llama, folder, weights=None, **config):
    """A copy of the folder with another config.json (a None removes the key) and other weights."""
    folder.mkdir(exist_ok=True)
    content = {**json.loads((llama / "config.json").read_text()), **config}
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(load_file(llama / "model.safetensors") if weights is None else weights, folder / "model.safetensors")
    return folder


# --- Reading


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(tmp_path, kind, sharded):
    model = of_kind(kind)
    model.save_pretrained(tmp_path, max_shard_size="8KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    ours = from_pretrained(tmp_path)
    assert not ours.training and ours.config.kv_heads(0)[0] == model.config.num_key_value_heads
    assert ours.n_params() == model.num_parameters()
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == ours.config.tie_embeddings
    assert_same_logits(ours, model, tokens(2, T))
    new = model.generate(tokens(1, 9), max_new_tokens=12, do_sample=False)[0, 9:].tolist()
    assert ours.generate(tokens(1, 9).tolist(), 12, temperature=0) == [new]


def test_config_files_of_older_transformers_mean_the_same(llama, tmp_path):
    """rope_theta and rope_scaling apart, its type under another name, no head_dim, and Llama 1's stored table."""
    x, ours = tokens(2, T), from_pretrained(llama)
    old = {"type" if name == "rope_type" else name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    weights = {**load_file(llama / "model.safetensors"), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = changed(llama, tmp_path, weights, rope_parameters=None, rope_theta=500.0, rope_scaling=old, head_dim=None)
    assert torch.equal(from_pretrained(folder)(x)[0], ours(x)[0])
    plain = from_pretrained(changed(llama, tmp_path, rope_parameters=None, rope_theta=77.0, num_key_value_heads=2))
    assert plain.config.rope_theta == 77.0 and plain.config.rope_frequencies is None


WINDOW = dict(use_sliding_window=True, sliding_window=24, max_window_layers=1)


@pytest.mark.parametrize("kind,fields", [("mistral", dict(sliding_window=24)), ("qwen2", WINDOW)])
def test_a_sliding_window_ends_the_positions_before_it_would_matter(tmp_path, kind, fields):
    model = of_kind(kind, **fields)
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    assert ours.config.block_size == 24
    assert_same_logits(ours, model, tokens(2, 24))
    ours.config.block_size = T  # as if the window did not matter
    ours.make_rope()
    with pytest.raises(AssertionError):
        assert_same_logits(ours, model, tokens(2, 26))


@pytest.mark.parametrize("name", ["Gemma", "Phi3", "Olmo2", "GPT2", "SmolLM3"])
def test_other_architectures_are_refused(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = THEIRS | dict(pad_token_id=0, num_hidden_layers=4)  # SmolLM3 leaves RoPE out of every fourth layer
    shape = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4) if name == "GPT2" else shape
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM"))
    model(getattr(transformers, f"{name}Config")(**shape)).save_pretrained(tmp_path)
    raises("GPT has no form for|GPT does not|do not fit", from_pretrained, tmp_path)


def test_what_stands_in_the_way_is_named_in_one_line(llama, tmp_path):
    whole = load_file(llama / "model.safetensors")
    q, norm = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
    nan, biased = {**whole, q: whole[q].clone()}, {**whole}
    nan[q][3, 4] = torch.nan
    for layer in range(2):
        for name, width in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            biased[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.full((width,), 0.1)
    tied = "ties lm_head.weight to the embedding, and its weights differ|unexpected_keys: lm_head"
    for weights, config, words in (
        ({name: w for name, w in whole.items() if name != norm}, {}, "1 missing_keys: model.norm.weight"),
        ({**whole, "surprise": torch.ones(1)}, {}, "1 unexpected_keys: surprise"),
        ({**whole, norm: torch.ones(31)}, {}, "1 mismatched_keys: .*model.norm.weight"),
        (whole, dict(hidden_act="gelu"), "computes something that GPT does not: logits differ"),
        (whole, dict(attention_bias=True), "missing_keys"),
        (whole, dict(model_type="no-such-model"), "transformers cannot load"),
        (whole, dict(hidden_size=16), "mismatched_keys"),
        (whole, dict(tie_word_embeddings=True), tied),
        (nan, {}, "layers.1.self_attn.q_proj.weight holds numbers that are not finite"),
        (biased, dict(attention_bias=True), "o_proj.bias is a bias on the output projection"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            from_pretrained(changed(llama, tmp_path, weights, **config))
        assert "\n" not in str(refusal.value)
    silent = {name: torch.zeros_like(w) if name.endswith("o_proj.bias") else w for name, w in biased.items()}
    folder = changed(llama, tmp_path, silent, attention_bias=True)
    loaded = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder)
    assert_same_logits(from_pretrained(folder), loaded)


def test_folders_that_are_not_whole_are_refused(llama, tmp_path, monkeypatch):
    folder, lora = tmp_path / "f", tmp_path / "lora"
    weights = changed(llama, folder) / "model.safetensors"
    raises("no Hugging Face model at", from_pretrained, tmp_path / "nowhere")
    weights.write_bytes(weights.read_bytes()[:5000])
    raises("transformers cannot load", from_pretrained, folder)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    raises("git lfs pull", from_pretrained, folder)
    weights.unlink()
    raises("no weights", from_pretrained, folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    raises("nothing is unpickled here: convert", from_pretrained, folder)
    (folder / "config.json").write_text('{"model_type": ')
    raises("config.json is not JSON", from_pretrained, folder)
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    raises("LoRA adapter: merge it", from_pretrained, lora)
    raises("bare weights", from_pretrained, llama / "model.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    raises("pip install transformers", from_pretrained, llama)


def test_a_name_on_the_hub_is_fetched_or_one_line_says_what_to_do(llama, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(llama))
    assert torch.equal(load_checkpoint("owner/name")[0](tokens(1, 9))[0], from_pretrained(llama)(tokens(1, 9))[0])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: 1 / 0)  # as without a network
    raises("owner/name is not on this disk.*download it elsewhere", load_checkpoint, "owner/name")


# --- Writing


@pytest.mark.parametrize(
    "fields,kind",
    [
        (dict(), "llama"),
        (dict(n_kv_head=2, head_dim=10, norm_eps=1e-4), "llama"),
        (dict(n_kv_head=[[2, 2], [2, 2]], tie_embeddings=True, embedding_multiplier=1.0), "llama"),
        (dict(tie_embeddings=True), "llama"),  # its multiplier goes into the embedding, no longer the head
        (dict(rope_frequencies=[1.0, 0.3, 0.01, 0.004]), "llama"),
        (dict(attention_bias=True, n_kv_head=1, head_dim=12), "qwen2"),
        (dict(attention_bias=True, n_kv_head=2, rope_frequencies=[1.0, 0.3, 0.01, 0.004]), "llama"),
        (dict(qk_norm=True, n_kv_head=2, head_dim=12), "qwen3"),
        (dict(attention="mea", head_norm=False), "llama"),
        (dict(attention="mea", head_norm=False, attention_bias=True), "qwen2"),
        (dict(attention="mea", head_norm=False, n_kv_head=2), "llama"),  # one wide head
        (dict(attention="mea", head_norm=False, n_kv_head=[[2, 3], [1, 2]], attention_bias=True), "llama"),
        (dict(attention="mea", head_norm=False, n_kv_head=3, rope_frequencies=[1.0, 0.3, 0.01, 0.004]), "llama"),
        (dict(attention="mea", head_norm=False, compose="diagonal", n_kv_head=2), "llama"),
    ],
    ids=str,
)
def test_what_is_written_is_read_by_transformers_and_here(tmp_path, fields, kind):
    transformers = pytest.importorskip("transformers")
    model = ours(**fields)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    to_pretrained(model, tmp_path / "new")
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == kind
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "new").iterdir()}
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values()) and loaded.dtype == torch.float32
    assert_same_logits(model, loaded.eval())
    again = from_pretrained(tmp_path / "new")
    assert again.config.block_size == T
    torch.testing.assert_close(again(tokens(2, 37))[0], model(tokens(2, 37))[0], rtol=1e-4, atol=1e-4)


def test_one_hot_compositions_leave_as_grouped_queries(tmp_path):
    model = ours(attention="mea", head_norm=False, n_kv_head=2)
    with torch.no_grad():
        for block in model.layers:
            for w in (block.self_attn.compose_k, block.self_attn.compose_v):
                w.copy_(one_hot_composition(2, 4))
    to_pretrained(model, tmp_path / "new")
    again = from_pretrained(tmp_path / "new")
    assert again.config.n_kv_head == 2 and again.config.head_dim == 8  # nothing is wider
    torch.testing.assert_close(again(tokens(2, 37))[0], model(tokens(2, 37))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(head_norm=True), "head norm"),
        (dict(attention="mea"), "head norm"),
        (dict(attention="tha"), "tha cannot be exported"),
        (dict(attention="dfa", head_norm=False), "dfa cannot be exported"),
        (dict(attention="latent"), "latent cannot be exported"),
        (dict(attention="mea", head_norm=False, n_kv_head=2, qk_norm=True), "QK-norm, or more than MEA, stands"),
        (dict(attention="mea", head_norm=False, qk_norm=True), "QK-norm stands between"),
        (dict(n_kv_head=[[2, 2], [4, 4]]), "different numbers of key/value heads"),
        (dict(qk_norm=True, attention_bias=True), "Qwen3 has the first"),
    ],
    ids=str,
)
def test_models_that_transformers_does_not_know_are_not_written(tmp_path, fields, words):
    raises(words, to_pretrained, ours(**fields), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_writing_takes_nothing_away_and_leaves_nothing_half_done(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").write_text("mine")
    raises("there exists already", to_pretrained, ours(), tmp_path / "there")
    with files_of_at_most(10_000), pytest.raises(OSError, match="could not write .*new"):
        to_pretrained(ours(), tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "notes"]


def test_no_code_of_a_folder_runs(llama, tmp_path, monkeypatch):
    """A config.json may name Python files of its own: they are not run, and nobody is asked whether they should be."""
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    names = dict(AutoConfig="own.C", AutoModelForCausalLM="own.M")
    folder = changed(llama, tmp_path, model_type="own", architectures=["M"], auto_map=names)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    raises("transformers cannot load", load_checkpoint, folder)
    assert not (tmp_path / "ran").exists()


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for path in ("out/smal", "./a/b", "../a/b", "a/b/c"):
        raises("no checkpoint at", load_checkpoint, path)


@pytest.mark.parametrize("kind", ["llama, untied, GQA, llama3 rope", "llama, tied", "qwen2", "mistral"])
@pytest.mark.parametrize("kv_groups", [None, 1])
def test_half_a_cache_goes_in_and_out(tmp_path, kind, kv_groups):
    """Imported, compressed, exported: transformers has the same logits, the same text and half the cache."""
    transformers = pytest.importorskip("transformers")
    model = of_kind(kind)
    model.save_pretrained(tmp_path / "in")
    ours, state = load_checkpoint(tmp_path / "in")
    ranks = uniform_ranks(ours.config, 0.5, "all", "gqa", kv_groups)
    compress(ours, ranks, "gqa", calibrate(ours, tokens(6, 40, seed=3)), kv_groups)
    to_pretrained(ours, tmp_path / "out", pretrained=state["pretrained"])
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same_logits(ours, half)
    new = half.generate(tokens(1, 9), max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert ours.generate(tokens(1, 9).tolist(), 12, temperature=0) == [new.sequences[0, 9:].tolist()]
    whole = model.generate(tokens(1, 9), max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    size = lambda cache: sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert size(new.past_key_values) * 2 == size(whole.past_key_values)
    assert_same_logits(from_pretrained(tmp_path / "out"), half)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_leave_in_the_dtype_they_came_in_or_the_one_asked_for(llama, tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in")
    ours, state = load_checkpoint(tmp_path / "in")
    to_pretrained(ours, tmp_path / "out", pretrained=state["pretrained"])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    to_pretrained(ours, tmp_path / "asked", pretrained=state["pretrained"], dtype="float16")
    assert {w.dtype for w in load_file(tmp_path / "asked" / "model.safetensors").values()} == {torch.float16}


# --- The programs


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A folder as SentencePiece models have it: tokens hold the space before a word; <s> comes first; spare rows."""
    folder = tmp_path_factory.mktemp("hf") / "words"
    to_pretrained(ours(), folder)
    words = ["<s>", "</s>", "<unk>", *(f"▁w{i}" for i in range(30)), "<0xC3>", "<0xA9>"]
    save_sentencepiece(folder, words, start="<s>")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def test_sample_writes_the_words_of_a_folder(with_tokenizer, capsys, monkeypatch):
    seen, reply = [], [3 + 4, 3 + 5, 33, 34, 3 + 6] + 30 * [3 + 1, 3 + 2]

    def generate(model, prompts, *_, stop_tokens, on_token, **__):
        seen.extend([prompts, stop_tokens])
        for token in reply:
            on_token(0, token)
        return [reply]

    options = ["--checkpoint", str(with_tokenizer), "--prompt", "w1 w2", "--max_new_tokens", "5", "--device", "cpu"]
    sample.main(options)
    assert capsys.readouterr().out.startswith("w1 w2")
    monkeypatch.setattr(GPT, "generate", generate)
    sample.main(options)
    assert capsys.readouterr().out == "w1 w2 w4 w5é w6" + 30 * " w1 w2" + "\n"
    assert seen == [[[0, 4, 5]], {1, *range(35, V)}]  # <s> first; </s> and rows without a token end the text


def test_the_program_exports_what_train_py_made_with_what_stood_beside_the_weights(with_tokenizer, tmp_path, capsys):
    """Fine-tuned from a folder: its chat template, its start of text, its generation settings, its dtype."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(with_tokenizer, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    settings = '{"temperature": 0.3, "do_sample": true, "eos_token_id": 1}'
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(settings)
    (tmp_path / "text.txt").write_text("\n".join(f"w{i % 30} w{i * i % 30}" for i in range(3000)))
    prepare(source=str(tmp_path / "text.txt"), tokenizer=f"hf:{tmp_path / 'hf'}", out_dir=tmp_path / "set")
    base = "--preset tiny --threads 1 --device cpu --max_steps 2 --learning_rate 1e-3 --data_dir"
    train.main(arguments(base, tmp_path / "set", "--init_from", tmp_path / "hf", "--out_dir", tmp_path / "run"))
    huggingface.main(arguments("--checkpoint", tmp_path / "run", "--out_dir", tmp_path / "new"))
    said = capsys.readouterr().out
    assert "transformers loads to the same logits" in said and "llama.cpp" not in said
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.temperature == 0.3
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.apply_chat_template([dict(role="user", content="w1 w2")], tokenize=False) == "w1 w2"
    assert tokenizer("w1 w2").input_ids == [0, 4, 5]
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (0, 1)
    ours, state = load_checkpoint(tmp_path / "run")
    assert_same_logits(ours.bfloat16(), loaded)

    train.main(arguments(base, tmp_path / "set", "--out_dir", tmp_path / "scratch --attention mha"))
    huggingface.main(arguments("--checkpoint", tmp_path / "scratch"))  # saw no <s>: neither does who reads it there
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "scratch-hf")("w1 w2").input_ids == [4, 5]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "scratch-hf").bos_token_id is None
    for wrong, said in (
        (["--checkpoint", tmp_path / "scratch", "--out_dir", tmp_path / "new"], "exists already"),
        (["--checkpoint", tmp_path / "scratch", "--overwrite --out_dir", tmp_path / "run"], "no Hugging Face folder"),
    ):
        assert said in refused(capsys, huggingface.main, *wrong)
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_training_starts_from_a_folder(with_tokenizer, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("\n".join(f"w{i % 30} w{i * i % 30}" for i in range(3000)))
    (tmp_path / "tokenizer.json").write_text((with_tokenizer / "tokenizer.json").read_text().replace("w7", "v7"))
    tokenizers = dict(set=f"hf:{with_tokenizer}", words=f"hf:{tmp_path}", bytes="byte")
    for name, tokenizer in tokenizers.items():
        prepare(source=str(tmp_path / "text.txt"), tokenizer=tokenizer, out_dir=tmp_path / name)
    assert open_dataset(tmp_path / "set").vocab_size == 35 < V
    base = "--preset tiny --threads 1 --device cpu --max_steps 2 --learning_rate 1e-9 --block_size 16"
    base = [base, "--init_from", with_tokenizer, "--data_dir"]

    train.main(arguments(*base, tmp_path / "set", "--out_dir", tmp_path / "run"))
    model, _ = load_checkpoint(tmp_path / "run")
    assert model.config.block_size == 16 and model.config.attention == "mha"
    torch.testing.assert_close(model.state_dict(), from_pretrained(with_tokenizer).state_dict(), rtol=0, atol=1e-6)
    prompts = []
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "generate", lambda model, given, *_, **__: prompts.extend(given) or [[]])
        sample.main(["--checkpoint", str(tmp_path / "run"), "--prompt", "w1 w2", "--device", "cpu"])
    assert prompts == [[0, 4, 5]]  # windows began with <s> in training, as the model was made
    for name in ("words", "bytes"):  # other words under the same ids; more tokens than the model has
        said = refused(capsys, train.main, *base, tmp_path / name, "--out_dir", tmp_path / "other")
        assert "another tokenizer" in said and not (tmp_path / "other").exists()
