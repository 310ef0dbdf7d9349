"""Recorded values of a program's nodes, made anew from what the program itself says.

Torch's record of free sizes (its shape environment) remembers how a program was traced and what
was asked of it since. A program that is read from a file has none of that memory. So that nothing
depends on it, an arranged program gets a new one: which sizes are free, their ranges, and the
sizes of the examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, disable_fake_tensor_cache
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.symbol import SymT, prefix_str, symbol_is_type

from graphwright.ir.graph.nodes import fake_mode_of

if TYPE_CHECKING:
    from graphwright.ir.program import Program

LEAST = 2
"""Size of which torch takes every free dimension to be at least, when it traces: it tells 0 and 1
from the rest. Backends check the sizes below by running them."""

NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
COUNTERS = {
    SymT.UNBACKED_INT: "unbacked_symint_counter",
    SymT.UNBACKED_FLOAT: "unbacked_symfloat_counter",
}
"""Kinds of numbers that come out of data, with torch's counters for their names."""


class Recorder:
    """Makes values in a fake mode of its own.

    Args:
        program: its signature gives the ranges of free sizes, its examples their sizes.
    """

    def __init__(self, program: Program) -> None:
        self.old = fake_mode_of(program.graph).shape_env
        self.env = ShapeEnv(assume_static_by_default=True)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self.env)
        self._numbers: dict[tuple[type, Any], Any] = {}
        self._known: set[Any] = set()
        placeholders = program.graph.find_nodes(op="placeholder")
        signature = zip(placeholders, program.signature.inputs, program.examples, strict=True)
        for node, spec, example in signature:
            for size, dim, real in zip(
                node.meta["val"].shape, spec.shape, example.shape, strict=True
            ):
                bounds = program.signature.dims.get(str(dim))
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    least = LEAST if bounds is None else max(LEAST, bounds.min)
                    most = int_oo if bounds is None or bounds.max is None else bounds.max
                    self._add(size.node.expr, least, most, real)

    def __call__(self, value: Any) -> Any:
        """A recorded value anew; several results come as a tuple."""
        if isinstance(value, torch.Tensor):
            sizes, strides = map(self._number, value.shape), map(self._number, value.stride())
            self._take_as_sizes(value.shape)
            with self.mode, disable_fake_tensor_cache(self.mode):
                return torch.empty_strided(
                    tuple(sizes), tuple(strides), dtype=value.dtype, device=value.device
                )
        if isinstance(value, list | tuple):
            return tuple(map(self, value))
        return self._number(value)

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of a stored tensor."""
        with torch.no_grad():
            return self.mode.from_tensor(tensor.detach(), static_shapes=True)

    def _number(self, value: Any) -> Any:
        """A number of this environment for one of the old."""
        if not isinstance(value, NUMBERS):
            return value
        expression = value.node.expr
        key = (type(value), expression)
        if key not in self._numbers:
            for symbol in sorted(expression.free_symbols, key=str):
                self._add_of_data(symbol)
            self._numbers[key] = self._made(value, expression)
        return self._numbers[key]

    def _take_as_sizes(self, sizes: torch.Size) -> None:
        """Numbers out of data that are sizes: torch assumes of those that they are neither 0 nor 1
        where it matters only for the layout."""
        for size in sizes:
            if isinstance(size, torch.SymInt) and _is_out_of_data(size.node.expr):
                self.env.size_like.add(size.node.expr)

    def _made(self, value: Any, expression: Any) -> Any:
        if expression.is_number or expression in (True, False):
            kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
            return kind(expression)
        if isinstance(value, torch.SymInt):
            return self.env.create_symintnode(expression, hint=None)
        if isinstance(value, torch.SymFloat):
            return self.env.create_symfloatnode(expression, hint=None)
        return self.env.create_symboolnode(expression)

    def _add(self, symbol: Any, least: Any, most: Any, real: int) -> None:
        """A free size of the inputs."""
        if symbol in self._known:
            return
        self._known.add(symbol)
        self.env.constrain_symbol_range(symbol, compiler_min=least, compiler_max=most)
        # called `add_var_to_val` before torch 2.12
        add = getattr(self.env, "add_backed_var_to_val", None) or self.env.add_var_to_val
        add(symbol, real)

    def _add_of_data(self, symbol: Any) -> None:
        """A number that only the data gives; new ones are counted on from it."""
        if symbol in self._known:
            return
        self._known.add(symbol)
        known = getattr(self.old, "var_to_range", {}).get(symbol)
        if known is not None:
            self.env.constrain_symbol_range(
                symbol, compiler_min=known.lower, compiler_max=known.upper
            )
        for kind, counter in COUNTERS.items():
            if symbol_is_type(symbol, kind):
                number = int(str(symbol).removeprefix(prefix_str[kind])) + 1
                setattr(self.env, counter, max(number, getattr(self.env, counter)))


def _is_out_of_data(expression: Any) -> bool:
    return bool(expression.is_Symbol and symbol_is_type(expression, SymT.UNBACKED_INT))
