"""Lets the formats' own libraries write folders, reads them, and prints how the two compare.

    python tests/peers/run.py                          every library, in environments it makes
    python tests/peers/run.py hqq compressed-tensors   those whose names begin so; the others' rows
                                                       are of their last run
    python tests/peers/run.py --write                  into docs/checkpoints.md too
    python tests/peers/run.py --test                   the tests of this folder instead of the table

Environments are folders below build/peers, made with pip where they are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "checkpoints.md"
BEGIN, END = "<!-- table: tests/peers/run.py --write -->", "<!-- end of table -->"


def main() -> int:
    from peers.environments import ENVIRONMENTS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="environments; all when none is named")
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    parser.add_argument("--test", action="store_true", help="run the tests, print no table")
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows:
        return _print_rows(arguments.rows)
    chosen = [name for name in ENVIRONMENTS
              if not arguments.names or name.startswith(tuple(arguments.names))]  # fmt: skip
    for name in chosen:
        environment = _environment(name, arguments.into)
        if arguments.test:
            tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(ROOT / "tests" / "peers")]
            if subprocess.run(tests, env=environment, cwd=ROOT, check=False).returncode:
                return 1
        else:
            rows = _rows(ENVIRONMENTS[name][0], environment)
            (arguments.into / f"{name}.json").write_text(json.dumps(rows))
    if not arguments.test:
        kept = [arguments.into / f"{name}.json" for name in ENVIRONMENTS]
        text = _table(
            [row for file in kept if file.is_file() for row in json.loads(file.read_text())]
        )
        print(text)
        if arguments.write:
            before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
            after = rest.partition(END)[2]
            PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
    return 0


def _environment(name: str, into: Path) -> dict[str, str]:
    """Environment variables under which a library is found; installs it where it is missing."""
    from peers.environments import ENVIRONMENTS

    folder = into / name
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target",
                   str(folder), *ENVIRONMENTS[name][1]]  # fmt: skip
        subprocess.run(command, check=True)
    path = [str(folder), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip


def _rows(library: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of a library, from a process in its environment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, "--rows", f"{library}={folder}"]
        done = subprocess.run(command, env=environment, cwd=folder, check=False,
                              capture_output=True, text=True)  # fmt: skip
        file = Path(folder) / "rows.json"
        if not file.is_file():
            print(done.stderr[-3000:], file=sys.stderr)
            raise SystemExit(f"{library}: no rows")
        found: list[dict[str, Any]] = json.loads(file.read_text())
        return found


def _print_rows(asked: str) -> int:
    """In a library's own process: writes its rows."""
    from peers import cases

    library, _, folder = asked.partition("=")
    rows = []
    for number, case in enumerate(cases.maker(library).CASES):
        row = {"library": cases.LIBRARIES[library], "case": case}
        try:
            found = cases.compare(library, case, Path(folder) / str(number) / "m")
            rows.append({**row, **vars(found)})
        except Exception as error:  # of the library: a row says so
            rows.append({**row, "error": (str(error).splitlines() or [""])[0][:80]})
    (Path(folder) / "rows.json").write_text(json.dumps(rows))
    return 0


def _table(rows: list[dict[str, Any]]) -> str:
    from peers.refused import REFUSED, words

    lines = [
        "| written by | form | weights | logits | held as |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['library']} | {row['case']} | not written: {row['error']} | | |")
            continue
        logits = "" if row["logits"] is None else f"{row['logits']:.0e}"
        lines.append(f"| {row['library']} {row['version']} | {row['case']} | {row['weights']:.0e} "
                     f"| {logits} | {row['held']} |")  # fmt: skip
    lines += ["", "Refused:", "", "| form | words |", "| --- | --- |"]
    lines += [f"| {name} | {words(name)} |" for name in REFUSED]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
