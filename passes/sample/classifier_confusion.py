"""sample.classifier_confusion: guidance away from the class a sample is taken for (P73)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import fx

from graphwright.ir.errors import ModelError
from graphwright.ir.files.archive import load_program
from graphwright.ir.graft import graft
from graphwright.ir.graph.inline import inline
from graphwright.ir.graph.nodes import set_gw_meta
from graphwright.ir.program import Program
from graphwright.ir.sampling.confusion import AwayFromReference, Confusion, Measure, again
from graphwright.ir.sampling.marked import mark_part, value_of_part
from graphwright.ir.sampling.record import DENOISED, FACT, NOISE, Denoiser, Guidance
from graphwright.ir.sampling.surgery import HALF, Interface, NewInput
from graphwright.ir.signature import TensorSpec
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.sample._form.base import Named, Run, SamplePass
from graphwright.passes.sample._form.guider import GUIDERS
from graphwright.passes.sample._form.options import Interval

MOST = "max_scale"
SHOWN, LOGITS = "shown", "logits"
aten = torch.ops.aten


class ClassifierConfusionOptions(Interval):
    """Options of sample.classifier_confusion."""

    classifier: Annotated[str, Field(min_length=1, examples=["classifier.pt2"])]
    """Program file of a classifier of data without noise: one input in the shape of the sample,
    logits over the denoiser's labels in their order. Relative to the spec's folder."""

    label: str | None = None
    """Condition that is the label; the only one of whole numbers when absent."""

    max_scale: Annotated[float, Field(ge=1)] = 3.0
    """Guidance scale of a sample that the classifier is sure is of another class. A trajectory may
    be given another one, and one for every step."""

    gfcg_reconstruction_h: Measure = "missing"
    """How confusion is measured, from 0 (no guidance) to 1: `missing`, 1 - p of the label;
    `against_reference`, p of the reference as a share of both."""

    input_scale: float = 1.0
    """The classifier is shown input_scale D + input_shift: 0.5 where the denoiser's data is in
    -1..1 and the classifier's in 0..1."""

    input_shift: float = 0.0
    """As above: 0.5 in that case."""


class ClassifierConfusion(SamplePass[ClassifierConfusionOptions]):
    """Leads away from the class that the sample is most confused with, without gradients.

    In every call the network predicts the data D_c for the label c, a classifier looks at it, and
    the likeliest other class is the reference r. The network is run again for r, and

        D = D_r + w (D_c - D_r),   w = 1 + (max_scale - 1) h,   h = 1 - p_c,

    so that a sample that is seen for what it should be is not guided at all. Two evaluations of the
    network per step, as classifier-free guidance, but one behind the other; what does not depend on
    the label is computed once. Outside of `start` to `stop` the network runs once.

    Source: P73. The paper's abstract says that a classifier in inference mode chooses the reference
    class and the scale; its formula for the scale could not be had, so w and h are a
    reconstruction, and not the published one. The mixture with autoguidance, by a weaker network
    for D_r, is not here.
    """

    papers = ("P73",)
    behind: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    conflicts: ClassVar[tuple[str, ...]] = (*GUIDERS, "sample.reuse")

    def run(self, program: Program, context: Context) -> Result:
        """Puts classifier, second run and guider behind the denoiser.

        Raises:
            ModelError: guidance is there already, no condition is a label, or the classifier does
                not fit the sample or the labels.
        """
        record, options = Denoiser.required(program, self.id), self.options
        label = _label(record, program, options.label, self.id)
        classifier = load_program(context.folder / Path(options.classifier))
        _refuse_other(classifier, program, record, label, options.classifier)
        edit = Interface(program, self.id)
        editor, end = edit.editor, edit.output
        data, noise = edit.outputs
        most = edit.add_input(
            NewInput(TensorSpec(MOST, "float32", ()), torch.tensor(options.max_scale))
        )

        def call(target: Any, *args: Any) -> fx.Node:
            return editor.call(target, *args, before=end)

        seen = call(aten.clone.default, data)
        mark_part(seen, SHOWN)
        shown = call(aten.add.Tensor, call(aten.mul.Tensor, seen, options.input_scale),
                     options.input_shift)  # fmt: skip
        (name,) = [spec.name for spec in classifier.signature.inputs]
        (found,) = inline(editor, classifier, {name: shown}, prefix=f"{self.id}.classifier",
                          before=end)  # fmt: skip
        logits = call(aten.clone.default, found)
        mark_part(logits, LOGITS)
        asked = edit.input(label)
        measure = Confusion(options.gfcg_reconstruction_h)
        reference, confusion = graft(editor, measure, logits, asked, name=self.id, before=end)
        own = [call(aten.clone.default, node) for node in (data, noise)]
        for node, output in zip(own, (DENOISED, NOISE), strict=True):
            set_gw_meta(node, **{HALF: f"{output} with"})
        others = again(editor, {asked: reference}, (data, noise), end)
        reads = (own[0], others[0], own[1], others[1], confusion, most)
        made = graft(editor, AwayFromReference(), *reads, name=self.id, before=end)
        shape = edit.spec(record.sample).shape
        edit.set_outputs([(n, m, shape) for n, m in zip((DENOISED, NOISE), made, strict=True)])
        editor.facts[FACT] = record.replace(
            guidance=Guidance(self.id, {MOST: options.max_scale}, options.interval())
        ).to_json()
        count = classifier.signature.outputs[0].shape[1]
        said = f"led away from the likeliest other one of {count} classes, scale up to "
        return Result(edit.finish(), (Action("denoiser", f"{said}{options.max_scale:g}"),))

    def expected(self, after: Program, run: Run, given: Named) -> Mapping[str, Any]:
        """The formulas on two runs of the denoiser, with the classifier's word in between."""
        record = Denoiser.required(after, self.id)
        label = _label(record, after, self.options.label, self.id)
        own = run(given)
        p = value_of_part(after, SHOWN, own[DENOISED], LOGITS).softmax(1)
        asked = given[label]
        own_class = torch.arange(p.shape[1]) == asked[:, None]  # none for the label of no class
        largest, reference = p.masked_fill(own_class, -1).max(1)
        mine = p.masked_fill(~own_class, 0).sum(1)
        h = 1 - mine
        if self.options.gfcg_reconstruction_h == "against_reference":
            h = largest / (mine + largest)
        other = run({**given, label: reference.to(asked.dtype)})
        w = (1 + (given[MOST] - 1) * h).reshape(-1, *[1] * (own[DENOISED].dim() - 1))
        return {name: other[name] + w * (own[name] - other[name]) for name in (DENOISED, NOISE)}


