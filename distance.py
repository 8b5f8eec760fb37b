"""The distance between two sets of images, each a run, a folder, a file or a data set: evaluate.py distance A B.

    python evaluate.py distance runs/my-run cifar10 --inception pt_inception-2015-12-05-6726825d.pth --metrics fid,kid
    python evaluate.py distance cifar10 --inception FILE --stats cifar10.npz     once; then as B, instead of cifar10
    torchrun --nproc-per-node 8 evaluate.py distance ...                         shares the images out

Features of many images lie in files of 1,000 until all are known: memory stays bounded, a killed measurement goes on
where it was, and processes need nothing from each other but to wait.

Contents: sides; features of many images; the command; its metrics; statistics files.
"""

import contextlib
import dataclasses
import datetime
import difflib
import hashlib
import math
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import metrics
import runs

# ------------------------------------------------------------------- sides: runs, folders, files and data sets

BLOCK = 1000                                    # images whose features lie in one file


@dataclasses.dataclass
class Side:
    """One side of a distance: n images, or what was computed from them before.

    images(first, count) gives bytes (count, C, H, W), `sides` is their (H, W). key: a word that changes with the
    content. remarks: what sets its figures apart from others'. labelled() gives (a data set with classes for a judge,
    its name), or None. statistics: (mu, sigma) by level, of statistics_n images, by the network of that key, where a
    file tells these; features: (N, D) by level. folder: where these lie for as long as they are needed.
    """

    name: str
    n: int = 0
    images: Callable | None = None
    sides: tuple | None = None
    key: str = ""
    split: str = "train"
    remarks: list = dataclasses.field(default_factory=list)
    labelled: Callable = lambda: None
    folder: Path | None = None
    statistics: dict = dataclasses.field(default_factory=dict)
    statistics_n: int | None = None
    network: str = ""
    features: dict = dataclasses.field(default_factory=dict)

    def at(self, level):
        """What `frechet_distance` takes of a level: statistics, or else features."""
        if level in self.statistics:
            return self.statistics[level]
        if level in self.features:
            return self.features[level]
        held = ", ".join(f"{len(mu):,}" for mu, _ in self.statistics.values())
        raise ValueError(f"{self.name} holds statistics of {held or 'no'} features, not of those of level {level} that "
                         "are asked for: choose another --level, or another file")

    def counted(self, level):
        """How many images `at` stands for; None if a file does not tell."""
        return self.statistics_n if level in self.statistics else self.n

    def rows(self, level, metric):
        """The features of single images; ValueError where only statistics are known."""
        if level not in self.features:
            raise ValueError(f"{metric} compares single images, and {self.name} holds only statistics")
        return self.features[level]


