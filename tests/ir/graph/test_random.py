"""Calls that draw random numbers, told from those that only might."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphwright.ir.graph.random import named, random_nodes

aten = torch.ops.aten

CALLS = [
    (aten.scaled_dot_product_attention.default, 3, (), {}, False),
    (aten.scaled_dot_product_attention.default, 3, (None, 0.0, True), {}, False),
    (aten.scaled_dot_product_attention.default, 3, (None, 0.1), {}, True),
    (aten.scaled_dot_product_attention.default, 3, (), {"dropout_p": 0.1}, True),
    (aten.dropout.default, 1, (0.5, True), {}, True),
    (aten.dropout.default, 1, (0.5, False), {}, False),
    (aten.dropout.default, 1, (0.0, True), {}, False),
    (aten.rrelu_with_noise_functional.default, 2, (0.1, 0.3, False), {}, False),
    (aten.rrelu_with_noise_functional.default, 2, (0.1, 0.3, True), {}, True),
    (aten.rand_like.default, 1, (), {}, True),
    (aten.bernoulli.p, 1, (0.5,), {}, True),
    (aten.relu.default, 1, (), {}, False),
]


@pytest.mark.parametrize(("target", "tensors", "numbers", "named_ones", "is_random"), CALLS)
def test_calls_that_draw(target, tensors, numbers, named_ones, is_random) -> None:
    graph = fx.Graph()
    inputs = tuple(graph.placeholder(f"x{i}") for i in range(tensors))
    node = graph.call_function(target, (*inputs, *numbers), named_ones)
    graph.output((node,))
    assert random_nodes(graph) == ([node] if is_random else [])


def test_they_are_named_with_their_lines() -> None:
    graph = fx.Graph()
    node = graph.call_function(aten.rand.default, ([3],))
    node.meta["custom"] = {"gw": {"source": "net.py:7"}}
    assert named([node]) == "node 'rand_default' (net.py:7) draws"
