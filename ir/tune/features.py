"""Distillation: the outputs of a teacher, and its values at nodes inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import copy_graph
from graphwright.ir.program import Program
from graphwright.ir.signature import leaf_of
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.ir.tune.losses import main_output, wide


class Features(Hook):
    """Adds the distance to a teacher's values, in the middle and at the end, to the loss.

    loss + `output` * mse(outputs) + `feature` * sum over pairs of mse(values at the nodes).

    Source: P21 and Kim et al. 2023, "BK-SDM", whose loss has these three terms.
    """

    def __init__(
        self,
        teacher: Program,
        pairs: Sequence[tuple[str, str]],
        *,
        output: float = 1.0,
        feature: float = 1.0,
    ) -> None:
        """
        Args:
            teacher: takes the inputs of the program in training.
            pairs: names of a node of that program and of one of the teacher's, of equal shapes.
            output: factor of the distance of the main outputs.
            feature: factor of the distances at the nodes.
        """
        self.pairs, self.output, self.feature = tuple(pairs), output, feature
        self.main = main_output(teacher.signature)
        self.inputs = [spec.name for spec in teacher.signature.inputs]
        self.structure = teacher.signature.structure
        self.teach = reading(teacher.eval(), [theirs for _, theirs in pairs])
        self.seen: dict[int, Tensor] = {}

    def on_graph(self, graph: fx.Graph) -> None:
        nodes = {node.name: node for node in graph.nodes}
        for number, (ours, _) in enumerate(self.pairs):
            if ours not in nodes:
                raise ModelError(f"the program has no node {ours!r} to compare with the teacher's")
            with graph.inserting_after(nodes[ours]):
                graph.call_function(self._note(number), (nodes[ours],))

    def also_run(self, at: Moment, batch: Values) -> Sequence[Values]:
        self.seen.clear()
        return ()

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        with torch.no_grad():
            expected = self.teach(*(batch[name] for name in self.inputs))
        last = expected[-1][self.main]
        if self.output:
            own = leaf_of(self.structure, outputs, self.main)
            loss = loss + self.output * F.mse_loss(wide(own), wide(last))
        for number in range(len(self.pairs)):
            distance = F.mse_loss(wide(self.seen[number]), wide(expected[number]))
            loss = loss + self.feature * distance
        return loss

    def _note(self, number: int) -> Callable[[Tensor], None]:
        def note(value: Tensor) -> None:
            self.seen.setdefault(number, value)  # of the first run, that of the batch

        note.__name__ = f"note_{number}"
        return note


def reading(program: Program, names: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
    """Runs a program for the values of nodes, and its flat outputs behind them."""
    graph = copy_graph(program.graph)
    nodes = {node.name: node for node in graph.nodes}
    missing = [name for name in names if name not in nodes]
    if missing:
        raise ModelError(f"the teacher has no node {missing[0]!r}")
    last = next(iter(graph.find_nodes(op="output")))
    last.args = ((*(nodes[name] for name in names), last.args[0]),)
    state: Mapping[str, Tensor] = {n: t.detach() for n, t in program.state.items()}
    module = fx.GraphModule(dict(state), graph, class_name="Teacher")

    def run(*inputs: Tensor) -> tuple[Any, ...]:
        return tuple(module.to(inputs[0].device)(*inputs))

    return run
