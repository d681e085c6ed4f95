"""What training and decoding cost: ratios, measured in turns in one run, since a machine's speed drifts.

    python experiments/bench.py                     # training, decoding, memory: a table, JSON and a picture in minutes
    python experiments/bench.py --training --nanogpt ../nanoGPT --dtype float32
    python experiments/bench.py --decoding
    python experiments/bench.py --memory            # peak memory of a training step against the sequence's length

minutes.py runs whole commands against the clock, roofline.py times attention alone. Read attention.py first.
"""

import contextlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import ROOT, command, finish_axes, in_turns, print_table, ratio_cell, ratio_quartiles
from experiments.report import write_results
from options import autocast, choose_device, choose_dtype, fail, option, parse_options, run_program, save_picture

import torch

import train
from model import GPT, PRESETS, GPTConfig, KVCache

VARIANTS = {  # name: (config, what it is compared with)
    "mha": (dict(attention="mha"), "mha"),
    "mha, head norm": (dict(attention="mha", head_norm=True), "mha"),
    "mea": (dict(attention="mea"), "mha, head norm"),
    "mea, half the components": (dict(attention="mea", n_kv_head=4), "mha, head norm"),
    "dfa": (dict(attention="dfa"), "mha, head norm"),
    "tha": (dict(attention="tha"), "mha"),
}
HALF = dict(attention="mea", head_norm=False, n_kv_head=4)  # what compress.py makes of an MHA of 8 heads
DECODED = {  # name: (config, whether the cache is used)
    "mha": (dict(attention="mha"), True),
    "mha, no cache": (dict(attention="mha"), False),
    "mha, compressed to half": (HALF, True),
    "mea": (dict(attention="mea"), True),
    "mea, no cache": (dict(attention="mea"), False),
    "mea, half, absorbed": (dict(HALF, head_norm=True, mea_form="absorb"), True),
    "mea, half, composed": (dict(HALF, head_norm=True, mea_form="compose"), True),
}
VOCABULARY = 2048


def small(fields, **more):
    return GPT(GPTConfig(**{**PRESETS["small"], "vocab_size": VOCABULARY, **fields, **more}))


