"""Autoencoders: what turns images into latents or tokens, and back.

    KLAutoencoder  Stable Diffusion's autoencoder (High-Resolution Image Synthesis with Latent Diffusion Models,
                   2112.10752): what DiT and most published models of latents are trained on and drawn with
    KLDecoder      its decoder alone
    ViTok          a plain Vision Transformer as encoder and as decoder (Learnings from Scaling Visual Tokenizers for
                   Reconstruction and Generation, 2501.09755): one number governs it, E = tokens x channels
    VQGAN          the convolutional tokenizer of MaskGIT (2202.04200): images to codes of a learned codebook
    ConvTokenizer  a small one for small images, with a choice of quantiser: VQ, FSQ or LFQ
    Reconstruction what all of them are trained on: squared error, perceptual distance, and a GAN
    TOKENIZERS     the registry: `python train.py --model vitok-nano`
    Latents        a data set encoded once by a tokenizer, into a file that is mapped into memory

Letters beside those of layers.py: p patch size, q frames of a tubelet, L tokens, c channels of a latent, K codes.
"""


import math
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import figures
import metrics
import runs
from layers import count, detached, pair, rotate

# ------------------------------------------------------------------------------------------------------------------- KL


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


class KLDownBlock(nn.Module):
    """Residual blocks, then (but for the last level) a strided convolution, padded on the right and below alone."""

    def __init__(self, in_channels, out_channels, blocks, downsample):
        super().__init__()
        self.resnets = nn.ModuleList(
            KLResBlock(in_channels if k == 0 else out_channels, out_channels) for k in range(blocks))
        self.downsamplers = nn.ModuleList(
            [nn.ModuleDict({"conv": nn.Conv2d(out_channels, out_channels, 3, stride=2)})] if downsample else [])

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        for down in self.downsamplers:
            x = down["conv"](F.pad(x, (0, 1, 0, 1)))
        return x


