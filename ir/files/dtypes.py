"""The dtype a model is compiled in: the stored one, the one asked for, or one that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn


def _anything(dtype: str) -> str:
    return ""


@dataclass(frozen=True)
class DtypeChoice:
    """The choice of a dtype.

    Attributes:
        asked: the spec's `model.dtype`; None for the stored one where it runs.
        refusal: why the chosen backends cannot run a dtype; empty where they can.
    """

    asked: str | None = None
    refusal: Callable[[str], str] = _anything

    def decide(self, stored: Iterable[torch.dtype]) -> tuple[torch.dtype | None, list[str]]:
        """The dtype to convert to, None for none, and a line that says so.

        Args:
            stored: dtypes of the model's tensors; those of floats count.
        """
        floats = {dtype for dtype in stored if dtype.is_floating_point}
        if self.asked is not None:
            wanted = getattr(torch, self.asked)
            if floats <= {wanted}:
                return None, []
            return wanted, [
                f"the model is stored in {_names(floats)} and compiled in {self.asked}, as asked"
            ]
        why = next((text for d in _sorted(floats) if (text := self.refusal(_name(d)))), "")
        if not why:
            return None, []
        return torch.float32, [
            f"the model is stored in {_names(floats)} and compiled in float32: {why} "
            "(model: {dtype: ...} chooses)"
        ]


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
