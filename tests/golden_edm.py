"""Recorded trajectories of NVlabs' edm_sampler and ablation_sampler, and their noise levels."""

import math
from functools import partial

import torch
from recorded import RUNS, Watched, check_sampler, pool, unbounded

import diffusion as D
import samplers as S

RANGES = {"edm": (80.0, 0.002), "ve": (100.0, 0.02), "iddpm": (81.0, 0.002), "vp": None}


class SqrtTime(D.EDM):
    """VE as in EDM's table 1: sigma = sqrt(t)."""

    def sigma(self, t):
        return t.sqrt()

    def time_of(self, s):
        return s * s


def edm_levels(kind, n, ends, rho=7.0):
    """EDM's four discretisations, noise levels from the noisiest down."""
    if kind == "vp":
        vp = D.VP()
        return vp.p(S.grid_times(vp, n, "linspace")[:-1])
    if kind == "iddpm":
        chain = D.Discrete(D.cosine_betas())
        u = chain.p(torch.arange(999.0, -1, -1, dtype=torch.float64))
        u = u[(u >= ends[1]) & (u <= ends[0])]
        u = torch.cat([u, u.new_zeros(1)]) if ends[1] <= 0 else u
        return u[torch.linspace(0, len(u) - 1, n, dtype=torch.float64).round().long()]
    grid, options = {"edm": (S.karras, {"rho": rho}), "ve": (S.exponential, {})}[kind]
    return S.grid_times(unbounded(), n, partial(grid, sigma_max=ends[0], sigma_min=ends[1], **options))[:-1]


def run_edm(report, name, run):
    o, case, tol = dict(run["options"]), report.case, run["tol"]
    o.pop("fn", None)
    n, alpha = o.pop("num_steps", 18), o.pop("alpha", 1)
    solver, kind = o.pop("solver", "heun"), o.pop("discretization", "edm")
    schedule, scaling, rho = o.pop("schedule", "linear"), o.pop("scaling", "none"), o.pop("rho", 7)
    churn = {k.lower(): o.pop(k) for k in ("S_churn", "S_min", "S_max", "S_noise") if k in o}
    high, low = RANGES[kind] or (None, None)
    ends = o.pop("sigma_max", high), o.pop("sigma_min", low)
    if o or (kind == "vp" and ends != (None, None)):
        raise NotImplementedError(f"{name}: options {o} {ends}")
    make = {("vp", "vp"): lambda: D.VP("eps"), ("linear", "none"): unbounded,
            ("ve", "none"): lambda: SqrtTime("eps", sigma_min=1e-9, sigma_max=1e9)}
    process = make[schedule, scaling]()
    process.t_noisy = 1e9
    times = torch.cat([process.time(edm_levels(kind, n, ends, rho)), torch.zeros(1, dtype=torch.float64)])
    watch = Watched(case, process, ve=True)
    start = case.inputs["x_T"].double() * process.path(times[0].item())[1]
    if (schedule, solver, alpha) == ("linear", "heun", 1):
        walk = partial(S.edm, **{"s_churn": 0.0, "s_min": 0.0, "s_max": math.inf, "s_noise": 1.0} | churn)
    else:                                              # solved in EDM's t, where sigma(t) is not t, by its alpha
        method = solver if alpha == 1 else ((alpha,), ((1,),), (1 - 1 / (2 * alpha), 1 / (2 * alpha)))
        walk = partial(S.sit_ode, method=method, **churn)
        if kind != "edm" or schedule != "linear":      # there a last step by Euler in t is not DDIM's
            walk = partial(by_euler_at_last, walk)
    *_, x = walk(watch, start, times, process, pool(case))
    report.same(f"x:{name}", x, tol)
    report.same(f"net_x:{name}", torch.stack(watch.x), tol)
    report.relative(f"net_sigma:{name}", process.p(torch.tensor(watch.t, dtype=torch.float64)),
                    1e-3 if kind == "iddpm" else 1e-6)      # iDDPM's table is float32 there


def by_euler_at_last(walk, denoise, x, times, process, noise):
    """The last step is Euler's in t, as in the library: with churn before it, like all."""
    *_, x = walk(denoise, x, times[:-1], process, noise)
    options = {**walk.keywords, "method": "euler"}
    if options.get("s_churn"):
        options["s_churn"] /= len(times) - 1
    step = partial(S.sit_ode, **options)
    end = torch.stack([times[-2], torch.tensor(1e-12, dtype=torch.float64)])
    (x,) = step(denoise, x, end, process, noise)
    yield x


RUNS["r_edm"] = run_edm
CHECKS = {"sampler": check_sampler}
