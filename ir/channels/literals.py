"""Rewrites the numbers in a graph that are extents of removed channels, and no others."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from graphwright.ir.channels.extents import Extents
from graphwright.ir.channels.values import Value
from graphwright.ir.channels.walk import Walk, arguments
from graphwright.ir.edit import KEPT_META, Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import op_name, set_gw_meta

aten = torch.ops.aten
END = 2**62
SHAPE_ARGUMENTS = ("shape", "size", "sizes")


class Literals:
    """Walks the calls whose operands or results shrink and rewrites their literals.

    A symbolic size stays symbolic: `node` becomes `node * new // old`.
    """

    def __init__(self, editor: Editor, extents: Extents) -> None:
        self.editor, self.extents = editor, extents
        self.values = extents.analysis.values

    def rewrite(self) -> None:
        """Rewrites every call that is touched, in place."""
        for node in list(self.editor.graph.nodes):
            if op_name(node) == "view_as_complex":
                self._make_contiguous(node)
            if node.op == "call_function" and self._is_touched(node):
                handler = HANDLERS.get(op_name(node))
                if handler is not None:
                    handler(self, node)

    def _make_contiguous(self, node: fx.Node) -> None:
        """Pairs are read in place, which an odd number of kept channels beside them forbids."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        copy = self.put(node, aten.clone.default, source)
        copy.kwargs = {"memory_format": torch.contiguous_format}
        copy.meta["val"] = source.meta["val"]
        node.replace_input_with(source, copy)

    def _is_touched(self, node: fx.Node) -> bool:
        for name in (node.name, *(n.name for n in node.all_input_nodes)):
            result = self.values.get(name)
            parts = result if isinstance(result, list) else [result]
            values = [part for part in parts if isinstance(part, Value)]
            if any(self.extents.shape(v, name) != v.shape for v in values):
                return True
        return False

    # ---- what handlers ask

    def value(self, node: Any) -> Value:
        """The value of a node that is one tensor."""
        found = self.values.get(node.name) if isinstance(node, fx.Node) else None
        if not isinstance(found, Value):
            raise ModelError("an operand is no tensor", where=getattr(node, "name", str(node)))
        return found

    def old_new(self, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of a node's result before and after, at the example sizes."""
        value = self.value(node)
        return value.shape, self.extents.shape(value, node.name)

    def keep(self, node: Any, dim: int) -> np.ndarray | None:
        """Keep flags of a dimension when some of it goes."""
        value = self.value(node)
        keep = self.extents.kept(value, dim % max(1, len(value.shape)), node.name)
        return None if keep is None or keep.all() else keep

    def set(self, node: fx.Node, **changes: Any) -> None:
        """Changes arguments by name."""
        target: Any = node.target
        names = [a.name for a in target._schema.arguments]
        args, kwargs = list(node.args), dict(node.kwargs)
        for name, new in changes.items():
            position = names.index(name)
            if position < len(args):
                args[position] = new
            elif target._schema.arguments[position].kwarg_only:
                kwargs[name] = new
            else:
                given = arguments(node)
                args += [given[n] for n in names[len(args) : position]]
                for n in names[: position + 1]:
                    kwargs.pop(n, None)
                args.append(new)
        self.editor.set_args(node, *args, **kwargs)

    def put(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        """Inserts a call; its shape is left to the propagation at the end, for now it is stale."""
        with self.editor.graph.inserting_before(before):
            node = self.editor.graph.call_function(target, args)
        node.meta.update({key: before.meta[key] for key in KEPT_META if key in before.meta})
        set_gw_meta(node, by=self.editor.by)
        return node

    def stand_in(self, old: fx.Node, new: fx.Node) -> None:
        """Lets every reader of `old` read `new`, which has the same channels."""
        new.meta["val"] = old.meta["val"]
        for key in KEPT_META:
            if key in old.meta:
                new.meta[key] = old.meta[key]
        self.values[new.name] = self.values[old.name]
        self.editor.replace(old, new)

    def sizes(self, node: fx.Node, sizes: list[Any], old: Any, new: Any) -> list[Any]:
        """A list of sizes with the extents that changed replaced; -1 stays."""
        out = list(sizes)
        for i, (size, before, after) in enumerate(zip(sizes, old, new, strict=True)):
            if before != after:
                out[i] = self._scaled(node, size, before, after)
        return out

    def _scaled(self, node: fx.Node, size: Any, before: int, after: int) -> Any:
        if isinstance(size, fx.Node):
            times = self.editor.call(operator.mul, size, after, before=node)
            return self.editor.call(operator.floordiv, times, before, before=node)
        return size if size == -1 else after


Handler = Callable[[Literals, fx.Node], None]
HANDLERS: dict[str, Handler] = {}


def handler(*names: str) -> Callable[[Handler], Handler]:
    """Registers the rewriting of operators of these base names."""

    def add(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return add


@handler("reshape", "view", "_unsafe_view", "expand", "broadcast_to", "zeros", "ones", "full",
         "empty", "new_zeros", "new_ones", "new_full", "new_empty")  # fmt: skip
def _shape(literals: Literals, node: fx.Node) -> None:
    old, new = literals.old_new(node)
    given = arguments(node)
    name = next(n for n in SHAPE_ARGUMENTS if n in given)
    literals.set(node, **{name: literals.sizes(node, given[name], old, new)})


@handler("unflatten")
def _unflatten(literals: Literals, node: fx.Node) -> None:
    old, new = literals.old_new(node)
    given = arguments(node)
    source = literals.value(given["self"])
    dim = given["dim"] % len(source.shape)
    span = slice(dim, dim + len(given["sizes"]))
    literals.set(node, sizes=literals.sizes(node, given["sizes"], old[span], new[span]))


@handler("repeat")
def _repeat(literals: Literals, node: fx.Node) -> None:
    old, new = literals.old_new(node)
    given = arguments(node)
    source = literals.value(given["self"]).shape
    lead = len(old) - len(source)
    repeats = list(given["repeats"])
    for d, (before, after) in enumerate(zip(old, new, strict=True)):
        grown = d < lead or source[d - lead] == 1
        if grown and before != after:
            repeats[d] = after
    literals.set(node, repeats=repeats)


@handler("repeat_interleave")
def _repeat_interleave(literals: Literals, node: fx.Node) -> None:
    given = arguments(node)
    _, new = literals.old_new(node)
    if given.get("output_size") is not None:
        literals.set(node, output_size=new[given["dim"]])


@handler("slice")
def _slice(literals: Literals, node: fx.Node) -> None:
    given = arguments(node)
    keep = literals.keep(given["self"], given["dim"])
    if keep is None:
        return
    start, end, _ = slice(given["start"], given["end"]).indices(len(keep))
    past = given["end"] is None or given["end"] >= len(keep)
    literals.set(node, start=int(keep[:start].sum()),
                 end=given["end"] if past else int(keep[:end].sum()))  # fmt: skip


@handler("narrow")
def _narrow(literals: Literals, node: fx.Node) -> None:
    given = arguments(node)
    keep = literals.keep(given["self"], given["dim"])
    if keep is not None:
        start, end = given["start"], given["start"] + given["length"]
        literals.set(node, start=int(keep[:start].sum()), length=int(keep[start:end].sum()))


@handler("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def _split(literals: Literals, node: fx.Node) -> None:
    given = arguments(node)
    source = given["self"]
    dim = given.get("dim", 0) % len(literals.value(source).shape)
    if literals.keep(source, dim) is None:
        return
    parts = literals.values[node.name]
    assert isinstance(parts, list)
    lengths = [literals.extents.shape(part, node.name)[dim] for part in parts if part is not None]
    node.target = aten.split_with_sizes.default
    literals.editor.set_args(node, source, lengths, dim)


@handler("pad", "constant_pad_nd")
def _pad(literals: Literals, node: fx.Node) -> None:
    given = arguments(node)
    out, amounts = literals.value(node), list(given["pad"])
    for k in range(len(amounts) // 2):
        dim = len(out.shape) - 1 - k
        keep = literals.keep(node, dim)
        left, right = amounts[2 * k : 2 * k + 2]
        if keep is not None and (left or right):
            amounts[2 * k] = int(keep[:left].sum())
            amounts[2 * k + 1] = int(keep[len(keep) - right :].sum())
    literals.set(node, pad=amounts)


@handler("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(literals: Literals, node: fx.Node) -> None:
    given = arguments(node)
    x, weight = literals.value(given["input"]), literals.value(given["weight"])
    channel = len(x.shape) - len(weight.shape) + 1
    keep = literals.keep(given["input"], channel)
    if keep is not None and given["groups"] == len(keep) > 1:
        literals.set(node, groups=int(keep.sum()))


@handler("channel_shuffle")
def _channel_shuffle(literals: Literals, node: fx.Node) -> None:
    """The number of groups is untouched: every group keeps as many channels."""


@handler("scaled_dot_product_attention")
def _attention(literals: Literals, node: fx.Node) -> None:
    given = arguments(node)
    query = literals.value(given["query"])
    last = len(query.shape) - 1
    if literals.keep(given["query"], last) is not None and given["scale"] is None:
        literals.set(node, scale=query.shape[last] ** -0.5)


@handler("mean")
def _mean(literals: Literals, node: fx.Node) -> None:
    """The divisor stays the original count: `mean * (kept / count)`."""
    given = arguments(node)
    source = literals.value(given["self"])
    old, new = source.shape, literals.extents.shape(source, given["self"].name)
    dims = given.get("dim")
    ratio = 1.0
    for d in range(len(old)) if not dims else [d % len(old) for d in dims]:
        ratio *= new[d] / old[d]
    scale_literal(literals, node, ratio)


def scale_literal(literals: Literals, node: fx.Node, ratio: float) -> None:
    """Multiplies what a call gives with a number behind it; nothing is put in for 1."""
    if ratio == 1.0:
        return
    literals.stand_in(node, literals.put(node.next, aten.mul.Tensor, node, ratio))


def check_shapes(walk: Walk, graph: fx.Graph, extents: Extents) -> None:
    """Compares the propagated shape of every node with the predicted one.

    Raises:
        ModelError: they differ; names the node.
    """
    for node in graph.nodes:
        result = extents.analysis.values.get(node.name)
        if not isinstance(result, Value) or node.op == "output":
            continue
        found = walk.shape(node.meta.get("val"))
        expected = extents.shape(result, node.name)
        if found is not None and found != expected:
            raise ModelError(
                f"the cut gives shape {found} where {expected} is expected",
                where=f"node {node.name} ({node.target})",
                fix="Leave the groups that reach this node out, and report it.",
            )
