"""A model on disk: run folders (save, find, load), and Hugging Face models (in and out).

Own files are `torch.save` of a plain dict of tensors, numbers, strings, lists and dicts, read with weights_only=True:
nothing in a file is ever executed. Hugging Face models go through `transformers`, by folder or by name on the hub, and
what was loaded is proven by comparing logits. Read `model.py` first and `train.py` next.
"""

import contextlib
import json
import os
import re
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten

import torch

from attention import MEA
from model import GPT, GPTConfig
from options import read_json, refuse_pointer

FORMAT = "nanomea-3"
OLD_FORMATS = ("nanomea-1", "nanomea-2")  # the optimizer's state by number instead of by name; rope_scaling as a dict

# ---------------------------------------------------------------------------------------------------------------------
# Own files


def save_checkpoint(folder, state):
    """Write `state` as folder/checkpoint.pt and keep the one before as checkpoint.prev.pt. Raises OSError.

    Written beside, flushed to the disk, then renamed: a kill or a full disk at any moment leaves a whole checkpoint,
    between the two renames as checkpoint.prev.pt.
    """
    folder = Path(folder)
    new, current = folder / "checkpoint.tmp", folder / "checkpoint.pt"
    try:
        with open(new, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its own
        new.unlink(missing_ok=True)
        kept = f"{current} is still the one from before" if current.exists() else "there is no earlier one"
        reason = error.strerror if isinstance(error, OSError) else "the disk is full or the file could not be written"
        raise OSError(f"could not save a checkpoint in {folder} ({reason}); {kept}") from error
    if current.exists():
        os.replace(current, folder / "checkpoint.prev.pt")
    os.replace(new, current)
    if os.name == "posix":  # the renames themselves must survive a power cut
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def find_checkpoint(path):
    """The file that `path` means: itself, the newest in a run folder, or a Hugging Face folder's config.json or .gguf.

    What is not on this disk and looks like OWNER/NAME is fetched from the hub. Raises FileNotFoundError or ValueError.
    """
    given, path = str(path), Path(path)
    if path.suffix == ".safetensors" or (path / "adapter_config.json").is_file():
        what = "bare weights" if path.suffix == ".safetensors" else "a LoRA adapter: merge it into its model first"
        raise ValueError(f"{path} is {what}; give a folder with config.json and model.safetensors")
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        path = fetch_from_hub(given)
    config = path if path.name == "config.json" else path / "config.json"
    if config.is_file() and "model_type" in read_json(config):  # a run folder has a config.json, too, without one
        return config
    candidates = [path] if path.is_file() else [path / "checkpoint.pt", path / "checkpoint.prev.pt"]
    for candidate in candidates:
        if candidate.is_file() and candidate != config:
            return candidate
    what = "run folder that train.py made, a checkpoint.pt in it, a Hugging Face folder, or a model's name on the hub"
    raise FileNotFoundError(f"no checkpoint at {given}: give a {what}")


def load_checkpoint(path, device="cpu"):
    """(model in eval mode, state) from a run folder, a checkpoint file, a Hugging Face folder, name or .gguf file.

    The archive's own CRCs find damage before anything is read. The state of a Hugging Face model has `model` and
    `config` only. Raises FileNotFoundError, OSError or ValueError, in one line.
    """
    path = find_checkpoint(path)
    if path.name == "config.json" or path.suffix == ".gguf":
        model = from_pretrained(path, device)
        return model, dict(model=model.state_dict(), config=asdict(model.config))
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise anything, OSError too, for a file that is none of theirs
        why = "pickled code is never run" if "Weights only" in str(error) else shorten(str(error), 100)
        previous = path.with_name("checkpoint.prev.pt")
        advice = f"; the one before it is {previous}: to go on from there, move {path.name} away"
        advice = advice if previous.is_file() and previous != path else ""
        raise ValueError(f"{path} is damaged or not a checkpoint ({why or type(error).__name__}){advice}") from error
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, *OLD_FORMATS):
        raise ValueError(f"{path} is not a checkpoint of this project (format {FORMAT!r} is missing)")
    try:
        config = GPTConfig(**modern_config(state["config"]))
        with torch.device("meta"):  # shapes without memory: the weights of the file become the model's
            model = GPT(config)
        model.load_state_dict(state["model"], assign=True)
        model = on_device(model, device)
        if state["format"] in OLD_FORMATS and "optimizer" in state:
            state["optimizer"] = optimizer_by_name(state["optimizer"], model)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold a whole model: {shorten(str(error), 300)}") from error
    return model, state | dict(config=asdict(config))


def on_device(model, device):
    """A model that was built without memory and given weights: ties what is tied, makes what no file holds."""
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.make_rope()
    return model.to(device).eval()


