"""What a decomposition tells, and its place in a chain."""

from __future__ import annotations

from collections.abc import Sequence

from graphwright.ir.calibration.site import Solved
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program

MASKS = (
    "prune.compress", "prune.dsnot", "prune.gradual", "prune.issp", "prune.magnitude", "prune.mfac",
    "prune.nm", "prune.sparsegpt", "prune.wanda",
)  # fmt: skip
"""Passes whose zeros would be gone behind a decomposition: they come after it."""


def metrics(
    program: Program, groups: Sequence[Sequence[Layer]], results: Sequence[Solved]
) -> dict[str, float]:
    """How much is left of the parameters of all layers looked at, and the mean error."""
    before = [program.state[uses[0].weight].numel() for uses in groups]
    after = [s.info["kept"] if s.state else n for s, n in zip(results, before, strict=True)]
    errors = [s.info["error"] for s in results if s.state]
    found = {"layers": float(len(errors)), "parameters_kept": sum(after) / sum(before)}
    return found | ({"mean_layer_error": sum(errors) / len(errors)} if errors else {})
