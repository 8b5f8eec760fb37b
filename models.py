"""Every denoising backbone, one section each: model(x, t, y) -> prediction.

    x (B, C, H, W)   noisy image            t (B,)   what the process tells the network, about 0 .. 1000
    y (B,) int64     labels 0 .. num_classes, the last being the null label; None for a model without classes;
                     a layers.Text for a model of text
    returns (B, C, H, W), or (B, 2C, H, W) with learned variance

Contents
    DiT       Scalable Diffusion Models with Transformers, 2212.09748
    U-Net     Denoising Diffusion Probabilistic Models, 2006.11239; ADM, 2105.05233
    DiT-MoE   Scaling Diffusion Transformers to 16 Billion Parameters, 2407.11633
    TerDiT    Ternary Diffusion Models with Transformers, 2405.14854
    T-Stitch  Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching, 2402.14167
    DRWKV     Diffusion-RWKV: Scaling RWKV-Like Architectures for Diffusion Models, 2404.04478
    Dimba     Dimba: Transformer-Mamba Diffusion Models, 2406.01159
    LiT       LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation, 2501.12976
    DiCo      Revitalizing ConvNets for Scalable and Efficient Diffusion Modeling, 2505.11196
    U-ViT     All are Worth Words: A ViT Backbone for Diffusion Models, 2209.12152
    DiMR      Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models, 2406.09416
    FiT       Flexible Vision Transformer for Diffusion Model, 2402.12376; FiTv2, 2410.13925
    Flag-DiT  Lumina-T2X, 2405.05945: images, clips, views and sounds as one sequence
    Registry  names, presets, create_model
"""

import difflib
import functools
import inspect
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from guidance import check_fractions, stitch_by_time
from layers import (
    ROPE,
    TDLN,
    Attention,
    Backbone,
    FinalLayer,
    GeGlu,
    GroupedAttention,
    LabelEmbedder,
    Mlp,
    PackedLinear,
    PatchEmbed,
    SwiGlu,
    TernaryLinear,
    Text,
    TimestepEmbedder,
    adaln_zero,
    canvas,
    check_heads,
    count,
    cropped,
    gate_norm_modulate,
    gated,
    gaussian,
    llama_hidden,
    merge_heads,
    modulate,
    norm_modulate,
    pack,
    pair,
    patch_grid,
    plain_norm,
    position_table,
    replace_ternary,
    rope_2d,
    rotate,
    split_heads,
    ternarize,
    timestep_embedding,
    token_grid,
    unpatchify,
    xavier,
    zeroed,
)
from moe import MoE, activated_parameters, add_experts
from scans import bi_wkv, linear_attention, selective_scan

# name -> what makes the model: a backbone's class with the arguments that the name stands for. Names and sizes are the
# papers', every section ends with its own; `-nano` and `-pico` train in minutes on a CPU.
MODELS: dict[str, Callable] = {}

# ================================================================================================================== DiT
# Scalable Diffusion Models with Transformers, 2212.09748. The U-Net becomes a plain ViT over patches; timestep and
# class enter each block only as shift, scale and gate, regressed from c = temb(t) + yemb(y) ("adaLN-Zero", section
# 3.2). The gates start at zero, so that every block starts as the identity. N = (H/p)(W/p) tokens, width D.


class DiTBlock(nn.Module):
    """Attention and MLP, each between adaLN modulation and a gate. Figure 3, "DiT Block with adaLN-Zero"."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1, self.norm2 = plain_norm(dim), plain_norm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        h = norm_modulate(x, self.norm1, shift_attn, scale_attn)
        x, h = gate_norm_modulate(x, gate_attn, self.attn(h), self.norm2, shift_mlp, scale_mlp)
        return gated(x, gate_mlp, self.mlp(h))


class TimeNormBlock(nn.Module):
    """DiT's block under DiMR's time-dependent norms: plain residual branches, the time in the norms alone."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, rms=False):
        super().__init__()
        self.norm1, self.norm2 = TDLN(dim, rms), TDLN(dim, rms)
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, tau):
        x = x + self.attn(self.norm1(x, tau))
        return x + self.mlp(self.norm2(x, tau))


class TimeNormFinalLayer(nn.Module):
    """A time-dependent norm, then the linear read-out of each token's patch: (B, N, D) -> (B, N, p p C_out)."""

    def __init__(self, dim, patch_size, out_channels, rms=False):
        super().__init__()
        self.norm_final = TDLN(dim, rms)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)

    def forward(self, x, tau):
        return self.linear(self.norm_final(x, tau))


