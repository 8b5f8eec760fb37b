"""Linear layers with four ternary weights in a byte, as `layers.PackedLinear` defines them (TerDiT, 2405.14854), for
inference. Byte row r of H = out/4 holds rows r, r + H, r + 2 H and r + 3 H of the codes + 1, the first in the highest
two bits. Many rows of x: the weights are unpacked, a byte in and four values out, and the product is cuBLAS's. Few,
where reading the weights is all the cost: the bytes go straight into the product.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import INTERPRETED, TRITON_TYPES, configuration, on, options, refuse, rows, sum_type

FEW = 64                                                                # rows of x, up to which the product is fused
# (byte rows, columns, warps) of an unpacked tile; (rows of x, byte rows, step along the width, warps) of a product
UNPACK = {"default": (16, 256, 4), "interpreted": (4, 32, 1)}
PRODUCT = {"default": (16, 32, 128, 4), torch.float32: (16, 16, 64, 4), "interpreted": (16, 16, 16, 1)}


@triton.jit
def unpack_kernel(packed, alphas, weight, H, K, tiles, BH: tl.constexpr, BK: tl.constexpr):
    r, k = tl.program_id(0) // tiles * BH + tl.arange(0, BH), tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    mask = (r < H)[:, None] & (k < K)[None]
    at = r.to(tl.int64)[:, None] * K + k[None]
    byte = tl.load(packed + at, mask, 85).to(tl.int32)
    alpha = tl.load(alphas).to(tl.float32)
    for q in tl.static_range(4):
        code = ((byte >> (6 - 2 * q)) & 3) - 1
        tl.store(weight + tl.cast(q, tl.int64) * H * K + at, code.to(tl.float32) * alpha, mask)


@triton.jit
def product_kernel(x, packed, alphas, bias, y, x_m, M, H, K, tiles, BM: tl.constexpr, BH: tl.constexpr,
                   BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr):
    m, r = tl.program_id(0) // tiles * BM + tl.arange(0, BM), tl.program_id(0) % tiles * BH + tl.arange(0, BH)
    a, b = tl.zeros((BM, BH), SUM), tl.zeros((BM, BH), SUM)
    c, d = tl.zeros((BM, BH), SUM), tl.zeros((BM, BH), SUM)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        X = tl.load(x + m.to(tl.int64)[:, None] * x_m + k[None], (m < M)[:, None] & (k < K)[None], 0).to(SUM).to(DOT)
        byte = tl.load(packed + r.to(tl.int64)[None] * K + k[:, None], (r < H)[None] & (k < K)[:, None], 85)
        byte = byte.to(tl.int32)                                        # 85: four zeros
        a = tl.dot(X, ((byte >> 6) - 1).to(SUM).to(DOT), a, input_precision=PRECISION, out_dtype=SUM)
        b = tl.dot(X, (((byte >> 4) & 3) - 1).to(SUM).to(DOT), b, input_precision=PRECISION, out_dtype=SUM)
        c = tl.dot(X, (((byte >> 2) & 3) - 1).to(SUM).to(DOT), c, input_precision=PRECISION, out_dtype=SUM)
        d = tl.dot(X, ((byte & 3) - 1).to(SUM).to(DOT), d, input_precision=PRECISION, out_dtype=SUM)
    alpha = tl.load(alphas).to(SUM)
    sums = (a, b, c, d)
    for q in tl.static_range(4):
        result, column = sums[q] * alpha, q * H + r
        if bias is not None:
            result += tl.load(bias + column, r < H, 0).to(SUM)[None]
        tl.store(y + m.to(tl.int64)[:, None] * (4 * H) + column[None], result, (m < M)[:, None] & (r < H)[None])


@torch.library.custom_op("atlas::unpack", mutates_args=())
def unpack(packed: torch.Tensor, alphas: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes (out/4, in), alphas (1,) -> weights (out, in)."""
    H, K = packed.shape
    weight, (BH, BK, warps) = packed.new_empty(4 * H, K, dtype=dtype), configuration(UNPACK, packed, K)
    tiles = triton.cdiv(K, BK)
    with on(packed):
        unpack_kernel[(triton.cdiv(H, BH) * tiles,)](packed.contiguous(), alphas, weight, H, K, tiles, BH, BK,
                                                     **options(warps))
    return weight


@unpack.register_fake
def _(packed, alphas, dtype):
    return packed.new_empty(4 * len(packed), packed.shape[1], dtype=dtype)


@torch.library.custom_op("atlas::packed_product", mutates_args=())
def product(x: torch.Tensor, packed: torch.Tensor, alphas: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, in) -> (M, out)."""
    x, (H, K), type = rows(x), packed.shape, sum_type(x)
    y, (BM, BH, BK, warps) = x.new_empty(len(x), 4 * H), configuration(PRODUCT, x, K)
    dot, precision = (TRITON_TYPES[x.dtype], "tf32x3") if not INTERPRETED else (TRITON_TYPES[type], "ieee")
    tiles = triton.cdiv(H, BH)
    with on(x):
        product_kernel[(triton.cdiv(len(x), BM) * tiles,)](
            x, packed.contiguous(), alphas, bias, y, x.stride(0), len(x), H, K, tiles, BM, BH, BK, dot, precision,
            TRITON_TYPES[type], **options(warps))
    return y


@product.register_fake
def _(x, packed, alphas, bias):
    return x.new_empty(len(x), 4 * len(packed))


for operator in (unpack, product):
    operator.register_autograd(refuse("gradients of packed weights"))
    operator.register_vmap(refuse("vmap"))


@register_flop_formula(torch.ops.atlas.packed_product)
def _(x, packed, *others, out_shape=None, **kwargs):
    return 2 * x[0] * 4 * packed[0] * packed[1]


def packed_linear(x, packed, alphas, bias=None):
    """As `layers.PackedLinear`: x (..., in) float32, bfloat16 or float16, packed (out/4, in) uint8, alphas (1,), bias
    (out,) -> (..., out). Without gradients; under autocast in its type."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.numel() // x.shape[-1] <= FEW:
        return product(x.flatten(0, -2), packed, alphas, bias).unflatten(0, x.shape[:-1])
    return F.linear(x, unpack(packed, alphas, x.dtype), None if bias is None else bias.to(x.dtype))
