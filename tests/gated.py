"""A new variant, as a fork would write one. tests/conftest.py registers it, so every generic test runs on it, too."""

import torch
import torch.nn as nn

from attention import Attention, causal_attention


class HeadGated(Attention):
    """Head-gated attention (2505.06708): C_h * sigmoid(W_g x)_h, an ordinary attention whose heads can be closed."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.gate_proj = nn.Linear(config.n_embd, self.n_head, bias=False)

    def attend(self, x, q, k, v, positions):
        gate = torch.sigmoid(self.gate_proj(x)).transpose(1, 2).unsqueeze(-1)  # (B, H, T, 1)
        return causal_attention(q, k, v, positions, self.drop) * gate
