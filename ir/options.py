"""The one base of every declared option set (passes, backends). Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from graphwright.ir.declarations import EVERY_DTYPE as EVERY_DTYPE
from graphwright.ir.declarations import Rule as Rule
from graphwright.ir.declarations import completed
from graphwright.ir.declarations import only_with as only_with


class Options(BaseModel):
    """Options of a pass or a backend: one declaration for validation, schema, help and docs.

    Strict and closed: an unknown key or a value of another type is an error. The string under a
    field is its description, so a default, a unit or a bound is written in no second place.

    Out of plain data (`from_plain`), a set of options within another one keeps what the other
    one's default says of what is left out: `tune: {steps: 3}` of a pass that trains with sgd
    trains with sgd.

    Class attributes:
        rules: rules between options; those of the bases hold too.
        displaces: by option, other ones of which such a default says nothing once it is given.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    displaces: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        defer_build=True,
        protected_namespaces=(),
    )

    @classmethod
    def all_rules(cls) -> tuple[Rule, ...]:
        """Rules of the class and its bases."""
        found = [rule for base in cls.__mro__ for rule in base.__dict__.get("rules", ())]
        return tuple(found)

    @classmethod
    def from_plain(cls, given: Mapping[str, Any]) -> Self:
        """Options out of plain data: numbers, texts, and lists and mappings of them.

        Raises:
            ValidationError: they are none.
            TypeError: something in them is not plain data.
        """
        return cls.model_validate_json(json.dumps(cls._completed(given)))

    @classmethod
    def _completed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        whole = dict(given)
        for name, field in cls.model_fields.items():
            default, part = field.default, whole.get(name)
            if isinstance(default, Options) and isinstance(part, Mapping):
                own = default.model_dump(mode="json", exclude_unset=True)
                whole[name] = default._completed(completed(own, part, default.displaces))
        return whole

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        rules = self.all_rules()
        values = self.model_dump(mode="json") if rules else {}
        defaults = {
            name: field.get_default(call_default_factory=True)
            for name, field in type(self).model_fields.items()
        }
        given = [name for name in values if getattr(self, name) != defaults[name]]
        for rule in rules:
            if not rule.is_kept(values, given):
                raise ValueError(rule.said(values))
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema of every option under all its names (`also`), and the rules between them."""
        made = handler(core_schema)
        whole = handler.resolve_ref_schema(made)
        facts: dict[str, object] = {}
        if rules := [rule._asdict() for rule in cls.all_rules()]:
            facts["rules"] = rules
        if cls.displaces:
            facts["displaces"] = {option: list(names) for option, names in cls.displaces.items()}
        if facts:  # a new mapping: the one that is there may belong to several classes
            whole["x-graphwright"] = {**whole.get("x-graphwright", {}), **facts}
        properties, twice = whole.get("properties", {}), []
        for name, field in cls.model_fields.items():
            choices = getattr(field.validation_alias, "choices", [])
            for other in (str(choice) for choice in choices if choice != name):
                kept = {k: v for k, v in properties[name].items() if k not in ("default", "title")}
                properties[other] = {**kept, "description": f"The same as `{name}`."}
                twice.append({"not": {"required": [name, other]}})
        if twice:
            whole["allOf"] = twice
        return made


def also(name: str, other: str) -> AliasChoices:
    """For `Field(validation_alias=...)`: an option that the field knows by another name too."""
    return AliasChoices(name, other)


Selector = Annotated[
    tuple[str, ...], Field(json_schema_extra={"x-graphwright": {"selector": True}})
]
"""An option that is a list of layer patterns; see `ir/layers/selectors.py`."""

OutputFile = Annotated[str, Field(json_schema_extra={"x-graphwright": {"is": "output file"}})]
"""An option that names a file which the pass writes; nothing that it computes depends on it."""


class Targets(Options):
    """The option `targets`, for a pass that changes layers."""

    targets: Selector = ("*",)
    """Layers that the pass changes: selector patterns over names and kinds."""


class Bounded(Options):
    """The option `max_error`, for a pass that changes the function."""

    max_error: Annotated[float, Field(gt=0)] | None = None
    """Largest relative error of the outputs, ||a-b|| / ||a||, against the program before this pass;
    no bound when absent."""
