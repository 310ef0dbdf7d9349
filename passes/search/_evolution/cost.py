"""The work of an evolution: candidates judged, generation by generation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from graphwright.ir.work import Load, Work

if TYPE_CHECKING:
    from graphwright.passes.search._evolution.run import EvolutionOptions


def evolution(load: Load, options: EvolutionOptions, generations: int) -> Work:
    """Runs of the trial program; stages look at no more rows than the calibration data has.

    Args:
        load: sizes of the model and of the data.
        options: of the evolution.
        generations: how many.
    """
    data = load.calibration
    if data is None:
        return Work()
    rows = _rows_of_a_run(load)
    judged = (options.offspring, *(count + 1 for count in options.survivors))
    per_generation = Work()
    for count, tokens in zip(judged, options.tokens, strict=False):
        share = min(tokens / rows / max(data.runs, 1e-9), 1.0)
        whole = load.forward(data)
        per_generation += whole.times(share * count)
    return per_generation.times(generations)


def _rows_of_a_run(load: Load) -> float:
    """Rows of the first output of a run on the examples: tokens of text, else samples."""
    node = next(node for node in load.program.graph.nodes if node.op == "output")
    first = node.all_input_nodes[0].meta["val"]
    sizes = [int(size.node.hint) if hasattr(size, "node") else int(size) for size in first.shape]
    return float(max(math.prod(sizes[:-1]), 1))
