"""Every denoising backbone, one section each: model(x, t, y) -> prediction.

    x (B, C, H, W)   noisy image            t (B,)   what the process tells the network, about 0 .. 1000
    y (B,) int64     labels 0 .. num_classes, the last being the null label; None for a model without classes
    returns (B, C, H, W), or (B, 2C, H, W) with learned variance

Contents
    DiT       Scalable Diffusion Models with Transformers, 2212.09748
    U-Net     Denoising Diffusion Probabilistic Models, 2006.11239; ADM, 2105.05233
    DiT-MoE   Scaling Diffusion Transformers to 16 Billion Parameters, 2407.11633
    TerDiT    Ternary Diffusion Models with Transformers, 2405.14854
    T-Stitch  Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching, 2402.14167
    Registry  names, presets, create_model
"""

import copy
import difflib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    SwiGlu,
    TimestepEmbedder,
    gated,
    modulate,
    pair,
    position_table,
    ternarize,
    timestep_embedding,
    unpatchify,
)
from moe import add_experts

# ================================================================================================================== DiT
# Scalable Diffusion Models with Transformers, 2212.09748. The U-Net becomes a plain ViT over patches; timestep and
# class enter each block only as shift, scale and gate, regressed from c = temb(t) + yemb(y) ("adaLN-Zero", section
# 3.2). The gates start at zero, so that every block starts as the identity. N = (H/p)(W/p) tokens, width D.


class DiTBlock(nn.Module):
    """Attention and MLP, each between adaLN modulation and a gate. Figure 3, "DiT Block with adaLN-Zero"."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        x = gated(x, gate_attn, self.attn(modulate(self.norm1(x), shift_attn, scale_attn)))
        return gated(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """adaLN, then the linear read-out of each token's patch: (B, N, D) -> (B, N, p*p*C_out). c (B, condition or D)."""

    def __init__(self, dim, patch_size, out_channels, condition=None):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition or dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer. image_size: int or (H, W), divisible by patch_size. num_classes 0: no labels.
    learn_sigma: 2C output channels, the second half the variance's v. null_class: a table row for the null label."""

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, learn_sigma=False, null_class=True):
        super().__init__()
        self.patch_size, self.grid = patch_size, patch_grid(image_size, patch_size)
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class) if num_classes else None
        self.pos_embed = nn.Parameter(position_table(hidden_size, *self.grid)[None], requires_grad=False)    # (1, N, D)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))
        self.initialise()

    def initialise(self):
        # Linear layers as in ViT: Xavier uniform, the patch embedding on its (D, p*p*C) view.
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        # Embeddings of timestep and label start small.
        tables = [self.y_embedder.embedding_table] if self.y_embedder else []
        for m in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], *tables):
            nn.init.normal_(m.weight, std=0.02)
        # Zero: gates closed (identity blocks), no modulation, output 0.
        modulations = [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
        for m in (*modulations, self.final_layer.linear):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x, t, y=None):
        x = self.x_embedder(x) + self.pos_embed                     # (B, N, D)
        c = self.t_embedder(t)                                      # (B, D)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)                              # (B, D)
        for block in self.blocks:
            x = block(x, c)                                         # (B, N, D)
        x = self.final_layer(x, c)                                  # (B, N, p*p*C_out)
        return unpatchify(x, self.grid, self.patch_size)            # (B, C_out, H, W)


