"""Importance of the units of channel groups: from the score that was asked for to numbers that can
be compared over the whole program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.channels.analysis import Analysis
from graphwright.ir.context import Context
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.program import Program
from graphwright.passes.prune._units.activations import mean_squares
from graphwright.passes.prune._units.gradients import Draws, LossName, gradients, labelled, room
from graphwright.passes.prune._units.group_fisher import unit_costs
from graphwright.passes.prune._units.measures import Of, cost_of_unit
from graphwright.passes.prune._units.median import distances
from graphwright.passes.prune._units.scores import WITH_GRADIENT, Sums, scores, unit_sums

Score = Literal[
    "auto", "magnitude", "l1", "normalized_magnitude", "geometric_median", "bn_scale", "random",
    "activation", "cosine", "taylor", "taylor_per_batch", "hesso", "fisher",
]  # fmt: skip
Normalize = Literal["auto", "mean", "cost", "none"]

ON_DATA = ("activation", *WITH_GRADIENT, "taylor_per_batch", "fisher")
"""Scores that look at calibration data."""

ROUNDS = 5
CODED = ("dequantize", "fake_quantize", "expand_2_4")
"""Operators of ours that weights in codes are read through; no gradient reaches what they store."""

AUTO: dict[str, Literal["cost", "none"]] = {
    "taylor": "cost", "taylor_per_batch": "cost", "fisher": "cost",
    "hesso": "none", "cosine": "none", "random": "none",
}  # fmt: skip
"""Forms of `normalize: auto` for scores that are no sizes of weights or activations: changes of one
loss, which a unit's cost is weighed against, and numbers that are normalized already."""


@dataclass(frozen=True)
class Importance:
    """The way units are scored; the fields are options of prune.zig."""

    score: Score
    normalize: Normalize
    of: Of
    loss: LossName
    gradients: int
    batch_size: int
    damp: float

    def resolved(self, program: Program, context: Context) -> Score:
        """The score that `auto` stands for: `taylor_per_batch` with data and float weights, else
        `magnitude`."""
        if self.score != "auto":
            return self.score
        coded = any(op_name(node).startswith(CODED) for node in program.graph.nodes)
        return "magnitude" if context.calibration is None or coded else "taylor_per_batch"

    def rounds(self, program: Program, context: Context) -> int:
        """Rounds that pay: several where a loss with labels is followed, else one."""
        if self.resolved(program, context) not in ("taylor", "taylor_per_batch"):
            return 1
        first = next(labelled(context.batches, program.signature), None)
        has_loss = self.loss in ("cross_entropy", "next_token") or (
            self.loss == "auto" and first is not None and first[1] is not None
        )
        return ROUNDS if has_loss else 1

    def per_unit(self, groups: Sequence[ChannelGroup], context: Context) -> list[np.ndarray]:
        """A score per unit of every group; low ones go first."""
        name = self.resolved(groups[0].analysis.program, context)
        found = self._raw(name, groups, context)
        how = AUTO.get(name, "mean") if self.normalize == "auto" else self.normalize
        if how == "mean":
            return [of_mean(values) for values in found]
        if how == "none":
            return found
        return [v / cost_of_unit(self.of, g) for v, g in zip(found, groups, strict=True)]

    def _raw(
        self, name: Score, groups: Sequence[ChannelGroup], context: Context
    ) -> list[np.ndarray]:
        analysis = groups[0].analysis
        if name == "fisher":
            return _fisher(list(groups), self, context)
        if name == "random":
            draw = np.random.default_rng(context.generator("random").initial_seed())
            return [draw.random(g.units) for g in groups]
        if name == "geometric_median":
            return [distances(group) for group in groups]
        if name == "activation":
            return split(mean_squares(analysis, context), groups)
        if name == "taylor_per_batch":
            return split(_per_batch(analysis, context, self.loss), groups)
        mean = None
        if name in WITH_GRADIENT:
            mean = _gradients(analysis.program, context, self.loss)
        units = np.concatenate([g.classes for g in groups])
        found = scores(name, unit_sums(analysis, mean), units)
        return np.split(found, np.cumsum([g.units for g in groups])[:-1])


def of_mean(values: np.ndarray) -> np.ndarray:
    """Values as multiples of their mean: comparable between groups of any size and kind."""
    mean = float(values.mean())
    return values / mean if mean > 0 else values


def split(by_class: np.ndarray, groups: Sequence[ChannelGroup]) -> list[np.ndarray]:
    """Values by class as values by unit of every group."""
    return [by_class[group.classes] for group in groups]


def _gradients(program: Program, context: Context, loss: LossName) -> dict[str, Tensor]:
    """Mean gradient of the loss over the calibration batches, by parameter."""
    total: dict[str, Tensor] = {}
    count = 0
    for found in _each(program, context, loss):
        total = {name: g + total[name] if total else g for name, g in found.items()}
        count += 1
    return {name: gradient / count for name, gradient in total.items()}


def _per_batch(analysis: Analysis, context: Context, loss: LossName) -> np.ndarray:
    """Mean over the batches of (x.g)^2, by class: what one batch gains the next cannot cancel.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8,
    with the sum over a unit's values inside the square.
    """
    total, count = np.zeros(analysis.count), 0
    for found in _each(analysis.program, context, loss, "projection"):
        sums: Sums = unit_sums(analysis, found, only_products=True)
        total += sums.xd**2
        count += 1
    return total / max(1, count)


def _each(
    program: Program, context: Context, loss: LossName, unlabelled: LossName = "energy"
) -> Iterator[dict[str, Tensor]]:
    batches = labelled(context.batches, program.signature)
    every = gradients(program, batches, loss, unlabelled=unlabelled)
    for number, found in enumerate(every, 1):
        yield found
        context.progress("gradients", number, 0)


def _fisher(groups: list[ChannelGroup], options: Importance, context: Context) -> list[np.ndarray]:
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
