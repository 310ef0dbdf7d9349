"""DSnoT of one matrix: pruned and kept weights trade places until the mean output is as it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.passes.prune._masks.patterns import Pattern


@dataclass(frozen=True)
class DsnotSettings:
    """Settings of the trade of places; the fields are options of prune.dsnot."""

    threshold: float = 0.1
    cycles: int = 50
    power: float = 1.0
    same_sign: bool = True
    never_worse: bool = False


@dataclass(frozen=True)
class Refined:
    """A mask after the trades.

    Attributes:
        keep: (rows, columns) boolean.
        before, after: (rows,) expected change of each output, summed over a sample.
        trades: how many weights came back, over all rows.
    """

    keep: Tensor
    before: Tensor
    after: Tensor
    trades: int


def refine(
    dense: Tensor,
    current: Tensor,
    keep: Tensor,
    total: Tensor,
    variance: Tensor,
    metric: Tensor,
    pattern: Pattern,
    settings: DsnotSettings,
) -> Refined:
    """Trades weights in every row, one pair a cycle, all rows at a time.

    e_r = sum_j (dense - current)_rj total_j is what the row's output lost on an average sample.
    A cycle brings back the pruned weight of e's sign with the largest |dense total| / variance^p,
    and drops a kept one of the other sign with the lowest metric; both bring e nearer to zero.
    A row stops for good when |e| is at most the threshold, when e would change its sign (the
    sign test), or when it has no such pair left. Under N:M the weight to drop is the one with the
    lowest metric in the group of the weight that comes back, whatever its sign; the row stops
    when that trade would change the sign of e. With `never_worse` a row also stops at a trade that
    would move e away from zero, which is no rule of the paper.

    Args:
        dense: (rows, columns), the values that come back.
        current: (rows, columns), zero where `keep` is False.
        keep: (rows, columns) boolean.
        total, variance: (columns,), see `Features`.
        metric: (rows, columns), of what is to be dropped first; never negative.
        pattern: N:M, or unstructured.
        settings: bounds.

    Source: Zhang et al. 2024, "Dynamic Sparse No Training", section 3, and its code.
    """
    grows, drops = dense * total, current * total
    e = ((dense - current) * total).sum(1)
    before, first_sign = e.clone(), e.sign()
    keep = keep.clone()
    depth = min(settings.cycles, dense.shape[1])
    priority = grows / _guarded(variance) ** settings.power
    above = _queue(-priority, ~keep & (grows > 0), depth)
    below = _queue(priority, ~keep & (grows < 0), depth)
    negative = _queue(metric, keep & (drops < 0), depth)
    positive = _queue(metric, keep & (drops > 0), depth)
    groups = _Groups(metric, keep, pattern) if pattern.m else None
    active = torch.ones_like(e, dtype=torch.bool)
    trades = 0
    for _ in range(settings.cycles):
        grown, may_grow = _next(above, below, e > 0)
        if groups is None:
            dropped, may_drop = _next(negative, positive, e >= 0)
        else:
            dropped, may_drop = groups.cheapest(grown)
        after = e - _at(grows, grown) + _at(drops, dropped)
        go = active & may_grow & may_drop & (e.abs() > settings.threshold)
        if settings.same_sign or groups is not None:
            go &= after.sign() == first_sign
        if settings.never_worse:
            go &= after.abs() <= e.abs()
        active = go
        if not bool(go.any()):
            break
        trades += int(go.sum())
        _set(keep, grown, go, True)
        _set(keep, dropped, go, False)
        _advance(above, go & (e > 0))
        _advance(below, go & (e <= 0))
        if groups is None:
            _advance(negative, go & (e >= 0))
            _advance(positive, go & (e < 0))
        else:
            groups.take(dropped, go)
        e = torch.where(go, after, e)
    return Refined(keep, before, e, trades)


def _guarded(variance: Tensor) -> Tensor:
    """Variances that can be divided by: a constant feature counts as a millionth of the mean."""
    mean = variance.mean()
    return variance.clamp_min(float(mean) * 1e-6) if float(mean) > 0 else torch.ones_like(variance)


@dataclass
class _Queue:
    """Column indices in the order they are to be used, per row, and how many are used up."""

    order: Tensor
    length: Tensor
    used: Tensor


def _queue(key: Tensor, eligible: Tensor, depth: int) -> _Queue:
    """The `depth` eligible columns of the lowest keys of each row; equal keys in column order."""
    order = torch.sort(key.masked_fill(~eligible, float("inf")), dim=1, stable=True).indices
    length = eligible.sum(1).clamp_max(depth)
    return _Queue(order[:, :depth].contiguous(), length, torch.zeros_like(length))


def _next(first: _Queue, second: _Queue, use_first: Tensor) -> tuple[Tensor, Tensor]:
    """The next column of each row, from one of two queues, and whether there is one."""
    picks = []
    for queue in (first, second):
        place = queue.used.clamp_max(queue.order.shape[1] - 1)
        picks.append((queue.order.gather(1, place[:, None])[:, 0], queue.used < queue.length))
    (a, has_a), (b, has_b) = picks
    return torch.where(use_first, a, b), torch.where(use_first, has_a, has_b)


def _advance(queue: _Queue, rows: Tensor) -> None:
    queue.used = queue.used + rows.long()


def _at(values: Tensor, columns: Tensor) -> Tensor:
    return values.gather(1, columns[:, None])[:, 0]


def _set(mask: Tensor, columns: Tensor, rows: Tensor, value: bool) -> None:
    picked = rows.nonzero()[:, 0]
    mask[picked, columns[picked]] = value


class _Groups:
    """The initially kept weights of every N:M group that may still be dropped."""

    def __init__(self, metric: Tensor, keep: Tensor, pattern: Pattern) -> None:
        self.m = pattern.m
        self.metric = metric.masked_fill(~keep, float("inf"))

    def cheapest(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest metric in the group of each row's column, and whether there is one."""
        start = columns // self.m * self.m
        places = start[:, None] + torch.arange(self.m, device=columns.device)
        lowest, inside = self.metric.gather(1, places).min(1)
        return start + inside, torch.isfinite(lowest)

    def take(self, columns: Tensor, rows: Tensor) -> None:
        """Used up: neither a dropped weight nor one that came back is dropped again."""
        picked = rows.nonzero()[:, 0]
        self.metric[picked, columns[picked]] = float("inf")
