"""Float8 e4m3 weights and activations in float32 arithmetic: no hardware float8 is needed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats

BLOCK = 1024
EXACT = 1.5 * 2.0**23
"""Adding and taking away this number rounds a float32 below 2**22 half to even, on any device."""


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def dequantize_float8_kernel(codes, scale, y, count, channels, inner, BLOCK: tl.constexpr):
    """y = float8(codes) * scale[c] with c = (index // inner) % channels."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    code = tl.load(codes + index, mask=inside, other=0).to(tl.int32)
    exponent = (code >> 3) & 15
    mantissa = tl.where(exponent > 0, (code & 7) + 8, code & 7).to(tl.float32)
    size = mantissa * power_of_two(tl.maximum(exponent, 1) - 10)
    value = tl.where(code >= 128, -size, size)
    value *= tl.load(scale + index // inner % channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def fake_quantize_float8_kernel(x, scale, y, count, row, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """y = float8(x / scale[r]) * scale[r] with r = index // row, saturating at 448."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    step = tl.load(scale + index // row, mask=inside, other=1.0)
    value = tl.div_rn(tl.load(x + index, mask=inside, other=0.0).to(tl.float32), step)
    value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    exponent = ((value.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.maximum(exponent, -6)
    # Three bits behind the leading one: in units of 2^(exponent - 3) the nearest whole number.
    whole = value * power_of_two(3 - exponent)
    whole = (whole + EXACT) - EXACT
    value = whole * power_of_two(exponent - 3) * step
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)


def _dequantize_fits(codes: Tensor, scale: Tensor, axis: int) -> bool:
    return all_floats(scale) and codes.numel() > 0 and codes.dtype == torch.uint8


def _dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    codes = codes.contiguous()
    y = torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)
    channels, inner = 1, codes.numel()
    if scale.dim() > 0:
        axis %= codes.dim()
        channels, inner = codes.shape[axis], codes[(0,) * (axis + 1)].numel()
    dequantize_float8_kernel[(triton.cdiv(codes.numel(), BLOCK),)](
        codes, scale.contiguous(), y, codes.numel(), channels, inner, BLOCK=BLOCK
    )
    return y


def _fake_fits(x: Tensor, scale: float) -> bool:
    return all_floats(x) and (x.dim() > 0 or scale > 0)


def _fake(x: Tensor, scale: float) -> Tensor:
    from graphwright.ir.ops.float8 import row_scale

    x = x.contiguous()
    y = torch.empty_like(x)
    if scale > 0:
        step, row = torch.full((1,), scale, device=x.device), x.numel()
    else:
        step, row = row_scale(x.to(torch.float32)).contiguous(), x.shape[-1]
    fake_quantize_float8_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x, step, y, x.numel(), row, EXACT=EXACT, BLOCK=BLOCK
    )
    return y


dequantize_float8 = Kernel(_dequantize_fits, _dequantize)
fake_quantize_float8 = Kernel(_fake_fits, _fake)
