"""The fused Triton kernels of Multi-head Explicit Attention (MEA): forward, backward, decoding, and how to launch them.

`mea_attention` and `mea_decode` in functional.py call them, and say which path is taken; `BlockAttention` there is the
same loop in PyTorch. Where to mix heads follows from what must be read:

- Prefill and training mix first, in one small matmul, and then run one flash-attention kernel whose epilogue is the
  norm. Mixing tiles inside that kernel looks more fused and is slower: each of the T / BLOCK_M query blocks of each
  head would reload and remix all Hc component tiles, Hc times the traffic of the attention itself.
- Decoding is bound by reading the cache, so it never builds a composite head. The mix is linear, hence
      q_h . K_h[s] = sum_c compose_k[c, h] (q_h . K_c[s])
      sum_s p[h, s] V_h[s] = sum_c compose_v[c, h] (sum_s p[h, s] V_c[s])
  and a program that holds the queries of all heads reads every cached byte once and uses it for all of them.

The backward pass is FlashAttention-2's (arXiv 2307.08691, section 3.1) with the norm's gradient in the pass that
prepares it. experiments/roofline.py compiles the kernels for GPUs that need not be here.
"""

import functools

import torch

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # no Triton on this machine: the kernels below are then plain functions that nothing calls
    triton, tl, constexpr, jit = None, None, float, lambda function: function


def constant_while_tracing(function):
    """torch.compile calls `function` once, while it traces, and keeps the answer.

    This is what torch.compiler.assume_constant_result does, without its import of torch._dynamo: 2 s at every start.
    """
    function._dynamo_marked_constant = True
    return function


# ---- tiles ----------------------------------------------------------------------------------------------------------
# Heads are pairs (tensor, strides): (B, H, T, D), read with any strides, written with columns side by side. A tile is
# BLOCK rows of one head by WIDTH columns: D rounded up to a power of two, at least 16.

LOG2_E = constexpr(1.4426950408889634)  # scores are kept in units of log 2: the hardware has exp2, not exp


@jit
def load_tile(heads, b, h, start, T, D: constexpr, BLOCK: constexpr, WIDTH: constexpr):
    """Rows start .. start + BLOCK. Past T they repeat the last row, which costs less than a mask; callers hide them."""
    tensor, strides = heads
    rows, columns = tl.minimum(tl.arange(0, BLOCK), T - 1 - start)[:, None], tl.arange(0, WIDTH)[None, :]
    # The first row may be more than 2^31 elements away; offsets from there stay 32-bit, which saves registers.
    tensor += b * strides[0] + tl.cast(h, tl.int64) * strides[1] + tl.cast(start, tl.int64) * strides[2]
    if D < WIDTH:
        return tl.load(tensor + rows * strides[2] + columns * strides[3], mask=columns < D, other=0.0)
    else:
        return tl.load(tensor + rows * strides[2] + columns * strides[3])


@jit
def store_tile(heads, b, h, start, T, D: constexpr, tile):
    tensor, strides = heads
    rows, columns = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    tensor += b * strides[0] + tl.cast(h, tl.int64) * strides[1] + tl.cast(start, tl.int64) * strides[2]
    inside = (start + rows < T) & (columns < D)
    tl.store(tensor + rows * strides[2] + columns, tile.to(tensor.dtype.element_ty), mask=inside)


@jit
def load_gain(gain, h, D: constexpr, WIDTH: constexpr):
    return tl.load(gain + h * D + tl.arange(0, WIDTH), mask=tl.arange(0, WIDTH) < D, other=0.0)


# ---- prefill --------------------------------------------------------------------------------------------------------
# `BlockAttention` is the same in PyTorch. One program per (block of rows, batch row x head). Loops over the other axis
# come in pairs that tl.static_range unrolls: whole blocks, and blocks that the diagonal crosses, which alone pay for
# the causal mask.


