"""Token mixers whose cost grows linearly with the number of tokens, each twice: the plain form is the definition, as
slow as the paper writes it; the fast form computes the same numbers and gradients in O(N) time and memory.

    selective_scan      Mamba, 2312.00752         selective_scan_plain     the recurrence, token by token
    bi_wkv              Vision-RWKV, 2403.02308   bi_wkv_plain             the mean over all tokens, N x N weights
    linear_attention    LiT, 2501.12976           linear_attention_plain   the N x N matrix of weights

The fast forms rest on one routine, `recur`. Nowhere is anything divided by a cumulative decay: that underflows. States
and sums are kept in float32 at least, also under autocast; the output has the type of the first argument.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels

# ----------------------------------------------------------------------------------------------------------- recurrence


def recur(a, x, start=None, reverse=False, chunk=None):
    """h_t = a_t h_{t-1} + x_t along the first dimension, in place: x (N, ...) becomes h. Every a_t, broadcastable to
    x_t, must be at most about 1. start: h_{-1}. reverse: h_t = a_t h_{t+1} + x_t.

    With large slices x_t this is a loop over t. Small ones are cut into chunks of `chunk` tokens: all chunks step
    together, and then each receives its predecessor's last state, decayed by the product of its a, which is at most 1.
    """
    N = len(x)
    if not N:
        return x
    order = range(N - 1, -1, -1) if reverse else range(N)
    if start is not None:
        x[order[0]].addcmul_(a[order[0]], start)
    if chunk is None:
        many = 2**20 if x.is_cuda else 2**11
        chunk = N if N < 16 or x[0].numel() >= many else math.isqrt(N)
    if chunk >= N:
        rows, rates = x.unbind(), a.unbind()
        for before, t in zip(order, order[1:]):
            rows[t].addcmul_(rates[t], rows[before])
        return x
    chunks, rest = divmod(N, chunk)
    whole = slice(rest, None) if reverse else slice(0, chunks * chunk)     # whole chunks first, in the order of time
    X, P = (z[whole].unflatten(0, (chunks, chunk)) for z in (x, a.clone()))
    steps, places = (range(n)[::-1] if reverse else range(n) for n in (chunk, chunks))
    rows, decays = X.unbind(1), P.unbind(1)
    for before, k in zip(steps, steps[1:]):
        rows[k].addcmul_(decays[k], rows[before])
        decays[k].mul_(decays[before])
    for before, j in zip(places, places[1:]):
        X[j].addcmul_(P[j], X[before, steps[-1]])
    if rest:
        left, last = (slice(0, rest), rest) if reverse else (slice(chunks * chunk, N), chunks * chunk - 1)
        recur(a[left], x[left], x[last].clone(), reverse, chunk)
    return x


def wide(x, *others):
    """The tensors (None stays None) as float32, or float64 if x is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [y if y is None else y.to(dtype) for y in (x, *others)]


def exact(x):
    """Switches autocast off: sums of many tokens do not survive half precision."""
    return torch.autocast(x.device.type, enabled=False)


# ------------------------------------------------------------------------------------------------------- selective scan


def selective_scan_plain(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None):
    """The selective state space model of Mamba, 2312.00752, algorithm 2, as its recurrence.

        d_t = softplus(delta_t + delta_bias)                    (without softplus unless asked)
        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t                  A by zero-order hold, B to first order
        y_t = (C_t . h_t + D u_t) silu(z_t)

    u, delta, z (B, N, D); A (D, S) negative; B, C (B, N, S); D, delta_bias (D,); state: h before the first token
    (B, D, S), zero by default. Returns (y (B, N, D), last state (B, D, S)).
    """
    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias, h = wide(u, delta, A, B, C, D, z, delta_bias, state)
    with exact(u):
        d = step_sizes(delta, delta_bias, delta_softplus)
        h = u.new_zeros(len(u), *A.shape) if h is None else h
        y = []
        for t in range(u.shape[1]):
            h = torch.exp(d[:, t, :, None] * A) * h + (d[:, t] * u[:, t])[..., None] * B[:, t, None]     # (B, D, S)
            y.append((h * C[:, t, None]).sum(-1))
        return gate(torch.stack(y, 1), u, D, z).to(dtype), h


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None):
    """`selective_scan_plain` in segments of tokens whose states fit the processor's cache; the backward pass computes
    the states of a segment again from the one at its start."""
    if u.is_meta:                                                           # shapes only: layers.count
        products = u.new_empty(u.numel(), 1, 3 * A.shape[1])                # three a state: decay, input, read-out
        return (products @ products.mT).view(u.shape), u.new_empty(len(u), *A.shape)
    if kernels.use("selective_scan", u, A, state_size=A.shape[1]):
        return kernels.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state)
    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias, state = wide(u, delta, A, B, C, D, z, delta_bias, state)
    with exact(u):
        d = step_sizes(delta, delta_bias, delta_softplus)
        state = u.new_zeros(len(u), *A.shape) if state is None else state
        by_time = [v.transpose(0, 1).contiguous() for v in (u, d, B, C)]
        y, last = SelectiveScan.apply(*by_time, A.T.contiguous(), state.transpose(1, 2))
        return gate(y.transpose(0, 1), u, D, z).to(dtype), last.transpose(1, 2)


