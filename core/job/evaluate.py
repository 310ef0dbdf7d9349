"""Compares the result with the original on data that no pass has seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from graphwright.ir.data.batches import Batches

Runner = Callable[..., Any]
"""A model called with inputs by name; gives its own output structure."""

IGNORED_LABEL = -100
"""Label of positions that do not count, as in torch's cross entropy."""


@dataclass(frozen=True)
class Evaluation:
    """A metric of the original and of the result.

    Attributes:
        metric: its name, or `module:function`.
        before: of the original.
        after: of the result.
        higher_is_better: direction of the metric.
        has_drop: whether before - after means anything; not for `snr_db`, where before is
            infinite.
        samples: samples it was taken over.
        what: what exactly was compared, in words.
    """

    metric: str
    before: float
    after: float
    higher_is_better: bool
    has_drop: bool
    samples: int
    what: str

    @property
    def drop(self) -> float | None:
        """Loss in units of the metric, positive when the result is worse; None if undefined."""
        if not self.has_drop:
            return None
        return self.before - self.after if self.higher_is_better else self.after - self.before

    def to_json(self) -> dict[str, Any]:
        """The report's `evaluation`; a figure that is not finite is None, and `exact` says whether
        it is the infinite `snr_db` of equal outputs."""
        return {
            "metric": self.metric,
            "before": _finite(self.before),
            "after": _finite(self.after),
            "drop": _finite(self.drop),
            "higher_is_better": self.higher_is_better,
            "exact": self.after == math.inf,
            "samples": self.samples,
            "what": self.what,
        }


