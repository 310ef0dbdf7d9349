"""Multiple choice: whether the likeliest of several continuations is the right one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from graphwright.evaluation.evaluation import Evaluation
from graphwright.evaluation.scoring import scorer_of
from graphwright.evaluation.texts import likelihoods
from graphwright.ir.data.questions import Questions
from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import Signature


def multiple_choice(
    original: Any,
    result: Any,
    signature: Signature,
    questions: Questions,
    *,
    length_normalized: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Share of questions whose right choice has the greatest log-likelihood; of equals the first.

    Args:
        original, result: see `scorer_of`.
        signature: inputs of both.
        questions: with their choices, as token ids.
        length_normalized: divide each log-likelihood by the choice's number of characters.
        progress: called with (description, done, total).

    Raises:
        ArgumentError: the original gives no finite value on any of the questions.
    """
    rows = questions.rows
    pairs = [pair for row in rows for pair in row.pairs]
    right, scorers = [], (scorer_of(original), scorer_of(result))
    for at, scorer in enumerate(scorers):
        if progress is not None:
            progress("multiple_choice", at, 2)
        found = iter(likelihoods(scorer, signature, pairs, questions.batch_size))
        count, has_values = 0, False
        for row in rows:
            totals = [next(found).log_likelihood for _ in row.pairs]
            if length_normalized:
                totals = [t / length for t, length in zip(totals, row.lengths, strict=True)]
            totals = [-math.inf if math.isnan(total) else total for total in totals]
            has_values = has_values or any(map(math.isfinite, totals))
            count += math.isfinite(max(totals)) and totals.index(max(totals)) == row.answer
        if at == 0 and not has_values:
            raise ArgumentError(
                "the model gives no finite value on any of the data", where=questions.source
            )
        right.append(count / len(rows))
    by = ", divided by its characters" if length_normalized else ""
    how = f"; {scorers[1].how}" if scorers[1].how else ""
    what = f"choice of the greatest log-likelihood{by}, behind the question and a space{how}"
    return Evaluation("multiple_choice", right[0], right[1], True, True, len(rows), what)
