"""Steps of a guided teacher, each sample on levels of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from graphwright.ir.sampling.guidance import over
from graphwright.ir.sampling.solvers.base import Prediction
from graphwright.ir.sampling.training import Levels, Training, said
from graphwright.ir.tune.hooks import Values


class GuidedHeun:
    """Heun's method in s / a on the frozen denoiser, guided at both of its stages."""

    def __init__(self, training: Training, device: torch.device) -> None:
        """Takes the denoiser."""
        self.training = training
        self.teacher = training.teacher(training.program, device)

    def solved(
        self, x: Tensor, ways: Sequence[Levels], given: Values, scales: Tensor | None
    ) -> Tensor:
        """Samples at the last of some levels.

        Args:
            x: [batch, ...] at the first.
            ways: levels, the first one noisiest; none without signal or noise.
            given: conditions.
            scales: [batch] of guidance; None for none.
        """
        for here, there in pairwise(ways):
            first = self.direction(x, here, given, scales)
            second = self.direction(there.ahead(first), there, given, scales)
            kept = over(there.a / here.a, x)
            way = over(there.s - there.a * here.s / here.a, x)
            x = kept * x + way * (first.noise + second.noise) / 2
        return x

    def direction(self, x: Tensor, at: Levels, given: Values, scales: Tensor | None) -> Prediction:
        """D_without + scale (D_with - D_without), and E alike."""
        asked = self.training
        found = said(self.teacher(asked.inputs(x, at, given)))
        if scales is None:
            return found
        other = said(self.teacher(asked.inputs(x, at, asked.without(given))))
        w = over(scales, x)
        return Prediction(
            other.denoised + w * (found.denoised - other.denoised),
            other.noise + w * (found.noise - other.noise),
        )
