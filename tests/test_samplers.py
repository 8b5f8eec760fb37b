"""samplers.py against what theory says: orders of convergence, closed-form moments, equivalences, what every sampler
must survive, and what users can choose."""

import ast
import functools
import inspect
import itertools
import math
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import MEANS, Tiny, end, gaussian, made, mixture, no_noise, seeded_noise, start
from diffusers_plan import CLASSES
from golden_kdiffusion import FUNCTIONS
from PIL import Image
from test_train import TINY, call, here, refused  # noqa: F401 (a fixture among them)

import build
import diffusion as D
import sample
import samplers as S
import train

torch.set_num_threads(1)
LINEAR = D.Discrete(D.linear_betas())
double = partial(torch.tensor, dtype=torch.float64)
# a sampler that is none of the rest: runs upwards; needs a network of two times; takes steps of its own
ODES = [name for name, walk in S.SAMPLERS.items() if "s_churn" in S.options_of(walk) and name != "edm"]
MULTISTEP = [n for n, walk in S.SAMPLERS.items() if "lower_final" in S.options_of(walk)]
PLAIN = [n for n in S.SAMPLERS if n not in ("ddim-inversion", "rk45", "dpm-adaptive")]


# ------------------------------------------------------------------------------------------------ orders of convergence


def lambda_grid(process, n, low=-2.0, high=2.5, eased=False):
    """Even steps in lambda, both ends at positive noise, where every solver shows its own order. eased: two short steps
    first, h^2 and h^(4/3) from the start, so that the low orders in which a multistep method begins do not hide its
    own."""
    lam = torch.linspace(low, high, n + 1, dtype=torch.float64)
    if eased:
        h = (high - low) / n
        lam = torch.cat([lam[:1], low + double([h**2, h ** (4 / 3)]), lam[1:]])
    return process.time(torch.exp(-lam))


@functools.cache
def reference_end():
    return end(S.rk4, D.VP("eps"), lambda_grid(D.VP("eps"), 500), start())


def measured_order(walk, process, sizes, eased=False, **options):
    errors = [(end(walk, process, lambda_grid(process, n, eased=eased), start(), **options) - reference_end()).abs()
              .mean().item() for n in sizes]
    return math.log(errors[-2] / errors[-1]) / math.log(sizes[-1] / sizes[-2])


ORDERS = [  # sampler, options, theoretical order, steps
    ("ddim", {}, 1, (160, 320)),
    ("euler", {}, 1, (160, 320)),
    ("euler-ancestral", {"eta": 0.0}, 1, (160, 320)),
    ("heun", {}, 2, (40, 80)),
    ("midpoint", {}, 2, (80, 160)),
    ("rk4", {}, 4, (20, 40)),
    ("edm", {"s_churn": 0.0}, 2, (40, 80)),
    ("sit-ode", {}, 2, (160, 320)),
    ("sit-ode", {"method": "heun3"}, 3, (80, 160)),
    ("sit-ode", {"method": "rk4"}, 4, (80, 160)),
    ("sit-ode", {"method": "3/8"}, 4, (80, 160)),
    ("dpm2", {}, 2, (40, 80)),
    ("dpm2-ancestral", {"eta": 0.0}, 2, (40, 80)),
    ("dpm3", {}, 3, (20, 40)),
    ("dpmpp-2s", {}, 2, (40, 80)),
    ("dpmpp-2s-ancestral", {"eta": 0.0}, 2, (40, 80)),
    ("dpmpp-sde", {"eta": 0.0}, 2, (40, 80)),
    ("dpm-solver", {}, 3, (60, 120)),
    ("dpm-solver", {"solver": "heun"}, 3, (60, 120)),
    ("dpmpp-singlestep", {}, 2, (80, 160)),
    ("dpmpp-singlestep", {"order": 3, "solver": "heun"}, 3, (60, 120)),
    ("lms", {}, 4, (80, 160)),
    ("lms", {"order": 2}, 2, (160, 320)),
    ("ipndm", {}, 2, (160, 320)),
    ("dpm-solver-2m", {}, 2, (80, 160)),
    ("dpm-solver-2m", {"solver": "heun"}, 2, (80, 160)),
    ("dpm-solver-3m", {}, 3, (160, 320)),
    ("dpmpp-2m", {}, 2, (80, 160)),
    ("dpmpp-2m", {"solver": "heun"}, 2, (80, 160)),
    ("dpmpp-3m", {}, 3, (160, 320)),
    ("dpmpp-2m-sde", {"eta": 0.0}, 2, (80, 160)),
    ("dpmpp-3m-sde", {"eta": 0.0, "published": False}, 3, (160, 320)),
    ("deis", {}, 3, (160, 320)),
    ("deis", {"order": 2}, 2, (80, 160)),
    ("unipc", {}, 3, (80, 160)),
    ("unipc", {"order": 3}, 4, (80, 160)),
    ("unipc", {"order": 1}, 2, (80, 160)),
    ("unipc", {"bh": "bh1"}, 3, (80, 160)),
    ("unipc", {"form": "eps"}, 3, (80, 160)),
    ("sa-solver", {"tau": 0.0, "order": 3, "corrector": 3}, 3, (200, 400)),
    ("sa-solver", {"tau": 0.0}, 2, (80, 160)),
]


