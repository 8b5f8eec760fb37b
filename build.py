"""From settings to what is trained and drawn: names with options, data, model, process, objective, ways to begin, runs.

Whatever is chosen by name is written NAME:option=value,option=value, and its options are checked here, by name, kind
and range, before anything is built. A registry's entry is a callable: its keyword arguments with defaults are its
options, the first sentence of its docstring is its line in `train.py --list`.

Contents: commands and their mistakes; names with options; registries; settings -> objective; ways to begin; opened
runs; settings of older versions.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import convert
import data
import diffusion
import guidance
import layers
import models
import moe
import objectives
import optim
import runs
import samplers
from runs import Run

VERSION = 2                                          # of config.json; 1 had a flag for every option of every system

# ----------------------------------------------------------------------------------------- commands and their mistakes


class Unbroken:
    """A text stream whose reader may go away (a closed pipe, a full disk) without the program's end, and which
    replaces characters that it cannot encode."""

    def __init__(self, stream):
        self.stream = stream
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def command(main):
    """Run a script's main(): a user's mistake ends in one line and exit code 2, Ctrl-C in one line and 130, never in a
    traceback."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unbroken(out), Unbroken(err)
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory on the GPU ({memory_figures(error)}): {LESS_MEMORY}")
    except MemoryError as error:
        fail(f"out of memory ({error}): {LESS_MEMORY}")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        fail(f"out of memory ({str(error).splitlines()[-1][-90:]}): {LESS_MEMORY}")
    except (ValueError, OSError) as error:
        fail(error)
    finally:
        sys.stdout, sys.stderr = out, err


LESS_MEMORY = ("try a smaller --batch, or --accum 2 (the same batch in two halves), smaller images, a smaller --model, "
               "or --precision bf16")


def memory_figures(error):
    """What torch says of a full GPU, in a few words: what was asked for, and the peak so far."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return f"{asked[1] if asked else 'an allocation'} was asked for, the peak so far is {peak:.1f} GiB"


def fail(message):
    """Print one line to stderr and leave with exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


class Flags(argparse.ArgumentParser):
    """argparse whose @files hold any number of words a line, and # comments; its mistakes are one line."""

    def convert_arg_line_to_args(self, line):
        return line.lstrip("\ufeff").split("#")[0].split()

    def error(self, message):
        fail(message)


def positive(text):
    """An argparse type: a whole number from 1 to a thousand million."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1 (and at most 10^9)")
    return int(text)


def number(low, high, open_low=False):
    """An argparse type: a finite number from low to high (open_low: above low)."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {'above' if open_low else 'from'} {low:g} "
                                             f"{'and at most' if open_low else 'to'} {high:g}")
        return value
    return parse


def count(low, high):
    """An argparse type: a whole number from low to high."""
    def parse(text):
        if not re.fullmatch(r"-?\d{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)
    return parse


def numbers(length=None, low=-math.inf, high=math.inf):
    """An argparse type: "0.9,0.99" -> [0.9, 0.99], each from low to high, so many of them (None: at least one)."""
    def parse(text):
        found = [number(low, high)(word) for word in text.split(",")]
        if length is not None and len(found) != length:
            raise argparse.ArgumentTypeError(f"{text!r}: {length} numbers are wanted, separated by a comma")
        return found
    return parse


def wholes(text):
    """ "5,10" -> [5, 10], each at least 1"""
    return [positive(word) for word in text.split(",")]


def sides(text):
    """ "160x480" -> (160, 480)"""
    found = tuple(positive(word) for word in text.split("x"))
    if len(found) > 3 or max(found) > 65536:
        raise argparse.ArgumentTypeError(f"{text!r}: one to three sides of at most 65536, such as 160x480")
    return found


def device(name="auto"):
    """torch.device by name; "auto" takes cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name).type == "meta":
            raise ValueError("nothing is computed there")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError):
        raise ValueError(f"--device {name}: this machine, or this build of torch, has no such device; "
                         "try --device auto") from None
    return torch.device(name)


# --------------------------------------------------------------------------------------------------- names with options


def value_of(text):
    """A Python literal; sides such as 24x32 as a tuple; else a bare word, outer parentheses taken off."""
    text = text.strip()
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(int(side) for side in text.split("x"))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        words = {"true": True, "false": False, "none": None}
        return words.get(text.lower(), text[1:-1] if text.startswith("(") and text.endswith(")") else text)
    return tuple(value) if isinstance(value, list) else value


def options_of_text(text):
    """ "depth=4,multipliers=(1,2),rope=ntk" -> {"depth": 4, ...}; commas inside brackets do not separate."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    found = {}
    for piece in filter(str.strip, pieces):
        key, equals, value = piece.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*", key.strip()) or not value.strip():
            raise ValueError(f"{piece.strip()!r} is not of the form option=value (options are separated by commas)")
        found[key.strip().replace("-", "_")] = value_of(value)
    return found


def split_name(text):
    """ "NAME:option=value,..." -> (NAME, {option: value}). NAME may be a path with a colon in it."""
    match = re.fullmatch(r"(.*?):(\s*[A-Za-z_][\w-]*\s*=.*)", text, re.DOTALL)
    try:
        return (match[1], options_of_text(match[2])) if match else (text, {})
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def join_name(name, options):
    """The opposite of `split_name`."""
    bare = lambda value: isinstance(value, str) and "," not in value and value_of(value) == value
    pairs = ",".join(f"{key}={value if bare(value) else repr(value)}" for key, value in options.items())
    return f"{name}:{pairs}" if pairs else name


def unknown(what, name, choices):
    """The sentence for a name that is not among the choices: the nearest ones, or all of them."""
    near = difflib.get_close_matches(name, choices, 3, 0.4)
    advice = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(choices)}"
    return f"unknown {what} {name!r}: {advice}"


