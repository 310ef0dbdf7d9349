"""The optimal brain surgeon with an inverse Fisher: the weights it removes, and the moves of the
rest.

Weights are one vector in which N:M groups and blocks lie side by side. A weight that is gone stays
gone: its place is left out of the Fisher matrix.

Source: Frantar, Kurtic, Alistarh 2021, "M-FAC", section 4.1: scores w_k^2 / (2 [F^-1]_kk), one
update F^-1 u for all that goes, in which u_k = -w_k / [F^-1]_kk. For blocks Q the same with
1/2 w_Q ([F^-1]_QQ)^-1 w_Q and u_Q = -([F^-1]_QQ)^-1 w_Q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.layers.products import Geometry, as_matrix, from_matrix, geometry
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.tune.fisher import Fisher


@dataclass(frozen=True)
class Vector:
    """Weights of some layers as one vector, matrix by matrix, row by row; tied weights once.

    Attributes:
        geometries: by weight name, in order.
        sizes: values of each.
    """

    geometries: Mapping[str, Geometry]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, program: Program, layers: list[Layer]) -> Vector:
        """The vector of these layers' weights."""
        found = {layer.weight: geometry(program, layer) for layer in layers}
        return cls(found, tuple(program.state[name].numel() for name in found))

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors in the shape of the weights as one vector."""
        parts = [as_matrix(g, tensors[name].detach()).flatten()
                 for name, g in self.geometries.items()]  # fmt: skip
        return torch.cat(parts)

    def weights(self, flat: Tensor) -> dict[str, Tensor]:
        """The weights that a vector stands for; undoes `flat`."""
        found = {}
        for (name, g), part in zip(self.geometries.items(), flat.split(self.sizes), strict=True):
            found[name] = from_matrix(g, part.reshape(g.groups, g.out // g.groups, g.depth))
        return found


@dataclass(frozen=True)
class Structure:
    """The unit of removal.

    Attributes:
        n, m: every m consecutive weights keep n of them; m is 0 where any weight may go.
        block: consecutive weights that only go together.
    """

    n: int = 0
    m: int = 0
    block: int = 1


def surgery(
    weights: Tensor, kept: Tensor, fisher: Fisher, structure: Structure, left: int
) -> tuple[Tensor, Tensor, float]:
    """Removes weights until `left` are kept, and moves the others once.

    Args:
        weights: (d,) float64, zero where not kept.
        kept: (d,) flags.
        fisher: over the kept weights, in order.
        structure: what may go together.
        left: weights to keep, at most those that are; a multiple of the block length.

    Returns:
        New weights, new flags, and the loss increase that the scores predict.

    Raises:
        ModelError: the update is not finite.
    """
    w = weights[kept]
    pieces = w.reshape(-1, structure.block)
    if structure.block == 1:
        pull = pieces / fisher.diagonal()[:, None]
    else:
        pull = torch.linalg.solve(fisher.diagonal_blocks(structure.block), pieces)
    scores = (pieces * pull).sum(1) / 2
    scores = torch.where((pieces != 0).any(1), scores, -1.0)  # zeros go first, for nothing
    candidates = _candidates(scores, kept, structure)
    count = min((len(w) - left) // structure.block, len(candidates))
    order = torch.sort(scores[candidates], stable=True).indices[:count]
    going = torch.zeros(len(pieces), dtype=torch.bool, device=w.device)
    going[candidates[order]] = True
    u = torch.where(going[:, None], -pull, 0.0).flatten()
    moved = w + fisher.product(u) if count else w.clone()
    if not bool(torch.isfinite(moved).all()):
        raise ModelError("the update of the remaining weights is not finite",
                         fix="Raise `damp`.")  # fmt: skip
    gone = going.repeat_interleave(structure.block)
    moved[gone] = 0.0
    new_weights, new_kept = torch.zeros_like(weights), kept.clone()
    new_weights[kept] = moved
    new_kept[kept] = ~gone
    return new_weights, new_kept, float(scores[going].clamp_min(0).sum())


def _candidates(scores: Tensor, kept: Tensor, structure: Structure) -> Tensor:
    """Indices of scores that may go without a group of m losing more than m - n."""
    if not structure.m:
        return torch.arange(len(scores), device=scores.device)
    ranked = torch.full(kept.shape, float("-inf"), dtype=scores.dtype, device=scores.device)
    ranked[kept] = scores
    order = torch.sort(ranked.reshape(-1, structure.m), dim=1, stable=True).indices
    may_go = torch.zeros_like(order, dtype=torch.bool)
    may_go.scatter_(1, order[:, : structure.m - structure.n], True)
    return may_go.flatten()[kept].nonzero()[:, 0]


def kept_after(kept: int, target: int, step: int, steps: int) -> int:
    """Weights kept after a sub-step: the same share of them goes in every one.

    Args:
        kept: weights before the first.
        target: weights after the last.
        step: 1 to `steps`.
        steps: sub-steps.
    """
    if step == steps or target >= kept or target == 0:
        return min(kept, target)
    return round(kept * math.pow(target / kept, step / steps))
