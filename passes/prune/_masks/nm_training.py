"""N:M masks in training: what the forward pass uses, and what its gradient becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from graphwright.ir.tune import Hook, Moment
from graphwright.passes.prune._masks.nm_decay import NmSchedule
from graphwright.passes.prune._masks.nm_rows import NmRows

Grad = Literal["masked", "ste"]


def masked(weight: Tensor, mask: Tensor, value: float, grad: Grad, pull: float = 0.0) -> Tensor:
    """The weight with what is outside the mask counted `value` times.

    Args:
        weight: W, any float shape.
        mask: M, boolean, of the same shape; no gradient flows to it.
        value: b in W (M + (1-M) b).
        grad: with g the gradient of the result, the weight's is g (M + (1-M) b) for `masked`, and
            g + pull (1-M) W for `ste`.
        pull: lambda of SR-STE.
    """
    factor = torch.full_like(weight, value, requires_grad=False).masked_fill_(mask, 1.0)
    if grad == "masked":
        return weight * factor
    straight: Tensor = _Straight.apply(weight, mask, factor, pull)  # type: ignore[no-untyped-call]
    return straight


class _Straight(torch.autograd.Function):
    """Straight-through estimator, with SR-STE's pull of pruned weights towards zero."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, factor: Tensor, pull: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.pull = pull
        return weight * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, mask = ctx.saved_tensors
        (gradient,) = gradients
        if ctx.pull:
            gradient = gradient + ctx.pull * weight.masked_fill(mask, 0.0)
        return gradient, None, None, None


class NmTraining(Hook):
    """Trains weights under N:M masks that every forward pass finds anew.

    Masks follow from the weights and the schedule from the step, so they are no state to keep.

    Attributes:
        total: steps that the run has at most; 0 before it starts.
    """

    counts_steps = True

    def __init__(
        self,
        rows: Mapping[str, NmRows],
        schedule: NmSchedule,
        grad: Grad,
        pull: float = 0.0,
        accumulate: int = 1,
    ) -> None:
        """Settings of the masked training.

        Args:
            rows: layout of every weight.
            schedule: pattern and mask value of each step.
            grad: as in `masked`.
            pull: as in `masked`; the step's gradient has it once, however many batches it has.
            accumulate: batches of a step.
        """
        self.rows, self.schedule, self.grad = rows, schedule, grad
        self.pull = pull / accumulate
        self.total = 0

    def on_parameters(self, at: Moment, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.total = at.total
        stage = self.schedule.at(at.step, at.total)
        if not torch.is_grad_enabled():
            # An evaluation measures what would come out if training ended here.
            masks = self.masks(values)
            return {**values, **{name: values[name] * mask for name, mask in masks.items()}}
        if stage is None:
            return values
        changed = {
            name: masked(
                values[name], rows.mask(values[name], stage.n, stage.m), stage.value,
                self.grad, self.pull,
            )
            for name, rows in self.rows.items()
        }  # fmt: skip
        return {**values, **changed}

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]

    def masks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of the final pattern for weights as they are."""
        n, m = self.schedule.final
        return {name: rows.mask(values[name], n, m) for name, rows in self.rows.items()}
