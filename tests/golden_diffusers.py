"""Recorded trajectories of diffusers' schedulers, by our samplers under the plan of `diffusers_plan.py`."""

import math
from functools import partial

import torch
from diffusers_plan import plan_of
from recorded import RUNS, Mixture, check_sampler, pool

import diffusion as D
import samplers as S
from guidance import clipped

MULTISTEP = {                                          # algorithm: our samplers of order 1, 2 and 3
    "dpmsolver++": (S.dpmpp_2m, S.dpmpp_2m, S.dpmpp_3m),
    "dpmsolver": (S.dpm_solver_2m, S.dpm_solver_2m, S.dpm_solver_3m),
    "sde-dpmsolver++": (S.dpmpp_2m_sde, S.dpmpp_2m_sde, S.dpmpp_3m_sde),
    "sde-dpmsolver": (S.dpm_solver_2m_sde, S.dpm_solver_2m_sde, None),
}


def multistep(plan, denoise, x, noise):
    """Step by step, each with the order that the library gives it, and with so many remembered outputs."""
    history, eta = [], float(plan.c.algorithm_type.startswith("sde"))
    for n, order in enumerate(plan.orders):
        memory, options, times = {"outputs": history[:order - 1]}, {"lower_final": False}, plan.times[n:n + 2]
        if plan.sampler == "deis":
            step, options["order"] = S.deis, max(order, 2)
        else:
            step = MULTISTEP[plan.c.algorithm_type][order - 1]
            options |= {"published": True} if order == 3 else {"solver": plan.c.solver_type}
        d = denoise(x, times[0].item())
        known = lambda *_: d  # noqa: B023
        ((i, j),) = S.steps(plan.process, times)
        if eta and order == 3:         # published sde-dpmsolver++ has -1/2 where +1/2 follows from its derivation
            outputs = [d.x0, *(m for _, m in memory["outputs"])]
            curvature = D.weighted_sum(S.derivatives(i, memory["outputs"])[2].tolist(), outputs)
            (x,) = step(known, x, times, plan.process, noise, memory, **options)
            x = x - j.alpha * (j.lam - i.lam) ** 2 / 2 * curvature
        else:
            (x,) = step(known, x, times, plan.process, noise, memory, **options)
        history[:0] = memory["outputs"][:1] if memory["outputs"] and memory["outputs"][0][0] == i else []
        yield x


def singlestep(plan, denoise, x, noise):
    """Order 3 of sde-dpmsolver++ with heun has -1/2 where +1/2 follows from the derivation. lower_order_final cuts the
    last block in two, whatever the last level."""
    form, c, memory = "eps" if plan.c.algorithm_type == "dpmsolver" else "x0", plan.c, {}
    eta = float(c.algorithm_type.startswith("sde"))
    for n in range(plan.n):
        block, seen, left = list(memory.get("block", [])), [], plan.n - n
        if not block:
            size = max(1, left - 1) if c.lower_order_final and left <= c.solver_order else c.solver_order
        watch = lambda x, t: seen.append(denoise(x, t)) or seen[-1]  # noqa: B023
        rest = plan.times[n:]
        x = next(S.singlestep(watch, x, rest, plan.process, noise, memory, form=form, eta=eta, **plan.options))
        if eta and len(block) == 2 and c.solver_type == "heun":
            (i, _, m0), (s1, _, m1) = block
            ((s2, j),) = S.steps(plan.process, plan.times[n:n + 2])
            D1, D2 = (m1 - m0) / (s1.lam - i.lam), (seen[0].x0 - m0) / (s2.lam - i.lam)
            x = x - j.alpha * (j.lam - i.lam) ** 2 * 2 * (D2 - D1) / (s2.lam - s1.lam)
        memory["block"][size:] = []
        if len(memory["block"]) == size:
            memory["block"].clear()
        yield x


def in_pairs(plan, denoise, x, noise):
    """Steps (t, s) that do not meet: the next begins at its own t, whatever s was."""
    for pair in plan.pairs:
        (x,) = S.SAMPLERS[plan.sampler](denoise, x, list(pair), plan.process, noise, **plan.options)
        yield x


