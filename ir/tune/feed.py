"""In which order training reads its data: a function of seed, position and process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from torch import Tensor

from graphwright.ir.data.batches import Batches
from graphwright.ir.errors import ArgumentError

Seed = Callable[..., int]
"""Seed of the stream with this path, as `seed("order", epoch)`."""

Labelled = dict[str, Tensor]
"""Inputs by name, and `labels` if there are any."""


@dataclass(frozen=True)
class Feed:
    """Training batches of one process, endlessly, from any position on.

    Samples that can be read in any order are drawn without replacement, in a new order in every
    epoch; a rest too small for a batch is left out of that epoch. A batch of n processes is cut
    into n parts, so that together they read what one process with the n-fold batch would.
    Sources with an order of their own keep it; process r of n reads batches r, r + n, and so on.

    Attributes:
        data: what is read.
        seed: gives the seed of every random stream.
        hold_out: share of the samples that is kept out.
        rank: number of this process. world: how many there are.
        shuffle: whether samples are drawn; else they come in their own order.
    """

    data: Batches
    seed: Seed
    hold_out: float = 0.0
    rank: int = 0
    world: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.data.rows is None:
            if self.hold_out:
                raise ArgumentError(
                    "gives its batches in one order only, so that nothing can be held out",
                    where=self.data.source,
                    fix="Give arrays or a text file, or leave hold_out out.",
                )
            return
        if self._size() < 1:
            raise ArgumentError(
                f"{len(self.train_rows())} samples to train on, and {self.world} processes",
                where=self.data.source,
            )

    def epoch_batches(self) -> int:
        """Batches of this process in an epoch; reads a source with its own order once through."""
        if self.data.rows is None:
            return len(self.data) // self.world
        return len(self.train_rows()) // (self._size() * self.world)

    def batches(self, start: int) -> Iterator[Labelled]:
        """Batches from number `start` on, counted over all epochs."""
        if self.data.rows is None:
            yield from self._in_order(start)
            return
        size, each = self._size(), self.epoch_batches()
        for epoch in count(start // each):
            rows = self._epoch_rows(epoch)
            for index in range(start % each if epoch == start // each else 0, each):
                begin = (index * self.world + self.rank) * size
                yield labelled(*self.data.at(rows[begin : begin + size]))

    def held_out(self) -> Iterator[Labelled]:
        """Batches of the samples that are kept out."""
        rows, size = self._split[1], self._size()
        first = self.data.signature.inputs[0].shape[:1]
        least = size if first and isinstance(first[0], int) else 1
        for begin in range(0, len(rows), size):
            piece = rows[begin : begin + size]
            if len(piece) >= least:
                yield labelled(*self.data.at(piece))

    def train_rows(self) -> list[int]:
        """Indices of the samples that are trained on."""
        return self._split[0]

    @cached_property
    def _split(self) -> tuple[list[int], list[int]]:
        assert self.data.rows is not None
        total = self.data.rows.count
        kept_out = round(total * self.hold_out)
        if not kept_out:
            return list(range(total)), []
        generator = torch.Generator().manual_seed(self.seed("hold_out"))
        drawn = torch.randperm(total, generator=generator)
        return sorted(drawn[kept_out:].tolist()), sorted(drawn[:kept_out].tolist())

    def _size(self) -> int:
        assert self.data.rows is not None
        return min(self.data.rows.size, len(self.train_rows()) // self.world)

    def _epoch_rows(self, epoch: int) -> list[int]:
        rows = self.train_rows()
        if not self.shuffle:
            return rows
        generator = torch.Generator().manual_seed(self.seed("order", epoch))
        return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]

    def _in_order(self, start: int) -> Iterator[Labelled]:
        number = 0
        for epoch in count():
            before = number
            for group in self._groups(epoch):
                number += 1
                if number > start:
                    yield labelled(*group[self.rank])
            if number == before:
                raise ArgumentError(
                    f"gives too few batches for {self.world} processes", where=self.data.source
                )

    def _groups(self, epoch: int) -> Iterator[list[tuple[dict[str, Tensor], Tensor | None]]]:
        """One batch for every process; a rest too small for all is left out."""
        items, group = iter(self.data.labelled()), []
        for index in count():
            # a source that draws from torch's own generator draws the same after a resume
            torch.manual_seed(self.seed("read", epoch, index))
            item = next(items, None)
            if item is None:
                return
            group.append(item)
            if len(group) == self.world:
                yield group
                group = []


def labelled(inputs: Mapping[str, Tensor], labels: Tensor | None) -> Labelled:
    """Inputs and labels in one mapping, as losses take them."""
    return {**inputs} if labels is None else {**inputs, "labels": labels}