class DiT(Backbone):
    """A ViT over patches, told time and class by adaLN-Zero: DiT, 2212.09748.

    image_size: int or (H, W), divisible by patch_size. num_classes 0: no labels. learn_sigma: 2C output channels, the
    second half the variance's v. null_class: a table row for the null label. norm: "adaln", or DiMR's "td-ln" or
    "td-rms" in its place, where the class comes as a token, as in DiMR."""

    any_size = True

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, learn_sigma=False, null_class=True, norm="adaln"):
        super().__init__()
        if norm not in ("adaln", "td-ln", "td-rms"):
            raise ValueError(f"norm {norm!r}: choose adaln, td-ln or td-rms")
        D, adaln, out_channels = hidden_size, norm == "adaln", in_channels * (2 if learn_sigma else 1)
        self.patch_size, self.grid = patch_size, patch_grid(image_size, patch_size)
        self.trained = self.grid
        self.x_embedder = PatchEmbed(in_channels, D, patch_size)
        self.t_embedder = TimestepEmbedder(D) if adaln else None
        self.y_embedder = LabelEmbedder(num_classes, D, null_class) if num_classes else None
        self.pos_embed = nn.Parameter(position_table(D, *self.grid)[None], requires_grad=False)              # (1, N, D)
        block, final = DiTBlock, FinalLayer
        if not adaln:
            block = functools.partial(TimeNormBlock, rms=norm == "td-rms")
            final = functools.partial(TimeNormFinalLayer, rms=norm == "td-rms")
        self.blocks = nn.ModuleList(block(D, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = final(D, patch_size, out_channels)
        adaln_zero(self)

    def forward(self, x, t, y=None):
        x = self.x_embedder(x) + self.pos_embed                     # (B, N, D)
        x, c = self.conditioned(x, t, y)                            # c (B, D)
        for block in self.blocks:
            x = block(x, c)                                         # (B, N, D)
        x = self.final_layer(x[:, -self.pos_embed.shape[1]:], c)    # (B, N, p p C_out)
        return unpatchify(x, self.grid, self.patch_size)            # (B, C_out, H, W)

    def conditioned(self, x, t, y):
        """The tokens and what modulates them: x, c (B, D); under time-dependent norms with the class as a first token,
        (B, 1 + N, D), and tau (B,)."""
        if self.t_embedder is not None:
            c = self.t_embedder(t)
            return x, c if self.y_embedder is None else c + self.y_embedder(y)
        if self.y_embedder is not None:
            x = torch.cat([self.y_embedder(y)[:, None], x], 1)
        return x, t / 500 - 1

    def resize(self, image_size):
        """From now on images of another size: the position table of training is interpolated bicubically."""
        super().resize(image_size)
        self.grid, D = patch_grid(image_size, self.patch_size), self.pos_embed.shape[2]
        table = position_table(D, *self.trained).T.unflatten(1, self.trained)                             # (D, h, w)
        table = F.interpolate(table[None], self.grid, mode="bicubic")
        self.pos_embed.data = table.flatten(2).mT.to(self.pos_embed)                                      # (1, N, D)


MODELS["dit-nano"] = functools.partial(DiT, hidden_size=128, depth=6, num_heads=4, patch_size=4)
for size, (depth, width, heads) in {"s": (12, 384, 6), "b": (12, 768, 12),                                    # table 1
                                    "l": (24, 1024, 16), "xl": (28, 1152, 16)}.items():
    for patch in (2, 4, 8):
        MODELS[f"dit-{size}/{patch}"] = functools.partial(
            DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)


# ================================================================================================================ U-Net
# The convolutional baseline of Denoising Diffusion Probabilistic Models, 2006.11239, appendix B, with ADM's
# improvements (2105.05233, section 3) as options: scale-shift conditioning and resampling inside residual blocks.
# Levels halve the resolution; every encoder output is kept, and each decoder block takes one of them by concatenation.


def group_norm(channels):
    """GroupNorm with the most groups, up to 32 and of at least 4 channels, that divide the width."""
    return nn.GroupNorm(next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0), channels)


class ResBlock(nn.Module):
    """norm, SiLU, conv, conditioning, norm, SiLU, dropout, conv (zero), plus the skip.
    (B, C_in, H, W) -> (B, C_out, H', W').

    scale_shift: h = norm(h) (1 + scale) + shift, from the condition c (ADM); else that is added before the norm (DDPM).
    resample: None, "down" (average pooling) or "up" (nearest), on both paths, before the first convolution (ADM).
    """

    def __init__(self, in_channels, out_channels, condition, dropout=0.0, scale_shift=True, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(condition, out_channels * (2 if scale_shift else 1))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def resampled(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x, c):
        h = self.conv1(self.resampled(F.silu(self.norm1(x))))
        c = self.condition(F.silu(c))[:, :, None, None]
        if self.scale_shift:
            scale, shift = c.chunk(2, 1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + c)
        return self.skip(self.resampled(x)) + self.conv2(self.dropout(F.silu(h)))


class PixelAttention(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual connection that starts closed. (B, C, H, W)."""

    def __init__(self, channels, head_channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.attn = Attention(channels, max(1, channels // head_channels))
        zeroed(self.attn.proj)

    def forward(self, x):
        return x + self.attn(self.norm(x).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
    """A residual block, with attention after it where asked."""

    def __init__(self, block, attention):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x, c):
        return self.attention(self.block(x, c))


class Resample(nn.Module):
    """DDPM's change of resolution: a strided 3x3 convolution, or nearest upsampling and a 3x3 convolution."""

    def __init__(self, channels, direction):
        super().__init__()
        self.direction = direction
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if direction == "down" else 1, padding=1)

    def forward(self, x, c):
        return self.conv(x if self.direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(Backbone):
    """The convolutional U-Net of DDPM, 2006.11239, with ADM's improvements, 2105.05233.

    channels: width of the first level; multipliers: width of each level over it; blocks: residual blocks per level.
    attention: the levels (0 = full resolution) that attend. scale_shift, resblock_updown: ADM's choices; both off is
    DDPM. patch_size: pixels are first folded into channels, p x p at a time (pixel unshuffle), and unfolded at the
    end."""

    any_size = True

    def __init__(self, image_size=32, in_channels=3, num_classes=10, channels=128, multipliers=(1, 2, 2, 2), blocks=2,
                 attention=(1,), head_channels=64, dropout=0.0, scale_shift=True, resblock_updown=True,
                 learn_sigma=False, patch_size=1):
        super().__init__()
        levels, self.base, self.patch_size, condition = len(multipliers), channels, patch_size, 4 * channels
        self.halvings = levels - 1
        patch_grid(image_size, self.stride, "what its levels need,")
        self.t_embedder = nn.Sequential(nn.Linear(channels, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.y_embedder = LabelEmbedder(num_classes, condition) if num_classes else None
        self.stem = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)

        def res(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, condition, dropout, scale_shift, resample)

        def stage(c_in, c_out, attend):
            return Stage(res(c_in, c_out), PixelAttention(c_out, head_channels) if attend else nn.Identity())

        def change(width, direction):
            return res(width, width, direction) if resblock_updown else Resample(width, direction)

        widths = [channels * m for m in multipliers]
        self.encoder, width, skips = nn.ModuleList(), channels, [channels]
        for level, w in enumerate(widths):
            for _ in range(blocks):
                self.encoder.append(stage(width, w, level in attention))
                width = w
                skips.append(w)
            if level < levels - 1:
                self.encoder.append(change(w, "down"))
                skips.append(w)
        self.middle = nn.ModuleList([stage(width, width, True), res(width, width)])
        self.decoder, self.upsample = nn.ModuleList(), nn.ModuleDict()
        for level in reversed(range(levels)):
            for _ in range(blocks + 1):
                self.decoder.append(stage(width + skips.pop(), widths[level], level in attention))
                width = widths[level]
            if level:
                self.upsample[str(len(self.decoder))] = change(width, "up")
        self.norm = group_norm(width)
        self.head = zeroed(nn.Conv2d(width, in_channels * patch_size**2 * (2 if learn_sigma else 1), 3, padding=1))

    @property
    def stride(self):
        return self.patch_size * 2**self.halvings

    def forward(self, x, t, y=None):
        c = self.t_embedder(timestep_embedding(t, self.base).to(self.stem.weight.dtype))    # (B, condition)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        x = self.stem(F.pixel_unshuffle(x, self.patch_size))                                # (B, channels, H/p, W/p)
        skips = [x]
        for layer in self.encoder:
            skips.append(x := layer(x, c))
        for layer in self.middle:
            x = layer(x, c)
        for k, layer in enumerate(self.decoder, start=1):
            x = layer(torch.cat([x, skips.pop()], 1), c)
            if str(k) in self.upsample:
                x = self.upsample[str(k)](x, c)
        return F.pixel_shuffle(self.head(F.silu(self.norm(x))), self.patch_size)            # (B, C_out, H, W)


MODELS["unet-pico"] = functools.partial(
    UNet, channels=32, multipliers=(1, 2), blocks=1, attention=(0, 1), head_channels=32, patch_size=2)
MODELS["unet-nano"] = functools.partial(
    UNet, channels=48, multipliers=(1, 2, 2), blocks=1, attention=(1, 2), head_channels=32, patch_size=2)
MODELS["unet-cifar"] = functools.partial(            # 2006.11239, appendix B: 35.7 M parameters without classes
    UNet, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,), head_channels=256, dropout=0.1,
    scale_shift=False, resblock_updown=False)


# ============================================================================================================== DiT-MoE
# Scaling Diffusion Transformers to 16 Billion Parameters, 2407.11633. DiT whose feed-forward networks are mixtures of
# experts: of E routed SwiGLU experts each token takes K, and all tokens share one more, so that capacity grows and the
# compute of a token does not. A balance loss, which training adds (`moe.balanced`), keeps all experts in use.


class DiTMoE(DiT):
    """DiT whose feed-forward networks are mixtures of experts: DiT-MoE, 2407.11633.

    The arguments are DiT's (mlp_ratio: the hidden width of one expert over D), and:
    num_experts, top_k: E and K. shared: hidden width of the shared experts over D. moe_blocks: the blocks with experts
    (None: all), the others keep DiT's MLP; of one half, the deep one is the better choice (section 3.3). qk_norm: the
    attention of the large models. renormalise: see `moe.Router`.
    """

    balance = 0.01

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, learn_sigma=False, null_class=True, num_experts=8, top_k=2, shared=2,
                 moe_blocks: tuple | None = None, qk_norm=False, renormalise=False):
        super().__init__(image_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, num_classes,
                         learn_sigma, null_class)
        add_experts(self, num_experts, top_k, moe_blocks, shared, renormalise)
        if qk_norm:
            for block in self.blocks:
                block.attn = Attention(hidden_size, num_heads, qk_norm=True)
        adaln_zero(self)                               # the new layers too; routers and routed experts drew their own


MODELS["dit-moe-nano"] = functools.partial(
    DiTMoE, depth=4, hidden_size=96, num_heads=3, mlp_ratio=2.0, patch_size=4)
for size, (depth, width, heads, choices) in {"s": (12, 384, 6, (8, 16)), "b": (12, 768, 12, (8,)),            # table 1
                                             "l": (24, 1024, 16, (8,)), "xl": (28, 1152, 16, (8,)),
                                             "g": (40, 1408, 16, (16,))}.items():
    for experts in choices:
        MODELS[f"dit-moe-{size}/2-{experts}e2a"] = functools.partial(
            DiTMoE, depth=depth, hidden_size=width, num_heads=heads, num_experts=experts,
            qk_norm=size in ("l", "xl", "g"))


# =============================================================================================================== TerDiT
# TerDiT: Ternary Diffusion Models with Transformers, 2405.14854. A LLaMA-style DiT (Large-DiT: RMSNorm, rotary
# positions, SwiGLU, no position table) whose blocks' linear layers have weights in {-alpha, 0, alpha}:
# `layers.ternarize` makes them so, and puts an RMSNorm behind each block's adaLN projection, the paper's one change.


class TerDiTBlock(nn.Module):
    """As DiT's block, with RMSNorm, rotary attention and SwiGLU. x (B, N, D), c (B, condition), rope: cos and sin
    (1, N, D/2h)."""

    def __init__(self, dim, condition, num_heads, kv_heads, hidden, eps, qk_norm):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.attention = GroupedAttention(dim, num_heads, kv_heads, qk_norm)
        self.feed_forward = SwiGlu(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 6 * dim))

    def forward(self, x, c, rope):
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        h = norm_modulate(x, self.attention_norm, shift_attn, scale_attn)
        x, h = gate_norm_modulate(x, gate_attn, self.attention(h, rope), self.ffn_norm, shift_mlp, scale_mlp)
        return gated(x, gate_mlp, self.feed_forward(h))


class TerDiT(Backbone):
    """A LLaMA-style DiT whose weights are -a, 0 or a: TerDiT, 2405.14854.

    kv_heads: of keys and values (None: as many as heads). The hidden width is 8/3 of the model's, times
    ffn_multiplier, rounded up to a multiple of multiple_of. ternary=False: the full-precision Large-DiT. The other
    arguments are DiT's."""

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1536, depth=16, num_heads=32,
                 kv_heads: int | None = None, multiple_of=256, ffn_multiplier: float | None = None, norm_eps=1e-5,
                 qk_norm=False, num_classes=1000, learn_sigma=False, null_class=True, ternary=True):
        super().__init__()
        D, condition, self.patch_size = hidden_size, min(hidden_size, 1024), patch_size
        self.grid, self.head_dim = patch_grid(image_size, patch_size), D // num_heads
        hidden = llama_hidden(D, multiple_of, ffn_multiplier)
        self.x_embedder = PatchEmbed(in_channels, D, patch_size)
        self.t_embedder = TimestepEmbedder(condition)
        self.y_embedder = LabelEmbedder(num_classes, condition, null_class) if num_classes else None
        self.layers = nn.ModuleList(
            TerDiTBlock(D, condition, num_heads, kv_heads or num_heads, hidden, norm_eps, qk_norm)
            for _ in range(depth))
        self.final_layer = FinalLayer(D, patch_size, in_channels * (2 if learn_sigma else 1), condition)
        adaln_zero(self)
        if ternary:
            ternarize(self, norm_eps)

    def forward(self, x, t, y=None):
        x = self.x_embedder(x)                                      # (B, N, D)
        c = self.t_embedder(t)                                      # (B, min(D, 1024))
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        rope = self.positions(x.shape[1], c)                        # cos and sin, (1, N, D/2h)
        for layer in self.layers:
            x = layer(x, c, rope)                                   # (B, N, D)
        x = self.final_layer(x, c)                                  # (B, N, p p C_out)
        return unpatchify(x, self.grid, self.patch_size)            # (B, C_out, H, W)

    def positions(self, length, like):
        """cos and sin of one-dimensional positions: the token's place in row-major order."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        place = torch.arange(length, device=like.device, dtype=dtype)
        period = 10000 ** (torch.arange(0, self.head_dim, 2, device=like.device, dtype=dtype) / self.head_dim)
        angle = place[:, None] * (1 / period)
        return angle.cos()[None], angle.sin()[None]


MODELS["terdit-nano"] = functools.partial(
    TerDiT, depth=6, hidden_size=128, num_heads=4, multiple_of=32, qk_norm=True, patch_size=4)
for size, (depth, width) in {"600m": (16, 1536), "4.2b": (32, 3072),          # the paper's; 7b is in its code
                             "7b": (32, 4096)}.items():
    MODELS[f"terdit-{size}"] = functools.partial(TerDiT, depth=depth, hidden_size=width)


# ============================================================================================================= T-Stitch
# T-Stitch, 2402.14167: no network, but several trained ones in one trajectory. Denoisers of all sizes agree in the
# noisy first steps, which set layout and low frequencies; so a small model takes these and a large one the rest. Which
# one, `guidance.stitch_by_steps` says, or `stitch_by_time`; `guidance.stitched` makes one denoiser of several.


class Stitched(nn.Module):
    """The published form, a module for chains of T steps, which tell a network the process's own time: model(x, t, y)
    is the model that `guidance.stitch_by_time` names for t[0]."""

    def __init__(self, models, fractions, T=1000):
        super().__init__()
        check_fractions(fractions, len(models))
        self.models, self.choose_model = nn.ModuleList(models), stitch_by_time(fractions, T)

    def forward(self, x, t, y=None):
        return self.models[self.choose_model(t[0].item())](x, t, y)


# ================================================================================================================= DiCo
# DiCo: Revitalizing ConvNets for Scalable and Efficient Diffusion Modeling, 2505.11196. Attention, whose maps in a
# trained DiT are local, gives way to 1x1 and depthwise 3x3 convolutions; what that loses, because channels go idle,
# compact channel attention gives back. The blocks stand in a U of three levels, of widths D, 2D, 4D, with adaLN-Zero as
# in DiT. No position table: any size that 4 divides.


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, as the matrix product that it is, which saves a little on a CPU. Free of copies if x
    (B, C, H, W) is channels-last, and so is its output."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x):
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class CompactChannelAttention(nn.Module):
    """A gate in (0, 1) for each channel from the image's mean: x * sigmoid(conv1x1(mean(x))), (B, C, H, W). Eq. 5."""

    def __init__(self, dim):
        super().__init__()
        self.conv = Pointwise(dim, dim)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()


