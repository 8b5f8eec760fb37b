"""What `train.py` trains: objectives, and the random numbers that they are given.

Everything that is trained, denoiser or not, is an nn.Module with this contract (no base class is needed):

    loss(batch)            {"loss": scalar, name: scalar, ...} of batch: x, y, step, noise (a `StepNoise`). One backward
                           pass a step. Two players (a generator and its critic): their losses are added, each detached
                           from the other's weights (`layers.detached`). Marks on parameters: rate, a share of --lr;
                           no_decay; paused, set in loss(): this step leaves them
    conditions(n)          the conditions of a preview of n: labels in turn, example captions, ...; None without any
    trajectory(noise, conditions, **options)    a generator: what there is to show after each step, (n, C, H, W) in
                           [-1, 1]; noise is an `ImageNoise`, n = len(noise)
    options                {name: default} of what may be set when drawing; any other option is refused by name
    cost()                 (parameters, multiply-accumulates of one training sample's forward pass)

Previews, films, grids, exact resume, averages, several processes and the generic tests follow from these.

    Diffusion     a denoising backbone and a process        MultiScale    DiMR's, with a loss at every resolution
    Distilled     any of these beside a frozen teacher      Stitch        several in one trajectory (T-Stitch)
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffusion import GUIDANCE, SAMPLERS, Discrete, choose, clipped, ddim_inversion, guided
from layers import Text, canvas
from models import Stitched, cost, patch_grid, stitch_steps
from moe import balanced
from runs import Run


def seeded(*numbers, device="cpu"):
    """A torch.Generator whose state is a function of the given integers alone."""
    seed = np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


class ImageNoise:
    """The random numbers of n drawn images; image i draws from a stream of its own, a function of (seed, i): the same
    seed gives the same images whatever the batch size and device."""

    def __init__(self, seed, indices, device="cpu"):
        self.generators, self.device = [seeded(seed, i) for i in indices], device

    def __len__(self):
        return len(self.generators)

    def normal(self, *sizes):
        """Standard normal numbers (n, *sizes)."""
        return torch.stack([torch.randn(sizes, generator=g) for g in self.generators]).to(self.device)

    def uniform(self, *sizes):
        """Numbers in [0, 1), (n, *sizes)."""
        return torch.stack([torch.rand(sizes, generator=g) for g in self.generators]).to(self.device)

    def __call__(self, shape):
        """Standard normal numbers of a shape (n, ...), as samplers ask for them."""
        return self.normal(*shape[1:])


class StepNoise:
    """The random numbers of one training step: the rows `rows` of what the whole batch of `total` draws from (seed,
    step). So micro-batches and ranks see the numbers that they would have seen in one large batch."""

    def __init__(self, seed, step, total, rows=slice(None), device="cpu"):
        self.generator, self.total, self.rows, self.device = seeded(seed, step, device=device), total, rows, device

    def __len__(self):
        return len(range(self.total)[self.rows])

    def normal(self, *sizes):
        """Standard normal numbers, (b, *sizes) for the b rows."""
        return torch.randn(self.total, *sizes, generator=self.generator, device=self.device)[self.rows]

    def uniform(self, *sizes):
        """Numbers in [0, 1), (b, *sizes) for the b rows."""
        return torch.rand(self.total, *sizes, generator=self.generator, device=self.device)[self.rows]

    def __call__(self, shape):
        """Standard normal numbers of a shape (b, ...)."""
        return self.normal(*shape[1:])


def power_cosine(scale, share, power):
    """Guidance that falls from `scale` at pure noise (share = 1) to 1 at the data (share = 0): 1 + (scale - 1)
    (1 - cos(pi share^power))/2. Masked Diffusion Transformer, 2303.14389; FiTv2, 2410.13925."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * share**power)) / 2


