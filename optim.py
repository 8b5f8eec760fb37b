"""What moves the weights: parameter groups by their marks, Muon and AdamW, the rate over the steps, averaged weights.

A layer or an objective marks its parameters: `no_decay`, no weight decay; `rate`, a share of the learning rate;
`hidden`, False for a matrix that is no hidden one (a read-out); `stacked`, True for a stack (E, out, in) of matrices;
`paused`, set while the loss is computed: this step leaves them as they are (a critic that rests, an actor that waits).
"""

import copy
import math

import torch
from torch import nn

import parallel


def trained(objective):
    """The parameters that learn."""
    return [p for p in objective.parameters() if p.requires_grad]


# ---------------------------------------------------------------------------------------------------------- optimisers


def orthogonalised(matrices, steps=5):
    """For each of a batch of matrices (k, n, m) about the nearest semi-orthogonal one: U V^T of its singular value
    decomposition U S V^T, with singular values between 0.7 and 1.2.

    A Newton-Schulz iteration whose quintic polynomial a x + b x^3 + c x^5 lifts small singular values fast. Muon,
    Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Muon is Scalable for LLM Training, 2502.16982, section 2.1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if tall else matrices
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def orthogonalised_by_gram(matrices, steps=5):
    """The same by products of small matrices: for (k, n, m), n <= m, two of n n m instead of ten.

    With Q = a I + b G + c G^2 a step is X <- Q X, and G = X X^T becomes Q G Q: only G (n, n) and the product of all Q
    are kept, and X is multiplied once. Squaring X costs digits where singular values are small: in float32 the result
    differs by up to 3e-4 in norm, in bfloat16 it would be wrong.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if tall else matrices
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    G, identity, product = X @ X.mT, torch.eye(X.shape[-2], dtype=X.dtype, device=X.device), None
    for step in range(steps):
        Q = a * identity + b * G + c * G @ G
        product = Q if product is None else Q @ product
        if step < steps - 1:
            G = Q @ G @ Q
    X = product @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for hidden matrices (2502.16982, algorithm 1).

    A matrix W (out, in) moves by lr sqrt(max(1, out/in)) O, with O the orthogonalised Nesterov momentum: every
    singular direction of the step is equally long, whatever the gradient's spectrum. A convolution counts as (out, in k
    k), a stack of experts (E, out, in) as E matrices. The factor is that of the first implementation; it keeps the
    size of a change of the layer's outputs the same over widths, so that a rate that is best for a narrow model is
    about best for a wide one (A Spectral Condition for Feature Learning, 2310.17813).

    Matrices of one shape go through one batched product: in float32 and by their Gram matrices (on one CPU core, half
    to a third of the time), on CUDA in bfloat16 and by the plain iteration. Nothing in a step is random, so that a
    resumed run and every rank compute the same bits.
    """

    def __init__(self, groups, lr=0.02, momentum=0.95, weight_decay=0.0, steps=5):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}                              # (out, in) -> [(parameter, its matrices (k, out, in))]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                average = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = as_matrices(p.grad.lerp(average, group["momentum"]))
                shapes.setdefault(nesterov.shape[-2:], []).append((p, nesterov))
            for (rows, columns), found in shapes.items():
                batch = torch.cat([matrices for _, matrices in found])
                if batch.is_cuda:
                    whole = orthogonalised(batch.bfloat16(), group["steps"]).to(batch.dtype)
                else:
                    whole = orthogonalised_by_gram(batch, group["steps"])
                length = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (p, _), part in zip(found, whole.split([len(matrices) for _, matrices in found])):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(part.reshape(p.shape), alpha=length)


def as_matrices(x):
    """A parameter as a batch of matrices (k, out, in): a matrix alone, a convolution (out, in, k, k) as one of (out, in
    k k), a stack (E, out, in) as it is."""
    return x if x.ndim == 3 else x.flatten(1)[None]


def hidden_matrices(objective):
    """The parameters that Muon moves: weights of linear layers and of convolutions over all channels, and stacks of
    them, but those marked hidden = False."""
    found = []
    for module in objective.modules():
        for p in module.parameters(recurse=False):
            dense = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and getattr(module, "groups", 1) == 1
            matrix = dense and p.ndim > 1 or getattr(p, "stacked", False)
            if matrix and getattr(p, "hidden", True) and p.requires_grad:
                found.append(p)
    return found


class Pair:
    """Two optimisers as one: Muon for the hidden matrices, AdamW for all else."""

    def __init__(self, muon, adamw):
        self.parts = {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self):
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self):
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def groups(parameters, weight_decay, share=1.0):
    """Parameter groups for an optimiser: those of one mark together. Each group knows its share of the rate."""
    kinds = {}
    for p in parameters:
        kinds.setdefault((hasattr(p, "no_decay"), getattr(p, "rate", 1.0)), []).append(p)
    return [{"params": kind, "rate": share * rate, "weight_decay": 0.0 if no_decay else weight_decay}
            for (no_decay, rate), kind in kinds.items()]


def adamw(objective, lr, weight_decay, *, betas=(0.9, 0.99)):
    """AdamW, Decoupled Weight Decay Regularization, 1711.05101, for all parameters."""
    return torch.optim.AdamW(groups(trained(objective), weight_decay), lr, tuple(betas), fused=True)


def muon(objective, lr, weight_decay, *, momentum=0.95, steps=5, adamw_share=0.15, betas=(0.9, 0.99)):
    """Muon, 2502.16982, for hidden matrices; AdamW for all else, at its share of --lr (of 0.02: at 3e-3).

    momentum: Nesterov's. steps: of the Newton-Schulz iteration. betas: AdamW's."""
    hidden = hidden_matrices(objective)
    if not hidden:
        raise ValueError("this model has no hidden matrix for Muon: choose --optimiser adamw")
    ours = {id(p) for p in hidden}
    others = [p for p in trained(objective) if id(p) not in ours]
    return Pair(Muon(groups(hidden, weight_decay), lr, momentum, weight_decay, steps),
                torch.optim.AdamW(groups(others, weight_decay, adamw_share), lr, tuple(betas), fused=True))


OPTIMISERS = {"adamw": adamw, "muon": muon}
RATES = {"adamw": 1e-3, "muon": 0.02}            # for small models, where nothing else is said


# ------------------------------------------------------------------------------------------------- rates and averages


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

    def __init__(self, objective, decay, model=None):
        """model: the copy to average in, where it must be made elsewhere (parallel.shard)."""
        self.decay = decay
        self.model = model or copy.deepcopy(objective).eval().requires_grad_(False)
        pairs = list(zip(self.model.parameters(), objective.parameters()))
        self.averages, self.weights = [e for e, p in pairs if p.requires_grad], [p for _, p in pairs if p.requires_grad]
        buffers = list(zip(self.model.buffers(), objective.buffers()))
        self.copies, self.buffers = [mine for mine, _ in buffers], [theirs for _, theirs in buffers]

    @torch.no_grad()                               # with gradients every step would leave a graph behind
    def update(self, step):
        """Move the averages after step 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(parallel.local(self.averages), parallel.local(self.weights), 1 - decay)
        if self.copies:
            torch._foreach_copy_(self.copies, self.buffers)
