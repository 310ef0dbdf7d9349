"""The best evaluation so far, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Best:
    """Evaluations so far; lower is better, and one that is no number is worse than any.

    Attributes:
        patience: evaluations without a better one after which training ends; None for never.
        keep: whether the tensors of the best evaluation are kept.
    """

    patience: int | None
    keep: bool
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    step: int | None = None
    value: float = math.inf
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, step: int, value: float, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        """Takes the evaluation after `step` steps; whether it is the best, and `tensors` were
        copied to be kept."""
        self.evaluations.append((step, value))
        if not (self.step is None or value < self.value or math.isnan(self.value)):
            return False
        self.step, self.value = step, value
        if self.keep:
            self.tensors = {name: tensor.cpu().clone() for name, tensor in tensors}
        return self.keep

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were all no better than an earlier one."""
        if self.patience is None or self.step is None:
            return False
        return sum(step > self.step for step, _ in self.evaluations) >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "evaluations": [list(entry) for entry in self.evaluations],
            "step": self.step,
            "value": self.value,
            "tensors": self.tensors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.evaluations = [(int(step), float(value)) for step, value in state["evaluations"]]
        self.step, self.value, self.tensors = state["step"], state["value"], dict(state["tensors"])