def patch_grid(image_size, patch_size):
    """(rows, columns) of patches; ValueError if the patch does not divide the image."""
    H, W = pair(image_size)
    if H % patch_size or W % patch_size:
        near = "x".join(str(side // patch_size * patch_size or patch_size) for side in (H, W))
        raise ValueError(f"image size {H}x{W} is not divisible by the patch size {patch_size}: try {near}")
    return H // patch_size, W // patch_size


# ================================================================================================================ U-Net
# The convolutional baseline of Denoising Diffusion Probabilistic Models, 2006.11239, appendix B, with ADM's
# improvements (2105.05233, section 3) as options: scale-shift conditioning and resampling inside residual blocks.
# Levels halve the resolution; every encoder output is kept, and each decoder block takes one of them by concatenation.


def group_norm(channels):
    """GroupNorm with the most groups, up to 32 and of at least 4 channels, that divide the width."""
    return nn.GroupNorm(next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0), channels)


def zeroed(layer):
    """The layer with weights and bias zero: its residual branch starts closed."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """norm, SiLU, conv, conditioning, norm, SiLU, dropout, conv (zero), plus the skip.
    (B, C_in, H, W) -> (B, C_out, H', W').

    scale_shift: h = norm(h) (1 + scale) + shift from the embedding (ADM); else it is added before the norm (DDPM).
    resample: None, "down" (average pooling) or "up" (nearest), on both paths, before the first convolution (ADM).
    """

    def __init__(self, in_channels, out_channels, embedding, dropout=0.0, scale_shift=True, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(embedding, out_channels * (2 if scale_shift else 1))
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


class UNet(nn.Module):
    """channels: width of the first level; multipliers: width of each level over it; blocks: residual blocks per level.
    attention: the levels (0 = full resolution) that attend. scale_shift, resblock_updown: ADM's choices; both off is
    DDPM. patch_size: pixels are first folded into channels, p x p at a time (pixel unshuffle), and unfolded at the
    end."""

    def __init__(self, image_size=32, in_channels=3, num_classes=10, channels=128, multipliers=(1, 2, 2, 2), blocks=2,
                 attention=(1,), head_channels=64, dropout=0.0, scale_shift=True, resblock_updown=True,
                 learn_sigma=False, patch_size=1):
        super().__init__()
        levels, self.base, self.patch_size = len(multipliers), channels, patch_size
        patch_grid(image_size, patch_size * 2 ** (levels - 1))
        E = 4 * channels
        self.t_embedder = nn.Sequential(nn.Linear(channels, E), nn.SiLU(), nn.Linear(E, E))
        self.y_embedder = LabelEmbedder(num_classes, E) if num_classes else None
        self.stem = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)

        def res(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, E, dropout, scale_shift, resample)

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

    def forward(self, x, t, y=None):
        c = self.t_embedder(timestep_embedding(t, self.base).to(self.stem.weight.dtype))    # (B, E)
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


# ============================================================================================================== DiT-MoE
# Scaling Diffusion Transformers to 16 Billion Parameters, 2407.11633. DiT whose feed-forward networks are mixtures of
# experts: of E routed SwiGLU experts each token takes K, and all tokens share one more, so that capacity grows and the
# compute of a token does not. A balance loss, which training adds (`moe.balanced`), keeps all experts in use.


class DiTMoE(DiT):
    """DiT with experts. The arguments are DiT's (mlp_ratio: the hidden width of one expert over D), and:

    num_experts, top_k: E and K. shared: hidden width of the shared experts over D. moe_blocks: the blocks with experts
    (None: all), the others keep DiT's MLP; of one half, the deep one is the better choice (section 3.3). qk_norm: the
    attention of the large models. renormalise: see `moe.Router`.
    """

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4, num_classes=1000, learn_sigma=False, null_class=True, num_experts=8, top_k=2, shared=2,
                 moe_blocks=None, qk_norm=False, renormalise=False):
        super().__init__(image_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, num_classes,
                         learn_sigma, null_class)
        add_experts(self, num_experts, top_k, moe_blocks, shared, renormalise)
        if qk_norm:
            for block in self.blocks:
                block.attn = Attention(hidden_size, num_heads, qk_norm=True)
        self.initialise()                              # the new layers too; routers and routed experts drew their own


# =============================================================================================================== TerDiT
# TerDiT: Ternary Diffusion Models with Transformers, 2405.14854. A LLaMA-style DiT (Large-DiT: RMSNorm, rotary
# positions, SwiGLU, no position table) whose blocks' linear layers have weights in {-alpha, 0, alpha}:
# `layers.ternarize` makes them so, and puts an RMSNorm behind each block's adaLN projection, the paper's one change.


def rotate(x, angle):
    """Rotary positions, 2104.09864: x (B, h, N, D/h), whose channels 2i, 2i + 1 of token n turn by angle[n, i], the
    tensor (N, D/2h)."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class GroupedAttention(nn.Module):
    """LLaMA's attention (B, N, D) -> (B, N, D): kv_heads heads of keys and values, each for num_heads/kv_heads heads of
    queries (2305.13245), no biases. qk_norm: LayerNorm over all heads' channels of q and of k, before the rotation."""

    def __init__(self, dim, num_heads, kv_heads, qk_norm):
        super().__init__()
        if dim % num_heads or num_heads % kv_heads or dim // num_heads % 2:
            raise ValueError(f"{num_heads} heads and {kv_heads} key-value heads do not fit a width of {dim}: heads "
                             "must divide the width into even parts, and be a multiple of the key-value heads")
        head = dim // num_heads
        self.num_heads, self.kv_heads = num_heads, kv_heads
        self.wq = nn.Linear(dim, num_heads * head, bias=False)
        self.wk = nn.Linear(dim, kv_heads * head, bias=False)
        self.wv = nn.Linear(dim, kv_heads * head, bias=False)
        self.wo = nn.Linear(num_heads * head, dim, bias=False)
        self.q_norm = nn.LayerNorm(num_heads * head) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(kv_heads * head) if qk_norm else nn.Identity()

    def forward(self, x, angle):
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (z.to(v.dtype).unflatten(-1, (heads, -1)).transpose(1, 2)                           # (B, h, N, D/h)
                   for z, heads in ((q, self.num_heads), (k, self.kv_heads), (v, self.kv_heads)))
        q, k = rotate(q, angle), rotate(k, angle)
        k, v = (z.repeat_interleave(self.num_heads // self.kv_heads, 1) for z in (k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TerDiTBlock(nn.Module):
    """As DiT's block, with RMSNorm, rotary attention and SwiGLU. x (B, N, D), c (B, condition), angle (N, D/2h)."""

    def __init__(self, dim, condition, num_heads, kv_heads, hidden, eps, qk_norm):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.attention = GroupedAttention(dim, num_heads, kv_heads, qk_norm)
        self.feed_forward = SwiGlu(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 6 * dim))

    def forward(self, x, c, angle):
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        x = gated(x, gate_attn, self.attention(modulate(self.attention_norm(x), shift_attn, scale_attn), angle))
        return gated(x, gate_mlp, self.feed_forward(modulate(self.ffn_norm(x), shift_mlp, scale_mlp)))


class TerDiT(nn.Module):
    """kv_heads: of keys and values (None: as many as heads). The hidden width is 8/3 of the model's, times
    ffn_multiplier, rounded up to a multiple of multiple_of. ternary=False: the full-precision Large-DiT. The other
    arguments are DiT's."""

    def __init__(self, image_size=32, patch_size=2, in_channels=4, hidden_size=1536, depth=16, num_heads=32,
                 kv_heads=None, multiple_of=256, ffn_multiplier=None, norm_eps=1e-5, qk_norm=False, num_classes=1000,
                 learn_sigma=False, null_class=True, ternary=True):
        super().__init__()
        D, condition, self.patch_size = hidden_size, min(hidden_size, 1024), patch_size
        self.grid, self.head = patch_grid(image_size, patch_size), D // num_heads
        hidden = int((ffn_multiplier or 1) * int(8 * D / 3))
        hidden = -(-hidden // multiple_of) * multiple_of
        self.x_embedder = PatchEmbed(in_channels, D, patch_size)
        self.t_embedder = TimestepEmbedder(condition)
        self.y_embedder = LabelEmbedder(num_classes, condition, null_class) if num_classes else None
        block = lambda: TerDiTBlock(D, condition, num_heads, kv_heads or num_heads, hidden, norm_eps, qk_norm)
        self.layers = nn.ModuleList(block() for _ in range(depth))
        self.final_layer = FinalLayer(D, patch_size, in_channels * (2 if learn_sigma else 1), condition)
        self.initialise()
        if ternary:
            ternarize(self, norm_eps)

    def initialise(self):
        # Linear layers: Xavier uniform, the patch embedding on its (D, p*p*C) view.
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        # Embeddings of timestep and label start small.
        tables = [self.y_embedder.embedding_table] if self.y_embedder else []
        for m in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], *tables):
            nn.init.normal_(m.weight, std=0.02)
        # Zero: gates closed, no modulation, output 0.
        for m in (*(layer.adaLN_modulation[1] for layer in (*self.layers, self.final_layer)), self.final_layer.linear):
            zeroed(m)

    def forward(self, x, t, y=None):
        x = self.x_embedder(x)                                      # (B, N, D)
        c = self.t_embedder(t)                                      # (B, min(D, 1024))
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        # Positions are one-dimensional: the token's place in row-major order.
        place = torch.arange(x.shape[1], device=x.device, dtype=torch.promote_types(c.dtype, torch.float32))
        period = 10000 ** (torch.arange(0, self.head, 2, device=x.device, dtype=place.dtype) / self.head)
        angle = place[:, None] * (1 / period)                       # (N, D/2h)
        for layer in self.layers:
            x = layer(x, c, angle)                                  # (B, N, D)
        x = self.final_layer(x, c)                                  # (B, N, p*p*C_out)
        return unpatchify(x, self.grid, self.patch_size)            # (B, C_out, H, W)


# ============================================================================================================= T-Stitch
# T-Stitch, 2402.14167: no network, but several trained ones in one trajectory. Denoisers of all sizes agree in the
# noisy first steps, which set layout and low frequencies; so a small model takes these and a large one the rest.


class Stitched(nn.Module):
    """models, the smallest first, in one: model(x, t, y) is the model in whose share of sampling t lies, the first j
    with progress 1 - t/T <= fractions[0] + ... + fractions[j] (the published rule), the last if there is none.

    A threshold on t gives a model its fraction of the steps on a uniform grid only; for other grids see `stitch_steps`.
    T: what the network is told at the noisiest end. nulls: each model's null label, in place of the first one's.
    """

    def __init__(self, models, fractions, T=1000, nulls=None):
        super().__init__()
        if len(fractions) != len(models) or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=0.02):
            raise ValueError(f"stitching {len(models)} models takes as many fractions of the steps, which sum to 1, "
                             f"not {', '.join(f'{f:g}' for f in fractions)}")
        self.models, self.T, self.nulls = nn.ModuleList(models), T, nulls
        self.cumulative = torch.tensor(fractions).cumsum(0)            # float32 as published, where it decides a tie
        self.cumulative[self.cumulative == 0] = -math.inf              # no share, no step

    def choose(self, t):
        """The index of the model for time t (a number)."""
        progress = 1 - torch.as_tensor(t, dtype=torch.float32).cpu() / self.T
        return min(int((self.cumulative < progress).sum()), len(self.models) - 1)

    def forward(self, x, t, y=None):
        j = self.choose(t[0])
        if self.nulls is not None and y is not None:
            y = torch.where(y == self.nulls[0], self.nulls[j], y)
        return self.models[j](x, t, y)


