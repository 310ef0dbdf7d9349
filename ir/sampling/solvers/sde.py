"""The reverse SDE by Euler-Maruyama, and the predictor-corrector with Langevin steps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from graphwright.ir.sampling.schedule import SMALLEST
from graphwright.ir.sampling.solvers.base import (
    Denoise,
    Path,
    Prediction,
    Solver,
    State,
    first_order,
    refuse_infinite,
)


def euler_maruyama(
    p: Prediction, x: Tensor, path: Path, i: int, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """(mean, sample) of one step of dx = (f x - g^2 score) dt + g dw, backwards in time.

    With f = a'/a and g^2 = 2 s s' - 2 f s^2; the score is -E / s. A step at the schedule's end has
    no length in time, and goes to its level of noise by the data.
    """
    refuse_infinite(path, "the reverse SDE")
    here, there = path.levels[i], path.levels[i + 1]
    if here.t == there.t:
        moved = first_order(p, there, 0.0, [noise])
        return moved, moved
    da, ds = path.schedule.slopes(here.t)
    f = da / here.a
    g2 = max(2 * here.s * ds - 2 * f * here.s**2, 0.0)
    dt = there.t - here.t
    mean = x + (f * x + g2 / here.s * p.noise) * dt
    return mean, mean + (g2 * abs(dt)) ** 0.5 * noise


class ReverseSde(Solver):
    """Euler-Maruyama on the reverse SDE; the last step returns the mean.

    Source: Song et al. 2021 (P64), section 4.1 and appendix E.
    """

    @property
    def draws(self) -> int:
        """One tensor per step."""
        return 1

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step."""
        mean, sample = euler_maruyama(denoise(x, path.levels[i]), x, path, i, noise[0])
        return mean if i + 1 == path.steps else sample, state


class PredictorCorrector(Solver):
    """Langevin steps at every level, then one of the reverse SDE.

    Source: Song et al. 2021 (P64), algorithms 2 to 5.
    """

    evaluations: ClassVar[int] = 2

    snr: Annotated[float, Field(gt=0)] = 0.16
    """Ratio of the corrector's score and noise."""

    norm: Literal["batch", "sample"] = "batch"
    """Norms that the corrector's step is from: averaged over the batch, as in the paper, or those
    of every sample, which then does not depend on its neighbours (biased in few dimensions)."""

    @property
    def draws(self) -> int:
        """One for the corrector, one for the predictor."""
        return 2

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step; the last one returns the mean."""
        refuse_infinite(path, "predictor_corrector")
        here = path.levels[i]
        if here.s > SMALLEST:  # without noise there is nothing to correct
            score = -denoise(x, here).noise / here.s
            shrink = (path.levels[i + 1].a / here.a) ** -2 if here.a < 1 else 1.0
            size = 2 * shrink * (self.snr * self._norm(noise[0]) / self._norm(score)) ** 2
            x = x + size * score + (2 * size) ** 0.5 * noise[0]
        mean, sample = euler_maruyama(denoise(x, here), x, path, i, noise[1])
        return mean if i + 1 == path.steps else sample, state

    def _norm(self, x: Tensor) -> Tensor:
        """Lengths, shaped to broadcast."""
        found: Tensor = x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
        return found.mean() if self.norm == "batch" else found
