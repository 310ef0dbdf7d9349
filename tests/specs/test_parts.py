"""Sets of options within a pass's: what is left out is what the pass says, wherever it is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

import graphwright as gw
from graphwright.ir.options import Options
from graphwright.passes.registry import find_pass, pass_ids
from graphwright.specs.schema import shipped_schema

SCHEMA = shipped_schema()
PARTS = [
    (name, option)
    for name in pass_ids()
    for option in SCHEMA.options(name)
    if SCHEMA.inside(name, option) and not SCHEMA.definitions[name].get("required")
]
GIVEN: list[dict[str, Any]] = [
    {}, {"steps": 3}, {"epochs": 3}, {"schedule": "constant"}, {"betas": [0.4, 0.7]}, {"width": 8},
]  # fmt: skip

BESIDE: dict[str, dict[str, Any]] = {
    "adapt.attribute": {"discriminator": "nets:judge"}, "resize.assemble": {"drop": ["blocks.1"]},
}  # fmt: skip
"""Other options that a pass wants with them."""


def fits(name: str, option: str, given: dict[str, Any]) -> bool:
    return set(given) <= set(SCHEMA.options(SCHEMA.inside(name, option)))


def plain(options: Options) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(options.model_dump_json(exclude_none=True))
    return found


@pytest.mark.parametrize(("name", "option"), PARTS)
def test_a_run_has_the_options_that_its_lock_and_its_page_say(name: str, option: str) -> None:
    whole = SCHEMA.options(name)[option].get("default") or {}
    for given in (g for g in GIVEN if fits(name, option, g)):
        used = plain(find_pass(name)(**{option: given}, **BESIDE.get(name, {})).options)[option]
        locked = SCHEMA.filled(name, {option: given})[option]
        assert used == {k: v for k, v in locked.items() if v is not None}
        again = plain(find_pass(name)(**{option: locked}, **BESIDE.get(name, {})).options)[option]
        assert again == used
        gone = {"steps", "epochs", "label_smoothing", "milestones", "step_share", "gamma"}
        kept = {k: v for k, v in whole.items() if k not in gone | set(given)}
        assert kept.items() <= used.items()


def test_what_a_pass_trains_with_stays_unless_it_is_given() -> None:
    made = gw.passes.fuse.SkipRemoval(tune={"lr": 0.5}).options.tune
    assert (made.loss, made.epochs, made.lr) == ("teacher_mse", 10, 0.5)
    made = gw.passes.fuse.SkipRemoval(tune={"steps": 7}).options.tune
    assert (made.loss, made.epochs, made.steps) == ("teacher_mse", None, 7)
    made = gw.passes.resize.Neumeta(tune={"schedule": "cosine"}).options.tune
    assert (made.epochs, made.schedule, made.milestones) == (200, "cosine", ())
    made = gw.passes.quantize.Pv(tune={"betas": [0.5, 0.6]}).options.tune
    assert (made.optimizer, made.betas) == ("adam", (0.5, 0.6))
    adapt = gw.passes.tune.Unlearn(adapt={"steps": 7}).options.adapt
    assert (adapt.optimizer, adapt.lr, adapt.betas, adapt.steps) == ("adam", 2e-3, (0.0, 0.99), 7)
    critic = gw.passes.tune.Ddgan(critic={"width": 8}).options.critic
    assert (critic.width, critic.lr) == (8, 1.25e-4)
