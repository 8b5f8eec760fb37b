"""The Triton kernels against the forms of torch that define them. Without a GPU Triton's interpreter runs them (see
conftest.py), on sizes of a few tiles, small ones; `-m gpu` runs real sizes.

    python -m pytest tests/test_kernels.py -s          also prints the errors, and what sm_90 makes of the scan
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

pytest.importorskip("triton", minversion="3.7")

import kernels  # noqa: E402
import layers  # noqa: E402
import scans  # noqa: E402
import speed  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parent.parent
PAIRS, SUMS = (2, 1, 17, 24), (1, 2, 33, 5)          # shapes of linear attention that take either route


@pytest.fixture(autouse=True)
def choose_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "on")
    monkeypatch.setattr(kernels, "interpreted", DEVICE == "cpu")
    monkeypatch.setattr(kernels, "trials", {})
    monkeypatch.setattr(kernels, "seen", {})
    kernels.load()


def draw(*shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
            for shape in shapes]


# ------------------------------------------------------------------------------------------------------------ the cases
# A case is (kernel, plain form, inputs). Both return tensors; inputs that are tensors get gradients.


def selective(L, B, D, S, full=True, dtype=torch.float64):
    u, delta, A, b, C, skip, z, bias, state = draw((B, L, D), (B, L, D), (D, S), (B, L, S), (B, L, S), (D,),
                                                   (B, L, 2 * D), (D,), (B, D, S), dtype=dtype)
    A = (-A.detach().exp()).requires_grad_()
    if not full:
        delta = delta.detach().abs().requires_grad_()
        return kernels.selective_scan, scans.selective_scan_plain, [u, delta, A, b, C]
    half = lambda form: lambda u, delta, A, b, C, skip, z, *others: form(u, delta, A, b, C, skip, z[..., D:], *others)
    return half(kernels.selective_scan), half(scans.selective_scan_plain), [u, delta, A, b, C, skip, z, bias, True,
                                                                            state]


def wkv(T, B, C, w=1.0, k=1.0, dtype=torch.float64):
    decay, first, keys, values = draw((C,), (C,), (B, T, C), (B, T, C), dtype=dtype)
    decay = (decay.detach().abs() * w).requires_grad_()
    keys = (keys.detach() * k).requires_grad_()
    return kernels.bi_wkv, scans.bi_wkv_plain, [decay, first, keys, values]


def attention(B, h, N, d, scale=1.0, dtype=torch.float64):
    heads = [(scale * x.detach()).requires_grad_() for x in draw(*3 * [(B, N, h * d)], dtype=dtype)]
    cut = lambda form: lambda *qkv: form(*(x.unflatten(-1, (h, d)).transpose(1, 2) for x in qkv))
    return cut(kernels.linear_attention), cut(scans.linear_attention_plain), heads


def plain_norm(x, branch, gate, norm, shift, scale):
    r = x if branch is None else layers.gated(x, gate, branch)
    return r, layers.modulate(norm(r), shift, scale)


def norm(B, N, D, branch, rms, dtype=torch.float64):
    x, y, modulation, weight = draw((B, N, D), (B, N, D), (B, 6 * D), (D,), dtype=dtype)

    def call(form):
        def run(x, y, modulation, weight):
            shift, scale, gate, *_ = modulation.chunk(6, 1)
            return form(x, y if branch else None, gate if branch else None, shift, scale, weight if rms else None)
        return run

    fused = lambda *args: kernels.gate_norm_modulate(*args, eps=1e-6, rms=rms)

    def plain(x, y, gate, shift, scale, weight):
        module = lambda r: (nn.functional.rms_norm(r, (D,), weight, 1e-6) if rms else
                            nn.functional.layer_norm(r, (D,), eps=1e-6))
        return plain_norm(x, y, gate, module, shift, scale)

    return call(fused), call(plain), [x, y, modulation, weight]


def rope(B, h, N, d, batch, dtype=torch.float64):
    x, = draw((B, N, h * d), dtype=dtype)
    angle = torch.rand(batch, N, d // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    heads = lambda x: x.unflatten(-1, (h, d)).transpose(1, 2)

    def complex_product(x):
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        pairs = torch.view_as_complex(heads(x).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    return lambda x: kernels.rotate(heads(x), angle.cos(), angle.sin()), complex_product, [x]


# name -> (make(dtype=...), bars of values and gradients in float32). The interpreter's tiles are 4 tokens by 2
# channels (2 by 2 in the scan's backward pass), 16 by 16 in products.
CASES = {
    **{f"selective-{L}": (lambda L=L, B=B, D=D, S=S, **o: selective(L, B, D, S, **o), 2e-6, 1e-4)
       for L, B, D, S in ((1, 1, 3, 2), (2, 2, 3, 3), (5, 2, 3, 2), (33, 1, 1, 2))},
    "selective-bare": (lambda **o: selective(4, 1, 3, 2, full=False, **o), 2e-6, 1e-4),
    **{f"wkv-{T}": (lambda T=T, C=C, **o: wkv(T, 1, C, **o), 2e-6, 1e-5)
       for T, C in ((1, 1), (2, 3), (4, 2), (5, 2), (17, 1))},
    "wkv-growing": (lambda **o: wkv(9, 2, 1, w=-1, **o), 2e-6, 1e-5),
    "attention-pairs": (lambda **o: attention(*PAIRS, **o), 2e-6, 1e-5),
    "attention-sums": (lambda **o: attention(*SUMS, **o), 2e-6, 1e-5),
    **{f"norm-{D}-{branch}-{rms}": (lambda D=D, b=branch, r=rms, **o: norm(2, 3, D, b, r, **o), 2e-6, 1e-5)
       for D in (3, 48) for branch in (True, False) for rms in (True, False)},
    "norm-single": (lambda **o: norm(5, 1, 100, True, True, **o), 2e-6, 1e-5),
    "rope": (lambda **o: rope(2, 3, 5, 6, 2, **o), 2e-6, 1e-5),
    "rope-shared": (lambda **o: rope(2, 1, 9, 16, 1, **o), 2e-6, 1e-5),
}
LOW = ("selective-5", "wkv-5", "attention-pairs", "attention-sums", "norm-48-True-True", "norm-48-True-False", "rope")
EXACT = ("selective-2", "wkv-4", "attention-pairs", "attention-sums", "norm-3-True-True", "norm-3-True-False", "rope")
# Values and gradients. The interpreter cuts float32 off to bfloat16 and float16, where a GPU rounds: twice the error.
BARS = {torch.float64: (1e-8, 1e-8), torch.bfloat16: (4e-3, 1e-2), torch.float16: (6e-4, 3e-3)}


def both(case, dtype, seed=7):
    """[(error of outputs), (error of gradients)] against the plain form of the same rounded numbers in float64."""
    kernel, plain, inputs = case
    exact = [x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    results = []
    for form, given in ((kernel, inputs), (plain, exact)):
        out = form(*given)
        out = list(out) if isinstance(out, tuple) else [out]
        g = [x.to(o.dtype) for x, o in zip(draw(*(o.shape for o in out), dtype=dtype, seed=seed), out)]
        leaves = [x for x in given if isinstance(x, torch.Tensor)]
        grads = torch.autograd.grad(out, leaves, g, allow_unused=True)
        results.append((out, grads))
        assert all(x.isfinite().all() for x in out)
    errors = [[((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(ours, theirs)
               if b is not None] for ours, theirs in zip(*results)]
    return max(errors[0]), max(errors[1])


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    make, *bars = CASES[name]
    low, exact = [torch.bfloat16, torch.float16] * (name in LOW), [torch.float64] * (name in EXACT)
    for dtype in [torch.float32, *low, *exact]:
        values, gradients = both(make(dtype=dtype), dtype)
        one, other = BARS.get(dtype, bars)
        if DEVICE == "cpu" and dtype in (torch.bfloat16, torch.float16):
            one, other = 2 * one, 2 * other
        if DEVICE == "cuda" and dtype == torch.float32 and name.startswith("attention"):
            one, other = 1e-5, 1e-4
        print(f"\n{name:24}{str(dtype):18}{values:10.1e}{gradients:10.1e}", end="")
        assert values < one and gradients < other


@pytest.mark.parametrize("name, case", [
    ("strong decay", lambda: selective(17, 1, 2, 2, dtype=torch.float32)),
    ("weak decay", lambda: selective(17, 1, 2, 2, dtype=torch.float32)),
    ("wkv, decaying", lambda: wkv(17, 1, 2, 3.0, 20.0, torch.float32)),
    ("wkv, growing", lambda: wkv(17, 1, 2, -3.0, 20.0, torch.float32)),
    ("attention, large", lambda: attention(1, 1, 17, 24, 100.0, torch.float32))])
def test_extremes(name, case):
    kernel, plain, inputs = case()
    if name.endswith("decay"):
        times, plus = (50.0, 30.0) if name.startswith("strong") else (1e-3, -8.0)
        inputs[1], inputs[2] = ((inputs[1] + plus).detach().requires_grad_(),
                                (inputs[2] * times).detach().requires_grad_())
    values, gradients = both((kernel, plain, inputs), torch.float32)
    assert values < 1e-5 and gradients < 1e-3


@pytest.mark.parametrize("case", [lambda: selective(3, 1, 2, 2), lambda: wkv(3, 1, 2), lambda: attention(1, 1, 3, 2),
                                  lambda: attention(1, 1, 2, 2), lambda: norm(2, 2, 3, True, True),
                                  lambda: rope(1, 2, 2, 4, 1)])
def test_gradcheck(case):
    kernel, _, inputs = case()
    assert gradcheck(kernel, inputs, fast_mode=True)


def test_a_split_scan_goes_on_and_padding_is_silent():
    """Tokens in tiles beyond L do not move the state, however large the bias (it would step them)."""
    _, _, (u, delta, A, b, C, skip, z, bias, softplus, state) = selective(13, 1, 3, 2)
    z = z[..., :3]
    run = lambda s, h: kernels.selective_scan(u[:, s], delta[:, s], A, b[:, s], C[:, s], skip, z[:, s], bias + 30,
                                              True, h)
    whole, last = run(slice(None), state)
    first, middle = run(slice(0, 5), state)
    second, end = run(slice(5, None), middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)
    _, plain = scans.selective_scan_plain(u, delta, A, b, C, skip, z, bias + 30, True, state)
    torch.testing.assert_close(last, plain, rtol=1e-8, atol=1e-10)
    with torch.no_grad():                                       # two slots for the states, not one a tile
        torch.testing.assert_close(run(slice(None), state)[0], whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights(dtype):
    byte = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(16, 16)
    unpacked = kernels.packed_linear(torch.eye(16, device=DEVICE).repeat(5, 1), byte, torch.ones(1, device=DEVICE))
    assert torch.equal(unpacked[:16].T, layers.unpack_codes(byte).float()), "all bytes, by way of the unpacked weights"
    few = kernels.packed_linear(torch.eye(16, device=DEVICE), byte, torch.ones(1, device=DEVICE))
    assert torch.equal(few.T, layers.unpack_codes(byte).float()), "all bytes, in the product"
    g = torch.Generator().manual_seed(0)
    for rows, K, out in ((5, 48, 40), (33, 20, 36), (70, 48, 40)):
        x = torch.randn(rows, K, generator=g).to(DEVICE, dtype)
        codes, bias = torch.randint(-1, 2, (out, K), generator=g), torch.randn(out, generator=g).to(DEVICE)
        alphas = torch.full((1,), 0.3, device=DEVICE)
        y = kernels.packed_linear(x[:, None], layers.pack_codes(codes).to(DEVICE), alphas, bias)
        exact = nn.functional.linear(x.double(), (alphas * codes.to(DEVICE)).double(), bias.double())
        bar = 2e-6 if dtype == torch.float32 else 8e-3
        assert y.shape == (rows, 1, out) and ((y[:, 0].double() - exact).norm() / exact.norm()) < bar


# ----------------------------------------------------------------------------------------- as operators, and the choice


CALLS = {
    "selective_scan": (lambda u, delta, A, B, C: scans.selective_scan(u, delta, A, B, C)[0],
                       ((1, 3, 2), (1, 3, 2), (2, 2), (1, 3, 2), (1, 3, 2))),
    "bi_wkv": (scans.bi_wkv, ((2,), (2,), (1, 3, 2), (1, 3, 2))),
    "linear_attention": (scans.linear_attention, 3 * ((1, 1, 3, 2),)),
    "gate_norm_modulate": (lambda x, gate, y, shift, scale: layers.gate_norm_modulate(
        x, gate, y, nn.LayerNorm(3, 1e-6, False), shift, scale)[1], ((1, 2, 3), (1, 3), (1, 2, 3), (1, 3), (1, 3))),
    "rotate": (lambda x, angle: layers.rotate(x, angle.detach().cos(), angle.detach().sin()),
               ((1, 1, 2, 4), (1, 2, 2))),
}


def call_of(operation, dtype=torch.float32, device=DEVICE):
    """(the caller that asks for this kernel, its inputs)."""
    call, shapes = CALLS[operation]
    return call, [x.detach().to(device).requires_grad_() for x in draw(*shapes, dtype=dtype)]


@pytest.mark.parametrize("operation", CALLS)
def test_as_operators(operation):
    """No graph break under torch.compile, forward and backward; the same bits in every call; torch's form otherwise."""
    call, inputs = call_of(operation)
    y = call(*inputs)
    assert kernels.table() == [(operation, "triton", "")]
    grads = torch.autograd.grad(y.sum(), inputs, allow_unused=True)
    for _ in range(2):
        again = call(*inputs)
        assert torch.equal(again, y)
        repeated = torch.autograd.grad(again.sum(), inputs, allow_unused=True)
        assert all(a is b or torch.equal(a, b) for a, b in zip(repeated, grads))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, y, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad(compiled.sum(), inputs, allow_unused=True), grads):
        assert a is b or torch.equal(a, b)
    kernels.choose("off")
    torch.testing.assert_close(call(*inputs), y, rtol=1e-5, atol=1e-5)
    kernels.choose("auto")
    call(*inputs)
    assert kernels.table()[0][1] == "triton"
    kernels.choose("on")
    assert call(*(x.to("meta") for x in inputs)).shape == y.shape
    none = call(*(x[:0] if x.ndim > 2 or operation == "gate_norm_modulate" else x for x in inputs))
    assert none.shape == (0, *y.shape[1:]), "an empty batch"