def generate(process, model, x, y=None, null=None, sampler="dpmpp-2m", steps=30, guidance=1.0, guide_channels=None,
             clip=True, noise=torch.randn, grid=None, last="clean", rule="cfg", interval=None, quantile=None,
             weak=None, power=None, **options) -> Iterator[torch.Tensor]:
    """Sample: yields the images after each step, starting from standard normal x (B, C, H, W), without gradients.

    y, null: the condition and the null condition that guidance moves away from (both as the model takes them); rule:
    how, a name in `GUIDANCE`; interval: only at those times; power: falling by `power_cosine`; weak: another objective
    to move away from instead of the null condition (autoguidance, 2406.02507). grid, last: see `Process.times`. clip:
    keep x0 in [-1, 1] (pixels), quantile: by dynamic thresholding. options go to the sampler.
    """
    draw = sampler if callable(sampler) else choose(SAMPLERS, sampler, "sampler")
    make = rule if callable(rule) else choose(GUIDANCE, rule, "guidance")
    denoise = cond = process.denoiser(model, y)
    if guidance != 1 and (weak or null is not None):
        other = weak.process.denoiser(weak.model, y) if weak else process.denoiser(model, null)
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
    """The training objective of a denoising backbone.

    model: the backbone, model(x, t, y). shape: (C, *sides) of what is drawn. num_classes: 0 for a model without labels.
    label_drop: the share of samples whose condition becomes the null condition in training, which is what guidance
    needs.

    A condition is labels (B,) (null: num_classes), byte tokens (B, L), which `encoder` turns into a Text (null: the
    empty caption), or a Text of precomputed embeddings (null: the model's `null_text`). examples: the conditions of
    previews, by default the labels in turn.
    """

    options = {"sampler": "dpmpp-2m", "steps": 20, "grid": None, "guidance": 1.0, "guidance_rule": "cfg",
               "guidance_power": None, "guide_channels": None, "interval": None, "weak": Run(""), "clip": True,
               "threshold": None, "size": None, "rope": None, "shift": None}
    options_help = {
        "steps": "sampling steps", "grid": "of sampling times (none: the process's own)",
        "guidance": "classifier-free guidance, 1 for none", "guidance_rule": "how it is applied",
        "guidance_power": "let it fall from noise to image by the power-cosine schedule (FiTv2), for example 1",
        "guide_channels": "guide only the first so many channels, as the published DiT does",
        "interval": "LOW,HIGH: guide only between these times of the process",
        "weak": "a run (smaller, or less trained) to guide away from instead of the null condition (autoguidance)",
        "clip": "keep the clean image in [-1, 1]",
        "threshold": "dynamic thresholding: clip at this quantile of |x0|, for example 0.995, and rescale",
        "size": "HxW (clips: FxHxW, sounds: T): another size than that of training, if the model can",
        "rope": "rotary frequencies for sizes beyond training: FiT: see layers.ROPE; Flag-DiT: FlagDiT.ropes",
        "shift": "multiplies sigma/alpha of every time: above 1 for larger images, which need more steps at noise"}

    def __init__(self, model, process, shape, num_classes=0, label_drop=0.1, encoder=None, examples=None):
        super().__init__()
        self.encoder, self.examples = encoder, examples
        self.conditional = num_classes or getattr(model, "text_width", 0)
        self.model, self.process, self.shape = model, process, shape
        self.num_classes, self.label_drop = num_classes, label_drop

    def loss(self, batch):
        """batch: x (B, C, H, W) in [-1, 1], or a list of (C, H_i, W_i) of at most as many pixels as `shape`; y (B,);
        noise a `StepNoise` -> scalars by name, "loss" among them."""
        x, y, noise = batch["x"], batch["y"], batch["noise"]
        t = self.process.training_times(noise.uniform())
        y = self.encode(self.dropped(y, noise.uniform() < self.label_drop)) if self.conditional else None
        if isinstance(x, list):                    # a strip of numbers for each image: no other image shapes its noise
            strips = noise.normal(x[0].shape[0], math.prod(self.shape[1:]))
            eps, _ = canvas([strip[:, :image[0].numel()].view(image.shape) for strip, image in zip(strips, x)])
            x, sizes = canvas(x)
            parts = self.parts(x, y, t, eps, sizes)
        else:
            parts = self.parts(x, y, t, noise(x.shape))
        losses = {name: value.mean() for name, value in parts.items()}
        return losses | balanced(self.model, losses["loss"])

    forward = loss                                 # DistributedDataParallel calls the module itself

    def parts(self, x, y, t, noise, sizes=None):
        """The losses of each sample: {"loss": (B,), ...}. With sizes (B, 2), x is a `layers.canvas`: the mean is over
        each image's own pixels, so that a small image weighs as much as a large one (2402.12376). x, noise and output
        are zero beyond the image, and so is their error."""
        model = self.model if sizes is None else partial(self.model, sizes=sizes)
        parts = self.process.loss(model, x, y, t, noise)
        if sizes is None:
            return parts
        return {name: value * (x[0, 0].numel() / sizes.prod(1)).to(value) for name, value in parts.items()}

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

    def conditions(self, n):
        """The conditions of a preview: the examples or every class in turn. None if there are none."""
        if self.examples is not None:
            return self.examples[torch.arange(n) % len(self.examples)]
        return torch.arange(n) % self.num_classes if self.num_classes else None

    def trajectory(self, noise, conditions, size=None, rope=None, shift=None, **options) -> Iterator[torch.Tensor]:
        """Images (n, C, H, W) after each sampling step, from an `ImageNoise` and conditions; see `options`."""
        extrapolate(self, size, rope, shift)
        y, null = self.told(conditions)
        yield from self.generated(noise((len(noise), *self.shape)), y, null, noise, **options)

    def generated(self, x, y, null, noise, **options):
        """`generate` with this objective's names of its options."""
        options = {key: value for key, value in (self.options | options).items() if key not in EXTRAPOLATE}
        power, quantile = options.pop("guidance_power"), options.pop("threshold")
        rule, weak = options.pop("guidance_rule"), options.pop("weak") or None
        yield from generate(self.process, self.model, x, y, null, noise=noise, rule=rule, weak=weak, power=power,
                            quantile=quantile, **options)

    @torch.no_grad()
    def told(self, conditions):
        """(what the model is told, its null condition), (None, None) without conditions."""
        if conditions is None:
            return None, None
        return self.encode(conditions), self.encode(self.null(conditions))

    def cost(self):
        """(parameters, multiply-accumulates of one image) of the backbone."""
        return cost(self.model, self.shape)


