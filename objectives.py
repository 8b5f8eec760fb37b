"""What `train.py` trains: objectives; how they draw images; the random numbers that both are given.

An objective is a module with two methods: `loss(batch) -> scalars by name, "loss" among them`, and
`preview(n, generator) -> images`. Training and sampling know nothing else of it.
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffusion import GUIDANCE, SAMPLERS, choose, clipped, ddim_inversion, guided
from layers import Text, canvas
from models import check_fractions, stitch_by_steps, stitch_by_time, stitched
from moe import balanced


def seeded(*numbers, device="cpu"):
    """A torch.Generator whose state is a function of the given integers alone."""
    seed = np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


class ImageNoise:
    """noise(shape) for sampling in which image i draws from a stream of its own, a function of (seed, i): the same seed
    gives the same images whatever the batch size and device."""

    def __init__(self, seed, indices, device="cpu"):
        self.generators, self.device = [seeded(seed, i) for i in indices], device

    def __call__(self, shape):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators]).to(self.device)


class StepNoise:
    """The random numbers of one training step: the rows `rows` of what the whole batch of `total` draws from (seed,
    step). So micro-batches and ranks see the numbers that they would have seen in one large batch."""

    def __init__(self, seed, step, total, rows=slice(None), device="cpu"):
        self.generator, self.total, self.rows, self.device = seeded(seed, step, device=device), total, rows, device

    def uniform(self):
        return torch.rand(self.total, generator=self.generator, device=self.device)[self.rows]

    def normal(self, shape):
        return torch.randn(self.total, *shape[1:], generator=self.generator, device=self.device)[self.rows]


def power_cosine(scale, share, power):
    """Guidance that falls from `scale` at pure noise (share = 1) to 1 at the data (share = 0): 1 + (scale - 1)
    (1 - cos(pi share^power))/2. Masked Diffusion Transformer, 2303.14389; FiTv2, 2410.13925."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * share**power)) / 2


def generate(process, denoiser, x, y=None, null=None, sampler="dpmpp-2m", steps=30, guidance=1.0, guide_channels=None,
             clip=True, noise=torch.randn, grid=None, last="clean", rule="cfg", interval=None, quantile=None,
             weak=None, power=None, **options) -> Iterator[torch.Tensor]:
    """Sample: yields the images after each step, starting from standard normal x (B, C, H, W), without gradients.

    denoiser: of a condition, as `Diffusion.denoiser`. y, null: the condition and the null condition that guidance moves
    away from (both as the model takes them); rule:
    how, a name in `GUIDANCE`; interval: only at those times; power: falling by `power_cosine`; weak: another objective
    to move away from instead of the null condition (autoguidance, 2406.02507). grid, last: see `Process.times`. clip:
    keep x0 in [-1, 1] (pixels), quantile: by dynamic thresholding. options go to the sampler.
    """
    draw, make = choose(SAMPLERS, sampler, "sampler"), choose(GUIDANCE, rule, "guidance")
    denoise = cond = denoiser(y)
    if guidance != 1 and (weak or null is not None):
        other = weak.denoiser(y) if weak else denoiser(null)
        scaled = lambda scale: guided(cond, other, scale, guide_channels, process, None if rule == "cfg" else make,
                                      interval)
        share = lambda t: (float(torch.as_tensor(t).max()) - process.t_clean) / (process.t_noisy - process.t_clean)
        denoise = scaled(guidance)
        if power is not None:
            denoise = lambda xt, t: scaled(power_cosine(guidance, share(t), power))(xt, t)
    if clip:
        denoise = clipped(denoise, process, quantile=quantile)
    times = process.times(steps, grid, last)
    if process.exploding and draw is not ddim_inversion:
        x = x * process.sigma(times[:1]).item()
    with torch.no_grad():
        yield from draw(denoise, x, times, process, noise, **options)


