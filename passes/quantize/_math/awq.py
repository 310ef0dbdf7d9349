"""The arithmetic of AWQ: factors of input channels, and limits of weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from graphwright.ir.stored import grid as grid_math

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
    wide = grid_math.grouped(w, block)
    scale, zero = (v[..., None] for v in grid_math.fit(wide, bits, symmetric=symmetric))
    value = grid_math.decode(grid_math.encode(wide, scale, zero, bits), scale, zero)
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
    wide = grid_math.grouped(w, moments.shape[-1])
    largest = wide.abs().amax(-1)
    best, first, limit = largest, largest, largest
    for step in range(LIMITS):
        tried = largest * (1 - step / STEPS)
        clamped = wide.clamp(-tried[..., None], tried[..., None])
        scale, zero = (v[..., None] for v in grid_math.fit(clamped, bits, symmetric=symmetric))
        change = grid_math.decode(grid_math.encode(clamped, scale, zero, bits), scale, zero) - wide
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
    wide = grid_math.spread(limit, block, w.shape[1])
    return torch.minimum(torch.maximum(w, -wide), wide)


def real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """(n, in) rows of an activation, without padding: where `real` (batch, length) is false."""
    if real is not None and x.dim() >= 3 and x.shape[:2] == real.shape:
        return x[real].reshape(-1, x.shape[-1])
    if real is not None and x.dim() == 2 and x.shape[0] == real.numel():
        return x[real.flatten()]
    return x.reshape(-1, x.shape[-1])


def mean_size(batches: Iterable[Tensor]) -> tuple[Tensor, list[int]]:
    """Mean of |x| of every channel, (in,), over rows (1, n, in) of all batches; and every n."""
    mean, counts = torch.zeros(()), list[int]()
    for (rows,) in batches:
        counts.append(len(rows))
        share = len(rows) / max(sum(counts), 1)
        if len(rows):
            mean = mean.to(rows.device) * (1 - share) + rows.float().abs().mean(0) * share
    return mean, counts


def moments(batches: Iterable[Tensor], block: int) -> Tensor:
    """(blocks, block, block): mean of x x^T within every block of channels, over rows (1, n, in)
    of all batches."""
    found, count = torch.zeros(()), 0
    for (rows,) in batches:
        wide = grid_math.grouped(rows.float(), block).transpose(0, 1)
        count += len(rows)
        share = len(rows) / max(count, 1)
        here = wide.transpose(1, 2) @ wide / max(count, 1)
        found = found.to(rows.device) * (1 - share) + here
    return found
