"""Model families of the papers, from their descriptions (`tests/models`)."""

from __future__ import annotations

import torch
from conformance.zoo import Field, add, floats, ints
from models.activation_free import ActivationFreeNet
from models.series import TinyTimeMixer


def seen(*shape: int | str) -> Field:
    """Whether a value was observed: float32 zeros and ones."""
    return Field(lambda s, g: torch.randint(0, 2, s, generator=g).float(), shape)


add(
    "tiny_time_mixer",
    "time series",
    TinyTimeMixer,
    {
        "past": floats("batch", 30, "channels"),
        "observed": seen("batch", 30, "channels"),
        "resolution": ints("batch", low=0, high=5),
    },
    {"batch": 1, "channels": 1},
    {"batch": 3, "channels": 5},
    base={"channels": 4},
)
add(
    "tiny_time_mixer_channels",
    "time series",
    lambda: TinyTimeMixer(context=32, levels=3, mixed=3),
    {
        "past": floats("batch", 32, 3),
        "observed": seen("batch", 32, 3),
        "resolution": ints("batch", low=0, high=5),
    },
)
add(
    "activation_free_net",
    "diffusion",
    ActivationFreeNet,
    {
        "noisy": floats("batch", 3, "height", "width"),
        "guess": floats("batch", 3, "height", "width"),
        "step": ints("batch", low=0, high=100),
    },
    {"batch": 1, "height": 9, "width": 15},
    {"batch": 3, "height": 16, "width": 12},
    base={"height": 12, "width": 16},
)
