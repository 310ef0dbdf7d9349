"""Units of a training loop: their slices, sums over them, and which columns belong to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.channels import channel_groups
from graphwright.passes.prune._oto.units import Units, read_only, untrainable


class Net(nn.Module):
    """A residual pair under batch norm, and a flattening head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.head(torch.relu(self.norm(h + self.b(h))).flatten(1))


def units_of(model: nn.Module, *inputs: Tensor) -> tuple[Units, gw.Program]:
    program = gw.trace(model.eval(), inputs)
    groups = [g for g in channel_groups(program) if g.prunable]
    analysis = groups[0].analysis
    names = {owner: owner for owner in set(analysis.owners.values())
             if owner in program.parameters()}  # fmt: skip
    return Units(groups, names, read_only(analysis)), program


@pytest.fixture
def residual() -> tuple[Units, gw.Program]:
    return units_of(Net(), torch.randn(2, 2, 2, 2))


MADE = ("a.weight", "a.bias", "b.weight", "norm.weight", "norm.bias")


def test_a_unit_is_what_makes_its_channel(residual) -> None:
    """Rows, biases and norms; not the columns of b and of the head that read the channel."""
    units, program = residual
    assert {(s.name, s.dim) for s in units.slots} == {(name, 0) for name in MADE}
    assert {(s.name, s.dim) for s in units.readers} == {("b.weight", 1), ("head.weight", 1)}
    one = sum(program.state[n][0].numel() for n in MADE)
    assert units.sizes.tolist() == [one] * 6


def test_sums_are_those_of_a_loop_over_units(residual) -> None:
    units, program = residual
    x = {n: p.detach() for n, p in program.parameters().items()}
    y = {n: torch.randn_like(p) for n, p in x.items()}
    xy, yy = units.sums((x, y), (y, y))
    for unit in range(6):
        terms = [(x[n][unit].double() * y[n][unit].double()).sum() for n in MADE]
        squares = [y[n][unit].double().square().sum() for n in MADE]
        assert float(xy[unit]) == pytest.approx(float(sum(terms)), rel=1e-5)
        assert float(yy[unit]) == pytest.approx(float(sum(squares)), rel=1e-5)


def test_scaling_touches_the_slices_alone(residual) -> None:
    units, program = residual
    before = {n: p.detach() for n, p in program.parameters().items()}
    x = {n: p.clone() for n, p in before.items()}
    factors = torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    units.scale(x, factors)
    for name, value in before.items():
        if name in MADE:
            shape = [6] + [1] * (value.dim() - 1)
            assert torch.equal(x[name], value * factors.float().reshape(shape))
        else:
            assert torch.equal(x[name], value)


def test_clearing_equals_the_zeroed_program(residual) -> None:
    units, program = residual
    x = {n: p.detach().clone() for n, p in program.parameters().items()}
    units.clear(x, torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool))
    zeroed = gw.zero(program, {units.groups[0]: [1, 4]})
    for name, value in x.items():
        assert torch.equal(value, zeroed.state[name])
    assert units.zeros(x).tolist() == [False, True, False, False, True, False]


class Two(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act, self.one, self.two = act, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x)))


@pytest.mark.parametrize(("act", "columns"), [(torch.tanh, False), (torch.sigmoid, True)])
def test_columns_belong_to_units_that_are_never_zero(act: Any, columns: bool) -> None:
    """tanh(0) = 0, so that rows of zeros are enough; sigmoid(0) is not."""
    units, _ = units_of(Two(act), torch.randn(2, 4))
    assert (("two.weight", 1) in {(s.name, s.dim) for s in units.slots}) is columns


def test_transposed_convolutions_and_embeddings_make_channels_along_dimension_one() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Embedding(9, 6), nn.ConvTranspose1d(6, 5, 3)
            self.out = nn.Conv1d(5, 2, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.relu(self.up(self.embed(ids).transpose(1, 2))))

    units, _ = units_of(Up(), torch.randint(0, 9, (2, 4)))
    made = {(s.name, s.dim) for s in units.slots}
    assert made == {("embed.weight", 1), ("up.weight", 1), ("up.bias", 0)}
    assert {(s.name, s.dim) for s in units.readers} == {("up.weight", 0), ("out.weight", 1)}


def test_heads_are_units_of_many_rows() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, 5, 3, 4, 2).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).reshape(2, 5, 8))

    units, program = units_of(Attention(), torch.randn(2, 5, 8))
    assert units.count == 4
    x = {n: p.detach() for n, p in program.parameters().items()}
    rows = x["qkv.weight"].double().reshape(3, 4, 2, 8).square().sum((0, 2, 3))
    rows += x["qkv.bias"].double().reshape(3, 4, 2).square().sum((0, 2))
    np.testing.assert_allclose(units.sums((x, x))[0], rows, rtol=1e-6)


def test_groups_that_training_cannot_empty_say_why() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.register_buffer("table", torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.two(torch.relu(self.one(x)) + self.table)))

    program = gw.trace(Fixed().eval(), (torch.randn(2, 4),))
    groups = {g.name: g for g in channel_groups(program) if g.prunable}
    read = read_only(groups["one.weight:0"].analysis)
    names = {n: n for n in program.parameters() if not n.startswith("two.")}
    assert untrainable(groups["one.weight:0"], names, read) == (
        "table table is added to its channels and is not in training"
    )
    assert "weight two." in untrainable(groups["two.weight:0"], names, read)


def test_a_multiple_of_units_is_kept_and_no_dimension_is_emptied(residual) -> None:
    units, _ = residual
    flags = torch.tensor([1, 1, 1, 0, 1, 0], dtype=torch.bool)
    assert units.picks(flags, 1) == {units.groups[0]: [0, 1, 2, 4]}
    assert units.picks(flags, 3) == {units.groups[0]: [0, 1, 2]}
    assert units.picks(torch.ones(6, dtype=torch.bool), 1) == {units.groups[0]: [0, 1, 2, 3, 4]}