# What an entry is given by the house, by parameter name, and where else it is chosen.
FACTS = {"image_size": "--data NAME:size=", "in_channels": "the data", "num_classes": "the data",
         "classes": "the data", "learn_sigma": "--process NAME:learned_variance=True", "codes": "--tokenizer",
         "process": "--process", "data_dir": "--data-dir", "split": "the command", "stride": "the model's patch_size",
         "memory": "the walk itself", "prediction": "--prediction", "weighting": "--weighting", "density": "--density"}
# Options whose values have bounds of their own. Every other whole number lies in 0 .. 10^6, every other number is
# finite.
RANGES = {"hidden_size": (1, 65536), "channels": (1, 65536), "depth": (1, 1024), "num_heads": (1, 1024),
          "patch_size": (1, 1024), "patch_sizes": (1, 1024), "multipliers": (1, 1024), "blocks": (1, 1024),
          "head_channels": (1, 65536), "num_experts": (1, 4096), "top_k": (1, 4096), "moe": (1, 4096),
          "mlp_ratio": (0.01, 1024.0), "dropout": (0.0, 0.999), "drop_path": (0.0, 0.999), "text_width": (0, 65536),
          "text_length": (1, 65536), "d_state": (1, 65536), "multiple_of": (1, 65536), "order": (1, 64),
          "size": (1, 4096), "steps": (1, 10**6), "shift": (1e-6, 1e6), "balance": (0.0, 1e6),
          "threshold": (1e-6, 1.0), "guidance": (-1e4, 1e4), "guidance_power": (0.0, 1e4)}


def parameters(entry):
    """{option: inspect.Parameter} of an entry of a registry."""
    if isinstance(entry, str):
        return {}
    found = inspect.signature(entry).parameters.values()
    return {p.name: p for p in found if p.default is not p.empty and p.name not in FACTS
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def kinds_of(parameter):
    """The types that an option may have: those of its annotation, else that of its default; () is any."""
    annotation = parameter.annotation
    if annotation is not parameter.empty:
        union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
        return tuple(typing.get_origin(a) or a for a in (typing.get_args(annotation) if union else (annotation,)))
    return () if parameter.default is None else (type(parameter.default),)


def fitting(what, value, kinds):
    """The value as one of the kinds (a whole number will do for a number); ValueError if it is none of them."""
    ranges = RANGES.get(what.rpartition(" ")[2], None)
    for kind in kinds or (object,):
        if kind is float and type(value) is int:
            value = float(value)
        if kind in (types.NoneType, None) and value is None:
            return value
        if kind is object or (isinstance(value, str) and issubclass(kind, str)) or type(value) is kind:
            check_range(what, value, ranges)
            return Run(value) if kind is Run else value
    names = {str: "a word", Run: "the folder of a run", int: "a whole number", float: "a number", bool: "True or False",
             tuple: "several values, such as (1,2)", types.NoneType: "None"}
    raise ValueError(f"{what} is {value!r}, and must be {' or '.join(names.get(k, k.__name__) for k in kinds)}")


def check_range(what, value, ranges):
    """ValueError if a number, or one inside a tuple, is not finite or out of range."""
    for v in value if isinstance(value, tuple) else (value,):
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            continue
        low, high = ranges or ((0, 10**6) if isinstance(v, int) else (-1e30, 1e30))
        if not low <= v <= high:
            raise ValueError(f"{what} is {v}, and must lie between {low:g} and {high:g}")
    if value == () and ranges is not None:
        raise ValueError(f"{what} is empty")


def checked(what, entry, options, known=None):
    """The options of an entry, checked by name, kind and range. what: how to call it in an error."""
    known = parameters(entry) if known is None else known
    for key in options:
        if key in FACTS and key not in known:
            raise ValueError(f"{what} {key}: that is chosen by {FACTS[key]}")
        if key not in known:
            near = unknown("option", key, known) if known else "it has no options"
            raise ValueError(f"{what} has no option {key!r}: {near.partition(': ')[2] or near}")
    return {key: fitting(f"{what} {key}", value, kinds_of(known[key])) for key, value in options.items()}


def choose(flag, text, registry):
    """A flag's "NAME:option=value,..." -> (name, options); ValueError for an unknown name or a wrong option."""
    if text in registry:                             # a name may be anything, with a colon too
        return text, {}
    name, options = split_name(text)
    if name not in registry:
        raise ValueError(unknown(f"--{flag.replace('_', '-')}", name, [n for n in registry if n]))
    return name, checked(name, registry[name], options)


def bound(flag, text, registry):
    """The entry that a flag chooses, its options bound."""
    name, options = choose(flag, text, registry)
    return functools.partial(registry[name], **options) if options else registry[name]


def line(entry):
    """The first sentence of an entry's docstring."""
    text = (entry.func if isinstance(entry, functools.partial) else entry).__doc__ or ""
    text = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<!\beq)(?<!\bet al)(?<!\bi\.e)(?<!\be\.g)(?<!\bsec)(?<!\bfig)\. (?=[A-Z])", text)[0].rstrip(".")


