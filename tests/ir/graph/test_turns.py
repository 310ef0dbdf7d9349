"""Weights in codes are rebuilt where they are first read, one at a time."""

from __future__ import annotations

import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.together import run_together
from graphwright.ir.graph.turns import in_turn


def quantized(layers: int = 4) -> gw.Program:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers))).eval()
    program = gw.trace(model, (torch.randn(2, 64),))
    return gw.passes.quantize.Rtn(bits=4, block=32)(program)


def most_alive(order: list[torch.fx.Node]) -> int:
    """Rebuilt weights that are held at a time when the nodes run in this order."""
    places = {node: at for at, node in enumerate(order)}
    spans = [
        (places[node], max(places[user] for user in node.users))
        for node in order
        if "dequantize_blocks" in str(node.target)
    ]
    return max(sum(begin <= at < end for begin, end in spans) for at in range(len(order)))


def test_one_weight_at_a_time() -> None:
    program = quantized()
    order = in_turn(program.graph)
    assert most_alive(list(program.graph.nodes)) == 4  # as the pass puts them
    assert most_alive(order) == most_alive(list(program.running.graph.nodes)) == 1
    assert sorted(n.name for n in order) == sorted(n.name for n in program.graph.nodes)
    seen: set[torch.fx.Node] = set()
    for node in order:
        assert seen.issuperset(node.all_input_nodes)
        seen.add(node)


def test_the_values_are_those_of_the_graph() -> None:
    program = quantized()
    plain = program.module(*program.examples)
    assert torch.equal(program.run_flat(program.examples)[0], plain[0])
    assert torch.equal(run_together(program, [program.examples])[0][0], plain[0])


def test_a_program_of_floats_runs_as_it_is() -> None:
    program = gw.trace(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    assert program.running is program.module


def test_what_is_written_in_place_or_drawn_stays_where_it_is() -> None:
    aten = torch.ops.aten
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    stored = graph.get_attr("w")
    drawn = graph.call_function(aten.bernoulli.p, (stored, 0.5))
    copy = graph.call_function(aten.clone.default, (stored,))
    written = graph.call_function(aten.add_.Tensor, (copy, 1))
    late = graph.call_function(aten.neg.default, (stored,))
    moved = graph.call_function(aten.mul.Tensor, (x, 2))
    both = graph.call_function(aten.add.Tensor, (moved, late))
    end = graph.output((both, drawn, written))
    assert in_turn(graph) == [x, stored, drawn, copy, written, moved, late, both, end]
