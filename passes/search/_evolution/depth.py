"""Levels that are there and gone: branches beside skips, removed as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.skips import Skip, find_skips, operands
from graphwright.ir.layers.heads import attentions
from graphwright.ir.layers.selectors import layers, select
from graphwright.ir.program import Program
from graphwright.passes.search._evolution.levels import Levels, Unit

aten = torch.ops.aten


class Depth:
    """The database of branches: in a trial each is multiplied by 1 or 0, in the result it is gone.

    A branch is the body of a skip that is added: x + f(x) becomes x. Where skips enclose each other
    the inner ones count.

    Args:
        program: whole.
        targets: selector of layers; a branch counts by its last one.
        by: id of the pass.

    Raises:
        ModelError: no selected layer ends a branch that can be removed.
    """

    def __init__(self, program: Program, targets: Sequence[str], by: str) -> None:
        self.program, self.by = program, by
        chosen = {layer.node for layer in select(program, targets)}
        names = {layer.node: layer.name for layer in layers(program)}
        skips = _branches([s for s in find_skips(program) if s.body[-1] in chosen])
        if not skips:
            raise ModelError(
                f"{by}: no skip that is added goes past the selected layers",
                fix="Widen `targets`; `graphwright inspect` shows the layers.",
            )
        self.units: list[Unit] = []
        self._gates: list[str] = []
        self._joins = [skip.join.name for skip in skips]
        self._sources = [skip.source.name for skip in skips]
        attending = _attending(program)
        editor = Editor(program, by=by)
        nodes = {node.name: node for node in editor.graph.nodes}
        one = torch.ones((), dtype=skips[0].join.meta["val"].dtype)
        for skip in skips:
            group = "attention" if _between(skip) & attending else "mlp"
            inside = tuple(names[node] for node in skip.body)
            name = f"{group} branch {inside[0]} to {inside[-1]}"
            self.units.append(Unit(name, inside, (skip.join.name,), group, (0, 1)))
            self._gates.append(_gate(editor, nodes, skip, one))
        self.trial = editor.finish(propagate=False)
        self._values = (torch.zeros_like(one), one)

    def tensors(self, unit: int, level: int) -> Mapping[str, Tensor]:
        """The gate of a branch: 1, or 0."""
        return {self._gates[unit]: self._values[level]}

    def made(self, levels: Levels) -> Program:
        """The program without the branches of level 0."""
        editor = Editor(self.program, by=self.by)
        nodes = {node.name: node for node in editor.graph.nodes}
        for join, source, level in zip(self._joins, self._sources, levels, strict=True):
            if level == 0:
                kept = nodes[source]
                while kept.name in self._joins and levels[self._joins.index(kept.name)] == 0:
                    kept = nodes[self._sources[self._joins.index(kept.name)]]
                editor.replace(nodes[join], kept)
        return editor.finish()


def _branches(skips: Sequence[Skip]) -> list[Skip]:
    """Skips that are added as they are; of those that share a layer, the one around the fewest."""
    found: list[Skip] = []
    for skip in sorted(skips, key=lambda skip: len(skip.body)):
        shape = skip.source.meta["val"].shape == skip.join.meta["val"].shape
        factor = skip.join.kwargs.get("alpha", 1) == 1
        is_plain = skip.kind == "add" and not skip.projection and shape and factor
        if is_plain and not any(set(skip.body) & set(other.body) for other in found):
            found.append(skip)
    order = {node: i for i, node in enumerate(found[0].join.graph.nodes)} if found else {}
    return sorted(found, key=lambda skip: order[skip.join])


def _attending(program: Program) -> set[fx.Node]:
    """Operands of attentions."""
    return {node for parts in attentions(program.graph) for node in parts}


def _between(skip: Skip) -> set[fx.Node]:
    """Nodes between the fork of a skip and its sum."""
    found: set[fx.Node] = set()
    stack = [node for node in operands(skip.join) if node is not skip.source]
    while stack:
        node = stack.pop()
        if node not in found and node is not skip.fork:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _gate(editor: Editor, nodes: Mapping[str, fx.Node], skip: Skip, one: Tensor) -> str:
    """Multiplies a branch by a stored number; its name."""
    join = nodes[skip.join.name]
    (end,) = (n for n in operands(skip.join) if n is not skip.source)
    name = editor.add_state("branch_gate", one.clone())
    gated = editor.call(aten.mul.Tensor, nodes[end.name], editor.get(name), before=join, like=join)
    args = tuple(gated if arg is nodes[end.name] else arg for arg in join.args)
    editor.set_args(join, *args, **dict(join.kwargs))
    return name