def pndm(plan, denoise, x, noise):
    """The network is told the listed times, whereas states lie at t - T//n, and half-way at two different places
    where T//n is odd; a step into the clean image is of full order; and v is read at the step's beginning, wherever
    it comes from."""
    process, first, outputs, times = plan.process, plan.sampler == "plms", [], plan.times.tolist()
    for n, ((t, s), follows) in enumerate(zip(plan.pairs, times[1:])):
        stride, walk = int(times[0] - plan.pairs[0][1]), "ipndm"
        said = [output(plan, denoise, x, t)]           # and read as eps at the beginning of the step
        i, *to = S.levels(process, [t, s if s >= 0 else -1 + 1e-9])
        if first and n == 0:                           # redone from t_1 + T//n
            said.append(output(plan, denoise, S.along(x, i, to[0], as_eps(plan, said[0], t, x)), follows))
            t, s, walk = follows + stride, follows, "plms"
        elif not first and n < 3:
            half, s, walk = follows + stride // 2, follows, "pndm"
            for told, level in ((half, t - stride // 2), (half, half), (follows, follows)):
                at = S.levels(process, [level])[0]
                said.append(output(plan, denoise, S.along(x, i, at, as_eps(plan, said[-1], t, x)), told))
        read = [as_eps(plan, m, t, x) for m in said]
        memory = {"outputs": [(None, as_eps(plan, m, t, x)) for m in outputs]}
        each = iter(read)
        known = lambda x, t: D.Denoised(x, next(each))  # noqa: B023
        (x,) = S.SAMPLERS[walk](known, x, [t, s if s >= 0 else -1 + 1e-9], process, noise, memory)
        outputs = [said[0], *outputs][:3]
        yield x


def output(plan, denoise, x, t):
    """What the network says at (x, t): eps, or v."""
    d = denoise(x, t)
    return plan.process.target(d.x0, d.eps, t) if plan.kind == "v" else d.eps


def as_eps(plan, m, t, x):
    alpha, sigma = plan.process.path(t)
    return alpha * m + sigma * x if plan.kind == "v" else m


def churned(plan, denoise, x, noise):
    """The library's churn asks the network before it adds the noise, and uses that output after; it draws noise only
    where it adds some. In x/alpha, with a sigma_hat that no table bounds."""
    table, grid, o = plan.process, plan.process.p(plan.times).tolist(), plan.options
    ve = D.EDM("eps", sigma_min=1e-9, sigma_max=1e9)
    alpha = (lambda s: 1.0) if plan.family == "edm" else (lambda s: (1 + s * s) ** -0.5)
    x = x / alpha(grid[0])
    for s, following, t in zip(grid, grid[1:], plan.times.tolist()):
        def stale(x_hat, s_hat):
            before = denoise(x * alpha(s), t).x0  # noqa: B023
            if plan.family == "edm":                   # x0 = c_skip x_hat + c_out F, F from the old x
                skip = lambda s: table.sigma_data**2 / (s**2 + table.sigma_data**2)
                out = lambda s: s * table.sigma_data / (s**2 + table.sigma_data**2) ** 0.5
                x0 = skip(s_hat) * x_hat + out(s_hat) * (before - skip(s) * x) / out(s)  # noqa: B023
            elif plan.kind == "eps":                   # x0 = x_hat - sigma_hat eps
                x0 = x_hat - s_hat * (x - before) / s  # noqa: B023
            elif plan.kind == "v":                     # v and sigma from before, x from after
                x0 = before + (x_hat - x) / (s**2 + 1)  # noqa: B023
            else:
                x0 = before
            return D.Denoised(x0, (x_hat - x0) / s_hat)

        n = plan.n + plan.log_linear                   # it counts levels, not steps
        churn = {"s_churn": o["s_churn"] / n, "s_min": o.get("s_tmin", 0.0), "s_max": o.get("s_tmax", math.inf)}
        inside = churn["s_min"] <= s <= churn["s_max"] and churn["s_churn"] > 0
        draw = noise if inside else lambda shape: torch.zeros(())
        last = following or 1e-12                      # its last step starts from sigma_hat too
        (x,) = S.euler(stale, x, [s, last], ve, draw, s_noise=o.get("s_noise", 1.0), **churn)
        yield x * (alpha(following) if plan.family != "edm" else 1.0)


def walk(plan, denoise, x, noise):
    """All states after x, by our sampler."""
    own = {"multistep": multistep, "deis": multistep, "singlestep": singlestep, "pndm": pndm, "plms": pndm}
    if plan.sampler == "euler" and plan.options.get("s_churn"):
        yield from churned(plan, denoise, x, noise)
    elif plan.sampler in own:
        yield from own[plan.sampler](plan, denoise, x, noise)
    elif hasattr(plan, "pairs"):
        yield from in_pairs(plan, denoise, x, noise)
    else:
        options = {k: v for k, v in plan.options.items() if not k.startswith(("s_t", "s_churn"))}
        options = options if plan.sampler != "euler" else {}
        times = plan.times
        if plan.sampler in ("lms", "ipndm"):
            times = times.clamp(min=plan.process.t_clean + 1e-9)
        if plan.sampler == "ipndm":                    # dividing by max(alpha, 1e-8), the library loses x0 at alpha = 0
            inner = denoise
            denoise = lambda x, t: inner(x, t).replace(x0=0 * x) if t == 1 else inner(x, t)
        yield from S.SAMPLERS[plan.sampler](denoise, x, times, plan.process, noise, **options)


def with_clipping(plan, denoise):
    """DDIM keeps the eps of the unclipped x0, unless asked."""
    c, o = plan.c, None
    if plan.name == "TCDScheduler":                    # has these options, and no code for them
        return denoise
    if getattr(c, "thresholding", False):
        o = (1.0, c.dynamic_thresholding_ratio, c.sample_max_value)
    elif getattr(c, "clip_denoised", False) or (getattr(c, "clip_sample", False)
                                                and not plan.name.startswith("CogVideoX")):
        o = (getattr(c, "clip_sample_range", 1.0),)
    if o is None or plan.sampler != "ddim" or plan.clipped_eps:
        return denoise if o is None else clipped(denoise, plan.process, *o)

    def bounded(x, t):
        d = denoise(x, t)
        return d.replace(x0=clipped(lambda *_: d, plan.process, *o)(x, t).x0)

    return bounded


def rounding(plan):
    """What the library's coefficients lose in float32, where terms that cancel are summed in it: DEIS's of order 3, a
    difference of t (log^2 t - ..) over differences of logarithms; DDIM's sqrt(1 - alpha_bar - sigma^2) out of pure
    noise at eta 1, which is 0 but for rounding."""
    if plan.sampler == "ddim" and plan.options.get("eta") == 1 and getattr(plan.c, "rescale_betas_zero_snr", False):
        return 2.0**-12
    if plan.sampler != "deis" or plan.c.solver_order < 3:
        return 0.0
    levels, worst = S.levels(plan.process, plan.times), 0.0
    for d, c, b, j in zip(levels, levels[1:], levels[2:], levels[3:]):
        if j.sigma:
            term = b.p * ((abs(b.lam) + 1) ** 2 + 1) / ((b.lam - c.lam) * (c.lam - d.lam))
            worst = max(worst, 3 * 2.0**-24 * j.alpha * term)          # of three coefficients
    return worst


def run_diffusers(report, name, run):
    case, space, tol = report.case, run["space"], run["tol"]
    try:
        plan = plan_of(run["scheduler"], run["init"], run["set_timesteps"], run["step"])
    except NotImplementedError as refusal:
        report.bad.append(f"{name}: {refusal}")
        return
    process, mixture, calls, outputs = plan.process, Mixture(case.inputs), [], []
    scale = lambda t: process.path(t)[0] if space == "ve" else 1.0

    def network(x, t):                                 # a network of the run's prediction, read by our process
        out = process.target(*mixture(x, *process.path(t)), t)
        outputs.append(torch.cat([out, torch.sin(3 * x)], 1) if process.learned_variance else out)
        return process.denoised(outputs[-1], x, t)

    bounded = with_clipping(plan, network)

    def watched(x, t):
        calls.append((t, x / scale(t)))
        return bounded(x, t)

    tol = max(tol, min(1e-2, rounding(plan) * max(1.0, tol / 1e-5)))   # grown as a disturbance of 1e-6 grows to tol/10
    start = run["init_scale"] * case.inputs["x_T"].double() * scale(plan.times[0].item())
    quiet = plan.family == "wuerstchen"                # its last noise is multiplied by 0, above the clean image
    draw = pool(case, run["noise_used"] - quiet, plan.scale)
    states = list(walk(plan, watched, start, draw))
    final = states[-1] / scale(plan.times[-1].item())
    if plan.last_noise:
        final = final + process.path(calls[-1][0])[1] * case.inputs["noise"][run["noise_used"] - 1]
    report.same(f"x:{name}", torch.stack([x for _, x in calls[1:]] + [final]), tol)
    compare_grid(report, plan, name, torch.tensor([t for t, _ in calls], dtype=torch.float64), space)
    if plan.name.startswith("CM"):                     # an output under that library's own boundary scalings
        report.skip(f"pred0:{name}")
    sign = -1 if plan.family == "edm" and plan.kind == "v" or plan.name.startswith("MiniMax") else 1
    if f"pred0:{name}" in report.left:
        report.same(f"pred0:{name}", sign * outputs[0], 2e-4)


def compare_grid(report, plan, name, t, space=None):
    """The times of the network's calls and their levels against the recorded ones."""
    process = plan.process
    if space:
        a, s = process.path(t)
        for key, ours in (("alpha", a / a if space == "ve" else a), ("sigma", s / a if space == "ve" else s)):
            report.same(f"{key}:{name}", ours, 1e-3, scale=report.case.outputs[f"{key}:{name}"].abs() + 1e-2)
    between = any(getattr(plan.c, f"use_{k}", False)
                  for k in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas", "flow_sigmas"))
    # levels between the table's whole steps: the library rounds or interpolates their times in its own way
    steep = 5.0 if getattr(plan.c, "rescale_betas_zero_snr", False) else 1.0         # its last step is from 4096
    slack = steep if between else 0.02 if plan.sampler.startswith("dpm") else 2e-3
    ref = report.case.outputs[f"t:{name}"]
    if plan.log_linear:                                # its times do not belong to its levels
        report.skip(f"t:{name}")
    else:
        scale = torch.tensor(1.0 if ref.abs().max() > 2 else 0.01)
        report.same(f"t:{name}", plan.told(t), slack, scale=scale)
    if f"sigmas:{name}" in report.left:                # without repetitions
        flow = plan.family == "flow" or getattr(plan.c, "use_flow_sigmas", False)
        s = process.path(plan.times)[1] if flow else process.p(plan.times)
        s = torch.cat([s, s.new_zeros(1)]) if plan.log_linear else s
        distinct = lambda v: v[torch.cat([torch.ones(1, dtype=torch.bool), v.diff().abs() > 1e-5 * v[1:]])]
        scale = distinct(report.case.outputs[f"sigmas:{name}"].double()).clamp(min=1e-3)
        report.same(f"sigmas:{name}", distinct(s), 1e-3, scale=scale, select=distinct)
    if f"sigmas_interpol:{name}" in report.left and plan.sampler == "dpm2":        # the middle points, at second calls
        middle = process.p(t)[1::2]
        report.same(f"sigmas_interpol:{name}", middle, 1e-3, select=lambda ref: ref[1:1 + 2 * len(middle):2])
    report.skip(f"sigmas_interpol:{name}")
    if f"alphas:{name}" in report.left:                # iPNDM: "betas" is sigma, "alphas" alpha
        for key, ours in zip(("alphas", "betas"), process.path(plan.times)):
            report.same(f"{key}:{name}", ours, 1e-5)


RUNS["scheduler"] = run_diffusers
CHECKS = {"sampler": check_sampler}
partial  # noqa: B018
