"""NF4 and FP4 weights: matrix products that read 4-bit codes, tables whose 4-bit rows are gathered.

    linear(x, dequantize_table(codes, scale))       MatMulBnb4 (+ Add)
    embedding(dequantize_table(codes, scale), ids)  Gather of codes and scales, Gather of levels

Scales that are quantized themselves are written out: the kernel reads float32. What has no such
form (convolutions, blocks the kernel does not know) stays small in the file, and is rebuilt by the
runtime's constant folding when a session is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.graph import (
    argument,
    is_call,
    is_float32,
    onnx_call,
    size,
)
from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.kinds import matrix_product
from graphwright.ir.ops.table import BITS, dequantize_table, levels, unpack

aten = torch.ops.aten

BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that MatMulBnb4 is compiled for."""

TYPES = {"fp4": 0, "nf4": 1}
"""Its attribute quant_type."""


@dataclass(frozen=True)
class Stored:
    """A 4-bit weight (out, in): its codes, its scales, and how to read them."""

    codes: fx.Node
    scale: fx.Node
    table: str
    block: int
    shape: tuple[int, int]


def lower_table(editor: Editor) -> int:
    """Replaces every matrix product and embedding with a 4-bit weight; returns how many."""
    count = 0
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not node.users or not _is_float(node):
            continue
        if matrix_product(node) is not None:
            count += _product(editor, node)
        elif is_call(node, aten.embedding.default):
            count += _embedding(editor, node)
    return count


def _stored(node: Any, *, transposed: bool = False) -> Stored | None:
    """The 4-bit matrix behind a weight operand."""
    if transposed:
        if not is_call(node, aten.transpose.int) or {a % 2 for a in node.args[1:]} != {0, 1}:
            return None
        node = node.args[0]
    if is_call(node, aten.to.dtype) and node.args[1] is torch.float16:
        node = node.args[0]  # of a half-precision program; the kernel reads codes and scales
    if not is_call(node, dequantize_table):
        return None
    codes, scale, table, block, shape = node.args
    fits = codes.op == "get_attr" and BITS[table] == 4 and len(shape) == 2 and _is_float(scale)
    return Stored(codes, scale, table, block, (shape[0], shape[1])) if fits else None


def _scale(editor: Editor, stored: Stored) -> fx.Node:
    """The scales as a stored float32 tensor."""
    if stored.scale.op == "get_attr" and is_float32(stored.scale):
        return stored.scale
    name = f"{stored.codes.target}.scale"
    if name not in editor.state:
        program = editor.program.replace(state=editor.state)
        editor.add_state(name, constant_value(program, stored.scale).float())
    return editor.get(name)


def _product(editor: Editor, node: fx.Node) -> int:
    kind = matrix_product(node)
    assert kind is not None
    bias_place, transposed = kind.bias, kind.out_axis == 1
    stored = _stored(node.args[kind.weight], transposed=transposed)
    x = node.args[kind.input]
    if stored is None or node.kwargs or stored.block not in BLOCKS or not isinstance(x, fx.Node):
        return 0
    if len(node.args) > 3 or len(sizes_of(node)) < 2:
        return 0
    out, depth = stored.shape
    leading = [size(editor, x, axis, node) for axis in range(len(sizes_of(x)) - 1)]
    dtype = node.meta["val"].dtype
    x = _in(editor, x, torch.float32, node)
    new = onnx_call(
        editor, "MatMulBnb4", [x, stored.codes, _scale(editor, stored)], [*leading, out],
        before=node, K=depth, N=out, block_size=stored.block, quant_type=TYPES[stored.table],
    )  # fmt: skip
    new = _in(editor, new, dtype, node)
    bias = node.args[bias_place] if bias_place is not None and len(node.args) > bias_place else None
    if bias is not None:
        new = editor.call(aten.add.Tensor, new, bias, before=node)
    editor.replace(node, new)
    return 1


def _embedding(editor: Editor, node: fx.Node) -> int:
    """Rows are gathered as codes, and only they are looked up and scaled."""
    stored = _stored(node.args[0])
    ids = argument(node, 1, "indices")
    if stored is None or not isinstance(ids, fx.Node):
        return 0
    rows, width = stored.shape
    if width % 2 or width % stored.block:
        return 0  # a row begins inside a byte or a block
    codes = _view(editor, stored.codes, str(stored.codes.target), (rows, width // 2))
    scale = _scale(editor, stored)
    scale = _view(editor, scale, str(scale.target), (rows, width // stored.block))

    def call(target: Any, *args: Any) -> fx.Node:
        return editor.call(target, *args, before=node)

    leading = [size(editor, ids, axis, node) for axis in range(len(sizes_of(ids)))]
    found = call(aten.to.dtype, call(aten.embedding.default, codes, ids), torch.int32)
    value = call(aten.embedding.default, _pairs(editor, stored.table), found)
    value = call(aten.reshape.default, value, [*leading, width // stored.block, stored.block])
    factor = call(aten.unsqueeze.default, call(aten.embedding.default, scale, ids), -1)
    value = call(aten.mul.Tensor, value, factor)
    value = call(aten.reshape.default, value, [*leading, width])
    editor.replace(node, _in(editor, value, node.meta["val"].dtype, node))
    return 1


def _is_float(node: Any) -> bool:
    """Whether the node is float32, which the kernel takes, or float16, which is cast to it."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16)


def _in(editor: Editor, node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    return editor.call(aten.to.dtype, node, dtype, before=before)


def _view(editor: Editor, stored: fx.Node, name: str, shape: tuple[int, int]) -> fx.Node:
    """A stored tensor in another shape, as a stored tensor of its own (sharing the memory)."""
    rows = f"{name}.rows"
    if rows not in editor.state:
        editor.add_state(rows, editor.state[str(stored.target)].reshape(shape))
    return editor.get(rows)


def _pairs(editor: Editor, table: str) -> fx.Node:
    """(256, 2): the two levels that a byte of codes stands for."""
    name = f"table.{table}"
    if name not in editor.state:
        byte = torch.arange(256, dtype=torch.uint8)
        editor.add_state(name, levels(table)[unpack(byte, table, 512).long()].reshape(256, 2))
    return editor.get(name)
