"""Static int8 of convolutional nets: every convolution is an integer kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.backends.base import Compiled


def compiled(model: nn.Module, x: torch.Tensor) -> Compiled:
    quantize = gw.passes.quantize.Int8(activations="static")
    program = gw.trace(model.eval(), {"input": x})
    return gw.lower(quantize(program, calibration=[{"input": x}]), "onnxruntime")


def two(*tail: nn.Module, between: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), between or nn.Identity()]
    return nn.Sequential(*first, nn.Conv2d(16, 16, 3, padding=1), *tail)


@pytest.mark.parametrize("tail", [[], [nn.PReLU()], [nn.Flatten(), nn.Linear(16 * 144, 4)]])
def test_with_and_without_a_linear(tail: list[nn.Module]) -> None:
    lowered = compiled(two(*tail), torch.randn(4, 3, 12, 12))
    assert lowered.notes["dropped"] == {}
    assert lowered.notes["kernels"]["QLinearConv"] == 2
    assert "Conv" not in lowered.notes["kernels"]


@pytest.mark.parametrize("pad", [nn.ZeroPad2d((0, 1, 0, 1)), nn.ReflectionPad2d(1)])
def test_with_a_pad_between(pad: nn.Module) -> None:
    lowered = compiled(two(between=pad), torch.randn(4, 3, 12, 12))
    assert lowered.notes["dropped"] == {}
    assert lowered.notes["kernels"]["QLinearConv"] == 2


@pytest.mark.parametrize("rank", [1, 3])
def test_in_one_and_three_dimensions(rank: int) -> None:
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{rank}d")
    pool = getattr(nn, f"MaxPool{rank}d")
    model = nn.Sequential(conv(8, 16, 3, padding=1), nn.ReLU(), pool(2), conv(16, 16, 3))
    lowered = compiled(model, torch.randn(2, 8, *[8] * rank))
    assert lowered.notes["kernels"]["QLinearConv"] == 2
    assert "Conv" not in lowered.notes["kernels"]
