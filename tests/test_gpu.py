"""What only a GPU can show: pytest -m gpu. tests/test_kernels.py runs on a GPU, too, where there is one."""

import pytest
import torch

import functional
from functional import mea_attention, mea_decode
from model import GPT, GPTConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
TOLERANCE = {torch.float32: 3e-3, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # float32 is tf32 on tensor cores


def heads(B, n, T, D, dtype):
    return torch.randn(B, T, n, D, device="cuda").to(dtype).transpose(1, 2)


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("path", ["triton", "sdpa", "blocks"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, D", [(1, 16), (77, 80), (129, 64), (1000, 128), (2048, 32)])
def test_outputs_and_gradients_equal_the_formula_in_float64(T, D, dtype, path):
    torch.manual_seed(0)
    inputs = [heads(2, 6, T, D, dtype), heads(2, 3, T, D, dtype), heads(2, 2, T, D, dtype)]
    inputs += [torch.randn(n, 6, device="cuda") for n in (3, 2)] + [torch.randn(6, D, device="cuda")]
    g = torch.randn(2, 6, T, D, device="cuda")

    def run(tensors, path):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = mea_attention(*leaves, path=path)
        return [out, *torch.autograd.grad(out, leaves, g.to(out.dtype))]

    exact = run([x.double() for x in inputs], "reference")
    for got, wanted in zip(run(inputs, path), exact):
        assert relative_error(got, wanted) < TOLERANCE[dtype] * (1 if T > 1 else 4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("S, n", [(1, 4), (300, 2), (5000, 1), (70000, 2)])
def test_ragged_decoding_equals_the_formula_in_float64(S, n, dtype):
    torch.manual_seed(0)
    inputs = [heads(3, 8, 1, 64, dtype), heads(3, n, S, 64, dtype), heads(3, n, S, 64, dtype)]
    inputs += [torch.randn(n, 8, device="cuda"), torch.randn(n, 8, device="cuda"), torch.randn(8, 64, device="cuda")]
    lengths = torch.tensor([S, max(1, S // 3), 1], device="cuda")
    exact = mea_decode(*(x.double() for x in inputs), lengths=lengths, path="reference")
    assert relative_error(mea_decode(*inputs, lengths=lengths, path="triton"), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("attention", ["mha", "mea", "dfa", "tha"])
def test_a_compiled_model_has_the_loss_and_gradients_of_the_plain_one(attention, kernel, monkeypatch):
    monkeypatch.setattr(functional, "_kernel", kernel)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=64, n_layer=2, n_head=4, n_embd=128, block_size=96, attention=attention)
    model, tokens = GPT(config).cuda(), torch.randint(64, (2, 97), device="cuda")

    def gradients(function):
        loss = function(tokens[:, :-1], tokens[:, 1:])[1]
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for plain, compiled in zip(gradients(model), gradients(torch.compile(model))):
        assert relative_error(compiled, plain.double()) < 5e-3
