"""Metrics: what must hold whatever the numbers, mutants of metrics.py that the recorded cases must catch, the judge,
and, where they are installed, the published tools."""

import dataclasses
import importlib.util
import math
import time
import zipfile
from pathlib import Path

import golden
import golden_metrics
import numpy as np
import pytest
import torch
from pytest import approx

import data
import metrics

HERE = Path(__file__).parent


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------- mutants

INCEPTION, BASIC, LATTICE = "inception-fid-cifar", "metrics-basic", "metrics-lattice"
SINGULAR = "metrics-rank-deficient"

# (recorded case, words of metrics.py, what a slip of the pen makes of them): the case must notice each.
MUTANTS = [
    (INCEPTION, "count_include_pad=False", "count_include_pad=True"),
    (INCEPTION, "BlockE(2048, max_pool)", "BlockE(2048, average_pool)"),
    (INCEPTION, "channels, eps=1e-3", "channels, eps=1e-5"),
    (INCEPTION, 'if self.camp == "tf":', 'if self.camp != "tf":'),
    (INCEPTION, "x.permute(0, 2, 3, 1).flatten(1)", "x.flatten(1)"),
    (BASIC, "self.scatter / (self.n - 1)", "self.scatter / self.n"),
    (SINGULAR, "(x - x.mean(0)) / (len(x) - 1) ** 0.5", "(x - x.mean(0)) / len(x) ** 0.5"),
    (BASIC, "within / (m * (m - 1))", "within / (m * m)"),
    (BASIC, "(side[rng.choice(len(side), size, replace=False)] for side in (x, y))",
     "(side[rng.choice(len(side), size, replace=False)] for side in (y, x))"),
    (BASIC, "a.shape[1] + 1) ** 3", "a.shape[1] + 1) ** 2"),
    (SINGULAR, "[*range(0, n, chunk), n]", "[*range(0, n, chunk)]"),
    (BASIC, "i * n // splits", "i * (n // splits) + i"),
    (BASIC, "(cosines - 1) / sigma**2", "(cosines - 1) / (2 * sigma**2)"),
    (LATTICE, "squared - rounding if inclusive", "squared - rounding if not inclusive"),
    (LATTICE, "nearest[:, ks]", "nearest[:, [k - 1 for k in ks]]"),
    (BASIC, "precise[i, columns] |= in_real.any(0)", "precise[i, columns] |= in_fake.any(0)"),
    (BASIC, "covered[i, rows] |= in_real.any(1)", "covered[i, rows] |= in_fake.any(1)"),
    (BASIC, "contained[i].item() / (k * len(y))", "contained[i].item() / (k * len(x) + 1)"),
    (BASIC, "-10 * (a - b).square().mean((1, 2, 3)).log10()", "-10 * (a - b).square().mean().log10().expand(len(a))"),
    (BASIC, "sample = 1.0 if", "sample = 1.01 if"),
    (BASIC, "taps**2 / (taps**2 - 1)", "1.0"),
    (BASIC, "-at.square() / (2 * 1.5**2)", "-at.square() / 1.5**2"),
    ("lpips-alex", "-0.088", "0.088"),
    ("lpips-alex", "nn.MaxPool2d(3 if", "nn.MaxPool2d(2 if"),
    ("lpips-vgg", "vector_norm(x, dim=1, keepdim=True)", "vector_norm(x, dim=1, keepdim=True) ** 2"),
]
MORE_MUTANTS = [
    (INCEPTION, "(resize_tf1(images.float(), 299) - 128) / 128", "resize_tf1(images.float(), 299) / 127.5 - 1"),
    (INCEPTION, "at = torch.arange(size, dtype=torch.float32, device=x.device) * (side / size)",
     "at = ((torch.arange(size, device=x.device) + 0.5) * (side / size) - 0.5).clamp(min=0)"),
    (INCEPTION, "F.conv2d(x, self.Mixed_6d.branch1x1.conv.weight[:7])", "self.Mixed_6d.branch1x1(x)[:, :7]"),
    (INCEPTION, "self.fc.bias if bias else 0", "0 if bias else self.fc.bias"),
    (INCEPTION, "BlockE(1280, average_pool)", "BlockE(1280, max_pool)"),
]


@pytest.mark.parametrize("case, right, wrong", MUTANTS + [pytest.param(*row, marks=pytest.mark.slow)
                                                          for row in MORE_MUTANTS])
def test_a_wrong_line_breaks_a_recorded_case(case, right, wrong, tmp_path, monkeypatch):
    source = (HERE.parent / "metrics.py").read_text()
    assert source.count(right) == 1, "metrics.py has changed: this mutant needs other words"
    (tmp_path / "mutant.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mutant", tmp_path / "mutant.py")
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(golden_metrics, "metrics", mutant)
    recorded = golden.load(HERE / "golden" / f"{case}.npz")
    with pytest.raises(AssertionError):
        golden_metrics.CHECKS[recorded.arch](recorded)


