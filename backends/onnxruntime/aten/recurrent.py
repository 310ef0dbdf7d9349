"""LSTM and GRU layers, with their gates in ONNX's order."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable

aten = torch.ops.aten
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
"""Torch's gate at each place of ONNX's order: LSTM input, output, forget, cell; GRU update,
reset, new."""


def _reordered(e: Emitter, nodes: list[fx.Node], kind: str) -> torch.Tensor:
    """One tensor per direction, gates in ONNX's order, stacked over directions."""
    found = []
    for node in nodes:
        if node.op != "get_attr":
            raise Untranslatable(node, "a recurrent weight that is computed")
        gates = e.state[str(node.target)].detach().chunk(len(GATES[kind]))
        found.append(torch.cat([gates[i] for i in GATES[kind]]))
    return torch.stack(found)


def _layer(
    e: Emitter, kind: str, x: ir.Value, weights: list[list[fx.Node]], states: list[ir.Value]
) -> list[ir.Value]:
    """One layer, all directions. x: (length, batch, width). Returns its outputs, joined first."""
    w, r = (_reordered(e, [d[i] for d in weights], kind) for i in (0, 1))
    names = [str(d[0].target) for d in weights]
    stem = "+".join(names)
    bias = None
    if len(weights[0]) == 4:
        b = torch.cat([_reordered(e, [d[i] for d in weights], kind) for i in (2, 3)], dim=1)
        bias = e.derived(f"{stem}.bias", b)
    hidden = int(r.shape[-1])
    outputs = e.multi(
        kind, 1 + len(states), x, e.derived(f"{stem}.input", w), e.derived(f"{stem}.hidden", r),
        bias, None, *states, hidden_size=hidden,
        direction="bidirectional" if len(weights) == 2 else "forward",
        linear_before_reset=1 if kind == "GRU" else None,
    )  # fmt: skip
    # (length, directions, batch, hidden) to (length, batch, directions * hidden)
    swapped = e.op("Transpose", outputs[0], perm=[0, 2, 1, 3])
    joined = e.op("Reshape", swapped, e.ints(0, 0, len(weights) * hidden))
    return [joined, *outputs[1:]]


def _stack(
    e: Emitter, node: fx.Node, kind: str, x: fx.Node, states: list[fx.Node], args: tuple[Any, ...]
) -> list[ir.Value]:
    params, has_biases, layers, dropout, train, bidirectional, batch_first = args
    if train and dropout:
        raise Untranslatable(node, "dropout between recurrent layers in training mode")
    if x.meta["val"].dim() != 3:
        raise Untranslatable(node, "a recurrent layer without a batch axis")
    directions = 2 if bidirectional else 1
    per = len(params) // (layers * directions)
    if per != (4 if has_biases else 2):
        raise Untranslatable(node, "a recurrent layer with a projection")
    value = e.values[x]
    if batch_first:
        value = e.op("Transpose", value, perm=[1, 0, 2])
    last: list[list[ir.Value]] = [[] for _ in states]
    for layer in range(layers):
        at = layer * directions
        weights = [list(params[(at + d) * per : (at + d + 1) * per]) for d in range(directions)]
        first = [
            e.op("Slice", e.values[s], e.ints(at), e.ints(at + directions), e.ints(0))
            for s in states
        ]
        value, *ends = _layer(e, kind, value, weights, first)
        for kept, end in zip(last, ends, strict=True):
            kept.append(end)
    if batch_first:
        value = e.op("Transpose", value, perm=[1, 0, 2])
    ends = [kept[0] if layers == 1 else e.op("Concat", *kept, axis=0) for kept in last]
    return [value, *ends]


@translates(aten.lstm.input)
def lstm(e: Emitter, node: fx.Node, x: Any, states: Any, params: Any, *args: Any) -> Any:
    return _stack(e, node, "LSTM", x, list(states), (params, *args))


@translates(aten.gru.input)
def gru(e: Emitter, node: fx.Node, x: Any, state: Any, params: Any, *args: Any) -> Any:
    return _stack(e, node, "GRU", x, [state], (params, *args))
