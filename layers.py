"""What several backbones share: what they say of themselves, embeddings, patches, sequences of mixed sizes, rotary
positions, adaLN, attention, MLPs, initial weights, ternary layers, text, and how multiplications are counted.

Letters, here and everywhere in the project; a shape at the end of a line is that after the line.

    B  batch                          x0    clean image                     p   side of a patch
    C  channels of an image           eps   noise                           E   experts
    H W  its rows and columns         x xt  noisy image                     K   experts that a token takes
    F  frames                         t     the process's own time,         S   states of a scan, per channel
    N  tokens of an image                   or what the network is told     T   tokens of a whole batch, in one row
    D  width of a token               tau   time in [-1, 1] (DiMR)          L   length of a text, or of rows that
    h  heads, each D/h wide           y     labels (B,), Text, or None          padding has made equally long
                                      c     condition of adaLN, (B, D)

The grid of an image is its (rows, columns) of patches, that of a clip (frames, rows, columns).
"""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import kernels


def pair(size):
    """An int or (height, width) -> (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


class Backbone(nn.Module):
    """A denoising backbone, model(x, t, y) -> prediction, and what else it can. Whoever uses one asks by these names,
    whose defaults stand only here; a class, or one model in its constructor, sets those in which it differs.

        sides         how many sides that which it draws may have: 2 for images (H, W), 3 for clips (F, H, W), 1 for
                      sounds (T,)
        patch_size    side of a patch in pixels
        stride        the sides of an image must be multiples of it
        any_size      whether it draws images of any such size: that of x, once `resize` has been told of it
        mixed_sizes   whether images of several sizes may come in one batch: x a list of them, or a canvas and sizes=
        ropes         names of its rotary frequencies, which reach beyond the sizes of training: model.rope = name
        text_width    of the text that it reads as its condition, a `Text`; 0: it reads none
        text_length   captions are cut to so many tokens
        null_text     (text_length, text_width), the empty caption where text is precomputed; None without text
        multi_scale   whether model(x, t, y, every=True) returns a prediction at each of several resolutions
        post_trains   regular expression of the weights that post-training for a larger size changes, or None
        balance       weight of the balance loss of its experts in the training loss (`moe.balanced`)
    """

    sides = (2,)
    patch_size = 1
    any_size = False
    mixed_sizes = False
    ropes = ()
    text_width = 0
    text_length = 0
    null_text = None
    multi_scale = False
    post_trains = None
    balance = 0.0

    @property
    def stride(self):
        return self.patch_size

    def resize(self, image_size):
        """From now on draw this size: a side in pixels, (H, W), or as many sides as it draws. ValueError if it cannot,
        one sentence."""
        sides = pair(image_size)
        if not self.any_size:
            raise ValueError(f"{type(self).__name__} draws images of the size that it was built for, no other")
        if len(sides) not in self.sides:
            raise ValueError(f"{type(self).__name__} draws nothing of {len(sides)} sides")
        if len(sides) > 1:
            patch_grid(sides[-2:], self.stride, "its stride" if self.stride != self.patch_size else "the patch size")


# ----------------------------------------------------------------------------------------------------------- embeddings


def timestep_embedding(t, dim, max_period=10000):
    """Sinusoids of t (B,), any float -> (B, dim): [cos(t f_i) | sin(t f_i)], f_i = max_period^(-i / (dim // 2)).

    An odd dim is padded with a zero. Attention Is All You Need, 1706.03762, section 3.5, in the order of the published
    DDPM code (cosines first).
    """
    half = dim // 2
    f = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * f                                                                    # (B, dim // 2)
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, dim % 2))


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, D): sinusoids of width `frequencies` through Linear, SiLU, Linear."""

    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(timestep_embedding(t, self.frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) in 0 .. num_classes -> (B, D). Row num_classes is the null label of classifier-free guidance
    (2207.12598, absent if null=False). Who trains drops labels, not this layer."""

    def __init__(self, num_classes, dim, null=True):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null, dim)

    def forward(self, y):
        return self.embedding_table(y)


def position_table(dim, height, width, spacing=(1.0, 1.0)):
    """Fixed 2-D sinusoids (height * width, dim), rows in row-major order, for dim divisible by 4.

    With e(q) = [sin(q w) | cos(q w)], w_i = 10000^(-i / (dim/4)), a patch in row r and column c gets [e(c) | e(r)]: the
    column comes first, as in the published DiT and MAE code. spacing: of rows and of columns, 1 for neighbours.
    """
    w = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows = torch.arange(height, dtype=torch.float64) * spacing[0]
    columns = torch.arange(width, dtype=torch.float64) * spacing[1]
    row, column = (q.flatten()[:, None] * w for q in torch.meshgrid(rows, columns, indexing="ij"))   # (H W, dim/4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1).float()


# -------------------------------------------------------------------------------------------------------------- patches


class PatchEmbed(nn.Module):
    """Image (B, C, H, W) -> tokens (B, N, D), row-major: a linear map of each p x p patch, stored as a convolution."""

    def __init__(self, in_channels, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def patch_grid(image_size, patch_size, what="the patch size"):
    """(rows, columns) of patches; ValueError if the patch does not divide the image."""
    H, W = pair(image_size)
    if H % patch_size or W % patch_size:
        near = "x".join(str(side // patch_size * patch_size or patch_size) for side in (H, W))
        raise ValueError(f"image size {H}x{W} is not divisible by {what} {patch_size}: try {near}")
    return H // patch_size, W // patch_size


def unpatchify(tokens, grid, p):
    """Tokens (B, N, p*p*C) -> image (B, C, grid[0] p, grid[1] p). Within a token the channel runs fastest (not the
    layout of PatchEmbed's weight, where it runs slowest)."""
    B, (rows, columns) = len(tokens), grid
    x = tokens.view(B, rows, columns, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * p, columns * p)


# ----------------------------------------------------------------------------------- sequences of images of mixed sizes
# A batch of mixed sizes is a canvas: every image at the upper left of a zero tensor that all fit, and sizes (B, dims),
# each one's own sides. `pack` cuts it into sequences of tokens that leave the rest of the canvas out.


def canvas(images):
    """[(C, sides), ...] of as many dims -> x (B, C, largest sides), zero beyond each image, sizes (B, dims) int64."""
    sizes = torch.tensor([x.shape[1:] for x in images])
    x = images[0].new_zeros(len(images), images[0].shape[0], *sizes.amax(0).tolist())
    for own, image in zip(x, images):
        own[tuple(map(slice, image.shape))] = image
    return x, sizes


def cropped(x, sizes):
    """The images of a canvas: a list of (C, sides)."""
    return [image[(slice(None), *map(slice, size))] for image, size in zip(x, sizes.tolist())]


def token_grid(sides, patch_size):
    """(frames, rows, columns) of the patches of an image (H, W) or a clip (F, H, W), in pixels, or of the time steps of
    a sound (T,). ValueError if the patch does not divide the sides."""
    if len(sides) == 1:
        return 1, 1, sides[0]
    return sides[0] if len(sides) == 3 else 1, *patch_grid(sides[-2:], patch_size)


def sequence(grid, own=None, nextline=False, nextframe=False):
    """Which patch each token of each image is: frame by frame, row by row, with a [nextline] token after each row and a
    [nextframe] token after each frame where asked (2405.05945), padded to the longest of the batch.

    grid: (frames, rows, columns) of the canvas's n patches; own (B, 3): each image's, None: all fill it, and B is 1.
    Returns place (B, L): the patch in the canvas, n for [nextline], n + 1 for [nextframe], n + 2 for padding; mask
    (B, L) bool, true for all but padding, None if there is none; row and column (B, L) of each token's patch.

    Two images on a canvas of 2 x 3 patches, the second of 2 x 2, with [nextline]:

        canvas      first       second      place
        0 1 2       0 1 2       0 1 .       0 1 2 6 3 4 5 6       6 = n: [nextline]
        3 4 5       3 4 5       3 4 .       0 1 6 3 4 6 8 8       8 = n + 2: padding
    """
    (_, H, W), n = grid, math.prod(grid)
    frames, rows, columns = (torch.tensor([grid]) if own is None else own).T[..., None]                      # (B, 1)
    line = columns + nextline                                        # tokens of a row
    frame = rows * line + nextframe                                  # tokens of a frame
    length = frames * frame
    k = torch.arange(length.max().item())[None]                      # the tokens' numbers in their sequence, (1, L)
    row, column = k % frame // line, k % frame % line
    place = (k // frame * H + row) * W + column
    place = place.where(column < columns, n).where(row < rows, n + 1).where(k < length, n + 2)
    return place, None if (length == length[0]).all() else k < length, row, column


def pack(x, patch_size, sizes=None, nextline=False, nextframe=False):
    """Images, clips or sounds x (B, C, *sides), of which number i fills the upper left sizes[i] (sizes (B, dims) in
    pixels; None: all) -> tokens (B, N, C p p), one for each patch, channels slowest, zero for [nextline] and
    [nextframe]; and the `Layout` by which a model reads them: `layout.unpack(tokens)` is x again."""
    grid, B = token_grid(x.shape[2:], patch_size), len(x)
    own = None if sizes is None else torch.tensor([token_grid(size, patch_size) for size in sizes.tolist()])
    place, mask, row, column = sequence(grid, own, nextline, nextframe)
    layout = (Layout if mask is None else PaddedLayout)(x, patch_size, grid, own, place, row, column, mask)
    (frames, rows, columns), p = grid, patch_size
    patches = x.reshape(B, -1, frames, rows, p, columns, p).permute(0, 2, 3, 5, 1, 4, 6)
    return layout.unpadded(layout.picked(patches.reshape(B, layout.n, -1))), layout


class Layout:
    """Where the tokens of a batch stand, and how a network goes from tokens to rows of them and back. This one is for
    images whose sequences are all equally long: tokens lie as rows, (B, N, D), and most methods do nothing.

    grid, own, place, row, column: see `sequence`. n: patches of the canvas; patches, lengths (B or 1,) float64: of each
    image, patches alone and tokens in all; size: (rows, columns) of each image's grid, two ints or two (B,); mask: for
    attention, here None."""

    mask = None

    def __init__(self, x, patch_size, grid, own, place, row, column, mask=None):
        self.shape, self.patch_size, self.grid, self.n = x.shape, patch_size, grid, math.prod(grid)
        self.place, self.row, self.column = place.to(x.device), row, column
        self.size = grid[1:] if own is None else own.T[1:]
        self.patches = torch.tensor([self.n]).double() if own is None else own.prod(1).double()
        self.lengths = (place < self.n + 2).sum(1).double()
        self.plain = own is None and place.shape[1] == self.n          # every token is its patch

    def picked(self, patches):
        """Patches of the canvas (B, n, D) -> in the order of the sequences (B, L, D), zero where a token is none."""
        if self.plain:
            return patches
        place = self.place[..., None].expand(len(patches), -1, patches.shape[2])
        return F.pad(patches, (0, 0, 0, 3)).gather(1, place)

    def marked(self, tokens, nextline, nextframe, padding):
        """The tokens with the learned vectors (D,) of [nextline], [nextframe] (None: without) and padding in place."""
        zero = torch.zeros_like(nextline)
        special = torch.stack([zero, nextline, zero if nextframe is None else nextframe, padding]).to(tokens.dtype)
        place = self.unpadded(self.place[..., None])                                                # (B or 1, N, 1)
        return torch.where(place < self.n, tokens, special[(place[..., 0] - self.n + 1).clamp(min=0)])

    def unpadded(self, rows):
        """Rows (B or 1, L, D) as tokens lie."""
        return rows

    def padded(self, tokens):
        """Tokens as rows (B, L, D)."""
        return tokens

    def heads(self, *tokens):
        """Heads of the tokens as attention takes them, (B, h, L, D/h) each."""
        return tokens

    def modulation(self, c, parts):
        """Modulation (B, parts D), one for each image, as so many tensors that `modulate` takes."""
        return c.chunk(parts, 1)

    def unpack(self, tokens, channels_last=False):
        """Tokens of C p p numbers, channels slowest or last -> (B, C, *sides), zero beyond each image."""
        patches, (B, _, *sides), p = self.padded(tokens), self.shape, self.patch_size
        if not self.plain:
            place = self.place[..., None].expand(patches.shape)
            patches = patches.new_zeros(B, self.n + 3, patches.shape[2]).scatter(1, place, patches)[:, :self.n]
        if channels_last:
            patches = patches.view(B, *self.grid, p, p, -1).permute(0, 6, 1, 2, 4, 3, 5)
        else:
            patches = patches.view(B, *self.grid, -1, p, p).permute(0, 4, 1, 2, 5, 3, 6)
        return patches.reshape(B, -1, *sides)                          # from (B, C, frames, rows, p, columns, p)


class PaddedLayout(Layout):
    """For sequences of several lengths: the T real tokens of all images go through everything but attention as
    (T, 1, D), a batch of single tokens; attention sees rows (B, L, D) and `mask` (B, 1, 1, L) bool, False at padding.
    So padding costs nothing but in attention."""

    def __init__(self, x, patch_size, grid, own, place, row, column, mask):
        super().__init__(x, patch_size, grid, own, place, row, column)
        self.mask = mask[:, None, None].to(x.device)
        self.kept = mask.flatten().nonzero()[:, 0].to(x.device)        # (T,): places of real tokens in flattened rows
        self.image = mask.nonzero()[:, 0].to(x.device)                 # (T,): whose they are

    def unpadded(self, rows):
        """(B or 1, L, D) -> (T, 1, D)."""
        rows = rows.expand(len(self.mask), -1, -1)
        return rows.flatten(0, 1).index_select(0, self.kept)[:, None]

    def padded(self, tokens):
        """(T, 1, D) -> (B, L, D), zero at padding."""
        return self.rows(tokens[:, 0])

    def heads(self, *tokens):
        """(T, h, 1, D/h) -> (B, h, L, D/h) each."""
        return [self.rows(z[:, :, 0]).transpose(1, 2) for z in tokens]

    def modulation(self, c, parts):
        """(B, parts D) -> so many (T, D): each token's is that of its image."""
        return [part.index_select(0, self.image) for part in c.chunk(parts, 1)]

    def rows(self, tokens):
        """(T, ...) -> (B, L, ...)."""
        B, L = len(self.mask), self.mask.shape[3]
        return tokens.new_zeros(B * L, *tokens.shape[1:]).index_copy(0, self.kept, tokens).unflatten(0, (B, L))


# ----------------------------------------------------------------------------------------------------------------- RoPE

# Rotary frequencies beyond the sizes of training: name -> line. FiT, 2402.12376, section 3.4; FiTv2, 2410.13925. For
# 2-D RoPE "vision-" before a name scales each axis by its own length, not both by the longer one.
ROPE = {
    "direct": "the frequencies of training", "pi": "position interpolation: all divided by s = length/trained length",
    "ntk": "another base: the lowest frequency is divided by s, the highest stays",
    "ntk-by-parts": "by its number of turns a frequency stays, follows ntk, or is divided by s",
    "yarn": "by its number of turns a frequency stays or is divided by s; logits times (0.1 ln s + 1)^2",
    "ntk-pro1": "ntk, logits times ln(2 max(h, w))/ln(trained length)",
    "ntk-pro2": "ntk, logits times ln(2 h w)/ln(trained length^2): the attention scale of FiTv2",
}


def rope_frequencies(d, length=None, rope="direct", trained=None, theta=10000.0):
    """Angles per step of one axis, for d dimensions in d/2 pairs: theta^(-2i/d), changed by `rope` where length (B,)
    exceeds the `trained` length. (B or 1, d/2), float64. RoFormer, 2104.09864; `ROPE`."""
    i = torch.arange(d // 2, dtype=torch.float64)
    base = (theta ** (-2 * i / d))[None]
    if rope == "direct":
        return base
    s = (torch.as_tensor(length, dtype=torch.float64).view(-1, 1) / trained).clamp(min=1)
    linear, ntk = base / s, (theta * s ** (d / max(d - 2, 1))) ** (-2 * i / d)

    def pair_of(turns):
        """The pair, a fractional number, that turns so many times over the trained length."""
        return d * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(theta))

    def blend(slow_pairs, fast_pairs, fast, slow):
        """fast_pairs where a pair turns more than `fast` times, slow_pairs below `slow`, in between a ramp."""
        low, high = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), d - 1)
        share = 1 - ((i - low) / (high - low or 0.001)).clamp(0, 1)
        return torch.lerp(slow_pairs, fast_pairs.expand_as(linear), share.expand_as(linear))

    if rope == "yarn":
        return blend(linear, base, 32, 1)
    if rope == "ntk-by-parts":
        return blend(blend(linear, ntk, 1.25, 0.75), base, 16, 2)
    return linear if rope == "pi" else ntk


def rope_factor(size, rope, trained):
    """What cos and sin of queries and keys are multiplied by, (B,): the root of the attention's scale. `ROPE`."""
    rows, columns = (torch.as_tensor(side, dtype=torch.float64).view(-1) for side in size)
    longest = torch.maximum(rows, columns)
    if rope == "yarn":
        return 0.1 * (longest / trained).clamp(min=1).log() + 1
    if rope not in ("ntk-pro1", "ntk-pro2"):
        return torch.ones_like(longest)
    tested, known = (2 * longest, trained) if rope == "ntk-pro1" else (2 * rows * columns, trained**2)
    return (tested.log() / math.log(known)).sqrt().where(tested > known, 1.0)


def rope_2d(rows, columns, size, d, rope="direct", trained=None, theta=10000.0):
    """cos and sin (B, N, d/2) for tokens at rows, columns (B, N) of grids of size (heights (B,), widths (B,)): the
    first half of the d dimensions of a head turns with the row, the second with the column. rope: a name in `ROPE`,
    after "vision-" for an own scale of each axis; trained: the grid's side in training. 2402.12376, section 3.1."""
    rule = rope.removeprefix("vision-")
    if rule not in ROPE:
        raise ValueError(f"unknown rope {rope!r}: choose from {', '.join(ROPE)}, or vision- and one of these")
    size = [torch.as_tensor(side) for side in size]
    lengths = size if rope != rule else 2 * [torch.maximum(*size)]
    angles = [place[..., None] * rope_frequencies(d // 2, length, rule, trained, theta)[:, None]
              for place, length in zip((rows, columns), lengths)]
    angle, factor = torch.cat(angles, -1), rope_factor(size, rule, trained)[:, None, None]
    return (angle.cos() * factor).float(), (angle.sin() * factor).float()


def rotate(x, cos, sin):
    """x (B, h, N, d) with each pair of adjacent dimensions turned: cos, sin (B or 1, N, d/2). 2104.09864, eq. 34:
    as a product of complex numbers."""
    if kernels.use("rotate", x, width_of_a_head=x.shape[-1]):
        return kernels.rotate(x, cos, sin)
    pairs = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling() or x.device.type == "mps":             # neither is good at complex numbers
        a, b = pairs.unbind(-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).type_as(x)
    if any(place % 2 for place in (x.storage_offset(), *x.stride()[:-1])) or x.stride(-1) != 1:
        pairs = pairs.contiguous()
    turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)[:, None]
    return torch.view_as_real(turned).flatten(-2).type_as(x)


# ---------------------------------------------------------------------------------------------------------------- adaLN


def modulate(x, shift, scale):
    """x (B, N, D) * (1 + scale) + shift, both (B, D). FiLM, 1709.07871; adaLN of DiT, 2212.09748, section 3.2."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated(x, gate, branch):
    """x + gate * branch, x and branch (B, N, D), gate (B, D)."""
    return torch.addcmul(x, gate[:, None], branch)


def gate_norm_modulate(x, gate, branch, norm, shift, scale):
    """From a branch of a block to the next: (r, y) with r = gated(x, gate, branch), or x where branch is None, and y =
    modulate(norm(r), shift, scale)."""
    rms, bare = type(norm) is nn.RMSNorm, type(norm) is nn.LayerNorm and norm.weight is None
    if (rms or bare) and norm.eps and kernels.use("gate_norm_modulate", x, width=x.shape[-1]):
        weight = norm.weight if rms else None
        return kernels.gate_norm_modulate(x, branch, gate, shift, scale, weight, norm.eps, rms)
    r = x if branch is None else gated(x, gate, branch)
    return r, modulate(norm(r), shift, scale)


def norm_modulate(x, norm, shift, scale):
    """modulate(norm(x), shift, scale)."""
    return gate_norm_modulate(x, None, None, norm, shift, scale)[1]


def plain_norm(dim):
    """The LayerNorm that adaLN modulates: no weight and bias of its own."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class FinalLayer(nn.Module):
    """adaLN, then the linear read-out of each token's patch: (B, N, D) -> (B, N, p p C_out). c (B, condition or D).
    layout: of images of mixed sizes."""

    def __init__(self, dim, patch_size, out_channels, condition=None):
        super().__init__()
        self.norm_final = plain_norm(dim)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition or dim, 2 * dim))

    def forward(self, x, c, layout=None):
        modulation = self.adaLN_modulation(c)
        shift, scale = modulation.chunk(2, 1) if layout is None else layout.modulation(modulation, 2)
        return self.linear(norm_modulate(x, self.norm_final, shift, scale))


# ----------------------------------------------------------------------------------------- time-dependent normalisation


class TimeDependent(nn.Module):
    """A vector that slides from p1 to p0 as noise grows: tau (B,) -> g p0 + (1 - g) p1, (B, D), with a gate for each
    channel, g = sigmoid(tau (a + 1) + b). It starts constant; the 1 is what lets p0 and p1 part. As in the code
    published with 2406.09416, a and b are spared weight decay."""

    def __init__(self, dim, value):
        super().__init__()
        self.p0, self.p1 = (nn.Parameter(torch.full((dim,), float(value))) for _ in range(2))
        self.a, self.b = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.a.no_decay = self.b.no_decay = True

    def forward(self, tau):
        return torch.lerp(self.p1, self.p0, torch.sigmoid(tau[:, None] * (self.a + 1) + self.b))


class TDLN(nn.Module):
    """Time-dependent layer normalisation, TD-LN: x (B, ..., D), tau (B,) -> gain(tau) LN(x) + bias(tau). It tells the
    time in a few vectors where adaLN takes a large linear map. rms: gain(tau) x / (rms(x) + 1e-8), TD-RMS, no bias.

    tau = t/500 - 1, from -1 for clean images to 1 for noise. Alleviating Distortion in Image Generation via
    Multi-Resolution Diffusion Models, 2406.09416, section 3.3, with the gates of its code: one a channel, those of gain
    and bias apart.
    """

    def __init__(self, dim, rms=False):
        super().__init__()
        self.gain, self.bias = TimeDependent(dim, 1), None if rms else TimeDependent(dim, 0)

    def forward(self, x, tau):
        of_image = len(x), *[1] * (x.ndim - 2), -1                     # (B, D) -> (B, 1, ..., D)
        gain = self.gain(tau).view(of_image)
        if self.bias is None:
            return x * (gain / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8))
        return torch.addcmul(self.bias(tau).view(of_image), F.layer_norm(x, x.shape[-1:]), gain)