def channel_norm(x):
    """LayerNorm over the channels of each pixel, no affine. Costs no copy if x (B, C, H, W) is channels-last."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)


class DiCoBlock(nn.Module):
    """Conv module and feedforward, each between adaLN modulation and a gate. x (B, C, H, W), c (B, C). Figure 4."""

    def __init__(self, dim, mlp_ratio=2):
        super().__init__()
        self.conv1 = Pointwise(dim, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)      # depthwise
        self.cca = CompactChannelAttention(dim)
        self.conv3 = Pointwise(dim, dim)
        self.conv4, self.conv5 = Pointwise(dim, int(dim * mlp_ratio)), Pointwise(int(dim * mlp_ratio), dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, :, None, None].chunk(6, 1)
        h = torch.addcmul(shift1, channel_norm(x), 1 + scale1)
        x = torch.addcmul(x, gate1, self.conv3(self.cca(F.gelu(self.conv2(self.conv1(h))))))
        h = torch.addcmul(shift2, channel_norm(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.conv5(F.gelu(self.conv4(h))))


class DiCoHead(nn.Module):
    """adaLN, then a 3x3 convolution to the output's channels."""

    def __init__(self, dim, out_channels):
        super().__init__()
        self.out_proj = nn.Conv2d(dim, out_channels, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, :, None, None].chunk(2, 1)
        return self.out_proj(torch.addcmul(shift, channel_norm(x), 1 + scale))


class DiCo(Backbone):
    """A U of convolutional blocks with compact channel attention: DiCo, 2505.11196.

    hidden_size: D. depth: blocks of encoder 1, encoder 2, middle, decoder 2, decoder 1. The others as in DiT.

    As in the published code, the last decoder works at full resolution with width 2D, under the second level's
    condition: most of the compute is there. One skip a level.
    """

    any_size = True
    stride = 4

    def __init__(self, image_size=32, in_channels=4, num_classes=1000, hidden_size=128, depth=(5, 4, 4, 4, 4),
                 mlp_ratio=2.0, learn_sigma=False, null_class=True):
        super().__init__()
        patch_grid(image_size, self.stride, "what its levels need,")
        D = hidden_size
        self.t_embedder = nn.ModuleList(TimestepEmbedder(w) for w in (D, 2 * D, 4 * D))
        self.y_embedder = nn.ModuleList(LabelEmbedder(num_classes, w, null_class) for w in (D, 2 * D, 4 * D)
                                        ) if num_classes else None
        self.x_embedder = nn.Conv2d(in_channels, D, 3, padding=1)

        def stage(width, k):
            return nn.ModuleList(DiCoBlock(width, mlp_ratio) for _ in range(depth[k]))

        self.encoder1, self.down1 = stage(D, 0), nn.Conv2d(D, D // 2, 3, padding=1, bias=False)
        self.encoder2, self.down2 = stage(2 * D, 1), nn.Conv2d(2 * D, D, 3, padding=1, bias=False)
        self.middle = stage(4 * D, 2)
        self.up2, self.join2 = nn.Conv2d(4 * D, 8 * D, 3, padding=1, bias=False), Pointwise(4 * D, 2 * D)
        self.decoder2 = stage(2 * D, 3)
        self.up1, self.join1 = nn.Conv2d(2 * D, 4 * D, 3, padding=1, bias=False), Pointwise(2 * D, 2 * D)
        self.decoder1 = stage(2 * D, 4)
        self.final_layer = DiCoHead(2 * D, in_channels * (2 if learn_sigma else 1))
        self.initialise()

    def initialise(self):
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            if isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
        for embedder in self.t_embedder:
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        for m in self.modules():                                        # closed gates, no modulation, output 0
            if isinstance(m, (DiCoBlock, DiCoHead)):
                zeroed(m.adaLN_modulation[1])
        zeroed(self.final_layer.out_proj)

    def forward(self, x, t, y=None):
        c1, c2, c3 = (e(t) for e in self.t_embedder)                                # (B, D), (B, 2D), (B, 4D)
        if self.y_embedder is not None:
            c1, c2, c3 = (c + e(y) for c, e in zip((c1, c2, c3), self.y_embedder))

        def through(blocks, x, c):
            x = x.contiguous(memory_format=torch.channels_last)
            for block in blocks:
                x = block(x, c)
            return x

        e1 = through(self.encoder1, self.x_embedder(x), c1)                         # (B, D, H, W)
        e2 = through(self.encoder2, F.pixel_unshuffle(self.down1(e1), 2), c2)       # (B, 2D, H/2, W/2)
        x = through(self.middle, F.pixel_unshuffle(self.down2(e2), 2), c3)          # (B, 4D, H/4, W/4)
        x = torch.cat([F.pixel_shuffle(self.up2(x), 2), e2], 1)                     # (B, 4D, H/2, W/2)
        x = through(self.decoder2, self.join2(x), c2)                               # (B, 2D, H/2, W/2)
        x = torch.cat([F.pixel_shuffle(self.up1(x), 2), e1], 1)                     # (B, 2D, H, W)
        x = through(self.decoder1, self.join1(x), c2)                               # (B, 2D, H, W)
        return self.final_layer(x, c2)                                              # (B, C_out, H, W)


MODELS["dico-nano"] = functools.partial(DiCo, hidden_size=32, depth=(1, 1, 1, 1, 1))
for size, (width, depth, ratio) in {"s": (128, (5, 4, 4, 4, 4), 2.0), "b": (256, (5, 4, 4, 4, 4), 2.0),       # table 7
                                    "l": (352, (9, 8, 9, 8, 9), 2.0), "xl": (416, (9, 9, 10, 9, 9), 2.0),
                                    "h": (416, (14, 12, 10, 12, 14), 4.0)}.items():
    MODELS[f"dico-{size}"] = functools.partial(DiCo, hidden_size=width, depth=depth, mlp_ratio=ratio)


# ================================================================================================================ U-ViT
# All are Worth Words: A ViT Backbone for Diffusion Models, 2209.12152. Time, label or text, and noisy patches are alike
# tokens of a plain ViT, whose first half is joined to its second by long skips, as in a U-Net. No adaLN, no change of
# resolution. After un-patchifying, a 3x3 convolution against the patches' seams.


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP (B, N, D); a decoder block first takes a skip in, concatenated. Figure 1."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, skip=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu="none")
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(Backbone):
    """A plain ViT with long skips, time and label or text as tokens: U-ViT, 2209.12152.

    depth // 2 blocks, one in the middle, depth // 2 that take the skips in. text_width: of text instead of labels; y
    is a Text, or its tokens (B, L, text_width), L at most text_length; what is missing is zeros. time_mlp: the time
    token through Linear, SiLU, Linear. conv: the last 3x3 convolution. skip: the long skips. std: of the initial
    weights; narrow models learn sooner with more than the published 0.02. The others as in DiT."""

    def __init__(self, image_size=32, patch_size=2, in_channels=3, hidden_size=512, depth=12, num_heads=8,
                 mlp_ratio=4.0, num_classes=0, learn_sigma=False, null_class=True, qkv_bias=False, time_mlp=False,
                 conv=True, skip=True, text_width=0, text_length=77, std=0.02):
        super().__init__()
        D, out_channels = hidden_size, in_channels * (2 if learn_sigma else 1)
        self.patch_size, self.grid, self.width = patch_size, patch_grid(image_size, patch_size), D
        self.x_embedder = PatchEmbed(in_channels, D, patch_size)
        self.t_embedder = nn.Sequential(
            nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D)) if time_mlp else nn.Identity()
        self.y_embedder = LabelEmbedder(num_classes, D, null_class) if num_classes and not text_width else None
        self.text_embedder = nn.Linear(text_width, D) if text_width else None
        self.text_width, self.text_length = text_width, text_length if text_width else 0
        self.null_text = torch.zeros(text_length, text_width) if text_width else None
        self.extras = 1 + self.text_length + (self.y_embedder is not None)          # tokens that are not patches
        self.pos_embed = nn.Parameter(torch.empty(1, self.extras + self.grid[0] * self.grid[1], D))

        def block(skip):
            return UViTBlock(D, num_heads, mlp_ratio, qkv_bias, skip)

        self.in_blocks = nn.ModuleList(block(False) for _ in range(depth // 2))
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(D)
        self.decoder_pred = nn.Linear(D, patch_size**2 * out_channels)
        self.final_layer = nn.Conv2d(out_channels, out_channels, 3, padding=1) if conv else nn.Identity()
        gaussian(self, std)
        nn.init.normal_(self.pos_embed, std=std)

    def forward(self, x, t, y=None):
        x = self.x_embedder(x)                                                      # (B, N, D)
        tokens = [self.t_embedder(timestep_embedding(t, self.width).to(x.dtype))[:, None], x]
        if self.text_embedder is not None:                                          # time, text, patches
            y = y if isinstance(y, torch.Tensor) else y.tokens * y.mask[..., None]
            tokens.insert(1, self.text_embedder(F.pad(y, (0, 0, 0, self.text_length - y.shape[1]))))
        elif self.y_embedder is not None:                                           # label, time, patches
            tokens.insert(0, self.y_embedder(y)[:, None])
        x, skips = torch.cat(tokens, 1) + self.pos_embed, []                        # (B, extras + N, D)
        for block in self.in_blocks:
            skips.append(x := block(x))
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras:]                        # (B, N, p*p*C_out)
        return self.final_layer(unpatchify(x, self.grid, self.patch_size))          # (B, C_out, H, W)


MODELS["uvit-nano"] = functools.partial(UViT, hidden_size=128, depth=6, num_heads=4, patch_size=4, std=0.06)
for size, (depth, width, heads) in {"s": (12, 512, 8), "m": (16, 768, 12),                                    # table 4
                                    "l": (20, 1024, 16), "h": (28, 1152, 16)}.items():
    for patch in (2, 4):                                       # the published H has no last convolution
        MODELS[f"uvit-{size}/{patch}"] = functools.partial(
            UViT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch, conv=size != "h")


# ================================================================================================================= DiMR
# Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models, 2406.09416. Several branches see the
# same noisy image, each at its own resolution: transformer blocks at the lowest, ConvNeXt blocks above. Each predicts
# at its resolution (objectives.MultiScale trains them all) and hands its features up, the cascade. Time enters through
# the norms alone (layers.TDLN). Long skips as in U-ViT. Everything in here is channels-last: (B, h, w, D).


class DiMRBlock(nn.Module):
    """A mixer of positions, then GEGLU, each with its residual connection. With num_heads the mixer is attention over
    tokens (B, N, D); without, a depthwise convolution (B, h, w, D), which has no norm before it. Figure 3."""

    def __init__(self, dim, hidden, num_heads=None, kernel_size=7, rms=True):
        super().__init__()
        self.norm1 = TDLN(dim, rms) if num_heads else None
        self.mixer = (Attention(dim, num_heads, qkv_bias=False) if num_heads else
                      nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim))
        self.norm2 = TDLN(dim, rms)
        self.mlp = GeGlu(dim, hidden, ("w0", "w1", "w2"), bias=True)

    def forward(self, x, tau):
        if self.norm1:
            x = x + self.mixer(self.norm1(x, tau))
        else:
            x = x + self.mixer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm2(x, tau))


