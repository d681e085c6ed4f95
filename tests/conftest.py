"""Tests run on one CPU thread, without network or GPU; kernels run in Triton's interpreter where there is no GPU."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
torch.set_num_threads(1)
