"""The place where a network is taken for an embedding and a head."""

from __future__ import annotations

from torch import Tensor, fx

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.kinds import INPUT_ARGUMENT
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program
from graphwright.ir.tune.losses import main_output


def embedding_of(program: Program, name: str | None, by: str) -> fx.Node:
    """The value that stands between embedding and head.

    Args:
        program: a network with a head.
        name: of a layer, whose output it is, or of a node; when None, what the last layer reads.
        by: id of the pass, for messages.

    Raises:
        ArgumentError: there is none of that name.
        ModelError: it is no floating-point tensor, or the main output has a way around it.
    """
    node = _found(program, name, by)
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        raise ModelError(f"{by}: {node.name!r} is no floating-point tensor with a batch axis")
    around = _reached_without(program.graph, node)
    output = program.graph.output_node().all_input_nodes[main_output(program.signature)]
    if output in around:
        raise ModelError(
            f"{by}: the output has a way around {node.name!r}, so that it is no embedding",
            fix="Name a layer in `features` that all of the network goes through.",
        )
    return node


def _found(program: Program, name: str | None, by: str) -> fx.Node:
    if name is None:
        last = list(layers(program))[-1:]
        read = last[0].node.args[INPUT_ARGUMENT[last[0].kind]] if last else None
        if not isinstance(read, fx.Node):
            raise ModelError(f"{by}: the network has no layer to be a head",
                             fix="Name a node in `features`.")  # fmt: skip
        return read
    of_layers = {layer.name: layer.node for layer in layers(program)}
    of_nodes = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    found = of_layers.get(name) or of_nodes.get(name)
    if found is None:
        raise ArgumentError(f"{by}: the network has no layer or node {name!r}",
                            fix=f"Its layers are {', '.join(of_layers)}.")  # fmt: skip
    return found


def _reached_without(graph: fx.Graph, cut: fx.Node) -> set[fx.Node]:
    """Values that depend on an input by a way that does not go through `cut`."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_read = any(source in found for source in node.all_input_nodes)
        if node is not cut and (node.op == "placeholder" or is_read):
            found.add(node)
    return found
