"""Bi-WKV attention of Vision-RWKV, 2403.02308, forward and backward, as `scans.bi_wkv` defines it: for each channel

    y_t = sum_i p_ti v_i,   p_ti ~ exp(k_i - (|t - i| - 1) w) for i != t,   p_tt ~ exp(u + k_t)

The tokens on one side of t are a segment (r, i, a, b): the token i whose term is the largest, its key r, and the sums
a of exp(k_j + ...) v_j and b of exp(k_j + ...), relative to that term. Two segments join with one exponential, of the
difference of their largest terms; no exponential exceeds 1, whatever the sign of w, and no sum of many steps w, which
would lose digits, is ever formed: distances are differences of whole numbers. For the backward pass each token keeps
its largest term, as key and distance, and its share: 1 / the sum of all terms, relative to the largest.

A program is one warp: one sequence and 32 channels, one in each lane. A first pass from the right keeps the segment to
the right of each tile; a second from the left scans each tile's tokens, in the lane's registers, from both sides.
"""

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import TRITON_TYPES, configuration, differentiable, on, options, rows, sum_type, training, wide

# (tokens, channels, warps) of a tile. As in selective_scan.py the strides are kept from Triton's alignment analysis.
FORWARD = {"default": (4, 32, 1), "interpreted": (4, 2, 1)}
BACKWARD = {"default": (4, 32, 1), "interpreted": (4, 2, 1)}
STRIDES = ["k_b", "k_t", "v_b", "v_t", "T", "C"]
NONE = tl.constexpr(-1e30)                                              # the key of no token at all


@triton.jit
def exp(x):
    return tl.exp2(1.4426950408889634 * x)


@triton.jit
def join(r1, i1, a1, b1, w1, r2, i2, a2, b2, w2):
    """Two segments as one, relative to the larger of their largest terms. Places i grow towards the token that looks:
    they are t on its left and -t on its right."""
    delta = (r2 - r1) + (i2 - i1) * w1
    later = delta > 0
    small = exp(-tl.abs(delta))
    one, two = tl.where(later, small, 1.0), tl.where(later, 1.0, small)
    return tl.where(later, r2, r1), tl.where(later, i2, i1), a1 * one + a2 * two, b1 * one + b2 * two, w1


@triton.jit
def before_each(r0, i0, a0, b0, r, i, a, b, w, row):
    """The segments before each row of a tile, from the segment before the tile and the tokens one row earlier."""
    start = row[:, None] == 0
    r, i = tl.where(start, r0[None], r), tl.where(start, i0[None], i)
    a, b = tl.where(start, a0[None], a), tl.where(start, b0[None], b)
    r, i, a, b, _ = tl.associative_scan((r, i, a, b, w), 0, join)
    return r, i, a, b


@triton.jit
def after_all(r0, i0, a0, b0, r, i, a, b, w):
    """The segment of a tile's tokens and of the segment before the tile. The order of joins is free."""
    r, i, a, b, w = tl.reduce((r, i, a, b, w), 0, join)
    r, i, a, b, _ = join(r0, i0, a0, b0, w, r, i, a, b, w)
    return r, i, a, b


@triton.jit
def turn(r, i, a, b):
    return tl.flip(r, 0), tl.flip(i, 0), tl.flip(a, 0), tl.flip(b, 0)


@triton.jit
def row_of(which, r, i, a, b):
    return (tl.sum(tl.where(which, r, 0), 0), tl.sum(tl.where(which, i, 0), 0), tl.sum(tl.where(which, a, 0), 0),
            tl.sum(tl.where(which, b, 0), 0))


@triton.jit
def keep(place, step, r, i, a, b, here):
    tl.store(place, r, here)
    tl.store(place + step, i, here)
    tl.store(place + 2 * step, a, here)
    tl.store(place + 3 * step, b, here)


