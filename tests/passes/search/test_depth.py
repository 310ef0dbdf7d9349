from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.passes.base import Result

SMALL = {"offspring": 8, "survivors": [2, 1], "tokens": [16, 64]}
CHAIN = ("trunk", [("search.depth", {"measure": "mse", **SMALL})])

IDLE = {"attention": (1, 4), "mlp": (0, 3)}
"""Branches of hardly any weight."""


class Attention(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.qkv, self.out, self.size = nn.Linear(8, 24), nn.Linear(8, 8), size

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.layer_norm(x, (8,))).chunk(3, -1)
        return self.size * self.out(F.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.up, self.down, self.size = nn.Linear(8, 16), nn.Linear(16, 8), size

    def forward(self, x: Tensor) -> Tensor:
        return self.size * self.down(F.gelu(self.up(F.layer_norm(x, (8,)))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {
            kind: [0.001 if i in idle else 1.0 for i in range(5)] for kind, idle in IDLE.items()
        }
        self.attention = nn.ModuleList(Attention(s) for s in sizes["attention"])
        self.mlp = nn.ModuleList(Mlp(s) for s in sizes["mlp"])
        self.head = nn.Linear(8, 12)
        self.gone: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(5):
            if f"attention.{i}" not in self.gone:
                x = x + self.attention[i](x)
            if f"mlp.{i}" not in self.gone:
                x = x + self.mlp[i](x)
        return self.head(x)


@cache
def net() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


@cache
def program() -> gw.Program:
    return gw.trace(net(), {"x": torch.randn(2, 6, 8)}, dynamic={"x": {0: "batch", 1: "time"}})


@cache
def data() -> tuple[tuple[Tensor], ...]:
    torch.manual_seed(1)
    return tuple((torch.randn(3, 6, 8),) for _ in range(6))


@cache
def searched() -> Result:
    step = gw.passes.search.Depth(target=0.4, **SMALL)
    return step.run(program(), Context(calibration=list(data()), seed=2))


def test_branches_that_do_nothing_go_of_each_kind_as_many_as_asked() -> None:
    gone = {a.layer for a in searched().actions if a.what == "removed"}
    assert gone == {
        f"attention branch attention.{i}.qkv to attention.{i}.out" for i in IDLE["attention"]
    } | {f"mlp branch mlp.{i}.up to mlp.{i}.down" for i in IDLE["mlp"]}
    assert searched().metrics["branches"] == 10
    assert searched().metrics["removed"] == 4


def test_the_result_is_the_model_with_those_branches_deleted() -> None:
    without = Decoder().eval()
    without.load_state_dict(net().state_dict())
    without.gone = {f"{kind}.{i}" for kind, idle in IDLE.items() for i in idle}
    found, x = searched().program, torch.randn(2, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(found(x), without(x), rtol=1e-5, atol=1e-5)
    wanted = gw.trace(without, {"x": torch.randn(2, 6, 8)}, dynamic={"x": {0: "batch", 1: "time"}})
    assert len(list(found.graph.nodes)) == len(list(wanted.graph.nodes))
    left = {name.rsplit(".", 1)[0] for name in found.state}
    assert not [name for name in left for gone in without.gone if name.startswith(gone)]


def test_the_distance_is_that_of_the_result() -> None:
    x = torch.cat([batch[0] for batch in data()])
    with torch.no_grad():
        p, q = (torch.softmax(made(x).double(), -1) for made in (program(), searched().program))
    wanted = float((p * (p / q).log()).sum(-1).mean())
    assert searched().metrics["distance"] == pytest.approx(wanted, rel=1e-2, abs=1e-9)


def test_neighbours_may_both_go() -> None:
    step = gw.passes.search.Depth(target=0.9, **SMALL)
    result = step.run(program(), Context(calibration=list(data())))
    assert result.metrics["removed"] == 8
    removed = {a.layer.split()[2].rsplit(".", 1)[0] for a in result.actions if a.what == "removed"}
    without = Decoder().eval()
    without.load_state_dict(net().state_dict())
    without.gone = removed
    x = torch.randn(2, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(result.program(x), without(x), rtol=1e-5, atol=1e-5)


def test_nothing_to_remove_is_refused() -> None:
    with pytest.raises(ModelError, match="of 10 branches is none"):
        gw.passes.search.Depth(target=0.05)(program(), calibration=list(data()))
    with pytest.raises(ModelError, match="no skip that is added"):
        gw.passes.search.Depth(targets=["head"])(program(), calibration=list(data()))
