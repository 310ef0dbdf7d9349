"""A spread of the sweep goes through the compiler, and its judge finds what is planted.

The whole of it is `python tests/sweep/run.py` (`make sweep`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sweep.judge as judging
from sweep.cases import Case
from sweep.collection import CASES, THEMES
from sweep.judge import judge

import graphwright as gw
from graphwright.ir.errors import GraphwrightError

BY_TITLE = {case.title: case for case in CASES}
ONCE_WRONG = (
    "state written in forward: a counter of calls",
    "state written in forward: a table cached by size",
    "embeddings: embedding_bag, max",
    "convolutions: conv_transpose2d, output_size",
    "image sizes: coordinate channels",
)
REFUSED = (
    "shapes that depend on values: a branch on a sum",
    "recurrent: lstm of a packed sequence",
)
NARROWED = ("branches on sizes: t % 4 == 0", "branches on sizes: 10 < t < 20")
SPREAD = tuple(theme.cases[len(theme.cases) // 3].title for theme in THEMES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", sorted({*SPREAD, *ONCE_WRONG} - {*REFUSED, *NARROWED}))
def test_a_module_is_right_at_all_its_sizes(title: str) -> None:
    row = judge(BY_TITLE[title])
    assert row.verdict in ("right", "narrowed"), row.stages
    assert title not in ONCE_WRONG or row.verdict == "right", row.notes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", REFUSED)
def test_a_refusal_says_where_what_and_the_way_out(title: str) -> None:
    assert judge(BY_TITLE[title]).verdict == "refused"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", NARROWED)
def test_a_dimension_that_is_given_up_is_named(title: str) -> None:
    row = judge(BY_TITLE[title])
    assert row.verdict == "narrowed", row.stages
    assert "dimension 't'" in row.notes[0]


# ---- the judge itself, on planted faults


@pytest.fixture
def case() -> Case:
    return BY_TITLE["unary: sinh"]


def planted(monkeypatch: pytest.MonkeyPatch, case: Case, trace: Any) -> Any:
    monkeypatch.setattr(judging, "_trace", trace)
    return judge(case, ("trace",))


def test_a_value_that_is_off_is_wrong(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    class Off(SimpleNamespace):
        def __call__(self, x: Any) -> Any:
            value = self.program(x)
            # Away from the example only, and in one element.
            value[-1, -1] *= 1 + 1e-4 * (len(x) == 40)
            return value

    honest = judging._trace(case)
    off = Off(program=honest, signature=honest.signature, facts=honest.facts)
    row = planted(monkeypatch, case, lambda _: off)
    assert row.verdict == "wrong"
    assert "'n': 40" in row.stages["trace"]


def test_a_size_given_up_without_a_note_is_unexplained(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    fixed = gw.trace(case.module(), case.tensors(0))
    row = planted(monkeypatch, case, lambda _: fixed)
    assert row.verdict == "unexplained"
    assert "no note says why" in row.stages["trace"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("bare"), "not one of our errors"),
        (GraphwrightError("sinh", fix="Do."), "no place"),
        (GraphwrightError("sinh", where="node 'a'"), "no way out"),
        (GraphwrightError("sin", where="node 'a'", fix="Do."), "it blames none of sinh"),
    ],
)
def test_a_refusal_that_lacks_something_is_unexplained(
    monkeypatch: pytest.MonkeyPatch, case: Case, error: Exception, why: str
) -> None:
    def refuse(_: Case) -> Any:
        raise error

    row = planted(monkeypatch, case, refuse)
    assert row.verdict == "unexplained"
    assert why in row.stages["trace"]
