"""What training and decoding cost, what the kernels should cost, and what the compiled code does.

Whatever is compared is measured in turns in one run and printed as ratios, since a machine's speed drifts. For the kernels, a cost model counts bytes and FLOPs from the shapes; the roofline time is the larger of bytes / bandwidth and FLOPs / peak. Beside the
model stand counts from code compiled ahead of time: the loop over key blocks is found in the PTX, and the bytes of its asynchronous
copies and the FLOPs of its matrix instructions are added up. So "decode reads the compressed cache once" is checked without a GPU.
Times are measured where they can be: no roofline is a measurement.

    python experiments/bench.py --training          # a training step of every variant, as a ratio to MHA
    python experiments/bench.py --decoding          # generation with and without the cache
    python experiments/bench.py --memory            # peak memory of a training step against the sequence's length, on the CPU
    python experiments/bench.py --kernels           # rooflines, and timings on this machine
    python experiments/bench.py --aot sm_80,sm_90   # the model beside the compiled loops

Read first: attention.py and kernels.py.
"""
import argparse
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as train.py does

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels
import train
from kernels import compose_heads, head_norm, mea_attention, mea_decode
from model import GPT, PRESETS, GPTConfig

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
    print("| target | D | kernel | KB per block, model | compiled | MFLOP per block, model | compiled |")
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


