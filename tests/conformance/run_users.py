"""Takes the architectures that users bring through the compiler; writes docs/conformance-users.md.

    make conformance-users                                 everything, in its own environment
    python tests/conformance/run_users.py --only 'timm.*'  some of it again, in place of its rows

The packages are listed in tests/conformance/users/requirements.txt.

Every architecture runs in a child process with bounds on time and memory, and appends one line of
JSON to the file of results, with the commit that it ran on. `--resume` goes on where a run was
stopped. The page is written once every architecture has a row; `--page` writes it at once, with the
names of those that have none.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "conformance-users.md"
SOURCES = ("backends", "core", "ir", "passes")
RESULTS = ROOT / "out" / "conformance-users.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every cell is ok or not applicable, 1 when one fails, 2 for bad arguments."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = _options().parse_args(arguments)
    users = _imported()
    names = [n for n in users if not options.only or any(fnmatch(n, o) for o in options.only)]
    if not names:
        print(f"no architecture matches {options.only}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(names))
        return 0
    done = {row["name"]: row for row in read(options.out) if row["name"] in users}
    if options.page:
        _write_page(done, users)
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        done = {name: row for name, row in done.items() if name not in names}
        options.out.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
    done |= run([name for name in names if name not in done], options)
    if len(done) == len(users):
        _write_page(done, users)
    rows = [done[name] for name in names]
    failed = [row["name"] for row in rows if _failing(row)]
    print(f"{len(rows) - len(failed)} of {len(rows)} architectures have no failing cell")
    return 1 if failed else 0


def _write_page(done: dict[str, Any], users: dict[str, Any]) -> None:
    from conformance.users.page import render

    missing = [name for name in users if name not in done]
    PAGE.write_text(render([done[name] for name in users if name in done], missing))
    print(f"wrote {PAGE}")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="names; all when absent")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    parser.add_argument(
        "--page", action="store_true", help="write the page of the results there, and stop"
    )
    parser.add_argument("--seconds", type=float, default=600, help="of wall time, each")
    parser.add_argument("--memory", type=float, default=24, help="GiB of address space, each")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results")
    return parser


def _imported() -> dict[str, Any]:
    """Returns the catalog; packages that most architectures need are imported before any fork."""
    import onnxruntime  # noqa: F401
    import torch
    from conformance.users import catalog, columns  # noqa: F401

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for package in ("timm", "torchvision", "transformers"):
        if importlib.util.find_spec(package):
            importlib.import_module(package)
    torch.set_num_threads(1)
    return catalog.load()


def _warm_up() -> None:
    """Compiles a small network, so that the compiler is imported once and not in every child.

    What is in memory by then is kept out of garbage collections, which would copy it in each.
    """
    from conformance.users.columns import examine
    from conformance.zoo import Architecture, floats
    from torch import nn

    norms = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    fields = {"input": floats("batch", 3, 8, 8)}
    row = examine(Architecture("warm", "warm", lambda: norms, fields, ()))
    assert all(cell.state == "ok" for cell in row.cells.values()), row.cells
    gc.collect()
    gc.freeze()


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of results; empty where there is none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def run(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns a row per name; prints each and appends it to `options.out` as it comes in."""
    from conformance.children import Limits, each_in_a_child

    rows: dict[str, dict[str, Any]] = {}
    if names:
        _warm_up()
    limits = Limits(options.seconds, options.memory, options.jobs)
    commit = _commit()
    for row in each_in_a_child(names, _examine, limits, complete):
        rows[row["name"]] = row = {**row, "commit": commit}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(_line(row), flush=True)
    return rows


def _commit() -> str:
    """Returns the last commit that changed the compiler; empty outside a git checkout."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", *SOURCES]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _examine(name: str, send: Any) -> None:
    from conformance.users.catalog import USERS
    from conformance.users.columns import examine

    try:
        examine(USERS[name], send)
    except ImportError as error:
        send(complete(name, None, f"not installed: {error}", "n/a"))
    except BaseException as error:
        send(complete(name, None, f"cannot be built: {type(error).__name__}: {error}"[:300]))


def complete(
    name: str, row: dict[str, Any] | None, why: str, state: str = "fails"
) -> dict[str, Any]:
    """Returns the row with its empty cells filled: `why` in the first, unreached in the others."""
    from conformance.users.catalog import USERS
    from conformance.users.columns import COLUMNS, Row

    row = row or Row(name, USERS[name].family).as_json()
    empty = [column for column in COLUMNS if column not in row["cells"]]
    for column in empty[:1]:
        row["cells"][column] = {"state": state, "detail": why}
    for column in empty[1:]:
        row["cells"][column] = {"state": "n/a", "detail": f"not reached: {empty[0]}: {why}"}
    return row


def _failing(row: dict[str, Any]) -> dict[str, str]:
    return {c: cell["detail"] for c, cell in row["cells"].items() if cell["state"] == "fails"}


def _line(row: dict[str, Any]) -> str:
    bad = {column: why.split("\n")[0][:160] for column, why in _failing(row).items()}
    seconds, int8 = sum(row["seconds"].values()), row["cells"]["int8"]["detail"]
    return f"{'FAIL' if bad else 'ok  '} {row['name']:36} {seconds:6.1f} s  {bad or int8}"


if __name__ == "__main__":
    sys.exit(main())
