"""A spec as a tree in which every key and value still knows its place in the file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from graphwright.ir.errors import Problem

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]
"""Keys and list indices from the root; an entry of `passes` has its pass id as one element."""

CHAINS = {"passes": "pass", "lower": "backend", "export": "export"}
"""Lists whose entries are a bare id or `id: {options}`, and what the ids name."""


@dataclass
class Entry:
    """One `key: value` of a mapping; `name` is what checking takes the key for."""

    written: str
    line: int
    column: int
    node: Node
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.written


@dataclass
class Node:
    """One value: a scalar, a list of nodes, or a list of entries (`is_mapping`)."""

    file: str
    line: int
    column: int
    value: Scalar = None
    items: list[Node] | None = None
    entries: list[Entry] | None = None
    size: int = field(default=1, repr=False)

    @property
    def is_mapping(self) -> bool:
        """Whether the value is a mapping."""
        return self.entries is not None

    def entry(self, name: str) -> Entry | None:
        """The entry taken for `name`, or None."""
        return next((e for e in self.entries or () if e.name == name), None)

    def plain(self) -> Any:
        """The value as plain Python: dict, list, str, int, float, bool or None."""
        if self.items is not None:
            return [item.plain() for item in self.items]
        if self.entries is not None:
            return {entry.name: entry.node.plain() for entry in self.entries}
        return self.value

    def locate(self, path: Path) -> tuple[Node, Entry | None]:
        """The node at `path`, and the entry that holds it; the deepest one that exists."""
        node, holder = self, None
        for element in path:
            if node.items is not None and isinstance(element, int) and element < len(node.items):
                node, holder = node.items[element], None
                continue
            entry = node.entry(element) if isinstance(element, str) else None
            if entry is None:
                break
            node, holder = entry.node, entry
        return node, holder

    def written(self, path: Path) -> Path:
        """`path` with each key as it stands in the file."""
        result: list[str | int] = []
        for depth, element in enumerate(path):
            _, holder = self.locate(path[: depth + 1])
            result.append(holder.written if holder and holder.name == element else element)
        return tuple(result)


def show_path(path: Path) -> str:
    """`passes[1].sparsity`: the id of a pass is left out, the index says which one is meant."""
    text = ""
    for depth, element in enumerate(path):
        if depth == 2 and path[0] in CHAINS and isinstance(path[1], int):
            continue
        if isinstance(element, int):
            text += f"[{element}]"
        elif re.fullmatch(r"[\w.-]{1,60}", element):
            text += f".{element}" if text else element
        else:
            text += f"[{show(element)}]"
    return text


def show(value: Any, limit: int = 60) -> str:
    """A value in one line, as it would stand in the file, cut where it is long."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif value is None:
        text = "null"
    else:
        text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def problem_at(
    root: Node, path: Path, message: str, suggestion: str = "", *, at_key: bool = False
) -> Problem:
    """A problem with the value at `path`, or with its key."""
    node, holder = root.locate(path)
    line, column = node.line, node.column
    if at_key and holder is not None:
        line, column = holder.line, holder.column
    return Problem(node.file, line, column, show_path(root.written(path)), message, suggestion)
