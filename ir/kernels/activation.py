"""Bias + activation, gated activation (SwiGLU, GEGLU) and scale + mask: one pass over memory each.

All three run on a 2-D grid of (row, block of columns): dividing a flat index by the row length
costs about as many instructions again as the arithmetic itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import activate, all_floats, as_rows, new_like


@triton.jit
def bias_act_kernel(
    x, bias, y, columns, x_stride,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act(x + bias); `x_stride` between rows of x, in elements."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION)
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_act_kernel(
    gate, up, y, columns, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """y = act(gate) * up; both inputs may be halves of one packed tensor."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = activate(g, ACTIVATION) * u
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def scale_mask_kernel(
    x, mask, y, scale, columns, x_stride, size1, size2, stride0, stride1, stride2, stride3,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x * scale + mask over (.., size1, size2, columns); strides are the mask's."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    # the mask's own place: a broadcast dimension has stride 0
    start = (row // size2 // size1).to(tl.int64) * stride0
    start += (row // size2 % size1).to(tl.int64) * stride1 + (row % size2).to(tl.int64) * stride2
    wide_row = row.to(tl.int64)
    value = tl.load(x + wide_row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    place = mask + start + column.to(tl.int64) * stride3
    value = value * scale + tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + wide_row * columns + column, value.to(y.dtype.element_ty), mask=inside)


def _block(columns: int) -> int:
    return min(1024, int(triton.next_power_of_2(columns)))


def _grid(rows: Tensor) -> tuple[int, int]:
    return rows.shape[0], triton.cdiv(rows.shape[1], _block(rows.shape[1]))


def _fits_bias_act(x: Tensor, bias: Tensor | None, activation: str) -> bool:
    return x.dim() > 0 and all_floats(x, bias)


def _launch_bias_act(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    rows, y = as_rows(x), new_like(x)
    bias_act_kernel[_grid(rows)](
        rows, rows if bias is None else bias.contiguous(), y, rows.shape[1], rows.stride(0),
        HAS_BIAS=bias is not None, ACTIVATION=activation, BLOCK=_block(rows.shape[1]),
    )  # fmt: skip
    return y


def _fits_gated_act(gate: Tensor, up: Tensor, activation: str) -> bool:
    return gate.dim() > 0 and gate.shape == up.shape and all_floats(gate, up)


def _launch_gated_act(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate_rows, up_rows, y = as_rows(gate), as_rows(up), new_like(gate)
    gated_act_kernel[_grid(gate_rows)](
        gate_rows, up_rows, y, gate_rows.shape[1], gate_rows.stride(0), up_rows.stride(0),
        ACTIVATION=activation, BLOCK=_block(gate_rows.shape[1]),
    )  # fmt: skip
    return y


def _fits_scale_mask(x: Tensor, mask: Tensor, scale: float) -> bool:
    rows = x.numel() // max(1, x.shape[-1]) if x.dim() else 0
    return 0 < x.dim() <= 4 and mask.dim() <= x.dim() and all_floats(x, mask) and rows < 2**31


def _launch_scale_mask(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    rows, y = as_rows(x), new_like(x)
    shape = (1,) * (4 - x.dim()) + tuple(x.shape)
    strides = mask.expand(shape).stride()
    scale_mask_kernel[_grid(rows)](
        rows, mask, y, scale, rows.shape[1], rows.stride(0), shape[1], shape[2], *strides,
        BLOCK=_block(rows.shape[1]),
    )  # fmt: skip
    return y


bias_act = Kernel(_fits_bias_act, _launch_bias_act)
gated_act = Kernel(_fits_gated_act, _launch_gated_act)
scale_mask = Kernel(_fits_scale_mask, _launch_scale_mask)
