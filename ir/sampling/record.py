"""What is known of a program that is a denoiser: its inputs, their meaning, its guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ModelError
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.schedule import NoiseSchedule

if TYPE_CHECKING:
    from graphwright.ir.program import Program

FACT = "sampling"
"""Entry of `Program.facts`."""

ALPHA, SIGMA = "alpha", "sigma"
"""Inputs of a denoiser program: factors of data and noise, [batch] each."""

DENOISED, NOISE = "denoised", "noise"
"""Its outputs: where the trajectory heads, and the direction that noise is put back in."""

LATENT = "latent"
"""Input with noise of a call's own, [batch, size], of denoisers that have one."""

TARGET = "target"
"""Input of a denoiser that jumps: ln(s / a) / 4 of the level that its next sample is at. Its record
says so in `settings`."""

NEGATIVE = "negative_"
"""Prefix of the inputs with the conditions that guidance leads away from."""

STREAM = "stream"
"""Entry of the settings of the guidance of a program that is one tick of a stream."""

JOINT_FACT = "sampling.pair"
"""Entry of `Program.facts` of a network whose sample is a pair of pictures."""

PAIR = "pair"
"""Entry of the settings of its denoiser: the names of the two pictures."""


@dataclass(frozen=True)
class Carried:
    """A tensor that goes from one call of the program to the next one of a trajectory.

    Attributes:
        input: name of the input; zeros in the first call of a trajectory.
        output: name of the output that it is next.
    """

    input: str
    output: str


@dataclass(frozen=True)
class Guidance:
    """What a pass of the family sample put around a denoiser.

    Attributes:
        by: id of the pass.
        parameters: inputs that are one number, with the values where a call says nothing.
        settings: what the driver goes by: intervals, thresholds, coefficients.
        two_directions: D and E are of two predictions, which not every solver takes.
        negatives: names of the inputs with what is led away from.
        evaluations: of the network, per sample and call.
    """

    by: str
    parameters: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    two_directions: bool = False
    negatives: tuple[str, ...] = ()
    evaluations: int = 2

    @property
    def may_rest(self) -> bool:
        """Whether steps may be without it: they run the network with the condition alone."""
        whole = self.settings.get("start", 0.0) == 0.0 and self.settings.get("stop", 1.0) == 1.0
        return not whole or "ends_at" in self.settings or "linear" in self.settings


@dataclass(frozen=True)
class Denoiser:
    """A program as a denoiser.

    Attributes:
        sample: name of the input that is noisy.
        time: name of the input that says how noisy; None where there is none.
        conditions: other inputs, by name the number that stands for no condition; None where a
            call has to give the tensor for that.
        parameterization: meaning of the network's own output.
        schedule: levels of noise.
        sigma_data: of the parameterization edm.
        grid, solver, solver_options: what a trajectory takes where it is told nothing else.
        guidance: what is put around it; None for a plain denoiser.
        carried: tensors that go from call to call.
        cached: names of tensors inside that steps may take over from an earlier one.
        settings: what the driver goes by, without guidance.
        distilled: the condition that is the guidance scale of a network which was distilled from
            guided predictions; None for any other network.
        steps: what it was trained to be sampled in, with its grid and solver; None for a denoiser
            that any number of steps will do for.
        latent: size of the input `latent`, noise that is drawn for every step; 0 without one.
    """

    sample: str
    time: str | None
    conditions: dict[str, float | None]
    parameterization: str
    schedule: dict[str, Any]
    sigma_data: float = 0.5
    grid: dict[str, Any] = field(default_factory=dict)
    solver: str = "euler"
    solver_options: dict[str, Any] = field(default_factory=dict)
    guidance: Guidance | None = None
    carried: tuple[Carried, ...] = ()
    cached: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    distilled: str | None = None
    steps: int | None = None
    latent: int = 0

    @classmethod
    def of(cls, program: Program) -> Denoiser | None:
        """The record of a program; None where it is no denoiser."""
        found = program.facts.get(FACT)
        return None if found is None else cls.from_json(found)

    @classmethod
    def required(cls, program: Program, by: str) -> Denoiser:
        """The record of a program that has to be a denoiser.

        Raises:
            ModelError: it is none.
        """
        found = cls.of(program)
        if found is None:
            raise ModelError(
                f"{by}: nothing says that this program is a denoiser",
                fix="Put `sample.denoiser` in front, with the network's parameterization and "
                "schedule.",
            )
        return found

    @property
    def doubles(self) -> bool:
        """Whether a guided call runs the network on twice the rows."""
        return self.guidance is not None and self.guidance.evaluations > 1

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The levels of noise, as a model."""
        return NoiseSchedule.model_validate(_tuples(self.schedule))

    @property
    def default_grid(self) -> Grid:
        """The grid where a trajectory is told no other."""
        return Grid.model_validate(self.grid)

    def replace(self, **changes: Any) -> Denoiser:
        """A record with some fields replaced."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        from dataclasses import asdict

        found: dict[str, Any] = _lists(asdict(self))
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Denoiser:
        """Inverse of `to_json`."""
        guidance = data.get("guidance")
        if guidance is not None:
            negatives = tuple(guidance["negatives"])
            guidance = Guidance(**{**guidance, "negatives": negatives})
        carried = tuple(Carried(**item) for item in data.get("carried", ()))
        cached = tuple(data.get("cached", ()))
        return cls(**{**data, "guidance": guidance, "carried": carried, "cached": cached})


def refuse_stream(record: Denoiser, by: str) -> None:
    """Refuses the tick of a stream, whose driver goes by no other pass.

    Raises:
        ModelError: it is one.
    """
    if record.guidance is not None and STREAM in record.guidance.settings:
        raise ModelError(
            f"{by}: a tick of a stream is all steps at once, and this changes steps",
            fix="Leave one of the two out.",
        )


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
