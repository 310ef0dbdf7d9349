from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.calibration.observe import observe
from graphwright.ir.calibration.ranges import range_observer
from graphwright.ir.errors import GraphwrightError


def test_observers_see_every_batch_of_the_nodes_they_watch() -> None:
    program = gw.trace(nn.Linear(3, 2), (torch.randn(4, 3),), {"input": {0: "n"}})
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    watch = range_observer("min_max", 99.9)
    batches = [(torch.randn(2, 3),), (torch.randn(5, 3),)]
    observe(program, {node.name: watch}, batches)
    values = torch.cat([program(*b) for b in batches]).detach()
    assert watch.range() == (pytest.approx(float(values.min())), pytest.approx(float(values.max())))


def test_nan_and_no_batch_at_all_are_refused() -> None:
    program = gw.trace(nn.Linear(3, 2), (torch.randn(4, 3),), {"input": {0: "n"}})
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    for batches in ([], [(torch.full((2, 3), float("nan")),)]):
        watch = range_observer("min_max", 99.9)
        with pytest.raises(GraphwrightError):
            observe(program, {node.name: watch}, batches)
