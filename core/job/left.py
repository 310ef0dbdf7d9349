"""Weights that compression left as they are, said in a line of the summary for each family."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.ir.graph.cost import LayerCost
    from graphwright.ir.program import Program

LEAST_SHARE = 0.01
"""Share of the weight bytes from which on the line is there: biases and norms stay below it."""

_SHOWN = 6


@dataclass(frozen=True)
class _Family:
    """What a family of passes does to weights, layer by layer.

    Attributes:
        prefix: of the ids.
        done: what its weights are behind it.
        tables: whether it looks at what is no product too: embedding tables, transposed
            convolutions.
        refusals: whether a layer that it names and does not change is one that it could not.
    """

    prefix: str
    done: str
    tables: bool
    refusals: bool


_FAMILIES = (
    _Family("quantize.", "quantized", tables=True, refusals=True),
    _Family("prune.", "pruned", tables=False, refusals=True),
    _Family("compensate.", "compensated", tables=False, refusals=False),
)


def left_as_they_are(program: Program, records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for the weights that no pass of a family has changed, for each that has such.

    Layers outside the passes' `targets` do not count: the spec leaves them out. A pass that acts
    on groups of channels, whatever the layer, says nothing.

    Args:
        program: the result of the chain.
        records: rows of the passes, as in the report.
    """
    from graphwright.ir.graph.cost import cost
    from graphwright.ir.layers.kinds import SEVERAL
    from graphwright.ir.layers.selectors import layers

    found = layers(program)
    named = {name for layer in found for name in layer.names}
    parts: dict[str, list[str]] = {}
    for part in found:
        if part.kind in SEVERAL:
            parts.setdefault(part.node.name, []).append(part.name)
    costs = cost(program)
    lines = []
    for family in _FAMILIES:
        rows = [row for row in records if _acts_on_layers(row, family, named)]
        left = list(_left(costs.layers, parts, rows, family)) if rows else []
        size = sum(layer.weight_bytes for layer, _ in left) / max(1, costs.weight_bytes)
        if size >= LEAST_SHARE:
            values = sum(layer.parameters for layer, _ in left) / max(1, costs.parameters)
            passes = ", ".join(dict.fromkeys(row["id"] for row in rows))
            lines.append(
                f"{passes}: {size:.0%} of the weight bytes ({values:.0%} of the parameters) are "
                f"not {family.done}: {_shown(left)}"
            )
    return lines


def _acts_on_layers(row: dict[str, Any], family: _Family, named: Collection[str]) -> bool:
    """Whether a pass is one of the family, and changed a layer."""
    is_lossy = row["id"].startswith(family.prefix) and row["contract"] == "lossy"
    return is_lossy and any(done and name in named for name, _, _, done in row["actions"])


def _left(
    costs: Sequence[LayerCost],
    parts: dict[str, list[str]],
    rows: Sequence[dict[str, Any]],
    family: _Family,
) -> Iterator[tuple[LayerCost, str]]:
    """Layers that no pass has changed and some pass could not, with the reason where it told.

    `parts` names the weights of calls that read several; one that is left speaks for its call.
    """
    from graphwright.ir.layers.kinds import CODABLE, STORED, TABLE, TABLES

    changed, reasons = set(), {}
    for name, _, reason, is_changed in (action for row in rows for action in row["actions"]):
        changed |= {name} if is_changed else set()
        reasons[name] = reason
    for layer in costs:
        left = [n for n in parts.get(layer.node, [layer.name]) if n not in changed]
        if not left:
            continue
        name = left[0]
        is_seen = layer.kind in CODABLE and (family.tables or layer.kind not in TABLES)
        refused = family.refusals and is_seen and name in reasons
        unknown = layer.kind not in TABLE or (
            not family.tables and layer.kind in STORED and layer.kind not in TABLES
        )
        if refused or unknown:
            yield layer, reasons.get(name, "")


def _shown(left: Sequence[tuple[LayerCost, str]]) -> str:
    sizes: dict[str, int] = {}
    texts: dict[str, str] = {}
    for layer, reason in left:
        sizes[layer.name] = sizes.get(layer.name, 0) + layer.weight_bytes
        texts.setdefault(layer.name, f"{layer.kind}{': ' if reason else ''}{reason}")
    largest = sorted(sizes, key=lambda name: -sizes[name])
    shown = [f"{name} ({texts[name]})" for name in largest[:_SHOWN]]
    shown += [f"{len(largest) - _SHOWN} more"] if len(largest) > _SHOWN else []
    return ", ".join(shown)
