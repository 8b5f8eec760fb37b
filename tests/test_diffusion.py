"""diffusion.py and guidance.py against what theory says: conversions, losses, bounds, likelihoods, rules of guidance,
and what must be refused."""

import inspect
import math
from functools import partial

import pytest
import torch
from analytic import MEANS, STDS, Tiny, gaussian, log_density, made, mixture, seeded_noise, start

import build
import diffusion as D
import guidance as G
import samplers as S

double = partial(torch.tensor, dtype=torch.float64)
PROCESSES = [D.RectifiedFlow, D.GVP, D.VP, D.SubVP, D.VE, D.EDM, D.ContinuousCosine]
CHAIN = D.Discrete(D.linear_betas())


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("prediction", D.PREDICTIONS)
@pytest.mark.parametrize("make", PROCESSES, ids=lambda m: m.__name__)
def test_conversions_round_trip(make, prediction):
    process = make(prediction)
    t = torch.linspace(process.t_least, process.t_noisy - 1e-3, 7, dtype=torch.float64)
    x0, eps = (torch.randn(7, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    xt = process.noised(x0, eps, t)
    d = process.denoised(process.target(x0, eps, t), xt, t)
    s = (process.sigma(t) / process.alpha(t)).view(-1, 1, 1, 1)
    assert ((d.x0 - x0).abs() < 1e-6 * (1 + s)).all() and ((d.eps - eps).abs() < 1e-6 * (1 + 1 / s)).all()
    one = process.denoised(process.target(x0, eps, t[3].item()), process.noised(x0, eps, t[3].item()), t[3].item())
    assert torch.allclose(one.x0[3], d.x0[3]) and torch.allclose(one.eps[3], d.eps[3])     # a number for the batch
    if d.flow is not None:
        assert torch.allclose(d.flow, d.eps - d.x0)


@pytest.mark.parametrize("process", [make() for make in PROCESSES] + [CHAIN], ids=lambda p: type(p).__name__)
def test_time_is_the_inverse_of_the_noise_level(process):
    t = torch.linspace(process.t_least, process.t_noisy * 0.99, 9, dtype=torch.float64)
    assert torch.allclose(process.time(process.sigma(t) / process.alpha(t)), t, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name, options, t, alpha, sigma", [
    ("edm", {"sigma_min": 0.01, "sigma_max": 50.0}, 50.0, 1.0, 50.0),
    ("ve", {"sigma_min": 0.1, "sigma_max": 10.0}, 0.5, 1.0, 1.0),
    ("vp", {"beta_min": 1.0, "beta_max": 3.0}, 1.0, math.exp(-1), math.sqrt(1 - math.exp(-2))),
    ("sub-vp", {"beta_min": 1.0, "beta_max": 3.0}, 1.0, math.exp(-1), 1 - math.exp(-2)),
    ("linear", {"T": 2, "start": 0.0005, "end": 0.001}, 1.0, math.sqrt(0.75 * 0.5), math.sqrt(1 - 0.75 * 0.5)),
    ("continuous-cosine", {"offset": 1.0, "power": 1.0}, 0.0, 1.0, 0.0),
])
def test_ends_of_a_process_are_options(name, options, t, alpha, sigma):
    if name == "continuous-cosine":
        options |= {"offset": 0.5}
    process = D.create_process(partial(D.PROCESSES[name], **options))
    assert process.path(t) == pytest.approx((alpha, sigma), abs=1e-12)
    assert set(options) <= set(build.parameters(D.PROCESSES[name]))


def test_times_beyond_a_chain_are_refused_and_never_told():
    """F8: a level that is clamped while the network is told the time that is not."""
    told = []
    denoise = CHAIN.denoiser(lambda x, t, y: told.append(t[0].item()) or x)
    denoise(start(), 1005.0)
    denoise(start(), -1.0)
    assert told == [999.0, 0.0] and CHAIN.path(1005.0) == CHAIN.path(999.0)
    with pytest.raises(ValueError, match="999"):
        S.levels(CHAIN, double([1005.0, 20.0]))


def test_zero_terminal_snr_and_eps():
    betas = D.scaled_linear_betas()
    bar, stretched = torch.cumprod(1 - betas, 0), torch.cumprod(1 - D.zero_terminal_snr(betas), 0)
    assert stretched[-1] == 0 and abs(stretched[0] - bar[0]) < 1e-12 and (stretched.diff() < 0).all()
    with pytest.raises(ValueError, match="pure noise"):                      # F8: built by hand, it gave NaN
        D.Discrete(D.zero_terminal_snr(betas), "eps")


def test_shifts_compose_and_scale_the_noise_level():
    u = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    flow = lambda s: D.RectifiedFlow(shift=s)
    assert torch.allclose(flow(3.0).shifted(flow(2.0).shifted(u)), flow(6.0).shifted(u))
    for make in PROCESSES:
        process, t = make(shift=2.5), torch.linspace(0.2, 0.6, 5, dtype=torch.float64)
        s = process.level_of(process.p(process.shifted(t)))
        assert torch.allclose(s, 2.5 * process.sigma(t) / process.alpha(t))
    t, shifted = torch.arange(0.0, 1000, 111), D.create_process("linear", shift=2.0)
    assert torch.allclose(shifted.p(t), 2 * CHAIN.p(t), rtol=1e-6)


def test_respacing_with_all_steps_is_the_identity():
    process = D.Discrete(D.cosine_betas())
    assert S.grid_times(process, 1000).tolist() == [float(t) for t in range(999, -2, -1)]
    kept = double(D.respaced(1000, "50"))
    *_, log_beta = process.posterior(kept, torch.cat([torch.tensor([-1.0]), kept[:-1]]))
    assert torch.allclose(torch.cumprod(1 - log_beta.exp(), 0), process.alpha(kept) ** 2)
    with pytest.raises(ValueError, match="ddim300"):
        D.respaced(1000, "ddim300")


# ------------------------------------------------------------------------------------------------ weightings, densities


@pytest.mark.parametrize("weighting", D.WEIGHTINGS)
def test_one_weighting_is_one_objective_whatever_is_predicted(weighting):
    """The same error of the denoiser costs the same, and gives the same gradient, whatever is predicted."""
    t = double([0.2, 0.5, 0.8])
    x0, noise = start(3, 1), start(3, 2)
    costs, gradients = [], []
    for prediction in D.PREDICTIONS:
        process = D.VP(prediction, weighting=weighting)
        xt = process.noised(x0, noise, t)
        shift = torch.full_like(x0, 0.1).requires_grad_()  # one wrong x0 for all
        wrong = x0 + shift
        implied = (xt - D.expand(process.alpha(t), xt) * wrong) / D.expand(process.sigma(t), xt)
        loss = process.loss(lambda x, t_, y: process.target(wrong, implied, t), x0, None, t, noise)["loss"]
        costs.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.sum(), shift)[0])
    for cost, gradient in zip(costs, gradients):
        assert torch.allclose(cost, costs[0], rtol=1e-6) and torch.allclose(gradient, gradients[0], rtol=1e-6)


