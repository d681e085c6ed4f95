"""What a run trains and is measured on: one prepared data set, or several that take turns.

Read before: data/dataset.py and the sampler. Read next: train.py.
"""

import hashlib
from pathlib import Path

from data.dataset import open_dataset
from data.sampler import Turns, begin, check_length, validation_windows
from options import split_list


class Texts:
    """Prepared data sets of one tokenizer: those that are trained on, and others that are measured only.

    `data_dir` and `eval_data` are folders with commas between them. `trained` and `measured`, which has all of them,
    are the data sets by name. Raises FileNotFoundError or ValueError for what is no data set, and for one that was made
    with another tokenizer than the first.
    """

    def __init__(self, data_dir, eval_data=""):
        self.folders, others = split_list(data_dir), split_list(eval_data)
        if not self.folders:
            raise ValueError(f"data_dir must name a prepared data set, not {data_dir!r}")
        everything = list(dict.fromkeys(self.folders + others))
        names = [Path(folder).resolve().name for folder in everything]
        names = [name if names.count(name) == 1 else folder for name, folder in zip(names, everything)]
        self.measured = {name: open_dataset(folder) for name, folder in zip(names, everything)}
        self.trained = {name: self.measured[name] for name in names[: len(set(self.folders))]}
        first, *rest = self.measured.values()
        for dataset in rest:
            if dataset.meta["tokenizer"]["sha256"] != first.meta["tokenizer"]["sha256"]:
                how = f"prepare it again with --tokenizer {first.folder}"
                raise ValueError(f"{dataset.folder} was made with another tokenizer than {first.folder}: {how}")
        self.meta, self.tokenizer, self.vocab_size = first.meta, first.tokenizer, first.vocab_size
        self.tokens = sum(len(dataset.train) for dataset in self.trained.values())
        self.source = " and ".join(dataset.meta["source"] for dataset in self.trained.values())
        prints = [dataset.fingerprint for dataset in self.trained.values()]
        self.fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()[:16]

    def check_length(self, window):
        """Raise ValueError, naming split and folder, for a text that has no window of that many positions."""
        for dataset in self.measured.values():
            for split, tokens in (("training", dataset.train), ("validation", dataset.val)):
                try:
                    check_length(tokens, window)
                except ValueError as error:
                    raise ValueError(f"the {split} split of {dataset.folder} is too short: {error}") from None

    def sampler(self, window, seed, start=()):
        return Turns([dataset.train for dataset in self.trained.values()], window, seed, start)

    def validation_windows(self, window, count, start=()):
        """{name: (inputs, targets)} of `count` windows of each text, always the same ones."""
        return {
            name: begin(validation_windows(dataset.val, window, count), start)
            for name, dataset in self.measured.items()
        }

    def summary(self, losses):
        """What a line of metrics says of the losses by name: the means of what is trained on, and of several each."""
        mean = sum(losses[name] for name in self.trained) / len(self.trained)
        bits = sum(dataset.bits_per_byte(losses[name]) for name, dataset in self.trained.items()) / len(self.trained)
        each = {f"val_loss/{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {}
        return dict(val_loss=mean, val_bpb=bits) | each
