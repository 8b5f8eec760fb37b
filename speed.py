"""Cost and timing: parameters, multiply-accumulates, seconds, memory; of models, of token mixers, of Triton kernels, of
packed weights; and what share of a GPU's peak a training reaches.

Timings are medians of interleaved rounds in one process, so that whatever else the machine does hits all alike.
"""

import contextlib
import copy
import ctypes
import importlib
import math
import re
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import build
import figures
import kernels
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
    x = torch.randn(batch, *getattr(objective, "image_shape", objective.shape), device=device)
    if codes := getattr(objective, "codes_read", None):                 # a generator of a tokenizer's codes
        x = torch.randint(codes, (batch, *objective.grid), device=device)
    x = x.contiguous(memory_format=layout) if x.ndim == 4 else x
    y = torch.randint(getattr(objective, "num_classes", 0) or 10, (batch,), device=device)
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
    p.add_argument("models", nargs="*", metavar="MODEL", help="NAME or NAME:option=value,..., see train.py "
                   "--list; or a run, or a published file")
    p.add_argument("--tokens", type=build.positive, metavar="N",
                   help="instead: time and memory of the token mixers (selective scan, Bi-WKV, linear and softmax "
                   "attention) from 64 to N tokens, as a table and a picture")
    p.add_argument("--kernels", nargs="*", metavar="NAME", help="instead: the Triton kernels (those named: "
                   + ", ".join(BENCHMARKS) + ") beside torch's forms, with their share of the GPU's bounds; or, with "
                   "models, off, auto or on: whether these use kernels")
    p.add_argument("--tune", action="store_true", help="of --kernels: time block sizes, print the fastest")
    p.add_argument("--profile", action="store_true", help="instead: what the time of each model's training step is "
                   "spent on")
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
    if args.kernels is not None and not (len(args.kernels) == 1 and args.kernels[0] in kernels.MODES):
        return kernel_speed(args)
    kernels.choose(args.kernels and args.kernels[0])
    if args.tokens:
        return mixers(args)
    if not args.models:
        raise ValueError("speed: name models, or compare the token mixers by --tokens 16384")
    device, rows, calls = build.device(args.device), {}, {}
    print(kernels.report(device))
    if args.profile:
        for text in args.models:
            profile(text, device, args)
        return
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
    if build.is_published(text) or (Path(text).expanduser() / "ckpt.pt").exists():
        if macs is not None:
            raise ValueError(f"speed --fair brings models to the same MACs, and {text} has its own: name it first")
        opened = build.open_run(text, device)
        objective, config = opened.objective, opened.config
    else:
        name, options = build.choose_model(text)
        if macs is not None:
            options = matched(name, options, args.image_size, macs)
            text = build.join_name(name, options)
        config = {"network": build.join_name(name, options), "model": name, "image_size": args.image_size,
                  "in_channels": 3, "num_classes": 10, "classes": [], "process": "flow", "prediction": "own",
                  "weighting": "own", "density": "own", "label_drop": 0.1, "text": "npz", "codes": None}
        wanted = build.inspect.signature(build.kind_of(name)[name]).parameters
        if "codes" in wanted and "in_channels" not in wanted:           # it takes codes alone: as many as usual
            config["codes"] = 1024
        objective = build.build(config, device)
        objective.shape = getattr(objective, "shape", (3, args.image_size, args.image_size))
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


# ---------------------------------------------------------------------------------------------------------- utilisation

