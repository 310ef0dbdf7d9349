"""Limits on what a cut takes of channel groups, and a check that it changes nothing more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.channels.eligible import output_classes
from graphwright.ir.errors import ContractError
from graphwright.ir.layers.selectors import select
from graphwright.ir.program import Program
from graphwright.passes.base import Action
from graphwright.passes.prune._units.scores import batch_norm_scales


def with_scales(groups: list[ChannelGroup]) -> tuple[list[ChannelGroup], list[Action]]:
    """Groups that a batch norm scales, which `bn_scale` can score, and the reason of the others."""
    scales = batch_norm_scales(groups[0].analysis) if groups else set()
    scaled = [g for g in groups if any(m.parameter in scales for m in g.members)]
    return scaled, [Action.left(g.name, "no batch norm scales its channels", "kept")
                    for g in groups if g not in scaled]  # fmt: skip


def largest_shares(
    program: Program, groups: list[ChannelGroup], share: float, layer_shares: Mapping[str, float]
) -> list[float]:
    """The share of its units that each group may lose: `share`, or the least of its layers."""
    limits = [share] * len(groups)
    for pattern, own in layer_shares.items():
        classes = output_classes(groups[0].analysis, select(program, (pattern,)))
        for number, group in enumerate(groups):
            if any(c in classes for c in group.classes.tolist()):
                limits[number] = min(limits[number], own)
    return limits


def gutted(start: Mapping[str, int], gone: Mapping[str, int], above: float) -> tuple[str, ...]:
    """A warning that names the groups which lost more than a share of their units; or nothing.

    Args:
        start: units by group name.
        gone: units that were removed, by group name.
        above: the share.
    """
    lost = {name: gone.get(name, 0) / units for name, units in start.items()}
    worst = sorted((n for n, share in lost.items() if share > above), key=lambda n: -lost[n])
    if not worst:
        return ()
    named = ", ".join(f"{n} ({start[n] - gone[n]} of {start[n]} units left)" for n in worst[:3])
    more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
    groups = "1 channel group" if len(worst) == 1 else f"{len(worst)} channel groups"
    return (
        f"{groups} lost more than {above:.0%} of their units: {named}{more}; "
        "a network may not recover from that",
    )


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
