"""Tensors that a model writes as it runs and reads at its next call: frozen, or inputs and outputs.

A graph holds no state. Frozen, every call starts from what the checkpoint holds; explicit, the
state is an input and its new value an output, and the caller hands it on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.trace.untouched import Writes, untouched

EXPLICIT = 'Trace with state="explicit" (in a spec: model: {state: explicit})'


@dataclass(frozen=True)
class Slot:
    """One place of a module that holds state.

    Attributes:
        name: qualified name, as `encoder.cache`.
        module: the module it belongs to.
        attribute: its name there.
    """

    name: str
    module: nn.Module
    attribute: str

    def get(self) -> Any:
        """The value that it holds."""
        return self._place().get(self.attribute)

    def put(self, value: Any) -> None:
        """Sets it without the checks of `nn.Module`, which export watches."""
        self._place()[self.attribute] = value

    def _place(self) -> dict[str, Any]:
        buffers: dict[str, Any] = self.module._buffers
        return buffers if self.attribute in buffers else vars(self.module)

    @property
    def input_name(self) -> str:
        """An identifier for the input that stands for it."""
        return re.sub(r"\W", "_", self.name)


@dataclass(frozen=True)
class State:
    """The state that a model carries from one call to the next.

    Attributes:
        tensors: places of tensors, each with the value before the first call.
        settled: places of other values, with the value that the first call leaves.
    """

    tensors: tuple[tuple[Slot, Tensor], ...] = ()
    settled: tuple[tuple[Slot, Any], ...] = ()

    def names(self) -> list[str]:
        """Qualified names, tensors first."""
        return [slot.name for slot, _ in (*self.tensors, *self.settled)]


def carried_over(model: nn.Module, call: Any, inputs: Sequence[Tensor]) -> Writes:
    """State that a call writes and a later one reads; empty where calls do not depend on earlier
    ones.

    Args:
        model: left as it was.
        call: runs the model on tensors; returns a tuple of tensors.
        inputs: example inputs.
    """
    with untouched(model) as writes:
        first = call(*inputs)
        first = tuple(t.clone() for t in first)
    if not writes:
        return writes
    for others in (tuple(inputs), tuple(_other(t) for t in inputs)):
        try:
            with untouched(model):
                fresh = tuple(t.clone() for t in call(*others))
            with untouched(model):
                call(*inputs)
                later = call(*others)
        except Exception:
            continue  # a model that cannot run twice says so in its own words when it is traced
        if not all(map(_same, fresh, later)):
            return writes
    return Writes()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=True))


def _other(tensor: Tensor) -> Tensor:
    """Inputs that differ: half the numbers, or the order turned round."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor * 0.5
    return tensor.flip(-1) if tensor.dim() else tensor


def state_of(model: nn.Module, writes: Writes, call: Any, inputs: Sequence[Tensor]) -> State:
    """The state behind `writes`, fit to be handed in and out.

    A tensor that is not there before the first call starts as zeros of the shape that the call
    leaves, if the model computes the same from them.

    Raises:
        ModelError: it does not, or the state is in a container; names the attribute.
    """
    if writes.contents:
        raise ModelError(
            f"the state in {writes.contents[0]!r} is no tensor of a module",
            fix="Register the tensors as buffers; a list, a dict or an object cannot be handed on.",
        )
    modules = dict(model.named_modules())
    slots = {name: _slot(modules, name) for name in (*writes.tensors, *writes.others)}
    with untouched(model):
        fresh = tuple(t.clone() for t in call(*inputs))
        after = {name: slot.get() for name, slot in slots.items()}
        after = {n: v.clone() if isinstance(v, Tensor) else v for n, v in after.items()}
    tensors, missing = [], []
    for name, before in writes.tensors.items():
        value = after[name]
        if not isinstance(before, Tensor) or before.shape != value.shape:
            missing.append(name)
            before = torch.zeros_like(value)
        tensors.append((slots[name], before.detach().clone()))
    settled = tuple((slots[name], after[name]) for name in writes.others)
    state = State(tuple(tensors), settled)
    if missing:
        with untouched(model):
            put(state, [t for _, t in state.tensors])
            started = call(*inputs)
            if not all(map(_same, fresh, started)):
                raise ModelError(
                    f"the state {missing[0]!r} has no value before the first call, and zeros do "
                    "not stand for it",
                    fix="Register it as a buffer with its first value.",
                )
    return state


def _slot(modules: Mapping[str, nn.Module], name: str) -> Slot:
    path, _, attribute = name.rpartition(".")
    return Slot(name, modules[path], attribute)


def put(state: State, values: Sequence[Tensor]) -> None:
    """Puts tensors in the places of the state, and settled values in theirs."""
    for (slot, _), value in zip(state.tensors, values, strict=True):
        slot.put(value)
    for slot, value in state.settled:
        slot.put(value)


def frozen_note(names: Sequence[str]) -> str:
    """Notes on state that stays in the program as it was before the first call."""
    listed = ", ".join(repr(name) for name in names)
    return (
        f"the model writes {listed} as it runs and reads it at the next call: frozen at its value "
        f"before the first call, so that every call is the first. {EXPLICIT} to make it an input "
        "and an output"
    )
