"""Losses against their formulas in float64 loops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from models import tune_net as lab
from torch import Tensor

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.losses import (
    cross_entropy,
    kl_divergence,
    mse,
    next_token,
    relative_difference,
)


def surprise(logits: Tensor, label: int) -> float:
    """-log of the share that softmax gives the label."""
    shares = [math.exp(v) for v in logits.tolist()]
    return -math.log(shares[label] / sum(shares))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_cross_entropy_of_classes_last_or_second() -> None:
    logits, labels = random(2, 3, 5), torch.tensor([[4, -100, 0], [1, 2, -100]])
    kept = [(0, 0), (0, 2), (1, 0), (1, 1)]
    expected = sum(surprise(logits[i], int(labels[i])) for i in kept) / 4
    assert cross_entropy(logits, {"labels": labels}).item() == pytest.approx(expected)
    second = cross_entropy(logits.transpose(1, 2), {"labels": labels})
    assert second.item() == pytest.approx(expected)


def test_cross_entropy_of_shares() -> None:
    logits, shares = random(2, 3), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]]).double()
    expected = sum(
        float(shares[i, c]) * surprise(logits[i], c) for i in range(2) for c in range(3)
    ) / 2  # fmt: skip
    assert cross_entropy(logits, {"labels": shares}).item() == pytest.approx(expected)


@pytest.mark.parametrize("given", ["labels", "input_ids"])
def test_next_token(given: str) -> None:
    logits, ids = random(2, 4, 5), torch.tensor([[1, 4, 0, 2], [3, 3, 1, 0]])
    batch = {given: ids}
    counted = [(i, t) for i in range(2) for t in range(1, 4)]
    if given == "input_ids":  # padding takes the last token of the second text out
        batch["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
        counted.remove((1, 3))
    expected = sum(surprise(logits[i, t - 1], int(ids[i, t])) for i, t in counted) / len(counted)
    assert next_token(logits, batch).item() == pytest.approx(expected)
    assert ids[1, 3] == 0, "the inputs are left as they are"


def test_labels_that_do_not_count_give_no_loss() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.full((2, 5), -100)
    labels[:, 0] = 3  # the first token is foretold by nothing
    loss = next_token(logits, {"labels": labels})
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_mse_and_kl() -> None:
    a, b = random(2, 3), random(3, 2).T
    expected = (
        sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        / 6
    )
    assert mse(a, {"labels": b}).item() == pytest.approx(expected)

    def kl(student: Tensor, teacher: Tensor) -> float:
        p = torch.softmax(teacher, 0).tolist()
        return sum(
            p[c] * (surprise(student, c) - surprise(teacher, c)) for c in range(len(p))
        )  # fmt: skip

    rows = [kl(a[0], b[0]), kl(a[1], b[1])]
    assert kl_divergence(a, b).item() == pytest.approx(sum(rows) / 2)
    assert kl_divergence(a, b, torch.tensor([0, 1])).item() == pytest.approx(rows[1])


def test_shapes_that_do_not_fit() -> None:
    for loss in (cross_entropy, next_token, mse):
        with pytest.raises(ArgumentError, match=r"labels"):
            loss(random(2, 3), {"labels": torch.zeros(4, dtype=torch.long)})


def test_a_loss_of_ones_own(program: gw.Program, tmp_path: Path) -> None:
    """Found beside the spec, given outputs and batch; the mean of the first logit falls."""
    (tmp_path / "own_losses.py").write_text(
        "def first(outputs, batch):\n    assert set(batch) == {'x'}\n"
        "    return outputs[:, 0].mean()\n"
        "def broken(outputs, batch):\n    return outputs[:, 7]\n"
        "def vector(outputs, batch):\n    return outputs[0]\n"
    )
    x, _ = lab.images()
    context = Context(folder=tmp_path)
    batches = [(part,) for part in x.split(16)]
    options = TuneOptions(epochs=3, lr=0.05, loss="own_losses:first")
    tuned = tune(program, batches, options, context)
    assert tuned.program(x)[:, 0].mean() < program(x)[:, 0].mean() - 1
    for name, said in {
        "broken": "own_losses:broken: IndexError: index 7 is out of bounds",
        "vector": "own_losses:vector: a loss is a floating-point tensor without dimensions",
        "absent": "own_losses:absent: module own_losses has no 'absent'",
    }.items():
        with pytest.raises(ArgumentError) as caught:
            tune(program, batches, TuneOptions(loss=f"own_losses:{name}"), context)
        assert str(caught.value).startswith(said)


def test_labels_are_asked_for_before_training(program: gw.Program) -> None:
    x, _ = lab.images()
    for loss in ("cross_entropy", "mse", "next_token"):
        with pytest.raises(ArgumentError) as caught:
            tune(program, [(x,)], TuneOptions(loss=loss), Context())
        assert str(caught.value) == (
            f"the data: the loss {loss} needs labels. Add an array named `labels`."
        )
    assert as_batches([(x, x)], program.signature).has_labels


def test_the_relative_difference_leaves_padding_out() -> None:
    a, b, mask = (
        random(2, 3, 4),
        random(4, 3, 2).transpose(0, 2),
        torch.tensor([[1, 1, 0], [1, 0, 0]]),
    )
    real = [(0, 0), (0, 1), (1, 0)]
    gap = sum(float((a[i] - b[i]).square().sum()) for i in real)
    size = sum(float(b[i].square().sum()) for i in real)
    assert relative_difference(a, b, mask).item() == pytest.approx(gap / size)
    whole = float((a - b).square().sum() / b.square().sum())
    assert relative_difference(a, b).item() == pytest.approx(whole)


def test_a_program_learns_to_give_what_its_teacher_gives() -> None:
    torch.manual_seed(0)
    teacher, student = (
        gw.trace(torch.nn.Linear(4, 3).eval(), (torch.randn(8, 4),)) for _ in range(2)
    )
    data = [(torch.randn(8, 4),) for _ in range(8)]
    options = TuneOptions(loss="teacher_mse", lr=0.05, epochs=20, optimizer="adam")
    tuned = tune(student, data, options, Context(teacher=teacher))
    assert tuned.history.losses[-1] < 1e-3 < 0.1 < tuned.history.losses[0]
    with pytest.raises(ArgumentError, match="teacher_mse needs a teacher"):
        tune(student, data, options, Context())
