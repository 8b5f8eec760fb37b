"""Train a model:  python train.py --data cifar10 --model dit-nano:depth=8 --out runs/my-run

Without any flag it learns to draw small shapes in a few minutes on a laptop's CPU (the flags in recipes/shapes.txt).
A file of flags is read with @: python train.py @recipes/cifar10-unet.txt --steps 1000. What is chosen by name takes
options: NAME:option=value,option=value. The same command again goes on with a run that was interrupted.

  --list [WORD]   everything there is to choose from        --help NAME   what that is, and its options
  --help all      every flag                                torchrun --nproc-per-node 2 train.py ...   two GPUs
"""

import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import build
import diffusion
import figures
import kernels
import objectives
import optim
import parallel
import runs
import scores
import speed
from build import number, positive

RECIPE = Path(__file__).parent / "recipes" / "shapes.txt"            # read where no flag is given

# ---------------------------------------------------------------------------------------------------------------- flags


def flags(every=True):
    """The flags; every=False: the help of the twenty that most people need, no other is shown."""
    p = build.Flags(prog="train.py", description=__doc__, fromfile_prefix_chars="@", add_help=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python train.py [@recipe] [--flag value ...]")
    word, whole, run = {"metavar": "NAME"}, {"type": positive, "metavar": "N"}, {"metavar": "RUN"}
    switch = {"action": "store_true"}

    def group(title, *rows, common=True):
        """Rows of (flag, default, help, argparse options)."""
        g = p.add_argument_group(title)
        for flag, default, text, given in rows:
            text += "" if default in (None, False, {}) else " (default: %(default)s)"
            g.add_argument(flag, default=default, help=text if every or common else argparse.SUPPRESS, **given)

    group("what",
          ("--data", "shapes", "data set", word),
          ("--data-dir", "data", "folder that holds its files; of --data folder: the images", {"metavar": "FOLDER"}),
          ("--model", "unet-pico", "model of any kind, see --list", word),
          ("--tokenizer", None, "train on what this tokenizer makes of the images: a run of one, or a published "
           "autoencoder's file", {"metavar": "RUN|FILE"}),
          ("--process", "flow", "path from data to noise", word),
          ("--prediction", "own", "what the network predicts: " + ", ".join(diffusion.PREDICTIONS)
           + ", or own: what the process's paper predicts", word))
    group("how long and how fast",
          ("--steps", 2000, "optimiser steps", whole),
          ("--batch", 32, "images a step, over all GPUs and micro-batches together", whole),
          ("--optimiser", None, "what moves the weights: muon (small models learn in fewer steps) or adamw (default: "
           "the model's own)", word),
          ("--lr", None, "learning rate (default: the model's own, or that of --optimiser)",
           {"type": number(0, 1e30), "metavar": "RATE"}),
          ("--warmup", 100, "steps in which it rises from 0", {"type": build.count(0, 10**9), "metavar": "N"}),
          ("--decay", "linear", "then: constant, or linear or cosine down to 0",
           {"choices": ["constant", "linear", "cosine"]}),
          ("--ema", 0.995, "decay of the averaged weights that samples are drawn from",
           {"type": number(0, 0.9999999), "metavar": "DECAY"}),
          ("--seed", 0, "all randomness is a function of seed and step",
           {"type": build.count(0, 2**63 - 1), "metavar": "N"}))
    group("where, and what is written",
          ("--out", None, "folder of the run (default: runs/<data>-<model>)", {"metavar": "FOLDER"}),
          ("--resume", None, "go on with the run in --out as it was started, or from the checkpoint FILE",
           {"nargs": "?", "const": "newest", "metavar": "FILE"}),
          ("--overwrite", False, "replace the run that is in the folder", switch),
          ("--device", "auto", "cuda, mps, cpu or auto", word),
          ("--sample-every", 1000, "steps between pictures; 0: one at the end only",
           {"type": build.count(0, 10**9), "metavar": "N"}),
          ("--draw", {}, "how pictures are drawn, for example steps=20,guidance=3,sampler=dpmpp-2m",
           {"type": drawing, "metavar": "OPTION=VALUE,..."}))
    group("data, more",
          ("--subset", None, "train only on images whose caption (or class name) this regular expression finds",
           {"metavar": "REGEX"}),
          ("--unconditional", False, "ignore the labels and captions", switch),
          ("--text", "bytes", "what a model of text reads: bytes of the captions (of the class names where there are "
           "none), or npz: embeddings computed before, x.npz beside x.jpg", {"choices": ["bytes", "npz"]}),
          common=False)
    group("diffusion, more",
          ("--weighting", "own", "weight of the loss over noise levels: own (plain on what is predicted), "
           + ", ".join(diffusion.WEIGHTINGS), word),
          ("--density", "own", "distribution of the training times: own (the process's), "
           + ", ".join(diffusion.DENSITIES), word),
          ("--label-drop", 0.1, "share of labels or captions replaced by the null one, which guidance needs",
           {"type": number(0, 1), "metavar": "SHARE"}), common=False)
    group("ways to begin",
          *((f"--{name}", None, build.line(way), run) for name, way in build.WAYS.items()),
          ("--official", None, "architecture of a published file that one of these names, where its weights do not "
           "tell it", word), common=False)
    group("optimisation, more",
          ("--accum", 1, "micro-batches a step: less memory, same result", whole),
          ("--weight-decay", 0.0, "weight decay", {"type": number(0, 1e6), "metavar": "W"}),
          ("--clip", 1.0, "largest norm of the gradient; 0 does not clip",
           {"type": number(0, 1e30), "metavar": "NORM"}),
          ("--precision", "auto", "fp32, bf16 (autocast), or auto: bf16 on CUDA, else fp32",
           {"choices": ["auto", "fp32", "bf16"]}),
          ("--compile", False, "torch.compile the model (the first step takes a minute)", switch),
          ("--kernels", kernels.mode, "Triton's kernels: off, auto (on GPUs where they work) or on (or an error)",
           {"choices": kernels.MODES}),
          ("--remat", False, "compute the insides of blocks twice: less memory, a third more time", switch),
          ("--shard", False, "cut weights, gradients and optimiser over the processes of torchrun: for a model that "
           "one GPU cannot hold", switch),
          ("--deterministic", False, "refuse operations that are not reproducible (slower on CUDA)", switch),
          common=False)
    group("output, more",
          ("--log-every", 20, "steps between lines of metrics.jsonl", whole),
          ("--save-every", 500, "steps between checkpoints", whole),
          ("--sample-n", 64, "images in a picture", whole),
          ("--score-every", 0, "steps between measurements of class accuracy and Frechet distance (a classifier of the "
           "data set, trained once); the best checkpoint is kept as ckpt.best.pt; 0: none",
           {"type": build.count(0, 10**9), "metavar": "N"}),
          ("--score-n", 256, "images drawn for one", whole),
          ("--dry-run", False, "print the settings as JSON and leave", switch),
          ("--list", None, "print everything there is to choose from (what holds WORD) and leave",
           {"nargs": "?", "const": "", "metavar": "WORD"}),
          ("--help", None, "print this (all: every flag; NAME: of anything that has a name) and leave",
           {"nargs": "?", "const": "", "metavar": "NAME"}), common=False)
    return p


def drawing(text):
    """--draw's argparse type."""
    try:
        return build.options_of_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse(argv):
    """(config, overwrite, folder, checkpoint or None). A resumed run's own settings are the defaults of the flags."""
    parser = flags()
    if not argv:
        print(f"no flags: those of {RECIPE.name} are used")
        argv = [f"@{RECIPE}"]
    args = parser.parse_args(argv)
    if args.help is not None or args.list is not None:
        pages = build.listing(args.list) if args.list is not None else \
            build.explain(args.help) if args.help not in ("", "all") else [flags(args.help == "all").format_help()]
        print(*pages, sep="\n")
        raise SystemExit
    build.adopt(vars(args))
    name = build.split_name(args.data)[0], build.split_name(args.model)[0]
    folder, checkpoint = Path(args.out or f"runs/{'-'.join(name).replace('/', '-')}").expanduser(), None
    if args.resume:
        path = folder / "ckpt.pt" if args.resume == "newest" else Path(args.resume).expanduser()
        checkpoint = parts_of(folder) if args.resume == "newest" else None
        if not checkpoint and not path.exists():
            raise FileNotFoundError(f"--resume: there is no checkpoint {path}; name the run's folder by --out, or "
                                    "leave --resume out to start it")
        folder, checkpoint = path.parent, checkpoint or runs.load_checkpoint(path)
        checkpoint["config"] = build.upgraded(checkpoint["config"])
        args = parser.parse_args(argv, argparse.Namespace(**copy.deepcopy(checkpoint["config"])))
        build.adopt(vars(args))
    elif runs.holds_run(folder) and not args.overwrite and (parts_of(folder) or (folder / "ckpt.pt").exists()):
        checkpoint = parts_of(folder) or runs.load_checkpoint(folder / "ckpt.pt")     # the same command again goes on
        checkpoint["config"] = build.upgraded(checkpoint["config"])
    config = {key: value for key, value in vars(args).items()
              if key not in ("out", "resume", "overwrite", "list", "help")}
    config["version"] = build.VERSION
    build.own_optimiser(config)
    build.check_settings(config)
    if checkpoint:                                                    # what data and ways to begin said is kept
        config = checkpoint["config"] | config
        if config["steps"] != checkpoint["config"]["steps"] and config["decay"] != "constant":
            print(f"--steps was {checkpoint['config']['steps']:,} and is now {config['steps']:,}: the decay of the "
                  f"learning rate ({config['decay']}) is stretched, so the rate jumps here")
    return config, args.overwrite, folder, checkpoint


def parts_of(folder):
    """The checkpoint that a sharded run left which did not end: {config, parts: the folder of its parts}, or None."""
    parts = folder / "ckpt.parts"
    return {"config": json.loads((folder / "config.json").read_text()), "parts": parts} if parts.exists() else None


# ------------------------------------------------------------------------------------------------------------- training


class Place:
    """This process's place among those of a torchrun, its device, and what all of them must do together."""

    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        several_gpus = self.world > 1 and config["device"] == "auto" and torch.cuda.is_available()
        self.device = build.device(f"cuda:{os.environ['LOCAL_RANK']}" if several_gpus else config["device"])
        cuda = self.device.type == "cuda"
        automatic = cuda and torch.cuda.is_bf16_supported()
        self.bf16 = config["precision"] == "bf16" or (config["precision"] == "auto" and automatic)
        if config["batch"] % (self.world * config["accum"]):
            raise ValueError(f"--batch {config['batch']} does not divide into {self.world} processes x "
                             f"{config['accum']} micro-batches (--accum)")
        if config["shard"] and (self.world == 1 or config["score_every"]
                                or build.split_name(config["optimiser"])[0] != "adamw"):
            raise ValueError("--shard cuts a model over several processes (torchrun --nproc-per-node 2 train.py ...), "
                             "and goes with --optimiser adamw and without --score-every")
        if config["precision"] == "bf16" and speed.bf16_is_slow(self.device):
            print(f"warning: this {self.device.type} has no units for bfloat16 and imitates them, slowly: --precision "
                  "fp32 is faster", file=sys.stderr)
        kernels.choose(config["kernels"])
        self.kernels = kernels.report(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if config["deterministic"]:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    @contextlib.contextmanager
    def first_alone(self):
        """The first process does it alone (downloads, converts), then the others."""
        if self.world > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier()

    def means(self, values):
        """{name: tensor} -> {name: its mean over all processes}, a number where it is a scalar."""
        flat = torch.cat([value.flatten() for value in values.values()])
        if self.world > 1:
            dist.all_reduce(flat)
        parts = (flat / self.world).cpu().split([value.numel() for value in values.values()])
        return {name: part.item() if value.ndim == 0 else part.view_as(value)
                for (name, value), part in zip(values.items(), parts)}

    def leave(self):
        if self.world > 1:
            time.sleep(0.1)  # gloo's threads, joined below without letting go of the interpreter, need it once more
            dist.destroy_process_group()


def picture(objective, config, options, stop):
    """A grid of the preview: the same noise and conditions at every step. None if it was asked to stop."""
    device = next(objective.parameters()).device
    conditions = build.preview_conditions(objective, options, config["sample_n"])
    batches = list(build.draw(objective, config["sample_n"], config["seed"], 64, conditions, device, stop=stop,
                              **options))
    if stop:
        return None
    images = torch.cat([x.cpu() for x in batches])
    return figures.grid(figures.to_uint8(images), figures.columns(conditions))


def loss_curve(entries):
    """The loss over the steps, raw and averaged, as a picture."""
    entries = [e for e in entries if "loss" in e]                   # not those of a score
    steps, raw = [e["step"] for e in entries], [e["loss"] for e in entries]
    return figures.curves({"_raw": (steps, raw), "running mean": (steps, figures.running_mean(raw))}, "training loss",
                          "step", "loss")


def assemble(config, checkpoint, place):
    """(dataset, objective, learner: what the loop trains, averages, optimiser, options for drawing, (parameters,
    MACs)), and what the data and the ways to begin say goes into the config. What cannot be is refused here, before
    anything is written."""
    begin = build.ways(config)
    if not checkpoint:
        for way, run, _ in begin:
            way.prepare(config, run)
    with place.first_alone():
        dataset = build.load_data(config, "train", place.device)
    dataset = dataset.subset(config["subset"]) if config["subset"] else dataset
    if config["tokenizer"]:
        with place.first_alone():
            dataset = build.tokenized(config, dataset)
    build.describe(config, dataset)
    if not checkpoint:
        for way, run, _ in begin:
            way.adapt(config, run)
    torch.manual_seed(config["seed"])
    objective = build.build(config, "cpu" if config["shard"] else place.device)
    if config["text"] == "npz" and dataset.text is not None:
        objective.examples = dataset.condition(torch.arange(min(8, len(dataset)))).to("cpu")
    if hasattr(objective, "meet"):                                   # what it wants of the data beside batches
        objective.meet(dataset)
    options = build.drawing_options(objective, config["draw"], place.device)
    if not config["shard"]:
        build.rehearse(objective, options, place.device)
    if not checkpoint:
        for way, run, _ in begin:
            way.fill(objective, config, run)
    learner = objective
    for way, run, more in begin:
        learner = way.wrap(learner, config, run, **more)
    counts = build.checked_cost(objective, config)
    if config["remat"]:
        parallel.remat(getattr(objective, "model", objective))
    average = parallel.shard(objective, place.device) if config["shard"] else None
    averages, optimiser = optim.Averages(objective, config["ema"], average), build.build_optimiser(objective, config)
    return dataset, objective, learner, averages, optimiser, options, counts


def resume(checkpoint, config, folder, objective, averages, optimiser):
    """Put a checkpoint's state in place; returns its step. ValueError if its settings compute something else."""
    runs.check_resumable(folder, checkpoint["config"], config)
    if config["shard"] or "parts" in checkpoint:
        return resume_sharded(checkpoint, folder, objective, averages, optimiser)
    build.load_weights(objective, checkpoint["model"], folder)
    build.load_weights(averages.model, checkpoint["ema"], folder)
    optimiser.load_state_dict(checkpoint["optimiser"])
    return checkpoint["step"]


def states(objective, averages, optimiser):
    return {"model": objective.state_dict(), "ema": averages.model.state_dict(), "optimiser": optimiser.state_dict()}


def resume_sharded(checkpoint, folder, objective, averages, optimiser):
    """The same of a run that is sharded, or was until now: from its parts, or from the usual file."""
    parallel.prime(optimiser)
    state = states(objective, averages, optimiser)
    if "parts" in checkpoint:
        step = parallel.load(checkpoint["parts"], state)
    else:
        step, state = checkpoint["step"], parallel.like({key: checkpoint[key] for key in state}, state)
    objective.load_state_dict(state["model"])
    averages.model.load_state_dict(state["ema"])
    optimiser.load_state_dict(state["optimiser"])
    return step


def noise_levels(sums):
    """The mean loss and error of x0 in each bin of `objectives.by_noise`; None where no sample fell."""
    *kinds, counts = sums.tolist()
    return {f"{name}_by_noise": [round(value / n, 6) if n else None for value, n in zip(values, counts)]
            for name, values in zip(("loss", "error"), kinds)}


class Record:
    """What a run leaves in its folder; the first process alone writes."""

    def __init__(self, folder, config, first, place, macs):
        self.folder, self.config, self.place, self.macs = folder, config, place, macs
        self.writer, self.entries = place.rank == 0, []
        writer = self.writer
        if writer:
            self.held = runs.lock(folder)                          # as long as this record lives
            runs.start(folder, config, resume=first > 0)
            self.entries = runs.history(folder, until=first)
        self.window, self.clock = [], time.perf_counter()

    def log(self, step, means, last, **more):
        """Keep a step's losses, and every so many steps write the line of their means; returns that line or None."""
        self.window = [*self.window, means][-self.config["log_every"]:]
        if not self.writer or not (step % self.config["log_every"] == 0 or last):
            return None
        now = time.perf_counter()
        entry = {"step": step} | {name: sum(w[name] for w in self.window) / len(self.window) for name in means} | more
        if "by_noise" in entry:
            entry |= noise_levels(entry.pop("by_noise"))
        entry["tmacs"] = 3e-12 * self.macs * self.config["batch"] * step       # so far: one pass forward and two back
        entry["images_per_s"] = len(self.window) * self.config["batch"] / (now - self.clock)
        entry |= speed.utilisation(self.macs, entry["images_per_s"], self.place.device, self.place.world)
        runs.log(self.folder, entry)
        self.entries.append(entry)
        self.window, self.clock = [], now
        return entry

    def save(self, step, last, objective, averages, optimiser):
        """The checkpoint of a step. A sharded run's processes write their parts, and at the end the usual file."""
        if not (self.writer or self.config["shard"]):
            return
        state = states(objective, averages, optimiser)
        if self.config["shard"]:
            parallel.save(self.folder / "ckpt.parts", state, step)
            state = parallel.whole(state) if last else {}
        if state:
            runs.save_checkpoint(self.folder, {"config": self.config, "step": step, **state})
            for name in ("ckpt.parts", "ckpt.parts.prev"):
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def score(self, step, scorer, averages, options):
        """Measure what the averaged weights draw, log it, and keep the checkpoint (just saved) if it is the best."""
        result = scorer(averages.model, options)
        best = min((e["frechet"] for e in self.entries if "frechet" in e), default=math.inf)
        entry = {"step": step} | result
        runs.log(self.folder, entry)
        self.entries.append(entry)
        if result["frechet"] < best:
            runs.write(self.folder / "ckpt.best.pt", lambda path: runs.link(self.folder / "ckpt.pt", path))
        self.clock = time.perf_counter()

    def show(self, step, averages, options, stop):
        """The pictures, after the checkpoint: what goes wrong here is a warning."""
        if not (self.writer or self.config["shard"]):                  # a sharded model draws in all its processes
            return
        try:
            stop = False if self.config["shard"] else stop
            grid = picture(averages.model, self.config, options, stop) if options is not None else None
            if self.writer:
                figures.save(loss_curve(self.entries), self.folder / "loss.png")
            if self.writer and grid:
                figures.save(grid, self.folder / "samples" / f"step_{step:07d}.png")
        except (ValueError, OSError, RuntimeError) as error:
            print(f"warning: no picture of step {step:,}: {error}", file=sys.stderr)
        self.clock = time.perf_counter()


def gradients(learner, dataset, config, place, step):
    """The losses of a step, {name: tensor}, and their gradients. Step s sees the batch, the noise and the dropout of
    (seed, s), whatever came before; ranks and micro-batches take their rows of the same batch."""
    torch.manual_seed(objectives.seeded(config["seed"], step, place.rank).initial_seed())
    indices, flips = dataset.plan(step, config["batch"], config["seed"])
    share, sums = config["batch"] // (place.world * config["accum"]), {}
    for micro in range(config["accum"]):
        start = (place.rank * config["accum"] + micro) * share
        rows = slice(start, start + share)
        x, y = dataset.gather(indices[rows], flips[rows])
        noise = objectives.StepNoise(config["seed"], step, config["batch"], rows, place.device)
        wait = place.world > 1 and micro < config["accum"] - 1 and not config["shard"]
        once = learner.no_sync if wait else contextlib.nullcontext
        with once():                                               # gradients are exchanged once a step
            with torch.autocast(place.device.type, torch.bfloat16, enabled=place.bf16):
                losses = learner({"x": x, "y": y, "step": step, "noise": noise})
            (losses["loss"] / config["accum"]).backward()
        sums = {k: sums.get(k, 0) + v.detach().float() / config["accum"] for k, v in losses.items()}
    return sums


def train():
    config, overwrite, folder, checkpoint = parse(sys.argv[1:])
    place = Place(config)
    dataset, objective, learner, averages, optimiser, options, (parameters, macs) = assemble(config, checkpoint, place)
    if config["dry_run"]:
        print(build.shown(config))
        return
    first = resume(checkpoint, config, folder, objective, averages, optimiser) if checkpoint else 0
    if config["compile"]:
        getattr(objective, "model", objective).compile()
    if place.world > 1 and not config["shard"]:
        learner = DistributedDataParallel(learner)
    writer = place.rank == 0
    if writer:
        print(headline(config, dataset, parameters, macs, place), "|", folder, f"from step {first:,}" if first else "")
        print(place.kernels)
    scorer = scores.Scorer(config, dataset, place.device) if writer and config["score_every"] else None
    record = Record(folder, config, first, place, macs)
    weights = optim.trained(objective)
    stop, step = runs.Stop(), first
    bar = tqdm(range(first, config["steps"]), initial=first, total=config["steps"], unit=" steps", mininterval=0.5,
               disable=not writer)
    for step in bar:
        # Gradients, at this step's rate.
        rate = optim.learning_rate(config, step)
        optim.set_rate(optimiser, rate)
        losses = gradients(learner, dataset, config, place, step)
        optim.rest_paused(weights)
        norm = parallel.full(torch.nn.utils.clip_grad_norm_(weights, config["clip"] or math.inf)).item()

        # What all processes must agree on: the losses, and whether to stop. A step that is not finite is not taken.
        means = place.means(losses | {"stop": torch.tensor(float(bool(stop)), device=place.device)})
        stopping = means.pop("stop")
        check_finite(step, means["loss"], norm, folder)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        averages.update(step)

        # Log, save, draw.
        step += 1
        last = step == config["steps"] or stopping > 0
        if entry := record.log(step, means, last, grad_norm=norm, lr=rate):
            bar.set_postfix_str(f"loss {entry['loss']:.4f}, {entry['images_per_s']:,.0f} images/s", refresh=False)
        drawn = step == config["steps"] or (config["sample_every"] and step % config["sample_every"] == 0)
        scored = scorer and (step % config["score_every"] == 0 or last)
        saved = step % config["save_every"] == 0 or last or scored
        if saved:
            record.save(step, last, objective, averages, optimiser)
        if scored and not stop:
            record.score(step, scorer, averages, options)
        if saved or drawn:
            record.show(step, averages, options if drawn else None, stop)
        if stopping > 0:
            break
    bar.close()
    if writer:
        print(farewell(folder, step, config["steps"]))
    place.leave()


def headline(config, dataset, parameters, macs, place):
    """What is trained on what and where, in one line."""
    return (f"{config['network']}: {parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} GMACs an image | "
            f"{config['data']}: {len(dataset):,} {dataset.kind}, {'x'.join(map(str, dataset.shape[1:]))}, "
            f"{len(config['classes'])} classes | {place.world} x {place.device.type}, "
            f"{'bf16' if place.bf16 else 'fp32'}")


def check_finite(step, loss, norm, folder):
    """ValueError, and so the end of the run with its last checkpoint untouched, if the step cannot be taken."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    newest = folder / "ckpt.pt"
    good = f" The last good checkpoint is {newest}." if newest.exists() else ""
    raise ValueError(f"at step {step + 1} the loss is {loss:.4g} and the gradient's norm {norm:.4g}; the step was not "
                     f"taken.{good} Try a lower --lr, a longer --warmup, or --clip 1")


def farewell(folder, step, steps):
    """What to do next."""
    if step < steps:
        return f"stopped; saved at step {step:,}: `python train.py --out {folder} --resume` goes on"
    return (f"done: pictures in {folder / 'samples'}\n  to draw more:    python sample.py {folder}\n"
            f"  to measure them: python evaluate.py score {folder}")


if __name__ == "__main__":
    build.command(train)
