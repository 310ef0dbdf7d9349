"""Dimensions that follow from others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange

X, PAST, MASK = torch.randn(2, 3), torch.randn(2, 5), torch.rand(2, 8)
AXES = {
    "x": {0: "batch", 1: "seq"}, "past": {0: "batch", 1: "past"}, "mask": {0: "batch", 1: "total"},
}  # fmt: skip
SUM = {"total": "past + seq"}


class Joined(nn.Module):
    """New values behind past ones, under a mask."""

    def forward(self, x: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([past, x], 1) * mask


class Looped(Joined):
    """As many steps as the past is long."""

    def forward(self, x: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        for i in range(past.shape[1]):
            x = x + past[:, i : i + 1]
        return torch.cat([past, x], 1) * mask


class NeedsPast(Joined):
    """Another way through its code at an empty past."""

    def forward(self, x: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        joined = torch.cat([past, x], 1)
        return joined * mask if past.shape[1] else joined * mask + 1


def trace(model: nn.Module, derived: dict[str, str] | None = None) -> gw.Program:
    derived = derived or SUM
    return gw.trace(model, (X, PAST, MASK), AXES, dims={"past": DimRange(0)}, derived=derived)


def test_all_stay_free_and_outputs_have_the_name() -> None:
    program = trace(Joined())
    dims = program.signature.dims
    assert (dims["past"].min, dims["total"]) == (0, DimRange(1))
    assert program.signature.outputs[0].shape == ("batch", "total")
    assert program(X, PAST[:, :0], MASK[:, :3]).shape == (2, 3)


def test_a_call_that_breaks_the_sum_is_refused() -> None:
    with pytest.raises(ArgumentError, match="'total' is 8 and has to be 3"):
        trace(Joined())(X, PAST[:, :0], MASK)


def test_a_fixed_term_is_a_number_in_the_sum() -> None:
    with pytest.warns(UserWarning, match="'past' is fixed at 5"):
        program = trace(Looped())
    assert program.signature.derived == {"total": "5 + seq"}
    assert program.signature.dims["total"].min == 6


def test_a_size_of_0_that_is_another_function_is_left_out() -> None:
    with pytest.warns(UserWarning, match="past"):
        program = trace(NeedsPast())
    assert program.signature.dims["past"].min >= 1


@pytest.mark.parametrize("sum_of", ["past + length", "past + seq + 1"])
def test_a_sum_that_does_not_hold_is_refused(sum_of: str) -> None:
    with pytest.raises(ArgumentError, match="derived: total"):
        trace(Joined(), {"total": sum_of})
