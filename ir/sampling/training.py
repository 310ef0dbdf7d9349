"""Denoisers in training: noise on data, questions with a level per sample, records of few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches, as_batches
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.guidance import over
from graphwright.ir.sampling.parameterization import DIVIDES_BY_SIGNAL, check_levels
from graphwright.ir.sampling.plan import time_tensor
from graphwright.ir.sampling.record import ALPHA, DENOISED, FACT, NOISE, SIGMA, Denoiser
from graphwright.ir.sampling.schedule import SMALLEST, Level
from graphwright.ir.sampling.solvers.base import Path, Prediction
from graphwright.ir.sampling.solvers.table import make_solver
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.ir.tune.working import frozen

NEAREST = 1e-5
"""Share of a closed schedule at its ends that no time is drawn from (Song et al. 2021, eps)."""

LOG_MEAN, LOG_SPREAD = -1.2, 1.2
"""Of the noise levels of edm in training, ln sigma (Karras et al. 2022, table 1)."""

Call = Callable[[Values], Mapping[str, Tensor]]
"""Runs a denoiser on inputs by name; D, E and what else it gives by name."""


@dataclass(frozen=True)
class Levels:
    """Levels of noise, one for every sample.

    Attributes:
        a, s: factors of data and noise, [batch] float32.
        time: what the network is told, [batch] float64.
    """

    a: Tensor
    s: Tensor
    time: Tensor

    @classmethod
    def of(cls, levels: Sequence[Level], device: torch.device | None = None) -> Levels:
        """Those of a list."""
        rows = torch.tensor([[x.a, x.s, x.time] for x in levels], dtype=torch.float64).to(device)
        return cls(rows[:, 0].float(), rows[:, 1].float(), rows[:, 2])

    def noised(self, data: Tensor, noise: Tensor) -> Tensor:
        """a x0 + s e; both [batch, ...]."""
        return over(self.a, data) * data + over(self.s, data) * noise

    def ahead(self, found: Prediction) -> Tensor:
        """a D + s E: the sample at these levels that a step of the first order (DDIM, or Euler's
        in s / a) leads to from where `found` was asked."""
        return self.noised(found.denoised, found.noise)


class Training:
    """What a recipe asks of a denoiser and does with its data.

    Attributes:
        program: the denoiser that it begins with.
        record: what is known of it.
        schedule: its levels.
        by: id of the pass.
    """

    def __init__(self, program: Program, by: str) -> None:
        """Takes a denoiser that is one network with one row per sample.

        Raises:
            ModelError: it is no denoiser, has guidance around it, parts that steps reuse or inputs
                of its own for a step, or is told one time for all samples.
        """
        self.program, self.by = program, by
        self.record = Denoiser.required(program, by)
        self.schedule = self.record.noise_schedule
        self._specs = {spec.name: spec for spec in program.signature.inputs}
        _refuse(self.record, by)
        time = self.record.time
        if time is not None and not self._specs[time].shape:
            raise ModelError(
                f"{by}: the input {time!r} is one number for all samples, and training has a level "
                "of noise for each",
                fix="Trace the network with a time per sample.",
            )

    @property
    def device(self) -> torch.device:
        """Where the program is."""
        return self.program.examples[0].device

    def data(self, source: Iterable[Any]) -> Batches:
        """Batches of samples without noise and of conditions; there need be no labels.

        The values of the time input, where a source has them, are not read.
        """
        wanted = (self.record.sample, *self.record.conditions)
        signature = self.program.signature
        inputs = tuple(spec for spec in signature.inputs if spec.name in wanted)
        return as_batches(source, replace(signature, inputs=inputs))

    def conditions(self, batch: Values) -> dict[str, Tensor]:
        """Conditions of a batch."""
        return {name: batch[name] for name in self.record.conditions}

    def without(self, given: Values) -> dict[str, Tensor]:
        """The same with what stands for no condition.

        Raises:
            ModelError: there are none, or no number stands for the lack of one.
        """
        for name, value in self.record.conditions.items():
            if value is None:
                raise ModelError(f"{self.by}: no number stands for the lack of {name!r}",
                                 fix="Name it in `unconditional` of sample.denoiser.")  # fmt: skip
        if not self.record.conditions:
            raise ModelError(f"{self.by}: the denoiser has no condition to guide by",
                             fix="Name them in `conditions` of sample.denoiser.")  # fmt: skip
        fills = self.record.conditions.items()
        return {**given, **{n: torch.full_like(given[n], fill or 0) for n, fill in fills}}

    def inputs(self, x: Tensor, at: Levels, given: Values) -> dict[str, Tensor]:
        """Inputs of a call.

        Args:
            x: [batch, ...] samples.
            at: their levels.
            given: conditions, and the numbers of a guidance that the network has learned.
        """
        found = {self.record.sample: x, ALPHA: at.a, SIGMA: at.s, **given}
        if self.record.time is not None:
            spec = self._specs[self.record.time]
            shape = [size if isinstance(size, int) else len(x) for size in spec.shape]
            found[self.record.time] = at.time.to(getattr(torch, spec.dtype)).reshape(shape)
        return found

    def draw(self, n: int, generator: torch.Generator) -> list[Level]:
        """Levels that a network is trained at: uniform in t, and of edm normal in ln sigma.

        None is without signal where the output is divided by it.
        """
        low, high = self.schedule.ends()
        if self.schedule.kind == "table":
            needs = self.record.parameterization in DIVIDES_BY_SIGNAL
            count = int(high) + 1
            while needs and self.schedule.level(float(count - 1)).a <= SMALLEST:
                count -= 1
            return [self.schedule.level(float(t))
                    for t in torch.randint(count, (n,), generator=generator).tolist()]  # fmt: skip
        if self.schedule.kind == "edm":
            logs = LOG_MEAN + LOG_SPREAD * torch.randn(n, generator=generator, dtype=torch.float64)
            return [self.schedule.level(min(max(t, low), high)) for t in logs.exp().tolist()]
        shares = torch.rand(n, generator=generator, dtype=torch.float64)
        shares = NEAREST + (1 - 2 * NEAREST) * shares
        return [self.schedule.level(low + (high - low) * t) for t in shares.tolist()]

    def numbers(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Numbers that the network has learned to be told, [n] each, uniform where it has."""
        guidance = self.record.guidance
        learned = {} if guidance is None else guidance.settings.get("learned", {})
        return {name: low + (high - low) * torch.rand(n, generator=generator)
                for name, (low, high) in learned.items()}  # fmt: skip

    def path(self, grid: Grid, steps: int) -> Path:
        """The levels of a trajectory, each of which the network can be asked about.

        Raises:
            ArgumentError: there is no such grid on this schedule, or a level divides by zero or is
                no whole step of a network that counts steps.
        """
        levels = grid.levels(self.schedule, steps)
        check_levels(self.record.parameterization, levels[:-1])
        if self.record.time is not None:
            for level in levels[:-1]:
                time_tensor(self.record, self.program.signature, level.time, 1)
        return Path(self.schedule, levels)

    def teacher(self, program: Program, device: torch.device) -> Call:
        """Runs a denoiser of the same inputs in inference mode, without gradients."""
        return runs(frozen(program, device))

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """Samples at the first level of a trajectory, out of standard normal noise."""
        return noise * level.s if self.schedule.kind in ("ve", "edm") else noise

    def sampled_in(
        self, program: Program, steps: int, grid: Grid, solver: str = "ddim", **options: Any
    ) -> Program:
        """The program with the way to sample it in its record.

        Args:
            program: trained.
            steps: number of steps.
            grid: their levels.
            solver, options: what takes the steps.
        """
        make_solver(solver, **options)
        record = Denoiser.required(program, self.by).replace(
            steps=steps, grid=grid.model_dump(mode="json"), solver=solver, solver_options=options
        )
        return program.replace(facts={**program.facts, FACT: record.to_json()})


