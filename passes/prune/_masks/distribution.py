"""Sparsities of single layers that come to one share of zeros in all of them: ERK, LAMP, OWL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.calibration.experts import part_names
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.context import Context
from graphwright.ir.layers.products import as_matrix, geometry
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.options import Rule, only_with
from graphwright.ir.program import Program
from graphwright.passes.prune._masks.layers import matrix
from graphwright.passes.prune._masks.patterns import Pattern, SparsityOptions
from graphwright.passes.prune._math.features import Features, features


class LayerwiseOptions(SparsityOptions):
    """Options of passes whose layers may have shares of their own."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("distribution", "distribution == 'uniform' or pattern == 'unstructured'",
             "the pattern {pattern} has one sparsity in every layer: it takes no distribution"),
        only_with("outliers", "distribution", ["owl"]),
        only_with("spread", "distribution", ["owl"]),
    )  # fmt: skip

    distribution: Literal["uniform", "erk", "lamp", "owl"] = "uniform"
    """Sparsity of every layer, `sparsity` on average over all weights: the same (`uniform`); less
    for layers with few weights for their inputs and outputs (`erk`); what a comparison of all
    weights, each by its share of its layer's larger ones, leaves (`lamp`); or less where more of
    |w| ||x|| are outliers (`owl`, which looks at calibration data, and gives the layers of one
    block the same). An N:M pattern has one sparsity everywhere."""

    outliers: Annotated[float, Field(gt=1)] = 5.0
    """For `owl`: multiple of a layer's mean above which |w| ||x|| is an outlier."""

    spread: Annotated[float, Field(gt=0, lt=1)] = 0.08
    """For `owl`: largest distance of a layer's sparsity from the average."""


def distributed(
    program: Program, layers: Sequence[Layer], options: LayerwiseOptions, context: Context
) -> dict[str, Pattern]:
    """The pattern of every layer, and of every expert of a stack, by name."""
    own = list({layer.weight: layer for layer in layers}.values())
    shapes = [tuple(program.state[layer.weight].shape) for layer in own]
    sizes = [math.prod(shape) for shape in shapes]
    wanted = options.wanted()
    if options.distribution == "uniform":
        return _named(program, layers, {layer.weight: wanted for layer in own})
    if options.distribution == "erk":
        densities = erk(shapes, 1 - wanted.sparsity)
    elif options.distribution == "lamp":
        scores = [lamp_scores(matrix(program, layer)) for layer in own]
        densities = lamp(scores, wanted)
    else:
        ratios = outlier_ratios(program, own, options.outliers, context)
        densities = owl(ratios, sizes, 1 - wanted.sparsity, options.spread)
    patterns = {layer.weight: Pattern(min(max(1 - density, 0.0), 1.0))
                for layer, density in zip(own, densities, strict=True)}  # fmt: skip
    return _named(program, layers, patterns)


def _named(
    program: Program, layers: Sequence[Layer], patterns: Mapping[str, Pattern]
) -> dict[str, Pattern]:
    return {
        name: patterns[layer.weight]
        for layer in layers
        for name in (layer.name, *part_names(layer, geometry(program, layer).groups))
    }


def erk(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """Densities in proportion to sum(shape) / prod(shape), none above 1.

    Source: Evci et al. 2020, "Rigging the Lottery", section 3 (Erdos-Renyi-Kernel), and its code.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        room = density * sum(sizes) - sum(sizes[i] for i in dense)
        rest = [i for i in range(len(sizes)) if i not in dense]
        factor = room / max(1e-12, sum(raw[i] * sizes[i] for i in rest))
        full = {i for i in rest if raw[i] * factor > 1}
        if not full:
            return [1.0 if i in dense else raw[i] * factor for i in range(len(sizes))]
        dense |= full


def lamp_scores(w: Tensor) -> Tensor:
    """w^2 over the sum of all squares in the layer that are no smaller; (n,) in ascending order.

    Source: Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", equation 4.
    """
    squares = w.double().square().flatten().sort().values
    left = squares.flip(0).cumsum(0).flip(0)
    return (squares / left.clamp_min(1e-300)).float()


def lamp(scores: Sequence[Tensor], pattern: Pattern) -> list[float]:
    """Densities that the wanted number of lowest scores over all layers leaves."""
    every = torch.cat(list(scores))
    count = pattern.count(every.numel())
    limit = float(every.kthvalue(count).values) if count else -math.inf
    return [float((layer > limit).double().mean()) for layer in scores]


def owl(
    ratios: Sequence[float], sizes: Sequence[int], density: float, spread: float
) -> list[float]:
    """Densities that rise with the share of outliers, `spread` to either side at most.

    Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)", section 3.2, and its code;
    the mean is weighted by the layers' sizes.
    """
    low, high = min(ratios), max(ratios)
    if high == low:
        return [density] * len(ratios)
    raised = [(r - low) / (high - low) * 2 * spread for r in ratios]
    mean = sum(r * n for r, n in zip(raised, sizes, strict=True)) / sum(sizes)
    return [r - mean + density for r in raised]


@dataclass(frozen=True)
class _Outliers:
    """Counts outliers of |w| ||x||; changes nothing."""

    above: float

    def gather(self, site: Site) -> Features:
        """Sizes of the input's features."""
        return features(site)

    def solve(self, task: Task) -> Solved:
        """The layer's share of outliers, and how many weights it has."""
        w = as_matrix(task.geometry, task.weight).float().abs()
        size = w * task.stats.norm.unsqueeze(1)
        return Solved(info={"outliers": float((size > self.above * size.mean()).float().mean())})


def outlier_ratios(
    program: Program, layers: Sequence[Layer], above: float, context: Context
) -> list[float]:
    """Share of outliers of every layer: that of its block, which is its name up to a number."""
    found = sweep(program, layers, context.batches, _Outliers(above), context.within("outliers"),
                  follow="program")  # fmt: skip
    counts: dict[str, list[float]] = {}
    for layer in layers:
        n = program.state[layer.weight].numel()
        total = counts.setdefault(block_of(layer.name), [0.0, 0.0])
        total[0] += n * found[layer.node.name].info["outliers"]
        total[1] += n
    return [counts[block_of(layer.name)][0] / counts[block_of(layer.name)][1] for layer in layers]


def block_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up`; the name itself where no part is a number."""
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:end])
