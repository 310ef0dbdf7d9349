"""Ranges of a layer's weight and input, found without gradients: each scaled and shifted whole.

All rows of the weight share one scale and one shift, so that a layer has at most four unknowns, few
enough for the simplex of Nelder and Mead, which does not mind that rounding makes the error a
staircase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

STEP = 0.25
"""Size of the first simplex, in shares of the ranges. Scipy's own, 0.00025 where a number starts
at zero, is far less than a code: the search would find the error flat."""


@dataclass(frozen=True)
class Range:
    """[low, low + span], any number of them; the tensors are changed in place.

    Attributes:
        low, span: of one shape.
        shifts: whether `low` matters; a range around zero is told by its span.
    """

    low: Tensor
    span: Tensor
    shifts: bool


def search(ranges: Sequence[Range], error: Callable[[], float], iterations: int) -> float:
    """Sets span <- scale * span and low <- low + shift * span, for the least error.

    Args:
        ranges: where the search starts, at scale 1 and shift 0, and where it leaves its result.
        error: of the layer, with the ranges as they now are.
        iterations: at most so many moves of the simplex; it stops once it is smaller than 1e-4
            in every direction and in the error, relative to the error at the start.

    Returns:
        The error of the result: never above that of the start, which is a corner of the simplex.

    Source: Hubara et al. 2021, their code, which shifts by absolute amounts, searches on each
    hundred samples alone, and takes the mean of the points.
    """
    begin = [(r.low.detach().clone(), r.span.detach().clone()) for r in ranges]
    first = error()
    if iterations == 0 or first == 0.0:
        return first

    def place(point: NDArray[np.float64]) -> None:
        numbers = iter(point.tolist())
        with torch.no_grad():
            for r, (low, span) in zip(ranges, begin, strict=True):
                r.span.copy_(span * next(numbers))
                if r.shifts:
                    r.low.copy_(low + span * next(numbers))

    def objective(point: NDArray[np.float64]) -> float:
        place(point)
        return (error() / first) ** 2

    start = np.array([value for r in ranges for value in ([1.0, 0.0] if r.shifts else [1.0])])
    simplex = np.vstack([start, start + STEP * np.eye(len(start))])
    found = minimize(
        objective, start, method="Nelder-Mead",
        options={"initial_simplex": simplex, "maxiter": iterations, "xatol": 1e-4, "fatol": 1e-4},
    )  # fmt: skip
    place(found.x)
    return error()
