"""The diffusion core: noise schedules, predictions, losses, samplers, guidance. It knows no architecture.

Three ideas carry all of it, and each is usable alone:

1. A `Process` is a path from data to noise, x_t = alpha(t) x0 + sigma(t) eps, together with what the network predicts and
   how it is trained. `process.loss(model, x0, y, t, noise)` trains; `process.denoised(output, xt, t)` reads the network.
2. A denoiser is a function `denoise(xt, t) -> Denoised`. Guidance and clipping take denoisers and return a denoiser.
3. A sampler is a generator: `for x in sampler(denoise, x, times, process, noise): ...` yields x after every step.

    symbol            here            meaning
    x_0, x_t          x0, xt          clean image, noisy image at time t, (B, C, H, W)
    epsilon           eps             the Gaussian noise in x_t
    alpha_t, sigma_t  alpha, sigma    x_t = alpha_t x_0 + sigma_t eps
    s                 sigma/alpha     noise level once x_t is divided by alpha_t
    lambda            lam             log(alpha/sigma), half the log signal-to-noise ratio
    i, j              i, j            a sampler steps from grid point i to the cleaner grid point j
"""

import math
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
from torch import nn


def expand(v, x):
    """A number per sample, (B,), shaped to multiply x (B, ...) in x's own dtype."""
    return v.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))


def time_dtype(x):
    """Times are float32, except beside a float64 state (half precision has no room for 1000 steps; MPS has no float64)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def flat_mean(x):
    """Mean over all but the first dimension, (B, ...) -> (B,): the loss of each sample."""
    return x.flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------------------ schedules
# Tables of beta_t, t = 0 .. T-1, in float64.


def linear_betas(T=1000, start=1e-4, end=0.02):
    """Denoising Diffusion Probabilistic Models, 2006.11239, section 4. The ends are scaled by 1000/T, so that any T ends
    in the same noise."""
    return torch.linspace(start * 1000 / T, end * 1000 / T, T, dtype=torch.float64)


def quadratic_betas(T=1000, start=1e-4, end=0.02):
    """Linear in sqrt(beta): "quad" of the first DDPM code, "scaled linear" of latent diffusion (2112.10752: 0.00085, 0.012)."""
    return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2


def warmup_betas(T=1000, start=1e-4, end=0.02, share=0.1):
    """beta rises linearly over the first `share` of the chain and then stays ("warmup10", "warmup50" of the DDPM code)."""
    n = int(T * share)
    return torch.cat([torch.linspace(start, end, n, dtype=torch.float64), torch.full((T - n,), end, dtype=torch.float64)])


def cosine_betas(T=1000, offset=0.008, largest=0.999):
    """Improved DDPM, 2102.09672, eq. 17: alpha_bar(u) = cos^2(pi/2 (u + offset) / (1 + offset))."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest)


BETAS: dict[str, Callable] = {
    "linear": linear_betas, "quad": quadratic_betas, "scaled-linear": quadratic_betas, "cosine": cosine_betas,
    "warmup10": warmup_betas, "warmup50": lambda *a: warmup_betas(*a, share=0.5),
    "const": lambda T=1000, start=1e-4, end=0.02: torch.full((T,), end, dtype=torch.float64),
    "jsd": lambda T=1000, *_: 1 / torch.arange(T, 0, -1, dtype=torch.float64),
}


def respaced(T, spec):
    """The steps that a shorter chain keeps, ascending (improved DDPM's `timestep_respacing`).

    spec: "50" = 50 steps at a fractional stride, both ends kept; "10,15,20" = T cut into sections, so many steps in each;
    "ddim50" = the integer stride that gives exactly 50 steps. Raises ValueError if T cannot be cut so.
    """
    if spec.startswith("ddim"):
        n = int(spec[4:])
        stride = next((k for k in range(1, T) if len(range(0, T, k)) == n), None)
        if stride is None:
            raise ValueError(f"respacing {spec!r}: no integer stride cuts {T} steps into exactly {n}")
        return list(range(0, T, stride))
    steps, start, counts = [], 0, [int(c) for c in spec.split(",")]
    for k, count in enumerate(counts):
        size = T // len(counts) + (k < T % len(counts))
        if not 0 < count <= size:
            raise ValueError(f"respacing {spec!r}: cannot take {count} steps out of a section of {size}")
        stride, place = (size - 1) / (count - 1) if count > 1 else 1, 0.0
        for _ in range(count):                       # the place is accumulated, as published: it decides the ties
            steps.append(start + round(place))
            place += stride
        start += size
    return steps


