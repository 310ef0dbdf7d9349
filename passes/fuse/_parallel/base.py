"""The base of the passes that join linear layers side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.layers.selectors import layers, select
from graphwright.ir.options import Targets
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.fuse._parallel.joined import common_name, join, why_not


class ParallelPass(Pass[Targets]):
    """Joins linear layers that read one activation.

    Class attributes:
        what: the layers in words, for the report.
        own: name of the joined layer in the module that holds the others.
    """

    contract = "exact"
    stores_weights = True
    weights = "reformed"
    before = ("quantize.*", "prune.*", "adapt.*")
    what: ClassVar[str] = ""
    own: ClassVar[str] = ""

    def sets(self, graph: fx.Graph) -> Iterable[list[fx.Node]]:
        """Calls of linear layers that belong together, in the order of the joined result."""
        raise TypeError(f"{type(self).__name__} defines no sets(graph)")

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        wanted = program
        if not layers(wanted, ["linear"]) and self.options.targets == ("*",):
            return Result(program, (Action.left("graph", "no linear layer"),))
        chosen = {layer.node.name: layer for layer in
                  select(wanted, self.options.targets, ["linear"])}  # fmt: skip
        actions, done = [], set()
        for nodes in self.sets(editor.graph):
            picked = [node for node in nodes if node.name in chosen and node not in done]
            if len(picked) < 2 or len({node.args[0] for node in picked}) != 1:
                continue
            found = [chosen[node.name] for node in picked]
            dtypes = {editor.state[layer.weight].dtype for layer in found if layer.weight}
            reasons = [why_not(editor, layer, node)
                       for layer, node in zip(found, picked, strict=True)]  # fmt: skip
            if len(dtypes) > 1:
                reasons.append("their weights have several dtypes")
            reason = next((text for text in reasons if text), "")
            names = ", ".join(layer.name for layer in found)
            done |= set(picked)
            if reason:
                actions.append(Action.left(names, reason))
                continue
            name = common_name(found, self.own)
            join(editor, name, picked)
            actions.append(Action(name, f"one layer of {names}"))
        if not actions:
            actions.append(Action.left("graph", f"no {self.what}"))
        return Result(editor.finish(), tuple(actions))


def linear_behind(node: object, passing: frozenset[str], limit: int = 64) -> fx.Node | None:
    """The one linear layer that a value comes from by calls of the given names; else None."""
    from graphwright.ir.graph.nodes import op_name

    found: set[fx.Node] = set()
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if not isinstance(current, fx.Node) or current in seen:
            continue
        seen.add(current)
        if len(seen) > limit:
            return None
        if current.target is torch.ops.aten.linear.default:
            found.add(current)
        elif op_name(current) in passing:
            stack.extend(current.args[:1] if op_name(current) != "cat" else current.args[0])  # type: ignore[arg-type]
    return found.pop() if len(found) == 1 else None