def step_sizes(delta, bias, softplus):
    delta = delta if bias is None else delta + bias
    return F.softplus(delta) if softplus else delta


def gate(y, u, D, z):
    y = y if D is None else torch.addcmul(y, u, D)
    return y if z is None else y * F.silu(z)


class SelectiveScan(torch.autograd.Function):
    """(u, d (N, B, D), B, C (N, B, S), A (S, D), start (B, S, D)) -> (y (N, B, D), last state)."""

    @staticmethod
    def segments(u, A):
        size = max(8, (2**24 if u.is_cuda else 2**18) // max(1, len(A) * u[0].numel()))
        return [slice(begin, begin + size) for begin in range(0, len(u), size)]

    @staticmethod
    def states(u, d, B, A, start):
        """(decays a, states h), both (N, B, S, D)."""
        a = (d[:, :, None] * A).exp_()
        return a, recur(a, (d * u)[:, :, None] * B[..., None], start)

    @staticmethod
    def forward(ctx, u, d, B, C, A, start):
        h, starts, y = start, [], torch.empty_like(u)
        for s in SelectiveScan.segments(u, A):
            starts.append(h)
            _, H = SelectiveScan.states(u[s], d[s], B[s], A, h)
            y[s] = (C[s][:, :, None] @ H)[:, :, 0]
            h = H[-1].clone()
        ctx.save_for_backward(u, d, B, C, A, *starts)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_last):
        u, d, B, C, A, *starts = ctx.saved_tensors
        gu, gd, gB, gC, gA, carry = (*map(torch.empty_like, (u, d, B, C)), torch.zeros_like(A), g_last)
        with exact(u):
            for s, start in zip(SelectiveScan.segments(u, A)[::-1], starts[::-1]):
                a, h = SelectiveScan.states(u[s], d[s], B[s], A, start)
                gC[s] = (h * gy[s][:, :, None]).sum(-1)
                G = gy[s][:, :, None] * C[s][..., None]                     # G_t = C_t gy_t + a_{t+1} G_{t+1}
                G[-1] += carry
                recur(a[1:], G[:-1], G[-1], reverse=True)
                carry = a[0] * G[0]
                a[0].mul_(start)                                            # what is left at t of the state before
                a[1:].mul_(h[:-1])
                inner = (B[s][:, :, None] @ G)[:, :, 0]
                gB[s] = torch.mul(G, (d[s] * u[s])[:, :, None], out=h).sum(-1)
                gu[s] = inner * d[s]
                G *= a
                gd[s] = torch.addcmul(torch.mul(G, A, out=h).sum(2), inner, u[s])
                gA += G.mul_(d[s][:, :, None]).sum((0, 1))
        return gu, gd, gB, gC, gA, carry


# --------------------------------------------------------------------------------------------------------------- Bi-WKV


