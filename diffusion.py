"""The diffusion core: noise schedules, predictions, losses, samplers, guidance. It knows no architecture.

1. A `Process` is a path from data to noise, x_t = alpha(t) x0 + sigma(t) eps, what the network predicts on it and how
   it is trained: `process.loss(model, x0, y, t, noise)` trains, `process.denoised(output, xt, t)` reads the network.
2. A denoiser is a function `denoise(xt, t) -> Denoised`. Guidance and clipping take denoisers and return a denoiser.
3. A sampler is a generator: `for x in sampler(denoise, x, times, process, noise): ...` yields x after every step.

    symbol            here            meaning
    x_0, x_t          x0, xt          clean image, noisy image at time t, (B, C, H, W)
    epsilon           eps             the Gaussian noise in x_t
    alpha_t, sigma_t  alpha, sigma    x_t = alpha_t x_0 + sigma_t eps
    s                 sigma/alpha     noise level once x_t is divided by alpha_t
    lambda            lam             log(alpha/sigma) = -log s, half the log signal-to-noise ratio
    i, j              i, j            a sampler steps from grid point i to the cleaner grid point j
"""

import math
from collections import namedtuple
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import runs


def expand(v, x):
    """A number per sample, (B,), shaped to multiply x (B, ...) in x's own dtype."""
    return v.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))

def batch_time(t, x):
    """A time (number or (B,)) as (B,) for x: float64 beside float64, else float32 (half cannot count to 1000)."""
    return torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device).expand(len(x))

def flat_mean(x): return x.flatten(1).mean(1)        # over all but the first dimension, (B, ...) -> (B,)
def double(*numbers): return torch.tensor(numbers, dtype=torch.float64)

def choose(table, name, what):
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(filter(None, table))}")
    return table[name]


# ------------------------------------------------------------------------------------------------------------ schedules
# Tables of beta_t, t = 0 .. T-1, in float64.

def linear_betas(T=1000, start=1e-4, end=0.02):
    """DDPM, 2006.11239, section 4; scaled by 1000/T, so that any T ends in the same noise."""
    return torch.linspace(start * 1000 / T, end * 1000 / T, T, dtype=torch.float64)

def betas_of(bar, largest=1.0):
    """The table with these alpha_bar (T,); a beta is at most `largest`, 2102.09672, section 3.2."""
    return (1 - bar / torch.cat([double(1), bar[:-1]])).clamp(max=largest)

def table_of(f, T):
    """The table that follows alpha_bar(u) = f(u)/f(0), u in [0, 1]."""
    bar = f(torch.arange(T + 1, dtype=torch.float64) / T)
    return betas_of(bar[1:] / bar[0], 0.999)

def cosine_betas(T=1000, offset=0.008):
    """Improved DDPM, 2102.09672, eq. 17: alpha_bar(u) = cos^2(pi/2 (u + offset) / (1 + offset))."""
    return table_of(lambda u: torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2, T)

