"""What Triton makes of the scans for sm_90 (H100, H200), without a GPU: registers, stack (spills), shuffles, and the
instructions that one token costs a warp of 32 channels, as JSON. Run by test_kernels.py."""

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {}
    for operation, count in (("selective_scan", scan), ("bi_wkv", wkv)):
        module = importlib.import_module(f"kernels.{operation}")
        result[f"{operation} forward"] = count("forward_kernel", module.FORWARD)
        result[f"{operation} backward"] = count("backward_kernel", module.BACKWARD)
    print(json.dumps(result))