@pytest.mark.parametrize("make, prediction, weighting", [
    (D.VP, "eps", "snr"), (D.VP, "v", "v"), (D.RectifiedFlow, "flow", "flow"), (D.EDM, "edm", "edm"),
    (D.GVP, "velocity", "velocity")])
def test_weightings_that_are_plain_losses(make, prediction, weighting):
    weight = make(prediction, weighting=weighting).weight(double([0.2, 0.5, 0.8]))
    assert torch.allclose(weight, torch.ones(3, dtype=torch.float64), rtol=1e-6)


def test_options_of_weightings():
    """gamma and k of the weightings, by the house's syntax and by hand."""
    snr = double([0.5, 4.0, 40.0])
    assert D.min_snr(snr, gamma=3.0).tolist() == pytest.approx([1.0, 0.75, 0.075])
    assert D.p2(snr, k=0.5, gamma=2.0).tolist() == pytest.approx([1.0, 4.5**-2, 40.5**-2])
    assert D.soft_min_snr(snr, gamma=2.0).tolist() == pytest.approx([0.8, 1 / 3, 1 / 21])
    process = D.create_process("linear", "x0", weighting=build.bound("weighting", "min-snr:gamma=3", D.WEIGHTINGS))
    t = double([300.0])
    weight = process.weight(t) / (process.sigma(t) / process.alpha(t)) ** -2       # of x0's error, over SNR
    assert weight == pytest.approx(D.min_snr((process.alpha(t) / process.sigma(t)) ** 2, gamma=3.0))


