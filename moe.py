"""Mixtures of experts: a layer that has E feed-forward networks and lets each token pass through K of them.

    Router         scores the experts for each token, softmax first and then the K best (DiT-MoE, 2407.11633)
    loop, grouped  two ways to run the chosen experts: the definition, and the fast one; equal in values and gradients
    MoE            router, routed experts and shared experts as one layer, in place of a feed-forward network
    balanced       the balance loss, an explicit term of the training loss
    add_experts    the feed-forward networks of any backbone -> MoE;   upcycle: their weights from a dense run

Letters as in layers.py, and M, the hidden width of an expert.
"""

import json
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import figures
import runs
from layers import Mlp, SwiGlu

# ------------------------------------------------------------------------------------------------------------- dispatch
# dispatch(x (T, D), index (T, K), weight (T, K), gate (E, M, D), up (E, M, D), down (E, D, M)) -> (T, D): the sum of
# weight * expert(x) over the experts that `index` names, an expert being down(SiLU(gate x) * up x).


def swiglu(x, gate, up, down):
    """One expert: down(SiLU(gate x) * up x), x (n, D)."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def loop(x, index, weight, gate, up, down):
    """The definition: one expert after the other, each on the tokens that chose it."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(zip(gate, up, down)):
        token, choice = (index == e).nonzero(as_tuple=True)
        rows = swiglu(x[token], *expert)                                                              # (its tokens, D)
        y = y.index_add(0, token, (weight[token, choice, None] * rows).to(y.dtype))
    return y


def grouped(x, index, weight, gate, up, down):
    """The fast way: sort the (token, choice) pairs by expert, then one grouped matrix product a projection. The number
    of tokens of each expert stays on the device: a GPU is never waited for. Tokens go to their experts, come back, and
    their gradients the same way, by gathering alone: nothing is added in an order that could change."""
    K = index.shape[1]
    expert, order = index.flatten().sort(stable=True)                                                 # (T K,)
    ends = torch.searchsorted(expert, torch.arange(len(gate), device=x.device), right=True)           # (E,)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))      # order's inverse
    rows = Gather.apply(x, order // K, back, K)                                                       # (T K, D)
    rows = (products if fit_products(x, gate) else slices)(rows, ends, gate, up, down)
    rows = Gather.apply(rows, back, order, 1).unflatten(0, (-1, K))                                   # (T, K, D)
    return (weight[..., None] * rows).sum(1).to(x.dtype)


class Gather(torch.autograd.Function):
    """x (n, D) -> x[source], in which every row of x occurs K times, row i in places back[K i] .. back[K i + K - 1]. So
    the gradient gathers as well, where that of an index_select adds up in any order."""

    @staticmethod
    def forward(ctx, x, source, back, K):
        ctx.save_for_backward(back)
        ctx.K = K
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, g):
        g = g.index_select(0, *ctx.saved_tensors)
        return g if ctx.K == 1 else g.unflatten(0, (-1, ctx.K)).sum(1), None, None, None


