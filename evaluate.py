"""Measure: one command a question. Each lives in the room that it belongs to, beside its flags; this is their front.

    python evaluate.py score runs/shapes-unet-pico      how good a run's samples are, beside real images
    python evaluate.py samplers runs/shapes-unet-pico   what each sampler makes of 5, 10, 20, 50 steps
    python evaluate.py speed dit-s/2 unet-cifar         parameters, MACs, time and memory of models, as a table
    python evaluate.py COMMAND --help                   what a command takes

Where a command draws from a run, the run's own options of drawing are flags too (--steps 50 --sampler heun); what they
are, `python sample.py RUN --help` says.
"""

import argparse
import sys

import build
import diffusion
import moe
import scores
import speed
from runs import Run

# name -> (its flags, its function)
COMMANDS = {
    "score": (scores.score_flags, scores.score),
    "samplers": (scores.samplers_flags, scores.samplers),
    "prompts": (scores.prompts_flags, scores.prompts),
    "sizes": (scores.sizes_flags, scores.sizes),
    "stitch": (scores.stitch_flags, scores.stitch),
    "likelihood": (diffusion.likelihood_flags, diffusion.likelihood),
    "experts": (moe.experts_flags, moe.experts),
    "speed": (speed.speed_flags, speed.speed),
    "pack": (speed.pack_flags, speed.pack),
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
