"""tune.distill: trains a program to follow the model as it was, or others: outputs and inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.archive import load_program
from graphwright.ir.options import Bounded, Options, Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, TuneOptions, tune
from graphwright.ir.tune.losses import check_teacher, main_output, make_loss
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._distill.discriminator import Judged, Mode
from graphwright.passes.tune._distill.following import Inside, Match, Teaching, following
from graphwright.passes.tune._distill.pairs import Found, find_places
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of

REFERENCE = "reference"
"""Name of the model before the first pass among the teachers."""

Factor = Annotated[float, Field(ge=0)]


class DiscriminatorOptions(Options):
    """Options of the discriminator."""

    mode: Mode = "adversarial"
    """`adversarial`: the program learns to be taken for its teachers. `as_released`: the gradient
    as in the paper's code, which lets it learn to be told apart, and a ReLU on the last layer."""

    reduction: Annotated[int, Field(ge=1)] = 8
    """Factor K of its widths: C logits, C // K, C // K^2, 2. C // K^2 has to be 1 or more."""

    factor: Factor = 1.0
    """Factor of its loss."""


class DistillOptions(Bounded):
    """Options of tune.distill."""

    rules = (
        Rule("labels", "output or labels or features or attention",
             "nothing is compared: output, labels, features and attention are all 0"),
        Rule("tune", "labels or (tune['loss'] == 'cross_entropy' and not tune['label_smoothing'])",
             "tune.loss is the loss on labels here: set labels to its factor"),
        Rule("temperature", "'temperature' not in given or (output and match == 'soft_labels')",
             "temperature is of soft labels, which have no part here"),
        Rule("nodes", "'nodes' not in given or features or attention",
             "nodes are for features and attention: set one of these to a factor"),
    )  # fmt: skip

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer, such as a class token, goes by its own name."""

    teachers: Annotated[tuple[str, ...], Field(min_length=1)] = (REFERENCE,)
    """The teachers: `reference`, the model before the first pass, and program files of others that
    take the same inputs and give the same output."""

    output: Factor = 1.0
    """Factor of the distance from the teachers' outputs."""

    match: Match = "soft_labels"
    """How outputs are compared: `soft_labels`, the divergence from the mean of the teachers'
    probabilities; `mse`, for outputs that are no logits, the relative squared difference from their
    mean."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of soft labels."""

    labels: Factor = 0.0
    """Factor of the loss on labels, `tune: {loss: ...}`; where it is 0, the data needs none."""

    features: Factor = 0.0
    """Factor of the relative squared distance of values inside from the first teacher's, averaged
    over `nodes`."""

    attention: Factor = 0.0
    """Factor of the distance of attention from the first teacher's, averaged over `nodes`: the
    divergence of fused attentions, and the squared distance of the attention maps of
    convolutions, whose numbers of channels may differ."""

    nodes: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Where `features` and `attention` compare: patterns over names of layers, which stand for
    their outputs, and of attention nodes; exact names of other nodes; or `student=teacher`, two
    exact names. What a pattern finds is left out where the shapes differ."""

    discriminator: DiscriminatorOptions | None = None
    """A small network that tells the program's logits from the teachers', trained along; none when
    absent."""

    tune: TuneOptions = TuneOptions()
    """Options of training; `loss` has a part with `labels` alone."""


class Distill(Pass[DistillOptions]):
    """Trains a program to follow its teachers, mostly the model as it was before the first pass.

    Loss: `output` * distance of the outputs + `labels` * the loss on labels + `features` * distance
    of values inside + `attention` * distance of attention + the discriminator's. Several teachers
    are averaged as probabilities. Places inside are found by the names that the two graphs share.

    P33's recipe is soft labels alone with a discriminator, without weight decay: `discriminator:
    {}` with `tune: {optimizer: sgd, lr: 0.01}`. Its discriminator learns at the rate of the
    program, as in the released code. That lets both minimize the discriminator's loss, against the
    paper; the gradient is turned around here, unless `mode` says `as_released`.

    Source: P33 (Shen & Savvides 2020, "MEAL V2"); features as in Romero et al. 2015, attention as
    in Zagoruyko & Komodakis 2017 and Wang et al. 2020.
    """

    contract = "lossy"
    needs = "training"
    papers = ("P33",)
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        chosen = chosen_parameters(program, o.targets, self.id)
        teachers = [self._teacher(name, program, context) for name in o.teachers]
        found = Found()
        if o.features or o.attention:
            found = find_places(program, teachers[0], o.nodes)
        both = ((o.features, found.features), (o.attention, found.attention))
        groups = [(factor, places) for factor, places in both if factor]
        self._refuse_nothing(found)
        nodes = [name for _, places in groups for place in places for name in place.theirs]
        teaching = Teaching(teachers, nodes, context.device)
        data = as_batches(context.training_data, program.signature)
        main = main_output(program.signature)
        on_labels = None
        if o.labels:
            on_labels = make_loss(o.tune.loss, data, context.folder, None, o.tune.label_smoothing)
        loss = following(teaching, main, o.match, o.temperature, o.output, o.labels, on_labels)
        hooks: list[Hook] = [Inside(teaching, groups)] if groups else []
        if o.discriminator is not None:
            hooks.append(self._judged(o.discriminator, teaching, program, context))
        tuned = tune(program, data, o.tune, context, names=chosen.names, loss=loss,
                     hooks=[*training_hooks(program), *hooks])  # fmt: skip
        metrics = metrics_of(tuned.history)
        metrics |= {f"{what}_compared": float(len(places)) for what, places in
                    (("features", found.features), ("attention", found.attention))
                    if getattr(o, what)}  # fmt: skip
        left = [Action.left(name, reason) for name, reason in found.left.items()]
        return Result(tuned.program, (*chosen.actions(tuned), *left), metrics)

    def _teacher(self, name: str, program: Program, context: Context) -> Program:
        teacher = context.teacher
        if name != REFERENCE:
            where = Path(name) if Path(name).is_absolute() else context.folder / name
            teacher = load_program(where)
        if teacher is None:
            raise ArgumentError(f"{self.id} needs a teacher",
                                fix="In Python, pass teacher=program to the pass.")  # fmt: skip
        check_teacher(teacher, program)
        own, given = (_classes(each) for each in (program, teacher))
        if own != given:
            raise ModelError(f"{self.id}: the teacher {name!r} gives {given} numbers for each "
                             f"prediction, and the program {own}")  # fmt: skip
        return teacher

    def _refuse_nothing(self, found: Found) -> None:
        for what, places in (("features", found.features), ("attention", found.attention)):
            if getattr(self.options, what) and not places:
                raise ModelError(
                    f"{self.id}: the program and its teacher share no {what} to compare",
                    fix=f"Leave out {what}, or name pairs of nodes in `nodes`.",
                )

    def _judged(
        self, options: DiscriminatorOptions, teaching: Teaching, program: Program, context: Context
    ) -> Judged:
        return Judged(
            teaching, program.signature, _classes(program), options.mode, options.reduction,
            options.factor, context.generator("discriminator"),
        )  # fmt: skip


def _classes(program: Program) -> int:
    """Size of the last axis of the output that is compared."""
    shape: Sequence[int | str] = program.signature.outputs[main_output(program.signature)].shape
    if not shape or not isinstance(shape[-1], int):
        raise ModelError("outputs without a last axis of a fixed size cannot be compared")
    return shape[-1]
