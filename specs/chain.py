"""Whether passes may follow each other and the backends can lower them, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from graphwright.specs.document import Node
from graphwright.specs.entries import chain_nodes, entry_id
from graphwright.specs.schema import PassFacts, Schema
from graphwright.specs.translate import Finding


@dataclass(frozen=True)
class _Link:
    """A known pass at its place in the chain."""

    index: int
    line: int
    facts: PassFacts

    @property
    def place(self) -> str:
        return f"{self.facts.id} (passes[{self.index}], line {self.line})"


def chain_findings(root: Node, schema: Schema) -> Iterator[Finding]:
    """Illegal orders, conflicting passes, and passes that a chosen backend cannot lower."""
    links = [
        _Link(index, node.line, facts)
        for index, node in enumerate(chain_nodes(root, "passes"))
        if (facts := schema.facts(entry_id(node))) is not None
    ]
    seen: dict[str, _Link] = {}
    for later in links:
        found = [f for earlier in seen.values() if (f := _pair(earlier, later)) is not None]
        yield from found[:1]  # one move puts it before them all
        seen.setdefault(later.facts.id, later)
    backends = [entry_id(node) for node in chain_nodes(root, "lower")]
    known = schema.names("backend")
    for place, backend in enumerate(backends):
        if backend in backends[:place]:
            first = backends.index(backend)
            message = f"{backend} is already there as lower[{first}]; remove one of the two"
            yield Finding(("lower", place), message)
        elif backend in known:
            yield from _not_lowered(links, backend, root.locate(("lower", place))[0])


def _pair(earlier: _Link, later: _Link) -> Finding | None:
    """The problem with two passes in this order."""
    first, second = earlier.facts, later.facts
    path = ("passes", later.index)
    if _among(second.id, first.conflicts) or _among(first.id, second.conflicts):
        message = f"{second.id} cannot be in a chain with {earlier.place}; remove one of the two"
        return Finding(path, message)
    if _wish(second, first) > _wish(first, second):
        message = f"{second.id} must come before {earlier.place}; move it up to line {earlier.line}"
        return Finding(path, message)
    return None


def _wish(one: PassFacts, other: PassFacts) -> int:
    """The weight of what is declared for `one` before `other`: 2 by name, 1 by a family, 0 nothing.

    A name outweighs a family, and two families that say opposite things leave the order free.
    """
    said = [p for p in one.before if fnmatchcase(other.id, p)]
    said += [p for p in other.after if fnmatchcase(one.id, p)]
    return max((1 if "*" in pattern else 2 for pattern in said), default=0)


def _not_lowered(links: list[_Link], backend: str, node: Node) -> Iterator[Finding]:
    for link in links:
        able = link.facts.lowers_to
        if backend in able:
            continue
        remedy = f"lower to {' or '.join(able)}, or remove the pass" if able else "remove the pass"
        yield Finding(
            ("passes", link.index),
            f"backend {backend} (line {node.line}) cannot lower {link.facts.id}; {remedy}",
        )


def _among(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
