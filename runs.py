"""A run's folder, runs/<name>/: what it holds, how it is written so that no crash can spoil it, how it is read back.

    config.json     every setting, enough to rebuild the model        ckpt.pt        the newest checkpoint
    metrics.jsonl   one line per log step                             ckpt.prev.pt   the one before
    loss.png        the curve                                         samples/       step_0001000.png, ...

A checkpoint is {config, step, model, ema, optimiser}, plain types and tensors only. Nothing random is stored: data
order, noise and dropout are functions of (seed, step), so that a run killed at any moment goes on as if it had not
been.
"""

import argparse
import ast
import difflib
import json
import math
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import diffusion
import layers
import objectives
from models import MODELS, FiT, FlagDiT, backbone, create_model, options_of

# Settings that may change when a run is resumed: they do not change what a step computes.
HARMLESS = {"steps", "log_every", "sample_every", "save_every", "sample_n", "resume", "overwrite", "device", "accum",
            "compile", "data_dir", "download", "dry_run", "sampler", "sample_steps", "grid",
            "guidance", "guidance_rule"}


def command(main):
    """Run a script's main(): a user's mistake ends in one line and exit code 2, never in a traceback."""
    try:
        main()
    except torch.OutOfMemoryError as error:
        fail(f"out of memory on the GPU ({str(error).split('.')[0]}): try a smaller --batch, or --accum 2 (the same "
             "batch in two halves), a smaller --model, or --precision bf16")
    except (ValueError, OSError) as error:
        fail(error)


def fail(message):
    """Print one line to stderr and leave with exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def positive(text):
    """An argparse type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def options(text):
    """ "depth=4,patch_size=2" -> {"depth": 4, "patch_size": 2}; values are Python literals."""
    try:
        pairs = [pair.split("=", 1) for pair in text.split(";" if ";" in text else ",") if pair]
        return {key.strip(): ast.literal_eval(value.strip()) for key, value in pairs}
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value,name=value "
                                         "(separate by ; if a value holds a comma)") from None


def floats(text):
    """ "0.9,0.99" -> [0.9, 0.99]"""
    return [float(word) for word in text.split(",")]


def sides(text):
    """ "160x480" -> (160, 480)"""
    return tuple(positive(word) for word in text.split("x"))


def wholes(text):
    """ "5,10" -> [5, 10], each at least 1"""
    return [positive(word) for word in text.split(",")]


def device(name="auto"):
    """torch.device by name; "auto" takes cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: this machine, or this build of torch, has no such device; "
                         "try --device auto") from None
    return torch.device(name)


def takes_text(config):
    """Whether the model of a config is one of text: its preset, or its options, name the width of the text."""
    return bool(settings(config).get("text_width"))


def settings(config):
    """Every option of the model of a config with its value, {name: value}."""
    return {name: p.default for name, p in options_of(config["model"]).items()} | config["model_options"]


def build_model(config):
    """The backbone that a config describes, with freshly initialised weights."""
    given = {name: config[name] for name in ("moe", "ternary", "packed") if config.get(name)}
    if "balance" in config:
        given["balance"] = config["balance"]
    learned = {"learn_sigma": True} if config["learned_variance"] else {}
    return create_model(config["model"], config["image_size"], config["in_channels"], config["num_classes"],
                        **given, **learned, **config["model_options"])


def stride(config):
    """What the sides of images of mixed sizes must be multiples of: the model's patch."""
    if config["aspect"] == "square":
        return 1
    if not backbone(config["model"]).mixed_sizes:
        able = ", ".join(name for name in MODELS if backbone(name).mixed_sizes)
        raise ValueError(f"--aspect {config['aspect']}: {config['model']} draws one size; choose from {able}")
    return settings(config)["patch_size"]


def post_trained(config):
    """The averaged weights of the run that --post-train names, after its model's settings have been written into the
    config: rope vision-ntk, which scales from the size that run was trained at."""
    old = load_checkpoint(Path(config["post_train"]) / "ckpt.pt")
    if backbone(old["config"]["model"]).post_trains is None:
        raise ValueError(f"--post-train {config['post_train']}: {old['config']['model']} is no FiT")
    config["model"] = old["config"]["model"]
    trained = build(old["config"]).model.trained
    config["model_options"] = {"rope": "vision-ntk", "trained": trained} | old["config"]["model_options"]
    return old["ema"]


