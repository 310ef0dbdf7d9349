"""Published networks at full depth: groups alone, together, and half of them, cut equals masked.

The two of diffusers (cross-attention and skips) are taken from the zoo.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import channel_families as families
from models import channel_nets as nets
from torch import Tensor

import graphwright as gw

ALONE = 2
"""Groups that are cut alone, evenly spread; all of them go at once too."""
FLOORS = dict.fromkeys(families.FAMILIES, 0.98) | {
    "shufflenet_v2": 0.96,  # a chain of shuffles ties some channels into one unit
    "yolov8": 0.93,
}
"""Least share of the parameters that lies in a slice of a removable unit."""
DEEP = {"vgg16_bn", "resnet50", "densenet121", "convnext_tiny", "yolov8", "shufflenet_v2",
        "repvgg_a0"}  # fmt: skip
SLOW = pytest.mark.slow


def prepared(name: str) -> tuple[torch.nn.Module, Tensor]:
    make, shape = families.FAMILIES[name]
    torch.manual_seed(0)
    model = nets.prepare(make(), *shape)
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(5)).double()


def check(program: Any, floor: float) -> int:
    """Cuts and masks agree on the examples; the number of removable units."""
    draw = np.random.default_rng(2)
    free = [g for g in gw.channel_groups(program) if g.prunable]
    analysis, reached = free[0].analysis, np.zeros(free[0].analysis.count, bool)
    for group in free:
        reached[group.classes] = True
    kept = analysis.parameters(reached) / analysis.parameters(np.zeros_like(reached))
    assert 1 - kept >= floor
    original = program.run_flat(program.examples)
    spread = free[:: max(1, -(-len(free) // ALONE))]
    chosen = draw.choice(len(free), -(-len(free) // 2), replace=False)
    for groups in [*([g] for g in spread), free, [free[i] for i in chosen]]:
        picks = {g: draw.choice(g.units, g.units // 2, replace=False).tolist() for g in groups}
        masked = gw.zero(program, picks).run_flat(program.examples)
        smaller = gw.cut(program, picks).run_flat(program.examples)
        for before, expected, actual in zip(original, masked, smaller, strict=True):
            bound = 1e-9 if expected.dtype == torch.float64 else 1e-5
            assert (expected - actual).norm() <= bound * expected.norm()
            assert (before - expected).norm() > 1e-6 * before.norm()
    return sum(int(g.units) for g in free)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SLOW) if n in DEEP else n for n in families.FAMILIES]
)
@torch.no_grad()
def test_cut_equals_masked(name: str) -> None:
    model, x = prepared(name)
    assert check(gw.trace(model, (x,), check=False), FLOORS[name]) > 0


@pytest.mark.slow
@torch.no_grad()
def test_repvgg_before_and_after_fusing() -> None:
    """The identity branches tie the blocks of a stage; fused into weights, they do not."""
    model, x = prepared("repvgg_a0")
    wide = gw.trace(model, (x,), check=False)
    expected = model(x)
    for i, block in enumerate(model.features):
        model.features[i] = block.fuse()
    fused = gw.trace(model, (x,), check=False)
    assert (expected - fused(x)).norm() < 1e-9 * expected.norm()
    assert check(wide, 0.98) == 6 + 6 + 12 + 24 + 48
    assert check(fused, 0.98) == 6 + 2 * 6 + 4 * 12 + 14 * 24 + 48


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["unet2d", "unet2d_condition"])
@torch.no_grad()
def test_unets_of_diffusers(name: str) -> None:
    from conformance import zoo

    architecture = zoo.load()[name]
    program = gw.trace(
        architecture.build(), architecture.inputs(), dynamic=architecture.dynamic, check=False
    )
    assert check(program, 0.9) > 0