class Branch(nn.Module):
    """One resolution: x (B, C, H, W), cascade (B, h/k, w/k, its width) of the branch below or None
    -> prediction (B, C_out, h, w), cascade (B, h, w, dim (2 (blocks // 2) + 2)): the states of all blocks.

    grid: the largest (h, w). image_ratio, patch_size: area downsampling of the image, then patches, so that h is
    H/(image_ratio patch_size). cascade: its (width, k) or None. blocks: an even number gets one more. num_heads: None
    for ConvNeXt blocks.
    """

    def __init__(self, grid, channels, out_channels, dim, blocks, patch_size=1, num_heads=None, num_classes=0,
                 cascade=None, hidden=None, kernel_size=7, final_kernel=3, image_ratio=1, rms=True, null_class=True,
                 std=0.02):
        super().__init__()
        self.grid, self.image_ratio, self.num_heads = grid, image_ratio, num_heads
        self.reduction = image_ratio * patch_size
        self.x_embedder = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.empty(*grid, dim))
        self.y_embedder = LabelEmbedder(num_classes, dim, null_class) if num_heads and num_classes else None
        if cascade:
            width, self.k = cascade
            self.cascade_norm, self.up, self.up_norm = TDLN(width), nn.Linear(width, dim * self.k**2), TDLN(dim)
        self.blocks = nn.ModuleList(DiMRBlock(dim, hidden or 2 * dim, num_heads, kernel_size, rms)
                                    for _ in range(2 * (blocks // 2) + 1))
        self.joins = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(blocks // 2))
        self.norm = TDLN(dim)
        self.head = nn.Conv2d(dim, out_channels, final_kernel, padding=final_kernel // 2)
        gaussian(self, std, (nn.Linear, nn.Embedding))
        nn.init.normal_(self.pos_embed, std=std)

    def forward(self, x, tau, y=None, cascade=None):
        x = self.x_embedder(F.avg_pool2d(x, self.image_ratio)).permute(0, 2, 3, 1)              # (B, h, w, D)
        B, h, w, D = x.shape
        x = x + self.pos_embed[:h, :w]
        if cascade is not None:
            x = x + self.up_norm(self.shuffled(self.up(self.cascade_norm(cascade, tau))), tau)
        if self.num_heads:
            x = x.flatten(1, 2)                                                                 # (B, h w, D)
        if self.y_embedder is not None:
            x = torch.cat([self.y_embedder(y)[:, None], x], 1)                                  # (B, 1 + h w, D)
        states, skips, n = [x], [], len(self.joins)
        for k, block in enumerate(self.blocks):
            if k > n:
                x = self.joins[k - n - 1](torch.cat([x, skips.pop()], -1))
            states.append(x := block(x, tau))
            if k < n:
                skips.append(x)
        if self.num_heads:                                                                      # the class token goes
            states = [s[:, -h * w:].unflatten(1, (h, w)) for s in states]
        x = self.norm(states[-1], tau).permute(0, 3, 1, 2)
        return self.head(x), torch.cat(states, -1)

    def shuffled(self, x):
        """(B, h, w, k k D), position-major as in `unpatchify` -> (B, h k, w k, D)."""
        B, h, w, _ = x.shape
        return x.view(B, h, w, self.k, self.k, -1).transpose(2, 3).reshape(B, h * self.k, w * self.k, -1)


class DiMR(Backbone):
    """Branches of several resolutions, transformer below and ConvNeXt above, time in their norms: DiMR, 2406.09416.

    hidden_size: width of the lowest branch; it halves from each to the next. depth: blocks of the lowest; the others
    have half as many. patch_sizes: of the branches, lowest resolution first. norm: "td-rms" or "td-ln", inside blocks.
    branches: for each branch a dict of arguments of `Branch` that differ from this rule. detach: the cascade carries no
    gradient down. image_size is the largest; a smaller image takes the top left of the position tables. std: of the
    initial weights, see `UViT`."""

    any_size = True
    multi_scale = True

    def __init__(self, image_size=64, in_channels=3, num_classes=1000, hidden_size=768, depth=15, num_heads=12,
                 patch_sizes=(4, 2, 1), norm="td-rms", learn_sigma=False, null_class=True,
                 branches: tuple | None = None, detach=False, std=0.02):
        super().__init__()
        if norm not in ("td-rms", "td-ln"):
            raise ValueError(f"norm {norm!r}: choose td-rms or td-ln")
        self.detach, self.branches, below = detach, nn.ModuleList(), None
        for k, patch in enumerate(patch_sizes):
            own = dict(dim=hidden_size >> k, blocks=(depth + 1) // 2 if k else depth, patch_size=patch,
                       num_heads=None if k else num_heads) | (branches[k] if branches else {})
            own.setdefault("grid", patch_grid(image_size, own["patch_size"] * own.get("image_ratio", 1)))
            cascade = below and (below["dim"] * (2 * (below["blocks"] // 2) + 2), own["grid"][0] // below["grid"][0])
            self.branches.append(Branch(channels=in_channels, out_channels=in_channels * (2 if learn_sigma else 1),
                                        num_classes=num_classes, cascade=cascade, rms=norm == "td-rms",
                                        null_class=null_class, std=std, **own))
            below = own
        if self.branches[-1].reduction != 1:
            raise ValueError(f"patch_sizes {tuple(patch_sizes)}: the last branch draws the image, so it must end in 1")

    @property
    def stride(self):
        return self.branches[0].reduction

    def resize(self, image_size):
        """As long as it fits: nothing changes but what is drawn."""
        super().resize(image_size)
        self.check(pair(image_size))

    def check(self, sides):
        (H, W), (h, w), r = sides, self.branches[0].grid, self.stride
        if H > h * r or W > w * r or H % r or W % r:
            raise ValueError(f"an image of {H}x{W} pixels: this DiMR takes up to {h * r}x{w * r}, divisible by {r}")

    def forward(self, x, t, y=None, every=False):
        """The last branch's prediction (B, C_out, H, W); every: a list of all, (B, C_out, h, w), lowest first."""
        self.check(x.shape[2:])
        tau, cascade, outputs = t / 500 - 1, None, []                               # (B,): -1 clean, 1 noise
        for branch in self.branches:
            output, cascade = branch(x, tau, y, cascade.detach() if self.detach and outputs else cascade)
            outputs.append(output)
        return outputs if every else outputs[-1]


MODELS["dimr-nano"] = functools.partial(DiMR, hidden_size=96, depth=5, num_heads=4, patch_sizes=(2, 1), std=0.06)
# The 2R sizes are those of the published code; the 3R sizes follow its rule and match the published parameters.
for size, (depth, width, heads) in {"m/3r": (15, 768, 12), "l/3r": (33, 768, 12), "xl/2r": (39, 960, 16),
                                    "xl/3r": (39, 960, 16), "g/2r": (57, 1152, 16)}.items():
    MODELS[f"dimr-{size}"] = functools.partial(
        DiMR, depth=depth, hidden_size=width, num_heads=heads,
        patch_sizes=(4, 2, 1) if size.endswith("3r") else (2, 1))


# ======================================================================================================= Diffusion-RWKV
# Diffusion-RWKV: Scaling RWKV-Like Architectures for Diffusion Models, 2404.04478. Self-attention becomes the spatial
# mix of Vision-RWKV (2403.02308): keys, values and receptance from tokens mixed with their four neighbours (Q-shift),
# then Bi-WKV, a two-sided mean with exponential decay, whose cost grows linearly with the tokens. Conditioning is
# adaLN-Zero; the first half of the blocks sends long skips to the second (U-ViT).


def q_shift(x, grid, pixels=1, gamma=0.25):
    """Tokens (B, N, D) of a grid of (rows, columns), of which a band of `gamma` D channels each comes from the left,
    right, upper and lower neighbour `pixels` away; zeros from outside, the remaining channels stay. 2403.02308,
    section 3.2."""
    (rows, columns), (B, N, D) = grid, x.shape
    edges = [0, *(int(D * gamma * band) for band in (1, 2, 3, 4)), D]
    left, right, up, down, same = x.view(B, rows, columns, D).tensor_split(edges[1:-1], -1)
    n, m = min(pixels, columns), min(pixels, rows)
    return torch.cat([F.pad(left[:, :, :columns - n], (0, 0, n, 0)), F.pad(right[:, :, n:], (0, 0, 0, n)),
                      F.pad(up[:, :rows - m], (0, 0, 0, 0, m, 0)), F.pad(down[:, m:], (0, 0, 0, 0, 0, m)), same],
                     -1).view(B, N, D)


class SpatialMix(nn.Module):
    """Q-shift, Bi-WKV attention with learned decay and first-token bonus, receptance gate. (B, N, D) -> (B, N, D).

    key_norm: LayerNorm on what Bi-WKV returns. init: "fancy" (decays and mixes that vary with channel and depth),
    "local" (all 1) or "global" (no decay, mixes 1/2); block `layer` of `depth`."""

    def __init__(self, dim, layer=0, depth=1, key_norm=False, init="fancy"):
        super().__init__()
        channel, up = torch.arange(dim), layer / max(1, depth - 1)          # up: 0 in the first block, 1 in the last
        base, e = (channel / dim)[None, None], 1 - layer / depth
        decay = -5 + 8 * (channel / max(1, dim - 1)) ** (0.7 + 1.3 * up)
        first = torch.full((dim,), math.log(0.3)) + 0.5 * ((channel + 1) % 3 - 1)
        mix_k, mix_v, mix_r = base**e, base**e + 0.3 * up, base ** (0.5 * e)
        if init != "fancy":
            decay, first = (torch.full((dim,), {"local": 1.0, "global": 0.0}[init]) for _ in range(2))
            mix_k, mix_v, mix_r = (torch.full((1, 1, dim), {"local": 1.0, "global": 0.5}[init]) for _ in range(3))
        self.spatial_decay, self.spatial_first = nn.Parameter(decay), nn.Parameter(first)
        self.spatial_mix_k, self.spatial_mix_v = nn.Parameter(mix_k), nn.Parameter(mix_v)
        self.spatial_mix_r = nn.Parameter(mix_r)
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.receptance, self.output = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim) if key_norm else nn.Identity()

    def forward(self, x, grid):
        N, shifted = x.shape[1], q_shift(x, grid)
        k = self.key(torch.lerp(shifted, x, self.spatial_mix_k.to(x)))
        v = self.value(torch.lerp(shifted, x, self.spatial_mix_v.to(x)))
        r = self.receptance(torch.lerp(shifted, x, self.spatial_mix_r.to(x)))
        mean = bi_wkv(self.spatial_decay / N, self.spatial_first / N, k, v)
        return self.output(torch.sigmoid(r) * self.key_norm(mean))


class ChannelMix(nn.Module):
    """Q-shift, then an MLP of squared ReLU with a receptance gate. (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, layer=0, depth=1, hidden_rate=4, key_norm=False, init="fancy"):
        super().__init__()
        mix = (torch.arange(dim) / dim)[None, None] ** (1 - layer / depth)
        if init != "fancy":
            mix = torch.full((1, 1, dim), {"local": 1.0, "global": 0.5}[init])
        self.spatial_mix_k, self.spatial_mix_r = nn.Parameter(mix.clone()), nn.Parameter(mix.clone())
        self.key = nn.Linear(dim, int(hidden_rate * dim), bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(int(hidden_rate * dim), dim, bias=False)
        self.key_norm = nn.LayerNorm(int(hidden_rate * dim)) if key_norm else nn.Identity()

    def forward(self, x, grid):
        shifted = q_shift(x, grid)
        k = self.key(torch.lerp(shifted, x, self.spatial_mix_k.to(x)))
        r = self.receptance(torch.lerp(shifted, x, self.spatial_mix_r.to(x)))
        return torch.sigmoid(r) * self.value(self.key_norm(k.relu().square()))


class DRWKVBlock(nn.Module):
    """Spatial and channel mix, each after adaLN modulation and behind a gate; a long skip enters by concatenation.
    post_norm: the norm follows the mix. drop_path: share of samples that a branch is closed for in training."""

    def __init__(self, dim, layer=0, depth=1, skip=False, hidden_rate=4, key_norm=False, post_norm=False, init="fancy",
                 drop_path=0.0):
        super().__init__()
        self.post_norm, self.drop_path = post_norm, drop_path
        self.ln0 = nn.LayerNorm(dim) if layer == 0 else nn.Identity()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.att = SpatialMix(dim, layer, depth, key_norm, init)
        self.ffn = ChannelMix(dim, layer, depth, hidden_rate, key_norm, init)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def branch(self, x, norm, mix, grid, shift, scale, gate):
        if self.post_norm:
            y = modulate(norm(mix(x, grid)), shift, scale)
        else:
            y = mix(modulate(norm(x), shift, scale), grid)
        return x + drop_path(gate[:, None] * y, self.drop_path if self.training else 0.0)

    def forward(self, x, c, grid, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = self.ln0(x)
        first, second = self.adaLN_modulation(c).chunk(2, 1)
        x = self.branch(x, self.ln1, self.att, grid, *first.chunk(3, 1))
        return self.branch(x, self.ln2, self.ffn, grid, *second.chunk(3, 1))


def drop_path(x, rate):
    """Stochastic depth, 1603.09382: x (B, ...) without a share `rate` of its samples, the others scaled up by it."""
    if not rate:
        return x
    keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device, dtype=x.dtype) >= rate
    return x * keep / (1 - rate)


class DRWKV(Backbone):
    """A transformer whose attention is the linear-time Bi-WKV: Diffusion-RWKV, 2404.04478.

    depth must be odd. num_classes 0: no labels; y None on a model with labels: time alone."""

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=384, depth=13, num_classes=1000,
                 hidden_rate=4, key_norm=False, post_norm=False, init="fancy", drop_path=0.1, learn_sigma=False):
        super().__init__()
        if depth % 2 == 0:
            raise ValueError(f"depth {depth} is even: Diffusion-RWKV has a middle block, choose {depth + 1}")
        self.patch_size, self.grid, D = patch_size, patch_grid(image_size, patch_size), hidden_size
        self.patch_embed = PatchEmbed(in_channels, D, patch_size)
        self.pos_embed = nn.Parameter(position_table(D, *self.grid)[None])                          # (1, N, D)
        self.time_embed = TimestepEmbedder(D)
        self.label_emb = LabelEmbedder(num_classes, D) if num_classes else None
        blocks = [DRWKVBlock(D, i, depth, i > depth // 2, hidden_rate, key_norm, post_norm, init,
                             drop_path * i / depth) for i in range(depth)]
        self.in_blocks, self.mid_block = nn.ModuleList(blocks[:depth // 2]), blocks[depth // 2]
        self.out_blocks = nn.ModuleList(blocks[depth // 2 + 1:])
        self.norm_f = nn.LayerNorm(D)
        self.final_layer = FinalLayer(D, patch_size, in_channels * (2 if learn_sigma else 1))
        adaln_zero(self)

    def forward(self, x, t, y=None):
        x = self.patch_embed(x) + self.pos_embed                    # (B, N, D)
        c = self.time_embed(t)                                      # (B, D)
        if self.label_emb is not None and y is not None:
            c = c + self.label_emb(y)
        skips = []
        for block in self.in_blocks:
            skips.append(x := block(x, c, self.grid))
        x = self.mid_block(x, c, self.grid)
        for block in self.out_blocks:
            x = block(x, c, self.grid, skips.pop())
        return unpatchify(self.final_layer(self.norm_f(x), c), self.grid, self.patch_size)


MODELS["drwkv-nano"] = functools.partial(DRWKV, depth=7, hidden_size=128, patch_size=4, drop_path=0.0)
# 39.3, 74.8, 132.6, 439 and 780 M parameters with patch 2 on latents and 1000 classes.
for size, (depth, width) in {"s": (13, 384), "b": (25, 384), "m": (25, 512), "l": (37, 768), "h": (37, 1024)}.items():
    for patch in (2, 4):
        MODELS[f"drwkv-{size}/{patch}"] = functools.partial(DRWKV, depth=depth, hidden_size=width, patch_size=patch)


# ================================================================================================================ Dimba
# Dimba: Transformer-Mamba Diffusion Models, 2406.01159. Text to image: Transformer blocks as in PixArt-alpha
# (self-attention, cross-attention to the text, MLP; one modulation for the whole network, adaLN-single) alternate with
# bidirectional Mamba blocks, whose cost grows linearly with the tokens. As published, a Transformer block reads only
# what the Mamba mixer before it put out: the residual stream runs through the Mamba blocks alone and is dropped at the
# end. `repaired` adds it back, as the paper's figure shows it. N = (H/p)(W/p) tokens, width D, L text tokens.


class CrossAttention(nn.Module):
    """Queries from x (B, N, D), keys and values from text (B, L, D); mask (B, L) bool, False at padding."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear, self.kv_linear = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, text, mask=None):
        q = split_heads(self.q_linear(x), self.num_heads)                                           # (B, h, N, D/h)
        k, v = (split_heads(z, self.num_heads) for z in self.kv_linear(text).chunk(2, -1))          # (B, h, L, D/h)
        mask = None if mask is None else mask[:, None, None]
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, mask)))


class DimbaBlock(nn.Module):
    """Transformer block: the modulation is the block's own table plus t0 (B, 6 D), which all blocks share."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.norm1, self.norm2 = plain_norm(dim), plain_norm(dim)
        self.attn = Attention(dim, num_heads)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, text, t0, mask=None):
        table = self.scale_shift_table + t0.view(len(x), 6, -1)                                     # (B, 6, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)
        x = gated(x, gate_attn, self.attn(norm_modulate(x, self.norm1, shift_attn, scale_attn)))
        x = x + self.cross_attn(x, text, mask)
        return gated(x, gate_mlp, self.mlp(norm_modulate(x, self.norm2, shift_mlp, scale_mlp)))


class Mamba(nn.Module):
    """Mamba, 2312.00752: in_proj to x | z, causal convolution, selective scan gated by z, out_proj. (B, N, D) likewise.

    bidirectional: a second convolution and scan run on the reversed tokens, and both results are added (Vision Mamba,
    2401.09417, "v2"). d_inner = expand D channels of d_state states, step sizes of rank dt_rank (ceil(D / 16))."""

    def __init__(self, dim, d_state=16, d_conv=4, expand=2, bidirectional=False, dt_rank=None):
        super().__init__()
        D, self.rank, self.d_state, self.d_conv = int(expand * dim), dt_rank or -(-dim // 16), d_state, d_conv
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * D, bias=False), nn.Linear(D, dim, bias=False)
        self.branches = ["", "_b"] if bidirectional else [""]
        for b in self.branches:
            setattr(self, f"conv1d{b}", nn.Conv1d(D, D, d_conv, groups=D))
            setattr(self, f"x_proj{b}", nn.Linear(D, self.rank + 2 * d_state, bias=False))
            setattr(self, f"dt_proj{b}", nn.Linear(self.rank, D))
            setattr(self, f"A{b}_log", nn.Parameter(torch.arange(1, d_state + 1.0).log().repeat(D, 1)))
            setattr(self, f"D{b}", nn.Parameter(torch.ones(D)))
            *_, A_log, skip = self.branch(b)
            A_log.no_decay = skip.no_decay = True
        self.initialise_steps()

    def branch(self, b):
        """conv1d, x_proj, dt_proj, A_log and D of the branch with this suffix, as published files name them."""
        return [getattr(self, name) for name in (f"conv1d{b}", f"x_proj{b}", f"dt_proj{b}", f"A{b}_log", f"D{b}")]

    def initialise_steps(self):
        """Step sizes: log-uniform in 0.001 .. 0.1 through the bias of dt_proj, the inverse of softplus."""
        for b in self.branches:
            _, _, dt_proj, _, _ = self.branch(b)
            nn.init.uniform_(dt_proj.weight, -self.rank**-0.5, self.rank**-0.5)
            dt = torch.empty_like(dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            dt_proj.bias.data = dt + torch.log(-torch.expm1(-dt))

    def scan(self, x, z, b):
        """The convolution and scan of branch b on x, z (B, N, d_inner)."""
        conv1d, x_proj, dt_proj, A_log, skip = self.branch(b)
        x = F.silu(conv1d(F.pad(x.transpose(1, 2), (self.d_conv - 1, 0)))).transpose(1, 2)
        dt, B, C = x_proj(x).split([self.rank, self.d_state, self.d_state], -1)
        A = -torch.exp(A_log.float())
        return selective_scan(x, dt @ dt_proj.weight.T, A, B, C, skip, z, dt_proj.bias, True)[0]

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, -1)
        y = self.scan(x, z, "")
        if len(self.branches) == 2:
            y = y + self.scan(x.flip(1), z.flip(1), "_b").flip(1)
        return self.out_proj(y)


class MambaBlock(nn.Module):
    """(x, r) -> (mixer(RMSNorm(r + x)), r + x): r is the residual stream of the Mamba blocks, kept in float32."""

    def __init__(self, dim, **options):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = Mamba(dim, bidirectional=True, **options)

    def forward(self, x, r=None):
        r = x.to(torch.promote_types(x.dtype, torch.float32)) if r is None else r + x
        return self.mixer(self.norm(r)), r


class TextProjection(nn.Module):
    """The text's way in: an MLP from its width to D, and the null caption of precomputed text, a fixed random table
    that a published file replaces by the encoder's answer to the empty caption."""

    def __init__(self, text_width, text_length, dim):
        super().__init__()
        self.y_proj = nn.Sequential(OrderedDict(fc1=nn.Linear(text_width, dim), act=nn.GELU("tanh"),
                                                fc2=nn.Linear(dim, dim)))
        self.register_buffer("y_embedding", torch.randn(text_length, text_width) / text_width**0.5)
        for p in self.parameters():
            p.rate = 0.1                                             # as the encoder's, layers.TextEncoder

    def forward(self, tokens):
        return self.y_proj(tokens)


class Dimba(Backbone):
    """Transformer blocks that alternate with two-sided Mamba blocks, for text: Dimba, 2406.01159.

    mamba_ratio: Mamba blocks for each Transformer block, at most 1: the Mamba blocks follow the Transformer blocks i
    with i mod gap = 1, gap = 1/ratio (all of them for gap 1). order: "attention-first" as published, or "mamba-first",
    each Mamba block then goes before its Transformer block. repaired: the residual stream returns. image_size sets the
    position table's range, any other size stretches over it, divided by pe_interpolation. micro_condition: also told of
    the size and aspect ratio of the training image (`size` in forward; D divisible by 3)."""

    any_size = True

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, mamba_ratio=1.0, text_width=4096, text_length=120, pe_interpolation=1.0,
                 micro_condition=False, d_state=16, expand=2, order="attention-first", repaired=False,
                 learn_sigma=False):
        super().__init__()
        D, self.patch_size, self.repaired, self.order = hidden_size, patch_size, repaired, order
        self.text_width, self.text_length = text_width, text_length
        mambas = int(mamba_ratio * depth)
        if not 0 < mamba_ratio <= 1 or not mambas:
            raise ValueError(f"mamba_ratio {mamba_ratio} of depth {depth}: it must lie in (0, 1] and give one block")
        if order not in ("attention-first", "mamba-first"):
            raise ValueError(f"order {order!r} is neither attention-first nor mamba-first")
        gap = depth // mambas
        self.places = {i: i // gap for i in range(depth) if gap == 1 or i % gap == 1}     # Transformer -> Mamba block
        self.places = {i: j for i, j in self.places.items() if j < mambas}
        grid = patch_grid(image_size, patch_size)
        self.base, self.pe_interpolation = grid[0], pe_interpolation
        self.x_embedder = PatchEmbed(in_channels, D, patch_size)
        self.t_embedder = TimestepEmbedder(D)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.csize_embedder = TimestepEmbedder(D // 3) if micro_condition else None
        self.ar_embedder = TimestepEmbedder(D // 3) if micro_condition else None
        self.y_embedder = TextProjection(text_width, text_length, D)
        self.blocks = nn.ModuleList(DimbaBlock(D, num_heads, mlp_ratio) for _ in range(depth))
        self.mamba_blocks = nn.ModuleList(MambaBlock(D, d_state=d_state, expand=expand) for _ in range(mambas))
        self.final_layer = DimbaFinalLayer(D, patch_size, in_channels * (2 if learn_sigma else 1))
        self.initialise()

    @property
    def null_text(self):
        return self.y_embedder.y_embedding

    def initialise(self):
        """As published, but for the step sizes of Mamba, which the published pass over all layers overwrites by
        accident (softplus(0) = 0.69 in place of 0.001 .. 0.1): here they keep Mamba's own. Of a narrower text than the
        published 4096 the projection is drawn larger, so that what it puts out has the same size."""
        for m in self.modules():
            if isinstance(m, nn.Linear) or m is self.x_embedder.proj:
                nn.init.xavier_uniform_(m.weight.flatten(1))
                if m.bias is not None and m is not self.x_embedder.proj:
                    nn.init.zeros_(m.bias)
        for m in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1]):
            nn.init.normal_(m.weight, std=0.02)
        for m, width in ((self.y_embedder.y_proj.fc1, 4096), (self.y_embedder.y_proj.fc2, 1152)):
            nn.init.normal_(m.weight, std=0.02 * (width / m.in_features) ** 0.5)
        for name, p in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
                p.data /= math.sqrt(len(self.mamba_blocks))
        for m in (*(block.cross_attn.proj for block in self.blocks), self.final_layer.linear):
            zeroed(m)
        for block in self.mamba_blocks:
            block.mixer.initialise_steps()

    def forward(self, x, t, y, size=None):
        grid = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        scale = self.base / self.pe_interpolation
        x = self.x_embedder(x)
        x = x + position_table(x.shape[2], *grid, (scale / grid[0], scale / grid[1])).to(x)         # (B, N, D)
        te = self.t_embedder(t)                                                                     # (B, D)
        if self.csize_embedder is not None:
            te = te + self.embed_size(size, x, grid)
        t0, text = self.t_block(te), self.y_embedder(y.tokens)                            # (B, 6 D), (B, L, D)
        r = None
        for i, block in enumerate(self.blocks):
            if self.order == "attention-first":
                x = block(x, text, t0, y.mask)
            if i in self.places:
                x, r = self.mamba_blocks[self.places[i]](x, r)
                if self.repaired:
                    x, r = (r + x).to(x.dtype), None
            if self.order == "mamba-first":
                x = block(x, text, t0, y.mask)
        return unpatchify(self.final_layer(x, te), grid, self.patch_size)                           # (B, C_out, H, W)

    def embed_size(self, size, x, grid):
        """size (B, 3): height and width in pixels and aspect ratio of each image, by default those of x. -> (B, D)"""
        if size is None:
            H, W = grid[0] * self.patch_size, grid[1] * self.patch_size
            size = torch.tensor([[H, W, H / W]], device=x.device).expand(len(x), 3)
        height, width, ratio = size.unbind(1)
        return torch.cat([self.csize_embedder(height), self.csize_embedder(width), self.ar_embedder(ratio)], 1)


class DimbaFinalLayer(nn.Module):
    """Modulation by a table plus te (B, D), then the read-out of each token's patch."""

    def __init__(self, dim, patch_size, out_channels):
        super().__init__()
        self.norm_final = plain_norm(dim)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x, te):
        shift, scale = (self.scale_shift_table + te[:, None]).unbind(1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


MODELS["dimba-nano"] = functools.partial(
    Dimba, depth=4, hidden_size=96, num_heads=4, mamba_ratio=0.5, d_state=8, patch_size=4, text_width=96,
    text_length=64)
for size, (depth, width) in {"l": (28, 1152), "g": (40, 1408)}.items():       # 859 and 1820 M parameters
    MODELS[f"dimba-{size}/2"] = functools.partial(
        Dimba, depth=depth, hidden_size=width, num_heads=16, text_width=4096)


# ================================================================================================================== LiT
# LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation, 2501.12976. DiT with the self-attention
# replaced by ReLU linear attention of few heads plus one depthwise convolution on the values, which brings back
# locality. A trained DiT hands on every other weight and teaches (`train.py --inherit RUN --distill RUN`).


class LinearAttention(nn.Module):
    """Tokens (B, N, D) of a grid (H, W) -> (B, N, D): linear attention of heads d = D/h wide, plus a depthwise
    convolution of the values as an image, with the same filters for every head. Section 3.1."""

    def __init__(self, dim, num_heads, grid, kernel_size=5, qkv_bias=True):
        super().__init__()
        check_heads(dim, num_heads)
        d, self.num_heads, self.grid = dim // num_heads, num_heads, grid
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(d, d, kernel_size, padding=kernel_size // 2, groups=d)
        for m in (self.q, self.kv, self.proj):
            xavier(m)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = (split_heads(z, self.num_heads) for z in (self.q(x), *self.kv(x).chunk(2, -1)))   # (B, h, N, d)
        image = v.transpose(2, 3).reshape(B * self.num_heads, -1, *self.grid)                       # (B h, d, H, W)
        local = self.dwc(image).reshape(B, D, N).transpose(1, 2)                                    # (B, N, D)
        return self.proj(merge_heads(linear_attention(q, k, v)) + local)


class LiT(DiT):
    """DiT with linear attention and a depthwise convolution in attention's place: LiT, 2501.12976.

    num_heads: of the linear attention; kernel_size: of the convolution. Everything else is DiT's."""

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=4,
                 mlp_ratio=4.0, num_classes=1000, learn_sigma=False, null_class=True, kernel_size=5):
        super().__init__(image_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, num_classes,
                         learn_sigma, null_class)
        for block in self.blocks:
            block.attn = LinearAttention(hidden_size, num_heads, self.grid, kernel_size)

    def resize(self, image_size):
        super().resize(image_size)
        for block in self.blocks:
            block.attn.grid = self.grid


MODELS["lit-nano"] = functools.partial(LiT, hidden_size=128, depth=6, num_heads=2, patch_size=4)
# Its number of heads: S and XL as in its ablation; B and L are our reading.
for size, (depth, width, heads) in {"s": (12, 384, 2), "b": (12, 768, 3), "l": (24, 1024, 4),
                                    "xl": (28, 1152, 4)}.items():
    MODELS[f"lit-{size}/2"] = functools.partial(LiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=2)


# ================================================================================================================== FiT
# FiT: Flexible Vision Transformer for Diffusion Model, 2402.12376; FiTv2, 2410.13925. An image is a token sequence of
# any length, not a grid of one size: training keeps every image's aspect ratio, pads sequences to a common length and
# masks the padding; positions enter by 2-D RoPE alone, so that an unseen size is only another table (`layers.ROPE`).
# FiTv2 adds LayerNorm on queries and keys, a smaller SwiGLU, and AdaLN-LoRA: one modulation shared by all blocks plus a
# low-rank one of each, of rank r. A `layers.Layout` says where the tokens of each image stand.


class FiTAttention(Attention):
    """Self-attention with 2-D RoPE and an optional LayerNorm over each head's queries and keys; gain: with weight."""

    def __init__(self, dim, num_heads, qk_norm=False, gain=False):
        check_heads(dim, num_heads, 4)
        super().__init__(dim, num_heads)
        if qk_norm:
            self.q_norm, self.k_norm = (nn.LayerNorm(dim // num_heads, 1e-6, gain, bias=False) for _ in range(2))

    def forward(self, x, rope, layout):
        q, k, v = self.heads(x)
        q, k = rotate(q, *rope).type_as(v), rotate(k, *rope).type_as(v)
        q, k, v = layout.heads(q, k, v)                                                             # (B, h, L, D/h)
        rows = merge_heads(F.scaled_dot_product_attention(q, k, v, layout.mask))                    # (B, L, D)
        return self.proj(layout.unpadded(rows))


class FiTBlock(nn.Module):
    """DiT's block with FiT's attention and SwiGLU. c (B, D); common: the modulation that all blocks share, or 0; rope:
    cos and sin of the tokens' positions."""

    def __init__(self, dim, num_heads, hidden, swiglu, qk_norm, gain, lora_dim):
        super().__init__()
        self.norm1, self.norm2 = plain_norm(dim), plain_norm(dim)
        self.attn = FiTAttention(dim, num_heads, qk_norm, gain)
        self.mlp = SwiGlu(dim, hidden, ("fc1_g", "fc1_x", "fc2"), bias=True) if swiglu else Mlp(dim, hidden)
        linears = [nn.Linear(dim, lora_dim), nn.Linear(lora_dim, 6 * dim)] if lora_dim else [nn.Linear(dim, 6 * dim)]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), *linears)

    def forward(self, x, c, common, rope, layout):
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = layout.modulation(
            self.adaLN_modulation(c) + common, 6)
        h = norm_modulate(x, self.norm1, shift_attn, scale_attn)
        x, h = gate_norm_modulate(x, gate_attn, self.attn(h, rope, layout), self.norm2, shift_mlp, scale_mlp)
        return gated(x, gate_mlp, self.mlp(h))


class FiT(Backbone):
    """A DiT for images of any size and ratio, with 2-D RoPE: FiT, 2402.12376; FiTv2, 2410.13925.

    FiTv2 has qk_norm, lora_dim and mlp_ratio 8/3. Images of any size that the patch divides, in one batch.
    swiglu: False for a GELU MLP. qk_norm: True, False, or "gain" (with a weight). lora_dim: r; 0: each block has a full
    modulation of its own. image_size: int or (H, W), whose number of tokens is L^2, L the trained length of an axis.
    trained: another L. rope: a name in `layers.ROPE`, also after "vision-"; may be set on the model at any time, and so
    may extent, the (h, w) that the scaling is for (None: of each image its own), and time_shift a, which tells the
    network a t/(1 + (a - 1) t) for t in [0, 1]. The published FiTv2 is told t in [0, 1] from noise to data.
    """

    any_size = True
    mixed_sizes = True
    ropes = (*ROPE, *(f"vision-{name}" for name in ROPE if name != "direct"))
    post_trains = "^x_embedder|^final_layer|adaLN|bias$"               # 14% of FiTv2-XL/2. 2410.13925, section 3.4

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=36, num_heads=16,
                 mlp_ratio=8 / 3, num_classes=1000, learn_sigma=False, null_class=True, swiglu=True,
                 qk_norm: bool | str = True, lora_dim=0, rope="direct", trained: float | None = None, theta=10000.0,
                 extent: tuple | None = None, time_shift=1.0):
        super().__init__()
        self.patch_size, self.head_dim = patch_size, hidden_size // num_heads
        self.trained = trained or math.prod(patch_grid(image_size, patch_size)) ** 0.5
        self.rope, self.theta, self.extent, self.time_shift = rope, theta, extent, time_shift
        self.x_embedder = nn.ModuleDict({"proj": nn.Linear(in_channels * patch_size**2, hidden_size)})
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class) if num_classes else None
        self.global_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)) \
            if lora_dim else None
        self.blocks = nn.ModuleList(
            FiTBlock(hidden_size, num_heads, int(hidden_size * mlp_ratio + 1e-6), swiglu, bool(qk_norm),
                     qk_norm == "gain", lora_dim) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))
        adaln_zero(self)

    def forward(self, x, t, y=None, sizes=None):
        """x (B, C, H, W), of which image i fills the upper left sizes[i] = (H_i, W_i), None: all; the output is zero
        elsewhere. Or x a list of (C, H_i, W_i): a list of outputs."""
        if isinstance(x, list):
            x, sizes = canvas(x)
            return cropped(self(x, t, y, sizes), sizes)
        tokens, layout = pack(x, self.patch_size, sizes)            # (B, N, C p p)
        rope = self.positions(layout, x.device)                     # cos and sin, (B, N, D/2h)
        z = self.x_embedder["proj"](tokens)                         # (B, N, D)
        c = self.t_embedder(self.shifted(t))                        # (B, D)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        common = self.global_adaLN_modulation(c) if self.global_adaLN_modulation else 0.0
        for block in self.blocks:
            z = block(z, c, common, rope, layout)                   # (B, N, D)
        return layout.unpack(self.final_layer(z, c, layout))        # (B, C_out, H, W)

    def positions(self, layout, device):
        rope = rope_2d(layout.row, layout.column, self.extent or layout.size, self.head_dim, self.rope, self.trained,
                       self.theta)
        return [layout.unpadded(v.to(device)) for v in rope]

    def shifted(self, t):
        """What the network is told for t: the same, or a t/(1 + (a - 1) t)."""
        if self.time_shift == 1:
            return t
        return (self.time_shift * t / (1 + (self.time_shift - 1) * t)).clamp(max=1)


