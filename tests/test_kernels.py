"""kernels.py against the formulas in fp64: every path and gradient, odd lengths; compiled for GPUs not here."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
import kernels
from attention import compose_heads
from experiments import aot
from kernels import (
    absorbed_attention,
    causal_attention,
    linear_cross_entropy,
    mea_attention,
    mea_decode,
    rms_norm,
)

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
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
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builtin = {name: getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl", "create_fp_to_fp")}

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, d, *arguments):
        return builtin["create_dot"](self, widen(a), widen(b), d, *arguments)

    def convert(name):
        def cast(self, source, target, *arguments):
            if target.scalar == tl.bfloat16:
                rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
                return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
            return builtin[name](self, widen(source), target, *arguments)

        return cast

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    for name in ("cast_impl", "create_fp_to_fp"):
        monkeypatch.setattr(InterpreterBuilder, name, convert(name))


# ---- prefill and its gradients --------------------------------------------------------------------------------------


def check_attention(path, forward_bound, gradient_bound, *problem, dtype=torch.float32, composed=True):
    """Forward and all gradients against autograd through the reference in fp64."""
    inputs = [x if x is None else x.requires_grad_() for x in random_problem(*problem, dtype=dtype, composed=composed)]
    exact_inputs = in_fp64(inputs)
    out, exact = mea_attention(*inputs, path=path), mea_attention(*exact_inputs, path="reference")
    assert out.dtype == dtype and not out.isnan().any()
    assert relative_error(out, exact) < forward_bound
    gradient = torch.randn_like(exact)
    wanted = [i for i, x in enumerate(inputs) if x is not None]
    gradients = torch.autograd.grad(out, [inputs[i] for i in wanted], gradient.to(dtype))
    exact_gradients = torch.autograd.grad(exact, [exact_inputs[i] for i in wanted], gradient)
    for i, got, true in zip(wanted, gradients, exact_gradients):
        name = ("q", "k", "v", "compose_k", "compose_v", "norm_weight")[i]
        assert not got.isnan().any(), name
        if name.startswith("compose") and dtype != torch.float32:
            continue  # torch's matmul of what the kernels return: under a norm a sum that cancels, with few digits left
        # Some gradients are sums that cancel to (almost) 0: those through the softmax of one position, and that of
        # compose_v where a norm follows one value component, whose scale it removes. Compare with the gradient of v.
        B, T, D, H, n_k, n_v, norm = problem
        cancels = T == 1 or name == "compose_v" and n_v == 1 and norm
        scale = max(true.norm(), exact_gradients[2].norm()) if cancels else true.norm()
        assert ((got.double() - true).norm() / scale).item() < gradient_bound, name


FEW = [(2, 77, 32, 4, 2, 2, True), (1, 128, 64, 2, 2, 1, False), (1, 17, 80, 4, 3, 2, True), (3, 1, 16, 3, 1, 2, True)]
GRID = [
    (B, T, D, H, n, n, norm)
    for T in (1, 17, 64, 77, 128)
    for D in (16, 32, 64, 80)
    for H, n in ((4, 4), (4, 2), (8, 3), (6, 1))
    for norm in (True, False)
    for B in (1, 3)
]


@needs_triton
@pytest.mark.parametrize("problem", FEW, ids=str)
def test_fused_attention_and_its_gradients_equal_the_reference(problem):
    check_attention("triton", 1e-5, 1e-5, *problem)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("problem", GRID, ids=str)
def test_fused_attention_and_its_gradients_equal_the_reference_everywhere(problem):
    check_attention("triton", 1e-5, 1e-5, *problem)


@needs_triton
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param((1, 300, 64, 1, 1, 1, True), id="several blocks"),
        pytest.param((1, 200, 128, 1, 1, 1, True), id="widest head"),
    ],
)
def test_the_tiles_of_half_precision_give_the_same_numbers(problem):
    check_attention("triton", 2e-3, 5e-3, *problem, dtype=torch.float16, composed=False)


@needs_triton
@pytest.mark.parametrize(
    "problem", [FEW[0], *(pytest.param(p, marks=pytest.mark.slow) for p in GRID if p[0] == 1 < p[1])], ids=str
)
def test_bf16_equals_the_reference(problem, exact_bf16):
    check_attention("triton", 5e-3, 2e-2, *problem, dtype=torch.bfloat16)


@pytest.mark.parametrize("path", IN_TORCH)
@pytest.mark.parametrize("problem", FEW, ids=str)
def test_the_paths_in_torch_equal_the_reference(problem, path):
    check_attention(path, 1e-5, 1e-5, *problem)


def strided_forms(x):
    """The same numbers in other memory: sliced, reversed in its dimensions, and, where rows repeat, expanded."""
    if x is None:
        return [None] * 2
    sliced = torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]
    return [sliced, x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))]


@pytest.mark.parametrize("path", EVERY_PATH)
def test_any_strides_of_any_argument_give_the_same_numbers_and_gradients(path):
    problem = random_problem(2, 40, 16, 4, 2, 3, True)
    grad_out = random_heads(2, 4, 40, 16)
    lengths = torch.tensor([40, 7], device=DEVICE)

    def results(problem, grad_out, lengths):
        inputs = [x.detach().requires_grad_() for x in problem]
        out = mea_attention(*inputs, path=path)
        step = mea_decode(problem[0][:, :, -1:], *problem[1:], lengths=lengths, path=path)
        return out, step, *torch.autograd.grad(out, inputs, grad_out)

    expected = results(problem, grad_out, lengths)
    for form in (0, 1):
        strided = [strided_forms(x)[form] for x in problem]
        got = results(strided, strided_forms(grad_out)[form], strided_forms(lengths)[0])
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    row = [*problem[:5], problem[5][:1].expand(4, 16)]  # one gain for all heads, and one gradient for all positions
    dense = [*row[:5], row[5].contiguous()]
    grad_out = grad_out[:, :, :1].expand_as(grad_out)
    for a, b in zip(results(row, grad_out, lengths), results(dense, grad_out.contiguous(), lengths)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
def test_joining_the_heads_of_the_fused_output_is_a_view():
    q, k, v, _, _, gain = random_problem(2, 40, 16, 3, 3, 3, True)
    out = mea_attention(q, k, v, None, None, gain, path="triton")
    assert out.transpose(1, 2).reshape(2, 40, 48).data_ptr() == out.data_ptr()


def test_composing_folded_heads_is_the_same_as_passing_none():
    q, k, v, compose_k, compose_v, norm_weight = random_problem(2, 20, 16, 4, 2, 3, True)
    composed = mea_attention(q, compose_heads(k, compose_k), compose_heads(v, compose_v), norm_weight=norm_weight)
    torch.testing.assert_close(mea_attention(q, k, v, compose_k, compose_v, norm_weight), composed)


def test_compose_heads_is_equation_10_and_the_norm_makes_unit_mean_squares():
    x, weight = random_heads(2, 3, 5, 8), torch.randn(3, 4, device=DEVICE)
    torch.testing.assert_close(compose_heads(x, weight), torch.einsum("bntd,nh->bhtd", x, weight))
    normed = rms_norm(x, torch.ones(3, 1, 8, device=DEVICE), eps=0.0)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(2, 3, 5, device=DEVICE))


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
    monkeypatch.setattr(kernels, "KEPT", 512 if request.param == "kept" else 0)
    monkeypatch.setattr(kernels, "TILE", 2**14)
    return request.param


# B, T, S, H, n, D, Dv: whole blocks, one row more, one query, a cache in front, grouped queries, DFA's wide values
SHAPES = [
    (2, 128, 128, 3, 3, 16, 16),
    (1, 129, 129, 4, 2, 8, 8),
    (2, 1, 1, 2, 2, 8, 8),
    (2, 1, 70, 4, 1, 8, 8),
    (1, 77, 200, 6, 2, 8, 16),
    (3, 191, 191, 2, 1, 5, 10),
]


@pytest.mark.parametrize("path", ["sdpa", "blocks"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal_attention_and_its_gradients_equal_the_formula(shape, path, weights):
    inputs = attention_problem(*shape)
    for got, exact in zip(gradients(inputs, path), gradients(inputs, "reference")):
        error = (got - exact).norm() / max(exact.norm(), 1.0)  # the gradients of a softmax over one key are 0
        assert error < (1e-14 if path == "blocks" else 1e-13)


@pytest.mark.parametrize("path", ["sdpa", "blocks", "reference"])
def test_rows_of_different_length_see_nothing_behind_their_positions(path, weights):
    q, k, v = attention_problem(2, 3, 90, 4, 2, 8, 16)
    positions = torch.tensor([[87, 88, 89], [5, 6, 7]], device=DEVICE)
    exact = [
        gradients((q[b : b + 1], k[b : b + 1, :, :stop], v[b : b + 1, :, :stop]), "reference")[0]
        for b, stop in ((0, 90), (1, 8))
    ]
    k, v = k.detach().clone(), v.detach().clone()
    k[1, :, 8:], v[1, :, 8:] = 1e3, -1e3
    out = causal_attention(q, k, v, positions, path=path)
    torch.testing.assert_close(out, torch.cat(exact), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("positions", [None, torch.tensor([[5, 6], [2, 3]])], ids=["full", "ragged"])
def test_absorbed_attention_is_attention_with_composed_heads(positions):
    q, k, v = attention_problem(2, 2, 7, 4, 2, 8, 8)
    compose_k, compose_v = (torch.randn(2, 4, dtype=torch.float64, device=DEVICE) for _ in "kv")
    positions = positions if positions is None else positions.to(DEVICE)
    exact = causal_attention(q, compose_heads(k, compose_k), compose_heads(v, compose_v), positions, path="reference")
    k, v = k.detach().clone(), v.detach().clone()
    if positions is not None:
        k[1, :, 4:], v[1, :, 4:] = 1e3, -1e3
    torch.testing.assert_close(absorbed_attention(q, k, v, compose_k, compose_v, positions), exact)


def test_blocks_pass_gradcheck_and_a_second_backward(weights, monkeypatch):
    inputs = attention_problem(1, 70, 70, 2, 1, 2, 3)
    attend = lambda q, k, v: causal_attention(q, k, v, path="blocks")[:, :, ::9]
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)
    shared = lambda x: causal_attention(x, x, x, path="blocks").square().sum()
    x = inputs[0]
    exact = torch.autograd.grad(causal_attention(x, x, x, path="reference").square().sum(), x)[0]
    loss = shared(x)
    monkeypatch.setattr(kernels, "TILE", 1)  # the number of threads may change before the backward pass
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], exact)


@pytest.mark.parametrize("path", IN_TORCH)
def test_no_query_sees_a_later_key(path):
    q, k, v = attention_problem(1, 150, 150, 2, 2, 8, 8)
    out = causal_attention(q, k, v, path=path)
    for t in (0, 63, 64, 148):
        later = torch.autograd.grad(out[:, :, t].sum(), (k, v), retain_graph=True)
        assert all(g[:, :, t + 1 :].eq(0).all() for g in later) and later[1][:, :, t].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 4.0, 100.0])
def test_blocks_are_as_accurate_as_torchs_fused_attention(dtype, size, weights):
    """Against float64: the output, and the three gradients together."""
    inputs = attention_problem(2, 300, 300, 4, 4, 32, 32, dtype, size)
    exact = gradients([x.detach().double().requires_grad_() for x in inputs], "reference")
    errors = {}
    for path in ("blocks", "sdpa"):
        out, *got = (relative_error(a, b) for a, b in zip(gradients(inputs, path), exact))
        errors[path] = out, sum(got)
    assert errors["blocks"][0] < 1.1 * errors["sdpa"][0] and errors["blocks"][1] < 1.1 * errors["sdpa"][1]


def test_blocks_hold_where_logits_are_huge(weights):
    """Torch's fused backward on a CPU takes exp(score - log-sum-exp) of rounded scores, which are far apart at 1e4."""
    inputs = attention_problem(1, 200, 200, 2, 2, 16, 16, torch.float32, 1e4)
    exact = gradients([x.detach().double().requires_grad_() for x in inputs], "reference")
    for got, true in zip(gradients(inputs, "blocks"), exact):
        assert got.isfinite().all() and relative_error(got, true) < 0.05


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
    torch.testing.assert_close(out, exact)
    for got, true in zip(*(torch.autograd.grad(y, (q, k, v), gradient) for y in (out, exact))):
        torch.testing.assert_close(got, true)
    assert not torch.equal(out, causal_attention(q, k, v, dropout=0.25, path="blocks"))


