"""2:4 weights on a GPU: rebuilt in one pass over memory, or multiplied as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats

BLOCK = 512
"""Groups of four weights that a program rebuilds."""

MULTIPLES = (32, 64)
"""Rows and columns of a weight that all of PyTorch's sparse kernels take are multiples of these."""


@triton.jit
def expand_2_4_kernel(values, places, y, count, groups, stored, BLOCK: tl.constexpr):
    """y[r, 4g + p] = values[r, 2g + i] where place i of group g is p, else 0.

    A lane has one group of four: values and results are contiguous over the whole weight, so that
    both move in wide words.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    row, group = index // groups, index % groups
    packed = tl.load(places + row * stored + group // 2, mask=index < count, other=0).to(tl.int32)
    packed = packed >> (group % 2 * 4).to(tl.int32)
    first_place, second_place = packed & 3, (packed >> 2) & 3
    two = 2 * start + tl.arange(0, 2 * BLOCK)
    pairs = tl.load(values + two, mask=two < 2 * count, other=0.0)
    first, second = tl.split(tl.reshape(pairs, (BLOCK, 2)))
    zero = tl.zeros_like(first)
    a = tl.where(first_place == 0, first, tl.where(second_place == 0, second, zero))
    b = tl.where(first_place == 1, first, tl.where(second_place == 1, second, zero))
    c = tl.where(first_place == 2, first, tl.where(second_place == 2, second, zero))
    d = tl.where(first_place == 3, first, tl.where(second_place == 3, second, zero))
    four = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * BLOCK,))
    place = 4 * start + tl.arange(0, 4 * BLOCK)
    tl.store(y + place, four, mask=place < 4 * count)


def _fits(values: Tensor, places: Tensor) -> bool:
    return all_floats(values) and places.dtype == torch.uint8 and values.shape[1] % 2 == 0


def _expand(values: Tensor, places: Tensor) -> Tensor:
    values, places = values.contiguous(), places.contiguous()
    rows, columns = values.shape[0], 2 * values.shape[1]
    y = torch.empty((rows, columns), dtype=values.dtype, device=values.device)
    count = y.numel() // 4
    expand_2_4_kernel[(triton.cdiv(count, BLOCK),)](
        values, places, y, count, columns // 4, places.shape[1], BLOCK=BLOCK
    )
    return y


_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weights in the layout of the device's sparse kernels, made at their first use; gone with their
values, and made anew when these are written to."""


def _packed(values: Tensor, places: Tensor) -> Tensor:
    from torch.sparse import to_sparse_semi_structured

    version = 0 if values.is_inference() else values._version
    known = _PACKED.get(values)
    if known is None or known[0] != version:
        made = to_sparse_semi_structured(_expand(values.detach(), places))
        known = _PACKED[values] = (version, made)
    found: Tensor = known[1]
    return found


def _has_sparse_kernels(x: Tensor, values: Tensor) -> bool:
    """Half precisions alone: in float32 these kernels round to TF32."""
    rows, columns = values.shape[0], 2 * values.shape[1]
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and rows % MULTIPLES[0] == 0
        and columns % MULTIPLES[1] == 0
    )


def _linear_fits(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> bool:
    return all_floats(x, values, bias) and x.dtype == values.dtype and _fits(values, places)


def _linear(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    if not _has_sparse_kernels(x, values):
        return F.linear(x, _expand(values, places), bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = F.linear(rows, _packed(values, places), bias)
    return y.reshape(*x.shape[:-1], values.shape[0]).contiguous()


expand_2_4 = Kernel(_fits, _expand)
linear_2_4 = Kernel(_linear_fits, _linear)
