"""One hostile file: how it is made, and how it is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAG = "ran.txt"
"""What code in a hostile file creates in the working folder."""

FACTORY = """
from torch import nn
def build(): return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
"""
SECTION = {"factory": "factory_of_tests:build"}


class Creates:
    """Creates the flag when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, (FLAG, "w")


class Shells:
    """Creates it through the shell."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {FLAG}",)


class Evaluates:
    """Creates it through an expression."""

    def __reduce__(self) -> Any:
        return eval, (f"open({FLAG!r}, 'w')",)


class Restores:
    """Creates it from the state that is set behind the object."""

    def __reduce__(self) -> Any:
        return Restores, (), (Creates(),)


@dataclass(frozen=True)
class Hostile:
    """A file that must be refused.

    Attributes:
        make: writes it into a folder and returns what to open.
        says: part of the message.
        factory: whether a factory is named, so that weights alone would do.
        is_harmless: it may also open, as long as nothing runs.
    """

    make: Callable[[Path], Path]
    says: str = ""
    factory: bool = False
    is_harmless: bool = False


def content(data: Callable[[], bytes], name: str = "m.pt") -> Callable[[Path], Path]:
    """A maker that writes these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data())
        return folder / name

    return make
