"""JSON schema violations in the words of a spec."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from graphwright.specs.document import CHAINS, Path, show, show_path
from graphwright.specs.meant import UNKNOWN, got, meant_value, yaml_text
from graphwright.specs.nearest import nearest
from graphwright.specs.schema import Schema, own_names

_TYPES = {
    "integer": "an integer", "number": "a number", "boolean": "true or false",
    "string": "a text", "array": "a list", "object": "a mapping", "null": "nothing",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing wrong, and what checking may go on with as if it had been written.

    Attributes:
        path: the value it is about.
        message: what is wrong.
        suggestion: what to write instead.
        at_key: whether it is about the key and not about the value.
        rename: name to take the key for, when that is clear.
        replace: value to take it for, when that is clear.
    """

    path: Path
    message: str
    suggestion: str = ""
    at_key: bool = False
    rename: str = ""
    replace: Any = UNKNOWN

    @property
    def has_replacement(self) -> bool:
        """Whether `replace` is set."""
        return self.replace is not UNKNOWN


@dataclass(frozen=True)
class Violation:
    """A `jsonschema` error: the failed keyword, what it asked for, and the value at a path.

    `branch` is the index of the alternative it belongs to in the union around it, `context` has
    the violations of every alternative when it is itself about a union.
    """

    keyword: str
    asked: Any
    value: Any
    schema: dict[str, Any]
    path: Path
    branch: int = 0
    context: tuple[Violation, ...] = ()

    @classmethod
    def of(cls, error: Any) -> Violation:
        """From a `jsonschema.ValidationError`."""
        branch = error.schema_path[0] if error.parent is not None else 0
        return cls(
            keyword=str(error.validator),
            asked=error.validator_value,
            value=error.instance,
            schema=error.schema,
            path=tuple(error.absolute_path),
            branch=branch,
            context=tuple(cls.of(child) for child in error.context or ()),
        )