EXTRAPOLATE = ("size", "rope", "shift")


def extrapolate(objective, size=None, rope=None, shift=None):
    """Let a denoiser draw images of another size, sides in pixels (one number: a square), with other rotary
    frequencies, and with sigma/alpha of every time multiplied by `shift`: above 1 for larger images, which need more
    steps at noise. A plain DiT interpolates its position table. ValueError if the model cannot."""
    model, sides = getattr(objective.model, "model", objective.model), len(objective.shape) - 1
    own = "x".join(map(str, objective.shape[1:]))
    if size is not None:
        size = (size,) if isinstance(size, int) else tuple(size)
        size = size * sides if len(size) == 1 and sides == 2 else size
        if len(size) != sides:
            raise ValueError(f"size {'x'.join(map(str, size))}: give {sides} sides, this run draws {own}")
        if not model.any_size:
            raise ValueError(f"size {'x'.join(map(str, size))}: this model draws {own} only")
        if sides > 1:
            patch_grid(size[-2:], model.patch_size)
        model.resize(size)
        objective.shape = objective.shape[0], *size
    if rope is not None:
        if rope not in model.ropes:
            raise ValueError(f"rope {rope!r}: " + (f"choose from {', '.join(model.ropes)}" if model.ropes else
                                                   "this model has no rotary positions"))
        model.rope = rope
    if shift is not None:
        if isinstance(objective.process, Discrete) or not shift > 0:
            raise ValueError(f"shift {shift}: it must be above 0, and a discrete chain is shifted in training only")
        objective.process.shift = shift


