"""The architectures that users bring, by name, each from the package that publishes it.

An entry imports its package when it is built, so that this list loads without any of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from conformance.zoo import Architecture, Field, floats, published
from torch import nn

FAMILIES = (
    "convolutional",
    "mobile",
    "transformers",
    "hybrids",
    "torchvision_nets",
    "segmentation",
    "super_resolution",
    "audio",
    "volumes",
    "graphs",
    "generative",
    "language",
)
USERS: dict[str, Architecture] = {}


def enter(
    name: str,
    family: str,
    make: Callable[[], nn.Module],
    fields: Mapping[str, Field],
    **options: Any,
) -> None:
    """Puts one architecture on the list.

    Raises:
        ValueError: there is one of that name.
    """
    if name in USERS:
        raise ValueError(f"two architectures are called {name}")
    USERS[name] = Architecture(name, family, make, fields, (), **options)


def image(size: int = 64, channels: int = 3, name: str = "x") -> dict[str, Field]:
    """One batch of square images."""
    return {name: floats("batch", channels, size, size)}


def timm(family: str, name: str, size: int = 64, **settings: Any) -> None:
    """Puts a model of timm on the list, under `timm.name`, with ten classes."""
    make = published("timm", "create_model", name, num_classes=10, **settings)
    enter(f"timm.{name}", family, make, image(size))


class Part(nn.Module):
    """The outputs of a model that a user reads, by key or position, where it returns more."""

    def __init__(self, model: nn.Module, key: Any) -> None:
        super().__init__()
        self.model = model
        self.key = key

    def forward(self, x: torch.Tensor) -> Any:
        """Returns the one output of `model`."""
        return self.model(x)[self.key]


def part_of(make: Callable[[], nn.Module], key: Any) -> Callable[[], nn.Module]:
    """Returns a builder of `Part(make(), key)`."""
    return lambda: Part(make(), key)


def load() -> dict[str, Architecture]:
    """Returns all architectures by name, in the order of the table."""
    for module in FAMILIES:
        importlib.import_module(f"conformance.users.{module}")
    return USERS
