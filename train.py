"""Pretraining on a prepared data set: `python train.py` makes the default data, trains a small MEA model and samples.

A run folder (--out_dir) holds checkpoint.pt and checkpoint.prev.pt, config.json, tokenizer.json, metrics.jsonl (a line a step)
and, with matplotlib, loss.png; run.lock keeps a second process out. A run that was stopped, or killed, goes on with --resume
and ends with the same weights bit for bit on a CPU. Under `torchrun` several processes train one model. Read `model.py` first
and `sample.py` next.
"""

import os

# Before torch is loaded: threads that wait soon go to sleep, unless the environment says otherwise. Threads that spin, as they do by default, can run 30
# times slower on a busy machine; threads that never spin lose a tenth on an idle one.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"} | os.environ

import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import model as gpt
from data import prepare
from data.dataset import WindowSampler, open_dataset, validation_windows
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig, find_checkpoint, load_checkpoint, option, parse_options, save_checkpoint

DEFAULT_DATA = "data/python"

# Training settings beside the shapes of model.PRESETS. `small` is a few minutes on 2 CPU cores; `base` and `1b` are for GPUs,
# with a larger corpus: see the README.
TRAINING = {
    "tiny": dict(batch_size=8, max_steps=60, warmup_steps=10, learning_rate=3e-3, eval_every=30, save_every=30, eval_windows=16),
    "small": dict(batch_size=8, max_steps=350, warmup_steps=50, learning_rate=6e-3, eval_every=50, save_every=50, eval_windows=64),
    "base": dict(batch_size=16, grad_accum=30, max_steps=20000, warmup_steps=700, learning_rate=1e-3, eval_every=250, save_every=500, eval_windows=512),
    "1b": dict(batch_size=8, grad_accum=64, max_steps=100000, warmup_steps=1000, learning_rate=1e-3, eval_every=500, save_every=500, eval_windows=512),
}  # fmt: skip
PRESETS = {name: {**shape, **TRAINING[name]} for name, shape in gpt.PRESETS.items()}


@dataclass
class Options:
    preset: str = option("small", "model shape and training settings; every other option overrides its own", list(PRESETS))
    # model
    attention: str = option("mea", "attention of every layer", list(gpt.ATTENTION))
    head_norm: bool | None = option(None, "RMS norm on each head's output (default: on for dfa and mea)")
    mea_form: str = option("auto", "where MEA applies its composition", ["auto", "compose", "fold", "absorb"])
    n_layer: int | None = option(None, "layers")
    n_head: int | None = option(None, "attention heads")
    n_kv_head: int | None = option(None, "key/value heads that are projected and cached (default: n_head)")
    n_embd: int | None = option(None, "width of the model")
    intermediate_size: int | None = option(None, "width of the MLP (default: 8/3 of n_embd, rounded up to 32)")
    block_size: int | None = option(None, "positions in a training window")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    tie_embeddings: bool = option(False, "one matrix for the embedding and the output head")
    dropout: float = option(0.0, "on attention weights and on what each sublayer adds")
    # data and run
    data_dir: str = option(DEFAULT_DATA, "prepared data set (see data/prepare.py)")
    out_dir: str = option("", "run folder (default: out/<preset>)")
    init_from: str = option("", "run folder, checkpoint or Hugging Face folder whose weights to start from")
    resume: bool = option(False, "go on with the run in out_dir")
    overwrite: bool = option(False, "replace the run in out_dir")
    # optimisation
    max_steps: int = option(350, "optimiser steps")
    batch_size: int = option(8, "windows in a micro-batch")
    grad_accum: int = option(1, "micro-batches in a step, in each process: 2 processes see what one with twice as many sees")
    learning_rate: float = option(6e-3, "peak of the schedule")
    warmup_steps: int = option(50, "steps of linear warm-up")
    schedule: str = option("cosine", "after warm-up: cosine to 10 % of the peak, constant, or wsd (constant, then linear to 0 over the last fifth)", ["cosine", "constant", "wsd"])
    weight_decay: float = option(0.1, "AdamW's, on matrices only")
    beta1: float = option(0.9, "AdamW's")
    beta2: float = option(0.95, "AdamW's")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 does not clip")
    seed: int = option(0, "of the weights, the order of the data and dropout")
    # evaluation and saving
    eval_every: int = option(50, "steps between evaluations")
    eval_windows: int = option(64, "validation windows, always the same ones")
    save_every: int = option(50, "steps between checkpoints")
    # machine
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    dtype: str = option("auto", "of matrix products (weights stay float32); auto takes bfloat16 where the device has it", ["auto", "float32", "bfloat16"])
    parallel: str = option("ddp", "under torchrun, each process holds the whole model (ddp) or a part of every weight and moment (fsdp)", ["ddp", "fsdp"])
    activation_checkpointing: bool = option(False, "recompute each block in the backward: less memory, more time, the same numbers")
    compile: bool = option(False, "torch.compile the model: slow to start, then faster")
    threads: int = option(0, "CPU threads (0: as many as cores)")


