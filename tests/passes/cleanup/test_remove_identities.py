from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.passes.cleanup.remove_identities import RemoveIdentities

CHAIN = ("conv", [("cleanup.remove_identities", {})])

Fn = Callable[[torch.Tensor], torch.Tensor]


class Calls(nn.Module):
    def __init__(self, fn: Fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fn(torch.sin(x)))


def run(fn: Fn) -> tuple[gw.Program, gw.Program]:
    program = gw.trace(Calls(fn), (torch.randn(2, 3, 4),), dynamic={"x": {0: "n"}})
    after = RemoveIdentities().execute(program, Context()).program
    for n in (2, 5):
        x = torch.randn(n, 3, 4)
        assert torch.equal(after(x), program(x))
    return program, after


def calls(program: gw.Program) -> int:
    return sum(n.op == "call_function" for n in program.graph.nodes)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x + 0,
        lambda x: 0 + x,
        lambda x: x - 0.0,
        lambda x: 1 * x,
        lambda x: x / 1,
        lambda x: x**1,
        lambda x: x.to(torch.float32),
        lambda x: x.reshape(x.shape[0], 3, 4),
        lambda x: x.reshape(-1, 12).reshape(-1, 3, 4),
        lambda x: x.permute(0, 1, 2),
        lambda x: x.transpose(1, 2).transpose(2, 1),
        lambda x: x[:, :],
        lambda x: x.clone(),
        lambda x: x.contiguous(),
        lambda x: x.neg().neg(),
        lambda x: torch.cat([x], 1),
        lambda x: torch.cat(list(x.chunk(3, 1)), 1),
        lambda x: nn.functional.pad(x, (0, 0)),
        lambda x: x.expand(-1, 3, 4),
    ],
)
def test_an_identity_leaves_nothing_but_its_neighbours(fn: Fn) -> None:
    _, after = run(fn)
    assert calls(after) == 2


def test_a_repeated_relu_is_one_relu() -> None:
    _, after = run(lambda x: x.relu().relu())
    assert calls(after) == 3


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x + torch.zeros(5, 1, 3, 4),
        lambda x: 0 - x,
        lambda x: 2 / (x + 3),
        lambda x: x.to(torch.float64),
        lambda x: x.permute(0, 2, 1),
        lambda x: x.narrow(1, 1, 2),
        lambda x: torch.cat(list(x.chunk(3, 1))[::-1], 1),
        lambda x: torch.add(x, x, alpha=0),
        lambda x: torch.div(x, 1, rounding_mode="floor"),
    ],
)
def test_what_only_looks_like_an_identity_stays(fn: Fn) -> None:
    if fn(torch.zeros(2, 3, 4)).dim() == 4:
        program = gw.trace(Calls(fn), (torch.randn(1, 3, 4),))
        after = RemoveIdentities().execute(program, Context()).program
        assert calls(after) == calls(program)
        return
    program, after = run(fn)
    assert calls(after) == calls(program)
