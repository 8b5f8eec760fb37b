"""Numbers that say how good images are: feature networks, distances between sets of features, and between pairs.

    python evaluate.py distance runs/my-run cifar10 --inception pt_inception-2015-12-05-6726825d.pth --metrics fid,kid

N, M   numbers of images        D   width of the features        x, y   features (N, D), (M, D)        K   classes

Contents: Inception (the network of the FID); LPIPS; Frechet distance; Inception score, KID, CMMD; precision, recall,
density, coverage; PSNR and SSIM; the judge, a small classifier of the data set at hand.

What compares whole sets of images with these, in bounded memory, is distance.py.
"""

import hashlib
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import runs

# ------------------------------------------------------------------------------------------------------------ Inception
#
# Inception-v3 as TensorFlow published it in 2015, in the port whose weights pytorch-fid and torch-fidelity share
# (pt_inception-2015-12-05-6726825d.pth, 472 tensors). It differs from torchvision's Inception-v3 in three ways, each of
# which changes the FID: average pools divide by the number of real pixels, the pool of the last block is a max pool,
# and there are 1008 classes. Rethinking the Inception Architecture for Computer Vision, 1512.00567.

CAMPS = {"tf": "TF-faithful: uint8, TF1 bilinear to 299, (x - 128)/128; as torch-fidelity, ADM, EDM",
         "pytorch-fid": "pytorch-fid: uint8/255, half-pixel bilinear to 299, 2x - 1"}
LEVELS = {"64": 64, "192": 192, "spatial": 2023, "768": 768, "2048": 2048}             # widths, in the network's order
PUBLISHED = "6726825d"                          # how the SHA-256 of the published file begins; its name ends in it


class Norm(nn.Module):
    """What a BatchNorm by the statistics of the file does: x * scale + shift. There is no training mode, which would
    measure the batch instead."""

    def __init__(self, channels, eps=1e-3):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = eps

    def affine(self):
        """(scale, shift), each (channels,)."""
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return scale, self.bias - self.running_mean * scale


class Unit(nn.Module):
    """Convolution without bias, norm, ReLU. The norm is multiplied into the convolution's weights, which are few beside
    the maps."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = Norm(c_out)

    def forward(self, x):
        scale, shift = self.bn.affine()
        return F.relu_(F.conv2d(x, self.conv.weight * scale[:, None, None, None], shift, self.conv.stride,
                                self.conv.padding))


def average_pool(x):
    """3x3, stride 1, padding 1, over the real pixels only: at a border TensorFlow divides by 6 or 4, not by 9."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """3x3, stride 1, padding 1."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(nn.Module):
    """Branches of 1x1, 5x5, twice 3x3, and a pool: (B, c_in, H, W) -> (B, 224 + c_pool, H, W)."""

    def __init__(self, c_in, c_pool):
        super().__init__()
        self.branch1x1 = Unit(c_in, 64, 1)
        self.branch5x5_1 = Unit(c_in, 48, 1)
        self.branch5x5_2 = Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(c_in, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(c_in, c_pool, 1)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double,
                          self.branch_pool(average_pool(x))], 1)


class BlockB(nn.Module):
    """Halves the sides: (B, c_in, H, W) -> (B, 480 + c_in, H/2, W/2)."""

    def __init__(self, c_in):
        super().__init__()
        self.branch3x3 = Unit(c_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = Unit(c_in, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """7x7 convolutions as 1x7 and 7x1, of width c7 inside: (B, 768, H, W) -> the same."""

    def __init__(self, c7):
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Unit(768, 192, 1)
        self.branch7x7_1 = Unit(768, c7, 1)
        self.branch7x7_2 = Unit(c7, c7, **row)
        self.branch7x7_3 = Unit(c7, 192, **column)
        self.branch7x7dbl_1 = Unit(768, c7, 1)
        self.branch7x7dbl_2 = Unit(c7, c7, **column)
        self.branch7x7dbl_3 = Unit(c7, c7, **row)
        self.branch7x7dbl_4 = Unit(c7, c7, **column)
        self.branch7x7dbl_5 = Unit(c7, 192, **row)
        self.branch_pool = Unit(768, 192, 1)

    def forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average_pool(x))], 1)