class Recipe(Hook):
    """A recipe of a denoiser: random numbers of its own, and a loss of its own.

    `on_batch` draws levels and noise and makes the inputs of the step; what the loss needs besides
    goes into the batch under names that are no inputs.
    """

    counts_on_last_step: ClassVar[bool] = False

    def __init__(self, training: Training, context: Context) -> None:
        """Takes the denoiser, and the surroundings that seeds come from."""
        self.training, self.context = training, context

    def generator(self, at: Moment, *path: str | int) -> torch.Generator:
        """Random numbers of a batch: the same when a killed run goes on."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if together else 0
        return self.context.generator("draws", at.step, at.micro, rank, *path)


class Regression(Recipe):
    """A recipe whose student follows a target: mean of weight (D - target)^2."""

    TARGET, WEIGHT = "regression target", "regression weight"

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        """The weighted mean over all entries."""
        gap: Tensor = outputs[DENOISED].float() - batch[self.TARGET]
        return loss + (over(batch[self.WEIGHT], gap) * gap.square()).mean()


def runs(program: Program) -> Call:
    """Runs a denoiser on inputs by name, without gradients."""
    names = [spec.name for spec in program.signature.inputs]
    outputs = [spec.name for spec in program.signature.outputs]

    @torch.no_grad()
    def call(given: Values) -> dict[str, Tensor]:
        flat = program.run_flat(tuple(given[name] for name in names))
        return dict(zip(outputs, flat, strict=True))

    return call


def said(found: Mapping[str, Tensor]) -> Prediction:
    """D and E among the outputs of a denoiser."""
    return Prediction(found[DENOISED], found[NOISE])


def truncated_snr(at: Levels) -> Tensor:
    """max(a^2 / s^2, 1), [batch] (Salimans and Ho 2022, section 4)."""
    return (at.a / at.s).square().clamp_min(1.0)


def snr_plus_one(at: Levels) -> Tensor:
    """a^2 / s^2 + 1, [batch] (Salimans and Ho 2022, section 4)."""
    return (at.a / at.s).square() + 1.0


Weighting = Literal["truncated_snr", "snr_plus_one"]

WEIGHTS: dict[str, Callable[[Levels], Tensor]] = {
    "truncated_snr": truncated_snr,
    "snr_plus_one": snr_plus_one,
}
"""Weights of levels in losses on D, by name."""


def _refuse(record: Denoiser, by: str) -> None:
    guidance = record.guidance
    if record.carried or (guidance is not None and "learned" not in guidance.settings):
        around = record.guidance.by if record.guidance is not None else "a pass"
        raise ModelError(
            f"{by}: {around} has put guidance around this denoiser, which is then no network of "
            "one row per sample",
            fix="Distil the guidance first (tune.guidance_distill), or guide behind this pass.",
        )
    if record.cached:
        raise ModelError(f"{by}: steps of this denoiser take over parts of earlier ones",
                         fix="Put sample.reuse behind this pass.")  # fmt: skip
    if record.latent or record.settings:
        raise ModelError(
            f"{by}: training asks a network of one sample, its level and its conditions, and this "
            "denoiser is told more",
            details=(*(("latent",) if record.latent else ()), *record.settings),
            fix="Put this pass right behind sample.denoiser.",
        )
