"""What a judge says of a run's samples: the commands of evaluate.py that draw, and show what they drew to a classifier
of the data set (metrics.judge) or compare its features with those of real images.

    score      class accuracy and Frechet distance        samplers   every sampler at several numbers of steps
    prompts    do samples show what captions say?         sizes      sizes that no training image had
    stitch     two runs in one trajectory, over the share of the smaller one
    curves     how runs learned, beside each other, from their logs alone
"""

import dataclasses
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import build
import data
import figures
import guides
import metrics
import runs


def judge_flags(p, of_a_run=True):
    """Flags of every command that draws images from a run and shows them to a judge, which may be a run itself."""
    p.add_argument("--seed", type=int, default=1, help="of the samples (default: %(default)s)")
    p.add_argument("--batch", type=build.positive, default=64, help="images drawn at once (default: %(default)s)")
    p.add_argument("--weights", choices=["ema", "model"], default="ema",
                   help="averaged or last weights (default: %(default)s)")
    p.add_argument("--classifier-steps", type=build.positive, default=400,
                   help="training steps of 128 images, the first time (default: %(default)s)")
    if of_a_run:
        p.add_argument("--judge", type=runs.Run, metavar="RUN",
                       help="a run of a ResNet (--model resnet-nano) that judges instead of a classifier trained here")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


class ResNetJudge(metrics.FeatureNetwork):
    """A trained ResNet as judge: its features, averaged over the image, and its classes. ValueError for a run of
    something else, or of other classes."""

    def __init__(self, run, classes):
        super().__init__()
        self.network = getattr(run.objective, "model", None)
        if type(self.network) is not guides.ResNet:
            raise ValueError(f"--judge {run.path} is no run of a ResNet: python train.py --model resnet-nano makes one")
        if run.config["classes"] != list(classes):
            raise ValueError(f"--judge {run.path} knows other classes, {', '.join(run.config['classes'][:3])}, ..., "
                             f"than the images have, {', '.join(list(classes)[:3])}, ...")
        self.width, self.title = self.network.fc.in_features, f"{self.network.fc.in_features} features of {run.path}"

    def of_images(self, x):
        return self.network.features(x)[-1].mean((2, 3))

    def logits(self, features):
        return self.network.fc(features)


def judge_of(run, args):
    """The judge of a run's data set, as the flags say; ValueError if the data have no classes."""
    dataset = run.data("train")
    if not dataset.classes:
        raise ValueError(f"{run.path}: its data have no classes, which a judge needs to learn")
    if args.judge:
        return ResNetJudge(args.judge, dataset.classes).to(run.device).eval()
    return metrics.judge(dataset, run.config["data"].partition(":")[0], args.classifier_steps, run.device)


def real_batches(dataset, rows):
    """Images of a data set at `rows`, batch by batch."""
    return (dataset.gather(some)[0] for some in rows.split(256))


def class_conditions(run, n, draw):
    """n labels in turn, of the run's classes or of its guide's; ValueError for a run without classes."""
    guide = draw.get("guide")
    count = (build.open_config(guide) if guide else run.config)["num_classes"]
    if not count:
        raise ValueError(f"{run.path} is unconditional: class accuracy needs a run with classes, or --guide RUN")
    return torch.arange(n) % count


class Scorer:
    """Measures during training: scorer(objective, options) -> {"frechet", "class_accuracy"} of what it draws, by a
    judge of the data set and held-out real images."""

    def __init__(self, config, dataset, device):
        if not dataset.classes or dataset.budget:
            raise ValueError("--score-every needs a data set with classes and images of one size, for its judge")
        self.config = config
        self.judge = metrics.judge(dataset, config["data"].partition(":")[0], device=device)
        held_out = build.load_data(config, "test", device, flip=False)
        self.reference, _ = self.judge.read(real_batches(held_out, torch.arange(len(held_out))))

    def __call__(self, objective, options):
        n, device = self.config["score_n"], next(objective.parameters()).device
        conditions = objective.conditions(n)
        drawn = build.draw(objective, n, self.config["seed"], 64, conditions, device, **options)
        features, classes = self.judge.read(drawn)
        result = {"frechet": metrics.frechet_distance(features, self.reference)}
        if isinstance(conditions, torch.Tensor) and conditions.ndim == 1:
            result["class_accuracy"] = (classes == conditions).float().mean().item()
        return result


def score_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run, or a checkpoint file in it")
    p.add_argument("--n", type=build.positive, default=512, help="images to draw (default: %(default)s)")
    judge_flags(p)


