"""Runs the benchmarks that need no GPU, one after the other: `make bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    ("compile_time.py",),
    ("encoder.py",),
    ("int4_cpu.py",),
    ("nf4_speed.py",),
    ("gptq_cost.py",),
    ("low_bits.py", "encoder"),
    ("low_bits.py", "gpt"),
    ("experts.py",),
    ("adapters_encoder.py", "lora", "pissa"),
    ("adapters_memory.py",),
    ("adapters_served.py",),
    ("adaquant_digits.py",),
    ("udfc_digits.py",),
    ("sparse_gpt.py",),
    ("mfac.py",),
    ("otov2_digits.py",),
    ("nm_vit.py",),
    ("issp_sr.py",),
    ("prune_scores.py",),
    ("prune_scores.py", "encoder"),
    ("mask_recovery.py",),
    ("prune_large.py", "--ours"),
    ("resnet50_pruned.py",),
    ("surgery.py",),
    ("resize_digits.py", "students"),
    ("resize_digits.py", "widths"),
    ("selective_scan.py",),
    ("sampling.py",),
    ("kv_cache.py",),
    ("llm_quality.py",),
    ("llm_speed.py",),
)
"""Scripts with their arguments. What needs a peer's package of its own says so, and is not here."""


def main() -> int:
    """Exit status of the first script that fails."""
    for script, *arguments in SCRIPTS:
        print(f"\n== {' '.join([script, *arguments])}\n", flush=True)
        command = [sys.executable, str(HERE / script), *arguments]
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
