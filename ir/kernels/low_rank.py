"""A weight and its low-rank correction in one go: the product never reaches memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats

ROWS, COLUMNS, RANKS = 64, 64, 32


@triton.jit
def add_low_rank_kernel(
    weight, b, a, y, rows, columns, rank,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y = weight + b @ a, one tile per program; the sum is in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, rank, RANKS):
        index = start + tl.arange(0, RANKS)
        left = tl.load(
            b + row.to(tl.int64)[:, None] * rank + index[None, :],
            mask=(row < rows)[:, None] & (index < rank)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            a + index.to(tl.int64)[:, None] * columns + column[None, :],
            mask=(index < rank)[:, None] & (column < columns)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision=PRECISION)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


def _fits(weight: Tensor, b: Tensor, a: Tensor) -> bool:
    return all_floats(weight, b, a) and weight.dim() == 2


def _launch(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    weight, b, a = weight.contiguous(), b.contiguous(), a.contiguous()
    (rows, columns), rank = weight.shape, b.shape[1]
    y = torch.empty_like(weight)
    exact = torch.get_float32_matmul_precision() == "highest"
    add_low_rank_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        weight, b, a, y, rows, columns, rank,
        PRECISION="ieee" if exact else "tf32", ROWS=ROWS, COLUMNS=COLUMNS, RANKS=RANKS,
    )  # fmt: skip
    return y


add_low_rank = Kernel(_fits, _launch)