def fit_products(x, gate):
    """What torch's grouped product asks for: a GPU from compute capability 8.0 on, bfloat16, rows of whole 16 bytes."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return half == torch.bfloat16 and gate.shape[1] % 8 == 0 and gate.shape[2] % 8 == 0


def products(x, ends, gate, up, down):
    """Each expert e on its rows, ends[e-1] .. ends[e] of x (n, D) -> (n, D), by torch's grouped matrix product. Gate
    and up are one product: autocast has to copy the weights anyway, and copies them into one."""
    if torch.is_autocast_enabled("cuda"):
        x, down = (v.to(torch.get_autocast_dtype("cuda")) for v in (x, down))
    E, H, D = gate.shape
    both = x.new_empty(E, 2 * H, D)
    both[:, :H], both[:, H:] = gate, up
    gate, up = F.grouped_mm(x, both.mT, offs=ends.int()).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends.int())


def slices(x, ends, gate, up, down):
    """The same, expert by expert, which a CPU does as fast. torch.compile leaves this to Python, since the lengths
    change with every batch."""
    # As a decorator, torch.compiler.disable would import the whole compiler, 1.5 s, whenever this file is imported.
    run = torch.compiler.disable(by_expert) if torch.compiler.is_compiling() else by_expert
    return run(x, ends, gate, up, down)


def by_expert(x, ends, gate, up, down):
    """`slices`, as Python runs it. On the meta device, where nothing is chosen, loads are even."""
    n, E = len(x), len(gate)
    ends = [n * (e + 1) // E for e in range(E)] if x.is_meta else ends.tolist()
    rows = x.split([b - a for a, b in pairwise([0, *ends])])
    return torch.cat([swiglu(r, *expert) for r, *expert in zip(rows, gate, up, down)])


# --------------------------------------------------------------------------------------------------------------- layers


class Router(nn.Module):
    """Tokens (T, D) -> weight (T, K), index (T, K), probs (T, E). p = softmax over all E experts of a linear map
    without bias; a token takes the K best, each weighed by its p, so that its weights sum to less than 1 (2407.11633).

    renormalise: divide the K weights by their sum. Under autocast it keeps the precision of its weights.
    """

    def __init__(self, dim, num_experts, top_k, renormalise=False):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"a token cannot take {top_k} of {num_experts} experts: choose 1 to {num_experts}")
        self.top_k, self.renormalise = top_k, renormalise
        self.weight = nn.Parameter(torch.empty(num_experts, dim).uniform_(-dim**-0.5, dim**-0.5))

    def forward(self, x):
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            probs = F.linear(x.to(self.weight.dtype), self.weight).softmax(-1)                        # (T, E)
        weight, index = probs.topk(self.top_k, sorted=False)
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return weight, index, probs


class MoE(nn.Module):
    """Routed SwiGLU experts of hidden width `hidden` without biases, and shared experts, which every token passes: one
    SwiGLU of hidden width `shared` (0: none), added unweighted. (B, N, D) -> (B, N, D). 2407.11633, section 2.2.

    In training mode each call leaves its balance loss and the experts' loads behind, for `balanced` to take.
    """

    def __init__(self, dim, hidden, num_experts, top_k, shared=0, renormalise=False):
        super().__init__()
        self.router = Router(dim, num_experts, top_k, renormalise)
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.up = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        for stack in (self.gate, self.up, self.down):                  # Xavier uniform, each expert by itself
            nn.init.uniform_(stack, -(6 / (dim + hidden)) ** 0.5, (6 / (dim + hidden)) ** 0.5)
            stack.stacked = True                                       # for the optimiser: a matrix for each expert
        self.shared = SwiGlu(dim, shared) if shared else None
        self.dispatch, self.routed = grouped, None

    def forward(self, x):
        tokens = x.flatten(0, -2)                                                                     # (T, D)
        weight, index, probs = self.router(tokens)
        if self.training:
            self.routed = balance_loss(probs, index)
        y = self.dispatch(tokens, index, weight, self.gate, self.up, self.down).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def __getstate__(self):                                            # a copy takes no graph along
        return {**self.__dict__, "routed": None}


# -------------------------------------------------------------------------------------------------------------- balance


def balance_loss(probs, index):
    """(loss, load): load (E,) is each expert's share of the choices, 1 on average, without gradient; the loss, the sum
    of load * mean probability over the experts, is 1 for even loads, E/K if all tokens choose alike. 2407.11633, eq. 4
    (over all tokens of the batch, as the published code counts)."""
    E = probs.shape[1]
    load = torch.zeros_like(probs[0]).index_add_(0, index.flatten(), probs.new_ones(index.numel())) * E / index.numel()
    return (load * probs.mean(0)).sum(), load


def balance_losses(model):
    """What the layers with experts have left behind in their last training call, each once: (losses (layers,), loads
    (layers, E)), or None."""
    layers = [m for m in model.modules() if isinstance(m, MoE) and m.routed is not None]
    if not layers:
        return None
    losses, loads = zip(*(layer.routed for layer in layers))
    for layer in layers:
        layer.routed = None
    return torch.stack(losses), torch.stack(loads)


def balanced(model, loss):
    """What training adds for a backbone with experts: {"loss": loss + model.balance * the sum of the layers' balance
    losses, "balance": their mean (1: even), "load_cv": the mean coefficient of variation of the loads (0: even)}. {}
    for a model without experts, or after a call in evaluation mode."""
    routed = balance_losses(model)
    if routed is None:
        return {}
    losses, loads = routed
    return {"loss": loss + model.balance * losses.sum(), "balance": losses.detach().mean(),
            "load_cv": loads.std(1, correction=0).mean()}


def activated_parameters(model):
    """The parameters that a token meets: all but the experts that it does not choose."""
    unused = sum((len(m.gate) - m.router.top_k) * 3 * m.gate[0].numel() for m in model.modules() if isinstance(m, MoE))
    return sum(p.numel() for p in model.parameters()) - unused


# ------------------------------------------------------------------------------------------ experts for a dense network


def add_experts(model, num_experts, top_k, blocks=None, shared=2, renormalise=False):
    """Replace, in place, the feed-forward networks (`layers.Mlp`, `layers.SwiGlu`) of a backbone by fresh `MoE`
    layers: routed experts of the same hidden width, shared ones of `shared` times the model's width. -> the model.

    blocks: only those, counted from 0 in the order of the network (None: all). Raises ValueError if there are none.
    """
    if any(isinstance(m, MoE) for m in model.modules()):
        raise ValueError(f"{type(model).__name__} has experts already: change them by num_experts=8,top_k=2")
    names = [name for name, m in model.named_modules() if isinstance(m, (Mlp, SwiGlu))]
    if not names or any(b not in range(len(names)) for b in blocks or ()):
        raise ValueError(f"experts replace feed-forward networks, and {type(model).__name__} has {len(names)} of them"
                         + (f": blocks {tuple(blocks)} are not all among 0 to {len(names) - 1}" if names else ""))
    for k, name in enumerate(names):
        if blocks is None or k in blocks:
            parent, _, child = name.rpartition(".")
            hidden, dim = next(model.get_submodule(name).parameters()).shape                          # fc1, or gate
            layer = MoE(dim, hidden, num_experts, top_k, shared * dim, renormalise)
            setattr(model.get_submodule(parent), child, layer)
    return model


def upcycle(model, dense):
    """Fill a model with experts from the state dict of the same model with one expert: every expert becomes that one,
    routers are drawn from N(0, 0.02), all else is copied. As published: the K weights of a token sum to about K/E, so
    the routed branch shrinks; a model with renormalise=True keeps the dense model's function exactly."""
    for name, own in model.state_dict().items():
        given = dense.get(name)
        if name.endswith("router.weight"):
            nn.init.normal_(own, std=0.02)
        elif given is not None and (given.shape == own.shape or given.shape == (1, *own.shape[1:])):
            own.copy_(given)
        else:
            raise ValueError(f"these weights cannot be upcycled: {name} is {tuple(own.shape)} here and "
                             f"{'absent' if given is None else tuple(given.shape)} there; upcycling starts from a "
                             "run of the same model with num_experts=1,top_k=1")


