"""Residual add + layer norm / RMS norm, and plain RMS norm: one program per row, held in registers.

Floor: each tensor is read or written once, so the time is bytes / bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats, as_rows, new_like

WIDEST_ROW = 16384
"""Columns that one program holds in registers without spilling (16 warps)."""


@triton.jit
def norm_kernel(
    x, residual, weight, bias, y, total, columns, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, KEEP_SUM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = norm(x + residual), total = x + residual; `total` written with KEEP_SUM only."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual + row * residual_stride + column
        value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        # The stored sum is what eager normalizes: round first, or the two disagree.
        rounded = value.to(y.dtype.element_ty)
        if KEEP_SUM:
            tl.store(total + row * columns + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if CENTERED:
        # masked again: the lanes beyond the row would add mean^2 to the variance
        value = tl.where(inside, value - tl.sum(value, 0) / columns, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
    if HAS_WEIGHT:
        value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), mask=inside)


def warps_for(block: int) -> int:
    """Warps that leave 16 to 32 elements of a row to each thread."""
    return min(16, max(1, block // 512))


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    rows, y = as_rows(x), new_like(x)
    total = new_like(x) if keep_sum else y.new_empty(0)
    added = rows if residual is None else as_rows(residual)
    block = triton.next_power_of_2(rows.shape[1])
    norm_kernel[(rows.shape[0],)](
        rows, added, rows if weight is None else weight.contiguous(),
        rows if bias is None else bias.contiguous(), y, total,
        rows.shape[1], rows.stride(0), added.stride(0), eps,
        HAS_RESIDUAL=residual is not None, KEEP_SUM=keep_sum, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, CENTERED=centered, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return y, total


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    return x.dim() > 0 and x.shape[-1] <= WIDEST_ROW and all_floats(x, *others)


def _launch_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, weight, bias, eps, centered=True, keep_sum=keep_sum)


def _launch_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool = True
) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, weight, None, eps, centered=False, keep_sum=keep_sum)


def _launch_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _launch(x, None, weight, None, eps, centered=False, keep_sum=False)[0]


def _fits_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep_sum: bool = True,
) -> bool:
    return x.shape == residual.shape and _fits(x, residual, weight, bias)


def _fits_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool = True
) -> bool:
    return x.shape == residual.shape and _fits(x, residual, weight)


def _fits_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> bool:
    return _fits(x, weight)


add_layer_norm = Kernel(_fits_add_layer_norm, _launch_add_layer_norm)
add_rms_norm = Kernel(_fits_add_rms_norm, _launch_add_rms_norm)
rms_norm = Kernel(_fits_rms_norm, _launch_rms_norm)