@triton.jit
def kept(place, step, here):
    return (tl.load(place, here, 0), tl.load(place + step, here, 0), tl.load(place + 2 * step, here, 0),
            tl.load(place + 3 * step, here, 0))


@triton.jit
def key_tokens(k, v, k_t, v_t, first, near, side, T, c, here, SUM: tl.constexpr):
    """Tokens first + near as segments, seen from their right (side 1) or left (-1): (r, i, a, b)."""
    mask = ((near >= -first) & (near < T - first))[:, None] & here[None]
    k, v = k + tl.cast(first, tl.int64) * k_t, v + tl.cast(first, tl.int64) * v_t
    r = tl.where(mask, tl.load(k + (near * k_t)[:, None] + c[None], mask, 0).to(SUM), NONE)
    a = tl.load(v + (near * v_t)[:, None] + c[None], mask, 0).to(SUM)
    i = side * (tl.cast(first, SUM) + near.to(SUM))
    return r, i[:, None] + tl.zeros_like(r), a, tl.where(mask, 1.0, 0.0).to(SUM)


@triton.jit
def output_tokens(g, y, key, gap, share, first, near, side, T, C, c, here, SUM: tl.constexpr):
    """The same for the backward pass, where outputs are what is summed, with weights exp(-largest term of t) and values
    share g_t and share g_t y_t."""
    mask = ((near >= -first) & (near < T - first))[:, None] & here[None]
    at = tl.cast(first, tl.int64) * C + (near * C)[:, None] + c[None]
    r = tl.where(mask, -tl.load(key + at, mask, 0), NONE)
    a = tl.load(g + at, mask, 0).to(SUM) * tl.load(share + at, mask, 0)
    i = side * (tl.cast(first, SUM) + near.to(SUM))
    return r, i[:, None] + tl.load(gap + at, mask, 0), a, a * tl.load(y + at, mask, 0).to(SUM)


@triton.jit(do_not_specialize=STRIDES)
def forward_kernel(w, u, k, v, y, mean, key, gap, share, right, k_b, k_t, v_b, v_t, T, C, blocks, SAVE: tl.constexpr,
                   BT: tl.constexpr, BC: tl.constexpr, SUM: tl.constexpr):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    row, here = tl.arange(0, BT), c < C
    tiles = tl.cdiv(T, BT)
    k, v, right = k + n * k_b, v + n * v_b, right + n * tiles * 4 * C + c
    decay, bonus = tl.load(w + c, here, 0), tl.load(u + c, here, 0)
    W, none = decay[None] + tl.zeros((BT, BC), SUM), tl.zeros((BC,), SUM)
    r, i, a, b = none + NONE, none, none, none
    for back in range(tiles):
        first = (tiles - 1 - back) * BT
        keep(right + tl.cast(tiles - 1 - back, tl.int64) * 4 * C, C, r, i, a, b, here)
        rt, it, at, bt = key_tokens(k, v, k_t, v_t, first, row, -1, T, c, here, SUM)
        r, i, a, b = after_all(r, i, a, b, rt, it, at, bt, W)
    tl.debug_barrier()                                                  # the segments are there for the second pass
    r, i, a, b = none + NONE, none, none, none
    for tile in range(tiles):
        first = tile * BT
        # The left side: tokens t - 1. The right one: tokens t + 1, from the last to the first, turned over afterwards.
        rt, it, at, bt = key_tokens(k, v, k_t, v_t, first, row - 1, 1, T, c, here, SUM)
        r1, i1, a1, b1 = before_each(r, i, a, b, rt, it, at, bt, W, row)
        r, i, a, b = kept(right + tl.cast(tile, tl.int64) * 4 * C, C, here)
        rt, it, at, bt = key_tokens(k, v, k_t, v_t, first, BT - row, -1, T, c, here, SUM)
        r2, i2, a2, b2 = before_each(r, i, a, b, rt, it, at, bt, W, row)
        r2, i2, a2, b2 = turn(r2, i2, a2, b2)
        rt, it, vt, bt = key_tokens(k, v, k_t, v_t, first, row, 1, T, c, here, SUM)
        own = bonus[None] + rt
        # How far left, right and own lie above each other, by differences; the largest gets weight 1.
        gap1, gap2 = it - 1 - i1, -it - 1 - i2
        left_right = (r1 - r2) - (gap1 - gap2) * W
        left_own, right_own = (r1 - own) - gap1 * W, (r2 - own) - gap2 * W
        left_top = (left_right >= 0) & (left_own >= 0)
        right_top = (left_right < 0) & (right_own >= 0)
        weight1 = exp(tl.where(left_top, 0.0, tl.where(right_top, left_right, left_own)))
        weight2 = exp(tl.where(left_top, -left_right, tl.where(right_top, 0.0, right_own)))
        weight = exp(tl.where(left_top, -left_own, tl.where(right_top, -right_own, 0.0)))
        mask = (row < T - first)[:, None] & here[None]
        part = 1 / tl.where(mask, weight1 * b1 + weight2 * b2 + weight, 1.0)
        result = (weight1 * a1 + weight2 * a2 + weight * vt) * part
        out = (n * T + first) * C + (row * C)[:, None] + c[None]
        tl.store(y + out, result, mask)
        if SAVE:
            if mean is not None:
                tl.store(mean + out, result, mask)
            tl.store(key + out, tl.where(left_top, r1, tl.where(right_top, r2, own)), mask)
            tl.store(gap + out, tl.where(left_top, gap1, tl.where(right_top, gap2, 0.0)), mask)
            tl.store(share + out, part, mask)
        # To the next tile: the segment before the last row, and the last token.
        last = row[:, None] == BT - 1
        r, i, a, b = row_of(last, r1, i1, a1, b1)
        rt, it, at, bt = row_of(last, rt, it, vt, bt)
        r, i, a, b, _ = join(r, i, a, b, decay, rt, it, at, bt, decay)