@pytest.mark.parametrize("name, options, order, sizes", ORDERS, ids=[f"{n}-{o}" for n, o, *_ in ORDERS])
def test_order_of_convergence(name, options, order, sizes):
    options = options | ({"lower_final": False} if name in MULTISTEP else {})
    eased = order > 2 and name not in ("unipc", "rk4")
    measured = measured_order(S.SAMPLERS[name], D.VP("eps"), sizes, eased, **options)
    assert abs(measured - order) < 0.3, f"{name} {options}: order {measured:.2f} instead of {order}"


def test_published_third_order_is_second_order():
    """Published code takes half of the second derivative: the option is of order 2, the formula of order 3."""
    orders = [measured_order(S.dpmpp_3m, D.VP("eps"), (80, 160), True, published=p, lower_final=False)
              for p in (False, True)]
    assert abs(orders[0] - 3) < 0.3 and abs(orders[1] - 2) < 0.3, orders


@pytest.mark.parametrize("name, order", [("pndm", 4), ("plms", 3), ("ipndm", 2), ("lms", 2), ("rk4", 4), ("euler", 1)])
def test_order_on_a_straight_path_in_even_steps(name, order):
    """Even steps of t, for which the Adams-Bashforth weights of PNDM are exact; its order is then that of its warm-up.
    """
    process, x = D.RectifiedFlow(), start()
    grid = lambda n: torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64)
    exact = end(S.rk4, process, grid(320), x)
    errors = [(end(S.SAMPLERS[name], process, grid(n), x) - exact).abs().mean().item() for n in (40, 80)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3, errors


@pytest.mark.parametrize("name, loose, tight", [("rk45", 1e-4, 1e-7), ("dpm-adaptive", 1e-2, 1e-5)])
def test_adaptive_solvers_reach_their_tolerance(name, loose, tight):
    process = D.VP("eps")
    errors = [(end(S.SAMPLERS[name], process, lambda_grid(process, 1), start(), rtol=tol, atol=tol) - reference_end())
              .abs().max() for tol in (loose, tight)]
    assert errors[0] < 10 * loose and errors[1] < 10 * tight


# -------------------------------------------------------------------------------------------------- stochastic samplers

STOCHASTIC = [
    ("ddpm", {}, 250),
    ("ddpm", {"variance": "large"}, 150),
    ("ddim", {"eta": 1.0}, 250),
    ("ddim", {"eta": 0.5}, 100),
    ("euler-ancestral", {}, 250),
    ("flow-ancestral", {}, 250),
    ("edm", {}, 60),
    ("dpm2-ancestral", {}, 60),
    ("dpmpp-2s-ancestral", {}, 60),
    ("dpmpp-sde", {}, 200),
    ("dpmpp-2m-sde", {}, 60),
    ("dpmpp-3m-sde", {}, 60),
    ("dpmpp-singlestep", {"eta": 1.0}, 400),        # two of its steps are one of dpmpp-sde, of first order
    ("dpm-adaptive", {"eta": 1.0, "rtol": 0.01}, 1),
    ("sa-solver", {}, 60),
    ("sa-solver", {"tau": lambda t: float(t > 0.3)}, 60),
    ("sit-sde", {}, 150),
    ("sit-sde", {"diffusion": "linear", "method": "heun"}, 100),
    ("pc", {"corrector": "none"}, 150),
    ("pc", {"predictor": "euler", "corrector": "none"}, 300),
    ("pc", {"predictor": "ancestral", "snr": 0.1}, 150),
]


@pytest.mark.parametrize("name, options, n", STOCHASTIC, ids=[f"{n}-{list(o)}" for n, o, _ in STOCHASTIC])
def test_stochastic_samplers_have_the_gaussians_moments(name, options, n):
    """Data N(0.7, 0.5^2): the samples' mean and variance are those of the data, to sampling and discretisation error.
    """
    process, mean, std = D.VP("eps"), 0.7, 0.5
    noise = seeded_noise()
    times = torch.cat([process.time(torch.exp(torch.linspace(5, -5, n + 1, dtype=torch.float64))), double([0.0])])
    x = end(S.SAMPLERS[name], process, times, noise((10000, 1, 1, 1)), noise, gaussian(process, mean, std), **options)
    assert abs(x.mean().item() - mean) < 0.03, x.mean()
    assert abs(x.var().item() / std**2 - 1) < 0.08, x.var()


def test_one_stochastic_step_has_the_closed_form_variance():
    """One step of eta on exact Gaussian data: x_j is linear in x_i, so its variance is known to rounding."""
    process, std, eta = D.VP("eps"), 0.5, 0.8
    times = double([0.6, 0.4])
    i, j = S.levels(process, times)
    up = eta * j.sigma * math.sqrt(1 - (j.sigma * i.alpha / (j.alpha * i.sigma)) ** 2)       # 2010.02502, eq. 16
    down = math.sqrt(j.sigma**2 - up**2)
    gain = (j.alpha * i.alpha * std**2 + down * i.sigma) / (i.alpha**2 * std**2 + i.sigma**2)  # x_j per x_i
    one, ones = torch.ones(1, 1, 1, 1, dtype=torch.float64), lambda shape: torch.ones(shape, dtype=torch.float64)
    moved = end(S.ddim, process, times, one, no_noise, gaussian(process), eta=eta)
    pushed = end(S.ddim, process, times, 0 * one, ones, gaussian(process), eta=eta)
    assert torch.allclose(moved, gain * one) and torch.allclose(pushed, up * one)
    assert S.below(process, i, j, eta).sigma == pytest.approx(down)


# -------------------------------------------------------------------------------------------------------- equivalences

TWINS = [
    ("ddim", {}, "euler", {}),
    ("ddpm", {}, "ddim", {"eta": 1.0}),
    ("euler-ancestral", {}, "ddim", {"eta": 1.0}),
    ("euler-ancestral", {"eta": 0.0}, "euler", {}),
    ("flow-ancestral", {"eta": 0.0}, "euler", {}),
    ("edm", {"s_churn": 0.0}, "heun", {}),
    ("edm", {"s_churn": 9.0, "s_min": 0.1, "s_max": 9.0, "s_noise": 1.1}, "heun",
     {"s_churn": 9.0, "s_min": 0.1, "s_max": 9.0, "s_noise": 1.1}),
    ("tcd", {"eta": 0.0}, "ddim", {}),
    ("dpm2-ancestral", {"eta": 0.0}, "dpm2", {}),
    ("dpmpp-2s-ancestral", {"eta": 0.0}, "dpmpp-2s", {}),
    ("dpmpp-sde", {"eta": 0.0}, "dpmpp-2s", {}),
    ("dpmpp-2m-sde", {"eta": 0.0}, "dpmpp-2m", {}),
    ("dpmpp-3m-sde", {"eta": 0.0}, "dpmpp-3m", {"published": True, "lower_final": False}),
    ("sa-solver", {"tau": 0.0, "order": 1, "corrector": 0}, "ddim", {}),
    ("unipc", {"corrector": False}, "dpmpp-2m", {}),
    ("unipc", {"corrector": False, "solver_p": "dpmpp-3m"}, "dpmpp-3m", {}),
    ("unipc", {"solver_p": "dpmpp-2m"}, "unipc", {}),
    ("deis", {"order": 1}, "ddim", {}),
    ("lms", {"order": 1}, "ddim", {}),
    ("dpmpp-singlestep", {"order": 1}, "ddim", {}),
    ("dpm-solver", {"order": 1}, "ddim", {}),
    ("deis", {"order": 2}, "dpm-solver-2m", {"solver": "heun"}),
    ("deis", {"order": 3}, "dpm-solver-3m", {}),
    ("sa-solver", {"order": 1, "corrector": 0}, "ddim", {"eta": 1.0}),
    ("pc", {"corrector": "none", "probability_flow": True, "predictor": "none"}, None, {}),
    ("flow-map", {}, "euler", {}),
]


@pytest.mark.parametrize("a, a_options, b, b_options", TWINS, ids=[f"{a}-{list(o)}={b}" for a, o, b, _ in TWINS])
@pytest.mark.parametrize("process", [D.VP("eps"), LINEAR, D.RectifiedFlow()], ids=["vp", "linear", "flow"])
def test_samplers_that_are_the_same(process, a, a_options, b, b_options):
    times = S.grid_times(process, 12)
    run = lambda name, options: end(S.SAMPLERS[name], process, times, start(), seeded_noise(3), **options)
    ours = run(a, a_options)
    assert torch.allclose(ours, run(b, b_options) if b else start(), rtol=0, atol=1e-9)


def test_a_consistency_step_is_ddims_noise_renewed_in_full():
    process, times = D.RectifiedFlow(), double([0.8, 0.3])
    i, j = S.levels(process, times)
    x0 = mixture(process)(start(), i.t).x0
    ours = end(S.consistency, process, times, start(), seeded_noise())
    assert torch.allclose(ours, j.alpha * x0 + j.sigma * seeded_noise()(x0.shape))


def test_straight_paths_euler_is_the_flow_update():
    process, x = D.RectifiedFlow(), start()
    times, denoise = S.grid_times(process, 5), mixture(process)
    for i, j in itertools.pairwise(times.tolist()):
        d = denoise(x, i)
        x = x + (j - i) * (d.eps - d.x0)
    assert torch.allclose(x, end(S.euler, process, times, start()), atol=1e-12)

    def model(x, t, y):
        d = denoise(x, t / 1000)
        return d.eps - d.x0

    network = process.denoiser(model)
    assert torch.allclose(x, end(S.euler, process, times, start(), denoise=network), atol=1e-12)


def test_a_samplers_path_does_not_depend_on_the_coordinates():
    """VP, VE and flow states of one noise level are multiples: DPM-Solver++ gives the same images on the same lambdas.
    """
    images = []
    for process in (D.VP("eps"), D.EDM(), D.RectifiedFlow(), D.GVP(), D.SubVP("eps")):
        times = process.time(torch.exp(-torch.linspace(-2, 3, 9, dtype=torch.float64)))
        times = torch.cat([times, double([0.0])])
        images.append(end(S.dpmpp_3m, process, times, start() * process.path(times[0].item())[1]))
    assert all(torch.allclose(images[0], image, rtol=0, atol=1e-7) for image in images)


@pytest.mark.parametrize("process", [LINEAR, D.VP("eps"), D.RectifiedFlow("v"), D.GVP("v")],
                         ids=["linear", "vp", "flow", "gvp"])
def test_inversion_returns_the_image(process):
    """DDIM up, then down: back at the image within O(h), so twice the steps halve the error."""
    image, errors = 0.5 * start(3, 4), []
    for n in (50, 100, 200):
        times = S.grid_times(process, n)
        noise = end(S.ddim_inversion, process, times, image)
        errors.append((end(S.ddim, process, times, noise) - image).abs().mean().item())
    assert errors[2] < 0.1 and errors[2] < 0.7 * errors[0], errors


# ------------------------------------------------------------------------------------------ what every sampler survives


@pytest.mark.parametrize("sampler", S.SAMPLERS)
@pytest.mark.parametrize("name", D.PROCESSES)
def test_every_sampler_runs_on_every_process_or_says_why_not(name, sampler):
    torch.manual_seed(0)
    process, model = made(name), Tiny(3)
    x = torch.randn(2, 3, 4, 4) * (0.3 if sampler == "ddim-inversion" else 1)
    try:
        states = list(S.generate(process, model, x, sampler=sampler, steps=3))
    except ValueError as refusal:
        assert sampler in ("sit-ode", "sit-sde", "rk45") and "derivative in t" in str(refusal)
        assert isinstance(process, D.Discrete)
        return
    assert len(states) == 3 or sampler == "dpm-adaptive"
    assert all(s.shape == x.shape and s.dtype == x.dtype and s.isfinite().all() for s in states)
    if sampler != "ddim-inversion":
        bound = 1.5 if sampler != "pc" else 5                        # the last step of pc is the SDE's, not x0
        assert states[-1].abs().max() < bound, "clipped x0 stays in the range, whatever the steps"


@pytest.mark.parametrize("process", [D.VP("eps"), LINEAR, D.RectifiedFlow(), D.EDM()],
                         ids=["vp", "linear", "flow", "edm"])
@pytest.mark.parametrize("sampler", PLAIN)
def test_a_step_of_no_length_changes_nothing(sampler, process):
    """F3: at the beginning, in the middle, and as the last: it crashed about 15 samplers."""
    if sampler.startswith("sit") and process is LINEAR:
        return
    once = process.time(double([4.0, 1.0, 0.4, 0.2, 0.1]))
    twice = once[[0, 0, 1, 1, 2, 3, 3, 4, 4]]
    options = {"lower_final": False} if sampler in MULTISTEP else {}
    options |= {"eta": 0.0} if "eta" in S.options_of(S.SAMPLERS[sampler]) else {}
    options |= {"tau": 0.0} if sampler == "sa-solver" else {}
    options |= {"corrector": 0} if sampler in ("unipc", "sa-solver") else {}     # it would be asked at the corrected x
    options |= {"last_step": "none"} if sampler == "sit-sde" else {}              # the last step, whatever its level
    a, b = (end(S.SAMPLERS[sampler], process, times, start(), **options) for times in (once, twice))
    assert b.isfinite().all()
    # index-based methods count the step, blocks shift, Langevin's corrections and renewed noise happen again
    if sampler not in ("pndm", "plms", "ipndm", "dpm-solver", "dpmpp-singlestep", "pc", "lcm", "consistency", "ddpm",
                       "edm"):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("sampler", [*PLAIN, "dpm-adaptive"])
def test_two_levels_of_pure_noise(sampler):
    """F6: neighbours with alpha below 1e-12 divided by zero."""
    for process, top in ((D.RectifiedFlow("v"), [1.0, 1 - 1e-14]), (D.GVP("v"), [1.0, 1 - 1e-14])):
        times = double([*top, 0.7, 0.4, 0.2, 0.0])
        x = end(S.SAMPLERS[sampler], process, times, start(), seeded_noise())
        assert x.isfinite().all() and x.abs().max() < 20


@pytest.mark.parametrize("sampler", [n for n, w in S.SAMPLERS.items() if "s_noise" in S.options_of(w)])
def test_s_noise_scales_the_noise(sampler):
    """F4: three samplers ignored it. Twice the noise with s_noise 1 is the noise with s_noise 2."""
    options = S.options_of(S.SAMPLERS[sampler])
    more = {"s_churn": 5.0} if "s_churn" in options else {"eta": 1.0} if "eta" in options else {}
    more |= {"snr": 0.0} if sampler == "pc" else {}                  # its step is as long as its noise
    process, twice = D.VP("eps"), lambda shape: 2 * noise(shape)
    times, last = process.time(double([3.0, 1.0, 0.4])), []
    for draw, s_noise in ((twice := twice, 1.0), (None, 2.0), (None, 1.0)):
        noise = seeded_noise()
        last.append(end(S.SAMPLERS[sampler], process, times, start(), draw or noise, s_noise=s_noise, **more))
    assert torch.allclose(last[0], last[1]) and not torch.allclose(last[0], last[2])


@pytest.mark.parametrize("sampler", PLAIN)
def test_the_state_keeps_its_precision_and_images_do_not_depend_on_each_other(sampler):
    process, x = D.VP("eps"), start(3)
    draw = lambda shape: torch.randn((3, *shape[1:]), dtype=torch.float64,
                                     generator=torch.Generator().manual_seed(1))[:shape[0]]
    whole = end(S.SAMPLERS[sampler], process, S.grid_times(process, 5), x, draw)
    assert whole.dtype == torch.float64
    if sampler != "pc":                                              # norms over the batch, as published
        alone = end(S.SAMPLERS[sampler], process, S.grid_times(process, 5), x[:1], draw)
        assert torch.allclose(whole[:1], alone, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["cosine", "linear", "flow", "edm"])
def test_half_precision_noise_gives_states_in_float32(name, dtype):
    """F8: states in half precision drift. What is drawn from half-precision noise is what its float32 copy gives."""
    process, x = D.create_process(name), torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = mixture(process, 0.5 * MEANS)
    model = lambda x, t, y: process.target(*(lambda d: (d.x0, d.eps))(exact(x, t)), t).to(dtype)
    process.network_input, process.network_time = (lambda xt, t: xt), (lambda t: t)
    for sampler in ("dpmpp-2m", "ddim", "heun"):
        states = [list(S.generate(process, model, x0, sampler=sampler, steps=8)) for x0 in (x, x.float())]
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*states))


