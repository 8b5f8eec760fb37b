"""The house: one contract for everything that is trained, one entry for everything that is chosen, floors without an
arrow that points up; and the loop against a plain one."""

import ast
import inspect
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import stubs
import torch
from test_train import ROOT, TINY, call, here, losses, refused, weights  # noqa: F401 (a fixture among them)

import build
import data
import diffusion
import evaluate
import objectives
import optim
import runs
import sample
import samplers
import train

# --------------------------------------------------------------------------------------------- one entry, nothing else


@pytest.fixture
def furnished(here, monkeypatch):  # noqa: F811
    """The house with one entry more of every kind."""
    monkeypatch.setitem(build.KINDS, "stubs", {"tokens-stub": stubs.MaskedTokens, "players-stub": stubs.TwoPlayers})
    monkeypatch.setitem(build.models.MODELS, "mixer-stub", stubs.Mixer)
    monkeypatch.setitem(data.DATASETS, "stripes", stubs.stripes)
    monkeypatch.setitem(build.DRAWING["sampler"], "straight", stubs.straight)
    return here


BARE = ["--data", "shapes:size=8", "--batch", "8", "--steps", "6", "--log-every", "1", "--sample-n", "8",
        "--sample-every", "0", "--device", "cpu"]
OTHERS = {"tokens-stub": ["--model", "tokens-stub:width=8"], "players-stub": ["--model", "players-stub"],
          "mixer-stub": ["--model", "mixer-stub:width=8", "--draw", "sampler=straight:share=0.5,steps=3"],
          "stripes": ["--model", "mixer-stub:width=8", "--data", "stripes:size=4"]}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_goes_through_every_door(furnished, capsys, name):
    """train, exact resume, accumulation's shapes, sample, film, --list, --help, speed, evaluate: one entry each."""
    argv = [*BARE, *OTHERS[name]]
    call(train.train, *argv, "--out", "whole")
    call(train.train, *argv, "--out", "parts", "--save-every", "2", "--sample-every", "1")
    os.replace("parts/ckpt.prev.pt", "parts/ckpt.pt")
    call(train.train, *argv, "--out", "parts")
    assert weights("parts") == weights("whole") and losses("parts") == losses("whole")
    assert list(Path("whole/samples").iterdir())
    for batch in (2, 7):
        call(sample.sample, "whole", "--n", "7", "--batch", batch, "--out", f"{batch}.npz", "--film", "f.gif")
    two, seven = (np.load(f"{b}.npz")["arr_0"].astype(int) for b in (2, 7))
    assert two.shape[0] == 7 and abs(two - seven).max() <= 1
    capsys.readouterr()
    for listing in (["--list"], ["--help", name]):
        with pytest.raises(SystemExit):
            call(train.train, *listing)
        said = capsys.readouterr().out
        assert name in said and "None" not in said.splitlines()[0]
    if "stub" in name:
        call(evaluate.evaluate, "speed", name, "--image-size", "8", "--batch", "2", "--rounds", "1", "--device", "cpu")
        assert name in capsys.readouterr().out
    assert "without an option 'moon'" in refused(capsys, train.train, *argv, "--draw", "moon=1", "--out", "x")
    assert "unknown flag '--moon'" in refused(capsys, sample.sample, "whole", "--moon", "1")


def test_two_players_rest_and_learn_by_their_marks(furnished):
    """A paused critic stands still; each loss reaches its own player alone; buffers of the averages are copies."""
    torch.manual_seed(0)
    objective = stubs.TwoPlayers(8, 3, 0).double()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    noise = objectives.StepNoise(0, 0, 4)
    losses_ = objective.loss({"x": x, "y": None, "step": 0, "noise": type("N", (), {
        "normal": lambda self, *s: noise.normal(*s).double()})()})
    for part, player in (("fooled", "critic"), ("told", "generator")):
        touched = torch.autograd.grad(losses_[part], list(getattr(objective, player).parameters()), retain_graph=True,
                                      allow_unused=True)
        assert all(g is None or not g.any() for g in touched), f"{part} moves the {player}"
    argv = [*BARE, "--model", "players-stub"]
    states = []
    for steps in (1, 2, 3):
        call(train.train, *argv, "--steps", steps, "--decay", "constant", "--out", f"s{steps}")
        states.append(runs.load_checkpoint(f"s{steps}/ckpt.pt"))
    one, two, three = (s["model"] for s in states)
    assert torch.equal(one["critic.0.weight"], two["critic.0.weight"]), "step 1 is a pause"
    assert not torch.equal(two["critic.0.weight"], three["critic.0.weight"])
    assert not torch.equal(one["generator.0.weight"], two["generator.0.weight"])
    assert torch.equal(three["critic.2.running_mean"], states[2]["ema"]["critic.2.running_mean"]), "buffers are copied"