@triton.jit(do_not_specialize=STRIDES)
def backward_kernel(g, w, u, k, v, y, key, gap, share, right, gw, gu, gk, gv, k_b, k_t, v_b, v_t, T, C, blocks,
                    BT: tl.constexpr, BC: tl.constexpr, SUM: tl.constexpr):
    """At each t four segments: the keys and the outputs to its left and to its right. Outputs to the left saw this
    token on their right, and the keys to the right of it across it."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    row, here = tl.arange(0, BT), c < C
    tiles = tl.cdiv(T, BT)
    k, v, right = k + n * k_b, v + n * v_b, right + n * tiles * 8 * C + c
    g, y, key, gap, share = g + n * T * C, y + n * T * C, key + n * T * C, gap + n * T * C, share + n * T * C
    decay, bonus = tl.load(w + c, here, 0), tl.load(u + c, here, 0)
    W, none = decay[None] + tl.zeros((BT, BC), SUM), tl.zeros((BC,), SUM)
    r1, i1, a1, b1 = none + NONE, none, none, none
    r2, i2, a2, b2 = none + NONE, none, none, none
    for back in range(tiles):
        first = (tiles - 1 - back) * BT
        kept_right = right + tl.cast(tiles - 1 - back, tl.int64) * 8 * C
        keep(kept_right, C, r1, i1, a1, b1, here)
        keep(kept_right + 4 * C, C, r2, i2, a2, b2, here)
        rt, it, at, bt = key_tokens(k, v, k_t, v_t, first, row, -1, T, c, here, SUM)
        r1, i1, a1, b1 = after_all(r1, i1, a1, b1, rt, it, at, bt, W)
        rt, it, at, bt = output_tokens(g, y, key, gap, share, first, row, -1, T, C, c, here, SUM)
        r2, i2, a2, b2 = after_all(r2, i2, a2, b2, rt, it, at, bt, W)
    tl.debug_barrier()
    r1, i1, a1, b1 = none + NONE, none, none, none
    r2, i2, a2, b2 = none + NONE, none, none, none
    sum_w, sum_u = none, none
    for tile in range(tiles):
        first = tile * BT
        kept_right = right + tl.cast(tile, tl.int64) * 8 * C
        last = row[:, None] == BT - 1
        kt, place, vt, bt = key_tokens(k, v, k_t, v_t, first, row, 1, T, c, here, SUM)
        zt, it, gt, gy = output_tokens(g, y, key, gap, share, first, row, 1, T, C, c, here, SUM)
        # The token's own share.
        part = exp(tl.where(bt > 0, (bonus[None] + kt + zt) + (it - place) * W, 0.0)) * bt
        grad_v = part * gt
        grad_k = part * (gt * vt - gy)
        sum_u += tl.sum(grad_k, 0)
        # Outputs on the left, keys on the right.
        ro, io, ao, bo = output_tokens(g, y, key, gap, share, first, row - 1, 1, T, C, c, here, SUM)
        ro, io, ao, bo = before_each(r2, i2, a2, b2, ro, io, ao, bo, W, row)
        rt, it, at, bt = key_tokens(k, v, k_t, v_t, first, BT - row, -1, T, c, here, SUM)
        rk, ik, ak, bk = kept(kept_right, C, here)
        rk, ik, ak, bk = before_each(rk, ik, ak, bk, rt, it, at, bt, W, row)
        rk, ik, ak, bk = turn(rk, ik, ak, bk)
        part = exp((kt + ro) - (place - 1 - io) * W)
        grad_v += part * ao
        grad_k += part * (ao * vt - bo)
        # A pair of tokens is decayed once at each token between.
        sum_w -= tl.sum(exp((rk + ro) + (io + ik + 1) * W) * (ak * ao - bk * bo), 0)
        r2, i2, a2, b2 = row_of(last, ro, io, ao, bo)
        # Keys on the left, outputs on the right.
        rt, it, at, bt = key_tokens(k, v, k_t, v_t, first, row - 1, 1, T, c, here, SUM)
        rk, ik, ak, bk = before_each(r1, i1, a1, b1, rt, it, at, bt, W, row)
        rt, it, at, bt = output_tokens(g, y, key, gap, share, first, BT - row, -1, T, C, c, here, SUM)
        ro, io, ao, bo = kept(kept_right + 4 * C, C, here)
        ro, io, ao, bo = before_each(ro, io, ao, bo, rt, it, at, bt, W, row)
        ro, io, ao, bo = turn(ro, io, ao, bo)
        part = exp((kt + ro) - (-place - 1 - io) * W)
        grad_v += part * ao
        grad_k += part * (ao * vt - bo)
        sum_w -= tl.sum(exp((rk + ro) + (io + ik + 1) * W) * (ak * ao - bk * bo), 0)
        r1, i1, a1, b1 = row_of(last, rk, ik, ak, bk)
        mask = (row < T - first)[:, None] & here[None]
        out = (n * T + first) * C + (row * C)[:, None] + c[None]
        tl.store(gv + out, grad_v, mask)
        tl.store(gk + out, grad_k, mask)
        # To the next tile: both segments with the last token.
        kt, it, vt, bt = key_tokens(k, v, k_t, v_t, first, row, 1, T, c, here, SUM)
        rt, it, at, bt = row_of(last, kt, it, vt, bt)
        r1, i1, a1, b1, _ = join(r1, i1, a1, b1, decay, rt, it, at, bt, decay)
        zt, it, gt, gy = output_tokens(g, y, key, gap, share, first, row, 1, T, C, c, here, SUM)
        rt, it, at, bt = row_of(last, zt, it, gt, gy)
        r2, i2, a2, b2, _ = join(r2, i2, a2, b2, decay, rt, it, at, bt, decay)
    tl.store(gw + n * C + c, sum_w, here)
    tl.store(gu + n * C + c, sum_u, here)


def outputs(v, training):
    saved = v.shape if training else (0,)
    mean = (0,) if v.dtype == sum_type(v) else saved
    return v.new_empty(v.shape), *(v.new_empty(shape, dtype=sum_type(v)) for shape in (mean, saved, saved, saved))


@torch.library.custom_op("atlas::bi_wkv", mutates_args=())
def wkv(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        training: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y (B, T, C), and in training, for each token, y in the type of the sums (empty if that is its own), and its
    largest term: its key, its distance and its share."""
    (batch, T, C), type = v.shape, sum_type(v)
    k, v = rows(k), rows(v)
    tokens, channels, warps = configuration(FORWARD, v, C)
    blocks = triton.cdiv(C, channels)
    y, mean, *largest = outputs(v, training)
    right = v.new_empty(batch, triton.cdiv(T, tokens), 4, C, dtype=type)
    with on(v):
        forward_kernel[(batch * blocks,)](
            w.contiguous(), u.contiguous(), k, v, y, mean if mean.numel() else None, *largest, right, *k.stride()[:2],
            *v.stride()[:2], T, C, blocks, training, tokens, channels, TRITON_TYPES[type], **options(warps))
    return y, mean, *largest


