"""What guides a denoiser besides itself: the gradient of another network's log p(y | x_t).

    classifier_guided   any process, any sampler: a denoiser of a denoiser     Diffusion Models Beat GANs on Image
    guided_ddpm         the ancestral sampler, whose variance weighs it        Synthesis, 2105.05233, section 4
    ADMClassifier       that paper's classifier of noisy images: half a U-Net
    ResNet, DeiT        off-the-shelf classifiers                              1512.03385, 2012.12877
    ResNetMap           the same for a class, or a number, of each pixel       Fully Convolutional Networks, 1411.4038
    Guide               trains any of these, on clean images or on noisy ones
    LoRA, Experts, PPAP one lightly tuned expert for each range of noise       Towards Practical Plug-and-Play
                                                                               Diffusion Models, 2212.05973

Beside the project's letters: K classes (of segments: of a pixel), T = 1000, the times that networks are told,
z logits or a map, g the gradient.
"""

import copy
import math
import re
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

import data
import runs
from diffusion import EDM, Discrete, batch_time, expand
from layers import Attention, Mlp, PatchEmbed, count, pair, patch_grid, timestep_embedding, zeroed
from runs import Run
from samplers import SAMPLERS

T = 1000                                             # what a network is told of the time runs from 0 (clean) to here

# ------------------------------------------------------------------------------------------------- classifier guidance


def gradient_of(log_prob, scale=1.0):
    """The function (x_t, t) -> g = scale d log p(y | x_t)/d x_t, (B, C, H, W), of log_prob(x_t, t) -> (B,). The sum
    over the batch is differentiated, so that each sample has its own gradient. It may be called under no_grad()."""

    def gradient(xt, t):
        with torch.enable_grad():
            x = xt.detach().requires_grad_()
            return scale * torch.autograd.grad(log_prob(x, t).sum(), x)[0]

    return gradient


def classifier_guided(denoise, gradient, process):
    """Classifier guidance as a denoiser: the score of `denoise` plus g = gradient(x_t, t), t (B,), so that

        eps' = eps - sigma g,        x0' = (x_t - sigma eps')/alpha = x0 + sigma^2/alpha g

    2105.05233, algorithm 2, there for DDIM. As published x0 is clipped before it is guided, within `denoise`, and not
    again: x0' may leave [-1, 1]. Where a process begins at alpha = 0, x_t says nothing of the image, hence p(y | x_t)
    nothing of x_t: no guidance there."""

    def guided(xt, t):
        d, t = denoise(xt, t), batch_time(t, xt)
        alpha, sigma = process.path(t)
        begins = alpha < 1e-12
        g = gradient(xt, t)
        eps = d.eps - expand(sigma.masked_fill(begins, 0), xt) * g
        x0 = d.x0 + expand((sigma**2 / alpha).masked_fill(begins, 0), xt) * g
        return type(d)(x0, eps, d.variance)

    return guided


def reverse_step(process, d, xt, t, s, before=None, variance="small"):
    """Mean and variance of p(x_s | x_t), s < t numbers, of a denoiser's answer d at (x_t, t). The variance is the
    learned one of d, else "small" = beta~ or "large" = beta. 2006.11239, eq. 6-7; 2102.09672, eq. 15.

    before: the times of the step before. Into clean data beta~ is 0, and published tables have that of the step before
    in its place, but where "small" is taken for the variance itself."""

    def kernel(t, s):                                # r, beta, beta~: x_t = r x_s + sqrt(beta) z, from s up to t
        alpha, sigma = (v.double().tolist() for v in process.path(torch.tensor([t, s], dtype=torch.float64)))
        r = alpha[0] / alpha[1]
        beta = sigma[0] ** 2 - (r * sigma[1]) ** 2
        return r, beta, beta * (sigma[1] / sigma[0]) ** 2, alpha[1] / sigma[0] ** 2

    r, beta, beta_tilde, scale = kernel(t, s)
    mean = scale * beta * d.x0 + r * beta_tilde / beta * xt
    floor = beta_tilde or (kernel(*before)[2] if before else beta)
    if d.variance is not None:
        return mean, (d.variance * math.log(beta) + (1 - d.variance) * math.log(floor)).exp()
    if variance == "small":
        return mean, beta_tilde
    return mean, beta if beta_tilde else floor


def guided_ddpm(denoise, x, times, process, noise, memory=None, *, gradient, variance="small"):
    """Ancestral sampling, 2105.05233, algorithm 1: a sampler whose every step has its mean moved by its variance
    (see `reverse_step`; that without guidance) times gradient(x_t, t). x0 is clipped within `denoise`. No noise in the
    last step."""
    times, before = times.tolist(), None
    for t, s in pairwise(times):
        mean, v = reverse_step(process, denoise(x, t), x, t, s, before, variance)
        x = mean + v * gradient(x, batch_time(t, x))
        if s != times[-1]:
            x = x + v**0.5 * noise(x.shape)
        yield x
        before = t, s


def with_gradient(denoise, sampler, log_prob, scale, process):
    """(denoiser, sampler) under classifier guidance: the ancestral sampler in its own form, any other with a guided
    denoiser. sampler: a name, or an entry of `SAMPLERS` with its options bound."""
    gradient = gradient_of(log_prob, scale)
    if getattr(sampler, "func", sampler) in ("ddpm", SAMPLERS["ddpm"]):
        return denoise, partial(guided_ddpm, gradient=gradient, **getattr(sampler, "keywords", {}))
    return classifier_guided(denoise, gradient, process), sampler


# ------------------------------------------------------------------------------------------- ADM's classifier of noise
# The encoder and middle of ADM's U-Net, 2105.05233, sections 3 and 4, and a pooling. Names of parameters and the widths
# of groups are those of the published code, so that its checkpoints load as they are.


