"""Regenerate what the code says best: the JSON schema, the spec reference, the pass catalogue.

    python docs/generate.py

A test compares the committed files with what this makes. Options, bounds, defaults and units are
written in the option models and nowhere else.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PASSES = ROOT / "docs" / "passes"

Schema = dict[str, Any]

RESTATED = "another function, with inputs and outputs of its own, held to its formula in float64"
"""Of a pass that restates the program."""

CONTRACTS = {
    "exact": "same function up to rounding",
    "identity_at_init": "same function until it is trained",
    "lossy": "changes the function by a measured amount",
}
NOTE = "<!-- Made by `make docs` from the option models; do not edit. -->\n"


def outputs() -> dict[Path, str]:
    """Every generated file and its text."""
    from graphwright.passes.registry import find_pass, pass_ids
    from graphwright.specs.generate import current_schema, schema_text

    schema = current_schema()
    classes = {name: find_pass(name) for name in pass_ids()}
    files = {
        ROOT / "specs" / "schema.json": schema_text(schema),
        ROOT / "docs" / "spec-reference.md": spec_reference(schema),
        PASSES / "README.md": catalogue(schema, list(classes)),
    }
    for name, cls in classes.items():
        files[PASSES / f"{name}.md"] = pass_page(name, inspect.getdoc(cls) or "", schema)
    return files


def catalogue(schema: Schema, names: list[str]) -> str:
    """One line per pass, by family."""
    lines = [NOTE, "# Passes", ""]
    lines += ["What each contract promises, and what is checked after the pass has run:", ""]
    lines += [f"- `{contract}`: {meaning}" for contract, meaning in CONTRACTS.items()]
    for family in dict.fromkeys(name.partition(".")[0] for name in names):
        lines += ["", f"## {family}", "", "| pass | contract | needs | what it does |"]
        lines += ["| --- | --- | --- | --- |"]
        for name in (n for n in names if n.partition(".")[0] == family):
            entry, facts = schema["$defs"][name], schema["$defs"][name]["x-graphwright"]
            summary = _cell(entry["description"])
            row = f"[`{name}`]({name}.md) | {facts['contract']} | {facts['needs']} | {summary}"
            lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


USUAL = 3
"""Optional settings that an example shows, beside those that all passes share."""


def pass_page(name: str, doc: str, schema: Schema) -> str:
    """The page of one pass: what it does, what it promises, its options, a spec that uses it."""
    entry = schema["$defs"][name]
    facts = entry["x-graphwright"]
    family, _, method = name.partition(".")
    lines = [NOTE, f"# {name}", "", doc, "", "| | |", "| --- | --- |"]
    meaning = RESTATED if facts.get("restates") else CONTRACTS[facts["contract"]]
    lines.append(f"| contract | `{facts['contract']}`: {meaning} |")
    lines.append(f"| needs | {facts['needs']}{_needs_when(facts)} |")
    for label, key in (
        ("comes after", "after"),
        ("comes before", "before"),
        ("not with", "conflicts"),
        ("needs in front of it one of", "behind"),
        ("takes float weights of", "takes"),
        ("leaves codes in the place of weights of", "codes"),
        ("computes in", "computes_in"),
    ):
        if facts.get(key):
            lines.append(f"| {label} | {_codes(facts[key])} |")
    lines.append(f"| lowers to | {_codes(facts.get('lowers_to', ['onnxruntime', 'triton']))} |")
    if facts.get("papers"):
        lines.append(f"| papers | {', '.join(facts['papers'])} |")
    code, test = f"passes/{family}/{method}.py", f"tests/passes/{family}/test_{method}.py"
    lines.append(f"| source | [`{code}`](../../{code}), tested by [`{test}`](../../{test}) |")
    lines += ["", "## Options", "", *_options(entry, schema)]
    if "tune" in entry["properties"]:
        link = "Under `tune`: the [options of training](../spec-reference.md#options-under-tune)."
        lines += [
            "",
            link,
        ]
    lines += ["", "## In a spec", "", "```yaml", *example_spec(name, schema), "```"]
    return "\n".join(lines) + "\n"


def spec_reference(schema: Schema) -> str:
    """Every section and key of a spec, and the options of each backend."""
    lines = [NOTE, "# Spec reference", "", schema["description"], ""]
    lines += [
        "The pass options are in [passes/](passes/README.md). `graphwright schema` prints the JSON"
    ]
    lines += ["schema that editors complete from.", ""]
    lines += ["## Top level", "", *_options(schema, schema)]
    for section, heading in _sections(schema):
        entry = schema["$defs"][section]
        lines += [
            "",
            f"## {heading}",
            "",
            entry.get("description", ""),
            "",
            *_options(entry, schema),
        ]
    for key, option in schema["$defs"]["CalibrationSection"]["properties"].items():
        lines += _nested(key, option, schema)
    lines += ["", "## Options under `tune`", "", "Every pass that trains embeds them.", ""]
    tune = schema["$defs"]["tune.finetune"]["properties"]["tune"]
    lines += _options(_resolve(tune, schema), schema)
    for name, entry in schema["$defs"].items():
        if "backend" in entry.get("x-graphwright", {}):
            lines += ["", f"## `lower: {name}`", "", entry["description"], ""]
            lines += _options(entry, schema)
    lines += ["", "## `export`", "", "| format | what is written |", "| --- | --- |"]
    formats = {n: e for n, e in schema["$defs"].items() if "export" in e.get("x-graphwright", {})}
    lines += [f"| `{name}` | {_cell(entry['description'])} |" for name, entry in formats.items()]
    lines += ["", "Each takes:", "", *_options(next(iter(formats.values())), schema)]
    return "\n".join(lines) + "\n"


def _nested(path: str, option: Schema, schema: Schema) -> Iterator[str]:
    """Tables of options inside an option, at every depth."""
    if "$ref" not in option:
        return
    inside = _resolve(option, schema)
    yield from ("", f"## Options under `{path}`", "", inside.get("description", ""), "")
    yield from _options(inside, schema)
    for key, part in inside["properties"].items():
        yield from _nested(f"{path}.{key}", part, schema)


def _sections(schema: Schema) -> Iterator[tuple[str, str]]:
    """Name in the schema and heading of every section, in the order of the top-level keys."""
    for key, option in schema["properties"].items():
        section = option.get("$ref", "").removeprefix("#/$defs/")
        if section:
            yield section, f"`{key}`"
        if key == "model":
            yield "InputSection", "an input under `model.inputs`"
        if key == "search":
            yield "ChoiceSection", "a place under `search.space`"


def _options(entry: Schema, schema: Schema) -> list[str]:
    """A table of the properties of a schema object."""
    if not entry.get("properties"):
        return ["None."]
    rows = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    required = entry.get("required", [])
    # The bound on the whole result comes last, wherever it is declared.
    for key, option in sorted(entry["properties"].items(), key=lambda item: item[0] == "max_error"):
        default = "required" if key in required else _default(option, schema)
        meaning = option.get("description") or _resolve(option, schema).get("description", "")
        rows.append(f"| `{key}` | {type_text(option, schema)} | {default} | {_cell(meaning)} |")
    return rows


def _default(option: Schema, schema: Schema) -> str:
    """Of a set of options, what differs from that set's own defaults."""
    value = option.get("default")
    if isinstance(value, dict):
        inside = next((p for p in option.get("anyOf", ()) if "$ref" in p), option)
        known = _resolve(inside, schema).get("properties", {})
        value = {k: v for k, v in value.items() if v != known.get(k, {}).get("default")}
    if value in (None, [], {}):
        return "-"
    return f"`{json.dumps(value)}`".replace('"', "")


