"""adapt.pissa: the largest singular directions of a weight as its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.ir.stored.table import quantize
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


class QuantizedOptions(Options):
    """Options of a residual that is quantized afterwards."""

    rounds: Annotated[int, Field(ge=2)] = 5
    """Times that the branch is fitted anew to what rounding the residual leaves (the published
    script takes 5)."""

    block: Literal[16, 32, 64, 128, 256] = 64
    """`block` of the quantize.nf4 behind it."""

    double_quantization: bool = True
    """`double_quantization` of the quantize.nf4 behind it."""


class PissaOptions(SlicedOptions, RankOptions):
    """Options of adapt.pissa."""

    iterations: Annotated[int, Field(ge=0)] | None = None
    """Rounds of the fast decomposition by random projections (the paper uses 16); the exact one
    when absent."""

    quantized: QuantizedOptions | None = None
    """How the residual will be quantized (by quantize.nf4, behind this pass), so that the branch is
    fitted to what rounding leaves (QPiSSA); when absent, it is fitted to the weight alone."""

    @model_validator(mode="after")
    def _blocks_are_whole(self) -> Self:
        if self.quantized and self.outputs:
            raise ValueError(
                "quantized and outputs do not go together: blocks of the quantizer cross slices"
            )
        return self


class Pissa(RankPass[PissaOptions]):
    """Moves the largest singular triplets of every weight into a low-rank branch, and trains those.

    With W = U S V^T, a = sqrt(S_r) V_r^T and b = U_r sqrt(S_r) are trained, and the residual
    W - b a stays as it is. Nothing is scaled and nothing dropped. A pass that quantizes behind it
    rounds the residual alone, which has lost its largest values (QPiSSA with one round). With
    `quantized`, the triplets are those of W - D, where D is the rounded residual of the round
    before: branch and rounding are fitted to each other by turns. The residual itself stays in
    float until quantize.nf4 rounds it as the last round did.

    Source: Meng et al. 2024, "PiSSA", equations 2 to 4 and algorithm 1 (QPiSSA).
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
        size_a, size_b = shapes(layer, rank)
        a, b = self._factors(matrix, rank, branch.dtype, generator)
        part = b.double() @ a.double()
        take_out(branch, layer, part)
        share = float(part.square().sum() / matrix.square().sum().clamp_min(1e-30))
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
            a, b = self._factors(own, rank, branch.dtype, generator)
            right.append(a)
            left.append(b)
            part[channels] = b.double() @ a.double()
            kept += float(part[channels].square().sum() / own.square().sum().clamp_min(1e-30))
        take_out(branch, layer, part)
        add_sliced(branch, layer, slices, torch.cat(right), torch.cat(left), 1.0)
        return f"{len(slices)} of rank {rank}, {kept / len(slices):.0%} of their squares"

    def _factors(
        self, matrix: Tensor, rank: int, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """a (rank, columns) and b (out, rank) of the largest triplets, in the weight's dtype."""
        quantized = self.options.quantized
        target = matrix
        for _ in range(quantized.rounds if quantized else 1):
            u, s, vh = truncated_svd(target, rank, self.options.iterations, generator)
            a, b = (s.sqrt()[:, None] * vh).to(dtype), (u * s.sqrt()).to(dtype)
            if quantized:
                rest = (matrix - b.double() @ a.double()).to(dtype)
                stored = quantize(
                    rest, "nf4", quantized.block, double=quantized.double_quantization
                )
                target = matrix - stored.value().double()
        return a, b
