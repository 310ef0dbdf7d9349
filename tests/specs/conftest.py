"""What the spec tests share."""

from __future__ import annotations

import textwrap

import pytest

from graphwright.ir.errors import SpecError
from graphwright.specs import parse_spec


@pytest.fixture
def problems():
    """Everything wrong with a spec, as the lines a user sees; empty when it is accepted."""

    def check(text: str, **options) -> list[str]:
        try:
            parse_spec(textwrap.dedent(text), name="spec.yaml", **options)
        except SpecError as error:
            return [str(problem) for problem in error.problems]
        return []

    return check