# ------------------------------------------------------------------------------------------------------------ processes


class Denoised(NamedTuple):
    """What a denoiser says of x_t: the clean image and the noise, (B, C, H, W) each, with x_t = alpha x0 + sigma eps.

    variance: None, or the learned v of improved DDPM, eq. 15: where the log-variance of a reverse step lies between
    log beta~ (v = 0) and log beta (v = 1). Both ends belong to the step that is taken, so the sampler makes the
    variance, not the network's reader: that is why any sub-grid of steps works with learned variances.
    """

    x0: torch.Tensor
    eps: torch.Tensor
    variance: torch.Tensor | None = None


class Process:
    """A path x_t = alpha(t) x0 + sigma(t) eps, and what the network predicts on it.

    prediction: "eps" (the noise), "x0" (the clean image), "v" = alpha eps - sigma x0 (progressive distillation, 2202.00512)
    or "flow" = eps - x0 (rectified flow, 2209.03003). A subclass gives alpha and sigma, the ends of its time
    (t_clean < t_noisy), the density of t in training, and the number that the network is told for t.
    """

    t_clean, t_noisy = 0.0, 1.0
    learned_variance = False

    def __init__(self, prediction="eps"):
        if prediction not in ("eps", "x0", "v", "flow"):
            raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0, v or flow")
        self.prediction = prediction

    def alpha(self, t):
        raise NotImplementedError

    def sigma(self, t):
        raise NotImplementedError

    def network_time(self, t):
        """What the network is told for t: 0 .. 1000 over the whole path, whatever the process."""
        return 1000 * t

    def training_times(self, u):
        """Uniform numbers u (B,) in [0, 1) -> training times (B,), distributed as this process wants them."""
        return self.t_clean + (self.t_noisy - self.t_clean) * u

    def times(self, steps):
        """The grid a sampler walks, (steps + 1,) float64 from t_noisy down to t_clean."""
        return torch.linspace(self.t_noisy, self.t_clean, steps + 1, dtype=torch.float64)

    def ode_scale(self, alpha, sigma):
        """c such that the probability-flow ODE is solved for x_t / c: alpha here, so that dx = eps ds with s = sigma/alpha."""
        return alpha

    def noised(self, x0, noise, t):
        """x_t = alpha(t) x0 + sigma(t) eps."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def target(self, x0, noise, t):
        """What the network should say at time t, (B, C, H, W)."""
        if self.prediction == "v":
            return expand(self.alpha(t), x0) * noise - expand(self.sigma(t), x0) * x0
        return {"eps": noise, "x0": x0, "flow": noise - x0}[self.prediction]

    def denoised(self, output, xt, t):
        """The network's output (B, C, H, W), or (B, 2C, H, W) with learned variance, as a `Denoised`."""
        output, variance = self.split(output)
        a, s = expand(self.alpha(t), xt), expand(self.sigma(t), xt)
        if self.prediction == "eps":
            return Denoised((xt - s * output) / a, output, variance)
        if self.prediction == "x0":
            return Denoised(output, (xt - a * output) / s, variance)
        if self.prediction == "v":
            return Denoised((a * xt - s * output) / (a * a + s * s), (s * xt + a * output) / (a * a + s * s), variance)
        return Denoised((xt - s * output) / (a + s), (xt + a * output) / (a + s), variance)

    def split(self, output):
        """Network output -> (prediction, v or None); v = (o + 1)/2 is unbounded."""
        if not self.learned_variance:
            return output, None
        output, o = output.chunk(2, dim=1)
        return output, (o + 1) / 2

    def loss(self, model, x0, y, t, noise):
        """The training loss of each sample: {"loss": (B,), "mse": (B,), ...}, gradients flow to the model.

        x0 (B, C, H, W) in [-1, 1]; y what the model is conditioned on; t (B,) from `training_times`; noise like x0.
        """
        output, _ = self.split(model(self.noised(x0, noise, t), self.network_time(t), y).to(x0.dtype))
        mse = flat_mean((self.target(x0, noise, t) - output) ** 2)
        return {"loss": mse, "mse": mse}

    def denoiser(self, model, y=None):
        """model(x, t, y) as `denoise(xt, t) -> Denoised`, with y bound; t a float or (B,)."""

        def denoise(xt, t):
            t = torch.as_tensor(t, dtype=time_dtype(xt), device=xt.device).expand(len(xt))
            return self.denoised(model(xt, self.network_time(t), y).to(xt.dtype), xt, t)

        return denoise


