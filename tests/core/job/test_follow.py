"""Which program holds the uncompressed weights behind a pass: every case of the rule by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.job.uncompressed import follow


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    """Four programs: before a pass, behind it, behind it with codes, and what was kept aside."""
    torch.manual_seed(0)
    made = {
        name: gw.trace(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
        for name in ("before", "new", "aside", "own")
    }
    return {**made, "coded": gw.passes.quantize.Rtn(block=4)(made["new"])}


CASES = [
    # effect, what the pass made, what it says itself, what was aside -> what is aside behind it
    ("kept", "new", None, "before", "new"),  # nothing is compressed yet
    ("kept", "new", None, "aside", "aside"),
    ("compressed", "coded", None, "before", "before"),
    ("compressed", "new", None, "before", "before"),  # zeros are no codes
    ("compressed", "coded", None, "aside", "aside"),
    ("compressed", "coded", "own", "aside", "own"),
    ("reformed", "new", None, "aside", "new"),  # counts from the new form
    ("reformed", "coded", None, "before", "coded"),
    ("reformed", "new", "own", "aside", "own"),
    ("trained", "new", None, "aside", "new"),
    ("trained", "coded", None, "aside", "aside"),  # codes are trained towards what they stand for
    ("trained", "coded", "own", "aside", "own"),
]


@pytest.mark.parametrize(("effect", "made", "says", "aside", "expected"), CASES)
def test_the_uncompressed_program_behind_a_pass(
    programs: dict[str, Any], effect: str, made: str, says: str | None, aside: str, expected: str
) -> None:
    result = SimpleNamespace(
        program=programs[made], uncompressed=programs[says] if says is not None else None
    )
    step = SimpleNamespace(effect=lambda given: effect if given is result else "")
    found = follow(programs[aside], step, programs["before"], result)  # type: ignore[arg-type]
    assert found is programs[expected]
