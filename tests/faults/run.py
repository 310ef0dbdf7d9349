"""Kills, damages and starves a long chain, and writes docs/faults.md.

python tests/faults/run.py --write              all: 40 SIGKILLs, 20 SIGINTs, bit flips, limits
python tests/faults/run.py --kills 4 --ints 2   fewer of them, printed only
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "faults.md"
START, END = "<!-- table -->", "<!-- end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--ints", type=int, default=20)
    parser.add_argument("--moments", type=int, default=5, help="of kills before the bit flips")
    parser.add_argument("--steps", type=int, default=8, help="values of every limit")
    parser.add_argument("--write", action="store_true", help="write docs/faults.md")
    parser.add_argument(
        "--only", nargs="*", choices=["kills", "ints", "flips", "limits", "disks"], default=[]
    )
    options = parser.parse_args()
    from faults import job, kills, limits

    os.environ["PYTHONPATH"] = str(ROOT / "tests")
    parts = {
        "kills": ("SIGKILL at random moments", lambda folder: kills.kills(
            folder, signal.SIGKILL, options.kills, in_a_row=4, seed=1)),
        "ints": ("SIGINT at random moments", lambda folder: kills.kills(
            folder, signal.SIGINT, options.ints, in_a_row=2, seed=2)),
        "flips": ("one bit flipped in a file of the work folder", lambda folder: kills.flips(
            folder, options.moments, per_file=1, seed=3)),
        "limits": ("limits on file size, address space, open files",
                   lambda folder: limits.starved(folder, options.steps)),
        "disks": ("disks too small, in bytes and in files", lambda folder: limits.full(
            folder, ("64k", "128k", "256k", "512k", "1m", "4m"), (4, 8, 16, 32))),
    }  # fmt: skip
    lines, wrong = ["| fault | what happened | not right |", "| --- | --- | --- |"], 0
    with tempfile.TemporaryDirectory() as name:
        folder = job.prepare(Path(name))
        job.import_all()
        for part, (title, run) in parts.items():
            if options.only and part not in options.only:
                continue
            tally = run(folder)
            wrong += len(tally.wrong)
            counts = ", ".join(f"{what}: {count}" for what, count in tally.counts.items())
            lines.append(f"| {title} | {counts} | {len(tally.wrong)} |")
            sys.stdout.write("\n".join([lines[-1], *tally.wrong, ""]))
            sys.stdout.flush()
    if options.write:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        text = "\n".join([head + START, "", *lines, "", END + rest.partition(END)[2]])
        PAGE.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
