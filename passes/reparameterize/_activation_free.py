"""Gates in the place of activations and of channel attention, fitted to what they replace."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments, op_name
from graphwright.ir.graph.sizes import shape_of
from graphwright.ir.layers.kinds import CONVOLUTIONS
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.tune.features import reading

aten = torch.ops.aten

ACTIVATIONS = frozenset({
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish",
    "hardswish", "softplus", "sigmoid", "hardsigmoid", "tanh",
})  # fmt: skip
"""Calls that a gate takes the place of."""

SIGMOIDS = frozenset({"sigmoid", "hardsigmoid"})


@dataclass(frozen=True)
class Gated:
    """An activation right behind a layer: act(z), z = W x + b.

    Attributes:
        layer: the layer. node: name of the activation. axis: of the channels in its result.
    """

    layer: Layer
    node: str
    axis: int


@dataclass(frozen=True)
class Attention:
    """Channel attention: x * sigmoid(f(mean of x over its places)).

    Attributes:
        node: name of the product. x: name of what is scaled. gate: name of the sigmoid.
    """

    node: str
    x: str
    gate: str


@dataclass
class Fit:
    """Sums for a and b, by channel, that make z (a + b z) least different from act(z)."""

    z2: Tensor
    z3: Tensor
    z4: Tensor
    t1: Tensor
    t2: Tensor

    def solved(self) -> tuple[Tensor, Tensor]:
        """a and b; a channel that is zero throughout has the gate 1."""
        det = self.z2 * self.z4 - self.z3**2
        fine = det > 1e-12 * self.z2 * self.z4
        safe = torch.where(fine, det, 1.0)
        a = torch.where(fine, (self.t1 * self.z4 - self.t2 * self.z3) / safe, 1.0)
        b = torch.where(fine, (self.t2 * self.z2 - self.t1 * self.z3) / safe, 0.0)
        return a, b


def find_gated(program: Program, chosen: Iterable[Layer]) -> tuple[list[Gated], dict[str, str]]:
    """Activations right behind layers, and the reason of each layer that has none to replace."""
    found, left = [], {}
    for layer in chosen:
        users = list(layer.node.users)
        behind = users[0] if len(users) == 1 else None
        if layer.kind != "linear" and layer.kind not in CONVOLUTIONS:
            left[layer.name] = f"{layer.kind} has no gate of its own"
        elif behind is not None and op_name(behind) == "batch_norm":
            left[layer.name] = "a batch norm is behind it: put cleanup.fold_batch_norm in front"
        elif behind is None or op_name(behind) not in ACTIVATIONS:
            left[layer.name] = "no activation is right behind it"
        elif not layer.weight or len(program.aliases.get(layer.weight, ())) > 1:
            left[layer.name] = "its weight is shared, or in codes"
        elif len(uses(program, layer.weight)) > 1:
            left[layer.name] = "its weight is used several times"
        else:
            rank = len(shape_of(layer.node.meta["val"]))
            found.append(Gated(layer, behind.name, rank - 1 if layer.kind == "linear" else 1))
    return found, left


def find_attention(program: Program) -> list[Attention]:
    """Products of a map of features with a sigmoid of one value per channel of itself."""
    found = []
    for node in program.graph.nodes:
        if op_name(node) != "mul" or len(node.all_input_nodes) != 2:
            continue
        for x, gate in (node.all_input_nodes, node.all_input_nodes[::-1]):
            if op_name(gate) not in SIGMOIDS or len(gate.users) > 1:
                continue
            whole, one = shape_of(x.meta["val"]), shape_of(gate.meta["val"])
            pooled = len(whole) == len(one) > 2 and whole[:2] == one[:2]
            if pooled and all(size == 1 for size in one[2:]) and _leads(x, gate):
                found.append(Attention(node.name, x.name, gate.name))
    return found


def uses(program: Program, name: str) -> list[fx.Node]:
    """Calls that read a stored tensor."""
    nodes = program.graph.find_nodes(op="get_attr", target=name)
    return [user for node in nodes for user in node.users]


def fitted(
    program: Program, gated: list[Gated], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Fit]:
    """Sums for the gates, by activation.

    Args:
        program: as it is before.
        gated: what is to be replaced.
        batches: inputs by name.
    """
    read = reading(program, [n for g in gated for n in (g.layer.node.name, g.node)])
    inputs = [spec.name for spec in program.signature.inputs]
    sums: dict[str, list[Tensor]] = {}
    for batch in batches:
        with torch.no_grad():
            values = list(read(*(batch[name] for name in inputs)))
        for number, one in enumerate(gated):
            z, t = (v.double().movedim(one.axis, 0).flatten(1)
                    for v in values[2 * number : 2 * number + 2])  # fmt: skip
            new = [term.sum(1) for term in (z**2, z**3, z**4, t * z, t * z**2)]
            old = sums.get(one.node, [torch.zeros_like(term) for term in new])
            sums[one.node] = [a + b for a, b in zip(old, new, strict=True)]
    return {name: Fit(*found) for name, found in sums.items()}


def mean_gates(
    program: Program, attention: list[Attention], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The mean of every sigmoid per channel, by the product it is in."""
    read = reading(program, [one.gate for one in attention])
    inputs = [spec.name for spec in program.signature.inputs]
    found: dict[str, list[Tensor]] = {one.node: [] for one in attention}
    for batch in batches if attention else ():
        with torch.no_grad():
            values = read(*(batch[name] for name in inputs))
        for one, value in zip(attention, values, strict=False):
            found[one.node].append(value.double().flatten(2).mean((0, 2)))
    return {node: torch.stack(rows).mean(0) for node, rows in found.items()}


