"""Losses of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.causes import innermost
from graphwright.ir.data.batches import Batches
from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature, leaf_names, leaf_of, rebuild

IGNORED_LABEL = -100
"""Label of positions that do not count, as in torch's cross entropy."""

OWN = "own"
"""Name of the loss of a recipe that brings its own in a hook: it starts from zero."""

Flat = tuple[Tensor, ...]
Loss = Callable[[Flat, Mapping[str, Tensor]], Tensor]
"""Scalar loss of a program's flat outputs and a batch (inputs by name, and `labels` if any)."""

Teacher = Callable[[Flat], Flat]


def make_loss(
    name: str, data: Batches, folder: Path, teacher: Teacher | None, smoothing: float = 0.0
) -> Loss:
    """The loss of that name; its arithmetic is in float32 or better.

    Args:
        name: a built-in loss, `own`, or `module:function`.
        data: training data; says whether there are labels, and what the outputs are.
        folder: modules in it are found too.
        teacher: runs the program that `kl` compares with.
        smoothing: share of every label that is spread over all classes.

    Raises:
        ArgumentError: the data has no labels, there is no teacher, or no such function.
    """
    signature = data.signature
    if name == OWN:
        return lambda flat, batch: flat[0].new_zeros((), dtype=torch.float32)
    if ":" in name:
        return _own_loss(name, signature, folder)
    main = main_output(signature)
    if name in OF_TEACHER:
        return _teacher_loss(name, main, signature, teacher)
    if name == "next_token" and data.source == "synthetic":
        raise ArgumentError(
            "the loss next_token would learn random tokens",
            where=data.source,
            fix="Give real text, as --set training.data=train.txt.",
        )
    inputs = [spec.name for spec in signature.inputs]
    if not data.has_labels and not (name == "next_token" and "input_ids" in inputs):
        raise ArgumentError(
            f"the loss {name} needs labels", where=data.source, fix="Add an array named `labels`."
        )
    if name == "mse":
        return lambda flat, batch: mse(wide(flat[main]), batch)
    of_labels = {"cross_entropy": cross_entropy, "next_token": next_token}[name]
    return lambda flat, batch: of_labels(wide(flat[main]), batch, smoothing)


def main_output(signature: Signature) -> int:
    """Index of the output that losses look at: the one named `logits`, else the first float.

    Raises:
        ArgumentError: there is no floating-point output.
    """
    floats = [i for i, s in enumerate(signature.outputs) if _is_float(s.dtype)]
    if not floats:
        raise ArgumentError("the model has no floating-point output to train on")
    named = [index for index, name in leaf_names(signature.structure) if name == "logits"]
    return next((index for index in named if index in floats), floats[0])


def main_of(signature: Signature, outputs: Any) -> Tensor:
    """The output that losses look at, out of outputs in the model's own structure."""
    found: Tensor = leaf_of(signature.structure, outputs, main_output(signature))
    return found


