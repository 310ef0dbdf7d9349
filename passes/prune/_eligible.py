"""Which channel groups a pass may cut, and the check that a cut changes nothing more."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.errors import ContractError
from graphwright.ir.program import Program
from graphwright.ir.select import layers, select
from graphwright.passes.base import Action

OUTPUT_DIM = {"conv_transpose1d": 1, "conv_transpose2d": 1, "conv_transpose3d": 1, "embedding": 1}
"""Dimension of a weight that holds output channels; 0 for the rest."""


def eligible_groups(
    program: Program, groups: list[ChannelGroup], targets: tuple[str, ...]
) -> tuple[list[ChannelGroup], list[Action]]:
    """Prunable groups whose output channels all belong to selected layers; reasons of the rest."""
    selected = {layer.node.name for layer in select(program, targets)}
    outside: dict[tuple[str, int], str] = {}
    for layer in layers(program):
        if layer.node.name not in selected and layer.weight:
            outside[layer.weight, OUTPUT_DIM.get(layer.kind, 0)] = layer.name
    eligible, actions = [], []
    for group in groups:
        other = next((outside[m.parameter, m.dim] for m in group.members
                      if (m.parameter, m.dim) in outside), "")  # fmt: skip
        if not group.prunable:
            actions.append(Action(group.name, "kept", group.reason))
        elif other:
            actions.append(Action(group.name, "kept", f"layer {other} is not in targets"))
        else:
            eligible.append(group)
    return eligible, actions


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
    """What the program gives on its examples."""
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
