"""Takes one architecture after another through a child process with bounds on time and memory.

One that hangs, crashes or eats the machine costs its own row, and no other.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

GIB = 1 << 30
Row = dict[str, Any]
Send = Callable[[Row], None]


@dataclass(frozen=True)
class Limits:
    """Bounds of each child: seconds of wall time, GiB of address space; and how many at a time."""

    seconds: float
    gib: float
    jobs: int = 1


@dataclass
class _Child:
    process: Any
    pipe: Connection
    deadline: float
    last: Row | None = None


def each_in_a_child(
    names: Sequence[str],
    work: Callable[[str, Send], None],
    limits: Limits,
    lost: Callable[[str, Row | None, str], Row],
) -> Iterator[Row]:
    """Yields the last row that `work` sends for each name, as they come in.

    Args:
        names: of the architectures.
        work: runs in a child that is forked from this process; may send a row several times,
            each with more in it.
        limits: of each child.
        lost: makes the row of a child that did not end by itself, from its name, the last row
            that it sent, and what became of it.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), dict[str, _Child]()
    while waiting or running:
        while waiting and len(running) < limits.jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(work, name, theirs, limits.gib))
            process.start()
            theirs.close()
            running[name] = _Child(process, ours, time.monotonic() + limits.seconds)
        for name, child in list(running.items()):
            end = _end(child, limits.seconds)
            if end is None:
                continue
            child.process.join()
            del running[name]
            yield (
                child.last
                if end == "" and child.last
                else lost(name, child.last, end or "the process sent nothing")
            )
        time.sleep(0.05)


def _run(work: Callable[[str, Send], None], name: str, pipe: Connection, gib: float) -> None:
    limit = int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    work(name, pipe.send)


def _end(child: _Child, seconds: float) -> str | None:
    """None while the child runs; empty when it ended by itself, else what became of it."""
    try:
        while child.pipe.poll():
            child.last = child.pipe.recv()
    except EOFError:
        child.process.join()
        status = child.process.exitcode
        return "" if status == 0 else f"the process ended with status {status}"
    if time.monotonic() > child.deadline:
        child.process.kill()
        return f"took longer than {seconds:.0f} s"
    return None
