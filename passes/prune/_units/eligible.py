"""Chooses the channel groups that a pass may cut, and checks that a cut changes nothing more."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.channels.analysis import Analysis
from graphwright.ir.channels.values import Value
from graphwright.ir.errors import ContractError
from graphwright.ir.layers.kinds import NORMS, TABLE
from graphwright.ir.layers.selectors import layers, select
from graphwright.ir.program import Program
from graphwright.passes.base import Action


def eligible_groups(
    program: Program, groups: list[ChannelGroup], targets: tuple[str, ...]
) -> tuple[list[ChannelGroup], list[Action]]:
    """Prunable groups whose output channels all belong to selected layers; reasons of the rest.

    A norm has no output channels of its own: it follows the layers in front of it.
    """
    if not groups:
        return [], []
    outside = _outside(program, groups[0].analysis, targets)
    eligible, actions = [], []
    for group in groups:
        other = next((outside[c] for c in group.classes.tolist() if c in outside), "")
        if not group.prunable:
            actions.append(Action.left(group.name, group.reason, "kept"))
        elif other:
            actions.append(Action.left(group.name, f"layer {other} is not in targets", "kept"))
        else:
            eligible.append(group)
    return eligible, actions


def _outside(program: Program, analysis: Analysis, targets: tuple[str, ...]) -> dict[int, str]:
    """Classes of the output channels of layers that are not selected, to one such layer.

    Read off the layer's result, so it does not matter how its weight is stored or computed.
    """
    selected = {layer.node.name for layer in select(program, targets)}
    found: dict[int, str] = {}
    for layer in layers(program):
        if layer.node.name in selected or layer.kind in NORMS:
            continue
        value = analysis.values.get(layer.node.name)
        if isinstance(value, Value):
            spatial = TABLE[layer.kind].spatial
            channels = value.at(len(value.shape) - spatial - 1)
            if channels is not None:
                classes = np.unique(analysis.class_of[channels.ids]).tolist()
                found.update(dict.fromkeys(classes, layer.name))
    return found


def check_cut(masked: Program, smaller: Program, where: str) -> float:
    """Largest relative difference of the two on the examples.

    Args:
        masked: the program before the cut, with zeros in what the cut takes.
        smaller: the one after it.
        where: id of the pass that cuts.

    Raises:
        ContractError: it is more than rounding.
    """
    return gap(outputs(masked), smaller, where)


def outputs(program: Program) -> tuple[Tensor, ...]:
    """The program's outputs on its examples."""
    with torch.no_grad():
        return program.run_flat(program.examples)


def gap(expected: tuple[Tensor, ...], smaller: Program, where: str) -> float:
    """As `check_cut`, from the outputs of the masked program."""
    worst = 0.0
    for one, other in zip(expected, outputs(smaller), strict=True):
        if not one.is_floating_point() or not one.numel():
            continue
        error = float((one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-12))
        worst = max(worst, error)
        if not error <= 100 * torch.finfo(one.dtype).eps:
            raise ContractError(
                f"the cut program differs from the masked one by {error:.1e}",
                where=where, fix="Leave groups out with `targets`, and report it.",
            )  # fmt: skip
    return worst
