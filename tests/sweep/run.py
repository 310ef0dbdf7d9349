"""Takes every case of the sweep through the compiler and writes docs/sweep.md.

python tests/sweep/run.py                     everything
python tests/sweep/run.py "sorting" "pow_"    cases whose title has one of these, printed only
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
TABLE = ROOT / "docs" / "sweep.md"


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("titles", nargs="*", help="parts of titles; all cases when none is given")
    parser.add_argument("--stage", action="append", help="only these stages (with trace)")
    parser.add_argument("--json", type=Path, help="also write the rows here, one a line")
    options = parser.parse_args()
    import torch
    from sweep.collection import CASES
    from sweep.judge import STAGES, VERDICTS, judge
    from sweep.table import render

    torch.set_num_threads(1)
    chosen = [
        case
        for case in CASES
        if not options.titles or any(part in case.title for part in options.titles)
    ]
    stages = ("trace", *options.stage) if options.stage else STAGES
    rows: list[dict[str, Any]] = []
    for case in chosen:
        row = judge(case, stages).as_json()
        rows.append(row)
        print(_line(row), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if not options.titles and not options.stage:
        TABLE.write_text(render(rows))
        print(f"wrote {TABLE.relative_to(ROOT)}")
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    print(f"{len(rows)} modules at 6 sizes: {counts}")
    return 1 if counts["wrong"] or counts["unexplained"] else 0


def _line(row: dict[str, Any]) -> str:
    bad = {stage: text for stage, text in row["stages"].items() if text != "ok"}
    head = f"{row['verdict']:11} {row['seconds']:5.1f} s  {row['theme']}: {row['name']}"
    if row["translator"] not in ("", "direct"):
        head += "  [standard exporter]"
    lines = [f"    {stage}: {text}" for stage, text in bad.items()]
    lines += [f"    note: {note}" for note in row["notes"]]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    sys.exit(main())
