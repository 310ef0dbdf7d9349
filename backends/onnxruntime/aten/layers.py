"""Layers with weights, and attention in primitive form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten


# ---- matrix products


def transposed_weight(e: Emitter, weight: fx.Node) -> ir.Value:
    """A linear weight as (in, out).

    A weight that only linears read is stored that way; any other (tied to an embedding, computed
    by a node) is transposed in the graph, so that it is stored once.
    """
    only_linear = all(u.target is aten.linear.default and u.args[1] is weight for u in weight.users)
    if weight.op == "get_attr" and only_linear and weight.meta["val"].dim() == 2:
        return e.weight(str(weight.target), "transposed")
    if weight.meta["val"].dim() < 2:
        return e.values[weight]  # type: ignore[no-any-return]
    return e.op("Transpose", e.values[weight], perm=[1, 0])  # type: ignore[no-any-return]


@translates(aten.linear.default)
def linear(e: Emitter, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Any:
    # Never Gemm: ONNX Runtime's integer kernels replace MatMul + Add only.
    product = e.op("MatMul", e.values[x], transposed_weight(e, weight))
    return product if bias is None else e.op("Add", product, e.values[bias])


@translates(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default)
def matmul(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    return e.op("MatMul", e.values[a], e.values[b])


@translates(aten.addmm.default, aten.baddbmm.default)
def addmm(e: Emitter, node: fx.Node, c: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    dtype = node.meta["val"].dtype
    product = e.op("MatMul", e.values[a], e.values[b])
    if alpha != 1:
        product = e.op("Mul", product, e.constant(alpha, dtype))
    if beta == 0:
        return product
    term = e.values[c] if beta == 1 else e.op("Mul", e.values[c], e.constant(beta, dtype))
    return e.op("Add", product, term)


@translates(aten.einsum.default)
def einsum(e: Emitter, node: fx.Node, equation: str, tensors: list[Any], **_: Any) -> Any:
    dtype = node.meta["val"].dtype
    values = [e.tensor(t, dtype) for t in tensors]
    return e.op("Einsum", *values, equation=equation.replace(" ", ""))


@translates(aten.addbmm.default)
def addbmm(e: Emitter, node: fx.Node, c: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    dtype = node.meta["val"].dtype
    total = e.op("ReduceSum", e.op("MatMul", e.values[a], e.values[b]), e.ints(0), keepdims=0)
    if alpha != 1:
        total = e.op("Mul", total, e.constant(alpha, dtype))
    term = e.values[c] if beta == 1 else e.op("Mul", e.values[c], e.constant(beta, dtype))
    return e.op("Add", term, total)


@translates(aten.bilinear.default)
def bilinear(e: Emitter, node: fx.Node, a: Any, b: Any, weight: Any, bias: Any = None) -> Any:
    values = [e.values[t] for t in (a, weight, b)]
    product = e.op("Einsum", *values, equation="...i,oij,...j->...o")
    return product if bias is None else e.op("Add", product, e.values[bias])


@translates(aten.cdist.default)
def cdist(e: Emitter, node: fx.Node, a: Any, b: Any, p: float = 2, compute_mode: Any = None) -> Any:
    kinds = {1: "ReduceL1", 2: "ReduceL2", float("inf"): "ReduceMax"}
    if p not in kinds:
        raise Untranslatable(node, f"distances of order {p}")
    rows, columns = (
        e.op("Unsqueeze", e.values[a], e.ints(-2)),
        e.op("Unsqueeze", e.values[b], e.ints(-3)),
    )
    apart = e.op("Sub", rows, columns)
    apart = e.op("Abs", apart) if kinds[p] == "ReduceMax" else apart
    return e.op(kinds[p], apart, e.ints(-1), keepdims=0)


@translates(aten.outer.default)
def outer(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    return e.op("Mul", e.op("Unsqueeze", e.values[a], e.ints(1)), e.values[b])


# ---- norms


@translates(aten.layer_norm.default)
def layer_norm(
    e: Emitter, node: fx.Node, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float = 1e-5, _: bool = True,
) -> Any:  # fmt: skip
    dtype = node.meta["val"].dtype
    scale = e.values[weight] if weight is not None else e.weight_like(1.0, list(shape), dtype)
    shift = None if bias is None else e.values[bias]
    return e.op(
        "LayerNormalization", e.values[x], scale, shift, axis=-len(shape), epsilon=float(eps)
    )


@translates(aten.rms_norm.default)
def rms_norm(
    e: Emitter, node: fx.Node, x: Any, shape: Sequence[int], weight: Any = None, eps: Any = None
) -> Any:
    # Written exactly as ONNX Runtime's own SimplifiedLayerNormalization fusion looks for it.
    dtype = node.meta["val"].dtype
    eps = torch.finfo(dtype).eps if eps is None else eps
    axes = e.ints(*range(-len(shape), 0))
    mean = e.op("ReduceMean", e.op("Pow", e.values[x], e.constant(2.0, dtype)), axes)
    root = e.op("Sqrt", e.op("Add", mean, e.constant(eps, dtype)))
    scaled = e.op("Div", e.values[x], root)
    return scaled if weight is None else e.op("Mul", scaled, e.values[weight])


@translates(aten.batch_norm.default)
def batch_norm(
    e: Emitter, node: fx.Node, x: Any, weight: Any, bias: Any, mean: Any, var: Any,
    training: bool, momentum: float, eps: float, *_: Any,
) -> Any:  # fmt: skip
    if training:
        return _by_statistics(e, node, x, weight, bias, eps)
    dtype, count = node.meta["val"].dtype, [int(mean.meta["val"].shape[0])]
    scale = e.values[weight] if weight is not None else e.weight_like(1.0, count, dtype)
    shift = e.values[bias] if bias is not None else e.weight_like(0.0, count, dtype)
    return e.op(
        "BatchNormalization", e.values[x], scale, shift, e.values[mean], e.values[var],
        epsilon=float(eps),
    )  # fmt: skip


def _by_statistics(
    e: Emitter, node: fx.Node, x: fx.Node, weight: Any, bias: Any, eps: float
) -> ir.Value:
    """Batch norm by the mean and variance of the batch itself."""
    dtype, rank = node.meta["val"].dtype, x.meta["val"].dim()
    axes = e.ints(0, *range(2, rank))
    centred = e.op("Sub", e.values[x], e.op("ReduceMean", e.values[x], axes, keepdims=1))
    variance = e.op("ReduceMean", e.op("Mul", centred, centred), axes, keepdims=1)
    root = e.op("Sqrt", e.op("Add", variance, e.constant(float(eps), dtype)))
    value = e.op("Div", centred, root)
    behind = list(range(1, rank - 1))
    for kind, term in (("Mul", weight), ("Add", bias)):
        if term is not None:
            column = e.values[term]
            if behind:
                column = e.op("Unsqueeze", column, e.ints(*behind))
            value = e.op(kind, value, column)
    return value  # type: ignore[no-any-return]


@translates(aten.group_norm.default)
def group_norm(
    e: Emitter, node: fx.Node, x: Any, groups: int, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, _: bool = True,
) -> Any:  # fmt: skip
    # ONNX Runtime takes GroupNormalization apart into primitives; InstanceNormalization over
    # (batch, groups, everything else) is one kernel.
    dtype, rank = node.meta["val"].dtype, x.meta["val"].dim()
    flat = e.op("Reshape", e.values[x], e.ints(0, groups, -1))
    ones, zeros = e.weight_like(1.0, [groups], dtype), e.weight_like(0.0, [groups], dtype)
    normed = e.op("InstanceNormalization", flat, ones, zeros, epsilon=float(eps))
    value = e.op("Reshape", normed, e.op("Shape", e.values[x]))
    axes = e.ints(*range(1, rank - 1))
    for kind, term in (("Mul", weight), ("Add", bias)):
        if term is not None:
            value = e.op(
                kind, value, e.op("Unsqueeze", e.values[term], axes) if rank > 2 else e.values[term]
            )
    return value


@translates(aten.instance_norm.default)
def instance_norm(
    e: Emitter, node: fx.Node, x: Any, weight: Any, bias: Any, mean: Any, var: Any,
    use_input_stats: bool, momentum: float, eps: float, *_: Any,
) -> Any:  # fmt: skip
    if not use_input_stats:
        return batch_norm(e, node, x, weight, bias, mean, var, False, momentum, eps)
    dtype, count = node.meta["val"].dtype, [int(x.meta["val"].shape[1])]
    scale = e.values[weight] if weight is not None else e.weight_like(1.0, count, dtype)
    shift = e.values[bias] if bias is not None else e.weight_like(0.0, count, dtype)
    return e.op("InstanceNormalization", e.values[x], scale, shift, epsilon=float(eps))


@translates(aten.pixel_shuffle.default)
def pixel_shuffle(e: Emitter, node: fx.Node, x: Any, factor: int) -> Any:
    return e.op("DepthToSpace", e.values[x], blocksize=factor, mode="CRD")


# ---- attention


@translates(aten.scaled_dot_product_attention.default)
def attention(
    e: Emitter, node: fx.Node, q: Any, k: Any, v: Any, mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if dropout_p:
        raise Untranslatable(node, "attention dropout in training mode")
    dtype, rank = node.meta["val"].dtype, q.meta["val"].dim()
    key, value = e.values[k], e.values[v]
    if enable_gqa:
        key, value = repeat_heads(e, q, k, key), repeat_heads(e, q, v, value)
    scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    query = e.op("Mul", e.values[q], e.constant(float(scale), dtype))
    swap = [*range(rank - 2), rank - 1, rank - 2]
    scores = e.op("MatMul", query, e.op("Transpose", key, perm=swap))
    if is_causal:
        scores = e.op("Add", scores, causal_bias(e, q, k, dtype))
    if mask is None:
        return e.op("MatMul", e.op("Softmax", scores, axis=-1), value)
    bias = e.values[mask]
    if mask.meta["val"].dtype == torch.bool:
        closed = e.constant(float("-inf"), dtype)
        bias = e.op("Where", bias, e.constant(0.0, dtype), closed)
    probabilities = e.op("Softmax", e.op("Add", scores, bias), axis=-1)
    # A query that may see no key gets zeros in torch; the plain formula has 0 / 0.
    unseen = e.op("IsNaN", probabilities)
    probabilities = e.op("Where", unseen, e.constant(0.0, dtype), probabilities)
    return e.op("MatMul", probabilities, value)


def repeat_heads(e: Emitter, q: fx.Node, k: fx.Node, value: ir.Value) -> ir.Value:
    """Key or value heads (B, G, T, D) repeated to the query's head count (B, H, T, D)."""
    have = sizes_of(k)
    count = int(q.meta["val"].shape[-3]) // int(have[-3])
    if count == 1:
        return value
    wide = e.op("Unsqueeze", value, e.ints(2))
    tiled = e.op("Expand", wide, e.ints(1, 1, count, 1, 1))
    middle = [have[0], have[1], count, *have[2:]]
    return e.reshape(tiled, middle, [have[0], have[1] * count, *have[2:]])


def causal_bias(e: Emitter, q: fx.Node, k: fx.Node, dtype: torch.dtype) -> ir.Value:
    """(queries, keys): 0 where key <= query, -inf elsewhere."""
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    rows = e.op("Range", zero, e.op("Squeeze", e.size(q.meta["val"].shape[-2])), one)
    columns = e.op("Range", zero, e.op("Squeeze", e.size(k.meta["val"].shape[-2])), one)
    seen = e.op("GreaterOrEqual", e.op("Unsqueeze", rows, e.ints(1)), columns)
    return e.op("Where", seen, e.constant(0.0, dtype), e.constant(float("-inf"), dtype))  # type: ignore[no-any-return]
