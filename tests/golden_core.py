"""Compares diffusion.py with the recorded numbers of the published implementations: tables, losses, trajectories.

`check_schedule(case)`, `check_loss(case)`, `check_sampler(case)` compare every output that a case records and raise one
AssertionError that names each run and key that differs. What a case asks for is read from its options, never from its name;
an option that nothing here understands raises KeyError or NotImplementedError with its name.
"""

import math

import torch

import diffusion as D


class Report:
    """Collects comparisons; `close` once at the end raises if any differed, or if a recorded output was never compared."""

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
    """The analytic denoiser of specs/samplers.md: data is a mixture of isotropic Gaussians, so E[x0 | xt] is closed form."""

    def __init__(self, inputs, rows=None):
        pick = lambda v: v.double() if rows is None else v.double()[rows]
        self.means, self.stds, self.weights = (pick(inputs[k]) for k in ("means", "stds", "weights"))

    def __call__(self, x, alpha, sigma):
        """x (B, ...), alpha and sigma numbers or (B,) -> (x0, eps), float64."""
        shape = [-1, *[1] * (x.ndim - 1)]
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64).reshape(shape) for v in (alpha, sigma))
        v = [alpha**2 * s**2 + sigma**2 for s in self.stds]
        d = [x.double() - alpha * m for m in self.means]
        logits = [torch.log(w) - x[0].numel() / 2 * vk.flatten(1).log().squeeze(1) - dk.flatten(1).pow(2).sum(1) / (2 * vk.flatten())
                  for w, vk, dk in zip(self.weights, v, d)]
        r = [p.reshape(shape) for p in torch.softmax(torch.stack(logits), 0)]
        x0 = sum(rk * (m + alpha * s**2 * dk / vk) for rk, m, s, dk, vk in zip(r, self.means, self.stds, d, v))
        return x0, sum(rk * sigma * dk / vk for rk, dk, vk in zip(r, d, v))

    def log_density(self, x):
        D_, flat = x[0].numel(), x.double()
        each = [torch.log(w) - D_ / 2 * torch.log(2 * math.pi * s**2) - (flat - m).flatten(1).pow(2).sum(1) / (2 * s**2)
                for w, m, s in zip(self.weights, self.means, self.stds)]
        return torch.logsumexp(torch.stack(each), 0)


def network(process, mixture, extra=None):
    """The mixture as a network of `process`: what it predicts, exactly; `extra` gives further channels (learned variance)."""

    def model(x, t, y=None):
        out = process.target(*mixture(x, process.alpha(t), process.sigma(t)), t).to(x.dtype)
        return out if extra is None else torch.cat([out, extra(x)], 1)

    return model


def pool(case, used=None, scale=1.0):
    """noise(shape): the first `used` recorded tensors, in order, then zeros (a last draw of ours that comes to nothing)."""
    rest = iter(case.inputs["noise"].double()[:used] * scale)
    return lambda shape: next(rest, torch.zeros(())).expand(shape)


# ------------------------------------------------------------------------------------------------------------ schedules


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
    if "respacing" in run:
        process = D.Discrete(betas)
        kept = D.respaced(run["T"], run["respacing"] or str(run["T"]))
        t = torch.tensor(kept, dtype=torch.float64)
        s = torch.cat([torch.tensor([-1.0], dtype=torch.float64), t[:-1]])
        x0_factor, xt_factor, log_small, log_beta = process.posterior(t, s)
        log_small[0] = log_small[1]                       # the published clipping of log beta~_0 = -inf
        ours = {"betas": log_beta.exp(), "alphas_cumprod": process.alpha(t) ** 2, "timestep_map": t,
                "posterior_variance": torch.cat([torch.zeros(1), log_small[1:].exp()]), "posterior_mean_coef1": x0_factor,
                "posterior_log_variance_clipped": log_small, "posterior_mean_coef2": xt_factor}
    else:
        ours = {"betas": betas}
    for key in [k for k in report.case.outputs if k.endswith(f":{name}")]:
        report.same(key, ours[key.split(":")[0]], 1e-6 if report.case.outputs[key].dtype == torch.float32 else 1e-10)


