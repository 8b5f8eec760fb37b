"""Rotary positions, 2104.09864, eq. 34, as `layers.rotate` defines them: each pair of adjacent dimensions is turned, in
the type of the sums, with one read and one write. A program turns some tokens of all heads: their angles are read once.
The way back is the turn by the opposite angles.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import TRITON_TYPES, configuration, differentiable, on, options, rows, sum_type, training

# (tokens of a program, warps)
TOKENS = {"default": (16, 4), "interpreted": (4, 1)}


@triton.jit
def kernel(x, cos, sin, y, x_b, x_h, x_n, angle_b, y_b, y_h, y_n, N, half, heads, blocks, SIGN: tl.constexpr,
           BN: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n, c = tl.program_id(0) % blocks * BN + tl.arange(0, BN), tl.arange(0, BLOCK)
    mask, n = (n < N)[:, None] & (c < half)[None], n.to(tl.int64)[:, None]
    at = b * angle_b + n * half + c[None]
    C, S = tl.load(cos + at, mask, 0).to(SUM), SIGN * tl.load(sin + at, mask, 0).to(SUM)
    c, both = tl.arange(0, 2 * BLOCK), tl.zeros((BN, 2 * BLOCK), tl.int64)
    mask = (n < N) & (c < 2 * half)[None] & (both == 0)
    for head in range(heads):
        pair = tl.load(x + b * x_b + head * x_h + n * x_n + c[None], mask, 0).to(SUM)
        one, two = tl.split(tl.reshape(pair, (BN, BLOCK, 2)))
        turned = tl.reshape(tl.join(one * C - two * S, two * C + one * S), (BN, 2 * BLOCK))
        tl.store(y + b * y_b + head * y_h + n * y_n + c[None], turned, mask)


@torch.library.custom_op("atlas::rotate", mutates_args=())
def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    x, cos, sin = rows(x), cos.contiguous(), sin.contiguous()
    B, h, N, d = x.shape
    y, (tokens, warps) = x.new_empty(B, N, h, d).transpose(1, 2), configuration(TOKENS, x, d)
    blocks = triton.cdiv(N, tokens)
    with on(x):
        kernel[(B * blocks,)](
            x, cos, sin, y, *x.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, *y.stride()[:3], N, d // 2, h,
            blocks, -1 if back else 1, tokens, triton.next_power_of_2(d // 2), TRITON_TYPES[sum_type(x)],
            **options(warps))
    return y


@turn.register_fake
def _(x, cos, sin, back):
    B, h, N, d = x.shape
    return x.new_empty(B, N, h, d).transpose(1, 2)


def save(ctx, inputs, output):
    _, cos, sin, ctx.back = inputs
    if cos.requires_grad or sin.requires_grad:
        raise RuntimeError("atlas::rotate has no gradient of the angles")
    ctx.save_for_backward(cos, sin)


def gradients(ctx, g):
    return turn(g, *ctx.saved_tensors, not ctx.back), None, None, None


differentiable(turn, turn, save, gradients)


def rotate(x, cos, sin):
    """As `layers.rotate`: x (B, h, N, d) float32, bfloat16 or float16 of at least one number, cos, sin (B or 1, N, d/2)
    without gradients. The result lies in memory as (B, N, h, d)."""
    training(x)
    return turn(x, cos, sin, False)