def extrapolate(objective, size=None, rope=None, shift=None):
    """Let a run draw images of another size, sides in pixels (one number: a square), with other rotary frequencies, and
    with sigma/alpha of every time multiplied by `shift`. A plain DiT interpolates its position table. ValueError if the
    model cannot."""
    model, sides = objective.model, len(objective.shape) - 1
    own = "x".join(map(str, objective.shape[1:]))
    if size is not None:
        size = size * sides if len(size) == 1 and sides == 2 else size
        if len(size) != sides:
            raise ValueError(f"--size {'x'.join(map(str, size))}: give {sides} sides, this run draws {own}")
        model.resize(size)
        objective.shape = objective.shape[0], *size
    if rope is not None:
        if not model.ropes:
            raise ValueError(f"--rope {rope}: this model has no rotary positions")
        check("rope", rope, model.ropes)
        model.rope = rope
    if shift is not None:
        if isinstance(objective.process, diffusion.Discrete) or shift <= 0:
            raise ValueError(f"--shift {shift}: it must be above 0, and a discrete chain is shifted in training only")
        objective.process.shift = shift


def build(config):
    """The training objective that a config describes, with freshly initialised weights. A model of text gets a
    TextEncoder of byte tokens beside it, unless its text is precomputed (config["text"] is "npz")."""
    model = build_model(config)
    encoder = examples = None
    if takes_text(config) and config["text"] == "bytes":
        encoder = layers.TextEncoder(model.text_width)
        examples = data.byte_tokens(config["prompts"], model.text_length)
    draw = {"sampler": config["sampler"], "steps": config["sample_steps"], "grid": config["grid"],
            "guidance": config["guidance"], "rule": config["guidance_rule"]}
    shape = config["in_channels"], *layers.pair(config["image_size"])
    objective = objectives.MultiScale if model.multi_scale else objectives.Diffusion
    return objective(model, process(config), shape, config["num_classes"], config["label_drop"], draw, encoder,
                     examples)


def process(config):
    """The diffusion process that a config describes."""
    prediction = None if config["prediction"] == "own" else config["prediction"]
    own = "flow" if config["process"] == "flow" else None
    weighting = {"own": own, "none": None}.get(config["weighting"], config["weighting"])
    return diffusion.create_process(config["process"], prediction, config["shift"], weighting=weighting,
                                    density=config["density"], learned_variance=config["learned_variance"] or None,
                                    objective=config.get("objective"))


def add_text(config, dataset):
    """Give the dataset the text that a config's model reads, and write into the config what `build` has to know of it:
    the width of precomputed embeddings, or the captions of the previews."""
    with torch.device("meta"):
        length = build_model(config).text_length
    if config["unconditional"]:
        dataset.captions = [""] * len(dataset)
    dataset.with_text(config["text"], length)
    if config["text"] == "npz":
        config["model_options"] = config["model_options"] | {"text_width": dataset.condition(
            torch.arange(1)).tokens.shape[-1]}
    else:
        config["prompts"] = list(dict.fromkeys(dataset.captions))[:8]


SAMPLING = {"sampler": diffusion.SAMPLERS, "grid": diffusion.GRIDS, "guidance_rule": diffusion.GUIDANCE}


def sampling_options(args):
    """The flags of sample.py and evaluate.py that overrule a run's own way of sampling, as options of `generate`."""
    given = {"sampler": args.sampler, "steps": args.steps, "grid": args.grid, "guidance": args.guidance,
             "rule": args.guidance_rule, "interval": args.interval, "power": args.guidance_power,
             "quantile": args.threshold}
    return {name: value for name, value in given.items() if value is not None}


def sampling_flags(parser):
    """The flags that `sampling_options` reads."""
    add = parser.add_argument
    add("--sampler", help="default: the run's own; " + ", ".join(diffusion.SAMPLERS))
    add("--steps", type=positive, metavar="N", help="sampling steps (default: the run's own)")
    add("--grid", help="grid of sampling times (default: the run's own); " + ", ".join(diffusion.GRIDS))
    add("--guidance", type=float, help="classifier-free guidance, 1 for none (default: the run's own)")
    add("--guidance-rule", help="how it is applied (default: the run's own); " + ", ".join(diffusion.GUIDANCE))
    add("--guidance-power", type=float, metavar="K", help="let the guidance fall from noise to image by the "
        "power-cosine schedule (FiTv2), for example 1")
    add("--interval", type=floats, metavar="LOW,HIGH", help="guide only between these times of the process")
    add("--threshold", type=float, metavar="Q",
        help="dynamic thresholding: clip at this quantile of |x0|, for example 0.995, and rescale (default: clip at 1)")


def size_flags(parser):
    """The flags of `extrapolate`."""
    add = parser.add_argument
    add("--size", type=sides, metavar="HxW", help="draw images of this height and width (clips: FxHxW, sounds: T), if "
        "the model can")
    add("--shift", type=float, metavar="M", help="multiplies sigma/alpha of every time: above 1 for larger images, "
        "which need more steps at noise (default: the run's own)")
    add("--rope", metavar="NAME", help="rotary frequencies for sizes beyond training: FiT: "
        f"{', '.join(FiT.ropes[:7])}, each also after vision-; Flag-DiT: {', '.join(FlagDiT.ropes)}")


