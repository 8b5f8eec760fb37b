"""One model over two processes, and activations computed twice: the same numbers as one process that keeps all."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import optim
import parallel
from models import create_model

ROOT = Path(__file__).parent.parent


class Objective(nn.Module):
    """A small DiT that learns to denoise, with a mark on some weights and one frozen table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = create_model("dit-nano", 8, hidden_size=32, num_heads=2, depth=3)
        for p in self.parameters():
            p.data.normal_(std=0.2) if p.requires_grad else None
        self.model.final_layer.linear.bias.no_decay = True

    def forward(self, batch):
        return (self.model(*batch) - batch[0]).square().mean()


def batch(step, rank=0, world=1):
    g = torch.Generator().manual_seed(step)
    x, t, y = torch.randn(4, 3, 8, 8, generator=g), torch.rand(4, generator=g) * 1000, torch.arange(4)
    rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
    return x[rows], t[rows], y[rows]


class Run:
    """A training of so many steps, as train.py does it."""

    def __init__(self, sharded=False):
        self.objective = Objective()
        average = parallel.shard(self.objective, torch.device("cpu")) if sharded else None
        self.averages = optim.Averages(self.objective, 0.9, average)
        self.optimiser = optim.adamw(self.objective, 1e-3, 0.1)

    def state(self):
        return {"model": self.objective.state_dict(), "ema": self.averages.model.state_dict(),
                "optimiser": self.optimiser.state_dict()}

    def load(self, state):
        self.objective.load_state_dict(state["model"])
        self.averages.model.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])

    def steps(self, first, last, rank=0, world=1):
        """The gradients' norms."""
        norms = []
        for step in range(first, last):
            self.objective(batch(step, rank, world)).backward()
            weights = optim.trained(self.objective)
            norms.append(parallel.full(nn.utils.clip_grad_norm_(weights, 1.0)).item())
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.averages.update(step)
        return norms


def two_processes(rank, folder, port):
    """What each of two processes does: four steps with parts saved after two; the same again from those parts; and from
    the whole state. The first writes what came of it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    run = Run(sharded=True)
    marks = [name for name, p in run.objective.named_parameters() if hasattr(p, "no_decay")]
    held = sum(x.numel() for x in parallel.local(run.objective.parameters()))
    norms = run.steps(0, 2, rank, 2)
    parallel.save(folder / "parts", run.state(), 2)
    after_two = parallel.whole(run.state())
    norms += run.steps(2, 4, rank, 2)
    after_four = parallel.whole(run.state())
    again = Run(sharded=True)
    parallel.prime(again.optimiser)
    state = again.state()
    step = parallel.load(folder / "parts", state)
    again.load(state)
    again.steps(step, 4, rank, 2)
    resumed = parallel.whole(again.state())
    again = Run(sharded=True)
    parallel.prime(again.optimiser)
    sent = [after_two]
    torch.distributed.broadcast_object_list(sent)
    again.load(parallel.like(sent[0], again.state()))
    again.steps(2, 4, rank, 2)
    from_whole = parallel.whole(again.state())
    if rank == 0:
        torch.save({"norms": norms, "step": step, "marks": marks, "held": held, "after_four": after_four,
                    "resumed": resumed, "from_whole": from_whole}, folder / "result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_two_processes_are_one(tmp_path):
    """Weights, averages and moments of four steps within rounding; a resumed run has the same bits; half the weights
    lie in each process; marks stay."""
    port = 20_000 + os.getpid() % 20_000
    code = "import sys; from pathlib import Path; import test_parallel as t; t.two_processes(int(sys.argv[1]), " \
           "Path(sys.argv[2]), int(sys.argv[3]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path), str(port)], env=environment,
                                  stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    one = Run()
    norms = one.steps(0, 4)
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    assert found["step"] == 2 and found["marks"] == ["model.final_layer.linear.bias"]
    assert found["held"] < 0.6 * sum(p.numel() for p in one.objective.parameters())
    exact = one.state()
    for key in ("model", "ema"):
        for name, value in exact[key].items():
            error = (value - found["after_four"][key][name]).norm() / value.norm().clamp(min=1e-6)
            assert error < 1e-5 or name.endswith("qkv.bias"), name      # a key's bias has no gradient but rounding
    for k, moments in exact["optimiser"]["state"].items():
        torch.testing.assert_close(found["after_four"]["optimiser"]["state"][k]["exp_avg"], moments["exp_avg"],
                                   rtol=1e-4, atol=1e-7)
    assert same(found["resumed"], found["after_four"]) and same(found["from_whole"], found["after_four"])
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        parallel.load(tmp_path / "nowhere", {})


def saved(model, inputs):
    """Bytes that a forward pass keeps for the backward one."""
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = model(*inputs)
    weights = {p.data_ptr() for p in model.parameters()}
    return y, sum(size for place, size in kept.items() if place not in weights)


def test_remat():
    """The same bits, dropout included, for a part of the memory; a copy runs its own blocks; what cannot be is said."""
    torch.manual_seed(0)
    model = Objective().model
    for block in model.blocks:
        block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.2))
    twin = copy.deepcopy(parallel.remat(copy.deepcopy(model)))
    results = []
    for m in (model, twin):
        torch.manual_seed(1)
        y, size = saved(m, batch(0))
        grads = torch.autograd.grad(y.square().sum(), [p for p in m.parameters() if p.requires_grad])
        results.append((y, size, grads))
    (y, size, grads), (again, less, repeated) = results
    assert torch.equal(y, again) and all(map(torch.equal, grads, repeated))
    assert less < 0.4 * size
    third = copy.deepcopy(twin)
    for p in third.parameters():
        p.data.zero_()
    assert not third(*batch(0)).any()
    torch.manual_seed(1)
    assert torch.equal(twin(*batch(0)), y)
    assert len(parallel.blocks(model)) == 3
    with pytest.raises(ValueError, match="--remat: Linear has no list of blocks"):
        parallel.remat(nn.Linear(2, 2))
    lonely = nn.Module()
    lonely.weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="--shard: Module holds weights of its own"):
        parallel.cut(lonely, torch.device("cpu"))
