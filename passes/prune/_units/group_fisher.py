"""Loss increase of whole units by the inverse empirical Fisher, without forming a matrix.

Removing the values Q of a unit, with the best move of all other values, increases a quadratic loss
by 1/2 w_Q ([F^-1]_QQ)^-1 w_Q (optimal brain surgeon for a group). M-FAC gives [F^-1]_QQ =
I / damp - V_Q^T D^-1 V_Q, with V_Q the unit's columns of the vectors v; by Woodbury its inverse is
damp I + damp^2 V_Q^T (D - damp V_Q V_Q^T)^-1 V_Q. So a unit of any size costs one m x m solve:

    1/2 (damp |w_Q|^2 + damp^2 a . (D - damp V_Q V_Q^T)^-1 a),    a = V_Q w_Q.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.tune.fisher import Fisher


def group_cost(vectors: Tensor, denominators: Tensor, damp: float, w: Tensor) -> float:
    """The increase for one unit.

    Args:
        vectors: (m, q) float64, columns of v.
        denominators: (m,) D.
        damp: lambda.
        w: (q,) values.
    """
    w = w.double()
    a = vectors @ w
    middle = torch.diag(denominators) - damp * (vectors @ vectors.T)
    found = damp * w.square().sum() + damp**2 * (a @ torch.linalg.solve(middle, a))
    return float(found) / 2


def unit_costs(
    groups: Sequence[ChannelGroup],
    parameters: dict[str, Tensor],
    buffer: Tensor,
    damp: float,
) -> list[np.ndarray]:
    """The increase for every unit of every group, with the full F of all parameters.

    A value that two slices of a unit share counts once.

    Args:
        groups: of one analysis.
        parameters: by name; the buffer's columns are theirs, flattened, in this order.
        buffer: (m, d) gradients.
        damp: lambda.
    """
    fisher = Fisher(buffer, damp)
    assert fisher.whole is not None
    b, denominators = (part[0] for part in fisher.whole)
    starts, start = {}, 0
    for name, p in parameters.items():
        starts[name], start = start, start + p.numel()
    values = torch.cat([p.detach().flatten() for p in parameters.values()])
    costs = []
    for group in groups:
        found = np.zeros(group.units)
        for unit in range(group.units):
            places = _places(group, unit, parameters, starts)
            vectors = b @ buffer[:, places].double()
            found[unit] = group_cost(vectors, denominators, damp, values[places])
        costs.append(found)
    return costs


def _places(
    group: ChannelGroup, unit: int, parameters: dict[str, Tensor], starts: dict[str, int]
) -> Tensor:
    """Columns of a unit's values, each once."""
    inside: dict[str, list[tuple[int, Tensor]]] = {}
    for (name, dim), positions in group.slices(unit).items():
        if name in parameters:
            inside.setdefault(name, []).append((dim, torch.from_numpy(positions)))
    found = []
    for name, slices in inside.items():
        number = torch.arange(parameters[name].numel()).reshape(parameters[name].shape)
        parts = [number.index_select(dim, positions).flatten() for dim, positions in slices]
        places = parts[0] if len(parts) == 1 else torch.cat(parts).unique()
        found.append(places + starts[name])
    return torch.cat(found)
