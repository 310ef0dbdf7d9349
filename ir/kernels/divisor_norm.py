"""Layer norm with the divisor of the uncut width: one program per row, held in registers.

Floor: x is read once and y written once, so the time is bytes / bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats, as_rows, new_like
from graphwright.ir.kernels.norm import WIDEST_ROW, warps_for


@triton.jit
def divisor_norm_kernel(
    x, weight, bias, y, columns, stride, width, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = (x - sum(x) / width) / sqrt(var + eps); removed columns count as zeros in var."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / width
    value = tl.where(inside, value - mean, 0.0)
    variance = (tl.sum(value * value, 0) + (width - columns) * mean * mean) / width
    value *= tl.rsqrt(variance + eps)
    if HAS_WEIGHT:
        value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, width: int, eps: float
) -> Tensor:
    rows, y = as_rows(x), new_like(x)
    block = triton.next_power_of_2(rows.shape[1])
    divisor_norm_kernel[(rows.shape[0],)](
        rows, rows if weight is None else weight.contiguous(),
        rows if bias is None else bias.contiguous(), y, rows.shape[1], rows.stride(0), width, eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK=block,
        num_warps=warps_for(block),
    )  # fmt: skip
    return y


def _fits(x: Tensor, weight: Tensor | None, bias: Tensor | None, width: int, eps: float) -> bool:
    return x.dim() > 0 and x.shape[-1] <= WIDEST_ROW and all_floats(x, weight, bias)


divisor_layer_norm = Kernel(_fits, _launch)
