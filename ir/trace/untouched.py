"""Runs a model and leaves it as it was: attributes, containers, buffers written in place."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEPTH = 3
"""Depth to which containers and plain objects in a module's attributes are searched."""


@dataclass
class Writes:
    """Values that a run wrote to its model, by qualified name.

    Attributes:
        tensors: buffers, parameters and tensors in plain attributes, with their value before.
        others: plain attributes that hold a number or a text, with their value before.
        contents: lists, dicts and objects in attributes that hold something else now.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    contents: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.others or self.contents)

    def names(self) -> list[str]:
        """Qualified names of all that was written."""
        return [*self.tensors, *self.others, *self.contents]


@contextlib.contextmanager
def same_attributes(model: nn.Module) -> Iterator[Writes]:
    """Takes back what the forward methods assign to their modules, as caches of tables.

    Without it a stand-in tensor of the trace stays in the model, and fails at the next call.
    """
    writes = Writes()
    saved = [
        (name, module, dict(vars(module)), dict(module._buffers))
        for name, module in model.named_modules()
    ]
    contents = [
        (name, held)
        for name, module, attributes, _ in saved
        for held in _contents(attributes, module, DEPTH)
    ]
    try:
        yield writes
    finally:
        for name, module, attributes, buffers in saved:
            _note_assigned(writes, name, vars(module), attributes)
            _note_assigned(writes, name, module._buffers, buffers)
            _put_back(vars(module), {n: v for n, v in attributes.items() if n != "training"})
            _put_back(module._buffers, buffers)
        for name, (attribute, container, before) in contents:
            path = f"{name}.{attribute}" if name else attribute
            if _refill(container, before) and path not in writes.contents:
                writes.contents.append(path)


def _note_assigned(
    writes: Writes, module: str, now: dict[str, Any], before: dict[str, Any]
) -> None:
    for name in (*before, *(n for n in now if n not in before)):
        old, new = before.get(name), now.get(name)
        if new is old or name == "training" or (name.startswith("_") and name in _OF_MODULES):
            continue
        path = f"{module}.{name}" if module else name
        if isinstance(new, Tensor):
            writes.tensors.setdefault(path, old)
        elif isinstance(new, bool | int | float | str) and new != old:
            writes.others.setdefault(path, old)


_OF_MODULES = frozenset(vars(nn.Module()))


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in now if name not in before and name != "training"]:
        del now[name]
    now.update(before)


def _contents(
    values: dict[str, Any], owner: Any, depth: int
) -> Iterator[tuple[str, Any, list[Any] | dict[Any, Any]]]:
    """Lists, dicts and fields of plain objects in attributes: name, and what each holds now."""
    for name, value in values.items():
        if name in _OF_MODULES and isinstance(owner, nn.Module):
            continue
        if isinstance(value, nn.Module | Tensor | type) or callable(value):
            continue
        if isinstance(value, list):
            yield name, value, list(value)
        elif isinstance(value, dict):
            yield name, value, dict(value)
            if depth:
                strings = {str(k): v for k, v in value.items()}
                yield from ((name, *held[1:]) for held in _contents(strings, value, depth - 1))
        elif depth and isinstance(getattr(value, "__dict__", None), dict):
            yield name, vars(value), dict(vars(value))
            yield from ((name, *held[1:]) for held in _contents(vars(value), value, depth - 1))


def _refill(container: Any, before: list[Any] | dict[Any, Any]) -> bool:
    """Puts back what a container held; whether it held something else."""
    if isinstance(before, list):
        same = len(container) == len(before) and all(map(operator.is_, container, before))
        if not same:
            container[:] = before
        return not same
    same = container.keys() == before.keys() and all(container[k] is v for k, v in before.items())
    if not same:
        container.clear()
        container.update(before)
    return not same


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[Writes]:
    """As `same_attributes`, and tensors that operators write to get their values back."""
    with same_attributes(model) as writes:
        watch = _KeepFirst(_tensors(model))
        try:
            with watch:
                yield writes
        finally:
            for name, tensor, before in watch.kept.values():
                if not _equal(tensor, before):
                    writes.tensors.setdefault(name, before)
                with torch.no_grad():
                    tensor.copy_(before)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        held = {**vars(module), **module._buffers, **module._parameters}
        for name, value in held.items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}" if path else name] = value
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a, b))


class _KeepFirst(TorchDispatchMode):
    """Keeps the value that a tensor had before an operator first wrote to its storage."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            if tensor.layout is torch.strided:
                self.by_storage.setdefault(_storage(tensor), []).append((name, tensor))
        self.kept: dict[str, tuple[str, Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "batch_norm" in func._schema.name:  # moves statistics, and its schema does not say so
            self._keep(args)
        elif func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(value)
            for value in kwargs.values():
                self._keep(value)
        return func(*args, **kwargs)

    def _keep(self, value: Any) -> None:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                continue
            for name, held in self.by_storage.get(_storage(tensor), ()):
                if name not in self.kept:
                    self.kept[name] = (name, held, held.detach().clone())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