class Translator:
    """Turns `jsonschema` errors into findings."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def translate(self, error: Violation) -> Iterator[Finding]:
        """The findings of one error; none when another error of the same value says it better."""
        keyword = error.keyword
        if keyword in ("anyOf", "oneOf"):
            yield from self._union(error)
            return
        handlers: dict[str, Callable[[Violation], Iterator[Finding]]] = {
            "additionalProperties": self._unknown_keys,
            "required": self._missing,
            "type": self._type,
            "enum": self._enum,
            "const": self._enum,
            "not": self._twice,
        }
        yield from handlers.get(keyword, self._bound)(error)

    def _unknown_keys(self, error: Violation) -> Iterator[Finding]:
        path = error.path
        known = list(error.schema.get("properties", {}))
        for key in error.value:
            if key in known:
                continue
            role = _chain_role(path)
            candidates = [*known, *own_names()] if role == "pass" else known
            meant = nearest(key, candidates, unlikely=error.value)
            free = meant in known and meant not in error.value
            yield Finding(
                (*path, key),
                f"{_subject(path)} {show(key)}{self._hint(path, key, known, meant)}",
                meant,
                at_key=True,
                rename=meant if free else "",
            )

    def _twice(self, error: Violation) -> Iterator[Finding]:
        name, other = error.asked["required"]
        text = f"takes {show(name)} and {show(other)} as one option: give one of the two"
        yield Finding((*error.path, other), f"{error.path[2]} {text}", at_key=True)

    def _hint(self, path: Path, key: str, known: list[str], meant: str) -> str:
        """The place where the key belongs, or the keys that could stand here, when no name is
        near."""
        if meant:
            return ""
        homes = self._homes(key) if not _chain_role(path) else []
        if homes:
            return f"; it belongs under {' or '.join(homes[:3])}"
        if _chain_role(path) == "pass":
            return "; `graphwright passes` lists them"
        if not known:
            return "; it takes none"
        return f"; there {'is' if len(known) == 1 else 'are'} {', '.join(known)}"

    def _homes(self, key: str) -> list[str]:
        """Sections, passes and backends that have such a key."""
        sections = self.schema.document["properties"]
        found = [
            f"'{name}'"
            for name, part in sections.items()
            if key in self.schema.resolve(part).get("properties", {})
        ]
        chain = [name for role in CHAINS.values() for name in self.schema.names(role)]
        return found + [f"'{name}'" for name in chain if key in self.schema.options(name)]

    def _missing(self, error: Violation) -> Iterator[Finding]:
        path = error.path
        for name in error.asked:
            if name in error.value:
                continue
            about = self.schema.resolve(error.schema["properties"][name]).get("description", "")
            hint = "write 'version: 1'" if (path, name) == ((), "version") else about
            owner = f"{_owner(path)} needs" if path else "a spec needs"
            yield Finding(
                path, f"{owner} {show(name)}" + (f": {hint}" if hint else ""), at_key=True
            )

    def _type(self, error: Violation) -> Iterator[Finding]:
        yield self._wrong_type(error, [error])

    def _wrong_type(self, error: Violation, asked: list[Violation]) -> Finding:
        """`error`'s value has none of the types that `asked` want."""
        wanted = [str(e.asked) for e in asked]
        kinds = dict.fromkeys(w for w in wanted if w != "null") or dict.fromkeys(wanted)
        meant = UNKNOWN
        for branch in sorted(asked, key=lambda e: e.asked in ("string", "array")):
            part = {**branch.schema, **_extras(error.schema)}
            meant = meant_value(error.value, str(branch.asked), part)
            if meant is not UNKNOWN:
                break
        if isinstance(meant, str) and any(e.schema.get("enum") for e in asked):
            names = [v for e in asked for v in e.schema.get("enum", ())]
            meant = nearest(meant, names) or UNKNOWN
        expected = " or ".join(_TYPES.get(kind, kind) for kind in kinds)
        unit = _extras(error.schema).get("x-graphwright", {}).get("unit")
        if unit in ("MB", "GB", "minutes") and isinstance(error.value, str):
            expected += f" of {unit}, without a unit"
        text = "" if meant is UNKNOWN else yaml_text(meant)
        if isinstance(meant, str) and "string" in kinds and not isinstance(error.value, str):
            text = text if any(e.schema.get("enum") for e in asked) else repr(meant)
        return Finding(
            error.path,
            f"expected {expected}, got {got(error.value)}",
            text,
            replace=meant,
        )

    def _enum(self, error: Violation) -> Iterator[Finding]:
        if not _has_type(error):
            return
        keyword, asked = error.keyword, error.asked
        values = list(asked) if keyword == "enum" else [asked]
        yield self._not_among(error, values, "")

    def _not_among(self, error: Violation, values: list[Any], other: str) -> Finding:
        path = error.path
        role = _chain_role(path[:-1]) if len(path) == 2 else ""
        if role:
            return self._unknown_name(error, path, role)
        texts = {str(value): value for value in values}
        meant = nearest(str(error.value), texts)
        if not meant and len(values) == 1:
            meant = str(values[0])
        listed = ", ".join(yaml_text(value) for value in values) + other
        expected = f"one of {listed}" if len(values) > 1 or other else listed
        return Finding(
            path,
            f"expected {expected}, got {show(error.value)}",
            meant,
            replace=texts[meant] if meant else UNKNOWN,
        )

    def _unknown_name(self, error: Violation, path: Path, role: str) -> Finding:
        """A bare id in a chain that is not known, or cannot stand without options."""
        written, known = str(error.value), self.schema.names(role)
        if written in known:
            required = self.schema.definitions[written]["required"]
            listed = ", ".join(show(name) for name in required)
            return Finding(path, f"{written} needs options: {listed}")
        candidates = [*known, *own_names()] if role == "pass" else known
        meant = nearest(written, candidates)
        message = f"no {role} named {show(written)}"
        message += self._hint(path[:1], written, known, meant)
        return Finding(path, message, meant, replace=meant if meant in known else UNKNOWN)

    def _union(self, error: Violation) -> Iterator[Finding]:
        """The errors of the branch that was meant: the one whose type the value has."""
        branches: dict[int, list[Violation]] = {}
        for child in error.context:
            branches.setdefault(child.branch, []).append(child)
        path = error.path

        def mismatch(errors: list[Violation]) -> list[Violation]:
            return [e for e in errors if e.keyword == "type" and e.path == path]

        fitting = [errors for errors in branches.values() if not mismatch(errors)]
        if not fitting:
            asked = [e for errors in branches.values() for e in mismatch(errors)]
            yield self._wrong_type(error, asked)
        elif len(fitting) > 1 and all(e.keyword in _CHOICES for es in fitting for e in es):
            yield self._no_choice([e for errors in fitting for e in errors], error)
        else:
            for child in min(fitting, key=len):
                yield from self.translate(child)

    def _no_choice(self, errors: list[Violation], union: Violation) -> Finding:
        """A text that is none of the names and has not the form of the rest."""
        values: list[Any] = []
        forms = []
        for error in errors:
            if error.keyword == "pattern":
                forms.append(_form(error))
            else:
                asked = error.asked
                values += asked if error.keyword == "enum" else [asked]
        if forms and ":" in str(union.value):
            return Finding(union.path, f"{show(union.value)} is no {forms[0]}")
        return self._not_among(union, values, "".join(f" or {form}" for form in forms))

    def _bound(self, error: Violation) -> Iterator[Finding]:
        """A value of the right type that is too large, too small, too long, or malformed."""
        path, limit = error.path, error.asked
        text, value = _BOUNDS.get(error.keyword, ""), error.value
        if (path and _chain_role(path[:-1])) or not _has_type(error):
            return  # the number of keys in an entry, or the wrong type, is said elsewhere
        meant: Any = UNKNOWN
        if error.keyword == "pattern":
            yield Finding(path, f"{show(value)} is no {_form(error)}")
            return
        if error.keyword in ("maximum", "exclusiveMaximum") and limit == 1 and 1 < value <= 100:
            text, meant = "a share of at most {}, not a percentage", value / 100
        if not text:
            yield Finding(path, f"{show(value)} does not fit the schema ({error.keyword})")
            return
        about = self.schema.resolve(error.schema).get("description", "")
        shown = got(value) if isinstance(value, list | dict | str) else yaml_text(value)
        message = f"expected {text.format(yaml_text(limit))}, got {shown}"
        yield Finding(
            path,
            f"{message} ({about.rstrip('.')})" if about and meant is UNKNOWN else message,
            "" if meant is UNKNOWN else yaml_text(meant),
            replace=meant,
        )


