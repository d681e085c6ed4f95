"""Pretraining on a prepared data set: `python train.py` makes the default data, trains a small MEA model and samples.

A run folder (--out_dir) holds checkpoint.pt and checkpoint.prev.pt, config.json, tokenizer.json, metrics.jsonl (a line
a step) and, with matplotlib, loss.png; run.lock keeps a second process out. A run that was stopped, or killed, goes on
with --resume and ends with the same weights bit for bit on a CPU. Under `torchrun` several processes train one model.
Read `model.py` first and `sample.py` next.
"""

from options import autocast, choose_device, choose_dtype, fail, option, parse_options, run_program  # before torch
from options import save_picture, say, write_atomically

import contextlib
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout  # torch brings it
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import model as gpt
from attention import ATTENTION
from checkpoint import FORMAT, find_checkpoint, load_checkpoint, save_checkpoint
from data import prepare
from data.dataset import open_dataset
from data.sampler import WindowSampler, validation_windows
from data.tokenizer import load_tokenizer
from functional import PATHS, set_kernel
from model import GPT, GPTConfig, build_config

DEFAULT_DATA = "data/python"

# Training settings beside the shapes of model.PRESETS, where they are not the defaults of the options below. `small` is
# a few minutes on 2 CPU cores; `base` and `1b` are for GPUs, with a larger corpus: see the README.
LONG = dict(learning_rate=1e-3, save_every=500, eval_windows=512)
TRAINING = {
    "tiny": dict(max_steps=60, warmup_steps=10, learning_rate=3e-3, eval_every=30, save_every=30, eval_windows=16),
    "small": dict(batch_size=8, max_steps=350),
    "base": dict(batch_size=16, grad_accum=30, max_steps=20000, warmup_steps=700, eval_every=250, **LONG),
    "1b": dict(batch_size=8, grad_accum=64, max_steps=100000, warmup_steps=1000, eval_every=500, **LONG),
}
PRESETS = {name: {**shape, **TRAINING[name]} for name, shape in gpt.PRESETS.items()}


@dataclass
class Options(GPTConfig):
    vocab_size: int = 256  # comes with the data
    preset: str = option("small", "model shape and training settings; every other option overrides its own", PRESETS)
    # data and run
    data_dir: str = option(DEFAULT_DATA, "prepared data set (see data/prepare.py)")
    out_dir: str = option("", "run folder (default: out/<preset>)")
    init_from: str = option("", "run folder, checkpoint, Hugging Face folder or hub name whose weights to start from")
    resume: bool = option(False, "go on with the run in out_dir")
    overwrite: bool = option(False, "replace the run in out_dir")
    # optimisation
    max_steps: int = option(350, "optimiser steps", least=1)
    batch_size: int = option(8, "windows in a micro-batch", least=1)
    grad_accum: int = option(1, "micro-batches in a step, in each process", least=1)
    learning_rate: float = option(6e-3, "peak of the schedule", above=0)
    warmup_steps: int = option(50, "steps of linear warm-up", least=0)
    schedule: str = option(
        "cosine",
        "after warm-up: cosine to 10 % of the peak, constant, or wsd (constant, then linear to 0 over the last fifth)",
        ["cosine", "constant", "wsd"],
    )
    weight_decay: float = option(0.1, "AdamW's, on matrices only", least=0)
    beta1: float = option(0.9, "AdamW's", least=0, below=1)
    beta2: float = option(0.95, "AdamW's", least=0, below=1)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 does not clip", least=0)
    seed: int = option(0, "of the weights, the order of the data and dropout", least=0)
    # evaluation and saving
    eval_every: int = option(50, "steps between evaluations", least=1)
    eval_windows: int = option(64, "validation windows, always the same ones", least=1)
    save_every: int = option(50, "steps between checkpoints", least=1)
    log: str = option("none", "where else metrics go; both stay on this machine", ["none", "tensorboard", "wandb"])
    # machine
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    # Of matrix products: weights and the optimizer's moments stay float32.
    dtype: str = option("auto", "auto takes bfloat16 where the device has it", ["auto", "float32", "bfloat16"])
    kernel: str = option("auto", "path of the attention (see functional.py)", PATHS)
    parallel: str = option("ddp", "torchrun's processes hold the whole model, or parts (fsdp)", ["ddp", "fsdp"])
    activation_checkpointing: bool = option(False, "recompute blocks in the backward: less memory, the same numbers")
    compile: bool = option(False, "torch.compile the model: slow to start, then faster")
    threads: int = option(0, "CPU threads (0: as many as cores)", least=0)

    def __post_init__(self):  # a shape is checked where it is built
        pass


