"""What several backbones share: embeddings, patches, attention, MLPs, adaLN modulation, ternary linear layers.

Letters: B batch, C channels, H W pixels, N tokens, D width, h heads, p patch size.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kernels


def pair(size):
    """An int or (height, width) -> (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


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
    (2207.12598, absent if null=False). Who trains drops labels, not this layer: see `drop_labels`."""

    def __init__(self, num_classes, dim, null=True):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null, dim)

    def forward(self, y):
        return self.embedding_table(y)


def drop_labels(y, drop, null):
    """y (B,) with the null label where drop (B,) bool is set."""
    return torch.where(drop, null, y)


def position_table(dim, height, width, spacing=(1.0, 1.0)):
    """Fixed 2-D sinusoids (height * width, dim), rows in row-major order, for dim divisible by 4.

    With e(q) = [sin(q w) | cos(q w)], w_i = 10000^(-i / (dim/4)), a patch in row r and column c gets [e(c) | e(r)]: the
    column comes first, as in the published DiT and MAE code. spacing: of rows and of columns, 1 for neighbours.
    """
    w = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = (q.flatten()[:, None] * w for q in torch.meshgrid(
        torch.arange(height, dtype=torch.float64) * spacing[0], torch.arange(width, dtype=torch.float64) * spacing[1],
        indexing="ij"))
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
# each one's own sides. Models cut it into token sequences that leave the rest of the canvas out.


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


def sequence(grid, sizes=None, nextline=False, nextframe=False):
    """The token sequence of each image: frame by frame, row by row, with a [nextline] token after each row and a
    [nextframe] token after each frame where asked (2405.05945), padded to the longest of the batch.

    grid: (frames, rows, columns) of the canvas's n patches; sizes (B, 3): each image's own, None: all fill it, B = 1.
    Returns place (B, L): the patch each token is, else n for [nextline], n + 1 for [nextframe], n + 2 for padding;
    mask (B, L) bool, true for all but padding, None if there is none; row and column (B, L) of each token's patch.
    """
    (_, H, W), n = grid, math.prod(grid)
    frames, rows, columns = (torch.tensor([grid]) if sizes is None else sizes).T[..., None]                  # (B, 1)
    line = columns + nextline
    length = frames * (frame := rows * line + nextframe)
    k = torch.arange(length.max().item())[None]
    row, column = k % frame // line, k % frame % line
    place = (k // frame * H + row) * W + column
    place = place.where(column < columns, n).where(row < rows, n + 1).where(k < length, n + 2)
    return place, None if (length == length[0]).all() else k < length, row, column


def pick(tokens, place):
    """tokens (B, n, D), place (B or 1, L) -> the tokens at these places, (B, L, D)."""
    return tokens.gather(1, place[..., None].expand(len(tokens), -1, tokens.shape[2]))


class Padding(NamedTuple):
    """Which tokens of padded rows (B, L) are real: mask (B, 1, 1, L) bool. The T real ones go through everything but
    attention as (T, 1, D), a batch of single tokens: place (T,) in the flattened rows, image (T,) whose they are."""
    mask: torch.Tensor
    place: torch.Tensor
    image: torch.Tensor

    @classmethod
    def of(cls, mask, device):
        return cls(*(v.to(device) for v in (mask[:, None, None], mask.flatten().nonzero()[:, 0], mask.nonzero()[:, 0])))

    def padded(self, x):
        """(T, ...) -> (B, L, ...)."""
        B, L = len(self.mask), self.mask.shape[3]
        return x.new_zeros(B * L, *x.shape[1:]).index_copy(0, self.place, x).unflatten(0, (B, L))

    def padded_heads(self, *xs):
        """Queries, keys and values (T, h, 1, D/h) -> (B, h, L, D/h) each."""
        return (self.padded(x[:, :, 0]).transpose(1, 2) for x in xs)

    def unpadded(self, x):
        """(B, L, K) -> (T, 1, K)."""
        return x.flatten(0, 1).index_select(0, self.place)[:, None]


def modulation_of(c, n, padding):
    """Modulation (B, n D) as n times (B, D), or with Padding as n times (T, D), each token's that of its image."""
    parts = c.chunk(n, 1)
    return parts if padding is None else [part.index_select(0, padding.image) for part in parts]


def put_back(tokens, place, n):
    """tokens (B, L, D) to their places among n patches, the others zero: (B, n, D). What is no patch is dropped."""
    index = place[..., None].expand(tokens.shape)
    return tokens.new_zeros(len(tokens), n + 3, tokens.shape[2]).scatter(1, index, tokens)[:, :n]


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

    def stays(fast, slow):
        """1 for pairs that turn more than `fast` times over the trained length, 0 below `slow`, in between a ramp."""
        pair_of = lambda turns: d * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(theta))
        low, high = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), d - 1)
        return 1 - ((i - low) / (high - low or 0.001)).clamp(0, 1)

    if rope == "yarn":
        return torch.lerp(linear, base.expand_as(linear), stays(32, 1).expand_as(linear))
    if rope == "ntk-by-parts":
        mixed = torch.lerp(linear, ntk, stays(1.25, 0.75).expand_as(linear))
        return torch.lerp(mixed, base.expand_as(linear), stays(16, 2).expand_as(linear))
    return linear if rope == "pi" else ntk


