"""functional.py and kernels.py against the formulas in fp64: every path and gradient; compiled for GPUs not here."""

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import raises
from torch.testing import assert_close

import functional
import kernels
from attention import compose_heads
from experiments import roofline
from functional import absorbed_attention, causal_attention, linear_cross_entropy, mea_attention, mea_decode
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_KERNELS = kernels.triton_obstacle(torch.device(DEVICE), torch.float32, 16)
needs_triton = pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS or "")
IN_TORCH = ["sdpa", "blocks", "reference"]
EVERY_PATH = [pytest.param("triton", marks=needs_triton), *IN_TORCH]


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def random_heads(B, n, T, D, dtype=torch.float32):
    """(B, n, T, D) with the strides that a projection gives: (B, T, n * D) in memory."""
    return torch.randn(B, T, n, D).to(DEVICE, dtype).transpose(1, 2)


def random_problem(B, T, D, H, n_k, n_v, norm, composed=True, dtype=torch.float32):
    torch.manual_seed(B + T + D + H)
    q, k, v = random_heads(B, H, T, D, dtype), random_heads(B, n_k, T, D, dtype), random_heads(B, n_v, T, D, dtype)
    # No weight near 0: under a norm, gradients of a head that one component makes with a weight w grow like 1 / w.
    weight = lambda n: torch.randn(n, H, device=DEVICE) / n**0.5
    compose_k, compose_v = (w + 0.5 * w.sign() if composed else None for w in (weight(n_k), weight(n_v)))
    norm_weight = torch.randn(H, D, device=DEVICE) if norm else None  # about half of the gains are negative
    if norm:
        norm_weight[0, ::3] = 0  # a gain of exactly 0 must not be divided by
    return [q, k, v, compose_k, compose_v, norm_weight]


def in_fp64(tensors):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """torch.empty returns NaN, so that whatever a kernel fails to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact_bf16(monkeypatch):
    """Triton's interpreter multiplies the raw bits of bf16 tiles and truncates where GPUs round: use their values."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builtin = {name: getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl", "create_fp_to_fp")}

    def upcast(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, d, *arguments):
        return builtin["create_dot"](self, upcast(a), upcast(b), d, *arguments)

    def convert(name):
        def cast(self, source, target, *arguments):
            if target.scalar == tl.bfloat16:
                rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
                return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
            return builtin[name](self, upcast(source), target, *arguments)

        return cast

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    for name in ("cast_impl", "create_fp_to_fp"):
        monkeypatch.setattr(InterpreterBuilder, name, convert(name))


# ---- prefill and its gradients --------------------------------------------------------------------------------------


NAMES = "q", "k", "v", "compose_k", "compose_v", "norm_weight"


def check_attention(path, forward_bound, gradient_bound, *problem, dtype=torch.float32, composed=True):
    """Forward and all gradients against autograd through the reference in fp64."""
    B, T, D, H, n_k, n_v, norm = problem
    inputs = [x if x is None else x.requires_grad_() for x in random_problem(*problem, dtype=dtype, composed=composed)]
    exact_inputs = in_fp64(inputs)
    out, exact = mea_attention(*inputs, path=path), mea_attention(*exact_inputs, path="reference")
    assert out.dtype == dtype and relative_error(out, exact) < forward_bound
    gradient = torch.randn_like(exact)
    given = lambda tensors: [x for x in tensors if x is not None]
    gradients = torch.autograd.grad(out, given(inputs), gradient.to(dtype))
    exact_gradients = torch.autograd.grad(exact, given(exact_inputs), gradient)
    for name, got, true in zip([name for name, x in zip(NAMES, inputs) if x is not None], gradients, exact_gradients):
        if name.startswith("compose") and dtype != torch.float32:
            continue  # torch's matmul of what the kernels return: under a norm a sum that cancels, with few digits left
        # Some gradients are sums that cancel to (almost) 0: those through the softmax of one position, and that of
        # compose_v where a norm follows one value component, whose scale it removes. Compare with the gradient of v.
        cancels = T == 1 or name == "compose_v" and n_v == 1 and norm
        scale = max(true.norm(), exact_gradients[2].norm()) if cancels else true.norm()
        assert (got.double() - true).norm() < gradient_bound * scale, name


# B, T, D, H, n_k, n_v, norm
FEW = [(2, 77, 32, 4, 2, 2, True), (1, 128, 64, 2, 2, 1, False), (1, 17, 80, 4, 3, 2, True), (3, 1, 16, 3, 1, 2, True)]
GRID = [
    pytest.param((B, T, D, H, n, n, norm), marks=pytest.mark.slow)
    for T in (1, 17, 64, 77, 128)
    for D in (16, 32, 64, 80)
    for H, n in ((4, 4), (4, 2), (8, 3), (6, 1))
    for norm in (True, False)
    for B in (1, 3)
]


