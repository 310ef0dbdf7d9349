"""Lloyd's k-means on weighted vectors, without looking where nothing can have changed.

Every vector keeps a distance that no centroid but its own is within; centroids that move bring it
closer. As long as the own centroid is nearer still, it stays the nearest (Hamerly 2010, "Making
k-means even faster"). Late iterations, in which little moves, then cost little.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-6
"""Share of the squares that a squared distance in float32 may be off by."""

CHUNK = 1 << 17
"""Distances that are computed at a time: they stay in the cache of a core."""


class Clusters(NamedTuple):
    """The result of k-means.

    Attributes:
        centroids: (k, width); fewer than asked for where there are fewer distinct vectors.
        inertia: sum of weight * squared distance to the nearest centroid, in every iteration.
    """

    centroids: Tensor
    inertia: list[float]


def kmeans(
    vectors: Tensor,
    weight: Tensor,
    count: int,
    generator: torch.Generator,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> Clusters:
    """Centroids that make the weighted squared distance to the nearest one small.

    Starts at distinct vectors drawn at random. A centroid that loses all its vectors moves to the
    vector that adds most to the inertia, so that the inertia never grows.

    Args:
        vectors: (n, width) float.
        weight: (n,) float, positive.
        count: centroids wanted. With no more distinct vectors than that these are the result.
        generator: draws the start.
        iterations: at most so many.
        tolerance: ends when the inertia falls by less than this share of itself.
    """
    distinct = _distinct(vectors)
    if len(distinct) <= count:
        return Clusters(distinct, [0.0])
    start = torch.randperm(len(distinct), generator=generator)[:count]
    centroids = distinct[start.to(distinct.device)].clone()
    history: list[float] = []
    index, others = two_nearest(vectors, centroids)
    for _ in range(iterations):
        square = (vectors - centroids[index]).square().sum(1)
        # All other centroids are farther than `others`: only where the own one is, too, another
        # can be the nearest.
        doubtful = (square.sqrt() > others).nonzero().flatten()
        if len(doubtful):
            rows = vectors[doubtful]
            index[doubtful], others[doubtful] = two_nearest(rows, centroids)
            square[doubtful] = (rows - centroids[index[doubtful]]).square().sum(1)
        cost = square * weight
        history.append(float(cost.sum(dtype=torch.float64)))
        if len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]:
            break
        mass = torch.zeros(count, device=vectors.device).index_add_(0, index, weight)
        total = torch.zeros_like(centroids).index_add_(0, index, vectors * weight[:, None])
        before, centroids = (
            centroids,
            total / mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, None],
        )
        empty = (mass == 0).nonzero().flatten()
        if len(empty):
            centroids[empty] = vectors[cost.topk(len(empty)).indices]
        others -= _farthest_of_the_others((centroids - before).norm(dim=1), index)
    return Clusters(centroids, history)


def _farthest_of_the_others(moves: Tensor, index: Tensor) -> Tensor:
    """For every vector the longest move of a centroid that is not its own."""
    longest, places = moves.topk(min(2, len(moves)))
    return torch.where(index == places[0], longest[-1], longest[0])


def two_nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) index of the nearest centroid, and (n,) a distance that no other one is within."""
    half = centroids.square().sum(1) / 2
    step = max(1, CHUNK // len(centroids))
    found, seconds = [], []
    for part in vectors.split(step):
        distances = torch.addmm(half, part, centroids.T, alpha=-1)
        first = _smallest(distances)
        distances.scatter_(1, first[:, None], torch.inf)
        found.append(first)
        seconds.append(distances.gather(1, _smallest(distances)[:, None])[:, 0])
    size = vectors.square().sum(1)
    second = (size + 2 * torch.cat(seconds)).clamp(min=0)
    # |x|^2 + |c|^2 - 2 x c loses digits: the bound is held below what it may have lost.
    slack = ROUNDING * (size + half.max() * 2)
    return torch.cat(found), (second - slack).clamp(min=0).sqrt()


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """(n,): index of the nearest centroid of every vector."""
    half = centroids.square().sum(1) / 2
    step = max(1, CHUNK // len(centroids))
    # |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c): the first term does not depend on c
    parts = (torch.addmm(half, part, centroids.T, alpha=-1) for part in vectors.split(step))
    return torch.cat([_smallest(part) for part in parts])


def _smallest(distances: Tensor) -> Tensor:
    """Place of the smallest of each row; on a CPU by numpy, which is four times as fast."""
    if distances.device.type == "cpu":
        return torch.from_numpy(distances.numpy().argmin(1))
    return distances.argmin(1)


def _distinct(vectors: Tensor) -> Tensor:
    """The different rows, in an order that depends on their values alone."""
    rows = np.ascontiguousarray(vectors.detach().cpu().numpy())
    whole = rows.view([("", rows.dtype)] * rows.shape[1])
    first = np.unique(whole, return_index=True)[1]
    return vectors[torch.from_numpy(first).to(vectors.device)]
