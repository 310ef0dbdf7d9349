"""Cumulative products, maxima and sums of exponentials: a Scan over the axis, a step at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, onnx_dtype, sizes_of

aten = torch.ops.aten


class Body:
    """The body of a Scan: what is carried from step to step, and one value of the axis."""

    def __init__(self, e: Emitter, carried: list[torch.dtype], scanned: torch.dtype) -> None:
        self._e = e
        self._nodes: list[ir.Node] = []
        self.carried = [self._input(dtype) for dtype in carried]
        self.value = self._input(scanned)

    def _input(self, dtype: torch.dtype) -> ir.Value:
        return ir.Value(name=self._e.name("step"), type=ir.TensorType(onnx_dtype(dtype)))

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Adds a node and returns its output."""
        return self.several(kind, 1, *inputs, **attributes)[0]

    def several(
        self, kind: str, count: int, *inputs: ir.Value, **attributes: Any
    ) -> list[ir.Value]:
        """Adds a node with `count` outputs and returns them."""
        outputs = [ir.Value(name=self._e.name(f"step.{kind}")) for _ in range(count)]
        self._nodes.append(ir.node(kind, list(inputs), attributes, outputs=outputs))
        return outputs

    def number(self, value: float | int, dtype: torch.dtype) -> ir.Value:
        """A constant without axes."""
        return self.op("Constant", value=ir.tensor(value, dtype=onnx_dtype(dtype)))

    def graph(self, outputs: list[tuple[ir.Value, torch.dtype]]) -> ir.Graph:
        """The finished body; a value that comes out twice is copied."""
        results = []
        for value, dtype in outputs:
            result = self.op("Identity", value)
            result.type = ir.TensorType(onnx_dtype(dtype))
            results.append(result)
        opset = {"": self._e.opset}
        return ir.Graph(
            [*self.carried, self.value], results, nodes=self._nodes, opset_imports=opset,
            name=self._e.name("body"),
        )  # fmt: skip


Step = Callable[[Body], list[ir.Value]]
"""Makes the new carried values from the old ones and one value of the axis."""


def scan(
    e: Emitter, node: fx.Node, a: Any, dim: int, start: list[tuple[Any, torch.dtype]], step: Step,
    kept: int,
) -> list[ir.Value]:  # fmt: skip
    """The first `kept` carried values after every step, stacked along the axis.

    Args:
        start: value that each carried tensor is filled with before the first step, and its dtype.
        step: see `Step`.
    """
    dtype = node.meta["val"][0].dtype if kept > 1 else node.meta["val"].dtype
    sizes = sizes_of(a)
    if not sizes:
        sizes, value = [1], e.op("Reshape", e.tensor(a, dtype), e.ints(1))
    else:
        value = e.tensor(a, dtype)
    axis = dim % len(sizes)
    rest = e.shape([*sizes[:axis], *sizes[axis + 1 :]])
    first = [e.op("Expand", e.constant(fill, kind), rest) for fill, kind in start]
    kinds = [kind for _, kind in start]
    body = Body(e, kinds, dtype)
    new = list(zip(step(body), kinds, strict=True))
    outputs = e.multi(
        "Scan", len(start) + kept, *first, value, body=body.graph([*new, *new[:kept]]),
        num_scan_inputs=1, scan_input_axes=[axis], scan_output_axes=[axis] * kept,
    )[len(start) :]  # fmt: skip
    return outputs if sizes_of(a) else [e.op("Squeeze", value) for value in outputs]


@translates(aten.cumprod.default)
def cumprod(e: Emitter, node: fx.Node, a: Any, dim: int, **_: Any) -> Any:
    dtype = node.meta["val"].dtype
    return scan(
        e, node, a, dim, [(1, dtype)], lambda body: [body.op("Mul", body.carried[0], body.value)], 1
    )[0]


@translates(aten.logcumsumexp.default)
def logcumsumexp(e: Emitter, node: fx.Node, a: Any, dim: int) -> Any:
    dtype = node.meta["val"].dtype

    def step(body: Body) -> list[ir.Value]:
        total, value = body.carried[0], body.value
        large, small = body.op("Max", total, value), body.op("Min", total, value)
        rest = body.op("Exp", body.op("Sub", small, large))
        grown = body.op("Add", large, body.op("Log", body.op("Add", rest, body.number(1.0, dtype))))
        # Infinity less infinity is no number.
        return [body.op("Where", body.op("IsInf", large), large, grown)]

    return scan(e, node, a, dim, [(float("-inf"), dtype)], step, 1)[0]


@translates(aten.cummax.default, aten.cummin.default)
def cummax(e: Emitter, node: fx.Node, a: Any, dim: int) -> Any:
    dtype = node.meta["val"][0].dtype
    rises = node.target is aten.cummax.default
    bounds: Any = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    start = bounds.min if rises else bounds.max
    if dtype.is_floating_point:
        start = float("-inf") if rises else float("inf")

    def step(body: Body) -> list[ir.Value]:
        best, place, at = body.carried
        # Of equal values the last one counts, and the first NaN and all after it.
        better = body.op("GreaterOrEqual" if rises else "LessOrEqual", body.value, best)
        if dtype.is_floating_point:
            is_nan = body.op("IsNaN", body.value)
            better = body.op("Or", better, is_nan)
            still = body.op("Or", is_nan, body.op("Not", body.op("IsNaN", best)))
            better = body.op("And", better, still)
        return [
            body.op("Where", better, body.value, best),
            body.op("Where", better, at, place),
            body.op("Add", at, body.number(1, torch.int64)),
        ]

    carried = [(start, dtype), (0, torch.int64), (0, torch.int64)]
    return scan(e, node, a, dim, carried, step, 2)
