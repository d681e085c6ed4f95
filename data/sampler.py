"""The batches a training run sees: which windows of a data set each step takes, and the windows it is validated on.

Read before: data/dataset.py; read next: train.py. `python data/sampler.py` shows the windows of a few steps.
"""

import sys
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a program: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset import Shards


class WindowSampler:
    """Which windows of `block_size` tokens a training step sees: a pure function of (seed, step, rank).

    Epoch e cuts the tokens, taken as a circle, into n = len(tokens) // block_size windows side by side, from a random
    start, and visits each once in a random order. The joint of the circle is the end of a document like any other. The
    order is a keyed permutation computed index by index: no memory, nothing to save in a checkpoint, and, unlike
    numpy's own shuffles, the same in every version. ValueError if there are not block_size + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray | Shards, block_size: int, seed: int = 0):
        check_length(tokens, block_size)
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.windows_per_epoch = len(tokens) // block_size

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Where the windows number `samples`, counted from the start of the run, begin: int64, same shape."""
        n, starts = self.windows_per_epoch, np.empty(len(samples), np.int64)
        epochs, positions = np.divmod(samples, n)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = mix(mix(np.uint64(self.seed % 2**64)) ^ np.uint64(epoch))
            offset = int(mix(key) % np.uint64(len(self.tokens)))
            starts[chosen] = (offset + permute(positions[chosen], n, key) * self.block_size) % len(self.tokens)
        return starts

    def windows(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of the windows number `samples`, each int64 (samples, block_size)."""
        return cut_windows(self.tokens, self.starts(samples), self.block_size)


class Turns:
    """Windows taken from several texts in turn, each begun by the model's start of text, if it has one.

    Window number i of a run is number i // n of text i % n. `tokens` is a list of the texts' tokens.
    """

    def __init__(self, tokens, block_size, seed=0, start=()):
        self.samplers, self.start = [WindowSampler(each, block_size, seed) for each in tokens], start

    def batch(self, step, batch_size, *, rank=0, world_size=1, micro_step=0, grad_accum=1):
        """(inputs, targets), each int64 (batch_size, block_size), targets one position ahead: a pure function.

        A step takes grad_accum * world_size * batch_size consecutive windows: the ranks' rows of one micro-step, one
        after another, are the rows of one process with batch world_size * batch_size, and the micro-steps, one
        after another, the rows of one batch grad_accum times as large.
        """
        first, n = ((step * grad_accum + micro_step) * world_size + rank) * batch_size, len(self.samplers)
        windows = [self.samplers[i % n].windows(np.array([i // n])) for i in range(first, first + batch_size)]
        return begin([np.concatenate(side) for side in zip(*windows)], self.start)


def begin(windows, start):
    """Windows (inputs, targets) whose first inputs are the tokens of `start`, if there are any."""
    windows[0][:, : len(start)] = list(start)
    return windows


def validation_windows(tokens: np.ndarray | Shards, block_size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), int64 (count, block_size): a fixed set, evenly spread and without overlap.

    Fewer than `count` if not so many fit; ValueError if there are not block_size + 1 tokens.
    """
    check_length(tokens, block_size)
    count = max(1, min(count, (len(tokens) - 1) // block_size))
    last = len(tokens) - 1 - block_size
    return cut_windows(tokens, np.arange(count) * last // max(1, count - 1), block_size)


def check_length(tokens, block_size):
    if len(tokens) <= block_size:
        raise ValueError(
            f"{len(tokens)} tokens are too few for block_size {block_size}: use more text or a smaller one"
        )


def cut_windows(tokens, starts, block_size):
    inputs = np.empty((len(starts), block_size), np.int64)
    targets = np.empty_like(inputs)
    for row, start in enumerate(starts):
        window = tokens[start : start + block_size + 1]
        if len(window) <= block_size:  # over the joint of the circle
            window = np.concatenate([window, tokens[: block_size + 1 - len(window)]])
        inputs[row], targets[row] = window[:-1], window[1:]
    return inputs, targets


def permute(positions: np.ndarray, n: int, key: np.uint64) -> np.ndarray:
    """A keyed bijection of range(n): a Feistel network on the next even number of bits, applied again until the value
    is back inside ("cycle walking", Black and Rogaway 2002), which takes at most four tries on average."""
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(6):
            left, right = right, left ^ (mix(right ^ mix(key ^ np.uint64(round_number))) & mask)
        values[outside] = left << half | right
        outside = values >= n
    return values.astype(np.int64)


def mix(value):
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): 64 bits to 64 bits, elementwise."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return value ^ value >> np.uint64(31)


if __name__ == "__main__":
    sampler = WindowSampler(np.arange(26), block_size=5, seed=1)
    print(f"26 tokens in windows of 5: {sampler.windows_per_epoch} windows an epoch, by their first token")
    for epoch in range(3):
        print(f"  epoch {epoch}: {sampler.starts(np.arange(5) + 5 * epoch).tolist()}")
    turns = Turns([np.arange(26)], block_size=5, seed=1)
    print("step 1, batch 4:", turns.batch(1, 4)[0][:, 0].tolist())
    print("the same, by 2 ranks:", [turns.batch(1, 2, rank=rank, world_size=2)[0][:, 0].tolist() for rank in (0, 1)])
    print("validation windows:", validation_windows(np.arange(26), 5, 3)[0][:, 0].tolist())