# ----------------------------------------------------------------------------------------------------------- registries

# What `--model` may name, by kind. A backbone is a network model(x, t, y), which `objectives.Diffusion` trains; an
# entry of any other kind makes an objective itself.
KINDS = {"backbones": models.MODELS}
# What `--draw` and sample.py's flags of these names may name.
DRAWING = {"sampler": samplers.SAMPLERS, "grid": samplers.GRIDS, "guidance_rule": guidance.RULES}


def registries():
    """Everything that is chosen by name: {heading: registry}."""
    return {"data sets": data.DATASETS, **KINDS, "processes": diffusion.PROCESSES,
            "predictions": diffusion.PREDICTIONS, "weightings": diffusion.WEIGHTINGS,
            "densities of the training times": diffusion.DENSITIES, "samplers": samplers.SAMPLERS,
            "grids of sampling times": samplers.GRIDS, "guidance rules": guidance.RULES,
            "optimisers": optim.OPTIMISERS, "ways to begin": WAYS}


def listing(word=""):
    """What `train.py --list` prints: every name that holds the word, a line each."""
    for heading, registry in registries().items():
        names = [name for name in registry if name and word in name]
        if not names:
            continue
        yield f"{heading} (parameters, multiply-accumulates at 32x32x3 with 10 classes)" if registry is models.MODELS \
            else heading
        costs = models.costs(names) if registry is models.MODELS else {}
        for name in names:
            entry = registry[name]
            yield f"  {name:20} " + (size_line(*costs[name]) if name in costs else
                                     entry if isinstance(entry, str) else line(entry))


def size_line(parameters, active, macs):
    """The parameters (all, and those that a token meets) and multiply-accumulates of a model."""
    text = f"{parameters / 1e6:8.2f} M {macs / 1e9:9.3f} GMACs"
    return text + (f", {active / 1e6:.2f} M activated" if active < parameters else "")


def explain(name):
    """What `train.py --help NAME` prints: an entry's docstring and its options with their defaults."""
    found = [(heading, registry[name]) for heading, registry in registries().items() if name in registry]
    if not found:
        every = [n for registry in registries().values() for n in registry if n]
        raise ValueError(unknown("name", name, every))
    for heading, entry in found:
        yield f"{name} ({heading})"
        if isinstance(entry, str):
            yield f"  {entry}"
            continue
        yield inspect.cleandoc((entry.func if isinstance(entry, functools.partial) else entry).__doc__ or "")
        known = parameters(entry)
        if heading == "backbones":
            known |= parameters(models.changed)
        if known:
            yield f"options, as {name}:option=value,...: " + ", ".join(
                f"{key}={p.default!r}" if p.default is not None else key for key, p in known.items())


def kind_of(name):
    """The registry in which a model of any kind stands."""
    return next(registry for registry in KINDS.values() if name in registry)


def choose_model(text):
    """--model's (name, options), checked."""
    every = {name: entry for registry in KINDS.values() for name, entry in registry.items()}
    name, options = split_name(text)
    if name not in every:
        raise ValueError(unknown("--model", name, every))
    known = parameters(every[name])
    if name in models.MODELS:                        # what every backbone can have changed: moe, ternary, ...
        known = parameters(models.changed) | known
    return name, checked(name, every[name], options, known)


def model_option(config, option):
    """The value of an option of a config's model, given or preset; None if it has no such option."""
    name, options = choose_model(config.get("network", config["model"]))
    known = parameters(kind_of(name)[name])
    return options.get(option, known[option].default if option in known else None)


