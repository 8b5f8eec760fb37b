"""Datasets: what a batch holds, and what happens to files that are not what they should be.

Every image here is made on the spot; tiny archives stand for the real ones, a local server for the network.
"""

import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def toy(n=10, flip=False):
    images = torch.from_numpy(noise(n, 3, 4, 4))
    return data.Dataset(images, torch.arange(n) % 3, list("abc"), flip=flip)


# ---- plan and gather ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 10, 23])            # below, at and above the 10 images of an epoch
def test_plan_visits_every_image_once_an_epoch(batch):
    dataset = toy(10)
    seen = torch.cat([dataset.plan(step, batch, seed=5)[0] for step in range(30)])
    epochs = seen[:len(seen) // 10 * 10].view(-1, 10)
    assert (epochs.sort(1).values == torch.arange(10)).all()
    assert len({tuple(e.tolist()) for e in epochs}) == len(epochs)           # in another order each time


def test_plan_is_a_function_of_step_batch_and_seed_only():
    used, fresh = toy(1000, flip=True), toy(1000, flip=True)
    for step in range(40):
        used.plan(step, 64, seed=1)
    for step in (39, 3, 1500, 16):                           # forwards, backwards, across an epoch's end
        for one, other in zip(used.plan(step, 64, seed=1), fresh.plan(step, 64, seed=1), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(fresh.plan(3, 64, seed=1)[0], fresh.plan(3, 64, seed=2)[0])
    assert len(used._orders) <= 2                            # an order of ImageNet takes 10 MB


def test_plan_does_not_depend_on_how_the_sequence_is_cut_into_batches():
    dataset = toy(10)
    whole = dataset.plan(1, 12, seed=0)[0]
    assert torch.equal(whole, torch.cat([dataset.plan(step, 4, seed=0)[0] for step in (3, 4, 5)]))


def test_flips_are_half_of_the_batch_or_none():
    assert 0.4 < toy(10, flip=True).plan(0, 2000, seed=0)[1].float().mean() < 0.6
    assert not toy(10, flip=False).plan(0, 2000, seed=0)[1].any()
    flips = [toy(10, flip=True).plan(step, 50, seed=0)[1] for step in (0, 1)]
    assert not torch.equal(*flips)


@pytest.mark.parametrize("mapped", [False, True], ids=["tensor", "memmap"])
def test_gather(mapped, tmp_path):
    dataset, raw = toy(10), noise(10, 3, 4, 4)
    if mapped:
        np.save(tmp_path / "x.npy", raw)
        dataset.images = np.load(tmp_path / "x.npy", mmap_mode="r")
    indices = torch.tensor([7, 2, 2, 9])
    x, y = dataset.gather(indices, torch.tensor([True, False, True, False]))
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and y.tolist() == [1, 2, 2, 0]
    expected = raw[[7, 2, 2, 9]].astype(np.float64) / 127.5 - 1
    expected[[0, 2]] = expected[[0, 2], :, :, ::-1]
    assert np.abs(x.numpy() - expected).max() < 1e-6
    assert torch.equal(dataset.gather(indices)[0][1], x[1])  # the stored images were not mirrored
    assert np.array_equal(dataset.images, raw)


def test_gather_covers_exactly_minus_one_to_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    dataset = data.Dataset(images, torch.zeros(2, dtype=torch.int64), [])
    assert dataset.gather([0, 1])[0].flatten().tolist() == [-1.0, 1.0]


# ---- shapes ------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_index_only():
    images, labels, attributes = data.render(range(40), 24)
    chosen = [33, 4, 12, 39, 4]
    again = data.render(chosen, 24)
    assert np.array_equal(again[0], images[chosen]) and np.array_equal(again[1], labels[chosen])
    assert np.array_equal(again[2], attributes[chosen])
    assert len({image.tobytes() for image in images}) == 40


def test_the_collection_stays_the_same_for_ever():
    _, labels, attributes = data.render([0, 1, 19_999, 1_000_004], 8)
    assert [data.caption(*row) for row in zip(labels, attributes, strict=True)] == [
        "a medium purple circle on light grey", "a small orange square on black",
        "a small orange crescent on cream", "a small orange ring on dark green"]


@pytest.mark.parametrize("small, large", [(32, 64), (16, 64), (32, 96)])
def test_the_same_picture_at_any_size(small, large):
    one, other = data.render(range(200), small)[0], data.render(range(200), large)[0]
    k = large // small
    averaged = other.reshape(200, 3, small, k, small, k).mean((3, 5))
    difference = np.abs(averaged - one)
    assert difference.mean() < 1 and np.quantile(difference, 0.999) < 40
    assert difference.mean() * 10 < np.abs(averaged - one[::-1]).mean()      # not so of unlike pictures


@pytest.mark.parametrize("shape", data.SHAPES)
def test_a_shape_fills_the_unit_circle_and_no_more(shape):
    axis = np.linspace(-1.5, 1.5, 301)
    x, y = np.meshgrid(axis, axis)
    inside, radius = data.distance(shape, x, y) < 0, np.hypot(x, y)
    assert 0.88 < radius[inside].max() < 1.02 and 0.15 < inside.mean() * 9 / np.pi < 0.9


def test_shapes_are_whole_and_stand_out():
    images = data.render(range(1000), 32)[0].astype(int)
    border = np.stack([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], axis=2)
    assert np.abs(np.diff(border, 2)).max() <= 2             # only the ground's even slope reaches the border
    contrast = np.abs(images - border.mean((2, 3), keepdims=True)).max((1, 2, 3))
    assert contrast.min() > 90


def test_shapes_splits_labels_and_captions():
    train, test = data.load("shapes", size=8), data.load("shapes", size=8, split="test")
    assert (len(train), len(test)) == (20_000, 5_000)
    assert not set(data.SPLITS["train"]) & set(data.SPLITS["test"])
    assert train.images.shape == (20_000, 3, 8, 8) and train.images.dtype == torch.uint8 and not train.flip
    assert train.labels.bincount().tolist() == [2500] * 8 and len(train.classes) == 8
    for dataset in (train, test):
        pairs = zip(dataset.labels, dataset.captions, strict=True)
        assert all(f" {dataset.classes[y]} on " in words for y, words in pairs)
    words = {word for c in train.captions for word in c.split()}
    assert {*data.SIZES, *data.COLOURS, *data.SHAPES, "cream", "grey"} <= words
    one, other = ({image.numpy().tobytes() for image in dataset.images} for dataset in (train, test))
    assert not one & other


def test_a_caption_tells_colour_and_size():
    images, _, attributes = data.render(range(0, 8 * 400, 8), 32)                # circles
    drawn = np.abs(images - images[:, :, :1, :1].astype(int)).max(1) > 50        # (n, 32, 32)
    area = drawn.sum((1, 2))
    assert area[attributes[:, 0] == 0].max() < area[attributes[:, 0] == 1].min()
    assert area[attributes[:, 0] == 1].max() < area[attributes[:, 0] == 2].min()
    palette = np.array(list(data.COLOURS.values()))
    for image, where, (_, colour, _) in zip(images, drawn, attributes, strict=True):
        ink = np.median(image[:, where], axis=1) / 255
        assert np.abs(palette - ink).sum(1).argmin() == colour


# ---- cifar -------------------------------------------------------------------------------------------------


def python2(value):
    """The opcodes (protocol 2) with which Python 2 pickled bytes, ints, lists, dicts and uint8 arrays."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, tuple):
        return b"(" + b"".join(map(python2, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"u"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    empty += python2((0,)) + python2(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + python2((b"u1", 0, 1)) + b"R(" + python2(3) + python2(b"|") + b"NNN"
    dtype += python2(-1) + python2(-1) + python2(0) + b"tb"
    state = python2(1) + python2(value.shape) + dtype + b"\x89" + python2(value.tobytes())
    return empty + b"(" + state + b"tb"


def as_python2(items):
    return b"\x80\x02" + python2({k.encode(): v for k, v in items.items()}) + b"."


def as_python3(items):
    names = {k: [name.decode() for name in v] for k, v in items.items() if k.endswith("names")}
    return pickle.dumps(items | names, protocol=4)


CLASSES = [b"cat", b"dog", b"eel"]
ROWS = 4                                                     # images in each batch file


def cifar_files(name="cifar10", pickled=as_python2):
    """The files of a tiny CIFAR {name: bytes}."""
    spec, files = data.CIFAR[name], {}
    for k, file in enumerate(spec["train"] + spec["test"]):
        files[file] = pickled({"data": noise(ROWS, 3072, seed=k), spec["labels"]: [0, 1, 2, k % 3]})
    return files | {spec["meta"]: pickled({spec["names"]: CLASSES})}


def write_folder(root, files, name="cifar10"):
    folder = root / data.CIFAR[name]["folder"]
    folder.mkdir()
    for file, raw in files.items():
        (folder / file).write_bytes(raw)
    return folder


def write_archive(path, files, name="cifar10"):
    with tarfile.open(path, "w:gz") as tar:
        for file, raw in files.items():
            member = tarfile.TarInfo(f"{data.CIFAR[name]['folder']}/{file}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("pickled", [as_python2, as_python3])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_folder(tmp_path, name, pickled):
    folder = write_folder(tmp_path, cifar_files(name, pickled), name)
    batches = len(data.CIFAR[name]["train"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = data.load(name, tmp_path, download=False)
    assert train.images.shape == (batches * ROWS, 3, 32, 32) and train.flip
    assert np.array_equal(train.images[:ROWS].reshape(ROWS, -1), noise(ROWS, 3072, seed=0))
    assert train.labels[:4].tolist() == [0, 1, 2, 0] and train.classes == ["cat", "dog", "eel"]
    test = data.load(name, folder, split="test", download=False)                 # the folder itself will do
    assert np.array_equal(test.images.reshape(ROWS, -1), noise(ROWS, 3072, seed=batches))


def test_cifar_shrinks_by_area_or_refuses(tmp_path):
    write_folder(tmp_path, cifar_files())
    full, half = data.load("cifar10", tmp_path), data.load("cifar10", tmp_path, size=16)
    averaged = torch.nn.functional.avg_pool2d(full.images.float(), 2)
    assert (half.images - averaged).abs().max() <= 0.5
    for size in (64, 24):
        with pytest.raises(ValueError, match=f"cannot be {size}x{size}.* 16, 32"):
            data.load("cifar10", tmp_path, size=size)


def test_cifar_archive_is_read_in_place_and_checked(tmp_path, monkeypatch):
    archive = tmp_path / "cifar-10-python.tar.gz"
    monkeypatch.setitem(data.CIFAR["cifar10"], "md5", write_archive(archive, cifar_files()))
    assert data.load("cifar10", tmp_path, download=False).labels.shape == (5 * ROWS,)
    assert os.listdir(tmp_path) == [archive.name]
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz is not the original.* md5 .*delete it"):
        data.load("cifar10", tmp_path)
    assert archive.exists()                                  # a file of the user's is not ours to delete


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("hidden", [False, True], ids=["bare", "among the data"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol, hidden):
    trace = tmp_path / "executed"
    evil = {"data": noise(ROWS, 3072), "labels": [0, 1, 2, Evil(trace)]} if hidden else Evil(trace)
    write_folder(tmp_path, cifar_files() | {"data_batch_3": pickle.dumps(evil, protocol)})
    with pytest.raises(ValueError, match=r"data_batch_3 cannot be used: it wants to call \w+.system"):
        data.load("cifar10", tmp_path)
    assert not trace.exists()


GOOD = {"data": noise(ROWS, 3072), "labels": [0, 1, 2, 0]}


@pytest.mark.parametrize("raw", [
    as_python2(GOOD)[:-500], as_python2(GOOD)[:40], b"", b"<html>404</html>", b"\x80\x02K\x01.",
    as_python2(GOOD | {"labels": [0, 1, 2, 3]}), as_python2(GOOD | {"labels": [0, 1, -1, 2]}),
    as_python2(GOOD | {"labels": [0, 1]}), as_python2(GOOD | {"labels": [b"0"] * 4}),
    as_python2(GOOD | {"data": noise(ROWS, 3000)}), as_python2(GOOD | {"data": b"pixels"}),
    as_python2({"data": GOOD["data"]}), pickle.dumps(GOOD | {"data": GOOD["data"].astype(int)}, 2),
], ids=["cut", "cut early", "empty", "web page", "no dict", "label too high", "label negative", "few labels",
        "text labels", "shape", "no array", "no labels", "dtype"])
def test_a_wrong_batch_file_is_named(tmp_path, raw):
    write_folder(tmp_path, cifar_files() | {"data_batch_2": raw})
    with pytest.raises(ValueError, match=rf"data_batch_2 cannot be used: .+; found {len(raw):,} bytes"):
        data.load("cifar10", tmp_path)


def test_a_missing_batch_file_is_named(tmp_path):
    (write_folder(tmp_path, cifar_files()) / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="lacks data_batch_4"):
        data.load("cifar10", tmp_path)


# ---- download ----------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `payload`; knows ranges if told so; breaks the connection after `limit` bytes."""

    payload, ranges, limit = b"", True, None
    starts = []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
        self.starts.append(start)
        if start and start >= len(self.payload):
            return self.send_error(416)
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(len(self.payload) - start))
        self.end_headers()
        self.wfile.write(self.payload[start:][:self.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server with a tiny CIFAR archive, known to data.CIFAR."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = tmp_path / "original.tar.gz"
    md5 = write_archive(path, cifar_files())
    handler = type("Handler", (Server,), {"payload": path.read_bytes(), "starts": []})
    path.unlink()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/~kriz/cifar-10-python.tar.gz"
        monkeypatch.setitem(data.CIFAR, "cifar10", data.CIFAR["cifar10"] | {"url": url, "md5": md5})
        yield handler
        httpd.shutdown()


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_broken_download_is_resumed(tmp_path, server, ranges):
    folder = tmp_path / "not" / "there yet"
    server.ranges, server.limit = ranges, 5000
    with pytest.raises(FileNotFoundError, match="the connection broke after 5,000 of .* run again"):
        data.load("cifar10", folder)
    assert files_in(folder) == ["cifar-10-python.tar.gz.part"]                 # nothing that looks complete
    server.limit = None
    assert len(data.load("cifar10", folder)) == 5 * ROWS
    assert server.starts == [0, 5000 if ranges else 0] and files_in(folder) == ["cifar-10-python.tar.gz"]
    data.load("cifar10", folder)
    assert len(server.starts) == 2                           # the second time the file is simply there


def test_a_part_that_was_already_complete_is_used(tmp_path, server):
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(server.payload)
    assert len(data.load("cifar10", tmp_path)) == 5 * ROWS
    assert files_in(tmp_path) == ["cifar-10-python.tar.gz"]


def test_a_download_of_something_else_is_thrown_away(tmp_path, server):
    server.payload = b"<html>please log in</html>"
    with pytest.raises(ValueError, match="found 26 bytes with md5 .* removed"):
        data.load("cifar10", tmp_path)
    assert files_in(tmp_path) == []


def test_without_a_network_the_message_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(data.CIFAR["cifar10"], "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    target = tmp_path / "new"
    with pytest.raises(FileNotFoundError, match=rf"cannot download http.*-python.tar.gz .*put .* {target}"):
        data.load("cifar10", target)
    with pytest.raises(FileNotFoundError, match=rf"{target}: put http.*cifar-10-python.tar.gz there"):
        data.load("cifar10", target, download=False)
    assert not target.exists()


# ---- imagenet64 --------------------------------------------------------------------------------------------


def write_npz(path, n, seed, classes=5, **other):
    pixels = noise(n, 12288, seed=seed)
    labels = np.arange(n) % classes + 1
    np.savez(path, **{"data": pixels, "labels": labels, "mean": np.zeros(12288)} | other)
    return pixels


def test_imagenet64_is_converted_once(tmp_path, monkeypatch):
    sources = [tmp_path / f"train_data_batch_{k}.npz" for k in (1, 2, 10)]
    pixels = np.concatenate([write_npz(path, 30, seed=k) for k, path in enumerate(sources)])
    write_npz(tmp_path / "val_data.npz", 6, seed=3, classes=2)
    train = data.load("imagenet64", tmp_path)
    assert isinstance(train.images, np.memmap) and train.images.shape == (90, 3, 64, 64) and train.flip
    assert np.array_equal(train.images, pixels.reshape(-1, 3, 64, 64))           # batch 10 comes after 2
    assert train.labels[:6].tolist() == [0, 1, 2, 3, 4, 0] and train.classes == list("01234")
    test = data.load("imagenet64", tmp_path, split="test")
    assert test.images.shape == (6, 3, 64, 64) and test.classes == train.classes
    x, y = train.gather(*train.plan(3, 16, seed=0))
    assert x.shape == (16, 3, 64, 64) and y.shape == (16,) and x.min() < -0.9 and x.max() > 0.9

    monkeypatch.setattr(data, "_npz_images", None)           # from now on the sources may not be read
    assert np.array_equal(data.load("imagenet64", tmp_path).images, train.images)
    for source in tmp_path.glob("*.npz"):
        source.unlink()
    assert len(data.load("imagenet64", tmp_path)) == 90


def test_imagenet64_is_converted_again_when_its_sources_change(tmp_path):
    write_npz(tmp_path / "train_data_batch_1.npz", 20, seed=1)
    assert len(data.load("imagenet64", tmp_path)) == 19
    write_npz(tmp_path / "train_data_batch_2.npz", 20, seed=2)
    assert len(data.load("imagenet64", tmp_path)) == 38
    (tmp_path / "imagenet64_train_64.npy").unlink()
    assert len(data.load("imagenet64", tmp_path)) == 38


def test_imagenet64_without_val_holds_out_a_twentieth_at_any_size(tmp_path):
    pixels = write_npz(tmp_path / "train_data_batch_1.npz", 40, seed=1).reshape(-1, 3, 64, 64)
    parts = [np.array(data.load("imagenet64", tmp_path, split=split).images) for split in ("train", "test")]
    assert [len(part) for part in parts] == [38, 2]
    assert {image.tobytes() for part in parts for image in part} == {image.tobytes() for image in pixels}
    small = data.load("imagenet64", tmp_path, size=32, split="test")
    averaged = parts[1].reshape(2, 3, 32, 2, 32, 2).mean((3, 5))
    assert small.images.shape == (2, 3, 32, 32) and np.abs(small.images - averaged).max() <= 0.5


def test_a_conversion_that_dies_leaves_nothing(tmp_path, monkeypatch):
    for k in (1, 2):
        write_npz(tmp_path / f"train_data_batch_{k}.npz", 20, seed=k)
    (tmp_path / "imagenet64_train_64.npy.tmp").write_bytes(b"left by a killed run")
    before = [name for name in files_in(tmp_path) if name.endswith(".npz")]
    calls, shrink = [], data.shrink

    def dying(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return shrink(*args)

    monkeypatch.setattr(data, "shrink", dying)
    with pytest.raises(KeyboardInterrupt):
        data.load("imagenet64", tmp_path)
    assert files_in(tmp_path) == before
    assert len(data.load("imagenet64", tmp_path)) == 38
    assert not list(tmp_path.glob("*.tmp"))


def lying_npz(path):
    """A header that promises a hundred gigabytes."""
    header, claim = io.BytesIO(), {"descr": "|u1", "fortran_order": False, "shape": (10**7, 12288)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.npy", header.getvalue() + bytes(1000))


def damaged_npz(path):
    write_npz(path, 20, seed=1)
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1                                           # one bit, which only the zip's checksum notices
    path.write_bytes(raw)


@pytest.mark.parametrize("write, message", [
    (lying_npz, "header promises uint8 .10000000, 12288. .* 1,000 bytes"),
    (lambda path: np.savez_compressed(path, data=np.zeros((3000, 12288), np.uint8)), "would unpack to 36,8"),
    (lambda path: path.write_bytes(noise(100).tobytes()), "not a zip file"),
    (damaged_npz, "Bad CRC"),
    (lambda path: np.savez(path, labels=[1]), "data.npy"),
    (lambda path: write_npz(path, 4, 0, data=noise(4, 3072)), r"uint8 \(4, 3072\), not uint8 \(n, 12288\)"),
    (lambda path: write_npz(path, 4, 0, data=np.array([{}], object)), "header promises object"),
    (lambda path: write_npz(path, 4, 0, labels=np.array([1, 2])), "not 4 whole numbers"),
    (lambda path: write_npz(path, 4, 0, labels=np.arange(4)), "labels run from 0 to 3"),
    (lambda path: write_npz(path, 4, 0, labels=np.array([1, 2, 3, 10**9])), "labels run from 1 to 10000"),
], ids=["lying header", "bomb", "no zip", "bit flip", "no data", "shape", "objects", "few labels", "label 0",
        "huge label"])
def test_a_wrong_npz_is_refused_before_it_is_unpacked(tmp_path, write, message):
    path = tmp_path / "train_data_batch_1.npz"
    write(path)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{path.name} cannot be used: .*{message}.*; download it again"):
        data.load("imagenet64", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert files_in(tmp_path) == [path.name]


# ---- folder ------------------------------------------------------------------------------------------------


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def plain(colour, h=20, w=20):
    return np.full((h, w, 3), colour, np.uint8)


def test_class_folders_and_the_held_out_tenth(tmp_path):
    for k in range(20):
        save(tmp_path / "dog" / f"{k}.png", plain(k))
        save(tmp_path / "cat" / "deeper" / f"{k}.BMP", plain(100 + k))
    save(tmp_path / ".cache" / "x.png", plain(0))
    save(tmp_path / "dog" / "._0.png", plain(0))
    (tmp_path / "dog" / "notes.md").write_text("no image")
    train, test = (data.load("folder", tmp_path, size=8, split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"] and train.captions is None and train.flip
    assert train.images.shape == (36, 3, 8, 8) and test.images.shape == (4, 3, 8, 8)
    values = [dataset.images[:, 0, 0, 0].tolist() for dataset in (train, test)]
    assert sorted(values[0] + values[1]) == [*range(20), *range(100, 120)]
    for dataset in (train, test):
        assert torch.equal(dataset.labels == 0, dataset.images[:, 0, 0, 0] >= 100)


def test_a_flat_folder_has_no_classes_but_may_have_captions(tmp_path):
    for k in range(3):
        save(tmp_path / f"{k}.webp", plain(80 * k), lossless=True)
    (tmp_path / "1.txt").write_text(" ein roter Bär\r\n", "utf-8")
    dataset = data.load("folder", tmp_path)
    assert dataset.images.shape == (3, 3, 64, 64) and dataset.images[:, 0, 5, 5].tolist() == [0, 80, 160]
    assert dataset.classes == [] and dataset.labels.tolist() == [0, 0, 0]
    assert dataset.captions == ["", "ein roter Bär", ""]
    with pytest.raises(FileNotFoundError, match="no image for the test split.* at least 10"):
        data.load("folder", tmp_path, split="test")


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_test_split_on_disk_is_used(tmp_path, name):
    for k in range(12):
        save(tmp_path / "train" / "ab"[k % 2] / f"{k}.png", plain(k))
    save(tmp_path / name / "b" / "0.png", plain(200))
    train, test = (data.load("folder", tmp_path, split=split) for split in ("train", "test"))
    assert len(train) == 12 and train.classes == test.classes == ["a", "b"] and test.labels.tolist() == [1]
    save(tmp_path / name / "c" / "0.png", plain(200))
    with pytest.raises(ValueError, match=f"{name}/c/0.png is in none of the 2 class folders"):
        data.load("folder", tmp_path, split="test")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train"):
        save(tmp_path / name / "0.png", plain(9))
    assert data.load("folder", tmp_path).classes == ["bus", "train"]


def test_loose_files_beside_class_folders_are_refused(tmp_path):
    save(tmp_path / "cat" / "0.png", plain(1))
    save(tmp_path / "stray.png", plain(1))
    with pytest.raises(ValueError, match="stray.png is in none of the 1 class folders"):
        data.load("folder", tmp_path)


def test_images_are_cropped_to_the_centre_and_shrunk_by_area(tmp_path):
    wide = noise(32, 80, 3)
    save(tmp_path / "wide.png", wide)
    save(tmp_path / "tall.png", wide.transpose(1, 0, 2))
    expected = wide[:, 24:56].reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(data.read_image(tmp_path / "wide.png", 16) - expected.transpose(2, 0, 1)).max() <= 1
    assert np.abs(data.read_image(tmp_path / "tall.png", 16) - expected.transpose(2, 1, 0)).max() <= 1
    assert data.read_image(tmp_path / "wide.png", 48).shape == (3, 48, 48)


def test_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                         # the camera was held a quarter turn to the left
    dark_left = np.concatenate([plain(20, 16, 8), plain(230, 16, 8)], axis=1)
    save(tmp_path / "turned.jpg", dark_left, exif=exif, quality=95)
    picture = data.read_image(tmp_path / "turned.jpg", 16).astype(int)
    assert picture[:, :6].max() < 60 and picture[:, 10:].min() > 190             # dark above


def grey(value):
    return np.full((16, 16), value, np.uint8)


@pytest.mark.parametrize("make, expected", [
    (lambda: Image.fromarray(grey(90)), (90, 90, 90)),
    (lambda: Image.fromarray(grey(90).astype(np.uint16) * 256 + 7), (90, 90, 90)),
    (lambda: Image.fromarray(grey(200) > 100), (255, 255, 255)),
    (lambda: Image.fromarray(plain((9, 80, 200))).quantize(4), (9, 80, 200)),
    (lambda: Image.new("RGBA", (16, 16), (10, 20, 30, 0)), (255, 255, 255)),
    (lambda: Image.new("LA", (16, 16), (40, 255)), (40, 40, 40)),
], ids=["grey", "16 bits", "1 bit", "palette", "transparent", "grey with alpha"])
def test_every_kind_of_png_becomes_rgb(tmp_path, make, expected):
    make().save(tmp_path / "x.png")
    picture = data.read_image(tmp_path / "x.png", 8)
    assert picture.shape == (3, 8, 8) and picture.dtype == np.uint8
    assert np.abs(picture - np.reshape(expected, (3, 1, 1))).max() <= 1


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    red, green, blue = data.read_image(tmp_path / "x.jpg", 8).mean((1, 2))
    assert red > 200 and green < 40 and blue < 40


def test_bad_images_are_named_or_skipped(tmp_path):
    save(tmp_path / "test" / "x.png", plain(0))
    for k in range(12):
        save(tmp_path / "train" / f"good{k}.png", noise(20, 20, 3, seed=k))
    png = (tmp_path / "train" / "good0.png").read_bytes()
    gif = io.BytesIO()
    Image.new("L", (8, 8)).save(gif, "GIF")
    huge = io.BytesIO()
    Image.new("1", (8001, 8000)).save(huge, "PNG")
    bad = {"cut.png": png[:600], "cut_early.png": png[:30], "empty.jpg": b"", "gif.png": gif.getvalue(),
           "huge.png": huge.getvalue(), "text.jpg": b"hello"}
    for name, raw in bad.items():
        (tmp_path / "train" / name).write_bytes(raw)
    with pytest.raises(ValueError, match=r"^6 of 18 images .* cannot be read: .*; remove them, or") as error:
        data.load("folder", tmp_path, size=8)
    assert [f"train/{name} (" in str(error.value) for name in bad] == [True] * 5 + [False]   # five will do
    assert "gif.png (not a PNG, JPEG, WebP or BMP)" in str(error.value)
    assert "huge.png (8001x8000, more than 64 million pixels), ..." in str(error.value)
    with pytest.warns(UserWarning, match="6 of 18 images .* skipped"):
        dataset = data.load("folder", tmp_path, size=8, bad_images="skip")
    names = sorted(f"good{k}.png" for k in range(12))
    expected = [data.read_image(tmp_path / "train" / name, 8) for name in names]
    assert np.array_equal(dataset.images, expected) and len(dataset.labels) == 12


def test_an_image_bomb_is_not_decoded(tmp_path):
    Image.new("1", (8001, 8000)).save(tmp_path / "huge.png")                 # 15 kB
    with pytest.raises(ValueError, match="8001x8000, more than 64 million pixels"):
        data.read_image(tmp_path / "huge.png", 8)


# ---- load --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    ({"name": "shape"}, "no dataset called 'shape': did you mean shapes"),
    ({"name": "cifar-10"}, "did you mean cifar10"),
    ({"name": "mnist"}, "did you mean .*shapes"),
    ({"name": "shapes", "split": "val"}, "split 'val' is neither train nor test"),
    ({"name": "folder", "bad_images": "ignore"}, "'ignore' is neither error nor skip"),
    ({"name": "shapes", "size": 0}, "size is 0"),
    ({"name": "shapes", "size": 32.5}, "size is 32.5"),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


@pytest.mark.parametrize("name", ["imagenet64", "folder"])
def test_a_missing_folder_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
        data.load(name, tmp_path / "nowhere")


def test_flip_can_be_chosen(tmp_path):
    assert data.load("shapes", size=4, split="test", flip=True).flip
    write_folder(tmp_path, cifar_files())
    assert not data.load("cifar10", tmp_path, flip=False).flip
