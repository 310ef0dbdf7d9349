"""Heun's method in s / a."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from graphwright.ir.sampling.schedule import SMALLEST
from graphwright.ir.sampling.solvers.base import (
    Denoise,
    Path,
    Solver,
    State,
    first_order,
    refuse_infinite,
)


class Heun(Solver):
    """Euler's step, and again with the mean of the directions at both ends.

    Source: Karras et al. 2022, algorithm 1.
    """

    evaluations: ClassVar[int] = 2

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step; the last one to no noise is Euler's."""
        refuse_infinite(path, "heun")
        here, there = path.levels[i], path.levels[i + 1]
        first = denoise(x, here)
        moved = first_order(first, there, 0.0, noise)
        if there.s <= SMALLEST:
            return moved, state
        second = denoise(moved, there)
        way = there.s - there.a * here.sigma
        return there.a / here.a * x + way * (first.noise + second.noise) / 2, state