@pytest.mark.parametrize("sampler", PLAIN)
def test_the_last_step_returns_x0(sampler):
    """So what is clipped stays clipped, whatever the steps before."""
    process, seen = D.VP("eps"), []
    denoise = lambda x, t, *r: seen.append(mixture(process)(x, t)) or seen[-1]
    x = end(S.SAMPLERS[sampler], process, S.grid_times(process, 4), start(), seeded_noise(), denoise=denoise)
    if sampler not in ("pc", "lcm"):               # the SDE's own last step; the boundary condition
        assert torch.allclose(x, seen[-1].x0, atol=1e-9)


TWO_CALLS = ("heun", "edm", "midpoint", "dpm2", "dpm2-ancestral", "dpmpp-2s", "dpmpp-2s-ancestral", "dpmpp-sde",
             "sit-ode")
CALLS = dict.fromkeys(TWO_CALLS, 2) | {"rk4": 4, "dpm3": 3}


@pytest.mark.parametrize("sampler", [s for s in PLAIN if s not in ("pndm", "plms", "pc")])
def test_network_calls_are_as_the_table_says(sampler):
    process, calls = D.VP("eps"), []
    denoise = lambda x, t, *r: calls.append(t) or mixture(process)(x, t)
    end(S.SAMPLERS[sampler], process, S.grid_times(process, 6), start(), denoise=denoise)
    per_step = CALLS.get(sampler, 1)
    assert len(calls) == 6 * per_step - (per_step - 1)                # one into the clean image