# ---- decode ---------------------------------------------------------------------------------------------------------


def check_decode(path, bound, B, S, D, H, n_k, n_v, norm, composed=True, dtype=torch.float32, lengths=None):
    """One step against the last row of attention without a cache. Positions past a row's length hold NaN and inf."""
    q, k, v, *weights = random_problem(B, S, D, H, n_k, n_v, norm, composed, dtype)
    lengths = torch.full((B,), S) if lengths is None else torch.tensor(lengths)
    cached_k, cached_v = k.clone(), v.clone()
    for b, length in enumerate(lengths.tolist()):
        cached_k[b, :, length:], cached_v[b, :, length:] = float("nan"), float("inf")
    last = torch.stack([q[b, :, length - 1 : length] for b, length in enumerate(lengths.tolist())])
    given = None if (lengths == S).all() else lengths.to(DEVICE)
    out = mea_decode(last, cached_k, cached_v, *weights, lengths=given, path=path)
    assert out.shape == (B, H, 1, D) and out.dtype == dtype
    exact = mea_attention(*in_fp64([q, k, v, *weights]), path="reference")
    exact = torch.stack([exact[b, :, length - 1 : length] for b, length in enumerate(lengths.tolist())])
    assert relative_error(out, exact) < bound


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


# ---- dispatch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, C, V", [(1, 3, 2), (37, 5, 11), (600, 8, 2000)])
def test_the_loss_in_pieces_and_its_gradients_equal_cross_entropy(N, C, V, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 16 * V)  # pieces of 16 rows
    torch.manual_seed(0)
    x, weight, targets = torch.randn(N, C).double(), torch.randn(V, C).double(), torch.randint(V, (N,))
    x[0] *= 1e3  # logits of thousands
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    exact = torch.nn.functional.cross_entropy(x @ weight.T, targets)
    loss = linear_cross_entropy(x, weight, targets)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12)
    for got, wanted in zip(torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * exact, inputs)):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets).item() == loss.item()