def test_lines_an_entry_takes():
    """What a contributor writes: a model of another kind in at most 60 lines, a backbone, data set or sampler in 20."""
    count = lambda thing: len(inspect.getsource(thing).splitlines())
    assert count(stubs.MaskedTokens) <= 60 and count(stubs.TwoPlayers) <= 60
    assert max(count(thing) for thing in (stubs.Mixer, stubs.stripes, stubs.straight)) <= 20


# ------------------------------------------------------------------------------------------------ the loop, plainly


def plain_loop(config, steps):
    """The training loop written down once more, without micro-batches, groups or fused operations: the weights and the
    averages after so many steps, and the norms of the gradients."""
    dataset = build.load_data(config, "train")
    build.describe(config, dataset)
    torch.manual_seed(config["seed"])
    objective = build.build(config)
    names = [name for name, _ in objective.named_parameters()]
    weights_ = dict(objective.named_parameters())
    averages = {name: p.detach().clone() for name, p in weights_.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in weights_.items()} for _ in range(2))
    b1, b2, norms = 0.9, 0.99, []
    for step in range(steps):
        rate = config["lr"] * min(1, (step + 1) / config["warmup"]) * (1 - step / config["steps"])
        torch.manual_seed(objectives.seeded(config["seed"], step, 0).initial_seed())
        indices, flips = dataset.plan(step, config["batch"], config["seed"])
        x, y = dataset.gather(indices, flips)
        noise = objectives.StepNoise(config["seed"], step, config["batch"])
        loss = objective.loss({"x": x, "y": y, "step": step, "noise": noise})["loss"]
        gradients = dict(zip(names, torch.autograd.grad(loss, [weights_[n] for n in names])))
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        norms.append(norm.item())
        with torch.no_grad():
            for name, p in weights_.items():
                g = gradients[name] * min(1, config["clip"] / (norm + 1e-6))
                first[name] = b1 * first[name] + (1 - b1) * g
                second[name] = b2 * second[name] + (1 - b2) * g * g
                m, v = first[name] / (1 - b1 ** (step + 1)), second[name] / (1 - b2 ** (step + 1))
                decay = 0 if hasattr(p, "no_decay") else config["weight_decay"]
                p.copy_(p * (1 - rate * decay) - rate * m / (v.sqrt() + 1e-8))
                decay = min(config["ema"], (1 + step) / (10 + step))
                averages[name] = decay * averages[name] + (1 - decay) * p
    return {name: p.detach() for name, p in weights_.items()}, averages, norms


@pytest.mark.parametrize("accum", [1, 4])
def test_the_loop_against_a_plain_one(here, accum):  # noqa: F811
    """Would catch: a warm-up of the averages or of the rate off by one, gradients not divided by the micro-batches,
    marks ignored, clipping after the step, the decay at another step."""
    argv = [*TINY, "--model", "dimr-nano:hidden_size=16,depth=2,num_heads=2", "--optimiser", "adamw", "--lr", "2e-2",
            "--warmup", "4", "--weight-decay", "5", "--ema", "0.3", "--clip", "0.5"]
    call(train.train, *argv, "--accum", accum, "--out", "r")
    state = runs.load_checkpoint("r/ckpt.pt")
    config = {k: v for k, v in state["config"].items()}
    assert any(hasattr(p, "no_decay") for p in build.build(config).parameters())
    plain, averages, norms = plain_loop(config, 6)
    logged = [json.loads(entry)["grad_norm"] for entry in Path("r/metrics.jsonl").read_text().splitlines()]
    assert logged == pytest.approx(norms, rel=1e-2)          # Adam's step alone does not tell the gradients' size
    for ours, theirs in ((state["model"], plain), (state["ema"], averages)):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_grids_of_a_chain():
    """The published spacings of T = 1000 in 4 steps, by hand (2305.08891, table 2)."""
    process = diffusion.create_process("linear")
    times = lambda grid: samplers.grid_times(process, 4, grid).tolist()
    assert times("leading") == [750, 500, 250, 0, -1] and times("trailing") == [999, 749, 499, 249, -1]
    assert times("spaced") == [999, 666, 333, 0, -1]
    assert times(partial(samplers.leading, offset=1)) == [751, 501, 251, 1, -1]


