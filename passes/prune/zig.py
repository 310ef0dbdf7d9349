"""prune.zig: removes the least important channels in one shot, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.channels import ChannelGroup, channel_groups, cut, masked_outputs
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Need, Pass, Result
from graphwright.passes.prune._units.eligible import eligible_groups, gap
from graphwright.passes.prune._units.gradients import Draws, LossName, gradients, labelled, room
from graphwright.passes.prune._units.group_fisher import unit_costs
from graphwright.passes.prune._units.scores import WITH_GRADIENT, scores, unit_sums
from graphwright.passes.prune._units.select import Selection


class ZigOptions(Bounded):
    """Options of prune.zig."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share to remove, of what `of` says."""

    of: Literal["groups", "parameters", "macs"] = "groups"
    """The unit of the share: removable units (zero-invariant groups), the program's
    parameters, or its multiply-accumulates at the example sizes."""

    score: Literal[
        "magnitude", "normalized_magnitude", "cosine", "taylor", "taylor2", "hesso", "fisher"
    ] = "magnitude"
    """Importance of a unit; `hesso` is the mean of the five before it, `fisher` the loss increase
    by the inverse empirical Fisher (M-FAC). All but the first two need calibration data."""

    gradients: Annotated[int, Field(ge=1)] = 64
    """Mini-batch gradients that `fisher` is made of; fewer where there are fewer samples."""

    batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples of such a mini-batch at most; fewer where the data is not enough."""

    damp: Annotated[float, Field(gt=0)] = 1e-5
    """Number added to the diagonal of the Fisher matrix."""

    scope: Literal["global", "group"] = "global"
    """Compare scores over the whole program, or take the same share of every group."""

    loss: LossName = "auto"
    """Loss whose gradient the scores use: cross-entropy with the labels in the data, that of a
    language model's next tokens, or the mean square of the outputs; `auto` is the first where
    there are labels, and else the last."""

    unit: Literal["head", "channel"] = "head"
    """Unit of a channel dimension that is split into heads."""

    norm: Literal["exact", "pin"] = "exact"
    """Channels under a layer norm may go, and it keeps its divisor; or they stay."""

    group_divisible: Annotated[int, Field(ge=1)] = 1
    """Each group keeps a multiple of this many units; smaller groups stay whole."""

    min_kept: Annotated[int, Field(ge=1)] = 1
    """Least number of units that each group keeps."""

    targets: Selector = ("*",)
    """Layers whose output channels may go: selector patterns over names and kinds. A group that
    holds output channels of another layer stays."""


class Zig(Pass[ZigOptions]):
    """Scores zero-invariant groups, removes the lowest, and slices the program.

    A unit is every parameter slice that has to go together with a channel. The smaller program
    equals the one with these slices zeroed; the pass checks that on the example inputs.

    Source: Chen et al. 2023, "OTOv2" (groups); Chen et al. 2024, "HESSO" (criteria). The cosine
    keeps OTOv2's sign, where HESSO's code has the opposite. `fisher`: Frantar et al. 2021, "M-FAC",
    with the optimal brain surgeon's increase 1/2 w_Q ([F^-1]_QQ)^-1 w_Q for all values Q of a unit.
    """

    contract = "lossy"
    weights = "reformed"
    needs_with: ClassVar[Mapping[tuple[str, Any], Need]] = dict.fromkeys(
        (("score", name) for name in (*WITH_GRADIENT, "fisher")), "calibration"
    )
    papers = ("P46", "P66")

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        groups = channel_groups(program, unit=o.unit, norm=o.norm)
        eligible, actions = eligible_groups(program, groups, o.targets)
        if not eligible:
            raise ModelError("no channel group can be pruned",
                             fix="`graphwright inspect --groups` says why.")  # fmt: skip
        analysis = eligible[0].analysis
        selection = Selection(analysis, eligible, self._scores(eligible, context),
                              o.group_divisible, o.min_kept, o.scope == "group")  # fmt: skip
        chosen = _choose(selection, o.of, o.sparsity)
        picks = {g: u.tolist() for g, u in zip(eligible, chosen, strict=True) if len(u)}
        actions += [_action(g, len(u)) for g, u in zip(eligible, chosen, strict=True)]
        if not picks:
            return Result(program, tuple(actions))
        smaller = cut(program, picks)
        error = gap(masked_outputs(program, picks), smaller, self.id)
        return Result(smaller, tuple(actions), _metrics(selection, chosen, error))

    def _scores(self, groups: list[ChannelGroup], context: Context) -> list[np.ndarray]:
        """A score per unit of every group."""
        o, analysis = self.options, groups[0].analysis
        if o.score == "fisher":
            return _fisher_scores(groups, o, context)
        mean = None
        if o.score in WITH_GRADIENT:
            mean = _gradients(analysis.program, context, o.loss)
        found = scores(
            o.score, unit_sums(analysis, mean), np.concatenate([g.classes for g in groups])
        )
        return np.split(found, np.cumsum([g.units for g in groups])[:-1])


def _choose(selection: Selection, of: str, sparsity: float) -> list[np.ndarray]:
    analysis = selection.analysis
    nothing = np.zeros(analysis.count, bool)
    units = sum(g.units for g in selection.groups)
    measures: dict[str, Callable[[np.ndarray], float]] = {
        "groups": lambda removed: int(removed.sum()) / units,
        "parameters": lambda removed: 1 - analysis.parameters(removed) / whole,
        "macs": lambda removed: 1 - analysis.macs(removed) / whole,
    }
    whole = max(1.0, analysis.macs(nothing) if of == "macs" else analysis.parameters(nothing))
    measure = measures[of]
    target = np.floor(sparsity * units) / units if of == "groups" else sparsity
    most = measure(selection.flags(selection.removed_at(selection.steps())))
    if most < target - 0.02:
        raise ArgumentError(
            f"sparsity {sparsity} of {of} cannot be reached: {most:.3f} is the most",
            fix="Lower it, min_kept or group_divisible, or widen targets.",
        )
    return selection.choose(measure, float(target))


def _action(group: ChannelGroup, removed: int) -> Action:
    if removed == 0:
        return Action.left(group.name, "its units score higher, or its limits keep them", "kept")
    return Action(group.name, f"cut to {group.units - removed} of {group.units} units")


def _metrics(selection: Selection, chosen: list[np.ndarray], error: float) -> dict[str, float]:
    analysis, removed = selection.analysis, selection.flags(chosen)
    nothing = np.zeros(analysis.count, bool)
    return {
        "units_removed": float(sum(len(u) for u in chosen)),
        "parameters_left": analysis.parameters(removed) / max(1, analysis.parameters(nothing)),
        "macs_left": analysis.macs(removed) / max(1.0, analysis.macs(nothing)),
        "cut_error": error,
    }


def _gradients(program: Program, context: Context, loss: LossName) -> dict[str, Tensor]:
    """Mean gradient of the loss over the calibration batches, by parameter."""
    total: dict[str, Tensor] = {}
    count = 0
    batches = labelled(context.batches, program.signature)
    for found in gradients(program, batches, loss):
        total = {name: g + total[name] if total else g for name, g in found.items()}
        count += 1
        context.progress("gradients", count, 0)
    return {name: gradient / count for name, gradient in total.items()}


def _fisher_scores(
    groups: list[ChannelGroup], options: ZigOptions, context: Context
) -> list[np.ndarray]:
    """Loss increases by the Fisher matrix of all parameters that the groups have slices of."""
    program = groups[0].analysis.program
    every = program.parameters()
    names = dict.fromkeys(m.parameter for g in groups for m in g.members if m.parameter in every)
    parameters: dict[str, Tensor] = {name: every[name] for name in names}
    draws = Draws(context.batches, program.signature, options.gradients, options.batch_size)
    size = sum(p.numel() for p in parameters.values())
    with room(draws.count, size, context.work) as buffer:
        batches = draws.draw(context.generator("gradients"))
        for row, found in enumerate(gradients(program, batches, options.loss, parameters)):
            buffer[row] = torch.cat([found[name].flatten() for name in parameters])
            context.progress("gradients", row + 1, draws.count)
        return unit_costs(groups, parameters, buffer, options.damp)
