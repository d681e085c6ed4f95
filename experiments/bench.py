"""What training and decoding cost, what the kernels should cost, and what the compiled code does.

What is compared is measured in turns in one run and printed as ratios, since a machine's speed drifts. For the kernels
a cost model counts bytes and FLOPs from the shapes; the roofline is the larger of bytes / bandwidth and FLOPs / peak.
Beside it stand counts from code compiled ahead of time: the bytes of the asynchronous copies and the FLOPs of the
matrix instructions in the loop over key blocks. So "decode reads the compressed cache once" is checked without a GPU.
Times are measured where they can be: no roofline is a measurement.

    python experiments/bench.py                     # training, decoding, memory: a table, JSON and a picture in minutes
    python experiments/bench.py --training --nanogpt ../nanoGPT --dtype float32
    python experiments/bench.py --minutes --nanogpt ../nanoGPT --threads 1      # loss against minutes (minutes.py)
    python experiments/bench.py --decoding
    python experiments/bench.py --memory            # peak memory of a training step against the sequence's length
    python experiments/bench.py --kernels           # rooflines, timings on this machine; without a GPU compiled loops
    python experiments/bench.py --aot sm_80,sm_90   # the model beside the compiled loops

Read first: attention.py and kernels.py.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from options import autocast, choose_device, choose_dtype, fail, option, parse_options, run_program, save_picture

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import train
from experiments import minutes
from experiments.aot import TARGETS, compile_ahead, record_launches
from experiments.report import command, machine, table
from kernels import mea_attention, mea_decode, rms_norm
from model import GPT, PRESETS, GPTConfig, KVCache

# ---------------------------------------------------------------------------------------------------------------------
# Kernels: the cost model. B batch, T positions, S cached ones, H heads, Hc, n_k, n_v components, D width

# Peak rates of an H100 SXM: dense bfloat16, HBM3, and a typical measured one of its L2 cache
FLOPS, BYTES_PER_SECOND, L2_BYTES_PER_SECOND = 989e12, 3.35e12, 5.5e12


@dataclass
class Cost:
    bytes: float
    flops: float
    from_l2: bool = False

    def seconds(self):
        """By the roofline of an H100."""
        return max(self.bytes / (L2_BYTES_PER_SECOND if self.from_l2 else BYTES_PER_SECOND), self.flops / FLOPS)


def attention_cost(B, T, H, D, itemsize=2):
    """Causal attention forward: q, K, V read and the output written once; two products over half of the square."""
    return Cost(4 * B * H * T * D * itemsize + 4 * B * H * T, 2 * 2 * B * H * D * T * (T + 1) / 2)


def backward_cost(B, T, H, D, itemsize=2):
    """Both passes: 7 products (2 recompute the scores); q, K, V, grad and output read for each, 5 tensors written."""
    return Cost((2 * 4 + 2 + 4) * B * H * T * D * itemsize, 7 * 2 * B * H * D * T * (T + 1) / 2)


def compose_cost(B, T, H, Hc, D, itemsize=2):
    """Mixing keys and values first: Hc heads read and H written, twice."""
    return Cost(2 * (Hc + H) * B * T * D * itemsize, 2 * 2 * Hc * H * B * T * D)


def mix_inside_cost(B, T, H, Hc, D, block_m=128, itemsize=2):
    """The tempting design: every query block of every head loads Hc component tiles, from L2, for each key block."""
    visits = B * H * math.ceil(T / block_m) * (T + block_m) / 2  # (query block, key) pairs
    return Cost(visits * 2 * Hc * D * itemsize, visits * (2 * 2 * Hc * D + 2 * 2 * block_m * D), from_l2=True)


def decode_cost(B, S, H, n_k, n_v, D, itemsize=2, composed=True):
    """One step: the cache once (once per program's worth of heads), and the partial results written and read back."""
    options = kernels.decode_options(torch.device("cpu"), itemsize, H, n_k, n_v, D, composed)  # as on an H100
    reads = math.ceil(H / options["HEADS"]) if composed else 1
    splits = max(1, 2 * 132 // (B * (reads if composed else H)))
    partial = 2 * 4 * B * splits * H * options["VALUES"] * D
    flops = 2 * B * S * D * (H * (n_k + n_v) if composed else 2 * H)
    return Cost(reads * B * S * (n_k + n_v) * D * itemsize + partial, flops)


def compose_then_decode_cost(B, S, H, n_k, n_v, D, itemsize=2):
    """The same step by writing composite heads: the cache read, H heads written and read, for keys and for values."""
    return Cost(B * S * D * itemsize * (n_k + n_v + 4 * H), 2 * B * S * D * H * (n_k + n_v + 2))


def print_table(heads, rows):
    for line in table(heads, rows):
        print(line, flush=True)


def print_rooflines(B=8, T=2048, H=16, D=64, n=4):
    costs = {
        "attention + norm, forward": attention_cost(B, T, H, D),
        f"+ mixing first, Hc={H}": compose_cost(B, T, H, H, D),
        f"+ mixing first, Hc={n}": compose_cost(B, T, H, n, D),
        f"mixing inside the kernel, Hc={H} (from L2)": mix_inside_cost(B, T, H, H, D),
        f"mixing inside the kernel, Hc={n} (from L2)": mix_inside_cost(B, T, H, n, D),
        "attention, backward": backward_cost(B, T, H, D),
        f"decode step, absorbed, {n} of {H} heads cached": decode_cost(B, T, H, n, n, D),
        f"decode step, composing the cache, {n} of {H}": compose_then_decode_cost(B, T, H, n, n, D),
        f"decode step, all {H} heads cached": decode_cost(B, T, H, H, H, D, composed=False),
    }
    rates = f"{FLOPS / 1e12:.0f} TFLOP/s, {BYTES_PER_SECOND / 1e12:.2f} TB/s"
    print(f"Rooflines at {rates}; bf16, B={B} T={T} H={H} D={D}\n")
    rows = [[f"{c.bytes / 1e6:.1f}", f"{c.flops / 1e9:.1f}", f"{c.seconds() * 1e3:.4f}"] for c in costs.values()]
    print_table(["work", "MB moved", "GFLOP", "roofline ms"], [[name, *row] for name, row in zip(costs, rows)])


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: what the compiled code does


def innermost_loops(ptx):
    """The bodies of the loops without a loop inside: text from a label to the branch back to it."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\$L\w+):", ptx, re.M)}
    jumps = [(labels[match[1]], match.start()) for match in re.finditer(r"\bbra(?:\.uni)?\s+(\$L\w+);", ptx)]
    loops = [(start, end) for start, end in jumps if start < end]
    return [ptx[a:b] for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]


def loop_counts(body, warps):
    """(bytes copied by cp.async, FLOPs of matrix instructions) of one pass of one program through a loop."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)(?:,[^;]*)?;", body)
    shapes = lambda name: re.findall(rf"{name}\S*?\.m(\d+)n(\d+)k(\d+)", body)
    wgmma, mma = (sum(math.prod(map(int, s)) for s in shapes(name)) for name in (r"wgmma\.mma_async", r"mma\.sync"))
    copied = 32 * warps * sum(int(size, 0) for size in copies)  # each thread copies so many bytes
    return copied, 2 * (wgmma * warps // 4 + mma * warps)  # four warps execute one wgmma together


def block_model(kernel, options):
    """(bytes, FLOPs) of a program's pass over one key block (query block for dk and dv), bf16, or None."""
    M, N, W = options.get("BLOCK_M"), options.get("BLOCK_N"), options["WIDTH"]
    if kernel == "decode":
        S, keys = options["BLOCK_S"], options["KEYS"]
        return S * (keys + options["VALUES"]) * W * 2, 2 * options["BLOCK_H"] * S * W * (keys + options["BLOCK_V"])
    loaded, products = dict(forward=(N, 2), backward_dkdv=(M, 4), backward_dq=(N, 3)).get(kernel, (None, None))
    return loaded and (2 * loaded * W * 2, products * 2 * M * N * W)  # two tiles are loaded


def print_loop_counts(targets, widths=(64, 128)):
    """Per block of one program: the model's bytes and FLOPs beside the compiled loop's."""

    def rows():
        for target in targets:
            for D in widths:
                for kernel, arguments, options in record_launches(TARGETS[target][3] * 1024, D=D):
                    row = compile_ahead(target, kernel, arguments, options)
                    loops = [loop_counts(body, row["warps"]) for body in innermost_loops(row["asm"])]
                    if model := block_model(row["kernel"], options):
                        compiled = max(loops, key=lambda counts: counts[1], default=(0, 0))
                        (a, c), (b, d) = model, compiled
                        counts = a / 1024, b / 1024, c / 1e6, d / 1e6
                        yield [target, str(D), row["kernel"], *(f"{count:.2f}" for count in counts)]

    print()
    print_table(
        ["target", "D", "kernel", "KB per block, model", "compiled", "MFLOP per block, model", "compiled"], rows()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: what this machine measures


def in_turns(jobs, rounds, warm_up=2):
    """{name: values of `rounds` calls}, all jobs called once before any is called again."""
    values = {name: [] for name in jobs}
    for _ in range(warm_up + rounds):
        for name, job in jobs.items():
            values[name].append(job())
    return {name: taken[warm_up:] for name, taken in values.items()}


def ratio_quartiles(seconds, baseline):
    """[low, median, high] of the ratios of times, round by round."""
    return [float(part) for part in statistics.quantiles([a / b for a, b in zip(seconds, baseline)], n=4)]


def timed(function, device):
    """A job for `in_turns`: the seconds of one call, with a GPU's L2 cache flushed before it."""
    if device == "cpu":

        def job():
            began = time.perf_counter()
            function()
            return time.perf_counter() - began

    else:
        flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def job():
            flush.zero_()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3

    return job


def print_timings(B, T, S, H, D, n):
    """Ratios to SDPA alone, which neither composes nor normalises: what MEA costs on top of plain attention."""

    def heads(count, length):
        return (
            torch.randn(
                B,
                length,
                count,
                D,
            )
            .transpose(1, 2)
            .requires_grad_()
        )

    q, k, v, gain = heads(H, T), heads(H, T), heads(H, T), torch.ones(H, D, requires_grad=True)
    attend = lambda path: lambda: mea_attention(q, k, v, None, None, gain, path=path)
    plain = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    paths = {"SDPA alone": plain, "SDPA + separate norm": lambda: rms_norm(plain(), gain[:, None], 1e-6)}
    paths |= {"reference": attend("reference")}
    training = lambda forward: lambda: torch.autograd.grad(forward().sum(), (q, k, v))
    last, cached, full, compose = heads(H, 1), heads(n, S), heads(H, S), torch.randn(n, H)
    decode = lambda path: lambda: mea_decode(last, cached, cached, compose, compose, gain, path=path)
    every, few = decode_cost(B, S, H, H, H, D, composed=False), decode_cost(B, S, H, n, n, D)
    forward, backward = attention_cost(B, T, H, D), backward_cost(B, T, H, D)
    both = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    steps = {
        f"all {H} heads cached, SDPA alone": (lambda: F.scaled_dot_product_attention(last, full, full), every),
        f"{n} of {H} heads cached, mea_decode": (decode("auto"), few),
        f"{n} of {H} heads cached, reference": (decode("reference"), few),
    }
    kinds = {
        "forward": {name: (torch.no_grad()(path), forward) for name, path in paths.items()},
        "forward + backward": {name: (training(path), both) for name, path in paths.items()},
        "decode": {name: (torch.no_grad()(step), cost) for name, (step, cost) in steps.items()},
    }
    machine = f"CPU, {torch.get_num_threads()} threads"
    shape = f"B={B} T={T} H={H} D={D}, {S} cached positions"
    print(f"\nMeasured: {machine}, float32, {shape}, torch {torch.__version__}; rates count the model's work\n")
    rows = []
    for kind, jobs in kinds.items():  # in turns: what is compared meets the same moments of a busy machine
        taken = in_turns({name: timed(job, "cpu") for name, (job, _) in jobs.items()}, rounds=20)
        base = taken[next(iter(jobs))]
        for name, (_, cost) in jobs.items():
            seconds = statistics.median(taken[name])
            low, middle, high = ratio_quartiles(taken[name], base)
            ratio = "" if taken[name] is base else f"{middle:.2f} ({low:.2f} to {high:.2f})"
            rates = f"{cost.flops / seconds / 1e12:.3f}", f"{cost.bytes / seconds / 1e9:.1f}"
            rows.append([kind, name, f"{seconds * 1e3:.3f}", ratio, *rates])
    print_table(["step", "path", "ms", "ratio to SDPA alone", "TFLOP/s", "GB/s"], rows)


def time_kernels():
    if torch.cuda.is_available():
        from experiments import gpu  # which imports this file

        gpu.time_kernels(gpu.Options())
    else:
        print("\nNo GPU here: the Triton kernels are not timed, only the paths that a CPU takes.")
        print_timings(B=2, T=512, S=2048, H=8, D=64, n=2)


# ---------------------------------------------------------------------------------------------------------------------
# Models: training, decoding, memory

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


class GPT2Shape(nn.Module):
    """nanoGPT's shape from torch's layers: learned positions, LayerNorm, a GELU MLP of 4 widths, tied embeddings."""

    def __init__(self, vocab_size, n_layer, n_head, n_embd, block_size):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        how = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=False)
        layer = nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, **how)
        norm = nn.LayerNorm(n_embd, bias=False)
        self.layers = nn.TransformerEncoder(layer, n_layer, norm, enable_nested_tensor=False)

    def forward(self, x, y):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        hidden = self.layers(self.tokens(x) + self.positions.weight, mask, is_causal=True)
        logits = F.linear(hidden, self.tokens.weight)
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())


