"""Options of the onnxruntime backend. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graphwright.ir.options import Options


class OnnxRuntimeOptions(Options):
    """How a program is lowered to ONNX Runtime."""

    opset: Annotated[int, Field(ge=18, le=23)] = 21
    """Version of the standard ONNX operator set."""

    provider: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where the artifact runs; `auto` takes CUDA when there is a usable device."""

    threads: Annotated[int, Field(ge=0)] = 0
    """Threads within an operator; 0 takes torch's current number."""

    tolerance: Annotated[float, Field(gt=0)] = 1e-4
    """Largest relative error against the program, per output, for float32 programs."""

    external_data_mb: Annotated[float, Field(ge=0, le=2000)] = 1900
    """Weights above this many megabytes go to a file beside the model."""

    skip: tuple[str, ...] = ()
    """Rewriting steps to leave out, by name."""
