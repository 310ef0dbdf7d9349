"""Steps that take out calls which change nothing: equal reshapes, double transposes, casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.graph import is_call
from graphwright.ir.edit import Editor
from graphwright.ir.graph.moves import CASTS as CASTS
from graphwright.ir.graph.moves import COPIES as COPIES
from graphwright.ir.graph.moves import EXPANDS as EXPANDS
from graphwright.ir.graph.moves import RESHAPES as RESHAPES
from graphwright.ir.graph.moves import TRANSPOSES as TRANSPOSES
from graphwright.ir.graph.moves import order_of as order_of

aten = torch.ops.aten

BROADCASTING = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self,
    aten.ge.Tensor, aten.gt.Tensor, aten.le.Tensor, aten.lt.Tensor, aten.eq.Tensor,
    aten.bitwise_and.Tensor, aten.__and__.Tensor, aten.bitwise_or.Tensor, aten.__or__.Tensor,
    aten.logical_and.default, aten.logical_or.default,
}  # fmt: skip


def simplify_layout(editor: Editor) -> int:
    """Removes reshapes, transposes, casts, copies and expands that change nothing."""
    count = 0
    for node in list(editor.graph.nodes):
        source = _shortcut(node)
        if source is not None and source is not node:
            editor.replace(node, source)
            count += 1
            continue
        count += _look_through(editor, node)
    return count + _drop_expands(editor)


def _shortcut(node: fx.Node) -> fx.Node | None:
    """An earlier node with the same value, or None."""
    if not (is_call(node, *RESHAPES, *TRANSPOSES, *CASTS, *COPIES, *EXPANDS) and node.args):
        return None
    source: Any = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if is_call(node, *COPIES):
        return source
    if is_call(node, *CASTS):
        return source if source.meta["val"].dtype == node.meta["val"].dtype else None
    if is_call(node, *RESHAPES, *EXPANDS):
        return source if sizes_of(source) == sizes_of(node) else None
    if order_of(node) == list(range(node.meta["val"].dim())):
        return source
    if is_call(source, *TRANSPOSES):
        first, second = order_of(source), order_of(node)
        if [first[i] for i in second] == list(range(len(first))):
            return source.args[0]  # type: ignore[return-value]
    return None


def _look_through(editor: Editor, node: fx.Node) -> int:
    """A reshape of a reshape reads the first one's input."""
    if not is_call(node, *RESHAPES):
        return 0
    source = node.args[0]
    if not is_call(source, *RESHAPES):
        return 0
    origin = source.args[0]  # type: ignore[union-attr]
    if not isinstance(origin, fx.Node):
        return 0
    if sizes_of(origin) == sizes_of(node):
        editor.replace(node, origin)
        return 1
    if node.target is aten.reshape.default:
        node.args = (origin, *node.args[1:])
        editor.changed = True
        return 1
    return 0


def _drop_expands(editor: Editor) -> int:
    """An expand that only feeds broadcasting ops is their own doing already."""
    count = 0
    for node in list(editor.graph.nodes):
        if not is_call(node, *EXPANDS) or not node.users:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if all(_broadcasts_anyway(user, node, source) for user in node.users):
            editor.replace(node, source)
            count += 1
    return count


def _broadcasts_anyway(user: fx.Node, node: fx.Node, source: fx.Node) -> bool:
    if user.op != "call_function" or user.target not in BROADCASTING:
        return False
    operands = [source if a is node else a for a in user.args if isinstance(a, fx.Node)]
    fakes = [a.meta["val"] for a in operands]
    if not all(isinstance(f, torch.Tensor) for f in fakes):
        return False
    return _broadcast([sizes_of(a) for a in operands]) == sizes_of(user)


def _broadcast(shapes: list[list[Any]]) -> list[Any] | None:
    """The broadcast of shapes of ints and expressions; None when it cannot be told."""
    rank = max(len(shape) for shape in shapes)
    result = []
    for axis in range(-rank, 0):
        found = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        if len(found) > 1:
            return None
        result.append(found.pop() if found else 1)
    return result
