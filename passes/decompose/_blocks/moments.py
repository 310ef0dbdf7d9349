"""The statistics of all blocks, from one walk over the unchanged program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.calibration.hessian import Hessian, hessian, seen_or_even
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.context import Context
from graphwright.ir.layers.factors import relative_error
from graphwright.ir.layers.products import as_matrix
from graphwright.ir.program import Program
from graphwright.passes.decompose._attention.solve import Moments
from graphwright.passes.decompose._blocks.blocks import Block
from graphwright.passes.decompose._math.modular import nystrom


@dataclass(frozen=True)
class SolvedUnits:
    """A feed-forward part.

    Attributes:
        kept: (k,) columns of the down projection that stay.
        weight: (out, k) of it.
        error: of what it gives, relative, on the data.
    """

    kept: Tensor
    weight: Tensor
    error: float


def gather(
    program: Program, blocks: Sequence[Block], ranks: Mapping[str, int], context: Context
) -> tuple[dict[str, Moments], dict[str, SolvedUnits]]:
    """Moments in front of every attention's projections, and all feed-forward parts solved.

    Args:
        program: left as it is.
        blocks: of it.
        ranks: hidden units that stay, by name of the down projection.
        context: of the pass.
    """
    projections = [p.layer for block in blocks for a in block.attentions
                   for p in (a.query, a.key, a.value)]  # fmt: skip
    downs = [part.down for block in blocks for part in block.feed_forwards]
    unique = {layer.node: layer for layer in [*projections, *downs]}
    method = _Method(dict(ranks))
    found = sweep(program, list(unique.values()), context.batches, method, context,
                  follow="program")  # fmt: skip
    moments, solved = {}, {}
    for layer in unique.values():
        one = found[layer.node.name]
        if layer.name in ranks:
            solved[layer.name] = SolvedUnits(
                one.state["kept"], one.state["weight"], one.info["error"]
            )
        else:
            moments[layer.name] = Moments(one.state["c"], one.state["mean"])
    return moments, solved


@dataclass(frozen=True)
class _Method:
    ranks: dict[str, int]

    def gather(self, site: Site) -> Hessian:
        return hessian(site.rows())

    def solve(self, task: Task) -> Solved:
        stats: Hessian = task.stats
        c = seen_or_even(stats)[0]
        if task.name not in self.ranks:
            return Solved(state={"c": c, "mean": stats.mean[0]})
        down = as_matrix(task.geometry, task.weight)[0].double()
        kept, weight = nystrom(c, down, self.ranks[task.name])
        change = down.clone()
        change[:, kept] -= weight
        error = relative_error(change, down, c)
        return Solved(state={"kept": kept, "weight": weight.to(torch.float32)},
                      info={"error": error})  # fmt: skip
