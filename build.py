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
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import autoencoders
import convert
import convert_tokens
import cropping
import data
import diffusion
import guidance
import guides
import layers
import masked
import models
import moe
import objectives
import optim
import ppgn
import runs
import samplers
import weights as files
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
KINDS = {"backbones": models.MODELS, "tokenizers": autoencoders.TOKENIZERS, "generators": masked.GENERATORS,
         "guides": guides.GUIDES, "plug and play generative networks": ppgn.GENERATORS, "cropping": cropping.AGENTS}
data.DATASETS["scenes"] = cropping.scenes            # drawn in the room that needs them
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
        before = None
        for name in names:
            entry = registry[name]
            text = size_line(*costs[name]) if name in costs else entry if isinstance(entry, str) else line(entry)
            yield f"  {name:20} " + ("the same, of another size" if text == before else text)
            before = text


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
    if (network := config.get("network", config["model"])) in convert.OFFICIAL:
        return None                                  # a published file that no name makes
    name, options = choose_model(network)
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
    options = {key: open_run(value, device).objective if isinstance(value, Run) else value
               for key, value in options.items()}
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
    config["codes"] = getattr(dataset, "codes", None)
    if name in models.MODELS and config["codes"]:
        raise ValueError(f"--model {name} denoises latents, and --tokenizer {config['tokenizer']} makes codes: choose "
                         f"one of {', '.join(masked.GENERATORS)}, or a tokenizer of latents")
    if name in models.MODELS and len(sides) not in models.backbone(name).sides:
        able = [other for other in models.MODELS if len(sides) in models.backbone(other).sides]
        raise ValueError(f"--data {config['data']} holds {dataset.kind}, which {name} cannot draw: choose one of "
                         f"{', '.join(able)}")
    if text:
        length = model_option(config, "text_length")
        if name in models.MODELS:
            with torch.device("meta"):
                length = build_model(config).text_length
        dataset.with_text(config["text"], length)
        if config["text"] == "npz":
            width = dataset.condition(torch.arange(1)).tokens.shape[-1]
            config["network"] = join_name(name, options | {"text_width": width})
        else:
            config["prompts"] = list(dict.fromkeys(dataset.captions))[:8]


def open_tokenizer(path, device="cpu"):
    """A frozen tokenizer, with encode, decode and `codes`: a run of one, or a published autoencoder's file."""
    place = Path(path).expanduser()
    if place.is_file() and not place.name.startswith("ckpt"):
        tokenizer = convert.load_tokenizer(place)
    else:
        tokenizer = open_run(path, device).objective
    if not hasattr(tokenizer, "decode"):
        raise ValueError(f"--tokenizer {path}: that is the run of no tokenizer; train one of "
                         f"{', '.join(autoencoders.TOKENIZERS)} first")
    return tokenizer.to(device).eval().requires_grad_(False)