@pytest.mark.parametrize("sampler", PLAIN)
def test_overhead_of_a_step(sampler):
    """A network that returns its input, (64, 3, 32, 32): what a call costs beside it, in passes over the state, whose
    time is taken in between, so that a busy or slow machine changes little. 2 ms on an idle core are 40 of them."""
    process, x = D.create_process("flow" if sampler.startswith("sit") else "linear"), torch.randn(64, 3, 32, 32)
    noise, calls, ratios = torch.randn_like(x), [], []
    model = lambda x, t, y: calls.append(0) or x
    for _ in range(4):
        calls.clear()
        times = [time.process_time()]
        for _x in S.generate(process, model, x, sampler=sampler, steps=8, clip=False, noise=lambda s: noise):
            pass
        times.append(time.process_time())
        for _k in range(40):
            torch.add(x, noise, alpha=0.5)
        times.append(time.process_time())
        ratios.append((times[1] - times[0]) / len(calls) / ((times[2] - times[1]) / 40))
    assert min(ratios) < 40, f"{min(ratios):.0f} passes a call"


# ---------------------------------------------------------------------------------------------------- what users choose


@pytest.mark.parametrize("grid", S.GRIDS)
@pytest.mark.parametrize("name", D.PROCESSES)
def test_grids_fall_from_noise_to_the_clean_image(name, grid):
    process = D.create_process(name)
    try:
        times = S.grid_times(process, 10, grid)
    except ValueError as refusal:
        assert len(str(refusal)) > 20
        assert grid in ("spaced", "leading", "trailing", "fast") or name in ("zero-snr", "gvp")  # of infinite s
        return
    assert len(times) == 11 and (times.diff() < 0).all() and times[-1] == process.t_clean
    assert times[0] <= process.t_noisy and S.grid_times(process, 10, grid, "least")[-1] == process.t_least


