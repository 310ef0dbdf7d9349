"""Steps on images: Adam, and P12's controllers of the step and of the weight between two losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RATE = 0.01
"""How far a step follows what the verifier says of it."""

LEAST, MOST = 1e-4, 0.5
"""Bounds of an adaptive step."""


@dataclass
class Adam:
    """The direction of Adam, without the step: what controllers look at before it is taken.

    Source: Kingma and Ba 2015; P25 takes the decay rates (0.5, 0.9).
    """

    betas: tuple[float, float] = (0.5, 0.9)
    eps: float = 1e-8
    count: int = 0
    moments: list[Tensor] = field(default_factory=list)

    def direction(self, gradient: Tensor) -> Tensor:
        """The update at learning rate 1, to be taken off; in the gradient's shape."""
        if not self.moments:
            self.moments = [torch.zeros_like(gradient) for _ in range(2)]
        self.count += 1
        first, second = self.moments
        first.lerp_(gradient, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        corrected = second / (1 - self.betas[1] ** self.count)
        return first / (1 - self.betas[0] ** self.count) / (corrected.sqrt() + self.eps)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "moments": [moment.cpu() for moment in self.moments]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.count = state["count"]
        self.moments = [moment.to(device) for moment in state["moments"]]


def cosine(lr: float, iteration: int, iterations: int) -> float:
    """lr (1 + cos(pi t / T)) / 2."""
    return lr * (1 + math.cos(math.pi * iteration / iterations)) / 2


def adaptive_step(lr: float, verifier: Tensor, direction: Tensor) -> Tensor:
    """One step of ascent of the verifier on the learning rate, from `lr`, for every image.

    lr - 0.01 <f', d>, between 1e-4 and 0.5: -<f', d> is the derivative by lr of f(x - lr d).

    Args:
        lr: the step to start from; P12 has a constant, here it is the schedule's.
        verifier: (batch, ...), gradient of what a verifier scores the images with.
        direction: (batch, ...), the update that is taken off at a rate of 1.

    Returns:
        (batch, 1, ...), a step per image.

    Source: P12, Adaptive-eta. Its released code starts every step from the same 0.1.
    """
    products = (verifier * direction).flatten(1).sum(1)
    steps = (lr - RATE * products).clamp(LEAST, MOST)
    return steps.view(-1, *[1] * (direction.dim() - 1))


@dataclass
class AdaptiveWeight:
    """The share gamma of the first of two losses, moved so that the verifier's score rises.

    d gamma = <f', lr (g_1 - g_2)>; gamma goes one step of Adam against it, and stays in [0, 1].

    Source: P12, Adaptive-gamma: from 0.5, decay rates (0.9, 0.999).
    """

    gamma: float = 0.5
    adam: Adam = field(default_factory=lambda: Adam(betas=(0.9, 0.999)))

    def update(self, lr: float, verifier: Tensor, first: Tensor, second: Tensor) -> float:
        """The share after a step at rate `lr`, of gradients (batch, ...)."""
        slope = lr * (verifier * (first - second)).double().sum()
        moved = lr * float(self.adam.direction(slope))
        self.gamma = min(1.0, max(0.0, self.gamma - moved))
        return self.gamma

    def state_dict(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.gamma = state["gamma"]
        self.adam.load_state_dict(state["adam"], device)
