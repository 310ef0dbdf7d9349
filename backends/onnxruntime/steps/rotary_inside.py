"""Rotary embedding inside the attention kernel, which then needs a table by place in the cache.

The table holds the model's own cosines and sines, computed by its own nodes at every position up to
the context length. It is taken where it gives the same rows for other positions in another order:
frequencies that depend on the longest position (dynamic scaling, LongRoPE) have no table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.backends.onnxruntime.emitter import expression, sizes_of
from graphwright.backends.onnxruntime.steps.graph import argument, is_call, is_onnx
from graphwright.backends.onnxruntime.steps.layout import RESHAPES, TRANSPOSES, order_of
from graphwright.ir.edit import Editor
from graphwright.ir.generation.record import Generation

aten = torch.ops.aten

MOST_BYTES = 1 << 26
"""Bytes of one table, at most: 131,072 positions of 128 halves."""


@dataclass(frozen=True)
class Rotary:
    """Queries and keys before they are turned, and the tables (positions, width / 2)."""

    query: fx.Node
    key: fx.Node
    tables: tuple[fx.Node, fx.Node]


def rotated(
    editor: Editor, record: Generation, pairs: Sequence[tuple[fx.Node, fx.Node]]
) -> list[Rotary] | None:
    """What to give the kernel in place of each turned query and key; None unless all can be."""
    tables = _Tables(editor, record)
    found = []
    for query, key in pairs:
        sides = [_before(query), _before(key)]
        if sides[0] is None or sides[1] is None or sides[0][1] != sides[1][1]:
            return None
        if sizes_of(query)[3] % 16:
            return None
        stored = [tables.of(node) for node in sides[0][1]]
        if stored[0] is None or stored[1] is None:
            return None
        found.append(Rotary(sides[0][0], sides[1][0], (stored[0], stored[1])))
    return found


def _before(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, fx.Node]] | None:
    """The tensor that was turned, and (cos, sin); None where that is not what the node is.

    The tensor is (batch, length, heads * width) or (batch, heads, length, width).
    """
    turned: Any = node
    if is_call(node, *TRANSPOSES) and order_of(node) == [0, 2, 1, 3]:
        split: Any = node.args[0]
        turned = split.args[0] if is_call(split, *RESHAPES) else None
    if is_onnx(turned, "RotaryEmbedding"):
        x, _, cos, sin = turned.args[0]
        return x, (cos, sin)
    if is_call(node, aten.cat.default) and argument(node, 1, "dim", 0) in (-1, 3):
        return _partly(node)
    return None


def _partly(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, fx.Node]] | None:
    """cat([turned first part, rest]) of one tensor."""
    parts: Any = node.args[0]
    first = _before(parts[0]) if len(parts) == 2 else None
    if first is not None and sizes_of(parts[1])[3] == 0:
        return first
    if first is None or not all(is_call(x, aten.slice.Tensor) for x in (first[0], parts[1])):
        return None
    head, tail = first[0], parts[1]
    whole: Any = head.args[0]
    widths = [sizes_of(x)[-1] for x in (head, tail, whole)]
    fits = tail.args[0] is whole and widths[0] + widths[1] == widths[2]
    last = all(argument(x, 1, "dim", 0) in (-1, 3) for x in (head, tail))
    starts = argument(head, 2, "start") in (0, None) and argument(tail, 2, "start") == widths[0]
    return (whole, first[1]) if fits and last and starts and not widths[0] % 16 else None


class _Tables:
    """The tables of a program, each stored once: every layer has nodes of its own for them."""

    def __init__(self, editor: Editor, record: Generation) -> None:
        self.editor = editor
        self.record = record
        self._known: dict[fx.Node, fx.Node | None] = {}
        self._stored: list[tuple[Tensor, fx.Node]] = []

    def of(self, node: fx.Node) -> fx.Node | None:
        """Cosines or sines (positions, width / 2) by place; None where a node has no such table."""
        if node not in self._known:
            table = self._computed(node)
            self._known[node] = None if table is None else self._put(table)
        return self._known[node]

    def _put(self, table: Tensor) -> fx.Node:
        for other, node in self._stored:
            if torch.equal(other, table):
                return node
        name = self.editor.add_state(f"rotary.table_{len(self._stored)}", table.contiguous())
        self._stored.append((table, self.editor.get(name)))
        return self._stored[-1][1]

    def _computed(self, node: fx.Node) -> Tensor | None:
        length, half = self.record.context_length, sizes_of(node)[-1]
        if not length or half % 8 or 4 * length * half > MOST_BYTES:
            return None
        whole = _at(node, self.record, self.editor, torch.arange(length))
        if whole is None or whole.shape != (length, half):
            return None
        for few in (torch.tensor([length - 1, 0, length // 2, 1]), torch.arange(2)):
            found = _at(node, self.record, self.editor, few)
            if found is None or not torch.equal(whole[few], found):
                return None
        return whole


@torch.no_grad()
def _at(node: fx.Node, record: Generation, editor: Editor, positions: Tensor) -> Tensor | None:
    """What a node gives in a batch of one row at these positions; None if it needs more inputs."""
    (given,) = [
        n for n in editor.graph.find_nodes(op="placeholder") if n.target == record.positions
    ]
    batch, length = sizes_of(given)
    sizes = {batch: 1, length: len(positions)}
    known: dict[fx.Node, Any] = {given: positions[None]}

    def value(node: fx.Node) -> Any:
        if node not in known:
            fake = node.meta.get("val")
            if isinstance(fake, torch.SymInt | int):
                known[node] = sizes[expression(fake)] if isinstance(fake, torch.SymInt) else fake
            elif node.op == "get_attr":
                known[node] = editor.state[str(node.target)]
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                raise KeyError(node)
        return known[node]

    try:
        return value(node)  # type: ignore[no-any-return]
    except KeyError:
        return None
