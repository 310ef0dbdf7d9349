"""Chooses the channel groups that a pass may change, by the layers whose outputs they are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from graphwright.ir.action import Action
from graphwright.ir.channels.analysis import Analysis
from graphwright.ir.channels.families import Family, families
from graphwright.ir.channels.groups import ChannelGroup
from graphwright.ir.channels.values import Value
from graphwright.ir.layers.kinds import NORMS, TABLE
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.program import Program


def eligible_groups(
    program: Program,
    groups: list[ChannelGroup],
    targets: tuple[str, ...],
    spare: tuple[Family, ...] = (),
) -> tuple[list[ChannelGroup], list[Action]]:
    """Prunable groups whose output channels all belong to selected layers; reasons of the rest.

    A norm has no output channels of its own: it follows the layers in front of it.

    Args:
        program: the one that the groups are of.
        groups: all of them.
        targets: selector of layers.
        spare: kinds of groups that stay whole.
    """
    if not groups:
        return [], []
    analysis = groups[0].analysis
    selected = {layer.node.name for layer in select(program, targets)}
    others = [layer for layer in layers(program) if layer.node.name not in selected]
    outside = output_classes(analysis, others)
    kinds = families(groups) if spare else {}
    eligible, actions = [], []
    for group in groups:
        other = next((outside[c] for c in group.classes.tolist() if c in outside), "")
        spared = next((kind for kind in kinds.get(group, ()) if kind in spare), "")
        if not group.prunable:
            actions.append(Action.left(group.name, group.reason, "kept"))
        elif other:
            actions.append(Action.left(group.name, f"layer {other} is not in targets", "kept"))
        elif spared:
            actions.append(Action.left(group.name, f"spare: {spared}", "kept"))
        else:
            eligible.append(group)
    return eligible, actions


def output_classes(analysis: Analysis, chosen: Iterable[Layer]) -> dict[int, str]:
    """Classes of the output channels of layers, to one such layer.

    Read off the layer's result, so it does not matter how its weight is stored or computed.
    """
    found: dict[int, str] = {}
    for layer in chosen:
        value = analysis.values.get(layer.node.name)
        if layer.kind not in NORMS and isinstance(value, Value):
            spatial = TABLE[layer.kind].spatial
            channels = value.at(len(value.shape) - spatial - 1)
            if channels is not None:
                classes = np.unique(analysis.class_of[channels.ids]).tolist()
                found.update(dict.fromkeys(classes, layer.name))
    return found
