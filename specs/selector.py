"""Syntax of `targets`: globs over layer names, `kind:` patterns, and `!` to exclude.

What a pattern matches is known once the model is traced (`graphwright.ir.layers.selectors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from graphwright.specs.document import show
from graphwright.specs.nearest import nearest


def pattern_faults(patterns: Sequence[str], kinds: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(index, what is wrong, suggestion) for every malformed pattern.

    Args:
        patterns: as they stand in the spec.
        kinds: valid names after `kind:`.
    """
    seen: dict[str, int] = {}
    for index, pattern in enumerate(patterns):
        sign = "!" if pattern.startswith("!") else ""
        fault, suggestion = _fault(pattern[len(sign) :], kinds)
        if not fault and pattern in seen:
            fault = f"{show(pattern)} stands twice; the first is entry {seen[pattern]}"
        seen.setdefault(pattern, index)
        if fault:
            yield index, fault, f"{sign}{suggestion}" if suggestion else ""


def excludes_only(patterns: Sequence[str]) -> bool:
    """Whether there are patterns and none of them includes anything."""
    return bool(patterns) and all(pattern.startswith("!") for pattern in patterns)


def _fault(pattern: str, kinds: Sequence[str]) -> tuple[str, str]:
    stripped = pattern.strip()
    if not stripped:
        return "an empty pattern; expected a glob such as '*.attention.*' or 'kind:linear'", ""
    if stripped != pattern or any(c.isspace() for c in pattern):
        return f"{show(pattern)} holds a space; a layer name has none", "".join(pattern.split())
    if pattern.startswith("!"):
        return f"{show(pattern)} has more than one '!'", pattern.lstrip("!")
    prefix, colon, kind = pattern.partition(":")
    if colon:
        return _kind_fault(pattern, prefix, kind, kinds)
    return _glob_fault(pattern)


def _kind_fault(pattern: str, prefix: str, kind: str, kinds: Sequence[str]) -> tuple[str, str]:
    meant = kind if kind in kinds else nearest(kind, kinds)
    if prefix != "kind":
        message = f"{show(pattern)}: nothing but 'kind' can stand before ':'"
        return message, f"kind:{meant}" if meant else ""
    fault, _ = _glob_fault(kind) if kind else ("no kind after ':'", "")
    if fault or any(fnmatchcase(known, kind) for known in kinds):
        return fault, ""
    message = f"no kind of layer named {show(kind)}"
    if not meant:
        message += f"; there are {', '.join(kinds)}"
    return message, f"kind:{meant}" if meant else ""


def _glob_fault(pattern: str) -> tuple[str, str]:
    depth = 0
    for character in pattern:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            break
    if depth:
        return f"{show(pattern)} has brackets that do not pair", ""
    if "[]" in pattern:
        return f"{show(pattern)} has empty brackets, which match nothing", ""
    if ".." in pattern or "/" in pattern:
        joined = pattern.replace("/", ".").replace("..", ".")
        return f"{show(pattern)}: parts of a layer name are joined by one dot", joined
    if "," in pattern or ";" in pattern:
        return f"{show(pattern)} holds several patterns; each is an entry of its own", ""
    foreign = next((c for c in pattern if c in "^$\\(){}|+"), "")
    if foreign:
        return (
            f"{show(pattern)}: {show(foreign)} belongs to regular expressions, this is a glob",
            "",
        )
    return "", ""
