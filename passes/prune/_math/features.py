"""Statistics of a layer's input features: mean, variance and size, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.calibration.site import Site


@dataclass(frozen=True)
class Features:
    """Statistics of a layer's rows, all float32 (groups, columns).

    Attributes:
        mean: over all rows of the calibration data.
        variance: around it, of the population.
        norm: root of the mean square.
        total: mean over samples of the sum over a sample's rows (its tokens, its windows).
    """

    mean: Tensor
    variance: Tensor
    norm: Tensor
    total: Tensor


def features(site: Site) -> Features:
    """Statistics of an activation; one batch is in memory at a time.

    Batches are merged in float64 by their means and squared deviations (Chan et al. 1979), so a
    feature far from zero keeps the digits of its variance.
    """
    count, samples, empty = 0, 0, torch.zeros(())
    mean: Tensor | None = None
    squares: Tensor | None = None
    for x, batch in zip(site.inputs(), site.rows(), strict=True):
        samples += _samples(x, len(site.geometry.stride))
        n, empty = batch.shape[1], batch
        if n == 0:
            continue
        rows = batch.double()
        middle = rows.mean(1)
        around = (rows - middle.unsqueeze(1)).square().sum(1)
        if mean is None or squares is None:
            mean, squares, count = middle, around, n
            continue
        gap, together = middle - mean, count + n
        squares = squares + around + gap.square() * (count * n / together)
        mean = mean + gap * (n / together)
        count = together
    if mean is None or squares is None:  # an expert that no token went to: all inputs are alike
        none = torch.zeros(empty.shape[0], empty.shape[2], device=empty.device)
        return Features(none, none, torch.ones_like(none), none)
    variance = squares / count
    norm = (variance + mean.square()).sqrt()
    return Features(*(t.float() for t in (mean, variance, norm, mean * (count / max(1, samples)))))


def _samples(x: Tensor, spatial: int) -> int:
    """Samples in a batch: its first dimension, unless the activation is one sample alone."""
    if spatial:
        return x.shape[0] if x.dim() == spatial + 2 else 1
    return x.shape[0] if x.dim() > 1 else 1
