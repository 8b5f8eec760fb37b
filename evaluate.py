"""Measure:

    python evaluate.py score runs/shapes-unet-pico      how good a run's samples are, beside real images
    python evaluate.py samplers runs/shapes-unet-pico   what each sampler makes of 5, 10, 20, 50 steps
    python evaluate.py likelihood runs/my-run           bits per dimension of held-out images
    python evaluate.py experts runs/shapes-dit-moe-nano what its experts specialise in: class, position, step
    python evaluate.py stitch runs/small runs/large     quality and time of two runs in one trajectory
    python evaluate.py pack runs/shapes-terdit-nano     ternary weights at two bits: a file, its size and its speed
    python evaluate.py prompts runs/shapes-dimba-nano   does what was drawn agree with the captions?
    python evaluate.py speed --tokens 16384             time and memory of the token mixers
    python evaluate.py sizes runs/fit runs/dit --sizes 32x32,20x40,44x44    class accuracy beyond the training sizes
    python evaluate.py speed dit-s/2 unet-cifar         parameters, MACs, time and memory of models, as a table
    python evaluate.py speed dico-s dit-s/2 --fair      the same at equal MACs, each at its best batch
"""

import argparse
import contextlib
import copy
import ctypes
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import diffusion
import figures
import layers
import moe
import objectives
import runs
import scans
from layers import pair
from metrics import Classifier, frechet_distance
from models import MODELS, cost, create_model, options_of

# ---------------------------------------------------------------------------------------------------------------- score


