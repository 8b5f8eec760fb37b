"""evaluate.py distance: what counts as a side, what is printed and warned of, statistics files, resuming, processes."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx

import data
import distance
import metrics
import runs

ROOT = Path(__file__).parent.parent


def bytes_of(n, size=8, seed=0, dark=0):
    """n images (n, size, size, 3): two kinds of stripes."""
    rng = np.random.default_rng(seed)
    stripes = (np.arange(size) // 2 % 2 * 150)[None, :, None, None] * (np.arange(n) % 2)[:, None, None, None]
    return np.uint8(np.clip(stripes + rng.integers(0, 100, (n, size, size, 3)) - dark, 0, 255))


def folder_of(path, images, classes=2, suffix=".png"):
    """A folder of images, by class."""
    for i, image in enumerate(images):
        home = path / f"class{i % classes}" if classes else path
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(home / f"{i:04d}{suffix}")
    return str(path)


def call(*words, run=None):
    """What `evaluate.py distance` does with these words; a `run` stands for an opened one."""
    parser = argparse.ArgumentParser()
    distance.distance_flags(parser)
    args = parser.parse_args([*map(str, words), "--classifier-steps", "3"])
    args.device, args.draw = torch.device("cpu"), {}
    args.a = run if run is not None else args.a
    return distance.distance(args)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weight file of Inception: the recorded case's random numbers."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(golden.load(ROOT / "tests" / "golden" / "inception-fid-cifar.npz").state_dict, path)
    return path


class DrawnRun:
    """What evaluate.py hands over for a run: image i is a function of (seed, i)."""

    def __init__(self, folder, images, dataset):
        folder.mkdir()
        (folder / "ckpt.pt").write_bytes(b"1")
        self.path, self.config, self.drawn = str(folder), {"data": "folder"}, []
        self.objective = SimpleNamespace(shape=(3, 8, 8))
        self.pixels, self.dataset = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, dataset

    def images(self, n, seed=0, batch=64, conditions=None, first=0):
        self.drawn += range(first, first + n)
        yield from self.pixels[first:first + n].split(batch)

    def data(self, split):
        return self.dataset


def test_every_kind_of_side_holds_the_same_images(tmp_path, capsys):
    """The same images as a folder, as bytes and floats in an .npz, drawn from a run: the distance to a set is one."""
    images, reference = bytes_of(30), folder_of(tmp_path / "real", bytes_of(40, seed=1, dark=60))
    folder = folder_of(tmp_path / "fake", images, classes=0)
    np.savez(tmp_path / "bytes.npz", images)
    np.savez_compressed(tmp_path / "floats.npz", images / 255)
    run = DrawnRun(tmp_path / "run", images, data.load("folder", reference, size=8, flip=False))
    chosen = ["--metrics", "fid,kid,prdc,is,cmmd,fid-infinity"]
    by_folder = call(folder, reference, *chosen)
    said = capsys.readouterr()
    assert "30 images, 8x8" in said.out and "40 images, 8x8" in said.out
    lines = [line for line in said.out.splitlines() if line.startswith("Frechet")]
    assert len(lines) == 1 and "classifier" in lines[0] and "not of Inception" in lines[0]
    assert said.err.count("warning:") == 2 and "N = 30 < 2,048" in said.err
    assert by_folder["fid"] > 0
    for side in (tmp_path / "bytes.npz", tmp_path / "floats.npz"):
        assert call(side, reference, *chosen) == approx(by_folder)
    assert call("-", reference, *chosen, "--n", "30", run=run)["fid"] == approx(by_folder["fid"], rel=0.2)
    assert run.drawn == list(range(30))
    assert not any((tmp_path / "runs" / "features").iterdir())                    # no features are left behind


def test_statistics_are_those_of_the_features_and_other_tools_can_read_them(tmp_path, weights, capsys):
    images, reference = bytes_of(3, 32), bytes_of(4, 32, seed=1)
    np.savez(tmp_path / "a.npz", images)
    np.savez(tmp_path / "b.npz", reference)
    known = "--inception", weights, "--level", "192"                               # quicker than 2048
    direct = call("a.npz", "b.npz", *known, "--metrics", "fid,sfid", "--stats", "stats.npz")
    said = capsys.readouterr()
    assert "TF-faithful" in said.out and "NOT the published weights" in said.out and "sFID" in said.out
    found = metrics.load_inception(weights)(torch.from_numpy(reference).permute(0, 3, 1, 2), ["192", "spatial"])
    with np.load("stats.npz") as file:                                            # as pytorch-fid and ADM read it
        for key, features in (("", found["192"]), ("_s", found["spatial"])):
            assert file[f"mu{key}"].dtype == file[f"sigma{key}"].dtype == np.float64
            features = features.double().numpy()
            assert np.abs(file[f"mu{key}"] - features.mean(0)).max() < 1e-4
            assert np.abs(file[f"sigma{key}"] - np.cov(features, rowvar=False)).max() < 1e-3
        assert np.array_equal(file["arr_0"], reference) and file["n"] == 4
        np.savez("foreign.npz", mu=file["mu"], sigma=file["sigma"])                # as other tools write it
    by_file = call("a.npz", "stats.npz", *known, "--metrics", "fid,kid")           # kid: of its images
    assert by_file["fid"] == approx(direct["fid"], rel=1e-5)
    assert "4 images, 32x32, statistics of 4 images" in capsys.readouterr().out
    with pytest.raises(ValueError, match="are those of inception-tf"):
        call("a.npz", "stats.npz", *known, "--camp", "pytorch-fid")
    assert call("a.npz", "foreign.npz", *known)["fid"] == approx(direct["fid"], rel=1e-5)
    assert "does not tell its convention" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds statistics of 192 features"):
        call("a.npz", "foreign.npz", *known[:2], "--level", "64")
    with pytest.raises(ValueError, match="holds only statistics"):
        call("a.npz", "foreign.npz", *known, "--metrics", "kid")


def test_up_to_ten_thousand_images_go_with_the_statistics(tmp_path, monkeypatch):
    """Of 25 images with room for 10, every third: 9 of them, from several blocks."""
    monkeypatch.setattr(distance, "BLOCK", 4)
    monkeypatch.setattr(distance, "SAMPLES", 10)
    reference = folder_of(tmp_path / "real", bytes_of(25))
    call(reference, "--stats", "stats.npz")
    files = sorted(Path(reference).rglob("*.png"))
    with np.load("stats.npz") as file:
        assert np.array_equal(file["arr_0"], [np.asarray(Image.open(path)) for path in files[::3]])
        assert file["mu"].shape == (128,) and "mu_s" not in file


def test_a_killed_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(distance, "BLOCK", 7)
    reference = folder_of(tmp_path / "real", bytes_of(20, seed=1))
    whole = call(tmp_path / "real", reference, "--metrics", "kid")
    run = DrawnRun(tmp_path / "run", bytes_of(30), data.load("folder", reference, size=8, flip=False))
    straight = call("-", reference, "--n", "30", "--metrics", "fid,prdc", run=run)
    run.drawn.clear()
    draw = run.images

    def killed(n, first=0, **options):
        if first >= 20:
            raise KeyboardInterrupt
        return draw(n, first=first, **options)

    monkeypatch.setattr(run, "images", killed)
    with pytest.raises(KeyboardInterrupt):
        call("-", reference, "--n", "30", "--metrics", "fid,prdc", "--batch", "3", run=run)
    monkeypatch.setattr(run, "images", draw)
    assert call("-", reference, "--n", "30", "--metrics", "fid,prdc", "--batch", "3", run=run) == approx(straight)
    assert run.drawn.count(0) == run.drawn.count(13) == 1 and sorted(set(run.drawn)) == list(range(30))
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"23")                              # trained on: nothing is reused
    run.drawn.clear()
    call("-", reference, "--n", "30", run=run)
    assert len(run.drawn) == 30 and whole["kid"] < 0.5


def test_a_second_measurement_of_the_same_images_is_refused_until_the_first_ends(tmp_path):
    reference = folder_of(tmp_path / "real", bytes_of(12))
    call(reference, reference, "--keep")                                           # one folder for both sides
    (folder,) = (tmp_path / "runs" / "features").iterdir()
    held = runs.lock(folder)
    with pytest.raises(ValueError, match="another process"):
        call(reference, reference)
    held.close()
    assert abs(call(reference, reference)["fid"]) < 1e-6


def test_given_features_and_pairs(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(40, 6)) + 1
    np.savez("x.npz", features=x)
    np.savez("y.npz", features=np.float32(y))
    found = call("x.npz", "y.npz", "--metrics", "fid,cmmd,prdc")
    assert found["fid"] == approx(metrics.frechet_distance(torch.tensor(x), torch.tensor(y)), rel=1e-5)
    assert found["cmmd"] == approx(metrics.cmmd(torch.tensor(y), torch.tensor(x)), rel=1e-5)
    images = bytes_of(6, 16)
    np.savez("a.npz", images)
    np.savez("b.npz", images ^ 1)
    assert call("a.npz", "b.npz", "--metrics", "pairs")["psnr"] == approx(20 * np.log10(255))
    assert "mean over images" in capsys.readouterr().out


def test_warnings_say_what_sets_figures_apart(tmp_path, capsys):
    fake = folder_of(tmp_path / "fake", bytes_of(12, 16), classes=0, suffix=".jpg")
    real = folder_of(tmp_path / "real", bytes_of(12, 8))
    call(fake, real)
    said = capsys.readouterr().err
    assert "12 of 12 images" in said and "JPEG" in said and "A is 16x16 and B 8x8" in said
    call(fake, real, "--size", "8")
    assert "cropped and resized to 8x8" in capsys.readouterr().err
    side = distance.side_of("shapes:split=test,size=8", SimpleNamespace(data_dir="data"))
    many = distance.Side("a", 5000)
    said = " ".join(distance.remarks(many, side, "classifier", metrics.Classifier(2)))
    assert "test split" in said and "papers quote 50,000 generated images, here are 5,000" in said


def bad_inputs(tmp):
    """(words, what the one line says)"""
    good, images = folder_of(tmp / "good", bytes_of(12)), bytes_of(4)
    (tmp / "empty").mkdir()
    folder_of(tmp / "one", images[:1], 0)
    folder_of(folder := tmp / "mixed", images, 0)
    Image.fromarray(bytes_of(1, 10)[0]).save(folder / "x.png")
    folder_of(tmp / "broken", images, 0)
    (tmp / "broken" / "y.png").write_bytes(b"no image")
    arrays = {"range": {"arr_0": images / 127.5 - 1}, "nan": {"arr_0": images * np.nan},
              "layout": {"arr_0": images.transpose(0, 3, 1, 2)}, "alpha": {"arr_0": np.zeros((4, 8, 8, 4), np.uint8)},
              "flat": {"arr_0": images[0]}, "ints": {"arr_0": images.astype(np.int64)}, "empty": {"arr_0": images[:0]},
              "other": {"x": images}, "half": {"mu": np.zeros(128)}, "wrong": {"mu": np.zeros(128), "sigma": np.eye(9)},
              "width": {"mu": np.zeros(64), "sigma": np.eye(64)},
              "inf": {"mu": np.full(128, np.inf), "sigma": np.eye(128)}, "features": {"features": np.ones((5, 3))}}
    for name, content in arrays.items():
        np.savez(tmp / f"{name}.npz", **content)
    (tmp / "cut.npz").write_bytes((tmp / "range.npz").read_bytes()[:500])
    np.savez_compressed(tmp / "bomb.npz", mu=np.zeros(64), sigma=np.zeros((5000, 5000)))
    return [(f"{name}.npz {good}", why) for name, why in {
        "range": "floats from -1 to", "nan": "floats from nan", "layout": "not (N, H, W, 3)",
        "alpha": "not (N, H, W, 3)", "flat": "not (N, H, W, 3)", "ints": "not bytes", "empty": "not (N, H, W, 3)",
        "other": "it holds x",
        "half": "`sigma` is missing", "wrong": "`sigma` is (9, 9)", "width": "holds statistics of 64 features",
        "inf": "not finite", "features": "only be compared with given features", "cut": "cannot be used",
        "bomb": "more than belong to it",        "absent": "is no run, no folder"}.items()] + [
        (f"empty {good}", "holds no image"), (f"one {good}", "holds 1 image"), (f"mixed {good}", "mixed sizes"),
        (f"broken {good}", "y.png cannot be read"), (f"cifar11 {good}", "did you mean cifar10"),
        (f"{good}", "needs two sides"), (f"{good} {good} --metrics fid,fod", "no 'fod'"),
        (f"{good} {good} --metrics sfid", "needs --inception"), (f"{good} {good} --n 1", "--n 1"),
        (f"shapes:split=best {good}", "split"), (f"shapes:16 {good}", "option=value"),
        (f"{good} {good} --inception nothing.pth", "nothing.pth"),
        (f"half.npz {good} --stats out.npz", "`sigma`"), (f"{good} one --metrics pairs", "holds 1 image"),
        (f"{good} mixed --metrics pairs", "equally many")]


def test_bad_input_ends_in_one_line(tmp_path):
    for words, why in bad_inputs(tmp_path):
        with pytest.raises((ValueError, OSError)) as error:
            call(*words.split())
        message = str(error.value)
        assert why in message and "\n" not in message, f"{words}: {message}"
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out.npz").exists()


@pytest.mark.slow
def test_two_processes_share_the_images_and_agree_with_one(tmp_path):
    folder_of(tmp_path / "real", bytes_of(30, seed=1))
    np.savez("fake.npz", bytes_of(25))
    (tmp_path / "program.py").write_text(
        "import sys, argparse, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import distance\n"
        "distance.BLOCK = 4\n"
        "p = argparse.ArgumentParser()\n"
        "distance.distance_flags(p)\n"
        "args = p.parse_args(['fake.npz', 'real', '--classifier-steps', '3', '--metrics', 'fid,prdc', '--keep'])\n"
        "args.device, args.draw = torch.device('cpu'), {}\n"
        "print(distance.distance(args))\n")
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541", "WORLD_SIZE": "2"}
    ranks = [subprocess.Popen([sys.executable, "program.py"], env=os.environ | several | {"RANK": str(rank)},
                              stdout=subprocess.PIPE, text=True) for rank in range(2)]
    first, second = (rank.communicate(timeout=300)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0] and second.strip() == "{}"
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "features").rglob("*.npy")}
    assert len(files) == 7 + 8
    alone = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, timeout=300, check=True)
    assert alone.stdout.splitlines()[-1] == first.splitlines()[-1]
    assert files == {path: path.stat().st_mtime_ns for path in files}             # and nothing was computed again


STREAM = """
import sys, time
sys.path.insert(0, ROOT)
import torch
import distance, metrics

