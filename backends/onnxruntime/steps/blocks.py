"""blocks: weights of 2 to 8 bit codes to the kernels that read them as they are.

    linear, matmul, addmm      MatMulNBits, or blocked DequantizeLinear + MatMul (`weights: qdq`)
    stacks of experts          MatMulNBits per expert, on the rows that are routed to it
    embedding                  GatherBlockQuantized; for 3, 5, 6, 7 bits Gather of the codes

What is left (convolutions, blocks no kernel knows) is rebuilt by standard ops from the packed
codes. The file stays small; the runtime rebuilds the weight once, when it makes a session, and
keeps it in float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.options import OnnxRuntimeOptions
from graphwright.backends.onnxruntime.steps.block_codes import (
    BLOCKS,
    KERNEL_BITS,
    Stored,
    kernel_block,
    put,
    regrouped,
    stored_blocks,
    widened,
)
from graphwright.backends.onnxruntime.steps.graph import (
    argument,
    is_call,
    onnx_call,
    size,
)
from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import set_gw_meta
from graphwright.ir.layers.kinds import EXPERTS, KINDS, matrix_product
from graphwright.ir.ops.blocks import dequantize_blocks, pack_codes, unpack_codes
from graphwright.ir.ops.expert_blocks_linear import expert_blocks_linear
from graphwright.ir.stored.read import stacked_rows

aten = torch.ops.aten

PRODUCTS_FACT = "lower.blocks.products"
"""Fact: product node -> its activation, bias, block and stored weight, for the check."""

FORMS_FACT = "lower.blocks.forms"
"""Fact: weight -> the form it has in the ONNX model, for the notes."""

KERNEL_DTYPES = (torch.float32, torch.float16)
"""Floats that MatMulNBits and GatherBlockQuantized compute with on a CPU."""

EXACT = 1
"""accuracy_level of a product in float32; the check raises it where the options ask for more."""


def lower_blocks(editor: Editor, options: OnnxRuntimeOptions) -> int:
    """Replaces every matrix product and table with such a weight; returns how many."""
    made = _Forms(editor, options)
    count = 0
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        if matrix_product(node) is not None:
            count += made.product(node)
        elif KINDS.get(node.target) in EXPERTS:
            count += made.experts(node)
        elif is_call(node, aten.embedding.default):
            count += made.table(node)
    return count


class _Forms:
    """The forms of one program's weights, each made once."""

    def __init__(self, editor: Editor, options: OnnxRuntimeOptions) -> None:
        self.editor = editor
        self.options = options
        self.known: dict[tuple[fx.Node, str], Any] = {}

    def note(self, stored: Stored, form: str) -> None:
        forms = self.editor.facts.setdefault(FORMS_FACT, {})
        told = forms.setdefault(stored.name, [])
        if form not in told:
            told.append(form)

    # ---- matrix products

    def product(self, node: fx.Node) -> int:
        kind = matrix_product(node)
        assert kind is not None
        bias_place, transposed = kind.bias, kind.out_axis == 1
        stored = stored_blocks(node.args[kind.weight], transposed=transposed)
        x = node.args[kind.input]
        if stored is None or not isinstance(x, fx.Node) or not _has_kernel(node, stored):
            return 0
        if node.kwargs or len(node.args) > 3 or len(sizes_of(x)) < 2 or not kernel_block(stored):
            return 0
        bias: Any = None
        if bias_place is not None and len(node.args) > bias_place:
            bias = node.args[bias_place]
        fused: fx.Node | None = bias if _is_stored_vector(bias) else None
        is_qdq = self.options.weights == "qdq" and stored.bits in (4, 8)
        new = self.dequantized(node, x, stored) if is_qdq else self.fused(node, x, stored, fused)
        record = {
            "x": x.name,
            "bias": str(fused.target) if fused is not None and not is_qdq else "",
            "block": kernel_block(stored),
            "weight": [stored.codes, stored.scale, stored.zero_point],
            "layout": [stored.bits, stored.block, stored.columns],
        }
        self.editor.facts.setdefault(PRODUCTS_FACT, {})[new.name] = record
        if bias is not None and (fused is None or is_qdq):
            new = self.editor.call(aten.add.Tensor, new, bias, before=node)
        self.editor.replace(node, new)
        return 1

    def fused(self, node: fx.Node, x: fx.Node, stored: Stored, bias: fx.Node | None) -> fx.Node:
        """MatMulNBits, bias included."""
        bits, block = KERNEL_BITS[stored.bits], kernel_block(stored)
        codes, scale, zero_point = self._known(stored, "product", lambda: self._inputs(stored))
        out = int(scale.meta["val"].shape[0])
        self.note(stored, f"MatMulNBits, {bits} bits, block {block}")
        return onnx_call(
            self.editor, "MatMulNBits", [x, codes, scale, zero_point, None, bias],
            [*self._leading(x, node), out], before=node,
            dtype=node.meta["val"].dtype,
            K=stored.columns, N=out, bits=bits, block_size=block, accuracy_level=EXACT,
        )  # fmt: skip

    def _inputs(self, stored: Stored) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Codes, scales and zero points as MatMulNBits reads them."""
        editor, state = self.editor, self.editor.state
        bits, block = KERNEL_BITS[stored.bits], kernel_block(stored)
        if block == stored.block and bits == stored.bits:
            zero = editor.get(stored.zero_point) if stored.zero_point else None
            return editor.get(stored.codes), editor.get(stored.scale), zero
        codes, scale, zero_points = regrouped(stored, state, block)
        suffix = "" if block == stored.block else f"_by_{block}"
        node = put(editor, stored.codes + suffix, codes)
        node = widened(editor, node, block, stored.bits, bits, _head(editor))
        packed = put(
            editor, f"{stored.codes}_zero_points_{bits}{suffix}", pack_codes(zero_points, bits)
        )
        return node, put(editor, stored.scale + suffix, scale), packed

    def dequantized(self, node: fx.Node, x: fx.Node, stored: Stored) -> fx.Node:
        """DequantizeLinear of (in, out) in blocks + MatMul, which the runtime fuses."""
        weight = self._known(stored, "qdq", lambda: self._qdq(stored))
        self.note(stored, f"DequantizeLinear, {stored.bits} bits, block {kernel_block(stored)}")
        return self.editor.call(aten.matmul.default, x, weight, before=node)

    def _qdq(self, stored: Stored) -> fx.Node:
        editor, block = self.editor, kernel_block(stored)
        codes, scale, zero = regrouped(stored, editor.state, block)
        q = unpack_codes(codes, block, stored.bits).flatten(1)[:, : stored.columns].t()
        parts = []
        for name, matrix in (("columns", q), ("zero_point_columns", zero.t())):
            flat = pack_codes(matrix.reshape(1, -1), stored.bits)[0]
            part = put(editor, f"{stored.codes}_{name}", flat)
            set_gw_meta(part, packed=[stored.bits, *matrix.shape])
            parts.append(part)
        scales = put(editor, f"{stored.scale}_columns", scale.t().contiguous())
        return onnx_call(
            editor, "DequantizeLinear", [parts[0], scales, parts[1]], list(q.shape),
            before=_head(editor), domain="", dtype=scale.dtype, axis=0, block_size=block,
        )  # fmt: skip

    # ---- experts

    def experts(self, node: fx.Node) -> int:
        """A product per expert; in float32 inside, whatever the options ask of others."""
        x, weight, ids, bias = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        stored = stored_blocks(stacked_rows(weight))
        if stored is None or not _has_kernel(node, stored) or not kernel_block(stored):
            return 0
        bits, block = KERNEL_BITS[stored.bits], kernel_block(stored)
        codes, scale, zero_point = self._known(stored, "product", lambda: self._inputs(stored))
        count = int(weight.meta["val"].shape[0])
        new = self.editor.call(
            expert_blocks_linear, x, codes, scale, zero_point, ids, bias, count, bits, block,
            before=node, like=node,
        )  # fmt: skip
        self.note(stored, f"MatMulNBits for each of {count} experts, {bits} bits, block {block}")
        self.editor.replace(node, new)
        return 1

    # ---- tables

    def table(self, node: fx.Node) -> int:
        stored = stored_blocks(node.args[0])
        ids = argument(node, 1, "indices")
        if stored is None or not isinstance(ids, fx.Node):
            return 0
        is_packed = stored.bits in (2, 4, 8) and stored.block in BLOCKS
        if is_packed and _has_kernel(node, stored):
            new = self.block_gathered(node, ids, stored)
        else:
            new = self.gathered(node, ids, stored)
        self.editor.replace(node, new)
        return 1

    def block_gathered(self, node: fx.Node, ids: fx.Node, stored: Stored) -> fx.Node:
        """GatherBlockQuantized; the last block is gathered whole."""
        editor = self.editor
        codes = editor.get(stored.codes)
        rows, blocks, size_of_block = (int(s) for s in codes.meta["val"].shape)
        flat = self._known(
            stored,
            "table",
            lambda: editor.call(
                aten.reshape.default, codes, [rows, blocks * size_of_block], before=_head(editor)
            ),
        )
        zero = editor.get(stored.zero_point) if stored.zero_point else None
        width = blocks * stored.block
        new = onnx_call(
            editor, "GatherBlockQuantized", [flat, ids, editor.get(stored.scale), zero],
            [*self._leading(ids, node, 0), width], before=node, dtype=node.meta["val"].dtype,
            bits=stored.bits, block_size=stored.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        self.note(stored, f"GatherBlockQuantized, {stored.bits} bits, block {stored.block}")
        if width == stored.columns:
            return new
        return editor.call(aten.slice.Tensor, new, -1, 0, stored.columns, before=node)

    def gathered(self, node: fx.Node, ids: fx.Node, stored: Stored) -> fx.Node:
        """The rows that are read, gathered as codes and rebuilt."""
        editor = self.editor

        def call(target: Any, *args: Any) -> fx.Node:
            return editor.call(target, *args, before=node)

        flat = call(aten.reshape.default, ids, [-1])
        parts = [
            call(aten.index_select.default, editor.get(name), 0, flat) if name else None
            for name in (stored.codes, stored.scale, stored.zero_point)
        ]
        new = call(dequantize_blocks, *parts, stored.bits, stored.block, stored.columns)
        self.note(stored, f"rows rebuilt as they are read, {stored.bits} bits")
        return call(aten.reshape.default, new, [*self._leading(ids, node, 0), stored.columns])

    def _known(self, stored: Stored, form: str, make: Any) -> Any:
        key = (stored.node, form)
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def _leading(self, x: fx.Node, before: fx.Node, last: int = 1) -> list[Any]:
        """Sizes of x without the last ones, as ints and nodes."""
        return [size(self.editor, x, axis, before) for axis in range(len(sizes_of(x)) - last)]


def _has_kernel(node: fx.Node, stored: Stored) -> bool:
    """Whether the runtime's kernels take the node's dtype, which is that of the scales too."""
    value, scale = node.meta["val"], stored.node.args[1]
    assert isinstance(scale, fx.Node)
    return value.dtype in KERNEL_DTYPES and scale.meta["val"].dtype == value.dtype


def _is_stored_vector(bias: Any) -> bool:
    return isinstance(bias, fx.Node) and bias.op == "get_attr" and len(sizes_of(bias)) == 1


def _head(editor: Editor) -> fx.Node:
    """Behind everything stored, before the first call."""
    node: fx.Node = next(n for n in editor.graph.nodes if n.op not in ("placeholder", "get_attr"))
    return node
