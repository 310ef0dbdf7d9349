"""adapt.pissa: the largest singular directions of a weight as its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.passes.adapt._form.low_rank import (
    RankOptions,
    RankPass,
    add_low_rank,
    rank_of,
    shapes,
)
from graphwright.passes.adapt._form.residual import take_out, weight_matrix
from graphwright.passes.adapt._form.slices import (
    SlicedOptions,
    add_sliced,
    check_rank,
    find_slices,
    no_slices,
    slices_of,
)
from graphwright.passes.adapt._math.svd import truncated_svd
from graphwright.passes.base import Context


class PissaOptions(SlicedOptions, RankOptions):
    """Options of adapt.pissa."""

    iterations: Annotated[int, Field(ge=0)] | None = None
    """Rounds of the fast decomposition by random projections (the paper uses 16); the exact one
    when absent."""


class Pissa(RankPass[PissaOptions]):
    """Moves the largest singular triplets of every weight into a low-rank branch, and trains those.

    With W = U S V^T, a = sqrt(S_r) V_r^T and b = U_r sqrt(S_r) are trained, and the residual
    W - b a stays as it is. Nothing is scaled and nothing dropped. A pass that quantizes behind it
    rounds the residual alone, which has lost its largest values (QPiSSA with one round).

    Source: Meng et al. 2024, "PiSSA", equations 2 to 4.
    """

    papers = ("P42",)
    weights = "reformed"

    def prepare(
        self, program: Program, chosen: Sequence[Layer], context: Context
    ) -> dict[str, list[Tensor]]:
        """The slices of outputs that are changed, by layer."""
        return find_slices(program, chosen, self.options.outputs, self.id)

    def refusal(self, layer: Layer) -> str:
        return super().refusal(layer) or no_slices(layer, self.options.outputs)

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        rank = rank_of(self.options, layer)
        matrix = weight_matrix(branch, layer)
        if self.options.outputs:
            return self._attach_slices(branch, layer, matrix, generator, rank)
        u, s, vh = truncated_svd(matrix, rank, self.options.iterations, generator)
        root = s.sqrt()
        size_a, size_b = shapes(layer, rank)
        a = (root[:, None] * vh).to(branch.dtype)
        b = (u * root).to(branch.dtype)
        take_out(branch, layer, b.double() @ a.double())
        share = float(s.square().sum() / matrix.square().sum().clamp_min(1e-30))
        stored_a = branch.parameter("lora_a", a.reshape(size_a))
        stored_b = branch.parameter("lora_b", b.reshape(size_b))
        add_low_rank(branch, layer, stored_a, stored_b, 1.0)
        return f"rank {rank}, {share:.0%} of the weight's squares"

    def _attach_slices(
        self,
        branch: Branch,
        layer: Layer,
        matrix: Tensor,
        generator: torch.Generator,
        rank: int,
    ) -> str:
        """The largest triplets of every slice of the outputs by itself; all run as one."""
        slices = slices_of(branch, layer)
        if not slices:
            return "has none of the outputs"
        check_rank(layer, slices, rank)
        part = torch.zeros_like(matrix)
        left, right, kept = [], [], 0.0
        for channels in slices:
            own = matrix[channels]
            u, s, vh = truncated_svd(own, rank, self.options.iterations, generator)
            right.append((s.sqrt()[:, None] * vh).to(branch.dtype))
            left.append((u * s.sqrt()).to(branch.dtype))
            part[channels] = left[-1].double() @ right[-1].double()
            kept += float(s.square().sum() / own.square().sum().clamp_min(1e-30))
        take_out(branch, layer, part)
        add_sliced(branch, layer, slices, torch.cat(right), torch.cat(left), 1.0)
        return f"{len(slices)} of rank {rank}, {kept / len(slices):.0%} of their squares"