@pytest.mark.parametrize("density", D.DENSITIES)
@pytest.mark.parametrize("name", D.PROCESSES)
def test_training_times_stay_on_the_path(name, density):
    process = D.create_process(name, density=density)
    t = process.training_times(torch.linspace(0, 0.999, 50))
    assert t.dtype == torch.float32 and t.unique().numel() > 5
    assert (t >= process.t_clean).all() and (t <= process.t_noisy).all()


# ----------------------------------------------------------------------------------------- learned variance, likelihood


def chain_loss(v, objective="hybrid", learned=True, fixed="large"):
    process = D.Discrete(D.linear_betas(), "eps", learned, objective, fixed)
    x0, t, prediction = start(4, 5).clamp(-1, 1), torch.tensor([0.0, 1.0, 300.0, 999.0]), start(4, 6).requires_grad_()
    out = torch.cat([prediction, torch.full_like(prediction, 2 * v - 1)], 1) if learned else prediction
    return process.loss(lambda x, t, y: out, x0, None, t, start(4, 7)), prediction


def test_the_bound_of_the_hybrid_loss_leaves_the_mean_alone():
    parts, prediction = chain_loss(0.3)
    of_bound = torch.autograd.grad(parts["vb"].sum(), prediction, retain_graph=True, allow_unused=True)[0]
    assert of_bound is None or (of_bound == 0).all()
    assert (torch.autograd.grad(parts["mse"].sum(), prediction)[0] != 0).any()
    kl, prediction = chain_loss(0.3, "kl")
    assert (torch.autograd.grad(kl["loss"].sum(), prediction)[0] != 0).any()


def test_learned_variance_at_its_ends_is_the_fixed_one():
    for v, fixed in ((1.0, "large"), (0.0, "small")):
        learned, fixed_loss = chain_loss(v, "kl")[0]["loss"], chain_loss(v, "kl", False, fixed)[0]["loss"]
        assert torch.allclose(learned[1:], fixed_loss[1:])
    assert torch.allclose(chain_loss(0.4, "vlb")[0]["loss"], 1000 * chain_loss(0.4, "kl")[0]["loss"])


@pytest.mark.parametrize("process", [D.VP("eps"), D.VE("eps"), D.RectifiedFlow("flow")], ids=["vp", "ve", "flow"])
def test_likelihood_with_the_exact_divergence_is_the_mixtures(process):
    process.t_least = 1e-4
    x = start(5, 8) * 0.6
    logp, z = D.log_likelihood(process, mixture(process), x, rtol=1e-6, atol=1e-6)
    assert (logp - log_density(x)).abs().max() < 0.02 and z.shape == x.shape


@pytest.mark.parametrize("network, tolerance, word", [
    (lambda x, t, y: x * math.nan, 1e-3, "NaN"), (lambda x, t, y: x, 0.0, "tolerances"),
    (lambda x, t, y: x, math.nan, "tolerances"), (lambda x, t, y: x, -1.0, "tolerances"),
    (lambda x, t, y: 1e6 * torch.randn_like(x) + 0 * x, 1e-10, "shrink")])
def test_an_ode_without_a_solution_ends_with_a_sentence(network, tolerance, word):
    """F2: rk45 and log_likelihood never returned."""
    process, x = D.VP("eps"), start(2)
    denoise = process.denoiser(network)
    with pytest.raises(ValueError, match=word):
        D.log_likelihood(process, denoise, x, torch.ones_like(x), rtol=tolerance, atol=tolerance)
    if word != "shrink":
        with pytest.raises(ValueError, match=word):
            list(S.rk45(denoise, x, S.grid_times(process, 3), process, None, rtol=tolerance, atol=tolerance))


