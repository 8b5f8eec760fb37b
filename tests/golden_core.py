"""Compares diffusion.py with the recorded numbers of the published implementations: tables, losses, trajectories.

`check_schedule(case)`, `check_loss(case)`, `check_sampler(case)` compare every output that a case records and raise one
AssertionError that names each run and key that differs. What a case asks for is read from its options, never from its
name; an option that nothing here understands raises KeyError or NotImplementedError with its name.
"""

import math

import torch

import diffusion as D


class Report:
    """Collects comparisons; `close` once at the end raises if any differed, or if a recorded output was never
    compared."""

    def __init__(self, case):
        self.case, self.left, self.bad = case, set(case.outputs), []

    def same(self, key, ours, tol=1e-5, scale=None, select=None):
        """|ours - recorded| <= tol (1 + |recorded|), or tol * scale where a scale is given; select picks recorded
        rows."""
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
    """The analytic denoiser of the case files: data is a mixture of isotropic Gaussians, so E[x0 | xt] is closed
    form."""

    def __init__(self, inputs, rows=None):
        pick = lambda v: v.double() if rows is None else v.double()[rows]
        self.means, self.stds, self.weights = (pick(inputs[k]) for k in ("means", "stds", "weights"))

    def __call__(self, x, alpha, sigma):
        """x (B, ...), alpha and sigma numbers or (B,) -> (x0, eps), float64."""
        shape = [-1, *[1] * (x.ndim - 1)]
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64).reshape(shape) for v in (alpha, sigma))
        v = [alpha**2 * s**2 + sigma**2 for s in self.stds]
        d = [x.double() - alpha * m for m in self.means]
        logits = [
            torch.log(w)
            - x[0].numel() / 2 * vk.flatten(1).log().squeeze(1)
            - dk.flatten(1).pow(2).sum(1) / (2 * vk.flatten())
            for w, vk, dk in zip(self.weights, v, d)
        ]
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
        out = process.target(*mixture(x, process.alpha(t), process.sigma(t)), t).to(x.dtype)
        return out if extra is None else torch.cat([out, extra(x)], 1)

    return model


def pool(case, used=None, scale=1.0):
    """noise(shape): the first `used` recorded tensors, in order, then zeros (a last draw of ours that comes to
    nothing)."""
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
        ours = {
            "betas": log_beta.exp(),
            "alphas_cumprod": process.alpha(t) ** 2,
            "timestep_map": t,
            "posterior_variance": torch.cat([torch.zeros(1), log_small[1:].exp()]),
            "posterior_mean_coef1": x0_factor,
            "posterior_log_variance_clipped": log_small,
            "posterior_mean_coef2": xt_factor,
        }
    else:
        ours = {"betas": betas}
    for key in [k for k in report.case.outputs if k.endswith(f":{name}")]:
        report.same(key, ours[key.split(":")[0]], 1e-6 if report.case.outputs[key].dtype == torch.float32 else 1e-10)


def schedule_betas(report, name, run):
    """diffusers' tables, which are float32 products: sigma near t = 0 moves by up to 3e-4."""
    plan = Plan(
        "HeunDiscreteScheduler",
        {"beta_start": 1e-4, "beta_end": 0.02, **{k: v for k, v in run.items() if k != "rescale_betas_zero_snr"}},
        10,
        {},
        {},
    )
    plan.c["rescale_betas_zero_snr"] = run.get("rescale_betas_zero_snr", False)
    betas = plan.betas()
    report.same(f"beta:{name}", betas, 1e-5 if plan.c["rescale_betas_zero_snr"] else 2e-6)
    report.same(f"alpha_bar:{name}", torch.cumprod(1 - betas, 0), 2e-6)


def schedule_grid(report, name, run):
    """Times at which a scheduler asks the network, and its noise levels without repetitions."""
    plan = Plan(run["scheduler"], run["init"], run["num_inference_steps"], {}, {})
    asked = []

    def idle(x, t):
        asked.append(float(t))
        return D.Denoised(x, x)

    list(
        plan.run(
            idle, torch.zeros(1, 1, 1, 1, dtype=torch.float64), lambda shape: torch.zeros(shape, dtype=torch.float64)
        )
    )
    grid_outputs(report, plan, name, torch.tensor(asked, dtype=torch.float64))


