"""Parts shared by the kernels: activation in the epilogue, tensors seen as rows."""

from __future__ import annotations

import os

# Triton warns once per process when it is left to choose; contraction to FMA is what eager
# CUDA kernels do too. Must be set before triton is imported.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that the kernels read and write; all arithmetic is in float32."""


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of `graphwright.ir.ops.activation.ACTIVATIONS` on a float32 block."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z), and libdevice's tanh has no interpreter form
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    return x


def all_floats(*tensors: Tensor | None) -> bool:
    """Whether every tensor that is given holds one of `FLOATS` and at least one element."""
    return all(t is None or (t.dtype in FLOATS and t.numel() > 0) for t in tensors)


def as_rows(x: Tensor) -> Tensor:
    """(rows, columns) with unit column stride; a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def new_like(x: Tensor) -> Tensor:
    """Empty, contiguous, with the shape, dtype and device of `x`."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
