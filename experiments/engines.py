"""Exported models in other programs: transformers and llama.cpp compute the same and hold half the cache.

    python huggingface.py --checkpoint out/half --out_dir out/half-hf
    python experiments/engines.py --folders smollm2-135m,out/half-hf --llama_cpp ../llama.cpp

The folders are Hugging Face models, the original first. transformers is what they are compared with: predictions after
64 tokens, a greedy text, bytes of each engine's own cache, time of a token behind contexts of noise. Rows are kept in
experiments/results/, so that the command can be repeated until it is done. llama.cpp needs llama-cpp-python and
sentencepiece, and its source for convert_hf_to_gguf.py: `pip download --no-binary :all: llama-cpp-python` gets it.

Where RoPE turns pairs of a model by frequencies of its own, as it does after compress.py --method gqa, a folder says so
as longrope factors. llama.cpp reads such factors of a Llama, and its converter does not write them (seen with 0.3.36 of
llama-cpp-python): without them the model talks nonsense. `add_rope_factors` completes the file, which stays in out_dir.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import RESULTS, Rows, finish_axes, table
from options import fail, option, parse_options, read_json, replace_file, run_program, save_picture, split_list

import numpy as np
import torch

from huggingface import import_transformers


class Transformers:
    """An engine: `feed` appends tokens and returns the last one's logits (V), `keep` cuts what is cached."""

    def __init__(self, folder, o):
        transformers = import_transformers()
        self.name = f"transformers {transformers.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.cache = transformers.DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def feed(self, tokens):
        return self.model(torch.tensor([tokens]), past_key_values=self.cache, use_cache=True).logits[0, -1].numpy()

    def keep(self, length):
        if more := self.cache.get_seq_length() - length:
            self.cache.crop(-more)

    def cached_bytes(self):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class LlamaCpp:
    def __init__(self, folder, o):
        path = str(gguf_of(folder, o))
        try:
            import llama_cpp
        except ImportError as error:
            raise ValueError(f"{error}: pip install llama-cpp-python") from error
        self.name, self.lib = f"llama-cpp-python {llama_cpp.__version__}", llama_cpp
        how = dict(n_ctx=max(o.contexts) + 64, n_threads=o.threads, n_threads_batch=o.threads, verbose=False)
        kind = llama_cpp.GGML_TYPE_F32
        self.model = llama_cpp.Llama(path, type_k=kind, type_v=kind, flash_attn=False, **how)
        self.empty = self.state_size()

    def state_size(self):
        return self.lib.llama_state_seq_get_size(self.model.ctx, 0)

    def feed(self, tokens):
        self.model.eval(tokens)
        return np.ctypeslib.as_array(self.model._ctx.get_logits_ith(-1), shape=(self.model.n_vocab(),)).copy()

    def keep(self, length):
        self.model.n_tokens = length

    def cached_bytes(self):
        return self.state_size() - self.empty


ENGINES = {"transformers": Transformers, "llama.cpp": LlamaCpp}


def gguf_of(folder, o):
    """The GGUF file of a Hugging Face folder, as llama.cpp's converter writes it, with the rotary factors it has."""
    target, made = Path(o.out_dir) / f"{Path(folder).name}.gguf", (Path(folder) / "config.json").stat().st_mtime
    if not target.exists() or target.stat().st_mtime < made:
        converter = Path(o.llama_cpp) / "convert_hf_to_gguf.py"
        if not o.llama_cpp or not converter.is_file():
            raise ValueError(f"{converter} does not exist: give --llama_cpp, the folder of its source")
        target.parent.mkdir(parents=True, exist_ok=True)
        plain = target.with_suffix(".plain.gguf")
        how = [sys.executable, converter, folder, "--outfile", plain, "--outtype", "f32"]
        ended = subprocess.run(list(map(str, how)), capture_output=True, text=True)
        if ended.returncode:
            raise ValueError(f"{converter} cannot convert {folder}: {ended.stderr.strip().splitlines()[-1]}")
        add_rope_factors(plain, folder, plain.with_suffix(".whole"))
        replace_file(plain.with_suffix(".whole"), target)
        plain.unlink()
    return target


def add_rope_factors(source, folder, target):
    """Write the GGUF file `source` as `target`, with the longrope factors of a Hugging Face folder's config.json."""
    import gguf

    rope = read_json(Path(folder) / "config.json").get("rope_parameters", {})
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for length in ("long", "short"):
        if (factors := rope.get(f"{length}_factor")) is not None:
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def written(engine, tokens, length=24):
    """(log-probabilities (V) after `tokens`, the `length` tokens that the engine finds most likely next)."""
    engine.keep(0)
    logits, text = engine.feed(tokens), []
    first = torch.from_numpy(logits).double().log_softmax(-1)
    for _ in range(length):
        text.append(int(logits.argmax()))
        logits = engine.feed(text[-1:])
    return first, text


def seconds_per_token(engine, context, tokens=8):
    """Of decoding `tokens` behind `context` positions that are cached."""
    engine.keep(context - tokens)
    token, began = 1, time.perf_counter()
    for _ in range(tokens):
        token = int(engine.feed([token]).argmax())
    return (time.perf_counter() - began) / tokens