def grid_outputs(report, plan, name, t):
    """The recorded times t of the network's calls, and noise levels without repetitions, against our grid."""
    process, times = plan.process, plan.times
    ref = report.case.outputs[f"t:{name}"]
    levels = any(plan.c.get(f"use_{k}") for k in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"))
    # a flow's time is 1000 sigma, EDM's log(sigma)/4; a grid of noise levels rounds or interpolates its times in its
    # own way
    told = {"flow": 1000 * t, "EDM": t.log() / 4, "SCM": t * math.pi / 2}.get(plan.group, t)
    told = 1000 * t if plan.c.get("use_flow_sigmas") else told
    told = told * 1000 if plan.sampler == "lcm" and plan.group == "EDM" else told
    slack = 1.0 if levels or plan.c.get("use_flow_sigmas") else 2e-3
    if plan.sampler.startswith("dpm2"):              # middle points, by another interpolation of the time
        slack = max(slack, 0.01)
    # the library's times do not belong to its levels, and it lacks a step
    if plan.c.get("interpolation_type") == "log_linear":
        report.skip(f"t:{name}")
        times = torch.cat([times, torch.tensor([-1.0])])
        ref = told
    if f"t:{name}" in report.left:
        report.same(f"t:{name}", told, slack, scale=torch.ones(()) if ref.abs().max() > 2 else torch.ones(()) * 0.01)
    if f"sigmas:{name}" in report.left:
        s = process.sigma(times) if plan.c.get("use_flow_sigmas") or plan.group == "flow" else process.p(times)
        unique = lambda ref: torch.unique_consecutive(ref)
        report.same(
            f"sigmas:{name}",
            torch.unique_consecutive(s.float()),
            1e-3,
            scale=unique(report.case.outputs[f"sigmas:{name}"]).clamp(min=1e-3),
            select=unique,
        )
    if f"sigmas_interpol:{name}" in report.left:     # KDPM2's middle points, at the second calls
        middle = process.p(t)[1::2] if plan.sampler == "dpm2" else None
        select = lambda ref: ref[1 : 1 + 2 * len(process.p(t)[1::2]) : 2]
        if middle is None:
            report.skip(f"sigmas_interpol:{name}")
        else:
            report.same(f"sigmas_interpol:{name}", middle, 1e-3, select=select)
    if f"alphas:{name}" in report.left:              # iPNDM: "betas" is sigma, "alphas" alpha
        report.same(f"alphas:{name}", process.alpha(times), 1e-5)
        report.same(f"betas:{name}", process.sigma(times), 1e-5)


def schedule_continuous(report):
    case = report.case
    t, u, z, n = case.inputs["t"], case.inputs["u"], case.inputs["z"].double(), int(case.inputs["n"])
    norm = case.config["norm"]
    for name, make in (("linear", D.RectifiedFlow), ("gvp", D.GVP), ("vp", D.VP)):
        process = make("velocity")
        a, s, da, ds = process.rates(1 - t)
        ours = {
            "alpha": a,
            "sigma": s,
            "dalpha": -da,
            "dsigma": -ds,
            "drift_coef": -da / a,
            "drift_var": process.half_g2(1 - t),
        }
        levels = D.levels(process, 1 - t)
        for form in D.DIFFUSIONS:
            ours[f"diffusion_{'SBDM' if form == 'sbdm' else form}"] = [
                D.DIFFUSIONS[form](process, i, norm) for i in levels
            ]
        for key, value in ours.items():
            if f"sit_{name}_{key}" in report.left:
                report.same(f"sit_{name}_{key}", value, 1e-6)
    for name, make in (("ve", D.VE), ("vp", D.VP), ("subvp", D.SubVP)):
        process = make("eps")
        a, s, da, ds = process.rates(t)
        for key, value in (("mean", a), ("std", s), ("drift", da / a), ("diffusion", (2 * process.half_g2(t)).sqrt())):
            report.same(f"sde_{name}_{key}", value, 1e-5)
    edm = unbounded()
    zero = torch.zeros(1, dtype=torch.float64)
    k = lambda grid, **o: edm.times(n, grid, ends=(14.6, 0.03), **o)
    vp = D.VP()
    ours = {
        "k_karras": k("karras"),
        "k_exponential": k("exponential"),
        "k_polyexponential": k("exponential", rho=float(case.config.get("rho", 1.0))),
        "k_vp": torch.cat([vp.p(vp.times(n, "linspace")[:-1]), zero]),
    }
    ours |= {
        f"edm_{kind}": edm_levels(
            kind, n, {"edm": (80.0, 0.002), "ve": (100.0, 0.02), "iddpm": (81.0, 0.002), "vp": None}[kind]
        )
        for kind in ("vp", "ve", "iddpm", "edm")
    }
    ours |= {
        "k_log_normal": D.DENSITIES["log-normal"][0](u, -1.2, 1.2),
        "k_log_uniform": D.DENSITIES["log-uniform"][0](u, 0.01, 80.0),
        "sd3_mode": D.DENSITIES["mode"][0](u),
        "sd3_logit_normal": D.DENSITIES["logit-normal"][0](torch.special.ndtr(z), 0.3, 0.8),
        "edm_sigma_from_z": D.DENSITIES["log-normal"][0](torch.special.ndtr(z)),
        "rf_logit_normal_from_z": D.DENSITIES["logit-normal"][0](torch.special.ndtr(z)),
    }
    snr = ((1 - u) / u) ** 2
    of_flow = lambda w: w / (1 + u / (1 - u)) ** 2
    ours |= {
        "sd3_weight_sigma_sqrt": of_flow(D.WEIGHTINGS["sigma-sqrt"][0](snr)),
        "sd3_weight_cosmap": of_flow(D.WEIGHTINGS["cosmap"][0](snr)),
    }
    report.skip("k_cosine_interpolated", "k_log_logistic", "k_v_diffusion")     # densities that we do not offer
    for key in [k for k in report.left if k.startswith("shift")]:
        ours[key] = D.RectifiedFlow(shift=float(key[5:])).shifted(u)
    for key, value in ours.items():
        if key in report.left:
            report.same(key, value, 1e-3 if key == "edm_iddpm" else 1e-5)


def check_schedule(case):
    report = Report(case)
    if "t" in case.inputs:
        schedule_continuous(report)
    for name, run in case.config.get("runs", {}).items():
        if "T" in run:
            respacing_tables(report, name, run)
        elif "scheduler" in run:
            schedule_grid(report, name, run)
        elif "beta_schedule" in run:
            schedule_betas(report, name, run)
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
        objective = (
            "vlb"
            if options.pop("use_kl", False)
            else "rescaled"
            if options.pop("rescale_learned_sigmas", False)
            else "hybrid"
        )
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
    for name, density, u in (
        ("logit_normal", "logit-normal", torch.special.ndtr(case.inputs["z"])),
        ("uniform", "uniform", case.inputs["u"]),
    ):
        process = D.RectifiedFlow(density=density)
        t, out = process.training_times(u), output.clone().requires_grad_()
        loss = process.loss(lambda x, t, y: out, x0, None, t, noise)["loss"]
        loss.mean().backward()
        report.same(f"t:{name}", t)
        report.same(f"zt:{name}", process.noised(x0, noise, t))
        report.same(f"per_sample:{name}", loss)
        report.same(f"loss:{name}", loss.mean())
        report.same(f"grad:{name}", out.grad)


def noisy_gradient(report, name, process, t, x0, noise, output, weight=None):
    """loss, gradient of its mean, noisy input and time of one loss whose network is a constant."""
    out = output.clone().requires_grad_()
    loss = process.loss(lambda x, t, y: out, x0, None, t, noise)["loss"]
    loss.mean().backward()
    return loss, out.grad, process.noised(x0, noise, t)


def loss_sit(report):
    """SiT's losses; its time is 1 - ours."""
    case = report.case
    x0, noise, u = (case.inputs[k] for k in ("x1", "noise", "u"))
    for name, run in case.config["runs"].items():
        kind = {"velocity": "velocity", "noise": "eps", "score": "score"}[run["prediction"]]
        weighting = {"velocity": "velocity", "likelihood": "likelihood", None: "snr" if kind == "score" else None}[
            run["weight"]
        ]
        process = SIT[run["path"]](kind, weighting=None if kind == "velocity" else weighting, density="uniform")
        t = process.training_times(1 - u)
        out = case.inputs["model_output"]
        out = -out if kind == "velocity" else out      # its velocity points to the data
        loss, grad, xt = noisy_gradient(report, name, process, t, x0, noise, out)
        report.same(f"loss:{name}", loss, 1e-4)
        report.same(
            f"grad:{name}", -grad if kind == "velocity" else grad, 1e-4, scale=case.outputs[f"grad:{name}"].abs().max()
        )
        report.same(f"xt:{name}", xt)
        report.same(f"t:{name}", 1 - t)


def loss_edm(report):
    """The four preconditionings of table 1 as our processes with a network that undoes what we tell it of t, and three
    losses."""
    case = report.case
    x, sigma, x0, noise = (case.inputs[k].double() for k in ("x", "sigma", "x0", "noise"))
    u, z = case.inputs["rnd_uniform"].flatten().double(), case.inputs["rnd_normal"].flatten().double()
    F = lambda z, c: torch.sin(z) + 0.1 * c.view(-1, 1, 1, 1)
    edm, vp, ve = D.EDM(), D.VP("eps"), D.VE("score")
    ve.s_min, ve.s_max = 1e-4, 100.0                 # the preconditioning does not depend on the range
    iddpm = D.Discrete(D.cosine_betas(), "eps", learned_variance=True)
    # our network time back to log sigma
    to_log = lambda t: t / 1000 * math.log(80 / 0.002) + math.log(0.002)
    networks = {
        "EDMPrecond": (edm, lambda x, t, y: F(x, to_log(t) / 4)),
        "VPPrecond": (vp, lambda x, t, y: F(x, t)),
        "VEPrecond": (
            ve,
            lambda x, t, y: (
                F(x * (ve.sigma(t / 1000) ** 2 + 0.25).sqrt().view(-1, 1, 1, 1), (ve.sigma(t / 1000) / 2).log())
                / ve.sigma(t / 1000).view(-1, 1, 1, 1)
            ),
        ),
        "iDDPMPrecond": (iddpm, lambda x, t, y: torch.cat([F(x, t)] * 2, 1)),
    }

    def denoised(name, x, sigma):
        process, model = networks[name]
        t = process.time_of(sigma).round() if name == "iDDPMPrecond" else process.time_of(sigma)
        return process.denoiser(model)(x * process.alpha(t).view(-1, 1, 1, 1), t).x0

    table = iddpm.p(torch.arange(999.0, -2, -1, dtype=torch.float64))
    nearest = (sigma[:, None] - table[None]).abs().argmin(1)
    rounded = table[nearest]
    for name in networks:
        s = rounded if name == "iDDPMPrecond" else sigma
        xs = x
        report.same(f"D:{name}", denoised(name, xs, s), 1e-3 if name == "iDDPMPrecond" else 2e-5)
        report.skip(f"sigma_range:{name}")
    report.relative("iddpm_rounded_sigma", rounded, 1e-3)
    if "iddpm_u" in report.left:
        stride = 1000 // (len(case.outputs["iddpm_u"]) - 1)
        report.same("iddpm_u", table[::stride], 1e-3)
    levels = {
        "EDMLoss": D.DENSITIES["log-normal"][0](torch.special.ndtr(z)),
        "VPLoss": vp.p(1 + u * (1e-5 - 1)),
        "VELoss": 0.02 * (100 / 0.02) ** u,
    }
    for name, s in levels.items():
        s = s.view(-1, 1, 1, 1)
        D_x = denoised(name.replace("Loss", "Precond"), x0 + noise * s, s.flatten())
        if f"loss:{name}" in report.left:
            weight = D.WEIGHTINGS["edm"][0](s**-2) / s**2 if name == "EDMLoss" else s**-2
            report.same(f"loss:{name}", weight * (D_x - x0) ** 2, 1e-4)
            if name == "EDMLoss":                    # the same through process.loss, whose mean is over the pixels
                parts = edm.loss(networks["EDMPrecond"][1], x0, None, s.flatten(), noise * s / s)
                report.same(f"loss:{name}", parts["loss"], 1e-4, select=lambda ref: ref.flatten(1).mean(1))


def loss_weights(report):
    case, c = report.case, report.case.config
    betas = {"scaled_linear .00085-.012": D.BETAS["scaled-linear"]}[c["schedule"]]()
    t, s = case.inputs["t"].float(), case.inputs["sigma"].double()
    process = D.Discrete(betas)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    report.relative("snr", snr, 1e-3)
    for kind in ("eps", "v", "x0"):
        weighted = D.Discrete(betas, kind, weighting="min-snr")
        assert c["gamma"] == 5.0 or f"min_snr_{kind}" not in report.left, "min-SNR with another gamma"
        report.relative(f"min_snr_{kind}", weighted.weight(t), 1e-3)
    report.relative("p2", D.WEIGHTINGS["p2"][0](snr, c["p2_k"], c["p2_gamma"]), 1e-3)
    sd = c["sigma_data"]
    of_F = lambda w: w * (s * sd) ** 2 / (s**2 + sd**2) / s**2        # from a weight of the error of eps to one of F's
    report.relative("k_soft_min_snr", of_F(D.WEIGHTINGS["soft-min-snr"][0](s**-2, sd**-2)), 1e-6)
    report.relative("k_snr", of_F(D.WEIGHTINGS["snr"][0](s**-2)), 1e-6)
    report.relative("edm_lambda", D.WEIGHTINGS["edm"][0](s**-2, sd) / s**2, 1e-5)


def loss_bpd(report):
    case, c = report.case, report.case.config
    process = D.Discrete(D.linear_betas(), "eps", learned_variance=True)
    denoise = process.denoiser(network(process, Mixture(case.inputs), lambda x: torch.sin(3 * x)))
    if c["clip_denoised"]:
        denoise = D.clipped(denoise, process)
    times = torch.tensor([*reversed(D.respaced(1000, c["respacing"])), -1], dtype=torch.float64)
    ours = process.bits_per_dim(denoise, case.inputs["x0"].double(), pool(case), times)
    for key, name in (
        ("total_bpd", "total"),
        ("prior_bpd", "prior"),
        ("vb", "vb"),
        ("xstart_mse", "x0_mse"),
        ("mse", "eps_mse"),
    ):
        report.same(key, ours[name], 1e-4)
    report.same(
        "exact_continuous_bpd",
        -Mixture(case.inputs).log_density(case.inputs["x0"]) / 32 / math.log(2) + math.log2(127.5),
        1e-4,
    )


def loss_score_sde(report):
    case = report.case
    x0, noise, u = (case.inputs[k].double() for k in ("x0", "noise", "u"))
    for key in list(report.left):
        kind, weight, reduce = key.split(":")[1].split("_")
        process = {"ve": D.VE, "vp": D.VP, "subvp": D.SubVP}[kind](
            "score", weighting={"likelihood": "likelihood", "std": "snr"}[weight]
        )
        t = process.training_times(u)
        exact = network(process, Mixture(case.inputs))
        if kind == "ve":
            model = lambda x, t, y: exact(x * (process.sigma(t / 1000) ** 2 + 0.25).sqrt().view(-1, 1, 1, 1), t / 1000)
        else:
            model = lambda x, t, y: exact(x, t / 999)
        # its code: g^2, ours: g^2/2
        loss = process.loss(model, x0, None, t, noise)["loss"] * (2 if weight == "likelihood" else 1)
        report.same(key, (loss * {"mean": 1, "halfsum": x0[0].numel() / 2}[reduce]).mean(), 1e-4)


def loss_likelihood(report):
    case, mixture = report.case, Mixture(report.case.inputs)
    x, probe = case.inputs["x"].double(), 2 * case.inputs["rademacher01"].double() - 1
    bits = lambda logp: -logp / (x[0].numel() * math.log(2)) + 7
    for kind, make in (("vp", D.VP), ("ve", D.VE)):
        process = make("eps")
        process.t_least = case.config["eps"]
        logp, z = D.log_likelihood(process, Watched(case, process), x, probe, case.config["rtol"], case.config["atol"])
        report.same(f"bpd:{kind}", bits(logp), 2e-3)
        report.same(f"z:{kind}", z, 2e-3)
        report.skip(f"nfe:{kind}")
    report.same("exact_logp", mixture.log_density(x), 1e-5)
    report.same("exact_bpd", bits(mixture.log_density(x)), 1e-5)
    edm = D.EDM("eps")
    edm.t_least = 1e-3
    report.same("k_log_likelihood", D.log_likelihood(edm, Watched(case, edm), x, probe)[0], 2e-3)
    report.skip("k_fevals")


def loss_guidance(report):
    c, u = report.case.inputs["cond"], report.case.inputs["uncond"]
    w = report.case.config["scale"]
    process = D.RectifiedFlow()
    flat = lambda x0: lambda xt, t: D.Denoised(x0, x0)
    update = lambda **o: D.apg(c, u, 2.0, {}, **o) - c      # APG's c + (w - 1) update
    report.same("cfg", D.cfg(c, u, w))
    report.same("cfg", D.guided(flat(c), flat(u), w)(c, 0.5).x0)
    for key in [k for k in report.left if k.startswith("cfg_rescale")]:
        share = float(key[11:]) / (10 if key[11:].startswith("0") else 1)
        report.same(key, D.cfg_rescale(c, u, w, share=share))
    report.same("apg_eta1_norm2.5", u + w * update(eta=1.0, norm=2.5, momentum=0.0), 2e-5)
    report.same("apg_eta0_norm2.5", c + w * update(eta=0.0, norm=2.5, momentum=0.0), 2e-5)
    rule = D.partial(D.apg, memory={}, eta=0.0, norm=5.0, momentum=-0.5)
    report.same("apg_momentum_step1", rule(c, u, w), 2e-5)
    report.same("apg_momentum_step2", rule(0.9 * c, 1.1 * u, w), 2e-5)
    report.same("cfg_zero_star", D.cfg_zero(c, u, w, {}))
    zero = D.cfg_zero(c, u, 0.0, {})
    report.same("cfg_zero_star_scale", (zero * u).flatten(1).sum(1) / (u * u).flatten(1).sum(1))
    report.same("tangential", D.tangential(c, u, w), 2e-5)
    three = D.guided(flat(c), flat(u), w, channels=3)(c, 0.5).x0
    report.same("dit_three_channel", torch.cat([three, torch.cat([three[:, :3], u[:, 3:]], 1)]))
    for key in [k for k in report.left if k.startswith("dynamic_threshold")]:
        quantile, limit = float(key.split("_")[2]), float(key.split("max")[1])
        x = D.cfg(c, u, w)
        report.same(key, D.clipped(flat(x), process, limit, quantile)(x, 0.5).x0)


LOSSES = [
    ({"model_output", "t"}, loss_dit),
    ({"model_output", "z"}, loss_rf),
    ({"model_output", "x1"}, loss_sit),
    ({"sigma", "rnd_normal"}, loss_edm),
    ({"t", "sigma"}, loss_weights),
    ({"x0", "u", "means"}, loss_score_sde),
    ({"x0", "noise", "means"}, loss_bpd),
    ({"rademacher01"}, loss_likelihood),
    ({"cond", "uncond"}, loss_guidance),
]


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

    draw = (
        {"eta": o.pop("eta", 0.0)}
        if kind == "ddim"
        else {"variance": "small" if o.pop("sigma_small", False) else "large"}
    )
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
        return torch.cat(
            [network(process, Mixture(case.inputs, [c]))(x[n : n + 1], t[n : n + 1]) for n, c in enumerate(classes)]
        )

    denoise = process.denoiser(conditional)
    if null:
        whole = network(process, Mixture(case.inputs))
        denoise = D.guided(denoise, process.denoiser(lambda x, t, y: whole(x, t / 1000)), cfg)
    x = case.inputs["x_T"].double()
    states = [x, *D.SAMPLERS["euler"](denoise, x, process.times(steps), process, pool(case))]
    report.same(f"x:{name}", torch.stack(states), tol)


# ------------------------------------------------------------------------------ diffusers: from a class and its options


def replaced_last(betas, last):
    """The table with its last alpha_bar replaced: Euler, DPM and UniPC put 2^-24 where zero-SNR has 0."""
    bar = torch.cumprod(1 - betas, 0)
    bar[-1] = last
    return 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])


