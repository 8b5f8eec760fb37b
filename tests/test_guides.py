"""Guides: the gradient's two forms against closed forms, ADM's pools, LoRA and experts, what training touches, and the
commands that train and use them."""

import copy
import functools
import os

import numpy as np
import pytest
import torch
from PIL import Image
from recorded import Mixture, network
from test_train import TINY, call, here, losses, refused, weights  # noqa: F401 (a fixture among them)
from torch import nn

import build
import data
import diffusion
import evaluate
import guides
import layers
import objectives
import runs
import sample
import samplers
import train

# ------------------------------------------------------------------------------------ two Gaussians, all in closed form

CENTRE, SPREAD = torch.tensor([0.6, -0.4], dtype=torch.float64), 0.3


def two_gaussians(process):
    """(network, log_prob): data N(+-CENTRE, SPREAD^2) with even chances; y = 1 is the class at +CENTRE. The exact
    log p(y | x_t) is that of a logistic whose logit is linear in x_t."""
    mixture = Mixture({"means": torch.stack([CENTRE, -CENTRE]), "stds": torch.tensor([SPREAD, SPREAD]),
                       "weights": torch.tensor([0.5, 0.5])})

    def log_prob(xt, t, y=1):
        alpha, sigma = (v[:, None] for v in process.path(t))
        logit = (2 * alpha / (alpha**2 * SPREAD**2 + sigma**2) * xt * CENTRE).sum(1)
        return nn.functional.logsigmoid(logit if y else -logit)

    return network(process, mixture), log_prob


def inputs_undone(process, net):
    """The network of `two_gaussians` wants x_t and t themselves: undo what a process shows and tells its network."""
    process.network_input = lambda xt, t: xt
    process.network_time = lambda t: t
    return net


def drawn_by(process, net, x, sampler, steps, noise, guide=None, guide_scale=1.0, **more):
    """The steps of a sampler, as an objective draws under a guide."""
    objective = objectives.Diffusion(layers.Backbone(), process, x.shape[1:])
    objective.denoiser = lambda y: process.denoiser(net, y)
    sampler = functools.partial(samplers.SAMPLERS[sampler], **more) if more else sampler
    return objective.generated(x, None, None, noise, guide=guide, guide_scale=guide_scale, sampler=sampler, steps=steps,
                               clip=False)


CASES = [("linear", {}, "ddpm", 250, {}), ("linear", {}, "ddim", 100, {}), ("linear", {}, "ddim", 250, {"eta": 1.0}),
         ("cosine", {"prediction": "v"}, "dpmpp-2m", 60, {}), ("flow", {}, "euler", 100, {}),
         ("flow", {}, "heun", 60, {}),
         ("edm", {}, "heun", 60, {}), ("vp", {}, "euler", 200, {}), ("gvp", {}, "dpmpp-2m", 60, {})]


@pytest.mark.parametrize("name, options, sampler, steps, more", CASES)
def test_exact_guidance_draws_the_class(name, options, sampler, steps, more):
    """With scale 1 and the exact p(y | x_t) samples are those of class y, whatever the process and sampler."""
    process = diffusion.create_process(name, **options)
    net, log_prob = two_gaussians(process)
    net = inputs_undone(process, net)
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    noise = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    for y in (1, 0):
        *_, drawn = drawn_by(process, net, x, sampler=sampler, steps=steps, noise=noise,
                                        guide=lambda xt, t, y=y: log_prob(xt, t, y), guide_scale=1.0, **more)
        target = CENTRE if y else -CENTRE
        error = (drawn.mean(0) - target).abs().max()
        assert error < 5 * SPREAD / len(x) ** 0.5 + 0.02, f"class {y}: the mean is off by {error:.3f}"
        assert (drawn.std(0) - SPREAD).abs().max() < 0.04


