"""Random small graphs made of the operator classes: any half of the units, cut equals masked."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError

STEPS = (
    "conv", "depthwise", "grouped", "norm", "group norm", "layer norm", "relu", "sigmoid", "add",
    "gate", "cat", "split", "shuffle", "pixel shuffle", "pool", "transpose conv", "attention",
    "mean", "pad", "scale", "repeat", "slice",
)  # fmt: skip


class RandomNet(nn.Module):
    """A list of (step, operand, other operand) over values of shape (N, C, 4, 4).

    A step that does not fit its operand's channels falls back to a convolution.
    """

    def __init__(self, plan: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.plan, self.layers = [], nn.ModuleDict()
        channels = [3]
        for number, (step, a, b) in enumerate([("conv", 0, 0), *plan]):
            a, b = a % len(channels), b % len(channels)
            step = self.fitting(step, channels[a], channels[b])
            self.plan.append((step, a, b))
            layer, out = self.layer(step, channels[a], channels[b], 6 + 2 * (number % 4))
            if layer is not None:
                self.layers[str(number)] = layer
            channels.append(out)
        self.head = nn.Conv2d(channels[-1], 5, 1)

    @staticmethod
    def fitting(step: str, c: int, other: int) -> str:
        wrong = (
            (step in ("grouped", "split", "shuffle", "attention") and c % 2)
            or (step == "pixel shuffle" and c % 4)
            or (step in ("add", "gate") and c != other)
            or (step == "cat" and c + other > 40)
            or (step == "repeat" and c > 16)
            or (step == "slice" and c < 4)
        )
        return "conv" if wrong else step

    def layer(self, step: str, c: int, other: int, wide: int) -> tuple[nn.Module | None, int]:
        made: dict[str, tuple[Any, int]] = {
            "conv": (lambda: nn.Conv2d(c, wide, 3, 1, 1), wide),
            "depthwise": (lambda: nn.Conv2d(c, c, 3, 1, 1, groups=c), c),
            "grouped": (lambda: nn.Conv2d(c, wide, 1, groups=2), wide),
            "norm": (lambda: nn.BatchNorm2d(c), c),
            "group norm": (lambda: nn.GroupNorm(2 if c % 2 == 0 else 1, c), c),
            "layer norm": (lambda: nn.LayerNorm(c), c),
            "transpose conv": (lambda: nn.ConvTranspose2d(c, wide, 3, 1, 1), wide),
            "attention": (lambda: nn.Linear(c, 3 * c), c),
            "scale": (lambda: nn.ParameterList([torch.randn(c, 1, 1)]), c),
        }
        if step in made:
            return made[step][0](), made[step][1]
        out = {"cat": c + other, "split": c, "pixel shuffle": c, "repeat": 2 * c, "slice": c - 2}
        return None, out.get(step, c)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for number, (step, a, b) in enumerate(self.plan):
            layer = dict(self.layers.items()).get(str(number))
            values.append(self.apply_step(step, layer, values[a], values[b]))
        return self.head(values[-1])

    @staticmethod
    def apply_step(step: str, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if step in ("conv", "depthwise", "grouped", "norm", "group norm", "transpose conv"):
            return layer(x)
        if step == "layer norm":
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if step == "attention":
            q, k, v = layer(x.flatten(2).transpose(1, 2)).view(n, h * w, 3, 2, c // 2).unbind(2)
            parts = (part.transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(n, h * w, c)
            return out.transpose(1, 2).unflatten(2, (h, w))
        if step == "scale":
            return x * layer[0]
        if step == "split":
            left, right = x.chunk(2, 1)
            return torch.cat([right, left * 2], 1)
        if step == "shuffle":
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if step == "pixel shuffle":
            return F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)
        simple = {
            "relu": lambda: F.relu(x), "sigmoid": lambda: x.sigmoid(), "add": lambda: x + y,
            "gate": lambda: x * y.sigmoid(), "cat": lambda: torch.cat([x, y], 1),
            "pool": lambda: F.max_pool2d(x, 3, 1, 1), "mean": lambda: x - x.mean(1, keepdim=True),
            "pad": lambda: F.pad(x, (1, 1))[..., 1:-1], "repeat": lambda: x.repeat(1, 2, 1, 1),
            "slice": lambda: x[:, 1:-1],
        }  # fmt: skip
        return simple[step]()


PLANS = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=8
)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=12, phases=[Phase.generate])
@given(PLANS, st.integers(0, 10**6), st.sampled_from(["head", "channel"]))
def test_any_half_of_the_units(plan: list[tuple[str, int, int]], seed: int, unit: Any) -> None:
    torch.manual_seed(seed % 97)
    model = RandomNet(plan).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    program = gw.trace(model, (x,), check=False)
    groups = [g for g in gw.channel_groups(program, unit=unit) if g.prunable]
    draw = np.random.default_rng(seed)
    picks = {
        g: draw.choice(g.units, int(draw.integers(1, g.units)), replace=False).tolist()
        for g in groups
    }
    with contextlib.suppress(ArgumentError):  # several groups may make up one dimension
        check(program, picks, x)


def check(program: Any, picks: dict[Any, list[int]], x: Tensor) -> None:
    masked = gw.zero(program, picks)
    smaller = gw.cut(program, picks)
    with torch.no_grad():
        expected, actual = masked(x), smaller(x)
    assert (expected - actual).norm() <= 1e-9 * expected.norm().clamp_min(1e-9)
    before, after = (sum(p.numel() for p in q.parameters().values()) for q in (program, smaller))
    assert after < before or not picks