def row(section, name, base, seconds, baseline, **more):
    """One line of the table; `ratio` is None for what is compared with itself."""
    ratio = None if name == base else ratio_quartiles(seconds, baseline)
    return dict(section=section, name=name, ms=1e3 * statistics.median(seconds), base=base, ratio=ratio, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def load_nanogpt(folder, shape):
    """(model, optimizer) of a checkout of nanoGPT, as its train.py makes them. Runs the checkout's code."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    with contextlib.redirect_stdout(io.StringIO()):
        model = theirs.GPT(theirs.GPTConfig(**shape, dropout=0.0, bias=False))
        return model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")


def bench_training(device, dtype, nanogpt="", rounds=15):
    """Forward, backward and the whole step (with clipping and AdamW) of every variant at the default preset."""
    batch_size, shape = train.PRESETS["small"]["batch_size"], dict(PRESETS["small"], vocab_size=VOCABULARY)
    T = shape["block_size"]
    x = torch.randint(VOCABULARY, (batch_size, T + 1), device=device)
    models = {name: small(fields) for name, (fields, _) in VARIANTS.items()}
    pairs = {}
    for name, model in models.items():
        fused = device.type in ("cpu", "cuda")
        pairs[name] = model.to(device), torch.optim.AdamW(model.parameter_groups(0.1), fused=fused)
    for name in ("nanoGPT", "nanoGPT, float32") if nanogpt else ():  # its train.py has no autocast on a CPU
        pairs[name] = load_nanogpt(nanogpt, shape)

    def job(model, optimizer, dtype):
        def step():
            began = time.perf_counter()
            with autocast(device, dtype):
                loss = model(x[:, :-1], x[:, 1:].contiguous())[1]
            loss.item()  # waits for a GPU
            forward = time.perf_counter()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            backward = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return forward - began, backward - forward, time.perf_counter() - began

        return step

    precision = lambda name: torch.float32 if name.endswith("float32") else dtype
    taken = in_turns({name: job(*pair, precision(name)) for name, pair in pairs.items()}, rounds)
    compared = {name: [base] for name, (_, base) in VARIANTS.items()}
    compared |= {"nanoGPT": ["mha", "mea"], "nanoGPT, float32": ["mha", "mea"]}
    compared["mea"] += ["mha"]
    for i, section in enumerate(("training, forward", "training, backward", "training, step")):
        seconds = {name: [parts[i] for parts in turns] for name, turns in taken.items()}
        for name in taken:
            more = dict(tokens_per_second=batch_size * T / statistics.median(seconds[name])) if i == 2 else {}
            yield from (row(section, name, base, seconds[name], seconds[base], **more) for base in compared[name])


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def decode_job(model, cache, context, tokens):
    """A job for `in_turns`: seconds for a token behind `context` others, the mean of `tokens` from the cache, or of one
    for which the model runs over all of them again."""
    times = tokens if cache else 1
    x = torch.zeros(1, 1 if cache else context, dtype=torch.long, device=model.lm_head.weight.device)

    @torch.inference_mode()
    def decode():
        if cache:
            cache.lengths = [context - tokens]
        began = time.perf_counter()
        for _ in range(times):
            model.lm_head(model.hidden(x, cache)[0, -1]).argmax().item()
        return (time.perf_counter() - began) / times

    return decode


def bench_decoding(device, contexts=(128, 512, 2048, 4096), rounds=7, tokens=4):
    """A token decoded behind `context` others: from the cache, or by running the model over all of them again."""
    for context in contexts:
        jobs, size = {}, {}
        for name, (fields, cached) in DECODED.items():
            model = small(fields, block_size=context).to(device).eval()
            cache = KVCache(model.config, 1, context, torch.float32, device) if cached else None
            jobs[name], size[name] = decode_job(model, cache, context, tokens), cache.nbytes // context if cached else 0
        taken = in_turns(jobs, rounds)
        for name, seconds in taken.items():
            more = dict(tokens_per_second=1 / statistics.median(seconds), bytes_per_token=size[name], context=context)
            yield row(f"decoding behind {context:,}", name, "mha", seconds, taken["mha"], **more)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory_of_step(fields, T, recompute):
    """Peak bytes that a training step of batch 1 at T positions takes beyond the model and its gradients.

    Of the whole process, as Linux counts its pages: the high-water mark is set back after a short step has loaded what
    is loaded once. So every step needs a process of its own, where no memory that an earlier one freed is used again.
    """
    torch.set_num_threads(1)
    model = small(fields, block_size=T)
    model.activation_checkpointing = recompute

    def step(length):
        x = torch.randint(VOCABULARY, (1, length + 1))
        model(x[:, :-1], x[:, 1:])[1].backward()

    def status(name):
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    step(16)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step(T)
    return status("VmHWM") - before


def bench_memory(lengths=(512, 1024, 2048, 4096, 8192)):
    """Memory that is linear in the length shows as twice as much in each next row; quadratic, as four times.

    glibc keeps most of what is freed, and where the pieces differ in size, as those of Talking-Heads do, it cannot use
    them again: told to give pieces of 1 MiB back at once, it holds what the step needs.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # for the processes started below
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for name, recompute in itertools.product(("mha", "mea", "dfa", "tha"), (False, True)):
            label, base, before = name + ", blocks recomputed" * recompute, None, None
            for T in lengths:
                peak = fresh.apply(memory_of_step, (VARIANTS[name][0], T, recompute))
                ratio = base and [peak / before] * 3
                section = f"memory of a step, T = {T:,}"
                yield dict(section=section, name=label, length=T, bytes=peak, base=base, ratio=ratio)
                base, before = f"T = {T:,}", peak


# ---------------------------------------------------------------------------------------------------------------------
# The table and the picture


def table_line(row):
    amount = f"{row['ms']:.2f} ms" if "ms" in row else f"{row['bytes'] / 2**20:,.0f} MiB"
    ratio = ratio_cell(row["ratio"]) if row["ratio"] else ""
    speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
    cached = f"{row['bytes_per_token']:,}" if row.get("bytes_per_token") else ""
    return [row["section"], row["name"], amount, row["base"] if ratio else "", ratio, speed, cached]


def draw(plt, rows):
    """Training ratios, decoding against context, memory against length: what of it was measured."""
    draws = dict(training=draw_training, decoding=draw_decoding, memory=draw_memory)
    panels = {name: [row for row in rows if row["section"].startswith(name)] for name in draws}
    panels = {name: panel for name, panel in panels.items() if panel}
    size = (6.5 * len(panels), 4.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for ax, (name, panel) in zip(axes[0], panels.items()):
        draws[name](ax, panel)
    return figure


def draw_training(ax, rows):
    rows = [row for row in rows if row["ratio"] and row["base"] == VARIANTS.get(row["name"], (None, "mha"))[1]]
    bases = {row["name"]: row["base"] for row in rows}
    for i, part in enumerate(("forward", "backward", "step")):
        low, middle, high = zip(*(row["ratio"] for row in rows if row["section"].endswith(part)))
        reach = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
        places = [place + 0.27 * (i - 1) for place in range(len(bases))]
        ax.barh(places, middle, 0.25, xerr=reach, error_kw=dict(lw=0.8), label=part)
    ax.set_yticks(range(len(bases)), [f"{name}\nto {base}" for name, base in bases.items()], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(1, color="black", lw=0.8)
    finish_axes(ax, xlabel="ratio of times: median and quartiles", title="a training step")


def draw_lines(ax, rows, x, y, scale=1):
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        mine = [row for row in rows if row["name"] == name]
        cached = mine[0].get("bytes_per_token")
        label = name + (f", {cached / 1024:g} KiB a token" if cached else "")
        style = "o--" if "no cache" in name or "recomputed" in name else "o-"
        ax.plot([row[x] for row in mine], [row[y] / scale for row in mine], style, ms=4, color=f"C{i}", label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_formatter("{x:,.0f}")


def draw_decoding(ax, rows):
    draw_lines(ax, rows, "context", "tokens_per_second")
    y = "decoded tokens per second"
    finish_axes(ax, xlabel="tokens in the context", ylabel=y, title="decoding, batch 1")


def draw_memory(ax, rows):
    draw_lines(ax, rows, "length", "bytes", 2**20)
    y, title = "MiB beyond weights and gradients", "peak memory of a training step, batch 1"
    finish_axes(ax, xlabel="tokens in the sequence", ylabel=y, title=title)


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    training: bool = option(False, "a training step of every variant, as a ratio to MHA")
    decoding: bool = option(False, "decoded tokens per second against the context: cached, uncached, compressed")
    memory: bool = option(False, "peak memory of a training step against the sequence's length (CPU, Linux; minutes)")
    nanogpt: str = option("", "a checkout of nanoGPT, which --training measures beside ours (on the CPU)")
    dtype: str = option("auto", "of --training, as train.py's", ["auto", "float32", "bfloat16"])
    threads: int = option(0, "CPU threads (0: as many as cores)", least=0, most=1024)
    results: str = option("", "name of the .json, .md and .png (default: experiments/results/bench)")


def main(argv=None):
    o, _ = parse_options(Options, argv)
    device, how = choose_device(), command("bench.py", argv)
    if o.threads:
        torch.set_num_threads(o.threads)
    results = ROOT / (o.results or "experiments/results/bench")
    every = ["training", "decoding", "memory"]
    chosen = [name for name in every if getattr(o, name)] or every
    if o.nanogpt and "training" not in chosen:
        fail("--nanogpt is measured by --training: give it too")
    if o.nanogpt and not (device.type == "cpu" and (Path(o.nanogpt) / "model.py").is_file()):
        fail(f"--nanogpt compares on the CPU and needs a checkout with a model.py, not {o.nanogpt} on {device}")
    if "memory" in chosen and not Path("/proc/self/clear_refs").exists():
        fail("--memory reads Linux's /proc/self/status, which is not here: choose --training and --decoding")
    measure(o, chosen, device, results, how)


def measure(o, chosen, device, results, how):
    """Run the chosen sections: the table as it comes, and .json, .md and .png at the end."""
    threads, dtype, rows = torch.get_num_threads(), choose_dtype(o.dtype, device), []
    note = (
        f": preset small, {device}, {threads} threads; training in {str(dtype)[6:]}, the rest in float32. "
        "In turns, medians; ratios of times, median (quartiles). "
        "Memory: one thread, beyond weights and gradients; the ratio is to half the length, 2 being linear."
    )
    sections = dict(
        training=lambda: bench_training(device, dtype, o.nanogpt),
        decoding=lambda: bench_decoding(device),
        memory=bench_memory,
    )

    def cells():
        for name in chosen:
            for measured in sections[name]():
                rows.append(measured)
                yield table_line(measured)

    heads = ["what", "variant", "time or memory", "ratio to", "ratio", "tokens/s", "cached bytes a token"]
    print(f"{how}{note}\n")
    lines = print_table(heads, cells())
    write_results(results, how, lines, note, threads=threads, dtype=str(dtype), rows=rows)
    print(save_picture(results.with_suffix(".png"), lambda plt: draw(plt, rows)))


if __name__ == "__main__":
    run_program(main)
