from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from graphwright.ir.tune import TuneOptions
from graphwright.ir.tune.optimizers import make_optimizer
from graphwright.ir.tune.schedule import lr_factor


def factors(total: int, **options) -> list[float]:
    return [lr_factor(TuneOptions(**options), step, total) for step in range(total)]


def test_schedules() -> None:
    assert factors(4, schedule="constant") == [1, 1, 1, 1]
    assert factors(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    cosine = [0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert factors(4, schedule="cosine") == pytest.approx(cosine)
    assert factors(4, schedule="constant", warmup=3) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert factors(6, schedule="linear", warmup=2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_only_matrices_and_kernels_decay(name: str, kind: type) -> None:
    parameters = {
        "w": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2)),
        "k": nn.Parameter(torch.ones(2, 2, 3)), "s": nn.Parameter(torch.ones(())),
    }  # fmt: skip
    options = TuneOptions(optimizer=name, lr=0.5, weight_decay=0.1)
    optimizer = make_optimizer(parameters, options)
    assert type(optimizer) is kind
    decay = {
        n: group["weight_decay"]
        for group in optimizer.param_groups
        for n, p in parameters.items()
        if any(p is q for q in group["params"])
    }
    assert decay == {"w": 0.1, "k": 0.1, "b": 0.0, "s": 0.0}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_adagrad_norm_is_its_formula() -> None:
    """One v for all parameters, in a loop over numbers; matrices decay by their gradient."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector = (torch.nn.Parameter(torch.randn(*s, generator=generator, dtype=torch.float64))
                      for s in ((3, 2), (4,)))  # fmt: skip
    numbers = [float(value) for p in (matrix, vector) for value in p.detach().flatten()]
    options = TuneOptions(optimizer="adagrad_norm", lr=0.3, weight_decay=0.1)
    optimizer = make_optimizer({"m": matrix, "v": vector}, options)
    total = 0.0
    for _ in range(4):
        optimizer.zero_grad()
        ((matrix**3).sum() + (vector**2).sum()).backward()
        optimizer.step()
        gradient = [3 * n**2 + 0.1 * n if i < 6 else 2 * n for i, n in enumerate(numbers)]
        total += sum(g * g for g in gradient)
        numbers = [n - 0.3 * g / total**0.5 for n, g in zip(numbers, gradient, strict=True)]
    found = [float(value) for p in (matrix, vector) for value in p.detach().flatten()]
    assert found == pytest.approx(numbers, rel=1e-9)
    again = make_optimizer({"m": matrix, "v": vector}, options)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[1]["sum"] == pytest.approx(total, rel=1e-9)