def score(args):
    """Class accuracy and Frechet distance of a run's samples, beside real images."""
    run, labels = args.run, class_conditions(args.run, args.n, args.draw)
    network = judge_of(run, args)
    # Real images that no training has seen: one half is the reference, the other the ceiling.
    held_out = run.data("test")
    n = min(args.n, len(held_out) // 2)
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    reference, _ = network.read(real_batches(held_out, order[n:]))
    real, real_classes = network.read(real_batches(held_out, order[:n]))
    labels, clock = labels[:n], time.perf_counter()
    drawn, drawn_classes = network.read(run.images(n, args.seed, args.batch, labels, **args.draw))
    clock = time.perf_counter() - clock
    how = {key: value for key, value in (run.config["draw"] | args.draw).items()}
    result = {"run": run.path, "images": n, "reference_images": len(reference), "weights": args.weights,
              "seed": args.seed, "draw": how,
              "class_accuracy": (drawn_classes == labels).float().mean().item(),
              "class_accuracy_real": (real_classes == held_out.labels[order[:n]].cpu()).float().mean().item(),
              "frechet_classifier": metrics.frechet_distance(drawn, reference),
              "frechet_classifier_real": metrics.frechet_distance(real, reference)}
    print(f"{n} images in {clock:.0f} s, {args.weights} weights, seed {args.seed}: "
          + ", ".join(f"{key} {value}" for key, value in how.items()))
    print(f"{'':34}{'generated':>10}{'held-out real':>15}")
    print(f"{'class accuracy':34}{result['class_accuracy']:10.4f}{result['class_accuracy_real']:15.4f}")
    print(f"{'Frechet distance, classifier':34}{result['frechet_classifier']:10.3f}"
          f"{result['frechet_classifier_real']:15.3f}")
    print(f"({network.title}, against {len(reference)} held-out real images: not the FID of the literature)")
    if n < 256:
        print(f"{n} images are few: a share of {result['class_accuracy']:.2f} has a standard error of "
              f"{math.sqrt(result['class_accuracy'] * (1 - result['class_accuracy']) / n):.2f}, and a Frechet distance "
              "falls as more are drawn")
    text = json.dumps(result, indent=2, default=str) + "\n"
    runs.write(run.folder / "score.json", lambda path: path.write_text(text))


def samplers_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run")
    p.add_argument("--n", type=build.positive, default=256, help="images for each entry (default: %(default)s)")
    p.add_argument("--samplers", default="ddpm,ddim,heun,deis,dpmpp-2m,dpmpp-3m,unipc",
                   help="comma separated (default: %(default)s)")
    p.add_argument("--counts", default="5,10,20,50", metavar="N,N,...", help="of steps (default: %(default)s)")
    judge_flags(p)


def samplers(args):
    """What order buys: every sampler at every number of steps, on the same noise and labels: distance and time."""
    run, names, counts = args.run, args.samplers.split(","), [int(word) for word in args.counts.split(",")]
    network, held_out = judge_of(run, args), run.data("test")
    reference, _ = network.read(real_batches(held_out, torch.arange(len(held_out))))
    table = {name: [] for name in names}
    for name, count in tqdm([(name, count) for name in names for count in counts], desc="sampler x steps"):
        clock = time.perf_counter()
        try:
            options = args.draw | {"sampler": name, "steps": count}
            features, _ = network.read(run.images(args.n, args.seed, args.batch, **options))
        except ValueError as error:                               # a pair that makes no sense says why
            table[name].append(error)
            continue
        table[name].append((metrics.frechet_distance(features, reference), time.perf_counter() - clock))
    print(f"Frechet distance on classifier features of {args.n} images (seconds to draw them)")
    print(f"{'sampler':20}" + "".join(f"{f'{count} steps':>18}" for count in counts))
    for name, row in table.items():
        cells = ["refused" if isinstance(cell, ValueError) else f"{cell[0]:.3f} ({cell[1]:.1f})" for cell in row]
        print(f"{name:20}" + "".join(f"{cell:>18}" for cell in cells))
    for name, row in table.items():
        if isinstance(row[0], ValueError):
            print(f"{name}: {row[0]}")
    lines = {name: (counts, [c[0] for c in row]) for name, row in table.items()
             if not any(isinstance(c, ValueError) for c in row)}
    if lines:
        title = f"{run.path}: what each sampler makes of its steps"
        figures.save(figures.curves(lines, title, "steps", "Frechet distance"), run.folder / "samplers.png")
        print(f"picture: {run.folder / 'samplers.png'}")


def first_word(captions, words):
    """Which of the words each caption holds first: int64 (n,); ValueError where there is none."""
    at = torch.tensor([[c.split().index(w) if w in c.split() else len(c) for w in words] for c in captions])
    if (at.amin(1) == torch.tensor([len(c) for c in captions])).any():
        raise ValueError(f"not every caption names one of {', '.join(words)}")
    return at.argmin(1)


def prompts_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run of --data shapes with text")
    p.add_argument("--n", type=build.positive, default=256, help="prompts, of the test split (default: %(default)s)")
    p.add_argument("--subset", metavar="REGEX", help="only captions that this finds, such as those not trained on")
    judge_flags(p, of_a_run=False)


def prompts(args):
    """Whether samples of a run with text show the prompt's colour and shape: classifiers of both, trained on real
    `shapes` and tested on held-out ones, read what was drawn from held-out captions."""
    run, objective = args.run, args.run.objective
    if getattr(objective, "encoder", None) is None or run.config["data"].partition(":")[0] != "shapes":
        raise ValueError(f"{run.path}: this measures runs that learned the captions of --data shapes")
    train, test = run.data("train"), run.data("test")
    chosen = test.subset(args.subset) if args.subset else test
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(args.seed))
    captions = [chosen.captions[i] for i in order[:args.n]]
    conditions = data.byte_tokens(captions, objective.model.text_length)
    images = torch.cat(list(run.images(len(captions), args.seed, args.batch, conditions, **args.draw)))
    figures.save(figures.grid(figures.to_uint8(images[:64])), run.folder / "prompts.png")
    print("\n".join(captions[:8]) + f"\n... {len(captions)} prompts; pictures of the first 64, row by row: "
          f"{run.folder / 'prompts.png'}")
    print(f"{'':10}{'generated':>11}{'held-out real':>15}")
    for name, words in {"colour": list(data.COLOURS), "shape": data.SHAPES}.items():
        real_train = dataclasses.replace(train, labels=first_word(train.captions, words), classes=words)
        network = metrics.judge(real_train.to(run.device), run.config["data"].partition(":")[0], args.classifier_steps,
                                run.device)
        _, drawn = network.read(images.split(256))
        rows = torch.arange(min(2000, len(test)))
        _, real = network.read(real_batches(test, rows))
        agree = (drawn == first_word(captions, words)).float().mean()
        seen = (real == first_word([test.captions[i] for i in rows], words)).float().mean()
        print(f"{name:10}{agree:11.4f}{seen:15.4f}")


