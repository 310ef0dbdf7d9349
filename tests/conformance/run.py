"""Takes the whole zoo through the compiler and writes the table of docs/conformance.md.

    python tests/conformance/run.py                    everything
    python tests/conformance/run.py bert llama --show  some of it, printed only

Every architecture runs in a process of its own, forked after the imports, with bounds on time
and memory: one that hangs or eats the machine costs its own row.
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
TABLE = ROOT / "docs" / "conformance.md"


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures; all when none is named")
    parser.add_argument("--show", action="store_true", help="print rows, leave the docs alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per architecture")
    parser.add_argument("--memory", type=float, default=12, help="GiB of address space each")
    parser.add_argument("--json", type=Path, help="also write the rows, with timings, here")
    options = parser.parse_args()
    zoo = _imported()
    names = options.names or list(zoo)
    unknown = [name for name in names if name not in zoo]
    if unknown:
        parser.error(f"no architecture {unknown}; there are {', '.join(zoo)}")
    rows = run(names, options.jobs, options.timeout, options.memory)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not options.show and not options.names:
        from conformance.table import render

        TABLE.write_text(render(rows))
        print(f"wrote {TABLE.relative_to(ROOT)}")
    passed = sum(all(s == "ok" for s in row["stages"].values()) for row in rows)
    print(f"{passed} of {len(rows)} architectures passed every stage")
    return 0 if passed == len(rows) else 1


def _imported() -> dict[str, Any]:
    """The zoo; everything heavy is imported once, before the first fork."""
    import diffusers  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch
    import transformers
    from conformance import judge, zoo  # noqa: F401

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    return zoo.load()


def run(names: list[str], jobs: int, timeout: float, memory: float) -> list[dict[str, Any]]:
    """One row per name, in the order given; prints each as it comes in."""
    from conformance.children import Limits, each_in_a_child

    rows: dict[str, dict[str, Any]] = {}
    for row in each_in_a_child(names, _judge, Limits(timeout, memory, jobs), _lost):
        rows[row["name"]] = row
        print(_line(row), flush=True)
    return [rows[name] for name in names]


def _judge(name: str, send: Any) -> None:
    from conformance.judge import judge
    from conformance.zoo import ZOO

    try:
        send(judge(ZOO[name]).as_json())
    except BaseException as error:
        send(_lost(name, None, f"{type(error).__name__}: {error}"[:300]))


def _lost(name: str, _: Any, why: str) -> dict[str, Any]:
    from conformance.judge import Row
    from conformance.zoo import ZOO

    return Row(name, ZOO[name].family, {"trace": why}).as_json()


def _line(row: dict[str, Any]) -> str:
    bad = {stage: what for stage, what in row["stages"].items() if what != "ok"}
    took = sum(row["seconds"].values())
    state = "ok  " if not bad else "FAIL"
    head = f"{state} {row['name']:28} {row['error']:.0e} {took:6.1f} s"
    return f"{head}  {bad or ''} {row['notes'] or ''}"


if __name__ == "__main__":
    sys.exit(main())
