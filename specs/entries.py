"""The shape of `passes`, `lower` and `export`: a list of bare ids and of one-key mappings.

Two slips of indentation are common enough to be told apart and read as they were meant: options
beside the id instead of below it, and a mapping where a list is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphwright.specs.document import CHAINS, Entry, Node, show
from graphwright.specs.nearest import nearest
from graphwright.specs.schema import Schema
from graphwright.specs.translate import Finding


def entry_id(node: Node) -> str:
    """The id that an entry of a chain names; "" when it names none."""
    if isinstance(node.value, str):
        return node.value
    if node.entries and len(node.entries) == 1:
        return node.entries[0].name
    return ""


def chain_nodes(root: Node, section: str) -> list[Node]:
    """The entries of `passes`, `lower` or `export`, empty when there is no such list."""
    entry = root.entry(section)
    return list(entry.node.items or ()) if entry is not None else []


def straighten(root: Node, schema: Schema) -> Iterator[Finding]:
    """Findings about the shape of the chains; what is clear is put right in the tree."""
    for section in CHAINS:
        entry = root.entry(section)
        if entry is None:
            continue
        if entry.node.entries is not None:
            yield _list_of(section, entry.node)
        for index, node in enumerate(entry.node.items or ()):
            if len(node.entries or ()) > 1:
                yield from _split(section, index, node, schema)


def _list_of(section: str, node: Node) -> Finding:
    """Takes a mapping of ids for the list it should be."""
    entries, node.entries = node.entries or [], None
    node.items = [
        Node(e.node.file, e.line, e.column, entries=[e], size=e.node.size + 1) for e in entries
    ]
    first = f"'- {entries[0].written}'" if entries else "'- name'"
    return Finding((section,), f"expected a list, got a mapping; start each entry with {first}")


def _split(section: str, index: int, node: Node, schema: Schema) -> Iterator[Finding]:
    """An entry of several keys: the options of the first, or entries without their dash."""
    entries = node.entries or []
    head, rest = entries[0], entries[1:]
    names = schema.names(CHAINS[section])
    if nearest(head.name, names) and not any(e.name in names for e in rest) and _can_take(head):
        head.node.entries = [*(head.node.entries or ()), *rest]
        node.entries = [head]
        yield Finding(
            (section, index, head.name, rest[0].name),
            f"{show(rest[0].written)} stands beside {show(head.written)}; "
            "options are indented below it",
            at_key=True,
        )
    else:
        yield Finding(
            (section, index, rest[0].name),
            f"{show(rest[0].written)} stands in the entry of {show(head.written)}; "
            "each entry starts with its own dash",
            at_key=True,
        )
        node.entries = [head]


def _can_take(head: Entry) -> bool:
    return head.node.is_mapping or (head.node.items is None and head.node.value is None)
