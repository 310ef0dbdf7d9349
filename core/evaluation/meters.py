"""Metrics that any model has: each runs the original and the result on a batch and adds it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from graphwright.evaluation.evaluation import Evaluation
from graphwright.evaluation.scoring import IGNORED_LABEL, floating, main_output
from graphwright.ir.causes import innermost
from graphwright.ir.check.fidelity import Fidelity, compare, has_finite, merge
from graphwright.ir.errors import ArgumentError

Inputs = Mapping[str, Tensor]
Runner = Callable[..., Any]
"""A model called with inputs by name; gives its own output structure."""


class Meter:
    """Adds up a metric over batches.

    Attributes:
        samples: samples added so far. before, after: sums of the original's and the result's.
        has_values: whether the original gave a finite value on any of them.
    """

    name = ""
    what = ""
    higher_is_better = True
    has_drop = True

    def __init__(self) -> None:
        self.samples = 0
        self.before = self.after = 0.0
        self.has_values = False

    def add(self, original: Runner, result: Runner, inputs: Inputs, labels: Tensor | None) -> None:
        """Takes one batch."""
        self.samples += rows_of(inputs)
        self.before += self._measured(original(**inputs), inputs, labels)
        self.after += self.score(result(**inputs), inputs, labels)

    def _measured(self, outputs: Any, inputs: Inputs, labels: Tensor | None) -> float:
        """The score of the original's outputs."""
        self.has_values = self.has_values or has_finite(outputs)
        return self.score(outputs, inputs, labels)

    def score(self, outputs: Any, inputs: Inputs, labels: Tensor | None) -> float:
        """Sum of the metric over a batch."""
        raise TypeError(f"{type(self).__name__} scores nothing")

    def values(self) -> tuple[float, float]:
        """(before, after) over everything added; NaN where no sample counts."""
        if not self.samples:
            return math.nan, math.nan
        return self.before / self.samples, self.after / self.samples

    def finish(self) -> Evaluation:
        """The evaluation over everything added."""
        before, after = self.values()
        return Evaluation(
            self.name, before, after, self.higher_is_better, self.has_drop, self.samples, self.what
        )


class Cosine(Meter):
    """The angle between the vectors of a sample."""

    name = "cosine"

    def add(self, original: Runner, result: Runner, inputs: Inputs, labels: Tensor | None) -> None:
        before = original(**inputs)
        self.has_values = self.has_values or has_finite(before)
        (path, a), (_, b) = main_output(before), main_output(result(**inputs))
        a, b = self._vectors(path, a, inputs), self._vectors(path, b, inputs)
        counts = a.isfinite().all(1)
        a, b = a[counts], b[counts]
        b = b.where(b.isfinite().all(1)[:, None], b.new_zeros(()))  # no direction at all
        self.samples += len(a)
        norms = a.norm(dim=1) * b.norm(dim=1)
        cosines = (a * b).sum(1) / norms.where(norms > 0, norms.new_ones(()))
        # an all-zero vector has no direction: equal counts as 1, anything else as 0
        cosines = cosines.where(norms > 0, (a == b).all(1).double())
        self.before += float(len(a))
        self.after += float(cosines.clamp(-1, 1).sum())

    def _vectors(self, path: str, output: Tensor, inputs: Inputs) -> Tensor:
        output = output.double()
        mask = inputs.get("attention_mask")
        if output.dim() == 3 and mask is not None and mask.shape == output.shape[:2]:
            self.what = f"{path}, averaged over the tokens that attention_mask keeps"
            weights = mask.to(output.device).double()[..., None]
            kept = weights > 0  # a padded position may hold anything, NaN too
            total = (output.where(kept, output.new_zeros(())) * weights).sum(1)
            return total / weights.sum(1).clamp_min(1e-9)
        self.what = f"{path}, one vector per sample"
        return output.reshape(output.shape[0] if output.dim() else 1, -1)


class Snr(Meter):
    """The result's error against the original's outputs."""

    name, has_drop = "snr_db", False
    what = "all floating-point outputs"

    def __init__(self) -> None:
        super().__init__()
        self.total = Fidelity()

    def add(self, original: Runner, result: Runner, inputs: Inputs, labels: Tensor | None) -> None:
        before = original(**inputs)
        self.has_values = self.has_values or has_finite(before)
        self.samples += rows_of(inputs)
        part = compare(dict(floating(before)), dict(floating(result(**inputs))))
        self.total = merge([self.total, part])

    def values(self) -> tuple[float, float]:
        return math.inf, self.total.snr_db


class Accuracy(Meter):
    """Labels that the largest logit names."""

    name = "accuracy"

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def add(self, original: Runner, result: Runner, inputs: Inputs, labels: Tensor | None) -> None:
        assert labels is not None  # `_meter` refuses data without
        self.counted += int((labels != IGNORED_LABEL).sum())
        super().add(original, result, inputs, labels)

    def score(self, outputs: Any, inputs: Inputs, labels: Tensor | None) -> float:
        assert labels is not None
        path, logits = main_output(outputs)
        if logits.shape[:-1] != labels.shape:
            raise ArgumentError(
                f"labels of shape {tuple(labels.shape)} do not fit {path} of shape "
                f"{tuple(logits.shape)}: accuracy takes one class index per prediction"
            )
        self.what = f"largest value of {path} against the labels"
        names_one = logits.isfinite().any(-1) & ~logits.isnan().any(-1)
        return float(((logits.argmax(-1).cpu() == labels.cpu()) & names_one.cpu()).sum())

    def values(self) -> tuple[float, float]:
        if not self.counted:
            raise ArgumentError("no label counts: all are -100")
        return self.before / self.counted, self.after / self.counted


class Own(Meter):
    """A function of the user's."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.name, self.function, self.what = name, function, "a metric of your own"
        self.higher_is_better = bool(getattr(function, "higher_is_better", True))

    def score(self, outputs: Any, inputs: Inputs, labels: Tensor | None) -> float:
        batch = {**inputs} if labels is None else {**inputs, "labels": labels}
        try:
            value = float(self.function(outputs, batch))
        except Exception as e:  # whatever the user's function does
            raise ArgumentError(f"{type(e).__name__}: {innermost(e)}", where=self.name) from e
        return value * rows_of(inputs)


def rows_of(inputs: Inputs) -> int:
    """Samples in a batch."""
    first = next((value for value in inputs.values() if value.dim()), None)
    return 1 if first is None else int(first.shape[0])
