"""Autoencoders: from images to the latents that latent diffusion works on, and back.

    KLDecoder   decoder of Stable Diffusion's autoencoder (High-Resolution Image Synthesis with Latent Diffusion Models,
                2112.10752): what DiT's published latents are drawn with
"""

import torch.nn.functional as F
from torch import nn


class KLResBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, plus the skip (1x1 where the width changes)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, in_channels, eps=1e-6), nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class KLAttention(nn.Module):
    """Single-head self-attention over the pixels."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]                                    # (B, 1, N, C)
        h = self.to_out[0](F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h[:, 0].transpose(1, 2).reshape(x.shape)


class KLUpBlock(nn.Module):
    """Residual blocks, then (but for the last level) nearest upsampling and a convolution."""

    def __init__(self, in_channels, out_channels, blocks, upsample):
        super().__init__()
        self.resnets = nn.ModuleList(
            KLResBlock(in_channels if k == 0 else out_channels, out_channels) for k in range(blocks))
        self.upsamplers = nn.ModuleList(
            [nn.ModuleDict({"conv": nn.Conv2d(out_channels, out_channels, 3, padding=1)})] if upsample else [])

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        for up in self.upsamplers:
            x = up["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class KLDecoder(nn.Module):
    """Latents (B, 4, h, w), scaled as the diffusion model sees them, -> images (B, 3, 8h, 8w) in about [-1, 1].

    Names are those of the published `AutoencoderKL` files; their encoder is left out. latent_scale: the latents'
    standard deviation was brought to 1 by this factor (2112.10752, appendix G; DiT uses 0.18215).
    """

    def __init__(self, widths=(512, 512, 256, 128), blocks=3, latent_channels=4, latent_scale=0.18215):
        super().__init__()
        self.latent_scale = latent_scale
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = nn.Module()
        self.decoder.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.decoder.mid_block = nn.Module()
        self.decoder.mid_block.resnets = nn.ModuleList(KLResBlock(widths[0], widths[0]) for _ in range(2))
        self.decoder.mid_block.attentions = nn.ModuleList([KLAttention(widths[0])])
        self.decoder.up_blocks = nn.ModuleList(
            KLUpBlock(widths[max(0, k - 1)], w, blocks, k < len(widths) - 1) for k, w in enumerate(widths))
        self.decoder.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.decoder.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        d = self.decoder
        x = d.conv_in(self.post_quant_conv(z / self.latent_scale))
        x = d.mid_block.resnets[1](d.mid_block.attentions[0](d.mid_block.resnets[0](x)))
        for block in d.up_blocks:
            x = block(x)
        return d.conv_out(F.silu(d.conv_norm_out(x)))
