"""Iterative soft shrinkage in training: the smallest weights shrink a little after every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.tune import Hook, Moment

Pick = Callable[[str, Tensor, int | None], Tensor]
"""Boolean mask of the weights to prune, of (name, weight, step); exact where step is None, and
perhaps an estimate otherwise."""


class SoftShrinkage(Hook):
    """Multiplies the smallest weights by a factor below 1 after every step, then freezes a mask.

    Attributes:
        frozen: per weight, which entries are pruned for good; empty before.
        selections: selections made after the first one.
        left: entries that left the set from one selection to the next, of all weights together.
    """

    counts_steps = True

    def __init__(self, names: Sequence[str], pick: Pick, rho: float, share: float) -> None:
        """Settings of the shrinkage.

        Args:
            names: weights.
            pick: selects the entries of a weight.
            rho: factor of the selected entries; 0 for iterative hard thresholding.
            share: of the steps in which the set is selected anew.
        """
        self.names, self.pick, self.rho, self.share = tuple(names), pick, rho, share
        self.frozen: dict[str, Tensor] = {}
        self.selections = self.left = 0
        self._chosen: dict[str, Tensor] = {}

    def on_parameters(self, at: Moment, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if torch.is_grad_enabled():
            return values
        # An evaluation measures what would come out if training ended here.
        return {**values, **{n: values[n] * mask for n, mask in self.masks(values).items()}}

    @torch.no_grad()
    def after_step(self, at: Moment) -> None:
        last = min(round(self.share * at.total), at.total - 1)  # one step more, to stabilise
        if at.step > last:
            for name, pruned in self.frozen.items():
                at.parameters[name].masked_fill_(pruned.to(at.parameters[name].device), 0.0)
            return
        for name in self.names:
            weight = at.parameters[name]
            chosen = self.pick(name, weight, at.step)
            if name in self._chosen:
                self.left += int((self._chosen[name].to(weight.device) & ~chosen).sum())
            self._chosen[name] = chosen
            weight.mul_(torch.ones_like(weight).masked_fill_(chosen, self.rho))
        self.selections += at.step > 0
        if at.step == last:
            for name in self.names:
                self.frozen[name] = self.pick(name, at.parameters[name], None)
                at.parameters[name].masked_fill_(self.frozen[name], 0.0)

    def masks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Boolean masks of the entries that stay, for weights as they are.

        Entries that are frozen are zeros, the smallest there are: this finds them again.
        """
        return {name: ~self.pick(name, values[name], None) for name in self.names}

    def state_dict(self) -> dict[str, Any]:
        return {
            "frozen": self.frozen, "chosen": self._chosen,
            "selections": self.selections, "left": self.left,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.frozen, self._chosen = dict(state["frozen"]), dict(state["chosen"])
        self.selections, self.left = state["selections"], state["left"]
