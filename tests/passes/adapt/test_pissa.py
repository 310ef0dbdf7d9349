from __future__ import annotations

import pytest
import torch
from models.every_pass import UNTIED
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError

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


def as_matrix(program: gw.Program) -> torch.Tensor:
    """What the layer and its branch multiply with (out, columns)."""
    rows = [program(rows) - program(torch.zeros(4, 40)) for rows in torch.eye(40).split(4)]
    return torch.cat(rows).detach().t()


def rounded_error(before: gw.Program, rounds: int) -> float:
    """||W - (D + b a)|| with the residual rounded by the pass behind."""
    options = {} if rounds == 1 else {"quantized": {"rounds": rounds, "block": 16}}
    made = gw.passes.adapt.Pissa(rank=4, **options)(before)
    whole = as_matrix(gw.passes.quantize.Nf4(block=16)(made))
    return float((whole - before.state["0.weight"].detach()).norm())


def test_rounds_fit_the_branch_and_the_rounding_to_each_other() -> None:
    """QPiSSA against the loop in plain torch, with bitsandbytes' levels looked up by distance."""
    from graphwright.ir.stored.table import levels

    before = decaying()
    made = gw.passes.adapt.Pissa(
        rank=4, quantized={"rounds": 3, "block": 16, "double_quantization": False}
    )(before)
    torch.testing.assert_close(as_matrix(made), as_matrix(before), rtol=0, atol=1e-6)
    weight = before.state["0.weight"].detach().double()
    level = levels("nf4").double()
    rest = weight
    for _ in range(3):
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        change = (u[:, :4] * s[:4]) @ vh[:4]
        blocks = (weight - change).reshape(-1, 16)
        size = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks / size)[..., None].sub(level).abs().argmin(-1)
        stored = (level[nearest] * size).reshape(weight.shape)
        rest = weight - stored
    a, b = (made.state[f"0.lora_{x}.default"].detach().double() for x in "ab")
    torch.testing.assert_close(b @ a, change, rtol=0, atol=1e-5)
    coded = gw.passes.quantize.Nf4(block=16, double_quantization=False)(made)
    torch.testing.assert_close(as_matrix(coded).double() - b @ a, stored, rtol=0, atol=1e-5)
    plain = gw.passes.quantize.Nf4(block=16)(before)
    alone = float((as_matrix(plain) - weight.float()).norm())
    assert rounded_error(before, 5) < rounded_error(before, 1) < alone


def test_more_rounds_rarely_lose_more() -> None:
    from graphwright.passes.adapt.pissa import Pissa

    better = 0
    for seed in range(10):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(40, 24)).eval()
        before = gw.trace(net, (torch.randn(4, 40),))
        errors = [rounded_error(before, rounds) for rounds in (1, 2, 5)]
        better += errors[0] >= errors[1] >= errors[2]
    assert better >= 9
    with pytest.raises(ArgumentError, match="do not go together"):
        Pissa(rank=2, outputs=["q"], quantized={})


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
