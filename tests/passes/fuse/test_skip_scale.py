from __future__ import annotations

import pytest
import torch
from models.every_pass import UpNet
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.fuse import SkipScale
from graphwright.passes.fuse.skip_scale import depth_scales, noise_scale

CHAIN = ("unet", [("fuse.skip_scale", {"rho": 0.7})])


class Deep(nn.Module):
    """Three long skips and a residual sum; `factors` multiplies the skips, deepest first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mid = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, 2, 1) for _ in range(2))
        self.merge = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))
        self.out = nn.Conv2d(4, 2, 1)
        self.factors = [1.0, 1.0, 1.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [torch.relu(self.enter(x))]
        for down in self.down:
            kept.append(torch.relu(down(kept[-1])))
        y = kept[-1] + torch.relu(self.mid(kept[-1]))
        for n, merge in enumerate(self.merge):
            y = torch.relu(merge(torch.cat([y, self.factors[n] * kept.pop()], 1)))
            if kept:
                y = nn.functional.interpolate(y, scale_factor=2.0)
        return self.out(y)


def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Deep().eval(), (torch.randn(2, 2, 8, 8),), {"x": {0: "batch"}})


def reference(factors: list[float], x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    model = Deep().eval()
    model.factors = factors
    return model(x)


X = torch.randn(3, 2, 8, 8)


def test_each_skip_gets_its_factor_the_deepest_the_smallest() -> None:
    result = SkipScale(rho=0.5).execute(program(), Context())
    assert [a.what for a in result.actions[:2]] == ["times 0.5", "times 0.75"]
    assert result.actions[2].reason == "its factor is 1"
    assert result.metrics["skips"] == 3
    # the same operations in the same order
    assert torch.equal(result.program(X), reference([0.5, 0.75, 1.0], X))


def test_factors_of_one_change_nothing_and_of_zero_drop_the_skips() -> None:
    given = program()
    assert SkipScale(rho=1.0).execute(given, Context()).program.graph is given.graph
    without = SkipScale(rho=0.0, rho_top=0.0)(given)
    assert torch.allclose(without(X), reference([0.0, 0.0, 0.0], X))


def test_one_artifact_serves_any_factors() -> None:
    open_ = SkipScale(rho=1.0, as_input=True)(program())
    assert torch.equal(open_(X), program()(X))  # left out, the default holds
    compiled = gw.lower(open_, "onnxruntime")
    assert torch.allclose(compiled(X), program()(X), atol=1e-6)  # float32, other sums
    for factors in ([1.0, 1.0, 1.0], [0.5, 0.75, 1.0], [0.2, 0.9, 0.4]):
        rho = torch.tensor(factors)
        expected = reference(factors, X)
        assert torch.equal(open_(X, rho), expected)
        assert torch.allclose(compiled(X, rho), expected, atol=1e-6)  # float32, other sums


def test_saved_and_quantized_with_its_input(tmp_path) -> None:  # type: ignore[no-untyped-def]
    open_ = SkipScale(rho=0.6, as_input=True)(program())
    small = gw.passes.quantize.Rtn(block=16)(open_)
    small.save(tmp_path / "m.pt2")
    again = gw.load(tmp_path / "m.pt2")
    rho = torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(again(X, rho), small(X, rho))
    assert torch.equal(again(X), small(X, torch.tensor([0.6, 0.8, 1.0])))


def test_other_readers_of_a_skip_see_it_unscaled() -> None:
    class Shown(UpNet):
        def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def,override]
            first = torch.relu(self.first(x))
            up = self.up(torch.relu(self.down(first)))
            return self.last(torch.relu(self.merge(torch.cat([up, first], 1)))), first

    given = gw.trace(Shown().eval(), (torch.randn(2, 2, 8, 8),))
    scaled = SkipScale(rho=0.5)(given)
    x = torch.randn(2, 2, 8, 8)
    assert torch.equal(scaled(x)[1], given(x)[1])
    assert not torch.allclose(scaled(x)[0], given(x)[0])


def test_nets_without_long_skips_are_refused() -> None:
    plain = gw.trace(nn.Sequential(nn.Conv2d(2, 2, 1)).eval(), (torch.randn(1, 2, 4, 4),))
    with pytest.raises(ModelError, match="no skips from an encoder to a decoder"):
        SkipScale(rho=0.5).execute(plain, Context())


def test_added_skips_are_asked_for() -> None:
    class Added(UpNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = torch.relu(self.first(x))
            return self.last(first + self.up(torch.relu(self.down(first))))

    given = gw.trace(Added().eval(), (torch.randn(2, 2, 8, 8),))
    with pytest.raises(ModelError, match="1 long skips are added"):
        SkipScale(rho=0.5).execute(given, Context())
    scaled = SkipScale(rho=0.5, additive=True).execute(given, Context()).program
    assert [op_name(n) for n in scaled.graph.nodes].count("mul") == 1


def test_schedules() -> None:
    assert depth_scales(3, 0.5) == (0.5, 0.75, 1.0)
    assert depth_scales(1, 0.5) == (0.5,)
    low, high = (0.1, 0.4), (10.0, 1.0)
    for schedule in ("linear", "inverse"):
        ends = [noise_scale(s, low, high, schedule) for s in (0.01, 0.1, 10.0, 80.0)]
        assert ends == pytest.approx([0.4, 0.4, 1.0, 1.0])
    assert noise_scale(5.05, low, high) == pytest.approx(0.7)  # halfway in sigma
    assert noise_scale(2 / 10.1, low, high, "inverse") == pytest.approx(0.7)  # in 1 / sigma
    with pytest.raises(ArgumentError, match="have to be positive"):
        noise_scale(1.0, (2.0, 0.5), (1.0, 1.0))
