"""Hugging Face models in and out: what is read or written is proven by comparing logits with `transformers`.

    python huggingface.py --checkpoint out/mha --out_dir out/exported      # a folder that transformers loads

In: a folder, a name on the hub, or a .gguf file of a Llama, Mistral, Qwen2 or Qwen3, or whatever computes the same.
Out: an MHA, whatever `compress.py --method gqa` made, and an MEA without head norm, as a Llama, Qwen2 or Qwen3. No code
in a folder is run, nothing is unpickled. The names of the parameters are Llama's on both sides. Read `model.py` first
and `checkpoint.py` next.
"""

from options import fail, new_folder, option, parse_options, read_json, refuse_pointer, run_program, say

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten

import torch

from attention import MEA, MHA, one_hot_composition
from data.tokenizer import fetch_from_hub, is_hub_name
from model import GPT, GPTConfig

# The fields of `GPTConfig` that a transformers config has under another name, or the same.
FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# What stands beside the weights and says how to use them: kept with a model, and written with it again.
BESIDE = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def import_transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError("Hugging Face models need transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def find_pretrained(path):
    """The config.json of a Hugging Face folder, or the .gguf file, that `path` means; None for what is not theirs.

    What is not on this disk and looks like OWNER/NAME is fetched from the hub. Raises FileNotFoundError or ValueError.
    """
    given, path = str(path), Path(path)
    if path.suffix == ".safetensors" or (path / "adapter_config.json").is_file():
        what = "bare weights" if path.suffix == ".safetensors" else "a LoRA adapter: merge it into its model first"
        raise ValueError(f"{path} is {what}; give a folder with config.json and model.safetensors")
    if not path.exists() and is_hub_name(given):
        path = fetch_from_hub(given, ["*.json", "*.jinja", "*.safetensors"])
    config = path if path.name == "config.json" else path / "config.json"
    if config.is_file() and "model_type" in read_json(config):  # a run folder has a config.json, too, without one
        return config
    return path if path.suffix == ".gguf" and path.is_file() else None


def check_weights(folder):
    """Raise ValueError or FileNotFoundError, in one line, unless there are safetensors in a Hugging Face folder."""
    weights = list(folder.glob("*.safetensors"))
    for path in weights:
        refuse_pointer(path)
    if not weights:
        pickled = any(path.suffix in (".bin", ".pth", ".pt") for path in folder.iterdir())
        why = "pickled weights only, and nothing is unpickled here: convert" if pickled else "no weights: download"
        raise FileNotFoundError(f"{folder} has {why} model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# In


def load_pretrained(path, device="cpu"):
    """(model in eval mode, state) of a config.json or .gguf file that `find_pretrained` found.

    The state has `model`, `config`, and `pretrained`: the dtype of the weights' files and the text of those of BESIDE
    that there are. transformers loads the model; both must then agree on 64 tokens, logits within 1e-4 of their size in
    float32. A sliding window caps the positions: up to its length every position sees all before it, as here. Raises
    FileNotFoundError or ValueError, in one line.
    """
    folder, gguf = path.parent, path.suffix == ".gguf"
    how = dict(dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    how |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # the report then lists mismatched sizes
    if gguf:  # its weights, often of 4 or 8 bits, become float32
        how["gguf_file"] = path.name
    else:
        check_weights(folder)
        how["use_safetensors"] = True
    transformers = import_transformers()
    try:
        stored = None if gguf else transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    except ImportError as error:
        more = "pip install gguf accelerate; " * gguf
        raise ValueError(f"{path} needs more packages: {more}{shorten(str(error), 100)}") from None
    except Exception as error:  # config.json may hold anything, and transformers raises anything for it
        raise ValueError(f"transformers cannot load {folder}: {shorten(str(error), 200)}") from error
    wrong = {what: sorted(map(str, names)) for what, names in report.items() if names and what != "error_msgs"}
    if wrong:
        listed = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in wrong.items())
        raise ValueError(f"the tensors in {folder} do not fit its config.json; {listed}")
    try:
        model = GPT(config_of(theirs))
        model.load_state_dict(weights_of(theirs, model.config))
    except Exception as error:
        what = f"a {theirs.config.model_type} model that GPT has no form for"
        raise ValueError(f"{folder} is {what}: {shorten(str(error), 200)}") from error
    model = model.on_device("cpu")
    if (error := logits_apart(model, theirs)) > 1e-4:
        what = f"a {theirs.config.model_type} model, which computes something that GPT does not"
        raise ValueError(f"{folder} is {what}: logits differ by {error:.1e}")
    beside = {name: (folder / name).read_text("utf-8") for name in BESIDE if (folder / name).is_file()}
    dtype = str(getattr(stored, "dtype", None) or torch.float32).removeprefix("torch.")
    model = model.to(device)
    return model, dict(
        model=model.state_dict(), config=asdict(model.config), pretrained=dict(dtype=dtype, files=beside)
    )


def from_pretrained(name_or_folder, device="cpu"):
    """The model of a Hugging Face folder, hub name or .gguf file, an MHA: see `load_pretrained`.

    Raises FileNotFoundError or ValueError, in one line, for what is not whole or computes something else.
    """
    path = find_pretrained(name_or_folder)
    if path is None:
        raise FileNotFoundError(f"no Hugging Face model at {name_or_folder}: its config.json is missing")
    return load_pretrained(path, device)[0]


@torch.no_grad()
def logits_apart(model, theirs):
    """The largest difference of two models' logits on 64 tokens, over their largest size; infinity for NaN."""
    shape, source = (1, min(64, model.config.block_size)), torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, shape, generator=source)
    wanted, found = theirs.eval()(tokens).logits, model(tokens)[0]
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1)).nan_to_num(torch.inf).item()


