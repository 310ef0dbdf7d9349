"""P72's teachers: how far they are from the model, where they go, and that the model stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import stripes

from graphwright.ir.synthesis.adjust import adjusted
from graphwright.ir.synthesis.options import WeightAdjust
from graphwright.ir.synthesis.statistics import Observed, norms_of


@pytest.fixture(scope="module")
def observed() -> Observed:
    program = stripes.program()
    return Observed(program, norms_of(program), torch.device("cpu"))


def length(observed: Observed, moved: dict[str, torch.Tensor]) -> float:
    parts = [(moved[n] - p).double().square().sum() for n, p in observed.parameters.items()]
    return float(sum(parts)) ** 0.5


@pytest.mark.parametrize(("steps", "rho"), [(1, 0.05), (12, 0.015), (5, 0.3)])
def test_the_way_is_as_long_as_asked_for(observed, steps, rho):
    x, labels = stripes.images(16)
    found = length(observed, adjusted(observed, x, labels, WeightAdjust(rho=rho, steps=steps)))
    assert found <= rho + 1e-6
    assert found >= 0.5 * rho
    if steps == 1:
        assert found == pytest.approx(rho, rel=1e-4)


def test_the_loss_of_the_batch_rises_and_the_model_stays(observed):
    x, labels = stripes.images(16)
    before = {name: p.clone() for name, p in observed.parameters.items()}
    moved = adjusted(observed, x, labels, WeightAdjust(rho=0.05, steps=4))
    with torch.no_grad():
        plain, other = observed(x)[0], observed(x, moved)[0]
    assert F.cross_entropy(other, labels) > F.cross_entropy(plain, labels)
    assert all(torch.equal(before[name], p) for name, p in observed.parameters.items())


def test_one_step_is_along_the_gradient(observed):
    x, labels = stripes.images(16)
    moved = adjusted(observed, x, labels, WeightAdjust(rho=0.05, steps=1))
    model = stripes.trained()
    loss = F.cross_entropy(model(x), labels)
    gradients = dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    for name, gradient in gradients.items():
        step = moved[name] - observed.parameters[name]
        assert torch.allclose(step, 0.05 * gradient / norm, atol=1e-6)
