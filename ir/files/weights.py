"""Putting named tensors into a module: names, shapes and dtypes checked, ties kept, no copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.pickles import counted, listed
from graphwright.ir.files.target import Target, prefix_that_fits, without_prefix


def fill(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    where: str,
    *,
    strip_prefix: str | None = None,
) -> list[str]:
    """Gives the module the tensors of a file, in place of its own; returns warnings.

    The file's tensors themselves become the parameters, so mapped files stay mapped. A tensor of
    a narrower float type is widened to the module's; any other difference is an error. Tensors
    that the module does not have are left aside with a warning.

    Args:
        module: in its own dtype.
        weights: tensors by name.
        where: the file.
        strip_prefix: what to take off the names; known prefixes are found without it.

    Raises:
        ModelError: a tensor is missing, or shapes or dtypes do not fit; names the first few.
    """
    target = Target.of(module)
    wanted, groups = target.state, target.ties
    weights, notes = without_prefix(weights, target, strip_prefix, where)
    _check_names(weights, target, where)
    weights = target.completed(weights)
    _check_shapes(weights, wanted, where)
    notes += unexpected_note([name for name in weights if name not in wanted])
    weights = {name: weights[name] for name in wanted}
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


def _retie(module: nn.Module, groups: Iterable[list[str]]) -> None:
    for names in groups:
        shared = module.get_parameter(names[0])
        for name in names[1:]:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, shared)


def _all_equal(weights: Mapping[str, torch.Tensor], names: list[str]) -> bool:
    first = weights[names[0]]
    return all(weights[n] is first or torch.equal(weights[n], first) for n in names[1:])


def unexpected_note(names: Iterable[str]) -> list[str]:
    """A warning that names tensors which the model does not have; empty when there are none."""
    names = list(names)
    if not names:
        return []
    which = ", ".join(listed(names, 4))
    return [f"left aside, for the model has no such tensors ({len(names)} of the file): {which}"]


def _check_names(weights: Mapping[str, torch.Tensor], target: Target, where: str) -> None:
    missing = target.missing(weights)
    if not missing:
        return
    unexpected = [name for name in weights if name not in target.state]
    what = f"{len(missing)} of its {counted(len(target.state), 'tensor')} missing in the file"
    if unexpected:
        what += f", and {counted(len(unexpected), 'tensor')} of the file unknown to it"
    prefix = prefix_that_fits(weights, target)
    raise ModelError(
        f"the weights do not belong to the factory's module: {what}",
        where=where,
        fix=f"All are there with the prefix {prefix!r}: say model: {{strip_prefix: {prefix}}}."
        if prefix
        else "Check `factory` and `kwargs` in the spec's model section.",
        details=(
            *(f"missing: {name}" for name in listed(missing, 5)),
            *(f"unexpected: {name}" for name in listed(unexpected, 5)),
        ),
    )


def _check_shapes(
    weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str
) -> None:
    odd = [
        f"{name}: {'no values' if t.is_meta else t.layout}"
        for name, t in weights.items()
        if name in wanted and (t.is_meta or t.layout is not torch.strided)
    ]
    if odd:
        raise ModelError(
            f"{counted(len(odd), 'tensor')} that cannot be weights",
            where=where,
            fix="Save dense tensors, on a device.",
            details=tuple(listed(odd, 5)),
        )
    wrong = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(t.shape)} in the module"
        for name, t in wanted.items()
        if weights[name].shape != t.shape
    ]
    if wrong:
        raise ModelError(
            f"{counted(len(wrong), 'tensor')} of another shape than in the factory's module",
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
