"""Recorded trajectories of score_sde's predictor-corrector samplers and ODE, and of diffusers' copies."""

import math
from functools import partial

import torch
from recorded import RUNS, Watched, check_sampler, pool

import diffusion as D
import samplers as S

PREDICTORS = {"reverse_diffusion": "reverse", "euler_maruyama": "euler", "ancestral_sampling": "ancestral",
              "none": "none"}


class Coded:
    """The discretised kernels of its code: a step is 1/N whatever the grid."""

    def transition(self, i, j, first_order=False):
        if first_order or isinstance(self, D.SubVP):   # it has no discretisation of its own
            return super().transition(i, i._replace(t=i.t - 1 / self.N), True)
        k = math.floor(i.t * (self.N - 1))
        if self.exploding:                           # N levels, evenly in log sigma
            s = lambda k: self.sigma_min * (self.sigma_max / self.sigma_min) ** (k / (self.N - 1)) if k >= 0 else 0.0
            return 1.0, s(k) ** 2 - s(k - 1) ** 2
        beta = (self.beta_min + k / (self.N - 1) * (self.beta_max - self.beta_min)) / self.N  # DDPM's N betas
        return math.sqrt(1 - beta), beta


class CodedVE(Coded, D.VE):
    pass


class CodedVP(Coded, D.VP):
    pass


class CodedSubVP(Coded, D.SubVP):
    pass


def score_process(kind, N=None, sigma_max=50.0):
    process = {"ve": lambda: CodedVE("score", sigma_max=sigma_max), "vp": lambda: CodedVP("eps"),
               "subvp": lambda: CodedSubVP("eps")}[kind]()
    process.N, process.t_least = N, 1e-5 if kind == "ve" else 1e-3
    return process


def compare(report, name, kind, N, tol, predictor="reverse_diffusion", corrector=None, sigma_max=50.0, **options):
    case, process = report.case, score_process(kind, N, sigma_max)
    times = S.grid_times(process, N, "linspace")
    watch = Watched(case, process)
    x = case.inputs["x_T"].double() * (sigma_max if kind == "ve" else 1)
    options |= {"predictor": PREDICTORS[predictor], "corrector": corrector or "none"}
    draw = pool(case)
    if kind == "ve" and predictor == "ancestral_sampling":           # its noise has the levels of the discrete kernel
        draw = rescaled(process, S.steps(process, times), draw, corrector and options.get("corrections", 1))
    states = list(S.pc(watch, x, times, process, draw, **options))
    calls = (predictor != "none") + options.get("corrections", 1) * (options["corrector"] != "none")
    report.same(f"x:{name}", torch.stack(states[:-1]), tol, select=lambda ref: ref[:-1])
    report.same(f"x_mean:{name}", states[-1], tol)
    report.same(f"t:{name}", times[:-1], 1e-6)
    if f"x_corrected:{name}" in case.outputs:
        corrected = torch.stack(states if predictor == "none" else watch.x[calls - 1::calls])
        report.same(f"x_corrected:{name}", corrected, tol)
    return process, times


def rescaled(process, steps, draw, corrections):
    """Noise whose every (corrections + 1)th draw is that of the predictor, with sigma of the kernel's N levels and
    not of the step's time."""
    calls = iter(range(10**6))

    def noise(shape):
        n, of = divmod(next(calls), (corrections or 0) + 1)
        if of < (corrections or 0):
            return draw(shape)
        i, j = steps[n]
        _, g2 = process.transition(i, j)
        sigma = process.sigma_min * (process.sigma_max / process.sigma_min) ** (math.floor(i.t * (process.N - 1))
                                                                                  / (process.N - 1))
        return draw(shape) * math.sqrt(max(0.0, 1 - g2 / sigma**2) / (1 - g2 / i.sigma**2))

    return noise


def run_score(report, name, run):
    o = dict(run["options"])
    kind, N = o.pop("kind"), o.pop("N")
    o["corrections"] = o.pop("n_steps", o.pop("n_steps_each", 1))
    compare(report, name, kind, N, run["tol"], **o)


def run_ode(report, name, run):
    case, kind = report.case, run["options"]["kind"]
    process = score_process(kind)
    times = torch.tensor([1.0, process.t_least], dtype=torch.float64)
    x = case.inputs["x_T"].double() * (50.0 if kind == "ve" else 1)
    *_, x = S.rk45(Watched(case, process), x, times, process, None)
    report.same(f"x:{name}", x, run["tol"])
    report.skip(f"nfe:{name}")


def run_ve(report, name, run):
    """diffusers' ScoreSdeVeScheduler."""
    o = dict(run["options"])
    n, options = o.pop("n"), {"snr": o.pop("snr", 0.15), "corrections": o.pop("correct_steps", 1)}
    process, times = compare(report, name, "ve", n, run["tol"], corrector="langevin", **options, **o)
    report.relative(f"sigma:{name}", process.sigma(times[:-1]), 1e-5)
    grid = partial(S.exponential, sigma_max=process.sigma_max, sigma_min=0.01 + 1e-9)
    levels = process.sigma(S.grid_times(process, n, grid)[:-1])
    report.relative(f"discrete_sigmas:{name}", levels.flip(0), 1e-4)


def run_vp(report, name, run):
    """diffusers' ScoreSdeVpScheduler."""
    compare(report, name, "vp", run["options"]["n"], run["tol"], "euler_maruyama")


RUNS |= {"r_ss": run_score, "r_ssode": run_ode, "run_ve": run_ve, "run_vp": run_vp}
CHECKS = {"sampler": check_sampler}
