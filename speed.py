"""Cost and timing: parameters, multiply-accumulates, seconds, memory; of models, of token mixers, of packed weights.

Timings are medians of interleaved rounds in one process, so that whatever else the machine does hits all alike.
"""

import contextlib
import copy
import ctypes
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import build
import figures
import layers
import objectives
import runs
import scans
from models import MODELS, cost, create_model

# ------------------------------------------------------------------------------------------------------------ measuring


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
    """The options that bring a backbone to `macs` multiply-accumulates, within 3 % if it can be: another width (heads
    stay whole) and, where depth is a number, another depth, as near the preset as may be."""
    preset = {key: p.default for key, p in build.parameters(MODELS[name]).items()} | given
    key = next(k for k in ("hidden_size", "channels") if k in preset)
    step, depth = 4 * preset.get("num_heads", 1), preset.get("depth")

    def count(**change):
        with torch.device("meta"):
            return cost(create_model(name, image_size, **{**given, **change}), (3, image_size, image_size))[1]

    middle = preset[key] * (macs / count()) ** 0.5 / step               # MACs grow with about the square of the width
    found = {}
    for width in {max(1, math.floor(middle) + k) * step for k in (-1, 0, 1, 2)}:
        with contextlib.suppress(ValueError):                           # a width that the model refuses
            found[width, depth] = count(**{key: width})
            if isinstance(depth, int) and (d := max(1, round(depth * macs / found[width, depth]))) != depth:
                found[width, d] = count(**{key: width, "depth": d})

    def far(size):
        """How far a size is from the wanted MACs (3 % is near enough), then from the preset."""
        width, d = size
        from_preset = abs(math.log(width / preset[key])) + (abs(math.log(d / depth)) if isinstance(depth, int) else 0)
        return max(0.03, abs(math.log(found[size] / macs))), from_preset

    width, depth = min(found, key=far)
    return given | {key: width} | ({"depth": depth} if isinstance(depth, int) else {})


