"""Activations of many batches within a budget: what does not fit lies in memory-mapped files."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from graphwright.ir.files.mapped import SMALL, mapped_copy


class Spill:
    """Keeps values; tensors beyond the budget are copied to files that vanish with them.

    A spilled tensor is mapped, so that reading it costs no more memory than the system has to
    spare. Files are unlinked as soon as they are open: a killed process leaves none.

    Args:
        budget: bytes of tensors in memory at most, counted as if no two shared their storage.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held = 0
        self.spilled = 0
        """Bytes that went to files so far."""

    def put(self, value: Any) -> Any:
        """The value to keep: itself, or a mapped copy; tuples and lists are looked into."""
        if isinstance(value, list | tuple):
            return type(value)(self.put(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        size = value.numel() * value.element_size()
        if size < SMALL or value.device.type != "cpu":
            return value
        if self.held + size <= self.budget:
            self.held += size
            weakref.finalize(value, self._release, size)
            return value
        return self._to_file(value.detach(), size)

    def _release(self, size: int) -> None:
        self.held -= size

    def _to_file(self, value: Tensor, size: int) -> Tensor:
        self.spilled += size
        return mapped_copy(value)
