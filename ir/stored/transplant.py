"""Takes single quantized layers from one version of a program into another."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.program import Program


def transplant(editor: Editor, source: Program, nodes: Iterable[str]) -> None:
    """Gives calls of the edited program the weights, biases and input grids they have in `source`.

    Both are descendants of one program by passes that quantize: a call keeps its name, and what
    stands between it and the values it reads are stored tensors and our own ops.

    Args:
        editor: of the program that is changed.
        source: where the layers come from.
        nodes: names of the calls.
    """
    there = {node.name: node for node in source.graph.nodes}
    for name in nodes:
        here = {node.name: node for node in editor.graph.nodes}
        copied: dict[fx.Node, fx.Node] = {}
        node, origin = here[name], there[name]
        names: dict[str, str] = {}

        def copy(part: fx.Node, here: dict[str, fx.Node] = here, node: fx.Node = node,
                 copied: dict[fx.Node, fx.Node] = copied,
                 names: dict[str, str] = names) -> fx.Node:  # fmt: skip
            if part in copied:
                return copied[part]
            if not _belongs_to_layer(part):
                return here[part.name]
            if part.op == "get_attr":
                target = str(part.target)
                tensor = source.state[target]
                if editor.state.get(target) is not tensor and target not in names:
                    names[target] = editor.add_state(target, tensor)
                copied[part] = editor.get(names.get(target, target))
            else:
                args, kwargs = fx.map_arg((part.args, part.kwargs), copy)
                copied[part] = editor.call(part.target, *args, before=node, like=node, **kwargs)
            return copied[part]

        args, kwargs = fx.map_arg((origin.args, origin.kwargs), copy)
        editor.set_args(node, *args, **kwargs)


def _belongs_to_layer(node: fx.Node) -> bool:
    """Whether a node is stored, made of stored tensors alone, or one of our quantizers."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    is_ours = getattr(node.target, "namespace", "") == "graphwright"
    return is_ours or all(_belongs_to_layer(part) for part in node.all_input_nodes)


def mixed(base: Program, parts: Iterable[tuple[Iterable[str], Program]], by: str) -> Program:
    """A program with some calls as other versions of it have them.

    Args:
        base: a version of the program.
        parts: names of calls, and the version that they are taken from.
        by: id of the pass that edits.
    """
    editor = Editor(base, by=by)
    for nodes, source in parts:
        transplant(editor, source, nodes)
    return editor.finish()
