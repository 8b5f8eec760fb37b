"""One model over several GPUs, and activations computed twice: what a model needs that one GPU cannot hold.

    shard      weights, gradients and optimiser state in parts (FSDP2), gathered block by block while they are used
    remat      keep only what enters a block, and compute its inside again in the backward pass
    save, load, whole     checkpoints of a sharded run: a folder to which every process writes its part, and the usual
                          state dicts, put together

A sharded run computes what one process computes, up to the order of sums. Only the blocks, the largest parts, are
gathered one at a time, so a GPU needs its share of everything and one whole block.
"""

import copy
import functools
import os
import shutil

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------- blocks


def blocks(model):
    """The blocks of a backbone: what lies in its outermost nn.ModuleLists, in order."""
    found, inside = [], set()
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, nn.ModuleList):
            for block in module:
                found.append(block)
                inside.update(block.modules())
    return found


def remat(model):
    """Gradient checkpointing, Training Deep Nets with Sublinear Memory Cost, 1604.06174: each block keeps its inputs
    and runs forward a second time in the backward pass, with the same dropout. A third more time, and instead of all
    activations of all blocks only one block's. Raises ValueError for a model without blocks."""
    found = blocks(model)
    if not found:
        raise ValueError(f"--remat: {type(model).__name__} has no list of blocks whose activations could be given up")
    for block in found:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


# -------------------------------------------------------------------------------------------------------------- shards


def shard(objective, device):
    """Cuts an objective's parameters, in place, over all processes (torch.distributed.fsdp.fully_shard, FSDP2), and
    returns a frozen copy in eval mode, for averages, cut the same way. Call it before the optimiser is made.

    The blocks of the objective's parts are cut one by one, and each part with what is left. The parts must be called as
    modules: that is where they gather their weights. What layers have marked parameters with stays.
    """
    average = copy.deepcopy(objective).eval().requires_grad_(False)
    for one in (objective, average):
        cut(one, device)
    return average


def cut(objective, device):
    """`shard` of one objective, without the copy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    own = [name for name, _ in objective.named_parameters(recurse=False)]
    if own:
        raise ValueError(f"--shard: {type(objective).__name__} holds weights of its own ({', '.join(own)}), and only "
                         "those of its parts can be cut")
    marks = {name: dict(vars(p)) for name, p in objective.named_parameters()}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in objective.children():
        if next(part.parameters(), None) is None:
            continue
        for block in blocks(part):
            fully_shard(block, mesh=mesh)
        fully_shard(part, mesh=mesh)
    objective.to(device)                                                # what is left: buffers
    for name, p in objective.named_parameters():
        vars(p).update(marks[name])


def local(tensors):
    """The parts of sharded tensors that this process holds; other tensors as they are."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


def full(x):
    """A sharded tensor whole, on every process; anything else as it is. All processes must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def mapped(call, state):
    """A state dict with call(tensor) for each tensor."""
    if isinstance(state, torch.Tensor):
        return call(state)
    if isinstance(state, dict):
        return {key: mapped(call, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(mapped(call, value) for value in state)
    return state


# --------------------------------------------------------------------------------------------------------- checkpoints


def whole(state):
    """A sharded state dict as the usual one, on the processor, in the first process; {} in the others. Tensor by
    tensor, so that no GPU needs room for more than one."""
    first = dist.get_rank() == 0

    def gathered(x):
        x = full(x)
        return x.to("cpu", copy=True) if first else None

    state = mapped(gathered, state)
    return state if first else {}


def like(state, pattern):
    """A usual state dict cut as the sharded tensors of `pattern` are; other tensors go to where those are."""
    from torch.distributed.tensor import distribute_tensor

    if isinstance(state, dict) and isinstance(pattern, dict):
        return {key: like(value, pattern.get(key)) for key, value in state.items()}
    if hasattr(pattern, "placements"):
        return distribute_tensor(state.to(pattern.device), pattern.device_mesh, pattern.placements)
    return state.to(pattern.device) if isinstance(pattern, torch.Tensor) else state


def save(folder, state, step):
    """Every process writes its part of the state of a step to `folder`, which appears whole or not at all; the one that
    it replaces is kept beside it."""
    import torch.distributed.checkpoint as dcp

    partial, previous = (folder.with_name(folder.name + end) for end in (".partial", ".prev"))
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / "step").write_text(str(step))
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            os.replace(folder, previous)
        os.replace(partial, folder)
    dist.barrier()


def load(folder, state):
    """Fills the tensors of a state dict, in place, with those that `save` wrote, from any number of processes; returns
    their step."""
    import torch.distributed.checkpoint as dcp

    if not (folder / "step").exists():
        raise FileNotFoundError(f"there is no checkpoint {folder}")
    dcp.load(state, checkpoint_id=str(folder))
    return int((folder / "step").read_text())


def prime(optimiser):
    """Gives an optimiser the state that its first step makes, so that `load` finds what to fill. Weights stay."""
    rates = [(group["lr"], group["weight_decay"]) for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    for group, (rate, decay) in zip(optimiser.param_groups, rates):
        group["lr"], group["weight_decay"] = rate, decay
