"""AdaGrad-Norm: one step size for all parameters, from the norms of all gradients so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-10
"""Added to the root, as torch's Adagrad does: a gradient of zero moves nothing."""


class AdaGradNorm(torch.optim.Optimizer):
    """v <- v + ||g||^2; x <- x - lr g / sqrt(v), where g is the gradient of all parameters at once.

    Source: Ward et al. 2019, "AdaGrad stepsizes", algorithm 1, with b_0 = 0; used in P60. (P60's
    released code has a v for each row of a weight instead.)
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        """
        Args:
            groups: of parameters, with a `weight_decay` that is added to their gradients.
            lr: learning rate.
        """
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "sum": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Makes a step; `closure` is not used."""
        found: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                    found.append((group, parameter, gradient))
        added = sum(float(gradient.double().square().sum()) for _, _, gradient in found)
        total = self.param_groups[0]["sum"] + added
        for group in self.param_groups:
            group["sum"] = total
        for group, parameter, gradient in found:
            parameter.add_(gradient, alpha=-group["lr"] / (total**0.5 + EPSILON))
