"""adapt.s2ft: some channels of inner layers, trained as dense blocks of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged, bare
from graphwright.ir.channels import ChannelGroup, channel_groups
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import MATRICES, TURNED
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass
from graphwright.passes.adapt._form.low_rank import matrix_shape
from graphwright.passes.base import Context

aten = torch.ops.aten

Places = dict[str, dict[str, np.ndarray]]
"""Positions to train, by layer and side."""


class S2ftOptions(AdapterOptions):
    """Options of adapt.s2ft."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.03
    """Share of the channels (whole heads in attention) that is trained, of all layers together."""

    side: Literal["columns", "rows", "both"] = "columns"
    """Blocks that are trained: in the layers that read the chosen channels, in those that make
    them, or in both. The paper's runs train what reads them."""

    choice: Literal["random", "largest", "smallest"] = "random"
    """Channels that are chosen: by lot, or by the norm of their weights."""


class S2ft(AdapterPass[S2ftOptions]):
    """Trains a few inner channels of a network, as dense blocks of the layers around them.

    Channels that go together (the hidden units of a feed-forward block, heads with their keys and
    values) are found by the channel algebra. A number of them is drawn over all layers together,
    and the columns that read them, or the rows that make them, get a change of their own, which
    starts at zero. Only these channels of a layer's input are remembered for its gradient. The
    block is an adapter: changes of several tasks add up, and merge by indices.

    Source: Yang et al. 2024, "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by
    Structured Sparsity", sections 3.2 and 3.3. The paper permutes channels so that a block is
    contiguous; here a block keeps its indices, so that adapters of one model fit together whatever
    was chosen.
    """

    papers = ("P49",)
    kinds = MATRICES

    def prepare(self, program: Program, chosen: Sequence[Layer], context: Context) -> Places:
        """The channels that are trained, by layer and side."""
        sides = {"columns": (1,), "rows": (0,), "both": (0, 1)}[self.options.side]
        owners = {(layer.weight, _axis(layer, side)): (layer.name, side)
                  for layer in chosen for side in sides if layer.weight}  # fmt: skip
        groups = [g for g in channel_groups(bare(program)) if g.prunable
                  and any((m.parameter, m.dim) in owners for m in g.members)]  # fmt: skip
        if not groups:
            raise ModelError(
                f"{self.id}: no selected layer reads or makes inner channels that go together",
                fix="Target the layers of feed-forward blocks or of attention.",
            )
        units = [(group, unit) for group in groups for unit in range(group.units)]
        count = max(1, round(self.options.share * len(units)))
        found: dict[str, dict[str, list[np.ndarray]]] = {}
        for number in self._order(program, units, context)[:count]:
            group, unit = units[number]
            for key, positions in group.slices(unit).items():
                if key in owners:
                    name, side = owners[key]
                    part = "columns" if side else "rows"
                    found.setdefault(name, {}).setdefault(part, []).append(positions)
        return {name: {part: np.unique(np.concatenate(all_)) for part, all_ in of.items()}
                        for name, of in found.items()}  # fmt: skip

    def _order(
        self, program: Program, units: Sequence[tuple[ChannelGroup, int]], context: Context
    ) -> list[int]:
        if self.options.choice == "random":
            drawn = torch.randperm(len(units), generator=context.generator("channels"))
            return [int(i) for i in drawn]
        norms = [_norm(program, group, unit) for group, unit in units]
        sign = -1.0 if self.options.choice == "largest" else 1.0
        return sorted(range(len(units)), key=lambda i: (sign * norms[i], i))

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        places = branch.found.get(layer.name, {})
        out, columns = matrix_shape(layer)
        result = branch.tip
        for part in sorted(places):
            index = branch.constant(part, torch.from_numpy(places[part]).long())
            count = len(places[part])
            if part == "columns":
                values = branch.parameter("column_values", torch.zeros(out, count))
                read = branch.add(aten.index_select.default, branch.input, -1, index)
                change = branch.add(aten.linear.default, read, values)
                result = branch.add(aten.add.Tensor, result, change)
            else:
                values = branch.parameter("row_values", torch.zeros(count, columns))
                change = branch.add(aten.linear.default, branch.input, values)
                result = branch.add(aten.index_add.default, result, -1, index, change)
        if places:
            branch.finish(result)
        counts = (f"{len(p)} {part}" for part, p in sorted(places.items()))
        return ", ".join(counts) or "none of its channels was chosen"

    def refusal(self, layer: Layer) -> str:
        return "" if layer.weight else "its weight is rebuilt from codes"

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        weight, parts = layer.weight.clone(), layer.parts
        turned = layer.kind in TURNED
        if "columns" in parts:
            values = parts["column_values"]
            values = values.t() if turned else values
            weight.index_add_(0 if turned else 1, parts["columns"], values.to(weight.dtype))
        if "rows" in parts:
            values = parts["row_values"]
            values = values.t() if turned else values
            weight.index_add_(1 if turned else 0, parts["rows"], values.to(weight.dtype))
        return weight, layer.bias


def _axis(layer: Layer, side: int) -> int:
    """Axis of the stored weight: of outputs (side 0) or inputs (side 1)."""
    return 1 - side if layer.kind in TURNED else side


def _norm(program: Program, group: ChannelGroup, unit: int) -> float:
    total = 0.0
    for (name, dim), positions in group.slices(unit).items():
        tensor = program.state[name].detach()
        if tensor.dim() > 1 and tensor.is_floating_point():
            part = tensor.index_select(dim, torch.from_numpy(positions).long())
            total += float(part.double().square().sum())
    return float(total**0.5)