@pytest.mark.parametrize("name", ["linear", "flow", "edm", "vp"])
def test_the_guided_score(name):
    """eps' = -sigma (score + g), x0' is what eps' implies, g is linear in the scale and each sample's own; pure noise
    of a flow is left alone; scale 0 changes no bit of a sample."""
    process = diffusion.create_process(name)
    net, log_prob = two_gaussians(process)
    plain = process.denoiser(inputs_undone(process, net))
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = 0.4 * process.t_noisy if name != "linear" else 400.0
    times = diffusion.batch_time(t, x)
    g = guides.gradient_of(log_prob)(x, times)
    for scale in (0.5, 3.0):
        d = guides.classifier_guided(plain, guides.gradient_of(log_prob, scale), process)(x, t)
        alpha, sigma = (v[:, None] for v in process.path(times))
        score = -plain(x, t).eps / sigma
        torch.testing.assert_close(d.eps, -sigma * (score + scale * g), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alpha * d.x0 + sigma * d.eps, x, rtol=1e-9, atol=1e-9)
    alone = guides.gradient_of(log_prob)(x[:1], times[:1])
    torch.testing.assert_close(alone, g[:1])
    if name == "flow":
        d = guides.classifier_guided(plain, guides.gradient_of(log_prob, 9.0), process)(x, 1.0)
        assert torch.equal(d.x0, plain(x, 1.0).x0) and d.eps.isfinite().all()
    for sampler in ("ddpm", "ddim"):
        draws = [list(drawn_by(process, net, x, sampler=sampler, steps=4, noise=lambda s: torch.ones(s), guide=g,
                                          guide_scale=0.0)) for g in (None, log_prob)]
        assert all(torch.equal(a, b) for a, b in zip(*draws))


def test_ancestral_guidance_moves_the_mean_by_its_variance():
    """Of a respaced chain with learned variances, along the whole of it: guided minus unguided is variance times g, in
    the last step with beta~ of the step before where log beta~ = -inf would stand."""
    process = diffusion.create_process("linear", learned_variance=True)
    denoise = lambda x, t: diffusion.Denoised(0.3 * x, 0.5 * x, torch.full_like(x, 0.25))
    times = samplers.times_of(process, 5)
    gradient = lambda x, t: torch.full_like(x, 2.0)
    x = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    zeros = lambda shape: torch.zeros(shape)
    bars = process.alpha_bar.double()
    previous, beta_tilde = None, None
    for (t, s), drawn in zip(zip(times.tolist(), times[1:].tolist()),
                             guides.guided_ddpm(denoise, x, times, process, zeros, gradient=gradient)):
        a_t, a_s = bars[int(t) + 1], bars[int(s) + 1]
        beta = 1 - a_t / a_s
        small = beta * (1 - a_s) / (1 - a_t)
        beta_tilde = small if small > 0 else beta_tilde
        start = x if previous is None else previous
        mean = a_s.sqrt() * beta / (1 - a_t) * 0.3 * start + (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t) * start
        variance = (0.25 * beta.log() + 0.75 * beta_tilde.log()).exp()
        torch.testing.assert_close(drawn, mean + 2.0 * variance, rtol=1e-9, atol=1e-12)
        previous = drawn
    bare = lambda x, t: diffusion.Denoised(0.3 * x, 0.5 * x)
    walk = functools.partial(guides.guided_ddpm, bare, x, times, process, zeros, gradient=gradient)
    small, large = list(walk(variance="small")), list(walk(variance="large"))
    assert not torch.allclose(small[-1], large[-1])


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("pool", guides.POOLS)
@pytest.mark.parametrize("options", [{}, {"scale_shift": False, "resblock_updown": False, "new_order": True},
                                     {"resblock_updown": False, "conv_resample": False, "head_channels": None,
                                      "heads": 2}])
def test_adm_pools_hear_the_time(pool, options):
    if pool == "attention" and "heads" in options:
        with pytest.raises(ValueError, match="needs head_channels"):
            guides.ADMClassifier(16, 3, 7, 32, (1, 2), 1, (2,), pool=pool, **options)
        return
    torch.manual_seed(0)
    net = guides.ADMClassifier(16, 3, 7, 32, (1, 2), 1, (2,), **{"head_channels": 16, "pool": pool} | options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)                  # closed branches open
    x = torch.randn(2, 3, 16, 16)
    one, other = net(x, torch.tensor([10.0, 10.0])), net(x, torch.tensor([10.0, 900.0]))
    assert one.shape == (2, 7) and torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])


COUNTS = {"resnet-18": 11_689_512, "resnet-34": 21_797_672, "resnet-50": 25_557_032, "resnet-101": 44_549_160,
          "resnet-152": 60_192_808, "deit-s": 22_050_664}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    with torch.device("meta"):
        guide = guides.GUIDES[name](224, 3, 1000, [], None)
    assert sum(p.numel() for p in guide.model.parameters()) == COUNTS[name]


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("layer", [nn.Linear(6, 10), nn.Linear(6, 10, bias=False), nn.Conv2d(4, 6, 3, 2, 1),
                                   nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(4, 6, 5, padding=2, bias=False)])
