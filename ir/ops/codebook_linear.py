"""graphwright::codebook_linear: a linear layer that keeps its weight as indices into codebooks.

    y = activation(x @ weight.T + bias + low @ b.T + added)

The weight is what `dequantize_codebook` rebuilds; the rest is as in `blocks_linear`. A weight that
is a sum of lookups, or several side by side, is a chain of these: each takes the one before as
`added`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops import codebook
from graphwright.ir.ops.blocks_linear import linear_of, macs_of, onnx_linear_of, random_epilogue
from graphwright.ir.ops.registry import declare


def _eager(
    x: Tensor, indices: Tensor, codebooks: Tensor, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None,
    bits: int, rows: int, activation: str,
) -> Tensor:  # fmt: skip
    weight = codebook._eager(indices, codebooks, bits, rows, x.shape[-1])
    return linear_of(x, weight, bias, low, b, added, activation)


def _meta(
    x: Tensor, indices: Tensor, codebooks: Tensor, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None,
    bits: int, rows: int, activation: str,
) -> Tensor:  # fmt: skip
    return torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)


def _macs(
    x: Tensor, indices: Any, codebooks: Any, bias: Any, low: Any, b: Any, added: Any,
    bits: int, rows: int, activation: str,
) -> Any:  # fmt: skip
    return macs_of(x, rows, low)


def _onnx(
    x: Any, indices: Any, codebooks: Any, bias: Any, low: Any, b: Any, added: Any,
    bits: int, rows: int, activation: str,
) -> Any:  # fmt: skip
    weight = codebook._onnx(indices, codebooks, bits, rows, int(x.shape[-1]))
    return onnx_linear_of(x, weight, bias, low, b, added, activation)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    stored = list(codebook._samples())
    for index, tokens, rank, has_rest, activation in [
        (0, (1,), 3, True, "gelu"),
        (1, (3, 1), 0, True, "silu"),
        (2, (2,), 0, False, "none"),
        (4, (5,), 2, False, "relu"),
    ]:
        indices, values, bits, rows, columns = stored[index]
        x = torch.randn(*tokens, columns, generator=generator)
        rest = random_epilogue(generator, tokens, rows, rank, has_rest)
        yield x, indices, values, *rest, bits, rows, activation


codebook_linear = declare(
    "codebook_linear(Tensor x, Tensor indices, Tensor codebooks, Tensor? bias, Tensor? low, "
    "Tensor? b, Tensor? added, int bits, int rows, str activation) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.codebook_linear:codebook_linear",
    samples=_samples,
    macs=_macs,
)
"""Linear layer whose weight is `dequantize_codebook(indices, codebooks, bits, rows, x.shape[-1])`,
in the dtype of x. low: (..., rank); b: (rows, rank); added: (..., rows)."""
