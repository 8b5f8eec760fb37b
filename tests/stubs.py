"""Small stand-ins that meet the house's contracts, each registered by its entry alone: an objective of masked tokens
on a fixed random codebook, two players, a backbone, a data set, a sampler."""

import torch
import torch.nn.functional as F
from torch import nn

import data
import layers


class MaskedTokens(nn.Module):
    """Masked tokens on a fixed random codebook: pixels are colours of the book, half of them hidden and predicted."""

    options = {"steps": 4, "temperature": 1.0}

    def __init__(self, image_size, in_channels, num_classes, *, width=16, colours=8):
        super().__init__()
        self.shape, self.num_classes = (in_channels, image_size, image_size), num_classes
        book = torch.rand(colours, in_channels, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.register_buffer("book", book)
        self.register_buffer("seen", torch.zeros(colours))
        self.embed = nn.Embedding(colours + 1, width)
        self.labels = nn.Embedding(max(1, num_classes), width)
        self.mix = nn.Conv1d(width, width, 5, padding=2)
        self.out = nn.Linear(width, colours)

    def tokens(self, x):
        return torch.cdist(x.flatten(2).transpose(1, 2), self.book.expand(len(x), -1, -1)).argmin(2)       # (B, N)

    def logits(self, tokens, y):
        h = self.embed(tokens) + (self.labels(y)[:, None] if self.num_classes else 0)
        return self.out(h + self.mix(h.transpose(1, 2)).relu().transpose(1, 2))                            # (B, N, V)

    def loss(self, batch):
        tokens = self.tokens(batch["x"])
        hidden = batch["noise"].uniform(tokens.shape[1]) < 0.5
        self.seen += F.one_hot(tokens, len(self.book)).sum((0, 1))
        logits = self.logits(tokens.masked_fill(hidden, len(self.book)), batch["y"])
        return {"loss": F.cross_entropy(logits[hidden], tokens[hidden]), "hidden": hidden.float().mean()}

    forward = loss

    def conditions(self, n):
        return torch.arange(n) % self.num_classes if self.num_classes else None

    @torch.no_grad()
    def trajectory(self, noise, conditions, steps=4, temperature=1.0):
        N = self.shape[1] * self.shape[2]
        tokens = torch.full((len(noise), N), len(self.book), device=self.book.device)
        for step in range(steps):
            gumbel = -noise.uniform(N, len(self.book)).clamp(min=1e-9).log().neg().log()
            drawn = (self.logits(tokens, conditions) + temperature * gumbel).argmax(2)
            tokens = torch.where(torch.arange(N, device=tokens.device) < N * (step + 1) // steps, drawn, tokens)
            shown = self.book[tokens.clamp(max=len(self.book) - 1)]
            yield shown.transpose(1, 2).unflatten(2, self.shape[1:])

    def cost(self):
        return sum(p.numel() for p in self.parameters()), self.shape[1] * self.shape[2] * self.out.weight.numel()


class TwoPlayers(nn.Module):
    """A generator and its critic (least squares), which rests in every other step and learns at half the rate."""

    options = {}

    def __init__(self, image_size, in_channels, num_classes, *, width=8):
        super().__init__()
        self.shape, size = (in_channels, image_size, image_size), in_channels * image_size**2
        self.generator = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, size), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(size, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 1))
        self.width = width
        for p in self.critic.parameters():
            p.rate = 0.5

    def loss(self, batch):
        fake = self.generator(batch["noise"].normal(self.width))
        real = batch["x"].flatten(1)
        for p in self.critic.parameters():
            p.paused = batch["step"] % 2 == 1
        fooled = (layers.detached(self.critic, fake) - 1).square().mean()
        told = (self.critic(real) - 1).square().mean() + self.critic(fake.detach()).square().mean()
        return {"loss": fooled + told, "fooled": fooled, "told": told}

    forward = loss

    def conditions(self, n):
        return None

    @torch.no_grad()
    def trajectory(self, noise, conditions):
        yield self.generator(noise.normal(self.width)).unflatten(1, self.shape)

    def cost(self):
        return sum(p.numel() for p in self.parameters()), sum(p.numel() for p in self.generator.parameters())


class Mixer(layers.Backbone):
    """A mixer: across pixels, then across channels, as a backbone."""

    def __init__(self, image_size=8, in_channels=3, num_classes=10, learn_sigma=False, *, width=16):
        super().__init__()
        self.read = nn.Conv2d(in_channels, width, 1)
        self.time, self.label = nn.Linear(1, width), nn.Embedding(num_classes + 1, width)
        self.across = nn.Linear(image_size**2, image_size**2)
        self.out = nn.Conv2d(width, in_channels * (2 if learn_sigma else 1), 1)

    def forward(self, x, t, y=None):
        h = self.read(x) + (self.time(t[:, None] / 1000) + (0 if y is None else self.label(y)))[:, :, None, None]
        return self.out(h + self.across(h.flatten(2)).relu().view_as(h))


def stripes(data_dir, split, *, size=8, flip=True):
    """Drawn here: two classes of stripes."""
    rows = torch.arange(size)[:, None].expand(size, size) % 4 < 2
    images = torch.stack([rows, rows.T] * 32)[:, None].expand(-1, 3, -1, -1).byte() * 255
    return data.Dataset(images.contiguous(), torch.arange(64) % 2, ["lying", "standing"], flip=flip)


def straight(denoise, x, times, process, noise, *, share=1.0):
    """Go to the clean image in one line, a share of the way at each step."""
    for t in times[:-1].tolist():
        x = x + share * (denoise(x, t).x0 - x)
        yield x
