"""Keys or values on the grid of a quantized cache: a program for every head of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.cached_attention import EXACT, WIDEST
from graphwright.ir.kernels.common import all_floats


@triton.jit
def quantize_cache_kernel(
    x, scale, y, tokens, heads, width,
    BITS: tl.constexpr, BY_TOKEN: tl.constexpr, EXACT: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One head of one token to its codes and back."""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, DIM)
    inside = channel < width
    value = tl.load(x + row * width + channel, mask=inside, other=0.0).to(tl.float32)
    most = 2.0 ** (BITS - 1) - 1.0
    if BITS == 16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
        tl.store(y + row * width + channel, value.to(y.dtype.element_ty), mask=inside)
        return
    if BY_TOKEN:
        peak = tl.maximum(tl.div_rn(tl.max(tl.abs(value), 0), most), 1e-8)
        step = tl.zeros((DIM,), tl.float32) + peak
    else:
        head = (row // tokens) % heads
        step = tl.load(scale + head * width + channel, mask=inside, other=1.0).to(tl.float32)
    ratio = tl.minimum(tl.maximum(tl.div_rn(value, step), -most), most)
    code = (ratio + EXACT) - EXACT
    tl.store(y + row * width + channel, (code * step).to(y.dtype.element_ty), mask=inside)


def _fits(x: Tensor, scale: Tensor | None, bits: int) -> bool:
    return all_floats(x, scale) and x.dim() == 4 and x.shape[3] <= WIDEST


def _launch(x: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, heads, tokens, width = x.shape
    quantize_cache_kernel[(batch * heads * tokens,)](
        x, x if scale is None else scale.contiguous(), y, tokens, heads, width, BITS=bits,
        BY_TOKEN=scale is None, EXACT=EXACT, DIM=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
    return y


quantize_cache = Kernel(_fits, _launch)
