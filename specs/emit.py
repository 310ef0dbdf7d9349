"""Writes plain data as YAML 1.2 that reads back as the same data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from graphwright.specs.load import resolve_scalar

_PLAIN = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
_ESCAPED = re.compile(r"[\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff\u2028\u2029]")


def to_yaml(document: Mapping[str, Any]) -> str:
    """Plain data as YAML 1.2 that reads back as the same data.

    PyYAML's own writer follows YAML 1.1: it leaves the text `1e-4` unquoted, a number in 1.2.
    """
    return "".join(_lines(document, 0))


def _lines(value: Any, depth: int) -> list[str]:
    indent = "  " * depth
    lines = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            lines += _entry(f"{indent}{_text(str(key), is_key=True)}:", item, depth)
    else:
        for item in value:
            if isinstance(item, Mapping) and len(item) == 1 and not _flow(item):
                ((key, inner),) = item.items()
                lines += _entry(f"{indent}- {_text(str(key), is_key=True)}:", inner, depth + 1)
            else:
                lines += _entry(f"{indent}-", item, depth)
    return lines


def _entry(head: str, item: Any, depth: int) -> list[str]:
    if flow := _flow(item):
        return [f"{head} {flow}\n"]
    return [f"{head}\n", *_lines(item, depth + 1)]


def _flow(value: Any) -> str:
    """The value in one line when it is short enough for that, else ""."""
    if isinstance(value, Mapping):
        if any(isinstance(item, Mapping) for item in value.values()):
            return ""
        parts = [(_text(str(k), is_key=True), _flow(v)) for k, v in value.items()]
        text = "{" + ", ".join(f"{key}: {part}" for key, part in parts) + "}"
        fits = all(part for _, part in parts) and len(text) <= 80
        return text if fits else ""
    if isinstance(value, list | tuple):
        parts_of = [_flow(item) for item in value]
        text = "[" + ", ".join(parts_of) + "]"
        return text if all(parts_of) and (len(text) <= 80 or not value) else ""
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    if isinstance(value, int | float):
        return repr(value)
    return _text(str(value))


def _text(text: str, *, is_key: bool = False) -> str:
    if _PLAIN.fullmatch(text) and (is_key or isinstance(resolve_scalar(text), str)):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return _ESCAPED.sub(lambda m: f"\\u{ord(m.group()):04x}", quoted)
