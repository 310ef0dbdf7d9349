"""Rules between the options of one pass, backend, export or section, as these declare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from graphwright.ir.declarations import Rule
from graphwright.specs.document import CHAINS, Node
from graphwright.specs.entries import chain_nodes, entry_id
from graphwright.specs.nearest import nearest
from graphwright.specs.schema import Schema
from graphwright.specs.translate import Finding


def between_findings(root: Node, schema: Schema, sound: Callable[..., bool]) -> Iterator[Finding]:
    """Options that do not go together, each at the option that the rule is about."""
    yield from _in_sections(root, schema, sound)
    for section in CHAINS:
        for index, node in enumerate(chain_nodes(root, section)):
            name = entry_id(node)
            if name not in schema.definitions or not sound(section, index):
                continue
            written = (node.entries[0].node.plain() if node.entries else None) or {}
            for at, message, suggestion in _faults(name, written, {}, schema):
                place = at if at[-1] in _below(written, at[:-1]) else at[:-1]
                yield Finding(
                    (section, index, *((name, *place) if place else ())), message, suggestion
                )


def _in_sections(root: Node, schema: Schema, sound: Callable[..., bool]) -> Iterator[Finding]:
    document = root.plain()
    for section, part in schema.document["properties"].items():
        name = part.get("$ref", "").removeprefix("#/$defs/")
        written = document.get(section)
        if not name or not isinstance(written, dict) or not sound(section):
            continue
        for at, message, suggestion in _faults(name, written, {}, schema):
            place = at if at[-1] in _below(written, at[:-1]) else at[:-1]
            yield Finding((section, *place), message, suggestion)


_Fault = tuple[tuple[str, ...], str, str]
"""Path of an option below those of its pass, what is wrong, and what to write instead."""


def _faults(
    name: str, written: dict[str, Any], preset: dict[str, Any], schema: Schema
) -> Iterator[_Fault]:
    """Every rule that is not kept by options, and by options inside these.

    Args:
        name: of the definition in the schema that has the rules.
        written: what the spec says.
        preset: what takes the place of the definition's own defaults.
    """
    twice = schema.definitions[name].get("allOf", ())
    own = {other: option for option, other in (part["not"]["required"] for part in twice)}
    written = {own.get(option, option): value for option, value in written.items()}
    defaults = schema.defaults(name)
    values = {**dict.fromkeys(schema.options(name)), **defaults, **preset, **written}
    for option in schema.options(name):
        inside = schema.inside(name, option)
        if isinstance(written.get(option), dict) and inside:
            start = schema.completed(name, option, written[option])
            values[option] = start
            for at, message, instead in _faults(inside, written[option], start, schema):
                yield (option, *at), message, instead
        part, each = written.get(option), schema.of_values(name, option)
        for key, value in part.items() if each and isinstance(part, dict) else ():
            for at, message, instead in _faults(each, value, {}, schema):
                yield (option, key, *at), message, instead
    given = {option for option, value in values.items() if value != defaults.get(option)}
    said: set[str] = set()
    for fact in schema.definitions[name].get("x-graphwright", {}).get("rules", ()):
        rule = Rule(**fact)
        if rule.at not in said and not rule.is_kept(values, given):
            said.add(rule.at)  # the first of an option's rules; the others mostly follow from it
            yield (rule.at,), rule.said(values), ""
    if values.get("quantizer") is not None:
        yield from _inside(values, schema)


def _below(written: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for option in path:
        written = written[option]
    return written


def _inside(values: dict[str, Any], schema: Schema) -> Iterator[_Fault]:
    """A pass that another one runs has to be there, and to take what it is given."""
    inside = values["quantizer"]
    if schema.facts(inside) is None:
        meant = nearest(inside, schema.names("pass"))
        yield ("quantizer",), f"no pass named {inside!r}", meant or ""
        return
    known = schema.options(inside)
    if not {"bits", "targets"} <= set(known):
        message = f"{inside} has no options `bits` and `targets`; use quantize.adaquant, "
        yield ("quantizer",), f"{message}quantize.gptq or quantize.rtn", ""
    elif values.get("activations") and "activation_bits" not in known:
        message = f"{inside} quantizes no inputs; leave `activations` out"
        yield ("activations",), f"{message}, or use quantize.adaquant", ""
    for option in values.get("options") or {}:
        if option not in known:
            meant = nearest(option, list(known))
            more = f"; did you mean {meant!r}?" if meant else ""
            yield ("options",), f"{inside} has no option {option!r}{more}", ""
