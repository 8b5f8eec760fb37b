"""What `train.py` trains: objectives, and the random numbers that they are given.

Everything that is trained, denoiser or not, is an nn.Module with this contract (no base class is needed):

    loss(batch)            {"loss": scalar, name: scalar, ...} of batch: x, y, step, noise (a `StepNoise`); a denoiser's
                           also {"by_noise": `by_noise`}. One backward pass a step. Two players (a generator and its
                           critic): their losses are added, each detached from the other's weights
                           (`layers.detached`). Marks on parameters: rate, a share of --lr; no_decay; paused, set in
                           loss(): this step leaves them
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

from diffusion import Discrete, resolution_shift
from guidance import check_fractions, compose, stitch_by_steps, stitch_by_time, stitched
from guides import asked, with_gradient
from layers import Text, canvas
from models import cost
from moe import balanced
from runs import Run
from samplers import draw, times_of


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


class Diffusion(nn.Module):
    """The training objective of a denoising backbone.

    model: the backbone, model(x, t, y). shape: (C, *sides) of what is drawn. num_classes: 0 for a model without labels.
    label_drop: the share of samples whose condition becomes the null condition in training, which is what guidance
    needs.

    A condition is labels (B,) (null: num_classes), byte tokens (B, L), which `encoder` turns into a Text (null: the
    empty caption), or a Text of precomputed embeddings (null: the model's `null_text`). examples: the conditions of
    previews, by default the labels in turn.
    """

    options = {"sampler": "dpmpp-2m", "steps": 20, "grid": None, "last": "clean", "times": None, "sigmas": None,
               "lambda_min": None, "brownian": False, "guidance": 1.0, "guidance_rule": "cfg", "guidance_power": None,
               "guide_channels": None, "interval": None, "weak": Run(""), "clip": True, "clip_range": 1.0,
               "threshold": None, "threshold_max": None, "guide": Run(""), "guide_scale": 7.5, "guide_image": "",
               "size": None, "rope": None, "shift": None}
    options_help = {
        "steps": "sampling steps", "grid": "of sampling times (none: what suits process and sampler)",
        "last": "where the grid ends: clean, or least, the least noisy level that the network knows",
        "times": "T,...: the times themselves, from noise down, instead of steps and grid, such as 999,749,499,249",
        "sigmas": "S,...: the same as noise levels sigma/alpha (of a straight path: its t)",
        "lambda_min": "begin no noisier than this log(alpha/sigma), such as -5.1 for the cosine chain",
        "brownian": "noise that is one path whatever the number of steps: more steps come nearer to one image",
        "guidance": "classifier-free guidance, 1 for none", "guidance_rule": "how it is applied",
        "guidance_power": "let it fall from noise to image by the power-cosine schedule (FiTv2), for example 1",
        "guide_channels": "guide only the first so many channels, as the published DiT does",
        "interval": "LOW,HIGH: guide only between these times of the process",
        "weak": "a run (smaller, or less trained) to guide away from instead of the null condition (autoguidance)",
        "clip": "keep the clean image in its range", "clip_range": "that range: [-1, 1] times this",
        "threshold": "dynamic thresholding: clip at this quantile of |x0|, for example 0.995, and rescale",
        "threshold_max": "the largest such bound, for example 1.5 (none: any)",
        "guide": "a run of a classifier, or of ppap, whose gradients guide (2105.05233); --classes are then its",
        "guide_scale": "of its gradients", "guide_image": "a picture: draw what the guide sees in it",
        "size": "HxW (clips: FxHxW, sounds: T): another size than that of training, if the model can",
        "rope": "rotary frequencies for sizes beyond training: FiT: see layers.ROPE; Flag-DiT: FlagDiT.ropes",
        "shift": "multiplies sigma/alpha of every time: above 1 for larger images, which need more steps at noise; "
                 "auto: by the number of tokens (2403.03206)"}

    def __init__(self, model, process, shape, num_classes=0, label_drop=0.1, encoder=None, examples=None):
        super().__init__()
        self.encoder, self.examples = encoder, examples
        self.conditional = num_classes or model.text_width
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
        return losses | balanced(self.model, losses["loss"]) | {"by_noise": by_noise(self.process, t, parts)}

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
        """Images (n, C, H, W) after each sampling step, from an `ImageNoise` and conditions; see `options`. With a
        guide, conditions are the guide's too; a model that knows none is told none."""
        extrapolate(self, size, rope, shift)
        options = self.asking(conditions, **options)
        y, null = self.told(conditions if self.conditional else None)
        yield from self.generated(noise((len(noise), *self.shape)), y, null, noise, **options)

    def fill(self, noise, image, hole, conditions, **options):
        """RePaint, 2201.09865: a trajectory in which only the hole (n, H, W) of an image (n, C, H, W) is drawn."""
        yield from self.trajectory(noise, conditions, image=image, mask=~hole[:, None], **options)

    def asking(self, conditions, guide=None, guide_image="", **options):
        """The options with a guide's log p(y | x_t) in the place of the guide."""
        return options | {"guide": asked(guide, self, conditions, guide_image)} if guide else options

    def denoiser(self, y):
        """denoise(xt, t) under the condition y, as the model takes it."""
        return self.process.denoiser(self.model, y)

    def generated(self, x, y, null, noise, **options):
        """Images after each step from standard normal x: the denoiser composed as the options say, then a sampler."""
        options = {key: value for key, value in (self.options | {"guide": None} | options).items()
                   if key not in ("guide_image", *EXTRAPOLATE)}
        scale, weak, other = options.pop("guidance"), options.pop("weak"), None
        if scale != 1 and (weak or null is not None):
            other = weak.denoiser(y) if weak else self.denoiser(null)
        denoise = compose(self.process, self.denoiser(y), other, guidance=scale, rule=options.pop("guidance_rule"),
                          interval=options.pop("interval"), power=options.pop("guidance_power"),
                          channels=options.pop("guide_channels"), clip=options.pop("clip") and options["clip_range"],
                          quantile=options.pop("threshold"), largest=options.pop("threshold_max") or math.inf)
        del options["clip_range"]
        for key in ("times", "sigmas"):
            if isinstance(options[key], (int, float)):
                options[key] = [options[key]]
        guide, scale = options.pop("guide"), options.pop("guide_scale")
        if guide is not None and scale != 0:         # after clipping, as published
            denoise, options["sampler"] = with_gradient(denoise, options["sampler"], guide, scale, self.process)
        yield from draw(self.process, denoise, x, noise=noise, **options)

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
    steps at noise ("auto": by their number of tokens). A plain DiT interpolates its position table. ValueError if the
    model cannot."""
    model, sides = objective.model, len(objective.shape) - 1
    own = "x".join(map(str, objective.shape[1:]))
    if size is not None:
        size = (size,) if isinstance(size, int) else tuple(size)
        size = size * sides if len(size) == 1 and sides == 2 else size
        if len(size) != sides:
            raise ValueError(f"size {'x'.join(map(str, size))}: give {sides} sides, this run draws {own}")
        model.resize(size)
        objective.shape = objective.shape[0], *size
    if rope is not None:
        if rope not in model.ropes:
            raise ValueError(f"rope {rope!r}: " + (f"choose from {', '.join(model.ropes)}" if model.ropes else
                                                   "this model has no rotary positions"))
        model.rope = rope
    if shift == "auto":
        tokens = math.prod(objective.shape[1:]) / getattr(model, "patch_size", 1) ** sides
        shift = resolution_shift(tokens)
    if shift is not None:
        if isinstance(objective.process, Discrete) or not shift > 0:
            raise ValueError(f"shift {shift}: it must be above 0, and a discrete chain is shifted in training only")
        objective.process.shift = shift


@torch.no_grad()
def by_noise(process, t, parts, bins=10):
    """What each noise level has in a batch of losses {"loss": (B,), "mse": (B,)} at times t (B,): (3, bins), the sums
    of the loss and of the squared error of the clean image, and the number of samples, over B. Means over the parts of
    a batch are those of the whole. The bins are even in sigma/(alpha + sigma): 0 clean, 1 noise, on rectified flow
    t."""
    alpha, sigma, p, q = process.coefficients(t)
    sigma = sigma.clamp(min=1e-8)
    error = parts["mse"] * (sigma / (alpha * q - sigma * p)) ** 2     # of x0, from that of the prediction p x0 + q eps
    rows = torch.stack([parts["loss"].to(error), error, torch.ones_like(error)])                        # (3, B)
    here = F.one_hot((sigma / (alpha + sigma) * bins).long().clamp(0, bins - 1), bins)                  # (B, bins)
    return (rows[:, :, None] * here).mean(1).float()


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
        check_fractions(fractions, len(parts))
        last = parts[-1]
        super().__init__(last.model, last.process, last.shape, last.num_classes, examples=last.examples)
        self.runs, self.fractions, self.rule = nn.ModuleList(parts), fractions, rule

    def trajectory(self, noise, conditions, **options):
        if options.get("weak"):
            raise ValueError("stitched models cannot be guided by a weak one: leave out --weak or --stitch")
        if options.get("times") or options.get("sigmas"):
            raise ValueError("stitched models share the steps of a grid: leave out --times and --sigmas")
        if self.rule == "steps":
            steps, sampler, last = (options.get(key, self.options[key]) for key in ("steps", "sampler", "last"))
            times = times_of(self.process, steps, sampler, options.get("grid"), last, options.get("lambda_min"))
            self.chosen = stitch_by_steps(times, self.fractions)
        else:
            self.chosen = stitch_by_time(self.fractions, self.process.t_noisy - self.process.t_clean)
        options = self.asking(conditions, **options)
        y, null = [None] * len(self.runs), None
        if conditions is not None and self.conditional:          # each model's own null label or captions
            y, null = zip(*(run.told(conditions) for run in self.runs))
        yield from self.generated(noise((len(noise), *self.shape)), y, null, noise, **options)

    def denoiser(self, y):
        """denoise(xt, t) under each model's own form of a condition."""
        return stitched([run.denoiser(own) for run, own in zip(self.runs, y)], self.chosen)


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
