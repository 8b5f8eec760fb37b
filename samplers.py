"""Samplers: grids of times, and every sampler as one definition that reads like its paper.

    for x in sampler(denoise, x, times, process, noise, memory, **options): ...

yields x after each step, len(times) - 1 of them. denoise(x, t) -> Denoised (`diffusion.py`, `guidance.py`). x starts
as noise of the first level, (B, C, H, W), float32 at least, and keeps its dtype. times fall from noise to the clean
image (`grid_times`). noise(shape) gives standard normal numbers. Options are keyword-only. A sampler that remembers
outputs takes a dict `memory` and fills it, so that a walk may be cut in two. A step into the clean image, which no
network has seen, and a step out of pure noise, where eps says nothing of x0, are DDIM's in every sampler: x_j =
alpha_j x0 + sigma_j eps.

    here             papers                                 meaning
    i, j             t_{i-1}, t_i; s, t; t, t-1             a step goes from level i to the cleaner level j
    i.alpha, i.sigma alpha_t, sigma_t; sqrt(alpha_bar), ..  of x_t = alpha x0 + sigma eps
    i.lam            lambda_t                               log(alpha/sigma)
    h                h_i                                    lambda_j - lambda_i, the length of the step
    i.c, i.p         s(t), sigma(t) (EDM)                   y = x/c solves dy/dp = slope, see `Process.ode_scale`
    r                r_0, r_1                               lengths of earlier steps in units of h
    z                z, epsilon                             fresh noise

`docs/samplers.md` has the names in other libraries, and shows which samplers are one family."""

import copy
import functools
import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from diffusion import (
    Discrete,
    choose,
    dormand_prince,
    double,
    joined,
    mix,
    require,
    respaced,
    single,
    weighted_sum,
)
from guidance import compose

# ---------------------------------------------------------------------------------------------------------------- grids
# grid(process, n, *, options) -> n times from the noisiest down, float64; `grid_times` appends the end. A grid of noise
# levels is one of the process's own p: sigma/alpha, but t itself on a straight path.


def chain(process, n):
    """The length T of a discrete chain that n steps are to be taken from."""
    require(isinstance(process, Discrete),
            "spaced, leading and trailing grids count the steps of a chain: choose uniform or linspace")
    require(0 < n <= process.T, f"{n} sampling steps out of a chain of {process.T}: choose 1 to {process.T}")
    return process.T


def uniform(process, n):
    """Even steps of time, the last into the clean image."""
    return torch.linspace(process.t_noisy, process.t_clean, n + 1, dtype=torch.float64)[:-1]


def linspace(process, n):
    """Even steps of time from the noisiest to the least noisy level, both visited."""
    return torch.linspace(process.t_noisy, process.t_least, n, dtype=torch.float64)


def spaced(process, n):
    """A fractional stride over a discrete chain, both ends kept, 2102.09672."""
    return double(*respaced(chain(process, n), str(n))[::-1])