def test_the_loss_in_pieces_rounds_no_more_than_cross_entropy_in_bf16():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(3000, 32), torch.randn(700, 32), torch.randint(700, (3000,))
    inputs = [x.requires_grad_(), weight.requires_grad_()]

    def gradients(function, dtype):
        return torch.autograd.grad(function(x.to(dtype), weight.to(dtype), targets), inputs)

    plain = lambda x, weight, targets: torch.nn.functional.cross_entropy((x @ weight.T).float(), targets)
    exact = gradients(lambda *inputs: torch.nn.functional.cross_entropy(inputs[0] @ inputs[1].T, targets), torch.double)
    ours, theirs = gradients(linear_cross_entropy, torch.bfloat16), gradients(plain, torch.bfloat16)
    for got, other, wanted in zip(ours, theirs, exact):
        assert relative_error(got, wanted) < 1.05 * relative_error(other, wanted)


@pytest.mark.skipif(DEVICE == "cuda", reason="blocks are a CPU's")
def test_auto_takes_blocks_where_they_are_faster(monkeypatch):
    taken = []
    monkeypatch.setattr(kernels, "block_attention", lambda *_: taken.append("blocks"))
    monkeypatch.setattr(kernels, "fused_attention", lambda *_: taken.append("sdpa"))

    def path(T, dtype, B=16, grad=True, positions=None, S=None):
        q = torch.empty(B, 8, T, 16, dtype=dtype, requires_grad=grad)
        k = torch.empty(B, 8, S or T, 16, dtype=dtype)
        causal_attention(q, k, k, positions)
        return taken.pop()

    assert path(512, torch.bfloat16) == path(128, torch.bfloat16) == path(512, torch.float32) == "blocks"
    assert path(1024, torch.bfloat16) == path(256, torch.float32) == "sdpa"  # slower there
    assert path(512, torch.bfloat16, grad=False) == path(64, torch.bfloat16, B=1) == "sdpa"
    assert path(512, torch.bfloat16, positions=torch.zeros(16, 512).long()) == "sdpa"
    monkeypatch.setattr(kernels, "_kernel", "sdpa")
    assert path(512, torch.bfloat16) == "sdpa"


