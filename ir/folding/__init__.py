"""Stretches of a graph that are one convolution (or one linear layer), and putting that in."""

from __future__ import annotations

from graphwright.ir.folding.convolved import Convolved, NotFoldable
from graphwright.ir.folding.emit import emit
from graphwright.ir.folding.regions import Branch, Region, convolved, fold, regions_from

__all__ = [
    "Branch",
    "Convolved",
    "NotFoldable",
    "Region",
    "convolved",
    "emit",
    "fold",
    "regions_from",
]