def timed_calls(objective, batch, device, args):
    """(forward, training step) of a batch. A backbone is called as model(x, t, y), each sample with a time and a label
    of its own; an objective of another kind by its loss."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    x = torch.randn(batch, *objective.shape, device=device)
    x = x.contiguous(memory_format=layout) if x.ndim == 4 else x
    y = torch.randint(10, (batch,), device=device)
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad])
    half = lambda: torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    if isinstance(objective, objectives.Diffusion):
        t, y = torch.rand(batch, device=device) * 1000, conditions_like(objective.model, y)
        call = lambda: objective.model(x, t, y)
    else:
        noise = objectives.StepNoise(0, 0, batch, device=device)
        call = lambda: objective.loss({"x": x, "y": y, "step": 0, "noise": noise})["loss"]

    def forward():
        with torch.no_grad(), half():
            call()

    def step():
        with half():
            loss = call().float().pow(2).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return forward, step


def conditions_like(model, y):
    """Labels y (B,), or a Text of as many random captions for a model that reads text."""
    if not model.text_width:
        return y
    tokens = torch.randn(len(y), model.text_length, model.text_width, device=y.device)
    return layers.Text(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=y.device))


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


# ---------------------------------------------------------------------------------------------------- models, mixers


def speed_flags(p):
    p.add_argument("models", nargs="*", metavar="MODEL", help="NAME or NAME:option=value,..., see train.py --list")
    p.add_argument("--tokens", type=build.positive, metavar="N",
                   help="instead: time and memory of the token mixers (selective scan, Bi-WKV, linear and softmax "
                   "attention) from 64 to N tokens, as a table and a picture")
    p.add_argument("--width", type=build.positive, default=384, help="of the mixers (default: %(default)s)")
    p.add_argument("--out", default="mixers.png", help="the mixers' picture (default: %(default)s)")
    p.add_argument("--fair", action="store_true", help="bring every model to the first one's MACs, by its width and "
                   "depth, and let each have the batch that suits it best, of 1, 2, 4, ... up to --batch")
    p.add_argument("--channels-last", action="store_true", help="weights and images in this layout")
    p.add_argument("--compile", action="store_true", help="torch.compile every model")
    p.add_argument("--image-size", type=build.positive, default=32, help="default: %(default)s")
    p.add_argument("--batch", type=build.positive, default=16, help="default: %(default)s")
    p.add_argument("--rounds", type=build.positive, default=5, help="timed rounds (default: %(default)s)")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def mixers(args):
    """Time and peak memory of forward and backward of every token mixer from 64 tokens to --tokens, batch 1."""
    device, D = build.device(args.device), args.width
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
    """Parameters, MACs, time of forward and training step, peak memory of models; or of the token mixers."""
    if args.tokens:
        return mixers(args)
    if not args.models:
        raise ValueError("speed: name models, or compare the token mixers by --tokens 16384")
    device, rows, calls = build.device(args.device), {}, {}
    for text in tqdm(args.models, desc="preparing", delay=2, leave=False):
        first = next(iter(rows.values())) if args.fair and rows else None
        text, row, pair = prepared(text, first and first[1], device, args)
        rows[text], calls[text] = row, pair
    times = {text: ([], []) for text in rows}
    for _ in tqdm(range(args.rounds), desc="timing, all models in turn", delay=2, leave=False):
        for text in rows:
            for call, kept in zip(calls[text], times[text]):
                kept.append(seconds(device, call))
    print_speed(rows, times, device, args)


def prepared(text, macs, device, args):
    """One model of `speed`: (its name, (parameters, MACs, batches, peak bytes), its two calls). macs: None, or those
    that it is brought to."""
    name, options = build.choose_model(text)
    shape = 3, args.image_size, args.image_size
    if macs is not None:
        options = matched(name, options, args.image_size, macs)
        text = build.join_name(name, options)
    config = {"network": build.join_name(name, options), "model": name, "image_size": args.image_size, "in_channels": 3,
              "num_classes": 10, "classes": [], "process": "flow", "prediction": "own", "weighting": "own",
              "density": "own", "label_drop": 0.1, "text": "npz"}
    objective = build.build(config, device)
    objective.shape = getattr(objective, "shape", shape)
    counts = build.checked_cost(objective, config)
    if args.channels_last:
        objective.to(memory_format=torch.channels_last)
    if args.compile:
        getattr(objective, "model", objective).compile()
    make = lambda batch: timed_calls(objective, batch, device, args)
    batches = [best_batch(device, lambda b: make(b)[k], args.batch) if args.fair else args.batch for k in (0, 1)]
    calls = [make(batch)[k] for k, batch in enumerate(batches)]
    clean = device.type == "cuda" or not args.fair                      # a CPU's memory is only known the first time
    memory = peak_memory(device, calls[1]) if clean else math.nan
    calls[0]()
    return text, (*counts, batches, memory), calls


def print_speed(rows, times, device, args):
    """The table of `speed`."""
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
    first, *others = rows
    for text in others if args.fair else ():
        table = zip(("forward", "training"), rates[first], rates[text], rows[first][2], rows[text][2])
        print(f"{first} over {text}: " + ", ".join(
            f"{what} {ours / theirs:.2f} times the images/s (batches {a} and {b})"
            for what, ours, theirs, a, b in table) + f", at {rows[first][1] / rows[text][1]:.3f} times the MACs")


# ------------------------------------------------------------------------------------------------------- packed weights


def pack_flags(p):
    p.add_argument("run", type=runs.Run, help="folder of a run with ternary weights")
    p.add_argument("--n", type=build.positive, default=16, help="images to draw (default: %(default)s)")
    p.add_argument("--rounds", type=build.positive, default=3, help="timed rounds (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")


def pack(args):
    """Ternary weights at two bits: a file that sample.py draws from, its size and its speed (2405.14854, table 4)."""
    run = args.run
    ternary = any(isinstance(m, layers.TernaryLinear) for m in run.objective.modules())
    name, options = build.split_name(run.config["network"])
    if options.get("packed") or not ternary:
        raise ValueError(f"{run.path} has no ternary weights to pack: train a terdit, or another model with the option "
                         "ternary=True")
    forms = {form: copy.deepcopy(run.objective) for form in ("ordinary", "as trained", "packed")}
    layers.replace_ternary(forms["ordinary"].model, layers.dense)
    layers.replace_ternary(forms["packed"].model, layers.PackedLinear)
    network = build.join_name(name, options | {"packed": True})
    state, path = forms["packed"].state_dict(), run.folder / "packed.pt"
    checkpoint = {"config": run.config | {"network": network}, "step": 0, "model": state, "ema": state, "optimiser": {}}
    runs.write(path, lambda partial: torch.save(checkpoint, partial))

    conditions, images = run.objective.conditions(args.n), {}
    options = build.drawing_options(run.objective, run.config["draw"], run.device)
    times = {form: [] for form in forms}
    for _ in tqdm(range(args.rounds), desc="drawing, all forms in turn", leave=False):
        for form, objective in forms.items():
            clock = time.perf_counter()
            images[form] = torch.cat(list(build.draw(objective, args.n, 0, args.n, conditions, run.device, **options)))
            times[form].append(time.perf_counter() - clock)
    print(f"{args.n} images, medians of {args.rounds} interleaved rounds")
    print(f"{'weights':14}{'MB':>8}{'seconds':>10}{'difference of images':>22}")
    for form, objective in forms.items():
        size = sum(v.numel() * v.element_size() for v in objective.state_dict().values()) / 1e6
        difference = (images[form] - images["ordinary"]).abs().max().item()
        print(f"{form:14}{size:8.2f}{statistics.median(times[form]):10.2f}{difference:22.1e}")
    print(f"the file: {path}, {path.stat().st_size / 1e6:.2f} MB; python sample.py {path} draws from it")
