"""Where the values of a tensor stand behind calls that only move them, found by moving numbers.

Views, transposes, splits and repeats come in any order and spelling. So the path is run on a tensor
of places, at two assignments of the free sizes, and what comes out says where everything went.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphwright.ir.graph.nodes import VIEWS, op_name
from graphwright.ir.graph.sizes import expression_of
from graphwright.ir.program import Program

MOVES = VIEWS | {"clone", "repeat", "repeat_interleave", "stack", "cat"}
"""Operators that move values and change none."""

SCALES = {"mul": 1, "div": -1}
"""Operators that, with a number, scale: the exponent of that number."""

Sizes = Mapping[Any, int]
"""Numbers for torch's size symbols."""


class Unlike(Exception):
    """A tensor is not laid out as is needed; the message says how."""


def assignments(program: Program) -> Iterator[Sizes]:
    """The sizes of the examples, and other ones that the signature allows."""
    names: dict[Any, str] = {}
    here: dict[str, int] = {}
    other: dict[str, int] = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for spec, node, example in zip(
        program.signature.inputs, placeholders, program.examples, strict=True
    ):
        for dim, size, value in zip(spec.shape, node.meta["val"].shape, example.shape, strict=True):
            symbol = expression_of(size)
            if isinstance(dim, str) and isinstance(symbol, sympy.Symbol):
                names[symbol] = dim
                bounds = program.signature.dims.get(dim)
                most = None if bounds is None else bounds.max
                here[dim] = int(value)
                grown = int(value) + 1 + len(here)
                other.setdefault(dim, grown if most is None else min(grown, most))
    other = program.signature.completed(other)
    yield {symbol: here[dim] for symbol, dim in names.items()}
    if other != here:
        yield {symbol: other[dim] for symbol, dim in names.items()}


def number(size: Any, sizes: Sizes) -> int:
    """A size as a number.

    Raises:
        Unlike: it depends on what is not in `sizes`.
    """
    if isinstance(size, int):
        return size
    found = expression_of(size).subs(dict(sizes))
    if not found.is_Integer:
        raise Unlike(f"its size {found} is not known")
    return int(found)


def shape_at(node: fx.Node, sizes: Sizes) -> list[int]:
    """The shape of a node's value."""
    return [number(size, sizes) for size in node.meta["val"].shape]


@dataclass(frozen=True)
class Path:
    """Calls that move and scale one tensor.

    Attributes:
        source: the node in front of them.
        calls: in order.
        factor: product of the numbers that they scale by.
    """

    source: fx.Node
    calls: tuple[fx.Node, ...]
    factor: float


def path_to(node: fx.Node) -> Path:
    """The longest path of moves that ends at a node."""
    calls: list[fx.Node] = []
    factor = 1.0
    while True:
        operand, scale = _moved(node)
        if operand is None:
            return Path(node, tuple(reversed(calls)), factor)
        calls.append(node)
        factor *= scale
        node = operand


def path_from(node: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node]:
    """The calls that alone read a node one after the other and move it, and what reads them.

    Raises:
        Unlike: several nodes read one of them, or none.
    """
    calls: list[fx.Node] = []
    while True:
        readers = list(node.users)
        if len(readers) != 1:
            raise Unlike(f"{len(readers)} nodes read {node.name}")
        operand, scale = _moved(readers[0])
        if operand is not node or scale != 1:
            return tuple(calls), readers[0]
        node = readers[0]
        calls.append(node)


def _moved(node: fx.Node) -> tuple[fx.Node | None, float]:
    """The tensor that a call moves, and what it scales it by; None for any other node."""
    if node.op != "call_function" or not node.args:
        return None, 1.0
    name, operand = op_name(node), node.args[0]
    if not isinstance(operand, fx.Node):
        return None, 1.0
    if name in SCALES and len(node.args) > 1 and isinstance(node.args[1], int | float):
        return operand, float(node.args[1]) ** SCALES[name]
    if name not in MOVES or _dtype(node) != _dtype(operand):
        return None, 1.0
    return operand, 1.0


def _dtype(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return getattr(value[0] if isinstance(value, list | tuple) else value, "dtype", None)


def run(target: fx.Node, bound: Mapping[fx.Node, Tensor], sizes: Sizes) -> Any:
    """The value of a node when those in `bound` have these; between them are moves and `neg`.

    Raises:
        Unlike: something else is between them.
    """
    known: dict[fx.Node, Any] = dict(bound)

    def value(node: fx.Node) -> Any:
        if node not in known:
            if not isinstance(node.meta.get("val"), Tensor | list | tuple):
                known[node] = number(node.meta["val"], sizes)
                return known[node]
            operand, _ = _moved(node)
            if op_name(node) in SCALES and operand is not None:
                known[node] = value(operand)  # scaling moves nothing
            elif op_name(node) in MOVES or op_name(node) == "neg":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                try:
                    known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                except RuntimeError as error:  # sizes that do not go together
                    raise Unlike(f"{op_name(node)} cannot be followed: {error}") from None
            else:
                raise Unlike(f"{op_name(node) or node.op} is in the way")
        return known[node]

    return value(target)


def places(shape: list[int]) -> Tensor:
    """A tensor of that shape that holds 1, 2, 3, ...: float64, exact below 2^53."""
    total = 1
    for size in shape:
        total *= size
    return torch.arange(1, total + 1, dtype=torch.float64).reshape(shape)


def head_rows(moved: Tensor, width: int) -> tuple[Tensor, bool]:
    """(heads, d) int64: the output of a projection that each channel of each head is; and whether
    the projection has the length in front of the batch.

    Args:
        moved: (batch, heads, length, d): the places of the projection's (tokens, width).
        width: of the projection.

    Raises:
        Unlike: a token's values are not its own, or tokens differ in their order.
    """
    batch, heads, length, d = moved.shape
    index = moved.long() - 1
    rows = (index % width)[0, :, 0]
    assert rows.shape == (heads, d)
    tokens = torch.arange(batch * length)
    orders = tokens.reshape(batch, length), tokens.reshape(length, batch).t()
    for place, order in enumerate(orders):
        if torch.equal(index, order[:, None, :, None] * width + rows[None, :, None]):
            return rows, bool(place)
    raise Unlike("its heads are no plain parts of a projection")