def test_auto_is_what_set_kernel_says_and_falls_back_aloud(caplog, monkeypatch):
    monkeypatch.setattr(kernels, "_kernel", "auto")
    kernels.say_once.cache_clear()
    x = torch.randn(1, 2, 5, 16, device=DEVICE)
    choose = lambda path="auto", obstacle=None: kernels.choose_path("f", path, x.device, x.dtype, 16, obstacle)
    assert choose() == "auto"
    for name in IN_TORCH:
        kernels.set_kernel(name)
        assert choose() == name and choose("reference") == "reference"
    with pytest.raises(ValueError, match="kernel 'fast' is none of auto, triton, sdpa, blocks, reference"):
        kernels.set_kernel("fast")
    if kernels.triton is None:
        return
    kernels.set_kernel("triton")
    assert choose() == "triton"
    with caplog.at_level(logging.WARNING, logger="kernels"):
        for _ in range(3):
            assert choose(obstacle="too wide") == "auto"
    assert [record.message for record in caplog.records] == ["f takes torch's attention, not triton: too wide"]
    mea_attention(x.double(), x.double(), x.double())  # a dtype without a kernel
    monkeypatch.setattr(kernels, "triton_obstacle", lambda *_: "there is no GPU")
    with pytest.raises(ValueError, match="kernel 'triton' cannot run here: there is no GPU"):
        kernels.set_kernel("triton")