@pytest.mark.slow
def test_training_does_not_grow(here):  # noqa: F811
    """2,000 steps; resident memory grows by less than 20 MB after the first 200."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    at, update = {}, optim.Averages.update

    def watched(self, step):
        update(self, step)
        at[step] = resident()

    optim.Averages.update = watched
    try:
        call(train.train, *TINY[:4], "--batch", "8", "--steps", "2000", "--log-every", "500", "--save-every", "5000",
             "--sample-every", "0", "--model", "unet-pico", "--device", "cpu", "--out", "r")
    finally:
        optim.Averages.update = update
    print(f"resident: {at[200]:.1f} MB after 200 steps, {at[1999]:.1f} MB after 2,000")
    assert at[1999] - at[200] < 20


def test_nothing_of_a_step_is_kept(here):  # noqa: F811
    """The averages carry no graph from step to step: what leaked 98 kB a step."""
    objective = torch.nn.Linear(2, 2)
    averages = optim.Averages(objective, 0.9)
    for step in range(3):
        averages.update(step)
    assert all(p.grad_fn is None and not p.requires_grad for p in averages.model.parameters())


def test_a_checkpoint_before_a_picture(here, capsys, monkeypatch):  # noqa: F811
    """What fails while a picture is drawn costs the picture, not the run."""
    real, calls = build.draw, []

    def broken(*args, **options):
        calls.append(Path("r/ckpt.pt").exists())
        raise ValueError("no paint")
        yield

    monkeypatch.setattr(build, "draw", broken)
    call(train.train, *TINY, "--out", "r")
    assert calls == [True] and "no picture of step 6: no paint" in capsys.readouterr().err
    assert weights("r")[0] == 6
    monkeypatch.setattr(build, "draw", real)
    call(sample.sample, "r", "--n", "2")


# -------------------------------------------------------------------------------------------------------- older runs


def test_runs_of_version_1_open(here, capsys):  # noqa: F811
    """A folder that train.py wrote before names took options."""
    folder = ROOT / "tests" / "golden" / "run-version-1"
    opened = build.open_run(folder)
    assert build.split_name(opened.config["network"]) == ("dit-nano", {"depth": 1, "hidden_size": 8, "num_heads": 2})
    recorded = np.load(folder / "drawn.npz")["arr_0"]
    call(sample.sample, folder, "--n", len(recorded), "--out", "now.npz")
    assert abs(np.load("now.npz")["arr_0"].astype(int) - recorded).max() <= 1
    later = dict(opened.config, version=build.VERSION + 1)
    with pytest.raises(ValueError, match="written by a later version"):
        build.upgraded(later)


# --------------------------------------------------------------------------------------------------------- the floors

FLOORS = {"train": 4, "sample": 4, "evaluate": 4, "build": 3, "export": 3, "objectives": 3, "speed": 3, "scores": 3,
          "claims": 3, "report": 3, "diffusion_classifier": 3, "models": 2, "autoencoders": 2, "masked": 2, "ppgn": 2,
          "cropping": 2, "guides": 2, "convert": 2, "convert_tokens": 2, "layers": 1, "moe": 1, "scans": 1,
          "parallel": 1, "diffusion": 1, "samplers": 1, "guidance": 1, "optim": 1, "data": 1, "metrics": 1,
          "distance": 1, "figures": 1, "runs": 0, "weights": 0, "kernels": 0}


def imports(path):
    """The modules of the house that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found & FLOORS.keys()


def test_no_arrow_points_up_and_none_in_a_circle():
    files = [path for path in ROOT.glob("*.py")]
    assert {path.stem for path in files} <= FLOORS.keys(), "a new room has a floor"
    arrows = {path.stem: imports(path) - {path.stem} for path in files}
    for room, below in arrows.items():
        assert all(FLOORS[other] <= FLOORS[room] for other in below), room
    while arrows:                                    # take away, again and again, what imports nothing that is left
        leaves = {room for room, below in arrows.items() if not below & arrows.keys()}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {room: below for room, below in arrows.items() if room not in leaves}


def test_functions_are_short():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "flags" not in node.name:
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"


# ------------------------------------------------------------------------------------------- names and their options


@pytest.mark.parametrize("text, expected", [
    ("dit-s/2", ("dit-s/2", {})),
    ("dit-nano:depth=4,rope=ntk", ("dit-nano", {"depth": 4, "rope": "ntk"})),
    ("unet:multipliers=(1,2),attention=[0],x=None", ("unet", {"multipliers": (1, 2), "attention": (0,), "x": None})),
    ("C:/runs/a", ("C:/runs/a", {})),
    ("runs/a:shares=(0.5,0),flag=true", ("runs/a", {"shares": (0.5, 0), "flag": True})),
    ("edm:s-churn=40", ("edm", {"s_churn": 40})),
])
def test_names_with_options(text, expected):
    assert build.split_name(text) == expected
    assert build.split_name(build.join_name(*expected)) == expected


def test_start_up_time(tmp_path):
    """The help comes quickly: no model is built, no compiler imported for it."""
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "sample.py", "--help"], capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--official" in done.stdout
    assert "torch._dynamo" not in done.stderr, "torch._dynamo doubles the time of every start"


def test_config_is_plain_json(here):  # noqa: F811
    call(train.train, *TINY, "--out", "r")
    config = json.load(open("r/config.json"))
    assert config == runs.load_checkpoint("r/ckpt.pt")["config"] and config["version"] == build.VERSION
