"""The layout of a layer's weight in rows that N:M groups run along."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers.kinds import (
    CONVOLUTIONS,
    EXPERTS,
    INPUT_AXIS,
    OUTPUT_AXIS,
    TRANSPOSED_CONVOLUTIONS,
)
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.prune._masks.nm_mask import nm_mask

GROUPS_ARGUMENT = 6
"""Position of `groups` in the calls of convolutions, transposed ones too."""


@dataclass(frozen=True)
class NmRows:
    """A weight as rows along its input or its output channels.

    Attributes:
        order: permutation of the weight's dimensions that puts the grouped ones last.
        length: consecutive entries that belong to one row; M has to divide it.
    """

    order: tuple[int, ...]
    length: int

    def mask(self, weight: Tensor, n: int, m: int) -> Tensor:
        """Boolean mask of the weight's shape that keeps the N largest |w| of every M in a row."""
        turned = weight.detach().abs().permute(self.order)
        mask = nm_mask(turned.reshape(-1, self.length), n, m).reshape(turned.shape)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return mask.permute(back)


def nm_rows(layer: Layer, weight: Tensor, along: str) -> NmRows:
    """The rows of a layer's weight along its channels `input` or `output`.

    A convolution's input rows are those of its matrix (out, kernel positions x in), with the
    channels innermost, as in a product over unfolded columns; output channels never share a
    group across the groups of a grouped convolution.
    """
    shape = weight.shape
    inputs = INPUT_AXIS[layer.kind]
    if layer.kind in EXPERTS:  # dimension 0 holds the experts, which share no group
        last = inputs if along == "input" else OUTPUT_AXIS[layer.kind]
        return NmRows((0, 3 - last, last), shape[last])
    last = inputs if along == "input" else 1 - inputs
    order = (1 - last, *range(2, len(shape)), last)
    if layer.kind in CONVOLUTIONS and along == "input":
        return NmRows(order, math.prod(shape[1:]))
    split = _groups(layer) if last == 0 else 1  # dimension 0 of any kernel holds all groups
    return NmRows(order, shape[last] // split)


def _groups(layer: Layer) -> int:
    if layer.kind not in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
        return 1
    return int(full_arguments(layer.node)[0][GROUPS_ARGUMENT])