def test_the_log_says_once_that_the_kernels_are_untimed(caplog, monkeypatch):
    monkeypatch.setattr(kernels, "_kernel", "auto")
    kernels.say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels"):
        for _ in range(2):
            assert kernels.choose_path("f", "auto", torch.device("cuda"), torch.bfloat16, 64) == "auto"
    assert ["have not been timed on a GPU" in record.message for record in caplog.records] == [True]


def test_wrong_arguments_are_refused_with_what_is_wrong():
    q, k, v, compose_k, compose_v, norm_weight = random_problem(2, 6, 16, 4, 2, 3, True)
    for arguments, message in [
        ((q, k, v), "2 key heads for 4 query heads need a composition matrix"),
        ((q, k, v, compose_v, compose_k), r"a composition matrix of \(2, 4\), not \(3, 4\)"),
        ((q, k, v, compose_k, compose_v, norm_weight[:2]), r"norm_weight is \(2, 16\), not \(4, 16\)"),
        ((q, k[:, :, :5], v[:, :, :5], compose_k, compose_v), "6 queries but 5 keys"),
        ((q, k.double(), v, compose_k, compose_v), "must have one dtype"),
        ((q, k, v[..., :8], compose_k, compose_v), r"values \(2, 3, 6, 8\) do not go with queries"),
    ]:
        with pytest.raises(ValueError, match=message):
            mea_attention(*arguments)
    with pytest.raises(ValueError, match="'fast' is none of"):
        mea_attention(q, k, v, compose_k, compose_v, path="fast")
    with pytest.raises(ValueError, match="one position"):
        mea_decode(q, k, v, compose_k, compose_v)
    if kernels.triton is None:
        return  # what follows is why the kernels refuse; without triton there are none
    with pytest.raises(ValueError, match="path='triton' is not possible: the kernels do not compute in torch.float64"):
        mea_attention(*in_fp64([q, k, v, compose_k, compose_v]), path="triton")
    wide = torch.randn(1, 20, 1, 128, device=DEVICE)
    with pytest.raises(ValueError, match="20 key and 20 value components of width 128 do not fit"):
        mea_decode(wide, wide, wide, torch.eye(20, device=DEVICE), torch.eye(20, device=DEVICE), path="triton")


def test_every_path_honours_eps_and_autocast():
    inputs = random_problem(1, 9, 16, 4, 2, 2, True)
    for path in IN_TORCH + (["triton"] if kernels.triton else []):
        out = mea_attention(*inputs, eps=10.0, path=path)
        torch.testing.assert_close(out, mea_attention(*inputs, eps=10.0, path="reference"))
        assert not torch.allclose(out, mea_attention(*inputs, path=path))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert mea_attention(*inputs).dtype == mea_decode(inputs[0][:, :, -1:], *inputs[1:]).dtype == torch.bfloat16


