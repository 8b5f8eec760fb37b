"""The Diffusion Classifier: bookkeeping of stages, pairing, closed forms on Gaussians, and the commands."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import TINY, call, here, refused  # noqa: F401 (a fixture among them)

import build
import data
import diffusion
import diffusion_classifier as dc
import evaluate
import guides
import train

# --------------------------------------------------------------------------------------------------------------- stages


def test_stages_by_hand():
    """The sheet's example: 50 spread times, then the other 450; uneven strides are cut."""
    first, second = dc.stages([50, 500])
    assert first[:3] == [11, 31, 51] and len(first) == 50 and len(second) == 450
    assert sorted(first + second) == list(range(1, 1000, 2))
    assert dc.stages([3]) == [[166, 499, 832]] and dc.stages([2, 5]) == [[300, 700], [100, 500, 900]]
    with pytest.raises(ValueError, match="choose from 1 to 1000"):
        dc.stages([1001])


def lookup(table):
    return lambda some, times, slots: table[some[:, None], slots]


def test_one_stage_is_brute_force_and_keeping_all_prunes_nothing():
    table = torch.rand(12, 40, generator=torch.Generator().manual_seed(0))
    best = int(table.mean(1).argmin())
    assert dc.prune(lookup(table), 12, [40], [1]).winner == best
    whole = dc.prune(lookup(table), 12, [10, 40], [12, 1])
    assert whole.winner == best and whole.evaluations == 12 * 40 and not whole.errors.isnan().any()
    pruned = dc.prune(lookup(table), 12, [10, 40], [3, 1])
    three = table[:, :10].mean(1).topk(3, largest=False).indices.tolist()
    assert pruned.survivors[1] == three and pruned.evaluations == 12 * 10 + 3 * 30
    assert pruned.winner == min(three, key=lambda k: table[k].mean())
    twice = dc.prune(lookup(table), 12, [5, 20], [4, 1], trials=2)
    assert twice.times[:4].tolist() == [125, 125, 325, 325] and twice.evaluations == 12 * 10 + 4 * 30
    for keep, said in (([3, 2], "end in 1"), ([1], "one a stage"), ([2, 3], "must fall")):
        with pytest.raises(ValueError, match=said):
            dc.prune(lookup(table), 12, [10, 40], keep)


# ---------------------------------------------------------------------------------------- Gaussian classes, closed form

MEANS = torch.tensor([[0.5, 0.0, 0.0, 0.2], [-0.3, 0.1, 0.0, 0.0], [0.0, 0.4, -0.2, 0.1]], dtype=torch.float64)
MEANS = MEANS[:, :, None, None]
CASES = [("linear", {}), ("cosine", {"prediction": "v"}), ("flow", {}), ("edm", {}), ("flow", {"prediction": "x0"})]


def gaussian_denoiser(process, seen=None):
    """Class c is N(MEANS[c], I): the denoiser under c is exact."""
    def denoiser(y):
        def denoise(xt, t):
            if seen is not None:
                seen.append((xt, t, y))
            alpha, sigma = (v.view(-1, 1, 1, 1) for v in process.path(t))
            eps = sigma * (xt - alpha * MEANS[y]) / (alpha**2 + sigma**2)
            return diffusion.Denoised((xt - sigma * eps) / alpha, eps)
        return denoise
    return denoiser


