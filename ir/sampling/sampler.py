"""The driver: chooses which program of a bundle runs next, and carries the state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program
from graphwright.ir.sampling.choice import BOTH, CACHED, OFF, variant
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.history import completed
from graphwright.ir.sampling.joint import Both, Paired, Task, started
from graphwright.ir.sampling.particles import RATE, WEIGHTS, reweighted, settled
from graphwright.ir.sampling.plan import Plan, Scale, make_plan, question
from graphwright.ir.sampling.record import DENOISED, LATENT, NOISE, PAIR, Denoiser
from graphwright.ir.sampling.retrieval import Retriever
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.solvers.base import Prediction
from graphwright.ir.sampling.stream import Stream
from graphwright.ir.sampling.trajectory import check_noise, noise_of_steps, shares, split_latent
from graphwright.ir.sampling.variants import (
    CONDITIONED,
    FULL,
    LOOK_UP,
    NEIGHBOURS,
    RETRIEVE,
    SHALLOW,
    VECTORS,
    variants,
)
from graphwright.ir.signature import Signature

Call = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Flat inputs of a program to its flat outputs."""

State = dict[str, Tensor]
"""From step to step: `solver.<name>`, `carried.<input>`, `history.<kind>.<step>`, guidance over."""

SOLVER, CARRIED = "solver.", "carried."


