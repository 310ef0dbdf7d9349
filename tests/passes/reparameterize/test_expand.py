from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.passes.registry import find_pass
from graphwright.passes.reparameterize import Expand

CHAIN = ("conv", [("reparameterize.expand", {})])

BRANCHES = {"repvgg": 3, "mobileone": 6, "acnet": 3, "dbb": 4}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False),
    ).eval().double()  # fmt: skip


@pytest.mark.parametrize("statistics", ["unit", "measured"])
@pytest.mark.parametrize("form", BRANCHES)
def test_the_same_at_the_start_and_folded_again(form: str, statistics: str) -> None:
    x = torch.randn(6, 4, 8, 8, dtype=torch.float64)
    program = gw.trace(net(), (x,), {"input": {0: "batch", 2: "h", 3: "w"}})
    context = Context(calibration=[{"input": x}])
    result = Expand(form=form, statistics=statistics).execute(program, context)
    wide = result.program
    assert result.actions[0].what == f"{BRANCHES[form]} branches"
    assert measure(program, wide).relative < 1e-10  # float64: rounding alone
    assert len(wide.trainable()) > len(program.trainable())

    folded = find_pass(f"reparameterize.{form}")().execute(wide, Context()).program
    assert measure(program, folded).relative < 1e-10
    names = [str(n.target) for n in folded.graph.nodes if n.op == "call_function"]
    assert [n.split(".")[1] for n in names if "sym_size" not in n] == [
        "conv2d", "relu", "conv2d", "relu", "conv2d",
    ]  # fmt: skip


def test_measured_statistics_hold_in_training_mode() -> None:
    """A norm by the batch's own statistics is then the norm by the running ones."""
    x = torch.randn(16, 4, 8, 8, dtype=torch.float64)
    program = gw.trace(net(), (x,), {"input": {0: "batch"}})
    apart = {}
    for statistics in ("unit", "measured"):
        wide = Expand(statistics=statistics).execute(program, Context(calibration=[{"input": x}]))
        y, own = wide.program.train()(x).detach(), program(x).detach()
        apart[statistics] = float((y - own).norm() / own.norm())
    assert apart["measured"] < 1e-4  # eps alone
    assert apart["unit"] > 0.1


def test_copies_are_not_equal() -> None:
    program = gw.trace(net(), (torch.randn(2, 4, 8, 8, dtype=torch.float64),))
    wide = Expand(form="mobileone", copies=2).execute(program, Context()).program
    one, two = (wide.state[f"0.branch{n}.weight"] for n in range(2))
    assert not torch.allclose(one, two)


def test_what_has_no_branches_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=3))
    program = gw.trace(model.eval(), (torch.randn(2, 3, 5, 5),))
    reasons = [action.reason for action in Expand().execute(program, Context()).actions]
    assert reasons == [
        "a 1x1 kernel has no smaller one",
        "no tap of its kernel reads the result's own place",
    ]