class Discrete(Process):
    """The discrete chain of DDPM, 2006.11239: t = 0 .. T-1 with alpha_bar_t = prod(1 - beta), alpha = sqrt(alpha_bar),
    sigma = sqrt(1 - alpha_bar); t = -1 is the clean image. The network is told t itself.

    betas: (T,) float64. learned_variance: the network's second half of channels is v (see `Denoised`), trained by the
    hybrid loss of improved DDPM, 2102.09672, eq. 16, as published with DiT (weight 1, in bits per dimension).
    Between two integers, s = sigma/alpha is interpolated linearly.
    """

    t_clean = -1.0

    def __init__(self, betas, prediction="eps", learned_variance=False, objective="hybrid", fixed_variance="large"):
        super().__init__(prediction)
        self.betas, self.T, self.learned_variance = betas, len(betas), learned_variance
        self.objective, self.fixed_variance = objective, fixed_variance
        self.t_noisy = self.T - 1.0
        self.alpha_bar = torch.cat([betas.new_ones(1), torch.cumprod(1 - betas, 0)])    # entry t + 1 belongs to t

    def _table(self, t):
        """(alpha_bar of the integers below and above t, the fraction between them)."""
        table = self.alpha_bar = self.alpha_bar.to(t.device)
        low = t.floor().long().clamp(-1, self.T - 1)
        return table[low + 1], table[(low + 2).clamp(max=self.T)], t - low

    def alpha(self, t):
        low, high, part = self._table(t)
        if not part.any():
            return low.sqrt()
        s = torch.lerp((1 / low - 1).sqrt(), (1 / high - 1).sqrt(), part.to(low.dtype))
        return 1 / (1 + s * s).sqrt()

    def sigma(self, t):
        return (1 - self.alpha(t) ** 2).clamp(min=0).sqrt()

    def network_time(self, t):
        return t

    def training_times(self, u):
        return (u * self.T).floor().clamp(max=self.T - 1)

    def times(self, steps):
        """`steps` of the T steps at an even stride, both ends kept, then the clean image."""
        if not 0 < steps <= self.T:
            raise ValueError(f"{steps} sampling steps out of a chain of {self.T}: choose 1 to {self.T}")
        return torch.tensor([*reversed(respaced(self.T, str(steps))), self.t_clean], dtype=torch.float64)

    def posterior(self, t, s):
        """q(x_s | x_t, x_0), s cleaner than t, (B,) each -> its mean as (factor of x0, factor of x_t), log beta~, log beta.

        2006.11239, eq. 6-7. beta~ is 0 where s is clean; its logarithm is -inf there.
        """
        a_t, a_s = self.alpha(t) ** 2, self.alpha(s) ** 2
        beta = 1 - a_t / a_s
        x0_factor = a_s.sqrt() * beta / (1 - a_t)
        xt_factor = (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t)
        return x0_factor, xt_factor, (beta * (1 - a_s) / (1 - a_t)).log(), beta.log()

    def loss(self, model, x0, y, t, noise):
        output = model(xt := self.noised(x0, noise, t), self.network_time(t), y).to(x0.dtype)
        prediction, v = self.split(output)
        mse = flat_mean((self.target(x0, noise, t) - prediction) ** 2)
        if self.objective == "vlb":                   # T times one term: an unbiased estimate of the whole bound
            vb = self.T * self.variational_term(self.denoised(output, xt, t).x0, v, x0, xt, t)
            return {"loss": vb, "mse": mse, "vb": vb}
        if v is None:
            return {"loss": mse, "mse": mse}
        # The bound trains the variance alone: its mean is detached.
        mean_x0 = self.denoised(torch.cat([prediction.detach(), v], 1), xt, t).x0
        vb = self.variational_term(mean_x0, v, x0, xt, t) * (self.T / 1000 if self.objective == "rescaled" else 1)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def variational_term(self, x0_hat, v, x0, xt, t):
        """One term of the variational bound, (B,), bits per dimension: KL(q(x_{t-1}|x_t,x0) || p) for t > 0, and for
        t = 0 the negative log-likelihood of the 8-bit x0. 2006.11239, eq. 5; 2102.09672, eq. 15."""
        x0_factor, xt_factor, _, log_beta = (expand(c, x0) for c in self.posterior(t, t - 1))
        # beta~_0 = 0 has no logarithm: the published code puts beta~_1 in its place.
        log_beta_tilde = expand(self.posterior(t.clamp(min=1), t.clamp(min=1) - 1)[2], x0)
        if v is None:                                 # fixed: beta (beta~_1 in the last step, where beta leaves it) or beta~
            v = expand(t > 0, x0) * float(self.fixed_variance == "large")
        log_variance = v * log_beta + (1 - v) * log_beta_tilde
        true_mean, mean = x0_factor * x0 + xt_factor * xt, x0_factor * x0_hat + xt_factor * xt
        kl = 0.5 * (log_variance - log_beta_tilde + (log_beta_tilde - log_variance).exp() - 1
                    + (true_mean - mean) ** 2 * (-log_variance).exp())
        nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return flat_mean(torch.where(expand(t, x0) == 0, nll, kl)) / math.log(2)


