"""Other libraries beside ours, where they are installed (for comparison only, they are no dependency): diffusers'
schedulers in random configurations, k-diffusion's functions, torchdiffeq's solvers. `--peer-seed N` draws others.

    pip install diffusers k-diffusion torchdiffeq torchsde; pytest -s tests/test_peers.py --peer-seed 7
"""

import functools
import importlib
import importlib.util
import inspect
import math
import random
import sys
import types
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from analytic import end, mixture, seeded_noise, start
from diffusers_plan import CLASSES, plan_of
from golden_diffusers import run_diffusers
from golden_kdiffusion import FUNCTIONS
from recorded import Mixture, Report, unbounded

import diffusion as D
import samplers as S

COUNT = 300
BETAS = ({}, {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
         {"beta_schedule": "squaredcos_cap_v2"}, {"beta_start": 0.0005, "beta_end": 0.015}, {"beta_end": 0.025})
SPACING = ({}, {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"},
           {"timestep_spacing": "linspace"})
LEVELS = ({}, {}, {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True},
          {"use_lu_lambdas": True}, {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"})
CLIPPING = ({"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 1.5},
            {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5})
CHOICES = {                                            # of the remaining options, each left out now and then
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "num_train_timesteps": (1000, 1000, 500),
    "rescale_betas_zero_snr": (True,),
    "variance_type": ("fixed_small", "fixed_large", "fixed_small_log"),
    "set_alpha_to_one": (True, False),
    "skip_prk_steps": (True, False),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "data_prediction",
                       "noise_prediction", "deis"),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "lower_order_final": (True, False),
    "euler_at_final": (True, False),
    "final_sigmas_type": ("zero", "sigma_min"),
    "lambda_min_clipped": (-5.1,),
    "predict_x0": (True, False),
    "disable_corrector": ([], [0], [0, 1]),
    "predictor_order": (1, 2, 3),
    "corrector_order": (0, 1, 2, 3),
    "interpolation_type": ("linear", "log_linear"),
    "shift": (1.0, 3.0, 0.7),
    "shift_terminal": (0.1,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (True,),
    "time_shift_type": ("exponential", "linear"),
    "original_inference_steps": (40, 50),
    "timestep_scaling": (10.0, 5.0),
    "sigma_data": (0.5, 1.0),
    "sigma_schedule": ("karras", "exponential"),
    "rho": (7.0, 5.0),
    "eta": (0.0, 0.5, 1.0),
    "s_noise": (1.0, 1.1),
}
STEP = {                                               # of `step`
    "DDIMScheduler": ({}, {"eta": 0.3}, {"eta": 1.0}, {"use_clipped_model_output": True}),
    "TCDScheduler": ({}, {"eta": 0.0}, {"eta": 1.0}),
    "EulerDiscreteScheduler": ({}, {"s_churn": 8.0, "s_tmin": 0.05, "s_tmax": 30.0, "s_noise": 1.01}),
}
# Not drawn: those of one network, each of which is tried once, and two of golden cases.
ONE_NETWORK = {
    "ConsistencyDecoderScheduler": ({}, 2), "FlowMapEulerDiscreteScheduler": ({"shift": 3.0}, 8),
    "DDPMWuerstchenScheduler": ({"scaler": 1.5}, 12), "MiniMaxH3Scheduler": ({"shift": 5.0}, 9),
    "CogVideoXDPMScheduler": ({"prediction_type": "v_prediction"}, 10),
    "CogVideoXDDIMScheduler": ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                                "timestep_spacing": "trailing"}, 8),
    "DDIMInverseScheduler": ({"clip_sample": False}, 8), "DDPMParallelScheduler": ({"clip_sample": False}, 8),
    "DDIMParallelScheduler": ({"clip_sample": False}, 8)}
NAMES = [n for n in CLASSES if n not in (*ONE_NETWORK, "SCMScheduler", "CMStochasticIterativeScheduler")]


# Where the library is wrong, and the adapters of these tests follow it: (reason, class, whether it shows).
FAULTS = (
    ("DDIM and PNDM step to t - T//n whatever the spacing: on linspace that is none of their times",
     ("DDIMScheduler", "PNDMScheduler"), lambda o: o.get("timestep_spacing") == "linspace"),
    ("PNDM reads v at the beginning of a step, wherever it was said",
     ("PNDMScheduler",), lambda o: o.get("prediction_type") == "v_prediction"),
    ("sde-dpmsolver++ of order 3 subtracts half of the curvature where its derivation adds it",
     ("DPMSolverMultistepScheduler",),
     lambda o: o.get("algorithm_type") == "sde-dpmsolver++" and o.get("solver_order") == 3),
    ("Euler's churn asks the network before the noise is added",
     ("EulerDiscreteScheduler", "EDMEulerScheduler"), lambda o: "s_churn" in o),
    ("DDPM with fixed_large adds noise to its last image where its last time is above 0",
     ("DDPMScheduler",), lambda o: o.get("variance_type") == "fixed_large" and o.get("timestep_spacing") == "trailing"),
)


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: it is for comparison only")


# ------------------------------------------------------------------------------------------------------------ diffusers


def configuration(pick, diffusers):
    """A class with options at random: name, of __init__, of set_timesteps, of step."""
    name = pick.choice(NAMES)
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    init = {key: pick.choice(values) for key, values in CHOICES.items() if key in known and pick.random() < 0.7}
    for group in (BETAS, SPACING, LEVELS, CLIPPING):
        chosen = pick.choice(group)
        if set(chosen) <= set(known):
            init |= chosen
    few = name in ("LCMScheduler", "TCDScheduler")
    given = {"num_inference_steps": pick.randint(2, 8) if few else pick.randint(6, 25)}
    if pick.random() < 0.2 and {"use_dynamic_shifting"} <= set(known) and "Flow" in name:
        init |= {"use_dynamic_shifting": True}
        given |= {"mu": 0.8}
    return name, init, given, dict(pick.choice(STEP.get(name, ({},))))


def space_of(name):
    """What the states are: VP's, x0 + sigma eps, or a flow's."""
    family = CLASSES[name][0]
    return {"sigmas": "ve", "edm": "ve", "flow": "flow"}.get(family, "vp")


def level_of(s, name, init, k, t):
    """alpha and sigma at the k-th call of the network, in the space of its states."""
    if not hasattr(s, "sigmas"):
        tables = {"DDPMWuerstchenScheduler": lambda: s._alpha_cumprod(t, "cpu"),
                  "ConsistencyDecoderScheduler": lambda: s.sqrt_alphas_cumprod[t] ** 2}
        a2 = float(tables.get(name, lambda: s.alphas_cumprod[int(t)])().max())
        return a2**0.5, (1 - a2) ** 0.5
    sigma = float(s.sigmas[k])
    if name == "DPMSolverSDEScheduler" and not s.state_in_first_order:                 # half-way in log sigma
        sigma = float(s.sigmas[k - 1] * s.sigmas[k]) ** 0.5
    if hasattr(s, "sigmas_interpol") and not s.state_in_first_order:
        sigma = float(s.sigmas_interpol[k - ("Ancestral" in name)])
    if space_of(name) == "flow" or init.get("use_flow_sigmas"):
        return 1 - sigma, sigma
    if space_of(name) == "ve":
        return 1.0, sigma
    if name == "IPNDMScheduler":
        return float(s.alphas[k]), float(s.betas[k])
    return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5


def network_output(name, s, init, x, x0, eps, alpha, sigma):
    """What a network of this prediction says."""
    kind = init.get("prediction_type", s.config.get("prediction_type", "epsilon"))
    if CLASSES[name][0] == "edm":
        data = s.config.sigma_data
        out = sigma * data / (sigma**2 + data**2) ** 0.5
        return (x0 - data**2 / (sigma**2 + data**2) * x) / (-out if kind == "v_prediction" else out)
    if name == "ConsistencyDecoderScheduler":
        skip, out = (float(table[s.timesteps[int(sigma < 0.9)]]) for table in (s.c_skip, s.c_out))
        return (x0 - skip * x) / out
    if CLASSES[name][0] == "flow" or kind == "flow_prediction":
        return x0 - eps if name == "MiniMaxH3Scheduler" else eps - x0
    scale = (alpha**2 + sigma**2) ** 0.5
    v = (alpha * eps - sigma * x0) / scale
    return v if name == "IPNDMScheduler" else {"epsilon": eps, "sample": x0, "v_prediction": v}[kind]


def class_of(diffusers, name):
    if name == "ConsistencyDecoderScheduler":
        return getattr(importlib.import_module("diffusers.schedulers.scheduling_consistency_decoder"), name)
    return getattr(diffusers, name)


class Double:
    """torch, in which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def drive(diffusers, name, init, given, step, inputs, jitter=0.0, dtype=torch.float32):
    """The library's own loop: states after each step, and the times and levels of the network's calls. float64: its
    steps in that precision, on the same tables."""
    s = class_of(diffusers, name)(**init)
    s.set_timesteps(**given)
    exact, rest, used, thrown = Mixture(inputs), iter(inputs["noise"]), [], []
    module, rng = sys.modules[type(s).__module__], torch.Generator().manual_seed(5)

    def draw(*_, **__):
        if name == "CogVideoXDPMScheduler" and len(thrown) < len(out["x"]):
            thrown.append(1)                           # after its first step it draws twice, and throws the first away
            return inputs["noise"][0]
        used.append(1)
        return next(rest).to(dtype)

    old = {key: getattr(module, key) for key in ("randn_tensor", "BrownianTreeNoiseSampler") if hasattr(module, key)}
    fakes = {"randn_tensor": draw, "BrownianTreeNoiseSampler": lambda *_, **__: draw}
    if dtype == torch.float64:
        old["torch"], fakes["torch"] = torch, Double()
        for key, value in vars(s).items():
            if torch.is_tensor(value) and value.is_floating_point() and key != "timesteps":
                setattr(s, key, value.double())
    scale = float(s.init_noise_sigma) if space_of(name) == "ve" else 1.0
    x, out = (scale * inputs["x_T"]).to(dtype), {"x": [], "t": [], "alpha": [], "sigma": [], "pred0": None}
    x = x + jitter * scale * torch.randn(x.shape, generator=rng).to(dtype)
    random_like, torch.randn_like, before = torch.randn_like, draw, (None, None)
    try:
        for key in old:
            setattr(module, key, fakes[key])
        for k, t in enumerate(s.timesteps[:-1] if name == "DDPMWuerstchenScheduler" else s.timesteps):
            t = t.expand(len(x)) if name == "DDPMWuerstchenScheduler" else t
            alpha, sigma = level_of(s, name, init, k, t)
            s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else None
            x0, eps = exact(x, alpha, sigma)
            said = network_output(name, s, init, x, x0, eps, alpha, sigma).to(dtype)
            out["pred0"] = said if out["pred0"] is None else out["pred0"]
            said = said + jitter * torch.randn(x.shape, generator=rng).to(dtype)
            if name == "CogVideoXDPMScheduler":        # told of the output and the time before
                x, *before = *s.step(said, before[0], t, before[1], x), t
            else:
                x = s.step(said, t, x, **step).prev_sample
            for key, value in (("x", x), ("t", float(t.max())), ("alpha", alpha), ("sigma", sigma)):
                out[key].append(value)
    finally:
        torch.randn_like = random_like
        for key, value in old.items():
            setattr(module, key, value)
    out = {key: torch.stack(value) if key == "x" else torch.as_tensor(value) for key, value in out.items()}
    return out, len(used), scale


def recorded(diffusers, chosen, inputs, **options):
    """A golden case of one run, or None where the library refuses it, leaves the range, or amplifies rounding. Its
    tolerance: what a disturbance of 1e-6 comes to, ten times, and at least 2e-5."""
    name, init, given, step = chosen
    try:
        out, used, scale = drive(diffusers, *chosen, inputs, **options)
        moved, *_ = drive(diffusers, *chosen, inputs, jitter=1e-6, **options)
    except Exception:  # noqa: BLE001 whatever it raises, it does not offer this
        return None
    response = ((out["x"] - moved["x"]).abs() / (1 + out["x"].abs())).max().item()
    if not out["x"].isfinite().all() or out["x"].abs().max() > 200 or not response <= 1e-3:
        return None
    run = {"scheduler": name, "init": init, "set_timesteps": given, "step": step, "space": space_of(name),
           "init_scale": scale, "noise_used": used, "tol": max(2e-5, 10 * response)}
    outputs = {f"{key}:run": value for key, value in out.items()}
    return SimpleNamespace(config={"runs": {"run": run}}, inputs=inputs, outputs=outputs, meta={"source": "diffusers"})


def verdict(case):
    """None where ours is the same, else what differs."""
    report = Report(case)
    try:
        run_diffusers(report, "run", case.config["runs"]["run"])
        report.close()
    except (AssertionError, ZeroDivisionError, ValueError) as difference:
        return str(difference)
    return None


def random_inputs(seed):
    g = torch.Generator().manual_seed(seed)
    return {"means": torch.randn(3, 2, 4, 4, generator=g), "stds": torch.tensor([0.3, 0.5, 0.8]),
            "weights": torch.tensor([0.5, 0.3, 0.2]), "x_T": torch.randn(2, 2, 4, 4, generator=g),
            "noise": torch.randn(120, 2, 2, 4, 4, generator=g)}


def test_random_configurations_of_diffusers(request, capsys):
    diffusers = library("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    seed = int(request.config.getoption("--peer-seed"))
    pick, counts, different, faults = random.Random(seed), Counter(), [], [0] * len(FAULTS)
    while sum(counts.values()) < COUNT:
        chosen = configuration(pick, diffusers)
        inputs = random_inputs(pick.getrandbits(32))
        case = recorded(diffusers, chosen, inputs)
        if case is None:
            continue
        try:
            plan_of(*chosen)
        except (NotImplementedError, ValueError) as refusal:
            counts[f"refused: {refusal}"] += 1
            continue
        name, init, _, step = chosen
        for k, (_reason, classes, shows) in enumerate(FAULTS):
            faults[k] += name in classes and shows(init | step)
        problem = verdict(case)
        if problem is None:
            counts["same"] += 1
        elif (exact := recorded(diffusers, chosen, inputs, dtype=torch.float64)) and verdict(exact) is None:
            counts["same, with the library's steps in float64"] += 1
        else:
            counts["different"] += 1
            different.append((*chosen, problem))
    with capsys.disabled():
        print(f"\n{COUNT} random configurations of diffusers {diffusers.__version__}, seed {seed}")
        for verdict_, count in counts.most_common():
            print(f"{count:5d} {verdict_}")
        print("of them with a known fault of the library, which the adapters follow:")
        for (reason, *_), count in zip(FAULTS, faults):
            print(f"{count:5d} {reason}")
        for row in different:
            print("     ", *row)
    assert len(different) <= 0.03 * COUNT, "levels that float32 rounds near pure noise leave one in some hundreds"


@pytest.mark.parametrize("name", ONE_NETWORK)
def test_schedulers_of_one_network(name):
    diffusers, (init, n) = library("diffusers"), ONE_NETWORK[name]
    case = recorded(diffusers, (name, init, {"num_inference_steps": n}, {}), random_inputs(1))
    assert case is not None and verdict(case) is None, case and verdict(case)


# ---------------------------------------------------------------------------------------------------------- k-diffusion


@functools.cache
def k_sampling():
    """k_diffusion.sampling, without the package's own imports, which are of training."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k_diffusion is not installed: it is for comparison only")
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__, package.utils = list(spec.submodule_search_locations), utils
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    try:
        return importlib.import_module("k_diffusion.sampling")
    except ModuleNotFoundError as missing:
        pytest.skip(f"k_diffusion needs {missing.name}")


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f not in ("sample_dpm_fast", "sample_dpm_adaptive")])
def test_k_diffusions_functions(function, request):
    """Levels, ends, rho, order and noise at random: the same to 1e-8 in float64."""
    K = k_sampling()
    theirs, (sampler, _) = getattr(K, function), FUNCTIONS[function]
    ours, process = S.SAMPLERS[sampler], unbounded("x0")
    parameters = inspect.signature(theirs).parameters
    for trial in range(6):
        pick = random.Random(f"{request.config.getoption('--peer-seed')} {function} {trial}")
        n, low, high = pick.randint(4, 14), pick.choice([0.02, 0.1]), pick.choice([8.0, 40.0])
        sigmas = pick.choice([K.get_sigmas_karras, K.get_sigmas_exponential])(n, low, high).double()
        options, names = {}, {"s_churn": (4.0,), "eta": (0.0, 0.5, 1.0), "s_noise": (1.0, 1.1), "order": (1, 2, 3, 4),
                              "solver_type": ("midpoint", "heun")}
        for key, values in names.items():
            unused = key == "s_noise" and "s_churn" not in options and "eta" not in parameters
            if key in parameters and not unused:
                options[key] = pick.choice(values)
        renamed = {"solver_type": "solver"}
        mine = {renamed.get(k, k): v for k, v in options.items()}
        noise, x = seeded_noise(trial), start(3, trial) * sigmas[0]
        own = {"noise_sampler": lambda *_: noise(x.shape)} if "noise_sampler" in parameters else {}  # noqa: B023
        denoise = mixture(process)
        random_like, torch.randn_like = torch.randn_like, lambda v: noise(v.shape)  # noqa: B023
        try:
            theirs_x = theirs(lambda x, s, **_: denoise(x, s).x0, x, sigmas, disable=True, **own, **options)  # noqa: B023
        finally:
            torch.randn_like = random_like
        times = sigmas.clamp(min=1e-9) if sampler == "lms" else sigmas     # its last step is of full order
        ours_x = end(ours, process, times, x, seeded_noise(trial), denoise, **mine)
        assert torch.allclose(ours_x, theirs_x, rtol=0, atol=1e-7), (options, (ours_x - theirs_x).abs().max())


# ---------------------------------------------------------------------------------------------------------- torchdiffeq


@pytest.mark.parametrize("method, theirs", [("euler", "euler"), ("midpoint", "midpoint"), ("heun3", "heun3"),
                                            ("heun", "heun2"), ("3/8", "rk4")])
def test_torchdiffeqs_fixed_steps(method, theirs):
    odeint = library("torchdiffeq").odeint
    process, times = D.VP("eps"), torch.linspace(0.9, 0.2, 9, dtype=torch.float64)
    denoise = mixture(process)
    f = lambda t, x: process.velocity(denoise(x, t.item()), t.item())
    try:
        reference = odeint(f, start(), times, method=theirs)[-1]
    except ValueError as unknown:                      # an older version
        pytest.skip(str(unknown))
    assert torch.allclose(end(S.sit_ode, process, times, start(), method=method), reference, rtol=0, atol=1e-12)


def test_torchdiffeqs_adaptive_steps():
    odeint = library("torchdiffeq").odeint
    process, times = D.VP("eps"), torch.tensor([0.95, 0.05], dtype=torch.float64)
    denoise = mixture(process)
    f = lambda t, x: process.velocity(denoise(x, t.item()), t.item())
    reference = odeint(f, start(), times, method="dopri5", rtol=1e-9, atol=1e-9)[-1]
    ours = end(S.rk45, process, times, start(), rtol=1e-9, atol=1e-9)
    assert math.isclose((ours - reference).abs().max().item(), 0, abs_tol=1e-7)