def test_bits_per_dim_of_the_exact_reverse_process_is_the_entropy():
    """Exact mean and variance of every reverse step of Gaussian data: the bound is -log2 p, to the bins and the tanh.
    """
    process, std = D.Discrete(D.linear_betas(300), learned_variance=True), 0.4
    exact_denoise = gaussian(process, std=std)

    def denoise(xt, t):
        a2, s2 = process.alpha(t) ** 2, process.sigma(t) ** 2
        x0_factor, _, log_small, log_large = process.posterior(t, t - 1)
        variance = log_small.exp() + x0_factor**2 * std**2 * s2 / (a2 * std**2 + s2)  # of x_{t-1} given x_t
        log_small = torch.where(t == 0, process.posterior(torch.ones_like(t), torch.zeros_like(t))[2], log_small)
        v = (variance.log() - log_small) / (log_large - log_small)
        return exact_denoise(xt, t).replace(variance=D.expand(v, xt))

    g = torch.Generator().manual_seed(0)
    x0 = ((torch.randn(64, 1, 4, 4, generator=g) * std).clamp(-0.99, 0.99) * 127.5).round().double() / 127.5
    bits = process.bits_per_dim(denoise, x0, seeded_noise(0))["total"].mean().item()
    exact = 0.5 * math.log2(2 * math.pi * std**2) + (x0**2).mean().item() / (2 * std**2) / math.log(2)
    exact += math.log2(127.5)                              # of 8-bit values
    assert abs(bits - exact) < 0.06, (bits, exact)


def test_optimal_eps_loss_of_a_gaussian():
    process, std, draw = D.VP("eps"), 0.5, seeded_noise(0)
    denoise, shape = gaussian(process, std=std), (20000, 1, 1, 1)
    for t in (0.1, 0.5):
        t = torch.full(shape[:1], t, dtype=torch.float64)
        a, s = process.alpha(t)[0], process.sigma(t)[0]
        loss = process.loss(lambda x, _, y: denoise(x, t).eps, draw(shape) * std, None, t, draw(shape))["loss"].mean()
        assert abs(loss * (a**2 * std**2 + s**2) / (a**2 * std**2) - 1) < 0.03


# ------------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("rule", G.RULES)
def test_guidance_of_equal_predictions_is_the_identity(rule):
    process, x = D.RectifiedFlow(), start(3)
    denoise = mixture(process)
    guided = G.guided(denoise, denoise, 3.0, process=process, rule=G.RULES[rule])
    assert torch.allclose(guided(x, 0.5).x0, denoise(x, 0.5).x0, atol=1e-6)


def test_guidance_options():
    process, x = D.RectifiedFlow(), start(3)
    c, u = mixture(process), mixture(process, MEANS[:1], STDS[:1], (1.0,))
    plain = G.guided(c, u, 2.0)
    assert torch.equal(G.guided(c, u, 1.0)(x, 0.5).x0, c(x, 0.5).x0)
    assert torch.allclose(G.guided(c, u, 0.0)(x, 0.5).x0, u(x, 0.5).x0)
    by_rule = G.guided(c, u, 2.0, process=process, rule=G.cfg)(x, 0.5)
    assert torch.allclose(plain(x, 0.5).x0, by_rule.x0) and torch.allclose(plain(x, 0.5).eps, by_rule.eps)     # linear
    no_rescaling = partial(G.rescale, share=0.0)
    assert torch.allclose(G.guided(c, u, 2.0, process=process, rule=no_rescaling)(x, 0.5).x0, plain(x, 0.5).x0)
    calls = []
    counted = lambda xt, t: calls.append(t) or u(xt, t)
    inside = G.guided(c, counted, 2.0, interval=(0.2, 0.7))
    assert torch.equal(inside(x, 0.9).x0, c(x, 0.9).x0) and not calls
    assert torch.allclose(inside(x, 0.5).x0, plain(x, 0.5).x0) and len(calls) == 1
    first = G.guided(c, u, 2.0, channels=1)(x, 0.5).x0
    assert torch.allclose(first[:, :1], plain(x, 0.5).x0[:, :1]) and torch.equal(first[:, 1:], c(x, 0.5).x0[:, 1:])
    apg = G.guided(c, u, 2.0, process=process, rule=partial(G.apg, eta=1.0, norm=1e9, momentum=0.0))
    assert torch.allclose(apg(x, 0.5).x0, plain(x, 0.5).x0)


