"""HESSO: picks redundant units by a score, and lets them decay to exact zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphwright.passes.prune._oto.options import OtoSettings
from graphwright.passes.prune._oto.shrink import Shrink
from graphwright.passes.prune._oto.units import Tensors, Units


def decay(step: int, duration: int) -> float:
    """(D - t - 1) / (D - t): after D such factors, for t = 0 to D - 1, exactly zero is left."""
    return (duration - step - 1) / (duration - step)


def targets_of_periods(wanted: int, periods: int) -> list[int]:
    """Units that are redundant by the end of every period: even shares, the remainder last."""
    share = wanted // periods
    return [share * (period + 1) for period in range(periods - 1)] + [wanted]


class Hesso(Shrink):
    """Chen et al. 2024, "HESSO", algorithm 1.

    In the first step of every period the lowest-scored units of those left become redundant; each
    step of the period multiplies them by `decay`. Units that reached zero are held there.
    """

    def __init__(self, units: Units, settings: OtoSettings) -> None:
        super().__init__(units, settings)
        self.duration = settings.steps // settings.periods
        self.targets = targets_of_periods(self.wanted, settings.periods)

    def _place(self, step: int) -> tuple[int, int]:
        """(period, step within it)."""
        return divmod(step - self.settings.start, self.duration)

    def looks_at(self, step: int) -> bool:
        period, within = self._place(step)
        return 0 <= period < self.settings.periods and within == 0

    @torch.no_grad()
    def after(self, step: int, x: Tensors, lr: Mapping[str, float]) -> None:
        period, within = self._place(step)
        if 0 <= period < self.settings.periods:
            if within == 0:
                scored = self.hesso_scores(self.old, self.direction(x, lr))
                self.redundant = self.lowest(scored, self.targets[period]) & ~self.pruned
                self.old = {}
            self.shrink(x, within, self.duration)
        self.units.clear(x, self.pruned)

    def shrink(self, x: Tensors, within: int, duration: int) -> None:
        """One step of decay of the redundant units; the last one makes them pruned."""
        self.fade(x, self.redundant, decay(within, duration))
        if within == duration - 1:
            self.pruned |= self.redundant
            self.redundant = torch.zeros_like(self.redundant)
