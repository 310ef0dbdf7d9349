"""The cases of the sweep are what they say: unique, six sizes each, and well conditioned."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from sweep.collection import CASES, THEMES
from sweep.judge import expected


def test_there_are_hundreds_of_cases_at_six_sizes_each() -> None:
    assert len(CASES) >= 800
    assert max(Counter(case.title for case in CASES).values()) == 1
    for case in CASES:
        assert case.sizes, case.title
        assert all(len(sizes) == 6 == len(set(sizes)) for sizes in case.sizes.values()), case.title


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_modules_run_at_all_their_sizes_and_float32_suffices_for_them(theme: object) -> None:
    for case in theme.cases[::4]:  # type: ignore[attr-defined]
        for at in range(6):
            assert expected(case, at).leaves, case.title


def test_the_page_of_results_is_of_these_cases_and_shows_no_failure() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text(encoding="utf-8")
    assert f"{len(CASES)} modules: " in page
    assert "0 wrong, 0 unexplained" in page
    for theme in THEMES:
        assert f"| {theme.name} | {len(theme.cases)} |" in page
