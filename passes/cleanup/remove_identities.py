"""cleanup.remove_identities: drop calls that compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.aliasing import unstable_nodes
from graphwright.ir.graph.nodes import full_arguments, op_name
from graphwright.ir.mode import DROPOUTS
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result

aten = torch.ops.aten


class RemoveIdentities(Pass):
    """Removes calls whose result is their operand, and pairs of calls that cancel.

    `x + 0`, `x * 1`, `x / 1`, `x ** 1`, casts to the same type, reshapes and permutations to the
    same shape and order, whole-range slices, concatenations of one, zero padding, inactive
    dropout, clones; `reshape(reshape(x))`, `transpose(transpose(x))`, `relu(relu(x))`,
    `neg(neg(x))`, and the concatenation of all the chunks of a tensor.
    """

    contract = "exact"
    stored_bits = 16
    tolerance = 0.0

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        counts: dict[str, int] = {}
        unstable = unstable_nodes(editor.graph)
        again = True
        while again:
            again = False
            for node in list(editor.graph.nodes):
                if node.op != "call_function" or not node.users or node in unstable:
                    continue
                same = identity_of(node)
                if same is not None:
                    counts[op_name(node)] = counts.get(op_name(node), 0) + 1
                    editor.replace(node, same)
                    again = True
                elif _collapse_reshape(editor, node):
                    counts["reshape"] = counts.get("reshape", 0) + 1
                    again = True
        actions = tuple(Action(name, f"{n} removed") for name, n in sorted(counts.items()))
        return Result(editor.finish(), actions)


def identity_of(node: fx.Node) -> fx.Node | None:
    """The node that `node` merely repeats, or None."""
    rule = _RULES.get(op_name(node))
    if rule is None or getattr(node.target, "namespace", "") != "aten":
        return None
    source = rule(node)
    if source is None or not _same_value(source, node):
        return None
    return source


def _same_value(a: fx.Node, b: fx.Node) -> bool:
    """Same shape (symbolically) and dtype; a broadcasting `x + 0` is no identity."""
    left, right = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return False
    return left.dtype == right.dtype and left.device == right.device and same_shape(left, right)


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal rank and provably equal sizes, without adding a guard."""
    if left.dim() != right.dim():
        return False
    return all(_same_size(a, b) for a, b in zip(left.shape, right.shape, strict=True))


def _same_size(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return bool(left == right)


def _operand(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _neutral(neutral: float, positions: tuple[int, ...]) -> Callable[[fx.Node], fx.Node | None]:
    def rule(node: fx.Node) -> fx.Node | None:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            return None
        for position in positions:
            constant = node.args[position] if len(node.args) > position else None
            other = node.args[1 - position]
            is_number = isinstance(constant, int | float) and not isinstance(constant, bool)
            if is_number and constant == neutral and isinstance(other, fx.Node):
                return other
        return None

    return rule


def _zero_padding(node: fx.Node) -> fx.Node | None:
    return _operand(node) if all(p == 0 for p in node.args[1]) else None  # type: ignore[union-attr]


def _whole_slice(node: fx.Node) -> fx.Node | None:
    args, _ = full_arguments(node)
    _, _, start, end, step = args
    whole = start in (None, 0) and step == 1 and (end is None or end == 2**63 - 1)
    return _operand(node) if whole else None


def _identity_order(node: fx.Node) -> fx.Node | None:
    order = node.args[1]
    assert isinstance(order, list | tuple)
    rank = len(order)
    ordered = [d % rank for d in order if isinstance(d, int)] == list(range(rank))
    return _operand(node) if ordered else None


def _undone_transpose(node: fx.Node) -> fx.Node | None:
    inner = _operand(node)
    if inner is None or inner.target is not node.target or node.op != "call_function":
        return None
    rank = node.meta["val"].dim()
    axes = {a % rank for a in node.args[1:3] if isinstance(a, int)}
    inner_axes = {a % rank for a in inner.args[1:3] if isinstance(a, int)}
    return _operand(inner) if axes == inner_axes else None


def _repeated(node: fx.Node) -> fx.Node | None:
    inner = _operand(node)
    return inner if inner is not None and inner.target is node.target else None


def _undone(node: fx.Node) -> fx.Node | None:
    inner = _repeated(node)
    return _operand(inner) if inner is not None else None


def _one_or_all_chunks(node: fx.Node) -> fx.Node | None:
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or not parts:
        return None
    if len(parts) == 1:
        return parts[0] if isinstance(parts[0], fx.Node) else None
    if not all(isinstance(p, fx.Node) and op_name(p) == "getitem" for p in parts):
        return None
    sources = {p.args[0] for p in parts if isinstance(p, fx.Node)}
    if len(sources) != 1:
        return None
    split = sources.pop()
    if not isinstance(split, fx.Node) or op_name(split) not in (
        "chunk",
        "split",
        "split_with_sizes",
    ):
        return None
    in_order = [p.args[1] for p in parts] == list(range(len(split.meta["val"])))  # type: ignore[union-attr]
    same_axis = _axis(split, 2) == _axis(node, 1)
    return _operand(split) if in_order and same_axis else None


def _axis(node: fx.Node, position: int) -> int:
    args, _ = full_arguments(node)
    value = node.meta["val"]
    rank = (value[0] if isinstance(value, list | tuple) else value).dim()
    axis = int(args[position]) % int(rank)
    return axis


def _inactive_dropout(node: fx.Node) -> fx.Node | None:
    if node.target not in DROPOUTS.values():
        return None
    p, train = node.args[1], node.args[2]
    return _operand(node) if not train or p == 0 else None


def _collapse_reshape(editor: Editor, node: fx.Node) -> bool:
    """`reshape(reshape(x, a), b)` is `reshape(x, b)`: only the outer shape matters."""
    if node.target is not aten.reshape.default:
        return False
    inner = _operand(node)
    if inner is None or inner.target is not aten.reshape.default:
        return False
    node.replace_input_with(inner, inner.args[0])  # type: ignore[arg-type]
    editor.changed = True
    return True


_RULES: dict[str, Callable[[fx.Node], fx.Node | None]] = {
    "add": _neutral(0, (0, 1)),
    "sub": _neutral(0, (1,)),
    "mul": _neutral(1, (0, 1)),
    "div": _neutral(1, (1,)),
    "pow": _neutral(1, (1,)),
    "to": _operand,
    "type_as": _operand,
    "_to_copy": _operand,
    "reshape": _operand,
    "expand": _operand,
    "expand_as": _operand,
    "clone": _operand,
    "contiguous": _operand,
    "alias": _operand,
    "detach": _operand,
    "lift_fresh_copy": _operand,
    "flatten": _operand,
    "slice": _whole_slice,
    "permute": _identity_order,
    "transpose": _undone_transpose,
    "relu": _repeated,
    "abs": _repeated,
    "neg": _undone,
    "pad": _zero_padding,
    "constant_pad_nd": _zero_padding,
    "cat": _one_or_all_chunks,
    "dropout": _inactive_dropout,
    "feature_dropout": _inactive_dropout,
    "alpha_dropout": _inactive_dropout,
    "feature_alpha_dropout": _inactive_dropout,
}
"""Op name -> the operand it may merely repeat; `_same_value` has the last word. A reshape to the
operand's own shape and a cast to its own dtype are identities by that check alone."""
