"""What to measure on a GPU, in the order of what matters most, each on its own and, but `questions`, in ten minutes.

    python experiments/gpu.py correct      # the tests of kernels.py on the GPU, long sequences, a compiled model
    python experiments/gpu.py kernels      # attention and decoding beside torch's backends, FlexAttention, flash-attn
    python experiments/gpu.py tune         # tiles, warps and stages by timing: what tile_options should say
    python experiments/gpu.py train --nanogpt ../nanoGPT         # GPT-2's shape: tokens/s, memory, FLOPs utilisation
    python experiments/gpu.py questions --data_dir data/corpus   # the paper's comparisons, 27M parameters; one larger
    python experiments/gpu.py compress --checkpoint smollm2-135m --data_dir data/prose

Results go to experiments/results/gpu/, a line as each comes; sweeps that stopped go on when they are repeated.
`--rehearse` does each piece at sizes that a CPU manages in a minute, to find what is wrong before a GPU's time is
spent; its results go to out/gpu/. On a CPU the kernels need TRITON_INTERPRET=1 in the environment.
"""

import contextlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import ROOT, in_turns, program, read_metrics, timed
from options import fail, option, parse_options, run_program, say

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from experiments import minutes
from experiments.roofline import attention_jobs, decode_jobs, random_heads, time_jobs
from functional import causal_attention, mea_attention, rms_norm

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
OUT = Path("out/gpu")  # in the repository's root, as all commands here are
WRITTEN = Path("experiments/results/gpu") if CUDA else OUT


def write(name, **row):
    """Append a result to a file of JSON lines, and show it."""
    path = ROOT / WRITTEN / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if CUDA else "CPU, a rehearsal"
    how = dict(card=card, torch=torch.__version__, triton=getattr(kernels.triton, "__version__", None))
    with open(path, "a") as file:
        file.write(json.dumps({**how, **row}) + "\n")
    say(json.dumps(row))


def execute(*command):
    """Run a program of the repository; its exit code. What it says goes through."""
    say(" ".join(map(str, command)))
    return subprocess.run(program(*command), cwd=ROOT).returncode


def need_kernels(piece):
    if not (CUDA or kernels.INTERPRETED):
        fail(f"on a CPU the kernels run interpreted: TRITON_INTERPRET=1 python experiments/gpu.py {piece} --rehearse")


# ---------------------------------------------------------------------------------------------------------------------
# Correct


def correct(o):
    need_kernels("correct")
    check_long(o)
    q = torch.empty(1, 65536, 1, 16, device=DEVICE)
    try:
        mea_attention(q, q, q, path="triton")
        write("correct", heads_beyond_a_grid="not refused")
    except ValueError as error:
        write("correct", heads_beyond_a_grid=f"refused: {error}")
    if o.rehearse:
        return
    slow = ["--deselect", "tests/test_kernels.py::test_every_kernel_compiles_for_gpus_that_are_not_here"]
    tests = ["-m", "pytest", "-q", "-m", "slow or not slow", "tests/test_kernels.py", *slow]
    write("correct", pytest=subprocess.run([sys.executable, *tests], cwd=ROOT).returncode)
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, *program("functional.py")]
            run = subprocess.run(command, cwd=ROOT, **minutes.PIPES)
            write("correct", sanitizer=tool, code=run.returncode, said=run.stdout.strip().splitlines()[-1:])


def check_long(o):
    """Outputs and gradients of the kernels beside torch's at long sequences: relative errors."""
    H, n, D = 4, 2, 64
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float32,)
    for T, dtype in itertools.product((256, 1000) if o.rehearse else (4096, 16384, 32768), dtypes):
        torch.manual_seed(T)
        inputs = [random_heads(1, count, T, D, DEVICE, dtype) for count in (H, n, n)]
        inputs += [torch.randn(shape, device=DEVICE) for shape in ((n, H), (n, H), (H, D))]
        found = {}
        for path in ("triton", "sdpa"):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = mea_attention(*leaves, path=path)
            found[path] = [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]
        names = ("out", "dq", "dk", "dv", "dcompose_k", "dcompose_v", "dgain")
        error = lambda a, b: ((a.double() - b.double()).norm() / b.double().norm()).item()
        errors = {name: error(*pair) for name, *pair in zip(names, found["triton"], found["sdpa"])}
        write("correct", T=T, dtype=str(dtype)[6:], against="sdpa", **errors)


# ---------------------------------------------------------------------------------------------------------------------
# Fast


