"""The linear-time mixers: each fast form against its plain one, and what both promise."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import scans

LENGTHS = [1, 2, 63, 64, 65, 257]


def leaves(*shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def selective(L, B=2, D=3, S=4, **options):
    u, delta, A, b, C, skip, z, bias, state = leaves(
        (B, L, D), (B, L, D), (D, S), (B, L, S), (B, L, S), (D,), (B, L, D), (D,), (B, D, S), **options)
    A = (-A.detach().exp()).requires_grad_()
    return [u, delta, A, b, C, skip, z, bias, True, state]


def wkv(L, B=2, C=3, **options):
    return leaves((C,), (C,), (B, L, C), (B, L, C), **options)


def heads(L, **options):
    return leaves((1, 2, L, 3), (1, 2, L, 3), (1, 2, L, 3), **options)


FORMS = {"selective": (scans.selective_scan, scans.selective_scan_plain, selective),
         "wkv": (scans.bi_wkv, scans.bi_wkv_plain, wkv),
         "linear": (scans.linear_attention, scans.linear_attention_plain, heads)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L", LENGTHS)
def test_gradients(form, L):
    fast, _, make = FORMS[form]
    assert gradcheck(fast, make(L), fast_mode=L > 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L", [1, 5, 65, 255, 1000])
def test_fast_is_plain(form, L):
    fast, plain, make = FORMS[form]
    results = []
    for function in (fast, plain):
        inputs = make(L)
        out = function(*inputs)
        out = torch.cat([o.flatten() for o in out]) if isinstance(out, tuple) else out.flatten()
        (out * torch.linspace(-1, 1, len(out), dtype=out.dtype)).sum().backward()
        results.append([out] + [i.grad for i in inputs if isinstance(i, torch.Tensor)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("T", [1, 2, 17, 64, 257])
def test_chunks_and_direction_do_not_matter(T):
    x, start = (v.detach() for v in leaves((T, 2, 3), (2, 3)))
    a = torch.rand(T, 2, 3, dtype=torch.float64)
    for reverse in (False, True):
        h, plain = start, torch.empty_like(x)
        for t in (range(T)[::-1] if reverse else range(T)):
            plain[t] = h = a[t] * h + x[t]
        for chunk in (None, 1, 16, 32, 64, T):
            torch.testing.assert_close(scans.recur(a, x.clone(), start, reverse, chunk), plain)
        maximum = scans.running_max(x.clone(), max(1, T // 3))
        assert torch.equal(maximum, x.cummax(0)[0])


def test_a_split_scan_goes_on():
    u, delta, A, b, C, skip, z, bias, softplus, state = selective(40)
    run = lambda s, h: scans.selective_scan(u[:, s], delta[:, s], A, b[:, s], C[:, s], skip, z[:, s], bias, True, h)
    whole, last = run(slice(None), state)
    first, middle = run(slice(0, 13), state)
    second, end = run(slice(13, None), middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_limits_of_the_selective_scan():
    u, delta, A, b, C, skip, *_ = selective(33)
    zero = torch.zeros_like(delta)
    torch.testing.assert_close(scans.selective_scan(u, zero, A, b, C, skip)[0], u * skip)
    d = delta.exp()
    flat = torch.einsum("bls,blds->bld", C, (d * u)[..., None].mul(b[:, :, None]).cumsum(1))
    torch.testing.assert_close(scans.selective_scan(u, d, 0 * A, b, C)[0], flat)
    short = (C * b).sum(-1, keepdim=True) * d * u
    torch.testing.assert_close(scans.selective_scan(u, d, A - 1e30, b, C)[0], short)


def test_limits_of_bi_wkv():
    w, u, k, v = (z.detach() for z in wkv(50))
    y = scans.bi_wkv(w, u, k, v)
    torch.testing.assert_close(scans.bi_wkv(w, u, k + 7, v), y)
    torch.testing.assert_close(scans.bi_wkv(w, u, k.flip(1), v.flip(1)).flip(1), y)
    torch.testing.assert_close(scans.bi_wkv(w, u, k, torch.full_like(v, 3)), torch.full_like(v, 3))
    mean = (k.softmax(1) * v).sum(1, keepdim=True).expand_as(v)
    torch.testing.assert_close(scans.bi_wkv(0 * w, 0 * u, k, v), mean)
    near = scans.bi_wkv(0 * w + 1e4, u, k, v)
    logits = torch.cat([k[:, 9:10], (u + k[:, 10:11]), k[:, 11:12]], 1)
    torch.testing.assert_close(near[:, 10], (logits.softmax(1) * v[:, 9:12]).sum(1))
    without = scans.bi_wkv(0 * w, u - 1e4, k, v)
    assert not torch.allclose(without, mean) and torch.equal(without, scans.bi_wkv(0 * w, u - 2e4, k, v))
    w, u, k, v = wkv(50)
    g = leaves((2, 50, 3), seed=1)[0].detach()
    (scans.bi_wkv(w, u, k, v) * g).sum().backward()
    torch.testing.assert_close(k.grad.sum(1), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(v.grad.sum(1), g.sum(1))


def test_limits_of_linear_attention():
    q, k, v = (z.detach() for z in heads(257))
    q[0, 0, 3] = -1.0                                                       # a dead query
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    out = scans.linear_attention(q, k, v)
    torch.testing.assert_close(scans.linear_attention(q[:, :, order], k, v), out[:, :, order])
    ones = scans.linear_attention(q, k, torch.ones_like(v))
    K = (k.relu() + 1e-6).sum(-1).mean(-1)[0, 0]
    assert ones[0, 0, 3, 0].item() == pytest.approx((K / (K + 1)).item(), rel=1e-9)
    live = (q > 0.1).any(-1)
    torch.testing.assert_close(ones[live], torch.ones_like(ones[live]), rtol=0, atol=1e-4)
    torch.testing.assert_close(scans.linear_attention(5 * q, k, v)[live], out[live], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite_and_right(dtype):
    """Strong and growing decays, large keys and steps, in low precision, under autocast, against float64."""
    u, delta, A, b, C, skip, z, bias, _, _ = selective(300, dtype=dtype)
    w, first, k, v = wkv(300, dtype=dtype)
    cases = [(scans.selective_scan, scans.selective_scan_plain, (u, delta + 30, A * 50, b, C, skip, z, bias, True)),
             (scans.selective_scan, scans.selective_scan_plain, (u, delta - 8, A * 1e-3, b, C, skip, z, bias, True)),
             (scans.bi_wkv, scans.bi_wkv_plain, (w.abs() * 3, first * 20, k * 20, v)),
             (scans.bi_wkv, scans.bi_wkv_plain, (-w.abs() * 3, first * 20, k * 20, v)),
             (scans.linear_attention, scans.linear_attention_plain, [100 * x for x in heads(300, dtype=dtype)])]
    for fast, plain, inputs in cases:
        given = [i.detach().requires_grad_() if isinstance(i, torch.Tensor) else i for i in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            out = fast(*given)
        out = out[0] if isinstance(out, tuple) else out
        out.float().sum().backward()
        with torch.no_grad():
            exact = plain(*(i.detach().double() if isinstance(i, torch.Tensor) else i for i in inputs))
        exact = exact[0] if isinstance(exact, tuple) else exact
        error = (out.double() - exact).norm() / exact.norm()
        assert error < (1e-4 if dtype == torch.float32 else 1e-2)
        assert all(i.grad.isfinite().all() for i in given if isinstance(i, torch.Tensor))


def test_softplus_is_the_identity_when_large():
    assert F.softplus(torch.tensor(50.0)) == 50 == scans.step_sizes(torch.tensor(49.0), torch.tensor(1.0), True)


@pytest.mark.slow
@pytest.mark.parametrize("form, shapes, bar", [
    ("selective", dict(D=64, S=16), 6), ("selective", dict(D=192, S=8), 6), ("selective", dict(D=384, S=16), 4),
    ("wkv", dict(C=64), 50), ("linear", (1, 4, 1024, 16), 3), ("linear", (1, 6, 1024, 64), 3),
    ("linear", (1, 2, 1024, 192), 1.5)])
def test_fast_forms_are_fast(form, shapes, bar):
    """Plain over fast, 1,024 tokens, forward and backward, medians of interleaved calls; the bar leaves room for a
    busy machine.  python -m pytest -m slow -k fast_forms -s"""
    import statistics
    import time
    fast, plain, make = FORMS[form]
    inputs = leaves(*[shapes] * 3, dtype=torch.float32) if form == "linear" else make(
        1024, B=1, dtype=torch.float32, **shapes)
    times = {fast: [], plain: []}
    for k in range(8):
        for function in times:
            clock = time.perf_counter()
            out = function(*inputs)
            (out[0] if isinstance(out, tuple) else out).sum().backward()
            times[function] += [time.perf_counter() - clock] if k else []
    ratio = statistics.median(times[plain]) / statistics.median(times[fast])
    print(f"\n{form} {shapes}: {ratio:.1f} times")
    assert ratio > bar
