"""Measure: one command a question. Each lives in the room that it belongs to, beside its flags; this is their front.

    python evaluate.py score runs/shapes-unet-pico      how good a run's samples are, beside real images
    python evaluate.py samplers runs/shapes-unet-pico   what each sampler makes of 5, 10, 20, 50 steps
    python evaluate.py distance runs/my-run cifar10     FID and its relatives, between runs, folders, files, data sets
    python evaluate.py speed dit-s/2 unet-cifar         parameters, MACs, time and memory of models, as a table
    python evaluate.py COMMAND --help                   what a command takes

Where a command draws from a run, the run's own options of drawing are flags too (--steps 50 --sampler heun); what they
are, `python sample.py RUN --help` says.
"""

import argparse
import os
import sys

import torch

import autoencoders
import build
import cropping
import diffusion
import diffusion_classifier
import distance
import export
import guides
import masked
import moe
import ppgn
import scores
import speed
from runs import Run

# name -> (its flags, its function)
COMMANDS = {
    "score": (scores.score_flags, scores.score),
    "samplers": (scores.samplers_flags, scores.samplers),
    "distance": (distance.distance_flags, distance.distance),
    "prompts": (scores.prompts_flags, scores.prompts),
    "sizes": (scores.sizes_flags, scores.sizes),
    "stitch": (scores.stitch_flags, scores.stitch),
    "curves": (scores.curves_flags, scores.curves),
    "likelihood": (diffusion.likelihood_flags, diffusion.likelihood),
    "experts": (moe.experts_flags, moe.experts),
    "reconstruct": (autoencoders.reconstruct_flags, autoencoders.reconstruct),
    "probe": (masked.probe_flags, masked.probe),
    "reuse": (masked.reuse_flags, masked.reuse),
    "classify": (diffusion_classifier.classify_flags, diffusion_classifier.classify),
    "swaps": (diffusion_classifier.swaps_flags, diffusion_classifier.swaps),
    "guides": (guides.guides_flags, guides.guides),
    "chains": (ppgn.chains_flags, ppgn.chains),
    "crop": (cropping.crop_flags, cropping.crop),
    "ranker": (cropping.ranker_flags, cropping.ranker),
    "speed": (speed.speed_flags, speed.speed),
    "pack": (speed.pack_flags, speed.pack),
    "export": (export.export_flags, export.export),
}


def flags():
    p = build.Flags(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, function) in COMMANDS.items():
        s = commands.add_parser(name, help=build.line(function), description=build.line(function))
        add(s)
        s.set_defaults(function=function)
    return p


def opened(value, args):
    """A flag's value, runs in it opened."""
    if isinstance(value, list):
        return [opened(v, args) for v in value]
    if not isinstance(value, Run):
        return value
    return build.open_run(value, args.device, getattr(args, "weights", "ema"))


def evaluate():
    args, rest = flags().parse_known_args(sys.argv[1:])
    if hasattr(args, "device"):
        args.device = build.device(args.device)
        if args.device.type == "cuda" and "LOCAL_RANK" in os.environ:              # torchrun: each process its own GPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    for key, value in vars(args).items():
        setattr(args, key, opened(value, args))
    first = next((v for value in vars(args).values() for v in (value if isinstance(value, list) else [value])
                  if isinstance(v, build.Opened)), None)
    more = build.Flags(prog=f"evaluate.py {args.command}")
    if first is not None:
        build.drawing_flags(more, first.objective)
    args.draw = build.given_drawing(more.parse_args(rest))
    args.open = lambda path: build.open_run(path, args.device)
    args.function(args)


if __name__ == "__main__":
    build.command(evaluate)