def modern_config(config):
    """The fields of a config of any format: rotary scalings, as transformers names them, become frequencies."""
    config = dict(config)
    scaling = config.pop("rope_scaling", None)
    if scaling is not None:
        shape = dict(hidden_size=config["n_embd"], num_attention_heads=config["n_head"], head_dim=config["head_dim"])
        shape |= dict(max_position_embeddings=config["block_size"])
        rope = {**scaling, "rope_theta": config["rope_theta"]}
        theirs = import_transformers().LlamaConfig(**shape, rope_parameters=rope)
        config["rope_frequencies"] = frequencies_of(theirs)[0]
    return config


def optimizer_by_name(old, model):
    """An optimizer's state that numbers the parameters, as formats before nanomea-3 do, with their names instead."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in model.parameter_groups(0)]
    moments = {name: old["state"][number] for number, name in enumerate(sum(groups, []))}
    pairs = zip(old["param_groups"], groups)
    return dict(state=moments, param_groups=[{**group, "params": named} for group, named in pairs])


@contextlib.contextmanager
def new_folder(folder, overwrite=False):
    """A folder to write into, which becomes `folder` once all is written and flushed and nothing went wrong.

    Raises FileExistsError if there is something at its place and `overwrite` is False, or OSError.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]) and not overwrite:
        raise FileExistsError(f"{folder} exists already: give a new folder, or remove it first")
    new, old = (folder.with_name(f".{folder.name}.{which}-{os.getpid()}") for which in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError as error:
        raise OSError(f"could not write {folder} ({error.strerror or error}); nothing of it is left") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face models: the names of the parameters are Llama's already


def import_transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError("Hugging Face models need transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def fetch_from_hub(name):
    """The local folder of a model on the hub: safetensors, config and tokenizer. Raises FileNotFoundError, one line."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except ImportError:
        why = "pip install huggingface_hub to look on the hub"
    except Exception as error:  # no network, no such name, no permission: the hub has an exception for each
        advice = "without a network, download the folder elsewhere and give its path"
        why = f"the hub gave none ({type(error).__name__}); {advice}"
    raise FileNotFoundError(f"no checkpoint at {name}, and {why}")


def frequencies_of(config):
    """(rotary frequencies, scale of cos and sin) of a transformers config, whatever its kind of RoPE."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.double().tolist(), float(rotary.attention_scaling)


def check_weights(folder):
    """Raise ValueError or FileNotFoundError, in one line, unless there are safetensors in a Hugging Face folder."""
    weights = list(folder.glob("*.safetensors"))
    for path in weights:
        refuse_pointer(path)
    if not weights:
        pickled = any(path.suffix in (".bin", ".pth", ".pt") for path in folder.iterdir())
        why = "pickled weights only, and nothing is unpickled here: convert" if pickled else "no weights: download"
        raise FileNotFoundError(f"{folder} has {why} model.safetensors")


def from_pretrained(name_or_folder, device="cpu", block_size=None):
    """The model, in eval mode, of a Hugging Face folder, hub name or .gguf file: an MHA with the same key/value heads.

    transformers loads it; both models must then agree on 64 tokens, logits within 1e-4 of their size in float32.
    `block_size` caps the positions, and so does a sliding window: up to its length every position sees all before it,
    as here. Raises FileNotFoundError or ValueError, in one line, for what is not whole or computes something else.
    """
    path = find_checkpoint(name_or_folder)
    folder, how = path.parent, dict(dtype=torch.float32, local_files_only=True, output_loading_info=True)
    how["ignore_mismatched_sizes"] = True  # they are in the report
    if path.suffix == ".gguf":  # its weights, often of 4 or 8 bits, become float32
        how["gguf_file"] = path.name
    else:
        check_weights(folder)
        how["use_safetensors"] = True
    transformers = import_transformers()
    try:
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    except Exception as error:  # config.json may hold anything, and transformers raises anything for it
        raise ValueError(f"transformers cannot load {folder}: {shorten(str(error), 200)}") from error
    wrong = {what: sorted(map(str, names)) for what, names in report.items() if names and what != "error_msgs"}
    if wrong:
        listed = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in wrong.items())
        raise ValueError(f"the tensors in {folder} do not fit its config.json; {listed}")
    try:
        model = GPT(config_of(theirs, block_size))
        weights = {name.removeprefix("model."): w.detach() for name, w in theirs.state_dict().items()}
        scale = frequencies_of(theirs.config)[1]
        if scale != 1:  # yarn scales cos and sin of queries and keys: here the queries alone carry the square
            name = "self_attn.q_norm" if model.config.qk_norm else "self_attn.q_proj"
            weights = {key: w * scale**2 if name in key else w for key, w in weights.items()}
        model.load_state_dict(weights)
    except Exception as error:
        what = f"a {theirs.config.model_type} model that GPT has no form for"
        raise ValueError(f"{folder} is {what}: {shorten(str(error), 200)}") from error
    model = on_device(model, "cpu")
    shape = 1, min(64, model.config.block_size)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = theirs.eval()(tokens).logits, model(tokens)[0]
    error = ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item()
    if not error < 1e-4:
        what = f"a {theirs.config.model_type} model, which computes something that GPT does not"
        raise ValueError(f"{folder} is {what}: logits differ by {error:.1e}")
    return model.to(device)


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


def config_of(theirs, block_size=None):
    """The `GPTConfig` of a transformers model. Raises whatever a config without Llama's fields raises."""
    c, names = theirs.config, theirs.state_dict().keys()
    shape = {ours: getattr(c, name, None) for ours, name in FIELDS.items()}
    window = getattr(c, "sliding_window", None) if getattr(c, "use_sliding_window", True) else None
    shape["block_size"] = min(limit for limit in (shape["block_size"], window, block_size) if limit)
    shape["qk_norm"] = any(name.endswith("q_norm.weight") for name in names)
    shape["attention_bias"] = any(name.endswith("q_proj.bias") for name in names)
    if c.rope_parameters["rope_type"] != "default":
        shape["rope_frequencies"] = frequencies_of(c)[0]
    rope_theta = float(c.rope_parameters["rope_theta"])
    return GPTConfig(**shape, attention="mha", rope_theta=rope_theta, embedding_multiplier=1.0)


def exported_model(model, spoken):
    """The transformers model equal to `model`: a Llama, with biases on q, k and v a Qwen2, with QK-norm a Qwen3.

    `spoken` has the ids that begin and end a text. Raises ValueError for a model that none of them can say.
    """
    c, weights = model.config, model.state_dict()
    if c.head_norm:
        raise ValueError("a model with a head norm cannot be exported: transformers has no Llama with one")
    if c.attention not in ("mha", "mea"):
        raise ValueError(f"{c.attention} cannot be exported: transformers has no Llama with it, only with mha")
    if len({c.kv_heads(layer) for layer in range(c.n_layer)}) > 1:
        raise ValueError("layers with different numbers of key/value heads cannot be exported: a Llama has one number")
    if c.qk_norm and c.attention_bias:
        raise ValueError("qk_norm with attention_bias cannot be exported: Qwen3 has the first, Qwen2 the second")
    for i, block in enumerate(model.layers):
        if isinstance(block.self_attn, MEA):  # fold() refuses what is more than an MHA
            prefix = f"layers.{i}.self_attn."
            weights = {name: w for name, w in weights.items() if not name.startswith(prefix)}
            weights |= {prefix + name: w for name, w in block.self_attn.fold().state_dict().items()}
    if c.embedding_multiplier != 1:  # goes into the embedding, which is then no longer the head
        weights["embed_tokens.weight"] = weights["embed_tokens.weight"] * c.embedding_multiplier
    rope = dict(rope_type="default", rope_theta=c.rope_theta)
    if c.rope_frequencies is not None:  # longrope is the one type that takes any list: theta^(-2i/D) / factor_i
        plain = [c.rope_theta ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2)]
        factors = [a / b for a, b in zip(plain, c.rope_frequencies)]
        rope |= dict(rope_type="longrope", short_factor=factors, long_factor=factors, attention_factor=1.0)
        rope |= dict(factor=1.0, original_max_position_embeddings=c.block_size)
    kind = "Qwen3" if c.qk_norm else "Qwen2" if c.attention_bias else "Llama"
    shape = {name: getattr(c, ours) for ours, name in FIELDS.items()} | dict(num_key_value_heads=c.kv_heads(0)[0])
    shape |= dict(tie_word_embeddings=c.tie_embeddings and c.embedding_multiplier == 1, rope_parameters=rope)
    shape |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None) | spoken
    transformers = import_transformers()
    config = getattr(transformers, f"{kind}Config")(**shape)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).to(model.lm_head.weight.dtype)
    named = {name if name.startswith("lm_head.") else f"model.{name}": w for name, w in weights.items()}
    theirs.load_state_dict(named)
    return theirs