# ----------------------------------------------------------------------------------------------- settings -> objective


def load_data(config, split, device="cpu", **changes):
    """The data set of a config; changes override its options. Its text is added by `describe`."""
    name, options = choose("data", config["data"], data.DATASETS)
    model, _ = choose_model(config.get("network", config["model"]))
    if options.get("aspect", "square") != "square" and not (model in models.MODELS and
                                                            models.backbone(model).mixed_sizes):
        able = [other for other in models.MODELS if models.backbone(other).mixed_sizes]
        raise ValueError(f"--data {config['data']}: {model} draws images of one size; choose one of {', '.join(able)}")
    stride = model_option(config, "patch_size") or 1
    return data.load(name, config["data_dir"], split, device, stride, **options | changes)


def takes_text(config):
    """Whether the model of a config reads text: its preset, or its options, name the width of the text."""
    return bool(model_option(config, "text_width"))


def describe(config, dataset):
    """Write into a config what the data set says of itself (sides, channels, classes, captions), and give the data set
    the text that the config's model reads. config["network"] is the model that is built, --model with what the data and
    the ways to begin add to it. ValueError if the model cannot take such data."""
    config.setdefault("network", config["model"])
    text = takes_text(config)
    classes = [] if config["unconditional"] or text else list(dataset.classes)
    channels, *sides = dataset.shape
    config |= {"image_size": sides[0] if sides == 2 * sides[:1] else sides, "in_channels": channels, "classes": classes,
               "num_classes": len(classes), "data_size": len(dataset), "data_checksum": dataset.checksum()}
    name, options = choose_model(config["network"])
    if name in models.MODELS and len(sides) not in models.backbone(name).sides:
        able = [other for other in models.MODELS if len(sides) in models.backbone(other).sides]
        raise ValueError(f"--data {config['data']} holds {dataset.kind}, which {name} cannot draw: choose one of "
                         f"{', '.join(able)}")
    if text:
        with torch.device("meta"):
            length = build_model(config).text_length
        dataset.with_text(config["text"], length)
        if config["text"] == "npz":
            width = dataset.condition(torch.arange(1)).tokens.shape[-1]
            config["network"] = join_name(name, options | {"text_width": width})
        else:
            config["prompts"] = list(dict.fromkeys(dataset.captions))[:8]


def build_process(config):
    """The diffusion process that a config describes. A prediction "own" is that of the process's paper."""
    name, options = choose("process", config["process"], diffusion.PROCESSES)
    if config["prediction"] != "own":
        choose("prediction", config["prediction"], diffusion.PREDICTIONS)
        options["prediction"] = config["prediction"]
    for key, registry in (("weighting", diffusion.WEIGHTINGS), ("density", diffusion.DENSITIES)):
        if config[key] != "own":
            options[key] = bound(key, config[key], registry)
    return diffusion.create_process(name, **options)


def build_model(config):
    """The backbone that a config describes, with freshly initialised weights. Raises ValueError, whatever its
    constructor makes of a combination of options that cannot be."""
    name, options = choose_model(config["network"])
    with torch.device("cpu"):                        # the model may be wanted on the meta device
        if build_process(config).learned_variance:
            options["learn_sigma"] = True
    with sentence(f"{config['network']} cannot be built"):
        return models.create_model(name, config["image_size"], config["in_channels"], config["num_classes"], **options)


@contextlib.contextmanager
def sentence(what):
    """Turn whatever wrong options make a constructor or a first call raise into one sentence."""
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{what} with these options: {reason or type(error).__name__}") from error


def build(config, device="cpu"):
    """The training objective that a config describes, with freshly initialised weights. A backbone gets a diffusion
    objective around it, and one that reads text a TextEncoder of byte tokens, unless its text is precomputed
    (config["text"] is "npz")."""
    name, options = choose_model(config["network"])
    if name not in models.MODELS:
        return build_other(name, options, config, device)
    with torch.device("meta"):
        check_memory(build_model(config))
    model = build_model(config)
    encoder = examples = None
    if takes_text(config) and config["text"] == "bytes":
        encoder = layers.TextEncoder(model.text_width)
        examples = data.byte_tokens(config["prompts"], model.text_length)
    shape = config["in_channels"], *layers.pair(config["image_size"])
    objective = objectives.MultiScale if model.multi_scale else objectives.Diffusion
    return objective(model, build_process(config), shape, config["num_classes"], config["label_drop"], encoder,
                     examples).to(device)