def _label(record: Denoiser, program: Program, asked: str | None, by: str) -> str:
    """The condition that is the label."""
    if record.guidance is not None and record.guidance.by != by:
        raise ModelError(
            f"{by}: {record.guidance.by} has put guidance around this denoiser already",
            fix="Keep one of the two.",
        )
    specs = {spec.name: spec for spec in program.signature.inputs}
    labels = [n for n in record.conditions if specs[n].dtype in ("int64", "int32")]
    if asked is not None:
        labels = [name for name in labels if name == asked]
    if len(labels) != 1 or len(specs[labels[0]].shape) != 1:
        raise ModelError(
            f"{by}: one condition has to be the label, a whole number per sample; conditions are "
            f"{list(record.conditions)}",
            fix="Name it as `label`.",
        )
    return labels[0]


def _refuse_other(
    classifier: Program, program: Program, record: Denoiser, label: str, path: str
) -> None:
    """The classifier takes the sample, and has the denoiser's labels for its classes."""
    specs = {spec.name: spec for spec in program.signature.inputs}
    sample = specs[record.sample]
    inputs, outputs = classifier.signature.inputs, classifier.signature.outputs
    shapes = [(spec.dtype, spec.shape[1:]) for spec in inputs]
    if shapes != [(sample.dtype, sample.shape[1:])]:
        took = ", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in inputs)
        raise ModelError(
            f"the classifier takes {took}, and the sample is {sample.dtype} {list(sample.shape)}; "
            "it has to take data alone, without a level of noise",
            where=path,
        )
    if isinstance(inputs[0].shape[0], int):
        raise ModelError(
            f"the classifier's batch is fixed at {inputs[0].shape[0]}", where=path,
            fix="Trace it with a free batch.",
        )  # fmt: skip
    if len(outputs) != 1 or len(outputs[0].shape) != 2:
        raise ModelError("the classifier has to give one output, logits [batch, classes]",
                         where=path)  # fmt: skip
    count, fill = outputs[0].shape[1], record.conditions[label]
    known = specs[label].range
    labels = None
    if known is not None:
        labels = int(known[1] - known[0]) - (fill is not None and known[0] <= fill < known[1])
    misplaced = fill is not None and isinstance(count, int) and 0 <= fill < count
    if misplaced or (labels is not None and labels != count):
        without = "" if fill is None else f", beside {fill:g} for none"
        raise ModelError(
            f"the classifier has {count} classes, and {label!r} has other labels: "
            f"{'0 to ' + str(labels - 1) if labels is not None else 'some number'}{without}",
            where=path,
            fix="Take a classifier whose class k is the label k, for all labels.",
        )
