"""Parts shared by the steps: matches of single calls, sizes as nodes, ONNX ops as graph nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.onnx.ops  # registers the symbolic ops
from torch import fx
from torch.onnx.ops._symbolic_impl import EncodedAttrs

from graphwright.backends.onnxruntime.emitter import MICROSOFT, expression, onnx_dtype, sizes_of
from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import argument as argument

aten = torch.ops.aten


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of these operator overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_float32(node: Any) -> bool:
    """Whether the node is a float32 tensor; the contrib kernels on a CPU take no other."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensor nodes provably have equal shapes."""
    return sizes_of(a) == sizes_of(b)


def size(editor: Editor, node: fx.Node, axis: int, before: fx.Node) -> Any:
    """A size of `node` as an int, or as a node that computes it."""
    value = node.meta["val"].shape[axis]
    if isinstance(value, int):
        return value
    wanted = expression(value)
    if isinstance(wanted, int):
        return wanted
    # Read it from an input where one has it: that keeps no intermediate node alive.
    for source in editor.graph.find_nodes(op="placeholder"):
        if wanted in sizes_of(source):
            node, axis = source, sizes_of(source).index(wanted)
            break
    for user in node.users:
        if user.target is aten.sym_size.int and user.args == (node, axis) and user < before:
            return user
    return editor.call(aten.sym_size.int, node, axis, before=before)


def insert(
    editor: Editor, target: Any, *args: Any, before: fx.Node, value: Any, **kwargs: Any
) -> fx.Node:
    """As `Editor.call` where shape and dtype of the result are known: much cheaper.

    Args:
        editor, target, args, before, kwargs: as for `Editor.call`.
        value: a stand-in tensor (or a list of them) with the result's shape and dtype.
    """
    with editor.graph.inserting_before(before):
        node = editor.graph.call_function(target, args, kwargs)
    node.meta["val"] = value
    editor.changed = True
    return node


def _encode(attributes: dict[str, Any]) -> dict[str, Any]:
    encoded = EncodedAttrs.from_dict(attributes)
    keys = ("attr_keys", "attr_types", "attr_pos", "attr_ints", "attr_floats", "attr_strs")
    fields = {key: getattr(encoded, key) for key in keys}
    fields["attr_pos"] = [list(pair) for pair in fields["attr_pos"]]
    return {**fields, "metadata_props_keys": [], "metadata_props_values": []}


def onnx_call(
    editor: Editor,
    kind: str,
    inputs: Sequence[fx.Node | None],
    shape: Sequence[Any],
    *,
    before: fx.Node,
    domain: str = MICROSOFT,
    dtype: torch.dtype = torch.float32,
    value: torch.Tensor | None = None,
    **attributes: Any,
) -> fx.Node:
    """Inserts an ONNX op with one output as a node of the graph.

    Run by torch the node returns zeros, so it may stand only in the copy that is lowered.

    Args:
        editor: the editor of that copy.
        kind: ONNX op type.
        inputs: tensor nodes; None for one left out.
        shape: sizes of the output, ints or nodes.
        before: node to insert before.
        domain: operator set; the contrib ops by default.
        dtype: of the output.
        value: a stand-in tensor of that shape and dtype, where there is one already.
        attributes: of the ONNX node; None for one left out.
    """
    kept = {key: given for key, given in attributes.items() if given is not None}
    target = torch.ops.onnx_symbolic._symbolic.default
    args = (list(inputs), kind, int(onnx_dtype(dtype)))
    kwargs = {"shape": list(shape), "domain": domain, "version": 1, **_encode(kept)}
    if value is not None:
        return insert(editor, target, *args, before=before, value=value, **kwargs)
    return editor.call(target, *args, before=before, **kwargs)


def onnx_calls(
    editor: Editor,
    kind: str,
    inputs: Sequence[fx.Node | None],
    shapes: Sequence[Sequence[Any]],
    *,
    before: fx.Node,
    values: list[torch.Tensor],
    domain: str = MICROSOFT,
    **attributes: Any,
) -> fx.Node:
    """As `onnx_call` for an op with several outputs; read them with `operator.getitem`.

    Args:
        editor, kind, inputs, before, domain, attributes: as for `onnx_call`.
        shapes: sizes of each output, ints or nodes.
        values: a stand-in tensor for each output.
    """
    kept = {key: given for key, given in attributes.items() if given is not None}
    return insert(
        editor, torch.ops.onnx_symbolic._symbolic_multi_out.default, list(inputs), kind,
        [int(onnx_dtype(value.dtype)) for value in values], before=before, value=values,
        shapes=[list(shape) for shape in shapes], domain=domain, version=1, **_encode(kept),
    )  # fmt: skip


def is_onnx(node: Any, kind: str) -> bool:
    """Whether `node` is an ONNX op of this type, put in by a step."""
    return (
        is_call(
            node,
            torch.ops.onnx_symbolic._symbolic.default,
            torch.ops.onnx_symbolic._symbolic_multi_out.default,
        )
        and node.args[1] == kind
    )
