"""prune.zig: removes the least important channels, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphwright.ir.channels import ChannelGroup, channel_groups, cut, masked_outputs
from graphwright.ir.channels.eligible import eligible_groups
from graphwright.ir.channels.families import Family
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.work import BACKWARD, STRUCTURAL, Load, Work
from graphwright.passes.base import Action, Context, Need, Pass, Result
from graphwright.passes.prune._units.eligible import (
    gap,
    gutted,
    largest_shares,
    with_scales,
)
from graphwright.passes.prune._units.gradients import LossName
from graphwright.passes.prune._units.importance import ON_DATA, Importance, Normalize, Score
from graphwright.passes.prune._units.measures import Of, measure
from graphwright.passes.prune._units.removed import Removed
from graphwright.passes.prune._units.select import Selection

Share = Annotated[float, Field(ge=0, lt=1)]


class ZigOptions(Bounded):
    """Options of prune.zig."""

    sparsity: Share = 0.5
    """Share to remove, of what `of` says."""

    of: Of = "groups"
    """What the share is of: removable units (zero-invariant groups); the program's parameters, its
    multiply-accumulates at the example sizes, or the bytes of its weights; or `latency`, the time
    that the cut program takes on the examples as PyTorch runs it, measured again and again."""

    score: Score = "auto"
    """Importance of a unit. From its weights: `magnitude` (L2), `l1`, `normalized_magnitude` (L2 by
    the number of values), `geometric_median` (distances to the other units), `bn_scale`; from
    calibration data: `activation`, `taylor` (|x.g| of the mean gradient), `taylor_per_batch`
    (mean of (x.g)^2 over the batches), `cosine`, `hesso` (a mean of five criteria), `fisher` (loss
    increase by the inverse empirical Fisher, M-FAC); or `random`. `auto` is `taylor_per_batch`
    where there is calibration data (and no weight in codes), and else `magnitude`."""

    normalize: Normalize = "auto"
    """What makes scores of unlike groups comparable: `mean` divides by the mean of the group,
    `cost` by what a unit saves of what `of` says, `none` takes them as they are. `auto` is `cost`
    for scores that estimate changes of the loss, and else `mean`."""

    rounds: Annotated[int, Field(ge=1)] | None = None
    """Times that units are scored and removed, an equal share each time, without training. When
    absent, 5 for `taylor` and `taylor_per_batch` on data with labels, and else 1: without labels a
    later round would follow the program as the earlier ones have left it."""

    gradients: Annotated[int, Field(ge=1)] = 64
    """Mini-batch gradients that `fisher` is made of; fewer where there are fewer samples."""

    batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples of such a mini-batch at most; fewer where the data is not enough."""

    damp: Annotated[float, Field(gt=0)] = 1e-5
    """Number added to the diagonal of the Fisher matrix."""

    scope: Literal["global", "group"] = "global"
    """Compare scores over the whole program, or take the same share of every group."""

    loss: LossName = "auto"
    """Loss whose gradient the scores use: `cross_entropy` with the labels in the data, `next_token`
    of a language model, `energy`, the mean square of the outputs, or `projection`, their product
    with random numbers, by which `taylor_per_batch` estimates how far the outputs move. `auto` is
    the first where there are labels; else `projection` for `taylor_per_batch`, and `energy` for
    the others."""

    unit: Literal["head", "channel"] = "head"
    """Unit of a channel dimension that is split into heads."""

    norm: Literal["exact", "pin"] = "exact"
    """Channels under a layer norm may go, and it keeps its divisor; or they stay."""

    group_divisible: Annotated[int, Field(ge=1)] = 1
    """Each group keeps a multiple of this many units; smaller groups stay whole."""

    min_kept: Annotated[int, Field(ge=1)] = 1
    """Least number of units that each group keeps."""

    max_ratio: Share = 0.9
    """Largest share of its units that a group loses."""

    max_ratios: dict[str, Share] = Field(default_factory=dict)
    """Largest shares by layer: selector patterns over names and kinds. A group that holds output
    channels of several layers obeys the least of theirs."""

    spare: tuple[Family, ...] = ()
    """Kinds of groups that stay whole: the `residual` stream, attention `heads`, the width of
    `embeddings`, `hidden` channels (all others)."""

    warn_above: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of its units above which the loss of a group is a warning in the report."""

    targets: Selector = ("*",)
    """Layers whose output channels may go: selector patterns over names and kinds. A group that
    holds output channels of another layer stays."""


class Zig(Pass[ZigOptions]):
    """Scores zero-invariant groups, removes the lowest, and slices the program.

    A unit is every parameter slice that has to go together with a channel. The smaller program
    equals the one with these slices zeroed; the pass checks that on the example inputs.

    Units of unlike groups (a filter of 9 values, a channel of a residual stream with thousands)
    are only comparable in a common measure: see `normalize`. No group loses more than `max_ratio`
    of its units, and one that loses more than `warn_above` is named in a warning.

    Source: Chen et al. 2023, "OTOv2" (groups); Chen et al. 2024, "HESSO" (criteria). The cosine
    keeps OTOv2's sign, where HESSO's code has the opposite. `taylor_per_batch`: Molchanov et al.
    2019, "Importance Estimation for Neural Network Pruning", equation 8. `geometric_median`: He et
    al. 2019, "Filter Pruning via Geometric Median". `bn_scale`: Liu et al. 2017, "Network
    Slimming". `fisher`: Frantar et al. 2021, "M-FAC", with the optimal brain surgeon's increase 1/2
    w_Q ([F^-1]_QQ)^-1 w_Q for all values Q of a unit. `mean`: Fang et al. 2023, "DepGraph".
    """

    contract = "lossy"
    weights = "reformed"
    needs_with: ClassVar[Mapping[tuple[str, Any], Need]] = dict.fromkeys(
        (("score", name) for name in ON_DATA), "calibration"
    )
    papers = ("P46", "P66")

    def cost(self, load: Load) -> Work:
        work = super().cost(load) + Work(edited=STRUCTURAL * load.nodes)
        if self.needed == "nothing":
            return work
        return work + load.forward(load.calibration).times(BACKWARD)

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        current, actions = program, []
        removed: Removed | None = None
        rounds = o.rounds or self._importance().rounds(program, context)
        for number in range(1, rounds + 1):
            groups = channel_groups(current, unit=o.unit, norm=o.norm)
            eligible, left_alone = eligible_groups(current, groups, o.targets, o.spare)
            if o.score == "bn_scale":
                eligible, without = with_scales(eligible)
                left_alone += without
            if removed is None:
                if not eligible:
                    raise ModelError("no channel group can be pruned",
                                     fix="`graphwright inspect --groups` says why.")  # fmt: skip
                limits = largest_shares(current, eligible, o.max_ratio, o.max_ratios)
                whole = measure(o.of, eligible, context)
                removed, actions = Removed.nothing(eligible, limits, whole), left_alone
            if not eligible:
                break
            here = context.within("round", number) if rounds > 1 else context
            picks = self._choose(removed, eligible, o.sparsity * number / rounds, here)
            if picks:
                smaller = cut(current, picks)
                removed.note(picks, gap(masked_outputs(current, picks), smaller, self.id))
                current = smaller
        assert removed is not None  # there is a first round
        actions += [_action(removed, name) for name in removed.units]
        if current is program:
            return Result(program, tuple(actions))
        warnings = gutted(removed.units, removed.gone, o.warn_above)
        return Result(current, tuple(actions), _metrics(removed, current), warnings=warnings)

    def _importance(self) -> Importance:
        o = self.options
        return Importance(o.score, o.normalize, o.of, o.loss, o.gradients, o.batch_size, o.damp)

    def _choose(
        self, removed: Removed, groups: list[ChannelGroup], sparsity: float, context: Context
    ) -> dict[ChannelGroup, list[int]]:
        """The units to remove, so that the share `sparsity` of the first program is gone."""
        o = self.options
        scores = self._importance().per_unit(groups, context)
        selection = Selection(groups[0].analysis, groups, scores,
                              o.group_divisible, removed.least(groups, o.min_kept),
                              o.scope == "group")  # fmt: skip
        share = removed.share(measure(o.of, groups, context), o.of == "groups", groups)
        most = share(selection.flags(selection.removed_at(selection.steps())))
        if not removed.gone:
            _check_reachable(most, o)
        if o.of == "groups":
            sparsity = math.floor(sparsity * removed.whole + 1e-9) / removed.whole
        chosen = selection.choose(share, sparsity)
        return {g: u.tolist() for g, u in zip(groups, chosen, strict=True) if len(u)}


def _check_reachable(most: float, options: ZigOptions) -> None:
    if most < options.sparsity - 0.02:
        raise ArgumentError(
            f"sparsity {options.sparsity} of {options.of} cannot be reached: {most:.3f} is the "
            "most",
            fix="Lower it, min_kept or group_divisible, raise max_ratio, or widen targets.",
        )


def _action(removed: Removed, name: str) -> Action:
    units, gone = removed.units[name], removed.gone.get(name, 0)
    if gone == 0:
        return Action.left(name, "its units score higher, or its limits keep them", "kept")
    kinds = ", ".join(removed.kinds[name])
    return Action(name, f"cut to {units - gone} of {units} units ({kinds})")


def _metrics(removed: Removed, program: Program) -> dict[str, float]:
    analysis = channel_groups(program)[0].analysis
    none = np.zeros(analysis.count, bool)
    return {
        "units_removed": float(sum(removed.gone.values())),
        "parameters_left": analysis.parameters(none) / removed.parameters,
        "macs_left": analysis.macs(none) / removed.macs,
        "largest_share_of_a_group": max(n / removed.units[g] for g, n in removed.gone.items()),
        "cut_error": removed.error,
    }