class KLMiddle(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList(KLResBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([KLAttention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class KLDecoder(nn.Module):
    """Latents (B, 4, h, w), scaled as the diffusion model sees them, -> images (B, 3, 8h, 8w) in about [-1, 1].

    widths: of the levels, from the latents up; blocks: residual blocks a level. latent_scale: the latents' standard
    deviation was brought to 1 by this factor (2112.10752, appendix G; DiT uses 0.18215). quant: the 1x1 convolution
    between latents and decoder, which later autoencoders leave out. Parameters have the names of diffusers'
    `AutoencoderKL`.
    """

    def __init__(self, widths=(512, 512, 256, 128), blocks=3, latent_channels=4, latent_scale=0.18215, quant=True):
        super().__init__()
        self.latent_scale = latent_scale
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant else nn.Identity()
        self.decoder = d = nn.Module()
        d.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        d.mid_block = KLMiddle(widths[0])
        d.up_blocks = nn.ModuleList(
            KLUpBlock(widths[max(0, k - 1)], w, blocks, k < len(widths) - 1) for k, w in enumerate(widths))
        d.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        d.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def decode(self, z):
        """Latents (B, C, h, w) as the autoencoder makes them, not scaled -> images (B, 3, H, W) in about [-1, 1]."""
        d = self.decoder
        x = d.mid_block(d.conv_in(self.post_quant_conv(z)))
        for block in d.up_blocks:
            x = block(x)
        return d.conv_out(F.silu(d.conv_norm_out(x)))

    def forward(self, z):
        return self.decode(z / self.latent_scale)


class KLAutoencoder(KLDecoder):
    """Stable Diffusion's autoencoder: images (B, 3, H, W) in [-1, 1] -> a normal distribution of latents (B, 4, H/8,
    W/8) -> images. The arguments are `KLDecoder`'s; the encoder has one block a level fewer, as published."""

    codes = None                                     # a tokenizer of continuous latents

    def __init__(self, widths=(512, 512, 256, 128), blocks=3, latent_channels=4, latent_scale=0.18215, quant=True):
        super().__init__(widths, blocks, latent_channels, latent_scale, quant)
        self.encoder = e = nn.Module()
        down = widths[::-1]
        e.conv_in = nn.Conv2d(3, down[0], 3, padding=1)
        e.down_blocks = nn.ModuleList(
            KLDownBlock(down[max(0, k - 1)], w, blocks - 1, k < len(down) - 1) for k, w in enumerate(down))
        e.mid_block = KLMiddle(down[-1])
        e.conv_norm_out = nn.GroupNorm(32, down[-1], eps=1e-6)
        e.conv_out = nn.Conv2d(down[-1], 2 * latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if quant else nn.Identity()

    def posterior(self, x):
        """Mean and log variance, (B, C, h, w) each, of the latents of images; not scaled."""
        e = self.encoder
        x = e.conv_in(x)
        for block in e.down_blocks:
            x = block(x)
        x = e.conv_out(F.silu(e.conv_norm_out(e.mid_block(x))))
        mean, log_variance = self.quant_conv(x).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, x, noise=None):
        """Latents of images, not scaled: their mean, or with noise (B, C, h, w) a sample, as DiT is trained on."""
        mean, log_variance = self.posterior(x)
        return mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise

# ---------------------------------------------------------------------------------------------------------------- ViTok
# Learnings from Scaling Visual Tokenizers for Reconstruction and Generation, arXiv 2501.09755. The convolutional
# autoencoder of latent diffusion becomes two plain Transformers, so that encoder, bottleneck and decoder can be scaled
# apart. What they find: reconstruction follows E = L c, the number of floats in the code, almost whatever patch size
# and FLOPs; a bigger encoder does not help; a bigger decoder helps a little, as it is in part a generator.
# As in the published code: LayerNorm and a GELU gate (the paper says Llama's norm and SwiGLU), RoPE over the flattened
# token index (the paper says 3-D).


class ViTokAttention(nn.Module):
    """Multi-head self-attention (B, L, D) -> (B, L, D) with rotary positions; no bias for q, k and v."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)        # (B, h, L, D/h) each
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """fc3(GELU(fc1 x) * fc2 x), with biases: (B, L, D) -> (B, L, D). GLU Variants Improve Transformer, 2002.05202."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(dim, hidden)
        self.fc3 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc1(x)) * self.fc2(x))


class ViTokBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ViTokAttention(dim, num_heads)
        self.mlp = GatedMlp(dim, int(2.67 * dim))

    def forward(self, x, rope):
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class ViTokTransformer(nn.Module):
    """`depth` blocks and a last norm: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim, depth, num_heads):
        super().__init__()
        if dim % num_heads or dim // num_heads % 4:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads of a multiple of 4 channels")
        self.blocks = nn.ModuleList(ViTokBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, rope):
        for block in self.blocks:
            x = block(x, rope)
        return self.norm(x)


def axial_rope(grid, head_dim, kind="1d", theta=10000.0):
    """cos and sin (1, L, head_dim / 2) of the tokens of a grid (frames, rows, columns), for `layers.rotate`.

    "1d": the angle is the flattened index times theta^(-2i/head_dim). "2d": the first half of the pairs turns with the
    column, the second with the row, by theta^(-4i/head_dim). RoFormer, 2104.09864, eq. 34.
    """
    index = torch.arange(math.prod(grid), dtype=torch.float64)[:, None]
    if kind == "1d":
        angle = index * theta ** (-torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    else:
        frequency = theta ** (-torch.arange(head_dim // 4, dtype=torch.float64) * 4 / head_dim)
        angle = torch.cat([index % grid[2] * frequency, index.div(grid[2], rounding_mode="floor") * frequency], 1)
    return angle.cos().float()[None], angle.sin().float()[None]


def sincos_3d(grid, dim):
    """Fixed table (1, L, D) for a grid (frames, rows, columns): [sin t, cos t, sin x, cos x, sin y, cos y], x the
    column, with D/6 frequencies from 1 to exactly 1/10000 (the published code divides by n - 1, not by n)."""
    if dim % 6:
        raise ValueError(f"posemb sincos3d needs a width that is a multiple of 6, not {dim}")
    n = dim // 6
    frequency = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / max(n - 1, 1))
    t, y, x = (place.flatten()[:, None] * frequency for place in torch.meshgrid(
        *(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij"))
    return torch.cat([t.sin(), t.cos(), x.sin(), x.cos(), y.sin(), y.cos()], 1).float()[None]


class ViTok(nn.Module):
    """Images (B, C, H, W) or clips (B, C, F, H, W) in [-1, 1] -> a code of L tokens with c channels each -> the same.

    sides: (H, W) or (F, H, W). Patches are patch_size x patch_size pixels, `tubelet` frames deep. variational: the
    encoder gives a mean and a log-variance. posemb: "nope" (rotary positions alone), "sincos3d" (a fixed table added on
    both sides, the published choice for clips) or "learned". rope: "1d", "2d" or "none". The encoder's width and heads
    are the decoder's unless given: the paper's S-L has a narrow encoder, the published code always one width.
    2501.09755, section 3.
    """

    def __init__(self, sides, in_channels=3, patch_size=16, tubelet=1, width=768, encoder_depth=6, decoder_depth=12,
                 num_heads=12, code_width=16, variational=True, posemb="nope", rope="1d", rope_theta=10000.0,
                 encoder_width=None, encoder_heads=None):
        super().__init__()
        self.grid = self.grid_of(sides, patch_size, tubelet)
        self.code_width, self.variational = code_width, variational
        encoder_width, encoder_heads = encoder_width or width, encoder_heads or num_heads
        size = (tubelet, patch_size, patch_size)
        self.tubelet_embed, self.tubelet_decode = nn.Module(), nn.Module()
        self.tubelet_embed.proj = nn.Conv3d(in_channels, encoder_width, size, size)
        self.encoder = ViTokTransformer(encoder_width, encoder_depth, encoder_heads)
        self.encoder_to_code = nn.Linear(encoder_width, code_width * (2 if variational else 1))
        self.code_to_decoder = nn.Linear(code_width, width)
        self.decoder = ViTokTransformer(width, decoder_depth, num_heads)
        self.tubelet_decode.proj = nn.ConvTranspose3d(width, in_channels, size, size)
        self.posemb = self.position_table(posemb, encoder_width)
        self.dec_posemb = self.position_table(posemb, width)
        if rope not in ("1d", "2d", "none"):
            raise ValueError(f"rope {rope!r}: choose 1d, 2d or none")
        self.has_rope = rope != "none"
        if self.has_rope:
            for name, head_dim in (("enc", encoder_width // encoder_heads), ("dec", width // num_heads)):
                cos, sin = axial_rope(self.grid, head_dim, rope, rope_theta)
                self.register_buffer(f"{name}_cos", cos, persistent=False)
                self.register_buffer(f"{name}_sin", sin, persistent=False)
        self.initialise()

    @staticmethod
    def grid_of(sides, patch_size, tubelet):
        """(frames, rows, columns) of tokens."""
        frames, H, W = sides if len(sides) == 3 else (1, *sides)
        if H % patch_size or W % patch_size or frames % tubelet:
            raise ValueError(f"{frames} frames of {H}x{W} pixels do not divide into tubelets of {tubelet} frames and "
                             f"patches of {patch_size}: choose another patch_size or tubelet")
        return frames // tubelet, H // patch_size, W // patch_size

    def position_table(self, posemb, width):
        if posemb == "nope":
            return None
        if posemb == "sincos3d":
            return nn.Parameter(sincos_3d(self.grid, width), requires_grad=False)
        if posemb == "learned":
            return nn.Parameter(0.025 * torch.randn(1, math.prod(self.grid), width))
        raise ValueError(f"posemb {posemb!r}: choose nope, sincos3d or learned")

    def initialise(self):
        """Linear layers and the patch embedding Xavier uniform, biases zero; the last convolution as PyTorch does."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.tubelet_embed.proj.weight.flatten(1))

    def rope(self, side):
        """cos and sin of the encoder ("enc") or decoder ("dec"), or None."""
        return (getattr(self, f"{side}_cos"), getattr(self, f"{side}_sin")) if self.has_rope else None

    def posterior(self, x):
        """x -> mean and log-variance of the code, (B, L, c) each; the log-variance is None if not variational."""
        clip = x if x.ndim == 5 else x.unsqueeze(2)                                               # (B, C, F, H, W)
        h = self.tubelet_embed.proj(clip).flatten(2).transpose(1, 2)                              # (B, L, D)
        h = h if self.posemb is None else h + self.posemb
        code = self.encoder_to_code(self.encoder(h, self.rope("enc")))                            # (B, L, 2c or c)
        if not self.variational:
            return code, None
        mean, logvar = code.chunk(2, 2)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, z):
        """Code (B, L, c) -> clips (B, C, F, H, W), or images (B, C, H, W) where there is one frame of one tubelet."""
        h = self.code_to_decoder(z)
        h = h if self.dec_posemb is None else h + self.dec_posemb
        h = self.decoder(h, self.rope("dec")).transpose(1, 2).unflatten(2, self.grid)             # (B, D, f, h, w)
        return self.tubelet_decode.proj(h)

    def encode(self, x):
        """x -> the code's mean as a grid: (B, c, h, w), of clips (B, c, f, h, w)."""
        z = self.posterior(x)[0].transpose(1, 2).unflatten(2, self.grid)
        return z if x.ndim == 5 else z.squeeze(2)

    def decode(self, z):
        """The inverse of `encode`: z (B, c, h, w) or (B, c, f, h, w) -> images or clips."""
        x = self.reconstruct(z.flatten(2).transpose(1, 2))
        return x if z.ndim == 5 else x.squeeze(2)

    def forward(self, x, eps):
        """x, eps (B, L, c) standard normal -> reconstruction, terms of the loss, figures for the log."""
        mean, logvar = self.posterior(x)
        if logvar is None:
            z, terms = mean, {}
        else:
            z, terms = mean + (0.5 * logvar).exp() * eps, {"kl": gaussian_kl(mean, logvar).mean()}
        rec = self.reconstruct(z)
        return rec if x.ndim == 5 else rec.squeeze(2), terms


def gaussian_kl(mean, logvar):
    """KL(N(mean, var) || N(0, 1)) of each sample, (B,), as published: the MEAN over tokens and channels, where latent
    diffusion's autoencoders take the sum (and a weight a thousand times smaller)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


# ----------------------------------------------------------------------------------------------------------- quantisers
# quantiser(z (..., d)) -> q (..., d) with gradients straight through, indices (...) int64, {name: auxiliary loss}.
# quantiser.lookup(indices) -> q. K = quantiser.codes of them, d = quantiser.dim channels.


def straight_through(q, z):
    """The value of q with the gradient of z. Estimating or Propagating Gradients Through Stochastic Neurons, 1308.3432.
    """
    return z + (q - z).detach()


class FSQ(nn.Module):
    """Finite Scalar Quantization, 2309.15505: every one of d channels is rounded to one of l_i levels. There is no
    codebook to learn, so none can collapse. q is in [-1, 1]; the first channel's digit runs fastest in an index."""

    def __init__(self, levels=(8, 5, 5, 5)):
        super().__init__()
        levels = torch.tensor(levels)
        self.dim, self.codes = len(levels), int(levels.prod())
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", torch.cat([torch.ones(1, dtype=torch.int64), levels.cumprod(0)[:-1]]),
                             persistent=False)

    def bound(self, z):
        """z squashed into the range of its levels: (l - 1)/2 to each side, shifted by half a step for an even l."""
        half = (self.levels - 1) * (1 - 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half).tan()
        return (z + shift).tanh() * half - offset

    def forward(self, z):
        bounded = self.bound(z)
        digits = bounded.round()
        indices = ((digits.long() + self.levels // 2) * self.basis).sum(-1)
        return straight_through(digits, bounded) / (self.levels // 2), indices, {}

    def lookup(self, indices):
        half = self.levels // 2
        return (indices[..., None] // self.basis % self.levels - half).float() / half


def entropies(logits):
    """Of softmax(logits), (n, K): the mean entropy of a row, and the entropy of the mean row."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum()


class LFQ(nn.Module):
    """Lookup-Free Quantization of MAGVIT-v2, 2310.05737, section 3: the sign of each of log2 K channels, index = sum of
    2^i [z_i > 0]. Auxiliary losses: commitment, and each vector should be sure of its code (low entropy) while all
    codes are used alike (high entropy of the mean).

    A bit is set with probability sigmoid(4 z / temperature), what softmax(-|z - code|^2 / temperature) gives. The
    entropy of the mean is taken over `group` bits at a time, as all 2^18 codes at once would fill the memory.
    """

    def __init__(self, bits=10, temperature=1.0, commitment=0.25, entropy=0.1, group=10):
        super().__init__()
        self.dim, self.codes = bits, 2**bits
        self.temperature, self.commitment, self.entropy, self.group = temperature, commitment, entropy, group
        self.register_buffer("basis", 2 ** torch.arange(bits), persistent=False)

    def forward(self, z):
        q = torch.where(z > 0, 1.0, -1.0)
        indices = ((z > 0) * self.basis).sum(-1)
        if not self.training:
            return q, indices, {}
        certain, used = z.new_zeros(()), z.new_zeros(())
        for bits in z.flatten(0, -2).split(self.group, 1):
            number = torch.arange(2 ** bits.shape[1], device=z.device)[:, None]
            signs = torch.where(number & self.basis[:bits.shape[1]] > 0, 1.0, -1.0)
            row, mean = entropies(2 * bits @ signs.T / self.temperature)        # -|z - code|^2 but for what all share
            certain, used = certain + row, used + mean
        losses = {"commit": self.commitment * F.mse_loss(z, q), "entropy": self.entropy * (certain - used)}
        return straight_through(q, z), indices, losses

    def lookup(self, indices):
        return ((indices[..., None] & self.basis) > 0) * 2.0 - 1


def nearest(z, codebook):
    """Squared distances (n, K) of z (n, d) to the codebook (K, d)."""
    return z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T


class EMACodebook(nn.Module):
    """Vector quantisation of unit vectors (ViT-VQGAN, 2110.04627, section 3.2) with a codebook that follows a moving
    average of the vectors it stands for (VQ-VAE-2, 1906.00446, eq. 2). A code that has been chosen less than `dead`
    times a batch, on average, moves to the vector that its own code serves worst.

    The codebook and its averages are buffers: no gradient trains them. Only the commitment loss reaches the encoder.
    """

    def __init__(self, codes=1024, dim=8, decay=0.99, commitment=0.25, dead=0.05):
        super().__init__()
        self.codes, self.dim, self.decay, self.commitment, self.dead = codes, dim, decay, commitment, dead
        codebook = F.normalize(torch.randn(codes, dim), dim=1)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", codebook.clone())

    def forward(self, z):
        z = F.normalize(z, dim=-1)
        flat = z.flatten(0, -2)
        indices = (flat.detach() @ self.codebook.T).argmax(1)
        q = self.codebook[indices].view(z.shape)
        losses = {}
        if self.training:
            losses["commit"] = self.commitment * F.mse_loss(z, q)
            self.update(flat.detach().float(), indices)
        return straight_through(q, z), indices.view(z.shape[:-1]), losses

    @torch.no_grad()
    def update(self, z, indices):
        """The moving averages of one batch of vectors z (n, d); of several processes, all their batches together."""
        counts = torch.bincount(indices, minlength=self.codes).float()
        sums = torch.zeros_like(self.sums).index_add_(0, indices, z)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = (self.counts < self.dead).nonzero()[:, 0][:len(z)]
        fit = (z * self.codebook[indices]).sum(1)
        self.sums[dead] = z[fit.argsort()[:len(dead)]]
        self.counts[dead] = 1.0
        self.codebook.copy_(F.normalize(self.sums, dim=1))

    def lookup(self, indices):
        return self.codebook[indices]


class EntropyCodebook(nn.Module):
    """The quantiser of MaskGIT's VQGAN: the nearest of K learned vectors, trained by 0.25 |sg(q) - z|^2 + |q - sg(z)|^2
    and 0.1 times an entropy term over softmax(-distance/0.01): every vector should be sure of its code, and all codes
    together used alike. 2202.04200, appendix; loss as in its published code."""

    def __init__(self, codes=1024, dim=256, commitment=0.25, entropy=0.1, temperature=0.01):
        super().__init__()
        self.codes, self.dim = codes, dim
        self.commitment, self.entropy, self.temperature = commitment, entropy, temperature
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z):
        flat = z.flatten(0, -2)
        distance = nearest(flat, self.embedding.weight)
        indices = distance.argmin(1)
        q = self.embedding(indices).view(z.shape)
        losses = {}
        if self.training:
            certain, used = entropies(-distance / self.temperature)
            losses = {"commit": self.commitment * F.mse_loss(z, q.detach()), "codebook": F.mse_loss(q, z.detach()),
                      "entropy": self.entropy * (certain - used)}
        return straight_through(q, z), indices.view(z.shape[:-1]), losses

    def lookup(self, indices):
        return self.embedding(indices)


# ------------------------------------------------------------------------------------------------ discrete tokenizers


class Discrete(nn.Module):
    """What every tokenizer of codes shares: an `encoder` to d channels, a quantiser `quantize`, a `decoder`."""

    @property
    def codes(self):
        """K, the size of the codebook."""
        return self.quantize.codes

    def forward(self, x, eps=None):
        """x (B, C, H, W) -> reconstruction, terms of the loss, with the codes (B, h, w) under "codes"."""
        q, indices, losses = self.quantised(x)
        return self.decoder(q.movedim(-1, 1)), losses | {"codes": indices}

    def quantised(self, x):
        """What the quantiser gives for images, in full precision: in bf16 the nearest code is often another."""
        z = self.encoder(x).movedim(1, -1)
        with torch.autocast("cuda" if z.is_cuda else "cpu", enabled=False):
            return self.quantize(z.float())

    def encode(self, x):
        """Images (B, C, H, W) -> codes (B, h, w) int64 in 0 .. K-1."""
        return self.quantised(x)[1]

    def decode(self, codes):
        """Codes (B, h, w) -> images (B, C, H, W)."""
        return self.decoder(self.quantize.lookup(codes).movedim(-1, 1))


class VQGANBlock(nn.Module):
    """GroupNorm, swish, conv, twice, without biases. Where the width changes, the shortcut reads the block's OUTPUT:
    h + conv(h). The input is lost there; a slip of the published code that its weights depend on."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = None
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class VQGANEncoder(nn.Module):
    """Images (B, C, H, W) -> (B, d, H/f, W/f), f = 2^(levels - 1): residual blocks, halved by averages of 2 x 2."""

    def __init__(self, in_channels, widths, blocks, dim):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        before = widths[0]
        for width in widths:
            level = nn.Module()
            level.block = nn.ModuleList(VQGANBlock(before if k == 0 else width, width) for k in range(blocks))
            self.down.append(level)
            before = width
        self.mid = nn.ModuleList(VQGANBlock(before, before) for _ in range(blocks))
        self.norm_out = nn.GroupNorm(32, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, dim, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for k, level in enumerate(self.down):
            x = F.avg_pool2d(x, 2) if k else x
            for block in level.block:
                x = block(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGANDecoder(nn.Module):
    """The encoder mirrored; doubled by nearest neighbours and a convolution. `up` counts from the finest level."""

    def __init__(self, out_channels, widths, blocks, dim):
        super().__init__()
        before = widths[-1]
        self.conv_in = nn.Conv2d(dim, before, 3, padding=1)
        self.mid = nn.ModuleList(VQGANBlock(before, before) for _ in range(blocks))
        levels = []
        for k, width in reversed(list(enumerate(widths))):
            level = nn.Module()
            level.block = nn.ModuleList(VQGANBlock(before if n == 0 else width, width) for n in range(blocks))
            if k:
                level.upsample_conv = nn.Conv2d(width, width, 3, padding=1)
            levels.insert(0, level)
            before = width
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for k, level in reversed(list(enumerate(self.up))):
            for block in level.block:
                x = block(x)
            if k:
                x = level.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(Discrete):
    """MaskGIT's tokenizer, 2202.04200: images (B, C, H, W) -> codes (B, H/f, W/f) of K and back; no attention.

    Names are those of the converted weights that circulate for PyTorch (maskgit-vqgan-imagenet-f16-256). unit_range:
    the network's own images are in [0, 1], as the published weights want; ours stay in [-1, 1] outside.
    """

    def __init__(self, in_channels=3, filters=128, multipliers=(1, 1, 2, 2, 4), blocks=2, dim=256, codes=1024,
                 unit_range=False):
        super().__init__()
        widths = [filters * m for m in multipliers]
        self.factor, self.unit_range = 2 ** (len(widths) - 1), unit_range
        self.encoder = VQGANEncoder(in_channels, widths, blocks, dim)
        self.decoder = VQGANDecoder(in_channels, widths, blocks, dim)
        self.quantize = EntropyCodebook(codes, dim)

    def forward(self, x, eps=None):
        if not self.unit_range:
            return super().forward(x)
        rec, terms = super().forward((x + 1) / 2)
        return rec * 2 - 1, terms

    def encode(self, x):
        return super().encode((x + 1) / 2 if self.unit_range else x)

    def decode(self, codes):
        x = super().decode(codes)
        return x * 2 - 1 if self.unit_range else x


class ConvTokenizer(Discrete):
    """A tokenizer for small images: (B, C, H, W) -> codes (B, H/f, W/f) and back. Residual blocks at every level,
    attention at the lowest, and a quantiser of choice; its d channels are rounded, so a few layers follow on each side.
    """

    def __init__(self, quantiser, in_channels=3, width=64, multipliers=(1, 2), blocks=2):
        super().__init__()
        widths = [width * m for m in multipliers]
        if any(w % 32 for w in widths):
            raise ValueError(f"the tokenizer's widths {widths} must be multiples of 32, the groups of its norms")
        self.factor = 2 ** (len(widths) - 1)
        down, up = [nn.Conv2d(in_channels, widths[0], 3, padding=1)], []
        before = widths[0]
        for k, w in enumerate(widths):
            down += [nn.Conv2d(before, before, 3, stride=2, padding=1)] if k else []
            down += [KLResBlock(before if n == 0 else w, w) for n in range(blocks)]
            before = w
        for k, w in reversed(list(enumerate(widths))):
            up += [KLResBlock(before if n == 0 else w, w) for n in range(blocks)]
            up += [nn.Upsample(scale_factor=2.0), nn.Conv2d(w, w, 3, padding=1)] if k else []
            before = w
        lowest = widths[-1]
        self.encoder = nn.Sequential(*down, KLAttention(lowest), KLResBlock(lowest, lowest),
                                     nn.GroupNorm(32, lowest), nn.SiLU(), nn.Conv2d(lowest, quantiser.dim, 1))
        self.decoder = nn.Sequential(nn.Conv2d(quantiser.dim, lowest, 3, padding=1), KLAttention(lowest), *up,
                                     nn.GroupNorm(32, before), nn.SiLU(),
                                     nn.Conv2d(before, in_channels, 3, padding=1))
        self.quantize = quantiser


# ------------------------------------------------------------------------------------------------ what they learn from


class Discriminator(nn.Module):
    """Images (B, C, H, W), or clips, frame by frame -> how real each is, (B,): the residual critic of StyleGAN2,
    1912.04958, section 4.1, with the standard deviation over the batch as a last channel."""

    def __init__(self, sides, in_channels=3, width=32, most=512):
        super().__init__()
        H, W = sides[-2:]
        self.enter = nn.Conv2d(in_channels, width, 1)
        self.convs, self.skips = nn.ModuleList(), nn.ModuleList()
        while min(H, W) >= 8:
            wider, H, W = min(2 * width, most), H // 2, W // 2
            self.convs.append(nn.ModuleList([nn.Conv2d(width, width, 3, padding=1),
                                             nn.Conv2d(width, wider, 3, padding=1)]))
            self.skips.append(nn.Conv2d(width, wider, 1, bias=False))
            width = wider
        self.last = nn.Conv2d(width + 1, width, 3, padding=1)
        self.hidden, self.out = nn.Linear(width * H * W, width), nn.Linear(width, 1)

    def forward(self, x):
        if x.ndim == 5:
            x = x.transpose(1, 2).flatten(0, 1)
        x = F.leaky_relu(self.enter(x), 0.2)
        for (first, second), skip in zip(self.convs, self.skips):
            h = F.leaky_relu(second(F.leaky_relu(first(x), 0.2)), 0.2)
            x = (F.avg_pool2d(h, 2) + F.avg_pool2d(skip(x), 2)) / math.sqrt(2)
        spread = x.var(0, unbiased=False).add(1e-8).sqrt().mean().expand(len(x), 1, *x.shape[2:])
        x = F.leaky_relu(self.last(torch.cat([x, spread], 1)), 0.2)
        return self.out(F.leaky_relu(self.hidden(x.flatten(1)), 0.2))[:, 0]


def critic_loss(real, fake, kind="hinge"):
    """What the critic minimises. hinge: 1705.02894; non-saturating: 1406.2661."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake, kind="hinge"):
    """What the decoder minimises."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def feature_distance(classifier, a, b):
    """Perceptual distance of images a, b (B, C, H, W): the squared difference of unit feature vectors, summed over the
    convolutions of a classifier of the data, averaged over pixels. LPIPS (1801.03924, eq. 1) without learned weights,
    for where its own networks are not at hand."""
    distance = 0.0
    for stage in list(classifier.body)[:4]:
        a, b = stage(a), stage(b)
        distance = distance + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
    return distance


def frames_of(x):
    """Clips (B, C, F, H, W) as images (B F, C, H, W); images as they are."""
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


class Reconstruction(nn.Module):
    """The objective of every tokenizer: mean squared error + the network's own terms + perceptual distance + a GAN.

    network: `ViTok` or a `Discrete` one. kl: weight of its KL term. perceptual: weight of LPIPS, if `lpips` names its
    two files, else of `feature_distance` in the data set's own classifier. gan: weight of the GAN's
    term, ramped up from step gan_from to gan_until; critic "hinge" or "non-saturating", r1: weight of its gradient
    penalty (1801.04406). stage 2 of ViTok: encoder and code are frozen, code_to_decoder and what follows learn.
    A preview shows images of the first batch over their reconstructions.
    """
    options, options_help = {}, {}
    starts_fresh = ["discriminator.", "examples"]      # what another run of stage 1 cannot give

    def __init__(self, network, shape, kl=0.0, perceptual=0.0, gan=0.0, gan_from=0, gan_until=1, critic="hinge", r1=0.0,
                 stage=1, lpips=""):
        super().__init__()
        self.network, self.image_shape = network, tuple(shape)
        self.shape = (*shape[:-2], 2 * shape[-2], shape[-1])
        self.kl, self.perceptual, self.stage, self.num_classes = kl, perceptual, stage, 0     # it knows no classes
        self.gan, self.ramp, self.critic, self.r1 = gan, (gan_from, gan_until), critic, r1
        self.lpips = lpips
        if stage not in (1, 2):
            raise ValueError(f"stage {stage}: a tokenizer has stages 1 and 2")
        if stage == 2:
            for name, p in network.named_parameters():
                if name.startswith(("tubelet_embed.", "encoder.", "encoder_to_code.", "posemb")):
                    p.requires_grad_(False)
        self.discriminator = None
        if gan and (stage == 2 or not isinstance(network, ViTok)):
            self.discriminator = Discriminator(shape[1:], shape[0])
            for p in self.discriminator.parameters():
                p.rate = 0.2                          # 2e-5 where the decoder has 1e-4, 2501.09755
        self.register_buffer("examples", torch.full((32, *shape), 128, dtype=torch.uint8))
        if self.codes:                                # steps since each code was last seen
            self.register_buffer("unseen", torch.full((self.codes,), 10**6))

    @property
    def codes(self):
        """K of a discrete tokenizer, else None."""
        return getattr(self.network, "codes", None)

    def encode(self, x):
        """Images (B, C, H, W) -> codes (B, h, w) int64, or latents (B, c, h, w)."""
        return self.network.encode(x)

    def decode(self, z):
        """The inverse of `encode`."""
        return self.network.decode(z)

    def loss(self, batch):
        """batch: x in [-1, 1], step, noise -> {"loss", "mse", "psnr" in dB, and one entry a term}."""
        x, step = batch["x"], batch["step"]
        eps = batch["noise"].normal(math.prod(self.network.grid), self.network.code_width) if self.kl_term else None
        rec, terms = self.network(x, eps)
        mse = F.mse_loss(rec, x)
        losses = {"mse": mse, "psnr": 10 * (4 / mse.detach()).log10()}
        total = mse
        for name, value in terms.items():
            if name == "codes":
                losses |= self.watch_codes(value)
            else:
                losses[name] = value
                total = total + (self.kl * value if name == "kl" else value)
        if self.perceptual:
            name, distance = self.distance(rec, x)
            losses[name] = distance
            total = total + self.perceptual * distance
        if self.discriminator is not None:
            adversarial, critic = self.players(x, rec)
            start, end = self.ramp
            ramp = min(1.0, max(0.0, (step - start) / max(1, end - start)))
            losses |= {"adversarial": adversarial, "critic": critic}
            total = total + self.gan * ramp * adversarial + critic
        if step == 0 and self.training:
            self.keep(x)
        return {"loss": total, **losses}

    forward = loss

    @property
    def kl_term(self):
        return isinstance(self.network, ViTok) and self.network.variational

    def players(self, x, rec):
        """(the decoder's term, the critic's): added, each detached from the other's weights."""
        adversarial = generator_loss(detached(self.discriminator, rec), self.critic)
        real = x.detach().requires_grad_(self.r1 > 0)
        verdict = self.discriminator(real)
        critic = critic_loss(verdict, self.discriminator(rec.detach()), self.critic)
        if self.r1:
            slope, = torch.autograd.grad(verdict.sum(), real, create_graph=True)
            critic = critic + self.r1 / 2 * slope.square().flatten(1).sum(1).mean()
        return adversarial, critic

    def meet(self, dataset):
        """Load what the perceptual distance is measured with, before the first step. It is no part of the state."""
        if not self.perceptual:
            return
        if self.lpips:
            features, _, linear = (part.strip() for part in self.lpips.partition(","))
            if not linear:
                raise ValueError(f"lpips={self.lpips}: give two files, that of the network and that of LPIPS, as "
                                 "lpips=(vgg16-397923af.pth,vgg.pth)")
            network = metrics.load_lpips("alex" if "alex" in linear else "vgg", features, linear)
            if min(dataset.shape[-2:]) < network.least:
                raise ValueError(f"lpips={self.lpips}: that network needs images of at least {network.least} pixels")
        elif dataset.classes:
            network = metrics.judge(dataset, device=self.examples.device)
        else:
            raise ValueError("a perceptual loss needs the files of LPIPS, lpips=(FEATURES,LINEAR), or a data set with "
                             "classes, whose classifier serves instead: choose perceptual=0 to do without")
        self.__dict__["perceiver"] = network.to(self.examples.device).eval().requires_grad_(False)

    def distance(self, rec, x):
        """(the name under which it is logged, the perceptual distance)."""
        rec, x = frames_of(rec), frames_of(x)
        if self.lpips:
            colour = 1 if x.shape[1] == 3 else 3                      # grey images three times
            return "lpips", self.perceiver(rec.tile(1, colour, 1, 1), x.tile(1, colour, 1, 1)).mean()
        return "perceptual_classifier", feature_distance(self.perceiver, rec, x)

    @torch.no_grad()
    def watch_codes(self, codes):
        """{"usage": the share of codes seen in the last 100 steps, "perplexity": of this batch}."""
        count = torch.bincount(codes.flatten(), minlength=self.codes).float()
        if self.training:
            self.unseen.copy_(torch.where(count > 0, 0, self.unseen + 1))
        share = count / count.sum()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        return {"usage": (self.unseen < 100).float().mean(), "perplexity": entropy.exp()}

    @torch.no_grad()
    def keep(self, x):
        """The images that previews show, as bytes."""
        rows = torch.arange(len(self.examples)) % len(x)
        self.examples.copy_((x[rows.to(x.device)] * 127.5 + 128).clamp(0, 255).to(torch.uint8))

    def conditions(self, n):
        """Images to reconstruct, (n, C, H, W) bytes: those of the first batch in turn."""
        return self.examples[torch.arange(n) % len(self.examples)]

    @torch.no_grad()
    def trajectory(self, noise, conditions):
        """One step, of images (n, C, H, W), bytes or in [-1, 1]: originals over reconstructions, (n, C, 2 H, W)."""
        x = conditions.to(self.examples.device)
        x = x if x.is_floating_point() else x.float() / 127.5 - 1
        yield torch.cat([x, self.decode(self.encode(x))], -2)

    def cost(self):
        x = torch.zeros(1, *self.image_shape, device="meta")
        eps = x.new_zeros(1, math.prod(self.network.grid), self.network.code_width) if self.kl_term else None
        return count(self.network, x, eps)


# ------------------------------------------------------------------------------------------------------------ registry


def vitok(image_size, in_channels, patch_size=16, tubelet=1, code_width=16, width=768,
          encoder_depth=6, decoder_depth=12, num_heads=12, encoder_width: int | None = None,
          encoder_heads: int | None = None, variational=True, posemb="nope", rope="1d", stage=1, kl=1e-3,
          perceptual=1.0, gan=1.0, gan_from=5000, gan_until=55000, lpips=""):
    """ViTok: Transformers as encoder and decoder, a code of E = tokens x code_width floats, 2501.09755.

    stage=2 with --start-from RUN: the encoder is frozen, the decoder learns with a GAN."""
    sides = pair(image_size)
    network = ViTok(sides, in_channels, patch_size, tubelet, width, encoder_depth, decoder_depth, num_heads, code_width,
                    variational, posemb, rope, encoder_width=encoder_width, encoder_heads=encoder_heads)
    return Reconstruction(network, (in_channels, *sides), kl if variational else 0.0, perceptual, gan, gan_from,
                          gan_until, stage=stage, lpips=lpips)


def vqgan(image_size, in_channels, codebook=1024, dim=256, width=128, multipliers=(1, 1, 2, 2, 4),
          blocks=2, perceptual=0.1, gan=0.1, r1=10.0, lpips=""):
    """MaskGIT's convolutional tokenizer with a learned codebook, 2202.04200."""
    sides = divisible(image_size, 2 ** (len(multipliers) - 1))
    network = VQGAN(in_channels, width, multipliers, blocks, dim, codebook)
    return Reconstruction(network, (in_channels, *sides), perceptual=perceptual, gan=gan, critic="non-saturating",
                          r1=r1, lpips=lpips)


def convolutional(quantiser, image_size, in_channels, width, multipliers, blocks, perceptual, gan, gan_from, lpips):
    """The objective of a `ConvTokenizer` with this quantiser."""
    sides = divisible(image_size, 2 ** (len(multipliers) - 1))
    network = ConvTokenizer(quantiser, in_channels, width, multipliers, blocks)
    return Reconstruction(network, (in_channels, *sides), perceptual=perceptual, gan=gan, gan_from=gan_from,
                          gan_until=2 * gan_from + 1, lpips=lpips)


def divisible(image_size, factor):
    """(H, W), or ValueError if they cannot be halved often enough."""
    sides = pair(image_size)
    if len(sides) != 2 or any(side % factor for side in sides):
        raise ValueError(f"a convolutional tokenizer of factor {factor} needs images whose sides it divides, not "
                         f"{'x'.join(map(str, sides))}: choose fewer multipliers")
    return sides


def fsq(image_size, in_channels, levels=(8, 5, 5, 5), width=64, multipliers=(1, 2, 2), blocks=2,
        perceptual=0.0, gan=0.0, gan_from=20000, lpips=""):
    """A convolutional tokenizer of rounded scalars, without a codebook to learn: FSQ, 2309.15505."""
    return convolutional(FSQ(levels), image_size, in_channels, width, multipliers, blocks,
                         perceptual, gan, gan_from, lpips)


def vq(image_size, in_channels, codebook=1024, dim=8, width=64, multipliers=(1, 2, 2), blocks=2,
       perceptual=0.0, gan=0.0, gan_from=20000, lpips=""):
    """A convolutional tokenizer with a codebook of unit vectors that follows averages, dead codes reset: VQ-VAE-2."""
    return convolutional(EMACodebook(codebook, dim), image_size, in_channels, width, multipliers,
                         blocks, perceptual, gan, gan_from, lpips)


def lfq(image_size, in_channels, bits=10, width=64, multipliers=(1, 2, 2), blocks=2, perceptual=0.0,
        gan=0.0, gan_from=20000, lpips=""):
    """A convolutional tokenizer of signs: LFQ of MAGVIT-v2, 2310.05737."""
    return convolutional(LFQ(bits), image_size, in_channels, width, multipliers, blocks, perceptual,
                         gan, gan_from, lpips)


VITOK_SIZES = {"s": (768, 6, 12), "b": (768, 12, 12), "l": (1152, 24, 16)}       # width, depth, heads: table 1


def vitok_of(encoder, decoder, patch_size=16, tubelet=1):
    """The preset of an encoder and a decoder of these sizes; clips have a table of positions."""
    (encoder_width, encoder_depth, encoder_heads), (width, depth, heads) = VITOK_SIZES[encoder], VITOK_SIZES[decoder]
    return partial(vitok, patch_size=patch_size, tubelet=tubelet, width=width, encoder_depth=encoder_depth,
                   decoder_depth=depth, num_heads=heads, encoder_width=encoder_width, encoder_heads=encoder_heads,
                   posemb="nope" if tubelet == 1 else "sincos3d")


TOKENIZERS = {
    **{f"vitok-{e}-{d}/16": vitok_of(e, d) for e, d in ("ss", "sb", "sl", "bb", "bl", "ll")},
    "vitok-s-b/8": vitok_of("s", "b", 8), "vitok-s-b/32": vitok_of("s", "b", 32),
    "vitok-s-b/4x8": vitok_of("s", "b", 8, 4), "vitok-s-b/8x8": vitok_of("s", "b", 8, 8),
    "vitok-s-b/4x16": vitok_of("s", "b", 16, 4),
    "vitok-nano": partial(vitok, patch_size=4, code_width=8, width=144, encoder_depth=2, decoder_depth=4, num_heads=6,
                          perceptual=0.0, gan=0.1, gan_from=500, gan_until=2000),
    "vqgan": vqgan, "fsq": fsq, "vq": vq, "lfq": lfq,
    "fsq-nano": partial(fsq, width=32, multipliers=(1, 2), blocks=1),
    "vq-nano": partial(vq, codebook=512, width=32, multipliers=(1, 2), blocks=1),
    "lfq-nano": partial(lfq, bits=9, width=32, multipliers=(1, 2), blocks=1),
}


# -------------------------------------------------------------------------------------------------------------- latents


class Decoder:
    """What stands between an objective on latents or codes and images: its tokenizer, and the scale of its latents. It
    is kept beside the objective, no part of its weights, and its copies share it."""

    def __init__(self, tokenizer, scale):
        self.tokenizer, self.scale = tokenizer, scale

    def __deepcopy__(self, memo):
        return self

    @torch.no_grad()
    def __call__(self, x):
        """Codes (n, h, w), or scaled latents (n, c, h, w) -> images (n, C, H, W)."""
        return self.tokenizer.decode(x if self.tokenizer.codes else x / self.scale)

    @torch.no_grad()
    def encoded(self, x, hole):
        """Images (n, C, H, W) with holes (n, H, W) bool -> codes or scaled latents, of images grey in the holes, and
        which of their cells (n, h, w) a hole touches."""
        z = self.tokenizer.encode(x.masked_fill(hole[:, None], 0.0))
        cells = F.adaptive_max_pool2d(hole[:, None].float(), z.shape[-2:])[:, 0] > 0
        return (z if self.tokenizer.codes else z * self.scale), cells


@dataclass
class Latents(data.Dataset):
    """A data set as a tokenizer sees it: `whole`, a file mapped into memory, holds its latents (N, c, h, w) or codes
    (N, h, w), and where half of the images are mirrored in training those of the mirrored images behind them. Latents
    are multiplied by `scale`, which makes their standard deviation 1. codes: K, or None for latents."""
    whole: np.memmap | None = None
    scale: float = 1.0
    codes: int | None = None

    @property
    def shape(self):
        """(c, h, w); of codes (1, h, w)."""
        return (1, *self.images.shape[1:]) if self.codes else tuple(self.images.shape[1:])

    def gather(self, indices, flips=None):
        """Latents float32 (B, c, h, w), or codes int64 (B, h, w), and labels, as `data.Dataset.gather` has them."""
        indices = torch.as_tensor(indices)
        rows = indices if flips is None else indices + len(self) * torch.as_tensor(flips)
        ordered, back = rows.cpu().unique(return_inverse=True)            # read in file order, which a disk prefers
        x = torch.from_numpy(self.whole[ordered.numpy()])[back].to(self.device)
        return x.long() if self.codes else x.float() * self.scale, self.condition(indices)


def fingerprint(module):
    """A checksum of a module's weights and buffers, eight hexadecimal digits."""
    crc = 0
    for name, value in module.state_dict().items():
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def latents_of(dataset, tokenizer, folder, name, scale=None, batch=64):
    """The `Latents` of a data set. Its images are encoded once, into `folder`/NAME-data-tokenizer.npy (checksums of
    both), which is written under another name until it is whole.

    tokenizer: a module with encode(x) and `codes`. scale: None to measure it, 1 / the standard deviation of up to 4096
    images' latents. ValueError if the file is damaged.
    """
    path = Path(folder) / f"{name}-{dataset.checksum():08x}-{fingerprint(tokenizer)}{'-flips' * dataset.flip}.npy"
    if not path.exists():
        write_latents(dataset, tokenizer, path, batch)
    try:
        whole = np.load(path, mmap_mode="c")                   # never written; torch wants it writable
        if len(whole) != len(dataset) * (2 if dataset.flip else 1):
            raise ValueError(f"{len(whole)} rows")
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:80]
        raise ValueError(f"{path} is damaged or cut short ({reason}): delete it, and the images are encoded again") \
            from None
    if scale is None:
        scale = 1.0 if tokenizer.codes else 1 / float(whole[:4096].astype(np.float64).std())
    return Latents(whole[:len(dataset)], dataset.labels, dataset.classes, dataset.captions, dataset.flip,
                   dataset.device, dataset.files, whole=whole, scale=scale, codes=tokenizer.codes)


@torch.no_grad()
def write_latents(dataset, tokenizer, path, batch):
    """Encode every image, and mirrored ones behind them if the data set flips; float16, or uint16 for codes (int32 for
    more than it counts)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    N, rows = len(dataset), len(dataset) * (1 + dataset.flip)
    kind = np.float16 if not tokenizer.codes else np.uint16 if tokenizer.codes <= 2**16 else np.int32

    def save(partial_path):
        file = None
        for begin in tqdm(range(0, rows, batch), desc="encoding the images", delay=2, leave=False):
            row = torch.arange(begin, min(begin + batch, rows))
            x, _ = dataset.gather(row % N, row >= N)
            z = tokenizer.encode(x).cpu().numpy()
            if file is None:
                file = np.lib.format.open_memmap(partial_path, "w+", kind, (rows, *z.shape[1:]))
            file[begin:begin + len(z)] = z
        file.flush()

    runs.write(path, save)


# ----------------------------------------------------------------------------------------------------------- measuring


def reconstruct_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run of a tokenizer")
    p.add_argument("--n", type=int, default=1000, help="held-out images (default: %(default)s)")
    p.add_argument("--lpips", metavar="FEATURES,LINEAR", help="two files: the network's weights and those of LPIPS")
    p.add_argument("--inception", metavar="FILE", help="weights of the FID's network; without them the Frechet "
                   "distance is in the features of the data set's own classifier")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def reconstruct(args):
    """What a tokenizer loses: PSNR, SSIM, Frechet distance, code usage; originals over reconstructions as a picture."""
    run, tokenizer = args.run, args.run.objective
    if not isinstance(tokenizer, Reconstruction):
        raise ValueError(f"{run.path} is a run of {run.config['network']}, which is no tokenizer")
    dataset = run.data("test")
    n, codes = min(args.n, len(dataset)), []
    if n < 2:
        raise ValueError(f"--n {args.n}: a distance needs at least 2 images")
    network = lpips = None
    if args.inception:
        network = metrics.load_inception(args.inception, run.device)
    elif dataset.classes:
        network = metrics.judge(run.data("train"), run.config["data"].partition(":")[0], device=run.device)
    if args.lpips:
        features, _, linear = args.lpips.partition(",")
        lpips = metrics.load_lpips("alex" if "alex" in linear else "vgg", features, linear).to(run.device)

    def pairs():
        for rows in tqdm(torch.arange(n).split(100), desc="reconstructing", delay=2, leave=False):
            x, _ = dataset.gather(rows)
            with torch.no_grad():
                z = tokenizer.encode(x)
                codes.append(z.cpu())
                yield x, tokenizer.decode(z).clamp(-1, 1)

    result = metrics.reconstruction(pairs(), network, lpips) | code_figures(torch.cat(codes), tokenizer)
    x, _ = dataset.gather(torch.arange(min(16, n)))
    *_, shown = tokenizer.trajectory(None, x)
    figures.save(figures.grid(figures.to_uint8(shown), 8), run.folder / "reconstruct.png")
    for name, value in result.items():
        print(f"{name:32}{value:12,.3f}")
    if network is not None:
        print(f"(rfid: Frechet distance of reconstructions and originals; {network.title})")
    print(f"originals over reconstructions: {run.folder / 'reconstruct.png'}")


def code_figures(z, tokenizer):
    """What codes (n, h, w) or latents (n, c, h, w) cost and how they are used, by name."""
    C, *sides = tokenizer.image_shape
    if not tokenizer.codes:
        floats = z[0].numel()
        return {"E, floats of a code": floats, "values of an image per float": C * math.prod(sides) / floats}
    share = torch.bincount(z.flatten(), minlength=tokenizer.codes) / z.numel()
    bits = z[0].numel() * math.log2(tokenizer.codes)
    perplexity = (-(share * share.clamp(min=1e-12).log()).sum()).exp().item()
    return {"bits a pixel": bits / math.prod(sides), "codes": tokenizer.codes,
            "usage": (share > 0).float().mean().item(), "perplexity": perplexity}