class ADMBlock(nn.Module):
    """norm, SiLU, conv, conditioning, norm, SiLU, dropout, conv (zero), plus the skip. (B, C_in, H, W) -> (B, C_out,
    H', W'). scale_shift: h = norm(h) (1 + scale) + shift, else the embedding is added before the norm. down: average
    pooling on both paths, before the first convolution."""

    def __init__(self, in_channels, out_channels, embedding, dropout, scale_shift, down=False):
        super().__init__()
        self.scale_shift, self.down = scale_shift, down
        self.in_layers = nn.Sequential(nn.GroupNorm(32, in_channels), nn.SiLU(),
                                       nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out_channels), nn.SiLU(), nn.Dropout(dropout),
                                        zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, c):
        norm, activate, conv = self.in_layers
        h = activate(norm(x))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h, c = conv(h), self.emb_layers(c)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = c.chunk(2, 1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + c)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


def attend(qkv, heads, order):
    """Attention over the N places of qkv (B, 3C, N) -> (B, C, N). order: whether the channels run "heads first" (each
    head's q, k, v; the published code's older order) or "qkv first"."""
    B, _, N = qkv.shape
    split = qkv.view(B, heads, 3, -1, N) if order == "heads first" else qkv.view(B, 3, heads, -1, N).transpose(1, 2)
    q, k, v = split.mT.unbind(2)                                                                  # (B, h, N, C/h)
    return F.scaled_dot_product_attention(q, k, v).mT.reshape(B, -1, N)


class ADMAttention(nn.Module):
    """Self-attention over the pixels, with a residual connection that starts closed. (B, C, H, W)."""

    def __init__(self, channels, heads, order):
        super().__init__()
        self.heads, self.order = heads, order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x, c):
        h = attend(self.qkv(self.norm(x).flatten(2)), self.heads, self.order)
        return x + self.proj_out(h).view_as(x)


class ADMDownsample(nn.Module):
    """Half the resolution without a residual block: a strided convolution, or average pooling. (B, C, H, W)."""

    def __init__(self, channels, conv):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x, c):
        return self.op(x)


class ADMStage(nn.ModuleList):
    """Layers in a row, each told the embedding c (B, E)."""

    def forward(self, x, c):
        for layer in self:
            x = layer(x, c)
        return x


class AttentionPool(nn.Module):
    """(B, C, H, W) -> (B, K): the mean joins the pixels as one more token, attends to them, and is read out (CLIP,
    2103.00020, section 2.4)."""

    def __init__(self, pixels, channels, heads, num_classes):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, pixels + 1) / channels**0.5)
        self.qkv_proj, self.c_proj = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, num_classes, 1)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], 2) + self.positional_embedding                # (B, C, N + 1)
        return self.c_proj(attend(self.qkv_proj(x), self.heads, "qkv first"))[:, :, 0]


POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class ADMClassifier(nn.Module):
    """x_t (B, C, H, W), t (B,) in 0 .. 1000 -> class logits (B, K).

    channels: width of the first level; multipliers: of each level over it; blocks: residual blocks a level. attention:
    the factors of downsampling at which pixels attend, with `heads` heads, or heads of `head_channels` each. pool:
    "attention" (`AttentionPool`), "adaptive" (the mean, then a linear map that starts at zero), "spatial" (the mean of
    every stage's output, and an MLP), "spatial_v2" (whose MLP is normalised). conv_resample, resblock_updown: how
    resolution halves. new_order: of attention's channels. 2105.05233, section 4.1; its code."""

    lora = tuned = None

    def __init__(self, image_size, in_channels, num_classes, channels=128, multipliers=(1, 2, 3, 4), blocks=2,
                 attention=(2, 4, 8), head_channels=64, heads=1, pool="attention", dropout=0.0, scale_shift=True,
                 resblock_updown=True, conv_resample=True, new_order=False):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool {pool!r}: choose from {', '.join(POOLS)}")
        if bad := [w for w in (channels * m for m in multipliers) if w % 32]:
            raise ValueError(f"a level of {bad[0]:g} channels does not divide into 32 groups")
        self.channels, self.pool, E = channels, pool, 4 * channels
        rows, columns = patch_grid(image_size, 2 ** (len(multipliers) - 1), "the levels' product")
        order = "qkv first" if new_order else "heads first"
        self.time_embed = nn.Sequential(nn.Linear(channels, E), nn.SiLU(), nn.Linear(E, E))

        def block(c_in, c_out, down=False):
            return ADMBlock(c_in, c_out, E, dropout, scale_shift, down)

        def attending(width):
            return ADMAttention(width, heads if head_channels is None else width // head_channels, order)

        width = int(channels * multipliers[0])
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, width, 3, padding=1)])])
        widths = [width]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                stage = ADMStage([block(width, width := int(channels * multiplier))])
                if 2**level in attention:
                    stage.append(attending(width))
                self.input_blocks.append(stage)
                widths.append(width)
            if level < len(multipliers) - 1:
                down = block(width, width, True) if resblock_updown else ADMDownsample(width, conv_resample)
                self.input_blocks.append(ADMStage([down]))
                widths.append(width)
        self.middle_block = ADMStage([block(width, width), attending(width), block(width, width)])
        self.out = self.head(width, sum(widths) + width, rows * columns, head_channels, num_classes)

    def head(self, width, features, pixels, head_channels, num_classes):
        """The layers behind the encoder, by their published places."""
        if self.pool == "adaptive":
            return nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
                                 zeroed(nn.Conv2d(width, num_classes, 1)), nn.Flatten())
        if self.pool == "attention":
            if head_channels is None:
                raise ValueError("pool 'attention' needs head_channels")
            return nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(),
                                 AttentionPool(pixels, width, width // head_channels, num_classes))
        if self.pool == "spatial":
            return nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, num_classes))
        return nn.Sequential(nn.Linear(features, 2048), nn.GroupNorm(32, 2048), nn.SiLU(), nn.Linear(2048, num_classes))

    def forward(self, x, t, y=None):
        c = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))                     # (B, E)
        (stem,), *stages = self.input_blocks
        outputs = [stem(x)]
        for stage in [*stages, self.middle_block]:
            outputs.append(stage(outputs[-1], c))
        if not self.pool.startswith("spatial"):
            return self.out(outputs[-1])
        return self.out(torch.cat([h.mean((2, 3)) for h in outputs], 1))


