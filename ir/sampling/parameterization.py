"""What a denoiser's output means, and its canonical pair (D, E): data and noise, x = a D + s E."""

from __future__ import annotations

from typing import Any, Literal, get_args

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.schedule import SMALLEST, Level, NoiseSchedule

Parameterization = Literal["epsilon", "x0", "v", "score", "flow", "edm"]

NAMES: tuple[str, ...] = get_args(Parameterization)

DIVIDES_BY_SIGNAL = ("epsilon", "score")
"""Their D is divided by a."""

DIVIDES_BY_NOISE = ("x0", "edm")
"""Their E is divided by s."""


def canonical(
    kind: str, out: Any, x: Any, a: Any, s: Any, sigma_data: float = 0.5
) -> tuple[Any, Any]:
    """(D, E) of a network's output.

    Args:
        kind: meaning of the output: `epsilon` (the noise), `x0` (the data), `v` (a e - s x0),
            `score` (-e / s), `flow` (e - x0 on the path a = 1 - t, s = t), `edm` (the raw network F
            behind the preconditioning of Karras et al. 2022, table 1, for a = 1).
        out: the network's output; tensors, arrays or numbers.
        x: what it was asked about; the input before edm's c_in.
        a, s: levels that broadcast against x.
        sigma_data: of edm.
    """
    if kind == "epsilon":
        return (x - s * out) / a, out
    if kind == "x0":
        return out, (x - a * out) / s
    if kind == "v":
        square = a * a + s * s
        return (a * x - s * out) / square, (s * x + a * out) / square
    if kind == "score":
        return (x + s * s * out) / a, -s * out
    if kind == "flow":
        return x - s * out, x + a * out
    square = s * s + sigma_data**2
    denoised = sigma_data**2 / square * x + s * sigma_data / square**0.5 * out
    return denoised, (x - denoised) / s


def network_input(kind: str, x: Any, s: Any, sigma_data: float = 0.5) -> Any:
    """What the network reads in the place of x: for edm x scaled to unit variance, else x."""
    return x / (s * s + sigma_data**2) ** 0.5 if kind == "edm" else x


def output_of(kind: str, data: Any, x: Any, a: Any, s: Any, sigma_data: float = 0.5) -> Any:
    """The inverse of `canonical`: the output of a network whose D is `data`."""
    noise = (x - a * data) / s
    if kind == "epsilon":
        return noise
    if kind == "x0":
        return data
    if kind == "v":
        return a * noise - s * data
    if kind == "score":
        return -noise / s
    if kind == "flow":
        return noise - data
    square = s * s + sigma_data**2
    return (data - sigma_data**2 / square * x) * square**0.5 / (s * sigma_data)


def check_pair(kind: str, schedule: NoiseSchedule) -> None:
    """Refuses a parameterization on a schedule that it has no form on.

    Raises:
        ArgumentError: flow off the straight path, or edm with a signal that shrinks.
    """
    if kind == "flow" and schedule.kind != "flow":
        raise ArgumentError(
            f"the parameterization flow is defined on the path a = 1 - t, not on {schedule.kind}",
            fix="Declare `schedule: {kind: flow}`.",
        )
    if kind == "edm" and schedule.kind not in ("edm", "ve"):
        raise ArgumentError(
            f"the parameterization edm is defined where a = 1, not on {schedule.kind}",
            fix="Declare `schedule: {kind: edm}`.",
        )


def check_levels(kind: str, levels: tuple[Level, ...]) -> None:
    """Refuses levels at which the network is asked and (D, E) divides by zero.

    Args:
        kind: the parameterization.
        levels: those of a grid without its last, which no network is asked about.

    Raises:
        ArgumentError: a level without signal for epsilon and score, or without noise for x0.
    """
    for index, level in enumerate(levels):
        if kind in DIVIDES_BY_SIGNAL and level.a <= SMALLEST:
            raise ArgumentError(
                f"step {index} has no signal (a = 0 at t = {level.t:g}), and the data that a "
                f"network of {kind} predicts is divided by it",
                fix="Start below the end of the schedule, or use a network of v, x0 or flow.",
            )
        if kind in DIVIDES_BY_NOISE and level.s <= SMALLEST:
            raise ArgumentError(
                f"step {index} has no noise (s = 0 at t = {level.t:g}), and the noise that a "
                f"network of {kind} predicts is divided by it",
                fix="End the steps above zero noise; the last level alone may be zero.",
            )
