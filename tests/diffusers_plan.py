"""A scheduler class of diffusers, with its options, in our terms: a process, times, a sampler and its options. What
only that library does, and nobody would choose, is here or in `golden_diffusers.py`, each with a sentence."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import diffusion as D
import samplers as S

SD = {"beta_start": 0.00085, "beta_end": 0.012}
DISTILLED = SD | {"beta_schedule": "scaled_linear", "original_inference_steps": 50, "timestep_scaling": 10.0,
                  "set_alpha_to_one": True}
COGVIDEO = SD | {"beta_schedule": "scaled_linear", "snr_shift_scale": 3.0, "set_alpha_to_one": True,
                 "clip_sample": True}
MULTISTEP = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "solver_order": 2, "euler_at_final": False,
             "use_lu_lambdas": False, "lambda_min_clipped": -math.inf, "variance_type": None,
             "final_sigmas_type": "zero"}
TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
         "trained_betas": None, "rescale_betas_zero_snr": False, "clip_sample": False, "clip_sample_range": 1.0,
         "thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "timestep_spacing": None,
         "steps_offset": 0}
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "sigma_min": None,
          "sigma_max": None}
SOLVER = TABLE | SIGMAS | {"solver_order": 2, "lower_order_final": True, "use_flow_sigmas": False, "flow_shift": 1.0,
                           "use_dynamic_shifting": False, "time_shift_type": "exponential", "shift_terminal": None,
                           "lambda_min_clipped": -math.inf, "variance_type": None}
FLOW = SIGMAS | {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5,
                 "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "shift_terminal": None,
                 "time_shift_type": "exponential", "stochastic_sampling": False, "invert_sigmas": False}
EDM = SOLVER | {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0,
                "final_sigmas_type": "zero"}

# class: (its family, our sampler, its options and defaults)
CLASSES = {
    "DDPMScheduler": ("table", "ddpm", TABLE | {"clip_sample": True, "variance_type": "fixed_small"}),
    "DDIMScheduler": ("table", "ddim", TABLE | {"clip_sample": True, "set_alpha_to_one": True}),
    "DDIMInverseScheduler": ("table", "ddim-inversion", TABLE | {"clip_sample": True, "set_alpha_to_one": True}),
    "PNDMScheduler": ("table", "pndm", TABLE | {"skip_prk_steps": False, "set_alpha_to_one": False}),
    "CogVideoXDDIMScheduler": ("table", "ddim", TABLE | COGVIDEO),
    "CogVideoXDPMScheduler": ("table", "dpmpp-2m-sde", TABLE | COGVIDEO),
    "IPNDMScheduler": ("ipndm", "ipndm", {"num_train_timesteps": 1000, "trained_betas": None}),
    "LCMScheduler": ("distilled", "lcm", TABLE | DISTILLED),
    "TCDScheduler": ("distilled", "tcd", TABLE | DISTILLED),
    "ConsistencyDecoderScheduler": ("decoder", "consistency", {"num_train_timesteps": 1024, "sigma_data": 0.5}),
    "DDPMWuerstchenScheduler": ("wuerstchen", "ddpm", {"scaler": 1.0, "s": 0.008}),
    "EulerDiscreteScheduler": ("sigmas", "euler", TABLE | SIGMAS | {
        "interpolation_type": "linear", "final_sigmas_type": "zero", "timestep_type": "discrete"}),
    "EulerAncestralDiscreteScheduler": ("sigmas", "euler-ancestral", TABLE | SIGMAS),
    "LMSDiscreteScheduler": ("sigmas", "lms", TABLE | SIGMAS),
    "HeunDiscreteScheduler": ("sigmas", "heun", TABLE | SIGMAS | SD),
    "KDPM2DiscreteScheduler": ("sigmas", "dpm2", TABLE | SIGMAS | SD),
    "KDPM2AncestralDiscreteScheduler": ("sigmas", "dpm2-ancestral", TABLE | SIGMAS | SD),
    "DPMSolverSDEScheduler": ("sigmas", "dpmpp-sde", TABLE | SIGMAS | SD),
    "DPMSolverMultistepScheduler": ("solver", "multistep", SOLVER | MULTISTEP),
    "DPMSolverSinglestepScheduler": ("solver", "singlestep", SOLVER | MULTISTEP | {"lower_order_final": False}),
    "DEISMultistepScheduler": ("solver", "deis", SOLVER | {"algorithm_type": "deis", "solver_type": "logrho"}),
    "UniPCMultistepScheduler": ("solver", "unipc", SOLVER | {
        "predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None,
        "final_sigmas_type": "zero"}),
    "SASolverScheduler": ("solver", "sa-solver", SOLVER | {
        "predictor_order": 2, "corrector_order": 2, "tau_func": None, "algorithm_type": "data_prediction"}),
    "FlowMatchEulerDiscreteScheduler": ("flow", "euler", FLOW),
    "FlowMatchHeunDiscreteScheduler": ("flow", "heun", FLOW),
    "FlowMatchLCMScheduler": ("flow", "consistency", FLOW | {"scale_factors": None, "upscale_mode": "bicubic"}),
    "LTXEulerAncestralRFScheduler": ("flow", "flow-ancestral", FLOW | {"eta": 1.0, "s_noise": 1.0}),
    "FlowMapEulerDiscreteScheduler": ("flow", "flow-map", FLOW),
    "MiniMaxH3Scheduler": ("flow", "euler", FLOW | {"shift": 12.0}),
    "EDMEulerScheduler": ("edm", "euler", EDM),
    "EDMDPMSolverMultistepScheduler": ("edm", "multistep", EDM | MULTISTEP),
    "CosineDPMSolverMultistepScheduler": ("edm", "multistep", EDM | MULTISTEP | {
        "algorithm_type": "sde-dpmsolver++", "sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0,
        "sigma_schedule": "exponential", "prediction_type": "v_prediction"}),
    "CMStochasticIterativeScheduler": ("edm", "consistency", EDM | {
        "num_train_timesteps": 40, "s_noise": 1.0, "clip_denoised": True}),
    "SCMScheduler": ("scm", "consistency", {"num_train_timesteps": 1000, "sigma_data": 0.5}),
}
CLASSES |= {f"{name}ParallelScheduler": CLASSES[f"{name}Scheduler"] for name in ("DDPM", "DDIM")}
# read by `golden_diffusers.py`; or about nothing that a trajectory depends on; or without effect beside other options
ELSEWHERE = {"clip_sample", "clip_sample_range", "clip_denoised", "thresholding", "dynamic_thresholding_ratio",
             "sample_max_value", "algorithm_type", "solver_type", "steps_offset", "beta_start", "beta_end",
             "trained_betas", "beta_schedule", "timestep_spacing", "flow_shift", "time_shift_type", "s_noise",
             "set_alpha_to_one", "interpolation_type", "timestep_type", "upscale_mode", "stochastic_sampling",
             "rescale_betas_zero_snr", "lambda_min_clipped", "final_sigmas_type", "use_dynamic_shifting",
             "lower_order_final"}
PREDICTION = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow", "trigflow": "v"}


class Options(SimpleNamespace):
    """A class's options, which knows what was asked for."""

    def __getattribute__(self, name):
        values = super().__getattribute__("__dict__")
        values.setdefault("_read", set()).add(name)
        return super().__getattribute__(name)


