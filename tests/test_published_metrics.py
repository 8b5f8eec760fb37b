"""The published tools on the same images with the same random weights. They are no dependency: where one is not
installed, its test is skipped.  python -m pytest tests/test_published_metrics.py -m slow -s"""

import argparse
import contextlib
import io
import time
from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch
from PIL import Image
from published import peer

import data
import distance
import metrics

ROOT = Path(__file__).parent.parent
N = 500


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """(generated, real, weights): two folders of 500 PNGs, CIFAR-10's test and training images where they lie in data/,
    else shapes; and the recorded case's random weights."""
    home = tmp_path_factory.mktemp("images")
    try:
        load = {split: data.load("cifar10", ROOT / "data", split, download=False, flip=False)
                for split in ("test", "train")}
    except FileNotFoundError:
        load = {split: data.load("shapes", split=split, size=32) for split in ("test", "train")}
    for split, dataset in load.items():
        (home / split).mkdir()
        for i in range(N):
            Image.fromarray(dataset.images[i].permute(1, 2, 0).numpy()).save(home / split / f"{i:04d}.png")
    torch.save(golden.load(ROOT / "tests" / "golden" / "inception-fid-cifar.npz").state_dict, home / "weights.pth")
    return home / "test", home / "train", home / "weights.pth"


@pytest.fixture(scope="module")
def ours(sides, tmp_path_factory):
    """Our figures by either convention, and our features."""
    generated, real, weights = map(str, sides)
    found = {}
    for camp, names in (("tf", "fid,is,kid,prdc"), ("pytorch-fid", "fid")):
        parser = argparse.ArgumentParser()
        distance.distance_flags(parser)
        work = str(tmp_path_factory.mktemp(camp))
        args = parser.parse_args([generated, real, "--inception", weights, "--camp", camp, "--metrics", names,
                                  "--work", work, "--keep"])
        args.device, args.draw = torch.device("cpu"), {}
        found[camp] = distance.distance(args)
        for what, n in ((generated, 0), (real, 1)):
            side = distance.side_of(what, args)
            folder = next(Path(work).glob(f"{side.key}-*"))
            found[camp, n] = np.concatenate([np.load(file) for file in sorted(folder.glob("*.2048.npy"))])
    return found


def agree(name, mine, theirs, bound):
    error = abs(mine - theirs) / max(abs(theirs), 1e-12)
    print(f"\n{name:40}{mine:18.9g}{theirs:18.9g}   relative difference {error:.1e}", end="")
    assert error <= bound, f"{name}: {mine} here, {theirs} there"


@pytest.mark.slow
def test_pytorch_fid(sides, ours, monkeypatch, tmp_path):
    peer("scipy")
    tool, network = peer("pytorch_fid.fid_score"), peer("pytorch_fid.inception")
    monkeypatch.setattr(network, "load_state_dict_from_url",
                        lambda *args, **options: torch.load(sides[2], weights_only=True))
    with torch.no_grad():
        theirs = tool.calculate_fid_given_paths([str(sides[0]), str(sides[1])], 50, "cpu", 2048, num_workers=0)
    # Of singular products, which fewer than 2048 images give, SciPy's square root knows four digits.
    agree("FID, pytorch-fid", ours["pytorch-fid"]["fid"], theirs, 1e-3)
    generated, real = (ours["pytorch-fid", n].astype(np.float64) for n in (0, 1))
    mu, sigma = generated.mean(0), np.cov(generated, rowvar=False)
    value = tool.calculate_frechet_distance(mu, sigma, real.mean(0), np.cov(real, rowvar=False))
    agree("its formula on our features", value, theirs, 1e-6)

    pictures = [np.zeros((1, 8, 8, 3), np.uint8)]
    side = distance.Side("real", N, features={"2048": torch.from_numpy(real), "images": pictures})
    distance.write_statistics(tmp_path / "stats.npz", side, "2048", SimpleNamespace(key="ours"))
    read = tool.compute_statistics_of_path(str(tmp_path / "stats.npz"), None, 50, 2048, "cpu")
    agree("our statistics file, read by it", metrics.frechet_distance((mu, sigma), tuple(read)),
          ours["pytorch-fid"]["fid"], 1e-9)


