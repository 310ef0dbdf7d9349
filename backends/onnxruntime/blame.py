"""Which operator of a program has no ONNX form, where neither translator took the whole of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphwright.backends.onnxruntime.emitter import Untranslatable
from graphwright.backends.onnxruntime.translate import untranslatable
from graphwright.ir.program import Program
from graphwright.ir.trace.prepare import quiet

UNKNOWN = 3
"""Stands for a size that depends on values."""


def without_form(program: Program, opset: int, first: Untranslatable) -> Untranslatable:
    """The first node that neither our translation nor the standard exporter can write.

    The node at which our translation stopped may be one that the standard exporter knows; the one
    that it does not know is then another.

    Args:
        program, opset: as for `translate`.
        first: where our translation stopped; returned where each node can be written by itself.
    """
    try:
        found = untranslatable(program, opset)
    except Exception:  # what follows a node without a form may not fit what stands in for it
        return first
    if len(found) == 1:
        return found[0]
    for why in found:
        if not _exports_alone(why.node):
            return why
    return first


class _Call(nn.Module):
    """One call of an operator on the tensors among its arguments."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self._flat, self._spec = pytree.tree_flatten((node.args, node.kwargs))
        self._target: Any = node.target

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        flat = [next(given) if _is_tensor(arg) else _number(arg) for arg in self._flat]
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        return self._target(*args, **kwargs)

    def examples(self) -> tuple[torch.Tensor, ...]:
        """Zeros of the sizes that the arguments had in the trace."""
        return tuple(
            torch.zeros([_size(s) for s in arg.meta["val"].shape], dtype=arg.meta["val"].dtype)
            for arg in self._flat
            if _is_tensor(arg)
        )


def _is_tensor(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and isinstance(arg.meta["val"], torch.Tensor)


def _number(arg: Any) -> Any:
    value = arg.meta["val"] if isinstance(arg, fx.Node) else arg
    return _size(value) if isinstance(value, torch.SymInt | torch.SymFloat) else value


def _size(size: Any) -> Any:
    if not isinstance(size, torch.SymInt | torch.SymFloat):
        return size
    return size.node.hint if size.node.has_hint() else UNKNOWN


def _exports_alone(node: fx.Node) -> bool:
    call = _Call(node)
    try:
        with torch.no_grad(), quiet():
            torch.onnx.export(call, call.examples(), verbose=False)
    except Exception:
        return False
    return True
