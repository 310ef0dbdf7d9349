"""LSTM, GRU and plain recurrent layers, with their gates in ONNX's order, and single cells."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.layers import transposed_weight
from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.aten.scans import Body
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable
from graphwright.ir.graph.constants import constant_value, depends_on_input
from graphwright.ir.stored.read import int8_rows, is_coded

aten = torch.ops.aten

CODES_KEY = "graphwright.codes"
"""Metadata of the int8 codes of a recurrent weight: their name in the program's state."""

GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""Torch's gate at each place of ONNX's order: LSTM input, output, forget, cell; GRU update,
reset, new."""


def _in_order(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """The gates of a stored tensor, along its first axis, in ONNX's order."""
    gates = tensor.chunk(len(GATES[kind]))
    return torch.cat([gates[i] for i in GATES[kind]])


def _reordered(e: Emitter, nodes: list[fx.Node], kind: str) -> torch.Tensor:
    """One tensor per direction, gates in ONNX's order, stacked over directions."""
    for node in nodes:
        if depends_on_input(node):
            raise Untranslatable(node, "a recurrent weight that is computed from an input")
    return torch.stack([_in_order(kind, constant_value(e, node)) for node in nodes])


def _weights(e: Emitter, nodes: list[fx.Node], kind: str, name: str) -> ir.Value:
    """A matrix per direction, gates in ONNX's order: (directions, gates * hidden, width).

    One that is stored as codes stays so in the file, and is rebuilt by the graph.
    """
    if not any(is_coded(node) for node in nodes):
        return e.derived(name, _reordered(e, nodes, kind))
    rows = [e.op("Unsqueeze", _rebuilt(e, node, kind), e.ints(0)) for node in nodes]
    return rows[0] if len(rows) == 1 else e.op("Concat", *rows, axis=0)  # type: ignore[no-any-return]


def _rebuilt(e: Emitter, node: fx.Node, kind: str) -> ir.Value:
    """A matrix with its gates in ONNX's order: int8 codes are moved, any other form rebuilt."""
    stored = int8_rows(node)
    if stored is not None:
        codes, scale = (_in_order(kind, e.state[name].detach()) for name in stored)
        parts = e.derived(f"{stored[0]}.gates", codes), e.derived(f"{stored[1]}.gates", scale)
        parts[0].metadata_props[CODES_KEY] = stored[0]
        return e.op("DequantizeLinear", *parts, axis=0)  # type: ignore[no-any-return]
    gates = e.multi("Split", len(GATES[kind]), e.values[node], axis=0, num_outputs=len(GATES[kind]))
    gates = gates if isinstance(gates, list | tuple) else [gates]
    ordered = [gates[i] for i in GATES[kind]]
    return ordered[0] if len(ordered) == 1 else e.op("Concat", *ordered, axis=0)


def _layer(
    e: Emitter, kind: str, x: ir.Value, weights: list[list[fx.Node]], states: list[ir.Value],
    activation: str,
) -> list[ir.Value]:  # fmt: skip
    """One layer, all directions. x: (length, batch, width). Returns its outputs, joined first."""
    stem = "+".join(str(d[0].target) if d[0].op == "get_attr" else d[0].name for d in weights)
    w, r = (
        _weights(e, [d[i] for d in weights], kind, f"{stem}.{name}")
        for i, name in enumerate(("input", "hidden"))
    )
    bias = None
    if len(weights[0]) == 4:
        b = torch.cat([_reordered(e, [d[i] for d in weights], kind) for i in (2, 3)], dim=1)
        bias = e.derived(f"{stem}.bias", b)
    hidden = int(weights[0][1].meta["val"].shape[-1])
    outputs = e.multi(
        kind, 1 + len(states), x, w, r, bias, None, *states, hidden_size=hidden,
        direction="bidirectional" if len(weights) == 2 else "forward",
        linear_before_reset=1 if kind == "GRU" else None,
        activations=[activation] * len(weights) if activation else None,
    )  # fmt: skip
    # (length, directions, batch, hidden) to (length, batch, directions * hidden)
    swapped = e.op("Transpose", outputs[0], perm=[0, 2, 1, 3])
    joined = e.op("Reshape", swapped, e.ints(0, 0, len(weights) * hidden))
    return [joined, *outputs[1:]]


def _projected(
    e: Emitter, x: ir.Value, weights: list[list[fx.Node]], states: list[ir.Value]
) -> list[ir.Value]:
    """As `_layer`, for an LSTM whose hidden state is projected, which ONNX's LSTM does not have."""
    outputs, ends = [], []
    for at, direction in enumerate(weights):
        tensors = [e.values[w] for w in direction]
        first = [e.op("Gather", s, e.constant(at, torch.int64), axis=0) for s in states]
        given = e.op("MatMul", x, e.op("Transpose", tensors[0], perm=[1, 0]))
        for bias in tensors[2:-1]:
            given = e.op("Add", given, bias)
        dtype = direction[0].meta["val"].dtype
        body = Body(e, [dtype, dtype], dtype)
        results = [(v, dtype) for v in _projected_step(body, tensors[1], tensors[-1])]
        hidden, cell, output = e.multi(
            "Scan", 3, *first, given, body=body.graph([*results, results[0]]), num_scan_inputs=1,
            scan_input_directions=[at], scan_output_directions=[at],
        )  # fmt: skip
        outputs.append(output)
        ends.append([hidden, cell])
    joined = outputs[0] if len(outputs) == 1 else e.op("Concat", *outputs, axis=-1)
    last = [
        e.op("Concat", *[e.op("Unsqueeze", end[i], e.ints(0)) for end in ends], axis=0)
        for i in range(2)
    ]
    return [joined, *last]


