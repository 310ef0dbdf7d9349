"""Distances from running statistics, by hand, and what a model lacks for them."""

from __future__ import annotations

import re

import pytest
import torch
from models import stripes
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.synthesis.statistics import (
    Observed,
    distances_per_norm,
    norms_of,
    subject_of,
)
from graphwright.passes.cleanup import FoldBatchNorm

CPU = torch.device("cpu")


def by_hand(model: nn.Sequential, x: torch.Tensor, weight: float) -> list[float]:
    """The distances with loops over layers and channels, in float64."""
    found, h = [], x.double()
    model = model.double()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            of_mean = of_variance = 0.0
            for channel in range(h.shape[1]):
                values = h[:, channel].flatten()
                mean = values.sum() / len(values)
                variance = ((values - mean) ** 2).sum() / len(values)
                of_mean += float(mean - layer.running_mean[channel]) ** 2
                of_variance += float(variance - layer.running_var[channel]) ** 2
            found.append(weight * of_variance**0.5 + of_mean**0.5)
        h = layer(h)
    model.float()
    return found


@pytest.mark.parametrize("weight", [1.0, 11.0])
def test_distances_are_those_by_hand(weight):
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    program = stripes.program()
    observed = Observed(program, norms_of(program), CPU)
    with torch.no_grad():
        logits, values = observed(x)
        found = observed.distances(values, weight)
        expected = by_hand(stripes.trained(), x, weight)
    assert len(found) == 3
    assert [float(v) for v in found] == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(logits, program(x))


def test_norms_have_the_names_of_layers_in_order():
    assert [norm.name for norm in norms_of(stripes.program())] == ["1", "4", "7"]
    found = distances_per_norm(stripes.program(), stripes.images(64, seed=999)[0])
    assert list(found) == ["1", "4", "7"]


def test_statistics_of_the_training_data_are_near():
    real = distances_per_norm(stripes.program(), stripes.images(64, seed=999)[0])
    noise = distances_per_norm(stripes.program(), 3 * torch.randn(64, 3, 8, 8))
    assert all(real[name] < 0.5 * noise[name] for name in real)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = stripes.fresh()

    def forward(self, x, y):
        return self.net(x + y)


REFUSED = {
    "folded": (
        lambda: FoldBatchNorm()(stripes.program()),
        "bn_synthesis needs running statistics, and cleanup.fold_batch_norm has folded the batch "
        "norms of the model",
    ),
    "no batch norm": (
        lambda: stripes.traced(stripes.fresh(nn.InstanceNorm2d)),
        "bn_synthesis needs running statistics, and the model has no batch norm",
    ),
    "no running statistics": (
        lambda: stripes.traced(
            stripes.fresh(lambda n: nn.BatchNorm2d(n, track_running_stats=False))
        ),
        "bn_synthesis needs running statistics, and the batch norms of the model keep none",
    ),
    "never trained": (
        lambda: stripes.traced(stripes.fresh()),
        "bn_synthesis needs running statistics of training, and those of '1' are as a new batch "
        "norm has them: means 0, variances 1",
    ),
    "two inputs": (
        lambda: gw.trace(_Two().eval(), (stripes.images(4)[0], stripes.images(4)[0])),
        "bn_synthesis makes images, (batch, channels, height, width), and the model's inputs are "
        "x float32 [4, 3, 8, 8], y float32 [4, 3, 8, 8]",
    ),
    "no images": (
        lambda: gw.trace(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(),
                         (torch.randn(4, 4),)),
        "bn_synthesis makes images, (batch, channels, height, width), and the model's inputs are "
        "input float32 [4, 4]",
    ),
    "no logits": (
        lambda: stripes.traced(stripes.trained()[:6]),
        "bn_synthesis needs class logits, (batch, classes), and the model's output is "
        "['batch', 8, 8, 8]",
    ),
    "one image at a time": (
        lambda: gw.trace(stripes.trained(), (stripes.images(1)[0],)),
        "bn_synthesis matches statistics over images, and the model takes 1 at a time",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_lacks_is_said(name):
    make, message = REFUSED[name]
    with pytest.raises(ModelError, match=re.escape(message)):
        subject_of(make())


def test_half_precision_is_refused():
    program = gw.trace(stripes.fresh().half().eval(), (stripes.images(4)[0].half(),))
    with pytest.raises(ModelError, match="makes float32 images, and input 'x' is float16"):
        subject_of(program)
