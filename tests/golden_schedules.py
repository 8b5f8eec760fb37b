"""Recorded tables, grids, paths and densities: of improved DDPM, diffusers, SiT, score_sde, k-diffusion and EDM."""

import math
from functools import partial

import torch
from diffusers_plan import plan_of, table
from golden_diffusers import compare_grid, walk, with_clipping
from golden_edm import RANGES, edm_levels
from recorded import Report, unbounded

import diffusion as D
import samplers as S


def openai_betas(run):
    """Improved DDPM's names; without explicit ends they scale with T."""
    if run["schedule"] == "squaredcos_cap_v2":
        return D.cosine_betas(run["T"])
    if "beta_start" not in run:
        return D.BETAS[run["schedule"]](run["T"])
    scale = run["T"] / 1000 if run["schedule"] == "linear" else 1
    return D.BETAS[run["schedule"]](run["T"], run["beta_start"] * scale, run["beta_end"] * scale)


def respacing_tables(report, name, run):
    betas = openai_betas(run)
    ours = {"betas": betas}
    if "respacing" in run:
        process = D.Discrete(betas)
        kept = D.respaced(run["T"], run["respacing"] or str(run["T"]))
        t = torch.tensor(kept, dtype=torch.float64)
        s = torch.cat([torch.tensor([-1.0], dtype=torch.float64), t[:-1]])
        x0_factor, xt_factor, log_small, log_beta = process.posterior(t, s)
        log_small[0] = log_small[1]                       # the published clipping of log beta~_0 = -inf
        ours = {"betas": log_beta.exp(), "alphas_cumprod": process.alpha(t) ** 2, "timestep_map": t,
                "posterior_variance": torch.cat([torch.zeros(1), log_small[1:].exp()]),
                "posterior_mean_coef1": x0_factor, "posterior_mean_coef2": xt_factor,
                "posterior_log_variance_clipped": log_small}
    for key in [k for k in report.case.outputs if k.endswith(f":{name}")]:
        report.same(key, ours[key.split(":")[0]], 1e-6 if report.case.outputs[key].dtype == torch.float32 else 1e-10)


def diffusers_betas(report, name, run):
    """Its tables are products in float32: sigma near t = 0 moves by up to 3e-4."""
    options = {"beta_start": 1e-4, "beta_end": 0.02} | run
    c = plan_of("HeunDiscreteScheduler", options, {"num_inference_steps": 10}, {}).c
    T, names = c.num_train_timesteps, {"squaredcos_cap_v2": "cosine", "scaled_linear": "scaled-linear"}
    ends = {"linear": (c.beta_start * T / 1000, c.beta_end * T / 1000), "scaled_linear": (c.beta_start, c.beta_end),
            "sigmoid": (c.beta_start, c.beta_end)}.get(c.beta_schedule, ())
    betas = table(c) if c.trained_betas else D.BETAS[names.get(c.beta_schedule, c.beta_schedule)](T, *ends)
    betas = D.zero_terminal_snr(betas) if c.rescale_betas_zero_snr else betas
    report.same(f"beta:{name}", betas, 1e-5 if c.rescale_betas_zero_snr else 2e-6)
    report.same(f"alpha_bar:{name}", torch.cumprod(1 - betas, 0), 2e-6)


def diffusers_grid(report, name, run):
    """Times at which a scheduler asks the network, and its noise levels without repetitions."""
    plan = plan_of(run["scheduler"], run["init"], {"num_inference_steps": run["num_inference_steps"]}, {})
    asked = []

    def idle(x, t):
        asked.append(float(t))
        return D.Denoised(x, x)

    zeros = lambda shape: torch.zeros(shape, dtype=torch.float64)
    list(walk(plan, with_clipping(plan, idle), zeros((1, 1, 1, 1)), zeros))
    compare_grid(report, plan, name, torch.tensor(asked, dtype=torch.float64))