def rotary_frequencies(config):
    """(rotary frequencies, scale of cos and sin) of a transformers config, whatever its kind of RoPE."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.double().tolist(), float(rotary.attention_scaling)


def config_of(theirs):
    """The `GPTConfig` of a transformers model. Raises whatever a config without Llama's fields raises."""
    c, names = theirs.config, theirs.state_dict().keys()
    shape = {ours: getattr(c, name, None) for ours, name in FIELDS.items()}
    window = getattr(c, "sliding_window", None) if getattr(c, "use_sliding_window", True) else None
    shape["block_size"] = min(shape["block_size"], window or shape["block_size"])
    shape["qk_norm"] = any(name.endswith("q_norm.weight") for name in names)
    shape["attention_bias"] = any(name.endswith("q_proj.bias") for name in names)
    if c.rope_parameters["rope_type"] != "default":
        shape["rope_frequencies"] = rotary_frequencies(c)[0]
    rope_theta = float(c.rope_parameters["rope_theta"])
    return GPTConfig(**shape, attention="mha", rope_theta=rope_theta, embedding_multiplier=1.0)


def weights_of(theirs, config):
    """The state dict of a transformers model under our names. Raises ValueError, naming what GPT cannot hold."""
    weights = {name.removeprefix("model."): w.detach() for name, w in theirs.state_dict().items()}
    if damaged := [name for name, w in weights.items() if not w.isfinite().all()]:
        raise ValueError(f"{damaged[0]} holds numbers that are not finite")
    if config.tie_embeddings and not torch.equal(weights["lm_head.weight"], weights["embed_tokens.weight"]):
        raise ValueError("its config.json ties lm_head.weight to the embedding, and its weights differ")
    for name in [name for name in weights if name.endswith("o_proj.bias")]:
        if weights.pop(name).any():
            raise ValueError(f"{name} is a bias on the output projection")
    scale = rotary_frequencies(theirs.config)[1]
    if scale != 1:  # yarn scales cos and sin of queries and keys: here the queries alone carry the square
        name = "self_attn.q_norm" if config.qk_norm else "self_attn.q_proj"
        weights = {key: w * scale**2 if name in key else w for key, w in weights.items()}
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Out


