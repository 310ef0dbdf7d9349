"""Names of caches in ONNX files, as `Generation.onnx_names` gives them."""

from __future__ import annotations

import re

_CACHE = re.compile(r"(past|present)_(key|value)_(\d+)")
_CROSS = re.compile(r"cross_(key|value)_(\d+)")
_STEM = {"past": "past_key_values", "present": "present"}
_MAIN = {"input_features": "audio_features"}


def onnx_forms(name: str) -> tuple[str, ...]:
    """The names that an input or output may have in an ONNX file, its own first.

    `past_key_3` is `past_key_values.3.key` in a decoder that runs alone, and `past_key_self_3` in
    one that looks at an encoder.
    """
    if found := _CACHE.fullmatch(name):
        stem, kind, layer = found.groups()
        return name, f"{_STEM[stem]}.{layer}.{kind}", f"{stem}_{kind}_self_{layer}"
    if found := _CROSS.fullmatch(name):
        kind, layer = found.groups()
        return name, f"past_{kind}_cross_{layer}", f"present_{kind}_cross_{layer}"
    return (name, _MAIN[name]) if name in _MAIN else (name,)
