"""Train a diffusion model:  python train.py --data cifar10 --model unet-cifar --out runs/my-run

Without flags it learns to draw small shapes in a few minutes on a laptop's CPU. `--list` prints every model, dataset,
process and sampler. A file of flags is read with @: python train.py @recipes/cifar10-unet.txt --steps 1000
More than one GPU: torchrun --nproc-per-node 2 train.py ... with the same flags (--batch is the batch of all together).
"""

import argparse
import contextlib
import copy
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import diffusion
import figures
import layers
import moe
import objectives
import runs
from models import MODELS, FlagDiT, cost, create_model

# ---------------------------------------------------------------------------------------------------------------- flags


class Flags(argparse.ArgumentParser):
    """argparse whose @files hold any number of words a line, and # comments."""

    def convert_arg_line_to_args(self, line):
        return line.split("#")[0].split()


def flags():
    p = Flags(prog="train.py", description=__doc__, fromfile_prefix_chars="@",
              formatter_class=argparse.RawDescriptionHelpFormatter)
    switch, word, whole = {"action": "store_true"}, {"metavar": "NAME"}, {"type": runs.positive, "metavar": "N"}
    folder, either = {"metavar": "FOLDER"}, {"action": argparse.BooleanOptionalAction}

    def group(title, *rows):
        """Rows of (flag, default, help[, argparse options]); without options the default's type is the flag's."""
        g = p.add_argument_group(title)
        for flag, default, text, *given in rows:
            extra = given[0] if given else {"type": type(default), "metavar": type(default).__name__.upper()}
            text += "" if default in (None, False, {}) else " (default: %(default)s)"
            g.add_argument(flag, default=default, help=text, **extra)

    group("run",
          ("--out", None, "folder of the run (default: runs/<data>-<model>)", folder),
          ("--resume", None, "go on with the run in --out from its newest checkpoint, or from the checkpoint FILE",
           {"nargs": "?", "const": "newest", "metavar": "FILE"}),
          ("--overwrite", False, "replace the run that is in the folder", switch),
          ("--steps", 1800, "optimiser steps", whole),
          ("--seed", 0, "all randomness is a function of seed and step"),
          ("--device", "auto", "cuda, mps, cpu or auto", word),
          ("--deterministic", False, "refuse operations that are not reproducible (slower on CUDA)", switch),
          ("--dry-run", False, "print the settings as JSON and leave", switch),
          ("--list", None, "print every dataset, process, sampler and model (those with WORD in the name) and leave",
           {"nargs": "?", "const": "", "metavar": "WORD"}))
    group("data",
          ("--data", "shapes", "dataset: " + ", ".join(data.DATASETS), word),
          ("--data-dir", "data", "folder that holds the dataset's files", folder),
          ("--image-size", None, "side in pixels (default: the dataset's own)", whole),
          ("--aspect", "square", "of shapes and folder, for models of any size: square; keep: every image in its own "
           "ratio, of at most image-size x image-size pixels (FiT); mixed: half of the large ones as squares (FiTv2); "
           "crop, of folder: each cut to one of the four sizes of as many patches that lose least of it (Lumina)",
           {"choices": ["square", "keep", "mixed", "crop"]}),
          ("--flip", None, "random horizontal flips (default: yes for photographs)", either),
          ("--download", True, "fetch CIFAR from its home page if it is not there", either),
          ("--bad-images", "error", "what to do about broken files of --data folder: error or skip",
           {"choices": ["error", "skip"]}),
          ("--text", "bytes", "what a model of text reads: bytes of the captions (of the class names where there are "
           "none), or npz: embeddings computed before, x.npz beside x.jpg", {"choices": ["bytes", "npz"]}),
          ("--subset", None, "train only on images whose caption (or class name) this regular expression finds",
           {"metavar": "REGEX"}),
          ("--unconditional", False, "ignore the labels and captions", switch))
    group("model",
          ("--model", "unet-pico", "name of a model, see --list", word),
          ("--model-options", {}, "change its preset, for example depth=4,hidden_size=96",
           {"type": runs.options, "metavar": "NAME=VALUE,..."}),
          ("--post-train", None, "go on from a FiT run's averaged weights at a larger --image-size: only patch "
           "embedding, read-out, biases and modulations learn, positions scale by vision-ntk (FiTv2)",
           {"metavar": "RUN"}),
          ("--moe", None, "replace every feed-forward network of a transformer by E experts, K of them for each token",
           {"type": runs.wholes, "metavar": "E,K"}),
          ("--balance", 0.01, "weight of the loss that keeps experts equally busy"),
          ("--start-from", None, "begin with the averaged weights of another run of this model: a second stage on "
           "chosen images (--subset), or at a higher --image-size, where positions are interpolated",
           {"metavar": "RUN"}),
          ("--inherit", None, "begin with all weights of a run but its attention's (LiT, from a DiT of its size)",
           {"metavar": "RUN"}),
          ("--distill", None, "also learn from the predictions of a frozen run (LiT)", {"metavar": "RUN"}),
          ("--distill-shares", [0.5, 0.05], "weights of the distance in prediction and in variance",
           {"type": runs.floats, "metavar": "P,V"}),
          ("--distill-log-variance", False, "compare log variances, not the raw channels", switch),
          ("--upcycle", None, "start a model with experts from the run of the same model with one expert "
           "(--model-options num_experts=1,top_k=1) in FOLDER", folder),
          ("--ternary", False, "weights of -a, 0 or a in all linear layers of the blocks, as in TerDiT", switch))
    group("diffusion",
          ("--process", "flow", "path from data to noise: " + ", ".join(diffusion.PROCESSES), word),
          ("--prediction", "x0", "what the network predicts: " + ", ".join(diffusion.PREDICTIONS)
           + ", or own: what the process's paper predicts (eps for the chains, flow for flow, edm for edm)", word),
          ("--weighting", "own", "weight of the loss over noise levels: none (plain on what is predicted), own (as "
           "none, but for flow as if eps - x0 were predicted), " + ", ".join(diffusion.WEIGHTINGS), word),
          ("--density", None, "distribution of the training times (default: the process's own): "
           + ", ".join(diffusion.DENSITIES), word),
          ("--shift", 1.0, "multiplies sigma/alpha at every time: above 1 for larger images"),
          ("--learned-variance", False, "learn the variances of a chain's steps too (DiT's hybrid loss)", switch),
          ("--objective", None, "of a chain: hybrid (the simple loss; with learned variances also the bound's term), "
           "rescaled (that term times T/1000), vlb (the bound), kl (one term of it) (default: hybrid)",
           {"choices": list(diffusion.OBJECTIVES)}),
          ("--label-drop", 0.1, "share of labels or captions replaced by the null one, which guidance needs"))
    group("optimisation",
          ("--batch", 32, "images a step, over all GPUs and micro-batches together", whole),
          ("--accum", 1, "micro-batches a step: less memory, same result", whole),
          ("--lr", 3e-3, "AdamW's learning rate"),
          ("--betas", [0.9, 0.99], "AdamW's betas", {"type": runs.floats, "metavar": "B1,B2"}),
          ("--weight-decay", 0.0, "AdamW's weight decay"),
          ("--warmup", 100, "steps in which the learning rate rises from 0"),
          ("--decay", "linear", "then: constant, or linear or cosine down to 0",
           {"choices": ["constant", "linear", "cosine"]}),
          ("--clip", 1.0, "largest norm of the gradient; 0 does not clip"),
          ("--ema", 0.995, "decay of the averaged weights that samples are drawn from"))
    group("speed",
          ("--precision", "auto", "fp32, bf16 (autocast), or auto: bf16 on CUDA, else fp32",
           {"choices": ["auto", "fp32", "bf16"]}),
          ("--compile", False, "torch.compile the model (CUDA; the first step takes a minute)", switch))
    group("output",
          ("--log-every", 20, "steps between lines of metrics.jsonl", whole),
          ("--sample-every", 1000, "steps between sample grids; 0: one at the end only"),
          ("--save-every", 500, "steps between checkpoints", whole),
          ("--sample-n", 64, "images in a grid", whole),
          ("--sampler", "dpmpp-2m", "of the grids, and sample.py's default: " + ", ".join(diffusion.SAMPLERS), word),
          ("--grid", None, "its grid of times (default: the process's own): " + ", ".join(diffusion.GRIDS), word),
          ("--sample-steps", 20, "its steps", whole),
          ("--guidance", 3.0, "its classifier-free guidance, 1 for none"),
          ("--guidance-rule", "cfg", "how it is applied: " + ", ".join(diffusion.GUIDANCE), word))
    return p