# ------------------------------------------------------------------------------------------------------------- analysis


class Counter:
    """Counts which experts a model's layers L choose while it samples: classes (classes, L, E), positions (L, N, E),
    steps (L, steps, E). The three analyses of 2407.11633, section 4. Only calls with a true label are counted, not
    those with the null label; set `step` as sampling goes on. `with Counter(...) as c:` listens to the model."""

    def __init__(self, model, num_classes, steps):
        self.layers = [m for m in model.modules() if isinstance(m, MoE)]
        if not self.layers:
            raise ValueError("this model has no experts: train one, for example --model dit-moe-nano")
        self.model, self.step, L, E = model, 0, len(self.layers), len(self.layers[0].gate)
        self.classes = torch.zeros(num_classes, L, E, dtype=torch.long)
        self.steps = torch.zeros(L, steps, E, dtype=torch.long)
        self.positions = None                                          # the number of tokens is known at the first call

    def __enter__(self):
        def hear(module, args):
            self.labels = args[2]

        self.hooks = [self.model.register_forward_pre_hook(hear)]
        for k, layer in enumerate(self.layers):
            self.hooks.append(layer.router.register_forward_hook(self.listener(k)))
        return self

    def listener(self, layer):
        def hear(module, args, output):
            _, index, _ = output
            self.count(layer, index)

        return hear

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def count(self, layer, index):
        """index (B N, K), the choices in one call of a layer."""
        y = self.labels.cpu()
        chosen = F.one_hot(index.cpu(), self.steps.shape[2]).sum(1).unflatten(0, (len(y), -1))        # (B, N, E)
        y, chosen = y[y < len(self.classes)], chosen[y < len(self.classes)]
        if self.positions is None:
            self.positions = torch.zeros(len(self.layers), *chosen.shape[1:], dtype=torch.long)
        self.classes[:, layer].index_add_(0, y, chosen.sum(1))
        self.positions[layer] += chosen.sum(0)
        self.steps[layer, min(self.step, self.steps.shape[1] - 1)] += chosen.sum((0, 1))