def plan_of(name, init, given, step):
    """What a class with its options is: process, times, sampler, options, and told(t), the time that it tells the
    network. Raises NotImplementedError, with their names, for what nothing here understands."""
    if name not in CLASSES:
        raise NotImplementedError(f"scheduler class {name}")
    family, sampler, defaults = CLASSES[name]
    defaults = {"prediction_type": "epsilon"} | defaults
    if set(init) - set(defaults):
        raise NotImplementedError(f"{name} with options {sorted(set(init) - set(defaults))}")
    plan = SimpleNamespace(name=name, family=family, sampler=sampler, c=Options(**defaults | init), options={},
                           given=dict(given), step=dict(step), told=lambda t: t, scale=1.0, last_noise=False,
                           log_linear=False)
    plan.n, plan.kind = plan.given.pop("num_inference_steps", None), PREDICTION[plan.c.prediction_type]
    if sampler in ("multistep", "singlestep"):                     # names of other classes' options stand for its own
        plan.c.solver_type = plan.c.solver_type if plan.c.solver_type in ("midpoint", "heun") else "midpoint"
        plan.c.algorithm_type = "dpmsolver++" if plan.c.algorithm_type == "deis" else plan.c.algorithm_type
    if sampler != "ddpm" and str(getattr(plan.c, "variance_type", None)).startswith("learned"):
        raise NotImplementedError(f"{name} with learned variance")
    FAMILIES[family](plan, plan.c)
    ignored = {k for k, v in init.items() if v != defaults[k]} - plan.c._read - ELSEWHERE
    if ignored:
        raise NotImplementedError(f"{name} with {', '.join(sorted(ignored))}")
    if plan.step or [v for v in plan.given.values() if v is not None]:
        raise NotImplementedError(f"{name} with {plan.step} {plan.given}")
    return plan


