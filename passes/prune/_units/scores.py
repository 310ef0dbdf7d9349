"""Importance of a unit from its parameter slices x and a direction d (the loss gradient).

Sums over a unit run over all its slices, rows that produce the channel and columns that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.channels.analysis import Analysis
from graphwright.ir.channels.weights import weight_values
from graphwright.ir.graph.nodes import op_name

HESSO_WEIGHT = 0.2
"""Weight of each of the five criteria in HESSO."""


@dataclass(frozen=True)
class Sums:
    """Sums over the slices of each class: x.x, d.d, x.d, the number of values, |x|, and |x| and the
    number over batch norm scales alone. The last three may be left out."""

    xx: np.ndarray
    dd: np.ndarray
    xd: np.ndarray
    n: np.ndarray
    size: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scale: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scales: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def of(self, classes: np.ndarray) -> Sums:
        """The sums of some classes."""
        given = [getattr(self, f.name) for f in fields(self)]
        return Sums(*(values[classes] if len(values) else values for values in given))


def unit_sums(
    analysis: Analysis, gradients: Mapping[str, Tensor] | None, *, only_products: bool = False
) -> Sums:
    """Sums of every class, in float64.

    Args:
        analysis: of the program the parameters are taken from.
        gradients: by parameter name; None where no criterion reads them.
        only_products: x.d alone, which is what changes from batch to batch.
    """
    sums = Sums(*(np.zeros(analysis.count) for _ in fields(Sums)))
    scales = () if only_products else batch_norm_scales(analysis)
    weights = weight_values(analysis.program)
    wanted: dict[str, list[int]] = {}
    for (name, dim), classes in analysis.stored.items():
        if name in weights and not analysis.pinned[classes].all():
            wanted.setdefault(name, []).append(dim)
    for name, dims in wanted.items():
        x, d = weights[name], (gradients or {}).get(name)  # codes have no gradient
        pairs = [] if d is None else [(sums.xd, x, d)]
        if not only_products:
            pairs += [(sums.xx, x, x), (sums.size, x.abs(), torch.ones_like(x))]
            pairs += [] if d is None else [(sums.dd, d, d)]
        for total, left, right in pairs:
            for dim, values in _summed(left, right, dims).items():
                _add(total, analysis.stored[name, dim], values)
        if name in scales:
            _add(sums.scale, analysis.stored[name, 0], x.abs().double())
            _add(sums.scales, analysis.stored[name, 0], torch.ones_like(x).double())
        for dim in dims if not only_products else ():
            counts = np.bincount(analysis.stored[name, dim], minlength=analysis.count)
            sums.n[:] += counts * (x.numel() / x.shape[dim])
    return sums


def batch_norm_scales(analysis: Analysis) -> set[str]:
    """Names of the scales of batch norms."""
    return {
        str(node.args[1].target)
        for node in analysis.program.graph.nodes
        if op_name(node) == "batch_norm" and getattr(node.args[1], "op", "") == "get_attr"
    }


SLAB = 1 << 18
"""Values that are widened to float64 at a time: they stay in the processor's cache."""


def _summed(x: Tensor, y: Tensor, dims: list[int]) -> dict[int, Tensor]:
    """Sums of x * y over all dimensions but one, for each of `dims`, in float64.

    A slab of rows at a time, widened once for all of them.
    """
    total = {d: torch.zeros(x.shape[d], dtype=torch.float64, device=x.device) for d in dims}
    others = [d for d in range(x.dim()) if d not in dims]
    rows = max(1, SLAB * x.shape[0] // max(1, x.numel()))
    for start in range(0, x.shape[0], rows):
        values = x[start : start + rows].double()
        values = values.mul_(values if y is x else y[start : start + rows])
        if others:
            values = values.sum(others)
        for axis, d in enumerate(dims):
            rest = [a for a in range(len(dims)) if a != axis]
            own = values.sum(rest) if rest else values
            if d == 0:
                total[d][start : start + rows] = own
            else:
                total[d] += own
    return total


def _add(total: np.ndarray, classes: np.ndarray, values: Tensor) -> None:
    total += np.bincount(classes, values.cpu().numpy(), len(total))


def magnitude(sums: Sums) -> np.ndarray:
    """||x||."""
    return np.asarray(np.sqrt(sums.xx))


def l1(sums: Sums) -> np.ndarray:
    """Sum of |x|."""
    return np.asarray(sums.size)


def bn_scale(sums: Sums) -> np.ndarray:
    """Mean |gamma| of the batch norms on the channel (Liu et al. 2017, "Network Slimming")."""
    return np.asarray(sums.scale / np.maximum(sums.scales, 1))


def normalized_magnitude(sums: Sums) -> np.ndarray:
    """||x|| / n."""
    return np.asarray(np.sqrt(sums.xx) / (sums.n + 1e-6))


def cosine(sums: Sums) -> np.ndarray:
    """1 - cos(x, gradient): low where a descent step shrinks the unit (DHSPG's sign)."""
    return np.asarray(1.0 - sums.xd / (np.sqrt(sums.xx * sums.dd) + 1e-12))


def taylor(sums: Sums) -> np.ndarray:
    """|x.d|: first-order change of the loss when the unit is removed."""
    return np.asarray(np.abs(sums.xd))


def taylor2(sums: Sums) -> np.ndarray:
    """(x.d)^2 / 2: second-order change, with the squared gradient for the curvature."""
    return np.asarray(0.5 * sums.xd**2)


CRITERIA = {
    "magnitude": magnitude, "l1": l1, "normalized_magnitude": normalized_magnitude,
    "bn_scale": bn_scale, "cosine": cosine, "taylor": taylor,
}  # fmt: skip
OF_HESSO = (magnitude, normalized_magnitude, cosine, taylor, taylor2)
"""The criteria of HESSO. The last ranks units as the one before it does, and no more than that: it
has weight in the mean only."""
WITH_GRADIENT = ("cosine", "taylor", "hesso")


def scores(name: str, sums: Sums, units: np.ndarray) -> np.ndarray:
    """Score per unit, low for redundant ones.

    Args:
        name: a criterion, or `hesso`: the mean of all five, each divided by its L2 norm over all
            units of the model (Chen et al. 2024, "HESSO", default weights).
        sums: by class.
        units: classes of the units.
    """
    own = sums.of(units)
    if name != "hesso":
        return CRITERIA[name](own)
    parts = [criterion(own) for criterion in OF_HESSO]
    total = sum(HESSO_WEIGHT * part / (np.linalg.norm(part) + 1e-8) for part in parts)
    return np.asarray(total)