@pytest.mark.parametrize("text, levels", [
    ("karras:rho=3,sigma_min=1,sigma_max=8", [8.0, 3.375, 1.0]),
    ("exponential:sigma_min=1,sigma_max=16", [16.0, 4.0, 1.0]),
    ("exponential:rho=2,sigma_min=1,sigma_max=16", [16.0, 2.0, 1.0]),
    ("beta:a=1.0,b=1.0,sigma_min=1,sigma_max=3", [3.0, 2.0, 1.0]),
])
def test_ends_and_rho_of_a_grid(text, levels):
    grid = build.bound("grid", text, S.GRIDS)
    assert S.grid_times(D.EDM(), 3, grid)[:-1].tolist() == pytest.approx(levels, abs=1e-4)


def test_lists_of_times_and_of_noise_levels():
    assert S.listed_times(LINEAR, [999, 499, 20]).tolist() == [999, 499, 20, -1]
    sigmas = LINEAR.p(double([900.0, 100.0])).tolist()
    assert S.listed_times(LINEAR, sigmas=[*sigmas, 0.0]).tolist() == pytest.approx([900, 100, -1])
    assert S.listed_times(D.RectifiedFlow(), sigmas=[1.0, 0.4]).tolist() == pytest.approx([1.0, 0.4, 0.0])
    seen = []
    model = lambda x, t, y: seen.append(t[0].item()) or x
    list(S.generate(LINEAR, model, start(), sampler="ddim", times=[999, 499, 20]))
    assert seen == [999, 499, 20]


