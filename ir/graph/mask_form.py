"""Masks in the terms that attention kernels know: causal, a window, keys that are padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.graph.masks import B, K, Q, Truth, conjunction


@dataclass(frozen=True)
class MaskForm:
    """A mask in the terms that attention kernels know.

    Attributes:
        causal: a query sees no key after it.
        keys: (batch, keys) node whose nonzero entries may be seen; None when all may.
        window: a query sees no key that is this many places or more in front of it; None when
            there is no such bound. Both together: itself and the `window - 1` keys before.
    """

    causal: bool
    keys: fx.Node | None
    window: int | None = None


def mask_form(
    mask: fx.Node,
    state: Mapping[str, torch.Tensor],
    past: Any = 0,
    names: Mapping[sympy.Symbol, sympy.Symbol] | None = None,
) -> MaskForm | None:
    """The mask as causal, windowed and/or key padding; None when it says something else.

    Args:
        mask: boolean, (batch, heads, queries, keys) or fewer axes.
        state: the program's tensors by name.
        past: keys in front of the first query, a number or an expression over torch's symbols.
        names: torch's symbols to those of dimensions (`dimension_names`): every past of a cache
            has a symbol of its own, which the program's signature says are one size.
    """
    if names:
        past = sympy.sympify(past).subs(names)
    atoms = conjunction(mask, state)
    if atoms is None:
        return None
    causal, keys, window = False, None, None
    for atom in atoms:
        if isinstance(atom, Truth):
            if atom.load.index != (B, K) or keys is not None:
                return None
            keys = atom.load.node
            continue
        least = _at_most_zero(atom)
        if least is None:
            return None
        least = least.subs(names or {})
        if sympy.expand(least - (K - Q - past)) == 0:
            causal = True
            continue
        width = sympy.expand(Q + past - K - least) + 1
        if not width.is_Integer or width < 1 or window is not None:
            return None
        window = int(width)
    return MaskForm(causal, keys, window)


def _at_most_zero(atom: Any) -> Any:
    """The expression of whole numbers that an inequality holds at or below 0; None for others."""
    if isinstance(atom, sympy.Le):
        return atom.lhs - atom.rhs
    if isinstance(atom, sympy.Ge):
        return atom.rhs - atom.lhs
    if isinstance(atom, sympy.Lt):
        return atom.lhs - atom.rhs + 1
    if isinstance(atom, sympy.Gt):
        return atom.rhs - atom.lhs + 1
    return None
