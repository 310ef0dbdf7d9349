from __future__ import annotations

import pytest
import torch
from models.adapters import gradients, layers_program, moved
from models.every_pass import UNTIED
from torch import nn

import graphwright as gw

CHAIN = ("text", [("adapt.dora", {"targets": UNTIED, "rank": 2})])

PARTS = ("lora_a", "lora_b", "magnitude")


def test_rows_have_the_trained_lengths_and_the_turned_directions() -> None:
    before = layers_program()
    changed = moved(gw.passes.adapt.Dora(targets=["fc"], rank=2, alpha=3.0)(before))
    a, b, m = (changed.state[f"fc.{part}.default"].detach().double() for part in PARTS)
    whole = before.state["fc.weight"].detach().double() + 1.5 * b @ a
    wanted = m[:, None] * whole / whole.norm(dim=1, keepdim=True)
    merged = gw.passes.adapt.Merge()(changed)
    torch.testing.assert_close(merged.state["fc.weight"].double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged.state["fc.bias"], before.state["fc.bias"])


def test_the_length_counts_as_a_constant_in_the_gradient() -> None:
    changed = moved(gw.passes.adapt.Dora(targets=["fc"], rank=2)(layers_program()))
    inputs = torch.randn(4, 8, 10)
    found = gradients(changed, inputs)
    merged = gw.passes.adapt.Merge()(changed)
    state = {**merged.state, "fc.weight": nn.Parameter(merged.state["fc.weight"].detach())}
    of_weight = gradients(merged.replace(state=state), inputs)["fc.weight"]
    a, b, m = (changed.state[f"fc.{part}.default"].detach() for part in PARTS)
    scale = 8.0 / 2
    whole = changed.state["fc.weight"].detach() + scale * b @ a
    length = whole.norm(dim=1, keepdim=True)
    pulled = m[:, None] / length * of_weight  # equation 11: no term through the length
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found["fc.lora_b.default"], scale * pulled @ a.T, **close)
    torch.testing.assert_close(found["fc.lora_a.default"], scale * b.T @ pulled, **close)
    of_length = (of_weight * whole / length).sum(1)
    torch.testing.assert_close(found["fc.magnitude.default"], of_length, **close)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_dropout_is_before_both_products(dropout: float) -> None:
    changed = moved(gw.passes.adapt.Dora(targets=["fc"], rank=2, dropout=dropout)(layers_program()))
    graph = changed.train().graph
    dropouts = graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    assert [len(node.users) for node in dropouts] == ([2] if dropout else [])


def test_a_grouped_convolution_is_left_with_the_reason() -> None:
    net = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3)).eval()
    program = gw.trace(net, (torch.randn(2, 4, 9),))
    after = gw.passes.adapt.Dora(targets=["*"], rank=2)(program)
    assert {name.partition(".")[0] for name in after.trainable()} == {"1"}
