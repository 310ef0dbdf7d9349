"""Stored tensors with other values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor


def stored(editor: Editor, node: Any, change: Callable[[Tensor], Tensor]) -> fx.Node:
    """The node of a stored tensor that a change was made to.

    Under its own name where one call reads it, under a new one where others read it too.
    """
    assert isinstance(node, fx.Node)
    name = str(node.target)
    old = editor.state[name]
    value: Tensor = change(old.detach()).to(old.dtype).contiguous()
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    if len(editor.uses(name)) == 1:
        editor.set_state(name, value)
        return node
    return editor.get(editor.add_state(name, value))