# --------------------------------------------------------------------------------------------- tables and their spacing


def table(c, last=None):
    """The library's table as betas: its own is a product in float32, which moves sigma near t = 0 by up to 3e-4.
    last: what Euler, DPM and UniPC put for the last alpha_bar of a table with zero terminal SNR."""
    T, start, end = c.num_train_timesteps, c.beta_start, c.beta_end
    if c.trained_betas is not None:
        betas = torch.tensor(c.trained_betas, dtype=torch.float64)
    elif c.beta_schedule == "linear":
        betas = D.linear_betas(T, start * T / 1000, end * T / 1000)
    else:
        ends = {"scaled_linear": (start, end), "sigmoid": (start, end)}.get(c.beta_schedule, ())
        ours = {"squaredcos_cap_v2": "cosine"}.get(c.beta_schedule, c.beta_schedule.replace("_", "-"))
        betas = D.BETAS[ours](T, *ends)
    if c.rescale_betas_zero_snr:
        root = torch.cumprod(1 - betas.float(), 0).sqrt()           # D.zero_terminal_snr in float32, as there
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        betas = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    alpha_bar = torch.cumprod(1 - betas.float(), 0).double()
    if c.rescale_betas_zero_snr and last:
        alpha_bar[-1] = last
    return D.betas_of(alpha_bar)


