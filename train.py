"""Train a diffusion model:  python train.py --data cifar10 --model unet-cifar --run runs/my-run

Without flags it learns to draw small shapes in a few minutes on a laptop's CPU. `--list` prints every model, dataset, process and
sampler. A file of flags, one a line, is read with @: python train.py @recipes/cifar10-unet.txt --steps 1000
More than one GPU: torchrun --nproc-per-node 2 train.py ... with the same flags (--batch stays the batch of all together).
"""

import argparse
import ast
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
import runs
from models import MODELS, cost, create_model


def options(text):
    """ "depth=4,patch_size=2" -> {"depth": 4, "patch_size": 2}; values are Python literals."""
    try:
        pairs = [pair.split("=", 1) for pair in text.split(";" if ";" in text else ",") if pair]
        return {key.strip(): ast.literal_eval(value.strip()) for key, value in pairs}
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value,name=value (separate by ; if a value holds a comma)")


class Flags(argparse.ArgumentParser):
    """argparse whose @files hold any number of words a line and # comments."""

    def convert_arg_line_to_args(self, line):
        return line.split("#")[0].split()


def flags():
    p = Flags(prog="train.py", description=__doc__, fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)

    def group(title, *rows):
        g = p.add_argument_group(title)
        for name, default, text, *kind in rows:
            extra = kind[0] if kind else {"type": type(default), "metavar": type(default).__name__.upper()}
            if extra.get("action") not in ("store_true", "store_const") and default is not None:
                text += " (default: %(default)s)"
            g.add_argument(name, default=default, help=text, **extra)

    switch, word, whole = {"action": "store_true"}, {"metavar": "NAME"}, {"type": runs.positive, "metavar": "N"}
    group("run",
          ("--run", None, "folder of the run (default: runs/<data>-<model>)", {"metavar": "FOLDER"}),
          ("--resume", None, "go on with the run in --run from its newest checkpoint, or from the checkpoint FILE",
           {"nargs": "?", "const": "newest", "metavar": "FILE"}),
          ("--overwrite", False, "replace the run that is in the folder", switch),
          ("--steps", 1400, "optimiser steps", whole),
          ("--seed", 0, "all randomness is a function of seed and step"),
          ("--device", "auto", "cuda, mps, cpu or auto", word),
          ("--deterministic", False, "refuse operations whose result is not reproducible (slower on CUDA)", switch),
          ("--dry-run", False, "print the settings as JSON and leave", switch),
          ("--list", False, "print every model, dataset, process and sampler and leave", switch))
    group("data",
          ("--data", "shapes", "dataset: " + ", ".join(data.DATASETS), word),
          ("--data-dir", "data", "folder that holds the dataset's files", {"metavar": "FOLDER"}),
          ("--image-size", None, "side in pixels (default: the dataset's own)", whole),
          ("--flip", None, "random horizontal flips (default: yes for photographs)", {"action": argparse.BooleanOptionalAction}),
          ("--download", True, "fetch CIFAR from its home page if it is not there", {"action": argparse.BooleanOptionalAction}),
          ("--bad-images", "error", "what to do about broken files in --data folder: error or skip", {"choices": ["error", "skip"]}),
          ("--unconditional", False, "ignore the labels", switch))
    group("model",
          ("--model", "unet-nano", "name of a model, see --list", word),
          ("--model-options", {}, "change its preset, for example depth=4,hidden_size=96", {"type": options, "metavar": "NAME=VALUE,..."}))
    group("diffusion",
          ("--process", "flow", "path from data to noise: " + ", ".join(diffusion.PROCESSES), word),
          ("--prediction", None, "what the network predicts: eps, x0, v or flow (default: the process's own)", word),
          ("--density", "logit-normal", "training times of rectified flow: uniform or logit-normal", word),
          ("--learned-variance", False, "learn the variance of the reverse steps too (DiT's hybrid loss)", switch),
          ("--label-drop", 0.1, "share of labels replaced by the null label, which guidance needs"))
    group("optimisation",
          ("--batch", 64, "images a step, over all GPUs and micro-batches together", whole),
          ("--accum", 1, "micro-batches a step: less memory, same result", whole),
          ("--lr", 1e-3, "AdamW's learning rate"),
          ("--betas", (0.9, 0.99), "AdamW's betas", {"type": lambda s: tuple(float(b) for b in s.split(",")), "metavar": "B1,B2"}),
          ("--weight-decay", 0.0, "AdamW's weight decay"),
          ("--warmup", 100, "steps in which the learning rate rises from 0"),
          ("--decay", "linear", "then: constant, or linear or cosine down to 0", {"choices": ["constant", "linear", "cosine"]}),
          ("--clip", 1.0, "largest norm of the gradient; 0 does not clip"),
          ("--ema", 0.999, "decay of the averaged weights that samples are drawn from"))
    group("speed",
          ("--precision", "auto", "fp32, bf16 (autocast), or auto: bf16 on CUDA, else fp32", {"choices": ["auto", "fp32", "bf16"]}),
          ("--compile", False, "torch.compile the model (CUDA; the first step takes a minute)", switch))
    group("output",
          ("--log-every", 20, "steps between lines of metrics.jsonl", whole),
          ("--sample-every", 500, "steps between sample grids, 0 for one at the end only"),
          ("--save-every", 500, "steps between checkpoints", whole),
          ("--sample-n", 64, "images in a grid", whole),
          ("--sampler", "dpmpp-2m", "sampler of the grids, and sample.py's default: " + ", ".join(diffusion.SAMPLERS), word),
          ("--sample-steps", 25, "its steps", whole),
          ("--guidance", 2.0, "its classifier-free guidance, 1 for none"))
    return p


