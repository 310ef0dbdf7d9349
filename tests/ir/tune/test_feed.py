"""The order of the data."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from models import tune_net as lab

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches, as_batches
from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune.feed import Feed


def seed(*path: str | int) -> int:
    return Context().generator(*path).initial_seed()


def numbered(program: gw.Program, count: int, size: int) -> Batches:
    """Samples that say their own number in every label."""
    x = torch.arange(count).float().reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return lab.table(program.signature, x, torch.arange(count), size)


def rows(feed: Feed, start: int, batches: int) -> list[list[int]]:
    found = list(islice(feed.batches(start), batches))
    for batch in found:
        assert torch.equal(batch["x"][:, 0, 0, 0].long(), batch["labels"])
    return [batch["labels"].tolist() for batch in found]


def test_every_epoch_draws_all_samples_in_a_new_order(program) -> None:
    feed = Feed(numbered(program, 12, 4), seed)
    assert feed.epoch_batches() == 3
    epochs = rows(feed, 0, 6)
    first, second = ([n for batch in epochs[i : i + 3] for n in batch] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert rows(feed, 0, 6) == epochs


def test_any_position_gives_the_same_batches(program) -> None:
    feed = Feed(numbered(program, 13, 4), seed)
    straight = rows(feed, 0, 9)
    for start in range(8):
        assert rows(feed, start, 9 - start) == straight[start:]


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_what_one_would_read(program, shuffle: bool) -> None:
    one = Feed(numbered(program, 26, 8), seed, shuffle=shuffle)
    two = [
        Feed(numbered(program, 26, 4), seed, rank=rank, world=2, shuffle=shuffle) for rank in (0, 1)
    ]
    parts = [rows(feed, 0, 6) for feed in two]
    joined = [a + b for a, b in zip(*parts, strict=True)]
    assert joined == rows(one, 0, 6)
    assert {feed.epoch_batches() for feed in (one, *two)} == {3}


def test_held_out_samples_are_not_trained_on(program) -> None:
    feed = Feed(numbered(program, 20, 4), seed, hold_out=0.3)
    held = [n for batch in feed.held_out() for n in batch["labels"].tolist()]
    trained = {n for batch in rows(feed, 0, 30) for n in batch}
    assert len(held) == 6
    assert not trained & set(held)
    assert trained | set(held) == set(range(20))


def stream(program: gw.Program, count: int) -> Batches:
    """Batches in their own order that draw from torch's global generator."""

    class Source:
        def __iter__(self):
            for number in range(count):
                noise = torch.rand(())
                yield torch.full((2, 1, 4, 4), number + float(noise)), torch.tensor([number] * 2)

    return as_batches(Source(), program.signature)


def test_a_source_with_its_own_order_keeps_it(program) -> None:
    whole = list(islice(Feed(stream(program, 3), seed).batches(0), 7))
    assert [int(batch["labels"][0]) for batch in whole] == [0, 1, 2, 0, 1, 2, 0]
    later = next(Feed(stream(program, 3), seed).batches(4))
    assert torch.equal(later["x"], whole[4]["x"])
    assert not torch.equal(whole[1]["x"], whole[4]["x"]), "every epoch draws anew"


def test_processes_take_turns_at_a_source_with_its_own_order(program) -> None:
    feeds = [Feed(stream(program, 5), seed, rank=rank, world=2) for rank in (0, 1)]
    numbers = [[int(b["labels"][0]) for b in islice(feed.batches(0), 4)] for feed in feeds]
    assert numbers == [[0, 2, 0, 2], [1, 3, 1, 3]]
    assert feeds[0].epoch_batches() == 2


def test_what_cannot_be_read(program) -> None:
    with pytest.raises(ArgumentError, match="so that nothing can be held out"):
        Feed(stream(program, 3), seed, hold_out=0.1)
    with pytest.raises(ArgumentError, match="2 samples to train on, and 3 processes"):
        Feed(numbered(program, 2, 4), seed, world=3)
    with pytest.raises(ArgumentError, match="too few batches for 4 processes"):
        next(Feed(stream(program, 3), seed, world=4).batches(0))
    with pytest.raises(ArgumentError, match="an iterator, which can be read only once"):
        as_batches(iter([]), program.signature)
