"""A program: graph, tensors, signature, and the record of what was done to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphwright.ir.data.defaults import with_defaults
from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import Signature, TensorSpec, rebuild


@dataclass(frozen=True)
class Provenance:
    """One pass that a program went through.

    Attributes:
        id: pass id, as `cleanup.fold_batch_norm`.
        options: its resolved options.
        seed: seed of its random streams.
        contract: what it promised (`exact`, `identity_at_init`, `lossy`).
        digest: of the program it was given (`ir/graph/digest.py`).
    """

    id: str
    options: dict[str, Any]
    seed: int
    contract: str
    digest: str = ""


@dataclass(frozen=True)
class Program:
    """A model as a flat graph of ATen calls over named tensors. Passes return a new one.

    Attributes:
        graph: one placeholder per tensor input, `get_attr` nodes whose targets are names in
            `state`, and an output node that returns one flat tuple. Every node but the output
            has `meta["val"]`.
        state: qualified name to tensor; an `nn.Parameter` is a parameter, a plain tensor a
            buffer or constant. Tensors are shared between programs and never written to.
        signature: names, dtypes, symbolic shapes, output structure.
        examples: one tensor per input.
        aliases: canonical name to all names of a tied tensor in the original model.
        provenance: passes run so far, in order.
        facts: JSON-able notes that one pass leaves for a later one, by pass id.
    """

    graph: fx.Graph
    state: Mapping[str, torch.Tensor]
    signature: Signature
    examples: tuple[torch.Tensor, ...]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    provenance: tuple[Provenance, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def module(self) -> fx.GraphModule:
        """The program as an `nn.Module`: flat tensors in, flat tuple out."""
        module = fx.GraphModule(dict(self.state), self.graph, class_name="Program")
        # programs with other weights share the graph, which would keep these alive with it
        self.graph.owning_module = None
        return module

    @cached_property
    def running(self) -> fx.GraphModule:
        """As `module`, with every compressed weight rebuilt where it is first read (`turns.py`).

        So one weight is held as floats at a time. Its nodes are others than those of `graph`, of
        the same names.
        """
        from graphwright.ir.graph.turns import laid_out

        graph = laid_out(self.graph)
        if graph is self.graph:
            return self.module
        return fx.GraphModule(dict(self.state), graph, class_name="Program")

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Runs the program; the result is structured like the model's own output.

        Args:
            inputs: tensors in the order of `signature.inputs`.
            named: tensors by input name. Those with a rule in `signature.defaults` may be left
                out.

        Raises:
            ArgumentError: a missing or unknown input, a wrong dtype or shape, or another value
                for an argument that tracing baked in.
        """
        flat = self.run_flat(self.bind(*inputs, **named))
        return rebuild(self.signature.structure, flat)

    def run_flat(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Runs the graph on one tensor per input; returns the flat output tuple, unchecked.

        Inputs at the end may be left out where the program has a default for them.
        """
        return tuple(self.running(*self.filled(inputs)))

    def filled(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The inputs, with the program's defaults for those at the end that are left out."""
        left_out = self.signature.inputs[len(inputs) :]
        if not left_out:
            return inputs
        names = [spec.name for spec in self.signature.inputs]
        given = dict(zip(names, inputs, strict=False))
        defaults = {**self.initial_state(), **with_defaults(self.signature, given)}
        return (*inputs, *(defaults[spec.name] for spec in left_out if spec.name in defaults))

    def bind(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        """Inputs in call order, checked against the signature."""
        given = {spec.name for spec in self.signature.inputs[: len(inputs)]}
        initial = {n: t for n, t in self.initial_state().items() if n not in given}
        return bind_inputs(self.signature, inputs, {**initial, **named})

    def initial_state(self) -> dict[str, torch.Tensor]:
        """The model's own state by input name; empty where state is frozen or there is none."""
        examples = zip(self.signature.inputs, self.examples, strict=True)
        return {s.name: example for s, example in examples if s.name in self.signature.state}

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by name, in state order."""
        return {n: t for n, t in self.state.items() if isinstance(t, torch.nn.Parameter)}

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that require a gradient, by name."""
        return {n: p for n, p in self.parameters().items() if p.requires_grad}

    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """State with every alias of a tied tensor restored; the same tensor object under each."""
        out = dict(self.state)
        for canonical, names in self.aliases.items():
            if canonical in out:
                out.update({name: out[canonical] for name in names})
        return out

    def replace(self, **changes: Any) -> Program:
        """A program with some fields replaced."""
        return replace(self, **changes)

    def train(self) -> Program:
        """The program in training mode: batch norm by batch statistics, dropout back in."""
        from graphwright.ir.mode import set_mode

        return set_mode(self, training=True)

    def eval(self) -> Program:
        """The program in inference mode: running statistics, no dropout."""
        from graphwright.ir.mode import set_mode

        return set_mode(self, training=False)

    def save(self, path: str | Path) -> None:
        """Writes the program to one `.pt2` file; `graphwright.load` reads it back."""
        from graphwright.ir.files.archive import save_program

        save_program(self, path)

    def __str__(self) -> str:
        ins = ", ".join(f"{s.name}: {s.dtype}{list(s.shape)}" for s in self.signature.inputs)
        calls = sum(1 for node in self.graph.nodes if node.op == "call_function")
        size = sum(t.numel() for t in self.parameters().values())
        return f"Program({ins}; {calls} ops, {size:,} parameters)"

    __repr__ = __str__


def bind_inputs(
    signature: Signature, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Inputs in call order, with names, dtypes, ranks and sizes checked against `signature`.

    Raises:
        ArgumentError: as `Program.__call__` says.
    """
    specs = signature.inputs
    if len(inputs) > len(specs):
        raise ArgumentError(f"got {len(inputs)} inputs, and the program takes {len(specs)}")
    given = dict(zip((s.name for s in specs), inputs, strict=False))
    for name, value in named.items():
        if name in given:
            raise ArgumentError(f"input {name!r} is given twice")
        if name in signature.constants:
            if value != signature.constants[name]:
                baked = signature.constants[name]
                raise ArgumentError(
                    f"{name} = {value!r}: tracing baked in {baked!r}",
                    fix="Trace again with the other value.",
                )
            continue
        given[name] = value
    given = with_defaults(signature, given)
    known = [s.name for s in specs]
    missing = [name for name in known if name not in given]
    unknown = [name for name in given if name not in known]
    if missing or unknown:
        parts = [f"missing {missing}"] if missing else []
        parts += [f"unknown {unknown}"] if unknown else []
        raise ArgumentError(f"inputs: {', '.join(parts)}; the program takes {known}")
    sizes: dict[str, int] = {}
    for spec in specs:
        _check_input(spec, given[spec.name], signature, sizes)
    _check_derived(signature, sizes)
    return tuple(given[name] for name in known)


def _check_derived(signature: Signature, sizes: Mapping[str, int]) -> None:
    for dim, size in signature.completed(sizes).items():
        if sizes.get(dim, size) != size:
            sum_of = signature.derived[dim]
            terms = ", ".join(f"{name} {sizes[name]}" for name in sizes if name in sum_of.split())
            bearers = _bearers(signature, dim)
            raise ArgumentError(
                f"dimension {dim!r} is {sizes[dim]} and has to be {size}, {sum_of} ({terms})",
                fix=f"Give {bearers} one column per token, the past ones included.",
            )


def _bearers(signature: Signature, dim: str) -> str:
    return " and ".join(spec.name for spec in signature.inputs if dim in spec.shape)


def _check_input(spec: TensorSpec, value: Any, signature: Signature, sizes: dict[str, int]) -> None:
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(f"input {spec.name!r} is a {type(value).__name__}, not a tensor")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise ArgumentError(f"input {spec.name!r} is {dtype}; the program takes {spec.dtype}")
    shape = tuple(value.shape)
    wanted = "(" + ", ".join(str(d) for d in spec.shape) + ")"
    if len(shape) != len(spec.shape):
        raise ArgumentError(f"input {spec.name!r} has shape {shape}; the program takes {wanted}")
    for size, dim in zip(shape, spec.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise ArgumentError(
                    f"input {spec.name!r} has shape {shape}; the program takes {wanted}"
                )
            continue
        if sizes.setdefault(dim, size) != size:
            raise ArgumentError(
                f"dimension {dim!r} is {sizes[dim]} and, in input {spec.name!r}, {size} in one call"
            )
        bounds = signature.dims.get(dim)
        if bounds and (size < bounds.min or (bounds.max is not None and size > bounds.max)):
            raise ArgumentError(
                f"dimension {dim!r} of input {spec.name!r} is {size}; the program takes "
                f"{bounds.min} to {bounds.max if bounds.max is not None else 'any size'}"
            )
