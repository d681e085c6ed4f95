"""Fused attention for Multi-head Explicit Attention (MEA): prefill, backward and decode in Triton.

MEA (arXiv 2601.19611, eq. 10-12) projects `Hc` component heads, mixes them into `H` composite heads with one learned (Hc, H)
matrix for keys and one for values, attends causally, and normalises the output of every head by itself:

    K_h = sum_c compose_k[c, h] K_c     V_h = sum_c compose_v[c, h] V_c     y_h = RMSNorm(softmax(q_h K_h^T / sqrt(D)) V_h) * gain_h

Where to mix follows from what must be read:

- Prefill and training (`mea_attention`) mix first, in one small matmul, and then run one flash-attention kernel whose epilogue is
  the norm. Mixing tiles inside that kernel looks more fused and is slower: each of the T / BLOCK_M query blocks of each head would
  reload and remix all Hc component tiles, Hc times the traffic of the attention itself. Where the matrices were folded into the
  projections nothing is left to mix: pass None.
- Decoding (`mea_decode`) is bound by reading the cache, so it never builds a composite head. The mix is linear, hence
      q_h . K_h[s] = sum_c compose_k[c, h] (q_h . K_c[s])   and   sum_s p[h, s] V_h[s] = sum_c compose_v[c, h] (sum_s p[h, s] V_c[s]):
  a program that holds the queries of all heads reads every cached byte once and uses it for all of them.

The backward pass is FlashAttention-2's (arXiv 2307.08691, section 3.1) with the norm's gradient in the pass that prepares it. Scores
are kept in units of log 2: the hardware has exp2, not exp.

Both functions know three paths to the same numbers: "triton" (a GPU; or, for tests, a CPU with TRITON_INTERPRET=1), "sdpa" (torch's
fused attention) and "reference" (the formulas above). Read next: attention.py.

    python kernels.py                      # which path this machine takes, and a numeric check of each path it has
    python kernels.py --aot sm_80,sm_90    # compile for GPUs that need not be here: registers, shared memory, instructions
"""
import argparse
import functools
import logging
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no Triton on this machine: the kernels below are then plain functions that nothing calls
    triton, tl, jit = None, SimpleNamespace(constexpr=int), lambda function: function

log = logging.getLogger(__name__)

# ---- tiles ----------------------------------------------------------------------------------------------------------------
# Tensors are (B, H, T, D) with any strides. A tile is BLOCK rows of one head by WIDTH columns, the power of two from D on.