def type_text(option: Schema, schema: Schema) -> str:
    """A JSON schema type as a reader would say it: `number > 0`, `list of string`."""
    if "enum" in option:
        return _codes(option["enum"], " \\| ")
    if "const" in option:
        return f"`{option['const']}`"
    if "$ref" in option:
        return "mapping"
    if "anyOf" in option:
        return " or ".join(dict.fromkeys(type_text(o, schema) for o in option["anyOf"]))
    kind = option.get("type", "any")
    if kind == "array":
        item = type_text(option.get("items") or {}, schema)
        return "list" if item == "any" else f"list of {item}"
    if hint := option.get("x-graphwright", {}).get("is"):
        return str(hint)
    names = {"object": "mapping", "null": "nothing"}
    return names.get(kind, kind) + _bounds(option)


def _bounds(option: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {_number(option[key])}" for key, sign in signs.items() if key in option]
    unit = option.get("x-graphwright", {}).get("unit", "")
    return (" " + ", ".join(found) if found else "") + (f" ({unit})" if unit else "")


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else str(value)


def example_spec(name: str, schema: Schema) -> list[str]:
    """A spec with this pass, one that it needs in front of it, and the options that one would set,
    a line each."""
    entry = schema["$defs"][name]
    options = {key: _example(name, key, entry["properties"][key]) for key in _usual(entry)}
    for key in [key for key, value in options.items() if isinstance(value, dict)]:
        (options[key],) = _resolve(entry["properties"][key], schema)["examples"]
    lines = ["version: 1"]
    needs = entry["x-graphwright"]["needs"]
    if needs == "training":
        lines.append("training: {data: my_data:batches}")
    elif needs != "nothing":
        lines.append("calibration: {data: synthetic}")
    lines.append("passes:")
    lines += [f"  - {_in_front(name, entry)}"] if entry["x-graphwright"].get("behind") else []
    if not options:
        return [*lines, f"  - {name}"]
    written = [f"      {key}: {_yaml(value)}" for key, value in options.items()]
    return [*lines, f"  - {name}:", *written]


EMPTY: tuple[Any, ...] = (None, [], {})
"""Defaults that show nothing; an example that such an option declares is shown in their place."""

TYPICAL = {"adapt.*": "adapt.lora", "quantize.*": "quantize.rtn"}
"""A pass of a family, for the example of one that needs some in front of it."""


def _in_front(name: str, entry: Schema) -> str:
    """A pass that gives this one something to do."""
    first: str = entry["x-graphwright"]["behind"][0]
    if "*" in first and first not in TYPICAL:
        raise ValueError(f"{name}: no typical pass of {first} is named")
    return TYPICAL.get(first, first)


def _usual(entry: Schema) -> list[str]:
    """Required options, the first ones that a pass declares, its targets, and how it trains."""
    required, shared = entry.get("required", []), ("targets", "tune")
    optional = [key for key, option in entry["properties"].items()
                if key not in required
                and (option.get("default") not in EMPTY or "examples" in option)]  # fmt: skip
    own = [key for key in optional if key not in shared]
    own.sort(key=lambda key: entry["properties"][key].get("default") not in EMPTY)
    return [*required, *own[:USUAL], *(key for key in shared if key in optional)]


def _yaml(value: Any) -> str:
    """A value in YAML's flow style; a plain word needs no quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and value.replace("_", "").isalnum() and not value.isdigit():
        return value
    return json.dumps(value)


def _example(name: str, key: str, option: Schema) -> Any:
    """A value for an option: its default, or an example it declares, or its first choice."""
    if option.get("default") not in EMPTY:
        return option["default"]
    choices = [*option.get("examples", []), *option.get("enum", [])]
    if not choices:
        raise ValueError(f"{name}: the required option {key!r} needs Field(examples=[...])")
    return choices[0]


def _needs_when(facts: Schema) -> str:
    cases = facts.get("needs_when", [])
    return "".join(f"; {c['needs']} with `{c['option']}: {c['value']}`" for c in cases)


def _resolve(option: Schema, schema: Schema) -> Schema:
    ref = option.get("$ref", "").removeprefix("#/$defs/")
    found: Schema = schema["$defs"][ref] if ref else option
    return found


def _codes(values: list[Any], joint: str = ", ") -> str:
    return joint.join(f"`{value}`" for value in values)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write the files, and remove pages of passes that are gone."""
    files = outputs()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for stale in set(PASSES.glob("*.md")) - set(files):
        stale.unlink()
    print(f"{len(files)} files written")


if __name__ == "__main__":
    main()
