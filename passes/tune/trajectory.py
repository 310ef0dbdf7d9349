"""tune.trajectory: one network that jumps from any level of noise to any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.options import Options, Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.record import DENOISED, FACT, TARGET, Guidance
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.solvers.base import Prediction, refuse_infinite
from graphwright.ir.sampling.surgery import Interface
from graphwright.ir.sampling.told import tell
from graphwright.ir.sampling.training import Levels, Recipe, Training, said
from graphwright.ir.tune import Moment, OwnLoss, tune
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.working import copied
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._denoisers.base import DenoiserRecipe, course
from graphwright.passes.tune._denoisers.distance import Features
from graphwright.passes.tune._denoisers.few import between, faint, told_level
from graphwright.passes.tune._denoisers.heun import GuidedHeun

SCALE = "guidance_scale"
AIM, WANTED, CLEAN = "numbers of the levels aimed at", "wanted samples", "clean samples"
"""Places in the batch."""

LARGEST = 1e3
"""Of the factor that balances the two losses."""


class TrajectoryOptions(Options):
    """Options of tune.trajectory."""

    rules = (
        Rule("scale_max", "scale_min < scale_max", "scale_max has to be above scale_min"),
        Rule("guidance_scale", "scale_min <= guidance_scale <= scale_max",
             "guidance_scale {guidance_scale:g} is outside of {scale_min:g} to {scale_max:g}"),
        Rule("width", "width % 2 == 0", "the width of the waves is even, and {width} is not"),
        Rule("teacher_steps", "teacher_steps is None or teacher_steps < levels",
             "teacher_steps {teacher_steps} is more than the {levels} levels have between them"),
    )  # fmt: skip

    levels: Annotated[int, Field(ge=3)] = 40
    """Levels of noise that jumps start and end at in training."""

    grid: Grid | None = None
    """Their choice; the paper's (edm: sigma^(1/7) equally spaced) or equal in time when absent."""

    teacher_steps: Annotated[int, Field(ge=1)] | None = None
    """Largest number of Heun's steps of the teacher in front of a jump; all levels when absent."""

    scale_min: Annotated[float, Field(ge=0)] = 2.0
    """Least scale of guidance that is learned, of a denoiser with conditions."""

    scale_max: Annotated[float, Field(ge=0)] = 5.0
    """Largest scale that is learned."""

    guidance_scale: Annotated[float, Field(ge=0)] = 3.5
    """Scale of a trajectory that is told no other."""

    unconditional: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the samples whose condition is left out."""

    denoising_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the denoising loss, beside the one that balances the gradients."""

    features: Selector = ("*",)
    """Layers of the denoiser whose values the distance is of: selector patterns."""

    target_ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged network that jumps behind the teacher."""

    width: Annotated[int, Field(ge=4)] = 256
    """Width of the waves by which the network is told a scale, and where to jump to."""

    tune: OwnLoss = OwnLoss(lr=8e-5, schedule="constant")
    """Options of training."""


class Trajectory(DenoiserRecipe[TrajectoryOptions]):
    """Trains a network that jumps from any level to any lower one, at any scale of guidance.

    The network gets inputs `target`, where the jump goes to, and, with conditions,
    `guidance_scale`; both are told at the embedding of time through maps that are zero at first.
    A jump is x' = a' D + s' E, so that one to where the sample is changes nothing. In training a
    jump from t to s is to arrive where the teacher's Heun steps from t to u, with guidance, and a
    jump of an averaged network from u to s do, as seen by the denoiser's own layers; and D of a
    jump to t itself is to be the data (denoising score matching).

    The result takes any number of steps of the solver `jump`; the driver says where each goes.

    Source: P74 (Saito et al. 2025, "SoundCTM"), with the rates of its U-Net at 16 kHz. Of its
    sampling, nu is 1: the prediction with the condition, in one row of the network.
    """

    papers = ("P74",)
    changes_interface: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        """Adds the inputs and trains.

        Raises:
            ModelError: no plain denoiser, guidance in it already, no embedding of time, or
                features that do not see the sample.
            ArgumentError: no such levels on this schedule.
        """
        o = self.options
        training = Training(program, self.id)
        if training.record.guidance is not None:
            raise ModelError(f"{self.id}: guidance is in this denoiser already",
                             fix="Leave tune.guidance_distill out: this learns it.")  # fmt: skip
        if training.record.conditions:
            training.without({n: torch.zeros(1) for n in training.record.conditions})  # or refuses
        grid = o.grid or between(training)
        path = training.path(grid, o.levels - 1)
        refuse_infinite(path, self.id)
        student = self._student(program, training, grid)
        hook = Jumping(training, context, o, path.levels, student)
        tuned = tune(student, training.data(context.training_data), o.tune, context,
                     hooks=[*training_hooks(program), hook])  # fmt: skip
        action = Action("network", f"jumps between {o.levels} levels")
        warned = faint(training, path.levels[0])
        return Result(tuned.program, (action,), course(tuned.history), warnings=warned)

    def _student(self, program: Program, training: Training, grid: Grid) -> Program:
        """The network with the inputs, and the same function whatever they are."""
        o, record = self.options, training.record
        edit = Interface(program, self.id)
        tell(edit, self.id, TARGET, 0.0, width=o.width)
        if record.conditions:
            tell(edit, self.id, SCALE, o.guidance_scale, width=o.width, shift=-1.0)
            settings = {"learned": {SCALE: [o.scale_min, o.scale_max]}}
            guidance = Guidance(self.id, {SCALE: o.guidance_scale}, settings, evaluations=1)
            record = record.replace(guidance=guidance)
        edit.editor.facts[FACT] = record.replace(
            grid=grid.model_dump(mode="json"), solver="jump", solver_options={},
            settings={**record.settings, TARGET: True},
        ).to_json()  # fmt: skip
        made = edit.finish()
        added = [s.name for s in made.signature.inputs[len(program.signature.inputs) :]]
        signature = replace(made.signature, state=(*made.signature.state, *added))
        return made.replace(signature=signature)


class Jumping(Recipe):
    """Jumps behind some steps of the teacher, and denoising."""

    def __init__(
        self, training: Training, context: Context, options: TrajectoryOptions,
        levels: Sequence[Level], student: Program,
    ) -> None:  # fmt: skip
        """Takes the denoiser, the levels, and the network with its new inputs."""
        super().__init__(training, context)
        self.options, self.levels = options, tuple(levels)
        self.teacher = GuidedHeun(training, context.device)
        self.distance = Features(training, options.features)
        self.average = copied(student, context.device).requires_grad_(False)
        self.names = [spec.name for spec in student.signature.inputs]
        self.last = _last_weight(student)
        self.denoised_at = Levels.of(self.levels[:1])  # of a batch: `also_run` sets it

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """Samples, where they jump to, and where they are to arrive."""
        asked, g, o = self.training, self.generator(at), self.options
        clean, top = batch[asked.record.sample], len(self.levels) - 1
        most = min(o.teacher_steps or top, top)
        steps = int(torch.randint(1, most + 1, (1,), generator=g))
        n = len(clean)
        start = torch.randint(top - steps + 1, (n,), generator=g)
        rest = top - start - steps + 1
        aim = start + steps + (torch.rand(n, generator=g) * rest).long().clamp(max=rest - 1)
        given, scales = self._told(batch, n, g)
        here = self._at(start, clean)
        x = here.noised(clean, torch.randn(clean.shape, generator=g).to(clean))
        wanted = self._wanted(x, start, steps, aim, given, scales)
        return {
            **batch, **self._asked(x, here, self._at(aim, clean), given, scales),
            AIM: aim, WANTED: wanted, CLEAN: clean,
        }  # fmt: skip

    def also_run(self, at: Moment, batch: Values) -> Sequence[Values]:
        """The same data at levels of denoising, half of them drawn as those of a denoiser."""
        asked, g = self.training, self.generator(at, "denoising")
        clean = batch[CLEAN]
        n = len(clean)
        drawn, own = asked.draw(n, g), torch.randint(len(self.levels), (n,), generator=g).tolist()
        coin = torch.rand(n, generator=g).tolist()
        found = [d if c < 0.5 else self.levels[i] for d, i, c in zip(drawn, own, coin, strict=True)]
        self.denoised_at = levels = Levels.of(found, clean.device)
        x = levels.noised(clean, torch.randn(clean.shape, generator=g).to(clean))
        scales = batch.get(SCALE)
        return [self._asked(x, levels, levels, asked.conditions(batch), scales)]

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        """Distance of where jumps arrive, and the balanced denoising loss."""
        asked, o = self.training, self.options
        clean, given = batch[CLEAN], asked.conditions(batch)
        aim = self._at(batch[AIM], clean)
        arrived = aim.ahead(said(outputs))
        jump = self.distance(arrived, batch[WANTED], aim, given).mean()
        if not o.denoising_weight:
            return loss + jump
        gap = (at.also[0][DENOISED].float() - clean).square().flatten(1).mean(1)
        denoising = (self._weight(self.denoised_at) * gap).mean()
        last = at.parameters[self.last]
        sizes = [
            torch.autograd.grad(part, last, retain_graph=True, allow_unused=True)[0]
            for part in (jump, denoising)
        ]
        norms = [0.0 if size is None else float(size.norm()) for size in sizes]
        factor = min(norms[0] / max(norms[1], 1e-12), LARGEST)
        whole: Tensor = loss + jump + o.denoising_weight * factor * denoising
        return whole

    def after_step(self, at: Moment) -> None:
        """The average follows."""
        with torch.no_grad():
            for name, average in self.average.named_parameters():
                if name in at.parameters:
                    average.lerp_(at.parameters[name], 1 - self.options.target_ema)

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"average": dict(self.average.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.average.load_state_dict(state["average"])

    # ---- parts

    @torch.no_grad()
    def _wanted(
        self, x: Tensor, start: Tensor, steps: int, aim: Tensor, given: Values,
        scales: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Where the teacher's steps and a jump of the averaged network arrive."""
        ways = [self._at(start + step, x) for step in range(steps + 1)]
        x = self.teacher.solved(x, ways, given, scales)
        here, there = self._at(start + steps, x), self._at(aim, x)
        asked = self._asked(x, here, there, given, scales)
        found = self.average(*(asked[name] for name in self.names))
        return there.ahead(Prediction(*found[:2]))

    def _told(
        self, batch: Values, n: int, g: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Conditions, some of them left out, and scales of guidance."""
        asked, o = self.training, self.options
        given = asked.conditions(batch)
        if not given:
            return given, None
        gone = (torch.rand(n, generator=g) < o.unconditional).to(next(iter(given.values())).device)
        scales = o.scale_min + (o.scale_max - o.scale_min) * torch.rand(n, generator=g)
        none = asked.without(given)
        kept = {m: torch.where(gone.reshape(-1, *[1] * (t.dim() - 1)), none[m], t)
                for m, t in given.items()}  # fmt: skip
        return kept, scales.to(gone.device)

    def _asked(
        self, x: Tensor, here: Levels, there: Levels, given: Values, scales: Tensor | None
    ) -> dict[str, Tensor]:
        """Inputs of the network that jumps."""
        told = {TARGET: told_level(there)[:, 0]}
        told |= {} if scales is None else {SCALE: scales}
        return {**self.training.inputs(x, here, given), **told}

    def _at(self, numbers: Tensor, x: Tensor) -> Levels:
        return Levels.of([self.levels[i] for i in numbers.tolist()], x.device)

    def _weight(self, at: Levels) -> Tensor:
        """Karras et al. 2022, table 1: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
        square, spread = (at.s / at.a).square(), self.training.record.sigma_data**2
        return (square + spread) / (square * spread)


def _last_weight(program: Program) -> str:
    """The last matrix or kernel in the graph that is trained."""
    trainable = program.trainable()
    read = [
        str(source.target)
        for node in program.graph.nodes
        for source in node.all_input_nodes
        if source.op == "get_attr"
    ]
    found = [name for name in read if name in trainable and trainable[name].dim() > 1]
    if not found:
        raise ModelError("the denoiser has no trainable matrix or kernel")
    return found[-1]
