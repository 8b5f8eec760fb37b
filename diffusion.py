"""The diffusion core: noise schedules, processes, what a network predicts, losses, bounds. It knows no architecture.

A `Process` is a path from data to noise, x_t = alpha(t) x0 + sigma(t) eps, what the network predicts on it and how it
is trained: `process.loss(model, x0, y, t, noise)` trains, `process.denoiser(model, y)` reads the network as a
function `denoise(x_t, t) -> Denoised`. `guidance.py` turns denoisers into a denoiser, `samplers.py` walks from noise
to an image.

    symbol            here            meaning
    x_0, x_t          x0, xt          clean image, noisy image at time t, (B, C, H, W)
    epsilon           eps             the Gaussian noise in x_t
    alpha_t, sigma_t  alpha, sigma    x_t = alpha_t x_0 + sigma_t eps
    alpha_bar         alpha_bar       alpha^2 of a discrete chain, whose sigma^2 is 1 - alpha_bar
    s                 s               noise level sigma/alpha: the standard deviation of the noise in x_t / alpha_t
    lambda            lam             log(alpha/sigma) = -log s, half the log signal-to-noise ratio
    SNR               snr             (alpha/sigma)^2"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from tqdm import tqdm

import runs


def expand(v, x):
    """A number as it is; a number per sample, (B,), shaped to multiply x (B, ...) in x's own dtype."""
    if not isinstance(v, torch.Tensor):
        return v
    return v.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))


def mix(a, x, b, y):
    """a x + b y in as few passes over memory as there are; a and b: numbers, or (B,), one for each sample."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return expand(a, x) * x + expand(b, y) * y
    if a == 0 or b == 0:
        w, z = (b, y) if a == 0 else (a, x)
        return z if w == 1 else w * z
    if a == 1:
        return torch.add(x, y, alpha=b)
    if abs(a + b - 1) < 1e-14 and x.dtype == y.dtype:
        return torch.lerp(y, x, a)
    return (a * x).add_(y, alpha=b)


def single(x):
    """x in float32 at least: images, states and what is read of a network are never half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_time(t, x):
    """A time (number or (B,)) as (B,) for x: float64 beside float64, else float32 (half cannot count to 1000)."""
    return torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device).expand(len(x))


def flat_mean(x):
    """(B, ...) -> (B,), the mean of each sample."""
    return x.flatten(1).mean(1)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def choose(table, entry, what):
    """The entry of this name in a registry. A callable (an entry, perhaps with its options bound) passes as it is."""
    if callable(entry):
        return entry
    if entry not in table:
        raise ValueError(f"unknown {what} {entry!r}: choose one of {', '.join(table)}")
    return table[entry]


def require(condition, sentence):
    if not condition:
        raise ValueError(sentence)


# ------------------------------------------------------------------------------------------------------------ schedules
# Tables of beta_t, t = 0 .. T-1, float64.


def betas_of(alpha_bar, largest=1.0):
    """The table with these alpha_bar (T,); a beta is at most `largest` (2102.09672, section 3.2)."""
    before = torch.cat([double(1), alpha_bar[:-1]])
    return (1 - alpha_bar / before).clamp(max=largest)


def betas_along(alpha_bar, T):
    """The table of T steps along a curve alpha_bar(u), u in [0, 1]; no beta above 0.999, so that none is 1."""
    curve = alpha_bar(torch.arange(T + 1, dtype=torch.float64) / T)
    return betas_of(curve[1:] / curve[0], largest=0.999)


def linspace(T, start, end):
    return torch.linspace(start, end, T, dtype=torch.float64)


def linear_betas(T=1000, start=1e-4, end=0.02):
    """beta_t even from 1e-4 to 0.02: DDPM, 2006.11239, section 4; times 1000/T, so that any T ends in the same noise.
    """
    return linspace(T, start * 1000 / T, end * 1000 / T)


def cosine_betas(T=1000, offset=0.008):
    """alpha_bar(u) = cos^2(pi/2 (u + offset) / (1 + offset)): improved DDPM, 2102.09672, eq. 17."""
    return betas_along(lambda u: torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2, T)


def scaled_linear_betas(T=1000, start=0.00085, end=0.012):
    """sqrt(beta_t) even: latent diffusion, 2112.10752."""
    return linspace(T, start**0.5, end**0.5) ** 2


def sigmoid_betas(T=1000, start=1e-4, end=0.02):
    """beta_t a sigmoid of time over [-6, 6]: GeoDiff, 2203.02923."""
    return torch.sigmoid(linspace(T, -6, 6)) * (end - start) + start


def laplace_betas(T=1000):
    """A Laplace density of log SNR, 2407.03297. Published code puts sqrt(SNR/(1 + SNR)), which is alpha, for alpha_bar.
    """

    def alpha_bar(u):
        log_snr = -0.5 * torch.sign(0.5 - u) * torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)
        return torch.sigmoid(log_snr).sqrt()

    return betas_along(alpha_bar, T)


def exp_betas(T=1000, rate=12.0):
    """alpha_bar(u) = e^(-12 u)."""
    return betas_along(lambda u: torch.exp(-rate * u), T)


def warmup_betas(T=1000, start=1e-4, end=0.02, share=0.1):
    """beta_t even over the first share of the steps, then constant (the DDPM code's warmup10 and warmup50)."""
    n = int(T * share)
    return torch.cat([linspace(n, start, end), double(end).expand(T - n)])


def warmup50_betas(T=1000, start=1e-4, end=0.02):
    """beta_t even over the first half, then constant (DDPM code)."""
    return warmup_betas(T, start, end, share=0.5)


def quad_betas(T=1000, start=1e-4, end=0.02):
    """sqrt(beta_t) even between DDPM's ends (DDPM code)."""
    return scaled_linear_betas(T, start, end)


def const_betas(T=1000, start=0.02, end=0.02):
    """beta_t constant (DDPM code)."""
    return double(end).expand(T).clone()


