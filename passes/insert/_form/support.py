"""What labelled samples say about the features in front of a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.calibration.observe import observe
from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program


class _Rows:
    """Rows of one value seen by a function, a batch at a time."""

    def __init__(self) -> None:
        self.count, self.total = 0, torch.zeros(())

    def update(self, x: Tensor) -> None:
        self.count += len(x)
        self.total = self.total + x.double().sum(0)


class _Classes:
    """Sums of normalized rows by class; `labels` are those of the batch that is running."""

    def __init__(self, mean: Tensor, classes: int) -> None:
        self.mean, self.labels = mean, torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(classes, len(mean), dtype=torch.float64)
        self.counts = torch.zeros(classes, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        self.sums.index_add_(0, self.labels, F.normalize(x.double() - self.mean))
        self.counts += torch.bincount(self.labels, minlength=len(self.counts))


def support_means(
    program: Program, node: str, classes: int, data: Iterable[Any], by: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (K, D) of centred features of length 1 by class, counts (K,), and the mean (D,).

    All float64; the data is read twice, and no features are kept.

    Args:
        program: run on the data.
        node: name of the value (batch, D).
        classes: K.
        data: labelled batches.
        by: id of the pass, for messages.

    Raises:
        ArgumentError: labels are missing, are no class numbers, or a class has no sample.
    """
    batches = as_batches(data, program.signature)
    rows = _Rows()
    observe(program, {node: rows}, _checked(batches.labelled(), classes, by, None))
    sums = _Classes(rows.total / rows.count, classes)
    observe(program, {node: sums}, _checked(batches.labelled(), classes, by, sums))
    missing = [str(k) for k in range(classes) if not sums.counts[k]]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ArgumentError(
            f"{by}: the training data has no sample of class {', '.join(missing[:5])}{more}, and "
            f"the layer has {classes}",
            fix="Give labelled samples of every class, or set `cost: logits`.",
        )
    return sums.sums, sums.counts, sums.mean


def _checked(
    batches: Iterator[tuple[dict[str, Tensor], Tensor | None]],
    classes: int, by: str, shown: _Classes | None,
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    for index, (inputs, labels) in enumerate(batches):
        if labels is None:
            raise ArgumentError(
                f"{by}: the training data has no labels",
                fix="Add a column `labels` of class numbers, or set `cost: logits`.",
            )
        whole = not (labels.is_floating_point() or labels.is_complex())
        if labels.dim() != 1 or not whole or bool(((labels < 0) | (labels >= classes)).any()):
            raise ArgumentError(
                f"{by}: labels of batch {index} are no class numbers from 0 to {classes - 1}, one "
                f"per sample: {labels.dtype} of shape {tuple(labels.shape)}",
            )
        if shown is not None:
            shown.labels = labels.long()
        yield inputs