class BlockD(nn.Module):
    """Halves the sides: (B, 768, H, W) -> (B, 1280, H/2, W/2)."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Unit(768, 192, 1)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Unit(768, 192, 1)
        self.branch7x7x3_2 = Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2)

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """Branches that fork into a row and a column at their end: (B, c_in, H, W) -> (B, 2048, H, W). pool: that of the
    pool branch, an average in the first such block and, a quirk of the original graph, a maximum in the second."""

    def __init__(self, c_in, pool):
        super().__init__()
        self.branch1x1 = Unit(c_in, 320, 1)
        self.branch3x3_1 = Unit(c_in, 384, 1)
        self.branch3x3_2a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Unit(c_in, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Unit(c_in, 192, 1)
        self.pool = pool

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(self.pool(x))], 1)


class FeatureNetwork(nn.Module):
    """What distances look through: `measure` gives features of bytes, `of_images` of floats, `logits` their classes."""

    @torch.no_grad()
    def read(self, batches):
        """Images in [-1, 1], batch by batch (b, C, H, W) -> (features float32 (n, D), classes int64 (n,)), on the
        CPU."""
        features, classes, device = [], [], next(self.parameters()).device
        for x in batches:
            found = self.of_images(as_image(x).to(device).clamp(-1, 1))
            features.append(found.cpu())
            classes.append(self.logits(found).argmax(1).cpu())
        return torch.cat(features), torch.cat(classes)


def as_image(x):
    """What a network of images sees of clips (B, C, F, H, W): a strip; of sounds (B, bands, T): one channel."""
    return x.transpose(2, 3).flatten(3) if x.ndim == 5 else x[:, None] if x.ndim == 3 else x


def to_bytes(x):
    """Images in [-1, 1] as uint8, rounded as DiT and EDM do."""
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def in_colour(images):
    """Images uint8 (B, C, H, W) with one channel repeated to three; ValueError if C is neither 1 nor 3."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images of {images.shape[1]} channels cannot be measured: they need 3 (RGB), or 1 (grey)")
    return images.expand(-1, 3, -1, -1)


class Inception(FeatureNetwork):
    """Images uint8 (B, 3, H, W) of any size -> features, under the 472 names of the published file.

    camp: how bytes become the 299x299 input, a name of `CAMPS`; the two differ even for identical images.
    """

    def __init__(self, camp="tf", num_classes=1008):
        super().__init__()
        if camp not in CAMPS:
            raise ValueError(f"there is no convention {camp!r}: choose from {', '.join(CAMPS)}")
        self.camp, self.level, self.width = camp, "2048", 2048
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, max_pool)
        self.fc = nn.Linear(2048, num_classes)
        self.requires_grad_(False)

    def forward(self, images, levels=("2048",)):
        """Features by level (names of `LEVELS`), float32 (B, D): "64", "192", "768", "2048" are means over the pixels;
        "spatial", of the sFID, is flattened in the order (H, W, C), as in ADM's statistics files. Goes no deeper than
        the levels need."""
        found = {}
        for level, x in self.stages(self.prepare(images)):
            if level in levels:
                found[level] = x.permute(0, 2, 3, 1).flatten(1) if level == "spatial" else x.mean((2, 3))
            if len(found) == len(levels):
                break
        return found

    def prepare(self, images):
        """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299), about [-1, 1]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Inception reads uint8 images (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        if self.camp == "tf":
            return (resize_tf1(images.float(), 299) - 128) / 128
        return 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1

    def stages(self, x):
        """The network from its input (B, 3, 299, 299): yields (level, maps (B, C, H, W)) on the way."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))              # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)                                               # (B, 64, 73, 73)
        yield "64", x
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                                  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)                                               # (B, 192, 35, 35)
        yield "192", x
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                             # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                             # (B, 768, 17, 17)
        # TensorFlow's mixed_6/conv, of which ADM takes 7 channels: a convolution before its norm and ReLU.
        yield "spatial", F.conv2d(x, self.Mixed_6d.branch1x1.conv.weight[:7])          # (B, 7, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))
        yield "768", x
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                             # (B, 2048, 8, 8)
        yield "2048", x

    def measure(self, images, levels):
        """Bytes (B, C, H, W), C = 1 or 3 -> {level: features}."""
        return self(in_colour(images), levels)

    def of_images(self, x):
        """Floats (B, C, H, W) in [-1, 1] -> features "2048" of their 8-bit rounding."""
        return self.measure(to_bytes(x), ["2048"])["2048"]

    def logits(self, features, bias=False):
        """Features "2048" (B, 2048) -> class logits (B, 1008); the Inception score takes them without the bias."""
        return features @ self.fc.weight.T.to(features.dtype) + (self.fc.bias if bias else 0)