def seconds_per_call(function, device, repeats=20):
    """Median over `repeats` calls, after two to warm up; the L2 cache is flushed in between on a GPU."""
    times, flush = [], torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device == "cuda" else None
    for i in range(repeats + 2):
        if device == "cuda":
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return sorted(times[2:])[repeats // 2]


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
    measured = {job[:2]: seconds_per_call(job[2], device) for job in jobs}
    print(f"\nMeasured: {torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, {dtype}, "
          f"B={B} T={T} H={H} D={D}, {S} cached positions, torch {torch.__version__}; TFLOP/s and GB/s count the model's work"
          + (f" (limits {limits.flops / 1e12:.0f} and {limits.bytes_per_second / 1e9:.0f})" if device == "cuda" else "") + "\n")
    print("| step | path | ms | ratio to SDPA alone | TFLOP/s | GB/s |")
    print("|---|---|---|---|---|---|")
    for kind, name, _, flops, moved in jobs:
        seconds = measured[kind, name]
        baseline = next(value for (other, label), value in measured.items() if other == kind and "SDPA alone" in label)
        rates = f"{flops / seconds / 1e12:.3f} | {moved / seconds / 1e9:.1f}"
        print(f"| {kind} | {name} | {seconds * 1e3:.3f} | {seconds / baseline:.2f} | {rates} |")


def bench_kernels():
    limits = Limits()
    print_rooflines(limits)
    if torch.cuda.is_available():
        for D in (64, 128):
            print_timings(limits, "cuda", B=8, T=2048, S=8192, H=16, D=D, n=4)
    else:
        print("\nNo GPU here: the Triton kernels are not timed, only the paths that a CPU takes.")
        print_timings(limits, "cpu", B=2, T=512, S=2048, H=8, D=64, n=2)


# ---- training and decoding ------------------------------------------------------------------------------------------------

VARIANTS = {  # name: (config, what it is compared with)
    "mha": (dict(attention="mha"), "mha"),
    "mha, head norm": (dict(attention="mha", head_norm=True), "mha"),
    "mea": (dict(attention="mea"), "mha, head norm"),
    "mea, half the components": (dict(attention="mea", n_kv_head=4), "mha, head norm"),
    "dfa": (dict(attention="dfa"), "mha, head norm"),
    "tha": (dict(attention="tha"), "mha"),
}


def bench_training(rounds=15):
    """A whole training step (forward, backward, clipping, AdamW) of every variant at the default preset, in turns."""
    device = train.choose_device()
    dtype = train.choose_dtype("auto", device)
    batch_size, T = train.TRAINING["small"]["batch_size"], PRESETS["small"]["block_size"]
    x = torch.randint(2048, (batch_size, T + 1), device=device)
    steps = {}
    for name, (fields, _) in VARIANTS.items():
        model = GPT(GPTConfig(vocab_size=2048, **{**PRESETS["small"], **fields})).to(device)
        optimizer = torch.optim.AdamW(model.parameter_groups(0.1), fused=device.type in ("cpu", "cuda"))

        def step(model=model, optimizer=optimizer):
            with train.autocast(device, dtype):
                loss = model(x[:, :-1], x[:, 1:])[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()  # waits for a GPU

        steps[name] = step
    seconds = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print(f"A training step of {batch_size} x {T} tokens, preset small, {device}, {torch.get_num_threads()} threads, {dtype}, torch "
          f"{torch.__version__}; {rounds} rounds in turns; ratios of times, median (quartiles)\n")
    print("| variant | tokens/s, median | time, ratio to | ratio |\n|---|---|---|---|")
    for name, (_, base) in VARIANTS.items():
        ratios = [a / b for a, b in zip(seconds[name][2:], seconds[base][2:])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ratio = "" if name == base else f"{middle:.3f} ({low:.3f} to {high:.3f})"
        print(f"| {name} | {x[:, 1:].numel() / statistics.median(seconds[name][2:]):,.0f} | {base if ratio else ''} | {ratio} |")


def bench_decoding(tokens=512, rounds=3):
    """Greedy generation of `tokens` tokens at the default preset, with the cache and without, in turns."""
    device = train.choose_device()
    print(f"{tokens} tokens from a prompt of one, preset small, {device}, {torch.get_num_threads()} threads; median of {rounds}\n")
    print("| variant | cached tokens/s | uncached tokens/s | ratio (lowest to highest) | cache bytes a token |\n|---|---|---|---|---|")
    for name, (fields, _) in VARIANTS.items():
        model = GPT(GPTConfig(vocab_size=2048, **{**PRESETS["small"], **fields})).to(device).eval()
        seconds = {True: [], False: []}
        for _ in range(rounds):
            for use_cache in seconds:
                began = time.perf_counter()
                model.generate([[1]], tokens, temperature=0, use_cache=use_cache)
                seconds[use_cache].append(time.perf_counter() - began)
        ratios = sorted(b / a for a, b in zip(seconds[True], seconds[False]))
        cached, uncached = (tokens / statistics.median(seconds[use_cache]) for use_cache in (True, False))
        print(f"| {name} | {cached:.0f} | {uncached:.0f} | {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}) | "
              f"{model.config.kv_bytes_per_token():,} |")


def memory_of_step(fields, T, recompute):
    """Peak bytes that a training step of batch 1 at T positions takes beyond the model and its gradients.

    Of the whole process, as Linux counts its pages: the high-water mark is set back after a short step has loaded what is loaded
    once. So every step needs a process of its own, where no memory that an earlier one freed is used again.
    """
    torch.set_num_threads(1)
    model = GPT(GPTConfig(vocab_size=2048, **{**PRESETS["small"], **fields, "block_size": T}))
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
    """Memory that is linear in the length shows as the same KiB a position in every column.

    glibc keeps most of what is freed, and where the pieces differ in size, as those of Talking-Heads do, it cannot use them again:
    told to give pieces of 1 MiB back at once, it holds what the step needs.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # for the processes started below
    print(f"Peak memory of forward and backward beyond weights and gradients, MiB (KiB a position): batch 1, preset small, float32, CPU, "
          f"one thread, torch {torch.__version__}, glibc told to give back what is freed. "
          f"The last column is the memory of {lengths[-1]:,} positions over that of {lengths[-2]:,}: 2 is linear, 4 quadratic.\n")
    print("| variant | blocks recomputed | " + " | ".join(f"T = {T:,}" for T in lengths) + " | growth |")
    print("|---|---|" + "---|" * (len(lengths) + 1))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for name in ("mha", "mea", "dfa", "tha"):
            for recompute in (False, True):
                peaks = [fresh.apply(memory_of_step, (VARIANTS[name][0], T, recompute)) for T in lengths]
                cells = " | ".join(f"{peak / 2**20:,.0f} ({peak / 1024 / T:.0f})" for peak, T in zip(peaks, lengths))
                print(f"| {name} | {'yes' if recompute else 'no'} | {cells} | {peaks[-1] / peaks[-2]:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Benchmarks: training, decoding, rooflines and compiled code.")
    parser.add_argument("--training", action="store_true", help="a training step of every variant, as a ratio to MHA")
    parser.add_argument("--decoding", action="store_true", help="generation with and without the cache")
    parser.add_argument("--memory", action="store_true", help="peak memory of a training step against the sequence's length (CPU, Linux; minutes)")
    parser.add_argument("--kernels", action="store_true", help="rooflines of the attention kernels, and timings on this machine")
    parser.add_argument("--aot", metavar="TARGETS", help="compile for these NVIDIA targets (sm_80,sm_90) and count what the loops do")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    arguments = parser.parse_args()
    if not (arguments.training or arguments.decoding or arguments.memory or arguments.kernels or arguments.aot):
        parser.error("nothing to do: give --training, --decoding, --memory, --kernels or --aot TARGETS")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.aot:
        targets = arguments.aot.split(",")
        if unknown := [target for target in targets if not target.startswith("sm_") or target not in kernels.TARGETS]:
            parser.error(f"--aot does not know {', '.join(unknown)}")
        if kernels.triton is None or kernels.triton.knobs.runtime.interpret:
            parser.error("--aot needs triton (pip install triton), without TRITON_INTERPRET in the environment")
        print_loop_counts(targets)
    if arguments.kernels:
        bench_kernels()
    if arguments.training:
        bench_training()
    if arguments.decoding:
        bench_decoding()
    if arguments.memory:
        if not Path("/proc/self/clear_refs").exists():
            parser.error("--memory reads Linux's /proc/self/status, which is not here")
        bench_memory()


if __name__ == "__main__":
    main()
