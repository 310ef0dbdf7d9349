"""State that a TorchScript module keeps in its attributes, as buffers that a trace can see."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from graphwright.ir.errors import ModelError


def written_attributes(scripted: torch.jit.ScriptModule) -> list[str]:
    """Qualified names of the attributes that `forward` assigns, in the order of the code.

    Calls are followed and not inlined: of a submodule each method is read once, however often it
    is called, for a few functions that call each other twice would inline to any size.

    Raises:
        ModelError: a loop that has no way out.
    """
    found: dict[str, None] = {}
    seen: set[tuple[str, ...]] = set()

    def walk(path: tuple[str, ...], method: str) -> None:
        if (*path, method) in seen:
            return
        seen.add((*path, method))
        owner: Any = scripted
        for part in path:
            owner = getattr(owner, part)
        graph = getattr(owner, "_c", owner)._get_method(method).graph
        for node in _nodes(graph):
            if node.kind() == "prim::Loop" and _is_endless(node):
                raise ModelError("the code holds a loop that never ends", where=f"{method}()")
            if node.kind() not in ("prim::SetAttr", "prim::CallMethod"):
                continue
            relative = _path(next(iter(node.inputs())), graph)
            if relative is None:
                continue
            if node.kind() == "prim::CallMethod":
                walk((*path, *relative), node.s("name"))
            else:
                found[".".join([*path, *relative, node.s("name")])] = None

    walk((), "forward")
    return list(found)


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _is_endless(loop: Any) -> bool:
    """Whether a loop goes on as long as True is true: `while True` without a way out."""
    most, condition, *_ = loop.inputs()
    again = next(iter(loop.blocks())).returnNode().inputsAt(0)
    values = [value.toIValue() for value in (most, condition, again)]
    return values == [sys.maxsize, True, True]


def _path(value: Any, graph: Any) -> list[str] | None:
    """Attributes that lead from the module to a submodule; None where it is not one by name."""
    node = value.node()
    if node.kind() == "prim::Param":
        return [] if value.debugName() == next(iter(graph.inputs())).debugName() else None
    if node.kind() != "prim::GetAttr":
        return None
    owner = _path(next(iter(node.inputs())), graph)
    return None if owner is None else [*owner, node.s("name")]


def read_attribute(scripted: torch.jit.ScriptModule, name: str) -> Any:
    """Value of an attribute by its qualified name."""
    owner, attribute = owner_of(scripted, name)
    return getattr(owner, attribute)


def set_attribute(scripted: torch.jit.ScriptModule, name: str, value: Any) -> None:
    """Sets an attribute by its qualified name; a buffer too, to any tensor."""
    owner, attribute = owner_of(scripted, name)
    owner._c.setattr(attribute, value)


def owner_of(scripted: torch.jit.ScriptModule, name: str) -> tuple[Any, str]:
    """The submodule that has an attribute, and the last part of the name."""
    path, _, attribute = name.rpartition(".")
    owner: Any = scripted
    for part in path.split(".") if path else []:
        owner = getattr(owner, part)
    return owner, attribute


def settled_values(
    scripted: torch.jit.ScriptModule, names: list[str], inputs: tuple[Any, ...]
) -> Mapping[str, Any]:
    """Values of written attributes at which every call runs the same code.

    A first call often finds its state empty, makes it, and so gives it its shape. The settled
    values are those in front of the first call where they have that shape already, and zeros of
    that shape otherwise; what is no tensor (a last batch size) has the value behind the call.
    The module has its own values again afterwards.

    Raises:
        ModelError: zeros are not what the first call begins with.
    """
    before = {name: read_attribute(scripted, name) for name in names}
    kept = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in before.items()}
    with torch.no_grad():
        first = scripted(*inputs)
        settled = {name: _settled(kept[name], read_attribute(scripted, name)) for name in names}
        for name, value in settled.items():
            set_attribute(scripted, name, _copy(value))
        again = scripted(*inputs)
    for name, value in kept.items():
        set_attribute(scripted, name, value)
    if not _alike(first, again):
        shaped = [n for n in names if isinstance(settled[n], torch.Tensor)]
        raise ModelError(
            "the first call of this TorchScript module makes its state, and not of zeros",
            where=", ".join(shaped),
            fix="Save the module after a first call, so that its attributes hold their state.",
        )
    return settled


def _settled(before: Any, after: Any) -> Any:
    if not isinstance(after, torch.Tensor):
        return after
    if isinstance(before, torch.Tensor) and before.shape == after.shape:
        return before
    return torch.zeros_like(after)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _alike(a: Any, b: Any) -> bool:
    """Whether two results of the module agree up to rounding."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(a, Mapping):
        return all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