def resize_tf1(x, size):
    """Float images (B, C, H, W) to (B, C, size, size) by TensorFlow 1's bilinear rule: output i lies at i H/size, with
    no shift by half a pixel and no smoothing. On the Pitfalls of Resizing in GAN Evaluation, 2104.11222."""

    def taps(side):
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (side / size)
        low = at.long()
        return low, (low + 1).clamp(max=side - 1), (at - low).to(x.dtype)

    low, high, share = taps(x.shape[3])
    x = x[..., low] + (x[..., high] - x[..., low]) * share                             # (B, C, H, size)
    low, high, share = taps(x.shape[2])
    return x[:, :, low] + (x[:, :, high] - x[:, :, low]) * share[:, None]


def sha256(path):
    """The hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(path):
    """A state dict from a .pth file of anyone. Of a file named as torch.hub names them, xxx-1234abcd.pth, the SHA-256
    must begin so. ValueError if it is damaged or no state dict."""
    named = re.search(r"-([0-9a-f]{8,})\.pth?$", Path(path).name)
    if named and not (found := sha256(path)).startswith(named[1]):
        raise ValueError(f"{path} is damaged: its SHA-256 begins {found[:8]}, its name says {named[1]}; "
                         "download it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    except OSError:
        raise
    except Exception as error:                       # foreign files make torch.load raise nearly every type there is
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise ValueError(f"{path} is no file of weights ({reason})") from None


def fill_weights(network, state, path):
    """Put a state dict into a network, all of its names, or a ValueError that tells the first difference."""
    own = network.state_dict()
    wrong = [k for k in own if k not in state] + [k for k in state if k not in own or state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{path} holds the weights of another network than {type(network).__name__}: {len(wrong)} "
                         f"names or shapes differ, the first is {wrong[0]}")
    network.load_state_dict(state)
    return network


def load_inception(path, device="cpu", camp="tf"):
    """The `Inception` of a weight file. Another file than the published one is fine for comparisons of one's own, but
    gives no FID of the literature; `title` says which it is."""
    state = {k: v for k, v in load_weights(path).items() if not k.endswith("num_batches_tracked")}
    network = fill_weights(Inception(camp), state, path)
    checksum = sha256(path)
    published = "" if checksum.startswith(PUBLISHED) else f", NOT the published weights {PUBLISHED}: no FID of papers"
    network.title = f"{CAMPS[camp]}; weights {Path(path).name}, SHA-256 {checksum[:8]}{published}"
    network.key = f"inception-{camp}-{checksum[:12]}"
    return network.to(device, memory_format=torch.channels_last).eval()           # half as fast again on a CPU


# ---------------------------------------------------------------------------------------------------------------- LPIPS
#
# The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 1801.03924, version 0.1 of its code: features
# of a classifier, scaled to unit length at every position; squared differences, weighted by a learned number a channel.

# (layers of torchvision's `features` in five stages; the channels after each stage)
ALEXNET = [[("conv", 3, 64, 11, 4, 2)],
           ["pool", ("conv", 64, 192, 5, 1, 2)],
           ["pool", ("conv", 192, 384, 3, 1, 1)],
           [("conv", 384, 256, 3, 1, 1)],
           [("conv", 256, 256, 3, 1, 1)]]
VGG16 = [[("conv", 3, 64, 3, 1, 1), ("conv", 64, 64, 3, 1, 1)],
         ["pool", ("conv", 64, 128, 3, 1, 1), ("conv", 128, 128, 3, 1, 1)],
         ["pool", ("conv", 128, 256, 3, 1, 1), ("conv", 256, 256, 3, 1, 1), ("conv", 256, 256, 3, 1, 1)],
         ["pool", ("conv", 256, 512, 3, 1, 1), ("conv", 512, 512, 3, 1, 1), ("conv", 512, 512, 3, 1, 1)],
         ["pool", ("conv", 512, 512, 3, 1, 1), ("conv", 512, 512, 3, 1, 1), ("conv", 512, 512, 3, 1, 1)]]


class LPIPS(nn.Module):
    """Perceptual distance of images a, b (B, 3, H, W) in [-1, 1] -> (B,); 0 if they are equal. Differentiable in them.

    net: "alex" (the paper's for comparing images) or "vgg" (for training). Its names are those of the two published
    files together: features.* of torchvision's classifier, lin{0..4}.model.1.weight of LPIPS.
    """

    def __init__(self, net="alex"):
        super().__init__()
        if net not in ("alex", "vgg"):
            raise ValueError(f"LPIPS has no network {net!r}: choose alex or vgg")
        self.least = 31 if net == "alex" else 16        # below, a pool has nothing left
        layers, self.ends, widths = [], [], []
        for stage in ALEXNET if net == "alex" else VGG16:
            for layer in stage:
                if layer == "pool":
                    layers.append(nn.MaxPool2d(3 if net == "alex" else 2, stride=2))
                else:
                    _, c_in, c_out, kernel, stride, padding = layer
                    layers += [nn.Conv2d(c_in, c_out, kernel, stride, padding), nn.ReLU()]
            self.ends.append(len(layers))
            widths.append(c_out)
        self.features = nn.Sequential(*layers)
        for k, width in enumerate(widths):       # model.0 is dropout in training, and nothing here
            linear = nn.Module()
            linear.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{k}", linear)
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def stages(self, x):
        """The five maps (B, C, H, W) of images, each position scaled to unit length."""
        x, begin = (x - self.mean) / self.std, 0
        for end in self.ends:
            x, begin = self.features[begin:end](x), end
            yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)

    def layers(self, a, b):
        """The five contributions (B, 5), whose sum is the distance."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < self.least:
            raise ValueError(f"LPIPS compares images (B, 3, H, W) of equal size, of sides of at least {self.least}, "
                             f"not {tuple(a.shape)} and {tuple(b.shape)}")
        linear = [self.get_submodule(f"lin{k}.model") for k in range(5)]
        return torch.stack([weight((u - v).square()).mean((1, 2, 3))
                            for weight, u, v in zip(linear, self.stages(a), self.stages(b))], 1)

    def forward(self, a, b):
        return self.layers(a, b).sum(1)


def load_lpips(net, features, linear):
    """The `LPIPS` of two published files: torchvision's classifier (alexnet-owt-7be5be79.pth, vgg16-397923af.pth), of
    which only features.* are read, and the package's alex.pth or vgg.pth."""
    state = {k: v for k, v in load_weights(features).items() if k.startswith("features.")}
    state |= {k: v for k, v in load_weights(linear).items() if k.startswith("lin")}
    return fill_weights(LPIPS(net), state, f"{features} with {linear}").eval()


# ----------------------------------------------------------------------------------------------------- Frechet distance


def _whole(x, rows=slice(None)):
    """Rows of features (N, D), a tensor, an array or `Rows` on disk, as float64 on the CPU."""
    return torch.as_tensor(x[rows]).double().cpu()


def _check_features(x, y, least=2):
    """ValueError unless x (N, D) and y (M, D) can be compared."""
    if len(x.shape) != 2 or len(y.shape) != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features are compared as (N, D) and (M, D), not {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) < least or len(y) < least:
        raise ValueError(f"this distance needs at least {least} images on each side, not {len(x)} and {len(y)}")


class Statistics:
    """Mean (D,) and covariance (D, D) with N - 1, float64, of any number of features, added batch by batch.

    Means and scatter matrices of batches are merged as in Chan, Golub, LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances" (1979): order, batch size and ranks change the last digits only.
    """

    def __init__(self, width):
        self.n, self.mu = 0, torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x):
        """Features (n, D) of more images."""
        x = torch.as_tensor(x).double().cpu()
        mu = x.mean(0)
        x = x - mu
        self.merge(len(x), mu, x.T @ x)
        return self

    def merge(self, n, mu, scatter):
        """Another set of n > 0 images with mean mu and scatter sum (x - mu)(x - mu)^T."""
        gap, total = mu - self.mu, self.n + n
        self.scatter += scatter + torch.outer(gap, gap) * (self.n * n / total)
        self.mu, self.n = self.mu + gap * (n / total), total

    @property
    def sigma(self):
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.n}")
        return self.scatter / (self.n - 1)