def word_of(*parts):
    """A short word that changes with any of the parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def side_of(what, args):
    """The `Side` that a command line means: an opened run, or the name of a data set, a folder, or an .npz."""
    if not isinstance(what, str):
        return side_of_run(what, args)
    path, name = Path(what).expanduser(), what.partition(":")[0]
    if name in data.DATASETS:
        return side_of_data(what, args)
    if path.is_dir():
        return side_of_folder(path, args)
    if path.suffix == ".npz" and path.is_file():
        return side_of_npz(path)
    near = difflib.get_close_matches(name, data.DATASETS, n=1, cutoff=0.6)
    raise FileNotFoundError(f"{what} is no run, no folder, no .npz file and no data set: "
                            + (f"did you mean {near[0]}?" if near else f"data sets are {', '.join(data.DATASETS)}"))


def side_of_run(run, args):
    """Images drawn now, a function of seed and number; --n of them."""
    def images(first, count):
        drawn = run.images(count, seed=args.seed, batch=args.batch, first=first, **draw)
        return torch.cat([metrics.to_bytes(metrics.as_image(x)).cpu() for x in drawn])

    def labelled():
        train = run.data("train")
        return (train, run.config["data"].partition(":")[0]) if train.classes else None

    draw, path = getattr(args, "draw", {}), Path(run.path).expanduser()
    state = (path / "ckpt.pt" if path.is_dir() else path).stat()
    shape = metrics.as_image(torch.empty(1, *run.objective.shape)).shape
    return Side(f"{run.path}, drawn now ({args.weights} weights, seed {args.seed}"
                + "".join(f", {key} {value}" for key, value in draw.items()) + ")", args.n, images, tuple(shape[2:]),
                word_of(str(path.absolute()), state.st_size, state.st_mtime_ns, args.weights, args.seed, draw),
                labelled=labelled)


def side_of_data(text, args):
    """A data set, NAME or NAME:option=value,...; options are those of its loader, split and data_dir. Its images are in
    their own order, without flips."""
    name, _, rest = text.partition(":")
    options = {"data_dir": args.data_dir, "split": "train"}
    for piece in filter(None, rest.split(",")):
        option, equals, value = piece.partition("=")
        if not equals:
            raise ValueError(f"{text}: {piece!r} is not of the form option=value, such as split=test")
        options[option.strip()] = int(value) if value.strip().isdigit() else value.strip()
    options["flip"] = False
    dataset = data.load(name, **options)
    if isinstance(dataset.images, list):
        raise ValueError(f"{text} holds images of mixed sizes: distances need one size")

    def images(first, count):
        return metrics.as_image(torch.as_tensor(np.ascontiguousarray(dataset.images[first:first + count])))

    def labelled():
        train = dataset if options["split"] == "train" else data.load(name, **options | {"split": "train"})
        return (train, name) if train.classes else None

    return Side(f"{name}, {options['split']} split", len(dataset), images, tuple(images(0, 1).shape[2:]),
                word_of(metrics.fingerprint(dataset)), options["split"], labelled=labelled)


def side_of_folder(path, args):
    """All PNG, JPEG, WebP and BMP images below a folder, sorted by path; of one size, or brought to --size."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in data.SUFFIXES and file.is_file()
                   and not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise FileNotFoundError(f"{path} holds no image: distances need PNG, JPEG, WebP or BMP files")
    sides = data.open_image(files[0]).size[::-1] if args.size is None else (args.size, args.size)

    def pixels(file):
        try:
            picture = data.open_image(file)
        except Exception as error:                   # decoders raise nearly every type there is
            raise ValueError(f"{file} cannot be read ({error}): remove it") from None
        if args.size is not None:
            return torch.from_numpy(data.cropped(picture, args.size).copy())
        if picture.size[::-1] != sides:
            raise ValueError(f"{path} holds images of mixed sizes: {files[0].name} is {sides[1]}x{sides[0]}, "
                             f"{file.name} {picture.width}x{picture.height}; --size S crops and resizes all")
        return torch.from_numpy(np.array(picture).transpose(2, 0, 1))

    def images(first, count):
        with ThreadPoolExecutor(8) as threads:       # decoders let go of the interpreter
            return torch.stack(list(threads.map(pixels, files[first:first + count])))

    def labelled():
        if all(file.parent == path for file in files):
            return None
        return data.load("folder", path, size=min(sides), flip=False), path.name

    jpeg = sum(file.suffix.lower() in (".jpg", ".jpeg") for file in files)
    remarks = [f"{jpeg:,} of {len(files):,} images of {path} are JPEG: what compression did to them is measured too; "
               "save PNG"] if jpeg else []
    if args.size is not None:
        remarks.append(f"the images of {path} were cropped and resized to {args.size}x{args.size}: compare only with "
                       "figures of the same filter")
    known = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Side(f"folder {path}", len(files), images, tuple(sides), word_of(known, args.size), remarks=remarks,
                labelled=labelled)


