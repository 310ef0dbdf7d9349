"""Several runs of a program at once: what follows from stored tensors alone is computed once.

A weight in codes is rebuilt by the program whenever it runs, which is most of the work of a short
run. Only one of them is held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from graphwright.ir.check.precision import Walk, draws
from graphwright.ir.graph.turns import in_turn
from graphwright.ir.program import Program

Flat = tuple[Tensor, ...]


def run_together(program: Program, inputs: Sequence[Flat], *, wide: bool = False) -> list[Flat]:
    """Flat outputs for each of the inputs, the same as of single runs.

    Args:
        program: left as it is.
        inputs: of every run, one tensor per input.
        wide: compute in float64, as `run_in_double`.
    """
    walks = [Walk(program, each, wide=wide) for each in inputs]
    stored: set[fx.Node] = set()
    for node in in_turn(program.graph):
        if node.op == "output":
            break
        if node.op == "get_attr" or _follows(node, stored):
            stored.add(node)
        for walk in walks:
            if node in stored and node.op != "get_attr" and walk is not walks[0]:
                walk.values[node] = walks[0].values[node]
            else:
                walk.step(node)
        for walk in walks:
            walk.release(node)
    results: Any = program.graph.output_node().args[0]
    return [tuple(fx.map_arg(results, walk.value)) for walk in walks]


def _follows(node: fx.Node, stored: set[fx.Node]) -> bool:
    """Whether a call reads stored tensors, or what follows from them, and nothing else."""
    read = node.all_input_nodes
    is_call = node.op == "call_function" and not draws(node.target)
    return is_call and bool(read) and all(source in stored for source in read)
