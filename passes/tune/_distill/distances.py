"""How near a student is to its teachers: outputs, values inside, attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune.losses import relative_difference, wide

Distance = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Tensor]
"""Scalar of the values at nodes of the student and of the teacher, and a mask of rows or None."""


def mean_probabilities(logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """The mean over teachers of softmax(logits / temperature), (..., classes).

    It is not the softmax of mean logits.
    """
    return torch.stack([(wide(each) / temperature).softmax(-1) for each in logits]).mean(0)


def soft_labels(
    student: Tensor, probabilities: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 KL(p || softmax(s / T)), averaged over predictions.

    It is P33's loss, the cross entropy with p, up to the entropy of p, which no gradient reaches;
    so it is 0 where the student gives what the teachers give.

    Args:
        student: logits (..., classes).
        probabilities: p, of the same shape.
        temperature: T.
        mask: (...), 0 where a prediction does not count.

    Source: P33 (Shen & Savvides 2020, "MEAL V2"), eq. 2; T^2 as in Hinton et al. 2015.
    """
    logs = F.log_softmax(wide(student) / temperature, -1)
    each = (torch.xlogy(probabilities, probabilities) - probabilities * logs).sum(-1)
    return temperature**2 * _mean(each, mask)


def feature_distance(own: Sequence[Tensor], theirs: Sequence[Tensor], mask: Any) -> Tensor:
    """||a - b||^2 / ||b||^2 of a student's value a and a teacher's b."""
    a, b = own[0], theirs[0]
    if a.shape != b.shape:
        raise ArgumentError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared"
        )
    return relative_difference(wide(a), wide(b), mask)


def attention_map(features: Tensor) -> Tensor:
    """Sum over channels of squares, as a vector of length 1 for every sample.

    Args:
        features: (batch, channels, *sizes).

    Returns:
        (batch, positions).

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", eq. 1 with p = 2.
    """
    return F.normalize(wide(features).square().sum(1).flatten(1), dim=1)


def map_distance(own: Sequence[Tensor], theirs: Sequence[Tensor], mask: Any) -> Tensor:
    """||Q_a - Q_b||^2 of attention maps, averaged over samples; channels may differ in number."""
    return (attention_map(own[0]) - attention_map(theirs[0])).square().sum(1).mean()


def attention_logs(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Logarithms of the attention of every query over the keys.

    Args:
        query: (..., heads, rows, size).
        key: (..., heads or fewer, keys, size); each is read by as many queries' heads as there are.
        mask: boolean, True where a key is seen, or added to the scores; None for none.
        causal: whether a row sees only keys of its own number and below.
        scale: of the scores; 1 / sqrt(size) when None.

    Returns:
        (..., heads, rows, keys); the lowest number of the type where a key is not seen.
    """
    query, key = wide(query), wide(key)
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    lowest = torch.finfo(scores.dtype).min
    if mask is not None and mask.dtype != torch.bool:
        scores = (scores + mask).clamp_min(lowest)
    elif mask is not None:
        scores = scores.masked_fill(~mask, lowest)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, lowest)
    return F.log_softmax(scores, -1).clamp_min(lowest)


def attention_distance(
    own: Sequence[Tensor], theirs: Sequence[Tensor], mask: Tensor | None,
    *, causal: bool, scales: tuple[float | None, float | None],
) -> Tensor:  # fmt: skip
    """KL of a teacher's attention from a student's, averaged over samples, heads and rows.

    Args:
        own: query, key and, if there is one, mask.
        theirs: the same of the teacher.
        mask: (batch, rows), 0 where a row does not count.
        causal: of both.
        scales: of both.

    Source: Wang et al. 2020, "MiniLM", eq. 5.
    """
    logs = [
        attention_logs(values[0], values[1], values[2] if len(values) > 2 else None, causal, scale)
        for values, scale in zip((own, theirs), scales, strict=True)
    ]
    if logs[0].shape != logs[1].shape:
        shapes = tuple(tuple(each.shape) for each in logs)
        raise ArgumentError(f"attention of shapes {shapes[0]} and {shapes[1]} cannot be compared")
    p = logs[1].exp()
    each = (p * (logs[1] - logs[0])).sum(-1)
    if mask is not None and mask.shape == (each.shape[0], each.shape[-1]):
        mask = mask.view(each.shape[0], *(1,) * (each.dim() - 2), each.shape[-1]).expand_as(each)
    return _mean(each, mask)


def _mean(each: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != each.shape:
        return each.mean()
    weights = mask.to(each.dtype)
    return (each * weights).sum() / weights.sum().clamp_min(1)
