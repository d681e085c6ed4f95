"""What attention computes with, in PyTorch: norm, composition, loss, causal attention on its paths, and which is taken.

MEA (arXiv 2601.19611, eq. 10-12) projects `Hc` component heads, mixes them into `H` composite heads with one learned
(Hc, H) matrix for keys and one for values, attends causally, and normalises the output of every head by itself:

    K_h = sum_c compose_k[c, h] K_c     V_h = sum_c compose_v[c, h] V_c
    y_h = RMSNorm(softmax(q_h K_h^T / sqrt(D)) V_h) * gain_h

`mea_attention` computes a whole sequence, `mea_decode` one new position against a cache of components; None instead of
a matrix says that the heads are composed already. `causal_attention` is attention alone, for every variant. The path of
a call is the backend that computes it, and all give the same numbers:

    triton      the kernels of kernels.py, on a GPU (in tests on a CPU, too, with TRITON_INTERPRET=1)
    sdpa        torch's fused attention
    blocks      `BlockAttention`, the readable twin of the kernels: ten lines of PyTorch a pass
    reference   the formula

path="auto" asks for what `set_kernel` chose. As long as nothing was chosen, that is blocks where they were faster on a
CPU (`blocks_are_faster`), otherwise sdpa; never triton, whose kernels have not been timed on a GPU.

Read next: attention.py, which is built from this; kernels.py for the kernels.

    python functional.py              # a numeric check of each path that this machine has
"""

import functools
import logging

import torch
import torch.nn.functional as F

import kernels
from kernels import attention_op, constant_while_tracing, decode_op, decode_options, triton_obstacle

log = logging.getLogger(__name__)

# ---- norm, composition, loss ----------------------------------------------------------------------------------------


def upcast(x):
    """x in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (RMSNorm, arXiv 1910.07467), reduced in float32.

    `weight` broadcasts against x: a head norm's gain (H, D) fits x (B, T, H, D), and weight[:, None] x (B, H, T, D).
    """
    if torch.is_grad_enabled():
        return RMSNormFunction.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight.to(x.dtype)


def inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays with size 1."""
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.size(-1) + eps)


class RMSNormFunction(torch.autograd.Function):
    """Written out because autograd through `F.rms_norm` takes twice the time on a CPU, where norms are not cheap."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = upcast(x)
        ctx.eps, inverse = eps, inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        x, grad, dtype = upcast(x), upcast(grad), x.dtype
        if torch.is_grad_enabled():  # for a second derivative: what was saved does not know that it depends on x
            inverse = inverse_rms(x, ctx.eps)
        unit = x * inverse
        grad_weight = (grad * unit).sum_to_size(weight.shape).to(weight.dtype)
        grad = grad * weight
        along = (grad * unit).mean(-1, keepdim=True)  # the part along x would only change its length: it drops out
        return (torch.addcmul(grad, unit, along, value=-1) * inverse).to(dtype), grad_weight, None


def compose_heads(components, weight):
    """Head-level linear composition, the idea at the top of attention.py: out_h = sum_c weight[c, h] components_c.

    (B, Hc, T, D), (Hc, H) -> (B, H, T, D) (2601.19611, eq. 10). A weight of None: the heads are composed already.
    Written as matmuls over (B, T), which move nothing in a projection's memory (B, T, Hc, D).
    """
    if weight is None:
        return components
    return (weight.to(components.dtype).t() @ components.transpose(1, 2)).transpose(1, 2)


IGNORED = -100  # a target that is no target, as in F.cross_entropy


