"""What the checks of recorded trajectories, tables and losses share: comparing, the analytic denoiser, and the table of
functions that compute a recorded run. A library's file adds its own to `RUNS`."""

import math

import torch

import diffusion as D

RUNS = {}                                              # function of a recorded run -> check(report, name, options, tol)


class Report:
    """Collects comparisons; `close` once at the end raises if any differed, or if a recorded output was never compared.
    """

    def __init__(self, case):
        self.case, self.left, self.bad = case, set(case.outputs), []

    def same(self, key, ours, tol=1e-5, scale=None, select=None):
        """|ours - recorded| <= tol (1 + |recorded|), or tol * scale where a scale is given; select picks recorded rows."""
        self.left.discard(key)
        ref = self.case.outputs[key].double()
        ref = ref if select is None else select(ref)
        ours = torch.as_tensor(ours).detach().double()
        if ours.shape != ref.shape:
            self.bad.append(f"{key}: shape {tuple(ours.shape)}, recorded {tuple(ref.shape)}")
            return
        equal = (ours == ref) | (ours.isnan() & ref.isnan())
        excess = torch.where(equal, 0.0, (ours - ref).abs() / (tol * (scale if scale is not None else 1 + ref.abs())))
        if not (excess <= 1).all():
            self.bad.append(f"{key}: off by {excess.nan_to_num(math.inf).max():.3g} times the tolerance {tol:.1e}")

    def relative(self, key, ours, tol):
        self.same(key, ours, tol, scale=self.case.outputs[key].double().abs().clamp(min=1e-12))

    def skip(self, *keys):
        """Outputs that say nothing about us (a solver's count of calls, a sanity reference)."""
        self.left.difference_update(keys)

    def close(self):
        self.bad += [f"{key}: recorded, but compared with nothing" for key in sorted(self.left)]
        assert not self.bad, f"{self.case.meta.get('source')}: " + "; ".join(self.bad)


class Mixture:
    """The analytic denoiser of the case files: data is a mixture of isotropic Gaussians, so E[x0 | xt] is closed form."""

    def __init__(self, inputs, rows=None):
        pick = lambda v: v.double() if rows is None else v.double()[rows]
        self.means, self.stds, self.weights = (pick(inputs[k]) for k in ("means", "stds", "weights"))

    def __call__(self, x, alpha, sigma):
        """x (B, ...), alpha and sigma numbers or (B,) -> (x0, eps), float64."""
        shape = [-1, *[1] * (x.ndim - 1)]
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64).reshape(shape) for v in (alpha, sigma))
        v = [alpha**2 * s**2 + sigma**2 for s in self.stds]
        d = [x.double() - alpha * m for m in self.means]
        logits = [torch.log(w) - x[0].numel() / 2 * vk.flatten(1).log().squeeze(1)
                  - dk.flatten(1).pow(2).sum(1) / (2 * vk.flatten()) for w, vk, dk in zip(self.weights, v, d)]
        r = [p.reshape(shape) for p in torch.softmax(torch.stack(logits), 0)]
        x0 = sum(rk * (m + alpha * s**2 * dk / vk) for rk, m, s, dk, vk in zip(r, self.means, self.stds, d, v))
        return x0, sum(rk * sigma * dk / vk for rk, dk, vk in zip(r, d, v))

    def log_density(self, x):
        D_, flat = x[0].numel(), x.double()
        each = [torch.log(w) - D_ / 2 * torch.log(2 * math.pi * s**2) - (flat - m).flatten(1).pow(2).sum(1) / (2 * s**2)
                for w, m, s in zip(self.weights, self.means, self.stds)]
        return torch.logsumexp(torch.stack(each), 0)


def network(process, mixture, extra=None):
    """The mixture as a network of `process`: what it predicts, exactly; `extra` gives further channels (learned
    variance)."""

    def model(x, t, y=None):
        out = process.target(*mixture(x, *process.path(t)), t).to(x.dtype)
        return out if extra is None else torch.cat([out, extra(x)], 1)

    return model


class Watched:
    """A denoiser of the mixture on a process that remembers its calls: times, and states divided by alpha if `ve`."""

    def __init__(self, case, process, ve=False):
        self.mixture, self.process, self.ve, self.t, self.x = Mixture(case.inputs), process, ve, [], []

    def __call__(self, x, t):
        a, s = self.process.path(t)
        self.t.append(float(t))
        self.x.append(x / a if self.ve else x)
        return self.process.denoised(self.process.target(*self.mixture(x, a, s), t), x, t)


def pool(case, used=None, scale=1.0):
    """noise(shape): the first `used` recorded tensors, in order, then zeros (a last draw of ours that comes to nothing)."""
    rest = iter(case.inputs["noise"].double()[:used] * scale)
    return lambda shape: next(rest, torch.zeros(())).expand(shape)


def unbounded(prediction="eps"):
    """EDM's process with room for any noise level."""
    return D.EDM(prediction, sigma_min=1e-9, sigma_max=1e9)


def check_sampler(case):
    """A run is a scheduler of diffusers with its options, or a function of an official loop with its own."""
    report = Report(case)
    for name, run in case.config["runs"].items():
        kind = "scheduler" if "scheduler" in run else run["function"]
        RUNS[kind](report, name, run)
    report.close()
