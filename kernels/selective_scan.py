"""The selective scan of Mamba, 2312.00752, forward and backward, as `scans.selective_scan` defines it.

    d_t = softplus(delta_t + bias);   h_t = exp(d_t A) h_{t-1} + d_t B_t u_t;   y_t = (C_t . h_t + D u_t) silu(z_t)

A program is one warp: one sequence and 32 channels, one in each lane. It goes through the sequence in tiles of tokens,
and for each tile through the S states. A tile's tokens lie in the lane's registers, so that the scan along them is a
plain chain of multiply-adds, without any exchange between lanes, and so is the sum over the states. A lane carries a
state from tile to tile through memory. Bound by one exponential for each token, channel and state.
"""

import math

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import TRITON_TYPES, configuration, differentiable, on, options, rows, sum_type, training, wide

# (tokens, channels, warps) of a tile. The strides are kept from Triton's alignment analysis below: knowing them it
# would give a lane several neighbouring channels, and spread the tokens over the lanes.
FORWARD = {"default": (16, 32, 1), "interpreted": (4, 2, 1)}
BACKWARD = {"default": (8, 64, 1), "interpreted": (2, 2, 1)}
STRIDES = ["u_b", "u_t", "delta_b", "delta_t", "z_b", "z_t", "L", "D"]


@triton.jit
def join(a1, x1, a2, x2):
    """Two neighbouring segments of h = a h + x as one."""
    return a1 * a2, a2 * x1 + x2


@triton.jit
def join_both(a1, x1, p1, e1, a2, x2, p2, e2):
    """The same, and (p, e): the segment without its last token. So the scan's value of the token before comes along,
    for one multiply-add, where dividing or subtracting would lose it to rounding."""
    return a1 * a2, a2 * x1 + x2, a1 * p2, p2 * x1 + e2


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|, and log(1 + e) = 2 atanh(r), r = e / (2 + e) <= 1/3, by its
    series: to rounding for every e, at half the instructions of a logarithm."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    r = e / (2 + e)
    s, series = r * r, 1 / 17
    for k in tl.static_range(8):
        series = series * s + 1 / (15 - 2 * k)
    return tl.where(x > 0, x, 0) + 2 * r * series


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(-1.4426950408889634 * x))


