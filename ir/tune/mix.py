"""Batches of real samples and batches of made ones, and what of these does not count.

Source: P24 (Suri et al. 2023, "Gen2Det"), section 3.3: every batch is all real or all made, and
the background of made images, where there may be objects that nobody labelled, has no loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from graphwright.ir.data.batches import load_data
from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune.feed import Feed, Labelled, Seed
from graphwright.ir.tune.losses import IGNORED_LABEL
from graphwright.ir.tune.options import MixOptions


@dataclass(frozen=True)
class Mixed:
    """Training batches of two sources, endlessly, from any position on.

    Attributes:
        real: the training data.
        made: batches that take the place of some of it.
        options: how often, and which of their labels does not count.
        seed: gives the seed of every random stream; all processes draw the same.
    """

    real: Feed
    made: Feed
    options: MixOptions
    seed: Seed

    def batches(self, start: int) -> Iterator[Labelled]:
        """Batches from number `start` on; each source goes on where it was left."""
        of_made = sum(self.is_made(number) for number in range(start))
        real, made = self.real.batches(start - of_made), self.made.batches(of_made)
        for number in count(start):
            yield self._counted(next(made)) if self.is_made(number) else next(real)

    def is_made(self, number: int) -> bool:
        """Whether the batch of this number, counted over all epochs, is all made."""
        generator = torch.Generator().manual_seed(self.seed("mix", number))
        return float(torch.rand((), generator=generator)) < self.options.probability

    def _counted(self, batch: Labelled) -> Labelled:
        if self.options.background is None:
            return batch
        labels = batch["labels"]
        if labels.is_floating_point():
            raise ArgumentError(
                "mix.background is a class index, and the labels are floats",
                where=self.options.data,
            )
        ignored: Tensor = labels.masked_fill(labels == self.options.background, IGNORED_LABEL)
        return {**batch, "labels": ignored}


def mixed(feed: Feed, options: MixOptions | None, folder: Path) -> Feed | Mixed:
    """The training batches, with made ones among them where the options say so.

    Args:
        feed: of the training data.
        options: of the mixture; None for none.
        folder: that a relative name of the made data starts from.

    Raises:
        ArgumentError: the made data does not fit, or has no labels where the real data has.
    """
    if options is None:
        return feed

    def seed(*path: str | int) -> int:
        return feed.seed("made", *path)

    size = feed.data.rows.size if feed.data.rows is not None else None
    section = {"data": options.data, "batch_size": size}
    made = load_data(section, feed.data.signature, seed("data"), root=folder)
    if made.has_labels != feed.data.has_labels:
        whose = "made" if feed.data.has_labels else "real"
        raise ArgumentError(
            f"the {whose} data has no labels, and the other has", where=options.data
        )
    if options.background is not None and not made.has_labels:
        raise ArgumentError("mix.background needs labels", where=options.data)
    return Mixed(
        feed, Feed(made, seed, 0.0, feed.rank, feed.world, feed.shuffle), options, feed.seed
    )
