"""Calls on fake tensors: shapes and dtypes without arithmetic, free sizes kept free."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright.ir.graph.recurrent import shape_function

try:
    # Private in torch. Without it a call may go through a kernel that knows numbers only: a free
    # size that reaches it is a fixed one from then on, and torch 2.11 refuses linear and matmul.
    from torch._dispatch.python import enable_python_dispatcher as python_dispatcher
except ImportError:
    python_dispatcher = contextlib.nullcontext  # type: ignore[assignment, misc]


__all__ = ["fake_call", "python_dispatcher"]


def fake_call(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """The result of `target(*args, **kwargs)` for fake tensors of `mode`."""
    with torch.no_grad(), python_dispatcher(), mode:
        return shape_function(target)(*args, **kwargs)