def evaluate(
    original: Runner,
    result: Runner,
    data: Batches,
    metric: str,
    *,
    root: str | Path = ".",
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Runs both on all of `data` and compares.

    Metrics:
        cosine: mean over samples of the cosine between the original's and the result's vector.
            The vector is the first floating-point output, flattened; an output of shape (batch,
            length, width) beside an `attention_mask` input is averaged over the tokens the mask
            keeps, as sentence encoders do. Samples of which the original makes no finite vector
            do not count; one that only the result fails at counts as 0.
        snr_db: 10 log10(||a||² / ||a - b||²) over all floating-point outputs.
        accuracy: share of labels that the largest logit names; labels of -100 do not count, and
            logits with NaN, or without a finite one, name nothing.
        perplexity: exp of the mean cross entropy of each next token; the labels are the token
            ids, in the place of the token they are (`input_ids`, where there are no labels).
        module:function: `function(outputs, batch) -> float`, averaged over samples; `batch` holds
            the inputs and, if there are any, `labels`. A function attribute `higher_is_better =
            False` turns its direction.

    Raises:
        ArgumentError: the metric needs labels that the data lacks, has no output to work on, or
            the original gives no finite value on any of the data.
    """
    import torch

    from graphwright.ir.check.fidelity import has_finite

    measure = _meter(metric, data, Path(root))
    batches, has_values = len(data), False
    with torch.inference_mode():
        for index, (inputs, labels) in enumerate(data.labelled()):
            if progress is not None:
                progress(metric, index, batches)
            before = original(**inputs)
            has_values = has_values or has_finite(before)
            measure.add(before, result(**inputs), inputs, labels)
    if not has_values:
        raise ArgumentError(
            f"the model gives no finite value on any of the data, so that {metric} says nothing",
            where=data.source,
        )
    return measure.finish()


def _meter(metric: str, data: Batches, root: Path) -> _Meter:
    if metric == "cosine":
        return _Cosine()
    if metric == "snr_db":
        return _Snr()
    if metric in ("accuracy", "perplexity"):
        is_accuracy = metric == "accuracy"
        names = [spec.name for spec in data.signature.inputs]
        if not data.has_labels and (is_accuracy or "input_ids" not in names):
            raise ArgumentError(
                f"{metric} needs labels", where=data.source, fix="Add an array named `labels`."
            )
        return _Accuracy() if is_accuracy else _Perplexity()
    from graphwright.ir.data.sources import import_object

    function = import_object(metric, root, "the metric")
    if not callable(function):
        raise ArgumentError(f"metric {metric} is no function")
    return _Own(metric, function)


class _Meter:
    """Adds up a metric over batches."""

    name = ""
    what = ""
    higher_is_better = True
    has_drop = True

    def __init__(self) -> None:
        self.samples = 0
        self.before = self.after = 0.0

    def add(
        self, before: Any, after: Any, inputs: Mapping[str, Tensor], labels: Tensor | None
    ) -> None:
        """Takes one batch of outputs."""
        self.samples += _rows(inputs)
        self.before += self.score(before, inputs, labels)
        self.after += self.score(after, inputs, labels)

    def score(self, outputs: Any, inputs: Mapping[str, Tensor], labels: Tensor | None) -> float:
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


class _Cosine(_Meter):
    name = "cosine"

    def add(
        self, before: Any, after: Any, inputs: Mapping[str, Tensor], labels: Tensor | None
    ) -> None:
        (path, a), (_, b) = _main_output(before), _main_output(after)
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

    def _vectors(self, path: str, output: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
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


class _Snr(_Meter):
    name, has_drop = "snr_db", False
    what = "all floating-point outputs"

    def __init__(self) -> None:
        from graphwright.ir.check.fidelity import Fidelity

        super().__init__()
        self.total = Fidelity()

    def add(
        self, before: Any, after: Any, inputs: Mapping[str, Tensor], labels: Tensor | None
    ) -> None:
        from graphwright.ir.check.fidelity import compare, merge

        self.samples += _rows(inputs)
        part = compare(dict(_floating(before)), dict(_floating(after)))
        self.total = merge([self.total, part])

    def values(self) -> tuple[float, float]:
        return math.inf, self.total.snr_db


class _Accuracy(_Meter):
    name = "accuracy"

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def add(
        self, before: Any, after: Any, inputs: Mapping[str, Tensor], labels: Tensor | None
    ) -> None:
        assert labels is not None  # `_meter` refuses data without
        self.counted += int((labels != IGNORED_LABEL).sum())
        super().add(before, after, inputs, labels)

    def score(self, outputs: Any, inputs: Mapping[str, Tensor], labels: Tensor | None) -> float:
        assert labels is not None
        path, logits = _main_output(outputs)
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


class _Perplexity(_Meter):
    name, higher_is_better = "perplexity", False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def add(
        self, before: Any, after: Any, inputs: Mapping[str, Tensor], labels: Tensor | None
    ) -> None:
        if labels is None:
            labels = inputs["input_ids"].clone()
            if "attention_mask" in inputs:
                labels[inputs["attention_mask"] == 0] = IGNORED_LABEL
        self.tokens += int((labels[:, 1:] != IGNORED_LABEL).sum())
        super().add(before, after, inputs, labels)

    def score(self, outputs: Any, inputs: Mapping[str, Tensor], labels: Tensor | None) -> float:
        import torch.nn.functional as F

        assert labels is not None
        path, logits = _main_output(outputs)
        if logits.dim() != 3 or logits.shape[:2] != labels.shape:
            raise ArgumentError(
                f"perplexity takes logits (batch, length, vocabulary) and labels (batch, length); "
                f"{path} is {tuple(logits.shape)}, the labels are {tuple(labels.shape)}"
            )
        self.what = f"{path}: every token predicted from those before it"
        return float(
            F.cross_entropy(
                logits[:, :-1].double().flatten(0, 1).cpu(),
                labels[:, 1:].flatten().long().cpu(),
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            )
        )

    def values(self) -> tuple[float, float]:
        if not self.tokens:
            raise ArgumentError("perplexity needs texts of two tokens or more")
        return tuple(  # type: ignore[return-value]
            math.exp(min(total / self.tokens, 700.0)) for total in (self.before, self.after)
        )


class _Own(_Meter):
    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.name, self.function, self.what = name, function, "a metric of your own"
        self.higher_is_better = bool(getattr(function, "higher_is_better", True))

    def score(self, outputs: Any, inputs: Mapping[str, Tensor], labels: Tensor | None) -> float:
        batch = {**inputs} if labels is None else {**inputs, "labels": labels}
        try:
            value = float(self.function(outputs, batch))
        except Exception as e:  # whatever the user's function does
            raise ArgumentError(f"{type(e).__name__}: {innermost(e)}", where=self.name) from e
        return value * _rows(inputs)


def _main_output(outputs: Any) -> tuple[str, Tensor]:
    """The output named `logits`, or else the first floating-point one."""
    found = list(_floating(outputs))
    if not found:
        raise ArgumentError("the model has no floating-point output to evaluate")
    named = [(path, value) for path, value in found if path == "logits"]
    path, value = (named or found)[0]
    return path or "the output", value


def _floating(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    from graphwright.ir.check.fidelity import leaves

    return ((path, value) for path, value in leaves(outputs) if value.is_floating_point())


def _rows(inputs: Mapping[str, Tensor]) -> int:
    first = next((value for value in inputs.values() if value.dim()), None)
    return 1 if first is None else int(first.shape[0])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
