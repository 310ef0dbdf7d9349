"""LSTMs whose weights are int8 codes, on ONNX Runtime's integer kernel.

`DynamicQuantizeLSTM` rounds the input of a layer, and at every step its hidden state, to uint8
codes between the extremes of that tensor, and multiplies on integers. That is about a percent of a
layer's output, and one value between two codes moves all later steps, so a sharp comparison of
whole models is not possible. As for products of weights in blocks (`rounded.py`) the model is
checked with float LSTMs first. Then each LSTM becomes the integer kernel, and is checked by itself,
on the inputs that it really read, against the arithmetic above in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from graphwright.backends.onnxruntime.aten.recurrent import CODES_KEY
from graphwright.backends.onnxruntime.attempt import Attempt
from graphwright.backends.onnxruntime.check import Case, Differs
from graphwright.backends.onnxruntime.integer import codes_name, quantized_layers
from graphwright.backends.onnxruntime.runtime import (
    SessionSettings,
    feeds_for,
    open_session,
)
from graphwright.ir.program import Program

NEAR = 0.1
"""Largest distance from the emulated result, as a share of what the rounding does to it: a value
between two codes may go either way."""

EXACT = 1e-5
"""Relative distance that is always allowed: float32."""


@dataclass(frozen=True)
class Rounded:
    """One LSTM on the integer kernel.

    Attributes:
        node: of the model.
        codes: int8 of the input and of the hidden weights (directions, 4 * hidden, width).
        scales: of their rows, (directions, 4 * hidden).
        stored: names of the codes in the program's state.
    """

    node: ir.Node
    codes: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor]
    stored: tuple[str, ...]

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The weights that the codes stand for, in float64."""
        first, second = (
            c.double() * s.double()[..., None] for c, s in zip(self.codes, self.scales, strict=True)
        )
        return first, second


def to_integers(
    program: Program,
    settings: SessionSettings,
    model: ir.Model,
    made: Attempt,
    cases: Sequence[Case],
) -> ir.Model | None:
    """A copy of the model with its coded LSTMs on integers; None where it has none, or they differ.

    `made` is told what became of them.
    """
    if not any(CODES_KEY in v.metadata_props for v in model.graph.initializers.values()):
        return None
    if settings.providers()[0] != "CPUExecutionProvider":
        made.lstms = {"integer": 0, "why": "only the CPU provider has an integer kernel"}
        return None
    copied = ir.from_proto(ir.to_proto(model))
    rounded = on_integers(copied)
    if not rounded:
        return None
    try:
        errors = [check_rounded(program, copied, rounded, settings, case.inputs)
                  for case in cases if not case.drawn]  # fmt: skip
    except Differs as error:
        made.lstms = {"integer": 0, "why": str(error)}
        return None
    made.lstms = {"integer": len(rounded), "largest_error": max(errors)}
    stored = {name for each in rounded for name in each.stored}
    names = {layer.name for layer in quantized_layers(program) if codes_name(layer) in stored}
    left = {n: kernel for n, kernel in made.integer["float"].items() if n not in names}
    made.integer = {**made.integer, "integer": made.integer["quantized"] - len(left), "float": left}
    return copied


def on_integers(model: ir.Model) -> list[Rounded]:
    """Makes the integer kernel of every LSTM of the graph whose two weights are int8 codes."""
    found = []
    for node in list(model.graph):
        if node.op_type != "LSTM" or node.domain or len(node.inputs) < 3:
            continue
        if node.inputs[4] is not None or set(node.attributes) - {"direction", "hidden_size"}:
            continue
        parts = [_codes(value) for value in node.inputs[1:3]]
        if None not in parts:
            found.append(_replace(model, node, [p for p in parts if p is not None]))
    if found:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        _drop_unused(model)
    return found


