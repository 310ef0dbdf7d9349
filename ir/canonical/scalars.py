"""Numbers that a model computes as tensors: `torch.tensor(length) - 1`, then `.item()` or an index.

Traced, such a number is a new unknown size, though it is plain arithmetic on a known one. Here
the arithmetic is done on the sizes themselves, and the unknown goes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor

aten = torch.ops.aten

ARITHMETIC: dict[Any, Callable[[Any, Any], Any]] = {
    aten.add.Tensor: operator.add,
    aten.add.Scalar: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.sub.Scalar: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.mul.Scalar: operator.mul,
    aten.rsub.Scalar: lambda a, b: b - a,
}
PASSES_ON = (
    aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)  # fmt: skip


def known_number(editor: Editor, node: fx.Node, before: fx.Node) -> int | fx.Node | None:
    """The integer in a tensor of no axes: a number, or a node that computes it from sizes.

    None where the tensor is not plain integer arithmetic on sizes and constants.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() or value.dtype.is_floating_point:
        return None
    if node.op == "get_attr":
        tensor = editor.tensor(node)
        fixed = tensor is not None and not isinstance(tensor, torch.nn.Parameter)
        return int(tensor) if fixed and tensor is not None else None
    if node.target is aten.scalar_tensor.default:
        return node.args[0] if isinstance(node.args[0], int | fx.Node) else None
    source = node.args[0] if node.args else None
    if node.target in PASSES_ON and isinstance(source, fx.Node):
        return known_number(editor, source, before)
    combine = ARITHMETIC.get(node.target)
    if combine is None or node.kwargs or len(node.args) != 2:
        return None
    left, right = (_operand(editor, a, before) for a in node.args)
    if left is None or right is None:
        return None
    if isinstance(left, int) and isinstance(right, int):
        return int(combine(left, right))
    if node.target is aten.rsub.Scalar:
        left, right, combine = right, left, operator.sub
    return editor.call(combine, left, right, before=before, like=before)


def _operand(editor: Editor, value: Any, before: fx.Node) -> int | fx.Node | None:
    if isinstance(value, fx.Node):
        return known_number(editor, value, before)
    return value if isinstance(value, int) else None
