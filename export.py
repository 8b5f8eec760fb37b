"""A run as files that others read: the published layout of its architecture, diffusers' folder, or safetensors.

    python evaluate.py export runs/my-dit --to dit my-dit        weights, config.json and a card in the folder my-dit
"""

import json
from pathlib import Path

import torch

import build
import convert
import models
import runs
import weights
from layers import position_table

# What the published code of an architecture takes for granted, in the house's words.
PROCESSES = {"dit": "linear:learned_variance=True", "lit": "linear:learned_variance=True",
             "dit-moe": "linear:learned_variance=True", "terdit": "linear:learned_variance=True",
             "dico": "linear:learned_variance=True", "drwkv": "linear:learned_variance=True",
             "fit": "linear:learned_variance=True", "sit": "sit-flow", "fitv2": "sit-flow", "flag-dit": "sit-flow",
             "flag-dit-text": "sit-flow", "uvit": "vp", "dimr": "uvit-chain", "dimba": "linear:learned_variance=True"}


def export_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run, a checkpoint file in it, or a published file")
    p.add_argument("out", metavar="OUT", help="a new folder: the weights, config.json, and a card README.md")
    p.add_argument("--to", required=True, metavar="LAYOUT", help=f"{', '.join(convert.OFFICIAL)}: as published, a file "
                   "that the published code loads; diffusers: a folder of its DiT; safetensors: our own names")
    p.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged or last (default: %(default)s)")
    p.add_argument("--device", default="cpu", help="cuda, mps, cpu or auto (default: %(default)s)")


def export(args):
    """A run in the published layout of its architecture, as diffusers' folder or as safetensors, with a model card."""
    run, out = args.run, Path(args.out).expanduser()
    if args.to not in ("safetensors", "diffusers"):
        convert.layout_of(args.to)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: name a new folder")
    arch = {"diffusers": "dit"}.get(args.to, args.to)
    state, arguments, notes = (run.objective.state_dict(), {}, []) if arch == "safetensors" else published(run, arch)
    out.mkdir(parents=True, exist_ok=True)
    if args.to == "diffusers":
        name, notes = write_diffusers(out, state, arguments, run.config), notes + [DIFFUSERS_NOTE]
    elif args.to == "safetensors":
        name = "model.safetensors"
        state = {key: v.detach().cpu() for key, v in state.items()}
        runs.write(out / name, lambda path: weights.write_safetensors(path, state, {"format": weights.FORMAT}))
        write_json(out / "config.json", {"format": weights.FORMAT, "run": plain(run.config)})
    else:
        name = f"{arch}.pt"
        runs.write(out / name, lambda path: torch.save(state, path))
        own = {key: run.config[key] for key in build.OF_EXPORT}
        write_json(out / "config.json", {"architecture": arch, "arguments": arguments, "run": plain(own)})
    text = card(run, args.to, name, state, arguments, notes)
    runs.write(out / "README.md", lambda path: path.write_text(text))
    print(f"{out / name}: {len(state)} tensors, {sum(v.numel() for v in state.values()) / 1e6:.2f} M numbers; "
          f"config.json and README.md beside it")
    for note in notes:
        print(f"note: {note}")


def published(run, arch):
    """(weights, the constructor's arguments, notes) of a run in an architecture's published layout; ValueError if it
    has none. What is written has been loaded back and compared."""
    objective, config = run.objective, run.config
    model = getattr(objective, "model", None)
    name, options = build.split_name(config["network"])
    if name not in models.MODELS or model is None:
        raise ValueError(f"{run.path}: {name} has no published layout, use --to safetensors")
    process = build.build_process(config)
    facts = {key: config[key] for key in ("image_size", "in_channels", "num_classes")}
    facts["learn_sigma"] = process.learned_variance or getattr(process, "spare", False)
    state, arguments = convert.exported(arch, model, name, options, facts)
    again = convert.load_official(arch, arguments, state).state_dict()
    own = model.state_dict()
    if own.keys() != again.keys() or not all(torch.equal(own[key].cpu(), again[key]) for key in own):
        raise ValueError(f"{run.path} does not come back the same from the layout of {arch}: nothing was written")
    notes = []
    if config.get("order"):                          # classes go back to the rows that they were published in
        table = "y_embedder.embedding_table.weight"
        rows = state[table].clone()
        rows[torch.tensor(config["order"])] = state[table][:len(config["order"])]
        state[table] = rows
    if config["process"] != PROCESSES[arch] or config["prediction"] not in ("own", "eps"):
        notes.append(f"this network was trained with --process {config['process']} --prediction {config['prediction']} "
                     "and is told and predicts what that says; the published sampler of "
                     f"{arch} takes {PROCESSES[arch]} for granted")
    if getattr(model, "nextline", False) and not model.text_width:
        notes.append("[nextline] tokens with labels are ours: the published code of labels has none")
    if objective.encoder is not None:
        notes.append("the encoder that turns bytes into text is no part of the published layout and is left out")
    return state, arguments, notes


