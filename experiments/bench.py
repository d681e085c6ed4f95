"""What training and decoding cost, what the kernels should cost, and what the compiled code does.

Whatever is compared is measured in turns in one run and printed as ratios, since a machine's speed drifts. For the kernels, a cost model counts bytes and FLOPs from the shapes; the roofline time is the larger of bytes / bandwidth and FLOPs / peak. Beside the
model stand counts from code compiled ahead of time: the loop over key blocks is found in the PTX, and the bytes of its asynchronous
copies and the FLOPs of its matrix instructions are added up. So "decode reads the compressed cache once" is checked without a GPU.
Times are measured where they can be: no roofline is a measurement.

    python experiments/bench.py                     # training, decoding and memory in one table, JSON and picture: some minutes
    python experiments/bench.py --training --nanogpt ../nanoGPT --dtype float32
    python experiments/bench.py --decoding
    python experiments/bench.py --memory            # peak memory of a training step against the sequence's length, on the CPU
    python experiments/bench.py --kernels           # rooflines, and timings on this machine; without a GPU the compiled loops (sm_90), too
    python experiments/bench.py --aot sm_80,sm_90   # the model beside the compiled loops

Read first: attention.py and kernels.py.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"} | os.environ  # before torch: see train.py

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels
import train
from options import autocast, choose_device, choose_dtype
from kernels import compose_heads, head_norm, mea_attention, mea_decode
from model import GPT, PRESETS, GPTConfig, KVCache

# ---- kernels: the cost model ----------------------------------------------------------------------------------------------


@dataclass
class Limits:
    """Peak rates of a device; the defaults are an H100 SXM's (dense bf16, HBM3; the L2 rate is a typical measured one)."""
    flops: float = 989e12
    bytes_per_second: float = 3.35e12
    l2_bytes_per_second: float = 5.5e12


@dataclass
class Cost:
    bytes: float
    flops: float
    from_l2: bool = False

    def seconds(self, limits):
        return max(self.bytes / (limits.l2_bytes_per_second if self.from_l2 else limits.bytes_per_second), self.flops / limits.flops)


def attention_cost(B, T, H, D, itemsize=2):
    """Causal attention forward: q, K, V read and the output written once; two products over half of the T x T square."""
    return Cost(4 * B * H * T * D * itemsize + 4 * B * H * T, 2 * 2 * B * H * D * T * (T + 1) / 2)


def backward_cost(B, T, H, D, itemsize=2):
    """Both passes: 7 products (2 of them recompute the scores); q, K, V, grad and output read for each, 5 tensors written."""
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
    return Cost(reads * B * S * (n_k + n_v) * D * itemsize + partial, 2 * B * S * D * (H * (n_k + n_v) if composed else 2 * H))


def compose_then_decode_cost(B, S, H, n_k, n_v, D, itemsize=2):
    """The same step by writing composite heads: the cache read, H heads written and read, for keys and for values."""
    return Cost(B * S * D * itemsize * (n_k + n_v + 4 * H), 2 * B * S * D * H * (n_k + n_v + 2))


def print_rooflines(limits, B=8, T=2048, H=16, D=64, n=4):
    print(f"Rooflines at {limits.flops / 1e12:.0f} TFLOP/s, {limits.bytes_per_second / 1e12:.2f} TB/s; bf16, B={B} T={T} H={H} D={D}\n")
    print("| work | MB moved | GFLOP | roofline ms |")
    print("|---|---|---|---|")
    for name, cost in {
        "attention + norm, forward": attention_cost(B, T, H, D),
        f"+ mixing first, Hc={H}": compose_cost(B, T, H, H, D),
        f"+ mixing first, Hc={n}": compose_cost(B, T, H, n, D),
        f"mixing inside the kernel, Hc={H} (from L2)": mix_inside_cost(B, T, H, H, D),
        f"mixing inside the kernel, Hc={n} (from L2)": mix_inside_cost(B, T, H, n, D),
        "attention, backward": backward_cost(B, T, H, D),
        f"decode step, absorbed, {n} of {H} heads cached": decode_cost(B, T, H, n, n, D),
        f"decode step, composing the cache, {n} of {H}": compose_then_decode_cost(B, T, H, n, n, D),
        f"decode step, all {H} heads cached": decode_cost(B, T, H, H, H, D, composed=False),
    }.items():
        print(f"| {name} | {cost.bytes / 1e6:.1f} | {cost.flops / 1e9:.1f} | {cost.seconds(limits) * 1e3:.4f} |")


