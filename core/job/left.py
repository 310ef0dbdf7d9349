"""Weights that compression left as they are, said in one line of the summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.ir.program import Program

LEAST_SHARE = 0.01
"""Share of the weight bytes from which on the line is there: biases and norms stay below it."""

_SHOWN = 6


def left_as_they_are(program: Program, records: Sequence[dict[str, Any]]) -> str | None:
    """The line for weights that no quantizing pass of the chain has changed; None without any.

    Layers outside the passes' `targets` do not count: the spec leaves them out.

    Args:
        program: the result of the chain.
        records: rows of the passes, as in the report.
    """
    from graphwright.ir.graph.cost import cost
    from graphwright.ir.layers.kinds import CODABLE, TABLE

    quantized = [row for row in records if _stores_codes(row)]
    if not quantized:
        return None
    changed, reasons = set(), {}
    for name, _, reason, is_changed in (action for row in quantized for action in row["actions"]):
        changed |= {name} if is_changed else set()
        reasons[name] = reason
    costs = cost(program)
    left: dict[str, list[Any]] = {}
    for layer in costs.layers:
        refused = layer.kind in CODABLE and layer.name in reasons
        if layer.name not in changed and (refused or layer.kind not in TABLE):
            row = left.setdefault(layer.name, [layer.kind, 0])
            row[1] += layer.weight_bytes
    share = sum(size for _, size in left.values()) / max(1, costs.weight_bytes)
    if share < LEAST_SHARE:
        return None
    largest = sorted(left, key=lambda name: -left[name][1])
    shown = [_described(name, left[name][0], reasons.get(name, "")) for name in largest[:_SHOWN]]
    shown += [f"{len(largest) - _SHOWN} more"] if len(largest) > _SHOWN else []
    passes = ", ".join(dict.fromkeys(row["id"] for row in quantized))
    return f"{passes}: {share:.0%} of the weight bytes are not quantized: {', '.join(shown)}"


def _stores_codes(row: dict[str, Any]) -> bool:
    is_lossy = row["id"].startswith("quantize.") and row["contract"] == "lossy"
    return is_lossy and any(is_changed for *_, is_changed in row["actions"])


def _described(name: str, kind: str, reason: str) -> str:
    return f"{name} ({kind}{': ' if reason else ''}{reason})"
