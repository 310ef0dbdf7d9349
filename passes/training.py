"""What a program's adapters ask of the pass that trains it."""

from __future__ import annotations

from graphwright.ir.adapters.record import Adapter, adapters
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook
from graphwright.passes.registry import find_pass


def training_hooks(program: Program) -> list[Hook]:
    """Hooks of all adapters of a program: gradients of their own, penalties, masks."""
    return [hook for adapter in adapters(program).values() for hook in _hooks(program, adapter)]


def _hooks(program: Program, adapter: Adapter) -> list[Hook]:
    hooks = getattr(find_pass(adapter.kind), "hooks", None)
    return [] if hooks is None else list(hooks(program, adapter))
