"""The time-series mixer of P28 (Tiny Time Mixers), from its description."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 4
"""Width at and below which a level has no adaptive patching."""


class Gate(nn.Module):
    """x times a softmax of a linear map of x, both along the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.score = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.softmax(self.score(x), -1)


class Mlp(nn.Module):
    """Two layers with a GELU, twice as wide inside."""

    def __init__(self, size: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.drop(F.gelu(self.up(x)))))


class ChannelMixer(nn.Module):
    """Across the series: the gate in front of the MLP."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm, self.gate, self.mlp = nn.LayerNorm(width), Gate(channels), Mlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(x).permute(0, 2, 3, 1)
        return x + self.mlp(self.gate(mixed)).permute(0, 3, 1, 2)


class PatchMixer(nn.Module):
    """Across the patches of a series."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm, self.mlp, self.gate = nn.LayerNorm(width), Mlp(patches), Gate(patches)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(self.mlp(self.norm(x).mT)).mT


class FeatureMixer(nn.Module):
    """Across the features of a patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp, self.gate = nn.LayerNorm(width), Mlp(width), Gate(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(self.mlp(self.norm(x)))


def layer(patches: int, width: int, channels: int | None = None) -> nn.Sequential:
    """One mixer layer; across the channels too where their number is given."""
    parts: list[nn.Module] = [] if channels is None else [ChannelMixer(channels, width)]
    parts += [PatchMixer(patches, width)] if patches > 1 else []
    return nn.Sequential(*parts, FeatureMixer(width))


class Level(nn.Module):
    """Layers on patches cut `times` as fine: a plain reshape there and back."""

    def __init__(self, patches: int, width: int, times: int, layers: int) -> None:
        super().__init__()
        self.times = times if width // times > SMALLEST else 1
        self.layers = nn.Sequential(
            *(layer(patches * self.times, width // self.times) for _ in range(layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, n, d = x.shape
        fine = x.reshape(b, c, n * self.times, d // self.times)
        return self.layers(fine).reshape(b, c, n, d)


class TinyTimeMixer(nn.Module):
    """Past values (B, L, C) and their resolution (B,) to a forecast (B, horizon, C).

    `mixed` is the number of channels where the decoder mixes them.
    """

    def __init__(
        self, context: int = 30, patch: int = 8, width: int = 16, levels: int = 2,
        layers: int = 2, narrow: int = 8, horizon: int = 6, mixed: int | None = None,
        resolutions: int = 5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch = patch
        self.oldest = context % patch  # of a context that is no multiple, the oldest steps go
        patches = context // patch + 1
        self.embed = nn.Linear(patch, width)
        self.token = nn.Embedding(resolutions, patch)
        middle = (patch + width) // 2
        self.prefix = nn.Sequential(nn.Linear(patch, middle), nn.GELU(), nn.Linear(middle, width))
        self.levels = nn.Sequential(
            *(Level(patches, width, 2**k, layers) for k in reversed(range(levels)))
        )
        self.narrow = nn.Linear(width, narrow)
        self.decoder = nn.Sequential(*(layer(patches, narrow, mixed) for _ in range(layers)))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(patches * narrow, horizon)

    def forward(self, past: Tensor, observed: Tensor, resolution: Tensor) -> Tensor:
        count = observed.sum(1, keepdim=True).clamp_min(1)
        loc = (past * observed).sum(1, keepdim=True) / count
        spread = (((past - loc) * observed) ** 2).sum(1, keepdim=True) / count
        scale = torch.sqrt(spread + 1e-5)
        series = ((past - loc) / scale).mT[:, :, self.oldest :]
        x = self.embed(series.unfold(-1, self.patch, self.patch))
        token = self.prefix(self.token(resolution))[:, None, None].expand(-1, x.shape[1], -1, -1)
        x = self.narrow(self.levels(torch.cat([token, x], 2)))
        forecast = self.head(self.drop(self.decoder(x).flatten(2))).mT
        return forecast * scale + loc
