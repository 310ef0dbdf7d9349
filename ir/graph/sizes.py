"""Sizes of values, as numbers or expressions over the names of dimensions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphwright.ir.program import Program

Size = Any
"""A Python int, or a sympy expression over the program's dimension names."""


def shape_of(value: Any) -> tuple[Size, ...]:
    """The sizes of a recorded value; empty for anything that is no tensor."""
    if not isinstance(value, Tensor):
        return ()
    return tuple(expression_of(size) for size in value.shape)


def expression_of(size: Any) -> Size:
    """A size as a sympy expression over torch's own symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


def expression(size: Any) -> Size:
    """A size as something that can be compared: an int, or an expression over torch's symbols."""
    if isinstance(size, torch.SymInt):
        found = size.node.expr
        return int(found) if found.is_number else found
    return int(size)


def sizes_of(node: fx.Node) -> list[Size]:
    """Sizes of a tensor node, as ints and sympy expressions."""
    return [expression(size) for size in node.meta["val"].shape]


def dimension_names(program: Program) -> dict[sympy.Symbol, sympy.Symbol]:
    """Torch's own size symbols to the names in the signature."""
    names = {}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for spec, node in zip(program.signature.inputs, placeholders, strict=True):
        for dim, size in zip(spec.shape, shape_of(node.meta["val"]), strict=True):
            if isinstance(dim, str) and isinstance(size, sympy.Symbol):
                names[size] = named_symbol(dim)
    return names


@lru_cache(maxsize=256)
def named_symbol(name: str) -> sympy.Symbol:
    """The sympy symbol of a dimension name."""
    return sympy.Symbol(name, integer=True, positive=True)
