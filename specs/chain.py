"""Whether passes may follow each other and the backends can lower them, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from graphwright.ir.declarations import EVERY_DTYPE
from graphwright.specs.document import Node
from graphwright.specs.entries import chain_nodes, entry_id
from graphwright.specs.schema import PassFacts, Schema
from graphwright.specs.translate import Finding

CAST = "cast.dtype"
"""The pass that changes what the passes behind it compute in."""


@dataclass(frozen=True)
class _Link:
    """A known pass at its place in the chain."""

    index: int
    line: int
    facts: PassFacts
    options: dict[str, Any]
    takes: tuple[str, ...]
    codes: tuple[str, ...]
    """Kinds of layers that it takes, and that are codes behind it, by itself or by a quantizer
    inside."""
    computes_in: tuple[str, ...]
    """Floating-point dtypes that it takes, and a quantizer inside as well."""

    @property
    def place(self) -> str:
        return f"{self.facts.id} (passes[{self.index}], line {self.line})"


def chain_findings(root: Node, schema: Schema) -> Iterator[Finding]:
    """Illegal orders, conflicting passes, and passes that a chosen backend cannot lower."""
    links = [
        _link(index, node, facts, schema)
        for index, node in enumerate(chain_nodes(root, "passes"))
        if (facts := schema.facts(entry_id(node))) is not None
    ]
    lock = root.plain().get("lock") if root.is_mapping else None
    done = lock.get("behind") if isinstance(lock, dict) else None
    done = [name for name in done if isinstance(name, str)] if isinstance(done, list) else []
    seen: dict[str, _Link] = {}
    for place, later in enumerate(links):
        found = [f for earlier in seen.values() if (f := _pair(earlier, later)) is not None]
        found = found or [f for f in (_alone(links[:place], later, done),) if f is not None]
        yield from found[:1]  # one move puts it before them all
        seen.setdefault(later.facts.id, later)
    sampling = [link for link in links if link.facts.id.startswith("sample.")]
    if sampling and root.is_mapping and root.plain().get("evaluate") is not None:
        message = (
            f"a metric compares outputs of the network, and {sampling[0].place} makes others; "
            "remove this section, or evaluate a spec without the passes of sample"
        )
        yield Finding(("evaluate",), message)
    backends = [entry_id(node) for node in chain_nodes(root, "lower")]
    if sampling and len(backends) > 1:
        yield Finding(("lower", 1), "a bundle is of one backend; remove one of the two")
    known = schema.names("backend")
    for place, backend in enumerate(backends):
        if backend in backends[:place]:
            first = backends.index(backend)
            message = f"{backend} is already there as lower[{first}]; remove one of the two"
            yield Finding(("lower", place), message)
        elif backend in known:
            yield from _not_lowered(links, backend, root.locate(("lower", place))[0])


def _link(index: int, node: Node, facts: PassFacts, schema: Schema) -> _Link:
    """A pass with its options as they will be; one that is no mapping is found elsewhere."""
    given = node.entries[0].node.plain() if node.entries else None
    options = {**schema.defaults(facts.id), **(given if isinstance(given, dict) else {})}
    inside = schema.facts(str(options.get("quantizer")))
    weights = facts if inside is None else inside
    ids = [facts.id] if inside is None else [facts.id, inside.id]
    dtypes = tuple(d for d in EVERY_DTYPE if all(d in schema.computes_in(name) for name in ids))
    return _Link(index, node.line, facts, options, weights.takes, weights.codes, dtypes)


def _alone(earlier: list[_Link], link: _Link, done: list[str]) -> Finding | None:
    """The problem of a pass that nothing in front of it gives work to, or leaves any."""
    facts, path = link.facts, ("passes", link.index)
    has_work = any(_gives_work(facts.behind, other.facts.id, other.options) for other in earlier)
    has_work = has_work or any(_gives_work(facts.behind, name, None) for name in done)
    if facts.behind and not has_work:
        wanted = ", ".join(name for name in facts.behind if not name.startswith("!"))
        message = f"{facts.id} has nothing to do without one of these in front of it: {wanted}"
        return Finding(path, message)
    for other in earlier:
        if _takes_all(other, link):
            message = (
                f"{facts.id} finds only codes: {other.place} quantizes the same layers; give the "
                "two different `targets`, or remove one"
            )
            return Finding(path, message)
    casts = [other for other in earlier if other.facts.id == CAST]
    if casts and not casts[-1].options.get("keep"):
        to = casts[-1].options.get("to")
        if to not in link.computes_in:
            message = f"{facts.id} does not take {to}, which {casts[-1].place} makes"
            return Finding(path, f"{message}; move it up to line {casts[-1].line}")
    return None


def _gives_work(patterns: tuple[str, ...], other: str, options: dict[str, Any] | None) -> bool:
    """Whether a pass is among `behind`: the last pattern that it matches decides. Options that are
    not known may be any."""
    said = False
    for pattern in patterns:
        name, _, option = pattern.removeprefix("!").rstrip("]").partition("[")
        if fnmatchcase(other, name):
            said = not pattern.startswith("!")
            has = options is None or not option or options.get(option) is not None
            said = said and has
    return said


def _takes_all(earlier: _Link, later: _Link) -> bool:
    """Whether all weights that the later pass can work on are codes behind the earlier one."""
    targets = earlier.options.get("targets", ["*"])
    covers = targets == ["*"] or targets == later.options.get("targets")
    return bool(later.takes) and covers and set(later.takes) <= set(earlier.codes)


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