@jit
def load_tile(tensor, b, h, start, strides, T, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Rows start .. start + BLOCK. Past T they repeat the last row: that costs less than a mask, and the callers hide them."""
    rows, columns = tl.minimum(tl.arange(0, BLOCK), T - 1 - start)[:, None], tl.arange(0, WIDTH)[None, :]
    # The first row may be more than 2^31 elements away; the offsets from there stay 32-bit, which saves registers.
    tensor += b * strides[0] + h * strides[1] + tl.cast(start, tl.int64) * strides[2]
    if D < WIDTH:
        return tl.load(tensor + rows * strides[2] + columns * strides[3], mask=columns < D, other=0.0)
    else:
        return tl.load(tensor + rows * strides[2] + columns * strides[3])


@jit
def store_tile(tensor, b, h, start, strides, T, D: tl.constexpr, tile):
    rows, columns = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    tensor += b * strides[0] + h * strides[1] + tl.cast(start, tl.int64) * strides[2]
    tl.store(tensor + rows * strides[2] + columns, tile.to(tensor.dtype.element_ty), mask=(start + rows < T) & (columns < D))


@jit
def load_gain(gain, h, D: tl.constexpr, WIDTH: tl.constexpr):
    return tl.load(gain + h * D + tl.arange(0, WIDTH), mask=tl.arange(0, WIDTH) < D, other=0.0)


# ---- prefill --------------------------------------------------------------------------------------------------------------
# One program per (block of rows, batch row x head). Loops over the other axis come in pairs that tl.static_range unrolls: whole
# blocks, and blocks that the diagonal crosses, which alone pay for the causal mask. `strides` are those of all the outputs.


@jit
def forward_kernel(q, k, v, gain, out, pre_norm, log_sum_exp, q_strides, k_strides, v_strides, strides, H, T, eps,
                   D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last rows have the most keys: start them first
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h, rows = head // H, head % H, first + tl.arange(0, BLOCK_M)
    scale: tl.constexpr = D**-0.5 * 1.4426950408889634  # log2(e) / sqrt(D)
    q_tile = load_tile(q, b, h, first, q_strides, T, D, BLOCK_M, WIDTH)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for DIAGONAL in tl.static_range(2):
        for start in range(first * DIAGONAL, tl.minimum(first + BLOCK_M * DIAGONAL, T), BLOCK_N):
            k_tile = load_tile(k, b, h, start, k_strides, T, D, BLOCK_N, WIDTH)
            scores = tl.dot(q_tile, tl.trans(k_tile))  # (BLOCK_M, BLOCK_N)
            if DIAGONAL:  # hides the keys past T too, from every row below T
                scores = tl.where(rows[:, None] >= start + tl.arange(0, BLOCK_N)[None, :], scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new_max[:, None])
            correction = tl.exp2(row_max - new_max)
            row_sum = row_sum * correction + tl.sum(p, 1)
            v_tile = load_tile(v, b, h, start, v_strides, T, D, BLOCK_N, WIDTH)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * correction[:, None])
            row_max = new_max
    acc = acc / row_sum[:, None]
    tl.store(log_sum_exp + head * T + rows, row_max + tl.log2(row_sum), mask=rows < T)
    if pre_norm is not None:
        store_tile(pre_norm, b, h, first, strides, T, D, acc)
    if gain is not None:  # y = x / sqrt(mean(x^2) + eps) * gain
        acc = acc * tl.rsqrt(tl.sum(acc * acc, 1) / D + eps)[:, None] * load_gain(gain, h, D, WIDTH)[None, :]
    store_tile(out, b, h, first, strides, T, D, acc)


@jit
def backward_prepare_kernel(pre_norm, grad_out, gain, grad, delta, grad_gain, grad_out_strides, strides, H, T, eps,
                            D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """The gradient in front of the norm, and delta = rowsum(gradient * output), which the softmax's gradient subtracts.

    With n = x / rms(x) and g = grad_out * gain:   grad = (g - n mean(n g)) / rms(x),   grad_gain = sum over rows of grad_out * n.
    """
    first, head = tl.program_id(0) * BLOCK_M, tl.cast(tl.program_id(1), tl.int64)
    b, h, rows = head // H, head % H, first + tl.arange(0, BLOCK_M)
    x = load_tile(pre_norm, b, h, first, strides, T, D, BLOCK_M, WIDTH).to(tl.float32)
    g = load_tile(grad_out, b, h, first, grad_out_strides, T, D, BLOCK_M, WIDTH).to(tl.float32)
    if gain is not None:
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        normed, columns = x * inverse_rms, tl.arange(0, WIDTH)
        # One partial sum per program rather than atomic additions: the result does not depend on the order of execution.
        partial = ((b * tl.num_programs(0) + tl.program_id(0)) * H + h) * D + columns
        tl.store(grad_gain + partial, tl.sum(tl.where(rows[:, None] < T, g * normed, 0.0), 0), mask=columns < D)
        g *= load_gain(gain, h, D, WIDTH)[None, :]
        g = inverse_rms * (g - normed * (tl.sum(normed * g, 1) / D)[:, None])
        g = g.to(grad.dtype.element_ty)
        store_tile(grad, b, h, first, strides, T, D, g)
    # From the rounded gradient, the one that the next kernels read: only so do the rows of ds sum to zero.
    tl.store(delta + head * T + rows, tl.sum(g.to(tl.float32) * x, 1), mask=rows < T)


@jit
def backward_dkdv_kernel(q, k, v, grad, log_sum_exp, delta, dk, dv, q_strides, k_strides, v_strides, grad_strides, strides, H, T,
                         D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A block of keys against all queries from its first key on. Scores are transposed: p^T and ds^T enter the next products."""
    first, head = tl.program_id(0) * BLOCK_N, tl.cast(tl.program_id(1), tl.int64)
    b, h, keys = head // H, head % H, first + tl.arange(0, BLOCK_N)
    scale: tl.constexpr = D**-0.5
    tl.static_assert(BLOCK_N % BLOCK_M == 0)
    k_tile = load_tile(k, b, h, first, k_strides, T, D, BLOCK_N, WIDTH)
    v_tile = load_tile(v, b, h, first, v_strides, T, D, BLOCK_N, WIDTH)
    dk_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for DIAGONAL in tl.static_range(1, -1, -1):
        for start in range(first + BLOCK_N * (1 - DIAGONAL), tl.minimum(first + BLOCK_N, T) if DIAGONAL else T, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q_tile = load_tile(q, b, h, start, q_strides, T, D, BLOCK_M, WIDTH)
            lse = tl.load(log_sum_exp + head * T + rows, mask=rows < T, other=float("inf"))  # so p = 0 past T
            p = tl.exp2(tl.dot(k_tile, tl.trans(q_tile)) * (scale * 1.4426950408889634) - lse[None, :])  # (BLOCK_N, BLOCK_M)
            if DIAGONAL:
                p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
            grad_tile = load_tile(grad, b, h, start, grad_strides, T, D, BLOCK_M, WIDTH)
            dv_acc = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_acc)
            row_delta = tl.load(delta + head * T + rows, mask=rows < T, other=0.0)
            ds = p * (tl.dot(v_tile, tl.trans(grad_tile)) - row_delta[None, :])
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc)
    store_tile(dk, b, h, first, strides, T, D, dk_acc * scale)
    store_tile(dv, b, h, first, strides, T, D, dv_acc)


