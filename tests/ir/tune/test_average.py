"""Averages of weights, smoothed labels, and the choice by a metric, each against a plain loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches
from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune import Hook, TuneOptions, tune
from graphwright.ir.tune.losses import cross_entropy

Data = Callable[[int], Batches]


class Trace(Hook):
    """Keeps the weight behind every step. As a test's own hook it stands in for no recipe."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def after_step(self, at) -> None:
        self.seen.append(at.parameters["fc.weight"].detach().clone())


def test_the_average_is_that_of_every_step(program: gw.Program, data: Data) -> None:
    plain = {"steps": 12, "lr": 0.01, "schedule": "constant"}
    trace = Trace()
    tune(program, data(8), TuneOptions(**plain), Context(), hooks=[trace])
    tuned = tune(program, data(8), TuneOptions(**plain, ema=0.5), Context())
    average = program.state["fc.weight"].detach().clone()
    for step, weight in enumerate(trace.seen, 1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(tuned.program.state["fc.weight"].detach(), average)
    assert not torch.allclose(average, trace.seen[-1], atol=1e-4)
    assert "running_mean" in " ".join(tuned.program.state)
    with pytest.raises(ArgumentError, match="counts on the last"):
        tune(program, data(8), TuneOptions(**plain, ema=0.5), Context(), hooks=[Trace()])


def test_an_average_survives_a_checkpoint(program: gw.Program, data: Data, tmp_path) -> None:
    """A run that finds its own state with no step left to do ends in the same averages."""
    options = TuneOptions(steps=6, lr=0.01, ema=0.9, hold_out=0.25, keep_best=False)
    context = Context(work=tmp_path, checkpoint_seconds=0.0)
    first = tune(program, data(8), options, context)
    again = tune(program, data(8), options, context)
    for name, tensor in first.program.state.items():
        assert torch.equal(tensor, again.program.state[name])
    assert first.history.evaluations == again.history.evaluations


def test_the_average_is_what_is_evaluated(program: gw.Program, data: Data) -> None:
    seen: list[Tensor] = []

    def evaluate(current: gw.Program) -> float:
        seen.append(current.state["fc.weight"].detach().clone())
        return float(len(seen))

    options = TuneOptions(steps=4, lr=0.01, ema=0.5, keep_best=False)
    tuned = tune(program, data(8), options, Context(), evaluate=evaluate)
    assert torch.equal(seen[-1], tuned.program.state["fc.weight"])


def test_smoothed_labels_are_torchs(program: gw.Program, data: Data) -> None:
    logits, labels = torch.randn(5, 7), torch.tensor([0, 3, -100, 6, 2])
    smooth = torch.full((5, 7), 0.2 / 7)
    smooth[torch.arange(5), labels.clamp_min(0)] += 0.8
    each = -(smooth * F.log_softmax(logits, -1)).sum(-1)
    expected = each[labels >= 0].mean()
    torch.testing.assert_close(cross_entropy(logits, {"labels": labels}, 0.2), expected)
    options = {"steps": 1, "shuffle": False, "hold_out": 0.25, "lr": 1e-9}
    smoothed = tune(program, data(8), TuneOptions(**options, label_smoothing=0.3), Context())
    plain = tune(program, data(8), TuneOptions(**options), Context())
    assert smoothed.history.losses != plain.history.losses
    assert smoothed.history.evaluations[0][1] == pytest.approx(plain.history.evaluations[0][1])


def test_the_metric_chooses(program: gw.Program, data: Data) -> None:
    """The best evaluation is the one with the fewest wrong labels."""
    options = {"epochs": 6, "lr": 0.02, "hold_out": 0.25}
    tuned = tune(program, data(8), TuneOptions(**options, select="accuracy"), Context())
    errors = dict(tuned.history.evaluations)
    assert all((12 * value).is_integer() for value in errors.values()), "12 samples are held out"
    assert errors[tuned.history.best_step] == min(errors.values())
    by_loss = tune(program, data(8), TuneOptions(**options), Context()).history.evaluations
    assert [step for step, _ in by_loss] == list(errors)
    assert [value for _, value in by_loss] != list(errors.values())