def statistics(x, chunk=1000):
    """The `Statistics` of features x (N, D), which may lie on disk."""
    result = Statistics(x.shape[1])
    for begin in range(0, len(x), chunk):
        result.add(_whole(x, slice(begin, begin + chunk)))
    return result


def root(sigma):
    """A (r, D) matrix R with R^T R = sigma, for sigma (D, D) symmetric and positive semi-definite, float64.

    Cholesky's factor where all pivots stand clear of rounding, which at D = 2048 costs a fortieth of the eigenvalues;
    else by eigenvalues, without those that rounding leaves in the place of zeros.
    """
    small = len(sigma) * torch.finfo(sigma.dtype).eps * sigma.diagonal().max()
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not failed and factor.diagonal().square().min() > small:
        return factor.T
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > len(sigma) * torch.finfo(sigma.dtype).eps * values[-1]
    return values[kept].sqrt()[:, None] * vectors[:, kept].T


class Gaussian(NamedTuple):
    """One side of a Frechet distance: its mean (D,) and a matrix R (r, D) with R^T R = covariance, float64."""

    mu: torch.Tensor
    root: torch.Tensor

    @classmethod
    def of(cls, x):
        """From features (N, D), `Statistics`, or a pair (mu, sigma). Of N <= D features R is the centred features
        themselves, so that no covariance, which would be singular, is ever formed."""
        if isinstance(x, cls):
            return x
        if isinstance(x, Statistics):
            return cls(x.mu, root(x.sigma))
        if isinstance(x, tuple):
            mu, sigma = (torch.as_tensor(part).double().cpu() for part in x)
            return cls(mu, root(sigma))
        if len(x.shape) != 2 or len(x) < 2:
            raise ValueError(f"a Frechet distance needs features (N, D) of at least 2 images on each side, not "
                             f"{tuple(x.shape)}")
        if len(x) > x.shape[1]:
            return cls.of(statistics(x))
        x = _whole(x)
        return cls(x.mean(0), (x - x.mean(0)) / (len(x) - 1) ** 0.5)