@jit
def backward_dq_kernel(q, k, v, grad, log_sum_exp, delta, dq, q_strides, k_strides, v_strides, grad_strides, strides, H, T,
                       D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A block of queries against all keys up to its last row: the forward pass again, with p from the saved log-sum-exp."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h, rows = head // H, head % H, first + tl.arange(0, BLOCK_M)
    scale: tl.constexpr = D**-0.5
    q_tile = load_tile(q, b, h, first, q_strides, T, D, BLOCK_M, WIDTH)
    grad_tile = load_tile(grad, b, h, first, grad_strides, T, D, BLOCK_M, WIDTH)
    lse = tl.load(log_sum_exp + head * T + rows, mask=rows < T, other=float("inf"))[:, None]
    row_delta = tl.load(delta + head * T + rows, mask=rows < T, other=0.0)[:, None]
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for DIAGONAL in tl.static_range(2):
        for start in range(first * DIAGONAL, tl.minimum(first + BLOCK_M * DIAGONAL, T), BLOCK_N):
            k_tile = load_tile(k, b, h, start, k_strides, T, D, BLOCK_N, WIDTH)
            v_tile = load_tile(v, b, h, start, v_strides, T, D, BLOCK_N, WIDTH)
            p = tl.exp2(tl.dot(q_tile, tl.trans(k_tile)) * (scale * 1.4426950408889634) - lse)  # (BLOCK_M, BLOCK_N)
            if DIAGONAL:
                p = tl.where(rows[:, None] >= start + tl.arange(0, BLOCK_N)[None, :], p, 0.0)
            ds = p * (tl.dot(grad_tile, tl.trans(v_tile)) - row_delta)
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
    store_tile(dq, b, h, first, strides, T, D, acc * scale)


# ---- decode ---------------------------------------------------------------------------------------------------------------
# One new position per batch row. Keys are split over programs, there being little else to run in parallel, and a second kernel
# combines the parts. Where heads are composed a program holds up to 64 heads and reads all components; where they already are
# (no compose_k) it holds one head and reads that head's own keys and values.


@jit
def decode_kernel(q, k, v, compose_k, lengths, partial, log_sum_exp, q_strides, k_strides, v_strides, H, S, D: tl.constexpr,
                  WIDTH: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_H: tl.constexpr,
                  BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr):
    """HEADS queries against one part of the keys of KEYS and VALUES components. partial: (B, splits, H, VALUES, D), in fp32."""
    split, splits, b = tl.program_id(0), tl.num_programs(0), tl.cast(tl.program_id(2), tl.int64)
    length = S if lengths is None else tl.load(lengths + b).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(length, BLOCK_S), splits) * BLOCK_S  # each batch row divides its own length
    if split * chunk >= length:
        return
    first_head, heads = tl.program_id(1) * HEADS, tl.program_id(1) * HEADS + tl.arange(0, BLOCK_H)
    first_component = 0 if compose_k is not None else first_head
    lanes = tl.arange(0, BLOCK_V * WIDTH)  # all value components side by side
    component, column = lanes // WIDTH, lanes % WIDTH
    scale: tl.constexpr = D**-0.5 * 1.4426950408889634
    # The heads of the one new position are the rows of this tile; the rows too many repeat the last head and are not stored.
    q_tile = load_tile(q, b, 0, first_head, (q_strides[0], 0, q_strides[1], q_strides[3]), H, D, BLOCK_H, WIDTH)
    row_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_V * WIDTH], tl.float32)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, length), BLOCK_S):
        scores = tl.zeros([BLOCK_H, BLOCK_S], tl.float32)
        for c in tl.static_range(KEYS):  # sum_c compose_k[c, h] (q_h . K_c[s])
            k_tile = load_tile(k, b, first_component + c, start, k_strides, length, D, BLOCK_S, WIDTH)
            dots = tl.dot(q_tile, tl.trans(k_tile))
            if compose_k is not None:
                dots *= tl.load(compose_k + c * H + heads, mask=heads < H, other=0.0).to(tl.float32)[:, None]
            scores += dots
        scores = tl.where((start + tl.arange(0, BLOCK_S))[None, :] < length, scores * scale, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, 1)
        v_rows = v + b * v_strides[0] + first_component * v_strides[1] + tl.cast(start, tl.int64) * v_strides[2]
        v_rows += tl.minimum(tl.arange(0, BLOCK_S), length - 1 - start)[:, None] * v_strides[2]
        v_tile = tl.load(v_rows + (component * v_strides[1] + column * v_strides[3])[None, :],
                         mask=((component < VALUES) & (column < D))[None, :], other=0.0)  # (BLOCK_S, BLOCK_V * WIDTH)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * correction[:, None])  # sum_s p[h, s] V_c[s], for all c
        row_max = new_max
    row, live = (b * splits + split) * H + heads, (heads < first_head + HEADS) & (heads < H)
    tl.store(log_sum_exp + row, row_max + tl.log2(row_sum), mask=live)
    tl.store(partial + row[:, None] * (VALUES * D) + (component * D + column)[None, :], acc / row_sum[:, None],
             mask=live[:, None] & ((component < VALUES) & (column < D))[None, :])


