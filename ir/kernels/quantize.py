"""Dequantized weights and fake-quantized activations: one pass over memory each."""

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
def dequantize_kernel(
    codes, scale, zero_point, y, count, channels, inner,
    HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = (codes - zero_point[c]) * scale[c] with c = (index // inner) % channels."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    channel = index // inner % channels
    value = tl.load(codes + index, mask=inside, other=0).to(tl.float32)
    if HAS_ZERO:
        value -= tl.load(zero_point + channel, mask=inside, other=0).to(tl.float32)
    value *= tl.load(scale + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def fake_quantize_kernel(
    x, scale, zero_point, y, count, low, high, EXACT: tl.constexpr, BLOCK: tl.constexpr
):
    """y = (clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    step = tl.load(scale)
    zero = tl.load(zero_point)
    ratio = tl.div_rn(tl.load(x + index, mask=inside, other=0.0).to(tl.float32), step)
    # Beyond the range the code saturates anyway; the bound keeps the rounding trick exact.
    ratio = tl.minimum(tl.maximum(ratio, -1024.0), 1024.0)
    code = (ratio + EXACT) - EXACT + zero
    code = tl.minimum(tl.maximum(code, low), high)
    tl.store(y + index, ((code - zero) * step).to(y.dtype.element_ty), mask=inside)


def _dequantize_fits(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> bool:
    return (
        all_floats(scale)
        and codes.numel() > 0
        and codes.dtype in (torch.int8, torch.uint8, torch.int32)
        and (scale.dim() == 0 or codes.dim() > 0)
    )


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    codes = codes.contiguous()
    y = torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)
    channels, inner = 1, codes.numel()
    if scale.dim() > 0:
        axis %= codes.dim()
        channels, inner = codes.shape[axis], codes[(0,) * (axis + 1)].numel()
    zero = codes if zero_point is None else zero_point.contiguous()
    dequantize_kernel[(triton.cdiv(codes.numel(), BLOCK),)](
        codes, scale.contiguous(), zero, y, codes.numel(), channels, inner,
        HAS_ZERO=zero_point is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return y


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    fake_quantize_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x, scale, zero_point, y, x.numel(), float(low), float(high), EXACT=EXACT, BLOCK=BLOCK
    )
    return y


def _static_fits(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> bool:
    return all_floats(x) and -128 <= low <= high <= 255


def _static(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    step, zero = (torch.tensor(float(v), device=x.device) for v in (scale, zero_point))
    return _quantize(x, step, zero, low, high)


def _dynamic(x: Tensor) -> Tensor:
    from graphwright.ir.ops.int8 import dynamic_parameters

    # The range needs a pass of its own: every block of the second one depends on all of the first.
    scale, zero_point = dynamic_parameters(x.to(torch.float32))
    return _quantize(x, scale, zero_point, 0, 255)


dequantize = Kernel(_dequantize_fits, _dequantize)
fake_quantize = Kernel(_static_fits, _static)
fake_quantize_dynamic = Kernel(all_floats, _dynamic)