def put_gate(editor: Editor, one: Gated, a: Tensor, b: Tensor) -> str:
    """Replaces act(z) by z * g, g = a + b z at the start; returns the name of the product.

    Without groups the layer becomes twice as wide, and its halves are multiplied (SimpleGate).
    """
    nodes = {node.name: node for node in editor.graph.nodes}
    layer, act = nodes[one.layer.node.name], nodes[one.node]
    weight = editor.state[one.layer.weight].detach()
    args = full_arguments(layer)[0]
    kept = args[2] if isinstance(args[2], fx.Node) else None
    bias = torch.zeros(len(weight), dtype=weight.dtype)
    if kept is not None:
        bias = editor.state[str(kept.target)].detach()
    shape = [-1] + [1] * (weight.dim() - 1)
    gate_weight = (b.view(shape) * weight.double()).to(weight.dtype)
    gate_bias = (a + b * bias.double()).to(weight.dtype)
    groups = int(args[6]) if layer.target is not aten.linear.default else 1
    name = one.layer.name

    def stored(part: str, value: Tensor) -> fx.Node:
        return editor.get(editor.add_state(f"{name}.{part}", nn.Parameter(value)))

    if groups > 1:
        new_args = [args[0], stored("gate_weight", gate_weight), stored("gate_bias", gate_bias)]
        gate = editor.call(layer.target, *new_args, *args[3:], before=act, like=layer)
        product = editor.call(aten.mul.Tensor, layer, gate, before=act, like=act)
    else:
        editor.set_state(one.layer.weight, nn.Parameter(torch.cat([weight, gate_weight])))
        whole = torch.cat([bias, gate_bias])
        if kept is None:
            args[2] = stored("bias", whole)
        else:
            editor.set_state(str(kept.target), nn.Parameter(whole))
        wide = editor.call(layer.target, *args, before=act, like=layer)
        halves = editor.call(aten.chunk.default, wide, 2, one.axis, before=act, like=act)
        first, second = (editor.call(operator.getitem, halves, i, before=act, like=act)
                         for i in range(2))  # fmt: skip
        product = editor.call(aten.mul.Tensor, first, second, before=act, like=act)
    editor.replace(act, product)
    return product.name


def put_attention(editor: Editor, one: Attention, mean: Tensor) -> str:
    """Replaces the attention by x * (R mean(x) + r), R = 0 and r the mean gate at the start."""
    nodes = {node.name: node for node in editor.graph.nodes}
    old, x, gate = nodes[one.node], nodes[one.x], nodes[one.gate]
    channels, spatial = len(mean), len(shape_of(x.meta["val"])) - 2
    dtype = x.meta["val"].dtype
    stem = f"{_scope(gate) or one.node}.attention"

    def stored(part: str, value: Tensor) -> fx.Node:
        return editor.get(editor.add_state(f"{stem}.{part}", nn.Parameter(value)))

    def call(target: Any, *args: Any) -> fx.Node:
        return editor.call(target, *args, before=old, like=old)

    pooled = call(aten.mean.dim, x, list(range(2, 2 + spatial)))
    weight = stored("weight", torch.zeros(channels, channels, dtype=dtype))
    shares = call(aten.linear.default, pooled, weight, stored("bias", mean.to(dtype)))
    for _ in range(spatial):
        shares = call(aten.unsqueeze.default, shares, -1)
    product = call(aten.mul.Tensor, x, shares)
    editor.replace(old, product)
    return product.name


def _scope(node: fx.Node) -> str:
    scopes = list(node.meta.get("nn_module_stack", {}).values())
    return str(scopes[-1][0]).removeprefix("L['self'].") if scopes else ""


def _leads(x: fx.Node, gate: fx.Node) -> bool:
    stack, seen = [gate], set()
    while stack:
        node = stack.pop()
        if node is x:
            return True
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False
