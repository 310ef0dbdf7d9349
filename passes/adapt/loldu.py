"""adapt.loldu: the pivots of a weight's LDU factors as its adapter."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.low_rank import (
    RankOptions,
    RankPass,
    back,
    change,
    rank_of,
    shapes,
    through,
)
from graphwright.passes.adapt._form.residual import take_out, weight_matrix

aten = torch.ops.aten

SMALLEST = 1e-6
"""Pivots below this share of the largest are taken for zero."""


class LolduOptions(RankOptions):
    """Options of adapt.loldu."""

    alpha: Annotated[float, Field(gt=0)] = 1.0
    """The trained part is multiplied by alpha / rank."""

    train_scale: bool = False
    """Whether that factor is trained too, one number per layer. (The paper says so, its code does
    not.)"""


class Loldu(RankPass[LolduOptions]):
    """Trains the first pivots of W = P L D U, one number for each rank, between fixed triangles.

    The first `rank` columns of L and rows of U stay fixed, their pivots are trained, and the rest
    of W stays as a residual. It is the least that an adapter can train, and no approximation of
    W: pivots come in the order of elimination and not of size.

    Source: Shi et al. 2024, "LoLDU", equations 3 to 6. The residual is always that of the stored
    pivots; the published code leaves out the factor alpha / rank for some starts.
    """

    papers = ("P27",)
    weights = "reformed"

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        rank = rank_of(self.options, layer)
        left, pivots, right = ldu(weight_matrix(branch, layer), rank, layer.name)
        dtype, scale = branch.dtype, self.options.alpha / rank
        branch.scale = scale
        left, pivots, right = left.to(dtype), pivots.to(dtype), right.to(dtype)
        part = scale * (left.double() * pivots.double()) @ right.double()
        take_out(branch, layer, part)
        size_a, size_b = shapes(layer, rank)
        u = branch.constant("upper", right.reshape(size_a))
        lower = branch.constant("lower", left.reshape(size_b))
        z = branch.parameter("pivots", pivots)
        if self.options.train_scale:
            factor = branch.parameter("scale", torch.full((1,), scale))
            z = branch.add(aten.mul.Tensor, z, factor)
        else:
            z = branch.add(aten.mul.Scalar, z, scale)
        low = through(branch, layer, u)
        spatial = len(size_a) - 2
        if spatial > 0:
            z = branch.add(aten.reshape.default, z, [rank, *(1,) * spatial])
        low = branch.add(aten.mul.Tensor, low, z)
        branch.finish(branch.add(aten.add.Tensor, branch.tip, back(branch, layer, low, lower)))
        return f"{rank} pivots"

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        lower, upper, z = (layer.parts[part] for part in ("lower", "upper", "pivots"))
        scale = layer.parts.get("scale", layer.scale)
        b = lower.flatten(1) * (z * scale)
        return layer.weight + change(layer, upper, b.reshape(lower.shape)), layer.bias


def ldu(matrix: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` columns of P L, pivots, and rows of U of a matrix.

    Args:
        matrix: (out, columns), float64.
        rank: at most min(out, columns).
        name: of the layer, for the message.

    Returns:
        (out, rank), whose rows are in the order of the matrix; (rank,); (rank, columns), with ones
        on its diagonal.

    Raises:
        ModelError: one of these pivots is zero: the matrix has no such rank.
    """
    permutation, lower, upper = torch.linalg.lu(matrix)
    pivots = upper.diagonal()[:rank]
    least = float(pivots.abs().min() / upper.diagonal().abs().max().clamp_min(1e-300))
    if not least >= SMALLEST:
        raise ModelError(
            f"the first {rank} pivots of {name!r} hold one that is zero: its weight has a lower "
            "rank there",
            fix="Lower `rank` for it, or leave it out of targets.",
        )
    return (permutation @ lower)[:, :rank], pivots, upper[:rank] / pivots[:, None]
