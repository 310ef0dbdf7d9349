"""Every bound of `require` at its limit and just beyond, in its own unit."""

from __future__ import annotations

from typing import Any

import pytest

from graphwright.job.require import Bound, check_bounds
from graphwright.specs.sections import RequireSection

MEASURED: dict[str, Any] = {
    "evaluation": {"metric": "perplexity", "before": 5.0, "after": 5.02, "drop": 0.02},
    "cosine": 0.99,
    "latency": [
        {"backend": "a", "speedup": 1.5, "after_ms": 4.0},
        {"backend": "b", "speedup": 3.0, "after_ms": 2.0},
    ],
    "artifacts": [{"backend": "a", "file_bytes": 2_000_000}, {"backend": "b", "file_bytes": 10}],
    "peak_rss_bytes": 4_000_000_000,
    "seconds": 90.0,
    "notes": {},
}


@pytest.mark.parametrize(("name", "met", "missed", "measured"), [
    ("max_drop", 0.02, 0.019, [0.02]),
    ("perplexity_ratio", 1.005, 1.003, [1.004]),
    ("min_cosine", 0.99, 0.991, [0.99]),
    ("min_speedup", 1.5, 1.51, [1.5, 3.0]),
    ("max_latency_ms", 4.0, 3.99, [4.0, 2.0]),
    ("max_file_mb", 2.0, 1.99, [2.0, 1e-5]),
    ("max_rss_gb", 4.0, 3.99, [4.0]),
    ("max_minutes", 1.5, 1.49, [1.5]),
])  # fmt: skip
def test_a_bound_is_kept_at_its_limit_and_missed_beyond(
    name: str, met: float, missed: float, measured: list[float]
) -> None:
    kept = check_bounds(RequireSection(**{name: met}), **MEASURED)
    assert [bound.measured for bound in kept] == pytest.approx(measured)
    assert all(bound.is_met for bound in kept)
    assert [bound.name for bound in kept] == [name] * len(measured)
    broken = check_bounds(RequireSection(**{name: missed}), **MEASURED)
    assert [bound.is_met for bound in broken] == [False, True][: len(measured)]


def test_what_was_not_measured_is_missed() -> None:
    nothing = {**MEASURED, "evaluation": None, "latency": []}
    (drop,) = check_bounds(RequireSection(max_drop=1.0), **nothing)
    (speedup,) = check_bounds(RequireSection(min_speedup=1.0), **nothing)
    (kernels,) = check_bounds(RequireSection(integer_kernels="all"), **nothing)
    assert [bound.is_met for bound in (drop, speedup, kernels)] == [False] * 3
    assert str(drop) == "max_drop: not measured, bound 1"
    assert str(speedup) == "min_speedup: not measured (no artifact), bound 1"


def test_all_layers_have_to_be_integer_kernels() -> None:
    notes = {
        "a": {"integer_kernels": {"quantized": 3, "integer": 3, "float": []}},
        "b": {"integer_kernels": {"quantized": 3, "integer": 2, "float": ["fc"]}},
        "c": {},
    }
    found = check_bounds(RequireSection(integer_kernels="all"), **{**MEASURED, "notes": notes})
    assert [bound.is_met for bound in found] == [True, False, False]
    assert [bound.what for bound in found][:2] == ["a", "b; in float: fc"]


def test_no_section_and_an_empty_one_ask_for_nothing() -> None:
    assert check_bounds(None, **MEASURED) == []
    assert check_bounds(RequireSection(), **MEASURED) == []


def test_a_row_of_the_report() -> None:
    assert Bound("max_drop", 0.1, 0.05, "x").to_json() == {
        "name": "max_drop", "bound": 0.1, "measured": 0.05, "what": "x", "met": True,
    }  # fmt: skip
    assert str(Bound("max_drop", 0.1, 0.05, "x")) == "max_drop: 0.05 (x), bound 0.1"


def test_a_ratio_of_perplexities_needs_them() -> None:
    other = {**MEASURED, "evaluation": {"metric": "cosine", "before": 1.0, "after": 1.0}}
    (bound,) = check_bounds(RequireSection(perplexity_ratio=2.0), **other)
    assert not bound.is_met
    assert "metric: perplexity" in bound.what
