"""adapt.lora_xs: a small square matrix between a weight's own singular directions."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.core import add_core, with_core
from graphwright.passes.adapt._form.low_rank import RankPass, ScaledOptions, rank_of, scale_of
from graphwright.passes.adapt._form.residual import weight_matrix
from graphwright.passes.adapt._math.svd import truncated_svd


class LoraXsOptions(ScaledOptions):
    """Options of adapt.lora_xs."""

    iterations: Annotated[int, Field(ge=0)] | None = 10
    """Rounds of the fast decomposition by random projections; the exact one when absent."""

    deviation: Annotated[float, Field(ge=0)] = 1e-5
    """Standard deviation of the matrix that training starts from."""


class LoraXs(RankPass[LoraXsOptions]):
    """Trains a matrix of rank by rank numbers in every layer, whatever the layer's size.

    With W ~ U S V^T, the branch is s U_r R S_r V_r^T x: its outer factors are the weight's own and
    stay fixed, and R starts next to zero. The weight is left as it is.

    Source: Balazy et al. 2024, "LoRA-XS", section 3; the baseline of P88.
    """

    papers = ("P88",)
    tolerance = 1e-3

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        options = self.options
        rank = rank_of(options, layer)
        matrix = weight_matrix(branch, layer)
        u, s, vh = truncated_svd(matrix, rank, options.iterations, generator)
        core = torch.randn((rank, rank), generator=generator) * options.deviation
        add_core(branch, layer, s[:, None] * vh, core, u, scale_of(options, layer), options.dropout)
        return f"rank {rank}"

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        return with_core(layer)