def spaced(c, n, T, default, drop=0, clipped=None):
    """Timesteps by leading, trailing or linspace, noisiest first; drop: of n + drop the least noisy are left out."""
    spacing, top = c.timestep_spacing or default, clipped or T
    if spacing == "linspace":
        return np.linspace(0, top - 1, n + drop)[::-1][:n]
    if spacing == "leading":
        return (np.arange(n + drop) * (top // (n + drop)))[::-1][:n] + float(c.steps_offset)
    return np.round(np.arange(top, 0, -T / n)) - 1


def grid_of(plan, c, ends):
    """Times of a Karras, exponential, beta or Lu grid between two noise levels, or None."""
    for option, grid in (("karras", S.karras), ("exponential", S.exponential), ("beta", S.beta)):
        if getattr(c, f"use_{option}_sigmas") or option == "exponential" and getattr(c, "use_lu_lambdas", False):
            high, low = c.sigma_max or ends[0], c.sigma_min or ends[1]
            return S.grid_times(plan.process, plan.n, partial(grid, sigma_max=high, sigma_min=low))[:-1].tolist()
    return None


def finish(plan, times, last):
    plan.times = torch.tensor([*times, last], dtype=torch.float64)
    plan.n = len(times)


# ------------------------------------------------------------------------------------------------------------- families


def of_table(plan, c):
    """alpha_bar looked up at whole t. The previous step of DDIM and PNDM is t - T//n, whatever the spacing: right for
    leading, off by one for trailing, wrong for linspace. `pairs` are the steps that they take."""
    betas, T = table(c), c.num_train_timesteps
    if hasattr(c, "snr_shift_scale"):                # CogVideoX: alpha_bar/(s + (1 - s) alpha_bar), then zero SNR at T
        betas = D.shifted_betas(table(SimpleNamespace(**vars(c) | {"rescale_betas_zero_snr": False})),
                                c.snr_shift_scale**0.5)
        betas = D.zero_terminal_snr(betas) if c.rescale_betas_zero_snr else betas
    plan.process = D.Discrete(betas, plan.kind, learned_variance=getattr(c, "variance_type", None) == "learned_range")
    listed = plan.given.pop("timesteps", None)
    times = [float(t) for t in (listed or np.round(spaced(c, plan.n, T, "leading")).tolist())]
    stride, final = T // (plan.n or len(times)), -1.0 if getattr(c, "set_alpha_to_one", True) else 0.0
    finish(plan, times, final)
    below = lambda t: t - stride if t >= stride else final
    if plan.sampler == "ddim":
        plan.pairs = [(t, below(t)) for t in times]
        plan.options = {"eta": plan.step.pop("eta", 0.0)} if not hasattr(c, "snr_shift_scale") else {}
        plan.clipped_eps = plan.step.pop("use_clipped_model_output", False)
    elif plan.sampler == "ddim-inversion":
        plan.times[-1] = below(times[-1])
    elif plan.sampler == "pndm":
        plan.sampler = "plms" if c.skip_prk_steps else "pndm"
        plan.pairs = [(t, below(t)) for t in times]
    elif plan.sampler == "ddpm":
        plan.last_noise = c.variance_type == "fixed_large" and times[-1] > 0      # noise is added at t > 0
        plan.options = {"variance": "large" if c.variance_type == "fixed_large" else "small"}


def of_ipndm(plan, c):
    plan.process = D.GVP("v")
    s = torch.linspace(1, 0, plan.n + 1, dtype=torch.float64)
    plan.times = 2 / math.pi * torch.asin(torch.sin(math.pi / 2 * s) ** 2)


def of_distilled(plan, c):
    plan.process, original = D.Discrete(table(c), plan.kind), c.original_inference_steps
    origin = np.arange(original, 0, -1) * (plan.process.T // original) - 1
    listed = plan.given.pop("timesteps", None)
    chosen = np.floor(np.linspace(0, original, plan.n or 1, endpoint=False)).astype(int)
    finish(plan, listed or origin[chosen].tolist(), 0.0 if plan.sampler == "tcd" else -1.0)
    plan.options = {"scaling": c.timestep_scaling}
    if plan.sampler == "tcd":                        # has the option, and does nothing with it
        plan.options = {"eta": plan.step.pop("eta", 0.3)}


def of_decoder(plan, c):
    plan.process = D.Discrete(D.betas_of(torch.cumprod(1 - D.cosine_betas(c.num_train_timesteps).float(), 0).double()),
                              "edm", sigma_data=c.sigma_data)
    finish(plan, [1008.0, 512.0], -1.0)


def of_wuerstchen(plan, c):
    """alpha_bar is kept in [1e-4, 0.9999]: times stay where it is."""
    plan.process = D.ContinuousCosine(plan.kind, offset=c.s, power=c.scaler)
    ends = [plan.process.time(torch.tensor((1 / a - 1) ** 0.5, dtype=torch.float64)).item() for a in (1e-4, 0.9999)]
    finish(plan, np.linspace(1, 0, plan.n + 1)[:-1].clip(max=ends[0]).tolist(), ends[1])
    plan.told = lambda t: torch.where(t < ends[0], t, 1.0)


def of_sigmas(plan, c):
    """States are x/alpha, levels lie between whole steps."""
    plan.process = D.Discrete(table(c, 2.0**-24), plan.kind)
    plan.log_linear = getattr(c, "interpolation_type", "") == "log_linear"
    sigmas = plan.given.pop("sigmas", None)
    listed = plan.given.pop("timesteps", None)
    if sigmas is not None:
        times = S.listed_times(plan.process, sigmas=sigmas)[:-1].tolist()
    else:
        times = listed or spaced(c, plan.n, plan.process.T, "linspace").tolist()
        ends = [times[0], times[-1]] if not plan.log_linear else [plan.process.T - 1.0, 0.0]
        listed = listed or grid_of(plan, c, plan.process.p(torch.tensor(ends, dtype=torch.float64)).tolist())
        times = listed or times
    plan.log_linear = plan.log_linear and not (sigmas or listed)
    if plan.log_linear:                                            # n + 1 levels over the table, which make n steps
        ends = plan.process.p(torch.tensor([plan.process.T - 1.0, 0.0], dtype=torch.float64)).tolist()
        grid = partial(S.exponential, sigma_max=ends[0], sigma_min=ends[1])
        times = S.grid_times(plan.process, plan.n + 1, grid)[:-1].tolist()
        finish(plan, times[:-1], times[-1])
    else:
        finish(plan, times, -1.0 if getattr(c, "final_sigmas_type", "zero") == "zero" else 0.0)
    if getattr(c, "timestep_type", "") == "continuous" and plan.kind == "v":
        plan.told = lambda t: 0.25 * torch.log(plan.process.p(torch.as_tensor(t, dtype=torch.float64)))
    take = {"lms": {"order": 4}, "euler": dict.fromkeys(("s_churn", "s_tmin", "s_tmax", "s_noise")),
            "dpmpp-sde": {"s_noise": 1.0}}.get(plan.sampler, {})
    plan.options = {key: plan.step.pop(key) for key in take if key in plan.step}


def of_solver(plan, c):
    """States of VP at whole t, or at noise levels between; or of a flow."""
    flow_shift = math.exp(plan.given.pop("mu", None) or math.log(c.flow_shift))
    final = getattr(c, "final_sigmas_type", "sigma_min")
    if c.use_flow_sigmas:
        plan.process = D.RectifiedFlow(plan.kind, shift=flow_shift)
        plan.process.t_noisy = 1.0
        T = c.num_train_timesteps
        high, low = (1.0, 1 / T) if plan.sampler == "unipc" else (1 - 1 / T, 0.0)
        times = plan.process.shifted(torch.linspace(high, low, plan.n + 1, dtype=torch.float64)[:-1])
        if c.shift_terminal:
            times = 1 - (1 - times) * (1 - c.shift_terminal) / (1 - times[-1])
        plan.process.shift = 1.0
        times[0] = min(times[0].item(), 1 - 1e-6)
        last = times[-1].item()
        if plan.sampler in ("multistep", "singlestep"):                # the table's own, as a time of the flow
            last = D.Discrete(table(c)).p(torch.zeros((), dtype=torch.float64)).item()
        finish(plan, times.tolist(), 0.0 if final == "zero" else last)
        plan.told = lambda t: T * t
    else:
        plan.process = D.Discrete(table(c, 2.0**-24), plan.kind)
        T, lam = plan.process.T, -torch.log(plan.process.p(torch.arange(plan.process.T).double()))
        clipped = T - torch.searchsorted(lam.flip(0), c.lambda_min_clipped).item()
        listed = plan.given.pop("timesteps", None)
        times = listed or np.round(spaced(c, plan.n, T, "linspace", (c.timestep_spacing != "trailing") * 1, clipped))
        ends = plan.process.p(torch.tensor([T - 1.0, 0.0], dtype=torch.float64)).tolist()
        times = grid_of(plan, c, ends) or [float(t) for t in times]
        levels = final != "zero" and any(getattr(c, f"use_{k}_sigmas") for k in ("karras", "exponential", "beta"))
        finish(plan, times, times[-1] if levels and not plan.sampler.endswith("step") else -1.0 * (final == "zero"))
    OPTIONS[plan.sampler](plan, c)


def of_flow(plan, c):
    shift, mu = c.shift, plan.given.pop("mu", None)
    if c.use_dynamic_shifting:
        shift = math.exp(mu) if c.time_shift_type == "exponential" else mu
    plan.process, sigmas = D.RectifiedFlow(shift=shift), plan.given.pop("sigmas", None)
    if sigmas is not None:
        times = plan.process.shifted(torch.tensor([s for s in sigmas if s > 0], dtype=torch.float64))
    elif plan.name.startswith(("FlowMap", "MiniMax")):
        points = plan.n + 1 if plan.name.startswith("FlowMap") else plan.n
        times = plan.process.shifted(torch.linspace(1, 0, points, dtype=torch.float64)[:-1])
    else:                                            # the library takes its ends after one shift, and shifts again
        low = torch.tensor(1 / c.num_train_timesteps, dtype=torch.float64)
        low = low if c.use_dynamic_shifting else plan.process.shifted(low)
        times = plan.process.shifted(torch.linspace(1, low.item(), plan.n, dtype=torch.float64))
    if c.shift_terminal:
        times = 1 - (1 - times) * (1 - c.shift_terminal) / (1 - times[-1])
    plan.process.shift, plan.n = 1.0, len(times)
    times = torch.tensor(grid_of(plan, c, (times[0].item(), times[-1].item())) or times.tolist(), dtype=torch.float64)
    finish(plan, (1 - times if c.invert_sigmas else times).tolist(), float(c.invert_sigmas))
    plan.told = (lambda t: 1 - t) if plan.name.startswith("MiniMax") else (lambda t: c.num_train_timesteps * t)
    if plan.sampler == "flow-ancestral":
        plan.options = {"eta": c.eta, "s_noise": c.s_noise}
    elif c.stochastic_sampling:
        plan.sampler = "consistency"


def of_edm(plan, c):
    plan.process = D.EDM(sigma_data=c.sigma_data, sigma_min=1e-9, sigma_max=1e9)
    grid, rho = {"karras": (S.karras, {"rho": c.rho}), "exponential": (S.exponential, {})}[c.sigma_schedule]
    grid, T = partial(grid, sigma_min=c.sigma_min, sigma_max=c.sigma_max, **rho), c.num_train_timesteps
    plan.told = lambda t: torch.log(torch.as_tensor(t, dtype=torch.float64)) / 4
    if plan.name.startswith("Cosine"):
        plan.told = lambda t: torch.atan(torch.as_tensor(t, dtype=torch.float64)) / math.pi * 2
    if plan.sampler == "consistency":                # a stride over the training grid, or its steps, then sigma_min
        times, listed = S.grid_times(plan.process, T, grid)[:-1], plan.given.pop("timesteps", None)
        finish(plan, times[sorted(listed or range(0, T // plan.n * plan.n, T // plan.n))].tolist(), c.sigma_min)
        plan.told = lambda t: 250 * torch.log(torch.as_tensor(t, dtype=torch.float64) + 1e-44)
        plan.options = {"sigma_min": c.sigma_min, "s_noise": c.s_noise}
        return
    times = S.grid_times(plan.process, plan.n, grid)[:-1].tolist()
    finish(plan, times, 0.0 if c.final_sigmas_type == "zero" else c.sigma_min)
    if plan.sampler == "euler":
        plan.options = {key: plan.step.pop(key) for key in list(plan.step)}
    else:
        OPTIONS[plan.sampler](plan, c)


def of_scm(plan, c):
    plan.process, middle = D.GVP("v"), plan.given.pop("intermediate_timesteps", 1.3)
    angles = torch.linspace(1.57080, 0, plan.n + 1, dtype=torch.float64)            # a little more than pi/2
    plan.process.t_noisy = 1.001
    if plan.n == 2:
        angles[1] = middle
    plan.times, plan.scale = angles * 2 / math.pi, c.sigma_data
    plan.told = lambda t: t * math.pi / 2


FAMILIES = {"table": of_table, "ipndm": of_ipndm, "distilled": of_distilled, "decoder": of_decoder,
            "wuerstchen": of_wuerstchen, "sigmas": of_sigmas, "solver": of_solver, "flow": of_flow, "edm": of_edm,
            "scm": of_scm}


# ----------------------------------------------------------------------------------------------- options of the solvers


def of_multistep(plan, c):
    """The library's order of each step: 1 at a clean end, lower at the end of short runs."""
    n, orders = plan.n, []
    for k in range(n):
        lower = c.lower_order_final and n < 15
        to_clean = getattr(c, "final_sigmas_type", "") == "zero"
        last = k == n - 1 and (getattr(c, "euler_at_final", False) or lower or to_clean)
        order = 1 if last else min(c.solver_order, k + 1)
        orders.append(min(order, 2) if lower and k == n - 2 else order)
    plan.orders = orders


def of_deis(plan, c):
    of_multistep(plan, c)


def of_singlestep(plan, c):
    plan.options = {"order": c.solver_order, "solver": c.solver_type}


def of_unipc(plan, c):
    bh = c.solver_type if c.solver_type in ("bh1", "bh2") else "bh2"                 # as there
    plan.options = {"order": c.solver_order, "form": "x0" if c.predict_x0 else "eps", "bh": bh,
                    "uncorrected": tuple(c.disable_corrector), "lower_final": c.lower_order_final}


def of_sa(plan, c):
    T = float(c.num_train_timesteps) if c.use_flow_sigmas else 1.0
    taus = {"one": 1.0, "half": 0.5, "zero": 0.0}
    plan.options = {"order": c.predictor_order, "corrector": c.corrector_order, "lower_final": c.lower_order_final,
                    "tau": taus.get(c.tau_func, lambda t: float(200 <= math.floor(t * T) <= 800)),
                    "form": {"data_prediction": "x0", "noise_prediction": "eps"}[c.algorithm_type]}


OPTIONS = {"multistep": of_multistep, "deis": of_deis, "singlestep": of_singlestep, "unipc": of_unipc,
           "sa-solver": of_sa}
