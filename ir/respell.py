"""One spelling per operation: what exporters and decompositions write in many ways."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.functional import writes
from graphwright.ir.scalars import known_number

aten = torch.ops.aten

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
    if isinstance(number, fx.Node):
        editor.replace(node, number)
    elif number is not None:
        for user in list(node.users):
            args, kwargs = fx.map_arg(
                (user.args, user.kwargs), lambda a: number if a is node else a
            )
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


def _native_batch_norm(editor: Editor, node: fx.Node) -> None:
    """Decomposed batch norms, read by their first result only -> `batch_norm`."""
    target: Any = node.target
    values = {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(target._schema.arguments)
    }
    training = values.get("training", "no_training" not in target._schema.name)
    args = (
        values["input"], values.get("weight"), values.get("bias"), values.get("running_mean"),
        values.get("running_var"), bool(training), values.get("momentum", 0.1),
        values.get("eps", values.get("epsilon", 1e-5)), True,
    )  # fmt: skip
    _first_result(editor, node, aten.batch_norm.default, args)


def _native_layer_norm(editor: Editor, node: fx.Node) -> None:
    x, shape, weight, bias, eps = node.args
    _first_result(editor, node, aten.layer_norm.default, (x, shape, weight, bias, eps))


def _native_group_norm(editor: Editor, node: fx.Node) -> None:
    x, weight, bias, _, _, _, groups, eps = node.args
    _first_result(editor, node, aten.group_norm.default, (x, groups, weight, bias, eps))


def _native_dropout(editor: Editor, node: fx.Node) -> None:
    x, p, train = node.args
    _first_result(editor, node, aten.dropout.default, (x, p, bool(train)))


def _native_attention(editor: Editor, node: fx.Node) -> None:
    """The CPU flash kernel's call -> `scaled_dot_product_attention`."""
    q, k, v = node.args[:3]
    rest: list[Any] = list(node.args[3:])
    p, causal = [*rest, *[0.0, False][len(rest) :]]
    args = (q, k, v, node.kwargs.get("attn_mask"), p, causal)
    scale = node.kwargs.get("scale")
    _first_result(editor, node, aten.scaled_dot_product_attention.default, args, scale=scale)


def _first_result(editor: Editor, node: fx.Node, op: Any, args: Any, **kwargs: Any) -> None:
    """Replaces item 0 of a call with several results; leaves it alone when others are read."""
    for unread in [u for u in node.users if not u.users]:
        editor.erase(unread)
    readers = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    if not readers or len(readers) != len(node.users):
        return
    new = editor.call(op, *args, before=node, like=node, **kwargs)
    for reader in readers:
        editor.replace(reader, new)
    if not node.users and node in editor.graph.nodes:
        editor.erase(node)


def _softmax(editor: Editor, node: fx.Node) -> None:
    """`_softmax(x, dim, half_to_float)` -> `softmax.int(x, dim)`."""
    target: Any = node.target
    if len(node.args) > 2 and node.args[2]:
        return
    op = aten.log_softmax.int if "log" in target._schema.name else aten.softmax.int
    editor.replace(node, editor.call(op, node.args[0], node.args[1], before=node, like=node))


def _linear(editor: Editor, node: fx.Node) -> None:
    """`addmm(b, x, t(w))` and `mm(x, t(w))` with a weight w -> `linear(x, w, b)`."""
    target: Any = node.target
    added = target._schema.name == "aten::addmm"
    if added and any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return
    bias, x, weight = node.args if added else (None, *node.args)
    if not isinstance(weight, fx.Node) or not _is_transpose(weight):
        return
    source = weight.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return
    if isinstance(bias, fx.Node) and bias.meta["val"].dim() != 1:
        return
    new = editor.call(aten.linear.default, x, source, bias, before=node, like=node)
    editor.replace(node, new)


def _is_transpose(node: fx.Node) -> bool:
    if node.target is aten.t.default:
        return True
    if node.target is aten.permute.default:
        return list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    return node.target is aten.transpose.int and {node.args[1], node.args[2]} in ({0, 1}, {-1, -2})


Rule = Callable[[Editor, fx.Node], None]
RULES: dict[str, Rule] = {
    **dict.fromkeys(RENAMED, _rename),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(("item", "_local_scalar_dense"), _item),
    **dict.fromkeys(("reshape_as", "view_as", "expand_as"), _like),
    **dict.fromkeys(("min", "max"), _extremum),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _named_padding),
    **dict.fromkeys(
        (
            "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional",
        ),
        _native_batch_norm,
    ),
    "native_layer_norm": _native_layer_norm,
    "native_group_norm": _native_group_norm,
    "native_dropout": _native_dropout,
    "_scaled_dot_product_flash_attention_for_cpu": _native_attention,
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("addmm", "mm"), _linear),
}  # fmt: skip
