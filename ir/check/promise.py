"""The promise of a pass about its effect on the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EXACT = 1e-9
"""Relative error in float64 that an exact pass may make, where it stores no new numbers."""


@dataclass(frozen=True)
class Promise:
    """The promise of a pass about its effect on the function.

    Attributes:
        by: id of the pass.
        contract: `exact`, `identity_at_init` or `lossy`.
        tolerance: largest relative error ||a-b||/||a|| of the first two contracts, in float64;
            0 asks for equal values in the program's own precision.
        max_error: largest relative error of every output of a lossy pass; None for no bound.
        changes_interface: the pass says that inputs or outputs may be others.
        expected: of a pass that makes another function: what that computes (`restated.py`).
    """

    by: str
    contract: str
    tolerance: float = EXACT
    max_error: float | None = None
    changes_interface: bool = False
    expected: Callable[..., Any] | None = None