def slots(process, S, seed=0):
    t = dc.slot_times(process, torch.tensor(dc.stages([S])[0]).double())
    generator = torch.Generator().manual_seed(seed)
    return t.double(), torch.randn(S, *MEANS.shape[1:], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name, options", CASES)
def test_gaussian_classes(name, options):
    """The class of the nearest mean wins, and the difference of two classes' errors has the expectation
    alpha^2 sigma^2/(alpha^2 + sigma^2)^2 (|x - m_a|^2 - |x - m_b|^2)/D."""
    process = diffusion.create_process(name, **options)
    (t, eps), generator, right = slots(process, 400), torch.Generator().manual_seed(1), 0
    alpha, sigma = process.path(t)
    weight = (alpha * sigma / (alpha**2 + sigma**2)) ** 2
    for _ in range(20):
        x = torch.randn(1, *MEANS.shape[1:], generator=generator, dtype=torch.float64)
        found = dc.errors(process, gaussian_denoiser(process), x, torch.arange(3), t, eps, "l2", "eps").double()
        distance = (x - MEANS).square().flatten(1).sum(1)
        expected = weight.mean() * (distance[0] - distance[1]) / 4
        difference, error = dc.paired_difference(found[0], found[1])
        assert abs(difference - expected) < 5 * error + 1e-9
        right += int(found.mean(1).argmin() == distance.argmin())
    assert right >= 16


@pytest.mark.parametrize("name, options", CASES)
def test_measures_differ_by_a_factor_of_the_time(name, options):
    """"own" is the training loss: what the process itself makes of the same x_t; the others rank classes alike at
    each t."""
    process = diffusion.create_process(name, weighting="flow" if options.get("prediction") == "x0" else None, **options)
    (t, eps), x = slots(process, 20), torch.randn(1, *MEANS.shape[1:], dtype=torch.float64)
    denoiser = gaussian_denoiser(process)
    by = {m: dc.errors(process, denoiser, x, torch.arange(3), t, eps, "l2", m).double() for m in dc.MEASURES}
    for m in ("eps", "x0", "relative"):
        ratio = by[m] / by["own"]
        torch.testing.assert_close(ratio, ratio[:1].expand(3, -1), rtol=1e-4, atol=0)
    assert torch.allclose(by["relative"].mean(0), torch.ones(20).double(), atol=1e-5)
    d = denoiser(torch.zeros(20, dtype=torch.long))(process.noised(x.expand_as(eps), eps, t), t)
    mse = (process.target(x.expand_as(eps), eps, t) - process.target(d.x0, d.eps, t)).square().flatten(1).mean(1)
    torch.testing.assert_close(by["own"][0], (mse * process.weight(t)).to(by["own"]), rtol=1e-4, atol=1e-7)


def test_pairing():
    """Every class sees the same x_t, made once a slot; permuted classes permute the errors, exactly; a number added to
    every class's error of a slot changes no decision; batches change nothing; two trials are two slots."""
    process = diffusion.create_process("linear")
    (t, eps), x = slots(process, 30), torch.randn(1, *MEANS.shape[1:], dtype=torch.float64)
    seen = []
    errors = functools.partial(dc.errors, process, x0=x, t=t, eps=eps, measure="own")
    found = errors(gaussian_denoiser(process, seen), conditions=torch.arange(3), batch=30)
    assert all(torch.equal(xt, seen[0][0]) for xt, _, _ in seen) and len(seen) == 3
    order = torch.tensor([2, 0, 1])
    assert torch.equal(errors(gaussian_denoiser(process), conditions=order, batch=30), found[order])
    for batch in (1, 7, 256):
        again = errors(gaussian_denoiser(process), conditions=torch.arange(3), batch=batch)
        torch.testing.assert_close(again, found, rtol=1e-6, atol=0)
    more = found + torch.rand(30, generator=torch.Generator().manual_seed(2))
    assert [dc.prune(lookup(e), 3, [5, 30], [2, 1]).winner for e in (found, more)] == \
        [dc.prune(lookup(found), 3, [5, 30], [2, 1]).winner] * 2


def test_paired_noise_is_less_noisy():
    """The standard error of the paired difference is below that with times and noises of their own for each class."""
    process = diffusion.create_process("linear")
    x = torch.randn(1, *MEANS.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u = torch.rand(2, 300, generator=torch.Generator().manual_seed(4))
    one, other = ((guides.times_between(process, 0, 1000, u[k]).double(), slots(process, 300, k)[1]) for k in (0, 1))
    on = lambda k, slots: dc.errors(process, gaussian_denoiser(process), x, torch.tensor([k]), *slots, measure="own")[0]
    _, paired = dc.paired_difference(on(0, one), on(1, one))
    _, unpaired = dc.paired_difference(on(0, one), on(1, other))
    assert paired < 0.8 * unpaired


@pytest.mark.parametrize("name, options", CASES)
def test_half_precision_finds_the_same_class(name, options):
    """A bfloat16 answer of the network moves errors by a percent, far less than the classes' difference here."""
    process = diffusion.create_process(name, **options)
    exact = gaussian_denoiser(process)

    def rounded(y):
        def denoise(xt, t):
            d = exact(y)(xt, t)
            return diffusion.Denoised(d.x0.bfloat16().double(), d.eps.bfloat16().double())
        return denoise

    (t, eps), generator, sure = slots(process, 100), torch.Generator().manual_seed(5), 0
    for _ in range(20):
        x = torch.randn(1, *MEANS.shape[1:], generator=generator, dtype=torch.float64)
        a, b = (dc.errors(process, d, x, torch.arange(3), t, eps, "l2", "eps") for d in (exact, rounded))
        best, second = a.mean(1).argsort()[:2]
        difference, error = dc.paired_difference(a[best], a[second])
        if abs(difference) > 2 * error:
            sure += 1
            assert b.mean(1).argmin() == best
    assert sure >= 10


def test_who_knows_nothing_is_at_chance():
    """An untrained network ignores the class: equal errors, whatever the image. One taught shuffled classes is as
    often right as chance says."""
    process = diffusion.create_process("flow")
    net = build.models.create_model("dit-nano", image_size=4, in_channels=1, num_classes=3, depth=2, hidden_size=16,
                                    num_heads=2, patch_size=2).eval()
    t, eps = dc.slot_times(process, torch.tensor(dc.stages([6])[0])), torch.randn(6, 1, 4, 4)
    found = dc.errors(process, lambda y: process.denoiser(net, y), torch.randn(1, 1, 4, 4), torch.arange(3), t, eps)
    assert torch.equal(found, found[:1].expand(3, -1))
    (t, eps), generator, right = slots(diffusion.create_process("linear"), 60), torch.Generator().manual_seed(6), 0
    process = diffusion.create_process("linear")
    for i in range(150):
        x = 3 * MEANS[i % 3][None] + 0.3 * torch.randn(1, *MEANS.shape[1:], generator=generator, dtype=torch.float64)
        taught = torch.randperm(3, generator=generator)            # anew for each image
        conditions = torch.arange(3)[taught]
        found = dc.errors(process, gaussian_denoiser(process), x, conditions, t, eps, "l2", "eps").mean(1)
        right += int(found.argmin() == i % 3)
    assert abs(right / 150 - 1 / 3) < 4 * (2 / 9 / 150) ** 0.5


def test_posterior_needs_the_sum():
    mean = torch.tensor([0.10, 0.11, math.nan])
    p = dc.posterior(mean, 768)
    torch.testing.assert_close(p[0] / p[1], torch.tensor(math.exp(0.01 * 768), dtype=torch.float64), rtol=1e-5, atol=0)
    assert p[2] == 0 and p.sum() == 1


@pytest.mark.parametrize("kind, strengths", [("noise", (0.1, 0.5)), ("blur", (0.5, 2.0)), ("occlusion", (0.25, 0.75))])
def test_corruptions(kind, strengths):
    """They damage more with strength, are a function of the seed, and leave what they should."""
    x = torch.rand(3, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    make = lambda strength, seed=0: dc.corrupted(x, kind, strength, torch.Generator().manual_seed(seed))
    weak, strong = ((make(s) - x).square().mean() for s in strengths)
    assert 0 < weak < strong and make(strengths[1]).abs().max() <= 1
    assert torch.equal(make(strengths[0]), make(strengths[0]))
    if kind == "blur":
        flat = torch.full((1, 3, 8, 8), 0.3)
        torch.testing.assert_close(dc.corrupted(flat, kind, 1.0, None), flat)
    if kind == "occlusion":
        assert (make(0.5) != x).sum() == 3 * 3 * 8 * 6


def test_swapped_pairs():
    captions = ["a red star", "a blue star", "a red ring", "a green star", "a red star", "a blue ring"]
    assert dc.swapped_pairs(captions, ["red", "blue", "green"], 9) == [(0, 1), (3, 4), (2, 5)]
    assert dc.swapped_pairs(captions, ["star", "ring"], 1) == [(0, 2)]


# ------------------------------------------------------------------------------------------------------------- commands

FEW = ["--n", "4", "--keep", "3,1", "--samples", "4,8", "--device", "cpu"]


def test_classify_resumes_and_prunes(here, capsys, monkeypatch):  # noqa: F811
    """A table a setting; what was interrupted goes on and ends in the same table; pictures and sums."""
    call(train.train, *TINY, "--out", "r")
    call(evaluate.evaluate, "classify", "r", *FEW, "--full")
    said = capsys.readouterr().out
    assert "accuracy" in said and "pruning finds the same class" in said and "by so many times" in said
    (table,) = sorted(build.Path("r").glob("classify-*.jsonl"))
    settings, *rows = map(json.loads, table.read_text().splitlines())
    assert settings["samples"] == [4, 8] and [row["image"] for row in rows] == [0, 1, 2, 3]
    assert all(row["evaluations"] == 8 * 8 and row["pruned_evaluations"] == 8 * 4 + 3 * 4 for row in rows)
    assert table.with_suffix(".png").exists()
    forget = lambda row: {k: v for k, v in row.items() if k != "seconds"}
    table.write_text("\n".join(table.read_text().splitlines()[:3]) + '\n{"image": 2, "la')
    call(evaluate.evaluate, "classify", "r", *FEW, "--full")
    assert "holds 2 images already" in capsys.readouterr().out
    again = [json.loads(line) for line in table.read_text().splitlines()[1:]]
    assert list(map(forget, again)) == list(map(forget, rows))
    for more in (["--loss", "l1"], ["--unpaired", "--measure", "own"], ["--corrupt", "blur:1"], ["--times", "200,800"],
                 ["--precision", "bf16"], ["--measure", "eps"], ["--trials", "2"]):
        call(evaluate.evaluate, "classify", "r", *FEW, *more)
    assert len(list(build.Path("r").glob("classify-*.jsonl"))) == 8


def test_bounds_of_a_chain():
    """KL of steps with noise, the negative log-likelihood at t = 0, as training's bound has them; of a chain alone."""
    process = diffusion.create_process("linear", learned_variance=True)
    generator = torch.Generator().manual_seed(0)
    x0, eps, v, out = (torch.rand(4, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(4))
    t = torch.tensor([0.0, 1.0, 400.0, 999.0], dtype=torch.float64)
    xt = process.noised(x0, eps, t)
    for learned in (v, None):
        d = diffusion.Denoised(out, eps, learned)
        kl, nll = dc.bound_terms(process, d, x0, xt, t)
        term = process.variational_term(out, learned, x0, xt, t)
        torch.testing.assert_close(torch.cat([nll[:1], kl[1:]]), term)
        both = dc.error_of(process, diffusion.Denoised(out, eps + 1, learned), x0, eps, xt, t, "l2+vlb", "eps")
        torch.testing.assert_close(both, kl + 1)
    with pytest.raises(ValueError, match="those of a discrete chain"):
        dc.bound_terms(diffusion.create_process("flow"), d, x0, xt, t)


def test_captions(here, capsys):  # noqa: F811
    """A run with text: the image's caption with each class in it, templates, and pairs one word apart."""
    argv = [*TINY[2:], "--model", "dimba-nano:depth=2,hidden_size=16,num_heads=2,text_width=16,mamba_ratio=0.5"]
    call(train.train, *argv, "--out", "t")
    call(evaluate.evaluate, "classify", "t", *FEW)
    call(evaluate.evaluate, "classify", "t", *FEW, "--prompt", "a red {}", "--prompt", "a {} on black")
    capsys.readouterr()
    call(evaluate.evaluate, "swaps", "t", "--n", "2", "--samples", "4", "--device", "cpu")
    assert "colour" in (said := capsys.readouterr().out) and "shape" in said
    run = build.open_run("t")
    candidates = dc.Candidates(run, None, ["a small red star on dark blue"], torch.tensor([3]))
    (sentences,) = candidates.sentences(0)
    assert sentences[4] == "a small red ring on dark blue" and len(sentences) == len(data.SHAPES)
    assert len(dc.Candidates(run, ["a {}", "the {}"], None, None).conditions(0, "cpu")) == 16


def test_images_of_ones_own(here, capsys):  # noqa: F811
    call(train.train, *TINY, "--out", "r")
    shapes = data.load("shapes", split="test", size=8)
    for i in range(3):
        folder = build.Path("mine") / shapes.classes[shapes.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes.images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    call(evaluate.evaluate, "classify", "r", *FEW, "--images", "mine")
    assert "on 3 images" in capsys.readouterr().out
    np.savez("latents.npz", arr_0=shapes.gather([0, 1])[0].numpy())
    call(evaluate.evaluate, "classify", "r", *FEW, "--images", "latents.npz")
    assert "no labels" in capsys.readouterr().out
    call(train.train, "--model", "resnet-nano:widths=(8,16),blocks=(1,1)", *TINY[2:-4], "--device", "cpu", "--draw",
         "steps=2", "--out", "g")
    capsys.readouterr()
    call(evaluate.evaluate, "classify", "r", *FEW, "--beside", "g", "--corrupt", "noise:0.5")
    assert "beside it g: accuracy" in capsys.readouterr().out


def test_mistakes_get_a_line(here, capsys):  # noqa: F811
    call(train.train, *TINY, "--unconditional", "--out", "free")
    call(train.train, *TINY, "--out", "r")
    said = lambda *argv: refused(capsys, evaluate.evaluate, "classify", *argv, "--device", "cpu")
    assert "nothing to choose from" in said("free")
    assert "must fall, and end in 1" in said("r", "--keep", "5,2") and "one a stage" in said("r", "--keep", "1")
    assert "choose from 1 to 1000" in said("r", "--samples", "50,5000")
    build.Path("large").mkdir()
    Image.new("RGB", (20, 10)).save("large/a.png")
    assert "is 20x10, this run knows images of 8x8" in said("r", "--images", "large")
    assert "no such folder" in said("r", "--images", "nowhere")
    assert "share no times" in said("r", "--unpaired")
    assert "reads no text" in said("r", "--prompt", "a {}")
    assert "name the folder of a run" in said()
    assert "noise:STD" in said("r", "--corrupt", "fog:1")
    assert "a guide" in said("r", *FEW[:-2], "--beside", "r")
