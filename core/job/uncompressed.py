"""The program with the weights that compression started from, beside the one a chain works on.

Compensation compares a compressed weight with what it was made of. That is not the weight before
the first pass where passes before compression have folded norms, cut channels or trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphwright.ir.program import Program
    from graphwright.passes.base import Pass, Result


def follow(uncompressed: Program, step: Pass, before: Program, result: Result) -> Program:
    """The uncompressed program behind a pass.

    Args:
        uncompressed: the one before the pass; `before` itself where nothing is compressed yet.
        step: the pass.
        before, result: what it was given, and what it made of that.
    """
    new, trained = result.program, step.needed == "training"
    has_codes, is_cut = _has_codes(new), _is_cut(before, new)
    if trained and not has_codes:
        return new  # what is trained is the new original
    if result.uncompressed is not None:
        return result.uncompressed
    if step.contract == "lossy" and not trained and (has_codes or not is_cut):
        return uncompressed  # this compresses
    has_other_form = is_cut or (step.contract == "exact" and _has_other_weights(before, new))
    return new if uncompressed is before or has_other_form else uncompressed


def _has_codes(program: Program) -> bool:
    from graphwright.ir.stored.read import rebuilds

    return any(rebuilds(node) for node in program.graph.nodes if node.op == "call_function")


def _is_cut(before: Program, after: Program) -> bool:
    """Whether a parameter of the same name has another shape."""
    old, new = before.parameters(), after.parameters()
    return any(old[name].shape != new[name].shape for name in old.keys() & new.keys())


def _has_other_weights(before: Program, after: Program) -> bool:
    """Whether the weight of a layer of the same name has another value (norms, factors folded)."""
    import torch

    from graphwright.ir.layers.kinds import PRODUCTS
    from graphwright.ir.layers.products import weight_value
    from graphwright.ir.layers.selectors import layers

    old = {layer.name: layer for layer in layers(before, PRODUCTS)}
    return any(
        not torch.equal(weight_value(before, old[layer.name]), weight_value(after, layer))
        for layer in layers(after, PRODUCTS)
        if layer.name in old
    )
