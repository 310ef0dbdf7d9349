"""ATen to ONNX, one table by operator overload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphwright.backends.onnxruntime.aten.registry import TABLE, translates

__all__ = ["TABLE", "load", "translates"]


def load() -> dict[Any, Callable[..., Any]]:
    """The complete table."""
    from graphwright.backends.onnxruntime.aten import (  # noqa: F401
        activations,
        choice,
        complex_numbers,
        contrib,
        convolutions,
        copies,
        factories,
        formulas,
        fourier,
        index,
        layers,
        pointwise,
        pooling,
        recurrent,
        reduce,
        resizing,
        scans,
        scatter,
        shape,
        sorting,
        spectrograms,
        windows,
    )

    return TABLE
