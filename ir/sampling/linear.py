"""LinearAG (P41): the prediction without a condition as a sum over earlier predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError

FULL, LINEAR, CONDITIONED = "full", "linear", "conditioned"

RIDGE = 1e-6
"""Share of the mean square added to the normal equations where they are singular."""


class LinearFit:
    """Least squares at one step of a trajectory, over all entries of all samples.

    The unknowns are one number per regressor, so that only their products are kept.

    Args:
        size: number of regressors.
    """

    def __init__(self, size: int) -> None:
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.right = torch.zeros(size, dtype=torch.float64)
        self.square = 0.0

    def add(self, regressors: Sequence[Tensor], wanted: Tensor) -> None:
        """Takes samples in; all tensors are of one shape."""
        stacked = torch.stack([r.double().flatten() for r in regressors])
        self.gram += stacked @ stacked.T
        self.right += stacked @ wanted.double().flatten()
        self.square += float(wanted.double().square().sum())

    def solved(self) -> Tensor:
        """The coefficients, [size] float64; with a small ridge where they are not determined."""
        scale = self.gram.diagonal().mean().clamp_min(1e-300)
        ranks = torch.linalg.matrix_rank(self.gram / scale, tol=1e-13, hermitian=True)
        if int(ranks) == len(self.gram):
            exact: Tensor = torch.linalg.solve(self.gram, self.right)
            return exact
        ridge = RIDGE * scale * torch.eye(len(self.gram), dtype=torch.float64)
        found: Tensor = torch.linalg.solve(self.gram + ridge, self.right)
        return found

    def residual(self, coefficients: Tensor) -> float:
        """Relative error of a choice of coefficients, ||fit - wanted|| / ||wanted||."""
        off = coefficients @ self.gram @ coefficients - 2 * coefficients @ self.right + self.square
        return float((off.clamp_min(0) / max(self.square, 1e-300)).sqrt())


def regressors(withs: Sequence[Tensor], withouts: Sequence[Tensor]) -> list[Tensor]:
    """Noise with the condition up to this step, oldest first, then without it up to the last."""
    if len(withs) != len(withouts) + 1:
        raise ArgumentError("the history of LinearAG lacks a step")
    return [*withs, *withouts]


def estimated(coefficients: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    """The noise without the condition."""
    total = coefficients[0] * parts[0]
    for coefficient, part in zip(coefficients[1:], parts[1:], strict=True):
        total = total + coefficient * part
    return total


def default_policy(steps: int) -> list[str]:
    """The paper's: every other step of the first half, then the condition alone."""
    half = steps // 2
    return [(FULL, LINEAR)[i % 2] if i < half else CONDITIONED for i in range(steps)]


def check_policy(policy: Sequence[str], steps: int, coefficients: Mapping[str, object]) -> None:
    """Refuses a policy that has no coefficients where it is linear, or history.

    Raises:
        ArgumentError: as said.
    """
    if len(policy) != steps:
        raise ArgumentError(f"the policy has {len(policy)} steps, the trajectory {steps}")
    for i, kind in enumerate(policy):
        if kind == LINEAR and (i == 0 or CONDITIONED in policy[:i] or str(i) not in coefficients):
            raise ArgumentError(
                f"step {i} cannot be linear: it needs what every step before predicted",
                fix="Let the first step be `full`, and no `conditioned` one come before.",
            )
