"""The one base of every declared option set (passes, backends). Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

EVERY_DTYPE = ("float64", "float32", "float16", "bfloat16")
"""Floating-point dtypes; what a pass or a backend computes in where it does not say."""


class Options(BaseModel):
    """Options of a pass or a backend: one declaration for validation, schema, help and docs.

    Strict and closed: an unknown key or a value of another type is an error. The string under a
    field is its description, so a default, a unit or a bound is written in no second place.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        defer_build=True,
        protected_namespaces=(),
    )


Selector = Annotated[
    tuple[str, ...], Field(json_schema_extra={"x-graphwright": {"selector": True}})
]
"""An option that is a list of layer patterns; see `ir/layers/selectors.py`."""


class Targets(Options):
    """The option `targets`, for a pass that changes layers."""

    targets: Selector = ("*",)
    """Layers that the pass changes: selector patterns over names and kinds."""


class Bounded(Options):
    """The option `max_error`, for a pass that changes the function."""

    max_error: Annotated[float, Field(gt=0)] | None = None
    """Largest relative error of the outputs, ||a-b|| / ||a||, against the program before this pass;
    no bound when absent."""