# ------------------------------------------------------------------------------------------------- off-the-shelf guides
# Ordinary networks under the names of the libraries that publish their weights: network(x, t) ignores t. lora, tuned:
# regular expressions, the layers that PPAP adapts and the parameters that it trains, 2212.05973, section 4.2 and code.

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)              # mean and standard deviation of pixels in [0, 1]


def normalised(x, statistics):
    """Images in [-1, 1] as a network of such (mean, standard deviation) wants them; None: as they are."""
    if statistics is None:
        return x
    mean, std = (x.new_tensor(v)[:, None, None] for v in statistics)
    return ((x + 1) / 2 - mean) / std


def conv_norm(in_channels, out_channels, kernel, stride):
    """A convolution without bias and its batch norm."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out_channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the skip. 1512.03385, figure 5, left."""
    expansion = 1

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_channels, width, 3, stride)
        self.conv2, self.bn2 = conv_norm(width, width, 3, 1)
        same = stride == 1 and in_channels == width
        self.downsample = None if same else nn.Sequential(*conv_norm(in_channels, width, 1, stride))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 to four times the width, and the skip. 1512.03385, figure 5, right."""
    expansion = 4

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_channels, width, 1, 1)
        self.conv2, self.bn2 = conv_norm(width, width, 3, stride)
        self.conv3, self.bn3 = conv_norm(width, 4 * width, 1, 1)
        same = stride == 1 and in_channels == 4 * width
        self.downsample = None if same else nn.Sequential(*conv_norm(in_channels, 4 * width, 1, stride))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> class logits (B, K), with torchvision's names.

    widths and blocks: of each stage, whose resolution halves from the second on. bottleneck: three convolutions a
    block. stem: "imagenet" (7x7, stride 2, and max pooling) or "cifar" (3x3). statistics: of the pixels, see
    `normalised`. Deep Residual Learning, 1512.03385."""

    lora = r"conv1|layer\d\.\d+\.conv[12]"           # not the third of a bottleneck, nor those of the skips
    tuned = r"(?!fc\.|score\.).*\.bias|.*bn\d\.weight"                     # of a skip's norm (no "bn") the bias alone

    def __init__(self, in_channels, num_classes, widths=(64, 128, 256, 512), blocks=(2, 2, 2, 2), bottleneck=False,
                 stem="imagenet", statistics=None):
        super().__init__()
        if len(widths) != len(blocks):
            raise ValueError(f"widths {widths} and blocks {blocks} must name as many stages")
        self.stem, self.statistics, self.stages = stem, statistics, len(widths)
        kernel, stride = {"imagenet": (7, 2), "cifar": (3, 1)}[stem]
        self.conv1, self.bn1 = conv_norm(in_channels, widths[0], kernel, stride)
        make, before = Bottleneck if bottleneck else BasicBlock, widths[0]
        for k, (width, depth) in enumerate(zip(widths, blocks)):
            layers = []
            for n in range(depth):
                layers.append(make(before, width, 2 if k and not n else 1))
                before = width * make.expansion
            self.add_module(f"layer{k + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(before, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x):
        """The outputs of the stem and of each stage, from fine to coarse."""
        x = F.relu(self.bn1(self.conv1(normalised(x, self.statistics))))
        outputs = [x]
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1)
        for k in range(self.stages):
            outputs.append(x := getattr(self, f"layer{k + 1}")(x))
        return outputs

    def forward(self, x, t=None, y=None):
        return self.fc(self.features(x)[-1].mean((2, 3)))


class ResNetMap(ResNet):
    """Images (B, C, H, W) in [-1, 1] -> logits or numbers of each pixel (B, K, H, W): each stage of a ResNet, and its
    stem, is scored by a 1x1 convolution, and the scores are enlarged and added. Fully Convolutional Networks,
    1411.4038, section 4.2."""

    def __init__(self, in_channels, num_classes, **options):
        super().__init__(in_channels, num_classes, **options)
        del self.fc
        with torch.no_grad():
            widths = [h.shape[1] for h in self.eval().features(torch.zeros(1, in_channels, 32, 32))]
        self.train()
        self.score = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in widths)

    def forward(self, x, t=None, y=None):
        total = 0
        for score, h in zip(self.score, self.features(x)):
            total = total + F.interpolate(score(h), x.shape[2:], mode="bilinear")
        return total


