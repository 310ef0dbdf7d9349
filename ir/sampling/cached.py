"""Cuts of a program at values that steps take over: a graph that hands them out, and the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import gw_meta, set_gw_meta
from graphwright.ir.graph.sizes import expression_of
from graphwright.ir.program import Program
from graphwright.ir.sampling.record import Denoiser
from graphwright.ir.sampling.surgery import Interface, NewInput, with_outputs
from graphwright.ir.signature import Dim, TensorSpec

aten = torch.ops.aten
MARK = "cached"
"""Entry on a node whose value is handed out, with its name."""


def mark(node: fx.Node, name: str) -> None:
    """Marks a node as one whose value steps may take over."""
    set_gw_meta(node, **{MARK: name})


def marked(graph: fx.Graph) -> dict[str, fx.Node]:
    """The marked nodes by name."""
    return {str(gw_meta(n)[MARK]): n for n in graph.nodes if MARK in gw_meta(n)}


class _Tap:
    """A marked node, and its value with the two halves of a guided batch apart.

    Values go from call to call as [batch, ...], or as [2, batch, ...] where the rows are doubled,
    so that a call without guidance can take over the half with the condition.
    """

    def __init__(self, edit: Interface, record: Denoiser, name: str, node: fx.Node) -> None:
        self.name, self.node = name, node
        sample = edit.input(record.sample)
        rows, *rest = node.meta["val"].shape
        self.batch: Any = sample.meta["val"].shape[0]
        times = expression_of(rows) / expression_of(self.batch)
        fixed = all(expression_of(size).is_number for size in rest)
        if times not in (1, 2) or not fixed:
            raise ModelError(
                f"the value of {node.name} has the sizes {tuple(node.meta['val'].shape)}: what "
                "steps take over has a row per sample, and sizes that are fixed otherwise",
                fix="Trace the model at one size of image, or choose other modules.",
            )
        self.doubled = times == 2
        self.rest = [int(size) for size in rest]
        batch: Dim = edit.spec(record.sample).shape[0]
        self.shape: tuple[Dim, ...] = (*((2,) if self.doubled else ()), batch, *self.rest)

    def example(self, rows: int) -> torch.Tensor:
        """Random numbers in its shape."""
        shape = [rows if isinstance(size, str) else size for size in self.shape]
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.node.meta["val"].dtype)


def _taps(edit: Interface, record: Denoiser) -> list[_Tap]:
    found = marked(edit.editor.graph)
    return [_Tap(edit, record, name, found[name]) for name in record.cached]


def handing_out(program: Program, record: Denoiser) -> Program:
    """The program with the marked values for further outputs."""
    edit = Interface(program, "sampling")
    editor = edit.editor
    outputs = [
        (spec.name, node, spec.shape)
        for spec, node in zip(program.signature.outputs, edit.outputs, strict=True)
    ]
    for tap in _taps(edit, record):
        value = tap.node
        if tap.doubled:
            sample = edit.input(record.sample)
            rows = editor.call(aten.sym_size.int, sample, 0, before=edit.output)
            value = editor.call(
                aten.reshape.default, value, [2, rows, *tap.rest], before=edit.output
            )
        outputs.append((tap.name, value, tap.shape))
    edit.set_outputs(outputs)
    return edit.finish()


def shallow(program: Program, record: Denoiser) -> Program:
    """The program that takes the marked values as inputs; what only they needed is gone."""
    edit = Interface(program, "sampling")
    editor = edit.editor
    first = next(node for node in editor.graph.nodes if node.op == "call_function")
    rows = edit.example(record.sample).shape[0]
    for tap in _taps(edit, record):
        dtype = str(tap.node.meta["val"].dtype).removeprefix("torch.")
        sizes = [*([2] if tap.doubled else []), tap.batch, *tap.rest]
        node = edit.add_input(
            NewInput(TensorSpec(tap.name, dtype, tap.shape), tap.example(rows)), sizes=sizes
        )
        value = (
            editor.call(aten.flatten.using_ints, node, 0, 1, before=first) if tap.doubled else node
        )
        tap.node.replace_all_uses_with(value)
    made = edit.finish()
    from graphwright.ir.edit import Editor

    again = Editor(made, by="sampling")
    again.changed = True
    return with_outputs(again, [spec.name for spec in made.signature.outputs])
