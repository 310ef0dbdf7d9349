"""GPTQ of one matrix: columns are rounded in turn, and each error is spread over the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.stored import grid as grid_math

LAZY = 128
"""Columns whose updates of the columns behind them are collected into one product."""


@dataclass(frozen=True)
class Rounded:
    """A matrix on its grid.

    Attributes:
        codes: (rows, columns) uint8.
        scale, zero: (rows, groups); zero points are whole numbers.
        loss: sum of (w - q)^2 / (2 U_jj^2) over all weights, w as it was when it was rounded;
            half of tr(E H E^T) with E the whole change of the matrix and H the damped Hessian.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    loss: float

    def value(self, block: int) -> Tensor:
        """The weights, (rows, columns)."""
        columns = self.codes.shape[1]
        scale = grid_math.spread(self.scale, block, columns)
        return grid_math.decode(
            self.codes.to(scale.dtype), scale, grid_math.spread(self.zero, block, columns)
        )


@dataclass(frozen=True)
class GptqSettings:
    """The grid that a matrix is rounded to, and the order.

    Attributes:
        bits: 2 to 8.
        block: columns with one scale, in their original order.
        symmetric: zero point in the middle.
        static: scales from the given weights; else each group's from its weights as the errors
            before it have left them.
        order: round the columns of large diagonal of H first; needs `static`, or one group.
        search: least-error ranges, see `grid_math.fit`.
        keep_zeros: weights that are exactly zero stay so.
        dtype: that scales are stored in, and rounded to before the weights are rounded.
    """

    bits: int = 4
    block: int = 128
    symmetric: bool = False
    static: bool = False
    order: bool = False
    search: bool = False
    keep_zeros: bool = False
    dtype: torch.dtype = torch.float64

    def fit(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of groups along the last axis."""
        scale, zero = grid_math.fit(w, self.bits, symmetric=self.symmetric, search=self.search)
        if self.dtype.itemsize < w.dtype.itemsize:
            tiny = torch.finfo(self.dtype).tiny
            scale = scale.to(self.dtype).clamp(min=tiny).to(w.dtype)
        return scale, zero


Factor = Callable[[Tensor], Tensor]
"""H (k, k), dead inputs and all, to the upper Cholesky factor of the damped H's inverse."""


def round_matrix(w: Tensor, h: Tensor, factor: Factor, settings: GptqSettings) -> Rounded:
    """Codes of `w` that keep x @ w.T, for inputs with H = mean of x x^T.

    A column whose input was always zero is rounded to nearest: H says nothing about it. (The
    paper's code sets it to zero.)

    Args:
        w: (rows, columns), float32 or float64; not changed.
        h: (columns, columns), same type.
        factor: see `Factor`; its damping decides how far H is trusted.
        settings: grid and order.

    Source: Frantar et al. 2022, "GPTQ", algorithm 1; order and static groups from its code.
    """
    columns, block = w.shape[1], settings.block
    if settings.static:
        scale, zero = (v.T.contiguous() for v in settings.fit(grid_math.grouped(w, block)))
    else:
        scale, zero = (w.new_zeros(-(-columns // block), w.shape[0]) for _ in range(2))
    order = torch.arange(columns, device=w.device)
    if settings.order:
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
    upper = factor(h[order][:, order] if settings.order else h)
    # One row per column of w: what the loop reads and writes lies together in memory.
    work = w.T[order].clone(memory_format=torch.contiguous_format)
    kept = work == 0 if settings.keep_zeros else None
    codes, total = torch.empty_like(work, dtype=torch.uint8), w.new_zeros(())
    columns_in_order = order.tolist()
    width = _lazy_width(block, columns)
    for start in range(0, columns, width):
        end = min(start + width, columns)
        errors, diagonal = torch.empty_like(work[start:end]), upper[start:end, start:end]
        for i in range(end - start):
            column = columns_in_order[start + i]
            group = column // block
            if not settings.static and column % block == 0:
                live = work[start + i : start + i + block]
                scale[group], zero[group] = settings.fit(live.T)
            s, z, x = scale[group], zero[group], work[start + i]
            code = grid_math.encode(x, s, z, settings.bits)
            if kept is not None:
                code = torch.where(kept[start + i], z, code)
            codes[column] = code
            error = errors[i] = (x - grid_math.decode(code, s, z)) / diagonal[i, i]
            total += error.square().sum() / 2
            work[start + i + 1 : end].addr_(diagonal[i, i + 1 :], error, alpha=-1)
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return Rounded(codes.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), float(total))


def _lazy_width(block: int, columns: int) -> int:
    """About `LAZY` columns, such that no group begins inside one stretch and ends in another.

    Then the scale of a group is always found from weights that hold all updates so far.
    """
    if block >= columns:
        return LAZY
    return LAZY // block * block if block <= LAZY else math.gcd(block, LAZY)
