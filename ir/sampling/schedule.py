"""Noise schedules: x = a(t) x0 + s(t) e. Closed forms and tables; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Options, Rule

Kind = Literal["vp", "subvp", "ve", "edm", "flow", "table"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]

FAR = 10.0
"""What ln(s / a) is cut to, on both sides, where a network is told it."""

SMALLEST = 1e-12
"""Least signal or noise that is not taken for zero."""


@dataclass(frozen=True)
class Level:
    """One level of noise.

    Attributes:
        t: place on the schedule.
        time: what the network is told: t or sigma, times the schedule's scale.
        a: factor of the data.
        s: factor of the noise.
    """

    t: float
    time: float
    a: float
    s: float

    @property
    def sigma(self) -> float:
        """Noise to signal, s / a; infinite where there is no signal."""
        return self.s / self.a if self.a > SMALLEST else math.inf

    @property
    def log_snr(self) -> float:
        """ln(a / s), half the logarithm of the signal-to-noise ratio."""
        if self.s <= SMALLEST:
            return math.inf
        return math.log(self.a / self.s) if self.a > SMALLEST else -math.inf

    @property
    def told(self) -> float:
        """ln(s / a) / 4, as networks are told levels besides their own time; cut at 10 / 4."""
        return -min(max(self.log_snr, -FAR), FAR) / 4


class NoiseSchedule(Options):
    """The noise that a denoiser was trained on, with its value of time."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"beta_schedule": "linear"}]})

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("trained_betas", "trained_betas is None or kind == 'table'",
             "trained_betas has no part in the schedule {kind}"),
        Rule("beta_max", "beta_min < beta_max", "beta_min has to be below beta_max"),
        Rule("sigma_max", "sigma_min < sigma_max", "sigma_min has to be below sigma_max"),
    )  # fmt: skip

    kind: Kind = "table"
    """`vp`, `subvp` and `ve` are the SDEs in continuous time 0..1; `edm` has the noise level itself
    for its time; `flow` is the straight path a = 1 - t, s = t; `table` has a number of steps."""

    beta_min: Annotated[float, Field(gt=0)] = 0.1
    """Of vp and subvp: the rate at t = 0."""

    beta_max: Annotated[float, Field(gt=0)] = 20.0
    """Of vp and subvp: the rate at t = 1."""

    sigma_min: Annotated[float, Field(gt=0)] = 0.002
    """Of ve and edm: the least level of noise."""

    sigma_max: Annotated[float, Field(gt=0)] = 80.0
    """Of ve and edm: the largest."""

    num_train_timesteps: Annotated[int, Field(ge=2)] = 1000
    """Of a table: its length."""

    beta_schedule: BetaSchedule = "linear"
    """Of a table: how its betas run from start to end."""

    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0001
    """Of a table: the first beta."""

    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Of a table: the last beta."""

    trained_betas: (
        Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=2)] | None
    ) = None
    """Of a table: all betas, in place of a formula."""

    shift: Annotated[float, Field(gt=0)] = 1.0
    """Of flow: grids are moved towards noise, t = shift t / (1 + (shift - 1) t)."""

    time: Literal["t", "sigma", "c_noise"] = "t"
    """What the network is told: t, the level of noise s / a, or ln(s / a) / 4, as the raw networks
    of edm."""

    time_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on it: 1000 for flow models that count to 1000, 999 for those of the SDE papers."""

    def ends(self) -> tuple[float, float]:
        """Least and largest t."""
        if self.kind == "table":
            return 0.0, float(len(self.alphas_cumprod()) - 1)
        return (self.sigma_min, self.sigma_max) if self.kind == "edm" else (0.0, 1.0)

    def alphas_cumprod(self) -> np.ndarray:
        """The table of a squared, [steps] float64.

        Raises:
            ArgumentError: the schedule is none of a table.
        """
        if self.kind != "table":
            raise ArgumentError(f"the schedule {self.kind} has no table of alphas")
        return _alphas(self)

    def coefficients(self, t: float) -> tuple[float, float]:
        """(a, s) at t."""
        if self.kind == "flow":
            return 1.0 - t, t
        if self.kind == "edm":
            return 1.0, t
        if self.kind == "ve":
            return 1.0, self.sigma_min * (self.sigma_max / self.sigma_min) ** t
        if self.kind == "table":
            return self._from_table(t)
        c = -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2
        lost = -math.expm1(2 * c)
        return math.exp(c), lost if self.kind == "subvp" else math.sqrt(lost)

    def level(self, t: float) -> Level:
        """The level of noise at t."""
        a, s = self.coefficients(t)
        return Level(t, self._time(t, a, s), a, s)

    def at_sigma(self, sigma: float) -> Level:
        """The level with s / a = sigma.

        In a table between two steps by the logarithm of sigma, as networks on tables are asked for
        levels in between.
        """
        if self.kind == "table":
            a = 1.0 / math.sqrt(1.0 + sigma**2)
            t = self._step_of(sigma)
            return Level(t, self._time(t, a, a * sigma), a, a * sigma)
        return self.level(self._t_of(sigma))

    def slopes(self, t: float) -> tuple[float, float]:
        """Derivatives (da/dt, ds/dt) of a closed form.

        Raises:
            ArgumentError: a table has none.
        """
        a, s = self.coefficients(t)
        if self.kind == "flow":
            return -1.0, 1.0
        if self.kind == "edm":
            return 0.0, 1.0
        if self.kind == "ve":
            return 0.0, s * math.log(self.sigma_max / self.sigma_min)
        if self.kind == "table":
            raise ArgumentError(
                "a schedule of a table has no derivatives, which this solver needs",
                fix="Take the closed form (`kind: vp` with beta_min and beta_max).",
            )
        da = -a * (t * (self.beta_max - self.beta_min) + self.beta_min) / 2
        lost = -2 * a * da
        return da, lost if self.kind == "subvp" else lost / (2 * max(s, SMALLEST))

    def shifted(self, t: float) -> float:
        """t moved by `shift`."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def _time(self, t: float, a: float, s: float) -> float:
        if self.time == "t":
            return self.time_scale * t
        sigma = s / a if a > SMALLEST else math.inf
        if self.time == "c_noise":
            sigma = math.log(sigma) / 4 if sigma > 0 else -math.inf
        return self.time_scale * sigma

    def _from_table(self, t: float) -> tuple[float, float]:
        table = self.alphas_cumprod()
        if not 0 <= t <= len(table) - 1:
            raise ArgumentError(f"t = {t:g} is not on the table, whose steps are 0 to "
                                f"{len(table) - 1}")  # fmt: skip
        if t == int(t):
            value = float(table[int(t)])
            return math.sqrt(value), math.sqrt(1 - value)
        sigma = float(np.interp(t, np.arange(len(table)), np.sqrt((1 - table) / table)))
        a = 1.0 / math.sqrt(1.0 + sigma**2)
        return a, a * sigma

    def _step_of(self, sigma: float) -> float:
        table = self.alphas_cumprod()
        logs = np.log((1 - table) / table) / 2
        return float(np.interp(math.log(sigma), logs, np.arange(len(table))))

    def _t_of(self, sigma: float) -> float:
        if self.kind == "flow":
            return sigma / (1 + sigma)
        if self.kind == "edm":
            return sigma
        if self.kind == "ve":
            return math.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
        if self.kind == "subvp":  # 1 - a^2 = sigma a
            c = math.log((math.sqrt(sigma**2 + 4) - sigma) / 2)
        else:
            c = -math.log1p(sigma**2) / 2
        slope, b = (self.beta_max - self.beta_min) / 2, self.beta_min
        # -c = slope t^2 / 2 + b t / 2
        return (-b + math.sqrt(b**2 - 8 * slope * 2 * c / 2)) / (2 * slope)


@lru_cache(maxsize=16)
def _alphas(schedule: NoiseSchedule) -> np.ndarray:
    return np.asarray(np.cumprod(1.0 - _betas(schedule)))


def _betas(schedule: NoiseSchedule) -> np.ndarray:
    n = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        return np.asarray(schedule.trained_betas, dtype=np.float64)
    if schedule.beta_schedule == "linear":
        return np.linspace(schedule.beta_start, schedule.beta_end, n)
    if schedule.beta_schedule == "scaled_linear":
        roots = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, n)
        return np.asarray(roots**2)
    grid = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.asarray(np.minimum(1 - grid[1:] / grid[:-1], 0.999))
