"""Layers keep their names whichever form their weights are stored in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.layers.selectors import layers, select
from graphwright.passes.registry import find_pass


@pytest.fixture(scope="module")
def program() -> gw.Program:
    """Convolutions with a norm between them, and a classifier."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12),
    )  # fmt: skip
    return gw.trace(net.eval(), (torch.randn(4, 4, 4, 4),), {"input": {0: "batch"}})


CALIBRATION = [(torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(1)),)] * 2

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("quantize.int8", {"activations": "static"}),
    ("quantize.rtn", {"block": 16}),
    ("quantize.nf4", {}),
    ("quantize.fp8", {}),
    ("quantize.udfc", {}),
    ("prune.udfc", {"weight_bits": 6}),
]


@pytest.mark.parametrize(("name", "options"), FORMS, ids=[name for name, _ in FORMS])
def test_layers_keep_their_names(program: gw.Program, name: str, options: dict[str, Any]) -> None:
    before = {layer.name for layer in layers(program)}
    after = find_pass(name)(**options)(program, calibration=CALIBRATION)
    coded = [n for n in after.graph.nodes if "dequantize" in str(n.target)]
    assert coded
    assert {layer.name for layer in layers(after)} == before
    assert [layer.name for layer in select(after, ["3"])] == ["3"]


def test_two_of_four_keeps_names(program: gw.Program) -> None:
    masked = gw.passes.prune.Magnitude(pattern="2:4")(program)
    stored = gw.passes.prune.Compress()(masked)
    assert any("expand_2_4" in str(n.target) for n in stored.graph.nodes)
    assert {layer.name for layer in layers(stored)} == {layer.name for layer in layers(program)}