def test_lambda_min_leaves_the_noisiest_steps_of_the_cosine_chain_out():
    process = D.create_process("cosine")
    for grid in ("trailing", "spaced", "linspace", "karras"):
        times = S.grid_times(process, 10, grid, lambda_min=-5.1)
        assert 4.8 < -S.levels(process, times[:1])[0].lam <= 5.1 and (times.diff() < 0).all() and times[-1] == -1
    zero = D.create_process("zero-snr")
    assert S.grid_times(zero, 10, "trailing", lambda_min=-5.1)[0] == 999              # pure noise stays
    assert torch.equal(S.grid_times(LINEAR, 10, "trailing", lambda_min=-5.1), S.grid_times(LINEAR, 10, "trailing"))


def ring(process):
    """Five modes of standard deviation 0.12 on a ring of radius 0.7, as a float32 network told t: mean distance to the
    nearest mode 0.15."""
    modes = [0.7 * double([math.cos(a), math.sin(a)]).view(1, 2, 1, 1) for a in torch.arange(5) * 2 * math.pi / 5]
    exact = mixture(process, modes, 5 * [0.12], 5 * [0.2])

    def model(x, t, y=None):
        d = exact(x.double(), t.double())
        return process.target(d.x0, d.eps, t.double()).float()

    def distance(x):
        return torch.stack([(x.double() - m).flatten(1).norm(dim=1) for m in modes]).amin(0).mean().item()

    return model, distance


@pytest.mark.parametrize("chain", ["linear", "cosine", "scaled-linear", "sigmoid", "laplace", "zero-snr"])
@pytest.mark.parametrize("sampler", [s for s in PLAIN if not s.startswith("sit")])
def test_default_grids_reach_the_modes(sampler, chain):
    """F1: with the defaults of each sampler, at 20 steps: 0.15 is exact; it was 0.85 for some. At 3 steps nothing
    leaves the range."""
    process = D.create_process(chain)
    (model, distance), g = ring(process), torch.Generator().manual_seed(0)
    x, noise = torch.randn(200, 2, 1, 1, generator=g), lambda shape: torch.randn(shape, generator=g)
    *_, image = S.generate(process, model, x, sampler=sampler, steps=20, noise=noise)
    assert distance(image) < 0.33, distance(image)
    for steps in (2, 3, 15):
        *_, image = S.generate(process, model, x, sampler=sampler, steps=steps, noise=noise)
        assert image.abs().max() < (1.5 if sampler != "pc" else 5), "the last step of pc is the SDE's, not x0"


@pytest.mark.parametrize("sampler", ODES)
def test_churn_for_every_ode(sampler):
    """With new noise before each step the images still have the data's moments: that noise is of the level's own size.
    """
    process, noise = D.VP("eps"), seeded_noise()
    times = torch.cat([process.time(torch.exp(torch.linspace(4, -4, 81, dtype=torch.float64))), double([0.0])])
    options = {"s_churn": 4.0, "s_min": 0.05, "s_max": 20.0}
    options |= {"rtol": 1e-3, "atol": 1e-3} if sampler == "rk45" else {}
    plain, churned = (end(S.SAMPLERS[sampler], process, times, seeded_noise(2)((4000, 1, 1, 1)), noise,
                          gaussian(process, 0.7), **o) for o in ({}, options))
    assert abs(churned.mean().item() - 0.7) < 0.04 and abs(churned.var().item() / 0.25 - 1) < 0.1
    assert (plain - churned).abs().mean() > 0.01


@pytest.mark.parametrize("sampler", ["lms", "pndm", "plms", "ipndm", "deis", "unipc", "sa-solver", "dpm-solver",
                                     "dpmpp-singlestep", *(n for n in MULTISTEP if "m" in n)])
@pytest.mark.parametrize("cut", [5, 7])
def test_a_walk_cut_in_two_goes_on_with_its_memory(sampler, cut):
    """Restart of a multistep trajectory: bit for bit the walk in one piece; without the memory it is another."""
    process = D.VP("eps")
    times, walk, noise = S.grid_times(process, 9), S.SAMPLERS[sampler], seeded_noise()
    whole = list(walk(mixture(process), start(), times, process, noise))
    memory, noise = {}, seeded_noise()
    states = list(itertools.islice(walk(mixture(process), start(), times, process, noise, memory), cut))
    rest = list(walk(mixture(process), states[-1], times[cut:], process, noise, memory))
    assert all(torch.equal(a, b) for a, b in zip(whole, states + rest))
    forgotten = end(walk, process, times[cut:], states[-1], seeded_noise())
    assert not torch.equal(forgotten, whole[-1])