def check(flag, value, choices):
    """ValueError with the nearest names if a flag's value is given and is not among its choices."""
    if value is not None and value not in choices:
        raise ValueError(unknown(f"--{flag.replace('_', '-')}", value, choices))


def unknown(what, name, choices):
    """The sentence for a name that is not among the choices: the nearest ones, or all of them."""
    near = difflib.get_close_matches(name, choices, 3, 0.4)
    advice = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(choices)}"
    return f"unknown {what} {name!r}: {advice}"


# ---------------------------------------------------------------------------------------------------------- checkpoints


def write(path, save):
    """Call save(temporary path), flush it to disk and only then give it its name: `path` never holds half a file."""
    partial = path.with_name(path.name + ".tmp")
    try:
        save(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:                      # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"cannot write {path} ({free:,.0f} MB free): {error}; "
                      "what was there before is untouched") from None


def save_checkpoint(folder, state):
    """Write ckpt.pt and keep the one it replaces as ckpt.prev.pt. There is a whole checkpoint at every moment."""
    newest, previous = folder / "ckpt.pt", folder / "ckpt.prev.pt"
    if newest.exists():
        write(previous, lambda path: link(newest, path))
    write(newest, lambda path: torch.save(state, path))


def link(source, target):
    """Another name for a file, or a copy where the file system knows no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def load_checkpoint(path):
    """A checkpoint file on the CPU, its checksums verified (torch alone would load flipped bits without a word)."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"checksum of {bad} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in ("config", "step", "model", "ema", "optimiser")}
    except Exception as error:
        message = f"{path} is damaged or not a checkpoint of this project ({str(error).splitlines()[0][:120]})"
        previous = path.with_name("ckpt.prev.pt")
        if path.name == "ckpt.pt" and previous.exists():
            message += f"; the one before it is {previous}: train.py --resume {previous} goes on from there"
        raise ValueError(message) from None


def start_from(objective, folder, leave=()):
    """Put the averaged weights of another run in the place of the objective's own, but for those whose name holds one
    of `leave`; a position table of another grid is stretched. Returns (names copied, own names left fresh, names of
    the other run without use). ValueError if anything else does not fit."""
    own, state = objective.state_dict(), open_run(folder)[1].state_dict()
    passed = lambda name: any(part in name for part in leave)
    taken = {name: value for name, value in state.items() if not passed(name)}
    for name, value in taken.items():
        if name.endswith("pos_embed") and name in own and own[name].shape != value.shape:
            old, new = (math.isqrt(table.shape[1]) for table in (value, own[name]))
            grid = value.unflatten(1, (old, old)).permute(0, 3, 1, 2)
            taken[name] = F.interpolate(grid, size=(new, new), mode="bilinear").flatten(2).transpose(1, 2)
    fresh = [name for name in own if passed(name)]
    load_weights(objective, taken | {name: own[name] for name in fresh}, folder)
    return list(taken), fresh, [name for name in state if passed(name)]


def adapt(config, folder):
    """Resolution adaption, 2406.01159: where the model computes its positions, one that starts from a run at another
    resolution gets its pe_interpolation, so that its grid spans the same range."""
    old = load_checkpoint(Path(folder) / "ckpt.pt")["config"]
    if "pe_interpolation" in settings(config) and "pe_interpolation" not in config["model_options"]:
        before = settings(old)["pe_interpolation"]
        stretch = before * config["image_size"] / old["image_size"]
        config["model_options"] = config["model_options"] | {"pe_interpolation": stretch}


def teacher(config):
    """The frozen model of the run config["distill"]; ValueError if it was trained to predict something else."""
    theirs, objective = open_run(config["distill"])
    for key in ("process", "prediction", "shift", "learned_variance", "image_size", "in_channels", "num_classes"):
        if theirs[key] != config[key]:
            raise ValueError(f"--distill {config['distill']}: its {key} is {theirs[key]!r}, here it is "
                             f"{config[key]!r}; teacher and student must agree in it")
    return objective.model


def load_weights(objective, state, path):
    """Put a state dict into the objective, all of it or nothing, with a sentence if it belongs to another model."""
    own = objective.state_dict()
    wrong = [k for k in own if k not in state] + [k for k in state if k not in own or state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{path} holds the weights of another model: "
                         f"{len(wrong)} of {len(own)} names or shapes differ, the first is {wrong[0]}")
    objective.load_state_dict(state)