@jit
def forward_kernel(
    q, k, v, gain, out, pre_norm, lse, H, T, eps, D: constexpr, WIDTH: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr
):
    """A block of queries against all keys up to its last row: y = softmax(q k^T / sqrt(D)) v, and its norm.

    The softmax is taken as the keys come (running maximum and sum); lse = log2 sum_s exp2(score) is kept for the
    backward pass, and with a norm the output before it, too.
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last rows have the most keys: start them first
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h, rows = head // H, head % H, first + tl.arange(0, BLOCK_M)
    scale: constexpr = D**-0.5 * LOG2_E
    q_tile = load_tile(q, b, h, first, T, D, BLOCK_M, WIDTH)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for DIAGONAL in tl.static_range(2):
        for start in range(first * DIAGONAL, tl.minimum(first + BLOCK_M * DIAGONAL, T), BLOCK_N):
            k_tile = load_tile(k, b, h, start, T, D, BLOCK_N, WIDTH)
            scores = tl.dot(q_tile, tl.trans(k_tile))  # (BLOCK_M, BLOCK_N)
            if DIAGONAL:  # hides the keys past T too, from every row below T
                scores = tl.where(rows[:, None] >= start + tl.arange(0, BLOCK_N)[None, :], scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new_max[:, None])
            correction = tl.exp2(row_max - new_max)
            row_sum = row_sum * correction + tl.sum(p, 1)
            v_tile = load_tile(v, b, h, start, T, D, BLOCK_N, WIDTH)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * correction[:, None])
            row_max = new_max
    acc = acc / row_sum[:, None]
    tl.store(lse + head * T + rows, row_max + tl.log2(row_sum), mask=rows < T)
    if pre_norm is not None:
        store_tile(pre_norm, b, h, first, T, D, acc)
    if gain is not None:  # y = x / sqrt(mean(x^2) + eps) * gain
        acc = acc * tl.rsqrt(tl.sum(acc * acc, 1) / D + eps)[:, None] * load_gain(gain, h, D, WIDTH)[None, :]
    store_tile(out, b, h, first, T, D, acc)


@jit
def backward_prepare_kernel(
    pre_norm, grad_out, gain, grad, delta, grad_gain, H, T, eps, D: constexpr, WIDTH: constexpr, BLOCK_M: constexpr
):
    """The gradient in front of the norm, and delta = rowsum(gradient * output), which the softmax's gradient subtracts.

    With n = x / rms(x) and g = grad_out * gain:
        grad = (g - n mean(n g)) / rms(x),   grad_gain = sum over rows of grad_out * n.
    """
    first, head = tl.program_id(0) * BLOCK_M, tl.cast(tl.program_id(1), tl.int64)
    b, h, rows = head // H, head % H, first + tl.arange(0, BLOCK_M)
    x = load_tile(pre_norm, b, h, first, T, D, BLOCK_M, WIDTH).to(tl.float32)
    g = load_tile(grad_out, b, h, first, T, D, BLOCK_M, WIDTH).to(tl.float32)
    if gain is not None:
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        normed, columns = x * inverse_rms, tl.arange(0, WIDTH)
        # One partial sum per program, no atomic additions: the result does not depend on the order of execution.
        offsets = ((b * tl.num_programs(0) + tl.program_id(0)) * H + h) * D + columns
        tl.store(grad_gain + offsets, tl.sum(tl.where(rows[:, None] < T, g * normed, 0.0), 0), mask=columns < D)
        g *= load_gain(gain, h, D, WIDTH)[None, :]
        g = inverse_rms * (g - normed * (tl.sum(normed * g, 1) / D)[:, None])
        g = g.to(grad[0].dtype.element_ty)
        store_tile(grad, b, h, first, T, D, g)
    # From the rounded gradient, the one that the next kernels read: only so do the rows of ds sum to zero.
    tl.store(delta + head * T + rows, tl.sum(g.to(tl.float32) * x, 1), mask=rows < T)


@jit
def backward_dkdv_kernel(
    q, k, v, grad, lse, delta, dk, dv, H, T, D: constexpr, WIDTH: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr
):
    """A block of keys against all queries from its first key on. Scores are transposed: products take p^T and ds^T."""
    first, head = tl.program_id(0) * BLOCK_N, tl.cast(tl.program_id(1), tl.int64)
    b, h, keys = head // H, head % H, first + tl.arange(0, BLOCK_N)
    scale: constexpr = D**-0.5
    tl.static_assert(BLOCK_N % BLOCK_M == 0)
    k_tile = load_tile(k, b, h, first, T, D, BLOCK_N, WIDTH)
    v_tile = load_tile(v, b, h, first, T, D, BLOCK_N, WIDTH)
    dk_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for DIAGONAL in tl.static_range(1, -1, -1):
        stop = tl.minimum(first + BLOCK_N, T) if DIAGONAL else T
        for start in range(first + BLOCK_N * (1 - DIAGONAL), stop, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q_tile = load_tile(q, b, h, start, T, D, BLOCK_M, WIDTH)
            row_lse = tl.load(lse + head * T + rows, mask=rows < T, other=float("inf"))  # so p = 0 past T
            scores = tl.dot(k_tile, tl.trans(q_tile))  # (BLOCK_N, BLOCK_M)
            p = tl.exp2(scores * (scale * LOG2_E) - row_lse[None, :])
            if DIAGONAL:
                p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
            grad_tile = load_tile(grad, b, h, start, T, D, BLOCK_M, WIDTH)
            dv_acc = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_acc)
            row_delta = tl.load(delta + head * T + rows, mask=rows < T, other=0.0)
            ds = p * (tl.dot(v_tile, tl.trans(grad_tile)) - row_delta[None, :])
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc)
    store_tile(dk, b, h, first, T, D, dk_acc * scale)
    store_tile(dv, b, h, first, T, D, dv_acc)


@jit
def backward_dq_kernel(
    q, k, v, grad, lse, delta, dq, H, T, D: constexpr, WIDTH: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr
):
    """A block of queries against all keys up to its last row: the forward pass again, p from the saved log-sum-exp."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h, rows = head // H, head % H, first + tl.arange(0, BLOCK_M)
    scale: constexpr = D**-0.5
    q_tile = load_tile(q, b, h, first, T, D, BLOCK_M, WIDTH)
    grad_tile = load_tile(grad, b, h, first, T, D, BLOCK_M, WIDTH)
    row_lse = tl.load(lse + head * T + rows, mask=rows < T, other=float("inf"))[:, None]
    row_delta = tl.load(delta + head * T + rows, mask=rows < T, other=0.0)[:, None]
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for DIAGONAL in tl.static_range(2):
        for start in range(first * DIAGONAL, tl.minimum(first + BLOCK_M * DIAGONAL, T), BLOCK_N):
            k_tile = load_tile(k, b, h, start, T, D, BLOCK_N, WIDTH)
            v_tile = load_tile(v, b, h, start, T, D, BLOCK_N, WIDTH)
            scores = tl.dot(q_tile, tl.trans(k_tile))  # (BLOCK_M, BLOCK_N)
            p = tl.exp2(scores * (scale * LOG2_E) - row_lse)
            if DIAGONAL:
                p = tl.where(rows[:, None] >= start + tl.arange(0, BLOCK_N)[None, :], p, 0.0)
            ds = p * (tl.dot(grad_tile, tl.trans(v_tile)) - row_delta)
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
    store_tile(dq, b, h, first, T, D, acc * scale)