@needs_triton
@pytest.mark.parametrize("problem", [*FEW, *GRID], ids=str)
def test_fused_attention_and_its_gradients_equal_the_reference(problem):
    check_attention("triton", 1e-5, 1e-5, *problem)


@pytest.mark.parametrize("path", IN_TORCH)
@pytest.mark.parametrize("problem", FEW, ids=str)
def test_the_paths_in_torch_equal_the_reference(problem, path):
    check_attention(path, 1e-5, 1e-5, *problem)


@needs_triton
@pytest.mark.parametrize("problem", [(1, 300, 64, 1, 1, 1, True), (1, 200, 128, 1, 1, 1, True)], ids=str)
def test_the_tiles_of_half_precision_give_the_same_numbers(problem):
    check_attention("triton", 2e-3, 5e-3, *problem, dtype=torch.float16, composed=False)


@needs_triton
@pytest.mark.parametrize("problem", [FEW[0], *(p for p in GRID if p.values[0][0] == 1 < p.values[0][1])], ids=str)
def test_bf16_equals_the_reference(problem, exact_bf16):
    check_attention("triton", 5e-3, 2e-2, *problem, dtype=torch.bfloat16)


STRIDES = {
    "as projections and expand give them": lambda x: x,
    "sliced": lambda x: torch.stack([x, torch.full_like(x, 7)], -1)[..., 0],
    "transposed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
}


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("form", STRIDES)
def test_any_strides_of_any_argument_give_the_same_numbers_and_gradients(form, path):
    *problem, gain = random_problem(2, 40, 16, 4, 2, 3, True)
    problem.append(gain[:1].expand(4, 16))  # one gain for all heads, and one gradient for all positions
    grad_out, lengths = random_heads(2, 4, 1, 16).expand(2, 4, 40, 16), torch.tensor([40, 7], device=DEVICE)

    def results(restride):
        inputs = [restride(x).detach().requires_grad_() for x in problem]
        out = mea_attention(*inputs, path=path)
        with torch.no_grad():
            step = mea_decode(inputs[0][:, :, -1:], *inputs[1:], lengths=restride(lengths), path=path)
        return out, step, *torch.autograd.grad(out, inputs, restride(grad_out))

    for got, expected in zip(results(STRIDES[form]), results(torch.Tensor.contiguous)):
        assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---- attention in blocks of queries ---------------------------------------------------------------------------------


def attention_problem(B, T, S, H, n, D, Dv, dtype=torch.float64, scale=1.0):
    torch.manual_seed(B + T + S)
    shapes = (H, T, D), (n, S, D), (n, S, Dv)
    q, k, v = (random_heads(B, heads, length, width, dtype) for heads, length, width in shapes)
    return [x.requires_grad_() for x in (q * scale, k, v)]


def gradients(inputs, path, **settings):
    out = causal_attention(*inputs, path=path, **settings)
    torch.manual_seed(1)
    return out, *torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=torch.float64).to(out))


@pytest.fixture(params=["kept", "recomputed"])
def weights(request, monkeypatch):
    """Both forms of the backward pass, with blocks so small that there are several of them, and heads in parts."""
    monkeypatch.setattr(functional, "KEPT", 512 if request.param == "kept" else 0)
    monkeypatch.setattr(functional, "SCORES_PER_CALL", 2**14)
    return request.param


# B, T, S, H, n, D, Dv: whole blocks, one row more, one query, a cache in front, grouped queries, DFA's wide values
SHAPES = [(2, 128, 128, 3, 3, 16, 16), (1, 129, 129, 4, 2, 8, 8), (2, 1, 1, 2, 2, 8, 8), (2, 1, 70, 4, 1, 8, 8)]
SHAPES += [(1, 77, 200, 6, 2, 8, 16), (3, 191, 191, 2, 1, 5, 10)]