def open_run(folder, device="cpu", weights="ema"):
    """(config, objective in eval mode) of a run, from its newest checkpoint. weights: "ema" or "model"."""
    folder = Path(folder)
    path = folder / "ckpt.pt" if folder.is_dir() else folder
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path}; "
                                f"`python train.py --out {folder}` makes one")
    checkpoint = load_checkpoint(path)
    objective = build(checkpoint["config"])
    load_weights(objective, checkpoint[weights], path)
    return checkpoint["config"], objective.to(device).eval()


def open_stitched(folders, fractions, rule="steps", device="cpu", weights="ema"):
    """As `open_run`, of several runs in one trajectory: the first takes the first share of the sampling steps, and so
    on; the last run's config and way of sampling hold. fractions: one a run, or one less: the last takes the rest."""
    configs, parts = zip(*(open_run(folder, device, weights) for folder in folders))
    for key in ("image_size", "in_channels", "learned_variance", "process", "prediction", "shift"):
        if len({config[key] for config in configs}) > 1:
            raise ValueError(f"runs can be stitched only if they have the same {key}, and it is "
                             + ", ".join(f"{config[key]!r} in {folder}" for config, folder in zip(configs, folders)))
    if len(fractions) == len(folders) - 1:
        fractions = [*fractions, 1 - sum(fractions)]
    return configs[-1], objectives.Stitch(parts, fractions, rule).eval()


def draw(objective, labels, n, seed, batch, device, first=0, frames=None, **options):
    """Images first .. first + n - 1 of `seed`, batch by batch: yields (b, C, H, W), with n labels, texts or None.
    frames, a list, collects the first batch's trajectory. options override the objective's own way of sampling."""
    for begin in tqdm(range(0, n, batch), desc="drawing", unit=" batches", leave=False, delay=2, disable=n <= batch):
        indices = range(begin, min(begin + batch, n))
        noise = objectives.ImageNoise(seed, [first + i for i in indices], device)
        y = labels[indices.start:indices.stop].to(device) if labels is not None else None
        x = noise((len(indices), *objective.shape))
        if frames is not None and begin == 0:
            frames.append(x)
        steps = options.get("steps") or objective.draw.get("steps")
        trajectory = objective.trajectory(x, y, noise=noise, **options)
        for x in tqdm(trajectory, total=steps, desc="denoising", unit=" steps", leave=False, delay=2,
                      disable=n > batch):
            if frames is not None and begin == 0:
                frames.append(x)
        yield x


# ----------------------------------------------------------------------------------------------------------- run folder


def check_free(folder, overwrite=False):
    """Refuse a folder that holds a run already, unless it may be replaced; never replace what is not a run."""
    if folder.exists() and any(entry.name != ".lock" for entry in folder.iterdir()):
        if not (folder / "config.json").exists():
            raise FileExistsError(f"{folder} is in use and holds no run: choose another folder by --out")
        if not overwrite:
            raise FileExistsError(f"{folder} exists already: go on with it by --resume, replace it by --overwrite, or "
                                  "choose another folder by --out")


def start(folder, config, overwrite=False, resume=False):
    """Write a run's config into its (locked) folder. Unless it resumes, an old run's files, and only those, go."""
    if not resume:
        check_free(folder, overwrite)
        for name in ("config.json", "metrics.jsonl", "loss.png", "score.json", "ckpt.pt", "ckpt.prev.pt"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "samples", ignore_errors=True)
    write(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def lock(folder):
    """Hold the folder for this process; a second one is refused. The system lets go when the process ends, however."""
    try:
        import fcntl
    except ImportError:                                           # Windows: no lock
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another process is writing to {folder}: wait for it, "
                         "or choose another folder by --out") from None
    return file


def check_resumable(old, new):
    """Refuse to go on with settings that change what a step computes."""
    for key in old:
        if key not in HARMLESS and old[key] != new.get(key):
            raise ValueError(f"--resume: {key} was {old[key]!r} and is now {new.get(key)!r}; "
                             "leave it as it was, or start a new run by --out")


def log(folder, entry):
    """Append one line to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def history(folder, until=None):
    """The entries of metrics.jsonl; with `until`, those of later steps and a torn last line leave the file."""
    path, entries = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if until is not None and path.exists():
        entries = [e for e in entries if e["step"] <= until]
        write(path, lambda p: p.write_text("".join(json.dumps(e) + "\n" for e in entries)))
    return entries


def clean(folder):
    """Remove what a killed process left half-written."""
    for leftover in folder.rglob("*.tmp"):
        leftover.unlink()


class Stop:
    """True once SIGINT (Ctrl-C) or SIGTERM has come: the loop finishes its step, saves, leaves.
    A second signal ends at once."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.handle)

    def handle(self, number, frame):
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def __bool__(self):
        return self.asked