def linear_cross_entropy(x, weight, targets):
    """Mean cross-entropy, in nats, of logits X W^T: x (N, C), weight (V, C), targets (N) -> a scalar.

    Rows whose target is -100 are left out of the mean; of no rows at all it is NaN. Raises ValueError unless there is
    one target per row. On a CPU in pieces of rows that stay in its cache; no more of the logits, or of their gradient,
    is ever held.
    """
    if targets.shape != x.shape[:1]:
        raise ValueError(f"linear_cross_entropy: {tuple(targets.shape)} targets for {len(x)} rows: give one per row")
    x, weight = autocast_inputs(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.cross_entropy(upcast(F.linear(x, weight)), targets, ignore_index=IGNORED)
        counted = targets != IGNORED
        if not counted.all():
            x, targets = x[counted], targets[counted]
        return LinearCrossEntropy.apply(x, weight, targets, needs_grad(x, weight))


class LinearCrossEntropy(torch.autograd.Function):
    """The gradient of the logits, (softmax - one-hot) / N, is known as soon as the loss is: dX and dW are made at once.

    Adding dW piece by piece in float32 also rounds less than one product in bfloat16.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, save):
        dx, dw = torch.empty_like(x), torch.zeros_like(upcast(weight))
        loss = dw.new_zeros(())
        pieces = (part.split(max(1, SCORES_PER_CALL // len(weight))) for part in (x, targets[:, None], dx))
        for rows, wanted, grad in zip(*pieces):
            log_p = F.log_softmax(upcast(F.linear(rows, weight)), -1)
            loss -= log_p.gather(-1, wanted).sum()
            if save:
                difference = log_p.exp_().scatter_add_(-1, wanted, -torch.ones_like(log_p[:, :1])).to(x.dtype)
                torch.mm(difference, weight, out=grad)
                dw += difference.mT @ rows
        ctx.save_for_backward(*((dx, dw) if save else ()))
        ctx.N = len(x)
        return loss / ctx.N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        grad = grad / max(1, ctx.N)  # of no rows the gradient is 0, as in F.cross_entropy
        return dx * grad, (dw * grad).to(dx.dtype), None, None


# ---- attention in blocks of queries ---------------------------------------------------------------------------------

BLOCK = 64  # queries in a block
SCORES_PER_CALL = 2**19  # that each thread computes in one call: 2 MB in float32, few calls and near its cache
KEPT = 512  # keys up to which the weights are kept for the backward pass; beyond, memory is linear in the sequence


class BlockAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V, causal, each block of queries against the keys up to its end: the kernels in torch.

    q (N, T G, D), k (N, S, D), v (N, S, Dv) -> (N, T G, Dv): at each position, G query heads share one key/value head,
    as more rows of the same product. `positions` (N, T G), or None for the last T of S. The softmax is computed in
    float32 at least, and as a whole, for a block has all its keys: that is where the kernel needs its running maximum.
    The weights are kept up to KEPT keys and computed again in the backward pass for more.

        P = softmax(Q K^T / sqrt(D))    dP = dY V^T    dS = P (dP - rowsum(P dP)) / sqrt(D)
        dQ = dS K                       dK = dS^T Q    dV = P^T dY

    With dropout, P in front of V and dP are multiplied by the mask, drawn again from a saved seed.
    """

    @staticmethod
    def forward(ctx, q, k, v, positions, G, dropout):
        ctx.positions, ctx.G, ctx.dropout, ctx.scale = positions, G, dropout, q.size(-1) ** -0.5
        ctx.blocks, ctx.seed = query_blocks(q, k, positions, G), torch.randint(2**62, ()).item() if dropout else None
        keep, weights = k.size(1) <= KEPT and any(ctx.needs_input_grad), []
        q_wide, k_wide, v_wide = upcast(q) * ctx.scale, upcast(k), upcast(v)
        out, mask = q.new_empty(*q.shape[:2], v.size(-1)), dropout_masks(ctx, q.device)
        for heads, rows, keys in ctx.blocks:
            p = block_weights(ctx, q_wide, k_wide, heads, rows, keys)
            weights += [p.to(q.dtype)] if keep else []
            p = p * mask(p) if dropout else p
            out[heads, rows] = p @ v_wide[heads, keys]
        ctx.save_for_backward(q, k, v, *weights)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, *weights = ctx.saved_tensors
        q_wide, k_wide, v_wide = upcast(q) * ctx.scale, upcast(k), upcast(v)
        dq, mask = torch.empty_like(q), dropout_masks(ctx, q.device)
        dk, dv = torch.zeros_like(k_wide.mT), torch.zeros_like(v_wide.mT)  # transposed, the faster products
        with torch.autocast(q.device.type, enabled=False):
            for i, (heads, rows, keys) in enumerate(ctx.blocks):
                p = upcast(weights[i]) if weights else block_weights(ctx, q_wide, k_wide, heads, rows, keys)
                g = grad[heads, rows]
                dp, dropped = upcast(g) @ v_wide[heads, keys].mT, p
                if ctx.dropout:
                    kept = mask(p)
                    dp, dropped = dp * kept, p * kept
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)  # P (dP - rowsum(P dP)), in one pass
                ds = ds.mul_(ctx.scale).to(q.dtype)
                dq[heads, rows] = ds @ k[heads, keys]
                dk[heads, :, keys] += q[heads, rows].mT @ ds
                dv[heads, :, keys] += g.mT @ dropped.to(q.dtype)
        return dq, dk.mT.to(k.dtype), dv.mT.to(v.dtype), None, None, None


