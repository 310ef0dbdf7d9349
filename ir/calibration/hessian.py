"""The second moments of a layer's input, and the factor of their inverse that updates need."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError

RETRIES = 3
"""Times that the damping is raised tenfold before a matrix counts as singular."""


class Hessian:
    """H = mean of x x^T over the rows of a layer's input: of ||x (w - w')^T||^2, up to a factor.

    Attributes:
        matrix: (groups, k, k) float32.
        mean: (groups, k) float32, mean of x.
        count: rows seen, of each group.
    """

    def __init__(self, matrix: Tensor, mean: Tensor, count: int = 0) -> None:
        self.matrix, self.mean, self.count = matrix, mean, count

    @property
    def square(self) -> Tensor:
        """(groups, k): mean of x^2."""
        return self.matrix.diagonal(dim1=1, dim2=2)

    def update(self, rows: Tensor) -> None:
        """Takes in rows (groups, n, k); a running mean, so that no sum outgrows float32."""
        n = rows.shape[1]
        if n == 0:
            return
        rows = rows.float()
        total = self.count + n
        kept = self.count / total
        self.matrix.baddbmm_(rows.transpose(1, 2), rows, beta=kept, alpha=1 / total)
        self.mean = self.mean * kept + rows.mean(1) * (n / total)
        self.count = total


def hessian(batches: Iterable[Tensor]) -> Hessian:
    """The Hessian of all rows; one batch (groups, n, k) is in memory at a time."""
    found: Hessian | None = None
    for rows in batches:
        if found is None:
            groups, _, k = rows.shape
            found = Hessian(
                torch.zeros(groups, k, k, device=rows.device),
                torch.zeros(groups, k, device=rows.device),
            )
        found.update(rows)
    if found is None:
        raise ModelError("the calibration data is empty", fix="Give at least one batch.")
    return found


def seen_or_even(stats: Hessian) -> Tensor:
    """(groups, k, k): the second moments, or, where no row was seen (an expert that no token went
    to), those of inputs that are all alike: nothing is spread then."""
    if stats.count:
        return stats.matrix
    return torch.eye(stats.matrix.shape[1], device=stats.matrix.device).expand_as(stats.matrix)


def inverse_factor(h: Tensor, damping: float = 0.01, name: str = "") -> tuple[Tensor, float]:
    """The upper Cholesky factor U of the inverse of a damped Hessian: (H + d I)^-1 = U^T U.

    Row i of U holds the update that an error in column i asks of the columns behind it (Frantar
    et al. 2022, "GPTQ", section 3.3, step 3). U is found without the inverse: with the order of
    rows and columns reversed, H = R R^T has an upper R, and U = R^-1.

    Args:
        h: (k, k); a dead feature (diagonal 0) is given the diagonal 1.
        damping: d as a share of the mean diagonal.
        name: of the layer, for the error.

    Returns:
        U (k, k) float32, and the damping that was used: raised tenfold up to three times.

    Raises:
        ModelError: H is not finite, or singular even so.
    """
    if not bool(torch.isfinite(h).all()):
        raise ModelError(
            f"the calibration data gives NaN or infinity at {name!r}",
            fix="Check the data, and the model on it.",
        )
    diagonal = h.diagonal()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    used = damping
    for _ in range(RETRIES + 1):
        damped = h.flip(0, 1)
        spots = damped.diagonal()
        spots[dead.flip(0)] = mean
        spots += used * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
            upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
            if bool(torch.isfinite(upper).all()):
                return upper, used
        used = max(used, 1e-6) * 10
    raise ModelError(
        f"the Hessian of {name!r} is singular, also with a damping of {used / 10:g}",
        fix="Give more calibration samples, or raise `damping`.",
    )
