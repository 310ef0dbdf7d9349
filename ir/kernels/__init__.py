"""Triton kernels behind our custom ops. Nothing here is imported until a kernel is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """The fused face of one custom op; both functions take the op's own arguments."""

    fits: Callable[..., bool]
    """Whether the kernel handles these dtypes and sizes; decided without trying."""
    launch: Callable[..., Any]
    """Runs the kernel; returns what the op returns, in new tensors."""