@pytest.mark.parametrize("sampler, options", [("dpmpp-2m-sde", {}), ("ddim", {"eta": 1.0}), ("euler-ancestral", {}),
                                              ("sa-solver", {}), ("dpmpp-sde", {})])
def test_brownian_noise_is_one_path_for_any_number_of_steps(sampler, options):
    """The images of 40 and of 80 steps come closer to each other than those of two seeds, and than those of noise that
    knows nothing of steps; image i depends on stream i alone; the noise is standard normal."""
    process, x = D.VP("eps"), start(8)
    denoise = mixture(process)
    keys = lambda seed: lambda shape: torch.stack([torch.randn(
        shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i)) for i in range(shape[0])])

    def images(n, seed, rows=8, brownian=True):
        walk = S.draw(process, denoise, x[:rows], sampler=sampler, steps=n, grid="exponential", brownian=brownian,
                      noise=keys(seed), **options)
        *_, last = walk
        return last

    fine, coarse, other = images(40, 0), images(20, 0), images(40, 1000)
    assert (fine - coarse).abs().mean() < 0.5 * (fine - other).abs().mean()
    assert torch.allclose(images(20, 0, rows=3), coarse[:3], rtol=0, atol=1e-10)
    noise = S.Brownian(torch.randn, 400)
    i, j = S.levels(process, double([0.5, 0.45]))
    z = noise.between((400, 1, 1, 1), i, j)
    assert abs(z.mean()) < 0.15 and abs(z.var() - 1) < 0.2


def test_a_brownian_steps_noise_is_that_of_its_halves():
    """With x0 constant, one step of the SDE and two of them end in the same state: the path decides, not the steps."""
    process, x = D.VP("eps"), start(8)
    fixed = lambda x, t: D.Denoised(0 * x, (x / process.path(t)[1]))
    noise, ends = S.Brownian(seeded_noise(), 8), []
    for times in ([0.8, 0.3], [0.8, 0.55, 0.3], [0.8, 0.7, 0.6, 0.4, 0.3]):
        ends.append(end(S.ddim, process, double(times), x, noise, fixed, eta=1.0))
    assert torch.allclose(ends[0], ends[1], atol=1e-6) and torch.allclose(ends[0], ends[2], atol=1e-6)


def test_image_to_image():
    """strength is the share of the steps; the weaker, the nearer to the image; full strength from an exploding
    process's noise begins at its first level."""
    process, image, calls = D.RectifiedFlow("v"), 0.5 * start(16, 3), []
    denoise = lambda x, t: calls.append(t) or mixture(process)(x, t)
    distances = []
    for strength in (0.2, 0.5, 1.0):
        calls.clear()
        *_, x = S.draw(process, denoise, start(16), sampler="ddim", steps=10, image=image, strength=strength)
        assert len(calls) == 10 * strength and calls[0] == pytest.approx(strength)
        distances.append((x - image).abs().mean().item())
    assert distances == sorted(distances)
    edm = D.EDM("x0")
    first = []
    list(S.draw(edm, lambda x, t: first.append(x) or mixture(edm)(x, t), start(2), sampler="ddim", steps=4,
                image=image[:2], strength=1.0))
    assert torch.allclose(first[0], image[:2] + 80 * start(2))


def test_repaint_keeps_what_is_known_and_paints_the_rest():
    """RePaint, on a Gaussian whose two halves are one number: the painted half becomes the known one. Its walk is the
    paper's: up by jump_length, jump_n_sample times down."""
    process, n = LINEAR, 2000

    def denoise(x, t):                                   # data (u, u), u ~ N(0, 0.5^2)
        a, s = process.path(t)
        gain = a * 0.25 / (2 * a * a * 0.25 + s * s)
        x0 = (gain * x.sum(2, keepdim=True)).expand_as(x)
        return D.Denoised(x0, (x - a * x0) / s)

    image = 0.5 * seeded_noise(5)((n, 1, 1, 1)).expand(n, 1, 2, 1)
    mask = double([1.0, 0.0]).view(1, 1, 2, 1)
    errors = []
    for jumps in (1, 5):
        *_, x = S.draw(process, denoise, seeded_noise()((n, 1, 2, 1)), steps=40, image=0.0 + image, mask=mask,
                       noise=seeded_noise(7), jump_length=2, jump_n_sample=jumps)
        assert torch.allclose(x[:, :, 0], image[:, :, 0], atol=1e-12)
        errors.append((x[:, :, 1] - image[:, :, 1]).square().mean().sqrt().item())
    assert errors[1] < 0.7 * errors[0] < 0.06, errors
    assert S.repaint_walk(4, 2, 2) == [0, 1, 2, 3, 2, 1, 2, 3, 4]


def test_flow_maps_are_told_both_times():
    process, told = D.RectifiedFlow(), []

    class TwoTimes(torch.nn.Module):
        two_times = True

        def forward(self, x, t, y, r):
            told.append((t[0].item(), r[0].item()))
            return torch.ones_like(x)

    *_, x = S.draw(process, process.denoiser(TwoTimes()), start(), sampler="flow-map", steps=2)
    assert told == [(1000.0, 500.0), (500.0, 0.0)] and torch.allclose(x, start() - 1)


