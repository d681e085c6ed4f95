"""Downstream tasks, the paper's table 1, for checkpoints side by side; through EleutherAI's harness: `pip install lm-eval`.

    python experiments/evaluate.py --checkpoints out/small,out/small-kv0.5
    python experiments/evaluate.py --checkpoints out/small --tasks mine --include_path FOLDER

A checkpoint is what sample.py takes: a run folder, a compressed one, a file in one, or a Hugging Face folder. The harness downloads
the data of its tasks once. Without a network, FOLDER holds tasks as YAML files and their questions as JSON lines, e.g.

    task: mine
    dataset_path: json
    dataset_kwargs: {data_files: {validation: /path/to/mine.jsonl}}
    validation_split: validation
    output_type: multiple_choice
    doc_to_text: "{{question}}"       # fields of a line of mine.jsonl
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{answer}}"       # the index of the right choice

lm-eval is large and only this program needs it, so it is in no requirements file. The arithmetic, from tokens to log-likelihoods,
is in plain functions at the top that do not need it. Read sample.py first.
"""

import importlib.util
import json
import logging
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"} | os.environ  # before torch: see train.py

ROOT = Path(__file__).resolve().parent.parent
# Not the folder of this file, which Python puts first: the harness imports another `evaluate`, Hugging Face's.
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "experiments")]

import torch

from model import fail, option, parse_options
from sample import TextStream, open_model
from train import choose_device, write_atomically

# ---- log-likelihoods --------------------------------------------------------------------------------------------------------


def encode_pair(tokenizer, context, continuation, start=()):
    """(context ids, continuation ids), the context never empty: it begins with `start`, or an empty one is the end-of-text token.

    Context and continuation are encoded together, as the model met them in training, and cut where the context's own encoding
    ends, after its trailing spaces are given to the continuation: the harness's convention, so figures compare with others'.
    A token that reaches over the cut counts as continuation if it is all there is: a continuation is never scored as nothing.
    """
    whole = tokenizer.encode(context + continuation)
    cut = min(len(tokenizer.encode(context.rstrip())), max(0, len(whole) - 1))
    return [*start, *whole[:cut]] or [tokenizer.end_of_text], whole[cut:]


def windows(context, continuation, block_size):
    """The (inputs, targets) that score every id of the continuation once; the targets are the last of the inputs' next ids.

    One window if the continuation fits, with as much of the context's end as fits; otherwise disjoint ones of block_size targets,
    each with the token before it, the last one with all the context that fits.
    """
    ids = [*context, *continuation]
    for first in range(0, len(continuation), block_size):
        targets = continuation[first : first + block_size]
        end = len(context) + first + len(targets)
        yield ids[max(0, end - block_size - 1) : end - 1], targets


@torch.inference_mode()
def score(model, rows, batch_size, report=lambda done, total: None):
    """[(log-likelihood in nats, whether every target is the likeliest token)] of (inputs, targets) rows, in their order.

    The longest rows come first, so that too little memory shows at once; a batch is padded on the right, where causality hides
    the padding. Raises ValueError for logits that are not finite.
    """
    device, results = model.embed_tokens.weight.device, [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        longest = len(rows[batch[0]][0])
        x = model.hidden(torch.tensor([rows[row][0] + [0] * (longest - len(rows[row][0])) for row in batch], device=device))  # (B, T, C)
        x = torch.cat([x[i, len(rows[row][0]) - len(rows[row][1]) : len(rows[row][0])] for i, row in enumerate(batch)])  # (N, C): what has a target
        targets = torch.tensor([target for row in batch for target in rows[row][1]], device=device)
        scores, greedy = [], []
        for part, wanted in zip(x.split(1024), targets.split(1024)):  # never all logits (N, V) at once
            logits = model.lm_head(part).float()
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its weights are damaged, or training had diverged")
            scores.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].double())
            greedy.append(logits.argmax(-1) == wanted)
        lengths = [len(rows[row][1]) for row in batch]
        for row, logs, hits in zip(batch, torch.cat(scores).split(lengths), torch.cat(greedy).split(lengths)):
            results[row] = logs.sum().item(), hits.all().item()
        report(first + len(batch), len(order))
    return results


