"""Solvers of the first order: DDIM and Euler (one formula), Euler ancestral, LCM."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from graphwright.ir.sampling.schedule import SMALLEST
from graphwright.ir.sampling.solvers.base import (
    Denoise,
    Path,
    Solver,
    State,
    Stochastic,
    first_order,
)


class Euler(Stochastic):
    """x' = a' D + s' E: DDIM on a variance-preserving schedule, Euler's step in s / a (EDM) and on
    the straight path of flow models. With `eta` part of the noise is fresh.

    Source: Song et al. 2021 (DDIM), eq. 12; Karras et al. 2022, algorithm 1.
    """

    two_directions: ClassVar[bool] = True

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step."""
        here, there = path.levels[i], path.levels[i + 1]
        return first_order(denoise(x, here), there, self.fresh(here, there), noise), state


class EulerAncestral(Euler):
    """Euler with the fresh noise of ancestral sampling."""

    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of fresh noise."""


class DoubleStep(Solver):
    """A step of twice the length without noise, and half of the way back by fresh noise.

    The last step goes to the last level without noise. For denoisers that were trained for it.

    Source: P15 (Meng et al. 2023), section 3.2.
    """

    @property
    def draws(self) -> int:
        """One tensor per step."""
        return 1

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step."""
        far, there = path.levels[min(i + 2, path.steps)], path.levels[i + 1]
        moved = first_order(denoise(x, path.levels[i]), far, 0.0, noise)
        if i + 1 == path.steps:
            return moved, state
        kept = there.a / far.a
        fresh = max(there.s**2 - kept**2 * far.s**2, 0.0) ** 0.5
        return kept * moved + fresh * noise[0], state


class Lcm(Solver):
    """Steps of a consistency model: its data, and all noise anew.

    Source: Luo et al. 2023, Latent Consistency Models, algorithm 1 and its boundary scaling.
    """

    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    """Of the boundary scaling."""

    timestep_scaling: Annotated[float, Field(gt=0)] = 10.0
    """Factor on the step in the boundary scaling."""

    @property
    def draws(self) -> int:
        """One tensor per step."""
        return 1

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step."""
        here, there = path.levels[i], path.levels[i + 1]
        skip, out = self.boundary(here.t)
        data = out * denoise(x, here).denoised + skip * x
        if there.s <= SMALLEST or i + 1 == path.steps:
            return data, state
        return there.a * data + there.s * noise[0], state

    def boundary(self, t: float) -> tuple[float, float]:
        """(c_skip, c_out) at a step of the table."""
        scaled = t * self.timestep_scaling
        square = scaled**2 + self.sigma_data**2
        return self.sigma_data**2 / square, scaled / square**0.5
