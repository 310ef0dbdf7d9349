"""Every library's folders, and how our reading of them compares with its own."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LIBRARIES = {
    "compressed_tensors": "compressed-tensors",
    "gptqmodel": "gptqmodel",
    "awq": "autoawq",
    "bitsandbytes": "bitsandbytes",
    "auto_round": "auto-round",
    "hqq": "hqq",
    "transformers": "transformers",
}
"""Modules and distributions; `with_<module>.py` makes the folders."""


@dataclass(frozen=True)
class Compared:
    """Our reading of a folder beside the library's own.

    Attributes:
        version: of the library.
        weights: largest ||ours - theirs|| / ||theirs|| of a layer.
        logits: the same of the logits; None where the library has not run the model.
        held: classes of the layers that hold the weights.
        warnings: what loading said.
    """

    version: str
    weights: float
    logits: float | None
    held: str
    warnings: list[str]


def installed() -> list[str]:
    """Modules of the libraries that are here."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]


def maker(library: str) -> Any:
    """The module that makes a library's folders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"peers.with_{library}")


def compare(library: str, case: str, folder: Path) -> Compared:
    """Lets a library write a folder, reads it, and compares."""
    from graphwright.ir.files import load_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = maker(library).make(case, folder)
        loaded = load_model(folder)
    assert loaded.module is not None
    assert theirs.weights
    worst, held = 0.0, set()
    for owner, wanted in theirs.weights.items():
        layer: Any = loaded.module.get_submodule(owner)
        held.add(type(layer).__name__)
        ours = layer.weight.detach().float()
        ours = ours.T if ours.shape != wanted.shape else ours
        worst = max(worst, _error(ours, wanted))
    logits = None
    if theirs.logits is not None:
        from peers import tiny

        logits = _error(tiny.logits(loaded.module), theirs.logits)
    version = importlib.metadata.version(LIBRARIES[library])
    return Compared(version, worst, logits, ", ".join(sorted(held)), loaded.warnings)


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
