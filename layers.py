"""What several backbones share: embeddings, patches, attention, MLPs, adaLN modulation, ternary linear layers.

Letters: B batch, C channels, H W pixels, N tokens, D width, h heads, p patch size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


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


def unpatchify(tokens, grid, p):
    """Tokens (B, N, p*p*C) -> image (B, C, grid[0] p, grid[1] p). Within a token the channel runs fastest (not the
    layout of PatchEmbed's weight, where it runs slowest)."""
    B, (rows, columns) = len(tokens), grid
    x = tokens.view(B, rows, columns, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * p, columns * p)


# ---------------------------------------------------------------------------------------------------------------- adaLN


def modulate(x, shift, scale):
    """x (B, N, D) * (1 + scale) + shift, both (B, D). FiLM, 1709.07871; adaLN of DiT, 2212.09748, section 3.2."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated(x, gate, branch):
    """x + gate * branch, x and branch (B, N, D), gate (B, D)."""
    return torch.addcmul(x, gate[:, None], branch)


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
    letters and join four to a token, as in CANINE, 2103.06874. Padding changes nothing."""

    def __init__(self, width, depth=2, inner=96, num_heads=4):
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.spell = nn.Conv1d(32, inner, 5, padding=2)
        self.join = nn.Conv1d(inner, inner, 4, stride=4)
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in range(2 * depth + 1))
        self.attns = nn.ModuleList(Attention(inner, num_heads) for _ in range(depth))
        self.mlps = nn.ModuleList(Mlp(inner, 4 * inner) for _ in range(depth))
        self.out = nn.Linear(inner, width)

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
        return Text(self.out(self.norms[-1](x)), mask)