def zero_terminal_snr(betas):
    """The table moved and stretched in sqrt(alpha_bar) to end in pure noise, 2305.08891, algorithm 1."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    return betas_of(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)

def shifted_betas(betas, shift):
    """The table with every sigma/alpha multiplied by `shift` (simple diffusion, 2301.11093, section 3.1)."""
    bar = torch.cumprod(1 - betas, 0)
    return betas_of(bar / (bar + shift**2 * (1 - bar)))

def ramp(T, start, end, share=1.0):
    n = int(T * share)
    return torch.cat([torch.linspace(start, end, n, dtype=torch.float64), double(end).expand(T - n)])

BETAS: dict[str, Callable] = {                       # name(T, start, end), where the table has ends to choose
    "linear": linear_betas, "cosine": cosine_betas,
    "scaled-linear": lambda T=1000, start=0.00085, end=0.012: ramp(T, start**0.5, end**0.5) ** 2,   # 2112.10752
    "sigmoid": lambda T=1000, start=1e-4, end=0.02: torch.sigmoid(ramp(T, -6, 6)) * (end - start) + start,
    # Laplace density of log SNR, 2407.03297; published code takes sqrt(SNR/(1 + SNR)), which is alpha, as alpha_bar
    "laplace": lambda T=1000: table_of(lambda u: torch.sigmoid(
        -0.5 * torch.sign(0.5 - u) * torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)).sqrt(), T),
    "exp": lambda T=1000: table_of(lambda u: torch.exp(-12 * u), T),
    "quad": lambda T=1000, start=1e-4, end=0.02: ramp(T, start**0.5, end**0.5) ** 2,   # from here on: the DDPM code's
    "warmup10": lambda T=1000, start=1e-4, end=0.02: ramp(T, start, end, 0.1),
    "warmup50": lambda T=1000, start=1e-4, end=0.02: ramp(T, start, end, 0.5),
    "const": lambda T=1000, start=0.02, end=0.02: ramp(T, end, end), "jsd": lambda T=1000, *ends: 1 / ramp(T, T, 1),
}

def respaced(T, spec):
    """The steps that a shorter chain keeps, ascending (improved DDPM's `timestep_respacing`).
    spec: "50" = 50 steps at a fractional stride, both ends kept; "10,15,20" = T cut into sections, so many steps in
    each; "ddim50" = the integer stride that gives exactly 50 steps. Raises ValueError if T cannot be cut so."""
    if spec.startswith("ddim"):
        for stride in range(1, T):
            if len(range(0, T, stride)) == int(spec[4:]):
                return list(range(0, T, stride))
        raise ValueError(f"respacing {spec!r}: no integer stride cuts {T} steps into exactly {spec[4:]}")
    steps, start, counts = [], 0, [int(c) for c in spec.split(",")]
    for k, count in enumerate(counts):
        size = T // len(counts) + (k < T % len(counts))
        if not 0 < count <= size:
            raise ValueError(f"respacing {spec!r}: cannot take {count} steps out of a section of {size}")
        place = 0.0
        for _ in range(count):                       # the place is accumulated, as published: it decides the ties
            steps.append(start + round(place))
            place += (size - 1) / max(count - 1, 1)
        start += size
    return steps


# ---------------------------------------------------------------------------------------------------------------- grids
# grid(process, n, **options) -> n times from the noisiest down, float64; `Process.times` appends the end. A grid of
# noise levels is one of the process's own p = sigma/(its ode_scale): s = sigma/alpha, but t itself on a straight path.

def spaced(process, n, kind="spaced", offset=0):
    if not isinstance(process, Discrete):
        raise ValueError("spaced, leading and trailing grids count the steps of a chain: choose uniform or linspace")
    if not 0 < n <= (T := process.T):
        raise ValueError(f"{n} sampling steps out of a chain of {T}: choose 1 to {T}")
    if kind == "leading":
        return torch.arange(n - 1, -1, -1).double() * (T // n) + offset
    return double(*respaced(T, str(n))[::-1]) if kind == "spaced" else double(*np.round(T - np.arange(n) * T / n) - 1)

def noise_levels(process, n, ramp, ends=None):
    """Times whose p goes from ends[0] (noisiest) to ends[1] as ramp(high, low, share), share from 0 to 1."""
    high, low = ends or process.p(double(process.t_noisy, process.t_least)).tolist()
    if high > 1e12:
        raise ValueError("this process begins at infinite sigma/alpha, where such a grid has no end: choose linspace")
    return process.time(process.s_of_p(ramp(high, low, torch.linspace(0, 1, n, dtype=torch.float64))))

def beta_quantiles(u, a=0.6, b=0.6):
    """Quantiles of the Beta(a, b) distribution, by a sum over a grid that crowds at its singular ends."""
    v = np.linspace(0, 1, 20001)
    x = (v**5 * (126 - 420 * v + 540 * v**2 - 315 * v**3 + 70 * v**4)).clip(0, 1)
    middle = ((x[1:] + x[:-1]) / 2).clip(1e-12, 1 - 1e-12)
    mass = np.cumsum(np.diff(x) * middle ** (a - 1) * (1 - middle) ** (b - 1))
    return torch.from_numpy(np.interp(u.numpy(), np.concatenate([[0], mass / mass[-1]]), x))

GRIDS: dict[str, tuple[Callable, str]] = {
    "uniform": (lambda process, n: torch.linspace(process.t_noisy, process.t_clean, n + 1, dtype=torch.float64)[:-1],
                "even steps of time, the last into the clean image"),
    "linspace": (lambda process, n: torch.linspace(process.t_noisy, process.t_least, n, dtype=torch.float64),
                 "even steps of time from the noisiest to the least noisy level, both visited"),
    "spaced": (spaced, "a fractional stride over a discrete chain, both ends kept, 2102.09672"),
    "leading": (partial(spaced, kind="leading"), "k floor(T/n) + offset, never the noisiest step: DDIM's, 2305.08891"),
    "trailing": (partial(spaced, kind="trailing"), "round(T - k T/n) - 1, from the noisiest step: 2305.08891, table 2"),
    "karras": (lambda process, n, rho=7.0, ends=None: noise_levels(
        process, n, lambda a, b, u: (a ** (1 / rho) + u * (b ** (1 / rho) - a ** (1 / rho))) ** rho, ends),
        "even steps of p^(1/7), EDM, 2206.00364, eq. 5"),
    "exponential": (lambda process, n, rho=1.0, ends=None: noise_levels(
        process, n, lambda a, b, u: b * (a / b) ** ((1 - u) ** rho), ends),
        "even steps of log p (rho bends them: k-diffusion's polyexponential)"),
    "beta": (lambda process, n, a=0.6, b=0.6, ends=None: noise_levels(
        process, n, lambda high, low, u: low + (high - low) * beta_quantiles(1 - u, a, b), ends),
        "p at the quantiles of Beta(0.6, 0.6), dense at both ends, 2407.12173"),
}

def resolution_shift(tokens, low=(256, 0.5), high=(4096, 1.15)):
    """The `shift` for an image of so many tokens: exp(mu), mu linear in them (2403.03206, section 5.3.2; Flux)."""
    return math.exp(low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0]))


# ------------------------------------------------------------------------------------------- weightings, time densities
# A weighting is a weight on the squared error of eps, a function of SNR = (alpha/sigma)^2; `Process.weight` carries it
# over to what the network predicts. So one name is one objective, whatever the prediction.

WEIGHTINGS: dict[str, tuple[Callable, str]] = {
    "snr": (lambda snr: torch.ones_like(snr), "SNR on x0: the plain loss of eps, 2006.11239, eq. 14"),
    "truncated-snr": (lambda snr: snr.clamp(min=1) / snr, "max(SNR, 1) on x0, progressive distillation, 2202.00512"),
    "min-snr": (lambda snr, gamma=5: snr.clamp(max=gamma) / snr, "min(SNR, 5) on x0, 2303.09556"),
    "soft-min-snr": (lambda snr, gamma=4: gamma / (gamma + snr), "4 SNR/(4 + SNR) on x0: min-SNR, rounded, 2401.11605"),
    "sigmoid": (lambda snr, bias=2: torch.sigmoid(bias - snr.log()), "sigmoid(2 - log SNR) on eps, 2303.00848"),
    "p2": (lambda snr, k=1, gamma=1: (k + snr) ** -gamma, "1/(1 + SNR) on eps: perception prioritized, 2204.00227"),
    "v": (lambda snr: 1 + 1 / snr, "the plain loss of v, whatever is predicted, 2202.00512"),
    "flow": (lambda snr: (1 + snr**-0.5) ** 2, "the plain loss of eps - x0, whatever is predicted, 2209.03003"),
    "edm": (lambda snr, sd=0.5: 1 + 1 / (snr * sd**2), "the plain loss of EDM's F, whatever is predicted, 2206.00364"),
    "cosmap": (lambda snr: 2 / math.pi / (1 - 2 * snr.sqrt() / (1 + snr.sqrt()) ** 2) * (1 + snr**-0.5) ** 2,
               "2/(pi (1 - 2t + 2t^2)) on the flow, 2403.03206, section 3.1"),
    "sigma-sqrt": (lambda snr: (1 + snr.sqrt()) ** 2 * (1 + snr**-0.5) ** 2, "t^-2 on the flow: detail above all, SD3"),
    "likelihood": (lambda snr, process, t: process.half_g2(t) / process.sigma(t) ** 2,
                   "-d lambda/dt on eps: the variational bound in continuous time, 2101.09258"),
    "velocity": (lambda snr, process, t: (process.half_g2(t) / process.sigma(t)) ** 2,
                 "the plain loss of dx/dt, whatever is predicted, SiT, 2401.08740"),
}

def normal_quantile(u): return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))

# Uniform u -> a share of the time range ("time"), or a noise level s = sigma/alpha ("noise").
DENSITIES: dict[str, tuple[Callable, str, str]] = {
    "uniform": (lambda u: u, "time", "every time alike"),
    "logit-normal": (lambda u, mean=0.0, std=1.0: torch.sigmoid(mean + std * normal_quantile(u)), "time",
                     "the middle of the path, 2403.03206, eq. 19"),
    "mode": (lambda u, scale=1.29: 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u), "time",
             "the middle with heavy tails, 2403.03206, eq. 20"),
    "log-normal": (lambda u, mean=-1.2, std=1.2: torch.exp(mean + std * normal_quantile(u)), "noise",
                   "log s ~ N(-1.2, 1.2^2), EDM, 2206.00364, table 1"),
    "log-uniform": (lambda u, low=0.002, high=80.0: low * (high / low) ** u, "noise", "every scale of noise alike"),
}


# ------------------------------------------------------------------------------------------------------------ processes

class Denoised(NamedTuple):
    """What a denoiser says of x_t = alpha x0 + sigma eps. variance: None, or the learned v of improved DDPM, eq. 15:
    the place of a reverse step's log-variance between log beta~ (v = 0) and log beta (v = 1), whatever that step is."""
    x0: torch.Tensor
    eps: torch.Tensor
    variance: torch.Tensor | None = None

PREDICTIONS = {
    "eps": "the noise, 2006.11239", "x0": "the clean image", "v": "alpha eps - sigma x0, 2202.00512",
    "flow": "eps - x0, 2209.03003", "score": "the gradient of the log density, -eps/sigma, 2011.13456",
    "velocity": "dx/dt, alpha' x0 + sigma' eps, 2401.08740", "edm": "F of EDM's preconditioning, 2206.00364, eq. 7",
}
OBJECTIVES = ("hybrid", "rescaled", "vlb", "kl")

class Process:
    """A path x_t = alpha(t) x0 + sigma(t) eps, what the network predicts on it, and how it is trained.
    prediction: a name in `PREDICTIONS`. weighting: None (the plain squared error of the prediction) or a name in
    `WEIGHTINGS`. density: of the training times, a name in `DENSITIES`. shift: multiplies sigma/alpha of every time, in
    training and sampling (2403.03206, eq. 23). A subclass gives alpha, sigma, `time_of` (the inverse of sigma/alpha)
    and its times (t_clean: the clean image; t_first: trained from here; t_least: sampled to here; t_noisy: noise)."""
    t_clean, t_first, t_least, t_noisy = 0.0, 0.0, 1e-3, 1.0
    grid, density, own_prediction = "uniform", "uniform", "eps"
    straight, exploding, learned_variance = False, False, False

    def __init__(self, prediction=None, weighting=None, density=None, shift=1.0, sigma_data=0.5):
        self.prediction, self.weighting = prediction or self.own_prediction, weighting
        self.density, self.shift, self.sigma_data = density or self.density, shift, sigma_data
        choose(PREDICTIONS, self.prediction, "prediction")
        choose(DENSITIES, self.density, "time density")
        choose({None: 0, **WEIGHTINGS}, weighting, "weighting")
        if not shift > 0:
            raise ValueError(f"shift {shift}: it multiplies sigma/alpha, so it must be above 0")

    def network_time(self, t): return 1000 * t        # what the network is told for t: 0 .. 1000, whatever the process

    def network_input(self, xt, t):
        """What the network is shown for x_t: x_t itself, or c_in x_t of unit variance (EDM; exploding processes)."""
        if not self.exploding and self.prediction != "edm":
            return xt
        return xt * expand((self.sigma(t) ** 2 + (self.sigma_data * self.alpha(t)) ** 2) ** -0.5, xt)

    def path(self, t): return self.alpha(t), self.sigma(t)

    def rates(self, t):
        """alpha(t), sigma(t), alpha'(t), sigma'(t)."""
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            values = self.alpha(t), self.sigma(t)
            slopes = [torch.autograd.grad(v.sum(), t, retain_graph=True)[0] for v in values]
        return *(v.detach() for v in values), *slopes

    def half_g2(self, t):
        """g(t)^2/2 of the SDE dx = (log alpha)' x dt + g dW that has these marginals (2011.13456)."""
        a, s, da, ds = self.rates(t)
        return s * ds - da / a * s * s

    def kernel(self, i, j, euler=False):
        """(r, g2) of the forward step x_i = r x_j + sqrt(g2) noise to the noisier i; euler: to first order."""
        if euler:
            a, _, da, _ = self.rates(double(i.t))
            return 1 + (da / a).item() * (i.t - j.t), 2 * self.half_g2(double(i.t)).item() * (i.t - j.t)
        return (r := i.alpha / j.alpha), max(0.0, i.sigma**2 - (r * j.sigma) ** 2)

    def ode_scale(self, alpha, sigma):
        """c of the probability-flow ODE for x_t/c against p = sigma/c. c = alpha: p = s, slope eps. On a straight path
        c = alpha + sigma = 1: p = t, slope eps - x0, finite also at pure noise."""
        return alpha + sigma if self.straight else alpha

    def p(self, t): return (path := self.path(t))[1] / self.ode_scale(*path)
    def s_of_p(self, p): return p / (1 - p) if self.straight else p
    def time(self, s): return self.time_of(torch.as_tensor(s)).clamp(self.t_clean, self.t_noisy)
    def network(self, model, xt, t, y): return model(self.network_input(xt, t), self.network_time(t), y).to(xt.dtype)

    def shifted(self, t):                             # the time whose sigma/alpha is `shift` times that of t
        return t if self.shift == 1 else self.time(self.shift * self.sigma(t) / self.alpha(t))

    def training_times(self, u):
        """Uniform numbers u (B,) in [0, 1) -> training times (B,), distributed as this process wants them."""
        (draw, of, _), low, high = DENSITIES[self.density], self.t_first, self.t_noisy
        return self.shifted((low + (high - low) * draw(u) if of == "time" else self.time(draw(u))).clamp(low, high))

    def times(self, steps, grid=None, last="clean", **options):
        """The grid a sampler walks, float64: `steps` times from t_noisy down, by a name in `GRIDS` (None: the process's
        own) and its options, then the end: last = "clean", or "least" (t_least: DDIM's set_alpha_to_one=False)."""
        if steps < 1:
            raise ValueError(f"{steps} sampling steps: choose at least 1")
        times = self.shifted(choose(GRIDS, grid or self.grid, "grid")[0](self, steps, **options))
        return torch.cat([times, double(choose({"clean": self.t_clean, "least": self.t_least}, last, "last level"))])

    def noised(self, x0, noise, t):
        """x_t = alpha(t) x0 + sigma(t) eps."""
        a, s = self.path(t)
        return expand(a, x0) * x0 + expand(s, x0) * noise

    def mixing(self, t):
        """(alpha, sigma, p, q): the network predicts p x0 + q eps, and conversions solve this with x_t for x0, eps."""
        a, s = self.path(t)
        n, one = lambda: (s * s + (self.sigma_data * a) ** 2).sqrt(), torch.ones_like(a)
        return a, s, *{"eps": lambda: (0 * a, one), "x0": lambda: (one, 0 * a), "v": lambda: (-s, a),
                       "flow": lambda: (-one, one), "score": lambda: (0 * a, -1 / s),
                       "velocity": lambda: self.rates(t)[2:],
                       "edm": lambda: (s / (self.sigma_data * n()), -self.sigma_data * a / n())}[self.prediction]()

    def target(self, x0, noise, t):
        """What the network should say at time t, (B, C, H, W)."""
        *_, p, q = self.mixing(t)
        return expand(p, x0) * x0 + expand(q, x0) * noise

    def denoised(self, output, xt, t):
        """The network's output (B, C, H, W), or (B, 2C, H, W) with learned variance, as a `Denoised`."""
        return self.from_prediction(*self.split(output), xt, t)

    def from_prediction(self, output, variance, xt, t):
        a, s, p, q = self.mixing(t)
        det = a * q - s * p
        solved = lambda of_x, of_output: (expand(of_x / det, xt) * xt).addcmul_(expand(of_output / det, xt), output)
        return Denoised(output if self.prediction == "x0" else solved(q, -s),
                        output if self.prediction == "eps" else solved(-p, a), variance)

    def split(self, output):
        """Network output -> (prediction, v or None); v = (o + 1)/2 is unbounded."""
        output, *rest = output.chunk(2, dim=1) if self.learned_variance else (output,)
        return output, (rest[0] + 1) / 2 if rest else None

    def weight(self, t):
        """The weight of the prediction's squared error, (B,): that of eps, times the square of d eps/d prediction."""
        if self.weighting is None:
            return torch.ones_like(t)
        a, s, p, q = self.mixing(t)
        a, s = a.clamp(min=1e-4), s.clamp(min=1e-8)
        more = (self, t) if self.weighting in ("likelihood", "velocity") else ()
        return WEIGHTINGS[self.weighting][0]((a / s) ** 2, *more) * (a / (a * q - s * p)) ** 2

    def loss(self, model, x0, y, t, noise):
        """The training loss of each sample: {"loss": (B,), "mse": (B,), ...}, gradients flow to the model.
        x0 (B, C, H, W) in [-1, 1]; y what the model is conditioned on; t (B,) from `training_times`; noise like x0."""
        output, _ = self.split(self.network(model, self.noised(x0, noise, t), t, y))
        mse = flat_mean((self.target(x0, noise, t) - output) ** 2)
        return {"loss": mse * self.weight(t).to(mse), "mse": mse}

    def denoiser(self, model, y=None):
        """model(x, t, y) as `denoise(xt, t) -> Denoised`, with y bound; t a float or (B,)."""
        def denoise(xt, t):
            t = batch_time(t, xt)
            return self.denoised(self.network(model, xt, t, y), xt, t)
        return denoise

class Discrete(Process):
    """The discrete chain of DDPM, 2006.11239: t = 0 .. T-1 with alpha_bar_t = prod(1 - beta), alpha = sqrt(alpha_bar),
    sigma = sqrt(1 - alpha_bar); t = -1 is the clean image. The network is told t itself.
    betas: (T,) float64; s = sigma/alpha is interpolated linearly between them. learned_variance: the network's second
    half of channels is v (see `Denoised`). objective: "hybrid" adds the bound's term to train v, in bits per dimension,
    as published with DiT (2102.09672, eq. 16; "rescaled": times T/1000); "vlb" is the bound, T times one term; "kl" one
    term. fixed_variance: of the bound if none is learned, "large" = beta or "small" = beta~."""
    t_clean, t_least, grid = -1.0, 0.0, "spaced"

    def __init__(self, betas, prediction="eps", learned_variance=False, objective="hybrid", fixed_variance="large",
                 **options):
        super().__init__(prediction, **options)
        choose(dict.fromkeys(OBJECTIVES), objective, "objective")
        if prediction == "velocity" or self.weighting in ("likelihood", "velocity"):
            raise ValueError("a discrete chain has no dx/dt: take a continuous process (for the bound: objective vlb)")
        self.betas, self.T, self.learned_variance = betas, len(betas), learned_variance
        self.objective, self.fixed_variance, self.t_noisy = objective, fixed_variance, self.T - 1.0
        self.alpha_bar = torch.cat([betas.new_ones(1), torch.cumprod(1 - betas, 0)])    # entry t + 1 belongs to t
        # alpha_bar on a device, float64 where that knows it (MPS does not)
        self.table = cache(lambda d: self.alpha_bar.to(d, torch.float32 if d.type == "mps" else torch.float64))

    def alpha(self, t):
        table, low = self.table(t.device), t.floor().long().clamp(-1, self.T - 1)
        if not (part := t - low).any():
            return table[low + 1].sqrt()
        s = torch.lerp(*((1 / table[(low + k).clamp(max=self.T)] - 1).sqrt() for k in (1, 2)), part.to(table.dtype))
        return 1 / (1 + s * s).sqrt()

    def path(self, t): return (a := self.alpha(t)), (1 - a * a).clamp(min=0).sqrt()
    def sigma(self, t): return self.path(t)[1]
    def network_time(self, t): return t

    def time_of(self, s):
        table = (1 / self.table(s.device) - 1).sqrt()
        high = torch.searchsorted(table, s.to(table.dtype).contiguous()).clamp(1, self.T)
        return high - 2 + ((s - table[high - 1]) / (table[high] - table[high - 1])).clamp(0, 1)

    def rates(self, t):
        raise ValueError("a discrete chain has no derivative in t: take another sampler, or a continuous process")

    def training_times(self, u):
        draw, of, _ = DENSITIES[self.density]
        t = (draw(u) * self.T).floor() if of == "time" else self.time(draw(u))
        return self.shifted(t).round().clamp(0, self.T - 1).to(u.dtype)

    def posterior(self, t, s):
        """q(x_s | x_t, x_0), s cleaner than t, (B,) each -> its mean as (factor of x0, factor of x_t), log beta~ (-inf
        where s is clean), log beta. 2006.11239, eq. 6-7."""
        a_t, a_s = self.alpha(t) ** 2, self.alpha(s) ** 2
        beta, share = 1 - a_t / a_s, (1 - a_s) / (1 - a_t)
        return a_s.sqrt() * beta / (1 - a_t), (a_t / a_s).sqrt() * share, (beta * share).log(), beta.log()

    def loss(self, model, x0, y, t, noise):
        prediction, v = self.split(self.network(model, xt := self.noised(x0, noise, t), t, y))
        mse = flat_mean((self.target(x0, noise, t) - prediction) ** 2)
        loss, bound = mse * self.weight(t).to(mse), self.objective in ("vlb", "kl")
        if v is None and not bound:
            return {"loss": loss, "mse": mse}
        # Beside the simple loss, the bound trains the variance alone: its mean is detached.
        x0_hat = self.from_prediction(prediction if bound else prediction.detach(), None, xt, t).x0
        vb = self.variational_term(x0_hat, v, x0, xt, t)
        vb = vb * {"vlb": self.T, "rescaled": self.T / 1000}.get(self.objective, 1)
        return {"loss": vb, "mse": mse} if bound else {"loss": loss + vb, "mse": mse, "vb": vb}

    def variational_term(self, x0_hat, v, x0, xt, t, s=None, second=(1.0, 0.0)):
        """One term of the variational bound, (B,), bits per dimension: KL(q(x_s|x_t,x0) || p), s = t - 1 unless given;
        for s = -1 the negative log-likelihood of the 8-bit x0. 2006.11239, eq. 5; 2102.09672, eq. 15."""
        s = t - 1 if s is None else s
        x0_factor, xt_factor, log_small, log_large = (expand(c, x0) for c in self.posterior(t, s))
        # beta~ of the last step is 0 and has no logarithm: published code puts that of the step before in its place.
        clean = expand(s, x0) < 0
        before = self.posterior(*(torch.full_like(t, c) for c in second))[2]
        log_small = torch.where(clean, expand(before, x0), log_small)
        # fixed: beta, or beta~ (which "large" too takes in the last step)
        v = (self.fixed_variance == "large") * (~clean).to(x0.dtype) if v is None else v
        log_variance = v * log_large + (1 - v) * log_small
        true_mean, mean = x0_factor * x0 + xt_factor * xt, x0_factor * x0_hat + xt_factor * xt
        kl = 0.5 * (log_variance - log_small + (log_small - log_variance).exp() - 1
                    + (true_mean - mean) ** 2 * (-log_variance).exp())
        nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return flat_mean(torch.where(clean, nll, kl)) / math.log(2)

    def bits_per_dim(self, denoise, x0, noise, times=None):
        """The whole bound on -log2 p(x0), bits per dimension, along the chain or a sub-grid: total and prior (B,), and
        per step, noisiest first, vb, x0_mse and eps_mse, (B, steps)."""
        times, rows = self.times(self.T) if times is None else times, []
        for i, j in pairwise(times.tolist()):
            t, s, z = batch_time(i, x0), batch_time(j, x0), noise(x0.shape)
            d = denoise(xt := self.noised(x0, z, t), t)
            vb = self.variational_term(d.x0, d.variance, x0, xt, t, s, times[-3:-1].tolist())
            rows.append((vb, flat_mean((d.x0 - x0) ** 2), flat_mean((d.eps - z) ** 2)))
        vb, x0_mse, eps_mse = (torch.stack(row, 1) for row in zip(*rows))
        a2 = expand(self.alpha(batch_time(times[0].item(), x0)) ** 2, x0)
        prior = flat_mean(0.5 * (a2 * x0**2 - a2 - torch.log1p(-a2))) / math.log(2)    # KL(q(x_T | x0) || N(0, 1))
        return {"total": vb.sum(1) + prior, "prior": prior, "vb": vb, "x0_mse": x0_mse, "eps_mse": eps_mse}

def discretised_log_likelihood(x0, mean, log_std):
    """log of the mass that N(mean, std^2) gives to the 8-bit bin around x0; outer bins are open. 2006.11239, eq. 13. As
    published, the normal CDF is a tanh approximation and a mass is at least 1e-12."""
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    upper, lower = (cdf((x0 - mean + half) * (-log_std).exp()) for half in (1 / 255, -1 / 255))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()

class RectifiedFlow(Process):
    """The straight path x_t = (1 - t) x0 + t eps, t in [0, 1], t = 1 is noise (Flow Straight and Fast, 2209.03003)."""
    straight, density, own_prediction = True, "logit-normal", "flow"

    def __init__(self, prediction=None, **options):
        super().__init__(prediction, **options)
        if self.prediction in ("eps", "score"):      # mute about x0 at pure noise: SiT stays 0.001 away
            self.t_first, self.t_noisy = 1e-3, 1 - 1e-3

    def alpha(self, t): return 1 - t
    def sigma(self, t): return t
    def time_of(self, s): return 1 / (1 + 1 / s)
    def shifted(self, t): return self.shift * t / (1 + (self.shift - 1) * t)

class GVP(RectifiedFlow):
    """SiT's trigonometric path, 2401.08740: alpha = cos(pi t/2), sigma = sin(pi t/2)."""
    straight, density, own_prediction, shifted = False, "uniform", "velocity", Process.shifted

    def alpha(self, t): return torch.cos(math.pi / 2 * t)
    def sigma(self, t): return torch.sin(math.pi / 2 * t)
    def time_of(self, s): return 2 / math.pi * torch.atan(s)

class VP(Process):
    """The variance-preserving SDE, 2011.13456, eq. 11: log alpha = -t^2 (b1 - b0)/4 - t b0/2."""
    b0, b1, t_first = 0.1, 20.0, 1e-5

    def network_time(self, t): return 999 * t
    def log_alpha(self, t): return -0.25 * t**2 * (self.b1 - self.b0) - 0.5 * t * self.b0
    def alpha(self, t): return torch.exp(self.log_alpha(t))
    def sigma(self, t): return (-torch.expm1(2 * self.log_alpha(t))).sqrt()
    def time_of(self, s): return self.time_of_log_alpha(-0.5 * torch.log1p(s * s))

    def time_of_log_alpha(self, log_alpha):
        return -4 * log_alpha / (self.b0 + (self.b0**2 - 4 * (self.b1 - self.b0) * log_alpha).sqrt())

class SubVP(VP):
    """The sub-VP SDE, 2011.13456, eq. 29: VP's alpha, and 1 - alpha^2 as the standard deviation."""
    def sigma(self, t): return -torch.expm1(2 * self.log_alpha(t))
    def time_of(self, s): return self.time_of_log_alpha(-torch.asinh(s / 2))

class VE(Process):
    """The variance-exploding SDE, 2011.13456, eq. 30: alpha = 1, sigma = 0.01 (50/0.01)^t; t = 0 is the clean image."""
    t_first, t_least, exploding, s_min, s_max = 1e-5, 1e-5, True, 0.01, 50.0

    def alpha(self, t): return 1 + 0 * t
    def sigma(self, t): return torch.where(t > 0, self.s_min * (self.s_max / self.s_min) ** t, 0 * t)
    def time_of(self, s): return torch.log(s / self.s_min) / math.log(self.s_max / self.s_min)

class EDM(VE):
    """Elucidating the Design Space, 2206.00364: alpha = 1, sigma = t from 0.002 to 80. The network is told log t (the
    paper's c_noise = log(t)/4) moved and scaled to 0 .. 1000, the range that our backbones embed."""
    t_first, t_least, t_noisy, grid, density, own_prediction = 0.002, 0.002, 80.0, "karras", "log-normal", "edm"

    def sigma(self, t): return t
    def time_of(self, s): return s
    def network_time(self, t): return 1000 * torch.log(t.clamp(min=1e-8) / 0.002) / math.log(80 / 0.002)

PROCESSES: dict[str, tuple[Callable, str]] = {
    "flow": (RectifiedFlow, "rectified flow: a straight path from data to noise, the network predicts the velocity"),
    "linear": (lambda **k: Discrete(linear_betas(), **k), "DDPM's chain of 1000 steps with linear betas"),
    "cosine": (lambda **k: Discrete(cosine_betas(), **k), "improved DDPM's chain of 1000 steps with the cosine table"),
    "scaled-linear": (lambda **k: Discrete(BETAS["scaled-linear"](), **k), "latent diffusion's, linear in sqrt(beta)"),
    "sigmoid": (lambda **k: Discrete(BETAS["sigmoid"](), **k), "a chain whose betas are a sigmoid of time"),
    "laplace": (lambda **k: Discrete(BETAS["laplace"](), **k), "a chain with a Laplace density of log SNR"),
    "zero-snr": (lambda prediction="v", **k: Discrete(zero_terminal_snr(BETAS["scaled-linear"]()), prediction, **k),
                 "latent diffusion's chain stretched to end in pure noise; predicts v"),
    "vp": (VP, "the variance-preserving SDE of score-based models, continuous time"),
    "sub-vp": (SubVP, "the sub-VP SDE: VP's drift with less noise, better likelihoods"),
    "ve": (VE, "the variance-exploding SDE: noise is added, nothing is scaled"),
    "edm": (EDM, "EDM: sigma itself is the time, preconditioned network, log-normal noise levels"),
    "gvp": (GVP, "SiT's trigonometric path, the network predicts its velocity"),
}

def create_process(name="flow", prediction=None, shift=1.0, **options):
    """A process of `PROCESSES` by name; options: weighting, density, learned_variance, objective; None = the process's
    own. On a discrete chain the shift is built into the table (2301.11093). Raises ValueError for what cannot be."""
    make, chain = choose(PROCESSES, name, "process")[0], ("learned_variance", "objective", "fixed_variance")
    options = {k: v for k, v in {"prediction": prediction, **options}.items() if v is not None}
    if isinstance(make, type):
        if any(options.pop(k, False) for k in chain):
            raise ValueError(f"learned variances and the bound need a discrete chain (linear, cosine, ...), not {name}")
        return make(shift=shift, **options)
    process = make(**options)
    if shift != 1:
        type(process)(process.betas, shift=shift)    # refuses a shift that is not above 0
        process = Discrete(shifted_betas(process.betas, shift), **{"prediction": process.prediction, **options})
    if process.prediction in ("eps", "score") and process.alpha_bar[-1] <= 0:
        raise ValueError("this chain ends in pure noise, where eps says nothing of x0: predict v, x0, flow or edm")
    return process


# ------------------------------------------------------------------------------------------------------------- guidance
# Functions of denoisers that are denoisers. rule(c, u, scale, memory) combines what the conditional network c and the
# unconditional one u (or a weaker one: autoguidance, 2406.02507) predict; memory is a dict of this trajectory.

def dot(a, b): return (a * b).sum(list(range(1, a.ndim)), keepdim=True)      # of each sample, (B, 1, ..)

def cfg(c, u, scale, memory=None):
    """Classifier-free guidance, 2207.12598: u + scale (c - u)."""
    return u + scale * (c - u)

def cfg_rescale(c, u, scale, memory=None, share=0.7):
    """Guidance whose result keeps the standard deviation of c, mixed in by 0.7 (2305.08891, eq. 15-16)."""
    g, std = cfg(c, u, scale), lambda m: m.std(list(range(1, m.ndim)), keepdim=True)
    return g * (1 - share + share * std(c) / std(g))

def apg(c, u, scale, memory, eta=0.0, norm=15.0, momentum=-0.5):
    """Adaptive projected guidance, 2410.02416: c - u with momentum, its norm capped, its part along c scaled by eta."""
    update = memory["average"] = c - u + momentum * memory.get("average", 0.0)
    update = update * (norm / dot(update, update).sqrt()).clamp(max=1)
    return c + (scale - 1) * (update - (1 - eta) * dot(update, c) / dot(c, c) * c)

def cfg_zero(c, u, scale, memory, zero_calls=0):
    """CFG-Zero*, 2503.18886: u is first scaled to fit c best; the first `zero_calls` predictions (of flows) are 0."""
    memory["calls"] = memory.get("calls", 0) + 1
    return cfg(c, dot(c, u) / (dot(u, u) + 1e-8) * u, scale) * float(memory["calls"] > zero_calls)

def tangential(c, u, scale, memory=None):
    """Tangential damping, 2503.18137: of u only the part along the main direction that c and u share."""
    both = torch.stack([c.flatten(1), u.flatten(1)], 1)
    main = torch.linalg.svd(both.float(), full_matrices=False)[2][:, :1].to(c.dtype)     # (B, 1, C H W)
    return cfg(c, (both[:, 1:] @ main.mT @ main).view_as(u), scale)

GUIDANCE = {"cfg": cfg, "rescale": cfg_rescale, "apg": apg, "cfg-zero": cfg_zero, "tangential": tangential}

def guided(cond, uncond, scale, channels=None, process=None, rule=None, interval=None, **options):
    """Guidance by a rule (None: classifier-free guidance); scale 1 is no guidance. The variance is the conditional one.
    channels: guide only the first so many, the rest stays conditional (the published DiT and SiT guide 3 of their 4).
    process: needed by `rule`, which acts on what the network predicts; options are the rule's. interval: guide only at
    times in [low, high], and save the second network call elsewhere (2404.07724)."""
    memory = {}

    def mixed(c, u):
        n = channels or c.shape[1]
        return torch.cat([(rule or cfg)(c[:, :n], u[:, :n], scale, memory, **options), c[:, n:]], 1)

    def denoise(xt, t):
        c = cond(xt, t)
        if scale == 1 or (interval and not interval[0] <= float(torch.as_tensor(t).max()) <= interval[1]):
            return c
        u = uncond(xt, t)
        if rule is None:                             # linear, so it may act on x0 and eps alike
            return Denoised(mixed(c.x0, u.x0), mixed(c.eps, u.eps), c.variance)
        t = batch_time(t, xt)
        return process.from_prediction(mixed(*(process.target(d.x0, d.eps, t) for d in (c, u))), c.variance, xt, t)
    return denoise

def clipped(denoise, process, limit=1.0, quantile=None, keep_eps=False):
    """x0 clipped to [-limit, limit], and the noise that this x0 implies (for pixels; latents have no such range).
    quantile: dynamic thresholding, 2205.11487: clip at that quantile of |x0|, between 1 and limit, and divide by it.
    keep_eps: as it was."""
    def clip(xt, t):
        d, t = denoise(xt, t), batch_time(t, xt)
        x0 = d.x0.clamp(-limit, limit)
        if quantile is not None:
            q = expand(d.x0.flatten(1).float().abs().quantile(quantile, 1).clamp(1, limit), xt)
            x0 = d.x0.clamp(-q, q) / q
        if keep_eps:
            return d._replace(x0=x0)
        a, s = (expand(v, xt) for v in process.path(t))
        implied = (xt - a * x0) / s
        return Denoised(x0, torch.where(d.x0 == x0, d.eps, implied), d.variance)
    return clip


# ------------------------------------------------------------------------------------------------------------- samplers
# sampler(denoise, x, times, process, noise, **options) yields x after each step, len(times) - 1 of them. x starts as
# noise, (B, C, H, W); times is process.times(steps); noise(shape) gives standard normal numbers. First the tools.
# A grid point as plain numbers: its time, alpha, sigma, lambda = log(alpha/sigma), and c and p = sigma/c of the ODE.
Level = namedtuple("Level", "t alpha sigma lam c p", defaults=(1.0, math.inf))

def levels(process, times):
    """The grid as a list of `Level`; an alpha of rounding error is 0."""
    out = []
    for t, a, s in zip(times.tolist(), process.alpha(times).tolist(), process.sigma(times).tolist()):
        a = a if a > 1e-12 else 0.0
        c = process.ode_scale(a, s)
        lam = math.log(a / s) if a and s else math.copysign(math.inf, a - s)
        out.append(Level(t, a, s, lam, c, s / c if c else math.inf))
    return out

def steps(process, times): return list(pairwise(levels(process, times)))     # (i, j): a step goes from i to j

def whole(process, t): return math.floor(t) if isinstance(process, Discrete) else t      # all that its network knows

def at(process, t=None, lam=None, p=None):
    """The level at a time, a lambda or a p."""
    s = math.exp(-lam) if lam is not None else process.s_of_p(p) if p is not None else None
    return levels(process, double(t) if s is None else process.time(double(s)))[0]

def mix(weights, tensors):
    """sum of w m over the pairs, skipping w = 0."""
    total, *rest = [(w, m) for w, m in zip(weights, tensors) if w]
    total = total[0] * total[1]
    for w, m in rest:
        total = total.add_(m, alpha=w)
    return total

def beneath(i, j, eta):
    """The level under j (same alpha) from which new noise leads up to j: sigma_up = eta sigma_j sqrt(1 - (s_j/s_i)^2),
    2010.02502, eq. 16. DDPM, DDIM with eta = 1, Euler ancestral and SDE-DPM-Solver++-1 are all this one step."""
    down = j.sigma * math.sqrt(max(0.0, 1 - eta**2 * (1 - (j.sigma * i.alpha / (j.alpha * i.sigma)) ** 2)))
    return Level(math.nan, j.alpha, down, math.log(j.alpha / down) if down else math.inf)

def renoised(x, k, j, z):
    """From level k up to the noisier j by the forward process."""
    r = j.alpha / k.alpha
    return (r * x).add_(z, alpha=math.sqrt(max(0.0, j.sigma**2 - (r * k.sigma) ** 2)))

def churned(process, x, i, n, noise, s_churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0):
    """EDM's stochasticity, 2206.00364, algorithm 2: up to (1 + gamma) s_i with new noise before each of n steps."""
    if not s_churn or not i.alpha:
        return x, i
    z = s_noise * noise(x.shape)
    gamma = min(s_churn / n, math.sqrt(2) - 1) if s_min <= i.sigma / i.alpha <= s_max else 0.0
    hat = at(process, lam=i.lam - math.log(1 + gamma)) if gamma else i
    return (renoised(x, i, hat, z), hat) if hat.sigma > i.sigma else (x, i)

GAUSS = np.polynomial.legendre.leggauss(24)          # nodes and weights on [-1, 1]

def lagrange_integrals(nodes, a, b, kernel=lambda u: 1.0):
    """Weights w_k = integral from a to b of kernel(u) L_k(u) du, L_k the Lagrange polynomials of the nodes: sum_k w_k
    f(u_k) integrates kernel f for polynomials f. Gauss-Legendre quadrature, exact to rounding."""
    u = GAUSS[0] * (b - a) / 2 + (a + b) / 2
    w = GAUSS[1] * (b - a) / 2 * kernel(u)
    return [float(w @ math.prod(((u - m) / (v - m) for m in nodes if m != v), start=1.0 + 0 * u)) for v in nodes]

def exponential_step(x, i, j, nodes, form="x0", eta=0.0, slope="exact", published="", z=None):
    """The step i -> j of every solver that is exact in the linear part and takes the network's output m(lambda), x0 or
    eps, for a polynomial through `nodes` = [(lambda, m), ...], the first at i (DPM-Solver 2206.00927, ++ 2211.01095,
    DEIS 2204.13902, UniPC 2302.04867, SA-Solver 2309.05019, whose eq. 14 this is; eta = tau^2: 0 ODE, 1 SDE).
    slope: how two nodes extrapolate: "exact" (heun, DEIS), "half" (midpoint, bh2), "linear" (bh1, SA-Solver).
    published: three nodes as in published code, with "half" of the second derivative (which is order 2 only), or, in
    sde-dpmsolver++, "sign": moreover -1/2 where +1/2 follows ("flip": that alone, as its singlestep form has it)."""
    k, h = 1 + eta, j.lam - i.lam
    if form == "x0":
        keep, scale, rate = j.sigma / i.sigma * (math.exp(-eta * h) if eta else 1.0), k * j.alpha, -k
        up = j.sigma * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0
    else:
        keep, scale, rate = j.alpha / i.alpha, -k * j.sigma, 1
        up = j.sigma * math.sqrt(eta * math.expm1(2 * h)) if eta and j.sigma else 0.0
    whole = scale * math.expm1(rate * h) / rate if j.sigma or form == "x0" else -keep * i.sigma
    lams, outputs = zip(*nodes)
    w, u = [whole], [(lam - i.lam) / h for lam in lams]
    if len(nodes) > 1 and math.isfinite(h):
        w = lagrange_integrals(u, 0, 1, lambda v: scale * h * np.exp(rate * h * (1 - v)))
        if len(w) == 2 and slope != "exact":
            first = {"half": whole, "linear": scale * h}[slope] / 2
            w = [whole - first / u[1], first / u[1]]
        if len(w) == 3 and published:
            half, flip = {"half": (0.5, 0), "sign": (0.5, 1), "flip": (0, 2)}[published]
            second = -half * sum(w[n] * u[n] ** 2 for n in (1, 2)) - flip * scale / k
            w = [w[n] + second / math.prod(u[n] - v for v in u if v != u[n]) for n in range(3)]
    x = mix((keep, *w), (x, *outputs))
    return x.add_(z, alpha=up) if up else x

# One network call a step.
def ddpm(denoise, x, times, process, noise, variance="small"):
    """Ancestral sampling, 2006.11239, algorithm 2, on any sub-grid of times. variance: "small" = beta~, "large" = beta;
    a denoiser with learned variances overrules it. No noise in the last step."""
    for i, j in steps(process, times):
        d, k, z = denoise(x, i.t), beneath(i, j, 1.0), noise(x.shape)
        x = mix((k.alpha, k.sigma), d)         # the posterior's mean
        if j.sigma:
            log_small, log_large = math.log(j.sigma**2 - k.sigma**2), math.log(process.kernel(i, j)[1])
            v = {"small": 0.0, "large": 1.0}[variance] if d.variance is None else d.variance
            x = x.addcmul_(torch.as_tensor(0.5 * (v * log_large + (1 - v) * log_small), dtype=x.dtype).exp(), z)
        yield x

def down_and_up(denoise, x, times, process, noise, eta=0.0, under=None, s_noise=1.0):
    """Deterministically to a level k under j, then up to j with new noise; under(process, i, j, eta) says which k."""
    for i, j in steps(process, times):
        d, k = denoise(x, i.t), under(process, i, j, eta) if under and eta and j.sigma else beneath(i, j, eta)
        x = mix((k.alpha, k.sigma), d)
        yield (x := renoised(x, k, j, s_noise * noise(x.shape)) if k.sigma < j.sigma else x)

def ddim_inversion(denoise, x, times, process, noise):
    """DDIM run upwards, from an image x to its noise (2010.02502, section 5.4). The network is asked at the noisier end
    of each step, since it has never seen a clean image."""
    for i, j in steps(process, times.flip(0)):
        d = denoise(x, j.t)
        yield (x := exponential_step(x, i, j, [(i.lam, d.eps)], "eps") if j.alpha else j.sigma * d.eps)

# Several network calls a step: Runge-Kutta for y = x/c as a function of p = sigma/c, or (`time`) for x of t.
RUNGE_KUTTA = {                                      # places of the further calls; from which slopes; final weights
    "euler": ((), (), (1,)),
    "heun": ((1,), ((1,),), (1 / 2, 1 / 2)),
    "midpoint": ((1 / 2,), ((1,),), (0, 1)),
    "rk4": ((1 / 2, 1 / 2, 1), ((1,), (0, 1), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}

def velocity(process, d, t):                         # dx/dt of the probability-flow ODE, alpha' x0 + sigma' eps
    return mix([v.item() for v in process.rates(double(t))[2:]], d[:2])

def slope_of(process, d, i, time=False):             # dy/dp at level i: eps, or eps - x0 on a straight path; or dx/dt
    return velocity(process, d, i.t) if time else d.eps - d.x0 if process.straight else d.eps

def runge_kutta_step(denoise, process, x, i, j, d, method, even="p", time=False, euler_last=True):
    """One step i -> j, d = denoise(x, i.t) already known. even: intermediate levels lie evenly in p or in t. A step
    into the clean image (which no network has learned), or out of infinite p, is Euler's."""
    method = "euler" if not j.sigma and euler_last or not i.c else method
    places, rows, weights = RUNGE_KUTTA.get(method, method)
    if not places and not time:
        return mix((j.alpha, j.sigma), d)
    clock = lambda l: l._replace(c=1.0, p=l.t) if time else l
    i, j, slopes = clock(i), clock(j), [slope_of(process, d, i, time)]
    # x at level m: c_m (x/c_i + (p_m - p_i) (weighted slopes))
    along = lambda m, row: mix((m.c / i.c, *(m.c * (m.p - i.p) * w for w in row)), (x, *slopes))
    for place, row in zip(places, rows):
        t, p = (whole(process, i.t + place * (j.t - i.t)), None) if even == "t" else (None, i.p + place * (j.p - i.p))
        m = j if place == 1 else clock(at(process, t=t, p=p))
        slopes.append(slope_of(process, denoise(along(m, row), m.t), m, time))
    return along(j, weights)

def runge_kutta(denoise, x, times, process, noise, method, time=False, euler_last=True, **churn):
    for i, j in steps(process, times):
        x, i = churned(process, x, i, len(times) - 1, noise, **churn)
        d, even = denoise(x, i.t), "t" if time else "p"
        yield (x := runge_kutta_step(denoise, process, x, i, j, d, method, even, time, euler_last))

def half_lambda(denoise, x, times, process, noise, form, eta=0.0, noisy_middle=False, **churn):
    """The output half-way in lambda is used for the whole step: singlestep order 2 with r1 = 1/2."""
    for i, j in steps(process, times):
        x, i = churned(process, x, i, len(times) - 1, noise, **churn)
        k, d, now = beneath(i, j, eta), denoise(x, i.t), form if i.alpha else "x0"   # pure noise: DDIM's step
        if j.sigma and i.alpha:
            m = at(process, lam=(i.lam + (j if noisy_middle else k).lam) / 2)
            km = beneath(i, m, eta) if noisy_middle else m
            xm = exponential_step(x, i, km, [(i.lam, getattr(d, now))], now)
            d = denoise(renoised(xm, km, m, noise(x.shape)) if noisy_middle else xm, m.t)
        x = exponential_step(x, i, k, [(i.lam, getattr(d, now))], now)
        yield (x := renoised(x, k, j, noise(x.shape)) if eta and j.sigma else x)

def singlestep(denoise, x, times, process, noise, order=2, form="x0", eta=0.0, slope="paper", quadratic=False,
               published=""):
    """DPM-Solver(++) singlestep, 2206.00927, algorithms 1-2: blocks of `order` grid points, each reached from the
    block's start with all outputs since (the third by a line through two of them, or, `quadratic`, by all three)."""
    grid = levels(process, times)
    sizes = [min(order, len(grid) - 1 - k) for k in range(0, len(grid) - 1, order)]
    if sizes[-1] > 1 and not grid[-1].sigma:         # one step into the clean image
        sizes[-1:] = [sizes[-1] - 1, 1]
    for size in sizes:
        i, start, nodes, now = grid[0], x, [], form if grid[0].alpha else "x0"
        for j in grid[1 : size + 1]:
            nodes, grid = [*nodes, (grid[0].lam, getattr(denoise(x, grid[0].t), now))], grid[1:]
            used = nodes if quadratic or len(nodes) < 3 else [nodes[0], nodes[-1]]
            how = "exact" if len(nodes) == 3 else slope if slope != "paper" else "half" if size == 2 else "exact"
            yield (x := exponential_step(start, i, j, used, now, eta, how, published, noise(x.shape) if eta else None))

# One network call a step, with memory of earlier ones.
def adams(denoise, x, times, process, noise, order=4, coordinate="index", warm_up=None):
    """Adams-Bashforth on the slopes dy/dp, extrapolated by polynomials in p, or in the step's index as if steps were
    even. warm_up: a Runge-Kutta method for the first order - 1 steps ("rk4"), or for the first one ("heun")."""
    memory = []
    for n, (i, j) in enumerate(steps(process, times)):
        d, place = denoise(x, i.t), i.p if coordinate == "p" else n
        memory = [(place, slope_of(process, d, i)), *(m for m in memory if math.isfinite(m[0]))][:order]
        if not i.c:                                  # infinite p: DDIM's step
            x = mix((j.alpha, j.sigma), d)
        elif warm_up == "rk4" and n < order - 1 or warm_up == "heun" and n == 0:
            x = runge_kutta_step(denoise, process, x, i, j, d, warm_up, "t" if warm_up == "rk4" else "p")
        else:
            places, slopes = zip(*memory)
            end, scale = (j.p, 1) if coordinate == "p" else (n + 1, j.p - i.p)
            w = lagrange_integrals(places, place, end)
            x = mix((j.c / i.c, *(j.c * scale * v for v in w)), (x, *slopes))
        yield x

def multistep(denoise, x, times, process, noise, order=2, corrector=0, form="x0", tau=0.0, slope="half", published="",
              lower_final=None, uncorrected=()):
    """The multistep family of `exponential_step`: DPM-Solver(++), DEIS, UniPC and SA-Solver are instances.
    order: outputs used (one number, or one a step). corrector: outputs used, the new one among them, to redo each step
    once the network has seen its end, at no further call; uncorrected: steps without. tau: of the SDE, a number or a
    function of t. lower_final: lower the order towards the end (None: in fewer than 15 steps)."""
    grid, nodes, redo = steps(process, times), [], None
    lower_final = len(grid) < 15 if lower_final is None else lower_final
    for n, (i, j) in enumerate(grid):
        d, now = denoise(x, i.t), form if i.alpha else "x0"   # pure noise: DDIM's step, and nothing to remember
        new = (i.lam, getattr(d, now))
        if redo and n - 1 not in uncorrected:
            x, a, b, (old, *older), size, options = redo
            x = exponential_step(x, a, b, [old, new, *older][:size] if size > 1 else [new], **options)
        nodes = [new, *(m for m in nodes if math.isfinite(m[0]))]
        left = len(grid) - n if lower_final else len(nodes)
        eta, z = (tau(i.t) if callable(tau) else tau) ** 2, noise(x.shape) if tau else None
        options = dict(form=now, eta=eta, slope=slope, published=published, z=z)
        if corrector:
            redo = (x, i, j, nodes, min(corrector, left + 1), options)
        size = min(order if isinstance(order, int) else order[n], left)
        yield (x := exponential_step(x, i, j, nodes[:size], **options))

def unipc(denoise, x, times, process, noise, order=2, form="x0", bh="bh2", **options):
    """UniPC, 2302.04867: the multistep predictor, and a corrector one order higher that costs no network call."""
    slope = choose({"bh1": "linear", "bh2": "half"}, bh, "B(h)")
    options = {"corrector": order + 1, "lower_final": True, **options}
    yield from multistep(denoise, x, times, process, noise, order, form=form, slope=slope, **options)

def sa_solver(denoise, x, times, process, noise, order=2, corrector=2, tau=1.0, form="x0", lower_final=True):
    """SA-Solver, 2309.05019: stochastic Adams predictor and corrector for an SDE whose noise tau(t) is a choice."""
    slope = "linear" if form == "x0" else "exact"
    yield from multistep(denoise, x, times, process, noise, order, corrector, form, tau, slope, lower_final=lower_final)

DIFFUSIONS: dict[str, Callable] = {                  # w(t) of SiT's SDE, 2401.08740, section 3.4; n its `norm`
    "sigma": lambda process, i, n: n * i.sigma, "linear": lambda process, i, n: n * i.t,
    "sbdm": lambda process, i, n: n * process.half_g2(double(i.t)).item(), "constant": lambda process, i, n: n,
    "decreasing": lambda process, i, n: (1 - n * math.cos(math.pi * i.t)) ** 2 / 4,
    "increasing-decreasing": lambda process, i, n: n * math.sin(math.pi * i.t) ** 2,
}

def sit_sde(denoise, x, times, process, noise, diffusion="sigma", norm=1.0, method="euler", last="mean"):
    """SiT's SDE sampler, 2401.08740: drift velocity - w score, noise sqrt(2 w dt), any diffusion w(t) >= 0 (half the
    paper's). last: into the clean image by "mean" (the drift alone), "tweedie" (x0) or "ode" (the velocity alone)."""
    w, (*grid, (i, j)) = choose(DIFFUSIONS, diffusion, "diffusion"), steps(process, times)
    def drift(x, i, score=1.0):                      # towards the data
        d = denoise(x, i.t)
        return d.x0, -velocity(process, d, i.t) - score * w(process, i, norm) / i.sigma * d.eps
    for a, b in grid:
        dt = a.t - b.t
        x_hat = x + math.sqrt(2 * w(process, a, norm) * dt) * noise(x.shape)
        k1 = drift(x if method == "euler" else x_hat, a)[1]
        k = k1 if method == "euler" else (k1 + drift(x_hat + dt * k1, b)[1]) / 2
        yield (x := x_hat + dt * k)
    x0, k1 = drift(x, i, score=float(last != "ode"))
    yield x0 if last == "tweedie" else x + (i.t - j.t) * k1

def predictor_corrector(denoise, x, times, process, noise, predictor="reverse", corrector="langevin", corrections=1,
                        snr=0.16):
    """Predictor-corrector sampling of the reverse SDE, 2011.13456, algorithms 1-5. predictor: "reverse" (diffusion),
    "ancestral", "euler" (Euler-Maruyama), at last without noise. corrector, `corrections` times: "langevin", "ald"."""
    score = lambda x, i: -denoise(x, i.t).eps / i.sigma
    length = lambda v: v.flatten(1).norm(dim=1).mean()           # over the batch, as published
    for i, j in (grid := steps(process, times)):
        r, g2 = process.kernel(i, j, euler=predictor == "euler")
        for _ in range(corrections if corrector else 0):
            g, z = score(x, i), noise(x.shape)
            size = 2 * (r * (snr * length(z) / length(g) if corrector == "langevin" else snr * i.sigma)) ** 2
            x = x + size * g + (2 * size) ** 0.5 * z
        g, z = score(x, i), noise(x.shape)
        x = (x + g2 * g) / r if predictor == "ancestral" else (2 - r) * x + g2 * g
        if j.t != grid[-1][1].t:
            x = x + math.sqrt(g2 * (1 - g2 / i.sigma**2 if predictor == "ancestral" and process.exploding else 1)) * z
        yield x

def lcm(denoise, x, times, process, noise, scaling=10.0, s_min=0.0):
    """Latent consistency models, 2310.04378, algorithm 3: x0, mixed with x by the boundary condition, then noise again.
    scaling: of its time; None: no such condition (consistency models, 2303.01469, algorithm 1: noise above s_min)."""
    for i, j in steps(process, times):
        x0 = denoise(x, i.t).x0
        if scaling is not None:
            t = scaling * float(process.network_time(double(max(i.t, 0.0))))
            x0 = t / math.sqrt(t * t + 0.25) * x0 + 0.25 / (t * t + 0.25) * x
        yield (x := renoised(x0, Level(0, 1.0, s_min, 0), j, noise(x.shape)) if j.sigma else x0)


# ------------------------------------------------------------------------------------------- likelihood, adaptive steps

DORMAND_PRINCE = (                                   # places, rows, and the difference of the orders 5 and 4
    (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    ((1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9), (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
     (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
     (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
    (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)

def dormand_prince(f, y, t, end, rtol=1e-5, atol=1e-5):
    """dy/dt = f(t, y) from t to end by the adaptive Runge-Kutta method of order 5(4) (RK45, dopri5)."""
    h, slopes, (places, rows, difference) = (end - t) / 100, [f(t, y)], DORMAND_PRINCE
    while abs(end - t) > 1e-12 * abs(h):
        h = math.copysign(min(abs(h), abs(end - t)), end - t)
        for place, row in zip(places, rows):
            new = y + h * mix(row, slopes)
            slopes.append(f(t + place * h, new))
        error = (h * mix(difference, slopes) / (atol + rtol * torch.maximum(y.abs(), new.abs()))).pow(2).mean().sqrt()
        t, y, slopes = (t + h, new, slopes[-1:]) if error < 1 else (t, y, slopes[:1])
        h *= min(10.0, max(0.2, 0.9 * max(error.item(), 1e-10) ** -0.2))
    return y

def rk45(denoise, x, times, process, noise, rtol=1e-5, atol=1e-5):
    """The probability-flow ODE by an adaptive Runge-Kutta method of order 5(4), 2011.13456, section 4.3."""
    for i, j in steps(process, times):
        slope = lambda t, x: velocity(process, denoise(x, t), t)
        x = dormand_prince(slope, x, i.t, j.t if j.sigma else process.t_least, rtol, atol)
        yield (x := x if j.sigma else denoise(x, process.t_least).x0)

def log_likelihood(process, denoise, x0, probe=None, rtol=1e-5, atol=1e-5):
    """log p(x0), (B,) in nats, and the latent z: the probability-flow ODE with its divergence, 2011.13456, eq. 39.
    probe: random signs like x0 (Hutchinson's estimate); None: the exact divergence, D backward passes. Bits per
    dimension of 8-bit data in [-1, 1]: -log p/(D ln 2) + 7."""
    def f(t, y):
        with torch.enable_grad():
            x = y[:, :-1].reshape(x0.shape).detach().requires_grad_()
            v = velocity(process, denoise(x, t), t)
            back = lambda out: torch.autograd.grad(out.sum(), x, retain_graph=True)[0].flatten(1)
            divergence = ((back(v * probe) * probe.flatten(1)).sum(1) if probe is not None else
                          sum(back(column)[:, k] for k, column in enumerate(v.flatten(1).unbind(1))))
        return torch.cat([v.detach().flatten(1), divergence[:, None]], 1)
    y = torch.cat([x0.flatten(1), x0.new_zeros(len(x0), 1)], 1)
    y = dormand_prince(f, y, process.t_least, process.t_noisy, rtol, atol)
    z, std = y[:, :-1], process.sigma(double(process.t_noisy)).item()
    return y[:, -1] - 0.5 * (z**2 / std**2 + math.log(2 * math.pi * std**2)).sum(1), z.reshape(x0.shape)

def instance(rule, line, **fixed):
    """A sampler that is `rule` with some options fixed (as defaults); line: what it is."""
    sampler = partial(rule, **fixed)
    sampler.__doc__ = line
    return sampler

SAMPLERS: dict[str, Callable] = {
    "ddpm": ddpm, "ddim-inversion": ddim_inversion,
    "ddim": instance(down_and_up, "Denoising Diffusion Implicit Models, 2010.02502, eq. 12: eta 0 ODE, eta 1 DDPM"),
    "euler-ancestral": instance(down_and_up, "Euler with renewed noise, k-diffusion: DDIM with eta = 1", eta=1.0),
    "flow-ancestral": instance(down_and_up, "Euler ancestral for flows, LTX-Video: down to p_j (1 + eta (p_j/p_i - 1))",
                               eta=1.0, under=lambda process, i, j, e: at(process, p=j.p * (1 + (j.p / i.p - 1) * e))),
    "tcd": instance(down_and_up, "Trajectory consistency distillation, 2402.19159: DDIM to (1 - eta) t_j, noise to t_j",
                    eta=0.3, under=lambda process, i, j, eta: at(process, t=whole(process, (1 - eta) * j.t))),
    "euler": instance(runge_kutta, "Euler for the ODE of x/alpha against sigma/alpha, 2206.00364", method="euler"),
    "heun": instance(runge_kutta, "Heun's method, order 2: slopes of both ends, 2206.00364", method="heun"),
    "edm": instance(runge_kutta, "EDM's stochastic sampler: new noise before each Heun step, 2206.00364, algorithm 2",
                    method="heun", s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003),
    "midpoint": instance(runge_kutta, "The midpoint method, order 2, for the same ODE", method="midpoint"),
    "rk4": instance(runge_kutta, "The classical Runge-Kutta method, order 4, four network calls a step", method="rk4"),
    "sit-ode": instance(runge_kutta, "SiT's ODE sampler, 2401.08740: Heun in time itself", method="heun", time=True),
    "rk45": rk45,
    "dpm2": instance(half_lambda, "DPM-Solver-2, 2206.00927, algorithm 1, order 2 (KDPM2)", form="eps"),
    "dpm2-ancestral": instance(half_lambda, "DPM-Solver-2 with renewed noise, k-diffusion", form="eps", eta=1.0),
    "dpmpp-2s": instance(half_lambda, "DPM-Solver++(2S), 2211.01095, algorithm 1: as dpm2 with x0 for eps", form="x0"),
    "dpmpp-2s-ancestral": instance(half_lambda, "DPM-Solver++(2S) with renewed noise, k-diffusion", form="x0", eta=1.0),
    "dpmpp-sde": instance(half_lambda, "DPM-Solver++ (SDE), k-diffusion: 2S whose middle point has noise of its own",
                          form="x0", eta=1.0, noisy_middle=True),
    "dpm-solver": instance(singlestep, "DPM-Solver-3, 2206.00927: blocks of 3 points, on eps", form="eps", order=3),
    "dpmpp-singlestep": instance(singlestep, "DPM-Solver++ singlestep, 2211.01095: blocks of 2 points, on x0"),
    "lms": instance(adams, "Linear multistep, k-diffusion: Adams-Bashforth 4 on uneven levels", coordinate="p"),
    "pndm": instance(adams, "Pseudo numerical methods, 2202.09778: Adams-Bashforth 4 after 3 of RK4", warm_up="rk4"),
    "plms": instance(adams, "PNDM as in latent diffusion: a Heun step first", warm_up="heun"),
    "ipndm": instance(adams, "Improved PNDM, 2204.13902: no warm-up, the order grows to 4"),
    "dpm-solver-2m": instance(multistep, "DPM-Solver multistep, 2206.00927: on eps, two points", form="eps"),
    "dpmpp-2m": instance(multistep, "DPM-Solver++ (2M), 2211.01095, algorithm 2: on x0, two points"),
    "dpmpp-3m": instance(multistep, "DPM-Solver++ (3M), 2211.01095: on x0, three points", order=3, slope="exact"),
    "dpmpp-2m-sde": instance(multistep, "SDE-DPM-Solver++ (2M), 2211.01095, section 5: noise in each step", tau=1.0),
    "dpmpp-3m-sde": instance(multistep, "SDE-DPM-Solver++ (3M), k-diffusion", order=3, tau=1.0, slope="exact"),
    "deis": instance(multistep, "DEIS, 2204.13902: eps a polynomial in log rho", order=3, form="eps", slope="exact"),
    "unipc": unipc, "sa-solver": sa_solver, "sit-sde": sit_sde, "pc": predictor_corrector, "lcm": lcm,
}


# --------------------------------------------------------------------------------------------- the command `likelihood`

def likelihood_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run, or a checkpoint file in it")
    p.add_argument("--n", type=int, default=64, help="held-out images (default: %(default)s)")
    p.add_argument("--chain-steps", type=int, metavar="N", help="of a chain: a sub-grid of so many (default: all)")
    p.add_argument("--tolerance", type=float, default=1e-3, help="of the adaptive solver (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    p.add_argument("--batch", type=int, default=64, help="images at once (default: %(default)s)")
    p.add_argument("--weights", choices=["ema", "model"], default="ema",
                   help="averaged or last weights (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def likelihood(args):
    """Bits per dimension of held-out images: of a chain the variational bound, else the probability-flow ODE."""
    if not 0 < args.tolerance < 1:
        raise ValueError(f"--tolerance {args.tolerance}: choose a number between 0 and 1, such as 1e-3")
    process, objective = args.run.objective.process, args.run.objective
    held_out, generator = args.run.data("test"), torch.Generator().manual_seed(args.seed)
    noise = lambda shape: torch.randn(shape, generator=generator).to(args.device)
    chain, bits = isinstance(process, Discrete), []
    for rows in tqdm(torch.arange(min(args.n, len(held_out))).split(args.batch), desc="images", unit=" batches"):
        x, y = held_out.gather(rows)
        denoise = process.denoiser(objective.model, y if objective.num_classes else None)
        if chain:
            with torch.no_grad():
                times = process.times(args.chain_steps) if args.chain_steps else None
                bits.append(process.bits_per_dim(denoise, x, noise, times)["total"])
        else:
            level = ((x + 1) * 127.5).round() + torch.rand(x.shape, generator=generator).to(args.device)  # dequantised
            log_p, _ = log_likelihood(process, denoise, level / 128 - 1, noise(x.shape).sign(), args.tolerance,
                                      args.tolerance)
            bits.append(7 - log_p / (x[0].numel() * math.log(2)))
    bits = torch.cat(bits)
    print(f"{bits.mean():.3f} bits per dimension (+- {bits.std() / len(bits) ** 0.5:.3f}) on {len(bits)} held-out "
          f"images: {'the variational bound' if chain else 'the ODE, with a random estimate of its divergence'}")
