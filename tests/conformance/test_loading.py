"""docs/loading.md says what really loads, and in which words the rest is refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    file = Path(__file__).parent / "loading.py"
    spec = importlib.util.spec_from_file_location("loading_page", file)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["loading_page"] = script
    spec.loader.exec_module(script)
    lines = list(script.page())
    assert lines == (ROOT / "docs" / "loading.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if "DIFFERS" in line]
    assert sum("| equal |" in line for line in lines) >= 18
