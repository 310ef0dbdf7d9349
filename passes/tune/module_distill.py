"""tune.module_distill: trains a program module by module, each between frozen blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import layers
from graphwright.ir.options import Bounded
from graphwright.ir.program import Program
from graphwright.ir.trunk.slot import Slot
from graphwright.ir.trunk.stages import (
    STUDENT,
    Border,
    Stitch,
    differing_axis,
    fitted,
    refuse_other_ways,
    stitched,
    transplanted,
)
from graphwright.ir.trunk.trunk import Trunk, split_like, split_trunk
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.features import reading
from graphwright.ir.tune.losses import check_teacher
from graphwright.passes.base import Action, Context, Pass, Result

SAMPLES = 256
"""Samples that stitches are fitted to, at least."""


class ModuleDistillOptions(Bounded):
    """Options of tune.module_distill."""

    modules: Annotated[int, Field(ge=2)] = 4
    """Modules that the teacher is cut into, each a run of blocks; the program is cut behind the
    same blocks, or into as many modules where its blocks have other names."""

    meta_depth: Annotated[int, Field(ge=1)] = 1
    """Blocks of every module of the meta model, which are the teacher's first."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the imitation in the loss of a module; the rest is the loss of `tune`."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the logits that are imitated."""

    stitches: Literal["folded", "dropped"] = "folded"
    """What becomes of the layers between modules whose width is not the teacher's: `folded`, two of
    them become one layer of the program; `dropped`, they go, as in the paper's code."""

    meta: TuneOptions | None = TuneOptions()
    """Options of the training of the meta model; null takes the teacher's blocks as they are."""

    tune: TuneOptions = TuneOptions()
    """Options of the training of every module."""


