"""A batch in which every sample names its own adapter, in eager PyTorch and in both backends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.adapters import moved
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.ops.registry import SWITCH
from graphwright.ir.program import Program

SIZE = 32
adapt = gw.passes.adapt


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 64), nn.Linear(64, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def base(model: nn.Module | None = None) -> Program:
    torch.manual_seed(0)
    x = torch.randn(3, 5, SIZE)
    program: Program = gw.trace(
        (model or Net()).eval(), {"x": x}, dynamic={"x": {0: "batch", 1: "tokens"}}
    )
    return program


def single(program: Program, name: str) -> Program:
    """Adapters of different ranks and places."""
    options = {"first": {"rank": 2, "alpha": 3.0}, "second": {"rank": 5, "targets": ["up"]},
               "third": {"rank": 3, "targets": ["down"]}}[name]  # fmt: skip
    kind = adapt.LoraXs if name == "third" else adapt.Lora
    return moved(kind(name=name, **options)(program), len(name))


def stacked(program: Program) -> Program:
    for name in ("first", "second", "third"):
        program = single(program, name)
    return program


def wanted(program: Program, name: str | None, x: Tensor) -> Tensor:
    """What the program with one adapter alone gives; the others are set to zero."""
    state = {
        n: torch.zeros_like(t) if t.is_floating_point() and n.rpartition(".")[2] in NAMES - {name}
        else t for n, t in program.state.items()
    }  # fmt: skip
    return program.replace(state=state)(x).detach()


NAMES = {"first", "second", "third"}
WHICH = torch.tensor([2, -1, 0, 1, 0])
X = torch.randn(5, 7, SIZE, generator=torch.Generator().manual_seed(9))


def check(run: object, program: Program) -> None:
    assert callable(run)
    y = run(x=X, adapter=WHICH).detach()
    names = ["first", "second", "third"]
    for sample, number in enumerate(WHICH.tolist()):
        expected = wanted(program, names[number] if number >= 0 else None, X)[sample]
        torch.testing.assert_close(y[sample], expected, rtol=1e-4, atol=1e-5)


def test_every_sample_goes_through_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = stacked(base())
    alone = [wanted(program, name, X) for name in (None, "first", "second", "third")]
    assert all(not torch.allclose(a, b, rtol=0.05) for a in alone for b in alone if a is not b)
    routed = gw.route_adapters(program)
    assert routed.facts["routed_adapters"] == ["first", "second", "third"]
    assert not set(routed.facts) & {"adapters"}
    check(routed, program)
    compiled = gw.lower(routed, "triton")
    assert compiled.notes["fused"]["routed_low_rank"] == 2
    compiled.save(tmp_path / "triton")
    check(gw.load(tmp_path / "triton"), program)
    check(gw.lower(routed, "onnxruntime"), program)
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv(SWITCH, "triton")
        check(compiled, program)


def test_over_a_base_in_codes() -> None:
    program = gw.passes.quantize.Nf4(block=32)(stacked(base()))
    routed = gw.route_adapters(program)
    check(routed, program)
    assert gw.lower(routed, "triton").notes["fused"] == {"routed_low_rank": 2, "table_linear": 2}


def test_what_cannot_be_routed_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no adapter"):
        gw.route_adapters(base())
    with pytest.raises(ModelError, match="scales the layer too"):
        gw.route_adapters(adapt.Dora(rank=2)(base()))
    with pytest.raises(ModelError, match="residual"):
        gw.route_adapters(adapt.Pissa(rank=2)(base()))
    with pytest.raises(ModelError, match="low-rank form"):
        gw.route_adapters(adapt.Bottleneck(width=4, targets=["down"])(base()))
    x = torch.randn(3, 5, SIZE)
    fixed = gw.trace(Net().eval(), {"x": x})
    with pytest.raises(ArgumentError, match="free batch"):
        gw.route_adapters(adapt.Lora(rank=2)(fixed))


def test_samples_that_are_no_rows_of_their_own_are_refused() -> None:
    class Flat(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    class Mixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean(0) * super().forward(x).mean(0)

    with pytest.raises(ModelError, match="is not the batch"):
        gw.route_adapters(single(base(Flat()), "first"))
    with pytest.raises(ModelError, match="depend on each other"):
        gw.route_adapters(single(base(Mixed()), "first"))