# What --resume may change: the rest would make it another run.
CHANGEABLE = {"resume", "overwrite", "out_dir", "data_dir", "max_steps", "eval_every", "save_every", "log", "device"}
CHANGEABLE |= {"kernel", "parallel", "activation_checkpointing", "compile", "threads"}
# What --init_from may change; attention only from mha to mea, which starts as the same function.
REFITTED = {"dropout", "block_size", "attention", "head_norm", "compose", "mea_form"}

# ---------------------------------------------------------------------------------------------------------------------
# The machine

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


def utilisation(flops_per_second, device):
    """{"mfu": model FLOPs utilisation} of a known GPU in dense bfloat16 (PaLM, appendix B), otherwise {}."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"mfu": round(flops_per_second / peak, 4) for known, peak in PEAK_FLOPS.items() if known in name}


def peak_memory(device):
    """Largest memory so far in bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: torchrun starts this program in each. Rank 0 speaks and writes; alone, a process is rank 0 of 1


def ranks():
    """(rank, world size) of this process; (0, 1) outside of torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(number):
    """The numbers of all ranks in their order, a list. Every rank must call, and waits for the last one."""
    rank, world_size = ranks()
    if world_size == 1:
        return [number]
    numbers = torch.zeros(world_size, dtype=torch.float64)
    numbers[rank] = number
    dist.all_reduce(numbers)
    return numbers.tolist()


def join_processes():
    """Find the others that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")


def wrap_distributed(model, parallel, device):
    """What to call in place of the model so that the ranks' gradients are averaged; fsdp divides `model` among them."""
    _, world_size = ranks()
    if world_size == 1:
        return model
    if parallel == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (world_size,))
    for part in (*model.layers, model):  # a block's matrices are gathered when it runs
        fully_shard(part, mesh=mesh)
    return model


