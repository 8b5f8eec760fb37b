"""The exact denoiser of a mixture of isotropic Gaussians, float64, against which theory is tested."""

import math
from functools import partial

import torch

import build
import diffusion as D

MEANS = torch.tensor([[1.2, -0.6], [-0.9, 0.8], [0.1, 1.1]], dtype=torch.float64).view(3, 1, 2, 1, 1)
STDS, WEIGHTS = (0.5, 0.7, 0.4), (0.3, 0.5, 0.2)


def no_noise(shape):
    return torch.zeros(shape, dtype=torch.float64)


def mixture(process, means=MEANS, stds=STDS, weights=WEIGHTS):
    """denoise(x, t) -> Denoised, exact."""

    def denoise(x, t):
        a, s = (D.expand(v, x) for v in process.path(t))
        v = [a * a * std * std + s * s for std in stds]
        d = [x - a * m for m in means]
        flat = lambda v: torch.as_tensor(v, dtype=torch.float64).expand(len(x), 1, 1, 1).flatten()
        logits = [math.log(w) - x[0].numel() / 2 * flat(vk).log() - dk.flatten(1).pow(2).sum(1) / (2 * flat(vk))
                  for w, vk, dk in zip(weights, v, d)]
        r = torch.softmax(torch.stack(logits), 0)
        x0 = sum(D.expand(rk, x) * (m + a * std**2 * dk / vk) for rk, m, std, dk, vk in zip(r, means, stds, d, v))
        eps = sum(D.expand(rk, x) * s * dk / vk for rk, dk, vk in zip(r, d, v))
        return D.Denoised(x0, eps)

    return denoise


def gaussian(process, mean=0.0, std=0.5):
    """The exact denoiser of one Gaussian."""
    return mixture(process, torch.full((1, 1, 1, 1, 1), mean, dtype=torch.float64), (std,), (1.0,))


def log_density(x):
    parts = [math.log(w) - x[0].numel() / 2 * math.log(2 * math.pi * s * s)
             - (x - m).flatten(1).pow(2).sum(1) / (2 * s * s) for w, m, s in zip(WEIGHTS, MEANS, STDS)]
    return torch.logsumexp(torch.stack(parts), 0)


def start(n=4, seed=0):
    return torch.randn(n, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded_noise(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, dtype=torch.float64, generator=generator)


def end(sampler, process, times, x, noise=no_noise, denoise=None, memory=None, **options):
    """The last state of a walk."""
    *_, last = sampler(denoise or mixture(process), x, times, process, noise, memory, **options)
    return last


def made(name, *given):
    """A process of the registry, with a network of as many channels out as in: published ones may throw some away."""
    spare = {"spare": False} if "spare" in build.parameters(D.PROCESSES[name]) else {}
    return D.create_process(partial(D.PROCESSES[name], **spare), *given)


class Tiny(torch.nn.Module):
    """A network of one convolution that knows nothing."""

    def __init__(self, channels):
        super().__init__()
        self.net = torch.nn.Conv2d(3, channels, 3, padding=1)

    def forward(self, x, t, y):
        return self.net(x) * (1 + t.view(-1, 1, 1, 1) / 1000)
