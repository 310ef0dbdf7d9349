"""How deep things hold each other, found without recursion."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every entry of a JSON document that holds no others, at any depth; items of
    a list have the key of the list."""
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        key, inner = pending.pop()
        if isinstance(inner, Mapping):
            pending += [(str(name), part) for name, part in inner.items()]
        elif isinstance(inner, list):
            pending += [(key, part) for part in inner]
        else:
            yield key, inner


def measure(inner: Mapping[Key, Iterable[Key]], most: int = 10**9) -> tuple[int, int]:
    """(levels, ways) of a graph of things that hold others.

    Args:
        inner: what each thing holds; one that is no key holds nothing.
        most: where the count of ways ends.

    Returns:
        The number of things on the longest way down, and the number of ways from a thing to
        innermost ones, where there are most. A thing that holds itself is not entered again.
    """
    done: dict[Key, tuple[int, int]] = {}
    for root in inner:
        pending = [root]
        while pending:
            key = pending[-1]
            parts = inner.get(key, ())
            if key not in done:
                done[key] = (0, 1)
                pending += [part for part in parts if part not in done]
                continue
            pending.pop()
            if not done[key][0]:
                sizes = [done[part] for part in parts]
                levels = max((size[0] for size in sizes), default=0)
                done[key] = (levels + 1, min(sum(size[1] for size in sizes) or 1, most))
    levels = max((size[0] for size in done.values()), default=0)
    return levels, max((size[1] for size in done.values()), default=1)
