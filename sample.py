"""Draw images:  python sample.py runs/shapes-unet-pico --n 64 --guidance 2
                 python sample.py runs/shapes-dimba-nano --prompt "a large green ring on black" --n 16

From the run's averaged (EMA) weights, or from two runs in one trajectory, the small model first (T-Stitch):
    python sample.py runs/small runs/large --stitch 0.4
or from a file of ternary weights at two bits (`python evaluate.py pack RUN` makes it), or a published checkpoint:
    python sample.py --official dit --checkpoint DiT-XL-2-256x256.pt --decoder sd-vae-ft-ema.safetensors \\
        --classes 207,360 --n 4
Image i is a function of the seed and i alone, whatever --batch is.
"""

import argparse
import wave
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import convert
import data
import diffusion
import figures
import objectives
import runs


def flags():
    p = argparse.ArgumentParser(prog="sample.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="*", help="folder of a run, or a checkpoint file in it; with --stitch several, "
                                          "the smallest model first")
    p.add_argument("--n", type=runs.positive, default=64, help="images (default: %(default)s)")
    p.add_argument("--classes",
                   help="class names or numbers, comma separated, drawn in turn (default: all of them in turn)")
    p.add_argument("--prompt", action="append", metavar="TEXT",
                   help="what to draw, for a run with text (may be repeated; drawn in turn; default: some captions of "
                        "the training set); a file .npz if the run reads precomputed embeddings")
    runs.sampling_flags(p)
    runs.size_flags(p)
    p.add_argument("--sampler-options", type=runs.options, default={}, metavar="NAME=VALUE,...",
                   help="the sampler's own options, for example eta=0.5 or order=3")
    p.add_argument("--weak", metavar="RUN", help="autoguidance: guide away from what this run says (a smaller or less "
                   "trained model of the same data) instead of from the null label")
    p.add_argument("--stitch", type=runs.floats, metavar="F,...", help="the share of the steps that each of several "
                   "runs takes, the last one's may be left out: 0.4 gives the first 40%% to the first (T-Stitch)")
    p.add_argument("--stitch-rule", choices=["steps", "time"], default="steps",
                   help="whole steps, or a threshold on t as in the published code (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    p.add_argument("--batch", type=runs.positive, default=64, help="images drawn at once (default: %(default)s)")
    p.add_argument("--out", help="FILE.png: a grid (default: sample.png in the run's folder); FILE.npz: arr_0 uint8 "
                                 "(N, H, W, 3) and the labels as arr_1; clips and views also FILE.gif or FILE.webp, "
                                 "sounds also FILE.wav; a name without suffix: a folder of PNGs")
    p.add_argument("--film", metavar="FILE.gif",
                   help="also write the trajectory from noise to images as an animated .gif or .webp")
    p.add_argument("--weights", choices=["ema", "model"], default="ema",
                   help="averaged or last weights (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")
    g = p.add_argument_group("published checkpoints")
    g.add_argument("--official",
                   choices=["dit", "dit-moe", "terdit", "dico", "dimr", "uvit", "drwkv", "lit", "fit", "fitv2",
                            "flag-dit"], help="architecture of the published checkpoint")
    g.add_argument("--checkpoint", help="its file (.pt, .bin or .safetensors)")
    g.add_argument("--decoder", help="Stable Diffusion's autoencoder file, to turn latents into images")
    return p


def official(args, device):
    """The objective around a published model, with its published way of sampling, and the decoder (or None)."""
    if not args.checkpoint:
        raise ValueError("--official needs the published file: --checkpoint FILE")
    state = convert.read_weights(args.checkpoint)
    config = convert.infer_config(args.official, state)
    model = convert.load_official(args.official, config, state)
    if args.official == "drwkv":
        config |= {"input_size": config["img_size"], "in_channels": config["channels"],
                   "num_classes": max(0, config["num_classes"])}
    elif args.official in ("uvit", "dimr"):
        side = config["stage_configs"][-1]["max_height"] if args.official == "dimr" else config["img_size"]
        config |= {"input_size": side, "in_channels": config.get("channels") or config["in_chans"],
                   "num_classes": max(0, (config["num_classes"] or 0) - 1), "learn_sigma": False}
    process = diffusion.Discrete(diffusion.linear_betas(), learned_variance=config["learn_sigma"])
    # As published: 250 ancestral steps, no clipping of latents, guidance on three of the four channels.
    scale = {"dico": 1.4, "drwkv": 1.5, "lit": 1.5}.get(args.official, 4.0)
    draw = dict(sampler="ddpm", steps=250, guidance=scale, guide_channels=3, clip=False)
    if config.get("use_flash_attn"):                              # DiT-MoE's XL and G are rectified flows
        process = convert.DiTMoEFlow(config["learn_sigma"])
        draw = dict(sampler="euler", steps=50, guidance=7.0, clip=False)
    elif args.official == "fit":
        draw |= dict(guidance=1.5)
    elif args.official in ("fitv2", "flag-dit"):
        process = convert.Reversed()
        guidance = {"fitv2": 1.5, "flag-dit": 4.0}[args.official]
        draw = dict(sampler="rk45", guidance=guidance, guide_channels=3, clip=False)
    elif args.official in ("uvit", "dimr"):
        pixels = config["in_channels"] == 3
        draw = dict(sampler="dpm-solver", steps=50, guidance=1.0 if pixels else 1.4, clip=pixels)
        if args.official == "dimr" or config["embed_dim"] == 1152:       # Stable Diffusion's chain; else continuous
            process = convert.CountsFromOne(diffusion.BETAS["scaled-linear"]())
        else:
            process = diffusion.create_process("vp")
        if args.official == "dimr":
            draw |= dict(sampler="dpmpp-singlestep", steps=250, order=3)
    size = config.get("input_size", 32)
    shape = config["in_channels"], size, size
    objective = objectives.Diffusion(model, process, shape, config["num_classes"], draw=draw)
    decoder = convert.load_decoder(args.decoder).to(device) if args.decoder else None
    return [], objective.to(device).eval(), decoder


def choose_labels(text, classes, num_classes, n):
    """--classes as n labels (n,), or None for a model without classes."""
    if not num_classes:
        if text:
            raise ValueError(f"--classes {text}: this model knows no classes")
        return None
    names = {name: k for k, name in enumerate(classes)}
    chosen = []
    for word in text.split(",") if text else []:
        k = names.get(word.strip(), int(word) if word.strip().isdigit() else -1)
        if not 0 <= k < num_classes:
            raise ValueError(f"--classes: {runs.unknown('class', word.strip(), names)}" if names else
                             f"--classes: {word!r} is not one of 0 to {num_classes - 1}")
        chosen.append(k)
    return torch.tensor(chosen or range(num_classes)).repeat(-(-n // (len(chosen) or num_classes)))[:n]


def choose_prompts(prompts, config, objective):
    """--prompt as the conditions of one round: byte tokens (k, L), a Text, or the run's own examples."""
    length = objective.model.text_length
    if not prompts:
        if objective.examples is None:
            raise ValueError("this run reads precomputed embeddings: name some by --prompt FILE.npz")
        return objective.examples
    if config["text"] == "npz":
        return data.read_embeddings([Path(prompt) for prompt in prompts], length)
    if long := [prompt for prompt in prompts if len(prompt.encode()) >= length]:
        raise ValueError(f"--prompt {long[0][:20]}...: it has {len(long[0].encode())} bytes, this model reads at most "
                         f"{length - 1}")
    return data.byte_tokens(prompts, length)


def save_npz(path, **arrays):
    def to(partial):
        with open(partial, "wb") as file:
            np.savez(file, **arrays)

    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write(path, to)


def save_wav(path, waves):
    """Sounds (n, samples) in [-1, 1], one after the other with a pause, as a 16-bit mono .wav file."""
    waves = torch.nn.functional.pad(waves, (0, data.RATE // 4)).flatten()

    def to(partial):
        with wave.open(str(partial), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(data.RATE)
            file.writeframes((waves * 32767).to(torch.int16).numpy().tobytes())

    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write(path, to)


def check_out(out, sides):
    """ValueError if a sample of so many sides cannot be written under that name."""
    kinds = [".png", ".npz", *{3: [".gif", ".webp"], 1: [".wav"]}.get(sides, [])]
    if out.suffix not in ("", *kinds):
        raise ValueError(f"--out {out}: give a name that ends in {', '.join(kinds[:-1])} or {kinds[-1]}, or one "
                         "without suffix for a folder")


def write(x, labels, out, columns):
    """Samples (N, C, *sides) by the name's suffix: a grid (of clips and views: strips; of sounds: spectrograms), an
    animated grid of clips, sounds, an .npz, or a folder of single files."""
    images = figures.to_uint8(x)
    if out.suffix == ".npz":
        save_npz(out, arr_0=images, **({"arr_1": labels.numpy()} if isinstance(labels, torch.Tensor) else {}))
    elif out.suffix == ".wav":
        save_wav(out, data.sound(x))
    elif out.suffix in (".gif", ".webp"):
        figures.film([figures.grid(figures.to_uint8(frame), columns) for frame in x.unbind(2)], out, 200, 600)
    elif out.suffix:
        figures.save(figures.grid(images, columns), out)
    else:
        for k, image in enumerate(images):
            figures.save(Image.fromarray(image), out / f"{k:06d}.png")
            if x.ndim == 3:
                save_wav(out / f"{k:06d}.wav", data.sound(x[k:k + 1]))


def sample():
    args = flags().parse_args()
    device = runs.device(args.device)
    decoder = None
    if args.official:
        classes, objective, decoder = official(args, device)
        out = Path(args.out or "sample.png")
    elif args.run:
        if (len(args.run) > 1) != (args.stitch is not None):
            raise ValueError("several runs and --stitch go together: "
                             "python sample.py runs/small runs/large --stitch 0.4")
        config, objective = (runs.open_stitched(args.run, args.stitch, args.stitch_rule, device, args.weights)
                             if args.stitch is not None else runs.open_run(args.run[0], device, args.weights))
        folder = Path(args.run[-1]) if Path(args.run[-1]).is_dir() else Path(args.run[-1]).parent
        classes, out = config["classes"], Path(args.out or folder / "sample.png")
    else:
        raise ValueError("name the folder of a run (python sample.py runs/<name>), "
                         "or a published model by --official and --checkpoint")
    for flag, choices in runs.SAMPLING.items():
        runs.check(flag, getattr(args, flag), choices)
    if args.film and Path(args.film).suffix not in (".gif", ".webp"):
        raise ValueError(f"--film {args.film}: the name must end in .gif or .webp")
    if not args.official and runs.takes_text(config):
        objective.examples = choose_prompts(args.prompt, config, objective)
        labels = objective.labels(args.n, "cpu")
    elif args.prompt:
        raise ValueError(f"--prompt {args.prompt[0]}: this model reads no text")
    else:
        labels = choose_labels(args.classes, classes, objective.num_classes, args.n)
    size = args.size
    if args.official and size:                         # eight pixels a latent
        if any(side % 16 for side in size):
            raise ValueError(f"--size {'x'.join(map(str, size))}: the sides must be multiples of 16")
        size = tuple(side // 8 for side in size)
    runs.extrapolate(objective, size, args.rope, args.shift)
    check_out(out, len(objective.shape) - 1)
    options = runs.sampling_options(args) | args.sampler_options
    if args.weak:
        weak = runs.open_run(args.weak, device, args.weights)[1]
        if weak.encoder or (weak.shape, weak.num_classes) != (objective.shape, objective.num_classes):
            raise ValueError(f"--weak {args.weak}: it must be a run with the images and classes (no captions) of the "
                             "one that is drawn from")
        options["weak"] = weak

    frames = [] if args.film else None
    batches = runs.draw(objective, labels, args.n, args.seed, args.batch, device, frames=frames, **options)
    x = torch.cat([b.cpu() for b in batches])
    if decoder is not None:
        with torch.no_grad():
            x = torch.cat([decoder(z[None].to(device)).cpu()
                           for z in tqdm(x, desc="decoding", unit=" images", delay=2)])
    elif args.official and objective.shape[0] != 3:
        latents = out.with_name(out.stem + ".latents.npz")
        save_npz(latents, arr_0=x.numpy())
        print(f"no --decoder was given: the latents are in {latents}, "
              "and the picture shows three of their channels in false colour")
    columns = None
    if args.classes is None and 1 < len(classes) <= 16:
        columns = len(classes)
    elif objective.examples is not None and 1 < len(objective.examples) <= 16:
        columns = len(objective.examples)
    write(x, labels, out, columns)
    print(f"{args.n} images: {out}")
    if args.film:
        figures.film([figures.grid(figures.to_uint8(f[:64]), columns) for f in frames], args.film)
        print(f"their trajectory: {args.film}")


if __name__ == "__main__":
    runs.command(sample)