def jsd_betas(T=1000, start=None, end=None):
    """beta_t = 1/(T - t) (DDPM code)."""
    return 1 / linspace(T, T, 1)


BETAS: dict[str, Callable] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "scaled-linear": scaled_linear_betas,
    "sigmoid": sigmoid_betas,
    "laplace": laplace_betas,
    "exp": exp_betas,
    "quad": quad_betas,
    "warmup10": warmup_betas,
    "warmup50": warmup50_betas,
    "const": const_betas,
    "jsd": jsd_betas,
}


def zero_terminal_snr(betas):
    """The table moved and stretched in sqrt(alpha_bar) to end in pure noise, 2305.08891, algorithm 1."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    return betas_of(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def shifted_betas(betas, shift):
    """The table with every sigma/alpha multiplied by `shift` (simple diffusion, 2301.11093, section 3.1)."""
    alpha_bar = torch.cumprod(1 - betas, 0)
    return betas_of(alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar)))


def resolution_shift(tokens, low=(256, 0.5), high=(4096, 1.15)):
    """The `shift` for an image of so many tokens: exp(mu), mu linear in them (2403.03206, section 5.3.2; Flux)."""
    return math.exp(low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0]))


def respaced(T, spec):
    """The steps that a shorter chain keeps, ascending (improved DDPM's `timestep_respacing`).
    spec: "50" = 50 steps at a fractional stride, both ends kept; "10,15,20" = T cut into sections, so many steps in
    each; "ddim50" = the integer stride that gives exactly 50 steps. Raises ValueError if T cannot be cut so."""
    if spec.startswith("ddim"):
        for stride in range(1, T):
            if len(range(0, T, stride)) == int(spec[4:]):
                return list(range(0, T, stride))
        raise ValueError(f"respacing {spec!r}: no integer stride cuts {T} steps into exactly {spec[4:]}")
    kept, start, counts = [], 0, [int(c) for c in spec.split(",")]
    for k, count in enumerate(counts):
        size = T // len(counts) + (k < T % len(counts))
        require(0 <= count <= size, f"respacing {spec!r}: cannot take {count} steps out of a section of {size}")
        place = 0.0
        for _ in range(count):                       # the place is accumulated, as published: it decides the ties
            kept.append(start + round(place))
            place += (size - 1) / max(count - 1, 1)
        start += size
    require(kept, f"respacing {spec!r} keeps no step")
    return kept


# ---------------------------------------------------------------------------------------------------------- predictions
# What a network may predict: m = p x0 + q eps. prediction(process, t, alpha, sigma) -> (p, q).


class Denoised:
    """What a denoiser says of x_t = alpha x0 + sigma eps: the image `x0` and the noise `eps`, (B, C, H, W), in
    float32 at least. Each is a tensor, or a function that is called when it is first asked for: most samplers want
    only one.

    variance: None, or the learned v of improved DDPM, eq. 15: the place of a reverse step's log-variance between log
    beta~ (v = 0) and log beta (v = 1), whatever that step is. flow: eps - x0 where the network of a straight path
    gives just that, else None."""

    def __init__(self, x0, eps, variance=None, flow=None):
        self.parts, self.variance, self.flow = {"x0": x0, "eps": eps}, variance, flow

    def part(self, name):
        if callable(self.parts[name]):
            self.parts[name] = self.parts[name]()
        return self.parts[name]

    @property
    def x0(self):
        return self.part("x0")

    @property
    def eps(self):
        return self.part("eps")

    def replace(self, **parts):
        """The same with another x0, eps or variance."""
        return Denoised(**{**self.parts, "variance": self.variance, **parts})


def eps_prediction(process, t, alpha, sigma):
    """the noise, 2006.11239"""
    return 0.0, 1.0


def x0_prediction(process, t, alpha, sigma):
    """the clean image"""
    return 1.0, 0.0


def v_prediction(process, t, alpha, sigma):
    """alpha eps - sigma x0, 2202.00512"""
    return -sigma, alpha


def flow_prediction(process, t, alpha, sigma):
    """eps - x0, 2209.03003"""
    return -1.0, 1.0


def score_prediction(process, t, alpha, sigma):
    """the gradient of the log density, -eps/sigma, 2011.13456"""
    return 0.0, -1 / sigma


def velocity_prediction(process, t, alpha, sigma):
    """dx/dt, alpha' x0 + sigma' eps, 2401.08740"""
    *_, d_alpha, d_sigma = process.rates(t)
    return d_alpha, d_sigma


def edm_prediction(process, t, alpha, sigma):
    """F of EDM's preconditioning, x0 = c_skip x_t + c_out F, 2206.00364, eq. 7"""
    scale = (sigma**2 + (process.sigma_data * alpha) ** 2) ** 0.5
    return sigma / (process.sigma_data * scale), -process.sigma_data * alpha / scale


PREDICTIONS: dict[str, Callable] = {
    "eps": eps_prediction,
    "x0": x0_prediction,
    "v": v_prediction,
    "flow": flow_prediction,
    "score": score_prediction,
    "velocity": velocity_prediction,
    "edm": edm_prediction,
}


# ----------------------------------------------------------------------------------------------------------- weightings
# A weighting is a weight on the squared error of eps, a function of SNR; `Process.weight` carries it over to what the
# network predicts. So one name is one objective, whatever the prediction.


def snr_weighting(snr):
    """SNR on x0: the plain loss of eps, 2006.11239, eq. 14."""
    return torch.ones_like(snr)


def truncated_snr(snr):
    """max(SNR, 1) on x0, progressive distillation, 2202.00512."""
    return snr.clamp(min=1) / snr


def min_snr(snr, *, gamma=5.0):
    """min(SNR, gamma) on x0, 2303.09556."""
    return snr.clamp(max=gamma) / snr


def soft_min_snr(snr, *, gamma=4.0):
    """gamma SNR/(gamma + SNR) on x0: min-SNR, rounded, 2401.11605."""
    return gamma / (gamma + snr)


def sigmoid_weighting(snr, *, bias=2.0):
    """sigmoid(bias - log SNR) on eps, 2303.00848."""
    return torch.sigmoid(bias - snr.log())


def p2(snr, *, k=1.0, gamma=1.0):
    """1/(k + SNR)^gamma on eps: perception prioritized, 2204.00227."""
    return (k + snr) ** -gamma


def v_weighting(snr):
    """The plain loss of v, whatever is predicted, 2202.00512."""
    return 1 + 1 / snr


def flow_weighting(snr):
    """The plain loss of eps - x0, whatever is predicted, 2209.03003."""
    return (1 + snr**-0.5) ** 2


def edm_weighting(snr, *, sigma_data=0.5):
    """The plain loss of EDM's F, whatever is predicted, 2206.00364."""
    return 1 + 1 / (snr * sigma_data**2)


def cosmap(snr):
    """2/(pi (1 - 2t + 2t^2)) on the flow, t the time of a straight path, 2403.03206, section 3.1."""
    t = 1 / (1 + snr.sqrt())
    return 2 / (math.pi * (1 - 2 * t + 2 * t**2)) * flow_weighting(snr)


def sigma_sqrt(snr):
    """t^-2 on the flow, t the time of a straight path: detail above all, 2403.03206."""
    t = 1 / (1 + snr.sqrt())
    return t**-2 * flow_weighting(snr)


def likelihood_weighting(snr, process, t):
    """-d lambda/dt on eps: the variational bound in continuous time, 2101.09258."""
    _, g = process.sde(t)
    return g**2 / (2 * process.sigma(t) ** 2)


def velocity_weighting(snr, process, t):
    """The plain loss of dx/dt, whatever is predicted, SiT, 2401.08740."""
    _, g = process.sde(t)
    return (g**2 / (2 * process.sigma(t))) ** 2


WEIGHTINGS: dict[str, Callable] = {
    "snr": snr_weighting,
    "truncated-snr": truncated_snr,
    "min-snr": min_snr,
    "soft-min-snr": soft_min_snr,
    "sigmoid": sigmoid_weighting,
    "p2": p2,
    "v": v_weighting,
    "flow": flow_weighting,
    "edm": edm_weighting,
    "cosmap": cosmap,
    "sigma-sqrt": sigma_sqrt,
    "likelihood": likelihood_weighting,
    "velocity": velocity_weighting,
}


# ------------------------------------------------------------------------------------------ densities of training times
# density(process, u) -> times (B,) for uniform numbers u (B,) in [0, 1): `process.at_share` turns a share of the
# range of times into a time, `process.time` a noise level s = sigma/alpha.


def normal_quantile(u):
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


def uniform_times(process, u):
    """Every time alike."""
    return process.at_share(u)


def logit_normal(process, u, *, mean=0.0, std=1.0):
    """The middle of the path: t = sigmoid(N(mean, std^2)), 2403.03206, eq. 19."""
    return process.at_share(torch.sigmoid(mean + std * normal_quantile(u)))


def mode(process, u, *, scale=1.29):
    """The middle with heavy tails, 2403.03206, eq. 20."""
    return process.at_share(1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u))


