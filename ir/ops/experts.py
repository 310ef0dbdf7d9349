"""graphwright::expert_linear and expert_matmul: every row times the matrix of its own expert.

    y[i] = weight[experts[i]] @ x[i] + bias[experts[i]]        (expert_linear)
    y[i] = x[i] @ weight[experts[i]] + bias[experts[i]]        (expert_matmul)

The routed products of a mixture of experts. Written as a gather of matrices and a batched product
they would copy a matrix per row; here the rows of each expert are gathered instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.ops.registry import _save_inputs, declare


def by_expert(
    x: Tensor, experts: Tensor, count: int, product: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """What `product(expert, rows)` gives for every row, in the order of the rows.

    Args:
        x: (n, in).
        experts: (n,) integers; negative ones count from the end.
        count: of experts.
        product: (m, in) to (m, out); called for experts that have rows, once for one without
            when there are no rows at all.

    Raises:
        IndexError: an expert that does not exist.
    """
    order, sizes = routed(experts, count)
    if not len(x):
        return product(0, x)
    parts = zip(range(count), x[order].split(sizes), strict=True)
    return torch.cat([product(e, rows) for e, rows in parts if len(rows)])[order.argsort()]


def routed(experts: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """The order that puts the rows of each expert side by side, and how many each has.

    Raises:
        IndexError: an expert that does not exist.
    """
    ids = torch.where(experts < 0, experts + count, experts)
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < count):
        raise IndexError(f"expert out of range: there are {count}")
    return ids.argsort(stable=True), torch.bincount(ids, minlength=count).tolist()


def _linear(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None) -> Tensor:
    def product(e: int, rows: Tensor) -> Tensor:
        return F.linear(rows, weight[e], None if bias is None else bias[e])

    return by_expert(x, experts, len(weight), product)


def _matmul(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight.transpose(1, 2), experts, bias)


def _linear_meta(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


def _matmul_meta(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


def _macs(x: Tensor, weight: Tensor, *_: object) -> Any:
    return x.shape[0] * weight.shape[1] * weight.shape[2]


def _backward(ctx: Any, grad: Tensor, *, is_turned: bool) -> tuple[Tensor | None, ...]:
    """Gradients as plain calls and our own ops, so that a training graph can be traced."""
    x, weight, experts, *rest = ctx.saved_tensors
    back = expert_linear if is_turned else expert_matmul
    dx = back(grad, weight, experts, None) if ctx.needs_input_grad[0] else None
    count, dw, db = weight.shape[0], None, None
    ids = torch.where(experts < 0, experts + count, experts)
    if ctx.needs_input_grad[1]:
        left, right = (x, grad) if is_turned else (grad, x)
        # Over all rows for each expert: its own are not known while a graph is traced.
        owned = [(ids == e).to(x.dtype).unsqueeze(1) for e in range(count)]
        dw = torch.stack([(left * own).t() @ right for own in owned])
    if rest and ctx.needs_input_grad[3]:
        db = torch.zeros_like(rest[0]).index_add(0, ids, grad)
    return dx, dw, None, db


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad, is_turned=False)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad, is_turned=True)


def onnx_by_expert(
    x: Any, experts: Any, count: int, out: int, product: Callable[[int, Any], Any]
) -> Any:
    """The ONNX form of `by_expert`: the rows of each expert are gathered, and their results put
    in their places."""
    from onnxscript import opset18 as op

    ids = op.Mod(experts, op.CastLike(op.Constant(value_int=count), experts))
    shape = op.Concat(op.Shape(experts), op.Constant(value_ints=[out]), axis=0)
    y = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), shape)
    for e in range(count):
        own = op.Equal(ids, op.CastLike(op.Constant(value_int=e), ids))
        places = op.Transpose(op.NonZero(own), perm=[1, 0])
        y = op.ScatterND(y, places, product(e, op.GatherND(x, places)))
    return y


def onnx_part(stack: Any, e: int) -> Any:
    """Entry e of a stack of tensors."""
    from onnxscript import opset18 as op

    return op.Gather(stack, op.Constant(value_int=e), axis=0)


def onnx_linear(
    x: Any, weight: Any, experts: Any, bias: Any, count: int, out: int, *, is_turned: bool = False
) -> Any:
    """The ONNX form of both ops on a stack of dense matrices."""
    from onnxscript import opset18 as op

    def product(e: int, rows: Any) -> Any:
        matrix = onnx_part(weight, e)
        y = op.MatMul(rows, matrix if is_turned else op.Transpose(matrix, perm=[1, 0]))
        return y if bias is None else op.Add(y, onnx_part(bias, e))

    return onnx_by_expert(x, experts, count, out, product)


def _linear_onnx(x: Any, weight: Any, experts: Any, bias: Any) -> Any:
    return onnx_linear(x, weight, experts, bias, int(weight.shape[0]), int(weight.shape[1]))


def _matmul_onnx(x: Any, weight: Any, experts: Any, bias: Any) -> Any:
    count, out = int(weight.shape[0]), int(weight.shape[2])
    return onnx_linear(x, weight, experts, bias, count, out, is_turned=True)


def _linear_samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for n, count, out, columns, has_bias in [
        (9, 4, 6, 5, True), (1, 3, 7, 33, False), (40, 2, 70, 20, False), (5, 1, 3, 4, True),
    ]:  # fmt: skip
        x = torch.randn(n, columns, generator=generator)
        weight = torch.randn(count, out, columns, generator=generator)
        experts = torch.randint(0, count, (n,), generator=generator)
        yield x, weight, experts, torch.randn(count, out) if has_bias else None


def _matmul_samples() -> Iterator[tuple[Any, ...]]:
    for x, weight, experts, bias in _linear_samples():
        yield x, weight.transpose(1, 2).contiguous(), experts, bias


expert_linear = declare(
    "expert_linear(Tensor x, Tensor weight, Tensor experts, Tensor? bias) -> Tensor",
    eager=_linear,
    meta=_linear_meta,
    onnx=_linear_onnx,
    kernel="graphwright.ir.kernels.experts:expert_linear",
    samples=_linear_samples,
    backward=_linear_backward,
    setup_context=_save_inputs,
    macs=_macs,
)
"""Rows (n, in) to (n, out). weight: (count, out, in); experts: (n,) ints; bias: (count, out)."""

expert_matmul = declare(
    "expert_matmul(Tensor x, Tensor weight, Tensor experts, Tensor? bias) -> Tensor",
    eager=_matmul,
    meta=_matmul_meta,
    onnx=_matmul_onnx,
    kernel="graphwright.ir.kernels.experts:expert_matmul",
    samples=_matmul_samples,
    backward=_matmul_backward,
    setup_context=_save_inputs,
    macs=_macs,
)
"""The same with a weight (count, in, out)."""
