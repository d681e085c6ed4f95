"""The kernels on paper, as the compiler makes them for GPUs that need not be here, and the time that a CPU takes.

    python experiments/roofline.py                                     # the cost model; times of the paths of a CPU
    python experiments/roofline.py --targets sm_80,sm_90,sm_100,gfx942 # registers, spills, and what the loops do
    python experiments/roofline.py --blocks --threads 1                # attention in blocks beside torch's, by shape

The cost model counts bytes and FLOPs from the shapes; the roofline is the larger of bytes / bandwidth and FLOPs / peak.
Beside it stand counts from code compiled ahead of time: the bytes of the asynchronous copies and the FLOPs of the
matrix instructions in the loop over key blocks. So "decode reads the compressed cache once" is checked without a GPU.
No roofline is a measurement: gpu.py times the kernels. Read first: kernels.py.
"""

import itertools
import math
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import in_turns, print_table, ratio_cell, ratio_quartiles, timed
from options import fail, option, parse_options, run_program, split_list

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from functional import causal_attention, mea_attention, mea_decode, rms_norm
from kernels import triton

if triton is not None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

# ---------------------------------------------------------------------------------------------------------------------
# The cost model. B batch, T positions, S cached ones, H heads, Hc, n_k, n_v components, D width

# Peak rates of an H100 SXM: dense bfloat16, HBM3, and a typical measured one of its L2 cache
FLOPS, BYTES_PER_SECOND, L2_BYTES_PER_SECOND = 989e12, 3.35e12, 5.5e12


@dataclass
class Cost:
    bytes: float
    flops: float
    from_l2: bool = False

    def __add__(self, other):
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

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


