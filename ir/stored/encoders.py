"""The discrete half of a compressed weight: codes that can be chosen anew, group by group.

One encoder per op that rebuilds a weight from codes. A code group is what one code (or one code of
each of several codebooks that are added) stands for: a weight, or a vector of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from graphwright.ir.ops.blocks import pack_codes, unpack_codes, unpack_zero_points
from graphwright.ir.ops.codebook import pack_indices, unpack_indices
from graphwright.ir.ops.table import levels
from graphwright.ir.ops.table import pack as pack_table
from graphwright.ir.ops.table import unpack as unpack_table
from graphwright.ir.stored.grid import spread

Read = Callable[[], Tensor]
"""Gives a tensor as it is when called: scales and codebooks move between choices."""

BEAM = 5
"""Best vectors of the first codebook that are tried with all of the second (P50, the code)."""


class Encoder:
    """Codes of one or more ops whose results are added.

    Attributes:
        codes: names of the stored codes, one per op.
    """

    codes: tuple[str, ...]

    def groups(self, squares: Tensor) -> Tensor:
        """Sums of `squares`, which has the shape of the op's result, over every code group."""
        return squares.flatten()

    def encode(
        self, codes: Mapping[str, Tensor], target: Tensor, chosen: Tensor
    ) -> dict[str, Tensor]:
        """New codes that bring the chosen groups closest to `target`; the others stay.

        Args:
            codes: as they are, by name.
            target: wanted result of the op.
            chosen: (n,) indices of groups.
        """
        raise TypeError(f"{type(self).__name__} defines no encode")


class BlockCodes(Encoder):
    """`dequantize_blocks`: every weight has a code on the grid of its block."""

    def __init__(
        self, name: str, scale: Read, zero: Read | None, bits: int, block: int, columns: int
    ) -> None:
        self.codes, self.scale, self.zero = (name,), scale, zero
        self.bits, self.block, self.columns = bits, block, columns

    def encode(
        self, codes: Mapping[str, Tensor], target: Tensor, chosen: Tensor
    ) -> dict[str, Tensor]:
        (name,) = self.codes
        scale = self.scale().float()
        zero = unpack_zero_points(None if self.zero is None else self.zero(), scale, self.bits)
        q = unpack_codes(codes[name], self.block, self.bits).flatten(1).clone()
        step = spread(scale, self.block, self.columns).flatten()[chosen]
        if isinstance(zero, Tensor):
            offset = spread(zero.float(), self.block, self.columns).flatten()[chosen]
        else:
            offset = torch.full_like(step, float(zero))
        best = (target.flatten()[chosen].float() / step + offset).round()
        row, column = chosen // self.columns, chosen % self.columns
        q[row, column] = best.clamp(0, 2**self.bits - 1).to(torch.uint8)
        return {name: pack_codes(q.unflatten(1, (-1, self.block)), self.bits)}


class IntegerCodes(Encoder):
    """`dequantize`: int8 codes around zero, one scale or one per channel."""

    def __init__(self, name: str, scale: Read, axis: int) -> None:
        self.codes, self.scale, self.axis = (name,), scale, axis

    def encode(
        self, codes: Mapping[str, Tensor], target: Tensor, chosen: Tensor
    ) -> dict[str, Tensor]:
        (name,) = self.codes
        old, scale = codes[name], self.scale().float()
        if scale.dim():
            axis = self.axis % old.dim()
            scale = scale.reshape([-1 if i == axis else 1 for i in range(old.dim())])
        best = (target.float() / scale).round().clamp(-127, 127).to(old.dtype).flatten()
        flat = old.flatten().clone()
        flat[chosen] = best[chosen]
        return {name: flat.reshape(old.shape)}


class TableCodes(Encoder):
    """`dequantize_table`: the nearest level, with the scale of the block."""

    def __init__(self, name: str, scale: Read, table: str, block: int) -> None:
        self.codes, self.scale, self.table, self.block = (name,), scale, table, block

    def encode(
        self, codes: Mapping[str, Tensor], target: Tensor, chosen: Tensor
    ) -> dict[str, Tensor]:
        (name,) = self.codes
        new = unpack_table(codes[name], self.table, target.numel()).clone()
        scale = self.scale().float()[chosen // self.block].clamp(min=1e-30)
        distance = (target.flatten()[chosen].float() / scale)[:, None] - levels(self.table)
        new[chosen] = distance.abs().argmin(1).to(new.dtype)
        return {name: pack_table(new, self.table)}


class VectorCodes(Encoder):
    """`dequantize_codebook`, one or two of them added: vectors of neighbouring rows.

    With two, the best few vectors of the first are tried with all of the second (a beam search).
    """

    def __init__(
        self, names: Sequence[tuple[str, Read]], bits: Sequence[int],
        rows: int, columns: int, width: int,
    ) -> None:  # fmt: skip
        self.codes = tuple(name for name, _ in names)
        self.books = tuple(book for _, book in names)
        self.bits, self.rows, self.columns, self.width = tuple(bits), rows, columns, width

    def groups(self, squares: Tensor) -> Tensor:
        return self._vectors(squares).sum(-1)

    def _vectors(self, matrix: Tensor) -> Tensor:
        """(groups, width): vectors of neighbouring rows, row group by row group."""
        short = -self.rows % self.width
        padded = torch.nn.functional.pad(matrix, (0, 0, 0, short))
        vectors: Tensor = padded.unflatten(0, (-1, self.width)).transpose(1, 2).flatten(0, 1)
        return vectors

    def encode(
        self, codes: Mapping[str, Tensor], target: Tensor, chosen: Tensor
    ) -> dict[str, Tensor]:
        wanted = self._vectors(target.float())[chosen]
        books = [book().float() for book in self.books]
        counts = [len(book) for book in books]
        owner = torch.stack([(chosen % self.columns) * n // self.columns for n in counts])
        found = [torch.zeros(len(chosen), dtype=torch.int64) for _ in books]
        for pick in owner.unique(dim=1).T:
            mine = (owner == pick[:, None]).all(0)
            best = nearest(wanted[mine], [book[g] for book, g in zip(books, pick, strict=True)])
            for part, indices in zip(found, best, strict=True):
                part[mine] = indices
        changed = {}
        for name, bits, indices in zip(self.codes, self.bits, found, strict=True):
            index = unpack_indices(codes[name], bits, self.columns).long().flatten().clone()
            index[chosen] = indices
            changed[name] = pack_indices(index.reshape(-1, self.columns), bits)
        return changed


def nearest(wanted: Tensor, books: Sequence[Tensor]) -> list[Tensor]:
    """Indices (n,) into each book whose vectors add up closest to `wanted` (n, width)."""
    first = torch.cdist(wanted, books[0])
    if len(books) == 1:
        return [first.argmin(1)]
    beam = first.topk(min(BEAM, first.shape[1]), dim=1, largest=False).indices  # (n, beam)
    rest = wanted[:, None] - books[0][beam]
    distance = torch.cdist(rest.flatten(0, 1), books[1])
    least, second = distance.min(1)
    best = least.reshape(beam.shape).argmin(1, keepdim=True)
    return [beam.gather(1, best)[:, 0], second.reshape(beam.shape).gather(1, best)[:, 0]]
