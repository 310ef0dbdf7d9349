"""Routed products of experts as one call: what libraries write as a gather of matrices.

    bmm(w[experts], x[:, :, None])[:, :, 0] + b[experts]   ->   expert_linear(x, w, experts, b)
    bmm(x[:, None, :], w[experts])[:, 0] + b[experts]      ->   expert_matmul(x, w, experts, b)

The gather copies a matrix for every row; the call gathers rows instead, and its weight is a
stored stack (experts, out, in) that passes find as a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import depends_on_input
from graphwright.ir.ops.experts import expert_linear, expert_matmul

aten = torch.ops.aten


def gathered_product(editor: Editor, node: fx.Node) -> None:
    """A batched product of a gathered stack with one row each -> one routed call."""
    for op, place in ((expert_linear, 0), (expert_matmul, 1)):
        stack = _gathered(node.args[place])
        column = 2 - place  # the dimension of size 1
        x = _unsqueezed(node.args[1 - place], column)
        readers = _read_users(node)
        if stack is None or x is None or not all(_squeezes(r, column) for r in readers):
            continue
        weight, experts = stack
        if weight.meta["val"].dim() != 3:
            continue
        for reader in readers:
            added, bias = _biased(reader, experts)
            new = editor.call(op, x, weight, experts, bias, before=added, like=node)
            editor.replace(added, new)
        return


def _gathered(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(stack, indices (n,)) of a gather along the first dimension of a constant."""
    if not isinstance(node, fx.Node):
        return None
    args: Any = node.args
    if node.target is aten.index.Tensor and len(args[1]) == 1:
        stack, (experts,) = args
    elif node.target is aten.index_select.default and args[1] == 0:
        stack, _, experts = args
    else:
        return None
    if not isinstance(stack, fx.Node) or not isinstance(experts, fx.Node):
        return None
    ids = experts.meta["val"]
    is_routing = isinstance(ids, Tensor) and ids.dim() == 1 and not ids.dtype.is_floating_point
    if not is_routing or ids.dtype == torch.bool or depends_on_input(stack):
        return None
    return stack, experts


def _unsqueezed(node: Any, dim: int) -> fx.Node | None:
    """The matrix (n, k) whose rows the operand is, with a dimension of size 1 at `dim`."""
    if not isinstance(node, fx.Node) or node.target is not aten.unsqueeze.default:
        return None
    args: Any = node.args
    return args[0] if args[0].meta["val"].dim() == 2 and args[1] % 3 == dim else None


def _squeezes(node: fx.Node, dim: int) -> bool:
    args: Any = node.args
    if node.target is aten.squeeze.dim:
        return int(args[1]) % 3 == dim
    return node.target is aten.squeeze.dims and [d % 3 for d in args[1]] == [dim]


def _read_users(node: fx.Node) -> list[fx.Node]:
    """Users whose result is read: calls that were in place leave unread ones behind."""
    return [user for user in node.users if user.users]


def _biased(node: fx.Node, experts: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The call that ends the layer, and the stack (experts, out) of its bias, if it has one."""
    users = _read_users(node)
    if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
        return node, None
    for one, other in (users[0].args, users[0].args[::-1]):
        found = _gathered(other)
        if one is node and found is not None and found[1] is experts:
            bias = found[0].meta["val"]
            if bias.dim() == 2 and bias.dtype == node.meta["val"].dtype:
                return users[0], found[0]
    return node, None
