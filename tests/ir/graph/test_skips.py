"""Skips of known nets against counts by hand: sums and joins, projections, long ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conformance import zoo
from models import channel_families, channel_nets
from torch import nn

import graphwright as gw
from graphwright.ir.graph.skips import find_skips, long_skips


def counted(program: gw.Program) -> tuple[int, int, int, int]:
    """(sums, joins, projections, long ones)."""
    found = find_skips(program)
    return (
        sum(skip.kind == "add" for skip in found),
        sum(skip.kind == "cat" for skip in found),
        sum(bool(skip.projection) for skip in found),
        sum(skip.is_long for skip in found),
    )


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (channel_nets.ResNet18, (2, 3, 8, 8), (2, 0, 1, 0)),  # a block, and one with a 1x1 skip
        (channel_nets.ResNet50, (2, 3, 8, 8), (2, 0, 0, 0)),
        (channel_nets.DenseNet, (2, 3, 8, 8), (0, 2, 0, 0)),  # joined features, no decoder
        (channel_nets.RepVgg, (2, 3, 8, 8), (4, 0, 2, 0)),  # two blocks: a 1x1 and an identity each
        (channel_nets.ConvNext, (2, 3, 8, 8), (2, 0, 0, 0)),
        (channel_nets.Yolo, (2, 3, 8, 8), (1, 1, 0, 0)),
        # twice two joins, one past the second net; a sum past the first one
        (channel_families.StackedUnets, (2, 3, 32, 32), (1, 5, 0, 6)),
    ],
)
def test_small_nets(
    make: Callable[[], nn.Module], shape: tuple[int, ...], expected: tuple[int, int, int, int]
) -> None:
    assert counted(gw.trace(make().eval(), (torch.randn(*shape),))) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet", (0, 2, 0, 2)),
        # 8 residual blocks (5 change their width) and 4 attentions; 2 joins in either of 2 blocks
        ("unet2d", (12, 4, 5, 4)),
        # the blocks, and 4 transformers of 3 sums and one around them
        ("unet2d_condition", (24, 4, 5, 4)),
    ],
)
def test_denoisers_and_a_segmentation_net(name: str, expected: tuple[int, int, int, int]) -> None:
    net = zoo.load()[name]
    program = gw.trace(net.build(), {**net.inputs(), **net.constants})
    assert counted(program) == expected


class Added(nn.Module):
    """A U-Net that adds its skip, with a squeeze inside a residual block."""

    def __init__(self, transformer: bool = False) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2)
        self.block, self.squeeze = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.block(x))
        y = x + y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        return y + self.up(torch.relu(self.down(y)))


def test_added_skips_are_long_where_they_cross_a_level() -> None:
    program = gw.trace(Added().eval(), (torch.randn(2, 4, 8, 8),), {"x": {0: "b", 2: "h"}})
    assert [skip.is_long for skip in find_skips(program)] == [False, True]


class Latents(nn.Module):
    """A transformer with long skips on one level, as U-ViT has them: found by their nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.merge = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.blocks[:2]:
            x = x + torch.tanh(block(x))
            kept.append(x)
        x = x + torch.tanh(self.blocks[2](x))
        for merge, block in zip(self.merge, self.blocks[3:], strict=True):
            x = merge(torch.cat([x, kept.pop()], -1))
            x = x + torch.tanh(block(x))
        return x


def test_nested_joins_are_long_on_one_level() -> None:
    program = gw.trace(Latents().eval(), (torch.randn(2, 5, 8),))
    assert counted(program) == (5, 2, 0, 2)
    forks = [skip.fork for skip in long_skips(program)]
    order = list(program.graph.nodes)
    assert order.index(forks[0]) > order.index(forks[1])  # the deepest comes first


def test_gates_and_rotations_are_no_skips() -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x)
            a, b = q.chunk(2, -1)
            return (q * 0.5 + torch.cat([-b, a], -1)) * torch.sigmoid(self.k(x))

    assert find_skips(gw.trace(Rotated().eval(), (torch.randn(2, 5, 8),))) == []