# FiT, table 1; FiTv2, table 3. Parameters with 1000 classes: 158.7, 823.6; 128.1, 671.0, 2971.9 M.
for name, (depth, width, heads, patch) in {"fit-nano": (6, 128, 4, 4), "fit-b/2": (12, 768, 12, 2),
                                           "fit-xl/2": (28, 1152, 16, 2)}.items():
    MODELS[name] = functools.partial(FiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch,
                                     mlp_ratio=4.0, qk_norm=False)
for name, (depth, width, heads, patch) in {"fitv2-nano": (6, 128, 4, 4), "fitv2-b/2": (15, 768, 12, 2),
                                           "fitv2-xl/2": (36, 1152, 16, 2), "fitv2-3b/2": (40, 2304, 24, 2)}.items():
    MODELS[name] = functools.partial(FiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch,
                                     lora_dim=width // 4)


# ============================================================================================================= Flag-DiT
# Lumina-T2X: Transforming Text into Any Modality, Resolution, and Duration via Flow-based Large Diffusion Transformers,
# 2405.05945. The block of a language model (RMSNorm, rotary positions in one dimension, LayerNorm of queries and keys,
# SwiGLU, no biases) under adaLN-Zero, for every modality: what is to be drawn is one sequence of tokens, in which the
# learned tokens [nextline] after each row and [nextframe] after each frame tell the layout. Text comes in through
# cross-attention inside each self-attention layer, behind a gate of each head that starts at zero. The condition c is
# min(D, 1024) wide.


class FlagAttention(GroupedAttention):
    """Grouped-query self-attention plus tanh(gate) times attention to the text, whose keys have no positions."""

    def __init__(self, dim, num_heads, kv_heads, qk_norm, text_width):
        super().__init__(dim, num_heads, kv_heads, qk_norm)
        if text_width:
            kv = dim // num_heads * kv_heads
            self.wk_y, self.wv_y = nn.Linear(text_width, kv, bias=False), nn.Linear(text_width, kv, bias=False)
            self.ky_norm = nn.LayerNorm(kv) if qk_norm else nn.Identity()
            self.gate = nn.Parameter(torch.zeros(num_heads))

    def forward(self, x, rope, stretch, layout, text=None):
        """stretch (B, 1, 1, 1): factor of the scores of self-attention. text: the normalised `Text`, or None."""
        q, k, v = layout.heads(*self.heads(x, rope))                                                # (B, h, L, D/h)
        rows = self.attend(q * stretch, k, v, layout.mask)                                          # (B, h, L, D/h)
        if text is not None:
            k = split_heads(self.ky_norm(self.wk_y(text.tokens)), self.kv_heads).type_as(q)
            v = split_heads(self.wv_y(text.tokens), self.kv_heads).type_as(q)
            rows = rows + self.gate.tanh()[:, None, None] * self.attend(q, k, v, text.mask[:, None, None])
        return self.wo(layout.unpadded(merge_heads(rows)))


class FlagBlock(nn.Module):
    """Attention and feed-forward, each between adaLN modulation of an RMSNorm and a gate."""

    def __init__(self, dim, num_heads, kv_heads, qk_norm, text_width, multiple_of, multiplier, eps):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.attention = FlagAttention(dim, num_heads, kv_heads, qk_norm, text_width)
        self.feed_forward = SwiGlu(dim, llama_hidden(dim, multiple_of, multiplier), ("w1", "w3", "w2"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, 1024), 6 * dim))
        if text_width:
            self.attention_y_norm = nn.RMSNorm(text_width, eps)

    def forward(self, x, c, rope, stretch, layout, text=None):
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = layout.modulation(
            self.adaLN_modulation(c), 6)
        if text is not None:
            text = Text(self.attention_y_norm(text.tokens), text.mask)
        h = norm_modulate(x, self.attention_norm, shift_attn, scale_attn)
        branch = self.attention(h, rope, stretch, layout, text)
        x, h = gate_norm_modulate(x, gate_attn, branch, self.ffn_norm, shift_mlp, scale_mlp)
        return gated(x, gate_mlp, self.feed_forward(h))