def frechet_distance(x, y):
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), covariances with N - 1, in float64 -> float.

    Each side is features (N, D), `Statistics`, (mu (D,), sigma (D, D)), or a `Gaussian`. With Inception's features it
    is called FID, with its "spatial" ones sFID. GANs Trained by a Two Time-Scale Update Rule, 1706.08500, eq. 6; Generating Images
    with Sparse Representations, 2103.03841, for sFID. With C = R^T R the trace of the root is the sum of the singular
    values of R_x R_y^T: nothing complex and nothing singular can come up.
    """
    x, y = Gaussian.of(x), Gaussian.of(y)
    if len(x.mu) != len(y.mu):
        raise ValueError(f"statistics of {len(x.mu)} features cannot be compared with statistics of {len(y.mu)}")
    means = (x.mu - y.mu).square().sum()
    traces = x.root.square().sum() + y.root.square().sum()
    return (means + traces - 2 * torch.linalg.svdvals(x.root @ y.root.T).sum()).item()


def frechet_infinity(x, y, points=15, seed=0):
    """The Frechet distance of endlessly many images x: a line through the distances of random subsets of `points` sizes
    over 1/size, at 0. Returns (distance, [(size, distance)]).

    x: generated features (N, D); y: the reference, as in `frechet_distance`. Effectively Unbiased FID, 1911.07023;
    sizes as in dgm-eval, from min(5000, N/10) to N. One fixed reference: its own bias stays.
    """
    if len(x) < 20:
        raise ValueError(f"the extrapolation to endlessly many images needs at least 20 of them, not {len(x)}")
    rng, reference, line = np.random.default_rng(seed), Gaussian.of(y), []
    sizes = np.linspace(min(5000, max(len(x) // 10, 2)), len(x), points).astype(int)
    for size in tqdm(sizes, desc="distances of subsets", delay=2, leave=False):
        rows = np.sort(rng.choice(len(x), size, replace=False))
        line.append((int(size), frechet_distance(x[rows], reference)))
    slope, at_zero = np.polyfit([1 / size for size, _ in line], [value for _, value in line], 1)
    return float(at_zero), line


# --------------------------------------------------------------------------------------- Inception score, KID and CMMD


def inception_score(x, splits=10, chunk=None, seed=None, head=None):
    """exp(mean_i KL(p_i || mean p)) over each split of the images -> (mean, population std) over the splits.

    x: logits (N, K), or features and `head`, which turns rows of them into logits. Split i of `splits` covers rows
    i N // splits to (i + 1) N // splits, after a shuffle by `seed` (torch-fidelity: 10 splits, seed 2020); or, with
    `chunk`, each split is so many rows in order (ADM: 5000), the last the rest. Images sorted by class need the
    shuffle. Improved Techniques for Training GANs, 1606.03498, section 4.
    """
    n = len(x)
    if n < 1 or (chunk is None and n < splits):
        raise ValueError(f"an Inception score in {splits} splits needs at least {splits} images, not {n}")
    order = np.arange(n) if seed is None else np.random.RandomState(seed).permutation(n)
    edges = [*range(0, n, chunk), n] if chunk else [i * n // splits for i in range(splits + 1)]
    scores = []
    for begin, end in zip(edges, edges[1:]):
        rows = torch.as_tensor(x[order[begin:end]])
        log_p = (head(rows) if head else rows).double().cpu().log_softmax(1)           # (n, K)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def polynomial_mmd(x, y):
    """The unbiased squared maximum mean discrepancy of features x, y (m, D) under (a.b/D + 1)^3; 0 on average where
    both come from one distribution, so at times negative. Demystifying MMD GANs, 1801.01401."""
    _check_features(x, y)
    if len(x) != len(y):
        raise ValueError(f"KID compares equally many images, not {len(x)} and {len(y)}")
    x, y, m = _whole(x), _whole(y), len(x)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
    return (within / (m * (m - 1)) - 2 * kernel(x, y).mean()).item()


def kid(x, y, subsets=100, size=1000, seed=2020):
    """`polynomial_mmd` of random subsets of real features x (N, D) and generated ones y (M, D), drawn without
    replacement, the real ones first, as in torch-fidelity -> (mean, population std). Quoted as it is or times 1000."""
    _check_features(x, y)
    if not 2 <= size <= min(len(x), len(y)):
        raise ValueError(f"KID's subsets of {size} cannot be drawn from {len(x)} and {len(y)} images")
    rng, values = np.random.RandomState(seed), []
    for _ in tqdm(range(subsets), desc="KID", unit=" subsets", delay=2, leave=False):
        real, generated = (side[rng.choice(len(side), size, replace=False)] for side in (x, y))
        values.append(polynomial_mmd(real, generated))
    return float(np.mean(values)), float(np.std(values))


def cmmd(x, y, sigma=10.0, scale=1000.0, chunk=1000):
    """The biased squared MMD of features x (N, D), y (M, D), scaled to unit length, under the Gaussian kernel
    exp(-|a - b|^2/(2 sigma^2)), times `scale`. It is called CMMD with the embeddings of CLIP ViT-L/14 at 336 pixels.
    Rethinking FID, 2401.09603."""
    _check_features(x, y, least=1)

    def mean_kernel(a, b):
        total = 0.0
        for begin in range(0, len(a), chunk):
            rows = F.normalize(_whole(a, slice(begin, begin + chunk)))
            for start in range(0, len(b), chunk):
                cosines = rows @ F.normalize(_whole(b, slice(start, start + chunk))).T
                total += torch.exp((cosines - 1) / sigma**2).sum().item()              # |a - b|^2 = 2 - 2 cos
        return total / (len(a) * len(b))

    return scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


# ------------------------------------------------------------------------------ precision, recall, density and coverage


def _squared_distances(x, y):
    """Squared distances (n, m) and how far rounding may have moved them, of rows x (n, D) and y (m, D) in float64."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)                             # (n, m)
    return (norms - 2 * x @ y.T).clamp_(min=0), 1e-12 * norms


