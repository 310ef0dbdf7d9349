"""A weight as codes of a table of levels, one scale for every block of its elements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.ir.ops.table import dequantize_table, levels, pack
from graphwright.ir.stored.insert import Insertion, Make

aten = torch.ops.aten

SCALE_BLOCK = 256
"""Scales that share a scale of their own in double quantization."""


@dataclass(frozen=True)
class Table:
    """A tensor in the layout of `graphwright::dequantize_table`.

    Attributes:
        codes: uint8, packed, 1-D.
        scale: float32, one per block; None when the scales are quantized themselves.
        double: then their codes (uint8), the scales of these, and the offset (0-dim float32).
        table: `nf4` or `fp4`.
        block: elements that share a scale.
        shape: of the tensor.
    """

    codes: Tensor
    scale: Tensor | None
    double: tuple[Tensor, Tensor, Tensor] | None
    table: str
    block: int
    shape: tuple[int, ...]

    def scales(self) -> Tensor:
        """The scale of every block (blocks,) float32."""
        if self.scale is not None:
            return self.scale
        assert self.double is not None
        codes, scale, offset = self.double
        rest: Tensor = dequantize_table(codes, scale, "dynamic", SCALE_BLOCK, [codes.numel()])
        return rest + offset

    def value(self) -> Tensor:
        """The tensor, float32."""
        value: Tensor = dequantize_table(
            self.codes, self.scales(), self.table, self.block, list(self.shape)
        )
        return value

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        parts = [self.codes, *([] if self.scale is None else [self.scale]), *(self.double or ())]
        return sum(part.nbytes for part in parts)


def nearest_codes(x: Tensor, table: str) -> Tensor:
    """Code (uint8) of the level nearest to every element; a tie goes to the lower level.

    The table is a small set of sorted numbers, so the code is the count of midpoints below x.
    """
    level = levels(table).to(x.device)
    ordered, order = level.sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    return order[torch.bucketize(x, middles)].to(torch.uint8)


def quantize_blocks(x: Tensor, table: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes (uint8, one per element, 1-D) and the largest magnitude of every block (float32).

    A block of zeros has the scale 0 and the code of the level 0.
    """
    flat = x.detach().reshape(-1).float()
    count = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -count % block)).reshape(-1, block)
    scale = padded.abs().amax(1)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return nearest_codes(padded / safe[:, None], table).reshape(-1)[:count], scale


def quantize(x: Tensor, table: str, block: int, *, double: bool) -> Table:
    """The tensor on the levels of `table`, in blocks over its flattened elements.

    Args:
        x: any shape, any floating dtype; no NaN or infinity.
        table: `nf4` or `fp4`.
        block: elements that share a scale: their largest magnitude.
        double: store the scales less their mean as 8-bit dynamic codes, in blocks of 256.

    Source: Dettmers et al. 2023, "QLoRA", section 3.
    """
    codes, scale = quantize_blocks(x, table, block)
    shape = tuple(int(size) for size in x.shape)
    if not double:
        return Table(pack(codes, table), scale, None, table, block, shape)
    offset = scale.mean()
    again, second = quantize_blocks(scale - offset, "dynamic", SCALE_BLOCK)
    return Table(pack(codes, table), None, (again, second, offset), table, block, shape)


def rebuild_table(stored: Table, dtype: torch.dtype) -> Make:
    """Nodes of a weight in a table: stored tensors, `graphwright::dequantize_table`, a cast."""

    def make(place: Insertion) -> fx.Node:
        node = place.call(
            dequantize_table,
            place.store("codes", stored.codes),
            _scales(stored, place),
            stored.table,
            stored.block,
            list(stored.shape),
        )
        return node if dtype == torch.float32 else place.call(aten.to.dtype, node, dtype)

    return make


def _scales(stored: Table, place: Insertion) -> fx.Node:
    if stored.scale is not None:
        return place.store("scale", stored.scale)
    assert stored.double is not None
    codes, scale, offset = stored.double
    rest = place.call(
        dequantize_table,
        place.store("scale_codes", codes),
        place.store("scale_scale", scale),
        "dynamic",
        SCALE_BLOCK,
        [codes.numel()],
    )
    return place.call(aten.add.Tensor, rest, place.store("scale_offset", offset))
