"""The training loop: `python train.py` makes the default data, trains a small MEA model and samples from it.

Pretraining, fine-tuning (--init_from) and healing what compress.py made (--init_from, --teacher) are this one loop. A
run that was stopped, or killed, goes on with --resume and ends with the same weights bit for bit on a CPU. Under
`torchrun` several processes train one model (distributed.py). Read `model.py` first, `runs.py` beside it and
`sample.py` next.
"""

from options import autocast, choose_device, choose_dtype, fail, option, parse_options, run_program, say  # before torch

import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import model as gpt
from checkpoint import load_checkpoint, save_checkpoint, starts_bare
from distributed import barrier, end_run, full_state, gather, join_processes, load_full_state, ranks
from distributed import sync_gradients, wrap
from functional import PATHS
from model import GPT, GPTConfig
from runs import DEFAULT_DATA, describe_data, describe_run, fingerprint, freeze_parameters, last_good, learning_rate
from runs import load_initial, lock_run, open_log, open_run, prepare_folder, print_progress, show_end, train_command

# Training settings beside the shapes of model.PRESETS; the others are the defaults of the options below. `small` is
# a few minutes on 2 CPU cores; `base` and `1b` are for GPUs, with a larger corpus: see the README.
LONG = dict(learning_rate=1e-3, save_every=500, eval_windows=512)
TRAINING = {
    "tiny": dict(max_steps=60, warmup_steps=10, learning_rate=3e-3, eval_every=30, save_every=30, eval_windows=16),
    "small": dict(batch_size=8, max_steps=350),
    "base": dict(batch_size=16, grad_accum=30, max_steps=20000, warmup_steps=700, eval_every=250, **LONG),
    "1b": dict(batch_size=8, grad_accum=64, max_steps=100000, warmup_steps=1000, eval_every=500, **LONG),
}
PRESETS = {name: {**shape, **TRAINING[name]} for name, shape in gpt.PRESETS.items()}
# Training after compress.py (2601.19611, section 5.2: a cosine to 0), of whatever model --init_from names.
HEAL = dict(block_size=512, max_steps=35, warmup_steps=3, learning_rate=3e-4, final_rate=0.0, weight_decay=0.0)
PRESETS["heal"] = HEAL

run, data, optimisation, machine = (partial(option, group=name) for name in ("run", "data", "optimisation", "machine"))


@dataclass
class Options(GPTConfig):
    vocab_size: int = 256  # comes with the data
    preset: str = run("small", "model shape and training settings (heal: no shape); other options override it", PRESETS)
    data_dir: str = run(DEFAULT_DATA, "prepared data set (see data/prepare.py), or several with commas between them")
    max_steps: int = run(350, "optimiser steps", least=1)
    out_dir: str = run("", "run folder (default: out/<preset>)")
    init_from: str = run("", "run folder, checkpoint, Hugging Face folder or hub name whose weights to start from")
    teacher: str = run("", "the same of a model whose predictions are learned in place of the tokens (KL divergence)")
    train_only: str = run("", "train only parameters with one of these in their names, e.g. self_attn,lm_head")
    freeze: str = run("", "do not train parameters with one of these in their names, e.g. k_proj,v_proj")
    resume: bool = run(False, "go on with the run in out_dir")
    overwrite: bool = run(False, "replace the run in out_dir")
    save_every: int = run(50, "steps between checkpoints", least=1)
    log: str = run("none", "where else metrics go; both stay on this machine", ["none", "tensorboard", "wandb"])
    seed: int = run(0, "of the weights, the order of the data and dropout", least=0)
    window: int | None = data(None, "positions of a window (default: block_size, or the model's if less)", least=2)
    eval_data: str = data("", "data sets to validate on as well, and never to train on")
    eval_every: int = data(50, "steps between evaluations", least=1)
    eval_windows: int = data(64, "validation windows of each data set, always the same ones", least=1)
    batch_size: int = optimisation(8, "windows in a micro-batch", least=1)
    grad_accum: int = optimisation(1, "micro-batches in a step, in each process", least=1)
    learning_rate: float = optimisation(6e-3, "peak of the schedule", above=0)
    warmup_steps: int = optimisation(50, "steps of linear warm-up", least=0)
    schedule: str = optimisation(
        "cosine",
        "after warm-up: cosine to final_rate, constant, or wsd (constant, then linear to 0 over the last fifth)",
        ["cosine", "constant", "wsd"],
    )
    final_rate: float = optimisation(0.1, "share of the peak at which a cosine ends", least=0, most=1)
    weight_decay: float = optimisation(0.1, "AdamW's, on matrices only", least=0)
    beta1: float = optimisation(0.9, "AdamW's", least=0, below=1)
    beta2: float = optimisation(0.95, "AdamW's", least=0, below=1)
    grad_clip: float = optimisation(1.0, "largest norm of the gradient; 0 does not clip", least=0)
    device: str = machine("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    # Of matrix products: weights and the optimizer's moments stay float32.
    dtype: str = machine("auto", "auto takes bfloat16 where the device has it", ["auto", "float32", "bfloat16"])
    kernel: str = machine("auto", "path of the attention (see functional.py)", PATHS)
    parallel: str = machine("ddp", "torchrun's processes hold the whole model, or parts (fsdp)", ["ddp", "fsdp"])
    activation_checkpointing: bool = machine(False, "recompute blocks in the backward: less memory, the same numbers")
    compile: bool = machine(False, "torch.compile the model: slow to start, then faster")
    threads: int = machine(0, "CPU threads (0: as many as cores)", least=0, most=1024)

    groups = "run", "data", "optimisation", "model", "machine"  # of --help

    def __post_init__(self):  # a shape is checked where it is built
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a step


def make_optimizer(groups, rate, betas=(0.9, 0.95)):
    """AdamW over `GPT.parameter_groups`. Put another optimizer here: its state is saved by name."""
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=device in ("cpu", "cuda"))


