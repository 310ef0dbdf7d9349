"""The copy of a program that is trained: new tensors for all that changes, the rest shared."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.device import set_device
from graphwright.ir.graph.nodes import copy_graph
from graphwright.ir.mode import NORMS
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hooks, Moment
from graphwright.ir.tune.rebuilt import rebuild_in_backward


class Working(nn.Module):
    """A program in training: call it with batches, one tensor per input in each, for the flat
    outputs on each of them. All runs of a step are one call, because a wrapper that averages
    gradients over processes takes what a call did not use for unused.

    Attributes:
        base: the program it began with, in inference mode.
        hooks: may put other values in the place of the parameters.
        at: where the loop stands; set before every call.
    """

    def __init__(
        self, program: Program, names: Collection[str], hooks: Hooks, device: torch.device
    ) -> None:
        super().__init__()
        self.base = program.eval()
        self.hooks = hooks
        self.device = device
        self.at: Moment | None = None
        training = self.base.train()
        moving = running_statistics(training)
        state: dict[str, Tensor] = {}
        for name, tensor in training.state.items():
            if isinstance(tensor, nn.Parameter):
                state[name] = _parameter(tensor, device, trained=name in names)
            else:
                state[name] = _copy(tensor, device) if name in moving else tensor.to(device)
        graph = _on(training.graph, device)
        hooks.on_graph(graph)
        rebuild_in_backward(graph, state)
        self.module = fx.GraphModule(state, graph, class_name="Training")
        self.own = _own(hooks, state, device)
        for number, parameter in enumerate(self.own.values()):
            self.register_parameter(f"own_{number}", parameter)
        self.trained = {
            n: p for n, p in state.items() if n in names and isinstance(p, nn.Parameter)
        } | self.own
        # in state order: processes put these into one message, and a set's order is their own
        self.moving = {name: tensor for name, tensor in state.items() if name in moving}
        self._eval_graph = _on(self.base.graph, device)
        self._state = state

    def forward(self, *batches: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(self._run(inputs) for inputs in batches)

    def _run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = self.values()
        changed = {n: v for n, v in values.items() if v is not self.trained.get(n)}
        if changed:
            from torch.func import functional_call

            return tuple(functional_call(self.module, changed, inputs))
        return tuple(self.module(*inputs))

    def values(self) -> dict[str, Tensor]:
        """Values that the forward pass uses for the trained parameters."""
        assert self.at is not None  # the loop sets it before it calls
        return dict(self.hooks.on_parameters(self.at, self.trained))

    def trained_names(self) -> Iterator[str]:
        """Names of what is trained, as this module's own."""
        numbers = {name: number for number, name in enumerate(self.own)}
        for name in self.trained:
            yield f"own_{numbers[name]}" if name in numbers else f"module.{name}"

    def in_inference(self) -> Program:
        """A program in inference mode on the live tensors, with the values that hooks make."""
        state = {name: self._state[name] for name in self.base.state}
        state |= {n: v for n, v in self.values().items() if v is not self.trained.get(n)}
        return self.base.replace(graph=self._eval_graph, state=state)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that training changes, by name."""
        for name, tensor in (*self.trained.items(), *self.moving.items()):
            yield name, tensor.detach()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `tensors` gave, in place."""
        for name, tensor in self.tensors():
            tensor.copy_(tensors[name])

    def result(self) -> Program:
        """The program with what was trained, on the device it came on."""
        changed: dict[str, Tensor] = {}
        for name, tensor in self.tensors():
            if name in self.own:
                continue
            original = self.base.state[name]
            value = tensor.to(original.device, copy=True)
            is_parameter = isinstance(original, nn.Parameter)
            changed[name] = nn.Parameter(value, original.requires_grad) if is_parameter else value
        return self.base.replace(state={**self.base.state, **changed})


def running_statistics(program: Program) -> set[str]:
    """Names of the buffers that a program in training mode updates as it runs."""
    found = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in NORMS and node.args[5]:
            statistics = (a for a in node.args[3:5] if isinstance(a, fx.Node))
            found |= {str(a.target) for a in statistics if a.op == "get_attr"}
    return found


def _own(hooks: Hooks, state: dict[str, Tensor], device: torch.device) -> dict[str, nn.Parameter]:
    """The recipes' own parameters, on the device."""
    own = dict(hooks.own())
    twice = [name for name in own if name in state]
    if twice:
        raise ValueError(f"a recipe's parameter has the name of the program's own {twice[0]}")
    for parameter in own.values():
        parameter.data = parameter.data.to(device)
    return own


def choose(
    program: Program, names: Collection[str] | None, *, may_be_none: bool = False
) -> tuple[str, ...]:
    """The parameters to train, in state order: of `names`, or all; only those that are trainable.

    Args:
        program: what they are of.
        names: which; all when None.
        may_be_none: there may be none, for a recipe that trains parameters of its own.

    Raises:
        ModelError: there is none, one of `names` is not trainable, or one is in float16.
    """
    trainable = program.trainable()
    for name in names or ():
        if name not in trainable:
            what = "frozen" if name in program.state else "not in the program"
            raise ModelError(f"parameter {name!r} cannot be trained: it is {what}")
    chosen = tuple(name for name in trainable if names is None or name in names)
    if not chosen and not may_be_none:
        raise ModelError("the program has no trainable parameter")
    for name in chosen:
        if trainable[name].dtype == torch.float16:
            raise ModelError(
                f"parameter {name!r} is float16, whose updates round to nothing",
                fix="Train first, and put cast.dtype behind it.",
            )
    return chosen


def frozen(program: Program, device: torch.device) -> Program:
    """The program in inference mode on a device; nothing in it can be trained."""
    program = program.eval()
    state = {
        name: _parameter(t, device, trained=False) if isinstance(t, nn.Parameter) else t.to(device)
        for name, t in program.state.items()
    }
    return program.replace(graph=_on(program.graph, device), state=state)


def copied(program: Program, device: torch.device) -> fx.GraphModule:
    """A program in inference mode as a module to train, with tensors of its own.

    It takes and returns flat tensors; what the program does not train it does not either.
    """
    program = program.eval()
    trainable = program.trainable()
    state = {
        name: _parameter(t, device, trained=name in trainable)
        if isinstance(t, nn.Parameter)
        else _copy(t, device)
        for name, t in program.state.items()
    }
    return fx.GraphModule(state, _on(program.graph, device), class_name="Copied")


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generators: the caller's state is put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _parameter(tensor: Tensor, device: torch.device, *, trained: bool) -> nn.Parameter:
    value = _copy(tensor, device) if trained else tensor.detach().to(device)
    return nn.Parameter(value, requires_grad=trained)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)


def _on(graph: fx.Graph, device: torch.device) -> fx.Graph:
    copy: Any = copy_graph(graph)
    set_device(copy, device)
    return copy  # type: ignore[no-any-return]
