"""A run folder: begun, gone on with, checked and described. Everything is checked here before any work begins.

It holds checkpoint.pt and checkpoint.prev.pt, config.json, tokenizer.json, metrics.jsonl (a line a step) and, with
matplotlib, loss.png; run.lock keeps a second process out. Read `train.py`, whose loop writes it, and come back.
"""

from options import choose_device, save_picture, say, shown_command, split_list, write_atomically

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # torch brings it

from attention import ATTENTION
from checkpoint import FORMAT, find_checkpoint, known_settings, load_checkpoint
from data import prepare
from data.texts import Texts
from data.tokenizer import load_tokenizer
from distributed import ranks
from functional import set_kernel
from model import GPT, GPTConfig, build_config

DEFAULT_DATA = "data/python"
PROGRAMS = {"train": ["train.py"], "sample": ["sample.py"]}  # as the commands to try next name them
# What --resume may change: the rest would make it another run.
CHANGEABLE = {"resume", "overwrite", "out_dir", "data_dir", "eval_data", "teacher", "max_steps", "eval_every"}
CHANGEABLE |= {"save_every", "log", "device", "kernel", "parallel", "activation_checkpointing", "compile", "threads"}
# What --init_from may change; attention only from mha to mea, which starts as the same function.
REFITTED = {"dropout", "block_size", "attention", "head_norm", "compose", "mea_form"}


