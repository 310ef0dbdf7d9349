"""Code of the user's own that a spec or a flag names: said when it runs, and refused on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from graphwright.ir.errors import ArgumentError


@dataclass
class Door:
    """The one way in for code that is not ours.

    Attributes:
        is_open: whether such code may run.
        say: told of each piece before it runs.
        ran: what ran, in order, each once.
    """

    is_open: bool = True
    say: Callable[[str], None] | None = None
    ran: list[str] = field(default_factory=list)


_doors = [Door()]
"""The innermost counts; threads of a run share it."""


@contextmanager
def watched(*, no_code: bool = False, say: Callable[[str], None] | None = None) -> Iterator[Door]:
    """Notes the user's code that runs in the block.

    Args:
        no_code: refuse it instead.
        say: prints a line.
    """
    door = Door(not no_code, say)
    _doors.append(door)
    try:
        yield door
    finally:
        _doors.remove(door)


def admit(name: str, why: str) -> None:
    """Called just before code of the user's is imported or run.

    Args:
        name: as `package.module:function`, or a file.
        why: what asks for it.

    Raises:
        ArgumentError: the run was started with --no-code.
    """
    door = _doors[-1]
    if not door.is_open:
        raise ArgumentError(
            f"{why} asks to run code, which --no-code forbids",
            where=name,
            fix="Leave out --no-code if you trust it.",
        )
    text = f"{why}: {name}"
    if text not in door.ran:
        door.ran.append(text)
        if door.say is not None:
            door.say(f"runs code: {text}")