def discretised_log_likelihood(x0, mean, log_std):
    """log of the mass that N(mean, std^2) gives to the 8-bit bin around x0 in [-1, 1]; outer bins are open. 2006.11239, eq. 13.
    The normal CDF is the tanh approximation, probabilities are at least 1e-12, both as published."""

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper, lower = (cdf((x0 - mean + half) * (-log_std).exp()) for half in (1 / 255, -1 / 255))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


class RectifiedFlow(Process):
    """The straight path x_t = (1 - t) x0 + t eps, t in [0, 1], t = 1 is noise (Flow Straight and Fast, 2209.03003).

    density: of the training times, "uniform" or "logit-normal" (Scaling Rectified Flow Transformers, 2403.03206, eq. 19:
    t = sigmoid(z), z ~ N(0, 1)). shift: multiplies sigma/alpha of every time, in training and sampling (same paper, eq. 23).
    """

    def __init__(self, prediction="flow", density="logit-normal", shift=1.0):
        super().__init__(prediction)
        if density not in ("uniform", "logit-normal"):
            raise ValueError(f"unknown time density {density!r}: choose uniform or logit-normal")
        self.density, self.shift = density, shift

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def ode_scale(self, alpha, sigma):
        return alpha + sigma                       # = 1: dx = (eps - x0) dt, finite also at pure noise, where alpha = 0

    def shifted(self, t):
        return self.shift * t / (1 + (self.shift - 1) * t)

    def training_times(self, u):
        t = torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))) if self.density == "logit-normal" else u
        return self.shifted(t)

    def times(self, steps):
        return self.shifted(super().times(steps))


PROCESSES: dict[str, tuple[Callable, str]] = {
    "flow": (RectifiedFlow, "rectified flow: a straight path from data to noise, the network predicts the velocity"),
    "linear": (lambda **k: Discrete(linear_betas(), **k), "DDPM's chain of 1000 steps with linear betas"),
    "cosine": (lambda **k: Discrete(cosine_betas(), **k), "improved DDPM's chain of 1000 steps with the cosine table"),
}


# ------------------------------------------------------------------------------------------------------------- guidance
# Functions of denoisers that are denoisers.


def guided(cond, uncond, scale, channels=None):
    """Classifier-free guidance, 2207.12598: uncond + scale (cond - uncond); scale 1 is no guidance, 0 unconditional.

    channels: guide only the first so many, the rest stays conditional (the published DiT and SiT guide 3 of their 4).
    The variance is the conditional one.
    """

    def denoise(xt, t):
        c = cond(xt, t)
        if scale == 1:
            return c
        u = uncond(xt, t)
        n = channels or xt.shape[1]
        mix = lambda a, b: torch.cat([b[:, :n] + scale * (a[:, :n] - b[:, :n]), a[:, n:]], 1)
        return Denoised(mix(c.x0, u.x0), mix(c.eps, u.eps), c.variance)

    return denoise


def clipped(denoise, process, limit=1.0):
    """x0 clipped to [-limit, limit], and the noise that this x0 implies (for pixels; latents have no such range)."""

    def clip(xt, t):
        d = denoise(xt, t)
        x0 = d.x0.clamp(-limit, limit)
        t = torch.as_tensor(t, dtype=time_dtype(xt), device=xt.device).expand(len(xt))
        a, s = expand(process.alpha(t), xt), expand(process.sigma(t), xt)
        return Denoised(x0, torch.where(d.x0 == x0, d.eps, (xt - a * x0) / s), d.variance)

    return clip


