"""One program inside another: its calls on values of the other's graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.program import Program


def inline(
    editor: Editor, inner: Program, given: Mapping[str, fx.Node], *, prefix: str, before: fx.Node
) -> list[fx.Node]:
    """Puts a program's calls into an edited graph; they compute on sizes as they are there.

    Parameters are frozen. Dropout that training would put back stays out.

    Args:
        editor: of the outer program.
        inner: in inference mode; it keeps its tensors.
        given: values for its inputs, by their names.
        prefix: in front of the names of its tensors.
        before: node in front of which the calls are put.

    Returns:
        the nodes of its outputs, flat.
    """
    known: dict[fx.Node, fx.Node] = {}
    outputs: list[fx.Node] = []
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            known[node] = given[str(node.target)]
        elif node.op == "get_attr":
            tensor: torch.Tensor = inner.state[str(node.target)].detach()
            if isinstance(inner.state[str(node.target)], nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            name = editor.add_state(f"{prefix}.{node.target}", tensor)
            known[node] = editor.get(name)
        elif node.op == "output":
            outputs = [known[n] for n in node.args[0]]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
            known[node] = editor.call(node.target, *args, before=before, **kwargs)
    return outputs