@pytest.mark.gpu
@pytest.mark.parametrize("camp, prefix", [("tf", "tf_"), ("pytorch-fid", "ptfid_")])
def test_inception_on_a_gpu_gives_the_recorded_features(camp, prefix):
    case = golden.load(HERE / "golden" / "inception-fid-cifar.npz")
    network = metrics.fill_weights(metrics.Inception(camp), case.state_dict, "the case")
    network = network.to("cuda", memory_format=torch.channels_last)
    found = network(case.inputs["images"].to("cuda", torch.uint8), ["64", "192", "768", "2048"])
    for level, features in found.items():
        assert (features.cpu() - case.outputs[prefix + level]).abs().max() < 1e-3, level


# ------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("n, width", [(30, 50), (200, 12)])                        # singular, and not
def test_frechet_distance_of_a_scaled_and_shifted_set_is_known_exactly(n, width):
    """For y = s x + v and x of mean 0 it is (1 - s)^2 tr C + |v|^2."""
    x, v, s = normal(n, width), normal(width, seed=1), 1.7
    x = x - x.mean(0)
    y, trace = s * x + v, x.var(0).sum()
    exact = ((1 - s) ** 2 * trace + v.square().sum()).item()
    stats = metrics.statistics(x), metrics.statistics(y)
    assert metrics.frechet_distance(x, y) == approx(exact, rel=1e-12)
    assert metrics.frechet_distance(y, x) == approx(exact, rel=1e-12)
    assert metrics.frechet_distance(*stats) == approx(exact, rel=1e-6)
    assert metrics.frechet_distance(x, (stats[1].mu, stats[1].sigma)) == approx(exact, rel=1e-6)
    assert abs(metrics.frechet_distance(x, x)) < 1e-9 * trace
    turn = torch.linalg.qr(normal(width, width, seed=2)).Q
    assert metrics.frechet_distance(x @ turn, y.flip(0) @ turn) == approx(exact, rel=1e-10)


def test_statistics_do_not_depend_on_batches_order_or_ranks():
    x = normal(211, 9) + 100
    whole = metrics.statistics(x, 1000)
    assert whole.sigma.numpy() == approx(np.cov(x.numpy(), rowvar=False), rel=1e-10)
    ranks = metrics.statistics(x[100:], 13)
    first = metrics.statistics(x[:100], 64)
    ranks.merge(first.n, first.mu, first.scatter)
    for other in (metrics.statistics(x, 1), metrics.statistics(x, 7), metrics.statistics(x.flip(0), 64), ranks):
        assert other.n == 211
        assert other.mu.numpy() == approx(whole.mu.numpy(), rel=1e-12)
        assert other.sigma.numpy() == approx(whole.sigma.numpy(), rel=1e-10, abs=1e-12)


def test_a_covariance_near_singular_has_a_root():
    """Files of N < D statistics: eigenvalues that should be zero come out a little negative."""
    sigma = metrics.statistics(normal(10, 40)).sigma
    R = metrics.root(sigma)
    assert len(R) == 9 and (R.T @ R - sigma).abs().max() < 1e-12
    spread = torch.diag(torch.logspace(0, -10, 30, dtype=torch.float64))
    assert (metrics.root(spread).T @ metrics.root(spread) - spread).abs().max() < 1e-16