def sync_gradients(wrapped, last):
    """Let the next backward exchange gradients only if it is the step's last."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # fsdp
        wrapped.set_requires_gradient_sync(last)
    elif ranks()[1] > 1:
        wrapped.require_backward_grad_sync = last


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # by name, and as one process would have it


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a step


def make_optimizer(groups, rate, betas=(0.9, 0.95)):
    """AdamW over `GPT.parameter_groups`. Put another optimizer here: its state is saved by name."""
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=device in ("cpu", "cuda"))


def learning_rate(o, step, floor=0.1):
    """The rate of update number `step`, counted from 0; a cosine ends at `floor` times the peak."""
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    if o.schedule == "constant":
        return o.learning_rate
    if o.schedule == "wsd":
        return o.learning_rate * min(1.0, (o.max_steps - step) / max(1, o.max_steps // 5))
    progress = (step - o.warmup_steps) / max(1, o.max_steps - o.warmup_steps)
    return o.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class SpikeCounter:
    """Counts steps whose loss stands 6 standard deviations above its running mean (both exponential, over 50 steps)."""

    def __init__(self, count=0, seen=0, mean=0.0, variance=0.0):
        self.count, self.seen, self.mean, self.variance = count, seen, mean, variance

    def update(self, loss):
        limit = self.mean + 6 * math.sqrt(self.variance)
        if self.seen >= 20:
            self.count += loss > limit
            loss = min(loss, limit)  # a spike must not widen the band that the next one is measured by
        self.seen += 1
        weight = max(1 / self.seen, 0.02)
        delta = loss - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta * delta)
        return self.count


@torch.no_grad()
def evaluate(model, windows, batch_size, device, dtype):
    """Mean loss in nats per token over windows (inputs, targets), int64 arrays (count, T), shared by the ranks."""
    was_training = model.training
    model.eval()
    total, (rank, world_size) = 0.0, ranks()
    for start in range(rank * batch_size, len(windows[0]) + rank * batch_size, world_size * batch_size):
        count = len(windows[0][start : start + batch_size])
        rows = slice(start, start + batch_size) if count else slice(1)  # with nothing left, too: fsdp needs every rank
        x, y = (torch.from_numpy(part[rows]).to(device) for part in windows)
        with autocast(device, dtype):
            total += model(x, y)[1].item() * count
    model.train(was_training)
    return sum(gather(total)) / len(windows[0])


def leave(message, code):
    """End the run early, in every process."""
    rank, _ = ranks()
    if rank == 0:
        print(f"\n{message}", file=sys.stderr)
    gather(0)  # torchrun ends the others when one leaves: let rank 0 finish
    raise SystemExit(code)


@contextlib.contextmanager
def caught_signals():
    """A list to which the first SIGINT, SIGTERM or SIGHUP is added; a second one ends the process at once."""
    caught = []
    handle = lambda number, _: caught.append(number) if not caught else os._exit(128 + number)
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(o, config, dataset, state=None):
    """Train as the options say and return the model. `state` is the checkpoint to resume or to take weights from."""
    out, (rank, world_size) = Path(o.out_dir), ranks()
    device = choose_device(o.device)
    dtype = choose_dtype(o.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if o.threads:
        torch.set_num_threads(o.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs for what autocast leaves in float32

    torch.manual_seed(o.seed)
    model = GPT(config).to(device)
    model.activation_checkpointing = o.activation_checkpointing
    if state is not None:
        load_initial(model, state["model"])
    wrapped = wrap_distributed(model, o.parallel, device)
    run = torch.compile(wrapped) if o.compile else wrapped
    optimizer = make_optimizer(model.parameter_groups(o.weight_decay), o.learning_rate, (o.beta1, o.beta2))
    step, spikes = 0, SpikeCounter()
    if o.resume:
        saved = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        set_state_dict(model, optimizer, **saved, options=WHOLE)
        step, spikes = state["step"], SpikeCounter(**state["spikes"])
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)

    def save():
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        weights, moments = get_state_dict(model, optimizer, options=WHOLE)
        if rank == 0:
            state = dict(model=weights, optimizer=moments, step=step, rng=dict(cpu=torch.get_rng_state(), cuda=gpu))
            state |= dict(config=asdict(config), options=asdict(o), world_size=world_size, spikes=vars(spikes))
            save_checkpoint(out, state | dict(data=describe_data(dataset)))

    sampler = WindowSampler(dataset.train, config.block_size, o.seed)
    windows = validation_windows(dataset.val, config.block_size, o.eval_windows)
    shares = dict(rank=rank, world_size=world_size, grad_accum=o.grad_accum)
    step_tokens = o.batch_size * o.grad_accum * world_size * config.block_size
    step_flops = config.flops_per_token() * step_tokens / world_size  # of one process
    if rank == 0:
        prepare_folder(o, config, dataset, step)
    say(describe_run(o, config, dataset, model, device, dtype, step_tokens, step))
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
                x, y = (torch.from_numpy(part).to(device) for part in batch)  # (B, T) each
                sync_gradients(wrapped, last=micro_step == o.grad_accum - 1)
                with autocast(device, dtype):
                    part = run(x, y)[1] / o.grad_accum
                part.backward()
                loss += part.item()
            loss = sum(gather(loss)) / world_size
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss {loss} and gradient norm {norm} at step {step + 1}: stopped before the update"
                leave(f"{what}; {last_good(out)}. Try a lower --learning_rate or more --warmup_steps", 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            seconds = max(time.monotonic() - started, 1e-9)  # a coarse clock may stand still
            line = dict(step=step, tokens=step * step_tokens, train_loss=loss, learning_rate=rate, grad_norm=norm)
            line |= dict(tokens_per_second=round(step_tokens / seconds, 1), loss_spikes=spikes.update(loss))
            line |= utilisation(step_flops / seconds, device)
            if step % o.eval_every == 0 or step == o.max_steps:
                line["val_loss"] = evaluate(run, windows, o.batch_size, device, dtype)
                line["val_bpb"] = dataset.bits_per_byte(line["val_loss"])
                line["peak_memory"] = peak_memory(device)
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
                leave(f"{what}; go on with: {command()} --resume --out_dir {out}", 128 + stop)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What comes before it: everything is checked before any work


@contextlib.contextmanager
def lock_run(o):
    """Hold the run folder, so that no second process writes it. Raises ValueError where that must not be.

    The lock is the kernel's: it ends with the process however that ends.
    """
    out = Path(o.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / "run.lock").acquire(timeout=0)
    except Timeout:
        advice = "wait for it, stop it, or give another --out_dir"
        raise ValueError(f"another process is at work in {out}: {advice}") from None
    with lock:
        holds_run = any((out / name).exists() for name in ("config.json", "checkpoint.pt", "metrics.jsonl"))
        if holds_run and not o.resume and not o.overwrite:
            how = "--resume to go on with it, --overwrite to replace it"
            raise ValueError(f"{out} already holds a run: give {how}, or another --out_dir")
        yield


def open_run(o, given):
    """(options, config, dataset, checkpoint state or None) of a run that can begin. Raises ValueError or OSError."""
    if o.resume and (o.overwrite or o.init_from):
        other = "overwrite replaces it" if o.overwrite else "init_from begins another"
        raise ValueError(f"resume goes on with a run and {other}: give one of them")
    out, state = Path(o.out_dir or f"out/{o.preset}"), None
    if o.resume:
        state = load_checkpoint(out)[1]
        o = resumed_options(o, given, state, out)
    o.out_dir = str(out)
    if o.log != "none" and not importlib.util.find_spec(o.log):
        raise ValueError(f"log {o.log} needs a package: pip install {o.log}")
    choose_device(o.device)
    set_kernel(o.kernel)
    config = build_config(o)  # the vocabulary comes with the data: all the rest is checked first
    if o.data_dir == DEFAULT_DATA and not Path(o.data_dir).exists() and not o.resume:  # a run that goes on has its data
        say(f"preparing the default data set in {o.data_dir}")
        prepare.prepare(source="python", out_dir=o.data_dir)
    try:
        dataset = open_dataset(o.data_dir)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; if it lies elsewhere, say where with --data_dir") from None
    config.vocab_size = dataset.vocab_size
    if o.resume:
        if state["data"]["fingerprint"] != dataset.fingerprint:
            raise ValueError(f"{o.data_dir} is not the data set this run was trained on: give its own with --data_dir")
        config = GPTConfig(**state["config"])
    elif o.init_from:
        state = load_checkpoint(o.init_from)[1]
        config = initial_config(o, given, state)
        if not same_tokenizer(o.init_from, state, dataset):
            how = f"prepare it with that one (data/prepare.py --tokenizer {o.init_from})"
            raise ValueError(f"{o.data_dir} was made with another tokenizer than {o.init_from}: {how}")
    for split, tokens in (("training", dataset.train), ("validation", dataset.val)):
        if len(tokens) <= config.block_size:
            few = f"{len(tokens)} tokens are too few for block_size {config.block_size}"
            raise ValueError(f"the {split} split of {o.data_dir} is too short: {few}; use more text or a smaller block")
    return o, config, dataset, state


def resumed_options(o, given, state, out):
    """The options to go on with: the run's own, with what --resume may change. Raises ValueError."""
    if lacking := {"optimizer", "options", "step", "rng", "spikes", "data"} - set(state):
        why = f"weights without a training run to go on with ({min(lacking)})"
        raise ValueError(f"{out} holds {why}: use --init_from {out}")
    if unknown := sorted(set(state["options"]) - {f.name for f in fields(Options)}):
        raise ValueError(f"{out} cannot be resumed: this program has no option {unknown[0]}")
    saved = Options(**state["options"])
    _, world_size = ranks()
    micro_batches = saved.grad_accum * state.get("world_size", 1)  # a step's, in all processes together
    if micro_batches % world_size:
        cannot = f"{micro_batches} micro-batches, which {world_size} processes cannot share equally"
        raise ValueError(f"a step of this run is {cannot}: start another number")
    saved.grad_accum = micro_batches // world_size
    for name in sorted(given - CHANGEABLE):
        mine, theirs = getattr(o, name), getattr(saved, name)
        if mine != theirs:
            raise ValueError(f"this run has {name} {theirs}, not {mine}: leave it out to resume, or start another run")
    changes = {name: getattr(o, name) for name in given & CHANGEABLE} | dict(resume=True, overwrite=False)
    o = Options(**{**asdict(saved), **changes})
    if saved.schedule == "cosine" and o.max_steps > saved.max_steps and state["step"] >= saved.max_steps:
        again = f"over {o.max_steps} steps the learning rate goes up again, to {learning_rate(o, state['step']):.2g}"
        say(f"note: this run's cosine had ended; {again}")
    return o