def tokenized(config, dataset):
    """The data set as the config's tokenizer sees it, encoded once beside it; writes into the config the scale of its
    latents, and that pictures of latents are not clipped. ValueError for a tokenizer of other images."""
    path, name = config["tokenizer"], config["data"].partition(":")[0]
    tokenizer = open_tokenizer(path, dataset.device)
    if dataset.budget or len(dataset.shape) != 3:
        raise ValueError(f"--tokenizer: {config['data']} holds {dataset.kind} of mixed sizes or none that are images")
    fits = getattr(tokenizer, "image_shape", dataset.shape)
    if tuple(fits) != tuple(dataset.shape):
        raise ValueError(f"--tokenizer {path} was trained on images of {'x'.join(map(str, fits))}, those of "
                         f"{config['data']} are {'x'.join(map(str, dataset.shape))}: train another, or choose --data "
                         "NAME:size=")
    if (place := Path(path).expanduser()).is_dir() and (other := open_config(place)["data"].partition(":")[0]) != name:
        raise ValueError(f"--tokenizer {path} was trained on {other}, and --data is {name}: train one on that")
    with torch.no_grad(), sentence(f"--tokenizer {path} cannot read {config['data']}"):
        x, _ = dataset.gather(torch.arange(1))
        if tokenizer.decode(tokenizer.encode(x)).shape != x.shape:
            raise ValueError(f"--tokenizer {path} gives back images of another size than {config['data']} holds: it "
                             "halves their sides several times, so they must be multiples of a power of two")
    root = Path(config["data_dir"]).expanduser().resolve()
    folder = root.with_name(f"{root.name}-latents")
    latents = autoencoders.latents_of(dataset, tokenizer, folder, name, config.get("latent_scale"))
    config["latent_scale"] = latents.scale
    if choose_model(config.get("network", config["model"]))[0] in models.MODELS:
        config["draw"] = {"clip": False} | config["draw"]
    return latents


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
        process = build_process(config)
        if process.learned_variance or getattr(process, "spare", False):         # twice the channels
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
    (config["text"] is "npz"). Of a run with a tokenizer, it draws through that."""
    objective = build_objective(config, device)
    if config.get("tokenizer"):
        tokenizer = open_tokenizer(config["tokenizer"], device)
        objective.__dict__["decoder"] = autoencoders.Decoder(tokenizer, config["latent_scale"])
    return objective


def build_objective(config, device):
    """The objective without what draws it."""
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


def own_optimiser(config):
    """Write into a config the optimiser and the rate where they are None: the model's own (`models.optimiser_of`; of
    what is no backbone AdamW at 1e-3), and to an optimiser that is not its own that one's usual rate. A sharded run
    has AdamW: Muon needs whole matrices."""
    name, options = choose_model(config["model"])
    own, rate = models.optimiser_of(name, **options) if name in models.MODELS else ("adamw", 1e-3)
    if config["shard"] and own != "adamw":
        own, rate = "adamw", optim.RATES["adamw"]
    config["optimiser"] = config["optimiser"] or own
    if config["lr"] is None:
        chosen = split_name(config["optimiser"])[0]
        config["lr"] = rate if chosen == own else optim.RATES.get(chosen, rate)


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
            ready[key] = open_run(value, device).objective if isinstance(value, str) else value
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
    """Begin with the averaged weights of another run of this model, or with a published file: a second stage on chosen
    images (--subset), other classes, whose labels start fresh, or a larger size, where positions are interpolated."""

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
        copy_weights(objective, run, getattr(objective, "starts_fresh", ()))


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


class Published(Way):
    """Begin with the weights of a published file under their own names: torchvision's ResNets, timm's DeiT, ADM's
    classifiers (--lr 0 --steps 1 keeps them as they are)."""

    def fill(self, objective, config, run):
        if not hasattr(objective, "load_published"):
            raise ValueError(f"--published {run}: {config['model']} is no guide; published denoisers are drawn from by "
                             "sample.py --official")
        if fresh := objective.load_published(convert.read_weights(run), run):
            print(f"{run}: all but {', '.join(fresh)}, which are fresh")


WAYS = {"start-from": StartFrom, "inherit": Inherit, "upcycle": Upcycle, "post-train": PostTrain, "distill": Distill,
        "published": Published}


def ways(config):
    """The ways to begin that a config names: [(way, folder, options of its wrap)], checked. What is said of a
    published file stays with its name, and so does --official."""
    found = []
    for name, kind in WAYS.items():
        if text := config.get(name.replace("-", "_")):
            run, options = split_name(text)
            of_file = {key: options.pop(key) for key in list(options) if key in file_options()}
            if config.get("official") and is_published(run):
                of_file.setdefault("arch", config["official"])
            way = kind()
            found.append((way, join_name(run, of_file), checked(f"--{name}", way.wrap, options)))
    return found


def adopt(config):
    """Write into a new run's settings what a published file decides that it starts from: process and prediction, and
    the network where --model names a U-Net (the default), which no published file is. ValueError for another
    process."""
    source = next((run for way, run, _ in ways(config) if isinstance(way, StartFrom) and is_published(run)), None)
    if source is None:
        return
    old = open_config(source)
    if config["process"] not in ("flow", old["process"]):
        raise ValueError(f"--start-from {source} was trained with --process {old['process']}, not {config['process']}")
    if choose_model(config["model"])[0].startswith("unet"):
        config["model"] = old["network"]
        print(f"--model {old['network']}: that of {source}")
    config |= {"process": old["process"], "prediction": old["prediction"]}
    config["density"] = old["density"] if config["density"] == "own" else config["density"]
    config["label_drop"] = min(config["label_drop"], old["label_drop"])


def copy_weights(objective, folder, leave=()):
    """Put the averaged weights of another run in the place of the objective's own, but for those whose name holds one
    of `leave`. A position table of another grid is stretched; of labels in another number, the rows of the classes
    start fresh, and the null label's is kept. Returns (names copied, own names left fresh, names of the other run
    without use). ValueError if anything else does not fit."""
    own, opened = objective.state_dict(), open_run(folder)
    state, classes = opened.objective.state_dict(), opened.config["num_classes"]
    is_left = lambda name: any(part in name for part in leave)
    taken = {name: value for name, value in state.items() if not is_left(name)}
    fresh = [name for name in own if is_left(name)]
    for name, value in list(taken.items()):
        if name.endswith("pos_embed") and name in own and own[name].shape != value.shape:
            taken[name] = stretched(value, own[name], getattr(objective.model, "extras", 0))
    if classes != objective.num_classes:
        for name in [name for name in own.keys() | taken.keys() if name.endswith("embedding_table.weight")]:
            theirs = taken.pop(name, None)
            if name in own and theirs is not None and len(own[name]) > objective.num_classes and len(theirs) > classes:
                own[name] = torch.cat([own[name][:-1], theirs[-1:].to(own[name])])          # the null label
            fresh += [name] if name in own else []
        print(f"{folder}: {classes} classes there, {objective.num_classes} here: their labels start fresh")
    load_weights(objective, taken | {name: own[name] for name in fresh}, folder)
    return list(taken), fresh, [name for name in state if name not in taken]


def stretched(table, own, extras):
    """A position table (1, extras + N, D) or (h, w, D), bilinear, on the grid of `own`; the first `extras` rows are of
    tokens that are no patches."""
    if table.ndim == 3 and len(table) > 1:
        return F.interpolate(table.permute(2, 0, 1)[None], size=own.shape[:2], mode="bilinear")[0].permute(1, 2, 0)
    old, new = (math.isqrt(t.shape[1] - extras) for t in (table, own))
    grid = table[:, extras:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bilinear").flatten(2).transpose(1, 2)
    return torch.cat([table[:, :extras], grid], 1)


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
        if conditions is None and (conditions := preview_conditions(self.objective, options, first + n)) is not None:
            conditions = conditions[torch.arange(first, first + n)]
        yield from draw(self.objective, n, seed, batch, conditions, self.device, frames, first=first, **options)

    def trajectory(self, indices, conditions, seed=0, **options):
        """The generator of what images `indices` of a seed look like after each step."""
        options = drawing_options(self.objective, self.config["draw"] | options, self.device)
        noise = objectives.ImageNoise(seed, indices, self.device)
        for x in self.objective.trajectory(noise, conditions.to(self.device), **options):
            yield as_images(self.objective, x)

    def filled(self, image, hole, n, seed=0, conditions=None, **options):
        """n times an image (C, H, W) in [-1, 1] whose pixels are drawn anew where hole (H, W) is true: a generator of
        (n, C, H, W) after each step. ValueError if the objective fills no holes, or the sizes differ."""
        if not hasattr(self.objective, "fill"):
            raise ValueError(f"{self.path} is a run of {self.config['network']}, which fills no holes: denoisers do, "
                             f"masked models ({', '.join(masked.GENERATORS)}), and ppgn-nano with encoder=")
        if not hole.any():
            raise ValueError("the mask has no hole: white pixels are those to draw anew")
        options = drawing_options(self.objective, self.config["draw"] | options, self.device)
        noise = objectives.ImageNoise(seed, range(n), self.device)
        x, hole = image.to(self.device).expand(n, -1, -1, -1), hole.to(self.device).expand(n, -1, -1)
        y = conditions.to(self.device) if conditions is not None else None
        decoder = self.objective.__dict__.get("decoder")
        known, cells = (x, hole) if decoder is None else decoder.encoded(x, hole)
        for step in self.objective.fill(noise, known, cells, y, **options):
            yield torch.where(hole[:, None], as_images(self.objective, step), x)

    def reworked(self, image, strength, n, seed=0, conditions=None, **options):
        """n images after each step that begin at an image (C, H, W) in [-1, 1] with noise, and walk only the last
        share `strength` of the steps (SDEdit, 2108.01073). ValueError if the run is no denoiser's."""
        if not isinstance(self.objective, objectives.Diffusion):
            raise ValueError(f"{self.path} is a run of {self.config['network']}, which begins at no image: denoisers "
                             "do")
        options = drawing_options(self.objective, self.config["draw"] | options, self.device)
        noise, x = objectives.ImageNoise(seed, range(n), self.device), image.to(self.device).expand(n, -1, -1, -1)
        y = conditions.to(self.device) if conditions is not None else None
        if (decoder := self.objective.__dict__.get("decoder")) is not None:
            x, _ = decoder.encoded(x, torch.zeros_like(x[:, 0], dtype=torch.bool))
        for step in self.objective.trajectory(noise, y, image=x, strength=strength, **options):
            yield as_images(self.objective, step)

    def data(self, split="test"):
        """The run's data set, no flips. ValueError for a published file of which no data set was said, or another."""
        if not self.config["data"]:
            raise ValueError(f"{self.path} says nothing of images to compare with: name a data set, "
                             f"{self.path}:data=NAME")
        dataset = load_data(self.config, split, self.device, flip=False)
        return dataset.subset(self.config["subset"]) if self.config["subset"] else dataset


