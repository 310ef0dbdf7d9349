"""The names and shapes that a module asks of a file of weights; prefixes of a file's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.pickles import counted, listed

PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel, torch.compile and Lightning put in front of every name."""

WRAPPERS = ("module.", "_orig_mod.")
"""Those of them that are no part of any model's own names."""

_DEPTH = 3
_COUNTER = ".num_batches_tracked"
"""A counter of batch norm that no inference reads; files of torch before 0.4 have none."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """The tensors that a module expects.

    Attributes:
        state: its own tensors by name.
        ties: groups of names that are one tensor.
    """

    state: dict[str, torch.Tensor]
    ties: list[list[str]]

    @classmethod
    def of(cls, module: nn.Module) -> Target:
        """The target of a module."""
        groups: dict[int, list[str]] = {}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            groups.setdefault(id(tensor), []).append(name)
        ties = [names for names in groups.values() if len(names) > 1]
        return cls(dict(module.state_dict()), ties)

    def completed(self, weights: Tensors) -> dict[str, torch.Tensor]:
        """The weights, with what follows from them: safetensors keeps a tied tensor once."""
        whole = dict(weights)
        for names in self.ties:
            present = [name for name in names if name in whole]
            if present:
                whole.update({n: whole[present[0]] for n in names if n not in whole})
        for name, own in self.state.items():
            if name.endswith(_COUNTER):
                whole.setdefault(name, own)
        return whole

    def missing(self, weights: Tensors) -> list[str]:
        """Names that the weights lack."""
        whole = self.completed(weights)
        return [name for name in self.state if name not in whole]

    def fits(self, weights: Tensors) -> bool:
        """Whether every name is there, in its shape."""
        whole = self.completed(weights)
        return all(n in whole and whole[n].shape == t.shape for n, t in self.state.items())


def without_prefix(
    weights: Tensors, target: Target, asked: str | None, where: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Takes off the prefix that was asked for, or one that training tools put before all names.

    Args:
        weights: tensors by name.
        target: what the module wants; known prefixes are taken off where it fits behind them.
        asked: the spec's `strip_prefix`; names without it are left aside.
        where: the file.

    Raises:
        ModelError: no name has the prefix that was asked for.
    """
    if asked:
        return stripped(weights, asked, where)
    if not weights or target.fits(weights):
        return dict(weights), []
    for prefix in _known_prefixes():
        inner = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        if inner and target.fits(inner):
            return stripped(weights, prefix, where)
    shared = _shared_prefix(weights, target)
    return stripped(weights, shared, where) if shared else (dict(weights), [])


def prefix_that_fits(weights: Tensors, target: Target) -> str:
    """A prefix behind which all wanted names are found; empty when there is none."""
    first = next(iter(target.state), "")
    for name in weights if first else ():
        prefix = name.removesuffix(first)
        if prefix != name and prefix.endswith("."):
            inner = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
            if target.fits(inner):
                return prefix
    return ""


def _known_prefixes() -> list[str]:
    found, last = [], [""]
    for _ in range(_DEPTH):
        last = [before + prefix for before in last for prefix in PREFIXES]
        found += last
    return found


def _shared_prefix(weights: Tensors, target: Target) -> str:
    """The known prefix of all names of a file that has none of the module's; it may not fit."""
    prefix = ""
    while not any(name.removeprefix(prefix) in target.state for name in weights):
        more = next((p for p in PREFIXES if all(n.startswith(prefix + p) for n in weights)), None)
        if more is None:
            return prefix
        prefix += more
    return prefix


def stripped(
    weights: Tensors, prefix: str, where: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors that have a prefix, without it, and a note on those that do not.

    Raises:
        ModelError: none has it.
    """
    inner = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    rest = [name for name in weights if not name.startswith(prefix)]
    if not inner:
        raise ModelError(
            f"no tensor of the file has the prefix {prefix!r}",
            where=where,
            fix="Correct `strip_prefix` in the spec's model section.",
            details=tuple(f"it has: {name}" for name in listed(weights, 4)),
        )
    if not rest:
        return inner, [f"the prefix {prefix!r} was taken off all names"]
    return inner, [
        f"the prefix {prefix!r} was taken off {len(inner)} names; "
        f"{counted(len(rest), 'tensor')} without it left aside: {', '.join(listed(rest, 4))}"
    ]
