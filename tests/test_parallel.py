"""One model over two processes, and activations computed twice: the same numbers as one process that keeps all."""

import copy
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import optim
import parallel
import speed
import train
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


@pytest.mark.slow
def test_a_sharded_training_is_one_process_and_goes_on_exactly(tmp_path):
    """train.py --shard under torchrun, two processes (gloo): the weights of one process within 1e-5; a run killed
    between two checkpoints and started again ends with the bits of one that was not. Its file opens as any other."""
    command = ["train.py", "--model", "dit-nano:depth=2,hidden_size=32,num_heads=2", "--data", "shapes:size=8",
               "--batch", "8", "--steps", "40", "--save-every", "5", "--sample-every", "0", "--sample-n", "2",
               "--draw", "steps=2", "--optimiser", "adamw", "--lr", "1e-3", "--device", "cpu", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def start(name, *before):
        more = ["--shard"] if before else []
        return subprocess.Popen([*(before or [sys.executable]), *command, str(tmp_path / name), *more], cwd=ROOT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                                start_new_session=True)

    assert start("one").wait() == 0 and start("straight", *torchrun).wait() == 0
    killed = start("killed", *torchrun)
    while killed.poll() is None and not (tmp_path / "killed/ckpt.parts.prev").exists():
        time.sleep(0.05)
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    for process in (killed.pid, *map(int, workers)):               # the workers have sessions of their own
        os.kill(process, signal.SIGKILL)
    killed.wait()
    parts = tmp_path / "killed" / "ckpt.parts"
    assert parts.exists() and 0 < int((parts / "step").read_text()) < 40
    assert start("killed", *torchrun).wait() == 0 and not parts.exists()
    one, straight, again = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)
                            for name in ("one", "straight", "killed"))
    assert all(same(straight[key], again[key]) for key in ("step", "model", "ema", "optimiser"))
    worst = 0.0
    for key in ("model", "ema"):
        for name, value in one[key].items():
            error = ((value - straight[key][name]).norm() / value.norm().clamp(min=1e-6)).item()
            worst = max(worst, 0.0 if name.endswith("qkv.bias") else error)     # a key's bias: no gradient but rounding
    print(f"\n40 steps, two processes sharded against one: largest relative difference of a weight {worst:.1e}")
    assert worst < 1e-5


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


def test_imitated_bf16_is_warned_of(monkeypatch, capsys):
    """train.py --precision bf16 on a processor without units for it; on one with them nothing is said."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "shapes:size=8", "--precision", "bf16", "--device", "cpu",
                                      "--model", "dit-nano:depth=1,hidden_size=32,num_heads=1", "--dry-run"])
    for capabilities, warned in (({"avx2": True, "avx512_bf16": False}, True), ({"amx_bf16": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        train.train()
        said = capsys.readouterr().err
        assert ("this cpu has no units for bfloat16 and imitates them, slowly: --precision fp32" in said) == warned


@pytest.mark.slow
def test_remat_figures():
    """What --remat saves and costs: DiT-S/2, batch 8, a training step.  python -m pytest -m slow -k remat_figures -s"""
    options = {"image_size": 32, "in_channels": 4, "num_classes": 1000}
    models = {"kept": create_model("dit-s/2", **options)}
    models["twice"] = parallel.remat(copy.deepcopy(models["kept"]))
    x, t, y = torch.randn(8, 4, 32, 32), torch.rand(8) * 1000, torch.arange(8)
    memory, times = {}, {name: [] for name in models}
    steps = {name: lambda m=model: m(x, t, y).square().mean().backward() for name, model in models.items()}
    for step in steps.values():                                # gradients are there from now on
        step()
    for name, step in steps.items():
        memory[name] = speed.peak_memory(torch.device("cpu"), step) / 2**20
    for _ in range(5):
        for name, step in steps.items():
            times[name].append(speed.seconds(torch.device("cpu"), step))
    kept, twice = (statistics.median(times[name]) for name in models)
    print(f"\npeak of a step beyond weights and gradients: {memory['kept']:.0f} MiB kept, {memory['twice']:.0f} MiB "
          f"computed twice; time {twice / kept:.2f} times")
    assert memory["twice"] < 0.5 * memory["kept"] and twice < 1.8 * kept