_CHOICES = ("enum", "const", "pattern")
_BOUNDS = {
    "minimum": "{} or more", "maximum": "{} or less", "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}", "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters", "maxLength": "at most {} characters",
    "minItems": "at least {} entries", "maxItems": "at most {} entries",
    "uniqueItems": "entries that all differ", "minProperties": "at least {} keys",
    "maxProperties": "at most {} keys",
}  # fmt: skip


def _extras(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("x-graphwright",) if key in schema}


def _has_type(error: Violation) -> bool:
    """Whether the value has the type its schema asks for beside the failed keyword."""
    wanted = error.schema.get("type")
    return not isinstance(wanted, str) or is_type(error.value, wanted)


def is_type(value: Any, name: str) -> bool:
    """Whether a plain value has a JSON type; `4.0` is no integer, `1` no boolean, NaN no number."""
    if name in ("integer", "number"):
        kind = int if name == "integer" else int | float
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    kinds = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    return isinstance(value, kinds.get(name, object))


def _form(error: Violation) -> str:
    name = error.schema.get("x-graphwright", {}).get("is")
    return str(name) if name else f"text of the form {error.asked}"


def _chain_role(path: Path) -> str:
    """`pass`, `backend` or `export` when `path` is a chain or an entry of one, else ""."""
    if path and path[0] in CHAINS and len(path) <= 2:
        return CHAINS[str(path[0])]
    return ""


def _owner(path: Path) -> str:
    if len(path) == 3 and path[0] in CHAINS:
        return str(path[2])
    return f"'{show_path(path)}'"


def _subject(path: Path) -> str:
    """The thing that has no such key, as the start of a sentence."""
    if not path:
        return "a spec has no section"
    if role := _chain_role(path):
        return f"no {role} named"
    if len(path) == 3 and path[0] in CHAINS:
        return f"{path[2]} has no option"
    return f"{_owner(path)} has no key"
