"""One spelling per operation: what exporters and decompositions write in many ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.canonical.recompose import RECOMPOSED
from graphwright.ir.canonical.scalars import known_number
from graphwright.ir.edit import Editor
from graphwright.ir.graph.aliasing import writes

aten = torch.ops.aten

LAST = 2**63 - 1
"""Torch's number for the end of a slice that goes to the end."""

NO_OPS = {
    "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy", "clone", "positive",
    "_conj", "resolve_conj", "resolve_neg",
}  # fmt: skip
"""Calls that only matter for memory, in a graph where nothing writes."""

CASTS = {"to", "_to_copy", "type_as"}

RENAMED = {
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "_unsafe_view": "reshape",
    "view": "reshape",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "fix": "trunc",
    "not_equal": "ne",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "special_expit": "sigmoid",
    "special_erf": "erf",
    "special_expm1": "expm1",
    "special_log1p": "log1p",
    "special_softmax": "softmax",
    "special_log_softmax": "log_softmax",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}
"""Other names of an operation -> the one that passes and backends know."""


def respell(editor: Editor) -> None:
    """Rewrites the editor's graph in place; every result keeps its value, shape and dtype."""
    # Where something is still written to, a copy is more than its value.
    functional = not any(writes(node) for node in editor.graph.nodes)
    for node in list(editor.graph.nodes):
        target: Any = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if target.namespace != "aten":
            continue
        name = target._schema.name.split("::")[1]
        rule = RULES.get(name)
        if name in NO_OPS and functional:
            _drop_no_op(editor, node)
        elif rule is not None:
            rule(editor, node)


def _drop_no_op(editor: Editor, node: fx.Node) -> None:
    source = node.args[0]
    if isinstance(source, fx.Node) and not source.meta["val"].dtype.is_complex:
        editor.replace(node, source)


def _rename(editor: Editor, node: fx.Node) -> None:
    target: Any = node.target
    packet = getattr(aten, RENAMED[target._schema.name.split("::")[1]])
    overload = getattr(packet, target._overloadname, None) or getattr(packet, "int", None)
    if overload is not None:
        node.target = overload


