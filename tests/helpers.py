"""What several test files share: words of a command line, the one line of a refusal, a model whose parameters all
matter.
"""

import pytest
import torch

from model import GPT, GPTConfig

SHAPE = dict(vocab_size=37, block_size=24, n_layer=2, n_head=4, n_embd=24)


def arguments(*options):
    """The words of a command line; an option may be given as text with its value, a path or a number."""
    return " ".join(map(str, options)).split()


def refused(capsys, main, *options):
    """The one line, but for notes, that a program ends with, exit code 2, when it has said and done nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments(*options))
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith("note: ")]
    assert stopped.value.code == 2 and said.out == ""
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def make(seed=0, std=0.2, **fields):
    """A model with every parameter random, so that compositions, mixes, gains and biases all matter."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **fields})).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    return model