class Scorer:
    """A model and its tokenizer behind the three questions that the harness asks, on plain strings. All raise ValueError."""

    def __init__(self, model, tokenizer, start=(), stop=None, batch_size=16, report=lambda done, total: None):
        self.model, self.tokenizer, self.start, self.batch_size, self.report = model, tokenizer, tuple(start), batch_size, report
        self.stop = {tokenizer.end_of_text} if stop is None else stop

    def loglikelihood(self, pairs):
        """[(log p(continuation | context), is greedy)] of (context, continuation) pairs."""
        return self._sums([encode_pair(self.tokenizer, context, continuation, self.start) for context, continuation in pairs])

    def loglikelihood_rolling(self, texts):
        """[log p(text)], of whole texts of any length, from the start of a document."""
        return [total for total, _ in self._sums([encode_pair(self.tokenizer, "", text, self.start) for text in texts])]

    def _sums(self, pairs):
        cut = [list(windows(*pair, self.model.config.block_size)) for pair in pairs]
        scores = iter(score(self.model, [row for rows in cut for row in rows], self.batch_size, self.report))
        parts = [[next(scores) for _ in rows] for rows in cut]
        return [(sum((total for total, _ in part), 0.0), all(greedy for _, greedy in part)) for part in parts]

    def generate_until(self, requests):
        """The text that follows each context, up to the first of the strings in `until`: requests are (context, settings).

        Settings: until, max_gen_toks (256; or max_new_tokens, max_tokens), temperature (0), do_sample, top_k, top_p. A context
        that leaves no room for max_gen_toks is cut from the left, to half the block size at most.
        """
        results, order = [None] * len(requests), {}
        for i, (context, settings) in enumerate(requests):  # only equal settings share a batch
            ids = [*self.start, *self.tokenizer.encode(context)] or [self.tokenizer.end_of_text]
            order.setdefault(json.dumps(sampling(settings)), []).append((ids, i))
        done, limit = 0, self.model.config.block_size
        for key, group in order.items():
            settings = json.loads(key)
            until, room = settings.pop("until"), max(limit - settings["max_new_tokens"], limit // 2, 1)
            group.sort(key=lambda request: -len(request[0]))
            for first in range(0, len(group), self.batch_size):
                batch = group[first : first + self.batch_size]
                contexts = [ids[-room:] for ids, _ in batch]
                for (_, i), context, new in zip(batch, contexts, self.model.generate(contexts, **settings, seed=first, stop_tokens=self.stop)):
                    stream = TextStream(self.tokenizer, context)
                    text = "".join(map(stream.add, new)) + stream.rest()
                    results[i] = text[: min((text.find(end) for end in until if end in text), default=len(text))]
                done += len(batch)
                self.report(done, len(requests))
        return results


def sampling(settings):
    """The harness's generation settings as arguments of `GPT.generate`, and `until`, a list. Raises ValueError for one that is not known."""
    lengths = ("max_gen_toks", "max_new_tokens", "max_tokens")
    if unknown := settings.keys() - {"until", "temperature", "do_sample", "top_k", "top_p", *lengths}:
        raise ValueError(f"generation setting {sorted(unknown)[0]!r} of a task is not implemented: leave it out of its YAML file")
    until, sample = settings.get("until") or [], settings.get("do_sample")
    return dict(
        until=[end for end in ([until] if isinstance(until, str) else until) if end],
        max_new_tokens=int(next((settings[name] for name in lengths if name in settings), 256)),
        temperature=0.0 if sample is False else float(settings.get("temperature", 1.0 if sample else 0.0)),
        top_k=settings.get("top_k") or None, top_p=settings.get("top_p"),
    )  # fmt: skip


# ---- the harness ------------------------------------------------------------------------------------------------------------


def as_lm(scorer):
    """A `Scorer` as lm_eval.api.model.LM, which lm_eval.simple_evaluate takes. Raises ImportError without lm-eval."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        def loglikelihood(self, requests):
            return scorer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return scorer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests):
            return scorer.generate_until([request.args for request in requests])

    return Adapter()


NAMES = dict(piqa="PIQA", openbookqa="OBQA", winogrande="WinoGrande", hellaswag="HellaSwag", arc_easy="ARC-e", arc_challenge="ARC-c")


def load_tasks(names, include_path=None):
    """The harness's tasks of these names, data and all. Raises ValueError, naming the first that is unknown or out of reach."""
    from lm_eval.tasks import TaskManager

    manager, tasks = TaskManager(include_path=include_path), {}
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"no task {name!r}: lm-eval has none of that name" + (f", and {include_path} neither" if include_path else ""))
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # whatever the network, a data set's own code or a YAML file came to
            raise ValueError(
                f"task {name} cannot be loaded ({type(error).__name__}: {str(error)[:200]}); without a network, its data has to be local: "
                f"--include_path FOLDER with a YAML file of a task over JSON lines (dataset_path: json), as --help shows"
            ) from error
    return list(tasks.values())