@wkv.register_fake
def _(w, u, k, v, training):
    return outputs(v, training)


@torch.library.custom_op("atlas::bi_wkv_backward", mutates_args=())
def wkv_backward(g: torch.Tensor, w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
                 key: torch.Tensor, gap: torch.Tensor, share: torch.Tensor) -> list[torch.Tensor]:
    """-> the gradients of w, u, k and v."""
    (batch, T, C), type = v.shape, sum_type(v)
    k, v = rows(k), rows(v)
    tokens, channels, warps = configuration(BACKWARD, v, C)
    blocks = triton.cdiv(C, channels)
    gk, gv = k.new_empty(k.shape), v.new_empty(v.shape)
    gw, gu = (v.new_empty(batch, C, dtype=type) for _ in range(2))
    right = v.new_empty(batch, triton.cdiv(T, tokens), 8, C, dtype=type)
    with on(v):
        backward_kernel[(batch * blocks,)](
            g.contiguous(), w.contiguous(), u.contiguous(), k, v, y, key, gap, share, right, gw, gu, gk, gv,
            *k.stride()[:2], *v.stride()[:2], T, C, blocks, tokens, channels, TRITON_TYPES[type], **options(warps))
    return [gw.sum(0), gu.sum(0), gk, gv]


@wkv_backward.register_fake
def _(g, w, u, k, v, y, key, gap, share):
    return [w.new_empty(w.shape), u.new_empty(u.shape), k.new_empty(k.shape), v.new_empty(v.shape)]


def save(ctx, inputs, output):
    if not inputs[-1]:
        raise RuntimeError("atlas::bi_wkv was called for inference and cannot be differentiated")
    y, mean, *largest = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1], mean if mean.numel() else y, *largest)


def gradients(ctx, g, *_):
    if g is None:
        return 5 * (None,)
    return *wkv_backward(g, *ctx.saved_tensors), None


differentiable(wkv, wkv_backward, save, gradients)


@register_flop_formula(torch.ops.atlas.bi_wkv)
def _(w, u, k, v, *others, out_shape=None, **kwargs):
    return 30 * v[0] * v[1] * v[2]


@register_flop_formula(torch.ops.atlas.bi_wkv_backward)
def _(g, w, u, k, v, *others, out_shape=None, **kwargs):
    return 80 * v[0] * v[1] * v[2]


def bi_wkv(w, u, k, v):
    """As `scans.bi_wkv`, for float32, bfloat16 or float16 (B, T, C) of at least one number."""
    w, u = wide(v, w, u)
    return wkv(w, u, k, v, training(w, u, k, v))[0]