def check_schedule(case):
    report, runs = Report(case), case.config.get("runs", {})
    for name, run in runs.items():
        if "T" in run:
            respacing_tables(report, name, run)
        else:
            raise NotImplementedError(f"schedule case with a run {name!r}: {run}")
    report.close()


# --------------------------------------------------------------------------------------------------------------- losses


def loss_dit(report):
    """Improved DDPM's objectives, as published with DiT; the network is a constant."""
    case = report.case
    x0, noise, output, t = (case.inputs[k] for k in ("x0", "noise", "model_output", "t"))
    for name, run in case.config["runs"].items():
        options = dict(run)
        learned = options.pop("learn_sigma", True)
        objective = "vlb" if options.pop("use_kl", False) else "rescaled" if options.pop("rescale_learned_sigmas", False) else "hybrid"
        options.pop("rescale_learned_sigmas", None)
        kind = "x0" if options.pop("predict_xstart", False) else "eps"
        variance = "small" if options.pop("sigma_small", False) else "large"
        if options:
            raise NotImplementedError(f"loss run {name}: options {options}")
        process = D.Discrete(D.linear_betas(), kind, learned, objective, fixed_variance=variance)
        out = (output if learned else output[:, : x0.shape[1]]).clone().requires_grad_()
        parts = process.loss(lambda x, t, y: out, x0, None, t.float(), noise)
        parts["loss"].mean().backward()
        for key in ("loss", "mse", "vb"):
            if f"{key}:{name}" in case.outputs:
                report.same(f"{key}:{name}", parts[key], 1e-4)
        report.same(f"grad:{name}", out.grad, 1e-4, scale=case.outputs[f"grad:{name}"].abs().max())
    report.same("x_t", process.noised(x0, noise, t.float()))


def loss_rf(report):
    case = report.case
    x0, noise, output = (case.inputs[k] for k in ("x0", "noise", "model_output"))
    for name, density, u in (("logit_normal", "logit-normal", torch.special.ndtr(case.inputs["z"])), ("uniform", "uniform", case.inputs["u"])):
        process = D.RectifiedFlow(density=density)
        t, out = process.training_times(u), output.clone().requires_grad_()
        loss = process.loss(lambda x, t, y: out, x0, None, t, noise)["loss"]
        loss.mean().backward()
        report.same(f"t:{name}", t)
        report.same(f"zt:{name}", process.noised(x0, noise, t))
        report.same(f"per_sample:{name}", loss)
        report.same(f"loss:{name}", loss.mean())
        report.same(f"grad:{name}", out.grad)


LOSSES = [({"model_output", "t"}, loss_dit), ({"model_output", "z"}, loss_rf)]


def check_loss(case):
    """The kind of a loss case shows in its inputs."""
    report = Report(case)
    for inputs, check in LOSSES:
        if inputs <= set(case.inputs):
            check(report)
            return report.close()
    raise NotImplementedError(f"a loss case with inputs {sorted(case.inputs)}")


# ------------------------------------------------------------------------------------------------------------- samplers


def run_dit(report, name, options, tol):
    """Improved DDPM's loops over respaced indices."""
    o, case = dict(options), report.case
    learned, kind = o.pop("learn_sigma", True), o.pop("kind", "ddpm")
    betas = openai_betas({"schedule": o.pop("schedule", "linear"), "T": 1000})
    process = D.Discrete(betas, "x0" if o.pop("predict_xstart", False) else "eps", learned)
    kept = D.respaced(1000, o.pop("respacing"))
    times = torch.tensor([*reversed(kept), -1], dtype=torch.float64)
    seen, predicted = [], []

    def model(x, t, y):
        seen.append(t[0].item())
        return network(process, Mixture(case.inputs), (lambda x: torch.sin(3 * x)) if learned else None)(x, t)

    denoise = process.denoiser(model)
    if o.pop("clip", False):
        denoise = D.clipped(denoise, process)

    def watched(x, t):
        predicted.append((d := denoise(x, t)).x0)
        return d

    draw = {"eta": o.pop("eta", 0.0)} if kind == "ddim" else {"variance": "small" if o.pop("sigma_small", False) else "large"}
    if o:
        raise NotImplementedError(f"sampler run {name}: options {o}")
    states = list(D.SAMPLERS[kind](watched, case.inputs["x_T"].double(), times, process, pool(case), **draw))
    report.same(f"x:{name}", torch.stack(states), tol)
    report.same(f"pred_xstart:{name}", torch.stack(predicted), tol)
    report.same(f"t:{name}", seen)
    report.same(f"timestep_map:{name}", kept)
    abar = process.alpha(times.flip(0)) ** 2
    report.same(f"betas:{name}", 1 - abar[1:] / abar[:-1])


