"""Compile the Triton kernels for GPUs that need not be here: registers, shared memory, spills, instructions.

    python experiments/aot.py sm_80,sm_90    # of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 and gfx942

The interpreter accepts what the compiler refuses, so tests/test_kernels.py compiles every kernel, too, and bench.py
counts what the compiled loops do. Read first: kernels.py.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels
from kernels import triton
from options import run_program

if triton is not None:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

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


def print_resources(targets, widths=(64, 128)):
    limits = "blocks per multiprocessor by registers, shared memory and threads"
    columns = (
        "target, D, kernel, warps, registers, spill bytes, shared bytes, matrix instructions, async copies, blocks"
    )
    print(f"bf16, triton {triton.__version__}; registers per thread; {limits}")
    print("| " + columns.replace(", ", " | ") + " |\n" + "|---" * 10 + "|")
    for target, D in itertools.product(targets, widths):
        for launched in record_launches(TARGETS[target][3] * 1024, D=D):
            resources = compile_ahead(target, *launched)
            del resources["asm"]
            print(f"| {target} | {D} | " + " | ".join(map(str, resources.values())) + " |")


def main():
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time and print what they use.")
    parser.add_argument("targets", help=f"comma-separated, of {', '.join(TARGETS)}")
    targets = parser.parse_args().targets.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        parser.error(f"unknown target {', '.join(unknown)}: known are {', '.join(TARGETS)}")
    if triton is None or triton.knobs.runtime.interpret:
        parser.error("compiling needs triton (pip install triton), without TRITON_INTERPRET in the environment")
    print_resources(targets)


if __name__ == "__main__":
    run_program(main)
