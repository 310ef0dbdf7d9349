"""adapt.bottleneck: a small network with one hidden layer behind, or beside, a layer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.layers.kinds import MATRICES
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass
from graphwright.passes.adapt._form.low_rank import kaiming, matrix_shape

aten = torch.ops.aten

ACTIVATIONS: dict[str, Any] = {
    "gelu": aten.gelu.default,
    "relu": aten.relu.default,
    "silu": aten.silu.default,
    "tanh": aten.tanh.default,
}


class BottleneckOptions(AdapterOptions):
    """Options of adapt.bottleneck."""

    width: Annotated[int, Field(ge=1)] = 64
    """Values of the hidden layer."""

    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """Function of the hidden layer."""

    reads: Literal["output", "input"] = "output"
    """What the small network reads: the layer's output (Houlsby, Pfeiffer), or its input, beside
    it (AdaptFormer)."""

    scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor of what is added; AdaptFormer's is 0.1."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropout on what the small network reads, while it is trained."""


class Bottleneck(AdapterPass[BottleneckOptions]):
    """Adds s U f(D h + d) + s u to the output of every chosen layer, and trains D, d, U, u.

    The layers are those whose output goes into a residual sum: the projection behind attention and
    the second of a feed-forward block (Houlsby), or the latter alone (Pfeiffer). U and u start at
    zero. The change is not linear, so that it stays in the graph and is exported as it is.

    Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1;
    Pfeiffer et al. 2020, "AdapterFusion"; Chen et al. 2022, "AdaptFormer", equation 2.
    """

    kinds = MATRICES

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        options = self.options
        out, columns = matrix_shape(layer)
        reads = out if options.reads == "output" else columns
        down = branch.parameter("down", kaiming((options.width, reads), generator))
        down_bias = branch.parameter("down_bias", torch.zeros(options.width))
        up = branch.parameter("up", torch.zeros(out, options.width))
        up_bias = branch.parameter("up_bias", torch.zeros(out))
        source = branch.tip if options.reads == "output" else branch.input
        hidden = branch.add(aten.linear.default, source, down, down_bias)
        branch.dropped_from(source, options.dropout, hidden)
        hidden = branch.add(ACTIVATIONS[options.activation], hidden)
        change = branch.add(aten.linear.default, hidden, up, up_bias)
        if options.scale != 1.0:
            change = branch.add(aten.mul.Scalar, change, options.scale)
        branch.finish(branch.add(aten.add.Tensor, branch.tip, change))
        return f"{reads} -> {options.width} -> {out}"