class Distilled(nn.Module):
    """LiT's hybrid distillation, 2501.12976, around any objective of a denoiser: its loss also holds the squared
    distance to what a frozen teacher predicts on the same x_t, t and (dropped) condition, times shares[0], and of the
    variance's raw channels (log_variance: of log Sigma), times shares[1]. The teacher is no part of the state, and all
    but the loss is the objective's own."""

    def __init__(self, objective, teacher, shares=(0.5, 0.05), log_variance=False):
        super().__init__()
        if not isinstance(objective, Diffusion) or not isinstance(teacher, Diffusion):
            raise ValueError("distillation compares the predictions of two denoisers: teacher and student must be runs "
                             "of backbones")
        self.objective, self.shares, self.log_variance = objective, shares, log_variance
        self.__dict__["teacher"] = teacher.model.eval().requires_grad_(False)

    def forward(self, batch):
        heard = []                                                  # the call of the student's network
        hook = self.objective.model.register_forward_hook(lambda *call: heard.append(call[1:]), with_kwargs=True)
        losses = self.objective.loss(batch)
        hook.remove()
        args, kwargs, output = heard[-1]
        output = output[-1] if isinstance(output, list) else output          # DiMR's last branch is the prediction
        with torch.no_grad():
            theirs = self.teacher(*args, **{k: v for k, v in kwargs.items() if k == "sizes"})
        process, sizes = self.objective.process, kwargs.get("sizes")
        (p, v), (p_teacher, v_teacher) = (process.split(out.float()) for out in (output, theirs))
        own = 1.0 if sizes is None else (p[0, 0].numel() / sizes.prod(1)).to(p)     # of each image its own pixels
        distance = {"distill": ((p - p_teacher).square().flatten(1).mean(1) * own).mean()}
        if v is not None:
            difference = 2 * (v - v_teacher)                        # of the raw channels o, v = (o + 1)/2
            if self.log_variance:                                   # log Sigma = v log beta + (1 - v) log beta~
                t = args[1]
                late = t.clamp(min=1)                               # at t = 0, beta~ is 0
                small, large = process.posterior(late, late - 1)[2:]
                difference = difference / 2 * (large - small).to(p)[:, None, None, None]
            distance["distill_variance"] = (difference.square().flatten(1).mean(1) * own).mean()
        total = losses["loss"]
        for share, value in zip(self.shares, distance.values()):
            total = total + share * value
        return losses | distance | {"loss": total}


class Stitch(Diffusion):
    """T-Stitch, 2402.14167: trained objectives of one process, the smallest model first, each for its fraction of the
    sampling steps. rule: "steps", the paper's, whole numbers of steps on any grid of times; or "time", the published
    code's, a threshold on t. Raises ValueError if they do not draw and predict the same."""

    def __init__(self, parts, fractions, rule="steps"):
        if len({(p.shape, type(p.process), p.process.prediction, p.process.learned_variance) for p in parts}) > 1:
            raise ValueError("only models of one process can be stitched, whose images have the same shape, and which "
                             "predict the same, with learned variances or without")
        model, last = Stitched([part.model for part in parts], fractions), parts[-1]
        super().__init__(model, last.process, last.shape, last.num_classes, examples=last.examples)
        self.runs, self.fractions, self.rule = list(parts), fractions, rule

    def trajectory(self, noise, conditions, **options):
        if options.get("weak"):
            raise ValueError("stitched models cannot be guided by a weak one: leave out --weak or --stitch")
        if self.rule == "steps":
            steps = options.get("steps", self.options["steps"])
            told = self.process.network_time(self.process.times(steps, options.get("grid"))[:-1])
            plan = torch.tensor(stitch_steps(len(told), self.fractions))
            progress = torch.cat([told.new_tensor([-math.inf]), 1 - told / self.model.T, told.new_tensor([math.inf])])
            ends = torch.stack([(plan <= j).sum() for j in range(len(self.fractions))])
            self.model.cumulative = (progress[ends] + progress[ends + 1]).float() / 2    # half-way to the next step
        y, null = None, None
        if conditions is not None:                     # each model's own null label or captions
            y, null = zip(*(run.told(conditions) for run in self.runs))
        yield from self.generated(noise((len(noise), *self.shape)), y, null, noise, **options)


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