def stitch_steps(steps, fractions):
    """The index of the model at each of so many steps: model j has taken over round(steps * (fractions[0] + ... +
    fractions[j-1])) steps from the start. 2402.14167, section 3.2, for more than two models."""
    total, ends = 0.0, []
    for f in fractions:
        total += f
        ends.append(math.floor(steps * total / sum(fractions) + 0.5))
    return [next(j for j, end in enumerate(ends) if step < end) for step in range(steps)]


# ============================================================================================================= Registry
# name -> (constructor, its arguments). Names and sizes are the papers'; `-nano` trains in minutes on a CPU.

MODELS: dict[str, tuple[type, dict]] = {"dit-nano": (DiT, dict(hidden_size=128, depth=6, num_heads=4, patch_size=4))}
# 2212.09748, table 1.
for size, (depth, width, heads) in {"s": (12, 384, 6), "b": (12, 768, 12),
                                    "l": (24, 1024, 16), "xl": (28, 1152, 16)}.items():
    for patch in (2, 4, 8):
        MODELS[f"dit-{size}/{patch}"] = (DiT, dict(depth=depth, hidden_size=width, num_heads=heads, patch_size=patch))
MODELS["unet-pico"] = (UNet, dict(channels=32, multipliers=(1, 2), blocks=1, attention=(0, 1), head_channels=32,
                                  patch_size=2))