# ------------------------------------------------------------------------------------------------------------- samplers
# sampler(denoise, x, times, process, noise, **options) yields x after each step, len(times) - 1 of them. x starts as noise,
# (B, C, H, W); times is process.times(steps); noise(shape) gives standard normal numbers.


class Level(NamedTuple):
    """A grid point: its time, alpha, sigma and lambda = log(alpha/sigma) as plain numbers."""

    t: float
    alpha: float
    sigma: float
    lam: float


def levels(process, times):
    """The grid as a list of `Level`."""
    rows = zip(times.tolist(), process.alpha(times).tolist(), process.sigma(times).tolist())
    return [Level(t, a, s, math.log(a / s) if a > 0 < s else math.inf if a > 0 else -math.inf) for t, a, s in rows]


def steps(process, times):
    """The grid as pairs (i, j) of `Level`: each step goes from i to the cleaner j."""
    grid = levels(process, times)
    return zip(grid[:-1], grid[1:])


def ddpm(denoise, x, times, process, noise, variance="small"):
    """Ancestral sampling, 2006.11239, algorithm 2, on any sub-grid of times.

    variance: "small" = beta~, "large" = beta; a denoiser with learned variances overrules it. No noise in the last step.
    """
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        beta = 1 - (i.alpha / j.alpha) ** 2
        mean = j.alpha * beta / i.sigma**2 * d.x0 + i.alpha / j.alpha * (j.sigma / i.sigma) ** 2 * x
        z = noise(x.shape)
        if j.sigma == 0:
            x = mean
        else:
            log_small, log_large = math.log(beta * (j.sigma / i.sigma) ** 2), math.log(beta)
            v = {"small": 0.0, "large": 1.0}[variance] if d.variance is None else d.variance
            x = mean + torch.as_tensor(0.5 * (v * log_large + (1 - v) * log_small)).exp() * z
        yield x


def ddim(denoise, x, times, process, noise, eta=0.0):
    """Denoising Diffusion Implicit Models, 2010.02502, eq. 12: eta 0 is deterministic, eta 1 is DDPM's variance beta~."""
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        up = eta * j.sigma * math.sqrt(1 - (j.sigma * i.alpha / (j.alpha * i.sigma)) ** 2)
        x = j.alpha * d.x0 + math.sqrt(j.sigma**2 - up**2) * d.eps
        if eta:
            x = x + up * noise(x.shape)
        yield x


def euler(denoise, x, times, process, noise):
    """Euler's method for the probability-flow ODE in x/alpha against s = sigma/alpha, where its slope is eps, 2206.00364.
    On the straight path of rectified flow that is x + (t_j - t_i) (eps - x0)."""
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        x = j.alpha * d.x0 + j.sigma * d.eps
        yield x


def heun(denoise, x, times, process, noise):
    """Heun's second-order method for the same ODE, 2206.00364, algorithm 1: the slope is averaged over both ends.
    Two network calls a step, one in the last."""
    for i, j in steps(process, times):
        d = denoise(x, i.t)
        x_euler = j.alpha * d.x0 + j.sigma * d.eps
        if j.sigma > 0:
            e = denoise(x_euler, j.t)
            c_i, c_j = process.ode_scale(i.alpha, i.sigma), process.ode_scale(j.alpha, j.sigma)
            slope = (j.alpha / c_j - i.alpha / c_i) * (d.x0 + e.x0) + (j.sigma / c_j - i.sigma / c_i) * (d.eps + e.eps)
            x_euler = c_j * (x / c_i + slope / 2)
        x = x_euler
        yield x


def dpmpp_2m(denoise, x, times, process, noise):
    """DPM-Solver++ (2M), 2211.01095, algorithm 2: an exponential integrator in lambda with the previous x0 as second point.
    First order in the first step and in a last step that ends in the clean image."""
    old = None
    for i, j in steps(process, times):
        x0 = denoise(x, i.t).x0
        h, extrapolated = j.lam - i.lam, x0
        if old and j.sigma > 0 and math.isfinite(h):
            r = (i.lam - old[0]) / h
            extrapolated = x0 + (x0 - old[1]) / (2 * r)
        x = j.sigma / i.sigma * x - j.alpha * math.expm1(-h) * extrapolated
        old = (i.lam, x0)
        yield x


