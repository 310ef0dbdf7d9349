"""Made batches among real ones: how often, in which order, and what of them counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tune_net as lab

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.feed import Feed
from graphwright.ir.tune.losses import cross_entropy
from graphwright.ir.tune.mix import Mixed, mixed
from graphwright.ir.tune.options import MixOptions


def seed(*path: str | int) -> int:
    return Context(seed=4).generator("tune", *path).initial_seed()


def feeds(program: gw.Program) -> tuple[Feed, Feed]:
    x, labels = lab.images(24)
    return tuple(Feed(lab.table(program.signature, x + far, labels, 4), seed)
                 for far in (0, 100))  # type: ignore[return-value]  # fmt: skip


def of(**options) -> MixOptions:
    return MixOptions.model_validate({"data": "made.npz", **options})


def test_a_batch_is_all_real_or_all_made_as_often_as_asked(program: gw.Program) -> None:
    both = Mixed(*feeds(program), of(probability=0.3), seed)
    count = 2000
    found = sum(both.is_made(number) for number in range(count))
    assert abs(found - 0.3 * count) < 3 * (count * 0.3 * 0.7) ** 0.5
    batches = both.batches(0)
    for number in range(20):
        made = next(batches)["x"].flatten(1).mean(1) > 50
        assert made.all() if both.is_made(number) else not made.any()


def test_it_goes_on_from_any_batch(program: gw.Program) -> None:
    both = Mixed(*feeds(program), of(), seed)
    straight = both.batches(0)
    seen = [next(straight) for _ in range(12)]
    later = both.batches(7)
    for batch in seen[7:]:
        again = next(later)
        assert all(torch.equal(again[name], batch[name]) for name in batch)


def test_the_background_of_made_samples_counts_for_nothing(program: gw.Program) -> None:
    """Its logits have no gradient, the others that of a mean over them alone."""
    both = Mixed(*feeds(program), of(probability=1.0, background=1), seed)
    batch = next(b for b in both.batches(0) if 0 < int((b["labels"] == -100).sum()) < 4)
    logits = program(batch["x"]).detach().requires_grad_()
    cross_entropy(logits, batch).backward()
    gone = batch["labels"] == -100
    assert float(logits.grad[gone].abs().max()) == 0
    kept = logits.detach()[~gone].requires_grad_()
    F.cross_entropy(kept, batch["labels"][~gone]).backward()
    torch.testing.assert_close(logits.grad[~gone], kept.grad)
    real = Mixed(*feeds(program), of(probability=1e-9, background=1), seed)
    assert int((next(real.batches(0))["labels"] == -100).sum()) == 0


def test_a_batch_in_which_nothing_counts_has_no_loss() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(logits, {"labels": torch.full((3,), -100)})
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(logits.grad.abs().max()) == 0


def made_file(folder: Path) -> None:
    x, labels = lab.images(24)
    np.savez(folder / "made.npz", x=x.numpy() + 0.1, labels=labels.numpy())


def test_a_run_with_it_is_that_of_a_plain_loop(program: gw.Program, tmp_path: Path) -> None:
    made_file(tmp_path)
    x, labels = lab.images(24)
    given = TuneOptions(epochs=2, lr=0.1, optimizer="sgd", momentum=0.0, schedule="constant",
                        shuffle=False, mix=of(probability=0.5, background=0))  # fmt: skip
    context = Context(seed=4, folder=tmp_path)
    data = lab.table(program.signature, x, labels, 4)
    tuned = tune(program, data, given, context)
    real = Feed(data, lambda *path: context.generator("tune", *path).initial_seed(), shuffle=False)
    both = mixed(real, given.mix, tmp_path)
    assert isinstance(both, Mixed)
    kinds = [both.is_made(number) for number in range(12)]
    assert 2 < sum(kinds) < 10
    model, places = lab.fresh().train(), [0, 0]
    for is_made in kinds:
        rows = torch.arange(4 * places[is_made], 4 * places[is_made] + 4) % 24
        places[is_made] += 1
        told = labels[rows].masked_fill(labels[rows] == 0, -100) if is_made else labels[rows]
        model.zero_grad()
        F.cross_entropy(model(x[rows] + 0.1 * is_made), told).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    for name, tensor in tuned.program.state.items():
        # float32 over 12 steps
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_refusals(program: gw.Program, tmp_path: Path) -> None:
    made_file(tmp_path)
    real, _ = feeds(program)
    with pytest.raises(ValueError, match="which loss mse has none of"):
        TuneOptions(loss="mse", mix=of(background=0))
    x, _ = lab.images(24)
    bare = dataclasses.replace(real, data=dataclasses.replace(real.data, label_name=None))
    with pytest.raises(ArgumentError, match="the real data has no labels, and the other has"):
        mixed(bare, of(), tmp_path)
    np.savez(tmp_path / "bare.npz", x=x.numpy())
    with pytest.raises(ArgumentError, match="the made data has no labels, and the other has"):
        mixed(real, of(data="bare.npz"), tmp_path)
    with pytest.raises(ArgumentError, match=r"mix\.background needs labels"):
        mixed(bare, of(data="bare.npz", background=0), tmp_path)