@pytest.mark.parametrize("path", ["sdpa", "blocks"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal_attention_and_its_gradients_equal_the_formula(shape, path, weights):
    inputs = attention_problem(*shape)
    for got, exact in zip(gradients(inputs, path), gradients(inputs, "reference")):
        error = (got - exact).norm() / max(exact.norm(), 1.0)  # the gradients of a softmax over one key are 0
        assert error < (1e-14 if path == "blocks" else 1e-13)


def hide_behind(stop, *tensors):
    """Copies of (2, n, S, D) whose second row holds large numbers from `stop` on."""
    copies = [x.detach().clone() for x in tensors]
    for sign, x in zip((1e3, -1e3), copies):
        x[1, :, stop:] = sign
    return copies


@pytest.mark.parametrize("path", IN_TORCH)
def test_rows_of_different_length_see_nothing_behind_their_positions(path, weights):
    q, k, v = attention_problem(2, 3, 90, 4, 2, 8, 16)
    positions = torch.tensor([[87, 88, 89], [5, 6, 7]], device=DEVICE)
    rows = ((q[b, None], k[b, None, :, :stop], v[b, None, :, :stop]) for b, stop in ((0, 90), (1, 8)))
    exact = torch.cat([causal_attention(*row, path="reference") for row in rows])
    out = causal_attention(q, *hide_behind(8, k, v), positions, path=path)
    assert_close(out, exact, rtol=1e-12, atol=1e-12)
    for got, true in zip(*(torch.autograd.grad(y.square().sum(), q) for y in (out, exact))):
        assert_close(got, true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("positions", [None, torch.tensor([[5, 6], [2, 3]])], ids=["full", "ragged"])
def test_absorbed_attention_is_attention_with_composed_heads(positions):
    q, k, v = attention_problem(2, 2, 7, 4, 2, 8, 8)
    compose_k, compose_v = torch.randn(2, 2, 4, dtype=torch.float64, device=DEVICE)
    positions = positions if positions is None else positions.to(DEVICE)
    exact = causal_attention(q, compose_heads(k, compose_k), compose_heads(v, compose_v), positions, path="reference")
    k, v = (k, v) if positions is None else hide_behind(4, k, v)
    assert_close(absorbed_attention(q, k, v, compose_k, compose_v, positions), exact)


def test_one_tensor_may_be_query_key_and_value_and_a_backward_may_run_twice(weights, monkeypatch):
    x = attention_problem(1, 70, 70, 2, 2, 4, 4)[0]
    loss, exact = (causal_attention(x, x, x, path=path).square().sum() for path in ("blocks", "reference"))
    monkeypatch.setattr(functional, "SCORES_PER_CALL", 1)  # the number of threads may change before the backward pass
    for _ in range(2):
        assert_close(torch.autograd.grad(loss, x, retain_graph=True), torch.autograd.grad(exact, x, retain_graph=True))


def errors(inputs, path):
    """Relative errors of the output and of the three gradients against the formula in float64."""
    exact = gradients([x.detach().double().requires_grad_() for x in inputs], "reference")
    return [relative_error(a, b) for a, b in zip(gradients(inputs, path), exact)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 4.0, 100.0])
def test_blocks_are_as_accurate_as_torchs_fused_attention(dtype, size, weights):
    inputs = attention_problem(2, 300, 300, 4, 4, 32, 32, dtype, size)
    (blocks, *of_blocks), (sdpa, *of_sdpa) = errors(inputs, "blocks"), errors(inputs, "sdpa")
    assert blocks < 1.1 * sdpa and sum(of_blocks) < 1.1 * sum(of_sdpa)


def test_blocks_hold_where_logits_are_huge(weights):
    """Torch's fused backward on a CPU takes exp(score - log-sum-exp) of rounded scores, which are far apart at 1e4."""
    assert max(errors(attention_problem(1, 200, 200, 2, 2, 16, 16, torch.float32, 1e4), "blocks")) < 0.05


def test_dropout_in_blocks_drops_the_same_weights_in_both_passes_and_keeps_the_expectation(weights):
    q, k, v = attention_problem(1, 150, 150, 2, 1, 8, 8)

    def attend(v):
        torch.manual_seed(5)
        return causal_attention(q, k, v, dropout=0.25, path="blocks")

    out, plain = attend(v), causal_attention(q, k, torch.eye(150).to(v).expand(1, 1, 150, 150), path="reference")
    mask = attend(torch.eye(150).to(v).expand(1, 1, 150, 150)).detach() / plain.detach().clamp(min=1e-30)
    seen = torch.ones(150, 150, device=DEVICE).tril().bool()
    assert (mask[..., seen].eq(0) | (mask[..., seen] - 1 / 0.75).abs().lt(1e-9)).all()
    assert abs(mask[..., seen].mean() - 1) < 0.02
    exact = plain * mask @ v
    gradient = torch.randn_like(out)
    assert_close(out, exact)
    for got, true in zip(*(torch.autograd.grad(y, (q, k, v), gradient) for y in (out, exact))):
        assert_close(got, true)
    assert not torch.equal(out, causal_attention(q, k, v, dropout=0.25, path="blocks"))


@pytest.mark.parametrize("B, T", [(0, 5), (2, 0)])
@pytest.mark.parametrize("path", EVERY_PATH)
def test_an_empty_batch_and_no_positions_are_no_fault(B, T, path):
    inputs = [x.requires_grad_() for x in random_problem(B, T, 16, 4, 2, 2, True)]
    out = mea_attention(*inputs, path=path)
    assert out.shape == (B, 4, T, 16)
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), inputs))
    if T:
        with torch.no_grad():
            assert mea_decode(inputs[0][:, :, -1:], *inputs[1:], path=path).shape == (B, 4, 1, 16)
    if path != "triton":
        q, k, v = attention_problem(B, T, T, 4, 2, 8, 16)
        assert causal_attention(q, k, v, path=path).shape == (B, 4, T, 16)
        assert causal_attention(q, k, v, torch.zeros(B, T, device=DEVICE).long(), path=path).shape == (B, 4, T, 16)


