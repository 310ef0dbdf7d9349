"""The catalogue of passes, from the shipped schema: no pass is imported."""

from __future__ import annotations

import textwrap
from typing import Any

from graphwright.ir.errors import ArgumentError
from graphwright.specs.meant import yaml_text
from graphwright.specs.nearest import nearest
from graphwright.specs.schema import FILE, Schema, own_names, shipped_schema


def schema_json() -> str:
    """The JSON schema of specs, as shipped."""
    return FILE.read_text(encoding="utf-8").rstrip()


def list_passes() -> str:
    """One line per pass: id, contract, needs, and what it does."""
    schema = shipped_schema().with_own_passes(own_names())
    names = schema.names("pass")
    width = max(len(name) for name in names)
    lines = []
    for name in names:
        facts = schema.facts(name)
        assert facts is not None  # `names` lists what has facts
        about = schema.definitions[name]["description"]
        lines.append(f"{name:{width}}  {facts.contract:16}  {_needs(schema, name):28}  {about}")
    head = f"{'pass':{width}}  {'contract':16}  {'needs':28}  what it does"
    return "\n".join([head, *lines])


def explain_pass(name: str) -> str:
    """Text about a pass: its work, its options with types and defaults, and a minimal spec.

    Raises:
        ArgumentError: there is no such pass; names the nearest.
    """
    schema = shipped_schema().with_own_passes([name])
    facts = schema.facts(name)
    if facts is None:
        meant = nearest(name, [*schema.names("pass"), *own_names()])
        fix = f"Did you mean {meant!r}?" if meant else "`graphwright passes` lists them."
        raise ArgumentError(f"no pass named {name!r}", fix=fix)
    definition = schema.definitions[name]
    lines = [name, "", *textwrap.wrap(definition["description"], 88), ""]
    lines.append(f"contract    {facts.contract}")
    lines.append(f"needs       {_needs(schema, name)}")
    lines.append(f"lowers to   {', '.join(facts.lowers_to) or 'nothing'}")
    for label, names in (
        ("after", facts.after), ("before", facts.before), ("conflicts", facts.conflicts),
        ("behind", facts.behind), ("takes", facts.takes), ("codes", facts.codes),
        ("computes in", facts.computes_in),
    ):  # fmt: skip
        lines += [f"{label:11} {', '.join(names)}"] if names else []
    if papers := definition["x-graphwright"].get("papers"):
        lines.append(f"papers      {', '.join(papers)}")
    lines += ["", "options" if schema.options(name) else "no options"]
    for key, option in schema.options(name).items():
        needed = key in definition.get("required", ())
        default = "required" if needed else f"default {yaml_text(option.get('default'))}"
        lines.append(f"  {key}: {type_text(option, schema)}; {default}")
        lines += textwrap.wrap(
            option.get("description", ""), 84, initial_indent="      ", subsequent_indent="      "
        )
    return "\n".join(lines)


def type_text(option: dict[str, Any], schema: Schema) -> str:
    """The values an option takes, in words: `integer, 2 to 8`, `one of a, b`."""
    option = schema.resolve(option)
    if "anyOf" in option:
        return " or ".join(type_text(part, schema) for part in option["anyOf"])
    if "enum" in option:
        return f"one of {', '.join(map(yaml_text, option['enum']))}"
    if "const" in option:
        return yaml_text(option["const"])
    kind = str(option.get("type", "any value"))
    if kind == "array" and isinstance(option.get("items"), dict):
        return f"list of {type_text(option['items'], schema)}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {yaml_text(option[key])}" for key, sign in signs.items() if key in option]
    form = option.get("x-graphwright", {}).get("is")
    return ", ".join([form or kind, *bounds])


def _needs(schema: Schema, name: str) -> str:
    facts = schema.facts(name)
    assert facts is not None  # callers pass known ids
    when = [f"{needs} with {o}: {yaml_text(v)}" for o, v, needs in facts.needs_with]
    return "; ".join([facts.needs, *when] if facts.needs != "nothing" or not when else when)
