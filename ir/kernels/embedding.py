"""Rows of a compressed table: a gather of what is stored, then the kernel that rebuilds weights."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.kernels import Kernel, blocks, table
from graphwright.ir.kernels.common import all_floats
from graphwright.ir.ops.embedding import block_rows, table_rows, whole_rows


def _fits_blocks(
    indices: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None,
    bits: int, block: int, columns: int,
) -> bool:  # fmt: skip
    weight = codes.dtype == torch.uint8 and 2 <= bits <= 8 and all_floats(scale)
    return weight and indices.numel() > 0 and columns > 0


def _launch_blocks(
    indices: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None,
    bits: int, block: int, columns: int,
) -> Tensor:  # fmt: skip
    found = block_rows(indices, codes, scale, zero_point)
    rows: Tensor = blocks.dequantize_blocks.launch(*found, bits, block, columns)
    return rows.view(*indices.shape, columns)


def _fits_table(
    indices: Tensor, codes: Tensor, scale: Tensor, name: str, block: int, rows: int, columns: int
) -> bool:
    weight = codes.dtype == torch.uint8 and all_floats(scale) and whole_rows(name, block, columns)
    return weight and indices.numel() > 0 and columns > 0


def _launch_table(
    indices: Tensor, codes: Tensor, scale: Tensor, name: str, block: int, rows: int, columns: int
) -> Tensor:
    found = table_rows(indices, codes, scale, rows)
    shape = [*indices.shape, columns]
    rebuilt: Tensor = table.dequantize_table.launch(*found, name, block, shape)
    return rebuilt


blocks_embedding = Kernel(_fits_blocks, _launch_blocks)
table_embedding = Kernel(_fits_table, _launch_table)