def run_rf(report, name, options, tol):
    """minRF: Euler from t = 1; class c is component c of the mixture, the null class is all of it."""
    o, case = dict(options), report.case
    steps, cfg, null = o.pop("steps"), o.pop("cfg", 2.0), o.pop("use_null", True)
    if o:
        raise NotImplementedError(f"sampler run {name}: options {o}")
    process, classes = D.RectifiedFlow(), (0, 2)

    def conditional(x, t, y):
        t = t / 1000
        return torch.cat([network(process, Mixture(case.inputs, [c]))(x[n : n + 1], t[n : n + 1]) for n, c in enumerate(classes)])

    denoise = process.denoiser(conditional)
    if null:
        whole = network(process, Mixture(case.inputs))
        denoise = D.guided(denoise, process.denoiser(lambda x, t, y: whole(x, t / 1000)), cfg)
    x = case.inputs["x_T"].double()
    states = [x, *D.euler(denoise, x, process.times(steps), process, pool(case))]
    report.same(f"x:{name}", torch.stack(states), tol)


RUNS = {"r_dit": run_dit, "r_rf": run_rf}


# ------------------------------------------------------------------------------- diffusers: from a class and its options


def replaced_last(betas, last):
    """The table with its last alpha_bar replaced: Euler, DPM and UniPC put 2^-24 where zero-SNR has 0."""
    bar = torch.cumprod(1 - betas, 0)
    bar[-1] = last
    return 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])


