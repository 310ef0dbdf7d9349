"""The likely meaning of a value of the wrong type: `"4"` -> 4, `20 min` -> 20."""

from __future__ import annotations

import math
import re
from typing import Any

from graphwright.specs.document import show
from graphwright.specs.load import resolve_scalar

_TRUE = ("yes", "on", "y", "true", "enabled", "enable")
_FALSE = ("no", "off", "n", "false", "disabled", "disable")
_QUANTITY = re.compile(r"([-+]?[0-9_,]*\.?[0-9]+(?:e[-+]?[0-9]+)?)\s*([a-z%]*)", re.IGNORECASE)
_SCALES: dict[str, dict[str, float]] = {
    "MB": {"mb": 1, "gb": 1e3, "kb": 1e-3, "b": 1e-6, "mib": 1.048576, "gib": 1073.741824, "m": 1},
    "GB": {"gb": 1, "mb": 1e-3, "tb": 1e3, "mib": 1.048576e-3, "gib": 1.073741824, "g": 1},
    "minutes": {"m": 1, "min": 1, "mins": 1, "minute": 1, "minutes": 1, "s": 1 / 60, "sec": 1 / 60,
                "second": 1 / 60, "seconds": 1 / 60, "h": 60, "hour": 60, "hours": 60},
    "times": {"x": 1, "times": 1, "%": 0.01},
    "share": {"%": 0.01},
}  # fmt: skip
"""Factor from a unit someone may write to the unit of the option."""

UNKNOWN = object()
"""Stands for: cannot tell what was meant."""


def meant_value(value: Any, expected: str, schema: dict[str, Any]) -> Any:
    """The value of the expected JSON type that was probably meant, or `UNKNOWN`.

    Args:
        value: what stands in the file.
        expected: JSON schema name of the type.
        schema: the part of the schema that asks for it.
    """
    if expected == "boolean":
        return _boolean(value)
    if expected in ("integer", "number"):
        return _number(value, expected, schema)
    if expected == "string" and isinstance(value, bool | int | float):
        return yaml_text(value)
    if expected == "array" and isinstance(value, str | int | float):
        return _items(value)
    facts = schema.get("x-graphwright", {})
    is_optional = not schema.get("required") and not facts.get("never_empty")
    if expected == "object" and value is None and is_optional:
        return {}
    return UNKNOWN


def yaml_text(value: Any) -> str:
    """A plain value as it would be written in a spec."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(yaml_text(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {yaml_text(v)}' for key, v in value.items())}}}"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_][\w.:/-]*", value):
        return repr(value)
    return repr(float(f"{value:.12g}")) if isinstance(value, float) else str(value)


def _items(value: str | int | float) -> list[Any]:
    """A list written without its brackets."""
    if isinstance(value, str) and "," in value:
        return [resolve_scalar(part.strip()) for part in value.split(",") if part.strip()]
    return [value]


def _boolean(value: Any) -> Any:
    if value in (0, 1) and isinstance(value, int | float):
        return bool(value)
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    return UNKNOWN


def _number(value: Any, expected: str, schema: dict[str, Any]) -> Any:
    if isinstance(value, list) and len(value) == 1:
        return _number(value[0], expected, schema)
    if isinstance(value, str):
        value = _quantity(value.strip(), schema)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return UNKNOWN
    if expected == "integer":
        return int(value) if value == int(value) else UNKNOWN
    return value


def _quantity(text: str, schema: dict[str, Any]) -> Any:
    """`20 min` in minutes, `512MB` in GB, `30%` as a share, `1_000` and `1,000` as 1000."""
    found = _QUANTITY.fullmatch(text[:60])
    if not found:
        return _misread_digits(text)
    try:
        number = resolve_scalar(found[1].replace("_", "").replace(",", ""))
    except ValueError:
        return UNKNOWN
    unit, own = found[2].lower(), schema.get("x-graphwright", {}).get("unit", "share")
    if not isinstance(number, int | float):
        return UNKNOWN
    if not unit:
        return number
    factor = _SCALES.get(own, {}).get(unit)
    if factor is None:
        return {"k": number * 1000, "px": number}.get(unit, UNKNOWN)
    return number if factor == 1 else float(f"{number * factor:.9g}")


def _misread_digits(text: str) -> Any:
    """A digit typed as the letter that looks like it: `O.5`, `l28`."""
    fixed = text.translate(str.maketrans("OolIS", "00115"))
    try:
        value = resolve_scalar(fixed)
    except ValueError:
        return UNKNOWN
    has_digit = any(c.isdigit() for c in text)
    return value if has_digit and isinstance(value, int | float) else UNKNOWN


def got(value: Any) -> str:
    """A value of a spec, for the end of a sentence."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {show(value)}"
    if isinstance(value, bool):
        return show(value)
    if isinstance(value, int | float):
        return f"the number {show(value)}"
    return "a list" if isinstance(value, list) else "a mapping"
