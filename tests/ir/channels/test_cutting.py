"""Zeroing units and cutting them out give the same function; the units are the right ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import channel_nets as nets
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.channels import kept_positions
from graphwright.ir.errors import ArgumentError
from graphwright.ir.graph.cost import cost


def traced(name: str) -> Any:
    entry = nets.NETS[name]
    model = nets.prepare(entry.make(), *entry.shape)
    x = torch.randn(entry.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return gw.trace(model, (x,), dynamic="batch")


def random_half(groups: list[Any], seed: int) -> dict[Any, list[int]]:
    draw = np.random.default_rng(seed)
    return {
        g: draw.choice(g.units, max(1, g.units // 2), replace=False).tolist()
        for g in groups
        if g.prunable
    }


def check_cut(program: Any, picks: dict[Any, list[int]], x: Tensor) -> Any:
    """Cut equals masked at another batch size, and neither is a constant or the original."""
    masked, smaller = gw.zero(program, picks), gw.cut(program, picks)
    expected, actual = masked(x), smaller(x)
    assert nets.error(program(x), expected) > 1e-3
    assert nets.error(expected[:1], expected[1:2]) > 1e-4
    assert nets.error(expected, actual) < 1e-9
    return smaller


@pytest.mark.parametrize("name", list(nets.NETS))
def test_cut_equals_masked_and_units_are_those_counted_by_hand(name: str) -> None:
    program = traced(name)
    groups = gw.channel_groups(program)
    free = [g for g in groups if g.prunable]
    assert sum(g.units for g in free) == nets.NETS[name].units
    assert all(g.reason for g in groups if not g.prunable)
    _, *shape = nets.NETS[name].shape
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    check_cut(program, {g: list(range(0, g.units - 1, 2)) for g in free}, x)
    smaller = check_cut(program, random_half(groups, 1), x)
    removed = np.zeros(free[0].analysis.count, bool)
    for g, units in random_half(groups, 1).items():
        removed[g.classes[units]] = True
    left = sum(p.numel() for p in smaller.parameters().values())
    assert left == free[0].analysis.parameters(removed)
    assert cost(smaller).macs == round(free[0].analysis.macs(removed))


@pytest.mark.parametrize("name", ["MultiHead", "GroupedQuery", "MultiQuery", "FusedInner"])
def test_channels_of_heads_keep_the_attention_scale(name: str) -> None:
    program = traced(name)
    groups = gw.channel_groups(program, unit="channel")
    x = torch.randn(3, 7, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    smaller = check_cut(program, random_half(groups, 2), x)
    narrow = [n for n in smaller.graph.nodes if "scaled_dot" in str(n.target)]
    assert narrow[0].kwargs.get("scale", (narrow[0].args + (None,) * 8)[6]) == pytest.approx(
        6**-0.5
    )


def test_pinned_norms_keep_the_residual_stream() -> None:
    program = traced("MultiHead")
    groups = gw.channel_groups(program, norm="pin")
    assert sum(g.units for g in groups if g.prunable) == 11 + 4
    assert any("norm: pin" in g.reason for g in groups)


def test_tied_weights_stay_one_tensor() -> None:
    model = nets.prepare(nets.Tied())
    program = gw.trace(model, (torch.randint(0, 13, (2, 5)),), dynamic="batch")
    groups = gw.channel_groups(program)
    free = [g for g in groups if g.prunable]
    assert [g.units for g in free] == [8]
    smaller = gw.cut(program, {free[0]: [1, 4, 5]})
    masked = gw.zero(program, {free[0]: [1, 4, 5]})
    ids = torch.randint(0, 13, (3, 5))
    assert nets.error(masked(ids), smaller(ids)) < 1e-12
    assert [tuple(p.shape) for p in smaller.parameters().values()].count((13, 5)) == 1


def test_an_unknown_operator_pins_its_neighbours_and_is_named() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 9), nn.Linear(9, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.special.entr(self.a(x).sigmoid()))))

    program = gw.trace(nets.prepare(Spectrum()), (torch.randn(4, 3, dtype=torch.float64),))
    with pytest.warns(UserWarning, match="special_entr"):
        groups = gw.channel_groups(program)
    assert {g.name: g.units for g in groups if g.prunable} == {"b.weight:0": 9}
    fixed = next(g for g in groups if g.name == "a.weight:0")
    assert "special_entr" in fixed.reason


def test_bad_picks_are_refused() -> None:
    program = traced("ResNet18")
    groups = gw.channel_groups(program)
    free = next(g for g in groups if g.prunable)
    fixed = next(g for g in groups if not g.prunable)
    with pytest.raises(ArgumentError, match=r"all \d+ units"):
        gw.cut(program, {free: list(range(free.units))})
    with pytest.raises(ArgumentError, match="cannot be pruned"):
        gw.zero(program, {fixed: [0]})
    with pytest.raises(ArgumentError, match="has no unit 99"):
        gw.cut(program, {free: [99]})
    with pytest.raises(ArgumentError, match="another program"):
        gw.cut(traced("VggFlatten"), {free: [0]})
    with pytest.raises(ArgumentError, match="unit is"):
        gw.channel_groups(program, unit="neuron")  # type: ignore[arg-type]


def test_groups_serve_for_other_weights_and_nothing_is_edited_in_place() -> None:
    program = traced("ResNet18")
    before = {name: t.clone() for name, t in program.state.items()}
    free = [g for g in gw.channel_groups(program) if g.prunable]
    picks = {free[0]: [0, 2]}
    masked = gw.zero(program, picks)
    smaller = gw.cut(masked, picks)
    assert nets.error(masked(*program.examples), smaller(*program.examples)) < 1e-12
    assert all(torch.equal(t, before[name]) for name, t in program.state.items())


def test_kept_positions_slice_optimizer_state() -> None:
    program = traced("VggFlatten")
    picks = random_half(gw.channel_groups(program), 3)
    smaller, kept = gw.cut(program, picks), kept_positions(program, picks)
    for name, p in program.parameters().items():
        moment = p.detach()
        for dim, where in kept.get(name, {}).items():
            moment = moment.index_select(dim, where)
        assert torch.equal(moment, smaller.state[name])


def test_a_unit_slices_what_it_says() -> None:
    program = traced("VggFlatten")
    group = next(g for g in gw.channel_groups(program) if g.units == 10)
    slices = group.slices(3)
    assert slices["parts.6.weight", 1].tolist() == [12, 13, 14, 15]  # 2 x 2 pixels of channel 3
    assert group.parameters == pytest.approx(8 * 9 + 2 + 4 * 14)
    assert {m.slices for m in group.members} == {1, 4}


def test_a_cut_program_can_be_cut_again() -> None:
    program = traced("ConvNext")
    once = gw.cut(program, random_half(gw.channel_groups(program), 4))
    picks = random_half(gw.channel_groups(once), 5)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    check_cut(once, picks, x)
