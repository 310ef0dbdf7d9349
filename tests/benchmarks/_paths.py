"""Puts the tests' shared modules on the path of a script; pytest's own setting is `pythonpath`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "docs" / "demo")]
