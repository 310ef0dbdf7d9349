"""Every pass says what it costs, in figures that can be added up."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache

import pytest
from models import every_pass

from graphwright.ir.work import DataSize, Load
from graphwright.passes.registry import find_pass, pass_ids
from graphwright.plan.facts import load_of

# Their chains need files that the tests of these passes write.
FROM_FILES = ("adapt.load", "resize.resample")
DATA = DataSize(16, 4, 8.0)


@cache
def load(kind: str) -> Load:
    return load_of(every_pass.traced(kind), DATA, DATA, 2)


@pytest.mark.parametrize("name", [name for name in pass_ids() if name not in FROM_FILES])
def test_a_pass_says_its_cost(name: str) -> None:
    kind, steps = every_pass.chain(name)
    work = find_pass(name)(**steps[-1][1]).cost(load(kind))
    values = {field.name: getattr(work, field.name) for field in fields(work)}
    assert all(math.isfinite(value) and value >= 0 for value in values.values()), values
    assert work.edited > 0