# ---- decode ---------------------------------------------------------------------------------------------------------


def check_decode(path, bound, B, S, D, H, n_k, n_v, norm, composed=True, dtype=torch.float32, lengths=None):
    """One step against the last row of attention without a cache. Positions past a row's length hold NaN and inf."""
    q, k, v, *weights = random_problem(B, S, D, H, n_k, n_v, norm, composed, dtype)
    exact = mea_attention(*in_fp64([q, k, v, *weights]), path="reference")
    cached_k, cached_v = k.clone(), v.clone()
    for b, length in enumerate(lengths or []):
        cached_k[b, :, length:], cached_v[b, :, length:] = float("nan"), float("inf")
    last = torch.tensor(lengths or [S] * B, device=DEVICE) - 1
    last_row = lambda x: x[torch.arange(B, device=DEVICE), :, last].unsqueeze(2)  # (B, H, 1, D)
    given = None if lengths is None else last + 1
    out = mea_decode(last_row(q), cached_k, cached_v, *weights, lengths=given, path=path)
    assert out.shape == (B, H, 1, D) and out.dtype == dtype
    assert relative_error(out, last_row(exact)) < bound


LENGTHS = (1, 15, 16, 17, 100, 257)
HEADS = [(4, 2, 2, True), (8, 3, 1, True), (6, 6, 6, False), (20, 2, 3, True)]  # H, n_k, n_v, composed


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("S", LENGTHS)
def test_a_decoding_step_equals_the_last_row_without_a_cache(S, path):
    H, n_k, n_v, composed = HEADS[S % 4]
    check_decode(path, 1e-5, 1, S, 32, H, n_k, n_v, True, composed)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("H, n_k, n_v, composed", HEADS)
@pytest.mark.parametrize("D", [16, 32, 64, 80])
@pytest.mark.parametrize("S", LENGTHS)
def test_a_decoding_step_equals_the_last_row_everywhere(S, D, H, n_k, n_v, composed, norm):
    check_decode("triton", 1e-5, 2, S, D, H, n_k, n_v, norm, composed)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("H, n_k, n_v, composed", HEADS[:3])
def test_each_row_attends_to_its_own_length(H, n_k, n_v, composed, path):
    check_decode(path, 1e-5, 3, 100, 16, H, n_k, n_v, True, composed, lengths=[1, 100, 33])


@needs_triton
def test_decode_in_bf16(exact_bf16):
    check_decode("triton", 5e-3, 2, 100, 64, 8, 3, 2, True, dtype=torch.bfloat16)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_folding_one_side_only_is_composing_it_with_the_identity(path):
    q, k, v, _, compose_v, norm_weight = random_problem(1, 30, 16, 4, 4, 2, True)
    exact = mea_attention(*in_fp64([q, k, v, None, compose_v, norm_weight]), path="reference")[:, :, -1:]
    assert relative_error(mea_decode(q[:, :, -1:], k, v, None, compose_v, norm_weight, path=path), exact) < 1e-5