def attention_paths():
    """{name: (q, k, v, gain) -> normed causal attention}: what the kernel is compared with, as far as it is here."""
    plain = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    attends = {"sdpa": plain, "blocks": lambda q, k, v: causal_attention(q, k, v, path="blocks")}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        attends[f"sdpa {backend.name.split('_')[0].lower()}"] = sdpa_kernel(backend)(plain)
    if CUDA:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled, masks = torch.compile(flex_attention), {}

        def flex(q, k, v):
            T = q.size(2)
            if T not in masks:
                masks[T] = create_block_mask(lambda b, h, query, key: query >= key, None, None, T, T, device=DEVICE)
            return compiled(q, k, v, block_mask=masks[T])

        attends["FlexAttention"] = flex
        with contextlib.suppress(ImportError):
            from flash_attn import flash_attn_func

            swapped = lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            attends["flash-attn"] = lambda q, k, v: swapped(q, k, v).transpose(1, 2)
    normed = lambda attend: lambda q, k, v, gain: rms_norm(attend(q, k, v), gain[:, None], 1e-6)
    paths = {"triton": lambda q, k, v, gain: mea_attention(q, k, v, None, None, gain, path="triton")}
    return paths | {f"{name} + norm": normed(attend) for name, attend in attends.items()}


def measured_peaks(o):
    """(FLOP/s of a large matrix product, bytes/s of a copy) as this card reaches them."""
    N, M = (512, 2**22) if o.rehearse else (8192, 2**29)
    a, b = (torch.randn(N, N, device=DEVICE, dtype=DTYPE) for _ in "ab")
    source, target = (torch.empty(M, dtype=torch.int8, device=DEVICE) for _ in "st")
    jobs = dict(product=timed(lambda: a @ b, DEVICE), copy=timed(lambda: target.copy_(source), DEVICE))
    product, copy = (statistics.median(taken) for taken in in_turns(jobs, 10).values())
    write("kernels", product_flops=2 * N**3 / product, copy_bytes_per_second=2 * M / copy)
    return 2 * N**3 / product, 2 * M / copy


