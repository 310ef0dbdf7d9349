"""Specs: reading, checking, resolving. Lazy, and without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.specs.files import ready_made_specs
    from graphwright.specs.schema import Schema, shipped_schema
    from graphwright.specs.spec import (
        BackendCall,
        PassCall,
        Spec,
        load_spec,
        parse_spec,
        resolve,
        write_lock,
    )

__all__ = [
    "BackendCall", "PassCall", "Schema", "Spec", "load_spec", "parse_spec", "ready_made_specs",
    "resolve", "shipped_schema", "write_lock",
]  # fmt: skip

_HOME = {"ready_made_specs": "files", "Schema": "schema", "shipped_schema": "schema"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"graphwright.specs.{_HOME.get(name, 'spec')}"), name)
