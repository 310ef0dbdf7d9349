"""Transformation passes, one folder per family: `graphwright.passes.quantize.Int8(...)`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Families are imported when they are first named."""
    import importlib

    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"no pass family {name!r}") from None


def lazy_family(package: str, path: list[str]) -> Any:
    """`__getattr__` of a family: a class name imports the file that holds it."""

    def find(name: str) -> Any:
        import importlib
        import pkgutil

        for module in pkgutil.iter_modules(path):
            own = "".join(part.capitalize() for part in module.name.split("_"))
            if own == name and not module.name.startswith("_"):
                return getattr(importlib.import_module(f"{package}.{module.name}"), name)
        raise AttributeError(f"no pass {name!r} in {package}")

    return find
