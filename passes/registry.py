"""The passes by their ids: built in, registered in this process, or from entry points."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from graphwright.ir.errors import ArgumentError

if TYPE_CHECKING:
    from graphwright.passes.base import Pass

_OWN: dict[str, type[Pass]] = {}
"""Passes registered in this process with `register`, by id."""


def register(name: str) -> Callable[[type[Pass]], type[Pass]]:
    """Class decorator: makes a pass of one's own known under `family.method`.

    Raises:
        ArgumentError: the id is malformed or already taken by another class.
    """

    def add(cls: type[Pass]) -> type[Pass]:
        family, dot, method = name.partition(".")
        if not (dot and family.isidentifier() and method.isidentifier()):
            raise ArgumentError(f"pass id {name!r} is not of the form family.method")
        taken = _OWN.get(name) or _built_in(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ArgumentError(f"pass id {name!r} is already taken by {taken.__module__}")
        cls.id = name
        _OWN[name] = cls
        return cls

    return add


def pass_ids() -> list[str]:
    """Ids of all built-in passes, from their places in the folder tree; imports none."""
    import graphwright.passes as package

    ids = []
    for family in pkgutil.iter_modules(package.__path__):
        if not family.ispkg:
            continue
        folders = [f"{path}/{family.name}" for path in package.__path__]
        found = (module.name for module in pkgutil.iter_modules(folders))
        ids += [f"{family.name}.{name}" for name in found if not name.startswith("_")]
    return sorted(ids)


def class_name(method: str) -> str:
    """Class name of a method's file: `fold_batch_norm` -> `FoldBatchNorm`."""
    return "".join(part.capitalize() for part in method.split("_"))


def _built_in(name: str) -> type[Pass] | None:
    if name not in pass_ids():
        return None
    module = importlib.import_module(f"graphwright.passes.{name}")
    found: type[Pass] = getattr(module, class_name(name.partition(".")[2]))
    return found


def find_pass(name: str) -> type[Pass]:
    """The class of a pass id: built in, registered, or from an entry point.

    Raises:
        ArgumentError: there is no such pass; names the nearest.
    """
    found = _OWN.get(name) or _built_in(name) or _from_entry_point(name)
    if found is None:
        import difflib

        near = difflib.get_close_matches(name, [*pass_ids(), *_OWN], n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "`graphwright passes` lists them."
        raise ArgumentError(f"no pass named {name!r}", fix=hint)
    return found


def _from_entry_point(name: str) -> type[Pass] | None:
    from importlib.metadata import entry_points

    for point in entry_points(group="graphwright.passes", name=name):
        cls: type[Pass] = point.load()
        cls.id = name
        return cls
    return None


def registered_passes() -> dict[str, type[Pass]]:
    """Every pass registered in this process, by id."""
    return dict(_OWN)


def all_passes() -> dict[str, type[Pass]]:
    """Every built-in pass and every one registered in this process, by id."""
    built_in = {name: find_pass(name) for name in pass_ids()}
    return dict(sorted({**built_in, **_OWN}.items()))