@pytest.mark.parametrize("n", [10, 40])
def test_features_that_are_not_finite_are_refused(n):
    x = normal(n, 20)
    x[3, 5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet_distance(x, normal(30, 20))


def test_extrapolation_removes_the_bias_of_small_sets():
    """The reference is exact here (mean 0, covariance 1), so the distance of endlessly many x is 0."""
    x, width = normal(3000, 30), 30
    truth = torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    biased, (extrapolated, line) = metrics.frechet_distance(x[:300], truth), metrics.frechet_infinity(x, truth)
    assert biased > 0.5 and abs(extrapolated) < 0.05 and len(line) == 15
    assert line[-1] == (3000, approx(metrics.frechet_distance(x, truth), rel=1e-9))


def test_kid_is_zero_on_average_between_sets_of_one_distribution():
    values = [metrics.polynomial_mmd(normal(40, 5, seed=i), normal(40, 5, seed=1000 + i)) for i in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5 and min(values) < 0
    assert metrics.polynomial_mmd(normal(40, 5), normal(40, 5, seed=1) + 1) > 10 * np.std(values)


@pytest.mark.parametrize("inclusive", [False, True])
def test_precision_and_recall_of_equal_distant_and_swapped_sets(inclusive):
    x, y = normal(60, 4), 0.7 * normal(45, 4, seed=1)
    names = "precision", "recall", "density", "coverage"
    same = metrics.prdc(x, x, 3, inclusive)
    assert [same[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert [metrics.prdc(x, y + 100, 3, inclusive)[name] for name in names] == [0, 0, 0, 0]
    here, there = metrics.prdc(x, y, 3, inclusive), metrics.prdc(y, x, 3, inclusive)
    assert (here["precision"], here["recall"]) == (there["recall"], there["precision"])
    assert here == metrics.prdc(x, y, 3, inclusive, chunk=7) == metrics.prdc(x + 1e4, y + 1e4, 3, inclusive)
    by_k = metrics.prdc_by_k(x, y, [1, 3, 8], inclusive)
    assert by_k[3] == here and by_k[1]["precision"] <= here["precision"] <= by_k[8]["precision"]


def test_a_copy_is_a_neighbour_and_a_tie_is_a_tie():
    """Real numbers whose squared distances rounding would tell apart: a copied image has a ball of radius 0."""
    x = normal(20, 6) * 3 + 7
    twice = torch.cat([x, x])
    assert metrics.neighbour_radii(twice, [1])[0].max() < 1e-9
    assert metrics.prdc(twice, x, 1, inclusive=True)["precision"] == 1
    assert metrics.prdc(twice, x, 1, inclusive=False)["precision"] == 0


@pytest.mark.parametrize("options", [{"splits": 1}, {"splits": 4, "seed": 3}, {"chunk": 25}])
def test_inception_score_of_certain_and_of_clueless_classifiers(options):
    certain = 1e3 * torch.eye(5).repeat(20, 1)
    assert 4 < metrics.inception_score(certain, **options)[0] < 5 + 1e-9           # a split may lack a class
    assert metrics.inception_score(certain, splits=1)[0] == approx(5, rel=1e-12)
    assert metrics.inception_score(torch.ones(100, 5), **options) == (approx(1), approx(0))


def test_tf1_resize_by_hand():
    """Source = output * in/out: a ramp of 2 pixels on 4 is 0, 1/2, 1, 1 of it, and the last pixel repeats."""
    ramp = torch.tensor([[0.0, 10.0]]).expand(1, 3, 2, 2)
    assert metrics.resize_tf1(ramp, 4)[0, 0, 0].tolist() == [0, 5, 10, 10]
    assert metrics.resize_tf1(ramp.mT, 4)[0, 0, :, 3].tolist() == [0, 5, 10, 10]
    image = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(metrics.resize_tf1(image.float(), 299), image.float())
    for camp, scaled in (("tf", (image.float() - 128) / 128), ("pytorch-fid", image / 255 * 2 - 1)):
        with torch.device("meta"):
            network = metrics.Inception(camp)
        assert (network.prepare(image) - scaled).abs().max() < 1e-6


def test_lpips_is_a_distance_and_its_gradient_is_finite_on_black():
    torch.manual_seed(0)
    net = metrics.LPIPS("alex")
    net.lin0.model[1].weight.abs_()
    a, b = torch.rand(2, 3, 35, 47) * 2 - 1, torch.rand(2, 3, 35, 47) * 2 - 1
    assert torch.equal(net(a, a), torch.zeros(2)) and torch.equal(net(a, b), net(b, a))
    black = torch.full((1, 3, 35, 47), -0.030).requires_grad_()
    with torch.no_grad():
        for layer in net.features:
            if hasattr(layer, "bias"):
                layer.bias.fill_(-1.0)                                            # then most features are exactly 0
    net(black, a[:1]).sum().backward()
    assert black.grad.isfinite().all()
    with pytest.raises(ValueError, match="of sides of at least 31"):
        net(a[..., :30], b[..., :30])


def test_psnr_and_ssim_of_known_pairs():
    a = torch.rand(3, 1, 20, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    assert metrics.psnr(a, a + 0.25).numpy() == approx(np.full(3, -20 * math.log10(0.25)), rel=1e-6)
    for window in ("gaussian", "uniform"):
        assert metrics.ssim(a, a, window).numpy() == approx(np.ones(3))
        assert (metrics.ssim(a, 1 - a, window) < 0.1).all()
    for bad, why in ((a * 255, "in \\[0, 1\\]"), (a.byte(), "floats"), (a[:, :, :8], "equal size")):
        with pytest.raises(ValueError, match=why):
            metrics.psnr(a if why == "equal size" else bad, bad)


def test_reconstruction_rounds_to_bytes_and_averages_over_images():
    torch.manual_seed(0)
    originals = [torch.rand(4, 3, 16, 16) * 2 - 1 for _ in range(3)]
    noisy = [x + 0.1 * torch.randn_like(x) for x in originals]
    network = metrics.Classifier(4)
    found = metrics.reconstruction(zip(originals, noisy), network.eval())
    a, b = (metrics.to_bytes(torch.cat(side)) for side in (originals, noisy))
    assert found["psnr"] == approx(metrics.psnr(a / 255, b / 255).mean().item()) and found["n"] == 12
    features = [network.measure(side, ["classifier"])["classifier"].detach() for side in (a, b)]
    assert found["rfid"] == approx(metrics.frechet_distance(*features), rel=1e-4)
    perfect = metrics.reconstruction([(x, x) for x in originals], network)
    assert perfect["psnr"] == math.inf and perfect["ssim"] == approx(1) and abs(perfect["rfid"]) < 1e-6


@pytest.mark.slow
def test_the_speed_bar_of_the_frechet_distance():
    """D = 2048 and N = 1000 in two seconds; against 50 of scipy.linalg.sqrtm."""
    x, y = normal(1000, 2048).float(), 1.1 * normal(1000, 2048, seed=1).float()
    started = time.perf_counter()
    metrics.frechet_distance(x, y)
    assert time.perf_counter() - started < 2


# ------------------------------------------------------------------------------------------------------------ the judge


def toy(colours=((250, 10, 10), (10, 10, 250)), n=40, size=8):
    """Images of plain colours with a little noise, the colour their class."""
    labels = np.arange(n) % len(colours)
    noise = np.random.default_rng(0).integers(0, 6, (n, 3, size, size))
    images = np.uint8(np.array(colours)[labels][:, :, None, None] + noise)
    return data.Dataset(torch.from_numpy(images), labels, [f"class {k}" for k in range(len(colours))])


def test_a_judge_is_found_again_by_content_and_steps_alone(tmp_path, monkeypatch):
    trained, train = [], metrics.train_judge
    monkeypatch.setattr(metrics, "train_judge", lambda *args: (trained.append(1), train(*args)))

    def times(dataset, steps=20, name="toy"):
        before = len(trained)
        network = metrics.judge(dataset, name, steps, folder=tmp_path)
        assert not network.training
        return len(trained) - before, network

    count, first = times(toy())
    assert count == 1 and first.read([toy().gather(torch.arange(40))[0]])[1].tolist() == toy().labels.tolist()
    count, again = times(toy())
    assert count == 0 and all(torch.equal(a, b) for a, b in zip(first.state_dict().values(),
                                                                again.state_dict().values()))
    # Another set of equal size, count and classes; other labels; one other pixel; other steps: each has its own judge.
    other = toy(colours=((10, 250, 10), (200, 200, 10)))
    count, judge = times(other)
    assert count == 1 and judge.read([other.gather(torch.arange(40))[0]])[1].tolist() == other.labels.tolist()
    pixel = toy()
    pixel.images[17, 0, 3, 3] += 1
    for changed in (dataclasses.replace(toy(), labels=1 - toy().labels), pixel, dataclasses.replace(toy(), flip=True)):
        assert times(changed)[0] == 1
    assert times(toy(), steps=2)[0] == 1 and times(toy())[0] == 0


def test_a_damaged_judge_is_trained_anew(tmp_path):
    network = metrics.judge(toy(), "toy", 3, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    whole = bytearray(path.read_bytes())
    whole[largest.header_offset + 2000] ^= 16                                      # one bit of a weight
    path.write_bytes(whole)
    with pytest.warns(UserWarning, match="trained anew"):
        again = metrics.judge(toy(), "toy", 3, folder=tmp_path)
    for a, b in zip(network.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)                                                   # training is a function of the data


@pytest.mark.parametrize("dataset, why", [
    (dataclasses.replace(toy(), classes=[]), "with classes"), (toy(size=4), "at least 8 pixels"),
    (data.Dataset([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2, [0, 1], ["a", "b"], budget=8), "of one size")])
def test_a_judge_refuses_what_it_cannot_learn(dataset, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        metrics.judge(dataset, "this", 1, folder=tmp_path)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("spoil, why", [
    (lambda path, state: path.write_bytes(b"nothing"), "no file of weights"),
    (lambda path, state: torch.save({**state, "fc.weight": state["fc.weight"][:9]}, path), "the first is fc.weight"),
    (lambda path, state: torch.save({k: v for k, v in state.items() if k != "fc.bias"}, path), "the first is fc.bias"),
    (lambda path, state: torch.save({**state, "AuxLogits.fc.bias": torch.zeros(1)}, path), "AuxLogits"),
])
def test_foreign_weight_files_are_refused_in_a_sentence(spoil, why, tmp_path):
    with torch.device("meta"):
        state = metrics.Inception().state_dict()
    state = {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}
    spoil(tmp_path / "w.pth", state)
    with pytest.raises(ValueError, match=why) as error:
        metrics.load_inception(tmp_path / "w.pth")
    assert "\n" not in str(error.value)
    (tmp_path / "net-0123abcd.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="its name says 0123abcd"):
        metrics.load_weights(tmp_path / "net-0123abcd.pth")
