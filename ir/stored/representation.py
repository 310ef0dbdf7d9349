"""A compressed weight as something to optimize: numbers with gradients, and codes to choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import graphwright.ir.ops  # noqa: F401  registers the ops that rebuild weights
from graphwright.ir.program import Program
from graphwright.ir.stored.encoders import (
    BlockCodes,
    Encoder,
    IntegerCodes,
    TableCodes,
    VectorCodes,
)

aten = torch.ops.aten
ours = torch.ops.graphwright

CODED = (
    ours.dequantize_blocks.default, ours.dequantize.default, ours.dequantize_table.default,
    ours.dequantize_codebook.default,
)  # fmt: skip

MOVES = (
    aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.index_select.default,
    aten.reshape.default, aten.transpose.int, aten.to.dtype, ours.add_low_rank.default,
)  # fmt: skip
"""Calls between codes and a weight: every entry of the result depends on at most one entry of
each operand that holds codes, and linearly."""


@dataclass(frozen=True)
class CodePlace:
    """A node whose value codes choose, and the encoder of these."""

    node: fx.Node
    encoder: Encoder


class Representation:
    """The constant subgraph that rebuilds one weight.

    Attributes:
        node: gives the weight, in the shape that the layer reads.
        continuous: float tensors that it is made of, by name, in float32: scales, codebooks.
        stored: dtype of each in the program; the weight is made of values rounded to it.
        codes: integer tensors by name.
        places: where codes are chosen.
    """

    def __init__(self, program: Program, node: fx.Node) -> None:
        self.node = node
        self.order = _subgraph(node)
        self.continuous: dict[str, Tensor] = {}
        self.codes: dict[str, Tensor] = {}
        self.stored: dict[str, torch.dtype] = {}
        for part in self.order:
            if part.op != "get_attr":
                continue
            name, tensor = str(part.target), program.state[str(part.target)].detach()
            if tensor.is_floating_point():
                self.stored[name] = tensor.dtype
                self.continuous[name] = tensor.float().clone()
            else:
                self.codes[name] = tensor.clone()
        self.places = self._places()

    def value(self, continuous: Mapping[str, Tensor] | None = None) -> Tensor:
        """The weight, differentiable in the continuous part that is given."""
        value: Tensor = self._values(self._tensors(continuous))[self.node]
        return value

    def gradients(self, upstream: Tensor) -> dict[str, Tensor]:
        """Gradients of the continuous part, from that of the weight."""
        leaves = {n: t.detach().requires_grad_() for n, t in self.continuous.items()}
        with torch.enable_grad():
            value = self.value(leaves)
            found = torch.autograd.grad(
                value, list(leaves.values()), upstream.to(value.dtype), allow_unused=True
            )
        return {name: torch.zeros_like(self.continuous[name]) if g is None else g
                for name, g in zip(leaves, found, strict=True)}  # fmt: skip

    def local(self, delta: Tensor) -> list[tuple[CodePlace, Tensor, Tensor, Tensor]]:
        """Every place with its value now, the change that `delta` of the weight asks of it, and the
        factor by which the weight follows it; all in the shape of the place's value.

        What stands between is linear, entry by entry: the factor is the gradient of the sum.
        """
        tensors = self._tensors(None)
        values = self._values(tensors)
        found = []
        for place in self.places:
            here = values[place.node].detach().requires_grad_()
            with torch.enable_grad():
                weight = self._values(tensors, {place.node: here})[self.node]
                factor, pulled = (
                    torch.autograd.grad(weight, here, up.to(weight.dtype), retain_graph=True)[0]
                    for up in (torch.ones_like(weight), delta)
                )
            square = factor.square()
            wanted = torch.where(square > 0, pulled / square.clamp(min=1e-30), 0.0)
            found.append((place, here.detach(), wanted, factor))
        return found

    # ---- evaluation

    def _tensors(self, continuous: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        leaves = self.continuous if continuous is None else continuous
        rounded = {name: t.to(self.stored[name]) for name, t in leaves.items()}
        return {**self.codes, **rounded}

    def _values(
        self, tensors: Mapping[str, Tensor], given: Mapping[fx.Node, Tensor] | None = None
    ) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = dict(given or {})
        for node in self.order:
            if node in values:
                continue
            if node.op == "get_attr":
                values[node] = tensors[str(node.target)]
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values

    # ---- where codes act

    def _places(self) -> list[CodePlace]:
        found: list[CodePlace] = []

        def visit(node: fx.Node) -> None:
            pair = self._added_vectors(node)
            if pair is not None:
                found.append(CodePlace(node, pair))
            elif node.target in CODED:
                encoder = self._encoder(node)
                if encoder is not None:
                    found.append(CodePlace(node, encoder))
            elif node.target in MOVES:
                for operand in node.all_input_nodes:
                    visit(operand)

        visit(self.node)
        return found

    def _added_vectors(self, node: fx.Node) -> VectorCodes | None:
        """Two codebooks' vectors of equal length, added."""
        if node.target is not aten.add.Tensor:
            return None
        parts = [a for a in node.args if isinstance(a, fx.Node)]
        if len(parts) != 2 or any(p.target is not CODED[3] for p in parts):
            return None
        widths = {int(p.args[1].meta["val"].shape[2]) for p in parts}  # type: ignore[union-attr]
        return self._vectors(parts) if len(widths) == 1 else None

    def _vectors(self, nodes: list[fx.Node]) -> VectorCodes:
        calls: list[Any] = [node.args for node in nodes]
        names = [(str(args[0].target), self._reader(args[1])) for args in calls]
        _, book, _, rows, columns = calls[0]
        width = int(book.meta["val"].shape[2])
        return VectorCodes(names, [args[2] for args in calls], rows, columns, width)

    def _encoder(self, node: fx.Node) -> Encoder | None:
        args: Any = node.args
        name, scale = str(args[0].target), self._reader(args[1])
        if node.target is CODED[0]:
            zero = None if args[2] is None else self._reader(args[2])
            return BlockCodes(name, scale, zero, *args[3:])
        if node.target is CODED[1]:
            is_plain = args[2] is None and self.codes[name].dtype == torch.int8
            return IntegerCodes(name, scale, args[3]) if is_plain else None
        if node.target is CODED[2]:
            return TableCodes(name, scale, *args[2:4])
        return self._vectors([node])

    def _reader(self, node: fx.Node) -> Callable[[], Tensor]:
        """The value of a node of the subgraph, as it is when called."""
        return lambda: self._values(self._tensors(None))[node]


def _subgraph(node: fx.Node) -> list[fx.Node]:
    """The node and all it depends on, operands first."""
    found: dict[fx.Node, None] = {}

    def visit(part: fx.Node) -> None:
        if part in found:
            return
        for operand in part.all_input_nodes:
            visit(operand)
        found[part] = None

    visit(node)
    return list(found)
