"""Masked generation: an image is a set of tokens, and any of them can be predicted from any others.

To train, hide a random part of the tokens and predict the hidden ones. To draw, start with everything hidden; T times,
predict all hidden tokens at once, keep some, hide the rest again: few at first, many at last. One file, one story:

    what is hidden    how many tokens stay hidden after each step, and which ratio is hidden in training
    who predicts      Embedding, Block ...        the Transformers, with keys and values that can be kept
                      MaskGIT                     MaskGIT: Masked Generative Image Transformer, 2202.04200
                      MaskGITr                    its skip-connected form, in the code of ReCAP
                      MAGE                        MAsked Generative Encoder, 2211.09117
                      MAR, DiffusionHead          Autoregressive Image Generation without Vector Quantization,
                                                  2406.11838
    what is kept      decode, decode_mar          the loops that draw
    what is reused    plan, recap, recap_mar      Plug-and-Play Context Feature Reuse, 2505.19089
    the objectives    Tokens, MAREmbedded ...     what train.py trains and sample.py draws, and the registry

The three models differ in what is hidden from what (MaskGIT: a mask embedding in one Transformer; MAGE and MAR: an
encoder that never sees hidden tokens, a decoder that fills them in), in what chooses the tokens to keep (confidence;
MAR: a random order, fixed in advance), and in the distribution of one token (softmax over a codebook; MAR: a small
diffusion model).

Letters: B batch, N tokens of an image, n tokens of a pass, D width, h heads, K codes, T steps, C channels of a
continuous token, m tokens still hidden, S the targets of a group.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import metrics
import runs
import samplers
from diffusion import create_process
from guidance import guided
from layers import Multiplications, TimestepEmbedder, count, pair

# ------------------------------------------------------------------------------------------------------ what is hidden


def gamma(ratio, schedule="cosine", total=256):
    """The share of `total` tokens that is still hidden when a `ratio` of the steps is done: float64, in [1e-6, 1].

    cosine: cos(pi/2 r); uniform: 1 - r; powP: 1 - r^P, for example pow2.5; log: -log2(r)/log2(total); exp: 1 -
    2^(-log2(total) (1 - r)). A concave one decodes few tokens first, when little is known, and many last. MaskGIT,
    2202.04200, section 3.3.
    """
    bits = torch.as_tensor(total, dtype=torch.float64).log2()
    if schedule == "cosine":
        share = torch.full_like(bits, math.cos(math.pi / 2 * ratio))
    elif schedule == "uniform":
        share = torch.full_like(bits, 1 - ratio)
    elif schedule.startswith("pow") and schedule[3:].replace(".", "", 1).isdigit():
        share = torch.full_like(bits, 1 - ratio ** float(schedule[3:]))
    elif schedule == "log":
        share = -math.log2(max(ratio, 1e-300)) / bits
    elif schedule == "exp":
        share = 1 - torch.exp2(-bits * (1 - ratio))
    else:
        raise ValueError(f"unknown schedule {schedule!r}: choose cosine, uniform, log, exp, or pow and a number")
    return share.clamp(1e-6, 1)


def still_hidden(t, steps, total, left, schedule="cosine"):
    """How many of `total` tokens stay hidden after step t of `steps`, when `left` were hidden before it: floor(total
    gamma), but at least one less than before, and at least one. Integers or tensors (B,). 2202.04200, section 3.2.

    In float64: in float32 floor(256 cos(pi/3)) is 127.
    """
    total, left = torch.as_tensor(total), torch.as_tensor(left)
    planned = (total * gamma((t + 1) / steps, schedule, total)).floor().long()
    return torch.minimum(torch.minimum(left - 1, planned).clamp(min=1), left)


class TruncatedNormal(NamedTuple):
    """The masking ratio of a batch in training: a normal distribution (mean, std) cut to [low, high]."""
    low: float
    high: float
    mean: float
    std: float

    def quantile(self, u):
        """The ratio below which a share u in [0, 1] of the distribution lies."""
        normal = torch.special.ndtr
        ends = torch.tensor([self.low, self.high], dtype=torch.float64)
        below, above = normal((ends - self.mean) / self.std)
        u = torch.as_tensor(u, dtype=torch.float64)
        return (self.mean + self.std * torch.special.ndtri(below + u * (above - below))).clamp(self.low, self.high)

    def of_step(self, step):
        """The ratio of a training step, a float. One for the whole batch, as published, so it is drawn from the number
        of the step alone: micro-batches and processes agree without a word."""
        return self.quantile(np.random.default_rng(step).random()).item()


MAGE_RATIO = TruncatedNormal(0.5, 1.0, 0.55, 0.25)           # 2211.09117, section 3.1
MAR_RATIO = TruncatedNormal(0.7, 1.0, 1.0, 0.25)             # 2406.11838, section 5


def first_of(order, n):
    """The first n entries of each order (B, N) as a mask (B, N) bool."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :n], True)


def picked(x, mask):
    """The rows of x (B, N, ...) where mask (B, N) is true, as many in every sample: (B, n, ...), in raster order."""
    return x[mask].unflatten(0, (len(x), -1))


def take(x, positions):
    """The rows of x (B, N, ...) at positions (B, n): (B, n, ...)."""
    index = positions.view(*positions.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


# --------------------------------------------------------------------------------------------------------- who predicts
# A pass of a network is full (all N tokens) or local (n of them, at `positions` (B, n)). Every pass returns its memory:
# the keys and values of each layer, (B, tokens, h, D/h); a local pass attends to those of other tokens beside its own,
# `past`. That is all that ReCAP needs of a network.


class Attention(nn.Module):
    """Multi-head self-attention (B, n, D) -> (B, n, D), and the keys and values (B, n, h, D/h) of these n tokens."""

    def __init__(self, dim, num_heads, qkv_bias=True, dropout=0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, past=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)                     # (B, n, h, D/h) each
        kept = k, v
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2)), kept


class Mlp(nn.Module):
    """Linear, GELU, dropout, Linear: (B, n, D) -> (B, n, D). gelu: "none", the exact one, or "tanh"."""

    def __init__(self, dim, hidden, gelu="none", dropout=0.0):
        super().__init__()
        self.gelu = gelu
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.fc2(self.drop(F.gelu(self.fc1(x), approximate=self.gelu)))


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)): the pre-norm block of MAGE, MAR and MaskGITr. skip: the block starts
    with a linear map of x and the output of an earlier block, side by side."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, eps=1e-6, qkv_bias=True, dropout=0.0, skip=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias, dropout)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), dropout=dropout)
        self.drop = nn.Dropout(dropout)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, past=None, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], 2))
        attended, kept = self.attn(self.norm1(x), past)
        x = x + self.drop(attended)
        return x + self.drop(self.mlp(self.norm2(x))), kept


class PostNormBlock(nn.Module):
    """LN(x + attention(x)), then LN(x + MLP(x)): the block of BERT, 1810.04805, with its tanh GELU."""

    def __init__(self, dim, num_heads, hidden, dropout):
        super().__init__()
        self.attn = Attention(dim, num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = Mlp(dim, hidden, gelu="tanh")
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, past=None):
        attended, kept = self.attn(x, past)
        x = self.norm1(x + self.drop(attended))
        return self.norm2(x + self.drop(self.mlp(x))), kept


def through(blocks, x, past=None):
    """x through blocks, each with its own past: -> x, memory."""
    memory = []
    for k, block in enumerate(blocks):
        x, kept = block(x, None if past is None else past[k])
        memory.append(kept)
    return x, memory


