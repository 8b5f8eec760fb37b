"""What the launchers of all kernels share. This file alone asks whether Triton's interpreter runs the kernels."""

import contextlib
import os

import torch
import torch.autograd.forward_ad as forward_ad
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TRITON_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16,
                torch.float16: tl.float16}


def rows(x):
    """x (or None) with a last dimension of stride 1, which the kernels take for granted; other strides are free."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def sum_type(x):
    """The type of sums and states: float64 for float64 (gradient checks), float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def configuration(table, x, width):
    """The entry of a file's table of block sizes for this GPU, this width (rounded up to a power of 2) and type. Tables
    are {(capability, width, type): entry}, with entries for a type alone, "default" and, small, "interpreted"."""
    if INTERPRETED:
        return table["interpreted"]
    key = torch.cuda.get_device_capability(x.device), triton.next_power_of_2(width), x.dtype
    return table.get(key) or table.get(x.dtype) or table["default"]


def on(x):
    """Triton launches on the current GPU: makes it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def options(warps):
    """Launch options. Triton 3.10 contracts products and sums to fused multiply-adds only where asked to."""
    return {"num_warps": warps, "enable_fp_fusion": True}


def wide(x, *parameters):
    """The parameters (None stays None) in the type of x's sums."""
    return [y if y is None else y.to(sum_type(x)) for y in parameters]


def training(*tensors):
    """Whether a gradient may be asked for: then the forward pass keeps what the backward needs. Forward-mode
    derivatives are refused here, where they can still be told from a call without any."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        refuse("forward-mode derivatives")()
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def refuse(what):
    """A function that says that kernels do not do this."""
    def fail(*args, **kwargs):
        raise NotImplementedError(f"the Triton kernels have no {what}: use --kernels off (ATLAS_KERNELS=off)")
    return fail


def differentiable(forward, backward, save, gradients):
    """Makes `gradients` (ctx, *output gradients), which calls the operator `backward`, the derivative of the operator
    `forward`; save(ctx, inputs, output) keeps what it needs. Second derivatives and vmap are refused by name."""
    forward.register_autograd(gradients, setup_context=save)
    if backward is not forward:
        backward.register_autograd(refuse("second derivatives"))
        backward.register_vmap(refuse("vmap"))
    forward.register_vmap(refuse("vmap"))
