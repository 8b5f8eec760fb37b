"""Recorded losses, weights, likelihoods and guidance of the published implementations."""

import math
from functools import partial

import torch
from recorded import Mixture, Report, Watched, network, pool, unbounded

import diffusion as D
import guidance as G

ndtr = torch.special.ndtr


def constant_loss(process, x0, t, noise, output):
    """The loss of a network that says `output`: its parts, and the gradient of the mean loss at the output."""
    out = output.clone().requires_grad_()
    parts = process.loss(lambda x, t, y: out, x0, None, t, noise)
    parts["loss"].mean().backward()
    return parts, out.grad


def loss_dit(report):
    """Improved DDPM's objectives, as published with DiT."""
    case = report.case
    x0, noise, output, t = (case.inputs[k] for k in ("x0", "noise", "model_output", "t"))
    for name, run in case.config["runs"].items():
        o = dict(run)
        learned = o.pop("learn_sigma", True)
        objective = "rescaled" if o.pop("rescale_learned_sigmas", False) else "hybrid"
        objective = "vlb" if o.pop("use_kl", False) else objective
        o.pop("rescale_learned_sigmas", None)
        kind = "x0" if o.pop("predict_xstart", False) else "eps"
        variance = "small" if o.pop("sigma_small", False) else "large"
        betas = {"linear": D.linear_betas, "squaredcos_cap_v2": D.cosine_betas}[o.pop("noise_schedule", "linear")]()
        if o:
            raise NotImplementedError(f"loss run {name}: options {o}")
        process = D.Discrete(betas, kind, learned, objective, fixed_variance=variance)
        parts, grad = constant_loss(process, x0, t.float(), noise, output if learned else output[:, :x0.shape[1]])
        for key in ("loss", "mse", "vb"):
            if f"{key}:{name}" in case.outputs:
                report.same(f"{key}:{name}", parts[key], 1e-4)
        report.same(f"grad:{name}", grad, 1e-4, scale=case.outputs[f"grad:{name}"].abs().max())
    report.same("x_t", D.Discrete(D.linear_betas()).noised(x0, noise, t.float()))


def loss_rf(report):
    case = report.case
    x0, noise, output = (case.inputs[k] for k in ("x0", "noise", "model_output"))
    for name, density, u in (("logit_normal", "logit-normal", ndtr(case.inputs["z"])),
                             ("uniform", "uniform", case.inputs["u"])):
        process = D.RectifiedFlow(density=density)
        t = process.training_times(u)
        parts, grad = constant_loss(process, x0, t, noise, output)
        report.same(f"t:{name}", t)
        report.same(f"zt:{name}", process.noised(x0, noise, t))
        report.same(f"per_sample:{name}", parts["loss"])
        report.same(f"loss:{name}", parts["loss"].mean())
        report.same(f"grad:{name}", grad)


def loss_sit(report):
    """SiT's losses; its time is 1 - ours, and its velocity points to the data."""
    case = report.case
    x0, noise, u, output = (case.inputs[k] for k in ("x1", "noise", "u", "model_output"))
    paths = {"Linear": D.RectifiedFlow, "GVP": D.GVP, "VP": D.VP}
    for name, run in case.config["runs"].items():
        kind = {"velocity": "velocity", "noise": "eps", "score": "score"}[run["prediction"]]
        weighting = {"velocity": "velocity", "likelihood": "likelihood", None: "snr" if kind == "score" else None}
        weighting = None if kind == "velocity" else weighting[run["weight"]]
        process = paths[run["path"]](kind, weighting=weighting, density="uniform")
        sign = -1 if kind == "velocity" else 1
        t = process.training_times(1 - u)
        parts, grad = constant_loss(process, x0, t, noise, sign * output)
        report.same(f"loss:{name}", parts["loss"], 1e-4)
        report.same(f"grad:{name}", sign * grad, 1e-4, scale=case.outputs[f"grad:{name}"].abs().max())
        report.same(f"xt:{name}", process.noised(x0, noise, t))
        report.same(f"t:{name}", 1 - t)


def preconditioned():
    """EDM's four preconditionings of table 1 as our processes, each with F behind what undoes the time and the scale
    that our process tells a network: {name: (process, network)}."""
    F = lambda z, c: torch.sin(z) + 0.1 * c.view(-1, 1, 1, 1)
    vp, ve = D.VP("eps"), D.VE("score", sigma_min=1e-4, sigma_max=100.0)
    iddpm = D.Discrete(D.cosine_betas(), "eps", learned_variance=True)

    def of_edm(x, t, y):
        return F(x, (t / 1000 * math.log(80 / 0.002) + math.log(0.002)) / 4)

    def of_ve(x, t, y):
        s = ve.sigma(t / 1000).view(-1, 1, 1, 1)
        return F(x * (s**2 + 0.25).sqrt(), (s / 2).log().flatten()) / s

    return {"EDMPrecond": (unbounded("edm"), of_edm), "VPPrecond": (vp, lambda x, t, y: F(x, t)),
            "VEPrecond": (ve, of_ve), "iDDPMPrecond": (iddpm, lambda x, t, y: torch.cat([F(x, t)] * 2, 1))}


