"""A residual branch's gate, the next norm and its adaLN modulation in one pass over the tokens, as
`layers.gate_norm_modulate` defines it:

    r = x + gate branch;   y = norm(r) weight (1 + scale) + shift

norm: LayerNorm without parameters or, with rms, RMSNorm with an optional weight. A program computes a row, with its
variance in two passes over the registers. Backward a program goes through some rows of one image and keeps the sums
over them, for gate, shift, scale and weight, in registers: written apart, they would be read again.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import TRITON_TYPES, configuration, differentiable, on, options, rows, sum_type, training, wide

# Rows of a backward program.
ROWS = {"default": 16, "interpreted": 2}


@triton.jit
def normalised(r, mask, D, EPS, RMS: tl.constexpr):
    """(r normalised, 1 / its deviation)."""
    if not RMS:
        r = tl.where(mask, r - tl.sum(r, 0) / D, 0)
    scale = 1 / tl.sqrt(tl.sum(r * r, 0) / D + EPS)
    return r * scale, scale


@triton.jit
def forward_kernel(x, branch, gate, shift, scale, weight, r, y, x_b, x_n, branch_b, branch_n, gate_b, shift_b, scale_b,
                   N, D, EPS, RMS: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr):
    b, n = (tl.program_id(0) // N).to(tl.int64), (tl.program_id(0) % N).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask, row = c < D, (b * N + n) * D + c
    X = tl.load(x + b * x_b + n * x_n + c, mask, 0).to(SUM)
    if branch is not None:
        X += tl.load(gate + b * gate_b + c, mask, 0).to(SUM) * tl.load(branch + b * branch_b + n * branch_n + c, mask,
                                                                       0).to(SUM)
        stored = X.to(r.dtype.element_ty)
        tl.store(r + row, stored, mask)
        X = stored.to(SUM)                                              # what the next layer finds is what is normed
    h, _ = normalised(X, mask, D, EPS, RMS)
    if weight is not None:
        h *= tl.load(weight + c, mask, 0).to(SUM)
    factor = 1 + tl.load(scale + b * scale_b + c, mask, 0).to(SUM)
    tl.store(y + row, h * factor + tl.load(shift + b * shift_b + c, mask, 0).to(SUM), mask)


@triton.jit
def backward_kernel(gr, gy, r, branch, gate, scale, weight, gx, gbranch, ggate, gshift, gscale, gweight, r_b, r_n,
                    branch_b, branch_n, gate_b, scale_b, N, D, EPS, groups, RMS: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr, SUM: tl.constexpr):
    b, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    c = tl.arange(0, BLOCK)
    mask = c < D
    factor, own = 1 + tl.load(scale + b * scale_b + c, mask, 0).to(SUM), tl.full((BLOCK,), 1, SUM)
    if weight is not None:
        own = tl.load(weight + c, mask, 0).to(SUM)
    if branch is not None:
        open = tl.load(gate + b * gate_b + c, mask, 0).to(SUM)
    sum_y, sum_hy, sum_gate = tl.zeros((BLOCK,), SUM), tl.zeros((BLOCK,), SUM), tl.zeros((BLOCK,), SUM)
    for n in range(group * ROWS, tl.minimum(group * ROWS + ROWS, N)):
        place = (b * N + n) * D + c
        X = tl.load(r + b * r_b + tl.cast(n, tl.int64) * r_n + c, mask, 0).to(SUM)
        h, deviation = normalised(X, mask, D, EPS, RMS)
        G = tl.load(gy + place, mask, 0).to(SUM)
        w = G * factor * own
        inner = w - h * (tl.sum(w * h, 0) / D)
        if not RMS:
            inner -= tl.sum(w, 0) / D
        inner *= deviation
        if gr is not None:
            inner += tl.load(gr + place, mask, 0).to(SUM)
        tl.store(gx + place, inner, mask)
        if branch is not None:
            at = branch + b * branch_b + tl.cast(n, tl.int64) * branch_n + c
            sum_gate += inner * tl.load(at, mask, 0).to(SUM)
            tl.store(gbranch + place, open * inner, mask)
        sum_y += G
        sum_hy += G * h
    at = (b * groups + group) * D + c
    tl.store(gshift + at, sum_y, mask)
    tl.store(gscale + at, sum_hy * own, mask)
    if weight is not None:
        tl.store(gweight + at, sum_hy * factor, mask)
    if branch is not None:
        tl.store(ggate + at, sum_gate, mask)


def warps(block):
    """Eight numbers a lane: with more the backward pass outgrows the registers."""
    return max(1, min(16, block // 256))


def images(x):
    """The stride from image to image, 0 if there is no tensor."""
    return 0 if x is None else x.stride(0)


def tokens(x):
    return (0, 0) if x is None else x.stride()[:2]


@torch.library.custom_op("atlas::gate_norm_modulate", mutates_args=())
def norm(x: torch.Tensor, branch: torch.Tensor | None, gate: torch.Tensor | None, shift: torch.Tensor,
         scale: torch.Tensor, weight: torch.Tensor | None, eps: float, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """-> r (empty without a branch: it is x), y, both (B, N, D)."""
    x, branch, gate, shift, scale = map(rows, (x, branch, gate, shift, scale))
    B, N, D = x.shape
    r, y = outputs(x, branch, scale)
    block = triton.next_power_of_2(D)
    with on(x):
        forward_kernel[(B * N,)](
            x, branch, gate, shift, scale, weight, r, y, *tokens(x), *tokens(branch),
            *map(images, (gate, shift, scale)), N, D, eps, rms, block, TRITON_TYPES[sum_type(x)],
            **options(warps(block)))
    return r, y


def outputs(x, branch, scale):
    r = x.new_empty((0,) if branch is None else x.shape)
    return r, x.new_empty(x.shape, dtype=(scale if branch is None else branch).dtype)


@norm.register_fake
def _(x, branch, gate, shift, scale, weight, eps, rms):
    return outputs(x, branch, scale)


@torch.library.custom_op("atlas::gate_norm_modulate_backward", mutates_args=())
def norm_backward(gr: torch.Tensor | None, gy: torch.Tensor, r: torch.Tensor, branch: torch.Tensor | None,
                  gate: torch.Tensor | None, scale: torch.Tensor, weight: torch.Tensor | None, eps: float,
                  rms: bool) -> list[torch.Tensor]:
    """-> the gradients of x, branch, gate, shift, scale and weight; those of absent ones are empty."""
    r, branch, gate, scale = map(rows, (r, branch, gate, scale))
    (B, N, D), type = r.shape, sum_type(r)
    count, block = configuration(ROWS, r, D), triton.next_power_of_2(D)
    groups = triton.cdiv(N, count)
    gx, gbranch = r.new_empty(r.shape), None if branch is None else branch.new_empty(r.shape)
    ggate, gshift, gscale, gweight = (None if x is None else r.new_empty(B, groups, D, dtype=type)
                                      for x in (gate, scale, scale, weight))
    with on(r):
        backward_kernel[(B * groups,)](
            None if gr is None else gr.contiguous(), gy.contiguous(), r, branch, gate, scale, weight, gx, gbranch,
            ggate, gshift, gscale, gweight, *tokens(r), *tokens(branch), *map(images, (gate, scale)), N, D, eps,
            groups, rms, count, block, TRITON_TYPES[type], **options(warps(block)))
    ggate = None if gate is None else ggate.sum(1).to(gate.dtype)
    gshift, gscale = (x.sum(1).to(scale.dtype) for x in (gshift, gscale))
    gweight = None if weight is None else gweight.sum((0, 1))
    return [r.new_empty(0) if x is None else x for x in (gx, gbranch, ggate, gshift, gscale, gweight)]


@norm_backward.register_fake
def _(gr, gy, r, branch, gate, scale, weight, eps, rms):
    shapes = zip((r, branch, gate, scale, scale, weight), (r.shape, r.shape, scale.shape, scale.shape, scale.shape,
                                                           r.shape[2:]))
    return [r.new_empty(0) if x is None else x.new_empty(shape) for x, shape in shapes]


def save(ctx, inputs, output):
    x, branch, gate, _, scale, weight, ctx.eps, ctx.rms = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if branch is None else output[0], branch, gate, scale, weight)


def gradients(ctx, gr, gy):
    tensors = r, branch, gate, scale, weight = ctx.saved_tensors
    gy = r.new_zeros(r.shape) if gy is None else gy
    gx, gbranch, ggate, gshift, gscale, gweight = norm_backward(
        gr if branch is not None else None, gy, *tensors, ctx.eps, ctx.rms)
    return (gx, None if branch is None else gbranch, None if gate is None else ggate, gshift, gscale,
            None if weight is None else gweight, None, None)


differentiable(norm, norm_backward, save, gradients)


def gate_norm_modulate(x, branch, gate, shift, scale, weight=None, eps=1e-6, rms=False):
    """(r, y) as above, for float32, bfloat16 or float16 (B, N, D) of at least one number: x and branch (branch None: r
    is x), modulation (B, D), weight (D,). r in the type of x, y in that of the branch, or else of the modulation."""
    weight, = wide(x, weight)
    training(x, branch, gate, shift, scale, weight)
    r, y = norm(x, branch, gate, shift, scale, weight, eps, rms)
    return x if branch is None else r, y