class Embedding(nn.Module):
    """LN(word + position) of ids (B, n) at positions (B, n), None: 0 .. n-1. -> (B, n, D)"""

    def __init__(self, words, positions, dim, eps=1e-6, dropout=0.0):
        super().__init__()
        self.word_embeddings = nn.Embedding(words, dim)
        self.position_embeddings = nn.Embedding(positions, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=eps)
        self.drop = nn.Dropout(dropout)

    def forward(self, ids, positions=None):
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        return self.drop(self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(positions)))


class WordHead(nn.Module):
    """h (B, n, D) -> logits of all words: LN(GELU(fc h)) times the embedding of each word, and a bias a word."""

    def __init__(self, dim, words, word_dim=None, eps=1e-5, gelu="none"):
        super().__init__()
        self.gelu = gelu
        self.fc = nn.Linear(dim, word_dim or dim)
        self.ln = nn.LayerNorm(word_dim or dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(1, 1, words))

    def forward(self, h, embeddings):
        return self.ln(F.gelu(self.fc(h), approximate=self.gelu)) @ embeddings.T + self.bias


def small_normal(model, std=0.02):
    """Every linear map and embedding normal with this standard deviation, cut at two of them; biases zero."""
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(m.weight, std=std, a=-2 * std, b=2 * std)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)


def xavier_and_normal(model):
    """Linear maps Xavier uniform, biases zero; embeddings and bare tables normal with standard deviation 0.02."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Embedding):
            nn.init.normal_(m.weight, std=0.02)


def spare_vectors(model):
    """Mark biases and gains, which AdamW then does not decay, as MAGE's and MAR's training does."""
    for p in model.parameters():
        if p.ndim <= 1:
            p.no_decay = True


def labels_or_null(y, network, batch):
    """Labels (B,), or where there are none the null label of a network: num_classes."""
    if y is not None:
        return y
    device = next(network.parameters()).device
    return torch.full((batch,), network.num_classes, device=device)


class MaskGIT(nn.Module):
    """Codes (B, N), K where hidden, and labels y (B,) -> logits (B, N, K) of every token: a BERT whose first token is
    the class. 2202.04200, section 3; post-norm, tanh GELU, output tied to the embeddings.

    Words: K codes, the classes (num_classes + `null`, the label of no class, which guidance needs and the published
    model does not have), and last the mask. The published network has 24 layers of width 768 with 16 heads.
    """

    def __init__(self, codes=1024, num_classes=1000, length=256, width=768, depth=24, num_heads=16, hidden=3072,
                 dropout=0.1, null=False):
        super().__init__()
        self.codes, self.num_classes, self.length = codes, num_classes, length
        null = null or num_classes == 0
        self.null = num_classes if null else None
        words = codes + num_classes + null + 1
        self.token_emb = Embedding(words, length + 1, width, eps=1e-12, dropout=dropout)
        self.blocks = nn.ModuleList(PostNormBlock(width, num_heads, hidden, dropout) for _ in range(depth))
        self.mlm_layer = WordHead(width, words, eps=1e-12, gelu="tanh")
        small_normal(self)

    def states(self, tokens, y, positions=None, past=None):
        """-> (B, 1 + n, D), the class token first, and the memory."""
        label = labels_or_null(y, self, len(tokens)) + self.codes
        mask = self.token_emb.word_embeddings.num_embeddings - 1
        ids = torch.cat([label[:, None], torch.where(tokens == self.codes, mask, tokens)], 1)     # (B, 1 + n)
        if positions is not None:
            positions = F.pad(positions + 1, (1, 0))
        return through(self.blocks, self.token_emb(ids, positions), past)

    def words(self, h):
        """Logits of all words, (B, n, V)."""
        return self.mlm_layer(h, self.token_emb.word_embeddings.weight)

    def forward(self, tokens, y=None, positions=None, past=None):
        h, memory = self.states(tokens, y, positions, past)
        return self.words(h[:, 1:])[..., :self.codes], memory

    def hide(self, noise, step):
        """Which tokens are hidden in training, (B, N) bool: a random ceil(gamma(r) N) of them, r uniform, of each
        sample. 2202.04200, section 3.1."""
        ratio = torch.cos(math.pi / 2 * noise.uniform())
        count = (ratio * self.length).ceil().clamp(min=1)
        rank = noise.uniform(self.length).argsort(1).argsort(1)
        return rank < count[:, None]

    def loss(self, tokens, y, hidden):
        """Cross-entropy of the hidden tokens, averaged in each sample, then over samples; labels are smoothed by 0.1
        over the whole vocabulary, as in the published helper."""
        h, _ = self.states(torch.where(hidden, self.codes, tokens), y)
        return per_sample(smoothed(self.words(h[:, 1:]), tokens), hidden)


def smoothed(logits, targets):
    """Cross-entropy (B, N) of logits (B, N, V), a tenth of the label spread over all V."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=0.1)


def per_sample(losses, hidden):
    """The mean over the hidden tokens of each sample, then over samples."""
    return ((losses * hidden).sum(1) / hidden.sum(1)).mean()


class MaskGITr(nn.Module):
    """MaskGIT with long skip connections (U-ViT, 2209.12152), the network that ReCAP was published on: codes (B, N), K
    where hidden, and labels (B,), num_classes for none -> logits (B, N, K).

    Pre-norm blocks without bias for q, k and v: depth/2, one, depth/2, the last of which take the outputs of the first.
    The class token has an embedding of its own. The head's copy of the word embeddings gets no gradient.
    """

    def __init__(self, codes=1024, num_classes=1000, length=256, width=768, depth=24, num_heads=8, dropout=0.0):
        super().__init__()
        self.codes, self.num_classes, self.length, self.null = codes, num_classes, length, num_classes
        self.token_emb = Embedding(codes + 1, length, width)
        self.context_embed = Embedding(num_classes + 1, 1, width)

        def block(skip=False):
            return Block(width, num_heads, eps=1e-5, qkv_bias=False, dropout=dropout, skip=skip)

        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.mlm_layer = WordHead(width, codes + 1)
        small_normal(self)

    def forward(self, tokens, y=None, positions=None, past=None):
        label = labels_or_null(y, self, len(tokens))[:, None]
        x = torch.cat([self.context_embed(label), self.token_emb(tokens, positions)], 1)          # (B, 1 + n, D)
        past = iter(past) if past is not None else None
        memory, skips = [], []
        for block in (*self.in_blocks, self.mid_block, *self.out_blocks):
            skip = skips.pop() if block.skip_linear is not None else None
            x, kept = block(x, None if past is None else next(past), skip)
            memory.append(kept)
            if len(memory) <= len(self.in_blocks):
                skips.append(x)
        words = self.mlm_layer(self.norm(x[:, 1:]), self.token_emb.word_embeddings.weight.detach())
        return words[..., :self.codes], memory

    hide = MaskGIT.hide

    def loss(self, tokens, y, hidden):
        """As `MaskGIT.loss`, over the codes alone."""
        logits, _ = self(torch.where(hidden, self.codes, tokens), y)
        return per_sample(smoothed(logits, tokens), hidden)


