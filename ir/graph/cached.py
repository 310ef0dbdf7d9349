"""Attention over `cat(past, new)` in a graph, read back to what an attention kernel takes.

One reader for every backend whose attention writes its cache in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.graph.mask_form import MaskForm, mask_form
from graphwright.ir.graph.moves import COPIES, RESHAPES
from graphwright.ir.graph.nodes import argument
from graphwright.ir.graph.sizes import sizes_of

aten = torch.ops.aten
WHOLE = 2**63 - 1
SDPA = aten.scaled_dot_product_attention.default


class NotCached(Exception):
    """The attention is none over a cache that can be written in place; says why."""


@dataclass(frozen=True)
class NewPart:
    """One operand of the attention, keys or values.

    Attributes:
        past: the input.
        new: what stands behind it, (batch, shared heads, tokens, size).
        joined: the concatenation.
    """

    past: fx.Node
    new: fx.Node
    joined: fx.Node


@dataclass(frozen=True)
class CachedAttention:
    """An attention over a cache.

    Attributes:
        node: the call.
        query: (batch, heads, tokens, size).
        keys, values: its operands; not repeated over the heads that share them.
        scale, softcap: of the scores; no cap where it is 0.
        sinks: (heads,) or None.
        window: tokens that a query sees, itself included; None for all before it.
        mask: (batch, total) input that hides padding; None where the model hides none.
    """

    node: fx.Node
    query: fx.Node
    keys: NewPart
    values: NewPart
    scale: float
    softcap: float
    sinks: fx.Node | None
    window: int | None
    mask: fx.Node | None


def cached_attention_at(
    node: fx.Node,
    state: Mapping[str, torch.Tensor],
    names: Mapping[sympy.Symbol, sympy.Symbol],
    forms: dict[Any, MaskForm | None],
) -> CachedAttention:
    """What a call of attention computes.

    Args:
        node: a call of ATen's attention, or of ours.
        state: the program's tensors by name.
        names: the program's `dimension_names`.
        forms: of masks that were read before; layers share theirs.

    Raises:
        NotCached: it is no attention over a cache, or under a mask that kernels do not know.
    """
    query, k, v = node.args[:3]
    assert isinstance(query, fx.Node)
    keys, values = _new_part(k, query), _new_part(v, query)
    scale: Any
    softcap: Any
    sinks: Any = None
    if node.target is SDPA:
        mask = argument(node, 3, "attn_mask")
        if argument(node, 4, "dropout_p", 0.0) or argument(node, 5, "is_causal", False):
            raise NotCached("it has dropout, or a causal mode that knows of no past")
        scale, softcap = argument(node, 6, "scale"), 0.0
    else:
        mask, scale, softcap, sinks = node.args[3:7]
    if mask is None:
        raise NotCached("it has no mask, so a token sees those behind it")
    assert isinstance(mask, fx.Node)
    past = sympy.sympify(sizes_of(keys.past)[2]).subs(names)
    if (mask, past) not in forms:
        is_bool = mask.meta["val"].dtype == torch.bool
        forms[mask, past] = mask_form(mask, state, past, names) if is_bool else None
    form = forms[mask, past]
    if form is None or not form.causal:
        raise NotCached("its mask says more than causal, window and padding")
    if form.keys is not None and form.keys.op != "placeholder":
        raise NotCached(f"its padding is computed ({form.keys.name})")
    width = float(query.meta["val"].shape[-1])
    return CachedAttention(
        node, query, keys, values, width**-0.5 if scale is None else float(scale), float(softcap),
        sinks, form.window, form.keys,
    )  # fmt: skip


def _new_part(operand: Any, query: fx.Node) -> NewPart:
    """`cat([past, new], 2)`, behind its repetition over the heads that share it."""
    node = _plain(operand)
    repeated = _before_repetition(node)
    node = node if repeated is None else _plain(repeated)
    parts: Any = node.args[0] if node.target is aten.cat.default else ()
    is_joined = len(parts) == 2 and argument(node, 1, "dim", 0) in (2, -2)
    if not is_joined or parts[0].op != "placeholder" or node.meta["val"].dim() != 4:
        raise NotCached("its keys or values are no concatenation with a past")
    heads, shared = sizes_of(query)[1], sizes_of(node)[1]
    if not isinstance(heads, int) or not isinstance(shared, int) or heads % shared:
        raise NotCached("heads do not share keys evenly")
    return NewPart(parts[0], parts[1], node)


def _plain(node: Any) -> fx.Node:
    """The node behind copies and slices of everything."""
    while isinstance(node, fx.Node):
        if node.target not in COPIES and not _slices_all(node):
            return node
        node = node.args[0]
    raise NotCached("its keys or values are no tensors of the graph")


def _slices_all(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor or argument(node, 4, "step", 1) != 1:
        return False
    return argument(node, 2, "start") in (None, 0) and argument(node, 3, "end") in (None, WHOLE)


def _before_repetition(node: fx.Node) -> fx.Node | None:
    """What every head of a group reads; None where nothing is repeated.

    The heads of a group are neighbours: (batch, shared, 1, length, size) expanded and flattened.
    """
    if node.target not in RESHAPES:
        return None
    wide = _plain(node.args[0])
    if wide.target is not aten.expand.default:
        return None
    single = _plain(wide.args[0])
    if single.target is not aten.unsqueeze.default or argument(single, 1, "dim") not in (2, -3):
        return None
    source = _plain(single.args[0])
    outer, inner, before = sizes_of(node), sizes_of(wide), sizes_of(source)
    if len(outer) != 4 or len(before) != 4 or len(inner) != 5 or inner[1] != before[1]:
        return None
    return source if outer[1] == inner[1] * inner[2] else None
