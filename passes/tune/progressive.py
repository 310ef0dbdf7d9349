"""tune.progressive: a sampler's number of steps, halved again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.guidance import over
from graphwright.ir.sampling.parameterization import DIVIDES_BY_SIGNAL
from graphwright.ir.sampling.schedule import SMALLEST, Level
from graphwright.ir.sampling.training import WEIGHTS, Levels, Regression, Training, Weighting, said
from graphwright.ir.tune import Moment, OwnLoss, tune
from graphwright.ir.tune.hooks import Values
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._denoisers.base import DenoiserRecipe, course

MOST = 1024
"""Steps of the first teacher where nothing else is said."""

FEW = 2
"""Steps of a student that trains longer."""

FAINT = 0.05
"""Signal at the first level below which a network that is divided by it is warned about."""


class ProgressiveOptions(Options):
    """Options of tune.progressive."""

    rules = (
        Rule("start", "start is None or (start % steps == 0 and start > steps and "
             "(start // steps) & (start // steps - 1) == 0)",
             "start ({start}) has to be steps ({steps}) times a power of two"),
    )  # fmt: skip

    steps: Annotated[int, Field(ge=1)] = 4
    """Steps of the last student."""

    start: Annotated[int, Field(ge=2)] | None = None
    """Steps of the first teacher: `steps` times a power of two; the most that 1024 and the table of
    the schedule have room for when absent."""

    sampler: Literal["deterministic", "stochastic"] = "deterministic"
    """`deterministic` is DDIM; `stochastic` takes steps of twice the length, and goes back half of
    each by fresh noise."""

    grid: Grid | None = None
    """Levels of the first teacher's trajectory; the denoiser's own when absent. Students walk on
    every second one of their teacher's."""

    weighting: Weighting = "truncated_snr"
    """Weight of a level in the loss on D: max(alpha^2 / sigma^2, 1), or alpha^2 / sigma^2 + 1."""

    longer: Annotated[int, Field(ge=1)] = 2
    """Factor of the training of students of one and two steps."""

    tune: OwnLoss = OwnLoss(lr=1e-4, schedule="linear")
    """Options of the training of every student."""