def _tiles(n, m, chunk, what):
    """Pairs of slices that cover n x m, row of tiles after row of tiles, with a progress bar."""
    starts = [(i, j) for i in range(0, n, chunk) for j in range(0, m, chunk)]
    for i, j in tqdm(starts, desc=what, unit=" tiles", delay=2, leave=False):
        yield slice(i, min(i + chunk, n)), slice(j, min(j + chunk, m))


def neighbour_radii(x, ks, centre=0.0, chunk=1000):
    """Squared distances (len(ks), N) of features x (N, D) to their k-th nearest neighbours among them, for each k; an
    image is not its own neighbour, a copy of it is."""
    if len(x) <= max(ks):
        raise ValueError(f"the {max(ks)} nearest neighbours of an image need more than {len(x)} images")
    nearest = torch.full((len(x), max(ks) + 1), float("inf"), dtype=torch.float64)
    for rows, columns in _tiles(len(x), len(x), chunk, "nearest neighbours"):
        squared, _ = _squared_distances(_whole(x, rows) - centre, _whole(x, columns) - centre)
        nearest[rows] = torch.cat([nearest[rows], squared], 1).topk(max(ks) + 1, largest=False).values
    return nearest[:, ks].T.contiguous()             # place 0 is the image itself


def prdc(x, y, k=5, inclusive=False, chunk=1000):
    """Precision, recall, density and coverage of real features x (N, D) and generated ones y (M, D), as a dict.

    A ball lies around each image, up to its k-th nearest neighbour on its own side. precision: share of generated
    images inside some real ball; recall: share of real images inside some generated ball (Improved Precision and
    Recall, 1904.06991, k = 3). density: how often a generated image lies in a real ball, over k M, which may exceed 1;
    coverage: share of real balls that hold a generated image (Reliable Fidelity and Diversity Metrics, 2002.09797,
    k = 5). inclusive: whether a ball holds its surface, as in torch-fidelity and ADM (<=), not in prdc (<); it matters
    for exact ties, which here are distances equal within rounding.
    """
    return prdc_by_k(x, y, [k], inclusive, chunk)[k]


