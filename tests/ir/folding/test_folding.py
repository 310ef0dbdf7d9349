from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.branch_nets import CONVOLUTIONS, Normed, Summed, with_statistics
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.edit import Editor
from graphwright.ir.folding import Region, fold

LAYERS = ("conv1d", "conv2d", "conv3d", "linear")


def is_sum(region: Region) -> bool:
    return len(region.branches) > 1


def calls(program: gw.Program) -> list[str]:
    """Operators in order."""
    nodes = program.graph.nodes
    return [str(n.target).split(".")[1] for n in nodes if n.op == "call_function"]


def folded(
    model: nn.Module, *shape: int, free: Sequence[int] = (), at_most: float = 1e9
) -> tuple[gw.Program, list[gw.Action], list[gw.Action]]:
    x = torch.randn(*shape, dtype=torch.float64)
    dims = {"input": {n: f"n{n}" for n in free}} if free else None
    program = gw.trace(with_statistics(model), {"input": x}, dims)
    editor = Editor(program, by="test")
    done, left = fold(editor, is_sum, at_most)
    result = editor.finish()
    # Float64 throughout: what is left is rounding of a few hundred terms, not a wrong formula.
    assert measure(program, result).relative < 1e-10
    return result, done, left


class Named(nn.Module):
    """Gives a module an input called `input`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.inner(input)


@settings(max_examples=20)
@given(data=st.data(), rank=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]))
def test_branches_of_any_geometry(data: st.DataObject, rank: int, groups: int) -> None:
    """A kernel, a smaller one about the same centre, a 1x1, and where it fits an identity."""
    draw = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
    half, stride, dilation = draw(0, 2), draw(1, 2), draw(1, 2)
    kernel, padding = (
        [2 * h + 1 for h in half],
        [h * d for h, d in zip(half, dilation, strict=True)],
    )
    width = data.draw(st.sampled_from([4, 8]))
    small = [2 * data.draw(st.integers(0, h)) + 1 for h in half]
    inner = [d * (k - 1) // 2 for k, d in zip(small, dilation, strict=True)]
    branches: list[nn.Module] = [
        Normed(rank, 4, width, kernel, stride=stride, padding=padding, dilation=dilation,
               groups=groups),
        Normed(rank, 4, width, small, stride=stride, padding=inner, dilation=dilation),
        CONVOLUTIONS[rank](4, width, 1, stride, groups=2),
    ]  # fmt: skip
    if width == 4 and all(s == 1 for s in stride):
        branches.append(Normed(rank, 4, 4))
    sizes = draw(5, 7)
    free = range(2, 2 + rank) if data.draw(st.booleans()) else ()
    result, done, _ = folded(Named(Summed(*branches)), 2, 4, *sizes, free=free)
    assert len(done) == 1
    assert sorted(set(calls(result)) - {"sym_size"}) == [f"conv{rank}d", "relu"]


@pytest.mark.parametrize(
    ("branches", "size"),
    [
        ([nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 2)], 5),  # even kernels
        ([nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 4, padding="same")], 5),
        ([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 5, padding=1)], 7),
        ([nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 4, 1)], 5),
        (
            [nn.Conv2d(4, 8, 3), nn.Sequential(nn.Conv2d(4, 2, 3, bias=False), nn.Conv2d(2, 8, 1))],
            5,
        ),
        ([nn.Conv2d(4, 8, 3, 2), nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 8, 3, 2))], 7),
        ([nn.Conv2d(4, 4, 5), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))], 9),
        ([nn.ZeroPad2d((2, 0, 1, 1)), nn.Conv2d(4, 4, 1, padding=1)], 5),
    ],
)
def test_other_branches(branches: list[nn.Module], size: int) -> None:
    if isinstance(branches[0], nn.ZeroPad2d):  # one that reads from one side only
        branches = [nn.Sequential(branches[0], nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 1)]
    result, done, _ = folded(Named(Summed(*branches)), 2, 4, size, size)
    assert len(done) == 1
    assert sum(name in LAYERS for name in calls(result)) == 1
    assert "add" not in calls(result)


def test_a_linear_layer_takes_its_skip_in() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.relu(input + 0.5 * self.fc(input))

    result, done, _ = folded(Skip(), 2, 5, 6, free=(0, 1))
    assert [action.layer for action in done] == ["fc"]
    assert calls(result) == ["linear", "relu"]
    assert result.state["fc.weight"].shape == (6, 6)


def refused(model: nn.Module, *shape: int, at_most: float = 1e9) -> str:
    result, done, left = folded(Named(model), *shape, at_most=at_most)
    assert not done
    assert "add" in calls(result)
    return left[0].reason


@pytest.mark.parametrize(
    ("branches", "reason"),
    [
        (
            [nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 4, 1),
                                                        nn.Conv2d(4, 4, 3, padding=1))],
            "pads with zeros what is not zero beyond its ends",
        ),
        (
            [nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)],
            "count_include_pad=False",
        ),
        ([nn.Conv2d(4, 4, 1), nn.AvgPool2d(2, 2, ceil_mode=True)], "rounds its size up"),
        (
            [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")],
            "pads with mode reflect",
        ),
    ],
)  # fmt: skip
def test_what_would_be_wrong_at_the_border_stays(branches: list[nn.Module], reason: str) -> None:
    if isinstance(branches[1], nn.AvgPool2d) and branches[1].ceil_mode:
        branches = [nn.Conv2d(4, 4, 2, 2, padding=0), branches[1]]
    assert reason in refused(Summed(*branches), 2, 4, 6, 6)


def test_a_layer_that_would_cost_more_stays() -> None:
    narrow = nn.Sequential(nn.Conv2d(8, 1, 1, bias=False), nn.Conv2d(1, 8, 3, bias=False))
    wide = nn.Sequential(nn.Conv2d(8, 1, 3, bias=False), nn.Conv2d(1, 8, 1, bias=False))
    reason = refused(Summed(narrow, wide), 2, 8, 6, 6, at_most=1.0)
    assert reason == "one layer would take 3.60 times the multiplications"


def test_what_is_read_elsewhere_stays() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            a = self.a(input)
            return torch.relu(a + self.b(input)), a

    result, done, left = folded(Shown(), 2, 4, 5, 5)
    assert not done
    assert not left
    assert calls(result).count("conv2d") == 2


def test_a_layer_used_twice_keeps_its_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(input) + self.b(input))
            return torch.relu(self.a(y))

    result, done, _ = folded(Twice(), 2, 4, 5, 5)
    assert len(done) == 1
    assert "a.weight" in result.state
    assert calls(result) == ["conv2d", "relu", "conv2d", "relu"]