def side_of_npz(path):
    """A file of samples (`arr_0`, (N, H, W, C)), of statistics (`mu`, `sigma`, also `mu_s`, `sigma_s`; with or without
    samples), or of features (`features`, (N, D)), as other tools write and read them."""
    stat = path.stat()
    side = Side(str(path), key=word_of(str(path.absolute()), stat.st_size, stat.st_mtime_ns))
    with unreadable(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if not names & {"arr_0", "mu", "features"}:
            raise ValueError(f"it holds {', '.join(sorted(names)) or 'nothing'}, and needs `arr_0` (samples), `mu` and "
                             "`sigma` (statistics), or `features`")
        if "arr_0" in names:
            samples = Samples(path)
            side.n, side.images, side.sides = samples.shape[0], samples.read, samples.shape[1:3]
        if "features" in names:
            side.features["features"] = numbers(archive, "features", 2, 2**33).float()
            side.n = len(side.features["features"])
        for end in ("", "_s"):
            if f"mu{end}" in names:
                mu, sigma = numbers(archive, f"mu{end}", 1), numbers(archive, f"sigma{end}", 2)
                if sigma.shape != (len(mu), len(mu)):
                    raise ValueError(f"`mu{end}` has {len(mu)} numbers, and `sigma{end}` is {tuple(sigma.shape)}")
                level = next((level for level, width in metrics.LEVELS.items() if width == len(mu)), "classifier")
                side.statistics["spatial" if end else level] = mu, sigma
        if "n" in names:
            side.statistics_n = int(numbers(archive, "n", 0))
        if "network" in names and archive.getinfo("network.npy").file_size < 2**12:
            with archive.open("network.npy") as file:
                side.network = str(np.lib.format.read_array(file, allow_pickle=False))
    return side


@contextlib.contextmanager
def unreadable(path):
    """Whatever a damaged or foreign file makes a reader raise, as one sentence that names the file."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be used: {reason}") from None


def numbers(archive, name, dimensions, most=2**28):
    """An array of finite numbers in an .npz as a float64 tensor, of at most so many bytes."""
    if f"{name}.npy" not in archive.namelist() or archive.getinfo(f"{name}.npy").file_size > most:
        raise ValueError(f"`{name}` is missing or larger than {most / 2**20:,.0f} MB")
    with archive.open(f"{name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.ndim != dimensions or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise ValueError(f"`{name}` is {array.dtype} {array.shape}, not finite real numbers in {dimensions} dimensions")
    return torch.from_numpy(array.astype(np.float64))


class Samples:
    """The `arr_0` of an .npz, (N, H, W, C) bytes or floats in [0, 1], read stretch by stretch in bounded memory."""

    def __init__(self, path):
        self.path = path
        self.stream, self.shape, self.dtype = data.open_array(zipfile.ZipFile(path), "arr_0")
        self.start, self.row = self.stream.tell(), math.prod(self.shape[1:]) * self.dtype.itemsize
        if len(self.shape) != 4 or self.shape[3] not in (1, 3) or not self.shape[0]:
            raise ValueError(f"`arr_0` is {self.shape}, not (N, H, W, 3) or (N, H, W, 1)")
        if self.dtype != np.uint8 and self.dtype.kind != "f":
            raise ValueError(f"`arr_0` is {self.dtype}, not bytes, nor floats in [0, 1]")

    def read(self, first, count):
        """Samples first .. first + count - 1 as uint8 (count, C, H, W)."""
        with unreadable(self.path):
            self.stream.seek(self.start + first * self.row)
            x = np.frombuffer(self.stream.read(count * self.row), self.dtype).reshape(count, *self.shape[1:])
            if self.dtype != np.uint8:
                if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
                    raise ValueError(f"`arr_0` holds floats from {x.min():.3g} to {x.max():.3g}: save bytes, or floats "
                                     "in [0, 1]")
                x = (x * 255).round().astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


# ---------------------------------------------------------------------------------------------- features of many images


class Rows:
    """(N, D) numbers in files of at most BLOCK rows each, indexed like an array by a slice or by integers: what is too
    large for memory is read where it is asked for."""

    def __init__(self, files, counts):
        self.files, self.edges = files, np.cumsum([0, *counts])
        self.shape = (int(self.edges[-1]), *np.load(files[0], mmap_mode="r").shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        index = np.arange(len(self))[rows]
        block = np.searchsorted(self.edges, index, side="right") - 1
        found = None
        for k in np.unique(block):
            here = block == k
            values = np.load(self.files[k], mmap_mode="r")[index[here] - self.edges[k]]
            if found is None:
                found = np.empty((len(index), *self.shape[1:]), values.dtype)
            found[here] = values
        return torch.from_numpy(found)


@torch.no_grad()
def extract(side, network, levels, batch=64, kept=0):
    """The features of all images of a side: {level: Rows}. They are computed block by block into files in its folder,
    so that a killed measurement goes on where it was; block k is the work of process k modulo their number. kept: also the
    bytes of every kept-th image, as level "images", a list of arrays (n, H, W, C)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, folder = next(network.parameters()).device, side.folder
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [(first, min(BLOCK, side.n - first)) for first in range(0, side.n, BLOCK)]
    names = [*levels, f"images{kept}"] if kept else list(levels)
    files = {name: [folder / f"{first}-{count}.{name}.npy" for first, count in blocks] for name in names}
    missing = [k for k in range(rank, len(blocks), world) if not all(files[name][k].exists() for name in names)]
    total = sum(blocks[k][1] for k in missing)
    with tqdm(total=total, desc=f"features of {side.name}", unit=" images", delay=2, leave=False) as bar:
        for k in missing:
            first, count = blocks[k]
            found = {name: [] for name in names}
            for begin in range(first, first + count, batch):
                images = side.images(begin, min(batch, first + count - begin))
                for level, values in network.measure(images.to(device), levels).items():
                    found[level].append(values.cpu())
                if kept:
                    found[names[-1]].append(images[-begin % kept::kept].permute(0, 2, 3, 1))
                bar.update(len(images))
            for name, parts in found.items():
                save_array(files[name][k], torch.cat(parts).numpy())
    together()
    result = {level: Rows(files[level], [count for _, count in blocks]) for level in levels}
    if kept:
        result["images"] = [np.load(file, mmap_mode="r") for file in files[names[-1]]]
    return result


def save_array(path, array):
    """np.save that leaves a whole file or none."""
    def save(partial):
        with open(partial, "wb") as file:
            np.save(file, array)

    runs.write(path, save)


def first_process():
    """Whether this process is the first of several, or the only one: it trains, compares and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def together():
    """With several processes: wait for all of them."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))         # drawing may take long
        dist.barrier()


def leave():
    """With several processes: wait for all, and take leave of each other."""
    together()
    if dist.is_initialized():
        time.sleep(0.1)      # gloo's threads, joined below without letting go of the interpreter, need it once more
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- the command


def place(text):
    """An argparse type: a folder or file that holds a run as `runs.Run`, which evaluate.py opens; else the text."""
    path = Path(text).expanduser()
    holds_run = path.is_dir() and ((path / "config.json").exists() or (path / "ckpt.pt").exists())
    return runs.Run(text) if holds_run or (path.suffix == ".pt" and path.is_file()) else text


def distance_flags(p):
    add, own = p.add_argument, [level for level in metrics.LEVELS if level != "spatial"]
    add("a", metavar="A", type=place, help="what is judged: the folder of a run (drawn now), a folder of images, an "
        ".npz of samples (arr_0), of statistics (mu, sigma) or of features, or a data set: NAME, NAME:split=test,size=16")
    add("b", metavar="B", type=place, nargs="?", help="the reference, likewise; may be left out with --stats or "
        "--metrics is")
    add("--metrics", default="fid", metavar="NAME,...", help="default: fid; "
        + "; ".join(f"{name}: {function.__doc__.rstrip('.')}" for name, function in METRICS.items()))
    add("--inception", metavar="FILE", help="weights of the FID's network, pt_inception-2015-12-05-"
        f"{metrics.PUBLISHED}.pth; without them the data set's own classifier is used, which gives no FID")
    add("--camp", default="tf", choices=list(metrics.CAMPS), help="how images reach Inception (default: %(default)s)")
    add("--level", default="2048", choices=own, help="features of Inception (default: %(default)s)")
    add("--lpips", nargs=3, metavar=("NET", "FEATURES", "LINEAR"),
        help="for --metrics pairs: alex or vgg, torchvision's file of it, and LPIPS's own file")
    add("--stats", metavar="OUT.npz", help="write the statistics of B (of A, if there is no B), with up to 10,000 of "
        "its images, as pytorch-fid and ADM's evaluator read them")
    add("--n", type=int, default=2048, help="images drawn of a run (default: %(default)s; papers: 50000)")
    add("--seed", type=int, default=1, help="of the images drawn (default: %(default)s)")
    add("--batch", type=int, default=64, help="images at once (default: %(default)s)")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or last weights (default: %(default)s)")
    add("--size", type=int, metavar="S", help="crop and resize the images of folders to SxS (default: as they are)")
    add("--data-dir", default="data", metavar="FOLDER", help="where data sets are (default: %(default)s)")
    add("--classifier-steps", type=int, default=400, help="training steps of 128 images of the classifier, the first "
        "time (default: %(default)s)")
    add("--work", default="runs/features", metavar="FOLDER", help="features lie here until all are known: the same "
        "command goes on where it was killed (default: %(default)s)")
    add("--keep", action="store_true", help="leave the features there, for the next comparison")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def distance(args):
    """FID and its relatives between two sets of images: runs, folders, files or data sets."""
    names = wanted(args)
    a, b = (side_of(what, args) if what is not None else None for what in (args.a, args.b))
    sides = [side for side in (a, b) if side is not None]
    written = sides[-1] if args.stats else None
    network, level = network_of(sides, names, args)
    for side in sides:
        check_side(side, network, side is written)
        if network is not None and side.images is not None:
            levels = needed(side, names, level, network, side is a, side is written)
            side.folder = Path(args.work).expanduser() / f"{side.key}-{network.key}"
            side.features |= extract(side, network, levels, args.batch, -(-side.n // 10_000) if side is written else 0)
    figures = {}
    if first_process():
        describe(a, b, network)
        for name in names:
            figures |= METRICS[name](a, b, level, network, args)
        if written is not None:
            write_statistics(Path(args.stats).expanduser(), written, level, network)
        for remark in remarks(a, b, level, network):
            print(f"warning: {remark}", file=sys.stderr)
        for folder in {side.folder for side in sides if side.folder is not None}:
            if args.keep:
                print(f"features: {folder}")
            else:
                shutil.rmtree(folder)
    leave()
    return figures


def wanted(args):
    """The names of --metrics; ValueError for flags that make no sense together."""
    names = list(dict.fromkeys(args.metrics.split(",")))
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"--metrics: there is no {unknown[0]!r}, choose from {', '.join(METRICS)}")
    for flag, value, least in (("--n", args.n, 2), ("--batch", args.batch, 1), ("--size", args.size or 1, 1),
                               ("--classifier-steps", args.classifier_steps, 1)):
        if value < least:
            raise ValueError(f"{flag} {value}: choose a whole number of at least {least}")
    if args.b is None:
        names = [name for name in names if name == "is"]
        if not names and not args.stats:
            raise ValueError("a distance needs two sides, A and B; A alone has statistics (--stats OUT.npz) and an "
                             "Inception score (--metrics is)")
    if "sfid" in names and not args.inception:
        raise ValueError("--metrics sfid needs --inception FILE: no other network has that layer")
    return names


def network_of(sides, names, args):
    """(the network that looks, the level of its features that is compared): Inception; or the judge of B's or A's data
    set; or none, where features are given or images are compared one by one."""
    given = ["features" in side.features for side in sides]
    if any(given):
        if not all(given) or args.stats or {"is", "sfid", "pairs"} & set(names):
            raise ValueError("given features can only be compared with given features, by fid, kid, prdc, cmmd and "
                             "fid-infinity")
        return None, "features"
    if not args.stats and names == ["pairs"]:
        return None, ""
    if args.inception:
        return metrics.load_inception(args.inception, args.device, args.camp), args.level
    for side in reversed(sides):
        if (labelled := side.labelled()) is not None:
            if not first_process():
                together()                           # the first process trains it, the others find it
            network = metrics.judge(*labelled, args.classifier_steps, args.device)
            if first_process():
                together()
            return network, network.level
    raise ValueError("neither side has classes that a classifier could learn: give Inception's weights by "
                     "--inception FILE")


def check_side(side, network, written):
    """ValueError for a side that cannot be measured, or was measured in another way."""
    if side.n == 1:
        raise ValueError(f"{side.name} holds 1 image: distances need at least 2 on each side")
    if side.network and network is not None and side.network != network.key:
        raise ValueError(f"the statistics of {side.name} are those of {side.network}, and here {network.key} looks: "
                         "choose the same --inception and --camp, or other statistics")
    if written and side.images is None:
        raise ValueError(f"--stats: {side.name} holds statistics already, and no images")


def needed(side, names, level, network, is_a, is_written):
    """The levels whose features a side needs for these metrics, beside the statistics that it holds."""
    names, levels = set(names), set()
    if names & {"kid", "prdc", "cmmd"} or (is_a and "fid-infinity" in names):
        levels.add(level)
    if is_written or (names & {"fid", "fid-infinity"} and level not in side.statistics):
        levels.add(level)
    if "sfid" in names and "spatial" not in side.statistics:
        levels.add("spatial")
    if is_written and isinstance(network, metrics.Inception):
        levels.add("spatial")
    if is_a and "is" in names:
        levels.add(network.level)
    return [name for name in (*metrics.LEVELS, "classifier") if name in levels]


def describe(a, b, network):
    """Print what is compared, and how."""
    for letter, side in (("A", a), ("B", b)):
        if side is not None:
            size = f", {side.sides[1]}x{side.sides[0]}" if side.sides else ""
            count = [f"{side.n:,} {'images' if side.images else 'features'}{size}"] if side.n else []
            if side.statistics:
                number = f"{side.statistics_n:,}" if side.statistics_n else "an unrecorded number of"
                count.append(f"statistics of {number} images")
            print(f"{letter}: {side.name}: {', '.join(count)}")
    if network is not None:
        print(f"by {network.title}")


def tell(label, value, network, level):
    """Print one figure, and of what features it is."""
    seen = "given features"
    if isinstance(network, metrics.Inception):
        seen = f"Inception, {metrics.LEVELS[level]:,} features"
    elif network is not None:
        seen = f"{network.title}, not of Inception: no figure of papers"
    print(f"{label:28}{value:>22}   ({seen})")


def frechet(label, a, b, level, network):
    """Print and return a Frechet distance, under its famous name where it has one."""
    value = metrics.frechet_distance(a.at(level), b.at(level))
    famous = isinstance(network, metrics.Inception) and level in ("2048", "spatial")
    tell(label if famous else "Frechet distance", f"{value:.6g}", network, level)
    return value


def measure_fid(a, b, level, network, args):
    """Frechet distance; with Inception's 2048 features, the FID."""
    return {"fid": frechet("FID", a, b, level, network)}


def measure_sfid(a, b, level, network, args):
    """Frechet distance of a map of Inception that still knows where, as in ADM."""
    return {"sfid": frechet("sFID", a, b, "spatial", network)}


def measure_fid_infinity(a, b, level, network, args):
    """Frechet distance extrapolated to endlessly many images of A."""
    value, line = metrics.frechet_infinity(a.rows(level, "fid-infinity"), b.at(level), seed=args.seed)
    tell(f"extrapolated, N {line[0][0]:,}-{line[-1][0]:,}", f"{value:.6g}", network, level)
    return {"fid-infinity": value}


def measure_is(a, b, level, network, args):
    """Inception score of A, by both conventions of splitting."""
    rows, device = a.rows(network.level, "is"), next(network.parameters()).device

    def head(x):
        return network.logits(x.to(device))

    shuffled = metrics.inception_score(rows, seed=2020, head=head)
    chunks = metrics.inception_score(rows, chunk=5000, head=head)
    tell("IS, 10 shuffled splits", f"{shuffled[0]:.6g} +- {shuffled[1]:.3g}", network, network.level)
    tell("IS, ADM: 5,000 in a row", f"{chunks[0]:.6g}", network, network.level)
    return {"is": shuffled[0], "is_std": shuffled[1], "is_adm": chunks[0]}


def measure_kid(a, b, level, network, args):
    """Squared MMD under a cubic kernel, times 1000, of 100 subsets of 1,000."""
    x, y = b.rows(level, "kid"), a.rows(level, "kid")
    size = min(1000, len(x), len(y))
    if size == len(x) == len(y):                     # then all subsets are the same
        mean, std = metrics.polynomial_mmd(x, y), 0.0
        tell(f"KID x1000, all {size:,}", f"{1000 * mean:.5g}", network, level)
    else:
        mean, std = metrics.kid(x, y, size=size)
        tell(f"KID x1000, subsets of {size:,}", f"{1000 * mean:.5g} +- {1000 * std:.3g}", network, level)
    return {"kid": mean, "kid_std": std}


def measure_prdc(a, b, level, network, args):
    """Precision and recall (k = 3), density and coverage (k = 5)."""
    found = metrics.prdc_by_k(b.rows(level, "prdc"), a.rows(level, "prdc"), [3, 5])
    figures = {name: found[3 if name in ("precision", "recall") else 5][name] for name in found[3]}
    for name, value in figures.items():
        tell(f"{name}, k = {3 if name in ('precision', 'recall') else 5}", f"{value:.4f}", network, level)
    return figures


def measure_cmmd(a, b, level, network, args):
    """Squared MMD under a Gaussian kernel, times 1000; CMMD with CLIP's features."""
    value = metrics.cmmd(b.rows(level, "cmmd"), a.rows(level, "cmmd"))
    tell("CMMD's formula", f"{value:.6g}", network, level)
    return {"cmmd": value}


def measure_pairs(a, b, level, network, args):
    """PSNR, SSIM, and with --lpips LPIPS, of A's images against B's, one by one."""
    if not a.images or not b.images or (a.n, a.sides) != (b.n, b.sides):
        raise ValueError("images are compared one by one only if A and B hold equally many of one size, not "
                         f"{a.n:,} of {a.sides} and {b.n:,} of {b.sides}")
    lpips, scores = metrics.load_lpips(*args.lpips).to(args.device) if args.lpips else None, {}
    for begin in tqdm(range(0, a.n, args.batch), desc="image by image", unit=" batches", delay=2, leave=False):
        originals, images = (side.images(begin, min(args.batch, a.n - begin)).to(args.device) for side in (b, a))
        for name, values in metrics.compared(originals, images, lpips).items():
            scores.setdefault(name, []).append(values.cpu())
    figures = {name: torch.cat(values).mean().item() for name, values in scores.items()}
    for name, value in figures.items():
        print(f"{name.upper():28}{value:22.6g}   ({PAIRS[name]}, mean over images)")
    return figures


PAIRS = {"psnr": "dB, 8 bits", "ssim": "Gaussian window, sigma 1.5, 11 taps, 8 bits", "lpips": "version 0.1"}
METRICS = {"fid": measure_fid, "sfid": measure_sfid, "is": measure_is, "kid": measure_kid, "prdc": measure_prdc,
           "fid-infinity": measure_fid_infinity, "cmmd": measure_cmmd, "pairs": measure_pairs}


def remarks(a, b, level, network):
    """What a reader must know before comparing the figures with others: sentences."""
    sides = [side for side in (a, b) if side is not None]
    found = [remark for side in sides for remark in side.remarks]
    for side in sides:
        n = side.counted(level) or side.n
        if network is not None and 0 < n < 2048:
            found.append(f"{side.name} has N = {n:,} < 2,048: Inception's covariance is then singular, and a Frechet "
                         "distance far too high; compare only with figures of the same N")
        if side.statistics and not side.network:
            found.append(f"{side.name} does not tell its convention: figures against it are right only if it was made "
                         "by the one used here")
    if b is None or network is None:
        return found
    if a.n >= 2048 and a.n != 50_000:
        found.append(f"papers quote 50,000 generated images, here are {a.n:,}: a Frechet distance falls with N, so "
                     "compare only with figures of the same N")
    if b.split == "test":
        found.append("B is the test split: papers compare with the training images, and figures against test images "
                     "are higher")
    if a.sides and b.sides and a.sides != b.sides:
        found.append(f"A is {a.sides[1]}x{a.sides[0]} and B {b.sides[1]}x{b.sides[0]}: each is resized on its own, "
                     "and that is measured too")
    return found


def write_statistics(path, side, level, network):
    """The statistics of a side, in float64, as other tools read them: mu and sigma (pytorch-fid), of Inception also
    mu_s and sigma_s, and up to 10,000 images as arr_0, spread over the set (ADM's evaluator); beside them n, and
    network, the key of what looked."""
    arrays = {"n": np.array(side.n), "network": np.array(network.key)}
    for name, end in ((level, ""), ("spatial", "_s")):
        if name in side.features:
            found = metrics.statistics(side.features[name])
            arrays |= {f"mu{end}": found.mu.numpy(), f"sigma{end}": found.sigma.numpy()}
    images = side.features["images"]
    header = {"descr": "|u1", "fortran_order": False, "shape": (sum(map(len, images)), *images[0].shape[1:])}

    def save(partial):
        with zipfile.ZipFile(partial, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for block in images:
                    file.write(block.tobytes())

    runs.write(path, save)
    print(f"statistics of {side.n:,} images, and {header['shape'][0]:,} of the images: {path}")
