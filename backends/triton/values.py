"""Questions about the values of nodes that ask for no guard on a symbolic size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphwright.ir.rewrite import Const, const

_NUMBERS = itertools.count()


def unnamed(where: Callable[[Any], bool] = lambda v: True) -> Const:
    """Matches a plain value that the replacement does not need."""
    return const(f"unnamed_{next(_NUMBERS)}", where)


def near(number: float) -> Const:
    """Matches a number that is `number` up to the digits a model author writes."""
    return unnamed(lambda v: isinstance(v, int | float) and math.isclose(v, number, rel_tol=1e-3))


def is_size(size: Any, other: Any) -> bool:
    """Whether two sizes are equal for every input."""
    return statically_known_true(size == other)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values have one shape for every input."""
    return a.dim() == b.dim() and all(map(is_size, a.shape, b.shape))


def same_kind(*nodes: fx.Node) -> bool:
    """Whether all values have one shape and one floating-point dtype."""
    first, *others = (node.meta.get("val") for node in nodes)
    return (
        isinstance(first, torch.Tensor)
        and first.is_floating_point()
        and all(
            isinstance(other, torch.Tensor)
            and other.dtype == first.dtype
            and same_shape(other, first)
            for other in others
        )
    )
