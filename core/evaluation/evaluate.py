"""Compares the result with the original on data that no pass has seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.evaluation.evaluation import Evaluation
from graphwright.ir.errors import ArgumentError

if TYPE_CHECKING:
    from graphwright.evaluation.meters import Meter
    from graphwright.ir.data.batches import Batches

LANGUAGE = ("perplexity", "agreement", "multiple_choice")
"""Metrics that can be had of an artifact with the logits of last tokens alone."""


def evaluate(
    original: Any,
    result: Any,
    data: Batches,
    metric: str,
    *,
    root: str | Path = ".",
    steps: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Runs both on all of `data` and compares; `choices.py` has the metric of questions.

    Metrics:
        cosine: mean over samples of the cosine between the original's and the result's vector.
            The vector is the first floating-point output, flattened; an output of shape (batch,
            length, width) beside an `attention_mask` input is averaged over the tokens the mask
            keeps, as sentence encoders do. Samples of which the original makes no finite vector
            do not count; one that only the result fails at counts as 0.
        snr_db: 10 log10(||a||² / ||a - b||²) over all floating-point outputs.
        accuracy: share of labels that the largest logit names; labels of -100 do not count, and
            logits with NaN, or without a finite one, name nothing.
        perplexity: exp of the mean cross entropy of each next token, summed in float64; the labels
            are the token ids, in the place of the token they are (`input_ids`, where there are no
            labels).
        agreement: share of greedy steps behind each text of the data at which the result names
            the original's token; see `agreement.py`.
        module:function: `function(outputs, batch) -> float`, averaged over samples; `batch` holds
            the inputs and, if there are any, `labels`. A function attribute `higher_is_better =
            False` turns its direction.

    Args:
        original: called with inputs by name; for `agreement` a program.
        result: the same, or an artifact that generates.
        data: batches that no pass has seen.
        metric: its name, or `module:function`.
        root: folder that modules of the user's start from.
        steps: tokens per text for `agreement`.
        progress: called with (description, done, total).

    Raises:
        ArgumentError: the metric needs labels that the data lacks, has no output to work on, or
            the original gives no finite value on any of the data.
    """
    import torch

    from graphwright.evaluation.scoring import gives_last_logits

    if metric not in LANGUAGE and gives_last_logits(result):
        raise ArgumentError(
            f"{metric} compares the logits of all tokens, and the artifact gives those of the last "
            "alone",
            fix="Evaluate perplexity or agreement, or lower with `logits: all`.",
        )
    measure = _meter(metric, original, result, data, Path(root), steps)
    batches = len(data)
    with torch.inference_mode():
        for index, (inputs, labels) in enumerate(data.labelled()):
            if progress is not None:
                progress(metric, index, batches)
            measure.add(original, result, inputs, labels)
    if not measure.has_values:
        raise ArgumentError(
            f"the model gives no finite value on any of the data, so that {metric} says nothing",
            where=data.source,
        )
    return measure.finish()


def _meter(
    metric: str, original: Any, result: Any, data: Batches, root: Path, steps: int | None
) -> Meter:
    from graphwright.evaluation.meters import Accuracy, Cosine, Own, Snr

    if metric == "cosine":
        return Cosine()
    if metric == "snr_db":
        return Snr()
    names = [spec.name for spec in data.signature.inputs]
    if metric == "agreement":
        from graphwright.evaluation.agreement import STEPS, Agreement

        if "input_ids" not in names:
            raise ArgumentError("agreement needs a model of `input_ids`", where=data.source)
        if "attention_mask" not in names and (data.rows is None or data.rows.size > 1):
            raise ArgumentError(
                "agreement: the model takes no attention_mask, and texts of a batch are padded",
                where=data.source,
                fix="Give `evaluate` the `batch_size` 1.",
            )
        return Agreement(original, result, steps or STEPS)
    if metric in ("accuracy", "perplexity"):
        if not data.has_labels and (metric == "accuracy" or "input_ids" not in names):
            raise ArgumentError(
                f"{metric} needs labels", where=data.source, fix="Add an array named `labels`."
            )
        if metric == "accuracy":
            return Accuracy()
        from graphwright.evaluation.perplexity import Perplexity

        return Perplexity(original, result)
    from graphwright.ir.data.sources import import_object

    function = import_object(metric, root, "the metric")
    if not callable(function):
        raise ArgumentError(f"metric {metric} is no function")
    return Own(metric, function)
