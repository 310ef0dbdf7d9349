"""An exponential moving average of what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from graphwright.ir.tune.working import Working


class Average:
    """Averages of the trained parameters and running statistics of a program in training.

    Source: the warm-up min(decay, (1 + t) / (10 + t)) is that of TensorFlow's
    `ExponentialMovingAverage`.
    """

    def __init__(self, working: Working, decay: float) -> None:
        """Starts at the values as they are."""
        self.working, self.decay, self.steps = working, decay, 0
        self.values = {name: tensor.clone() for name, tensor in working.tensors()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the values behind a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in self.working.tensors():
            average = self.values[name]
            if average.is_floating_point():
                average.lerp_(tensor, 1 - decay)
            else:
                average.copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages in the place of the values, for an evaluation."""
        kept = {name: tensor.clone() for name, tensor in self.working.tensors()}
        self.working.load(self.values)
        try:
            yield
        finally:
            self.working.load(kept)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": self.steps, "values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.steps = int(state["steps"])
        for name, value in state["values"].items():
            self.values[name].copy_(value)
