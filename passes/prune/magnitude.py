"""prune.magnitude: the smallest weights become zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphwright.ir.layers.products import from_matrix, geometry
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.passes.base import MATRICES, Action, Context, Need, Pass, Result
from graphwright.passes.prune._masks.distribution import LayerwiseOptions, distributed
from graphwright.passes.prune._masks.layers import maskable, matrix, share_of_zeros, with_weights
from graphwright.passes.prune._masks.patterns import Pattern


class MagnitudeOptions(LayerwiseOptions):
    """Options of prune.magnitude."""

    rules = (
        Rule("scope", "scope != 'global' or distribution == 'uniform'",
             "scope global finds its own sparsity of every layer: leave out distribution "
             "{distribution}"),
        Rule("scope", "scope is None or pattern == 'unstructured'",
             "the pattern {pattern} compares within its groups"),
    )  # fmt: skip

    scope: Literal["global", "layer", "row"] | None = None
    """Weights that are compared with each other, and so share the sparsity: all selected layers,
    one layer, or one row (the weights of one output); a layer when absent. An N:M pattern
    compares within its groups and takes no scope."""


class Magnitude(Pass[MagnitudeOptions]):
    """Sets the weights of least absolute value to zero. Looks at no data, but for the distribution
    `owl`.

    Source: Han et al. 2015, "Learning both weights and connections for efficient neural
    networks", section 3; the baseline of the other pruning passes.
    """

    contract = "lossy"
    takes = MATRICES
    needs_with: ClassVar[Mapping[tuple[str, Any], Need]] = {("distribution", "owl"): "calibration"}

    def run(self, program: Program, context: Context) -> Result:
        pattern = self.options.wanted()
        layers, actions = maskable(program, self.options.targets, pattern)
        own = list({layer.weight: layer for layer in layers}.values())
        limit = _Limit.of(program, own, pattern) if self.options.scope == "global" else None
        patterns = distributed(program, own, self.options, context)
        weights = {}
        for layer in own:
            w = matrix(program, layer)
            if limit is None:
                keep = _keep(w, patterns[layer.name], self.options.scope)
            else:
                keep = limit.keep(w)
            weights[layer.weight] = from_matrix(geometry(program, layer), w.where(keep, 0.0))
            actions.append(Action(layer.name, f"{1 - float(keep.float().mean()):.1%} zeros"))
        pruned = with_weights(program, self.id, weights)
        metrics = {"layers": float(len(own)), "sparsity": share_of_zeros(pruned, list(weights))}
        return Result(pruned, tuple(actions), metrics)


def _keep(w: Tensor, pattern: Pattern, scope: str | None) -> Tensor:
    """Mask of a layer's matrix (groups, rows, columns)."""
    rows = w.abs().flatten(0, 1)
    return pattern.keep(rows, "row" if scope == "row" else "layer").reshape(w.shape)


class _Limit:
    """The magnitude below which weights go, over many layers: exactly the wanted number of them.

    Args:
        value: magnitude of the last weight that goes.
        ties: how many of the weights of just that magnitude go, the first ones.
    """

    def __init__(self, value: float, ties: int) -> None:
        self.value, self.ties = value, ties

    @classmethod
    def of(cls, program: Program, layers: Sequence[Layer], pattern: Pattern) -> _Limit:
        sizes = torch.cat([matrix(program, layer).abs().flatten() for layer in layers])
        count = pattern.count(sizes.numel())
        if count == 0:
            return cls(-math.inf, 0)
        value = sizes.kthvalue(count).values
        return cls(float(value), count - int((sizes < value).sum()))

    def keep(self, w: Tensor) -> Tensor:
        """Mask of one layer; layers come in the order they were counted in."""
        size = w.abs()
        tied = (size == self.value).flatten()
        first = tied & (tied.cumsum(0) <= self.ties)
        self.ties -= int(first.sum())
        return (size >= self.value) & ~first.reshape(w.shape)