# ------------------------------------------------------------------------------------------------------ initial weights


def xavier(model):
    """Every linear layer and convolution Xavier uniform, a convolution on its (out, in p p) view; biases zero."""
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.flatten(1))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def gaussian(model, std, kinds=(nn.Linear,)):
    """The weights of all layers of these kinds from N(0, std^2); biases zero."""
    for m in model.modules():
        if isinstance(m, kinds):
            nn.init.normal_(m.weight, std=std)
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)


def zeroed(layer):
    """The layer with weights and bias zero: its residual branch starts closed."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def adaln_zero(model):
    """The initial weights of a transformer under adaLN-Zero, as DiT (2212.09748) published them."""
    # Linear layers as in ViT: Xavier uniform, the patch embedding on its (D, p p C) view.
    xavier(model)
    # Embeddings of timestep and label start small.
    times = [linear for m in model.modules() if isinstance(m, TimestepEmbedder) for linear in m.mlp[::2]]
    labels = [m.embedding_table for m in model.modules() if isinstance(m, LabelEmbedder)]
    for layer in times + labels:
        nn.init.normal_(layer.weight, std=0.02)
    # Zero: gates closed, so that every block starts as the identity, no modulation, output 0. Of a modulation in two
    # steps (low rank) the second.
    for name, m in model.named_modules():
        if name.endswith("adaLN_modulation"):
            zeroed(m[-1])
    zeroed(model.final_layer.linear)


# ------------------------------------------------------------------------------------------------------ attention, MLPs


def split_heads(x, heads):
    """(B, N, h d) -> (B, h, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, h, N, d) -> (B, N, h d)."""
    return x.transpose(1, 2).flatten(2)


def check_heads(dim, num_heads, part=1):
    """ValueError unless the width divides into so many heads, each a multiple of `part` wide."""
    if dim % (num_heads * part):
        raise ValueError(f"width {dim} does not divide into {num_heads} heads"
                         + (f" of a multiple of {part} channels, which their rotation needs" if part > 1 else ""))


class Attention(nn.Module):
    """Multi-head softmax self-attention (B, N, D) -> (B, N, D), scale (D/h)^-1/2, projections with bias (that of q, k
    and v is optional). 1706.03762. qk_norm: LayerNorm over each head's channels of q and k, 2302.05442, section 2."""

    def __init__(self, dim, num_heads, qk_norm=False, qkv_bias=True):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (self.norm(dim // num_heads) if qk_norm else nn.Identity() for _ in range(2))

    @staticmethod
    def norm(width):
        return nn.LayerNorm(width, eps=1e-6)

    def heads(self, x):
        """q, k and v of tokens x (B, N, D), (B, h, N, D/h) each, q and k normalised."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x, mask=None):
        """mask (B, N) bool: only these tokens are attended to."""
        q, k, v = self.heads(x)
        mask = None if mask is None else mask[:, None, None]
        return self.proj(merge_heads(F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask)))


class GroupedAttention(nn.Module):
    """LLaMA's attention (B, N, D) -> (B, N, D): kv_heads heads of keys and values, each for num_heads/kv_heads heads of
    queries (2305.13245), rotary positions, no biases. qk_norm: LayerNorm over all heads' channels of q and of k, before
    the rotation."""

    def __init__(self, dim, num_heads, kv_heads, qk_norm):
        super().__init__()
        check_heads(dim, num_heads, 2)
        if num_heads % kv_heads:
            raise ValueError(f"{num_heads} heads cannot share {kv_heads} key and value heads: that must divide them")
        self.num_heads, self.kv_heads, kv = num_heads, kv_heads, dim // num_heads * kv_heads
        self.wq, self.wk = nn.Linear(dim, dim, bias=False), nn.Linear(dim, kv, bias=False)
        self.wv, self.wo = nn.Linear(dim, kv, bias=False), nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = (nn.LayerNorm(width) if qk_norm else nn.Identity() for width in (dim, kv))

    def heads(self, x, rope):
        """Rotated q (B, h, N, D/h), rotated k and v (B, kv_heads, N, D/h) of tokens x; rope: cos and sin, (B or 1, N,
        D/2h)."""
        q = split_heads(self.q_norm(self.wq(x)), self.num_heads)
        k = split_heads(self.k_norm(self.wk(x)), self.kv_heads)
        v = split_heads(self.wv(x), self.kv_heads)
        return rotate(q, *rope).type_as(v), rotate(k, *rope).type_as(v), v

    def attend(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=self.num_heads != self.kv_heads)

    def forward(self, x, rope):
        return self.wo(merge_heads(self.attend(*self.heads(x, rope))))


class Mlp(nn.Module):
    """Linear, GELU, Linear: (B, N, D) -> (B, N, D). gelu: "tanh", the approximation, or "none", the exact one."""

    def __init__(self, dim, hidden, gelu="tanh"):
        super().__init__()
        self.gelu = gelu
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class SwiGlu(nn.Module):
    """down(SiLU(gate x) * up x): (B, N, D) -> (B, N, D). GLU Variants Improve Transformer, 2002.05202. names: what a
    published network calls gate, up and down."""

    activation = staticmethod(F.silu)

    def __init__(self, dim, hidden, names=("gate", "up", "down"), bias=False):
        super().__init__()
        for name, (wide_in, wide_out) in zip(names, ((dim, hidden), (dim, hidden), (hidden, dim))):
            self.add_module(name, nn.Linear(wide_in, wide_out, bias))

    def forward(self, x):
        gate, up, down = self.children()
        return down(self.activation(gate(x)) * up(x))


class GeGlu(SwiGlu):
    """The same with an exact GELU in SiLU's place."""

    activation = staticmethod(F.gelu)


def llama_hidden(dim, multiple_of, multiplier=None):
    """The hidden width of LLaMA's SwiGLU: 2/3 of 4 D, times `multiplier`, rounded up to `multiple_of`."""
    hidden = int((multiplier or 1) * int(8 * dim / 3))
    return -(-hidden // multiple_of) * multiple_of


# -------------------------------------------------------------------------------------------------------------- ternary
# Weights that are one of {-alpha, 0, +alpha} in the forward pass. TerDiT, 2405.14854.


def ternary(weight):
    """Codes Q in {-1, 0, 1}, as floats, of a matrix: W over the mean of |W|, rounded (half to even) and clipped. The
    gradient with respect to Q passes to W unchanged (straight-through)."""
    with torch.no_grad():
        q = (weight / (weight.abs().mean() + 1e-6)).round().clamp(-1, 1)
    return q + (weight - weight.detach())


def pack_codes(codes):
    """Codes (out, in) in {-1, 0, 1} -> uint8 (out/4, in). Row r of the bytes holds rows r, r + out/4, r + 2 out/4 and
    r + 3 out/4 of Q + 1, the first in the highest two bits."""
    if len(codes) % 4:
        raise ValueError(f"packing puts four rows into one, and {len(codes)} rows do not divide by 4")
    a, b, c, d = (codes + 1).to(torch.uint8).chunk(4)
    return a << 6 | b << 4 | c << 2 | d


def unpack_codes(packed):
    """The inverse of `pack_codes`: uint8 (out/4, in) -> codes (out, in), int8."""
    return torch.cat([packed >> shift & 3 for shift in (6, 4, 2, 0)]).to(torch.int8) - 1


class TernaryLinear(nn.Module):
    """A linear layer whose weight is alphas * ternary(W): W (out, in) is the full-precision master that the optimiser
    updates, alphas (1,) a learned scale. Activations keep their precision."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # The layer starts as an approximation of W; a zero W (gates), whose codes are 0, has the scale of a Xavier one.
        gamma = linear.weight.detach().abs().mean()
        self.alphas = nn.Parameter(torch.where(gamma > 0, gamma, (1.5 / sum(linear.weight.shape)) ** 0.5)[None])

    def forward(self, x):
        return F.linear(x, self.alphas * ternary(self.weight), self.bias)


class PackedLinear(nn.Module):
    """A `TernaryLinear` for inference, with four weights in a byte: `weight` is uint8 (out/4, in), expanded in each
    call. So it saves memory, not time."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", pack_codes(ternary(linear.weight.detach())))
        self.alphas, self.bias = linear.alphas, linear.bias

    def forward(self, x):
        if not torch.is_grad_enabled() and kernels.use("packed_linear", x):
            return kernels.packed_linear(x, self.weight, self.alphas, self.bias)
        return F.linear(x, self.alphas * unpack_codes(self.weight).to(self.alphas.dtype), self.bias)


def ternarize(model, eps=1e-5):
    """Make every linear layer inside the blocks of a backbone (what lies in an nn.ModuleList or is called a block)
    ternary, in place, and put an RMSNorm over all its outputs behind each block's adaLN projection, without which
    ternary modulation is huge (2405.14854). Embeddings and read-out stay as they are. -> the model. Raises ValueError
    if no such layer is there."""
    blocks = tuple(f"{name}." for name, m in model.named_modules()
                   if isinstance(m, nn.ModuleList) or name.endswith("block"))
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear and name.startswith(blocks)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layers in its blocks that could become ternary")
    for name in names:
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, child, TernaryLinear(parent.get_submodule(child)))
    for name, m in list(model.named_modules()):
        if name.endswith("adaLN_modulation") and isinstance(m[-1], TernaryLinear):
            m.append(nn.RMSNorm(len(m[-1].weight), eps=eps))
    return model


def replace_ternary(model, make, names=None):
    """Replace every `TernaryLinear` m (or those of `names`) by make(m), in place. -> the model. make: `PackedLinear`,
    or `dense` for an ordinary layer with the same weights."""
    for name, m in list(model.named_modules()):
        if isinstance(m, TernaryLinear) and (names is None or name in names):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(m))
    return model