def test_opcheck():
    """PyTorch's own examination of the operators: schema, fake tensors, autograd, dynamic shapes."""
    for operation, arguments in {
            "selective_scan": lambda: (*draw((1, 3, 2), (1, 3, 2), (2, 2), (1, 3, 2), (1, 3, 2), (2,), (1, 3, 2), (2,),
                                             (1, 2, 2), dtype=torch.float32), True, True),
            "bi_wkv": lambda: (*draw((2,), (2,), (1, 3, 2), (1, 3, 2), dtype=torch.float32), True),
            "linear_attention": lambda: (*draw(*3 * [(1, 1, 3, 2)], dtype=torch.float32), 1e-6, True),
            "gate_norm_modulate": lambda: (*draw((1, 2, 3), (1, 2, 3), (1, 3), (1, 3), (1, 3), (3,),
                                                 dtype=torch.float32), 1e-6, True),
            "rotate": lambda: (draw((1, 1, 2, 4), dtype=torch.float32)[0], torch.ones(1, 2, 2, device=DEVICE),
                               torch.zeros(1, 2, 2, device=DEVICE), False)}.items():
        operator = getattr(torch.ops.atlas, operation).default
        torch.library.opcheck(operator, arguments(), test_utils=("test_schema", "test_autograd_registration",
                                                                 "test_faketensor", "test_aot_dispatch_dynamic"))