def one_line(entry):
    """What `--list` prints for a registry's entry: its line, or the first sentence of a function's docstring."""
    text = entry.__doc__ if callable(entry) else entry if isinstance(entry, str) else entry[-1]
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def print_list(word):
    """Everything there is to choose from, one line each; the models, which take a moment to count, last."""
    for title, entries in {"datasets": data.DATASETS, "processes": diffusion.PROCESSES,
                           "predictions": diffusion.PREDICTIONS, "weightings": diffusion.WEIGHTINGS,
                           "densities of the training times": diffusion.DENSITIES, "samplers": diffusion.SAMPLERS,
                           "grids of sampling times": diffusion.GRIDS, "guidance rules": diffusion.GUIDANCE}.items():
        print(title)
        for name, entry in entries.items():
            print(f"  {name:18} {one_line(entry)}")
    print("models (parameters and multiply-accumulates at 32x32x3 with 10 classes)")
    for name in (name for name in MODELS if word in name):
        with torch.device("meta"):
            model = create_model(name)
        parameters, macs = cost(model, (3, 32, 32))
        active = moe.activated_parameters(model)
        note = f", {active / 1e6:.2f} M activated" if active < parameters else ""
        print(f"  {name:18} {parameters / 1e6:8.2f} M {macs / 1e9:9.3f} GMACs{note}", flush=True)


