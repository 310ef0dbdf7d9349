"""sample.linear_guidance: guidance whose other half is estimated from the steps before (P41)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.data.synthetic import example_sizes, synthetic_inputs
from graphwright.ir.errors import ModelError
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.guidance import Recorded
from graphwright.ir.sampling.linear import LinearFit, check_policy, default_policy, regressors
from graphwright.ir.sampling.record import FACT, NOISE, Denoiser
from graphwright.ir.sampling.sampler import Sampler, State
from graphwright.ir.sampling.trajectory import draw_noise, shares
from graphwright.passes.base import Context, Result
from graphwright.passes.sample._form.guider import GuiderPass

WITH, WITHOUT = f"{NOISE}_with", f"{NOISE}_without"


class LinearGuidanceOptions(Options):
    """Options of sample.linear_guidance."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("policy", "policy is None or len(policy) == steps",
             "policy has to name all {steps} steps"),
    )  # fmt: skip

    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """As in sample.cfg; the coefficients are for this one."""

    steps: Annotated[int, Field(ge=2)] = 20
    """Steps of the trajectories, which the coefficients are for."""

    policy: tuple[Literal["full", "linear", "conditioned"], ...] | None = None
    """What every step does; the paper's when absent: `full` and `linear` in turn for one half, then
    `conditioned`."""

    trajectories: Annotated[int, Field(ge=1)] = 32
    """Fully guided trajectories that the coefficients are fitted on."""


class LinearGuidance(GuiderPass[LinearGuidanceOptions]):
    """Estimates the prediction without the condition by a sum over those of earlier steps.

    At a linear step the network runs with the condition alone, and the other prediction is a sum of
    all predictions of noise so far, with coefficients that least squares finds on fully guided
    trajectories. They hold for one number of steps, grid, solver and scale, which a trajectory has
    to have. Conditions of the fit are those of calibration data, or drawn where they are labels.

    Source: P41, section 5 and its LinearAG.
    """

    papers = ("P41",)
    looked_at: ClassVar[Mapping[str, str]] = {WITH: "sample", WITHOUT: "sample"}

    def guider(self, record: Denoiser) -> nn.Module:
        """The guider."""
        return Recorded()

    def parameters(self) -> dict[str, float]:
        """The scale."""
        return {"guidance_scale": self.options.guidance_scale}

    def run(self, program: Program, context: Context) -> Result:
        """Puts the guider around the denoiser, and fits."""
        result = super().run(program, context)
        made = result.program
        fitted, errors = self._fitted(made, context)
        record = Denoiser.required(made, self.id)
        assert record.guidance is not None
        policy = list(self.options.policy or default_policy(self.options.steps))
        check_policy(policy, self.options.steps, fitted)
        linear = {
            "steps": self.options.steps, "policy": policy, "grid": record.grid,
            "solver": record.solver, "guidance_scale": self.options.guidance_scale,
            "coefficients": fitted, "with": WITH, "without": WITHOUT,
        }  # fmt: skip
        record.guidance.settings["linear"] = linear
        made = made.replace(facts={**made.facts, FACT: record.to_json()})
        metrics = {f"residual of step {i}": error for i, error in errors.items()}
        return Result(made, result.actions, metrics)

    def _fitted(
        self, program: Program, context: Context
    ) -> tuple[dict[str, list[float]], dict[int, float]]:
        sampler, steps = Sampler.of(program), self.options.steps
        fits = {i: LinearFit(2 * i + 1) for i in range(1, steps)}
        given = self._conditions(program, sampler.record, context)
        shape = program.examples[0].shape[1:]
        noise = torch.randn(self.options.trajectories, *shape,
                            generator=context.generator("noise"))  # fmt: skip
        conditions = {n: t for n, t in given.items() if not n.startswith("negative_")}
        negative = {n.removeprefix("negative_"): t for n, t in given.items() if n not in conditions}
        plan = sampler.plan(len(noise), conditions, negative=negative, steps=steps)
        x, state = sampler.first(plan, noise), State()
        withs: list[Tensor] = []
        withouts: list[Tensor] = []

        def look(found: Mapping[str, Tensor]) -> None:
            withs.append(found[WITH])
            if len(withs) > 1:
                fits[len(withs) - 1].add(regressors(withs, withouts), found[WITHOUT])
            withouts.append(found[WITHOUT])

        latent = sampler.record.latent
        drawn = draw_noise(x, steps, plan.solver, context.seed, latent)
        for i, each in enumerate(shares(drawn, steps, plan.solver.draws + bool(latent))):
            x, state = sampler.step(plan, i, x, state, each, watch=look)
        solved = {i: fit.solved() for i, fit in fits.items()}
        errors = {i: fits[i].residual(c) for i, c in solved.items()}
        return {str(i): c.tolist() for i, c in solved.items()}, errors

    def _conditions(
        self, program: Program, record: Denoiser, context: Context
    ) -> dict[str, Tensor]:
        """Conditions of as many samples as there are trajectories."""
        assert record.guidance is not None
        count = self.options.trajectories
        names = [*record.conditions, *record.guidance.negatives]
        if context.calibration is not None:
            rows: dict[str, list[Tensor]] = {name: [] for name in names}
            for batch in context.calibration:
                for name in names:
                    if isinstance(batch, tuple) or name not in batch:
                        raise ModelError(f"{self.id}: the calibration data lacks {name!r}")
                    rows[name].append(batch[name])
            found = {name: torch.cat(parts) for name, parts in rows.items()}
            return {n: t[torch.arange(count) % len(t)] for n, t in found.items()}
        specs = {spec.name: spec for spec in program.signature.inputs}
        floats = [name for name in names if specs[name].dtype.startswith("float")]
        if floats:
            raise ModelError(
                f"{self.id}: the condition {floats[0]!r} is no label that could be drawn",
                fix="Give calibration data with the network's conditions.",
            )
        sizes = example_sizes(program.signature, program.examples)
        sizes[str(specs[record.sample].shape[0])] = count
        drawn = synthetic_inputs(program.signature, sizes, context.generator("conditions"))
        return {name: drawn[name] for name in names}