@pytest.mark.parametrize("r, alpha", [(2, 8.0), (16, 8.0)])
def test_lora_merged_and_not(layer, r, alpha):
    layer = copy.deepcopy(layer).double()
    x = torch.randn(3, 6) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 9, 7)
    x, before = x.double(), layer.weight.clone()
    lora = guides.LoRA(layer, r, alpha)
    assert torch.equal(lora(x), layer(x)), "with B = 0 it is the layer"
    nn.init.normal_(lora.lora_B)
    merged = lora.merged()
    torch.testing.assert_close(merged(x), lora(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(lora(x), layer(x)) and torch.equal(layer.weight, before)
    twice = guides.LoRA(layer, r, 2 * alpha)
    twice.load_state_dict(lora.state_dict())
    torch.testing.assert_close(twice.delta(), 2 * lora.delta())


def test_lora_refuses():
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, (1, 3))):
        with pytest.raises(ValueError, match="without groups"):
            guides.LoRA(layer)
    with pytest.raises(ValueError, match="take a ResNet or a DeiT"):
        guides.adapted(guides.ADMClassifier(16, 3, 7, 32, (1, 2), 1, (2,)))


NETWORKS = {"resnet": lambda: guides.ResNet(3, 5, (8, 16), (1, 2), stem="cifar"),
            "bottleneck": lambda: guides.ResNet(3, 5, (8, 16), (1, 1), bottleneck=True),
            "map": lambda: guides.ResNetMap(3, 5, widths=(8, 16), blocks=(1, 1), stem="cifar"),
            "deit": lambda: guides.DeiT(16, 3, 5, 4, 24, 2, 3)}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_expert_starts_as_the_network_and_shares_what_is_frozen(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    expert = guides.adapted(network, r=2).eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(expert(x), network(x))
    own = {p.data_ptr() for p in network.parameters()}
    trained = {n.replace(".layer.", "."): p for n, p in expert.named_parameters() if p.requires_grad}
    assert not any(p.data_ptr() in own for p in trained.values())
    assert all(p.data_ptr() in own for p in expert.parameters() if not p.requires_grad)
    frozen = ("downsample.1.weight", "conv3.lora_A")
    assert not any(n.startswith(("fc.", "score.")) or n.endswith(frozen) for n in trained)
    assert all(n.endswith(("bias", "lora_A", "lora_B")) or ".bn" in f".{n}" for n in trained)
    for p in trained.values():
        nn.init.normal_(p, std=0.1)
    torch.testing.assert_close(guides.merged(expert)(x), expert(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, guides.LoRA) for m in guides.merged(expert).modules())


# -------------------------------------------------------------------------------------------------------------- experts


class Own(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x, t):
        return x.flatten(1).mean(1, keepdim=True) + self.k


@pytest.mark.parametrize("N", [1, 2, 3, 5, 7])
def test_each_sample_is_served_by_the_expert_of_its_time(N):
    experts = guides.Experts([Own(10.0 * k) for k in range(N)])
    t = torch.tensor([999.0, 0.0, 500.5, 200.0, 201.0, 1.0, 400.0])
    x = torch.randn(7, 1, 2, 2)
    together = experts(x, t)
    alone = torch.cat([experts(x[i:i + 1], t[i:i + 1]) for i in range(7)])
    torch.testing.assert_close(together, alone)
    for i, value in enumerate(t.tolist()):
        edges = [int(k * 1000 / N) for k in range(N + 1)]
        official = next(k for k in range(N) if edges[k] <= value <= edges[k + 1])
        assert experts.choose(t)[i] == official
    chain = samplers.times_of(diffusion.create_process("linear"), 25)[:-1]
    assert set(experts.choose(chain).tolist()) == set(range(N))


@pytest.mark.parametrize("name", ["linear", "flow", "edm", "vp"])
def test_times_lie_in_the_range_of_their_expert(name):
    process, u = diffusion.create_process(name), torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for low, high in ((0, 200), (200, 400), (800, 1000)):
        told = process.network_time(guides.times_between(process, low, high, u))
        assert (told >= low - 0.2).all() and (told <= high + 0.1).all()
        assert told.max() - told.min() > 0.98 * (high - low) - 1.5, "the whole range is drawn"


def test_knowledge_transfer():
    """No gradient where the student's softmax is the sharpened teacher's; 1/K of the divergence; of maps the square."""
    task, teacher = guides.Classes(), torch.randn(4, 5, dtype=torch.float64)
    z = (teacher / 0.25 + 3.0).requires_grad_()
    (g,) = torch.autograd.grad(task.transfer(z, teacher).sum(), z)
    assert g.abs().max() < 1e-12 and task.transfer(z, teacher).abs().max() < 1e-12
    other = torch.randn(4, 5, dtype=torch.float64)
    p, q = (teacher / 0.25).softmax(1), other.softmax(1)
    torch.testing.assert_close(task.transfer(other, teacher), (p * (p / q).log()).sum(1) / 5)
    pixels = task.transfer(other[..., None, None].expand(4, 5, 2, 3), teacher[..., None, None].expand(4, 5, 2, 3))
    torch.testing.assert_close(pixels, task.transfer(other, teacher))
    a, b = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(guides.Maps().transfer(a, b), ((a - b) ** 2).mean((1, 2, 3)))


# ------------------------------------------------------------------------------------------------------------ the house

SMALL = [*TINY[2:]]
NANO = ["--model", "resnet-nano:widths=(8,16),blocks=(1,1)"]


@pytest.fixture
def furnished(here, monkeypatch):  # noqa: F811
    """Runs in an empty folder: an unconditional denoiser `d`, a guide `g`."""
    call(train.train, *TINY, "--unconditional", "--out", "d")
    call(train.train, *NANO, *SMALL[:-2], "--device", "cpu", "--draw", "steps=2", "--out", "g")
    return here


PPAP = "ppap:guide=g,diffusion=d,experts=2,images=16,draw_steps=2,r=2"


def test_ppap_through_every_door(furnished, capsys):
    """It trains without data or labels, resumes exactly, draws and guides; the off-the-shelf run stands still."""
    argv = ["--model", PPAP, *SMALL]
    before = weights("g")
    call(train.train, *argv, "--out", "whole")
    call(train.train, *argv, "--out", "parts", "--save-every", "3")
    os.replace("parts/ckpt.prev.pt", "parts/ckpt.pt")
    call(train.train, *argv, "--out", "parts")
    assert weights("parts") == weights("whole") and losses("parts") == losses("whole") and weights("g") == before
    state = runs.load_checkpoint("whole/ckpt.pt")["model"]
    guide = runs.load_checkpoint("g/ckpt.pt")["ema"]
    assert torch.equal(state["model.networks.0.fc.weight"], guide["model.fc.weight"])
    assert state["model.networks.0.fc.weight"].data_ptr() == state["model.networks.1.fc.weight"].data_ptr()
    for k in range(2):
        assert state[f"model.networks.{k}.conv1.lora_B"].any(), f"expert {k} was never trained"
    draws, guided = {}, ["--guide", "whole", "--classes", "star"]
    for name, more in {"none": [], "zero": [*guided, "--guide-scale", "0"], "some": guided}.items():
        call(sample.sample, "d", "--n", "4", *more, "--out", f"{name}.npz")
        draws[name] = np.load(f"{name}.npz")["arr_0"]
    assert (draws["none"] == draws["zero"]).all() and (draws["none"] != draws["some"]).any()
    call(sample.sample, "whole", "--n", "5", "--out", "p.png")
    capsys.readouterr()
    call(evaluate.evaluate, "guides", "g", "whole", "--n", "20", "--ranges", "2", "--device", "cpu", "--diffusion", "d",
         "--drawn", "4")
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[-3:]] == ["unguided", "g", "whole"]
    said = said[:-4]
    assert said[-1].startswith("whole") and "500-1000" in said[1] and said[-1].split()[2] == said[-2].split()[2]