MODELS["unet-nano"] = (UNet, dict(channels=48, multipliers=(1, 2, 2), blocks=1, attention=(1, 2), head_channels=32,
                                  patch_size=2))
# 2006.11239, appendix B: 35.7 M parameters without classes.
MODELS["unet-cifar"] = (UNet, dict(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,), head_channels=256,
                                   dropout=0.1, scale_shift=False, resblock_updown=False))
# 2407.11633, table 1: E experts, K activated.
MODELS["dit-moe-nano"] = (DiTMoE, dict(depth=4, hidden_size=96, num_heads=3, mlp_ratio=2, patch_size=4))
for size, (depth, width, heads, experts) in {"s": (12, 384, 6, (8, 16)), "b": (12, 768, 12, (8,)),
                                             "l": (24, 1024, 16, (8,)), "xl": (28, 1152, 16, (8,)),
                                             "g": (40, 1408, 16, (16,))}.items():
    for E in experts:
        MODELS[f"dit-moe-{size}/2-{E}e2a"] = (DiTMoE, dict(
            depth=depth, hidden_size=width, num_heads=heads, num_experts=E, qk_norm=size in ("l", "xl", "g")))
# 2405.14854: 600M and 4.2B are the paper's, 7b is in its code.
MODELS["terdit-nano"] = (TerDiT, dict(depth=6, hidden_size=128, num_heads=4, multiple_of=32, qk_norm=True,
                                      patch_size=4))