def loss_edm(report):
    case = report.case
    x, sigma, x0, noise = (case.inputs[k].double() for k in ("x", "sigma", "x0", "noise"))
    u, z = case.inputs["rnd_uniform"].flatten().double(), case.inputs["rnd_normal"].flatten().double()
    networks = preconditioned()
    vp, iddpm = networks["VPPrecond"][0], networks["iDDPMPrecond"][0]

    def denoised(name, x, sigma):
        process, model = networks[name]
        t = process.time_of(sigma).round() if name == "iDDPMPrecond" else process.time_of(sigma)
        return process.denoiser(model)(x * process.alpha(t).view(-1, 1, 1, 1), t).x0

    levels = iddpm.p(torch.arange(999.0, -2, -1, dtype=torch.float64))
    rounded = levels[(sigma[:, None] - levels[None]).abs().argmin(1)]
    for name in networks:
        s = rounded if name == "iDDPMPrecond" else sigma
        report.same(f"D:{name}", denoised(name, x, s), 1e-3 if name == "iDDPMPrecond" else 2e-5)
        report.skip(f"sigma_range:{name}")
    report.relative("iddpm_rounded_sigma", rounded, 1e-3)
    if "iddpm_u" in report.left:
        report.same("iddpm_u", levels[::1000 // (len(case.outputs["iddpm_u"]) - 1)], 1e-3)
    drawn = {"EDMLoss": D.log_normal(unbounded(), ndtr(z)), "VPLoss": vp.p(1 + u * (1e-5 - 1)),
             "VELoss": 0.02 * (100 / 0.02) ** u}
    for name, s in drawn.items():
        if f"loss:{name}" not in report.left:
            continue
        s = s.view(-1, 1, 1, 1)
        error = (denoised(name.replace("Loss", "Precond"), x0 + noise * s, s.flatten()) - x0) ** 2
        weight = D.edm_weighting(s**-2) / s**2 if name == "EDMLoss" else s**-2
        report.same(f"loss:{name}", weight * error, 1e-4)
        if name == "EDMLoss":                            # the same through process.loss, whose mean is over the pixels
            process, model = networks["EDMPrecond"]
            parts = process.loss(model, x0, None, s.flatten(), noise)
            report.same(f"loss:{name}", parts["loss"], 1e-4, select=lambda ref: ref.flatten(1).mean(1))


def loss_weights(report):
    case, c = report.case, report.case.config
    betas = {"scaled_linear .00085-.012": D.scaled_linear_betas, "linear": D.linear_betas}[c["schedule"]]()
    t, s, sd = case.inputs["t"].float(), case.inputs["sigma"].double(), c["sigma_data"]
    process = D.Discrete(betas)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    report.relative("snr", snr, 1e-3)
    for kind in ("eps", "v", "x0"):
        weighted = D.Discrete(betas, kind, weighting=partial(D.min_snr, gamma=c["gamma"]))
        report.relative(f"min_snr_{kind}", weighted.weight(t), 1e-3)
    report.relative("p2", D.p2(snr, k=c["p2_k"], gamma=c["p2_gamma"]), 1e-3)
    of_F = lambda w: w * (s * sd) ** 2 / (s**2 + sd**2) / s**2        # from a weight of the error of eps to one of F's
    report.relative("k_soft_min_snr", of_F(D.soft_min_snr(s**-2, gamma=sd**-2)), 1e-6)
    report.relative("k_snr", of_F(D.snr_weighting(s**-2)), 1e-6)
    report.relative("edm_lambda", D.edm_weighting(s**-2, sigma_data=sd) / s**2, 1e-5)


def loss_bpd(report):
    case, c = report.case, report.case.config
    process = D.Discrete(D.linear_betas(), "eps", learned_variance=True)
    denoise = process.denoiser(network(process, Mixture(case.inputs), lambda x: torch.sin(3 * x)))
    denoise = G.clipped(denoise, process) if c["clip_denoised"] else denoise
    times = torch.tensor([*reversed(D.respaced(1000, c["respacing"])), -1], dtype=torch.float64)
    ours = process.bits_per_dim(denoise, case.inputs["x0"].double(), pool(case), times)
    for key, name in (("total_bpd", "total"), ("prior_bpd", "prior"), ("vb", "vb"), ("xstart_mse", "x0_mse"),
                      ("mse", "eps_mse")):
        report.same(key, ours[name], 1e-4)
    exact = -Mixture(case.inputs).log_density(case.inputs["x0"]) / 32 / math.log(2) + math.log2(127.5)
    report.same("exact_continuous_bpd", exact, 1e-4)


def loss_score_sde(report):
    case = report.case
    x0, noise, u = (case.inputs[k].double() for k in ("x0", "noise", "u"))
    for key in list(report.left):
        kind, weight, reduce = key.split(":")[1].split("_")
        weighting = {"likelihood": "likelihood", "std": "snr"}[weight]
        process = {"ve": D.VE, "vp": D.VP, "subvp": D.SubVP}[kind]("score", weighting=weighting)
        t, exact = process.training_times(u), network(process, Mixture(case.inputs))

        def model(x, t, y):
            if kind != "ve":  # noqa: B023
                return exact(x, t / 999)  # noqa: B023
            return exact(x * (process.sigma(t / 1000) ** 2 + 0.25).sqrt().view(-1, 1, 1, 1), t / 1000)  # noqa: B023

        # its code: g^2, ours: g^2/2
        loss = process.loss(model, x0, None, t, noise)["loss"] * (2 if weight == "likelihood" else 1)
        report.same(key, (loss * {"mean": 1, "halfsum": x0[0].numel() / 2}[reduce]).mean(), 1e-4)


def loss_likelihood(report):
    case, c, mixture = report.case, report.case.config, Mixture(report.case.inputs)
    x, probe = case.inputs["x"].double(), 2 * case.inputs["rademacher01"].double() - 1
    bits = lambda logp: -logp / (x[0].numel() * math.log(2)) + 7
    for kind, make in (("vp", D.VP), ("subvp", D.SubVP), ("ve", D.VE)):
        if f"bpd:{kind}" in report.left:
            process = make("eps")
            process.t_least = c["eps"]
            logp, z = D.log_likelihood(process, Watched(case, process), x, probe, c["rtol"], c["atol"])
            report.same(f"bpd:{kind}", bits(logp), 2e-3)
            report.same(f"z:{kind}", z, 2e-3)
            report.skip(f"nfe:{kind}")
    report.same("exact_logp", mixture.log_density(x), 1e-5)
    report.same("exact_bpd", bits(mixture.log_density(x)), 1e-5)
    edm = D.EDM("eps", sigma_min=1e-3)
    report.same("k_log_likelihood", D.log_likelihood(edm, Watched(case, edm), x, probe)[0], 2e-3)
    report.skip("k_fevals")


def loss_guidance(report):
    c, u, w = report.case.inputs["cond"], report.case.inputs["uncond"], report.case.config["scale"]
    process = D.RectifiedFlow()
    flat = lambda x0: lambda xt, t: D.Denoised(x0, x0)
    update = lambda **o: G.apg(c, u, 2.0, {}, **o) - c      # APG's c + (w - 1) update
    report.same("cfg", G.cfg(c, u, w))
    report.same("cfg", G.guided(flat(c), flat(u), w)(c, 0.5).x0)
    for key in [k for k in report.left if k.startswith("cfg_rescale")]:
        share = float(key[11:]) / (10 if key[11:].startswith("0") else 1)
        report.same(key, G.rescale(c, u, w, share=share))
    report.same("apg_eta1_norm2.5", u + w * update(eta=1.0, norm=2.5, momentum=0.0), 2e-5)
    report.same("apg_eta0_norm2.5", c + w * update(eta=0.0, norm=2.5, momentum=0.0), 2e-5)
    rule = partial(G.apg, memory={}, eta=0.0, norm=5.0, momentum=-0.5)
    report.same("apg_momentum_step1", rule(c, u, w), 2e-5)
    report.same("apg_momentum_step2", rule(0.9 * c, 1.1 * u, w), 2e-5)
    report.same("cfg_zero_star", G.cfg_zero(c, u, w, {}))
    zero = G.cfg_zero(c, u, 0.0, {})
    report.same("cfg_zero_star_scale", (zero * u).flatten(1).sum(1) / (u * u).flatten(1).sum(1))
    report.same("tangential", G.tangential(c, u, w), 2e-5)
    three = G.guided(flat(c), flat(u), w, channels=3)(c, 0.5).x0
    report.same("dit_three_channel", torch.cat([three, torch.cat([three[:, :3], u[:, 3:]], 1)]))
    for key in [k for k in report.left if k.startswith("dynamic_threshold")]:
        quantile, largest = float(key.split("_")[2]), float(key.split("max")[1])
        x = G.cfg(c, u, w)
        report.same(key, G.clipped(flat(x), process, 1.0, quantile, largest)(x, 0.5).x0)


LOSSES = [                                               # the kind of a loss case shows in its inputs
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
    report = Report(case)
    for inputs, check in LOSSES:
        if inputs <= set(case.inputs):
            check(report)
            return report.close()
    raise NotImplementedError(f"a loss case with inputs {sorted(case.inputs)}")


CHECKS = {"loss": check_loss}