# ---- decode ---------------------------------------------------------------------------------------------------------
# One new position per batch row. Keys are split over programs, there being little else to run in parallel, and a
# second kernel combines the parts. Where heads must be composed, a program holds up to 64 heads and reads all
# components; where they already are (no compose_k) it holds one head and reads that head's own keys and values.


@jit
def decode_kernel(
    q,
    k,
    v,
    compose_k,
    lengths,
    partial,
    lse,
    H,
    S,
    D: constexpr,
    WIDTH: constexpr,
    HEADS: constexpr,
    KEYS: constexpr,
    VALUES: constexpr,
    BLOCK_H: constexpr,
    BLOCK_V: constexpr,
    BLOCK_S: constexpr,
):
    """HEADS queries against a part of the keys of KEYS and VALUES components. partial: (B, splits, H, VALUES, D)."""
    split, splits, b = tl.program_id(0), tl.num_programs(0), tl.cast(tl.program_id(2), tl.int64)
    length = S if lengths is None else tl.load(lengths + b).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(length, BLOCK_S), splits) * BLOCK_S  # each batch row divides its own length
    if split * chunk >= length:
        return
    first_head, heads = tl.program_id(1) * HEADS, tl.program_id(1) * HEADS + tl.arange(0, BLOCK_H)
    v_tensor, v_strides = v
    first_component = 0 if compose_k is not None else first_head
    lanes = tl.arange(0, BLOCK_V * WIDTH)  # all value components side by side
    component, column = tl.cast(lanes // WIDTH, tl.int64), lanes % WIDTH  # heads may be more than 2^31 elements apart
    filled = ((component < VALUES) & (column < D))[None, :]
    scale: constexpr = D**-0.5 * LOG2_E
    # The heads of the one new position are the rows of this tile; surplus rows repeat the last head and are not stored.
    rows_are_heads = q[1][0], 0, q[1][1], q[1][3]
    q_tile = load_tile((q[0], rows_are_heads), b, 0, first_head, H, D, BLOCK_H, WIDTH)
    row_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_V * WIDTH], tl.float32)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, length), BLOCK_S):
        scores = tl.zeros([BLOCK_H, BLOCK_S], tl.float32)
        for c in tl.static_range(KEYS):  # sum_c compose_k[c, h] (q_h . K_c[s])
            k_tile = load_tile(k, b, first_component + c, start, length, D, BLOCK_S, WIDTH)
            dots = tl.dot(q_tile, tl.trans(k_tile))
            if compose_k is not None:
                dots *= tl.load(compose_k + c * H + heads, mask=heads < H, other=0.0).to(tl.float32)[:, None]
            scores += dots
        scores = tl.where((start + tl.arange(0, BLOCK_S))[None, :] < length, scores * scale, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, 1)
        v_rows = v_tensor + b * v_strides[0] + tl.cast(start, tl.int64) * v_strides[2]
        v_rows += tl.minimum(tl.arange(0, BLOCK_S), length - 1 - start)[:, None] * v_strides[2]
        v_columns = ((first_component + component) * v_strides[1] + column * v_strides[3])[None, :]
        v_tile = tl.load(v_rows + v_columns, mask=filled, other=0.0)  # (BLOCK_S, BLOCK_V * WIDTH)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * correction[:, None])  # sum_s p[h, s] V_c[s], for all c
        row_max = new_max
    row, live = (b * splits + split) * H + heads, (heads < first_head + HEADS) & (heads < H)
    tl.store(lse + row, row_max + tl.log2(row_sum), mask=live)
    partial += row[:, None] * (VALUES * D) + (component * D + column)[None, :]
    tl.store(partial, acc / row_sum[:, None], mask=live[:, None] & filled)