# What --resume may change: the rest would make it another run.
CHANGEABLE = {"resume", "overwrite", "out_dir", "data_dir", "max_steps", "eval_every", "save_every", "device", "parallel",
              "activation_checkpointing", "compile", "threads"}  # fmt: skip


def check_options(o):
    """Raise ValueError for a value out of its range."""
    for name in ("max_steps", "batch_size", "grad_accum", "eval_every", "eval_windows", "save_every"):
        if getattr(o, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(o, name)}")
    for name in ("batch_size", "grad_accum", "eval_windows", "threads"):
        if getattr(o, name) > gpt.LARGEST:
            raise ValueError(f"{name} must be at most {gpt.LARGEST}, not {getattr(o, name)}")
    for name in ("warmup_steps", "weight_decay", "grad_clip", "threads", "seed"):
        if not 0 <= getattr(o, name) < math.inf:
            raise ValueError(f"{name} must be at least 0, not {getattr(o, name)}")
    if not 0 < o.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0, not {o.learning_rate}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(o, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(o, name)}")
    if o.resume and o.overwrite:
        raise ValueError("resume goes on with a run and overwrite replaces it: give one of them")
    if o.resume and o.init_from:
        raise ValueError("resume takes the run's own weights: leave init_from out")


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def choose_device(name="auto"):
    """torch.device for an option's text. Raises ValueError if this machine has no such device."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and not several else "cpu"
    if several and name not in ("cpu", "cuda"):
        raise ValueError(f"several processes train on cpu or cuda, where each takes a GPU of its own, not on {name}")
    if several and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not available here; leave --device out or use cpu") from error
    return device


def choose_dtype(name, device):
    """The autocast dtype: bfloat16 where the hardware multiplies it faster than float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:  # without bfloat16 instructions a CPU would convert back and forth
        fast = device.type == "cpu" and any(
            getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16


def utilisation(flops_per_second, device):
    """Model FLOPs utilisation of a known GPU in bfloat16 (PaLM, appendix B), otherwise None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
    return flops_per_second / peak if peak else None


def peak_memory(device):
    """Largest memory so far in bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def scheduler_times():
    """Seconds that this process's threads have run, and have waited for a core to run on; (0, 0) where Linux does not say."""
    ran = waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # a thread may have ended
            times = path.read_text().split()
            ran, waited = ran + int(times[0]), waited + int(times[1])
    return ran / 1e9, waited / 1e9


def crowded(ran, waited):
    """Whether threads that ran and waited for so many seconds had to share their cores. Sleeping, as for a disk, is neither.

    Alone on its core a training thread waited for 1 % of the time, beside one busy process for 50 %, beside two for 65 %.
    """
    return ran + waited > 10 and waited > 0.3 * (ran + waited)


class CrowdWatch:
    """Says once, in one line, that other programs or too many threads make the run slow."""

    def __init__(self):
        self.before, self.said = None, False

    def look(self):
        now = scheduler_times()
        if self.before is None:  # the first step warms up, and compiles
            self.before = now
        ran, waited = (b - a for a, b in zip(self.before, now))
        if crowded(ran, waited) and not self.said:
            threads = torch.get_num_threads()
            fewer = f", or give --threads {max(1, min(threads, os.cpu_count()) - 1)} instead of {threads}" if threads > 1 else ""
            print(f"slow: this run's threads spend {waited / (ran + waited):.0%} of their time waiting for one of the {os.cpu_count()} cores "
                  f"(load {os.getloadavg()[0]:.1f}): end other programs{fewer}", file=sys.stderr)  # fmt: skip
            self.said = True
        if ran + waited > 10:
            self.before = now


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: torchrun starts this program in each. Rank 0 speaks and writes; alone, a process is rank 0 of 1


def ranks():
    """(rank, world size) of this process; (0, 1) outside of torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


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
    """Find the others that torchrun started. Raises ValueError where it did not."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=10))
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")


def spread(model, parallel, device):
    """What to call in place of the model so that the ranks' gradients are averaged; fsdp divides `model` itself among them."""
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


def sync_gradients(run, last):
    """Let the next backward exchange gradients only if it is the step's last."""
    if hasattr(run, "set_requires_gradient_sync"):  # fsdp
        run.set_requires_gradient_sync(last)
    elif ranks()[1] > 1:
        run.require_backward_grad_sync = last


def whole(tensor):
    """A tensor that fsdp has divided, put together on the CPU (every rank must call); any other as it is."""
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor


def whole_state(model, optimizer):
    """(model's state, optimizer's state) on rank 0 as one process would have them. Every rank must call."""

    def collect(values):  # one tensor at a time: only rank 0 has to hold them all
        collected = {}
        for name, value in values.items():
            value = whole(value)
            if ranks()[0] == 0:
                collected[name] = value
        return collected

    state = optimizer.state_dict()
    return collect(model.state_dict()), {**state, "state": {i: collect(moments) for i, moments in state["state"].items()}}


def divided_state(state, optimizer):
    """The inverse for an optimizer's state: moments divided as fsdp has divided their parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def divide(value, p):
        if not hasattr(p, "full_tensor") or value.shape != p.shape:
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)

    moments = {i: {name: divide(value, parameters[i]) for name, value in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": moments}


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a step


def learning_rate(o, step):
    """The rate of update number `step`, counted from 0."""
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    if o.schedule == "constant":
        return o.learning_rate
    if o.schedule == "wsd":
        decay = max(1, o.max_steps // 5)
        return o.learning_rate * min(1.0, (o.max_steps - step) / decay)
    progress = (step - o.warmup_steps) / max(1, o.max_steps - o.warmup_steps)
    return o.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class SpikeCounter:
    """Counts steps whose loss stands 6 standard deviations above its running mean (both exponential, over about 50 steps)."""

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
    """Mean loss, nats per token, over windows (inputs, targets), each an int64 array (count, T), divided among the ranks."""
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


class Stop(Exception):
    """The run ends early: a message and an exit code."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------------------------------------------------------------
# A run


@contextlib.contextmanager
def run_lock(out):
    """Hold out/run.lock, so that no second process writes the run folder. Raises ValueError where another one holds it.

    The lock is the kernel's, not the file's existence: it ends with the process however that ends, so none is ever stale.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "run.lock", "a") as file:
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in {out}: wait for it, stop it, or give another --out_dir") from None
        except (ImportError, OSError):  # some network file systems have no locks either
            print(f"note: {out} cannot be locked here: start no second run in it", file=sys.stderr)
        yield


def holds_run(out):
    return (out / "config.json").exists() or (out / "checkpoint.pt").exists() or (out / "checkpoint.prev.pt").exists()


def open_run(o, given, held):
    """Check everything before any work: (options, config, dataset, checkpoint state or None). Raises ValueError or OSError.

    The run folder's lock is entered into `held`, a contextlib.ExitStack.
    """
    check_options(o)
    _, world_size = ranks()
    out = Path(o.out_dir or f"out/{o.preset}")
    state = None
    writes = int(os.environ.get("RANK", 0)) == 0  # under torchrun the first process writes, and locks, for all
    existing = holds_run(out)
    if writes and existing:
        held.enter_context(run_lock(out))
    if o.resume:
        model, state = load_checkpoint(out)
        if not isinstance(state.get("options"), dict) or "optimizer" not in state:
            raise ValueError(f"{out} holds weights without a training run to go on with: use --init_from {out}")
        saved = check_resumable(state, model, out)
        micro_batches = saved.grad_accum * state.get("world_size", 1)  # a step's, in all processes together
        if micro_batches % world_size:
            raise ValueError(f"a step of this run is {micro_batches} micro-batches, which {world_size} processes cannot share equally: start another number")
        saved.grad_accum = micro_batches // world_size
        for name in sorted(given - CHANGEABLE):
            if getattr(o, name) != getattr(saved, name):
                raise ValueError(f"this run has {name} {getattr(saved, name)}, not {getattr(o, name)}: leave it out to resume, or start another run")
        o = Options(**{**asdict(saved), **{name: getattr(o, name) for name in given & CHANGEABLE}, "resume": True, "overwrite": False})
    elif existing:
        if not o.overwrite:
            raise ValueError(f"{out} already holds a run: give --resume to go on with it, --overwrite to replace it, or another --out_dir")
    elif out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {"run.lock", "config.json.tmp"}):  # left by an early kill
        raise ValueError(f"{out} exists and is no run folder: give another --out_dir")
    o.out_dir = str(out)
    choose_device(o.device)

    shape = {name: getattr(o, name) for name in GPTConfig.__dataclass_fields__ if getattr(o, name, None) is not None}
    config = GPTConfig(vocab_size=256, **shape)  # the vocabulary comes with the data: check all the rest first
    if o.data_dir == DEFAULT_DATA and not Path(o.data_dir).exists() and not o.resume:  # a run that goes on has its data
        print(f"preparing the default data set in {o.data_dir}")
        prepare.prepare(source="python", out_dir=o.data_dir)
    dataset = open_dataset(o.data_dir)
    config.vocab_size = dataset.vocab_size
    if state is not None:
        if state["data"]["fingerprint"] != dataset.fingerprint:
            raise ValueError(f"{o.data_dir} is not the data set this run was trained on: give its own with --data_dir")
        config = GPTConfig(**state["config"])
    elif o.init_from:
        _, state = load_checkpoint(o.init_from)
        if "data" in state:
            check_data(state, o.init_from)
        else:  # a Hugging Face folder, whose window may be too long to train on: the option, or the preset, cuts it
            state["config"]["block_size"] = min(o.block_size, state["config"]["block_size"])
        for name in sorted(given & set(state["config"])):
            if getattr(o, name) != state["config"][name]:
                raise ValueError(f"{o.init_from} has {name} {state['config'][name]}, not {getattr(o, name)}: leave it out")
        if not same_tokenizer(o.init_from, state, dataset):
            raise ValueError(f"{o.data_dir} was made with another tokenizer than {o.init_from}: prepare it with that one")
        config = GPTConfig(**state["config"])
    WindowSampler(dataset.train, config.block_size)
    validation_windows(dataset.val, config.block_size, 1)
    if writes and not existing:
        held.enter_context(run_lock(out))
        if holds_run(out):  # since the look above
            raise ValueError(f"{out} holds a run that another process has just made: give another --out_dir")
    return o, config, dataset, state


def same_tokenizer(checkpoint, state, dataset):
    """Whether a data set's ids mean what they meant to a checkpoint."""
    if "data" in state:
        return state["data"]["tokenizer"] == dataset.meta["tokenizer"]["sha256"]
    folder = find_checkpoint(checkpoint).parent
    if dataset.vocab_size > state["config"]["vocab_size"] or not (folder / "tokenizer.json").exists():
        return dataset.vocab_size <= state["config"]["vocab_size"]  # all that can be known without a tokenizer
    return getattr(dataset.tokenizer, "content", None) == load_tokenizer(folder).content


def check_data(state, path):
    data = state.get("data")
    if not isinstance(data, dict) or not all(isinstance(data.get(name), str) for name in ("fingerprint", "tokenizer")):
        raise ValueError(f"{path} does not say which data it was trained on: its 'data' is malformed")


def check_resumable(state, model, path):
    """The Options saved in a checkpoint. Raises ValueError where what it holds beside the model could not be gone on with."""

    def need(condition, what):
        if not condition:
            raise ValueError(f"{path} cannot be resumed: its {what}")

    def is_tensor(value, dtype, shape):
        return isinstance(value, torch.Tensor) and value.dtype == dtype and value.shape == shape and value.is_contiguous()

    unknown = [str(name) for name in state["options"] if name not in Options.__dataclass_fields__]
    need(not unknown, f"options are not of this program: {', '.join(unknown)[:100]}")
    saved = Options(**state["options"])
    gpt.check_types(saved)
    for f in fields(Options):
        need(not f.metadata["choices"] or getattr(saved, f.name) in f.metadata["choices"], f"option {f.name} is none of {f.metadata['choices']}")
    check_options(replace(saved, resume=False, overwrite=False))
    check_data(state, path)
    need(type(state.get("world_size", 1)) is int and 0 < state.get("world_size", 1) < 2**20, "world_size is not a positive whole number")
    need(type(state.get("step")) is int and 0 < state["step"] < 2**62, "step is not a positive whole number")
    spikes, rng = state.get("spikes"), state.get("rng")
    need(isinstance(spikes, dict) and spikes.keys() == vars(SpikeCounter()).keys(), "'spikes' are malformed")
    need(all(type(value) in (int, float) and 0 <= value < 2**62 for value in spikes.values()), "'spikes' are out of range")
    need(isinstance(rng, dict) and is_tensor(rng.get("cpu"), torch.uint8, torch.get_rng_state().shape), "random state is malformed")
    try:
        torch.Generator().set_state(rng["cpu"])
    except RuntimeError:
        need(False, "random state is malformed")
    if torch.cuda.is_available() and rng.get("cuda") is not None:
        need(is_tensor(rng["cuda"], torch.uint8, torch.cuda.get_rng_state().shape), "random state of the GPU is malformed")
    parameters = [p for group in model.parameter_groups(0) for p in group["params"]]  # in the optimizer's order
    moments = state["optimizer"].get("state") if isinstance(state["optimizer"], dict) else None
    need(isinstance(moments, dict) and moments.keys() == set(range(len(parameters))), "optimizer has not the moments of every weight")
    for p, entry in zip(parameters, (moments[i] for i in range(len(parameters)))):
        need(isinstance(entry, dict) and entry.keys() == {"step", "exp_avg", "exp_avg_sq"}, "optimizer is not AdamW's")
        shapes = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        need(all(is_tensor(entry[name], torch.float32, shape) for name, shape in shapes.items()), "optimizer's moments have not the shapes of its weights")
    return saved


def train(o, config, dataset, state=None):
    """Train as the options say and return the model. `state` is the checkpoint to resume or to take weights from."""
    out = Path(o.out_dir)
    rank, world_size = ranks()
    device = choose_device(o.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = choose_dtype(o.dtype, device)
    if o.threads:
        torch.set_num_threads(o.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs for what autocast leaves in float32
    torch.manual_seed(o.seed)
    model = GPT(config).to(device)
    model.activation_checkpointing = o.activation_checkpointing
    if state is not None:
        model.load_state_dict(state["model"])
    spread_model = spread(model, o.parallel, device)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(o.weight_decay), lr=o.learning_rate, betas=(o.beta1, o.beta2), fused=device.type in ("cpu", "cuda")
    )
    step, spikes = 0, SpikeCounter()
    if o.resume:
        state["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]  # they follow from the options, not from a file
        optimizer.load_state_dict(divided_state(state["optimizer"], optimizer))
        step, spikes = state["step"], SpikeCounter(**state["spikes"])
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)
    first_step = step
    del state
    run = torch.compile(spread_model) if o.compile else spread_model
    sampler = WindowSampler(dataset.train, config.block_size, o.seed)
    windows = validation_windows(dataset.val, config.block_size, o.eval_windows)
    step_tokens = o.batch_size * o.grad_accum * world_size * config.block_size
    if rank == 0:
        prepare_folder(o, config, dataset, step)
    print(
        f"{config.attention} {'with' if config.head_norm else 'without'} head norm, {model.n_params():,} parameters, "
        f"{len(dataset.train):,} tokens of {dataset.meta['source']}, {o.max_steps} steps of {step_tokens:,} tokens\n"
        f"on {f'{world_size} processes ({o.parallel}), each ' if world_size > 1 else ''}{device}"
        f"{f' ({torch.get_num_threads()} threads)' if device.type == 'cpu' else ''} in {str(dtype)[6:]}, run folder {out}"
        + (f", resumed at step {step}" if step else "")
    )

    def save():
        rng = dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
        data = dict(fingerprint=dataset.fingerprint, tokenizer=dataset.meta["tokenizer"]["sha256"], bytes_per_token=dataset.meta["splits"]["val"]["bytes"] / len(dataset.val))
        weights, moments = whole_state(model, optimizer)
        if rank == 0:
            save_checkpoint(
                out, dict(model=weights, optimizer=moments, step=step, rng=rng, config=asdict(config),
                          options=asdict(o), world_size=world_size, data=data, spikes=vars(spikes))
            )  # fmt: skip

    def last_good():
        try:
            return f"the last good checkpoint is {gpt.find_checkpoint(out)}"
        except FileNotFoundError:
            return "no checkpoint was saved yet"

    signals, crowd = [], CrowdWatch()
    handlers = {s: signal.signal(s, lambda number, _: signals.append(number) if not signals else os._exit(128 + number)) for s in (signal.SIGINT, signal.SIGTERM)}
    model.train()
    began = shown = time.monotonic()
    try:
        with open(out / "metrics.jsonl" if rank == 0 else os.devnull, "a", buffering=1) as metrics:
            while step < o.max_steps:
                started = time.monotonic()
                if rank > 0:  # dropout: rank 0 goes on with its saved stream, the others' follow from (seed, rank, step)
                    torch.manual_seed(hash((o.seed, rank, step)))
                rate = learning_rate(o, step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = 0.0
                for micro_step in range(o.grad_accum):
                    x, y = sampler.batch(step, o.batch_size, rank=rank, world_size=world_size, micro_step=micro_step, grad_accum=o.grad_accum)
                    x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
                    sync_gradients(spread_model, last=micro_step == o.grad_accum - 1)
                    with autocast(device, dtype):
                        part = run(x, y)[1] / o.grad_accum
                    part.backward()
                    loss += part.item()
                loss = sum(gather(loss)) / world_size
                norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)).item()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise Stop(f"loss {loss} and gradient norm {norm} at step {step + 1}: stopped before the update; {last_good()}. "
                               "Try a lower --learning_rate or more --warmup_steps", 1)  # fmt: skip
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                seconds = max(time.monotonic() - started, 1e-9)  # a coarse clock may stand still
                line = dict(step=step, tokens=step * step_tokens, train_loss=loss, learning_rate=rate, grad_norm=norm,
                            tokens_per_second=round(step_tokens / seconds, 1), loss_spikes=spikes.update(loss))  # fmt: skip
                if (mfu := utilisation(config.flops_per_token() * step_tokens / world_size / seconds, device)) is not None:
                    line["mfu"] = round(mfu, 4)
                if step % o.eval_every == 0 or step == o.max_steps:
                    line["val_loss"] = evaluate(run, windows, o.batch_size, device, dtype)
                    line["val_bpb"] = dataset.bits_per_byte(line["val_loss"])
                    line["peak_memory"] = peak_memory(device)
                metrics.write(json.dumps(line) + "\n")
                if "val_loss" in line or step == first_step + 1 or time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    print_progress(line, o.max_steps, (shown - began) / (step - first_step))
                    if rank == 0:
                        crowd.look()
                stop = int(max(gather(signals[0] if signals else 0)))  # a signal may reach only one of the ranks
                if step % o.save_every == 0 or step == o.max_steps or stop:
                    save()
                if stop and step < o.max_steps:
                    raise Stop(f"stopped by {signal.Signals(stop).name} at step {step}, saved; go on with: {command()} --resume --out_dir {out}", 128 + stop)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if rank == 0:
        draw_losses(out)
    return model


def command():
    """How this program was started."""
    _, world_size = ranks()
    return "python train.py" if world_size == 1 else f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']} train.py"


def prepare_folder(o, config, dataset, step):
    """Make the run folder, or, resuming, cut its metrics back to the checkpoint's step."""
    out = Path(o.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / "metrics.jsonl"
    if step:
        kept = []
        for line in metrics.read_text(errors="replace").splitlines() if metrics.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # the last line may be half-written
                entry = json.loads(line)
                numbers = entry["step"], entry["tokens"], entry["train_loss"], entry.get("val_loss", 0.0)
                kept += [line] if entry["step"] <= step and all(type(number) in (int, float) for number in numbers) else []
        write_atomically(metrics, "".join(line + "\n" for line in kept))
    else:
        for name in ("checkpoint.prev.pt", "checkpoint.pt", "checkpoint.tmp", "metrics.jsonl", "loss.png"):
            (out / name).unlink(missing_ok=True)
    data = dict(folder=o.data_dir, fingerprint=dataset.fingerprint, tokenizer=dataset.meta["tokenizer"]["name"])
    content = dict(format=gpt.FORMAT, model=asdict(config), options=asdict(o), world_size=ranks()[1], data=data, torch=torch.__version__)
    write_atomically(out / "config.json", json.dumps(content, indent=2) + "\n")  # first: from here on the folder is a run's
    if not step:
        dataset.tokenizer.save(out)


def write_atomically(path, text):
    new = path.with_name(path.name + ".tmp")
    new.write_text(text)
    os.replace(new, path)


def print_progress(line, max_steps, seconds_per_step):
    left = round(seconds_per_step * (max_steps - line["step"]))
    text = f"step {line['step']:>5}/{max_steps}  loss {line['train_loss']:.3f}  "
    if "val_loss" in line:
        text += f"val {line['val_loss']:.4f} ({line['val_bpb']:.4f} bits per byte)  peak {line['peak_memory'] / 2**20:,.0f} MiB  "
    if "mfu" in line:
        text += f"MFU {line['mfu']:.1%}  "
    if line["loss_spikes"]:
        text += f"{line['loss_spikes']} spikes  "
    print(f"{text}{line['tokens_per_second']:,.0f} tokens/s  ETA {left // 60}:{left % 60:02d}", flush=True)


def draw_losses(out):
    """loss.png from metrics.jsonl, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "val_loss" in line]
    if not evaluated:
        return
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([line["tokens"] / 1e6 for line in lines], [line["train_loss"] for line in lines], lw=0.7, color="#9bb7d4", label="training")
    axes.plot([line["tokens"] / 1e6 for line in evaluated], [line["val_loss"] for line in evaluated], "o-", ms=4, color="#c44e52", label="validation")
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", title=f"{out.name}: validation {evaluated[-1]['val_loss']:.4f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
    plt.close(figure)


def main(argv=None):
    began = time.monotonic()
    options, given = parse_options(Options, argv, PRESETS)
    with contextlib.ExitStack() as held:
        try:
            join_processes()
            rank, world_size = ranks()
            if rank > 0:
                gather(0)  # rank 0 looks first: it may have data to prepare, and one message about a mistake is enough
            options, config, dataset, state = open_run(options, given, held)
            if rank == 0:
                gather(0)
            gather(0)  # nobody writes before all have looked
            model = train(options, config, dataset, state)
        except Stop as stop:
            if rank == 0:
                print(f"\n{stop}", file=sys.stderr)
            gather(0)  # torchrun ends the others when one leaves: let rank 0 finish
            raise SystemExit(stop.code)
        except (ValueError, OSError) as error:
            gpt.fail(error)
        except RuntimeError as error:
            if ranks()[1] == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            print(f"\nrank {ranks()[0]} lost another process of this run; go on from the last checkpoint with: "
                  f"{command()} --resume --out_dir {options.out_dir}", file=sys.stderr)  # fmt: skip
            raise SystemExit(1)
    if world_size > 1:
        dist.destroy_process_group()
        if rank > 0:
            return
        model = load_checkpoint(options.out_dir, choose_device(options.device))[0]  # fsdp has only a part of it here
    tokenizer, out = dataset.tokenizer, options.out_dir
    prompt = "def" if dataset.meta["source"] == "python" else "The"  # no space behind it: tokens begin with their space
    new = model.eval().generate([tokenizer.encode(prompt)], min(120, 2 * config.block_size), temperature=0.8, top_k=50, seed=options.seed)[0]
    print(f"\nA sample:\n\n{prompt}{tokenizer.decode(new)}\n")
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(f"Done in {minutes} min {seconds} s. Try next:")
    print(f'  python sample.py --checkpoint {out} --prompt "{prompt}" --num_samples 3')
    others = [name for name in gpt.ATTENTION if name != config.attention]
    print(f"  python train.py --preset {options.preset} --attention {others[0]} --out_dir out/{options.preset}-{others[0]}    # or {', '.join(others[1:])}")
    print(f"  python train.py --resume --max_steps {2 * options.max_steps} --out_dir {out}    # go on for as long again")


if __name__ == "__main__":
    main()
