from __future__ import annotations

import torch
from models.adapters import moved
from models.every_pass import UNTIED
from torch import nn

import graphwright as gw

CHAIN = ("text", [("adapt.ia3", {"targets": UNTIED})])


def program() -> gw.Program:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(4, 6, 3, groups=2, padding=1), nn.Flatten(), nn.Linear(30, 7), nn.Linear(7, 2)
    )
    return gw.trace(net.eval(), (torch.randn(2, 4, 5),))


def test_outputs_take_the_bias_along_and_inputs_do_not() -> None:
    before = program()
    made = gw.passes.adapt.Ia3(targets=["2", "3"], feedforward=["3"])(before)
    changed = moved(made)
    out, inner = (changed.state[f"{n}.default"].detach() for n in ("2.ia3_out", "3.ia3_in"))
    merged = gw.passes.adapt.Merge()(changed)
    torch.testing.assert_close(merged.state["2.weight"], out[:, None] * before.state["2.weight"])
    torch.testing.assert_close(merged.state["2.bias"], out * before.state["2.bias"])
    torch.testing.assert_close(merged.state["3.weight"], before.state["3.weight"] * inner)
    assert torch.equal(merged.state["3.bias"], before.state["3.bias"])
    assert sum(p.numel() for p in made.trainable().values()) == 7 + 7


def test_inputs_of_a_grouped_convolution_are_scaled_channel_by_channel() -> None:
    before = program()
    changed = moved(gw.passes.adapt.Ia3(targets=["0"], feedforward=["0"])(before))
    factors = changed.state["0.ia3_in.default"].detach()
    assert factors.shape == (4,)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(changed(x), before(x * factors[:, None]))
    torch.testing.assert_close(gw.passes.adapt.Merge()(changed)(x), changed(x))
