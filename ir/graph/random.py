"""Calls that draw random numbers, so that no two runs give the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphwright.ir.graph.nodes import gw_meta


def random_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The calls in `graph` that draw random numbers."""
    tag = torch.Tag.nondeterministic_seeded
    return [node for node in graph.nodes if tag in getattr(node.target, "tags", ())]


def named(nodes: Sequence[fx.Node]) -> str:
    """Such calls by name and line, with the verb behind them: `node 'randn' (net.py:7) draws`."""
    parts = []
    for node in nodes[:4]:
        source = gw_meta(node).get("source", "")
        parts.append(f"{node.name!r} ({source})" if source else repr(node.name))
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    return f"node {parts[0]} draws" if len(nodes) == 1 else f"nodes {', '.join(parts)}{more} draw"
