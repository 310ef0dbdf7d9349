"""An order of channels in which neighbours are alike: a short path through their weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from graphwright.ir.channels import ChannelGroup

Floats = np.ndarray[Any, np.dtype[np.float64]]

GAIN = 1e-9
"""Least relative gain for which a path is changed; less is rounding."""


def cities(group: ChannelGroup) -> Floats:
    """One row per unit: its slices of every parameter of the group, one behind the other.

    Returns:
        (units, values of a unit), in float64.
    """
    state = group.analysis.program.state
    weights = group.analysis.weights
    rows: list[Floats] = []
    tensors = {
        (m.parameter, m.dim): state[m.parameter].detach().double().movedim(m.dim, 0).numpy()
        for m in group.members
        if m.parameter in weights
    }
    for unit in range(group.units):
        slices = group.slices(unit)
        rows.append(np.concatenate([t[slices[key]].ravel() for key, t in tensors.items()]))
    return np.stack(rows)


def distances(group: ChannelGroup) -> Floats:
    """City-block distances between units (units, units)."""
    points = cities(group)
    found: Floats = cdist(points, points, "cityblock")
    return found


def path_length(distance: Floats, path: list[int]) -> float:
    """Length of an open path; the total variation of the weights along it."""
    return float(distance[path[:-1], path[1:]].sum())


def short_path(distance: Floats) -> list[int]:
    """A short open path through all points: the shortest Hamiltonian path, approximately.

    The nearest neighbour from the point with the smallest sum of distances, the given order too;
    each then shortened by 2-opt until no reversal of a part shortens it.

    Source: P48 (Yang et al. 2024, "Neural Metamorphosis"), its permutation by a travelling
    salesman with a point that is at distance 0 from all others, where the tour is opened.
    """
    count = len(distance)
    if count < 3:
        return list(range(count))
    starts = [list(range(count)), _nearest_neighbours(distance)]
    return min(
        (_two_opt(distance, path) for path in starts), key=lambda p: path_length(distance, p)
    )


def _nearest_neighbours(distance: Floats) -> list[int]:
    path = [int(distance.sum(1).argmax())]
    left = np.ones(len(distance), bool)
    left[path[0]] = False
    while left.any():
        nearest = int(np.where(left, distance[path[-1]], np.inf).argmin())
        path.append(nearest)
        left[nearest] = False
    return path


def _two_opt(distance: Floats, path: list[int]) -> list[int]:
    """Reverses parts of a path while that shortens it."""
    count = len(path)
    padded = np.zeros((count + 1, count + 1))  # the last point is at distance 0 from all others
    padded[:count, :count] = distance
    tour = np.array([count, *path, count])
    least = GAIN * max(path_length(distance, path), np.finfo(float).tiny)
    improved = True
    while improved:
        improved = False
        for start in range(1, count):
            before, first = tour[start - 1], tour[start]
            ends, behind = tour[start + 1 : -1], tour[start + 2 :]
            change = (
                padded[before, ends] + padded[first, behind]
                - padded[before, first] - padded[ends, behind]
            )  # fmt: skip
            best = int(change.argmin())
            if change[best] < -least:
                stop = start + 2 + best
                tour[start:stop] = tour[start:stop][::-1]
                improved = True
    return [int(point) for point in tour[1:-1]]
