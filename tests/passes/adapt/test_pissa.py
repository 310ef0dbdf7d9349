from __future__ import annotations

import pytest
import torch
from models.every_pass import UNTIED
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError

CHAIN = ("text", [("adapt.pissa", {"targets": UNTIED, "rank": 2})])


def decaying(out: int = 24, columns: int = 40) -> gw.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(columns, out)).eval()
    u, _, vh = torch.linalg.svd(net[0].weight.detach().double(), full_matrices=False)
    values = 2.0 ** -torch.arange(len(u), dtype=torch.float64)
    net[0].weight.data = ((u * values) @ vh).float()
    return gw.trace(net, (torch.randn(4, columns),))


@pytest.mark.parametrize("iterations", [None, 16])
def test_the_residual_has_the_smaller_singular_values(iterations: int | None) -> None:
    before = decaying()
    after = gw.passes.adapt.Pissa(rank=5, iterations=iterations)(before)
    values = torch.linalg.svdvals(before.state["0.weight"].double())
    rest = torch.linalg.svdvals(after.state["0.weight"].double())
    torch.testing.assert_close(rest[:10], values[5:15], rtol=1e-3, atol=1e-6)
    a, b = (after.state[f"0.lora_{x}.default"].double() for x in "ab")
    assert torch.allclose(torch.linalg.svdvals(b @ a)[:5], values[:5], rtol=1e-4)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-4, atol=1e-6)  # shared evenly
    whole = after.state["0.weight"].double() + b @ a
    assert float((whole - before.state["0.weight"]).detach().abs().max()) < 1e-5


def test_a_quantized_residual_loses_less_than_the_quantized_weight() -> None:
    before = decaying()
    x = torch.randn(4, 40)
    nf4 = gw.passes.quantize.Nf4(block=16)
    plain = nf4(before)(x)
    under = nf4(gw.passes.adapt.Pissa(rank=4)(before))(x)
    wanted = before(x)
    assert float((under - wanted).detach().norm()) < 0.5 * float((plain - wanted).detach().norm())


def test_a_weight_that_others_read_is_left_whole() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + x @ self.fc.weight

    program = gw.trace(Shared().eval(), (torch.randn(2, 6),))
    with pytest.raises(ModelError, match="also read by"):
        gw.passes.adapt.Pissa(rank=2)(program)
    coded = gw.passes.quantize.Rtn(block=16)(decaying())
    with pytest.raises(ModelError, match="codes"):
        gw.passes.adapt.Pissa(rank=2)(coded)
