"""The integer program of bit allocation: one width per layer, least loss within a budget."""

from __future__ import annotations

import numpy as np

from graphwright.ir.errors import ArgumentError


def allocate(loss: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    """The choice per layer that minimizes the sum of losses within the budget.

    minimize sum x[l, b] loss[l, b] subject to sum_b x[l, b] = 1, x binary, and
    sum x[l, b] cost[l, b] <= budget (P47, equations 6-9), solved exactly by HiGHS.

    Args:
        loss: (layers, choices), increase of the loss when only that layer is changed.
        cost: (layers, choices), in the unit of the budget.
        budget: most that all layers together may cost.

    Returns:
        (layers,) index of each layer's choice.

    Raises:
        ArgumentError: the cheapest choices cost more than the budget; says how much they do.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, choices = loss.shape
    least = float(cost.min(1).sum())
    if least > budget * (1 + 1e-9):
        raise ArgumentError(
            f"the budget of {budget:g} cannot be met: the cheapest choices cost {least:g}",
            fix="Raise it, allow fewer bits, or quantize more layers.",
        )
    one_each = np.kron(np.eye(layers), np.ones(choices))
    unit = max(float(cost.max()), 1e-30)
    size = float(loss.max()) or 1.0
    found = milp(
        loss.ravel() / size,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost.ravel()[None] / unit, -np.inf, budget * (1 + 1e-9) / unit),
        ],
        integrality=np.ones(layers * choices),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if not found.success:
        raise ArgumentError(f"bit allocation failed: {found.message}")
    return np.asarray(found.x.reshape(layers, choices).argmax(1))