@jit
def combine_kernel(
    partial,
    lse,
    compose_v,
    gain,
    lengths,
    out,
    H,
    S,
    eps,
    D: constexpr,
    WIDTH: constexpr,
    VALUES: constexpr,
    SPLITS: constexpr,
    BLOCK_S: constexpr,
):
    """One head: the splits weighted by their share of the softmax, then the value composition, then the norm."""
    h, b = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    length = S if lengths is None else tl.load(lengths + b).to(tl.int32)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    live = splits * tl.cdiv(tl.cdiv(length, BLOCK_S), SPLITS) * BLOCK_S < length  # the others wrote nothing
    row = (b * SPLITS + splits) * H + h
    split_lse = tl.load(lse + row, mask=live, other=float("-inf"))
    weights = tl.exp2(split_lse - tl.max(split_lse, 0))
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


# ---- launching ------------------------------------------------------------------------------------------------------


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def launch(kernel, grid, first, *others, **options):
    with torch.cuda.device_of(first[0] if isinstance(first, tuple) else first):  # it may not be the current one
        kernel[grid](first, *others, **options)


@functools.cache
def device_limits(device):
    """(bytes of shared memory that a program may use, number of multiprocessors)."""
    if device.type != "cuda":  # the interpreter: as if on an H100
        return 227 * 1024, 132
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return shared, properties.multi_processor_count


def tile_options(kernel, q):
    """Tile, warps and pipeline stages of a prefill kernel: such as experiments/roofline.py compiles without spills."""
    D, shared = q.shape[-1], device_limits(q.device)[0]
    width = max(16, next_power_of_2(D))
    if q.dtype == torch.float32 and width <= 64:
        tiles = (64, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2)
    elif q.dtype == torch.float32:
        tiles = (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)
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