@jit
def combine_kernel(partial, log_sum_exp, compose_v, gain, lengths, out, H, S, eps, D: tl.constexpr, WIDTH: tl.constexpr,
                   VALUES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """One head: the splits weighted by their share of the softmax, then the value composition, then the norm."""
    h, b = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    length = S if lengths is None else tl.load(lengths + b).to(tl.int32)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    live = splits * tl.cdiv(tl.cdiv(length, BLOCK_S), SPLITS) * BLOCK_S < length  # the others had no keys and wrote nothing
    row = (b * SPLITS + splits) * H + h
    lse = tl.load(log_sum_exp + row, mask=live, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    weights = weights / tl.sum(weights, 0)
    acc = tl.zeros([WIDTH], tl.float32)
    for c in tl.static_range(VALUES):
        lanes = (row[:, None] * VALUES + c) * D + columns[None, :]
        tile = tl.load(partial + lanes, mask=live[:, None] & (columns < D)[None, :], other=0.0)
        value = tl.sum(tile * weights[:, None], 0)
        acc += value if compose_v is None else value * tl.load(compose_v + c * H + h).to(tl.float32)
    if gain is not None:
        acc = acc * tl.rsqrt(tl.sum(acc * acc, 0) / D + eps) * load_gain(gain, h, D, WIDTH)
    tl.store(out + (b * H + h) * D + columns, acc.to(out.dtype.element_ty), mask=columns < D)


# ---- launching ------------------------------------------------------------------------------------------------------------


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def launch(kernel, grid, *arguments, **options):
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


@functools.cache
def device_limits(device):
    """(bytes of shared memory that a program may use, number of multiprocessors)."""
    if device.type != "cuda":  # the interpreter: as if on an H100
        return 227 * 1024, 132
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block), properties.multi_processor_count


def tile_options(kernel, q):
    """Tile, warps and pipeline stages of a prefill kernel, chosen from what `--aot` shows to compile without spilling."""
    D, shared = q.shape[-1], device_limits(q.device)[0]
    width = max(16, next_power_of_2(D))
    if q.dtype == torch.float32:
        tiles = ((64, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2)) if width <= 64 else ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2))
    elif width <= 64:
        tiles = (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 3)
    elif shared >= 200 * 1024:  # H100, B200
        tiles = (128, 64, 8, 3), (32, 128, 8, 3), (128, 32, 8, 3)
    elif shared >= 96 * 1024:  # A100, consumer GPUs
        tiles = (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)
    else:  # MI300
        tiles = (128, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)
    M, N, num_warps, num_stages = tiles[(forward_kernel, backward_dkdv_kernel, backward_dq_kernel).index(kernel)]
    return dict(D=D, WIDTH=width, BLOCK_M=M, BLOCK_N=N, num_warps=num_warps, num_stages=num_stages)


def empty_like_heads(q):
    """(B, H, T, D) whose memory is (B, T, H, D): joining the heads for the output projection is then a view."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def flash_forward(q: Tensor, k: Tensor, v: Tensor, gain: Optional[Tensor], eps: float, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the output before the norm (empty unless `save` and there is a norm), log2-sum-exp2 (B, H, T)."""
    B, H, T, D = q.shape
    out, log_sum_exp = empty_like_heads(q), q.new_empty(B, H, T, dtype=torch.float32)
    pre_norm = empty_like_heads(q) if save and gain is not None else None
    options = tile_options(forward_kernel, q)
    launch(forward_kernel, (triton.cdiv(T, options["BLOCK_M"]), B * H), q, k, v, gain, out, pre_norm, log_sum_exp,
           q.stride(), k.stride(), v.stride(), out.stride(), H, T, eps, **options)
    return out, q.new_empty(0) if pre_norm is None else pre_norm, log_sum_exp