SAMPLERS: dict[str, Callable] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun, "dpmpp-2m": dpmpp_2m}


# ------------------------------------------------------------------------------------------- training and drawing images


def seeded(*numbers, device="cpu"):
    """A torch.Generator whose state is a function of the given integers alone."""
    seed = np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


class ImageNoise:
    """noise(shape) for sampling in which image i draws from a stream of its own, a function of (seed, i): the same seed gives
    the same images whatever the batch size and device."""

    def __init__(self, seed, indices, device="cpu"):
        self.generators, self.device = [seeded(seed, i) for i in indices], device

    def __call__(self, shape):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators]).to(self.device)


class StepNoise:
    """The random numbers of one training step: the rows `rows` of what the whole batch of `total` draws from (seed, step).
    So micro-batches and ranks see the numbers that they would have seen in one large batch."""

    def __init__(self, seed, step, total, rows=slice(None), device="cpu"):
        self.generator, self.total, self.rows, self.device = seeded(seed, step, device=device), total, rows, device

    def uniform(self):
        return torch.rand(self.total, generator=self.generator, device=self.device)[self.rows]

    def normal(self, shape):
        return torch.randn(self.total, *shape[1:], generator=self.generator, device=self.device)[self.rows]


def generate(process, model, x, y=None, null=None, sampler="dpmpp-2m", steps=30, guidance=1.0, guide_channels=None, clip=True,
             noise=torch.randn, **options) -> Iterator[torch.Tensor]:
    """Sample: yields the images after each step, starting from standard normal x (B, C, H, W), without gradients.

    y, null: the condition and the null condition that guidance moves away from (both as the model takes them).
    clip: keep x0 in [-1, 1] (pixels). options go to the sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    denoise = process.denoiser(model, y)
    if guidance != 1 and null is not None:
        denoise = guided(denoise, process.denoiser(model, null), guidance, guide_channels)
    if clip:
        denoise = clipped(denoise, process)
    with torch.no_grad():
        yield from SAMPLERS[sampler](denoise, x, process.times(steps), process, noise, **options)


class Diffusion(nn.Module):
    """The training objective of a denoising backbone: `loss(batch)` and `preview(n, generator)` are all that training knows.

    model: the backbone, model(x, t, y). num_classes: 0 for an unconditional model. label_drop: the share of samples whose
    label becomes the null label (= num_classes) in training, which is what guidance needs. draw: options of `generate`.
    """

    def __init__(self, model, process, shape, num_classes=0, label_drop=0.1, draw=None):
        super().__init__()
        self.model, self.process, self.shape = model, process, shape
        self.num_classes, self.label_drop, self.draw = num_classes, label_drop, draw or {}

    def loss(self, batch):
        """batch: x (B, C, H, W) in [-1, 1], y (B,), noise a `StepNoise` -> scalars by name, "loss" among them."""
        x, y, noise = batch["x"], batch["y"], batch["noise"]
        t = self.process.training_times(noise.uniform())
        y = torch.where(noise.uniform() < self.label_drop, self.num_classes, y) if self.num_classes else None
        parts = self.process.loss(self.model, x, y, t, noise.normal(x.shape))
        return {name: value.mean() for name, value in parts.items()}

    forward = loss                                 # DistributedDataParallel calls the module itself

    def labels(self, n, device):
        """The labels of a preview: every class in turn. None if there are none."""
        return torch.arange(n, device=device) % self.num_classes if self.num_classes else None

    def trajectory(self, x, y, **draw) -> Iterator[torch.Tensor]:
        """Images after each sampling step, from noise x and labels y; `draw` overrides the objective's own options."""
        null = torch.full_like(y, self.num_classes) if y is not None else None
        yield from generate(self.process, self.model, x, y, null, **{**self.draw, **draw})

    def preview(self, n, generator):
        """n images (n, C, H, W) in [-1, 1]; all randomness comes from `generator` (on the CPU)."""
        device = next(self.model.parameters()).device
        noise = lambda shape: torch.randn(shape, generator=generator).to(device)
        for x in self.trajectory(noise((n, *self.shape)), self.labels(n, device), noise=noise):
            pass
        return x.clamp(-1, 1)