DIFFUSERS_NOTE = ("diffusers' DiT spreads the 128 frequencies of its time embedding over 127 steps where the published "
                  "DiT has 128: set downscale_freq_shift of each block's norm1.emb.time_proj to 0 for equal numbers")


def write_diffusers(out, state, arguments, config):
    """A DiT as diffusers' folder: transformer/ and scheduler/. Returns the name of its weights."""
    a = arguments
    if a["mlp_ratio"] != 4:
        raise ValueError(f"diffusers' DiT has an MLP of ratio 4, this one has {a['mlp_ratio']}")
    side = a["input_size"] // a["patch_size"]
    if not torch.allclose(state["pos_embed"][0], position_table(a["hidden_size"], side, side), atol=1e-5):
        raise ValueError("diffusers' DiT computes its position table, and this run's is another (stretched from a "
                         "smaller size): export it as dit or safetensors")
    if not config["process"].startswith("linear"):
        raise ValueError(f"diffusers' DiT pipeline draws from chains, and this run's process is {config['process']}: "
                         "export it as dit or safetensors")
    (out / "transformer").mkdir()
    (out / "scheduler").mkdir()
    name, C = "transformer/diffusion_pytorch_model.safetensors", a["in_channels"]
    new = {key: v.contiguous() for key, v in convert.to_diffusers_dit(state).items()}
    runs.write(out / name, lambda path: weights.write_safetensors(path, new, {"format": "pt"}))
    write_json(out / "transformer/config.json", {
        "_class_name": "DiTTransformer2DModel", "sample_size": a["input_size"], "patch_size": a["patch_size"],
        "in_channels": C, "out_channels": C * (2 if a["learn_sigma"] else 1), "num_layers": a["depth"],
        "num_attention_heads": a["num_heads"], "attention_head_dim": a["hidden_size"] // a["num_heads"],
        "num_embeds_ada_norm": a["num_classes"], "attention_bias": True, "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-6, "upcast_attention": False})
    write_json(out / "scheduler/scheduler_config.json", {
        "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4,
        "beta_end": 0.02, "clip_sample": False, "prediction_type": "epsilon", "set_alpha_to_one": True})
    write_json(out / "model_index.json", {
        "_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"]})
    return name


def write_json(path, what):
    runs.write(path, lambda partial: partial.write_text(json.dumps(what, indent=2, default=str) + "\n"))


def plain(config):
    """A config without what JSON cannot hold."""
    return {key: v for key, v in config.items() if isinstance(v, (str, int, float, list, tuple, dict, type(None)))}


def card(run, to, name, state, arguments, notes):
    """The model card: what it is, how to use it, the run's settings and figures."""
    config, figures = run.config, run.folder / "score.json"
    lines = [f"# {run.folder.name}", "",
             f"A {config['network']} on {config['data'] or 'unnamed data'}, {config['num_classes']} classes, "
             f"{config['in_channels']} channels of {config['image_size']}; process {config['process']}, prediction "
             f"{config['prediction']}.", "", f"- weights: `{name}`, {len(state)} tensors, "
             f"{sum(v.numel() for v in state.values()):,} numbers"]
    lines += [f"- layout: {to}" + (f", constructor's arguments `{json.dumps(arguments)}`" if arguments else ""),
              f"- to draw: `python sample.py {'FOLDER' if to != 'diffusers' else 'FOLDER/transformer'}`"]
    lines += [f"- note: {note}" for note in notes]
    if config["classes"]:
        lines += ["- classes: " + ", ".join(map(str, config["classes"]))]
    lines += ["", "## Figures", ""]
    if figures.exists():
        lines += [f"- {key}: {value}" for key, value in json.loads(figures.read_text()).items()]
    history = runs.history(run.folder) if run.folder.exists() else []
    if history:
        lines += [f"- training loss at step {history[-1]['step']:,}: {history[-1]['loss']:.4f}"]
    if not figures.exists() and not history:
        lines += ["none were measured"]
    return "\n".join([*lines, "", "## Settings", "", "```json", json.dumps(plain(config), indent=2, default=str), "```",
                      ""])