def initial_config(o, given, state):
    """The config of a run that starts from weights: theirs, with what may be changed. Raises ValueError."""
    config = dict(state["config"])
    if "data" not in state:  # a Hugging Face model, whose window may be too long to train on: the preset's cuts it
        config["block_size"] = min(o.block_size, config["block_size"])
    for name in sorted(given & set(config)):
        mine, theirs = getattr(o, name), config[name]
        longer = name == "block_size" and mine > state["config"][name]
        other = name == "attention" and (theirs, mine) not in (("mha", "mea"), (theirs, theirs))
        if mine != theirs and (name not in REFITTED or longer or other):
            raise ValueError(f"{o.init_from} has {name} {theirs}, not {mine}: leave it out")
        config[name] = mine
    if "attention" in given and "head_norm" not in given and config["attention"] != state["config"]["attention"]:
        config["head_norm"] = None  # the variant's own
    return GPTConfig(**config)


def load_initial(model, weights):
    """Weights into a model that may have compositions and head norms beside them, which start as the identity."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    odd = [name for name in missing if not any(new in name for new in (".compose_", ".head_norm."))] + unexpected
    if odd:
        raise ValueError(f"the weights to start from do not fit the model: {odd[0]}")


def same_tokenizer(checkpoint, state, dataset):
    """Whether a data set's ids mean what they meant to a checkpoint."""
    if "data" in state:
        return state["data"]["tokenizer"] == dataset.meta["tokenizer"]["sha256"]
    folder = find_checkpoint(checkpoint).parent
    fits = dataset.vocab_size <= state["config"]["vocab_size"]
    if not fits or not (folder / "tokenizer.json").exists():
        return fits  # all that can be known without a tokenizer
    return getattr(dataset.tokenizer, "content", None) == load_tokenizer(folder).content


