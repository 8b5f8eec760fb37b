"""Recorded trajectories of k-diffusion's functions: states x0 + sigma eps, which is EDM's process."""

import math

import torch
from recorded import RUNS, Watched, check_sampler, pool, unbounded

import samplers as S

FUNCTIONS = {                                          # function: our sampler, the library's names of its options
    "sample_euler": ("euler", {"s_churn": "s_churn", "s_tmin": "s_min", "s_tmax": "s_max"}),
    "sample_heun": ("heun", {"s_churn": "s_churn", "s_tmin": "s_min", "s_tmax": "s_max"}),
    "sample_dpm_2": ("dpm2", {"s_churn": "s_churn", "s_tmin": "s_min", "s_tmax": "s_max"}),
    "sample_lms": ("lms", {}),
    "sample_euler_ancestral": ("euler-ancestral", {}),
    "sample_dpm_2_ancestral": ("dpm2-ancestral", {}),
    "sample_dpmpp_2s_ancestral": ("dpmpp-2s-ancestral", {}),
    "sample_dpmpp_sde": ("dpmpp-sde", {}),
    "sample_dpmpp_2m": ("dpmpp-2m", {}),
    "sample_dpmpp_2m_sde": ("dpmpp-2m-sde", {"solver_type": "solver"}),
    "sample_dpmpp_3m_sde": ("dpmpp-3m-sde", {}),
    "sample_dpm_fast": (None, {}),
    "sample_dpm_adaptive": ("dpm-adaptive", {}),
}


def fast_blocks(high, low, n):
    """dpm_fast's blocks of 3 calls and a last one of 2 or 1, all equally long in log sigma: (calls, log sigma at the
    start, at the end)."""
    blocks = n // 3 + 1
    sizes = [3] * (blocks - 2) + [2, 1] if n % 3 == 0 else [3] * (blocks - 1) + [n % 3]
    ends = torch.linspace(math.log(high), math.log(low), blocks + 1).tolist()          # in float32, as there
    return list(zip(sizes, ends, ends[1:]))


def fast(denoise, x, times, process, noise, n, eta=0.0):
    """dpm_fast: DPM-Solver in blocks; with noise each goes down to the level below its end (never below the last level),
    then up. That level and the block's length are found in float32 there, where they cancel."""
    for size, a, b in fast_blocks(*times.tolist(), n):
        i, j = (S.at(process, lam=-v) for v in (a, b))
        high, low = torch.tensor([a, b]).exp()
        down = (low**2 - (eta * (low**2 * (high**2 - low**2) / high**2).sqrt()) ** 2).sqrt().log().item()
        k = S.at(process, lam=-max(down, math.log(times[-1])))
        k = k._replace(lam=i.lam + (torch.tensor(a) - torch.tensor(-k.lam)).item())
        d = denoise(x, i.t)
        if size == 1:
            x = S.taylor_step(x, i, k, "eps", [d.eps])
        else:
            x, _ = S.adaptive_step(denoise, x, i, k, d, process, order=size)
        x = S.raised(x, k, j, noise(x.shape)) if eta else x
        yield x


def run_kdiffusion(report, name, run):
    o, case, tol = dict(run["options"]), report.case, run["tol"]
    function, sig, n = o.pop("fn"), o.pop("sig"), o.pop("n", None)
    sampler, renamed = FUNCTIONS[function]
    options = {renamed.get(key, key): value for key, value in o.items()}
    process = unbounded()
    if isinstance(sig, str):
        times = torch.tensor([float(v) for v in reversed(sig.split(","))], dtype=torch.float64)
    else:
        times = torch.tensor(sig, dtype=torch.float64)
    if function == "sample_lms":                     # also its last step is of full order
        times = times.clamp(min=1e-9)
    watch = Watched(case, process)
    walk, options = (fast, options | {"n": n}) if n else (S.SAMPLERS[sampler], options)
    *_, x = walk(watch, case.inputs["x_T"].double() * times[0], times, process, pool(case), **options)
    report.same(f"x:{name}", x, tol)
    slack = 10 if "adaptive" in function else 1      # the library's adaptive solver keeps its time in float32
    report.same(f"net_x:{name}", torch.stack(watch.x), slack * tol)
    report.same(f"net_sigma:{name}", watch.t, slack * 1e-5)


RUNS["r_k"] = run_kdiffusion
CHECKS = {"sampler": check_sampler}