class Diffusion(nn.Module):
    """The training objective of a denoising backbone: `loss(batch)` and `preview(n, generator)` are all that training
    knows.

    model: the backbone, model(x, t, y). num_classes: 0 for a model without labels. label_drop: the share of samples
    whose condition becomes the null condition in training, which is what guidance needs. draw: options of `generate`.

    A condition is labels (B,) (null: num_classes), byte tokens (B, L), which `encoder` turns into a Text (null: the
    empty caption), or a Text of precomputed embeddings (null: the model's `null_text`). examples: the conditions of
    previews, by default the labels in turn.
    """

    def __init__(self, model, process, shape, num_classes=0, label_drop=0.1, draw=None, encoder=None, examples=None):
        super().__init__()
        self.encoder, self.examples = encoder, examples
        self.conditional = num_classes or model.text_width
        self.model, self.process, self.shape = model, process, shape
        self.num_classes, self.label_drop, self.draw = num_classes, label_drop, draw or {}

    def loss(self, batch):
        """batch: x (B, C, H, W) in [-1, 1], or a list of (C, H_i, W_i) of at most as many pixels as `shape`; y (B,);
        noise a `StepNoise` -> scalars by name, "loss" among them."""
        x, y, noise = batch["x"], batch["y"], batch["noise"]
        t = self.process.training_times(noise.uniform())
        y = self.encode(self.dropped(y, noise.uniform() < self.label_drop)) if self.conditional else None
        if isinstance(x, list):                    # a strip of numbers for each image: no other image shapes its noise
            strips = noise.normal((len(x), x[0].shape[0], math.prod(self.shape[1:])))
            eps, _ = canvas([strip[:, :image[0].numel()].view(image.shape) for strip, image in zip(strips, x)])
            x, sizes = canvas(x)
            parts = self.parts(x, y, t, eps, sizes)
        else:
            parts = self.parts(x, y, t, noise.normal(x.shape))
        losses = {name: value.mean() for name, value in parts.items()}
        return losses | balanced(self.model, losses["loss"])

    def parts(self, x, y, t, noise, sizes=None):
        """The losses of each sample: {"loss": (B,), ...}. With sizes (B, 2), x is a `layers.canvas`: the mean is over
        each image's own pixels, so that a small image weighs as much as a large one (2402.12376). x, noise and output
        are zero beyond the image, and so is their error."""
        if sizes is not None:
            parts = self.process.loss(partial(self.model, sizes=sizes), x, y, t, noise)
            return {name: value * (x[0, 0].numel() / sizes.prod(1)).to(value) for name, value in parts.items()}
        if "teacher" not in self.__dict__:
            return self.process.loss(self.model, x, y, t, noise)
        seen = []

        def student(*inputs):
            seen[:] = inputs, self.model(*inputs)
            return seen[1]

        parts = self.process.loss(student, x, y, t, noise)
        with torch.no_grad():
            theirs = self.teacher(*seen[0])
        (p, v), (p_teacher, v_teacher) = (self.process.split(out.to(x.dtype)) for out in (seen[1], theirs))
        parts["distill"] = (p - p_teacher).square().flatten(1).mean(1)
        parts["loss"] = parts["loss"] + self.shares[0] * parts["distill"]
        if v is not None:
            difference = 2 * (v - v_teacher)                        # of the raw channels o, v = (o + 1)/2
            if self.log_variance:                                   # log Sigma = v log beta + (1 - v) log beta~
                late = t.clamp(min=1)                               # at t = 0, beta~ is 0
                small, large = self.process.posterior(late, late - 1)[2:]
                difference = difference / 2 * (large - small).to(x)[:, None, None, None]
            parts["distill_variance"] = difference.square().flatten(1).mean(1)
            parts["loss"] = parts["loss"] + self.shares[1] * parts["distill_variance"]
        return parts

    def teach(self, teacher, shares=(0.5, 0.05), log_variance=False):
        """LiT's hybrid distillation, 2501.12976: from now on the loss also holds the squared distance to what a frozen
        teacher predicts on the same x_t, t and (dropped) label, times shares[0], and of the variance's raw channels
        (log_variance: of log Sigma), times shares[1]. The teacher is no part of the state."""
        self.__dict__["teacher"] = teacher.eval().requires_grad_(False)
        self.shares, self.log_variance = shares, log_variance

    forward = loss                                 # DistributedDataParallel calls the module itself

    def null(self, y):
        """The null condition in place of each condition in y."""
        if isinstance(y, Text):
            return Text(self.model.null_text[:y.tokens.shape[1]].to(y.tokens).expand_as(y.tokens), y.mask)
        if y.ndim == 2:
            return torch.cat([y[:, :1], torch.zeros_like(y[:, 1:])], 1)        # the start token of an empty caption
        return torch.full_like(y, self.num_classes)

    def dropped(self, y, drop):
        """y with the null condition where drop (B,) bool is set."""
        if isinstance(y, Text):
            return Text(torch.where(drop[:, None, None], self.null(y).tokens, y.tokens), y.mask)
        return torch.where(drop if y.ndim == 1 else drop[:, None], self.null(y), y)

    def encode(self, y):
        """What the model is told: byte tokens as Text, other conditions as they are."""
        return self.encoder(y.long()) if isinstance(y, torch.Tensor) and y.ndim == 2 else y

    def labels(self, n, device):
        """The conditions of a preview: the examples or every class in turn. None if there are none."""
        turn = lambda count: torch.arange(n, device=device) % count
        if self.examples is not None:
            return self.examples[turn(len(self.examples)).cpu()].to(device)
        return turn(self.num_classes) if self.num_classes else None

    def denoiser(self, y):
        """denoise(xt, t) under the condition y, as the model takes it."""
        return self.process.denoiser(self.model, y)

    def trajectory(self, x, y, **draw) -> Iterator[torch.Tensor]:
        """Images after each sampling step, from noise x and conditions y; `draw` overrides the objective's own options.
        """
        with torch.no_grad():
            y, null = (self.encode(y), self.encode(self.null(y))) if y is not None else (None, None)
        yield from generate(self.process, self.denoiser, x, y, null, **{**self.draw, **draw})

    def preview(self, n, generator):
        """n images (n, C, H, W) in [-1, 1]; all randomness comes from `generator` (on the CPU)."""
        device = next(self.model.parameters()).device
        noise = lambda shape: torch.randn(shape, generator=generator).to(device)
        for x in self.trajectory(noise((n, *self.shape)), self.labels(n, device), noise=noise):  # noqa: B007
            pass
        return x.clamp(-1, 1)