def rope_factor(size, rope, trained):
    """What cos and sin of queries and keys are multiplied by, (B,): the root of the attention's scale. `ROPE`."""
    rows, columns = (torch.as_tensor(side, dtype=torch.float64).view(-1) for side in size)
    longest = torch.maximum(rows, columns)
    proportion = lambda tested, known: (tested.log() / math.log(known)).sqrt().where(tested > known, 1.0)
    if rope == "yarn":
        return 0.1 * (longest / trained).clamp(min=1).log() + 1
    if rope == "ntk-pro1":
        return proportion(2 * longest, trained)
    return proportion(2 * rows * columns, trained**2) if rope == "ntk-pro2" else torch.ones_like(longest)


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
    """x (B, h, N, d) with each pair of adjacent dimensions turned: cos, sin (B or 1, N, d/2). 2104.09864, eq. 34."""
    if kernels.use("rotate", x, width_of_a_head=x.shape[-1]):
        return kernels.rotate(x, cos, sin)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).type_as(x)


# ---------------------------------------------------------------------------------------------------------------- adaLN


def modulate(x, shift, scale):
    """x (B, N, D) * (1 + scale) + shift, both (B, D). FiLM, 1709.07871; adaLN of DiT, 2212.09748, section 3.2."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated(x, gate, branch):
    """x + gate * branch, x and branch (B, N, D), gate (B, D)."""
    return torch.addcmul(x, gate[:, None], branch)


def gate_norm_modulate(x, branch, gate, norm, shift, scale):
    """From one branch of a block to the next: (r, y) with r = gated(x, gate, branch), or x where branch is None, and
    y = modulate(norm(r), shift, scale)."""
    rms, bare = type(norm) is nn.RMSNorm, type(norm) is nn.LayerNorm and norm.weight is None
    if (rms or bare) and norm.eps and kernels.use("gate_norm_modulate", x, width=x.shape[-1]):
        weight = norm.weight if rms else None
        return kernels.gate_norm_modulate(x, branch, gate, shift, scale, weight, norm.eps, rms)
    r = x if branch is None else gated(x, gate, branch)
    return r, modulate(norm(r), shift, scale)


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
        gain, bias = (v and v(tau).view(len(x), *[1] * (x.ndim - 2), -1) for v in (self.gain, self.bias))
        if bias is None:
            return x * (gain / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8))
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), gain)


def adaptive_norm(dim, norm):
    """The norm that adaLN modulates, or a time-dependent one."""
    if norm not in ("adaln", "td-ln", "td-rms"):
        raise ValueError(f"norm {norm!r}: choose adaln, td-ln or td-rms")
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) if norm == "adaln" else TDLN(dim, norm == "td-rms")


class FinalLayer(nn.Module):
    """adaLN, then the linear read-out of each token's patch: (B, N, D) -> (B, N, p*p*C_out). c (B, condition or D)."""

    def __init__(self, dim, patch_size, out_channels, condition=None, norm="adaln"):
        super().__init__()
        self.norm_final = adaptive_norm(dim, norm)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.adaLN_modulation = None
        if norm == "adaln":
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition or dim, 2 * dim))

    def forward(self, x, c):
        if self.adaLN_modulation is None:
            return self.linear(self.norm_final(x, c))
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def xavier(model):
    """Every linear layer and convolution Xavier uniform, a convolution on its (out, in p p) view; biases zero."""
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.flatten(1))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def zeroed(layer):
    """The layer with weights and bias zero: its residual branch starts closed."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# ------------------------------------------------------------------------------------------------------ attention, MLPs


class Attention(nn.Module):
    """Multi-head softmax self-attention (B, N, D) -> (B, N, D), scale (D/h)^-1/2, projections with bias (that of q, k
    and v is optional). 1706.03762. qk_norm: LayerNorm over each head's channels of q and k, 2302.05442, section 2."""

    def __init__(self, dim, num_heads, qk_norm=False, qkv_bias=True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        norm = lambda: nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, mask=None):
        """mask (B, N) bool: only these tokens are attended to."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)                # (B, h, N, D/h)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        mask = None if mask is None else mask[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(B, N, D))


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
    """down(SiLU(gate x) * up x), no biases: (B, N, D) -> (B, N, D). GLU Variants Improve Transformer, 2002.05202."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


