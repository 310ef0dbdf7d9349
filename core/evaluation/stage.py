"""The stage of a run that evaluates: the metric of its spec, for the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.ir.data.batches import Batches
    from graphwright.ir.data.questions import Questions
    from graphwright.ir.program import Program
    from graphwright.specs.sections import EvaluateSection


def evaluated(
    section: EvaluateSection,
    original: Program,
    result: Any,
    data: Batches | Questions,
    *,
    root: Path,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """The report's `evaluation` of an original and a result."""
    from graphwright.ir.data.questions import Questions

    if isinstance(data, Questions):
        from graphwright.evaluation.choices import multiple_choice

        return multiple_choice(
            original, result, original.signature, data,
            length_normalized=section.length_normalized, progress=progress,
        ).to_json()  # fmt: skip
    from graphwright.evaluation.evaluate import evaluate

    return evaluate(
        original, result, data, section.metric, root=root, steps=section.steps, progress=progress
    ).to_json()