def test_importing_never_needs_triton():
    script = (
        "import sys; sys.modules['triton'] = None; import torch, kernels; x = torch.randn(1, 2, 3, 16)\n"
        "print(kernels.triton, kernels.mea_attention(x, x, x).shape, kernels.mea_decode(x[:, :, :1], x, x).shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("None torch.Size([1, 2, 3, 16])"), done.stderr


@needs_triton
@pytest.mark.parametrize("norm", [True, False])
def test_the_operators_pass_opcheck(norm):
    torch.use_deterministic_algorithms(False)  # opcheck compares the contents of empty tensors
    q, k, v, _, _, gain = [
        x if x is None else x.requires_grad_() for x in random_problem(1, 20, 16, 2, 2, 2, norm, composed=False)
    ]
    torch.library.opcheck(kernels.flash, (q, k, v, gain, 1e-6, True))
    with torch.no_grad():
        out, pre_norm, log_sum_exp = kernels.flash(q, k, v, gain, 1e-6, True)
        grad_inputs = (out, q, k, v, gain, pre_norm if norm else out, log_sum_exp, 1e-6)
        torch.library.opcheck(
            kernels.flash_grad, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in grad_inputs)
        )
        q, k, v, gain = (x if x is None else x.detach() for x in (q, k, v, gain))
        torch.library.opcheck(kernels.decode, (q[:, :, :1], k, v, None, None, gain, None, 1e-6))


@needs_triton
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", ["triton", "auto"])
def test_works_under_torch_compile_without_graph_breaks(backend, path):
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in random_problem(1, 20, 16, 4, 2, 2, True)]
    step = lambda *inputs: mea_attention(*inputs, path=path).square().sum()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    compiled_gradients = torch.autograd.grad(compiled(*inputs), inputs)
    for got, eager in zip(compiled_gradients, torch.autograd.grad(step(*inputs), inputs)):
        torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-4)  # inductor adds in another order
    with torch.no_grad():
        one = lambda *inputs: mea_decode(inputs[0][:, :, -1:], *inputs[1:], path=path)
        torch.testing.assert_close(torch.compile(one, backend=backend, fullgraph=True)(*inputs), one(*inputs))


# ---- compiled ahead of time, in a process without the interpreter ---------------------------------------------------


def run_without_interpreter(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


COMPILE = """
import json, sys
from attention import compose_heads
from experiments import aot
for launched in aot.record_launches(aot.TARGETS[sys.argv[1]][3] * 1024, D=int(sys.argv[2])):
    row = aot.compile_ahead(sys.argv[1], *launched)
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
        assert row["shared_bytes"] <= aot.TARGETS[target][3] * 1024, (name, row)
        if name in ("forward", "backward_dkdv", "backward_dq", "decode"):
            assert row["matrix"] > 0, (name, row)
            assert row["async_copies"] > 0 or target == "gfx942", (name, row)
        if target == "sm_90" and name in ("forward", "backward_dkdv", "backward_dq"):
            assert row["wgmma"] > 0, (name, row)


@needs_triton
@pytest.mark.slow
def test_the_compiled_loops_move_the_bytes_and_do_the_work_of_the_cost_model():
    """The decode kernel's loop copies each key block of the compressed cache exactly once, for all heads together."""
    table = [
        line.strip("| ").split(" | ")
        for line in run_without_interpreter("experiments/bench.py", "--aot", "sm_80,sm_90")
    ]
    rows = [(row[2], *map(float, row[3:])) for row in table if row[0].startswith("sm_")]
    assert len(rows) == 2 * 2 * 4
    for kernel, model_bytes, compiled_bytes, model_flops, compiled_flops in rows:
        assert compiled_flops == model_flops, kernel
        # dk/dv copies its rows' log-sum-exp and delta once for each warp that needs them.
        assert compiled_bytes == model_bytes or kernel == "backward_dkdv" and compiled_bytes <= model_bytes + 2
