"""Every channel group of every architecture: zeroed and cut give the same function.

    python tests/benchmarks/channel_exactness.py                    the whole zoo
    python tests/benchmarks/channel_exactness.py bert unet          some of it
    python tests/benchmarks/channel_exactness.py --slice 0/4        a quarter of it

For each architecture a random half of the units of every prunable group is zeroed and cut, one
group at a time; then as much of all groups at once as may go, a random half of the groups, and
`prune.zig` at half of all units. The largest relative difference of the outputs is reported.
Every architecture runs in a process of its own, one at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path

Row = dict[str, Any]
BOUND = 1e-5
"""Largest relative difference, ||a - b|| / ||a||, of an output."""


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import diffusers  # noqa: F401  imported once, before the first fork
    import scipy.sparse.csgraph  # noqa: F401
    import torch
    import transformers
    from conformance import zoo

    import graphwright.passes.prune.zig  # noqa: F401

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--slice", default="0/1", help="i/n: every n-th architecture from i on")
    parser.add_argument("--groups", type=int, help="most groups tried one by one per model")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per architecture")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    first, step = map(int, options.slice.split("/"))
    names = options.names or list(zoo.load())[first::step]
    zoo.load()
    print("| architecture | groups | units | one by one | all | half of them | zig at 50% |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    rows = []
    for name in names:
        rows.append(in_child(name, options.groups, options.timeout))
        print(line(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    exact = sum(is_exact(row) for row in rows)
    tried = sum(row.get("tried", 0) for row in rows)
    groups = sum(row.get("groups", 0) for row in rows)
    print(f"\n{exact} of {len(rows)} architectures are exact to {BOUND:g}; "
          f"{tried} of {groups} groups tried one by one")  # fmt: skip
    return 0 if exact == len(rows) else 1


def line(row: Row) -> str:
    """A row of the table."""
    if "failed" in row:
        return f"| {row['name']} | {row['failed']} | | | | | |"
    cells = [f"{row[key][0]:.0e}" for key in ("single", "all", "half", "zig")]
    bad = [row[key][1] for key in ("single", "all", "half", "zig") if not row[key][0] <= BOUND]
    note = f" WRONG: {bad[0]}" if bad else ""
    return f"| {row['name']} | {row['groups']} | {row['units']} | {' | '.join(cells)} |{note}"


def is_exact(row: Row) -> bool:
    """Whether every cut of a row equals its masked program."""
    keys = ("single", "all", "half", "zig")
    return "failed" not in row and all(row[key][0] <= BOUND for key in keys)


def in_child(name: str, limit: int | None, timeout: float) -> Row:
    """The row of one architecture, from a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(name, limit, theirs))
    process.start()
    theirs.close()
    row: Row = {"name": name, "failed": f"took longer than {timeout:.0f} s"}
    if ours.poll(timeout):
        try:
            row = ours.recv()
        except EOFError:
            row["failed"] = "the process died"
    process.kill()
    process.join()
    return row


def _child(name: str, limit: int | None, pipe: Connection) -> None:
    from conformance.zoo import ZOO

    import graphwright as gw

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    try:
        architecture = ZOO[name]
        inputs = {**architecture.inputs(), **architecture.constants}
        program = gw.trace(architecture.build(), inputs, dynamic=architecture.dynamic, check=False)
        pipe.send({"name": name, **judge(program, limit)})
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            logging.disable(logging.NOTSET)
            logging.exception(name)
        pipe.send({"name": name, "failed": f"{type(error).__name__}: {error}"[:300]})


def judge(program: Any, limit: int | None = None) -> Row:
    """Cuts a program in every way the module's docstring names.

    Args:
        program: with its examples.
        limit: most groups that are tried one by one, evenly spread; all when None.
    """
    import graphwright as gw
    from graphwright.passes.prune.zig import Zig

    start = time.perf_counter()
    free = [g for g in gw.channel_groups(program) if g.prunable]
    row: Row = {"groups": len(free), "units": sum(g.units for g in free),
                "seconds": time.perf_counter() - start}  # fmt: skip
    stride = 1 if limit is None else max(1, -(-len(free) // limit))
    row["tried"] = len(free[::stride])
    row["effect"] = row["tried"]
    row["single"] = row["all"] = row["half"] = row["zig"] = (0.0, "")
    if not free:
        return row
    original = run(program)
    for picks in one_by_one(free[::stride]):
        masked = run(gw.zero(program, picks))
        worst = error(masked, run(gw.cut(program, picks)))
        row["effect"] -= error(original, masked) < 1e-6
        row["single"] = max(row["single"], (worst, next(iter(picks)).name))
    for key, picks in (("all", most(free, program)), ("half", half(free))):
        row[key] = (error(run(gw.zero(program, picks)), run(gw.cut(program, picks))), key)
    zig = Zig(sparsity=0.5).run(program, gw.Context())
    row["zig"] = (float(zig.metrics["cut_error"]), "zig")
    return row


def one_by_one(groups: list[Any]) -> Iterator[dict[Any, list[int]]]:
    """A random half of the units of each group."""
    import numpy as np

    draw = np.random.default_rng(0)
    for group in groups:
        count = max(1, group.units // 2)
        yield {group: sorted(draw.choice(group.units, count, replace=False).tolist())}


def half(groups: list[Any]) -> dict[Any, list[int]]:
    """A random share of the units of a random half of the groups."""
    import numpy as np

    draw = np.random.default_rng(1)
    chosen = draw.choice(len(groups), max(1, len(groups) // 2), replace=False)
    return {
        groups[i]: draw.choice(
            groups[i].units, int(draw.integers(1, groups[i].units)), replace=False
        ).tolist()
        for i in sorted(chosen.tolist())
    }


def most(groups: list[Any], program: Any) -> dict[Any, list[int]]:
    """All groups at once, each down to one unit, or to the fewest that leave something everywhere.

    Several groups may together hold all of a dimension (halves of a split); more units are kept
    until none is empty.
    """
    from graphwright.ir.channels.cutting import resolve
    from graphwright.ir.errors import ArgumentError

    for kept in (1, 2, 3, 4, 8):
        picks = {g: list(range(kept, g.units)) for g in groups if g.units > kept}
        try:
            resolve(groups[0].analysis.program, picks)
        except ArgumentError:
            continue
        return picks
    return {g: list(range(0, g.units - 1, 2)) for g in groups}


def run(program: Any) -> tuple[Any, ...]:
    """Outputs on the examples."""
    import torch

    with torch.no_grad():
        found: tuple[Any, ...] = program.run_flat(tuple(program.examples))
    return found


def error(expected: Any, actual: Any) -> float:
    """Largest relative difference of paired outputs; infinite where shapes differ."""
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            gap = (a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-12)
            worst = max(worst, float("inf") if gap.isnan() else float(gap))
    return worst


if __name__ == "__main__":
    sys.exit(main())