def build_other(name, options, config, device):
    """An entry of another kind than the backbones, given those facts that its signature asks for; an option that is
    the folder of a run becomes the objective in it."""
    entry = kind_of(name)[name]
    wanted = inspect.signature(entry).parameters
    facts = {key: config[key] for key in ("image_size", "in_channels", "num_classes", "classes", "codes")
             if key in wanted and key in config}
    if "process" in wanted:
        facts["process"] = build_process(config)
    for key, value in options.items():
        if isinstance(value, Run):
            options[key] = open_run(value, device).objective.requires_grad_(False)
    with sentence(f"{config['network']} cannot be built"):
        return entry(**facts, **options).to(device)


def check_settings(config):
    """Refuse, before anything is loaded, names and options that do not exist or do not go together."""
    choose_model(config["model"])
    choose("data", config["data"], data.DATASETS)
    choose("optimiser", config["optimiser"], optim.OPTIMISERS)
    build_process(config)
    ways(config)


def build_optimiser(objective, config):
    """The optimiser that a config describes, over the parameters that learn."""
    name, options = choose("optimiser", config["optimiser"], optim.OPTIMISERS)
    with sentence(f"--optimiser {config['optimiser']} cannot be built"):
        return optim.OPTIMISERS[name](objective, config["lr"], config["weight_decay"], **options)


def checked_cost(objective, config):
    """`objective.cost()`, which calls the model once without computing; a call that fails is one sentence."""
    with sentence(f"{config['network']} cannot be called"):
        return objective.cost()


def check_memory(model):
    """MemoryError if weights, averages, gradients and moments cannot lie in this machine's memory. The model may be
    one on the meta device."""
    parameters = sum(p.numel() for p in model.parameters())
    with contextlib.suppress(AttributeError, ValueError, OSError):
        needed, there = 20 * parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            raise MemoryError(f"training {parameters / 1e6:,.0f} M parameters takes {needed / 2**30:,.0f} GiB, this "
                              f"machine has {there / 2**30:,.0f}")


def drawing_options(objective, given, device="cpu"):
    """Options for `objective.trajectory`, checked against those that the objective knows: names with options become
    bound entries, folders of runs the objectives in them. ValueError for an unknown option or a wrong value."""
    known = objective.options
    for key in given:
        if key not in known:
            near = unknown("option", key, known) if known else ": it has none"
            raise ValueError(f"{type(objective).__name__} draws without an option {key!r}: {near.partition(': ')[2]}")
    ready = {}
    for key, value in given.items():
        default = known[key]
        if value is None:
            ready[key] = None
        elif key in DRAWING and isinstance(value, str):
            ready[key] = bound(key, value, DRAWING[key])
        elif isinstance(default, Run):
            ready[key] = open_run(value, device).objective
        else:
            ready[key] = fitting(key, value, () if default is None else (type(default),))
    return ready


def drawing_flags(parser, objective):
    """A flag for each of an objective's drawing options, whose default is the objective's own."""
    group, told = parser.add_argument_group("how this run draws"), getattr(objective, "options_help", {})
    for key, default in objective.options.items():
        text = f"{told[key]} " if key in told else ""
        text += "(default: none)" if default is None or default == "" else f"(default: {default})"
        text += f": {', '.join(n for n in DRAWING[key] if n)}" if key in DRAWING else ""
        group.add_argument(f"--{key.replace('_', '-')}", dest=f"draw_{key}", type=value_of, metavar="VALUE",
                           default=argparse.SUPPRESS, help=text.replace("%", "%%"))


def given_drawing(args):
    """The drawing options that were given, of a namespace that `drawing_flags` filled."""
    return {key.removeprefix("draw_"): value for key, value in vars(args).items() if key.startswith("draw_")}


# -------------------------------------------------------------------------------------------------------- ways to begin
# A way to begin is a flag --NAME RUN[:option=value,...] of train.py.


class Way:
    """A way to begin that changes nothing."""

    def prepare(self, config, run):
        """Write into a new run's config what the other run decides, before the data are read."""

    def adapt(self, config, run):
        """The same once the data are known."""

    def fill(self, objective, config, run):
        """Put weights into the fresh objective of a new run."""

    def wrap(self, objective, config, run):
        """What the loop trains, at every start, that of a resumed run too."""
        return objective


class StartFrom(Way):
    """Begin with the averaged weights of another run of this model: a second stage on chosen images (--subset), or at
    a larger size, where positions are interpolated."""

    def adapt(self, config, run):
        """Resolution adaption, 2406.01159: where the model computes its positions, one that starts from a run at
        another resolution gets its pe_interpolation, so that its grid spans the same range."""
        old = open_config(run)
        name, options = split_name(config["network"])
        before = model_option(old, "pe_interpolation")
        if before is not None and "pe_interpolation" not in options and config["image_size"] != old["image_size"]:
            stretch = before * layers.pair(config["image_size"])[-1] / layers.pair(old["image_size"])[-1]
            config["network"] = join_name(name, options | {"pe_interpolation": stretch})

    def fill(self, objective, config, run):
        copy_weights(objective, run)


