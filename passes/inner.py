"""A pass that another pass runs: found by its name, and made with the options it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphwright.ir.errors import ArgumentError
from graphwright.passes.base import Pass
from graphwright.passes.registry import find_pass


def inner_pass(name: str, wanted: Sequence[str], given: Mapping[str, Any], fix: str) -> Pass:
    """The pass of a name.

    Args:
        name: as `quantize.gptq`.
        wanted: options that it has to have.
        given: its options.
        fix: which ones have them.

    Raises:
        ArgumentError: there is none of that name, it lacks an option, or does not take one.
    """
    cls = find_pass(name)
    if not set(wanted) <= set(cls.Options.model_fields):
        *others, last = (f"`{option}`" for option in wanted)
        raise ArgumentError(f"{name} has no options {', '.join(others)} and {last}", fix=fix)
    return cls(**given)


def fits(option: str, make: Callable[[], Pass]) -> None:
    """Asks once, while options are checked, whether an inner pass can be made.

    Raises:
        ValueError: it cannot; says so at the option that names it.
    """
    try:
        make()
    except ArgumentError as error:
        raise ValueError(f"{option}: {error}") from None