def test_falling_guidance_keeps_the_momentum():
    """F5: guidance that falls with time made a new rule, with no memory, at every call. At power 0 it does not fall."""
    process, x = D.RectifiedFlow(), start(3)
    c, u = mixture(process), mixture(process, MEANS[:1], STDS[:1], (1.0,))
    walks = []
    for power in (None, 0.0):
        denoise = G.compose(process, c, u, guidance=3.0, rule="apg", power=power, clip=None)
        walks.append([denoise(x, t).x0 for t in (0.9, 0.8, 0.5)])
    for a, b in zip(*walks):
        assert torch.allclose(a, b)
    fresh = G.compose(process, c, u, guidance=3.0, rule="apg", clip=None)(x, 0.5).x0
    assert (walks[0][2] - fresh).abs().max() > 1e-3, "momentum makes a difference here"


@pytest.mark.parametrize("options, bound", [
    ({}, 1.0), ({"limit": 0.6}, 0.6), ({"quantile": 0.9}, 1.0), ({"limit": 0.5, "quantile": 0.9, "largest": 2.0}, 0.5)])
def test_clipping_and_dynamic_thresholding_keep_x_t(options, bound):
    process, x = D.RectifiedFlow(), 3 * start(3)
    d = G.clipped(mixture(process, 3 * MEANS), process, **options)(x, 0.5)
    assert d.x0.abs().max() == pytest.approx(bound) and torch.allclose(0.5 * d.x0 + 0.5 * d.eps, x)


def test_dynamic_thresholding_scales_by_the_quantile():
    """Its maximum is a choice: with 1, as published code has it, the quantile does nothing."""
    process, x0 = D.RectifiedFlow(), torch.linspace(-4, 4, 101).view(1, 1, 101, 1)
    flat = lambda xt, t: D.Denoised(x0, x0)
    for largest, scale in ((math.inf, 3.6), (2.0, 2.0), (1.0, 1.0)):
        ours = G.clipped(flat, process, 1.0, 0.9, largest)(x0, 0.5).x0
        assert torch.allclose(ours, x0.clamp(-scale, scale) / scale)


def test_clipping_leaves_a_networks_output_alone():
    x = torch.randn(2, 1, 3, 3) * 5
    said, before = x.clone(), x.clone()
    G.clipped(D.RectifiedFlow("x0").denoiser(lambda *_: said), D.RectifiedFlow("x0"))(x, 0.5)
    assert torch.equal(said, before)


def test_stitching_by_steps_and_by_time():
    process, x = D.RectifiedFlow(), start(3)
    small, large = mixture(process, MEANS[:1], STDS[:1], (1.0,)), mixture(process)
    times = S.grid_times(process, 10, partial(S.karras, sigma_max=0.999))
    seen = []
    watch = lambda k, denoise: lambda x, t: seen.append(k) or denoise(x, t)
    both = [watch(0, small), watch(1, large)]
    list(S.euler(G.stitched(both, G.stitch_by_steps(times, (0.3, 0.7))), x, times, process, None))
    assert seen == 3 * [0] + 7 * [1]                      # whole numbers of steps, on any grid
    by_time = G.stitch_by_time((0.3, 0.7), t_noisy=1.0)
    assert [by_time(t) for t in (1.0, 0.71, 0.7, 0.69, 0.0)] == [0, 0, 0, 1, 1]       # the boundary is the smaller's
    assert G.stitch_steps(25, (0.05, 0.95)).count(0) == 1 and G.stitch_steps(10, (0.0, 1.0)) == 10 * [1]