def bi_wkv_plain(w, u, k, v):
    """Bidirectional WKV attention, Vision-RWKV, 2403.02308, eq. 3: for each channel a mean of v over all tokens,

        y_t = sum_i p_ti v_i,   p_ti ~ exp(k_i - (|t - i| - 1) w) for i != t,   p_tt ~ exp(u + k_t)

    w, u (D,), w of either sign (the block divides both by N); k, v (B, N, D). Returns (B, N, D). In float64 where the
    device has it: with a weight that grows (w < 0) exponents reach |w| N, and where one token outweighs all others the
    gradients are differences of nearly equal numbers.
    """
    dtype = v.dtype
    w, u, k, v = doubles(w, u, k, v)
    i = torch.arange(k.shape[1], device=k.device)
    far = ((i - i[:, None]).abs() - 1).to(k)[..., None]                                     # (N, N, 1)
    logits = torch.where(far < 0, u + k[:, None], k[:, None] - far * w)                     # (B, N, N, D)
    return torch.einsum("btic,bic->btc", logits.softmax(2), v).to(dtype)


def bi_wkv(w, u, k, v):
    """`bi_wkv_plain` by a sweep from the left and one from the right. Both carry the sums relative to their largest
    term, so that no exponential exceeds 1. Channels go in groups that fit the processor's cache."""
    if v.is_meta:                                                           # shapes only: layers.count
        products = v.new_empty(v.numel(), 1, 12)                            # two sweeps of three, six to join them
        return (products @ products.mT).view(v.shape)
    if kernels.use("bi_wkv", v):
        return kernels.bi_wkv(w, u, k, v)
    dtype = v.dtype
    w, u, k, v = doubles(w, u, k, v) if spread_out(w, k) else wide(w, u, k, v)
    group = max(16, (2**24 if v.is_cuda else 2**17) // max(1, len(v) * v.shape[1]))
    with exact(v):
        parts = zip(w.split(group), u.split(group), *(z.transpose(0, 1).split(group, 2) for z in (k, v)))
        return torch.cat([BiWKV.apply(*part) for part in parts], 2).transpose(0, 1).to(dtype)


def doubles(*tensors):
    """The tensors in float64, or as they are on a device without it."""
    return [z if z.device.type == "mps" else z.double() for z in tensors]


def spread_out(w, k):
    """Whether, on a CPU, exponents differ so much that one token may outweigh all others by more than float32 resolves
    (e^-16): no trained network comes near. A GPU would have to be waited for, and a compiler cannot know."""
    if k.device.type != "cpu" or not k.numel() or torch.compiler.is_compiling():
        return False
    low, high = k.detach().aminmax()
    return bool(torch.maximum(high - low, w.detach().abs().max()) > 32)


def running_max(x, chunk=None):
    """Cumulative maximum along the first dimension, in place; in chunks like `recur`."""
    N = len(x)
    chunk = chunk or (N if N < 16 else math.isqrt(N))
    chunks = N // chunk
    X = x[:chunks * chunk].unflatten(0, (chunks, chunk))
    for t in range(1, chunk):
        torch.maximum(X[:, t], X[:, t - 1], out=X[:, t])
    for j in range(1, chunks):
        torch.maximum(X[j], X[j - 1, -1:], out=X[j])
    for t in range(chunks * chunk, N):
        torch.maximum(x[t], x[t - 1], out=x[t])
    return x


def sweep(k, values, w, reverse=False):
    """For each t the sums over i < t (reverse: i > t) of exp(k_i - (|t - i| - 1) w) values_i, as (m, sums): each is
    exp(m) sums, m (N, B, D) the largest exponent. k (N, B, D), values (N, n, B, D), w (D,)."""
    N, n, B, D = values.shape
    tilt = w * torch.arange(N, dtype=k.dtype, device=k.device)[:, None, None]
    k = (k.flip(0) if reverse else k) + tilt
    largest = running_max(k.clone())                                        # max over i <= t of k_i + i w
    sums = values.new_zeros(N + 1, n, B, D)                                 # one row more: before the first t, nothing
    torch.mul((k - largest).to(values).exp_()[:, None], values.flip(0) if reverse else values, out=sums[1:])
    decay = torch.zeros_like(values[:, :1])
    decay[1:, 0] = (largest[:-1] - largest[1:]).to(values).exp_()
    recur(decay, sums[1:])
    m = torch.cat([torch.full_like(k[:1], -torch.inf), largest.sub_(tilt)[:-1]])
    return (m.flip(0), sums[:-1].flip(0)) if reverse else (m, sums[:-1])


class BiWKV(torch.autograd.Function):
    """w, u (D,), k, v (N, B, D) -> y (N, B, D). Exponents are always added in float64."""

    @staticmethod
    def both(k, values, w):
        return [sweep(k, values, w, reverse) for reverse in (False, True)]

    @staticmethod
    def forward(ctx, w, u, k, v):
        w_, u_, k_ = doubles(w, u, k.contiguous())
        values = torch.stack([v, torch.ones_like(v)], 1)                                    # (N, 2, B, D)
        (m, left), (q, right) = BiWKV.both(k_, values, w_)
        own = u_ + k_
        top = torch.maximum(torch.maximum(m, q), own)

        def weight(z):
            return (z - top).to(v).exp_()[:, None]

        total = (weight(own) * values).addcmul_(weight(m), left).addcmul_(weight(q), right)
        y = total[:, 0] / total[:, 1]
        ctx.save_for_backward(w, u, k, v, y, top + total[:, 1].log(), m, left, q, right)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        w, u, k, v, y, Z, m, left, q, right = ctx.saved_tensors
        with exact(v):
            w_, u_, k_ = doubles(w, u, k.contiguous())
            gv = (u_ + k_ - Z).to(v).exp_().mul_(g)                         # p_tt g_t
            gk = gv * (v - y)
            gu, gw = gk.sum((0, 1)), torch.zeros_like(w)
            # The same sweeps the other way round: keys -Z_t, values g_t and g_t y_t.
            before, after = BiWKV.both(-Z, torch.stack([g, g * y], 1), w_)
            for (n, sums), (exponent, state) in ((after, (m, left)), (before, (q, right))):
                weight = (k_ + n).to(v).exp_()                              # at most about 1: it is a sum of p_ti
                gv.addcmul_(weight, sums[:, 0])
                gk.addcmul_(weight, torch.addcmul(-sums[:, 1], v, sums[:, 0]))
                # A pair i < s < t is decayed once at each s between: the state of s from one side, times that of the
                # other.
                pair = (exponent + n - w_).to(v).exp_()
                gw -= (pair * torch.addcmul(state[:, 0] * sums[:, 0], state[:, 1], sums[:, 1], value=-1)).sum((0, 1))
        return gw, gu, gk, gv


# ----------------------------------------------------------------------------------------------------- linear attention


def linear_attention_plain(q, k, v, eps=1e-6):
    """ReLU linear attention of LiT, 2501.12976, section 3.1, as weights between all pairs of N tokens:

        o_i = sum_j w_ij v_j / (sum_j w_ij + N eps),   w_ij = phi(q_i) . phi(k_j),   phi(x) = relu(x) + eps

    q, k, v (B, h, N, d). Returns (B, h, N, d).
    """
    dtype = v.dtype
    q, k, v = wide(q, k, v)
    with exact(v):
        weights = (q.relu() + eps) @ (k.relu() + eps).transpose(-1, -2)                     # (B, h, N, N)
        return (weights @ v / (weights.sum(-1, keepdim=True) + k.shape[-2] * eps)).to(dtype)


def linear_attention(q, k, v, eps=1e-6):
    """`linear_attention_plain` by the cheaper of two routes. Few tokens: the weights of all pairs. Many: the sums over
    j first, S = sum_j phi(k_j)^T v_j (d, d), s = sum_j phi(k_j). They cost as many multiplications at N = d; a GPU,
    which has to write S and read it again, is better off with pairs up to N = 1.5 d."""
    if kernels.use("linear_attention", v, width_of_a_head=v.shape[-1]):
        return kernels.linear_attention(q, k, v, eps)
    dtype, (N, d) = v.dtype, v.shape[-2:]
    q, k, v = wide(q, k, v)
    with contextlib.nullcontext() if v.is_meta else exact(v):
        q, k = q.relu() + eps, k.relu() + eps
        if N <= (1.5 if q.is_cuda else 1) * d:
            weights = q @ k.transpose(-1, -2)                                               # (B, h, N, N)
            return (weights @ v / (weights.sum(-1, keepdim=True) + N * eps)).to(dtype)
        S, s = k.transpose(-1, -2) @ v, k.sum(-2)[..., None]                                # (B, h, d, d), (B, h, d, 1)
        return (q @ S / (q @ s + N * eps)).to(dtype)
