"""tune.guidance_distill: classifier-free guidance as an input of one network."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.guidance import over
from graphwright.ir.sampling.record import FACT, Denoiser, Guidance
from graphwright.ir.sampling.surgery import Interface
from graphwright.ir.sampling.told import tell
from graphwright.ir.sampling.training import (
    WEIGHTS,
    Call,
    Levels,
    Regression,
    Training,
    Weighting,
    said,
)
from graphwright.ir.tune import Moment, OwnLoss, tune
from graphwright.ir.tune.hooks import Values
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._denoisers.base import DenoiserRecipe, course

SCALE = "guidance_scale"
"""The new input; the name is that of the passes that guide by two evaluations."""


class GuidanceDistillOptions(Options):
    """Options of tune.guidance_distill."""

    rules = (
        Rule("scale_max", "scale_min < scale_max", "scale_max has to be above scale_min"),
        Rule("guidance_scale", "scale_min <= guidance_scale <= scale_max",
             "guidance_scale {guidance_scale:g} is outside of {scale_min:g} to {scale_max:g}"),
        Rule("width", "width % 2 == 0", "the width of the waves is even, and {width} is not"),
    )  # fmt: skip

    scale_min: Annotated[float, Field(ge=0)] = 1.0
    """Least scale that is learned; D = D_without + scale (D_with - D_without), so that 1 is no
    guidance (the paper's w is the scale less 1)."""

    scale_max: Annotated[float, Field(ge=0)] = 5.0
    """Largest scale that is learned; the paper has 5 for images by class, 3 to 15 for latents."""

    guidance_scale: Annotated[float, Field(ge=0)] = 2.0
    """Scale of a trajectory that is told no other."""

    width: Annotated[int, Field(ge=4)] = 256
    """Width of the waves by which the scale is told, as in diffusers."""

    weighting: Weighting = "truncated_snr"
    """Weight of a level in the loss on D: max(alpha^2 / sigma^2, 1), or alpha^2 / sigma^2 + 1."""

    tune: OwnLoss = OwnLoss(lr=1e-4, schedule="linear")
    """Options of training."""


class GuidanceDistill(DenoiserRecipe[GuidanceDistillOptions]):
    """Trains one network to give what classifier-free guidance makes of two evaluations.

    The network gets an input `guidance_scale`, told at the embedding of time through a map that is
    zero at first: at the beginning it is the network with the condition, at every scale. Then it
    follows D_without + scale (D_with - D_without) of the frozen network, at levels of its schedule
    and scales drawn uniformly, one per sample. The result samples with guidance in one row of the
    network per step, and takes no other guidance.

    Source: P15 (Meng et al. 2023), section 3.1; the embedding is that of diffusers.
    """

    papers = ("P15",)
    changes_interface: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        """Adds the input and trains.

        Raises:
            ModelError: no denoiser, no condition to guide by, no embedding of time.
        """
        o = self.options
        training = Training(program, self.id)
        if training.record.distilled is not None or training.record.guidance is not None:
            raise ModelError(f"{self.id}: this network guides by itself already")
        training.without({n: torch.zeros(1) for n in training.record.conditions})  # or refuses
        student = self._student(program, training.record)
        tuned = tune(
            student, training.data(context.training_data), o.tune, context,
            hooks=[*training_hooks(program), Guided(training, context, o)],
        )  # fmt: skip
        action = Action("network", f"guides by itself at scales {o.scale_min:g} to {o.scale_max:g}")
        return Result(tuned.program, (action,), course(tuned.history))

    def _student(self, program: Program, record: Denoiser) -> Program:
        """The network with the input, and the same function at every scale."""
        o = self.options
        edit = Interface(program, self.id)
        tell(edit, self.id, SCALE, o.guidance_scale, width=o.width, shift=-1.0)
        settings = {"learned": {SCALE: [o.scale_min, o.scale_max]}}
        guidance = Guidance(self.id, {SCALE: o.guidance_scale}, settings, evaluations=1)
        edit.editor.facts[FACT] = record.replace(guidance=guidance).to_json()
        made = edit.finish()
        signature = replace(made.signature, state=(*made.signature.state, SCALE))
        return made.replace(signature=signature)


class Guided(Regression):
    """Follows the guided prediction of a frozen network."""

    def __init__(self, training: Training, context: Context, options: GuidanceDistillOptions):
        """Takes the denoiser that is followed."""
        super().__init__(training, context)
        self.options = options
        self.teacher = training.teacher(training.program, context.device)

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """Noisy samples, scales, and the guided prediction."""
        asked, g, o = self.training, self.generator(at), self.options
        clean = batch[asked.record.sample]
        levels = Levels.of(asked.draw(len(clean), g), clean.device)
        x = levels.noised(clean, torch.randn(clean.shape, generator=g).to(clean))
        scales = torch.rand(len(clean), generator=g) * (o.scale_max - o.scale_min) + o.scale_min
        scales = scales.to(clean.device)
        given = asked.conditions(batch)
        target = guided(self.teacher, asked, x, levels, given, scales)
        return {
            **batch, **asked.inputs(x, levels, given), SCALE: scales,
            self.TARGET: target, self.WEIGHT: WEIGHTS[o.weighting](levels),
        }  # fmt: skip


def guided(
    teacher: Call, training: Training, x: Tensor, at: Levels, given: Values, scales: Tensor
) -> Tensor:
    """D_without + scale (D_with - D_without), [batch, ...].

    Args:
        teacher: a denoiser with conditions.
        training: of it.
        x: [batch, ...] samples. at: their levels.
        given: conditions.
        scales: [batch].
    """
    data = said(teacher(training.inputs(x, at, given))).denoised
    other = said(teacher(training.inputs(x, at, training.without(given)))).denoised
    return other + over(scales, x) * (data - other)