def sizes_flags(p):
    p.add_argument("run", type=runs.Run, nargs="+", help="folders of runs on shapes")
    p.add_argument("--sizes", default="32x32,20x40,16x48,44x44,32x64", metavar="HxW,...", help="default: %(default)s")
    p.add_argument("--ropes", default="all", metavar="NAME,...",
                   help="ways to extrapolate, of models that have rotary positions (default: %(default)s)")
    p.add_argument("--n", type=build.positive, default=64, help="images for each entry (default: %(default)s)")
    judge_flags(p)


def drawn_shapes(split, size, first, n):
    """n shapes of a split, in the order of their numbers and around its end: x (n, 3, H, W), labels (n,)."""
    numbers = data.SPLITS[split]
    x, y, _ = data.render([numbers[(first + k) % len(numbers)] for k in range(n)], size)
    return torch.from_numpy(x).float() / 127.5 - 1, torch.from_numpy(y)


def size_judge(sizes, steps, device):
    """A `metrics.Classifier` of shapes of all these sizes, a size a batch, trained once and kept beside the runs."""
    path = Path("runs/classifiers") / f"shapes-{'-'.join('x'.join(map(str, size)) for size in sizes)}-{steps}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = metrics.Classifier(len(data.SHAPES)).to(device)
    if path.exists():
        network.load_state_dict(runs.load_tensors(path))
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


