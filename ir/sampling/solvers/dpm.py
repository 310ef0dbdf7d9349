"""DPM-Solver++ of the second order: 2M (one question per step and a history) and 2S (two)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from graphwright.ir.sampling.schedule import SMALLEST, Level
from graphwright.ir.sampling.solvers.base import (
    Denoise,
    Path,
    Prediction,
    Solver,
    State,
    Stochastic,
    first_order,
)


def renoised(p: Prediction, x: Tensor, here: Level) -> Tensor:
    """The data of the direction that noise is put back in: D itself without CFG++."""
    return (x - here.s * p.noise) / here.a


class Dpmpp2m(Solver):
    """Multistep: Euler's step in ln(a / s), and the slope of D between the last two levels.

    With CFG++ the history is of the unconditional data.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; CFG++ (P23), appendix, DPM-Solver++ 2M.
    """

    two_directions: ClassVar[bool] = True
    state: ClassVar[tuple[str, ...]] = ("last_denoised",)

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step; the first one, and one to no noise, are Euler's."""
        here, there = path.levels[i], path.levels[i + 1]
        p = denoise(x, here)
        moved = first_order(p, there, 0.0, noise)
        if here.a <= SMALLEST:
            return moved, {}
        last = state.get("last_denoised")
        if last is not None and there.s > SMALLEST:
            h = there.log_snr - here.log_snr
            r = (here.log_snr - path.levels[i - 1].log_snr) / h
            slope = (p.denoised - last) / (2 * r)
            moved = moved - there.a * math.expm1(-h) * slope
        return moved, {"last_denoised": renoised(p, x, here)}


class Dpmpp2s(Stochastic):
    """Singlestep: D at the middle of the step in ln(a / s) decides; `eta` makes it ancestral.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 1, with r = 1/2; CFG++ (P23) for its form with
    two directions.
    """

    evaluations: ClassVar[int] = 2
    two_directions: ClassVar[bool] = True

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step; one from no signal or to no noise is Euler's."""
        here, there = path.levels[i], path.levels[i + 1]
        p = denoise(x, here)
        fresh = self.fresh(here, there)
        down = max(there.s**2 - fresh**2, 0.0) ** 0.5
        if down <= SMALLEST or here.a <= SMALLEST:
            return first_order(p, there, fresh, noise), state
        h = math.log(there.a / down) - here.log_snr
        middle = path.schedule.at_sigma(here.sigma * math.exp(-h / 2))
        halfway = middle.a / here.a * math.exp(-h / 2) * x
        halfway = halfway - middle.a * math.expm1(-h / 2) * renoised(p, x, here)
        q = denoise(halfway, middle)
        back = renoised(q, halfway, middle)
        moved = down / here.s * x + there.a * (q.denoised - math.exp(-h) * back)
        return moved + fresh * noise[0] if fresh else moved, state


class DpmppSinglestep(Solver):
    """2S whose middle points are levels of the grid, one question per step.

    Of two steps the second one starts anew from where the first began. A step without a partner and
    the last one are Euler's.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 1 with r from the grid, as in diffusers'
    DPMSolverSinglestepScheduler.
    """

    state: ClassVar[tuple[str, ...]] = ("start_sample", "start_denoised")

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step."""
        here, there = path.levels[i], path.levels[i + 1]
        p = denoise(x, here)
        last = i + 1 == path.steps or there.s <= SMALLEST
        if not state or last:
            kept = {} if last else {"start_sample": x, "start_denoised": p.denoised}
            return first_order(p, there, 0.0, noise), kept if here.a > SMALLEST else {}
        begin, first = path.levels[i - 1], state["start_denoised"]
        h = there.log_snr - begin.log_snr
        slope = (p.denoised - first) * h / (here.log_snr - begin.log_snr)
        moved = there.s / begin.s * state["start_sample"]
        return moved - there.a * math.expm1(-h) * (first + slope / 2), {}
