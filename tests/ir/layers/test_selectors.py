from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.selectors import layers, select


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.block = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for layer in self.block:
            h = layer(h).relu()
        return self.head(self.norm(h))


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return gw.trace(Net(), (torch.randint(0, 10, (2, 5)),), dynamic={"ids": {0: "n"}})


def test_every_layer_has_its_name_and_kind(program: gw.Program) -> None:
    assert [(layer.name, layer.kind) for layer in layers(program)] == [
        ("embed", "embedding"),
        ("block.0", "linear"),
        ("block.1", "linear"),
        ("block.2", "linear"),
        ("norm", "layer_norm"),
        ("head", "linear"),
    ]


def test_a_use_of_a_tied_weight_has_the_name_of_its_own_module(program: gw.Program) -> None:
    (head,) = select(program, ["head"], kinds=("linear",))
    assert head.name == "head"
    assert head.weight == "embed.weight"
    assert head.names == ("head",)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["*"], {"block.0", "block.1", "block.2", "head"}),
        (["block.*", "!block.1"], {"block.0", "block.2"}),
        (["kind:linear"], {"block.0", "block.1", "block.2", "head"}),
        (["block.[02]"], {"block.0", "block.2"}),
    ],
)
def test_patterns(program: gw.Program, targets: list[str], expected: set[str]) -> None:
    assert {layer.name for layer in select(program, targets, kinds=("linear",))} == expected


def test_a_pattern_that_matches_nothing_names_near_misses(program: gw.Program) -> None:
    with pytest.raises(ModelError) as caught:
        select(program, ["blocks.0"])
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("selector 'blocks.0' matches no layer. Did you mean one of")
    assert "'block.0'" in str(caught.value)


def test_an_exclusion_that_matches_nothing_is_an_error_too(program: gw.Program) -> None:
    with pytest.raises(ModelError, match="'!hed' matches no layer"):
        select(program, ["*", "!hed"])


def test_only_exclusions_are_refused(program: gw.Program) -> None:
    with pytest.raises(ModelError, match=r"only exclude\. Put"):
        select(program, ["!head"])


def test_selecting_only_other_kinds_is_an_error(program: gw.Program) -> None:
    with pytest.raises(ModelError, match="select no layer of kind conv2d"):
        select(program, ["*"], kinds=("conv2d",))