def measure(o, folders):
    """{"engine | folder": what was seen}, each engine's models in turns."""
    tokens = np.random.default_rng(0).integers(100, o.vocabulary, 64).tolist()
    noise = np.random.default_rng(1).integers(100, o.vocabulary, max(o.contexts)).tolist()
    wanted = {folder: written(Transformers(folder, o), tokens) for folder in folders}
    rows = Rows(RESULTS / f"engines-{Path(folders[0]).name}.json")
    for name in o.engines:
        if all(f"{name} | {Path(folder).name}" in rows for folder in folders):
            continue
        engines, found = {folder: ENGINES[name](folder, o) for folder in folders}, {}
        for folder, engine in engines.items():
            (first, text), (theirs, their_text) = written(engine, tokens), wanted[folder]
            apart = (first - theirs).abs().max().item()
            found[folder] = dict(engine=engine.name, apart=apart, same_text=text == their_text, behind={})
            engine.keep(0)
        filled = 0
        for context in o.contexts:
            for folder, engine in engines.items():
                engine.keep(filled)
                for start in range(filled, context, 512):
                    engine.feed(noise[start : min(start + 512, context)])
                found[folder]["bytes_per_token"] = engine.cached_bytes() / context
            filled = context
            taken = {folder: [] for folder in folders}
            for _ in range(o.rounds + 1):  # the first round warms up
                for folder, engine in engines.items():
                    taken[folder].append(seconds_per_token(engine, context))
            for folder in folders:
                own, base = taken[folder][1:], taken[folders[0]][1:]
                ratio = statistics.median(a / b for a, b in zip(own, base))
                speed = dict(tokens_per_second=1 / statistics.median(own), time_ratio=ratio)
                found[folder]["behind"][str(context)] = speed
                engines[folder].keep(context - 8)
                engines[folder].feed(noise[context - 8 : context])
        for folder in folders:
            rows.fill(f"{name} | {Path(folder).name}", lambda: found[folder])
    return rows


def written_table(rows, contexts):
    """The lines of the table."""
    cells = []
    for name, row in rows.items():
        speeds = [row["behind"].get(str(context)) for context in contexts]
        shown = [f"{s['tokens_per_second']:.1f} ({s['time_ratio']:.2f})" if s else "" for s in speeds]
        same = "the same" if row["same_text"] else "another"
        cells.append([row["engine"], name.split(" | ")[1], f"{row['apart']:.0e}", same, *shown])
        cells[-1].append(f"{row['bytes_per_token']:,.0f}")
    behind = [f"behind {context:,}" for context in contexts]
    return table(["engine", "model", "log-probabilities apart", "greedy text", *behind, "cached bytes a token"], cells)


def draw(plt, rows):
    figure, axes = plt.subplots(1, len({row["engine"] for row in rows.values()}), sharex=True, squeeze=False)
    figure.set(figwidth=4 * axes.size, figheight=3.5, layout_engine="constrained")
    for ax, engine in zip(axes[0], dict.fromkeys(row["engine"] for row in rows.values())):
        for name, row in rows.items():
            if row["engine"] == engine:
                speeds = {int(context): seen["tokens_per_second"] for context, seen in row["behind"].items()}
                ax.plot([*speeds], [*speeds.values()], marker="o", label=name.split(" | ")[1])
        ax.set_ylim(bottom=0)
        finish_axes(ax, title=engine, xlabel="cached positions", ylabel="tokens per second")
    return figure


@dataclass
class Options:
    folders: str = option("", "Hugging Face folders with commas between them, the original first")
    engines: str = option("transformers,llama.cpp", f"some of {', '.join(ENGINES)}, with commas between them")
    llama_cpp: str = option("", "folder of llama.cpp's source, for its converter")
    contexts: str = option("1024,4096,8192", "positions behind which decoding is timed")
    rounds: int = option(5, "turns that are timed", least=1)
    out_dir: str = option("out/engines", "where GGUF files go")
    threads: int = option(1, "CPU threads", least=1)


def main(argv=None):
    o, _ = parse_options(Options, argv)
    try:
        o.engines, o.contexts = split_list(o.engines), [int(context) for context in split_list(o.contexts)]
        if unknown := set(o.engines) - ENGINES.keys():
            raise ValueError(f"engines must be some of {', '.join(ENGINES)}, not {', '.join(unknown)}")
        if not o.folders:
            raise ValueError("give --folders, Hugging Face folders with commas between them")
        folders = split_list(o.folders)
        o.vocabulary = min(read_json(Path(folder) / "config.json")["vocab_size"] for folder in folders)
        torch.set_num_threads(o.threads)
        rows = measure(o, folders)
        about = f"float32, threads: {o.threads}; tokens a second and, in brackets, the time over the original's."
        rows.write_table("engines.py", [about, "", *written_table(rows, o.contexts)])
        print(save_picture(rows.path.with_suffix(".png"), lambda plt: draw(plt, rows)))
    except (ValueError, OSError, ImportError) as error:
        fail(error)


if __name__ == "__main__":
    run_program(main)
