"""What passes and backends declare, as plain data: rules between options, and dtypes.

Without pydantic, so that a wrong spec is refused before that is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

EVERY_DTYPE = ("float64", "float32", "float16", "bfloat16")
"""Floating-point dtypes; what a pass or a backend computes in where it does not say."""

_WORDS = {
    "len": len, "int": int, "abs": abs, "all": all, "any": any, "bool": bool, "zip": zip,
}  # fmt: skip


class Rule(NamedTuple):
    """A rule between options, as data: the check of a spec asks it without the pass's code.

    Attributes:
        at: the option that the message is about.
        holds: what has to be true, a Python expression of the options by name, as they are in JSON;
            `given` holds the names of those that differ from their defaults.
        message: what is wrong; names of options in braces stand for their values.
    """

    at: str
    holds: str
    message: str

    def is_kept(self, values: Mapping[str, Any], given: Collection[str]) -> bool:
        """Whether options keep the rule.

        Args:
            values: every option, None where it is absent.
            given: names of the options that differ from their defaults.
        """
        names = {"__builtins__": _WORDS, "given": set(given), **values}
        return bool(eval(self.holds, names))  # an expression of ours, never a user's text

    def said(self, values: Mapping[str, Any]) -> str:
        """The message with the values in it."""
        return self.message.format(**values)


def completed(
    default: Mapping[str, Any], given: Mapping[str, Any], displaces: Mapping[str, Collection[str]]
) -> dict[str, Any]:
    """A set of options within another one: what is given, and the other one's default for the rest.

    Args:
        default: the values that the other set of options gives it where nothing is said.
        given: values by option.
        displaces: for an option that is given, those whose `default` says nothing any more.
    """
    gone = {name for option in given for name in displaces.get(option, ())}
    return {**{name: value for name, value in default.items() if name not in gone}, **given}


def only_with(option: str, by: str, owners: Collection[str]) -> Rule:
    """The rule that an option has a part only where option `by` is one of `owners`."""
    holds = f"{option!r} not in given or {by} in {list(owners)!r}"
    return Rule(option, holds, f"{option} has no part in {by} {{{by}}}")
