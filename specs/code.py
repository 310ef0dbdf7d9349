"""Code that a spec names: what would be imported and called, found without importing it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from graphwright.ir.errors import SpecError
from graphwright.specs.document import Path
from graphwright.specs.schema import Schema
from graphwright.specs.spec import Spec
from graphwright.specs.written import written_specs

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def named_code(spec: Spec) -> Iterator[tuple[Path, str]]:
    """(place in the spec, `module:function`) of everything that a run would import and call."""
    if spec.model.factory is not None:
        yield ("model", "factory"), spec.model.factory
    for key in ("calibration", "training", "evaluate"):
        section = getattr(spec, key)
        if section is None:
            continue
        data = section.data or ""
        if _FUNCTION.fullmatch(data) and not (spec.folder / data).exists():
            yield (key, "data"), data
        if ":" in getattr(section, "metric", ""):
            yield (key, "metric"), section.metric
    for index, call in enumerate(spec.passes):
        properties = {"properties": spec.schema.options(call.id)}
        yield from _in_options(call.options, properties, spec.schema, ("passes", index, call.id))


def refuse_code(spec: Spec) -> None:
    """What --no-code asks for.

    Raises:
        SpecError: the spec names code, at each of its places.
    """
    message = "code that a run would import and call, which --no-code forbids"
    problems = [
        each.problem(path, f"{name}: {message}")
        for each in written_specs(spec)
        for path, name in named_code(each)
    ]
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))


def _in_options(
    value: Any, part: dict[str, Any], schema: Schema, path: Path
) -> Iterator[tuple[Path, str]]:
    """The options that their schema marks as `module:function`, at any depth."""
    for form in [part, *part.get("anyOf", ())]:
        form = schema.resolve(form)
        if isinstance(value, dict):
            for key, inner in form.get("properties", {}).items():
                if key in value:
                    yield from _in_options(value[key], inner, schema, (*path, key))
        elif form.get("x-graphwright", {}).get("is") == "module:function" and ":" in value:
            yield path, value