def flash_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, gain: Optional[Tensor], pre_norm: Tensor,
                   log_sum_exp: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gain (the last one empty without a norm)."""
    B, H, T, D = q.shape
    dq, dk, dv, delta = empty_like_heads(q), empty_like_heads(q), empty_like_heads(q), torch.empty_like(log_sum_exp)
    grad = grad_out if gain is None else empty_like_heads(q)
    options = dict(D=D, WIDTH=tile_options(forward_kernel, q)["WIDTH"], BLOCK_M=32)
    blocks = triton.cdiv(T, options["BLOCK_M"])
    grad_gain = q.new_empty(B, blocks, H, D, dtype=torch.float32) if gain is not None else None
    launch(backward_prepare_kernel, (blocks, B * H), pre_norm, grad_out, gain, grad, delta, grad_gain,
           grad_out.stride(), dq.stride(), H, T, eps, **options)
    inputs, strides = (q, k, v, grad, log_sum_exp, delta), (q.stride(), k.stride(), v.stride(), grad.stride(), dq.stride())
    options = tile_options(backward_dkdv_kernel, q)
    launch(backward_dkdv_kernel, (triton.cdiv(T, options["BLOCK_N"]), B * H), *inputs, dk, dv, *strides, H, T, **options)
    options = tile_options(backward_dq_kernel, q)
    launch(backward_dq_kernel, (triton.cdiv(T, options["BLOCK_M"]), B * H), *inputs, dq, *strides, H, T, **options)
    return dq, dk, dv, q.new_empty(0) if gain is None else grad_gain.sum((0, 1)).to(gain.dtype)


def decode_options(device, itemsize, H, n_k, n_v, D, composed):
    """Block sizes of the decode kernel, or None where it does not fit: accumulators stay in registers, a block of keys in shared memory."""
    width, keys, values = max(16, next_power_of_2(D)), n_k if composed else 1, n_v if composed else 1
    lanes = next_power_of_2(values) * width
    block_h = max(16, min(next_power_of_2(H), 64, 32768 // itemsize // lanes)) if composed else 16  # tl.dot needs 16 rows
    bytes_per_key = (keys * width + lanes) * itemsize
    room = device_limits(device)[0] - 8192 - block_h * width * itemsize
    preferred = 64 if lanes <= 128 else 32 if lanes <= 512 else 16
    block_s = next((size for size in (64, 32, 16) if size <= preferred and size * bytes_per_key <= room), None)
    if block_s is None or lanes * itemsize > 4096:
        return None
    return dict(D=D, WIDTH=width, HEADS=block_h if composed else 1, KEYS=keys, VALUES=values, BLOCK_H=block_h, BLOCK_V=lanes // width,
                BLOCK_S=block_s, num_warps=4 if block_h * lanes <= 8192 else 8, num_stages=2)


def decode_forward(q: Tensor, k: Tensor, v: Tensor, compose_k: Optional[Tensor], compose_v: Optional[Tensor], gain: Optional[Tensor],
                   lengths: Optional[Tensor], eps: float) -> Tensor:
    B, H, _, D = q.shape
    S, composed = k.shape[2], compose_k is not None
    options = decode_options(q.device, q.element_size(), H, k.shape[1], v.shape[1], D, composed)
    blocks, keys = triton.cdiv(H, options["HEADS"]), options["BLOCK_S"]
    # Two programs per multiprocessor, as far as there are keys; a power of two, because combine_kernel loads all parts as a tile.
    splits = next_power_of_2(max(1, min(128, 2 * device_limits(q.device)[1] // (B * blocks), triton.cdiv(S, keys))))
    partial = q.new_empty(B, splits, H, options["VALUES"], D, dtype=torch.float32)
    log_sum_exp, out = q.new_empty(B, splits, H, dtype=torch.float32), q.new_empty(B, H, 1, D)
    launch(decode_kernel, (splits, blocks, B), q, k, v, compose_k, lengths, partial, log_sum_exp, q.stride(), k.stride(), v.stride(),
           H, S, **options)
    launch(combine_kernel, (H, B), partial, log_sum_exp, compose_v, gain, lengths, out, H, S, eps, D=D, WIDTH=options["WIDTH"],
           VALUES=options["VALUES"], SPLITS=splits, BLOCK_S=keys, num_warps=8)
    return out


# The operators that autograd and torch.compile see. Each is opaque to them; the fake version states shapes and strides.
flash = torch.library.custom_op("nanomea::flash", flash_forward, mutates_args=())
flash_grad = torch.library.custom_op("nanomea::flash_grad", flash_backward, mutates_args=())
decode = torch.library.custom_op("nanomea::decode", decode_forward, mutates_args=())


@flash.register_fake
def _(q, k, v, gain, eps, save):
    pre_norm = empty_like_heads(q) if save and gain is not None else q.new_empty(0)
    return empty_like_heads(q), pre_norm, q.new_empty(q.shape[:3], dtype=torch.float32)


@flash_grad.register_fake
def _(grad_out, q, k, v, gain, pre_norm, log_sum_exp, eps):
    return empty_like_heads(q), empty_like_heads(q), empty_like_heads(q), q.new_empty(0) if gain is None else torch.empty_like(gain)


@decode.register_fake
def _(q, k, v, compose_k, compose_v, gain, lengths, eps):
    return q.new_empty(q.shape)


def _save_for_backward(ctx, inputs, output):
    q, k, v, gain, ctx.eps, _ = inputs
    out, pre_norm, log_sum_exp = output
    ctx.save_for_backward(q, k, v, gain, out if gain is None else pre_norm, log_sum_exp)


def _backward(ctx, grad_out, *_):
    q, k, v, gain, pre_norm, log_sum_exp = ctx.saved_tensors
    dq, dk, dv, grad_gain = flash_grad(grad_out, q, k, v, gain, pre_norm, log_sum_exp, ctx.eps)
    return dq, dk, dv, grad_gain if gain is not None else None, None, None


flash.register_autograd(_backward, setup_context=_save_for_backward)

# ---- the formulas in torch, and the choice of a path ----------------------------------------------------------------------


def compose_heads(components, weight):
    """HLC, eq. 10: (B, Hc, T, D), (Hc, H) -> (B, H, T, D), as matmuls over (B, T) that move nothing in a (B, T, Hc, D) projection."""
    return (weight.to(components.dtype).t() @ components.transpose(1, 2)).transpose(1, 2)


def head_norm(x, weight, eps=1e-6):
    """RMSNorm of each head by itself: (B, H, T, D), (H, D); y = x / sqrt(mean(x^2) + eps) * weight[h], in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight[:, None]).to(x.dtype)


