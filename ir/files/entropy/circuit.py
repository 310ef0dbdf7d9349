"""The circuit: a sum over hidden types of a row, over products of one categorical per entry.

p(row) = sum_k pi_k prod_j theta_k[row_j]: smooth and decomposable, so that any marginal is a pass
with the entries left out set to 1. All that a coder needs of it is integers, kept with the stream:
the float arithmetic that found them does not have to come out alike on two machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SCALE_BITS = 16
SCALE = 1 << SCALE_BITS
"""Frequencies of a distribution sum to this."""

WEIGHT_BITS = 20
WEIGHT = 1 << WEIGHT_BITS
"""Weights of the types sum to this: their products with frequencies, shifted by it once more, stay
below 2**56."""

STEPS, ENOUGH = 60, 1e-5
"""Most steps of expectation maximization, and the relative gain at which it ends."""

PSEUDO_COUNT = 0.1
"""Added to the expected count of every symbol, spread over the alphabet."""


PER_OCTAVE = 8
MOST_LEVEL = 16 * PER_OCTAVE - 1
MANTISSA = np.array([round(256 * 2 ** (i / PER_OCTAVE)) for i in range(PER_OCTAVE)], np.int64)
"""Frequencies are stored as bytes, this many to a factor of 2: exact to 5%, which costs less than
a thousandth of a bit per code."""


@dataclass(frozen=True)
class Circuit:
    """A mixture of row types in integers.

    Attributes:
        weights: (K,) int64, at least 1, sum WEIGHT.
        levels: (K, S) uint8, the logarithms of the frequencies.
    """

    weights: Array
    levels: Array

    @cached_property
    def frequencies(self) -> Array:
        """(K, S) int64, at least 1, rows sum to SCALE: from the levels in whole numbers alone."""
        levels = self.levels.astype(np.int64)
        mass = MANTISSA[levels % PER_OCTAVE] << (levels // PER_OCTAVE)
        found: Array = 1 + mass * (SCALE - mass.shape[1]) // mass.sum(1, keepdims=True)
        found[np.arange(len(found)), found.argmax(1)] += SCALE - found.sum(1)
        return found

    @property
    def types(self) -> int:
        return len(self.weights)

    def cumulative(self) -> Array:
        """(K, S + 1) int64: the sum of the frequencies in front of every symbol."""
        zero = np.zeros((self.types, 1), np.int64)
        return np.concatenate([zero, np.cumsum(self.frequencies, 1)], 1)

    def bits(self, counts: Array) -> Array:
        """(R,): -log2 p(row) of rows with these symbol counts (R, S)."""
        theta = np.log2(self.frequencies / SCALE)
        joint = counts @ theta.T + np.log2(self.weights / WEIGHT)
        top = joint.max(1, keepdims=True)
        found: Array = -(top[:, 0] + np.log2(np.exp2(joint - top).sum(1)))
        return found


def updated(weights: Array, seen: Array) -> Array:
    """The weights of the types (L, K) when each row's next symbol has frequencies `seen` (L, K).

    Bayes' rule in integers, the same on every machine: each type keeps at least 1, and what
    rounding leaves over goes to the likeliest one (the first of equal ones).
    """
    types = weights.shape[1]
    product = weights * seen
    new: Array = 1 + product * (WEIGHT - types) // product.sum(1, keepdims=True)
    new[np.arange(len(new)), new.argmax(1)] += WEIGHT - new.sum(1)
    return new


def fitted(counts: Array, types: int) -> Circuit:
    """Expectation maximization on rows with these symbol counts (R, S).

    Rows are parted into `types` groups by the entropy of what they hold to begin with. A row's
    counts are all that its likelihood depends on.
    """
    rows, symbols = counts.shape
    counts = counts.astype(np.float64)
    share = np.zeros((rows, types))
    share[np.argsort(_spread(counts), kind="stable"), np.arange(rows) * types // rows] = 1
    before = np.inf
    for _ in range(STEPS if types > 1 else 1):
        mass = share.T @ counts + PSEUDO_COUNT / symbols
        log_theta = np.log(mass / mass.sum(1, keepdims=True))
        prior = share.sum(0) + PSEUDO_COUNT
        joint = counts @ log_theta.T + np.log(prior / prior.sum())
        top = joint.max(1, keepdims=True)
        share = np.exp(joint - top)
        total = share.sum(1, keepdims=True)
        cost = -float((top + np.log(total)).sum())
        share /= total
        if before - cost <= ENOUGH * abs(cost):
            break
        before = cost
    octaves = np.log2(mass / mass.max(1, keepdims=True))
    levels = np.clip(np.round(MOST_LEVEL + PER_OCTAVE * octaves), 0, MOST_LEVEL).astype(np.uint8)
    return Circuit(integers(prior, WEIGHT), levels)


def _spread(counts: Array) -> Array:
    """(R,): entropy of each row's symbols."""
    p = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    found: Array = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
    return found


def integers(mass: Array, total: int) -> Array:
    """Whole numbers of at least 1 that sum to `total`, about in proportion to `mass` (n,)."""
    spare = total - len(mass)
    found: Array = 1 + np.floor(mass / mass.sum() * spare).astype(np.int64)
    found[int(np.argmax(mass))] += total - int(found.sum())
    return found
