"""Families of operators, for colours and labels of pictures."""

from __future__ import annotations

from torch import fx

from graphwright.ir.graph.nodes import op_name

_FAMILIES = {
    "product": {
        "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d",
        "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lstm", "gru",
        "bilinear",
    },
    "attention": {"scaled_dot_product_attention"},
    "norm": {
        "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "softmax",
        "log_softmax",
    },
    "activation": {
        "relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "elu",
        "leaky_relu", "mish", "softplus", "hardtanh", "prelu",
    },
    "lookup": {"embedding", "gather", "index", "index_select", "take"},
}  # fmt: skip


def family_of(node: fx.Node) -> str:
    """Kind of work, for the colour: product, attention, norm, activation, lookup, own, other.

    `own` are this package's operators: compressed weights and fused calls.
    """
    if node.op != "call_function":
        return _OTHER_KINDS.get(node.op, "other")
    if getattr(node.target, "namespace", "") == "graphwright":
        return "own"
    name = op_name(node)
    return next((family for family, names in _FAMILIES.items() if name in names), "other")


_OTHER_KINDS = {"placeholder": "input", "get_attr": "state", "output": "output"}