class Inherit(Way):
    """Begin with all weights of a run but those of its attention (LiT, from a DiT of its size)."""

    def fill(self, objective, config, run):
        copied, fresh, unused = copy_weights(objective, run, leave=[".attn."])
        print(f"{run}: {len(copied)} tensors inherited, {len(fresh)} fresh, {len(unused)} not used")


class Upcycle(Way):
    """Start a model with experts from a run of the same model with one (NAME:num_experts=1,top_k=1)."""

    def fill(self, objective, config, run):
        moe.upcycle(objective.model, open_run(run).objective.model.state_dict())


class PostTrain(Way):
    """Go on from a FiT run's averaged weights at a larger size: only patch embedding, read-out, biases and modulations
    learn, positions scale by vision-ntk (FiTv2)."""

    def prepare(self, config, run):
        opened = open_run(run)
        model = opened.objective.model
        if model.post_trains is None:
            raise ValueError(f"--post-train {run}: {opened.config['network']} is no FiT")
        name, options = split_name(opened.config["network"])
        config["network"] = join_name(name, {"rope": "vision-ntk", "trained": model.trained} | options)

    def fill(self, objective, config, run):
        load_weights(objective, open_run(run).objective.state_dict(), run)

    def wrap(self, objective, config, run):
        for name, weight in objective.model.named_parameters():
            weight.requires_grad_(bool(re.search(objective.model.post_trains, name)))
        return objective


class Distill(Way):
    """Also learn from the predictions of a frozen run (LiT, 2501.12976).

    shares: the weights of the distance in prediction and in variance. log_variance: compare log variances, not the raw
    channels."""

    def wrap(self, objective, config, run, *, shares=(0.5, 0.05), log_variance=False):
        opened = open_run(run, next(objective.parameters()).device)
        for key in ("process", "prediction", "image_size", "in_channels", "num_classes"):
            if opened.config[key] != config[key]:
                raise ValueError(f"--distill {run}: its {key} is {opened.config[key]!r}, here it is {config[key]!r}; "
                                 "teacher and student must agree in it")
        return objectives.Distilled(objective, opened.objective, shares, log_variance)


WAYS = {"start-from": StartFrom, "inherit": Inherit, "upcycle": Upcycle, "post-train": PostTrain, "distill": Distill}


def ways(config):
    """The ways to begin that a config names: [(way, folder, options of its wrap)], checked."""
    found = []
    for name, kind in WAYS.items():
        if text := config.get(name.replace("-", "_")):
            run, options = split_name(text)
            way = kind()
            found.append((way, run, checked(f"--{name}", way.wrap, options)))
    return found


def copy_weights(objective, folder, leave=()):
    """Put the averaged weights of another run in the place of the objective's own, but for those whose name holds one
    of `leave`; a position table of another grid is stretched. Returns (names copied, own names left fresh, names of
    the other run without use). ValueError if anything else does not fit."""
    own, state = objective.state_dict(), open_run(folder).objective.state_dict()
    taken = {name: value for name, value in state.items() if not any(part in name for part in leave)}
    for name, value in taken.items():
        if name.endswith("pos_embed") and name in own and own[name].shape != value.shape:
            old, new = (math.isqrt(table.shape[1]) for table in (value, own[name]))
            grid = value.unflatten(1, (old, old)).permute(0, 3, 1, 2)
            taken[name] = F.interpolate(grid, size=(new, new), mode="bilinear").flatten(2).transpose(1, 2)
    fresh = [name for name in own if any(part in name for part in leave)]
    load_weights(objective, taken | {name: own[name] for name in fresh}, folder)
    return list(taken), fresh, [name for name in state if name not in taken]


def load_weights(objective, state, path):
    """Put a state dict into the objective, all of it or nothing, with a sentence if it belongs to another model or is
    not finite."""
    own = objective.state_dict()
    wrong = [k for k in own if k not in state] + [k for k in state if k not in own or state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{path} holds the weights of another model: "
                         f"{len(wrong)} of {len(own)} names or shapes differ, the first is {wrong[0]}")
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path} is damaged: its {name} holds numbers that are not finite")
    objective.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------- opened runs


