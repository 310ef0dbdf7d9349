"""The chains of single parts: each is checked, and read, as a spec of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from graphwright.ir.errors import Problem
from graphwright.specs.document import Entry, Node

PARTS = "parts"
OWN = ("passes", "calibration")
"""Sections that a part may have of its own."""


def shell(root: Node) -> Node:
    """The document with parts that say nothing: what it is without their sections."""
    found = root.entry(PARTS)
    if found is None or found.node.entries is None:
        return root
    inner = [_with(part, _rest(part.node)) for part in found.node.entries]
    parts = _with(found, inner)
    return _of(root, [parts if entry is found else entry for entry in root.entries or ()])


def part_views(root: Node) -> Iterator[tuple[str, Node]]:
    """(name, document) of every part: the spec with the part's sections in the place of its own.

    A part has the passes that it names and no others; other sections are the spec's where it has
    none.
    """
    found = root.entry(PARTS)
    for part in (found.node.entries if found is not None else None) or ():
        own = [entry for entry in part.node.entries or () if entry.name in OWN]
        gone = {PARTS, "passes", *(entry.name for entry in own)}
        kept = [entry for entry in root.entries or () if entry.name not in gone]
        yield part.name, _of(root, [*kept, *own])


def placed(problem: Problem, part: str, root: Node) -> Problem:
    """A problem of a part's document at its place in the spec."""
    own = root.locate((PARTS, part))[0]
    section = problem.path.partition(".")[0].partition("[")[0]
    if own.entry(section) is None or section not in OWN:
        return problem
    return replace(problem, path=f"{PARTS}.{part}.{problem.path}")


def _rest(part: Node) -> list[Entry]:
    return [entry for entry in part.entries or () if entry.name not in OWN]


def _with(entry: Entry, entries: list[Entry]) -> Entry:
    """The same key over other entries; a value that is no mapping stays, and is found wrong."""
    if entry.node.entries is None:
        return entry
    made = replace(entry, node=_of(entry.node, entries))
    made.name = entry.name
    return made


def _of(node: Node, entries: list[Entry]) -> Node:
    return replace(node, entries=entries)
