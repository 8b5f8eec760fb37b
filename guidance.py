"""Guidance: functions of denoisers that are denoisers, `denoise(xt, t) -> Denoised`. They know no model and no sampler.

    guided      by a weaker denoiser: classifier-free guidance and its rules, autoguidance, within an interval of times
    clipped     x0 kept in the range of pixels, or by dynamic thresholding
    stitched    another denoiser at other times: T-Stitch
    compose     all that a user can ask for, in the order in which it acts
"""

import math
from collections.abc import Callable

import torch

from diffusion import Denoised, batch_time, choose, expand, mix, require, single

# ---------------------------------------------------------------------------------------------------------------- rules
# rule(c, u, scale, memory, *, options) combines what the conditional network c and the unconditional one u (or a weaker
# one) predict, (B, C, H, W) each; scale 1 is no guidance. memory: a dict of this trajectory.


def dot(a, b):
    """The inner product of each sample, (B, 1, ..)."""
    return (a * b).sum(list(range(1, a.ndim)), keepdim=True)


def cfg(c, u, scale, memory=None):
    """Classifier-free guidance, 2207.12598: u + scale (c - u)."""
    return torch.lerp(u, c, scale)


def rescale(c, u, scale, memory=None, *, share=0.7):
    """Guidance whose result keeps the standard deviation of c, mixed in by a share of 0.7 (2305.08891, eq. 15-16)."""
    guided = cfg(c, u, scale)
    dims = list(range(1, c.ndim))
    ratio = c.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (1 - share + share * ratio)


def apg(c, u, scale, memory, *, eta=0.0, norm=15.0, momentum=-0.5):
    """Adaptive projected guidance, 2410.02416: c - u with momentum, its norm capped, its part along c scaled by eta."""
    update = memory["average"] = c - u + momentum * memory.get("average", 0.0)
    update = update * (norm / dot(update, update).sqrt()).clamp(max=1)
    parallel = dot(update, c) / dot(c, c) * c
    return c + (scale - 1) * (update - (1 - eta) * parallel)


def cfg_zero(c, u, scale, memory, *, zero_calls=0):
    """CFG-Zero*, 2503.18886: u is first scaled to fit c best; the first `zero_calls` predictions (of flows) are 0."""
    memory["calls"] = memory.get("calls", 0) + 1
    best = dot(c, u) / (dot(u, u) + 1e-8)
    return cfg(c, best * u, scale) * float(memory["calls"] > zero_calls)


def tangential(c, u, scale, memory=None):
    """Tangential damping, 2503.18137: of u only the part along the main direction that c and u share."""
    both = torch.stack([c.flatten(1), u.flatten(1)], 1)                                  # (B, 2, C H W)
    main = torch.linalg.svd(single(both), full_matrices=False)[2][:, :1].to(c.dtype)     # (B, 1, C H W)
    return cfg(c, (both[:, 1:] @ main.mT @ main).view_as(u), scale)


RULES: dict[str, Callable] = {
    "cfg": cfg,
    "rescale": rescale,
    "apg": apg,
    "cfg-zero": cfg_zero,
    "tangential": tangential,
}


