"""Recorded trajectories of SiT's samplers, whose time is 1 - ours, of DiT's loops and of minRF's."""

import torch
from recorded import RUNS, Mixture, Watched, check_sampler, network, pool

import diffusion as D
import samplers as S
from guidance import clipped, guided

PATHS = {"Linear": D.RectifiedFlow, "GVP": D.GVP, "VP": D.VP}


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
                new = y + h * D.weighted_sum(row, slopes)
                slopes.append(f(t + place * h, new))
            error = rms(h * D.weighted_sum(difference, slopes) / (atol + rtol * torch.maximum(y.abs(), new.abs())))
            factor = min(10.0, max(0.9 / error**0.2, 1.0 if error < 1 else 0.2))
            if error <= 1:
                fit = t, h, y, new, y + h * D.weighted_sum(middle, slopes), h * k, h * slopes[-1]
                t, y, k = t + h, new, slopes[-1]
            h *= factor
        start, length, y0, y1, ym, k0, k1 = fit
        u = (end - start) / length
        quartic = (2 * (k1 - k0) - 8 * (y1 + y0) + 16 * ym, 5 * k0 - 3 * k1 + 18 * y0 + 14 * y1 - 32 * ym,
                   k1 - 4 * k0 - 11 * y0 - 5 * y1 + 16 * ym, k0, y0)
        states.append(sum(c * u ** (4 - n) for n, c in enumerate(quartic)))
    return states


def reversed_states(watch, x, times, process, method):
    """Its `reverse`: the ODE from data to noise, upwards in our time."""
    places, rows, weights = S.TABLEAUX[TORCHDIFFEQ.get(method, method)]
    drift = lambda x, s: process.velocity(watch(x, s), s)
    states = [x]
    for a, b in zip(times, times[1:]):
        k = [drift(x, a)]
        for place, row in zip(places, rows):
            k.append(drift(x + (b - a) * place * D.weighted_sum(row, k), a + place * (b - a)))
        x = x + (b - a) * D.weighted_sum(weights, k)
        states.append(x)
    return states


TORCHDIFFEQ = {"rk4": "3/8"}                           # its "rk4" is the 3/8 rule


def run_sit(report, name, run):
    o, case = dict(run["options"]), report.case
    kind, path, prediction = o.pop("kind"), o.pop("path_type", "Linear"), o.pop("prediction", "velocity")
    n, method = o.pop("num_steps"), o.pop("sampling_method", "dopri5" if kind == "ode" else "Euler")
    process = PATHS[path]({"velocity": "velocity", "noise": "eps", "score": "score"}[prediction])
    process.t_noisy, sde, reverse = 1.0, kind == "sde", o.pop("reverse", False)
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
    watch, x = Watched(case, process), case.inputs["x_T"].double()
    if reverse:
        states = reversed_states(watch, x, (1 - t).tolist(), process, method)
    elif method == "dopri5":
        slope = lambda s, x: -process.velocity(watch(x, 1 - s), 1 - s)
        states = torchdiffeq_dopri5(slope, x, (1 - t).tolist())
    elif not sde:
        method = TORCHDIFFEQ.get(method, method)       # also into the clean image, which we leave to DDIM's step
        states = [x, *S.sit_ode(watch, x, t.clamp(min=1e-14), process, None, method=method)]
    else:
        form = form.lower()
        to = [1 - end - size] if last else []
        times = torch.cat([t, torch.tensor(to, dtype=torch.float64)])
        options = {"diffusion": form, "norm": norm, "method": method.lower(),
                   "last_step": {"Mean": "mean", "Tweedie": "tweedie", "Euler": "ode", None: "none"}[last]}
        states = list(S.sit_sde(watch, x, times, process, pool(case), **options))
        states += [] if last else states[-1:]          # its last step of none returns the state again
    report.same(f"x:{name}", torch.stack(states), run["tol"])


def run_dit(report, name, run):
    """Improved DDPM's loops over respaced indices. Their coefficients of x0 are in float32, which shows where alpha is
    5e-5."""
    o, case, tol = dict(run["options"]), report.case, run["tol"]
    learned, kind, cosine = o.pop("learn_sigma", True), o.pop("kind", "ddpm"), o.pop("schedule", "linear") != "linear"
    betas = D.cosine_betas(1000) if cosine else D.linear_betas(1000)
    process = D.Discrete(betas, "x0" if o.pop("predict_xstart", False) else "eps", learned)
    kept = D.respaced(1000, o.pop("respacing"))
    times = torch.tensor([*reversed(kept), -1], dtype=torch.float64)
    seen, predicted = [], []
    own = network(process, Mixture(case.inputs), (lambda x: torch.sin(3 * x)) if learned else None)

    def coded(x, t):                                   # sqrt(1/alpha_bar) x - sqrt(1/alpha_bar - 1) eps
        seen.append(t)
        d = process.denoiser(own)(x, t)
        if process.prediction == "x0":
            return d
        bar = process.alpha_bar[int(t) + 1]
        return d.replace(x0=(1 / bar).sqrt().float() * x - (1 / bar - 1).sqrt().float() * d.eps)

    denoise = clipped(coded, process) if o.pop("clip", False) else coded

    def watched(x, t):
        d = denoise(x, t)
        predicted.append(d.x0)
        return d

    options = {"eta": o.pop("eta", 0.0)} if kind == "ddim" else {
        "variance": "small" if o.pop("sigma_small", False) else "large"}
    if o:
        raise NotImplementedError(f"sampler run {name}: options {o}")
    states = list(S.SAMPLERS[kind](watched, case.inputs["x_T"].double(), times, process, pool(case), **options))
    report.same(f"x:{name}", torch.stack(states), tol)
    report.same(f"pred_xstart:{name}", torch.stack(predicted), tol)
    report.same(f"t:{name}", seen)
    report.same(f"timestep_map:{name}", kept)
    abar = process.alpha(times.flip(0)) ** 2
    report.same(f"betas:{name}", 1 - abar[1:] / abar[:-1])


def run_rf(report, name, run):
    """minRF: Euler from t = 1; class c is component c of the mixture, the null class is all of it."""
    o, case = dict(run["options"]), report.case
    steps, scale, null = o.pop("steps"), o.pop("cfg", 2.0), o.pop("use_null", True)
    if o:
        raise NotImplementedError(f"sampler run {name}: options {o}")
    process, classes = D.RectifiedFlow(), (0, 2)

    def conditional(x, t, y):
        parts = [network(process, Mixture(case.inputs, [c]))(x[n:n + 1], t[n:n + 1] / 1000)
                 for n, c in enumerate(classes)]
        return torch.cat(parts)

    denoise = process.denoiser(conditional)
    if null:
        whole = network(process, Mixture(case.inputs))
        denoise = guided(denoise, process.denoiser(lambda x, t, y: whole(x, t / 1000)), scale)
    x = case.inputs["x_T"].double()
    states = [x, *S.euler(denoise, x, S.grid_times(process, steps), process, pool(case))]
    report.same(f"x:{name}", torch.stack(states), run["tol"])


RUNS |= {"r_sit": run_sit, "r_dit": run_dit, "r_rf": run_rf}
CHECKS = {"sampler": check_sampler}
