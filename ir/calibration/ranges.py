"""Estimators of the range that values take: from extremes, or from a histogram of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError

BINS = 2048
"""Histogram bins on each side of zero."""

LEVELS = 128
"""Positive levels that the entropy estimator maps the histogram to."""

FEWEST_VALUES = 256
"""Fewer values than this say nothing about tails: the histogram estimators refuse them."""


class RangeObserver(Protocol):
    """An observer that ends with a range."""

    def update(self, x: Tensor) -> None:
        """Takes note of one batch's value."""

    def range(self) -> tuple[float, float]:
        """(low, high) to be represented; before it is extended to hold zero."""


class MinMax:
    """The extremes over all batches."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")

    def update(self, x: Tensor) -> None:
        low, high = torch.aminmax(x.detach())
        self.low = min(self.low, float(low))
        self.high = max(self.high, float(high))

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class MovingAverage:
    """Exponential moving average of every batch's extremes (Jacob et al. 2018, section 3.1)."""

    def __init__(self, rate: float = 0.01) -> None:
        self.rate = rate
        self.ends: tuple[float, float] | None = None

    def update(self, x: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if self.ends is None:
            self.ends = (low, high)
            return
        keep = 1 - self.rate
        self.ends = (keep * self.ends[0] + self.rate * low, keep * self.ends[1] + self.rate * high)

    def range(self) -> tuple[float, float]:
        if self.ends is None:
            raise ArgumentError("no calibration batch was seen")
        return self.ends


class Histogram:
    """Counts in 2 x 2048 equal bins over [-limit, limit]; the limit doubles as the data grows.

    Doubling merges neighbouring bins, so that no count is ever split and memory stays fixed.

    Args:
        estimate: turns the finished histogram into a range.
    """

    def __init__(self, estimate: Callable[[Histogram], tuple[float, float]]) -> None:
        self.estimate = estimate
        self.counts = np.zeros(2 * BINS)
        self.limit = 0.0
        self.extremes = MinMax()

    def update(self, x: Tensor) -> None:
        x = x.detach().float()
        self.extremes.update(x)
        largest = float(x.abs().max())
        if self.limit == 0.0 and largest > 0.0:
            zeros, self.counts = self.counts.sum(), np.zeros(2 * BINS)
            self.limit = largest
            self.counts[BINS] = zeros
        while largest > self.limit:
            left, right = self.counts[:BINS], self.counts[BINS:]
            half = np.zeros(BINS // 2)
            self.counts = np.concatenate(
                [half, left.reshape(-1, 2).sum(1), right.reshape(-1, 2).sum(1), half]
            )
            self.limit *= 2
        if self.limit == 0.0:
            self.counts[BINS] += x.numel()
            return
        found = torch.histc(x, bins=2 * BINS, min=-self.limit, max=self.limit)
        self.counts += found.double().cpu().numpy()

    @property
    def edges(self) -> np.ndarray[Any, Any]:
        """The 2 x 2048 + 1 bin edges."""
        return np.linspace(-self.limit, self.limit, 2 * BINS + 1)

    def range(self) -> tuple[float, float]:
        if self.counts.sum() < FEWEST_VALUES:
            raise ArgumentError(
                f"calibration gave {int(self.counts.sum())} values, and the estimator needs "
                f"{FEWEST_VALUES}",
                fix="Give more samples, or use the range estimator min_max.",
            )
        if self.limit == 0.0:
            return 0.0, 0.0
        low, high = self.estimate(self)
        return max(low, self.extremes.low), min(high, self.extremes.high)


def percentile_range(histogram: Histogram, percent: float) -> tuple[float, float]:
    """The range that holds `percent` of the values, with half of the rest beyond each end."""
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = (1 - percent / 100) / 2
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    edges = histogram.edges
    return float(edges[first]), float(edges[min(last, 2 * BINS - 1) + 1])


def entropy_range(histogram: Histogram) -> tuple[float, float]:
    """The symmetric threshold whose 128-level version of |x| has the least KL divergence.

    Source: Migacz 2017, "8-bit inference with TensorRT": values beyond the threshold are added to
    its last bin; the quantized distribution is spread over the bins that were not empty. As in
    public code of it, the bin at zero counts like its neighbour: zero is a level of its own in
    any range, and the zeros of a ReLU would outweigh all that a threshold cuts.
    """
    magnitude = histogram.counts[BINS:] + histogram.counts[:BINS][::-1]
    magnitude[0] = magnitude[1]
    best, threshold = np.inf, BINS
    for bins in range(LEVELS, BINS + 1, 8):
        divergence = _divergence(magnitude, bins)
        if divergence < best:
            best, threshold = divergence, bins
    limit = histogram.limit * threshold / BINS
    return -limit, limit


def _divergence(magnitude: np.ndarray[Any, Any], bins: int) -> float:
    kept = magnitude[:bins]
    p = kept.copy()
    p[-1] += magnitude[bins:].sum()
    level = np.arange(bins) * LEVELS // bins
    filled = kept > 0
    mass = np.bincount(level, weights=kept, minlength=LEVELS)
    width = np.bincount(level, weights=filled, minlength=LEVELS)
    q = np.where(filled, mass[level] / np.maximum(width[level], 1), 0.0)
    both = (p > 0) & (q > 0)
    if not both.any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    # A bin with clipped mass only has no counterpart; the usual floor keeps it finite.
    lost = (p > 0) & (q == 0)
    missing = float((p[lost] * np.log(p[lost] / 1e-10)).sum())
    return float((p[both] * np.log(p[both] / q[both])).sum()) + missing


def mse_range(histogram: Histogram) -> tuple[float, float]:
    """The range whose uint8 version has the least squared error over the histogram.

    100 shares of the full range, from 0.2 to 1, are tried for both ends together and then for
    each end alone.
    """
    edges = histogram.edges
    used = histogram.counts > 0
    centers = ((edges[1:] + edges[:-1]) / 2)[used]
    weights = histogram.counts[used]
    low, high = min(histogram.extremes.low, 0.0), max(histogram.extremes.high, 0.0)

    def error(ends: tuple[float, float]) -> float:
        step = (ends[1] - ends[0]) / 255  # above 0: some value is, and the range holds zero
        zero = np.clip(np.rint(-ends[0] / step), 0, 255)
        codes = np.clip(np.rint(centers / step) + zero, 0, 255)
        return float((weights * (centers - (codes - zero) * step) ** 2).sum())

    shares = np.linspace(1.0, 0.2, 100)
    best = min(((low * s, high * s) for s in shares), key=error)
    best = min([best, *((best[0], high * s) for s in shares)], key=error)
    best = min([best, *((low * s, best[1]) for s in shares)], key=error)
    return float(best[0]), float(best[1])


def range_observer(kind: str, percent: float = 99.99) -> RangeObserver:
    """A fresh observer by the name of its estimator."""
    if kind == "min_max":
        return MinMax()
    if kind == "moving_average":
        return MovingAverage()
    if kind == "percentile":
        return Histogram(lambda h: percentile_range(h, percent))
    if kind == "entropy":
        return Histogram(entropy_range)
    if kind == "mse":
        return Histogram(mse_range)
    raise ArgumentError(f"no range estimator named {kind!r}")
