"""Courses of the learning rate against torch's schedulers, and what does not go together."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from graphwright.ir.tune import TuneOptions
from graphwright.ir.tune.schedule import lr_factor


def factors(total: int, **options) -> list[float]:
    return [lr_factor(TuneOptions(**options), step, total) for step in range(total)]


def of_torch(make, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_steps_are_those_of_torch() -> None:
    schedulers = torch.optim.lr_scheduler
    multi = factors(40, schedule="multistep", milestones=(0.5, 0.75))
    assert multi == pytest.approx(of_torch(lambda o: schedulers.MultiStepLR(o, [20, 30]), 40))
    step = factors(40, schedule="step", step_share=0.25, gamma=0.5)
    assert step == pytest.approx(of_torch(lambda o: schedulers.StepLR(o, 10, 0.5), 40))
    cosine = factors(30, schedule="cosine", min_lr=1e-4, lr=1e-3)
    annealed = of_torch(lambda o: schedulers.CosineAnnealingLR(o, 30, eta_min=0.1), 30)
    assert cosine == pytest.approx(annealed)


def test_nothing_falls_below_the_least_rate() -> None:
    assert factors(4, schedule="linear", lr=1.0, min_lr=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    low = factors(10, schedule="step", step_share=0.1, lr=1.0, min_lr=0.05)
    assert low == pytest.approx([1.0, 0.1] + [0.05] * 8)
    warm = factors(6, schedule="multistep", milestones=(0.5,), warmup=2)
    assert warm == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "multistep"}, "milestones belong to schedule multistep"),
        ({"milestones": (0.5,)}, "milestones belong to schedule multistep"),
        ({"schedule": "multistep", "milestones": (0.5, 0.2)}, "milestones have to rise"),
        ({"schedule": "step"}, "step_share belongs to schedule step"),
        ({"gamma": 0.5}, "gamma has no part in schedule cosine"),
        ({"min_lr": 1.0}, "min_lr 1 is more than lr"),
        ({"loss": "mse", "label_smoothing": 0.1}, "label_smoothing has no part in loss mse"),
        ({"select": "accuracy"}, "set hold_out"),
    ],
)
def test_what_does_not_go_together(options, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TuneOptions(**options)
