"""Dissolves regions that torch keeps as subgraphs: gradient switches and disabled autocast."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import ModelError

GRADIENT_REGION = "wrap_with_set_grad_enabled"
AUTOCAST_REGION = "wrap_with_autocast"


def inline_regions(graph: fx.Graph, module: torch.nn.Module) -> None:
    """Copies the bodies of such regions into `graph`, nested ones too.

    Raises:
        ModelError: the model turns autocast on inside its forward, where dtypes depend on it.
    """
    while True:
        regions = [n for n in graph.nodes if _kind(n) in (GRADIENT_REGION, AUTOCAST_REGION)]
        if not regions:
            return
        for node in regions:
            _inline(graph, module, node)


def _kind(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "_name", None) or getattr(node.target, "__name__", "")
    return str(name).removeprefix("higher_order.")


def _inline(graph: fx.Graph, module: torch.nn.Module, node: fx.Node) -> None:
    body_at = next(
        i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"
    )
    if _kind(node) == AUTOCAST_REGION and node.args[body_at - 2]:
        raise ModelError(
            "the model turns autocast on inside its forward",
            fix="Trace it without, and use the pass cast.dtype for half precision.",
        )
    reference = node.args[body_at]
    assert isinstance(reference, fx.Node)
    body: Any = module.get_submodule(str(reference.target))
    mapping: dict[fx.Node, Any] = dict(
        zip(body.graph.find_nodes(op="placeholder"), node.args[body_at + 1 :], strict=True)
    )
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(body.graph, mapping)
    many = isinstance(results, tuple | list)
    for user in list(node.users):
        if many and user.target is operator.getitem:
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            graph.erase_node(user)
    if not many:
        node.replace_all_uses_with(results)
    graph.erase_node(node)
    if not reference.users:
        graph.erase_node(reference)