def power_cosine(scale, share, power):
    """Guidance that falls from `scale` at pure noise (share = 1) to 1 at the data (share = 0): 1 + (scale - 1)
    (1 - cos(pi share^power))/2. Masked Diffusion Transformer, 2303.14389; FiTv2, 2410.13925."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * share**power)) / 2


# ------------------------------------------------------------------------------------------------ denoisers of denoisers


def latest(t):
    """A time as a number: of a batch, the noisiest."""
    return float(t.max()) if isinstance(t, torch.Tensor) else t


def guided(cond, uncond, scale, channels=None, process=None, rule=None, interval=None):
    """Guidance of the denoiser cond away from uncond (without a condition, or weaker: autoguidance, 2406.02507). The
    variance is the conditional one.

    scale: a number, or a function of t; 1 is no guidance, and saves the second network call. channels: guide only the
    first so many, the rest stays conditional (the published DiT and SiT guide 3 of their 4). rule: an entry of `RULES`
    with its options bound (None: classifier-free guidance), acts on what the network predicts, so it needs the process.
    interval: guide only at times in [low, high] (2404.07724)."""
    memory = {}

    def combined(c, u, w):
        n = channels or c.shape[1]
        parts = (rule or cfg)(c[:, :n], u[:, :n], w, memory)
        return parts if n == c.shape[1] else torch.cat([parts, c[:, n:]], 1)

    def denoise(xt, t, *r):
        c, w = cond(xt, t, *r), scale(latest(t)) if callable(scale) else scale
        if w == 1 or (interval and not interval[0] <= latest(t) <= interval[1]):
            return c
        u = uncond(xt, t, *r)
        if rule is None:                             # linear, so it may act on x0 and eps alike
            flow = None if c.flow is None or u.flow is None else combined(c.flow, u.flow, w)
            return Denoised(lambda: combined(c.x0, u.x0, w), lambda: combined(c.eps, u.eps, w), c.variance, flow)
        predictions = (process.target(d.x0, d.eps, t) for d in (c, u))
        return process.solve(combined(*predictions, w), single(xt), t, c.variance)

    return denoise


def clipped(denoise, process, limit=1.0, quantile=None, largest=math.inf):
    """x0 clipped to [-limit, limit], and the noise that this x0 implies (for pixels; latents have no such range).
    quantile: dynamic thresholding, 2205.11487, instead: x0 is clipped at this quantile of |x0|, which is at least `limit`
    and at most `largest`, and scaled back to `limit`."""
    require(limit > 0, f"the range of x0 is [-{limit}, {limit}]: it must be above 0")
    require(quantile is None or 0 < quantile <= 1, f"quantile {quantile}: choose it above 0 and at most 1")

    def bounded(x0, fresh):
        if quantile is None:
            return x0.clamp_(-limit, limit) if fresh else x0.clamp(-limit, limit)
        s = x0.flatten(1).abs().quantile(quantile, 1)
        s = expand(s.clamp(min=limit).clamp(max=max(limit, largest)), x0)
        return x0.clamp(-s, s) * (limit / s)

    def clip(xt, t, *r):
        d, xt = denoise(xt, t, *r), single(xt)
        fresh = callable(d.parts["x0"])               # made here, so that it may be changed in place
        x0 = bounded(d.x0, fresh)

        def implied():                               # eps = (x_t - alpha x0)/sigma
            alpha, sigma = process.path(t if not isinstance(t, torch.Tensor) else batch_time(t, xt))
            return mix(1 / sigma, xt, -alpha / sigma, x0)

        return Denoised(x0, implied, d.variance)

    return clip


def stitched(denoisers, choose_model):
    """T-Stitch, 2402.14167: the denoiser denoisers[choose_model(t)] at time t; guidance is inside each. A sampler that
    remembers earlier outputs goes on with what the model before gave."""

    def denoise(xt, t, *r):
        return denoisers[choose_model(latest(t))](xt, t, *r)

    return denoise


def stitch_steps(steps, fractions):
    """The index of the model at each of so many steps: model j has taken over round(steps * (fractions[0] + ... +
    fractions[j-1])) steps from the start. 2402.14167, section 3.2, for more than two models."""
    total, ends = 0.0, []
    for fraction in fractions:
        total += fraction
        ends.append(math.floor(steps * total / sum(fractions) + 0.5))
    return [next(j for j, end in enumerate(ends) if step < end) for step in range(steps)]


def check_fractions(fractions, count):
    """ValueError unless these are the shares of so many models."""
    if len(fractions) != count or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=0.02):
        raise ValueError(f"stitching {count} models takes as many fractions of the steps, which sum to 1, "
                         f"not {', '.join(f'{f:g}' for f in fractions)}")


def stitch_by_steps(times, fractions):
    """choose_model of `stitched`: the paper's rule, fractions of the steps of this grid of the process's times, from
    noise to data (steps + 1,), whatever their spacing. A model's share ends just before the next one's first time."""
    times = [float(t) for t in times]
    plan = stitch_steps(len(times) - 1, fractions)
    begins = [plan.index(j) for j in sorted(set(plan))[1:]]                # the step at which each later model begins
    # Solvers call at times of the grid, whatever their rounding, and between them: begin a little before.
    limits = {plan[k]: times[k] + 1e-3 * (times[k - 1] - times[k]) for k in begins}

    def choose_model(t):
        return max([plan[0], *(j for j, limit in limits.items() if t <= limit)])

    return choose_model


def stitch_by_time(fractions, t_noisy=1000.0):
    """choose_model of `stitched`: the published code's, the first model j with 1 - t/t_noisy at most fractions[0] + ... +
    fractions[j], in float32, where it decides a tie."""
    cumulative = torch.tensor(fractions).cumsum(0)
    cumulative[cumulative == 0] = -math.inf                                # no share, no step

    def choose_model(t):
        progress = 1 - torch.tensor(t, dtype=torch.float32) / t_noisy
        return min(int((cumulative < progress).sum()), len(fractions) - 1)

    return choose_model


def compose(process, denoise, other=None, *, guidance=1.0, rule="cfg", interval=None, power=None, channels=None, clip=1.0,
            quantile=None, largest=math.inf):
    """The denoiser that a user asks for: `denoise` guided away from `other` (None: not at all), and clipped.

    guidance: the scale; power: it falls by `power_cosine` from pure noise to the data; rule, interval, channels: see
    `guided`. clip: the range of x0 (True: 1, for pixels; None or False: none), quantile and largest: see `clipped`."""
    if other is not None and guidance != 1:
        rule = choose(RULES, rule, "guidance")
        scale = guidance
        if power is not None:
            length = process.t_noisy - process.t_clean
            scale = lambda t: power_cosine(guidance, (t - process.t_clean) / length, power)
        denoise = guided(denoise, other, scale, channels, process, None if rule is cfg else rule, interval)
    if clip:
        denoise = clipped(denoise, process, float(clip), quantile, largest)
    return denoise
