"""Calls that torch runs with plain numbers, along free axes: the same as eager at every size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.ir.trace.capture import TraceWarning


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def coordinates(x: Tensor) -> Tensor:
    rows, columns = torch.linspace(-1, 1, x.shape[2]), torch.linspace(0, 3, steps=x.shape[3])
    return torch.cat([x, torch.meshgrid(rows, columns, indexing="ij")[0].expand_as(x)], 1)


def transformed(x: Tensor, aligned: bool) -> Tensor:
    theta = torch.tensor([[[0.8, 0.3, 0.1], [-0.2, 1.1, 0.0]]]).expand(x.shape[0], 2, 3)
    return F.affine_grid(theta, x.shape, align_corners=aligned)


@pytest.mark.parametrize(
    "function",
    [
        coordinates,
        lambda x: torch.linspace(5, x.shape[2] - 1, x.shape[2], dtype=torch.float64),
        lambda x: transformed(x, True),
        lambda x: transformed(x, False),
        lambda x: F.avg_pool2d(x, x.shape[2:]),
        lambda x: F.avg_pool2d(x, (x.shape[2], 1)),
        lambda x: F.avg_pool1d(x[:, :, 0], kernel_size=x.shape[3]),
        lambda x: F.max_pool2d(x, x.shape[2:]),
        lambda x: F.max_pool1d(x[:, :, 0], x.shape[3]),
        lambda x: F.max_pool1d(x[:, :, 0], 3, 2, 1),
        lambda x: F.max_pool1d(x[0, :, 0], 2, ceil_mode=True, dilation=2),
        nn.Sequential(nn.Flatten(2), nn.MaxPool1d(3)),
    ],
)
def test_sizes_stay_free(function: Callable[[Tensor], Any]) -> None:
    axes = {"x": {0: "b", 2: "h", 3: "w"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceWarning)
        program = gw.trace(Function(function), {"x": torch.randn(2, 3, 8, 10)}, dynamic=axes)
    assert set(program.signature.dims) == {"b", "h", "w"}
    for height, width in ((8, 10), (13, 9), (6, 31)):
        x = torch.randn(1, 3, height, width)
        torch.testing.assert_close(program(x), function(x), rtol=1e-6, atol=1e-6)


def test_windows_that_move_and_integers_are_left_as_they_are() -> None:
    x = torch.randn(2, 3, 8, 10)
    for function in (
        lambda x: F.avg_pool2d(x, (x.shape[2], 2)),
        lambda x: F.avg_pool2d(x, x.shape[2:], divisor_override=3),
        lambda x: torch.linspace(0, 9, x.shape[2], dtype=torch.int64),
    ):
        with pytest.warns(TraceWarning, match="'h' is fixed at 8"):
            program = gw.trace(Function(function), {"x": x}, dynamic={"x": {2: "h"}})
        torch.testing.assert_close(program(x), function(x))