# ---- kernels: what the compiled code does ---------------------------------------------------------------------------------


def innermost_loops(ptx):
    """The bodies of the loops without a loop inside: text from a label to the branch back to it."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\$L\w+):", ptx, re.M)}
    jumps = [(labels[match[1]], match.start()) for match in re.finditer(r"\bbra(?:\.uni)?\s+(\$L\w+);", ptx)]
    loops = [(start, end) for start, end in jumps if start < end]
    return [ptx[a:b] for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]


def loop_counts(body, warps):
    """(bytes copied by cp.async, FLOPs of matrix instructions) of one pass of one program through a loop."""
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)(?:,[^;]*)?;", body)  # bytes per thread
    copied = 32 * warps * sum(int(size, 0) for size in sizes)
    wgmma = sum(math.prod(map(int, shape)) for shape in re.findall(r"wgmma\.mma_async\S*?\.m(\d+)n(\d+)k(\d+)", body))
    mma = sum(math.prod(map(int, shape)) for shape in re.findall(r"mma\.sync\S*?\.m(\d+)n(\d+)k(\d+)", body))
    return copied, 2 * (wgmma * warps // 4 + mma * warps)  # four warps execute one wgmma together


def print_loop_counts(targets, widths=(64, 128)):
    """Per key block (query block for dk/dv) of one program: the model's bytes and FLOPs beside the compiled loop's, bf16."""
    print("\n| target | D | kernel | KB per block, model | compiled | MFLOP per block, model | compiled |")
    print("|---|---|---|---|---|---|---|")
    for target in targets:
        for D in widths:
            for kernel, arguments, options in kernels.record_launches(kernels.TARGETS[target][3] * 1024, D=D):
                row = kernels.compile_ahead(target, kernel, arguments, options)
                loops = [loop_counts(body, row["warps"]) for body in innermost_loops(row["asm"])]
                copied, flops = max(loops, key=lambda counts: counts[1], default=(0, 0))
                M, N, W = options.get("BLOCK_M"), options.get("BLOCK_N"), options["WIDTH"]
                model = {
                    "forward": lambda: (2 * N * W * 2, 2 * 2 * M * N * W),  # K and V tiles; two products
                    "backward_dkdv": lambda: (2 * M * W * 2, 4 * 2 * M * N * W),  # q and gradient tiles; four products
                    "backward_dq": lambda: (2 * N * W * 2, 3 * 2 * M * N * W),
                    "decode": lambda: (options["BLOCK_S"] * (options["KEYS"] + options["VALUES"]) * W * 2,
                                       2 * options["BLOCK_H"] * options["BLOCK_S"] * W * (options["KEYS"] + options["BLOCK_V"])),
                }.get(row["kernel"])
                if model:
                    model_bytes, model_flops = model()
                    counts = model_bytes / 1024, copied / 1024, model_flops / 1e6, flops / 1e6
                    print(f"| {target} | {D} | {row['kernel']} | " + " | ".join(f"{count:.2f}" for count in counts) + " |")


# ---- kernels: what this machine measures ----------------------------------------------------------------------------------


def timed(function, device):
    """A job for `in_turns`: the seconds of one call, with a GPU's L2 cache flushed before it."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device == "cuda" else None

    def job():
        if device == "cuda":
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    return job


