"""A few kills and limits of those that `make faults` tries: the same bytes, or one message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parents[2] / "faults" / "run.py"


@pytest.mark.slow
def test_kills_and_limits() -> None:
    few = ["--kills", "2", "--ints", "1", "--steps", "1", "--only", "kills", "ints", "limits"]
    ended = subprocess.run(
        [sys.executable, str(DRIVER), *few], capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("| 0 |") == 3
    assert "sent: 2" in ended.stdout
