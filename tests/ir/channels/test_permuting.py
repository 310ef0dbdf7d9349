"""Units in another order give the same function, where they are interchangeable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import channel_nets as nets

import graphwright as gw
from graphwright.ir.channels import permute
from graphwright.ir.errors import ArgumentError


def traced(name: str) -> gw.Program:
    entry = nets.NETS[name]
    model = nets.prepare(entry.make(), *entry.shape)
    x = torch.randn(entry.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return gw.trace(model, (x,), dynamic="batch")


@pytest.mark.parametrize("name", list(nets.NETS))
def test_a_random_order_gives_the_same_function(name: str) -> None:
    program = traced(name)
    draw = np.random.default_rng(0)
    groups = [group for group in gw.channel_groups(program) if group.prunable]
    orders = {group: draw.permutation(group.units).tolist() for group in groups}
    moved = permute(program, orders)
    changed = [
        n
        for n, new in moved.state.items()
        if n not in program.state or not torch.equal(program.state[n], new)
    ]
    assert len(changed) >= len(orders)
    _, *shape = nets.NETS[name].shape
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    torch.testing.assert_close(moved(x), program(x), rtol=1e-9, atol=1e-9)


def test_an_order_has_to_be_a_permutation() -> None:
    program = traced("MultiHead")
    group = next(g for g in gw.channel_groups(program) if g.prunable)
    with pytest.raises(ArgumentError, match="no permutation"):
        permute(program, {group: [0] * group.units})
