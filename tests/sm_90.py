"""What Triton makes of the kernels for sm_90 (H100, H200), without a GPU, as JSON. Run by test_kernels.py.

    python tests/sm_90.py          the scans: registers, stack (spills), shuffles, and the instructions that one token
                                   costs a warp of 32 channels
    python tests/sm_90.py --all    every kernel with the arguments that its caller launches it with, forward and
                                   backward, at real sizes, in bfloat16 and in float32
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parent.parent))
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
STATES = 16


def compiled(kernel, sizes, constants, warps, half):
    """The machine code of a kernel: whole numbers for its sizes, bfloat16 for `half`, float32 for the other tensors."""
    kinds = dict.fromkeys(constants, "constexpr") | dict.fromkeys(sizes, "i32") | dict.fromkeys(half, "*bf16")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["cubin"]


def read(cubin):
    """(registers, stack, [instruction, ...] with addresses)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = lambda flag: subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True,
                                           check=True).stdout
        usage, code = tool("-res-usage"), tool("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return *map(int, found.groups()), [(int(a, 16), t) for a, t in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]


def loops(code):
    """[(instructions, shuffles)] of every loop, the innermost first: from where a branch goes back to, to it."""
    found = []
    for end, text in code:
        target = re.search(r"BRA(?:\.\w+)*\s.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < end:
            body = [t for a, t in code if int(target[1], 16) <= a <= end]
            found.append((len(body), sum("SHFL" in t for t in body)))
    return sorted(found)


def scan(name, table):
    """Slots of a token and 32 channels: the inner loop, over states, S times, and the rest of a tile."""
    module = importlib.import_module("kernels.selective_scan")
    tokens, channels, warps = table["default"]
    constants = {"SOFTPLUS": True, "S": STATES, "BT": tokens, "BD": channels, "SUM": tl.float32}
    if name == "forward_kernel":
        constants["KEEP"] = module.BACKWARD["default"][0]
    half = {"u", "delta", "z", "y", "g", "gu", "gdelta", "gz"}
    registers, stack, code = read(compiled(getattr(module, name), [*module.STRIDES, "blocks", "slots"],
                                             constants, warps, half))
    (inner, shuffles), (tile, _) = loops(code)
    slots = (inner * STATES + tile - inner) * warps / tokens / (channels / 32)
    return {"registers": registers, "stack": stack, "shuffles": shuffles, "slots": round(slots)}


def wkv(name, table):
    """Slots of a token and 32 channels: both passes."""
    module = importlib.import_module("kernels.bi_wkv")
    tokens, channels, warps = table["default"]
    constants = {"BT": tokens, "BC": channels, "SUM": tl.float32}
    if name == "forward_kernel":
        constants["SAVE"] = True
    half = {"k", "v", "g", "gk", "gv"} | ({"y"} if name == "forward_kernel" else set())
    registers, stack, code = read(compiled(getattr(module, name), [*module.STRIDES, "blocks"], constants, warps, half))
    passes = loops(code)
    return {"registers": registers, "stack": stack, "shuffles": sum(s for _, s in passes),
            "slots": round(sum(n for n, _ in passes) * warps / tokens / (channels / 32))}


POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}


def signature_of(kernel, given):
    """({argument: kind}, {place: constant}, {place: attributes}) of a launch, as Triton's own launcher finds them."""
    kinds, constants, aligned = {}, {}, {}
    for k, argument in enumerate(kernel.params):
        value, fixed = given[argument.name], argument.do_not_specialize
        if argument.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
            kinds[argument.name], constants[k,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kinds[argument.name] = POINTERS[value.dtype]
        else:
            kinds[argument.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (kinds[argument.name] == "i32" and value % 16 == 0 and not fixed):
            aligned[k,] = [["tt.divisibility", 16]]
    return kinds, constants, aligned


def compile_launches(found):
    """From here on a launch compiles its kernel for sm_90 and computes nothing; found[name] are its registers, stack
    and shared memory, the largest of several."""
    def launch(kernel, *args, grid, warmup, num_warps, enable_fp_fusion, **more):
        kinds, constants, aligned = signature_of(kernel, dict(zip(kernel.arg_names, args)) | more)
        source = triton.compiler.ASTSource(kernel, kinds, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        registers, stack, _ = read(made.asm["cubin"])
        name = f"{kernel.fn.__module__.removeprefix('kernels.')}.{kernel.fn.__name__}"
        most = found.setdefault(name, {"registers": 0, "stack": 0, "shared": 0})
        for key, value in (("registers", registers), ("stack", stack), ("shared", made.metadata.shared)):
            most[key] = max(most[key], value)

    triton.runtime.jit.JITFunction.run = launch
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


def every_launch(dtype):
    """Calls every kernel forward and backward."""
    import kernels
    kernels.load()
    make = lambda *shape, dtype=dtype: torch.randn(*shape).to(dtype).requires_grad_()
    single = lambda *shape: make(*shape, dtype=torch.float32)
    u, delta, z = make(2, 64, 384), make(2, 64, 384), make(2, 64, 384)
    outputs = [kernels.selective_scan(u, delta, single(384, 16), make(2, 64, 16), make(2, 64, 16), single(384), z,
                                      single(384), True)[0],
               kernels.bi_wkv(single(384), single(384), make(2, 64, 384), make(2, 64, 384)),
               kernels.linear_attention(*(make(2, 2, 256, 288) for _ in range(3))),
               kernels.linear_attention(*(make(2, 2, 1024, 192) for _ in range(3)))]
    for rms, D in ((False, 1152), (True, 1152), (False, 4096)):
        shift, scale, gate, *_ = make(2, 6 * D).chunk(6, 1)
        outputs += kernels.gate_norm_modulate(single(2, 64, D), make(2, 64, D), gate, shift, scale,
                                              single(D) if rms else None, eps=1e-6, rms=rms)
    angle = torch.rand(1, 64, 36)
    heads = make(2, 64, 16 * 72).unflatten(-1, (16, 72)).transpose(1, 2)
    outputs.append(kernels.rotate(heads, angle.cos(), angle.sin()))
    torch.autograd.backward([y.float().sum() for y in outputs])
    for rows in (16, 512):
        kernels.packed_linear(torch.randn(rows, 512).to(dtype), torch.zeros(128, 512, dtype=torch.uint8),
                              torch.ones(1), torch.randn(512))


def all_kernels():
    result = {}
    for dtype in (torch.bfloat16, torch.float32):
        compile_launches(found := {})
        every_launch(dtype)
        result |= {f"{name}, {str(dtype).removeprefix('torch.')}": most for name, most in found.items()}
    return result


def scans():
    result = {}
    for operation, count in (("selective_scan", scan), ("bi_wkv", wkv)):
        module = importlib.import_module(f"kernels.{operation}")
        result[f"{operation} forward"] = count("forward_kernel", module.FORWARD)
        result[f"{operation} backward"] = count("backward_kernel", module.BACKWARD)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(all_kernels() if "--all" in sys.argv else scans()))