def cross_entropy(logits: Tensor, batch: Mapping[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy with class labels.

    Args:
        logits: (batch, ..., classes) or (batch, classes, ...), beside labels (batch, ...).
        batch: `labels` are class indices, -100 where they do not count (the loss is 0 where none
            does); or shares of all classes, in the shape of the logits.
        smoothing: share of every label that is spread over all classes.
    """
    labels = batch["labels"]
    if labels.shape == logits.shape[:-1]:
        logits, labels = logits.flatten(0, -2), labels.flatten()
    elif labels.shape not in (logits.shape, (logits.shape[0], *logits.shape[2:])):
        raise ArgumentError(
            f"labels of shape {tuple(labels.shape)} do not fit an output of shape "
            f"{tuple(logits.shape)}: cross_entropy takes one class index per prediction"
        )
    labels = labels if labels.is_floating_point() else labels.long()
    if bool((labels == IGNORED_LABEL).all()):
        return 0.0 * logits.sum()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, label_smoothing=smoothing)


def next_token(logits: Tensor, batch: Mapping[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of every token predicted from those before it.

    Args:
        logits: (batch, length, vocabulary).
        batch: `labels` (batch, length) are the token ids in the place of the token they are;
            `input_ids` where there are none, without what `attention_mask` takes out.
        smoothing: share of every label that is spread over all classes.
    """
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"].clone()
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            labels[mask == 0] = IGNORED_LABEL
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ArgumentError(
            f"next_token takes logits (batch, length, vocabulary) and labels (batch, length); "
            f"these are {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if bool((labels[:, 1:] == IGNORED_LABEL).all()):
        return 0.0 * logits.sum()
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().long(),
        ignore_index=IGNORED_LABEL, label_smoothing=smoothing,
    )  # fmt: skip


def mse(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared difference from `labels`, which have the output's shape."""
    labels = batch["labels"]
    if labels.shape != output.shape:
        raise ArgumentError(
            f"mse takes labels of the output's shape: {tuple(labels.shape)} is not "
            f"{tuple(output.shape)}"
        )
    return F.mse_loss(output, labels.to(output.dtype))


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of softmax over the last axis, averaged over predictions.

    Args:
        student: logits (..., classes).
        teacher: logits of the same shape.
        mask: (...), 0 where a prediction does not count.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", temperature 1.
    """
    target = F.log_softmax(teacher, -1)
    each = F.kl_div(F.log_softmax(student, -1), target, reduction="none", log_target=True).sum(-1)
    if mask is None or mask.shape != each.shape:
        return each.mean()
    weights = mask.to(each.dtype)
    return (each * weights).sum() / weights.sum().clamp_min(1)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums of half-precision numbers lose too much."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def relative_difference(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2, for outputs that are no logits.

    Args:
        student: (..., features).
        teacher: of the same shape.
        mask: (...), 0 where a row does not count.
    """
    gap, size = (student - teacher).square().sum(-1), teacher.square().sum(-1)
    if mask is not None and mask.shape == gap.shape:
        gap, size = gap * mask, size * mask
    return gap.sum() / size.sum().clamp_min(1e-30)


OF_TEACHER: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "kl": kl_divergence,
    "teacher_mse": relative_difference,
}
"""Losses that compare with the teacher's output."""


def _teacher_loss(name: str, main: int, signature: Signature, teacher: Teacher | None) -> Loss:
    if teacher is None:
        raise ArgumentError(
            f"the loss {name} needs a teacher", fix="In Python, pass teacher=program to the pass."
        )
    names = [spec.name for spec in signature.inputs]

    def loss(flat: Flat, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            expected = wide(teacher(tuple(batch[name] for name in names))[main])
        return OF_TEACHER[name](wide(flat[main]), expected, batch.get("attention_mask"))

    return loss


def _own_loss(name: str, signature: Signature, folder: Path) -> Loss:
    from graphwright.ir.data.sources import import_object

    function: Any = import_object(name, folder, "the loss")
    if not callable(function):
        raise ArgumentError("is no function", where=name)

    def loss(flat: Flat, batch: Mapping[str, Tensor]) -> Tensor:
        try:
            value = function(rebuild(signature.structure, flat), batch)
        except Exception as error:  # whatever the user's function does
            first = innermost(error)
            raise ArgumentError(f"{type(error).__name__}: {first}", where=name) from error
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            raise ArgumentError("a loss is a floating-point tensor without dimensions", where=name)
        return value

    return loss


def check_teacher(teacher: Program, student: Program) -> None:
    """Raises ArgumentError when two programs do not take the same inputs."""
    asked = [(s.name, s.dtype) for s in teacher.signature.inputs]
    given = [(s.name, s.dtype) for s in student.signature.inputs]
    if asked != given:
        raise ArgumentError(f"the teacher takes {asked}, and the program {given}")


def _is_float(dtype: str) -> bool:
    return bool(getattr(torch, dtype).is_floating_point)
