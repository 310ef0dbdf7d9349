"""Filters of made images: which ones a section's `filter` keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.ir.synthesis.chain import accepted, discriminator
from graphwright.ir.synthesis.kernels import bidirectional
from graphwright.ir.synthesis.logits import logits_of
from graphwright.ir.synthesis.statistics import Observed, norms_of
from graphwright.ir.tune.losses import IGNORED_LABEL

TINY = 1e-6


@dataclass(frozen=True)
class Made:
    """Images that were made, and what they were made of.

    Attributes:
        images: (samples, channels, height, width).
        labels: what they are meant to be, (samples, ...); None where nothing is known.
        originals: the image that each was made of, in the same shape; None where it was noise.
        real: real images to compare with, of any number; None where there are none.
    """

    images: Tensor
    labels: Tensor | None
    originals: Tensor | None = None
    real: Tensor | None = None


def agreement(logits: Tensor, labels: Tensor) -> Tensor:
    """How far a model agrees with the labels of samples, (samples,) in [0, 1].

    Of a classifier, the probability of the class, 0 where it is -100; of dense predictions, the
    share of the labelled elements (those that are not -100) that it names, with 1e-6 added to their
    number: a sample without any gets 0.

    Args:
        logits: (samples, classes, ...).
        labels: (samples, ...), classes.

    Raises:
        ModelError: labels are no classes of the model, one per sample or per element.

    Source: P78, which takes one share for a whole batch; here every sample has its own.
    """
    wanted, classes = (len(logits), *logits.shape[2:]), logits.shape[1]
    if tuple(labels.shape) != wanted or labels.is_floating_point():
        raise ModelError(
            f"filter: agreement takes classes, whole numbers {list(wanted)}, and the labels are "
            f"{labels.dtype} {list(labels.shape)}",
            fix="Leave `filter` out.",
        )
    labelled = labels != IGNORED_LABEL
    if bool((labelled & ((labels < 0) | (labels >= classes))).any()):
        raise ModelError(f"filter: agreement: labels go beyond the model's {classes} classes")
    if logits.dim() == 2:
        named = torch.where(labelled, labels, 0).long()[:, None]
        return logits.softmax(-1).gather(1, named)[:, 0] * labelled
    right = (logits.argmax(1) == labels) & labelled
    return right.flatten(1).sum(1) / (labelled.flatten(1).sum(1) + TINY)


def keep_agreeing(made: Made, program: Program, threshold: float) -> Made:
    """Samples with an agreement above `threshold`; in the place of others what they were made of.

    Those that were made of noise are left out.
    """
    logits = logits_of(program, made.images)
    labels = made.labels
    if labels is None:
        assert made.originals is not None  # images of noise are made for a class
        labels = logits_of(program, made.originals).argmax(1)
    good = agreement(logits, labels) > threshold
    if made.originals is None:
        return _rows(made, good.nonzero()[:, 0])
    shape = (-1, *[1] * (made.images.dim() - 1))
    return replace(made, images=torch.where(good.view(shape), made.images, made.originals))


def keep_accepted(made: Made, program: Program, context: Context) -> Made:
    """The states of a Metropolis-Hastings chain over the samples; one that stays counts again."""
    assert made.real is not None  # the section is checked for it
    real, offered = (features_of(program, x, spread=True) for x in (made.real, made.images))
    of_real, of_made = discriminator(real, offered, context.generator("folds"))
    first = int(torch.randint(len(of_real), (), generator=context.generator("first")))
    states = accepted(float(of_real[first]), of_made, context.generator("accept"))
    return _rows(made, torch.tensor([s for s in states if s >= 0], dtype=torch.int64))


def keep_predicting(made: Made, program: Program, share: float) -> Made:
    """The share of the samples that agree best with the real ones in both directions."""
    assert made.real is not None  # the section is checked for it
    real, offered = (features_of(program, x) for x in (made.real, made.images))
    outputs, targets = (logits_of(program, x) for x in (made.real, made.images))
    scores = bidirectional(real, outputs, offered, targets)
    count = max(1, round(share * len(scores)))
    return _rows(made, scores.argsort(stable=True)[:count].sort().values)


def features_of(program: Program, images: Tensor, *, spread: bool = False) -> Tensor:
    """What the last batch norm of a model normalizes, averaged over places: (samples, channels).

    With `spread` the standard deviations over places stand behind the means: noise may have the
    means of real images.
    """
    observed = Observed(program, norms_of(program)[-1:], images.device)
    fixed = program.signature.inputs[0].shape[0]
    size, found = fixed if isinstance(fixed, int) else 64, []
    with torch.no_grad():
        for begin in range(0, len(images), size):
            rows = torch.arange(begin, begin + size) % len(images)
            rows = rows if isinstance(fixed, int) else rows[: len(images) - begin]
            value = observed(images[rows])[1][0]
            value = value.flatten(2) if value.dim() > 2 else value.unsqueeze(2)
            parts = [value.mean(2), value.std(2, correction=0)] if spread else [value.mean(2)]
            found.append(torch.cat(parts, 1))
    return torch.cat(found)[: len(images)]


def check_left(made: Made, before: int, name: str) -> None:
    """Raises ModelError where a filter left no two samples."""
    if len(made.images) < 2:
        raise ModelError(
            f"filter: {name} leaves {len(made.images)} of {before} images",
            fix="Make images with more iterations, or let the filter keep more.",
        )


def _rows(made: Made, rows: Tensor) -> Made:
    labels = None if made.labels is None else made.labels[rows]
    return replace(made, images=made.images[rows], labels=labels)