@torch.no_grad()
def to_pretrained(model, folder, tokenizer=None):
    """Write the model as a Hugging Face folder that `transformers` loads to equal logits, its tokenizer along.

    Returns what could not be written, one line or "". The folder appears when it is complete. Raises ValueError,
    FileExistsError for a folder that exists, or OSError.
    """
    content, note, spoken = None, "no tokenizer was given", {}
    if tokenizer is not None:
        ends, note = sorted(tokenizer.end_tokens), ""
        spoken = dict(bos_token_id=next(iter(tokenizer.start_of_text), None))
        spoken |= dict(eos_token_id=ends[0] if len(ends) == 1 else ends)
        try:
            content = tokenizer.to_hugging_face()
        except ValueError as error:
            note = str(error)
    theirs = exported_model(model, spoken)
    with new_folder(folder) as new:
        try:
            theirs.save_pretrained(new)
        except OSError:
            raise
        except Exception as error:  # safetensors has an exception of its own for a full disk
            raise OSError(str(error)) from error
        if content is not None:
            spelled = tokenizer.decode([tokenizer.end_of_text])
            about = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=spelled)
            for name, what in (("tokenizer.json", content), ("tokenizer_config.json", about)):
                (new / name).write_text(json.dumps(what, indent=2) + "\n", encoding="utf-8")
    return note
