"""graphwright::table_linear: a linear layer that keeps its weight as codes of NF4 or FP4.

    y = activation(x @ weight.T + bias + low @ b.T + added)

The weight is what `dequantize_table` rebuilds; the rest is as in `blocks_linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops import table as tables
from graphwright.ir.ops.blocks_linear import linear_of, macs_of, onnx_linear_of, random_epilogue
from graphwright.ir.ops.registry import declare


def _eager(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None,
    table: str, block: int, rows: int, activation: str,
) -> Tensor:  # fmt: skip
    weight = tables._eager(codes, scale, table, block, [rows, x.shape[-1]])
    return linear_of(x, weight, bias, low, b, added, activation)


def _meta(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None,
    table: str, block: int, rows: int, activation: str,
) -> Tensor:  # fmt: skip
    return torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)


def _macs(
    x: Tensor, codes: Any, scale: Any, bias: Any, low: Any, b: Any, added: Any,
    table: str, block: int, rows: int, activation: str,
) -> Any:  # fmt: skip
    return macs_of(x, rows, low)


def _onnx(
    x: Any, codes: Any, scale: Any, bias: Any, low: Any, b: Any, added: Any,
    table: str, block: int, rows: int, activation: str,
) -> Any:  # fmt: skip
    weight = tables._onnx(codes, scale, table, block, [rows, int(x.shape[-1])])
    return onnx_linear_of(x, weight, bias, low, b, added, activation)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for name, block, rows, columns, tokens, rank, has_rest, activation in [
        ("nf4", 64, 37, 128, (1,), 5, True, "silu"),
        ("fp4", 32, 21, 96, (2, 3), 0, False, "none"),
        ("nf4", 64, 5, 75, (2,), 0, True, "gelu"),
    ]:
        count = rows * columns
        codes = torch.randint(0, 256, (-(-count // 2),), generator=generator, dtype=torch.uint8)
        scale = torch.randint(1, 64, (-(-count // block),), generator=generator) / 64
        x = torch.randn(*tokens, columns, generator=generator)
        rest = random_epilogue(generator, tokens, rows, rank, has_rest)
        yield x, codes, scale, *rest, name, block, rows, activation


table_linear = declare(
    "table_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? low, Tensor? b, "
    "Tensor? added, str table, int block, int rows, str activation) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.low_bit_linear:table_linear",
    samples=_samples,
    macs=_macs,
)
"""Linear layer whose weight is `dequantize_table(codes, scale, table, block,
[rows, x.shape[-1]])`, in the dtype of x. low: (..., rank); b: (rows, rank); added: (..., rows)."""
