"""Arguments that a spec pins: they are part of the program, and no inputs of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from graphwright.specs.sections import InputSection

_OF_VALUE = {bool: "bool", int: "int64", float: "float32"}


def pinned_arguments(module: nn.Module, inputs: Mapping[str, InputSection]) -> dict[str, Any]:
    """Every pinned argument as the model takes it: a number, a text, or a scalar tensor.

    A number where the model's own code says so (TorchScript's types, an annotation), or where
    the spec gives no dtype; else a `Constant`, which is a tensor once the model is run.
    """
    kinds = _kinds(module)
    return {
        name: _as_taken(name, spec, kinds.get(name, ""))
        for name, spec in inputs.items()
        if spec.pinned is not None
    }


def as_arguments(pinned: Mapping[str, Any]) -> dict[str, Any]:
    """The same, ready to be handed to the model itself."""
    from graphwright.ir.trace.calling import Constant

    return {n: v.tensor() if isinstance(v, Constant) else v for n, v in pinned.items()}


def _as_taken(name: str, spec: InputSection, kind: str) -> Any:
    import torch

    from graphwright.ir.files.torchscript import NUMBERS
    from graphwright.ir.trace.calling import Constant

    value: Any = spec.pinned
    is_tensor = kind == "Tensor" or (spec.dtype is not None and kind not in NUMBERS)
    if kind in ("int", "float", "bool"):
        made = {"int": int, "float": float, "bool": bool}[kind](value)
        if made != value:
            raise ModelError(
                f"the model takes {name!r} as {kind}, and it is pinned at {value!r}",
                where=f"model.inputs.{name}",
            )
        return made
    if not is_tensor:
        return value
    if isinstance(value, str):
        raise ModelError(
            f"the model takes {name!r} as a tensor, and it is pinned at {value!r}",
            where=f"model.inputs.{name}",
        )
    return Constant(value, getattr(torch, spec.dtype or _OF_VALUE[type(value)]))


def _kinds(module: nn.Module) -> dict[str, str]:
    """Types of the model's arguments as its code says them; those it says nothing of are absent."""
    scripted: dict[str, str] | None = getattr(module, "argument_kinds", None)
    if scripted is not None:
        return scripted
    found = {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        annotation = parameter.annotation
        if annotation is not inspect.Parameter.empty:
            is_type = isinstance(annotation, type)
            found[name] = annotation.__name__ if is_type else str(annotation)
    return found
