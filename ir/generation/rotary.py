"""Rotary positions whose frequencies follow the longest text, held to those of the model's length.

With `rope_type: dynamic` a model computes its frequencies anew for every text longer than it was
made for, a branch on the values of positions that no graph can hold; keys in a cache would be of
other frequencies, too. Within that length they never change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

DYNAMIC = "dynamic"


@contextlib.contextmanager
def fixed_rotary(model: nn.Module) -> Iterator[None]:
    """Keeps the frequencies of a model with `rope_type: dynamic` as they are up to its length."""
    parts: list[Any] = [
        part for part in model.modules()
        if isinstance(kind := getattr(part, "rope_type", None), str) and DYNAMIC in kind
        and hasattr(part, "original_inv_freq")
    ]  # fmt: skip
    before = [(part.rope_type, part.inv_freq) for part in parts]
    for part in parts:
        part.rope_type, part.inv_freq = "default", part.original_inv_freq
    try:
        yield
    finally:
        for part, (kind, frequencies) in zip(parts, before, strict=True):
            part.rope_type, part.inv_freq = kind, frequencies
