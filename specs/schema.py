"""The shipped schema, and the facts about passes and backends it carries."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from graphwright.ir.declarations import EVERY_DTYPE, completed

FILE = Path(__file__).with_name("schema.json")


@dataclass(frozen=True)
class PassFacts:
    """The declarations of a pass's class; see `graphwright.passes.base.Pass`."""

    id: str
    contract: str
    needs: str
    needs_with: tuple[tuple[str, Any, str], ...]
    after: tuple[str, ...]
    before: tuple[str, ...]
    conflicts: tuple[str, ...]
    behind: tuple[str, ...]
    takes: tuple[str, ...]
    codes: tuple[str, ...]
    lowers_to: tuple[str, ...]
    computes_in: tuple[str, ...]
    """Empty for every dtype."""

    def needed(self, options: dict[str, Any], defaults: dict[str, Any]) -> str:
        """The needs of the pass when it has these options."""
        for option, value, needs in self.needs_with:
            if options.get(option, defaults.get(option)) == value:
                return needs
        return self.needs


class Schema:
    """The JSON schema of a spec, with the passes and backends that can stand in it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    @property
    def definitions(self) -> dict[str, Any]:
        """Options by pass id and backend name, and the sections."""
        found: dict[str, Any] = self.document["$defs"]
        return found

    def names(self, role: str) -> list[str]:
        """Ids of all passes (role `pass`) or names of all backends (role `backend`)."""
        return [n for n, d in self.definitions.items() if role in d.get("x-graphwright", {})]

    @cached_property
    def kinds(self) -> list[str]:
        """Layer kinds that a selector may name."""
        found: list[str] = self.document["x-graphwright"]["kinds"]
        return found

    def options(self, name: str) -> dict[str, Any]:
        """Schema of each option of a pass or backend, by option name."""
        found: dict[str, Any] = self.definitions.get(name, {}).get("properties", {})
        return found

    def defaults(self, name: str) -> dict[str, Any]:
        """Default of each option that has one."""
        options = self.options(name).items()
        return {key: copy.deepcopy(opt["default"]) for key, opt in options if "default" in opt}

    def inside(self, name: str, option: str) -> str:
        """The definition of an option that is a set of options; empty for any other."""
        part = self.options(name).get(option, {})
        refs = [p["$ref"] for p in (part, *part.get("anyOf", ())) if "$ref" in p]
        return str(refs[0]).removeprefix("#/$defs/") if refs else ""

    def of_values(self, name: str, option: str) -> str:
        """The definition of each value of an option that is a mapping of sections; else empty."""
        part = self.options(name).get(option, {}).get("additionalProperties")
        ref = part.get("$ref", "") if isinstance(part, dict) else ""
        return str(ref).removeprefix("#/$defs/")

    def completed(self, name: str, option: str, given: dict[str, Any]) -> dict[str, Any]:
        """A set of options inside those of `name`, with their default for what it leaves out."""
        default = self.options(name)[option].get("default") or {}
        facts = self.definitions[self.inside(name, option)].get("x-graphwright", {})
        return completed(default, given, facts.get("displaces", {}))

    def filled(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Options with the defaults of what is not given, at every depth."""
        whole = {**self.defaults(name), **given}
        for option, value in given.items():
            if isinstance(value, dict) and (inside := self.inside(name, option)):
                whole[option] = self.filled(inside, self.completed(name, option, value))
        return whole

    def facts(self, name: str) -> PassFacts | None:
        """The facts about a pass, or None when there is no such pass."""
        found = self.definitions.get(name, {}).get("x-graphwright", {})
        if "pass" not in found:
            return None
        when = tuple((w["option"], w["value"], w["needs"]) for w in found.get("needs_with", ()))
        lists = ("after", "before", "conflicts", "behind", "takes", "codes", "lowers_to",
                 "computes_in")  # fmt: skip
        return PassFacts(
            id=name,
            contract=found.get("contract", "exact"),
            needs=found.get("needs", "nothing"),
            needs_with=when,
            **{key: tuple(found.get(key, ())) for key in lists},
        )

    def computes_in(self, name: str) -> tuple[str, ...]:
        """Floating-point dtypes of the programs that a pass takes or a backend runs."""
        found = self.definitions[name]["x-graphwright"].get("computes_in", EVERY_DTYPE)
        return tuple(found)

    def resolve(self, part: dict[str, Any]) -> dict[str, Any]:
        """`part`, or what its `$ref` points to."""
        while "$ref" in part:
            part = self.definitions[part["$ref"].removeprefix("#/$defs/")]
        return part

    def with_own_passes(self, wanted: Iterable[str]) -> Schema:
        """This schema and the passes of other packages among `wanted`.

        A pass registered in this process is found at once. Entry points are read, and their
        modules imported, only for ids that are not built in.

        Raises:
            ArgumentError: the module of an entry point cannot be imported.
        """
        unknown = [name for name in dict.fromkeys(wanted) if name not in self.definitions]
        classes = {name: cls for name in unknown if (cls := _find_own(name)) is not None}
        if not classes:
            return self
        from graphwright.specs.generate import chain_items, define_pass

        document = copy.deepcopy(self.document)
        for name, cls in classes.items():
            document["$defs"] |= define_pass(name, cls)
        document["properties"]["passes"]["items"] = chain_items(document["$defs"], "pass")
        return Schema(document)


def _find_own(name: str) -> Any:
    """The class of a pass that does not come with the package, or None."""
    if name in (registered := _registered()):
        return registered[name]
    if name not in _entry_point_names():
        return None
    from graphwright.passes.registry import find_pass

    return find_pass(name)


def own_names() -> list[str]:
    """Ids of passes of other packages, without importing them; candidates for a suggestion."""
    return [*_registered(), *_entry_point_names()]


def _registered() -> dict[str, Any]:
    """Passes registered in this process; none as long as nothing imported the passes."""
    registry = sys.modules.get("graphwright.passes.registry")
    return registry.registered_passes() if registry is not None else {}


@lru_cache(maxsize=1)
def _entry_point_names() -> tuple[str, ...]:
    from importlib.metadata import entry_points  # 35 ms: only when a name is not built in

    return tuple(sorted({point.name for point in entry_points(group="graphwright.passes")}))


@lru_cache(maxsize=1)
def shipped_schema() -> Schema:
    """The schema that comes with the package."""
    return Schema(json.loads(FILE.read_text(encoding="utf-8")))
