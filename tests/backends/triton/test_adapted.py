"""Adapters that are not merged: what the fuser makes of them.

The reference is the program itself, whose adapters are products of their own.
"""

from __future__ import annotations

import pytest
import torch
from models.adapters import moved
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.ops.registry import SWITCH
from graphwright.ir.program import Program

SIZE = 64
adapt = gw.passes.adapt


class Block(nn.Module):
    """A feed-forward block with a residual, and a layer in front that nothing is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 128, bias=False)
        self.down = nn.Linear(128, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    x = torch.randn(3, 5, SIZE)
    return gw.trace(Block().eval(), {"x": x}, dynamic={"x": {0: "batch", 1: "seq"}})


def with_adapter(program: Program, seed: int = 1, **options: object) -> Program:
    return moved(adapt.Lora(rank=4, alpha=6.0, **options)(program), seed)


def check(program: Program, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Lowers, compares eagerly and with the kernels, and returns the counts of fused calls."""
    compiled = gw.lower(program, "triton")
    x = torch.randn(2, 7, SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = program(x)
        assert float((compiled(x) - wanted).norm() / wanted.norm()) <= 1e-6
        if not torch.cuda.is_available():
            pytest.importorskip("triton")
            monkeypatch.setenv(SWITCH, "triton")
            assert float((compiled(x) - wanted).norm() / wanted.norm()) <= 2e-6
    return dict(compiled.notes["fused"])


def test_a_float_layer_takes_its_adapter_the_activation_and_the_residual(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = with_adapter(program)
    assert not torch.allclose(adapted(program.examples[0]), program(program.examples[0]), rtol=0.05)
    assert check(adapted, monkeypatch) == {"adapted_linear": 3}
    fused = gw.lower(adapted, "triton").program.graph
    calls = [n for n in fused.nodes if n.op == "call_function"]
    # one product to the rank and its scale in front of each; sums and the activation are inside
    assert sorted(n.target._schema.name.split("::")[1] for n in calls) == sorted(
        ["linear", "mul", "adapted_linear"] * 3
    )


@pytest.mark.parametrize("form", ["blocks", "table"])
def test_a_layer_in_codes_takes_it_into_its_epilogue(
    program: Program, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = gw.passes.quantize
    make = quantize.Rtn(bits=4, block=32) if form == "blocks" else quantize.Nf4(block=64)
    fused = check(with_adapter(make(program)), monkeypatch)
    assert fused == {f"{form}_linear": 3}


def test_a_second_adapter_and_a_correction_of_the_weight_join(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [(torch.randn(8, 5, SIZE, generator=torch.Generator().manual_seed(i)),) for i in (1, 2)]
    coded = gw.passes.quantize.Rtn(bits=4, block=32)(program)
    coded = gw.passes.compensate.Eora(rank=3)(coded, calibration=data, teacher=program)
    two = with_adapter(with_adapter(coded), 2, name="second")
    assert check(two, monkeypatch) == {"blocks_linear": 3}
    both = with_adapter(with_adapter(program), 2, name="second")
    assert check(both, monkeypatch) == {"adapted_linear": 3}


def test_what_is_no_adapter_stays(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sum(nn.Module):
        """Two layers of one size, and a layer in int8."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x)

    torch.manual_seed(0)
    x = torch.randn(2, 7, SIZE)
    plain = gw.trace(Sum().eval(), {"x": x}, dynamic={"x": {0: "batch", 1: "seq"}})
    assert check(plain, monkeypatch) == {}
    coded = gw.passes.quantize.Int8()(program)
    monkeypatch.setenv(SWITCH, "")
    assert "adapted_linear" not in check(with_adapter(coded), monkeypatch)
