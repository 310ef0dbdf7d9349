"""graphwright::gated_act: activation(gate) * up, the middle of a SwiGLU or GEGLU block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.activation import ACTIVATIONS, activate, onnx_activate
from graphwright.ir.ops.registry import declare


def _eager(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return activate(gate, activation) * up


def _meta(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _onnx(gate: Any, up: Any, activation: str) -> Any:
    from onnxscript import opset18 as op

    return op.Mul(onnx_activate(gate, activation), up)


def _samples() -> Iterator[tuple[Tensor, Tensor, str]]:
    generator = torch.Generator().manual_seed(0)
    for activation in ACTIVATIONS:
        # both halves of one projection: rows that are not adjacent in memory
        packed = torch.randn(2, 5, 2 * 37, generator=generator) * 2
        gate, up = packed.chunk(2, dim=-1)
        yield gate, up, activation


gated_act = declare(
    "gated_act(Tensor gate, Tensor up, str activation) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.activation:gated_act",
    samples=_samples,
)