@needs_triton
@pytest.mark.parametrize("composed", [True, False])
def test_a_cache_may_hold_more_numbers_than_32_bits_count(composed):
    """Heads lie 2^31 / 3 numbers and more apart, in memory that is reserved and, but for a few pages, never touched."""
    torch.use_deterministic_algorithms(False)  # they would write NaN into all of it
    n, D, used, apart = 4, 16, 20, 2**31 // 3 // 16 * 16 + 16
    try:
        memory = torch.empty(3 * apart + used * D, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(str(error))
    cache = memory.as_strided((1, n, used, D), (memory.numel(), apart, D, 1))
    q, near, _, *weights = random_problem(1, used, D, n, n, n, True, composed, dtype=torch.float16)
    cache.copy_(near)
    step = lambda heads: mea_decode(q[:, :, -1:], heads, heads, *weights, path="triton")
    assert torch.equal(step(cache), step(near))
    whole = lambda heads: mea_attention(q, heads, heads, *(None, None, weights[2]), path="triton")
    assert torch.equal(whole(cache), whole(near))


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [[], [0], range(600)], ids=["none", "one", "all"])
@pytest.mark.parametrize("N, C, V", [(1, 3, 2), (37, 5, 11), (600, 8, 2000)])
def test_the_loss_in_pieces_and_its_gradients_equal_cross_entropy(N, C, V, ignored, monkeypatch):
    """Of the rows whose target is not -100."""
    monkeypatch.setattr(functional, "SCORES_PER_CALL", 16 * V)  # pieces of 16 rows
    torch.manual_seed(0)
    x, weight, targets = torch.randn(N, C).double(), torch.randn(V, C).double(), torch.randint(V, (N,))
    x[0] *= 1e3  # logits of thousands
    targets[list(ignored)[:N]] = -100
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    results = lambda loss: (loss, *torch.autograd.grad(3 * loss, inputs))
    exact = results(F.cross_entropy(x @ weight.T, targets))
    torch._dynamo.reset()  # it stops compiling what it has compiled for many shapes
    elsewhere = torch.compile(linear_cross_entropy, backend="eager")  # what a GPU runs, too
    for loss in (linear_cross_entropy, elsewhere):
        assert_close(results(loss(x, weight, targets)), exact, rtol=1e-10, atol=1e-14, equal_nan=True)
    with torch.no_grad():
        assert_close(linear_cross_entropy(x, weight, targets), exact[0].detach(), rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("targets", [torch.zeros(3).long(), torch.zeros(5).long(), torch.zeros(4, 1).long()])
def test_the_loss_wants_one_target_per_row(targets):
    raises("targets for 4 rows: give one per row", linear_cross_entropy, torch.randn(4, 2), torch.randn(3, 2), targets)


def test_the_loss_in_pieces_rounds_no_more_than_cross_entropy_in_bf16():
    torch.manual_seed(0)
    x, weight = torch.randn(3000, 32, requires_grad=True), torch.randn(700, 32, requires_grad=True)
    targets = torch.randint(700, (3000,))
    plain = lambda x, weight, targets: F.cross_entropy(functional.upcast(x @ weight.T), targets)
    gradients = lambda loss, dtype: torch.autograd.grad(loss(x.to(dtype), weight.to(dtype), targets), (x, weight))
    ours, theirs = gradients(linear_cross_entropy, torch.bfloat16), gradients(plain, torch.bfloat16)
    for got, other, exact in zip(ours, theirs, gradients(plain, torch.float64)):
        assert relative_error(got, exact) < 1.05 * relative_error(other, exact)


# ---- dispatch -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="blocks are a CPU's")
def test_auto_takes_blocks_where_they_are_faster(monkeypatch):
    taken = []
    monkeypatch.setattr(functional, "block_attention", lambda *_: taken.append("blocks"))
    monkeypatch.setattr(functional, "sdpa_attention", lambda *_: taken.append("sdpa"))

    def path(T, dtype, B=16, grad=True, positions=None, S=None):
        q = torch.empty(B, 8, T, 16, dtype=dtype, requires_grad=grad)
        k = torch.empty(B, 8, S or T, 16, dtype=dtype)
        causal_attention(q, k, k, positions)
        return taken.pop()

    assert path(512, torch.bfloat16) == path(128, torch.bfloat16) == path(512, torch.float32) == "blocks"
    assert path(1024, torch.bfloat16) == path(256, torch.float32) == "sdpa"  # slower there
    assert path(512, torch.bfloat16, grad=False) == path(64, torch.bfloat16, B=1) == "sdpa"
    assert path(512, torch.bfloat16, positions=torch.zeros(16, 512).long()) == "sdpa"
    monkeypatch.setattr(functional, "_kernel", "sdpa")
    assert path(512, torch.bfloat16) == "sdpa"


@pytest.fixture
def fresh_choice(caplog, monkeypatch):
    """No kernel chosen and nothing said yet; a function that lists what the log of functional.py says."""
    monkeypatch.setattr(functional, "_kernel", "auto")
    functional.say_once.cache_clear()
    caplog.set_level(logging.INFO, logger="functional")
    return lambda: [record.message for record in caplog.records]


def choose(path="auto", device=DEVICE, obstacle=None):
    heads = types.SimpleNamespace(device=torch.device(device), dtype=torch.float32, shape=(1, 2, 8, 16))
    heads.size = heads.shape.__getitem__
    return functional.choose_path("f", path, heads, heads, gradient=False, obstacle=obstacle)


def test_auto_is_what_set_kernel_says(fresh_choice):
    assert choose() == "sdpa"
    for name in IN_TORCH:
        functional.set_kernel(name)
        assert choose() == name and choose("reference") == "reference"
    raises("kernel 'fast' is none of auto, triton, sdpa, blocks, reference", functional.set_kernel, "fast")


@needs_triton
def test_triton_falls_back_aloud_and_once(fresh_choice, monkeypatch):
    functional.set_kernel("triton")
    assert choose() == "triton"
    assert [choose(obstacle="too wide") for _ in range(3)] == ["sdpa"] * 3
    assert fresh_choice() == ["f takes torch's attention, not triton: too wide"]
    x = torch.randn(1, 2, 5, 16, device=DEVICE, dtype=torch.float64)
    mea_attention(x, x, x)
    assert "do not compute in torch.float64" in fresh_choice()[1]
    monkeypatch.setattr(functional, "triton_obstacle", lambda *_: "there is no GPU")
    raises("kernel 'triton' cannot run here: there is no GPU", functional.set_kernel, "triton")


def test_the_log_says_once_that_the_kernels_are_untimed(fresh_choice):
    assert [choose(device="cuda") for _ in range(2)] == ["sdpa"] * 2
    assert ["have not been timed on a GPU" in message for message in fresh_choice()] == [True]


@needs_triton
def test_triton_without_tuples_of_arguments_is_too_old(monkeypatch):
    monkeypatch.setattr(kernels.triton, "__version__", "3.2.0")
    assert kernels.triton_obstacle(torch.device(DEVICE), torch.float32, 16) == "triton 3.2.0 is older than 3.3"
    monkeypatch.setattr(kernels.triton, "__version__", "3.10.0+git1234")
    assert kernels.triton_obstacle(torch.device(DEVICE), torch.float32, 16) is None


@pytest.mark.parametrize("version, faulty", [("2.11.0", True), ("2.12.0", False)])
def test_old_mps_takes_the_formula_where_its_fused_attention_errs(version, faulty, monkeypatch):
    """Grouped heads, values of another width, and absorbed components of other numbers; nothing else."""
    called, sdpa, wrong = [], F.scaled_dot_product_attention, functional.sdpa_is_wrong
    monkeypatch.setattr(functional, "sdpa_is_wrong", lambda device, *sizes: wrong(torch.device("mps"), *sizes))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **b: called.append(1) or sdpa(*a, **b))
    for n, Dv, n_v, errs in [(4, 8, 2, False), (2, 8, 3, True), (4, 16, 1, True)]:
        q, k, v = attention_problem(2, 9, 9, 4, n, 8, Dv)
        assert_close(causal_attention(q, k, v, path="sdpa"), causal_attention(q, k, v, path="reference"))
        q, k, v, compose_k, compose_v, _ = random_problem(1, 9, 8, 4, 2, n_v, False)
        exact = mea_attention(q, k, v, compose_k, compose_v, path="reference")
        fused = len(called)
        assert_close(absorbed_attention(q, k, v, compose_k, compose_v), exact)
        # absorbed attention falls back on composed heads, which are neither grouped nor of another width
        assert (fused, len(called)) == ((0, 1) if errs and faulty else (1, 2))
        called.clear()


