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


def pool(case):
    """noise(shape): the recorded tensors, in order."""
    rest = iter(case.inputs["noise"].double())
    return lambda shape: next(rest).expand(shape)


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


def check_sampler(case):
    report = Report(case)
    for name, run in case.config["runs"].items():
        RUNS[run["function"]](report, name, run["options"], run["tol"])
    report.close()