# ---------------------------------------------------------------------------------------------------------------------
# What a run says and writes


def describe_run(o, config, dataset, model, device, dtype, step_tokens, step):
    """Two lines that say what is going to be trained, and where."""
    _, world_size = ranks()
    norm = "with" if config.head_norm else "without"
    text = f"{config.attention} {norm} head norm, {model.n_params():,} parameters, {len(dataset.train):,} tokens of "
    text += f"{dataset.meta['source']}, {o.max_steps} steps of {step_tokens:,} tokens\non "
    text += f"{world_size} processes ({o.parallel}), each " if world_size > 1 else ""
    text += f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
    return f"{text} in {str(dtype)[6:]}, run folder {o.out_dir}" + (f", resumed at step {step}" if step else "")


def describe_data(dataset):
    """What a checkpoint says of its data."""
    bytes_per_token = dataset.meta["splits"]["val"]["bytes"] / len(dataset.val)
    tokenizer = dataset.meta["tokenizer"]["sha256"]
    return dict(fingerprint=dataset.fingerprint, tokenizer=tokenizer, bytes_per_token=bytes_per_token)


def last_good(out):
    try:
        return f"the last good checkpoint is {find_checkpoint(out)}"
    except FileNotFoundError:
        return "no checkpoint was saved yet"


