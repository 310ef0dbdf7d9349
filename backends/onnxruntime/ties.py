"""Which of equal values comes first, settled before a model is compared with its program.

Torch leaves the order of equal values open unless a sort is stable, and what it gives depends on
the processor. ONNX Runtime's order is one of those allowed: the first one comes first. So the
program that a model is compared with has its ties settled in that way, or every sort of equal
values would look like a fault.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphwright.ir.check.fidelity import compare
from graphwright.ir.edit import Editor
from graphwright.ir.program import Program

aten = torch.ops.aten


def with_settled_ties(program: Program) -> Program:
    """The program with stable sorts; the same one where nothing in it is sorted."""
    if not any(_is_open(node) for node in program.graph.nodes):
        return program
    editor = Editor(program, by="lower.ties")
    for node in list(editor.graph.nodes):
        if _is_open(node) and node.args[0].meta["val"].dim():
            SETTLED[node.target](editor, node, *node.args, **node.kwargs)
    return editor.finish(propagate=False)


def decided_by_ties(program: Program, settled: Program, bound: float) -> str:
    """A note where the order of equal values decides what a program computes; else empty.

    Args:
        program: as it is.
        settled: the same `with_settled_ties`.
        bound: relative error of the outputs on the examples that is no difference.
    """
    if settled is program:
        return ""
    with torch.no_grad():
        own, other = program.run_flat(program.examples), settled.run_flat(program.examples)
    off = compare(own, other)
    if off.within(bound):
        return ""
    sorts = ", ".join(repr(node.name) for node in program.graph.nodes if _is_open(node))
    return (
        f"{sorts}: torch leaves the order of equal values open, and the outputs depend on it; here "
        f"the first comes first, as in a stable sort (the original differs by {off.relative:.2g})"
    )


def _is_open(node: fx.Node) -> bool:
    """Whether it sorts, and torch leaves open which of two equal values comes first."""
    return node.target in SETTLED and not node.kwargs.get("stable")


def _sorted(editor: Editor, node: fx.Node, x: fx.Node, dim: int, descending: bool) -> fx.Node:
    options = {"stable": True, "dim": dim, "descending": descending}
    return editor.call(aten.sort.stable, x, before=node, like=node, **options)


def _sort(
    editor: Editor, node: fx.Node, x: fx.Node, dim: int = -1, descending: bool = False,
    stable: bool | None = None,
) -> None:  # fmt: skip
    editor.replace(node, _sorted(editor, node, x, dim, descending))


def _argsort(
    editor: Editor, node: fx.Node, x: fx.Node, dim: int = -1, descending: bool = False,
    stable: bool = False,
) -> None:  # fmt: skip
    found = _sorted(editor, node, x, dim, descending)
    editor.replace(node, editor.call(operator.getitem, found, 1, before=node, like=node))


def _topk(
    editor: Editor, node: fx.Node, x: fx.Node, k: Any, dim: int = -1, largest: bool = True,
    sorted: bool = True,
) -> None:  # fmt: skip
    found = _sorted(editor, node, x, dim, largest)
    _read_from(editor, node, found, lambda part: (aten.slice.Tensor, part, dim, 0, k))


def _kthvalue(
    editor: Editor, node: fx.Node, x: fx.Node, k: Any, dim: int = -1, keepdim: bool = False
) -> None:
    found = _sorted(editor, node, x, dim, False)
    if keepdim:
        _read_from(editor, node, found, lambda part: (aten.narrow.default, part, dim, k - 1, 1))
    else:
        _read_from(editor, node, found, lambda part: (aten.select.int, part, dim, k - 1))


def _read_from(editor: Editor, node: fx.Node, found: fx.Node, take: Any) -> None:
    """Readers of both results of a node read what `take` makes of those of a sort."""
    for reader in list(node.users):
        part = editor.call(operator.getitem, found, reader.args[1], before=reader, like=node)
        editor.replace(reader, editor.call(*take(part), before=reader, like=node))
    if not node.users:
        editor.erase(node)


SETTLED: dict[Any, Any] = {
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten.argsort.default: _argsort,
    aten.argsort.stable: _argsort,
    aten.topk.default: _topk,
    aten.kthvalue.default: _kthvalue,
}
