"""Least squares without negative coefficients, for many right-hand sides at once."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 256
"""Unknowns up to which every side is solved by an active set; its cost grows with their cube, for
every side anew."""

STEPS = 100
"""Most gradient steps of a larger problem."""

CLOSE = 1e-5
"""Change of the solution, relative to its size, at which they end."""


def solve_nonneg(left: Tensor, right: Tensor) -> Tensor:
    """argmin over S >= 0 of tr(S^T left S) / 2 - tr(right^T S).

    Small problems exactly (Lawson & Hanson), larger ones nearly, in float32, by accelerated
    projected gradients, all sides in one product (Beck & Teboulle 2009, with the restart of
    O'Donoghue & Candes 2015).

    Args:
        left: (n, n) positive definite, float64.
        right: (n, sides).
    """
    return _exact(left, right) if len(left) <= EXACT else _projected(left, right)


def _exact(left: Tensor, right: Tensor) -> Tensor:
    import numpy as np
    from scipy.optimize import nnls

    factor = torch.linalg.cholesky(left)  # the objective is |L^T s - L^-1 q|^2 / 2
    targets = torch.linalg.solve_triangular(factor, right, upper=False).cpu().numpy()
    matrix = np.ascontiguousarray(factor.T.cpu().numpy())
    sides = [nnls(matrix, column, maxiter=30 * len(matrix))[0] for column in targets.T]
    return torch.from_numpy(np.stack(sides, 1)).to(right) if sides else torch.zeros_like(right)


def _projected(left: Tensor, right: Tensor) -> Tensor:
    # Jacobi scaling: unknowns in units in which the diagonal is 1
    scale = left.diagonal().rsqrt()
    a, b = (left * scale[:, None] * scale).float(), (right * scale[:, None]).float()
    rate = 1 / _largest(a)
    s = torch.linalg.solve(a, b).clamp_min(0.0)
    ahead, momentum = s, 1.0
    for _ in range(STEPS):
        new = (ahead - rate * (a @ ahead - b)).clamp_min(0.0)
        step = new - s
        if float(((ahead - new) * step).sum()) > 0:  # the momentum went uphill
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * step
        s, momentum = new, following
        if float(step.norm()) <= CLOSE * float(s.norm()):
            break
    found: Tensor = s.double() * scale[:, None]
    return found


def _largest(a: Tensor) -> float:
    """An upper estimate of the largest eigenvalue: power iteration, and a little more."""
    v = torch.ones(len(a), dtype=a.dtype, device=a.device)
    for _ in range(50):
        v = a @ (v / v.norm())
    return 1.05 * float(v.norm())