def print_list():
    """Everything there is to choose from, one line each."""
    print("models (parameters and multiply-accumulates at 32x32x3 with 10 classes)")
    for name in MODELS:
        with torch.device("meta"):
            model = create_model(name)
        parameters, macs = cost(model, (3, 32, 32))
        print(f"  {name:20} {parameters / 1e6:8.2f} M {macs / 1e9:9.3f} GMACs")
    print("datasets")
    for name, line in data.DATASETS.items():
        print(f"  {name:20} {line}")
    print("processes")
    for name, (_, line) in diffusion.PROCESSES.items():
        print(f"  {name:20} {line}")
    print("samplers")
    for name, sampler in diffusion.SAMPLERS.items():
        print(f"  {name:20} {' '.join(sampler.__doc__.split('.')[0].split())}")


def parse():
    """(config, folder, checkpoint or None) from the command line. A resumed run takes its own settings as defaults."""
    parser = flags()
    args = parser.parse_args()
    if args.list:
        print_list()
        raise SystemExit
    folder = Path(args.run or f"runs/{args.data}-{args.model.replace('/', '-')}")
    checkpoint = None
    if args.resume:
        path = folder / "ckpt.pt" if args.resume == "newest" else Path(args.resume)
        if not path.exists():
            raise FileNotFoundError(f"--resume: there is no checkpoint {path}; name the run's folder by --run, or leave --resume out "
                                    "to start it")
        folder = path.parent
        checkpoint = runs.load_checkpoint(path)
        args = parser.parse_args(namespace=argparse.Namespace(**copy.deepcopy(checkpoint["config"])))
    for name, choices in (("data", data.DATASETS), ("model", MODELS), ("process", diffusion.PROCESSES), ("sampler", diffusion.SAMPLERS)):
        if getattr(args, name) not in choices:
            raise ValueError(runs.unknown(f"--{name}", getattr(args, name), choices))
    config = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(args).items() if key not in ("run", "resume", "overwrite", "list")}
    return config, args.overwrite, folder, checkpoint


