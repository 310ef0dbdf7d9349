"""A plan: all that a trajectory is told, checked before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.guidance import EXPONENTS
from graphwright.ir.sampling.joint import Both, Task, in_pairs
from graphwright.ir.sampling.parameterization import check_levels
from graphwright.ir.sampling.record import ALPHA, NEGATIVE, PAIR, SIGMA, STREAM, TARGET, Denoiser
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.solvers.base import Path, Solver
from graphwright.ir.sampling.solvers.jump import Jump
from graphwright.ir.sampling.solvers.table import SOLVERS, make_solver
from graphwright.ir.signature import Signature

Scale = float | Sequence[float]
"""One number, or one for every step."""


@dataclass(frozen=True)
class Plan:
    """A trajectory.

    Attributes:
        path: its levels.
        solver: of its steps.
        given: conditions, and what is led away from, by input name.
        parameters: guidance's numbers, one per step, by input name.
        batch: number of samples.
        linear: policy and coefficients of LinearAG; None elsewhere.
        particles: rows that share one target; 1 where rows have no weights.
        seed: of resampling.
        known: data of the pictures of a pair that do not begin as noise.
    """

    path: Path
    solver: Solver
    given: Mapping[str, Tensor]
    parameters: Mapping[str, tuple[float, ...]]
    batch: int
    linear: Mapping[str, Any] | None = None
    particles: int = 1
    seed: int = 0
    known: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """Factor on the noise that it begins with: a density N(0, s^2)^b is N(0, s^2 / b)."""
        total = sum(self.parameters[n][0] for n in EXPONENTS) if self.particles > 1 else 1.0
        return float(total**-0.5)


def make_plan(
    record: Denoiser,
    signature: Signature,
    batch: int,
    conditions: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    steps: int | None,
    solver: str | None,
    solver_options: Mapping[str, Any] | None,
    grid: Grid | Mapping[str, Any] | None,
    parameters: Mapping[str, Scale],
    particles: int = 1,
    seed: int = 0,
    task: Task | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> Plan:
    """The plan of a trajectory.

    Raises:
        ArgumentError: anything that would go wrong on the way, before it starts.
    """
    if record.guidance is not None and STREAM in record.guidance.settings:
        raise ArgumentError(
            "a stream has no trajectories: its program is one tick",
            fix="Drive it with `stream(noises, conditions)` and `run(frames)` or `tick`.",
        )
    schedule = record.noise_schedule
    chosen = Grid.model_validate(dict(grid)) if isinstance(grid, Mapping) else grid
    count = _steps(record, steps, solver, chosen)
    path = Path(schedule, (chosen or record.default_grid).levels(schedule, count))
    check_levels(record.parameterization, path.levels[:-1])
    chosen_solver = _solver(record, solver, solver_options)
    if PAIR in record.settings:
        name = solver or record.solver
        path, chosen_solver = in_pairs(record, path, chosen_solver, name, task)
    elif task is not None or known:
        raise ArgumentError("a task and known data are for programs of sample.joint")
    plan = Plan(
        path,
        chosen_solver,
        _given(record, signature, batch, conditions, negative),
        _numbers(record, parameters, path.steps),
        batch,
    )
    linear = None if record.guidance is None else record.guidance.settings.get("linear")
    if linear is not None:
        _check_linear(plan, linear, solver or record.solver, chosen or record.default_grid)
    _check_particles(record, plan, particles, solver or record.solver)
    if "push" in record.settings and batch < 2:
        raise ArgumentError(
            "sample.negtome pushes samples away from the first of the batch, and there is one",
            fix="Sample two at least.",
        )
    return replace(plan, linear=linear, particles=particles, seed=seed, known=known or {})


def _steps(record: Denoiser, given: int | None, solver: str | None, grid: Grid | None) -> int:
    """The number of steps; warns where they are not those that the denoiser was trained for."""
    trained = record.steps
    if trained is None:
        if given is None:
            raise ArgumentError("a trajectory of how many steps?", fix="Give `steps`.")
        return given
    asked = given or trained, solver or record.solver, grid or record.default_grid
    if asked != (trained, record.solver, record.default_grid):
        warnings.warn(
            f"this denoiser was trained to be sampled in {trained} steps of {record.solver} on its "
            "own grid, and is asked in others",
            stacklevel=4,
        )
    return asked[0]


def _check_particles(record: Denoiser, plan: Plan, particles: int, solver: str) -> None:
    weighted = record.guidance is not None and "weights" in record.guidance.settings
    if not weighted:
        if particles != 1:
            raise ArgumentError("particles are for programs of sample.feynman_kac")
        return
    if particles < 2 or plan.batch % particles:
        raise ArgumentError(
            f"{plan.batch} rows are no groups of {particles} particles",
            fix="Give `particles`, 2 or more, and as many rows of noise for every sample.",
        )
    if solver != "reverse_sde":
        raise ArgumentError(
            f"weights are those of the reverse SDE, and {solver} does not simulate it",
            fix='Sample with `solver="reverse_sde"` on a schedule in closed form.',
        )
    plan.path.schedule.slopes(plan.path.levels[0].t)
    given = [plan.parameters[name] for name in EXPONENTS]
    if any(len(set(each)) > 1 for each in given):
        raise ArgumentError(
            f"{' and '.join(EXPONENTS)} are those of one target, and cannot change on the way",
            fix="Give each of them one number.",
        )
    if sum(each[0] for each in given) <= 0:
        raise ArgumentError(
            f"the sum of {' and '.join(EXPONENTS)} is {sum(each[0] for each in given):g}, and a "
            "density to that power has no integral",
            fix="Choose them so that they add up to more than 0; guidance has the sum 1.",
        )


def _check_linear(plan: Plan, linear: Mapping[str, Any], solver: str, grid: Grid) -> None:
    """Coefficients are of one trajectory."""
    scales = set(plan.parameters["guidance_scale"])
    pairs = {
        "steps": (plan.path.steps, linear["steps"]),
        "solver": (solver, linear["solver"]),
        "grid": (grid, Grid.model_validate(linear["grid"])),
        "guidance_scale": (scales, {linear["guidance_scale"]}),
    }
    for name, (mine, fitted) in pairs.items():
        if mine != fitted:
            raise ArgumentError(
                f"the coefficients were fitted with {name} = {fitted}, and this trajectory has "
                f"{mine}",
                fix="Sample as they were fitted, or fit again with sample.linear_guidance.",
            )
    if plan.solver.evaluations != 1:
        raise ArgumentError(f"LinearAG asks once per step, and {solver} asks more often")


def _solver(record: Denoiser, name: str | None, options: Mapping[str, Any] | None) -> Solver:
    own = record.solver_options if name in (None, record.solver) else {}
    made = make_solver(name or record.solver, **{**own, **(options or {})})
    guidance = record.guidance
    if guidance is not None and guidance.two_directions and not made.two_directions:
        able = ", ".join(n for n, kind in SOLVERS.items() if kind.two_directions)
        raise ArgumentError(
            f"{name or record.solver} has no form for {guidance.by}, whose data and noise are of "
            "two predictions",
            fix=f"Take one of {able}.",
        )
    _check_jumps(record, name or record.solver, made)
    return made


def _check_jumps(record: Denoiser, solver: str, made: Solver) -> None:
    """A denoiser that is told where it jumps to goes there, and no other is told."""
    if (TARGET in record.settings) != isinstance(made, Jump):
        raise ArgumentError(
            f"{solver} is no solver of this denoiser: `jump` is that of programs of "
            "tune.trajectory, and they take no other"
        )


def _given(
    record: Denoiser,
    signature: Signature,
    batch: int,
    conditions: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    negatives = () if record.guidance is None else record.guidance.negatives
    wanted = [*record.conditions, *negatives]
    given = {**conditions, **{NEGATIVE + name: tensor for name, tensor in negative.items()}}
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing or unknown:
        parts = [f"missing {missing}"] if missing else []
        parts += [f"unknown {unknown}"] if unknown else []
        raise ArgumentError(
            f"conditions: {', '.join(parts)}; the denoiser takes {wanted}",
            fix="Names with `negative_` are given as `negative={name: tensor}`: what guidance "
            "leads away from." if any(n.startswith(NEGATIVE) for n in missing) else "",
        )  # fmt: skip
    specs = {spec.name: spec for spec in signature.inputs}
    (rows,) = {spec.shape[0] for spec in signature.inputs if spec.name == record.sample}
    for name, tensor in given.items():
        if specs[name].shape[:1] == (rows,) and tensor.shape[0] != batch:
            raise ArgumentError(
                f"the condition {name!r} has {tensor.shape[0]} rows, and the noise {batch}"
            )
    return given


def _numbers(
    record: Denoiser, given: Mapping[str, Scale], steps: int
) -> dict[str, tuple[float, ...]]:
    known = {} if record.guidance is None else record.guidance.parameters
    counts = {} if record.guidance is None else record.guidance.settings.get("counts", {})
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ArgumentError(f"no parameter named {unknown[0]!r}; there are {list(known)}")
    made = {}
    for name, default in known.items():
        value = given.get(name, default)
        each = (float(value),) * steps if isinstance(value, (int, float)) else tuple(value)
        if len(each) != steps:
            raise ArgumentError(f"{name} has {len(each)} values, and there are {steps} steps")
        made[name] = tuple(float(v) for v in each)
        count = counts.get(name)
        if count and any(v != int(v) or not 0 <= v < count for v in made[name]):
            raise ArgumentError(f"{name} is a whole number from 0 to {count - 1}")
    learned = {} if record.guidance is None else record.guidance.settings.get("learned", {})
    for name, (low, high) in learned.items():
        if any(not low <= value <= high for value in made[name]):
            warnings.warn(f"{name} was learned from {low:g} to {high:g} and is asked outside of it",
                          stacklevel=4)  # fmt: skip
    return made


def question(
    record: Denoiser, signature: Signature, plan: Plan, i: int, level: Level | Both
) -> dict[str, Tensor]:
    """All that a program is told in step i besides the sample: level, conditions and numbers.

    Raises:
        ArgumentError: the network takes whole steps, and this is none.
    """
    given = {**told(record, signature, level, plan.batch), **plan.given}
    given |= {n: torch.tensor(each[i]) for n, each in plan.parameters.items()}
    if TARGET in record.settings:
        given[TARGET] = torch.tensor(plan.solver.target(plan.path, i).told)
    return given


def told(
    record: Denoiser, signature: Signature, level: Level | Both, batch: int
) -> dict[str, Tensor]:
    """The levels and the time of a question, by name of the input.

    Raises:
        ArgumentError: the network takes whole steps, and this is none.
    """
    if isinstance(level, Both):  # [batch, 2], a column for each picture
        one, two = (told(record, signature, part, batch) for part in level.levels)
        both = {n: torch.stack([one[n], two[n]], 1) for n in (ALPHA, SIGMA)}
        times = [part[record.time] for part in (one, two)] if record.time is not None else []
        columns = [tensor[:, k] for k, tensor in enumerate(times)]
        return {**both, **({str(record.time): torch.stack(columns, 1)} if columns else {})}
    found = {
        ALPHA: torch.full((batch,), level.a, dtype=torch.float32),
        SIGMA: torch.full((batch,), level.s, dtype=torch.float32),
    }
    if record.time is not None:
        found[record.time] = time_tensor(record, signature, level.time, batch)
    return found


def time_tensor(record: Denoiser, signature: Signature, time: float, batch: int) -> Tensor:
    """What the network is told of a level, in the shape and dtype of its input.

    Raises:
        ArgumentError: the network takes whole steps, and this is none.
    """
    (spec,) = (spec for spec in signature.inputs if spec.name == record.time)
    dtype = getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        if abs(time - round(time)) > 1e-6:
            raise ArgumentError(
                f"the network takes whole steps, and the trajectory goes through {time:g}",
                fix="Choose a grid of whole steps (`leading`, `trailing`, `multistep`) and a "
                "solver that asks at no others, or trace the network with a float time.",
            )
        time = round(time)
    shape = [size if isinstance(size, int) else batch for size in spec.shape]
    return torch.full(shape, time, dtype=dtype)