@torch.no_grad()
def folded_to_mha(attention):
    """The `MHA` equal to an `MEA` with a full set of components (and with the same head norm).

    Raises ValueError unless n_k == n_v == H, for a parameter that it does not know, and for a subclass.
    """
    name = type(attention).__name__
    if type(attention) is not MEA:
        raise ValueError(f"{name} does not fold into MHA: it may do more than MEA")
    if not attention.n_k == attention.n_v == attention.n_head:
        counts = f"{attention.n_k} and {attention.n_v} for {attention.n_head} heads"
        raise ValueError(f"only a full set of components folds into MHA: {counts}")
    equal = MHA(attention.config, attention.layer).to(attention.q_proj.weight)
    missing, more = equal.load_state_dict(attention.state_dict(), strict=False)
    if missing or {*more} != {"compose_k", "compose_v"}:  # these fold
        raise ValueError(f"{name} does not fold into MHA, which has no {', '.join(missing + more)}")
    for projection, (weight, bias) in zip((equal.k_proj, equal.v_proj), attention.composed_projections()):
        projection.weight.copy_(weight)
        if bias is not None:
            projection.bias.copy_(bias)
    return equal


def one_wide_head(weights, D, n):
    """The weights of an MEA without norms (a state dict), as those of multi-query attention: one key/value head holds
    all components, n of them with those that are added as 0. W = n D; pairs turn by a component's frequencies, n times.

        q_h . sum_c w_k[c, h] k_c / sqrt(D)  =  sqrt(n) concat_c(w_k[c, h] q_h) . concat_c(k_c) / sqrt(W),
        W^O_h sum_c w_v[c, h] z_c  =  concat_c(w_v[c, h] W^O_h) . concat_c(z_c).

    Components stand half beside half, as RoPE pairs the features of a head.
    """

    def side_by_side(heads):  # (any, n, D, M) -> (any, n*D, M)
        return heads.unflatten(2, (2, D // 2)).transpose(1, 2).flatten(1, 3)

    def padded(heads):  # (n_k or n_v, ..) -> (n, ..)
        return torch.cat((heads, heads.new_zeros(n - len(heads), *heads.shape[1:])))

    w_k, w_v = padded(weights["compose_k"]), padded(weights["compose_v"])  # (n, H)
    wide = {}
    for name, w in weights.items():
        if name.startswith("q_proj."):  # a weight (H*D, C) or a bias (H*D)
            heads = torch.einsum("ch,hdm->hcdm", w_k, w.view(w_k.size(1), D, -1))
            wide[name] = (side_by_side(heads) * n**0.5).reshape(-1, *w.shape[1:])
        elif name.startswith("k_proj."):
            wide[name] = side_by_side(padded(w.view(-1, D, w[0].numel()))[None]).reshape(-1, *w.shape[1:])
        elif name.startswith("v_proj."):
            wide[name] = padded(w.unflatten(0, (-1, D))).flatten(0, 1)
        elif name == "o_proj.weight":  # (C, H*D)
            wide[name] = torch.einsum("mhd,ch->mhcd", w.unflatten(1, (-1, D)), w_v).flatten(1)
    return wide


@torch.no_grad()
def as_mha(model):
    """The equal model of plain attention (`mha`) of an MEA without head norm; an MHA is one already.

    As many components as heads fold into the projections. One-hot compositions are grouped queries. Any others become
    one wide key/value head, which caches as many numbers (`one_wide_head`). Raises ValueError.
    """
    c, layers = model.config, [block.self_attn for block in model.layers]
    if c.attention != "mea":
        return model
    D, H, counts = c.head_dim, c.n_head, [c.kv_heads(layer) for layer in range(c.n_layer)]
    n = max(map(max, counts))
    grouped = all(
        type(layer) is MEA and n_k == n_v == n and H % n == 0 and torch.equal(w, one_hot_composition(n, H).to(w))
        for layer, (n_k, n_v) in zip(layers, counts)
        for w in layer.compositions()
    )
    plain = dict(attention="mha", compose="full", mea_form="auto")
    if grouped:
        config = replace(c, n_kv_head=n, **plain)
        attention = [{name: w for name, w in layer.state_dict().items() if "compose_" not in name} for layer in layers]
    elif counts == [(H, H)] * c.n_layer:
        config = replace(c, n_kv_head=H, **plain)
        attention = [folded_to_mha(layer).state_dict() for layer in layers]
    else:
        if c.qk_norm or any(type(layer) is not MEA for layer in layers):
            raise ValueError("QK-norm, or more than MEA, stands between the components of this model and plain heads")
        config = replace(c, n_kv_head=1, head_dim=n * D, rope_frequencies=c.frequencies * n, **plain)
        weights = [layer.state_dict() | dict(zip(("compose_k", "compose_v"), layer.compositions())) for layer in layers]
        attention = [one_wide_head(each, D, n) for each in weights]
    shared = {name: w for name, w in model.state_dict().items() if ".self_attn." not in name}
    own = {f"layers.{i}.self_attn.{name}": w for i, each in enumerate(attention) for name, w in each.items()}
    equal = GPT(config)
    equal.load_state_dict(shared | own)
    return equal.eval()


def exported_model(model, special_tokens):
    """The transformers model equal to `model`: a Llama, with biases on q, k and v a Qwen2 (but where RoPE has
    frequencies of its own), with QK-norm a Qwen3.

    `special_tokens` has the ids that begin and end a text. Raises ValueError for a model that none of them can say.
    """
    if model.config.head_norm:
        raise ValueError("a model with a head norm cannot be exported: transformers has no Llama with one")
    model = as_mha(model)
    c, weights = model.config, model.state_dict()
    if c.attention != "mha":
        raise ValueError(f"{c.attention} cannot be exported: transformers has no Llama with it, only with mha")
    if len({c.kv_heads(layer) for layer in range(c.n_layer)}) > 1:
        raise ValueError("layers with different numbers of key/value heads cannot be exported: a Llama has one number")
    if c.qk_norm and c.attention_bias:
        raise ValueError("qk_norm with attention_bias cannot be exported: Qwen3 has the first, Qwen2 the second")
    if c.embedding_multiplier != 1:  # goes into the embedding, which is then no longer the head
        weights["embed_tokens.weight"] = weights["embed_tokens.weight"] * c.embedding_multiplier
    rope = dict(rope_type="default", rope_theta=c.rope_theta)
    if c.rope_frequencies is not None:  # longrope is the one type that takes any list: theta^(-2i/D) / factor_i
        plain = [c.rope_theta ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2)]
        factors = [a / b for a, b in zip(plain, c.rope_frequencies)]
        rope |= dict(rope_type="longrope", short_factor=factors, long_factor=factors, attention_factor=1.0)
        rope |= dict(factor=1.0, original_max_position_embeddings=c.block_size)
    # With frequencies of its own a Llama, whose o_proj then has a bias, too: llama.cpp reads those of no Qwen.
    plain_qwen2 = c.attention_bias and c.rope_frequencies is None
    kind = "Qwen3" if c.qk_norm else "Qwen2" if plain_qwen2 else "Llama"
    shape = {name: getattr(c, ours) for ours, name in FIELDS.items()} | dict(num_key_value_heads=c.kv_heads(0)[0])
    shape |= dict(tie_word_embeddings=c.tie_embeddings and c.embedding_multiplier == 1, rope_parameters=rope)
    if kind == "Llama" and c.attention_bias:
        shape["attention_bias"] = True
        weights |= {f"layers.{layer}.self_attn.o_proj.bias": torch.zeros(c.n_embd) for layer in range(c.n_layer)}
    shape |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None) | special_tokens
    transformers = import_transformers()
    config = getattr(transformers, f"{kind}Config")(**shape)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    theirs.load_state_dict({name if name.startswith("lm_head.") else f"model.{name}": w for name, w in weights.items()})
    return theirs


