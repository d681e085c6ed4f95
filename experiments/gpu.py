"""What to measure on a GPU, in the order of what matters most, each piece under ten minutes and on its own.

    python experiments/gpu.py correct      # the tests of kernels.py on the GPU, long sequences, a compiled model
    python experiments/gpu.py kernels      # attention and decoding beside torch's backends, FlexAttention, flash-attn
    python experiments/gpu.py tune         # tiles, warps and stages by timing: what tile_options should say
    python experiments/gpu.py train --nanogpt ../nanoGPT         # a 124M model: tokens/s, memory, FLOPs utilisation
    python experiments/gpu.py questions --data_dir data/corpus   # the paper's comparisons, 27M parameters; 124M, a pair
    python experiments/gpu.py compress --checkpoint smollm2-135m --data_dir data/prose

Results go to experiments/results/gpu/, a line as each comes; sweeps that stopped go on when they are repeated.
`--rehearse` does each piece at sizes that a CPU manages in a minute, to find what is wrong before a GPU's time is
spent; its results go to out/gpu/. On a CPU the kernels need TRITON_INTERPRET=1 in the environment.
"""

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from options import fail, option, parse_options, run_program, say  # before torch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from experiments import minutes
from experiments.bench import attention_cost, backward_cost, decode_cost, in_turns, timed
from kernels import causal_attention, mea_attention, mea_decode, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT = ROOT / "out/gpu"
RESULTS = ROOT / "experiments/results/gpu" if DEVICE == "cuda" else OUT
PIECES = ("correct", "kernels", "tune", "train", "questions", "compress")


def card():
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, a rehearsal"


