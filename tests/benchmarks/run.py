"""Runs the benchmarks that need no GPU, one after the other: `make bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "compile_time.py",
    "encoder.py",
    "int4_cpu.py",
    "otov2_digits.py",
    "nm_vit.py",
    "issp_sr.py",
)


def main() -> int:
    """Exit status of the first script that fails."""
    for script in SCRIPTS:
        print(f"\n== {script}\n", flush=True)
        status = subprocess.run([sys.executable, str(HERE / script)], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
