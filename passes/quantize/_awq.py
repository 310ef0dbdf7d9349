"""The arithmetic of AWQ: factors of input channels, and limits of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.passes.quantize import _grid

STEPS = 20
"""Exponents that are tried: 0, 1/20, ... 19/20; and steps of the limits: 1, 19/20, ..."""

LIMITS = 10
"""Limits that are tried, down to 11/20 of the largest weight of a block."""


def factors(mean: Tensor, alpha: float) -> Tensor:
    """Factors of the weight's columns, from the mean of |x| of every input channel, (in,).

    s = max(mean^alpha, 1e-4), divided by sqrt(max(s) min(s)); all 1 for alpha = 0.

    Source: Lin et al. 2023, "AWQ", equation 5, and its code for bounds and normalization.
    """
    s = mean.float().pow(alpha).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def nearest(w: Tensor, bits: int, block: int, *, symmetric: bool) -> Tensor:
    """(out, in): `w` rounded to the nearest codes of its blocks, as values."""
    wide = _grid.grouped(w, block)
    scale, zero = (v[..., None] for v in _grid.fit(wide, bits, symmetric=symmetric))
    value = _grid.decode(_grid.encode(wide, scale, zero, bits), scale, zero)
    return value.flatten(1)[:, : w.shape[1]]


def limits(w: Tensor, moments: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The limit of |w| in every row and block under which the block's part of the output is best.

    Rounding a clamped w gives the block's part of the output, summed over the calibration data,
    the error (w - q) M (w - q)^T. Limits of 1, 19/20, ... 11/20 of the largest |w| are tried.

    Args:
        w: (out, in).
        moments: M, (blocks, block, block): mean of x x^T of every block's inputs.
        bits, symmetric: of the grid.

    Returns:
        limits (out, blocks), and by which share they lower the sum of all errors, a 0-dim tensor.

    Source: Lin et al. 2023, "AWQ", its clipping. Their code sums over 512 tokens; the moments
    hold the sum over all.
    """
    wide = _grid.grouped(w, moments.shape[-1])
    largest = wide.abs().amax(-1)
    best, first, limit = largest, largest, largest
    for step in range(LIMITS):
        tried = largest * (1 - step / STEPS)
        clamped = wide.clamp(-tried[..., None], tried[..., None])
        scale, zero = (v[..., None] for v in _grid.fit(clamped, bits, symmetric=symmetric))
        change = _grid.decode(_grid.encode(clamped, scale, zero, bits), scale, zero) - wide
        by_block = change.transpose(0, 1)
        error = ((by_block @ moments) * by_block).sum(-1).T
        if step == 0:
            best, first, limit = error, error, tried
            continue
        better = error < best
        best, limit = torch.where(better, error, best), torch.where(better, tried, limit)
    gain = (
        (best.double().sum() / first.double().sum()) if float(first.sum()) > 0 else best.sum() + 1
    )
    return limit, 1 - gain


def clamp(w: Tensor, limit: Tensor, block: int) -> Tensor:
    """`w` (out, in) with every block held within its limit."""
    wide = _grid.spread(limit, block, w.shape[1])
    return torch.minimum(torch.maximum(w, -wide), wide)


def real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """(n, in) rows of an activation, without padding: where `real` (batch, length) is false."""
    if real is not None and x.dim() >= 3 and x.shape[:2] == real.shape:
        return x[real].reshape(-1, x.shape[-1])
    if real is not None and x.dim() == 2 and x.shape[0] == real.numel():
        return x[real.flatten()]
    return x.reshape(-1, x.shape[-1])


class Inputs:
    """What an activation looks like: mean of |x|, and of x x^T within every block of channels.

    Args:
        block: channels of a block.
        padding: what is no padding, by batch: (batch, length) booleans, or None.
    """

    def __init__(self, block: int, padding: Sequence[Tensor | None]) -> None:
        self.block, self.padding = block, padding
        self.seen, self.count = 0, 0
        self.size = self.second = torch.zeros(())

    def update(self, x: Tensor) -> None:
        """Takes note of one batch."""
        rows = real_rows(x.detach(), self.padding[self.seen]).float()
        self.seen += 1
        if not len(rows):
            return
        wide = _grid.grouped(rows, self.block).transpose(0, 1)
        total = self.count + len(rows)
        share = len(rows) / total
        self.size = self.size * (1 - share) + rows.abs().mean(0) * share
        self.second = self.second * (1 - share) + wide.transpose(1, 2) @ wide / total
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(in,): mean of |x|."""
        self._check()
        return self.size

    def moments(self, by: Tensor | None = None) -> Tensor:
        """(blocks, block, block): mean of x x^T of every block, x divided by `by` (in,)."""
        self._check()
        if by is None:
            return self.second
        over = _grid.grouped(1 / by[None], self.block)[0]
        return self.second * over[:, :, None] * over[:, None, :]

    def _check(self) -> None:
        if not self.count:
            raise ModelError("the calibration data holds padding only")