class ModuleDistill(Pass[ModuleDistillOptions]):
    """Trains every module of a program by itself to do what the teacher's module does in its place.

    The teacher is the model before the first pass; the program is what passes made of it: pruned,
    factorized, narrower, with fewer blocks. A meta model, the teacher with `meta_depth` blocks in
    every module, is trained and frozen. In each of its places the program's module learns, by
    (1 - alpha) * the loss of `tune` + alpha * t^2 * KL / (rows * classes) of the logits that the
    teacher's module gives there. Modules are trained independently of each other, so that nothing
    larger than the meta model and one module is in training.

    Where a program is of another width, a stitch leads from the meta model's channels to the
    module's, and another one back. They start as the least-squares maps between the values there,
    and train along. In the result the one that leaves a module and the one that enters the next are
    a single layer, which is exact. Train the whole behind this pass: `tune.finetune`.

    `resize.module_distill` makes a student of the trunk itself; here the student is given.

    Source: P44 (Lo et al. 2024, "m2mKD"), with its defaults of alpha and temperature, and the
    divisor of its released code. The start of the stitches is ours.
    """

    contract = "lossy"
    needs = "training"
    weights = "trained"
    papers = ("P44",)
    before = ("quantize.*", "adapt.*")
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        """Trains the meta model, then the modules.

        Raises:
            ArgumentError: there is no teacher, or it takes other inputs.
            ModelError: the programs cannot be cut into such modules, or weights are codes.
        """
        o = self.options
        trunk, student = self._trunks(program, context)
        meta = self._meta(trunk, context)
        borders = self._borders(trunk, student, meta, context)
        refuse_other_ways(program, borders, student.owner)
        found: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        for place in range(o.modules):
            within = context.within("module", place)
            trained = self._module(trunk, meta, program, borders, place, within, metrics)
            found |= own_tensors(trained)
            borders = moved(borders, place, trained)
        result = program.replace(state={**program.state, **found})
        if o.stitches == "folded":
            result = stitched(result, borders, self.id)
        return Result(result, tuple(self._actions(student, borders)), metrics)

    def _trunks(self, program: Program, context: Context) -> tuple[Trunk, Trunk]:
        """Teacher and program in modules."""
        coded = next((layer.name for layer in layers(program) if not layer.weight), "")
        if coded:
            raise ModelError(f"the weight of {coded} is stored in codes, which no module trains",
                             fix="Distil in front of quantization.")  # fmt: skip
        teacher = context.teacher
        if teacher is None:
            raise ArgumentError(f"{self.id} needs a teacher",
                                fix="In Python, pass teacher=program to the pass.")  # fmt: skip
        check_teacher(teacher, program)
        shapes = [[spec.shape for spec in each.signature.outputs] for each in (teacher, program)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"{self.id}: the teacher's outputs are {shapes[0]}, and the program's "
                             f"{shapes[1]}")  # fmt: skip
        trunk = split_trunk(teacher, self.options.modules)
        return trunk, split_like(program, trunk)

    def _meta(self, trunk: Trunk, context: Context) -> Program:
        """The meta model."""
        o = self.options
        start = trunk.reduced([o.meta_depth] * o.modules, self.id)
        if o.meta is None:
            return start
        return tune(start, context.training_data, o.meta, context.within("meta"),
                    teacher=trunk.program).program  # fmt: skip

    def _borders(
        self, trunk: Trunk, student: Trunk, meta: Program, context: Context
    ) -> list[Border]:
        """The values between modules, with fitted stitches where widths differ."""
        o = self.options
        names = list(zip(student.ends(), trunk.ends([o.meta_depth] * o.modules), strict=True))
        ours, theirs = (
            {node.name: node for node in p.graph.nodes} for p in (student.program, meta)
        )
        borders = [Border(a, b, differing_axis(ours[a], theirs[b])) for a, b in names]
        if all(border.axis is None for border in borders):
            return borders
        seen = [
            self._values(student.program, [border.node for border in borders], context),
            self._values(meta, [border.meta for border in borders], context),
        ]
        made = []
        for border, a, b in zip(borders, *seen, strict=True):
            if border.axis is None:
                made.append(border)
                continue
            leave, enter = fitted(a, b, border.axis), fitted(b, a, border.axis)
            made.append(replace(border, leave=leave, enter=enter))
        return made

    def _values(self, program: Program, names: list[str], context: Context) -> list[Tensor]:
        """Values of nodes on the first batches."""
        read = reading(program.eval(), names)
        found: list[tuple[Tensor, ...]] = []
        samples = 0
        with torch.no_grad():
            for batch in as_batches(context.training_data, program.signature):
                given = [batch[s.name].to(context.device) for s in program.signature.inputs]
                found.append(tuple(value.cpu() for value in read(*given)[:-1]))
                samples += len(found[-1][0])
                if samples >= SAMPLES:
                    break
        return [torch.cat(values) for values in zip(*found, strict=True)]

    def _module(
        self, trunk: Trunk, meta: Program, program: Program, borders: list[Border], place: int,
        context: Context, metrics: dict[str, float],
    ) -> Program:  # fmt: skip
        """The meta model with the program's module, trained in its place."""
        o = self.options
        teacher = trunk.hybrid(meta, place, len(trunk.modules[place]), o.meta_depth, self.id)
        start = transplanted(meta, program, borders, place, self.id)
        own = [name for name in start.state if name.startswith((STUDENT, "stitch."))]
        names = [name for name in own if name in start.trainable()]
        if not names:
            return start
        tuned = tune(start, context.training_data, o.tune, context, teacher=teacher, names=names,
                     hooks=[Slot(teacher, own, o.alpha, o.temperature)])  # fmt: skip
        metrics[f"module_{place}_first_loss"] = tuned.history.losses[0]
        metrics[f"module_{place}_last_loss"] = tuned.history.losses[-1]
        return tuned.program

    def _actions(self, student: Trunk, borders: list[Border]) -> list[Action]:
        actions = [
            Action(block[0].block, f"module {place}, trained in the meta model")
            for place, module in enumerate(student.modules)
            for block in module
        ]
        kept = self.options.stitches == "folded"
        what = "two stitches as one layer" if kept else "trained with stitches, which are gone"
        return actions + [Action(f"stitch.{number}", what)
                          for number, border in enumerate(borders)
                          if border.axis is not None]  # fmt: skip


def own_tensors(trained: Program) -> Mapping[str, Tensor]:
    """The student's tensors in a network that its module was put into, by its own names."""
    return {
        name.removeprefix(STUDENT): tensor
        for name, tensor in trained.state.items()
        if name.startswith(STUDENT)
    }


def moved(borders: list[Border], place: int, trained: Program) -> list[Border]:
    """The borders with the trained stitches around one place."""
    found = list(borders)
    for number, field in ((place - 1, "enter"), (place, "leave")):
        name = f"stitch.{field}"
        if f"{name}.weight" in trained.state:
            weight = trained.state[f"{name}.weight"].detach().flatten(1)
            stitch = Stitch(weight, trained.state[f"{name}.bias"].detach())
            entered = replace(found[number], enter=stitch)
            left = replace(found[number], leave=stitch)
            found[number] = entered if field == "enter" else left
    return found
