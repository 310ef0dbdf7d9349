"""The space of a search: specs that differ from the written one in what `search.space` names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graphwright.specs.document import CHAINS, Node
from graphwright.specs.entries import chain_nodes, entry_id
from graphwright.specs.overrides import elements_of, put

LEFT_OUT = "none"
"""In the place of an entry of a chain: the candidate does not have it."""

SEARCHED = ("passes", "lower", "calibration", "training")
"""Sections that may vary; the others say what is asked for."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, `step` apart; `step` is None for any number."""

    low: int | float
    high: int | float
    step: int | float | None
    log: bool

    @classmethod
    def of(cls, written: dict[str, Any]) -> Range:
        """From the plain section; `high` is the last value that a step leads to."""
        low, high = written["range"]
        step, log = written.get("step"), bool(written.get("log"))
        whole = all(isinstance(value, int) for value in (low, high, 1 if step is None else step))
        if whole and step is None:
            step = 1
        if not whole:
            low, high = float(low), float(high)
        if step is not None and not log:
            high = low + int((high - low) / step + 1e-9) * step
        return cls(low, high, step, log)

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int)

    def listed(self) -> list[int | float] | None:
        """All its values; None where it has no step."""
        if self.step is None:
            return None
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return [self.low + index * self.step for index in range(count)]


@dataclass(frozen=True)
class Choice:
    """One place of the spec and the values it may have.

    Attributes:
        path: the place, as `--set` names it.
        node: the entry of `search.space`; its place in the file.
        values: the listed values; empty for a range.
        range: the range; None where values are listed.
    """

    path: str
    node: Node
    values: tuple[Node, ...]
    range: Range | None

    @property
    def elements(self) -> list[str]:
        """The parts of the path."""
        return elements_of(self.path)

    @property
    def is_entry(self) -> bool:
        """Whether it is about an entry of a chain as a whole: by index, or by id."""
        elements = self.elements
        if elements[0] not in CHAINS or len(elements) < 2:
            return False
        if len(elements) == 2:
            return True
        return all(n.value == LEFT_OUT or _is_entry(n) for n in self.values) and bool(self.values)

    def number(self, value: int | float) -> Node:
        """A value of the range at the place where the range stands."""
        return Node(self.node.file, self.node.line, self.node.column, value)

    def ends(self) -> tuple[Node, ...]:
        """The listed values, or the two ends of the range."""
        if self.range is None:
            return self.values
        return self.number(self.range.low), self.number(self.range.high)


def _is_entry(node: Node) -> bool:
    return "." in entry_id(node)


Picks = Sequence[tuple[Choice, Node]]


@dataclass(frozen=True)
class Space:
    """All candidates around a written spec."""

    root: Node
    choices: tuple[Choice, ...]

    @classmethod
    def of(cls, root: Node) -> Space:
        """The space of a document whose section `search` fits the schema."""
        entries = root.locate(("search", "space"))[0].entries or []
        choices = []
        for entry in entries:
            listed, written = entry.node.entry("choices"), entry.node.plain()
            values = tuple(listed.node.items or ()) if listed is not None else ()
            span = None if listed is not None else Range.of(written)
            choices.append(Choice(entry.name, entry.node, values, span))
        return cls(root, tuple(choices))

    def candidate(self, picks: Picks) -> Node:
        """The document with values at their places, and without the section `search`.

        Raises:
            SpecError: a path leads nowhere.
        """
        document = self._bare()
        for choice, value in picks:
            put(document, choice.path, copy.deepcopy(value))
        for section in CHAINS:
            entry = document.entry(section)
            if entry is not None and entry.node.items is not None:
                kept = [node for node in entry.node.items if node.value != LEFT_OUT]
                entry.node.items = kept
        return document

    def is_asked(self, choice: Choice, picks: Picks) -> bool:
        """Whether a candidate has the place, what comes earlier in the space being picked.

        A place by index is there unless its entry is left out; one by id, where an entry has the
        id.
        """
        elements = choice.elements
        if elements[0] not in CHAINS or len(elements) < 2:
            return True
        document = self._bare()
        for other, value in picks:
            put(document, other.path, copy.deepcopy(value))
        names = [entry_id(node) for node in chain_nodes(document, elements[0])]
        if elements[1].isdecimal():
            index = int(elements[1])
            return index >= len(names) or names[index] != LEFT_OUT
        ids = {".".join(elements[1:end]) for end in range(2, len(elements) + 1)}
        return not ids.isdisjoint(names)

    def contexts(self, choice: Choice) -> Iterator[Picks]:
        """What may be picked before a choice: nothing, or one alternative of an entry."""
        yield ()
        for other in self.choices[: self.choices.index(choice)]:
            if other.is_entry:
                for value in other.values:
                    yield ((other, value),)

    def all_picks(self) -> Iterator[list[tuple[Choice, Node]]]:
        """Every candidate, the last choice turning fastest; ranges have to have steps."""
        yield from self._after([])

    def _after(self, picks: list[tuple[Choice, Node]]) -> Iterator[list[tuple[Choice, Node]]]:
        rest = self.choices[len(picks) :]
        if not rest:
            yield [(choice, value) for choice, value in picks if value is not _PASSED_OVER]
            return
        choice = rest[0]
        made = [(c, v) for c, v in picks if v is not _PASSED_OVER]
        values: tuple[Node, ...] = (_PASSED_OVER,)
        if self.is_asked(choice, made):
            listed = choice.range.listed() if choice.range is not None else None
            values = choice.values if listed is None else tuple(map(choice.number, listed))
        for value in values:
            yield from self._after([*picks, (choice, value)])

    def _bare(self) -> Node:
        document = copy.deepcopy(self.root)
        document.entries = [e for e in document.entries or () if e.name != "search"]
        return document


_PASSED_OVER = Node("", 0, 0)
"""Stands for: the candidate does not have this place."""
