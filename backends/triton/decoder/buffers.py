"""Buffers of a cache: whole rows of one capacity, or blocks that rows take as they grow.

Both begin as zeros: a slot that nothing was written to is hidden from every query by the lengths,
but a weight of zero times a number that is none would not be zero.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from graphwright.backends.triton.decoder.static_graph import BufferSpec

BLOCK = 64
"""Tokens of a block."""


class Buffers(Protocol):
    """The memory behind the rows of a batch.

    Attributes:
        tensors: one per buffer of the graph, then the scales of those that have some per token.
        table: blocks of every row, int32 (batch, columns); None where a row is a block.
        capacity: tokens that a row has room for.
    """

    tensors: list[Tensor]
    table: Tensor | None
    capacity: int

    def reserve(self, lengths: Tensor) -> None:
        """Makes room for the first `lengths[row]` tokens of every row."""

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of what row `rows[i]` was."""

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens a row, and keeps what is there."""

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""


def _new(
    specs: tuple[BufferSpec, ...], blocks: int, block: int, device: torch.device
) -> list[Tensor]:
    made = [
        torch.zeros(blocks, s.heads, block, s.stored, dtype=s.dtype, device=device) for s in specs
    ]
    scales = [torch.zeros(blocks, s.heads, block, device=device) for s in specs if s.scales]
    return made + scales


class WholeRows:
    """A contiguous buffer for every row: block b is row b."""

    table: Tensor | None = None

    def __init__(
        self, specs: tuple[BufferSpec, ...], batch: int, capacity: int, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.tensors = _new(specs, batch, capacity, device)

    def reserve(self, lengths: Tensor) -> None:
        """Nothing to do: the room is there."""

    def reorder(self, rows: Tensor) -> None:
        """See `Buffers.reorder`."""
        self.tensors = [t.index_select(0, rows.to(t.device)) for t in self.tensors]

    def grow(self, capacity: int) -> None:
        """See `Buffers.grow`."""
        more = capacity - self.capacity
        if more > 0:
            pads = [(0, 0, 0, more) if t.dim() == 4 else (0, more) for t in self.tensors]
            self.tensors = [
                torch.nn.functional.pad(t, p) for t, p in zip(self.tensors, pads, strict=True)
            ]
            self.capacity = capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(t.nbytes for t in self.tensors)


class Blocks:
    """Blocks of `BLOCK` tokens, shared by all rows; block 0 takes the writes of padding.

    Slot p of a row is `table[row, p // BLOCK] * BLOCK + p % BLOCK`.
    """

    def __init__(
        self, specs: tuple[BufferSpec, ...], batch: int, capacity: int, device: torch.device
    ) -> None:
        self.table: Tensor | None = torch.zeros(batch, 0, dtype=torch.int32, device=device)
        self.capacity = 0
        self.tensors = _new(specs, 1, BLOCK, device)
        self._held: list[list[int]] = [[] for _ in range(batch)]
        self._free: list[int] = []
        self.grow(capacity)

    def reserve(self, lengths: Tensor) -> None:
        """See `Buffers.reserve`."""
        wanted = [-(-int(n) // BLOCK) for n in lengths.tolist()]
        missing = sum(max(0, n - len(held)) for n, held in zip(wanted, self._held, strict=True))
        if missing > len(self._free):
            self._extend(max(missing - len(self._free), len(self.tensors[0]) // 2))
        changed = False
        for held, count in zip(self._held, wanted, strict=True):
            while len(held) < count:
                held.append(self._free.pop())
                changed = True
        if changed:
            self._write_table()

    def reorder(self, rows: Tensor) -> None:
        """See `Buffers.reorder`."""
        sources = [self._held[row] for row in rows.tolist()]
        copies: list[int] = [0]
        order: list[list[int]] = []
        for held in sources:
            order.append(list(range(len(copies), len(copies) + len(held))))
            copies += held
        self.tensors = [
            t.index_select(0, torch.tensor(copies, device=t.device)) for t in self.tensors
        ]
        self._held, self._free = order, []
        self._write_table()

    def grow(self, capacity: int) -> None:
        """See `Buffers.grow`."""
        self.capacity = max(capacity, self.capacity)
        self._write_table()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(t.nbytes for t in self.tensors)

    def _extend(self, count: int) -> None:
        first = len(self.tensors[0])
        self.tensors = [torch.cat([t, t.new_zeros(count, *t.shape[1:])]) for t in self.tensors]
        self._free += range(first + count - 1, first - 1, -1)

    def _write_table(self) -> None:
        columns = -(-self.capacity // BLOCK)
        rows = [held + [0] * (columns - len(held)) for held in self._held]
        table = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), columns)
        assert self.table is not None
        if self.table.shape == table.shape:  # a captured graph reads it at its place
            self.table.copy_(table)
        else:
            self.table = table.to(self.table.device)