def classifier(config, device, steps, dataset=None):
    """A `Classifier` of the run's dataset, or of the labels of another, trained once and kept beside the runs."""
    sides = pair(config["image_size"])
    size = config["image_size"] if len(set(sides)) == 1 < len(sides) else "x".join(map(str, sides))
    path = Path("runs/classifiers") / f"{config['data']}-{size}-{config['data_size']}-{config['num_classes']}.pt"
    network = Classifier(config["num_classes"], config["in_channels"] if len(sides) > 1 else 1).to(device)
    if path.exists():
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return network.eval()
    dataset = dataset or load_data(config, "train", device)
    dataset.flip = config["flip"]
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    bar = tqdm(range(steps), desc=f"training a classifier of {config['data']} (once, kept in {path})", unit=" steps",
               delay=1)
    for step in bar:
        x, y = dataset.gather(*dataset.plan(step, 128, seed=0))
        loss = F.cross_entropy(network(as_image(x)), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write(path, lambda partial: torch.save(network.state_dict(), partial))
    return network.eval()


def word(captions, words):
    """Which of the words each caption holds first: int64 (n,); ValueError where there is none."""
    at = torch.tensor([[c.split().index(w) if w in c.split() else len(c) for w in words] for c in captions])
    if (at.amin(1) == torch.tensor([len(c) for c in captions])).any():
        raise ValueError(f"not every caption names one of {', '.join(words)}")
    return at.argmin(1)


def prompts(args):
    """Whether samples of a run with text agree with their prompts: classifiers of colour and of shape, trained on real
    `shapes` and tested on held-out ones, read what was drawn from held-out captions."""
    device = runs.device(args.device)
    config, objective = runs.open_run(args.run, device, args.weights)
    if objective.encoder is None or config["data"] != "shapes":
        raise ValueError(f"{args.run}: this measures runs that learned the captions of --data shapes")
    sets = {split: load_data(config, split, device) for split in ("train", "test")}
    chosen = sets["test"].subset(args.subset) if args.subset else sets["test"]
    order = torch.randperm(len(chosen), generator=objectives.seeded(args.seed))
    captions = [chosen.captions[i] for i in order[:args.n]]
    objective.examples = data.byte_tokens(captions, objective.model.text_length)
    images = torch.cat(list(runs.draw(objective, objective.examples, len(captions), args.seed, args.batch, device,
                                      **runs.sampling_options(args))))
    figures.save(figures.grid(figures.to_uint8(images[:64])), Path(args.run) / "prompts.png")
    print("\n".join(captions[:8]) + f"\n... {len(captions)} prompts; pictures of the first 64, row by row: "
          f"{Path(args.run) / 'prompts.png'}")
    print(f"{'':10}{'generated':>11}{'held-out real':>15}")
    for name, words in {"colour": list(data.COLOURS), "shape": data.SHAPES}.items():
        for dataset in sets.values():
            dataset.labels = word(dataset.captions, words).to(device)
        about = config | {"num_classes": len(words), "data_size": f"{len(sets['train'])}-{name}"}
        network = classifier(about, device, args.classifier_steps, sets["train"])
        _, drawn = read(network, images.split(256), device)
        rows = torch.arange(min(2000, len(sets["test"])))
        _, real = read(network, (sets["test"].gather(r)[0] for r in rows.split(256)), device)
        agree = (drawn == word(captions, words)).float().mean()
        print(f"{name:10}{agree:11.4f}{(real == sets['test'].labels[rows].cpu()).float().mean():15.4f}")


def load_data(config, split, device="cpu"):
    """The run's dataset, no flips."""
    return data.load(config["data"], config["data_dir"], pair(config["image_size"])[-1], split, device, flip=False,
                     download=config["download"], bad_images=config["bad_images"])


def as_image(x):
    """What the classifier sees of clips (B, C, F, H, W): a strip; of sounds (B, bands, T): one channel."""
    return x.transpose(2, 3).flatten(3) if x.ndim == 5 else x[:, None] if x.ndim == 3 else x


@torch.no_grad()
def read(network, batches, device):
    """Features (n, 128) and predicted classes (n,) of batches of images in [-1, 1]."""
    features, classes = [], []
    for x in batches:
        f = network.features(as_image(x).to(device).clamp(-1, 1))
        features.append(f.cpu())
        classes.append(network.head(f).argmax(1).cpu())
    return torch.cat(features), torch.cat(classes)


def score(args):
    device = runs.device(args.device)
    config, objective = runs.open_run(args.run, device, args.weights)
    if not config["num_classes"]:
        raise ValueError(f"{args.run} is unconditional: class accuracy needs a run with classes")
    network = classifier(config, device, args.classifier_steps)

    # Real images that no training has seen: one half is the reference, the other the ceiling.
    held_out = load_data(config, "test")
    n = min(args.n, len(held_out) // 2)
    batches = lambda rows: (held_out.gather(r)[0] for r in rows.split(256))
    order = torch.randperm(len(held_out), generator=objectives.seeded(0))
    reference, _ = read(network, batches(order[n:]), device)
    real, real_classes = read(network, batches(order[:n]), device)

    labels = torch.arange(n) % config["num_classes"]
    options = runs.sampling_options(args)
    clock = time.perf_counter()
    generated = runs.draw(objective, labels, n, args.seed, args.batch, device, **options)
    drawn, drawn_classes = read(network, generated, device)
    clock = time.perf_counter() - clock

    how = {"sampler": config["sampler"], "steps": config["sample_steps"], "guidance": config["guidance"]} | options
    result = {"run": str(args.run), "images": n, "reference_images": len(reference), "weights": args.weights,
              "seed": args.seed, **how,
              "class_accuracy": (drawn_classes == labels).float().mean().item(),
              "class_accuracy_real": (real_classes == held_out.labels[order[:n]].cpu()).float().mean().item(),
              "frechet_classifier": frechet_distance(drawn, reference),
              "frechet_classifier_real": frechet_distance(real, reference)}
    print(f"{n} images in {clock:.0f} s: {how['sampler']}, {how['steps']} steps, guidance {how['guidance']:g}, "
          f"{args.weights} weights, seed {args.seed}")
    print(f"{'':34}{'generated':>10}{'held-out real':>15}")
    print(f"{'class accuracy':34}{result['class_accuracy']:10.4f}{result['class_accuracy_real']:15.4f}")
    print(f"{'Frechet distance, classifier':34}{result['frechet_classifier']:10.3f}"
          f"{result['frechet_classifier_real']:15.3f}")
    print(f"(128 features of a classifier of {config['data']}, against {len(reference)} held-out real images: "
          "not the FID of the literature)")
    if Path(args.run).is_dir():
        runs.write(Path(args.run) / "score.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))


# ------------------------------------------------------------------------------------------------------------- samplers


def samplers(args):
    """What order buys: every sampler of the list at every number of steps, on the same noise and labels."""
    names = list(diffusion.SAMPLERS) if args.samplers == "all" else args.samplers.split(",")
    for name in names:
        runs.check("samplers", name, diffusion.SAMPLERS)
    device = runs.device(args.device)
    config, objective = runs.open_run(args.run, device, args.weights)
    network = classifier(config, device, args.classifier_steps)
    held_out = load_data(config, "test")
    reference, _ = read(network, (held_out.gather(r)[0] for r in torch.arange(len(held_out)).split(256)), device)
    labels = objective.labels(args.n, "cpu")
    table, guidance = {name: [] for name in names}, {} if args.guidance is None else {"guidance": args.guidance}
    for name, count in tqdm([(name, count) for name in names for count in args.steps], desc="sampler x steps"):
        clock = time.perf_counter()
        try:
            images = list(runs.draw(objective, labels, args.n, args.seed, args.batch, device, sampler=name, steps=count,
                                    **guidance))
        except ValueError as error:                               # a pair that makes no sense says why
            table[name].append(error)
            continue
        clock = time.perf_counter() - clock
        table[name].append((frechet_distance(read(network, images, device)[0], reference), clock))

    print(f"Frechet distance on classifier features of {args.n} images (seconds to draw them)")
    print(f"{'sampler':20}" + "".join(f"{f'{count} steps':>18}" for count in args.steps))
    for name, row in table.items():
        cells = ["refused" if isinstance(cell, ValueError) else f"{cell[0]:.3f} ({cell[1]:.1f})" for cell in row]
        print(f"{name:20}" + "".join(f"{cell:>18}" for cell in cells))
    for name, row in table.items():
        if isinstance(row[0], ValueError):
            print(f"{name}: {row[0]}")
    lines = {name: (args.steps, [c[0] for c in row]) for name, row in table.items()
             if not any(isinstance(c, ValueError) for c in row)}
    path = Path(args.run) / "samplers.png"
    title = f"{args.run}: what each sampler makes of its steps"
    figures.save(figures.curves(lines, title, "steps", "Frechet distance"), path)
    print(f"picture: {path}")


# ----------------------------------------------------------------------------------------------------------- likelihood


def likelihood(args):
    """Bits per dimension of held-out images: of a chain the variational bound, else the probability-flow ODE."""
    device = runs.device(args.device)
    config, objective = runs.open_run(args.run, device, args.weights)
    held_out, process, generator = load_data(config, "test", device), objective.process, objectives.seeded(args.seed)
    noise = lambda shape: torch.randn(shape, generator=generator).to(device)
    chain, bits = isinstance(process, diffusion.Discrete), []
    for rows in tqdm(torch.arange(min(args.n, len(held_out))).split(args.batch), desc="images", unit=" batches"):
        x, y = held_out.gather(rows)
        denoise = process.denoiser(objective.model, y if config["num_classes"] else None)
        if chain:
            with torch.no_grad():
                times = process.times(args.steps) if args.steps else None
                bits.append(process.bits_per_dim(denoise, x, noise, times)["total"])
        else:
            level = ((x + 1) * 127.5).round() + torch.rand(x.shape, generator=generator).to(device)   # dequantised
            signs = noise(x.shape).sign()
            log_p, _ = diffusion.log_likelihood(process, denoise, level / 128 - 1, signs, args.tolerance,
                                                args.tolerance)
            bits.append(7 - log_p / (x[0].numel() * math.log(2)))
    bits = torch.cat(bits)
    print(f"{bits.mean():.3f} bits per dimension (+- {bits.std() / len(bits) ** 0.5:.3f}) on {len(bits)} held-out "
          f"images: {'the variational bound' if chain else 'the ODE, with a random estimate of its divergence'}")


# -------------------------------------------------------------------------------------------------------------- experts


def dependence(counts):
    """Mutual information, in bits, of the expert and the row of a matrix of counts (rows, E): 0 if the choice of the
    expert says nothing about the row."""
    p = counts.double() / counts.sum()
    independent = p.sum(0) * p.sum(1, keepdim=True)
    return (p * (p / independent).log2().nan_to_num()).sum().item()


def experts(args):
    """2407.11633, section 4: how often each expert is chosen, by class, position and denoising step."""
    device = runs.device(args.device)
    config, objective = runs.open_run(args.run, device, args.weights)
    classes, options = config["num_classes"], runs.sampling_options(args)
    if not classes:
        raise ValueError(f"{args.run} is unconditional: the analysis by class needs a run with classes")
    steps = options.get("steps", config["sample_steps"])
    with moe.Counter(objective.model, classes, steps) as counter:
        for k in tqdm(range(0, args.n * classes, args.batch), desc="counting", unit=" batches"):
            indices = range(k, min(k + args.batch, args.n * classes))
            noise = objectives.ImageNoise(args.seed, indices, device)
            y = torch.tensor(indices, device=device) % classes
            counter.step = 0
            for _ in objective.trajectory(noise((len(y), *objective.shape)), y, noise=noise, **options):
                counter.step += 1
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    # Maps of an analysis: (layers, rows, E). Of more than 100 classes every so many is drawn.
    maps = {"class": counter.classes.transpose(0, 1), "position": counter.positions, "step": counter.steps}
    for name, counts in maps.items():
        drawn = counts[:, ::max(1, counts.shape[1] // 100)] if name == "class" else counts
        title = f"{args.run}: experts across, {name} down"
        figures.save(figures.heat_maps(drawn, [f"layer {k}" for k in range(len(drawn))], title),
                     folder / f"experts-{name}.png")
    load = counter.classes.sum(0).double()
    load = load / load.mean(1, keepdim=True)
    rows = [{"load": load[k].tolist(), "load_cv": load[k].std(correction=0).item(),
             **{name: dependence(counts[k]) for name, counts in maps.items()}} for k in range(len(load))]
    result = {"run": str(args.run), "images_per_class": args.n, "seed": args.seed, "layers": rows,
              "counts": {name: counts.tolist() for name, counts in maps.items()}}
    runs.write(folder / "experts.json", lambda path: path.write_text(json.dumps(result) + "\n"))
    print(f"{args.n} images of each of {classes} classes, {steps} steps. Bits that an expert tells of (0: nothing)")
    print("layer   class  position    step   load: least, most, coefficient of variation")
    for k, row in enumerate(rows):
        print(f"{k:5}{row['class']:8.4f}{row['position']:10.4f}{row['step']:8.4f}"
              f"{min(row['load']):14.2f}{max(row['load']):6.2f}{row['load_cv']:7.2f}")
    print(f"of at most {math.log2(load.shape[1]):.1f} bits; counts: {folder / 'experts.json'}, pictures: "
          f"{folder}/experts-class.png, -position.png, -step.png")


# --------------------------------------------------------------------------------------------------------------- stitch


def stitch(args):
    """2402.14167, figure 1: quality and time over the fraction of the steps that the smaller model takes."""
    device, options, folders = runs.device(args.device), runs.sampling_options(args), (args.small, args.large)
    parts = [runs.open_run(folder, device, args.weights)[1] for folder in folders]
    config, _ = runs.open_stitched(folders, [0.5])                     # refuses what cannot be stitched
    if not config["num_classes"]:
        raise ValueError(f"{args.large} has no classes: class accuracy needs runs with classes")
    network = classifier(config, device, args.classifier_steps)
    held_out = load_data(config, "test")
    reference, _ = read(network, (held_out.gather(r)[0] for r in torch.arange(len(held_out)).split(256)), device)
    labels = torch.arange(args.n) % config["num_classes"]
    macs = [cost(part.model, part.shape)[1] for part in parts]
    stitched = [objectives.Stitch(parts, [f, 1 - f], args.stitch_rule).eval() for f in args.fractions]
    rows = [{"fraction": f, "macs": f * macs[0] + (1 - f) * macs[1], "frechet_classifier": [], "class_accuracy": [],
             "seconds": []} for f in args.fractions]
    for seed, (row, objective) in tqdm([(seed, both) for seed in args.seeds for both in zip(rows, stitched)],
                                       desc="seeds x fractions"):
        clock = time.perf_counter()
        images = list(runs.draw(objective, labels, args.n, seed, args.batch, device, **options))
        row["seconds"].append(time.perf_counter() - clock)
        features, classes = read(network, images, device)
        row["frechet_classifier"].append(frechet_distance(features, reference))
        row["class_accuracy"].append((classes == labels).float().mean().item())
    mean, spread = statistics.mean, lambda v: statistics.stdev(v) if len(v) > 1 else 0.0
    print(f"{args.n} images for each of seeds {', '.join(map(str, args.seeds))}: mean, deviation, median time\n"
          f"{args.small}: {macs[0] / 1e6:.1f} MMACs, {args.large}: {macs[1] / 1e6:.1f} MMACs a call and image")
    print(f"fraction{'Frechet distance':>20}{'class accuracy':>20}{'seconds':>10}{'of the first row':>18}{'MACs':>8}")
    full = statistics.median(rows[0]["seconds"])
    for row in rows:
        f, a, s = row["frechet_classifier"], row["class_accuracy"], statistics.median(row["seconds"])
        print(f"{row['fraction']:8.2f}{mean(f):12.3f} +- {spread(f):4.3f}{mean(a):12.4f} +- {spread(a):4.3f}{s:10.1f}"
              f"{s / full:18.3f}{row['macs'] / rows[0]['macs']:8.3f}")
    folder = Path(args.large) if Path(args.large).is_dir() else Path(args.large).parent
    runs.write(folder / "stitch.json", lambda path: path.write_text(json.dumps(rows, indent=2) + "\n"))
    lines = {f"_seed {seed}": (args.fractions, [row["frechet_classifier"][k] for row in rows])
             for k, seed in enumerate(args.seeds)}
    lines["mean of the seeds"] = args.fractions, [mean(row["frechet_classifier"]) for row in rows]
    picture = figures.curves(lines, f"{args.small} first, then {args.large}", "fraction of the steps by the first",
                             "Frechet distance")
    figures.save(picture, folder / "stitch.png")
    print(f"numbers: {folder / 'stitch.json'}, picture: {folder / 'stitch.png'}")


# ----------------------------------------------------------------------------------------------------------------- pack


def pack(args):
    """2405.14854, table 4: the averaged weights at two bits as a file that sample.py draws from; size and speed beside
    the same weights in ordinary layers, and beside ternary layers as they are trained."""
    device = runs.device(args.device)
    config, objective = runs.open_run(args.run, device)
    if config.get("packed") or not any(isinstance(m, layers.TernaryLinear) for m in objective.modules()):
        raise ValueError(f"{args.run} has no ternary weights to pack: train a terdit, or another model by --ternary")
    forms = {name: copy.deepcopy(objective) for name in ("ordinary", "as trained", "packed")}
    layers.replace_ternary(forms["ordinary"].model, layers.dense)
    layers.replace_ternary(forms["packed"].model, layers.PackedLinear)
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    state, path = forms["packed"].state_dict(), folder / "packed.pt"
    checkpoint = {"config": config | {"packed": True}, "step": 0, "model": state, "ema": state, "optimiser": {}}
    runs.write(path, lambda partial: torch.save(checkpoint, partial))

    labels = torch.arange(args.n) % config["num_classes"] if config["num_classes"] else None
    times, images = {name: [] for name in forms}, {}
    for _ in tqdm(range(args.rounds), desc="drawing, all forms in turn", leave=False):
        for name, form in forms.items():
            clock = time.perf_counter()
            images[name] = torch.cat(list(runs.draw(form, labels, args.n, 0, args.n, device)))
            times[name].append(time.perf_counter() - clock)
    print(f"{args.n} images, {config['sample_steps']} steps, medians of {args.rounds} interleaved rounds")
    print(f"{'weights':14}{'MB':>8}{'seconds':>10}{'difference of images':>22}")
    for name, form in forms.items():
        size = sum(v.numel() * v.element_size() for v in form.state_dict().values()) / 1e6
        difference = (images[name] - images["ordinary"]).abs().max().item()
        print(f"{name:14}{size:8.2f}{statistics.median(times[name]):10.2f}{difference:22.1e}")
    print(f"the file: {path}, {path.stat().st_size / 1e6:.2f} MB; python sample.py {path} draws from it")
# ---------------------------------------------------------------------------------------------------------------- sizes


def size_classifier(sizes, device, steps):
    """A `Classifier` of shapes of all these sizes, a size a batch, trained once and kept beside the runs."""
    path = Path("runs/classifiers") / f"shapes-{'-'.join('x'.join(map(str, s)) for s in sizes)}.pt"
    network = Classifier(len(data.SHAPES)).to(device)
    if path.exists():
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return network.eval()
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    for step in tqdm(range(steps), desc=f"training a classifier (once, kept in {path})", unit=" steps", delay=1):
        x, y = drawn_shapes("train", sizes[step % len(sizes)], step * 64, 64)
        loss = F.cross_entropy(network(x.to(device)), y.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write(path, lambda partial: torch.save(network.state_dict(), partial))
    return network.eval()


def drawn_shapes(split, size, first, n):
    """n shapes of a split, in the order of their numbers and around its end: x (n, 3, H, W), labels (n,)."""
    numbers = data.SPLITS[split]
    x, y, _ = data.render([numbers[(first + k) % len(numbers)] for k in range(n)], size)
    return torch.from_numpy(x).float() / 127.5 - 1, torch.from_numpy(y)


def sizes(args):
    """Sizes and ratios that no training image had, with every way of extrapolating the rotary frequencies."""
    device, rows, pictures = runs.device(args.device), {}, {size: [] for size in args.sizes}
    network = size_classifier(args.sizes, device, args.classifier_steps)
    labels = torch.arange(args.n) % len(data.SHAPES)

    def accuracy(batches, y):
        return (read(network, batches, device)[1] == y).float().mean().item()

    for folder in args.runs:
        config, objective = runs.open_run(folder, device, args.weights)
        if config["classes"] != data.SHAPES:
            raise ValueError(f"{folder}: this command knows the shapes only, train with --data shapes and classes")
        ropes = objective.model.ropes or [None]
        for rope in ropes if args.ropes == ["all"] else [name for name in ropes if name in args.ropes or not name]:
            for size in tqdm(args.sizes, desc=f"{folder} {rope or ''}", unit=" sizes", leave=False):
                runs.extrapolate(objective, size, rope)
                x = torch.cat([*runs.draw(objective, labels, args.n, args.seed, args.batch, device, steps=args.steps)])
                rows.setdefault(f"{Path(folder).name} {rope or ''}", []).append(accuracy([x], labels))
                pictures[size].append(x[:8].cpu())
    real = [drawn_shapes("test", size, 0, 512) for size in args.sizes]
    rows["held-out real"] = [accuracy(x.split(128), y) for x, y in real]
    print(f"class accuracy of {args.n} samples, {args.steps} steps, the run's own guidance, seed {args.seed}")
    print(f"{'':32}" + "".join(f"{'x'.join(map(str, size)):>9}" for size in args.sizes))
    for name, cells in rows.items():
        print(f"{name:32}" + "".join(f"{cell:9.3f}" for cell in cells))
    for size, drawn in pictures.items():
        path = Path(args.runs[0]) / f"size-{'x'.join(map(str, size))}.png"
        figures.save(figures.grid(figures.to_uint8(torch.cat(drawn)), 8), path)
        print(f"picture, a line of the table a row: {path}")


# ---------------------------------------------------------------------------------------------------------------- speed


def peak_memory(device, call):
    """Peak bytes of call() beyond what is held before (CUDA's allocator; on Linux the process's own peak)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)                               # gives back what is free
        Path("/proc/self/clear_refs").write_text("5")                  # resets the peak
        status = lambda key: next(int(line.split()[1]) * 1024
                                  for line in open("/proc/self/status") if line.startswith(key))
        before = status("VmRSS")
        call()
        return status("VmHWM") - before
    except (OSError, AttributeError, StopIteration):
        return math.nan


def seconds(device, call):
    """Wall time of call()."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock


def matched(name, given, image_size, macs):
    """The options that bring a model to `macs` multiply-accumulates, within 3 % if it can be: another width (heads stay
    whole) and, where depth is a number, another depth, as near the preset as may be."""
    preset = {option: p.default for option, p in options_of(name).items()} | given
    key = next(k for k in ("hidden_size", "channels") if k in preset)
    step, depth = 4 * preset.get("num_heads", 1), preset.get("depth")

    def count(**change):
        with torch.device("meta"):
            return cost(create_model(name, image_size, **given, **change), (3, image_size, image_size))[1]

    middle = preset[key] * (macs / count()) ** 0.5 / step               # MACs grow with about the square of the width
    found = {}
    for width in {max(1, math.floor(middle) + k) * step for k in (-1, 0, 1, 2)}:
        with contextlib.suppress(ValueError):                           # a width that the model refuses
            found[width, depth] = count(**{key: width})
            if isinstance(depth, int) and (d := max(1, round(depth * macs / found[width, depth]))) != depth:
                found[width, d] = count(**{key: width, "depth": d})
    width, depth = min(found, key=lambda k: (
        max(0.03, abs(math.log(found[k] / macs))),
        abs(math.log(k[0] / preset[key])) + (abs(math.log(k[1] / depth)) if isinstance(depth, int) else 0)))
    return given | {key: width} | ({"depth": depth} if isinstance(depth, int) else {})


def timed_calls(model, batch, shape, device, args):
    """(forward, training step) of a batch, each sample with a time and a label of its own."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    x = torch.randn(batch, *shape, device=device).contiguous(memory_format=layout)
    t, y = torch.rand(batch, device=device) * 1000, torch.randint(10, (batch,), device=device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    half = lambda: torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def forward():
        with torch.no_grad(), half():
            model(x, t, y)

    def step():
        with half():
            loss = model(x, t, y).float().pow(2).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return forward, step


def best_batch(device, make, largest):
    """The batch, of 1, 2, 4, ... up to `largest`, at which make(batch) handles most images a second; the search ends
    when twice the batch is clearly slower, or memory is out."""
    rates, batch = {}, 1
    while batch <= largest:
        try:
            call = make(batch)
            call()
            rates[batch] = batch / min(seconds(device, call) for _ in range(3))
        except torch.OutOfMemoryError:
            break
        if rates[batch] < 0.9 * max(rates.values()):
            break
        batch *= 2
    return max(rates, key=rates.get)


def mixers(args):
    """Time and peak memory of forward and backward of every token mixer from 64 tokens to --tokens, batch 1."""
    device, D = runs.device(args.device), args.width
    make = lambda *shape: torch.randn(*shape, device=device).requires_grad_()
    heads = lambda N, h: [make(1, h, N, D // h) for _ in range(3)]
    kinds = {
        "selective scan": lambda N: (lambda u, d, A, B, C: scans.selective_scan(u, d, -A.exp(), B, C, None, None, None,
                                                                                True)[0],
                                     [make(1, N, D), make(1, N, D), make(D, 16), make(1, N, 16), make(1, N, 16)]),
        "Bi-WKV": lambda N: (lambda w, u, k, v: scans.bi_wkv(w / N, u / N, k, v),
                             [make(D), make(D), make(1, N, D), make(1, N, D)]),
        "linear attention": lambda N: (scans.linear_attention, heads(N, 2)),
        "softmax attention": lambda N: (F.scaled_dot_product_attention, heads(N, 6)),
    }
    lengths = [64 * 4**k for k in range(10) if 64 * 4**k <= args.tokens]
    table = {name: [] for name in kinds}
    for name, N in tqdm([(name, N) for N in lengths for name in kinds], desc="mixer x tokens", delay=2, leave=False):
        call, inputs = kinds[name](N)
        once = lambda: call(*inputs).sum().backward()
        memory = peak_memory(device, once)
        first = seconds(device, once)
        table[name].append((min([first, *(seconds(device, once) for _ in range(args.rounds if first < 1 else 0))]),
                            memory))
    print(f"forward and backward, width {D}, batch 1, {device.type}, {torch.get_num_threads()} threads: ms (MiB)")
    print(f"{'':20}" + "".join(f"{N:>18,}" for N in lengths) + f"{'slope':>8}")
    logs = torch.tensor(lengths, dtype=torch.float64).log()
    for name, row in table.items():
        y = torch.tensor([t for t, _ in row], dtype=torch.float64).log()
        slope = ((logs - logs.mean()) * (y - y.mean())).sum() / ((logs - logs.mean()) ** 2).sum()
        print(f"{name:20}" + "".join(f"{f'{t * 1e3:.1f} ({m / 2**20:.0f})':>18}" for t, m in row) + f"{slope:8.2f}")
    lines = {name: ([math.log2(N) for N in lengths], [math.log10(t * 1e3) for t, _ in row])
             for name, row in table.items()}
    figures.save(figures.curves(lines, "token mixers", "log2 of the number of tokens", "log10 ms"), args.out)
    print(f"picture: {args.out}")


def speed(args):
    if args.tokens:
        return mixers(args)
    if not args.models:
        raise ValueError("speed: name models, or compare the token mixers by --tokens 16384")
    device = runs.device(args.device)
    shape, rows, calls = (3, args.image_size, args.image_size), {}, {}
    for text in tqdm(args.models, desc="preparing", delay=2, leave=False):
        name, _, options = text.partition(":")
        try:
            options = runs.options(options)
        except argparse.ArgumentTypeError as error:
            raise ValueError(error) from None
        if args.fair and rows:
            options = matched(name, options, args.image_size, next(iter(rows.values()))[1])
            text = f"{name}:" + ",".join(f"{k}={v}" for k, v in options.items())
        model = create_model(name, args.image_size, **options).to(device)
        counts = cost(model, shape)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.compile:
            model.compile()
        make = lambda batch: timed_calls(model, batch, shape, device, args)
        batches = [best_batch(device, lambda b: make(b)[k], args.batch) if args.fair else args.batch for k in (0, 1)]
        calls[text] = [make(batch)[k] for k, batch in enumerate(batches)]
        clean = device.type == "cuda" or not args.fair                  # a CPU's memory is only known the first time
        rows[text] = *counts, batches, peak_memory(device, calls[text][1]) if clean else math.nan
        calls[text][0]()
    times = {text: ([], []) for text in rows}
    for _ in tqdm(range(args.rounds), desc="timing, all models in turn", delay=2, leave=False):
        for text in rows:
            for call, kept in zip(calls[text], times[text]):
                kept.append(seconds(device, call))
    batch = f"each at its best batch up to {args.batch}" if args.fair else f"batch {args.batch}"
    print(f"{args.image_size}x{args.image_size}, {device.type}, {torch.get_num_threads()} threads, {args.precision}"
          f"{', channels-last' * args.channels_last}{', compiled' * args.compile}; medians of {args.rounds} "
          f"interleaved rounds; {batch}")
    wide = max(20, *(len(text) + 2 for text in rows))
    print(f"{'model':{wide}}{'parameters':>12}{'GMACs':>9}{'forward ms':>12}{'images/s':>10}{'step ms':>10}"
          f"{'images/s':>10}{'peak MiB':>10}")
    rates = {}
    for text, (parameters, macs, batches, memory) in rows.items():
        medians = [statistics.median(t) for t in times[text]]
        rates[text] = [batch / median for batch, median in zip(batches, medians)]
        print(f"{text:{wide}}{parameters / 1e6:10.2f} M{macs / 1e9:9.3f}{medians[0] * 1e3:12.1f}{rates[text][0]:10.1f}"
              f"{medians[1] * 1e3:10.1f}{rates[text][1]:10.1f}{memory / 2**20:10.0f}")
    if args.fair:
        first, *others = rows
        for text in others:
            table = zip(("forward", "training"), rates[first], rates[text], rows[first][2], rows[text][2])
            print(f"{first} over {text}: " + ", ".join(
                f"{what} {ours / theirs:.2f} times the images/s (batches {a} and {b})"
                for what, ours, theirs, a, b in table) + f", at {rows[first][1] / rows[text][1]:.3f} times the MACs")


# ------------------------------------------------------------------------------------------------------------- commands


def drawing_flags(s):
    """Flags of every command that draws images from a run and looks at them with the classifier."""
    s.add_argument("--seed", type=int, default=1, help="of the samples (default: %(default)s)")
    s.add_argument("--batch", type=runs.positive, default=64, help="images drawn at once (default: %(default)s)")
    s.add_argument("--weights", choices=["ema", "model"], default="ema",
                   help="averaged or last weights (default: %(default)s)")
    s.add_argument("--classifier-steps", type=runs.positive, default=400,
                   help="training steps of 128 images, the first time (default: %(default)s)")
    s.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def flags():
    p = argparse.ArgumentParser(prog="evaluate.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    s = commands.add_parser("score", help="class accuracy and Frechet distance of a run's samples, beside real images")
    s.set_defaults(function=score)
    s.add_argument("run", help="folder of a run, or a checkpoint file in it")
    s.add_argument("--n", type=runs.positive, default=512, help="images to draw (default: %(default)s)")
    runs.sampling_flags(s)
    drawing_flags(s)

    s = commands.add_parser("samplers", help="sampler x steps -> Frechet distance and time, as a table and a picture")
    s.set_defaults(function=samplers)
    s.add_argument("run", help="folder of a run")
    s.add_argument("--n", type=runs.positive, default=256, help="images for each entry (default: %(default)s)")
    s.add_argument("--samplers", default="ddpm,ddim,heun,deis,dpmpp-2m,dpmpp-3m,unipc",
                   help="comma separated (default: %(default)s), or all: " + ", ".join(diffusion.SAMPLERS))
    s.add_argument("--steps", type=runs.wholes, default=[5, 10, 20, 50], metavar="N,N,...", help="default: 5,10,20,50")
    s.add_argument("--guidance", type=float, help="classifier-free guidance, 1 for none (default: the run's own)")
    drawing_flags(s)

    s = commands.add_parser("likelihood", help="bits per dimension of held-out images: a chain's bound, or by the ODE")
    s.set_defaults(function=likelihood)
    s.add_argument("run", help="folder of a run, or a checkpoint file in it")
    s.add_argument("--n", type=runs.positive, default=64, help="images (default: %(default)s)")
    s.add_argument("--steps", type=runs.positive, help="of a chain: a sub-grid of so many steps (default: all)")
    s.add_argument("--tolerance", type=float, default=1e-3, help="of the adaptive solver (default: %(default)s)")
    drawing_flags(s)

    s = commands.add_parser("experts", help="which experts a run's tokens choose, by class, position and step")
    s.set_defaults(function=experts)
    s.add_argument("run", help="folder of a run of a model with experts")
    s.add_argument("--n", type=runs.positive, default=50, help="images of each class (default: %(default)s)")
    runs.sampling_flags(s)
    drawing_flags(s)

    s = commands.add_parser("stitch", help="quality and time of two runs in one trajectory, as a table and a picture")
    s.set_defaults(function=stitch)
    s.add_argument("small", help="folder of the run of the smaller model, which takes the first steps")
    s.add_argument("large", help="folder of the run of the larger model")
    s.add_argument("--n", type=runs.positive, default=256, help="images for each entry (default: %(default)s)")
    s.add_argument("--fractions", type=runs.floats, default=[k / 10 for k in range(11)], metavar="F,...",
                   help="of the steps that the smaller model takes (default: 0,0.1,...,1)")
    s.add_argument("--seeds", type=runs.wholes, default=[1, 2, 3], metavar="N,...", help="default: 1,2,3")
    s.add_argument("--stitch-rule", choices=["steps", "time"], default="steps", help="see sample.py --help")
    runs.sampling_flags(s)
    drawing_flags(s)

    s = commands.add_parser("pack", help="a ternary run's weights at two bits: a file, its size and its speed")
    s.set_defaults(function=pack)
    s.add_argument("run", help="folder of a run with ternary weights")
    s.add_argument("--n", type=runs.positive, default=16, help="images to draw (default: %(default)s)")
    s.add_argument("--rounds", type=runs.positive, default=3, help="timed rounds (default: %(default)s)")
    s.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")

    s = commands.add_parser("prompts", help="do samples of a run with text show the prompt's colour and shape?")
    s.set_defaults(function=prompts)
    s.add_argument("run", help="folder of a run of --data shapes")
    s.add_argument("--n", type=runs.positive, default=256, help="prompts, of the test split (default: %(default)s)")
    s.add_argument("--subset", metavar="REGEX", help="only captions that this finds, such as those not trained on")
    runs.sampling_flags(s)
    drawing_flags(s)

    s = commands.add_parser("sizes", help="class accuracy of shapes at other sizes than those of training")
    s.set_defaults(function=sizes)
    s.add_argument("runs", nargs="+", help="folders of runs on shapes")
    s.add_argument("--sizes", type=lambda text: [runs.sides(word) for word in text.split(",")], metavar="HxW,...",
                   default=[(32, 32), (20, 40), (16, 48), (44, 44), (32, 64)],
                   help="default: 32x32,20x40,16x48,44x44,32x64")
    s.add_argument("--ropes", type=lambda text: text.split(","), default=["all"], metavar="NAME,...",
                   help="ways to extrapolate, of models that have rotary positions (default: all)")
    s.add_argument("--n", type=runs.positive, default=64, help="images for each entry (default: %(default)s)")
    s.add_argument("--steps", type=runs.positive, default=10, help="sampling steps (default: %(default)s)")
    drawing_flags(s)

    s = commands.add_parser("speed", help="parameters, MACs, time of forward and training step, peak memory")
    s.set_defaults(function=speed)
    s.add_argument("--tokens", type=runs.positive, metavar="N",
                   help="instead: time and memory of the token mixers (selective scan, Bi-WKV, linear and softmax "
                   "attention) from 64 to N tokens, as a table and a picture")
    s.add_argument("--width", type=runs.positive, default=384, help="of the mixers (default: %(default)s)")
    s.add_argument("--out", default="mixers.png", help="the mixers' picture (default: %(default)s)")
    s.add_argument("models", nargs="*", metavar="MODEL",
                   help=f"NAME or NAME:OPTION=VALUE,...; names are {', '.join(MODELS)}")
    s.add_argument("--fair", action="store_true", help="bring every model to the first one's MACs, by its width and "
                   "depth, and let each have the batch that suits it best, of 1, 2, 4, ... up to --batch")
    s.add_argument("--channels-last", action="store_true", help="weights and images in this layout")
    s.add_argument("--compile", action="store_true", help="torch.compile every model")
    s.add_argument("--image-size", type=runs.positive, default=32, help="default: %(default)s")
    s.add_argument("--batch", type=runs.positive, default=16, help="default: %(default)s")
    s.add_argument("--rounds", type=runs.positive, default=5, help="timed rounds (default: %(default)s)")
    s.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    s.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")
    return p


def evaluate():
    args = flags().parse_args()
    args.function(args)


if __name__ == "__main__":
    runs.command(evaluate)