SD = {"beta_start": 0.00085, "beta_end": 0.012}
DISTILLED = SD | {"beta_schedule": "scaled_linear", "original_inference_steps": 50, "timestep_scaling": 10.0,
                  "set_alpha_to_one": True, "steps_offset": 0}
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
    "LCMScheduler": ("distilled", "lcm", DISTILLED),
    "TCDScheduler": ("distilled", "tcd", DISTILLED),
    "EulerDiscreteScheduler": ("B", "euler", {"interpolation_type": "linear", "final_sigmas_type": "zero"}),
    "EulerAncestralDiscreteScheduler": ("B", "euler-ancestral", {}),
    "LMSDiscreteScheduler": ("B", "lms", {}),
    "HeunDiscreteScheduler": ("B", "heun", SD),
    "KDPM2DiscreteScheduler": ("B", "dpm2", SD),
    "KDPM2AncestralDiscreteScheduler": ("B", "dpm2-ancestral", SD),
    "DPMSolverSDEScheduler": ("B", "dpmpp-sde", SD),
    "DPMSolverMultistepScheduler": ("C", "multistep", {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
    "DPMSolverSinglestepScheduler": ("C", "singlestep", {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
    "DEISMultistepScheduler": (
        "C",
        "deis",
        {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"},
    ),
    "UniPCMultistepScheduler": (
        "C",
        "unipc",
        {"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None},
    ),
    "SASolverScheduler": (
        "C",
        "sa-solver",
        {
            "predictor_order": 2,
            "corrector_order": 2,
            "tau_func": None,
            "algorithm_type": "data_prediction",
            "final_sigmas_type": "sigma_min",
        },
    ),
    "FlowMatchEulerDiscreteScheduler": ("flow", "euler", FLOW),
    "FlowMatchHeunDiscreteScheduler": ("flow", "heun", FLOW),
    "FlowMatchLCMScheduler": ("flow", "lcm", FLOW),
    "LTXEulerAncestralRFScheduler": (
        "flow",
        "flow-ancestral",
        {"num_train_timesteps": 1000, "eta": 1.0, "s_noise": 1.0},
    ),
    "EDMEulerScheduler": ("EDM", "euler", {}),
    "EDMDPMSolverMultistepScheduler": (
        "EDM",
        "multistep",
        {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    ),
    "CMStochasticIterativeScheduler": (
        "EDM",
        "lcm",
        {"num_train_timesteps": 40, "s_noise": 1.0, "clip_denoised": True},
    ),
    "SCMScheduler": ("SCM", "lcm", {}),
}
TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
SPACING = {"timestep_spacing": None, "steps_offset": 0}
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
CLIP = {"clip_sample": False, "clip_sample_range": 1.0, "thresholding": False, "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0}
SOLVER = {
    "solver_order": 2,
    "lower_order_final": None,
    "euler_at_final": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}
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
            betas = {
                "linear": lambda: D.linear_betas(T, start * T / 1000, end * T / 1000),
                "scaled_linear": lambda: D.BETAS["scaled-linear"](T, start, end),
                "squaredcos_cap_v2": lambda: D.BETAS["cosine"](T),
                "sigmoid": lambda: D.BETAS["sigmoid"](T, start, end),
                "laplace": lambda: D.BETAS["laplace"](T),
                "exp": lambda: D.BETAS["exp"](T),
            }[c["beta_schedule"]]()
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
        times = self.spaced("leading", self.n)
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
        if self.c.get("interpolation_type") == "log_linear":  # n + 1 levels over the table, of which n steps are made
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
        times = times if levels is None else levels
        self.finish(1 - times if c["invert_sigmas"] else times, float(c["invert_sigmas"]))

    def grid_EDM(self):
        c = self.c
        self.process = D.EDM(sigma_data=c["sigma_data"])
        self.process.t_noisy = math.inf
        self.process.t_noisy = 1e9                   # churn may go above sigma_max
        more = {"rho": c["rho"]} if c["sigma_schedule"] == "karras" else {}
        T = c["num_train_timesteps"]
        steps = T if self.sampler == "lcm" else self.n
        times = self.process.times(steps, c["sigma_schedule"], ends=(c["sigma_max"], c["sigma_min"]), **more)[:-1]
        if self.sampler == "lcm":  # consistency models: a stride over the training grid, then sigma_min
            self.finish(times[:: T // self.n][: self.n], c["sigma_min"])
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
        self.options = {
            "variance": {
                "fixed_small": "small",
                "fixed_small_log": "small",
                "fixed_large": "large",
                "learned_range": "small",
            }[kind]
        }

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
            self.options = {
                "s_churn": self.churn,
                "s_min": self.step.pop("s_tmin", 0.0),
                "s_max": self.step.pop("s_tmax", math.inf),
                "s_noise": self.step.pop("s_noise", 1.0),
            }

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
        kinds = {
            "dpmsolver++": ("x0", 0.0),
            "dpmsolver": ("eps", 0.0),
            "sde-dpmsolver++": ("x0", 1.0),
            "sde-dpmsolver": ("eps", 1.0),
        }
        form, eta = kinds[c["algorithm_type"]]
        return form, eta, {"midpoint": "half", "heun": "exact"}[c["solver_type"]]

    def rule_multistep(self):
        form, eta, slope = self.solver(self.c)
        published = "sign" if self.c["algorithm_type"] == "sde-dpmsolver++" else "half"
        self.options = {
            "order": self.orders(self.c["solver_order"]),
            "form": form,
            "tau": eta,
            "slope": slope,
            "published": published,
            "lower_final": False,
        }

    def rule_singlestep(self):
        form, eta, slope = self.solver(self.c)
        quadratic = self.c["solver_type"] == "heun"
        self.options = {
            "order": self.c["solver_order"],
            "form": form,
            "eta": eta,
            "slope": slope,
            "quadratic": quadratic,
            "published": "flip" if quadratic and eta else "",
        }

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
        """The library's churn asks the network before it adds the noise, and uses that output after: with sigma_hat
        unbounded, hence in x/alpha and without the table."""
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

        for n, state in enumerate(D.SAMPLERS["euler"](stale, here["x"], grid, ve, noise, **self.options)):
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
    if (
        plan.c.get("variance_type") == "fixed_large" and calls[-1][0] > 0
    ):  # t > 0 in the last step: the library adds noise
        final = (
            final
            + process.sigma(torch.tensor(calls[-1][0], dtype=torch.float64))
            * case.inputs["noise"][run["noise_used"] - 1]
        )
    report.same(f"x:{name}", torch.stack([x for _, x in calls[1:]] + [final]), tol)
    t = torch.tensor([t for t, _ in calls], dtype=torch.float64)
    a, s = process.alpha(t), process.sigma(t)
    if space == "ve":
        a, s = a / a, s / a
    for key, ours in (("alpha", a), ("sigma", s)):   # its tables are float32 products, where 1 - alpha_bar cancels
        report.same(f"{key}:{name}", ours, 1e-3, scale=case.outputs[f"{key}:{name}"].abs() + 1e-2)
    grid_outputs(report, plan, name, t)
    if plan.name.startswith("CM"):                   # an output under that library's own boundary scalings
        report.skip(f"pred0:{name}")
    sign = -1 if plan.group == "EDM" and plan.kind == "v" else 1
    report.same(f"pred0:{name}", sign * outputs[0], 2e-4) if f"pred0:{name}" in report.left else None


# ------------------------------------------------------------------------------------------ official loops, by function


class Watched:
    """A denoiser of the mixture on a process that remembers its calls: times, and states divided by alpha if `ve`."""

    def __init__(self, case, process, ve=False):
        self.mixture, self.process, self.ve, self.t, self.x = Mixture(case.inputs), process, ve, [], []

    def __call__(self, x, t):
        batch = D.batch_time(t, x)
        a, s = self.process.alpha(batch), self.process.sigma(batch)
        self.t.append(float(t))
        self.x.append(x / a[0] if self.ve else x)
        out = self.process.target(*self.mixture(x, a, s), batch)
        return self.process.denoised(out, x, batch)


def unbounded(prediction="eps"):
    process = D.EDM(prediction)
    process.t_noisy = 1e9
    return process


KDIFFUSION = {  # function: our sampler, its fixed options, the library's names of options
    "sample_euler": ("euler", {}), "sample_heun": ("heun", {}), "sample_dpm_2": ("dpm2", {}), "sample_lms": ("lms", {}),
    "sample_euler_ancestral": ("euler-ancestral", {}), "sample_dpm_2_ancestral": ("dpm2-ancestral", {}),
    "sample_dpmpp_2s_ancestral": ("dpmpp-2s", {"eta": 1.0}), "sample_dpmpp_sde": ("dpmpp-sde", {}),
    "sample_dpmpp_2m": ("dpmpp-2m", {}), "sample_dpmpp_2m_sde": ("dpmpp-2m-sde", {}),
    "sample_dpmpp_3m_sde": ("dpmpp-3m-sde", {"published": "half", "lower_final": False}),
    "sample_dpm_fast": ("dpm-solver", {}), "sample_dpm_adaptive": ("adaptive", {}),
}
RENAMED = {
    "s_tmin": "s_min",
    "s_tmax": "s_max",
    "eta": "eta",
    "s_churn": "s_churn",
    "order": "order",
    "rtol": "rtol",
    "atol": "atol",
    "h_init": "h",
}


def fast_blocks(high, low, n):
    """dpm_fast's blocks of 3 calls and a last one of 2 or 1, all equally long in log sigma: (calls, log sigma at the
    start, at the end)."""
    blocks = n // 3 + 1
    sizes = [3] * (blocks - 2) + [2, 1] if n % 3 == 0 else [3] * (blocks - 1) + [n % 3]
    ends = torch.linspace(math.log(high), math.log(low), blocks + 1, dtype=torch.float64).tolist()
    return list(zip(sizes, ends, ends[1:]))


def fast_grid(high, low, n):
    blocks = fast_blocks(high, low, n)
    inner = [a + k / size * (b - a) for size, a, b in blocks for k in range(size)]
    return torch.tensor([*inner, blocks[-1][2]], dtype=torch.float64).exp()


def ancestral_fast(denoise, x, times, process, noise, n, eta):
    """dpm_fast with noise: each block goes down to the level under its end (never under the last level), then up."""
    for size, a, b in fast_blocks(*times.tolist(), n):
        i, j = (D.at(process, lam=-v) for v in (a, b))
        k = D.at(process, lam=min(D.beneath(i, j, eta).lam, -math.log(times[-1])))
        lams = torch.linspace(i.lam, k.lam, size + 1, dtype=torch.float64)
        *_, x = D.SAMPLERS["dpm-solver"](denoise, x, process.time(torch.exp(-lams)), process, noise, order=size)
        yield (x := D.renoised(x, k, j, noise(x.shape)))


def adaptive(denoise, x, times, process, noise, eta=0.0, rtol=0.05, atol=0.0078, h=0.05):
    """k-diffusion's dpm_adaptive, our exponential steps of order 3 and 2 under its step control (2206.00927, appendix
    C)."""
    i, end = D.levels(process, times)
    last = x
    while i.lam < end.lam - 1e-5:
        j = D.at(process, lam=min(end.lam, i.lam + h))
        k, nodes = D.beneath(i, j, eta), []
        for place in (0, 1 / 3, 2 / 3):
            m = D.at(process, lam=i.lam + place * (k.lam - i.lam)) if place else i
            xm = D.exponential_step(x, i, m, nodes, "eps") if place else x
            nodes.append((m.lam, denoise(xm, m.t).eps))
        low = D.exponential_step(x, i, k, nodes[:2], "eps", slope="half")
        high = D.exponential_step(x, i, k, nodes[::2], "eps")
        error = (
            ((low - high) / torch.maximum(low.abs(), last.abs()).mul(rtol).clamp(min=atol)).pow(2).mean().sqrt().item()
        )
        factor = 1 + math.atan((error + 1e-8) ** -(1 / (1.5 if eta else 3)) - 1)
        h *= factor
        if factor >= 0.81:
            i, last, x = j, low, D.renoised(high, k, j, noise(x.shape)) if eta else high
            yield x


def run_kdiffusion(report, name, options, tol):
    o, case = dict(options), report.case
    fn, sig, n = o.pop("fn"), o.pop("sig"), o.pop("n", None)
    sampler, kwargs = KDIFFUSION[fn]
    kwargs, churns = dict(kwargs), fn in ("sample_euler", "sample_heun", "sample_dpm_2")
    s_noise = o.pop("s_noise", 1.0)
    solver = o.pop("solver_type", None)
    if solver:
        kwargs["slope"] = {"midpoint": "half", "heun": "exact"}[solver]
    kwargs |= {RENAMED[k]: v for k, v in o.items()}
    if sampler.endswith("m-sde"):
        kwargs["tau"] = math.sqrt(kwargs.pop("eta", 1.0))
    if churns:
        kwargs["s_noise"], s_noise = s_noise, 1.0
        kwargs = kwargs if kwargs.get("s_churn") else {}
    process = unbounded()
    if isinstance(sig, str):
        low, high = map(float, sig.split(","))
        times = fast_grid(high, low, n) if n else torch.tensor([high, low], dtype=torch.float64)
        if fn == "sample_dpm_fast" and kwargs.get("eta"):
            sampler, times = "fast", times[[0, -1]]
            kwargs["n"] = n
    else:
        times = torch.tensor(sig, dtype=torch.float64)
    watch = Watched(case, process)
    start = case.inputs["x_T"].double() * times[0]
    run = {**D.SAMPLERS, "adaptive": adaptive, "fast": ancestral_fast}[sampler]
    *_, x = run(watch, start, times, process, pool(case, None, s_noise), **kwargs)
    report.same(f"x:{name}", x, tol)
    slack = 10 if "adaptive" in fn else 1            # the library's adaptive solver keeps its time in float32
    report.same(f"net_x:{name}", torch.stack(watch.x), slack * tol)
    report.same(f"net_sigma:{name}", watch.t, slack * 1e-5)


class SqrtTime(D.EDM):
    """VE as in EDM's table 1: sigma = sqrt(t)."""

    def sigma(self, t):
        return t.sqrt()

    def time_of(self, s):
        return s * s


def run_edm(report, name, options, tol):
    """NVlabs' edm_sampler and ablation_sampler."""
    o, case = dict(options), report.case
    o.pop("fn", None)
    n, alpha = o.pop("num_steps", 18), o.pop("alpha", 1)
    solver, kind = o.pop("solver", "heun"), o.pop("discretization", "edm")
    schedule, scaling, rho = o.pop("schedule", "linear"), o.pop("scaling", "none"), o.pop("rho", 7)
    churn = {k.lower(): o.pop(k) for k in ("S_churn", "S_min", "S_max", "S_noise") if k in o}
    ends = {"edm": (80.0, 0.002), "ve": (100.0, 0.02), "iddpm": (81.0, 0.002), "vp": None}[kind]
    if o or (ends is None and ("sigma_min" in o or "sigma_max" in o)):
        raise NotImplementedError(f"{name}: options {o}")
    sigmas = edm_levels(kind, n, ends, rho)
    method = solver if alpha == 1 else ((alpha,), ((1,),), (1 - 1 / (2 * alpha), 1 / (2 * alpha)))
    if (schedule, scaling) == ("vp", "vp"):
        process = D.VP("eps")
    elif (schedule, scaling) == ("ve", "none"):
        process = SqrtTime("eps")
    elif (schedule, scaling) == ("linear", "none"):
        process = unbounded()
    else:
        raise NotImplementedError(f"{name}: schedule {schedule}, scaling {scaling}")
    process.t_noisy = 1e9
    times = torch.cat([process.time(sigmas), torch.zeros(1, dtype=torch.float64)])
    watch = Watched(case, process, ve=True)
    start = case.inputs["x_T"].double() * process.sigma(times[0])
    time = schedule != "linear"                       # these solve in EDM's t, where sigma(t) is not t
    *_, x = D.runge_kutta(watch, start, times, process, pool(case), method, time, **churn)
    report.same(f"x:{name}", x, tol)
    report.same(f"net_x:{name}", torch.stack(watch.x), tol)
    report.relative(f"net_sigma:{name}", process.p(torch.tensor(watch.t, dtype=torch.float64)),
                    1e-3 if kind == "iddpm" else 1e-6)      # iDDPM's table is float32 there


def edm_levels(kind, n, ends, rho=7.0):
    """EDM's four discretisations, noise levels from the noisiest down."""
    if kind == "vp":
        vp = D.VP()
        return vp.p(vp.times(n, "linspace")[:-1])
    if kind == "iddpm":
        u = D.Discrete(D.cosine_betas())
        u = u.p(torch.arange(999.0, -1, -1, dtype=torch.float64))
        u = u[(u >= ends[1]) & (u <= ends[0])]
        u = torch.cat([u, u.new_zeros(1)]) if ends[1] <= 0 else u
        return u[torch.linspace(0, len(u) - 1, n, dtype=torch.float64).round().long()]
    process = unbounded()
    return process.times(
        n, {"edm": "karras", "ve": "exponential"}[kind], ends=ends, **({"rho": rho} if kind == "edm" else {})
    )[:-1]


def score_process(kind):
    """Score SDE's processes with the discretised kernels of its code: the step is 1/N whatever the grid."""
    class CodedVE(D.VE):
        def kernel(self, i, j, euler=False):         # N levels, evenly in log sigma, whatever the grid
            if euler:
                return super().kernel(i, i._replace(t=i.t - 1 / self.N), euler)
            k = math.floor(i.t * (self.N - 1))
            s = lambda k: self.s_min * (self.s_max / self.s_min) ** (k / (self.N - 1)) if k >= 0 else 0.0
            return 1.0, s(k) ** 2 - s(k - 1) ** 2

    if kind == "ve":
        return CodedVE("score")

    class Coded(D.SubVP if kind == "subvp" else D.VP):
        def kernel(self, i, j, euler=False):         # DDPM's betas, N of them
            if euler:
                return super().kernel(i, i._replace(t=i.t - 1 / self.N), euler)
            k = math.floor(i.t * (self.N - 1))
            beta = (self.b0 + k / (self.N - 1) * (self.b1 - self.b0)) / self.N
            return math.sqrt(1 - beta), beta

    return Coded("eps")


def run_score(report, name, options, tol):
    o = dict(options)
    kind, N = o.pop("kind"), o.pop("N")
    predictor = {"reverse_diffusion": "reverse", "euler_maruyama": "euler", "ancestral_sampling": "ancestral"}[
        o.pop("predictor", "reverse_diffusion")
    ]
    corrector = {"langevin": "langevin", "ald": "ald", "none": None, None: None}[o.pop("corrector", None)]
    kwargs = {"snr": o.pop("snr", 0.16), "corrections": o.pop("n_steps", o.pop("n_steps_each", 1))}
    if o:
        raise NotImplementedError(f"{name}: options {o}")
    predictor_corrector(report, name, kind, N, predictor, corrector, tol, **kwargs)


def predictor_corrector(report, name, kind, N, predictor, corrector, tol, s_max=50.0, **kwargs):
    case, process = report.case, score_process(kind)
    process.N, process.t_least, process.s_max = N, 1e-5 if kind == "ve" else 1e-3, s_max
    times = process.times(N, "linspace")
    watch = Watched(case, process)
    x = case.inputs["x_T"].double() * (process.s_max if kind == "ve" else 1)
    states = list(D.predictor_corrector(watch, x, times, process, pool(case), predictor, corrector, **kwargs))
    calls = 1 + (kwargs.get("corrections", 1) if corrector else 0)
    corrected = watch.x[calls - 1 :: calls]
    report.same(f"x:{name}", torch.stack(states[:-1]), tol, select=lambda ref: ref[:-1])
    report.same(f"x_mean:{name}", states[-1], tol)
    report.same(f"t:{name}", times[:-1], 1e-6)
    if f"x_corrected:{name}" in case.outputs:
        report.same(f"x_corrected:{name}", torch.stack(corrected), tol)
    return process, times


def run_score_ode(report, name, options, tol):
    o, case = dict(options), report.case
    kind = o.pop("kind")
    if o:
        raise NotImplementedError(f"{name}: options {o}")
    process = score_process(kind)
    times = torch.tensor([1.0, 1e-5 if kind == "ve" else 1e-3], dtype=torch.float64)
    x = case.inputs["x_T"].double() * (process.s_max if kind == "ve" else 1)
    *_, x = D.rk45(Watched(case, process), x, times, process, None)
    report.same(f"x:{name}", x, tol)
    report.skip(f"nfe:{name}")


def run_ve(report, name, options, tol):
    """diffusers' ScoreSdeVeScheduler with its defaults."""
    o = dict(options)
    n, kwargs = (
        o.pop("n"),
        {"snr": o.pop("snr", 0.15), "corrections": o.pop("correct_steps", 1), "s_max": o.pop("sigma_max", 50.0)},
    )
    if o:
        raise NotImplementedError(f"{name}: options {o}")
    process, times = predictor_corrector(report, name, "ve", n, "reverse", "langevin", tol, **kwargs)
    report.relative(f"sigma:{name}", process.sigma(times[:-1]), 1e-5)
    report.relative(f"discrete_sigmas:{name}", process.times(n, "exponential", ends=(process.s_max, 0.01 + 1e-9))[:-1]
                    .apply_(lambda t: process.sigma(torch.tensor(t, dtype=torch.float64)).item()).flip(0), 1e-4)


def run_vp(report, name, options, tol):
    o = dict(options)
    predictor_corrector(report, name, "vp", o.pop("n"), "euler", None, tol)
    if o:
        raise NotImplementedError(f"{name}: options {o}")


SIT = {"Linear": D.RectifiedFlow, "GVP": D.GVP, "VP": D.VP}


# torchdiffeq's "rk4" is the 3/8 rule
THREE_EIGHTHS = ((1 / 3, 2 / 3, 1), ((1,), (-1 / 2, 3 / 2), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8))


def torchdiffeq_dopri5(f, y, times, rtol=1e-3, atol=1e-6):
    """Our Dormand-Prince rows under torchdiffeq's step control: its first step, its error estimate, steps that do not
    stop at the output times, and a quartic through the middle of a step that gives the states there."""
    places, rows, _ = D.DORMAND_PRINCE
    fourth = (1951 / 21600, 0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
    difference = [a - b for a, b in zip((*rows[-1], 0), fourth)]
    middle = [v / 2 for v in (6025192743 / 30085553152, 0, 51252292925 / 65400821598, -2691868925 / 45128329728,
                              187940372067 / 1594534317056, -1776094331 / 19743644256, 11237099 / 235043384)]
    rms = lambda v: v.pow(2).mean().sqrt().item()
    t, k, states, fit = times[0], f(times[0], y), [y], None
    scale = atol + y.abs() * rtol
    d0, d1 = rms(y / scale), rms(k / scale)
    first = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
    d2 = rms((f(t + first, y + first * k) - k) / scale) / first
    h = min(100 * first, (0.01 / max(d1, d2)) ** 0.2)
    for end in times[1:]:
        while t < end:
            slopes = [k]
            for place, row in zip(places, rows):
                new = y + h * D.mix(row, slopes)
                slopes.append(f(t + place * h, new))
            error = rms(h * D.mix(difference, slopes) / (atol + rtol * torch.maximum(y.abs(), new.abs())))
            factor = min(10.0, max(0.9 / error**0.2, 1.0 if error < 1 else 0.2))
            if error <= 1:
                fit = t, h, y, new, y + h * D.mix(middle, slopes), h * k, h * slopes[-1]
                t, y, k = t + h, new, slopes[-1]
            h *= factor
        start, length, y0, y1, ym, k0, k1 = fit
        u = (end - start) / length
        quartic = (2 * (k1 - k0) - 8 * (y1 + y0) + 16 * ym, 5 * k0 - 3 * k1 + 18 * y0 + 14 * y1 - 32 * ym,
                   k1 - 4 * k0 - 11 * y0 - 5 * y1 + 16 * ym, k0, y0)
        states.append(sum(c * u ** (4 - n) for n, c in enumerate(quartic)))
    return states


def run_sit(report, name, options, tol):
    """SiT's samplers; its time is 1 - ours."""
    o, case = dict(options), report.case
    kind, path, prediction = o.pop("kind"), o.pop("path_type", "Linear"), o.pop("prediction", "velocity")
    n, method = o.pop("num_steps"), o.pop("sampling_method", "dopri5" if kind == "ode" else "Euler")
    process = SIT[path]({"velocity": "velocity", "noise": "eps", "score": "score"}[prediction])
    process.t_noisy = 1.0
    sde = kind == "sde"
    form, norm = o.pop("diffusion_form", "SBDM"), o.pop("diffusion_norm", 1.0)
    last, size = o.pop("last_step", "Mean"), o.pop("last_step_size", 0.04)
    if o:
        raise NotImplementedError(f"{name}: options {o}")
    first, end, eps = 0.0, 1.0, 1e-3                 # SiT's check_interval, in its time
    if path != "VP" and (prediction != "velocity" or sde):
        first = eps if prediction != "velocity" or form == "SBDM" else 0.0
    if path == "VP" or prediction != "velocity" or sde:
        end = 1 - size if sde and last and size else 1 - eps
    t = 1 - torch.linspace(first, end, n, dtype=torch.float64)
    watch = Watched(case, process)
    x = case.inputs["x_T"].double()
    if not sde:
        if method == "dopri5":
            slope = lambda s, x: -D.velocity(process, watch(x, 1 - s), 1 - s)
            states = torchdiffeq_dopri5(slope, x, (1 - t).tolist())
        else:
            states = [
                x,
                *D.runge_kutta(
                    watch, x, t, process, None, {"rk4": THREE_EIGHTHS}.get(method, method), time=True, euler_last=False
                ),
            ]
    else:
        t = torch.cat([t, torch.tensor([1 - end - size if last else 0.0], dtype=torch.float64)])
        states = list(D.sit_sde(watch, x, t, process, pool(case), form.lower(), norm, method.lower(),
                                {"Mean": "mean", "Tweedie": "tweedie", "Euler": "ode"}[last]))
    report.same(f"x:{name}", torch.stack(states), tol)


RUNS = {
    "r_dit": run_dit,
    "r_rf": run_rf,
    "r_k": run_kdiffusion,
    "r_edm": run_edm,
    "r_ss": run_score,
    "r_ssode": run_score_ode,
    "run_ve": run_ve,
    "run_vp": run_vp,
    "r_sit": run_sit,
}


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


CHECKS = {"schedule": check_schedule, "loss": check_loss, "sampler": check_sampler}