@dataclass(frozen=True)
class Part:
    """One program of a bundle.

    Attributes:
        signature: its inputs and outputs.
        call: runs it.
    """

    signature: Signature
    call: Call

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs it on those of the given tensors that it takes."""
        inputs = tuple(given[spec.name] for spec in self.signature.inputs)
        names = [spec.name for spec in self.signature.outputs]
        return dict(zip(names, self.call(inputs), strict=True))


class Sampler:
    """Samples of a denoiser program, or of the compiled programs of a bundle.

    Attributes:
        record: what is known of the denoiser.
        parts: programs by name, as `variants.py` has them.
        evaluations: rows of the network per sample in the last call of `sample`: 2 for a guided
            step, 1 for one without guidance.
        calls: how often each program was asked in it.
    """

    def __init__(self, record: Denoiser, parts: Mapping[str, Part]) -> None:
        self.record = record
        self.parts = dict(parts)
        self.evaluations = 0
        self.calls: Counter[str] = Counter()

    @classmethod
    def of(cls, program: Program) -> Sampler:
        """Of a program that is not lowered.

        Raises:
            ModelError: the program is no denoiser.
        """
        record = Denoiser.required(program, "Sampler")
        made = variants(program)
        return cls(record, {n: Part(p.signature, p.run_flat) for n, p in made.items()})

    def plan(
        self,
        batch: int,
        conditions: Mapping[str, Tensor] | None = None,
        *,
        steps: int | None = None,
        solver: str | None = None,
        solver_options: Mapping[str, Any] | None = None,
        grid: Grid | Mapping[str, Any] | None = None,
        negative: Mapping[str, Tensor] | None = None,
        particles: int = 1,
        resampling_seed: int = 0,
        queries: Tensor | None = None,
        task: Task | None = None,
        known: Mapping[str, Tensor] | None = None,
        **parameters: Scale,
    ) -> Plan:
        """A trajectory, checked as a whole.

        Args:
            batch: number of samples.
            conditions: tensors of the network's conditions by name, a row per sample.
            steps: number of steps; those that the denoiser was trained for when absent.
            solver, solver_options: in the place of the record's.
            grid: choice of the levels, in the place of the record's.
            negative: what guidance leads away from, by name of the condition.
            particles: neighbouring rows that share one target (sample.feynman_kac).
            resampling_seed: of their resampling.
            queries: [batch, width], whose neighbours in the index are the condition
                (sample.retrieve).
            task: of a pair of pictures (sample.joint): the name of the one to make, or segments.
            known: data of the pictures that it does not make from noise, by name.
            parameters: of the guidance: `guidance_scale=3.0`, or one number for every step.

        Raises:
            ArgumentError: what does not fit the denoiser, its guidance, schedule or solver.
        """
        given = dict(conditions or {})
        if queries is not None:
            name = self._retrieve_setting()["condition"]
            given[name] = self.retriever.context(queries)
        return make_plan(
            self.record, self.parts[FULL].signature, batch, given, negative or {},
            steps, solver, solver_options, grid, parameters, particles, resampling_seed,
            task, known,
        )  # fmt: skip

    def stream(
        self,
        noises: Tensor,
        conditions: Mapping[str, Tensor] | None = None,
        negative: Mapping[str, Tensor] | None = None,
    ) -> Stream:
        """The driver of a program of sample.stream; see `Stream`.

        Raises:
            ArgumentError: the program is no stream, or what is given does not fit it.
        """
        return Stream(self.record, self.parts[FULL], noises, conditions, negative)

    def sample(
        self,
        noise: Tensor,
        conditions: Mapping[str, Tensor] | None = None,
        *,
        steps: int | None = None,
        step_noise: Sequence[Tensor] | None = None,
        seed: int | None = None,
        progress: Callable[[int, int], object] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Samples from noise: the same for the same arguments.

        Args:
            noise: [batch, ...] standard normal; multiplied by the first level's noise on schedules
                whose data is not shrunk (ve, edm), and taken as it is on all others.
            conditions: as in `plan`.
            steps: number of steps; those that the denoiser was trained for when absent.
            step_noise: what the solver puts in on the way, `solver.draws` tensors per step, with
                the latent of the step behind them where the denoiser has one.
            seed: of that noise, in its place.
            progress: called with the steps done and their number.
            settings: of the plan.

        Returns:
            [batch, ...] samples.

        Raises:
            ArgumentError: as `plan`; or a solver with fresh noise that is given neither noise nor
                seed.
        """
        plan = self.plan(len(noise), conditions, steps=steps, **settings)
        latent, each_step = self.record.latent, plan.solver.draws + bool(self.record.latent)
        drawn = noise_of_steps(noise, plan.path.steps, plan.solver, latent, step_noise, seed)
        self.evaluations, self.calls = 0, Counter()
        x, state = self.first(plan, noise), State()
        for i, each in enumerate(shares(drawn, plan.path.steps, each_step)):
            x, state = self.step(plan, i, x, state, each)
            if progress is not None:
                progress(i + 1, plan.path.steps)
        return settled(plan, x, state) if plan.particles > 1 else x

    def first(self, plan: Plan, noise: Tensor) -> Tensor:
        """The sample at the first level."""
        wide = plan.path.schedule.kind in ("ve", "edm")
        if isinstance(plan.solver, Paired):
            return started(plan.solver, self.record.settings[PAIR], noise, plan.known, wide)
        return noise * (plan.path.levels[0].s if wide else 1.0) * plan.spread

    @torch.no_grad()
    def step(
        self,
        plan: Plan,
        i: int,
        x: Tensor,
        state: State,
        noise: Sequence[Tensor] = (),
        watch: Callable[[Mapping[str, Tensor]], object] | None = None,
    ) -> tuple[Tensor, State]:
        """The sample behind step i, and the state for the next one.

        Args:
            plan: of the trajectory.
            i: number of the step.
            x: [batch, ...] at level i.
            state: empty at the first step, then what the step before returned.
            noise: `plan.solver.draws` tensors of standard normal noise in the shape of x, and the
                latent [batch, size] of a denoiser that has one.
            watch: told of all outputs of the program, at every question.

        Raises:
            ArgumentError: the batch is not the plan's, or a tensor of the state has another shape.
        """
        _check_state(plan, x, state)
        noise, latent = split_latent(x, noise, self.record.latent)
        check_noise(x, plan.solver.draws, noise)
        kept = {n: t for n, t in state.items() if not n.startswith(SOLVER)}
        own = {n.removeprefix(SOLVER): t for n, t in state.items() if n.startswith(SOLVER)}

        def denoise(at: Tensor, level: Level | Both) -> Prediction:
            found = self.ask(plan, i, at, level, kept, latent)
            if watch is not None:
                watch(found)
            return Prediction(found[DENOISED], found[NOISE])

        x, own = plan.solver.step(denoise, x, plan.path, i, own, list(noise))
        state = {**kept, **{SOLVER + name: tensor for name, tensor in own.items()}}
        if plan.particles == 1:
            return x, state
        return reweighted(plan, self.record, i, x, state, self._doubled)

    # ---- retrieval

    @cached_property
    def retriever(self) -> Retriever:
        """Finds neighbours in the index of a program of sample.retrieve.

        Raises:
            ArgumentError: the program has no index.
        """
        said = self._retrieve_setting()
        k, items = said["neighbours"], said["items"]
        numbers = torch.arange(-(-items // k) * k).clamp_max(items - 1).reshape(-1, k)
        vectors = self.parts[LOOK_UP]({NEIGHBOURS: numbers})[VECTORS]
        return Retriever(vectors.flatten(0, 1)[:items], k)

    def _retrieve_setting(self) -> dict[str, Any]:
        if RETRIEVE not in self.record.settings:
            raise ArgumentError(
                "queries are for a program with an index, and this has none",
                fix="Put `sample.retrieve` behind the guidance, or give the condition itself.",
            )
        found: dict[str, Any] = self.record.settings[RETRIEVE]
        return found

    # ---- one question

    def ask(
        self, plan: Plan, i: int, x: Tensor, level: Level | Both, state: State,
        latent: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """All outputs at a level; what is carried is changed in `state`."""
        name = variant(self.record, plan, i, state)
        given = question(self.record, self.parts[FULL].signature, plan, i, level)
        given |= {self.record.sample: x, **({} if latent is None else {LATENT: latent})}
        for item in self.record.carried:
            held = state.get(CARRIED + item.input)
            given[item.input] = torch.zeros_like(x) if held is None else held
        given |= self._taken_over(name, x, state)
        found = self.parts[name](given)
        self.calls[name] += 1
        guidance = self.record.guidance
        doubled = FULL in name and self.record.doubles
        self.evaluations += guidance.evaluations if FULL in name and guidance is not None else 1
        kept = {CACHED + n: found[n] for n in self.record.cached if n in found}
        if kept:
            state.pop(BOTH, None)
            state |= {**kept, **({BOTH: torch.ones((), dtype=torch.bool)} if doubled else {})}
        for item in self.record.carried:
            if item.output in found:
                state[CARRIED + item.input] = found[item.output]
        self._look(found, state)
        if self.record.guidance is not None and "weights" in self.record.guidance.settings:
            state[RATE] = found[self.record.guidance.settings["weights"]["output"]]
        return completed(plan, i, x, level, found, state)

    def _taken_over(self, name: str, x: Tensor, state: State) -> dict[str, Tensor]:
        """What was kept; rows with the condition of it where there are no others."""
        if not name.endswith(SHALLOW):
            return {}
        found = {n: state[CACHED + n] for n in self.record.cached}
        if name.startswith(CONDITIONED) and BOTH in state:
            found = {n: t[0] if CACHED + n in self._doubled else t for n, t in found.items()}
        return found

    @cached_property
    def _doubled(self) -> frozenset[str]:
        """Names in the state of what is kept as [2, batch, ...], with and without the condition."""
        part = self.parts.get(FULL + SHALLOW)
        specs = part.signature.inputs if part is not None else ()
        return frozenset(CACHED + spec.name for spec in specs if spec.shape[:1] == (2,))

    def _look(self, found: Mapping[str, Tensor], state: State) -> None:
        """Ends guidance where the two predictions are alike."""
        guidance = self.record.guidance
        ends = guidance.settings.get("ends_at") if guidance is not None else None
        if ends and ends["output"] in found:
            least = float(found[ends["output"]].min())
            state |= {OFF: torch.ones((), dtype=torch.bool)} if least >= ends["threshold"] else {}


def _check_state(plan: Plan, x: Tensor, state: State) -> None:
    if len(x) != plan.batch:
        raise ArgumentError(
            f"the batch is {len(x)}, and the trajectory was begun with {plan.batch}"
        )
    for name, tensor in state.items():
        paired = isinstance(plan.solver, Paired) and name.startswith(SOLVER)
        if (
            name not in (OFF, BOTH, RATE, WEIGHTS)
            and not name.startswith(CACHED)
            and tensor.shape != (x[:, 0].shape if paired else x.shape)
        ):
            raise ArgumentError(
                f"the state {name!r} has the shape {tuple(tensor.shape)}, the sample "
                f"{tuple(x.shape)}"
            )
