"""What several backbones share: embeddings, patches, attention, MLPs, adaLN modulation.

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


# ------------------------------------------------------------------------------------------------------ attention, MLPs


class Attention(nn.Module):
    """Multi-head softmax self-attention (B, N, D) -> (B, N, D), scale (D/h)^-1/2, projections with bias. 1706.03762."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        """mask (B, N) bool: only these tokens are attended to."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)                # (B, h, N, D/h)
        mask = None if mask is None else mask[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


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