# --------------------------------------------------------------------------------------------------- refusals, listings


@pytest.mark.parametrize("prediction", D.PREDICTIONS)
@pytest.mark.parametrize("name", D.PROCESSES)
def test_every_prediction_trains_and_samples_or_says_why_not(name, prediction):
    torch.manual_seed(0)
    try:
        process = made(name, prediction)
    except ValueError as refusal:
        assert len(str(refusal)) > 30 and (prediction == "velocity" or name == "zero-snr")
        return
    model, x0 = Tiny(3), torch.randn(4, 3, 4, 4)
    t = process.training_times(torch.tensor([0.01, 0.3, 0.6, 0.99]))
    loss = process.loss(model, x0, None, t, torch.randn(4, 3, 4, 4))["loss"]
    assert loss.shape == (4,) and loss.isfinite().all()
    *_, image = S.generate(process, model, torch.randn(2, 3, 4, 4), steps=4)
    assert image.isfinite().all() and image.abs().max() <= 1.001


@pytest.mark.parametrize("wrong, word", [
    (lambda: D.create_process("linaer"), "linaer"),
    (lambda: D.create_process("flow", "noise"), "eps"),
    (lambda: D.create_process("flow", weighting="snrr"), "min-snr"),
    (lambda: D.create_process("flow", density="normal"), "logit-normal"),
    (lambda: D.create_process("flow", learned_variance=True), "chain"),
    (lambda: D.create_process("zero-snr", "eps"), "pure noise"),
    (lambda: D.create_process("linear", weighting="likelihood"), "continuous"),
    (lambda: D.create_process("linear", shift=-1.0), "above 0"),
    (lambda: D.create_process("flow", shift=0.0), "above 0"),
    (lambda: D.create_process("linear", objective="bound"), "hybrid"),
    (lambda: D.EDM(sigma_min=2.0, sigma_max=1.0), "rise"),
    (lambda: D.VP(beta_min=-1.0), "rise"),
    (lambda: S.grid_times(D.RectifiedFlow(), 0), "at least 1"),
    (lambda: S.grid_times(D.RectifiedFlow(), 5, "leading"), "chain"),
    (lambda: S.grid_times(D.RectifiedFlow(), 5, "evenly"), "karras"),
    (lambda: S.grid_times(D.RectifiedFlow(), 5, last="end"), "clean"),
    (lambda: S.grid_times(CHAIN, 1001), "1000"),
    (lambda: S.grid_times(D.EDM(), 5, partial(S.karras, sigma_min=90.0)), "fall"),
    (lambda: S.listed_times(CHAIN, [10.0, 20.0]), "fall"),
    (lambda: S.listed_times(CHAIN, []), "fall"),
    (lambda: next(S.generate(D.RectifiedFlow(), None, start(), sampler="dmp")), "dpmpp-2m"),
    (lambda: next(S.generate(D.RectifiedFlow(), None, start(), null=0, guidance=2.0, rule="cgf")), "apg"),
    (lambda: next(S.generate(D.RectifiedFlow(), None, start(), sampler="heun", eta=1.0)), "s_churn"),
    (lambda: next(S.generate(D.RectifiedFlow(), None, start(), quantile=2.0)), "quantile"),
    (lambda: next(S.generate(D.RectifiedFlow(), None, start(), image=start(), strength=0.0)), "strength"),
])
def test_nonsense_is_refused_with_a_sentence(wrong, word):
    with pytest.raises(ValueError) as refusal:
        wrong()
    assert word in str(refusal.value)


def test_registries_have_one_line_for_the_list_and_options_with_defaults():
    for registry in (S.GRIDS, D.WEIGHTINGS, D.DENSITIES, D.PREDICTIONS, D.PROCESSES, G.RULES, S.SAMPLERS):
        for name, entry in registry.items():
            line = build.line(entry)
            assert 8 < len(line) < 160 and "\n" not in line, (name, len(line), line)
            for option in build.parameters(entry).values():
                assert option.default is not None or option.annotation is not inspect.Parameter.empty, (name, option)