def dense(m):
    """An nn.Linear that computes what the `TernaryLinear` m computes."""
    linear = nn.Linear(*m.weight.shape[::-1], bias=m.bias is not None, device=m.weight.device)
    state = {"weight": m.alphas * ternary(m.weight), "bias": m.bias}
    linear.load_state_dict({name: value for name, value in state.items() if value is not None})
    return linear


# ----------------------------------------------------------------------------------------------------------------- text
# A model of text (`Backbone.text_width`) is called as model(x, t, Text).


@dataclass
class Text:
    """Captions inside a model: tokens (B, L, D) and mask (B, L) bool, False at padding. Indexing takes rows."""
    tokens: torch.Tensor
    mask: torch.Tensor

    def __len__(self):
        return len(self.mask)

    def __getitem__(self, rows):
        return Text(self.tokens[rows], self.mask[rows])

    def to(self, device):
        return Text(self.tokens.to(device), self.mask.to(device))


class TextEncoder(nn.Module):
    """Byte tokens (B, L) int64 (see `data.byte_tokens`; 0 is padding) -> Text of width `width`, a token for every four
    bytes. A small bidirectional transformer, trained together with the denoiser, on local convolutions that read
    letters and join four to a token, as in CANINE, 2103.06874. Padding changes nothing. It learns at a tenth of the
    rate: at the full one all captions look alike before the denoiser has begun to listen."""

    def __init__(self, width, depth=2, inner=96, num_heads=4):
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.spell = nn.Conv1d(32, inner, 5, padding=2)
        self.join = nn.Conv1d(inner, inner, 4, stride=4)
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in range(2 * depth + 1))
        self.attns = nn.ModuleList(Attention(inner, num_heads) for _ in range(depth))
        self.mlps = nn.ModuleList(Mlp(inner, 4 * inner) for _ in range(depth))
        self.out = nn.Linear(inner, width)
        for p in self.parameters():
            p.rate = 0.1

    def forward(self, y):
        y = F.pad(y, (0, -y.shape[1] % 4))                                                            # (B, 4 M)
        seen = (y != 0)[:, None]
        x = F.gelu(self.spell(self.embed(y).transpose(1, 2) * seen)) * seen                           # (B, inner, 4 M)
        x = self.join(x).transpose(1, 2)                                                              # (B, M, inner)
        mask = seen.view(len(y), -1, 4).any(2)                                                        # (B, M)
        x = x + timestep_embedding(torch.arange(x.shape[1], device=x.device), x.shape[2])
        for attn, mlp, norm1, norm2 in zip(self.attns, self.mlps, self.norms[::2], self.norms[1::2]):
            x = x + attn(norm1(x), mask)
            x = x + mlp(norm2(x))
        return Text(F.layer_norm(self.out(self.norms[-1](x)), (self.out.out_features,)), mask)