def _codes(value: ir.Value | None) -> tuple[Tensor, Tensor, list[str]] | None:
    """Codes and scales of all directions behind a weight, and the names of the codes."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    directions = list(node.inputs) if node.op_type == "Concat" else [value]
    codes, scales, names = [], [], []
    for direction in directions:
        inserted = direction.producer() if direction is not None else None
        rebuilt = inserted.inputs[0].producer() if inserted is not None else None  # type: ignore[union-attr]
        if rebuilt is None or rebuilt.op_type != "DequantizeLinear":
            return None
        stored, scale = rebuilt.inputs[:2]
        if stored is None or scale is None or CODES_KEY not in stored.metadata_props:
            return None
        codes.append(_tensor(stored))
        scales.append(_tensor(scale))
        names.append(stored.metadata_props[CODES_KEY])
    return torch.stack(codes), torch.stack(scales), names


def _tensor(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    return torch.tensor(value.const_value.numpy())


def _replace(
    model: ir.Model, node: ir.Node, parts: list[tuple[Tensor, Tensor, list[str]]]
) -> Rounded:
    stored: list[ir.Value] = []
    tensors = [codes.transpose(1, 2).contiguous() for codes, _, _ in parts]
    for _, scale, _ in parts:
        tensors += [scale, torch.zeros(scale.shape, dtype=torch.int8)]
    kinds = ("input", "hidden", "input_scale", "input_zero", "hidden_scale", "hidden_zero")
    for kind, tensor in zip(kinds, tensors, strict=True):
        name = f"{node.outputs[0].name}.{kind}"
        data = ir.tensor(tensor.numpy(), name=name)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(data.dtype))
        value.const_value = data
        model.graph.register_initializer(value)
        stored.append(value)
    inputs = list(node.inputs) + [None] * (8 - len(node.inputs))
    new = ir.Node(
        "com.microsoft", "DynamicQuantizeLSTM",
        [inputs[0], *stored[:2], *inputs[3:8], *stored[2:]], node.attributes.values(),
        outputs=[ir.Value(name=o.name, shape=o.shape, type=o.type) for o in node.outputs],
        name=node.name, version=1,
    )  # fmt: skip
    ir.convenience.replace_nodes_and_values(
        model.graph, node, [node], [new], list(node.outputs), list(new.outputs)
    )
    (first, a, names), (second, b, others) = parts
    return Rounded(new, (first, second), (a, b), (*names, *others))


def _drop_unused(model: ir.Model) -> None:
    """Takes out what the float LSTMs alone read."""
    for node in reversed(list(model.graph)):
        if not any(o.uses() or o.is_graph_output() for o in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


# ---- the check


def check_rounded(
    program: Program,
    model: ir.Model,
    rounded: Sequence[Rounded],
    settings: SessionSettings,
    inputs: tuple[Tensor, ...],
) -> float:
    """Largest distance of an LSTM from the emulated one, as a share of what its rounding does.

    Raises:
        Differs: a kernel gives something else than its codes and rounded inputs.
    """
    shown = _with_taps(model, rounded)
    # Several threads round their parts of a batch between the extremes of each part.
    session = open_session(shown, replace(settings, threads=1))
    feeds = feeds_for(session, program.signature, inputs)
    names = [item.name for item in session.get_outputs()]
    arrays = session.run(names, feeds)
    values: dict[str, Any] = {**feeds, **dict(zip(names, arrays, strict=True))}
    for name, value in model.graph.initializers.items():
        if name not in values and value.const_value is not None:
            values[name] = value.const_value.numpy()
    return max(_distance(each, values) for each in rounded)


def _with_taps(model: ir.Model, rounded: Sequence[Rounded]) -> bytes:
    """The model with what its integer LSTMs read and give as further outputs."""
    proto = ir.to_proto(model)
    there = {o.name for o in proto.graph.output} | {i.name for i in proto.graph.input}
    there |= {i.name for i in proto.graph.initializer}
    for each in rounded:
        for value in (each.node.inputs[0], *each.node.inputs[5:7], each.node.outputs[0]):
            if value is not None and value.name not in there:
                there.add(str(value.name))
                shown = proto.graph.output.add()
                shown.name = str(value.name)
                shown.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    content: bytes = proto.SerializeToString()
    return content


def _distance(each: Rounded, values: dict[str, Any]) -> float:
    def given(value: ir.Value | None) -> Tensor | None:
        return None if value is None else torch.tensor(values[str(value.name)])

    node = each.node
    x, y = given(node.inputs[0]), given(node.outputs[0])
    assert x is not None
    assert y is not None
    rest = (given(node.inputs[3]), given(node.inputs[5]), given(node.inputs[6]))
    exact = lstm(x, each.weights, *rest, rounds=False)
    like = lstm(x, each.weights, *rest, rounds=True)
    effect, size = float((like - exact).norm()), float(exact.norm())
    distance = float((y.double() - like).norm())
    if not distance <= NEAR * effect + EXACT * size:
        share = distance / effect if effect else float("inf")
        raise Differs(
            f"the integer LSTM {node.name!r} is {share:.2g} times as far from its codes' "
            f"arithmetic as rounding takes it, allowed {NEAR}"
        )
    return distance / effect if effect else 0.0


def lstm(
    x: Tensor, weights: tuple[Tensor, Tensor], bias: Tensor | None, hidden: Tensor | None,
    cell: Tensor | None, *, rounds: bool,
) -> Tensor:  # fmt: skip
    """One LSTM layer in float64: (length, directions, batch, hidden).

    Args:
        x: (length, batch, width).
        weights: (directions, 4 * hidden, width) and the same for the hidden state; gates in
            ONNX's order: input, output, forget, cell.
        bias: (directions, 8 * hidden), or None.
        hidden, cell: (directions, batch, hidden), zeros when None.
        rounds: whether inputs and hidden states are rounded as the integer kernel does.
    """
    directions, gates = weights[0].shape[:2]
    size, batch = gates // 4, x.shape[1]
    outputs = []
    for at in range(directions):
        given = x.flip(0) if at else x
        read = _to_codes(given) if rounds else given.double()
        summed = read @ weights[0][at].t()
        if bias is not None:
            summed = summed + (bias[at, :gates] + bias[at, gates:]).double()
        h = torch.zeros(batch, size).double() if hidden is None else hidden[at].double()
        c = torch.zeros(batch, size).double() if cell is None else cell[at].double()
        steps = []
        for step in summed:
            seen = _to_codes(h.float()) if rounds else h
            i, o, f, g = (step + seen @ weights[1][at].t()).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        whole = torch.stack(steps)
        outputs.append(whole.flip(0) if at else whole)
    return torch.stack(outputs, 1)


def _to_codes(x: Tensor) -> Tensor:
    """x rounded to uint8 codes between its extremes and zero; in float64."""
    rounded: Tensor = torch.ops.graphwright.fake_quantize_dynamic(x)
    return rounded.double()