def contiguous(x):
    """The kernels read weights and lengths without strides: a transposed, sliced or expanded one is copied."""
    return None if x is None else x.contiguous()


def strided(x):
    """Heads as the kernels take them, or None."""
    return None if x is None else (x, x.stride())


def empty_like_heads(q):
    """(B, H, T, D) whose memory is (B, T, H, D): joining the heads for the output projection is then a view."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def launch_attention(q, k, v, gain, eps, save):
    """Output, the output before the norm (empty unless `save` and there is a norm), log2-sum-exp2 (B, H, T)."""
    B, H, T, D = q.shape
    gain = contiguous(gain)
    out, log_sum_exp = empty_like_heads(q), q.new_empty(B, H, T, dtype=torch.float32)
    pre_norm = empty_like_heads(q) if save and gain is not None else None
    options, inputs = tile_options(forward_kernel, q), map(strided, (q, k, v))
    grid = triton.cdiv(T, options["BLOCK_M"]), B * H
    launch(forward_kernel, grid, *inputs, gain, strided(out), strided(pre_norm), log_sum_exp, H, T, eps, **options)
    return out, q.new_empty(0) if pre_norm is None else pre_norm, log_sum_exp


def launch_attention_backward(grad_out, q, k, v, gain, pre_norm, log_sum_exp, eps):
    """Gradients of q, k, v and gain (the last one empty without a norm)."""
    B, H, T, D = q.shape
    gain = contiguous(gain)
    dq, dk, dv, delta = empty_like_heads(q), empty_like_heads(q), empty_like_heads(q), torch.empty_like(log_sum_exp)
    grad = grad_out if gain is None else empty_like_heads(q)
    options = dict(D=D, WIDTH=tile_options(forward_kernel, q)["WIDTH"], BLOCK_M=32)
    blocks = triton.cdiv(T, options["BLOCK_M"])
    grad_gain = None if gain is None else q.new_empty(B, blocks, H, D, dtype=torch.float32)
    inputs = strided(pre_norm), strided(grad_out), gain, strided(grad)
    launch(backward_prepare_kernel, (blocks, B * H), *inputs, delta, grad_gain, H, T, eps, **options)
    inputs = *map(strided, (q, k, v, grad)), log_sum_exp, delta
    for kernel, outputs, block in ((backward_dkdv_kernel, (dk, dv), "BLOCK_N"), (backward_dq_kernel, (dq,), "BLOCK_M")):
        options = tile_options(kernel, q)
        grid = triton.cdiv(T, options[block]), B * H
        launch(kernel, grid, *inputs, *map(strided, outputs), H, T, **options)
    return dq, dk, dv, q.new_empty(0) if gain is None else grad_gain.sum((0, 1)).to(gain.dtype)


@constant_while_tracing
def decode_options(device, itemsize, H, n_k, n_v, D, to_compose):
    """Sizes of the decode kernel, or None where its accumulators or a block of keys would not fit one program."""
    heads, keys, values = (H, n_k, n_v) if to_compose else (1, 1, 1)
    width = max(16, next_power_of_2(D))
    lanes = next_power_of_2(values) * width
    block_h = max(16, min(next_power_of_2(heads), 64, 32768 // itemsize // lanes))  # tl.dot needs 16 rows
    bytes_per_key = (keys * width + lanes) * itemsize
    room = device_limits(device)[0] - 8192 - block_h * width * itemsize
    preferred = 64 if lanes <= 128 else 32 if lanes <= 512 else 16
    block_s = next((size for size in (64, 32, 16) if size <= preferred and size * bytes_per_key <= room), None)
    if block_s is None or lanes * itemsize > 4096:
        return None
    sizes = dict(D=D, WIDTH=width, HEADS=min(heads, block_h), KEYS=keys, VALUES=values)
    sizes |= dict(BLOCK_H=block_h, BLOCK_V=lanes // width, BLOCK_S=block_s)
    return dict(**sizes, num_warps=4 if block_h * lanes <= 8192 else 8, num_stages=2)


def launch_decode(q, k, v, compose_k, compose_v, gain, lengths, eps):
    """The output (B, H, 1, D) of one new position: `functional.mea_decode`."""
    B, H, _, D = q.shape
    S, to_compose = k.shape[2], compose_k is not None
    compose_k, compose_v, gain, lengths = map(contiguous, (compose_k, compose_v, gain, lengths))
    options = decode_options(q.device, q.element_size(), H, k.shape[1], v.shape[1], D, to_compose)
    blocks, block_s = triton.cdiv(H, options["HEADS"]), options["BLOCK_S"]
    # Two programs per multiprocessor, as far as there are keys; a power of two, since combine_kernel loads a tile.
    programs = 2 * device_limits(q.device)[1] // max(1, B * blocks)
    splits = next_power_of_2(max(1, min(128, programs, triton.cdiv(S, block_s))))
    partial = q.new_empty(B, splits, H, options["VALUES"], D, dtype=torch.float32)
    log_sum_exp, out = q.new_empty(B, splits, H, dtype=torch.float32), q.new_empty(B, H, 1, D)
    heads = map(strided, (q, k, v))
    launch(decode_kernel, (splits, blocks, B), *heads, compose_k, lengths, partial, log_sum_exp, H, S, **options)
    options = dict(D=D, WIDTH=options["WIDTH"], VALUES=options["VALUES"], SPLITS=splits, BLOCK_S=block_s, num_warps=8)
    launch(combine_kernel, (H, B), partial, log_sum_exp, compose_v, gain, lengths, out, H, S, eps, **options)
    return out


# The operators that autograd and torch.compile see. Each is opaque to them: its `*_shapes` states what it returns.


def operator(launcher, schema):
    return torch.library.custom_op(f"nanomea::{launcher.__name__}", launcher, mutates_args=(), schema=schema)


attention_op = operator(
    launch_attention,
    "(Tensor q, Tensor k, Tensor v, Tensor? gain, float eps, bool save) -> (Tensor, Tensor, Tensor)",
)
attention_backward_op = operator(
    launch_attention_backward,
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? gain, Tensor pre_norm, Tensor log_sum_exp, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
decode_op = operator(
    launch_decode,
    "(Tensor q, Tensor k, Tensor v, Tensor? compose_k, Tensor? compose_v, Tensor? gain, Tensor? lengths, float eps)"
    " -> Tensor",
)


@attention_op.register_fake
def attention_shapes(q, k, v, gain, eps, save):
    pre_norm = empty_like_heads(q) if save and gain is not None else q.new_empty(0)
    return empty_like_heads(q), pre_norm, q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward_op.register_fake
def attention_backward_shapes(grad_out, q, k, v, gain, pre_norm, log_sum_exp, eps):
    grad_gain = q.new_empty(0) if gain is None else gain.new_empty(gain.shape)
    return empty_like_heads(q), empty_like_heads(q), empty_like_heads(q), grad_gain


@decode_op.register_fake
def decode_shapes(q, k, v, compose_k, compose_v, gain, lengths, eps):
    return q.new_empty(q.shape)


def save_for_backward(ctx, inputs, output):
    q, k, v, gain, ctx.eps, _ = inputs
    out, pre_norm, log_sum_exp = output
    ctx.save_for_backward(q, k, v, gain, out if gain is None else pre_norm, log_sum_exp)


def run_backward(ctx, grad_out, *_):
    q, k, v, gain, pre_norm, log_sum_exp = ctx.saved_tensors
    dq, dk, dv, grad_gain = attention_backward_op(grad_out, q, k, v, gain, pre_norm, log_sum_exp, ctx.eps)
    return dq, dk, dv, None if gain is None else grad_gain, None, None


attention_op.register_autograd(run_backward, setup_context=save_for_backward)


# Whether the kernels run in Triton's interpreter, on any device: TRITON_INTERPRET=1 when this file was imported.
INTERPRETED = triton is not None and not isinstance(forward_kernel, triton.JITFunction)


def triton_obstacle(device, dtype, D):
    """Why no kernel computes this, or None."""
    if triton is None:
        return "triton is not installed (pip install triton)"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        return f"triton {triton.__version__} is older than 3.3"
    if device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on a {device.type} device"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels do not compute in {dtype}"
    return f"heads are {D} wide, more than 128" if D > 128 else None
