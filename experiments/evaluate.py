"""Downstream tasks, the paper's table 1, for checkpoints side by side, through EleutherAI's harness.

    pip install lm-eval                                    # large, and only this program needs it
    python experiments/evaluate.py --checkpoints out/small,out/small-kv0.5
    python experiments/evaluate.py --checkpoints out/small --tasks mine --include_path FOLDER

A checkpoint is what sample.py takes: a run folder, a compressed one, a file in one, or a Hugging Face model. The
harness downloads the data of its tasks once. Without a network, FOLDER holds tasks as YAML files and their data as JSON
lines:

    task: mine
    dataset_path: json
    dataset_kwargs: {data_files: {validation: /path/to/mine.jsonl}}
    validation_split: validation
    output_type: multiple_choice
    doc_to_text: "{{question}}"       # fields of a line of mine.jsonl
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{answer}}"       # the index of the right choice

Read sample.py first.
"""

import json
import logging
import math
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Not the folder of this file, which Python puts first: the harness imports another `evaluate`, Hugging Face's.
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "experiments")]

from options import choose_device, fail, option, parse_options, run_program  # before torch
from options import split_list, write_atomically

import torch
from torch.nn.utils.rnn import pad_sequence

from experiments.report import command, machine, number, table
from sample import open_model

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:  # main says so in one line
    TemplateLM = object

SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # of a task's generation
NAMES = dict(piqa="PIQA", openbookqa="OBQA", winogrande="WinoGrande")  # of the paper's tasks, in its table
NAMES |= dict(hellaswag="HellaSwag", arc_easy="ARC-e", arc_challenge="ARC-c")


class Harness(TemplateLM):
    """A model as the harness asks it; the harness encodes contexts and continuations and makes the rolling windows.

    `start` begins every text, as Hugging Face models expect; where it is empty, a text without context follows the
    end-of-text token. Any of `end_tokens` ends a generated text. Raises ValueError for logits that are not finite.
    """

    def __init__(self, model, tokenizer, start=(), end_tokens=None, batch_size=16):
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.start, self.prefix = list(start), list(start) or [tokenizer.end_of_text]
        self.end_tokens = end_tokens or {tokenizer.end_of_text}
        self.max_length = model.config.block_size
        self._device = model.embed_tokens.weight.device

    @property
    def eot_token_id(self):
        return self.tokenizer.end_of_text

    @property
    def prefix_token_id(self):
        return self.prefix[-1]

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return [*([] if add_special_tokens is False else self.start), *self.tokenizer.encode(string)]

    def _encode_pair(self, context, continuation):
        context_ids, ids = super()._encode_pair(context, continuation)
        if not ids:  # one token reaches over the cut: a continuation is never scored as nothing
            *context_ids, last = self.tok_encode(context + continuation)
            context_ids, ids = context_ids or self.prefix, [last]
        return context_ids, ids

    def windows(self, context, continuation):
        """(context, targets) pairs that score each id of the continuation once: several where it outgrows the block."""
        if len(continuation) <= self.max_length:
            yield self.prefix if context == self.prefix[-1:] else context, continuation
        else:
            windows = get_rolling_token_windows(continuation, context[-1], self.max_length, context_len=1)
            yield from map(make_disjoint_window, windows)

    def batches(self, order, what, disable_tqdm):
        return tqdm([*order.get_batched(n=self.batch_size)], desc=what, mininterval=10, disable=disable_tqdm)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """[(log-likelihood in nats, whether each token is the likeliest)] of (strings, context ids, ids) requests."""
        rows = []  # (index of the request, inputs, targets); a context that is too long loses its beginning
        for index, (_, context, continuation) in enumerate(requests):
            for before, targets in self.windows(context, continuation):
                rows.append((index, (before + targets)[-self.max_length - 1 : -1], targets))
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        order = Collator(rows, sort_fn=lambda row: -len(row[1]))
        for batch in self.batches(order, "log-likelihoods", disable_tqdm):
            inputs = pad_sequence([torch.tensor(ids) for _, ids, _ in batch], batch_first=True)  # (B, T)
            hidden = self.model.hidden(inputs.to(self.device))  # (B, T, C); causality hides the padding on the right
            for (index, ids, targets), x in zip(batch, hidden):
                logits = self.model.lm_head(x[len(ids) - len(targets) : len(ids)]).float()  # (N, V)
                if not logits.isfinite().all():
                    raise ValueError("the model's logits are not finite: damaged weights, or training had diverged")
                wanted = torch.tensor(targets, device=self.device, dtype=torch.long)
                totals[index] += logits.log_softmax(-1).gather(-1, wanted[:, None]).double().sum().item()
                greedy[index] &= bool((logits.argmax(-1) == wanted).all())
        return list(zip(totals, greedy))

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[log p(text)] of whole texts of any length, from the start of a document."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        scores = self._loglikelihood_tokens([(None, self.prefix, ids) for ids in texts], disable_tqdm)
        return [total for total, _ in scores]

    def generate_until(self, requests, disable_tqdm=False):
        """The text that follows each context, up to the first of the task's `until` strings or an end token.

        A context that leaves no room for max_gen_toks is cut from the left, to half the block size at most.
        """
        texts, limit, longest = [], self.max_length, lambda request: -len(request[0])
        same = dict(group_by="gen_kwargs", group_fn=lambda request: request[1])  # only equal settings share a batch
        order = Collator([request.args for request in requests], sort_fn=longest, **same)
        for batch in self.batches(order, "generation", disable_tqdm):
            until, sampling = generation_settings(batch[0][1])
            kept = max(1, limit - sampling["max_new_tokens"], limit // 2) - len(self.start)
            contexts = [self.tok_encode(context, add_special_tokens=False)[-max(1, kept) :] for context, _ in batch]
            contexts = [[*self.start, *ids] or self.prefix for ids in contexts]
            new = self.model.generate(contexts, **sampling, seed=len(texts), stop_tokens=self.end_tokens)
            for context, ids in zip(contexts, new):  # decoded behind the context: SentencePiece spells a space by it
                before = context[-8:]
                text = self.tokenizer.decode(before + ids)[len(self.tokenizer.decode(before)) :]
                texts.append(postprocess_generated_text(text, until, think_end_token=None))
        return order.get_original(texts)


def generation_settings(settings):
    """(until strings, arguments of GPT.generate) of a task's settings. Raises ValueError for one that is not known."""
    known = normalize_gen_kwargs(settings)
    if unknown := known.keys() - SETTINGS:
        setting = f"a task's generation setting {min(unknown)!r}"
        raise ValueError(f"{setting} is not implemented: leave it out of its YAML file")
    return known["until"], dict(
        max_new_tokens=known["max_gen_toks"],
        temperature=float(known.get("temperature", 1.0 if known["do_sample"] else 0.0)),
        top_k=known.get("top_k") or None,
        top_p=known.get("top_p"),
    )


def load_tasks(names, include_path=None):
    """The harness's tasks of these names, data and all. Raises ValueError, naming the first that is out of reach."""
    manager, tasks = TaskManager(include_path=include_path), {}
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"no task {name!r}: neither lm-eval nor --include_path has one of that name")
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # whatever the network, a data set's own code or a YAML file came to
            how = "without a network, its data has to be local: --include_path FOLDER with a YAML file of a task over"
            how += " JSON lines (dataset_path: json), as --help shows"
            raise ValueError(
                f"task {name} cannot be loaded ({type(error).__name__}: {str(error)[:200]}); {how}"
            ) from error
    return list(tasks.values())