Q, K, V, COMPOSE_K, COMPOSE_V, NORM = random_problem(2, 6, 16, 4, 2, 3, True)
WIDE, EYE = torch.zeros(1, 20, 1, 128, device=DEVICE), torch.eye(20, device=DEVICE)
REFUSED = [
    (mea_attention, (Q, K, V), "auto", "2 key heads for 4 query heads need a composition matrix"),
    (mea_attention, (Q, K, V, COMPOSE_V, COMPOSE_K), "auto", r"a composition matrix of \(2, 4\), not \(3, 4\)"),
    (mea_attention, (Q, K, V, COMPOSE_K, COMPOSE_V, NORM[:2]), "auto", r"norm_weight is \(2, 16\), not \(4, 16\)"),
    (mea_attention, (Q, K[:, :, :5], V[:, :, :5], COMPOSE_K, COMPOSE_V), "auto", "6 queries but 5 keys"),
    (mea_attention, (Q, K.double(), V, COMPOSE_K, COMPOSE_V), "auto", "must have one dtype"),
    (mea_attention, (Q, K, V[..., :8], COMPOSE_K, COMPOSE_V), "auto", r"values \(2, 3, 6, 8\) do not go with queries"),
    (mea_attention, (Q, K, V, COMPOSE_K, COMPOSE_V), "fast", "'fast' is none of"),
    (mea_decode, (Q, K, V, COMPOSE_K, COMPOSE_V), "auto", "one position"),
    (causal_attention, (Q, K, V), "reference", "do not fit"),
    (mea_attention, in_fp64([Q, Q, Q]), "triton", "not possible: the kernels do not compute in torch.float64"),
    (mea_decode, (WIDE, WIDE, WIDE, EYE, EYE), "triton", "20 key and 20 value components of width 128 do not fit"),
]


