"""Draw from a run:  python sample.py runs/shapes-unet-pico --n 64 --guidance 2
                  python sample.py runs/shapes-dimba-nano --prompt "a large green ring on black" --n 16

From the run's averaged (EMA) weights. How it draws is the run's own; `python sample.py RUN --help` lists what may be
set. Several runs in one trajectory, the small model first (T-Stitch):
    python sample.py runs/small runs/large --stitch 0.4
A published checkpoint, as it was published; what it cannot say of itself is assumed, or said behind its name:
    python sample.py DiT-XL-2-256x256.pt --decoder sd-vae-ft-ema.safetensors --classes 207,360 --n 4
    python sample.py dit_moe_s.pt:arch=dit-moe,top_k=1
Image i is a function of the seed and i alone, whatever --batch is.
"""

import argparse
import re
import sys
import wave
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import build
import convert
import cropping
import data
import figures
import runs


def flags():
    p = build.Flags(prog="sample.py", description=__doc__, add_help=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="*", help="folder of a run, a checkpoint file in it, or a published file; with "
                                          "--stitch several, the smallest model first")
    p.add_argument("--n", type=build.positive, default=64, metavar="N", help="how many (default: %(default)s)")
    p.add_argument("--classes", metavar="NAME,...",
                   help="class names or numbers, drawn in turn (default: all of them in turn)")
    p.add_argument("--prompt", action="append", metavar="TEXT",
                   help="what to draw, for a run with text (may be repeated; drawn in turn; default: some captions of "
                        "the training set); a file .npz if the run reads precomputed embeddings")
    p.add_argument("--seed", type=build.count(0, 2**63 - 1), default=0, metavar="N", help="default: %(default)s")
    p.add_argument("--batch", type=build.positive, default=64, metavar="N",
                   help="drawn at once (default: %(default)s)")
    p.add_argument("--out", metavar="FILE",
                   help="FILE.png: a grid (default: sample.png in the run's folder); FILE.npz: arr_0 uint8 "
                        "(N, H, W, 3) and the labels as arr_1; clips and views also FILE.gif or FILE.webp, "
                        "sounds also FILE.wav; a name without suffix: a new folder of PNGs")
    p.add_argument("--film", metavar="FILE.gif",
                   help="also write the trajectory from noise to images as an animated .gif or .webp")
    p.add_argument("--crop", nargs="+", metavar="PATH", help="crop photographs with a run of a cropping agent: a file "
                   "or a folder, and optionally the folder for the crops (default: crops in the run's folder)")
    p.add_argument("--weights", choices=["ema", "model"], default="ema",
                   help="averaged or last weights (default: %(default)s)")
    p.add_argument("--device", default="auto", metavar="NAME", help="cuda, mps, cpu or auto (default: %(default)s)")
    p.add_argument("--stitch", type=build.numbers(low=0, high=1), metavar="F,...", help="the share of the steps that "
                   "each of several runs takes, the last one's may be left out: 0.4 gives the first 40%% to the first")
    p.add_argument("--stitch-rule", choices=["steps", "time"], default="steps",
                   help="whole steps, or a threshold on t as in the published code (default: %(default)s)")
    p.add_argument("--inpaint", metavar="IMAGE", help="draw only the hole of --mask in this image, for a run of a "
                   "masked model or a denoiser (RePaint)")
    p.add_argument("--mask", metavar="FILE", help="a picture of the image's size, white where it is to be drawn anew")
    p.add_argument("--from", dest="begin", metavar="IMAGE", help="begin at this image with noise, instead of noise "
                   "(SDEdit), for a run of a denoiser")
    p.add_argument("--strength", type=build.number(low=0, high=1), metavar="F", default=0.6,
                   help="of --from: the share of the steps that are walked (default: %(default)s)")
    p.add_argument("--help", action="store_true", help="print this, and how RUN may draw, and leave")
    g = p.add_argument_group("published checkpoints")
    g.add_argument("--official", metavar="NAME", help="architecture of a published file, where its names do not "
                   f"tell it: {', '.join([*convert.OFFICIAL, *build.MASKED, 'a2rl'])}; with options, such as "
                   "dit-moe:top_k=1")
    g.add_argument("--checkpoint", metavar="FILE", help="its file or folder (of a2rl .pkl), the same as RUN")
    g.add_argument("--decoder", metavar="FILE", help="Stable Diffusion's autoencoder, to turn latents into images")
    return p


