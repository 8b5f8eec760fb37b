"""Samplers beside diffusers' and k-diffusion's, which are no dependency: where one is not installed, its test skips.
Whole loops of 20 steps with a network that returns its input, (64, 3, 32, 32): what is left is the sampler's own time,
by the processor's clock, one thread, interleaved.  python -m pytest tests/test_published_speed.py -m slow -s"""

import statistics
import time

import pytest
import torch
from published import peer

import samplers
from diffusion import create_process

STEPS = 20
DIFFUSERS = {  # scheduler: its options; our process, sampler and options
    "DDPMScheduler": ({}, "linear", "ddpm", {"clip": 1.0}),
    "DDPMScheduler, no clipping": ({"clip_sample": False}, "linear", "ddpm", {}),
    "DDIMScheduler": ({}, "linear", "ddim", {"clip": 1.0}),
    "DDIMScheduler, no clipping": ({"clip_sample": False}, "linear", "ddim", {}),
    "FlowMatchEulerDiscreteScheduler": ({}, "flow", "euler", {}),
    "EulerDiscreteScheduler": ({}, "linear", "euler", {}),
    "EulerAncestralDiscreteScheduler": ({}, "linear", "euler-ancestral", {}),
    "HeunDiscreteScheduler": ({}, "linear", "heun", {}),
    "DPMSolverMultistepScheduler": ({}, "linear", "dpmpp-2m", {}),
    "UniPCMultistepScheduler": ({}, "linear", "unipc", {}),
    "DEISMultistepScheduler": ({}, "linear", "deis", {"order": 2}),
    "LMSDiscreteScheduler": ({}, "linear", "lms", {}),
    "PNDMScheduler": ({}, "linear", "pndm", {}),
    "KDPM2DiscreteScheduler": ({}, "linear", "dpm2", {}),
}
K_DIFFUSION = {"sample_euler": "euler", "sample_heun": "heun", "sample_dpmpp_2m": "dpmpp-2m",
               "sample_dpmpp_2m_sde": "dpmpp-2m-sde", "sample_dpmpp_3m_sde": "dpmpp-3m-sde",
               "sample_dpmpp_sde": "dpmpp-sde"}


@pytest.fixture
def x():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.randn(64, 3, 32, 32)
    torch.set_num_threads(threads)


def race(name, ours, theirs):
    """Prints milliseconds a step of both, medians of 9 rounds, and their ratio, which is far from 1.5."""
    times = ([], [])
    for k in range(10):
        for call, kept in zip((ours, theirs), times):
            clock = time.process_time()
            call()
            kept += [time.process_time() - clock] if k else []
    mine, other = (statistics.median(kept) / STEPS * 1e3 for kept in times)
    print(f"\n{name:36}{mine:8.2f} ms a step here, {other:6.2f} there: {mine / other:.2f}", end="")
    assert mine < 1.5 * other


def walk(process, x, sampler, **options):
    """Our loop."""
    process, options = create_process(process), {"clip": None} | options

    def call():
        for _ in samplers.generate(process, lambda x, t, y: x, x, sampler=sampler, steps=STEPS, **options):
            pass

    return call


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name, x):
    scheduler = getattr(peer("diffusers"), name.split(",")[0])
    given, process, sampler, options = DIFFUSERS[name]
    scheduler = scheduler(**given)

    def theirs():
        scheduler.set_timesteps(STEPS)
        y = x * getattr(scheduler, "init_noise_sigma", 1.0)
        with torch.no_grad():
            for t in scheduler.timesteps:
                z = scheduler.scale_model_input(y, t) if hasattr(scheduler, "scale_model_input") else y
                y = scheduler.step(z, t, y, return_dict=False)[0]

    race(name, walk(process, x, sampler, **options), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", K_DIFFUSION)
def test_k_diffusion(name, x):
    package = peer("k_diffusion.sampling")
    sigmas = package.get_sigmas_karras(STEPS, 0.01, 80.0)
    options = {"noise_sampler": lambda a, b: torch.randn_like(x)} if "sde" in name else {}

    def theirs():
        with torch.no_grad():
            getattr(package, name)(lambda x, sigma: x, 80 * x, sigmas, disable=True, **options)

    race(name, walk("edm", x, K_DIFFUSION[name], grid="karras"), theirs)
