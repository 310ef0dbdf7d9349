"""Every writing form of an operator becomes the one that gives a new tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.function import Function
from torch import Tensor

import graphwright as gw
from graphwright.ir.canonical.without_writing import functional_form, writing
from graphwright.ir.graph.aliasing import writes

aten = torch.ops.aten
WITHOUT = {
    "add_.t", "copy_.Tensor", "copy_.int", "copy_.float",  # of TorchScript's lists and numbers
    "normal_.default", "rrelu_with_noise_.default",  # random numbers
    "set_.source_Tensor_storage_offset", "requires_grad_.default",
    "polygamma_.default",  # the functional form takes its arguments in another order
    "dropout_.default", "alpha_dropout_.default", "feature_dropout_.default",
    "feature_alpha_dropout_.default",  # taken out of an inference program
    "fill_diagonal_.default",  # torch has no functional form
}  # fmt: skip
"""Overloads without a functional form that takes the same arguments."""


def test_almost_every_operator_that_writes_in_place_has_a_form() -> None:
    # Not `dir(aten)`, which holds only what was read before in this process.
    every = {schema.name for schema in torch._C._jit_get_all_schemas()}
    names = [n.removeprefix("aten::") for n in every if n.startswith("aten::") and n.endswith("_")]
    without = set()
    for name in names:
        packet = None if name.startswith("_") else getattr(aten, name, None)
        for overload in getattr(packet, "overloads", list)():
            found = functional_form(getattr(packet, overload))
            if found is None:
                without.add(f"{name}.{overload}")
            else:
                assert not writing(found)
    assert without == WITHOUT


@pytest.mark.parametrize(
    ("op", "form"),
    [
        (aten.pow_.Scalar, aten.pow.Tensor_Scalar),
        (aten.pow_.Tensor, aten.pow.Tensor_Tensor),
        (aten.float_power_.Scalar, aten.float_power.Tensor_Scalar),
        (aten.floor_divide_.Tensor, aten.floor_divide.default),
        (aten.__ior__.Tensor, aten.__or__.Tensor),
        (aten.transpose_.default, aten.transpose.int),
        (aten.add.out, aten.add.Tensor),
    ],
    ids=str,
)
def test_overloads_are_told_apart_by_what_they_take(op: Any, form: Any) -> None:
    assert functional_form(op) is form


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone().pow_(2),
        lambda x: x.abs().pow_(x),
        lambda x: x.double().float_power_(2),
        lambda x: (x * 9).floor_divide_(2),
        lambda x: (x > 0).__iand__(x < 1),
        lambda x: (x + 1).unsqueeze_(0).transpose_(0, 1).add_(x[:, None]),
        lambda x: (x[:, None] + 1).squeeze_(1).t_(),
        lambda x: torch.add(x, 1, out=torch.empty_like(x)) * 2,
        lambda x: torch.mul(x, x, out=x.clone()).cumsum_(1),
    ],
)
def test_nothing_writes_and_the_values_are_the_models(function: Callable[[Tensor], Any]) -> None:
    net, x = Function(function), torch.rand(4, 3)
    program = gw.trace(net, {"x": x}, dynamic={"x": {0: "n"}})
    assert not any(writes(node) for node in program.graph.nodes)
    for size in (1, 4, 7):
        x = torch.rand(size, 3)
        torch.testing.assert_close(program(x), net(x))
