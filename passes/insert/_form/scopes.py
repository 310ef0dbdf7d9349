"""Outputs of a network's own modules, found by their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import fx

from graphwright.ir.errors import ModelError


def scope_output(graph: fx.Graph, name: str) -> fx.Node | None:
    """The one value of a module that is read outside of it; None where there are more or none."""
    inside = {node for node in graph.nodes if name in _scopes(node)}
    found = [node for node in inside if any(user not in inside for user in node.users)]
    return found[0] if len(found) == 1 else None


def select_scopes(graph: fx.Graph, patterns: Sequence[str], by: str) -> list[str]:
    """Names of the modules that the patterns match, in the order they run.

    Raises:
        ModelError: a pattern matches no module; names near misses.
    """
    names = list(dict.fromkeys(name for node in graph.nodes for name in _scopes(node) if name))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ModelError(
                f"{by}: {pattern!r} matches no module of the network",
                fix=f"Did you mean one of {', '.join(map(repr, near))}? ({len(names)} in all)",
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _scopes(node: fx.Node) -> list[str]:
    return list(node.meta.get("nn_module_stack", {}))