def load_nanogpt(folder, shape):
    """(model, optimizer) of a checkout of nanoGPT, as its train.py makes them. Runs the checkout's code."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    with contextlib.redirect_stdout(io.StringIO()):
        model = theirs.GPT(theirs.GPTConfig(**shape, dropout=0.0, bias=False))
        return model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")


def row(section, name, base, seconds, baseline, **more):
    """One line of the table; `ratio` is None for what is compared with itself."""
    ratio = None if name == base else ratio_quartiles(seconds, baseline)
    return dict(section=section, name=name, ms=1e3 * statistics.median(seconds), base=base, ratio=ratio, **more)


def bench_training(device, dtype, nanogpt="", rounds=15):
    """Forward, backward and the whole step (with clipping and AdamW) of every variant at the default preset."""
    batch_size, shape = train.PRESETS["small"]["batch_size"], dict(PRESETS["small"], vocab_size=VOCABULARY)
    T = shape["block_size"]
    x = torch.randint(VOCABULARY, (batch_size, T + 1), device=device)
    models = {name: small(fields) for name, (fields, _) in VARIANTS.items()} | {"gpt-2's shape": GPT2Shape(**shape)}
    pairs = {}
    for name, model in models.items():
        groups = model.parameter_groups(0.1) if isinstance(model, GPT) else model.parameters()
        pairs[name] = model.to(device), torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
    if nanogpt:
        pairs["nanoGPT"] = load_nanogpt(nanogpt, shape)
        pairs["nanoGPT, float32"] = load_nanogpt(nanogpt, shape)  # as its train.py comes: no autocast on a CPU

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
    compared |= {"gpt-2's shape": ["mha"], "nanoGPT": ["mha", "mea"], "nanoGPT, float32": ["mha", "mea"]}
    compared["mea"] += ["mha"]
    for i, section in enumerate(("training, forward", "training, backward", "training, step")):
        seconds = {name: [parts[i] for parts in rounds] for name, rounds in taken.items()}
        for name in taken:
            more = dict(tokens_per_second=batch_size * T / statistics.median(seconds[name])) if i == 2 else {}
            yield from (row(section, name, base, seconds[name], seconds[base], **more) for base in compared[name])


@torch.inference_mode()
def bench_decoding(device, contexts=(128, 512, 2048, 4096), rounds=7, tokens=4):
    """A token decoded behind `context` others: from the cache, or by running the model over all of them again."""
    for context in contexts:
        jobs, bytes_per_token = {}, {}
        for name, (fields, cached) in DECODED.items():
            model = small(fields, block_size=context).to(device).eval()
            cache = KVCache(model.config, 1, context, torch.float32, device) if cached else None
            x = torch.zeros(1, 1 if cached else context, dtype=torch.long, device=device)
            bytes_per_token[name] = cache.nbytes // context if cached else 0

            def job(model=model, cache=cache, x=x):
                if cache:
                    cache.lengths = [context - tokens]
                times = tokens if cache else 1
                began = time.perf_counter()
                for _ in range(times):
                    model(x, cache=cache)[0][0, -1].argmax().item()
                return (time.perf_counter() - began) / times

            jobs[name] = job
        taken = in_turns(jobs, rounds)
        for name, seconds in taken.items():
            more = dict(tokens_per_second=1 / statistics.median(seconds), bytes_per_token=bytes_per_token[name])
            yield row(f"decoding behind {context:,}", name, "mha", seconds, taken["mha"], context=context, **more)


def bench_generation(device, tokens=512, rounds=3):
    """Greedy generation of `tokens` tokens from one, with the cache and without."""
    for name in ("mha", "mea"):
        model = small(VARIANTS[name][0]).to(device).eval()
        generate = lambda use_cache: lambda: model.generate([[1]], tokens, temperature=0, use_cache=use_cache)
        jobs = {f"{name}, cache": timed(generate(True), "cpu"), f"{name}, no cache": timed(generate(False), "cpu")}
        taken = in_turns(jobs, rounds, warm_up=0)
        for which, seconds in taken.items():
            speed = tokens / statistics.median(seconds)
            base = f"{name}, cache"
            yield row(f"generating {tokens}", which, base, seconds, taken[base], tokens_per_second=speed)


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
        for name in ("mha", "mea", "dfa", "tha"):
            for recompute in (False, True):
                label, base, before = name + ", blocks recomputed" * recompute, None, None
                for T in lengths:
                    peak = fresh.apply(memory_of_step, (VARIANTS[name][0], T, recompute))
                    ratio = base and [peak / before] * 3
                    section = f"memory of a step, T = {T:,}"
                    yield dict(section=section, name=label, length=T, bytes=peak, base=base, ratio=ratio)
                    base, before = f"T = {T:,}", peak


def table_line(row):
    amount = f"{row['ms']:.2f} ms" if "ms" in row else f"{row['bytes'] / 2**20:,.0f} MiB"
    low, middle, high = row["ratio"] or (None, None, None)
    ratio = "" if middle is None else f"{middle:.2f}" + f" ({low:.2f} to {high:.2f})" * (low < high)
    speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
    cached = f"{row['bytes_per_token']:,}" if row.get("bytes_per_token") else ""
    return [row["section"], row["name"], amount, row["base"] if ratio else "", ratio, speed, cached]


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def draw(rows, path):
    """Training ratios, decoding against context, memory against length: what of it was measured."""
    draws = dict(training=draw_training, decoding=draw_decoding, memory=draw_memory)
    panels = {name: [row for row in rows if row["section"].startswith(name)] for name in draws}
    panels = {name: panel for name, panel in panels.items() if panel}
    if not panels:
        return
    size = (6.5 * len(panels), 4.6)

    def figure(plt):
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for ax, (name, panel) in zip(axes[0], panels.items()):
            draws[name](ax, panel)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=7)
        return figure

    print(save_picture(path, figure))


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
    ax.set(xlabel="ratio of times: median and quartiles", title="a training step")


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
    ax.set(xlabel="tokens in the context", ylabel="decoded tokens per second", title="decoding, batch 1")


def draw_memory(ax, rows):
    draw_lines(ax, rows, "length", "bytes", 2**20)
    ax.set(xlabel="tokens in the sequence", ylabel="MiB beyond weights and gradients")
    ax.set_title("peak memory of a training step, batch 1")


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    training: bool = option(False, "a training step of every variant, as a ratio to MHA")
    decoding: bool = option(False, "decoded tokens per second against the context: cached, uncached, compressed")
    memory: bool = option(False, "peak memory of a training step against the sequence's length (CPU, Linux; minutes)")
    minutes: bool = option(False, "validation loss of whole runs against minutes, beside --nanogpt's (half an hour)")
    kernels: bool = option(False, "rooflines and timings of attention; on a CPU the loops compiled for sm_90 as well")
    aot: str = option("", "NVIDIA targets (sm_80,sm_90) to compile for: count what the loops do")
    nanogpt: str = option("", "a checkout of nanoGPT, which --training and --minutes measure beside ours (on the CPU)")
    dtype: str = option("auto", "of --training, as train.py's", ["auto", "float32", "bfloat16"])
    threads: int = option(0, "CPU threads (0: as many as cores)", least=0)
    results: str = option(
        "experiments/results/bench",
        "name of the .json, .md and .png to write (of --minutes: experiments/results/minutes)",
    )


def main(argv=None):
    o, given = parse_options(Options, argv)
    chosen = [name for name in ("training", "decoding", "memory") if getattr(o, name)]
    if not (chosen or o.kernels or o.aot or o.minutes):
        chosen = ["training", "decoding", "memory"]
    device = choose_device()
    dtype = choose_dtype(o.dtype, device)
    if o.threads:
        torch.set_num_threads(o.threads)
    compiles = kernels.triton is not None and not kernels.triton.knobs.runtime.interpret
    targets = o.aot.split(",") if o.aot else ["sm_90"] if o.kernels and device.type == "cpu" and compiles else []
    if o.nanogpt and not ("training" in chosen or o.minutes):
        fail("--nanogpt is measured by --training and --minutes: give one of them too")
    if o.minutes and chosen:
        fail(f"--minutes takes the whole machine and has results of its own: leave out --{chosen[0]}")
    if o.minutes and not o.nanogpt:
        fail("--minutes is beside nanoGPT: say where its checkout is with --nanogpt")
    if o.nanogpt and not (device.type == "cpu" and (Path(o.nanogpt) / "model.py").is_file()):
        fail(f"--nanogpt compares on the CPU and needs a checkout with a model.py, not {o.nanogpt} on {device}")
    if "memory" in chosen and not Path("/proc/self/clear_refs").exists():
        fail("--memory reads Linux's /proc/self/status, which is not here: choose --training and --decoding")
    if unknown := [target for target in targets if not target.startswith("sm_") or target not in TARGETS]:
        fail(f"--aot does not know {', '.join(unknown)}")
    if o.aot and not compiles:
        fail("--aot needs triton (pip install triton), without TRITON_INTERPRET in the environment")
    if o.kernels:
        print_rooflines()
    if targets:
        print_loop_counts(targets)
    if o.kernels:
        time_kernels()
    if o.minutes:
        try:
            name = o.results if "results" in given else "experiments/results/minutes"
            minutes.measure(o.nanogpt, torch.get_num_threads(), ROOT / name, command("bench.py", argv))
        except ValueError as error:
            fail(error)
    if chosen:
        measure(o, chosen, device, dtype, command("bench.py", argv))


def measure(o, chosen, device, dtype, how):
    """Run the chosen sections: the table as it comes, and .json, .md and .png at the end."""
    threads = torch.get_num_threads()
    where = (
        f"`{how}` ({machine()}): preset small, {device}, {threads} threads; "
        f"training in {str(dtype)[6:]}, the rest in float32. In turns, medians; ratios of times, median (quartiles). "
        "Memory: one thread, beyond weights and gradients; the ratio is to half the length, 2 being linear."
    )
    sections = dict(
        training=lambda: bench_training(device, dtype, o.nanogpt),
        decoding=lambda: itertools.chain(bench_decoding(device), bench_generation(device)),
        memory=bench_memory,
    )
    rows, lines = [], [where, ""]

    def cells():
        for name in chosen:
            for measured in sections[name]():
                rows.append(measured)
                yield table_line(measured)

    print(where + "\n")
    heads = ["what", "variant", "time or memory", "ratio to", "ratio", "tokens/s", "cached bytes a token"]
    for line in table(heads, cells()):
        lines.append(line)
        print(line, flush=True)
    results = ROOT / o.results
    results.parent.mkdir(parents=True, exist_ok=True)
    content = dict(command=how, threads=threads, dtype=str(dtype), rows=rows)
    results.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(rows, results.with_suffix(".png"))


if __name__ == "__main__":
    run_program(main)
