"""ReLU linear attention of LiT, 2501.12976, forward and backward, as `scans.linear_attention` defines it:

    o_i = sum_j W_ij v_j / z_i,   W_ij = phi(q_i) . phi(k_j),   z_i = sum_j W_ij + N eps,   phi(x) = relu(x) + eps

for N tokens in heads d wide, by the cheaper of two routes. Few tokens (N <= 1.5 d): the weights of pairs, tile by tile,
as in flash attention without its softmax. Many: first the sums over tokens, S = sum_j phi(k_j)^T v_j (d, d) and s =
sum_j phi(k_j), in parts that torch adds, then o_i = phi(q_i) S / (phi(q_i) . s + N eps).

Backward, with gbar = g / z and e = -(g . o) / z:  M_ij = gbar_i . v_j + e_i,  gphi(q) = M phi(k),  gphi(k) = M^T
phi(q),  gv = W^T gbar; or by dS = sum_i phi(q_i)^T gbar_i, ds = sum_i e_i phi(q_i). For e the forward pass keeps o in
float32, and e is that of gbar as the products round it: an error of e is one of a whole row of M, and its part in the
gradients would grow with N. Products of bfloat16 go through the tensor cores as they are, those of float16 (which
cannot hold W or eps) as TF32, those of float32 as three TF32 products.
"""

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import (
    INTERPRETED,
    TRITON_TYPES,
    configuration,
    differentiable,
    on,
    options,
    rows,
    sum_type,
    training,
)

# (rows of a tile, its other side, step along the heads' width, warps)
PAIRS = {"default": (64, 64, 32, 8), torch.float32: (32, 32, 32, 8), "interpreted": (16, 16, 16, 1)}
SUMS = {"default": (64, 64, 32, 4), torch.float32: (64, 32, 32, 4), "interpreted": (16, 16, 16, 1)}
SPLIT = 512                                                             # tokens of one part of S

# What each output is made of: output -> (left, right, value), each "raw" tensors, their "phi", or "bar", gradients
# times 1 / z of their token. Pairs: output_r = sum_j (left_r . right_j [+ e]) value_j. Sums: output_n = left_n S [+ s].
KINDS = {"o": ("phi", "phi", "raw"), "q": ("bar", "raw", "phi"), "k": ("raw", "bar", "phi"), "v": ("phi", "phi", "bar")}


@triton.jit
def tile_of(x, n, c, N, d, stride, z, KIND: tl.constexpr, EPS: tl.constexpr, DOT: tl.constexpr, SUM: tl.constexpr):
    """Tokens n and channels c of one head, zero outside, as factors of a product; z: the normalisers of its tokens."""
    mask = (n < N)[:, None] & (c < d)[None]
    y = tl.load(x + (n.to(tl.int64) * stride)[:, None] + c[None], mask, 0).to(SUM)
    if KIND == "phi":
        y = tl.where(mask, tl.where(y < 0, 0.0, y) + EPS, 0.0)
    if KIND == "bar":
        y *= (1 / tl.load(z + n, n < N, 1))[:, None]
    return y.to(DOT)


