"""PPGN: the chain against closed forms, its conditions against finite differences, inpainting, training, and the way
from train.py to pictures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import call, here, losses, refused, weights  # noqa: F401 (a fixture among them)
from torch import nn

import data
import evaluate
import ppgn
import sample
import train
from objectives import ImageNoise, StepNoise

D = 12                                               # width of the code


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def networks(side=16, classes=5):
    """A small classifier and a generator, in float64, frozen."""
    E = ppgn.small_cnn(side, 3, classes, width=4, code=D, drop=0.0)
    G = ppgn.small_generator(side, 3, D, width=4)
    return E.double().eval().requires_grad_(False), G.double().requires_grad_(False)


def silence(shape):
    return torch.zeros(shape, dtype=torch.float64)


def run(h, targets, exact=False, size=None, E=None, G=None, prior=None, noise=silence, condition=None, **options):
    if E is None:
        E, G = networks()
    condition = condition or ppgn.UnitCondition(E, "fc8", exact=exact, size=size)
    return list(ppgn.chain(h, G, prior or ppgn.joint_prior(E, size), condition, targets, noise, **options))


def codes(n, scale=1.0):
    return scale * torch.randn(n, D, dtype=torch.float64).abs()


# ---- networks -------------------------------------------------------------------------------------------------------


def test_published_sizes():
    """The released generator's 56.1 million weights and 256x256 pixels; CaffeNet's 60,965,224."""
    with torch.device("meta"):
        G, C = ppgn.Generator(), ppgn.caffenet(1000)
    assert sum(p.numel() for p in G.parameters()) == 56_097_891
    assert G(torch.empty(1, 4096, device="meta")).shape == (1, 3, 256, 256)
    assert sum(p.numel() for p in C.parameters()) == 60_965_224
    assert C(torch.empty(1, 3, 227, 227, device="meta")).shape == (1, 1000)
    widths = [layer.out_features for layer in ppgn.CodeAutoencoder().layers[::2]]
    assert widths == [4096, 2048, 1024, 500, 1024, 2048, 4096]


@pytest.mark.parametrize("side", [8, 16, 32, 64, 128, 256])
def test_small_networks_of_every_size(side):
    with torch.device("meta"):
        E, G = ppgn.small_cnn(side, 3, 5, 4, D), ppgn.small_generator(side, 3, D, 4)
    assert G(torch.empty(2, D, device="meta")).shape == (2, 3, side, side)
    h1, h = E.encode(torch.empty(2, 3, side, side, device="meta"))
    assert h1.shape[2:] == (4, 4) and h.shape == (2, D)


def test_biases_of_transposed_convolutions_stay():
    _, G = networks()
    G = ppgn.small_generator(16, 3, D, 4)
    still = {name for name, p in G.named_parameters() if not p.requires_grad}
    assert still == {f"{name}.bias" for name in G.upwards} and all(not G.get_parameter(name).any() for name in still)


# ---- conditions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, place", [("fc8", None), ("fc6", None), ("conv1", (2, 5)), ("conv2", (0, 3))])
def test_exact_gradient_of_a_unit(layer, place):
    """It equals finite differences of log softmax, through the generator and a crop; the published one keeps one
    logit."""
    E, wide = networks(16)[0], networks(32)[1]
    h, units = codes(2), torch.tensor([1, 3])
    condition = ppgn.UnitCondition(E, layer, place or (0, 0), exact=True, size=16)
    step = run(h, [units], E=E, G=wide, condition=condition, prior=ppgn.no_prior, steps=1)[0]

    def log_p(codes_):
        z = E.activations(ppgn.central(wide(codes_), 16), layer)[layer]
        z = z[:, :, place[0], place[1]] if place else z
        return z.log_softmax(1).gather(1, units[:, None])[:, 0]

    torch.testing.assert_close(step.probability, log_p(h).exp())
    for k in range(D):
        e = 1e-7 * torch.eye(D, dtype=torch.float64)[k]
        torch.testing.assert_close(step.d_condition[:, k], (log_p(h + e) - log_p(h - e)) / 2e-7, rtol=1e-4, atol=1e-7)
    truncated = run(h, [units], E=E, G=wide, prior=ppgn.no_prior, steps=1,
                    condition=ppgn.UnitCondition(E, layer, place or (0, 0), size=16))[0].d_condition
    assert not torch.allclose(truncated, step.d_condition, rtol=1e-2)


def captioner(E, side=16):
    encoding = ppgn.Encoding(E, (3, side, side), D, 5)
    return ppgn.Captioner(encoding, width=8, length=8).double().requires_grad_(False)


def test_caption_gradient():
    """Exact: finite differences of the sum of log p over the words and the end. Published: the memory held constant."""
    E, G = networks()
    C, h = captioner(E), codes(2)
    words = data.byte_tokens(["ab", "cde"], 8).long()
    log_p, valid = C.log_probabilities(G(h), words)
    assert valid.sum(1).tolist() == [3, 4], "each word after START, and the end"
    step = run(h, [words], E=E, G=G, prior=ppgn.no_prior, steps=1, condition=ppgn.CaptionCondition(C, exact=True))[0]
    mean = torch.stack([row[:n].exp().mean() for row, n in zip(log_p, (3, 4))])
    torch.testing.assert_close(step.probability, mean)
    for k in range(D):
        e = 1e-7 * torch.eye(D, dtype=torch.float64)[k]
        up, down = ((C.log_probabilities(G(h + s * e), words)[0] * valid).sum(1) for s in (1, -1))
        torch.testing.assert_close(step.d_condition[:, k], (up - down) / 2e-7, rtol=1e-4, atol=1e-7)
    published = run(h, [words], E=E, G=G, prior=ppgn.no_prior, steps=1, condition=ppgn.CaptionCondition(C))[0]
    assert not torch.allclose(published.d_condition, step.d_condition, rtol=1e-3)
    torch.testing.assert_close(published.probability, mean)


# ---- the chain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 16])
def test_step_size_is_per_sample(side):
    """mean |h' - h| is lr where nothing is clipped, in every sample; a batch is its samples."""
    E, G = networks()
    h, units = codes(3) * torch.tensor([[0.1], [1.0], [10.0]]), torch.tensor([0, 4, 2])
    options = dict(E=E, G=G, steps=3, lr=0.3, limits=(-1e9, 1e9), epsilon=(1e-2, 1.0, 0.0))
    steps = run(h, [units], **options)
    for step in steps:
        torch.testing.assert_close((step.next - step.code).abs().mean(1), torch.full((3,), 0.3, dtype=torch.float64))
    for i in range(3):
        alone = run(h[i:i + 1], [units[i:i + 1]], **options)
        torch.testing.assert_close(alone[-1].next, steps[-1].next[i:i + 1])
    clipped = run(h, [units], E=E, G=G, steps=3, lr=5.0, limits=(0.0, 2.0))
    assert all(0 <= s.next.min() and s.next.max() <= 2 for s in clipped)


