"""Models that read tensors made from numbers alone as Python values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models.function import Function
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError

TABLE = torch.tensor([3, 2])


def traced(function: Callable[[Tensor], Tensor]) -> gw.Program:
    return gw.trace(Function(function), {"x": torch.randn(2, 4, 6)}, dynamic={"x": {0: "batch"}})


def in_place_all_known(x: Tensor) -> Tensor:
    starts = torch.zeros(2, dtype=torch.int64)
    starts += 1
    starts[1] = 3
    return x[:, starts.tolist()[0] if starts.sum() > 9 else 0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean(torch.arange(1, len(x.shape)).tolist()),
        lambda x: x.sum(torch.tensor([1, 2]).tolist()),
        lambda x: x * 2 if (torch.arange(3) > 1).any() else x,
        lambda x: x.reshape(x.shape[0], int(torch.tensor(x.shape[1:]).prod())),
        lambda x: x + float(torch.linspace(0, 1, 5).numpy().sum()),
        lambda x: x[:, torch.arange(4)[torch.tensor([1, 2])].tolist()],
        lambda x: x[:, : torch.ones(4).cumsum(0).bool().sum().item()],
        lambda x: x[:, : TABLE.tolist()[1]],
        lambda x: x * 2 if (torch.hann_window(6) > 0).any() else x,
    ],
    ids=[
        "arange",
        "tensor",
        "branch",
        "product of sizes",
        "numpy",
        "index",
        "item",
        "constant",
        "window",
    ],
)
def test_values_of_numbers_are_read_as_they_are(function: Callable[[Tensor], Tensor]) -> None:
    program = traced(function)
    assert "batch" in program.signature.dims
    for batch in (1, 2, 5):
        x = torch.randn(batch, 4, 6)
        torch.testing.assert_close(program(x), function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 if x.sum() > 0 else x,
        lambda x: x * 2 if (torch.zeros(3) + x.sum()).sum() > 0 else x,
        lambda x: x * 2 if torch.rand(3).sum() > 1 else x,
        in_place_all_known,
    ],
    ids=["input", "number and input", "random", "written"],
)
def test_values_that_depend_on_more_are_refused_with_the_line(
    function: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(ModelError) as refused:
        traced(function)
    assert "test_known_values.py" in refused.value.where
    assert "depends on the values of a tensor" in refused.value.message


def test_a_value_that_an_input_is_written_into_is_not_known_any_more() -> None:
    def function(x: Tensor) -> Tensor:
        table = torch.zeros(3)
        view = table[1:]
        view[0] = x.sum()
        return x * 2 if table.sum() > 0 else x

    with pytest.raises(ModelError, match="depends on the values"):
        traced(function)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Retrying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            try:
                x = block(x, lengths=None)
            except TypeError:
                x = block(x)
        return x


def test_a_call_that_raises_and_is_caught_leaves_no_trace() -> None:
    model, x = Retrying(), torch.randn(3, 4)
    program = gw.trace(model, {"x": x}, dynamic={"x": {0: "batch"}})
    torch.testing.assert_close(program(x), model(x))
    layers = [str(n.target) for n in program.graph.nodes if n.op == "get_attr"]
    assert layers[0] == "blocks.0.linear.weight"
