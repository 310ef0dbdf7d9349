"""Rules between options that only code can tell: checked before the model is opened.

All others are data, and are checked with the spec (`specs/between.py`). Only passes that have such
rules are imported for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from graphwright.ir.errors import Problem, SpecError
from graphwright.specs.written import written_specs

if TYPE_CHECKING:
    from graphwright.specs.spec import BackendCall, PassCall, Spec


def check_rules(spec: Spec) -> None:
    """Validates the options of every pass and backend by their own models.

    Raises:
        SpecError: options that do not go together; all of them at once.
    """
    found = [p for each in written_specs(spec) for p in _problems(each)]
    problems = list(dict.fromkeys(found))
    if problems:
        raise SpecError(problems)


def dtype_refusal(spec: Spec) -> Callable[[str], str]:
    """Why a dtype cannot be what the spec's model is compiled in; empty where it can.

    Asks every backend and every pass of the spec.
    """
    from graphwright.specs.rules import dtype_fault

    def refusal(dtype: str) -> str:
        return dtype_fault(
            spec.schema,
            dtype,
            [c.id for chain in spec.chains for c in chain],
            [c.id for c in spec.lower],
        )

    return refusal


def _problems(spec: Spec) -> Iterator[Problem]:
    sections: dict[str, tuple[PassCall | BackendCall, ...]] = {
        "passes": spec.passes, "lower": spec.lower,
    }  # fmt: skip
    for section, calls in sections.items():
        for index, call in enumerate(calls):
            facts = spec.schema.definitions[call.id].get("x-graphwright", {})
            if not facts.get("coded_rules") or not call.options:
                continue
            try:
                _options(section, call.id).from_plain(call.options)
            except ValidationError as error:
                for item in error.errors():
                    message = item["msg"].removeprefix("Value error, ")
                    yield spec.problem((section, index, call.id, *item["loc"]), message)


def _options(section: str, name: str) -> Any:
    from graphwright.backends.base import find_backend
    from graphwright.passes.registry import find_pass

    return (find_pass(name) if section == "passes" else find_backend(name)).Options