def test_one_step_trains_one_expert(furnished):
    config = build.open_config("g") | {"network": PPAP.replace("diffusion=d,", ""), "model": PPAP}
    objective = build.build(config)
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    for step in (0, 1, 4):
        objective.zero_grad()
        batch = {"x": x, "y": torch.zeros(4, dtype=torch.long), "step": step, "noise": objectives.StepNoise(0, step, 4)}
        losses_ = objective.loss(batch)
        losses_["loss"].backward()
        touched = {n.split(".")[2] for n, p in objective.named_parameters() if p.grad is not None}
        paused = {n.split(".")[2] for n, p in objective.named_parameters() if p.requires_grad and p.paused}
        assert touched == {str(step % 2)} and paused == {str(1 - step % 2)}
    assert all(p.grad is None for p in objective.teacher.parameters()) and not objective.teacher.training


@pytest.mark.parametrize("model, more", [
    ("resnet-nano:widths=(8,16),blocks=(1,1),noisy=True", []), ("classifier-adm-nano:multipliers=(1,1)", []),
    ("deit-nano:hidden_size=24,depth=1", []), ("resnet-map-nano:widths=(8,16),blocks=(1,1)", ["labels=segments"]),
    ("resnet-map-nano:widths=(8,16),blocks=(1,1),noisy=True", ["labels=distance"])])
