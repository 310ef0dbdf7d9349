"""What a program's adapters and records ask of the pass that trains it."""

from __future__ import annotations

from graphwright.ir.adapters.record import Adapter, adapters
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook
from graphwright.passes.registry import find_pass

TRAINING_ONLY = "training_only"
"""Key among a program's facts: records of passes that act on training and on nothing else."""


def training_hooks(program: Program) -> list[Hook]:
    """Hooks of all adapters of a program (gradients of their own, penalties, masks), and of what
    acts on training alone."""
    found = [hook for adapter in adapters(program).values() for hook in _hooks(program, adapter)]
    for kind, row in dict(program.facts.get(TRAINING_ONLY, {})).items():
        made = getattr(find_pass(kind), "training_only", None)
        found += [] if made is None else list(made(row))
    return found


def _hooks(program: Program, adapter: Adapter) -> list[Hook]:
    hooks = getattr(find_pass(adapter.kind), "hooks", None)
    return [] if hooks is None else list(hooks(program, adapter))
