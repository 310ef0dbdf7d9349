"""A program after some steps, with the model that it became and what was found about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch

from graphwright.ir.program import Program

Outputs = tuple[torch.Tensor, ...]


@dataclass
class Attempt:
    """A program after some steps, as a checked model.

    Attributes:
        program: what was translated.
        applied: step name to how often it applied.
        translator: `direct`, or `torch.onnx.export` and the op that called for it.
        model: serialized model, or its path when the weights lie beside it.
        session: the session that was checked.
        kernels: op type to how many kernels of it the session runs.
        errors: relative error by sizes.
        sparse: how many weights are stored as their non-zeros, and the bytes that saves.
        products: of weights in blocks: accuracy level, largest error of one product against what
            that level computes, and error of the outputs for rounding activations.
        integer: how many layers with int8 weights run as integer kernels, and which do not.
        unoptimized: why the model does not run with all graph optimizations off; empty if it does.
        values: results of nodes of `program` in the model, by node name.
    """

    program: Program
    applied: dict[str, int]
    translator: str = ""
    model: bytes | Path = b""
    session: onnxruntime.InferenceSession | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    sparse: dict[str, int] = field(default_factory=dict)
    products: dict[str, Any] = field(default_factory=dict)
    integer: dict[str, Any] = field(default_factory=dict)
    unoptimized: str = ""
    values: dict[str, ir.Value] = field(default_factory=dict)