@pytest.mark.slow
def test_torch_fidelity(sides, ours):
    tool = peer("torch_fidelity")
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = tool.calculate_metrics(
            input1=str(sides[0]), input2=str(sides[1]), isc=True, fid=True, kid=True, kid_subset_size=N, kid_subsets=2,
            feature_extractor_weights_path=str(sides[2]), cuda=False, cache=False, verbose=False)
    mine = ours["tf"]
    agree("FID, torch-fidelity", mine["fid"], theirs["frechet_inception_distance"], 1e-4)
    agree("IS", mine["is"], theirs["inception_score_mean"], 1e-5)
    agree("IS, std", mine["is_std"], theirs["inception_score_std"], 1e-3)
    agree("KID, all images", mine["kid"], theirs["kernel_inception_distance_mean"], 1e-4)
    generated, real = (torch.from_numpy(ours["tf", n]) for n in (0, 1))
    theirs = peer("torch_fidelity.metric_prc").prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False)
    inclusive = metrics.prdc(real, generated, 3, inclusive=True)
    agree("precision, k = 3, <=", inclusive["precision"], theirs["precision"], 1.01 / N)       # in float32 there
    agree("recall, k = 3, <=", inclusive["recall"], theirs["recall"], 1.01 / N)
    theirs = peer("torch_fidelity.metric_kid").kid_features_to_metric(
        real.double(), generated.double(), kid_subsets=20, kid_subset_size=100, verbose=False)
    mean, std = metrics.kid(real, generated, 20, 100)
    agree("KID, 20 subsets of 100", mean, theirs["kernel_inception_distance_mean"], 1e-9)
    agree("KID, their std", std, theirs["kernel_inception_distance_std"], 1e-9)


@pytest.mark.slow
def test_prdc(ours):
    tool = peer("prdc")
    for k in (3, 5):
        mine = metrics.prdc(torch.from_numpy(ours["tf", 1]), torch.from_numpy(ours["tf", 0]), k)
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = tool.compute_prdc(ours["tf", 1].astype(np.float64), ours["tf", 0].astype(np.float64), nearest_k=k)
        for name, value in mine.items():
            agree(f"{name}, k = {k}, prdc", value, float(theirs[name]), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1000, 5000])
def test_scipy_sqrtm(n):
    """Seconds and error of a Frechet distance at D = 2048 whose value is known: y = 1.3 x + v. From features, from
    statistics, and by scipy.linalg.sqrtm, as pytorch-fid, ADM and EDM compute it."""
    linalg = peer("scipy.linalg")
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(2048, 2048, generator=rng, dtype=torch.float64) * torch.logspace(0, -2, 2048).double()
    x = (torch.randn(n, 2048, generator=rng, dtype=torch.float64) @ mix.T / 16).relu()
    v = 0.1 * torch.randn(2048, generator=rng, dtype=torch.float64)
    y, exact = 1.3 * x + v, (0.09 * x.var(0).sum() + (0.3 * x.mean(0) + v).square().sum()).item()
    stats = [(side.mean(0).numpy(), np.cov(side.numpy(), rowvar=False)) for side in (x, y)]

    def by_sqrtm():
        (mu_x, sigma_x), (mu_y, sigma_y) = stats
        root = linalg.sqrtm(sigma_x @ sigma_y)
        return ((mu_x - mu_y) ** 2).sum() + np.trace(sigma_x) + np.trace(sigma_y) - 2 * np.trace(root).real

    print(f"\nD = 2048, N = M = {n}: exactly {exact:.9f}")
    for name, compute, bound in (("features", lambda: metrics.frechet_distance(x, y), 1e-9),
                                 ("statistics", lambda: metrics.frechet_distance(*stats), 1e-6),
                                 ("scipy.linalg.sqrtm", by_sqrtm, 1e-3)):
        started = time.perf_counter()
        value = compute()
        seconds = time.perf_counter() - started
        print(f"{name:20}{value:16.9f}{seconds:9.2f} s   relative error {abs(value / exact - 1):.1e}")
        assert value == pytest.approx(exact, rel=bound)
