"""Model folders of transformers whose weights are stored in codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from graphwright.ir.files.coded.insert import Parts, is_linear, is_table, is_turned

Build = Callable[[Mapping[str, Tensor]], nn.Module]
"""The library's own loading of a model from tensors by name."""


def load_coded(parts: Parts, build: Build, blank: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model of a folder in codes: linear layers keep them, other weights become floats.

    The library renames tensors and merges some (the experts of a layer). Where a weight ends up is
    seen by its memory: every weight in codes is given to the library as zeros with a memory of
    their own. What it has merged is loaded again, as floats.

    Args:
        parts: of the checkpoint.
        build: makes the model.
        blank: the model without memory, its layers named as in the file or as in the model.
        dtype: of the model.

    Raises:
        ModelError: a weight has another size than its layer.
    """
    turned = [name for name, module in blank.named_modules() if is_turned(module)]
    zeros = {owner: _zeros(parts, owner, turned, dtype) for owner in parts.layers}
    plain = _without_empty_biases(parts, blank)
    model = build({**plain, **{f"{owner}.weight": tensor for owner, tensor in zeros.items()}})
    places = _places(model, zeros)
    merged = [owner for owner in zeros if not places[owner]]
    if merged:
        for owner in merged:
            parts.hold_as_floats(owner, "for the model keeps several of them in one tensor")
        floats = {owner: parts.value(owner, None, dtype) for owner in merged}
        given = {**zeros, **floats}
        model = build({**plain, **{f"{owner}.weight": tensor for owner, tensor in given.items()}})
        places = _places(model, zeros)
    for owner, names in places.items():
        if names:
            _put(model, parts, owner, names)
    return model


def _zeros(parts: Parts, owner: str, turned: list[str], dtype: torch.dtype) -> Tensor:
    """A weight of zeros in 1 element, which is memory of its own."""
    shape = parts.shape(owner)
    if any(_ends(name, owner) for name in turned):
        shape = shape[::-1]
    return torch.zeros((), dtype=dtype).expand(shape)


def _ends(name: str, owner: str) -> bool:
    """Whether two names of a layer differ by a prefix only."""
    return f".{name}".endswith(f".{owner}") or f".{owner}".endswith(f".{name}")


def _without_empty_biases(parts: Parts, blank: nn.Module) -> dict[str, Tensor]:
    """The plain tensors, less biases of zeros, which some tools write for layers without one."""
    bare = [name for name, module in blank.named_modules()
            if is_linear(module) and getattr(module, "bias", None) is None]  # fmt: skip
    ends = {f"{owner}.bias" for owner in parts.layers if any(_ends(name, owner) for name in bare)}
    return {name: tensor for name, tensor in parts.plain.items()
            if name not in ends or bool(tensor.any())}  # fmt: skip


def _places(model: nn.Module, zeros: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of the parameters that lie in the memory of each weight of zeros."""
    owners = {tensor.untyped_storage().data_ptr(): owner for owner, tensor in zeros.items()}
    found: dict[str, list[str]] = {owner: [] for owner in zeros}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.get(parameter.untyped_storage().data_ptr())
        if owner is not None:
            found[owner].append(name)
    return found


def _put(model: nn.Module, parts: Parts, owner: str, names: list[str]) -> None:
    """Puts a weight in codes where the library put its zeros; as floats where no layer fits."""
    places = [name.rpartition(".") for name in names]
    modules = [model.get_submodule(path) for path, _, _ in places]
    fits = [attribute == "weight" and (is_linear(module) or is_table(module))
            for module, (_, _, attribute) in zip(modules, places, strict=True)]  # fmt: skip
    if all(fits):
        for path, _, _ in places:
            parts.replace(model, path, owner)
        return
    odd = modules[fits.index(False)]
    parts.hold_as_floats(owner, f"for a {type(odd).__name__} keeps no codes")
    value: nn.Parameter | None = None
    for module, (_, _, attribute) in zip(modules, places, strict=True):
        old: Tensor = getattr(module, attribute)
        if value is None:
            held = parts.value(owner, module, old.dtype).reshape(old.shape)
            value = nn.Parameter(held, requires_grad=False)
        setattr(module, attribute, value)
