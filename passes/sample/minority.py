"""sample.minority: guidance towards samples of low density (P79)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.minority import (
    MinorityClassifier,
    NoisyBatches,
    TowardsClass,
    gradient_graph,
    log_probability,
    minority_scores,
    quantile_labels,
)
from graphwright.ir.sampling.plan import time_tensor
from graphwright.ir.sampling.record import ALPHA, DENOISED, FACT, NOISE, SIGMA, Denoiser, Guidance
from graphwright.ir.sampling.schedule import Level, NoiseSchedule
from graphwright.ir.sampling.surgery import Interface, NewInput
from graphwright.ir.signature import TensorSpec
from graphwright.ir.tune import TuneOptions, tune
from graphwright.passes.base import Action, Context, Need, Result
from graphwright.passes.sample._form.base import Named, Run, SamplePass
from graphwright.passes.sample._form.guider import GUIDERS

SCALE, TARGET = "guidance_scale", "target_class"
RECIPE: dict[str, Any] = {"steps": 60_000, "lr": 3e-4, "weight_decay": 0.05, "schedule": "linear"}
"""The paper's training of the classifier."""

HELD_OUT = 20
"""Every so many samples, by score, one is held out."""


class MinorityOptions(Options):
    """Options of sample.minority."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("target_class", "target_class is None or target_class < classes",
             "target_class {target_class} is not below classes {classes}"),
        Rule("tune", "tune.get('loss') == 'cross_entropy'",
             "the classifier is trained with cross_entropy"),
    )  # fmt: skip

    classes: Annotated[int, Field(ge=2)] = 100
    """Bins of the minority score, each with as many samples; a tenth of the samples at most."""

    guidance_scale: Annotated[float, Field(ge=0)] = 3.5
    """Factor of the classifier's gradient. A trajectory may be given another one, and one for every
    step."""

    target_class: Annotated[int, Field(ge=0)] | None = None
    """Bin to head for: 0 for the most ordinary samples, the last for the rarest, which it is when
    absent. A trajectory may be given another one."""

    score_time: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Level of the noise that samples are scored at, as a share of the schedule's times (of the
    logarithm of the noise for edm)."""

    score_draws: Annotated[int, Field(ge=1)] = 5
    """Draws of noise that a score is the mean over."""

    width: Annotated[int, Field(ge=1)] = 128
    """Channels of the classifier."""

    depth: Annotated[int, Field(ge=0)] = 2
    """Its layers behind the first one."""

    batch_size: Annotated[int, Field(ge=1)] = 256
    """Samples of a training batch."""

    tune: TuneOptions = TuneOptions(**RECIPE)
    """Options of the classifier's training."""


