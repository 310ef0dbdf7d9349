"""Two pictures denoised together, each at its own level of noise: tasks as schedules (P83)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, InstanceOf
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.record import PAIR, Denoiser
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.solvers.base import Denoise, Path, Prediction, Solver, State

Segment = Sequence[Sequence[float]]
"""[(from, to) of the first picture, (from, to) of the second], 0 for noise and 1 for data."""

Task = str | Sequence[Segment]
"""Name of the picture that is made out of the other, or segments."""


@dataclass(frozen=True)
class Both:
    """The levels of the two pictures of a pair, in the place of one level.

    Attributes:
        levels: of the first, and of the second.
    """

    levels: tuple[Level, Level]


def places(task: Sequence[Segment], steps: int) -> tuple[tuple[int, int], ...]:
    """Where the two pictures are before every step and behind the last: 0 is noise, `steps` data.

    Args:
        task: segments, one after the other.
        steps: from noise to data.

    Raises:
        ArgumentError: no segments, a part of one outside 0..1 or backwards, a gap between two, or a
            picture that is not data at the end.
    """
    found: list[tuple[int, int]] = []
    for number, segment in enumerate(task):
        ranges = [[float(end) for end in part] for part in segment]
        if len(ranges) != 2 or any(len(r) != 2 or not 0 <= r[0] <= r[1] <= 1 for r in ranges):
            raise ArgumentError(
                f"segment {number} of the task is {segment}: it has to be a range for each of the "
                "two pictures, (from, to) with 0 <= from <= to <= 1"
            )
        starts, ends = ([round(r[k] * steps) for r in ranges] for k in (0, 1))
        if found and list(found[-1]) != starts:
            raise ArgumentError(
                f"segment {number} of the task begins at the steps {starts}, and the one before "
                f"ended at {list(found[-1])}"
            )
        count = max(end - start for start, end in zip(starts, ends, strict=True))
        found += [(starts[0], starts[1])] if not found else []
        for i in range(1, count + 1):
            at = [s + (e - s) * i // count for s, e in zip(starts, ends, strict=True)]
            found.append((at[0], at[1]))
    if not found or found[-1] != (steps, steps):
        raise ArgumentError(
            "a task has to end with both pictures as data",
            fix="Let the last segment end at 1 for both.",
        )
    return tuple(found)


class Paired(Solver):
    """A solver's steps on both pictures, each along its own levels.

    A picture whose place stays is left alone, whatever the network says of it. One that is data is
    told the last level that the network knows, as in the released code.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    two_directions: ClassVar[bool] = True

    solver: InstanceOf[Solver]
    """Of every picture."""

    path: InstanceOf[Path]
    """From noise to data."""

    places: tuple[tuple[int, int], ...]
    """On it."""

    @property
    def draws(self) -> int:
        """As the solver."""
        return self.solver.draws

    def level(self, i: int) -> Both:
        """What the network is told before step i."""
        last = self.path.steps - 1
        first, second = (self.path.levels[min(place, last)] for place in self.places[i])
        return Both((first, second))

    def step(
        self, denoise: Denoise, x: Tensor, path: Path, i: int, state: State, noise: list[Tensor]
    ) -> tuple[Tensor, State]:
        """One step of the pair [batch, 2, ...]; the network is asked once."""
        ask: Any = denoise
        p: Prediction = ask(x, self.level(i))
        made: list[Tensor] = []
        after: State = {}
        for k, (here, there) in enumerate(zip(*self.places[i : i + 2], strict=True)):
            own = {n[2:]: t for n, t in state.items() if n.startswith(f"{k}.")}
            at = x[:, k]
            if here != there:
                found = Prediction(p.denoised[:, k], p.noise[:, k])
                at, own = self.solver.step(
                    lambda *_, found=found: found, at, self.path, here, own,
                    [z[:, k] for z in noise],
                )  # fmt: skip
            made.append(at)
            after |= {f"{k}.{name}": tensor for name, tensor in own.items()}
        return torch.stack(made, 1), after


def in_pairs(
    record: Denoiser, path: Path, solver: Solver, name: str, task: Task | None
) -> tuple[Path, Solver]:
    """The path and the solver of a task of two pictures.

    Raises:
        ArgumentError: no such task, or a solver that asks more than once per step.
    """
    names = record.settings[PAIR]
    if isinstance(task, str) and task not in names:
        raise ArgumentError(
            f"no picture is named {task!r}; there are {', '.join(names)}",
            fix="Name the one that is made out of the other, or give segments.",
        )
    if solver.evaluations != 1:
        raise ArgumentError(f"pictures of a pair are asked about once per step, and {name} asks "
                            "more often")  # fmt: skip
    if task is None:
        task = [[(0, 1), (0, 1)]]
    elif isinstance(task, str):
        task = [[(0, 1) if n == task else (1, 1) for n in names]]
    found = Paired(solver=solver, path=path, places=places(task, path.steps))
    levels: Any = tuple(found.level(i) for i in range(len(found.places)))
    return Path(path.schedule, levels), found


def started(
    paired: Paired, names: Sequence[str], noise: Tensor, known: Mapping[str, Tensor], wide: bool
) -> Tensor:
    """The pair before the first step: noise, data, or data with the noise of its level.

    Args:
        paired: the task.
        names: of the two pictures.
        noise: [batch, 2, ...] standard normal.
        known: data [batch, ...] of the pictures that begin behind noise.
        wide: noise alone is multiplied by that of the first level.

    Raises:
        ArgumentError: data that is missing, of another shape, or of a picture that begins as noise.
    """
    wanted = [n for n, place in zip(names, paired.places[0], strict=True) if place]
    if set(wanted) != set(known):
        raise ArgumentError(
            f"the task begins with the data of {wanted or 'no picture'}, and given is that of "
            f"{list(known) or 'none'}",
            fix="Give `known={name: data}` for the pictures that a task does not make from noise.",
        )
    made = []
    for k, (name, place) in enumerate(zip(names, paired.places[0], strict=True)):
        z, level = noise[:, k], paired.path.levels[place]
        if place and known[name].shape != z.shape:
            raise ArgumentError(f"the data of {name!r} has the shape {tuple(known[name].shape)}, "
                                f"its noise {tuple(z.shape)}")  # fmt: skip
        if place:
            made.append(level.a * known[name] + level.s * z)
        else:
            made.append(level.s * z if wide else z)
    return torch.stack(made, 1)
