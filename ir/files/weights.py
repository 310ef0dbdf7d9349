"""Putting named tensors into a module: names, shapes and dtypes checked, ties kept, no copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.pickles import listed

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put in front of every name."""


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> list[str]:
    """Gives the module the tensors of a file, in place of its own; returns warnings.

    The file's tensors themselves become the parameters, so mapped files stay mapped. A tensor of
    a narrower float type is widened to the module's; any other difference is an error.

    Raises:
        ModelError: names, shapes or dtypes do not fit; names the first few.
    """
    wanted = module.state_dict()
    weights, notes = _without_prefix(weights, wanted)
    groups = _tied(module)
    weights = _complete_ties(dict(weights), groups)
    _check_names(weights, wanted, where)
    _check_shapes(weights, wanted, where)
    converted, more = _converted(weights, wanted, where)
    differing = [names for names in groups if len(names) > 1 and not _all_equal(converted, names)]
    trainable = {name: p.requires_grad for name, p in module.named_parameters()}
    module.load_state_dict(converted, strict=True, assign=True)
    _retie(module, groups)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable.get(name, True) and parameter.is_floating_point())
    notes += more
    notes += [
        f"the factory ties {', '.join(names)}, and the file has different values for them; "
        f"{names[0]} is used"
        for names in differing
    ]
    return notes


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """A warning that names the tensors with NaN or infinite values; empty when there are none."""
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    return [f"weights with NaN or infinite values: {', '.join(listed(bad))}"] if bad else []


def _is_finite(tensor: torch.Tensor) -> bool:
    """No second copy of the tensor: extremes carry both NaN and infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    data = tensor.detach()
    if data.is_complex():
        data = torch.view_as_real(data.resolve_conj())
    if data.dtype.itemsize == 1:
        data = data.float()
    low, high = torch.aminmax(data)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _without_prefix(
    weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> tuple[Mapping[str, torch.Tensor], list[str]]:
    """Takes off a prefix that all names share and the module does not know."""
    removed = ""
    while weights and not any(name in wanted for name in weights):
        prefix = next((p for p in PREFIXES if all(n.startswith(p) for n in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        removed += prefix
    return weights, [f"the prefix {removed!r} was taken off all names"] if removed else []


def _tied(module: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _complete_ties(
    weights: dict[str, torch.Tensor], groups: Iterable[list[str]]
) -> dict[str, torch.Tensor]:
    """safetensors keeps a tied tensor once: the other names get it back."""
    for names in groups:
        present = [name for name in names if name in weights]
        if present:
            weights.update({n: weights[present[0]] for n in names if n not in weights})
    return weights


def _retie(module: nn.Module, groups: Iterable[list[str]]) -> None:
    for names in groups:
        shared = module.get_parameter(names[0])
        for name in names[1:]:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, shared)


def _all_equal(weights: Mapping[str, torch.Tensor], names: list[str]) -> bool:
    first = weights[names[0]]
    return all(weights[n] is first or torch.equal(weights[n], first) for n in names[1:])


def _check_names(
    weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str
) -> None:
    missing = [name for name in wanted if name not in weights]
    unexpected = [name for name in weights if name not in wanted]
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} of its {len(wanted)} tensors are missing in the file")
    if unexpected:
        parts.append(f"{len(unexpected)} tensors of the file are unknown to it")
    raise ModelError(
        f"the weights do not belong to the factory's module: {', and '.join(parts)}",
        where=where,
        fix="Check `factory` and `kwargs` in the spec's model section.",
        details=(
            *(f"missing: {name}" for name in listed(missing, 5)),
            *(f"unexpected: {name}" for name in listed(unexpected, 5)),
        ),
    )


def _check_shapes(
    weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str
) -> None:
    wrong = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(t.shape)} in the module"
        for name, t in wanted.items()
        if weights[name].shape != t.shape
    ]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors have another shape than in the factory's module",
            where=where,
            fix="Check `kwargs` in the spec's model section.",
            details=tuple(listed(wrong, 5)),
        )


def _converted(
    weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    out, widened, wrong = dict(weights), [], []
    for name, target in wanted.items():
        given = weights[name].dtype
        if given == target.dtype:
            continue
        floats = given.is_floating_point and target.dtype.is_floating_point
        if floats and torch.promote_types(given, target.dtype) == target.dtype:
            out[name] = weights[name].to(target.dtype)
            widened.append(f"{name} ({given} to {target.dtype})")
        else:
            wrong.append(f"{name}: {given} in the file, {target.dtype} in the module")
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors have another dtype than in the factory's module",
            where=where,
            fix="Let the factory build the module in the file's dtype, or save the file in the "
            "module's.",
            details=tuple(listed(wrong, 5)),
        )
    note = f"widened to the module's dtype: {', '.join(listed(widened, 3))}"
    return out, [note] if widened else []
