"""adapt.ia3: one factor for every output, or every input, of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.adapters.slices import SLOTS, spread_factors
from graphwright.ir.layers.kinds import CONVOLUTIONS, TURNED
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Selector
from graphwright.ir.program import Program
from graphwright.passes.adapt._form.adapter import AdapterPass, weight_shape
from graphwright.passes.adapt._form.low_rank import groups_of, matrix_shape
from graphwright.passes.adapt._form.slices import (
    SlicedOptions,
    find_slices,
    no_slices,
    put_slots,
)
from graphwright.passes.base import Context

aten = torch.ops.aten


class Ia3Options(SlicedOptions):
    """Options of adapt.ia3."""

    feedforward: Selector = ()
    """Layers of `targets` whose inputs are scaled instead of their outputs: the second layers of
    feed-forward blocks, in the paper."""


class Ia3(AdapterPass[Ia3Options]):
    """Multiplies the outputs of every chosen layer, or its inputs, by trained factors.

    The factors start at one. The paper scales keys, values (`outputs: [k, v]` where one layer makes
    them), and what goes into the second layer of each feed-forward block. They merge into rows or
    columns of the weight; a layer whose outputs are scaled has its bias scaled with them.

    Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning", section 3.3.
    """

    def prepare(
        self, program: Program, chosen: Sequence[Layer], context: Context
    ) -> dict[str, list[Tensor] | None]:
        """The slices of outputs that are scaled, by layer; None for one whose inputs are."""
        options = self.options
        inner = select(program, options.feedforward, self.kinds) if options.feedforward else []
        names = {layer.name for layer in inner}
        outer = [layer for layer in chosen if layer.name not in names]
        slices = find_slices(program, outer, options.outputs, self.id)
        return {**slices, **dict.fromkeys(names)}

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        slices = branch.found.get(layer.name, [])
        if slices is None:
            scale_inputs(branch, layer, torch.ones(inputs_of(layer)))
            return f"{inputs_of(layer)} inputs scaled"
        if self.options.outputs:
            return _scale_slices(branch, layer, slices)
        out = matrix_shape(layer)[0]
        scale_outputs(branch, layer, torch.ones(out))
        return f"{out} outputs scaled"

    def refusal(self, layer: Layer) -> str:
        return no_slices(layer, self.options.outputs)

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        if "ia3_in" in layer.parts:
            return _columns_scaled(layer, layer.parts["ia3_in"]), layer.bias
        factor = layer.parts["ia3_out"]
        factor = spread_factors(factor, layer.parts[SLOTS]) if SLOTS in layer.parts else factor
        bias = None if layer.bias is None else layer.bias * factor
        if layer.kind in TURNED:
            return layer.weight * factor, bias
        return layer.weight * factor.reshape(-1, *(1,) * (layer.weight.dim() - 1)), bias


def scale_outputs(branch: Branch, layer: Layer, factors: Tensor) -> None:
    """Multiplies a layer's outputs by trained factors (out,)."""
    factor = branch.parameter("ia3_out", factors)
    if spatial := _spatial(layer):
        factor = branch.add(aten.reshape.default, factor, [-1, *(1,) * spatial])
    branch.finish(branch.add(aten.mul.Tensor, branch.tip, factor))


def _scale_slices(branch: Branch, layer: Layer, slices: Sequence[Tensor]) -> str:
    """Multiplies some of a layer's outputs, and leaves the others."""
    if not slices:
        return "has none of the outputs"
    channels = torch.cat(list(slices))
    factor = branch.parameter("ia3_out", torch.ones(len(channels)))
    slots = put_slots(branch, layer, [channels])
    padded = branch.add(aten.constant_pad_nd.default, factor, [0, 1], 1.0)
    flat = branch.add(aten.flatten.using_ints, slots)
    factor = branch.add(aten.index_select.default, padded, 0, flat)
    branch.finish(branch.add(aten.mul.Tensor, branch.tip, factor))
    return f"{len(channels)} outputs scaled"


def scale_inputs(branch: Branch, layer: Layer, factors: Tensor) -> None:
    """Multiplies a layer's inputs by trained factors (in,)."""
    factor = branch.parameter("ia3_in", factors)
    if spatial := _spatial(layer):
        factor = branch.before(aten.reshape.default, factor, [-1, *(1,) * spatial])
    branch.scale_input(factor)


def _spatial(layer: Layer) -> int:
    return len(weight_shape(layer)) - 2 if layer.kind in CONVOLUTIONS else 0


def inputs_of(layer: Layer) -> int:
    """Channels, or features, that a layer reads."""
    shape = weight_shape(layer)
    return shape[0] if layer.kind in TURNED else shape[1] * groups_of(layer)


def _columns_scaled(layer: Adapted, factor: Tensor) -> Tensor:
    weight = layer.weight
    if layer.kind in TURNED:
        return weight * factor[:, None]
    if layer.kind not in CONVOLUTIONS:
        return weight * factor
    own = factor.reshape(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1)
    return weight * own.reshape(*weight.shape[:2], *(1,) * (weight.dim() - 2))