class Cheap(metrics.FeatureNetwork):
    # Features of Inception's sizes in no time: what is left is the cost of everything else.
    key = "cheap"
    def __init__(self):
        super().__init__()
        self.maps = torch.nn.ModuleDict({"2048": torch.nn.Linear(27, 2048), "spatial": torch.nn.Linear(27, 2023)})
        self.seconds = 0.0
    def measure(self, images, levels):
        started = time.perf_counter()
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 3).flatten(1)
        found = {level: self.maps[level](x).relu() for level in levels}
        self.seconds += time.perf_counter() - started
        return found

def peak():
    # Not getrusage's, which a process inherits from the one that started it.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

torch.manual_seed(0)
network, side = Cheap(), distance.side_of_npz(distance.Path("many.npz"))
side.folder = distance.Path("work")
before, started = peak(), time.perf_counter()
side.features = distance.extract(side, network, ["2048", "spatial"])
extracted = time.perf_counter()
for level in ("2048", "spatial"):
    metrics.statistics(side.features[level])
counted = time.perf_counter()
metrics.kid(side.features["2048"], side.features["2048"], subsets=10)
after = peak()
print(f"{side.n:,} images: {after:.0f} MB at the peak, {after - before:.0f} MB of them for this; "
      f"{side.n / (extracted - started - network.seconds):.0f} images/s but for the network; statistics of 2048 and "
      f"2023 features {counted - extracted:.1f} s; 10 subsets of KID {time.perf_counter() - counted:.1f} s")
assert after - before < 600
"""


@pytest.mark.slow
def test_fifty_thousand_images_pass_in_bounded_memory(tmp_path):
    """The features alone would take 810 MB, twice that in float64. Run with -s for the figures."""
    try:
        images = data.load("cifar10", ROOT / "data", download=False, flip=False).images.permute(0, 2, 3, 1).numpy()
    except FileNotFoundError:
        images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    np.savez("many.npz", images)
    (tmp_path / "stream.py").write_text(STREAM.replace("ROOT", repr(str(ROOT)), 1))
    told = subprocess.run([sys.executable, "stream.py"], stdout=subprocess.PIPE, text=True, timeout=1800)
    print("\n" + told.stdout)
    assert told.returncode == 0