def parse():
    """(config, overwrite, folder, checkpoint or None). A resumed run's own settings are the defaults of the flags."""
    parser = flags()
    args = parser.parse_args()
    if args.list is not None:
        print_list(args.list)
        raise SystemExit
    folder = Path(args.out or f"runs/{args.data}-{args.model.replace('/', '-')}")
    checkpoint = None
    if args.resume:
        path = folder / "ckpt.pt" if args.resume == "newest" else Path(args.resume)
        if not path.exists():
            raise FileNotFoundError(f"--resume: there is no checkpoint {path}; name the run's folder by --out, or "
                                    "leave --resume out to start it")
        folder, checkpoint = path.parent, runs.load_checkpoint(path)
        args = parser.parse_args(namespace=argparse.Namespace(**copy.deepcopy(checkpoint["config"])))
    for name, choices in {"data": data.DATASETS, "model": MODELS, "process": diffusion.PROCESSES,
                          "prediction": ["own", *diffusion.PREDICTIONS],
                          "weighting": ["own", "none", *diffusion.WEIGHTINGS], "density": diffusion.DENSITIES,
                          **runs.SAMPLING}.items():
        runs.check(name, getattr(args, name), choices)
    runs.process(vars(args))                                        # refuses what does not go together
    config = {key: value for key, value in vars(args).items() if key not in ("out", "resume", "overwrite", "list")}
    return config, args.overwrite, folder, checkpoint


# ------------------------------------------------------------------------------------------------------------- training


def learning_rate(config, step):
    """Warm-up from 0, then constant, or linear or cosine decay to 0 at the last step."""
    rate = config["lr"] * min(1.0, (step + 1) / max(1, config["warmup"]))
    done = min(1.0, step / config["steps"])
    return rate * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config["decay"]]


