from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.passes.reparameterize import Norms

CHAIN = ("gated", [("reparameterize.norms", {})])


class Block(nn.Module):
    """A norm before three layers, one before two, and one that a sum reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8)
        for norm in (self.one, self.two, self.three):
            nn.init.normal_(norm.weight)
        nn.init.normal_(self.one.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.one(x)
        y = self.two(torch.tanh(self.a(h)) * self.b(h))
        z = self.three(self.c(y))
        return z + self.d(z)


def test_factors_go_into_the_layers() -> None:
    x = torch.randn(2, 5, 8).double()
    given = gw.trace(Block().double().eval(), (x,), {"x": {0: "b", 1: "n"}})
    result = Norms().execute(given, Context())
    assert measure(given, result.program).relative < 1e-12  # float64: rounding alone
    names = set(result.program.state)
    assert not names & {"one.weight", "one.bias", "two.weight"}
    assert {"b.bias", "three.weight"} <= names
    assert [(a.layer, a.what) for a in result.actions] == [
        ("one", "factors moved into a, b"),
        ("two", "factors moved into c"),
        ("three", "left alone"),
    ]


def test_norms_of_weights_are_stored() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
    ).eval()
    given = gw.trace(model.double(), (torch.randn(4, 8).double(),))
    result = Norms().execute(given, Context())
    assert measure(given, result.program).relative < 1e-12
    calls = [n for n in result.program.graph.nodes if n.op == "call_function"]
    assert len(calls) == 3  # linear, ReLU, linear
    assert [a.what for a in result.actions[:2]] == ["weight stored", "weight stored"]


def test_both_backends_run_norms_without_factors() -> None:
    x = torch.randn(2, 5, 8)
    given = gw.trace(Block().eval(), (x,), {"x": {0: "b", 1: "n"}})
    plain = Norms()(given)
    for backend in ("onnxruntime", "triton"):
        compiled = gw.lower(plain, backend)
        assert torch.allclose(compiled(x), given(x), atol=1e-4)  # float32 through three norms


def test_a_norm_that_an_adapter_reads_stays() -> None:
    """Its shift would be a bias in the middle of the adapter."""
    x = torch.randn(2, 5, 8)
    given = gw.trace(Block().eval(), (x,), {"x": {0: "b", 1: "n"}})
    adapted = gw.passes.adapt.Lora(rank=2, targets=["a"])(given)
    result = Norms().execute(adapted, Context())
    said = {action.layer: action for action in result.actions}
    assert "adapt.merge" in said["one"].reason
    assert said["two"].changed
    assert measure(adapted, result.program).relative < 1e-6