def test_the_options_of_samplers_are_those_of_the_house():
    """build.py sees what a user may set, and nothing else."""
    for registry in (S.SAMPLERS, S.GRIDS):
        for name, entry in registry.items():
            assert set(build.parameters(entry)) == set(S.options_of(entry)), name
    walk = build.bound("sampler", "unipc:order=3,uncorrected=(0,1),solver_p=dpmpp-2m", S.SAMPLERS)
    assert len(list(S.draw(LINEAR, mixture(LINEAR), start(), sampler=walk, steps=5))) == 5



# ---------------------------------------------------------------------------------------------------------- their page


PAGE = (Path(S.__file__).parent / "docs" / "samplers.md").read_text()


def test_names_of_the_page():
    """Every flag, every class of diffusers and function of k-diffusion that the tests compare with, and nothing else of
    theirs."""
    table = PAGE.split("## Names")[1].split("Not here:")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [*(f"`{name}`" for name in S.SAMPLERS), "`--inpaint`"]
    classes = {word for row in rows for word in re.findall(r"\b[A-Z]\w+\b", re.sub(r"`[^`]*`|\(.*?\)", "", row[2]))}
    compared = {name.removesuffix("Scheduler").removesuffix("Discrete") for name in CLASSES}
    assert {name.removesuffix("Discrete") for name in classes} - {"RePaint", "KarrasVe", "ScoreSdeVe"} == compared
    assert {word for row in rows for word in re.findall(r"sample_\w+", row[3])} == set(FUNCTIONS)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.S), ids=lambda c: c.split("(")[0][4:])
def test_definitions_of_the_page_are_those_of_the_file(code):
    assert code in Path(S.__file__).read_text()


@pytest.mark.parametrize("name", S.SAMPLERS)
def test_a_definition_fits_on_a_screen(name):
    """25 lines, its docstring not counted."""
    tree = ast.parse(inspect.getsource(inspect.unwrap(S.SAMPLERS[name]))).body[0]
    assert tree.end_lineno - tree.body[1].lineno + 1 <= 25


# ----------------------------------------------------------------------------------------------- from the command line


def test_what_users_set_reaches_the_sampler(here, capsys):  # noqa: F811
    """Each drawing option through sample.py: it is taken, and changes what is drawn; nonsense is refused by name."""
    call(train.train, *TINY, "--process", "linear", "--prediction", "v", "--steps", "2", "--out", "run")
    draws = {}
    for words in (["--times", "999,700,400,100"], ["--sigmas", "100,3,0.3"], ["--lambda-min", "-2.5"],
                  ["--brownian", "True", "--sampler", "ddim:eta=1"], ["--clip-range", "0.2"],
                  ["--threshold", "0.5", "--clip-range", "0.3"], ["--sampler", "ddim:eta=1"],
                  ["--threshold", "0.5", "--clip-range", "0.3", "--threshold-max", "0.4"], ["--last", "least"],
                  ["--grid", "karras:rho=5,sigma_max=20"], ["--sampler", "heun:s_churn=5,s_noise=1.01"],
                  ["--sampler", "unipc:order=3,solver_p=dpmpp-2m"], []):
        call(sample.sample, "run", "--n", "2", "--steps", "4", *words, "--out", "x.npz")
        draws[" ".join(words)] = np.load("x.npz")["arr_0"].tobytes()
    same = [(a, b) for a, b in itertools.combinations(draws, 2) if draws[a] == draws[b]]
    assert not same
    for words, word in ((["--times", "1,2"], "fall"), (["--times", "2000,1"], "lives"), (["--sigmas", "-1"], "between"),
                        (["--brownian", "3"], "True"), (["--shift", "auto"], "chain")):
        assert word in refused(capsys, sample.sample, "run", *words), words


def test_an_image_to_begin_at_and_a_hole_to_fill(here, capsys):  # noqa: F811
    """--from: the weaker the nearer; --inpaint: the known pixels stay, bit for bit."""
    call(train.train, *TINY, "--process", "flow", "--steps", "2", "--out", "run")
    side = build.open_run("run").objective.shape[-1]
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    hole = np.zeros((side, side), np.uint8)
    hole[:, side // 2:] = 255
    Image.fromarray(pixels).save("image.png")
    Image.fromarray(hole).save("hole.png")
    away = []
    for strength in ("0.2", "0.9"):
        call(sample.sample, "run", "--n", "2", "--from", "image.png", "--strength", strength, "--out", "x.npz")
        away.append(np.abs(np.load("x.npz")["arr_0"].astype(float) - pixels).mean())
    assert 0 < away[0] < away[1]
    call(sample.sample, "run", "--n", "2", "--inpaint", "image.png", "--mask", "hole.png", "--out", "x.npz")
    drawn = np.load("x.npz")["arr_0"]
    assert (drawn[:, :, :side // 2] == pixels[:, :side // 2]).all() and (drawn != pixels).any()
    call(sample.sample, "run", "--n", "1", "--shift", "auto", "--out", "x.npz")
