"""DHSPG: a penalty that shrinks redundant units, and a projection onto zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.passes.prune._oto.options import OtoSettings
from graphwright.passes.prune._oto.shrink import Shrink
from graphwright.passes.prune._oto.units import Tensors, Units


def saliency(xx: np.ndarray, xg: np.ndarray, gg: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Redundancy of every unit, high for redundant ones.

    0.5 * normalize(cos(-x, -g)) + 0.5 * normalize(1 / (||x|| / n + 1e-6)), each divided by its L2
    norm over all units: a descent step shrinks the unit, and its values are small.

    Args:
        xx: ||x||^2 by unit.
        xg: x . g, with the gradient g.
        gg: ||g||^2.
        n: number of values.
    """
    cosine = xg / (np.sqrt(xx * gg) + 1e-12)
    small = 1.0 / (np.sqrt(xx) / n + 1e-6)
    parts = [part / (np.linalg.norm(part) + 1e-8) for part in (cosine, small)]
    return np.asarray(0.5 * parts[0] + 0.5 * parts[1])


def interval(xx: Tensor, xd: Tensor, dd: Tensor) -> tuple[Tensor, Tensor]:
    """(lo, hi) between which lambda shrinks ||x|| and keeps a descent direction, where x . d < 0.

    lo = -(x . d) / ||x||, hi = -||d||^2 ||x|| / (x . d).
    """
    norm = xx.sqrt()
    return -xd / norm, -dd * norm / xd


def penalties(xx: Tensor, xd: Tensor, dd: Tensor, settings: OtoSettings) -> Tensor:
    """lambda of every unit.

    Where the step shrinks the unit by itself (x . d >= 0): the smallest one. Elsewhere amplify * lo
    within [penalty, hat_coefficient * penalty], or the middle of (lo, hi) if that is not inside.

    Source: OTOv2, algorithm 3 and its appendix; the upper clip may fall below lo, which the
    interval then rules out too.
    """
    least = settings.penalty
    lo, hi = interval(xx, xd, dd)
    lam = (settings.amplify * lo).clamp(least, settings.hat_coefficient * least)
    lam = torch.where((lam >= hi) | (lam <= lo), (lo + hi) / 2, lam)
    return torch.where((xd < 0) & (xx > 0), lam, torch.full_like(xx, least))


class Dhspg(Shrink):
    """Dual half-space projected gradient; Chen et al. 2023, "OTOv2", algorithm 3.

    At `start` the units with the highest saliency become redundant. From then on these are pulled
    towards zero, x <- x - lr * (d + lambda * x / ||x||), and set to zero where the result leaves
    the half-space {z: z . x >= epsilon * ||x||^2}. That ends when the target is reached.
    """

    def __init__(self, units: Units, settings: OtoSettings) -> None:
        super().__init__(units, settings)
        self.chosen = False
        self.by_gradient: tuple[Tensor, Tensor] | None = None

    @property
    def done(self) -> bool:
        """Whether enough units are zero."""
        return int(self.pruned.sum()) >= self.wanted

    def looks_at(self, step: int) -> bool:
        return step >= self.settings.start and not self.done

    def before(self, step: int, x: Tensors, loss: float | None) -> None:
        super().before(step, x, loss)
        if self.looks_at(step) and not self.chosen:
            gradients = {}
            for name in self.units.names:
                gradient = x[name].grad
                gradients[name] = torch.zeros_like(x[name]) if gradient is None else gradient
            xx, xg, gg = self.units.sums((x, x), (x, gradients), (gradients, gradients))
            self._choose(xx, xg, gg)

    def _choose(self, xx: Tensor, xg: Tensor, gg: Tensor) -> None:
        s = self.settings
        found = saliency(xx.numpy(), xg.numpy(), gg.numpy(), self.units.sizes.numpy())
        share = min(s.sparsity + s.tolerance, 0.999)
        count = int(np.floor(share * self.units.count + 1e-9))
        self.redundant = self.lowest(-found, count) & ~self.pruned
        self.chosen = True

    @torch.no_grad()
    def after(self, step: int, x: Tensors, lr: Mapping[str, float]) -> None:
        if self.looks_at(step):
            self._pull(x, lr)
            self._project(x)
            self.old = {}
        self.units.clear(x, self.pruned)

    def _pull(self, x: Tensors, lr: Mapping[str, float]) -> None:
        old, d = self.old, self.direction(x, lr)
        xx, xd, dd = self.units.sums((old, old), (old, d), (d, d))
        lam = penalties(xx, xd, dd, self.settings)
        share = torch.where(self.redundant & (xx > 0), lam / xx.sqrt(), 0.0)
        for slot, factor in self.units.factors(x, share, 0.0):
            x[slot.name].sub_(lr[slot.name] * factor * old[slot.name])

    def _project(self, x: Tensors) -> None:
        inner, xx = self.units.sums((x, self.old), (self.old, self.old))
        outside = self.redundant & (inner < self.settings.epsilon * xx)
        self.pruned |= outside | (self.redundant & (xx == 0))
        self.redundant &= ~self.pruned

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "chosen": self.chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.chosen = bool(state["chosen"])