def decode_cost(B, S, H, n_k, n_v, D, itemsize=2, to_compose=True):
    """One step: the cache once (once per program's worth of heads), and the partial results written and read back."""
    options = kernels.decode_options(torch.device("cpu"), itemsize, H, n_k, n_v, D, to_compose)  # as on an H100
    reads = math.ceil(H / options["HEADS"]) if to_compose else 1
    splits = max(1, 2 * 132 // (B * (reads if to_compose else H)))
    partial = 2 * 4 * B * splits * H * options["VALUES"] * D
    flops = 2 * B * S * D * (H * (n_k + n_v) if to_compose else 2 * H)
    return Cost(reads * B * S * (n_k + n_v) * D * itemsize + partial, flops)


def compose_then_decode_cost(B, S, H, n_k, n_v, D, itemsize=2):
    """The same step by writing composite heads: the cache read, H heads written and read, for keys and for values."""
    return Cost(B * S * D * itemsize * (n_k + n_v + 4 * H), 2 * B * S * D * H * (n_k + n_v + 2))


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
        f"decode step, all {H} heads cached": decode_cost(B, T, H, H, H, D, to_compose=False),
    }
    print(
        f"Rooflines at {FLOPS / 1e12:.0f} TFLOP/s, {BYTES_PER_SECOND / 1e12:.2f} TB/s; bf16, B={B} T={T} H={H} D={D}\n"
    )
    figures = lambda cost: [f"{cost.bytes / 1e6:.1f}", f"{cost.flops / 1e9:.1f}", f"{cost.seconds() * 1e3:.4f}"]
    rows = ([name, *figures(cost)] for name, cost in costs.items())
    print_table(["work", "MB moved", "GFLOP", "roofline ms"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler makes of them

# name: (backend, architecture, threads per warp, KiB of shared memory that one program may use, KiB per multiprocessor)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163, 164),
    "sm_86": ("cuda", 86, 32, 99, 100),
    "sm_89": ("cuda", 89, 32, 99, 100),
    "sm_90": ("cuda", 90, 32, 227, 228),
    "sm_100": ("cuda", 100, 32, 227, 228),
    "sm_120": ("cuda", 120, 32, 99, 100),
    "gfx942": ("hip", "gfx942", 64, 64, 64),
}


def record_launches(shared, B=8, T=2048, H=16, n_k=4, n_v=4, D=128, dtype=torch.bfloat16):
    """(kernel, arguments, options) of all launches of a training and a decoding step, given bytes of shared memory."""
    launches = []
    heads = lambda n, length: torch.empty(B, length, n, D, dtype=dtype, device="meta").transpose(1, 2)
    weight = lambda *shape: torch.empty(shape, device="meta")
    record = lambda kernel, grid, *arguments, **options: launches.append((kernel, arguments, options))
    with mock.patch.multiple(kernels, launch=record, device_limits=lambda device: (shared, 132)):
        q, gain = heads(H, T), weight(H, D)
        out, pre_norm, log_sum_exp = kernels.launch_attention(q, q, q, gain, 1e-6, True)
        kernels.launch_attention_backward(out, q, q, q, gain, pre_norm, log_sum_exp, 1e-6)
        kernels.launch_decode(
            heads(H, 1), heads(n_k, T), heads(n_v, T), weight(n_k, H), weight(n_v, H), gain, weight(B).int(), 1e-6
        )
    return launches


def compile_ahead(target, kernel, arguments, options):
    """Compile one recorded launch as the JIT would for these arguments, and read the resources from what comes out."""
    constants, attributes = {}, {}

    def describe(value, path):
        """A Triton type; as in the JIT, None and 1 become constants and divisibility by 16 is noted."""
        if isinstance(value, tuple):
            return tuple(describe(item, path + (i,)) for i, item in enumerate(value))
        if value is None or isinstance(value, int) and value == 1:
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
        return pointers[value.dtype] if isinstance(value, Tensor) else "i32"

    names = kernel.arg_names
    signature = {names[i]: describe(value, (i,)) for i, value in enumerate(arguments)}
    constants |= {(names.index(name),): value for name, value in options.items() if name in names}
    signature |= {name: "constexpr" for name in options if name in names}
    build = {name: value for name, value in options.items() if name not in names}
    backend, architecture, warp_size, _, shared_total = TARGETS[target]
    source, gpu = ASTSource(kernel, signature, constants, attributes), GPUTarget(backend, architecture, warp_size)
    binary = triton.compile(source, target=gpu, options=build)
    asm = binary.asm["ptx" if backend == "cuda" else "amdgcn"]
    shared, warps = binary.metadata.shared, build.get("num_warps", 4)
    reserved = 1024 if backend == "cuda" else 0  # bytes of shared memory that CUDA itself takes per block
    if backend == "cuda":
        from triton.backends.nvidia.compiler import get_ptxas  # not in triton 3.2

        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(asm)
            file.flush()
            name = re.search(r"\.target (sm_[0-9a-z]+)", asm)[1]  # sm_90a, say
            command = [get_ptxas(architecture).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = int(re.search(r"Used (\d+) reg", report)[1])
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
        by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    else:
        registers, spills = (
            int(re.search(rf"\.{field}:\s+(\d+)", asm)[1]) for field in ("vgpr_count", "vgpr_spill_count")
        )
        by_registers, spills = 4 * min(8, 512 // (-(-registers // 8) * 8)) // warps, 4 * spills
    return dict(
        kernel=kernel.__name__.removesuffix("_kernel"),
        warps=warps,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        matrix=len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma", asm)),
        async_copies=len(re.findall(r"cp\.async\.(?:c[ag]|bulk)\.|_load_lds", asm)),
        blocks=min(by_registers, shared_total * 1024 // (shared + reserved), 2048 // (warp_size * warps)),
        asm=asm,
    )


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


def print_compiled(targets, widths=(64, 128)):
    """Two tables: the resources of every kernel, and one pass of a program through a loop beside the model of it."""
    resources, loops = [], []
    for target, D in itertools.product(targets, widths):
        for kernel, arguments, options in record_launches(TARGETS[target][3] * 1024, D=D):
            row = compile_ahead(target, kernel, arguments, options)
            asm = row.pop("asm")
            resources.append([target, *map(str, [D, *row.values()])])
            if target.startswith("sm_") and (model := block_model(row["kernel"], options)):
                passes = [loop_counts(body, row["warps"]) for body in innermost_loops(asm)]
                compiled = max(passes, key=lambda counts: counts[1], default=(0, 0))
                copied = [f"{counts[0] / 1024:.2f}" for counts in (model, compiled)]
                flops = [f"{counts[1] / 1e6:.2f}" for counts in (model, compiled)]
                loops.append([target, str(D), row["kernel"], *copied, *flops])
    limits = "blocks per multiprocessor by registers, shared memory and threads"
    print(f"bf16, triton {triton.__version__}; registers per thread; {limits}\n")
    heads = "target, D, kernel, warps, registers, spill bytes, shared bytes, matrix instructions, async copies, blocks"
    print_table(heads.split(", "), resources)
    heads = ["target", "D", "kernel", "KB per block, model", "compiled", "MFLOP per block, model", "compiled"]
    print()
    print_table(heads, loops)


# ---------------------------------------------------------------------------------------------------------------------
# What a machine takes


def random_heads(B, n, T, D, device="cpu", dtype=torch.float32):
    """(B, n, T, D) as a projection leaves them: in memory (B, T, n, D)."""
    return torch.randn(B, T, n, D, device=device, dtype=dtype).transpose(1, 2)


def time_jobs(jobs, device, rounds):
    """[(name, cost, median seconds, quartiles of the ratios to the first)] of jobs {name: (function, cost)}, in turns.

    One that cannot run here is left out, and said.
    """
    runs = {}
    for name, (function, _) in jobs.items():
        try:
            function()
            runs[name] = timed(function, device)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"  {name}: {str(error).splitlines()[0][:100]}", flush=True)
    taken = in_turns(runs, rounds)
    base = next(iter(taken.values()), None)
    middle = statistics.median
    return [(name, jobs[name][1], middle(times), ratio_quartiles(times, base)) for name, times in taken.items()]


def attention_jobs(paths, B, T, H, D, device="cpu", dtype=torch.float32):
    """{kind: jobs} of `paths`, {name: function of q, k, v and the norm's gain}: forward, forward + backward."""
    q, k, v, g = (random_heads(B, H, T, D, device, dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)] + [torch.ones(H, D, device=device, requires_grad=True)]
    size = B, T, H, D, q.element_size()
    forward, both = attention_cost(*size), attention_cost(*size) + backward_cost(*size)

    def train(path):
        out = path(*leaves)
        return torch.autograd.grad(out, leaves, g, allow_unused=True)

    return {
        "forward": {name: (torch.no_grad()(lambda path=path: path(*leaves)), forward) for name, path in paths.items()},
        "forward + backward": {name: (lambda path=path: train(path), both) for name, path in paths.items()},
    }


def decode_jobs(cases, B, S, H, D, device="cpu", dtype=torch.float32):
    """Jobs of `cases`, {name: (heads cached, path)}; with all H cached nothing is composed."""
    q, gain, jobs = random_heads(B, H, 1, D, device, dtype), torch.ones(H, D, device=device), {}
    for name, (n, path) in cases.items():
        k, v = (random_heads(B, n, S, D, device, dtype) for _ in "kv")
        w = torch.randn(n, H, device=device) if n < H else None
        step = lambda k=k, v=v, w=w, path=path: mea_decode(q, k, v, w, w, gain, path=path)
        jobs[name] = torch.no_grad()(step), decode_cost(B, S, H, n, n, D, q.element_size(), to_compose=n < H)
    return jobs


def print_timings(B, T, S, H, D, n):
    """Ratios to SDPA alone, which neither composes nor normalises: what MEA costs on top of plain attention."""
    plain = lambda q, k, v, gain=None: F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)
    paths = {
        "SDPA alone": plain,
        "SDPA + separate norm": lambda q, k, v, gain: rms_norm(plain(q, k, v), gain[:, None], 1e-6),
        "reference": lambda q, k, v, gain: mea_attention(q, k, v, None, None, gain, path="reference"),
    }
    kinds = attention_jobs(paths, B, T, H, D)
    every, last = random_heads(B, H, S, D), random_heads(B, H, 1, D)
    alone = lambda: plain(last, every, every), decode_cost(B, S, H, H, H, D, 4, to_compose=False)
    few = {f"{n} of {H} heads cached, mea_decode": (n, "auto"), f"{n} of {H} heads cached, reference": (n, "reference")}
    kinds["decode"] = {f"all {H} heads cached, SDPA alone": alone, **decode_jobs(few, B, S, H, D)}
    machine = f"CPU, {torch.get_num_threads()} threads, float32"
    shape = f"B={B} T={T} H={H} D={D}, {S} cached positions"
    print(f"\nMeasured: {machine}, {shape}, torch {torch.__version__}; rates count the model's work\n")
    rows = []
    for kind, jobs in kinds.items():
        for i, (name, cost, seconds, quartiles) in enumerate(time_jobs(jobs, "cpu", rounds=20)):
            ratio = ratio_cell(quartiles) if i else ""
            rates = f"{cost.flops / seconds / 1e12:.3f}", f"{cost.bytes / seconds / 1e9:.1f}"
            rows.append([kind, name, f"{seconds * 1e3:.3f}", ratio, *rates])
    print_table(["step", "path", "ms", "ratio to SDPA alone", "TFLOP/s", "GB/s"], rows)


def print_blocks(rounds=9, heads=64):
    """Attention in blocks of queries beside torch's fused attention: what `functional.blocks_are_faster` rests on."""
    print(f"blocks / sdpa, {heads} heads, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    shapes = itertools.product((torch.bfloat16, torch.float32), (16, 32, 64), (128, 256, 512, 1024, 2048))
    paths = {path: lambda q, k, v, gain, path=path: causal_attention(q, k, v, path=path) for path in ("sdpa", "blocks")}

    def cells():
        for dtype, D, T in shapes:
            taken = [
                time_jobs(jobs, "cpu", rounds)
                for jobs in attention_jobs(paths, 8, T, heads // 8, D, "cpu", dtype).values()
            ]
            times = [f"{value:.2f}" for sdpa, blocks in taken for value in (1e3 * sdpa[2], blocks[3][1])]
            yield [str(dtype).removeprefix("torch."), str(D), str(T), *times]

    print_table(["dtype", "D", "T", "sdpa, forward ms", "blocks", "sdpa, with backward ms", "blocks"], cells())


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    blocks: bool = option(False, "time attention in blocks of queries beside torch's fused attention")
    threads: int = option(0, "CPU threads (0: as many as cores)", least=0, most=1024)
    targets: str = option("", f"GPUs to compile for, with commas between them: of {', '.join(TARGETS)}")


def main(argv=None):
    o, _ = parse_options(Options, argv)
    targets = split_list(o.targets)
    if unknown := [target for target in targets if target not in TARGETS]:
        fail(f"unknown target {', '.join(unknown)}: known are {', '.join(TARGETS)}")
    if targets and (triton is None or kernels.INTERPRETED):
        fail("--targets needs triton (pip install triton), without TRITON_INTERPRET in the environment")
    if o.threads:
        torch.set_num_threads(o.threads)
    if o.blocks:
        print_blocks()
    elif targets:
        print_compiled(targets)
    else:
        print_rooflines()
        print_timings(B=2, T=512, S=2048, H=8, D=64, n=2)


if __name__ == "__main__":
    run_program(main)