def as_images(objective, x):
    """What a trajectory yields as images: through the tokenizer, where the objective has latents or codes."""
    decoder = objective.__dict__.get("decoder")
    return x if decoder is None else decoder(x)


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
                frames.append(as_images(objective, x).cpu())
            if stop:
                return
        x = as_images(objective, x)
        if not x.isfinite().all():
            raise ValueError("what was drawn holds numbers that are not finite: the run's weights or the drawing "
                             "options are at fault (try --guidance 1, --weights model, or an earlier checkpoint)")
        yield x


def preview_conditions(objective, options, n):
    """The conditions of a preview of n, drawn with these (ready) options: those of a guide where the objective has
    none."""
    conditions, guide = objective.conditions(n), options.get("guide")
    return guide.conditions(n) if conditions is None and guide else conditions


def rehearse(objective, options, device):
    """Raise what drawing with these options would raise at its start: the first step of one image is drawn."""
    was_training = objective.training
    objective.eval()
    conditions = preview_conditions(objective, options, 1)
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


def is_published(path):
    """Whether a path, perhaps with options behind it, names a published file or a folder of one, and no run."""
    place = Path(split_name(str(path))[0] if not Path(path).expanduser().exists() else path).expanduser()
    if place.is_dir():
        return not (place / "ckpt.pt").exists() and any(
            entry.suffix in files.SUFFIXES or entry.name.endswith(".index.json") for part in (place, *place.glob("*/"))
            for entry in part.iterdir() if not entry.name.startswith("ckpt"))
    if not place.is_file() or place.name in runs.FILES:
        return False
    try:
        with zipfile.ZipFile(place) as archive:      # a checkpoint of ours says so by its words
            inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return b"optimiser" not in archive.read(inside)
    except (zipfile.BadZipFile, StopIteration, OSError):
        return True