for size, (depth, width) in {"600m": (16, 1536), "4.2b": (32, 3072), "7b": (32, 4096)}.items():
    MODELS[f"terdit-{size}"] = (TerDiT, dict(depth=depth, hidden_size=width))


def create_model(name, image_size=32, in_channels=3, num_classes=10, **overrides):
    """A model of the registry by name, with freshly initialised weights.

    image_size: int or (H, W); num_classes: 0 for none; overrides: any argument of the model's class.
    Raises ValueError: unknown name (with the nearest ones), unknown override, a size that the patches do not divide.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 3, 0.3)
        raise ValueError(f"unknown model {name!r}: did you mean {' or '.join(near)}?" if near else
                         f"unknown model {name!r}: `python train.py --list` prints all of them")
    model, preset = MODELS[name]
    known = model.__init__.__code__.co_varnames[1:model.__init__.__code__.co_argcount]
    if unknown := [k for k in overrides if k not in known]:
        raise ValueError(f"{name} has no option {unknown[0]!r}: choose from {', '.join(known)}")
    return model(image_size=image_size, in_channels=in_channels, num_classes=num_classes, **{**preset, **overrides})


def cost(model, shape):
    """(parameters, multiply-accumulates of one image) of model for images of `shape` (C, H, W). Half of what torch's
    own FLOP counter says, which counts a multiply and an add apart; papers on transformers print this number as
    "GFLOPs". Nothing is computed: the count runs on the meta device."""
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta"),
              torch.empty(1, dtype=torch.long, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
