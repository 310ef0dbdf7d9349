"""Patterns of masks: a share of the weights, or N of every M."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.options import Bounded, Rule, Targets
from graphwright.passes.prune._masks.nm_mask import nm_mask

Scope = Literal["row", "layer"]


@dataclass(frozen=True)
class Pattern:
    """The share of a matrix that becomes zero, and the allowed places.

    Attributes:
        sparsity: share of zeros.
        n, m: n of every m consecutive entries of a row stay; 0 where zeros may lie anywhere.
    """

    sparsity: float
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, pattern: str, sparsity: float | None) -> Pattern:
        """The pattern that options mean: `2:4`, or `unstructured` with a share (0.5)."""
        if pattern == "unstructured":
            return cls(0.5 if sparsity is None else sparsity)
        n, m = (int(part) for part in pattern.split(":"))
        return cls(1 - n / m, n, m)

    def count(self, size: int) -> int:
        """Zeros among `size` entries: the share of them, rounded down."""
        return math.floor(size * self.sparsity + 1e-9)

    def keep(self, score: Tensor, scope: Scope = "row") -> Tensor:
        """A mask of the entries of a matrix that stay; the lowest scores go, of equal ones the
        first.

        Args:
            score: (rows, columns).
            scope: an unstructured pattern has its share in every row, or in the whole matrix.

        Returns:
            A boolean tensor (rows, columns).
        """
        if self.m:
            return nm_mask(score, self.n, self.m)
        if scope == "layer":
            return all_but_lowest(score.reshape(-1), self.count(score.numel())).reshape(score.shape)
        lowest = torch.sort(score, dim=1, stable=True).indices[:, : self.count(score.shape[1])]
        return torch.ones_like(score, dtype=torch.bool).scatter_(1, lowest, False)

    def misfit(self, columns: int) -> str:
        """The reason why a matrix of that many columns cannot have the pattern; empty when it
        can."""
        if self.m and columns % self.m:
            return f"its {columns} inputs do not divide into groups of {self.m}"
        return ""


def all_but_lowest(score: Tensor, count: int) -> Tensor:
    """Mask (n,) that leaves out the `count` lowest of n scores, of equal ones the first."""
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    limit = score.kthvalue(count).values  # no sort: a layer may hold millions
    tied = score == limit
    spare = count - int((score < limit).sum())
    return (score >= limit) & ~(tied & (tied.cumsum(0) <= spare))


def found_pattern(keep: Tensor) -> Pattern:
    """The pattern that a mask has: N:M when every group of 2, 4, 8 or 16 keeps equally many.

    A single group to a row is no pattern: any mask with equal rows looks like that.

    Args:
        keep: (rows, columns) boolean.
    """
    rows, columns = keep.shape
    for m in (2, 4, 8, 16):
        if columns % m == 0 and columns > m:
            kept = keep.reshape(rows, columns // m, m).sum(2)
            n = int(kept[0, 0])
            if 0 < n < m and bool((kept == n).all()):
                return Pattern(1 - n / m, n, m)
    return Pattern(1 - float(keep.float().mean()))


class SparsityOptions(Bounded, Targets):
    """Options that all passes share that set weights to zero."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("pattern", "':' not in pattern or "
             "int(pattern.split(':')[0]) < int(pattern.split(':')[1])",
             "N must be below M: {pattern} prunes nothing"),
        Rule("sparsity", "sparsity is None or ':' not in pattern or abs(sparsity - 1 + "
             "int(pattern.split(':')[0]) / int(pattern.split(':')[1])) < 1e-9",
             "the pattern {pattern} has a sparsity of its own, 1 - N/M, and not {sparsity}"),
    )  # fmt: skip

    pattern: Annotated[str, Field(pattern=r"^(unstructured|[1-9][0-9]*:[1-9][0-9]*)$")] = (
        "unstructured"
    )
    """Allowed places of zeros: `unstructured`, anywhere; `N:M` such as `2:4`, N of every M
    consecutive weights along a layer's inputs stay (a convolution's inputs are counted channel by
    channel, each with all its kernel positions)."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of weights that become zero; 0.5 when absent. An N:M pattern says its own, 1 - N/M."""

    def wanted(self) -> Pattern:
        """The pattern that the options mean."""
        return Pattern.parse(self.pattern, self.sparsity)