class Opened:
    """A run that was opened: folder, config, and the objective in eval mode on its device."""

    def __init__(self, path, folder, config, objective, device):
        self.path, self.folder, self.config, self.objective, self.device = path, folder, config, objective, device

    def images(self, n, seed=0, batch=64, conditions=None, first=0, frames=None, **options):
        """Images first .. first + n - 1 of a seed, batch by batch: yields (b, C, H, W) in about [-1, 1]; image i is a
        function of (seed, i) alone.

        conditions: of these n (None: those of a preview, of which image i takes number i). frames: a list, to collect
        the first batch's trajectory. options: drawing options; they overrule those of the run."""
        options = drawing_options(self.objective, self.config["draw"] | options, self.device)
        if conditions is None and (conditions := self.objective.conditions(first + n)) is not None:
            conditions = conditions[torch.arange(first, first + n)]
        yield from draw(self.objective, n, seed, batch, conditions, self.device, frames, first=first, **options)

    def trajectory(self, indices, conditions, seed=0, **options):
        """The generator of what images `indices` of a seed look like after each step."""
        options = drawing_options(self.objective, self.config["draw"] | options, self.device)
        noise = objectives.ImageNoise(seed, indices, self.device)
        return self.objective.trajectory(noise, conditions.to(self.device), **options)

    def data(self, split="test"):
        """The run's data set, no flips."""
        dataset = load_data(self.config, split, self.device, flip=False)
        return dataset.subset(self.config["subset"]) if self.config["subset"] else dataset


def draw(objective, n, seed, batch, conditions, device, frames=None, stop=None, first=0, **options):
    """What `Opened.images` does, of an objective; options are ready. stop: true once it should end early."""
    for begin in tqdm(range(0, n, batch), desc="drawing", unit=" batches", leave=False, delay=2, disable=n <= batch):
        indices = range(begin, min(begin + batch, n))
        noise = objectives.ImageNoise(seed, [first + i for i in indices], device)
        y = conditions[indices.start:indices.stop].to(device) if conditions is not None else None
        steps = tqdm(objective.trajectory(noise, y, **options), total=options.get("steps"), desc="drawing",
                     unit=" steps", leave=False, delay=2, disable=n > batch)
        for x in steps:
            if frames is not None and begin == 0:
                frames.append(x.cpu())
            if stop:
                return
        if not x.isfinite().all():
            raise ValueError("what was drawn holds numbers that are not finite: the run's weights or the drawing "
                             "options are at fault (try --guidance 1, --weights model, or an earlier checkpoint)")
        yield x


def rehearse(objective, options, device):
    """Raise what drawing with these options would raise at its start: the first step of one image is drawn."""
    was_training = objective.training
    objective.eval()
    conditions = objective.conditions(1)
    y = conditions.to(device) if conditions is not None else None
    with sentence("a picture cannot be drawn"):
        for _ in objective.trajectory(objectives.ImageNoise(0, [0], device), y, **options):
            break
    objective.train(was_training)


def checkpoint_of(path):
    """(folder, checkpoint file) of a run, which is named by its folder or by a checkpoint file in it."""
    path = Path(path).expanduser()
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no run: there is no {file}; `python train.py --out {path}` makes one")
    return file.parent, file


def open_config(path):
    """The settings of a run."""
    return upgraded(runs.load_checkpoint(checkpoint_of(path)[1])["config"])


def open_run(path, device="cpu", weights="ema"):
    """The `Opened` run in a folder, from its newest checkpoint, or in a checkpoint file. weights: "ema" or "model"."""
    folder, file = checkpoint_of(path)
    checkpoint = runs.load_checkpoint(file)
    config = upgraded(checkpoint["config"])
    try:
        objective = build(config, device)
        load_weights(objective, checkpoint[weights], file)
    except KeyError as error:
        raise ValueError(f"{file} lacks the setting {error}: it was not written by this version of train.py") from None
    return Opened(str(path), folder, config, objective.eval(), device)


def open_stitched(paths, fractions, rule="steps", device="cpu", weights="ema"):
    """As `open_run`, of several runs in one trajectory: the first takes the first share of the sampling steps, and so
    on; the last run's config and way of sampling hold. fractions: one a run, or one less: the last takes the rest."""
    parts = [open_run(path, device, weights) for path in paths]
    for key in ("image_size", "in_channels", "process", "prediction"):
        if len({str(part.config[key]) for part in parts}) > 1:
            raise ValueError(f"runs can be stitched only if they have the same {key}, and it is "
                             + ", ".join(f"{part.config[key]!r} in {part.path}" for part in parts))
    if len(fractions) == len(paths) - 1:
        fractions = [*fractions, 1 - sum(fractions)]
    last = parts[-1]
    last.objective = objectives.Stitch([part.objective for part in parts], fractions, rule).eval()
    return last


