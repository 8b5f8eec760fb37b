"""The Diffusion Classifier: a denoiser under conditions as a classifier, with no training. Your Diffusion Model is
Secretly a Zero-Shot Classifier, 2303.16203.

The class whose denoiser predicts the noise best. With a uniform prior Bayes' rule reads, up to constants,

    p(c | x) = softmax over c of -E_{t,eps} || eps - eps_theta(x_t, t, c) ||^2        (equations 4 and 5)

What classes differ in is tiny beside how the error varies over t and eps. So all classes see the same slots, pairs of t
and eps, and hopeless classes leave early. Here K are the classes and S the slots.

    stages, prune, Verdict     which times are evaluated, and which classes on all of them
    errors                     of every class on every slot: l2, l1, Huber, and the bound's terms
    classify, swaps            the commands
"""

import argparse
import hashlib
import json
import math
import statistics
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import build
import data
import figures
import guides
import objectives
import runs
from diffusion import Discrete, discretised_log_likelihood, expand
from guides import T

# ------------------------------------------------------------------------------------------------------ staged pruning


def stages(samples, steps=T):
    """The new times of each stage: of the grid of max(samples) even times in 0 .. steps - 1 stage k takes samples[k]
    that are spread evenly, and leaves out those that were taken before. As published; appendix A."""
    if not samples or min(samples) < 1 or max(samples) > steps:
        raise ValueError(f"{samples} times: choose from 1 to {steps} for each stage")
    stride = steps // max(samples)
    grid = list(range(stride // 2, steps, stride))[:max(samples)]
    plan, taken = [], set()
    for n in samples:
        stride = len(grid) // n
        plan.append([t for t in grid[stride // 2::stride][:n] if t not in taken])
        taken.update(plan[-1])
    return plan


@dataclass
class Verdict:
    """What `prune` found. errors (K, S), NaN where a class was not evaluated; times (S,), of each slot; survivors, the
    classes that each stage evaluated, best first; mean (K,), over what each class was evaluated on."""
    winner: int
    errors: torch.Tensor
    times: torch.Tensor
    survivors: list

    @property
    def mean(self):
        return self.errors.nanmean(1)

    @property
    def evaluations(self):
        return int((~self.errors.isnan()).sum())


def prune(error, num_classes, samples, keep, steps=T, trials=1):
    """Staged pruning: every class left is evaluated on the new times of a stage, and the keep[k] with the least mean
    error over all that they have seen go on to the next. 2303.16203, section 3.4 and algorithm 2 -> Verdict.

    error(classes (k,), times (m,), slots (m,)) -> (k, m), int64 inside. A slot is numbered in the order of evaluation,
    `trials` slots for each time: so the noise that belongs to a slot belongs to a time only within one plan."""
    if len(keep) != len(samples):
        raise ValueError(f"{len(samples)} stages and {len(keep)} numbers of classes to keep: give one a stage")
    if keep[-1] != 1 or min(keep) < 1 or list(keep) != sorted(keep, reverse=True):
        raise ValueError(f"keep {','.join(map(str, keep))}: it must fall, and end in 1")
    plan, remaining, survivors = stages(samples, steps), torch.arange(num_classes), []
    times = torch.tensor([t for new in plan for t in new]).repeat_interleave(trials)
    errors, first = torch.full((num_classes, len(times)), math.nan), 0
    for new, k in zip(plan, keep):
        slots = torch.arange(first, first + trials * len(new))
        first += len(slots)
        survivors.append(remaining.tolist())
        errors[remaining[:, None], slots] = error(remaining, times[slots], slots).float().cpu()
        mean = errors[remaining, :first].mean(1)
        remaining = remaining[mean.topk(min(k, len(remaining)), largest=False).indices]
    return Verdict(int(remaining[0]), errors, times, survivors)


def paired_difference(a, b):
    """Of the errors (S,) of two classes on the same slots: (mean of a - b, its standard error)."""
    d = (a - b).double()
    return d.mean().item(), (d.std() / len(d) ** 0.5).item() if len(d) > 1 else math.inf


def posterior(mean, numbers):
    """p(c | x), (K,), from mean errors (K,) of so many numbers each (pixels times channels): the exponent holds their
    sum. Classes that were pruned (NaN) have none."""
    return (-mean.double() * numbers).masked_fill(mean.isnan(), -math.inf).softmax(0)


# -------------------------------------------------------------------------------------------------------------- errors

LOSSES = ("l2", "l1", "huber", "vlb", "nll", "l2+vlb")
MEASURES = ("relative", "own", "eps", "x0")


def slot_times(process, grid, low=0, high=T):
    """The process's times (S,) for times `grid` in 0 .. 999 of the plan, stretched to [low, high): on a chain these
    themselves, else the middle of each, in what networks are told (see `guides.times_between`)."""
    return guides.times_between(process, low, high, (grid.float() + 0.5) / T)


def bound_terms(process, d, x0, xt, t):
    """What a chain says of x0 in its step from t, each a mean over elements in bits, (B,): the variational bound's
    KL(q(x_{t-1} | x_t, x_0) || p), and the negative log-likelihood of x0 as 8-bit data. The variance of p is the
    learned one, or the fixed one of the process."""
    if not isinstance(process, Discrete):
        raise ValueError("the bound's terms are those of a discrete chain (--process linear, say): choose another "
                         "--loss")
    second = process.posterior(torch.ones_like(t), torch.zeros_like(t))[2]            # log beta~ of t = 1, for t = 0
    x0_factor, xt_factor, log_small, log_large = process.posterior(t, t - 1)
    log_small = torch.where(t < 1, second, log_small)
    x0_factor, xt_factor, log_small, log_large = (expand(v, x0) for v in (x0_factor, xt_factor, log_small, log_large))
    v = float(process.fixed_variance == "large") if d.variance is None else d.variance
    if d.variance is None:
        log_large = torch.where(expand(t, x0) < 1, log_small, log_large)             # as published tables have it
    log_variance = v * log_large + (1 - v) * log_small
    mean = x0_factor * d.x0 + xt_factor * xt
    true_mean = x0_factor * x0 + xt_factor * xt
    kl = 0.5 * (log_variance - log_small - 1 + (log_small - log_variance).exp()
                + (true_mean - mean).square() * (-log_variance).exp())
    nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    return [v.flatten(1).mean(1) / math.log(2) for v in (kl, nll)]


def error_of(process, d, x0, eps, xt, t, loss, measure):
    """The error (B,) of a denoiser's answer d, a mean over channels and pixels.

    measure: of which difference. "own" (and "relative"): of what the network predicts, weighed as in training (that is:
    the training loss; of a published chain, eps), "eps", or "x0"; at one t they differ by a factor, so what changes is
    the weight of the times."""
    if loss in ("vlb", "nll", "l2+vlb"):
        kl, nll = bound_terms(process, d, x0, xt, t)
        return nll if loss == "nll" else kl if loss == "vlb" else kl + (eps - d.eps).square().flatten(1).mean(1)
    if measure in ("own", "relative"):
        root = expand(process.weight(t).to(torch.float32).sqrt(), x0)
        difference = process.target(x0 - d.x0, eps - d.eps, t) * root
    else:
        difference = eps - d.eps if measure == "eps" else x0 - d.x0
    if loss == "huber":
        difference = F.huber_loss(difference, torch.zeros_like(difference), reduction="none")
    else:
        difference = difference.square() if loss == "l2" else difference.abs()
    return difference.flatten(1).mean(1)


@torch.no_grad()
def errors(process, denoiser, x0, conditions, t, eps, loss="l2", measure="relative", batch=256):
    """The error of each of K conditions on each of S slots, (K, S), float32: the condition alone, without guidance.

    measure "relative": "own" over its mean in the slot, so that each slot counts alike, whatever the process and the
    prediction; where errors grow towards one end of the times, that end would decide alone. Others: see `error_of`.
    Published is "own" of a chain that predicts eps, the error of eps itself.

    denoiser: of a condition, as `objectives.Diffusion.denoiser`. x0 (1, C, H, W); conditions: K labels (K,), or a Text
    of K captions; t (S,) times of the process; eps (S, C, H, W). x_t is made once a slot; the network is called on
    `batch` pairs of a condition and a slot at once."""
    x0 = x0.expand_as(eps)
    xt, S = process.noised(x0, eps, t), len(t)
    found = []                                       # x_t and eps of a slot are the same for all conditions
    for pairs in torch.arange(len(conditions) * S, device=eps.device).split(batch):
        k, s = pairs // S, pairs % S
        d = denoiser(conditions[k])(xt[s], t[s])
        found.append(error_of(process, d, x0[s], eps[s], xt[s], t[s], loss, measure).float())
    found = torch.cat(found).view(len(conditions), S)
    return found / found.mean(0) if measure == "relative" and loss in ("l2", "l1", "huber") else found


# --------------------------------------------------------------------------------------------------- images to classify


def corrupted(x, kind, strength, generator):
    """Images (B, C, H, W) in [-1, 1], damaged. kind "noise": Gaussian, strength its standard deviation; "blur":
    Gaussian of so many pixels' standard deviation; "occlusion": a grey square of that share of the side, anywhere."""
    if kind == "noise":
        return (x + strength * torch.randn(x.shape, generator=generator).to(x.device)).clamp(-1, 1)
    if kind == "blur":
        reach = max(1, math.ceil(3 * strength))
        weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / strength) ** 2)
        weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
        for kernel, pad in ((weights, (reach, reach, 0, 0)), (weights.mT, (0, 0, reach, reach))):
            x = F.conv2d(F.pad(x, pad, mode="replicate"), kernel, groups=x.shape[1])
        return x
    x, (H, W) = x.clone(), x.shape[2:]
    height, width = round(strength * H), round(strength * W)
    for image, (u, v) in zip(x, torch.rand(len(x), 2, generator=generator).tolist()):
        top, left = int(u * (H - height + 1)), int(v * (W - width + 1))
        image[:, top:top + height, left:left + width] = 0
    return x


def corruption(text):
    """An argparse type: "noise:0.4" -> ("noise", 0.4)."""
    kind, _, strength = text.partition(":")
    if kind not in ("noise", "blur", "occlusion"):
        raise argparse.ArgumentTypeError(f"{text!r}: noise:STD, blur:PIXELS or occlusion:SHARE is wanted")
    return kind, build.number(0, 1 if kind == "occlusion" else 100, open_low=True)(strength)


def read_folder(folder, shape, classes):
    """The images below a folder: x (N, 3, H, W) in [-1, 1], labels (N,) by the names of the sub-folders, -1 without
    one. ValueError for images of another size than `shape`, and where there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in data.SUFFIXES)
    if not files:
        raise ValueError(f"--images {folder}: there are no PNG, JPEG, WebP or BMP images in it")
    images, labels = [], []
    for path in tqdm(files, desc="reading images", delay=2, leave=False):
        pixels = np.asarray(data.open_image(path)).transpose(2, 0, 1)
        if pixels.shape != tuple(shape):
            raise ValueError(f"--images: {path} is {pixels.shape[2]}x{pixels.shape[1]}, this run knows images of "
                             f"{shape[2]}x{shape[1]}: bring them to this size")
        images.append(pixels)
        name = path.relative_to(folder).parts[0]
        labels.append(classes.index(name) if name in classes else -1)
    return torch.from_numpy(np.stack(images)).float() / 127.5 - 1, torch.tensor(labels)


def read_latents(path, shape):
    """Latents from an .npz: arr_0 (N, C, h, w), and labels arr_1 (N,) if it holds some, else -1."""
    with np.load(path, allow_pickle=False) as file:
        x = torch.from_numpy(np.array(file["arr_0"])).float()
        y = torch.from_numpy(np.array(file["arr_1"])).long() if "arr_1" in file else torch.full((len(x),), -1)
    if x.shape[1:] != tuple(shape) or len(y) != len(x):
        raise ValueError(f"--images {path}: arr_0 is {tuple(x.shape)}, this model knows (N, "
                         f"{', '.join(map(str, shape))})")
    return x, y


def images_of(args, run):
    """(x (N, C, H, W), labels (N,), captions or None) of the images to classify, N of them or fewer."""
    objective = run.objective
    if args.images:
        path = Path(args.images).expanduser()
        if not path.exists():
            raise ValueError(f"--images {path}: there is no such folder or file")
        reading = read_latents(path, objective.shape) if path.suffix == ".npz" else \
            read_folder(path, objective.shape, run.config["classes"])
        return *(v[:args.n] for v in reading), None
    held_out = run.data("test")
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:args.n]
    captions = held_out.captions and [held_out.captions[i] for i in order.tolist()]
    return held_out.gather(order)[0], held_out.labels[order.to(held_out.labels.device)].cpu(), captions


class Candidates:
    """What an image may be: the labels of a run with classes; of a run with text captions that name each class.

    prompts: templates such as "a photo of a {}", {} is the class, several count as the best of them. None: the image's
    own caption with each class in the place of its own, or where there are no captions the class alone."""

    def __init__(self, run, prompts, captions, labels):
        self.objective, self.classes = run.objective, run.config["classes"] or []
        self.text = getattr(self.objective, "encoder", None) is not None
        self.prompts, self.captions, self.labels = prompts, captions, labels
        if self.text:
            self.classes = list(run.data("test").classes)
        elif not getattr(self.objective, "num_classes", 0):
            raise ValueError(f"{run.path} draws without classes or captions: there is nothing to choose from")
        elif prompts:
            raise ValueError(f"--prompt: {run.path} knows classes and reads no text")
        if not isinstance(self.objective, objectives.Diffusion):
            raise ValueError(f"{run.path} is no denoiser: this needs one that predicts noise under a condition")
        self.count = len(self.classes) if self.text else self.objective.num_classes
        if self.text and not self.classes:
            raise ValueError(f"{run.path}: its data have no classes to choose from")

    def name(self, k):
        return self.classes[k] if self.classes else str(k)

    def sentences(self, i):
        """The captions that stand for each class, a list for each template."""
        if self.prompts:
            return [[prompt.replace("{}", name) for name in self.classes] for prompt in self.prompts]
        if not self.captions:
            return [list(self.classes)]
        own = self.classes[self.labels[i]]
        if own not in self.captions[i].split():
            raise ValueError(f"caption {self.captions[i]!r} does not name its class {own!r}: give templates by "
                             "--prompt")
        return [[" ".join(name if word == own else word for word in self.captions[i].split()) for name in self.classes]]

    def conditions(self, i, device):
        """What the model is told for image i: (P K) of them, template by template."""
        if not self.text:
            return torch.arange(self.count, device=device)
        sentences = [sentence for group in self.sentences(i) for sentence in group]
        tokens = data.byte_tokens(sentences, self.objective.model.text_length)
        with torch.no_grad():
            return self.objective.encode(tokens.to(device))


# -------------------------------------------------------------------------------------------------------- the commands


def classify_flags(p):
    p.add_argument("run", type=runs.Run, nargs="?", help="folder of a run with classes, or with text")
    p.add_argument("--official", metavar="NAME", help="instead: the architecture of a published checkpoint")
    p.add_argument("--checkpoint", metavar="FILE", help="its file")
    p.add_argument("--images", metavar="FOLDER", help="images of the run's size, sub-folders are classes; or latents, "
                   "FILE.npz with arr_0 (N, C, h, w) and labels arr_1 (default: the run's test split)")
    p.add_argument("--n", type=build.positive, default=100, help="images (default: %(default)s)")
    p.add_argument("--keep", type=build.wholes, default=[5, 1], metavar="K,...",
                   help="classes that stay after each stage (default: 5,1)")
    p.add_argument("--samples", type=build.wholes, default=[50, 500], metavar="N,...",
                   help="times evaluated by the end of each stage (default: 50,500)")
    p.add_argument("--trials", type=build.positive, default=1, help="noises at each time (default: %(default)s)")
    p.add_argument("--loss", choices=LOSSES, default="l2", help="default: %(default)s")
    p.add_argument("--measure", choices=MEASURES, default="relative", help="own: error of what the run predicts, as "
                   "weighed in its training (published, where that is eps); eps, x0: of these; relative: own over the "
                   "mean of the classes at each time (default: %(default)s)")
    p.add_argument("--times", type=build.numbers(2, 0, T), default=[0, T], metavar="LOW,HIGH",
                   help="only such times, as networks are told them, 0 to 1000 (default: all)")
    p.add_argument("--unpaired", action="store_true", help="other times and noises for each class, to see what pairing "
                   "is worth")
    p.add_argument("--full", action="store_true", help="evaluate every class on every slot, and say what pruning would "
                   "have found, and what fewer slots")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="of a run with text: 'a photo of a {}' (may be "
                   "repeated: the best counts; default: the image's caption, or the class)")
    p.add_argument("--corrupt", type=corruption, metavar="KIND:STRENGTH",
                   help="damage the images: noise:STD, blur:PIXELS, occlusion:SHARE")
    p.add_argument("--beside", type=runs.Run, metavar="RUN", help="an ordinary classifier (a guide) on the same images")
    p.add_argument("--seed", type=build.count(0, 2**63 - 1), default=0, help="of the noises (default: %(default)s)")
    p.add_argument("--batch", type=build.positive, default=256, help="pairs at once (default: %(default)s)")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--weights", choices=["ema", "model"], default="ema",
                   help="averaged or last weights (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


class Table:
    """A file with a line of JSON for each image, after one of settings, by which it is named. What a run that was
    interrupted has written is read back; a torn last line is written again."""

    def __init__(self, folder, settings):
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        self.path = folder / f"classify-{key}.jsonl"
        lines = self.path.read_text().split("\n") if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines[1:-1]]
        text = "".join(json.dumps(row) + "\n" for row in [settings, *self.rows])
        runs.write(self.path, lambda path: path.write_text(text))

    def add(self, row):
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def settings_of(args, run):
    """What a table depends on."""
    names = ("images", "keep", "samples", "trials", "loss", "measure", "times", "unpaired", "full", "prompt", "corrupt",
             "seed", "precision", "weights")
    crc = 0
    for p in run.objective.parameters():
        crc = zlib.crc32(p.detach().cpu().float().numpy().tobytes(), crc)
    return {"run": run.path, "parameters": crc} | {name: getattr(args, name) for name in names}


def slot_errors(args, run, conditions, x):
    """error(candidates, times, slots) of `prune` for one image x (1, C, H, W). A slot's noise is a function of the seed
    and its number: the same for all images and candidates, but with --unpaired."""
    process, denoiser, device = run.objective.process, run.objective.denoiser, x.device

    def on(stream, chosen, grid, slots):
        noise = objectives.ImageNoise(args.seed, [stream * 10**6 + s for s in slots.tolist()], device)
        eps = noise.normal(*x.shape[1:])
        if args.unpaired:
            grid = (noise.uniform() * T).floor()
        t = slot_times(process, grid.to(device), *args.times)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            return errors(process, denoiser, x, conditions[chosen.to(device)], t, eps, args.loss, args.measure,
                          args.batch)

    def error(chosen, grid, slots):
        if args.unpaired:
            return torch.cat([on(1 + k, chosen[n:n + 1], grid, slots) for n, k in enumerate(chosen.tolist())])
        return on(0, chosen, grid, slots)

    return error


COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def verdict_row(args, error, count, classes):
    """What the table tells of one image, of `count` candidates: candidate k stands for class k % classes."""
    clock = time.perf_counter()
    whole = None
    if args.full:
        whole = prune(error, count, args.samples, [count] * (len(args.keep) - 1) + [1], T, args.trials)
        error = lambda chosen, grid, slots: whole.errors[chosen[:, None], slots]
    verdict = prune(error, count, args.samples, args.keep, T, args.trials)
    clock = time.perf_counter() - clock
    # The two best classes, on the slots that both have seen.
    rivals = next((r for r in reversed(verdict.survivors) if len({k % classes for k in r}) > 1), verdict.survivors[0])
    both = ~verdict.errors[rivals].isnan().any(0)
    order = [rivals[n] for n in verdict.errors[rivals][:, both].mean(1).argsort().tolist()]
    second = next((k for k in order if k % classes != verdict.winner % classes), verdict.winner)
    mean, error_ = paired_difference(*verdict.errors[[second, verdict.winner]][:, both])
    first = len(stages(args.samples)[0]) * args.trials
    row = {"class": verdict.winner % classes, "second": second % classes, "difference": mean, "standard_error": error_,
           "evaluations": (whole or verdict).evaluations, "seconds": clock,
           "mean": [None if math.isnan(v) else v for v in verdict.mean.tolist()],
           "times": verdict.times[:first].tolist(), "by_time": (verdict.errors[:, :first].argmin(0) % classes).tolist()}
    if whole is not None:
        slots = whole.times.argsort(stable=True)
        even = {n: slots[torch.arange(n) * len(slots) // n + len(slots) // n // 2] for n in COUNTS if n <= len(slots)}
        row |= {"pruned_evaluations": verdict.evaluations, "full_class": whole.winner % classes,
                "by_count": {str(n): int(whole.errors[:, some].mean(1).argmin()) % classes for n, some in even.items()}}
    return row


def classify(args):
    """Classify images by the class under which a denoiser predicts their noise best: the Diffusion Classifier."""
    if (args.run is None) != bool(args.official and args.checkpoint):
        raise ValueError("name the folder of a run, or --official NAME and --checkpoint FILE")
    if args.unpaired and args.measure == "relative":
        raise ValueError("--unpaired: classes that share no times have no mean at each: choose --measure own")
    run = args.run or build.open_published(args.official, args.checkpoint, args.device)
    x, labels, captions = images_of(args, run)
    candidates = Candidates(run, args.prompt, captions, labels)
    prune(lambda some, grid, slots: torch.zeros(len(some), len(slots)), candidates.count, args.samples, args.keep)
    if args.corrupt:
        x = corrupted(x, *args.corrupt, torch.Generator().manual_seed(args.seed))
    if args.compile:
        run.objective.model.compile()
    table = Table(run.folder, settings_of(args, run))
    if table.rows:
        print(f"{table.path} holds {len(table.rows)} images already")
    bar = tqdm(range(len(table.rows), len(x)), initial=min(len(table.rows), len(x)), total=len(x), unit=" images",
               desc="classifying")
    for i in bar:
        conditions = candidates.conditions(i, run.device)
        error = slot_errors(args, run, conditions, x[i:i + 1].to(run.device))
        table.add({"image": i, "label": int(labels[i])} | verdict_row(args, error, len(conditions), candidates.count))
        if labels[i] >= 0:
            bar.set_postfix_str(f"accuracy {accuracy(table.rows)[0]:.3f}", refresh=False)
    report(args, table.rows[:len(x)], candidates)
    if args.beside is not None:
        report_beside(args.beside, x, labels)
    if table.rows:
        picture = hardest(x, table.rows[:len(x)], candidates)
        figures.save(picture, table.path.with_suffix(".png"))
        print(f"table: {table.path}, the hardest images: {table.path.with_suffix('.png')}")


def accuracy(rows, key="class"):
    """(share of the labelled rows whose `key` is their label, its standard error)."""
    right = [row[key] == row["label"] for row in rows if row["label"] >= 0]
    share = statistics.fmean(right) if right else math.nan
    return share, math.sqrt(share * (1 - share) / len(right)) if right else math.nan


def report(args, rows, candidates):
    """Print what a table's rows say together."""
    if not any(row["label"] >= 0 for row in rows):
        print("no labels: " + ", ".join(f"{candidates.name(row['class'])}" for row in rows[:20]))
        return
    share, error = accuracy(rows)
    evaluations, seconds = (statistics.fmean(row[key] for row in rows) for key in ("evaluations", "seconds"))
    print(f"accuracy {share:.4f} +- {error:.4f} on {len(rows)} images, {candidates.count} classes; {evaluations:,.0f} "
          f"evaluations and {seconds:.2f} s an image ({args.loss}, {args.measure}"
          f"{', unpaired' if args.unpaired else ''}{', ' + ':'.join(map(str, args.corrupt)) if args.corrupt else ''})")
    tenths = [[] for _ in range(10)]
    for row in rows:
        for t, k in zip(row["times"], row["by_time"]):
            tenths[t * 10 // T].append(k == row["label"])
    print("by one time alone, least to most noise: "
          + " ".join(f"{statistics.fmean(some):.2f}" if some else "-" for some in tenths))
    if args.full:
        counts = {n: [row | {"class": row["by_count"][n]} for row in rows] for n in rows[0]["by_count"]}
        print("by so many times of each class: "
              + ", ".join(f"{n} {accuracy(found)[0]:.3f}" for n, found in counts.items()))
        kept = statistics.fmean(row["class"] == row["full_class"] for row in rows)
        cost = statistics.fmean(row["pruned_evaluations"] for row in rows)
        print(f"all of them {accuracy(rows, 'full_class')[0]:.4f}; pruning finds the same class in {kept:.4f} of the "
              f"images, with {cost:,.0f} evaluations")


@torch.no_grad()
def report_beside(run, x, labels):
    """Print the accuracy of an ordinary classifier on the same images."""
    guide = run.objective
    if not isinstance(guide, guides.Guide) or guide.dense or guide.shape != tuple(x.shape[1:]):
        raise ValueError(f"--beside {run.path}: a run of a classifier (a guide) of such images is wanted")
    found = torch.cat([guide.clean(some.to(run.device)).argmax(1).cpu() for some in x.split(256)])
    rows = [{"class": int(k), "label": int(y)} for k, y in zip(found, labels)]
    share, error = accuracy(rows)
    print(f"beside it {run.path}: accuracy {share:.4f} +- {error:.4f}")


def hardest(x, rows, candidates, count=24):
    """A picture of the images whose two best classes are least apart: the image, both classes, the difference of their
    errors with its standard error, as a bar."""
    ratio = lambda row: row["difference"] / max(row["standard_error"], 1e-12)
    rows = sorted(rows, key=ratio)[:count]
    font, side, W = ImageFont.load_default(14), 72, 640
    picture = Image.new("RGB", (W, 30 + side * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 8), "the hardest images: mean error of the second class less that of the best, +- its standard error",
              figures.INK, font)
    widest = max([row["difference"] + row["standard_error"] for row in rows if math.isfinite(row["standard_error"])],
                 default=1.0) or 1.0
    for n, row in enumerate(rows):
        top = 30 + side * n
        tile = Image.fromarray(figures.to_uint8(x[row["image"]][None].cpu())[0])
        picture.paste(tile.resize((64, 64), Image.NEAREST), (8, top))
        known = row["label"] >= 0
        right = row["class"] == row["label"]
        colour = figures.INK if right or not known else figures.COLOURS[1]
        words = f"{candidates.name(row['class'])}, then {candidates.name(row['second'])}"
        words += f"; it is {candidates.name(row['label'])}" if known and not right else ""
        draw.text((84, top + 6), words, colour, font)
        draw.text((84, top + 26), f"{row['difference']:.3g} +- {row['standard_error']:.2g}", figures.GREY, font)
        left, right_end = 360, W - 20
        place = lambda v: left + max(0.0, min(1.0, v / widest)) * (right_end - left)
        low, high = (row["difference"] + sign * row["standard_error"] for sign in (-1, 1))
        draw.rectangle([left, top + 12, max(left + 1, place(row["difference"])), top + 24], fill=figures.COLOURS[0])
        draw.line([place(low), top + 18, place(high), top + 18], fill=figures.INK, width=2)
    return picture


# ----------------------------------------------------------------------------------------------- pairs of swapped words


def swaps_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run of --data shapes with text")
    p.add_argument("--n", type=build.positive, default=50, help="pairs of images of each kind (default: %(default)s)")
    p.add_argument("--samples", type=build.positive, default=100, metavar="N", help="times (default: %(default)s)")
    p.add_argument("--seed", type=build.count(0, 2**63 - 1), default=0, help="of the noises (default: %(default)s)")
    p.add_argument("--batch", type=build.positive, default=256, help="evaluations at once (default: %(default)s)")
    p.add_argument("--weights", choices=["ema", "model"], default="ema",
                   help="averaged or last weights (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def swapped_pairs(captions, words, n):
    """Up to n pairs (i, j) of captions that differ in one of the words alone."""
    same, pairs = {}, []
    for i, caption in enumerate(captions):
        key = " ".join("*" if word in words else word for word in caption.split())
        other = next((j for j in same.get(key, []) if captions[j] != caption), None)
        if other is None:
            same.setdefault(key, []).append(i)
        else:
            same[key].remove(other)
            pairs.append((other, i))
    return pairs[:n]


def swaps(args):
    """Which of two captions, one word apart, belongs to which of two images: a run with text as Winoground asks it."""
    run, objective = args.run, args.run.objective
    if getattr(objective, "encoder", None) is None or run.config["data"].partition(":")[0] != "shapes":
        raise ValueError(f"{run.path}: this asks runs that learned the captions of --data shapes")
    held_out, process = run.data("test"), objective.process
    eps = objectives.ImageNoise(args.seed, range(args.samples), run.device).normal(*objective.shape)
    t = slot_times(process, torch.tensor(stages([args.samples])[0], device=run.device))
    print("one word apart       pairs  images told right  both of a pair (text score)     by chance: 0.5, 0.25")
    for kind, words in {"colour": list(data.COLOURS), "shape": data.SHAPES}.items():
        right = []
        for pair in tqdm(swapped_pairs(held_out.captions, words, args.n), desc=kind, delay=2, leave=False):
            x, _ = held_out.gather(torch.tensor(pair))
            with torch.no_grad():
                tokens = data.byte_tokens([held_out.captions[i] for i in pair], objective.model.text_length)
                conditions = objective.encode(tokens.to(run.device))
            found = [errors(process, objective.denoiser, image[None], conditions, t, eps, batch=args.batch).mean(1)
                     for image in x]
            right.append([bool(found[0][0] < found[0][1]), bool(found[1][1] < found[1][0])])
        images, both = statistics.fmean(map(statistics.fmean, right)), statistics.fmean(map(all, right))
        print(f"{kind:20}{len(right):6}{images:19.3f}{both:17.3f} +- {math.sqrt(both * (1 - both) / len(right)):.3f}")