def prdc_by_k(x, y, ks, inclusive=False, chunk=1000):
    """{k: `prdc`} for several k at once."""
    _check_features(x, y)
    centre = _whole(x, slice(0, chunk)).mean(0)      # distances stay, and lose fewer digits where features lie far off
    real, fake = neighbour_radii(x, ks, centre, chunk), neighbour_radii(y, ks, centre, chunk)
    precise, covered, recalled = (torch.zeros(len(ks), len(side), dtype=torch.bool) for side in (y, x, x))
    contained = torch.zeros(len(ks), dtype=torch.float64)
    for rows, columns in _tiles(len(x), len(y), chunk, "precision and recall"):
        squared, rounding = _squared_distances(_whole(x, rows) - centre, _whole(y, columns) - centre)
        limit = squared - rounding if inclusive else squared + rounding                # ties fall on the side asked for
        for i in range(len(ks)):
            in_real, in_fake = limit < real[i, rows, None], limit < fake[i, None, columns]
            precise[i, columns] |= in_real.any(0)
            covered[i, rows] |= in_real.any(1)
            recalled[i, rows] |= in_fake.any(1)
            contained[i] += in_real.sum()
    shares = {"precision": precise, "recall": recalled, "coverage": covered}
    return {k: {name: flags[i].double().mean().item() for name, flags in shares.items()}
            | {"density": contained[i].item() / (k * len(y))} for i, k in enumerate(ks)}


# -------------------------------------------------------------------------------------------------------- PSNR and SSIM


