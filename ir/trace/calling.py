"""Any calling convention as flat tensors in, flat tuple of tensors out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.torchscript import ScriptedModule
from graphwright.ir.signature import flatten, leaf_names, rebuild
from graphwright.ir.trace.assigned_data import assigned_data
from graphwright.ir.trace.derived import Derived
from graphwright.ir.trace.free_sizes import KeepSizesFree
from graphwright.ir.trace.inactive_dropout import KeepInputsApart
from graphwright.ir.trace.known_values import KnownValues
from graphwright.ir.trace.state import State, put
from graphwright.ir.trace.untouched import untouched

EXPORTING = (KnownValues, KeepInputsApart, KeepSizesFree)
"""Modes in which a model runs while it is exported."""

Call = Callable[..., Any]
"""`call(model, **arguments)`: calls the model with arguments that are none of its `forward`."""

POSITIONAL = "*"
"""Key of arguments that have no name, as those of `forward(*inputs)`."""


@dataclass(frozen=True)
class Constant:
    """An argument that is a scalar tensor of one value: part of the program, and no input."""

    value: bool | int | float
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        """The argument, of no dimension."""
        return torch.full((), self.value, dtype=self.dtype)


class _Record:
    """A record of a trace. It is an object, since torch resets attributes of a traced module."""

    def __init__(self) -> None:
        self.structure: Any = None
        self.dropped: dict[str, str] = {}


class FlatModel(nn.Module):
    """A model that takes flat tensors and returns a flat tuple of tensors.

    Attributes:
        model: the user's model.
        inputs: example tensors by input name, in call order.
        constants: arguments that are no tensors, by name; baked in.
        call: how the model is called, where that is not by its `forward` with the inputs' names.
        derived: dimensions that follow from others.
        state: what the model carries from call to call, where that is an input and an output.
        keeps_sizes: whether an export keeps the numbers that the model's code makes of sizes.
        larger_by: by how much the free dimensions of an export are larger than the example's.
        places: of the last export, the model's "path:line" by the symbol of a size that it fixed.
        record: structure of the last output, and parts of it that hold no tensors we can name.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Any] | Mapping[str, Any],
        call: Call | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.call = call
        own = call is None or not isinstance(examples, Mapping)
        arguments = named_arguments(model, examples) if own else dict(examples)
        tensors: list[torch.Tensor] = []
        self.trees = {name: _flatten_argument(v, tensors) for name, v in arguments.items()}
        self.inputs = dict(zip(_input_names(self.trees), tensors, strict=True))
        self.constants = {
            name: value.value if isinstance(value, Constant) else value
            for name, value in arguments.items()
            if isinstance(value, bool | int | float | str | Constant)
        }
        self.record = _Record()
        self.state = State()
        self.derived = Derived()
        self.keeps_sizes = False
        self.larger_by = 0
        self.places: dict[str, str] = {}

    def take_state(self, state: State) -> None:
        """Makes state inputs, behind the model's own, and outputs, behind its own."""
        self.state = state
        self.inputs.update({slot.input_name: value for slot, value in state.tensors})

    def run(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Calls the model and leaves it as it was."""
        with untouched(self.model):
            return tuple(t.clone() for t in self(*tensors))

    def settle(self) -> None:
        """Gives a TorchScript module that makes its state in its first call that state."""
        if isinstance(self.model, ScriptedModule):
            positional, arguments = self._arguments(tuple(self.inputs.values()))
            self.model.settle(*positional, **arguments)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.state.tensors:
            return self._call(tensors)[0]
        count = len(self.state.tensors)
        places = [*self.state.tensors, *self.state.settled]
        before = [slot.get() for slot, _ in places]
        put(self.state, [t.clone() for t in tensors[-count:]])
        try:
            leaves, structure = self._call(tensors[:-count])
            after = [slot.get() for slot, _ in self.state.tensors]
        finally:
            for (slot, _), value in zip(places, before, strict=True):
                slot.put(value)
        names = [slot.input_name for slot, _ in self.state.tensors]
        parts = {name: {"leaf": len(leaves) + i} for i, name in enumerate(names)}
        self.record.structure = {"state": [structure, {"dict": parts}]}
        return (*leaves, *after)

    def _arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, dict[str, Any]]:
        arguments = {name: rebuild(tree, tensors) for name, tree in self.trees.items()}
        arguments = {n: v.tensor() if isinstance(v, Constant) else v for n, v in arguments.items()}
        return arguments.pop(POSITIONAL, ()), arguments

    def _call(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], Any]:
        """The tensors that the model returns, and their structure."""
        positional, arguments = self._arguments(tensors)
        leaves: list[torch.Tensor] = []
        record = _Record()
        with ExitStack() as stack:
            for mode in EXPORTING if torch.compiler.is_exporting() else ():
                stack.enter_context(mode())
            stack.enter_context(assigned_data(self.model))
            if self.call is None:
                output = self.model(*positional, **arguments)
            else:
                output = self.call(self.model, **arguments)
        record.structure = flatten(_nameable(output, "", record.dropped), leaves)
        if not leaves:
            raise ModelError("the model returns no tensors")
        self.record.__dict__.update(record.__dict__)
        return tuple(leaves), record.structure


def named_arguments(
    model: nn.Module, examples: Sequence[Any] | Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of one call by name; unnamed ones as a tuple under `*`.

    A mapping whose keys are no parameters of a `forward` that takes one argument is itself that
    argument (models that take one dict).
    """
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(examples, Mapping):
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        unknown = [name for name in examples if name not in names]
        required = [p.name for p in parameters if p.default is p.empty and p.name in names]
        if unknown and len(required) == 1 and required[0] not in examples:
            return {required[0]: dict(examples)}
        if unknown and not takes_any:
            raise ArgumentError(f"the model takes no {unknown}; its arguments are {names}")
        return dict(examples)
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(positional) < len(examples):
        return {POSITIONAL: tuple(examples)}
    return dict(zip(positional, examples, strict=False))


def _flatten_argument(value: Any, leaves: list[Any]) -> Any:
    """As `flatten`; an object that is no container is baked in as it is."""
    if isinstance(value, Constant):
        return {"value": value}
    try:
        return flatten(value, leaves)
    except TypeError:
        return {"value": value}


def _input_names(trees: dict[str, Any]) -> list[str]:
    """One identifier per tensor. The name of an argument is left out where it is the only one."""
    leaves = dict(leaf_names({"dict": trees}))
    names: list[str] = []
    for index in range(len(leaves)):
        name = leaves[index].removeprefix(f"{POSITIONAL}_")
        (only,) = trees if len(trees) == 1 else ("",)
        name = name.removeprefix(f"{only}_") if only else name
        name = re.sub(r"\W", "_", name)
        name = name if name.isidentifier() else f"input_{name}"
        while name in names:
            name += "_"
        names.append(name)
    return names


def _nameable(value: Any, path: str, dropped: dict[str, str]) -> Any:
    """The output with symbolic sizes as tensors, and objects that hold no tensors left out."""
    if isinstance(value, torch.SymInt | torch.SymFloat):
        number: Any = value
        dtype = torch.int64 if isinstance(value, torch.SymInt) else torch.float32
        return torch.scalar_tensor(number, dtype=dtype)
    if isinstance(value, dict) and type(value) is not dict:
        # A record as transformers' ModelOutput: a dict that knows its fields.
        items = {k: _nameable(v, f"{path}.{k}", dropped) for k, v in value.items()}
        return _Named(items)
    if type(value) is dict:
        return {k: _nameable(v, f"{path}.{k}", dropped) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_nameable(v, f"{path}.{i}", dropped) for i, v in enumerate(value))
    try:
        flatten(value, [])
    except TypeError:
        if not path:
            raise ModelError(
                f"the model returns a {type(value).__name__}, which holds no tensors",
                fix="Return tensors, in tuples, lists, dicts or dataclasses.",
            ) from None
        dropped[path.lstrip(".")] = type(value).__name__
        return None
    return value


class _Named(dict[str, Any]):
    """Marks a record, so that its structure is `named` and comes back with attributes."""