def command():
    """How this program was started."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    return f"torchrun --nproc_per_node {processes} train.py" if ranks()[1] > 1 else "python train.py"


def prepare_folder(o, config, dataset, step):
    """Make the run folder, or, resuming, cut its metrics back to the checkpoint's step."""
    out = Path(o.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / "metrics.jsonl"
    if step:
        kept = []
        for line in metrics.read_text(errors="replace").splitlines() if metrics.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be half-written
                kept += [line] if json.loads(line)["step"] <= step else []
        write_atomically(metrics, "".join(line + "\n" for line in kept))
    else:
        for name in ("checkpoint.prev.pt", "checkpoint.pt", "checkpoint.tmp", "metrics.jsonl", "loss.png"):
            (out / name).unlink(missing_ok=True)
    data = dict(folder=o.data_dir, fingerprint=dataset.fingerprint, tokenizer=dataset.meta["tokenizer"]["name"])
    content = dict(format=FORMAT, model=asdict(config), options=asdict(o), world_size=ranks()[1], data=data)
    text = json.dumps(content | dict(torch=torch.__version__), indent=2) + "\n"
    write_atomically(out / "config.json", text)  # first: from here on the folder is a run's
    if not step:
        dataset.tokenizer.save(out)


@contextlib.contextmanager
def open_log(o, out, step):
    """What --log says: a function that gives a line of metrics to TensorBoard or, offline, to Weights & Biases."""
    log = o.log if ranks()[0] == 0 else "none"
    if log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(out / "tensorboard", purge_step=step + 1) as writer:
            yield lambda line: [writer.add_scalar(name, value, line["step"]) for name, value in line.items()]
    elif log == "wandb":
        import wandb

        with wandb.init(project="nanomea", name=out.name, dir=out, mode="offline", config=asdict(o)) as run:
            yield lambda line: run.log(line, step=line["step"])
    else:
        yield lambda line: None


def print_progress(line, max_steps, seconds_per_step):
    left = round(seconds_per_step * (max_steps - line["step"]))
    text = f"step {line['step']:>5}/{max_steps}  loss {line['train_loss']:.3f}  "
    if "val_loss" in line:
        text += f"val {line['val_loss']:.4f} ({line['val_bpb']:.4f} bits per byte)  "
        text += f"peak {line['peak_memory'] / 2**20:,.0f} MiB  "
    if "mfu" in line:
        text += f"MFU {line['mfu']:.1%}  "
    if line["loss_spikes"]:
        text += f"{line['loss_spikes']} spikes  "
    say(f"{text}{line['tokens_per_second']:,.0f} tokens/s  ETA {left // 60}:{left % 60:02d}")


def draw_losses(plt, out):
    """The losses of a run's metrics.jsonl against training tokens."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "val_loss" in line]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for chosen, name, style in ((lines, "train_loss", "-"), (evaluated, "val_loss", "o-")):
        axes.plot([line["tokens"] / 1e6 for line in chosen], [line[name] for line in chosen], style, label=name, lw=0.8)
    title = out.name + (f": validation {evaluated[-1]['val_loss']:.4f}" if evaluated else "")
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def show_end(o, dataset, model, began):
    """A sample of the trained model, the picture of its losses, and commands to try next."""
    prompt = "def" if dataset.meta["source"] == "python" else "The"  # no space behind it: tokens begin with their space
    how = dict(temperature=0.8, top_k=50, seed=o.seed)
    new_tokens = min(120, 2 * model.config.block_size)
    new = model.eval().generate([dataset.tokenizer.encode(prompt)], new_tokens, **how)[0]
    say(f"\nA sample:\n\n{prompt}{dataset.tokenizer.decode(new)}\n")
    other, *others = [name for name in ATTENTION if name != model.config.attention]
    again = f"python train.py --preset {o.preset} --attention {other} --out_dir out/{o.preset}-{other}"
    picture = save_picture(Path(o.out_dir) / "loss.png", lambda plt: draw_losses(plt, Path(o.out_dir)))
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    say(f"Done in {minutes} min {seconds} s; {picture}. Try next:")
    say(f'  python sample.py --checkpoint {o.out_dir} --prompt "{prompt}" --num_samples 3')
    say(f"  {again}    # or {', '.join(others)}")
    say(f"  python train.py --resume --max_steps {2 * o.max_steps} --out_dir {o.out_dir}    # go on for as long again")


def main(argv=None):
    began = time.monotonic()
    options, given = parse_options(Options, argv, PRESETS)
    try:
        join_processes()
        rank, world_size = ranks()
        if rank > 0:
            gather(0)  # rank 0 looks first: it may have data to prepare, and one message about a mistake is enough
        options, config, dataset, state = open_run(options, given)
        with lock_run(options) if rank == 0 else contextlib.nullcontext():
            if rank == 0:
                gather(0)
            gather(0)  # nobody writes before all have looked
            model = train(options, config, dataset, state)
    except (ValueError, OSError) as error:
        fail(error)
    except RuntimeError as error:
        if ranks()[1] == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        how = f"go on from the last checkpoint with: {command()} --resume --out_dir {options.out_dir}"
        print(f"\nrank {ranks()[0]} lost another process; {how}", file=sys.stderr)
        raise SystemExit(1)
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        if world_size > 1:  # fsdp has only a part of it here
            model, _ = load_checkpoint(options.out_dir, choose_device(options.device))
        show_end(options, dataset, model, began)


if __name__ == "__main__":
    run_program(main)
