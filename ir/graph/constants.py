"""Constants of a graph: values that depend on no input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.aliasing import unstable_nodes
from graphwright.ir.graph.nodes import adapter_of


def constant_operand(program: Stored, node: fx.Node, device: torch.device) -> Any:
    """The value of a constant operand: a tensor on the device, a size, or a tuple."""
    if isinstance(node.meta.get("val"), Tensor):
        return constant_value(program, node).to(device)
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda n: constant_operand(program, n, device)
    )
    return node.target(*args, **kwargs)  # type: ignore[operator]


def constant_nodes(
    graph: fx.Graph, admits: Callable[[fx.Node], bool] = lambda node: True
) -> set[fx.Node]:
    """Nodes that depend on no input, draw no random numbers, and are not written in place.

    Args:
        graph: of a program.
        admits: a further condition on every node of such a computation.
    """
    unstable = unstable_nodes(graph)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in unstable or not admits(node):
            continue
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "get_attr" or (
            node.op == "call_function"
            and not is_random
            and all(operand in found for operand in node.all_input_nodes)
        ):
            found.add(node)
    return found


class Stored(Protocol):
    """A program, or the editor of one: stored tensors by name."""

    @property
    def state(self) -> Mapping[str, Tensor]: ...


def constant_value(program: Stored, node: fx.Node) -> Tensor:
    """The value of a node that depends on no input. Detached."""
    (value,) = constant_results(program, node)
    return value


def constant_results(program: Stored, node: fx.Node) -> list[Tensor]:
    """As `constant_value`, for a node that gives one tensor or several."""
    with torch.no_grad():
        found = _evaluate(program, node, {})
    values = found if isinstance(found, list | tuple) else [found]
    return [value.detach() for value in values]


def _evaluate(program: Stored, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return program.state[str(node.target)]
    if node.op == "placeholder":
        raise ModelError(f"{node.name!r} is an input, not a constant")
    if node not in known:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(program, n, known))
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]


def weight_source(node: object) -> fx.Node | None:
    """The first stored tensor that a weight operand is computed from without any input."""
    seen: list[object] = [node]
    while seen:
        current = seen.pop(0)
        if not isinstance(current, fx.Node) or current.op == "placeholder":
            continue
        if current.op == "get_attr":
            return current
        if depends_on_input(current):
            continue
        # below an adapter's own tensors lies the weight that it was computed from
        seen.extend(current.all_input_nodes[:1] if adapter_of(current) else current.all_input_nodes)
    return None


def depends_on_input(node: fx.Node) -> bool:
    """Whether any input of the program reaches the node."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def is_static(node: fx.Node) -> bool:
    """Whether a node gives one tensor whose sizes are all numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape)
