"""Makes `specs/schema.json` from the passes, the backends and the sections.

    python -m graphwright.specs.generate

The file is shipped, so that checking a spec imports no pass (and so no torch). It is at once the
JSON schema that editors complete from and, under `x-graphwright` keys, the facts that the legality
of a chain is decided by.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.backends.base import Backend
    from graphwright.ir.files.exports import Export
    from graphwright.passes.base import Pass

from graphwright.ir.declarations import EVERY_DTYPE

OUTPUT = Path(__file__).with_name("schema.json")
FACTS = ("contract", "needs", "after", "before", "conflicts", "behind", "takes", "codes",
         "lowers_to", "papers", "restates")  # fmt: skip


def build_schema(
    passes: Mapping[str, type[Pass]],
    backends: Mapping[str, type[Backend]],
    exports: Mapping[str, type[Export]],
    kinds: list[str],
) -> dict[str, Any]:
    """The whole schema.

    Args:
        passes: classes by id.
        backends: classes by name.
        exports: classes of the formats of checkpoints by name.
        kinds: layer kinds that a selector may name, as in `kind:linear`.
    """
    from graphwright.specs.sections import Document

    document = tidy(Document.model_json_schema())
    definitions = document.pop("$defs")
    for name, cls in sorted(passes.items()):
        definitions |= define_pass(name, cls)
    for name, backend in sorted(backends.items()):
        definitions |= define_backend(name, backend)
    for name, export in sorted(exports.items()):
        definitions |= _define(name, export, {"export": name}, _first_line(export.__doc__))
    properties = document["properties"]
    properties["passes"]["items"] = chain_items(definitions, "pass")
    definitions["PartSection"]["properties"]["passes"]["items"] = {
        "$ref": "#/properties/passes/items"
    }
    properties["lower"]["items"] = chain_items(definitions, "backend")
    properties["export"]["items"] = chain_items(definitions, "export")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Graphwright spec",
        **{key: value for key, value in document.items() if key != "title"},
        "x-graphwright": {"kinds": kinds},
        "$defs": definitions,
    }


def define_pass(name: str, cls: type[Pass]) -> dict[str, Any]:
    """Definitions of a pass: its options and what its class says about it."""
    facts = {fact: _plain(getattr(cls, fact)) for fact in FACTS if _plain(getattr(cls, fact, None))}
    if set(cls.computes_in) != set(EVERY_DTYPE):
        facts["computes_in"] = list(cls.computes_in)
    if cls.needs_with:
        facts["needs_with"] = [
            {"option": option, "value": value, "needs": need}
            for (option, value), need in cls.needs_with.items()
        ]
    return _define(name, cls, {"pass": name, **facts}, _first_line(cls.__doc__))


def define_backend(name: str, cls: type[Backend]) -> dict[str, Any]:
    """Definitions of a backend's options."""
    facts: dict[str, Any] = {"backend": name}
    if set(cls.computes_in) != set(EVERY_DTYPE):
        facts["computes_in"] = list(cls.computes_in)
    return _define(name, cls, facts, cls.summary or _first_line(cls.__doc__))


def _define(name: str, cls: Any, facts: dict[str, Any], summary: str) -> dict[str, Any]:
    schema = tidy(cls.Options.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}"))
    nested = {f"{name}.{key}": value for key, value in schema.pop("$defs", {}).items()}
    schema.setdefault("properties", {})
    facts = {**facts, **schema.pop("x-graphwright", {})}
    if set(cls.Options.__pydantic_decorators__.model_validators) - {"_keep_rules"}:
        facts = {**facts, "coded_rules": True}  # further ones, which only the model itself can tell
    schema |= {"title": name, "description": summary, "x-graphwright": facts}
    return {name: schema, **nested}


def chain_items(definitions: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Schema of one entry of a chain: of `passes` (role pass), `lower` (role backend), `export`."""
    names = [n for n, d in definitions.items() if role in d.get("x-graphwright", {})]
    bare = [name for name in names if not definitions[name].get("required")]
    entries = {
        name: {"$ref": f"#/$defs/{name}"}
        if name not in bare
        else {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}
        for name in names
    }
    mapping = {
        "type": "object",
        "properties": entries,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"anyOf": [{"type": "string", "enum": bare}, mapping]}


def tidy(schema: Any) -> Any:
    """The schema without generated titles, and without `null` where leaving out says the same."""
    if isinstance(schema, list):
        return [tidy(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {k: tidy(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
    if isinstance(result.get("description"), str):
        result["description"] = " ".join(result["description"].split())
    branches = result.get("anyOf", [])
    if result.get("default", ...) is None and {"type": "null"} in branches:
        del result["default"]
        rest = [branch for branch in branches if branch != {"type": "null"}]
        if len(rest) == 1:
            del result["anyOf"]
            result = {**rest[0], **result}
        else:
            result["anyOf"] = rest
    if isinstance(result.get("default"), dict):
        result["default"] = {k: v for k, v in result["default"].items() if v is not None}
    return result


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _first_line(doc: str | None) -> str:
    return inspect.cleandoc(doc or "").partition("\n\n")[0].replace("\n", " ")


def schema_text(schema: Mapping[str, Any]) -> str:
    """The schema as it is written to the file."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def current_schema() -> dict[str, Any]:
    """The schema of the passes and backends that come with the package."""
    from graphwright.backends.base import all_backends
    from graphwright.ir.files.exports import EXPORTS
    from graphwright.ir.layers.kinds import KINDS
    from graphwright.passes.registry import find_pass, pass_ids

    passes = {name: find_pass(name) for name in pass_ids()}
    return build_schema(passes, all_backends(), EXPORTS, sorted(set(KINDS.values())))


def main() -> None:
    """Writes the file."""
    OUTPUT.write_text(schema_text(current_schema()), encoding="utf-8")
    print(f"wrote {OUTPUT}")  # noqa: T201  (this is a command)


if __name__ == "__main__":
    main()