class MAGE(nn.Module):
    """Codes (B, N), K where hidden -> logits (B, N, K): an encoder that sees a part of the tokens, as MAE's does, and a
    decoder that fills in the rest, trained at all masking ratios, so that one model represents and generates. It knows
    no classes. 2211.09117, section 3.

    Words: K codes, a fake class (the first token of every sequence), the mask; legacy: the published rows, K + 1001 of
    them, of which the fake class is K + 76 and the mask K + 1000, and 257 positions. detach: the logits, products with
    the words' embeddings, give these no gradient, as published; a narrow network, of which 1,000 such vectors fill the
    few dimensions, then hardly learns. position_std: of the decoder's positions at the start, beside blanks of about 1.
    """
    num_classes, null = 0, None

    def __init__(self, codes=1024, length=256, width=768, depth=12, num_heads=12, decoder_width=None, decoder_depth=8,
                 decoder_heads=16, dropout=0.1, legacy=False, detach=True, position_std=0.02):
        super().__init__()
        decoder_width, self.detach = decoder_width or width, detach
        self.codes, self.length = codes, length
        self.fake_class, self.mask = (codes + 76, codes + 1000) if legacy else (codes, codes + 1)
        words, positions = (codes + 1001, max(257, length + 1)) if legacy else (codes + 2, length + 1)
        self.token_emb = Embedding(words, positions, width, dropout=dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_pos_embed_learned = nn.Parameter(position_std * torch.randn(1, length + 1, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, dropout=dropout) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.mlm_layer = WordHead(decoder_width, words, width)
        xavier_and_normal(self)
        spare_vectors(self)

    def encode(self, tokens, positions=None, past=None, drop=None):
        """-> (B, 1 + n, D), the class token first, and the memory. drop (B, N) bool: these tokens are left out, as many
        in each sample."""
        ids = F.pad(torch.where(tokens == self.codes, self.mask, tokens), (1, 0), value=self.fake_class)
        x = self.token_emb(ids, None if positions is None else F.pad(positions + 1, (1, 0)))
        if drop is not None:
            x = picked(x, F.pad(~drop, (1, 0), value=True))
        x, memory = through(self.blocks, x, past)
        return self.norm(x), memory

    def decode(self, x, hidden, positions=None, past=None, drop=None):
        """The encoder's output x -> (B, 1 + n, decoder width). Every hidden token (B, n) bool starts as the encoded
        class token, which has seen the whole image; MAE has a learned vector there."""
        x = self.decoder_embed(x)
        blank = F.pad(hidden, (1, 0))[..., None]                                                  # (B, 1 + n, 1)
        if drop is not None:
            whole = x[:, :1].expand(-1, blank.shape[1], -1).clone()
            whole[F.pad(~drop, (1, 0), value=True)] = x.flatten(0, 1)
            x = whole
        x = torch.where(blank, x[:, :1], x)
        table = self.decoder_pos_embed_learned
        x = x + (table if positions is None else table[0][F.pad(positions + 1, (1, 0))])
        x, memory = through(self.decoder_blocks, x, past)
        return self.decoder_norm(x), memory

    def words(self, h):
        """Logits of all words."""
        embeddings = self.token_emb.word_embeddings.weight
        return self.mlm_layer(h, embeddings.detach() if self.detach else embeddings)

    def forward(self, tokens, y=None, positions=None, past=None):
        depth = len(self.blocks)
        past = (None, None) if past is None else (past[:depth], past[depth:])
        x, encoder_memory = self.encode(tokens, positions, past[0])
        h, decoder_memory = self.decode(x, tokens == self.codes, positions, past[1])
        return self.words(h[:, 1:])[..., :self.codes], encoder_memory + decoder_memory

    def hide(self, noise, step):
        """Hidden and dropped tokens in training, (B, N) bool each: one masking ratio for the batch, of which the first
        half of all tokens is dropped from the encoder and the others become mask embeddings."""
        return self.hidden_and_dropped(noise.uniform(self.length), MAGE_RATIO.of_step(step), MAGE_RATIO.low)

    @staticmethod
    def hidden_and_dropped(u, ratio, least):
        """The masks of the ceil(N ratio) and of the ceil(N least) smallest of u (B, N); none where least is 0."""
        smallest = u.sort(1).values
        N = u.shape[1]
        hidden = u <= smallest[:, math.ceil(N * ratio) - 1][:, None]
        drop = u <= smallest[:, math.ceil(N * least) - 1][:, None] if least else torch.zeros_like(hidden)
        return hidden, drop

    def loss(self, tokens, y, masks):
        """Cross-entropy, labels smoothed by 0.1 over the codes, averaged over all hidden tokens of the batch."""
        hidden, drop = masks
        x, _ = self.encode(torch.where(hidden, self.codes, tokens), drop=drop)
        h, _ = self.decode(x, hidden, drop=drop)
        losses = smoothed(self.words(h[:, 1:])[..., :self.codes], tokens)
        return (losses * hidden).sum() / hidden.sum()

    def features(self, tokens):
        """What a linear probe reads: the mean of the encoder's output over all tokens but the class token, (B, D)."""
        return self.encode(tokens)[0][:, 1:].mean(1)


class MAR(nn.Module):
    """Continuous tokens (B, N, C), and which are hidden (B, N) bool -> a vector z (B, N, D) of what each token should
    be, from which `head`, a small diffusion model, draws it. 2406.11838, section 3.

    The encoder sees `buffer` copies of the class embedding and the visible tokens; the decoder fills a learned mask
    token in for the hidden ones. channels: C of a token. out_channels of the head: C, or 2C with learned variance.
    """

    def __init__(self, channels=16, num_classes=1000, length=256, width=768, depth=12, num_heads=12, buffer=64,
                 head_depth=6, head_width=1024, out_channels=None, dropout=0.1, decoder_width=None, decoder_depth=None,
                 decoder_heads=None):
        super().__init__()
        decoder_width, decoder_depth = decoder_width or width, decoder_depth or depth
        self.num_classes, self.length, self.channels, self.buffer = num_classes, length, channels, buffer

        def table(*shape):
            return nn.Parameter(0.02 * torch.randn(shape))

        def blocks(dim, count, heads):
            return nn.ModuleList(Block(dim, heads, dropout=dropout) for _ in range(count))

        self.class_emb = nn.Embedding(num_classes, width) if num_classes else None
        self.fake_latent = table(1, width)                                   # the class embedding of no class
        self.z_proj, self.z_proj_ln = nn.Linear(channels, width), nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = table(1, buffer + length, width)
        self.encoder_blocks, self.encoder_norm = blocks(width, depth, num_heads), nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = table(1, 1, decoder_width)
        self.decoder_pos_embed_learned = table(1, buffer + length, decoder_width)
        self.decoder_blocks = blocks(decoder_width, decoder_depth, decoder_heads or num_heads)
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.diffusion_pos_embed_learned = table(1, length, decoder_width)
        xavier_and_normal(self)
        self.head = DiffusionHead(channels, decoder_width, head_width, head_depth, out_channels or channels)
        spare_vectors(self)

    def class_embedding(self, y, drop=None):
        """The class embeddings (B, D) of labels y (B,): of no class where y is num_classes, or drop (B,) is set."""
        nowhere = y == self.num_classes
        if drop is not None:
            nowhere = nowhere | drop
        if self.class_emb is None:
            return self.fake_latent.expand(len(y), -1)
        known = self.class_emb(y.clamp(max=self.num_classes - 1))
        return torch.where(nowhere[:, None], self.fake_latent, known)

    def rows(self, table, positions, buffer):
        """The rows of a table (1, buffer + N, D) for the buffer, if it is in this pass, and the tokens."""
        if positions is None:
            return table if buffer else table[:, self.buffer:]
        front = torch.arange(self.buffer, device=positions.device).expand(len(positions), -1)
        positions = positions + self.buffer
        return table[0][torch.cat([front, positions], 1) if buffer else positions]

    def encode(self, tokens, hidden, c, positions=None, past=None, buffer=True):
        """tokens (B, n, C), hidden (B, n), class embeddings c (B, D) -> (B, buffer + visible, D), and the memory.
        buffer=False: the buffer is not computed again, its keys and values are in `past`."""
        x, visible = self.z_proj(tokens), ~hidden
        if buffer:
            x = torch.cat([c[:, None].expand(-1, self.buffer, -1), x], 1)
            visible = F.pad(visible, (self.buffer, 0), value=True)
        x = self.z_proj_ln(x + self.rows(self.encoder_pos_embed_learned, positions, buffer))
        x, memory = through(self.encoder_blocks, picked(x, visible), past)
        return self.encoder_norm(x), memory

    def decode(self, x, hidden, positions=None, past=None, buffer=True):
        """The encoder's output and hidden (B, n) -> z (B, n, D), and the memory."""
        x, visible = self.decoder_embed(x), ~hidden
        if buffer:
            visible = F.pad(visible, (self.buffer, 0), value=True)
        whole = self.mask_token.to(x.dtype).expand(*visible.shape, -1).clone()
        whole[visible] = x.flatten(0, 1)
        whole = whole + self.rows(self.decoder_pos_embed_learned, positions, buffer)
        x, memory = through(self.decoder_blocks, whole, past)
        x = self.decoder_norm(x)
        x = x[:, self.buffer:] if buffer else x
        table = self.diffusion_pos_embed_learned
        return x + (table if positions is None else table[0][positions]), memory

    def forward(self, tokens, hidden, c, positions=None, past=None, buffer=True):
        """past: a pair, the encoder's and the decoder's. -> z, the pair of this pass."""
        past = (None, None) if past is None else past
        x, encoder_memory = self.encode(tokens, hidden, c, positions, past[0], buffer)
        z, decoder_memory = self.decode(x, hidden, positions, past[1], buffer)
        return z, (encoder_memory, decoder_memory)

    def loss(self, process, tokens, hidden, c, t, eps):
        """The diffusion loss of the hidden tokens, each given z, averaged over them and over as many draws of time and
        noise as t (B, r, N) and eps (B, r, N, C) hold. {name: scalar}. 2406.11838, section 3.2."""
        z, _ = self(tokens, hidden, c)
        chosen = hidden[:, None].expand_as(t)                                                     # (B, r, N)
        z = z[:, None].expand(-1, t.shape[1], -1, -1)[chosen]                                     # (M, D)
        x0 = tokens[:, None].expand_as(eps)[chosen]                                               # (M, C)
        parts = process.loss(self.head, x0, z, t[chosen], eps[chosen])
        return {name: value.mean() for name, value in parts.items()}


class HeadBlock(nn.Module):
    """x + gate * MLP(LN(x) (1 + scale) + shift), each modulation a linear map of SiLU(c); x, c (M, W)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, 1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class HeadOutput(nn.Module):
    """The read-out: LN without weights, modulation, a linear map. x, c (M, W)."""

    def __init__(self, width, channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, channels)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """The denoiser of one token, with the interface of every denoiser: x (M, C) noisy, t (M,), z (M, D) -> (M, C), or
    (M, 2C) with learned variance. It starts as zero. 2406.11838, section 3.2."""

    def __init__(self, channels, condition, width, depth, out_channels):
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = HeadOutput(width, out_channels)
        xavier_and_normal(self)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        closed = [block.adaLN_modulation[1] for block in self.res_blocks]
        for layer in (*closed, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, z):
        c = self.time_embed(t) + self.cond_embed(z)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, c)
        return self.final_layer(x, c)


# --------------------------------------------------------------------------------------------------------- what is kept


def gumbel(u):
    """Gumbel numbers from uniform ones in [0, 1): argmax(logits + Gumbel) is a draw from softmax(logits)."""
    return -(-u.clamp(min=1e-20).log()).log()


class Step(NamedTuple):
    """What there is after a step: tokens, with a guess in every place that is still hidden; which were hidden before
    the step (B, N); the places (B, n) that this step has written for good, where a loop never takes one back."""
    tokens: torch.Tensor
    hidden: torch.Tensor
    written: torch.Tensor | None = None


@torch.no_grad()
def decode(predict, tokens, mask, steps, noise, schedule="cosine", choice=4.5, temperature=1.0) -> Iterator[Step]:
    """Parallel decoding: yields a `Step` after each of `steps`. 2202.04200, section 3.2.

    predict(tokens, t) -> logits (B, N, K) in step t. tokens (B, N) int64: the known ones, and `mask` where one is to be
    drawn; known ones never change. noise(*sizes) -> Gumbel numbers (B, *sizes).
    choice: the noise in the choice of what is kept; 0 keeps the surest, which gives monotone images. temperature: of
    the last step's draws, falling from 1 (ours; the paper's is 1 throughout).
    """
    total = (tokens == mask).sum(1)                                                               # (B,)
    for t in range(steps):
        hidden = tokens == mask
        left = hidden.sum(1)
        logits = predict(tokens, t)
        drawn = (logits / falling(temperature, t, steps) + noise(*logits.shape[1:])).argmax(2)
        guess = torch.where(hidden, drawn, tokens)
        yield Step(guess, hidden)
        # The surest stay. Known tokens are infinitely sure.
        confidence = logits.log_softmax(2).gather(2, guess[..., None])[..., 0]
        confidence = confidence.masked_fill(~hidden, math.inf)
        confidence = confidence + choice * (1 - (t + 1) / steps) * noise(tokens.shape[1])
        rank = confidence.argsort(1).argsort(1)
        m = still_hidden(t, steps, total, left, schedule)
        tokens = torch.where(rank < m[:, None], mask, guess)


def falling(temperature, t, steps):
    """From 1 in the first step to `temperature` in the last, by the root of the step: ReCAP's schedule."""
    return temperature + (1 - math.sqrt(t / max(steps - 1, 1))) * (1 - temperature)


def guided_logits(network, tokens, y, scale=None, positions=None, past=None):
    """Logits and memory of a network of codes, or with guidance c + scale (c - u), the memory of both below each other.
    """
    if scale is None:
        return network(tokens, y, positions, past)
    null = labels_or_null(None, network, len(tokens))
    positions = None if positions is None else positions.repeat(2, 1)
    logits, memory = network(tokens.repeat(2, 1), torch.cat([y, null]), positions, past)
    c, u = logits.chunk(2)
    return c + scale * (c - u), memory


class HeadNoise:
    """Normal numbers for the head of MAR, by place: number k of a token is the same whatever step writes it. normal:
    (*sizes) -> (B, *sizes); drawn when first asked for."""

    def __init__(self, normal, length, channels):
        self.normal, self.sizes, self.numbers = normal, (length, channels), []

    def number(self, k):
        while len(self.numbers) <= k:
            self.numbers.append(self.normal(*self.sizes))
        return self.numbers[k]                                                                    # (B, N, C)

    def at(self, places, temperature=1.0):
        """For tokens at places (B, n): a start (B n, C), and the noise(shape) of a sampler."""
        calls = iter(range(1, 10**9))
        start = take(self.number(0), places).flatten(0, 1)
        return start, lambda shape: temperature * take(self.number(next(calls)), places).flatten(0, 1)


def draw_tokens(head, process, z, places, noise, scale=1.0, temperature=1.0, **how):
    """Tokens (B, n, C) from MAR's head: any process, any sampler. z (B, n, D), or (2B, n, D) with guidance by `scale`:
    below are those of no class. noise: a `HeadNoise`; temperature multiplies that of the steps. how: see
    `samplers.draw`."""
    start, step_noise = noise.at(places, temperature)
    denoise = process.denoiser(head, z[:len(places)].flatten(0, 1))
    if len(z) > len(places):
        denoise = guided(denoise, process.denoiser(head, z[len(places):].flatten(0, 1)), scale)
    for x in samplers.draw(process, denoise, start, noise=step_noise, **how):  # noqa: B007
        pass
    return x.unflatten(0, places.shape)


def guidance_at(guidance, share, schedule="linear"):
    """Guidance when this share of the tokens is decoded: "linear", from 1 (Muse, 2301.00704), or "constant"."""
    if schedule not in ("linear", "constant"):
        raise ValueError(f"guidance_schedule {schedule!r}: choose linear or constant")
    return 1 + (guidance - 1) * share if schedule == "linear" else guidance


def patchify(x, p):
    """Images (B, C, H, W) -> tokens (B, N, C p p), row-major; inside a token the channel runs slowest."""
    return F.unfold(x, p, stride=p).transpose(1, 2)


def unpatchify(tokens, grid, p):
    """The inverse of `patchify`, for a grid of (rows, columns)."""
    return F.fold(tokens.transpose(1, 2), (grid[0] * p, grid[1] * p), p, stride=p)


def hidden_counts(total, steps, schedule="cosine"):
    """How many of `total` tokens are hidden after each step: a list, strictly falling to 0; at most `total` steps. A
    convex schedule, which would have none left too early, is held back so that every step has one to decode."""
    steps, left, counts = min(steps, total), total, []
    for t in range(steps):
        left = max(still_hidden(t, steps, total, left, schedule).item(), steps - 1 - t) if t < steps - 1 else 0
        counts.append(left)
    return counts


# ------------------------------------------------------------------------------------------------------- what is reused
# Between two steps few tokens change, so most features hardly move. ReCAP runs the network in full, keeps the keys and
# values of every layer, and in the next u steps computes only the tokens that are due: they attend to each other and to
# what was kept of the others. 2505.19089. Nothing is trained and no weight changes.


def plan(T, P, u, counts):
    """Groups of steps, each a list of token counts: the first P of the T steps alone, then runs of 1 + u, of which the
    first is a full pass and the others are local. P + ceil((T - P)/(1 + u)) full passes in all."""
    if len(counts) != T or not 0 <= P <= T or u < 0:
        raise ValueError(f"no plan of {T} steps with {len(counts)} counts, the first {P} full and {u} local ones after "
                         "each other: choose full between 0 and the steps, and u of 0 or more")
    groups, k = [], 0
    while k < T:
        size = 1 if k < P else 1 + u
        groups.append(list(counts[k:k + size]))
        k += size
    return groups


def token_counts(total, steps, schedule="pow2.5"):
    """How many of `total` tokens each step writes: the differences of floor(total gamma), at least one; the last step
    writes what is left, and where that is nothing, those before it with more than one give way. At most `total` steps.
    """
    steps = min(steps, total)
    left = [total] + [int((total * gamma(k / steps, schedule, total)).floor()) for k in range(1, steps)]
    counts = [max(1, before - after) for before, after in zip(left, left[1:])]
    last = total - sum(counts)
    for k in reversed(range(steps - 1)):
        given = min(max(0, 1 - last), counts[k] - 1)
        counts[k], last = counts[k] - given, last + given
    return [*counts, last]


def outside(memory, positions, front, keep_front=False):
    """What a local pass at positions (B, n) may use of a full pass's memory: the other tokens' keys and values. The
    targets' own would else be seen twice, stale beside fresh. front: leading tokens that are no image tokens (class,
    buffer), which stay if the local pass does not compute them again."""
    others = torch.ones(len(positions), memory[0][0].shape[1] - front, dtype=torch.bool, device=positions.device)
    mask = F.pad(others.scatter_(1, positions, False), (front, 0), value=keep_front)
    return [(picked(k, mask), picked(v, mask)) for k, v in memory]


@torch.no_grad()
def recap(network, tokens, y, groups, noise, choice=5.5, temperature=0.7, scales=None) -> Iterator[Step]:
    """ReCAP's decoding with a network of codes: yields a `Step` after each of the T steps in `groups` (see `plan`).

    tokens (B, N), K where one is to be drawn, as many in each sample as the groups write. A group's targets S are those
    of which the full pass is surest; they are written surest first, each once. noise(*sizes): Gumbel numbers (B,
    *sizes). choice, temperature: at first full noise in the choice and temperature 1, falling to 0 and `temperature`.
    scales: of guidance, one a step: logits = c + s (c - u). 2505.19089, algorithm 1; order of writing, and the scale
    that a local pass takes from the step before, as in the published code.
    """
    N, K = tokens.shape[1], network.codes
    steps, step = sum(len(group) for group in groups), 0

    def evaluate(tokens, step, positions=None, past=None):
        return guided_logits(network, tokens, y, scales and scales[step], positions, past)

    for g, group in enumerate(groups):
        hidden = tokens == K
        logits, memory = evaluate(tokens, step)
        guess = (logits + noise(N, K)).argmax(2)
        confidence = logits.log_softmax(2).gather(2, guess[..., None])[..., 0].masked_fill(~hidden, -math.inf)
        confidence = confidence + choice * (1 - (g + 1) / len(groups)) * noise(N)
        targets = confidence.argsort(1, descending=True)[:, :sum(group)]                          # S, (B, n)
        logits, done = take(logits, targets), 0
        past = outside(memory, targets if scales is None else targets.repeat(2, 1), front=1) if len(group) > 1 else None
        for j, size in enumerate(group):
            if j:
                logits, _ = evaluate(take(tokens, targets), step - 1, targets, past)
            new = slice(done, done + size)
            numbers = take(noise(N, K), targets[:, new])
            drawn = (logits[:, new] / falling(temperature, step, steps) + numbers).argmax(2)
            tokens = tokens.scatter(1, targets[:, new], drawn)
            done, step = done + size, step + 1
            yield Step(torch.where(tokens == K, guess, tokens), hidden, targets[:, new])


@torch.no_grad()
def decode_mar(network, draw, tokens, hidden, c, order, groups, cache_buffer=False) -> Iterator[Step]:
    """MAR's generation, with ReCAP where a group has more than one step: yields a `Step` after each. 2406.11838,
    section 4.2; 2505.19089.

    tokens (B, N, C), hidden (B, N) bool, as many in each sample as the groups write; order (B, N): hidden tokens first,
    of which the LAST are written first. c: class embeddings (B, D), or with guidance (2B, D), those of no class below.
    draw(z, places, step, fast) -> tokens (B, n, C) for z (B or 2B, n, D); fast: in local passes. cache_buffer: the
    buffer is not computed again in local passes. Inside a group tokens are written in raster order, as published.
    """
    copies, left, step = len(c) // len(tokens), int(hidden[0].sum()), 0

    def evaluate(tokens, hidden, *rest, **options):
        return network(tokens.repeat(copies, 1, 1), hidden.repeat(copies, 1), c, *rest, **options)

    for group in groups:
        z, (encoder, decoder) = evaluate(tokens, hidden)
        left -= sum(group)
        targets = (hidden & ~first_of(order, left)).nonzero()[:, 1].view(len(tokens), -1)         # S, (B, n)
        positions = targets.repeat(copies, 1)
        z, done = take(z, positions), 0
        if len(group) > 1:                             # the encoder has not seen S yet, so its memory needs no cut
            front = 0 if cache_buffer else network.buffer
            past = [(k[:, front:], v[:, front:]) for k, v in encoder], outside(decoder, positions, network.buffer,
                                                                               cache_buffer)
        for j, size in enumerate(group):
            if j:
                z, _ = evaluate(take(tokens, targets), take(hidden, targets), positions, past, buffer=not cache_buffer)
            new, before = slice(done, done + size), hidden
            drawn = draw(z[:, new], targets[:, new], step, fast=j > 0)
            index = targets[:, new, None].expand_as(drawn)
            tokens = tokens.scatter(1, index, drawn.to(tokens.dtype))
            hidden = hidden.scatter(1, targets[:, new], False)
            done, step = done + size, step + 1
            yield Step(tokens, before, targets[:, new])


def reuse_of(text, steps):
    """ReCAP's "u=1,full=12" -> (u, P): local steps after each full one, and full steps at the start (half of all of
    them, unless said). Raises ValueError."""
    given = {"u": 1, "full": steps // 2}
    for piece in filter(None, text.split(",")):
        name, _, value = piece.partition("=")
        if name not in given or not value.isdigit():
            raise ValueError(f"recap {text!r}: give u, the local steps after each full one, and full, the full steps "
                             "at the start, such as u=1,full=12")
        given[name] = int(value)
    if given["full"] > steps:
        raise ValueError(f"recap {text!r}: there are only {steps} steps")
    return given["u"], given["full"]


# ------------------------------------------------------------------------------------------------------ the objectives


class Codes(nn.Module):
    """The objective of a network of codes: train on hidden ones, draw by parallel decoding.

    grid: (rows, columns) of codes in an image. label_drop: the share of labels that become the null label in training,
    which guidance needs.
    """

    options_help = {
        "steps": "decoding steps", "schedule": "of what stays hidden: cosine, uniform, log, exp, powP such as pow2.5",
        "choice": "noise in the choice of the tokens to keep; 0 keeps the surest and gives monotone images",
        "temperature": "of the draws in the last step, falling from 1 in the first",
        "guidance": "classifier-free guidance, 1 for none", "guidance_schedule": "linear (from 1 up) or constant",
        "recap": "u=1,full=12: after 12 full steps, one local step after each full one (ReCAP)"}

    def __init__(self, network, grid, label_drop=0.0, **options):
        super().__init__()
        self.network, self.grid, self.label_drop = network, tuple(grid), label_drop
        self.shape, self.num_classes, self.codes_read = (1, *grid), network.num_classes, network.codes
        self.options = {"steps": 12, "schedule": "cosine", "choice": 4.5, "temperature": 1.0, "guidance": 1.0,
                        "guidance_schedule": "linear", "recap": ""} | options

    def loss(self, batch):
        """batch: x codes (B, rows, columns) int64, y labels (B,), step, noise -> {"loss": scalar}."""
        noise, y = batch["noise"], None
        if self.network.num_classes:
            y = batch["y"]
            if self.label_drop:
                y = torch.where(noise.uniform() < self.label_drop, self.network.null, y)
        masks = self.network.hide(noise, batch["step"])
        return {"loss": self.network.loss(batch["x"].flatten(1), y, masks)}

    forward = loss

    def conditions(self, n):
        """Labels in turn, or None where the network knows none."""
        return torch.arange(n) % self.network.num_classes if self.network.num_classes else None

    def trajectory(self, noise, conditions, **options) -> Iterator[torch.Tensor]:
        """Codes (n, rows, columns) after each step; hidden ones are guessed."""
        device = next(self.parameters()).device
        tokens = torch.full((len(noise), self.network.length), self.network.codes, device=device)
        yield from self.decoded(noise, tokens, conditions, **options)

    def fill(self, noise, x, mask, conditions, **options) -> Iterator[torch.Tensor]:
        """As `trajectory`, from known codes x (n, rows, columns) but where mask (n, rows, columns) is true."""
        tokens = torch.where(mask, self.network.codes, x).flatten(1)
        yield from self.decoded(noise, tokens, conditions, **options)

    def decoded(self, noise, tokens, y, **options):
        o = self.options | options
        network, hidden = self.network, (tokens == self.network.codes).sum(1)
        if o["guidance"] != 1 and (network.null is None or not network.num_classes):
            raise ValueError("guidance needs a network that knows classes and their absence (label_drop above 0)")
        total = int(hidden.max())
        steps, N = min(o["steps"], total), network.length
        numbers = lambda *sizes: gumbel(noise.uniform(*sizes))
        scales = None
        if o["guidance"] != 1:
            shares = [1 - m / N for m in hidden_counts(total, steps, o["schedule"])]
            scales = [guidance_at(o["guidance"], share, o["guidance_schedule"]) - 1 for share in shares]
        if o["recap"]:
            if (hidden != total).any():
                raise ValueError("recap fills the same number of places in every image: give masks of one size")
            u, P = reuse_of(o["recap"], steps)
            groups = plan(steps, P, u, token_counts(total, steps, o["schedule"]))
            walk = recap(network, tokens, y, groups, numbers, o["choice"], o["temperature"], scales)
        else:
            def predict(tokens, t):
                return guided_logits(network, tokens, y, scales and scales[t])[0]

            walk = decode(predict, tokens, network.codes, steps, numbers, o["schedule"], o["choice"], o["temperature"])
        for step in walk:
            yield step.tokens.view(-1, *self.grid)

    def cost(self):
        tokens = torch.zeros(1, self.network.length, dtype=torch.int64, device="meta")
        return count(self.network, tokens, tokens[:, 0])


class Continuous(nn.Module):
    """MAR's objective: train the network and its head by the head's diffusion loss, draw token by token.

    shape: (C, rows, columns) of an image or its latents, cut into patches of patch_size. repeats: how many times and
    noises each token is trained on in a step (2406.11838, section 3.2: sampling t is cheap beside computing z).
    """

    options_help = {
        "steps": "decoding steps", "schedule": "of what stays hidden: cosine, uniform, log, exp, powP such as pow2.5",
        "guidance": "classifier-free guidance of the head, 1 for none",
        "guidance_schedule": "linear (from 1 up) or constant",
        "temperature": "multiplies the noise of the head's steps",
        "sampler": "of the head", "grid": "of its times (none: the process's own)", "head_steps": "its steps",
        "recap": "u=1,full=12: after 12 full steps, one local step after each full one (ReCAP)",
        "recap_head": "the share of head_steps that the head takes in local steps",
        "cache_buffer": "local steps reuse the class tokens' keys and values too"}

    def __init__(self, network, process, shape, patch_size=1, label_drop=0.1, repeats=4, **options):
        super().__init__()
        self.network, self.process, self.shape, self.patch_size = network, process, tuple(shape), patch_size
        self.label_drop, self.repeats, self.num_classes = label_drop, repeats, network.num_classes
        self.grid = shape[1] // patch_size, shape[2] // patch_size
        self.options = {"steps": 64, "schedule": "cosine", "guidance": 1.0, "guidance_schedule": "linear",
                        "temperature": 1.0, "sampler": "ddpm", "grid": None, "head_steps": 100, "recap": "",
                        "recap_head": 0.4, "cache_buffer": False} | options

    def loss(self, batch):
        """batch: x (B, C, H, W), y labels (B,), step, noise -> {"loss": scalar, "mse": ...}."""
        x, noise, network = batch["x"], batch["noise"], self.network
        N, r = network.length, self.repeats
        y = batch["y"] if network.num_classes else torch.zeros(len(x), dtype=torch.int64, device=x.device)
        c = network.class_embedding(y, noise.uniform() < self.label_drop)
        hidden = first_of(noise.uniform(N).argsort(1), math.ceil(N * MAR_RATIO.of_step(batch["step"])))
        t = self.process.training_times(noise.uniform(r, N))
        eps = noise.normal(r, N, network.channels)
        return network.loss(self.process, patchify(x, self.patch_size), hidden, c, t, eps)

    forward = loss
    conditions = Codes.conditions

    def trajectory(self, noise, conditions, **options) -> Iterator[torch.Tensor]:
        """Images (n, C, H, W) after each step, 0 where tokens are hidden."""
        x = torch.zeros(len(noise), *self.shape, device=next(self.parameters()).device)
        hidden = torch.ones(len(noise), self.network.length, dtype=torch.bool, device=x.device)
        yield from self.decoded(noise, x, hidden, conditions, **options)

    def fill(self, noise, x, mask, conditions, **options) -> Iterator[torch.Tensor]:
        """As `trajectory`, from a known image x (n, C, H, W) but for the tokens that mask (n, H, W) touches, as many in
        each."""
        hidden = F.max_pool2d(mask[:, None].float(), self.patch_size).flatten(1) > 0
        yield from self.decoded(noise, x, hidden, conditions, **options)

    def decoded(self, noise, x, hidden, y, **options):
        o, network, process = self.options | options, self.network, self.process
        total, n = int(hidden[0].sum()), len(x)
        if (hidden.sum(1) != total).any():
            raise ValueError("the masks hide different numbers of tokens: fill them one by one")
        steps, N = min(o["steps"], total), network.length
        left = hidden_counts(total, steps, o["schedule"])
        counts = [before - after for before, after in zip([total, *left], left)]
        u, P = reuse_of(o["recap"], steps) if o["recap"] else (0, steps)
        # Without reuse one token counts as hidden in the last step: guidance ends just below its value, as published.
        shares = [1 - max(m, 0 if o["recap"] else 1) / N for m in left]
        scales = [guidance_at(o["guidance"], share, o["guidance_schedule"]) for share in shares]
        numbers = HeadNoise(noise.normal, N, network.channels)
        quick = max(1, round(o["recap_head"] * o["head_steps"]))

        def draw(z, places, step, fast):
            return draw_tokens(network.head, process, z, places, numbers, scales[step], o["temperature"],
                               sampler=o["sampler"], steps=quick if fast else o["head_steps"], grid=o["grid"])

        y = torch.full((n,), network.num_classes, device=x.device) if y is None else y
        with torch.no_grad():
            c = network.class_embedding(y)
            if o["guidance"] != 1:
                c = torch.cat([c, network.class_embedding(torch.full_like(y, network.num_classes))])
        order = (noise.uniform(N) - hidden.float()).argsort(1)                    # what is hidden comes first
        tokens = patchify(x, self.patch_size).masked_fill(hidden[..., None], 0.0)
        for step in decode_mar(network, draw, tokens, hidden, c, order, plan(steps, P, u, counts), o["cache_buffer"]):
            yield unpatchify(step.tokens, self.grid, self.patch_size)

    def cost(self):
        """With the median share of tokens hidden; the head counts on each of them, `repeats` times."""
        network, N = self.network, self.network.length
        hidden = round(MAR_RATIO.quantile(0.5).item() * N)
        D, width = network.fake_latent.shape[1], network.diffusion_pos_embed_learned.shape[2]
        macs = 0
        for blocks, tokens, dim in ((network.encoder_blocks, N - hidden, D), (network.decoder_blocks, N, width)):
            x = torch.zeros(1, network.buffer + tokens, dim, device="meta")
            macs += len(blocks) * count(blocks[0], x)[1]
        z = torch.zeros(hidden * self.repeats, width, device="meta")
        macs += count(network.head, z.new_zeros(len(z), network.channels), z[:, 0], z)[1]
        return sum(p.numel() for p in self.parameters()), macs


# ------------------------------------------------------------------------------------------------------------ registry


def grid_of(image_size, codes, name):
    """(rows, columns) of codes; ValueError if the data are none."""
    if codes is None:
        raise ValueError(f"{name} draws codes: train a tokenizer first (--model fsq-nano), then give its run by "
                         "--tokenizer")
    return pair(image_size)


def maskgit(image_size, num_classes, codes, width=768, depth=24, num_heads=16, hidden=3072, dropout=0.1,
            label_drop=0.1):
    """MaskGIT: Masked Generative Image Transformer, 2202.04200.

    label_drop: 0 for the paper's, which has no guidance."""
    grid = grid_of(image_size, codes, "MaskGIT")
    network = MaskGIT(codes, num_classes, math.prod(grid), width, depth, num_heads, hidden, dropout, label_drop > 0)
    return Codes(network, grid, label_drop)


def maskgit_r(image_size, num_classes, codes, width=768, depth=24, num_heads=8, dropout=0.0, label_drop=0.1):
    """MaskGIT with long skip connections, the network of ReCAP's code, 2505.19089."""
    grid = grid_of(image_size, codes, "MaskGIT-r")
    network = MaskGITr(codes, num_classes, math.prod(grid), width, depth, num_heads, dropout)
    return Codes(network, grid, label_drop, **MASKGIT_R)


# MaskGIT-r writes each token once: the loop of ReCAP without reuse. 2505.19089, in its code.
MASKGIT_R = {"steps": 16, "schedule": "pow2.5", "choice": 5.5, "temperature": 0.65, "recap": "u=0,full=0"}


def mage(image_size, codes, width=768, depth=12, num_heads=12, decoder_depth=8, decoder_heads=16, dropout=0.1,
         detach=True, position_std=0.02):
    """MAGE: MAsked Generative Encoder, 2211.09117: one model that represents and, without classes, generates.

    detach, position_std: how a small one learns, see masked.MAGE."""
    grid = grid_of(image_size, codes, "MAGE")
    network = MAGE(codes, math.prod(grid), width, depth, num_heads, width, decoder_depth, decoder_heads, dropout,
                   detach=detach, position_std=position_std)
    return Codes(network, grid, steps=20, choice=6.0)


def mar(image_size, in_channels, num_classes, codes, process, patch_size=1, width=768, depth=12, num_heads=12,
        buffer=64, head_depth=6, head_width=1024, dropout=0.1, label_drop=0.1, repeats=4, head_steps=100, steps=64):
    """MAR: Autoregressive Image Generation without Vector Quantization, 2406.11838."""
    if codes is not None:
        raise ValueError("MAR draws continuous tokens, and this tokenizer makes codes: take another one, or none")
    H, W = pair(image_size)
    if H % patch_size or W % patch_size:
        raise ValueError(f"patches of {patch_size} do not divide {H}x{W}: choose another patch_size")
    channels = in_channels * patch_size**2
    out = channels * (2 if process.learned_variance else 1)
    network = MAR(channels, num_classes, H * W // patch_size**2, width, depth, num_heads, buffer, head_depth,
                  head_width, out, dropout)
    return Continuous(network, process, (in_channels, H, W), patch_size, label_drop, repeats, head_steps=head_steps,
                      steps=steps)


def published(arch, network):
    """The objective around a published network, with its published way of drawing. arch: maskgit, maskgit-r, mage or
    mar."""
    side = math.isqrt(network.length)
    if arch == "maskgit":
        return Codes(network, (side, side), steps=8)
    if arch == "maskgit-r":
        return Codes(network, (side, side), **MASKGIT_R)
    if arch == "mage":
        return Codes(network, (side, side), steps=20, choice=6.0)
    guidance = {768: 2.9, 1024: 3.0, 1280: 3.2}.get(network.fake_latent.shape[1], 3.0)
    process = create_process("cosine", learned_variance=True)
    return Continuous(network, process, (network.channels, side, side), steps=256, guidance=guidance, grid="spaced")


GENERATORS = {
    "maskgit": maskgit,
    "maskgit-nano": partial(maskgit, width=128, depth=6, num_heads=4, hidden=512, dropout=0.0),
    "maskgit-r": maskgit_r,
    "maskgit-r-nano": partial(maskgit_r, width=128, depth=6, num_heads=4),
    "mage-b": mage,
    "mage-l": partial(mage, width=1024, depth=24, num_heads=16),
    "mage-nano": partial(mage, width=128, depth=4, num_heads=4, decoder_depth=3, decoder_heads=4, dropout=0.0,
                         detach=False, position_std=0.5),
    "mar-b": mar,
    "mar-l": partial(mar, width=1024, depth=16, num_heads=16, head_depth=8, head_width=1280),
    "mar-h": partial(mar, width=1280, depth=20, num_heads=16, head_depth=12, head_width=1536),
    "mar-nano": partial(mar, width=128, depth=3, num_heads=4, buffer=8, head_depth=3, head_width=128, dropout=0.0,
                        head_steps=25, steps=16),
}


# ----------------------------------------------------------------------------------------------------------- measuring


def probe_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run of MAGE")
    p.add_argument("--steps", type=int, default=1000, dest="probe_steps", help="of the probe (default: %(default)s)")
    p.add_argument("--n", type=int, default=10_000, help="training images at most (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def probe(args):
    """How well a linear classifier reads MAGE's features: accuracy on held-out images. 2211.09117, section 4.2."""
    run, device = args.run, args.run.device
    if not isinstance(getattr(run.objective, "network", None), MAGE):
        raise ValueError(f"{run.path} is a run of {run.config['network']}: a probe reads the features of MAGE")
    decoder, sets = run.objective.__dict__["decoder"], {split: run.data(split) for split in ("train", "test")}
    if len(sets["train"].classes) < 2:
        raise ValueError(f"{run.config['data']} has no classes to probe for")
    x, y = {}, {}
    for split, dataset in sets.items():
        rows = torch.arange(min(args.n, len(dataset)))
        parts = []
        for some in tqdm(rows.split(100), desc=f"features, {split}", delay=2, leave=False):
            with torch.no_grad():
                codes = decoder.tokenizer.encode(dataset.gather(some)[0])
                parts.append(run.objective.network.features(codes.flatten(1)))
        x[split], y[split] = torch.cat(parts), dataset.labels[rows.to(dataset.labels.device)].to(device)
    accuracy = linear_probe(x, y, len(sets["train"].classes), args.probe_steps)
    print(f"linear probe on {x['train'].shape[1]} features of {len(x['train']):,} images: "
          f"{accuracy:.3f} of {len(x['test']):,} held-out images are classified right "
          f"(chance {1 / len(sets['train'].classes):.3f})")


def linear_probe(x, y, classes, steps, seed=0):
    """Held-out accuracy of a linear classifier on frozen features. x, y: {"train": (n, D), "test": ...} and labels. As
    in MAE's and MAGE's code the features are normalised over the data first; the optimiser is AdamW (theirs is LARS).
    """
    mean, std = x["train"].mean(0), x["train"].std(0) + 1e-6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(x["train"].shape[1], classes).to(x["train"].device)
    optimiser = torch.optim.AdamW(layer.parameters(), 1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc="the probe", delay=2, leave=False):
        rows = torch.from_numpy(generator.integers(0, len(x["train"]), 256)).to(mean.device)
        loss = F.cross_entropy(layer((x["train"][rows] - mean) / std), y["train"][rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return (layer((x["test"] - mean) / std).argmax(1) == y["test"]).float().mean().item()


def reuse_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run of a masked generator")
    p.add_argument("--T", type=int, default=16, help="steps of the full decoder (default: %(default)s)")
    p.add_argument("--reuse", default="u=1,full=8", help="of ReCAP (default: %(default)s)")
    p.add_argument("--n", type=int, default=512, help="images a row and seed (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def reuse(args):
    """What ReCAP saves and costs: all T steps, T/2 steps, and T steps with reuse: quality, evaluations, MACs, seconds.

    Quality is a judge's: the share of images that it sees as their class (of a model without classes: how sure it is),
    and the Frechet distance of its features to held-out images. 2505.19089, section 5."""
    run, real = args.run, args.run.data("test")
    if not isinstance(run.objective, (Codes, Continuous)):
        raise ValueError(f"{run.path} is a run of {run.config['network']}, which is no masked generator")
    reuse_of(args.reuse, args.T)
    judge = metrics.judge(run.data("train"), run.config["data"].partition(":")[0], device=run.device)
    with torch.no_grad():
        rows = torch.arange(min(args.n, len(real)))
        reference = torch.cat([judge.features(real.gather(some)[0]) for some in rows.split(100)])
    ways = {f"{args.T} full": {"steps": args.T}, f"{args.T // 2} full": {"steps": args.T // 2},
            f"{args.T}, {args.reuse}": {"steps": args.T, "recap": args.reuse}}
    found = {name: [] for name in ways}
    for seed in range(args.seeds):                       # interleaved, so that a busy machine slows all rows alike
        for name, options in ways.items():
            found[name].append(measured(run, judge, reference, args.n, seed, args.draw | options))
    print(f"{'steps':18}{'full':>5}{'local':>6}{'GMACs an image':>16}{'seconds':>9}{'accuracy':>17}{'Frechet':>17}")
    for name, rows in found.items():
        spread = lambda key: f"{np.mean([r[key] for r in rows]):.3f} +- {np.std([r[key] for r in rows]):.3f}"
        print(f"{name:18}{rows[0]['full']:5}{rows[0]['local']:6}{rows[0]['macs'] / 1e9:16.3g}"
              f"{np.median([r['seconds'] for r in rows]):9.2f}{spread('accuracy'):>17}{spread('frechet'):>17}")
    print(f"({args.n} images a row, {args.seeds} seeds, mean +- standard deviation; {judge.title}; MACs of the network "
          "and its head, without the tokenizer)")


def measured(run, judge, reference, n, seed, options):
    """One row of `reuse`, of one seed."""
    passes = {"full": 0, "local": 0}

    def tally(module, args, kwargs):
        positions = args[2 if isinstance(run.objective, Codes) else 3:][:1]
        passes["full" if not positions or positions[0] is None else "local"] += 1

    hook = run.objective.network.register_forward_pre_hook(tally, with_kwargs=True)
    decoder = run.objective.__dict__.pop("decoder", None)
    with Multiplications(real=True) as counter:
        for _ in run.images(1, seed, **options):
            pass
    hook.remove()
    if decoder is not None:
        run.objective.__dict__["decoder"] = decoder
    begin = time.perf_counter()
    drawn = list(run.images(n, seed, batch=64, **options))
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        features = torch.cat([judge.features(x.clamp(-1, 1)) for x in drawn])
        p = judge.head(features).softmax(1)
    conditions = run.objective.conditions(n)
    right = p.amax(1) if conditions is None else (p.argmax(1) == conditions.to(p.device)).float()
    return passes | {"macs": counter.total, "seconds": seconds, "accuracy": right.mean().item(),
                     "frechet": metrics.frechet_distance(features, reference)}
