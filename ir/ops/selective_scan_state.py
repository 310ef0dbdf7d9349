"""graphwright::selective_scan_state: the selective scan from a given state, and its last state.

`selective_scan` with h_0 in front of the first step, and h at the last one beside y: what a model
carries from token to token as it generates.

Source: P84, section 3.2 (Gu and Dao 2023, "Mamba", equation 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare
from graphwright.ir.ops.selective_scan import _samples as _scan_samples
from graphwright.ir.ops.selective_scan import in_chunks, onnx_scan


def _eager(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    y, state = in_chunks(x, delta, a, b, c, start)
    # no steps give the start itself, and a result is no alias
    return y.to(x.dtype), state.to(start.dtype).clone()


def _meta(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(start.shape, dtype=start.dtype, device=start.device),
    )


def _onnx(x: Any, delta: Any, a: Any, b: Any, c: Any, start: Any) -> tuple[Any, Any]:
    from onnxscript import FLOAT
    from onnxscript import opset18 as op

    y, state = onnx_scan(x, delta, a, b, c, op.Cast(start, to=FLOAT.dtype))
    return y, op.CastLike(state, start)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)
    for x, delta, a, b, c in _scan_samples():
        start = torch.randn(x.shape[0], x.shape[2], a.shape[1], generator=generator)
        yield x, delta, a, b, c, start


selective_scan_state = declare(
    "selective_scan_state(Tensor x, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor start) "
    "-> (Tensor, Tensor)",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.selective_scan:selective_scan_state",
    samples=_samples,
    macs=lambda x, delta, a, b, c, start: 3 * x.shape[0] * x.shape[1] * x.shape[2] * a.shape[1],
)
"""As `selective_scan`, with start (B, D, N); gives y (B, L, D) and the last state (B, D, N)."""