def dependence(counts):
    """Mutual information, in bits, of the expert and the row of a matrix of counts (rows, E): 0 if the choice of the
    expert says nothing about the row."""
    p = counts.double() / counts.sum()
    independent = p.sum(0) * p.sum(1, keepdim=True)
    return (p * (p / independent).log2().nan_to_num()).sum().item()


def experts_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run of a model with experts")
    p.add_argument("--n", type=int, default=50, help="images of each class (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="of the samples (default: %(default)s)")
    p.add_argument("--batch", type=int, default=64, help="images drawn at once (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def experts(args):
    """Which experts a run's tokens choose, by class, position and denoising step (2407.11633, section 4)."""
    run, objective = args.run, args.run.objective
    classes = objective.num_classes
    if not classes:
        raise ValueError(f"{run.path} is unconditional: the analysis by class needs a run with classes")
    steps = (objective.options | run.config["draw"] | args.draw)["steps"]
    with Counter(objective.model, classes, steps) as counter:
        labels = torch.arange(args.n * classes) % classes
        for k in tqdm(range(0, len(labels), args.batch), desc="counting", unit=" batches", delay=2):
            some, counter.step = labels[k:k + args.batch], 0
            for _ in run.trajectory(range(k, k + len(some)), some, args.seed, **args.draw):
                counter.step += 1
    write_experts(run, counter, args, steps)


def write_experts(run, counter, args, steps):
    """Maps, counts and a table of what a `Counter` has counted."""
    # Maps of an analysis: (layers, rows, E). Of more than 100 classes every so many is drawn.
    maps = {"class": counter.classes.transpose(0, 1), "position": counter.positions, "step": counter.steps}
    for name, counts in maps.items():
        drawn = counts[:, ::max(1, counts.shape[1] // 100)] if name == "class" else counts
        title = f"{run.path}: experts across, {name} down"
        figures.save(figures.heat_maps(drawn, [f"layer {k}" for k in range(len(drawn))], title),
                     run.folder / f"experts-{name}.png")
    load = counter.classes.sum(0).double()
    load = load / load.mean(1, keepdim=True)
    rows = [{"load": load[k].tolist(), "load_cv": load[k].std(correction=0).item(),
             **{name: dependence(counts[k]) for name, counts in maps.items()}} for k in range(len(load))]
    result = {"run": run.path, "images_per_class": args.n, "seed": args.seed, "layers": rows,
              "counts": {name: counts.tolist() for name, counts in maps.items()}}
    runs.write(run.folder / "experts.json", lambda path: path.write_text(json.dumps(result) + "\n"))
    print(f"{args.n} images of each of {len(counter.classes)} classes, {steps} steps. Bits that an expert tells of "
          "(0: nothing)")
    print("layer   class  position    step   load: least, most, coefficient of variation")
    for k, row in enumerate(rows):
        print(f"{k:5}{row['class']:8.4f}{row['position']:10.4f}{row['step']:8.4f}"
              f"{min(row['load']):14.2f}{max(row['load']):6.2f}{row['load_cv']:7.2f}")
    print(f"of at most {math.log2(load.shape[1]):.1f} bits; counts: {run.folder / 'experts.json'}, pictures: "
          f"{run.folder}/experts-class.png, -position.png, -step.png")