def paths(report, t, norm):
    """SiT's paths, in its time 1 - t, and score_sde's."""
    ours = {}
    for name, make in (("linear", D.RectifiedFlow), ("gvp", D.GVP), ("vp", D.VP)):
        process = make("velocity")
        a, s, da, ds = process.rates(1 - t)
        f, g = process.sde(1 - t)
        ours |= {f"sit_{name}_alpha": a, f"sit_{name}_sigma": s, f"sit_{name}_dalpha": -da, f"sit_{name}_dsigma": -ds,
                 f"sit_{name}_drift_coef": -f, f"sit_{name}_drift_var": g**2 / 2}
        for form in ("sbdm", "sigma", "linear", "constant", "decreasing", "increasing-decreasing"):
            key = f"sit_{name}_diffusion_{'SBDM' if form == 'sbdm' else form}"
            ours[key] = [S.diffusion_coefficient(process, i, form, norm) for i in S.levels(process, 1 - t)]
    for key in [key for key in ours if key in report.left]:
        report.same(key, ours[key], 1e-6)
    for name, make in (("ve", D.VE), ("vp", D.VP), ("subvp", D.SubVP)):
        process = make("eps")
        a, s, *_ = process.rates(t)
        f, g = process.sde(t)
        for key, value in (("mean", a), ("std", s), ("drift", f), ("diffusion", g)):
            report.same(f"sde_{name}_{key}", value, 1e-5)


def grids(n, rho):
    """k-diffusion's and EDM's noise levels."""
    k = lambda grid, **o: S.grid_times(unbounded(), n, partial(grid, sigma_max=14.6, sigma_min=0.03, **o))
    vp = D.VP()
    own = {"k_karras": k(S.karras), "k_exponential": k(S.exponential), "k_polyexponential": k(S.exponential, rho=rho),
           "k_vp": torch.cat([vp.p(S.grid_times(vp, n, "linspace")[:-1]), torch.zeros(1, dtype=torch.float64)])}
    return own | {f"edm_{kind}": edm_levels(kind, n, ends) for kind, ends in RANGES.items()}


def densities(u, z):
    """Noise levels and times from given uniform (u) and normal (z) numbers; SD3's weights."""
    edm, flow, of_z = unbounded(), D.RectifiedFlow(), torch.special.ndtr(z)
    snr = ((1 - u) / u) ** 2
    of_flow = lambda w: w / (1 + u / (1 - u)) ** 2
    return {
        "k_log_normal": D.log_normal(edm, u), "k_log_uniform": D.log_uniform(edm, u, low=0.01, high=80.0),
        "k_log_logistic": D.log_logistic(edm, u), "k_v_diffusion": D.v_diffusion(edm, u),
        "k_cosine_interpolated": D.cosine_interpolated(edm, u, image=64, noise_low=32, noise_high=64),
        "sd3_mode": D.mode(flow, u), "sd3_logit_normal": D.logit_normal(flow, of_z, mean=0.3, std=0.8),
        "edm_sigma_from_z": D.log_normal(edm, of_z), "rf_logit_normal_from_z": D.logit_normal(flow, of_z),
        "sd3_weight_sigma_sqrt": of_flow(D.sigma_sqrt(snr)), "sd3_weight_cosmap": of_flow(D.cosmap(snr))}


def continuous(report):
    case = report.case
    t, u, z, n = case.inputs["t"], case.inputs["u"], case.inputs["z"].double(), int(case.inputs["n"])
    paths(report, t, case.config["norm"])
    second = torch.log(case.outputs["k_polyexponential"][1] / 0.03) / math.log(14.6 / 0.03)
    rho = math.log(second) / math.log((n - 2) / (n - 1))             # not recorded, but the second level tells it
    ours = grids(n, rho) | densities(u, z)
    for key in [k for k in report.left if k.startswith("shift")]:
        ours[key] = D.RectifiedFlow(shift=float(key[5:])).shifted(u)
    for key in [key for key in ours if key in report.left]:
        report.same(key, ours[key], 1e-3 if key == "edm_iddpm" else 1e-5)


def check_schedule(case):
    report = Report(case)
    if "t" in case.inputs:
        continuous(report)
    for name, run in case.config.get("runs", {}).items():
        if "T" in run:
            respacing_tables(report, name, run)
        elif "scheduler" in run:
            diffusers_grid(report, name, run)
        else:
            diffusers_betas(report, name, run)
    report.close()


CHECKS = {"schedule": check_schedule}