def plain_attention(q, k, v, mask):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


@functools.cache
def say_once(level, message):
    log.log(level, message)


@torch.compiler.assume_constant_result  # torch.compile runs this while tracing, and keeps the answer
def choose_path(name, path, device, dtype, D, obstacle=None):
    """The path that `name` takes, one of "triton", "sdpa" and "reference". `obstacle`: what else stands against triton."""
    if path not in ("auto", "triton", "sdpa", "reference"):
        raise ValueError(f"{name}: path={path!r} is none of 'auto', 'triton', 'sdpa', 'reference'")
    interpreted = triton is not None and triton.knobs.runtime.interpret
    if triton is None:
        obstacle = "triton is not installed (pip install triton)"
    elif device.type != "cuda" and not interpreted:
        obstacle = f"the tensors are on a {device.type} device"
    elif device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        obstacle = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    elif dtype not in (torch.float16, torch.bfloat16, torch.float32):
        obstacle = f"the kernels do not compute in {dtype}"
    elif D > 128:
        obstacle = f"heads are {D} wide, more than 128"
    if path == "triton" and obstacle:
        raise ValueError(f"{name}: path='triton' is not possible: {obstacle}")
    if path != "auto":
        return path
    if not obstacle and device.type != "cuda":
        obstacle = "Triton's interpreter is only for tests"
    if not obstacle and dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        obstacle = "fp32 products would be rounded to tf32, which torch.set_float32_matmul_precision('high') allows"
    if not obstacle:
        say_once(logging.INFO, f"{name} takes the triton path on {torch.cuda.get_device_name(device)}")
        return "triton"
    say_once(logging.WARNING if device.type == "cuda" else logging.INFO, f"{name} takes the sdpa path: {obstacle}")
    return "sdpa"


@torch.compiler.assume_constant_result
def decode_obstacle(device, itemsize, H, n_k, n_v, D, composed):
    if decode_options(device, itemsize, H, n_k, n_v, D, composed) is None:
        return f"{n_k} key and {n_v} value components of width {D} do not fit one program"


def check_shapes(name, q, k, v, compose_k, compose_v, norm_weight):
    B, H, _, D = q.shape
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{name}: q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    for label, x, weight in (("key", k, compose_k), ("value", v, compose_v)):
        if (x.shape[0], x.shape[2:]) != (B, (k.shape[2], D)):
            raise ValueError(f"{name}: {label}s of shape {tuple(x.shape)} do not go with queries of shape {tuple(q.shape)}")
        if weight is None and x.shape[1] != H:
            raise ValueError(f"{name}: {x.shape[1]} {label} heads for {H} query heads need a composition matrix")
        if weight is not None and weight.shape != (x.shape[1], H):
            raise ValueError(f"{name}: the {label} composition is {tuple(weight.shape)}, not ({x.shape[1]}, {H}) = (components, heads)")
    if norm_weight is not None and norm_weight.shape != (H, D):
        raise ValueError(f"{name}: norm_weight is {tuple(norm_weight.shape)}, not ({H}, {D}) = (heads, head width)")


def mea_attention(q, k_components, v_components, compose_k=None, compose_v=None, norm_weight=None, *, eps=1e-6, path="auto"):
    """Causal MEA without a cache (eq. 10-12): compose, attend, normalise each head.

    q (B, H, T, D); k_components (B, n_k, T, D); v_components (B, n_v, T, D); compose_k (n_k, H), compose_v (n_v, H), or None where
    the heads are composed already (n == H); norm_weight (H, D), or None for no norm. Returns (B, H, T, D). `path` is "triton",
    "sdpa", "reference" or "auto" (a GPU's kernels where they apply, else sdpa; the first decision of a kind is logged). In fp32
    NVIDIA's tensor cores make "triton" a tf32 computation, so "auto" takes it only where torch allows tf32. Raises ValueError.
    """
    if torch.is_autocast_enabled(q.device.type):  # as autocast treats scaled_dot_product_attention
        q, k_components, v_components = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k_components, v_components))
    check_shapes("mea_attention", q, k_components, v_components, compose_k, compose_v, norm_weight)
    if k_components.shape[2] != q.shape[2]:
        raise ValueError(f"mea_attention: {q.shape[2]} queries but {k_components.shape[2]} keys; it has no cache (see mea_decode)")
    crowd = f"{q.shape[0] * q.shape[1]} heads in the batch are more than a grid's 65535" if q.shape[0] * q.shape[1] > 65535 else None
    path = choose_path("mea_attention", path, q.device, q.dtype, q.shape[-1], crowd)
    wide = torch.promote_types(q.dtype, torch.float32) if path == "reference" else q.dtype
    k, v = (x.to(wide) if weight is None else compose_heads(x.to(wide), weight)
            for x, weight in ((k_components, compose_k), (v_components, compose_v)))
    if path == "triton":
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, norm_weight))
        return flash(q, k, v, norm_weight, eps, save)[0]
    if path == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        out = plain_attention(q.to(wide), k, v, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril())
    return (out if norm_weight is None else head_norm(out, norm_weight, eps)).to(q.dtype)