def parse(argv):
    """(args, the opened run). The run says which flags beside the common ones there are."""
    parser = flags()
    args, rest = parser.parse_known_args(argv)
    if args.help and not args.run and not args.official:
        print(parser.format_help() + "\nname a run before --help to see how it may draw")
        raise SystemExit
    device = build.device(args.device)
    paths = [args.checkpoint] if args.checkpoint else args.run
    if not paths:
        raise ValueError("--official needs the published file: --checkpoint FILE" if args.official else
                         "name the folder of a run (python sample.py runs/<name>), or a published file")
    if (len(paths) > 1) != (args.stitch is not None):
        raise ValueError("several runs and --stitch go together: python sample.py runs/small runs/large --stitch 0.4")
    if args.official:
        if args.stitch is not None:
            raise ValueError("with --stitch say the architecture behind each file's name: FILE:arch=dit")
        name, said = build.split_name(args.official)
        opened = build.open_published(paths[0], device, arch=name, **said)
    elif args.stitch is not None:
        opened = build.open_stitched(paths, args.stitch, args.stitch_rule, device, args.weights)
    else:
        opened = build.open_run(paths[0], device, args.weights)
    if args.decoder and "published" not in opened.config:
        raise ValueError("--decoder goes with a published file of latents")
    build.drawing_flags(parser, opened.objective)
    if args.help:
        print(parser.format_help())
        raise SystemExit
    if rest and (known := re.match(r"--([\w-]+)", rest[0])) and known[1].replace("-", "_") not in \
            opened.objective.options:
        raise ValueError(build.unknown("flag", rest[0], [f"--{key.replace('_', '-')}" for key in
                                                         opened.objective.options]))
    return parser.parse_args(argv), opened


def choose_labels(text, classes, num_classes, n):
    """--classes as n labels (n,)."""
    names = {name: k for k, name in enumerate(classes)}
    chosen = []
    for word in text.split(","):
        k = names.get(word.strip(), int(word) if word.strip().isdigit() else -1)
        if not 0 <= k < num_classes:
            raise ValueError(f"--classes: {build.unknown('class', word.strip(), names)}" if names else
                             f"--classes: {word!r} is not one of 0 to {num_classes - 1}")
        chosen.append(k)
    return torch.tensor(chosen)[torch.arange(n) % len(chosen)]


def choose_prompts(prompts, opened, n):
    """--prompt as n conditions: byte tokens (n, L), or a Text of precomputed embeddings."""
    length = getattr(opened.objective, "model", opened.objective).text_length
    if opened.config["text"] == "npz":
        chosen = data.read_embeddings([Path(prompt) for prompt in prompts], length)
    else:
        if long := [prompt for prompt in prompts if len(prompt.encode()) >= length]:
            raise ValueError(f"--prompt {long[0][:20]}...: it has {len(long[0].encode())} bytes, this model reads at "
                             f"most {length - 1}")
        chosen = data.byte_tokens(prompts, length)
    return chosen[torch.arange(n) % len(prompts)]


def choose_conditions(args, opened, options):
    """What is drawn: --classes, --prompt, or the run's own conditions. Classes may be those of a guide."""
    objective, text = opened.objective, opened.config.get("text") and build.takes_text(opened.config)
    if args.prompt and not text:
        raise ValueError(f"--prompt {args.prompt[0]}: this model reads no text")
    guide = options.get("guide")
    num_classes = getattr(guide or objective, "num_classes", 0)
    if args.classes and (text or not num_classes or getattr(guide, "dense", False)):
        raise ValueError(f"--classes {args.classes}: this model knows no classes")
    if args.prompt:
        return choose_prompts(args.prompt, opened, args.n)
    if args.classes:
        classes = guide.classes if guide else opened.config["classes"]
        return choose_labels(args.classes, classes, num_classes, args.n)
    conditions = build.preview_conditions(objective, options, args.n)
    if text and conditions is None:
        raise ValueError("this run reads precomputed embeddings: name some by --prompt FILE.npz")
    return conditions


