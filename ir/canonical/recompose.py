"""Layers that were taken apart as the one call they were, and compound calls as their parts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.canonical.experts import gathered_product
from graphwright.ir.edit import Editor

aten = torch.ops.aten


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
    defaults: list[Any] = [0.0, False]
    p, causal = [*rest, *defaults[len(rest) :]]
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


def _squared_error(editor: Editor, node: fx.Node) -> None:
    """`mse_loss`, which vector quantizers return in inference too -> its arithmetic."""
    left, right = node.args[:2]
    reduction = node.args[2] if len(node.args) > 2 else node.kwargs.get("reduction", 1)

    def call(op: Any, *args: Any) -> fx.Node:
        return editor.call(op, *args, before=node, like=node)

    difference = call(aten.sub.Tensor, left, right)
    result = call(aten.mul.Tensor, difference, difference)
    if reduction == 1:
        result = call(aten.mean.default, result)
    elif reduction == 2:
        result = call(aten.sum.default, result)
    editor.replace(node, result)


def _distances(editor: Editor, node: fx.Node) -> None:
    """Euclidean `cdist` of (..., n, d) and (..., m, d), as |a|^2 + |b|^2 - 2ab.

    So torch does it from 25 rows on; it never makes the (n, m, d) differences.
    """
    left, right, *rest = node.args
    p: Any = rest[0] if rest else node.kwargs.get("p", 2.0)
    if p != 2:
        return

    def call(op: Any, *args: Any) -> fx.Node:
        return editor.call(op, *args, before=node, like=node)

    def squares(x: Any) -> fx.Node:
        return call(aten.sum.dim_IntList, call(aten.mul.Tensor, x, x), [-1], True)

    product = call(aten.matmul.default, left, call(aten.transpose.int, right, -2, -1))
    lengths = call(aten.add.Tensor, squares(left), call(aten.transpose.int, squares(right), -2, -1))
    squared = call(aten.sub.Tensor, lengths, call(aten.mul.Tensor, product, 2.0))
    # Rounding may leave a small negative number where two points coincide.
    result = call(aten.sqrt.default, call(aten.clamp_min.default, squared, 0.0))
    editor.replace(node, result)


RECOMPOSED: dict[str, Callable[[Editor, fx.Node], None]] = {
    **dict.fromkeys(
        (
            "native_batch_norm",
            "cudnn_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_native_batch_norm_legit_functional",
        ),
        _native_batch_norm,
    ),
    "mse_loss": _squared_error,
    "cdist": _distances,
    "bmm": gathered_product,
    "native_layer_norm": _native_layer_norm,
    "native_group_norm": _native_group_norm,
    "native_dropout": _native_dropout,
    "_scaled_dot_product_flash_attention_for_cpu": _native_attention,
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("addmm", "mm"), _linear),
}
"""Rules by name of the decomposed operation."""