@torch.no_grad()
def to_pretrained(model, folder, tokenizer=None, pretrained=None, bare=False, dtype=None, overwrite=False):
    """Write the model as a Hugging Face folder that `transformers` loads to equal logits, its tokenizer along.

    `pretrained` is what the state of a model that came from such a folder says of it: the files beside the weights are
    written again, and the weights in their dtype, unless `dtype` says another. `bare`: the model saw no start of text,
    so the tokenizer writes none. Returns what could not be written, one line or "". The folder appears when it is
    complete. `model` itself is left on the CPU, in float32. Raises ValueError for a model that transformers has no form
    for, FileExistsError for a folder that exists, or OSError.
    """
    pretrained, content, note, special_tokens = pretrained or {}, None, "no tokenizer was given", {}
    if tokenizer is not None:
        ends, note = sorted(tokenizer.end_tokens), ""
        special_tokens = dict(bos_token_id=None if bare else next(iter(tokenizer.start_of_text), None))
        special_tokens |= dict(eos_token_id=ends[0] if len(ends) == 1 else ends)
        try:
            content = tokenizer.to_hugging_face()
        except ValueError as error:
            note = str(error)
    model = model.cpu().float()
    theirs = exported_model(model, special_tokens)
    if (error := logits_apart(model, theirs)) > 1e-4:
        raise ValueError(f"transformers computes something else from this model: logits differ by {error:.1e}")
    theirs = theirs.to(getattr(torch, dtype or pretrained.get("dtype", "float32")))
    with new_folder(folder, overwrite) as new:
        try:
            theirs.save_pretrained(new)
        except OSError:
            raise
        except Exception as error:  # safetensors has an exception of its own for a full disk
            raise OSError(str(error)) from error
        texts = dict(pretrained.get("files", {}))
        if content is not None:
            about = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=tokenizer.decode([tokenizer.end_of_text]))
            if bare:
                content = without_start_of_text(content)
            texts["tokenizer.json"] = json.dumps(content, indent=2) + "\n"
            texts.setdefault("tokenizer_config.json", json.dumps(about, indent=2) + "\n")
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
    return note


