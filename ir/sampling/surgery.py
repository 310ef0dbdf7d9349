"""Edits of programs whose inputs and outputs change: a denoiser's two outputs, doubled batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import gw_meta, set_gw_meta
from graphwright.ir.graph.shapes import propagate_shapes
from graphwright.ir.program import Program
from graphwright.ir.sampling.record import NEGATIVE
from graphwright.ir.signature import Dim, TensorSpec

aten = torch.ops.aten

JOINED = "joined"
"""Mark on a node that joins rows with the condition and rows without."""

HALF = "half"
"""Mark on a node that takes the rows with the condition out again, or those without."""


@dataclass(frozen=True)
class NewInput:
    """An input to add at the end of a program.

    Attributes:
        spec: name, dtype and shape.
        example: in that shape.
    """

    spec: TensorSpec
    example: Tensor


class Interface:
    """An editor that may also change inputs and outputs.

    Attributes:
        editor: of the program.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program = program
        self.editor = Editor(program, by=by)
        self._inputs: list[NewInput] = []
        self._outputs: list[tuple[TensorSpec, fx.Node]] | None = None

    @property
    def output(self) -> fx.Node:
        """The output node of the graph."""
        return self.editor.graph.output_node()

    def input(self, name: str) -> fx.Node:
        """The placeholder of an input."""
        found = self.editor.graph.find_nodes(op="placeholder")
        by_name: dict[str, fx.Node] = {str(node.target): node for node in found}
        return by_name[name]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes that are outputs."""
        found: Any = self.output.args[0]
        return tuple(found)

    def spec(self, name: str) -> TensorSpec:
        """What the signature says of an input."""
        return next(spec for spec in self.program.signature.inputs if spec.name == name)

    def example(self, name: str) -> Tensor:
        """The example of an input."""
        names = [spec.name for spec in self.program.signature.inputs]
        return self.program.examples[names.index(name)]

    def add_input(
        self, new: NewInput, like: fx.Node | None = None, sizes: Sequence[Any] = ()
    ) -> fx.Node:
        """Adds an input behind the others.

        Args:
            new: what it is.
            like: a node whose sizes it has; of the first axis alone where it has one dimension.
            sizes: its sizes, in the place of a node's.

        Raises:
            ModelError: the program has an input of that name.
        """
        name = new.spec.name
        known = [spec.name for spec in self.program.signature.inputs]
        if name in known + [made.spec.name for made in self._inputs]:
            raise ModelError(f"the program has an input {name!r} already", fix="Rename it.")
        last = self.editor.graph.find_nodes(op="placeholder")[-1]
        with self.editor.graph.inserting_after(last):
            node = self.editor.graph.placeholder(name)
        found = list(sizes) if like is None else list(like.meta["val"].shape)
        shape = found[: new.example.dim()]
        with self.editor.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=new.example.dtype)
        set_gw_meta(node, by=self.editor.by)
        self.editor.changed = True
        self._inputs.append(new)
        return node

    def add_number(self, name: str, value: float) -> fx.Node:
        """Adds a number that may change from call to call."""
        return self.add_input(NewInput(TensorSpec(name, "float32", ()), torch.tensor(value)))

    def add_negative(self, name: str, fill: float | None) -> fx.Node | None:
        """Adds the input with what is led away from; None where the number `fill` stands for it."""
        if fill is not None:
            return None
        spec = self.spec(name)
        new = TensorSpec(NEGATIVE + name, spec.dtype, spec.shape, spec.range)
        return self.add_input(NewInput(new, self.example(name).roll(1, 0)), self.input(name))

    def set_outputs(self, outputs: Sequence[tuple[str, fx.Node, tuple[Dim, ...]]]) -> None:
        """Makes these nodes, by name and shape, the outputs of the program."""
        self.output.args = (tuple(node for _, node, _ in outputs),)
        self._outputs = [
            (TensorSpec(name, str(node.meta["val"].dtype).removeprefix("torch."), shape), node)
            for name, node, shape in outputs
        ]
        self.editor.changed = True

    def propagate(self) -> None:
        """Computes the shapes of the graph as it is now."""
        propagate_shapes(self.program.replace(graph=self.editor.graph, state=self.editor.state))

    def finish(self) -> Program:
        """The edited program, its signature and examples."""
        made = self.editor.finish(propagate=True)
        old = made.signature
        inputs = (*old.inputs, *(new.spec for new in self._inputs))
        changes: dict[str, Any] = {"inputs": inputs}
        if self._outputs is not None:
            specs = tuple(spec for spec, _ in self._outputs)
            changes["outputs"] = specs
            changes["structure"] = {
                "dict": {spec.name: {"leaf": i} for i, spec in enumerate(specs)}
            }
        examples = (*made.examples, *(new.example for new in self._inputs))
        return made.replace(signature=replace(old, **changes), examples=examples)


def join(editor: Editor, node: fx.Node, other: fx.Node | None, before: fx.Node) -> fx.Node:
    """Rows of `node`, then rows of `other` (the same again where None), for all that read it."""
    readers = [user for user in node.users if user is not other]
    made = editor.call(aten.cat.default, [node, node if other is None else other], 0,
                       before=before)  # fmt: skip
    set_gw_meta(made, **{JOINED: True})
    for reader in readers:
        if reader is not made:
            reader.replace_input_with(node, made)
    return made


def halves(
    editor: Editor, node: fx.Node, rows: fx.Node, before: fx.Node, of: str
) -> tuple[fx.Node, fx.Node]:
    """The rows with the condition and those without.

    By slices, not `chunk`, whose guard on the number of rows would fix the batch.

    Args:
        editor: of the graph.
        node: of twice the rows.
        rows: a node that holds their number.
        before: where to insert.
        of: name of the output that the node was.
    """
    first = editor.call(aten.slice.Tensor, node, 0, 0, rows, before=before)
    second = editor.call(aten.slice.Tensor, node, 0, rows, _END, before=before)
    set_gw_meta(first, **{HALF: f"{of} with"})
    set_gw_meta(second, **{HALF: f"{of} without"})
    return first, second


_END = 9223372036854775807
"""As torch writes "to the end"."""


def is_joined(node: fx.Node) -> bool:
    """Whether a node joins rows with and without the condition."""
    return bool(gw_meta(node).get(JOINED))


def half_of(node: fx.Node) -> str:
    """The name of an output with ` with` or ` without`; empty for any other node."""
    return str(gw_meta(node).get(HALF, ""))


def with_outputs(editor: Editor, kept: list[str]) -> Program:
    """The edited program with these of its outputs, and only the inputs that are read."""
    editor.graph.eliminate_dead_code()
    unread = []
    for node in editor.graph.find_nodes(op="placeholder"):
        if not node.users:
            unread.append(str(node.target))
            editor.graph.erase_node(node)
    program = editor.finish(propagate=True)
    old = program.signature
    specs = {spec.name: spec for spec in old.outputs}
    pairs = [
        (spec, example)
        for spec, example in zip(old.inputs, program.examples, strict=True)
        if spec.name not in unread
    ]
    signature = replace(
        old,
        inputs=tuple(spec for spec, _ in pairs),
        outputs=tuple(specs[name] for name in kept),
        structure={"dict": {name: {"leaf": i} for i, name in enumerate(kept)}},
        state=tuple(name for name in old.state if name not in unread),
    )
    examples = tuple(example for _, example in pairs)
    return program.replace(signature=signature, examples=examples)
