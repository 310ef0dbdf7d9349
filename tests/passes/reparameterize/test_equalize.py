from __future__ import annotations

import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.passes.reparameterize import Equalize

CHAIN = ("conv", [("cleanup.fold_batch_norm", {}), ("reparameterize.equalize", {})])


class Chain(nn.Module):
    """Convolution, depthwise convolution, and a linear layer behind a flatten, ReLUs between."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1)
        self.c, self.act = nn.Linear(4 * 16, 5), activation or nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))).flatten(1))


def uneven(model: nn.Module) -> gw.Program:
    """The same function, with channels of very different sizes, as folded norms leave them."""
    with torch.no_grad():
        scale = torch.logspace(-2, 2, 6)
        model.a.weight.mul_(scale.view(-1, 1, 1, 1))
        model.a.bias.mul_(scale)
        model.b.weight.div_(scale.view(1, -1, 1, 1))
    return gw.trace(model.double().eval(), (torch.randn(2, 3, 6, 6).double(),))


def ranges(weight: torch.Tensor, axis: int) -> torch.Tensor:
    return weight.detach().movedim(axis, 0).flatten(1).abs().amax(1)


def test_ranges_agree_and_the_function_stays() -> None:
    given = uneven(Chain())
    result = Equalize(rounds=100).execute(given, Context())
    assert measure(given, result.program).relative < 1e-10  # float64: rounding alone
    state = result.program.state
    # the two sides of every channel have the same range, as the formula says
    assert torch.allclose(ranges(state["a.weight"], 0), ranges(state["b.weight"], 1), rtol=2e-3)
    columns = state["c.weight"].detach().unflatten(1, (4, 16)).abs().amax((0, 2))
    assert torch.allclose(ranges(state["b.weight"], 0), columns, rtol=2e-3)
    assert [action.layer for action in result.actions] == ["a", "b"]


def test_one_scale_for_a_weight_loses_less() -> None:
    given = uneven(Chain())
    even = Equalize().execute(given, Context()).program

    def error(program: gw.Program) -> float:
        """Of the function, with every weight in 8 bits by one scale."""
        state = {
            n: (t.detach() / t.abs().max() * 127).round() * t.detach().abs().max() / 127
            for n, t in program.state.items()
        }
        return measure(given, program.replace(state=state)).relative

    assert error(even) < 0.2 * error(given)


def test_other_activations_stay() -> None:
    given = uneven(Chain(nn.GELU()))
    result = Equalize().execute(given, Context())
    assert {action.reason for action in result.actions} == {"gelu of a multiple is no multiple"}
    assert all(torch.equal(result.program.state[n], t) for n, t in given.state.items())


def test_a_norm_has_to_be_folded_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    given = gw.trace(model.eval(), (torch.randn(2, 3, 6, 6),))
    actions = Equalize().execute(given, Context()).actions
    assert [a.reason for a in actions] == ["a batch norm follows it: fold it first"]
