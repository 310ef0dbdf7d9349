"""Activation functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.choice import clamp
from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable

aten = torch.ops.aten


@translates(aten.gelu.default)
def gelu(e: Emitter, node: fx.Node, a: Any, approximate: str = "none") -> Any:
    if e.opset >= 20:
        return e.op("Gelu", e.values[a], approximate=approximate)
    if approximate == "none":
        return e.op("Gelu", e.values[a], domain="com.microsoft")
    return e.op("FastGelu", e.values[a], domain="com.microsoft")


@translates(aten.silu.default)
def silu(e: Emitter, node: fx.Node, a: Any) -> Any:
    if node.meta["val"].dtype == torch.float32:
        return e.op("QuickGelu", e.values[a], domain="com.microsoft", alpha=1.0)
    return e.op("Mul", e.values[a], e.op("Sigmoid", e.values[a]))


@translates(aten.softplus.default)
def softplus(e: Emitter, node: fx.Node, a: Any, beta: float = 1, threshold: float = 20) -> Any:
    dtype = node.meta["val"].dtype
    scaled, value = e.values[a], e.values[a]
    if beta != 1:
        scaled = e.op("Mul", value, e.constant(beta, dtype))
    soft = e.op("Softplus", scaled)
    if beta != 1:
        soft = e.op("Div", soft, e.constant(beta, dtype))
    if threshold >= 20:  # from there on the two are one number in float32
        return soft
    far = e.op("Greater", scaled, e.constant(threshold, dtype))
    return e.op("Where", far, value, soft)


@translates(aten.mish.default)
def mish(e: Emitter, node: fx.Node, a: Any) -> Any:
    return e.op("Mul", e.values[a], e.op("Tanh", e.op("Softplus", e.values[a])))


@translates(aten.elu.default)
def elu(
    e: Emitter, node: fx.Node, a: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> Any:
    if scale != 1 or input_scale != 1:
        raise Untranslatable(node, "scaled elu")
    return e.op("Elu", e.values[a], alpha=float(alpha))


@translates(aten.selu.default)
def selu(e: Emitter, node: fx.Node, a: Any) -> Any:
    return e.op("Selu", e.values[a])


@translates(aten.leaky_relu.default)
def leaky_relu(e: Emitter, node: fx.Node, a: Any, negative_slope: float = 0.01) -> Any:
    return e.op("LeakyRelu", e.values[a], alpha=float(negative_slope))


@translates(aten.prelu.default)
def prelu(e: Emitter, node: fx.Node, a: Any, weight: Any) -> Any:
    rank, count = a.meta["val"].dim(), weight.meta["val"].shape[0]
    slope = e.values[weight]
    if count > 1 and rank > 2:
        slope = e.op("Reshape", slope, e.ints(count, *[1] * (rank - 2)))
    return e.op("PRelu", e.values[a], slope)


@translates(aten.relu6.default)
def relu6(e: Emitter, node: fx.Node, a: Any) -> Any:
    return clamp(e, node, a, 0, 6)


@translates(aten.hardtanh.default)
def hardtanh(e: Emitter, node: fx.Node, a: Any, low: float = -1, high: float = 1) -> Any:
    return clamp(e, node, a, low, high)


@translates(aten.hardsigmoid.default)
def hardsigmoid(e: Emitter, node: fx.Node, a: Any) -> Any:
    return e.op("HardSigmoid", e.values[a], alpha=1 / 6, beta=0.5)


@translates(aten.log_sigmoid.default)
def log_sigmoid(e: Emitter, node: fx.Node, a: Any) -> Any:
    return e.op("Neg", e.op("Softplus", e.op("Neg", e.values[a])))


@translates(aten.glu.default)
def glu(e: Emitter, node: fx.Node, a: Any, dim: int = -1) -> Any:
    first, second = e.multi("Split", 2, e.values[a], axis=dim, num_outputs=2)
    return e.op("Mul", first, e.op("Sigmoid", second))
