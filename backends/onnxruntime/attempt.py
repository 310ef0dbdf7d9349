"""A program after some steps, with the model that it became and what was found about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch

import graphwright.ir.ops  # noqa: F401  registers graphwright::fake_quantize
from graphwright.backends.onnxruntime.steps.int8 import TAPS
from graphwright.ir.program import Program

Outputs = tuple[torch.Tensor, ...]

QUANTIZERS = (
    torch.ops.graphwright.fake_quantize.default,
    torch.ops.graphwright.fake_quantize_dynamic.default,
    torch.ops.graphwright.quantize_cache.default,
)


@dataclass
class Attempt:
    """A program after some steps, as a checked model.

    Attributes:
        program: what was translated.
        applied: step name to how often it applied.
        translator: `direct`, or `torch.onnx.export` and the op that called for it.
        model: serialized model, or its path when the weights lie beside it.
        session: the session that is handed over.
        exact: the session whose products do not round activations, which was checked.
        kernels: op type to how many kernels of it the session runs.
        errors: relative error by sizes.
        sparse: how many weights are stored as their non-zeros, and the bytes that saves.
        products: of weights in blocks: accuracy level, largest error of one product against what
            that level computes, and error of the outputs for rounding activations.
        lstms: of int8 weights: how many run on integers, their largest error against what that
            arithmetic gives, and error of the outputs for it; or why none does.
        integer: how many layers with int8 weights run as integer kernels, and which do not.
        unoptimized: why the model does not run with all graph optimizations off; empty if it does.
        values: results of nodes of `program` in the model, by node name.
    """

    program: Program
    applied: dict[str, int]
    translator: str = ""
    model: bytes | Path = b""
    session: onnxruntime.InferenceSession | None = None
    exact: onnxruntime.InferenceSession | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    sparse: dict[str, int] = field(default_factory=dict)
    products: dict[str, Any] = field(default_factory=dict)
    lstms: dict[str, Any] = field(default_factory=dict)
    integer: dict[str, Any] = field(default_factory=dict)
    unoptimized: str = ""
    values: dict[str, ir.Value] = field(default_factory=dict)


def quantizers(program: Program) -> dict[str, list[str]]:
    """Every quantizer with the nodes that show what it gives: codes, or its own result."""
    left = [
        node.name for node in program.graph.nodes
        if node.op == "call_function" and node.target in QUANTIZERS and node.users
    ]  # fmt: skip
    return {**{name: [name] for name in left}, **program.facts.get(TAPS, {})}
