"""The network that makes one tensor from coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

RESIDUAL = 0.1
"""Start of the factor of a residual block."""


def start(
    inputs: int, hidden: int, layers: int, outputs: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Parameters at the start: uniform in +-1/sqrt(inputs of the layer), as `nn.Linear`'s.

    Args:
        inputs: size of an encoded coordinate.
        hidden: width.
        layers: the first layer, and `layers` - 1 residual blocks.
        outputs: values per coordinate.
        generator: of the values.
    """

    def uniform(*shape: int, fan_in: int) -> Tensor:
        drawn = torch.rand(*shape, generator=generator) * 2 - 1
        return drawn / math.sqrt(fan_in)

    found = {
        "0.weight": uniform(hidden, inputs, fan_in=inputs),
        "0.bias": uniform(hidden, fan_in=inputs),
    }
    for block in range(1, layers):
        found[f"{block}.weight"] = uniform(hidden, hidden, fan_in=hidden)
        found[f"{block}.bias"] = uniform(hidden, fan_in=hidden)
        found[f"{block}.factor"] = torch.tensor(RESIDUAL)
    found["out.weight"] = uniform(outputs, hidden, fan_in=hidden)
    found["out.bias"] = uniform(outputs, fan_in=hidden)
    return found


def run(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Values (rows, outputs) at encoded coordinates (rows, inputs)."""
    x = torch.relu(F.linear(x, parameters["0.weight"], parameters["0.bias"]))
    block = 1
    while f"{block}.weight" in parameters:
        inner = F.linear(x, parameters[f"{block}.weight"], parameters[f"{block}.bias"])
        x = parameters[f"{block}.factor"] * torch.relu(inner) + x
        block += 1
    return F.linear(x, parameters["out.weight"], parameters["out.bias"])