def log_normal(process, u, *, mean=-1.2, std=1.2):
    """log s ~ N(mean, std^2), EDM, 2206.00364, table 1."""
    return process.time(torch.exp(mean + std * normal_quantile(u)))


def log_uniform(process, u, *, low=0.002, high=80.0):
    """Every scale of noise alike: log s even between log low and log high."""
    return process.time(low * (high / low) ** u)


def log_logistic(process, u, *, mean=0.0, scale=0.5, low=0.01, high=80.0):
    """log s logistic with this mean and scale, between low and high (k-diffusion)."""
    share = torch.sigmoid((torch.log(double(low, high)) - mean) / scale).to(u)
    u = share[0] + u * (share[1] - share[0])
    return process.time(torch.exp(mean + scale * torch.logit(u)))


def v_diffusion(process, u, *, sigma_data=0.5, low=1e-3, high=1e3):
    """s = sigma_data tan(pi/2 u), between low and high: even angles of v (k-diffusion; 2202.00512)."""
    share = (2 / math.pi * torch.atan(double(low, high) / sigma_data)).to(u)
    return process.time(sigma_data * torch.tan(math.pi / 2 * (share[0] + u * (share[1] - share[0]))))


def cosine_interpolated(process, u, *, image=64, noise_low=32, noise_high=64, sigma_data=0.5, low=1e-3, high=1e3):
    """The cosine schedule, log s moved from an image of noise_low pixels to one of noise_high as the noise falls
    (simple diffusion, 2301.11093, eq. 7; k-diffusion)."""

    def log_s(size):                                 # even angles of v, for noise as an image of this size shows it
        scale = size / image / sigma_data
        ends = torch.atan(scale * double(high, low)).to(u)
        return torch.log(torch.tan(torch.lerp(ends[0], ends[1], u)) / scale)

    return process.time(torch.exp(torch.lerp(log_s(noise_low), log_s(noise_high), u)))


DENSITIES: dict[str, Callable] = {
    "uniform": uniform_times,
    "logit-normal": logit_normal,
    "mode": mode,
    "log-normal": log_normal,
    "log-uniform": log_uniform,
    "log-logistic": log_logistic,
    "v-diffusion": v_diffusion,
    "cosine-interpolated": cosine_interpolated,
}


# ------------------------------------------------------------------------------------------------------------ processes


def joined(*lists):
    """The signature with the parameters of several lists, a name as it first appears; *args and **options stand for
    those that follow."""
    parameters = {}
    for p in (p for parameters in lists for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)):
        parameters.setdefault(p.name, p)
    return inspect.Signature(sorted(parameters.values(), key=lambda p: p.kind))