def open_published(arch, path, device="cpu"):
    """The `Opened` published checkpoint of an architecture, with its published way of drawing."""
    state = convert.read_weights(path)
    config = convert.infer_config(arch, state)
    model = convert.load_official(arch, config, state)
    if arch == "drwkv":
        config |= {"input_size": config["img_size"], "in_channels": config["channels"],
                   "num_classes": max(0, config["num_classes"])}
    elif arch in ("uvit", "dimr"):
        side = config["stage_configs"][-1]["max_height"] if arch == "dimr" else config["img_size"]
        config |= {"input_size": side, "in_channels": config.get("channels") or config["in_chans"],
                   "num_classes": max(0, (config["num_classes"] or 0) - 1), "learn_sigma": False}
    process = diffusion.Discrete(diffusion.linear_betas(), learned_variance=config["learn_sigma"])
    # As published: 250 ancestral steps, no clipping of latents, guidance on three of the four channels.
    scale = {"dico": 1.4, "drwkv": 1.5, "lit": 1.5}.get(arch, 4.0)
    draw = dict(sampler="ddpm", steps=250, guidance=scale, guide_channels=3, clip=False)
    if config.get("use_flash_attn"):                              # DiT-MoE's XL and G are rectified flows
        process = convert.DiTMoEFlow(config["learn_sigma"])
        draw = dict(sampler="euler", steps=50, guidance=7.0, clip=False)
    elif arch == "fit":
        draw |= dict(guidance=1.5)
    elif arch in ("fitv2", "flag-dit"):
        process = convert.Reversed()
        guidance = {"fitv2": 1.5, "flag-dit": 4.0}[arch]
        draw = dict(sampler="rk45", guidance=guidance, guide_channels=3, clip=False)
    elif arch in ("uvit", "dimr"):
        pixels = config["in_channels"] == 3
        draw = dict(sampler="dpm-solver", steps=50, guidance=1.0 if pixels else 1.4, clip=pixels)
        if arch == "dimr" or config["embed_dim"] == 1152:       # Stable Diffusion's chain; else continuous
            process = convert.CountsFromOne(diffusion.BETAS["scaled-linear"]())
        else:
            process = diffusion.create_process("vp")
        if arch == "dimr":
            draw |= dict(sampler="dpmpp-singlestep:order=3", steps=250)
    size = config.get("input_size", 32)
    shape = config["in_channels"], size, size
    objective = objectives.Diffusion(model, process, shape, config["num_classes"])
    return Opened(str(path), Path("."), {"draw": draw, "classes": [], "network": arch}, objective.to(device).eval(),
                  device)


# ------------------------------------------------------------------------------------------- settings of older versions


def upgraded(config):
    """A config as this version writes it. Version 1 had a flag for every option; its runs still open."""
    if config.get("version", 1) == VERSION:
        return config
    if config.get("version", 1) > VERSION:
        raise ValueError(f"this run was written by a later version of the project ({config['version']}, this is "
                         f"{VERSION}): update the project to open it")
    new = dict(config, version=VERSION)
    model = dict(config.get("model_options") or {})
    for old, option in (("moe", "moe"), ("ternary", "ternary"), ("packed", "packed"), ("balance", "balance")):
        if config.get(old) and (old != "balance" or config.get("moe") or "moe" in config["model"]):
            model[option] = tuple(config[old]) if old == "moe" else config[old]
    process = {"shift": config["shift"]} if config.get("shift", 1) != 1 else {}
    if config.get("learned_variance"):
        process["learned_variance"] = True
    if config.get("objective"):
        process["objective"] = config["objective"]
    name = config["data"]
    dataset = {"size": config["image_size"]} if name in ("shapes", "folder") or name in data.DATASETS else {}
    if isinstance(dataset.get("size"), list):
        dataset["size"] = dataset["size"][-1] if name in ("moving-shapes", "turntable", "tones") else \
            tuple(dataset["size"])
    for option in ("flip", "download", "bad_images", "aspect"):
        if option in config and option in parameters(data.DATASETS[name]):
            dataset[option] = config[option]
    new["optimiser"] = f"adamw:betas={tuple(config['betas'])!r}"
    for key in ("betas", "model_options", "moe", "ternary", "packed", "balance", "shift", "learned_variance",
                "objective", "flip", "download", "bad_images", "aspect", "sampler", "sample_steps", "grid", "guidance",
                "guidance_rule", "distill_shares", "distill_log_variance"):
        new.pop(key, None)
    draw_options = {"sampler": config["sampler"], "steps": config["sample_steps"], "guidance": config["guidance"],
                    "grid": config.get("grid"), "guidance_rule": config.get("guidance_rule", "cfg")}
    weighting = config.get("weighting", "own")
    if weighting == "own":                           # then it meant: as if eps - x0 were predicted, on flow
        weighting = "flow" if config["process"] == "flow" else "own"
    density = config.get("density") or "own"
    network = join_name(config["model"], model)
    return new | {"model": network, "network": network, "process": join_name(config["process"], process),
                  "data": join_name(name, dataset), "weighting": "own" if weighting == "none" else weighting,
                  "density": density, "draw": {k: v for k, v in draw_options.items() if v is not None},
                  "data_checksum": None}


def shown(config):
    """A config as JSON."""
    return json.dumps(config, indent=2)
