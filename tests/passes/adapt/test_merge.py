from __future__ import annotations

import pytest
import torch
from models.adapters import layers_program, moved
from models.every_pass import UNTIED
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ContractError, ModelError

CHAIN = ("text", [("adapt.lora", {"rank": 2, "targets": UNTIED}), ("adapt.merge", {})])


def test_a_change_that_rounding_swallows_is_an_error_and_not_a_merge() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16).eval()
    program = gw.trace(net, (torch.randn(2, 32, dtype=torch.bfloat16),))
    adapted = gw.passes.adapt.Lora(targets=["*"], rank=2)(program)
    small = moved(adapted, size=1e-3)
    with pytest.raises(ContractError, match=r"loses .*% of what the adapter changes in '0'"):
        gw.passes.adapt.Merge()(small)
    gw.passes.adapt.Merge(max_lost=2.0)(small, check=False)
    wide = gw.passes.cast.Dtype(to="float32")(small)
    merged = gw.passes.adapt.Merge()(wide)
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    torch.testing.assert_close(merged(x), wide(x), rtol=1e-5, atol=1e-5)


def test_names_that_match_nothing_are_refused_with_those_there_are() -> None:
    adapted = gw.passes.adapt.Lora(targets=["fc"], rank=2, name="mine")(layers_program())
    with pytest.raises(ArgumentError, match="match no adapter") as caught:
        gw.passes.adapt.Merge(names=["default"])(adapted)
    assert "'mine'" in str(caught.value.fix)


def test_a_quantized_weight_takes_no_adapter_in() -> None:
    adapted = moved(gw.passes.adapt.Lora(targets=["fc"], rank=2)(layers_program()))
    coded = gw.passes.quantize.Nf4(block=16, targets=["fc"])(adapted)
    with pytest.raises(ModelError, match="rebuilt from codes"):
        gw.passes.adapt.Merge()(coded)
