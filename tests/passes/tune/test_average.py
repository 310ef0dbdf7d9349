"""Recipes whose result may be an average over steps, and one whose report is of the last step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import every_pass

import graphwright as gw
from graphwright.ir.errors import ArgumentError

MORE: dict[str, dict[str, Any]] = {
    "tune.distill": {"features": 1.0, "discriminator": {"reduction": 2}}, "tune.contrastive": {},
    "tune.adaptive_mix": {}, "tune.blind_spot": {}, "tune.negatives": {}, "tune.patches": {},
    "tune.module_distill": {},
}  # fmt: skip
"""Options beside those of each pass's chain."""


def trained(name: str, **tune: Any) -> tuple[gw.Program, gw.Program]:
    """The program in front of the pass, and behind it."""
    kind, steps = every_pass.chain(name)
    options = {**steps[-1][1], **MORE.get(name, {})}
    own = {k: v for k, v in options.get("tune", {}).items() if k not in ("steps", "epochs")}
    options["tune"] = {**own, "steps": 3, "lr": 0.01, "schedule": "constant", **tune}
    program = every_pass.before_last(name)
    return program, every_pass.run(name, options, program, kind, len(steps) - 1)


@pytest.mark.parametrize("name", MORE)
def test_the_result_is_an_average_over_steps(name: str) -> None:
    before, behind = trained(name, ema=0.999)
    trainable = [n for n in before.trainable() if n in behind.state]
    assert not all(torch.equal(before.state[n], behind.state[n]) for n in trainable)


def test_a_partition_function_is_of_the_last_step() -> None:
    with pytest.raises(ArgumentError, match="this recipe counts on the last one"):
        trained("tune.meco", ema=0.9)
