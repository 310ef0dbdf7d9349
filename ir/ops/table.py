"""graphwright::dequantize_table: weights stored as codes of a fixed table of levels.

Tables: `nf4` and `fp4` with 4-bit codes, two to a byte, the first in the high half; `dynamic` with
8-bit codes, for scales that are themselves quantized. Layout, levels and order of the blocks are
those of bitsandbytes, which ONNX Runtime's MatMulBnb4 reads too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Levels of NormalFloat4: quantiles of the normal distribution, scaled to [-1, 1]. Source:
Dettmers et al. 2023, "QLoRA", appendix E; 8 quantiles above zero and 7 below."""

FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Magnitudes of the 4-bit float codes 0 to 7, times 12; the codes from 8 are their negatives."""

BITS = {"nf4": 4, "fp4": 4, "dynamic": 8}
"""Bits of a code, by table."""


def _dynamic() -> list[float]:
    """The signed dynamic type: a decade per exponent, with twice the fraction in each next one.

    Source: Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning".
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    return sorted(found)


@functools.cache
def _levels(table: str) -> tuple[float, ...]:
    if table == "nf4":
        return NF4
    if table == "fp4":
        return tuple(sign * level / 12 for sign in (1, -1) for level in FP4_TWELFTHS)
    return tuple(_dynamic())


def levels(table: str) -> Tensor:
    """The levels of a table as float32, by code: 16, or 256 for `dynamic`."""
    return torch.tensor(_levels(table), dtype=torch.float32)


def unpack(codes: Tensor, table: str, count: int) -> Tensor:
    """The first `count` codes, one to a byte (uint8, 1-D)."""
    flat = codes.reshape(-1)
    if BITS[table] == 4:
        flat = torch.stack([flat >> 4, flat & 15], 1).reshape(-1)
    return flat[:count]


def pack(codes: Tensor, table: str) -> Tensor:
    """The inverse of `unpack`: uint8 codes, flattened, as they are stored."""
    flat = codes.reshape(-1).to(torch.uint8)
    if BITS[table] == 8:
        return flat
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] << 4) | flat[1::2]


def _eager(codes: Tensor, scale: Tensor, table: str, block: int, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    value = levels(table).to(scale)[unpack(codes, table, count).long()]
    return (value * scale.repeat_interleave(block)[:count]).reshape(shape)


def _meta(codes: Tensor, scale: Tensor, table: str, block: int, shape: list[int]) -> Tensor:
    return torch.empty(shape, dtype=scale.dtype, device=codes.device)


def _onnx(codes: Any, scale: Any, table: str, block: int, shape: list[int]) -> Any:
    import onnx
    from onnxscript import opset18 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def half(value: int) -> Any:
        byte = onnx.helper.make_tensor("byte", onnx.TensorProto.UINT8, [], [value])
        return op.Constant(value=byte)

    count = math.prod(shape)
    last = ints(-1)
    if BITS[table] == 4:
        high = op.Unsqueeze(op.BitShift(codes, half(4), direction="RIGHT"), last)
        low = op.Unsqueeze(op.BitwiseAnd(codes, half(15)), last)
        codes = op.Reshape(op.Concat(high, low, axis=-1), last)
        codes = op.Slice(codes, ints(0), ints(count))
    # Not CastLike, which is the one op here that the runtime cannot compute beforehand.
    level = op.Cast(op.Constant(value_floats=list(_levels(table))), to=int(scale.dtype))
    value = op.Gather(level, op.Cast(codes, to=onnx.TensorProto.INT32))
    wide = op.Expand(op.Unsqueeze(scale, last), ints(1, block))
    factor = op.Slice(op.Reshape(wide, last), ints(0), ints(count))
    return op.Reshape(op.Mul(value, factor), ints(*shape))


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def sample(table: str, block: int, *shape: int) -> tuple[Any, ...]:
        count = math.prod(shape)
        stored = -(-count * BITS[table] // 8)
        codes = torch.randint(0, 256, (stored,), generator=generator, dtype=torch.uint8)
        scale = torch.randint(1, 64, (-(-count // block),), generator=generator) / 64
        return codes, scale, table, block, list(shape)

    yield sample("nf4", 64, 37, 75)
    yield sample("nf4", 64, 64, 128)
    yield sample("fp4", 128, 5, 3, 3, 7)
    yield sample("fp4", 32, 4096)
    yield sample("dynamic", 256, 1407)


dequantize_table = declare(
    "dequantize_table(Tensor codes, Tensor scale, str table, int block, int[] shape) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.table:dequantize_table",
    samples=_samples,
)
"""Tensor of `shape` (row-major) from packed codes (uint8, 1-D) and one scale per `block` elements.

The blocks run over the flattened tensor, across the ends of its rows; the last one may be shorter.
The result has the dtype of `scale`.
"""
