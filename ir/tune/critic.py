"""A discriminator of vectors, sequences, images or volumes, told levels and conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.signature import TensorSpec
from graphwright.ir.tune.player import PlayerOptions

SLOPE = 0.2
"""Of the leaky ReLUs."""

SMALL = 4
"""Side of an image that is not halved any more."""

WAVES = 16
"""Frequencies by which a level is told."""

WIDEST = 8
"""Largest number of channels, in multiples of the first."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


class CriticOptions(PlayerOptions):
    """Options of a discriminator and of its training."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"width": 64}]})

    width: Annotated[int, Field(ge=4)] = 64
    """Channels of its first layer; they double whenever an image is halved. Of vectors, the
    features of each of its three layers."""


class Critic(nn.Module):
    """One logit per sample, or several numbers, from convolutions with residual sums at falling
    sizes.

    Vectors go through layers instead. There are no norms: R1's gradient is that of a sample alone.

    Source: the blocks of Karras et al. 2020, "Analyzing and improving the image quality of
    StyleGAN", section 4.1, without filters and equalized rates.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 64,
        levels: int = 0,
        conditions: Sequence[TensorSpec] = (),
        outputs: int | None = None,
    ) -> None:
        """
        Args:
            shape: of one sample: (features,), or (channels, sizes...) with up to three sizes.
            width: as in the options.
            levels: numbers, of the order of one, that say how noisy a sample is; 0 where it is told
                none.
            conditions: inputs that it is told besides.
            outputs: numbers that it gives for a sample; when None one, without an axis for it.

        Raises:
            ModelError: samples of another form, or a condition of whole numbers without a range.
        """
        super().__init__()
        if not 1 <= len(shape) <= 4:
            raise ModelError(f"a discriminator reads vectors, sequences, images or volumes, and a "
                             f"sample has the shape {tuple(shape)}")  # fmt: skip
        self.told = Told(width, levels, conditions) if levels or conditions else None
        told = width if self.told is not None else 0
        self.dims = len(shape) - 1
        widths = [width, width, width] if self.dims == 0 else _widths(shape, width)
        first = nn.Linear(shape[0], width) if self.dims == 0 else self._conv(shape[0], width, 1)
        self.first = first
        make = VectorBlock if self.dims == 0 else self._block
        self.blocks = nn.ModuleList(make(i, o, told) for i, o in pairwise(widths))
        self.outputs = outputs
        self.last = nn.Linear(widths[-1], outputs or 1)

    def forward(
        self,
        x: Tensor,
        levels: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits [batch], or [batch, outputs], of samples [batch, *shape], levels [batch, levels],
        conditions by name."""
        told = None if self.told is None else self.told(levels, conditions or {})
        h = self.first(x.float())
        for block in self.blocks:
            h = block(h, told)
        h = F.leaky_relu(h, SLOPE)
        logits: Tensor = self.last(h.flatten(2).mean(2) if self.dims else h)
        return logits[:, 0] if self.outputs is None else logits

    def _conv(self, inputs: int, outputs: int, side: int = 3) -> nn.Module:
        return CONVOLUTIONS[self.dims - 1](inputs, outputs, side, padding=side // 2)

    def _block(self, inputs: int, outputs: int, told: int) -> nn.Module:
        convs = self._conv(inputs, inputs), self._conv(inputs, outputs)
        return Block(*convs, self._conv(inputs, outputs, 1), told, self.dims)


class Block(nn.Module):
    """Two convolutions with a sum past them, at half the size behind it."""

    def __init__(
        self, first: nn.Module, second: nn.Module, short: nn.Module, told: int, dims: int
    ) -> None:
        super().__init__()
        self.first, self.second, self.short, self.dims = first, second, short, dims
        channels = int(first.out_channels)  # type: ignore[arg-type]
        self.told = nn.Linear(told, channels) if told else None

    def forward(self, x: Tensor, told: Tensor | None) -> Tensor:
        """x [batch, channels, sizes...], told [batch, width]."""
        h = self.first(F.leaky_relu(x, SLOPE))
        if self.told is not None:
            h = h + self.told(told)[(..., *[None] * self.dims)]
        h = self.second(F.leaky_relu(h, SLOPE))
        return self._half(h + self.short(x)) / math.sqrt(2.0)

    def _half(self, x: Tensor) -> Tensor:
        sides = [2 if side > SMALL else 1 for side in x.shape[2:]]
        return POOLS[self.dims - 1](x, sides)


class VectorBlock(nn.Module):
    """A layer with a sum past it."""

    def __init__(self, inputs: int, outputs: int, told: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.told = nn.Linear(told, outputs) if told else None

    def forward(self, x: Tensor, told: Tensor | None) -> Tensor:
        """x [batch, features], told [batch, width]."""
        h: Tensor = self.layer(F.leaky_relu(x, SLOPE))
        return x + (h if self.told is None else h + self.told(told))


class Told(nn.Module):
    """Levels and conditions as one vector per sample."""

    def __init__(self, width: int, levels: int, conditions: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.waves = nn.Linear(2 * WAVES * levels, width) if levels else None
        # a list, for the name of an input may be one that modules have of their own
        self.names = [spec.name for spec in conditions]
        self.conditions = nn.ModuleList(_reader(spec, width) for spec in conditions)
        self.last = nn.Linear(width, width)

    def forward(self, levels: Tensor | None, conditions: Mapping[str, Tensor]) -> Tensor:
        """[batch, width]."""
        parts = [read(conditions[n]) for n, read in zip(self.names, self.conditions, strict=True)]
        if self.waves is not None:
            assert levels is not None  # made with levels
            rates = torch.exp2(torch.linspace(-3, 5, WAVES, device=levels.device))
            angles = (levels.float()[:, :, None] * rates).flatten(1)
            parts.append(self.waves(torch.cat([angles.sin(), angles.cos()], 1)))
        h = F.leaky_relu(torch.stack(parts).sum(0), SLOPE)
        return F.leaky_relu(self.last(h), SLOPE)


class _Flat(nn.Module):
    """A layer on all numbers of a sample, whatever their axes."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, width)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x.float().reshape(len(x), -1))
        return made


def _reader(spec: TensorSpec, width: int) -> nn.Module:
    sizes = [size for size in spec.shape[1:] if isinstance(size, int)]
    if len(sizes) != len(spec.shape) - 1:
        raise ModelError(f"a discriminator is told conditions of one size, and {spec.name!r} has "
                         f"the free shape {spec.shape}")  # fmt: skip
    if getattr(torch, spec.dtype).is_floating_point:
        return _Flat(math.prod(sizes), width)
    if spec.range is None or sizes:
        raise ModelError(
            f"a discriminator is told whole numbers as classes, and {spec.name!r} of the shape "
            f"{spec.shape} has the range {spec.range}",
            fix="Trace the model with `ranges` that say how many classes there are.",
        )
    return nn.Embedding(int(spec.range[1]), width)


def _widths(shape: Sequence[int], width: int) -> list[int]:
    """Channels in front of the first block and behind every one."""
    halvings = math.ceil(math.log2(max(shape[1:]) / SMALL))
    return [min(2**i, WIDEST) * width for i in range(max(2, halvings) + 1)]
