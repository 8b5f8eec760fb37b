"""Every denoising backbone, one section each: model(x, t, y) -> prediction.

    x (B, C, H, W)   noisy image            t (B,)   what the process tells the network, about 0 .. 1000
    y (B,) int64     labels 0 .. num_classes, the last being the null label; None for a model without classes;
                     a layers.Text for a model of text
    returns (B, C, H, W), or (B, 2C, H, W) with learned variance

Contents
    DiT       Scalable Diffusion Models with Transformers, 2212.09748
    U-Net     Denoising Diffusion Probabilistic Models, 2006.11239; ADM, 2105.05233
    Registry  names, presets, create_model
"""

import copy
import difflib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    Text,
    TimestepEmbedder,
    gated,
    modulate,
    pair,
    position_table,
    timestep_embedding,
    unpatchify,
)

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
    """adaLN, then the linear read-out of each token's patch: (B, N, D) -> (B, N, p*p*C_out)."""

    def __init__(self, dim, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

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


def create_model(name, image_size=32, in_channels=3, num_classes=10, **overrides):
    """A model of the registry by name, with freshly initialised weights.

    image_size: int or (H, W); num_classes: 0 for none (models of text have none anyway); overrides: any argument of the
    model's class.
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
    classes = {"num_classes": num_classes} if "num_classes" in known else {}
    return model(image_size=image_size, in_channels=in_channels, **classes, **{**preset, **overrides})


def cost(model, shape):
    """(parameters, multiply-accumulates of one image) of model for images of `shape` (C, H, W). Half of what torch's
    own FLOP counter says, which counts a multiply and an add apart; papers on transformers print this number as
    "GFLOPs". Nothing is computed: the count runs on the meta device."""
    model = copy.deepcopy(model).to("meta").eval()
    y = torch.empty(1, dtype=torch.long, device="meta")
    if width := getattr(model, "text_width", 0):
        length = model.text_length
        y = Text(torch.empty(1, length, width, device="meta"), torch.empty(1, length, dtype=torch.bool, device="meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta"), y)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
