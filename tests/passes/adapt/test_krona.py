from __future__ import annotations

import pytest
import torch
from models.every_pass import UNTIED
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.passes.adapt.krona import product

CHAIN = ("text", [("adapt.krona", {"targets": UNTIED, "factor_out": 4})])


def test_the_product_is_that_of_kronecker_and_never_formed() -> None:
    torch.manual_seed(0)
    program = gw.trace(nn.Sequential(nn.Linear(15, 14)).eval(), (torch.randn(4, 15),))
    after = gw.passes.adapt.Krona(factor_out=2, factor_in=5)(program)
    a, b = torch.randn(2, 5), torch.randn(7, 3)
    state = {**after.state, "0.krona_a.default": a, "0.krona_b.default": b}
    x = torch.randn(4, 15)
    wanted = program(x) + x @ torch.kron(a, b).T
    torch.testing.assert_close(after.replace(state=state)(x), wanted, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in after.trainable().values()) == 2 * 5 + 7 * 3
    shapes = {tuple(n.meta["val"].shape) for n in after.graph.nodes if n.op == "call_function"}
    assert (14, 15) not in shapes


def test_the_published_codes_order_is_the_rows_interleaved() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5), torch.randn(7, 3)
    wanted = torch.kron(a, b).reshape(2, 7, 15).transpose(0, 1).reshape(14, 15)
    torch.testing.assert_close(product(a, b, "interleaved"), wanted)
    x = torch.randn(4, 15)
    # the code's own views: inputs (a2, b2), outputs (b1, a1)
    literal = ((x.reshape(4, 5, 3) @ b.T).transpose(1, 2) @ a.T).reshape(4, 14)
    torch.testing.assert_close(x @ wanted.T, literal, rtol=1e-5, atol=1e-5)


def test_a_factor_that_does_not_divide_is_refused_with_those_that_do() -> None:
    program = gw.trace(nn.Sequential(nn.Linear(15, 14)).eval(), (torch.randn(4, 15),))
    with pytest.raises(ModelError, match="factor_out 4 does not divide the 14 outputs") as caught:
        gw.passes.adapt.Krona(factor_out=4, factor_in=5)(program)
    assert "1, 2, 7, 14" in str(caught.value.fix)