def test_what_kernels_refuse():
    call, inputs = call_of("bi_wkv")
    y, = torch.autograd.grad(call(*inputs).sum(), inputs[2], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives: use --kernels off"):
        y.sum().backward()
    with pytest.raises(NotImplementedError, match="no vmap: use --kernels off"):
        torch.vmap(call, (None, None, 0, 0))(*(x.detach().expand(2, *x.shape) if x.ndim > 2 else x.detach()
                                               for x in inputs))
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives: use --kernels off"):
        torch.func.jvp(call, tuple(inputs), tuple(inputs))
    wide = draw((1, 3, 2), (1, 3, 2), (2, 65), (1, 3, 65), (1, 3, 65), dtype=torch.float32)
    with pytest.raises(ValueError, match="selective_scan: state size 65 is above 64; use --kernels auto"):
        scans.selective_scan(*wide)
    with pytest.raises(ValueError, match="bi_wkv: the tensors are float64, and the kernels take float32, bfloat16"):
        call(*call_of("bi_wkv", torch.float64)[1])
    kernels.choose("auto")
    if DEVICE == "cuda":
        scans.selective_scan(*wide)
        assert kernels.table()[0] == ("selective_scan", "torch", "state size 65 is above 64")
    with pytest.raises(ValueError, match="--kernels maybe: choose off, auto, on"):
        kernels.choose("maybe")


def test_the_choice(monkeypatch):
    """auto leaves a CPU to torch, even where the interpreter could; on says why it cannot; Triton's failure is told."""
    call, inputs = call_of("bi_wkv", device="cpu")
    called = []
    monkeypatch.setattr(kernels, "bi_wkv", lambda *args: called.append(args))
    for mode in ("off", "auto"):
        kernels.choose(mode)
        assert call(*inputs) is not None and not called
    assert kernels.report("cpu") == "kernels: torch (a cpu has none)"
    kernels.choose("off")
    assert kernels.report("cuda") == "kernels: torch (--kernels off)"
    kernels.choose("on")
    monkeypatch.setattr(kernels, "interpreted", False)
    with pytest.raises(ValueError, match="bi_wkv: the tensors are on the cpu, and the kernels need a GPU; use --kern"):
        call(*inputs)
    with pytest.raises(ValueError, match="--kernels on: a cpu has none; use --kernels auto"):
        kernels.report("cpu")
    monkeypatch.setattr(kernels, "interpreted", True)

    def broken():
        raise RuntimeError("no driver\nand more")

    monkeypatch.setattr(kernels, "load", broken)
    monkeypatch.setattr(kernels, "trials", {})
    with pytest.raises(ValueError, match=r"bi_wkv: Triton does not work here \(RuntimeError: no driver\)"):
        call(*inputs)
    monkeypatch.setattr(kernels, "mode", "auto")
    monkeypatch.setattr(kernels, "trials", {})
    with pytest.warns(UserWarning, match=r"no driver\); torch's own forms are used"):
        assert kernels.trial(torch.device("cpu")).startswith("Triton does not work here")
    assert kernels.trial(torch.device("cpu")), "told once"


def test_the_benchmark(monkeypatch):
    """`evaluate.py speed --kernels` at tiny sizes: agreement, shares of bounds, who lost; the tables that it tunes."""
    machine = speed.Machine(1e9, 1e9, 1e9, 1e9)
    for operation, size in (("rotate", (1, 2, 3, 4)), ("gate_norm_modulate", (1, 2, 4)), ("packed_linear", (3, 8, 8))):
        times, difference, first, work = speed.compare(operation, size, torch.float32, torch.device(DEVICE), 1)
        assert difference < 1e-5 and first > 0 and ("both" in times) == bool(work.backward)
        times["forward"] |= {"fast": 1.0, "triton": 2.0}
        if work.backward:
            times["both"] |= {"fast": 2.0, "triton": 1.0}
        lost = speed.print_comparison(operation, size, (times, difference, first, work), machine)
        assert len(lost) == 1 and lost[0].endswith("forward")
    for operation, tables in speed.CANDIDATES.items():
        module = sys.modules[f"kernels.{kernels.OPERATIONS[operation][0]}"]
        for table, candidates in tables.items():
            assert getattr(module, table)["default"] in candidates and len(candidates) <= 4
    assert set(speed.CANDIDATES) == set(speed.BENCHMARKS) == set(kernels.OPERATIONS)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    used = speed.utilisation(118.64e9, 500, gpu, world=2)
    assert used["tflops"] == pytest.approx(355.9, abs=0.1) and used["mfu"] == pytest.approx(0.18, abs=1e-3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    assert speed.utilisation(1e9, 500, gpu) == {} == speed.utilisation(1e9, 500, torch.device("cpu"))


def test_sources():
    """No atomics, whose order and so whose bits change from run to run; nothing from the floors above; and the files
    are the operations."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert {f.stem for f in files} == {"__init__", "launch"} | {file for file, _ in kernels.OPERATIONS.values()}
    for file in files:
        source = file.read_text()
        assert "atomic" not in source, file
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not (ROOT / f"{name.split('.')[0]}.py").exists(), f"{file}: import of {name}"


def for_sm_90(*argv):
    """What tests/sm_90.py says, which needs Triton's compiler and so a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, ROOT / "tests" / "sm_90.py", *argv], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for name, found in result.items():
        print(f"\n{name:48}" + "  ".join(f"{key} {value}" for key, value in found.items()), end="")
    return result


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_90():
    """As its caller launches it, at real sizes: within a multiprocessor's 227 KB, and in bfloat16 without spills, but
    for the scan's backward pass."""
    result = for_sm_90("--all")
    files = {name.split(".")[0] for name in result}
    assert files == {file for file, _ in kernels.OPERATIONS.values()} and len(result) >= 24
    for name, found in result.items():
        spills = "float32" in name.split(", ")[1] or name.startswith("selective_scan.backward")
        assert found["shared"] <= 227 * 1024 and found["stack"] <= (256 if spills else 0), name


def test_the_scans_compile_for_sm_90():
    """Without a GPU: no exchange between lanes and no spills in the forward scan and in Bi-WKV, the slots that a token
    costs."""
    for name, found in for_sm_90().items():
        if name.startswith("selective_scan forward"):
            assert found["shuffles"] == 0 and found["stack"] == 0
            assert found["slots"] < 250, "issue slots of a token for 32 channels"
        if name.startswith("selective_scan backward"):
            assert found["slots"] < 800
        if name.startswith("bi_wkv"):
            assert found["shuffles"] == 0 and found["stack"] == 0
            assert found["slots"] < (200 if name.endswith("forward") else 350)


# ---------------------------------------------------------------------------------------------------- on a GPU, at size


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [
    lambda **o: selective(255, 2, 384, 16, **o), lambda **o: selective(257, 1, 96, 16, **o),
    lambda **o: selective(4096, 1, 64, 16, **o), lambda **o: wkv(255, 2, 384, **o), lambda **o: wkv(257, 1, 96, **o),
    lambda **o: wkv(1000, 1, 64, w=-0.02, **o), lambda **o: attention(2, 4, 256, 288, **o),
    lambda **o: attention(2, 2, 257, 192, **o), lambda **o: attention(1, 3, 4096, 256, **o),
    lambda **o: norm(3, 257, 1152, True, False, **o), lambda **o: norm(2, 64, 4096, True, True, **o),
    lambda **o: norm(1000, 1, 384, True, False, **o), lambda **o: rope(3, 16, 257, 72, 1, **o)])
def test_real_sizes(make, dtype):
    values, gradients = both(make(dtype=dtype), dtype)
    one, other = BARS.get(dtype, (1e-5, 1e-4))
    print(f"\n{values:10.1e}{gradients:10.1e}", end="")
    assert values < one and gradients < other


@pytest.mark.gpu
def test_many_sequences():
    """More sequences than the second axis of a grid holds."""
    for make in (lambda: selective(3, 70_000, 2, 2, dtype=torch.float32),
                 lambda: wkv(3, 70_000, 2, dtype=torch.float32),
                 lambda: attention(70_000, 1, 3, 16, dtype=torch.float32),
                 lambda: norm(70_000, 2, 16, True, False, dtype=torch.float32),
                 lambda: rope(70_000, 1, 2, 4, 1, dtype=torch.float32)):
        values, gradients = both(make(), torch.float32)
        assert values < 1e-5 and gradients < 1e-3


@pytest.mark.gpu
def test_golden_cases():
    import golden
    calls = {"selective-scan": lambda i, c: kernels.selective_scan(
                 i["u"], i["delta"], i["A"], i["B"], i["C"], i.get("D"), i.get("z"), i.get("delta_bias"),
                 c.config["delta_softplus"])[0],
             "bi-wkv": lambda i, c: kernels.bi_wkv(i["w"], i["u"], i["k"], i["v"]),
             "lit-op": lambda i, c: kernels.linear_attention(i["q"], i["k"], i["v"])}
    for kind, call in calls.items():
        for file in sorted((ROOT / "tests" / "golden").glob(f"{kind}*.npz")):
            case = golden.load(file)
            inputs = {k: v.cuda().requires_grad_(k != "gy") for k, v in case.inputs.items()}
            y = call(inputs, case)
            y.backward(inputs["gy"])
            extreme = "extreme" in file.stem
            for name, x in {"y": y, **{f"grad_{k}": v.grad for k, v in inputs.items() if k != "gy"}}.items():
                exact = case.outputs[name].double()
                error = ((x.detach().cpu().double() - exact).norm() / exact.norm()).item()
                assert error < (1e-3 if extreme else 1e-4 if kind == "lit-op" else 1e-5), (file.stem, name)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [lambda: selective(257, 4, 384, 16, dtype=torch.bfloat16),
                                  lambda: wkv(257, 4, 384, dtype=torch.bfloat16),
                                  lambda: attention(4, 2, 256, 192, dtype=torch.bfloat16),
                                  lambda: attention(4, 2, 1024, 192, dtype=torch.bfloat16),
                                  lambda: norm(4, 256, 1152, True, True, dtype=torch.bfloat16)])
def test_twenty_runs_have_the_same_bits(make):
    kernel, _, inputs = make()
    first = None
    for _ in range(20):
        out = kernel(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        leaves = [x for x in inputs if isinstance(x, torch.Tensor)]
        bits = [out, *torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True)]
        first = first or bits
        assert all(a is b or torch.equal(a, b) for a, b in zip(bits, first))


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["bi_wkv", "selective_scan", "linear_attention"])
def test_nothing_is_hidden(operation):
    """A number that is not one shows in the output (the interpreter's maximum would lose it)."""
    call, inputs = call_of(operation)
    inputs[-1].data[0, ..., 0] = torch.nan
    assert not call(*inputs).isfinite().all()