SD = {"beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"num_train_timesteps": 1000, "shift": 1.0}

# class: (group, sampler, defaults that differ from the common ones)
CLASSES = {
    "DDPMScheduler": ("A", "ddpm", {"clip_sample": True, "variance_type": "fixed_small"}),
    "DDPMParallelScheduler": ("A", "ddpm", {"clip_sample": True, "variance_type": "fixed_small"}),
    "DDIMScheduler": ("A", "ddim", {"clip_sample": True, "set_alpha_to_one": True}),
    "DDIMParallelScheduler": ("A", "ddim", {"clip_sample": True, "set_alpha_to_one": True}),
    "DDIMInverseScheduler": ("A", "ddim-inversion", {"clip_sample": True, "set_alpha_to_one": True}),
    "PNDMScheduler": ("A", "pndm", {"skip_prk_steps": False, "set_alpha_to_one": False}),
    "IPNDMScheduler": ("IPNDM", "ipndm", {}),
    "LCMScheduler": ("distilled", "lcm", SD | {"beta_schedule": "scaled_linear", "original_inference_steps": 50,
                                              "timestep_scaling": 10.0, "set_alpha_to_one": True, "steps_offset": 0}),
    "TCDScheduler": ("distilled", "tcd", SD | {"beta_schedule": "scaled_linear", "original_inference_steps": 50,
                                              "timestep_scaling": 10.0, "set_alpha_to_one": True, "steps_offset": 0}),
    "EulerDiscreteScheduler": ("B", "euler", {"interpolation_type": "linear", "final_sigmas_type": "zero"}),
    "EulerAncestralDiscreteScheduler": ("B", "euler-ancestral", {}),
    "LMSDiscreteScheduler": ("B", "lms", {}),
    "HeunDiscreteScheduler": ("B", "heun", SD),
    "KDPM2DiscreteScheduler": ("B", "dpm2", SD),
    "KDPM2AncestralDiscreteScheduler": ("B", "dpm2-ancestral", SD),
    "DPMSolverSDEScheduler": ("B", "dpmpp-sde", SD),
    "DPMSolverMultistepScheduler": ("C", "multistep", {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
    "DPMSolverSinglestepScheduler": ("C", "singlestep", {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
    "DEISMultistepScheduler": ("C", "deis", {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"}),
    "UniPCMultistepScheduler": ("C", "unipc", {"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None}),
    "SASolverScheduler": ("C", "sa-solver", {"predictor_order": 2, "corrector_order": 2, "tau_func": None,
                                             "algorithm_type": "data_prediction", "final_sigmas_type": "sigma_min"}),
    "FlowMatchEulerDiscreteScheduler": ("flow", "euler", FLOW),
    "FlowMatchHeunDiscreteScheduler": ("flow", "heun", FLOW),
    "FlowMatchLCMScheduler": ("flow", "lcm", FLOW),
    "LTXEulerAncestralRFScheduler": ("flow", "flow-ancestral", {"num_train_timesteps": 1000, "eta": 1.0, "s_noise": 1.0}),
    "EDMEulerScheduler": ("EDM", "euler", {}),
    "EDMDPMSolverMultistepScheduler": ("EDM", "multistep", {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
    "CMStochasticIterativeScheduler": ("EDM", "lcm", {"num_train_timesteps": 40, "s_noise": 1.0, "clip_denoised": True}),
    "SCMScheduler": ("SCM", "lcm", {}),
}
TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
         "rescale_betas_zero_snr": False}
SPACING = {"timestep_spacing": None, "steps_offset": 0}
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
CLIP = {"clip_sample": False, "clip_sample_range": 1.0, "thresholding": False, "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0}
SOLVER = {"solver_order": 2, "lower_order_final": None, "euler_at_final": False, "use_lu_lambdas": False, "use_flow_sigmas": False,
          "flow_shift": 1.0, "final_sigmas_type": "zero", "use_dynamic_shifting": False, "time_shift_type": "exponential",
          "lambda_min_clipped": -math.inf, "variance_type": None}
COMMON = {
    "A": TABLE | SPACING | CLIP, "IPNDM": {"num_train_timesteps": 1000, "trained_betas": None},
    "distilled": TABLE | SPACING | CLIP, "B": TABLE | SPACING | SIGMAS | CLIP,
    "C": TABLE | SPACING | SIGMAS | CLIP | SOLVER,
    "flow": SIGMAS | {"use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
                      "max_image_seq_len": 4096, "shift_terminal": None, "time_shift_type": "exponential",
                      "stochastic_sampling": False, "invert_sigmas": False},
    "EDM": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0,
            "final_sigmas_type": "zero", "num_train_timesteps": 1000} | CLIP | SOLVER,
    "SCM": {"num_train_timesteps": 1000, "sigma_data": 0.5},
}
PREDICTION = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow", "trigflow": "v"}


class Plan:
    """What a scheduler class with its options is in our terms: process, times, sampler, options, what clips."""

    def __init__(self, name, init, n, given, step):
        if name not in CLASSES:
            raise NotImplementedError(f"scheduler class {name}")
        self.group, self.sampler, own = CLASSES[name]
        defaults = {"prediction_type": "epsilon"} | COMMON[self.group] | own
        unknown = set(init) - set(defaults)
        if unknown:
            raise NotImplementedError(f"{name} with options {sorted(unknown)}")
        self.name, self.c, self.n, self.given, self.step = name, defaults | init, n, dict(given), dict(step)
        self.options, self.keep_eps, self.churn, self.noise_scale = {}, False, self.step.pop("s_churn", 0.0), 1.0
        self.kind = PREDICTION[self.c["prediction_type"]]
        getattr(self, "grid_" + self.group)()
        getattr(self, "rule_" + self.sampler.replace("-", "_"), lambda: None)()
        if self.step or self.given:
            raise NotImplementedError(f"{name} with {self.step} {self.given}")

    # grids, by group

    def betas(self, last=None):
        c = self.c
        T, start, end = c["num_train_timesteps"], c["beta_start"], c["beta_end"]
        if c["trained_betas"] is not None:
            betas = torch.tensor(c["trained_betas"], dtype=torch.float64)
        else:
            betas = {"linear": lambda: D.linear_betas(T, start * T / 1000, end * T / 1000),
                     "scaled_linear": lambda: D.BETAS["scaled-linear"](T, start, end), "squaredcos_cap_v2": lambda: D.BETAS["cosine"](T),
                     "sigmoid": lambda: D.BETAS["sigmoid"](T, start, end), "laplace": lambda: D.BETAS["laplace"](T),
                     "exp": lambda: D.BETAS["exp"](T)}[c["beta_schedule"]]()
        if c["rescale_betas_zero_snr"]:
            betas = D.zero_terminal_snr(betas)
            betas = replaced_last(betas, last) if last else betas
        return betas

    def spaced(self, default, n, stride=None, rounded=True):
        """Timesteps by leading, trailing or linspace, noisiest first."""
        spacing = self.c["timestep_spacing"] or default
        if spacing == "leading":
            return self.process.times(n, "leading", offset=self.c["steps_offset"])[:-1]
        times = self.process.times(n, spacing)[:-1]
        return times.round() if rounded else times

    def chain(self, last=None):
        learned = self.c.get("variance_type") == "learned_range"
        self.process = D.Discrete(self.betas(last), self.kind, learned_variance=learned)

    def finish(self, times, last):
        self.times = torch.cat([times, torch.tensor([float(last)], dtype=torch.float64)])

    def noise_levels(self, ends):
        """Times of a Karras, exponential or beta grid, or None."""
        for key, grid in (("karras", "karras"), ("exponential", "exponential"), ("beta", "beta")):
            if self.c[f"use_{key}_sigmas"]:
                return self.process.times(self.n, grid, ends=ends)[:-1]
        if self.c.get("use_lu_lambdas"):
            return self.process.times(self.n, "exponential", ends=ends)[:-1]

    def grid_A(self):
        self.chain()
        base = "leading" if self.name != "DDPMScheduler" or True else None
        times = self.spaced(base, self.n)
        stride = self.process.T // self.n
        if self.sampler == "ddpm":
            self.finish(times, -1)
        elif self.sampler == "ddim":                 # the previous step is t - T//n, whatever the spacing
            final = -1.0 if self.c["set_alpha_to_one"] else 0.0
            self.pairs = [(t, t - stride if t - stride >= 0 else final) for t in times.tolist()]
            self.finish(times, self.pairs[-1][1])
        elif self.sampler == "ddim-inversion":
            below = times[-1].item() - stride
            self.finish(times, below if below >= 0 else -1.0 if self.c["set_alpha_to_one"] else 0.0)
        else:
            self.finish(times, -1 if self.c["set_alpha_to_one"] else 0)

    def grid_IPNDM(self):
        self.process = D.GVP("v")
        s = torch.linspace(1, 0, self.n + 1, dtype=torch.float64)
        self.times = 2 / math.pi * torch.asin(torch.sin(math.pi / 2 * s) ** 2)

    def grid_distilled(self):
        self.chain()
        k = self.process.T // self.c["original_inference_steps"]
        origin = torch.arange(self.c["original_inference_steps"], 0, -1) * k - 1
        chosen = torch.linspace(0, len(origin), self.n + 1, dtype=torch.float64)[:-1].floor().long()
        self.finish(origin[chosen].double(), 0 if self.sampler == "tcd" else -1)

    def grid_B(self):
        self.chain(2.0**-24)
        times = self.spaced("linspace", self.n, rounded=False)
        s = self.process.p(times)
        times = self.noise_levels((s[0].item(), s[-1].item())) if self.noise_levels((2.0, 1.0)) is not None else times
        if self.c.get("interpolation_type") == "log_linear":      # n + 1 levels over the table, of which n steps are made
            ends = self.process.p(torch.tensor([self.process.T - 1.0, 0.0], dtype=torch.float64)).tolist()
            self.times = self.process.times(self.n + 1, "exponential", ends=ends)[:-1]
            return
        self.finish(times, -1 if self.c.get("final_sigmas_type", "zero") == "zero" else 0)

    def grid_C(self):
        c = self.c
        if c["use_flow_sigmas"]:
            self.process = D.RectifiedFlow(self.kind, shift=c["flow_shift"])
            if self.sampler == "unipc":
                times = self.process.times(self.n + 1, "linspace")[:-2]
                times[0] = 1 - 1e-6
            else:
                self.process.t_noisy = 0.999
                times = self.process.times(self.n, "uniform")[:-1]
            # DEIS and SA-Solver repeat the last level: a step of (here almost) no length
            self.finish(times, 0.0 if c["final_sigmas_type"] == "zero" else times[-1].item() * (1 - 1e-9))
            return
        self.chain(2.0**-24)
        spacing = c["timestep_spacing"] or "linspace"
        times = self.spaced("linspace", self.n) if spacing == "trailing" else self.spaced("linspace", self.n + 1)[:-1]
        ends = self.process.p(torch.tensor([self.process.T - 1.0, 0.0], dtype=torch.float64)).tolist()
        levels = self.noise_levels(ends)
        self.finish(times if levels is None else levels, -1 if c["final_sigmas_type"] == "zero" else 0)

    def grid_flow(self):
        c, shift = self.c, self.c.get("shift", 1.0)
        if self.c["invert_sigmas"]:
            raise NotImplementedError("inverted sigmas")
        mu = self.given.pop("mu", None)
        if c["use_dynamic_shifting"]:
            shift = math.exp(mu) if c["time_shift_type"] == "exponential" else mu
        self.process = D.RectifiedFlow(shift=shift)
        sigmas = self.given.pop("sigmas", None)
        if sigmas is not None:
            times = torch.tensor(sigmas, dtype=torch.float64)
            times = times if times[-1] > 0 else times[:-1]
            times = self.process.shifted(times)
            self.n = len(times)
        else:
            if not c["use_dynamic_shifting"]:        # the library takes its ends after one shift, and shifts again
                self.process.t_least = self.process.shifted(torch.tensor(1e-3, dtype=torch.float64)).item()
            times = self.process.times(self.n, "linspace")[:-1]
        if c["shift_terminal"]:
            times = 1 - (1 - times) * (1 - c["shift_terminal"]) / (1 - times[-1])
        self.process.shift = 1.0
        levels = self.noise_levels((times[0].item(), times[-1].item()))
        self.finish(times if levels is None else levels, 0)

    def grid_EDM(self):
        c = self.c
        self.process = D.EDM(sigma_data=c["sigma_data"])
        self.process.t_noisy = math.inf
        self.process.t_noisy = 1e9                   # churn may go above sigma_max
        more = {"rho": c["rho"]} if c["sigma_schedule"] == "karras" else {}
        steps = self.n + (self.sampler == "lcm")     # consistency models end at sigma_min
        times = self.process.times(steps, c["sigma_schedule"], ends=(c["sigma_max"], c["sigma_min"]), **more)[:-1]
        if self.sampler == "lcm":
            self.times = times
        else:
            self.finish(times, 0 if c["final_sigmas_type"] == "zero" else c["sigma_min"])

    def grid_SCM(self):
        self.process = D.GVP("v")
        angles = torch.linspace(1.57080, 0, self.n + 1, dtype=torch.float64)
        if self.n == 2:
            angles[1] = self.given.pop("intermediate_timesteps", 1.3)
        self.times, self.noise_scale = angles * 2 / math.pi, self.c["sigma_data"]

    # options of the rules

    def rule_ddpm(self):
        kind = self.c["variance_type"]
        self.options = {"variance": {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "small"}[kind]}

    def rule_ddim(self):
        self.options = {"eta": self.step.pop("eta", 0.0)}
        self.keep_eps = not self.step.pop("use_clipped_model_output", False)

    def rule_pndm(self):
        self.sampler = "plms" if self.c["skip_prk_steps"] else "pndm"

    def rule_lcm(self):
        self.options = {"scaling": None}
        if self.group == "distilled":
            self.options = {"scaling": self.c["timestep_scaling"]}
        if self.group == "EDM":
            self.options["s_min"] = self.c["sigma_min"]

    def rule_tcd(self):
        self.options = {"eta": self.step.pop("eta", 0.3)}

    def rule_euler(self):
        if self.group == "flow" and self.c["stochastic_sampling"]:
            self.sampler, self.options = "lcm", {"scaling": None}
        if self.churn:
            self.options = {"s_churn": self.churn, "s_min": self.step.pop("s_tmin", 0.0), "s_max": self.step.pop("s_tmax", math.inf),
                            "s_noise": self.step.pop("s_noise", 1.0)}

    def rule_flow_ancestral(self):
        self.options = {"eta": self.c["eta"], "s_noise": self.c["s_noise"]}

    def rule_lms(self):
        self.options = {"order": self.step.pop("order", 4)}

    def orders(self, order):
        """The library's order of each step: 1 at a clean end, lower at the end of short runs."""
        c, n = self.c, self.n
        lower = c["lower_order_final"] in (None, True) and n < 15
        list_ = [order] * n
        if lower:
            list_ = [min(p, n - k) for k, p in enumerate(list_)]
        if c["euler_at_final"] or (c["final_sigmas_type"] == "zero" and self.name != "DEISMultistepScheduler"):
            list_[-1] = 1
        return list_

    def solver(self, form):
        c = self.c
        kinds = {"dpmsolver++": ("x0", 0.0), "dpmsolver": ("eps", 0.0), "sde-dpmsolver++": ("x0", 1.0), "sde-dpmsolver": ("eps", 1.0)}
        form, eta = kinds[c["algorithm_type"]]
        return form, eta, {"midpoint": "half", "heun": "exact"}[c["solver_type"]]

    def rule_multistep(self):
        form, eta, slope = self.solver(self.c)
        published = "sign" if self.c["algorithm_type"] == "sde-dpmsolver++" else "half"
        self.options = {"order": self.orders(self.c["solver_order"]), "form": form, "tau": eta, "slope": slope, "published": published,
                        "lower_final": False}

    def rule_singlestep(self):
        form, eta, slope = self.solver(self.c)
        quadratic = self.c["solver_type"] == "heun"
        if quadratic and self.c["solver_order"] == 3 and eta:
            raise NotImplementedError("sde singlestep of order 3, heun")
        self.options = {"order": self.c["solver_order"], "form": form, "eta": eta, "slope": slope, "quadratic": quadratic}

    def rule_deis(self):
        self.options = {"order": self.orders(self.c["solver_order"]), "lower_final": False}

    def rule_unipc(self):
        c = self.c
        if c["solver_p"]:
            raise NotImplementedError("UniPC with solver_p")
        self.options = {"order": c["solver_order"], "form": "x0" if c["predict_x0"] else "eps", "bh": c["solver_type"],
                        "uncorrected": c["disable_corrector"], "lower_final": c["lower_order_final"] in (None, True)}

    def rule_sa_solver(self):
        c, T = self.c, 1.0
        T = 1000.0 if c["use_flow_sigmas"] else 1.0
        default = lambda t: float(200 <= math.floor(t * T) <= 800)
        taus = {None: default, "one": 1.0, "half": 0.5, "zero": 0.0}
        self.options = {"order": c["predictor_order"], "corrector": c["corrector_order"], "tau": taus[c["tau_func"]],
                        "form": {"data_prediction": "x0", "noise_prediction": "eps"}[c["algorithm_type"]],
                        "lower_final": c["lower_order_final"] in (None, True)}

    # running

    def run_churned(self, denoise, x, noise):
        """The library's churn asks the network before it adds the noise, and uses that output after: with sigma_hat unbounded,
        hence in x/alpha and without the table."""
        table, grid = self.process, self.process.p(self.times)
        ve = D.EDM("eps")
        ve.t_noisy = 1e9
        alpha = lambda s: 1.0 if self.group == "EDM" else float(1 / (1 + s * s) ** 0.5)
        here = {"x": x / alpha(grid[0]), "n": 0}

        def stale(x_hat, s_hat):
            s, t = grid[here["n"]], self.times[here["n"]].item()
            x0 = denoise(here["x"] * alpha(s), t).x0
            if self.group == "EDM":                  # x0 = c_skip x_hat + c_out F, F from the old x
                skip = lambda s: table.sigma_data**2 / (s**2 + table.sigma_data**2)
                out = lambda s: s * table.sigma_data / (s**2 + table.sigma_data**2) ** 0.5
                x0 = skip(s_hat) * x_hat + out(s_hat) * (x0 - skip(s) * here["x"]) / out(s)
            else:                                    # x0 = x_hat - sigma_hat eps, eps from the old x
                x0 = x_hat - s_hat * (here["x"] - x0) / s
            return D.Denoised(x0, (x_hat - x0) / s_hat)

        for n, state in enumerate(D.euler(stale, here["x"], grid, ve, noise, **self.options)):
            here.update(x=state, n=n + 1)
            yield state * (alpha(grid[n + 1]))

    def clip(self, denoise):
        c = self.c
        if c.get("thresholding"):
            return D.clipped(denoise, self.process, c["sample_max_value"], c["dynamic_thresholding_ratio"])
        if c.get("clip_sample") or c.get("clip_denoised"):
            return D.clipped(denoise, self.process, c.get("clip_sample_range", 1.0), keep_eps=self.keep_eps)
        return denoise

    def run(self, denoise, x, noise):
        """All states after x, by our sampler."""
        if self.churn:
            yield from self.run_churned(denoise, x, noise)
            return
        if self.sampler == "ipndm":                  # the library divides by max(alpha, 1e-8): at alpha = 0 it loses x0
            inner = denoise
            denoise = lambda x, t: inner(x, t)._replace(x0=0 * x) if t == 1 else inner(x, t)
        make = {"multistep": D.multistep, "singlestep": D.singlestep}.get(self.sampler) or D.SAMPLERS[self.sampler]
        if hasattr(self, "pairs"):
            for pair in self.pairs:
                (x,) = make(denoise, x, torch.tensor(pair, dtype=torch.float64), self.process, noise, **self.options)
                yield x
        else:
            yield from make(denoise, x, self.times, self.process, noise, **self.options)


def run_diffusers(report, name, run, tol):
    case = report.case
    given = dict(run["set_timesteps"])
    n = given.pop("num_inference_steps", None)
    plan = Plan(run["scheduler"], run["init"], n, given, run["step"])
    process, space = plan.process, run["space"]
    mixture, calls, outputs = Mixture(case.inputs), [], []
    scale = lambda t: float(process.alpha(torch.tensor([t], dtype=torch.float64))) if space == "ve" else 1.0

    def network_denoise(x, t):                       # what a network of the run's prediction says, read by our process
        t = D.batch_time(t, x)
        out = process.target(*mixture(x, process.alpha(t), process.sigma(t)), t)
        outputs.append(out)
        if process.learned_variance:
            outputs[-1] = torch.cat([out, torch.sin(3 * x)], 1)
        return process.denoised(outputs[-1], x, t)

    clipped = plan.clip(network_denoise)

    def watched(x, t):
        calls.append((t, x / scale(t)))
        return clipped(x, t)

    start = run["init_scale"] * case.inputs["x_T"].double() * scale(plan.times[0].item())
    states = list(plan.run(watched, start, pool(case, run["noise_used"], plan.noise_scale)))
    final = states[-1] / scale(plan.times[-1].item())
    if plan.c.get("variance_type") == "fixed_large" and calls[-1][0] > 0:     # t > 0 in the last step: the library adds noise
        final = final + process.sigma(torch.tensor(calls[-1][0], dtype=torch.float64)) * case.inputs["noise"][run["noise_used"] - 1]
    report.same(f"x:{name}", torch.stack([x for _, x in calls[1:]] + [final]), tol)
    t = torch.tensor([t for t, _ in calls], dtype=torch.float64)
    a, s = process.alpha(t), process.sigma(t)
    report.left -= {f"alpha:{name}", f"sigma:{name}", f"t:{name}", f"pred0:{name}", f"sigmas:{name}"}
    if space == "ve":
        a, s = a / a, s / a
    for key, ours in (("alpha", a), ("sigma", s)):
        ref = case.outputs[f"{key}:{name}"]
        if ((ours - ref).abs() > 1e-3 * ref.abs() + 1e-5).any() and not plan.churn:
            report.bad.append(f"grid {key}:{name}: {ours} recorded {ref}")


def check_sampler(case):
    report = Report(case)
    for name, run in case.config["runs"].items():
        if "scheduler" in run:
            try:
                run_diffusers(report, name, run, run["tol"])
            except NotImplementedError as error:
                report.bad.append(f"{name}: {error}")
        else:
            RUNS[run["function"]](report, name, run["options"], run["tol"])
    report.close()
