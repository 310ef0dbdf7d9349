"""The rounding of a layer's inputs that a checkpoint asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import graphwright.ir.ops  # noqa: F401  registers graphwright::fake_quantize and its like

ours = torch.ops.graphwright


@dataclass(frozen=True)
class Rounding:
    """The rounding of a quantized layer's inputs as the layer runs.

    Attributes:
        type: of the codes; 8 bits.
        scale: of a tensor when it is stored; None when it is found as the layer runs: the largest
            magnitude of each row, or of each `group` inputs of a row.
        zero: zero point of a stored int8 scale.
        group: inputs that share a scale; 0 for a whole row.
    """

    type: Literal["float8", "int8"]
    scale: float | None = None
    zero: int = 0
    group: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in), rounded, in its own dtype."""
        if self.scale is not None and self.type == "float8":
            rounded: Tensor = ours.fake_quantize_float8(x, self.scale)
        elif self.scale is not None:
            rounded = ours.fake_quantize(x, self.scale, self.zero, -128, 127)
        elif self.group:
            # Zeros that fill up the last group leave its largest magnitude as it is.
            whole = torch.nn.functional.pad(x, (0, -x.shape[-1] % self.group))
            rows = whole.unflatten(-1, (-1, self.group))
            rounded = self._rows(rows).flatten(-2)[..., : x.shape[-1]]
        else:
            rounded = self._rows(x)
        return rounded

    def _rows(self, x: Tensor) -> Tensor:
        if self.type == "float8":
            rounded: Tensor = ours.fake_quantize_float8(x, 0.0)
            return rounded
        # 255 steps from -128 to 127 span twice the largest magnitude.
        wide = x.float()
        step = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127.5
        return (torch.clamp(torch.round(wide / step), -128, 127) * step).to(x.dtype)

    def __str__(self) -> str:
        scope = "a stored scale" if self.scale is not None else (
            f"a scale per {self.group} inputs of a token" if self.group else "a scale per token"
        )  # fmt: skip
        return f"{self.type} with {scope}"
