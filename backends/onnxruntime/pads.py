"""Pads in the one form that ONNX Runtime's optimizer gets right.

Two of its rewrites are wrong for a Pad. It folds a pad by zeros into the pooling behind it, where
padding counts as minus infinity (MaxPool) or not at all (AveragePool without its padding): only a
Pad with the input `axes` is left alone. And where it moves a Transpose through a Pad with that
input, it permutes the widths and not the axes. Widths for every axis, with all axes named in order,
are safe from both.
"""

from __future__ import annotations

import onnx_ir as ir

AXES = 3
"""Position of the input `axes` of Pad."""


def guard_pads(model: ir.Model) -> int:
    """Names all axes of every constant Pad that not only convolutions read; returns how many.

    A convolution may take the pad in: its own padding is by zeros too. Anything else may turn out
    to be a pooling once the optimizer has taken casts and moves away. A Pad whose widths are
    computed at run time, or that names its axes already, is never folded.
    """
    count = 0
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != "Pad" or node.domain or _only_convolutions_read(node):
            continue
        widths = node.inputs[1]
        known = None if widths is None else ir.convenience.get_const_tensor(widths)
        if known is None or (len(node.inputs) > AXES and node.inputs[AXES] is not None):
            continue
        rank = known.shape[0] // 2  # type: ignore[operator]
        axes = _stored_axes(node, int(rank))
        node.resize_inputs(AXES + 1)
        node.replace_input_with(AXES, axes)
        count += 1
    return count


def _only_convolutions_read(node: ir.Node) -> bool:
    readers = [use.node for use in node.outputs[0].uses()]
    return bool(readers) and all(reader.op_type == "Conv" for reader in readers)


def _stored_axes(node: ir.Node, rank: int) -> ir.Value:
    """The axes 0 to rank - 1 as an initializer of the node's graph."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    name = f"pad.axes_{rank}"
    if name not in graph.initializers:
        tensor = ir.tensor(list(range(rank)), dtype=ir.DataType.INT64, name=name)
        value = ir.Value(name=name, shape=ir.Shape([rank]), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        graph.initializers[name] = value
    return graph.initializers[name]