def training_loss(model, x, y, teacher=None):
    """Cross-entropy of the tokens y, or KL(teacher || model) of the predictions for them: a mean, in nats per token."""
    if teacher is None:
        return model(x, y)[1]
    with torch.no_grad():
        wanted = teacher(x)[0].float().flatten(0, 1).log_softmax(-1)  # (B*T, V)
    found = model(x)[0].float().flatten(0, 1).log_softmax(-1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


@torch.no_grad()
def evaluate(model, windows, batch_size, device, dtype):
    """Mean loss in nats per token over windows (inputs, targets), int64 arrays (count, T), divided among the ranks."""
    was_training = model.training
    model.eval()
    total, (rank, world_size) = 0.0, ranks()
    for start in range(rank * batch_size, len(windows[0]) + rank * batch_size, world_size * batch_size):
        count = len(windows[0][start : start + batch_size])
        rows = slice(start, start + batch_size) if count else slice(1)  # with nothing left, too: fsdp needs every rank
        x, y = (torch.from_numpy(side[rows]).to(device) for side in windows)
        with autocast(device, dtype):
            total += model(x, y)[1].item() * count
    model.train(was_training)
    return sum(gather(total)) / len(windows[0])


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


def utilisation(flops_per_second, device):
    """{"mfu": model FLOPs utilisation} of a known GPU in dense bfloat16 (PaLM, appendix B), otherwise {}."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"mfu": round(flops_per_second / peak, 4) for known, peak in PEAK_FLOPS.items() if known in name}


def peak_memory(device):
    """{"peak_memory": bytes} so far: of the GPU's allocator, or of this process; {} where Python cannot say."""
    if device.type == "cuda":
        return dict(peak_memory=torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return dict(peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # not on Windows


@contextlib.contextmanager
def caught_signals(repeats=1.0):
    """A list to which the first of SIGNALS is added; the next one ends the process at once.

    What follows within `repeats` seconds is the same signal: torchrun passes on what its processes have already got. A
    signal that is ignored, as nohup does it, stays ignored.
    """
    caught, began = [], []

    def handle(number, _):
        if not caught:
            caught.append(number)
            began.append(time.monotonic())
        elif time.monotonic() - began[0] > repeats:
            os._exit(128 + number)

    heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(o, config, texts, state=None, teacher=None):
    """Train as the options say and return the model. `state` is the checkpoint to resume or to take weights from."""
    out, (rank, world_size) = Path(o.out_dir), ranks()
    device = choose_device(o.device)
    dtype = choose_dtype(o.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if o.threads:
        torch.set_num_threads(o.threads)

    torch.manual_seed(o.seed)
    model = GPT(config).to(device)
    model.activation_checkpointing = o.activation_checkpointing
    if state is not None:
        load_initial(model, state["model"])
    freeze_parameters(model, o)  # before fsdp divides them
    wrapped = wrap(model, o.parallel, device)
    forward = torch.compile(wrapped) if o.compile else wrapped
    optimizer = make_optimizer(model.parameter_groups(o.weight_decay), o.learning_rate, (o.beta1, o.beta2))
    step, bare = 0, state is None or starts_bare(state)
    if o.resume:
        load_full_state(model, optimizer, state["model"], state["optimizer"])
        step = state["step"]
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)
    kept = dict(config=asdict(config), options=asdict(o), world_size=world_size, data=describe_data(texts))
    kept |= dict(start_of_text=not bare, pretrained=(state or {}).get("pretrained"))
    kept["teacher"] = fingerprint(teacher) if teacher is not None else None

    def save():
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        weights, moments = full_state(model, optimizer)
        if rank == 0:
            rng = dict(cpu=torch.get_rng_state(), cuda=gpu)
            save_checkpoint(out, dict(model=weights, optimizer=moments, step=step, rng=rng) | kept)

    start = () if bare else texts.tokenizer.start_of_text
    sampler = texts.sampler(o.window, o.seed, start)
    windows = texts.validation_windows(o.window, o.eval_windows, start)
    shares = dict(rank=rank, world_size=world_size, grad_accum=o.grad_accum)
    step_tokens = o.batch_size * o.grad_accum * world_size * o.window
    step_flops = config.flops_per_token(o.window) * step_tokens / world_size  # of one process
    if rank == 0:
        prepare_folder(o, config, texts, step)
    say(describe_run(o, config, texts, model, device, dtype, step_tokens, step))
    model.train()
    first_step = step
    began = shown = time.monotonic()
    path = out / "metrics.jsonl" if rank == 0 else os.devnull
    with caught_signals() as signals, open(path, "a", buffering=1) as metrics, open_log(o, out, step) as show:
        while step < o.max_steps:
            started = time.monotonic()
            if rank > 0:  # dropout: rank 0 goes on with its saved stream, others' follow from (seed, rank, step)
                torch.manual_seed(hash((o.seed, rank, step)))
            rate = learning_rate(o, step)
            for group in optimizer.param_groups:
                group["lr"] = rate

            loss = 0.0
            for micro_step in range(o.grad_accum):
                batch = sampler.batch(step, o.batch_size, micro_step=micro_step, **shares)
                x, y = (torch.from_numpy(side).to(device) for side in batch)  # (B, T) each
                sync_gradients(wrapped, last=micro_step == o.grad_accum - 1)
                with autocast(device, dtype):
                    share = training_loss(forward, x, y, teacher) / o.grad_accum
                share.backward()
                loss += share.item()
            loss = sum(gather(loss)) / world_size
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss {loss} and gradient norm {norm} at step {step + 1}: stopped before the update"
                end_run(f"{what}; {last_good(out)}. Try a lower --learning_rate or more --warmup_steps", 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            seconds = max(time.monotonic() - started, 1e-9)  # a coarse clock may stand still
            line = {"step": step, "tokens": step * step_tokens, "train_loss" if teacher is None else "train_kl": loss}
            line |= dict(learning_rate=rate, grad_norm=norm, tokens_per_second=round(step_tokens / seconds, 1))
            line |= utilisation(step_flops / seconds, device)
            if step % o.eval_every == 0 or step == o.max_steps:
                losses = {name: evaluate(forward, pair, o.batch_size, device, dtype) for name, pair in windows.items()}
                line |= texts.summary(losses) | peak_memory(device)
            metrics.write(json.dumps(line) + "\n")
            show(line)
            if "val_loss" in line or step == first_step + 1 or time.monotonic() - shown > 5:
                shown = time.monotonic()
                print_progress(line, o.max_steps, (shown - began) / (step - first_step))

            stop = int(max(gather(signals[0] if signals else 0)))  # a signal may reach only one of the ranks
            if step % o.save_every == 0 or step == o.max_steps or stop:
                save()
            if stop and step < o.max_steps:
                what = f"stopped by {signal.Signals(stop).name} at step {step}, saved"
                end_run(f"{what}; go on with: {train_command('--resume', '--out_dir', out)}", 128 + stop)
    return model


def main(argv=None):
    began = time.monotonic()
    options, given = parse_options(Options, argv, PRESETS)
    try:
        join_processes()
        rank, world_size = ranks()
        if rank > 0:
            barrier()  # rank 0 looks first: it may have data to prepare, and one message about a mistake is enough
        options, config, texts, state, teacher = open_run(options, given)
        with lock_run(options) if rank == 0 else contextlib.nullcontext():
            if rank == 0:
                barrier()
            barrier()  # nobody writes before all have looked
            model = train(options, config, texts, state, teacher)
    except (ValueError, OSError) as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        explain(error, options)
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        if world_size > 1:  # fsdp has only a part of it here
            model, _ = load_checkpoint(options.out_dir, choose_device(options.device))
        start = () if state is None or starts_bare(state) else texts.tokenizer.start_of_text
        show_end(options, texts, model, began, start)


def explain(error, options):
    """End the program with one line for what the machine could not do; raise what is no such thing."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        smaller = "a smaller --batch_size (with more --grad_accum), --window or model, or --activation_checkpointing"
        fail(f"out of memory: {smaller} takes less ({error})")
    if options.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        fail(f"torch.compile cannot work here: leave --compile out, or install a C++ compiler ({str(error)[:200]})")
    if ranks()[1] > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        how = f"go on from the last checkpoint with: {train_command('--resume', '--out_dir', options.out_dir)}"
        print(f"\nrank {ranks()[0]} lost another process; {how}", file=sys.stderr)
        raise SystemExit(1)
    raise error


if __name__ == "__main__":
    run_program(main)