def exported_config(path):
    """The settings of a run of ours that was exported as safetensors into this folder, or None."""
    file = Path(path).expanduser() / "config.json"
    found = files.settings_of(file) if file.is_file() and not (file.parent / "ckpt.pt").exists() else {}
    ours = found.get("format") == files.FORMAT and isinstance(found.get("run"), dict)
    return upgraded(found["run"]) if ours else None


def open_config(path):
    """The settings of a run, or those that a published file stands for."""
    if config := exported_config(path):
        return config
    if is_published(path):
        return published_config(*read_published(path))
    return upgraded(runs.load_checkpoint(checkpoint_of(path)[1])["config"])


def open_run(path, device="cpu", weights="ema"):
    """The `Opened` run in a folder, from its newest checkpoint, or in a checkpoint file; or a published file or folder,
    with options behind its name: FILE:arch=dit. weights: "ema" or "model"."""
    if config := exported_config(path):
        folder = Path(path).expanduser()
        objective = build(config, device)
        load_weights(objective, files.read_file(folder / "model.safetensors"), folder)
        return Opened(str(path), folder, config, objective.eval(), device)
    if is_published(path):
        return open_published(path, device)
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


# ------------------------------------------------------------------------------------------------------ published files


def file_options():
    """What may be said of a published file behind its name, FILE:option=value: {name: inspect.Parameter}."""
    known = parameters(convert.published) | parameters(open_published)
    return {key: p for key, p in known.items() if key != "device"}


def read_published(path, **given):
    """(the `convert.Published` that a path names, what else was said of it). Options may stand behind the path."""
    place, options = (path, {}) if Path(path).expanduser().exists() else split_name(str(path))
    options |= {key: value for key, value in given.items() if value is not None}
    options = checked(str(place), None, options, file_options())
    read = {key: options.pop(key) for key in list(options) if key in parameters(convert.published)}
    return convert.published(place, **read), options


