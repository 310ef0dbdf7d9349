"""Weights in blocks as ONNX Runtime's kernels take them: widths, blocks, and the way there.

The kernels know 2, 4 and 8 bits, and blocks of a power of two from 16 on. Other widths stay as
packed in the file, and standard ops widen them to the next one, on constants, so that the runtime
does it once when it makes a session: 3 bits to 4, 5 to 7 bits to 8. For matrix products 2 bits go
to 4 as well: the runtime's 2-bit kernel is slower than float from some 16 rows on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.backends.onnxruntime.steps.graph import is_call, onnx_call
from graphwright.backends.onnxruntime.steps.layout import order_of
from graphwright.ir.edit import Editor
from graphwright.ir.ops.blocks import (
    bit_places,
    dequantize_blocks,
    pack_codes,
    unpack_codes,
    unpack_zero_points,
)

aten = torch.ops.aten

BLOCKS = (16, 32, 64, 128, 256)
"""Blocks that the kernels are written for."""

MOST_PADDING = 1.15
"""Codes stored for one that is there, at most, when a row of one block is cut into several."""

KERNEL_BITS = {2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Width of the codes that a matrix product reads, by that of the stored ones."""


@dataclass(frozen=True)
class Stored:
    """A `dequantize_blocks` node whose tensors are all stored.

    Attributes:
        node: it.
        codes, scale, zero_point: names of the tensors; the last may be empty.
        bits, block, columns: as the op takes them.
    """

    node: fx.Node
    codes: str
    scale: str
    zero_point: str
    bits: int
    block: int
    columns: int

    @property
    def name(self) -> str:
        """The name of the weight in messages."""
        return self.codes.removesuffix("_codes").removesuffix(".codes")

    def tensors(self, state: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points, the latter as packed or None."""
        return state[self.codes], state[self.scale], state.get(self.zero_point)


def stored_blocks(node: Any, *, transposed: bool = False) -> Stored | None:
    """The weight in blocks behind an operand, or behind its transposition."""
    if transposed:
        if not is_call(node, aten.transpose.int, aten.permute.default, aten.t.default):
            return None
        if order_of(node) != [1, 0]:
            return None
        node = node.args[0]
    if not is_call(node, dequantize_blocks):
        return None
    codes, scale, zero_point, bits, block, columns = node.args
    if codes.op != "get_attr" or scale.op != "get_attr":
        return None
    if zero_point is not None and zero_point.op != "get_attr":
        return None
    zero = "" if zero_point is None else str(zero_point.target)
    return Stored(node, str(codes.target), str(scale.target), zero, bits, block, columns)


def kernel_block(stored: Stored) -> int:
    """The block that the kernel is given; 0 where there is none.

    A block that a power of two divides is cut into such, which repeat its scale. A row of one
    block may be cut anywhere.
    """
    if stored.block in BLOCKS:
        return stored.block
    if stored.columns <= stored.block:
        for block in (128, 64, 32, 16):
            if -(-stored.columns // block) * block <= MOST_PADDING * stored.columns:
                return block
        return 16
    return max((b for b in BLOCKS[:4] if stored.block % b == 0), default=0)


def regrouped(stored: Stored, state: Any, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scales and zero points (unpacked, one per block) of the same values."""
    codes, scale, zero_point = stored.tensors(state)
    zero = unpack_zero_points(zero_point, scale, stored.bits)
    if isinstance(zero, int):
        zero = torch.full(tuple(scale.shape), zero, dtype=torch.uint8)
    if block == stored.block:
        return codes, scale, zero
    count = -(-stored.columns // block)
    q = unpack_codes(codes, stored.block, stored.bits).flatten(1)[:, : stored.columns]
    q = torch.nn.functional.pad(q, (0, count * block - stored.columns))
    owner = torch.arange(count) * block // stored.block
    packed = pack_codes(q.unflatten(1, (count, block)), stored.bits)
    return packed, scale[:, owner].contiguous(), zero[:, owner].contiguous()


def put(editor: Editor, name: str, tensor: Tensor) -> fx.Node:
    """The node of a stored tensor, added under `name` when it is not there yet."""
    if name not in editor.state:
        editor.add_state(name, tensor)
    return editor.get(name)


def widened(
    editor: Editor, packed: fx.Node, count: int, bits: int, to: int, before: fx.Node
) -> fx.Node:
    """Codes (..., bytes of `count` codes) of `bits` bits as codes of 4 or 8 bits, packed."""
    if bits == to:
        return packed
    if to == 8:
        return _picked(editor, packed, torch.arange(count), bits, count, before)
    low = _picked(editor, packed, torch.arange(0, count, 2), bits, count, before)
    high = _picked(editor, packed, torch.arange(1, count, 2), bits, count, before)
    four = put(editor, "blocks.four", torch.tensor([4], dtype=torch.uint8))
    high = _bytes(editor, "BitShift", [high, four], high, before, direction="LEFT")
    return _bytes(editor, "BitwiseOr", [low, high], high, before)


def _picked(
    editor: Editor, packed: fx.Node, which: Tensor, bits: int, count: int, before: fx.Node
) -> fx.Node:
    """The chosen codes, a byte each: the ONNX form of `unpack_codes`."""
    first, right, second, left = (places[which] for places in bit_places(count, bits))
    key = f"blocks.{bits}_{count}_{int(which[0])}_{len(which)}"

    def moved(part: str, at: Tensor, shift: Tensor, direction: str) -> fx.Node:
        index = put(editor, f"{key}_{part}_at", at)
        shape = [*packed.meta["val"].shape[:-1], len(which)]
        found = onnx_call(
            editor, "Gather", [packed, index], shape,
            before=before, domain="", dtype=torch.uint8, axis=-1,
        )  # fmt: skip
        by = put(editor, f"{key}_{part}_by", shift)
        return _bytes(editor, "BitShift", [found, by], found, before, direction=direction)

    value = moved("first", first, right, "RIGHT")
    if 8 % bits:
        value = _bytes(
            editor, "BitwiseOr", [value, moved("second", second, left, "LEFT")], value, before
        )
    mask = put(editor, f"blocks.mask_{bits}", torch.tensor([2**bits - 1], dtype=torch.uint8))
    return _bytes(editor, "BitwiseAnd", [value, mask], value, before)


def _bytes(
    editor: Editor, kind: str, inputs: list[fx.Node], like: fx.Node, before: fx.Node, **given: Any
) -> fx.Node:
    return onnx_call(
        editor, kind, inputs, list(like.meta["val"].shape),
        before=before, domain="", dtype=torch.uint8, value=like.meta["val"], **given,
    )  # fmt: skip
