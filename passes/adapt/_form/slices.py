"""Slices of a layer's outputs: attention's queries, keys and values, single heads, and ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.slices import SLOTS, make_slots
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.heads import Heads, attention_heads
from graphwright.ir.layers.kinds import MATRICES
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.passes.adapt._form.adapter import AdapterOptions
from graphwright.passes.adapt._form.low_rank import add_low_rank, matrix_shape

aten = torch.ops.aten

Slice = Annotated[str, Field(pattern=r"^([qkv](\.\d+(-\d+)?)?|\d+:\d+)$")]

Slices = Mapping[str, list[Tensor]]
"""Outputs of every slice of a layer, by the layer's name; none for a layer that has no slices."""


class SlicedOptions(AdapterOptions):
    """Options of adapters that can change some outputs of a layer alone."""

    outputs: tuple[Slice, ...] = Field(default=(), examples=[["q", "v"], ["q.0-3", "v.5"]])
    """Outputs that are changed, each of these by a change of its own; all by one when empty.
    `q`, `k` and `v` are those that attention reads as queries, keys and values, `q.3` and `q.0-3`
    single heads of them, wherever they are in a fused projection or which layer makes them;
    `0:64` are outputs by number. A layer that has none of them is left as it is."""


def find_slices(
    program: Program, chosen: Sequence[Layer], outputs: Sequence[str], by: str
) -> dict[str, list[Tensor]]:
    """The outputs that the option names, by layer.

    Raises:
        ModelError: no layer has any, a head or number is too large, or an output is named twice.
    """
    if not outputs:
        return {}
    numbered = [name for name in outputs if ":" in name]
    heads = {} if len(numbered) == len(outputs) else attention_heads(program, chosen)
    found = {layer.name: _of_layer(layer, heads.get(layer.name, {}), outputs) for layer in chosen}
    for role in dict.fromkeys(name[0] for name in outputs if ":" not in name):
        if not any(role in of for of in heads.values()):
            raise ModelError(
                f"{by}: attention reads no {role} from the selected layers",
                fix="Target the layers that make it, or name outputs by number, as in `0:64`.",
            )
    return found


def _of_layer(layer: Layer, heads: Heads, outputs: Sequence[str]) -> list[Tensor]:
    out = matrix_shape(layer)[0]
    found = []
    for name in outputs:
        if ":" in name:
            first, last = (int(n) for n in name.split(":"))
            if not first < last <= out:
                raise ModelError(f"layer {layer.name!r} has outputs 0:{out}, and no {name}")
            found.append(torch.arange(first, last))
        elif name[0] in heads:
            found.append(_of_heads(layer, heads[name[0]], name))
    if found:
        everything = torch.cat(found)
        if len(everything.unique()) < len(everything):
            raise ModelError(f"slices {list(outputs)} of {layer.name!r} overlap")
    return found


def _of_heads(layer: Layer, heads: Sequence[Tensor], name: str) -> Tensor:
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    if not numbers:
        return torch.cat(list(heads)).sort().values
    first, last = numbers[0], numbers[-1]
    if not first <= last < len(heads):
        raise ModelError(
            f"layer {layer.name!r} has heads {name[0]}.0-{len(heads) - 1}, and no {name}"
        )
    return torch.cat(list(heads[first : last + 1])).sort().values


def no_slices(layer: Layer, outputs: Sequence[str]) -> str:
    """The reason why a layer of this kind has no slices; empty where it may have some."""
    if outputs and layer.kind not in MATRICES:
        return f"a {layer.kind} has no slices of outputs"
    return ""


def slices_of(branch: Branch, layer: Layer) -> list[Tensor]:
    """The slices that the pass has found for the layer, in `branch.found`."""
    found: list[Tensor] = branch.found.get(layer.name, []) if branch.found else []
    return found


def check_rank(layer: Layer, slices: Sequence[Tensor], rank: int) -> None:
    """Raises ModelError where a slice has fewer outputs than its change has directions."""
    least = min(len(channels) for channels in slices)
    if rank > least:
        raise ModelError(
            f"rank {rank} is larger than a slice of layer {layer.name!r} allows: {least} outputs",
            fix="Take more heads together, or a smaller rank.",
        )


def put_slots(branch: Branch, layer: Layer, slices: Sequence[Tensor]) -> fx.Node:
    """Stores which row of what is stored belongs to which output."""
    return branch.constant(SLOTS, make_slots(slices, matrix_shape(layer)[0]))


def add_sliced(
    branch: Branch,
    layer: Layer,
    slices: Sequence[Tensor],
    a: Tensor,
    rows: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> None:
    """Adds a low-rank change of its own to every slice of the layer's outputs; all run as one.

    Args:
        branch: beside the layer.
        layer: the layer.
        slices: outputs of each.
        a: first factors (slices * rank, in), one below the other.
        rows: second factors (outputs of the slices, rank), one below the other.
        scale: of all changes.
        dropout: probability on what the branch reads.
    """
    stored_a, stored_b = branch.parameter("lora_a", a), branch.parameter("lora_b", rows)
    slots = put_slots(branch, layer, slices)
    padded = branch.add(aten.constant_pad_nd.default, stored_b, [0, 0, 0, 1])
    flat = branch.add(aten.flatten.using_ints, slots)
    picked = branch.add(aten.index_select.default, padded, 0, flat)
    b = branch.add(aten.reshape.default, picked, [matrix_shape(layer)[0], len(a)])
    add_low_rank(branch, layer, stored_a, b, scale, dropout)