def _cast(editor: Editor, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    if before.device != after.device or before.layout != after.layout:
        return
    if before.dtype == after.dtype:
        editor.replace(node, source)
    elif (node.target, node.args[1:], node.kwargs) != (aten.to.dtype, (after.dtype,), {}):
        new = editor.call(aten.to.dtype, source, after.dtype, before=node, like=node)
        editor.replace(node, new)


def _item(editor: Editor, node: fx.Node) -> None:
    """A number read out of a tensor that only carries sizes: the sizes' own arithmetic."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    number = known_number(editor, source, node)
    if number is None:
        return
    for user in list(node.users):
        # Sizes behind this one were unknown, and are propagated again.
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda a: number if a is node else a)
        editor.set_args(user, *args, **kwargs)
    editor.erase(node)


def _like(editor: Editor, node: fx.Node) -> None:
    """`reshape_as`, `view_as`, `expand_as`: `reshape` and `expand` to the other's sizes."""
    target: Any = node.target
    other = node.args[1]
    assert isinstance(other, fx.Node)

    def size(axis: int, known: Any) -> Any:
        if isinstance(known, int):
            return known
        return editor.call(aten.sym_size.int, other, axis, before=node, like=node)

    sizes = [size(axis, known) for axis, known in enumerate(other.meta["val"].shape)]
    expands = target._schema.name.endswith("expand_as")
    op = aten.expand.default if expands else aten.reshape.default
    editor.replace(node, editor.call(op, node.args[0], sizes, before=node, like=node))


def _slice_scatter(editor: Editor, node: fx.Node) -> None:
    """`old` with new values from `start` to `end`: what is in front, the new, what is behind."""
    arguments: dict[str, Any] = _by_name(node)
    old, new, axis = arguments["input"], arguments["src"], arguments.get("dim", 0)
    start, end = arguments.get("start"), arguments.get("end")
    step = arguments.get("step", 1)
    if step == 1:
        editor.replace(node, _spliced(editor, node, old, new, axis, start or 0, end))
        return
    size = old.meta["val"].shape[axis]
    numbers = (size, step, 0 if start is None else start, LAST if end is None else end)
    if all(isinstance(number, int) for number in numbers):
        editor.replace(node, _interleaved(editor, node, old, new, axis, slice(start, end, step)))


def _interleaved(
    editor: Editor, node: fx.Node, old: fx.Node, new: fx.Node, axis: int, places: slice
) -> fx.Node:
    """Every `step`-th value from `new`, the others from `old`: picked by a constant index."""
    size = int(old.meta["val"].shape[axis])
    index = torch.arange(size)
    index[places] = torch.arange(size, size + len(range(size)[places]))
    name = editor.add_state(f"{node.name}_index", index)
    both = editor.call(aten.cat.default, [old, new], axis, before=node, like=node)
    return editor.call(
        aten.index_select.default, both, axis, editor.get(name), before=node, like=node
    )


def _select_scatter(editor: Editor, node: fx.Node) -> None:
    """As `_slice_scatter`, for one index of an axis."""
    arguments: dict[str, Any] = _by_name(node)
    old, src, axis, index = (arguments[key] for key in ("input", "src", "dim", "index"))
    if not isinstance(index, int):
        return
    axis %= old.meta["val"].dim()
    new = editor.call(aten.unsqueeze.default, src, axis, before=node, like=node)
    end = index + 1 if index != -1 else None
    editor.replace(node, _spliced(editor, node, old, new, axis, index, end))


def _spliced(
    editor: Editor, node: fx.Node, old: fx.Node, new: fx.Node, axis: int, start: Any, end: Any
) -> fx.Node:
    size = old.meta["val"].shape[axis]
    parts = [new]
    if start != 0:
        front = editor.call(aten.slice.Tensor, old, axis, 0, start, before=node, like=node)
        parts.insert(0, front)
    reaches_end = end is None or (isinstance(end, int) and end >= LAST)
    if isinstance(end, int) and isinstance(size, int):
        reaches_end |= end >= size
    if not reaches_end:
        parts.append(editor.call(aten.slice.Tensor, old, axis, end, LAST, before=node, like=node))
    if len(parts) == 1:
        return new
    return editor.call(aten.cat.default, parts, axis, before=node, like=node)


def _by_name(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by their names in the schema (`self` as `input`), defaults left out."""
    target: Any = node.target
    names = [a.name for a in target._schema.arguments]
    found = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {"input" if name == "self" else name: value for name, value in found.items()}


def _diff(editor: Editor, node: fx.Node) -> None:
    """`diff(x, 1, axis)`: each value less the one in front of it."""
    arguments = _by_name(node)
    x, axis = arguments["input"], arguments.get("dim", -1)
    edges = [arguments.get(key) for key in ("prepend", "append")]
    if arguments.get("n", 1) != 1:
        return
    if any(edge is not None for edge in edges):
        parts = [part for part in (edges[0], x, edges[1]) if part is not None]
        x = editor.call(aten.cat.default, parts, axis, before=node, like=node)
    late = editor.call(aten.slice.Tensor, x, axis, 1, LAST, before=node, like=node)
    early = editor.call(aten.slice.Tensor, x, axis, 0, -1, before=node, like=node)
    logical = node.meta["val"].dtype == torch.bool
    op = aten.ne.Tensor if logical else aten.sub.Tensor
    editor.replace(node, editor.call(op, late, early, before=node, like=node))


def _outer(editor: Editor, node: fx.Node) -> None:
    """`outer(a, b)` -> `a[:, None] * b`, which promotes mixed dtypes where others do not."""
    left, right = node.args[:2]
    column = editor.call(aten.unsqueeze.default, left, 1, before=node, like=node)
    editor.replace(node, editor.call(aten.mul.Tensor, column, right, before=node, like=node))


def _norm(editor: Editor, node: fx.Node) -> None:
    """`linalg_norm` of vectors -> `linalg_vector_norm`; of matrices it stays."""
    arguments = _by_name(node)
    order, axes, x = arguments.get("ord"), arguments.get("dim"), arguments["input"]
    axes = [axes] if isinstance(axes, int) else axes
    of_vectors = order is None or (isinstance(order, int | float) and axes and len(axes) == 1)
    if not of_vectors or arguments.get("dtype") is not None:
        return
    args = (x, 2 if order is None else order, axes, arguments.get("keepdim", False))
    new = editor.call(aten.linalg_vector_norm.default, *args, before=node, like=node)
    editor.replace(node, new)


def _broadcast(editor: Editor, node: fx.Node) -> None:
    """`broadcast_tensors` -> one `expand` per tensor that is read."""
    tensors: Any = node.args[0]
    for reader in list(node.users):
        index: Any = reader.args[1]
        sizes = [_size_of(editor, reader, axis, tensors) for axis in range(_rank(reader))]
        new = editor.call(aten.expand.default, tensors[index], sizes, before=reader, like=reader)
        editor.replace(reader, new)
    if not node.users:
        editor.erase(node)


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _size_of(editor: Editor, node: fx.Node, axis: int, tensors: list[fx.Node]) -> int | fx.Node:
    """The size of a broadcast result: a number, or read from the tensor that has it."""
    size = node.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    for tensor in tensors:
        own = axis - (_rank(node) - _rank(tensor))
        if own >= 0 and str(tensor.meta["val"].shape[own]) == str(size):
            return editor.call(aten.sym_size.int, tensor, own, before=node, like=node)
    raise AssertionError(f"no operand of {node.name} has its size {size}")


def _extremum(editor: Editor, node: fx.Node) -> None:
    target: Any = node.target
    if target._overloadname == "other":
        smaller = target._schema.name == "aten::min"
        node.target = aten.minimum.default if smaller else aten.maximum.default


def _convolution(editor: Editor, node: fx.Node) -> None:
    """`convolution`, `_convolution` -> `conv1d/2d/3d` or `conv_transpose1d/2d/3d`."""
    arguments: Any = node.args[:9]
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = arguments
    args: tuple[Any, ...]
    rank = weight.meta["val"].dim() - 2
    if transposed:
        op = (
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
        )
        args = (x, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        op = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
        args = (x, weight, bias, stride, padding, dilation, groups)
    if 1 <= rank <= 3:
        editor.replace(node, editor.call(op[rank - 1], *args, before=node, like=node))


def _named_padding(editor: Editor, node: fx.Node) -> None:
    """`conv2d(..., padding="same")` -> numbers."""
    target: Any = node.target
    if target._overloadname != "padding":
        return
    x, weight = node.args[:2]
    rest: list[Any] = list(node.args[2:])
    assert isinstance(weight, fx.Node)
    rank = weight.meta["val"].dim() - 2
    defaults: list[Any] = [None, [1] * rank, "valid", [1] * rank, 1]
    bias, stride, padding, dilation, groups = [*rest, *defaults[len(rest) :]]
    dilation = list(dilation) * (rank if len(dilation) == 1 else 1)
    sizes = [int(s) for s in weight.meta["val"].shape[2:]]
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, sizes, strict=True)]
    if any(t % 2 for t in total):
        # An even kernel: torch pads one more at the end.
        amounts = [a for t in reversed(total) for a in (0, t % 2)]
        x = editor.call(aten.pad.default, x, amounts, before=node, like=node)
    op = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[rank - 1]
    args = (x, weight, bias, stride, [t // 2 for t in total], dilation, groups)
    editor.replace(node, editor.call(op, *args, before=node, like=node))


Rule = Callable[[Editor, fx.Node], None]
RULES: dict[str, Rule] = {
    **dict.fromkeys(RENAMED, _rename),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(("item", "_local_scalar_dense"), _item),
    **dict.fromkeys(("reshape_as", "view_as", "expand_as"), _like),
    **dict.fromkeys(("min", "max"), _extremum),
    "broadcast_tensors": _broadcast,
    "diff": _diff,
    "linalg_norm": _norm,
    "outer": _outer,
    "ger": _outer,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _named_padding),
    **RECOMPOSED,
}  # fmt: skip