@triton.jit
def head_of(x, bh, heads, b_stride, h_stride):
    return x + (bh // heads).to(tl.int64) * b_stride + (bh % heads).to(tl.int64) * h_stride


@triton.jit
def store(y, mean, result, bh, heads, y_b, y_h, y_n, n, c, N, d):
    mask, at = (n < N)[:, None] & (c < d)[None], (n.to(tl.int64) * y_n)[:, None] + c[None]
    tl.store(head_of(y, bh, heads, y_b, y_h) + at, result, mask)
    if mean is not None:
        tl.store(head_of(mean, bh, heads, y_b, y_h) + at, result, mask)


@triton.jit
def slopes_kernel(g, o, z, e, heads, g_b, g_h, g_n, o_b, o_h, o_n, N, blocks, d: tl.constexpr, BM: tl.constexpr,
                  BK: tl.constexpr, DOT: tl.constexpr, SUM: tl.constexpr):
    """e = -(gbar . o)."""
    bh = tl.program_id(0) // blocks
    g, o = head_of(g, bh, heads, g_b, g_h), head_of(o, bh, heads, o_b, o_h)
    z, e = z + bh.to(tl.int64) * N, e + bh.to(tl.int64) * N
    n, total = tl.program_id(0) % blocks * BM + tl.arange(0, BM), tl.zeros((BM,), SUM)
    for first in range(0, d, BK):
        c = first + tl.arange(0, BK)
        G = tile_of(g, n, c, N, d, g_n, z, "bar", 0, DOT, SUM).to(SUM)
        total += tl.sum(G * tile_of(o, n, c, N, d, o_n, z, "raw", 0, SUM, SUM), 1)
    tl.store(e + n, -total, n < N)


@triton.jit
def pairs_kernel(left, right, value, z, e, gate, mean, y, heads, left_b, left_h, left_n, right_b, right_h, right_n,
                 value_b, value_h, value_n, gate_b, gate_h, gate_n, y_b, y_h, y_n, N, blocks, d: tl.constexpr,
                 OUTPUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, VALUE: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, EPS: tl.constexpr, DOT: tl.constexpr,
                 PRECISION: tl.constexpr, SUM: tl.constexpr):
    """An output of the pairs route: "o" (and z), or the gradient of "q" or "k", zero where the gate is not positive,
    or of "v"."""
    bh = tl.program_id(0) // blocks
    left, right = head_of(left, bh, heads, left_b, left_h), head_of(right, bh, heads, right_b, right_h)
    value, z = head_of(value, bh, heads, value_b, value_h), z + bh.to(tl.int64) * N
    r = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    norm, sums = tl.zeros((BM,), SUM), ()
    for _ in tl.static_range(0, d, BC):
        sums = sums + (tl.zeros((BM, BC), SUM),)
    for start in range(0, N, BN):
        j = start + tl.arange(0, BN)
        weights = tl.zeros((BM, BN), SUM)
        for first in range(0, d, BK):
            c = first + tl.arange(0, BK)
            X = tile_of(left, r, c, N, d, left_n, z, LEFT, EPS, DOT, SUM)
            Y = tile_of(right, j, c, N, d, right_n, z, RIGHT, EPS, DOT, SUM)
            weights = tl.dot(X, tl.trans(Y), weights, input_precision=PRECISION, out_dtype=SUM)
        if OUTPUT == "o":
            norm += tl.sum(weights, 1)
        if OUTPUT == "q":                                               # columns beyond N meet a value of zero below
            weights += tl.load(e + bh.to(tl.int64) * N + r, r < N, 0)[:, None]
        if OUTPUT == "k":
            weights += tl.load(e + bh.to(tl.int64) * N + j, j < N, 0)[None]
        weights, added = weights.to(DOT), ()
        for first in tl.static_range(0, d, BC):
            V = tile_of(value, j, first + tl.arange(0, BC), N, d, value_n, z, VALUE, EPS, DOT, SUM)
            added = added + (tl.dot(weights, V, sums[first // BC], input_precision=PRECISION, out_dtype=SUM),)
        sums = added
    if OUTPUT == "o":
        norm += N * EPS
        tl.store(z + r, norm, r < N)
    for first in tl.static_range(0, d, BC):
        c, result = first + tl.arange(0, BC), sums[first // BC]
        if OUTPUT == "o":
            result /= norm[:, None]
        if gate is not None:
            open = tile_of(head_of(gate, bh, heads, gate_b, gate_h), r, c, N, d, gate_n, z, "raw", EPS, SUM, SUM) > 0
            result = tl.where(open, result, 0)
        store(y, mean, result, bh, heads, y_b, y_h, y_n, r, c, N, d)


@triton.jit
def sums_kernel(x, y, z, e, S, s, heads, x_b, x_h, x_n, y_b, y_h, y_n, N, tiles, splits, tokens, d: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, EPS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                SUM: tl.constexpr):
    """A part of S = sum_n phi(x_n)^T y_n and s = sum_n phi(x_n); with e, of S = sum_n phi(x_n)^T ybar_n and s = sum_n
    e_n phi(x_n)."""
    pid = tl.program_id(0)
    bh, tile, split = pid // (tiles * tiles * splits), pid // splits % (tiles * tiles), pid % splits
    x, y = head_of(x, bh, heads, x_b, x_h), head_of(y, bh, heads, y_b, y_h)
    r, c = tile // tiles * BM + tl.arange(0, BM), tile % tiles * BM + tl.arange(0, BM)
    total, vector = tl.zeros((BM, BM), SUM), tl.zeros((BM,), SUM)
    for first in range(0, tokens, BN):
        n = split * tokens + first + tl.arange(0, BN)
        X = tile_of(x, n, r, N, d, x_n, z, "phi", EPS, SUM, SUM)
        if e is None:
            Y = tile_of(y, n, c, N, d, y_n, z, "raw", EPS, DOT, SUM)
            vector += tl.sum(X, 0)
        else:
            Y = tile_of(y, n, c, N, d, y_n, z + bh.to(tl.int64) * N, "bar", EPS, DOT, SUM)
            vector += tl.sum(X * tl.load(e + bh.to(tl.int64) * N + n, n < N, 0)[:, None], 0)
        total = tl.dot(tl.trans(X.to(DOT)), Y, total, input_precision=PRECISION, out_dtype=SUM)
    part = (split * (tl.num_programs(0) // (tiles * tiles * splits)) + bh).to(tl.int64) * d
    tl.store(S + (part + r[:, None]) * d + c[None], total, (r < d)[:, None] & (c < d)[None])
    tl.store(s + part + r, vector, (r < d) & (tile % tiles == tl.zeros((BM,), tl.int32)))


@triton.jit
def apply_kernel(left, S, s, z, e, gate, mean, y, heads, left_b, left_h, left_n, gate_b, gate_h, gate_n, y_b, y_h, y_n,
                 S_r, S_c, N, blocks, tiles, d: tl.constexpr, OUTPUT: tl.constexpr, LEFT: tl.constexpr,
                 BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, EPS: tl.constexpr, DOT: tl.constexpr,
                 PRECISION: tl.constexpr, SUM: tl.constexpr):
    """An output of the other route: left S, where the strides may transpose S; for "o" divided by z = left . s + N eps,
    for "q" plus e s, for "k" plus s."""
    pid = tl.program_id(0)
    bh, block, tile = pid // (blocks * tiles), pid // tiles % blocks, pid % tiles
    left = head_of(left, bh, heads, left_b, left_h)
    n, c = block * BM + tl.arange(0, BM), tile * BC + tl.arange(0, BC)
    S, s, z = S + bh.to(tl.int64) * d * d, s + bh * d, z + bh.to(tl.int64) * N
    total, norm = tl.zeros((BM, BC), SUM), tl.zeros((BM,), SUM)
    for first in range(0, d, BK):
        r = first + tl.arange(0, BK)
        X = tile_of(left, n, r, N, d, left_n, z, LEFT, EPS, DOT, SUM).to(SUM)
        if OUTPUT == "o":
            norm += tl.sum(X * tl.load(s + r, r < d, 0)[None], 1)
        part = tl.load(S + (r * S_r)[:, None] + (c * S_c)[None], (r < d)[:, None] & (c < d)[None], 0)
        total = tl.dot(X, part, total, input_precision=PRECISION, out_dtype=SUM)
    if OUTPUT == "o":
        norm += N * EPS
        total /= norm[:, None]
        tl.store(z + n, norm, (n < N) & (tile == tl.zeros((BM,), tl.int32)))
    if OUTPUT == "q":
        slope = tl.load(e + bh.to(tl.int64) * N + n, n < N, 0)
        total += slope[:, None] * tl.load(s + c, c < d, 0)[None]
    if OUTPUT == "k":
        total += tl.load(s + c, c < d, 0)[None]
    if gate is not None:
        open = tile_of(head_of(gate, bh, heads, gate_b, gate_h), n, c, N, d, gate_n, z, "raw", EPS, SUM, SUM) > 0
        total = tl.where(open, total, 0)
    store(y, mean, total, bh, heads, y_b, y_h, y_n, n, c, N, d)


def dot_type(x):
    """(type of the factors, precision) of a product of such tensors."""
    if INTERPRETED:
        return TRITON_TYPES[sum_type(x)], "ieee"
    half = {torch.bfloat16: (tl.bfloat16, "tf32"), torch.float16: (tl.float32, "tf32")}
    return half.get(x.dtype, (tl.float32, "tf32x3"))


def by_token(x, dtype=None):
    """An empty (B, h, N, d) that lies in memory as (B, N, h, d), as the model's next step wants it."""
    B, h, N, d = x.shape
    return x.new_empty(B, N, h, d, dtype=dtype or x.dtype).transpose(1, 2)


def few(q):
    """Whether the pairs of tokens are the cheaper route."""
    return q.shape[2] <= 1.5 * q.shape[3]


def columns_of(d):
    """The width of the column tiles that d is cut into."""
    return 16 if INTERPRETED else next((c for c in (128, 64) if d % c == 0), 32)


def strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:3]]


def sums(x, y, z, e, eps):
    """(S (B h, d, d), s (B h, d)) of `sums_kernel`."""
    B, h, N, d = x.shape
    type, (dot, precision) = sum_type(x), dot_type(x)
    BM, BN, _, warps = configuration(SUMS, x, d)
    tiles, splits = triton.cdiv(d, BM), triton.cdiv(N, SPLIT)
    S, s = x.new_empty(splits, B * h, d, d, dtype=type), x.new_empty(splits, B * h, d, dtype=type)
    sums_kernel[(B * h * tiles * tiles * splits,)](
        x, y, z, e, S, s, h, *strides(x, y), N, tiles, splits, min(SPLIT, N), d, BM, BN, eps, dot, precision,
        TRITON_TYPES[type], **options(warps))
    return S.sum(0), s.sum(0)


def apply(output, left, S, s, z, e, y, eps, gate=None, mean=None):
    """`apply_kernel`, which fills y."""
    B, h, N, d = left.shape
    BM, _, BK, warps = configuration(SUMS, left, d)
    BC = min(64, columns_of(d))
    blocks, tiles = triton.cdiv(N, BM), triton.cdiv(d, BC)
    S_strides = (1, d) if output in "qk" else (d, 1)
    apply_kernel[(B * h * blocks * tiles,)](
        left, S, s, z, e, gate, mean, y, h, *strides(left, left if gate is None else gate, y), *S_strides, N, blocks,
        tiles, d, output, KINDS[output][0], BM, BC, BK, eps, *dot_type(left), TRITON_TYPES[sum_type(left)],
        **options(warps))


def pairs(output, left, right, value, z, e, y, eps, gate=None, mean=None):
    """`pairs_kernel`, which fills y."""
    B, h, N, d = left.shape
    BM, BN, BK, warps = configuration(PAIRS, left, d)
    blocks = triton.cdiv(N, BM)
    pairs_kernel[(B * h * blocks,)](
        left, right, value, z, e, gate, mean, y, h, *strides(left, right, value, left if gate is None else gate, y), N,
        blocks, d, output, *KINDS[output], BM, BN, BK, columns_of(d), eps, *dot_type(left),
        TRITON_TYPES[sum_type(left)], **options(warps))


@torch.library.custom_op("atlas::linear_attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float,
              training: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> o (B, h, N, d), z (B, h, N), and in training o in the type of the sums (empty if that is its own)."""
    q, k, v = rows(q), rows(k), rows(v)
    o, z, mean = outputs(q, v, training)
    kept = mean if mean.numel() else None
    with on(q):
        if few(q):
            pairs("o", q, k, v, z, None, o, eps, mean=kept)
        else:
            apply("o", q, *sums(k, v, None, None, eps), z, None, o, eps, mean=kept)
    return o, z, mean


def outputs(q, v, training):
    mean = by_token(v, sum_type(v)) if training and v.dtype != sum_type(v) else v.new_empty(0, dtype=sum_type(v))
    return by_token(v), q.new_empty(q.shape[:3], dtype=sum_type(q)), mean


@attention.register_fake
def _(q, k, v, eps, training):
    return outputs(q, v, training)


@torch.library.custom_op("atlas::linear_attention_backward", mutates_args=())
def attention_backward(g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
                       z: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> the gradients of q, k and v."""
    B, h, N, d = q.shape
    g, q, k, v = rows(g), rows(q), rows(k), rows(v)
    e, gq, gk, gv = torch.empty_like(z), by_token(q), by_token(k), by_token(v)
    BM, _, BK, warps = configuration(SUMS, q, d)
    blocks = triton.cdiv(N, BM)
    with on(q):
        slopes_kernel[(B * h * blocks,)](
            g, o, z, e, h, *strides(g, o), N, blocks, d, BM, BK, dot_type(q)[0], TRITON_TYPES[sum_type(q)],
            **options(warps))
        if few(q):
            pairs("q", g, v, k, z, e, gq, eps, gate=q)
            pairs("k", v, g, q, z, e, gk, eps, gate=k)
            pairs("v", k, q, g, z, e, gv, eps)
        else:
            apply("q", g, *sums(k, v, None, None, eps), z, e, gq, eps, gate=q)
            S, s = sums(q, g, z, e, eps)
            apply("k", v, S, s, z, e, gk, eps, gate=k)
            apply("v", k, S, s, z, e, gv, eps)
    return gq, gk, gv


@attention_backward.register_fake
def _(g, q, k, v, o, z, eps):
    return by_token(q), by_token(k), by_token(v)


def save(ctx, inputs, output):
    *tensors, ctx.eps, training = inputs
    if not training:
        raise RuntimeError("atlas::linear_attention was called for inference and cannot be differentiated")
    o, z, mean = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, mean if mean.numel() else o, z)


def gradients(ctx, g, *_):
    if g is None:
        return 5 * (None,)
    return *attention_backward(g, *ctx.saved_tensors, ctx.eps), None, None


differentiable(attention, attention_backward, save, gradients)


@register_flop_formula(torch.ops.atlas.linear_attention)
def _(q, *others, out_shape=None, **kwargs):
    B, h, N, d = q
    return 4 * B * h * N * d * (N if N <= 1.5 * d else d)


@register_flop_formula(torch.ops.atlas.linear_attention_backward)
def _(g, q, *others, out_shape=None, **kwargs):
    B, h, N, d = q
    return 10 * B * h * N * d * (N if N <= 1.5 * d else d)


def linear_attention(q, k, v, eps=1e-6):
    """As `scans.linear_attention`, for float32, bfloat16 or float16 (B, h, N, d) of at least one number. The result
    lies in memory as (B, N, h, d)."""
    return attention(q, k, v, eps, training(q, k, v))[0]
