"""A model built from a folder's config.json is not much larger than the weights beside it.

A config of a few bytes can ask for a thousand million layers, or for one of any width. Counts are
bounded before a library reads them; parameters and modules are counted while the model is built,
which the libraries do without memory, and building ends where there are more than the weights fill.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from graphwright.ir.errors import ModelError
from graphwright.ir.files.nesting import entries

MOST_COUNTED = 100_000
"""Layers, heads, experts: libraries make lists as long as these numbers."""

PACKED = 64
"""Parameters to a stored number: 2-bit codes in words of 32, built several times over."""

SPARE_PARAMETERS = 1 << 27
SPARE_MODULES = 5_000
MODULES_PER_TENSOR = 64

_COUNT = re.compile(
    r"(n|num|number)_\w*(layer|block|head|expert|stage|level|group)s?\w*"
    r"|\w*(layers|blocks|heads|experts|stages|depths?|levels|n_layer|n_head|layers_per_block)"
)


def refuse_counts(config: Mapping[str, Any], folder: Path) -> None:
    """Refuses numbers of layers and the like that no model has.

    Raises:
        ModelError: names the entry.
    """
    for key, value in entries(config):
        if isinstance(value, int | float) and abs(value) > MOST_COUNTED and _COUNT.fullmatch(key):
            raise ModelError(f"config.json asks for {key} = {value}", where=str(folder))


@contextmanager
def fits(weights: Mapping[str, torch.Tensor], folder: Path) -> Iterator[None]:
    """Ends the building of models in the block that are far larger than these weights.

    Raises:
        ModelError: the model would have more parameters or modules than the weights could fill.
    """
    stored = sum(tensor.numel() for tensor in weights.values())
    most = {
        "parameters": PACKED * stored + SPARE_PARAMETERS,
        "modules": MODULES_PER_TENSOR * len(weights) + SPARE_MODULES,
    }
    counted = dict.fromkeys(most, 0)

    def count(what: str, number: int) -> None:
        counted[what] += number
        if counted[what] > most[what]:
            raise ModelError(
                f"config.json asks for a model of more than {most[what]} {what}, and the folder's "
                f"weights are {stored} numbers in {len(weights)} tensors",
                where=str(folder),
                fix="Download config.json and the weights from one place.",
            )

    def parameter(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):  # what is loaded takes its place, and counts again
            count("parameters", value.numel())

    def submodule(module: nn.Module, name: str, value: Any) -> None:
        count("modules", 1)

    handles = [
        hooks.register_module_parameter_registration_hook(parameter),
        hooks.register_module_module_registration_hook(submodule),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
