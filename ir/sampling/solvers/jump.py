"""Jumps of a network that was trained to go from any level to any other."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.solvers.base import Denoise, Path, Solver, State, first_order


class Jump(Solver):
    """A jump past the next level by a share gamma of its noise, and fresh noise in its place.

    With sigma = s / a, least sigma at the path's end: the jump goes to sqrt(1 - gamma^2) (sigma' -
    least) + least, and the noise that is put in brings it to sigma'. gamma 0 is deterministic, and
    1 the sampling of consistency models. For programs of tune.trajectory, which are told where
    the jump goes to.

    Source: P74 (Saito et al. 2025), algorithm 3, and Kim et al. 2024, "Consistency trajectory
    models".
    """

    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the noise that is fresh."""

    @property
    def draws(self) -> int:
        """One tensor where there is fresh noise."""
        return 1 if self.gamma else 0

    def target(self, path: Path, i: int) -> Level:
        """Where the jump of step i goes to."""
        there, least = path.levels[i + 1], path.levels[-1].sigma
        if not self.gamma or there.sigma <= least:
            return there
        kept = (1 - self.gamma**2) ** 0.5 * (there.sigma - least) + least
        return path.schedule.at_sigma(kept)

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One jump."""
        there, aim = path.levels[i + 1], self.target(path, i)
        moved = first_order(denoise(x, path.levels[i]), aim, 0.0, noise)
        if aim is there:
            return moved, state
        fresh = there.a * max(there.sigma**2 - aim.sigma**2, 0.0) ** 0.5
        return there.a / aim.a * moved + fresh * noise[0], state