class FlagDiT(Backbone):
    """A language model's transformer that draws images, clips and sounds as one sequence: Lumina-T2X, 2405.05945.

    Images (B, C, H, W), clips or sets of views (B, C, F, H, W), spectrograms (B, C, frames): one token for each p x p
    patch, for a spectrogram one for each of its frames.
    image_size: side, (H, W), (F, H, W) or (frames,) in training, which extrapolation goes by. text_width: of `Text` as
    condition instead of labels. nextline: [nextline] and [nextframe] tokens; by default with text, as published.
    spare_channels: the published read-out's 2C channels, of which the second half is thrown away.
    rope, which may be set on the model at any time: "direct"; "ntk" (base times the number of patches over that of
    training), "pi" (positions over the sequence's length over that of training), "proportional" (scores times
    sqrt(log N/log N trained)), "ntk-proportional". ntk_factor, rope_scaling, base_length: the same as numbers.
    """

    sides = (1, 2, 3)
    any_size = True
    mixed_sizes = True
    ropes = ("direct", "ntk", "pi", "proportional", "ntk-proportional")

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1536, depth=16, num_heads=32,
                 num_kv_heads: int | None = None, multiple_of=256, multiplier: float | None = None, norm_eps=1e-5,
                 qk_norm=True, num_classes=1000, null_class=True, learn_sigma=False, spare_channels=False, text_width=0,
                 text_length=128, nextline: bool | None = None, rope="direct", ntk_factor=1.0, rope_scaling=1.0,
                 base_length: float | None = None):
        super().__init__()
        sides, D, condition = pair(image_size), hidden_size, min(hidden_size, 1024)
        self.patch_size = p = patch_size if len(sides) > 1 else 1
        self.head_dim = D // num_heads
        self.nextline = len(sides) > 1 and (bool(text_width) if nextline is None else nextline)
        self.rope, self.ntk_factor, self.rope_scaling, self.base_length = rope, ntk_factor, rope_scaling, base_length
        self.trained, self.text_width, self.text_length = self.counts(sides), text_width, text_length
        self.null_text = torch.zeros(text_length, text_width) if text_width else None
        self.channels_out = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = nn.Linear(p * p * in_channels, D)
        self.t_embedder = TimestepEmbedder(condition)
        self.y_embedder = LabelEmbedder(num_classes, condition, null_class) if num_classes and not text_width else None
        self.cap_embedder = None
        if text_width:
            self.cap_embedder = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, condition))
        if self.nextline:
            self.eol_token, self.pad_token = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))
            self.eof_token = nn.Parameter(torch.empty(D)) if len(sides) > 2 else None
        self.layers = nn.ModuleList(FlagBlock(D, num_heads, num_kv_heads or num_heads, qk_norm, text_width, multiple_of,
                                              multiplier, norm_eps) for _ in range(depth))
        self.final_layer = FinalLayer(D, p, in_channels * (2 if learn_sigma or spare_channels else 1), condition)
        self.initialise()

    def initialise(self):
        adaln_zero(self)
        # The special tokens start small, and the pooled text says nothing, as its gates in the blocks.
        for name, w in self.named_parameters():
            if name.endswith("_token"):
                nn.init.normal_(w, std=0.02)
        if self.cap_embedder is not None:
            zeroed(self.cap_embedder[1])

    def forward(self, x, t, y=None, sizes=None):
        """x (B, C, *sides), of which sample i fills the upper left sizes[i] (sizes (B, dims), None: all); the output is
        zero elsewhere. Or x a list of (C, *sides): a list of outputs. y: labels (B,), or `Text`."""
        if isinstance(x, list):
            x, sizes = canvas(x)
            return cropped(self(x, t, y, sizes), sizes)
        tokens, layout = pack(x, self.patch_size, sizes, self.nextline, self.nextline and x.ndim == 5)
        rope, stretch = self.positions(layout, x.device)            # cos and sin, (B, N, D/2h)
        z = self.x_embedder(tokens)                                 # (B, N, D)
        if self.nextline:
            z = layout.marked(z, self.eol_token, self.eof_token, self.pad_token)
        c = self.condition(t, y)                                    # (B, min(D, 1024))
        text = y if self.cap_embedder is not None else None
        for layer in self.layers:
            z = layer(z, c, rope, stretch, layout, text)            # (B, N, D)
        z = self.final_layer(z, c, layout)                          # (B, N, p p C_out)
        return layout.unpack(z, channels_last=True)[:, :self.channels_out]                  # (B, C_out, *sides)

    def condition(self, t, y):
        c = self.t_embedder(t)
        if self.cap_embedder is not None:                           # the mean of the text's tokens
            return c + self.cap_embedder((y.tokens * y.mask[..., None]).sum(1) / y.mask.sum(1, keepdim=True))
        return c if self.y_embedder is None else c + self.y_embedder(y)

    def counts(self, sides):
        """(number of patches, length of the sequence) of something with these sides."""
        frames, rows, columns = token_grid(sides, self.patch_size)
        special = rows + (len(sides) > 2) if self.nextline else 0
        return frames * rows * columns, frames * (rows * columns + special)

    def positions(self, layout, device):
        """cos and sin (B, N, D/2h) of the places in the sequence, and the factor (B, 1, 1, 1) of the scores."""
        (patches, length), lengths = self.trained, layout.lengths
        ntk = torch.full_like(layout.patches, self.ntk_factor)
        shrink = torch.full_like(lengths, self.rope_scaling)
        if self.rope.startswith("ntk"):
            ntk = (layout.patches / patches).clamp(min=1)
        if self.rope == "pi":
            shrink = (lengths / length).clamp(min=1)
        base = length if self.rope.endswith("proportional") else self.base_length
        stretch = (lengths.log() / math.log(base)).sqrt() if base else torch.ones_like(lengths)
        i = torch.arange(self.head_dim // 2, dtype=torch.float64) * 2 / self.head_dim
        angle = (torch.arange(int(lengths.max()))[:, None] / shrink[:, None, None]) * (1e4 * ntk[:, None, None]) ** -i
        rope = [layout.unpadded(v.float().to(device)) for v in (angle.cos(), angle.sin())]
        return rope, stretch[:, None, None, None].float().to(device)


MODELS["flag-dit-nano"] = functools.partial(        # reads [nextline] tokens, which the published ones of labels do not
    FlagDiT, depth=6, hidden_size=128, num_heads=4, patch_size=4, multiple_of=32, nextline=True)
MODELS["flag-dit-text-nano"] = functools.partial(
    FlagDiT, depth=6, hidden_size=128, num_heads=4, patch_size=4, multiple_of=32, text_width=128)
for name, (depth, width, text) in {"flag-dit-600m": (16, 1536, 0), "flag-dit-3b": (32, 3072, 0),
                                   "flag-dit-7b": (32, 4096, 0), "flag-dit-text-5b": (32, 3072, 4096)}.items():
    MODELS[name] = functools.partial(FlagDiT, depth=depth, hidden_size=width, text_width=text)


# ============================================================================================================= Registry


def create_model(name, image_size=32, in_channels=3, num_classes=10, **options):
    """A model of the registry by name, with freshly initialised weights.

    image_size: int or (H, W), or as many sides as it draws; num_classes: 0 for none (models of text have none anyway);
    options: any of `options_of(name)`.
    Raises ValueError: unknown name (with the nearest ones), unknown option, a size that the patches do not divide.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 3, 0.3)
        raise ValueError(f"unknown model {name!r}: did you mean {' or '.join(near)}?" if near else
                         f"unknown model {name!r}: `python train.py --list` prints all of them")
    known, own = options_of(name), inspect.signature(MODELS[name]).parameters
    if unknown := [option for option in options if option not in known]:
        near = difflib.get_close_matches(unknown[0], known, 3)
        raise ValueError(f"{name} has no option {unknown[0]!r}: " + (
            f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"))
    facts = {"image_size": image_size, "in_channels": in_channels, "num_classes": num_classes}
    model = MODELS[name](**{fact: value for fact, value in facts.items() if fact in own},
                         **{option: value for option, value in options.items() if option in own})
    return changed(model, **{option: value for option, value in options.items() if option not in own})


def options_of(name):
    """The options of a model of the registry, {name: inspect.Parameter}: of its preset the values are the defaults.
    Those of `changed`, which every model has, come last."""
    facts = "image_size", "in_channels", "num_classes", "model"
    own, common = inspect.signature(MODELS[name]).parameters, inspect.signature(changed).parameters
    return {option: p for option, p in [*own.items(), *((o, p) for o, p in common.items() if o not in own)]
            if option not in facts}


def optimiser_of(name, ternary=False, **options):
    """(--optimiser, --lr) for a model of the registry and its options, where train.py is told neither.

    The small presets (-nano, -pico): Muon at 0.02, measured on shapes, see docs/optimiser.md; ternary weights, which
    learned no better by Muon, AdamW at 3e-3, a rate that is not measured. Published sizes: AdamW at the papers' rates,
    2e-4 for DDPM's U-Net on CIFAR-10 (2006.11239, appendix B), U-ViT (2209.12152) and DiMR (2406.09416), 5e-4 for
    Flag-DiT (2405.05945) and TerDiT (2405.14854), and for all others that of DiT, 1e-4 (2212.09748, section 4).
    """
    small = name.endswith(("-nano", "-pico"))
    if small and (ternary or name.startswith("terdit")):
        return "adamw", 3e-3
    if small:
        return "muon", 0.02
    if name.startswith(("flag-dit", "terdit")):
        return "adamw", 5e-4
    return "adamw", 2e-4 if name.startswith(("unet-cifar", "uvit", "dimr")) else 1e-4


def backbone(name):
    """The class of a model of the registry, whose attributes (`layers.Backbone`) say what it can before it is built; of
    an entry that is a function Backbone itself, with the defaults."""
    entry = MODELS[name]
    entry = entry.func if isinstance(entry, functools.partial) else entry
    return entry if isinstance(entry, type) else Backbone


def changed(model, moe: tuple = (), balance: float | None = None, ternary=False, packed=False):
    """A backbone with its layers changed, in place. -> the model. ValueError if it has no such layers.

    moe: (E, K), every feed-forward network becomes E experts, K of them for each token, as in DiT-MoE; balance: weight
    of the loss that keeps experts equally busy (None: the model's own, 0.01 with experts). ternary: weights of -a, 0 or
    a in all linear layers of the blocks, as in TerDiT; packed: these in two bits each, for inference alone."""
    if moe:
        if len(moe) != 2 or not all(isinstance(number, int) for number in moe):
            raise ValueError(f"moe={moe} takes two numbers, the experts and how many of them a token uses: moe=(8,2)")
        add_experts(model, *moe)
        model.balance = DiTMoE.balance
    if balance is not None:
        model.balance = balance
    if ternary:
        if any(isinstance(m, MoE) for m in model.modules()):
            raise ValueError("ternary knows linear layers only, not stacks of experts: leave out one of the two")
        ternarize(model)
    if packed:
        if not any(isinstance(m, TernaryLinear) for m in model.modules()):
            raise ValueError(f"packed=True is for ternary weights, and this {type(model).__name__} has none")
        replace_ternary(model, PackedLinear)
    return model


def cost(model, shape):
    """(parameters, multiply-accumulates of one image) of a backbone for images of `shape` (C, *sides), see
    `layers.count`."""
    own = next(model.parameters()).dtype

    def empty(*sizes, dtype=own):
        return torch.empty(1, *sizes, dtype=dtype, device="meta")

    y = empty(dtype=torch.long)
    if model.text_width:
        y = Text(empty(model.text_length, model.text_width), empty(model.text_length, dtype=torch.bool))
    return count(model, empty(*shape), empty(), y)


COSTS = Path(__file__).with_name("costs.json")


def counted(name):
    """[parameters, those that a token meets, multiply-accumulates] of a model of the registry for images of 3 x 32 x 32
    and 10 classes, without any weights."""
    with torch.device("meta"):
        model = create_model(name)
    parameters, macs = cost(model, (3, 32, 32))
    return [parameters, activated_parameters(model), macs]


def costs(names):
    """{name: counted(name)}. To count all models takes half a minute: costs.json holds what is known, `python
    models.py` writes it anew, and a test compares."""
    known = json.loads(COSTS.read_text())
    return {name: known.get(name) or counted(name) for name in names}


if __name__ == "__main__":
    lines = [f"  {json.dumps(name)}: {json.dumps(counted(name))}" for name in tqdm(MODELS, desc="counting", delay=2)]
    COSTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{COSTS}: {len(lines)} models")