def sizes(args):
    """Class accuracy of shapes at sizes and ratios that no training image had, with every way of extrapolating."""
    try:
        chosen = [tuple(int(side) for side in word.split("x")) for word in args.sizes.split(",")]
    except ValueError:
        raise ValueError(f"--sizes {args.sizes}: give sizes such as 32x32,20x40") from None
    labels, rows, pictures = torch.arange(args.n) % len(data.SHAPES), {}, {size: [] for size in chosen}
    for run in args.run:
        if run.config["classes"] != data.SHAPES:
            raise ValueError(f"{run.path}: this command knows the shapes only, train with --data shapes and classes")
    device = args.run[0].device
    network = (ResNetJudge(args.judge, data.SHAPES).to(device).eval() if args.judge else
               size_judge(chosen, args.classifier_steps, device))
    for run in args.run:
        ropes = run.objective.model.ropes or [None]
        for rope in ropes if args.ropes == "all" else [name for name in ropes if name in args.ropes.split(",")]:
            for size in tqdm(chosen, desc=f"{run.path} {rope or ''}", unit=" sizes", leave=False):
                images = run.images(args.n, args.seed, args.batch, labels, size=size, rope=rope, **args.draw)
                x = torch.cat(list(images))
                accuracy = (network.read([x])[1] == labels).float().mean().item()
                rows.setdefault(f"{run.folder.name} {rope or ''}", []).append(accuracy)
                pictures[size].append(x[:8].cpu())
    real = [drawn_shapes("test", size, 0, 512) for size in chosen]
    rows["held-out real"] = [(network.read(x.split(128))[1] == y).float().mean().item() for x, y in real]
    print(f"class accuracy of {args.n} samples, seed {args.seed}")
    print(f"{'':32}" + "".join(f"{'x'.join(map(str, size)):>9}" for size in chosen))
    for name, cells in rows.items():
        print(f"{name:32}" + "".join(f"{cell:9.3f}" for cell in cells))
    for size, drawn in pictures.items():
        path = args.run[0].folder / f"size-{'x'.join(map(str, size))}.png"
        figures.save(figures.grid(figures.to_uint8(torch.cat(drawn)), 8), path)
        print(f"picture, a line of the table a row: {path}")


def stitch_flags(p):
    p.add_argument("small", help="folder of the run of the smaller model, which takes the first steps")
    p.add_argument("run", type=runs.Run, help="folder of the run of the larger model")
    p.add_argument("--n", type=build.positive, default=256, help="images for each entry (default: %(default)s)")
    p.add_argument("--fractions", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", metavar="F,...",
                   help="of the steps that the smaller model takes (default: %(default)s)")
    p.add_argument("--seeds", default="1,2,3", metavar="N,...", help="default: %(default)s")
    p.add_argument("--stitch-rule", choices=["steps", "time"], default="steps", help="see sample.py --help")
    judge_flags(p)


def stitch(args):
    """Quality and time over the fraction of the steps that the smaller of two runs takes (2402.14167, figure 1)."""
    fractions = [float(word) for word in args.fractions.split(",")]
    seeds, large = [int(word) for word in args.seeds.split(",")], args.run
    labels = class_conditions(large, args.n, args.draw)
    stitched = [build.open_stitched([args.small, large.path], [f, 1 - f], args.stitch_rule, large.device)
                for f in fractions]
    network, held_out = judge_of(large, args), large.data("test")
    reference, _ = network.read(real_batches(held_out, torch.arange(len(held_out))))
    macs = [part.cost()[1] for part in stitched[0].objective.runs]
    rows = [{"fraction": f, "macs": f * macs[0] + (1 - f) * macs[1], "frechet_classifier": [], "class_accuracy": [],
             "seconds": []} for f in fractions]
    for seed, (row, run) in tqdm([(seed, both) for seed in seeds for both in zip(rows, stitched)],
                                 desc="seeds x fractions"):
        clock = time.perf_counter()
        images = list(run.images(args.n, seed, args.batch, labels, **args.draw))
        row["seconds"].append(time.perf_counter() - clock)
        features, classes = network.read(images)
        row["frechet_classifier"].append(metrics.frechet_distance(features, reference))
        row["class_accuracy"].append((classes == labels).float().mean().item())
    print_stitched(args, seeds, rows, macs)
    runs.write(large.folder / "stitch.json", lambda path: path.write_text(json.dumps(rows, indent=2) + "\n"))
    lines = {f"_seed {seed}": (fractions, [row["frechet_classifier"][k] for row in rows])
             for k, seed in enumerate(seeds)}
    lines["mean of the seeds"] = fractions, [statistics.mean(row["frechet_classifier"]) for row in rows]
    picture = figures.curves(lines, f"{args.small} first, then {large.path}", "fraction of the steps by the first",
                             "Frechet distance")
    figures.save(picture, large.folder / "stitch.png")
    print(f"numbers: {large.folder / 'stitch.json'}, picture: {large.folder / 'stitch.png'}")


