from __future__ import annotations

from typing import Any

import pytest

from graphwright.job.require import check_bounds
from graphwright.specs.sections import RequireSection


def bounds(notes: dict[str, dict[str, Any]]) -> list[tuple[bool, str]]:
    found = check_bounds(
        RequireSection(integer_kernels="all"), drop=None, latency=[], artifacts=[],
        peak_rss_bytes=0, seconds=0.0, notes=notes,
    )  # fmt: skip
    return [(bound.is_met, str(bound)) for bound in found]


def counts(integer: int, *left: str) -> dict[str, Any]:
    return {"integer_kernels": {"quantized": integer + len(left), "integer": integer,
                                "float": dict.fromkeys(left, "Conv")}}  # fmt: skip


def test_all_layers_have_to_be_integer_kernels() -> None:
    ((met, _),) = bounds({"onnxruntime": counts(3)})
    assert met
    ((met, text),) = bounds({"onnxruntime": counts(2, "stem", "head.0")})
    assert not met
    assert text == "integer_kernels: 2 (onnxruntime; in float: stem, head.0), bound 4"


@pytest.mark.parametrize("notes", [{}, {"triton": {}}])
def test_what_no_backend_tells_is_missed(notes: dict[str, dict[str, Any]]) -> None:
    ((met, text),) = bounds(notes)
    assert not met
    assert "not measured" in text