def print_timings(limits, device, B, T, S, H, D, n):
    """Ratios to SDPA alone, which neither composes nor normalises: what MEA costs on top of plain attention."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads = lambda count, length: torch.randn(B, length, count, D, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
    q, k, v, gain = heads(H, T), heads(H, T), heads(H, T), torch.ones(H, D, device=device, requires_grad=True)
    plain = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    paths = {"SDPA alone": plain, "SDPA + separate norm": lambda: head_norm(plain(), gain),
             "reference": lambda: mea_attention(q, k, v, None, None, gain, path="reference")}
    if device == "cuda":
        paths = {"our kernel": lambda: mea_attention(q, k, v, None, None, gain, path="triton"), **paths}

    def training(forward):
        return lambda: torch.autograd.grad(forward().sum(), (q, k, v))

    forward, backward = attention_cost(B, T, H, D), backward_cost(B, T, H, D)
    jobs = [("forward", name, torch.no_grad()(function), forward.flops, forward.bytes) for name, function in paths.items()]
    jobs += [("forward + backward", name, training(function), forward.flops + backward.flops, forward.bytes + backward.bytes)
             for name, function in paths.items()]
    last, cached, full, compose = heads(H, 1), heads(n, S), heads(H, S), torch.randn(n, H, device=device)
    small, large = decode_cost(B, S, H, n, n, D), decode_cost(B, S, H, H, H, D, composed=False)
    step = lambda path: torch.no_grad()(lambda: mea_decode(last, cached, cached, compose, compose, gain, path=path))
    plain_step = torch.no_grad()(lambda: F.scaled_dot_product_attention(last, full, full))
    jobs += [("decode", f"all {H} heads cached, SDPA alone", plain_step, large.flops, large.bytes),
             ("decode", f"{n} of {H} heads cached, mea_decode", step("auto"), small.flops, small.bytes),
             ("decode", f"{n} of {H} heads cached, reference", step("reference"), small.flops, small.bytes)]
    measured = {}
    for kind in dict.fromkeys(job[0] for job in jobs):  # in turns: what is compared meets the same moments of a busy machine
        measured |= in_turns({job[:2]: timed(job[2], device) for job in jobs if job[0] == kind}, rounds=20)
    print(f"\nMeasured: {torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, {dtype}, "
          f"B={B} T={T} H={H} D={D}, {S} cached positions, torch {torch.__version__}; TFLOP/s and GB/s count the model's work"
          + (f" (limits {limits.flops / 1e12:.0f} and {limits.bytes_per_second / 1e9:.0f})" if device == "cuda" else "") + "\n")
    print("| step | path | ms | ratio to SDPA alone | TFLOP/s | GB/s |")
    print("|---|---|---|---|---|---|")
    for kind, name, _, flops, moved in jobs:
        base = next(job[:2] for job in jobs if job[0] == kind and "SDPA alone" in job[1])
        seconds = statistics.median(measured[kind, name])
        low, middle, high = statistics.quantiles([a / b for a, b in zip(measured[kind, name], measured[base])], n=4)
        ratio = "" if base == (kind, name) else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {kind} | {name} | {seconds * 1e3:.3f} | {ratio} | {flops / seconds / 1e12:.3f} | {moved / seconds / 1e9:.1f} |")


def time_kernels():
    if torch.cuda.is_available():
        for D in (64, 128):
            print_timings(Limits(), "cuda", B=8, T=2048, S=8192, H=16, D=D, n=4)
    else:
        print("\nNo GPU here: the Triton kernels are not timed, only the paths that a CPU takes.")
        print_timings(Limits(), "cpu", B=2, T=512, S=2048, H=8, D=64, n=2)


# ---- models: training, decoding, memory -----------------------------------------------------------------------------------

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


def small(fields, **more):
    return GPT(GPTConfig(**{**PRESETS["small"], "vocab_size": 2048, **fields, **more}))


class GPT2Shape(nn.Module):
    """nanoGPT's shape from torch's own layers: learned positions, LayerNorm, an MLP of GELU and 4 times the width, tied embeddings."""

    def __init__(self, vocab_size, n_layer, n_head, n_embd, block_size):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        layer = nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=False)
        self.layers = nn.TransformerEncoder(layer, n_layer, nn.LayerNorm(n_embd, bias=False), enable_nested_tensor=False)

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


def in_turns(jobs, rounds, warm_up=2):
    """{name: values of `rounds` calls}, all jobs called once before any is called again."""
    values = {name: [] for name in jobs}
    for _ in range(warm_up + rounds):
        for name, job in jobs.items():
            values[name].append(job())
    return {name: taken[warm_up:] for name, taken in values.items()}


def row(section, name, base, seconds, baseline, **more):
    """One line of the table. `ratio`: quartiles of the ratios of times, round by round."""
    ratio = None if name == base else [float(part) for part in statistics.quantiles([a / b for a, b in zip(seconds, baseline)], n=4)]
    return dict(section=section, name=name, ms=1e3 * statistics.median(seconds), base=base, ratio=ratio, **more)


def bench_training(device, dtype, nanogpt=None, rounds=15):
    """Forward, backward and the whole step (with clipping and AdamW) of every variant at the default preset."""
    batch_size, shape = train.TRAINING["small"]["batch_size"], {"vocab_size": 2048, **PRESETS["small"]}
    T = shape["block_size"]
    x = torch.randint(2048, (batch_size, T + 1), device=device)
    models = {name: small(fields) for name, (fields, _) in VARIANTS.items()} | {"gpt-2's shape": GPT2Shape(**shape)}
    pairs = {}
    for name, model in models.items():
        groups = model.parameter_groups(0.1) if isinstance(model, GPT) else model.parameters()
        pairs[name] = model.to(device), torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
    if nanogpt:
        pairs["nanoGPT"] = load_nanogpt(nanogpt, shape)

    def job(model, optimizer):
        def step():
            began = time.perf_counter()
            with autocast(device, dtype):
                loss = model(x[:, :-1], x[:, 1:].contiguous())[1]
            loss.item()  # waits for a GPU
            forward = time.perf_counter()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            norm.item()
            backward = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return forward - began, backward - forward, time.perf_counter() - began

        return step

    taken = in_turns({name: job(*pair) for name, pair in pairs.items()}, rounds)
    part = lambda name, i: [seconds[i] for seconds in taken[name]]
    compared = {name: [base] for name, (_, base) in VARIANTS.items()} | {"gpt-2's shape": ["mha"], "nanoGPT": ["mha", "mea"]}
    for i, section in enumerate(("training, forward", "training, backward", "training, step")):
        for name in taken:
            for base in compared[name]:
                more = dict(tokens_per_second=batch_size * T / statistics.median(part(name, i))) if i == 2 else {}
                yield row(section, name, base, part(name, i), part(base, i), **more)


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
            more = dict(tokens_per_second=1 / statistics.median(seconds), context=context, bytes_per_token=bytes_per_token[name])
            yield row(f"decoding behind {context:,}", name, "mha", seconds, taken["mha"], **more)


def bench_generation(device, tokens=512, rounds=3):
    """Greedy generation of `tokens` tokens from one, with the cache and without."""
    for name in ("mha", "mea"):
        model = small(VARIANTS[name][0]).to(device).eval()

        def job(use_cache):
            began = time.perf_counter()
            model.generate([[1]], tokens, temperature=0, use_cache=use_cache)
            return time.perf_counter() - began

        with_cache, without = f"{name}, cache", f"{name}, no cache"
        taken = in_turns({with_cache: lambda: job(True), without: lambda: job(False)}, rounds, warm_up=0)
        for which in taken:
            speed = tokens / statistics.median(taken[which])
            yield row(f"generating {tokens}", which, with_cache, taken[which], taken[with_cache], tokens_per_second=speed)


def memory_of_step(fields, T, recompute):
    """Peak bytes that a training step of batch 1 at T positions takes beyond the model and its gradients.

    Of the whole process, as Linux counts its pages: the high-water mark is set back after a short step has loaded what is loaded
    once. So every step needs a process of its own, where no memory that an earlier one freed is used again.
    """
    torch.set_num_threads(1)
    model = small(fields, block_size=T)
    model.activation_checkpointing = recompute

    def step(length):
        x = torch.randint(2048, (1, length + 1))
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

    glibc keeps most of what is freed, and where the pieces differ in size, as those of Talking-Heads do, it cannot use them again:
    told to give pieces of 1 MiB back at once, it holds what the step needs.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # for the processes started below
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for name in ("mha", "mea", "dfa", "tha"):
            for recompute in (False, True):
                label, before = name + ", blocks recomputed" * recompute, None
                for T in lengths:
                    peak = fresh.apply(memory_of_step, (VARIANTS[name][0], T, recompute))
                    yield dict(section=f"memory of a step, T = {T:,}", name=label, length=T, bytes=peak, base=before and f"T = {before[0]:,}",
                               ratio=before and [peak / before[1]] * 3)  # fmt: skip
                    before = T, peak


def table_line(row):
    amount = f"{row['ms']:.2f} ms" if "ms" in row else f"{row['bytes'] / 2**20:,.0f} MiB"
    low, middle, high = row["ratio"] or (None, None, None)
    ratio = "" if middle is None else f"{middle:.2f}" + f" ({low:.2f} to {high:.2f})" * (low < high)
    speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
    cached = f"{row['bytes_per_token']:,}" if row.get("bytes_per_token") else ""
    return f"| {row['section']} | {row['name']} | {amount} | {row['base'] if ratio else ''} | {ratio} | {speed} | {cached} |"


def draw(rows, path):
    """Training ratios, memory against length, decoding against context: whatever of it was measured, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    training = [row for row in rows if row["section"].startswith("training") and row["base"] in (VARIANTS.get(row["name"], (0, "mha"))[1],)]
    decoding = [row for row in rows if row["section"].startswith("decoding")]
    memory = [row for row in rows if row["section"].startswith("memory")]
    panels = [panel for panel in (training, decoding, memory) if panel]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.6), layout="constrained", squeeze=False)
    for ax, panel in zip(axes[0], panels):
        if panel is training:
            names = [row["name"] for row in panel if row["section"].endswith("step") and row["ratio"]]
            for i, part in enumerate(("forward", "backward", "step")):
                found = {row["name"]: row for row in panel if row["section"].endswith(part)}
                low, middle, high = zip(*(found[name]["ratio"] for name in names))
                places = [place + 0.27 * (i - 1) for place in range(len(names))]
                reach = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
                ax.barh(places, middle, 0.25, xerr=reach, error_kw=dict(lw=0.8), label=part)
            bases = {row["name"]: row["base"] for row in panel}
            ax.set_yticks(range(len(names)), [f"{name}\nto {bases[name]}" for name in names], fontsize=8)
            ax.invert_yaxis()
            ax.axvline(1, color="black", lw=0.8)
            ax.set(xlabel="ratio of times: median and quartiles", title="a training step")
        else:
            x, y, scale = ("context", "tokens_per_second", 1) if panel is decoding else ("length", "bytes", 2**20)
            for i, name in enumerate(dict.fromkeys(row["name"] for row in panel)):
                line = [row for row in panel if row["name"] == name]
                cached = f", {line[0]['bytes_per_token'] / 1024:g} KiB a token" if line[0].get("bytes_per_token") else ""
                broken = "no cache" in name or "recomputed" in name
                ax.plot([row[x] for row in line], [row[y] / scale for row in line], "o--" if broken else "o-", ms=4, color=f"C{i}", label=name + cached)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:,.0f}")
            ax.yaxis.set_major_formatter("{x:,.0f}")
            if panel is decoding:
                ax.set(xlabel="tokens in the context", ylabel="decoded tokens per second", title="decoding, batch 1")
            else:
                ax.set(xlabel="tokens in the sequence", ylabel="MiB beyond weights and gradients", title="peak memory of a training step, batch 1")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", action="store_true", help="a training step of every variant, as a ratio to MHA")
    parser.add_argument("--decoding", action="store_true", help="tokens per second against the context: cached, uncached, compressed, absorbed, composed")
    parser.add_argument("--memory", action="store_true", help="peak memory of a training step against the sequence's length (CPU, Linux; minutes)")
    parser.add_argument("--kernels", action="store_true", help="rooflines of the attention kernels, and timings on this machine; on a CPU, the loops compiled for sm_90 as well")
    parser.add_argument("--aot", metavar="TARGETS", help="compile for these NVIDIA targets (sm_80,sm_90) and count what the loops do")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a checkout of nanoGPT, whose model --training measures beside ours (on the CPU)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of --training, as train.py's")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--results", default="experiments/results/bench", help="name of the .json, .md and .png to write (default: %(default)s)")
    arguments = parser.parse_args()
    chosen = [name for name in ("training", "decoding", "memory") if getattr(arguments, name)]
    if not (chosen or arguments.kernels or arguments.aot):
        chosen = ["training", "decoding", "memory"]
    if arguments.threads is not None:
        if arguments.threads < 1:
            parser.error(f"--threads must be at least 1, not {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    device = choose_device()
    dtype = choose_dtype(arguments.dtype, device)
    if arguments.nanogpt and "training" not in chosen:
        parser.error("--nanogpt is measured by --training: give that too")
    if arguments.nanogpt and not (device.type == "cpu" and (Path(arguments.nanogpt) / "model.py").is_file()):
        parser.error(f"--nanogpt compares on the CPU and needs a checkout with a model.py, not {arguments.nanogpt} on {device}")
    if "memory" in chosen and not Path("/proc/self/clear_refs").exists():
        parser.error("--memory reads Linux's /proc/self/status, which is not here: choose --training and --decoding")
    compiles = kernels.triton is not None and not kernels.triton.knobs.runtime.interpret
    targets = arguments.aot.split(",") if arguments.aot else ["sm_90"] if arguments.kernels and device.type == "cpu" and compiles else []
    if arguments.aot:
        if unknown := [target for target in targets if not target.startswith("sm_") or target not in kernels.TARGETS]:
            parser.error(f"--aot does not know {', '.join(unknown)}")
        if not compiles:
            parser.error("--aot needs triton (pip install triton), without TRITON_INTERPRET in the environment")
    if arguments.kernels:
        print_rooflines(Limits())
    if targets:
        print_loop_counts(targets)
    if arguments.kernels:
        time_kernels()
    if not chosen:
        return
    results, command = ROOT / arguments.results, " ".join(["python experiments/bench.py", *sys.argv[1:]])
    results.parent.mkdir(parents=True, exist_ok=True)
    where = (f"`{command}`: preset small, {device} ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}; training in "
             f"{str(dtype).removeprefix('torch.')}, the rest in float32. In turns, medians; ratios of times, median (quartiles). Memory: one thread, beyond weights and gradients; "
             "the ratio is to half the length, 2 being linear.")  # fmt: skip
    lines = [where, "", "| what | variant | time or memory | ratio to | ratio | tokens/s | cached bytes a token |", "|---|---|---|---|---|---|---|"]
    print("\n".join(lines))
    rows, sections = [], dict(
        training=lambda: [bench_training(device, dtype, arguments.nanogpt)], decoding=lambda: [bench_decoding(device), bench_generation(device)], memory=lambda: [bench_memory()]
    )  # fmt: skip
    for name in chosen:
        for measured in sections[name]():
            for measurement in measured:
                rows.append(measurement)
                lines.append(table_line(measurement))
                print(lines[-1], flush=True)
    results.with_suffix(".json").write_text(json.dumps(dict(command=command, threads=torch.get_num_threads(), dtype=str(dtype), rows=rows), indent=1) + "\n")
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(rows, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
