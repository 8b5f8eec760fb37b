"""What every comparison with recorded numbers of a published implementation shares."""

import importlib

import pytest
import torch

import diffusion
import guidance


def same(ours, theirs, what, tolerance=1e-5):
    """||ours - theirs|| / ||theirs|| <= tolerance; integers must be equal."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, published {tuple(theirs.shape)}"
    if not theirs.is_floating_point():
        assert torch.equal(ours.to(theirs.dtype), theirs), f"{what} differs"
        return
    error = (ours.detach().double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def peer(name):
    """The module of another project, installed for the comparison alone; the test is skipped where it is not to be had.
    It may be absent, or fail on this machine: half-installed packages raise nearly everything."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"for comparison only: {name} is not to be had here ({type(error).__name__})")


def compare(case, ours, skip=()):
    """Every recorded output, but for those to skip, with ours by its name."""
    for name, value in case.outputs.items():
        if name not in skip:
            assert name in ours, f"nothing here computes {name}"
            same(ours[name], value, name, case.meta.get("tolerance", 1e-5))


def watched(modules, take=lambda args, output: output):
    """name -> take(its arguments, its output), of each module (None: left out), filled in when it is first called."""
    seen = {}

    def watch(name, module):
        def keep(module, args, output):
            seen.setdefault(name, take(args, output))

        module.register_forward_hook(keep)

    for name, module in modules.items():
        if module is not None:
            watch(name, module)
    return seen


def gradients(weights):
    """{published name: a parameter} -> their gradients as they are recorded, grad:NAME and grad_norm:NAME; zero for
    what the loss did not meet."""
    ours = {}
    for name, p in weights.items():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        ours |= {f"grad:{name}": grad, f"grad_norm:{name}": grad.norm()}
    return ours


SCHEDULES = {"linear": diffusion.linear_betas, "squaredcos_cap_v2": diffusion.cosine_betas}
KNOWN = {"noise_schedule", "predict_xstart", "learn_sigma", "diffusion_steps", "rescale_learned_sigmas", "use_kl",
         "sigma_small"}


def chain(options):
    """The options of improved DDPM's create_diffusion, which DiT and its kin go by, as our process."""
    assert set(options) <= KNOWN, f"options {set(options) - KNOWN} of create_diffusion are not covered"
    betas = SCHEDULES[options.get("noise_schedule", "linear")](options.get("diffusion_steps", 1000))
    objective = "rescaled" if options.get("rescale_learned_sigmas") else "hybrid"
    return diffusion.Discrete(betas, "x0" if options.get("predict_xstart") else "eps",
                              options.get("learn_sigma", True), "vlb" if options.get("use_kl") else objective,
                              "small" if options.get("sigma_small") else "large")


def guided(process, model, y, null, scale):
    """The model's denoiser under guidance of its first three channels, as published with DiT; no guidance for scale
    None."""
    cond = process.denoiser(model, y)
    return cond if scale is None else guidance.guided(cond, process.denoiser(model, null), scale, channels=3)


def output_of(d):
    """A `Denoised` back to the channels of a network that predicts eps."""
    return torch.cat([d.eps] + ([] if d.variance is None else [2 * d.variance - 1]), 1)
