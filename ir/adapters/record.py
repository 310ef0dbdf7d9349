"""The record of a program's adapters: names of their tensors, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program

FACT = "adapters"
"""Key of the record among a program's facts."""


@dataclass(frozen=True)
class Adapter:
    """One adapter: what a pass of the family adapt has put into a program.

    Attributes:
        name: that merging, saving and switching call it by.
        kind: id of the pass.
        options: of that pass, resolved.
        layers: for every adapted layer the names of the adapter's tensors, by their part in it.
        scales: the factor of the change, by layer; 1 where a layer is not named.
        residual: whether a part of the weights has moved into the adapter, so that it goes with
            what is left of them and not with the original's.
        frozen: parameters that were trainable before.
        shared: tensors that belong to no single layer, by their part.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, str]]
    scales: Mapping[str, float] = field(default_factory=dict)
    residual: bool = False
    frozen: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> list[str]:
        """Names of all tensors, in the order of the layers."""
        own = [name for parts in self.layers.values() for name in parts.values()]
        return list(dict.fromkeys([*own, *self.shared.values()]))


def adapters(program: Program | Editor) -> dict[str, Adapter]:
    """The adapters of a program, by name, in the order they were put in."""
    found: dict[str, Adapter] = {}
    for name, row in dict(program.facts.get(FACT, {})).items():
        found[name] = Adapter(**{**row, "name": name, "frozen": tuple(row["frozen"])})
    return found


def find_adapter(program: Program, name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        ArgumentError: there is none; names those that there are.
    """
    known = adapters(program)
    if name not in known:
        there = ", ".join(map(repr, known)) or "none"
        raise ArgumentError(f"the program has no adapter {name!r}", fix=f"It has {there}.")
    return known[name]


def record(editor: Editor, adapter: Adapter) -> None:
    """Adds an adapter to the facts of an edited program."""
    row = {key: value for key, value in asdict(adapter).items() if key != "name"}
    row["frozen"] = list(adapter.frozen)
    editor.facts[FACT] = {**editor.facts.get(FACT, {}), adapter.name: row}
    editor.changed = True


def forget(editor: Editor, name: str) -> None:
    """Takes an adapter out of the facts of an edited program."""
    rows = {key: row for key, row in editor.facts.get(FACT, {}).items() if key != name}
    editor.facts[FACT] = rows
    if not rows:
        del editor.facts[FACT]
    editor.changed = True
