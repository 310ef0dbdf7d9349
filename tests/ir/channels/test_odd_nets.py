"""Odd nets: every removable group alone, and several together, cut equals masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import channel_nets as nets
from models import odd_nets as odd
from torch import Tensor

import graphwright as gw


def traced(name: str) -> tuple[Any, tuple[Tensor, ...]]:
    """The program, and inputs at another batch size where that is free."""
    entry = odd.NETS[name]
    torch.manual_seed(0)
    model = nets.prepare(entry.make(), *entry.shapes[0])
    g = torch.Generator().manual_seed(5)
    examples = tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in entry.shapes)
    fixed = examples[0].shape[0] == 1
    program = gw.trace(model, examples, dynamic=None if fixed else "batch", check=False)
    sizes = [s if fixed else (3, *s[1:]) for s in entry.shapes]
    return program, tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in sizes)


@pytest.mark.filterwarnings("ignore:channels that reach:UserWarning")
@pytest.mark.parametrize("name", list(odd.NETS))
def test_every_group_alone_and_all_together(name: str) -> None:
    program, inputs = traced(name)
    draw = np.random.default_rng(3)
    groups = gw.channel_groups(program)
    free = [g for g in groups if g.prunable]
    assert sum(g.units for g in free) == odd.NETS[name].units
    assert all(g.reason for g in groups if not g.prunable)
    original = program(*inputs)
    for chosen in [[g] for g in free] + [free] * bool(free):
        picks = {g: draw.choice(g.units, g.units // 2, replace=False).tolist() for g in chosen}
        masked, smaller = gw.zero(program, picks)(*inputs), gw.cut(program, picks)(*inputs)
        assert nets.error(masked, smaller) < 1e-9
        assert nets.error(original, masked) > 1e-6


@pytest.mark.filterwarnings("ignore:channels that reach:UserWarning")
@pytest.mark.parametrize(
    "name", ["TorchAttention", "EinsumAttention", "WindowAttention", "LinearAttention", "Squash",
             "ChannelShuffle", "Maxout", "GroupedTranspose"],
)  # fmt: skip
def test_units_inside_of_heads(name: str) -> None:
    program, inputs = traced(name)
    free = [g for g in gw.channel_groups(program, unit="channel", norm="pin") if g.prunable]
    picks = {g: list(range(0, g.units - 1, 2)) for g in free}
    masked, smaller = gw.zero(program, picks)(*inputs), gw.cut(program, picks)(*inputs)
    assert nets.error(masked, smaller) < 1e-9
