"""Optional Triton kernels, one file an operation, and here the one place that chooses between them and torch's forms,
which are the definition. A caller asks in one line:

    if kernels.use("selective_scan", u, state_size=S):
        return kernels.selective_scan(...)

`choose`, the flag --kernels or the variable ATLAS_KERNELS says what is wanted: "off" (torch), "auto" (kernels where
they work) or "on" (kernels, or a ValueError that says why not). Triton is not imported before a kernel is wanted.
"""

import importlib
import os
import warnings

import torch

MODES = ("off", "auto", "on")
TYPES = (torch.float32, torch.bfloat16, torch.float16)

# operation -> (its file, {size: the largest that fits}). The two in EAGER are left to torch.compile's own fusion.
OPERATIONS = {
    "selective_scan": ("selective_scan", {"state size": 64}),
    "bi_wkv": ("bi_wkv", {}),
    "linear_attention": ("linear_attention", {"width of a head": 320}),
    "gate_norm_modulate": ("norm", {"width": 4096}),
    "rotate": ("rope", {"width of a head": 256}),
    "packed_linear": ("ternary", {}),
}
EAGER = ("gate_norm_modulate", "rotate")

mode = os.environ.get("ATLAS_KERNELS", "auto")
if mode not in MODES:
    raise ValueError(f"ATLAS_KERNELS is {mode!r}: choose {', '.join(MODES)}")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
trials = {}                                          # kind of device -> what keeps Triton from working there, or ""
seen = {}                                            # operation -> what kept its kernel from the last call, or ""


def choose(setting):
    """Sets the mode, "off", "auto" or "on", which the variable ATLAS_KERNELS sets otherwise; None leaves it."""
    global mode
    if setting is not None and setting not in MODES:
        raise ValueError(f"--kernels {setting}: choose {', '.join(MODES)}")
    mode = setting or mode


def use(operation, *tensors, **sizes):
    """Whether the kernel of an operation computes this call, for these tensors (the first decides type and device) and
    sizes, named as in `OPERATIONS` with underscores. Mode "on": raises ValueError where it cannot."""
    x = tensors[0]
    if mode == "off" or (mode == "auto" and x.device.type != "cuda") or x.is_meta:
        return False
    for tensor in tensors:
        if tensor.numel() == 0:
            return False
    reason = refusal(operation, x, sizes)
    if not torch.compiler.is_compiling():
        seen[operation] = reason
    if reason and mode == "on":
        raise ValueError(f"{operation}: {reason}; use --kernels auto")
    return not reason


def refusal(operation, x, sizes):
    """What keeps the kernel from a call, or ""."""
    if x.device.type != "cuda" and not interpreted:
        return f"the tensors are on the {x.device.type}, and the kernels need a GPU"
    if x.dtype not in TYPES:
        return f"the tensors are {str(x.dtype).removeprefix('torch.')}, and the kernels take " + ", ".join(
            str(dtype).removeprefix("torch.") for dtype in TYPES)
    for size, largest in OPERATIONS[operation][1].items():
        given = sizes[size.replace(" ", "_")]
        if given > largest:
            return f"{size} {given} is above {largest}"
    if mode == "auto" and operation in EAGER and torch.compiler.is_compiling():
        return "torch.compile fuses it itself"
    return trial(x.device)


def trial(device):
    """What keeps Triton from working on this kind of device, or "": found out by one small kernel, once, with a warning
    where a GPU is there and it fails. While torch.compile traces, only what was found is told."""
    found = trials.get(device.type)
    if found is not None:
        return found
    if torch.compiler.is_compiling():
        return "no kernel had been tried before torch.compile began: call kernels.report first"
    try:
        load()
        x, one = torch.ones(1, 1, 1, 2, device=device), torch.ones(1, 1, 1, device=device)
        works = globals()["rotate"](x, 0 * one, one).flatten().tolist() == [-1, 1]
        trials[device.type] = "" if works else "Triton is there, but its first kernel computed nonsense"
    except ImportError as error:
        trials[device.type] = f"Triton is not installed ({error})"
    except Exception as error:                       # driver, compiler, version: whatever it is, torch still works
        trials[device.type] = f"Triton does not work here ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    if trials[device.type] and mode == "auto":
        warnings.warn(f"kernels: {trials[device.type]}; torch's own forms are used", stacklevel=2)
    return trials[device.type]


def load():
    """Imports the kernels: kernels.selective_scan and its like are functions from here on."""
    for operation, (file, _) in OPERATIONS.items():
        globals()[operation] = getattr(importlib.import_module(f"kernels.{file}"), operation)


def report(device):
    """One line for the start of a run: which form runs on this device, and why. Tries Triton where it is wanted."""
    device = torch.device(device)
    if mode == "off":
        return "kernels: torch (--kernels off)"
    if device.type != "cuda" and not (interpreted and mode == "on"):
        reason = f"a {device.type} has none"
    else:
        reason = trial(device)
    if reason and mode == "on":
        raise ValueError(f"--kernels on: {reason}; use --kernels auto")
    if reason:
        return f"kernels: torch ({reason})"
    return f"kernels: Triton ({', '.join(OPERATIONS)}; {', '.join(EAGER)} not under torch.compile)"


def table():
    """[(operation, "triton" or "torch", why not triton)] of the calls so far."""
    return [(operation, "torch" if reason else "triton", reason) for operation, reason in seen.items()]