def run_tasks(harness, tasks, limit=None, num_fewshot=None):
    """{task: {metric: (value, standard error or None)}} of one model."""
    results = simple_evaluate(harness, tasks=tasks, limit=limit, num_fewshot=num_fewshot, log_samples=False)["results"]
    scores = {task: {} for task in results}
    for task, values in results.items():
        for key, value in values.items():  # "acc,none" and "acc_stderr,none", with the filter's name; or other things
            name, _, answers = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{answers}")  # may be "N/A"
                scores[task][key.removesuffix(",none")] = value, error if isinstance(error, float) else None
    return scores


def average(scores):
    """Mean accuracy over the tasks that have one, and its standard error: the tasks are independent. Or None."""
    accuracies = [metrics["acc"] for metrics in scores.values() if "acc" in metrics]
    if not accuracies:
        return None
    values, errors = zip(*accuracies)
    return sum(values) / len(values), None if None in errors else math.hypot(*errors) / len(values)


def markdown(results):
    """Table 1's layout: a row per checkpoint, accuracy in %. A task without accuracy shows its first metric."""

    def cell(score, scale=100):
        value, error = score or (None, None)
        return number(value and scale * value, ".2f", error and scale * error)

    first = next(iter(results.values()))
    metric = {task: "acc" if "acc" in metrics else next(iter(metrics), "") for task, metrics in first.items()}
    heads = [NAMES.get(task, task) + ("" if name == "acc" else f" ({name})") for task, name in metric.items()]
    rows = []
    for checkpoint, scores in results.items():
        cells = [cell(scores[task].get(name), 100 if name == "acc" else 1) for task, name in metric.items()]
        rows.append([checkpoint, *cells, cell(average(scores))])
    return "\n".join(table(["", *heads, "average"], rows))


@dataclass
class Options:
    checkpoints: str = option("out/small", "run folders, checkpoint files or Hugging Face models, with commas between")
    tasks: str = option(",".join(NAMES), "names of lm-eval's or your own tasks, with commas between them")
    include_path: str = option("", "folder of your own tasks (YAML files)")
    out: str = option("experiments/results/tasks.json", "file of all metrics, written when all is done")
    limit: int | None = option(None, "questions of each task (default: all)", least=1)
    num_fewshot: int | None = option(None, "solved questions before each (default: the task's, mostly 0)", least=0)
    batch_size: int = option(16, "rows at a time", least=1)
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    threads: int = option(0, "CPU threads (0: as many as cores)", least=0, most=1024)


def main(argv=None):
    o, _ = parse_options(Options, argv)
    paths, out, results = split_list(o.checkpoints), Path(o.out), {}
    if TemplateLM is object:
        fail("evaluating on tasks needs lm-eval: pip install lm-eval")
    if o.include_path and not Path(o.include_path).is_dir():
        fail(f"include_path {o.include_path} is not a folder")
    if out.is_dir():
        fail(f"out {out} is a folder: name a file")
    if o.threads:
        torch.set_num_threads(o.threads)
    for library in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        device = choose_device(o.device)
        for path in paths:  # all of them before any work, and one in memory at a time
            open_model(path, device)
        tasks = load_tasks(split_list(o.tasks), o.include_path or None)
        for path in paths:
            print(path, file=sys.stderr)
            results[path] = run_tasks(Harness(*open_model(path, device), o.batch_size), tasks, o.limit, o.num_fewshot)
        report = dict(
            command=command("evaluate.py", argv),
            machine=f"{device.type}, {machine()}",
            versions={library: version(library) for library in ("lm_eval", "torch")},
            options=asdict(o),
            results=results,
            average={path: average(scores) for path, scores in results.items()},
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(report, indent=1) + "\n")
    except (ValueError, OSError) as error:
        fail(error)
    print(markdown(results))


if __name__ == "__main__":
    run_program(main)