def mea_decode(q, k_cache, v_cache, compose_k=None, compose_v=None, norm_weight=None, *, lengths=None, eps=1e-6, path="auto"):
    """One new position against a cache of component heads: as the last row of `mea_attention`, without building a composite head.

    q (B, H, 1, D); k_cache (B, n_k, S, D) and v_cache (B, n_v, S, D), views with any strides; lengths (B,): how many positions of each
    row are filled, the new one included, from 1 to S (None: all S); otherwise as `mea_attention`. For inference: only the sdpa and
    reference paths have gradients. Returns (B, H, 1, D). Raises ValueError.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k_cache, v_cache = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k_cache, v_cache))
    check_shapes("mea_decode", q, k_cache, v_cache, compose_k, compose_v, norm_weight)
    B, H, _, D = q.shape
    S, n_k, n_v = k_cache.shape[2], k_cache.shape[1], v_cache.shape[1]
    if q.shape[2] != 1 or lengths is not None and lengths.shape != (B,):
        raise ValueError(f"mea_decode: q {tuple(q.shape)} must hold one position, and lengths, if given, one number per batch row")
    if (compose_k is None) != (compose_v is None):  # one side folded: compose it with the identity
        compose_k, compose_v = (torch.eye(H, device=q.device) if x is None else x for x in (compose_k, compose_v))
    composed = compose_k is not None
    obstacle = decode_obstacle(q.device, q.element_size(), H, n_k, n_v, D, composed)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, compose_k, compose_v, norm_weight)):
        obstacle = "the decode kernel has no gradient"
    path = choose_path("mea_decode", path, q.device, q.dtype, D, obstacle)
    if path == "triton":
        compose_k, compose_v, gain = (x if x is None else x.contiguous() for x in (compose_k, compose_v, norm_weight))
        return decode(q, k_cache, v_cache, compose_k, compose_v, gain, lengths, eps)
    mask = None if lengths is None else (torch.arange(S, device=q.device) < lengths[:, None])[:, None, None]  # (B, 1, 1, S)
    if path == "reference":
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = (compose_heads(x.to(wide), weight) if composed else x.to(wide)
                for x, weight in ((k_cache, compose_k), (v_cache, compose_v)))
        out = plain_attention(q.to(wide), k, v, mask)
    elif not composed:
        out = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask)
    else:  # absorbed: the H heads are the rows of one head of width n_k * D, (B, 1, H, n_k * D), against the cache as it lies
        absorbed = torch.einsum("bhqd,ch->bqhcd", q, compose_k.to(q.dtype)).flatten(3)
        k, v = (x.transpose(1, 2).flatten(2)[:, None] for x in (k_cache, v_cache))  # (B, 1, S, n * D)
        out = F.scaled_dot_product_attention(absorbed, k, v, attn_mask=mask, scale=D**-0.5).unflatten(3, (n_v, D))
        out = torch.einsum("bqhcd,ch->bhqd", out, compose_v.to(q.dtype))
    return (out if norm_weight is None else head_norm(out, norm_weight, eps)).to(q.dtype)


# ---- compiling without a GPU ----------------------------------------------------------------------------------------------

# name: (backend, architecture, threads per warp, KiB of shared memory that one program may use, KiB per multiprocessor)
TARGETS = {"sm_80": ("cuda", 80, 32, 163, 164), "sm_86": ("cuda", 86, 32, 99, 100), "sm_89": ("cuda", 89, 32, 99, 100),
           "sm_90": ("cuda", 90, 32, 227, 228), "sm_100": ("cuda", 100, 32, 227, 228), "sm_120": ("cuda", 120, 32, 99, 100),
           "gfx942": ("hip", "gfx942", 64, 64, 64)}


def record_launches(shared, B=8, T=2048, H=16, n_k=4, n_v=4, D=128, dtype=torch.bfloat16):
    """(kernel, arguments, options) of all launches that a training step and a decoding step make on a device with that much memory."""
    from unittest import mock

    launches, this = [], sys.modules[__name__]
    heads = lambda n, length: torch.empty(B, length, n, D, dtype=dtype, device="meta").transpose(1, 2)
    weight = lambda *shape: torch.empty(shape, device="meta")
    record = lambda kernel, grid, *arguments, **options: launches.append((kernel, arguments, options))
    with mock.patch.multiple(this, launch=record, device_limits=lambda device: (shared, 132)):
        q, gain = heads(H, T), weight(H, D)
        out, pre_norm, log_sum_exp = flash_forward(q, q, q, gain, 1e-6, True)
        flash_backward(out, q, q, q, gain, pre_norm, log_sum_exp, 1e-6)
        decode_forward(heads(H, 1), heads(n_k, T), heads(n_v, T), weight(n_k, H), weight(n_v, H), gain, weight(B).int(), 1e-6)
    return launches


def compile_ahead(target, kernel, arguments, options):
    """Compile one recorded launch as the JIT would for these arguments, and read the resources from what comes out."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    constants, attributes = {}, {}

    def describe(value, path):  # a Triton type; as in the JIT, None and 1 become constants and divisibility by 16 is noted
        if isinstance(value, tuple):
            return tuple(describe(item, path + (i,)) for i, item in enumerate(value))
        if value is None or isinstance(value, int) and value == 1:
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
        return pointers[value.dtype] if isinstance(value, Tensor) else "i32"

    names = kernel.arg_names
    signature = {names[i]: describe(value, (i,)) for i, value in enumerate(arguments)}
    constants |= {(names.index(name),): value for name, value in options.items() if name in names}
    signature |= {name: "constexpr" for name in options if name in names}
    build = {name: value for name, value in options.items() if name not in names}
    backend, architecture, warp_size, _, shared_total = TARGETS[target]
    source, gpu = ASTSource(kernel, signature, constants, attributes), GPUTarget(backend, architecture, warp_size)
    binary = triton.compile(source, target=gpu, options=build)
    asm, shared, warps = binary.asm["ptx" if backend == "cuda" else "amdgcn"], binary.metadata.shared, build.get("num_warps", 4)
    reserved = 1024 if backend == "cuda" else 0  # bytes of shared memory that CUDA itself takes per block
    if backend == "cuda":
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(asm)
            file.flush()
            name = re.search(r"\.target (sm_[0-9a-z]+)", asm)[1]  # sm_90a, say
            command = [get_ptxas(architecture).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers, spills = int(re.search(r"Used (\d+) reg", report)[1]), sum(map(int, re.findall(r"(\d+) bytes spill", report)))
        by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    else:
        registers, spills = (int(re.search(rf"\.{field}:\s+(\d+)", asm)[1]) for field in ("vgpr_count", "vgpr_spill_count"))
        by_registers, spills = 4 * min(8, 512 // (-(-registers // 8) * 8)) // warps, 4 * spills
    return dict(kernel=kernel.__name__.removesuffix("_kernel"), warps=warps, registers=registers, spill_bytes=spills, shared_bytes=shared,
                matrix=len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma", asm)),
                async_copies=len(re.findall(r"cp\.async\.(?:c[ag]|bulk)\.|_load_lds", asm)),
                blocks=min(by_registers, shared_total * 1024 // (shared + reserved), 2048 // (warp_size * warps)), asm=asm)


def print_resources(targets, widths=(64, 128)):
    print(f"bf16, triton {triton.__version__}; registers per thread; blocks per multiprocessor by registers, shared memory and threads")
    print("| target | D | kernel | warps | registers | spill bytes | shared bytes | matrix instructions | async copies | blocks |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for target in targets:
        for D in widths:
            for launched in record_launches(TARGETS[target][3] * 1024, D=D):
                row = compile_ahead(target, *launched)
                print(f"| {target} | {D} | " + " | ".join(str(value) for name, value in row.items() if name != "asm") + " |")


def check_paths():
    """Compare each path that this machine has with the reference in fp64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    heads = lambda n, length: torch.randn(2, length, n, 64, device=device).transpose(1, 2)  # (B, n, T, D)
    q, k, v, last = heads(8, 100), heads(3, 100), heads(2, 100), heads(8, 1)
    weights = torch.randn(3, 8, device=device), torch.randn(2, 8, device=device), torch.randn(8, 64, device=device)
    for function, queries in ((mea_attention, q), (mea_decode, last)):
        exact = function(*(x.double() for x in (queries, k, v, *weights)), path="reference")
        function(queries, k, v, *weights)  # logs what auto takes
        for path in ("reference", "sdpa", "triton"):
            try:
                error = (function(queries, k, v, *weights, path=path).double() - exact).norm() / exact.norm()
                print(f"{function.__name__:14s} {path:10s} relative error {error:.1e}")
            except ValueError as refusal:
                print(f"{function.__name__:14s} {path:10s} {refusal}")
    if device == "cpu" and triton is not None and not triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET=1 python kernels.py runs the kernels themselves here, slowly")


def main():
    parser = argparse.ArgumentParser(description="Check the attention kernels on this machine, or compile them for others.")
    parser.add_argument("--aot", metavar="TARGETS", help=f"compile for these, comma-separated, of {', '.join(TARGETS)}; needs no GPU")
    arguments = parser.parse_args()
    if not arguments.aot:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return check_paths()
    targets = arguments.aot.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        parser.error(f"--aot does not know {', '.join(unknown)}; it knows {', '.join(TARGETS)}")
    if triton is None or triton.knobs.runtime.interpret:
        parser.error("--aot needs triton (pip install triton), without TRITON_INTERPRET in the environment")
    print_resources(targets)


if __name__ == "__main__":
    main()
