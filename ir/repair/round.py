"""Chooses the weights that can become codes of an integer grid, and puts the codes in."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from graphwright.ir.action import Action
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import EXPERTS, OUTPUT_AXIS, PRODUCTS, TURNED
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.program import Program
from graphwright.ir.repair.walk import Compressed, repair_text, with_codes
from graphwright.ir.stored.grid import grid_codes


def quantizable(program: Program, layers: Sequence[Layer]) -> tuple[set[str], list[Action]]:
    """Names of the weights that can be rounded, and why other layers stay as they are.

    Raises:
        ModelError: a weight holds NaN or infinity.
    """
    nodes = {layer.node for layer in layers}
    axes: dict[str, set[int]] = {}
    for layer in layers:
        axes.setdefault(layer.weight, set()).add(OUTPUT_AXIS[layer.kind])
    names, actions = set(), []
    for layer in layers:
        reason = _reason(program, layer, nodes)
        if not reason and len(axes[layer.weight]) > 1:
            reason = "its weight is read as rows here and as columns elsewhere"
        if reason:
            actions.append(Action.left(layer.name, reason, "not quantized"))
        else:
            names.add(layer.weight)
    return names, actions


def _reason(program: Program, layer: Layer, chosen: Collection[object]) -> str:
    if not layer.weight:
        return "its weight is computed in the graph (compressed or adapted before)"
    weight = program.state[layer.weight]
    if weight.dtype != torch.float32:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float32"
    if weight.numel() == 0:
        return "its weight is empty"
    if layer.kind in EXPERTS:
        return "a stack of experts has no chain of channels"
    if layer.kind in TURNED and weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions, not 2"
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"the weight of {layer.name!r} holds NaN or infinity")
    for reader in program.graph.find_nodes(op="get_attr", target=layer.weight):
        other = next((user for user in reader.users if user not in chosen), None)
        if other is not None:
            return f"its weight is also read by {other.name}"
    return ""


def quantized(
    program: Program, by: str, targets: Sequence[str], bits: int, search: bool, found: Compressed
) -> tuple[Program, list[Action]]:
    """The program with the weights of selected layers as codes.

    Args:
        program: repaired.
        by: id of the pass.
        targets, bits, search: options.
        found: what was done to channels, for the actions.
    """
    layers = select(program, targets, PRODUCTS)
    names, actions = quantizable(program, layers)
    layers = [layer for layer in layers if layer.weight in names]
    codes: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        if layer.weight not in codes:
            axis = OUTPUT_AXIS[layer.kind]
            rows = program.state[layer.weight].detach().movedim(axis, 0)
            values, scale = grid_codes(rows.flatten(1), bits, search)
            shaped = values.reshape(rows.shape).movedim(0, axis).contiguous()
            codes[layer.weight] = (shaped, scale)
        done = found.done.get(layer.name)
        if done is None:
            actions.append(Action(layer.name, f"{bits} bit", f"no repair: {found.reason(layer)}"))
        else:
            text = f", {repair_text(done)}" if done.kept == done.units else ""
            actions.append(Action(layer.name, f"{bits} bit{text}"))
    return with_codes(program, by, layers, codes), actions
