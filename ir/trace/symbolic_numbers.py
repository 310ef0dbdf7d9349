"""`int(t * 0.5)`, `float(t)` and `len(x)` in a model's code as sizes, and not as numbers.

Python asks these for a plain number, so that a trace answers for the example's size. In
the modules that the model's code is in, other functions of these names take sizes as torch does.
They stand there during an export alone; what they make of the model is checked without them.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

LIBRARIES = frozenset({"torch", "graphwright", "builtins"})
"""Packages whose own code knows sizes."""


class _Numbers(type):
    """A number type that is the built-in one in all but what it makes of sizes."""

    plain: type
    of_size: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.SymInt | torch.SymFloat):
            return cls.of_size(args[0])
        return cls.plain(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.plain)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.plain)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.plain

    def __hash__(cls) -> int:
        return hash(cls.plain)


class _Int(builtins.int, metaclass=_Numbers):
    plain = builtins.int
    of_size = staticmethod(torch.sym_int)


class _Float(builtins.float, metaclass=_Numbers):
    plain = builtins.float
    of_size = staticmethod(torch.sym_float)


def _len(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim():
        return value.shape[0]
    return builtins.len(value)


@contextlib.contextmanager
def symbolic_numbers(model: nn.Module) -> Iterator[None]:
    """Puts `int`, `float` and `len` that know sizes into the modules of the model's packages."""
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    packages -= LIBRARIES | set(sys.stdlib_module_names) - {"__main__"}
    places = [
        vars(module)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in packages and module is not None
    ]
    changed = []
    for place in places:
        for name, number in (("int", _Int), ("float", _Float), ("len", _len)):
            if name not in place:
                place[name] = number
                changed.append((place, name))
    try:
        yield
    finally:
        for place, name in changed:
            place.pop(name, None)