class Minority(SamplePass[MinorityOptions]):
    """Leads towards samples that are rare in the data, by a classifier of how rare they are.

    Calibration data has samples without noise. Every one is noised and brought back by the denoiser
    in one step: what is rare comes back badly, and the error is its minority score. A classifier of
    noisy samples learns which of `classes` bins of equal size the score is in. In sampling

        E = E_denoiser - w s grad log p(target | x),   D = D_denoiser + w s^2 / a grad log p

    and the gradient is in the program as plain forward calls, so that the bundle needs no autograd.
    The network runs once per step, as without guidance.

    Source: P79, equations 8 to 12 and algorithm 1. Its distance is LPIPS, and its classifier a head
    on the features of one that was trained on ImageNet; here the distance is the squared error,
    which the paper allows, and the classifier is a small network of its own. Samples are not
    clipped before they are compared.
    """

    papers = ("P79",)
    needs: ClassVar[Need] = "calibration"
    behind: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    conflicts: ClassVar[tuple[str, ...]] = GUIDERS

    def run(self, program: Program, context: Context) -> Result:
        """Scores, trains, and puts the gradient behind the denoiser.

        Raises:
            ModelError: guidance or a latent is there already, the data lacks an input, there are
                too few samples for the bins, or samples have more than three axes behind the
                channels.
        """
        record, options = Denoiser.required(program, self.id), self.options
        if record.guidance is not None:
            raise ModelError(
                f"{self.id}: {record.guidance.by} has put guidance around this denoiser already",
                fix="Keep one of the two.",
            )
        if record.latent:
            raise ModelError(f"{self.id}: samples of a denoiser with a latent have no scores",
                             fix="Leave tune.ddgan out.")  # fmt: skip
        data = self._data(record, context)
        x0 = data[record.sample]
        _refuse_data(x0, options.classes, self.id)
        labels, scores = self._labels(program, record, data, context)
        classifier, metrics = self._classifier(record, x0, labels, scores, context)
        target = options.classes - 1 if options.target_class is None else options.target_class
        made = self._guided(program, record, classifier, float(target))
        said = f"led towards bin {target} of {options.classes}, scale {options.guidance_scale:g}"
        return Result(made, (Action("denoiser", said),), metrics)

    def expected(self, after: Program, run: Run, given: Named) -> Mapping[str, Any]:
        """The formula with autograd's gradient."""
        record = Denoiser.required(after, self.id)
        own, x = run(given), given[record.sample]
        net = self._net(x)
        prefix = f"{self.id}."
        net.load_state_dict({n.removeprefix(prefix): t.detach() for n, t in after.state.items()
                             if n.startswith(prefix)})  # fmt: skip
        net = net.to(x.dtype).requires_grad_(False)
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            value = log_probability(net(at, given[ALPHA], given[SIGMA]), given[TARGET])
            (gradient,) = torch.autograd.grad(value, at)
        column = [-1, *[1] * (x.dim() - 1)]
        a, s = (given[name].reshape(column) for name in (ALPHA, SIGMA))
        noise = own[NOISE] - given[SCALE] * s * gradient
        return {DENOISED: own[DENOISED] + (own[NOISE] - noise) * s / a, NOISE: noise}

    # ---- what the classifier learns

    def _data(self, record: Denoiser, context: Context) -> dict[str, Tensor]:
        """Samples without noise and their conditions."""
        names = [record.sample, *record.conditions]
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for batch in context.batches:
            for name in names:
                if isinstance(batch, tuple) or name not in batch:
                    raise ModelError(f"{self.id}: the calibration data lacks {name!r}")
                rows[name].append(batch[name])
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def _labels(
        self, program: Program, record: Denoiser, data: dict[str, Tensor], context: Context
    ) -> tuple[Tensor, Tensor]:
        """Bins and scores of all samples."""
        level = _level(record.noise_schedule, self.options.score_time)
        names = [spec.name for spec in program.signature.inputs]
        generator = context.generator("scores")

        def denoise(x: Tensor, part: slice) -> Tensor:
            given = {name: rows[part] for name, rows in data.items()}
            given[record.sample] = x
            given |= {ALPHA: torch.full((len(x),), level.a), SIGMA: torch.full((len(x),), level.s)}
            if record.time is not None:
                given[record.time] = time_tensor(record, program.signature, level.time, len(x))
            with torch.no_grad():
                return program.run_flat(tuple(given[name] for name in names))[0]

        scores = minority_scores(
            data[record.sample], denoise, level.a, level.s, self.options.score_draws,
            lambda size: torch.randn(size, generator=generator),
        )  # fmt: skip
        return quantile_labels(scores, self.options.classes), scores

    def _classifier(
        self, record: Denoiser, x0: Tensor, labels: Tensor, scores: Tensor, context: Context
    ) -> tuple[MinorityClassifier, dict[str, float]]:
        """The trained classifier, and how it does on the samples that were held out."""
        from graphwright.ir.trace.capture import trace

        options = self.options
        order = scores.argsort(stable=True)
        kept_out = torch.zeros(len(x0), dtype=torch.bool)
        kept_out[order[HELD_OUT // 2 :: HELD_OUT]] = True

        schedule = record.noise_schedule

        def level(share: float) -> tuple[float, float]:
            found = _level(schedule, share)
            return found.a, found.s

        net = self._net(x0)
        _initialize(net, context.generator("classifier"))
        batches = NoisyBatches(
            x0[~kept_out], labels[~kept_out], level, _steps(options.tune), options.batch_size,
            lambda number: context.generator("noise", number),
        )  # fmt: skip
        names = ("sample", ALPHA, SIGMA)
        first = batches.batch(0)
        examples = {name: torch.cat([first[name][:1]] * 2) for name in names}
        program = trace(net, examples, {name: {0: "batch"} for name in names})
        tuned = tune(program, batches, options.tune, context.within("classifier"))
        net.load_state_dict({name: t.detach() for name, t in tuned.program.state.items()})
        a, s = level(0.0)
        rows = int(kept_out.sum())
        with torch.no_grad():
            guess = net(a * x0[kept_out], torch.full((rows,), a), torch.full((rows,), s)).argmax(1)
        right = float((guess == labels[kept_out]).double().mean())
        return net, {"held-out accuracy": right, "last loss": tuned.history.losses[-1]}

    def _net(self, x: Tensor) -> MinorityClassifier:
        """A classifier of samples like x, with any parameters."""
        o = self.options
        with torch.random.fork_rng(devices=[]):
            return MinorityClassifier(x.shape[1], x.dim() - 2, o.classes, o.width, o.depth).eval()

    # ---- the program

    def _guided(
        self, program: Program, record: Denoiser, net: MinorityClassifier, target: float
    ) -> Program:
        edit = Interface(program, self.id)
        parameters = {SCALE: self.options.guidance_scale, TARGET: target}
        x, alpha, sigma = (edit.input(name) for name in (record.sample, ALPHA, SIGMA))
        scale, towards = (
            edit.add_input(NewInput(TensorSpec(name, "float32", ()), torch.tensor(value)))
            for name, value in parameters.items()
        )
        gradient = gradient_graph(net, edit.example(record.sample).shape[1:])
        (found,) = graft(edit.editor, gradient, x, alpha, sigma, towards, name=self.id,
                         before=edit.output)  # fmt: skip
        made = graft(edit.editor, TowardsClass(), *edit.outputs, found, alpha, sigma, scale,
                     name=self.id, before=edit.output)  # fmt: skip
        sizes = edit.spec(record.sample).shape
        edit.set_outputs([(n, m, sizes) for n, m in zip((DENOISED, NOISE), made, strict=True)])
        guidance = Guidance(
            self.id, parameters, {"counts": {TARGET: self.options.classes}}, evaluations=1
        )
        edit.editor.facts[FACT] = record.replace(guidance=guidance).to_json()
        return edit.finish()


def _level(schedule: NoiseSchedule, share: float) -> Level:
    """The level at a share of the schedule's times."""
    low, high = schedule.ends()
    if schedule.kind == "edm":
        return schedule.level(low * (high / low) ** share)
    t = low + share * (high - low)
    return schedule.level(float(round(t)) if schedule.kind == "table" else t)


def _steps(options: TuneOptions) -> int:
    """Batches of an epoch: fresh noise for every step."""
    return (options.steps or RECIPE["steps"]) * options.accumulate


def _initialize(net: MinorityClassifier, generator: torch.Generator) -> None:
    """Parameters from a stream of their own: normal with variance 1 / inputs, biases 0."""
    with torch.no_grad():
        for parameter in net.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            inputs = parameter[0].numel() if parameter.dim() > 1 else 0
            parameter.copy_(drawn / inputs**0.5 if inputs else torch.zeros_like(drawn))


def _refuse_data(x0: Tensor, classes: int, by: str) -> None:
    if classes > len(x0) / 10:
        raise ModelError(
            f"{by}: {classes} bins for {len(x0)} samples, and a bin needs 10",
            fix="Give more calibration data, or fewer `classes`.",
        )
    if not 2 <= x0.dim() <= 5:
        raise ModelError(
            f"{by}: samples have the shape {list(x0.shape[1:])}; the classifier takes channels and "
            "up to three axes behind them"
        )