# ---------------------------------------------------------------------------------------------------------- two players


def detached(module, *inputs):
    """module(*inputs) with its weights detached: gradients flow through it to the inputs, none to itself. So the losses
    of two players can be added and sent back in one pass, each moving its own weights."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return torch.func.functional_call(module, weights, inputs)


# ----------------------------------------------------------------------------------------------------- multiplications


class Multiplications(TorchDispatchMode):
    """While it is on, `total` grows by the multiply-accumulates of every matrix product and convolution that is called
    with a tensor of the meta device, and nothing of that is computed: of real weights only the shapes are used. What an
    operation gives is remembered, since a network repeats its blocks.

    real: count what is called with real tensors alone, too, which is computed as ever."""

    def __init__(self, real=False):
        super().__init__()
        self.total, self.known, self.real = 0, {}, real

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves, form = tree_flatten((args, kwargs or {}))
        if not any(isinstance(v, torch.Tensor) and v.is_meta for v in leaves):
            out = function(*args, **kwargs or {})
            self.total += self.products(function.overloadpacket, args, out) if self.real else 0
            return out
        looks = tuple((v.shape, v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v for v in leaves)
        key = function, looks, form
        if key in self.known:
            out, products = self.known[key]
        else:
            args, kwargs = tree_unflatten([v.to("meta") if isinstance(v, torch.Tensor) else v for v in leaves], form)
            out = function(*args, **kwargs)
            products = self.products(function.overloadpacket, args, out)
            if all(argument.alias_info is None for argument in function._schema.returns):      # no view, not in place
                self.known[key] = out, products
        self.total += products
        return out

    @staticmethod
    def products(function, args, out):
        """The multiply-accumulates of one call of an operation of torch's (aten) that gave `out`."""
        aten = torch.ops.aten
        if function in (aten.mm, aten.bmm):
            return out.numel() * args[0].shape[-1]
        if function in (aten.addmm, aten.baddbmm):
            return out.numel() * args[1].shape[-1]
        if function is aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            return (x if transposed else out).numel() * weight[0].numel()
        if function in (aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
                        aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention):
            q, k, v = args[:3]
            return q.shape[:-1].numel() * k.shape[-2] * (k.shape[-1] + v.shape[-1])
        return 0


def count(call, *inputs):
    """(parameters, multiply-accumulates) of call(*inputs), a module, a method of one, or a function (whose parameters
    are 0). inputs: tensors of the meta device, for one sample.

    Multiply-accumulates are those of matrix products (attention's too), convolutions and scans, as papers on
    transformers print them as "GFLOPs": half of what torch's own counter says, which counts a multiply and an add
    apart. Nothing is computed and no weight copied; modules are in evaluation mode meanwhile."""
    module = call.__self__ if inspect.ismethod(call) else call
    module = module if isinstance(module, nn.Module) else None
    modes = [(m, m.training) for m in module.modules()] if module else []
    try:
        for m, _ in modes:
            m.training = False
        with Multiplications() as counter, torch.no_grad():
            (call.forward if call is module else call)(*inputs)        # forward: a compiled model is not compiled again
    finally:
        for m, training in modes:
            m.training = training
    return sum(p.numel() for p in module.parameters()) if module else 0, counter.total