# -------------------------------------------------------------------------------------------------------------- ternary
# Weights that are one of {-alpha, 0, +alpha} in the forward pass. TerDiT, 2405.14854.


def ternary(weight):
    """Codes Q in {-1, 0, 1}, as floats, of a matrix: W over the mean of |W|, rounded (half to even) and clipped. The
    gradient with respect to Q passes to W unchanged (straight-through)."""
    with torch.no_grad():
        q = (weight / (weight.abs().mean() + 1e-6)).round().clamp(-1, 1)
    return q + (weight - weight.detach())


def pack(codes):
    """Codes (out, in) in {-1, 0, 1} -> uint8 (out/4, in). Row r of the bytes holds rows r, r + out/4, r + 2 out/4 and
    r + 3 out/4 of Q + 1, the first in the highest two bits."""
    if len(codes) % 4:
        raise ValueError(f"packing puts four rows into one, and {len(codes)} rows do not divide by 4")
    a, b, c, d = (codes + 1).to(torch.uint8).chunk(4)
    return a << 6 | b << 4 | c << 2 | d


def unpack(packed):
    """The inverse of `pack`: uint8 (out/4, in) -> codes (out, in), int8."""
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
        self.register_buffer("weight", pack(ternary(linear.weight.detach())))
        self.alphas, self.bias = linear.alphas, linear.bias

    def forward(self, x):
        if not torch.is_grad_enabled() and kernels.use("packed_linear", x):
            return kernels.packed_linear(x, self.weight, self.alphas, self.bias)
        return F.linear(x, self.alphas * unpack(self.weight).to(self.alphas.dtype), self.bias)


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
    for m in model.modules():
        adaLN = getattr(m, "adaLN_modulation", None)
        if isinstance(adaLN, nn.Sequential) and isinstance(adaLN[-1], TernaryLinear):
            adaLN.append(nn.RMSNorm(len(adaLN[-1].weight), eps=eps))
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
# A model of text has two attributes, `text_width` and `text_length`: it is called as model(x, t, Text) with tokens of
# that width, and captions are cut to that length. Its preset names text_width. Optional: `null_text` (text_length,
# text_width), the null caption where the text is precomputed.


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