# Multiplications and additions a second in bfloat16, from the makers' data sheets (dense, at the largest power).
PEAKS = (("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("A100", 312e12), ("RTX 4090", 165e12))


def peak(device):
    """Operations a second of a GPU whose data sheet is known, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAKS if part in name), None)


def utilisation(macs, images_per_s, device, world=1):
    """{"tflops": operations a second of a training, in 10^12, "mfu": their share of the peak of `world` such devices},
    or {} where the peak is not known. A training step is 6 operations a multiply-accumulate of the forward pass, 2 in
    it and 4 back; what is computed again to save memory is not counted. PaLM, 2204.02311, appendix B."""
    best = peak(device)
    if best is None:
        return {}
    operations = 6 * macs * images_per_s
    return {"tflops": operations / 1e12, "mfu": operations / best / world}


def bf16_is_slow(device):
    """Whether this device has no units for bfloat16 and imitates them."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not any(
        has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


# -------------------------------------------------------------------------------------------------------------- profile

# Where a step's time goes: the first row whose expression finds a kernel's (on a CPU: an operation's) name has it.
PROFILE = {
    "attention": r"attention|flash|fmha|sdpa|softmax",
    "matrix products": r"gemm|mm|nvjet|cutlass|wgmma|xmma|conv|linear|dot",
    "gate, norm, modulation": r"norm|addcmul|modulate",
    "AdamW, averages, clipping": r"adam|multi_tensor|foreach|lerp|linalg_vector",
    "copies, casts, layout": r"copy|memcpy|memset|cat|fill|zero|index|gather|scatter",
    "activations, elementwise": r"gelu|silu|sigmoid|relu|elementwise|vectorized|triton_poi|add|mul|div|pow|sub|neg",
    "sums": r"reduce|sum|mean|triton_red|triton_per",
    "other": r"",
}


def profile(text, device, args, steps=5):
    """Bins the time of some training steps of a model, after as many untimed ones, into the rows of `PROFILE`."""
    text, (parameters, macs, batches, _), (_, step) = prepared(text, None, device, args)
    for _ in range(steps):
        step()
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    clock = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as record:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    wall = (time.perf_counter() - clock) / steps * 1e3
    times = dict.fromkeys(PROFILE, 0.0)
    for event in record.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device == cuda:
            took = event.self_device_time_total if cuda else event.self_cpu_time_total
            row = next(row for row, names in PROFILE.items() if re.search(names, event.key, re.IGNORECASE))
            times[row] += took / steps / 1e3
    total = sum(times.values())
    print(f"{text}: {wall:.1f} ms a step of batch {batches[1]} while profiled, {total:.1f} ms of it in kernels")
    for row, took in times.items():
        print(f"  {row:28}{took:10.2f} ms{took / total:8.1%}")
    if used := utilisation(macs, batches[1] / wall * 1e3, device):
        print(f"  {used['tflops']:.0f} TFLOP/s, {used['mfu']:.1%} of the peak")


# -------------------------------------------------------------------------------------------------------------- kernels


class Work(NamedTuple):
    """An operation at one size: inputs, all of which get gradients, the forms that compute it, and its costs forward
    and backward, {"bytes", "exp", "flop", "dot"}: least traffic, exponentials, operations in float32, in products."""
    inputs: list
    forms: dict
    forward: dict
    backward: dict


def made(device, dtype, *shapes):
    """Random tensors that get gradients."""
    return [torch.randn(*shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def scan_work(size, dtype, device):
    B, L, D, S = size
    u, delta, z, b, c = made(device, dtype, *3 * [(B, L, D)], *2 * [(B, L, S)])
    A, skip, bias = made(device, torch.float32, (D, S), (D,), (D,))
    call = lambda form: lambda u, delta, z, b, c, A, skip, bias: form(u, delta, -A.exp(), b, c, skip, z, bias, True)[0]
    forms = {"plain": call(scans.selective_scan_plain), "fast": call(scans.selective_scan),
             "triton": call(scans.selective_scan)}
    if (official := mamba_ssm()) is not None:
        forms["mamba-ssm"] = call(official)
    n, s = B * L * D, u.element_size()
    return Work([u, delta, z, b, c, A, skip, bias], forms,
                {"bytes": s * (4 * n + 2 * B * L * S), "exp": n * (S + 2), "flop": n * (6 * S + 12)},
                {"bytes": s * (8 * n + 4 * B * L * S), "exp": n * (S + 3), "flop": n * (17 * S + 20)})


def mamba_ssm():
    """The scan of that package, where it is installed, with our signature."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    theirs = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def scan(u, delta, A, B, C, D, z, bias, softplus):
        u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
        return theirs(u, delta, A, B, C, D, z, bias, softplus).transpose(1, 2), None

    return scan


def wkv_work(size, dtype, device):
    B, T, C = size
    k, v = made(device, dtype, *2 * [(B, T, C)])
    w, u = made(device, torch.float32, (C,), (C,))
    call = lambda form: lambda w, u, k, v: form(w / T, u / T, k, v)
    forms = {"fast": call(scans.bi_wkv), "triton": call(scans.bi_wkv)}
    if B * T * T * C < 2**28:
        forms = {"plain": call(scans.bi_wkv_plain), **forms}
    n, s = B * T * C, k.element_size()
    return Work([w, u, k, v], forms, {"bytes": 3 * s * n, "exp": 7 * n, "flop": 30 * n},
                {"bytes": 6 * s * n, "exp": 14 * n, "flop": 80 * n})


def attention_work(size, dtype, device):
    B, h, N, d = size
    inputs = made(device, dtype, *3 * [(B, h, N, d)])
    n, s = B * h * N * d, inputs[0].element_size()
    products = 4 * n * min(N, d)
    return Work(inputs, {"plain": scans.linear_attention_plain, "fast": scans.linear_attention,
                         "triton": scans.linear_attention},
                {"bytes": 4 * s * n, "dot": products}, {"bytes": 8 * s * n, "dot": 2.5 * products})


def norm_work(size, dtype, device):
    B, N, D = size
    branch, modulation = made(device, dtype, (B, N, D), (B, 6 * D))
    x, = made(device, torch.float32, (B, N, D))
    norm = layers.plain_norm(D)

    def call(x, branch, modulation):
        shift, scale, gate, *_ = modulation.chunk(6, 1)
        r, y = layers.gate_norm_modulate(x, gate, branch, norm, shift, scale)
        return torch.cat([r.flatten()[:1].to(y), y.flatten()])                  # both have gradients

    n, s = B * N * D, branch.element_size()
    return Work([x, branch, modulation], {"fast": call, "triton": call}, {"bytes": (8 + 2 * s) * n},
                {"bytes": (12 + 3 * s) * n})


def rotate_work(size, dtype, device):
    B, h, N, d = size
    x, = made(device, dtype, (B, N, h * d))
    angle = torch.rand(1, N, d // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    call = lambda x: layers.rotate(x.unflatten(-1, (h, d)).transpose(1, 2), cos, sin)
    moved = {"bytes": 2 * x.element_size() * x.numel()}
    return Work([x], {"fast": call, "triton": call}, moved, moved)


def packed_work(size, dtype, device):
    M, K, out = size
    linear = torch.nn.Linear(K, out, device=device)
    packed = layers.PackedLinear(layers.TernaryLinear(linear)).requires_grad_(False)
    x = torch.randn(M, K, device=device).to(dtype)

    def call(x):
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return packed(x)

    s = x.element_size()
    return Work([x], {"fast": call, "triton": call}, {"bytes": K * out / 4 + s * M * (K + out), "dot": 2 * M * K * out},
                {})


FORMS = ("plain", "fast", "compile", "mamba-ssm", "triton")

# operation -> (its work, three sizes)
BENCHMARKS = {
    "selective_scan": (scan_work, ((32, 256, 1536, 16), (4, 1024, 768, 16), (1, 4096, 1536, 16))),
    "bi_wkv": (wkv_work, ((32, 256, 1024), (8, 256, 384), (1, 4096, 1024))),
    "linear_attention": (attention_work, ((32, 4, 256, 288), (32, 2, 256, 192), (8, 4, 1024, 288))),
    "gate_norm_modulate": (norm_work, ((256, 256, 1152), (32, 256, 384), (4, 1024, 4096))),
    "rotate": (rotate_work, ((32, 16, 256, 72), (8, 24, 1024, 96), (1, 32, 4096, 128))),
    "packed_linear": (packed_work, ((16, 3072, 3072), (64, 3072, 8192), (1600, 3072, 3072))),
}

# operation -> table of its file -> what may stand in it, at most four candidates.
CANDIDATES = {
    "selective_scan": {"FORWARD": ((16, 32, 1), (32, 32, 1), (16, 64, 1), (16, 64, 2)),
                       "BACKWARD": ((8, 64, 1), (8, 32, 1), (4, 64, 1), (4, 32, 1))},
    "bi_wkv": {"FORWARD": ((8, 32, 1), (16, 32, 1), (4, 32, 1), (8, 64, 2)),
               "BACKWARD": ((8, 32, 1), (4, 32, 1), (8, 64, 2), (4, 64, 2))},
    "linear_attention": {"PAIRS": ((64, 64, 32, 8), (64, 64, 32, 4), (32, 64, 32, 4), (128, 64, 32, 8)),
                         "SUMS": ((64, 64, 32, 4), (64, 64, 32, 8), (64, 128, 32, 4), (32, 64, 32, 4))},
    "gate_norm_modulate": {"ROWS": (16, 8, 32, 64)},
    "rotate": {"TOKENS": ((16, 4), (8, 4), (32, 4), (16, 8))},
    "packed_linear": {"UNPACK": ((16, 256, 4), (8, 512, 4), (16, 256, 8), (32, 128, 4)),
                      "PRODUCT": ((16, 32, 128, 4), (16, 64, 64, 4), (16, 32, 64, 2), (32, 32, 128, 4))},
}


class Machine(NamedTuple):
    """What a GPU does in a second."""
    bytes: float
    exp: float
    flop: float
    dot: float

    @classmethod
    def of(cls, device):
        """Memory and products as measured here and now, the rest from the number of its multiprocessors and its clock:
        16 exponentials and 128 multiply-adds each a clock."""
        properties = torch.cuda.get_device_properties(device)
        clocks = properties.multi_processor_count * getattr(properties, "clock_rate", 1.83e6) * 1e3
        a, b = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in range(2))
        x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        times = timed({"copy": lambda: b.copy_(a), "product": lambda: x @ x}, 20, device)
        return cls(2 * 2**30 / times["copy"], 16 * clocks, 256 * clocks, 2 * 8192**3 / times["product"])


def timed(calls, rounds, device):
    """{name: median seconds} of interleaved rounds, a GPU's by its own clock and with its cache flushed."""
    times, flush = {name: [] for name in calls}, None
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)
    for round in range(rounds + 2):                                     # two to warm up
        for name, call in calls.items():
            if flush is None:
                took = seconds(device, call)
            else:
                flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                took = start.elapsed_time(end) / 1e3
            times[name] += [took] if round > 1 else []
    return {name: statistics.median(took) for name, took in times.items()}


def calls_of(work):
    """Two dicts, {form: call forward}, {form: call forward and backward}. The form is chosen before each call: fast and
    triton are the same line of the model's code."""
    def chosen(name, backward):
        form = work.forms[name]

        def call():
            kernels.choose("on" if name == "triton" else "off")
            with contextlib.nullcontext() if backward else torch.no_grad():
                y = form(*work.inputs)
            if backward:
                torch.autograd.grad(y, work.inputs, torch.ones_like(y), allow_unused=True)
            return y

        return call

    return [{name: chosen(name, backward) for name in work.forms} for backward in (False, True)]


def compare(operation, size, dtype, device, rounds):
    """One operation at one size: {"forward" and, if it has one, "both": {form: seconds}}, the largest difference of
    fast and triton over the largest number, first-call seconds of triton, and the work."""
    work = BENCHMARKS[operation][0](size, dtype, device)
    if device.type == "cuda" and not (operation in ("selective_scan", "bi_wkv") and size[1] > 256):
        work.forms["compile"] = torch.compile(work.forms["fast"], dynamic=False)   # which unrolls a scan: minutes
    forward, both = calls_of(work)
    clock = time.perf_counter()
    y = forward["triton"]()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - clock
    exact = forward["fast"]()
    difference = ((y - exact).abs().max() / exact.abs().max()).item()
    times = {"forward": timed(forward, rounds, device)}
    if work.backward:
        times["both"] = timed(both, rounds, device)
    return times, difference, first, work


def kernel_speed(args):
    """Every kernel beside torch's forms: times, share of the GPU's bounds, differences. Ends with exit code 1 where one
    is slower than torch's fast form."""
    device = build.device(args.device)
    if device.type != "cuda":
        raise ValueError(f"speed --kernels: the kernels run on a GPU, and this device is a {device.type}")
    names = args.kernels or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"speed --kernels: unknown operation {name!r}: choose from {', '.join(BENCHMARKS)}")
    kernels.choose("on")
    print(kernels.report(device))
    if args.tune:
        return [tune(name, device, args) for name in names]
    machine, mode, lost = Machine.of(device), kernels.mode, []
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    print(f"{torch.cuda.get_device_name(device)}, {args.precision}: measured {machine.bytes / 1e12:.2f} TB/s, "
          f"{machine.dot / 1e12:.0f} TFLOP/s in bf16; reckoned {machine.exp / 1e12:.1f}e12 exponentials/s, "
          f"{machine.flop / 1e12:.0f} TFLOP/s in float32\nmedians of interleaved rounds in ms, shares of these bounds")
    print(f"{'operation, size':44}{'':9}" + "".join(f"{form:>11}" for form in FORMS)
          + f"{'bytes':>8}{'exp':>8}{'flop':>8}{'dot':>8}{'first s':>9}{'difference':>12}")
    try:
        for name in names:
            for size in tqdm(BENCHMARKS[name][1], desc=name, delay=2, leave=False):
                lost += print_comparison(name, size, compare(name, size, dtype, device, max(20, args.rounds)), machine)
    finally:
        kernels.choose(mode)
    if lost:
        print("slower than torch's fast form: " + ", ".join(lost))
        raise SystemExit(1)


def print_comparison(name, size, result, machine):
    """The lines of a comparison; returns the directions in which triton lost. Shares: the least time that the GPU's
    memory, exponentials, float32 units or products allow, over the time it took; the largest of them binds (*)."""
    times, difference, first, work = result
    lost, costs = [], {"forward": work.forward, "both": {
        key: work.forward.get(key, 0) + work.backward.get(key, 0) for key in Machine._fields}}
    for direction, took in times.items():
        shares = {key: costs[direction].get(key, 0) / getattr(machine, key) / took["triton"] for key in Machine._fields}
        best = max(shares, key=shares.get)
        forms = "".join(f"{took[form] * 1e3:11.3f}" if form in took else f"{'':11}"
                        for form in FORMS)
        marks = "".join(f"{share:7.0%}{'*' if key == best else ' '}" for key, share in shares.items())
        label = f"{name} {'x'.join(map(str, size))}"
        print(f"{label:44}{direction:9}{forms}{marks}{first:9.1f}{difference:12.1e}")
        if took["triton"] > took["fast"]:
            lost.append(f"{label} {direction}")
    return lost


def tune(name, device, args):
    """Times the candidates of an operation's block sizes at its first size and prints the lines to paste into its
    file's tables."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    module = importlib.import_module(f"kernels.{kernels.OPERATIONS[name][0]}")
    make, (size, *_) = BENCHMARKS[name]
    width = size[3] if name in ("linear_attention", "rotate") else size[1] if name == "packed_linear" else size[2]
    key = torch.cuda.get_device_capability(device), 1 << (width - 1).bit_length(), dtype
    for table, candidates in CANDIDATES[name].items():
        entries = getattr(module, table)
        before, times = entries.pop(key, None), {}
        for candidate in candidates:
            entries[key] = candidate
            calls = calls_of(make(size, dtype, device))[bool(make(size, dtype, device).backward)]
            with contextlib.suppress(Exception):                        # too much shared memory, for one
                times[candidate] = timed({"triton": calls["triton"]}, max(20, args.rounds), device)["triton"]
        del entries[key]
        best = min(times, key=times.get)
        entries[key] = before or best
        print(f"kernels/{kernels.OPERATIONS[name][0]}.py, {table}: {key}: {best},   # "
              + ", ".join(f"{c} {t * 1e3:.3f} ms" for c, t in times.items()))


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
