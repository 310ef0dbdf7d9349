"""graphwright::blocks_embedding and table_embedding: rows of a table that stays compressed.

Codes and scales of the wanted rows are gathered, and only these rows are rebuilt. Made by the fuser
from a rebuilt weight feeding `aten.embedding`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops import blocks
from graphwright.ir.ops import table as tables
from graphwright.ir.ops.registry import declare


def block_rows(
    indices: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The stored parts of the rows that `indices` (of any shape) names, one row after the other."""
    flat = indices.reshape(-1)
    return codes[flat], scale[flat], None if zero_point is None else zero_point[flat]


def whole_rows(table: str, block: int, columns: int) -> bool:
    """Whether every row of a table is made of whole blocks and whole bytes."""
    return columns % block == 0 and columns * tables.BITS[table] % 8 == 0


def table_rows(indices: Tensor, codes: Tensor, scale: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """As `block_rows`, of a table with `whole_rows`: codes and scales, flat."""
    flat = indices.reshape(-1)
    return codes.reshape(rows, -1)[flat].reshape(-1), scale.reshape(rows, -1)[flat].reshape(-1)


def _blocks_eager(
    indices: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None,
    bits: int, block: int, columns: int,
) -> Tensor:  # fmt: skip
    found = blocks._eager(*block_rows(indices, codes, scale, zero_point), bits, block, columns)
    return found.reshape(*indices.shape, columns)


def _blocks_meta(
    indices: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None,
    bits: int, block: int, columns: int,
) -> Tensor:  # fmt: skip
    return torch.empty((*indices.shape, columns), dtype=scale.dtype, device=indices.device)


def _blocks_onnx(
    indices: Any, codes: Any, scale: Any, zero_point: Any, bits: int, block: int, columns: int
) -> Any:
    from onnxscript import opset18 as op

    return op.Gather(blocks._onnx(codes, scale, zero_point, bits, block, columns), indices, axis=0)


def _table_eager(
    indices: Tensor, codes: Tensor, scale: Tensor, table: str, block: int, rows: int, columns: int
) -> Tensor:
    if not whole_rows(table, block, columns):
        return tables._eager(codes, scale, table, block, [rows, columns])[indices]
    found = table_rows(indices, codes, scale, rows)
    return tables._eager(*found, table, block, [*indices.shape, columns])


def _table_meta(
    indices: Tensor, codes: Tensor, scale: Tensor, table: str, block: int, rows: int, columns: int
) -> Tensor:
    return torch.empty((*indices.shape, columns), dtype=scale.dtype, device=indices.device)


def _table_onnx(
    indices: Any, codes: Any, scale: Any, table: str, block: int, rows: int, columns: int
) -> Any:
    from onnxscript import opset18 as op

    return op.Gather(tables._onnx(codes, scale, table, block, [rows, columns]), indices, axis=0)


def _blocks_samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    stored = list(blocks._samples())
    for index, shape in [(0, (2, 5)), (2, (7,)), (6, (1, 1, 3))]:
        codes, *rest = stored[index]
        yield torch.randint(0, codes.shape[0], shape, generator=generator), codes, *rest


def _table_samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, (rows, columns) in [((2, 5), (13, 128)), ((4,), (9, 75))]:
        count = rows * columns
        codes = torch.randint(0, 256, (-(-count // 2),), generator=generator, dtype=torch.uint8)
        scale = torch.randint(1, 64, (-(-count // 64),), generator=generator) / 64
        indices = torch.randint(0, rows, shape, generator=generator)
        yield indices, codes, scale, "nf4", 64, rows, columns


blocks_embedding = declare(
    "blocks_embedding(Tensor indices, Tensor codes, Tensor scale, Tensor? zero_point, int bits, "
    "int block, int columns) -> Tensor",
    eager=_blocks_eager,
    meta=_blocks_meta,
    onnx=_blocks_onnx,
    kernel="graphwright.ir.kernels.embedding:blocks_embedding",
    samples=_blocks_samples,
)
"""`dequantize_blocks(codes, scale, zero_point, bits, block, columns)[indices]`, of their shape and
(columns,), in the dtype of the scales."""

table_embedding = declare(
    "table_embedding(Tensor indices, Tensor codes, Tensor scale, str table, int block, int rows, "
    "int columns) -> Tensor",
    eager=_table_eager,
    meta=_table_meta,
    onnx=_table_onnx,
    kernel="graphwright.ir.kernels.embedding:table_embedding",
    samples=_table_samples,
)
"""`dequantize_table(codes, scale, table, block, [rows, columns])[indices]`, of their shape and
(columns,), in the dtype of the scales."""