@triton.jit(do_not_specialize=STRIDES)
def forward_kernel(u, delta, A, B, C, skip, z, bias, y, states, u_b, u_t, delta_b, delta_t, z_b, z_t, L, D, blocks,
                   slots, SOFTPLUS: tl.constexpr, S: tl.constexpr, KEEP: tl.constexpr, BT: tl.constexpr,
                   BD: tl.constexpr, SUM: tl.constexpr):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    row, here = tl.arange(0, BT), d < D
    padded = tl.cdiv(L, BT) * BT
    u, delta, y = u + b * u_b, delta + b * delta_b, y + b * L * D
    B, C = B + b * S * padded, C + b * S * padded
    if z is not None:
        z += b * z_b
    states += b * slots * S * D
    for tile in range(tl.cdiv(L, BT)):
        first = tl.cast(tile * BT, tl.int64)
        inside = first + row < L
        mask = inside[:, None] & here[None]
        U = tl.load(u + first * u_t + (row * u_t)[:, None] + d[None], mask, 0).to(SUM)
        step = tl.load(delta + first * delta_t + (row * delta_t)[:, None] + d[None], mask, 0).to(SUM)
        if bias is not None:
            step += tl.load(bias + d, here, 0)[None]
        if SOFTPLUS:
            step = softplus(step)
        step = tl.where(mask, step, 0)                                  # beyond L the state stays what it is
        du = step * U
        total = tl.zeros((BT, BD), SUM)
        slot = tile * (BT // KEEP)
        saved = (slot + (row + 1) // KEEP) % slots                      # rows KEEP - 1, 2 KEEP - 1, ... are stored
        kept = ((row + 1) % KEEP == 0)[:, None] & here[None]
        for n in range(S):
            rate = tl.load(A + n * D + d, here, 0)
            Bn, Cn = tl.load(B + n * padded + first + row), tl.load(C + n * padded + first + row)
            before = tl.load(states + tl.cast((slot % slots) * S + n, tl.int64) * D + d, here, 0)
            a = tl.exp2(step * rate[None])
            x = du * Bn[:, None] + tl.where(row[:, None] == 0, a * before[None], 0)
            _, h = tl.associative_scan((a, x), 0, join)
            total += h * Cn[:, None]
            tl.store(states + ((saved * S + n).to(tl.int64) * D)[:, None] + d[None], h, kept)
        if skip is not None:
            total += tl.load(skip + d, here, 0)[None] * U
        if z is not None:
            Z = tl.load(z + first * z_t + (row * z_t)[:, None] + d[None], mask, 0).to(SUM)
            total *= Z * sigmoid(Z)
        tl.store(y + first * D + (row * D)[:, None] + d[None], total, mask)
        tl.debug_barrier()                                              # the states are there for the next tile


@triton.jit(do_not_specialize=STRIDES)
def backward_kernel(g, u, delta, A, B, C, skip, z, bias, states, carry, gu, gdelta, gA, gB, gC, gskip, gz, gbias, u_b,
                    u_t, delta_b, delta_t, z_b, z_t, L, D, blocks, slots,
                    SOFTPLUS: tl.constexpr, S: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SUM: tl.constexpr):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    row, here = tl.arange(0, BT), d < D
    padded = tl.cdiv(L, BT) * BT
    u, delta, g = u + b * u_b, delta + b * delta_b, g + b * L * D
    B, C = B + b * S * padded, C + b * S * padded
    gu, gdelta = gu + b * L * D, gdelta + b * L * D
    if z is not None:
        z, gz = z + b * z_b, gz + b * L * D
    states, carry, gA = states + b * slots * S * D, carry + b * S * D, gA + b * S * D
    partial = tl.program_id(0).to(tl.int64) * S * padded               # this program's share of gB and gC
    sum_skip, sum_bias = tl.zeros((BD,), SUM), tl.zeros((BD,), SUM)
    one = tl.full((BT, BD), 1, SUM)
    tiles = tl.cdiv(L, BT)
    for back in range(tiles):
        tile = tiles - 1 - back
        first = tl.cast(tile * BT, tl.int64)
        inside = first + row < L
        mask = inside[:, None] & here[None]
        at = first * D + (row * D)[:, None] + d[None]
        U = tl.load(u + first * u_t + (row * u_t)[:, None] + d[None], mask, 0).to(SUM)
        raw = tl.load(delta + first * delta_t + (row * delta_t)[:, None] + d[None], mask, 0).to(SUM)
        if bias is not None:
            raw += tl.load(bias + d, here, 0)[None]
        step = raw
        if SOFTPLUS:
            step = softplus(raw)
        step = tl.where(mask, step, 0)
        gy = tl.load(g + at, mask, 0).to(SUM)
        if z is not None:
            Z = tl.load(z + first * z_t + (row * z_t)[:, None] + d[None], mask, 0).to(SUM)
            open = sigmoid(Z)
            slope = gy * open * (1 + Z * (1 - open))
            gy *= Z * open
        y, inner, gstep = tl.zeros((BT, BD), SUM), tl.zeros((BT, BD), SUM), tl.zeros((BT, BD), SUM)
        for n in range(S):
            rate = tl.load(A + n * D + d, here, 0)
            Bn = tl.load(B + n * padded + first + row)[:, None]
            Cn = tl.load(C + n * padded + first + row)[:, None]
            before = tl.load(states + tl.cast(tile * S + n, tl.int64) * D + d, here, 0)
            after = tl.load(carry + n * D + d, here, 0)
            a = tl.exp2(step * rate[None])
            x = step * U * Bn + tl.where(row[:, None] == 0, a * before[None], 0)
            end = tl.where(row[:, None] == 0, before[None], 0)
            _, h, _, h_before = tl.associative_scan((a, x, one, end), 0, join_both)
            # P_t = a_t G_t, where G_t = C_t gy_t + P_{t+1} is the gradient of h_t: the same scan, on the tile turned
            # over, which costs nothing in registers (a scan with reverse=True exchanges lanes).
            own = Cn * gy
            a, x = tl.flip(a, 0), tl.flip(a * own, 0)
            x += tl.where(row[:, None] == 0, a * after[None], 0)
            end = tl.where(row[:, None] == 0, after[None], 0)
            _, P, _, P_after = tl.associative_scan((a, x, one, end), 0, join_both)
            tl.store(carry + n * D + d, tl.sum(tl.where(row[:, None] == BT - 1, P, 0), 0), here)
            G = own + tl.flip(P_after, 0)
            decayed = tl.flip(P, 0) * h_before
            y += h * Cn
            inner += G * Bn
            gstep += decayed * rate[None]
            at_n = partial + n * padded + first + row
            tl.store(gC + at_n, tl.sum(h * gy, 1))
            tl.store(gB + at_n, tl.sum(G * (step * U), 1))
            tl.store(gA + n * D + d, tl.load(gA + n * D + d, here, 0) + tl.sum(decayed * step, 0), here)
        gradient = gstep * 0.6931471805599453 + inner * U               # the rates are in powers of 2
        if SOFTPLUS:
            gradient *= sigmoid(raw)
        gradient = tl.where(mask, gradient, 0)
        tl.store(gdelta + at, gradient, mask)
        sum_bias += tl.sum(gradient, 0)
        gradient = inner * step
        if skip is not None:
            Dn = tl.load(skip + d, here, 0)[None]
            gradient += Dn * gy
            y += Dn * U
            sum_skip += tl.sum(gy * U, 0)
        tl.store(gu + at, gradient, mask)
        if z is not None:
            tl.store(gz + at, y * slope, mask)
        tl.debug_barrier()
    tl.store(gskip + b * D + d, sum_skip, here)
    tl.store(gbias + b * D + d, sum_bias, here)


def strides(*tensors):
    """(batch, token) strides of each, 0 where there is none."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def by_state(x, tokens):
    """B or C (B, L, S) -> (B, S, L rounded up to whole tiles) in the type of the sums, zero beyond L."""
    y = x.new_zeros(len(x), x.shape[2], -(-x.shape[1] // tokens) * tokens, dtype=sum_type(x))
    y[:, :, :x.shape[1]] = x.transpose(1, 2)
    return y


def powers_of_two(A):
    """A (D, S) -> (S, D), for decays as powers of 2, which is how a GPU computes exponentials."""
    return (A.T * math.log2(math.e)).contiguous()


@torch.library.custom_op("atlas::selective_scan", mutates_args=())
def scan(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
         skip: torch.Tensor | None, z: torch.Tensor | None, bias: torch.Tensor | None, state: torch.Tensor | None,
         softplus: bool, training: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y (B, L, D), last state (B, D, S), in training the states (B, slots, S, D) at the backward's tiles."""
    (batch, L, D), S, type = u.shape, A.shape[1], sum_type(u)
    u, delta, z = map(rows, (u, delta, z))
    tokens, channels, warps = configuration(FORWARD, u, D)
    keep = configuration(BACKWARD, u, D)[0] if training else tokens
    tiles = triton.cdiv(L, tokens)
    last = tiles * (tokens // keep)                                     # without gradients two slots take turns
    slots = last + 1 if training else 2
    y, states = u.new_empty(u.shape), u.new_empty(batch, slots, S, D, dtype=type)
    states[:, 0] = 0 if state is None else state.transpose(1, 2)
    blocks = triton.cdiv(D, channels)
    with on(u):
        forward_kernel[(batch * blocks,)](
            u, delta, powers_of_two(A), by_state(B, tokens), by_state(C, tokens), skip, z, bias, y, states,
            *strides(u, delta, z), L, D, blocks, slots, softplus, S, keep, tokens, channels, TRITON_TYPES[type],
            **options(warps))
    end = states[:, last % slots].transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return y, end, states if training else states.new_empty(0)


@scan.register_fake
def _(u, delta, A, B, C, skip, z, bias, state, softplus, training):
    type = sum_type(u)
    tokens, keep = (configuration(table, u, u.shape[2])[0] for table in (FORWARD, BACKWARD))
    slots = -(-u.shape[1] // tokens) * (tokens // keep) + 1
    states = u.new_empty(len(u), slots, *A.T.shape, dtype=type) if training else u.new_empty(0, dtype=type)
    return u.new_empty(u.shape), u.new_empty(len(u), *A.shape, dtype=type), states


@torch.library.custom_op("atlas::selective_scan_backward", mutates_args=())
def scan_backward(g: torch.Tensor, g_last: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor,
                  B: torch.Tensor, C: torch.Tensor, skip: torch.Tensor | None, z: torch.Tensor | None,
                  bias: torch.Tensor | None, states: torch.Tensor, softplus: bool) -> list[torch.Tensor]:
    """-> the gradients of u, delta, A, B, C, skip, z, bias and state; those of absent ones are meaningless."""
    (batch, L, D), S, type = u.shape, A.shape[1], sum_type(u)
    g, u, delta, z = g.contiguous(), *map(rows, (u, delta, z))
    tokens, channels, warps = configuration(BACKWARD, u, D)
    blocks = triton.cdiv(D, channels)
    carry = u.new_empty(batch, S, D, dtype=type).copy_(g_last.transpose(1, 2))
    gu, gdelta, gz = u.new_empty(u.shape), delta.new_empty(u.shape), None if z is None else z.new_empty(u.shape)
    gA = u.new_zeros(batch, S, D, dtype=type)
    Bs, Cs = by_state(B, tokens), by_state(C, tokens)
    gB, gC = (u.new_empty(batch, blocks, *Bs.shape[1:], dtype=type) for _ in range(2))
    gskip, gbias = (u.new_empty(batch, D, dtype=type) for _ in range(2))
    with on(u):
        backward_kernel[(batch * blocks,)](
            g, u, delta, powers_of_two(A), Bs, Cs, skip, z, bias, states, carry, gu, gdelta, gA, gB, gC, gskip, gz,
            gbias, *strides(u, delta, z), L, D, blocks, states.shape[1], softplus, S, tokens, channels,
            TRITON_TYPES[type], **options(warps))
    gB, gC = (p.sum(1)[:, :, :L].transpose(1, 2).to(x.dtype).contiguous() for p, x in ((gB, B), (gC, C)))
    return [gu, gdelta, gA.sum(0).T.contiguous(), gB, gC, gskip.sum(0), g.new_empty(0) if z is None else gz,
            gbias.sum(0), carry.transpose(1, 2).contiguous()]


@scan_backward.register_fake
def _(g, g_last, u, delta, A, B, C, skip, z, bias, states, softplus):
    vector = u.new_empty(u.shape[2], dtype=sum_type(u))
    return [u.new_empty(u.shape), delta.new_empty(u.shape), vector.new_empty(A.shape), B.new_empty(B.shape),
            C.new_empty(C.shape), vector, g.new_empty(0) if z is None else z.new_empty(u.shape),
            vector.new_empty(vector.shape), vector.new_empty(g_last.shape)]


def save(ctx, inputs, output):
    *tensors, ctx.softplus, training = inputs
    if not training:
        raise RuntimeError("atlas::selective_scan was called for inference and cannot be differentiated")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def gradients(ctx, g, g_last, _):
    *tensors, state, states = ctx.saved_tensors
    u, A = tensors[0], tensors[2]
    g = u.new_zeros(u.shape) if g is None else g
    g_last = states.new_zeros(len(u), *A.shape) if g_last is None else g_last
    grads = scan_backward(g, g_last, *tensors, states, ctx.softplus)
    return *(None if x is None else grad for x, grad in zip((*tensors, state), grads)), None, None


differentiable(scan, scan_backward, save, gradients)


@register_flop_formula(torch.ops.atlas.selective_scan)
def _(u, delta, A, *others, out_shape=None, **options):
    return 6 * u[0] * u[1] * u[2] * A[1]


@register_flop_formula(torch.ops.atlas.selective_scan_backward)
def _(g, g_last, u, delta, A, *others, out_shape=None, **options):
    return 17 * u[0] * u[1] * u[2] * A[1]


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None):
    """As `scans.selective_scan`, for float32, bfloat16 or float16 (B, L, D) of at least one number."""
    A, D, delta_bias, state = wide(u, A, D, delta_bias, state)
    tensors = u, delta, A, B, C, D, z, delta_bias, state
    return scan(*tensors, delta_softplus, training(*tensors))[:2]