def write(name, row):
    """Append a result to a file of JSON lines, and show it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    row = dict(card=card(), torch=torch.__version__, triton=getattr(kernels.triton, "__version__", None), **row)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    say(json.dumps({key: value for key, value in row.items() if key not in ("card", "torch", "triton")}))


def execute(*command):
    """Run a program of the repository; its exit code. What it says goes through."""
    say(" ".join(map(str, command)))
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode


# ---------------------------------------------------------------------------------------------------------------------
# Correct


def relative_error(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def check_long(o):
    """Outputs and gradients of the kernels at long sequences, and those of the formula on a slice of the rows."""
    H, n, D = 4, 2, 64
    for T in (256, 1000) if o.rehearse else (4096, 16384, 32768):
        for dtype in (torch.float32,) if DEVICE == "cpu" else (torch.bfloat16, torch.float16, torch.float32):
            torch.manual_seed(T)
            heads = lambda count: torch.randn(1, T, count, D, device=DEVICE, dtype=dtype).transpose(1, 2)
            inputs = [heads(H), heads(n), heads(n)]
            inputs += [torch.randn(n, H, device=DEVICE), torch.randn(n, H, device=DEVICE)]
            inputs += [torch.randn(H, D, device=DEVICE)]
            grads = {}
            for path in ("triton", "sdpa"):
                leaves = [x.detach().requires_grad_() for x in inputs]
                out = mea_attention(*leaves, path=path)
                grads[path] = [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]
            names = ("out", "dq", "dk", "dv", "dcompose_k", "dcompose_v", "dgain")
            errors = {name: relative_error(a, b) for name, a, b in zip(names, grads["triton"], grads["sdpa"])}
            write("correct", dict(T=T, dtype=str(dtype)[6:], against="sdpa", **errors))


def check_refusal():
    q = torch.empty(1, 65536, 1, 16, device=DEVICE)
    try:
        mea_attention(q, q, q, path="triton")
        return "not refused"
    except ValueError as error:
        return f"refused: {error}"


def correct(o):
    if o.rehearse and kernels.triton is not None and not kernels.triton.knobs.runtime.interpret:
        fail("on a CPU the kernels run interpreted: TRITON_INTERPRET=1 python experiments/gpu.py correct --rehearse")
    check_long(o)
    write("correct", dict(heads_beyond_a_grid=check_refusal()))
    if o.rehearse:
        return
    slow = ["--deselect", "tests/test_kernels.py::test_every_kernel_compiles_for_gpus_that_are_not_here"]
    code = execute("-m", "pytest", "-q", "-m", "slow or not slow", "tests/test_kernels.py", "tests/test_gpu.py", *slow)
    write("correct", dict(pytest=code))
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            run = subprocess.run([sanitizer, "--tool", tool, sys.executable, "kernels.py"], cwd=ROOT, **minutes.PIPES)
            write("correct", dict(sanitizer=tool, code=run.returncode, said=run.stdout.strip().splitlines()[-1:]))


# ---------------------------------------------------------------------------------------------------------------------
# Fast


def attention_paths():
    """{name: (q, k, v, gain) -> normed causal attention}: what the kernel is compared with, as far as it is here."""
    normed = lambda attend: lambda q, k, v, gain: rms_norm(attend(q, k, v), gain[:, None], 1e-6)

    def sdpa(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attend

    paths = {"triton": lambda q, k, v, gain: mea_attention(q, k, v, None, None, gain, path="triton")}
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        paths[f"sdpa {backend.split('_')[0].lower()} + norm"] = normed(sdpa(getattr(SDPBackend, backend)))
    paths["sdpa + norm"] = normed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    paths["blocks + norm"] = normed(lambda q, k, v: causal_attention(q, k, v, path="blocks"))
    if DEVICE == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled, masks = torch.compile(flex_attention), {}

        def flex(q, k, v):
            T = q.size(2)
            if T not in masks:
                masks[T] = create_block_mask(lambda b, h, query, key: query >= key, None, None, T, T, device=DEVICE)
            return compiled(q, k, v, block_mask=masks[T])

        paths["FlexAttention + norm"] = normed(flex)
        with contextlib.suppress(ImportError):
            from flash_attn import flash_attn_func

            swapped = lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            paths["flash-attn + norm"] = normed(lambda q, k, v: swapped(q, k, v).transpose(1, 2))
    return paths


def measured_peaks(o):
    """(FLOP/s of a large matrix product, bytes/s of a copy) as this card reaches them."""
    N, M = (512, 2**22) if o.rehearse else (8192, 2**29)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    a, b, source = torch.randn(N, N, device=DEVICE, dtype=dtype), torch.randn(N, N, device=DEVICE, dtype=dtype), None
    source = torch.empty(M, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    jobs = {"product": timed(lambda: a @ b, DEVICE), "copy": timed(lambda: target.copy_(source), DEVICE)}
    taken = {name: sorted(values)[len(values) // 2] for name, values in in_turns(jobs, 10).items()}
    peaks = dict(product_flops=2 * N**3 / taken["product"], copy_bytes_per_second=2 * M / taken["copy"])
    write("kernels", peaks)
    return peaks


def time_together(jobs, rounds):
    """{name: median seconds} of jobs in turns; a job that cannot run here is left out, and said."""
    runs = {}
    for name, job in jobs.items():
        try:
            job()
            runs[name] = timed(job, DEVICE)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            say(f"  {name}: {str(error).splitlines()[0][:100]}")
    return {name: sorted(taken)[len(taken) // 2] for name, taken in in_turns(runs, rounds).items()}


def time_attention(o, peaks, rounds=15):
    dtype, H = (torch.bfloat16, 16) if DEVICE == "cuda" else (torch.float32, 2)
    lengths, tokens = ((128,), 128) if o.rehearse else ((1024, 2048, 4096, 8192, 16384), 16384)
    for D, T in itertools.product((64, 128), lengths):
        B = max(1, tokens // T)
        q, k, v, g = (torch.randn(B, T, H, D, device=DEVICE, dtype=dtype).transpose(1, 2) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)] + [torch.ones(H, D, device=DEVICE, requires_grad=True)]
        for kind in ("forward", "forward + backward"):
            cost = attention_cost(B, T, H, D).flops + (backward_cost(B, T, H, D).flops if "back" in kind else 0)

            def job(path, kind=kind, leaves=leaves, g=g):
                if kind == "forward":
                    return torch.no_grad()(lambda: path(*leaves))
                return lambda: torch.autograd.grad(path(*leaves), leaves, g)

            seconds = time_together({name: job(path) for name, path in attention_paths().items()}, rounds)
            best = min(value for name, value in seconds.items() if name != "triton")
            for name, value in seconds.items():
                speed = dict(tflops=cost / value / 1e12, share_of_product=cost / value / peaks["product_flops"])
                write(
                    "kernels",
                    dict(kind=kind, B=B, T=T, D=D, path=name, ms=1e3 * value, best_over_it=best / value, **speed),
                )


def time_decoding(o, peaks, rounds=30):
    dtype, B, H = (torch.bfloat16, 4, 16) if DEVICE == "cuda" else (torch.float32, 1, 4)
    lengths = (256,) if o.rehearse else (1024, 4096, 16384, 32768, 131072)
    for D, S in itertools.product((64, 128), lengths):
        cached = lambda n, S=S, D=D: torch.randn(B, S, n, D, device=DEVICE, dtype=dtype).transpose(1, 2)
        q, gain = torch.randn(B, H, 1, D, device=DEVICE, dtype=dtype), torch.ones(H, D, device=DEVICE)
        jobs = {}
        for n in (H, H // 2, H // 4):
            k, v, w = cached(n), cached(n), (torch.randn(n, H, device=DEVICE) if n < H else None)
            for path in ("triton", "sdpa"):
                decode = lambda k=k, v=v, w=w, path=path: mea_decode(q, k, v, w, w, gain, path=path)
                jobs[f"{path}, {n} of {H} cached"] = torch.no_grad()(decode)
        every = f"sdpa, {H} of {H} cached"
        seconds = time_together(jobs, rounds)
        for name, value in seconds.items():
            n = int(name.split()[1])
            moved = decode_cost(B, S, H, n, n, D, composed=n < H).bytes * (1 if dtype == torch.bfloat16 else 2)
            rate = dict(gb_per_second=moved / value / 1e9, share_of_copy=moved / value / peaks["copy_bytes_per_second"])
            write(
                "kernels",
                dict(kind="decode", B=B, S=S, D=D, path=name, ms=1e3 * value, over_sdpa=value / seconds[every], **rate),
            )


def time_kernels(o):
    peaks = measured_peaks(o)
    time_decoding(o, peaks)
    time_attention(o, peaks)


def tune(o):
    """The fastest tiles of each prefill kernel: put them into kernels.tile_options where they differ."""
    if DEVICE == "cpu" and not kernels.triton.knobs.runtime.interpret:
        fail("on a CPU the kernels run interpreted: TRITON_INTERPRET=1 python experiments/gpu.py tune --rehearse")
    dtype, B, H, T = (torch.bfloat16, 8, 16, 2048) if DEVICE == "cuda" else (torch.float32, 1, 1, 64)
    sizes = (32, 64) if o.rehearse else (32, 64, 128)
    plain = kernels.tile_options
    for D in (64, 128):
        q, k, v, g = (torch.randn(B, T, H, D, device=DEVICE, dtype=dtype).transpose(1, 2) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)] + [torch.ones(H, D, device=DEVICE, requires_grad=True)]
        for tuned in (kernels.forward_kernel, kernels.backward_dkdv_kernel, kernels.backward_dq_kernel):
            backward, jobs = tuned is not kernels.forward_kernel, {}
            for M, N, warps, stages in itertools.product(sizes, sizes, (4, 8), (2, 3, 4) if DEVICE == "cuda" else (2,)):
                if tuned is kernels.backward_dkdv_kernel and N % M:
                    continue
                choice = dict(BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=stages)

                def job(choice=choice, tuned=tuned, backward=backward, leaves=leaves, g=g):
                    options = lambda kernel, q: {**plain(kernel, q), **(choice if kernel is tuned else {})}
                    with mock.patch.object(kernels, "tile_options", options):
                        out = mea_attention(*leaves[:3], None, None, leaves[3], path="triton")
                        return torch.autograd.grad(out, leaves, g) if backward else out

                jobs[json.dumps(choice)] = job
            seconds = time_together(jobs, 1 if o.rehearse else 7)
            now = {name: value for name, value in plain(tuned, q).items() if name in choice}
            for name, value in sorted(seconds.items(), key=lambda item: item[1])[:3]:
                write("tune", dict(kernel=tuned.__name__, D=D, ms=1e3 * value, now=now, **json.loads(name)))


# ---------------------------------------------------------------------------------------------------------------------
# Whole programs


def train(o):
    """Tokens/s, memory and utilisation in a few steps of a 124M model: every variant, nanoGPT on the same tokens."""
    small = (
        ["--preset", "tiny", "--max_steps", 6] if o.rehearse else ["--preset", "base", "--max_steps", 40, "--compile"]
    )
    small += [] if o.rehearse else ["--grad_accum", 2, "--eval_every", 40, "--save_every", 40, "--eval_windows", 16]
    for variant in ("mha", "mea", "dfa", "tha"):
        out = OUT / variant
        code = execute("train.py", "--attention", variant, "--overwrite", "--out_dir", out, *small)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        speeds = sorted(line["tokens_per_second"] for line in lines[len(lines) // 2 :])
        write("train", dict(variant=variant, code=code, tokens_per_second=speeds[len(speeds) // 2], last=lines[-1]))
    if o.nanogpt:
        shape = {} if o.rehearse else dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16)
        shape |= dict(device=DEVICE, compile=DEVICE == "cuda", max_iters=6 if o.rehearse else 40, eval_interval=1000)
        shape |= dict(gradient_accumulation_steps=2, eval_iters=1, log_interval=1)
        with minutes.nanogpt_with_our_tokens(o.nanogpt) as folder:
            command = [*minutes.nanogpt_command(1e-3), *(f"--{name}={value}" for name, value in shape.items())]
            said = subprocess.run(command, cwd=folder, **minutes.PIPES).stdout
        write("train", dict(variant="nanoGPT", said=said.strip().splitlines()[-3:]))


def questions(o):
    """The paper's four cells and Talking-Heads at 27M parameters, three rates and seeds; one too large; two at 124M.

    More than ten minutes: stopped runs go on when it is repeated.
    """
    shape = "--n_layer 8 --n_head 8 --n_embd 512 --block_size 1024 --batch_size 32 --warmup_steps 100 --max_steps 1600"
    shape += " --eval_every 200 --save_every 100 --eval_windows 128 --compile"
    if o.rehearse:
        shape = "--preset tiny --max_steps 4 --eval_every 2"
    shape, results = [*shape.split(), "--data_dir", o.data_dir], RESULTS.relative_to(ROOT)
    cells, rates = "mha,mha+norm,mea-norm,mea,tha", "2e-3" if o.rehearse else "1e-3,2e-3,4e-3"
    seeds = 1 if o.rehearse else 3
    command = ("experiments/sweep.py", "--variants", cells, "--seeds", seeds, "--jobs", 1)
    execute(*command, "--learning_rates", rates, "--out_dir", "out/gpu/cosine", "--results", results / "cosine", *shape)
    beyond = ("--learning_rates", "8e-3", "--schedule", "constant", "--out_dir", "out/gpu/beyond")
    execute(*command, *beyond, "--results", results / "beyond", *shape)
    large = ["--preset", "base", "--grad_accum", 1, "--max_steps", 1600, "--save_every", 100, "--compile"]
    pair = ("experiments/sweep.py", "--variants", "mha,mea", "--seeds", 1, "--jobs", 1, "--data_dir", o.data_dir)
    where = ("--out_dir", "out/gpu/large", "--results", results / "large")
    execute(*pair, *where, *(shape[:6] if o.rehearse else large))


def compress(o):
    sizes = ["--calibration_windows", 4, "--eval_windows", 4] if o.rehearse else ["--calibration_windows", 256]
    sizes += ["--heal_steps", 2 if o.rehearse else 600, "--distill", "--overwrite"]
    for method in ("aligned", "latent"):
        out = ["--method", method, "--out_dir", f"out/gpu/half-{method}"]
        code = execute("compress.py", "--checkpoint", o.checkpoint, "--data_dir", o.data_dir, *out, *sizes)
        report = ROOT / f"out/gpu/half-{method}/report.json"
        write("compress", dict(method=method, code=code, loss=json.loads(report.read_text())["loss"]))


@dataclass
class Options:
    rehearse: bool = option(False, "tiny sizes, on a CPU too")
    nanogpt: str = option("", "a checkout of nanoGPT for train")
    data_dir: str = option("data/python", "prepared data of questions and compress")
    checkpoint: str = option("out/small", "what compress compresses")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    named = [name for name in argv[:1] if name in PIECES]
    o, given = parse_options(Options, argv[len(named) :])
    reads = dict(train={"nanogpt"}, questions={"data_dir"}, compress={"checkpoint", "data_dir"})
    if named and (ignored := given - {"rehearse"} - reads.get(named[0], set())):
        fail(f"{named[0]} reads no --{min(ignored)}")
    if not named:
        fail(f"say what to measure: python experiments/gpu.py {'|'.join(PIECES)} [--rehearse]")
    if DEVICE == "cpu" and not o.rehearse:
        fail("there is no GPU here: --rehearse runs tiny sizes on the CPU")
    pieces = dict(correct=correct, kernels=time_kernels, tune=tune, train=train, questions=questions, compress=compress)
    pieces[named[0]](o)


if __name__ == "__main__":
    run_program(main)
