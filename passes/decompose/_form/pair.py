"""Two layers in the place of one, of factors of its matrix."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

from torch import Tensor

from graphwright.ir.edit import Editor
from graphwright.ir.layers.factors import Factors
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.decompose._form.stages import Stage, insert_stages

Form = Literal["channel", "spatial"]
"""The two ways to cut a kernel in two: all of it, then 1x1; or its first axis, then the others."""


def as_pair_matrix(weight: Tensor, form: Form) -> Tensor:
    """The matrix whose factors are the two kernels: (out, in * k) for `channel`, and
    (out * k_rest, in * k_first) for `spatial`. `weight` is (out, in, *k)."""
    if form == "channel":
        return weight.flatten(1)
    matrix = weight.movedim((1, 2), (-2, -1))
    return matrix.reshape(-1, weight.shape[1] * weight.shape[2])


def cost_per_rank(shape: Sequence[int], form: Form = "channel") -> int:
    """Parameters that one rank costs for a weight (out, in, *k)."""
    if form == "channel":
        return shape[0] + prod(shape[1:])
    return shape[0] * prod(shape[3:]) + shape[1] * shape[2]


def insert_pair(
    editor: Editor, uses: Sequence[Layer], factors: Factors, form: Form = "channel"
) -> list[str]:
    """Puts the layers `v` (a) and `u` (b) in the place of every use of a weight.

    Args:
        editor: of a copy of the program that the layers were found in.
        uses: all layers that read the weight.
        factors: of its matrix, or of `as_pair_matrix` of a kernel.
        form: as the matrix was made.

    Returns:
        Names of the two stored weights.
    """
    shape, rank = editor.state[uses[0].weight].shape, len(factors.a)
    axes = tuple(range(len(shape) - 2))
    if not axes:
        stages = [Stage("v", factors.a), Stage("u", factors.b)]
    elif form == "channel":
        stages = [
            Stage("v", factors.a.reshape(rank, *shape[1:]), axes),
            Stage("u", factors.b.reshape(shape[0], rank, *(1 for _ in axes))),
        ]
    else:
        first = factors.a.reshape(rank, shape[1], shape[2], *(1 for _ in axes[1:]))
        second = factors.b.reshape(shape[0], *shape[3:], rank).movedim(-1, 1).unsqueeze(2)
        stages = [Stage("v", first, axes[:1]), Stage("u", second, axes[1:])]
    return insert_stages(editor, uses, stages)