def _check_images(a, b, least=1):
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[2:]) < least:
        raise ValueError(f"images are compared as (B, C, H, W) of equal size, of sides of at least {least}, not "
                         f"{tuple(a.shape)} and {tuple(b.shape)}")
    for x in (a, b):
        if not (x.is_floating_point() and x.min() >= 0 and x.max() <= 1):
            raise ValueError("images are compared as floats in [0, 1]: divide bytes by 255, map [-1, 1] by (x + 1)/2")
    return a.double(), b.double()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images a, b (B, C, H, W) in [0, 1] -> float64 (B,): -10 log10 of the mean
    squared error over all channels of an image; infinite if equal. Of a set the mean over images is quoted."""
    a, b = _check_images(a, b)
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def ssim(a, b, window="gaussian"):
    """Structural similarity of images a (originals), b (B, C, H, W) in [0, 1] -> float64 (B,), mean over channels and
    the pixels that a whole window surrounds. Image Quality Assessment: From Error Visibility to Structural Similarity
    (Wang et al., 2004), K1 = 0.01, K2 = 0.03.

    window: "gaussian", the paper's: sigma 1.5, 11 taps, population covariance; "uniform", scikit-image's default: 7x7,
    sample covariance. The two give different numbers.
    """
    if window not in ("gaussian", "uniform"):
        raise ValueError(f"SSIM has no window {window!r}: choose gaussian or uniform")
    taps = 11 if window == "gaussian" else 7
    a, b = _check_images(a, b, least=taps)
    at = torch.arange(taps, dtype=torch.float64, device=a.device) - taps // 2
    weights = torch.exp(-at.square() / (2 * 1.5**2)) if window == "gaussian" else torch.ones_like(at)
    weights = weights / weights.sum()

    def mean(x):
        x = F.conv2d(x.flatten(0, 1)[:, None], weights[None, None, :, None])
        x = F.conv2d(x, weights[None, None, None])
        return x[:, 0].unflatten(0, a.shape[:2])                                       # (B, C, H - taps + 1, ...)

    sample = 1.0 if window == "gaussian" else taps**2 / (taps**2 - 1)
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = sample * (mean(a * a) - mean_a**2), sample * (mean(b * b) - mean_b**2)
    both = sample * (mean(a * b) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean((1, 2, 3))


def compared(a, b, lpips=None):
    """Scores of pairs of bytes a (originals), b, uint8 (B, C, H, W): {"psnr": (B,), "ssim": (B,)}, and "lpips" if its
    network is given."""
    found = {"psnr": psnr(a / 255, b / 255), "ssim": ssim(a / 255, b / 255)}
    if lpips is not None:
        found["lpips"] = lpips(*(in_colour(x) / 127.5 - 1 for x in (a, b))).double()
    return found


@torch.no_grad()
def reconstruction(pairs, network=None, lpips=None):
    """What a tokenizer loses, over batches of pairs (originals, reconstructions), (B, C, H, W) in [-1, 1], which are
    rounded to 8 bits first: {"n", "psnr", "ssim"} (means over images), "lpips" if its network is given, and "rfid", the
    Frechet distance of reconstructions and originals in the features of `network`, a `FeatureNetwork`."""
    scores, features = {}, ([], [])
    for pair in pairs:
        a, b = (to_bytes(as_image(x)) for x in pair)
        for name, values in compared(a, b, lpips).items():
            scores.setdefault(name, []).append(values.cpu())
        if network is not None:
            for side, images in zip(features, (a, b)):
                side.append(network.measure(images, [network.level])[network.level].cpu())
    if not scores:
        raise ValueError("there are no pairs of images to compare")
    result = {"n": len(torch.cat(scores["psnr"]))} | {name: torch.cat(v).mean().item() for name, v in scores.items()}
    if network is not None:
        result["rfid"] = frechet_distance(*(torch.cat(side) for side in features))
    return result


# ------------------------------------------------------------------------------------------------------------ the judge


class Classifier(FeatureNetwork):
    """Images (B, C, H, W) in [-1, 1], any size from 8 pixels -> class logits (B, K).
    `features` gives the (B, 128) before them."""

    def __init__(self, num_classes, in_channels=3, width=32):
        super().__init__()

        def stage(c_in, c_out, stride):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())

        self.body = nn.Sequential(
            stage(in_channels, width, 1), stage(width, 2 * width, 2), stage(2 * width, 4 * width, 2),
            stage(4 * width, 4 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, num_classes)
        self.level, self.width = "classifier", 4 * width

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))

    def measure(self, images, levels):
        """Bytes (B, C, H, W) -> {"classifier": features}."""
        return {"classifier": self.features(images / 127.5 - 1)}

    of_images = features

    def logits(self, features):
        return self.head(features)


JUDGE = 1                                       # version of how a judge is trained; raise it when that changes


def fingerprint(dataset):
    """A hexadecimal checksum of a data set's content: every image's bytes, the labels, how many classes, flips."""
    crc = hashlib.blake2b(repr((JUDGE, tuple(dataset.images.shape), len(dataset.classes), dataset.flip)).encode(),
                          digest_size=16)
    crc.update(dataset.labels.cpu().numpy().tobytes())
    for begin in tqdm(range(0, len(dataset.images), 4096), desc="checksum of the images", delay=2, leave=False):
        crc.update(np.ascontiguousarray(torch.as_tensor(dataset.images[begin:begin + 4096]).cpu().numpy()))
    return crc.hexdigest()


def judge(dataset, name="", steps=400, device="cpu", folder="runs/classifiers"):
    """A `Classifier` of a data set, in eval mode on the device: trained once on its labels, `steps` steps of 128
    images, then kept in `folder`.

    It is found again by the content of the data set (`fingerprint`) and its steps; the kept file's checksums are
    verified, and a damaged one is trained anew with a warning. name: of the data set, for people. ValueError for data
    without classes, of mixed sizes, or of sides below 8 pixels.
    """
    if not dataset.classes:
        raise ValueError(f"a judge needs a data set with classes, which {name or 'this one'} has not")
    if isinstance(dataset.images, list) or min(dataset.shape[-2:]) < 8:
        raise ValueError(f"a judge needs images of one size, of at least 8 pixels, which {name or 'this set'} has not")
    example = as_image(dataset.gather(torch.arange(1))[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(len(dataset.classes), example.shape[1])
    network.key = f"{fingerprint(dataset)[:16]}-{steps}"
    network.title = f"{network.width} features of a classifier of {name or 'the data set'}"
    path = Path(folder) / f"{name or 'data'}-{network.key}.pt"
    if path.exists():
        try:
            network.load_state_dict(runs.load_tensors(path))
            return network.to(device).eval()
        except (ValueError, RuntimeError) as error:
            warnings.warn(f"{path} is damaged ({str(error).splitlines()[0][:100]}): it is trained anew", stacklevel=2)
    train_judge(network.to(device), dataset, steps, f"training a classifier of {name} (once, kept in {path})")
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write(path, lambda partial: torch.save(network.state_dict(), partial))
    return network.eval()


def train_judge(network, dataset, steps, title):
    """AdamW with one cycle of the learning rate, `steps` steps of 128 images; a function of network, data and steps."""
    device = next(network.parameters()).device
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    bar = tqdm(range(steps), desc=title, unit=" steps", delay=1)
    for step in bar:
        indices, flips = dataset.plan(step, 128, seed=0)
        x = as_image(dataset.gather(indices, flips)[0]).to(device)
        y = dataset.labels[indices.to(dataset.labels.device)].to(device)
        loss = F.cross_entropy(network(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