def without_start_of_text(content):
    """A tokenizer.json that puts nothing in front of a text: without its template, the part that does."""
    processor = content.get("post_processor") or {}
    rest = [part for part in processor.get("processors", [processor]) if part.get("type") != "TemplateProcessing"]
    return content | dict(post_processor=dict(type="Sequence", processors=rest) if rest and rest[0] else None)


@dataclass
class Options:
    checkpoint: str = option("out/small", "run folder or checkpoint to write for transformers")
    out_dir: str = option("", "folder to write (default: the checkpoint's with -hf behind it)")
    dtype: str = option("auto", "of the weights; auto: as they came", ["auto", "float32", "bfloat16", "float16"])
    overwrite: bool = option(False, "replace what an earlier export wrote to out_dir")


def main(argv=None):
    from checkpoint import find_checkpoint, load_checkpoint, starts_bare  # which import this file
    from data.tokenizer import load_tokenizer

    o, _ = parse_options(Options, argv)
    out_dir = Path(o.out_dir or f"{Path(o.checkpoint)}-hf")
    try:
        if o.overwrite and out_dir.exists() and any(out_dir.iterdir()) and not find_pretrained(out_dir):
            raise ValueError(f"{out_dir} is no Hugging Face folder: give another --out_dir")
        model, state = load_checkpoint(o.checkpoint)
        tokenizer = load_tokenizer(find_checkpoint(o.checkpoint).parent)
        how = dict(pretrained=state.get("pretrained"), bare=starts_bare(state), overwrite=o.overwrite)
        note = to_pretrained(model, out_dir, tokenizer, dtype=None if o.dtype == "auto" else o.dtype, **how)
    except (ValueError, OSError) as error:
        fail(error)
    say(f"wrote {out_dir}, which transformers loads to the same logits" + (f"; {note}" if note else ""))
    if read_json(out_dir / "config.json").get("rope_parameters", {}).get("rope_type") == "longrope":
        say("llama.cpp: its converter leaves the rotary factors out, experiments/engines.py --llama_cpp puts them in")


if __name__ == "__main__":
    run_program(main)
