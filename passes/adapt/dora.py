"""adapt.dora: a low-rank change of a weight's direction, and its size trained apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import graphwright.ir.ops  # noqa: F401  registers graphwright::add_low_rank
from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.kinds import CONVOLUTIONS, TURNED
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.adapter import AdapterPass, weight_shape
from graphwright.passes.adapt._form.low_rank import (
    ScaledOptions,
    back,
    change,
    groups_of,
    kaiming,
    matrix_shape,
    rank_of,
    scale_of,
    scaled,
    shapes,
    through,
)

aten = torch.ops.aten
ours = torch.ops.graphwright


class DoraOptions(ScaledOptions):
    """Options of adapt.dora."""


class Dora(AdapterPass[DoraOptions]):
    """Lets every chosen layer compute with m (W + s b a) / ||W + s b a||, row by row.

    a and b turn the rows of the weight, m holds their lengths; both are trained. The length that
    is divided by counts as a constant in the gradient. Rows are those of the outputs, and a
    convolution's length is over its whole kernel.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equations 5 and 11.
    """

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        options = self.options
        rank, scale = rank_of(options, layer), scale_of(options, layer)
        size_a, size_b = shapes(layer, rank)
        a = branch.parameter("lora_a", kaiming(size_a, generator))
        b = branch.parameter("lora_b", torch.zeros(size_b))
        matrix = _matrix(branch, layer)
        ratio = self._ratio(branch, layer, matrix, a, b, scale)
        entered = low = through(branch, layer, a)
        if scale != 1.0:
            low = branch.add(aten.mul.Scalar, low, scale)
        turned = branch.add(aten.mul.Tensor, back(branch, layer, low, b), ratio)
        if options.dropout:
            own = self._on_dropped_input(branch, layer, matrix, ratio, entered)
        else:
            own = self._scaled_output(branch, layer, ratio)
        branch.finish(branch.add(aten.add.Tensor, own, turned))
        return f"rank {rank}, {matrix_shape(layer)[0]} lengths"

    def _scaled_output(self, branch: Branch, layer: Layer, ratio: fx.Node) -> fx.Node:
        """The layer's output times the ratio, but not its bias."""
        own = branch.add(aten.mul.Tensor, branch.tip, ratio)
        bias = branch.bias()
        if bias is None:
            return own
        kept = branch.add(aten.rsub.Scalar, ratio, 1.0)
        kept = branch.add(aten.mul.Tensor, _as_channels(branch, layer, bias), kept)
        return branch.add(aten.add.Tensor, own, kept)

    def _on_dropped_input(
        self, branch: Branch, layer: Layer, matrix: fx.Node, ratio: fx.Node, entered: fx.Node
    ) -> fx.Node:
        """The layer's output, and (ratio - 1) W x for the x that dropout has left."""
        if layer.kind in CONVOLUTIONS:
            rest = branch.arguments[3:7]
            again = branch.add(layer.node.target, branch.input, branch.weight, None, *rest)
        else:
            again = branch.add(aten.linear.default, branch.input, matrix)
        branch.dropped(self.options.dropout, entered, again)
        more = branch.add(aten.mul.Tensor, again, branch.add(aten.sub.Scalar, ratio, 1.0))
        return branch.add(aten.add.Tensor, branch.tip, more)

    def _ratio(
        self, branch: Branch, layer: Layer, matrix: fx.Node, a: fx.Node, b: fx.Node, scale: float
    ) -> fx.Node:
        """m / ||W + s b a|| of every output, in the shape of the layer's channels."""
        if layer.kind in CONVOLUTIONS:
            a, b = (branch.add(aten.flatten.using_ints, part, 1) for part in (a, b))
        a, b = (branch.add(aten.detach.default, part) for part in (a, b))
        if scale != 1.0:
            b = branch.add(aten.mul.Scalar, b, scale)
        whole = branch.add(ours.add_low_rank.default, matrix, b, a)
        length = branch.add(aten.linalg_vector_norm.default, whole, 2, [1])
        value = constant_value(branch.editor, matrix).double().norm(dim=1)
        magnitude = branch.parameter("magnitude", value)
        return _as_channels(branch, layer, branch.add(aten.div.Tensor, magnitude, length))

    def refusal(self, layer: Layer) -> str:
        rank_of(self.options, layer)
        if groups_of(layer) > 1:
            return "a grouped convolution's rows have no low-rank change that groups share"
        return ""

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        parts: Any = layer.parts
        options = DoraOptions.model_validate(dict(layer.options), strict=False)
        a, b, magnitude = parts["lora_a"], parts["lora_b"], parts["magnitude"]
        whole = layer.weight + scaled(options, layer.name, len(a)) * change(layer, a, b)
        rows = whole.t() if layer.kind in TURNED else whole.flatten(1)
        rows = rows * (magnitude / rows.norm(dim=1))[:, None]
        new = rows.t() if layer.kind in TURNED else rows.reshape(whole.shape)
        return new.contiguous(), layer.bias


def _matrix(branch: Branch, layer: Layer) -> fx.Node:
    """The layer's weight as a matrix (out, columns)."""
    if layer.kind in TURNED:
        return branch.add(aten.transpose.int, branch.weight, 0, 1)
    if layer.kind in CONVOLUTIONS:
        return branch.add(aten.flatten.using_ints, branch.weight, 1)
    return branch.weight


def _as_channels(branch: Branch, layer: Layer, vector: fx.Node) -> fx.Node:
    """One number per output in the shape in which it meets the layer's output."""
    if layer.kind not in CONVOLUTIONS:
        return vector
    spatial = len(weight_shape(layer)) - 2
    return branch.add(aten.reshape.default, vector, [-1, *(1,) * spatial])