class Progressive(DenoiserRecipe[ProgressiveOptions]):
    """Halves the number of steps again and again: one step of a student is two of its teacher.

    A student of N steps follows, at the N levels of its trajectory, the data that one DDIM step has
    to head for to arrive where two of the teacher's steps do. What is trained is the prediction of
    the data, whatever the network's output means. Behind tune.guidance_distill, teacher and student
    are told the same scale, drawn anew for every sample. The result says in its record how it is
    sampled: `sample(noise)` takes `steps` steps on its levels.

    Every student is a training of its own by the options `tune`, from its teacher's weights, with a
    learning rate that falls to zero.

    Source: P15 (Meng et al. 2023), section 3.2, for scales and the stochastic sampler; Salimans and
    Ho 2022, algorithm 2 and section 4 (target and weights), with their 1024 steps to start with and
    twice the training for the last two students.
    """

    papers = ("P15",)

    def run(self, program: Program, context: Context) -> Result:
        """Trains student after student.

        Raises:
            ModelError: no denoiser of one row per sample.
            ArgumentError: no such grid, or steps that the denoiser was not trained for.
        """
        o = self.options
        training = Training(program, self.id)
        start, grid = self._start(training)
        training.path(grid, start)  # or refuses, before anything is trained
        data = training.data(context.training_data)
        jump = 2 if o.sampler == "stochastic" else 1
        metrics: dict[str, float] = {}
        student, count = program, start
        while count > o.steps:
            levels = training.path(_strided(grid, start // count), count).levels
            count //= 2
            hook = Halving(training, context.within(count), student, levels, jump, o.weighting)
            hooks = [*training_hooks(program), hook]
            tuned = tune(student, data, self._lengthened(count), context.within(count), hooks=hooks)
            metrics |= course(tuned.history, f"to_{count}_")
            student = tuned.program
        solver = "double_step" if jump == 2 else "ddim"
        made = training.sampled_in(student, o.steps, _strided(grid, start // o.steps), solver)
        action = Action("network", f"{start} steps in {o.steps} of {solver}")
        return Result(made, (action,), metrics, warnings=_warnings(training, grid, start))

    def _start(self, training: Training) -> tuple[int, Grid]:
        """The first teacher's steps and grid."""
        o, record = self.options, training.record
        grid = o.grid or record.default_grid
        if record.steps is not None:
            solver = "double_step" if o.sampler == "stochastic" else "ddim"
            own = (record.steps, record.default_grid, record.solver)
            if (o.start or record.steps, grid, solver) != own:
                raise ArgumentError(
                    f"this denoiser is sampled in {record.steps} steps of {record.solver} on a "
                    "grid of its own, and its student has to start there",
                    fix=f"Leave `start` and `grid` out, with the sampler of {record.solver}.",
                )
        most = record.steps or MOST
        if training.schedule.kind == "table":
            most = min(most, int(training.schedule.ends()[1]) + 1)
        start = o.start or o.steps
        while o.start is None and 2 * start <= most:
            start *= 2
        if start == o.steps:
            raise ArgumentError(f"{most} steps to begin with leave nothing to halve to {o.steps}")
        return start, grid

    def _lengthened(self, count: int) -> OwnLoss:
        """Options of the training of a student of so many steps."""
        given = self.options.tune
        if count > FEW or self.options.longer == 1:
            return given
        lengths = {"steps": given.steps, "epochs": given.epochs}
        lengths = lengths if any(lengths.values()) else {"epochs": 1}
        factor = self.options.longer
        return given.model_copy(update={n: v and v * factor for n, v in lengths.items()})


class Halving(Regression):
    """A student of half of its teacher's steps.

    Attributes:
        levels: of the teacher's trajectory.
        jump: levels that a step of the teacher goes on, on its own trajectory; and one of the
            student on its.
    """

    def __init__(
        self, training: Training, context: Context, teacher: Program, levels: Sequence[Level],
        jump: int, weighting: Weighting,
    ) -> None:  # fmt: skip
        """Takes the teacher, and the levels of its trajectory."""
        super().__init__(training, context)
        self.teacher = training.teacher(teacher, context.device)
        self.levels, self.jump, self.weight = tuple(levels), jump, WEIGHTS[weighting]

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """Samples at the student's levels, and where two steps of the teacher head for."""
        asked, g = self.training, self.generator(at)
        clean = batch[asked.record.sample]
        places = torch.randint((len(self.levels) - 1) // 2, (len(clean),), generator=g).tolist()
        here = Levels.of([self.levels[2 * i] for i in places], clean.device)
        x = here.noised(clean, torch.randn(clean.shape, generator=g).to(clean))
        numbers = asked.numbers(len(clean), g)
        given = asked.conditions(batch) | {n: t.to(clean.device) for n, t in numbers.items()}
        return {
            **batch, **asked.inputs(x, here, given),
            self.TARGET: self.target(x, places, given), self.WEIGHT: self.weight(here),
        }  # fmt: skip

    def target(self, x: Tensor, places: Sequence[int], given: Values) -> Tensor:
        """The data that one step has to head for to arrive where two of the teacher's do.

        In closed form a mean of the teacher's two predictions, which cancels nowhere.

        Args:
            x: [batch, ...] samples.
            places: numbers of the student's levels that they are at.
            given: conditions and numbers.
        """
        last = len(self.levels) - 1
        ways = [[min(2 * i + n * self.jump, last) for n in range(3)] for i in places]
        here, there = ([self.levels[way[n]] for way in ways] for n in (0, 1))
        # a step that has arrived at the data is asked nothing more
        asked = [h if t.s <= SMALLEST else t for h, t in zip(here, there, strict=True)]
        shares = [first_share(*(self.levels[n] for n in way)) for way in ways]
        first = said(self.teacher(self.training.inputs(x, Levels.of(here, x.device), given)))
        between = Levels.of(asked, x.device)
        moved = between.ahead(first)
        second = said(self.teacher(self.training.inputs(moved, between, given)))
        share = over(torch.tensor(shares, dtype=torch.float64).to(x), x)
        return share * first.denoised + (1 - share) * second.denoised


def first_share(here: Level, between: Level, there: Level) -> float:
    """Share of the first of two predictions of data in that of one DDIM step over both.

    With z' = a' D + s' (z - a D) / s for every step, the target (z'' - (s''/s) z) / (a'' - (s''/s)
    a) of Salimans and Ho 2022 (appendix G) is w D1 + (1 - w) D2 of this w.
    """
    if between.s <= SMALLEST:
        return 1.0
    first = there.s / between.s * (between.a - between.s * here.a / here.s)
    return first / (there.a - there.s * here.a / here.s)


def _strided(grid: Grid, factor: int) -> Grid:
    return grid.model_copy(update={"stride": grid.stride * factor})


def _warnings(training: Training, grid: Grid, start: int) -> tuple[str, ...]:
    kind, first = training.record.parameterization, training.path(grid, start).levels[0]
    if kind not in DIVIDES_BY_SIGNAL or first.a >= FAINT:
        return ()
    return (
        f"the network predicts {kind}, and the first step divides it by {first.a:.2g}: few steps "
        "want a network of v or x0",
    )
