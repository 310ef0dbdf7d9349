"""UniPC of the second order on the data prediction, with its corrector."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from graphwright.ir.sampling.schedule import SMALLEST, Level
from graphwright.ir.sampling.solvers.base import (
    Denoise,
    Path,
    Solver,
    State,
    first_order,
    refuse_infinite,
)


class Unipc(Solver):
    """A predictor of order two, corrected with the data that the next step asks for anyway.

    Source: Zhao et al. 2023 (UniPC), algorithms 5 to 8 with B(h) = e^h - 1.
    """

    state: ClassVar[tuple[str, ...]] = ("last_sample", "last_denoised", "earlier_denoised")

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step: the data at x corrects x, and predicts the next sample."""
        refuse_infinite(path, "unipc")
        here, there = path.levels[i], path.levels[i + 1]
        p = denoise(x, here)
        if here.s <= SMALLEST:  # x is the data already
            return first_order(p, there, 0.0, noise), state
        data = p.denoised
        if state:
            x = _corrected(path.levels, i, data, state)
        order = 2 if state and i + 1 < path.steps else 1
        moved = _linear(x, here, there, data)
        if order == 2 and there.s > SMALLEST:
            h = there.log_snr - here.log_snr
            r = (path.levels[i - 1].log_snr - here.log_snr) / h
            slope = (state["last_denoised"] - data) / r
            moved = moved - there.a * math.expm1(-h) * slope / 2
        after = {"last_sample": x, "last_denoised": data}
        return moved, {**after, **_earlier(state)}


def _earlier(state: State) -> State:
    return {"earlier_denoised": state["last_denoised"]} if state else {}


def _linear(x: Tensor, here: Level, there: Level, data: Tensor) -> Tensor:
    """Exact for constant data."""
    ratio = there.s * here.a / (here.s * there.a)
    return there.s / here.s * x + there.a * (1 - ratio) * data


def _corrected(levels: tuple[Level, ...], i: int, data: Tensor, state: State) -> Tensor:
    """The sample at level i again, now that the data there is known."""
    before, here = levels[i - 1], levels[i]
    last = state["last_denoised"]
    h = here.log_snr - before.log_snr
    moved = _linear(state["last_sample"], before, here, last)
    scale = here.a * math.expm1(-h)
    if "earlier_denoised" not in state:
        return moved - scale * (data - last) / 2
    r = (levels[i - 2].log_snr - before.log_snr) / h
    b1, b2 = _moments(-h)
    # weights of the two differences: rho_1 + rho_2 = b1 and r rho_1 + rho_2 = b2
    w1 = (b2 - b1) / (r - 1)
    w2 = b1 - w1
    return moved - scale * (w1 * (state["earlier_denoised"] - last) / r + w2 * (data - last))


def _moments(hh: float) -> tuple[float, float]:
    base = math.expm1(hh)
    phi = base / hh - 1
    return phi / base, (phi / hh - 0.5) * 2 / base