@pytest.mark.parametrize("function, arguments, path, message", REFUSED, ids=[case[-1] for case in REFUSED])
def test_wrong_arguments_are_refused_with_what_is_wrong(function, arguments, path, message):
    if path == "triton" and NO_KERNELS:
        pytest.skip(NO_KERNELS)
    raises(message, function, *arguments, path=path)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_every_path_honours_eps_and_autocast(path):
    inputs = random_problem(1, 9, 16, 4, 2, 2, True)
    out = mea_attention(*inputs, eps=10.0, path=path)
    assert_close(out, mea_attention(*inputs, eps=10.0, path="reference"))
    assert not torch.allclose(out, mea_attention(*inputs, path=path))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert mea_attention(*inputs, path=path).dtype == torch.bfloat16
        assert mea_decode(inputs[0][:, :, -1:], *inputs[1:], path=path).dtype == torch.bfloat16


def test_importing_never_needs_triton():
    script = (
        "import sys; sys.modules['triton'] = None; import torch, functional, kernels; x = torch.randn(1, 2, 3, 16)\n"
        "print(kernels.triton, functional.mea_attention(x, x, x).shape, functional.mea_decode(x[:, :, :1], x, x).shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("None torch.Size([1, 2, 3, 16])"), done.stderr


@needs_triton
@pytest.mark.parametrize("norm", [True, False])
def test_the_operators_pass_opcheck(norm):
    torch.use_deterministic_algorithms(False)  # opcheck compares the contents of empty tensors
    q, k, v, _, _, gain = random_problem(1, 20, 16, 2, 2, 2, norm, composed=False)
    out, pre_norm, log_sum_exp = kernels.attention_op(q, k, v, gain, 1e-6, True)
    given = (out, q, k, v, gain, pre_norm if norm else out, log_sum_exp, 1e-6)
    torch.library.opcheck(kernels.attention_backward_op, given)
    torch.library.opcheck(kernels.decode_op, (q[:, :, :1], k, v, None, None, gain, None, 1e-6))
    inputs = [x if x is None else x.requires_grad_() for x in (q, k, v, gain)]
    torch.library.opcheck(kernels.attention_op, (*inputs, 1e-6, True))


@needs_triton
@pytest.mark.filterwarnings("error:Dynamo detected")  # it should not trace how a path is chosen
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", ["triton", "auto"])
def test_works_under_torch_compile_without_graph_breaks(backend, path):
    torch._dynamo.reset()
    compiled = lambda step: torch.compile(step, backend=backend, fullgraph=True)
    inputs = [x.requires_grad_() for x in random_problem(1, 20, 16, 4, 2, 2, True)]
    step = lambda *inputs: mea_attention(*inputs, path=path).square().sum()
    gradients = (torch.autograd.grad(function(*inputs), inputs) for function in (compiled(step), step))
    for got, eager in zip(*gradients):
        assert_close(got, eager, rtol=1e-5, atol=1e-4)  # inductor adds in another order
    with torch.no_grad():
        one = lambda *inputs: mea_decode(inputs[0][:, :, -1:], *inputs[1:], path=path)
        assert_close(compiled(one)(*inputs), one(*inputs))


# ---- what only a GPU can show: pytest -m gpu ------------------------------------------------------------------------


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU")(test))


TOLERANCE = {torch.float32: 3e-3, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # float32 is tf32 on tensor cores


@on_a_gpu
@pytest.mark.parametrize("path", ["triton", "sdpa", "blocks"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, D", [(1, 16), (77, 80), (129, 64), (1000, 128), (2048, 32)])
def test_outputs_and_gradients_equal_the_formula_in_float64(T, D, dtype, path):
    torch.manual_seed(0)
    inputs = [random_heads(2, 6, T, D, dtype), random_heads(2, 3, T, D, dtype), random_heads(2, 2, T, D, dtype)]
    inputs += [torch.randn(n, 6, device="cuda") for n in (3, 2)] + [torch.randn(6, D, device="cuda")]
    g = torch.randn(2, 6, T, D, device="cuda")

    def run(tensors, path):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = mea_attention(*leaves, path=path)
        return [out, *torch.autograd.grad(out, leaves, g.to(out.dtype))]

    exact = run([x.double() for x in inputs], "reference")
    for got, wanted in zip(run(inputs, path), exact):
        assert relative_error(got, wanted) < TOLERANCE[dtype] * (1 if T > 1 else 4)


@on_a_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("S, n", [(1, 4), (300, 2), (5000, 1), (70000, 2)])
def test_ragged_decoding_equals_the_formula_in_float64(S, n, dtype):
    torch.manual_seed(0)
    inputs = [random_heads(3, 8, 1, 64, dtype), random_heads(3, n, S, 64, dtype), random_heads(3, n, S, 64, dtype)]
    inputs += [torch.randn(n, 8, device="cuda"), torch.randn(n, 8, device="cuda"), torch.randn(8, 64, device="cuda")]
    lengths = torch.tensor([S, max(1, S // 3), 1], device="cuda")
    exact = mea_decode(*(x.double() for x in inputs), lengths=lengths, path="reference")
    assert relative_error(mea_decode(*inputs, lengths=lengths, path="triton"), exact) < TOLERANCE[dtype]


@on_a_gpu
@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("attention", ["mha", "mea", "dfa", "tha"])
def test_a_compiled_model_has_the_loss_and_gradients_of_the_plain_one(attention, kernel, monkeypatch):
    monkeypatch.setattr(functional, "_kernel", kernel)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=64, n_layer=2, n_head=4, n_embd=128, block_size=96, attention=attention)
    model, tokens = GPT(config).cuda(), torch.randint(64, (2, 97), device="cuda")

    def gradients(function):
        loss = function(tokens[:, :-1], tokens[:, 1:])[1]
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for plain, compiled in zip(gradients(model), gradients(torch.compile(model))):
        assert relative_error(compiled, plain.double()) < 5e-3


# ---- compiled ahead of time, in a process without the interpreter ---------------------------------------------------


def run_without_interpreter(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


COMPILE = """
import json, sys
from experiments import roofline
for launched in roofline.record_launches(roofline.TARGETS[sys.argv[1]][3] * 1024, D=int(sys.argv[2])):
    row = roofline.compile_ahead(sys.argv[1], *launched)
    row["wgmma"] = row.pop("asm").count("wgmma.mma_async")
    print(json.dumps(row))
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("D", [16, 64, 80, 128])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_for_gpus_that_are_not_here(target, D):
    printed = run_without_interpreter("-c", COMPILE, target, str(D))
    rows = {row["kernel"]: row for row in map(json.loads, printed)}
    assert set(rows) == {"forward", "backward_prepare", "backward_dkdv", "backward_dq", "decode", "combine"}
    for name, row in rows.items():
        assert row["spill_bytes"] <= (8 if (target, D) == ("sm_100", 16) else 0), (name, row)
        assert row["shared_bytes"] <= roofline.TARGETS[target][3] * 1024, (name, row)
        if name in ("forward", "backward_dkdv", "backward_dq", "decode"):
            assert row["matrix"] > 0, (name, row)
            assert row["async_copies"] > 0 or target == "gfx942", (name, row)
        if target == "sm_90" and name in ("forward", "backward_dkdv", "backward_dq"):
            assert row["wgmma"] > 0, (name, row)


@needs_triton
@pytest.mark.slow
def test_the_compiled_loops_move_the_bytes_and_do_the_work_of_the_cost_model():
    """The decode kernel's loop copies each key block of the compressed cache exactly once, for all heads together."""
    printed = run_without_interpreter("experiments/roofline.py", "--targets", "sm_80,sm_90")
    rows = [line.strip("| ").split(" | ")[2:] for line in printed if line.startswith("| sm_")][-16:]
    assert len(rows[0]) == 5
    for kernel, *numbers in rows:
        model_bytes, compiled_bytes, model_flops, compiled_flops = map(float, numbers)
        assert compiled_flops == model_flops, kernel
        # dk/dv copies its rows' log-sum-exp and delta once for each warp that needs them.
        assert compiled_bytes == model_bytes or kernel == "backward_dkdv" and compiled_bytes <= model_bytes + 2