# What an exported run keeps of its settings: how its network is called, and how it draws.
OF_EXPORT = ("process", "prediction", "weighting", "density", "classes", "draw")


def published_config(file, said):
    """The settings of a run that would draw as a published file does; of an export of ours, as the run."""
    settings, network = file.settings, join_name(file.name, file.options) if file.name else file.arch
    classes = settings.get("num_classes", 0) if not settings.get("text_width") else 0
    return {"version": VERSION, "published": file.arch, "model": network, "network": network,
            "process": file.process, "prediction": "own", "weighting": "own", "density": file.density,
            "image_size": settings["image_size"], "in_channels": settings["in_channels"], "num_classes": classes,
            "classes": [], "label_drop": 0.1 if settings.get("null_class", True) else 0.0, "text": "npz",
            "unconditional": False, "subset": None, "data": said.get("data"),
            "data_dir": said.get("data_folder", "data"), "latent_scale": file.latent_scale, "pixels": file.stride,
            "draw": file.draw} | {key: file.run[key] for key in OF_EXPORT if key in file.run}


def open_published(path, device="cpu", null: str | None = None, data: str | None = None,
                   data_folder: str | None = None, **given):
    """The `Opened` published file or folder, with its published way of drawing; what it is, and what had to be assumed
    of it, is printed. given: arch, size, top_k, heads, see `convert.published`. null: an .npz of the empty caption's
    embedding, which guidance of a model of text needs. data, data_folder: a data set to compare it with. arch may also
    be a generator of MASKED, or a2rl."""
    if given.get("arch") in (*MASKED, "a2rl"):
        return open_generator(path, given["arch"], device)
    file, said = read_published(path, null=null, data=data, data_folder=data_folder, **given)
    config, notes = published_config(file, said), list(file.assumed)
    if file.name:
        objective = build(config, device)
    else:                                            # no name of the registry makes it
        objective = bare_objective(file, config).to(device)
    model, state = objective.model, dict(file.state)
    if file.order:
        table = "y_embedder.embedding_table.weight"
        state[table] = state[table][file.order + list(range(len(file.order), len(state[table])))]
        config["order"] = file.order
    state = convert.ours(file.arch, state, model)
    load_weights(objective, {f"model.{name}": value for name, value in state.items()}, path)
    if model.text_width and "guidance" in config["draw"] and model.null_text is not None and file.arch != "dimba":
        if said.get("null"):
            model.null_text = null_caption(said["null"], model)
        else:
            del config["draw"]["guidance"]
            notes.append("no guidance, which needs the empty caption's embedding: FILE:null=FILE.npz")
    print(f"{path}: {file.title}")
    if notes:
        print("assumed: " + "; ".join(notes))
    if file.aside:
        print("left out, no tensors: " + ", ".join(file.aside))
    stem = Path(split_name(str(path))[0]).stem
    return Opened(str(path), Path("runs") / stem, config, objective.to(device).eval(), device)


MASKED = "maskgit", "maskgit-r", "mage", "mar"                   # published generators of tokens


def open_generator(path, arch, device):
    """The `Opened` published generator of tokens (of MASKED) or cropping agent (a2rl) in a file."""
    if arch == "a2rl":
        objective = cropping.published(path, device)
    else:
        state = files.read_weights(path)
        network = convert_tokens.load_tokens(arch, convert_tokens.infer_tokens(arch, state), state)
        objective = masked.published(arch, network).to(device).eval()
    config = {"published": arch, "network": arch, "model": arch, "draw": {}, "classes": [], "text": None,
              "latent_scale": 1.0}
    return Opened(str(path), Path("runs") / Path(path).stem, config, objective, device)


def bare_objective(file, config):
    """The objective of a published file that no name of the registry makes."""
    model = convert.layout_of(file.arch).kind(**file.settings)
    kind = objectives.MultiScale if model.multi_scale else objectives.Diffusion
    shape = config["in_channels"], *layers.pair(config["image_size"])
    return kind(model, build_process(config), shape, config["num_classes"], config["label_drop"])


def null_caption(path, model):
    """The embedding in an .npz as the empty caption of a model: (text_length, text_width), zeros behind its end."""
    tokens = data.read_embeddings([Path(path).expanduser()], model.text_length).tokens[0]
    if tokens.shape[1] != model.text_width:
        raise ValueError(f"{path} holds an embedding of width {tokens.shape[1]}, this model reads {model.text_width}")
    return F.pad(tokens, (0, 0, 0, model.text_length - len(tokens)))


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
