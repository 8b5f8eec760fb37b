"""What moves the weights: parameter groups by their marks, the learning rate over the steps, averaged weights.

A layer or an objective marks its parameters: `no_decay`, no weight decay; `rate`, a share of the learning rate;
`paused`, set while the loss is computed: this step leaves them as they are (a critic that rests, an actor that waits).
"""

import copy
import math

import torch


def trained(objective):
    """The parameters that learn."""
    return [p for p in objective.parameters() if p.requires_grad]


def groups(parameters, weight_decay):
    """Parameter groups for an optimiser: those of one mark together. Each group knows its share of the rate."""
    kinds = {}
    for p in parameters:
        kinds.setdefault((hasattr(p, "no_decay"), getattr(p, "rate", 1.0)), []).append(p)
    return [{"params": kind, "rate": rate, "weight_decay": 0.0 if no_decay else weight_decay}
            for (no_decay, rate), kind in kinds.items()]


def optimiser(objective, config):
    """AdamW (Decoupled Weight Decay Regularization, 1711.05101) over the parameters that learn."""
    return torch.optim.AdamW(groups(trained(objective), config["weight_decay"]), config["lr"], tuple(config["betas"]),
                             fused=True)


def learning_rate(config, step):
    """The rate of step 0, 1, ...: a warm-up from 0 in `warmup` steps, times a decay that ends at 0 after the last step:
    constant, linear or cosine."""
    warm = min(1.0, (step + 1) / max(1, config["warmup"]))
    done = min(1.0, step / config["steps"])
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config["decay"]]
    return config["lr"] * warm * decay


def set_rate(optimiser, rate):
    """Give every group its share of the rate."""
    for group in optimiser.param_groups:
        group["lr"] = group.get("rate", 1.0) * rate


def rest_paused(parameters):
    """Take the gradient from those that are paused in this step, so that no optimiser touches them."""
    for p in parameters:
        if getattr(p, "paused", False):
            p.grad = None


class Averages:
    """Exponential moving averages of an objective's parameters, in float32, beside copies of its buffers (codebooks,
    batch statistics): `model` is the averaged objective, in eval mode.

    decay: of the average after step s it is at most (1 + s)/(10 + s), so that early on it reaches over few steps."""

    def __init__(self, objective, decay):
        self.decay = decay
        self.model = copy.deepcopy(objective).eval().requires_grad_(False)
        pairs = list(zip(self.model.parameters(), objective.parameters()))
        self.averages, self.weights = [e for e, p in pairs if p.requires_grad], [p for _, p in pairs if p.requires_grad]
        buffers = list(zip(self.model.buffers(), objective.buffers()))
        self.copies, self.buffers = [mine for mine, _ in buffers], [theirs for _, theirs in buffers]

    @torch.no_grad()                               # with gradients every step would leave a graph behind
    def update(self, step):
        """Move the averages after step 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
        if self.copies:
            torch._foreach_copy_(self.copies, self.buffers)
