"""Parts shared by the three sparse optimizers: their schedule, their choice of units, their
state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.passes.prune._oto.options import OtoSettings
from graphwright.passes.prune._oto.units import Tensors, Units
from graphwright.passes.prune._units.scores import Sums, scores
from graphwright.passes.prune._units.select import Selection


class Shrink(ABC):
    """Acts around the steps of an ordinary optimizer, whatever its rule.

    `before` is called with the gradients, `after` when the optimizer has moved the parameters. The
    direction d of the step is what it moved by, over the learning rate: momentum, second moments
    and weight decay are in it.

    Attributes:
        units: all units that may go.
        pruned: flag per unit, zero for good.
        redundant: flag per unit, on the way there.
    """

    needs_loss = False

    def __init__(self, units: Units, settings: OtoSettings) -> None:
        self.units, self.settings = units, settings
        self.pruned = torch.zeros(units.count, dtype=torch.bool)
        self.redundant = torch.zeros(units.count, dtype=torch.bool)
        self.old: dict[str, Tensor] = {}

    @property
    def wanted(self) -> int:
        """Units that are to be zero: floor(sparsity * N)."""
        return int(np.floor(self.settings.sparsity * self.units.count + 1e-9))

    def before(self, step: int, x: Tensors, loss: float | None) -> None:
        """Called before the optimizer's step.

        Args:
            step: counted from 0.
            x: live parameters by name, with their gradients.
            loss: of this step, where it is known.
        """
        del loss
        if self.looks_at(step):
            self.old = {name: x[name].detach().clone() for name in self.units.names}

    @abstractmethod
    def looks_at(self, step: int) -> bool:
        """Whether this step's direction is needed."""

    @abstractmethod
    def after(self, step: int, x: Tensors, lr: Mapping[str, float]) -> None:
        """Called after the optimizer's step, without gradients.

        Args:
            step: as in `before`.
            x: live parameters by name.
            lr: learning rate of each of them.
        """

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint; tensors and numbers."""
        return {"pruned": self.pruned, "redundant": self.redundant}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.pruned = state["pruned"].clone()
        self.redundant = state["redundant"].clone()

    # ---- for the subclasses

    def direction(self, x: Tensors, lr: Mapping[str, float]) -> dict[str, Tensor]:
        """d = (old - new) / lr; zero where the learning rate is."""
        return {
            name: (old - x[name].detach()) / lr[name] if lr[name] else torch.zeros_like(old)
            for name, old in self.old.items()
        }

    def fade(self, x: Tensors, flags: Tensor, factor: float) -> None:
        """Multiplies the flagged units by a factor, in place."""
        ones = torch.ones(self.units.count, dtype=torch.float64)
        self.units.scale(x, ones.masked_fill(flags, factor))

    def hesso_scores(self, x: Tensors, d: Tensors) -> np.ndarray:
        """HESSO's score of every unit, low for redundant ones."""
        xx, xd, dd = (part.numpy() for part in self.units.sums((x, x), (x, d), (d, d)))
        sign = -1.0 if self.settings.compat else 1.0
        sums = Sums(xx, dd, sign * xd, self.units.sizes.numpy())
        return scores("hesso", sums, np.arange(self.units.count))

    def lowest(self, scored: np.ndarray, count: int) -> Tensor:
        """Flags of `count` units: those already pruned, and the lowest scores."""
        return lowest(self.units, scored, count, self.pruned, self.settings.group_divisible)


def lowest(units: Units, scored: np.ndarray, count: int, first: Tensor, divisible: int) -> Tensor:
    """Flags of `count` units: those of `first`, then the lowest scores.

    A group keeps a multiple of `divisible`, rounded up, and at least one of these; no dimension of
    the program is left empty. Equal scores are told apart by the unit's number.
    """
    if not np.isfinite(scored).all():
        raise ArgumentError("a unit's score is no finite number", where="prune.otov2",
                            fix="The weights or their gradients hold NaN or infinity.")  # fmt: skip
    order = np.lexsort((np.arange(units.count), scored, ~first.numpy()))
    ranks = np.empty(units.count)
    ranks[order] = np.arange(units.count)
    selection = Selection(
        units.analysis,
        units.groups,
        units.by_group(ranks),
        divisible,
        [1] * len(units.groups),
        by_group=False,
    )
    chosen = selection.choose(lambda removed: float(removed.sum()), float(count))
    flags = [np.isin(np.arange(g.units), u) for g, u in zip(units.groups, chosen, strict=True)]
    return torch.from_numpy(np.concatenate(flags)) | first


def check_reachable(units: Units, settings: OtoSettings) -> None:
    """Raises ArgumentError when the limits per group keep more units than the target leaves."""
    none = torch.zeros(units.count, dtype=torch.bool)
    most = int(lowest(units, np.zeros(units.count), units.count, none,
                      settings.group_divisible).sum())  # fmt: skip
    if most / units.count < settings.sparsity - 0.02:
        raise ArgumentError(
            f"sparsity {settings.sparsity} cannot be reached: {most / units.count:.3f} is the most",
            fix="Lower it or group_divisible, or widen targets.",
        )
