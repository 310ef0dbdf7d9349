"""Weights inside a training checkpoint: found where they fit the module, or named by a key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.pickles import listed
from graphwright.ir.files.target import Target, without_prefix

Tensors = dict[str, torch.Tensor]

_AVERAGED = re.compile(r"(^|[._])(\w*ema|swa|averaged?|shadow)([._]\w*)?$", re.IGNORECASE)
"""Keys of weights averaged over training, which are kept beside those of the last step."""

_DEPTH = 3
_ITSELF = ""
"""Key of the tensors that lie in the checkpoint itself, under no key."""


def weights_in(
    value: Any,
    where: str,
    *,
    target: Target | None = None,
    key: str | None = None,
    strip_prefix: str | None = None,
) -> tuple[Tensors, list[str]]:
    """The tensors by name in a loaded checkpoint, and notes on where they were.

    Args:
        value: what the file held.
        where: the file.
        target: the module's names and shapes, by which one of several groups of tensors is
            found; without it the largest group is taken.
        key: the spec's key of the group, dots between its parts.
        strip_prefix: what the spec takes off the names.

    Raises:
        ModelError: there are none, none or several fit, or there is no such key; says what there
            is.
    """
    if not isinstance(value, Mapping):
        raise ModelError(
            f"the file holds a {type(value).__name__}, not tensors by name",
            where=where,
            fix="Save `model.state_dict()`.",
        )
    found = dict(_groups(value))
    if not found:
        raise _no_tensors(value, where)
    notes: list[str] = []
    if key is not None:
        chosen = _known_key(key, list(found), where)
    elif target is None:
        chosen = max(found, key=lambda name: len(found[name]))
    else:
        chosen, notes = _fitting(found, target, strip_prefix, where)
    return found[chosen], [*_left_aside(value, chosen), *notes]


def module_in(value: Any, where: str, key: str | None = None) -> tuple[nn.Module | None, list[str]]:
    """The module a pickled file holds, itself or under a key, and notes; None for a file of
    weights.

    Raises:
        ModelError: it holds several, and no key says which; or the key names something else.
    """
    if isinstance(value, nn.Module):
        return value, []
    if not isinstance(value, Mapping):
        return None, []
    modules = {str(k): v for k, v in value.items() if isinstance(v, nn.Module)}
    if not modules or (key is not None and key not in modules and dict(_groups(value))):
        return None, []
    if key is not None:
        chosen, notes = _known_key(key, list(modules), where), list[str]()
    else:
        chosen, notes = _only(list(modules), where, "modules")
    return modules[chosen], [*_left_aside(value, chosen), *notes]


def _groups(value: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(key, tensors by name) of every mapping that holds tensors, those of optimizers left out."""
    if {"state", "param_groups"} <= set(value):
        return
    own = {str(name): t for name, t in value.items() if isinstance(t, torch.Tensor)}
    if own:
        yield path, own
    for name, part in value.items():
        if isinstance(part, Mapping) and depth < _DEPTH and isinstance(name, str):
            yield from _groups(part, f"{path}.{name}" if path else name, depth + 1)


def _known_key(key: str, keys: list[str], where: str) -> str:
    if key in keys:
        return key
    raise ModelError(
        f"there are no weights under the key {key!r}",
        where=where,
        fix=f"There are some {_shown(keys)}.",
    )


def _fitting(
    found: Mapping[str, Tensors], target: Target, strip_prefix: str | None, where: str
) -> tuple[str, list[str]]:
    """The key of the group that the module is filled from, and a note on averaged ones."""
    if len(found) == 1:
        return next(iter(found)), []
    bare = {key: _bare(group, target, strip_prefix, where) for key, group in found.items()}
    fitting = [key for key, group in bare.items() if target.fits(group)]
    if fitting:
        return _only(fitting, where, "groups of weights that fit the factory's module")
    near = [key for key, group in bare.items() if any(name in target.state for name in group)]
    if len(near) == 1:
        return near[0], []
    raise ModelError(
        "none of the groups of tensors in the file fits the factory's module",
        where=where,
        fix="Check `factory` and `kwargs`, or say model: {key: ..., strip_prefix: ...}.",
        details=tuple(
            f"{_name(key)}: {len(group)} tensors, "
            f"{len(target.missing(group))} of the module's {len(target.state)} missing"
            for key, group in bare.items()
        ),
    )


def _bare(group: Tensors, target: Target, strip_prefix: str | None, where: str) -> Tensors:
    if strip_prefix and not any(name.startswith(strip_prefix) for name in group):
        return {}
    return without_prefix(group, target, strip_prefix, where)[0]


def _only(keys: list[str], where: str, what: str) -> tuple[str, list[str]]:
    """The one key that is not of averaged weights.

    Raises:
        ModelError: there are several; names them.
    """
    plain = [key for key in keys if not _AVERAGED.search(key)]
    averaged = [key for key in keys if key not in plain]
    chosen = plain or averaged
    if len(chosen) > 1:
        raise ModelError(
            f"the file holds {len(keys)} {what}",
            where=where,
            fix="Say which: model: {key: ...}.",
            details=tuple(f"key: {_name(key)}" for key in keys),
        )
    if not plain or not averaged:
        return chosen[0], []
    names = ", ".join(repr(key) for key in averaged)
    return chosen[0], [
        f"averaged weights are there too, under {names}: model: {{key: {averaged[0]}}} takes them"
    ]


def _left_aside(value: Mapping[Any, Any], chosen: str) -> list[str]:
    if chosen == _ITSELF:
        rest = [str(key) for key, v in value.items() if not isinstance(v, torch.Tensor)]
        names = ", ".join(listed(rest, 4))
        return [f"entries that are no tensors were left aside: {names}"] if rest else []
    rest = [str(key) for key in value if str(key) != chosen.partition(".")[0]]
    text = f"weights were taken from {chosen!r}"
    return [f"{text}; left aside: {', '.join(listed(rest))}" if rest else text]


def _no_tensors(value: Mapping[Any, Any], where: str) -> ModelError:
    if {"state", "param_groups"} <= set(value):
        return ModelError("this is the state of an optimizer, without the model", where=where)
    return ModelError(
        "the file holds no tensors by name",
        where=where,
        fix="Save `model.state_dict()`.",
        details=tuple(f"key: {key}" for key in listed(map(str, value))),
    )


def _shown(keys: list[str]) -> str:
    return "under " + ", ".join(_name(key) for key in keys)


def _name(key: str) -> str:
    return repr(key) if key else "no key"