def test_every_guide_trains_and_guides(furnished, model, more):
    shapes = ",".join(["shapes:size=8", *more])
    argv = ["--model", model, *SMALL, "--data", shapes]
    call(train.train, *argv, "--precision", "bf16", "--out", "n")
    tuned = ["--model", "ppap:guide=n,experts=2,r=2", *SMALL, "--data", shapes]
    if "noisy" not in model and "adm" not in model:
        call(train.train, *tuned, "--out", "p")
    guide = "p" if "noisy" not in model and "adm" not in model else "n"
    picture = []
    if more:
        shape = data.load("shapes", split="test", size=8).images[3]
        Image.fromarray(shape.permute(1, 2, 0).numpy()).save("asked.png")
        picture = ["--guide-image", "asked.png"]
    call(sample.sample, "d", "--n", "2", "--guide", guide, "--guide-scale", "3", *picture, "--out", "x.npz")
    with np.load("x.npz") as drawn:
        assert drawn["arr_0"].shape == (2, 8, 8, 3) and drawn["arr_0"].std() > 0


def test_published_weights_load_by_name(here, capsys):  # noqa: F811
    """A file with torchvision's names: as it is under --lr 0, a fresh head for other classes; others are refused."""
    torch.manual_seed(0)
    theirs = guides.ResNet(3, 20, (8, 16), (1, 1), stem="cifar", statistics=guides.IMAGENET)
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
    torch.save(theirs.state_dict(), "published.pth")
    model = ["--model", "resnet-nano:widths=(8,16),blocks=(1,1),pretrained=True"]
    call(train.train, *model, *SMALL, "--published", "published.pth", "--lr", "0", "--steps", "1", "--out", "r")
    assert "all but fc.weight, fc.bias" in capsys.readouterr().out
    ours = build.open_run("r").objective.model
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(ours.features(x)[-1], theirs.eval().features(x)[-1])
    torch.save({"moon": torch.zeros(1)}, "other.pth")
    said = lambda *argv: refused(capsys, train.train, *argv, "--out", "q")
    assert "holds other weights" in said(*model, *SMALL, "--published", "other.pth")
    assert "is no guide" in said(*TINY, "--published", "published.pth")


def test_mistakes_get_a_line(furnished, capsys):
    training = lambda *argv: refused(capsys, train.train, *argv, "--out", "q")
    ppap = lambda options, *more: training("--model", f"ppap:{options}", *SMALL, *more)
    assert "ppap:guide=RUN" in ppap("experts=2") and "ppap:guide=RUN" in ppap("guide=d")
    assert "8x8 and 8 classes, --data has 3x12x12 and 8" in ppap("guide=g", "--data", "shapes:size=12")
    assert "names a run of a denoiser" in ppap("guide=g,diffusion=g")
    assert "has no labels" in ppap("guide=g,diffusion=d,labels=True")
    assert "1 to 1000" in ppap("guide=g,experts=0")
    call(train.train, *TINY, "--out", "c")
    assert "train it with --unconditional" in ppap("guide=g,diffusion=c")
    assert "a label for each" in training("--model", "resnet-map-nano", *SMALL)
    assert "needs data with classes" in training(*NANO, *SMALL, "--unconditional")
    draw = lambda *more: refused(capsys, sample.sample, "d", "--n", "2", *more)
    assert "name a run of a guide" in draw("--guide", "d")
    assert "unknown class 'moon'" in draw("--guide", "g", "--classes", "moon")
    call(train.train, *NANO, *SMALL, "--data", "shapes:size=12", "--out", "large")
    assert "looks at images of 3x12x12, this run draws 3x8x8" in draw("--guide", "large")
    call(train.train, "--model", "resnet-nano:noisy=True,widths=(8,16),blocks=(1,1)", *SMALL, "--process", "linear",
         "--out", "other")
    assert "noise of another process" in draw("--guide", "other")
    measuring = lambda run: refused(capsys, evaluate.evaluate, "guides", run, "--device", "cpu")
    assert "is no guide" in measuring("d") and "none of these guides was trained on noise" in measuring("g")