def _projected_step(body: Body, recurrent: ir.Value, projection: ir.Value) -> list[ir.Value]:
    """The new hidden and cell state; the values come from outside of the body."""
    hidden, cell = body.carried
    turned = body.op("Transpose", recurrent, perm=[1, 0])
    gates = body.op("Add", body.value, body.op("MatMul", hidden, turned))
    i, f, g, o = body.several("Split", 4, gates, axis=-1, num_outputs=4)
    kept = body.op("Mul", body.op("Sigmoid", f), cell)
    new = body.op("Add", kept, body.op("Mul", body.op("Sigmoid", i), body.op("Tanh", g)))
    shown = body.op("Mul", body.op("Sigmoid", o), body.op("Tanh", new))
    return [body.op("MatMul", shown, body.op("Transpose", projection, perm=[1, 0])), new]


def _stack(
    e: Emitter, node: fx.Node, kind: str, x: fx.Node, states: list[fx.Node],
    args: tuple[Any, ...], activation: str = "",
) -> list[ir.Value]:  # fmt: skip
    params, has_biases, layers, dropout, train, bidirectional, batch_first = args
    if train and dropout:
        raise Untranslatable(node, "dropout between recurrent layers in training mode")
    if x.meta["val"].dim() != 3:
        raise Untranslatable(node, "a recurrent layer without a batch axis")
    directions = 2 if bidirectional else 1
    per = len(params) // (layers * directions)
    projected = per != (4 if has_biases else 2)
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
        if projected:
            value, *ends = _projected(e, value, weights, first)
        else:
            value, *ends = _layer(e, kind, value, weights, first, activation)
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


@translates(aten.rnn_tanh.input)
def rnn_tanh(e: Emitter, node: fx.Node, x: Any, state: Any, params: Any, *args: Any) -> Any:
    return _stack(e, node, "RNN", x, [state], (params, *args), "Tanh")


@translates(aten.rnn_relu.input)
def rnn_relu(e: Emitter, node: fx.Node, x: Any, state: Any, params: Any, *args: Any) -> Any:
    return _stack(e, node, "RNN", x, [state], (params, *args), "Relu")


# ---- cells, which run one step: plain products, for their weights stay as they are


def _gates(e: Emitter, given: Any, weight: Any, bias: Any) -> ir.Value:
    """All gates of a cell, side by side."""
    product = e.op("MatMul", e.values[given], transposed_weight(e, weight))
    return product if bias is None else e.op("Add", product, e.values[bias])  # type: ignore[no-any-return]


@translates(aten.lstm_cell.default)
def lstm_cell(
    e: Emitter, node: fx.Node, x: Any, states: Any, w: Any, r: Any, b: Any = None, c: Any = None
) -> Any:
    hidden, cell = states
    gates = e.op("Add", _gates(e, x, w, b), _gates(e, hidden, r, c))
    i, f, g, o = e.multi("Split", 4, gates, axis=-1, num_outputs=4)
    kept = e.op("Mul", e.op("Sigmoid", f), e.values[cell])
    new = e.op("Add", kept, e.op("Mul", e.op("Sigmoid", i), e.op("Tanh", g)))
    return [e.op("Mul", e.op("Sigmoid", o), e.op("Tanh", new)), new]


@translates(aten.gru_cell.default)
def gru_cell(
    e: Emitter, node: fx.Node, x: Any, state: Any, w: Any, r: Any, b: Any = None, c: Any = None
) -> Any:
    given = e.multi("Split", 3, _gates(e, x, w, b), axis=-1, num_outputs=3)
    held = e.multi("Split", 3, _gates(e, state, r, c), axis=-1, num_outputs=3)
    reset, update = (e.op("Sigmoid", e.op("Add", given[at], held[at])) for at in range(2))
    new = e.op("Tanh", e.op("Add", given[2], e.op("Mul", reset, held[2])))
    return e.op("Add", new, e.op("Mul", update, e.op("Sub", e.values[state], new)))


@translates(aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def rnn_cell(
    e: Emitter, node: fx.Node, x: Any, state: Any, w: Any, r: Any, b: Any = None, c: Any = None
) -> Any:
    kind = "Tanh" if node.target is aten.rnn_tanh_cell.default else "Relu"
    return e.op(kind, e.op("Add", _gates(e, x, w, b), _gates(e, state, r, c)))
