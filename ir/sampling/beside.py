"""Two programs in one: a second one beside the first on the same inputs, and apart again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import gw_meta, set_gw_meta
from graphwright.ir.program import Program
from graphwright.ir.sampling.surgery import Interface, NewInput, with_outputs
from graphwright.ir.signature import Dim


def put_beside(program: Program, other: Program, name: str, by: str) -> Program:
    """The program with the calls of another one on the same inputs, whose outputs come last.

    Inputs are the same where their names are; those that only the other one has are added. Its
    tensors and outputs are named `<name>.<tensor>` and `<name>_<output>`; marks on nodes stay.

    Raises:
        ModelError: inputs of one name differ in dtype, shape or range.
    """
    edit = Interface(program, by)
    editor = edit.editor
    known = {spec.name: spec for spec in program.signature.inputs}
    examples = dict(zip((s.name for s in other.signature.inputs), other.examples, strict=True))
    made: dict[fx.Node, fx.Node] = {}
    for node in other.graph.nodes:
        if node.op == "placeholder":
            spec = next(s for s in other.signature.inputs if s.name == str(node.target))
            own = known.get(spec.name)
            if own is None:
                new = NewInput(spec, examples[spec.name])
                made[node] = edit.add_input(new, sizes=[_size(edit, dim) for dim in spec.shape])
            elif (own.dtype, own.shape) != (spec.dtype, spec.shape):
                raise ModelError(
                    f"{by}: the input {spec.name!r} is {own.dtype} {own.shape} here, and "
                    f"{spec.dtype} {spec.shape} in the other program",
                    fix="Trace both networks with the same inputs.",
                )
            else:
                made[node] = edit.input(spec.name)
        elif node.op == "get_attr":
            stored = other.state[str(node.target)]
            made[node] = editor.get(editor.add_state(f"{name}.{node.target}", stored))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: made[n])
            copy = editor.call(node.target, *args, before=edit.output, like=node, **kwargs)
            set_gw_meta(copy, **{k: v for k, v in gw_meta(node).items() if k != "by"})
            made[node] = copy
    outputs = [
        (spec.name, node, spec.shape)
        for spec, node in zip(program.signature.outputs, edit.outputs, strict=True)
    ]
    theirs = other.graph.output_node().args[0]
    assert isinstance(theirs, tuple)
    outputs += [
        (f"{name}_{spec.name}", made[node], spec.shape)
        for spec, node in zip(other.signature.outputs, theirs, strict=True)
        if isinstance(node, fx.Node)
    ]
    edit.set_outputs(outputs)
    return edit.finish()


def _size(edit: Interface, dim: Dim) -> Any:
    """The size of a dimension in the graph, by its name in the signature."""
    for spec in edit.program.signature.inputs:
        if dim in spec.shape and isinstance(dim, str):
            return edit.input(spec.name).meta["val"].shape[spec.shape.index(dim)]
    return dim


def apart(program: Program, name: str) -> tuple[Program, Program]:
    """The two programs of `put_beside`: the first, and the one that was put beside it."""
    prefix = f"{name}_"
    names = [spec.name for spec in program.signature.outputs]
    own = _only(program, [n for n in names if not n.startswith(prefix)])
    other = _only(program, [n for n in names if n.startswith(prefix)])
    specs = tuple(
        replace(spec, name=spec.name.removeprefix(prefix)) for spec in other.signature.outputs
    )
    structure = {"dict": {spec.name: {"leaf": i} for i, spec in enumerate(specs)}}
    signature = replace(other.signature, outputs=specs, structure=structure)
    return own, other.replace(signature=signature)


def _only(program: Program, outputs: list[str]) -> Program:
    """The program with these of its outputs alone."""
    names = [spec.name for spec in program.signature.outputs]
    editor = Editor(program, by="sampling")
    kept = editor.graph.output_node().args[0]
    assert isinstance(kept, tuple)
    editor.graph.output_node().args = (tuple(kept[names.index(name)] for name in outputs),)
    editor.changed = True
    return with_outputs(editor, outputs)
