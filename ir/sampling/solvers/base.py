"""The form of solvers: a step is arithmetic on what a guided denoiser says, and declared state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Options
from graphwright.ir.sampling.schedule import SMALLEST, Level, NoiseSchedule


class Prediction(NamedTuple):
    """What a guided denoiser says about a sample, in its shape.

    Attributes:
        denoised: D, where the trajectory heads.
        noise: E, the direction that noise is put back in. Without guidance, and for guidance that
            returns one prediction, x = a D + s E; CFG++ returns another direction.
    """

    denoised: Tensor
    noise: Tensor


Denoise = Callable[[Tensor, Level], Prediction]
"""Asks the guided denoiser about a sample at a level."""

State = dict[str, Tensor]
"""Tensors that a solver carries from step to step, in the shape of the sample."""


@dataclass(frozen=True)
class Path:
    """A trajectory's levels, the first one noisiest, and the schedule that they are from."""

    schedule: NoiseSchedule
    levels: tuple[Level, ...]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.levels) - 1


class Solver(Options):
    """One step of a trajectory.

    Class attributes:
        evaluations: questions to the denoiser per step; the last step of Heun and 2S may ask one.
        draws: tensors of standard normal noise that a step uses, in the shape of the sample.
        two_directions: takes a denoiser whose D and E are not of one prediction (CFG++).
        state: names of the tensors that it carries; absent before the first step.
    """

    evaluations: ClassVar[int] = 1
    two_directions: ClassVar[bool] = False
    state: ClassVar[tuple[str, ...]] = ()

    @property
    def draws(self) -> int:
        """Tensors of noise that a step uses."""
        return 0

    def target(self, path: Path, i: int) -> Level:
        """The level that step i heads for, of a denoiser that is told it."""
        return path.levels[i + 1]

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """The sample at level i + 1 and the new state, from the sample at level i.

        Args:
            denoise: the guided denoiser.
            x: [batch, ...] floating point.
            path: where it goes.
            i: number of the step.
            state: what the last step returned; empty at the first.
            noise: `draws` tensors of standard normal noise in the shape of x.
        """
        raise TypeError(f"{type(self).__name__} defines no step")


class Stochastic(Solver):
    """A solver with a share of fresh noise."""

    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of fresh noise: 0 none, 1 that of ancestral sampling."""

    @property
    def draws(self) -> int:
        """One tensor where there is fresh noise."""
        return 1 if self.eta else 0

    def fresh(self, here: Level, there: Level) -> float:
        """Standard deviation of the fresh noise between two levels."""
        if not self.eta or there.s <= SMALLEST or here.s <= SMALLEST:
            return 0.0
        left = max(here.s**2 - (here.a / there.a) ** 2 * there.s**2, 0.0)
        return float(min(there.s, self.eta * there.s / here.s * left**0.5))


def first_order(p: Prediction, there: Level, fresh: float, noise: list[Tensor]) -> Tensor:
    """a' D + sqrt(s'^2 - n^2) E + n z: the step that every other one adds corrections to."""
    kept = math.sqrt(max(there.s**2 - fresh**2, 0.0))
    moved = there.a * p.denoised + kept * p.noise
    return moved + fresh * noise[0] if fresh else moved


def refuse_infinite(path: Path, by: str) -> None:
    """Refuses a path that starts without signal, where s / a is infinite."""
    if path.levels[0].a <= SMALLEST:
        raise ArgumentError(
            f"{by} goes by s / a, which is infinite at the first level (a = 0)",
            fix="Start below the end of the schedule (`start` of the grid), or use euler.",
        )