def learning_rate(o, step):
    """The rate of update number `step`, counted from 0: linear warm-up, then what o.schedule says."""
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    if o.schedule == "constant":
        return o.learning_rate
    if o.schedule == "wsd":
        return o.learning_rate * min(1.0, (o.max_steps - step) / max(1, o.max_steps // 5))
    progress = (step - o.warmup_steps) / max(1, o.max_steps - o.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return o.learning_rate * (o.final_rate + (1 - o.final_rate) * cosine)


# ---------------------------------------------------------------------------------------------------------------------
# Begun, or gone on with


@contextlib.contextmanager
def lock_run(o):
    """Hold the run folder. Raises ValueError if another process does, or if it holds a run and neither --resume nor
    --overwrite is given.

    The lock is the kernel's: it ends with the process however that ends. A new run that fails before its first step
    leaves no folder behind.
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
        try:
            yield
        except Exception:
            metrics = out / "metrics.jsonl"
            if not (out / "checkpoint.pt").exists() and not (metrics.exists() and metrics.stat().st_size):
                with contextlib.suppress(OSError):  # somebody's own files may be there
                    for name in ("config.json", "tokenizer.json", "metrics.jsonl", "run.lock"):
                        (out / name).unlink(missing_ok=True)
                    out.rmdir()
            raise


def open_run(o, given):
    """(options, config, texts, checkpoint state or None, teacher or None) of a run that can begin.

    Raises ValueError or OSError.
    """
    if o.resume and (o.overwrite or o.init_from):
        other = "overwrite replaces it" if o.overwrite else "init_from begins another"
        raise ValueError(f"resume goes on with a run and {other}: give one of them")
    if o.preset == "heal" and not (o.init_from or o.resume):
        raise ValueError("preset heal goes on from a model: say which with --init_from")
    out, state = Path(o.out_dir or f"out/{o.preset}"), None
    if o.resume:
        state = load_checkpoint(out)[1]
        o = resumed_options(o, given, state, out)
    o.out_dir = str(out)
    if o.log != "none" and not importlib.util.find_spec(o.log):
        raise ValueError(f"log {o.log} needs a package: pip install {o.log}")
    device = choose_device(o.device)
    set_kernel(o.kernel)
    config = build_config(o)  # the vocabulary comes with the data: all the rest is checked first
    if o.init_from:
        state = state or load_checkpoint(o.init_from)[1]
    if o.data_dir == DEFAULT_DATA and not Path(o.data_dir).exists() and not o.resume:  # a run that goes on has its data
        say(f"preparing the default data set in {o.data_dir}")
        prepare.prepare(source="python", out_dir=o.data_dir)
    try:
        texts = Texts(o.data_dir, o.eval_data)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; if it lies elsewhere, say where with --data_dir") from None
    config.vocab_size = texts.vocab_size
    if o.resume:
        if state["data"]["fingerprint"] != texts.fingerprint:
            raise ValueError(f"{o.data_dir} is not the data set this run was trained on: give its own with --data_dir")
        config = GPTConfig(**state["config"])
    elif o.init_from:
        config = initial_config(o, given, state)
        check_tokenizer(o.init_from, state, texts)
    o.window = o.window or min(o.block_size, config.block_size)
    if o.window > config.block_size:
        raise ValueError(f"window must be at most the model's block_size {config.block_size}, not {o.window}")
    texts.check_length(o.window)
    for name, value in asdict(config).items():  # the record shows the model's real shape, not the preset's
        setattr(o, name, value)
    with torch.device("meta"):
        freeze_parameters(GPT(config), o)
    return o, config, texts, state, open_teacher(o, config, texts, state, device)


def resumed_options(o, given, state, out):
    """The options to go on with: the run's own, with what --resume may change. Raises ValueError."""
    if lacking := {"optimizer", "options", "step", "rng", "data"} - set(state):
        why = f"weights without a training run to go on with ({min(lacking)})"
        raise ValueError(f"{out} holds {why}: use --init_from {out}")
    settings = known_settings(type(o), state["options"])
    if unknown := sorted(set(settings) - {f.name for f in fields(o)}):
        raise ValueError(f"{out} cannot be resumed: this program has no option {unknown[0]}")
    saved = type(o)(**settings)
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
    o, step = type(o)(**{**asdict(saved), **changes}), state["step"]
    if o.max_steps < step:
        raise ValueError(f"this run has done {step} steps: max_steps must be at least as many, not {o.max_steps}")
    last, planned, now = learning_rate(saved, step - 1), learning_rate(saved, step), learning_rate(o, step)
    if now > 1.001 * max(last, planned):
        ended = "had ended" if step >= saved.max_steps else "was ending"
        again = f"over {o.max_steps} steps the learning rate goes up again, from {last:.2g} to {now:.2g}"
        say(f"note: this run's {saved.schedule} schedule {ended}; {again}")
    return o


def initial_config(o, given, state):
    """The config of a run that starts from weights: theirs, with what may be changed. Raises ValueError."""
    config = dict(state["config"])
    for name in sorted(given & set(config)):
        mine, theirs = getattr(o, name), config[name]
        longer = name == "block_size" and mine > state["config"][name]
        other = name == "attention" and (theirs, mine) != ("mha", "mea")
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


def freeze_parameters(model, o):
    """Freeze all parameters but those that --train_only and --freeze leave to train. Raises ValueError.

    Both are parts of parameters' names, with commas between them: `--train_only self_attn`, `--freeze k_proj,v_proj`.
    """
    names = [name for name, _ in model.named_parameters()]
    only, frozen = split_list(o.train_only), split_list(o.freeze)
    for part in (*only, *frozen):
        if not any(part in name for name in names):
            raise ValueError(f"no parameter has {part!r} in its name: there are {names[0]}, {names[1]}, ..")
    for name, parameter in model.named_parameters():
        chosen = not only or any(part in name for part in only)
        parameter.requires_grad_(chosen and not any(part in name for part in frozen))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("train_only and freeze leave nothing to train: name less")


# ---------------------------------------------------------------------------------------------------------------------
# Checked


def check_tokenizer(checkpoint, state, texts):
    """Raise ValueError unless the ids of the texts mean what they mean to a checkpoint."""
    if not same_tokenizer(checkpoint, state, texts):
        how = f"prepare it with that one (data/prepare.py --tokenizer {checkpoint})"
        raise ValueError(f"{texts.folders[0]} was made with another tokenizer than {checkpoint}: {how}")


def same_tokenizer(checkpoint, state, dataset):
    """Whether a data set's ids mean what they meant to a checkpoint."""
    if "data" in state:
        return state["data"]["tokenizer"] == dataset.meta["tokenizer"]["sha256"]
    folder = find_checkpoint(checkpoint).parent
    fits = dataset.vocab_size <= state["config"]["vocab_size"]
    if not fits or not (folder / "tokenizer.json").exists():
        return fits  # all that can be known without a tokenizer
    return getattr(dataset.tokenizer, "content", None) == load_tokenizer(folder).content


def open_teacher(o, config, texts, state, device):
    """The model whose predictions are the targets, or None. Raises ValueError for one that does not fit the run."""
    if not o.teacher:
        return None
    teacher, theirs = load_checkpoint(o.teacher, device)
    check_tokenizer(o.teacher, theirs, texts)
    if (size := teacher.config.vocab_size) != config.vocab_size:
        raise ValueError(f"the teacher {o.teacher} has vocab_size {size}, where {config.vocab_size} is needed")
    if (size := teacher.config.block_size) < o.window:
        raise ValueError(f"the teacher {o.teacher} has block_size {size}, where at least {o.window} is needed")
    if o.resume and fingerprint(teacher) != state["teacher"]:
        raise ValueError(f"{o.teacher} is not the teacher that this run began with: give its own with --teacher")
    return teacher.requires_grad_(False)


def fingerprint(model):
    """Sixteen hexadecimal digits that follow from a model's weights."""
    digest = hashlib.sha256()
    for name, w in model.state_dict().items():
        digest.update(name.encode() + w.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Described


def describe_run(o, config, texts, model, device, dtype, step_tokens, step):
    """Lines that say what is going to be trained, on what, and where."""
    _, world_size = ranks()
    trained, parameters = sum(p.numel() for p in model.parameters() if p.requires_grad), model.n_params()
    text = f"{config.attention} {'with' if config.head_norm else 'without'} head norm, {parameters:,} parameters, "
    text += f"of which {trained:,} are trained, " if trained < parameters else ""
    text += f"{texts.tokens:,} tokens of {texts.source}, {o.max_steps} steps of {step_tokens:,} tokens\n"
    text += f"towards the predictions of {o.teacher}, losses are KL divergences from them\n" if o.teacher else ""
    text += f"on {world_size} processes ({o.parallel}), each " if world_size > 1 else "on "
    text += f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
    return f"{text} in {str(dtype)[6:]}, run folder {o.out_dir}" + (f", resumed at step {step}" if step else "")


def describe_data(texts):
    """What a checkpoint says of its data."""
    return dict(fingerprint=texts.fingerprint, tokenizer=texts.meta["tokenizer"]["sha256"])


def last_good(out):
    try:
        return f"the last good checkpoint is {find_checkpoint(out)}"
    except FileNotFoundError:
        return "no checkpoint was saved yet"


def train_command(*options):
    """How this program was started, with other options: a line to paste."""
    start = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")] if ranks()[1] > 1 else ["python"]
    return shown_command(*start, *PROGRAMS["train"], *options)


def prepare_folder(o, config, texts, step):
    """Make the run folder, or empty it of an earlier run; resuming, cut its metrics back to the checkpoint's step."""
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
    data = dict(folder=o.data_dir, fingerprint=texts.fingerprint, tokenizer=texts.meta["tokenizer"]["name"])
    content = dict(format=FORMAT, model=asdict(config), options=asdict(o), world_size=ranks()[1], data=data)
    text = json.dumps(content | dict(torch=torch.__version__), indent=2) + "\n"
    write_atomically(out / "config.json", text)  # first: from here on the folder is a run's
    if not step:
        texts.tokenizer.save(out)


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
    shown = f"KL {line['train_kl']:.4f}" if "train_kl" in line else f"loss {line['train_loss']:.3f}"
    text = f"step {line['step']:>5}/{max_steps}  {shown}  "
    if "val_loss" in line:
        text += f"val {line['val_loss']:.4f} ({line['val_bpb']:.4f} bits per byte)  "
        each = [f"{key.removeprefix('val_loss/')} {value:.4f}" for key, value in line.items() if "val_loss/" in key]
        text += f"({', '.join(each)})  " if each else ""
        text += f"peak {line['peak_memory'] / 2**20:,.0f} MiB  " if "peak_memory" in line else ""
    if "mfu" in line:
        text += f"MFU {line['mfu']:.1%}  "
    say(f"{text}{line['tokens_per_second']:,.0f} tokens/s  ETA {left // 60}:{left % 60:02d}")


def draw_losses(plt, out):
    """The losses of a run's metrics.jsonl against training tokens; a KL divergence, which is none, on an axis below."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated, distilled = [line for line in lines if "val_loss" in line], "train_kl" in lines[0]
    figure, axes = plt.subplots(1 + distilled, figsize=(7, 4 + 2 * distilled), sharex=True, layout="constrained")
    panels = list(axes) if distilled else [axes, axes]
    texts = [name for name in (evaluated or [{}])[-1] if name.startswith("val_loss/")] or ["val_loss"]
    train = "train_kl" if distilled else "train_loss"
    for panel, name, style in [(panels[1], train, "-"), *((panels[0], name, "o-") for name in texts)]:
        found = [line for line in lines if name in line]  # a resumed run may have been given more eval_data
        panel.plot([line["tokens"] / 1e6 for line in found], [line[name] for line in found], style, label=name, lw=0.8)
    title = out.name + (f": validation {evaluated[-1]['val_loss']:.4f}" if evaluated else "")
    panels[0].set(ylabel="loss (nats per token)", title=title)
    if distilled:
        panels[1].set(ylabel="KL to the teacher (nats)", yscale="log")
    panels[1].set(xlabel="training tokens (millions)")
    for panel in {*panels}:
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


def show_end(o, texts, model, began, start=()):
    """A sample of the trained model, the picture of its losses, and commands to try next."""
    prompt = "def" if texts.meta["source"] == "python" else "The"  # no space behind it: tokens begin with their space
    how = dict(temperature=0.8, top_k=50, seed=o.seed, keep=len(start))
    new_tokens = min(120, 2 * model.config.block_size)
    new = model.eval().generate([[*start, *texts.tokenizer.encode(prompt)]], new_tokens, **how)[0]
    say(f"\nA sample:\n\n{prompt}{texts.tokenizer.decode(new)}\n")
    picture = save_picture(Path(o.out_dir) / "loss.png", lambda plt: draw_losses(plt, Path(o.out_dir)))
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    say(f"Done in {minutes} min {seconds} s; {picture}. Try next:")
    sample = ["--checkpoint", o.out_dir, "--prompt", prompt, "--num_samples", "3"]
    say(f"  {shown_command('python', *PROGRAMS['sample'], *sample)}")
    if not o.init_from:
        other, *others = [name for name in ATTENTION if name != model.config.attention]
        data = [] if o.data_dir == DEFAULT_DATA else ["--data_dir", o.data_dir]
        again = ["--preset", o.preset, "--attention", other, *data, "--out_dir", f"out/{o.preset}-{other}"]
        say(f"  {shown_command('python', *PROGRAMS['train'], *again)}    # or {', '.join(others)}")
    longer = ["--resume", "--max_steps", str(2 * o.max_steps), "--out_dir", o.out_dir]
    say(f"  {shown_command('python', *PROGRAMS['train'], *longer)}    # go on for as long again")
