"""The table of translations, by operator overload; files of this folder fill it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TABLE: dict[Any, Callable[..., Any]] = {}
"""Operator overload -> translation, called as `fn(emitter, node, *args, **kwargs)`."""


def translates(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a translation for operator overloads (or Python builtins) found in FX graphs."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            TABLE[target] = function
        return function

    return register