def run_tasks(scorer, tasks, limit=None, num_fewshot=None):
    """{task: {metric: (value, standard error or None)}} of one model."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(as_lm(scorer), tasks=tasks, limit=limit, num_fewshot=num_fewshot, log_samples=False)["results"]
    table = {}
    for name, values in results.items():
        numbers = {key: value for key, value in values.items() if isinstance(value, float) and "_stderr" not in key}
        error = lambda key: values.get("{}_stderr,{}".format(*key.split(",", 1)))
        table[name] = {key.removesuffix(",none"): (value, error(key) if isinstance(error(key), float) else None) for key, value in numbers.items()}
    return table


def average(table):
    """Mean accuracy over the tasks that have one, and its standard error (sum_i e_i^2)^0.5 / n: tasks are independent. Or None."""
    scores = [metrics["acc"] for metrics in table.values() if "acc" in metrics]
    errors = [error for _, error in scores]
    if not scores:
        return None
    return sum(value for value, _ in scores) / len(scores), None if None in errors else math.hypot(*errors) / len(scores)


def markdown(results):
    """Table 1's layout: a row per checkpoint, accuracy in %. A task without accuracy shows its first metric, as it is."""
    first = next(iter(results.values()))
    tasks = list(first)
    metric = {task: "acc" if all("acc" in table[task] for table in results.values()) else next(iter(first[task]), None) for task in tasks}
    shown = lambda pair, scale=1: "" if pair is None else f"{scale * pair[0]:.2f}" + ("" if pair[1] is None else f" ± {scale * pair[1]:.2f}")
    heads = [NAMES.get(task, task) + ("" if metric[task] == "acc" else f" ({metric[task]})") for task in tasks]
    lines = [f"| | {' | '.join(heads)} | average |", "|---" * (len(tasks) + 2) + "|"]
    for checkpoint, table in results.items():
        cells = [shown(table[task].get(metric[task]), 100 if metric[task] == "acc" else 1) for task in tasks]
        lines.append(f"| {checkpoint} | {' | '.join(cells)} | {shown(average(table), 100)} |")
    return "\n".join(lines)


@dataclass
class Options:
    checkpoints: str = option("out/small", "run folders, checkpoint files or Hugging Face folders, with commas between them")
    tasks: str = option(",".join(NAMES), "names of lm-eval's or your own tasks, with commas between them")
    include_path: str = option("", "folder of your own tasks (YAML files)")
    out: str = option("experiments/results/tasks.json", "file of all metrics, written when all is done")
    limit: int | None = option(None, "questions of each task (default: all)")
    num_fewshot: int | None = option(None, "solved questions before each (default: the task's own, mostly 0)")
    batch_size: int = option(16, "rows at a time")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    threads: int = option(0, "CPU threads (0: as many as cores)")


class Progress:
    """A line on standard error, at most every ten seconds."""

    def __init__(self, name):
        self.name, self.began, self.said = name, time.monotonic(), time.monotonic()

    def __call__(self, done, total):
        if (now := time.monotonic()) - self.said > 10:
            self.said = now
            print(f"{self.name}: {done}/{total}, ETA {(now - self.began) / done * (total - done) / 60:.0f} min", file=sys.stderr)


def main(argv=None):
    o, _ = parse_options(Options, argv)
    paths, names = (list(dict.fromkeys(part for part in text.split(",") if part)) for text in (o.checkpoints, o.tasks))
    out = Path(o.out)
    try:
        for name, least in (("batch_size", 1), ("limit", 1), ("num_fewshot", 0), ("threads", 0)):
            if getattr(o, name) is not None and getattr(o, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(o, name)}")
        if not paths or not names:
            raise ValueError("give at least one checkpoint and one task")
        if o.include_path and not Path(o.include_path).is_dir():
            raise ValueError(f"include_path {o.include_path} is not a folder")
        if out.is_dir():
            raise ValueError(f"out {out} is a folder: name a file")
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("evaluating on tasks needs lm-eval: pip install lm-eval")
        out.parent.mkdir(parents=True, exist_ok=True)
        device = choose_device(o.device)
        if o.threads:
            torch.set_num_threads(o.threads)
        for path in paths:  # all of them before any work, and one in memory at a time
            open_model(path, device)
        for library in ("lm_eval", "datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)
        tasks = load_tasks(names, o.include_path or None)
        results = {}
        for path in paths:
            model, tokenizer, start, stop = open_model(path, device)
            results[path] = run_tasks(Scorer(model, tokenizer, start, stop, o.batch_size, Progress(path)), tasks, o.limit, o.num_fewshot)
            print(f"{path} is done", file=sys.stderr)
        machine = f"{platform.machine()}, {device.type}, Python {platform.python_version()}"
        report = dict(command="python experiments/evaluate.py " + " ".join(sys.argv[1:] if argv is None else argv), machine=machine, options=asdict(o),
                      results=results, average={path: average(table) for path, table in results.items()})  # fmt: skip
        write_atomically(out, json.dumps(report, indent=1) + "\n")
    except (ValueError, OSError) as error:
        fail(error)
    print(markdown(results))


if __name__ == "__main__":
    main()