def loss_curve(entries):
    """The loss over the steps, raw and averaged, as a picture."""
    steps, raw = [e["step"] for e in entries], [e["loss"] for e in entries]
    width = max(1, len(raw) // 50)
    windows = [raw[max(0, k - width):k + 1] for k in range(len(raw))]
    smooth = [sum(w) / len(w) for w in windows]
    return figures.curves({"_raw": (steps, raw), "running mean": (steps, smooth)}, "training loss", "step", "loss")


def train():
    # Settings, this process's place among the others, the device.
    stop = runs.Stop()
    config, overwrite, folder, checkpoint = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    several_gpus = world > 1 and config["device"] == "auto" and torch.cuda.is_available()
    device = runs.device(f"cuda:{os.environ['LOCAL_RANK']}" if several_gpus else config["device"])
    if config["batch"] % (world * config["accum"]):
        raise ValueError(f"--batch {config['batch']} does not divide into {world} processes x {config['accum']} "
                         "micro-batches (--accum)")
    if not checkpoint and not config["dry_run"]:
        runs.check_free(folder, overwrite)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if config["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    automatic = device.type == "cuda" and torch.cuda.is_bf16_supported()
    bf16 = config["precision"] == "bf16" or (config["precision"] == "auto" and automatic)

    # Data. With several processes the first loads (downloads, converts) alone, then the others.
    if world > 1 and rank > 0:
        dist.barrier()
    origin = runs.post_trained(config) if config["post_train"] and not checkpoint else None
    size = config["image_size"] and layers.pair(config["image_size"])[-1]       # a resumed run knows all its sides
    dataset = data.load(config["data"], config["data_dir"], size, "train", device, config["flip"],
                        config["download"], config["bad_images"], config["aspect"], runs.stride(config))
    if world > 1 and rank == 0:
        dist.barrier()
    if config["subset"]:
        dataset = dataset.subset(config["subset"])
    text = runs.takes_text(config)
    classes = [] if config["unconditional"] or text else list(dataset.classes)
    channels, *sides = dataset.shape
    if len(sides) != 2 and not issubclass(MODELS[config["model"]][0], FlagDiT):
        raise ValueError(f"--data {config['data']} holds {dataset.kind}: choose a Flag-DiT, such as flag-dit-nano")
    config |= {"image_size": sides[0] if sides == 2 * sides[:1] else sides, "in_channels": channels, "classes": classes,
               "num_classes": len(classes), "data_size": len(dataset), "flip": dataset.flip}
    if text:
        runs.add_text(config, dataset)
    if config["start_from"]:
        runs.adapt(config, config["start_from"])
    if config["dry_run"]:
        print(json.dumps(config, indent=2))
        return

    # Model, averaged weights, optimiser: all that a checkpoint holds.
    torch.manual_seed(config["seed"])
    objective = runs.build(config).to(device)
    if config["upcycle"] and not checkpoint:
        moe.upcycle(objective.model, runs.open_run(config["upcycle"], device)[1].model.state_dict())
    if config["start_from"] and not checkpoint:
        runs.start_from(objective, config["start_from"])
    if config["inherit"] and not checkpoint:
        copied, fresh, unused = runs.start_from(objective, config["inherit"], leave=[".attn."])
        if rank == 0:
            print(f"{config['inherit']}: {len(copied)} tensors inherited, {len(fresh)} fresh, {len(unused)} not used")
    if config["text"] == "npz" and text:
        objective.examples = dataset.condition(torch.arange(min(8, len(dataset)))).to("cpu")
    if origin:
        runs.load_weights(objective, origin, config["post_train"])
    if config["post_train"]:
        for name, weight in objective.model.named_parameters():
            weight.requires_grad_(objective.model.post_trains(name))
    ema = copy.deepcopy(objective).eval().requires_grad_(False)
    if config["distill"]:
        objective.teach(runs.teacher(config).to(device), config["distill_shares"], config["distill_log_variance"])
    weights = [p for p in objective.parameters() if p.requires_grad]
    averages = [e for e, p in zip(ema.parameters(), objective.parameters()) if p.requires_grad]
    kinds = {}                                       # layers mark weights: no_decay, and rate, a share of --lr
    for p in weights:
        kinds.setdefault((hasattr(p, "no_decay"), getattr(p, "rate", 1.0)), []).append(p)
    groups = [{"params": kind, "rate": rate, "weight_decay": 0.0 if no_decay else config["weight_decay"]}
              for (no_decay, rate), kind in kinds.items()]
    optimiser = torch.optim.AdamW(groups, config["lr"], tuple(config["betas"]), fused=True)
    first = 0
    if checkpoint:
        runs.check_resumable(checkpoint["config"], config)
        runs.load_weights(objective, checkpoint["model"], folder)
        runs.load_weights(ema, checkpoint["ema"], folder)
        optimiser.load_state_dict(checkpoint["optimiser"])
        first, checkpoint = checkpoint["step"], None
    if config["compile"]:
        objective.model.compile()
    parallel = DistributedDataParallel(objective) if world > 1 else objective

    # The run's folder; the first process alone writes.
    writer = rank == 0
    if writer:
        parameters, macs = cost(objective.model, objective.shape)
        kinds = "captions" if text else f"{len(classes)} classes"
        print(f"{config['model']}: {parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} GMACs an image | "
              f"{config['data']}: {len(dataset):,} {dataset.kind}, {'x'.join(map(str, sides))}, "
              f"{kinds} | {world} x {device.type}, {'bf16' if bf16 else 'fp32'} | "
              f"{folder}{f', from step {first:,}' if first else ''}")
        held = runs.lock(folder)  # noqa: F841 (it holds as long as this variable lives)
        runs.start(folder, config, overwrite, resume=first > 0)
        runs.clean(folder)
        entries = runs.history(folder, until=first)

    def save(step):
        runs.save_checkpoint(folder, {"config": config, "step": step, "model": objective.state_dict(),
                                      "ema": ema.state_dict(), "optimiser": optimiser.state_dict()})
        if entries:
            figures.save(loss_curve(entries), folder / "loss.png")

    def draw(step):
        x = ema.preview(config["sample_n"], objectives.seeded(config["seed"]))
        columns = len(ema.examples) if text else config["num_classes"]
        columns = columns if 1 < columns <= 16 else None
        figures.save(figures.grid(figures.to_uint8(x), columns), folder / "samples" / f"step_{step:07d}.png")

    # The loop. Step s sees the batch, the noise and the dropout of (seed, s), whatever came before.
    share = config["batch"] // (world * config["accum"])
    window, clock = [], time.perf_counter()
    bar = tqdm(range(first, config["steps"]), initial=first, total=config["steps"], unit=" steps", mininterval=0.5,
               disable=not writer)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = group.get("rate", 1.0) * learning_rate(config, step)
        torch.manual_seed(objectives.seeded(config["seed"], step, rank).initial_seed())
        indices, flips = dataset.plan(step, config["batch"], config["seed"])
        sums = {}
        for micro in range(config["accum"]):
            begin = (rank * config["accum"] + micro) * share
            rows = slice(begin, begin + share)
            x, y = dataset.gather(indices[rows], flips[rows])
            noise = objectives.StepNoise(config["seed"], step, config["batch"], rows, device)
            once = parallel.no_sync if world > 1 and micro < config["accum"] - 1 else contextlib.nullcontext
            with once():                                               # gradients are exchanged once a step
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    losses = parallel({"x": x, "y": y, "noise": noise})
                (losses["loss"] / config["accum"]).backward()
            sums = {k: sums.get(k, 0) + v.detach().float() / config["accum"] for k, v in losses.items()}
        norm = torch.nn.utils.clip_grad_norm_(weights, config["clip"] or math.inf).item()

        # What all processes must agree on: the losses, and whether to stop.
        numbers = torch.stack([*sums.values(), torch.tensor(float(bool(stop)), device=device)])
        if world > 1:
            dist.all_reduce(numbers)
        *means, stopping = (numbers / world).tolist()
        if not (math.isfinite(means[0]) and math.isfinite(norm)):
            newest = folder / "ckpt.pt"
            good = f" The last good checkpoint is {newest}." if newest.exists() else ""
            raise ValueError(f"at step {step + 1} the loss is {means[0]:.4g} and the gradient's norm {norm:.4g}; the "
                             f"step was not taken.{good} Try a lower --lr, a longer --warmup, or --clip 1")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        decay = min(config["ema"], (1 + step) / (10 + step))           # early on, average over few steps
        with torch.no_grad():                                          # else every step would leave a graph behind
            torch._foreach_lerp_(averages, weights, 1 - decay)

        # Log, draw, save.
        step += 1
        window.append(dict(zip(sums, means)))
        window = window[-config["log_every"]:]
        last = step == config["steps"] or stopping > 0
        if writer and (step % config["log_every"] == 0 or last):
            now = time.perf_counter()
            entry = {name: sum(w[name] for w in window) / len(window) for name in sums}
            entry = {"step": step, **entry, "grad_norm": norm, "lr": learning_rate(config, step - 1),
                     "images_per_s": len(window) * config["batch"] / (now - clock)}
            runs.log(folder, entry)
            entries.append(entry)
            bar.set_postfix_str(f"loss {entry['loss']:.4f}, {entry['images_per_s']:,.0f} images/s", refresh=False)
            window, clock = [], now
        if writer and (step == config["steps"] or (config["sample_every"] and step % config["sample_every"] == 0)):
            draw(step)
            clock = time.perf_counter()
        if writer and (step % config["save_every"] == 0 or last):
            save(step)
        if stopping > 0:
            break
    bar.close()
    if writer and stop and step < config["steps"]:
        print(f"stopped; saved at step {step:,}: `python train.py --out {folder} --resume` goes on")
    elif writer:
        print(f"done: pictures in {folder / 'samples'}\n  to draw more:    python sample.py {folder}\n"
              f"  to measure them: python evaluate.py score {folder}")
    if world > 1:
        time.sleep(0.1)      # gloo's threads, joined below without letting go of the interpreter, need it once more
        dist.destroy_process_group()


if __name__ == "__main__":
    runs.command(train)