class Process:
    """A path x_t = alpha(t) x0 + sigma(t) eps, what the network predicts on it, and how it is trained.

    prediction: a name in `PREDICTIONS` (None: the process's own). weighting: None (the plain squared error of the
    prediction), or an entry of `WEIGHTINGS`; density: of the training times, an entry of `DENSITIES` (None: the
    process's own); each by its name or as a function with its options bound. shift: multiplies sigma/alpha of every
    time, in training and sampling (2403.03206, eq. 23). sigma_data: the standard deviation of the data, for EDM's
    scalings. A subclass gives alpha, sigma, `time_of` (the inverse of sigma/alpha) and its times: t_clean, the clean
    image; from t_first it is trained, to t_least sampled; t_noisy is noise. Raises ValueError for what cannot be."""

    t_clean, t_first, t_least, t_noisy = 0.0, 0.0, 1e-3, 1.0
    grid, density, own_prediction = "uniform", "uniform", "eps"
    straight, exploding, learned_variance = False, False, False

    def __init__(self, prediction=None, *, weighting=None, density=None, shift=1.0, sigma_data=0.5):
        self.prediction = prediction or self.own_prediction
        self.shift, self.sigma_data = shift, sigma_data
        self.predict = choose(PREDICTIONS, self.prediction, "prediction")
        self.draw_times = choose(DENSITIES, density or self.density, "time density")
        self.weighting = None if weighting is None else choose(WEIGHTINGS, weighting, "weighting")
        require(0 < shift < math.inf, f"shift {shift}: it multiplies sigma/alpha, so it must be above 0")
        require(0 < sigma_data < math.inf, f"sigma_data {sigma_data}: a standard deviation must be above 0")

    def __init_subclass__(cls):
        """A subclass's options are its own and those of what it is built on, in its signature too."""
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = joined(own, inspect.signature(cls.__mro__[1]).parameters.values())

    # the path

    def path(self, t):
        """alpha and sigma at time t: (B,) each, or two numbers for a number."""
        if isinstance(t, torch.Tensor):
            return self.alpha(t), self.sigma(t)
        alpha, sigma = self.path(double(t))
        return alpha.item(), sigma.item()

    def rates(self, t):
        """alpha(t), sigma(t), alpha'(t), sigma'(t): (B,) each, or numbers for a number."""
        if not isinstance(t, torch.Tensor):
            return [v.item() for v in self.rates(double(t))]
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            values = self.alpha(t), self.sigma(t)
            slopes = [torch.autograd.grad(v.sum(), t, retain_graph=True)[0] for v in values]
        return [v.detach() for v in values] + slopes

    def sde(self, t):
        """f(t) and g(t) of the SDE dx = f x dt + g dW that has these marginals (2011.13456)."""
        alpha, sigma, d_alpha, d_sigma = self.rates(t)
        f = d_alpha / alpha
        return f, (2 * (sigma * d_sigma - f * sigma**2)) ** 0.5

    def time(self, s):
        """The time of noise level s = sigma/alpha, within the process's range."""
        return self.time_of(torch.as_tensor(s)).clamp(self.t_clean, self.t_noisy)

    def shifted(self, t):
        """The time whose sigma/alpha is `shift` times that of t."""
        return t if self.shift == 1 else self.time(self.shift * self.sigma(t) / self.alpha(t))

    def noised(self, x0, noise, t):
        """x_t = alpha(t) x0 + sigma(t) eps."""
        alpha, sigma = self.path(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * noise

    def ode_scale(self, alpha, sigma):
        """c of the coordinates y = x_t/c and p = sigma/c in which the probability-flow ODE is straightest. c = alpha:
        p = sigma/alpha, dy/dp = eps (2206.00364). On a straight path c = alpha + sigma = 1: p = t, dy/dp = eps - x0,
        which is finite at pure noise too."""
        return alpha + sigma if self.straight else alpha

    def p(self, t):
        """The ODE's own clock p = sigma/c, see `ode_scale`."""
        alpha, sigma = self.path(t)
        return sigma / self.ode_scale(alpha, sigma)

    def level_of(self, p):
        """The noise level s = sigma/alpha at p."""
        return p / (1 - p) if self.straight else p

    def slope(self, denoised):
        """dy/dp of the probability-flow ODE, see `ode_scale`."""
        if not self.straight:
            return denoised.eps
        return denoised.eps - denoised.x0 if denoised.flow is None else denoised.flow

    def velocity(self, denoised, t):
        """dx/dt of the probability-flow ODE at time t, alpha' x0 + sigma' eps."""
        *_, d_alpha, d_sigma = self.rates(t)
        return mix(d_alpha, denoised.x0, d_sigma, denoised.eps)

    def transition(self, i, j, first_order=False):
        """r and the variance v of the forward step q(x_i | x_j) = N(r x_j, v) from a level j to the noisier level i (of
        `samplers.py`); first_order: as Euler's method takes it from the SDE."""
        if first_order:
            f, g = self.sde(i.t)
            return 1 + f * (i.t - j.t), g**2 * (i.t - j.t)
        r = i.alpha / j.alpha
        return r, max(0.0, i.sigma**2 - (r * j.sigma) ** 2)

    def known_time(self, t):
        """The time that the network has seen: of a chain the whole step below."""
        return t

    # the network

    def network_time(self, t):
        """What the network is told for time t, (B,): 0 .. 1000, whatever the process."""
        return 1000 * t

    def network_input(self, xt, t):
        """What the network is shown for x_t: x_t itself, or c_in x_t of unit variance (EDM; exploding processes)."""
        if not self.exploding and self.prediction != "edm":
            return xt
        alpha, sigma = self.path(t)
        return xt * expand((sigma**2 + (self.sigma_data * alpha) ** 2) ** -0.5, xt)

    def network(self, model, xt, t, y):
        """The network's output at x_t and t, (B,) or a number, in x_t's dtype."""
        return model(self.network_input(xt, t), self.network_time(batch_time(t, xt)), y).to(xt.dtype)

    def coefficients(self, t):
        """alpha, sigma, p, q: x_t = alpha x0 + sigma eps, and the network predicts m = p x0 + q eps."""
        alpha, sigma = self.path(t)
        return alpha, sigma, *self.predict(self, t, alpha, sigma)

    def target(self, x0, noise, t):
        """What the network should predict at time t, (B, C, H, W)."""
        *_, p, q = self.coefficients(t)
        return mix(p, x0, q, noise)

    def split(self, output):
        """The network's output -> (prediction, v or None); v = (o + 1)/2 of the second half of channels, unbounded."""
        if not self.learned_variance:
            return output, None
        prediction, o = output.chunk(2, dim=1)
        return prediction, (o + 1) / 2

    def denoised(self, output, xt, t):
        """The network's output (B, C, H, W), or (B, 2C, H, W) with learned variance, as a `Denoised`."""
        prediction, v = self.split(output)
        return self.solve(prediction, xt, t, v)

    def solve(self, m, xt, t, variance=None):
        """x0 and eps from the prediction m and x_t:

            [ x_t ]   [ alpha  sigma ] [ x0  ]            [ x0  ]       [  q  -sigma ] [ x_t ]
            [     ] = [              ] [     ] ,  hence   [     ] = 1/d [            ] [     ] ,  d = alpha q - sigma p
            [  m  ]   [   p      q   ] [ eps ]            [ eps ]       [ -p   alpha ] [  m  ]
        """
        alpha, sigma, p, q = self.coefficients(t)
        d = alpha * q - sigma * p
        return Denoised(m if self.prediction == "x0" else lambda: mix(q / d, xt, -sigma / d, m),
                        m if self.prediction == "eps" else lambda: mix(-p / d, xt, alpha / d, m), variance,
                        m if self.straight and self.prediction in ("flow", "velocity") else None)

    def denoiser(self, model, y=None):
        """model(x, t, y) as `denoise(xt, t) -> Denoised`, with y bound; t a number or (B,). r: the time to go to, for
        networks of two times (flow maps), which are called as model(x, t, y, r=r)."""

        def denoise(xt, t, r=None):
            xt = single(xt)
            network = model
            if r is not None and getattr(model, "two_times", False):
                network = partial(model, r=self.network_time(batch_time(r, xt)))
            return self.denoised(self.network(network, xt, t, y), xt, t)

        return denoise

    # training

    def at_share(self, u):
        """The time at a share u in [0, 1) of the range of training times."""
        return self.t_first + (self.t_noisy - self.t_first) * u

    def training_times(self, u):
        """Uniform numbers u (B,) in [0, 1) -> training times (B,), distributed as this process wants them."""
        return self.shifted(self.draw_times(self, u).clamp(self.t_first, self.t_noisy)).to(u.dtype)

    def weight(self, t):
        """The weight of the prediction's squared error, (B,): that of eps, times the square of d eps/d prediction."""
        if self.weighting is None:
            return torch.ones_like(t)
        alpha, sigma, p, q = self.coefficients(t)
        alpha, sigma = alpha.clamp(min=1e-4), sigma.clamp(min=1e-8)
        path = (self, t) if self.weighting in (likelihood_weighting, velocity_weighting) else ()
        return self.weighting((alpha / sigma) ** 2, *path) * (alpha / (alpha * q - sigma * p)) ** 2

    def loss(self, model, x0, y, t, noise):
        """The training loss of each sample: {"loss": (B,), "mse": (B,), ...}, gradients flow to the model.
        x0 (B, C, H, W) in [-1, 1]; y what the model is conditioned on; t (B,) from `training_times`; noise like x0."""
        prediction, _ = self.split(self.network(model, self.noised(x0, noise, t), t, y))
        mse = flat_mean((self.target(x0, noise, t) - prediction) ** 2)
        return {"loss": mse * self.weight(t).to(mse), "mse": mse}


class Discrete(Process):
    """The discrete chain of DDPM, 2006.11239: t = 0 .. T-1 with alpha_bar_t = prod(1 - beta), alpha = sqrt(alpha_bar),
    sigma = sqrt(1 - alpha_bar); t = -1 is the clean image. The network is told t itself.

    betas: (T,) float64; s = sigma/alpha is interpolated linearly between them. shift: built into the table.
    learned_variance: the network's second half of channels is v (see `Denoised`). objective: "hybrid" adds the bound's
    term to train v, in bits per dimension, as published with DiT (2102.09672, eq. 16; "rescaled": times T/1000); "vlb"
    is the bound, T times one term; "kl" one term. fixed_variance: of the bound if none is learned, "large" = beta or
    "small" = beta~."""

    t_clean, t_least, grid = -1.0, 0.0, "spaced"

    def __init__(self, betas, prediction=None, learned_variance=False, objective="hybrid", fixed_variance="large",
                 shift=1.0, **options):
        super().__init__(prediction, shift=shift, **options)
        self.betas, self.shift = betas if shift == 1 else shifted_betas(betas, shift), 1.0
        self.T, self.learned_variance = len(betas), learned_variance
        self.objective, self.fixed_variance, self.t_noisy = objective, fixed_variance, self.T - 1.0
        self.alpha_bar = torch.cat([double(1), torch.cumprod(1 - self.betas, 0)])    # entry t + 1 belongs to t
        self.tables = {}
        require(objective in OBJECTIVES, f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
        require(fixed_variance in ("large", "small"), f"unknown variance {fixed_variance!r}: choose large or small")
        require(self.prediction != "velocity" and self.weighting not in (likelihood_weighting, velocity_weighting),
                "a discrete chain has no dx/dt: take a continuous process (for the bound: objective vlb)")
        require(self.prediction not in ("eps", "score") or self.alpha_bar[-1] > 0,
                "this chain ends in pure noise, where eps says nothing of x0: predict v, x0, flow or edm")

    def table(self, device):
        """alpha_bar on a device, float64 where that knows it (MPS does not)."""
        if device not in self.tables:
            kind = torch.float32 if device.type == "mps" else torch.float64
            self.tables[device] = self.alpha_bar.to(device, kind)
        return self.tables[device]

    def path(self, t):
        if not isinstance(t, torch.Tensor):
            return super().path(t)
        t = t.clamp(-1, self.T - 1)
        table, low = self.table(t.device), t.floor().long()
        part = t - low
        if not part.any():
            alpha_bar = table[low + 1]
            return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        below, above = ((1 / table[(low + k).clamp(max=self.T)] - 1).sqrt() for k in (1, 2))
        s = torch.lerp(below, above, part.to(table.dtype))
        return 1 / (1 + s * s).sqrt(), s / (1 + s * s).sqrt()

    def alpha(self, t):
        return self.path(t)[0]

    def sigma(self, t):
        return self.path(t)[1]

    def known_time(self, t):
        return math.floor(t)

    def network_time(self, t):
        return t.clamp(0, self.T - 1)                # it knows no other

    def time_of(self, s):
        table = (1 / self.table(s.device) - 1).sqrt()
        high = torch.searchsorted(table, s.to(table.dtype).contiguous()).clamp(1, self.T)
        return high - 2 + ((s - table[high - 1]) / (table[high] - table[high - 1])).clamp(0, 1)

    def rates(self, t):
        raise ValueError("a discrete chain has no derivative in t: take another sampler, or a continuous process")

    def at_share(self, u):
        return (u * self.T).floor()

    def training_times(self, u):
        return self.draw_times(self, u).round().clamp(0, self.T - 1).to(u.dtype)

    def posterior(self, t, s):
        """q(x_s | x_t, x_0), s cleaner than t, (B,) each -> its mean as (factor of x0, factor of x_t), log beta~ (-inf
        where s is clean), log beta. 2006.11239, eq. 6-7."""
        a_t, a_s = self.alpha(t) ** 2, self.alpha(s) ** 2
        beta, share = 1 - a_t / a_s, (1 - a_s) / (1 - a_t)
        return a_s.sqrt() * beta / (1 - a_t), (a_t / a_s).sqrt() * share, (beta * share).log(), beta.log()

    def loss(self, model, x0, y, t, noise):
        xt = self.noised(x0, noise, t)
        prediction, v = self.split(self.network(model, xt, t, y))
        mse = flat_mean((self.target(x0, noise, t) - prediction) ** 2)
        loss, bound = mse * self.weight(t).to(mse), self.objective in ("vlb", "kl")
        if v is None and not bound:
            return {"loss": loss, "mse": mse}
        # Beside the simple loss, the bound trains the variance alone: its mean is detached.
        x0_hat = self.solve(prediction if bound else prediction.detach(), xt, t).x0
        terms = {"vlb": self.T, "rescaled": self.T / 1000}.get(self.objective, 1)
        vb = terms * self.variational_term(x0_hat, v, x0, xt, t)
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
        if v is None:                                # fixed: beta, or beta~ (which "large" too takes in the last step)
            v = (self.fixed_variance == "large") * (~clean).to(x0.dtype)
        log_variance = v * log_large + (1 - v) * log_small
        true_mean, mean = x0_factor * x0 + xt_factor * xt, x0_factor * x0_hat + xt_factor * xt
        kl = 0.5 * (log_variance - log_small + (log_small - log_variance).exp() - 1
                    + (true_mean - mean) ** 2 * (-log_variance).exp())
        nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return flat_mean(torch.where(clean, nll, kl)) / math.log(2)

    def bits_per_dim(self, denoise, x0, noise, times=None):
        """The whole bound on -log2 p(x0), bits per dimension, along the chain or a sub-grid: total and prior (B,), and
        per step, noisiest first, vb, x0_mse and eps_mse, (B, steps)."""
        times, rows = torch.arange(self.T - 1, -2, -1).double() if times is None else times, []
        for i, j in pairwise(times.tolist()):
            t, s, z = batch_time(i, x0), batch_time(j, x0), noise(x0.shape)
            xt = self.noised(x0, z, t)
            d = denoise(xt, t)
            vb = self.variational_term(d.x0, d.variance, x0, xt, t, s, times[-3:-1].tolist())
            rows.append((vb, flat_mean((d.x0 - x0) ** 2), flat_mean((d.eps - z) ** 2)))
        vb, x0_mse, eps_mse = (torch.stack(row, 1) for row in zip(*rows))
        a2 = expand(self.alpha(batch_time(times[0].item(), x0)) ** 2, x0)
        prior = flat_mean(0.5 * (a2 * x0**2 - a2 - torch.log1p(-a2))) / math.log(2)    # KL(q(x_T | x0) || N(0, 1))
        return {"total": vb.sum(1) + prior, "prior": prior, "vb": vb, "x0_mse": x0_mse, "eps_mse": eps_mse}


OBJECTIVES = {
    "hybrid": "the simple loss, and one term of the bound that trains the learned variance alone, 2102.09672, eq. 16",
    "rescaled": "hybrid, with the term of the bound times T/1000",
    "vlb": "the variational bound: T times one term of it",
    "kl": "one term of the variational bound",
}


def discretised_log_likelihood(x0, mean, log_std):
    """log of the mass that N(mean, std^2) gives to the 8-bit bin around x0; outer bins are open. 2006.11239, eq. 13. As
    published, the normal CDF is a tanh approximation and a mass is at least 1e-12."""

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper, lower = (cdf((x0 - mean + half) * (-log_std).exp()) for half in (1 / 255, -1 / 255))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


class RectifiedFlow(Process):
    """Rectified flow, 2209.03003: the straight path x_t = (1 - t) x0 + t eps, t in [0, 1], t = 1 is noise."""

    straight, density, own_prediction = True, "logit-normal", "flow"

    def __init__(self, prediction=None, **options):
        super().__init__(prediction, **options)
        if self.prediction in ("eps", "score"):      # mute about x0 at pure noise: SiT stays 0.001 away
            self.t_first, self.t_noisy = 1e-3, 1 - 1e-3

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def time_of(self, s):
        return 1 / (1 + 1 / s)

    def shifted(self, t):
        return self.shift * t / (1 + (self.shift - 1) * t)


class GVP(RectifiedFlow):
    """SiT's trigonometric path, 2401.08740: alpha = cos(pi t/2), sigma = sin(pi t/2)."""

    straight, density, own_prediction, shifted = False, "uniform", "velocity", Process.shifted

    def alpha(self, t):
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(math.pi / 2 * t)

    def time_of(self, s):
        return 2 / math.pi * torch.atan(s)


class VP(Process):
    """The variance-preserving SDE of score-based models, 2011.13456, eq. 11: beta(t) even from beta_min to beta_max."""

    t_first = 1e-5

    def __init__(self, prediction=None, *, beta_min=0.1, beta_max=20.0, **options):
        super().__init__(prediction, **options)
        require(0 < beta_min < beta_max < math.inf, f"betas from {beta_min} to {beta_max}: they must rise, above 0")
        self.beta_min, self.beta_max = beta_min, beta_max

    def network_time(self, t):
        return 999 * t

    def log_alpha(self, t):
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t):
        return torch.exp(self.log_alpha(t))

    def sigma(self, t):
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def time_of(self, s):
        return self.time_of_log_alpha(-0.5 * torch.log1p(s * s))

    def time_of_log_alpha(self, log_alpha):
        rise = self.beta_max - self.beta_min
        return -4 * log_alpha / (self.beta_min + (self.beta_min**2 - 4 * rise * log_alpha).sqrt())


class SubVP(VP):
    """The sub-VP SDE, 2011.13456, eq. 29: VP's drift with less noise, better likelihoods. Sigma = 1 - alpha^2."""

    def sigma(self, t):
        return -torch.expm1(2 * self.log_alpha(t))

    def time_of(self, s):
        return self.time_of_log_alpha(-torch.asinh(s / 2))


class ContinuousCosine(Process):
    """The cosine chain in continuous time, as in Wuerstchen, 2306.00637. Alpha = cos(pi/2 (t + offset)/(1 + offset)),
    read at 1 - (1 - t)^power if power is above 1, at t^power if it is below."""

    t_first, t_noisy = 1e-3, 1 - 1e-3

    def __init__(self, prediction=None, *, offset=0.008, power=1.0, **options):
        super().__init__(prediction, **options)
        require(0 < offset < 1 and 0 < power < math.inf, f"offset {offset} and power {power} must be above 0")
        self.offset, self.power = offset, power

    def alpha(self, t):
        u = 1 - (1 - t) ** self.power if self.power > 1 else t**self.power
        start = math.cos(math.pi / 2 * self.offset / (1 + self.offset))
        return (torch.cos(math.pi / 2 * (u + self.offset) / (1 + self.offset)) / start).clamp(0, 1)

    def sigma(self, t):
        return (1 - self.alpha(t) ** 2).sqrt()

    def time_of(self, s):
        start = math.cos(math.pi / 2 * self.offset / (1 + self.offset))
        u = 2 / math.pi * (1 + self.offset) * torch.acos(start / (1 + s * s).sqrt()) - self.offset
        return 1 - (1 - u) ** (1 / self.power) if self.power > 1 else u.clamp(min=0) ** (1 / self.power)


class VE(Process):
    """The variance-exploding SDE, 2011.13456, eq. 30: noise is added, nothing is scaled. Alpha = 1, sigma = sigma_min
    (sigma_max/sigma_min)^t; t = 0 is the clean image."""

    t_first, t_least, exploding = 1e-5, 1e-5, True

    def __init__(self, prediction=None, *, sigma_min=0.01, sigma_max=50.0, **options):
        super().__init__(prediction, **options)
        require(0 < sigma_min < sigma_max < math.inf,
                f"noise levels from {sigma_min} to {sigma_max}: they must rise, from above 0")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def alpha(self, t):
        return 1 + 0 * t

    def sigma(self, t):
        return torch.where(t > 0, self.sigma_min * (self.sigma_max / self.sigma_min) ** t, 0 * t)

    def time_of(self, s):
        return torch.log(s / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


class EDM(VE):
    """EDM, 2206.00364: sigma itself is the time, preconditioned network, log-normal noise levels. Alpha = 1; sigma lies
    between sigma_min and sigma_max. The network is told log t (the paper's c_noise = log(t)/4) moved and scaled to
    0 .. 1000, the range that our backbones embed."""

    grid, density, own_prediction = "karras", "log-normal", "edm"

    def __init__(self, prediction=None, *, sigma_min=0.002, sigma_max=80.0, **options):
        super().__init__(prediction, sigma_min=sigma_min, sigma_max=sigma_max, **options)
        self.t_first, self.t_least, self.t_noisy = sigma_min, sigma_min, sigma_max

    def sigma(self, t):
        return t

    def time_of(self, s):
        return s

    def network_time(self, t):                       # by the paper's range: a network may be moved to another
        return 1000 * torch.log(t.clamp(min=1e-8) / 0.002) / math.log(80 / 0.002)


def chain(betas, line, own_prediction="eps", kind=Discrete):
    """An entry of `PROCESSES`: the discrete chain (of this kind) of a table, with the options of both. line: what it
    is."""

    def make(prediction=None, **options):
        of_table = {name: options.pop(name) for name in inspect.signature(betas).parameters if name in options}
        return kind(betas(**of_table), prediction or own_prediction, **options)

    table = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(betas).parameters.values()]
    options = [p.replace(kind=p.KEYWORD_ONLY) if p.name != "prediction" else p
               for p in inspect.signature(Discrete).parameters.values() if p.name != "betas"]
    make.__signature__, make.__doc__ = joined(options[:1], table, options[1:]), line
    return make


def zero_snr_betas(T=1000, start=0.00085, end=0.012):
    """Latent diffusion's table with zero terminal SNR."""
    return zero_terminal_snr(scaled_linear_betas(T, start, end))


PROCESSES: dict[str, Callable] = {
    "flow": RectifiedFlow,
    "linear": chain(linear_betas, "DDPM's chain of 1000 steps with linear betas"),
    "cosine": chain(cosine_betas, "Improved DDPM's chain of 1000 steps with the cosine table"),
    "scaled-linear": chain(scaled_linear_betas, "Latent diffusion's chain, linear in sqrt(beta)"),
    "sigmoid": chain(sigmoid_betas, "A chain whose betas are a sigmoid of time"),
    "laplace": chain(laplace_betas, "A chain with a Laplace density of log SNR"),
    "zero-snr": chain(zero_snr_betas, "Latent diffusion's chain stretched to end in pure noise; predicts v", "v"),
    "vp": VP,
    "sub-vp": SubVP,
    "ve": VE,
    "edm": EDM,
    "gvp": GVP,
    "continuous-cosine": ContinuousCosine,
}


def create_process(name="flow", prediction=None, shift=1.0, **options):
    """A process: a name in `PROCESSES`, or an entry with its own options bound (sigma_min, T, ...). options: weighting,
    density, sigma_data, and of a chain learned_variance, objective, fixed_variance; None = the process's own. Raises
    ValueError for what cannot be."""
    make = choose(PROCESSES, name, "process")
    options = {k: v for k, v in {"prediction": prediction, "shift": shift, **options}.items() if v is not None}
    if "objective" not in inspect.signature(make).parameters:
        asked = [options.pop(k, None) for k in ("learned_variance", "objective", "fixed_variance")]
        require(not any(asked), "learned variances and the bound need a discrete chain (linear, cosine, ...), not "
                f"{name if isinstance(name, str) else 'a continuous process'}")
    return make(**options)


# ----------------------------------------------------------------------------------------------------------- likelihood

DORMAND_PRINCE = (                                   # places, rows, and the difference of the orders 5 and 4
    (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    ((1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9), (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
     (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
     (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
    (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)


def weighted_sum(weights, tensors):
    """sum of w m over the pairs, skipping w = 0."""
    total, *rest = [(w, m) for w, m in zip(weights, tensors) if w]
    total = total[0] * total[1]
    for w, m in rest:
        total = total.add_(m, alpha=w)
    return total


def dormand_prince(f, y, t, end, rtol=1e-5, atol=1e-5):
    """dy/dt = f(t, y) from t to end by the adaptive Runge-Kutta method of order 5(4) (RK45, dopri5). Raises ValueError
    if no step, however short, meets the tolerances: they are too small, or f is not finite."""
    require(rtol >= 0 and atol >= 0 and rtol + atol > 0, f"tolerances {rtol} and {atol}: both 0, or one below 0")
    h, slopes, (places, rows, difference) = (end - t) / 100, [f(t, y)], DORMAND_PRINCE
    shortest = 1e-13 * max(abs(t), abs(end))
    while abs(end - t) > shortest:
        h = math.copysign(min(abs(h), abs(end - t)), end - t)
        for place, row in zip(places, rows):
            new = y + h * weighted_sum(row, slopes)
            slopes.append(f(t + place * h, new))
        scale = atol + rtol * torch.maximum(y.abs(), new.abs())
        error = (h * weighted_sum(difference, slopes) / scale).pow(2).mean().sqrt().item()
        require(math.isfinite(error), "the network gives NaN or infinity: the ODE has no solution")
        t, y, slopes = (t + h, new, slopes[-1:]) if error < 1 else (t, y, slopes[:1])
        h *= min(10.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
        require(error < 1 or abs(h) > shortest,
                f"the ODE's steps shrink to nothing at t = {t:.6g}: no tolerance of {rtol:g} can be met")
    return y


def log_likelihood(process, denoise, x0, probe=None, rtol=1e-5, atol=1e-5):
    """log p(x0), (B,) in nats, and the latent z: the probability-flow ODE with its divergence, 2011.13456, eq. 39.
    probe: random signs like x0 (Hutchinson's estimate); None: the exact divergence, D backward passes. Bits per
    dimension of 8-bit data in [-1, 1]: -log p/(D ln 2) + 7. Raises ValueError as `dormand_prince` does."""

    def f(t, y):
        with torch.enable_grad():
            x = y[:, :-1].reshape(x0.shape).detach().requires_grad_()
            v = process.velocity(denoise(x, t), t)

            def back(out):
                return torch.autograd.grad(out.sum(), x, retain_graph=True)[0].flatten(1)

            if probe is not None:
                divergence = (back(v * probe) * probe.flatten(1)).sum(1)
            else:
                divergence = sum(back(column)[:, k] for k, column in enumerate(v.flatten(1).unbind(1)))
        return torch.cat([v.detach().flatten(1), divergence[:, None]], 1)

    x0 = single(x0)
    y = torch.cat([x0.flatten(1), x0.new_zeros(len(x0), 1)], 1)
    y = dormand_prince(f, y, process.t_least, process.t_noisy, rtol, atol)
    z, std = y[:, :-1], process.path(process.t_noisy)[1]
    return y[:, -1] - 0.5 * (z**2 / std**2 + math.log(2 * math.pi * std**2)).sum(1), z.reshape(x0.shape)


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
    chain, bits = isinstance(process, Discrete), []

    def noise(shape):
        return torch.randn(shape, generator=generator).to(args.device)

    for rows in tqdm(torch.arange(min(args.n, len(held_out))).split(args.batch), desc="images", unit=" batches"):
        x, y = held_out.gather(rows)
        denoise = process.denoiser(objective.model, y if objective.num_classes else None)
        if chain:
            with torch.no_grad():
                kept = respaced(process.T, str(args.chain_steps)) if args.chain_steps else range(process.T)
                times = double(*reversed(kept), -1)
                bits.append(process.bits_per_dim(denoise, x, noise, times)["total"])
        else:
            level = ((x + 1) * 127.5).round() + torch.rand(x.shape, generator=generator).to(args.device)  # dequantised
            log_p, _ = log_likelihood(process, denoise, level / 128 - 1, noise(x.shape).sign(), args.tolerance,
                                      args.tolerance)
            bits.append(7 - log_p / (x[0].numel() * math.log(2)))
    bits = torch.cat(bits)
    print(f"{bits.mean():.3f} bits per dimension (+- {bits.std() / len(bits) ** 0.5:.3f}) on {len(bits)} held-out "
          f"images: {'the variational bound' if chain else 'the ODE, with a random estimate of its divergence'}")
