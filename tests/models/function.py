"""The smallest model: a function of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Function(nn.Module):
    """A function of a tensor as a module, whose input is called `x`."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """Returns what the function gives."""
        return self.function(x)