def learning_rate(config, step):
    """Warm-up from 0, then constant, linear or cosine decay to 0 at the last step."""
    rate = config["lr"] * min(1.0, (step + 1) / max(1, config["warmup"]))
    done = min(1.0, step / config["steps"])
    return rate * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config["decay"]]


def train():
    # Settings, this process's place among the others, the device.
    stop = runs.Stop()
    config, overwrite, folder, checkpoint = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = config["device"] if world == 1 or config["device"] != "auto" or not torch.cuda.is_available() else f"cuda:{os.environ['LOCAL_RANK']}"
    device = runs.device(name)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if config["batch"] % (world * config["accum"]):
        raise ValueError(f"--batch {config['batch']} does not divide into {world} processes x {config['accum']} micro-batches (--accum)")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if config["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    bf16 = config["precision"] == "bf16" or (config["precision"] == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())

    # Data. The first process loads (and downloads, converts) alone.
    if world > 1 and rank > 0:
        dist.barrier()
    dataset = data.load(config["data"], config["data_dir"], config["image_size"], "train", device, config["flip"], config["download"],
                        bad_images=config["bad_images"])
    if world > 1 and rank == 0:
        dist.barrier()
    classes = [] if config["unconditional"] else dataset.classes
    config |= {"image_size": dataset.images.shape[-1], "in_channels": dataset.images.shape[1], "num_classes": len(classes),
               "classes": list(classes), "data_size": len(dataset), "flip": dataset.flip}
    if config["dry_run"]:
        print(json.dumps(config, indent=2))
        return

    # Model, averaged weights, optimiser: all that a checkpoint holds.
    torch.manual_seed(config["seed"])
    objective = runs.build(config).to(device)
    ema = copy.deepcopy(objective).eval().requires_grad_(False)
    weights = [p for p in objective.parameters() if p.requires_grad]
    averages = [e for e, p in zip(ema.parameters(), objective.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, config["lr"], tuple(config["betas"]), weight_decay=config["weight_decay"], fused=True)
    first = 0
    if checkpoint:
        runs.check_resumable(checkpoint["config"], config)
        runs.load_weights(objective, checkpoint["model"], folder)
        runs.load_weights(ema, checkpoint["ema"], folder)
        optimiser.load_state_dict(checkpoint["optimiser"])
        first = checkpoint["step"]
        del checkpoint
    if config["compile"]:
        objective.model.compile()
    parallel = DistributedDataParallel(objective, [device] if device.type == "cuda" else None) if world > 1 else objective

    # The folder: one process writes.
    if rank == 0:
        parameters, macs = cost(objective.model, objective.shape)
        print(f"{config['model']}: {parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} GMACs an image; {config['data']}: {len(dataset):,} "
              f"images of {config['image_size']}x{config['image_size']}, {len(classes)} classes; {device.type}"
              f"{f' x {world}' if world > 1 else ''}, {'bf16' if bf16 else 'fp32'}; {folder}, {f'from step {first:,}' if first else 'new'}")
        guard = runs.lock(folder)                                     # held until this process ends
        if not first:
            runs.start(folder, config, overwrite)
        runs.clean(folder)
        losses_so_far = runs.history(folder, until=first)

    def save(step):
        runs.save_checkpoint(folder, {"config": config, "step": step, "model": objective.state_dict(), "ema": ema.state_dict(),
                                      "optimiser": optimiser.state_dict()})
        if losses_so_far:
            figures.save(loss_curve(losses_so_far), folder / "loss.png")

    def draw(step):
        x = ema.preview(config["sample_n"], diffusion.seeded(config["seed"], 0))
        columns = config["num_classes"] if 1 < config["num_classes"] <= 16 else None
        figures.save(figures.grid(figures.to_uint8(x), columns), folder / "samples" / f"step_{step:07d}.png")

    # The loop. Step s sees the batch, the noise and the dropout of (seed, s), whatever came before.
    share = config["batch"] // (world * config["accum"])
    window, clock = [], time.perf_counter()
    bar = tqdm(range(first, config["steps"]), initial=first, total=config["steps"], unit=" steps", mininterval=0.5, disable=rank > 0)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        torch.manual_seed(diffusion.seeded(config["seed"], step, rank).initial_seed())
        indices, flips = dataset.plan(step, config["batch"], config["seed"])
        total = {}
        for micro in range(config["accum"]):
            begin = (rank * config["accum"] + micro) * share
            rows = slice(begin, begin + share)
            x, y = dataset.gather(indices[rows], flips[rows])
            noise = diffusion.StepNoise(config["seed"], step, config["batch"], rows, device)
            last = micro == config["accum"] - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16), contextlib.nullcontext() if last or world == 1 else parallel.no_sync():
                losses = parallel({"x": x, "y": y, "noise": noise})
            (losses["loss"] / config["accum"]).backward()
            total = {k: total.get(k, 0) + v.detach().float() / config["accum"] for k, v in losses.items()}

        # What all processes must agree on: the mean losses, and whether to stop.
        norm = torch.nn.utils.clip_grad_norm_(weights, config["clip"] or math.inf)
        numbers = torch.stack([*total.values(), torch.tensor(float(bool(stop)), device=device)])
        if world > 1:
            dist.all_reduce(numbers)
        *means, stopping = (numbers / world).tolist()
        if not math.isfinite(means[0]) or not math.isfinite(norm.item()):
            newest = folder / "ckpt.pt"
            raise ValueError(f"the loss is {means[0]} and the gradient norm {norm.item()} at step {step + 1}; the weights were not changed. "
                             + (f"The last good checkpoint is {newest}. " if newest.exists() else "") + "Try a lower --lr, a longer --warmup or --clip 1")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        decay = min(config["ema"], (1 + step) / (10 + step))          # the average starts with the first steps, not with noise
        torch._foreach_lerp_(averages, weights, 1 - decay)

        # Log, draw, save.
        step += 1
        window.append(dict(zip(total, means)))
        ending = step == config["steps"] or stopping > 0
        if rank == 0:
            if step % config["log_every"] == 0 or ending:
                now = time.perf_counter()
                entry = {k: sum(w[k] for w in window) / len(window) for k in window[0]}
                entry = {"step": step, **entry, "grad_norm": norm.item(), "lr": learning_rate(config, step - 1),
                         "images_per_s": len(window) * config["batch"] / (now - clock)}
                runs.log(folder, entry)
                losses_so_far.append(entry)
                bar.set_postfix_str(f"loss {entry['loss']:.4f}, {entry['images_per_s']:,.0f} images/s", refresh=False)
                window, clock = [], now
            if (config["sample_every"] and step % config["sample_every"] == 0) or step == config["steps"]:
                draw(step)
                clock = time.perf_counter()
            if step % config["save_every"] == 0 or ending:
                save(step)
        if stopping > 0:
            break
    bar.close()
    if rank == 0:
        if stop and step < config["steps"]:
            print(f"stopped; saved at step {step:,}: --run {folder} --resume goes on")
        else:
            print(f"done: pictures in {folder}/samples\n  more of them:    python sample.py {folder}\n  how good they are: python evaluate.py score {folder}")
    if world > 1:
        dist.destroy_process_group()


def loss_curve(entries):
    """The loss over the steps, raw and averaged."""
    steps, raw = [e["step"] for e in entries], [e["loss"] for e in entries]
    width = max(1, len(raw) // 50)
    smooth = [sum(raw[max(0, k - width):k + 1]) / len(raw[max(0, k - width):k + 1]) for k in range(len(raw))]
    return figures.curves({"_raw": (steps, raw), "running mean": (steps, smooth)}, "training loss", "step", "loss")


if __name__ == "__main__":
    runs.command(train)
