"""sample.joint: a picture and its condition as one pair, each at its own level of noise (P83)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.record import JOINT_FACT, Denoiser
from graphwright.ir.sampling.surgery import Interface, NewInput, with_outputs
from graphwright.ir.signature import TensorSpec
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.sample._form.base import Named, Run, SamplePass
from graphwright.passes.sample._form.guider import GUIDERS, OF_PAIRS

aten = torch.ops.aten
SAMPLE, TIMES = "pair", "pair_times"


class JointOptions(Options):
    """Options of sample.joint."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("pictures", "pictures is None or pictures[0] != pictures[1]",
             "pictures have to be two inputs"),
        Rule("times", "times is None or times[0] != times[1]", "times have to be two inputs"),
    )  # fmt: skip

    pictures: tuple[str, str] | None = None
    """Inputs that are noisy, in the order of the outputs; the first two when absent."""

    times: tuple[str, str] | None = None
    """Inputs that say how noisy each is; the third and the fourth when absent."""


class Joint(SamplePass[JointOptions]):
    """Makes one sample of two pictures that a network denoises together.

    The network takes a picture and a condition of the same size (a depth map, edges), a time for
    each, and returns an output for each. Behind this pass the two are one sample [batch, 2, ...]
    with two levels of noise, so that `sample.denoiser` and guidance go on as ever. What is made of
    what is then a schedule of the two times: the picture of a given condition, the condition of a
    given picture, both at once, or a condition that leads only roughly because it stays noisy for a
    while (`task=` and `known=` of sampling).

    Source: P83 (UniCon), its sampling by schedules of two times. The joint attention by which its
    network lets the two pictures read each other is trained into the network before; the guidance
    between a joint and a separate prediction asks for it to be switched off, and is not here.
    """

    papers = ("P83",)
    before: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    conflicts: ClassVar[tuple[str, ...]] = (
        *(guider for guider in GUIDERS if guider not in OF_PAIRS),
        "sample.joint", "sample.retrieve", "sample.stream", "sample.switch",
    )  # fmt: skip

    def run(self, program: Program, context: Context) -> Result:
        """Joins the inputs and the outputs.

        Raises:
            ModelError: the network has not two pictures of one size, two times and two outputs.
        """
        if Denoiser.of(program) is not None:
            raise ModelError(f"{self.id}: the program is a denoiser already",
                             fix="Put this pass in front of `sample.denoiser`.")  # fmt: skip
        pictures, times = self._names(program)
        _refuse(program, pictures, times, self.id)
        edit = Interface(program, self.id)
        for names, new in ((pictures, SAMPLE), (times, TIMES)):
            self._join(edit, names, new)
        edit.propagate()
        shape = edit.spec(pictures[0]).shape
        out = edit.editor.call(aten.stack.default, list(edit.outputs), 1, before=edit.output)
        edit.set_outputs([(SAMPLE, out, (shape[0], 2, *shape[1:]))])
        edit.editor.facts[JOINT_FACT] = {"sample": SAMPLE, "time": TIMES, "names": list(pictures),
                                        "times": list(times)}  # fmt: skip
        editor = Editor(edit.finish(), by=self.id)
        editor.changed = True
        text = f"{pictures[0]} and {pictures[1]}, told {times[0]} and {times[1]}"
        return Result(with_outputs(editor, [SAMPLE]), (Action("network", text),))

    def expected(self, after: Program, run: Run, given: Named) -> Mapping[str, Any]:
        """The network on the two halves of the pair."""
        said = after.facts[JOINT_FACT]
        pictures, times = said["names"], said["times"]
        told = dict(zip(pictures, given[SAMPLE].unbind(1), strict=True))
        told |= dict(zip(times, given[TIMES].unbind(1), strict=True))
        return {SAMPLE: torch.stack(list(run({**given, **told}).values()), 1)}

    def _names(self, program: Program) -> tuple[tuple[str, str], tuple[str, str]]:
        names = [spec.name for spec in program.signature.inputs]
        if len(names) < 4:
            raise ModelError(
                f"{self.id}: a network of two pictures has two times as well, and this has the "
                f"inputs {names}"
            )
        pictures = self.options.pictures or (names[0], names[1])
        times = self.options.times or (names[2], names[3])
        for name in (*pictures, *times):
            if name not in names:
                raise ModelError(f"{self.id}: the program has no input {name!r}, but {names}")
        return pictures, times

    def _join(self, edit: Interface, names: tuple[str, str], new: str) -> fx.Node:
        nodes, spec = [edit.input(name) for name in names], edit.spec(names[0])
        readers = [list(node.users) for node in nodes]
        first = next(n for n in edit.editor.graph.nodes if n.op == "call_function")
        example = torch.stack([edit.example(name) for name in names], 1)
        sizes = list(nodes[0].meta["val"].shape)
        made = TensorSpec(new, spec.dtype, (spec.shape[0], 2, *spec.shape[1:]), spec.range)
        pair = edit.add_input(NewInput(made, example), sizes=[sizes[0], 2, *sizes[1:]])
        for k, (node, users) in enumerate(zip(nodes, readers, strict=True)):
            one = edit.editor.call(aten.select.int, pair, 1, k, before=first)
            for user in users:
                user.replace_input_with(node, one)
        return pair


def _refuse(program: Program, pictures: tuple[str, str], times: tuple[str, str], by: str) -> None:
    specs = {spec.name: spec for spec in program.signature.inputs}
    for kind, names in (("picture", pictures), ("time", times)):
        one, two = (specs[name] for name in names)
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            raise ModelError(
                f"{by}: the {kind}s {names[0]!r} and {names[1]!r} are {one.dtype} {one.shape} and "
                f"{two.dtype} {two.shape}, and a pair is of one size"
            )
    shape = specs[pictures[0]].shape
    if specs[times[0]].shape != shape[:1]:
        raise ModelError(
            f"{by}: the times have the shape {specs[times[0]].shape}, and every row has its own",
            fix="Trace the network with times of shape [batch].",
        )
    outputs = [spec.shape for spec in program.signature.outputs]
    if outputs != [shape, shape]:
        raise ModelError(
            f"{by}: the network has to return an output {shape} for each picture, and returns "
            f"{outputs}"
        )
