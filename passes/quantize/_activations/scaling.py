"""The search of AWQ for the factors of a group of layers, and of each expert of a stack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.calibration.hessian import hessian
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.kinds import INPUT_AXIS, TURNED_EXPERTS
from graphwright.ir.layers.products import weight_node
from graphwright.ir.program import Program
from graphwright.ir.stored.blocks import block_for
from graphwright.passes.quantize._activations.folding import Group
from graphwright.passes.quantize._activations.region import Region
from graphwright.passes.quantize._low_bit.rounding import BlockOptions
from graphwright.passes.quantize._math import awq as awq_math


@dataclass(frozen=True)
class Trial:
    """The data for the search of a group's factors; plain, so that it travels to a worker.

    Attributes:
        ends: computes what is compared from what the region reads and the weights.
        weights: of all layers, as stored.
        inner: axis of the input channels of each.
        mean: of |x|, (in,), over all rows.
        rows: of calibration data.
        reads: what the region reads in the batches that factors are compared on.
        real: true where a token is real and no padding, (batch, length) booleans of every batch.
    """

    ends: fx.GraphModule
    weights: tuple[Tensor, ...]
    inner: tuple[int, ...]
    mean: Tensor
    rows: int
    reads: list[list[Any]]
    real: list[Tensor | None]

    def run(self, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Ends of every batch, without padding."""
        for reads, real in zip(self.reads, self.real, strict=True):
            yield [awq_math.real_rows(end, real) for end in self.ends(*reads, *weights)]


@dataclass(frozen=True)
class ExpertTrial:
    """The data for the search of one expert's factors.

    Attributes:
        weights: (out, in) of the expert in every stack of the group.
        mean: of |x|, (in,), over the rows that are routed to it.
        moments: mean of x x^T, (in, in).
        rows: how many these are.
    """

    weights: tuple[Tensor, ...]
    mean: Tensor
    moments: Tensor
    rows: int


@dataclass(frozen=True)
class Scaling:
    """The search for factors, one group after the other, see `ir.calibration.walk`.

    Each expert of a stack has factors of its own, and is judged by its own product.
    """

    program: Program
    regions: Mapping[fx.Node, tuple[Group, Region]]
    stacks: Mapping[fx.Node, Group]
    options: BlockOptions
    tokens: int
    device: torch.device

    def gather(self, site: Site) -> Trial | ExpertTrial:
        """The part of the program behind the activation, and values to try it on."""
        first = site.layers[0]
        if first.node in self.stacks:
            return self._expert(site, int(first.name.rpartition(".")[2]))
        group, region = self.regions[site.layers[0].node]
        mean, rows = awq_math.mean_size(site.rows())
        kept = spread_batches(rows, self.tokens)
        values = [list(site.values(node)) for node in region.reads]
        nodes = [weight_node(layer) for layer in group.layers]
        return Trial(
            region.module(self.program, nodes, self.device),
            tuple(constant_value(self.program, node).to(self.device) for node in nodes),
            tuple(INPUT_AXIS[layer.kind] for layer in group.layers),
            mean,
            sum(rows),
            [[batches[index] for batches in values] for index in kept],
            [site.real[index] for index in kept],
        )

    def _expert(self, site: Site, expert: int) -> ExpertTrial:
        mean, rows = awq_math.mean_size(site.rows())
        weights = []
        for layer in self.stacks[site.layers[0].node].layers:
            stack = constant_value(self.program, weight_node(layer))[expert].to(self.device)
            weights.append(stack.T if layer.kind in TURNED_EXPERTS else stack)
        return ExpertTrial(tuple(weights), mean, hessian(site.rows()).matrix[0], sum(rows))

    @property
    def solve(self) -> Callable[[Task], Solved]:
        """`best_factors` with the options; holds no program, so that it travels to a worker."""
        return partial(best_factors, self.options)


@torch.no_grad()
def best_factors(options: BlockOptions, task: Task) -> Solved:
    """The factors of least loss for the group of a `Trial`, among those of all exponents."""
    trial: Trial | ExpertTrial = task.stats
    info = {"alpha": 0.0, "gain": 1.0, "rows": float(trial.rows)}
    if isinstance(trial, ExpertTrial):
        return _of_expert(options, trial, info)
    if not trial.rows:
        return Solved(info=info)
    block = block_for(len(trial.mean), options.block)
    exact = list(trial.run(trial.weights))
    losses = []
    for step in range(awq_math.STEPS):
        s = awq_math.factors(trial.mean, step / awq_math.STEPS)
        weights = []
        for stored, axis in zip(trial.weights, trial.inner, strict=True):
            w = stored if axis == 1 else stored.T
            value = awq_math.nearest(
                w.float() * s, options.bits, block, symmetric=options.symmetric
            )
            value = (value / s).to(stored.dtype)
            weights.append(value if axis == 1 else value.T)
        losses.append(_loss(exact, trial.run(weights)))
    best = min(range(awq_math.STEPS), key=losses.__getitem__)
    if best == 0:
        return Solved(info=info)
    alpha = best / awq_math.STEPS
    info |= {"alpha": alpha, "gain": losses[best] / losses[0]}
    return Solved(state={"factors": awq_math.factors(trial.mean, alpha).cpu()}, info=info)


def _of_expert(options: BlockOptions, trial: ExpertTrial, info: dict[str, float]) -> Solved:
    """The factors under which the products of an expert's rows change least; ones where none help
    or no row is routed to it, so that the factors of a stack can lie side by side."""
    width = trial.weights[0].shape[1]
    plain = Solved(state={"factors": torch.ones(width)}, info=info)
    if not trial.rows:
        return plain
    block = block_for(width, options.block)
    losses = []
    for step in range(awq_math.STEPS):
        s = awq_math.factors(trial.mean, step / awq_math.STEPS)
        loss = 0.0
        for w in trial.weights:
            value = awq_math.nearest(
                w.float() * s, options.bits, block, symmetric=options.symmetric
            )
            change = value / s - w.float()
            loss += float(((change @ trial.moments) * change).sum())
        losses.append(loss)
    best = min(range(awq_math.STEPS), key=losses.__getitem__)
    if best == 0:
        return plain
    alpha = best / awq_math.STEPS
    found = awq_math.factors(trial.mean, alpha).cpu()
    return Solved(
        state={"factors": found}, info={**info, "alpha": alpha, "gain": losses[best] / losses[0]}
    )


def _loss(exact: Iterable[list[Tensor]], found: Iterable[list[Tensor]]) -> float:
    """Squared error of all ends in all batches."""
    total = 0.0
    for old, new in zip(exact, found, strict=True):
        for a, b in zip(old, new, strict=True):
            total += float(torch.linalg.vector_norm(b - a, dtype=torch.float64)) ** 2
    return total


def spread_batches(sizes: Sequence[int], limit: int) -> list[int]:
    """Indices of batches, spread evenly, with not more than `limit` rows in all; at least one."""
    for count in range(len(sizes), 1, -1):
        kept = [(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)]
        if sum(sizes[k] for k in kept) <= limit:
            return kept
    return [len(sizes) // 2]
