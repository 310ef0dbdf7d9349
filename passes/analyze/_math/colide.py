"""CoLiDE: a weighted DAG and the scales of its noise from observations, found together.

X = W^T X + Z with W_ij the effect of variable i on variable j. The score is

    EV: tr(R) / (2 s) + d s / 2 + lambda |W|_1,                 R = (I - W)^T C (I - W),
    NV: sum_j R_jj / (2 s_j) + sum_j s_j / 2 + lambda |W|_1,

with C the covariance of the observations: convex in W and the scales together, so that lambda does
not have to follow the size of the noise. `restricted` knows where edges may be; `free` learns that
as well, under the penalty H = d log s - logdet(s I - W o W), which is 0 for DAGs alone.

Source: P81, Saboksayr et al. 2024, equations 4 to 7 and algorithm 1; the floor of the scales is the
paper's, which the released code leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Variance = Literal["equal", "own"]
"""Whether all variables share one noise scale (EV), or each has its own (NV)."""

FLOOR = 1e-2
"""Least noise scale, of the root mean square of the observations."""

TOLERANCE, ROUNDS = 1e-9, 2000
BETAS, EPS = (0.99, 0.999), 1e-8
"""Of Adam, as released."""


def covariance(x: Array) -> Array:
    """(d, d) of observations (n, d), centred on a copy."""
    centred = x - x.mean(0)
    found: Array = centred.T @ centred / len(x)
    return found


def scales(c: Array, w: Array, variance: Variance) -> Array:
    """(d,): the noise scales that minimize the score for these weights."""
    rest = np.eye(len(c)) - w
    spread = np.maximum(np.einsum("ij,ik,kj->j", rest, c, rest), 0)
    least = FLOOR * float(np.sqrt(np.trace(c) / len(c)))
    if variance == "equal":
        spread = np.full(len(c), spread.mean())
    found: Array = np.maximum(np.sqrt(spread), max(least, 1e-12))
    return found


def score(c: Array, w: Array, sigma: Array, penalty: float) -> float:
    """The score of weights (d, d) and scales (d,); equal scales make it EV's."""
    rest = np.eye(len(c)) - w
    spread = np.einsum("ij,ik,kj->j", rest, c, rest)
    return float((spread / sigma + sigma).sum() / 2 + penalty * np.abs(w).sum())


def score_gradient(c: Array, w: Array, sigma: Array, penalty: float) -> Array:
    """(d, d): of the score by the weights."""
    found: Array = -c @ (np.eye(len(c)) - w) / sigma + penalty * np.sign(w)
    return found


def acyclicity(w: Array, s: float) -> tuple[float, Array, Array]:
    """H, its gradient, and (s I - W o W)^-1, which has no negative entry in the domain of H."""
    d = len(w)
    inverse: Array = np.asarray(np.linalg.inv(s * np.eye(d) - w * w), np.float64)
    _, logdet = np.linalg.slogdet(s * np.eye(d) - w * w)
    return float(d * np.log(s) - logdet), 2 * w * inverse.T, inverse


def restricted(c: Array, support: npt.NDArray[np.bool_], penalty: float, variance: Variance) -> (
    tuple[Array, Array]
):  # fmt: skip
    """Weights (d, d) and scales (d,) with edges in a support alone: a concomitant lasso.

    The score is minimized by turns in the weights (coordinate descent) and in the scales (in closed
    form), until neither moves.

    Args:
        c: (d, d), covariance.
        support: (d, d), where an edge i to j may be; of a DAG, so that no penalty H is needed.
        penalty: lambda.
        variance: `equal` or `own`.
    """
    w = np.zeros_like(c)
    sigma = scales(c, w, variance)
    for _ in range(ROUNDS):
        before = w.copy()
        for j in range(len(c)):
            _descend(c, w, j, np.flatnonzero(support[:, j]), penalty * sigma[j])
        new = scales(c, w, variance)
        moved = max(float(np.abs(w - before).max(initial=0)), float(np.abs(new / sigma - 1).max()))
        sigma = new
        if moved < TOLERANCE:
            break
    return w, sigma


def _descend(c: Array, w: Array, j: int, parents: npt.NDArray[Any], threshold: float) -> None:
    """One round of coordinate descent over the weights into j, in place."""
    for i in parents:
        if c[i, i] <= 0:
            continue
        partial = c[i, j] - c[i] @ w[:, j] + c[i, i] * w[i, j]
        w[i, j] = np.sign(partial) * max(abs(partial) - threshold, 0.0) / c[i, i]


def free(
    c: Array, penalty: float, variance: Variance, *, steps: tuple[int, int] = (20000, 70000),
    lr: float = 3e-4, levels: Sequence[float] = (1.0, 0.9, 0.8, 0.7), threshold: float = 0.3,
) -> tuple[Array, Array]:  # fmt: skip
    """Weights and scales with edges anywhere: a path of problems mu_k score + H, each by Adam.

    Args:
        c, penalty, variance: as in `restricted`.
        steps: of every level but the last, and of the last.
        lr: of Adam; halved where a step would leave the domain of H.
        levels: s of each level; mu falls from 1 to a tenth from one to the next.
        threshold: smaller weights become 0, and then the smallest ones of cycles that are left.
    """
    w, sigma = np.zeros_like(c), scales(c, np.zeros_like(c), variance)
    for index, s in enumerate(levels):
        count = steps[1] if index == len(levels) - 1 else steps[0]
        w, sigma = _level(c, w, sigma, 0.1**index, s, penalty, variance, count, lr)
    w = np.where(np.abs(w) > threshold, w, 0.0)
    while has_cycle(w):
        w[np.abs(w) == np.abs(w[w != 0]).min()] = 0
    return w, sigma


def _level(
    c: Array, w: Array, sigma: Array, mu: float, s: float, penalty: float, variance: Variance,
    steps: int, lr: float,
) -> tuple[Array, Array]:  # fmt: skip
    first, second = np.zeros_like(w), np.zeros_like(w)
    for step in range(1, steps + 1):
        _, slope, _ = acyclicity(w, s)
        gradient = mu * score_gradient(c, w, sigma, penalty) + slope
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        unit = first / (1 - BETAS[0] ** step)
        unit /= np.sqrt(second / (1 - BETAS[1] ** step)) + EPS
        while (acyclicity(w - lr * unit, s)[2] < -1e-6).any():
            lr /= 2
        w = w - lr * unit
        np.fill_diagonal(w, 0)
        sigma = scales(c, w, variance)
    return w, sigma


def has_cycle(w: Array) -> bool:
    """Whether the edges with a weight form one."""
    left = w != 0
    while len(left):
        ends = ~left.any(1)
        if not ends.any():
            return True
        left = left[~ends][:, ~ends]
    return False


def total_effects(w: Array) -> Array:
    """(d, d): the effect of a change of i on j over all ways, (I - W)^-1; the diagonal is 1."""
    found: Array = np.asarray(np.linalg.inv(np.eye(len(w)) - w), np.float64)
    return found