def picture(path, opened, mode):
    """A picture of exactly the run's size as bytes (H, W) or (H, W, C). ValueError, OSError."""
    decoder = opened.objective.__dict__.get("decoder")
    shape = getattr(decoder.tokenizer, "image_shape", None) if decoder else opened.objective.shape
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert(mode if shape is None or shape[0] == 3 else "L"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    if shape is not None and pixels.shape[:2] != tuple(shape[-2:]):
        raise ValueError(f"{path} is {pixels.shape[0]} pixels high and {pixels.shape[1]} wide, and this run draws "
                         f"{shape[-2]}x{shape[-1]}: cut or scale it first")
    return pixels


def inpainted(args, opened, conditions, frames, options):
    """--inpaint and --mask: args.n ways to fill the hole, (n, C, H, W)."""
    if not (args.inpaint and args.mask):
        raise ValueError("--inpaint IMAGE and --mask FILE go together: the mask is white where the image is drawn anew")
    pixels = torch.from_numpy(picture(args.inpaint, opened, "RGB"))
    hole = torch.from_numpy(picture(args.mask, opened, "L"))
    image = (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1).float() / 127.5 - 1
    hole = (hole if hole.ndim == 2 else hole[..., 0]) > 127
    if hole.shape != image.shape[1:]:
        raise ValueError(f"{args.mask} is {tuple(hole.shape)} pixels, the image {tuple(image.shape[1:])}")
    for x in opened.filled(image, hole, args.n, args.seed, conditions, **options):
        if frames is not None:
            frames.append(x.cpu())
    return x.cpu()


def reworked(args, opened, conditions, frames, options):
    """--from and --strength: args.n images that begin at one, (n, C, H, W)."""
    pixels = torch.from_numpy(picture(args.begin, opened, "RGB"))
    image = (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1).float() / 127.5 - 1
    for x in opened.reworked(image, args.strength, args.n, args.seed, conditions, **options):
        if frames is not None:
            frames.append(x.cpu())
    return x.cpu()


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
    """Refuse, before anything is drawn, a name under which a sample of so many sides cannot be written, or a folder
    that holds other files."""
    kinds = [".png", ".npz", *{3: [".gif", ".webp"], 1: [".wav"]}.get(sides, [])]
    if out.suffix not in ("", *kinds):
        raise ValueError(f"--out {out}: give a name that ends in {', '.join(kinds[:-1])} or {kinds[-1]}, or one "
                         "without suffix for a folder")
    if out.suffix and out.is_dir():
        raise ValueError(f"--out {out}: that is a folder")
    if not out.suffix and out.exists():
        inside = [path.name for path in out.iterdir()] if out.is_dir() else [out.name]
        if foreign := [name for name in inside if not re.fullmatch(r"\d{6}\.(png|wav)", name)]:
            raise ValueError(f"--out {out}: it holds {foreign[0]}, which was not drawn here; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)


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


def decoded(x, path, scale, device):
    """Latents (n, 4, h, w) of a scale through Stable Diffusion's decoder: images (n, 3, 8h, 8w). Codes (n, h, w)
    through that of a published tokenizer."""
    if not x.is_floating_point():
        tokenizer = convert.load_tokenizer(path).to(device)
        with torch.no_grad():
            return torch.cat([tokenizer.decode(z[None].to(device)).cpu() for z in x])
    decoder = convert.load_decoder(path).to(device)
    with torch.no_grad():
        return torch.cat([decoder.decode(z[None].to(device) / scale).cpu()
                          for z in tqdm(x, desc="decoding", unit=" images", delay=2)])


def crops(args, opened, options):
    """--crop: the files written."""
    if not hasattr(opened.objective, "path") or len(args.crop) > 2:
        raise ValueError("--crop PATH [FOLDER] is for runs of a cropping agent, such as a2rl-nano")
    options = build.drawing_options(opened.objective, opened.config["draw"] | options, opened.device)
    source, out = args.crop[0], args.crop[1] if len(args.crop) == 2 else opened.folder / "crops"
    return cropping.crop_files(opened.objective, source, out, args.film, args.seed if options.get("sampled") else None,
                               options.get("steps"))


def sample():
    args, opened = parse(sys.argv[1:])
    objective, options = opened.objective, build.given_drawing(args)
    if args.crop:
        print("\n".join(map(str, crops(args, opened, options))))
        return
    pixels = opened.config.get("pixels", 1)                          # of a published file of latents, 8
    if pixels > 1 and (size := options.get("size")):
        size = (size,) if isinstance(size, int) else size
        if any(side % (2 * pixels) for side in size):
            raise ValueError(f"--size {'x'.join(map(str, size))}: the sides must be multiples of {2 * pixels}")
        options["size"] = tuple(side // pixels for side in size)
    out = Path(args.out).expanduser() if args.out else opened.folder / "sample.png"
    check_out(out, len(objective.shape) - 1)
    if args.film and Path(args.film).suffix not in (".gif", ".webp"):
        raise ValueError(f"--film {args.film}: the name must end in .gif or .webp")
    if guide := options.get("guide", opened.config["draw"].get("guide")):
        options["guide"] = build.open_run(guide, opened.device).objective
    conditions = choose_conditions(args, opened, options)
    frames = [] if args.film else None
    if args.inpaint or args.mask:
        x = inpainted(args, opened, conditions, frames, options)
    elif args.begin:
        x = reworked(args, opened, conditions, frames, options)
    else:
        batches = opened.images(args.n, args.seed, args.batch, conditions, frames=frames, **options)
        x = torch.cat([b.cpu() for b in batches])
    if args.decoder:
        x = decoded(x, args.decoder, opened.config["latent_scale"], opened.device)
    elif "published" in opened.config and objective.shape[0] != 3:
        latents = out.with_name(out.stem + ".latents.npz")
        save_npz(latents, arr_0=x.numpy())
        print(f"no --decoder was given: the latents are in {latents}, "
              "and the picture shows three of their channels in false colour")
        if not x.is_floating_point():
            x = x[:, None] / (objective.network.codes - 1) * 2 - 1
    columns = figures.columns(conditions) if args.classes is None and not args.prompt else None
    write(x, conditions, out, columns)
    print(f"{args.n} drawn: {out}")
    if args.film:
        figures.film([figures.grid(figures.to_uint8(f[:64]), columns) for f in frames], args.film)
        print(f"their trajectory: {args.film}")


if __name__ == "__main__":
    build.command(sample)
