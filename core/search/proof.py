"""Bounds that no candidate can keep, proven by arithmetic before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import RequirementError

if TYPE_CHECKING:
    from graphwright.ir.parts import Parts
    from graphwright.ir.program import Program
    from graphwright.specs.space import Space
    from graphwright.specs.spec import Spec

UNTOUCHED_BITS = 16
"""Least bits of a weight that no pass makes codes of: a backend may store it in half precision."""


def refuse_impossible(spec: Spec, candidates: list[Spec], space: Space, elements: int) -> None:
    """Compares the smallest file that a candidate can have with `require.max_file_mb`.

    Args:
        spec: the spec with the search. candidates: the spec as it is written, and every
            alternative. space: of the search.
        elements: of the weights of layers, all of which a candidate's file has to hold.

    Raises:
        RequirementError: even the smallest file is too large.
    """
    bound = spec.require.max_file_mb
    bits = least_bits(candidates, space)
    if bound is None or bits is None:
        return
    smallest = elements * bits / 8 / 1e6
    if smallest > bound:
        raise RequirementError(
            f"require.max_file_mb: no candidate can keep the bound {bound:g}: {elements} weight "
            f"elements x {bits:g} bits / 8 are {smallest:.4g} MB",
            fix="Allow larger files, or widen the space of the search.",
        )


def least_bits(candidates: list[Spec], space: Space) -> float | None:
    """Least bits of an element of a weight in any candidate's file.

    None where a pass of the space may leave elements out, or does not say what it stores.
    """
    from graphwright.passes.registry import find_pass

    found: list[float] = [UNTOUCHED_BITS]
    for candidate in candidates:
        for call in candidate.passes:
            stored = find_pass(call.id).stored_bits
            if stored is None:
                return None
            if isinstance(stored, str):
                options = candidate.schema.filled(call.id, call.options)
                found += _numbers(options[stored])
            else:
                found.append(stored)
    for choice in space.choices:  # a range's inner values are in no candidate given here
        if choice.range is not None and choice.elements[-1] == "bits":
            found.append(choice.range.low)
    return min(found)


def _numbers(value: Any) -> Iterator[float]:
    yield from value if isinstance(value, list) else [value]


def weight_elements(original: Program | Parts) -> int:
    """Elements of the weights of linear layers and convolutions; equal ones count once.

    Those that an embedding shares are left out, for its codes may have other bits. Of a model of
    several programs, the elements of the smallest: a file may hold no more.
    """
    if isinstance(original, Mapping):
        return min(weight_elements(program) for program in original.values())
    from graphwright.ir.graph.digest import tensor_digest
    from graphwright.ir.layers.kinds import PRODUCTS, TABLES
    from graphwright.ir.layers.selectors import layers

    found = layers(original)
    shared = {layer.weight for layer in found if layer.kind in TABLES}
    names = {layer.weight for layer in found if layer.kind in PRODUCTS} - shared - {""}
    tensors = [original.state[name] for name in names]
    floats = {tensor_digest(t): t.numel() for t in tensors if t.is_floating_point()}
    return sum(floats.values())
