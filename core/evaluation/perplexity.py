"""Perplexity: how many tokens, as it were, the next one is drawn from."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from graphwright.evaluation.meters import Inputs, Meter, Runner, rows_of
from graphwright.evaluation.scoring import IGNORED_LABEL, scorer_of
from graphwright.ir.errors import ArgumentError

LARGEST = 700.0
"""Logarithm of the largest perplexity that is still a number."""


class Perplexity(Meter):
    """exp of the mean negative log-likelihood of each next token."""

    name, higher_is_better = "perplexity", False

    def __init__(self, original: Any, result: Any) -> None:
        super().__init__()
        self.scorers = scorer_of(original), scorer_of(result)
        how = self.scorers[1].how
        self.what = "every token predicted from those before it" + (f"; {how}" if how else "")
        self.tokens = 0

    def add(self, original: Runner, result: Runner, inputs: Inputs, labels: Tensor | None) -> None:
        """Takes one batch; without labels the tokens are their own."""
        if labels is None:
            labels = inputs["input_ids"].clone()
            if "attention_mask" in inputs:
                labels[inputs["attention_mask"] == 0] = IGNORED_LABEL
        self.samples += rows_of(inputs)
        self.tokens += int((labels[:, 1:] != IGNORED_LABEL).sum())
        before = self.scorers[0](inputs, labels).log_likelihoods
        self.has_values = self.has_values or bool(before.isfinite().any())
        self.before -= float(before.sum())
        self.after -= float(self.scorers[1](inputs, labels).log_likelihoods.sum())

    def values(self) -> tuple[float, float]:
        if not self.tokens:
            raise ArgumentError("perplexity needs texts of two tokens or more")
        before, after = (
            math.exp(min(total / self.tokens, LARGEST)) for total in (self.before, self.after)
        )
        return before, after
