"""resize.module_distill: a shallower network, distilled module by module."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import layers
from graphwright.ir.options import Bounded
from graphwright.ir.program import Program
from graphwright.ir.trunk.slot import Slot
from graphwright.ir.trunk.trunk import Trunk, split_trunk, spread
from graphwright.ir.tune import TuneOptions, tune
from graphwright.passes.base import Action, Context, Pass, Result

Count = Annotated[int, Field(ge=1)]


class ModuleDistillOptions(Bounded):
    """Options of resize.module_distill."""

    modules: Annotated[int, Field(ge=2)] = 4
    """Modules that the trunk is cut into, each a run of blocks."""

    depth: Count = 1
    """Blocks of every module that the student has; they start as the teacher's."""

    meta_depth: Count = 1
    """Blocks of every module of the meta model."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the imitation in the loss of a module; the rest is the loss of `tune`."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the logits that are imitated."""

    meta: TuneOptions = TuneOptions()
    """Options of the training of the meta model."""

    tune: TuneOptions = TuneOptions()
    """Options of the training of every module."""


class ModuleDistill(Pass[ModuleDistillOptions]):
    """Cuts the trunk into modules, distils each by itself, and puts the student's together.

    A meta model with `meta_depth` blocks per module is trained first, and frozen. Then the
    teacher's and the student's module take the same place in it, one after the other: the student's
    imitates the logits that the teacher's gives there. Modules are trained independently of each
    other. The student is the teacher with fewer blocks in each, of the same width, so that no
    layers have to stitch them. Train it as a whole behind this pass: `tune.finetune`.

    A block is what shares a numbered scope (`layers.3`): its residual units go together.

    Source: P44 (Lo et al. 2024, "m2mKD"), with its defaults of alpha and temperature. Its students
    are modular networks (mixtures of experts, neural attentive circuits); here a student is what
    the trunk gives.
    """

    contract = "lossy"
    needs = "training"
    weights = "trained"
    papers = ("P44",)
    before = ("quantize.*", "adapt.*")
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        coded = next((layer.name for layer in layers(program) if not layer.weight), "")
        if coded:
            raise ModelError(f"the weight of {coded} is stored in codes, which no module trains",
                             fix="Distil in front of quantization.")  # fmt: skip
        trunk = split_trunk(program, o.modules)
        longest = max(len(module) for module in trunk.modules)
        if o.depth >= longest:
            raise ArgumentError(f"depth {o.depth} leaves all {longest} blocks of every module",
                                fix="Lower depth or modules.")  # fmt: skip
        meta = self._meta(trunk, context)
        found: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        for place in range(o.modules):
            found |= self._module(trunk, meta, place, context.within("module", place), metrics)
        student = trunk.reduced([o.depth] * o.modules, self.id)
        state = {name: found[name] for name in student.state}
        return Result(student.replace(state=state), tuple(self._actions(trunk)), metrics)

    def _meta(self, trunk: Trunk, context: Context) -> Program:
        """The meta model, trained on the task."""
        o = self.options
        start = trunk.reduced([o.meta_depth] * o.modules, self.id)
        return tune(start, context.training_data, o.meta, context.within("meta"),
                    teacher=trunk.program).program  # fmt: skip

    def _module(
        self, trunk: Trunk, meta: Program, place: int, context: Context, metrics: dict[str, float]
    ) -> dict[str, Tensor]:
        """The student's module of one place, by name of its tensors."""
        o = self.options
        teacher = trunk.hybrid(meta, place, len(trunk.modules[place]), o.meta_depth, self.id)
        student = trunk.hybrid(meta, place, o.depth, o.meta_depth, self.id)
        own = trunk.names(student, place)
        trainable = [name for name in own if name in student.trainable()]
        hook = Slot(teacher, own, o.alpha, o.temperature)
        tuned = tune(student, context.training_data, o.tune, context, hooks=[hook],
                     teacher=teacher, names=trainable)  # fmt: skip
        metrics[f"module_{place}_first_loss"] = tuned.history.losses[0]
        metrics[f"module_{place}_last_loss"] = tuned.history.losses[-1]
        return {name: tuned.program.state[name] for name in own}

    def _actions(self, trunk: Trunk) -> list[Action]:
        actions = []
        for place, module in enumerate(trunk.modules):
            kept = spread(len(module), self.options.depth)
            for number, block in enumerate(module):
                name = block[0].block
                what = f"module {place}, trained in the meta model"
                gone = f"module {place}, gone"
                actions.append(Action(name, what if number in kept else gone))
        return actions
