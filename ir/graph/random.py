"""Calls that draw random numbers, so that no two runs give the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir.graph.nodes import gw_meta


def random_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The calls in `graph` that draw random numbers; not dropouts that drop nothing."""
    tag = torch.Tag.nondeterministic_seeded
    found = [node for node in graph.nodes if tag in getattr(node.target, "tags", ())]
    return [node for node in found if not _drops_nothing(node)]


def _drops_nothing(node: fx.Node) -> bool:
    """Whether a call that may drop values, as attention may, is told to drop none."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    arguments = target._schema.arguments
    given: dict[str, Any] = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {a.name: value for a, value in zip(arguments, node.args, strict=False)}
    given |= node.kwargs
    shares = [given[name] for name in ("dropout_p", "dropout", "p") if name in given]
    is_off = any(given.get(name) is False for name in ("train", "training"))
    return is_off or (bool(shares) and all(share == 0 for share in shares))


def named(nodes: Sequence[fx.Node]) -> str:
    """Such calls by name and line, with the verb behind them: `node 'randn' (net.py:7) draws`."""
    parts = []
    for node in nodes[:4]:
        source = gw_meta(node).get("source", "")
        parts.append(f"{node.name!r} ({source})" if source else repr(node.name))
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    return f"node {parts[0]} draws" if len(nodes) == 1 else f"nodes {', '.join(parts)}{more} draw"
