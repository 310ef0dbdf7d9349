"""What an evaluation of held-out samples measures; lower is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature, rebuild
from graphwright.ir.tune.losses import IGNORED_LABEL, Flat, Loss, main_output

Score = Callable[[Flat, Mapping[str, Tensor]], tuple[float, float]]
"""Sum and count over a batch, of flat outputs and inputs by name with `labels`."""


def make_score(name: str, loss: Loss, signature: Signature, folder: Path) -> Score:
    """The measure of that name.

    Args:
        name: `loss`, `accuracy` (the share of wrong labels is what falls), or `module:function`.
        loss: that of training, without label smoothing.
        signature: of the program.
        folder: modules in it are found too.
    """
    if name == "loss":
        return lambda flat, batch: _weighted(float(loss(flat, batch)), batch)
    if name == "accuracy":
        main = main_output(signature)
        return lambda flat, batch: _errors(flat[main], batch)
    from graphwright.ir.data.sources import import_object

    function: Any = import_object(name, folder, "the metric")
    if not callable(function):
        raise ArgumentError("is no function", where=name)
    sign = -1.0 if getattr(function, "higher_is_better", True) else 1.0

    def own(flat: Flat, batch: Mapping[str, Tensor]) -> tuple[float, float]:
        try:
            value = sign * float(function(rebuild(signature.structure, flat), batch))
        except Exception as error:  # whatever the user's function does
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise ArgumentError(f"{type(error).__name__}: {first}", where=name) from error
        return _weighted(value, batch)

    return own


def mean_score(
    program: Program, batches: Iterable[Mapping[str, Tensor]], score: Score, device: torch.device
) -> float:
    """Mean over all batches, each weighted by what it counts; NaN where nothing counts."""
    total = count = 0.0
    names = [spec.name for spec in program.signature.inputs]
    for given in batches:
        batch = {name: value.to(device) for name, value in given.items()}
        flat = program.run_flat(tuple(batch[name] for name in names))
        value, weight = score(flat, batch)
        total, count = total + value, count + weight
    return total / count if count else math.nan


def _weighted(value: float, batch: Mapping[str, Tensor]) -> tuple[float, float]:
    rows = float(next(iter(batch.values())).shape[0])
    return rows * value, rows


def _errors(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[float, float]:
    labels = batch.get("labels")
    if labels is None or labels.shape != logits.shape[:-1]:
        given = "none" if labels is None else f"of shape {tuple(labels.shape)}"
        raise ArgumentError(f"select: accuracy takes a class index per prediction of shape "
                            f"{tuple(logits.shape[:-1])}; the labels are {given}")  # fmt: skip
    counted = labels != IGNORED_LABEL
    wrong = torch.logical_and(logits.argmax(-1) != labels, counted)
    return float(wrong.sum()), float(counted.sum())