def leading(process, n, *, offset=0):
    """k floor(T/n) + offset, never the noisiest step: DDIM's, 2305.08891, table 2."""
    return torch.arange(n - 1, -1, -1).double() * (chain(process, n) // n) + offset


def trailing(process, n):
    """round(T - k T/n) - 1, from the noisiest step: 2305.08891, table 2."""
    T = chain(process, n)
    return double(*np.round(T - np.arange(n) * T / n) - 1)


def even(process, n):
    """Even steps of time that end at the least noisy level, which is not visited: with last=least, DPM-Solver's own."""
    return torch.linspace(process.t_noisy, process.t_least, n + 1, dtype=torch.float64)[:-1]


def fast(process, n):
    """DPM-Solver-fast, 2206.00927, section 3.4: blocks of 3 points and a last one of 2 or 1, equally long in lambda,
    to the least noisy level, which is not visited."""
    require(process.path(process.t_noisy)[0] > NO_IMAGE, "this process begins in pure noise, where log-SNR has no "
            "beginning: choose a linspace, trailing or uniform grid")
    sizes = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
    ends = [math.log(alpha / sigma) for alpha, sigma in map(process.path, (process.t_noisy, process.t_least))]
    length = (ends[1] - ends[0]) / len(sizes)
    lams = [ends[0] + length * (block + k / size) for block, size in enumerate(sizes) for k in range(size)]
    return torch.cat([double(process.t_noisy), process.time(torch.exp(-double(*lams[1:])))])


def noise_levels(process, n, ramp, sigma_min, sigma_max):
    """Times whose p goes from sigma_max to sigma_min (None: the process's own) as ramp(high, low, share)."""

    def end(given, t):
        alpha, sigma = process.path(t)
        c = process.ode_scale(alpha, sigma)
        require(given or c > NO_IMAGE, "this process begins at infinite sigma/alpha, where such a grid has no end: "
                "choose its sigma_max, or a linspace, trailing or uniform grid")
        return float(given) if given else sigma / c

    high, low = end(sigma_max, process.t_noisy), end(sigma_min, process.t_least)
    require(0 < low < high, f"noise levels from {high:g} down to {low:g}: they must fall, and stay above 0")
    return process.time(process.level_of(ramp(high, low, torch.linspace(0, 1, n, dtype=torch.float64))))


def karras(process, n, *, rho=7.0, sigma_min: float | None = None, sigma_max: float | None = None):
    """Even steps of p^(1/rho), EDM, 2206.00364, eq. 5."""

    def ramp(high, low, share):
        return (high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho

    return noise_levels(process, n, ramp, sigma_min, sigma_max)


def exponential(process, n, *, rho=1.0, sigma_min: float | None = None, sigma_max: float | None = None):
    """Even steps of log p (rho bends them: k-diffusion's polyexponential; Lu's even lambda, 2206.00927)."""

    def ramp(high, low, share):
        return low * (high / low) ** ((1 - share) ** rho)

    return noise_levels(process, n, ramp, sigma_min, sigma_max)


def beta_quantiles(u, a, b):
    """Quantiles of the Beta(a, b) distribution, by a sum over a grid that crowds at its singular ends."""
    v = np.linspace(0, 1, 20001)
    x = (v**5 * (126 - 420 * v + 540 * v**2 - 315 * v**3 + 70 * v**4)).clip(0, 1)
    middle = ((x[1:] + x[:-1]) / 2).clip(1e-12, 1 - 1e-12)
    mass = np.cumsum(np.diff(x) * middle ** (a - 1) * (1 - middle) ** (b - 1))
    return torch.from_numpy(np.interp(u.numpy(), np.concatenate([[0], mass / mass[-1]]), x))


def beta(process, n, *, a=0.6, b=0.6, sigma_min: float | None = None, sigma_max: float | None = None):
    """p at the quantiles of Beta(a, b), dense at both ends, 2407.12173."""

    def ramp(high, low, share):
        return low + (high - low) * beta_quantiles(1 - share, a, b)

    return noise_levels(process, n, ramp, sigma_min, sigma_max)


GRIDS: dict[str, Callable] = {
    "uniform": uniform,
    "linspace": linspace,
    "spaced": spaced,
    "leading": leading,
    "trailing": trailing,
    "even": even,
    "fast": fast,
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
}


def grid_times(process, steps, grid=None, last="clean", lambda_min=None):
    """The times that a sampler walks, float64: `steps` times from t_noisy down, by an entry of `GRIDS` (None: the
    process's own), then the end: last = "clean", or "least" (t_least: DDIM's set_alpha_to_one=False). lambda_min:
    begin no noisier than this (DPM-Solver's lambda_min_clipped, -5.1 for the cosine chain); pure noise stays."""
    require(steps >= 1, f"{steps} sampling steps: choose at least 1")
    require(last in ("clean", "least"), f"unknown last level {last!r}: choose clean or least")
    grid, walked = choose(GRIDS, grid or process.grid, "grid"), process
    if lambda_min is not None and process.path(process.t_noisy)[0] > NO_IMAGE:
        top = process.time(double(math.exp(-lambda_min))).item()
        walked = copy.copy(process)
        walked.t_noisy = min(process.t_noisy, process.known_time(top))
        walked.T = int(walked.t_noisy) + 1
    times = process.shifted(grid(walked, steps))
    return torch.cat([times, double(process.t_clean if last == "clean" else process.t_least)])


def listed_times(process, times=None, sigmas=None):
    """The grid of a user's own list: of times, or of noise levels (the process's p: sigma/alpha, or t on a straight
    path). It falls; the clean image is added at its end if it is not there."""
    if sigmas is not None:
        times = [process.t_clean if s == 0 else process.time(process.level_of(double(s))).item() for s in sigmas]
    require(len(times) and all(a > b for a, b in pairwise(times)),
            f"the list of times {', '.join(f'{t:g}' for t in times)} does not fall from noise to the image")
    return double(*times, *([process.t_clean] if times[-1] > process.t_clean else []))


# -------------------------------------------------------------------------------------------------------- levels, steps

NO_IMAGE = 1e-12                                      # an alpha below this is a rounding error: pure noise


class Level(NamedTuple):
    """A time of the grid in plain numbers."""

    t: float
    alpha: float
    sigma: float
    lam: float                                        # log(alpha/sigma), infinite for the clean image
    c: float                                          # y = x/c and p = sigma/c: coordinates of the ODE
    p: float

    @property
    def noise(self):
        """Whether there is no image in it, so that eps says nothing of x0."""
        return self.alpha <= NO_IMAGE


def level(process, t, alpha, sigma):
    alpha = max(alpha, NO_IMAGE)
    c = process.ode_scale(alpha, sigma)
    return Level(t, alpha, sigma, math.log(alpha / sigma) if sigma else math.inf, c, sigma / c)


def levels(process, times):
    """The grid as a list of `Level`. Raises ValueError for times beyond the process."""
    times = torch.as_tensor(times, dtype=torch.float64)
    slack = 1e-6 * (process.t_noisy - process.t_clean)
    low, high = times.min().item(), times.max().item()
    require(process.t_clean - slack <= low and high <= process.t_noisy + slack,
            f"times from {high:g} to {low:g}, but this process lives from {process.t_noisy:g} to {process.t_clean:g}")
    return [level(process, *row) for row in zip(times.tolist(), *(v.tolist() for v in process.path(times)))]


def steps(process, times):
    """The steps of a walk, (i, j): from Level i to the cleaner Level j. One of no length is a step too."""
    grid = levels(process, times)
    require(all(i.sigma > 0 for i in grid[:-1]), "no step begins at the clean image: it may only be the last time")
    require(all(i.lam <= j.lam + 1e-9 for i, j in pairwise(grid)), "the times of a walk fall, from noise to the image")
    return [(i, j if j.lam - i.lam > 1e-9 else j._replace(lam=i.lam)) for i, j in pairwise(grid)]


def at(process, t=None, lam=None, p=None):
    """The level at a time, a lambda or a p, within the process's range."""
    if t is None:
        s = math.exp(-lam) if p is None else process.level_of(p)
        t = process.time(double(s)).item()
    return level(process, t, *process.path(t))


def below(process, i, j, eta):
    """The level below j from which new noise leads up to j: sigma_up = eta sigma_j sqrt(1 - e^(-2h)), h = lambda_j -
    lambda_i, so that eta = 1 is the SDE's own noise (2010.02502, eq. 16; k-diffusion's get_ancestral_step)."""
    up = min(1.0, eta * math.sqrt(max(0.0, -math.expm1(2 * (i.lam - j.lam)))))
    return level(process, j.t, j.alpha, j.sigma * math.sqrt(1 - up**2))


def raised(x, i, j, z, s_noise=1.0):
    """From level i up to the noisier j by the forward process, with fresh noise z (times s_noise)."""
    r = j.alpha / i.alpha
    return mix(r, x, s_noise * math.sqrt(max(0.0, j.sigma**2 - (r * i.sigma) ** 2)), z)


def fresh(noise, x, i, j):
    """Standard normal numbers like x for the step i -> j: noise that knows of steps (`Brownian`) is told of it."""
    return noise.between(x.shape, i, j) if hasattr(noise, "between") else noise(x.shape)


def ddim_step(d, j):
    """x_j = alpha_j x0 + sigma_j eps: the step into the clean image and the step out of pure noise."""
    return mix(j.alpha, d.x0, j.sigma, d.eps) if j.sigma else j.alpha * d.x0


def along(x, i, j, slope):
    """From level i to j along a slope dy/dp of the probability-flow ODE: x_j/c_j = x_i/c_i + (p_j - p_i) dy/dp."""
    return mix(j.c / i.c, x, j.c * (j.p - i.p), slope)


def outputs_of(memory):
    """The outputs that a walk remembers, [(level, output), ...], newest first."""
    return [] if memory is None else memory.setdefault("outputs", [])


def remember(outputs, i, j, output, most, of_noise=False):
    """Keeps `output` of level i as the newest of at most so many. Not if the step i -> j has no length, since the
    next begins at the same level; nor that of pure noise, which is infinitely far away in lambda (a slope may be:
    of_noise)."""
    if j.lam > i.lam and (of_noise or not i.noise):
        outputs[:] = [(i, output), *outputs][:most]


def with_churn(sampler):
    """A sampler of the ODE with EDM's stochasticity, 2206.00364, algorithm 2, lines 4-6: before each of the n steps
    new noise takes x up to 1 + gamma times its noise level, gamma = min(s_churn/n, sqrt(2) - 1) between the levels
    s_min and s_max. The sampler then takes one step from there, with what it remembers."""

    has_noise = {"s_noise"} & set(inspect.signature(sampler).parameters)

    @functools.wraps(sampler)
    def churned(denoise, x, times, process, noise, memory=None, *, s_churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0,
                **options):
        memory, options = {} if memory is None else memory, options | dict.fromkeys(has_noise, s_noise)
        if not s_churn:
            yield from sampler(denoise, x, times, process, noise, memory, **options)
            return
        times = torch.as_tensor(times, dtype=torch.float64)
        for n, (i, j) in enumerate(steps(process, times)):
            gamma = min(s_churn / (len(times) - 1), math.sqrt(2) - 1) if s_min <= i.sigma / i.alpha <= s_max else 0.0
            rest = times[n:].clone()
            if not i.noise and not memory.get("block"):                    # a block of singlestep solvers is one step
                hat, z = at(process, lam=i.lam - math.log(1 + gamma)) if gamma else i, noise(x.shape)
                x, rest[0] = raised(x, i, hat, z, s_noise) if gamma else x, hat.t
                # an output that the noise has jumped back over says nothing of where x goes
                outputs = outputs_of(memory)
                outputs[:] = [m for m in outputs if m[0].lam < hat.lam - (j.lam - hat.lam) / 4]
            x = next(sampler(denoise, x, rest, process, noise, memory, **options))
            yield x

    own, added = (inspect.signature(f, follow_wrapped=False).parameters.values() for f in (sampler, churned))
    churned.__signature__ = joined(own, added)
    return churned


# --------------------------------------------------------------------------------------------- one call a step: order 1


def ddpm(denoise, x, times, process, noise, memory=None, *, variance="small", s_noise=1.0):
    """Denoising Diffusion Probabilistic Models, 2006.11239, algorithm 2, on any grid of times. Options: variance:
    "small" = beta~, "large" = beta; a denoiser with learned variances overrules it."""
    require(variance in ("small", "large"), f"unknown variance {variance!r}: choose small or large")
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        r = i.alpha / j.alpha                                                             # sqrt(alpha_t)
        beta = max(0.0, i.sigma**2 - (r * j.sigma) ** 2)                                  # beta_t = 1 - alpha_t
        x = mix(j.alpha * beta / i.sigma**2, d.x0, r * (j.sigma / i.sigma) ** 2, x)       # mu~_t, eq. 7
        if j.sigma and beta:                                                              # z = 0 in the last step
            small = beta * (j.sigma / i.sigma) ** 2                                       # beta~_t
            if d.variance is None:
                std = math.sqrt({"small": small, "large": beta}[variance])
            else:                                                                         # 2102.09672, eq. 15
                std = torch.exp(0.5 * (d.variance * math.log(beta) + (1 - d.variance) * math.log(small)))
            x = x + (s_noise * std) * fresh(noise, x, i, j)
        yield x


def ddim(denoise, x, times, process, noise, memory=None, *, eta=0.0, s_noise=1.0):
    """Denoising Diffusion Implicit Models, 2010.02502, eq. 12: eta 0 is its ODE, eta 1 is DDPM."""
    for i, j in steps(process, times):
        d, h = denoise(x, i.t), j.lam - i.lam
        sigma = min(1.0, eta * math.sqrt(-math.expm1(-2 * h))) * j.sigma                  # eq. 16
        x = mix(j.alpha, d.x0, math.sqrt(j.sigma**2 - sigma**2), d.eps)         # "predicted x0", "direction to x_t"
        if sigma:
            x = mix(1, x, s_noise * sigma, fresh(noise, x, i, j))                         # "random noise"
        yield x


def ddim_inversion(denoise, x, times, process, noise, memory=None):
    """DDIM run upwards, from an image x to its noise (2010.02502, section 5.4). The network is asked at the noisier end
    of each step, since it has never seen a clean image."""
    for i, j in pairwise(levels(process, torch.as_tensor(times).flip(0))):
        eps, r = denoise(x, j.t).eps, j.alpha / i.alpha
        x = mix(r, x, j.sigma - r * i.sigma, eps)
        yield x


@with_churn
def euler(denoise, x, times, process, noise, memory=None):
    """Euler's method for the ODE, 2206.00364: x + (sigma_j - sigma_i) (x - x0)/sigma_i of x/alpha and sigma/alpha.
    On a straight path that is x + (t_j - t_i) (eps - x0), 2209.03003."""
    for i, j in steps(process, times):
        d, r = denoise(x, i.t), j.sigma / i.sigma
        x = mix(r, x, j.alpha - r * i.alpha, d.x0) if d.flow is None else mix(1, x, j.t - i.t, d.flow)
        yield x


def euler_ancestral(denoise, x, times, process, noise, memory=None, *, eta=1.0, s_noise=1.0):
    """Euler with renewed noise, k-diffusion: down to sigma_down by the ODE, then up to sigma_j by noise."""
    for i, j in steps(process, times):
        x0, h = denoise(x, i.t).x0, j.lam - i.lam
        sigma_up = min(1.0, eta * math.sqrt(-math.expm1(-2 * h))) * j.sigma
        sigma_down = math.sqrt(j.sigma**2 - sigma_up**2)
        r = sigma_down / i.sigma
        x = mix(r, x, j.alpha - r * i.alpha, x0)
        if sigma_up:
            x = mix(1, x, s_noise * sigma_up, fresh(noise, x, i, j))
        yield x


def flow_ancestral(denoise, x, times, process, noise, memory=None, *, eta=1.0, s_noise=1.0):
    """Euler ancestral for flows, LTX-Video, 2501.00103: down to p_j (1 + eta (p_j/p_i - 1)), then up to p_j by noise.
    """
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        if eta and j.sigma:
            down = at(process, p=j.p * (1 + (j.p / i.p - 1) * eta))
            x = raised(ddim_step(d, down), down, j, fresh(noise, x, i, j), s_noise)
        else:
            x = ddim_step(d, j)
        yield x


# ------------------------------------------------------------------------------------ several calls a step: Runge-Kutta


@with_churn
def heun(denoise, x, times, process, noise, memory=None):
    """Heun's method, order 2, 2206.00364, algorithm 1: a step along the mean of the slopes of both ends."""
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        if not j.sigma or not i.c > NO_IMAGE:
            x = ddim_step(d, j)
        else:
            d_i = process.slope(d)
            d_j = process.slope(denoise(along(x, i, j, d_i), j.t))
            x = along(x, i, j, (d_i + d_j) / 2)
        yield x


def edm(denoise, x, times, process, noise, memory=None, *, s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003):
    """EDM's stochastic sampler, 2206.00364, algorithm 2: new noise before each Heun step. Its x and t are y = x/c
    and p = sigma/c, see `Process.ode_scale`."""
    for i, j in steps(process, times):
        gamma = min(s_churn / (len(times) - 1), math.sqrt(2) - 1) if s_min <= i.sigma / i.alpha <= s_max else 0.0
        hat, eps = i, noise(x.shape) if s_churn and not i.noise else None                 # line 4
        if gamma and not i.noise:
            hat = at(process, lam=i.lam - math.log(1 + gamma))                            # t^ = t + gamma t, line 5
            x = raised(x, i, hat, eps, s_noise)                                           # x^, line 6
        d = denoise(x, hat.t)
        if not j.sigma or not hat.c > NO_IMAGE:
            x = ddim_step(d, j)                                                           # line 8 alone
        else:
            d_i = process.slope(d)                                                        # (x^ - D(x^; t^))/t^, line 7
            d_next = process.slope(denoise(along(x, hat, j, d_i), j.t))                   # lines 8, 10
            x = along(x, hat, j, (d_i + d_next) / 2)                                      # line 11
        yield x


@with_churn
def midpoint(denoise, x, times, process, noise, memory=None):
    """The midpoint method, order 2: the slope half-way, for the whole step."""
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        if not j.sigma or not i.c > NO_IMAGE:
            x = ddim_step(d, j)
        else:
            m = at(process, p=(i.p + j.p) / 2)
            x = along(x, i, j, process.slope(denoise(along(x, i, m, process.slope(d)), m.t)))
        yield x


@with_churn
def rk4(denoise, x, times, process, noise, memory=None):
    """The classical Runge-Kutta method, order 4, four network calls a step."""
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        if not j.sigma or not i.c > NO_IMAGE:
            x = ddim_step(d, j)
        else:
            m, k1 = at(process, p=(i.p + j.p) / 2), process.slope(d)
            k2 = process.slope(denoise(along(x, i, m, k1), m.t))
            k3 = process.slope(denoise(along(x, i, m, k2), m.t))
            k4 = process.slope(denoise(along(x, i, j, k3), j.t))
            x = along(x, i, j, (k1 + 2 * k2 + 2 * k3 + k4) / 6)
        yield x


TABLEAUX = {                                          # places of the further calls; from which slopes; final weights
    "euler": ((), (), (1,)),
    "heun": ((1,), ((1,),), (1 / 2, 1 / 2)),
    "midpoint": ((1 / 2,), ((1,),), (0, 1)),
    "heun3": ((1 / 3, 2 / 3), ((1,), (0, 1)), (1 / 4, 0, 3 / 4)),
    "rk4": ((1 / 2, 1 / 2, 1), ((1,), (0, 1), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "3/8": ((1 / 3, 2 / 3, 1), ((1,), (-1 / 2, 3 / 2), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}


@with_churn
def sit_ode(denoise, x, times, process, noise, memory=None, *, method="heun"):
    """SiT's ODE sampler, 2401.08740: a Runge-Kutta method in time itself, dx/dt = velocity. Options: method: euler,
    heun, midpoint, heun3, rk4, 3/8."""
    places, rows, weights = choose(TABLEAUX, method, "Runge-Kutta method") if isinstance(method, str) else method
    for i, j in steps(process, times):
        d, dt = denoise(x, i.t), j.t - i.t
        if not j.sigma:
            x = ddim_step(d, j)
        else:
            k = [process.velocity(d, i.t)]
            for place, row in zip(places, rows):
                t = i.t + place * dt
                # a row: the weights of the slopes before, times place
                k.append(process.velocity(denoise(x + dt * place * weighted_sum(row, k), t), t))
            x = x + dt * weighted_sum(weights, k)
        yield x


@with_churn
def rk45(denoise, x, times, process, noise, memory=None, *, rtol=1e-5, atol=1e-5):
    """The probability-flow ODE by an adaptive Runge-Kutta method of order 5(4), 2011.13456, section 4.3."""
    require(rtol > 0 and atol > 0, f"tolerances {rtol} and {atol}: they must be above 0")

    def slope(t, x):
        return process.velocity(denoise(x, t), t)

    for i, j in steps(process, times):
        if j.sigma:
            x = dormand_prince(slope, x, i.t, j.t, rtol, atol)
        else:                                                                             # to t_least, then to its x0
            least = at(process, t=min(i.t, process.t_least))
            x = ddim_step(denoise(dormand_prince(slope, x, i.t, least.t, rtol, atol), least.t), j)
        yield x


# ------------------------------------------------------------------------------------ several calls a step: exponential
# The probability-flow ODE is solved exactly but for the output, whose integral over lambda is approximated: eps in
# DPM-Solver (2206.00927, eq. 3.4), x0 in DPM-Solver++ (2211.01095, eq. 8).


@with_churn
def dpm2(denoise, x, times, process, noise, memory=None):
    """DPM-Solver-2, 2206.00927, algorithm 1, r_1 = 1/2 (KDPM2): eps half-way in lambda, for the whole step."""
    for i, j in steps(process, times):
        d, h = denoise(x, i.t), j.lam - i.lam
        if not j.sigma or i.noise:
            x = ddim_step(d, j)
        else:
            s = at(process, lam=i.lam + h / 2)
            u = mix(s.alpha / i.alpha, x, -s.sigma * math.expm1(h / 2), d.eps)
            x = mix(j.alpha / i.alpha, x, -j.sigma * math.expm1(h), denoise(u, s.t).eps)
        yield x


def dpm2_ancestral(denoise, x, times, process, noise, memory=None, *, eta=1.0, s_noise=1.0):
    """DPM-Solver-2 with renewed noise, k-diffusion: dpm2 down to sigma_down, then up to sigma_j by noise."""
    for i, j in steps(process, times):
        d, down = denoise(x, i.t), below(process, i, j, eta)
        if not j.sigma:
            x = ddim_step(d, j)
        elif i.noise or not down.sigma:
            x = raised(ddim_step(d, down), down, j, fresh(noise, x, i, j), s_noise)
        else:
            h = down.lam - i.lam
            s = at(process, lam=i.lam + h / 2)
            u = mix(s.alpha / i.alpha, x, -s.sigma * math.expm1(h / 2), d.eps)
            x = mix(down.alpha / i.alpha, x, -down.sigma * math.expm1(h), denoise(u, s.t).eps)
            x = raised(x, down, j, fresh(noise, x, i, j), s_noise) if eta else x
        yield x


@with_churn
def dpmpp_2s(denoise, x, times, process, noise, memory=None):
    """DPM-Solver++(2S), 2211.01095, algorithm 1, r = 1/2: x0 half-way in lambda, for the whole step."""
    for i, j in steps(process, times):
        d, h = denoise(x, i.t), j.lam - i.lam
        if not j.sigma or i.noise:
            x = ddim_step(d, j)
        else:
            s = at(process, lam=i.lam + h / 2)
            u = mix(s.sigma / i.sigma, x, -s.alpha * math.expm1(-h / 2), d.x0)
            x = mix(j.sigma / i.sigma, x, -j.alpha * math.expm1(-h), denoise(u, s.t).x0)
        yield x


def dpmpp_2s_ancestral(denoise, x, times, process, noise, memory=None, *, eta=1.0, s_noise=1.0):
    """DPM-Solver++(2S) with renewed noise, k-diffusion: 2S down to sigma_down, then up to sigma_j by noise."""
    for i, j in steps(process, times):
        d, down = denoise(x, i.t), below(process, i, j, eta)
        if not j.sigma:
            x = ddim_step(d, j)
        elif i.noise or not down.sigma:
            x = raised(ddim_step(d, down), down, j, fresh(noise, x, i, j), s_noise)
        else:
            h = down.lam - i.lam
            s = at(process, lam=i.lam + h / 2)
            u = mix(s.sigma / i.sigma, x, -s.alpha * math.expm1(-h / 2), d.x0)
            x = mix(down.sigma / i.sigma, x, -down.alpha * math.expm1(-h), denoise(u, s.t).x0)
            x = raised(x, down, j, fresh(noise, x, i, j), s_noise) if eta else x
        yield x


def dpmpp_sde(denoise, x, times, process, noise, memory=None, *, eta=1.0, s_noise=1.0):
    """DPM-Solver++ (SDE), k-diffusion: 2S whose middle point has noise of its own, r = 1/2."""
    for i, j in steps(process, times):
        x0 = denoise(x, i.t).x0
        if j.sigma and not i.noise:
            s = at(process, lam=(i.lam + j.lam) / 2)
            down = below(process, i, s, eta)
            u = mix(down.sigma / i.sigma, x, -down.alpha * math.expm1(i.lam - down.lam), x0)
            u = raised(u, down, s, fresh(noise, x, i, s), s_noise) if eta else u
            x0 = denoise(u, s.t).x0
        down = below(process, i, j, eta)
        x = mix(down.sigma / i.sigma, x, -down.alpha * math.expm1(i.lam - down.lam), x0)
        if eta and j.sigma:
            x = raised(x, down, j, fresh(noise, x, i, j), s_noise)
        yield x


def phi(k, h):
    """phi_k(h) = (e^h - 1 - h - ... - h^(k-1)/(k-1)!)/h^k of exponential integrators; phi_1 = (e^h - 1)/h."""
    if abs(h) < 0.5:                                                                      # where the formula cancels
        return sum(h**n / math.factorial(n + k) for n in range(15))
    return (math.exp(h) - sum(h**n / math.factorial(n) for n in range(k))) / h**k


def taylor_step(x, i, j, form, outputs, D=((1,),), solver="heun", eta=0.0):
    """The step i -> j that is exact but for the output (form: "x0" or "eps"), a Taylor polynomial in lambda:
    2206.00927, eq. 3.6; 2211.01095, eq. 9; of the SDE with eta 1, section 5 there, without its noise. D: value, slope
    and curvature at i, each as weights of the outputs. solver: the slope's integral exactly ("heun"), or by the
    midpoint rule."""
    h = j.lam - i.lam
    if form == "x0":
        keep, scale, hh = j.sigma / i.sigma * math.exp(-eta * h), (1 + eta) * j.alpha, -(1 + eta) * h
    else:
        keep, scale, hh = j.alpha / i.alpha, -(1 + eta) * j.sigma, h
    c = h * phi(1, hh), h**2 * (phi(2, hh) if solver == "heun" else phi(1, hh) / 2), h**3 * phi(3, hh)
    C = scale * sum(c_k * np.array(D_k) for c_k, D_k in zip(c, D))
    return weighted_sum((keep, *C.tolist()), (x, *outputs))


def dpm_solver_3_step(denoise, x, i, j, d, process):
    """One step of DPM-Solver-3, 2206.00927, algorithm 2, r_1 = 1/3, r_2 = 2/3, and that of order 2 with the first two
    of its three outputs; d = denoise(x, i.t) is known."""
    h, value = j.lam - i.lam, (1, 0)
    s1, s2 = at(process, lam=i.lam + h / 3), at(process, lam=i.lam + 2 * h / 3)
    u1 = taylor_step(x, i, s1, "eps", [d.eps])
    first, D1 = [d.eps, denoise(u1, s1.t).eps], (-3 / h, 3 / h)                           # (eps_1 - eps)/(h/3)
    u2 = taylor_step(x, i, s2, "eps", first, [value, D1])
    last, D2 = [d.eps, denoise(u2, s2.t).eps], (-3 / (2 * h), 3 / (2 * h))                # (eps_2 - eps)/(2 h/3)
    return (taylor_step(x, i, j, "eps", last, [value, D2]),
            taylor_step(x, i, j, "eps", first, [value, D1], solver="midpoint"))


@with_churn
def dpm3(denoise, x, times, process, noise, memory=None):
    """DPM-Solver-3, 2206.00927, algorithm 2: three network calls a step, at thirds of it in lambda."""
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        if not j.sigma or i.noise or j.lam == i.lam:
            x = ddim_step(d, j)
        else:
            x, _ = dpm_solver_3_step(denoise, x, i, j, d, process)
        yield x


def singlestep(denoise, x, times, process, noise, memory, order, form, solver, eta=0.0, s_noise=1.0):
    """DPM-Solver(++) in blocks of `order` grid points, each reached from the block's start with all outputs since.
    Options: solver: "paper", or diffusers' "midpoint" and "heun", says how the second and third point use their
    slopes."""
    memory = {} if memory is None else memory
    block, grid = memory.setdefault("block", []), steps(process, times)
    for n, (i, j) in enumerate(grid):
        d, left = denoise(x, i.t), len(grid) - n
        if not block:                # a step out of pure noise, or into the clean image, is a block of its own
            size = max(1, left - 1) if left <= order and not grid[-1][1].sigma else min(order, left)
            if left == order == 3 < len(grid) and solver == "paper":                 # DPM-Solver-fast ends in 2 and 1
                size = 2
            memory["size"] = 1 if i.noise else size
        block.append((i, x, d.x0 if form == "x0" else d.eps))
        (start, x, m), *others = block
        others = [(k, m_k) for k, _, m_k in others if k.lam > start.lam]
        if not j.sigma or start.noise:
            x = ddim_step(d, j)
        elif len(others) == 2 and solver == "heun":                            # a parabola through all three
            x = taylor_step(x, start, j, form, [m, *(m_k for _, m_k in others)], derivatives(start, others), eta=eta)
        else:                                                                  # a line through the first and the newest
            half = len(others) == 1 and (solver == "midpoint" or solver == "paper" and memory["size"] == 2)
            slope = [d_k[:len(others[-1:]) + 1] for d_k in derivatives(start, others[-1:])]
            x = taylor_step(x, start, j, form, [m, *(m_k for _, m_k in others[-1:])], slope[:2],
                            "midpoint" if half else "heun", eta)
        if eta and j.sigma and not start.noise:
            x = mix(1, x, s_noise * noise_of(form, eta, start, j), fresh(noise, x, start, j))
        block[:] = [] if len(block) >= memory["size"] else block
        yield x


@with_churn
def dpm_solver(denoise, x, times, process, noise, memory=None, *, order=3, solver="paper"):
    """DPM-Solver-3 in blocks of 3 grid points, on eps, 2206.00927, algorithm 2: one network call a point."""
    yield from singlestep(denoise, x, times, process, noise, memory, order, "eps", solver)


@with_churn
def dpmpp_singlestep(denoise, x, times, process, noise, memory=None, *, order=2, solver="paper", eta=0.0, s_noise=1.0):
    """DPM-Solver++ in blocks of 2 grid points, on x0, 2211.01095, algorithm 1: one network call a point. Options:
    eta: 1 for its SDE; solver: see `singlestep`."""
    yield from singlestep(denoise, x, times, process, noise, memory, order, "x0", solver, eta, s_noise)


def noise_of(form, eta, i, j):
    """The standard deviation of the noise in a step of the SDE (eta of 2211.01095's, or tau^2 of SA-Solver's)."""
    h = j.lam - i.lam
    if form == "x0":
        return j.sigma * math.sqrt(-math.expm1(-2 * eta * h))
    return j.sigma * math.sqrt(eta * math.expm1(2 * h))


# --------------------------------------------------------------------------------- one call a step, with memory: slopes


def lagrange_integrals(nodes, a, b, kernel=lambda u: 1.0):
    """Weights w_k = integral from a to b of kernel(u) L_k(u) du, L_k the Lagrange polynomials of the nodes: sum_k w_k
    f(u_k) integrates kernel f for polynomials f. Gauss-Legendre quadrature, exact to rounding."""
    u = GAUSS[0] * (b - a) / 2 + (a + b) / 2
    w = GAUSS[1] * (b - a) / 2 * kernel(u)
    return [float(w @ math.prod(((u - m) / (v - m) for m in nodes if m != v), start=1.0 + 0 * u)) for v in nodes]


GAUSS = np.polynomial.legendre.leggauss(24)           # nodes and weights on [-1, 1]
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def adams_bashforth(slopes):
    """The mean slope of the next step by linear multistep, 2202.09778, eq. 12, from at most four, newest first."""
    return weighted_sum(ADAMS_BASHFORTH[len(slopes) - 1], slopes)


@with_churn
def lms(denoise, x, times, process, noise, memory=None, *, order=4):
    """Linear multistep, k-diffusion: Adams-Bashforth on uneven levels, the slope a polynomial in p."""
    outputs = outputs_of(memory)
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        if not j.sigma or not i.c > NO_IMAGE:
            x = ddim_step(d, j)
        elif j.lam > i.lam:
            nodes = [(i, process.slope(d)), *outputs][:order]
            w = lagrange_integrals([level.p for level, _ in nodes], i.p, j.p)
            x = j.c * (x / i.c + weighted_sum(w, [slope for _, slope in nodes]))
            remember(outputs, i, j, nodes[0][1], order - 1, of_noise=True)
        yield x


@with_churn
def pndm(denoise, x, times, process, noise, memory=None):
    """Pseudo numerical methods, 2202.09778, algorithm 2: three steps of Runge-Kutta, then linear multistep of order
    4."""
    outputs = outputs_of(memory)
    for i, j in steps(process, times):
        d, past = denoise(x, i.t), [e for _, e in outputs]
        e = process.slope(d)
        remember(outputs, i, j, e, 3, of_noise=True)
        if not j.sigma or not i.c > NO_IMAGE:
            x = ddim_step(d, j)
        elif len(past) < 3:                                                               # eq. 13
            m = at(process, t=process.known_time((i.t + j.t) / 2))
            e2 = process.slope(denoise(along(x, i, m, e), m.t))
            e3 = process.slope(denoise(along(x, i, m, e2), m.t))
            e4 = process.slope(denoise(along(x, i, j, e3), j.t))
            x = along(x, i, j, (e + 2 * e2 + 2 * e3 + e4) / 6)
        else:                                                                             # eq. 12
            x = along(x, i, j, adams_bashforth([e, *past]))
        yield x


@with_churn
def plms(denoise, x, times, process, noise, memory=None):
    """PNDM as in latent diffusion, 2202.09778: a Heun step first, then linear multistep, its order growing to 4."""
    outputs = outputs_of(memory)
    for i, j in steps(process, times):
        d, past = denoise(x, i.t), [e for _, e in outputs]
        e = process.slope(d)
        remember(outputs, i, j, e, 3, of_noise=True)
        if not j.sigma or not i.c > NO_IMAGE:
            x = ddim_step(d, j)
        elif not past:
            x = along(x, i, j, (e + process.slope(denoise(along(x, i, j, e), j.t))) / 2)
        else:
            x = along(x, i, j, adams_bashforth([e, *past]))
        yield x


@with_churn
def ipndm(denoise, x, times, process, noise, memory=None):
    """Improved PNDM, 2204.13902, section 3.4: linear multistep without a warm-up, its order growing to 4."""
    outputs = outputs_of(memory)
    for i, j in steps(process, times):
        d, past = denoise(x, i.t), [e for _, e in outputs]
        e = process.slope(d)
        remember(outputs, i, j, e, 3, of_noise=True)
        if not j.sigma or not i.c > NO_IMAGE:
            x = ddim_step(d, j)
        else:
            x = along(x, i, j, adams_bashforth([e, *past]))
        yield x


# ---------------------------------------------------------------------------- one call a step, with memory: exponential


@with_churn
def dpm_solver_2m(denoise, x, times, process, noise, memory=None, *, solver="midpoint", lower_final=True):
    """DPM-Solver multistep, order 2, on eps, 2206.00927 and 2211.01095, appendix: the slope of eps from two points."""
    outputs, grid = outputs_of(memory), steps(process, times)
    for n, (i, j) in enumerate(grid, 1):
        d, h = denoise(x, i.t), j.lam - i.lam
        if not j.sigma or i.noise:
            x = ddim_step(d, j)
        else:
            D = d.eps
            if outputs and (n < len(grid) or not lower_final):
                s, before = outputs[0]
                c = (0.5 if solver == "midpoint" else phi(2, h) / phi(1, h)) * h / (i.lam - s.lam)
                D = mix(1 + c, d.eps, -c, before)
            x = mix(j.alpha / i.alpha, x, -j.sigma * math.expm1(h), D)
            remember(outputs, i, j, d.eps, 1)
        yield x


@with_churn
def dpmpp_2m(denoise, x, times, process, noise, memory=None, *, solver="midpoint", lower_final=True):
    """DPM-Solver++(2M), 2211.01095, algorithm 2: x0 extrapolated from two points."""
    outputs, grid = outputs_of(memory), steps(process, times)
    for n, (i, j) in enumerate(grid, 1):
        x0, h = denoise(x, i.t).x0, j.lam - i.lam
        D = x0
        if outputs and j.sigma and (n < len(grid) or not lower_final):
            s, before = outputs[0]
            c = (0.5 if solver == "midpoint" else phi(2, -h) / phi(1, -h)) * h / (i.lam - s.lam)       # 1/(2 r_i)
            D = mix(1 + c, x0, -c, before)                                                # D_i, line 8
        x = mix(j.sigma / i.sigma, x, -j.alpha * math.expm1(-h), D)                       # line 9
        remember(outputs, i, j, x0, 1)
        yield x


def derivatives(i, outputs):
    """Of the polynomial in lambda through the outputs at level i and at most two earlier levels, [(level, output),
    ...]: value, slope and curvature at i, each as weights of the outputs, by divided differences."""
    D0, D1, D2 = np.eye(3)[0], np.zeros(3), np.zeros(3)
    if outputs:
        s1 = outputs[0][0].lam
        D1 = np.array([1, -1, 0]) / (i.lam - s1)
    if len(outputs) > 1:
        s2 = outputs[1][0].lam
        D2 = 2 * (D1 - np.array([0, 1, -1]) / (s1 - s2)) / (i.lam - s2)
        D1 = D1 + (i.lam - s1) / 2 * D2
    return D0, D1, D2


@with_churn
def dpmpp_3m(denoise, x, times, process, noise, memory=None, *, published=False, lower_final=True):
    """DPM-Solver++(3M), 2211.01095, section 4: x0 a parabola in lambda through three points. Options: published:
    with half of its curvature, as in published code, which is of order 2 only."""
    outputs, grid = outputs_of(memory), steps(process, times)
    for n, (i, j) in enumerate(grid):
        d, h = denoise(x, i.t), j.lam - i.lam
        if not j.sigma:
            x = ddim_step(d, j)
        else:
            past = outputs[:min(2, len(grid) - n - 1) if lower_final else 2]
            D0, D1, D2 = derivatives(i, past)
            D2 = D2 / 2 if published else D2
            C = j.alpha * (h * phi(1, -h) * D0 + h**2 * phi(2, -h) * D1 + h**3 * phi(3, -h) * D2)
            x = weighted_sum((j.sigma / i.sigma, *C.tolist()), (x, d.x0, *(x0 for _, x0 in past)))
        remember(outputs, i, j, d.x0, 2)
        yield x


@with_churn
def dpm_solver_3m(denoise, x, times, process, noise, memory=None, *, published=False, lower_final=True):
    """DPM-Solver multistep, order 3, on eps, 2206.00927: eps a parabola in lambda. Options: published: see
    `dpmpp_3m`."""
    outputs, grid = outputs_of(memory), steps(process, times)
    for n, (i, j) in enumerate(grid):
        d, h = denoise(x, i.t), j.lam - i.lam
        if not j.sigma or i.noise:
            x = ddim_step(d, j)
        else:
            past = outputs[:min(2, len(grid) - n - 1) if lower_final else 2]
            D0, D1, D2 = derivatives(i, past)
            D2 = D2 / 2 if published else D2
            C = -j.sigma * (h * phi(1, h) * D0 + h**2 * phi(2, h) * D1 + h**3 * phi(3, h) * D2)
            x = weighted_sum((j.alpha / i.alpha, *C.tolist()), (x, d.eps, *(eps for _, eps in past)))
            remember(outputs, i, j, d.eps, 2)
        yield x


def dpmpp_2m_sde(denoise, x, times, process, noise, memory=None, *, eta=1.0, s_noise=1.0, solver="midpoint",
                 lower_final=True):
    """SDE-DPM-Solver++(2M), 2211.01095, section 5: 2M with noise in each step (eta 0: without)."""
    outputs, grid = outputs_of(memory), steps(process, times)
    for n, (i, j) in enumerate(grid, 1):
        x0, h = denoise(x, i.t).x0, j.lam - i.lam
        D, H = x0, (1 + eta) * h
        if outputs and j.sigma and (n < len(grid) or not lower_final):
            s, before = outputs[0]
            c = (0.5 if solver == "midpoint" else phi(2, -H) / phi(1, -H)) * h / (i.lam - s.lam)
            D = mix(1 + c, x0, -c, before)
        keep = j.sigma / i.sigma * math.exp(-eta * h) if j.sigma else 0.0
        x = mix(keep, x, -j.alpha * math.expm1(-H), D)
        if eta and j.sigma:
            sigma = j.sigma * math.sqrt(-math.expm1(-2 * eta * h))
            x = mix(1, x, s_noise * sigma, fresh(noise, x, i, j))
        remember(outputs, i, j, x0, 1)
        yield x


def dpmpp_3m_sde(denoise, x, times, process, noise, memory=None, *, eta=1.0, s_noise=1.0, published=True,
                 lower_final=False):
    """SDE-DPM-Solver++(3M), k-diffusion: x0 a parabola in lambda, and noise in each step. Options: published: with
    half of its curvature, as there, which is of order 2 only (eta 0)."""
    outputs, grid = outputs_of(memory), steps(process, times)
    for n, (i, j) in enumerate(grid):
        d, h = denoise(x, i.t), j.lam - i.lam
        if not j.sigma:
            x = ddim_step(d, j)
        else:
            H, past = (1 + eta) * h, outputs[:min(2, len(grid) - n - 1) if lower_final else 2]
            D0, D1, D2 = derivatives(i, past)
            D2 = D2 / 2 if published else D2
            C = j.alpha * H * (phi(1, -H) * D0 + h * phi(2, -H) * D1 + h**2 * phi(3, -H) * D2)
            keep = j.sigma / i.sigma * math.exp(-eta * h)
            x = weighted_sum((keep, *C.tolist()), (x, d.x0, *(x0 for _, x0 in past)))
        if eta and j.sigma:
            sigma = j.sigma * math.sqrt(-math.expm1(-2 * eta * h))
            x = mix(1, x, s_noise * sigma, fresh(noise, x, i, j))
        remember(outputs, i, j, d.x0, 2)
        yield x


def dpm_solver_2m_sde(denoise, x, times, process, noise, memory=None, *, s_noise=1.0, solver="midpoint",
                      lower_final=True):
    """SDE-DPM-Solver(2M), 2211.01095, section 5: the SDE with eps, not x0, extrapolated from two points. Not among
    the names: its noise grows as e^h, so that it diverges in the 20 steps for which one takes a solver."""
    outputs, grid = outputs_of(memory), steps(process, times)
    for n, (i, j) in enumerate(grid, 1):
        d, h = denoise(x, i.t), j.lam - i.lam
        if not j.sigma or i.noise:
            x = j.alpha * d.x0
            sigma = j.sigma
        else:
            D = d.eps
            if outputs and (n < len(grid) or not lower_final):
                s, before = outputs[0]
                c = (0.5 if solver == "midpoint" else phi(2, h) / phi(1, h)) * h / (i.lam - s.lam)
                D = mix(1 + c, d.eps, -c, before)
            x = mix(j.alpha / i.alpha, x, -2 * j.sigma * math.expm1(h), D)
            sigma = j.sigma * math.sqrt(math.expm1(2 * h))
            remember(outputs, i, j, d.eps, 1)
        if sigma:
            x = mix(1, x, s_noise * sigma, fresh(noise, x, i, j))
        yield x


@with_churn
def deis(denoise, x, times, process, noise, memory=None, *, order=3, lower_final=True):
    """DEIS, 2204.13902, log rho: eps a polynomial in lambda through `order` points, integrated exactly (eq. 15)."""
    outputs, grid = outputs_of(memory), steps(process, times)
    for n, (i, j) in enumerate(grid):
        d, h = denoise(x, i.t), j.lam - i.lam
        if not j.sigma or i.noise:
            x = ddim_step(d, j)
        elif h:
            nodes = [(i, d.eps), *outputs][:min(order, len(grid) - n) if lower_final else order]
            # d rho = -rho d lambda for rho = sigma/alpha = e^-lambda: C_k with u = (lambda - lambda_i)/h
            C = lagrange_integrals([(s.lam - i.lam) / h for s, _ in nodes], 0, 1,
                                   lambda u: -j.sigma * h * np.exp(h * (1 - u)))
            x = j.alpha / i.alpha * x + weighted_sum(C, [eps for _, eps in nodes])
            remember(outputs, i, j, d.eps, order - 1)
        yield x


def unified_step(x, i, j, nodes, form, bh):
    """The update of UniPC, 2302.04867, eq. 3 (eq. 8 for x0): nodes = [(level, output), ...], the first at i; with the
    output at j among them it is the corrector UniC, without it the predictor UniP."""
    h, (_, m), differences = j.lam - i.lam, nodes[0], nodes[1:]
    if form == "x0":
        hh, keep, scale = -h, j.sigma / i.sigma, j.alpha
    else:
        hh, keep, scale = h, j.alpha / i.alpha, j.sigma
    weights = [-scale * math.expm1(hh)]
    if differences and h:
        r = [(s.lam - i.lam) / h for s, _ in differences]
        B = {"bh1": hh, "bh2": math.expm1(hh)}[bh]
        k = np.arange(1, len(r) + 1)
        R = np.array(r)[None] ** (k[:, None] - 1)                                         # R_p(h)
        b = [hh * math.factorial(n) * phi(n + 1, hh) / B for n in k]                      # phi_n(h)/B(h)
        a = [0.5] if len(r) == 1 else np.linalg.solve(R, b)           # for one difference the paper takes 1/2, any h
        C = [-scale * B * float(a_n) / r_n for a_n, r_n in zip(a, r)]              # of D_n/r_n, D_n = m_n - m
        weights = [weights[0] - sum(C), *C]
    return weighted_sum((keep, *weights), (x, m, *(m_n for _, m_n in differences[:len(weights) - 1])))


@with_churn
def unipc(denoise, x, times, process, noise, memory=None, *, order=2, bh="bh2", form="x0", corrector=True,
          uncorrected=(), lower_final=True, solver_p: str | None = None):
    """UniPC, 2302.04867, algorithms 1-2: a multistep predictor, and a corrector one order higher at no network
    call. Options: order: of the predictor; uncorrected: steps (from 0) without the corrector; solver_p: another
    sampler as the predictor."""
    memory, grid = {} if memory is None else memory, steps(process, times)
    outputs, done = memory.setdefault("outputs", []), memory.setdefault("done", 0)
    for n, (i, j) in enumerate(grid):
        d = denoise(x, i.t)
        m = d.eps if form == "eps" else d.x0
        if corrector and memory.get("step") and done + n - 1 not in uncorrected:
            start, before, (newest, *older) = memory["step"]
            x = unified_step(start, before, i, [newest, (i, m), *older], form, bh)        # UniC
        nodes = [(i, m), *outputs][:min(order, len(grid) - n) if lower_final else order]
        memory["step"], memory["done"] = None if i.noise else (x, i, nodes), done + n + 1
        remember(outputs, i, j, m, order - 1)
        if solver_p:
            x = next(SAMPLERS[solver_p](lambda *_: d, x, times[n:], process, noise, memory.setdefault("solver_p", {})))
        elif not j.sigma or i.noise:
            x = ddim_step(d, j)
        else:
            x = unified_step(x, i, j, nodes, form, bh)                                    # UniP
        yield x


def adams_step(x, i, j, nodes, form, tau, z):
    """The step i -> j of SA-Solver, 2309.05019, eq. 14: nodes = [(level, output), ...], the first of a predictor at i;
    tau: of the SDE in this step; z: its noise. With two outputs x0 published code takes the kernel of their slope as
    constant."""
    h, k = j.lam - i.lam, 1 + tau**2
    if not h:
        return x
    if form == "x0":
        keep, scale, rate = j.sigma / i.sigma * math.exp(-tau**2 * h), k * j.alpha, -k
    else:
        keep, scale, rate = j.alpha / i.alpha, -k * j.sigma, 1
    u = [(s.lam - i.lam) / h for s, _ in nodes]
    b = lagrange_integrals(u, 0, 1, lambda v: scale * h * np.exp(rate * h * (1 - v)))
    if len(b) == 2 and form == "x0":
        slope = scale * h / (2 * u[1])
        b = [sum(b) - slope, slope]
    x = weighted_sum((keep, *b), (x, *(m for _, m in nodes)))
    return x.add_(z, alpha=noise_of(form, tau**2, i, j)) if tau else x


def sa_solver(denoise, x, times, process, noise, memory=None, *, order=2, corrector=2, tau=1.0, form="x0",
              lower_final=True, s_noise=1.0):
    """SA-Solver, 2309.05019, algorithm 1: stochastic Adams predictor and corrector for an SDE of chosen noise.
    Options: tau: the noise, a number or a function of t, 0 for the ODE; corrector: outputs that it uses, the new
    one among them, 0 for none."""
    memory, grid = {} if memory is None else memory, steps(process, times)
    outputs = memory.setdefault("outputs", [])
    for n, (i, j) in enumerate(grid):
        d, left = denoise(x, i.t), len(grid) - n if lower_final else math.inf
        m = d.eps if form == "eps" and not i.noise else d.x0
        if memory.get("step"):
            start, before, (newest, *older), size, *same = memory["step"]
            x = adams_step(start, before, i, [newest, (i, m), *older][:size] if size > 1 else [(i, m)], *same)
        tau_i, nodes = tau(i.t) if callable(tau) else tau, [(i, m), *outputs]
        same = form if not i.noise else "x0", tau_i, s_noise * fresh(noise, x, i, j) if tau else None
        memory["step"] = (x, i, nodes, min(corrector, left + 1), *same) if corrector and not i.noise else None
        x = adams_step(x, i, j, nodes[:min(order, left)], *same) if j.sigma else ddim_step(d, j)
        remember(outputs, i, j, m, max(order, corrector) - 1)
        yield x


# --------------------------------------------------------------------------------------------------------- SDEs in time


def diffusion_coefficient(process, i, form, norm):
    """w(t) of SiT's SDE, 2401.08740, section 3.4, at level i; half of the paper's, as in its code."""
    if form == "sbdm":
        return norm * process.sde(i.t)[1] ** 2 / 2
    return {
        "sigma": norm * i.sigma,
        "linear": norm * i.t,
        "constant": norm,
        "decreasing": (1 - norm * math.cos(math.pi * i.t)) ** 2 / 4,
        "increasing-decreasing": norm * math.sin(math.pi * i.t) ** 2,
    }[form]


def sit_sde(denoise, x, times, process, noise, memory=None, *, diffusion="sigma", norm=1.0, method="euler",
            last_step="tweedie", s_noise=1.0):
    """SiT's SDE sampler, 2401.08740: drift velocity - w score, noise sqrt(2 w dt), any diffusion w(t) >= 0.
    Options: last_step: into the clean image by "mean" (the drift alone), "tweedie" (x0), "ode" (the velocity alone)
    or "none" (as any)."""

    def drift(x, i, score=1.0):                                                           # towards the data
        d = denoise(x, i.t)
        w = score * diffusion_coefficient(process, i, diffusion, norm)
        return d.x0, -process.velocity(d, i.t) - w / i.sigma * d.eps

    for i, j in steps(process, times):
        dt = i.t - j.t
        if j.t == times[-1] and last_step != "none":
            x0, k = drift(x, i, score=float(last_step != "ode"))
            x = x0 if last_step == "tweedie" else x + dt * k
        else:
            w = diffusion_coefficient(process, i, diffusion, norm)
            x_hat = x + math.sqrt(2 * w * dt) * s_noise * fresh(noise, x, i, j)
            k = drift(x if method == "euler" else x_hat, i)[1]
            if method == "heun":
                k = (k + drift(x_hat + dt * k, j)[1]) / 2
            x = x_hat + dt * k
        yield x


def langevin(x, score, z, size):
    """One step of Langevin dynamics, 2011.13456, algorithms 4-5: x + size score + sqrt(2 size) z."""
    return x + size * score + (2 * size) ** 0.5 * z


def pc(denoise, x, times, process, noise, memory=None, *, predictor="reverse", corrector="langevin", corrections=1,
       snr=0.16, probability_flow=False, s_noise=1.0):
    """Predictor-corrector sampling of the reverse SDE, 2011.13456, algorithms 1-5. Options: predictor: "reverse"
    (diffusion), "ancestral", "euler" (Euler-Maruyama) or "none", at last without noise; corrector, `corrections`
    times: "langevin", "ald" or "none"; probability_flow: of the ODE."""

    def score(x, i):
        return -denoise(x, i.t).eps / i.sigma

    def length(v):
        return v.flatten(1).norm(dim=1).mean()                                            # over the batch, as published

    for i, j in steps(process, times):
        r, g2 = process.transition(i, j, first_order=predictor == "euler")
        for _ in range(corrections if corrector != "none" else 0):
            g, z = score(x, i), s_noise * noise(x.shape)
            scale = snr * (length(z) / length(g) if corrector == "langevin" else i.sigma)
            x = langevin(x, g, z, size=2 * (r * scale) ** 2)
        if predictor != "none":
            g, z = score(x, i) * (0.5 if probability_flow else 1.0), s_noise * fresh(noise, x, i, j)
            x = (x + g2 * g) / r if predictor == "ancestral" else (2 - r) * x + g2 * g
            if j.t != times[-1] and not probability_flow:
                of_posterior = predictor == "ancestral" and process.exploding
                x = x + math.sqrt(g2 * (1 - g2 / i.sigma**2) if of_posterior else g2) * z
        yield x


# ------------------------------------------------------------------------------------------------------ few-step models


def lcm(denoise, x, times, process, noise, memory=None, *, scaling=10.0, s_noise=1.0):
    """Latent consistency models, 2310.04378, algorithm 3: x0 by the boundary condition, then noise again. Options:
    scaling: of the time in c_skip and c_out."""
    for i, j in steps(process, times):
        x0, t = denoise(x, i.t).x0, scaling * process.network_time(double(i.t)).item()
        x0 = mix(t / math.sqrt(t**2 + 0.25), x0, 0.25 / (t**2 + 0.25), x)                 # c_out x0 + c_skip x
        x = mix(j.alpha, x0, s_noise * j.sigma, fresh(noise, x, i, j)) if j.sigma else x0
        yield x


def consistency(denoise, x, times, process, noise, memory=None, *, sigma_min=0.0, s_noise=1.0):
    """Consistency models, 2303.01469, algorithm 1: x0, then noise again, of variance sigma^2 - sigma_min^2."""
    for i, j in steps(process, times):
        x0 = denoise(x, i.t).x0
        sigma = math.sqrt(max(0.0, j.sigma**2 - (j.alpha * sigma_min) ** 2))
        x = mix(j.alpha, x0, s_noise * sigma, fresh(noise, x, i, j)) if sigma else j.alpha * x0
        yield x


def tcd(denoise, x, times, process, noise, memory=None, *, eta=0.3, s_noise=1.0):
    """Trajectory consistency distillation, 2402.19159, algorithm 4: DDIM to s = (1 - eta) t_j, then noise to t_j."""
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        if eta and j.sigma:
            s = at(process, t=process.known_time((1 - eta) * j.t))
            x = raised(ddim_step(d, s), s, j, fresh(noise, x, i, j), s_noise)
        else:
            x = ddim_step(d, j)
        yield x


def flow_map(denoise, x, times, process, noise, memory=None):
    """Flow maps, AnyFlow, 2605.13724: the mean velocity u from t to r of a network of two times. It is called as
    model(x, t, y, r=r), and says so by an attribute two_times; with any other this is Euler's step. x_r = x_t + (r
    - t) u."""
    two_times = len(inspect.signature(denoise).parameters) > 2
    for i, j in steps(process, times):
        d = denoise(x, i.t, j.t) if two_times else denoise(x, i.t)
        x = along(x, i, j, process.slope(d)) if i.c > NO_IMAGE else ddim_step(d, j)
        yield x


# ------------------------------------------------------------------------------------------------------- adaptive steps


def dpm_adaptive(denoise, x, times, process, noise, memory=None, *, order=3, rtol=0.05, atol=0.0078, h_init=0.05,
                 eta=0.0, s_noise=1.0):
    """DPM-Solver-12 or -23 with steps as long as their error allows, 2206.00927, appendix C. The control of the
    step is k-diffusion's; of `times` only the ends count. Yields after every accepted step."""
    require(order in (2, 3) and rtol > 0 and atol > 0 and h_init > 0,
            f"order {order}, rtol {rtol}, atol {atol}, h_init {h_init}: order is 2 or 3, the others above 0")
    grid = levels(process, times)
    i, end, h, before = grid[0], grid[-1] if grid[-1].sigma else at(process, t=process.t_least), h_init, x
    while i.lam < end.lam - 1e-5:
        require(h > 1e-6, f"DPM-Solver's steps shrink to nothing at t = {i.t:.6g}: no tolerance of {rtol:g} can be met")
        j = at(process, lam=min(end.lam, i.lam + h)) if not i.noise else next(k for k in grid if not k.noise)
        down, d = below(process, i, j, eta) if eta else j, denoise(x, i.t)
        if down.lam > end.lam:
            down = level(process, j.t, j.alpha, j.alpha * math.exp(-end.lam))
        high, low = adaptive_step(denoise, x, i, down, d, process, order)
        scale = torch.maximum(low.abs(), before.abs()).mul(rtol).clamp(min=atol)
        error = ((low - high) / scale).pow(2).mean().sqrt().item()
        factor = 1 + math.atan((error + 1e-8) ** -(1 / (1.5 if eta else order)) - 1)
        h *= factor
        if factor >= 0.81:
            before, x = low, raised(high, down, j, fresh(noise, x, i, j), s_noise) if eta else high
            i = j
            yield x
    if not grid[-1].sigma:
        yield ddim_step(denoise(x, i.t), grid[-1])


def adaptive_step(denoise, x, i, j, d, process, order):
    """Steps i -> j of two orders, the higher first: DPM-Solver-3 and -2, or -2 and -1. Out of pure noise DDIM's,
    twice."""
    if i.noise:
        return ddim_step(d, j), ddim_step(d, j)
    if order == 3:
        return dpm_solver_3_step(denoise, x, i, j, d, process)
    s = at(process, lam=(i.lam + j.lam) / 2)
    eps = denoise(taylor_step(x, i, s, "eps", [d.eps]), s.t).eps
    return taylor_step(x, i, j, "eps", [eps]), taylor_step(x, i, j, "eps", [d.eps])


# ----------------------------------------------------------------------------------------------------------- inpainting


def repaint_walk(n, jump_length, jump_n_sample):
    """The grid points that RePaint visits, 0 the noisiest and n the image: every `jump_length` steps it goes back up
    by as many, until it has come down `jump_n_sample` times (2201.09865, appendix B)."""
    jumps = dict.fromkeys(range(0, n - jump_length, jump_length), jump_n_sample - 1)
    t, walk = n, []
    while t >= 1:
        t -= 1
        walk.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            walk += range(t + 1, t + 1 + jump_length)
            t += jump_length
    return [n - 1 - t for t in [*walk, -1]]


def repaint(denoise, x, times, process, noise, image, mask, *, jump_length=10, jump_n_sample=10, eta=1.0):
    """RePaint, 2201.09865, algorithm 1: inpainting by any unconditional model. image (B, C, H, W); mask, 1 where it is
    known, 0 where it is to be painted, of a shape that multiplies it. eta: of the DDIM step (1: DDPM's). Yields after
    every step down; those are more than len(times) - 1."""
    require(jump_length >= 1 and jump_n_sample >= 1,
            f"jump_length {jump_length} and jump_n_sample {jump_n_sample}: both at least 1")
    grid, image, mask = levels(process, times), image.to(x), mask.to(x)
    for a, b in pairwise(repaint_walk(len(grid) - 1, jump_length, jump_n_sample)):
        i, j = grid[a], grid[b]
        if b < a:
            x = raised(x, i, j, noise(x.shape))                                           # line 10
        else:
            known = j.alpha * image + j.sigma * noise(x.shape)                            # line 5
            unknown = next(ddim(denoise, x, [i.t, j.t], process, noise, eta=eta))         # line 7
            x = mask * known + (1 - mask) * unknown                                       # line 8
            yield x


# ---------------------------------------------------------------------------------------------------------------- noise


class Brownian:
    """Noise that is one path of Brownian motion for each image, whatever the number of steps: with more steps a
    stochastic sampler comes closer to one image, instead of drawing another.

    In x/alpha and sigma/alpha a step of the SDE (eta 1) adds to (x/alpha - x0) alpha^2/sigma^2 an independent normal
    number of variance SNR_j - SNR_i, SNR = (alpha/sigma)^2. So z = (W(SNR_j) - W(SNR_i)) / sqrt(SNR_j - SNR_i), with
    W(SNR) = B(u)/(1 - u) and B a Brownian bridge on u = SNR/(1 + SNR), which is alpha_bar: it is found by bisection,
    each midpoint normal given its two neighbours (virtual Brownian tree, 2001.01328, section 4). noise(shape): where
    its n streams are drawn from; a step costs up to `depth` draws, fewer where its levels are near each other."""

    def __init__(self, noise, n, depth=32):
        keys = noise((n, 2))
        self.noise, self.depth, self.kind, self.last, self.nodes = noise, depth, (keys.device, keys.dtype), {}, {}
        self.keys = keys.float().cpu().contiguous().view(torch.int32).abs().tolist()

    def __call__(self, shape):
        return self.noise(shape)

    def normal(self, shape, *node):
        """The normal numbers of a node of the tree, of every image its own."""
        rows = []
        for key in self.keys:
            seed = np.random.SeedSequence([*key, *node]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
            rows.append(torch.randn(shape[1:], generator=generator, dtype=torch.float64))
        return torch.stack(rows)

    def path(self, shape, i):
        """W at level i."""
        u = i.alpha**2 / (i.alpha**2 + i.sigma**2)
        if u not in self.last:
            left, right, low, high, index = 0.0, 0.0, 0.0, 1.0, 0        # B and u at both ends of an interval
            known, self.nodes = self.nodes, {}                           # those of the last level are mostly the same
            for n in range(self.depth):
                middle, std = (low + high) / 2, math.sqrt((high - low) / 4)
                z = known.get((n, index))
                self.nodes[n, index] = z = self.normal(shape, n, index) if z is None else z
                between = (left + right) / 2 + std * z
                index = 2 * index + (u >= middle)
                left, right, low, high = (between, right, middle, high) if u >= middle else (left, between, low, middle)
            share = (u - low) / (high - low)
            std = math.sqrt(share * (1 - share) * (high - low))
            b = left + share * (right - left) + std * self.normal(shape, self.depth, index)
            self.last = {u: b * (1 + (i.alpha / i.sigma) ** 2)}           # 1/(1 - u) = 1 + SNR
        return self.last[u]

    def between(self, shape, i, j):
        """The noise of the step from level i to the cleaner j."""
        if not j.sigma or j.lam == i.lam:
            return self.noise(shape)
        before = self.path(shape, i)
        z = (self.path(shape, j) - before) / math.sqrt((j.alpha / j.sigma) ** 2 - (i.alpha / i.sigma) ** 2)
        return z.to(*self.kind)


# -------------------------------------------------------------------------------------------------------------- drawing


SAMPLERS: dict[str, Callable] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "ddim-inversion": ddim_inversion,
    "euler": euler,
    "euler-ancestral": euler_ancestral,
    "flow-ancestral": flow_ancestral,
    "heun": heun,
    "edm": edm,
    "midpoint": midpoint,
    "rk4": rk4,
    "rk45": rk45,
    "sit-ode": sit_ode,
    "sit-sde": sit_sde,
    "dpm2": dpm2,
    "dpm2-ancestral": dpm2_ancestral,
    "dpm3": dpm3,
    "dpm-adaptive": dpm_adaptive,
    "dpm-solver": dpm_solver,
    "dpm-solver-2m": dpm_solver_2m,
    "dpm-solver-3m": dpm_solver_3m,
    "dpmpp-2s": dpmpp_2s,
    "dpmpp-2s-ancestral": dpmpp_2s_ancestral,
    "dpmpp-sde": dpmpp_sde,
    "dpmpp-singlestep": dpmpp_singlestep,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-2m-sde": dpmpp_2m_sde,
    "dpmpp-3m": dpmpp_3m,
    "dpmpp-3m-sde": dpmpp_3m_sde,
    "lms": lms,
    "pndm": pndm,
    "plms": plms,
    "ipndm": ipndm,
    "deis": deis,
    "unipc": unipc,
    "sa-solver": sa_solver,
    "pc": pc,
    "lcm": lcm,
    "tcd": tcd,
    "consistency": consistency,
    "flow-map": flow_map,
}


def options_of(entry):
    """What a user may set of a sampler, a grid or a rule: {name: default}, its keyword-only parameters."""
    parameters = inspect.signature(entry).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


def draw(process, denoise, x, *, sampler="dpmpp-2m", steps=30, grid=None, times=None, sigmas=None, last="clean",
         lambda_min=None, image=None, strength=0.6, mask=None, brownian=False, noise=torch.randn, **options):
    """Walks from standard normal x (B, C, H, W) to images, without gradients: yields x after each step, float32 at
    least.

    sampler: an entry of `SAMPLERS`, options: its own. The grid: see `grid_times` (grid, last, lambda_min), or a list
    of times or of noise levels. image: begin at this image with noise instead (SDEdit, 2108.01073), with the last
    share `strength` of the steps; and mask: keep it where the mask is 1, paint the rest by `repaint`, whose options
    are then taken. brownian: noise that is the same path for any number of steps. Raises ValueError for what it
    cannot do."""
    walk = repaint if mask is not None else choose(SAMPLERS, sampler, "sampler")
    known = options_of(walk)
    unknown = ", ".join(sorted(set(options) - set(known)))
    require(not unknown, f"the sampler has no option {unknown}: it has {', '.join(known) or 'none'}")
    if times is None and sigmas is None:
        times = times_of(process, steps, walk, grid, last, lambda_min)
    else:
        times = listed_times(process, times, sigmas)
    x, noise = single(x), Brownian(noise, len(x)) if brownian else noise
    if mask is not None:
        options |= {"image": image, "mask": mask}
    elif image is not None:
        require(0 < strength <= 1, f"strength {strength}: the share of the steps to walk, above 0 and at most 1")
        times = times[-1 - max(1, round(strength * (len(times) - 1))):]
        x = process.noised(image.to(x), x, times[0].item())
    if process.exploding and (image is None or mask is not None) and walk is not ddim_inversion:
        x = x * process.path(times[0].item())[1]
    with torch.no_grad():
        yield from walk(denoise, x, times, process, noise, **options)


# What suits a sampler on a chain, by the experiment of docs/samplers.md. The process's own grid, improved DDPM's, ends
# with a long step in lambda from t = T/n to 0, over which most solvers extrapolate badly: these begin at the noisiest
# step and end at T/n (trailing). All but the first order leave out the steps of the cosine table above sigma/alpha =
# e^5.1, as DPM-Solver does.
FIRST_ORDER = (ddpm, ddim, ddim_inversion, euler, euler_ancestral, flow_ancestral, repaint)
STEADY = (edm, midpoint, rk4, dpm3, dpmpp_2s, dpmpp_2s_ancestral, dpmpp_sde, dpmpp_singlestep, dpm_solver_3m, deis, lms,
          plms, ipndm, tcd, consistency)


def times_of(process, steps, sampler="dpmpp-2m", grid=None, last="clean", lambda_min=None):
    """`grid_times`, with what suits the sampler where no grid is asked for."""
    walk = choose(SAMPLERS, sampler, "sampler")
    walk = getattr(walk, "func", walk)               # with its options bound
    if grid is None and isinstance(process, Discrete) and walk not in FIRST_ORDER:
        grid = "spaced" if walk in STEADY else "trailing"
        lambda_min = -5.1 if lambda_min is None else lambda_min
    return grid_times(process, steps, grid, last, lambda_min)


def generate(process, model, x, y=None, null=None, *, guidance=1.0, guide_channels=None, rule="cfg", interval=None,
             power=None, weak=None, clip=True, quantile=None, largest=math.inf, **drawing):
    """Sample: images after each step, from standard normal x, by model(x, t, y).

    y, null: the condition and the null condition that guidance moves away from (both as the model takes them); weak:
    another objective (process and model) to move away from instead (autoguidance, 2406.02507). guidance, rule,
    interval, power, guide_channels, clip, quantile, largest: see `guidance.compose`. drawing: see `draw`."""
    denoise, other = process.denoiser(model, y), None
    if guidance != 1 and weak is not None:
        other = weak.process.denoiser(weak.model, y)
    elif guidance != 1 and null is not None:
        other = process.denoiser(model, null)
    denoise = compose(process, denoise, other, guidance=guidance, rule=rule, interval=interval, power=power,
                      channels=guide_channels, clip=clip, quantile=quantile, largest=largest)
    yield from draw(process, denoise, x, **drawing)