def time_kernels(o):
    """Decoding and attention: times, their ratios to the first path of a kind, and the shares of this card's peaks."""
    flops, bandwidth = measured_peaks(o)

    def write_times(kind, jobs, **shape):
        for path, cost, seconds, ratio in time_jobs(jobs, DEVICE, 2 if o.rehearse else 20):
            rates = dict(tflops=cost.flops / seconds / 1e12, gb_per_second=cost.bytes / seconds / 1e9)
            rates |= dict(share_of_product=cost.flops / seconds / flops, share_of_copy=cost.bytes / seconds / bandwidth)
            write("kernels", kind=kind, **shape, path=path, ms=1e3 * seconds, over_first=ratio, **rates)

    B, H = (4, 16) if CUDA else (1, 4)
    lengths = (256,) if o.rehearse else (1024, 4096, 16384, 32768, 131072)
    cases = {f"{path}, {n} of {H} cached": (n, path) for n in (H, H // 2, H // 4) for path in ("sdpa", "triton")}
    for D, S in itertools.product((64, 128), lengths):
        write_times("decode", decode_jobs(cases, B, S, H, D, DEVICE, DTYPE), B=B, S=S, D=D)
    H = 16 if CUDA else 2
    lengths, tokens = ((128,), 128) if o.rehearse else ((1024, 2048, 4096, 8192, 16384), 16384)
    for D, T in itertools.product((64, 128), lengths):
        B = max(1, tokens // T)
        for kind, jobs in attention_jobs(attention_paths(), B, T, H, D, DEVICE, DTYPE).items():
            write_times(kind, jobs, B=B, T=T, D=D)


def tune(o):
    """The fastest tiles of each prefill kernel: put them into kernels.tile_options where they differ."""
    need_kernels("tune")
    B, H, T = (8, 16, 2048) if CUDA else (1, 1, 64)
    sizes, stages = (32, 64) if o.rehearse else (32, 64, 128), (2, 3, 4) if CUDA else (2,)
    plain = kernels.tile_options

    def run(tuned, choice, leaves, g):
        options = lambda kernel, q: {**plain(kernel, q), **(choice if kernel is tuned else {})}
        with mock.patch.object(kernels, "tile_options", options):
            out = mea_attention(*leaves[:3], None, None, leaves[3], path="triton")
            return out if tuned is kernels.forward_kernel else torch.autograd.grad(out, leaves, g)

    tuned_kernels = (kernels.forward_kernel, kernels.backward_dkdv_kernel, kernels.backward_dq_kernel)
    for D, tuned in itertools.product((64, 128), tuned_kernels):
        q, k, v, g = (random_heads(B, H, T, D, DEVICE, DTYPE) for _ in "qkvg")
        leaves = [x.requires_grad_() for x in (q, k, v)] + [torch.ones(H, D, device=DEVICE, requires_grad=True)]
        jobs = {}
        for M, N, warps, depth in itertools.product(sizes, sizes, (4, 8), stages):
            choice = dict(BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=depth)
            if tuned is not kernels.backward_dkdv_kernel or N % M == 0:
                jobs[json.dumps(choice)] = (lambda choice=choice: run(tuned, choice, leaves, g)), None
        now = {name: value for name, value in plain(tuned, q).items() if name in choice}
        fastest = sorted(time_jobs(jobs, DEVICE, 2 if o.rehearse else 7), key=lambda timing: timing[2])
        for name, _, seconds, _ in fastest[:3]:
            write("tune", kernel=tuned.__name__, D=D, ms=1e3 * seconds, now=now, **json.loads(name))


# ---------------------------------------------------------------------------------------------------------------------
# Whole programs


def train(o):
    """Tokens/s, memory and utilisation in a few steps of GPT-2's shape: every variant, nanoGPT on the same tokens."""
    steps = 6 if o.rehearse else 40
    shape = f"--preset {'tiny' if o.rehearse else 'base --compile --grad_accum 2 --eval_windows 16'}"
    shape += f" --max_steps {steps} --eval_every {steps} --save_every {steps}"
    for variant in ("mha", "mea", "dfa", "tha"):
        run = ["--attention", variant, "--overwrite", "--out_dir", OUT / variant]
        code, lines = execute("train.py", *run, *shape.split()), read_metrics(ROOT / OUT / variant)
        speeds = [line["tokens_per_second"] for line in lines[len(lines) // 2 :]]
        write("train", variant=variant, code=code, tokens_per_second=statistics.median(speeds or [0]), last=lines[-1:])
    if o.nanogpt:
        shape = {} if o.rehearse else dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16)
        shape |= dict(device=DEVICE, compile=CUDA, max_iters=steps, eval_interval=1000)
        shape |= dict(gradient_accumulation_steps=2, eval_iters=1, log_interval=1)
        with minutes.nanogpt_with_our_tokens(o.nanogpt) as folder:
            command = minutes.nanogpt_command(1e-3, **shape)
            said = subprocess.run(command, cwd=folder, **minutes.PIPES).stdout
        write("train", variant="nanoGPT", said=said.strip().splitlines()[-3:])


def questions(o):
    """The paper's four cells and Talking-Heads at 27M parameters, three rates and seeds; one too large; a larger pair.

    More than ten minutes: stopped runs go on when it is repeated.
    """
    shape = "--n_layer 8 --n_head 8 --n_embd 512 --block_size 1024 --batch_size 32 --warmup_steps 100 --max_steps 1600"
    shape += " --eval_every 200 --save_every 100 --eval_windows 128 --compile"
    large = "--preset base --grad_accum 1 --max_steps 1600 --save_every 100 --compile"
    rates, seeds = "1e-3,2e-3,4e-3", 3
    if o.rehearse:
        shape = large = "--preset tiny --max_steps 4 --eval_every 2"
        rates, seeds = "2e-3", 1
    cells = f"--variants mha,mha+norm,mea-norm,mea,tha --seeds {seeds}"
    beyond = "--learning_rates 8e-3 --schedule constant"
    for name, options in {
        "cosine": f"{cells} --learning_rates {rates} {shape}",
        "beyond": f"{cells} {beyond} {shape}",
        "large": f"--variants mha,mea --seeds 1 {large}",
    }.items():
        where = ["--data_dir", o.data_dir, "--out_dir", OUT / name, "--results", WRITTEN / name]
        execute("experiments/sweep.py", *options.split(), *where)


def compress(o):
    """Half the cache of a checkpoint, then healed: trained towards the original's predictions."""
    windows = "--calibration_windows 4 --eval_windows 4" if o.rehearse else "--calibration_windows 256"
    steps = 2 if o.rehearse else 600
    heal = f"--preset heal --max_steps {steps} --eval_every {steps} --warmup_steps {steps // 10} --learning_rate 2e-4"
    data = ["--data_dir", o.data_dir, "--overwrite", "--out_dir"]
    for method in ("aligned", "latent"):
        half, healed = OUT / f"half-{method}", OUT / f"half-{method}-healed"
        compressing = "--checkpoint", o.checkpoint, "--method", method, *windows.split(), *data, half
        healing = "--init_from", half, "--teacher", o.checkpoint, *heal.split(), *data, healed
        codes = [execute("compress.py", *compressing), execute("train.py", *healing)]
        loss = json.loads((ROOT / half / "report.json").read_text())["loss"]
        loss["healed"] = read_metrics(ROOT / healed)[-1]["val_loss"]
        write("compress", method=method, codes=codes, loss=loss)


PIECES = dict(correct=correct, kernels=time_kernels, tune=tune, train=train, questions=questions, compress=compress)
READS = dict(train={"nanogpt"}, questions={"data_dir"}, compress={"checkpoint", "data_dir"})


@dataclass
class Options:
    rehearse: bool = option(False, "tiny sizes, on a CPU too")
    nanogpt: str = option("", "a checkout of nanoGPT for train")
    data_dir: str = option("data/python", "prepared data of questions and compress")
    checkpoint: str = option("out/small", "what compress compresses")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    piece = argv[0] if argv and argv[0] in PIECES else None
    o, given = parse_options(Options, argv[1:] if piece else argv)
    if not piece:
        fail(f"say what to measure: python experiments/gpu.py {'|'.join(PIECES)} [--rehearse]")
    if ignored := given - {"rehearse"} - READS.get(piece, set()):
        fail(f"{piece} reads no --{min(ignored)}")
    if not (CUDA or o.rehearse):
        fail("there is no GPU here: --rehearse runs tiny sizes on the CPU")
    PIECES[piece](o)


if __name__ == "__main__":
    run_program(main)
