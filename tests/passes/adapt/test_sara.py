from __future__ import annotations

from typing import Any

import pytest
import torch
from models.adapters import check_merge, gradients, layers_program
from models.every_pass import UNTIED
from models.tune_net import fresh, images, table, traced
from torch import nn

import graphwright as gw
from graphwright.ir.adapters.record import adapters
from graphwright.ir.graph.nodes import copy_graph
from graphwright.passes.adapt._math.entries import entries_linear, with_entries
from graphwright.passes.adapt.sara import nuclear_gradient, smallest

CHAIN = ("text", [("adapt.sara", {"targets": UNTIED})])


def test_the_smallest_entries_alone_are_trained_and_start_with_their_signs() -> None:
    before = layers_program()
    made = gw.passes.adapt.Sara(targets=["fc", "plain", "turned"], threshold=0.1)(before)
    x = torch.randn(4, 8, 10)
    assert torch.equal(made(x), before(x))
    for layer in ("fc.weight", "plain.weight", "turned"):
        weight = before.state[layer].detach().flatten()
        small = (weight.abs() < 0.1).nonzero().flatten()
        own = f"{layer.removesuffix('.weight')}{'_' if layer == 'turned' else '.'}"
        values = made.state[f"{own}values.default"]
        assert torch.equal(made.state[f"{own}places.default"], small)
        assert torch.equal(values.detach(), weight[small])
    assert all("values" in name for name in made.trainable())
    assert set(gradients(made, x)) == set(made.trainable())
    merged = check_merge(before, made, x)
    weight, then = (p.state["fc.weight"].detach() for p in (merged, before))
    assert torch.equal((weight != then), then.abs() < 0.1)


def test_a_share_takes_the_same_number_everywhere() -> None:
    weight = torch.randn(7, 9)
    places = smallest(weight, 1.0, 0.2)
    assert len(places) == round(0.2 * 63)
    rest = torch.ones(63, dtype=torch.bool)
    rest[places] = False
    assert weight.flatten()[places].abs().max() < weight.flatten()[rest].abs().min()


def test_the_penaltys_gradient_is_that_of_the_nuclear_norm() -> None:
    torch.manual_seed(0)
    places = torch.randperm(80)[:60].sort().values
    values = torch.randn(60, dtype=torch.float64, requires_grad=True)
    norm = torch.linalg.matrix_norm(
        torch.zeros(80, dtype=torch.float64).index_put((places,), values).reshape(8, 10), "nuc"
    )
    (wanted,) = torch.autograd.grad(norm, values)
    found = nuclear_gradient(values.detach(), places, (8, 10))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_entries_that_have_grown_stay_from_the_middle_on() -> None:
    before = traced(fresh(), 4, 1, 4, 4)
    x, labels = images(48)
    data = table(before.signature, x, labels, 16)
    made = gw.passes.adapt.Sara(targets=["fc"], threshold=0.05, nuclear=0.0)(before)
    tune = {"steps": 20, "lr": 0.02, "schedule": "constant", "optimizer": "adam"}
    name = "fc.values.default"
    free = gw.passes.adapt.Sara(targets=["fc"], threshold=0.05, nuclear=0.0, reselect=None)(before)
    middle = gw.passes.tune.Finetune(tune={**tune, "steps": 10})(free, training=data)
    after = gw.passes.tune.Finetune(tune=tune)(made, training=data)
    free = gw.passes.tune.Finetune(tune=tune)(free, training=data)
    grown = middle.state[name].detach().abs() > 0.05
    assert 0.1 < float(grown.float().mean()) < 0.9
    moved = (after.state[name] - middle.state[name]).detach().abs()
    assert float(moved[grown].max()) < 1e-6
    assert float(moved[~grown].max()) > 1e-3
    assert float((free.state[name] - middle.state[name]).detach().abs()[grown].max()) > 1e-3
    assert isinstance(after.state[name], nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_keep_no_second_weight_and_have_the_same_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 48, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(40, 48, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    places = torch.randperm(weight.numel())[:70].sort().values
    values = torch.randn(70, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            kept.append(tensor.shape)
        return tensor

    def gradients_of(function: Any) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = function()
        return torch.autograd.grad(y.double().square().sum(), (x, values))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        entries_linear(x, weight, places, values, bias)
    assert weight.shape not in kept
    ours = gradients_of(lambda: entries_linear(x, weight, places, values, bias))
    wanted = gradients_of(
        lambda: nn.functional.linear(x, with_entries(weight, places, values), bias)
    )
    for one, other in zip(ours, wanted, strict=True):
        assert one.dtype == torch.float64
        assert (one - other).norm() <= (1e-12 if dtype == torch.float64 else 0.02) * other.norm()


def test_training_uses_them() -> None:
    made = gw.passes.adapt.Sara(targets=["fc"], threshold=0.05)(traced(fresh(), 4, 1, 4, 4))
    (hook,) = gw.passes.adapt.Sara.hooks(made, adapters(made)["default"])
    graph = copy_graph(made.graph)
    hook.on_graph(graph)
    targets = [node.target for node in graph.nodes]
    assert targets.count(entries_linear) == 1
    assert torch.ops.aten.index_put.default not in targets
