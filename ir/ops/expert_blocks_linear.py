"""graphwright::expert_blocks_linear: `expert_linear` on weights kept as 2 to 8 bit codes.

The matrices of the experts lie one below the other, as rows of one weight in blocks
(`dequantize_blocks`). Made by the backends from such a weight feeding `expert_linear`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops import blocks
from graphwright.ir.ops.experts import expert_linear, onnx_by_expert, onnx_linear, onnx_part
from graphwright.ir.ops.registry import declare

ONNX_KERNEL_BITS = (2, 4, 8)
"""Widths of codes that ONNX Runtime's MatMulNBits reads."""


def _eager(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, experts: Tensor,
    bias: Tensor | None, count: int, bits: int, block: int,
) -> Tensor:  # fmt: skip
    weight = blocks._eager(codes, scale, zero_point, bits, block, x.shape[-1])
    stack = weight.reshape(count, -1, x.shape[-1]).to(x.dtype)
    return expert_linear(x, stack, experts, bias)  # type: ignore[no-any-return]


def _meta(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Any, experts: Any, bias: Any, count: int,
    *_: object,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], codes.shape[0] // count))


def _macs(x: Tensor, codes: Tensor, scale: Any, zero: Any, experts: Any, bias: Any,
          count: int, *_: object) -> Any:  # fmt: skip
    return x.numel() * (codes.shape[0] // count)


def _onnx(
    x: Any, codes: Any, scale: Any, zero_point: Any, experts: Any, bias: Any,
    count: int, bits: int, block: int,
) -> Any:  # fmt: skip
    """A MatMulNBits per expert on its part of the codes; dense matrices where it has no kernel."""
    from onnxscript import opset18 as op

    columns, out = int(x.shape[-1]), int(codes.shape[0]) // count
    if bits not in ONNX_KERNEL_BITS or block < 16 or block & (block - 1):
        weight = op.CastLike(blocks._onnx(codes, scale, zero_point, bits, block, columns), x)
        stack = op.Reshape(weight, op.Constant(value_ints=[count, out, columns]))
        return onnx_linear(x, stack, experts, bias, count, out)

    def part(stack: Any, e: int) -> Any:
        start, end, axis = (op.Constant(value_ints=[v]) for v in (e * out, (e + 1) * out, 0))
        return None if stack is None else op.Slice(stack, start, end, axis)

    def product(e: int, rows: Any) -> Any:
        stored = [part(tensor, e) for tensor in (codes, scale, zero_point)]
        y = _matmul_nbits(rows, stored, columns, out, bits, block)
        return y if bias is None else op.Add(y, onnx_part(bias, e))

    return onnx_by_expert(x, experts, count, out, product)


def _matmul_nbits(
    rows: Any, stored: list[Any], columns: int, out: int, bits: int, block: int
) -> Any:
    """`rows` times the matrix of the codes; in float32 inside (accuracy level 1)."""
    inputs = stored if stored[2] is not None else stored[:2]
    sizes = {"K": columns, "N": out, "bits": bits, "block_size": block, "accuracy_level": 1}
    return _kernel()(rows, *inputs, **sizes)


@functools.cache
def _kernel() -> Any:
    """ONNX Runtime's MatMulNBits for onnxscript, which takes no op without a schema."""
    from onnx.defs import OpSchema
    from onnxscript import values

    optional = OpSchema.FormalParameterOption.Optional
    given = [OpSchema.FormalParameter(n, t) for n, t in (("A", "T"), ("B", "U"), ("scales", "T"))]
    schema = OpSchema(
        "MatMulNBits", "com.microsoft", 1,
        inputs=[*given, OpSchema.FormalParameter("zero_points", "U", param_option=optional)],
        outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)"], ""), ("U", ["tensor(uint8)"], ""),
        ],
        attributes=[
            OpSchema.Attribute(name, OpSchema.AttrType.INT, "")
            for name in ("K", "N", "bits", "block_size", "accuracy_level")
        ],
    )  # fmt: skip
    return values.Op(values.Opset("com.microsoft", 1), "MatMulNBits", schema)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    stored = list(blocks._samples())
    for index, n, count, has_bias in [(3, 7, 3, True), (0, 1, 37, False), (6, 40, 1, True)]:
        codes, scale, zero_point, bits, block, columns = stored[index]
        x = torch.randn(n, columns, generator=generator)
        experts = torch.randint(0, count, (n,), generator=generator)
        bias = torch.randn(count, len(codes) // count, generator=generator) if has_bias else None
        yield x, codes, scale, zero_point, experts, bias, count, bits, block
    codes, scale = torch.randint(0, 256, (6, 2, 16), dtype=torch.uint8), torch.rand(6, 2) / 16
    experts = torch.tensor([2, 0, 2, 2])
    yield torch.randn(4, 64, generator=generator), codes, scale, None, experts, None, 3, 4, 32


expert_blocks_linear = declare(
    "expert_blocks_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, "
    "Tensor experts, Tensor? bias, int count, int bits, int block) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.experts:expert_blocks_linear",
    samples=_samples,
    macs=_macs,
)
"""Rows (n, in) to (n, out), in the dtype of x. codes, scale, zero_point: as `dequantize_blocks`
takes them for a weight (count * out, in); experts: (n,) integers; bias: (count, out)."""