def print_stitched(args, seeds, rows, macs):
    """The table of `stitch`."""
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"{args.n} images for each of seeds {', '.join(map(str, seeds))}: mean, deviation, median time\n"
          f"{args.small}: {macs[0] / 1e6:.1f} MMACs, {args.run.path}: {macs[1] / 1e6:.1f} MMACs a call and image")
    print(f"fraction{'Frechet distance':>20}{'class accuracy':>20}{'seconds':>10}{'of the first row':>18}{'MACs':>8}")
    full = statistics.median(rows[0]["seconds"])
    for row in rows:
        f, a, s = row["frechet_classifier"], row["class_accuracy"], statistics.median(row["seconds"])
        print(f"{row['fraction']:8.2f}{statistics.mean(f):12.3f} +- {spread(f):4.3f}{statistics.mean(a):12.4f} +- "
              f"{spread(a):4.3f}{s:10.1f}{s / full:18.3f}{row['macs'] / rows[0]['macs']:8.3f}")


def curves_flags(p):
    p.add_argument("folders", nargs="+", metavar="run", help="folders of runs")
    p.add_argument("--out", default="curves.png", help="the picture (default: %(default)s)")


def curves(args):
    """Runs beside each other, from their logs: loss by time and by multiply-accumulates, error and scores by steps, and
    the error of the clean image in ten bins of the noise level."""
    logs = {}
    for folder in args.folders:
        log = learned(folder)
        logs[log["name"] if log["name"] not in logs else folder] = log
    macs = all(log["macs"] for log in logs.values())
    by_work = {name: (log["macs" if macs else "steps"], log["loss"]) for name, log in logs.items()}

    def of(key):
        return {name: log[key] for name, log in logs.items() if log[key]}

    panels = [(by_work, True, "loss", "multiply-accumulates of training, 10^12" if macs else "steps"),
              ({name: (log["seconds"], log["loss"]) for name, log in logs.items()}, True, "loss",
               "seconds of training"),
              ({name: (log["steps"], log["error"]) for name, log in logs.items() if log["error"]}, True,
               "squared error of the clean image", "steps"),
              (of("bins"), True, "the same in the last tenth, by noise", "noise level, 0 clean to 1 noise"),
              (of("accuracy"), False, "class accuracy", "steps"), (of("frechet"), False, "Frechet distance", "steps")]
    pictures = [figures.curves(series, title, across, log=steep) for series, steep, title, across in panels if series]
    figures.save(figures.beside(pictures), Path(args.out))
    print(f"{'run':32}{'steps':>8}{'seconds':>9}{'loss':>9}   error of the clean image by noise level, last tenth")
    for name, log in logs.items():
        cells = " ".join(f"{error:.4f}" for error in log["bins"][1]) if log["bins"] else "not in its log"
        print(f"{name:32}{log['steps'][-1]:8,}{log['seconds'][-1]:9.0f}{log['loss'][-1]:9.4f}   {cells}")
    print(f"picture: {args.out}")


def learned(folder):
    """What a run's log says: lists over its lines (steps, seconds, macs, loss, error, running means of the last two),
    pairs of lists over the scores (accuracy, frechet) and over noise levels (bins); None for what it does not hold."""
    folder = Path(folder).expanduser()
    entries = runs.history(folder)
    lines = [e for e in entries if "loss" in e]
    if len(lines) < 2:
        raise ValueError(f"{folder}: its metrics.jsonl holds no two lines of losses to draw; name folders of runs")
    config = json.loads((folder / "config.json").read_text())
    steps = [e["step"] for e in lines]
    taken = [b - a for a, b in zip([0, *steps], steps)]
    seconds = list(itertools.accumulate(n * config["batch"] / e["images_per_s"] for n, e in zip(taken, lines)))
    tenths = [e for e in lines if e["step"] > 0.9 * steps[-1]]
    bins, error = None, None
    if "error_by_noise" in lines[-1]:
        rows = [mean_of(column) for column in zip(*(e["error_by_noise"] for e in tenths))]
        seen = [k for k, row in enumerate(rows) if row is not None]
        bins = [(k + 0.5) / len(rows) for k in seen], [rows[k] for k in seen]
        error = figures.running_mean([mean_of(e["error_by_noise"]) for e in lines])
    work = [e["tmacs"] for e in lines] if "tmacs" in lines[-1] else None
    scored = {key: ([e["step"] for e in entries if key in e], [e[key] for e in entries if key in e])
              for key in ("class_accuracy", "frechet")}
    return {"name": folder.name, "steps": steps, "seconds": seconds, "macs": work, "bins": bins, "error": error,
            "loss": figures.running_mean([e["loss"] for e in lines]),
            "accuracy": scored["class_accuracy"] if scored["class_accuracy"][0] else None,
            "frechet": scored["frechet"] if scored["frechet"][0] else None}


def mean_of(values):
    """The mean of those that are not None; None if none is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