def query_blocks(q, k, positions, G):
    """Slices (heads, rows, keys): some of the N heads, BLOCK queries of each, and the keys that these may see.

    Heads are as many as it takes for each thread to compute about SCORES_PER_CALL scores at a time.
    """
    N, T, S = len(q), q.size(1) // G, k.size(1)
    step = max(1, SCORES_PER_CALL * torch.get_num_threads() // max(1, G * min(BLOCK, T) * S))
    stops = [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]
    seen = lambda stop: S - T + stop if positions is None else S
    blocks = [(slice(start * G, stop * G), slice(seen(stop))) for start, stop in stops]
    return [(slice(n, n + step), *block) for n in range(0, N, step) for block in blocks]


def block_weights(ctx, q, k, heads, rows, keys):
    """softmax(q k^T), causal, of one block: (heads, M G, keys)."""
    scores = q[heads, rows] @ k[heads, keys].mT
    if ctx.positions is None:  # the last M keys are the block's own: only there may a key be later than a query
        M = scores.size(1) // ctx.G
        later = torch.full((M, M), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        scores[..., -M:] += later.repeat_interleave(ctx.G, 0)
    else:
        later = torch.arange(scores.size(2), device=k.device) > ctx.positions[heads, rows, None]
        scores.masked_fill_(later, -torch.inf)
    return scores.softmax(-1)


def dropout_masks(ctx, device):
    """A function that gives the same sequence of masks, 0 or 1 / (1 - dropout), for the same seed."""
    generator = torch.Generator(device).manual_seed(ctx.seed) if ctx.dropout else None
    return lambda p: torch.empty_like(p).bernoulli_(1 - ctx.dropout, generator=generator) / (1 - ctx.dropout)


def block_attention(q, k, v, positions, dropout):
    """`causal_attention` by `BlockAttention`: the H/n query heads that share a key/value head become its rows."""
    (B, H, T, D), n = q.shape, k.size(1)
    G = H // n
    q = q.unflatten(1, (n, G)).transpose(2, 3).reshape(B * n, T * G, D)
    if positions is not None:
        positions = positions.expand(B, T).repeat_interleave(n, 0).repeat_interleave(G, 1)
    y = BlockAttention.apply(q, k.flatten(0, 1), v.flatten(0, 1), positions, G, dropout)
    return y.view(B, n, T, G, v.size(-1)).transpose(2, 3).flatten(1, 2)


def blocks_are_faster(q, k, gradient, positions=None):
    """Whether `BlockAttention` beat torch's fused attention wherever it was timed (roofline.py --blocks).

    In training on a CPU, in windows short enough to keep the weights and with enough scores to fill the machine.
    """
    (B, H, T, _), S = q.shape, k.size(2)
    if q.device.type != "cpu" or positions is not None or not gradient or torch.compiler.is_compiling():
        return False
    return (S <= KEPT if q.dtype == torch.bfloat16 else S == KEPT) and B * H * T * S >= 2**20


# ---- which path -----------------------------------------------------------------------------------------------------

PATHS = "auto", "triton", "sdpa", "blocks", "reference"
_kernel = "auto"  # what path="auto" asks for: see set_kernel


def set_kernel(name):
    """Make `name`, one of PATHS, what path="auto" stands for in this process: the programs' --kernel.

    A call that the kernels cannot serve takes torch's attention, and the log says why, once. Raises ValueError for an
    unknown name, and for triton where no kernel can run.
    """
    global _kernel
    if name not in PATHS:
        raise ValueError(f"kernel {name!r} is none of {', '.join(PATHS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "triton" and (obstacle := triton_obstacle(device, torch.bfloat16, 64)):
        raise ValueError(f"kernel 'triton' cannot run here: {obstacle}")
    _kernel = name


def kernel_is_chosen():
    """Whether `set_kernel` chose a path for the process."""
    return _kernel != "auto"


@functools.cache
def say_once(level, message):
    log.log(level, message)


def choose_path(name, path, q, k, gradient, positions=None, obstacle=None):
    """The path that `name` takes when `path` is asked for: triton, sdpa, blocks or reference.

    `obstacle`: what else stands against triton. Raises ValueError for an unknown path, and for path="triton" where the
    kernels cannot compute this.
    """
    chosen = requested_path(name, path, q.device, q.dtype, q.size(-1), obstacle)
    return chosen or ("blocks" if blocks_are_faster(q, k, gradient, positions) else "sdpa")


@constant_while_tracing
def requested_path(name, path, device, dtype, D, obstacle):
    """What the caller or `set_kernel` chose, if it can be; None leaves the choice to whichever of torch's is faster."""
    if path not in PATHS:
        raise ValueError(f"{name}: path={path!r} is none of {', '.join(map(repr, PATHS))}")
    chosen = _kernel if path == "auto" else path
    if chosen == "auto" and device.type == "cuda":
        say_once(logging.INFO, "torch's attention: the Triton kernels have not been timed on a GPU (--kernel triton)")
    if chosen == "triton" and (obstacle := triton_obstacle(device, dtype, D) or obstacle):
        if path == "triton":
            raise ValueError(f"{name}: path='triton' is not possible: {obstacle}")
        say_once(logging.WARNING, f"{name} takes torch's attention, not triton: {obstacle}")
        return None
    return None if chosen == "auto" else chosen


def autocast_inputs(*tensors):
    """The tensors as autocast would give them to torch's fused attention; what follows must not be cast again."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) if x.dtype != torch.float64 else x for x in tensors)


def needs_grad(*tensors):
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# ---- attention ------------------------------------------------------------------------------------------------------


def causal_mask(T, S, positions=None, device=None):
    """(1 or B, 1, T, S) booleans, True where query t may see key s: s <= its position.

    Without `positions` (B, T) the queries are the last T of the S positions.
    """
    if positions is None:
        positions = torch.arange(S - T, S, device=device)[None]
    return torch.arange(S, device=positions.device) <= positions[:, None, :, None]


def reference_attention(q, k, v, positions, dropout):
    """`causal_attention` as its formula stands, in float32 at least."""
    groups = q.size(1) // k.size(1)
    k, v = (upcast(x).repeat_interleave(groups, 1) for x in (k, v))  # (B, H, S, D)
    scores = upcast(q) @ k.mT * q.size(3) ** -0.5  # (B, H, T, S)
    scores = scores.masked_fill(~causal_mask(q.size(2), k.size(2), positions, q.device), -torch.inf)
    return (F.dropout(scores.softmax(-1), dropout) @ v).to(q.dtype)


def sdpa_attention(q, k, v, positions, dropout):
    """`causal_attention` by torch's fused attention."""
    T, S, D, mask = q.size(2), k.size(2), q.size(3), None
    if positions is not None or 1 < T < S:  # one query that is the last position may see everything: no mask
        mask = causal_mask(T, S, positions, q.device)
    if v.size(3) > D:  # torch's fused kernels want one width; zeros behind q and k change no score
        q, k = (F.pad(x, (0, v.size(3) - D)) for x in (q, k))
    causal, grouped = mask is None and T > 1, k.size(1) != q.size(1)
    if grouped and T == 1:  # the queries of a group, as if they were positions of one head: it is read once for all
        q = q.view(len(q), k.size(1), -1, q.size(3))
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=D**-0.5).flatten(1, 2).unsqueeze(2)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=D**-0.5, enable_gqa=grouped)


def sdpa_is_wrong(device, n_query, n_key, key_width, value_width):
    """On Apple's GPUs torch before 2.12 errs where heads are grouped, or where values are not as wide as keys."""
    return device.type == "mps" and torch.__version__ < (2, 12) and (n_query, key_width) != (n_key, value_width)


def causal_attention(q, k, v, positions=None, dropout=0.0, path="auto"):
    """softmax(Q K^T / sqrt(D)) V, causal: (B, H, T, Dv) from q (B, H, T, D), k (B, n, S, D), v (B, n, S, Dv).

    n < H is grouped-query attention: H/n neighbouring query heads read one key/value head. `positions` (B, T) are the
    places of the queries where the rows of a batch have different lengths; without them the queries are the last T of
    S. Keys and values behind a row's places have no weight but must be finite, as in a cache that starts as zeros.
    `path` as at the top of this file, without triton, whose kernels belong to `mea_attention`. Raises ValueError for
    shapes that do not fit and for an unknown path.
    """
    q, k, v = autocast_inputs(q, k, v)
    if q.size(1) % k.size(1) or k.shape[:3] != v.shape[:3] or q.size(3) != k.size(3):
        raise ValueError(f"causal_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    no_kernel = "it has no kernel of its own"
    path = choose_path("causal_attention", path, q, k, needs_grad(q, k, v), positions, no_kernel)
    if path == "sdpa" and sdpa_is_wrong(q.device, q.size(1), k.size(1), k.size(3), v.size(3)):
        path = "reference"
    attend = {"blocks": block_attention, "sdpa": sdpa_attention, "reference": reference_attention}[path]
    with torch.autocast(q.device.type, enabled=False):
        return attend(q, k, v, positions, dropout)


def absorbed_attention(q, k_components, v_components, compose_k, compose_v, positions=None, dropout=0.0):
    """Causal attention with composed heads of which none is built: the query absorbs the composition.

        scores_h = (compose_k[:, h] (x) q_h) . K_cat / sqrt(D)      out_h = sum_c compose_v[c, h] (A_h V_c)

    q (B, H, T, D), k_components (B, n_k, S, D), v_components (B, n_v, S, D), compose_k (n_k, H), compose_v (n_v, H)
    -> (B, H, T, D). To all H queries the components are one wide head, of n_k D and n_v D features, that attention
    reads as it lies in the cache, once. `positions` as in `causal_attention`.
    """
    q, k_components, v_components = autocast_inputs(q, k_components, v_components)
    (B, H, T, D), (n_k, n_v) = q.shape, (k_components.size(1), v_components.size(1))
    S, mask = k_components.size(2), None
    if sdpa_is_wrong(q.device, 1, 1, n_k, n_v):
        k, v = compose_heads(k_components, compose_k), compose_heads(v_components, compose_v)
        return causal_attention(q, k, v, positions, dropout, path="sdpa")
    q = (q.unsqueeze(3) * compose_k.T[:, None, :, None]).to(q.dtype)  # (B, H, T, n_k, D)
    k, v = (x.transpose(1, 2).flatten(2)[:, None] for x in (k_components, v_components))  # (B, 1, S, n * D)
    if T > 1 or positions is not None:
        mask = causal_mask(T, S, positions, q.device).repeat(1, 1, H, 1)
    q = q.reshape(B, 1, H * T, n_k * D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=D**-0.5)  # (B, 1, H*T, n_v*D)
    return (y.reshape(B, H, T, n_v, D) * compose_v.T[:, None, :, None]).sum(3).to(y.dtype)


def check_shapes(name, q, k, v, compose_k, compose_v, norm_weight):
    """Raise ValueError, naming what does not fit, unless the arguments of `mea_attention` go together."""
    B, H, _, D = q.shape
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{name}: q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    for label, x, weight in (("key", k, compose_k), ("value", v, compose_v)):
        n, given = x.size(1), None if weight is None else tuple(weight.shape)
        if x.shape != (B, n, k.size(2), D):
            raise ValueError(f"{name}: {label}s {tuple(x.shape)} do not go with queries {tuple(q.shape)}")
        if given not in ([None, (n, H)] if n == H else [(n, H)]):
            need = f"a composition matrix of ({n}, {H}), not {given}"
            raise ValueError(f"{name}: {n} {label} heads for {H} query heads need {need}")
    if norm_weight is not None and norm_weight.shape != (H, D):
        raise ValueError(f"{name}: norm_weight is {tuple(norm_weight.shape)}, not ({H}, {D}) = (heads, head width)")


def composed_attention(q, k, v, compose_k, compose_v, norm_weight, eps, path, positions=None, absorb=False):
    """Compose, attend, normalise each head, on any path but triton."""
    dtype = q.dtype
    if path == "reference":  # from the composition to the norm in float32 at least
        q, k, v = upcast(q), upcast(k), upcast(v)
    if absorb:
        out = absorbed_attention(q, k, v, compose_k, compose_v, positions)
    else:
        out = causal_attention(q, compose_heads(k, compose_k), compose_heads(v, compose_v), positions, path=path)
    return (out if norm_weight is None else rms_norm(out, norm_weight[:, None], eps)).to(dtype)


def mea_attention(
    q, k_components, v_components, compose_k=None, compose_v=None, norm_weight=None, *, eps=1e-6, path="auto"
):
    """Causal MEA without a cache (eq. 10-12): compose, attend, normalise each head.

    q (B, H, T, D); k_components (B, n_k, T, D); v_components (B, n_v, T, D); compose_k (n_k, H), compose_v (n_v, H), or
    None where the heads are composed already (n == H); norm_weight (H, D), or None for no norm; any strides. Returns
    (B, H, T, D). `path` as at the top of this file; in fp32 "triton" is a tf32 computation on NVIDIA's tensor cores.
    Raises ValueError for shapes or dtypes that do not fit and for a path that cannot be taken.
    """
    q, k, v = autocast_inputs(q, k_components, v_components)
    check_shapes("mea_attention", q, k, v, compose_k, compose_v, norm_weight)
    if k.size(2) != q.size(2):
        raise ValueError(f"mea_attention: {q.size(2)} queries but {k.size(2)} keys; it has no cache (see mea_decode)")
    heads = q.size(0) * q.size(1)
    obstacle = f"{heads} heads in the batch are more than a grid's 65535" if heads > 65535 else None
    gradient = needs_grad(q, k, v, compose_k, compose_v, norm_weight)
    path = choose_path("mea_attention", path, q, k, gradient, obstacle=obstacle)
    with torch.autocast(q.device.type, enabled=False):
        if path == "triton":
            k, v = compose_heads(k, compose_k), compose_heads(v, compose_v)
            return attention_op(q, k, v, norm_weight, eps, gradient)[0]
        return composed_attention(q, k, v, compose_k, compose_v, norm_weight, eps, path)


def mea_decode(
    q, k_cache, v_cache, compose_k=None, compose_v=None, norm_weight=None, *, lengths=None, eps=1e-6, path="auto"
):
    """One new position against a cache of component heads: the last row of `mea_attention`.

    q (B, H, 1, D); k_cache (B, n_k, S, D) and v_cache (B, n_v, S, D); lengths (B,): how many positions of each row are
    filled, the new one included, from 1 to S (None: all S), and nothing behind them is read; otherwise as
    `mea_attention`. Returns (B, H, 1, D). triton and sdpa build no composite head; the kernel has no
    gradient. Raises ValueError for shapes or dtypes that do not fit and for a path that cannot be taken.
    """
    q, k, v = autocast_inputs(q, k_cache, v_cache)
    check_shapes("mea_decode", q, k, v, compose_k, compose_v, norm_weight)
    B, H, T, D = q.shape
    n_k, n_v, to_compose = k.size(1), v.size(1), compose_k is not None or compose_v is not None
    if T != 1 or lengths is not None and lengths.shape != (B,):
        one = "must hold one position, and lengths, if given, one number per batch row"
        raise ValueError(f"mea_decode: q {tuple(q.shape)} {one}")
    if to_compose:  # what one side has composed already is composed with the identity
        compose_k, compose_v = (torch.eye(H, device=q.device) if w is None else w for w in (compose_k, compose_v))
    gradient, obstacle = needs_grad(q, k, v, compose_k, compose_v, norm_weight), None
    if gradient:
        obstacle = "the decode kernel has no gradient"
    elif decode_options(q.device, q.element_size(), H, n_k, n_v, D, to_compose) is None:
        obstacle = f"{n_k} key and {n_v} value components of width {D} do not fit one program"
    path = choose_path("mea_decode", path, q, k, gradient, obstacle=obstacle)
    with torch.autocast(q.device.type, enabled=False):
        if path == "triton":
            return decode_op(q, k, v, compose_k, compose_v, norm_weight, lengths, eps)
        positions = None
        if lengths is not None:  # torch would read what is not filled, and a weight of 0 times NaN is NaN
            positions = lengths[:, None] - 1
            unfilled = (torch.arange(k.size(2), device=k.device) > positions)[:, None, :, None]  # (B, 1, S, 1)
            k, v = k.masked_fill(unfilled, 0), v.masked_fill(unfilled, 0)
        absorb = to_compose and path == "sdpa"
        return composed_attention(q, k, v, compose_k, compose_v, norm_weight, eps, path, positions, absorb)


# ---- the program ----------------------------------------------------------------------------------------------------


def check_paths(device):
    """Compare each path that this machine has with the reference in fp64."""
    torch.manual_seed(0)
    heads = lambda n, length: torch.randn(2, length, n, 64, device=device).transpose(1, 2)  # (B, n, T, D)
    components = heads(3, 100), heads(2, 100)
    weights = torch.randn(3, 8, device=device), torch.randn(2, 8, device=device), torch.randn(8, 64, device=device)
    for function, length in ((mea_attention, 100), (mea_decode, 1)):
        operands = heads(8, length), *components, *weights
        exact = function(*(x.double() for x in operands), path="reference")
        for path in PATHS[1:]:
            try:
                error = (function(*operands, path=path).double() - exact).norm() / exact.norm()
                print(f"{function.__name__:14s} {path:10s} relative error {error:.1e}")
            except ValueError as refusal:
                print(f"{function.__name__:14s} {path:10s} {refusal}")
    if device == "cpu" and kernels.triton is not None and not kernels.INTERPRETED:
        print("TRITON_INTERPRET=1 python functional.py runs the kernels themselves here, slowly")


if __name__ == "__main__":
    from options import run_program

    run_program(lambda: check_paths("cuda" if torch.cuda.is_available() else "cpu"))
