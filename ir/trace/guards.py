"""Conditions on sizes under which a trace is the model's own function.

Where Python code turns a size into a number (`int(t * 0.5)`) or branches on one (`if t % 4`), the
trace holds the way that the example took. Torch notes the condition as a guard, and drops it from
the program unless it is a plain range. Here guards are kept, with the line of the model's code
they come from, so that they can be tried and turned into ranges (`narrowing`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from graphwright.ir.trace.dims import Dynamic, shape_environment, user_placeholders
from graphwright.ir.trace.errors import is_users

LAYOUT = frozenset(
    {
        "is_contiguous", "is_contiguous_for_memory_format", "is_contiguous_or_false",
        "check_contiguous_sizes_strides", "is_channels_last_contiguous_2d",
        "is_channels_last_contiguous_3d", "are_strides_like_channels_last",
        "are_strides_like_channels_last_or_false", "is_non_overlapping_and_dense",
        "is_non_overlapping_and_dense_or_false", "_reshape_view_helper",
        "_reshape_view_helper_core_alg", "_collapse_view_helper", "_split_dim_meta",
        "compute_elementwise_output_logical_to_physical_perm", "should_swap", "make_strides_like",
    }
)  # fmt: skip
"""Functions of torch that ask for sizes only to choose strides."""


@dataclass(frozen=True)
class Guard:
    """A condition on free dimensions that held when the model was traced.

    Attributes:
        dims: names of the dimensions it is about.
        text: the condition, in Python.
        place: "path:line" of the model's code, or the function of torch that asked.
        by_model: whether the model's own code asked, and not an operator.
        test: whether it holds at the given sizes; may raise ArithmeticError.
        layout: whether torch asked only to choose strides, which a graph does not hold.
        archived: whether it comes from an export archive, where nothing can be run against it.
    """

    dims: tuple[str, ...]
    text: str
    place: str
    by_model: bool
    test: Callable[[Mapping[str, int]], bool] = field(compare=False)
    layout: bool = False
    archived: bool = False

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it holds at these sizes; a condition that cannot be computed there does not."""
        try:
            return bool(self.test(sizes))
        except (ArithmeticError, ValueError):
            return False

    def __str__(self) -> str:
        return f"{self.text} ({self.place})" if self.place else self.text


def guards_of(exported: Any, inputs: Mapping[str, Tensor], dynamic: Dynamic) -> list[Guard]:
    """The guards of a trace that are about free dimensions, each condition once."""
    names = _dimension_symbols(exported, inputs, dynamic)
    env = shape_environment(exported)
    found: dict[str, Guard] = {}
    for guard in env.guards if env is not None else ():
        frame = _frame(guard.sloc)
        if not guard.expr.free_symbols or not guard.expr.free_symbols <= set(names):
            continue
        made = _guard(guard.expr, frame, names)
        known = found.get(made.text)
        if known is None or (known.layout, made.by_model) > (made.layout, known.by_model):
            found[made.text] = made
    return list(found.values())


def _frame(location: Any) -> Any:
    return getattr(location, "maybe_user_loc", None) or getattr(location, "framework_loc", None)


def _dimension_symbols(
    exported: Any, inputs: Mapping[str, Tensor], dynamic: Dynamic
) -> dict[sympy.Symbol, str]:
    """Torch's first symbol of every free size, before it found some equal to others."""
    names: dict[sympy.Symbol, str] = {}
    for node, name in zip(user_placeholders(exported), inputs, strict=True):
        for axis, dim in dynamic.get(name, {}).items():
            size = node.meta["val"].shape[axis]
            symbol = getattr(getattr(size, "node", None), "_expr", None)
            if isinstance(symbol, sympy.Symbol):
                names[symbol] = dim
    return names


def _guard(condition: Any, frame: Any, names: Mapping[sympy.Symbol, str]) -> Guard:
    from torch.utils._sympy.printers import PythonPrinter

    symbols = sorted(condition.free_symbols, key=str)
    code = compile(PythonPrinter().doprint(condition), "<guard>", "eval")
    scope = {"math": math, "torch": torch}

    def test(sizes: Mapping[str, int]) -> bool:
        # The text is torch's own print of a condition it made in this process.
        return bool(eval(code, scope, {str(s): sizes[names[s]] for s in symbols}))

    file, line = getattr(frame, "filename", ""), getattr(frame, "lineno", 0)
    by_model = bool(file) and is_users(file)
    place = f"{file}:{line}" if by_model else f"torch's {getattr(frame, 'name', 'own code')}"
    dims = tuple(dict.fromkeys(names[s] for s in symbols))
    named = condition.xreplace({s: sympy.Symbol(names[s]) for s in symbols})
    text = readable(PythonPrinter().doprint(named))
    layout = getattr(frame, "name", "") in LAYOUT
    return Guard(dims, text, place, by_model, test, layout=layout)


def readable(code: str) -> str:
    """A condition as one would write it: `int(0.5*t) == 8`."""
    code = re.sub(r"torch\.sym_float\(([^()]*)\)", r"\1", code.replace("math.trunc(", "int("))
    code = re.sub(r"(\d\.\d*?[1-9]|\d\.0)0{3,}\b", r"\1", code)
    while (shorter := re.sub(r"\(\(([^()]*)\)\)", r"(\1)", code)) != code:
        code = shorter
    return code
