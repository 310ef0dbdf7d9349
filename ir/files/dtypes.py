"""The dtype a model is compiled in: the stored one, the one asked for, or one that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn


def _anything(dtype: str) -> str:
    return ""


@dataclass(frozen=True)
class Change:
    """What to do about a model's dtype.

    Attributes:
        dtype: to convert its floats to; None for nothing to do.
        replaced: names of stored dtypes, and of the one in their place; inputs that are declared
            in a stored one follow.
        notes: a line that says so.
    """

    dtype: torch.dtype | None = None
    replaced: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DtypeChoice:
    """The choice of a dtype.

    Attributes:
        asked: the spec's `model.dtype`; None for the stored one where it runs.
        refusal: why the chosen backends cannot run a dtype; empty where they can.
    """

    asked: str | None = None
    refusal: Callable[[str], str] = _anything

    def decide(self, stored: Iterable[torch.dtype]) -> Change:
        """The change for a model.

        Args:
            stored: dtypes of the model's tensors; those of floats count.
        """
        floats = {dtype for dtype in stored if dtype.is_floating_point}
        if self.asked is not None:
            wanted = getattr(torch, self.asked)
            if floats <= {wanted}:
                return Change()
            text = f"the model is stored in {_names(floats)} and compiled in {self.asked}, as asked"
            return Change(wanted, {_name(d): self.asked for d in floats}, (text,))
        why = next((text for d in _sorted(floats) if (text := self.refusal(_name(d)))), "")
        if not why:
            return Change()
        text = f"the model is stored in {_names(floats)} and compiled in float32: {why}"
        return Change(
            torch.float32,
            {_name(d): "float32" for d in floats},
            (f"{text} (model: {{dtype: ...}} chooses)",),
        )


STORED = DtypeChoice()
"""The stored dtype, whatever it is."""


def float_dtypes(tensors: Iterable[torch.Tensor]) -> set[torch.dtype]:
    """Dtypes of the floating-point tensors."""
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Converts the floating-point parameters and buffers of a module; ties stay ties.

    Complex and integer tensors are left as they are, unlike by `module.to(dtype)`.
    """
    made: dict[int, torch.Tensor] = {}

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype is dtype:
            return tensor
        return made.setdefault(id(tensor), tensor.to(dtype))

    module._apply(change)


def _sorted(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    return sorted(dtypes, key=str)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(_name(dtype) for dtype in _sorted(dtypes)) or "no floats"
