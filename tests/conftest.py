"""Tests run on one CPU thread, without network or GPU; kernels run in Triton's interpreter where there is no GPU."""

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"} | os.environ  # before torch: see train.py

import numpy as np
import pytest
import torch

from data.prepare import prepare

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small byte-level data set of text with some structure, the same every time."""
    folder = tmp_path_factory.mktemp("data")
    words = np.random.default_rng(0).choice(["head", "key", "value", "query", "norm", "rope", "cache"], 6000)
    (folder / "text.txt").write_text(" ".join(words))
    prepare(source=str(folder / "text.txt"), tokenizer="byte", out_dir=folder / "set")
    return str(folder / "set")