def test_schedule_and_turns():
    """The first condition is held for steps + 1 iterations; published, the line of step sizes runs through; or anew."""
    targets = [torch.tensor([k]) for k in (0, 1, 2)]
    seen = []

    def condition(image, target):
        seen.append(target.item())
        return torch.ones_like(image), torch.ones(len(image), dtype=torch.float64)

    condition.size = None
    sizes = {}
    for restart in (False, True):
        seen.clear()
        steps = run(codes(1, 100.0), targets, condition=condition, steps=4, lr=1.0, lr_end=0.5, restart=restart,
                    epsilon=(0.0, 1.0, 0.0), limits=(-1e9, 1e9))
        assert seen == [0] * 5 + [1] * 4 + [2] * 4
        sizes[restart] = torch.stack([(s.next - s.code).abs().mean() for s in steps])
    line = 1 - 0.5 * torch.arange(13, dtype=torch.float64) / 4
    torch.testing.assert_close(sizes[False], line.abs())            # negative from the ninth on: the walk turns back
    torch.testing.assert_close(sizes[True], 1 - 0.5 * torch.tensor([0, 1, 2, 3, 4] + 2 * [1, 2, 3, 4]).double() / 4)


def test_condition_alone_climbs():
    """DGN-AM: with small steps p(c) rises at every step."""
    E, G = networks()
    units = torch.tensor([0, 1, 2, 3])
    steps = run(codes(4), [units], exact=True, E=E, G=G, prior=ppgn.no_prior, steps=50, lr=0.01,
                epsilon=(0.0, 1.0, 0.0))
    p = torch.stack([s.probability for s in steps])
    assert (p.diff(dim=0) > 0).all() and (p[-1] > p[0] + 0.002).all()


