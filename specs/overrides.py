"""`--set passes.1.sparsity=0.5`: replaces or adds one value of a spec before it is checked."""

from __future__ import annotations

import re

from graphwright.ir.errors import Problem, SpecError
from graphwright.specs.document import CHAINS, Entry, Node, show
from graphwright.specs.entries import entry_id
from graphwright.specs.load import read_text
from graphwright.specs.nearest import nearest
from graphwright.specs.part_views import PARTS

FILE = "--set"


def apply_override(root: Node, text: str) -> None:
    """Changes the tree as `text`, of the form KEY=VALUE, says.

    A key is a path of names and list indices joined by dots; an entry of `passes` or `lower` is
    named by its index or by its id. The value is YAML, or a layer pattern. What is absent is added.

    Raises:
        SpecError: the text has no `=`, the value is not YAML, or the path leads nowhere.
    """
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise _error(key or text, 1, "expected KEY=VALUE, such as 'seed=1' or 'passes.0.bits=4'")
    value = _value(key, value_text, len(text) - len(value_text))
    if not elements_of(key):
        raise _error(key, 1, "names nothing; expected KEY=VALUE, such as 'seed=1'")
    put(root, key, value)


def elements_of(key: str) -> list[str]:
    """The names and indices of a key."""
    return [e for e in re.split(r"[.\[\]]+", key) if e]


def put(root: Node, key: str, value: Node) -> None:
    """Puts a value at the place that a key names; what is absent is added.

    Raises:
        SpecError: the key leads nowhere.
    """
    _Walk(root, key, value).go(elements_of(key))


def _value(key: str, text: str, offset: int) -> Node:
    if not text.strip():
        return Node(FILE, 1, offset + 1)
    if text.lstrip()[0] in "*!":  # a layer pattern; a shell has taken its quotes away
        return Node(FILE, 1, offset + 1, text.strip())
    try:
        node, problems = read_text(text, FILE)
    except SpecError as error:
        problems, node = error.problems, Node(FILE, 1, 1)
    if problems:
        moved = [
            Problem(FILE, p.line, p.column + offset * (p.line == 1), key, p.message, p.suggestion)
            for p in problems
        ]
        raise SpecError(moved)
    _shift(node, offset)
    return node


def _shift(node: Node, offset: int) -> None:
    """Counts columns from the start of the argument."""
    node.column += offset * (node.line == 1)
    for item in node.items or ():
        _shift(item, offset)
    for entry in node.entries or ():
        entry.column += offset * (entry.line == 1)
        _shift(entry.node, offset)


class _Walk:
    """Follows a key through the tree and puts the value at its end."""

    def __init__(self, root: Node, key: str, value: Node) -> None:
        self.root = root
        self.key = key
        self.value = value

    def go(self, elements: list[str]) -> None:
        node, rest = self.root, elements
        if elements[0] == PARTS and len(elements) > 3 and elements[2] in CHAINS:
            node, rest = self._entry(self._entry(node, PARTS), elements[1]), elements[2:]
        if rest[0] in CHAINS and len(rest) > 1:
            node, rest = self._chain(node, rest[0], rest[1:])
        while rest:
            if node.items is not None:
                node, rest = self._item(node, rest[0]), rest[1:]
            else:
                node, rest = self._entry(node, rest[0]), rest[1:]
        node.file, node.line, node.column = self.value.file, self.value.line, self.value.column
        node.value, node.items = self.value.value, self.value.items
        node.entries = self.value.entries

    def _chain(self, owner: Node, section: str, rest: list[str]) -> tuple[Node, list[str]]:
        """The options of one entry, or the entry itself when the key ends there."""
        holder = owner.entry(section)
        items = holder.node.items if holder is not None else None
        if items is None:
            raise self._error(f"the spec has no list '{section}'")
        if rest[0].isdecimal():
            node, rest = items[self._index(rest[0], len(items), section)], rest[1:]
        else:
            node, rest = self._named(section, items, rest)
        if not rest:
            return node, rest
        if isinstance(node.value, str):
            entry = Entry(node.value, node.line, node.column, Node(node.file, node.line, 1))
            node.value, node.entries = None, [entry]
        if not node.entries:
            raise self._error(f"entry {section}[{items.index(node)}] of the spec has no name")
        return node.entries[0].node, rest

    def _named(self, section: str, items: list[Node], rest: list[str]) -> tuple[Node, list[str]]:
        ids = [entry_id(item) for item in items]
        for count in range(len(rest), 0, -1):
            name = ".".join(rest[:count])
            if ids.count(name) > 1:
                first = ids.index(name)
                raise self._error(
                    f"{name} stands in '{section}' {ids.count(name)} times; "
                    f"name one by its index, such as '{section}.{first}'"
                )
            if name in ids:
                return items[ids.index(name)], rest[count:]
        meant = nearest(".".join(rest[:2]), ids) or nearest(rest[0], ids)
        raise self._error(f"'{section}' has no entry {show('.'.join(rest[:2]))}", meant)

    def _item(self, node: Node, element: str) -> Node:
        items = node.items or []
        if not element.isdecimal():
            raise self._error(f"{show(element)} should be an index into a list")
        return items[self._index(element, len(items), "the list")]

    def _index(self, element: str, count: int, owner: str) -> int:
        if len(element) > 6 or int(element) >= count:
            last = f"the last is {count - 1}" if count else "it is empty"
            raise self._error(f"{owner} has no entry {element[:20]}; {last}")
        return int(element)

    def _entry(self, node: Node, name: str) -> Node:
        if node.entries is None:
            if node.value is not None:
                raise self._error(f"{show(node.value)} has no {show(name)} below it")
            node.entries = []
        entry = node.entry(name)
        if entry is None:
            entry = Entry(name, 1, 1, Node(FILE, 1, 1))
            node.entries.append(entry)
        return entry.node

    def _error(self, message: str, suggestion: str = "") -> SpecError:
        return _error(self.key, 1, message, suggestion)


def _error(key: str, column: int, message: str, suggestion: str = "") -> SpecError:
    return SpecError([Problem(FILE, 1, column, key, message, suggestion)])
