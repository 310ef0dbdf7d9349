"""Roundings of whole quotients are integer arithmetic, and equal at every size."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw

WHOLE: dict[str, Callable[[int], int]] = {
    "ceil": lambda t: math.ceil(t / 4),
    "floor": lambda t: math.floor(t / 3) + 1,
    "trunc": lambda t: math.trunc(t / 5) + 1,
    "ceil of half": lambda t: math.ceil(t * 0.5),
    "floor by a float": lambda t: math.floor(t / 2.0) + 1,
    "below zero": lambda t: 40 + math.floor(-t / 4),
}
FLOATS: dict[str, Callable[[int], int]] = {
    "a tenth": lambda t: math.ceil(t * 0.1),
    "towards zero": lambda t: 40 + math.trunc((2 - t) / 4),
    "by a fraction": lambda t: math.floor(t / 1.5),
}


def traced(function: Callable[[int], int]) -> gw.Program:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(function(x.shape[0]))

    return gw.trace(Net(), (torch.randn(9),), {"x": {0: "t"}})


@pytest.mark.parametrize("name", [*WHOLE, *FLOATS])
def test_the_size_is_the_same(name: str) -> None:
    function = (WHOLE | FLOATS)[name]
    program = traced(function)
    for size in (1, 2, 3, 4, 5, 7, 8, 10, 15, 16, 17, 30, 31, 64):
        assert program(torch.randn(size)).shape[0] == function(size)


@pytest.mark.parametrize("name", [*WHOLE, *FLOATS])
def test_floats_are_left_only_where_they_round(name: str) -> None:
    targets = {node.target for node in traced((WHOLE | FLOATS)[name]).graph.nodes}
    floats = targets & {math.ceil, math.floor, math.trunc, operator.truediv, torch.sym_float}
    assert bool(floats) is (name in FLOATS)
