"""What adapters compute from stored tensors is computed at lowering, and codes stay packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.adapters import layers_program, moved

import graphwright as gw
from graphwright.ir.adapters.record import adapters
from graphwright.ir.graph.constants import constant_nodes
from graphwright.ir.graph.nodes import adapter_of

FC = ["fc"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Dora", {"rank": 2}),
        ("Lora", {"rank": 2, "outputs": ["0:4", "8:12"]}),
        ("Mosa", {"width": 4}),
        ("Sara", {"share": 0.2}),
    ],
)
def test_nothing_of_an_adapter_is_computed_twice(name: str, options: dict[str, Any]) -> None:
    made = moved(getattr(gw.passes.adapt, name)(targets=FC, **options)(layers_program()))
    lowered = gw.lower(made, "triton").program
    constant = constant_nodes(lowered.graph)
    assert not [n for n in constant if n.op == "call_function" and adapter_of(n)]
    assert not adapters(lowered)
    x = torch.randn(5, 8, 10)
    torch.testing.assert_close(gw.lower(made, "triton")(x), made(x).detach())


def test_a_plain_adapter_and_codes_stay_as_they_are() -> None:
    coded = gw.passes.quantize.Nf4(block=16, targets=FC)(layers_program())
    for name, has_record in (("Lora", True), ("Dora", False)):
        made = moved(getattr(gw.passes.adapt, name)(targets=FC, rank=2)(coded))
        lowered = gw.lower(made, "triton").program
        assert bool(adapters(lowered)) == has_record
        assert "fc.weight_codes" in lowered.state
        x = torch.randn(5, 8, 10)
        torch.testing.assert_close(gw.lower(made, "triton")(x), made(x).detach(),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
