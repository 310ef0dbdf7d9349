"""adapt.pego: a group of low-rank changes that are kept apart from the weight and each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.adapters.record import Adapter
from graphwright.ir.adapters.slices import SLOTS
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.kinds import MATRICES, TURNED
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.passes.adapt._form.adapter import AdapterPass
from graphwright.passes.adapt._form.low_rank import add_low_rank, kaiming, matrix_shape, with_change
from graphwright.passes.adapt._form.slices import (
    SlicedOptions,
    add_sliced,
    check_rank,
    find_slices,
    slices_of,
)
from graphwright.passes.base import Context

Count = Annotated[int, Field(ge=1)]


class PegoOptions(SlicedOptions):
    """Options of adapt.pego."""

    rank: Count = 4
    """Rank of each change."""

    count: Count = 4
    """Changes beside every layer."""

    weight: Annotated[float, Field(ge=0)] = 1e-3
    """Factor of the penalty in the loss. The penalty is a sum over outputs by outputs: the paper's
    factor is for layers of 768, and larger layers want a smaller one."""


class Pego(AdapterPass[PegoOptions]):
    """Puts several low-rank changes b_i a_i beside every layer, and a penalty into the loss.

    The penalty sums |W (b_i a_i)^T| over all entries (what the model knows is preserved) and
    |b_i a_i (b_j a_j)^T| over all pairs (the changes learn different things). The paper adapts
    the projections of queries and values: they are named by `targets`, or as `outputs: [q, v]` of a
    fused projection, each with its own changes and its own rows of W. The changes run and merge as
    one.

    Source: Hu et al. 2024, "Learn to Preserve and Diversify", equations 4 to 6.
    """

    papers = ("P75",)
    kinds = MATRICES

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        rank, count = self.options.rank, self.options.count
        out, columns = matrix_shape(layer)
        if self.options.outputs:
            return self._attach_slices(branch, layer, generator)
        a = torch.cat([kaiming((rank, columns), generator) for _ in range(count)])
        stored_a = branch.parameter("lora_a", a)
        stored_b = branch.parameter("lora_b", torch.zeros(out, rank * count))
        add_low_rank(branch, layer, stored_a, stored_b, 1.0)
        return f"{count} changes of rank {rank}"

    def _attach_slices(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        """A group of changes for every slice of the outputs; all run as one."""
        rank, count = self.options.rank, self.options.count
        slices = slices_of(branch, layer)
        if not slices:
            return "has none of the outputs"
        check_rank(layer, slices, rank * count)
        columns, groups = matrix_shape(layer)[1], len(slices)
        a = torch.cat([kaiming((rank, columns), generator) for _ in range(groups * count)])
        rows = torch.zeros(sum(map(len, slices)), rank * count)
        add_sliced(branch, layer, slices, a, rows, 1.0)
        return f"{groups} slices with {count} changes of rank {rank}"

    def prepare(
        self, program: Program, chosen: Sequence[Layer], context: Context
    ) -> dict[str, list[Tensor]]:
        """The slices of outputs that are changed, by layer."""
        return find_slices(program, chosen, self.options.outputs, self.id)

    def refusal(self, layer: Layer) -> str:
        if self.options.rank * self.options.count > min(matrix_shape(layer)):
            raise ModelError(
                f"{self.options.count} changes of rank {self.options.rank} are more than layer "
                f"{layer.name!r} allows, a matrix of {' by '.join(map(str, matrix_shape(layer)))}"
            )
        return ""

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        return with_change(layer)

    @classmethod
    def hooks(cls, program: Program, adapter: Adapter) -> list[Hook]:
        return [Apart(program, adapter)]


class Apart(Hook):
    """Adds the penalty of `adapt.pego` to the loss."""

    def __init__(self, program: Program, adapter: Adapter) -> None:
        self.factor = float(adapter.options["weight"])
        self.count = int(adapter.options["count"])
        self.layers: list[tuple[Tensor, str, str, Tensor | None]] = []
        seen: set[str] = set()
        for layer in layers(program, MATRICES):
            parts = adapter.layers.get(layer.name)
            if parts is None or layer.name in seen:
                continue
            seen.add(layer.name)
            matrix = constant_value(program, weight_node(layer)).float()
            matrix = matrix.t() if layer.kind in TURNED else matrix
            slots = program.state[parts[SLOTS]] if SLOTS in parts else None
            self.layers.append((matrix, parts["lora_a"], parts["lora_b"], slots))

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        total = loss.new_zeros((), dtype=torch.float32)
        for matrix, a, b, slots in self.layers:
            if a not in at.parameters:
                continue
            left, right = at.parameters[b].float(), at.parameters[a].float()
            weight = matrix.to(left.device)
            if slots is None:
                total = total + penalty(weight, right, left, self.count)
                continue
            for own, slot in zip(right.chunk(slots.shape[1]), slots.unbind(1), strict=True):
                channels = (slot < len(left)).nonzero().flatten()
                rows = left[slot[channels].to(left.device)]
                total = total + penalty(weight[channels.to(left.device)], own, rows, self.count)
        return loss + self.factor * total


def penalty(weight: Tensor, a: Tensor, b: Tensor, count: int) -> Tensor:
    """Sum of |W (b_i a_i)^T| over the changes and of |b_i a_i (b_j a_j)^T| over their pairs.

    No matrix of the weight's size is formed but the products' results (out, out).

    Args:
        weight: W (out, in).
        a: (count * rank, in).
        b: (out, count * rank).
        count: number of changes.
    """
    parts_a, parts_b = a.chunk(count), b.chunk(count, 1)
    total = a.new_zeros(())
    for i in range(count):
        total = total + ((weight @ parts_a[i].t()) @ parts_b[i].t()).abs().sum()
        for j in range(i + 1, count):
            middle = parts_b[i] @ (parts_a[i] @ parts_a[j].t())
            total = total + (middle @ parts_b[j].t()).abs().sum()
    return total