class DeiTBlock(nn.Module):
    """Attention and MLP, pre-norm. (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim, 4 * dim, gelu="none")

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DeiT(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> class logits (B, K): a vision transformer with a class token and timm's names.
    Training data-efficient image transformers, 2012.12877 (without its distillation token)."""

    lora, tuned = r"blocks\.\d+\.attn\.(qkv|proj)", r".*\.bias"

    def __init__(self, image_size, in_channels, num_classes, patch_size=16, hidden_size=384, depth=12, num_heads=6,
                 statistics=None):
        super().__init__()
        rows, columns = patch_grid(image_size, patch_size)
        self.statistics = statistics
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, hidden_size))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, rows * columns + 1, hidden_size))
        self.patch_embed = PatchEmbed(in_channels, hidden_size, patch_size)
        self.blocks = nn.Sequential(*(DeiTBlock(hidden_size, num_heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(hidden_size, eps=1e-6), nn.Linear(hidden_size, num_classes)

    def forward(self, x, t=None, y=None):
        x = self.patch_embed(normalised(x, self.statistics))                                      # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


# ---------------------------------------------------------------------------------------------- what a guide is asked
# What is learned of y, one task a kind of y; each gives a number for each sample, (B,).


class Classes:
    """y is a class in 0 .. K - 1, of the image (B,), or of each pixel (B, H, W): the mean over the pixels."""
    name = "accuracy"

    def error(self, z, y):
        """-log p(y | x) of logits z (B, K, ..)."""
        return F.cross_entropy(z, y.long(), reduction="none").view(len(z), -1).mean(1)

    def transfer(self, z, teacher):
        """KL(softmax(teacher/0.25) || softmax(z)): the teacher is sharpened, the student is not. As published the mean
        over the classes (a 1/K of the divergence), without the factor of the temperature. 2212.05973, section 4.3."""
        target = (teacher / 0.25).softmax(1)
        return F.kl_div(z.log_softmax(1), target, reduction="none").flatten(1).mean(1)

    def score(self, z, y):
        return (z.argmax(1) == y).float().view(len(z), -1).mean(1)

    def read(self, z):
        """The y that the logits name."""
        return z.argmax(1)

    def discs(self, n, shape, num_classes):
        """Segments to ask for in a preview: a disc of each class in turn on class 0, (n, H, W)."""
        return (disc(shape) < 0) * (1 + torch.arange(n) % (num_classes - 1))[:, None, None]


class Maps:
    """y is a number of each pixel, (B, 1, H, W), such as a depth."""
    name = "mean_error"

    def error(self, z, y):
        """The squared error: -log p(y | x) of a normal distribution, but for constants; the mean over the pixels."""
        return (z - y).square().flatten(1).mean(1)

    transfer = error

    def score(self, z, y):
        return (z - y).abs().flatten(1).mean(1)

    def read(self, z):
        return z

    def discs(self, n, shape, num_classes):
        """Maps to ask for in a preview: the distance from a disc, (n, 1, H, W)."""
        return disc(shape).expand(n, 1, -1, -1)


def disc(shape):
    """The signed distance (H, W) from a disc of radius 0.6 in the middle of an image [-1, 1] wide, negative inside."""
    rows, columns = (torch.linspace(-1, 1, side) for side in shape[-2:])
    return (rows[:, None] ** 2 + columns**2).sqrt() - 0.6


# --------------------------------------------------------------------------------------------------- training a guide


def times_between(process, low, high, u):
    """Times (B,) of a process of which networks are told low + u (high - low), u (B,) in [0, 1), of 0 .. T: whole
    numbers of a chain; even in log sigma for EDM, in t for others."""
    told = low + (high - low) * u
    if isinstance(process, Discrete):
        return told.floor()
    if isinstance(process, EDM):
        return process.t_first * (process.t_noisy / process.t_first) ** (told / T)
    return (told / process.network_time(torch.ones(()))).clamp(process.t_first, process.t_noisy)


def same_noise(a, b):
    """Whether two processes noise alike: alpha and sigma at five shares of the way."""
    u = torch.linspace(0, 0.999, 5)
    paths = [torch.stack(p.path(times_between(p, 0, T, u).double())) for p in (a, b)]
    return type(a) is type(b) and torch.allclose(*paths)


class Guide(nn.Module):
    """The training objective of a guide: log p(y | x), or with a process log p(y | x_t) at times t drawn evenly.

    model(x, t) -> z. task: `Classes` or `Maps`. shape: (C, H, W) of an image; classes: their names. dense: y is a map.
    frozen_norms: batch statistics stay as they are, as in fine-tuning of published weights. What it draws is gradient
    ascent of log p(y | x) from grey: what the guide alone takes for y."""

    options = {"steps": 20, "rate": 0.05}
    options_help = {"steps": "of gradient ascent", "rate": "how far each goes, in grey levels of [-1, 1]"}

    def __init__(self, model, task, shape, num_classes, classes=(), process=None, dense=False, frozen_norms=False):
        super().__init__()
        self.model, self.task, self.shape, self.process = model, task, shape, process
        self.num_classes, self.classes, self.dense = num_classes, list(classes), dense
        self.frozen_norms = frozen_norms
        if process is not None:
            self.register_buffer("latest", torch.zeros(4))                 # scores, see `by_quarter`
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for m in self.model.modules():
            if self.frozen_norms and isinstance(m, nn.BatchNorm2d):
                m.eval()
        return self

    def outputs(self, xt, t, process, **choice):
        """z of x_t at t (B,): the network is shown x_t with the variance of clean images (as it is, on a chain), and
        told 0 .. 1000."""
        alpha, sigma = process.path(t)
        shown = xt * expand((alpha**2 + sigma**2) ** -0.5, xt)
        return self.model(shown, process.network_time(t).to(xt), **choice).float()

    def clean(self, x):
        """z of clean images."""
        return self.model(x, x.new_zeros(len(x))).float()

    def log_prob(self, xt, t, y, process):
        """log p(y | x_t), (B,), but for a constant; of maps the mean over pixels."""
        return -self.task.error(self.outputs(xt, t, process), y)

    def loss(self, batch):
        x, y, noise = batch["x"], batch["y"], batch["noise"]
        if self.dense and y.ndim < 3:
            raise ValueError("a guide of pixels needs data with a label for each: --data shapes:labels=segments, or "
                             "labels=distance")
        if self.process is None:
            z, t = self.clean(x), None
        else:
            t = times_between(self.process, 0, T, noise.uniform())
            z = self.outputs(self.process.noised(x, noise(x.shape), t), t, self.process)
        score = self.task.score(z, y)
        losses = {"loss": self.task.error(z, y).mean(), self.task.name: score.mean()}
        return losses if t is None else losses | self.by_quarter(score, self.process.network_time(t) * 4 / T)

    forward = loss                                   # DistributedDataParallel calls the module itself

    def by_quarter(self, score, place):
        """The score in each quarter of the times: averaged over t it looks low by nature. Where a small batch has no
        sample in a quarter, the one before holds."""
        with torch.no_grad():
            quarter = place.long().clamp(0, 3)
            for k in range(4):
                here = (quarter == k).to(score)
                mean = (score * here).sum() / here.sum().clamp(min=1)
                self.latest[k] = torch.where(here.any(), mean, self.latest[k])
        return {f"{self.task.name}_q{k + 1}": value for k, value in enumerate(self.latest.clone())}

    def conditions(self, n):
        """What a preview asks for: every class in turn; of maps a disc."""
        if self.dense:
            return self.task.discs(n, self.shape, self.num_classes)
        return torch.arange(n) % self.num_classes

    def seen_in(self, picture):
        """The y that this guide, as it was before any tuning for noise, reads in a picture file, (1, ..)."""
        x = torch.from_numpy(data.read_image(picture, self.shape[-1]).copy()) / 127.5 - 1
        device = next(self.parameters()).device
        with torch.no_grad():
            return self.task.read(self.off_the_shelf.clean(x[None].to(device)))

    @property
    def off_the_shelf(self):
        return self

    def trajectory(self, noise, conditions, steps=20, rate=0.05):
        x = 0.1 * noise((len(noise), *self.shape))
        y = (self.conditions(len(noise)) if conditions is None else conditions).to(x.device)
        gradient = gradient_of(lambda x, t: -self.task.error(self.clean(x), y))
        for _ in range(steps):
            g = gradient(x, None)
            x = (x + rate * g / expand(g.flatten(1).abs().mean(1).clamp(min=1e-12), x)).clamp(-1, 1)
            yield x

    def cost(self):
        """(parameters, multiply-accumulates of one image)."""
        return count(self.model, torch.empty(1, *self.shape, device="meta"), torch.empty(1, device="meta"))

    def load_published(self, state, path):
        """Put weights under their published names into the network; a head of other classes stays fresh. ValueError if
        anything else does not fit."""
        own = self.model.state_dict()
        fresh = [k for k in own if re.match(r"(fc|head|score|out)\.", k) and k in state and
                 state[k].shape != own[k].shape]
        wrong = [k for k in own if k not in fresh and not k.endswith("num_batches_tracked")
                 and (k not in state or state[k].shape != own[k].shape)]
        if wrong:
            raise ValueError(f"{path} holds other weights: {len(wrong)} of {len(own)} names or shapes differ, the "
                             f"first is {wrong[0]}")
        self.model.load_state_dict({k: v for k, v in state.items() if k in own and k not in fresh}, strict=False)
        return fresh


def asked(guide, objective, conditions, picture=None):
    """log p(y | x_t) as the function of (x_t, t) that `gradient_of` takes, of a guide beside the denoiser that
    `objective` has trained. conditions: y; picture: a file, y is what the guide sees in it. ValueError if the two do
    not go together."""
    if not isinstance(guide, Guide):
        raise ValueError(f"the guide is a {type(guide).__name__}: name a run of a guide (`python train.py --list`)")
    if guide.shape != tuple(objective.shape):
        raise ValueError(f"the guide looks at images of {'x'.join(map(str, guide.shape))}, this run draws "
                         f"{'x'.join(map(str, objective.shape))}")
    if objective.num_classes and objective.num_classes != guide.num_classes:
        raise ValueError(f"the guide knows {guide.num_classes} classes, this run {objective.num_classes}")
    if guide.process is not None and not same_noise(guide.process, objective.process):
        raise ValueError("the guide was trained on the noise of another process than this run's: train it with the "
                         "same --process")
    if not picture and (getattr(conditions, "ndim", 0) == 1) == guide.dense:          # none, text, or of another kind
        raise ValueError("a guide is asked for classes or, if it knows pixels or this run reads text, for a picture: "
                         "--classes NAME,... or --guide-image FILE")
    y = (guide.seen_in(picture) if picture else conditions).to(next(guide.parameters()).device)
    return lambda xt, t: guide.log_prob(xt, t, y.expand(len(xt), *y.shape[1:]), objective.process)


# -------------------------------------------------------------------------------------------------------- LoRA, experts


class LoRA(nn.Module):
    """A frozen linear layer or convolution whose weight W is adapted by few numbers: W + alpha/r B A. Low-Rank
    Adaptation, 2106.09685. It starts as the layer was.

    A (r, in), B (out, r). Of a k x k convolution, as in PPAP's code, A (r k, in k), B (out k, r k), and the product
    (out k, in k) is read row by row as (out, in, k, k). ValueError for a layer with groups or oblong kernels. The
    published linear layer forgets alpha/r unless it is merged."""

    def __init__(self, layer, r=16, alpha=8.0):
        super().__init__()
        k = layer.weight.shape[2] if isinstance(layer, nn.Conv2d) else 1
        if layer.weight[0, 0].numel() != k * k or getattr(layer, "groups", 1) > 1:
            raise ValueError("LoRA is defined here for linear layers and for convolutions without groups, whose kernel "
                             "is a square")
        out, inside = layer.weight.shape[:2]
        self.layer, self.scale = layer, alpha / r
        self.lora_A = nn.Parameter(layer.weight.new_empty(r * k, inside * k))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(out * k, r * k))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def delta(self):
        return self.scale * (self.lora_B @ self.lora_A).view_as(self.layer.weight)

    def forward(self, x):
        return functional_call(self.layer, {"weight": self.layer.weight + self.delta()}, (x,))

    def merged(self):
        """An ordinary layer that computes the same."""
        layer = copy.deepcopy(self.layer)
        with torch.no_grad():
            layer.weight += self.delta()
        return layer


def replaced(network, kind, make):
    """The network with each module of a kind replaced by make(module), in place."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))
    return network


def adapted(network, r=16, alpha=8.0):
    """A copy of a network for PPAP: `LoRA` on the layers that its `lora` names, which train together with the
    parameters that its `tuned` names. All others are frozen, and not copied: they are the network's own."""
    if network.lora is None:
        raise ValueError(f"{type(network).__name__} has no layers named that PPAP adapts: take a ResNet or a DeiT")
    tuned = [name for name, _ in network.named_parameters() if re.fullmatch(network.tuned, name)]
    shared = {id(p): p for name, p in network.named_parameters() if name not in tuned}
    expert = copy.deepcopy(network, shared).requires_grad_(False)
    for name in [name for name, _ in expert.named_modules() if re.fullmatch(network.lora, name)]:
        parent, _, child = name.rpartition(".")
        parent = expert.get_submodule(parent)
        setattr(parent, child, LoRA(getattr(parent, child), r, alpha))
    for name, p in expert.named_parameters():
        p.requires_grad_(name.replace(".layer.", ".") in tuned or "lora_" in name)
    return expert


def merged(network):
    """A copy of an adapted network as ordinary layers."""
    return replaced(copy.deepcopy(network), LoRA, LoRA.merged)


class Experts(nn.Module):
    """Networks that share the times 0 .. T evenly: x (B, C, H, W), t (B,) -> z, each sample's from the expert of its
    own t. So N experts take N times the storage and no more time.

    edges: int(i T/N). A time on an edge belongs to the lower expert, as in the published code, although `span`, the
    times that expert i trains on, has it in the upper one. 2212.05973, section 4.1."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.edges = [int(i * T / len(networks)) for i in range(len(networks) + 1)]

    def span(self, i):
        """[low, high) of the times that expert i is trained on."""
        return self.edges[i], self.edges[i + 1]

    def choose(self, t):
        """The expert of each time, int64 (B,)."""
        ends = torch.tensor(self.edges[1:-1], dtype=torch.float32, device=t.device)
        return torch.bucketize(t.float().contiguous(), ends)

    def forward(self, x, t, y=None, expert=None):
        if expert is not None:
            return self.networks[expert](x, t)
        chosen = self.choose(t)
        first, *others = chosen.unique().tolist()
        if not others:
            return self.networks[first](x, t)
        parts = {i: (chosen == i).nonzero()[:, 0] for i in (first, *others)}
        z = torch.cat([self.networks[i](x[rows], t[rows]) for i, rows in parts.items()])
        return z[torch.cat(list(parts.values())).argsort()]


# ----------------------------------------------------------------------------------------------------------------- PPAP


class ChunkNoise:
    """The random numbers of n images to be drawn, a function of the number of their chunk alone."""

    def __init__(self, n, chunk, device):
        self.n, self.device, self.generator = n, device, torch.Generator().manual_seed(chunk)

    def __len__(self):
        return self.n

    def normal(self, *sizes):
        return torch.randn(self.n, *sizes, generator=self.generator).to(self.device)

    def uniform(self, *sizes):
        return torch.rand(self.n, *sizes, generator=self.generator).to(self.device)

    def __call__(self, shape):
        return self.normal(*shape[1:])


def draw_unlabelled(diffusion, n, steps, device, chunk=64):
    """n images that a denoiser draws without conditions, by DDIM, as 8-bit images: uint8 (n, C, H, W) on the device."""
    images = []
    bar = tqdm(range(0, n, chunk), desc="images for the experts", unit=" batches", leave=False, delay=2)
    for k, begin in enumerate(bar):
        noise = ChunkNoise(min(chunk, n - begin), k, device)
        with torch.autocast(torch.device(device).type, enabled=False):
            *_, x = diffusion.trajectory(noise, None, sampler="ddim", steps=steps)
        if not x.isfinite().all():
            raise ValueError("what the unconditional run draws holds numbers that are not finite")
        images.append((x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(images)


class PPAP(Guide):
    """PPAP: experts of an off-the-shelf guide for N ranges of noise, tuned without data or labels on what a run draws.

    guide: a run of a guide of clean images, the off-the-shelf network. diffusion: an unconditional run, whose `images`
    images, drawn in `draw_steps` DDIM steps, are all the data there is (the loop's images are not looked at); without
    it the loop's images are taken, without labels. Each step trains one expert, in turn, on noise of its own range:
    what it makes of x_t should be what the guide makes of the clean image. r, alpha: of `LoRA`. Towards Practical
    Plug-and-Play Diffusion Models, 2212.05973.

    labels: the supervised variants, cross-entropy with the loop's labels; full: every weight of every expert is tuned
    (experts=1,labels=True,full=True is the usual noise-aware network). raw: the experts see pixels in [-1, 1] without
    the guide's normalisation, as in the published code. flip: mirror half of the drawn images.

    As in the paper every expert starts from the off-the-shelf weights; the published code trains them one after the
    other, each from the one before."""

    options = {"scale": 7.5, "sampler": "ddim", "steps": 25}
    options_help = {"scale": "of the guidance", "steps": "sampling steps"}

    def __init__(self, image_size, in_channels, num_classes, process, *, guide: Run = None, diffusion: Run = None,
                 experts=5, r=16, alpha=8.0, images=5000, draw_steps=25, labels=False, full=False, raw=False,
                 flip=False):
        if not isinstance(guide, Guide) or guide.process is not None:
            raise ValueError("ppap tunes a guide of clean images: ppap:guide=RUN, of `--model resnet-nano`, say")
        if not 1 <= experts <= T:
            raise ValueError(f"{experts} experts: choose 1 to {T}")
        if guide.shape != (in_channels, *pair(image_size)) or guide.num_classes != num_classes:
            raise ValueError(f"the guide looks at images of {'x'.join(map(str, guide.shape))} and {guide.num_classes} "
                             f"classes, --data has {in_channels}x{'x'.join(map(str, pair(image_size)))} and "
                             f"{num_classes}")
        if diffusion is not None:
            self.check_source(diffusion, guide, labels)
            process = diffusion.process
        copies = [copy.deepcopy(guide.model).requires_grad_(True) if full else adapted(guide.model, r, alpha)
                  for _ in range(experts)]
        for network in copies:
            network.statistics = None if raw else network.statistics
        super().__init__(Experts(copies), guide.task, guide.shape, guide.num_classes, guide.classes, process,
                         guide.dense)
        self.images, self.draw_steps, self.labels, self.flip = images, draw_steps, labels, flip
        self.__dict__.update(teacher=guide, diffusion=diffusion, drawn=None)            # no part of the state
        self.register_buffer("latest", torch.zeros(experts))
        if diffusion is None:
            self.options = Guide.options

    def check_source(self, diffusion, guide, labels):
        """ValueError unless a run can draw the images that the experts of a guide learn from."""
        if getattr(diffusion, "process", None) is None or isinstance(diffusion, Guide):
            raise ValueError("ppap:diffusion=RUN names a run of a denoiser")
        if diffusion.conditional:
            raise ValueError("ppap:diffusion=RUN draws without labels: train it with --unconditional")
        if tuple(diffusion.shape) != guide.shape:
            raise ValueError(f"ppap: the guide looks at images of {'x'.join(map(str, guide.shape))}, the diffusion run "
                             f"draws {'x'.join(map(str, diffusion.shape))}")
        if labels:
            raise ValueError("ppap: what a run draws has no labels; leave out diffusion=, or labels=True")

    @property
    def off_the_shelf(self):
        return self.teacher

    def source(self, batch):
        """x (B, C, H, W) of a step: of the images that were drawn, or of the loop's."""
        if self.diffusion is None:
            return batch["x"]
        if self.drawn is None:
            self.__dict__["drawn"] = draw_unlabelled(self.diffusion, self.images, self.draw_steps, batch["x"].device)
        rows, mirror = batch["noise"].uniform(2).unbind(1)
        x = self.drawn[(rows * len(self.drawn)).long()].float() / 127.5 - 1
        return torch.where((mirror < 0.5)[:, None, None, None], x.flip(3), x) if self.flip else x

    def loss(self, batch):
        noise, networks = batch["noise"], self.model.networks
        i = batch["step"] % len(networks)
        x = self.source(batch)
        t = times_between(self.process, *self.model.span(i), noise.uniform())
        z = self.outputs(self.process.noised(x, noise(x.shape), t), t, self.process, expert=i)
        if self.labels:
            target, error = batch["y"], self.task.error(z, batch["y"])
        else:
            with torch.no_grad():
                teacher = self.teacher.clean(x)
            target, error = self.task.read(teacher), self.task.transfer(z, teacher)
        loss, score = error.mean(), self.task.score(z, target)
        for k, network in enumerate(networks):
            for p in network.parameters():
                p.paused = k != i
                if p.requires_grad and k != i and dist.is_initialized():
                    loss = loss + 0 * p.sum()        # DistributedDataParallel waits for a gradient of every parameter
        with torch.no_grad():
            self.latest[i] = score.mean()
        by_expert = {f"{self.task.name}_{k + 1}": value for k, value in enumerate(self.latest.clone())}
        return {"loss": loss, self.task.name: score.mean()} | by_expert

    forward = loss

    def trajectory(self, noise, conditions, scale=7.5, sampler="ddim", steps=25, rate=0.05):
        if self.diffusion is None:
            yield from super().trajectory(noise, conditions, steps, rate)
            return
        y = self.conditions(len(noise)) if conditions is None else conditions
        yield from self.diffusion.trajectory(noise, y, guide=self, guide_scale=scale, sampler=sampler, steps=steps)

    def share(self):
        """The trained share of the numbers that one expert has."""
        network = self.model.networks[0]
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        return trained / sum(p.numel() for p in self.teacher.model.parameters())

    def cost(self):
        """(parameters of all experts, multiply-accumulates of the one that an image sees)."""
        return sum(p.numel() for p in self.parameters()), self.teacher.cost()[1]


# ------------------------------------------------------------------------------------------------------------- registry


def built(model, image_size, in_channels, num_classes, classes, process=None, **more):
    """The `Guide` around a network of classes; ValueError for data without any."""
    if not num_classes:
        raise ValueError("a classifier needs data with classes (and no --unconditional)")
    return Guide(model, Classes(), (in_channels, *pair(image_size)), num_classes, classes, process, **more)


def resnet(image_size, in_channels, num_classes, classes, process, *, widths=(64, 128, 256, 512), blocks=(2, 2, 2, 2),
           bottleneck=False, stem="imagenet", noisy=False, pretrained=False):
    """A ResNet that classifies clean images, 1512.03385. noisy: noisy ones, without being told how noisy. pretrained:
    made for torchvision's weights (--published FILE): inputs get ImageNet's mean and standard deviation, batch
    statistics stay as they are."""
    network = ResNet(in_channels, max(1, num_classes), widths, blocks, bottleneck, stem,
                     IMAGENET if pretrained else None)
    return built(network, image_size, in_channels, num_classes, classes, process if noisy else None,
                 frozen_norms=pretrained)


def deit(image_size, in_channels, num_classes, classes, process, *, patch_size=16, hidden_size=384, depth=12,
         num_heads=6, noisy=False, pretrained=False):
    """A DeiT that classifies clean images, 2012.12877. noisy: noisy ones. pretrained: made for timm's weights
    (--published FILE): inputs get ImageNet's mean and standard deviation."""
    network = DeiT(image_size, in_channels, max(1, num_classes), patch_size, hidden_size, depth, num_heads,
                   IMAGENET if pretrained else None)
    return built(network, image_size, in_channels, num_classes, classes, process if noisy else None)


def classifier_adm(image_size, in_channels, num_classes, classes, process, *, channels=128, multipliers=(1, 2, 3, 4),
                   blocks=2, attention=(32, 16, 8), head_channels=64, pool="attention", dropout=0.0, noisy=True):
    """ADM's classifier of noisy images, half a U-Net that is told the time, 2105.05233. attention: the sides of the
    feature maps that attend. noisy=False: of clean images."""
    factors = [pair(image_size)[1] // side for side in attention]
    network = ADMClassifier(image_size, in_channels, max(1, num_classes), channels, multipliers, blocks, factors,
                            head_channels, pool=pool, dropout=dropout)
    return built(network, image_size, in_channels, num_classes, classes, process if noisy else None)


def resnet_map(image_size, in_channels, num_classes, classes, process, *, widths=(32, 64, 128), blocks=(1, 1, 1),
               stem="cifar", noisy=False):
    """A ResNet that names the class of each pixel, or a number of each where the data have no classes, 1411.4038. Data:
    shapes:labels=segments, or labels=distance. noisy: on noisy images."""
    network = ResNetMap(in_channels, num_classes or 1, widths=widths, blocks=blocks, stem=stem)
    task = Classes() if num_classes else Maps()
    return Guide(network, task, (in_channels, *pair(image_size)), num_classes, classes, process if noisy else None,
                 dense=True)


DEEP = partial(resnet, bottleneck=True)
GUIDES = {
    "resnet-nano": partial(resnet, widths=(32, 64, 128), blocks=(1, 1, 1), stem="cifar"),
    "resnet-18": partial(resnet), "resnet-34": partial(resnet, blocks=(3, 4, 6, 3)),
    "resnet-50": partial(DEEP, blocks=(3, 4, 6, 3)), "resnet-101": partial(DEEP, blocks=(3, 4, 23, 3)),
    "resnet-152": partial(DEEP, blocks=(3, 8, 36, 3)),
    "resnet-map-nano": partial(resnet_map),
    "deit-nano": partial(deit, patch_size=4, hidden_size=96, depth=4, num_heads=3), "deit-s": partial(deit),
    "classifier-adm-nano": partial(classifier_adm, channels=32, multipliers=(1, 2, 2), blocks=1, attention=(8, 4),
                                   head_channels=32),
    "classifier-adm-64": partial(classifier_adm, blocks=4),                              # by the size of the images
    "classifier-adm-128": partial(classifier_adm, multipliers=(1, 1, 2, 3, 4)),
    "classifier-adm-256": partial(classifier_adm, multipliers=(1, 1, 2, 2, 4, 4)),
    "classifier-adm-512": partial(classifier_adm, multipliers=(0.5, 1, 1, 2, 2, 4, 4)),
    "ppap": PPAP,
}


# ------------------------------------------------------------------------------------------------- the command `guides`


def guides_flags(p):
    p.add_argument("run", type=runs.Run, nargs="+", help="folders of runs of guides of one data set: clean, noisy, "
                   "ppap")
    p.add_argument("--n", type=int, default=1000, help="held-out images (default: %(default)s)")
    p.add_argument("--ranges", type=int, default=5, help="of the times (default: %(default)s)")
    p.add_argument("--diffusion", type=runs.Run, metavar="RUN", help="also draw from this run under each guide, asked "
                   "for the labels of held-out images, and let the first guide, a clean one, say what it sees")
    p.add_argument("--scale", type=float, default=7.5, help="of the guidance (default: %(default)s)")
    p.add_argument("--drawn", type=int, default=128, metavar="N", help="images to draw (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="of the noise (default: %(default)s)")
    p.add_argument("--batch", type=int, default=250, help="images at once (default: %(default)s)")
    p.add_argument("--weights", choices=["ema", "model"], default="ema",
                   help="averaged or last weights (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


@torch.no_grad()
def guides(args):
    """What guides know of noisy images: the score of each on held-out images, clean and in each range of noise."""
    for run in args.run:
        if not isinstance(run.objective, Guide):
            raise ValueError(f"{run.path} is no guide: this command measures classifiers and the like")
    process = next((run.objective.process for run in args.run if run.objective.process is not None), None)
    if process is None:
        raise ValueError("none of these guides was trained on noise: name one that was, which says what noise")
    held_out, generator = args.run[0].data("test"), torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:args.n]
    edges = [T * k / args.ranges for k in range(args.ranges + 1)]
    headings = ["clean"] + [f"{low:.0f}-{high:.0f}" for low, high in zip(edges, edges[1:])]
    sums = torch.zeros(len(args.run), len(headings), dtype=torch.float64)
    for some in tqdm(rows.split(args.batch), desc="scoring", unit=" batches", delay=2):
        x, y = held_out.gather(some)
        for k in range(len(headings)):
            u, eps = torch.rand(len(x), generator=generator), torch.randn(x.shape, generator=generator)
            t = times_between(process, *edges[k - 1:k + 1], u.to(x.device)) if k else None
            for j, run in enumerate(args.run):                             # all see the same x_t
                guide = run.objective
                z = guide.off_the_shelf.clean(x) if t is None else \
                    guide.outputs(process.noised(x, eps.to(x.device), t), t, process)
                sums[j, k] += guide.task.score(z, y).sum().item()
    name = args.run[0].objective.task.name
    print(f"{name} on {len(rows)} held-out images, by what is told of the time (clean: of a ppap run's guide)")
    print(f"{'':34}{'trained':>9}" + "".join(f"{heading:>10}" for heading in headings))
    for run, row in zip(args.run, sums / len(rows)):
        guide = run.objective
        share = f"{guide.share():.1%}" if isinstance(guide, PPAP) else "100%"
        print(f"{run.path[-33:]:34}{share:>9}" + "".join(f"{value:10.4f}" for value in row.tolist()))
    if args.diffusion is not None:
        report_drawn(args, held_out.gather(rows[:args.drawn])[1])


def report_drawn(args, y):
    """Print what the first guide sees in images that were drawn under each, beside what was asked for: y (n, ..)."""
    judge, task = args.run[0].objective, args.run[0].objective.task
    print(f"{task.name} of {len(y)} images drawn by {args.diffusion.path} at scale {args.scale:g}, seen by "
          f"{args.run[0].path}")
    for scale, run in [(0.0, args.run[0]), *((args.scale, run) for run in args.run)]:
        images = args.diffusion.images(len(y), args.seed, args.batch, y, guide=run.objective, guide_scale=scale,
                                       sampler="ddim", steps=25)
        score = task.score(judge.off_the_shelf.clean(torch.cat(list(images))), y.to(args.diffusion.device))
        print(f"{run.path[-33:] if scale else 'unguided':34}{score.mean():9.4f} +- {score.std() / len(y)**0.5:.4f}")
