"""Tests run on one CPU thread, without network or GPU; kernels run in Triton's interpreter where there is no GPU."""

import os

import options  # noqa: F401 (before torch)

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import experiments.family  # noqa: F401 (registers its attentions: every generic test takes its variants from there)
from data.prepare import prepare
from train import main as train_main

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small byte-level data set of text with some structure, the same every time."""
    folder = tmp_path_factory.mktemp("data")
    words = np.random.default_rng(0).choice(["head", "key", "value", "query", "norm", "rope", "cache"], 6000)
    (folder / "text.txt").write_text(" ".join(words))
    prepare(source=str(folder / "text.txt"), tokenizer="byte", out_dir=folder / "set")
    return str(folder / "set")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """A finished run of 60 steps that tests may read but not change."""
    folder = tmp_path_factory.mktemp("trained") / "r"
    how = ["--preset", "tiny", "--threads", "1", "--device", "cpu", "--dtype", "float32", "--max_steps", "60"]
    train_main([*how, "--data_dir", data, "--out_dir", str(folder)])
    return folder
