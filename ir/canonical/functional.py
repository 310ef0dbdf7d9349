"""Makes a graph functional without decomposing it: no call writes to a tensor any more.

torch's own functionalization (`run_decompositions`) retraces the graph, and replaces batch norm,
dropout and reshapes by forms that passes do not know. Here only the writing calls change: `op_`
becomes `op`, a write through a view becomes a scatter into the tensor that is viewed, and whoever
reads that tensor, or another view of it, afterwards reads the new one.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import fx

from graphwright.ir.canonical.without_writing import (
    RESHAPED_IN_PLACE,
    functional_form,
    writing,
)
from graphwright.ir.edit import Editor
from graphwright.ir.graph.aliasing import writes
from graphwright.ir.graph.fake import fake_call
from graphwright.ir.graph.nodes import op_name

aten = torch.ops.aten

DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
"""Off, they hand back the very tensor that they were given, which torch before 2.14 does not show
on stand-ins."""
SAME_SHAPE = {
    "alias", "detach", "contiguous", "to", "lift_fresh", "view_as_real", "positive", *DROPOUTS,
}  # fmt: skip
RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as",
}  # fmt: skip


class _UnknownEffectError(Exception):
    """A write whose effect on the viewed tensor we cannot express."""


def make_functional(editor: Editor) -> list[str]:
    """Rewrites the editor's graph in place; returns names of state tensors whose update is lost.

    A call that no rule covers stays as it is, and with it the calls that read what it writes.
    """
    for node in editor.graph.nodes:
        if op_name(node) in RESHAPED_IN_PLACE:
            # Later calls read its result, not what it was called on.
            node.target = functional_form(node.target)
    if not any(writes(node) for node in editor.graph.nodes):
        return []
    snapshot = list(editor.graph.nodes)
    before = {node: (node.target, node.args, node.kwargs) for node in snapshot}
    try:
        return _Functionalizer(editor).run(snapshot)
    except _UnknownEffectError:
        for node, (target, args, kwargs) in before.items():
            node.target, node.args, node.kwargs = target, args, kwargs
        _erase(editor, [n for n in editor.graph.nodes if n not in before])
        return []


def _erase(editor: Editor, nodes: list[fx.Node]) -> None:
    for node in reversed(nodes):
        if not node.users:
            editor.erase(node)


class _Functionalizer:
    """One walk in graph order. A tensor is its root's version and a chain of views on it."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.parent: dict[fx.Node, fx.Node] = {}
        self.value: dict[fx.Node, tuple[int, fx.Node]] = {}
        """Node -> (version of its root, node that holds its value at that version)."""
        self.version: dict[fx.Node, int] = {}
        # Kept while storages are compared: a dead one's address is soon given to another.
        self.fakes = _fake_values(editor)

    def run(self, nodes: list[fx.Node]) -> list[str]:
        lost: set[str] = set()
        dead: list[fx.Node] = []
        shared: dict[str, fx.Node] = {}
        for node in nodes:
            if node.op == "get_attr":
                # Two readers of one tensor are one root.
                first = shared.setdefault(str(node.target), node)
                if first is not node:
                    self.parent[node] = first
                continue
            if node.op == "placeholder":
                continue
            args, kwargs = node.args, node.kwargs
            fresh = partial(self.fresh, before=node)
            node.args, node.kwargs = fx.map_arg((args, kwargs), fresh)
            positions = writes(node)
            if positions:
                target = _written(node, args, kwargs)
                if len(positions) > 1 or not isinstance(target, fx.Node):
                    raise _UnknownEffectError
                self._write(node, target)
                dead.append(node)
                root = self.root(target)
                if root.op == "get_attr":
                    lost.add(str(root.target))
                continue
            source = _first_tensor(args)
            # An item of a call with several fresh results, as of topk, is a tensor of its own.
            fresh_item = node.target is operator.getitem and source not in self.parent
            if source is not None and not fresh_item and self._aliases(node, source):
                self.parent[node] = source
                self.value[node] = (self.version.get(self.root(source), 0), node)
        _erase(self.editor, dead)
        return sorted(lost)

    def root(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def _aliases(self, node: fx.Node, source: fx.Node) -> bool:
        if op_name(node) in DROPOUTS and node.args[2] is False:
            return True
        return bool(_storages(self.fakes.get(node)) & _storages(self.fakes.get(source)))

    def fresh(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that holds the value `node` has now."""
        root = self.root(node)
        now = self.version.get(root, 0)
        if now == 0:
            return node
        version, value = self.value.get(node, (0, node))
        if version == now:
            return value
        parent = self.fresh(self.parent[node], before)
        if self.parent[node].target == node.target and node.op == "get_attr":
            again = parent
        else:
            args = (parent, *node.args[1:])
            again = self.editor.call(node.target, *args, before=before, like=node, **node.kwargs)
        self.value[node] = (now, again)
        return again

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        new = _functional_call(self.editor, node, self.fresh(target, node))
        root = self.root(target)
        whole = self._put(target, new, node)
        self.version[root] = now = self.version.get(root, 0) + 1
        self.value[root] = (now, whole)
        self.value[target] = (now, new)
        self.parent[node] = target
        self.value[node] = (now, new)
        # From here on the call's own result is another name of what it wrote to.
        node.target, node.args, node.kwargs = aten.alias.default, (target,), {}

    def _put(self, view: fx.Node, new: fx.Node, before: fx.Node) -> fx.Node:
        """The root's new value, once `view` of it has the value `new`."""
        if view not in self.parent:
            return new
        parent = self.parent[view]
        put = _put_view
        if isinstance(parent.meta.get("val"), list | tuple):
            # An element of a split: written into what was split.
            parent, put = self.parent[parent], _put_part
        old = self.fresh(parent, before)
        return self._put(parent, put(self.editor, view, new, old, before), before)


def _written(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operand that a call writes to: its first one, or `out`."""
    (name,) = writing(node.target)[:1]
    return kwargs[name] if name in kwargs else args[0]


def _first_tensor(args: tuple[Any, ...]) -> fx.Node | None:
    return args[0] if args and isinstance(args[0], fx.Node) else None


def _storages(value: Any) -> set[int]:
    """Identities of the memory that a tensor, or each of a list of tensors, lies in."""
    items = value if isinstance(value, list | tuple) else [value]
    return {t.untyped_storage()._cdata for t in items if isinstance(t, torch.Tensor)}


def _fake_values(editor: Editor) -> dict[fx.Node, Any]:
    """Every node's value on fake tensors, which share memory as real ones would."""
    values: dict[fx.Node, Any] = {}
    state: dict[str, Any] = {}
    with torch.no_grad():
        for node in editor.graph.nodes:
            if node.op == "placeholder":
                values[node] = node.meta["val"]
            elif node.op == "get_attr":
                name = str(node.target)
                if name not in state:
                    state[name] = editor.fake(editor.state[name])
                values[node] = state[name]
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = fake_call(node.target, args, kwargs, editor.fake_mode)
    return values


def _functional_call(editor: Editor, node: fx.Node, target: fx.Node) -> fx.Node:
    """The value that `node` writes, as the result of a call that writes nothing."""
    op: Any = node.target
    name = op._schema.name.split("::")[1].rstrip("_")
    rest = node.args[1:]
    if name in ("copy", "fill", "zero"):
        return _filled(editor, node, target, rest)
    if name in ("detach", "requires_grad"):
        return target
    overload = functional_form(op)
    if overload is None:
        raise _UnknownEffectError
    names = writing(op)
    if names[0] in node.kwargs:
        kwargs = {key: value for key, value in node.kwargs.items() if key not in names}
        new = editor.call(overload, *node.args, before=node, like=node, **kwargs)
        if _shape(new) != _shape(target):
            raise _UnknownEffectError  # `out` of another size, which the call makes fit
    else:
        new = editor.call(overload, target, *rest, before=node, like=node, **node.kwargs)
    return _cast(editor, new, target, node)


def _filled(editor: Editor, node: fx.Node, target: fx.Node, rest: tuple[Any, ...]) -> fx.Node:
    """`copy_`, `fill_` and `zero_`: the old value does not matter, only its shape and dtype."""
    source = rest[0] if rest else 0
    if not isinstance(source, fx.Node):
        return editor.call(aten.full_like.default, target, source, before=node, like=node)
    source = _cast(editor, source, target, node)
    if _shape(source) == _shape(target):
        return source
    return editor.call(aten.expand_as.default, source, target, before=node, like=node)


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(size) for size in node.meta["val"].shape)


def _cast(editor: Editor, new: fx.Node, like: fx.Node, before: fx.Node) -> fx.Node:
    """A write keeps the dtype of what it writes to."""
    dtype = like.meta["val"].dtype
    if new.meta["val"].dtype == dtype:
        return new
    return editor.call(aten.to.dtype, new, dtype, before=before, like=before)


def _put_view(
    editor: Editor, view: fx.Node, new: fx.Node, old: fx.Node, before: fx.Node
) -> fx.Node:
    """`old` with the part that `view` shows replaced by `new`."""
    name = getattr(view.target, "_schema", None)
    kind = name.name.split("::")[1].rstrip("_") if name else ""

    def call(op: Any, *args: Any) -> fx.Node:
        return editor.call(op, *args, before=before, like=view)

    rest: Any = view.args[1:]
    if view.op == "get_attr" or kind in SAME_SHAPE:
        return new
    if kind in RESHAPES:
        return call(aten.reshape_as.default, new, old)
    if kind in ("transpose", "swapaxes"):
        return call(aten.transpose.int, new, *rest)
    if kind == "t":
        return call(aten.t.default, new)
    if kind == "permute":
        order = [d % len(rest[0]) for d in rest[0]]
        return call(aten.permute.default, new, [order.index(i) for i in range(len(order))])
    if kind == "select":
        return call(aten.select_scatter.default, old, new, *rest)
    if kind == "slice":
        return call(aten.slice_scatter.default, old, new, *rest)
    if kind == "narrow":
        dim, start, length = rest
        return call(aten.slice_scatter.default, old, new, dim, start, start + length)
    if kind == "diagonal":
        return call(aten.diagonal_scatter.default, old, new, *rest)
    raise _UnknownEffectError


def _put_part(
    editor: Editor, view: fx.Node, new: fx.Node, old: fx.Node, before: fx.Node
) -> fx.Node:
    """As `_put_view` for one element of `unbind`, `chunk` or `split`."""
    if view.target is not operator.getitem:
        raise _UnknownEffectError
    parts, index = view.args
    assert isinstance(parts, fx.Node)
    assert isinstance(index, int)
    kind = str(getattr(parts.target, "_schema").name).split("::")[1]  # noqa: B009
    place = 1 if kind == "unbind" else 2
    axis: Any = parts.args[place] if len(parts.args) > place else parts.kwargs.get("dim", 0)
    if kind == "unbind":
        return editor.call(
            aten.select_scatter.default, old, new, axis, index, before=before, like=view
        )
    if kind not in ("chunk", "split", "split_with_sizes"):
        raise _UnknownEffectError
    sizes: list[Any] = [part.shape[axis] for part in parts.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        raise _UnknownEffectError
    start = sum(sizes[:index])
    return editor.call(
        aten.slice_scatter.default, old, new, axis, start, start + sizes[index],
        before=before, like=view,
    )  # fmt: skip