class Linear(nn.Module):
    """A linear map with the interface of the generator, or of the encoder."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, h):
        return (h @ self.matrix.T)[:, None, None]

    def encode(self, x):
        return x, x[:, 0, 0] @ self.matrix.T


def test_prior_alone_finds_its_fixed_point():
    """epsilon2 = epsilon3 = 0 with a contracting E(G(h)) = A h + b: h = (1 - A)^-1 b, clipped at 0."""
    A = 0.5 * torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    b = torch.rand(D, dtype=torch.float64)

    def prior(h, see):
        return see(None)[:, 0, 0] + b - h

    def condition(image, target):
        return torch.zeros_like(image), torch.ones(len(image), dtype=torch.float64)

    condition.size = None
    last = run(codes(3), [torch.zeros(3)], E=0, G=Linear(A), prior=prior, condition=condition, steps=100,
               epsilon=(0.5, 0.0, 0.0), normalize=False, limits=(-1e9, 1e9))[-1].next
    torch.testing.assert_close(last, torch.linalg.solve(torch.eye(D) - A, b).expand(3, -1))


def test_plain_chain_is_an_ornstein_uhlenbeck_process():
    """Linear G, E its pseudo-inverse behind a Gaussian's best denoiser R(h) = h / (1 + s^2), log p(y|x) = w.x: the
    stationary mean and variance in closed form."""
    n, s2, e1, e2, e3 = 4096, 0.5, 0.3, 0.1, 0.2
    G = torch.randn(2 * D, D, dtype=torch.float64)
    w = torch.randn(2 * D, dtype=torch.float64)
    E = Linear(torch.linalg.pinv(G))

    def prior(h, see):
        return E.encode(see(None))[1] / (1 + s2) - h

    def condition(image, target):
        return w.expand_as(image), torch.ones(len(image), dtype=torch.float64)

    condition.size = None
    generator = torch.Generator().manual_seed(1)
    noise = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    last = run(torch.zeros(n, D, dtype=torch.float64), [torch.zeros(n)], E=E, G=Linear(G), prior=prior,
               condition=condition, noise=noise, steps=150, epsilon=(e1, e2, e3), normalize=False,
               limits=(-1e9, 1e9))[-1].next
    pull = e1 * s2 / (1 + s2)
    mean, variance = e2 * (G.T @ w) / pull, e3**2 / (1 - (1 - pull)**2)
    assert ((last.mean(0) - mean).abs() < 5 * (variance / n)**0.5).all()
    assert ((last.var(0) / variance - 1).abs() < 5 * (2 / n)**0.5).all()


def test_a_direction_of_zero_is_no_step():
    """A classifier that is certain leaves nothing to climb: the published code divides 0 by 0."""
    E, G = networks()
    with torch.no_grad():
        E.layers["fc8"].bias[2] = 1e6
    h = codes(2)
    steps = run(h, [torch.tensor([2, 0])], E=E, G=G, prior=ppgn.no_prior, steps=2, epsilon=(0.0, 1.0, 0.0))
    torch.testing.assert_close(steps[-1].next[0], h[0], rtol=0, atol=0)
    assert steps[-1].next.isfinite().all() and not torch.equal(steps[-1].next[1], h[1])


def test_codes_start_again():
    """reset_every: a new code from the noise, and epsilon1 of its own in every sample."""
    E, G = networks()
    generator = torch.Generator().manual_seed(0)
    noise = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    steps = run(codes(2), [torch.tensor([0, 1])], E=E, G=G, noise=noise, steps=6, reset_every=3,
                epsilon=(1e-3, 1.0, 0.0), limits=(0.0, 1e9))
    assert [i for i, s in enumerate(steps) if s.next.min() < 0] == [3, 6]


def test_another_condition_network_and_no_gradients():
    """C is replaced without touching E and G, and steers the chain elsewhere; nothing is left in any weight."""
    E, G = networks()
    other = ppgn.small_cnn(16, 3, 5, 4, D, 0.0).double().eval()
    for p in [*E.parameters(), *G.parameters(), *other.parameters()]:
        p.requires_grad_(True)
    before = {k: v.clone() for k, v in G.state_dict().items()}
    h, units = codes(4), torch.tensor([0, 1, 2, 3])
    last = [run(h, [units], E=E, G=G, condition=ppgn.UnitCondition(C, "fc8"), steps=60, lr=0.1)[-1] for C in (E, other)]
    for step, C, stranger in ((last[0], E, other), (last[1], other, E)):
        p = [N(step.drawn).softmax(1).gather(1, units[:, None]).mean() for N in (C, stranger)]
        assert p[0] > p[1] + 0.02
        assert not step.next.requires_grad and not step.drawn.requires_grad
    assert all(p.grad is None for N in (E, G, other) for p in N.parameters())
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())


# ---- inpainting -----------------------------------------------------------------------------------------------------


def test_inpainting():
    """A mask of ones is sampling without one; of zeros, no class gradient; outside the hole the error falls with
    epsilon4."""
    E, G = networks()
    h, units = codes(2), torch.tensor([1, 3])
    image = G(codes(2)).detach()
    ones, zeros = torch.ones(16, 16, dtype=torch.float64), torch.zeros(16, 16, dtype=torch.float64)
    free = run(h, [units], E=E, G=G, steps=5)
    masked = run(h, [units], E=E, G=G, steps=5, epsilon4=1.0, inpainting=ppgn.Inpainting(image, ones))
    torch.testing.assert_close(masked[-1].next, free[-1].next)
    known = run(h, [units], E=E, G=G, steps=1, inpainting=ppgn.Inpainting(image, zeros))
    assert not known[0].d_condition.any() and torch.equal(known[0].image, image)
    hole = zeros.clone()
    hole[4:12, 4:12] = 1
    errors = []
    for epsilon4 in (0.0, 0.01, 1.0):
        last = run(h, [units], E=E, G=G, steps=60, lr=0.3, lr_end=1e-3, epsilon4=epsilon4,
                   inpainting=ppgn.Inpainting(image, hole))[-1]
        errors.append(((last.drawn - image) * (1 - hole)).square().mean().item())
    assert errors[0] > 1.05 * errors[1] > 1.05**2 * errors[2]


# ---- training -------------------------------------------------------------------------------------------------------


def objective(variant="joint-noiseless", side=8, **options):
    encoding = ppgn.ppgn_nano(side, 3, 5, list("abcde"), width=4, code=D).eval().requires_grad_(False)
    return encoding, ppgn.ppgn_nano(side, 3, 5, list("abcde"), encoder=encoding, variant=variant, width=4, **options)


def batch(n=8, side=8, step=0):
    x = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return {"x": x, "y": torch.arange(n) % 5, "step": step, "noise": StepNoise(0, step, n)}


@pytest.mark.parametrize("variant", ppgn.DRAWS)
def test_training_lowers_what_it_should(variant):
    """Without the adversary the image loss (R's own, where R is all there is) falls; E does not move and is not
    saved."""
    encoding, g = objective(variant, weights=(1.0, 0.0, 0.0, 0.0))
    before = {k: v.clone() for k, v in encoding.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in g.parameters() if p.requires_grad], 3e-3)
    told = []
    for step in range(60):
        losses_ = g.loss(batch(step=step))
        optimiser.zero_grad()
        losses_["loss"].backward()
        optimiser.step()
        told.append({k: v.item() for k, v in losses_.items()})
    falling = {"x": ["loss"], "h": ["image", "autoencoder"]}.get(variant, ["image"])
    for name in falling:
        assert told[-1][name] < 0.9 * told[0][name], name
    assert all(torch.equal(v, before[k]) for k, v in encoding.state_dict().items())
    assert not any("encoding" in key or "network" in key for key in g.state_dict())
    if variant != "x":
        assert g.scale == pytest.approx(encoding.network.encode(batch()["x"])[1].mean().item(), rel=1e-4)


def test_players_do_not_touch_each_other():
    """D's loss moves D alone, G's G alone; the balance rule pauses who is ahead."""
    _, g = objective()
    losses_ = g.loss(batch())
    G = [p for p in g.generator.parameters() if p.requires_grad]
    assert all(x is None for x in torch.autograd.grad(losses_["d"], G, retain_graph=True, allow_unused=True))
    made = losses_["loss"] - losses_["d"]
    grads = torch.autograd.grad(made, list(g.discriminator.parameters()), allow_unused=True, retain_graph=True)
    assert all(x is None or not x.abs().max() > 1e-6 for x in grads)
    assert any(x.any() for x in torch.autograd.grad(losses_["g"], G, allow_unused=True) if x is not None)
    for d, fooled, paused in ((0.05, 1.0, "discriminator"), (0.5, 1.0, None), (11.0, 1.0, "generator")):
        g.balance(torch.tensor(d), torch.tensor(fooled))
        for name in ("discriminator", "generator"):
            assert {p.paused for p in getattr(g, name).parameters()} == {name == paused}
    assert all(p.rate == 0.1 for p in g.discriminator.parameters())


@pytest.mark.parametrize("variant", ppgn.DRAWS)
def test_what_a_run_draws(variant):
    """Every variant that it can, and refuses the others; image i is a function of the seed and i."""
    _, g = objective(variant)
    g.code_sum.fill_(1.0), g.code_count.fill_(1.0)
    for drawn in ppgn.DRAWS:
        options = {"variant": drawn, "ppgn_steps": 3}
        draw = lambda indices: list(g.trajectory(ImageNoise(0, indices), torch.tensor(indices) % 5, **options))
        if drawn not in ppgn.DRAWS[variant]:
            with pytest.raises(ValueError, match=f"trained as {variant}"):
                draw([0])
            continue
        frames, alone = draw([0, 1, 2]), draw([1])
        assert len(frames) == 4 and frames[-1].shape == (3, 3, 8, 8) and frames[-1].abs().max() <= 1
        torch.testing.assert_close(alone[-1][0], frames[-1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options, said", [
    ({"neuron": "conv7:1"}, "there is no layer 'conv7', only conv1, fc6, drop6, fc8"), ({"neuron": "conv1:4"}, "4x4x4"),
    ({"neuron": "conv1:1:9:0"}, "4x4x4"), ({"neuron": "conv1"}, "write LAYER"), ({"neuron": "fc6:-1"}, "write LAYER"),
    ({"neuron": "fc6:1:0:0"}, "write LAYER:UNIT"), ({"then": "a,z"}, "no class 'z': name one of a, b, c"),
    ({"then": "9"}, "no class '9'"), ({"ppgn_steps": 0}, "ppgn_steps"), ({"epsilon": (1.0,)}, "epsilon")])
def test_wrong_drawing_options(options, said):
    _, g = objective()
    with pytest.raises(ValueError, match=said):
        list(g.trajectory(ImageNoise(0, [0]), torch.tensor([0]), **options))


def test_samples_below_the_threshold_are_not_shown():
    _, g = objective()
    draw = lambda threshold: list(g.trajectory(ImageNoise(0, [0, 1]), torch.tensor([0, 1]), ppgn_steps=5, exact=True,
                                               threshold=threshold))
    assert not any(frame.any() for frame in draw(0.999))
    assert all(torch.equal(a, b) for a, b in zip(draw(0.0), draw(1e-6)))


def test_chain_of_classes_and_of_a_neuron():
    _, g = objective()
    frames = list(g.trajectory(ImageNoise(0, [0]), torch.tensor([0]), ppgn_steps=3, then="b, 4"))
    assert len(frames) == 3 * 3 + 1
    for neuron in ("fc6:3", "conv1:2", "conv1:2:0:3"):
        assert len(list(g.trajectory(ImageNoise(0, [0]), torch.tensor([0]), ppgn_steps=3, neuron=neuron))) == 4


# ---- from train.py to pictures --------------------------------------------------------------------------------------


def test_two_runs(here, capsys):  # noqa: F811
    """An encoder, then its generator: exact resume, a film of two classes, the table of columns; a captioner steers."""
    house = ["--data", "shapes:size=8", "--batch", "8", "--steps", "6", "--log-every", "1", "--sample-n", "8",
             "--sample-every", "0", "--device", "cpu", "--draw", "ppgn_steps=2"]
    call(train.train, *house, "--model", "ppgn-nano:width=4,code=12", "--out", "e")
    model = "ppgn-nano:encoder=e,width=4,variant=h"
    call(train.train, *house, "--model", model, "--out", "whole")
    call(train.train, *house, "--model", model, "--out", "parts", "--save-every", "2")
    os.replace("parts/ckpt.prev.pt", "parts/ckpt.pt")
    call(train.train, *house, "--model", model, "--out", "parts")
    assert weights("parts") == weights("whole") and losses("parts") == losses("whole")
    call(sample.sample, "whole", "--classes", "star", "--then", "ring", "--n", "2", "--film", "f.gif", "--out", "a.png")
    assert Path("f.gif").exists()
    call(evaluate.evaluate, "chains", "whole", "--judge", "e", "--n", "2", "--train", "50", "--device", "cpu")
    assert capsys.readouterr().out.count("run h") == 3
    call(train.train, *house[:-2], "--model", "resnet-nano:widths=(4,8),blocks=(1,1)", "--out", "judge")
    call(evaluate.evaluate, "chains", "whole", "--judge", "judge", "--n", "2", "--train", "50", "--device", "cpu")
    assert capsys.readouterr().out.count("run h") == 3
    assert "no run of a classifier" in refused(capsys, evaluate.evaluate, "chains", "whole", "--judge", "whole")
    call(train.train, *house, "--model", "captioner-nano:encoder=e,width=8", "--out", "c")
    call(sample.sample, "c", "--prompt", "a red star", "--n", "2", "--out", "b.png")
    call(train.train, *house, "--model", "ppgn-nano:encoder=e,condition=c,width=4", "--out", "g")
    call(sample.sample, "g", "--caption", "a red star", "--n", "2", "--out", "c.png")
    picture = torch.randint(256, (8, 8, 3), dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save("known.png")
    for name, side in (("hole", 8), ("other", 9)):
        mask = torch.zeros(side, side, dtype=torch.uint8)
        mask[2:6, 2:6] = 255
        Image.fromarray(mask.numpy()).save(f"{name}.png")
    call(sample.sample, "whole", "--inpaint", "known.png", "--mask", "hole.png", "--n", "2", "--out", "filled.npz")
    filled = torch.from_numpy(np.load("filled.npz")["arr_0"])
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[2:6, 2:6] = False
    assert (filled[:, outside].int() - picture[outside].int()).abs().max() <= 1
    assert (filled[0] != picture).any()
    assert "9 pixels" in refused(capsys, sample.sample, "whole", "--inpaint", "known.png", "--mask", "other.png")
    assert "there is no layer" in refused(capsys, sample.sample, "whole", "--neuron", "conv9:1", "--out", "d.png")
    assert "must name the first of the two runs" in refused(capsys, train.train, *house, "--out", "x", "--model",
                                                            "ppgn-nano:encoder=whole")
