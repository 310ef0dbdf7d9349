"""Names of caches in ONNX files."""

from __future__ import annotations

import re

_CACHE = re.compile(r"(past|present)_(key|value)_(\d+)")
_STEM = {"past": "past_key_values", "present": "present"}


def onnx_name(name: str) -> str:
    """`past_key_3` as clients of ONNX files look for it: `past_key_values.3.key`."""
    found = _CACHE.fullmatch(name)
    return f"{_STEM[found[1]]}.{found[3]}.{found[2]}" if found else name
