"""Published architectures: half of all units zeroed and cut give the same function.

All of the zoo, group by group, goes through `python tests/benchmarks/channel_exactness.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.channel_exactness import BOUND, judge
from conformance import zoo

import graphwright as gw

FLOORS = {
    "unet": 0.95,
    "densenet": 0.95,
    "convnextv2": 0.95,
    "swin": 0.9,
    "deit": 0.9,
    "bert": 0.4,  # the output is the residual stream
    "gpt2": 0.9,
    "bloom_alibi": 0.9,
    "gemma_tied": 0.9,
    "mixtral": 0.9,
    "mamba": 0.9,
    "t5": 0.7,
    "dit": 0.9,
}
"""Least share of the parameters that lies in a slice of a removable unit."""

SLOW = {"t5", "dit", "mixtral", "mamba", "swin"}


def program_of(name: str) -> Any:
    architecture = zoo.load()[name]
    inputs = {**architecture.inputs(), **architecture.constants}
    return gw.trace(architecture.build(), inputs, dynamic=architecture.dynamic, check=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FLOORS]
)
def test_half_of_the_units_cut_equals_masked(name: str) -> None:
    program = program_of(name)
    free = [g for g in gw.channel_groups(program) if g.prunable]
    analysis, draw = free[0].analysis, np.random.default_rng(0)
    reached = np.zeros(analysis.count, bool)
    for group in free:
        reached[group.classes] = True
    everything = analysis.parameters(np.zeros_like(reached))
    assert 1 - analysis.parameters(reached) / everything >= FLOORS[name]
    picks = {g: draw.choice(g.units, g.units // 2, replace=False).tolist() for g in free}
    inputs = tuple(program.examples)
    masked, smaller = gw.zero(program, picks), gw.cut(program, picks)
    with torch.no_grad():
        pairs = zip(program.run_flat(inputs), masked.run_flat(inputs), smaller.run_flat(inputs),
                    strict=True)  # fmt: skip
        changed = False
        for original, expected, actual in pairs:
            if not expected.is_floating_point():
                continue
            assert (expected - actual).norm() <= 1e-5 * expected.norm()
            changed = changed or bool((original - expected).norm() > 1e-2 * original.norm())
    assert changed


GROUPS = 4
"""Groups tried alone per architecture, evenly spread; most have no more than twice as many."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "vgg_bn",
        "resnet_basic",
        "densenet",
        "shufflenet",
        "unet",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch_transformer", "bert")),
    ],
)
def test_groups_one_by_one_all_together_and_half_of_them(name: str) -> None:
    row = judge(program_of(name), GROUPS)
    assert row["tried"] >= min(row["groups"], 3)
    assert row["effect"] == row["tried"]  # every one of them changes the outputs
    for key in ("single", "all", "half", "zig"):
        assert row[key][0] <= BOUND, row[key]
