"""Residual units: y = x + f(x), which can go and leave x."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.cost import cost
from graphwright.ir.graph.skips import find_skips
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program


@dataclass(frozen=True)
class Unit:
    """One residual unit without a projection on its skip.

    Attributes:
        name: the scope that its layers share, as `blocks.3.mlp`.
        block: the last numbered scope of it, as `blocks.3`, of which several units may be.
        join: name of the node that adds.
        source: name of the node that stays in its place.
        layers: names of the layers in its body.
        macs: multiply-accumulates of them at the example sizes.
        parameters: their weight values.
    """

    name: str
    block: str
    join: str
    source: str
    layers: tuple[str, ...]
    macs: int
    parameters: int


def find_units(program: Program) -> list[Unit]:
    """The units of a program that can go, in graph order.

    One with a projection changes the width or the size of its input, and stays. So does one in the
    body of another: it goes with that.
    """
    named = {layer.node.name: layer.name for layer in layers(program)}
    costs = {layer.node: layer for layer in cost(program).layers}
    found: list[tuple[Unit, set[fx.Node]]] = []
    for skip in find_skips(program):
        if skip.kind != "add" or skip.projection or skip.is_long:
            continue
        body = [node.name for node in skip.body if node.name in named]
        if not body:
            continue
        names = tuple(dict.fromkeys(named[node] for node in body))
        scope = _shared(names)
        unit = Unit(
            scope, _numbered(scope), skip.join.name, skip.source.name, names,
            sum(costs[node].macs or 0 for node in body if node in costs),
            sum(costs[node].parameters for node in body if node in costs),
        )  # fmt: skip
        found.append((unit, set(skip.body)))
    order = {node.name: number for number, node in enumerate(program.graph.nodes)}
    outermost = [
        unit for unit, body in found
        if not any(body < other for _, other in found)
    ]  # fmt: skip
    return sorted(outermost, key=lambda unit: order[unit.join])


def without(program: Program, units: Collection[Unit], by: str) -> Program:
    """The program with the input of each unit in the place of its result.

    Args:
        program: left as it is; the units are of it.
        units: those that go.
        by: id of the pass.
    """
    editor = Editor(program, by)
    nodes = {node.name: node for node in editor.graph.nodes}
    for unit in units:
        source = nodes[unit.source]
        while source.name in (gone := {u.join: u.source for u in units}):
            source = nodes[gone[source.name]]
        editor.replace(nodes[unit.join], source)
    return editor.finish()


def chosen_units(units: Sequence[Unit], patterns: Sequence[str]) -> list[Unit]:
    """Units whose name, block or layers match a pattern.

    Raises:
        ModelError: a pattern matches none.
    """
    found: list[Unit] = []
    for pattern in patterns:
        matching = [
            unit for unit in units
            if any(fnmatchcase(n, pattern) for n in (unit.name, unit.block, *unit.layers))
        ]  # fmt: skip
        if not matching:
            known = ", ".join(unit.name for unit in units[:8]) or "none"
            raise ModelError(
                f"{pattern!r} matches no residual unit that can go",
                fix=f"Units are: {known}{' ...' if len(units) > 8 else ''}.",
            )
        found += [unit for unit in matching if unit not in found]
    return found


def blocks(units: Sequence[Unit]) -> dict[str, list[Unit]]:
    """Units by block, in order."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(unit.block, []).append(unit)
    return found


def _shared(names: Sequence[str]) -> str:
    """The scope that all names share; of a single layer, the scope around it."""
    parts = [name.split(".") for name in names]
    if len(parts) == 1:
        return ".".join(parts[0][:-1]) or names[0]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) or names[0]


def _numbered(scope: str) -> str:
    """The scope up to its last number; all of it where there is none."""
    parts = scope.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[: last + 1])
