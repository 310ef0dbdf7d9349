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
    new = result.program
    has_codes = _has_codes(new)
    if step.needed == "training" and not has_codes:
        return new  # what is trained is the new original
    if uncompressed is not before:
        return uncompressed
    if step.contract == "lossy" and (has_codes or not _is_cut(before, new)):
        return before if result.uncompressed is None else result.uncompressed
    return new


def _has_codes(program: Program) -> bool:
    from graphwright.ir.weights import rebuilds

    return any(rebuilds(node) for node in program.graph.nodes if node.op == "call_function")


def _is_cut(before: Program, after: Program) -> bool:
    """Whether a parameter of the same name has another shape."""
    old, new = before.parameters(), after.parameters()
    return any(old[name].shape != new[name].shape for name in old.keys() & new.keys())
