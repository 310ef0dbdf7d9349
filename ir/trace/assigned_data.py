"""`module.weight.data = ...` in a forward method, as nets do that put their weights together there.

Torch swaps a tensor's memory, which an export does not see. Here the parameter itself is another
tensor while the call lasts, so that the trace computes the weight and the model keeps its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def assigned_data(model: nn.Module) -> Iterator[None]:
    """Assignments to the `data` of the model's parameters hold until the end of the block."""
    own: Any = torch._C.TensorBase.data
    replaced: list[tuple[dict[str, Any], str, Any]] = []

    def assign(self: torch.Tensor, value: torch.Tensor) -> None:
        found = [
            (parameters, name)
            for parameters in (module._parameters for module in model.modules())
            for name, parameter in parameters.items()
            if parameter is self
        ]
        for parameters, name in found:
            replaced.append((parameters, name, self))
            parameters[name] = value  # type: ignore[assignment]
        if not found:
            own.__set__(self, value)

    def read(self: torch.Tensor) -> torch.Tensor:
        # torch's own makes a tensor that an export has never seen
        data: torch.Tensor = self.detach() if torch.compiler.is_exporting() else own.__get__(self)
        return data

    torch.Tensor.data = property(read, assign)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.data
        for parameters, name, before in reversed(replaced):
            parameters[name] = before
