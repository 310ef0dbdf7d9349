"""HESSO-CRIC: before units decay for good, trial decays find out which ones are missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.passes.prune._oto.hesso import Hesso, decay
from graphwright.passes.prune._oto.options import OtoSettings
from graphwright.passes.prune._oto.units import Tensors, Units

RATIOS = (0.25, 0.5, 0.75)
"""Shares of a group that are set to zero to see what the loss does."""
LOSS_WEIGHT = 1.0


def probe_steps(groups: int) -> int:
    """Steps that probing takes: one to set units to zero and one to see, per group and share."""
    return 2 * len(RATIOS) * groups


class HessoCric(Hesso):
    """Chen et al. 2024, "HESSO", algorithm 2: corrective redundancy identification cycles.

    1. From `start` on, for each group and ratio: the lowest units are zero for one step, whose loss
       over the loss at `start` is noted. The weights stay those of `start`.
    2. Cycles of `sampling_steps`: the violating units (first those with the lowest scores, then
       those that got low scores while others decayed and were not tried before) decay to zero,
       and scores are collected at every step. Each begins with the weights of `start`. The last is
       the one after which nobody new is low, or the `max_cycles`-th.
    3. The final score is the mean of all collected ones, and the group's mean loss ratio over its
       number of units. The lowest decay from the weights of `start`, as in HESSO.
    """

    needs_loss = True

    def __init__(self, units: Units, settings: OtoSettings) -> None:
        super().__init__(units, settings)
        self.probes = probe_steps(len(units.groups))
        self.kept: dict[str, Tensor] = {}
        self.reference = 1.0
        self.losses: list[list[float]] = [[] for _ in units.groups]
        self.total = np.zeros(units.count)
        self.samples = 0
        self.violating, self.trial, self.tried = (torch.zeros_like(self.pruned) for _ in range(3))
        self.decided_at = -1

    def looks_at(self, step: int) -> bool:
        return step >= self.settings.start and self.decided_at < 0

    def before(self, step: int, x: Tensors, loss: float | None) -> None:
        super().before(step, x, loss)
        k = step - self.settings.start
        if not self.looks_at(step):
            return
        assert loss is not None  # `needs_loss` says so
        if k == 0:
            self.kept = {name: value.detach().clone() for name, value in x.items()}
            self.reference = loss if loss else 1.0
        if k < self.probes and k % 2:
            self.losses[k // (2 * len(RATIOS))].append(loss / self.reference)

    @torch.no_grad()
    def after(self, step: int, x: Tensors, lr: Mapping[str, float]) -> None:
        k = step - self.settings.start
        if self.looks_at(step):
            scored = self.hesso_scores(self.old, self.direction(x, lr))
            self.old = {}
            if k < self.probes:
                self._collect(scored)
                self._probe(k, x, scored)
            else:
                self._sample(step, k - self.probes, x, scored)
        if self.decided_at >= 0 and step - self.decided_at < self.settings.steps:
            self.shrink(x, step - self.decided_at, self.settings.steps)
        self.units.clear(x, self.pruned)

    def _collect(self, scored: np.ndarray) -> None:
        self.total += scored
        self.samples += 1

    def _probe(self, k: int, x: Tensors, scored: np.ndarray) -> None:
        self._restore(x)
        if k % 2:
            return
        group, ratio = divmod(k // 2, len(RATIOS))
        flags = [np.zeros(g.units, bool) for g in self.units.groups]
        own = self.units.by_group(scored)[group]
        count = max(1, int(len(own) * RATIOS[ratio]))
        flags[group][np.argsort(own, kind="stable")[:count]] = True
        self.fade(x, torch.from_numpy(np.concatenate(flags)), 0.0)

    def _sample(self, step: int, k: int, x: Tensors, scored: np.ndarray) -> None:
        cycle, within = divmod(k, self.settings.sampling_steps)
        if within == 0:
            new = self._lowest(scored) if cycle == 0 else self.trial & ~self.tried
            self._restore(x)
            if cycle and (not bool(new.any()) or cycle == self.settings.max_cycles):
                self._decide(step)
                return
            self.violating, self.tried = new, self.tried | new
            self.trial = torch.zeros_like(new)
        self._collect(scored)
        self.trial = (self.trial | self._lowest(scored)) & ~self.tried
        self.fade(x, self.violating, decay(within, self.settings.sampling_steps))

    def _lowest(self, scored: np.ndarray) -> Tensor:
        return self.lowest(scored, self.wanted)

    def _decide(self, step: int) -> None:
        self.redundant = self.lowest(self.final_scores(), self.wanted)
        self.decided_at, self.kept = step, {}

    def final_scores(self) -> np.ndarray:
        """Mean of the collected scores, and what the loss says of each group."""
        parts = self.units.by_group(self.total / max(1, self.samples))
        for part, losses in zip(parts, self.losses, strict=True):
            if losses:
                part += LOSS_WEIGHT * float(np.mean(losses)) / len(part)
        return np.concatenate(parts)

    def _restore(self, x: Tensors) -> None:
        for name, value in self.kept.items():
            x[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(), "kept": self.kept, "reference": self.reference,
            "losses": self.losses, "total": torch.from_numpy(self.total), "samples": self.samples,
            "violating": self.violating, "trial": self.trial, "tried": self.tried,
            "decided_at": self.decided_at,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.kept = {name: value.clone() for name, value in state["kept"].items()}
        self.reference, self.samples = float(state["reference"]), int(state["samples"])
        self.losses = [list(part) for part in state["losses"]]
        self.total = state["total"].numpy().copy()
        self.violating, self.trial = state["violating"].clone(), state["trial"].clone()
        self.tried, self.decided_at = state["tried"].clone(), int(state["decided_at"])
