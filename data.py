"""Datasets: images in memory (or in a memory-mapped file), batches as a pure function of (seed, step).

    data = load("shapes", size=32)                            # or cifar10, cifar100, imagenet64, folder
    indices, flips = data.plan(step=0, batch=128, seed=0)     # which images, mirrored or not
    x, y = data.gather(indices, flips)                        # (B, C, H, W) float32 in [-1, 1], (B,) int64

There are no worker processes: a set lives in memory as bytes, so a batch is one indexing operation. And there
is no loader state: the batch of step k can be asked for directly, so a resumed run sees exactly the batches
that it would have seen, and ranks and micro-batches take slices of one plan.

Contents: Dataset; text; sizes; shapes (drawn, no download); moving-shapes, turntable, tones (made here); cifar10,
cifar100; imagenet64; folder (your own images); load.
"""

import difflib
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import pickle
import re
import tarfile
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from layers import Text, pair

# ---- Dataset -----------------------------------------------------------------------------------------------


@dataclass
class Dataset:
    """N labelled images (or clips, or sounds), and the order in which training visits them."""

    images: torch.Tensor | np.memmap | list     # uint8 (N, C, sides); a tensor on `device`, a memory-mapped file, or a
    #                                             list of (C, H_i, W_i); if twice as many as labels, each image a second
    #                                             time as a square, and every draw takes either
    labels: torch.Tensor                 # int64 (N,), in [0, len(classes)); all 0 where there are no classes
    classes: list[str]                   # class names; [] for a folder without classes
    captions: list[str] | None = None    # one per image
    flip: bool = False                   # mirror half of the images in training batches
    device: str | torch.device = "cpu"   # where batches are wanted
    files: list[Path] | None = None      # of a folder, one per image
    text: torch.Tensor | list[Path] | None = None        # what `with_text` made of the captions
    text_length: int = 0
    budget: int = 0                      # of images of mixed sizes: at most budget x budget pixels
    _orders: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.labels = torch.as_tensor(self.labels)

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        """The same, with its images and labels on the device; a memory-mapped file stays where it is."""
        self.device, self.labels = device, self.labels.to(device)
        if isinstance(self.images, list):
            self.images = [image.to(device) for image in self.images]
        elif not isinstance(self.images, np.memmap):
            self.images = self.images.to(device)
        return self

    def checksum(self):
        """A number that tells this content from another of equal size: CRC-32 of all labels and of up to 256 images
        spread over the set."""
        crc = zlib.crc32(self.labels.cpu().numpy().tobytes())
        for i in range(0, len(self.images), max(1, len(self.images) // 256)):
            crc = zlib.crc32(torch.as_tensor(self.images[i]).cpu().numpy().tobytes(), crc)
        return crc

    @property
    def shape(self):
        """(C, *sides) of an image; with mixed sizes the largest square."""
        return (self.images[0].shape[0], self.budget, self.budget) if self.budget else tuple(self.images.shape[1:])

    @property
    def kind(self):
        """What it holds, in a word."""
        return {2: "images", 3: "clips", 1: "sounds"}[len(self.shape) - 1]

    def _order(self, seed, epoch):
        """The permutation of the N images in one epoch. The last two are kept: batches straddle epochs."""
        if (seed, epoch) not in self._orders:
            if len(self._orders) == 2:
                del self._orders[next(iter(self._orders))]
            self._orders[seed, epoch] = np.random.default_rng([seed, epoch]).permutation(len(self))
        return self._orders[seed, epoch]

    def plan(self, step, batch, seed):
        """The images of a step's batch, as CPU tensors: (indices int64 (batch,), flips bool (batch,)).

        A pure function of its arguments, integers >= 0. The batches of all steps in a row form one endless
        sequence in which each epoch is a fresh permutation of the N images; a batch may exceed N.
        """
        position = step * batch + np.arange(batch)
        epochs, places = position // len(self), position % len(self)
        indices = np.empty(batch, np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            indices[here] = self._order(seed, epoch)[places[here]]
        rng = np.random.default_rng([seed, step, 1])
        flips = rng.random(batch) < (0.5 if self.flip else 0)
        if len(self.images) > len(self):
            indices += len(self) * (rng.random(batch) < 0.5)
        return torch.from_numpy(indices), torch.from_numpy(flips)

    def gather(self, indices, flips=None):
        """The images and labels at `indices` (B,), mirrored left-right where `flips` (B,) is true.

        Returns (x float32 (B, C, H, W) in [-1, 1], y int64 (B,)), both on the dataset's device. After `with_text` y is
        byte tokens int64 (B, L), or a Text. Images of mixed sizes: x is a list of (C, H_i, W_i).
        """
        indices = torch.as_tensor(indices)
        if self.budget:
            flips = torch.zeros(len(indices), dtype=torch.bool) if flips is None else torch.as_tensor(flips)
            x = [self.images[i].float().div(127.5).sub(1) for i in indices.tolist()]
            return [image.flip(-1) if flip else image for image, flip in zip(x, flips.tolist())], self.condition(
                indices % len(self))
        if isinstance(self.images, np.ndarray):      # read in file order, which a disk prefers
            ordered, back = indices.cpu().unique(return_inverse=True)
            x = torch.from_numpy(self.images[ordered.numpy()])[back].to(self.device)
        else:
            x = self.images.index_select(0, indices.to(self.images.device))     # (B, C, H, W) uint8
        if flips is not None:
            rows = torch.as_tensor(flips).nonzero()[:, 0].to(x.device)
            x[rows] = x[rows].flip(-1)
        return x.float().div_(127.5).sub_(1), self.condition(indices)

    def condition(self, indices):
        """What a model is told of the images at `indices` (B,) CPU: labels (B,), byte tokens (B, L) or a Text."""
        if isinstance(self.text, list):
            return read_embeddings([self.text[i] for i in indices.tolist()], self.text_length).to(self.device)
        if self.text is not None:
            return self.text[indices.to(self.text.device)].long()
        return self.labels[indices.to(self.labels.device)]

    def with_text(self, how, length):
        """From now on batches carry text. how: "bytes", byte tokens of the captions, or where there are none of the
        class names; "npz", precomputed embeddings x.npz beside x.jpg. length: the longest text in tokens."""
        self.text_length = length
        if how == "npz":
            if not self.files:
                raise ValueError("precomputed text needs --data folder with a file x.npz beside every x.jpg")
            self.text = [path.with_suffix(".npz") for path in self.files]
            if missing := [path for path in self.text if not path.exists()]:
                raise FileNotFoundError(f"{len(missing)} of {len(self.text)} images have no embedding beside them, "
                                        f"the first missing is {missing[0]}")
        else:
            self.captions = self.captions or [self.classes[k] if self.classes else "" for k in self.labels.tolist()]
            self.text = byte_tokens(self.captions, length).to(self.device)
        return self

    def subset(self, pattern):
        """The images whose caption (or else class name) the regular expression finds, as a Dataset; ValueError if there
        are none."""
        try:
            rule = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        words = self.captions or [self.classes[k] if self.classes else "" for k in self.labels.tolist()]
        keep = [i for i, word in enumerate(words) if rule.search(word)]
        if not keep:
            raise ValueError(f"no caption or class name of the {len(self)} images matches {pattern!r}, the first is "
                             f"{words[0]!r}")
        take = lambda items: items and [items[i] for i in keep]
        if self.budget:
            images = [self.images[i + n] for n in range(0, len(self.images), len(self)) for i in keep]
        else:
            images = self.images[keep]
        return Dataset(images, self.labels[keep], self.classes, take(self.captions), self.flip, self.device,
                       take(self.files), budget=self.budget)


# ---- text: captions as bytes, or as embeddings computed beforehand -------------------------------------------

START = 2                           # ASCII's "start of text"; 0 is padding, and the empty caption is START alone


def byte_tokens(captions, length):
    """Captions as uint8 (n, L): START, the caption in UTF-8, zeros. L is the longest, at most `length`; the rest of a
    longer caption is cut."""
    rows = [bytes([START]) + caption.encode()[:length - 1] for caption in captions]
    L = max(map(len, rows))
    return torch.tensor([list(row.ljust(L, b"\0")) for row in rows], dtype=torch.uint8)


def read_embeddings(paths, length):
    """A Text of n precomputed captions, cut to `length` tokens and padded to the longest. Each .npz holds
    `caption_feature`, floats (L, D) or (1, L, D) of any width D, and optionally `attention_mask` (L,) or (1, L), 1 for
    a token."""
    rows = []
    for path in paths:
        with _blame(path, "it must hold `caption_feature` (L, D) and, optionally, `attention_mask` (L,)"):
            with zipfile.ZipFile(path) as archive:
                tokens = _small_array(archive, "caption_feature")
                tokens = torch.from_numpy(tokens.reshape(-1, tokens.shape[-1]).astype(np.float32))
                mask = np.ones(len(tokens))
                if "attention_mask.npy" in archive.namelist():
                    mask = _small_array(archive, "attention_mask").reshape(-1) != 0
            if len(mask) != len(tokens) or not mask[:length].any():
                raise ValueError(f"its mask of {len(mask)} does not fit its {len(tokens)} tokens, or it has no token")
            rows.append((tokens[:length], torch.from_numpy(mask[:length]).bool()))
    pad = torch.nn.utils.rnn.pad_sequence
    return Text(pad([tokens for tokens, _ in rows], True), pad([mask for _, mask in rows], True))


def _small_array(archive, name):
    """An array of numbers inside an npz, of at most 16 MB."""
    stream, shape, dtype = open_array(archive, name)
    if dtype.kind not in "fiub" or math.prod(shape) * dtype.itemsize > 2**24:
        raise ValueError(f"`{name}` is {dtype} {shape}, not real numbers of at most 16 MB")
    return np.frombuffer(stream.read(), dtype).reshape(shape)


# ---- sizes that keep aspect ratios ------------------------------------------------------------------------


def fit_size(width, height, size, stride):
    """(width, height) that an image is resized to in FiT, 2402.12376: at most size x size pixels in its own aspect
    ratio, never enlarged unless a side is shorter than the stride, sides rounded down to multiples of the stride."""
    w, h = width, height
    if width * height >= size**2:
        w = math.sqrt(width / height) * size
        h = w * height / width
    elif width < stride:
        w, h = stride, stride * height / width
    elif height < stride:
        w, h = stride * width / height, stride
    return int(w / stride) * stride, int(h / stride) * stride


def crop_sizes(patches, stride, max_ratio=4.0):
    """The (width, height) of Lumina-T2X, 2405.05945: the largest grids of at most so many patches, each `stride` pixels
    wide, no longer than max_ratio times their width, from the widest to the tallest."""
    sizes, w, h = [], patches, 1
    while w > 0:
        if max(w, h) <= max_ratio * min(w, h):
            sizes.append((w * stride, h * stride))
        w, h = (w, h + 1) if (h + 1) * w <= patches else (w - 1, h)
    return sizes


def fitting_crop(picture, size, stride, rng):
    """A picture as uint8 (3, H, W) as in Lumina-T2X: one of the four `crop_sizes` of size x size pixels that lose the
    least of it, shrunk or enlarged until it covers that size, cut at a random place."""
    (w, h), choices = picture.size, crop_sizes((size // stride) ** 2, stride)
    reach = lambda side: min(w / side[0], h / side[1])                      # pixels of the picture for one of the crop
    best = sorted(choices, key=lambda side: -side[0] * side[1] * reach(side) ** 2)[:4]
    side = best[rng.integers(len(best))]
    wide, high = (pixels * reach(side) for pixels in side)
    left, top = rng.random(2) * (w - wide, h - high)
    picture = picture.resize(side, Image.BICUBIC, box=(left, top, min(w, left + wide), min(h, top + high)))
    return np.array(picture).transpose(2, 0, 1)


# ---- shapes: the dataset that is always there -------------------------------------------------------------

SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent"]
SIZES = ["small", "medium", "large"]
COLOURS = {"red": (0.90, 0.16, 0.18), "orange": (1.00, 0.55, 0.08), "yellow": (0.98, 0.86, 0.15),
           "green": (0.20, 0.72, 0.28), "turquoise": (0.16, 0.78, 0.78), "blue": (0.18, 0.40, 0.92),
           "purple": (0.56, 0.24, 0.78), "pink": (0.98, 0.52, 0.72)}
GROUNDS = {"black": (0.06, 0.06, 0.07), "white": (0.96, 0.96, 0.96), "dark blue": (0.07, 0.11, 0.30),
           "dark green": (0.05, 0.24, 0.15), "light grey": (0.78, 0.79, 0.81), "cream": (0.97, 0.92, 0.78)}
SPLITS = {"train": range(20_000), "test": range(1_000_000, 1_005_000)}


def _contrast(a, b):
    """How well two RGB colours can be told apart: by brightness and, at a third of the weight, by hue."""
    difference = np.array(a) - np.array(b)
    return abs(difference @ [0.30, 0.59, 0.11]) + 0.35 * abs(difference).max()


PAIRS = np.array([(i, j) for i, colour in enumerate(COLOURS) for j, ground in enumerate(GROUNDS)
                  if _contrast(COLOURS[colour], GROUNDS[ground]) > 0.45])


def distance(shape, x, y):
    """Signed distance from points (x, y) to a shape's outline, negative inside. Shapes fill the unit circle.

    Built from + - * / sqrt abs min max only, which every machine rounds alike.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 0.9
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.70
    if shape == "triangle":
        return np.maximum(abs(x) * math.sqrt(0.75) + y * 0.5, -y) - 0.5
    if shape == "star":          # fold the plane into a tenth of the star: there its outline is one line
        c, s = math.cos(math.pi / 5), math.sin(math.pi / 5)
        x = abs(x)
        d = 2 * np.maximum(c * x - s * y, 0)
        x, y = x - c * d, y + s * d
        d = 2 * np.maximum(-c * x - s * y, 0)
        x, y = abs(x + c * d), y + s * d
        a, b = 1 - 0.55 * c, 0.55 * s            # the line from the tip (0, 1) to the notch 0.55 (s, c)
        return (a * x + b * (y - 1)) / math.hypot(a, b)
    if shape == "ring":
        return abs(np.sqrt(x * x + y * y) - 0.72) - 0.21
    if shape == "cross":
        x, y = abs(x), abs(y)
        return np.maximum(np.maximum(x, y) - 0.94, np.minimum(x, y) - 0.27)
    if shape == "heart":         # a square on its corner, and half a disc on each of its upper sides
        x, y = abs(x), y + 0.2
        diamond = (x + abs(y)) * math.sqrt(0.5) - 0.56
        return np.minimum(diamond, np.sqrt((x - 0.396) ** 2 + (y - 0.396) ** 2) - 0.56)
    if shape == "crescent":
        return np.maximum(np.sqrt(x * x + y * y) - 0.95, 0.75 - np.sqrt((x - 0.48) ** 2 + y * y))
    raise ValueError(f"no shape is called {shape!r}: choose from {', '.join(SHAPES)}")


def _uniform(index, channel):
    """A number in [0, 1) from (index, channel) alone: the output function of the splitmix64 generator."""
    z = (index * np.uint64(64) + channel + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def render(indices, size):
    """Draw images of an endless collection: image i depends on i alone, and is the same picture at any size.

    size: int, or (height, width): the shape is as large as in a square of the shorter side, anywhere in the image.
    Returns (images uint8 (n, 3, H, W), labels int64 (n,) into SHAPES, attributes int64 (n, 3) into
    SIZES, COLOURS and GROUNDS). Edges are one pixel soft: a pixel shows how much of it the shape covers.
    """
    index = np.asarray(indices, np.uint64)
    u = _uniform(index[:, None], np.arange(16, dtype=np.uint64))                # (n, 16)
    label = (index % np.uint64(len(SHAPES))).astype(np.int64)
    colour, ground = PAIRS[(u[:, 0] * len(PAIRS)).astype(int)].T
    word = (u[:, 1] * len(SIZES)).astype(int)
    radius = 0.58 + 0.10 * word + 0.05 * u[:, 2]                                # the image is [-1, 1] wide
    H, W = pair(size)
    short = min(H, W)
    room = np.array([W / short - 1, H / short - 1]) + 0.89                      # beyond the square: more to either side
    centre = (2 * u[:, 3:5] - 1) * (room - radius[:, None])
    turn = 2 * np.pi / 9 * (u[:, 5] - 0.5)                                      # up to 20 degrees either way
    slope = 0.10 * (u[:, 6:8] - 0.5)                                            # the ground's soft gradient
    ink = np.array(list(COLOURS.values()))[colour] + 0.10 * (u[:, 8:11] - 0.5)
    paper = np.array(list(GROUNDS.values()))[ground] + 0.06 * (u[:, 11:14] - 0.5)

    per_image = np.cos(turn), np.sin(turn), radius, *centre.T, *slope.T
    cos, sin, r, cx, cy, gx, gy = (np.float32(a)[:, None, None] for a in per_image)     # (n, 1, 1) each
    ink, paper = (np.float32(a)[:, :, None, None] for a in (ink, paper))                # (n, 3, 1, 1)
    across, down = ((np.arange(side, dtype=np.float32) + 0.5) * (2 / short) - side / short for side in (W, H))

    images = np.empty((len(index), 3, H, W), np.uint8)
    chunk = max(1, 2**15 // (H * W))                    # so few that they stay in the processor's cache
    with tqdm(total=len(index), desc=f"drawing {H}x{W} shapes", delay=2, leave=False) as bar:
        for k, shape in enumerate(SHAPES):
            rows = np.flatnonzero(label == k)
            for i in (rows[start:start + chunk] for start in range(0, len(rows), chunk)):
                x, y = (across - cx[i]) / r[i], (-down[:, None] - cy[i]) / r[i]
                d = distance(shape, cos[i] * x + sin[i] * y, cos[i] * y - sin[i] * x) * r[i]
                cover = np.clip(0.5 - d * (short / 2), 0, 1)[:, None]                   # (n, 1, H, W)
                back = paper[i] + (gx[i] * across + gy[i] * down[:, None])[:, None]     # (n, 3, H, W)
                images[i] = np.clip(back + cover * (ink[i] - back), 0, 1) * 255 + 0.5
                bar.update(len(i))
    return images, label, np.stack([word, colour, ground], 1)


def caption(label, attributes):
    """The words for one image of `render`, such as "a small red star on dark blue"."""
    size, colour, ground = attributes
    return f"a {SIZES[size]} {list(COLOURS)[colour]} {SHAPES[label]} on {list(GROUNDS)[ground]}"


def shapes(data_dir, split, stride=1, *, size: int | tuple = 16, flip=False, aspect="square"):
    """Drawn here, no download: 8 shapes with captions, any size, 20,000 train + 5,000 test.

    size: a side, or (H, W). aspect: "square"; "keep": images of all ratios, of at most size x size pixels, sides
    multiples of the stride (FiT); "mixed": half of the draws of large images are squares (FiTv2).
    """
    _check("aspect", aspect, ("square", "keep", "mixed"))
    if aspect == "square":
        images, labels, captions = _shapes(split, size)
        return Dataset(torch.from_numpy(images), labels, list(SHAPES), captions, flip)
    images, labels, captions = _mixed_shapes(split, size, stride, aspect == "mixed")
    return Dataset(images, labels, list(SHAPES), captions, flip, budget=size)


def _shapes(split, size):
    images, labels, attributes = render(SPLITS[split], size)
    return images, labels, [caption(*row) for row in zip(labels, attributes, strict=True)]


def native_size(index, size):
    """The (width, height) of image `index` as if it were one of a collection of photographs: ratios from 5:8 to 8:5,
    areas from 0.56 to 1.56 times size x size, most of which `fit_size` then makes smaller."""
    ratio, scale = _uniform(np.uint64(index), np.array([20, 21], np.uint64))
    side, root = size * (0.75 + 0.5 * scale), 1.6 ** (ratio - 0.5)
    return round(side * root), round(side / root)


def _mixed_shapes(split, size, stride, squares):
    """The shapes as a list of images of many sizes; with squares also each as a square. Else as `_shapes`."""
    numbers, by_size, images = SPLITS[split], {}, [None] * len(SPLITS[split])
    for place, i in enumerate(numbers):
        by_size.setdefault(fit_size(*native_size(i, size), size, stride), []).append(place)
    for (w, h), places in by_size.items():
        for place, image in zip(places, render(np.array(numbers)[places], (h, w))[0]):
            images[place] = torch.from_numpy(image)
    square, *rest = _shapes(split, size // stride * stride)
    return images + [torch.from_numpy(image) for image in square] * squares, *rest


# ---- moving-shapes, turntable, tones: clips, views and sounds, made here --------------------------------------

FEW = {"train": range(4096), "test": range(1_000_000, 1_000_512)}
FRAMES = 6
MOVEMENTS = ["moves to the right", "moves to the left", "moves up", "moves down", "grows", "shrinks"]


def _attributes(index, first=0):
    """(numbers (n, 8) in [0, 1), colours (n, 3), grounds (n, 3), their indices (n, 2)) of the things `index` (n,)."""
    u = _uniform(np.asarray(index, np.uint64)[:, None], np.arange(first, first + 8, dtype=np.uint64))
    pairs = PAIRS[(u[:, 7] * len(PAIRS)).astype(int)]
    ink, paper = (np.array(list(table.values()), np.float32)[k] for table, k in zip((COLOURS, GROUNDS), pairs.T))
    return u, ink, paper, pairs


def a(words):
    """The words after "a" or "an"."""
    return f"a{'n' * (words[0] in 'aeiou')} {words}"


def _painted(cover, ink, paper):
    """Colours blended by cover (n, ...) in [0, 1], ink and paper (n, 3) -> uint8 (n, 3, ...)."""
    shaped = lambda c: c.reshape(*c.shape, *[1] * (cover.ndim - 1))
    return (np.clip(shaped(paper) + cover[:, None] * (shaped(ink) - shaped(paper)), 0, 1) * 255 + 0.5).astype(np.uint8)


def render_clips(indices, size):
    """Clips of one shape on the move: (images uint8 (n, 3, F, size, size), labels (n,) into MOVEMENTS, captions)."""
    index = np.asarray(indices)
    u, ink, paper, pairs = _attributes(index, 24)
    label, shape = index % len(MOVEMENTS), (u[:, 0] * len(SHAPES)).astype(int)
    s = np.linspace(-1, 1, FRAMES, dtype=np.float32)[None]                                       # (1, F)
    along = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (0, 0), (0, 0)])[label]                  # (n, 2)
    swell = np.array([0, 0, 0, 0, 1, -1])[label][:, None]
    radius = 0.45 + 0.08 * u[:, 1:2] + 0.22 * swell * s                                          # (n, F)
    x, y = (0.45 * along[:, k:k + 1] * s + 0.5 * (u[:, 2 + k:3 + k] - 0.5) * (along[:, k:k + 1] == 0) * (swell == 0)
            for k in (0, 1))
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    images = np.empty((len(index), 3, FRAMES, size, size), np.uint8)
    for k, name in enumerate(SHAPES):
        for rows in np.array_split(i := np.flatnonzero(shape == k), max(1, len(i) // 64)):
            r, cx, cy = (np.float32(v[rows])[:, :, None, None] for v in (radius, x, y))          # (n, F, 1, 1)
            d = distance(name, (axis - cx) / r, (-axis[:, None] - cy) / r) * r
            images[rows] = _painted(np.clip(0.5 - d * (size / 2), 0, 1), ink[rows], paper[rows])
    words = list(COLOURS), list(GROUNDS)
    captions = [f"{a(words[0][c])} {SHAPES[k]} {MOVEMENTS[m]} on {words[1][g]}"
                for k, m, (c, g) in zip(shape, label, pairs)]
    return images, label.astype(np.int64), captions


def _prism(sides, radius, half):
    """The half-spaces n.p <= b of an upright prism, as rows (nx, ny, nz, b)."""
    angles = 2 * np.pi / sides * np.arange(sides)
    around = np.stack([np.cos(angles), 0 * angles, np.sin(angles), 0 * angles + radius], 1)
    return np.concatenate([around, [(0, 1, 0, half), (0, -1, 0, half)]])


def _slanted(planes, count):
    """`count` slanted faces around the axis over a base: rows of half-spaces, leaning by `planes` = (rise, b)."""
    angles = 2 * np.pi / count * np.arange(count)
    c = 1 / math.hypot(1, planes[0])
    return np.stack([c * np.cos(angles), 0 * angles + c * planes[0], c * np.sin(angles), 0 * angles + planes[1]], 1)


SOLIDS = {
    "cube": _prism(4, 0.52, 0.52), "slab": _prism(4, 0.72, 0.2), "prism": _prism(3, 0.42, 0.62),
    "pyramid": np.concatenate([_slanted((0.55, 0.36), 4), [(0, -1, 0, 0.55)]]),
    "octahedron": np.concatenate([_slanted((0.75, 0.46), 4), _slanted((-0.75, 0.46), 4)]),
    "house": np.concatenate([_prism(4, 0.45, 0.6)[[0, 2, 5]], [(0, 0, 1, 0.62), (0, 0, -1, 0.62)],
                             [(0.7071, 0.7071, 0, 0.42), (-0.7071, 0.7071, 0, 0.42)]]),
}


def render_views(indices, size):
    """FRAMES views of one solid on a turntable, 60 degrees apart, from 25 degrees above: (images uint8
    (n, 3, F, size, size), labels (n,) into SOLIDS, captions). Each ray meets a convex solid where it has entered the
    last half-space and left none; the face it enters by gives the shade. Four rays a pixel."""
    index = np.asarray(indices)
    u, ink, paper, pairs = _attributes(index, 32)
    label, names = index % len(SOLIDS), list(SOLIDS)
    axis = (np.arange(2 * size) + 0.5) / size - 1
    x, y = np.meshgrid(axis, -axis)                                                              # the screen
    c, s = math.cos(math.radians(25)), math.sin(math.radians(25))
    ray, light = np.array([0, -s, -c]), np.array([0.45, 0.75, 0.48])
    start = np.stack([x, c * y, -s * y], -1).reshape(-1, 3) - 2 * ray                            # (P, 3)
    images = np.empty((len(index), 3, FRAMES, size, size), np.uint8)
    for place in tqdm(range(len(index)), desc="drawing views", delay=2, leave=False):
        turn = 2 * np.pi * (u[place, 0] + np.arange(FRAMES) / FRAMES)[:, None]
        faces = SOLIDS[names[label[place]]]
        nx, nz = (np.cos(turn) * faces[:, 0] + np.sin(turn) * faces[:, 2],
                  np.cos(turn) * faces[:, 2] - np.sin(turn) * faces[:, 0])
        normal = np.stack([nx, np.broadcast_to(faces[:, 1], nx.shape), nz], -1).astype(np.float32)    # (F, faces, 3)
        slope, gap = normal @ np.float32(ray), np.float32(faces[:, 3]) - np.float32(start) @ normal.mT   # (F, P, faces)
        meet, enters = gap / slope[:, None], (slope < 0)[:, None]
        near = np.where(enters, meet, -np.inf)
        hit = near.max(-1) < np.where(enters, np.inf, meet).min(-1)
        shade = 0.35 + 0.75 * np.maximum(np.take_along_axis(normal @ np.float32(light), near.argmax(-1), 1), 0)
        pixel = np.where(hit[:, None], ink[place][:, None] * shade[:, None], paper[place][:, None])    # (F, 3, P)
        pixel = np.clip(pixel, 0, 1).reshape(FRAMES, 3, size, 2, size, 2).mean((3, 5))
        images[place] = (pixel * 255 + 0.5).swapaxes(0, 1)
    words = list(COLOURS), list(GROUNDS)
    captions = [f"{a(words[0][c])} {names[k]} turning on {words[1][g]}" for k, (c, g) in zip(label, pairs)]
    return images, label.astype(np.int64), captions


RATE, WINDOW, HOP, BANDS = 8000, 512, 128, 48       # samples a second, of a Fourier transform, between two; mel bands
DECIBELS = 60.0                                     # a spectrogram's -1 is so far below its 1
MELODIES = {"rising": (0, 1, 2, 3, 4, 5), "falling": (5, 4, 3, 2, 1, 0), "arching": (0, 2, 4, 4, 2, 0),
            "dipping": (4, 2, 0, 0, 2, 4), "jumping": (0, 4, 0, 4, 0, 4), "steady": (2, 2, 2, 2, 2, 2)}
# (multiples of the fundamental, their amplitudes, decay per second)
INSTRUMENTS = {"flute": ((1, 2), (1.0, 0.1), 1.0), "organ": ((1, 2, 3, 4), (0.6, 0.4, 0.3, 0.2), 0.0),
               "bell": ((1, 2.76, 5.4), (0.8, 0.4, 0.2), 12.0)}


def mel_filters():
    """Triangles on the mel scale, 2595 log10(1 + f/700), (BANDS, WINDOW/2 + 1)."""
    mel = np.linspace(2595 * np.log10(1 + 150 / 700), 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    low, middle, high = (f[:, None] for f in (lambda f: (f[:-2], f[1:-1], f[2:]))(700 * (10 ** (mel / 2595) - 1)))
    f = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    return torch.from_numpy(np.maximum(0, np.minimum((f - low) / (middle - low), (high - f) / (high - middle)))).float()


def spectrogram(waves):
    """Waves (n, samples) -> log-mel spectrograms (n, BANDS, samples/HOP) in [-1, 1], full scale to DECIBELS below."""
    S = torch.stft(waves, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs()[..., :-1]
    level = 20 * torch.log10((mel_filters() @ S / (WINDOW / 4)).clamp(min=1e-6))
    return (level / DECIBELS * 2 + 1).clamp(-1, 1)


def sound(spectrograms, rounds=60, momentum=0.99):
    """Spectrograms (n, BANDS, T) -> waves (n, T HOP) in [-1, 1]. The filters are inverted by least squares, kept
    positive; the phases by the fast Griffin-Lim algorithm (Perraudin, Balazs, Sondergaard, 2013)."""
    window, length = torch.hann_window(WINDOW), spectrograms.shape[-1] * HOP
    mel = 10 ** ((spectrograms.float().clamp(-1, 1) - 1) / 2 * DECIBELS / 20) * (WINDOW / 4)
    mel = mel * (spectrograms > -0.99)
    S = (torch.linalg.pinv(mel_filters()) @ mel).clamp(min=0)
    S = torch.cat([S, S[..., -1:]], -1)                                                          # stft's last frame
    turns = torch.rand(S.shape, generator=torch.Generator().manual_seed(0))
    z = last = S * torch.exp(2j * math.pi * turns)
    for _ in range(rounds):
        wave = torch.istft(z, WINDOW, HOP, window=window, length=length)
        now = torch.stft(wave, WINDOW, HOP, window=window, return_complex=True)
        push = now + momentum * (now - last)
        z, last = S * push / push.abs().clamp(min=1e-8), now
    wave = torch.istft(z, WINDOW, HOP, window=window, length=length)
    return wave / wave.abs().amax(-1, keepdim=True).clamp(min=1)


def play(indices, steps):
    """Melodies of six notes on a pentatonic scale: (images uint8 (n, BANDS, steps), labels (n,) into MELODIES,
    captions)."""
    index = np.asarray(indices)
    u, *_ = _attributes(index, 40)
    label, instrument = index % len(MELODIES), (u[:, 0] * len(INSTRUMENTS)).astype(int)
    time = np.arange(steps * HOP) / RATE
    note, into = np.divmod(time, steps * HOP / RATE / 6)
    degrees = np.array(list(MELODIES.values()))[label][:, note.astype(int).clip(0, 5)]           # (n, samples)
    root = 220 * 2 ** (u[:, 1] * 7 // 1 / 12)                                                    # semitones above A3
    frequency = root[:, None] * 2 ** (np.array([0, 2, 4, 7, 9, 12])[degrees] / 12)
    soft = np.minimum(1, np.minimum(into, steps * HOP / RATE / 6 - into) / 0.02)                 # no clicks
    waves = np.zeros(degrees.shape, np.float32)
    for k, (multiples, amplitudes, decay) in enumerate(INSTRUMENTS.values()):
        rows = instrument == k
        phase = 2 * np.pi * np.cumsum(frequency[rows], 1) / RATE
        for multiple, amplitude in zip(multiples, amplitudes):
            heard = frequency[rows] * multiple < RATE / 2
            waves[rows] += amplitude * np.sin(multiple * phase) * heard * soft * np.exp(-decay * into)
    images = spectrogram(torch.from_numpy(waves) * (0.5 + 0.3 * torch.from_numpy(u[:, 2:3]).float()))
    names = list(MELODIES), list(INSTRUMENTS)
    captions = [f"{a(names[0][m])} melody on {a(names[1][i])}" for m, i in zip(label, instrument)]
    return ((images + 1) * 127.5 + 0.5).to(torch.uint8).numpy(), label.astype(np.int64), captions


def moving_shapes(data_dir, split, *, size=16, flip=False):
    """Drawn here: clips of 6 frames with captions, 6 movements, any size, 4,096 train + 512 test."""
    images, labels, captions = render_clips(np.array(FEW[split]), size)
    return Dataset(torch.from_numpy(images), labels, MOVEMENTS, captions, flip)


def turntable(data_dir, split, *, size=16, flip=False):
    """Drawn here: 6 views around solids with captions, 6 solids, any size, 4,096 train + 512 test."""
    images, labels, captions = render_views(np.array(FEW[split]), size)
    return Dataset(torch.from_numpy(images), labels, list(SOLIDS), captions, flip)


def tones(data_dir, split, *, size=64, flip=False):
    """Played here: 1 s melodies with captions as spectrograms, 6 melodies, 4,096 train + 512 test.

    size: the length in time steps."""
    images, labels, captions = play(np.array(FEW[split]), size)
    return Dataset(torch.from_numpy(images), labels, list(MELODIES), captions, flip)


# ---- cifar10, cifar100: the original python archives -------------------------------------------------------

KRIZ = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {
    "cifar10": {"url": KRIZ + "cifar-10-python.tar.gz", "md5": "c58f30108f718f92721af3b95e74349a",
                "folder": "cifar-10-batches-py", "meta": "batches.meta", "names": "label_names",
                "train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"],
                "labels": "labels"},
    "cifar100": {"url": KRIZ + "cifar-100-python.tar.gz", "md5": "eb9058c3a382ffc7106e4002c42a8d85",
                 "folder": "cifar-100-python", "meta": "meta", "names": "fine_label_names",
                 "train": ["train"], "test": ["test"], "labels": "fine_labels"},
}


class _Unpickler(pickle.Unpickler):
    """A pickle may call any function. This reader knows the few that rebuild a numpy array, and no other."""

    allowed = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
               ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which no CIFAR file does")
        return super().find_class(module, name)


@contextmanager
def _blame(path, advice):
    """Turn whatever a damaged or foreign file makes a decoder raise into one sentence that names the file."""
    try:
        yield
    except Exception as error:                       # decoders raise nearly every type there is
        raise ValueError(f"{path} cannot be used: {error or type(error).__name__}; {advice}") from error


def _unpickle(raw):
    """The dict in the bytes of a CIFAR file, its keys as str; what Python 2 wrote as text stays bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # numpy frowns on how Python 2 described a dtype
        items = _Unpickler(io.BytesIO(raw), encoding="bytes").load().items()
    return {k.decode() if isinstance(k, bytes) else k: v for k, v in items}


def _require_md5(path, md5, advice):
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path} is not the original archive: found {path.stat().st_size:,} bytes with md5 "
                         f"{found}, expected md5 {md5}; {advice}")


def fetch(url, path, md5):
    """Download url to path + ".part", resuming what is there already; rename it once its md5 is right.

    FileNotFoundError if the network fails (run again to resume), ValueError if another file arrives.
    """
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            have = have if reply.status == 206 else 0            # a server that knows no ranges starts over
            total = have + int(reply.headers["Content-Length"] or 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            bar = tqdm(desc=path.name, initial=have, total=total, unit="B", unit_scale=True)
            with bar, open(part, "ab" if have else "wb") as file:
                while block := reply.read(2**18):
                    bar.update(file.write(block))
        if part.stat().st_size < total:
            raise ConnectionError(f"the connection broke after {part.stat().st_size:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", 0) != 416:         # 416: nothing is left to send, we had it all
            raise FileNotFoundError(f"cannot download {url} ({error}): run again to resume, or put that file "
                                    f"into {path.parent.absolute()} yourself") from error
    try:
        _require_md5(part, md5, "it was removed: run again")
    except ValueError:
        part.unlink()
        raise
    os.replace(part, path)


def _cifar_files(spec, root, wanted, download):
    """The raw bytes of the wanted files {path: bytes}: from a folder, else the archive, else the network."""
    for folder in (root / spec["folder"], root):
        if any((folder / name).is_file() for name in wanted):
            lacking = [name for name in wanted if not (folder / name).is_file()]
            if lacking:
                raise FileNotFoundError(f"{folder} lacks {', '.join(lacking)}: unpack {spec['url']} again")
            return {folder / name: (folder / name).read_bytes() for name in wanted}
    archive = root / spec["url"].rsplit("/", 1)[1]
    if archive.exists():
        _require_md5(archive, spec["md5"], "delete it and run again to download it")
    elif download:
        fetch(spec["url"], archive, spec["md5"])
    else:
        raise FileNotFoundError(f"there is no {spec['folder']} in {root.absolute()}: put {spec['url']} "
                                "there, or allow the download")
    with tarfile.open(archive, "r|gz") as tar:       # read in place: nothing is unpacked onto the disk
        found = {Path(m.name).name: tar.extractfile(m).read() for m in tar if Path(m.name).name in wanted}
    return {archive / name: found[name] for name in wanted}


def cifar10(data_dir, split, *, size=32, flip=True, download=True):
    """32x32 photographs, 10 classes, 50,000 train + 10,000 test; downloads itself (170 MB).

    size: 32, or a divisor of it: blocks of pixels are averaged. download: fetch it if it is not in data_dir."""
    return _load_cifar("cifar10", data_dir, split, size, flip, download)


def cifar100(data_dir, split, *, size=32, flip=True, download=True):
    """32x32 photographs, 100 classes, 50,000 train + 10,000 test; downloads itself (169 MB).

    Options as of `cifar10`."""
    return _load_cifar("cifar100", data_dir, split, size, flip, download)


def _load_cifar(name, root, split, size, flip, download):
    spec = CIFAR[name]
    images, labels = [], []
    for path, raw in _cifar_files(spec, root, [spec["meta"], *spec[split]], download).items():
        with _blame(path, f"found {len(raw):,} bytes, expected a file of {spec['url']}: unpack it again"):
            items = _unpickle(raw)
            if path.name == spec["meta"]:
                classes = [c.decode() if isinstance(c, bytes) else c for c in items[spec["names"]]]
                continue
            x, y = items.get("data"), items.get(spec["labels"])
            if not (isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.shape[1:] == (3072,)):
                raise ValueError("its images are no uint8 array of shape (n, 3072)")
            if not (isinstance(y, list) and len(y) == len(x)
                    and all(isinstance(k, int) and 0 <= k < len(classes) for k in y)):
                raise ValueError(f"its labels are not {len(x)} whole numbers from 0 to {len(classes) - 1}")
        images.append(shrink(x.reshape(-1, 3, 32, 32), size, name))
        labels += y
    return Dataset(torch.from_numpy(np.concatenate(images)), np.array(labels), classes, flip=flip)


def shrink(images, size, name):
    """Average blocks of pixels: uint8 (N, C, H, H) -> (N, C, size, size); ValueError if H % size."""
    n, c, h, _ = images.shape
    if h % size:
        sizes = ", ".join(str(s) for s in range(4, h + 1) if h % s == 0)
        raise ValueError(f"{name} is {h}x{h}, it cannot be {size}x{size}: choose an image size of {sizes}")
    if size == h:
        return images
    k = h // size
    total = images.reshape(n, c, size, k, size, k).sum((3, 5), np.uint32)
    return ((total + k * k // 2) // (k * k)).astype(np.uint8)


# ---- imagenet64: the downsampled npz files, converted once into a memory-mapped array ----------------------


def open_array(archive, name):
    """An array inside an npz, its header checked before any of it is unpacked: (stream, shape, dtype)."""
    info = archive.getinfo(f"{name}.npy")
    stream = archive.open(info)
    if np.lib.format.read_magic(stream) != (1, 0):               # only version 1 bounds its header, to 64 kB
        raise ValueError(f"`{name}` has a header of another version than 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    stored = info.file_size - stream.tell()
    if fortran or math.prod(shape) * dtype.itemsize != stored:
        raise ValueError(f"its header promises {dtype} {shape} as `{name}`, but {stored:,} bytes follow")
    if name == "data" and stored > 100 * info.compress_size:     # photographs hardly shrink
        raise ValueError(f"{info.compress_size:,} bytes would unpack to {stored:,}, as no photographs do")
    return stream, shape, dtype


def _npz_labels(path):
    """Labels of one npz file, counted from 0, after a check of its header: int64 (n,)."""
    with _blame(path, "download it again"), zipfile.ZipFile(path) as archive:
        _, shape, dtype = open_array(archive, "data")
        if dtype != np.uint8 or shape[1:] != (3 * 64 * 64,):
            raise ValueError(f"`data` is {dtype} {shape}, not uint8 (n, 12288)")
        stream, count, dtype = open_array(archive, "labels")
        if dtype.kind not in "iu" or count != shape[:1]:
            raise ValueError(f"`labels` is {dtype} {count}, not {shape[0]} whole numbers")
        labels = np.frombuffer(stream.read(), dtype).astype(np.int64)
        if labels.min() < 1 or labels.max() > 1000:
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}, not within 1 to 1000")
        return labels - 1


def _npz_images(path, chunk=1024):
    """The images of one npz file, a chunk at a time: uint8 (<= chunk, 3, 64, 64)."""
    with _blame(path, "download it again"), zipfile.ZipFile(path) as archive:
        stream, (n, width), _ = open_array(archive, "data")
        for start in range(0, n, chunk):
            count = min(chunk, n - start)
            yield np.frombuffer(stream.read(count * width), np.uint8).reshape(count, 3, 64, 64)


def _convert(sources, keep, size, file):
    """Write the images of npz files as one .npy of (n, 3, size, size), without those where keep is false."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (int(keep.sum()), 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)
    done = 0
    with tqdm(total=len(keep), desc="converting imagenet64 (once)", unit=" images", delay=2) as bar:
        for images in (chunk for path in sources for chunk in _npz_images(path)):
            file.write(shrink(images[keep[done:done + len(images)]], size, "imagenet64").tobytes())
            done += len(images)
            bar.update(len(images))


def imagenet64(data_dir, split, *, size=64, flip=True):
    """64x64 photographs, 1000 classes, 1.28 M train + 50,000 test; bring train_data_batch_*.npz.

    size: 64, or a divisor of it. The npz files of image-net.org's download page are converted once, into a file that is
    then memory-mapped. Without val_data.npz a twentieth is held out as the test split."""
    images, labels, classes = _load_imagenet64(data_dir, split, size)
    return Dataset(images, labels, [str(k) for k in range(classes)], flip=flip)


def _load_imagenet64(root, split, size):
    root = root / "imagenet64" if (root / "imagenet64").is_dir() else root
    train = sorted(root.glob("train_data_batch_*.npz"), key=lambda path: (len(path.name), path.name))
    val = list(root.glob("val_data.npz"))
    sources = {path.name: path.stat().st_size for path in train + val}
    made = [root / f"imagenet64_{split}_{size}{end}" for end in (".npy", "_labels.npy", ".json")]
    note = json.loads(made[2].read_text()) if all(path.exists() for path in made) else None
    if note is None or sources not in ({}, note["sources"]):     # the sources may be deleted once converted
        chosen = val if val and split == "test" else train
        if not chosen:
            raise FileNotFoundError(f"there is no train_data_batch_1.npz in {root.absolute()}: put the 64x64 "
                                    "npz files of image-net.org's download page there")
        labels = {path: _npz_labels(path) for path in train + val}
        note = {"sources": sources, "classes": 1 + max(int(y.max()) for y in labels.values())}
        y = np.concatenate([labels[path] for path in chosen])
        keep = np.ones(len(y), bool)
        if not val:                                  # the last 5 % of a fixed shuffle are the test split
            held_out = np.random.default_rng(0).permutation(len(y))[int(0.95 * len(y)):]
            keep = np.isin(np.arange(len(y)), held_out) == (split == "test")
        partial = [path.with_name(path.name + ".tmp") for path in made]
        try:
            with open(partial[0], "wb") as images_file, open(partial[1], "wb") as labels_file:
                _convert(chosen, keep, size, images_file)
                np.save(labels_file, y[keep])
            partial[2].write_text(json.dumps(note))
            made[2].unlink(missing_ok=True)          # until the note is back, nothing vouches for the rest
            for new, path in zip(partial, made, strict=True):
                os.replace(new, path)
        finally:
            for path in partial:
                path.unlink(missing_ok=True)
    with _blame(made[0], "delete it, and it is converted again"):
        images, labels = np.load(made[0], mmap_mode="r"), np.load(made[1])
    return images, labels, note["classes"]


# ---- folder: your own images -------------------------------------------------------------------------------

FORMATS = ["PNG", "JPEG", "WEBP", "BMP"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
BESIDE = {".txt", ".npz", ".json"}  # what may lie beside the images
MAX_PIXELS = 64_000_000             # a file of 20 kB can claim to be an image that fills the memory


def open_image(path):
    """An image file as a Pillow picture: upright, RGB, transparent parts white. A file that is damaged, too large or no
    image raises OSError or ValueError, or what else Pillow's decoders raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)         # our own limit is lower
        image = Image.open(path, formats=FORMATS)
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height}, more than {MAX_PIXELS // 10**6} million pixels")
        picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I"):                                            # 16 bits a pixel
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def cropped(picture, size):
    """A picture as uint8 (3, size, size): short side fitted, centre crop. Shrinks by averaging areas, enlarges
    bicubically."""
    (w, h), side = picture.size, min(picture.size)
    square = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
    picture = picture.resize((size, size), Image.BOX if side >= size else Image.BICUBIC, box=square)
    return np.asarray(picture).transpose(2, 0, 1)


def read_image(path, size):
    """An image file as uint8 (3, size, size), see `open_image` and `cropped`."""
    return cropped(open_image(path), size)


def list_images(root):
    """The image files below a folder in sorted order, without hidden ones; links to folders are followed. What is left
    out is said: other kinds of files by a warning, a folder that cannot be read by OSError."""
    found, ignored, seen = [], Counter(), set()

    def refuse(error):
        raise OSError(f"{error.filename} cannot be read ({error.strerror}): allow it, or move it out of the way")

    for here, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if real in seen:                             # a link that leads back
            folders[:] = []
            continue
        seen.add(real)
        for path in (Path(here) / name for name in names if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES and path.is_file():           # a pipe, say, would never end
                found.append(path)
            elif path.suffix.lower() not in BESIDE:
                ignored[path.suffix.lower() or "no suffix"] += 1
    if ignored:
        kinds = ", ".join(f"{count} of {suffix}" for suffix, count in ignored.most_common(5))
        warnings.warn(f"{root}: files that are no PNG, JPEG, WebP or BMP are left out: {kinds}", stacklevel=4)
    return sorted(found)


def _list_folder(root, split):
    """The files of a split, their labels and the class names: (list of paths, int64 (n,), list of str)."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root.absolute()}: name the one with your images")
    names = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    splits = names if "train" in names and names <= {"train", "test", "val"} else set()
    home = root / "train" if splits else root
    files = list_images(home)
    classes = sorted({path.relative_to(home).parts[0] for path in files if path.parent != home})
    if splits > {"train"}:                           # a test split on disk
        if split == "test":
            home = root / ("test" if "test" in splits else "val")
            files = list_images(home)
    else:                                            # every tenth image of a fixed shuffle is the test split
        held_out = set(np.random.default_rng(0).permutation(len(files))[9::10].tolist())
        files = [path for i, path in enumerate(files) if (i in held_out) == (split == "test")]
    if not files:
        raise FileNotFoundError(f"{home.absolute()} has no image for the {split} split: it needs PNG, JPEG, "
                                "WebP or BMP files, at least 10 if a tenth is to be held out as test split")
    number = {name: k for k, name in enumerate(classes)}
    labels = [number.get(path.relative_to(home).parts[0], -1) if classes else 0 for path in files]
    if -1 in labels:
        raise ValueError(f"{files[labels.index(-1)]} is in none of the {len(classes)} class folders of the "
                         "train split: move it into one, or out of the way")
    return files, np.array(labels), classes


def folder(data_dir, split, stride=1, *, size=64, flip=True, aspect="square", bad_images="error"):
    """Your own PNG, JPEG, WebP, BMP images; sub-folders are classes, x.txt (or x.npz) is the text of x.jpg.

    aspect: "square": short side fitted, centre crop; "keep" or "mixed": images keep their ratios, without those of
    fewer than 16 patches of the stride; "mixed": each a second time as a square, if both its sides exceed the size
    (FiTv2, 2410.13925, section 3.3); "crop": each cut to one of the four sizes of as many patches that lose least of it
    (Lumina-T2X). bad_images: "error", or "skip" to leave out files that cannot be read, with a warning. A tenth is held
    out as the test split, unless there are folders train and test.
    """
    _check("aspect", aspect, ("square", "keep", "mixed", "crop"))
    _check("bad_images", bad_images, ("error", "skip"))
    files, labels, classes = _list_folder(data_dir, split)
    images, again, good, bad = [], [], [], []
    for i, path in enumerate(tqdm(files, desc=f"reading {data_dir}", unit=" images", delay=2, leave=False)):
        try:
            pixels, square = _fitted(open_image(path), size, stride, aspect, i)
        except Exception as error:                   # decoders raise nearly every type there is
            reason = "not a PNG, JPEG, WebP or BMP" if isinstance(error, UnidentifiedImageError) else error
            bad.append(f"{path.relative_to(data_dir)} ({reason})")
            continue
        if pixels is not None:
            images.append(torch.from_numpy(pixels))
            again.append(torch.from_numpy(square))
            good.append(i)
    _report(bad, files, data_dir, stop=bad_images == "error" or not good)
    beside = [files[i].with_suffix(".txt") for i in good]
    captions = [path.read_text("utf-8", "replace").strip() if path.exists() else "" for path in beside]
    images = torch.stack(images) if aspect == "square" else images + again if aspect == "mixed" else images
    return Dataset(images, labels[good], classes, captions if any(captions) else None, flip,
                   files=[files[i] for i in good], budget=0 if aspect == "square" else size)


def _fitted(picture, size, stride, aspect, index):
    """A picture as `folder` wants it by its aspect: uint8 (3, H, W), and again as a square if it is large. None for one
    of too few patches."""
    if aspect == "crop":
        pixels = fitting_crop(picture, size, stride, np.random.default_rng(index))
        return pixels, pixels
    if aspect == "square":
        pixels = cropped(picture, size).copy()
        return pixels, pixels
    w, h = fit_size(*picture.size, size, stride)
    if w * h < 16 * stride**2:
        return None, None
    pixels = np.array(picture.resize((w, h), Image.BICUBIC)).transpose(2, 0, 1)
    large = min(picture.size) > size
    return pixels, cropped(picture, size // stride * stride).copy() if large else pixels


def _report(bad, files, root, stop):
    """Stop, or warn, because of images that cannot be read."""
    if not bad:
        return
    report = f"{len(bad)} of {len(files)} images in {root} cannot be read: {', '.join(bad[:5])}"
    report += ", ..." if len(bad) > 5 else ""
    if stop:
        raise ValueError(f"{report}; remove them, or skip them with bad_images=skip")
    warnings.warn(f"{report}; skipped", stacklevel=3)


# ---- load --------------------------------------------------------------------------------------------------

# name -> loader(data_dir, split, [stride,] *, options) -> Dataset. Its options' defaults are the data set's own: its
# size, and whether mirror images are natural. The first sentence of its docstring is its line in `train.py --list`.
DATASETS = {"shapes": shapes, "moving-shapes": moving_shapes, "turntable": turntable, "tones": tones,
            "cifar10": cifar10, "cifar100": cifar100, "imagenet64": imagenet64, "folder": folder}


def _check(what, value, choices):
    if value not in choices:
        raise ValueError(f"{what} {value!r} is neither {' nor '.join(choices)}")


def load(name, data_dir="data", split="train", device="cpu", stride=1, **options):
    """A Dataset by name (the names are in DATASETS).

    data_dir    where its files are, or are downloaded to; for `folder`, the folder of images itself
    split       "train" or "test"; where no test split is on disk, a fixed part of the images is held out
    stride      the patch size of the model, of which the sides of images of mixed sizes are multiples
    options     of the loader: size, the side in pixels (of tones: the length in time steps); flip, mirror half of the
                images in training batches; and what else its signature says

    Raises ValueError or FileNotFoundError with a sentence: what is wrong, where, what to do. The first call
    may download or convert: of several processes, let one call it before the others.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=2, cutoff=0.4) or DATASETS
        raise ValueError(f"there is no dataset called {name!r}: did you mean {' or '.join(near)}?")
    _check("split", split, ("train", "test"))
    known = inspect.signature(DATASETS[name]).parameters
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{name} has no option {unknown[0]!r}: choose from "
                         f"{', '.join(k for k, p in known.items() if p.kind is p.KEYWORD_ONLY)}")
    size = options.get("size", 1)
    sides = size if isinstance(size, (tuple, list)) and name == "shapes" else (size,)                 # (H, W)
    if not all(isinstance(side, int) and 1 <= side <= 4096 for side in sides):
        raise ValueError(f"size is {size!r}: choose a whole number of pixels from 1 to 4096, such as 32")
    facts = {"stride": stride} if "stride" in known else {}
    return DATASETS[name](Path(data_dir).expanduser(), split, **facts, **options).to(device)