class Stitch(Diffusion):
    """T-Stitch, 2402.14167: trained objectives of one process, the smallest model first, each for its fraction of the
    sampling steps. rule: "steps", the paper's, whole numbers of steps on any grid of times; or "time", the published
    code's, a threshold on t. Raises ValueError if they do not draw and predict the same."""

    def __init__(self, parts, fractions, rule="steps"):
        if len({(p.shape, type(p.process), p.process.prediction, p.process.learned_variance) for p in parts}) > 1:
            raise ValueError("only models of one process can be stitched, whose images have the same shape, and which "
                             "predict the same, with learned variances or without")
        check_fractions(fractions, len(parts))
        last = parts[-1]
        super().__init__(last.model, last.process, last.shape, last.num_classes, draw=last.draw, examples=last.examples)
        self.runs, self.fractions, self.rule = nn.ModuleList(parts), fractions, rule

    def trajectory(self, x, y, **draw):
        draw = {**self.draw, **draw}
        if draw.get("weak"):
            raise ValueError("stitched models cannot be guided by a weak one: leave out --weak or --stitch")
        if self.rule == "steps":
            rule = stitch_by_steps(self.process.times(draw["steps"], draw.get("grid")), self.fractions)
        else:
            rule = stitch_by_time(self.fractions, self.process.t_noisy - self.process.t_clean)

        def denoiser(conditions):
            return stitched([run.denoiser(own) for run, own in zip(self.runs, conditions)], rule)

        y, null = [y] * len(self.runs), None
        if y[0] is not None:                           # each model's own null label or captions
            with torch.no_grad():
                y, null = zip(*((run.encode(own), run.encode(run.null(own))) for run, own in zip(self.runs, y)))
        yield from generate(self.process, denoiser, x, y, null, **draw)


class MultiScale(Diffusion):
    """DiMR's objective: each branch of the model predicts, at its own resolution, what the process asks for, and only
    the last one draws. Weights from 1/4 of the lowest branch to 1 of the last. 2406.09416, section 3.2."""

    def parts(self, x, y, t, noise):
        outputs = []

        def last(*inputs):
            outputs[:] = self.model(*inputs, every=True)
            return outputs[-1]

        parts = self.process.loss(last, x, y, t, noise)
        below = [self.process.split(output)[0].to(x.dtype) for output in outputs[:-1]]
        errors = multi_scale_errors(below, self.process.target(x, noise, t))
        for k, mse in enumerate(errors):
            share = self.process.weight(t).to(mse) * 4 ** (k / len(errors) - 1)
            parts |= {"loss": parts["loss"] + share * mse, f"mse_{below[k].shape[-1]}": mse}
        return parts


def multi_scale_errors(predictions, target):
    """Mean squared error (B,) of each prediction (B, C, h, w) against the target (B, C, H, W) at its resolution."""
    return [(p - area_target(target, p.shape[-1])).square().flatten(1).mean(1) for p in predictions]


def area_target(target, width):
    """(B, C, H, W) -> (B, C, H/R, W/R = width): sums over R x R blocks divided by R, so that white noise keeps variance
    1. Odd sizes, as published: windows of R + 1 that overlap, ((H - 1)/R + 1, (W - 1)/R + 1); variance 1 but at borders
    and for the overlap's correlation."""
    W = target.shape[-1]
    if width == W:
        return target
    R, rest = divmod(W - W % 2, width - W % 2)
    if rest:
        raise ValueError(f"a prediction {width} pixels wide is no whole fraction of a target of {W}")
    return F.avg_pool2d(target, R + W % 2, R, padding=(W % 2) * (R // 2)) * (R + W % 2)
