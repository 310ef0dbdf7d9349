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
    new, effect = result.program, step.effect(result)
    is_original = effect == "trained" and not _has_codes(new)
    if is_original or (effect == "reformed" and result.uncompressed is None):
        return new
    if result.uncompressed is not None:
        return result.uncompressed
    if effect == "compressed":
        return uncompressed
    return new if uncompressed is before else uncompressed


def _has_codes(program: Program) -> bool:
    from graphwright.ir.stored.read import rebuilds

    return any(rebuilds(node) for node in program.graph.nodes if node.op == "call_function")
