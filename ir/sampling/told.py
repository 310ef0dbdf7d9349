"""A number that a denoiser is told beside the time: a guidance scale, a level to jump to."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program
from graphwright.ir.sampling.record import Denoiser
from graphwright.ir.sampling.surgery import Interface, NewInput
from graphwright.ir.signature import TensorSpec

FACTOR, SLOWEST = 1000.0, 10000.0
"""Of the waves: what a number is multiplied by, and the longest in radians."""


class Waves(nn.Module):
    """Sines and cosines of numbers: diffusers' `get_guidance_scale_embedding`.

    sin(1000 w f), cos(1000 w f) with f from 1 to 1 / 10000.
    """

    rates: Tensor

    def __init__(self, width: int, shift: float = 0.0) -> None:
        """
        Args:
            width: of the embedding, even.
            shift: added to the numbers first.
        """
        super().__init__()
        half = width // 2
        rates = torch.exp(torch.arange(half) * (-math.log(SLOWEST) / (half - 1)))
        self.register_buffer("rates", FACTOR * rates)
        self.shift = shift

    def forward(self, numbers: Tensor) -> Tensor:
        """[rows, width] of numbers [rows], or of one number: one row."""
        angles = (numbers.reshape(-1, 1) + self.shift) * self.rates
        return torch.cat([angles.sin(), angles.cos()], 1)


class _Told(nn.Module):
    """What a layer gives, and a linear map of a number's waves; zero at first."""

    def __init__(self, width: int, features: int, shift: float) -> None:
        super().__init__()
        self.waves = Waves(width, shift)
        self.projection = nn.Linear(width, features, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, number: Tensor, hidden: Tensor) -> Tensor:
        """number () or [batch], hidden [batch, features]."""
        told: Tensor = hidden + self.projection(self.waves(number))
        return told


def time_layer(program: Program, by: str) -> Layer:
    """The first linear layer of the embedding of time: it sees the time and no other input.

    Raises:
        ModelError: the network has no time, or none such.
    """
    record = Denoiser.required(program, by)
    for layer in layers(program, kinds={"linear"}):
        if record.time is not None and _reached_by(layer.node) == {record.time}:
            return layer
    raise ModelError(
        f"{by}: no linear layer of this network sees the time alone, and a number beside the time "
        "is told at such a layer",
        fix="Trace a network with an embedding of time by linear layers.",
    )


def tell(
    edit: Interface, by: str, name: str, value: float, *, width: int, shift: float = 0.0
) -> None:
    """Adds an input of one number, which the network is told where it is told the time.

    The number's waves go through a linear map that is zero at first, so that the network gives at
    first what it gave, and are added to what `time_layer` gives. The graph also takes a number for
    every row, as in training.

    Args:
        edit: of a denoiser.
        by: id of the pass.
        name: of the input, and prefix of what is stored for it.
        value: example of it, which is also what a call gets that leaves it out.
        width: of its waves, even.
        shift: added to the number in front of them.
    """
    at = time_layer(edit.program.replace(graph=edit.editor.graph), by).node
    features = at.meta["val"].shape
    if len(features) != 2:
        raise ModelError(f"{by}: the embedding of time has the shape {tuple(features)}, and a row "
                         "per sample is wanted")  # fmt: skip
    number = edit.add_input(NewInput(TensorSpec(name, "float32", ()), torch.tensor(value)))
    readers = list(at.users)
    after = at.next
    dtype = at.meta["val"].dtype
    module = _Told(width, int(features[1]), shift).to(dtype)
    (told,) = graft(edit.editor, module, number, at, name=name, before=after)
    for reader in readers:
        reader.replace_input_with(at, told)


def _reached_by(node: fx.Node) -> set[str]:
    """Names of the inputs whose values reach a node; sizes of an input are none."""
    found: set[str] = set()
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or "sym_size" in str(current.target):
            continue
        seen.add(current)
        if current.op == "placeholder":
            found.add(str(current.target))
        stack.extend(current.all_input_nodes)
    return found
